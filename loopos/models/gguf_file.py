"""Read ``.gguf`` files: metadata, then quantised tensors, dequantised one at a time.

The header is parsed and checked here, so that a damaged or hostile file costs no more time or
memory than its size warrants; the numbers are dequantised by the `gguf` library. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from loopos.errors import InputError, MissingFileError, ModelFormatError, nearest
from loopos.files import GGUF_MAGIC
from loopos.hub import nearest_path

__all__ = ["GgufFile"]

Array = np.ndarray[Any, Any]

_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
#: Scalars of the metadata by their number in the file.
_SCALARS: dict[int, np.dtype[Any]] = {
    number: np.dtype(code)
    for number, code in {
        0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1",
        10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
_BOOL = 7  # of one byte
#: The least that an entry takes: a key and a value; a name, its dimensions, type and offset.
_LEAST_VALUE, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
#: Elements dequantised at a time: working memory stays small beside the tensor.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Kind:
    """A type of tensor: `bytes_each` bytes hold `block` elements of a row."""

    name: str
    block: int
    bytes_each: int


_KINDS = {
    0: _Kind("F32", 1, 4),
    1: _Kind("F16", 1, 2),
    2: _Kind("Q4_0", 32, 18),
    3: _Kind("Q4_1", 32, 20),
    6: _Kind("Q5_0", 32, 22),
    7: _Kind("Q5_1", 32, 24),
    8: _Kind("Q8_0", 32, 34),
    10: _Kind("Q2_K", 256, 84),
    11: _Kind("Q3_K", 256, 110),
    12: _Kind("Q4_K", 256, 144),
    13: _Kind("Q5_K", 256, 176),
    14: _Kind("Q6_K", 256, 210),
    30: _Kind("BF16", 1, 2),
}
#: Of those that are not read, to name them.
_OTHER_KINDS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies; its shape is NumPy's, the last dimension contiguous."""

    kind: int
    shape: tuple[int, ...]
    offset: int


