"""Texts, places and token ids of data sets of any size: in memory, or in an unnamed file.

A store is written once, through its builder, and then only read, also by several threads at once.
What it holds stays in memory up to a limit; beyond it goes to a temporary file that has no name,
so that nothing of it outlives the process, however that ends.
"""

from __future__ import annotations

import array
import hashlib
import mmap
import operator
import re
import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, Self, TypeVar, overload

import numpy as np

from loopos.errors import DataError, OutputError

__all__ = [
    "Places",
    "PlacesBuilder",
    "TextStore",
    "TextStoreBuilder",
    "TokenStore",
    "TokenStoreBuilder",
    "first_of_each",
    "taken",
]

Array = np.ndarray[Any, Any]
T = TypeVar("T")

#: Bytes that one store holds in memory before it goes to a file.
MEMORY_LIMIT = 64 << 20
#: Of a walk over a file, what stays in this process's memory at the most.
_WALK = 8 << 20
#: What the system may read around a place that a walk jumps to.
_JUMP = 64 << 10
_WRITE_BUFFER = 1 << 20
#: Something that is no white space, in the bytes of a text.
_FILLED = re.compile(rb"[^\s]")


class _Bytes:
    """Bytes that are appended and, once all are there, read."""

    def __init__(self, limit: int | None):
        self._limit = MEMORY_LIMIT if limit is None else limit
        self._memory = bytearray()
        self._file: IO[bytes] | None = None
        self.size = 0

    def append(self, data: bytes) -> None:
        """Write at the end (raises OutputError when the temporary file cannot be written)."""
        try:
            if self._file is None and self.size + len(data) > self._limit:
                # Open until sealed() has mapped it.
                self._file = tempfile.TemporaryFile(  # noqa: SIM115
                    buffering=_WRITE_BUFFER, prefix="loopos-"
                )
                self._file.write(self._memory)
                self._memory = bytearray()
            if self._file is None:
                self._memory += data
            else:
                self._file.write(data)
        except OSError as error:
            raise _no_room(error) from error
        self.size += len(data)

    def sealed(self) -> bytearray | mmap.mmap:
        """Return all bytes, for reading."""
        if self._file is None:
            return self._memory
        try:
            with self._file as file:  # the map keeps what it needs open
                file.flush()
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise _no_room(error) from error


def _no_room(error: OSError) -> OutputError:
    try:
        place = tempfile.gettempdir()
    except FileNotFoundError:  # what the error itself says
        place = "temporary files"
    return OutputError(
        f"{place}: data that memory is too small for cannot be written there "
        f"({error.strerror or error}); the environment variable TMPDIR names another directory"
    )


class _View(Sequence[T]):
    """A read-only sequence over a store, of all its entries or of those at some indices."""

    def __init__(self, stored: int, index: Array | None):
        self._stored, self._index = stored, index

    def __len__(self) -> int:
        return self._stored if self._index is None else int(self._index.size)

    @overload
    def __getitem__(self, key: int) -> T: ...
    @overload
    def __getitem__(self, key: slice) -> Self: ...
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return self.take(range(*key.indices(len(self))))
        place = operator.index(key)
        place += len(self) if place < 0 else 0
        if not 0 <= place < len(self):
            raise IndexError(f"entry {key} of {len(self)}")
        return self._entry(place if self._index is None else int(self._index[place]))

    def __iter__(self) -> Iterator[T]:
        for place in self._places():
            yield self._entry(place)

    def _places(self) -> Iterable[int]:
        return range(self._stored) if self._index is None else map(int, self._index)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (list, _View)):
            return NotImplemented
        return len(self) == len(other) and all(map(self._same, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Sequence[T]) -> list[T]:
        return [*self, *other]

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3])) + (", ..." if len(self) > 3 else "")
        return f"<{type(self).__name__} of {len(self)}: [{shown}]>"

    def take(self, indices: Sequence[int] | Array) -> Self:
        """Return the entries at `indices`, a view (raises IndexError)."""
        asked = np.asarray(indices, dtype=np.int64)
        found = np.where(asked < 0, asked + len(self), asked)
        if found.size and not (found.min() >= 0 and found.max() < len(self)):
            raise IndexError(f"an index is outside the {len(self)} entries")
        return self._with(found if self._index is None else self._index[found])

    @staticmethod
    def _same(one: Any, other: Any) -> bool:
        return bool(one == other)

    @abstractmethod
    def _entry(self, place: int) -> T:
        """Return the entry at a place of the store."""

    @abstractmethod
    def _with(self, index: Array) -> Self:
        """Return a view of the entries at some places of the store."""


