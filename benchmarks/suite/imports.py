"""What it costs to have loopos in a program that has other things to do."""

import subprocess
import sys
import time

import numpy as np

import loopos

from . import targets

_FIRST_STEP = """
import sys
sys.path.insert(0, {root!r})
import loopos
from suite import works
with loopos.use_backend({backend!r}):
    works.WORKS["A"]().run()
"""


def _spent_s(statement, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


class Import:
    """``import loopos`` in a fresh process."""

    def timeraw_import(self):
        return "import loopos"

    def track_multiple_of_target(self):
        spent = _spent_s("import loopos", 7) - _spent_s("pass", 7)
        return max(0.0, spent) / targets.seconds("import", "any")

    track_multiple_of_target.unit = "x target (below 1 is met)"


class FirstStep:
    """From ``python`` to the end of the first fine-tuning epoch."""

    params = loopos.available_backends()
    param_names = ("backend",)
    timeout = 300

    def _median_s(self, backend):
        root = str(targets.PATH.parent)
        return _spent_s(_FIRST_STEP.format(root=root, backend=backend), 3)

    def track_seconds(self, backend):
        return self._median_s(backend)

    def track_multiple_of_target(self, backend):
        target = targets.seconds("first-step", backend)
        return float("nan") if target is None else self._median_s(backend) / target

    track_seconds.unit = "s"
    track_multiple_of_target.unit = "x target (below 1 is met)"


class Memory:
    """The empty reference: what the process has before any work."""

    def peakmem_reference(self):
        pass
