"""Losses in NumPy. Over the vocabulary, logits exist only in chunks of rows, never whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

#: Logits held at once, in elements.
_LOGIT_ELEMENTS = 1 << 22


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    size = max(16, _LOGIT_ELEMENTS // max(1, vocabulary))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _logits(
    h: Array, w: Array, b: Array | None, temperature: float = 1.0, out: Array | None = None
) -> Array:
    z: Array = np.matmul(h, w.T, out=out)
    if b is not None:
        z += b
    if temperature != 1.0:
        z /= z.dtype.type(temperature)
    return z


def _log_normalise(z: Array) -> Array:
    """Turn logits into log-probabilities in place; return the log-sum-exp ``[n, 1]``."""
    top = z.max(axis=1, keepdims=True)
    z -= top
    total = np.log(np.exp(z).sum(axis=1, keepdims=True))
    z -= total
    lse: Array = top + total
    return lse


def _probabilities(z: Array, z_ref: Array) -> Array:
    """Return those of `z`; turn both into log-probabilities in place, but 0 where `z` has none."""
    _log_normalise(z)
    _log_normalise(z_ref)
    p = np.exp(z)
    for logp in (z, z_ref):  # 0 (log 0 - log p_ref) is 0
        np.copyto(logp, 0, where=p == 0)
    return p


def _add_head_gradients(
    dz: Array, h: Array, w: Array, dw: Array | None, db: Array | None, need_dh: bool,
    accumulate: bool = True,
) -> Array | None:  # fmt: skip
    """The backward of ``z = h w^T + b`` for one chunk."""
    if dw is not None and accumulate:
        dw += dz.T @ h
    elif dw is not None:
        np.matmul(dz.T, h, out=dw)
    if db is not None:
        db += dz.sum(axis=0)
    return dz @ w if need_dh else None


class LossOps:
    """Cross-entropy, log-probabilities and divergences, and the small losses of heads."""

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
        """Vocabulary projection, log-softmax and negative log-likelihood in one pass.

        Parameters
        ----------
        h : ndarray [N, C]
            Hidden states.
        w : ndarray [V, C]
        targets : ndarray int32 [N]
        weights : ndarray [N], optional
            Weight of each token; rows of weight 0 cost nothing. All 1 when absent.
        b : ndarray [V], optional
        need_dh, need_dw, need_db : bool
            Which gradients to make on the way.

        Returns
        -------
        total : float
            ``-sum_n weights[n] log softmax(h[n] w^T + b)[targets[n]]``, in nats.
        count : float
            Sum of the weights.
        dh, dw, db : ndarray or None
            Gradients of `total`, in scratch of their own.
        """
        weight = np.ones(len(h), h.dtype) if weights is None else np.asarray(weights, h.dtype)
        rows = np.flatnonzero(weight)
        dh = np.zeros_like(h, order="C") if need_dh else None
        dw = np.zeros_like(w, order="C") if need_dw else None
        db = np.zeros(w.shape[0], dtype=w.dtype) if need_db else None
        total = 0.0
        for chunk in _chunks(rows.size, w.shape[0]):
            at = rows[chunk]
            states, scale, target = h[at], weight[at], targets[at]
            z = _logits(states, w, b)
            _log_normalise(z)
            picked = z[np.arange(at.size), target]
            total -= float(np.sum(picked * scale, dtype=np.float64))
            if not (need_dh or need_dw or need_db):
                continue
            np.exp(z, out=z)
            z[np.arange(at.size), target] -= 1.0
            z *= scale[:, None]
            part = _add_head_gradients(z, states, w, dw, db, need_dh)
            if dh is not None and part is not None:
                dh[at] = part
        return total, float(weight.sum(dtype=np.float64)), dh, dw, db

    def linear_logprobs(
        self, h: Array, w: Array, targets: Array, temperature: float = 1.0, b: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """Log-probability of the chosen token, entropy of ``softmax((h w^T + b) / temperature)``.

        Returns
        -------
        logp : ndarray [N]
            ``log p(targets[n])``, nats.
        entropy : ndarray [N]
            ``-sum_v p log p``, nats; a token of probability 0 (logit -inf) adds the limit, 0.
        lse : ndarray [N]
            Log-sum-exp of the scaled logits, for the backward.
        """
        logp, entropy, lse = (np.empty(len(h), dtype=h.dtype) for _ in range(3))
        for chunk in _chunks(len(h), w.shape[0]):
            z = _logits(h[chunk], w, b, temperature)
            lse[chunk] = _log_normalise(z)[:, 0]
            logp[chunk] = z[np.arange(len(z)), targets[chunk]]
            p = np.exp(z)
            np.copyto(z, 0, where=p == 0)
            entropy[chunk] = -np.einsum("nv,nv->n", p, z)
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
        """Gradient of ``h``; logits are recomputed chunk by chunk.

        Without `accumulate` what `dw` holds is overwritten.

        With z the scaled logits: ``d logp / dz = onehot - p`` and
        ``d entropy / dz = -p (log p + entropy)``, in the limit 0 where p is 0.
        """
        dh = np.empty_like(h, order="C") if need_dh else None
        if dw is not None and not accumulate and not len(h):
            dw.fill(0)
        for chunk in _chunks(len(h), w.shape[0]):
            logp = _logits(h[chunk], w, b, temperature)
            logp -= lse[chunk][:, None]
            p = np.exp(logp)
            dz = -dlogp[chunk][:, None] * p
            if dentropy is not None:
                logp += entropy[chunk][:, None]
                np.copyto(logp, 0, where=p == 0)
                logp *= p
                dz -= dentropy[chunk][:, None] * logp
            dz[np.arange(len(dz)), targets[chunk]] += dlogp[chunk]
            dz /= dz.dtype.type(temperature)
            add = accumulate or chunk.start > 0
            part = _add_head_gradients(dz, h[chunk], w, dw, db, need_dh, add)
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
        """Exact ``KL(p || p_ref)`` over the whole vocabulary per token: ``[N]``, nats.

        A token of probability 0 (logit -inf) adds the limit, 0; it is infinite where ``p_ref``
        alone is 0.
        """
        kl = np.empty(len(h), dtype=h.dtype)
        for chunk in _chunks(len(h), w.shape[0]):
            z = _logits(h[chunk], w, b, temperature)
            z_ref = _logits(h_ref[chunk], w_ref, b_ref, temperature)
            p = _probabilities(z, z_ref)
            kl[chunk] = np.einsum("nv,nv->n", p, z - z_ref)
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
        """Gradient of ``h``: ``d KL / dz = p (log p - log p_ref - KL)``; the reference is fixed.

        Where p is 0 it is the limit, 0. Without `accumulate` what `dw` holds is overwritten.
        """
        dh = np.empty_like(h, order="C") if need_dh else None
        if dw is not None and not accumulate and not len(h):
            dw.fill(0)
        for chunk in _chunks(len(h), w.shape[0]):
            z = _logits(h[chunk], w, b, temperature)
            z_ref = _logits(h_ref[chunk], w_ref, b_ref, temperature)
            p = _probabilities(z, z_ref)
            dz = z - z_ref - kl[chunk][:, None]
            np.copyto(dz, 0, where=p == 0)  # also where the divergence is infinite
            dz *= p
            dz *= (dkl[chunk] / z.dtype.type(temperature))[:, None]
            add = accumulate or chunk.start > 0
            part = _add_head_gradients(dz, h[chunk], w, dw, db, need_dh, add)
            if dh is not None and part is not None:
                dh[chunk] = part
        return dh

    def cross_entropy(
        self,
        logits: Array,
        labels: Array,
        class_weights: Array | None = None,
        label_smoothing: float = 0.0,
    ) -> tuple[float, float, Array]:
        """Cross-entropy of ``logits[B, K]`` with class weights and label smoothing, as PyTorch's.

        With ``w`` the class weights, ``e`` the smoothing and ``y`` the label, a row's loss is
        ``-(1 - e) w[y] log p[y] - e / K sum_k w[k] log p[k]`` and its count is ``w[y]``.

        Returns
        -------
        total, count : float
        dlogits : ndarray [B, K]
            Gradient of `total`.
        """
        rows, classes = logits.shape
        weight = np.ones(classes) if class_weights is None else np.asarray(class_weights)
        z = logits.copy()
        if rows:
            _log_normalise(z)
        onehot = np.zeros_like(z)
        onehot[np.arange(rows), labels] = 1.0 - label_smoothing
        target = (onehot + label_smoothing / classes) * weight.astype(z.dtype)
        # A class that is ruled out (a logit of -inf) costs nothing where it is not wanted.
        terms = np.multiply(target, z, out=np.zeros_like(z), where=target != 0)
        total = -float(np.sum(terms, dtype=np.float64))
        count = float(np.sum(weight[labels], dtype=np.float64))
        dlogits = np.exp(z) * target.sum(axis=1, keepdims=True) - target
        return total, count, dlogits

    def binary_cross_entropy(self, logits: Array, targets: Array) -> tuple[float, float, Array]:
        """Binary cross-entropy of ``logits`` and ``targets`` in [0, 1], both of one shape.

        An element's loss is ``softplus(z) - y z``, with its gradient ``sigmoid(z) - y``.

        Returns
        -------
        total, count : float
            `count` is the number of elements.
        dlogits : ndarray
            Gradient of `total`.
        """
        y = targets.astype(logits.dtype)
        decay = np.exp(-np.abs(logits))  # never overflows
        loss = np.maximum(logits, 0) - logits * y + np.log1p(decay)
        sigmoid = np.where(logits >= 0, 1, decay) / (1 + decay)
        return float(np.sum(loss, dtype=np.float64)), float(loss.size), sigmoid - y

    def mse(self, prediction: Array, target: Array) -> tuple[float, float, Array]:
        """Sum of squared errors, number of elements, gradient ``2 (prediction - target)``."""
        difference = prediction - target.astype(prediction.dtype)
        total = float(np.sum(difference * difference, dtype=np.float64))
        return total, float(difference.size), 2 * difference
