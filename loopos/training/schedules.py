"""Learning-rate schedules: plain functions of the step, with a linear warm-up before them.

The arithmetic is that of transformers' ``get_*_schedule_with_warmup``, and of PyTorch's ``StepLR``
for "step": step 0 of a warm-up has rate 0, and the last step of a decay is just above its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from loopos.errors import ConfigError, nearest

__all__ = ["SCHEDULES", "Shape", "make_schedule"]

#: Steps, where "inverse_sqrt" has neither a timescale nor a warm-up.
_TIMESCALE = 10_000


@dataclass(frozen=True)
class Shape:
    """What some schedules have of their own; None takes the default.

    Attributes
    ----------
    cycles : int or None
        Of "cosine_with_restarts"; 1.
    power : float or None
        Of "polynomial"; 1.
    step_size : int or None
        Steps between the drops of "step"; a third of those after the warm-up.
    gamma : float or None
        Factor at each drop of "step"; 0.1.
    timescale : int or None
        Of "inverse_sqrt": the rate is ``sqrt(timescale / (step - warmup + timescale))`` of the
        highest; the steps of the warm-up, 10,000 without one.
    """

    cycles: int | None = None
    power: float | None = None
    step_size: int | None = None
    gamma: float | None = None
    timescale: int | None = None


@dataclass(frozen=True)
class _Span:
    """The steps after the warm-up: how many there are, and how many went before."""

    steps: int
    warmup: int


Factor = Callable[[int], float]


def _constant(span: _Span, shape: Shape) -> Factor:
    return lambda step: 1.0


def _linear(span: _Span, shape: Shape) -> Factor:
    return lambda step: max(0.0, 1.0 - step / span.steps)


def _cosine(span: _Span, shape: Shape) -> Factor:
    """Half a cosine (Loshchilov and Hutter 2017, without restarts)."""
    return lambda step: max(0.0, 0.5 * (1.0 + math.cos(math.pi * step / span.steps)))


def _cosine_with_restarts(span: _Span, shape: Shape) -> Factor:
    """Half a cosine in each cycle (Loshchilov and Hutter 2017, cycles of one length)."""
    cycles = shape.cycles or 1

    def factor(step: int) -> float:
        if step >= span.steps:
            return 0.0
        return 0.5 * (1.0 + math.cos(math.pi * (cycles * step / span.steps % 1.0)))

    return factor


def _polynomial(span: _Span, shape: Shape) -> Factor:
    power = 1.0 if shape.power is None else shape.power
    return lambda step: max(0.0, 1.0 - step / span.steps) ** power


def _step(span: _Span, shape: Shape) -> Factor:
    size = shape.step_size or max(1, span.steps // 3)
    gamma = 0.1 if shape.gamma is None else shape.gamma
    return lambda step: gamma ** (step // size)


def _inverse_sqrt(span: _Span, shape: Shape) -> Factor:
    scale = shape.timescale or span.warmup or _TIMESCALE
    return lambda step: math.sqrt(scale / (step + scale))


#: Name -> factor of the highest rate, given how many steps have passed since the warm-up.
SCHEDULES: dict[str, Callable[[_Span, Shape], Factor]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "step": _step,
    "inverse_sqrt": _inverse_sqrt,
}
#: What of a Shape each schedule has.
SHAPED = {
    "cosine_with_restarts": ("cycles",),
    "polynomial": ("power",),
    "step": ("step_size", "gamma"),
    "inverse_sqrt": ("timescale",),
}


def make_schedule(
    name: str,
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    *,
    min_learning_rate: float = 0.0,
    shape: Shape | None = None,
) -> Callable[[int], float]:
    """Return the learning rate as a function of the step, which counts from 0.

    Parameters
    ----------
    name : str
        One of ``SCHEDULES``.
    learning_rate : float
        The highest rate, reached after the warm-up.
    warmup_steps : int
        Steps over which the rate grows linearly from 0.
    total_steps : int
        Steps of the run; a decay ends there.
    min_learning_rate : float
        Where a decay ends: rates run from `learning_rate` down to it.
    shape : Shape, optional

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
    span = _Span(max(1, total_steps - warmup_steps), warmup_steps)
    factor = SCHEDULES[name](span, shape or Shape())

    def rate(step: int) -> float:
        if step < warmup_steps:
            return learning_rate * step / warmup_steps
        share = factor(step - warmup_steps)
        return min_learning_rate + (learning_rate - min_learning_rate) * share

    return rate
