"""Reading rows: JSONL, JSON arrays, CSV, TSV, plain text and any iterable of mappings.

Every row remembers where it stands, so that whatever is wrong with it is said with file and line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from loopos.errors import DataError, MissingFileError, nearest
from loopos.files import read_text

__all__ = [
    "LabelledTexts",
    "Row",
    "Texts",
    "read_labelled",
    "read_rows",
    "read_texts",
]

Array = np.ndarray[Any, Any]
Source = str | Path | Iterable[Mapping[str, Any]]

#: What a file is, by its ending.
_TABLES = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class Row:
    """The fields of a row, and where it stands (``"t.jsonl:41"``, or ``"row 41"``)."""

    fields: Mapping[str, Any]
    where: str


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

    def take(self, indices: Sequence[int] | Array) -> LabelledTexts:
        """Return the rows at `indices`; the classes stay as they are."""
        picked = super().take(indices)
        labels = self.labels[np.asarray(indices, dtype=np.int64)]
        return LabelledTexts(
            picked.texts, picked.where, labels, self.label_names, dropped=self.dropped
        )


# -- rows --------------------------------------------------------------------------------------


def read_rows(source: Source) -> list[Row]:
    """Read the rows of a file or of an iterable of mappings.

    Parameters
    ----------
    source : path or iterable of mappings
        A path ends in .jsonl, .ndjson, .json (an array of objects), .csv or .tsv (with a header).

    Raises
    ------
    MissingFileError
        If there is no such file.
    DataError
        If a row cannot be read, naming file and line, or there is none.
    """
    rows = list(_rows(source))
    if not rows:
        name = source if isinstance(source, (str, Path)) else "the data"
        raise DataError(f"{name}: there is no row in it")
    return rows


def _rows(source: Source) -> Iterator[Row]:
    if isinstance(source, (str, Path)):
        path = _existing(Path(source))
        suffix = path.suffix.lower()
        if suffix in (".jsonl", ".ndjson"):
            yield from _json_lines(path)
        elif suffix == ".json":
            yield from _json_array(path)
        elif suffix in _TABLES:
            yield from _table(path, _TABLES[suffix])
        else:
            raise DataError(
                f"{path}: expected a file of rows ending in .jsonl, .json, .csv or .tsv, "
                f"found '{suffix or 'no ending'}'"
            )
        return
    for number, fields in enumerate(source, start=1):
        if not isinstance(fields, Mapping):
            raise DataError(f"row {number}: expected a mapping, found {type(fields).__name__}")
        yield Row(fields, f"row {number}")


def _existing(path: Path) -> Path:
    if path.is_dir():
        raise DataError(f"{path}: is a directory, expected a file")
    if not path.exists():
        beside = path.parent if path.parent.is_dir() else Path()
        names = [entry.name for entry in beside.iterdir()]
        raise MissingFileError(f"{path}: no such file{nearest(path.name, names)}")
    return path


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        cut = " (is the line cut short?)" if error.pos >= len(text.rstrip()) else ""
        raise DataError(
            f"{where}: not valid JSON: {error.msg} at column {error.colno}{cut}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _json_lines(path: Path) -> Iterator[Row]:
    # Not splitlines(): U+2028 and its like are valid inside JSON strings.
    for number, line in enumerate(read_text(path, DataError).split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield Row(_object(line, where), where)


def _json_array(path: Path) -> Iterator[Row]:
    text = read_text(path, DataError)
    decoder = json.JSONDecoder()
    position = _skip(text, 0)
    if text[position : position + 1] != "[":
        raise DataError(f"{path}:1: expected a JSON array of objects")
    position = _skip(text, position + 1)
    while text[position : position + 1] != "]":
        where = f"{path}:{text.count(chr(10), 0, position) + 1}"
        try:
            value, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON (is the file cut short?)") from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected an object, found {type(value).__name__}")
        yield Row(value, where)
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(f"{where}: expected ',' or ']' after this object")
    if text[position + 1 :].strip():
        raise DataError(f"{path}: there is text after the array")


def _skip(text: str, position: int) -> int:
    """Return the position after any white space."""
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    text = read_text(path, DataError)
    # The default limit of 128 kB a field would refuse long documents.
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = [name.strip() for name in cells]
                if len(set(header)) != len(header) or not all(header):
                    raise DataError(f"{where}: expected a header of different, filled names")
                continue
            if len(cells) != len(header):
                raise DataError(f"{where}: expected {len(header)} fields, found {len(cells)}")
            yield Row(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not a valid table ({error})") from error


# -- texts ---------------------------------------------------------------------------------------


def _field_of(row: Row, name: str) -> Any:
    if name not in row.fields:
        found = ", ".join(map(str, row.fields)) or "nothing"
        raise DataError(
            f"{row.where}: no field '{name}'{nearest(name, map(str, row.fields))} (found: {found})"
        )
    return row.fields[name]


def _text(row: Row, name: str) -> str:
    value = _field_of(row, name)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: expected '{name}' to be text, found {value!r}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{row.where}: '{name}' has half a surrogate pair, so no text") from error
    return value


def read_texts(source: Source, text_field: str = "text") -> Texts:
    """Read texts without labels; a .txt file is one text, or several divided by form feeds.

    Raises
    ------
    MissingFileError, DataError
        As :func:`read_rows`; also when no text has anything in it.
    """
    if isinstance(source, (str, Path)) and Path(source).suffix.lower() == ".txt":
        path = _existing(Path(source))
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
) -> LabelledTexts:
    """Read texts with labels.

    Labels are integers from 0, or names; names become classes in sorted order. In tables, where all
    is text, labels are integers if every one of them is. Rows without any text are dropped.

    Parameters
    ----------
    source : path or iterable of mappings
    text_field, label_field : str
        Names of the fields.
    label_names : sequence of str, optional
        The classes that are known already; any other label is an error.
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
    values = _integers_of_table(values)
    labels, names = _classes(values, where, label_field, label_names, num_classes)
    dropped = [row.where for row, text in zip(rows, texts, strict=True) if not text.strip()]
    return LabelledTexts([texts[i] for i in kept], where, labels, names, dropped=dropped)


