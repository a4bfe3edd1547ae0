"""Labels of rows: one class, a number to predict, or several labels at once.

They are collected row by row and kept as numbers, whatever they are called.
"""

from __future__ import annotations

import array
import math
import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal, get_args

import numpy as np

from loopos.data.rows import Row
from loopos.errors import ConfigError, DataError, nearest

__all__ = ["PROBLEMS", "Labels", "Problem", "collector", "field_of", "known_numbers"]

Array = np.ndarray[Any, Any]
Problem = Literal["classification", "regression", "multi_label"]
PROBLEMS: tuple[str, ...] = get_args(Problem)

#: Integer labels are class numbers: one beyond this is an identifier that got into the wrong field.
_MAX_CLASSES = 100_000
#: Nobody numbers classes with more digits, and Python refuses to read very long ones.
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
#: What divides the labels of one cell of a table.
_DIVIDER = "|"


def field_of(row: Row, name: str) -> Any:
    """Return a field of a row (raises DataError naming the nearest when it is not there)."""
    if name not in row.fields:
        names = [str(field) for field in row.fields]
        found = first_few(names, 10) or "nothing"
        texts = [field for field in row.fields if isinstance(field, str)]
        kinds = "" if len(texts) == len(names) else "; the names of fields must be text"
        hint = nearest(name, texts)
        raise DataError(f"{row.where}: no field '{name}'{hint} (found: {found}{kinds})")
    return row.fields[name]


def first_few(names: Sequence[str], count: int) -> str:
    """Join the first `count` of some names."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def check_unicode(value: str, row: Row, name: str) -> None:
    """Raise DataError for what cannot be written as UTF-8."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{row.where}: '{name}' has half a surrogate pair, so no text") from error


def collector(problem: Problem | None, num_classes: int | None, field: str, row: Row) -> Labels:
    """Return what takes the labels of a set whose first row is `row`.

    Parameters
    ----------
    problem : {"classification", "regression", "multi_label"}, optional
        By default regression when `num_classes` is 1, multi_label when the first row has a list.
    num_classes : int, optional
    field : str
        Name of the field of the labels.

    Raises
    ------
    ConfigError
        If there is no such problem.
    DataError
        If the first row has no such field.
    """
    kinds: dict[str, type[Labels]] = {
        "classification": Classes,
        "regression": Targets,
        "multi_label": LabelSets,
    }
    if problem is not None:
        if problem not in kinds:
            raise ConfigError(
                f"problem: expected one of {', '.join(kinds)}, found {problem!r}"
                + nearest(str(problem), kinds)
            )
        return kinds[problem](field)
    if num_classes == 1:
        return Targets(field)
    several = _is_list(field_of(row, field))
    # Nobody said what the labels are: the first row does, and the others must agree with it.
    return (LabelSets if several else Classes)(field, row)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim == 1)


class Labels(ABC):
    """Takes the labels of rows one by one.

    Parameters
    ----------
    field : str
        Name of the field.
    like : Row, optional
        The row that others must have the same kind of label as.
    """

    problem: Problem

    def __init__(self, field: str, like: Row | None = None):
        self.field, self._like = field, like

    @abstractmethod
    def add(self, row: Row) -> None:
        """Take the label of a row (raises DataError if it is none)."""

    @abstractmethod
    def finish(
        self, where: Sequence[str], label_names: Sequence[str] | None, num_classes: int | None
    ) -> tuple[Array, list[str]]:
        """Return labels and label names of all rows, which stand in `where`."""

    def _agree(self, row: Row, value: Any) -> None:
        """Refuse a list among single labels, and a single label among lists."""
        if self._like is not None:
            first = self._like.fields[self.field]
            if _is_list(value) != _is_list(first):
                raise DataError(
                    f"{row.where}: '{self.field}' is {reprlib.repr(value)} here and "
                    f"{reprlib.repr(first)} in {self._like.where}: "
                    "expected a list in every row or in none"
                )


