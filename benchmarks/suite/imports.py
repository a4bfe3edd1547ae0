"""What it costs to have loopos in a program that has other things to do."""

import os
import subprocess
import sys
import time

import numpy as np

from . import targets


def spent_s(statement, repeats):
    # Modules are compiled once, as if installed.
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"}
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True, env=environment)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


class Import:
    """``import loopos`` in a fresh process."""

    def timeraw_import(self):
        return "import loopos"

    def track_multiple_of_target(self):
        spent = spent_s("import loopos", 7) - spent_s("pass", 7)
        return max(0.0, spent) / targets.seconds("import", "any")

    track_multiple_of_target.unit = "x target (below 1 is met)"


class Memory:
    """The empty reference: what the process has before any work."""

    def peakmem_reference(self):
        pass
