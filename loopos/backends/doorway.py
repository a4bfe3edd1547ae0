"""What stands between any ndarray and a kernel that takes C-contiguous float32."""

from __future__ import annotations

from typing import Any, overload

import numpy as np

Array = np.ndarray[Any, Any]


def single(*arrays: Array | None) -> bool:
    """Return whether the kernels take these: none is float64 (that is the oracle's).

    Raises
    ------
    TypeError
        If one is no NumPy array, but a list or the array of another library.
    """
    for array in arrays:
        if array is None:
            continue
        if not isinstance(array, np.ndarray):
            raise TypeError(f"expected a NumPy array, found {type(array).__name__}")
        if array.dtype == np.float64:
            return False
    return True


@overload
def contiguous(array: Array) -> Array: ...
@overload
def contiguous(array: None) -> None: ...
@overload
def contiguous(array: Array | None) -> Array | None: ...
def contiguous(array: Array | None) -> Array | None:
    """Return the array itself when its elements lie in C order and aligned, else a copy."""
    if array is None:
        return None
    single(array)
    if array.flags.c_contiguous and array.flags.aligned:
        return array
    return np.require(array, requirements=["C", "A"])


def integers(array: Array) -> Array:
    """Return ids, offsets or rows as contiguous int32.

    Raises
    ------
    TypeError
        If they are no integers.
    ValueError
        If one does not fit into 32 bits.
    """
    if array.dtype == np.int32 and array.flags.c_contiguous and array.flags.aligned:
        return array
    if array.dtype.kind not in "iu":
        raise TypeError(f"expected an array of integers, found {array.dtype}")
    limits = np.iinfo(np.int32)
    if array.size and not limits.min <= array.min() <= array.max() <= limits.max:
        raise ValueError("integers: some do not fit into int32")
    return np.require(array, np.int32, ["C", "A"])
