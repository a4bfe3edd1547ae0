"""What this machine can do at most, measured by a small C program: `machine.c`.

NumPy cannot reach the peak of the multiply-add units, so the program is compiled here with the
system's compiler. Where there is none there is no limit to compare with, and no guess either.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("machine.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-pthread")
#: Together the arrays should be far larger than the last-level cache.
_MEBIBYTES, _TRIALS = 1024, 5


class NotMeasuredError(RuntimeError):
    """The machine's limits could not be measured; the message says why."""


@dataclass(frozen=True)
class Machine:
    """Measured limits of some threads together.

    Attributes
    ----------
    threads : int
    fma_flops : float
        Float32 operations a second, two a multiply-add.
    update, read, copy : float
        Bytes a second: of AdamW's traffic (four arrays read, three of them written), of reading
        four arrays, and of ``memcpy`` (read and written both count).
    """

    threads: int
    fma_flops: float
    update: float
    read: float
    copy: float

    def __str__(self) -> str:
        memory = ", ".join(f"{k} {getattr(self, k) / 1e9:.1f}" for k in ("update", "read", "copy"))
        return (
            f"{self.fma_flops / 1e9:.0f} GFLOP/s in float32; memory in GB/s: {memory} "
            f"({self.threads} threads)"
        )


def measure(threads: int, mebibytes: int = _MEBIBYTES, trials: int = _TRIALS) -> Machine:
    """Return the machine's limits now; a second or two.

    Raises
    ------
    NotMeasuredError
        If there is no C compiler, or the program cannot be compiled or run.
    """
    asked = os.environ.get("CC", "").split()
    compiler = asked or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not compiler:
        raise NotMeasuredError("no C compiler (cc, gcc or clang) to measure the machine with")
    with tempfile.TemporaryDirectory() as directory:
        program = str(Path(directory) / "machine")
        _call([*compiler, *_FLAGS, str(_SOURCE), "-o", program])
        printed = _call([program, str(threads), str(mebibytes), str(trials)])
    return Machine(threads=threads, **json.loads(printed))


def _call(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise NotMeasuredError(f"{command[0]} is not there") from error
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip().splitlines()[:1] or [f"exit status {error.returncode}"]
        raise NotMeasuredError(f"{command[0]}: {why[0]}") from error
    return done.stdout