class _Stored(_View[T]):
    """A view of entries that stand one after the other in bytes; offsets count `_width` of them."""

    _width = 1

    def __init__(self, data: bytearray | mmap.mmap, offsets: Array, index: Array | None):
        super().__init__(offsets.size - 1, index)
        self._data, self._offsets = data, offsets

    def __iter__(self) -> Iterator[T]:
        if not (isinstance(self._data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED")):
            yield from super().__iter__()
            return
        touched, after = 0, 0
        for place in self._places():
            yield self._entry(place)
            touched += self._size(place) + _JUMP * (place != after)
            after = place + 1
            if touched > _WALK:
                # The pages stay in the system's cache; views of them are read from there again.
                self._data.madvise(mmap.MADV_DONTNEED)
                touched = 0

    def _size(self, place: int) -> int:
        """Return the bytes of an entry."""
        return int(self._offsets[place + 1] - self._offsets[place]) * self._width


def taken(sequence: Sequence[str], indices: Sequence[int] | Array) -> Sequence[str]:
    """Return the entries at `indices`: a view of a store, a list of anything else."""
    if isinstance(sequence, _View):
        return sequence.take(indices)
    return [sequence[i] for i in indices]


# -- texts ---------------------------------------------------------------------------------------


class TextStore(_Stored[str]):
    """A sequence of texts; equal to a list of the same texts.

    Attributes
    ----------
    memo : dict
        What callers made of these very texts and want to find again.
    """

    def __init__(self, data: bytearray | mmap.mmap, offsets: Array, index: Array | None = None):
        super().__init__(data, offsets, index)
        self.memo: dict[Any, Any] = {}

    @classmethod
    def of(cls, texts: Iterable[str], memory_limit: int | None = None) -> TextStore:
        """Store `texts`."""
        builder = TextStoreBuilder(memory_limit)
        for text in texts:
            builder.append(text)
        return builder.finish()

    def without_ends(self, fraction: float) -> tuple[Self, Self] | None:
        """Cut off the end of each text, about `fraction` of its bytes; views of the same bytes.

        The cut is at the end of a line where there is one near enough, so that neither side differs
        by more than half from what it should be; else between two characters.

        Returns
        -------
        texts, ends
            One of each for every text; put together, byte for byte what they were. None where
            one of them would be empty, or white space alone.
        """
        places = list(self._places())
        offsets = np.zeros(2 * (self._offsets.size - 1) + 1, dtype=np.int64)
        offsets[::2], offsets[1::2] = self._offsets, self._offsets[1:]
        for place in dict.fromkeys(places):
            begin, end = self._offsets[place : place + 2].tolist()
            cut = offsets[2 * place + 1] = _cut(self._data, begin, end, fraction)
            if not all(_FILLED.search(self._data, *side) for side in ((begin, cut), (cut, end))):
                return None
        whole, index = type(self)(self._data, offsets), 2 * np.array(places, dtype=np.int64)
        return whole.take(index), whole.take(index + 1)

    @property
    def size_bytes(self) -> int:
        """Bytes of all texts together."""
        places = np.fromiter(self._places(), dtype=np.int64)
        return int((self._offsets[places + 1] - self._offsets[places]).sum())

    def _entry(self, place: int) -> str:
        begin, end = self._offsets[place : place + 2].tolist()
        return self._data[begin:end].decode("utf-8", "surrogatepass")

    def _with(self, index: Array) -> Self:
        return type(self)(self._data, self._offsets, index)


def _cut(data: bytearray | mmap.mmap, begin: int, end: int, fraction: float) -> int:
    """Return where to cut off the last `fraction` of a text, as `TextStore.without_ends` says."""
    size = end - begin
    wanted = end - int(fraction * size + 0.5)
    far = int(min(fraction, 1 - fraction) * size / 2)
    before = data.rfind(b"\n", max(begin, wanted - far - 1), wanted) + 1
    after = data.find(b"\n", wanted, min(end, wanted + far)) + 1
    lines = [cut for cut in (before, after) if cut]
    if lines:
        return min(lines, key=lambda cut: abs(cut - wanted))
    while begin < wanted < end and data[wanted] & 0xC0 == 0x80:  # inside a character of UTF-8
        wanted -= 1
    return wanted


class TextStoreBuilder:
    """Takes the texts of a :class:`TextStore` one by one.

    Parameters
    ----------
    memory_limit : int, optional
        Bytes held in memory; more than that goes to a file. By default ``MEMORY_LIMIT``.
    """

    def __init__(self, memory_limit: int | None = None):
        self._bytes, self._offsets = _Bytes(memory_limit), array.array("q", [0])

    def append(self, text: str) -> None:
        """Add a text."""
        self._bytes.append(text.encode("utf-8", "surrogatepass"))
        self._offsets.append(self._bytes.size)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def finish(self) -> TextStore:
        """Return the texts; nothing can be added any more."""
        return TextStore(self._bytes.sealed(), _frozen(self._offsets, np.int64))


def _frozen(values: Any, dtype: Any) -> Array:
    """Return a buffer as an array that nobody writes to, without a copy."""
    found = np.frombuffer(values, dtype=dtype) if len(values) else np.zeros(0, dtype)
    found.flags.writeable = False
    return found


def first_of_each(*sets: Iterable[str]) -> Array:
    """Return for each text of all `sets`, one after the other, where it stands first.

    Texts are compared by digests of 16 bytes, so that none of them is held.

    Returns
    -------
    ndarray int64 [n]
        Index of the first equal text; its own where there is none before.
    """
    digests = bytearray()
    for texts in sets:
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")
            digests += hashlib.blake2b(data, digest_size=16).digest()
    halves = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: the first of equal ones leads
    ranked = halves[order]
    new = np.ones(order.size, dtype=bool)
    new[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    first = np.empty(order.size, dtype=np.int64)
    first[order] = order[new][np.cumsum(new) - 1]
    return first


# -- places --------------------------------------------------------------------------------------


class Places(_View[str]):
    """Where rows stand, as ``"t.jsonl:41"`` or ``"row 41"``; made into text when asked for."""

    def __init__(
        self, files: list[str | None], file_of: Array, numbers: Array, index: Array | None = None
    ):
        super().__init__(numbers.size, index)
        self._files, self._file_of, self._numbers = files, file_of, numbers

    def _entry(self, place: int) -> str:
        return place_text(self._files[self._file_of[place]], int(self._numbers[place]))

    def _with(self, index: Array) -> Self:
        return type(self)(self._files, self._file_of, self._numbers, index)


def place_text(file: str | None, number: int) -> str:
    """Return where a row stands: file and line, or the number of the row."""
    return f"row {number}" if file is None else f"{file}:{number}"


class PlacesBuilder:
    """Takes the places of rows one by one."""

    def __init__(self) -> None:
        self._ids: dict[str | None, int] = {}
        self._file_of, self._numbers = array.array("i"), array.array("q")

    def append(self, file: str | None, number: int) -> None:
        """Add a place."""
        self._file_of.append(self._ids.setdefault(file, len(self._ids)))
        self._numbers.append(number)

    def finish(self) -> Places:
        """Return the places; nothing can be added any more."""
        file_of, numbers = _frozen(self._file_of, np.int32), _frozen(self._numbers, np.int64)
        return Places(list(self._ids), file_of, numbers)


# -- token ids -----------------------------------------------------------------------------------


class TokenStore(_Stored[Array]):
    """A sequence of token id arrays, int32 each, which are views that cannot be written to.

    Attributes
    ----------
    lengths : ndarray int64 [n]
        Ids of each.
    """

    _width = 4

    def __init__(self, data: bytearray | mmap.mmap, offsets: Array, index: Array | None = None):
        super().__init__(data, offsets, index)
        self._flat = _frozen(data, np.int32)
        self.lengths: Array = np.diff(offsets) if index is None else np.diff(offsets)[index]

    @staticmethod
    def _same(one: Any, other: Any) -> bool:
        return np.array_equal(one, other)

    def _entry(self, place: int) -> Array:
        return self._flat[self._offsets[place] : self._offsets[place + 1]]

    def _with(self, index: Array) -> Self:
        return type(self)(self._data, self._offsets, index)


class TokenStoreBuilder:
    """Takes the ids of one text after the other; parameters as :class:`TextStoreBuilder`."""

    def __init__(self, memory_limit: int | None = None):
        self._bytes, self._offsets = _Bytes(memory_limit), array.array("q", [0])

    def append(self, ids: Array | Sequence[int]) -> None:
        """Add the ids of a text (raises DataError for one that does not fit 32 bits)."""
        given = np.asarray(ids)
        found = given.astype(np.int32)
        if given.dtype != np.int32 and not np.array_equal(given, found):
            raise DataError(f"text {len(self)}: a token id does not fit 32 bits")
        self._bytes.append(found.tobytes())
        self._offsets.append(self._bytes.size // found.itemsize)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def finish(self) -> TokenStore:
        """Return the ids; nothing can be added any more."""
        return TokenStore(self._bytes.sealed(), _frozen(self._offsets, np.int64))
