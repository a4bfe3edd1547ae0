"""Learning-rate schedules: plain functions of the step, with a linear warm-up before them.

The arithmetic is that of transformers' ``get_constant_schedule_with_warmup`` and its linear and
cosine relatives: step 0 of a warm-up has rate 0, and the last step of a decay is just above 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from loopos.errors import ConfigError, nearest

__all__ = ["SCHEDULES", "make_schedule"]


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return max(0.0, 1.0 - progress)


def _cosine(progress: float) -> float:
    """Half a cosine (Loshchilov and Hutter 2017, without restarts)."""
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


#: Name -> factor of the base rate, given how much of the steps after the warm-up has passed.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}


def make_schedule(
    name: str, learning_rate: float, warmup_steps: int, total_steps: int
) -> Callable[[int], float]:
    """Return the learning rate as a function of the step, which counts from 0.

    Parameters
    ----------
    name : {"constant", "linear", "cosine"}
    learning_rate : float
        The highest rate, reached after the warm-up.
    warmup_steps : int
        Steps over which the rate grows linearly from 0.
    total_steps : int
        Steps of the run; a decay ends there.

    Raises
    ------
    ConfigError
        If there is no such schedule.
    """
    if name not in SCHEDULES:
        raise ConfigError(
            f"training.scheduler: expected one of {', '.join(SCHEDULES)}, "
            f"found '{name}'{nearest(name, SCHEDULES)}"
        )
    factor = SCHEDULES[name]

    def rate(step: int) -> float:
        if step < warmup_steps:
            return learning_rate * step / warmup_steps
        return learning_rate * factor((step - warmup_steps) / max(1, total_steps - warmup_steps))

    return rate
