"""Arrays in memory that was used before: what a step makes finds the pages of the step before.

The C library hands an array of some hundred kilobytes back to the system when it dies; the next
one of its size then takes new pages, which the system has to clear, on one thread.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Buffer = NDArray[np.uint8]

#: Bytes from which arrays are kept: smaller ones the C library keeps itself.
_LEAST = 32 << 10
_LINE = 64
#: Sizes are rounded up to eighths of powers of two.
_STEPS = 8


class _Lent:
    """What an array and its views lie in; with the last of them it gives the memory back."""

    __slots__ = ("__array_interface__", "_buffer", "_owner")

    def __init__(self, owner: _Reused, buffer: _Buffer, shape: tuple[int, ...], kind: str) -> None:
        address = buffer.__array_interface__["data"][0]
        data = (address + -address % _LINE, False)
        self.__array_interface__ = {"version": 3, "shape": shape, "typestr": kind, "data": data}
        self._buffer, self._owner = buffer, owner

    def __del__(self) -> None:
        self._owner.give(self._buffer)


class _Reused:
    """Memory of arrays that are gone, by size; in all, twice what was in use at once at most."""

    def __init__(self) -> None:
        self._free: OrderedDict[int, list[_Buffer]] = OrderedDict()  # what waited longest first
        self._used = self._kept = self._most = 0
        self._after_fork()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        # Not a plain lock: the collector of garbage may end an array's life within `empty`.
        self._lock = threading.RLock()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return an uninitialised C-contiguous array, in cache lines of its own if it is large."""
        dtype = np.dtype(dtype)
        count = math.prod(shape) * dtype.itemsize
        if count < _LEAST:
            return np.empty(shape, dtype)
        step = 1 << max(0, count.bit_length() - _STEPS.bit_length())
        size = -(-count // step) * step + _LINE
        with self._lock:
            waiting = self._free.get(size)
            if waiting:
                buffer = waiting.pop()
                self._kept -= size
            else:
                self._most = max(self._most, self._used + size)
                self._keep_at_most(2 * self._most - self._used - size)
                buffer = np.empty(size, np.uint8)
            self._used += size
            self._most = max(self._most, self._used)
        return np.asarray(_Lent(self, buffer, shape, dtype.str))

    def give(self, buffer: _Buffer) -> None:
        """Keep the memory of an array that is gone."""
        with self._lock:
            self._used -= buffer.size
            self._kept += buffer.size
            self._free.setdefault(buffer.size, []).append(buffer)
            self._free.move_to_end(buffer.size)

    def _keep_at_most(self, count: int) -> None:
        while self._kept > count:
            size, waiting = next(iter(self._free.items()))
            if waiting:
                waiting.pop(0)
                self._kept -= size
            else:
                del self._free[size]


empty = _Reused().empty
