"""The NumPy backend: every op, readable and vectorised, in float32 and float64.

This is the contract and the oracle: other backends subclass :class:`NumpyBackend` and override what
they make faster, and every gradient is checked against it in float64.

Conventions
-----------
``N`` tokens, ``B`` sequences, ``C`` width, ``H`` query heads, ``Hk`` key/value heads, ``D`` head
size, ``F`` hidden width, ``V`` vocabulary. Weights are ``[out, in]``. Sequences lie one after the
other; ``offsets`` (int32, ``[B + 1]``) says where each begins. ``dx`` is the gradient of ``x``.

A forward returns its output, or a tuple when a backward needs more than the inputs. A backward
*returns* gradients of activations and *adds* gradients of weights into the buffers handed in
(``dw``, ``db``, ``dg``, ``dtable``); None there means frozen, and costs nothing. Inputs are never
changed.

The op groups: dense ops here, attention in ``numpy_attention``, losses over the vocabulary in
``numpy_losses``, optimizer updates, scans, sampling and dropout in ``numpy_updates``, weights of
fewer bits in ``numpy_quantized``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from loopos.backends.numpy_attention import AttentionOps
from loopos.backends.numpy_losses import LossOps
from loopos.backends.numpy_quantized import QuantizedOps
from loopos.backends.numpy_updates import AdamwTensor, UpdateOps
from loopos.errors import BackendError, nearest

Array = np.ndarray[Any, Any]
#: Computes what a function returns, again and again; see :meth:`NumpyBackend.repeater`.
Repeater: TypeAlias = Callable[[Callable[[], Array]], Array]

__all__ = ["ACTIVATIONS", "AdamwTensor", "Array", "NumpyBackend", "Repeater"]

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "tanh")
_SQRT_2_OVER_PI = 0.7978845608028654
_SQRT_HALF = 0.7071067811865476


def _sigmoid(x: Array) -> Array:
    from scipy.special import expit

    result: Array = expit(x)
    return result


def _tanh_inner(x: Array) -> Array:
    """The tanh of the tanh-approximated GELU: tanh(sqrt(2/pi) (x + 0.044715 x^3))."""
    inner = x * x
    inner *= 0.044715
    inner += 1.0
    inner *= x
    inner *= _SQRT_2_OVER_PI
    return np.tanh(inner, out=inner)


def _normal_cdf(x: Array) -> Array:
    from scipy.special import erf

    cdf: Array = erf(x * _SQRT_HALF)
    cdf += 1.0
    cdf *= 0.5
    return cdf


def column_sizes(x: Array, sizes: Sequence[int]) -> list[int]:
    """Return the sizes of parts that have the columns of ``x[N, C]`` together.

    Raises
    ------
    TypeError
        If some are no whole numbers.
    ValueError
        If one is negative, they are more or fewer columns, or `x` has other than two axes.
    """
    if x.ndim != 2:
        raise ValueError(f"x: expected shape [any, any], found {list(x.shape)}")
    try:
        whole = [operator.index(size) for size in sizes]
    except TypeError:
        raise TypeError(f"sizes: expected whole numbers, found {sizes!r}") from None
    if sum(whole) != x.shape[1] or min(whole, default=0) < 0:
        raise ValueError(f"sizes: expected {x.shape[1]} columns in all, found {whole}")
    return whole


class DenseOps:
    """Linear maps, embeddings, norms, activations and pooling."""

    # -- linear ------------------------------------------------------------------------------

    @staticmethod
    def _product(a: Array, b: Array) -> Array:
        product: Array = a @ b
        return product

    def linear(
        self, x: Array, w: Array, b: Array | None = None, activation: str | None = None
    ) -> tuple[Array, Array | None]:
        """``y = act(x w^T + b)``.

        Parameters
        ----------
        x : ndarray [N, C]
        w : ndarray [O, C]
        b : ndarray [O], optional
        activation : str, optional
            One of ``ACTIVATIONS``, fused.

        Returns
        -------
        y : ndarray [N, O]
        pre : ndarray [N, O] or None
            The argument of the activation, for the backward; None without activation.
        """
        y = self._product(x, w.T)
        if b is not None:
            y += b
        if activation is None:
            return y, None
        return self.activation(y, activation), y

    def linears(self, x: Array, layers: Sequence[tuple[Array, Array | None]]) -> list[Array]:
        """``x w^T + b`` for each ``(w, b)`` of some layers with one input; see :meth:`linear`."""
        return [self.linear(x, w, b)[0] for w, b in layers]

    def decode_linears(
        self,
        x: Array,
        layers: Sequence[tuple[Array, Array | None]],
        activation: str | None = None,
    ) -> list[Array]:
        """``act(x w^T + b)`` for each layer in a step of decoding: few rows, no gradient.

        A backend may compute these in another order of summation than :meth:`linears`, the same
        for one row and for many.
        """
        return [self.linear(x, w, b, activation)[0] for w, b in layers]

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
        """``dx = dz w``, ``dw += dz^T x``, ``db += sum_n dz`` with ``dz = dy act'(pre)``.

        `x` may be None where `dw` is. Without `accumulate` what `dw` holds is overwritten; a `dx`
        that is given is added to.
        """
        if activation is not None and pre is not None:
            dy = self.activation_backward(dy, pre, activation)
        if dw is not None:
            assert x is not None
            if accumulate:
                dw += dy.T @ x
            else:
                np.matmul(dy.T, x, out=dw)
        if db is not None:
            db += dy.sum(axis=0)
        if not need_dx:
            return None
        product = self._product(dy, w)
        if dx is None:
            return product
        dx += product
        return dx

    def add(self, a: Array, b: Array, scale: float = 1.0) -> Array:
        """``a + scale b`` of one shape."""
        return a + b if scale == 1.0 else a + a.dtype.type(scale) * b

    # -- embedding ---------------------------------------------------------------------------

    def embedding(self, ids: Array, table: Array) -> Array:
        """Rows of ``table[V, C]`` at ``ids[N]``: ``[N, C]``."""
        return np.take(table, ids, axis=0)

    def embedding_backward(
        self, dy: Array, ids: Array, dtable: Array, accumulate: bool = True
    ) -> None:
        """Add ``dy[n]`` to ``dtable[ids[n]]``, rows of one id in the order in which they stand.

        Without `accumulate` the other rows become 0.
        """
        if not accumulate:
            dtable.fill(0)
        if ids.size == 0:
            return
        if ids.min() < 0:
            ids = np.arange(len(dtable))[ids]  # a row has one name only
        order = np.argsort(ids, kind="stable")
        unique, starts = np.unique(ids[order], return_index=True)
        dtable[unique] += np.add.reduceat(dy[order], starts, axis=0)

    # -- norms -------------------------------------------------------------------------------

    def layer_norm(
        self, x: Array, g: Array, b: Array | None, eps: float, residual: Array | None = None
    ) -> tuple[Array, Array, Array, Array]:
        """Layer normalisation of ``s = x + residual`` (Ba et al. 2016), biased variance.

        Parameters
        ----------
        x, residual : ndarray [N, C]
        g, b : ndarray [C]
        eps : float
            Added to the variance.

        Returns
        -------
        y : ndarray [N, C]
            ``(s - mean) * rstd * g + b``.
        s : ndarray [N, C]
            The sum; `x` itself without residual.
        mean, rstd : ndarray [N, 1]
        """
        s = x if residual is None else x + residual
        mean = s.mean(axis=1, keepdims=True)
        y = s - mean
        variance = np.mean(y * y, axis=1, keepdims=True)
        rstd = 1.0 / np.sqrt(variance + s.dtype.type(eps))
        y *= rstd
        y *= g
        if b is not None:
            y += b
        return y, s, mean, rstd

    def layer_norm_backward(
        self,
        dy: Array,
        s: Array,
        g: Array,
        mean: Array,
        rstd: Array,
        ds: Array | None = None,
        *,
        dg: Array | None = None,
        db: Array | None = None,
        need_dx: bool = True,
    ) -> Array | None:
        """Gradient of ``s`` (so of ``x`` and the residual); ``ds`` arrives over the sum itself."""
        normalised = (s - mean) * rstd
        if dg is not None:
            dg += np.einsum("nc,nc->c", dy, normalised)
        if db is not None:
            db += dy.sum(axis=0)
        if not need_dx:
            return None
        scaled = dy * g
        projection = np.mean(scaled * normalised, axis=1, keepdims=True)
        dx = scaled - scaled.mean(axis=1, keepdims=True)
        dx -= normalised * projection
        dx *= rstd
        return dx if ds is None else dx + ds

    def rms_norm(
        self, x: Array, g: Array, eps: float, residual: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """``y = s * rstd * g``, ``rstd = 1 / sqrt(mean(s^2) + eps)`` (Zhang and Sennrich 2019).

        Returns ``y[N, C]``, the sum ``s = x + residual`` and ``rstd[N, 1]``.
        """
        s = x if residual is None else x + residual
        rstd = 1.0 / np.sqrt(np.mean(s * s, axis=1, keepdims=True) + s.dtype.type(eps))
        y = s * rstd
        y *= g
        return y, s, rstd

    def rms_norm_backward(
        self,
        dy: Array,
        s: Array,
        g: Array,
        rstd: Array,
        ds: Array | None = None,
        *,
        dg: Array | None = None,
        need_dx: bool = True,
    ) -> Array | None:
        """Gradient of ``s``; ``dg`` is added to. ``ds`` arrives over the sum itself."""
        normalised = s * rstd
        if dg is not None:
            dg += np.einsum("nc,nc->c", dy, normalised)
        if not need_dx:
            return None
        dx = dy * g
        projection = np.mean(dx * normalised, axis=1, keepdims=True)
        dx -= normalised * projection
        dx *= rstd
        return dx if ds is None else dx + ds

    # -- activations -------------------------------------------------------------------------

    def activation(self, x: Array, kind: str) -> Array:
        """Elementwise ``gelu`` (erf), ``gelu_tanh``, ``relu``, ``silu`` or ``tanh``.

        Source: Hendrycks and Gimpel 2016 for both GELUs and SiLU.

        Raises
        ------
        BackendError
            If `kind` is another word.
        """
        if kind == "gelu":
            return x * _normal_cdf(x)
        if kind == "gelu_tanh":
            y = _tanh_inner(x)
            y += 1.0
            y *= x
            y *= 0.5
            return y
        if kind == "relu":
            return np.maximum(x, 0)
        if kind == "silu":
            return x * _sigmoid(x)
        if kind == "tanh":
            return np.tanh(x)
        raise BackendError(f"unknown activation '{kind}'{nearest(kind, ACTIVATIONS)}")

    def activation_backward(self, dy: Array, x: Array, kind: str) -> Array:
        """``dx = dy act'(x)``, the derivative recomputed from the input."""
        if kind == "gelu":
            density = np.exp(-0.5 * x * x) * x.dtype.type(0.3989422804014327)
            return dy * (_normal_cdf(x) + x * density)
        if kind == "gelu_tanh":
            t = _tanh_inner(x)
            slope = x * x
            slope *= 3 * 0.044715
            slope += 1.0
            slope *= _SQRT_2_OVER_PI
            slope *= x
            slope *= 1.0 - t * t
            slope += t
            slope += 1.0
            slope *= 0.5
            slope *= dy
            return slope
        if kind == "relu":
            return dy * (x > 0)
        if kind == "silu":
            gate = _sigmoid(x)
            return dy * (gate * (1.0 + x * (1.0 - gate)))
        if kind == "tanh":
            t = np.tanh(x)
            return dy * (1.0 - t * t)
        raise BackendError(f"unknown activation '{kind}'{nearest(kind, ACTIVATIONS)}")

    def swiglu(self, gate: Array, up: Array) -> Array:
        """``silu(gate) * up`` (Shazeer 2020), all ``[N, F]``."""
        return gate * _sigmoid(gate) * up

    def swiglu_backward(self, dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        """Gradients of ``gate`` and ``up``."""
        opened = _sigmoid(gate)
        dgate = dy * up * (opened * (1.0 + gate * (1.0 - opened)))
        return dgate, dy * (gate * opened)

    # -- rows and segments ---------------------------------------------------------------------

    def gather_rows(self, x: Array, rows: Array) -> Array:
        """``x[rows]`` for ``x[N, ...]`` and ``rows[R]``."""
        return np.take(x, rows, axis=0)

    def gather_rows_backward(self, dy: Array, rows: Array, num_rows: int) -> Array:
        """Scatter-add of ``dy[R, ...]`` into a zero array with `num_rows` rows, in order."""
        dx = np.zeros((num_rows, *dy.shape[1:]), dtype=dy.dtype)
        self.embedding_backward(dy, rows, dx)
        return dx

    def split_columns(self, x: Array, sizes: Sequence[int]) -> list[Array]:
        """``x[N, C]`` cut into ``[N, size]`` for each of `sizes`, which add up to ``C``."""
        ends = np.cumsum(column_sizes(x, sizes))
        return [part.copy() for part in np.split(x, ends[:-1], axis=1)]

    def segment_last(self, x: Array, offsets: Array) -> Array:
        """The last row of each sequence: ``[B, C]``. Sequences must not be empty."""
        return self.gather_rows(x, offsets[1:] - 1)

    def segment_mean(self, x: Array, offsets: Array) -> Array:
        """The mean row of each sequence: ``[B, C]``; zeros for an empty one."""
        lengths = np.diff(offsets)
        y = np.zeros((lengths.size, *x.shape[1:]), dtype=x.dtype)
        filled = lengths > 0
        if filled.any():
            y[filled] = np.add.reduceat(x, offsets[:-1][filled], axis=0)
            y[filled] /= lengths[filled][:, None]
        return y

    def segment_mean_backward(self, dy: Array, offsets: Array) -> Array:
        """Each token gets its sequence's gradient over its length: ``[N, C]``."""
        lengths = np.diff(offsets)
        share = dy / np.maximum(lengths, 1)[:, None].astype(dy.dtype)
        return np.repeat(share, lengths, axis=0)


class NumpyBackend(DenseOps, AttentionOps, LossOps, UpdateOps, QuantizedOps):
    """The reference backend; see the module's docstring for conventions."""

    name = "numpy"

    @classmethod
    def unavailable(cls) -> str | None:
        """Return why this backend cannot run here, or None when it can."""
        return None

    @classmethod
    def ops(cls) -> list[str]:
        """Return the names of all ops, sorted."""
        meta = {"ops", "describe", "unavailable", "repeater"}
        return sorted(
            name
            for name in dir(NumpyBackend)
            if not name.startswith("_") and name not in meta and callable(getattr(cls, name))
        )

    def repeater(self) -> Repeater:
        """Return what computes one thing again and again, such as a step of decoding.

        It is called with a function that does nothing but compute an array by ops. From one call
        to the next only the contents of arrays may differ that stay where they are, never their
        places, shapes or a number: a backend may then leave the function out and call its kernels
        with what they were given before (as a CUDA graph does). This one always calls the function.

        Returns
        -------
        callable
            For one thread. Its result may be overwritten by its next call. Let go of it before:
            while it lives its memory is not free, and the next one lies elsewhere.
        """
        return lambda compute: compute()

    def describe(self) -> dict[str, Any]:
        """Return what runs: ``name``, ``isa``, ``threads``, ``native`` and ``inherited`` ops.

        ``products`` says which library multiplies matrices. BLAS chooses its own order of
        summation, so the promise of equal bytes at any thread count does not cover it.
        """
        from loopos.backends.threads import blas

        library = blas()
        native = [op for op in self.ops() if _owner(type(self), op) is not _owner(NumpyBackend, op)]
        if type(self) is NumpyBackend:
            native = self.ops()
        return {
            "name": self.name,
            "isa": library.architecture,
            "threads": library.num_threads,
            "native": native,
            "inherited": sorted(set(self.ops()) - set(native)),
            "products": f"{library.name} (order of summation is the library's own)",
        }


def _owner(backend: type, op: str) -> type:
    """Return the class in which `backend` finds the method `op`."""
    return next(cls for cls in backend.__mro__ if op in vars(cls))
