"""Checks of what a rollout has become: each names the sample at fault."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager

import numpy as np

from loopos.autograd import Array
from loopos.errors import LooposError, NumericalError
from loopos.methods.rollouts import Rollout
from loopos.training.online import EndOfRun

__all__ = ["ENTROPY_TOLERANCE", "RATIO_TOLERANCE", "SAMPLING_TOLERANCE", "named_step",
           "require_ends", "require_finite", "require_scores_at_end", "require_small"]  # fmt: skip

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


def require_ends(rollout: Rollout, stops: Set[int]) -> None:
    """Check that each response ends with its first stop token, and nowhere else.

    A score belongs to the last token: tokens after the end, such as padding, would move it.

    Parameters
    ----------
    rollout : Rollout
        Each response with a token.
    stops : set of int
        Tokens that end a response; without any, nothing is known.

    Raises
    ------
    NumericalError
        Naming the sample and the place.
    """
    if not stops:
        return
    offsets = rollout.response_offsets
    hits = np.flatnonzero(np.isin(rollout.targets, list(stops)))
    ends = np.zeros(len(rollout), bool)
    for hit in hits.tolist():
        place = int(np.searchsorted(offsets, hit, side="right")) - 1
        if hit + 1 < offsets[place + 1]:
            raise NumericalError(
                f"the response to sample {int(rollout.samples[place])} goes on after its stop "
                f"token, the {hit - int(offsets[place]) + 1}. of {int(rollout.lengths[place])}: "
                "its score would stand at the wrong token"
            )
        ends[place] = True
    wrong = np.flatnonzero(ends != rollout.ended)
    if wrong.size:
        claim = "not to" if ends[wrong[0]] else "to"
        raise NumericalError(
            f"the response to sample {int(rollout.samples[wrong[0]])} is said {claim} end with a "
            f"stop token, but its last token is {int(rollout.targets[offsets[wrong[0] + 1] - 1])}"
        )


def require_scores_at_end(rollout: Rollout, rewards: Array, cost: Array, scores: Array) -> None:
    """Check that rewards are their KL cost, and the score at each response's last token.

    Parameters
    ----------
    rollout : Rollout
    rewards, cost : ndarray [M]
    scores : ndarray [B]

    Raises
    ------
    NumericalError
        Naming the sample.
    """
    expected = -cost.astype(np.float64)
    expected[rollout.response_offsets[1:] - 1] += scores
    limit = 1e-5 * (1.0 + float(np.abs(expected).max()))
    off = np.abs(rewards - expected)
    require_small(rollout, off, limit, "has a reward that is {:.3g} off: the score is misplaced")


@contextmanager
def named_step(step: int) -> Iterator[None]:
    """Begin the message of what is raised inside with the number of the step."""
    try:
        yield
    except EndOfRun:
        raise
    except LooposError as error:
        raise type(error)(f"step {step}: {error}") from error