class _Named(Labels):
    """Labels with names or numbers: each different one is kept once."""

    def __init__(self, field: str, like: Row | None = None):
        super().__init__(field, like)
        self._codes: dict[int | str, int] = {}
        self._first = array.array("q")  # the row that each different one stands first in
        self._coded = array.array("q")
        self._rows = 0

    def _add(self, value: Any, row: Row, what: str = "an integer or text") -> None:
        if isinstance(value, str):
            if not value.strip():
                raise DataError(f"{row.where}: '{self.field}' is empty")
            check_unicode(value, row, self.field)
            label: int | str = str(value.strip())
        elif isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise DataError(
                f"{row.where}: expected '{self.field}' to be {what}, found {reprlib.repr(value)}"
            )
        else:
            label = int(value)
        code = self._codes.setdefault(label, len(self._codes))
        if code == len(self._first):
            self._first.append(self._rows)
        self._coded.append(code)

    def _numbers(
        self, where: Sequence[str], known: Sequence[str] | None, num_classes: int | None
    ) -> tuple[Array, list[str]]:
        """Return the class of each label taken, and the names of the classes."""
        values = list(self._codes)
        places = [where[row] for row in self._first]
        # "01" may be the name of a class: what is known by its name is no number.
        if known is None or not set(values) <= set(known):
            values = _integers_of_table(values)
        names = list(known or ())
        if len({type(value) for value in values}) > 1:
            at = next(i for i, value in enumerate(values) if type(value) is not type(values[0]))
            raise DataError(
                f"{places[at]}: '{self.field}' is {values[at]!r} here and {values[0]!r} in "
                f"{places[0]}: expected all integers or all names"
            )
        if known is not None:
            numbers = known_numbers(values, places, self.field, names)
        elif values and isinstance(values[0], int):
            numbers, names = _numbered(values, places, self.field, num_classes)
        else:
            names = sorted({str(value) for value in values})
            if num_classes is not None and len(names) > num_classes:
                raise DataError(
                    f"'{self.field}' has {len(names)} different names ({first_few(names, 5)}), "
                    f"more than num_classes {num_classes}"
                )
            ids = {name: index for index, name in enumerate(names)}
            numbers = np.array([ids[str(value)] for value in values], dtype=np.int64)
        return numbers[np.frombuffer(self._coded, np.int64)] if values else numbers, names


class Classes(_Named):
    """One class a row."""

    problem = "classification"

    def add(self, row: Row) -> None:
        """Take an integer or a name."""
        value = field_of(row, self.field)
        self._agree(row, value)
        self._add(value, row)
        self._rows += 1

    def finish(
        self, where: Sequence[str], label_names: Sequence[str] | None, num_classes: int | None
    ) -> tuple[Array, list[str]]:
        """Return the class of each row, int64 [n], and the names of the classes."""
        labels, names = self._numbers(where, label_names, num_classes)
        if label_names is None and np.unique(labels).size < 2:
            [value, *_] = _integers_of_table(list(self._codes))
            raise DataError(
                f"{where[0]}: every row has the '{self.field}' {value!r}, "
                "expected two classes at least"
            )
        return labels, names


class LabelSets(_Named):
    """Any number of labels a row, none too."""

    problem = "multi_label"

    def __init__(self, field: str, like: Row | None = None):
        super().__init__(field, like)
        self._counts = array.array("q")

    def add(self, row: Row) -> None:
        """Take a list of integers or names; where lists were asked for, also ``"a|b"``."""
        value = field_of(row, self.field)
        self._agree(row, value)
        if isinstance(value, str) and self._like is None:
            value = value.split(_DIVIDER) if value.strip() else []
        if not _is_list(value):
            raise DataError(
                f"{row.where}: expected '{self.field}' to be a list of labels, "
                f"found {reprlib.repr(value)}"
            )
        for label in value:
            self._add(label, row, "a list of integers or texts")
        self._counts.append(len(value))
        self._rows += 1

    def finish(
        self, where: Sequence[str], label_names: Sequence[str] | None, num_classes: int | None
    ) -> tuple[Array, list[str]]:
        """Return which labels each row has, int8 [n, K] of 0 and 1, and the K names."""
        columns, names = self._numbers(where, label_names, num_classes)
        if label_names is None and not self._codes:
            raise DataError(f"{where[0]}: no row has any label in '{self.field}'")
        rows = np.repeat(np.arange(self._rows), np.frombuffer(self._counts, np.int64))
        cells, counts = np.unique(rows * len(names) + columns, return_counts=True)
        for cell in cells[counts > 1][:1].tolist():
            row, column = divmod(cell, len(names))
            raise DataError(f"{where[row]}: '{self.field}' has {names[column]!r} twice")
        labels = np.zeros((self._rows, len(names)), dtype=np.int8)
        labels[rows, columns] = 1
        return labels, names


