"""Attention in loops for numba: online softmax by blocks of queries and keys, never T x T.

Plain Python until compiled, like ``numba_kernels``. The products are sums of rows times numbers,
four rows at a time, which becomes SIMD code along the rows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy import uint64

from loopos.backends.numba_kernels import LANES, mix, row_max
from loopos.backends.numba_math import exp

Array = np.ndarray[Any, Any]

#: Queries and keys of a block: its scores are 16 KiB in float32.
QUERIES, KEYS = 32, 128

_GOLDEN = uint64(0x9E3779B97F4A7C15)
_S32, _ONE = uint64(32), uint64(1)


def rotate(x: Array, cos: Array, sin: Array, y: Array, sign: Any, lo: int, hi: int) -> None:
    """Rotate the pairs (x[i], x[i + half]) of the first channels of each head."""
    half = cos.shape[1]
    for n in range(lo, hi):
        c, s = cos[n], sin[n]
        for head in range(x.shape[1]):
            row, out = x[n, head], y[n, head]
            first, second = row[:half], row[half : 2 * half]
            out_first, out_second = out[:half], out[half : 2 * half]
            for i in range(half):
                out_first[i] = first[i] * c[i] - second[i] * s[i] * sign
                out_second[i] = second[i] * c[i] + first[i] * s[i] * sign
            for i in range(2 * half, row.size):
                out[i] = row[i]


def add_rows_times(
    out: Array, factors: Array, rows: Array, first: int, middle: int, count: int
) -> None:
    """``out += sum_r factors[r] rows[first + r, middle]`` for r below `count`."""
    whole = count - count % 4
    for r in range(0, whole, 4):
        a, b, c, d = factors[r], factors[r + 1], factors[r + 2], factors[r + 3]
        row_a, row_b = rows[first + r, middle], rows[first + r + 1, middle]
        row_c, row_d = rows[first + r + 2, middle], rows[first + r + 3, middle]
        for i in range(out.size):
            out[i] += a * row_a[i] + b * row_b[i] + c * row_c[i] + d * row_d[i]
    for r in range(whole, count):
        a, row_a = factors[r], rows[first + r, middle]
        for i in range(out.size):
            out[i] += a * row_a[i]


def transpose(x: Array, first: int, middle: int, count: int, into: Array) -> None:
    """``into[d, 0, r] = x[first + r, middle, d]``."""
    for r in range(count):
        row = x[first + r, middle]
        for d in range(row.size):
            into[d, 0, r] = row[d]


def products(row: Array, transposed: Array, out: Array) -> None:
    """``out[r] = sum_d row[d] transposed[d, 0, r]``."""
    for r in range(out.size):
        out[r] = 0
    add_rows_times(out, row, transposed, 0, 0, row.size)


def row_state(key: Any, sample: int, position: int) -> Any:
    """The random state of a query, as in ``random_bits.keep_mask``."""
    state = mix(uint64(sample) * _GOLDEN + key)
    return mix(state + uint64(position) * _GOLDEN)


def attention(
    q: Array, k: Array, v: Array, y: Array, lse: Array, items: Array, scale: Any, causal: bool,
    window: int, key: Any, threshold: Any, kept: Any, lo: int, hi: int,
) -> None:  # fmt: skip
    """One block of queries of one head an item.

    An item is (row of the first query, queries, head, row of the first key, keys, position of the
    first query, sample). `threshold` is 0 without dropout.
    """
    zero, group, width = q.dtype.type(0), q.shape[1] // k.shape[1], q.shape[2]
    packed = np.empty((width, 1, KEYS), q.dtype)
    scores = np.empty((QUERIES, KEYS), q.dtype)
    sums = np.empty((QUERIES, width), q.dtype)
    tops, totals = np.empty(QUERIES, q.dtype), np.empty(QUERIES, q.dtype)
    lanes = np.empty(LANES, q.dtype)
    for item in range(lo, hi):
        row0, count, head, key0 = items[item, 0], items[item, 1], items[item, 2], items[item, 3]
        length, position0, sample = items[item, 4], items[item, 5], items[item, 6]
        kv, last = head // group, position0 + count - 1
        sums[:] = zero
        tops[:] = -np.inf
        totals[:] = zero
        stop = min(length, last + 1 if causal else last + window)
        for start in range(max(0, position0 - window + 1), stop, KEYS):
            cols = min(KEYS, stop - start)
            transpose(k, key0 + start, kv, cols, packed)
            for i in range(count):
                position = position0 + i
                a = max(start, position - window + 1) - start
                b = min(start + cols, position + 1 if causal else position + window) - start
                if b <= a:
                    continue
                products(q[row0 + i, head], packed, scores[i, :cols])
                row, total = scores[i, a:b], zero
                for j in range(row.size):
                    row[j] *= scale
                top = row_max(row, lanes)
                top = top if top > tops[i] else tops[i]
                shrink = exp(tops[i] - top)
                for j in range(row.size):
                    e = exp(row[j] - top)
                    row[j] = e
                    total += e
                tops[i], totals[i] = top, totals[i] * shrink + total
                if threshold:
                    state = row_state(key, sample, position)
                    channel = (uint64(head) << _S32) + uint64(start + a) + _ONE
                    for j in range(row.size):
                        bits = mix(state + (channel + uint64(j)) * _GOLDEN)
                        row[j] *= kept if (bits >> _S32) >= threshold else zero
                out = sums[i]
                for d in range(width):
                    out[d] *= shrink
                add_rows_times(out, row, v, key0 + start + a, kv, b - a)
        for i in range(count):
            out, summed = y[row0 + i, head], sums[i]
            for d in range(width):
                out[d] = summed[d] / totals[i]
            lse[row0 + i, head] = tops[i] + math.log(totals[i])


def attention_backward(
    dy: Array, q: Array, k: Array, v: Array, y: Array, lse: Array, dq: Array, dk: Array, dv: Array,
    items: Array, scale: Any, causal: bool, window: int, key: Any, threshold: Any, kept: Any,
    lo: int, hi: int,
) -> None:  # fmt: skip
    """One head of one sequence an item: (first row, length, head, sample).

    `dq`, `dk` and `dv` are zero before; `dk` and `dv` have a row for each query head.
    """
    zero, group, width = q.dtype.type(0), q.shape[1] // k.shape[1], q.shape[2]
    packed_k = np.empty((width, 1, KEYS), q.dtype)
    packed_v = np.empty((width, 1, KEYS), q.dtype)
    p = np.empty((QUERIES, KEYS), q.dtype)
    dp = np.empty((QUERIES, KEYS), q.dtype)
    for item in range(lo, hi):
        row0, length, head, sample = items[item, 0], items[item, 1], items[item, 2], items[item, 3]
        kv = head // group
        delta = np.empty(length, q.dtype)
        for i in range(length):
            up, out, total = dy[row0 + i, head], y[row0 + i, head], zero
            for d in range(width):
                total += up[d] * out[d]
            delta[i] = total
        for start in range(0, length, KEYS):
            cols = min(KEYS, length - start)
            transpose(k, row0 + start, kv, cols, packed_k)
            transpose(v, row0 + start, kv, cols, packed_v)
            first = start if causal else max(0, start - window + 1)
            for block in range(first, min(length, start + cols - 1 + window), QUERIES):
                count = min(QUERIES, length - block)
                for i in range(count):
                    position = block + i
                    a = max(start, position - window + 1) - start
                    b = min(start + cols, position + 1 if causal else position + window) - start
                    p_row, dp_row = p[i, :cols], dp[i, :cols]
                    if b <= a:
                        p_row[:] = zero
                        dp_row[:] = zero
                        continue
                    products(q[row0 + position, head], packed_k, p_row)
                    products(dy[row0 + position, head], packed_v, dp_row)
                    p_row[:a] = zero
                    p_row[b:] = zero
                    dp_row[:a] = zero
                    dp_row[b:] = zero
                    p_seen, dp_seen = p[i, a:b], dp[i, a:b]
                    middle, mean = lse[row0 + position, head], delta[position]
                    if threshold:
                        state = row_state(key, sample, position)
                        channel = (uint64(head) << _S32) + uint64(start + a) + _ONE
                        for j in range(p_seen.size):
                            bits = mix(state + (channel + uint64(j)) * _GOLDEN)
                            keep = kept if (bits >> _S32) >= threshold else zero
                            share = exp(p_seen[j] * scale - middle)
                            dp_seen[j] = (dp_seen[j] * keep - mean) * share * scale
                            p_seen[j] = share * keep
                    else:
                        for j in range(p_seen.size):
                            share = exp(p_seen[j] * scale - middle)
                            dp_seen[j] = (dp_seen[j] - mean) * share * scale
                            p_seen[j] = share
                    add_rows_times(
                        dq[row0 + position, head], dp_seen, k, row0 + start + a, kv, b - a
                    )
                for j in range(cols):
                    into = row0 + start + j
                    add_rows_times(dv[into, head], p[:count, j], dy, row0 + block, head, count)
                    add_rows_times(dk[into, head], dp[:count, j], q, row0 + block, head, count)


HELPERS = (add_rows_times, transpose, products, row_state)
KERNELS = (rotate, attention, attention_backward)
