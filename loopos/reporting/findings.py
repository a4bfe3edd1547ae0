"""What the rules of the doctor are made of: findings, and the ends of a series."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from loopos.reporting.records import Array, RunRecords, Series

__all__ = ["MIN_STEPS", "Ends", "Finding", "Rule", "ends", "first_step", "shown", "spoken"]

#: Steps (or evaluations) below which nothing is said of how a figure moved.
MIN_STEPS = 10
#: The share of a series that is taken for its start, and for its end.
END_SHARE = 0.2


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run, or that should be known.

    Attributes
    ----------
    rule : str
        Name of the rule.
    problem : bool
        False for what should only be known: it does not make a run unhealthy.
    part : str
        The part of the run, such as ``reward_model``; empty for the run itself.
    what : str
        What is wrong, a sentence.
    evidence : str
        The figures that show it.
    steps : tuple of int
        First and last step where it shows; empty where it has no step.
    advice : str
        What to change.
    """

    rule: str
    problem: bool
    part: str
    what: str
    evidence: str
    steps: tuple[int, ...]
    advice: str

    @property
    def where(self) -> str:
        """The steps in words; empty without any."""
        if not self.steps:
            return ""
        first, last = self.steps[0], self.steps[-1]
        return f"step {first}" if first == last else f"steps {first} to {last}"


#: Looks at the records of a run; says what it finds.
Rule = Callable[[RunRecords], Finding | None]


@dataclass(frozen=True)
class Ends:
    """Start and end of a series, each a fifth of it (three values or more)."""

    start: Array
    end: Array
    start_steps: tuple[int, int]
    end_steps: tuple[int, int]

    @property
    def first(self) -> float:
        """Mean at the start."""
        return float(self.start.mean())

    @property
    def last(self) -> float:
        """Mean at the end."""
        return float(self.end.mean())

    @property
    def noise(self) -> float:
        """Standard error of the difference between both means."""
        # By n - 1: of three or four values the variance would be far too low.
        start, end = self.start.var(ddof=1), self.end.var(ddof=1)
        return float(np.sqrt(start / len(self.start) + end / len(self.end)))

    def __str__(self) -> str:
        return (
            f"{shown(self.first)} (steps {self.start_steps[0]} to {self.start_steps[1]}) -> "
            f"{shown(self.last)} (steps {self.end_steps[0]} to {self.end_steps[1]})"
        )


def ends(series: Series) -> Ends | None:
    """Return both ends of a series; None where it is too short."""
    if len(series) < MIN_STEPS:
        return None
    count = max(3, round(END_SHARE * len(series)))
    start, end = series.values[:count], series.values[-count:]
    steps = series.steps
    return Ends(
        start,
        end,
        (int(steps[0]), int(steps[count - 1])),
        (int(steps[-count]), int(steps[-1])),
    )


def first_step(series: Series, where: Array) -> tuple[int, ...]:
    """Return the first and the last step at which something holds."""
    found = series.steps[where]
    return (int(found[0]), int(found[-1])) if found.size else ()


def shown(value: float) -> str:
    """Return a number with four digits, as people write it."""
    if value == 0 or not np.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e-3 <= abs(value) < 1e6:
        digits = max(0, 3 - int(np.floor(np.log10(abs(value)))))
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.3g}"


def spoken(items: Iterable[str]) -> str:
    """Return "a, b and c"."""
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last
