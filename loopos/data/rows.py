"""Rows of files (JSONL, JSON arrays, CSV, TSV, Parquet, Arrow) and of whatever holds mappings.

Rows are read one after the other, never a whole file, and each remembers where it stands, so that
whatever is wrong with it is said with file and line.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import reprlib
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from loopos.data.columns import arrow_file, columns_of, parquet_file
from loopos.data.store import place_text
from loopos.errors import DataError, MissingFileError, nearest
from loopos.files import read_text

__all__ = ["Row", "Source", "existing", "is_pattern", "iter_rows", "matching", "read_rows"]

#: A path or glob pattern, several of them, a data frame, a dataset, or mappings.
Source = str | Path | Iterable[Any]

#: What divides the cells of a table, by the ending of its file.
_TABLES = {".csv": ",", ".tsv": "\t"}
#: csv has one limit for the whole process, which belongs to the host.
_CSV_LIMIT = threading.Lock()
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """The fields of a row, and where it stands.

    Attributes
    ----------
    fields : mapping
    number : int
        Its line in the file, its number from 1 in a Parquet file or without a file.
    file : str or None
    of_columns : bool
        Whether it comes of a table's columns: objects have None then for what others have.
    """

    fields: Mapping[str, Any]
    number: int
    file: str | None = None
    of_columns: bool = False

    @property
    def where(self) -> str:
        """Where it stands, ``"t.jsonl:41"`` or ``"row 41"``."""
        return place_text(self.file, self.number)


def read_rows(source: Source) -> list[Row]:
    """Read all rows of a source; :func:`iter_rows` does not hold them.

    Raises
    ------
    MissingFileError
        If there is no such file.
    DataError
        If a row cannot be read, naming file and line, or there is none.
    """
    rows = list(iter_rows(source))
    if not rows:
        raise DataError(f"{name_of(source)}: there is no row in it")
    return rows


def name_of(source: Source) -> str:
    """Return what messages call a source."""
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, (list, tuple)) and source and isinstance(source[0], (str, Path)):
        return ", ".join(map(str, source[:3])) + (", ..." if len(source) > 3 else "")
    return "the data"


def iter_rows(
    source: Source, fields: Sequence[str] | None = None, plain_field: str | None = None
) -> Generator[Row, None, None]:
    """Yield the rows of a source one by one.

    Parameters
    ----------
    source : path, sequence of paths, table or iterable of mappings
        A path ends in .jsonl, .ndjson, .json (an array of objects), .csv or .tsv (with a header),
        .parquet or .arrow, or is a pattern such as ``"data/*.jsonl"``, whose files are read in
        sorted order. A .json file is read whole, the others as a stream. A table is a pandas or
        polars ``DataFrame``, a ``pyarrow.Table`` or a ``datasets.Dataset``.
    fields : sequence of str, optional
        The fields that are needed; where it is cheap, others are left out.
    plain_field : str, optional
        Take .txt files too, divided by form feeds, with their texts in this field.

    Raises
    ------
    MissingFileError
        If there is no such file, or no file matches.
    DataError
        If a row cannot be read, naming file and line.
    """
    if isinstance(source, (str, Path)):
        yield from _files([source], fields, plain_field)
        return
    rows = columns_of(source, fields)
    of_columns = rows is not None
    if rows is None:
        if not isinstance(source, Iterable) or isinstance(source, (bytes, Mapping)):
            raise DataError(f"expected a path or a list of mappings, found {type(source).__name__}")
        entries = iter(source)
        first = list(islice(entries, 1))
        rows = chain(first, entries)
        if first and isinstance(first[0], (str, Path)):
            yield from _files(rows, fields, plain_field)
            return
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number}: expected a mapping, found {type(row).__name__}")
        yield Row(row, number, of_columns=of_columns)


def _files(
    sources: Iterable[Any], fields: Sequence[str] | None, plain_field: str | None
) -> Iterator[Row]:
    paths: list[Path] = []
    for number, source in enumerate(sources, start=1):
        if not isinstance(source, (str, Path)):
            raise DataError(f"source {number}: expected a path, found {type(source).__name__}")
        paths += matching(source)
    for path in paths:
        yield from _file(path, fields, plain_field)


def _file(path: Path, fields: Sequence[str] | None, plain_field: str | None) -> Iterator[Row]:
    suffix, name = path.suffix.lower(), str(path)
    if suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(path)
    elif suffix == ".json":
        yield from _json_array(path)
    elif suffix in _TABLES:
        yield from _table(path, _TABLES[suffix])
    elif suffix in (".parquet", ".arrow"):
        rows = (parquet_file if suffix == ".parquet" else arrow_file)(path, fields)
        for number, row in enumerate(rows, start=1):
            yield Row(row, number, name, of_columns=True)
    elif suffix == ".txt" and plain_field is not None:
        yield from _plain(path, plain_field)
    else:
        raise DataError(
            f"{path}: expected a file of rows ending in .jsonl, .json, .csv, .tsv, .parquet or "
            f".arrow, found '{suffix or 'no ending'}'"
        )


def is_pattern(path: str | Path) -> bool:
    """Whether `path` has a character that stands for others."""
    return glob.has_magic(str(path))


def matching(path: str | Path) -> list[Path]:
    """Return the file that `path` names, or the files that it matches as a pattern, sorted.

    Raises
    ------
    MissingFileError
        If there is none.
    DataError
        If it is a directory, or cannot be read.
    """
    if is_pattern(path) and not os.path.exists(path):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        files = [file for file in found if not file.is_dir()]
        if not files:
            raise MissingFileError(f"{_short(path)}: no file matches")
        return files
    return [existing(Path(path))]


def existing(path: Path) -> Path:
    """Return `path` if it is a file (raises MissingFileError, DataError)."""
    try:
        if path.is_dir():
            raise DataError(f"{path}: is a directory, expected a file")
        if path.exists():
            return path
        beside = path.parent if path.parent.is_dir() else Path()
        names = [entry.name for entry in beside.iterdir()]
    except OSError as error:
        raise DataError(f"{_short(path)}: cannot be read ({error.strerror})") from error
    raise MissingFileError(f"{path}: no such file{nearest(path.name, names)}")


def _short(path: str | Path) -> str:
    """Return a path as it is, or the ends of what is too long for one."""
    return str(path) if len(str(path)) < 200 else reprlib.repr(str(path))


# -- lines ---------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line, its newline kept."""
    # Only a newline ends a line: U+2028 and its like are valid inside JSON strings.
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    raw = raw.removeprefix(_BYTE_ORDER_MARK)
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    byte = raw[error.start]
                    raise DataError(
                        f"{path}:{number}: not UTF-8 text (byte 0x{byte:02x})"
                    ) from error
                yield number, text
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror or error})")


