"""Problems with the steps that solve them and their answers.

Rows have ``problem``, ``reasoning`` (a list of steps, or a text with one step a line) and
``answer``; or, as GSM8K has them, ``question`` and ``answer`` with the steps first and the answer
behind ``####``; or ``messages``, whose last assistant answers the user right before so, or with the
answer in a line that marks it as ``Answer: 5`` does, or else alone in the last line.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np

from loopos.data.answers import marked_answer
from loopos.data.labels import check_unicode, field_of, first_few
from loopos.data.readers import Texts
from loopos.data.rows import Row, Source, iter_rows, name_of
from loopos.data.store import PlacesBuilder, TextStore, TextStoreBuilder, taken
from loopos.errors import DataError, nearest

__all__ = ["ReasoningExample", "ReasoningExamples", "read_reasoning"]

Array = np.ndarray[Any, Any]

#: What a row may hold its problem in.
_FIELDS = ("problem", "question", "messages")
_MARK = "####"
#: The notes of a calculator in GSM8K, such as "<<48/2=24>>".
_NOTES = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class ReasoningExample:
    """A problem, the steps that solve it (none where they are not known), and the answer."""

    problem: str
    steps: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class ReasoningExamples(Texts):
    """Problems with their steps and answers, and where each stands.

    Attributes
    ----------
    texts : sequence of str
        The problems; equal ones are never divided between training and validation.
    solutions : sequence of str
        Steps and answer of each, as JSON.
    """

    solutions: Sequence[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, examples: Sequence[ReasoningExample], where: Sequence[str] | None = None
    ) -> ReasoningExamples:
        """Make a set of examples, which stand at `where`, or are numbered."""
        places = [f"row {i}" for i in range(1, len(examples) + 1)] if where is None else where
        problems = TextStore.of(e.problem for e in examples)
        return cls(problems, places, solutions=TextStore.of(map(_solution, examples)))

    def __getitem__(self, index: int) -> ReasoningExample:
        return _example(self.texts[index], self.solutions[index])

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[ReasoningExample]:
        return map(_example, self.texts, self.solutions)

    @property
    def corpus(self) -> Sequence[str]:
        """Problems, steps and answers, for making a tokenizer."""
        return TextStore.of("\n".join((e.problem, *e.steps, e.answer)) for e in self)

    def take(self, indices: Sequence[int] | Array) -> ReasoningExamples:
        """Return the examples at `indices`; of stored ones a view."""
        texts, where = taken(self.texts, indices), taken(self.where, indices)
        solutions = taken(self.solutions, indices)
        return ReasoningExamples(texts, where, solutions=solutions, dropped=self.dropped)

    def parts(self) -> Iterator[str]:
        """Yield problems and solutions."""
        yield from super().parts()
        for solution in self.solutions:
            yield solution + "\0"


def _solution(example: ReasoningExample) -> str:
    return json.dumps([list(example.steps), example.answer], ensure_ascii=False)


def _example(problem: str, solution: str) -> ReasoningExample:
    steps, answer = json.loads(solution)
    return ReasoningExample(problem, tuple(steps), answer)


def read_reasoning(source: Source, need_steps: bool = True) -> ReasoningExamples:
    """Read problems with their steps and answers.

    Parameters
    ----------
    source : path, sequence of paths, table or iterable of mappings
        As :func:`loopos.data.readers.iter_rows`.
    need_steps : bool
        False takes rows of ``problem`` and ``answer`` without ``reasoning`` too.

    Raises
    ------
    MissingFileError, DataError
        As ``iter_rows``; also for a problem, step or answer that is missing, empty or no text, and
        when there is no row.
    OutputError
        If there is more than memory should hold, and no room for a temporary file.
    """
    problems, solutions, where = TextStoreBuilder(), TextStoreBuilder(), PlacesBuilder()
    with closing(iter_rows(source)) as rows:
        for row in rows:
            example = _read(row, need_steps)
            problems.append(example.problem)
            solutions.append(_solution(example))
            where.append(row.file, row.number)
    if not len(problems):
        raise DataError(f"{name_of(source)}: there is no row in it")
    return ReasoningExamples(problems.finish(), where.finish(), solutions=solutions.finish())


def _read(row: Row, need_steps: bool) -> ReasoningExample:
    given = next((name for name in _FIELDS if row.fields.get(name) is not None), None)
    if given == "problem":
        steps = row.fields.get("reasoning")
        if steps is None and not need_steps:
            steps = []
        elif steps is None:
            field_of(row, "reasoning")  # says what there is
        found = _steps(row, steps, need_steps)
        return ReasoningExample(_text(row, "problem"), found, _one_line(_text(row, "answer")))
    if given == "question":
        return _marked(row, _text(row, "question"), _text(row, "answer"), "answer", need_steps)
    if given == "messages":
        return _of_messages(row, need_steps)
    names = [str(name) for name in row.fields]
    near = next(filter(None, (nearest(name, _FIELDS) for name in names)), "")
    raise DataError(
        f"{row.where}: no field 'problem', 'question' or 'messages'{near} "
        f"(found: {first_few(names, 10) or 'nothing'})"
    )


def _text(row: Row, name: str) -> str:
    value = field_of(row, name)
    if name == "answer":
        value = _number_as_text(value)
    return _checked(row, name, value)


def _number_as_text(value: Any) -> Any:
    """Return a number as text, to its last digit; 5.0, as tables have it, as 5."""
    if isinstance(value, Decimal) and value.is_finite():
        digits = format(value, "f")  # never an exponent
        return digits.rstrip("0").rstrip(".") if "." in digits else digits
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        return value
    if not np.isfinite(value):
        return value
    return str(int(value)) if value == int(value) else str(value)


def _checked(row: Row, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{row.where}: expected '{name}' to be text, found {reprlib.repr(value)}")
    check_unicode(value, row, name)
    if not value.strip():
        raise DataError(f"{row.where}: there is no text in '{name}'")
    return value.strip()


def _one_line(text: str) -> str:
    """Return a step or an answer in one line: a line's end is where they end when read back."""
    return " ".join(text.splitlines())


