"""Arrays that stay: weights, their gradients, an optimizer's moments.

A step walks through all of them once, and a processor's table of pages holds few entries: with
pages of 2 MiB it holds a model, with those of 4 KiB it is filled again and again. Linux gives the
large ones, where NumPy asks it to, to arrays of some MiB; smaller ones lie side by side in one.
"""

from __future__ import annotations

import math
import os
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Bytes of what is shared, of a page, and of the arrays that share. Smaller ones are not worth it,
#: and would keep all of a block for very little; for larger ones NumPy asks itself.
_BLOCK, _PAGE = 16 << 20, 2 << 20
_LEAST, _MOST = 64 << 10, 4 << 20
_LINE = 64

_lock = threading.Lock()
_block = np.empty(0, np.uint8)


def _after_fork() -> None:
    """Let a child go on where the lock was held by a thread that it does not have."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def lasting(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return zeros, beside others of about the same time; memory is used when it is written to.

    Parameters
    ----------
    shape : tuple of int
    dtype : dtype

    Returns
    -------
    ndarray
        C-contiguous. What it shares a block of 16 MiB with is given back together with it.
    """
    global _block
    dtype = np.dtype(dtype)
    count = math.prod(shape) * dtype.itemsize
    if not _LEAST <= count < _MOST:
        return np.zeros(shape, dtype)
    with _lock:
        if _block.size < count:
            fresh = np.zeros(_BLOCK + _PAGE, np.uint8)  # never written to: no page of it is there
            start = -fresh.ctypes.data % _PAGE
            _block = fresh[start : start + _BLOCK]
        part, _block = _block[:count], _block[-(-count // _LINE) * _LINE :]
    return part.view(dtype).reshape(shape)


def lasting_copy(array: NDArray[Any]) -> NDArray[Any]:
    """Return a C-contiguous copy of `array` that stays; see :func:`lasting`."""
    copy = lasting(array.shape, array.dtype)
    copy[...] = array
    return copy
