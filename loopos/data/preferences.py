"""Preferences: two responses to one prompt, of which one was chosen; or responses judged alone.

Rows have ``prompt``, ``chosen`` and ``rejected``, each a text or a list of messages (``role`` and
``content``), optionally a ``margin`` or the scores of both; or ``prompt``, ``completion`` and
``label``, whether it is a good one.
"""

from __future__ import annotations

import array
import json
import math
import reprlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Protocol, Self

import numpy as np

from loopos.data.labels import check_unicode, field_of
from loopos.data.readers import Texts
from loopos.data.rows import Row, Source, iter_rows, name_of
from loopos.data.store import PlacesBuilder, TextStore, TextStoreBuilder, taken
from loopos.errors import DataError

__all__ = [
    "Judgements",
    "Preferences",
    "Render",
    "plain_chat",
    "read_judgements",
    "read_preferences",
]

Array = np.ndarray[Any, Any]
Message = Mapping[str, Any]
#: A prompt's messages, and those of each response.
_Messages = tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]

_SIDES = ("chosen", "rejected")
#: What stands for true and false in files without a type for them.
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}
#: Numbers that are written out at once.
_NUMBERS = 10_000


class Render(Protocol):
    """Writes messages as one text."""

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Return the text, if asked up to where the assistant begins to answer."""


def plain_chat(messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    """Return messages as lines of role and text, for models without a template of their own."""
    lines = [f"{message['role']}: {message['content']}" for message in messages]
    return "\n".join([*lines, "assistant:"] if add_generation_prompt else lines)


@dataclass(frozen=True)
class _Answered(Texts):
    """Prompts with responses.

    Attributes
    ----------
    conversations : sequence of str or None
        Of each row its messages as JSON, nothing where it has texts; None where all rows have.
    """

    conversations: Sequence[str] | None = field(default=None, kw_only=True)

    @property
    @abstractmethod
    def responses(self) -> tuple[Sequence[str], ...]:
        """The responses of each row."""

    @abstractmethod
    def _with(self, texts: Sequence[str], responses: Sequence[Sequence[str]]) -> Self:
        """Return the same rows with other texts."""

    @property
    def corpus(self) -> Sequence[str]:
        """All prompts and responses, for making a tokenizer."""
        return TextStore.of(text for part in (self.texts, *self.responses) for text in part)

    def parts(self) -> Iterator[str]:
        """Yield prompts and responses, in parts."""
        for text in (text for part in (self.texts, *self.responses) for text in part):
            yield text + "\0"

    def written(self, render: Render) -> Self:
        """Return the rows with conversations written by `render`, not as lines of role and text.

        Raises
        ------
        DataError
            If an answer is not written as a continuation of its prompt.
        """
        if self.conversations is None:
            return self
        columns = (self.texts, *self.responses)
        builders = [TextStoreBuilder() for _ in columns]
        for index, kept in enumerate(self.conversations):
            texts = [column[index] for column in columns]
            if kept:
                asked, answers = json.loads(kept)
                texts = _rendered(asked, answers, render, self.where[index])
            for builder, text in zip(builders, texts, strict=True):
                builder.append(text)
        prompts, *responses = (builder.finish() for builder in builders)
        return self._with(prompts, responses)


def _taken(texts: Sequence[str] | None, indices: Sequence[int] | Array) -> Sequence[str] | None:
    return None if texts is None else taken(texts, indices)


@dataclass(frozen=True)
class Preferences(_Answered):
    """Pairs of responses.

    Attributes
    ----------
    texts : sequence of str
        The prompts; a prompt may have several pairs.
    chosen, rejected : sequence of str
        The two responses of each pair, as they continue the prompt.
    margins : ndarray float64 [n] or None
        By how much the chosen one is better.
    ties : sequence of str
        Where rows stood whose responses are equal, or equally good, and which were left out.
    """

    chosen: Sequence[str]
    rejected: Sequence[str]
    margins: Array | None = None
    ties: Sequence[str] = field(default_factory=list, kw_only=True)

    @property
    def responses(self) -> tuple[Sequence[str], ...]:
        """The responses of each row, the chosen one first."""
        return self.chosen, self.rejected

    def take(self, indices: Sequence[int] | Array) -> Preferences:
        """Return the pairs at `indices`; of stored ones a view."""
        margins = self.margins
        return replace(
            self,
            texts=taken(self.texts, indices),
            where=taken(self.where, indices),
            chosen=taken(self.chosen, indices),
            rejected=taken(self.rejected, indices),
            margins=None if margins is None else margins[np.asarray(indices, dtype=np.int64)],
            conversations=_taken(self.conversations, indices),
        )

    def _with(self, texts: Sequence[str], responses: Sequence[Sequence[str]]) -> Preferences:
        return replace(self, texts=texts, chosen=responses[0], rejected=responses[1])

    def parts(self) -> Iterator[str]:
        """Yield prompts, responses and margins, in parts."""
        yield from super().parts()
        if self.margins is not None:
            yield from _written(self.margins)


@dataclass(frozen=True)
class Judgements(_Answered):
    """Responses that are each good or bad by themselves.

    Attributes
    ----------
    texts : sequence of str
        The prompts.
    completions : sequence of str
        The response to each.
    desirable : ndarray bool [n]
        Whether it is a good one.
    ties : sequence of str
        Where pairs stood whose responses are equal, or equally good, and which were left out.
    """

    completions: Sequence[str]
    desirable: Array
    ties: Sequence[str] = field(default_factory=list, kw_only=True)

    @property
    def responses(self) -> tuple[Sequence[str], ...]:
        """The response of each row."""
        return (self.completions,)

    def take(self, indices: Sequence[int] | Array) -> Judgements:
        """Return the rows at `indices`; of stored ones a view."""
        return replace(
            self,
            texts=taken(self.texts, indices),
            where=taken(self.where, indices),
            completions=taken(self.completions, indices),
            desirable=self.desirable[np.asarray(indices, dtype=np.int64)],
            conversations=_taken(self.conversations, indices),
        )

    def _with(self, texts: Sequence[str], responses: Sequence[Sequence[str]]) -> Judgements:
        return replace(self, texts=texts, completions=responses[0])

    def parts(self) -> Iterator[str]:
        """Yield prompts, responses and labels, in parts."""
        yield from super().parts()
        yield from _written(self.desirable)


def _written(values: Array) -> Iterator[str]:
    yield "(["
    for start in range(0, len(values), _NUMBERS):
        yield ", " * bool(start) + repr(values[start : start + _NUMBERS].tolist())[1:-1]
    yield "])"


# -- pairs ---------------------------------------------------------------------------------------


class _Kept:
    """Takes rows of texts, those of conversations with their messages."""

    def __init__(self, responses: int):
        self._columns = [TextStoreBuilder() for _ in range(1 + responses)]
        self._messages, self._some = TextStoreBuilder(), False
        self.where, self.dropped = PlacesBuilder(), PlacesBuilder()

    def add(self, row: Row, texts: Sequence[str], messages: _Messages | None) -> bool:
        """Take a row; False if its prompt has nothing in it."""
        filled = bool(texts[0].strip())
        (self.where if filled else self.dropped).append(row.file, row.number)
        if filled:
            for builder, text in zip(self._columns, texts, strict=True):
                builder.append(text)
            self._some = self._some or messages is not None
            self._messages.append("" if messages is None else _as_json(messages, row))
        return filled

    def __len__(self) -> int:
        return len(self._columns[0])

    def texts(self) -> list[TextStore]:
        """Return prompts and responses."""
        return [builder.finish() for builder in self._columns]

    def rest(self) -> dict[str, Any]:
        """Return what else a set knows of its rows."""
        messages = self._messages.finish()
        return {
            "dropped": self.dropped.finish(),
            "conversations": messages if self._some else None,
        }


def _as_json(messages: _Messages, row: Row) -> str:
    try:
        return json.dumps(messages)
    except (TypeError, ValueError) as error:
        raise DataError(f"{row.where}: a message holds what JSON cannot: {error}") from error


def read_preferences(source: Source) -> Preferences:
    """Read pairs of responses.

    Parameters
    ----------
    source : path, sequence of paths, table or iterable of mappings
        As :func:`loopos.data.readers.iter_rows`. A row has ``prompt`` (or ``messages``), ``chosen``
        and ``rejected``. Where one of them is a list of messages the row is a conversation, and a
        text in it is a message of the user or the assistant; without a prompt it is what the
        messages of both sides have in common. ``margin`` is a number that every row has or none;
        ``score_chosen`` and ``score_rejected`` tell ties.

    Raises
    ------
    MissingFileError, DataError
        As ``iter_rows``; also for a field that is missing or none of these, a score of the chosen
        response below the other, and where no pair is left.
    OutputError
        If there is more than memory should hold, and no room for a temporary file.
    """
    kept, ties = _Kept(2), PlacesBuilder()
    margins, given = array.array("d"), None
    with closing(iter_rows(source)) as rows:
        for row in rows:
            texts, messages = _pair(row)
            margin = _number(row, "margin")
            given = margin is not None if given is None else given
            if given != (margin is not None):
                has = "a 'margin'" if margin is not None else "no 'margin'"
                raise DataError(f"{row.where}: has {has}, unlike the rows before")
            if _tied(row) or texts[1] == texts[2]:
                ties.append(row.file, row.number)
            elif kept.add(row, texts, messages):
                margins.append(margin or 0.0)
    if given is None:
        raise DataError(f"{name_of(source)}: there is no row in it")
    if not len(kept):
        raise DataError(f"{name_of(source)}: no row has a prompt and two different responses")
    prompts, chosen, rejected = kept.texts()
    return Preferences(
        prompts, kept.where.finish(), chosen, rejected, np.array(margins) if given else None,
        ties=ties.finish(), **kept.rest(),
    )  # fmt: skip


def _pair(row: Row) -> tuple[list[str], _Messages | None]:
    """Return prompt and responses of a row, and its messages if it is a conversation."""
    name = "messages" if "prompt" not in row.fields and "messages" in row.fields else "prompt"
    sides = [field_of(row, side) for side in _SIDES]
    if name in row.fields:
        prompt = row.fields[name]
    elif all(isinstance(side, list) for side in sides):
        prompt = _common(sides)
        sides = [side[len(prompt) :] for side in sides]
    else:
        prompt = field_of(row, name)  # says what there is
    return _texts_of(row, name, prompt, dict(zip(_SIDES, sides, strict=True)))


def _texts_of(
    row: Row, name: str, prompt: Any, sides: Mapping[str, Any]
) -> tuple[list[str], _Messages | None]:
    """Return prompt and responses as texts, and as messages if one of them is a list of these."""
    if all(isinstance(value, str) for value in (prompt, *sides.values())):
        for key, value in ((name, prompt), *sides.items()):
            check_unicode(value, row, key)
        return [prompt, *sides.values()], None
    asked = _messages(row, name, prompt, "user")
    answers = [_answer(row, key, value) for key, value in sides.items()]
    return _rendered(asked, answers, plain_chat, row.where), (asked, answers)


def _common(sides: Sequence[list[Any]]) -> list[Any]:
    """Return what two conversations begin with, but for what they end with."""
    pairs = zip(sides[0][:-1], sides[1][:-1], strict=False)
    return [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _messages(row: Row, name: str, value: Any, role: str) -> list[dict[str, Any]]:
    """Return the messages that a field holds; a text is one message of `role`."""
    if isinstance(value, str):
        check_unicode(value, row, name)
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        what = "no messages" if isinstance(value, list) else reprlib.repr(value)
        raise DataError(
            f"{row.where}: expected '{name}' to be text or a list of messages, found {what}"
        )
    for number, message in enumerate(value, start=1):
        fits = isinstance(message, Mapping) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not fits:
            raise DataError(
                f"{row.where}: message {number} of '{name}': expected 'role' and 'content', "
                f"both text, found {reprlib.repr(message)}"
            )
        check_unicode(message["content"], row, name)
    return [dict(message) for message in value]


def _answer(row: Row, name: str, value: Any) -> list[dict[str, Any]]:
    messages = _messages(row, name, value, "assistant")
    if messages[0]["role"] != "assistant":
        raise DataError(
            f"{row.where}: '{name}' begins with a message of the {messages[0]['role']}, "
            "expected the assistant"
        )
    return messages


def _rendered(
    asked: list[dict[str, Any]], answers: list[list[dict[str, Any]]], render: Render, where: str
) -> list[str]:
    """Return a prompt and, as they continue it, its responses."""
    prompt = render(asked, add_generation_prompt=True)
    texts = [prompt]
    for answer in answers:
        whole = render([*asked, *answer])
        if not whole.startswith(prompt):
            raise DataError(
                f"{where}: the template writes an answer not as a continuation of its prompt"
            )
        texts.append(whole[len(prompt) :])
    return texts


def _number(row: Row, name: str) -> float | None:
    """Return a number of a row, None where it has none."""
    value = row.fields.get(name)
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"{row.where}: expected '{name}' to be a finite number, found {reprlib.repr(value)}"
        )
    return number


def _tied(row: Row) -> bool:
    """Whether both responses have one score."""
    names = [f"score_{side}" for side in _SIDES]
    chosen, rejected = (_number(row, name) for name in names)
    if chosen is None or rejected is None:
        return False
    if chosen < rejected:
        raise DataError(
            f"{row.where}: '{names[0]}' {chosen:g} is below '{names[1]}' {rejected:g}"
        )  # fmt: skip
    return chosen == rejected


# -- single responses ----------------------------------------------------------------------------


def read_judgements(source: Source) -> Judgements:
    """Read responses that are judged by themselves.

    Parameters
    ----------
    source : path, sequence of paths, table or iterable of mappings
        Rows with ``prompt``, ``completion`` and ``label`` (true or false); or pairs as
        :func:`read_preferences` reads them, of which each makes a good response and a bad one.

    Raises
    ------
    MissingFileError, DataError, OutputError
        As :func:`read_preferences`.
    """
    kept, labels, some, ties = _Kept(1), array.array("b"), False, PlacesBuilder()
    with closing(iter_rows(source)) as rows:
        for row in rows:
            some = True
            judged = _judged(row)
            if not judged:
                ties.append(row.file, row.number)
            for texts, messages, label in judged:
                if kept.add(row, texts, messages):
                    labels.append(label)
    tied = ties.finish()
    if not len(kept):
        what = "no row has a prompt" if some else "there is no row in it"
        if len(tied):
            what += " and two different responses"
        raise DataError(f"{name_of(source)}: {what}")
    prompts, completions = kept.texts()
    desirable = np.array(labels, dtype=bool)
    return Judgements(
        prompts, kept.where.finish(), completions, desirable, ties=tied, **kept.rest()
    )


def _judged(row: Row) -> list[tuple[list[str], _Messages | None, bool]]:
    """Return prompt and response, its messages and whether it is a good one, of each of a row.

    Of a pair without a preference there is none.
    """
    if "completion" not in row.fields and "chosen" in row.fields:
        (prompt, *sides), messages = _pair(row)
        if _tied(row) or sides[0] == sides[1]:
            return []
        answers = [None, None] if messages is None else [(messages[0], [a]) for a in messages[1]]
        return [
            ([prompt, side], answer, good)
            for side, answer, good in zip(sides, answers, (True, False), strict=True)
        ]
    prompt, completion = field_of(row, "prompt"), field_of(row, "completion")
    label = field_of(row, "label")
    desirable = label if isinstance(label, bool) else _TRUTHS.get(str(label).strip().lower())
    if desirable is None:
        raise DataError(
            f"{row.where}: expected 'label' to be true or false, found {reprlib.repr(label)}"
        )
    texts, messages = _texts_of(row, "prompt", prompt, {"completion": completion})
    return [(texts, messages, desirable)]