def _label(row: Row, name: str) -> int | str:
    value = _field_of(row, name)
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{row.where}: '{name}' is empty")
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise DataError(f"{row.where}: expected '{name}' to be an integer or text, found {value!r}")
    return int(value)


def _integers_of_table(values: list[int | str]) -> list[int | str]:
    """Turn labels that were written as text into integers, if every one of them is one."""
    if all(isinstance(v, str) and v.lstrip("-").isdecimal() for v in values):
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
        numbers = np.array(values, dtype=np.int64)
        limit = num_classes if num_classes is not None else np.iinfo(np.int64).max
        for at in np.flatnonzero((numbers < 0) | (numbers >= limit))[:1]:
            expected = "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
            raise DataError(f"{where[at]}: expected '{field}' from {expected}, found {numbers[at]}")
        names = [str(i) for i in range(num_classes or int(numbers.max()) + 1)]
    else:
        names = sorted({str(value) for value in values})
        if num_classes is not None and len(names) > num_classes:
            raise DataError(
                f"'{field}' has {len(names)} different names ({', '.join(names[:5])}...), "
                f"more than num_classes {num_classes}"
            )
        numbers = np.array([names.index(str(value)) for value in values], dtype=np.int64)
    if np.unique(numbers).size < 2:
        raise DataError(
            f"{where[0]}: every row has the '{field}' {values[0]!r}, expected two classes at least"
        )
    return numbers, names


def _known(values: list[int | str], where: list[str], field: str, names: list[str]) -> Array:
    ids = {name: index for index, name in enumerate(names)}
    for value, place in zip(values, where, strict=True):
        if str(value) not in ids:
            raise DataError(
                f"{place}: unknown '{field}' {value!r}{nearest(str(value), names)} "
                f"(known: {', '.join(names[:10])})"
            )
    return np.array([ids[str(value)] for value in values], dtype=np.int64)


# -- splitting -----------------------------------------------------------------------------------


def split(data: Texts, fraction: float, seed: int) -> tuple[Any, Any]:
    """Divide rows into training and validation, seeded, stratified by label, without leaks.

    Rows with the same text stay on one side. Of each class about `fraction` of the rows go to
    validation: at least one and never all, where it has two different texts or more.

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
        rows = sum(map(len, members_of_class))
        taken = 0
        for place, position in enumerate(rng.permutation(len(members_of_class))):
            last = place == len(members_of_class) - 1
            if last or (place > 0 and taken + 0.5 >= fraction * rows):
                break
            held_out += members_of_class[position]
            taken += len(members_of_class[position])
    outside = set(held_out)
    training = [i for i in range(len(data.texts)) if i not in outside]
    if not held_out or not training:
        raise DataError(
            f"{len(data.texts)} rows are too few to split off a validation fraction of {fraction}"
        )
    # What was left out is told once, on the training side.
    return data.take(training), replace(data.take(sorted(held_out)), dropped=[])
