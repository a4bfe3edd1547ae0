"""Preferences: two responses to one prompt, of which one was chosen; or responses judged alone.

Rows have ``prompt``, ``chosen`` and ``rejected``, each a text or a list of messages (``role`` and
``content``), optionally a ``margin`` or the scores of both; or ``prompt``, ``completion`` and
``label``, whether it is a good one.
"""

from __future__ import annotations

import array
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import numpy as np

from loopos.data.labels import check_unicode, field_of
from loopos.data.readers import Texts
from loopos.data.rows import Row, Source, iter_rows, name_of
from loopos.data.store import PlacesBuilder, TextStore, TextStoreBuilder, taken
from loopos.errors import DataError

__all__ = [
    "Judgements",
    "Preferences",
    "plain_chat",
    "read_judgements",
    "read_preferences",
]

Array = np.ndarray[Any, Any]
Message = Mapping[str, Any]
#: Writes messages as one text; with True, up to where the assistant begins to answer.
Render = Callable[[Sequence[Message], bool], str]

_SIDES = ("chosen", "rejected")
#: What stands for true and false in files without a type for them.
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}
#: Numbers that are written out at once.
_NUMBERS = 10_000


def plain_chat(messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """Return messages as lines of role and text, for models without a template of their own."""
    lines = [f"{message['role']}: {message['content']}" for message in messages]
    return "\n".join([*lines, "assistant:"] if add_generation_prompt else lines)


@dataclass(frozen=True)
class Preferences(Texts):
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

    @property
    def corpus(self) -> Sequence[str]:
        """All prompts and responses, for making a tokenizer."""
        return TextStore.of(text for part in (self.texts, *self.responses) for text in part)

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
        )

    def parts(self) -> Iterator[str]:
        """Yield prompts, responses and margins, in parts."""
        yield from super().parts()
        for text in (text for side in self.responses for text in side):
            yield text + "\0"
        if self.margins is not None:
            yield from _written(self.margins)


@dataclass(frozen=True)
class Judgements(Texts):
    """Responses that are each good or bad by themselves.

    Attributes
    ----------
    texts : sequence of str
        The prompts.
    completions : sequence of str
        The response to each.
    desirable : ndarray bool [n]
        Whether it is a good one.
    """

    completions: Sequence[str]
    desirable: Array

    @property
    def responses(self) -> tuple[Sequence[str], ...]:
        """The response of each row."""
        return (self.completions,)

    @property
    def corpus(self) -> Sequence[str]:
        """All prompts and responses, for making a tokenizer."""
        return TextStore.of(text for part in (self.texts, *self.responses) for text in part)

    def take(self, indices: Sequence[int] | Array) -> Judgements:
        """Return the rows at `indices`; of stored ones a view."""
        return replace(
            self,
            texts=taken(self.texts, indices),
            where=taken(self.where, indices),
            completions=taken(self.completions, indices),
            desirable=self.desirable[np.asarray(indices, dtype=np.int64)],
        )

    def parts(self) -> Iterator[str]:
        """Yield prompts, responses and labels, in parts."""
        yield from super().parts()
        for text in self.completions:
            yield text + "\0"
        yield from _written(self.desirable)


def _written(values: Array) -> Iterator[str]:
    yield "(["
    for start in range(0, len(values), _NUMBERS):
        yield ", " * bool(start) + repr(values[start : start + _NUMBERS].tolist())[1:-1]
    yield "])"


# -- pairs ---------------------------------------------------------------------------------------


def read_preferences(source: Source, render: Render = plain_chat) -> Preferences:
    """Read pairs of responses.

    Parameters
    ----------
    source : path, sequence of paths, table or iterable of mappings
        As :func:`loopos.data.readers.iter_rows`. A row has ``prompt`` (or ``messages``), ``chosen``
        and ``rejected``. Where one of them is a list of messages the row is a conversation, and a
        text in it is a message of the user or the assistant; without a prompt it is what the
        messages of both sides have in common. ``margin`` is a number that every row has or none;
        ``score_chosen`` and ``score_rejected`` tell ties.
    render : callable
        ``(messages, add_generation_prompt) -> str``: how conversations are written.

    Raises
    ------
    MissingFileError, DataError
        As ``iter_rows``; also for a field that is missing or none of these, a score of the chosen
        response below the other, and where no pair is left.
    OutputError
        If there is more than memory should hold, and no room for a temporary file.
    """
    kept = [TextStoreBuilder() for _ in range(3)]
    where, dropped, ties = PlacesBuilder(), PlacesBuilder(), PlacesBuilder()
    margins, given = array.array("d"), None
    with closing(iter_rows(source)) as rows:
        for row in rows:
            texts = _pair(row, render)
            margin = _number(row, "margin")
            given = margin is not None if given is None else given
            if given != (margin is not None):
                has = "a 'margin'" if margin is not None else "no 'margin'"
                raise DataError(f"{row.where}: has {has}, unlike the rows before")
            tie = _tied(row) or texts[1] == texts[2]
            target = ties if tie else dropped if not texts[0].strip() else where
            target.append(row.file, row.number)
            if target is where:
                for builder, text in zip(kept, texts, strict=True):
                    builder.append(text)
                margins.append(margin or 0.0)
    if given is None:
        raise DataError(f"{name_of(source)}: there is no row in it")
    if not len(kept[0]):
        raise DataError(f"{name_of(source)}: no row has a prompt and two different responses")
    prompts, chosen, rejected = (builder.finish() for builder in kept)
    return Preferences(
        prompts, where.finish(), chosen, rejected, np.array(margins) if given else None,
        dropped=dropped.finish(), ties=ties.finish(),
    )  # fmt: skip


