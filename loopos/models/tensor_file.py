"""Read and write ``.safetensors`` files: a JSON header, then raw little-endian arrays.

Our own reader, because the one for NumPy fails on bfloat16 and does not say which tensor is at
fault. Arrays are read one at a time, straight into the dtype that was asked for. Format:
https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loopos.autograd import Array
from loopos.errors import InputError, MissingFileError, ModelFormatError, nearest
from loopos.files import atomic_file

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # the upper half of a float32
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_FLOATS = ("F64", "F32", "F16", "BF16")
_NAMES: dict[np.dtype[Any], str] = {np.dtype(np.float64): "F64", np.dtype(np.float32): "F32"}


class TensorFile:
    """One ``.safetensors`` file, its header read and checked.

    Parameters
    ----------
    path : path
        The file.

    Attributes
    ----------
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
        try:
            if not self.path.is_file():
                raise MissingFileError(f"{self.path}: no such file")
            self._size = self.path.stat().st_size
            with open(self.path, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if self._size < 8 or length > self._size - 8:
                    raise self._fault("not a safetensors file, or cut off within its header")
                header = json.loads(stream.read(length))
        except InputError:  # which is a ValueError too, and says already what is wrong
            raise
        except (ValueError, RecursionError) as error:  # too deep, or with too many digits, too
            raise self._fault("not a safetensors file (its header is not JSON)") from error
        except OSError as error:
            raise self._fault(f"cannot be read ({error.strerror or error})") from error
        if not isinstance(header, dict):
            raise self._fault("not a safetensors file (its header is not a JSON object)")
        header.pop("__metadata__", None)
        self._start = 8 + length
        self._entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for name, entry in header.items():
            if not name.isprintable():
                raise self._fault(f"the tensor name {name[:80]!r} has unprintable characters")
            self._entries[name] = self._checked(name, entry)
        self.names = list(self._entries)

    def _fault(self, text: str) -> ModelFormatError:
        return ModelFormatError(f"{self.path}: {text}")

    def _checked(self, name: str, entry: Any) -> tuple[str, tuple[int, ...], int]:
        """Return dtype, shape and offset in the file of a header entry."""
        try:
            kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = isinstance(kind, str) and all(
                isinstance(n, int) and n >= 0 for n in (*shape, begin, end)
            )
        except (TypeError, KeyError, ValueError) as error:
            raise self._fault(f"the header entry of tensor '{name}' is damaged") from error
        if not sound:
            raise self._fault(f"the header entry of tensor '{name}' is damaged")
        if kind in _DTYPES and end - begin != math.prod(shape) * _DTYPES[kind].itemsize:
            raise self._fault(f"tensor '{name}' has {end - begin} bytes for shape {list(shape)}")
        if self._start + end > self._size:
            raise self._fault(
                f"cut off: tensor '{name}' ends at byte {self._start + end} of a file of "
                f"{self._size} bytes"
            )
        return kind, shape, self._start + begin

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the file."""
        return self._entries[name][1]

    def read(self, name: str, dtype: Any) -> Array:
        """Return one tensor as an array of its own.

        Parameters
        ----------
        name : str
            One of `names`.
        dtype : dtype
            float32 or float64, to which F64, F32, F16 and BF16 are converted.

        Raises
        ------
        ModelFormatError
            If the tensor is missing, or not one of floating point.
        """
        if name not in self._entries:
            raise self._fault(f"tensor '{name}' is missing{nearest(name, self.names)}")
        kind, shape, offset = self._entries[name]
        if kind not in _FLOATS:
            raise self._fault(f"tensor '{name}' is {kind}, expected one of {', '.join(_FLOATS)}")
        count = math.prod(shape)
        with open(self.path, "rb") as stream:
            raw = np.fromfile(stream, dtype=_DTYPES[kind], count=count, offset=offset)
        if raw.size != count:
            raise self._fault(f"cut off within tensor '{name}'")
        if kind == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # an F64 too large for float32 becomes inf, refused above
            return raw.reshape(shape).astype(dtype, copy=False)

    def refuse_others(self, names: Iterable[str]) -> None:
        """Raise ModelFormatError if the file holds a tensor that is not one of `names`."""
        known = set(names)
        for name in self.names:
            if name not in known:
                raise self._fault(f"unexpected tensor '{name}'{nearest(name, known)}")


class HoldsTensors(Protocol):
    """A file of named tensors, such as :class:`TensorFile`."""

    path: Path
    names: list[str]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""

    def read(self, name: str, dtype: Any) -> Array:
        """Return a tensor."""


def read_finite(file: HoldsTensors, name: str, shape: tuple[int, ...] | None, dtype: Any) -> Array:
    """Return a tensor of a file, of a given shape (any if None) and finite.

    Raises
    ------
    ModelFormatError
        If it is missing, of another shape, cut off or holds NaN or infinity.
    """
    if shape is not None and name in file.names and file.shape(name) != shape:
        found = list(file.shape(name))
        raise ModelFormatError(
            f"{file.path}: tensor '{name}' has shape {found}, expected {list(shape)}"
        )
    array = file.read(name, dtype)
    finite = np.isfinite(array)
    if not finite.all():
        where = [int(index) for index in np.argwhere(~finite)[0]]
        raise ModelFormatError(
            f"{file.path}: tensor '{name}' is {array[tuple(where)]} at {where}"
            f" (as {np.dtype(dtype)})"
        )
    return array


def write_tensors(path: str | Path, tensors: Mapping[str, Array]) -> None:
    """Write float32 and float64 arrays as one ``.safetensors`` file, through a rename.

    Parameters
    ----------
    path : path
        The file; its directory is made if need be.
    tensors : mapping of str to ndarray
        By name, written in this order.

    Raises
    ------
    OutputError
        If it cannot be written; what stood there before is intact.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses others
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        entry = {"dtype": _NAMES[array.dtype], "shape": list(array.shape)}
        header[name] = entry | {"data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that every array is aligned
    with atomic_file(path) as temporary, open(temporary, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            stream.write(np.ascontiguousarray(little).data)
