"""Rotary positions and attention of the Cython backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from loopos.backends.cython_support import converted
from loopos.backends.numpy_attention import check_window
from loopos.backends.numpy_backend import Array, NumpyBackend
from loopos.backends.threads import get_num_threads


def _samples(sample_ids: Array | None) -> Array | None:
    return None if sample_ids is None else converted(sample_ids, "sample_ids", np.int64)


class CythonAttention(NumpyBackend):
    """Attention in blocks that stay in cache."""

    _kernels: Any

    def rope(self, q: Array, k: Array, positions: Array, inv_freq: Array) -> tuple[Array, Array]:
        """Rotary position embedding; see :meth:`NumpyBackend.rope`."""
        if not self._kernels.single(q=q, k=k):
            return super().rope(q, k, positions, inv_freq)
        return self._rope(q, k, positions, inv_freq, inverse=False)

    def rope_backward(
        self, dq: Array, dk: Array, positions: Array, inv_freq: Array
    ) -> tuple[Array, Array]:
        """The inverse rotation of both gradients."""
        if not self._kernels.single(dq=dq, dk=dk):
            return super().rope_backward(dq, dk, positions, inv_freq)
        return self._rope(dq, dk, positions, inv_freq, inverse=True)

    def _rope(
        self, q: Array, k: Array, positions: Array, inv_freq: Array, inverse: bool
    ) -> tuple[Array, Array]:
        frequencies = converted(inv_freq, "inv_freq", np.float64)
        rotated: tuple[Array, Array] = self._kernels.rope(
            self._kernels.contiguous(q),
            self._kernels.contiguous(k),
            self._kernels.as_int32(positions, "positions"),
            frequencies,
            inverse,
            get_num_threads(),
        )
        return rotated

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
        """Softmax attention of each sequence on itself; see :meth:`NumpyBackend.attention`."""
        options = (causal, scale, window, dropout_rate, key)
        if not self._kernels.single(q=q, k=k, v=v):
            return super().attention(q, k, v, offsets, *options, sample_ids)
        check_window(window)
        y, lse = self._kernels.attention(
            self._kernels.contiguous(q),
            self._kernels.contiguous(k),
            self._kernels.contiguous(v),
            self._kernels.as_int32(offsets, "offsets"),
            *options,
            _samples(sample_ids),
            get_num_threads(),
        )
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
        """Gradients of q, k, v; see :meth:`NumpyBackend.attention_backward`."""
        options = (causal, scale, window, dropout_rate, key)
        if not self._kernels.single(dy=dy, q=q, k=k, v=v, y=y, lse=lse):
            return super().attention_backward(dy, q, k, v, y, lse, offsets, *options, sample_ids)
        check_window(window)
        dq, dk, dv = self._kernels.attention_backward(
            *self._kernels.all_contiguous(dy, q, k, v, y, lse),
            self._kernels.as_int32(offsets, "offsets"),
            *options,
            _samples(sample_ids),
            get_num_threads(),
        )
        return dq, dk, dv

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
        """Causal attention of new tokens; see :meth:`NumpyBackend.attention_cached`."""
        if not self._kernels.single(q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache):
            return super().attention_cached(
                q, k, v, k_cache, v_cache, offsets, slots, lengths, scale, window
            )
        check_window(window)
        y: Array = self._kernels.attention_cached(
            self._kernels.contiguous(q),
            self._kernels.contiguous(k),
            self._kernels.contiguous(v),
            k_cache,
            v_cache,
            self._kernels.as_int32(offsets, "offsets"),
            self._kernels.as_int32(slots, "slots"),
            self._kernels.as_int32(lengths, "lengths"),
            scale,
            window,
            get_num_threads(),
        )
        return y
