"""From nothing to a finished step."""

import loopos

from . import targets
from .imports import spent_s

_FIRST_STEP = """
import sys
sys.path.insert(0, {root!r})
import loopos
from suite import works
with loopos.use_backend({backend!r}):
    works.WORKS["A"]().run()
"""


class FirstStep:
    """From ``python`` to the end of the first fine-tuning epoch."""

    params = loopos.available_backends()
    param_names = ("backend",)
    timeout = 300

    def _median_s(self, backend):
        root = str(targets.PATH.parent)
        return spent_s(_FIRST_STEP.format(root=root, backend=backend), 3)

    def track_seconds(self, backend):
        return self._median_s(backend)

    def track_multiple_of_target(self, backend):
        target = targets.seconds("first-step", backend)
        return float("nan") if target is None else self._median_s(backend) / target

    track_seconds.unit = "s"
    track_multiple_of_target.unit = "x target (below 1 is met)"
