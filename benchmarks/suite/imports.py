"""What it costs to have loopos in a program that has other things to do."""

import subprocess
import sys
import time

import numpy as np

from . import works


class Import:
    """``import loopos`` in a fresh process."""

    def timeraw_import(self):
        return "import loopos"

    def track_multiple_of_target(self):
        def run(statement):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            return time.perf_counter() - start

        spent = [run("import loopos") - run("pass") for _ in range(7)]
        return max(0.0, float(np.median(spent))) / works.TARGETS["import"]["numpy"]

    track_multiple_of_target.unit = "x target (below 1 is met)"


class Memory:
    """The empty reference: what the process has before any work."""

    def peakmem_reference(self):
        pass