class GgufFile:
    """One ``.gguf`` file, its header read and checked.

    Parameters
    ----------
    path : path
        The file.

    Attributes
    ----------
    metadata : dict
        Values by key: numbers, booleans and strings as Python's, arrays of numbers as NumPy's,
        arrays of strings as lists. A float32 reads as the shortest decimal that gives it.
    names : list of str
        Of the tensors, as they stand in the header.

    Raises
    ------
    MissingFileError
        If there is no such file.
    ModelFormatError
        If it is truncated or its header does not describe it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise MissingFileError(f"{self.path}: no such file{nearest_path(self.path)}")
        try:
            self._size = self.path.stat().st_size
            with open(self.path, "rb") as stream:
                self._read_header(_Cursor(self.path, stream, self._size))
        except OSError as error:
            if isinstance(error, InputError):
                raise
            raise self._fault(f"cannot be read ({error.strerror or error})") from error
        self.names = list(self._entries)

    def _fault(self, text: str) -> ModelFormatError:
        return ModelFormatError(f"{self.path}: {text}")

    # -- the header ------------------------------------------------------------------------------

    def _read_header(self, cursor: _Cursor) -> None:
        if self._size < 4 or cursor.take(4, "the magic") != GGUF_MAGIC:
            raise self._fault("not a GGUF file (it does not begin with 'GGUF')")
        version = cursor.number("<u4", "the version")
        if version not in _VERSIONS:
            swapped = int(version).to_bytes(4, "little")[::-1]
            if int.from_bytes(swapped, "little") in _VERSIONS:
                raise self._fault("a big-endian GGUF file, expected a little-endian one")
            raise self._fault(f"GGUF version {version}, expected one of 2, 3")
        tensors = cursor.count("<u8", _LEAST_TENSOR, "tensors")
        values = cursor.count("<u8", _LEAST_VALUE, "metadata values")
        self.metadata: dict[str, Any] = {}
        for index in range(values):
            key = cursor.name(f"key {index} of the metadata")
            if key in self.metadata:
                raise self._fault(f"key '{key}' stands twice")
            self.metadata[key] = cursor.value(cursor.number("<u4", f"key '{key}'"), key)
        self._entries: dict[str, _Entry] = {}
        for index in range(tensors):
            name = cursor.name(f"the name of tensor {index}")
            if name in self._entries:
                raise self._fault(f"tensor '{name}' stands twice")
            self._entries[name] = self._read_entry(cursor, name)
        self._place(cursor.position)

    def _read_entry(self, cursor: _Cursor, name: str) -> _Entry:
        what = f"the entry of tensor '{name}'"
        dimensions = cursor.number("<u4", what)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._fault(f"tensor '{name}' has {dimensions} dimensions, expected 1 to 4")
        shape = tuple(cursor.number("<u8", what) for _ in range(dimensions))[::-1]
        kind, offset = cursor.number("<u4", what), cursor.number("<u8", what)
        if 0 in shape:
            raise self._fault(f"tensor '{name}' has shape {list(shape)}, so nothing in it")
        if kind in _KINDS and shape[-1] % _KINDS[kind].block:
            raise self._fault(
                f"tensor '{name}' has rows of {shape[-1]} elements, expected a multiple of "
                f"{_KINDS[kind].block} for type {_KINDS[kind].name}"
            )
        return _Entry(kind, shape, offset)

    def _place(self, end: int) -> None:
        """Check that every tensor lies within the file, aligned, and on no other one."""
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        sound = isinstance(alignment, int) and not isinstance(alignment, bool)
        if not sound or alignment < 1 or alignment & (alignment - 1):
            raise self._fault(f"key 'general.alignment' is {alignment!r}, expected a power of two")
        self._start = -(-end // alignment) * alignment
        spans = []
        for name, entry in self._entries.items():
            begin = self._start + entry.offset
            size = self._bytes(entry) if entry.kind in _KINDS else 0
            if entry.offset % alignment:
                raise self._fault(f"tensor '{name}' begins at byte {begin}, which is not aligned")
            if begin + size > self._size:
                raise self._fault(
                    f"cut off: tensor '{name}' ends at byte {begin + size} of a file of "
                    f"{self._size} bytes"
                )
            spans.append((begin, begin + size, name))
        for (_, last, first), (begin, _, second) in itertools.pairwise(sorted(spans)):
            if begin < last:
                raise self._fault(f"tensors '{first}' and '{second}' overlap")

    @staticmethod
    def _bytes(entry: _Entry) -> int:
        kind = _KINDS[entry.kind]
        return math.prod(entry.shape) // kind.block * kind.bytes_each

    # -- metadata and tensors --------------------------------------------------------------------

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a value of the metadata, or `default` if it is absent.

        Parameters
        ----------
        key : str
        kind : type
            int, float (whole numbers too), bool, str, list (of strings) or numpy.ndarray.
        default : object

        Raises
        ------
        ModelFormatError
            If it is of another kind.
        """
        value = self.metadata.get(key, default)
        if value is default:
            return default
        sound = isinstance(value, (int, float) if kind is float else kind)
        if not sound or (isinstance(value, bool) and kind is not bool):
            raise self._fault(
                f"key '{key}' is {_shown(value)}, expected {_KIND_WORDS.get(kind, kind.__name__)}"
            )
        return value

    def require(self, key: str, kind: type) -> Any:
        """Return a value of the metadata; see :meth:`get` (raises ModelFormatError if absent)."""
        value = self.get(key, kind)
        if value is None:
            raise self._fault(f"key '{key}' is missing{nearest(key, self.metadata)}")
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the file, the contiguous dimension last."""
        return self._entries[name].shape

    def read(self, name: str, dtype: Any) -> Array:
        """Return one tensor, dequantised, as an array of its own.

        Parameters
        ----------
        name : str
            One of `names`.
        dtype : dtype
            float32 or float64.

        Raises
        ------
        InputError
            If the `gguf` library is not installed.
        ModelFormatError
            If the tensor is missing, or of a type that loopos does not read.
        """
        if name not in self._entries:
            raise self._fault(f"tensor '{name}' is missing{nearest(name, self.names)}")
        entry = self._entries[name]
        if entry.kind not in _KINDS:
            other = _OTHER_KINDS.get(entry.kind, f"number {entry.kind}")
            known = ", ".join(known.name for known in _KINDS.values())
            raise self._fault(f"tensor '{name}' is of type {other}, expected one of {known}")
        dequantize = _dequantizer(self.path, entry.kind)
        kind, width = _KINDS[entry.kind], entry.shape[-1]
        row_bytes = width // kind.block * kind.bytes_each
        rows = math.prod(entry.shape[:-1])
        out = np.empty((rows, width), dtype)
        step = max(1, _CHUNK // width)
        with open(self.path, "rb") as stream:
            stream.seek(self._start + entry.offset)
            for first in range(0, rows, step):
                part = out[first : first + step]
                raw = np.fromfile(stream, np.uint8, len(part) * row_bytes)
                if raw.size != len(part) * row_bytes:
                    raise self._fault(f"cut off within tensor '{name}'")
                with np.errstate(all="ignore"):  # what is not finite is for the caller to refuse
                    part[...] = dequantize(raw.reshape(len(part), row_bytes))
        return out.reshape(entry.shape)


_KIND_WORDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "an array of strings",
    np.ndarray: "an array of numbers",
}


def _shown(value: Any) -> str:
    if isinstance(value, (list, np.ndarray)):
        return f"an array of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _dequantizer(path: Path, kind: int) -> Any:
    """Return a function from rows of bytes to rows of float32."""
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise InputError(
            f"{path}: reading the weights of a GGUF file needs the gguf library; "
            "install it with: pip install 'loopos[gguf]'"
        ) from error
    return lambda rows: dequantize(rows, GGMLQuantizationType(kind))


class _Cursor:
    """Reads forward through the header; nothing is taken that the file does not have."""

    def __init__(self, path: Path, stream: BinaryIO, size: int):
        self._path, self._stream, self._size = path, stream, size
        self.position = 0

    def _fault(self, text: str) -> ModelFormatError:
        return ModelFormatError(f"{self._path}: {text}")

    def take(self, size: int, what: str) -> bytes:
        """Return the next bytes."""
        data = self._stream.read(size) if size <= self._size - self.position else b""
        if len(data) != size:
            raise self._fault(f"cut off or damaged at byte {self.position}, within {what}")
        self.position += size
        return data

    def number(self, code: str, what: str) -> int:
        """Return the next integer."""
        size = int(code[-1])
        return int.from_bytes(self.take(size, what), "little")

    def count(self, code: str, least: int, what: str) -> int:
        """Return the next integer, a number of things that take `least` bytes at least."""
        count = self.number(code, f"the number of {what}")
        if count * least > self._size - self.position:
            raise self._fault(f"says it holds {count} {what}, more than a file of its size can")
        return count

    def string(self, what: str) -> str:
        """Return the next string."""
        raw = self.take(self.number("<u8", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._fault(f"{what} is not UTF-8 text") from error

    def name(self, what: str) -> str:
        """Return the next string, which is to be a name: it is shown in messages."""
        text = self.string(what)
        if not text.isprintable():
            raise self._fault(f"{what} is {text[:80]!r}, expected printable characters")
        return text

    def value(self, kind: int, key: str) -> Any:
        """Return the next value of the metadata."""
        what = f"key '{key}'"
        if kind == _STRING:
            return self.string(what)
        if kind in _SCALARS:
            found = self._numbers(kind, 1, what)[0]
            # The shortest decimal: 1e-05, where float() would give 9.999999747378752e-06.
            return float(str(found)) if found.dtype == np.float32 else found.item()
        if kind != _ARRAY:
            raise self._fault(f"{what} has a value of the unknown type {kind}")
        kind = self.number("<u4", what)
        if kind == _STRING:
            count = self.count("<u8", 8, f"strings in {what}")
            return [self.string(what) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._fault(f"{what} is an array of the type {kind}, expected numbers or strings")
        count = self.count("<u8", _SCALARS[kind].itemsize, f"numbers in {what}")
        return self._numbers(kind, count, what)

    def _numbers(self, kind: int, count: int, what: str) -> Array:
        dtype = _SCALARS[kind]
        found = np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        if kind != _BOOL:
            return found
        if (found > 1).any():
            raise self._fault(f"{what} is {found.max()}, expected the boolean 0 or 1")
        return found.astype(bool)
