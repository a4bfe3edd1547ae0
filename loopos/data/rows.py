"""Rows of files: JSONL, JSON arrays, CSV and TSV, and of any iterable of mappings.

Every row remembers where it stands, so that whatever is wrong with it is said with file and line.
"""

from __future__ import annotations

import csv
import io
import json
import reprlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopos.errors import DataError, MissingFileError, nearest
from loopos.files import read_text

__all__ = ["Row", "Source", "existing", "read_rows"]

Source = str | Path | Iterable[Mapping[str, Any]]

#: What divides the cells of a table, by the ending of its file.
_TABLES = {".csv": ",", ".tsv": "\t"}
#: csv has one limit for the whole process, which belongs to the host.
_CSV_LIMIT = threading.Lock()


@dataclass(frozen=True)
class Row:
    """The fields of a row, and where it stands (``"t.jsonl:41"``, or ``"row 41"``)."""

    fields: Mapping[str, Any]
    where: str


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
        path = existing(Path(source))
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
    if not isinstance(source, Iterable) or isinstance(source, (bytes, Mapping)):
        raise DataError(f"expected a path or a list of mappings, found {type(source).__name__}")
    for number, fields in enumerate(source, start=1):
        if not isinstance(fields, Mapping):
            raise DataError(f"row {number}: expected a mapping, found {type(fields).__name__}")
        yield Row(fields, f"row {number}")


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
        raise DataError(f"{reprlib.repr(str(path))}: cannot be read ({error.strerror})") from error
    raise MissingFileError(f"{path}: no such file{nearest(path.name, names)}")


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        column = f" at column {error.colno}"
        raise DataError(f"{where}: {_not_json(error, 'line', column)}") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: not valid JSON: {_json_limit(error)}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _not_json(error: json.JSONDecodeError, whole: str, at: str = "") -> str:
    """Return what is wrong with JSON, and that its line or file may be cut short if it may."""
    cut = error.msg.startswith("Unterminated string") or error.pos >= len(error.doc.rstrip())
    hint = f" (is the {whole} cut short?)" if cut else ""
    return f"not valid JSON: {error.msg.removesuffix(' starting at')}{at}{hint}"


def _json_limit(error: RecursionError | ValueError) -> str:
    """Return what of JSON Python does not read: any integer of more than 4300 digits."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"


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
    line, counted = 1, 0
    if text[position : position + 1] != "[":
        raise DataError(f"{path}:1: expected a JSON array of objects")
    position = _skip(text, position + 1)
    more = text[position : position + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: {_not_json(error, 'file')}") from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{where}: not valid JSON: {_json_limit(error)}") from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
        yield Row(value, where)
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


@contextmanager
def _long_fields(size: int) -> Iterator[None]:
    """Let fields have `size` characters: the default of 128 kB would refuse long documents."""
    with _CSV_LIMIT:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, size))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    text = read_text(path, DataError)
    with _long_fields(len(text) + 1):
        rows = list(_records(path, text, delimiter))
    yield from rows


def _records(path: Path, text: str, delimiter: str) -> Iterator[Row]:
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
                _check_header(header, where)
                continue
            if len(cells) != len(header):
                raise DataError(f"{where}: expected {len(header)} fields, found {len(cells)}")
            yield Row(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not a valid table ({error})") from error


def _check_header(header: list[str], where: str) -> None:
    for place, name in enumerate(header, start=1):
        if not name:
            raise DataError(f"{where}: column {place} has no name in the header")
        if header.index(name) != place - 1:
            raise DataError(f"{where}: two columns are named '{name}' in the header")
