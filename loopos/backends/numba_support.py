"""What the numba backend does to arrays before they go into compiled code."""

from __future__ import annotations

from typing import Any

import numpy as np

from loopos.backends.numpy_attention import check_window

Array = np.ndarray[Any, Any]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


class _Memory:
    """The memory of an array, offered as writable."""

    def __init__(self, array: Array) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self.array = array  # stays alive as long as what is made from this


def as_input(x: Array) -> Array:
    """Return `x` C-contiguous and of the one type that kernels are compiled for.

    To numba a read-only array is another type, so each kernel would be compiled again for every
    combination of them; kernels never write into their inputs, so they may see them as writable.
    """
    x = np.ascontiguousarray(x)
    return x if x.flags.writeable else np.asarray(_Memory(x))


def int64(x: Array) -> Array:
    """Return integers as a writable contiguous int64 array."""
    return as_input(np.asarray(x, dtype=np.int64))


def one_of(*arrays: Array | None) -> bool:
    """Whether all arrays are float32, or all float64: what kernels are compiled for.

    What is no NumPy array, but a list or the array of another library, is a TypeError.
    """
    for a in arrays:
        if a is not None and not isinstance(a, np.ndarray):
            raise TypeError(f"expected a NumPy array, found {type(a).__name__}")
    kinds = {a.dtype for a in arrays if a is not None}
    return len(kinds) == 1 and kinds.pop() in _FLOATS


def expect(shape: tuple[int, ...], **arrays: Array | None) -> None:
    """Raise ValueError for an array of another shape: compiled code checks no index."""
    for name, array in arrays.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, found {list(array.shape)}")


def check_heads(q: Array, k: Array, v: Array) -> None:
    """Raise ValueError unless ``q[N, H, D]`` fits to keys and values of heads that divide H."""
    if q.ndim != 3 or k.ndim < 3:
        raise ValueError(f"q: expected shape [any, any, any], found {list(q.shape)}")
    if k.shape[-2] < 1 or q.shape[1] % k.shape[-2]:
        raise ValueError(f"k: {k.shape[-2]} heads do not divide the {q.shape[1]} heads of q")
    expect((*k.shape[:-1], q.shape[2]), k=k)
    expect(k.shape, v=v)


def check_offsets(offsets: Array, rows: int) -> None:
    """Raise ValueError unless offsets rise from 0 to `rows`."""
    if not offsets.size or offsets[0] != 0 or offsets[-1] != rows or (np.diff(offsets) < 0).any():
        raise ValueError(f"offsets: expected to rise from 0 to {rows}, found {offsets}")


def dropout_bits(rate: float, key: int, dtype: Any) -> tuple[Any, Any, Any]:
    """Return what a kernel needs: the key, the threshold of the bits, the factor of what stays."""
    threshold = np.uint64(round(rate * 2**32))
    return np.uint64(key), threshold, np.dtype(dtype).type(1.0 / (1.0 - rate))


def reach(window: int | None) -> int:
    """Return the window of an attention as a number: larger than any sequence where there is none.

    It is added to positions, so it is far from the largest integer too.
    """
    check_window(window)
    return 1 << 40 if window is None else min(int(window), 1 << 40)


def groups_of_rows(ids: Array) -> tuple[Array, Array]:
    """Return rows sorted by id (stable), and where each id begins among them, and the end."""
    order = np.argsort(ids, kind="stable")
    ranked = ids[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1], [True]]))
    return order, starts


def attention_items(
    rows: Array, counts: Array, key_rows: Array, lengths: Array, samples: Array, heads: int,
    block: int,
) -> Array:  # fmt: skip
    """Return the pieces of an attention, int64 ``[items, 7]``.

    Per sequence: where its queries begin, how many, where its keys begin, how many, and its sample.
    A piece is (row of the first query, queries, head, row of the first key, keys, position of the
    first query, sample), with at most `block` queries; 0 does not cut.
    """
    rows, counts, key_rows, lengths, samples = (
        int64(a) for a in (rows, counts, key_rows, lengths, samples)
    )
    size = np.full_like(counts, block) if block else np.maximum(counts, 1)
    blocks = -(-counts // size)
    sequence = np.repeat(np.arange(counts.size), blocks)
    first = np.arange(sequence.size) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    first *= size[sequence]
    items = np.empty((heads, sequence.size, 7), dtype=np.int64)
    items[..., 0] = rows[sequence] + first
    items[..., 1] = np.minimum(size[sequence], counts[sequence] - first)
    items[..., 2] = np.arange(heads)[:, None]
    items[..., 3] = key_rows[sequence]
    items[..., 4] = lengths[sequence]
    items[..., 5] = (lengths - counts)[sequence] + first
    items[..., 6] = samples[sequence]
    return items.reshape(-1, 7)