def _steps(row: Row, value: Any, need_steps: bool) -> tuple[str, ...]:
    if isinstance(value, np.ndarray):  # what some tables hold lists in
        value = value.tolist()
    if isinstance(value, str):
        value = [line for line in value.splitlines() if line.strip()]
    if not isinstance(value, (list, tuple)):
        raise DataError(
            f"{row.where}: expected 'reasoning' to be a list of steps, found {reprlib.repr(value)}"
        )
    if not value and need_steps:
        raise DataError(f"{row.where}: there is no step in 'reasoning'")
    return tuple(
        _one_line(_checked(row, f"step {number} of reasoning", step))
        for number, step in enumerate(value, 1)
    )


def _marked(row: Row, problem: str, text: str, name: str, need_steps: bool) -> ReasoningExample:
    """Divide steps from the answer behind the last mark."""
    before, mark, answer = text.rpartition(_MARK)
    if not mark:
        raise DataError(f"{row.where}: no '{_MARK}' before the answer in '{name}'")
    steps = _steps(row, _NOTES.sub("", before), need_steps)
    return ReasoningExample(problem, steps, _one_line(_checked(row, name, answer)))


def _of_messages(row: Row, need_steps: bool) -> ReasoningExample:
    messages = row.fields["messages"]
    if isinstance(messages, np.ndarray):
        messages = messages.tolist()
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise DataError(
            f"{row.where}: expected 'messages' to be a list of messages, "
            f"found {reprlib.repr(messages)}"
        )
    roles = [m.get("role") for m in messages]
    for role in ("user", "assistant"):
        if role not in roles:
            raise DataError(f"{row.where}: no message of the {role}")
    last = len(roles) - 1 - roles[::-1].index("assistant")
    if last == 0 or roles[last - 1] != "user":
        raise DataError(
            f"{row.where}: expected a message of the user right before the last one of the "
            f"assistant, found {repr(roles[last - 1]) if last else 'none'}"
        )
    problem = _checked(row, "messages (user)", messages[last - 1].get("content"))
    text = _checked(row, "messages (assistant)", messages[last].get("content"))
    if _MARK in text:
        found = _marked(row, problem, text, "messages (assistant)", need_steps)
    else:
        steps, answer = _told_apart([line for line in text.splitlines() if line.strip()])
        found = ReasoningExample(problem, _steps(row, steps, need_steps), answer)
    if not any(map(str.isalnum, found.answer)):
        raise DataError(
            f"{row.where}: expected the last message of the assistant to end in an answer, "
            f"found {reprlib.repr(found.answer)}"
        )
    return found


def _told_apart(lines: list[str]) -> tuple[list[str], str]:
    """Return the steps before the last line that marks an answer, else before the last, and it."""
    marked = marked_answer("\n".join(lines))
    if marked is None:
        return lines[:-1], lines[-1].strip()
    for at in reversed(range(len(lines))):
        answer = marked_answer(lines[at])
        if answer is not None:
            break
    else:  # in a box of several lines
        answer, at = marked, max(i for i, line in enumerate(lines) if "\\boxed{" in line)
    steps = lines[:at]
    while at < len(lines) - 1 and steps and not any(map(str.isalnum, steps[-1])):
        steps.pop()  # what opens a formula
    return steps, _one_line(answer)
