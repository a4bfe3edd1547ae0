"""From nothing to a finished step."""

from . import targets
from .epochs import BACKENDS, THREADS
from .imports import spent_s

_FIRST_STEP = """
import sys
sys.path.insert(0, {root!r})
import loopos
from loopos.backends.threads import thread_limit
from suite import works
with loopos.use_backend({backend!r}), thread_limit({threads}):
    works.WORKS["A"]().run()
"""


class FirstStep:
    """From ``python`` to the end of the first fine-tuning epoch."""

    params = (BACKENDS, THREADS)
    param_names = ("backend", "threads")
    timeout = 300

    def _median_s(self, backend, threads):
        root = str(targets.PATH.parent)
        return spent_s(_FIRST_STEP.format(root=root, backend=backend, threads=threads), 3)

    def track_seconds(self, backend, threads):
        return self._median_s(backend, threads)

    def track_multiple_of_target(self, backend, threads):
        target = targets.seconds("first-step", backend)
        return float("nan") if target is None else self._median_s(backend, threads) / target

    track_seconds.unit = "s"
    track_multiple_of_target.unit = "x target (below 1 is met)"
