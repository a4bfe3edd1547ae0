"""Checks of what a rollout has become: each names the sample at fault."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from loopos.autograd import Array
from loopos.errors import LooposError, NumericalError
from loopos.methods.rollouts import Rollout
from loopos.training.online import EndOfRun

__all__ = ["ENTROPY_TOLERANCE", "RATIO_TOLERANCE", "SAMPLING_TOLERANCE", "named_step",
           "require_finite", "require_small"]  # fmt: skip

#: How far the first ratio may be from 1, and entropy outside its bounds.
RATIO_TOLERANCE = ENTROPY_TOLERANCE = 1e-4
#: How far a sampled log-probability may be from the one computed again, in full precision.
SAMPLING_TOLERANCE = 1e-3


def require_small(rollout: Rollout, x: Array, limit: float, what: str) -> None:
    """Check a value of each response token.

    Parameters
    ----------
    rollout : Rollout
    x : ndarray [M]
    limit : float
        What none may be above.
    what : str
        What is said of the worst token otherwise; its value goes into the braces.

    Raises
    ------
    NumericalError
        Naming the sample.
    """
    worst = int(np.argmax(x))  # the first NaN, if there is one
    if not x[worst] <= limit:
        raise NumericalError(
            f"a token of the response to sample {rollout.sample_of(worst)} "
            + what.format(float(x[worst]))
        )


def require_finite(rollout: Rollout, arrays: Mapping[str, Array]) -> None:
    """Check arrays with a value for each response token.

    Raises
    ------
    NumericalError
        Naming the array and the sample.
    """
    for name, array in arrays.items():
        bad = np.flatnonzero(~np.isfinite(array))
        if bad.size:
            raise NumericalError(
                f"'{name}' of a token of the response to sample "
                f"{rollout.sample_of(int(bad[0]))} is {array[bad[0]]}"
            )


@contextmanager
def named_step(step: int) -> Iterator[None]:
    """Begin the message of what is raised inside with the number of the step."""
    try:
        yield
    except EndOfRun:
        raise
    except LooposError as error:
        raise type(error)(f"step {step}: {error}") from error
