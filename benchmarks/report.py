#!/usr/bin/env python3
"""Print medians of the documented works as multiples of their targets; needs an idle machine.

python benchmarks/report.py
"""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from suite import works

import loopos


def median_s(run: object, repeats: int = 9) -> float:
    """Seconds of one call, after three warm-ups."""
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        run()  # type: ignore[operator]
        times.append(time.perf_counter() - start)
    return float(np.median(times[3:]))


def main() -> int:
    """Return 1 when a target is missed."""
    missed = 0
    print(f"loopos {loopos.__version__}, NumPy {np.__version__}, {platform.machine()}")
    target = works.TARGETS["fine_tuning_epoch"]
    for backend in loopos.available_backends():
        with loopos.use_backend(backend) as chosen:
            described = chosen.describe()
            spent = median_s(works.fine_tuning_epoch())
        ratio = spent / target[backend]
        missed += ratio > 1
        print(
            f"fine-tuning epoch, {backend} ({described['isa']}, {described['threads']} threads): "
            f"{spent:.3f} s = {ratio:.2f} x target of {target[backend]} s"
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