def _pair(row: Row, render: Render) -> tuple[str, str, str]:
    """Return prompt, chosen and rejected response of a row."""
    name = "messages" if "prompt" not in row.fields and "messages" in row.fields else "prompt"
    sides = [field_of(row, side) for side in _SIDES]
    if name in row.fields:
        prompt = row.fields[name]
    elif all(isinstance(side, list) for side in sides):
        prompt = _common(sides)
        sides = [side[len(prompt) :] for side in sides]
    else:
        prompt = field_of(row, name)  # says what there is
    if all(isinstance(value, str) for value in (prompt, *sides)):
        for key, value in ((name, prompt), *zip(_SIDES, sides, strict=True)):
            check_unicode(value, row, key)
        return prompt, *sides
    asked = _messages(row, name, prompt, "user")
    answers = [
        _answer(row, key, value, asked, render)
        for key, value in zip(_SIDES, sides, strict=True)
    ]  # fmt: skip
    return render(asked, True), answers[0], answers[1]


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


def _answer(row: Row, name: str, value: Any, asked: list[dict[str, Any]], render: Render) -> str:
    """Return a response as it continues the prompt."""
    begun, whole = render(asked, True), [*asked, *_messages(row, name, value, "assistant")]
    if whole[len(asked)]["role"] != "assistant":
        raise DataError(
            f"{row.where}: '{name}' begins with a message of the {whole[len(asked)]['role']}, "
            "expected the assistant"
        )
    written = render(whole, False)
    if not written.startswith(begun):
        raise DataError(f"{row.where}: the template writes '{name}' not as a continuation")
    return written[len(begun) :]


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


def read_judgements(source: Source, render: Render = plain_chat) -> Judgements:
    """Read responses that are judged by themselves.

    Parameters
    ----------
    source : path, sequence of paths, table or iterable of mappings
        Rows with ``prompt``, ``completion`` and ``label`` (true or false); or pairs as
        :func:`read_preferences` reads them, of which each makes a good response and a bad one.
    render : callable
        How conversations are written.

    Raises
    ------
    MissingFileError, DataError, OutputError
        As :func:`read_preferences`.
    """
    prompts, completions = TextStoreBuilder(), TextStoreBuilder()
    where, dropped, labels = PlacesBuilder(), PlacesBuilder(), array.array("b")
    some = False
    with closing(iter_rows(source)) as rows:
        for row in rows:
            some = True
            for prompt, completion, label in _judged(row, render):
                if not prompt.strip():
                    dropped.append(row.file, row.number)
                    continue
                prompts.append(prompt)
                completions.append(completion)
                where.append(row.file, row.number)
                labels.append(label)
    if not len(prompts):
        what = "no row has a prompt" if some else "there is no row in it"
        raise DataError(f"{name_of(source)}: {what}")
    return Judgements(
        prompts.finish(), where.finish(), completions.finish(),
        np.array(labels, dtype=bool), dropped=dropped.finish(),
    )  # fmt: skip


def _judged(row: Row, render: Render) -> list[tuple[str, str, bool]]:
    """Return prompt, response and whether it is a good one, of each response of a row."""
    if "completion" not in row.fields and "chosen" in row.fields:
        prompt, chosen, rejected = _pair(row, render)
        return [(prompt, chosen, True), (prompt, rejected, False)]
    prompt, completion = field_of(row, "prompt"), field_of(row, "completion")
    label = field_of(row, "label")
    desirable = label if isinstance(label, bool) else _TRUTHS.get(str(label).strip().lower())
    if desirable is None:
        raise DataError(
            f"{row.where}: expected 'label' to be true or false, found {reprlib.repr(label)}"
        )
    if isinstance(prompt, str) and isinstance(completion, str):
        for name, value in (("prompt", prompt), ("completion", completion)):
            check_unicode(value, row, name)
        return [(prompt, completion, desirable)]
    asked = _messages(row, "prompt", prompt, "user")
    answer = _answer(row, "completion", completion, asked, render)
    return [(render(asked, True), answer, desirable)]
