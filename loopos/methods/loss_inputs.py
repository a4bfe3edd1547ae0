"""What the pure functions of :mod:`loopos.methods.losses` are given, checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from loopos.errors import InputError

__all__ = ["floats", "require_at_least", "segments"]

Array = np.ndarray[Any, Any]


def _numbers(name: str, given: Any) -> Array:
    """Return what was given as an array of numbers."""
    try:
        array = np.asarray(given)
    except ValueError as error:  # lists of different lengths inside
        raise InputError(f"{name}: expected an array of numbers") from error
    if array.dtype.kind not in "fiub":
        raise InputError(f"{name}: expected an array of numbers, found type {array.dtype}")
    return array


def floats(**given: Any) -> list[Array]:
    """Return arrays of floating-point numbers, of the one shape that all of them have.

    Whole numbers and truth values take the type of the others, float64 where there is none: as they
    are, a result of their type would be cut to whole numbers in silence.

    Parameters
    ----------
    **given
        By the names that messages say.

    Raises
    ------
    InputError
        If one holds no numbers, or has another shape: nothing is broadcast.
    """
    arrays = {name: _numbers(name, x) for name, x in given.items()}
    (first, shape), *others = ((name, array.shape) for name, array in arrays.items())
    for name, found in others:
        if found != shape:
            raise InputError(f"{name}: expected the shape {shape} of {first}, found {found}")
    real = [array.dtype for array in arrays.values() if array.dtype.kind == "f"]
    kind = np.result_type(*real) if real else np.dtype(np.float64)
    return [a if a.dtype.kind == "f" else a.astype(kind) for a in arrays.values()]


def segments(offsets: Any, count: int) -> Array:
    """Return where segments begin in an array of `count` values, and where the last one ends.

    Raises
    ------
    InputError
        If they do not go from 0 to `count`, in whole numbers that never fall.
    """
    array = _numbers("offsets", offsets)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise InputError(
            f"offsets: expected whole numbers [B + 1], found shape {array.shape} of {array.dtype}"
        )
    if array[0] != 0 or array[-1] != count or (array[1:] < array[:-1]).any():
        raise InputError(f"offsets: expected to rise from 0 to {count}, the number of values")
    return array


def require_at_least(name: str, given: Any, least: float) -> None:
    """Refuse numbers below a bound, and NaN."""
    array = np.asarray(given)
    if not (array >= least).all():
        raise InputError(f"{name}: expected at least {least:g}, found {array.min():g}")
