"""Attention in loops for numba: online softmax by blocks of queries and keys, never T x T.

Plain Python until compiled, like ``numba_kernels``. Blocks are copied together and padded with
zeros to multiples of 16, so that products need no special ends and become SIMD code.
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

#: Below all scores that count.
LEAST = np.float32(-3e38)

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


def multiply_add(out: Array, factors: Array, rows: Array, outputs: int, count: int, n: int) -> None:
    """``out[i, :n] += sum_r factors[i, r] rows[r, :n]`` for i < `outputs`, r < `count`.

    Both are multiples of 4: four rows of both make sixteen products of twelve loads and stores.
    """
    for i in range(0, outputs, 4):
        out_0, out_1, out_2, out_3 = out[i, :n], out[i + 1, :n], out[i + 2, :n], out[i + 3, :n]
        for r in range(0, count, 4):
            row_0, row_1, row_2, row_3 = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
            a0, a1, a2, a3 = (
                factors[i, r], factors[i, r + 1], factors[i, r + 2], factors[i, r + 3],
            )  # fmt: skip
            b0, b1, b2, b3 = (
                factors[i + 1, r], factors[i + 1, r + 1], factors[i + 1, r + 2],
                factors[i + 1, r + 3],
            )  # fmt: skip
            c0, c1, c2, c3 = (
                factors[i + 2, r], factors[i + 2, r + 1], factors[i + 2, r + 2],
                factors[i + 2, r + 3],
            )  # fmt: skip
            d0, d1, d2, d3 = (
                factors[i + 3, r], factors[i + 3, r + 1], factors[i + 3, r + 2],
                factors[i + 3, r + 3],
            )  # fmt: skip
            for j in range(out_0.size):
                x, y, z, w = row_0[j], row_1[j], row_2[j], row_3[j]
                out_0[j] += a0 * x + a1 * y + a2 * z + a3 * w
                out_1[j] += b0 * x + b1 * y + b2 * z + b3 * w
                out_2[j] += c0 * x + c1 * y + c2 * z + c3 * w
                out_3[j] += d0 * x + d1 * y + d2 * z + d3 * w


def pad(n: int) -> int:
    """The next multiple of 16."""
    return (n + 15) // 16 * 16


def gather(x: Array, first: int, head: int, count: int, into: Array) -> None:
    """``into[r] = x[first + r, head]``, and zeros up to the next multiple of 16 rows."""
    zero = x.dtype.type(0)
    for r in range(pad(count)):
        row = into[r]
        if r < count:
            source = x[first + r, head]
            for d in range(source.size):
                row[d] = source[d]
        else:
            for d in range(row.size):
                row[d] = zero


def transpose(rows: Array, count: int, into: Array) -> None:
    """``into[d, r] = rows[r, d]`` for `count` rows."""
    for d in range(rows.shape[1]):
        out = into[d]
        for r in range(count):
            out[r] = rows[r, d]


def clear(x: Array, rows: int, n: int) -> None:
    """``x[:rows, :n] = 0``."""
    zero = x.dtype.type(0)
    for r in range(rows):
        row = x[r, :n]
        for i in range(row.size):
            row[i] = zero


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
    padded = pad(width)
    queries, rows = np.zeros((QUERIES, padded), q.dtype), np.zeros((KEYS, padded), q.dtype)
    packed, scores = np.zeros((padded, KEYS), q.dtype), np.zeros((QUERIES, KEYS), q.dtype)
    sums, lanes = np.zeros((QUERIES, padded), q.dtype), np.empty(LANES, q.dtype)
    tops, totals = np.zeros(QUERIES, q.dtype), np.zeros(QUERIES, q.dtype)
    for item in range(lo, hi):
        row0, count, head, key0 = items[item, 0], items[item, 1], items[item, 2], items[item, 3]
        length, position0, sample = items[item, 4], items[item, 5], items[item, 6]
        kv, last = head // group, position0 + count - 1
        gather(q, row0, head, count, queries)
        clear(sums, pad(count), padded)
        tops[:] = LEAST  # a block may have no score above -inf
        totals[:] = zero
        stop = min(length, last + 1 if causal else last + window)
        for start in range(max(0, position0 - window + 1), stop, KEYS):
            cols = min(KEYS, stop - start)
            gather(k, key0 + start, kv, cols, rows)
            transpose(rows, pad(cols), packed)
            gather(v, key0 + start, kv, cols, rows)
            clear(scores, pad(count), pad(cols))
            multiply_add(scores, queries, packed, pad(count), padded, pad(cols))
            for i in range(count):
                position = position0 + i
                a = max(start, position - window + 1) - start
                b = min(start + cols, position + 1 if causal else position + window) - start
                row, total = scores[i, : pad(cols)], zero
                if b <= a:
                    row[:] = zero
                    continue
                for j in range(row.size):
                    row[j] *= scale
                row[:a] = -np.inf
                row[b:] = -np.inf
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
                    channel = (uint64(head) << _S32) + uint64(start) + _ONE
                    for j in range(row.size):
                        bits = mix(state + (channel + uint64(j)) * _GOLDEN)
                        row[j] *= kept if (bits >> _S32) >= threshold else zero
                out = sums[i]
                for d in range(out.size):
                    out[d] *= shrink
            multiply_add(sums, scores, rows, pad(count), pad(cols), width)
        for i in range(count):
            out, summed = y[row0 + i, head], sums[i]
            for d in range(out.size):
                out[d] = summed[d] / totals[i]
            lse[row0 + i, head] = tops[i] + math.log(totals[i])


def probabilities(
    p: Array, dp: Array, lse: Any, delta: Any, scale: Any, a: int, b: int, state: Any,
    channel: Any, threshold: Any, kept: Any,
) -> None:  # fmt: skip
    """One row: products with keys become probabilities, those with values gradients of scores."""
    zero = p.dtype.type(0)
    for j in range(p.size):
        share, keep = exp(p[j] * scale - lse), kept
        if threshold:
            bits = mix(state + (channel + uint64(j)) * _GOLDEN)
            keep = kept if (bits >> _S32) >= threshold else zero
        dp[j] = (dp[j] * keep - delta) * share * scale
        p[j] = share * keep
    p[:a] = zero
    p[b:] = zero
    dp[:a] = zero
    dp[b:] = zero


def attention_backward(
    dy: Array, q: Array, k: Array, v: Array, y: Array, lse: Array, dq: Array, dk: Array, dv: Array,
    items: Array, scale: Any, causal: bool, window: int, key: Any, threshold: Any, kept: Any,
    lo: int, hi: int,
) -> None:  # fmt: skip
    """One head of one sequence an item: (first row, length, head, sample).

    `dq` is zero before; `dk` and `dv` have a row for each query head.
    """
    zero, group, width = q.dtype.type(0), q.shape[1] // k.shape[1], q.shape[2]
    padded = pad(width)
    queries, ups = np.zeros((QUERIES, padded), q.dtype), np.zeros((QUERIES, padded), q.dtype)
    p, dp = np.zeros((QUERIES, KEYS), q.dtype), np.zeros((QUERIES, KEYS), q.dtype)
    rows, dqs = np.zeros((KEYS, padded), q.dtype), np.zeros((QUERIES, padded), q.dtype)
    dks, dvs = np.zeros((KEYS, padded), q.dtype), np.zeros((KEYS, padded), q.dtype)
    packed_k, packed_v = np.zeros((padded, KEYS), q.dtype), np.zeros((padded, KEYS), q.dtype)
    for item in range(lo, hi):
        row0, length, head, sample = items[item, 0], items[item, 1], items[item, 2], items[item, 3]
        kv, delta = head // group, np.empty(length, q.dtype)
        for i in range(length):
            up, out, total = dy[row0 + i, head], y[row0 + i, head], zero
            for d in range(up.size):
                total += up[d] * out[d]
            delta[i] = total
        for start in range(0, length, KEYS):
            cols = min(KEYS, length - start)
            gather(v, row0 + start, kv, cols, rows)
            transpose(rows, pad(cols), packed_v)
            gather(k, row0 + start, kv, cols, rows)
            transpose(rows, pad(cols), packed_k)
            clear(dks, pad(cols), padded)
            clear(dvs, pad(cols), padded)
            first = start if causal else max(0, start - window + 1)
            for block in range(first, min(length, start + cols - 1 + window), QUERIES):
                count = min(QUERIES, length - block)
                seen = min(cols, block + count - start) if causal else cols
                size, across = pad(count), pad(seen)
                gather(q, row0 + block, head, count, queries)
                gather(dy, row0 + block, head, count, ups)
                clear(p, size, across)
                clear(dp, size, across)
                multiply_add(p, queries, packed_k, size, padded, across)
                multiply_add(dp, ups, packed_v, size, padded, across)
                for i in range(count):
                    at = block + i
                    a = max(start, at - window + 1) - start
                    b = min(start + seen, at + 1 if causal else at + window) - start
                    state = row_state(key, sample, at)
                    channel = (uint64(head) << _S32) + uint64(start) + _ONE
                    probabilities(
                        p[i, :across], dp[i, :across], lse[row0 + at, head], delta[at], scale,
                        min(a, across), max(b, 0), state, channel, threshold, kept,
                    )  # fmt: skip
                multiply_add(dvs, p.T, ups, across, size, width)
                multiply_add(dks, dp.T, queries, across, size, width)
                clear(dqs, size, padded)
                multiply_add(dqs, dp, rows, size, across, width)
                for i in range(count):
                    out, part = dq[row0 + block + i, head], dqs[i]
                    for d in range(out.size):
                        out[d] += part[d]
            for j in range(cols):
                out_k, out_v = dk[row0 + start + j, head], dv[row0 + start + j, head]
                for d in range(out_k.size):
                    out_k[d] = dks[j, d]
                    out_v[d] = dvs[j, d]


HELPERS = (multiply_add, pad, gather, transpose, clear, row_state, probabilities)
KERNELS = (rotate, attention, attention_backward)
