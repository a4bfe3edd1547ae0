"""Losses over the vocabulary of the Cython backend: logits in chunks of rows, never whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from loopos.backends.cython_support import converted
from loopos.backends.numpy_backend import Array, NumpyBackend
from loopos.backends.threads import get_num_threads

#: Logits held at once, in elements: a weight is read once for each chunk of rows.
_LOGIT_ELEMENTS = 1 << 25
#: Rows that are one block of a product at level amx (ROW_BLOCK there), whose tasks each pack what
#: they alone read: 8 % less time a row than with more, where the vocabulary is large.
_BLOCK_ROWS = 384
#: Logits for which the number of chunks does not matter.
_FEW_ELEMENTS = 1 << 22


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Cut rows into chunks of nearly one size: as few as go by fast, and as memory allows."""
    each = max(1, vocabulary)
    most = max(1, min(max(_BLOCK_ROWS, _FEW_ELEMENTS // each), _LOGIT_ELEMENTS // each))
    count = -(-rows // most)
    for i in range(count):
        yield slice(rows * i // count, rows * (i + 1) // count)


class CythonLosses(NumpyBackend):
    """What goes through the logits of a vocabulary."""

    _kernels: Any

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
        """Summed negative log-likelihood; see :meth:`NumpyBackend.linear_cross_entropy`."""
        if not self._kernels.single(h=h, w=w):
            return super().linear_cross_entropy(
                h, w, targets, weights, b, need_dh=need_dh, need_dw=need_dw, need_db=need_db
            )
        kernels, threads = self._kernels, get_num_threads()
        weight = np.ones(len(h), np.float32)
        if weights is not None:
            weight = converted(weights, "weights", np.float32)
            if weight.shape != (len(h),):
                raise ValueError(f"weights: expected shape [{len(h)}], found {list(weight.shape)}")
        rows, targets = np.flatnonzero(weight), self._targets(targets, len(h))
        dh = kernels.empty(h.shape) if need_dh else None
        if dh is not None and rows.size < len(h):
            dh.fill(0)
        dw = kernels.empty(w.shape) if need_dw else None
        db = np.zeros(w.shape[0], np.float32) if need_db else None
        total, accumulate = 0.0, False
        for chunk in _chunks(rows.size, w.shape[0]):
            at = chunk if rows.size == len(h) else rows[chunk]  # a view where all count
            states, scale = h[at], weight[at]
            picked = targets[at]
            z = self.linear(states, w, b)[0]
            dlogp = -scale if need_dh or need_dw or need_db else None
            logp, _, _ = kernels.loss_rows(z, picked, 1.0, False, threads, dlogp)
            total -= float(np.sum(logp * scale, dtype=np.float64))
            if dlogp is None:
                continue
            part = self.linear_backward(
                z, states, w, dw=dw, db=db, accumulate=accumulate, need_dx=need_dh
            )
            if dh is not None:
                dh[at] = part
            accumulate = True
        if dw is not None and not accumulate:
            dw.fill(0)
        return total, float(weight.sum(dtype=np.float64)), dh, dw, db

    def linear_logprobs(
        self, h: Array, w: Array, targets: Array, temperature: float = 1.0, b: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """Log-probability, entropy, log-sum-exp; see :meth:`NumpyBackend.linear_logprobs`."""
        if not self._kernels.single(h=h, w=w):
            return super().linear_logprobs(h, w, targets, temperature, b)
        targets = self._targets(targets, len(h))
        parts = [
            self._kernels.loss_rows(
                self.linear(h[chunk], w, b)[0],
                targets[chunk],
                1 / temperature,
                True,
                get_num_threads(),
            )
            for chunk in _chunks(len(h), w.shape[0])
        ]
        if not parts:
            empty = np.empty(0, np.float32)
            return empty, empty.copy(), empty.copy()
        logp, lse, entropy = (np.concatenate(column) for column in zip(*parts, strict=True))
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
        """Gradient of ``h``; see :meth:`NumpyBackend.linear_logprobs_backward`."""
        if not self._kernels.single(h=h, w=w, dlogp=dlogp):
            return super().linear_logprobs_backward(
                dlogp, dentropy, h, w, targets, entropy, lse, temperature, b,
                dw=dw, db=db, accumulate=accumulate, need_dh=need_dh,
            )  # fmt: skip
        targets = self._targets(targets, len(h))
        dh = self._kernels.empty(h.shape) if need_dh else None
        if dw is not None and not accumulate and not len(h):
            dw.fill(0)
        for chunk in _chunks(len(h), w.shape[0]):
            z = self.linear(h[chunk], w, b)[0]
            self._kernels.loss_rows_gradient(
                z,
                targets[chunk],
                1 / temperature,
                self._kernels.contiguous(dlogp[chunk]),
                self._kernels.contiguous(lse[chunk]),
                None if dentropy is None else self._kernels.contiguous(dentropy[chunk]),
                self._kernels.contiguous(entropy[chunk]),
                get_num_threads(),
            )
            part = self.linear_backward(
                z, h[chunk], w, dw=dw, db=db, accumulate=accumulate, need_dx=need_dh
            )
            accumulate = True
            if dh is not None:
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
        """Exact divergence per token; see :meth:`NumpyBackend.linear_kl`."""
        if not self._kernels.single(h=h, w=w, h_ref=h_ref, w_ref=w_ref):
            return super().linear_kl(h, w, h_ref, w_ref, temperature, b, b_ref)
        kl: Array = self._kernels.empty(len(h))
        for chunk in _chunks(len(h), 2 * w.shape[0]):
            z, z_ref = self.linear(h[chunk], w, b)[0], self.linear(h_ref[chunk], w_ref, b_ref)[0]
            kl[chunk] = self._kernels.kl_rows(z, z_ref, 1 / temperature, get_num_threads())
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
        """Gradient of ``h``; see :meth:`NumpyBackend.linear_kl_backward`."""
        if not self._kernels.single(dkl=dkl, kl=kl, h=h, w=w, h_ref=h_ref, w_ref=w_ref):
            return super().linear_kl_backward(
                dkl, kl, h, w, h_ref, w_ref, temperature, b, b_ref,
                dw=dw, db=db, accumulate=accumulate, need_dh=need_dh,
            )  # fmt: skip
        dh = self._kernels.empty(h.shape) if need_dh else None
        if dw is not None and not accumulate and not len(h):
            dw.fill(0)
        for chunk in _chunks(len(h), 2 * w.shape[0]):
            z, z_ref = self.linear(h[chunk], w, b)[0], self.linear(h_ref[chunk], w_ref, b_ref)[0]
            self._kernels.kl_rows_gradient(
                z,
                z_ref,
                1 / temperature,
                self._kernels.contiguous(dkl[chunk]),
                self._kernels.contiguous(kl[chunk]),
                get_num_threads(),
            )
            part = self.linear_backward(
                z, h[chunk], w, dw=dw, db=db, accumulate=accumulate, need_dx=need_dh
            )
            accumulate = True
            if dh is not None:
                dh[chunk] = part
        return dh

    def _targets(self, targets: Array, rows: int) -> Array:
        """Return targets as int32, one a row."""
        found: Array = self._kernels.as_int32(targets, "targets")
        if found.shape != (rows,):
            raise ValueError(f"targets: expected shape [{rows}], found {list(found.shape)}")
        return found

    def sample(
        self, logits: Array, temperature: float, top_k: int, top_p: float, min_p: float, u: Array
    ) -> tuple[Array, Array]:
        """One token a row; see :meth:`NumpyBackend.sample`."""
        # The kernel multiplies with one over the temperature, in float32.
        moderate = temperature == 0 or 1e-12 < temperature < 1e12
        if not self._kernels.single(logits=logits) or not moderate:
            return super().sample(logits, temperature, top_k, top_p, min_p, u)
        ids, logp = self._kernels.sample(
            self._kernels.contiguous(logits), temperature, top_k, top_p, min_p,
            converted(u, "u", np.float64), get_num_threads(),
        )  # fmt: skip
        return ids, logp
