"""Texts, with and without labels, from files, tables or any iterable of mappings.

Every text remembers where it stands, so that whatever is wrong with it is said with file and line.
Sets larger than memory are no different from small ones: texts beyond a limit go to an unnamed
temporary file.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from loopos.data.labels import (
    Labels,
    Problem,
    check_unicode,
    collector,
    field_of,
    known_numbers,
)
from loopos.data.rows import Row, Source, iter_rows, name_of, read_rows
from loopos.data.splitting import split
from loopos.data.store import PlacesBuilder, TextStoreBuilder, taken
from loopos.errors import DataError

__all__ = [
    "LabelledTexts",
    "Row",
    "Source",
    "Texts",
    "iter_rows",
    "read_labelled",
    "read_rows",
    "read_texts",
    "split",
]

Array = np.ndarray[Any, Any]

#: Labels that are written out at once.
_LABELS = 10_000


@dataclass(frozen=True)
class Texts:
    """Texts, where each stands, and where rows stood that had no text and were left out.

    Attributes
    ----------
    texts, where, dropped : sequence of str
        Lists, or what :func:`read_texts` makes: a ``TextStore`` and ``Places``.
    held_out : str
        Where these are ends of texts that :func:`split` cut off: which part they are, for people.
    """

    texts: Sequence[str]
    where: Sequence[str]
    dropped: Sequence[str] = field(default_factory=list, kw_only=True)
    held_out: str = field(default="", kw_only=True)

    def take(self, indices: Sequence[int] | Array) -> Texts:
        """Return the texts at `indices`; of stored texts a view."""
        return Texts(taken(self.texts, indices), taken(self.where, indices), dropped=self.dropped)

    @property
    def corpus(self) -> Sequence[str]:
        """All text that is trained on, for making a tokenizer."""
        return self.texts

    def parts(self) -> Iterator[str]:
        """Yield all that is trained on, in parts; two sets are the same if their parts are."""
        for text in self.texts:
            yield text + "\0"


@dataclass(frozen=True)
class LabelledTexts(Texts):
    """Texts with a label each.

    Attributes
    ----------
    labels : ndarray
        int64 [n], the class of each text; for a regression float64 [n], its target; for several
        labels int8 [n, K] of 0 and 1.
    label_names : list of str
        Name of each class or label; the numbers themselves where labels are integers. Empty for a
        regression.
    problem : {"classification", "regression", "multi_label"}
    """

    labels: Array
    label_names: list[str]
    problem: Problem = field(default="classification", kw_only=True)

    def take(self, indices: Sequence[int] | Array) -> LabelledTexts:
        """Return the rows at `indices`; the classes stay as they are."""
        texts, where = taken(self.texts, indices), taken(self.where, indices)
        labels = self.labels[np.asarray(indices, dtype=np.int64)]
        return replace(self, texts=texts, where=where, labels=labels)

    def parts(self) -> Iterator[str]:
        """Yield texts, names and labels, in parts."""
        yield from super().parts()
        yield f"({self.label_names!r}, ["
        for start in range(0, len(self.labels), _LABELS):
            yield ", " * bool(start) + repr(self.labels[start : start + _LABELS].tolist())[1:-1]
        yield "])"

    def with_label_names(self, label_names: Sequence[str]) -> LabelledTexts:
        """Return the rows with their classes numbered as `label_names` says, matched by name.

        Raises
        ------
        DataError
            If a row has a class that is not among them, or no class as it is to be a number.
        """
        names = list(label_names)
        if names == self.label_names:
            return self
        if self.problem == "regression":
            raise DataError(f"numbers to predict have no label names, found {reprlib.repr(names)}")
        several = self.problem == "multi_label"
        if several:
            present = np.flatnonzero(self.labels.any(axis=0))
            first = self.labels[:, present].argmax(axis=0)
        else:
            present, first = np.unique(self.labels, return_index=True)
        order = np.argsort(first, kind="stable")  # the first row at fault is named
        present, first = present[order], first[order]
        numbers = self.label_names == [str(i) for i in range(len(self.label_names))]
        values = [int(i) if numbers else self.label_names[i] for i in present.tolist()]
        places = [self.where[row] for row in first.tolist()]
        found = known_numbers(values, places, "label", names)
        if several:
            labels: Array = np.zeros((len(self.labels), len(names)), dtype=np.int8)
            labels[:, found] = self.labels[:, present]
        else:
            table = np.zeros(len(self.label_names), dtype=np.int64)
            table[present] = found
            labels = table[self.labels]
        return replace(self, labels=labels, label_names=names)


def _text(row: Row, name: str) -> str:
    value = field_of(row, name)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: expected '{name}' to be text, found {reprlib.repr(value)}")
    check_unicode(value, row, name)
    return value


class _Kept:
    """Takes texts and places, those with nothing in them apart."""

    def __init__(self) -> None:
        self.texts, self.where, self.dropped = TextStoreBuilder(), PlacesBuilder(), PlacesBuilder()
        self.first: str | None = None

    def add(self, row: Row, text_field: str) -> bool:
        """Take the text of a row; False if there is nothing in it."""
        text = _text(row, text_field)
        if self.first is None:
            self.first = row.where
        filled = bool(text.strip())
        if filled:
            self.texts.append(text)
        (self.where if filled else self.dropped).append(row.file, row.number)
        return filled


def read_texts(source: Source, text_field: str = "text") -> Texts:
    """Read texts without labels; a .txt file is one text, or several divided by form feeds.

    Parameters
    ----------
    source : path, sequence of paths, table or iterable of mappings
        As :func:`iter_rows`.
    text_field : str
        Name of the field.

    Raises
    ------
    MissingFileError, DataError
        As :func:`iter_rows`; also when no text has anything in it.
    OutputError
        If there is more than memory should hold, and no room for a temporary file.
    """
    kept = _Kept()
    with closing(iter_rows(source, [text_field], plain_field=text_field)) as rows:
        for row in rows:
            kept.add(row, text_field)
    if not len(kept.texts):
        what = "row" if kept.first is None else "text"
        raise DataError(f"{name_of(source)}: there is no {what} in it")
    return Texts(kept.texts.finish(), kept.where.finish(), dropped=kept.dropped.finish())


def read_labelled(
    source: Source,
    text_field: str = "text",
    label_field: str = "label",
    label_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    problem: Problem | None = None,
) -> LabelledTexts:
    """Read texts with labels.

    Classes are integers from 0, or names; names become classes in sorted order. Labels written as
    text are integers if every one of them is. Rows without any text are dropped.

    Parameters
    ----------
    source : path, sequence of paths, table or iterable of mappings
        As :func:`iter_rows`.
    text_field, label_field : str
        Names of the fields.
    label_names : sequence of str, optional
        The classes that are known already; any other label is an error. Integer labels are their
        numbers, unless the names are numbers themselves.
    num_classes : int, optional
        How many classes there are at the most, when labels are integers.
    problem : {"classification", "regression", "multi_label"}, optional
        "regression": labels are finite numbers. "multi_label": labels are lists of classes, which
        may be empty; a cell of a table may say ``"a|b"``. By default regression when `num_classes`
        is 1, multi_label when labels are lists, else classification.

    Raises
    ------
    MissingFileError, DataError
        As :func:`iter_rows`; also for a text that is none, a label that is no integer or name, or
        outside the classes, and when there is only one class.
    ConfigError
        If there is no such problem.
    OutputError
        If there is more than memory should hold, and no room for a temporary file.
    """
    kept = _Kept()
    labels: Labels | None = None
    with closing(iter_rows(source, [text_field, label_field])) as rows:
        for row in rows:
            if kept.add(row, text_field):
                if labels is None:
                    labels = collector(problem, num_classes, label_field, row)
                labels.add(row)
    if kept.first is None:
        raise DataError(f"{name_of(source)}: there is no row in it")
    if labels is None:
        raise DataError(f"{kept.first}: no row has any text in '{text_field}'")
    where = kept.where.finish()
    values, names = labels.finish(where, label_names, num_classes)
    texts, dropped = kept.texts.finish(), kept.dropped.finish()
    return LabelledTexts(texts, where, values, names, dropped=dropped, problem=labels.problem)
