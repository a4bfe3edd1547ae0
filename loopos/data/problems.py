"""Arithmetic word problems with verified steps, made from a seed: for tests, demos, benchmarks.

Each problem is one of `SKILLS`, with the steps that solve it, one calculation in each; the result
of the last is the answer. Whether a problem is for training or for testing is decided by a hash of
its calculations alone: no calculation of the test problems is ever that of a training problem, not
with other words, nor in another skill, nor with the operands of a sum or product swapped.

======  =======  =============  ===================  ===================
level   steps    numbers up to  test problems        training problems
======  =======  =============  ===================  ===================
1       2        60             1,250                11,800
2       3        100            more than 20,000     more than 190,000
3       4 or 5   200            more than 1,000,000  more than 9,000,000
======  =======  =============  ===================  ===================

Most of these are of the skill "change"; of the others, level 1 has 17 ("comparison") to 91
("sharing") test problems, and level 2 from 418 ("time") to 1,660. What is used up leaves its share
to the rest. Up to level 2 all that is added or taken away is at most 12, but for the sums of
"comparison"; level 3 asks for sums and differences of any two numbers.

The steps of level 2 can be learned by a transformer of less than one million parameters within
minutes; the answer without the steps cannot.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loopos.data.answers import extract_answer, same_answer
from loopos.data.problem_skills import LEVELS, SKILLS, Draws, Step, calculated
from loopos.errors import ConfigError, DataError, nearest

__all__ = ["LEVELS", "SKILLS", "check_answer", "make_problems", "verify"]

Problem = dict[str, Any]

#: One calculation in this many is for testing.
_TEST_SHARE = 10
#: Draws in vain after which a level of a skill counts as used up.
_MAX_TRIES = 1000
_EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def make_problems(
    count: int,
    *,
    seed: int,
    levels: Sequence[int] = (1, 2, 3),
    skills: Sequence[str] | None = None,
    split: str = "train",
) -> list[Problem]:
    """Make problems, no two of a skill with the same calculations.

    Parameters
    ----------
    count : int
    seed : int
        The same seed gives the same problems.
    levels : sequence of int
        Of `LEVELS`; drawn evenly.
    skills : sequence of str, optional
        Of `SKILLS`, by default all; drawn evenly, as long as each has problems left.
    split : {"train", "test"}
        No problem of one is in the other, whatever the seeds.

    Returns
    -------
    list of dict
        ``problem`` (str), ``reasoning`` (list of str, one calculation each), ``answer`` (str),
        ``skill`` (str), ``level`` (int).

    Raises
    ------
    ConfigError
        If an argument does not fit.
    DataError
        If there are fewer different problems of these levels and skills than asked for.
    """
    chosen = _checked(count, seed, levels, skills, split)
    open_kinds = {level: list(chosen) for level in dict.fromkeys(levels)}
    draws = Draws(np.random.default_rng(seed))
    seen: set[tuple[str, str]] = set()
    problems: list[Problem] = []
    while len(problems) < count:
        if not open_kinds:
            raise DataError(
                f"there are about {len(problems)} different {split} problems of the levels "
                f"{', '.join(map(str, levels))} and skills {', '.join(chosen)}, fewer than {count}"
            )
        level = draws.pick(list(open_kinds))
        skill = draws.pick(open_kinds[level])
        steps = _new_steps(draws, level, skill, split, seen)
        if steps is None:
            open_kinds[level].remove(skill)
            if not open_kinds[level]:
                del open_kinds[level]
            continue
        sentences, reasoning = SKILLS[skill].tell(draws, steps)
        problems.append(
            {
                "problem": " ".join(sentences),
                "reasoning": reasoning,
                "answer": str(steps[-1].result),
                "skill": skill,
                "level": level,
            }
        )
    return problems


def verify(problem: Mapping[str, Any]) -> None:
    """Calculate every step of a problem again.

    Raises
    ------
    DataError
        If a step has not one calculation, or a wrong one, or one with a number that neither the
        problem nor an earlier step gives; or if the last result is not the answer.
    """
    known = {int(number) for number in re.findall(r"\d+", problem["problem"])}
    known.add(60)  # the minutes of an hour
    result = None
    for index, sentence in enumerate(problem["reasoning"]):
        found = _EQUATION.findall(sentence)
        if len(found) != 1:
            raise DataError(f"step {index + 1}: expected one calculation, found {sentence!r}")
        [(left, op, right, value)] = found
        a, b, result = int(left), int(right), int(value)
        if (op == "/" and (b == 0 or a % b)) or calculated(a, op, b) != result:
            raise DataError(f"step {index + 1} is wrong: {sentence!r}")
        for number in (a, b):
            if number not in known:
                raise DataError(f"step {index + 1}: {number} comes from nowhere in {sentence!r}")
        known.add(result)
    if result is None or problem["answer"] != str(result):
        raise DataError(f"the answer is {problem['answer']!r}, but the steps give {result}")


def check_answer(problem: Mapping[str, Any], text: str) -> bool:
    """Whether a text gives the answer of a problem, as :func:`loopos.data.answers.same_answer`."""
    found = extract_answer(text)
    return found is not None and same_answer(found, problem["answer"])


def _checked(
    count: int, seed: int, levels: Sequence[int], skills: Sequence[str] | None, split: str
) -> list[str]:
    """Return the skills asked for, each once."""
    for name, value in (("count", count), ("seed", seed)):
        if value < 0:
            raise ConfigError(f"{name}: expected 0 at least, found {value}")
    for what, given, valid in (
        ("levels", levels, list(LEVELS)),
        ("skills", list(SKILLS) if skills is None else skills, list(SKILLS)),
        ("split", [split], ["train", "test"]),
    ):
        if isinstance(given, str) or not len(given):
            raise ConfigError(f"{what}: expected a list of one at least, found {given!r}")
        for entry in given:
            if entry not in valid:
                raise ConfigError(
                    f"{what}: expected one of {', '.join(map(str, valid))}, "
                    f"found {entry!r}{nearest(str(entry), map(str, valid))}"
                )
    return list(SKILLS if skills is None else dict.fromkeys(skills))


def _new_steps(
    draws: Draws, level: int, skill: str, split: str, seen: set[tuple[str, str]]
) -> list[Step] | None:
    """Return steps of the split that have not been, None if there seem to be none left."""
    limits = LEVELS[level]
    for _ in range(_MAX_TRIES):
        steps = SKILLS[skill].plan(draws, limits, draws.between(*limits.steps))
        key = _key(steps)
        if key and (skill, key) not in seen and (_is_test(key) == (split == "test")):
            seen.add((skill, key))
            return steps
    return None


def _key(steps: list[Step]) -> str:
    """Return what the calculations are, the order of factors and summands apart."""
    parts = []
    for a, op, b in steps:
        first, second = (min(a, b), max(a, b)) if op in "+*" else (a, b)
        parts.append(f"{first}{op}{second}")
    return ";".join(parts)


def _is_test(key: str) -> bool:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _TEST_SHARE == 0