def _plain(path: Path, field: str) -> Iterator[Row]:
    """Yield the texts of a plain file, which form feeds divide."""
    parts: list[str] = []
    begin = 1
    for number, line in _lines(path):
        first, *others = line.split("\f")
        parts.append(first)
        for part in others:
            yield Row({field: "".join(parts)}, begin, str(path))
            parts, begin = [part], number
    yield Row({field: "".join(parts)}, begin, str(path))


# -- JSON ----------------------------------------------------------------------------------------


class _Twice(ValueError):
    """A key stands twice in one object: which value is meant, nobody can say."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        column = f" at column {error.colno}"
        raise DataError(f"{where}: {_not_json(error, 'line', column)}") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: {_refused(error)}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _not_json(error: json.JSONDecodeError, whole: str, at: str = "") -> str:
    """Return what is wrong with JSON, and that its line or file may be cut short if it may."""
    cut = error.msg.startswith("Unterminated string") or error.pos >= len(error.doc.rstrip())
    hint = f" (is the {whole} cut short?)" if cut else ""
    return f"not valid JSON: {error.msg.removesuffix(' starting at')}{at}{hint}"


def _refused(error: RecursionError | ValueError) -> str:
    """Return what of JSON is not read: any integer of more than 4300 digits, by Python."""
    if isinstance(error, _Twice):
        return f"the key {reprlib.repr(str(error))} stands twice in this object"
    why = "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"
    return f"not valid JSON: {why}"


def _json_lines(path: Path) -> Iterator[Row]:
    name = str(path)
    for number, line in _lines(path):
        if line.strip():
            yield Row(_object(line.removesuffix("\n"), f"{name}:{number}"), number, name)


def _json_array(path: Path) -> Iterator[Row]:
    text = read_text(path, DataError)
    position = _skip(text, 0)
    line, counted = 1, 0
    if text[position : position + 1] != "[":
        raise DataError(f"{path}:1: expected a JSON array of objects")
    position = _skip(text, position + 1)
    more = text[position : position + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            value, position = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: {_not_json(error, 'file')}") from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{where}: {_refused(error)}") from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
        yield Row(value, line, str(path))
        position = _skip(text, position)
        more = text[position : position + 1] == ","
        if more:
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            cut = " (is the file cut short?)" if position == len(text) else ""
            raise DataError(f"{where}: expected ',' or ']' after this object{cut}")
    after = _skip(text, position + 1)
    if after < len(text):
        line = text.count("\n", 0, after) + 1
        raise DataError(f"{path}:{line}: there is text after the array")


def _skip(text: str, position: int) -> int:
    """Return the position after any white space."""
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


# -- tables --------------------------------------------------------------------------------------


def _record(reader: Iterator[list[str]], limit: int) -> list[str] | None:
    """Return the next record, None at the end; a field may have `limit` characters.

    The default of 128 kB would refuse long documents.
    """
    with _CSV_LIMIT:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, limit))
        try:
            return next(reader, None)
        finally:
            csv.field_size_limit(before)


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    header: list[str] | None = None
    line, name = 1, str(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            limit = min(path.stat().st_size + 1, 2**31 - 1)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            while (cells := _record(reader, limit)) is not None:
                number, line = line, reader.line_num + 1
                if not cells:
                    continue
                if header is None:
                    header = [cell.strip() for cell in cells]
                    _check_header(header, f"{name}:{number}")
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{name}:{number}: expected {len(header)} fields, found {len(cells)}"
                    )
                yield Row(dict(zip(header, cells, strict=True)), number, name)
    except csv.Error as error:
        raise DataError(f"{name}:{line}: not a valid table ({error})") from error
    except UnicodeDecodeError as error:
        for _ in _lines(path):  # says on which line
            pass
        raise DataError(f"{name}: not UTF-8 text") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _check_header(header: list[str], where: str) -> None:
    for place, name in enumerate(header, start=1):
        if not name:
            raise DataError(f"{where}: column {place} has no name in the header")
        if header.index(name) != place - 1:
            raise DataError(f"{where}: two columns are named '{name}' in the header")