class Targets(Labels):
    """A number to predict in each row."""

    problem = "regression"

    def __init__(self, field: str, like: Row | None = None):
        super().__init__(field, like)
        self._targets = array.array("d")

    def add(self, row: Row) -> None:
        """Take a finite number, which a table may hold as text."""
        value = field_of(row, self.field)
        number = math.nan
        if isinstance(value, str):
            if _NUMBER.fullmatch(value.strip()):
                number = float(value)
        elif isinstance(value, (int, float, np.integer, np.floating, Decimal)):
            try:
                number = math.nan if isinstance(value, bool) else float(value)
            except OverflowError:  # an integer beyond all floats
                number = math.inf
        if not math.isfinite(number):
            raise DataError(
                f"{row.where}: expected '{self.field}' to be a finite number, "
                f"found {reprlib.repr(value)}"
            )
        self._targets.append(number)

    def finish(
        self, where: Sequence[str], label_names: Sequence[str] | None, num_classes: int | None
    ) -> tuple[Array, list[str]]:
        """Return the number of each row, float64 [n], and no names."""
        if label_names:
            raise DataError(
                f"'{self.field}' is a number to predict, but label names are given "
                f"({first_few(list(label_names), 5)})"
            )
        if num_classes not in (None, 1):
            raise DataError(f"a regression has one target, found num_classes {num_classes}")
        return np.array(self._targets, dtype=np.float64), []


def _integers_of_table(values: list[int | str]) -> list[int | str]:
    """Turn labels that were written as text into integers, if every one of them is one."""
    if all(isinstance(v, str) and _INTEGER.fullmatch(v) for v in values):
        return [int(v) for v in values]
    return values


def _numbered(
    values: Sequence[Any], places: Sequence[str], field: str, num_classes: int | None
) -> tuple[Array, list[str]]:
    limit = _MAX_CLASSES if num_classes is None else num_classes
    for value, place in zip(values, places, strict=True):
        if not 0 <= value < limit:
            expected = f"0 to {limit - 1}" if num_classes is not None or value > 0 else "0 or more"
            raise DataError(f"{place}: expected '{field}' from {expected}, found {value}")
    numbers = np.array(values, dtype=np.int64)
    return numbers, [str(i) for i in range(num_classes or int(numbers.max()) + 1)]


def known_numbers(
    values: Sequence[int | str], places: Sequence[str], field: str, names: list[str]
) -> Array:
    """Return which of `names` each value is, by name, or by number where no name is one.

    Raises
    ------
    DataError
        If a value is none of them, naming its place and the nearest; or a name is given twice.
    """
    ids: dict[int | str, int] = {name: index for index, name in enumerate(names)}
    if len(ids) != len(names):
        twice = next(name for i, name in enumerate(names) if ids[name] != i)
        raise DataError(f"the label name {twice!r} is given twice")
    # Integers are numbers of the classes, unless classes have numbers for names.
    if not any(_INTEGER.fullmatch(name) for name in names):
        ids |= {index: index for index in range(len(names))}
    numbers = np.empty(len(values), dtype=np.int64)
    for row, (value, place) in enumerate(zip(values, places, strict=True)):
        found = ids.get(value, ids.get(str(value)))
        if found is None:
            raise DataError(
                f"{place}: unknown '{field}' {value!r}{nearest(str(value), names)} "
                f"(known: {first_few(names, 10)})"
            )
        numbers[row] = found
    return numbers
