"""Rows of what is stored in columns: Parquet and Arrow files, data frames, datasets.

None of these libraries is imported before a file needs it; tables that the caller holds are known
by what they can do, not by their class. Each function yields mappings, one a row.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loopos.errors import DataError

__all__ = ["arrow_file", "columns_of", "parquet_file"]

#: Rows made into Python values at once.
_BATCH = 512
#: Bytes of a column read at once.
_BUFFER = 1 << 20


def _pyarrow(path: Path, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{path}: files ending in {path.suffix} need pyarrow: pip install 'loopos[parquet]'"
        ) from error


def parquet_file(path: Path, fields: Sequence[str] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a Parquet file, with only `fields` if it has them all.

    Raises
    ------
    DataError
        If pyarrow is not installed, or this is no such file.
    """
    parquet = _pyarrow(path, "pyarrow.parquet")
    arrow = importlib.import_module("pyarrow")
    try:
        # Page by page: either setting alone would hold a row group's whole column.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
            names = list(file.schema_arrow.names)
            columns = _columns(names, fields, str(path))
            # Its own threads would be more than the caller allowed.
            batches = file.iter_batches(_BATCH, columns=columns, use_threads=False)
            yield from _batches(batches, None, str(path))
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a Parquet file ({_sentence(error)})") from error


def arrow_file(path: Path, fields: Sequence[str] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of an Arrow IPC file or stream; as :func:`parquet_file`."""
    arrow = _pyarrow(path, "pyarrow")
    ipc = importlib.import_module("pyarrow.ipc")
    try:
        with arrow.memory_map(str(path)) as source:
            if source.size() == 0:
                return
            seekable = source.read(6) == b"ARROW1"
            source.seek(0)
            with (ipc.open_file if seekable else ipc.open_stream)(source) as reader:
                columns = _columns(list(reader.schema.names), fields, str(path))
                count = reader.num_record_batches if seekable else None
                batches = reader if count is None else map(reader.get_batch, range(count))
                yield from _batches(batches, columns, str(path))
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not an Arrow file ({_sentence(error)})") from error


def _batches(
    batches: Iterable[Any], columns: list[Any] | None, where: str
) -> Iterator[Mapping[str, Any]]:
    row = 0
    for batch in batches:
        picked = batch if columns is None else batch.select(columns)
        for start in range(0, picked.num_rows, _BATCH):
            part = picked.slice(start, _BATCH)
            try:
                values = part.to_pylist()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}: a text of the rows {row + 1} to {row + part.num_rows} is not UTF-8"
                ) from error
            yield from values
            row += part.num_rows


def _sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _columns(names: list[Any], fields: Sequence[str] | None, where: str) -> list[Any] | None:
    """Return the columns to read, None for all: a message names them when one is missing."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{where}: two columns are named '{twice[0]}'")
    if fields is None or not set(fields) <= set(names):
        return None
    return list(dict.fromkeys(fields))


def columns_of(
    source: Any, fields: Sequence[str] | None
) -> Iterator[Mapping[str, Any]] | Iterable[Mapping[str, Any]] | None:
    """Return the rows of a data frame, Arrow table or dataset; None if `source` is none of them.

    Parameters
    ----------
    source : object
        A pandas or polars ``DataFrame``, a ``pyarrow.Table``, or a ``datasets.Dataset``.
    fields : sequence of str, optional
        The fields that will be asked for.

    Raises
    ------
    DataError
        If it has two columns of one name, or is several datasets.
    """

    def has(*names: str) -> bool:
        return all(hasattr(source, name) for name in names)

    if isinstance(source, type):
        return None
    if isinstance(source, Mapping):
        if source and all(hasattr(part, "features") for part in source.values()):
            splits = [str(name) for name in source]
            raise DataError(
                f"expected one split of a {type(source).__name__}, as in data['{splits[0]}'] "
                f"(it has: {', '.join(splits)})"
            )
        return None
    if has("itertuples", "columns", "iloc"):
        return _pandas(source, fields)
    if has("iter_rows", "columns", "select"):
        columns = _columns(list(source.columns), fields, "the data")
        frame = source if columns is None else source.select(columns)
        return frame.iter_rows(named=True)
    if has("to_batches", "schema", "column_names"):
        columns = _columns(list(source.column_names), fields, "the data")
        return _batches(source.to_batches(), columns, "the data")
    if has("with_format", "features", "column_names"):
        columns = _columns(list(source.column_names or ()), fields, "the data")
        data = source.with_format(None)  # plain values, whatever it makes for its owner
        return data if columns is None else data.select_columns(columns)
    return None


def _pandas(frame: Any, fields: Sequence[str] | None) -> Iterator[Mapping[Any, Any]]:
    names = list(frame.columns)
    picked = _columns(names, fields, "the data") or names
    for cells in zip(*(_cells(frame[name]) for name in picked), strict=True):
        yield dict(zip(picked, cells, strict=True))


def _cells(column: Any) -> Iterator[Any]:
    """Yield the cells of a column, None where it has nothing: pandas has NaN, NA and NaT there."""
    for cell, missing in zip(column, column.isna(), strict=True):
        yield None if missing else cell
