"""Texts, with and without labels, from files or any iterable of mappings; and splitting them.

Every text remembers where it stands, so that whatever is wrong with it is said with file and line.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from loopos.data.rows import Row, Source, existing, read_rows
from loopos.errors import DataError, nearest
from loopos.files import read_text

__all__ = [
    "LabelledTexts",
    "Row",
    "Source",
    "Texts",
    "read_labelled",
    "read_rows",
    "read_texts",
    "split",
]

Array = np.ndarray[Any, Any]

#: Integer labels are class numbers: one beyond this is an identifier that got into the wrong field.
_MAX_CLASSES = 100_000
#: Nobody numbers classes with more digits, and Python refuses to read very long ones.
_INTEGER = re.compile(r"-?[0-9]{1,18}")


@dataclass(frozen=True)
class Texts:
    """Texts, where each stands, and where rows stood that had no text and were left out."""

    texts: list[str]
    where: list[str]
    dropped: list[str] = field(default_factory=list, kw_only=True)

    def take(self, indices: Sequence[int] | Array) -> Texts:
        """Return the texts at `indices`."""
        texts, where = [self.texts[i] for i in indices], [self.where[i] for i in indices]
        return Texts(texts, where, dropped=self.dropped)


@dataclass(frozen=True)
class LabelledTexts(Texts):
    """Texts with a class each.

    Attributes
    ----------
    labels : ndarray int64 [n]
        Class of each text.
    label_names : list of str
        Name of each class; the numbers themselves where labels are integers.
    """

    labels: Array
    label_names: list[str]
    problem: str = field(default="classification", kw_only=True)

    def take(self, indices: Sequence[int] | Array) -> LabelledTexts:
        """Return the rows at `indices`; the classes stay as they are."""
        picked = super().take(indices)
        labels = self.labels[np.asarray(indices, dtype=np.int64)]
        return LabelledTexts(
            picked.texts, picked.where, labels, self.label_names, dropped=self.dropped
        )

    def with_label_names(self, label_names: Sequence[str]) -> LabelledTexts:
        """Return the rows with their classes numbered as `label_names` says, matched by name.

        Raises
        ------
        DataError
            If a row has a class that is not among them.
        """
        names = list(label_names)
        if names == self.label_names:
            return self
        numbers = self.label_names == [str(i) for i in range(len(self.label_names))]
        values = [int(i) if numbers else self.label_names[i] for i in self.labels]
        labels = _known(values, self.where, "label", names)
        return LabelledTexts(self.texts, self.where, labels, names, dropped=self.dropped)


# -- texts ---------------------------------------------------------------------------------------


def _field_of(row: Row, name: str) -> Any:
    if name not in row.fields:
        names = [str(field) for field in row.fields]
        found = _first(names, 10) or "nothing"
        raise DataError(f"{row.where}: no field '{name}'{nearest(name, names)} (found: {found})")
    return row.fields[name]


def _first(names: Sequence[str], count: int) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _text(row: Row, name: str) -> str:
    value = _field_of(row, name)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: expected '{name}' to be text, found {reprlib.repr(value)}")
    _check_unicode(value, row, name)
    return value


def _check_unicode(value: str, row: Row, name: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{row.where}: '{name}' has half a surrogate pair, so no text") from error


def read_texts(source: Source, text_field: str = "text") -> Texts:
    """Read texts without labels; a .txt file is one text, or several divided by form feeds.

    Raises
    ------
    MissingFileError, DataError
        As :func:`read_rows`; also when no text has anything in it.
    """
    if isinstance(source, (str, Path)) and Path(source).suffix.lower() == ".txt":
        path = existing(Path(source))
        texts, where, line = [], [], 1
        for part in read_text(path, DataError).split("\f"):
            texts.append(part)
            where.append(f"{path}:{line}")
            line += part.count("\n")
    else:
        rows = read_rows(source)
        texts, where = [_text(row, text_field) for row in rows], [row.where for row in rows]
    filled = [i for i, text in enumerate(texts) if text.strip()]
    if not filled:
        name = source if isinstance(source, (str, Path)) else "the data"
        raise DataError(f"{name}: there is no text in it")
    dropped = [place for text, place in zip(texts, where, strict=True) if not text.strip()]
    return Texts(texts, where, dropped=dropped).take(filled)


def read_labelled(
    source: Source,
    text_field: str = "text",
    label_field: str = "label",
    label_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    problem: str | None = None,
) -> LabelledTexts:
    """Read texts with labels.

    Labels are integers from 0, or names; names become classes in sorted order. Labels written as
    text are integers if every one of them is. Rows without any text are dropped.

    Parameters
    ----------
    source : path or iterable of mappings
    text_field, label_field : str
        Names of the fields.
    label_names : sequence of str, optional
        The classes that are known already; any other label is an error. Integer labels are their
        numbers, unless the names are numbers themselves.
    num_classes : int, optional
        How many classes there are at the most, when labels are integers.

    Raises
    ------
    MissingFileError, DataError
        As :func:`read_rows`; also for a text that is none, a label that is no integer or name, or
        outside the classes, and when there is only one class.
    """
    rows = read_rows(source)
    texts = [_text(row, text_field) for row in rows]
    kept = [i for i, text in enumerate(texts) if text.strip()]
    if not kept:
        raise DataError(f"{rows[0].where}: no row has any text in '{text_field}'")
    where = [rows[i].where for i in kept]
    values = [_label(rows[i], label_field) for i in kept]
    # "01" may be the name of a class: what is known by its name is no number.
    if label_names is None or not set(values) <= set(label_names):
        values = _integers_of_table(values)
    labels, names = _classes(values, where, label_field, label_names, num_classes)
    dropped = [row.where for row, text in zip(rows, texts, strict=True) if not text.strip()]
    return LabelledTexts([texts[i] for i in kept], where, labels, names, dropped=dropped)


def _label(row: Row, name: str) -> int | str:
    value = _field_of(row, name)
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{row.where}: '{name}' is empty")
        _check_unicode(value, row, name)
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise DataError(
            f"{row.where}: expected '{name}' to be an integer or text, found {reprlib.repr(value)}"
        )
    return int(value)


def _integers_of_table(values: list[int | str]) -> list[int | str]:
    """Turn labels that were written as text into integers, if every one of them is one."""
    if all(isinstance(v, str) and _INTEGER.fullmatch(v) for v in values):
        return [int(v) for v in values]
    return values


def _classes(
    values: list[int | str],
    where: list[str],
    field: str,
    known: Sequence[str] | None,
    num_classes: int | None,
) -> tuple[Array, list[str]]:
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        at = next(i for i, value in enumerate(values) if type(value) is not type(values[0]))
        raise DataError(
            f"{where[at]}: '{field}' is {values[at]!r} here and {values[0]!r} in {where[0]}: "
            "expected all integers or all names"
        )
    if known is not None:
        return _known(values, where, field, list(known)), list(known)
    if kinds == {int}:
        numbers, names = _numbered(values, where, field, num_classes)
    else:
        names = sorted({str(value) for value in values})
        if num_classes is not None and len(names) > num_classes:
            raise DataError(
                f"'{field}' has {len(names)} different names ({_first(names, 5)}), "
                f"more than num_classes {num_classes}"
            )
        ids = {name: index for index, name in enumerate(names)}
        numbers = np.array([ids[str(value)] for value in values], dtype=np.int64)
    if np.unique(numbers).size < 2:
        raise DataError(
            f"{where[0]}: every row has the '{field}' {values[0]!r}, expected two classes at least"
        )
    return numbers, names


def _numbered(
    values: Sequence[Any], where: list[str], field: str, num_classes: int | None
) -> tuple[Array, list[str]]:
    limit = _MAX_CLASSES if num_classes is None else num_classes
    for value, place in zip(values, where, strict=True):
        if not 0 <= value < limit:
            expected = f"0 to {limit - 1}" if num_classes is not None or value > 0 else "0 or more"
            raise DataError(f"{place}: expected '{field}' from {expected}, found {value}")
    numbers = np.array(values, dtype=np.int64)
    return numbers, [str(i) for i in range(num_classes or int(numbers.max()) + 1)]


def _known(values: Sequence[int | str], where: list[str], field: str, names: list[str]) -> Array:
    ids: dict[int | str, int] = {name: index for index, name in enumerate(names)}
    if len(ids) != len(names):
        twice = next(name for i, name in enumerate(names) if ids[name] != i)
        raise DataError(f"the label name {twice!r} is given twice")
    # Integers are numbers of the classes, unless classes have numbers for names.
    if not any(_INTEGER.fullmatch(name) for name in names):
        ids |= {index: index for index in range(len(names))}
    numbers = np.empty(len(values), dtype=np.int64)
    for row, (value, place) in enumerate(zip(values, where, strict=True)):
        found = ids.get(value, ids.get(str(value)))
        if found is None:
            raise DataError(
                f"{place}: unknown '{field}' {value!r}{nearest(str(value), names)} "
                f"(known: {_first(names, 10)})"
            )
        numbers[row] = found
    return numbers


# -- splitting -----------------------------------------------------------------------------------


def _share(groups: list[list[int]], fraction: float) -> list[list[int]]:
    """Return groups with about `fraction` of the rows: one at least, and never all, of two."""
    if len(groups) < 2:
        return []
    wanted = int(fraction * sum(map(len, groups)) + 0.5)
    taken: list[list[int]] = []
    rows = 0
    for group in groups:
        if rows + len(group) <= wanted:
            taken.append(group)
            rows += len(group)
    smallest = min(groups, key=len)
    if not taken:
        return [smallest]
    return taken if len(taken) < len(groups) else [g for g in groups if g is not smallest]


def split(data: Texts, fraction: float, seed: int) -> tuple[Any, Any]:
    """Divide rows into training and validation, seeded, stratified by label, without leaks.

    Rows with the same text stay on one side. Of each class about `fraction` of the rows go to
    validation: at least one and never all, where it has two different texts or more. A text with
    several labels counts for its first.

    Parameters
    ----------
    data : Texts or LabelledTexts
    fraction : float
        Share of validation, in (0, 1).
    seed : int

    Returns
    -------
    training, validation
        Of the class of `data`, rows in their order.

    Raises
    ------
    DataError
        If nothing would be left on one side.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(f"expected a validation fraction between 0 and 1, found {fraction}")
    rng = np.random.default_rng(seed)
    groups: dict[str, list[int]] = {}
    for index, text in enumerate(data.texts):
        groups.setdefault(text, []).append(index)
    labels = data.labels if isinstance(data, LabelledTexts) else np.zeros(len(data.texts), np.int64)
    by_class: dict[int, list[list[int]]] = {}
    for members in groups.values():
        by_class.setdefault(int(labels[members[0]]), []).append(members)
    held_out: list[int] = []
    for label in sorted(by_class):
        members_of_class = by_class[label]
        order = [members_of_class[i] for i in rng.permutation(len(members_of_class))]
        for members in _share(order, fraction):
            held_out += members
    outside = set(held_out)
    training = [i for i in range(len(data.texts)) if i not in outside]
    if not held_out or not training:
        raise DataError(
            f"{len(data.texts)} rows are too few to split off a validation fraction of {fraction}"
        )
    # What was left out is told once, on the training side.
    return data.take(training), replace(data.take(sorted(held_out)), dropped=[])
