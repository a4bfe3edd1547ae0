"""Attention over ragged batches in NumPy: rotary positions, softmax attention, cached attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from loopos.backends.random_bits import keep_mask

Array = np.ndarray[Any, Any]

#: Scores held at once, in elements: bounds memory by blocks of queries, never T x T.
_SCORE_ELEMENTS = 1 << 21


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pairs (x[i], x[i + half]) of the first ``2 * half`` channels."""
    half = cos.shape[-1]
    y = x.copy()
    first, second = x[..., :half], x[..., half : 2 * half]
    y[..., :half] = first * cos - second * sin
    y[..., half : 2 * half] = second * cos + first * sin
    return y


def _groups(offsets: Array) -> Iterator[tuple[Array, Array]]:
    """Yield (sequence numbers ``[G]``, token rows ``[G, T]``) for each length T > 0.

    Sequences of one length are computed together, which saves a Python loop and pads nothing.
    """
    lengths = np.diff(offsets)
    for length in np.unique(lengths[lengths > 0]):
        members = np.flatnonzero(lengths == length)
        yield members, offsets[:-1][members][:, None] + np.arange(length, dtype=np.int32)


def _split_heads(x: Array, rows: Array, kv_heads: int) -> Array:
    """``x[rows]`` as ``[G, Hk, heads per kv head, T, D]``."""
    taken = x[rows]
    g, t, heads, d = taken.shape
    return taken.reshape(g, t, kv_heads, heads // kv_heads, d).transpose(0, 2, 3, 1, 4)


def _merge_heads(x: Array) -> Array:
    """The inverse of `_split_heads`: ``[G, Hk, R, T, D]`` to ``[G, T, Hk * R, D]``."""
    g, kv_heads, r, t, d = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(g, t, kv_heads * r, d)


def _visible(queries: Array, keys: Array, causal: bool, window: int | None) -> Array | None:
    """``[len(queries), len(keys)]`` True where a query may see a key; None when it sees all."""
    distance = queries[:, None] - keys[None, :]
    mask = distance >= 0 if causal else None
    if window is not None:
        near = np.abs(distance) < window
        mask = near if mask is None else mask & near
    return mask


def check_window(window: Any) -> None:
    """Raise TypeError or ValueError unless `window` is None or a whole number from 1."""
    whole = isinstance(window, (int, np.integer)) and not isinstance(window, bool)
    if window is not None and not whole:
        raise TypeError(f"window: expected a whole number or None, found {window!r}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, found {window}")


class AttentionOps:
    """Rotary positions and attention."""

    def rope(self, q: Array, k: Array, positions: Array, inv_freq: Array) -> tuple[Array, Array]:
        """Rotary position embedding (Su et al. 2021), halves rotated as Hugging Face's Llama does.

        Parameters
        ----------
        q : ndarray [N, H, D]
        k : ndarray [N, Hk, D]
        positions : ndarray int32 [N]
        inv_freq : ndarray [R / 2]
            Angle per position, radians; ``R <= D`` channels are rotated.
        """
        cos, sin = self._rotation(positions, inv_freq, q.dtype)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    def rope_backward(
        self, dq: Array, dk: Array, positions: Array, inv_freq: Array
    ) -> tuple[Array, Array]:
        """The inverse rotation of both gradients."""
        cos, sin = self._rotation(positions, inv_freq, dq.dtype)
        return _rotate(dq, cos, -sin), _rotate(dk, cos, -sin)

    def _rotation(self, positions: Array, inv_freq: Array, dtype: Any) -> tuple[Array, Array]:
        """Return cos and sin ``[N, 1, R / 2]``; angles in float64, since positions can be large."""
        angles = positions[:, None].astype(np.float64) * inv_freq[None, :].astype(np.float64)
        cos, sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
        return cos[:, None, :], sin[:, None, :]

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        offsets: Array,
        causal: bool,
        scale: float,
        window: int | None = None,
        dropout_rate: float = 0.0,
        key: int = 0,
        sample_ids: Array | None = None,
    ) -> tuple[Array, Array]:
        """Softmax attention of each sequence on itself, by blocks of queries.

        Parameters
        ----------
        q : ndarray [N, H, D]
        k, v : ndarray [N, Hk, D]
            ``H`` is a multiple of ``Hk``; query head h reads key head ``h // (H / Hk)``.
        offsets : ndarray int32 [B + 1]
        causal : bool
            Whether a token sees only itself and what stands before it.
        scale : float
            Factor on the scores, usually ``1 / sqrt(D)``.
        window : int, optional
            A query sees keys closer than this many positions.
        dropout_rate, key, sample_ids
            Dropout on the probabilities, see :meth:`dropout`.

        Returns
        -------
        y : ndarray [N, H, D]
        lse : ndarray [N, H]
            Log-sum-exp of the scaled scores, all that the backward needs.
        """
        check_window(window)
        y = np.empty_like(q, order="C")
        lse = np.empty(q.shape[:2], dtype=q.dtype)
        kv_heads = k.shape[1]
        for members, rows in _groups(offsets):
            qs, ks, vs = (_split_heads(a, rows, kv_heads) for a in (q, k, v))
            out = np.empty(qs.shape, dtype=q.dtype)
            logsum = np.empty(qs.shape[:-1], dtype=q.dtype)
            for block, seen, hidden in self._blocks(qs.shape, causal, window):
                scores = qs[..., block, :] @ ks[..., seen, :].swapaxes(-1, -2)
                scores *= q.dtype.type(scale)
                if hidden is not None:
                    scores[..., hidden] = -np.inf
                top = scores.max(axis=-1, keepdims=True)
                scores -= top
                np.exp(scores, out=scores)
                total = scores.sum(axis=-1, keepdims=True)
                logsum[..., block] = (top + np.log(total))[..., 0]
                scores /= total
                if dropout_rate:
                    samples = members if sample_ids is None else sample_ids[members]
                    scores *= self._attention_keep(scores, samples, block, seen, dropout_rate, key)
                out[..., block, :] = scores @ vs[..., seen, :]
            y[rows] = _merge_heads(out)
            lse[rows] = _merge_heads(logsum[..., None])[..., 0]
        return y, lse

    def attention_backward(
        self,
        dy: Array,
        q: Array,
        k: Array,
        v: Array,
        y: Array,
        lse: Array,
        offsets: Array,
        causal: bool,
        scale: float,
        window: int | None = None,
        dropout_rate: float = 0.0,
        key: int = 0,
        sample_ids: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Gradients of q, k, v; probabilities come again from `lse` (Dao et al. 2022, alg. 4)."""
        check_window(window)
        dq, dk, dv = (
            np.empty_like(q, order="C"),
            np.empty_like(k, order="C"),
            np.empty_like(v, order="C"),
        )
        kv_heads = k.shape[1]
        for members, rows in _groups(offsets):
            qs, ks, vs = (_split_heads(a, rows, kv_heads) for a in (q, k, v))
            dys, ys = (_split_heads(a, rows, kv_heads) for a in (dy, y))
            logsum = _split_heads(lse[..., None], rows, kv_heads)
            delta = np.sum(dys * ys, axis=-1, keepdims=True)
            dqs = np.empty(qs.shape, dtype=q.dtype)
            dks = np.zeros((*ks.shape[:2], 1, *ks.shape[3:]), dtype=q.dtype)
            dvs = np.zeros_like(dks)
            for block, seen, hidden in self._blocks(qs.shape, causal, window):
                p = qs[..., block, :] @ ks[..., seen, :].swapaxes(-1, -2)
                p *= q.dtype.type(scale)
                p -= logsum[..., block, :]
                if hidden is not None:
                    p[..., hidden] = -np.inf
                np.exp(p, out=p)
                dp = dys[..., block, :] @ vs[..., seen, :].swapaxes(-1, -2)
                dropped = p
                if dropout_rate:
                    samples = members if sample_ids is None else sample_ids[members]
                    keep = self._attention_keep(p, samples, block, seen, dropout_rate, key)
                    dropped = p * keep
                    dp *= keep
                # Heads that share a key head (axis 2) add up.
                dvs[..., seen, :] += (dropped.swapaxes(-1, -2) @ dys[..., block, :]).sum(
                    axis=2, keepdims=True
                )
                dp -= delta[..., block, :]
                dp *= p
                dp *= q.dtype.type(scale)
                dqs[..., block, :] = dp @ ks[..., seen, :]
                dks[..., seen, :] += (dp.swapaxes(-1, -2) @ qs[..., block, :]).sum(
                    axis=2, keepdims=True
                )
            for whole, part in ((dq, dqs), (dk, dks), (dv, dvs)):
                whole[rows] = _merge_heads(part)
        return dq, dk, dv

    def _blocks(
        self, shape: tuple[int, ...], causal: bool, window: int | None
    ) -> Iterator[tuple[slice, slice, Array | None]]:
        """Yield (queries, keys they may see, mask of hidden pairs) for ``[G, Hk, R, T, D]``."""
        g, kv_heads, r, length, _ = shape
        size = max(1, min(length, _SCORE_ELEMENTS // max(1, g * kv_heads * r * length)))
        for start in range(0, length, size):
            stop = min(start + size, length)
            first = 0 if window is None else max(0, start - window + 1)
            last = stop if causal else length
            if window is not None and not causal:
                last = min(length, stop + window - 1)
            queries, keys = np.arange(start, stop), np.arange(first, last)
            visible = _visible(queries, keys, causal, window)
            hidden = None if visible is None or visible.all() else ~visible
            yield slice(start, stop), slice(first, last), hidden

    def _attention_keep(
        self, scores: Array, samples: Array, block: slice, seen: slice, rate: float, key: int
    ) -> Array:
        """Dropout factors of a block, keyed by sample, query position and (head, key position)."""
        g, kv_heads, r = scores.shape[:3]
        queries = np.arange(block.start, block.stop)
        keys = np.arange(seen.start, seen.stop)
        channels = (np.arange(kv_heads * r)[:, None] << 32) + keys[None, :]
        sample_grid = np.repeat(np.asarray(samples), queries.size)
        keep = keep_mask(
            key, sample_grid, np.tile(queries, g), channels.ravel(), rate, scores.dtype
        )
        keep = keep.reshape(g, queries.size, kv_heads, r, keys.size)
        return keep.transpose(0, 2, 3, 1, 4)

    @staticmethod
    def _keep(new: Array, cache: Array, offsets: Array, slots: Array, lengths: Array) -> None:
        """Write keys, or values, behind those that the slots hold."""
        for b, slot in enumerate(slots):
            rows = new[offsets[b] : offsets[b + 1]]
            cache[slot, lengths[b] - len(rows) : lengths[b]] = rows

    def attention_cached(
        self,
        q: Array,
        k: Array,
        v: Array,
        k_cache: Array,
        v_cache: Array,
        offsets: Array,
        slots: Array,
        lengths: Array,
        scale: float,
        window: int | None = None,
    ) -> Array:
        """Write the keys and values of new tokens to a cache; causal attention of them on it.

        Parameters
        ----------
        q : ndarray [N, H, D]
            Queries of the new tokens, sequence after sequence.
        k, v : ndarray [N, Hk, D]
            Their keys and values.
        k_cache, v_cache : ndarray [S, T, Hk, D]
            One slot a sequence, T positions of capacity; C-contiguous.
        offsets : ndarray int32 [B + 1]
            Where each sequence's new tokens begin in `q`.
        slots : ndarray int32 [B]
            Which slot of the cache each sequence uses, each at most once.
        lengths : ndarray int32 [B]
            Tokens in each slot, the new ones included.

        Returns
        -------
        ndarray [N, H, D]
        """
        check_window(window)
        self._keep(k, k_cache, offsets, slots, lengths)
        self._keep(v, v_cache, offsets, slots, lengths)
        y = np.empty_like(q, order="C")
        kv_heads = k_cache.shape[2]
        for b, slot in enumerate(slots):
            new = slice(int(offsets[b]), int(offsets[b + 1]))
            count, total = new.stop - new.start, int(lengths[b])
            if count == 0:
                continue
            queries = np.arange(total - count, total)
            first = 0 if window is None else max(0, total - count - window + 1)
            rows = np.arange(count)[None, :]
            qs = _split_heads(q[new], rows, kv_heads)
            ks = k_cache[slot, first:total].transpose(1, 0, 2)[None, :, None]
            vs = v_cache[slot, first:total].transpose(1, 0, 2)[None, :, None]
            scores = qs @ ks.swapaxes(-1, -2)
            scores *= q.dtype.type(scale)
            visible = _visible(queries, np.arange(first, total), True, window)
            if visible is not None:
                scores[..., ~visible] = -np.inf
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            y[new] = _merge_heads(scores @ vs)[0]
        return y
