"""Losses over the vocabulary: logits by BLAS in chunks of rows, softmax and gradient by numba.

And the backward of a linear map, which shares the sum of gradients of weights with them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loopos.backends import numba_compile
from loopos.backends.numba_pool import POOL
from loopos.backends.numba_support import as_input, expect, int64, one_of
from loopos.backends.numpy_backend import DenseOps
from loopos.backends.numpy_losses import LossOps, _chunks, _logits
from loopos.backends.reused import empty

Array = np.ndarray[Any, Any]


def _targets(targets: Array, vocabulary: int) -> Array:
    """Return targets for compiled code, which checks no index and would write elsewhere."""
    if targets.dtype.kind not in "iu":
        raise TypeError(f"targets: expected an array of integers, found {targets.dtype}")
    if targets.size and (targets.min() < 0 or targets.max() >= vocabulary):
        worst = targets.min() if targets.min() < 0 else targets.max()
        raise IndexError(f"target {worst} is out of bounds for a vocabulary of {vocabulary}")
    return int64(targets)


def _product(a: Array, b: Array) -> Array:
    """``a b`` by BLAS, in memory that was used before."""
    if a.ndim != 2 or b.ndim != 2 or not one_of(a, b):
        return a @ b
    return np.matmul(a, b, out=empty((len(a), b.shape[1]), a.dtype))


def _new_logits(h: Array, w: Array, b: Array | None, temperature: float = 1.0) -> Array:
    return _logits(h, w, b, temperature, empty((len(h), len(w)), h.dtype))


def _add_product(into: Array, left: Array, right: Array, fresh: bool = False) -> None:
    """``into += left^T right``: the product by BLAS, the sum on all threads.

    `fresh` says that `into` holds nothing yet; then the product goes straight there.
    """
    if fresh:
        np.matmul(left.T, right, out=into)
        return
    product = _product(left.T, right)
    fits = product.flags.carray and into.flags.carray and one_of(into, product)
    if not fits or product.shape != into.shape:
        into += product
        return
    kernels, _ = numba_compile.compiled()
    blocks = -(-into.size // kernels.ELEMENTS)
    POOL.run(kernels.add, blocks, into.size // 2, into.reshape(-1), product.reshape(-1))


def _add_head_gradients(
    dz: Array, h: Array, w: Array, dw: Array | None, db: Array | None, need_dh: bool,
    accumulate: bool = True,
) -> Array | None:  # fmt: skip
    """The backward of ``z = h w^T + b`` for one chunk."""
    if dw is not None:
        _add_product(dw, dz, h, not accumulate)
    if db is not None:
        db += dz.sum(axis=0)
    return _product(dz, w) if need_dh else None


class NumbaLosses(DenseOps, LossOps):
    """The losses of ``numpy_losses`` whose loops are worth compiling."""

    _product = staticmethod(_product)

    def linear_backward(
        self,
        dy: Array,
        x: Array | None,
        w: Array,
        pre: Array | None = None,
        activation: str | None = None,
        *,
        dw: Array | None = None,
        db: Array | None = None,
        accumulate: bool = True,
        dx: Array | None = None,
        need_dx: bool = True,
    ) -> Array | None:
        """``dx = dz w``, ``dw += dz^T x``, ``db += sum_n dz`` with ``dz = dy act'(pre)``."""
        if activation is not None and pre is not None:
            dy = self.activation_backward(dy, pre, activation)
        if dw is not None:
            assert x is not None
            _add_product(dw, dy, x, not accumulate)
        return super().linear_backward(dy, None, w, db=db, dx=dx, need_dx=need_dx)

    def add(self, a: Array, b: Array, scale: float = 1.0) -> Array:
        """``a + scale b`` of one shape."""
        if scale != 1.0 or a.shape != b.shape or not one_of(a, b):
            return super().add(a, b, scale)
        return np.add(a, b, out=empty(a.shape, a.dtype))

    def linear_cross_entropy(
        self,
        h: Array,
        w: Array,
        targets: Array,
        weights: Array | None = None,
        b: Array | None = None,
        *,
        need_dh: bool = False,
        need_dw: bool = False,
        need_db: bool = False,
    ) -> tuple[float, float, Array | None, Array | None, Array | None]:
        """Vocabulary projection, log-softmax and negative log-likelihood in one pass."""
        if not one_of(h, w, b):
            return super().linear_cross_entropy(
                h, w, targets, weights, b, need_dh=need_dh, need_dw=need_dw, need_db=need_db
            )
        kernels, _ = numba_compile.compiled()
        weight = np.ones(len(h), h.dtype) if weights is None else np.asarray(weights, h.dtype)
        expect((len(h),), targets=targets, weights=weight)
        rows, wanted = np.flatnonzero(weight), need_dh or need_dw or need_db
        dh = np.zeros_like(h, order="C") if need_dh else None
        make = np.empty_like if rows.size else np.zeros_like  # the first chunk fills it
        dw = make(w, order="C") if need_dw else None
        db = np.zeros(w.shape[0], dtype=w.dtype) if need_db else None
        total = 0.0
        for chunk in _chunks(rows.size, w.shape[0]):
            at = rows[chunk]
            # Most often every token counts: then rows need not be copied together.
            whole = rows.size == len(h)
            states = h[chunk] if whole else h[at]
            scale, target = as_input(weight[at]), _targets(targets[at], w.shape[0])
            z, logp = _new_logits(states, w, b), np.empty(at.size, h.dtype)
            args = (z, target, scale, logp, wanted)
            POOL.run(kernels.cross_entropy_rows, at.size, z.size, *args)
            total -= float(np.sum(logp * scale, dtype=np.float64))
            if wanted:
                part = _add_head_gradients(z, states, w, dw, db, need_dh, chunk.start > 0)
                if dh is not None and part is not None:
                    dh[at] = part
        return total, float(weight.sum(dtype=np.float64)), dh, dw, db

    def linear_logprobs(
        self, h: Array, w: Array, targets: Array, temperature: float = 1.0, b: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """Log-probability of the chosen token, entropy and log-sum-exp."""
        if not one_of(h, w, b):
            return super().linear_logprobs(h, w, targets, temperature, b)
        kernels, _ = numba_compile.compiled()
        expect((len(h),), targets=targets)
        targets = _targets(targets, w.shape[0])
        logp, entropy, lse = (np.empty(len(h), dtype=h.dtype) for _ in range(3))
        for chunk in _chunks(len(h), w.shape[0]):
            z = _new_logits(h[chunk], w, b, temperature)
            args = (z, targets[chunk], logp[chunk], entropy[chunk], lse[chunk])
            POOL.run(kernels.logprob_rows, len(z), z.size, *args)
        return logp, entropy, lse

    def linear_logprobs_backward(
        self,
        dlogp: Array,
        dentropy: Array | None,
        h: Array,
        w: Array,
        targets: Array,
        entropy: Array,
        lse: Array,
        temperature: float = 1.0,
        b: Array | None = None,
        *,
        dw: Array | None = None,
        db: Array | None = None,
        accumulate: bool = True,
        need_dh: bool = True,
    ) -> Array | None:
        """Gradient of ``h``; logits are recomputed chunk by chunk."""
        if not one_of(dlogp, dentropy, h, w, entropy, lse, b):
            return super().linear_logprobs_backward(
                dlogp, dentropy, h, w, targets, entropy, lse, temperature, b,
                dw=dw, db=db, accumulate=accumulate, need_dh=need_dh,
            )  # fmt: skip
        kernels, _ = numba_compile.compiled()
        columns = {"targets": targets, "dlogp": dlogp, "dentropy": dentropy}
        expect((len(h),), **columns, entropy=entropy, lse=lse)
        targets = _targets(targets, w.shape[0])
        dh = np.empty_like(h, order="C") if need_dh else None
        if dw is not None and not accumulate and not len(h):
            dw.fill(0)
        ups = [np.empty(0, h.dtype) if a is None else as_input(a) for a in (dlogp, dentropy)]
        entropy, lse = as_input(entropy), as_input(lse)
        inverse = h.dtype.type(1.0 / temperature)
        for chunk in _chunks(len(h), w.shape[0]):
            z = _new_logits(h[chunk], w, b, temperature)
            args = (entropy[chunk], lse[chunk], *(up[chunk] for up in ups), inverse)
            POOL.run(
                kernels.logprob_rows_backward, len(z), z.size, z, targets[chunk], *args
            )  # fmt: skip
            add = accumulate or chunk.start > 0
            part = _add_head_gradients(z, h[chunk], w, dw, db, need_dh, add)
            if dh is not None and part is not None:
                dh[chunk] = part
        return dh

    def linear_kl(
        self,
        h: Array,
        w: Array,
        h_ref: Array,
        w_ref: Array,
        temperature: float = 1.0,
        b: Array | None = None,
        b_ref: Array | None = None,
    ) -> Array:
        """Exact ``KL(p || p_ref)`` over the whole vocabulary per token."""
        if not one_of(h, w, h_ref, w_ref, b, b_ref):
            return super().linear_kl(h, w, h_ref, w_ref, temperature, b, b_ref)
        kernels, _ = numba_compile.compiled()
        expect((len(h), w_ref.shape[1]), h_ref=h_ref)
        expect((w.shape[0], h_ref.shape[1]), w_ref=w_ref)
        kl = np.empty(len(h), dtype=h.dtype)
        for chunk in _chunks(len(h), w.shape[0]):
            z = _new_logits(h[chunk], w, b, temperature)
            z_ref = _new_logits(h_ref[chunk], w_ref, b_ref, temperature)
            POOL.run(kernels.kl_rows, len(z), 2 * z.size, z, z_ref, kl[chunk])
        return kl

    def linear_kl_backward(
        self,
        dkl: Array,
        kl: Array,
        h: Array,
        w: Array,
        h_ref: Array,
        w_ref: Array,
        temperature: float = 1.0,
        b: Array | None = None,
        b_ref: Array | None = None,
        *,
        dw: Array | None = None,
        db: Array | None = None,
        accumulate: bool = True,
        need_dh: bool = True,
    ) -> Array | None:
        """Gradient of ``h``; the reference is fixed."""
        if not one_of(dkl, kl, h, w, h_ref, w_ref, b, b_ref):
            return super().linear_kl_backward(
                dkl, kl, h, w, h_ref, w_ref, temperature, b, b_ref,
                dw=dw, db=db, accumulate=accumulate, need_dh=need_dh,
            )  # fmt: skip
        kernels, _ = numba_compile.compiled()
        expect((len(h), w_ref.shape[1]), h_ref=h_ref)
        expect((w.shape[0], h_ref.shape[1]), w_ref=w_ref)
        expect((len(h),), dkl=dkl, kl=kl)
        dh = np.empty_like(h, order="C") if need_dh else None
        if dw is not None and not accumulate and not len(h):
            dw.fill(0)
        kl, up = as_input(kl), as_input(dkl / h.dtype.type(temperature))
        for chunk in _chunks(len(h), w.shape[0]):
            z = _new_logits(h[chunk], w, b, temperature)
            z_ref = _new_logits(h_ref[chunk], w_ref, b_ref, temperature)
            args = (z, z_ref, kl[chunk], up[chunk])
            POOL.run(kernels.kl_rows_backward, len(z), 2 * z.size, *args)
            add = accumulate or chunk.start > 0
            part = _add_head_gradients(z, h[chunk], w, dw, db, need_dh, add)
            if dh is not None and part is not None:
                dh[chunk] = part
        return dh
