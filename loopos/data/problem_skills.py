"""The skills of arithmetic word problems: how their numbers are chosen, and how they are told.

A plan draws the steps of a problem, within the limits of its level; a story tells them. Which plans
make problems for training, and which for testing, is decided in :mod:`loopos.data.problems`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["LEVELS", "SKILLS", "Draws", "Level", "Skill", "Step", "calculated"]

_NAMES = ("Tom", "Ann", "Ben", "Mia", "Sam", "Eva", "Leo", "Zoe", "Max", "Ida")
_THINGS = ("apples", "pens", "books", "coins", "cards", "stamps", "shells", "eggs", "nuts", "balls")
_HOLDERS = (("box", "boxes"), ("bag", "bags"), ("jar", "jars"), ("case", "cases"))
_GOODS = ("cap", "toy", "map", "cake", "lamp")
_SPORTS = (("runs", "laps"), ("reads", "chapters"), ("plays", "games"), ("paints", "pictures"))


class Step(NamedTuple):
    """One calculation, ``a op b = result``."""

    a: int
    op: str
    b: int

    @property
    def result(self) -> int:
        """The value of the calculation."""
        return calculated(self.a, self.op, self.b)

    def __str__(self) -> str:
        return f"{self.a} {self.op} {self.b} = {self.result}"


@dataclass(frozen=True)
class Level:
    """How many steps, and how large: results, what is added, factors, sizes of a group."""

    steps: tuple[int, int]
    largest: int
    addend: int
    factor: int
    group: int


#: The levels of difficulty.
LEVELS: Mapping[int, Level] = {
    1: Level((2, 2), 60, 12, 9, 9),
    2: Level((3, 3), 100, 12, 9, 9),
    3: Level((4, 5), 200, 40, 9, 12),
}


class Draws:
    """Random choices, drawn from the generator in blocks: one by one they would take longest."""

    def __init__(self, rng: np.random.Generator):
        self._rng = rng
        self._block: list[float] = []

    def below(self, count: int) -> int:
        """Return a number from 0, below `count`."""
        if not self._block:
            self._block = self._rng.random(4096).tolist()
        return int(self._block.pop() * count)

    def between(self, low: int, high: int) -> int:
        """Return a number from `low` to `high`."""
        return low + self.below(high - low + 1)

    def pick(self, choices: Sequence[Any]) -> Any:
        """Return one of the choices."""
        return choices[self.below(len(choices))]

    def two(self, choices: Sequence[Any]) -> tuple[Any, Any]:
        """Return two different ones of the choices."""
        first = self.below(len(choices))
        second = (first + self.between(1, len(choices) - 1)) % len(choices)
        return choices[first], choices[second]


Steps = list[Step]
Told = tuple[list[str], list[str]]


def calculated(a: int, op: str, b: int) -> int:
    """Return ``a op b``; a division gives its whole part."""
    if op == "+":
        return a + b
    if op == "-":
        return a - b
    return a * b if op == "*" else a // b


# -- numbers: every draw is bounded such that all results are from 2 to the largest ----------------


def _move(draws: Draws, value: int, limits: Level) -> Step:
    """Add something to a value, or take something away."""
    up, down = min(limits.addend, limits.largest - value), min(limits.addend, value - 2)
    if down < 2 or (up >= 2 and draws.below(2)):
        return Step(value, "+", draws.between(2, up))
    return Step(value, "-", draws.between(2, down))


def _moves(draws: Draws, steps: Steps, limits: Level, count: int) -> Steps:
    """Append moves until there are `count` steps."""
    while len(steps) < count:
        steps.append(_move(draws, steps[-1].result, limits))
    return steps


def _product(draws: Draws, largest: int, limits: Level) -> Step:
    factor = draws.between(2, min(limits.factor, largest // 2))
    return Step(factor, "*", draws.between(2, min(limits.group, largest // factor)))


def _sum(first: Step, second: Step) -> Step:
    return Step(first.result, "+", second.result)


def _plan_change(draws: Draws, limits: Level, count: int) -> Steps:
    first = _move(draws, draws.between(4, limits.largest // 2), limits)
    return _moves(draws, [first], limits, count)


def _plan_groups(draws: Draws, limits: Level, count: int) -> Steps:
    if count > 3 and draws.below(2):
        half = limits.largest // 2
        steps = [_product(draws, half, limits), _product(draws, half, limits)]
        steps.append(_sum(*steps))
    else:
        steps = [_product(draws, limits.largest, limits)]
    return _moves(draws, steps, limits, count)


def _plan_comparison(draws: Draws, limits: Level, count: int) -> Steps:
    """Two people and their sum, or three from four steps on."""
    people = 2 if count < 4 else 3
    most = limits.largest // people
    value = first = draws.between(3, most // 2)
    steps: Steps = []
    for _ in range(people - 1):
        if draws.below(2):
            factor = most // value
            steps.append(
                Step(value, "*", draws.between(2, min(limits.factor, factor)))
                if factor >= 2
                else _capped_move(draws, value, most, limits)
            )
        else:
            steps.append(_capped_move(draws, value, most, limits))
        value = steps[-1].result
    total = first
    for step in steps[: people - 1]:
        steps.append(Step(total, "+", step.result))
        total = steps[-1].result
    return _moves(draws, steps, limits, count)


def _capped_move(draws: Draws, value: int, most: int, limits: Level) -> Step:
    up, down = min(limits.addend, most - value), min(limits.addend, value - 2)
    if up >= 2 and (down < 2 or draws.below(2)):
        return Step(value, "+", draws.between(2, up))
    return Step(value, "-", draws.between(2, down))


def _plan_sharing(draws: Draws, limits: Level, count: int) -> Steps:
    """Change a number so that it can be shared; from three steps on, one share changes."""
    before = max(count - 3, 0)
    if before and draws.below(2):
        steps = [_product(draws, limits.largest, limits)]
        value = _moves(draws, steps, limits, before)[-1].result
    else:
        value = draws.between(4, limits.largest)
        steps = []
        while len(steps) < before:
            steps.append(_move(draws, value, limits))
            value = steps[-1].result
    people = draws.between(2, limits.factor)
    lowest = max(2, -(-(value - limits.addend) // people))
    highest = min(limits.group, (value + limits.addend) // people, limits.largest // people)
    if lowest > highest:
        return []
    difference = draws.between(lowest, highest) * people - value
    if abs(difference) < 2:
        return []
    change = Step(value, "+" if difference > 0 else "-", abs(difference))
    steps += [change, Step(change.result, "/", people)]
    return _moves(draws, steps, limits, count)


def _plan_money(draws: Draws, limits: Level, count: int) -> Steps:
    """What things cost, more and less; from four steps on of two kinds, and the change."""
    room = limits.largest - limits.addend // 2
    if count < 4:
        return _moves(draws, [_product(draws, room, limits)], limits, count)
    steps = [_product(draws, room // 2 - 5, limits), _product(draws, room // 2 - 5, limits)]
    steps.append(_sum(*steps))
    if count > 4:
        most = min(limits.addend, room - steps[-1].result)
        steps.append(Step(steps[-1].result, "+", draws.between(2, most)))
    spent = steps[-1].result
    left = draws.between(2, min(limits.addend, limits.largest - spent))
    return [*steps, Step(spent + left, "-", spent)]


def _plan_time(draws: Draws, limits: Level, count: int) -> Steps:
    """Rounds of some minutes and breaks; from four steps on, of the hours that there are."""
    if count < 4:
        room, hours = limits.largest - limits.addend, 0
    else:
        hours = draws.between(2, limits.largest // 60)
        room = 60
    steps = [_product(draws, room, limits)]
    while len(steps) < count - 2 * bool(hours):
        most = min(limits.addend, (limits.largest, 118)[bool(hours)] - steps[-1].result)
        steps.append(Step(steps[-1].result, "+", draws.between(2, most)))
    if hours:
        return [Step(hours, "*", 60), *steps, Step(hours * 60, "-", steps[-1].result)]
    return steps


# -- words -----------------------------------------------------------------------------------------


def _tell_moves(draws: Draws, steps: Steps, names: tuple[str, str], things: str) -> Told:
    """Tell what happens to the things that somebody has."""
    name, friend = names
    told, reasoning = [], []
    for step in steps:
        if step.op == "+":
            told.append(draws.pick((
                f"{name} buys {step.b} more {things}.",
                f"{name} finds {step.b} more {things}.",
                f"{friend} gives {name} {step.b} {things}.",
            )))  # fmt: skip
        else:
            told.append(draws.pick((
                f"{name} gives {step.b} {things} to {friend}.",
                f"{name} loses {step.b} {things}.",
                f"{name} sells {step.b} {things}.",
            )))  # fmt: skip
        reasoning.append(f"{name} has {step} {things}.")
    return told, reasoning


def _tell_change(draws: Draws, steps: Steps) -> Told:
    names, things = draws.two(_NAMES), draws.pick(_THINGS)
    told, reasoning = _tell_moves(draws, steps, names, things)
    start = draws.pick(("{} has {} {}.", "At first {} has {} {}."))
    question = draws.pick(("How many {} does {} have now?", "How many {} does {} have in the end?"))
    return (
        [start.format(names[0], steps[0].a, things), *told, question.format(things, names[0])],
        reasoning,
    )


def _tell_groups(draws: Draws, steps: Steps) -> Told:
    names, things = draws.two(_NAMES), draws.pick(_THINGS)
    start, told, reasoning = _tell_held(draws, steps, names[0], things)
    later, later_reasoning = _tell_moves(draws, steps[len(reasoning) :], names, things)
    question = draws.pick(("How many {} does {} have now?", "How many {} does {} have in the end?"))
    return (
        [start, *told, *later, question.format(things, names[0])],
        [*reasoning, *later_reasoning],
    )


def _tell_held(
    draws: Draws, steps: Steps, name: str, things: str
) -> tuple[str, list[str], list[str]]:
    """Tell of one or two kinds of groups, as many as the steps begin with."""
    kinds = draws.two(_HOLDERS)
    count = 2 if len(steps) > 1 and steps[1].op == "*" else 1
    told = []
    reasoning = []
    for index, ((one, many), step) in enumerate(zip(kinds[:count], steps, strict=False)):
        also = "also " if index else ""
        each = draws.pick((f"with {step.b} {things} in each {one}", f"of {step.b} {things} each"))
        told.append(f"{name} {also}has {step.a} {many} {each}.")
        reasoning.append(f"The {many} hold {step} {things}.")
    if count == 2:
        reasoning.append(f"{name} has {steps[2]} {things}.")
    return told[0], told[1:], reasoning


def _tell_comparison(draws: Draws, steps: Steps) -> Told:
    people = 3 if len(steps) > 3 else 2
    first, second = draws.two(_NAMES)
    third = draws.pick([name for name in _NAMES if name not in (first, second)])
    names, things = (first, second, third)[:people], draws.pick(_THINGS)
    told, reasoning = [f"{first} has {steps[0].a} {things}."], list[str]()
    for index, step in enumerate(steps[: people - 1]):
        before, name = names[index], names[index + 1]
        how = {"*": "times as many", "+": "more", "-": "fewer"}[step.op]
        than = "as" if step.op == "*" else "than"
        told.append(f"{name} has {step.b} {how} {things} {than} {before}.")
        reasoning.append(f"{name} has {step} {things}.")
    for name, step in zip(names[1:], steps[people - 1 :], strict=False):
        reasoning.append(f"With {name} that is {step} {things}.")
    for step in steps[2 * people - 2 :]:
        told.append(f"Together they {'buy' if step.op == '+' else 'sell'} {step.b} {things}.")
        reasoning.append(f"Together they have {step} {things}.")
    question = draws.pick(
        ("How many {} do they have together?", "How many {} do they have in all?")
    )
    return [*told, question.format(things)], reasoning


def _tell_sharing(draws: Draws, steps: Steps) -> Told:
    (name, friend), things = draws.two(_NAMES), draws.pick(_THINGS)
    divided = next(index for index, step in enumerate(steps) if step.op == "/")
    told, reasoning = [f"{name} has {steps[0].a} {things}."], list[str]()
    done = 0
    if steps[0].op == "*":
        start, _, reasoning = _tell_held(draws, steps[:1], name, things)
        told, done = [start], 1
    moves, moved = _tell_moves(draws, steps[done:divided], (name, friend), things)
    share, rest = steps[divided], steps[divided + 1 :]
    told += moves
    told.append(draws.pick((
        f"{name} shares all {things} equally among {share.b} children.",
        f"Then {share.b} children get all {things} in equal parts.",
    )))  # fmt: skip
    reasoning += [*moved, f"Each child gets {share} {things}."]
    if not rest:
        return [*told, f"How many {things} does each child get?"], reasoning
    child = draws.pick([other for other in _NAMES if other not in (name, friend)])
    told.append(f"{child} is one of the children.")
    more, moved = _tell_moves(draws, rest, (child, friend), things)
    question = f"How many {things} does {child} have now?"
    return [*told, *more, question], [*reasoning, *moved]


def _tell_money(draws: Draws, steps: Steps) -> Told:
    name, kinds = draws.pick(_NAMES), draws.two(_THINGS)
    count = 2 if steps[1].op == "*" else 1
    told: list[str] = []
    reasoning: list[str] = []
    for things, step in zip(kinds[:count], steps, strict=False):
        told.append(f"{name} buys {step.a} {things} for {step.b} dollars each.")
        reasoning.append(f"The {things} cost {step} dollars.")
    rest = steps[count:]
    if count == 2:
        told.insert(0, f"{name} has {steps[-1].a} dollars.")
        reasoning.append(f"Together they cost {rest[0]} dollars.")
        rest = rest[1:-1]
    for step in rest:
        if step.op == "+":
            told.append(f"{name} buys a {draws.pick(_GOODS)} for {step.b} dollars.")
        else:
            told.append(f"A coupon takes {step.b} dollars off.")
        reasoning.append(f"Then it costs {step} dollars.")
    if count == 1:
        return [*told, f"How many dollars does {name} pay?"], reasoning
    reasoning.append(f"{name} has {steps[-1]} dollars left.")
    question = draws.pick(
        ("How many dollars are left?", f"How many dollars does {name} have left?")
    )
    return [*told, question], reasoning


def _tell_time(draws: Draws, steps: Steps) -> Told:
    name = draws.pick(_NAMES)
    verb, rounds = draws.pick(_SPORTS)
    told: list[str] = []
    reasoning: list[str] = []
    hours = steps[0] if steps[0].b == 60 else None
    if hours is not None:
        told.append(f"{name} has {hours.a} hours of time.")
        reasoning.append(f"{name} has {hours} minutes of time.")
        steps = steps[1:]
    told.append(f"{name} {verb} {steps[0].a} {rounds}, {steps[0].b} minutes each.")
    reasoning.append(f"The {rounds} take {steps[0]} minutes.")
    for step in steps[1 : None if hours is None else -1]:
        told.append(f"{name} {draws.pick(('rests', 'walks', 'waits'))} {step.b} minutes.")
        reasoning.append(f"So far it takes {step} minutes.")
    if hours is None:
        return [*told, "How many minutes does it take in all?"], reasoning
    reasoning.append(f"{name} has {steps[-1]} minutes left.")
    return [*told, "How many minutes are left?"], reasoning


@dataclass(frozen=True)
class Skill:
    """How the numbers of a problem are chosen ([] for a draw in vain), and how it is told."""

    plan: Callable[[Draws, Level, int], Steps]
    tell: Callable[[Draws, Steps], Told]


#: The skills, by name.
SKILLS: Mapping[str, Skill] = {
    "change": Skill(_plan_change, _tell_change),
    "groups": Skill(_plan_groups, _tell_groups),
    "comparison": Skill(_plan_comparison, _tell_comparison),
    "sharing": Skill(_plan_sharing, _tell_sharing),
    "money": Skill(_plan_money, _tell_money),
    "time": Skill(_plan_time, _tell_time),
}
