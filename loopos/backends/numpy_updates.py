"""Dropout, optimizer updates, reverse scans and sampling in NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from loopos.backends.random_bits import keep_mask

Array = np.ndarray[Any, Any]

#: Elements per block of an update: the block and its scratch stay in cache over a dozen ufuncs.
_BLOCK = 1 << 15


def _blocks(*arrays: Array | None) -> Iterator[tuple[Any, ...]]:
    """Yield matching flat blocks (views) of C-contiguous arrays of one size; None stays None."""
    flat = [None if a is None else a.reshape(-1) for a in arrays]
    size = next(a.size for a in flat if a is not None)
    for start in range(0, size, _BLOCK):
        yield tuple(None if a is None else a[start : start + _BLOCK] for a in flat)


def check_in_place(**arrays: Array | None) -> None:
    """Raise ValueError for an array whose flat blocks would be copies, or that is read-only."""
    for name, array in arrays.items():
        if array is not None and not array.flags.writeable:
            raise ValueError(
                f"{name}: expected an array that may be written, found a read-only one"
            )
        if array is not None and not array.flags.c_contiguous:
            raise ValueError(
                f"{name}: expected a C-contiguous array, found strides {array.strides}"
            )


class AdamwTensor(NamedTuple):
    """A parameter with its gradient, moments and own numbers; see :meth:`UpdateOps.adamw`.

    `rows` says of each row (bool ``[len(p)]``) whether its gradient or its moments may differ from
    0; the others need no more than their decay. None: all rows may.
    """

    p: Array
    g: Array
    m: Array
    v: Array
    learning_rate: float
    weight_decay: float
    step: int
    rows: Array | None = None

    def some_rows(self, decoupled: bool) -> bool:
        """Whether rows are left out: not where the decay of weights is part of the gradient."""
        return self.rows is not None and (decoupled or self.weight_decay == 0)


class UpdateOps:
    """Ops without a layer's shape."""

    # -- dropout -----------------------------------------------------------------------------

    def dropout(self, x: Array, rate: float, key: int, offsets: Array, sample_ids: Array) -> Array:
        """Zero channels with probability `rate`, scale the others by ``1 / (1 - rate)``.

        Parameters
        ----------
        x : ndarray [N, C]
        rate : float
            In [0, 1).
        key : int
            64 bits naming (seed, step, op), see ``random_bits.derive_key``.
        offsets : ndarray int32 [B + 1]
        sample_ids : ndarray int32 [B]
            Index of each sequence in the whole effective batch: masks do not depend on the split.
        """
        lengths = np.diff(offsets)
        positions = np.arange(len(x)) - np.repeat(offsets[:-1], lengths)
        samples = np.repeat(sample_ids, lengths)
        channels = np.arange(x.shape[1])
        return x * keep_mask(key, samples, positions, channels, rate, x.dtype)

    def dropout_backward(
        self, dy: Array, rate: float, key: int, offsets: Array, sample_ids: Array
    ) -> Array:
        """The same mask on the gradient."""
        return self.dropout(dy, rate, key, offsets, sample_ids)

    # -- optimizer -----------------------------------------------------------------------------

    def adamw(
        self,
        p: Array,
        g: Array,
        m: Array,
        v: Array,
        learning_rate: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        step: int,
        grad_scale: float = 1.0,
        decoupled: bool = True,
    ) -> None:
        """One AdamW step in place on `p`, `m`, `v` (Loshchilov and Hutter 2019, algorithm 2).

        Parameters
        ----------
        p, g, m, v : ndarray
            Parameter, gradient, first and second moment, C-contiguous, of one shape.
        step : int
            1 for the first step; corrects the bias of the moments.
        grad_scale : float
            Factor on the gradient: division by a count and clipping, folded in.
        decoupled : bool
            False adds the decay to the gradient instead: Adam with L2 (Kingma and Ba 2015).
        """
        check_in_place(p=p, m=m, v=v)
        f = p.dtype.type
        root = f(1.0 / np.sqrt(1.0 - beta2**step))
        rate = f(learning_rate / (1.0 - beta1**step))
        scratch = np.empty((2, min(_BLOCK, p.size)), dtype=p.dtype)
        for pb, gb, mb, vb in _blocks(p, g, m, v):
            t, u = scratch[0, : pb.size], scratch[1, : pb.size]
            np.multiply(gb, f(grad_scale), out=t)
            if weight_decay and not decoupled:
                np.multiply(pb, f(weight_decay), out=u)
                t += u
            mb *= f(beta1)
            np.multiply(t, f(1.0 - beta1), out=u)
            mb += u
            vb *= f(beta2)
            t *= t
            t *= f(1.0 - beta2)
            vb += t
            np.sqrt(vb, out=t)
            t *= root
            t += f(eps)
            np.divide(mb, t, out=t)
            t *= rate
            if weight_decay and decoupled:
                pb *= f(1.0 - learning_rate * weight_decay)
            pb -= t

    def adamw_many(
        self,
        tensors: Sequence[AdamwTensor],
        beta1: float,
        beta2: float,
        eps: float,
        grad_scale: float = 1.0,
        decoupled: bool = True,
    ) -> None:
        """One :meth:`adamw` step of every tensor."""
        for t in tensors:
            arrays = (t.p, t.g, t.m, t.v)
            if t.some_rows(decoupled):
                arrays = (t.p[t.rows], t.g[t.rows], t.m[t.rows], t.v[t.rows])
            self.adamw(
                *arrays, t.learning_rate, beta1, beta2, eps, t.weight_decay, t.step, grad_scale,
                decoupled,
            )  # fmt: skip
            if t.some_rows(decoupled):
                if t.weight_decay:
                    t.p[...] *= t.p.dtype.type(1.0 - t.learning_rate * t.weight_decay)
                t.p[t.rows], _, t.m[t.rows], t.v[t.rows] = arrays

    def sgd(
        self,
        p: Array,
        g: Array,
        momentum_buffer: Array | None,
        learning_rate: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        first_step: bool = False,
        grad_scale: float = 1.0,
    ) -> None:
        """One step of SGD with momentum in place, as PyTorch's: ``buf = momentum buf + g``.

        On the first step the buffer becomes the gradient.
        """
        check_in_place(p=p, momentum_buffer=momentum_buffer)
        f = p.dtype.type
        for pb, gb, mb in _blocks(p, g, momentum_buffer):
            t = gb * f(grad_scale)
            if weight_decay:
                t += f(weight_decay) * pb
            if mb is not None:
                if first_step:
                    mb[...] = t
                else:
                    mb *= f(momentum)
                    mb += t
                t = t + f(momentum) * mb if nesterov else mb.copy()
            t *= f(learning_rate)
            pb -= t

    def sum_squares(self, arrays: Sequence[Array]) -> float:
        """Sum of the squares of all elements, by fixed blocks whose sums add up in float64."""
        total = 0.0
        for array in arrays:
            if array.size:
                total += sum(float(np.dot(block, block)) for (block,) in _blocks(array))
        return total

    def scale(self, x: Array, factor: float) -> None:
        """Multiply `x` by `factor` in place."""
        x *= x.dtype.type(factor)

    # -- scans ---------------------------------------------------------------------------------

    def discounted_sum(self, x: Array, offsets: Array, gamma: float) -> Array:
        """``y[t] = x[t] + gamma y[t + 1]`` within each sequence, 0 after its end: ``[N]``."""
        y = np.array(x, copy=True, order="C")
        lengths, ends = np.diff(offsets), offsets[1:]
        for back in range(2, int(lengths.max(initial=0)) + 1):
            at = ends[lengths >= back] - back
            y[at] += x.dtype.type(gamma) * y[at + 1]
        return y

    def gae(
        self, rewards: Array, values: Array, offsets: Array, gamma: float, lam: float
    ) -> tuple[Array, Array]:
        """Generalised advantage estimation (Schulman et al. 2016, eq. 16), value 0 after the end.

        Parameters
        ----------
        rewards, values : ndarray [N]
            Per response token.
        offsets : ndarray int32 [B + 1]
        gamma, lam : float

        Returns
        -------
        advantages, returns : ndarray [N]
            ``A[t] = delta[t] + gamma lam A[t + 1]``, ``delta[t] = r[t] + gamma V[t + 1] - V[t]``;
            ``returns = advantages + values``.
        """
        following = np.zeros_like(values)
        following[:-1] = values[1:]
        following[offsets[1:][np.diff(offsets) > 0] - 1] = 0
        delta = rewards + rewards.dtype.type(gamma) * following - values
        advantages = self.discounted_sum(delta, offsets, gamma * lam)
        return advantages, advantages + values

    # -- sampling ------------------------------------------------------------------------------

    def sample(
        self,
        logits: Array,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        u: Array,
    ) -> tuple[Array, Array]:
        """Draw one token a row by inverting the cumulative distribution in vocabulary order.

        Parameters
        ----------
        logits : ndarray [B, V]
        temperature : float
            0 takes the largest logit, the first one among equals.
        top_k : int
            Keep the k most likely (all that tie with the k-th); 0 keeps all.
        top_p : float
            Then keep the smallest set with at least this share of the probability; 1 keeps all.
        min_p : float
            Then keep what has at least this multiple of the largest probability; 0 keeps all.
        u : ndarray [B]
            Uniform numbers in [0, 1), one a row.

        Returns
        -------
        ids : ndarray int32 [B]
        logp : ndarray [B]
            Under the temperature-scaled distribution before any truncation (at temperature 0: under
            temperature 1).
        """
        z = logits.astype(np.float64) / (temperature or 1.0)
        z -= z.max(axis=1, keepdims=True)
        z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
        rows = np.arange(len(z))
        if temperature == 0:
            ids = np.argmax(logits, axis=1)
        else:
            p = np.exp(z)
            if top_k and top_k < p.shape[1]:
                kth = np.partition(p, -top_k, axis=1)[:, -top_k]
                p[p < kth[:, None]] = 0
            if top_p < 1.0:
                order = np.argsort(-p, axis=1, kind="stable")
                ranked = np.take_along_axis(p, order, axis=1)
                before = np.cumsum(ranked, axis=1) - ranked
                ranked[before >= top_p * p.sum(axis=1, keepdims=True)] = 0
                np.put_along_axis(p, order, ranked, axis=1)
            if min_p > 0:
                p[p < min_p * p.max(axis=1, keepdims=True)] = 0
            cumulative = np.cumsum(p, axis=1)
            below = cumulative <= (np.asarray(u, np.float64) * cumulative[:, -1])[:, None]
            ids = below.sum(axis=1)
            # u can round up to the total: stay on the last token that is kept.
            last = p.shape[1] - 1 - np.argmax(p[:, ::-1] > 0, axis=1)
            ids = np.minimum(ids, last)
        return ids.astype(np.int32), z[rows, ids].astype(logits.dtype)
