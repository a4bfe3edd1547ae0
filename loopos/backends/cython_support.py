"""What the Cython backend does to arrays that are neither float32 nor int32."""

from __future__ import annotations

from typing import Any

import numpy as np

from loopos.backends.numpy_backend import Array


def converted(array: Array, name: str, dtype: Any) -> Array:
    """Return a NumPy array as a contiguous one of this dtype; anything else is a TypeError."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name}: expected a NumPy array, found {type(array).__name__}")
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected an array of {np.dtype(dtype)}, found {array.dtype}")
    return np.ascontiguousarray(array, dtype=dtype)
