"""Norms, activations, embeddings, dropout and optimizer updates of the Cython backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loopos.backends.numpy_backend import (
    ACTIVATIONS,
    AdamwTensor,
    Array,
    NumpyBackend,
    column_sizes,
)
from loopos.backends.threads import get_num_threads


class CythonElementwise(NumpyBackend):
    """What walks over arrays once; each method does what :class:`NumpyBackend` says of it."""

    _kernels: Any

    # -- activations -------------------------------------------------------------------------

    def activation(self, x: Array, kind: str) -> Array:
        """See :meth:`NumpyBackend.activation`."""
        if not self._kernels.single(x=x) or kind not in ACTIVATIONS:
            return super().activation(x, kind)
        y: Array = self._kernels.activation(self._kernels.contiguous(x), kind, get_num_threads())
        return y

    def activation_backward(self, dy: Array, x: Array, kind: str) -> Array:
        """See :meth:`NumpyBackend.activation_backward`."""
        if not self._kernels.single(dy=dy, x=x) or kind not in ACTIVATIONS:
            return super().activation_backward(dy, x, kind)
        dx: Array = self._kernels.activation_backward(
            self._kernels.contiguous(dy), self._kernels.contiguous(x), kind, get_num_threads()
        )
        return dx

    def swiglu(self, gate: Array, up: Array) -> Array:
        """See :meth:`NumpyBackend.swiglu`."""
        if not self._kernels.single(gate=gate, up=up):
            return super().swiglu(gate, up)
        gate, up = self._kernels.all_contiguous(gate, up)
        y: Array = self._kernels.swiglu(gate, up, get_num_threads())
        return y

    def swiglu_backward(self, dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        """See :meth:`NumpyBackend.swiglu_backward`."""
        if not self._kernels.single(dy=dy, gate=gate, up=up):
            return super().swiglu_backward(dy, gate, up)
        dy, gate, up = self._kernels.all_contiguous(dy, gate, up)
        dgate, dup = self._kernels.swiglu_backward(dy, gate, up, get_num_threads())
        return dgate, dup

    def add(self, a: Array, b: Array, scale: float = 1.0) -> Array:
        """See :meth:`NumpyBackend.add`."""
        if not self._kernels.single(a=a, b=b):
            return super().add(a, b, scale)
        a, b = self._kernels.all_contiguous(a, b)
        y: Array = self._kernels.add(a, b, scale, None, get_num_threads())
        return y

    # -- norms -------------------------------------------------------------------------------

    def layer_norm(
        self, x: Array, g: Array, b: Array | None, eps: float, residual: Array | None = None
    ) -> tuple[Array, Array, Array, Array]:
        """See :meth:`NumpyBackend.layer_norm`."""
        if not self._kernels.single(x=x, g=g, b=b, residual=residual):
            return super().layer_norm(x, g, b, eps, residual)
        x, residual, g, b = self._kernels.all_contiguous(x, residual, g, b)
        y, s, mean, rstd = self._kernels.norm(x, residual, g, b, True, eps, get_num_threads())
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
        """See :meth:`NumpyBackend.layer_norm_backward`."""
        if not self._kernels.single(dy=dy, s=s, g=g, ds=ds):
            return super().layer_norm_backward(
                dy, s, g, mean, rstd, ds, dg=dg, db=db, need_dx=need_dx
            )
        if mean is None:  # by which the kernel knows an RMS norm
            raise ValueError("mean: expected a NumPy array of float32, found None")
        return self._norm_backward(dy, s, g, mean, rstd, ds, dg, db, need_dx)

    def rms_norm(
        self, x: Array, g: Array, eps: float, residual: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """See :meth:`NumpyBackend.rms_norm`."""
        if not self._kernels.single(x=x, g=g, residual=residual):
            return super().rms_norm(x, g, eps, residual)
        x, residual, g = self._kernels.all_contiguous(x, residual, g)
        y, s, _, rstd = self._kernels.norm(x, residual, g, None, False, eps, get_num_threads())
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
        """See :meth:`NumpyBackend.rms_norm_backward`."""
        if not self._kernels.single(dy=dy, s=s, g=g, ds=ds):
            return super().rms_norm_backward(dy, s, g, rstd, ds, dg=dg, need_dx=need_dx)
        return self._norm_backward(dy, s, g, None, rstd, ds, dg, None, need_dx)

    def _norm_backward(
        self,
        dy: Array,
        s: Array,
        g: Array,
        mean: Array | None,
        rstd: Array,
        ds: Array | None,
        dg: Array | None,
        db: Array | None,
        need_dx: bool,
    ) -> Array | None:
        dy, s, g, mean, rstd, ds = self._kernels.all_contiguous(dy, s, g, mean, rstd, ds)
        dx: Array | None = self._kernels.norm_backward(
            dy, s, g, mean, rstd, ds, dg, db, need_dx, get_num_threads()
        )
        return dx

    # -- rows --------------------------------------------------------------------------------

    def embedding(self, ids: Array, table: Array) -> Array:
        """See :meth:`NumpyBackend.embedding`."""
        return self.gather_rows(table, ids)

    def embedding_backward(
        self, dy: Array, ids: Array, dtable: Array, accumulate: bool = True
    ) -> None:
        """See :meth:`NumpyBackend.embedding_backward`."""
        if not self._kernels.single(dy=dy, dtable=dtable):
            super().embedding_backward(dy, ids, dtable, accumulate)
            return
        if not dtable.flags.c_contiguous:  # made flat below, it would be a copy that takes the sums
            raise ValueError(
                f"dtable: expected a C-contiguous array, found strides {dtable.strides}"
            )
        if not accumulate:
            self._kernels.fill(dtable, 0.0, get_num_threads())
        rows = self._kernels.row_numbers(ids, "ids", len(dtable))
        dy = self._kernels.contiguous(dy).reshape(len(dy), int(np.prod(dy.shape[1:])))
        table = dtable.reshape(len(dtable), int(np.prod(dtable.shape[1:])))
        self._kernels.add_rows(dy, rows, table, get_num_threads())

    def gather_rows(self, x: Array, rows: Array) -> Array:
        """See :meth:`NumpyBackend.gather_rows`."""
        if not self._kernels.single(x=x) or x.ndim < 2:
            return super().gather_rows(x, rows)
        flat = self._kernels.contiguous(x).reshape(len(x), int(np.prod(x.shape[1:])))
        taken: Array = self._kernels.take_rows(
            flat, self._kernels.row_numbers(rows, "rows", len(x)), get_num_threads()
        )
        return taken.reshape(len(taken), *x.shape[1:])

    def gather_rows_backward(self, dy: Array, rows: Array, num_rows: int) -> Array:
        """See :meth:`NumpyBackend.gather_rows_backward`."""
        if not self._kernels.single(dy=dy):
            return super().gather_rows_backward(dy, rows, num_rows)
        dx: Array = self._kernels.empty((num_rows, *dy.shape[1:]))
        self.embedding_backward(dy, rows, dx, accumulate=False)
        return dx

    def split_columns(self, x: Array, sizes: Sequence[int]) -> list[Array]:
        """See :meth:`NumpyBackend.split_columns`."""
        if not self._kernels.single(x=x):
            return super().split_columns(x, sizes)
        parts: list[Array] = self._kernels.split_columns(
            self._kernels.contiguous(x), column_sizes(x, sizes), get_num_threads()
        )
        return parts

    # -- dropout -----------------------------------------------------------------------------

    def dropout(self, x: Array, rate: float, key: int, offsets: Array, sample_ids: Array) -> Array:
        """See :meth:`NumpyBackend.dropout`."""
        if not self._kernels.single(x=x):
            return super().dropout(x, rate, key, offsets, sample_ids)
        lengths = np.diff(offsets)
        positions = np.arange(len(x), dtype=np.int64) - np.repeat(offsets[:-1], lengths)
        samples = np.repeat(np.asarray(sample_ids, np.int64), lengths)
        y: Array = self._kernels.dropout(
            self._kernels.contiguous(x), rate, key, samples, positions, get_num_threads()
        )
        return y

    # -- updates of parameters -------------------------------------------------------------------

    def adamw_many(
        self,
        tensors: Sequence[AdamwTensor],
        beta1: float,
        beta2: float,
        eps: float,
        grad_scale: float = 1.0,
        decoupled: bool = True,
    ) -> None:
        """See :meth:`NumpyBackend.adamw_many`; one pass over all of them."""
        wide = [t for t in tensors if not self._kernels.single(p=t.p, g=t.g, m=t.m, v=t.v)]
        super().adamw_many(wide, beta1, beta2, eps, grad_scale, decoupled)
        narrow = [
            t._replace(g=self._kernels.contiguous(t.g))
            for t in tensors
            if self._kernels.single(p=t.p, g=t.g, m=t.m, v=t.v)
        ]
        self._kernels.adamw(narrow, beta1, beta2, eps, grad_scale, decoupled, get_num_threads())

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
        """See :meth:`NumpyBackend.adamw`."""
        if not self._kernels.single(p=p, g=g, m=m, v=v):
            super().adamw(
                p, g, m, v, learning_rate, beta1, beta2, eps, weight_decay, step, grad_scale,
                decoupled,
            )  # fmt: skip
            return
        tensor = AdamwTensor(
            p, self._kernels.contiguous(g), m, v, learning_rate, weight_decay, step
        )
        self._kernels.adamw([tensor], beta1, beta2, eps, grad_scale, decoupled, get_num_threads())

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
        """See :meth:`NumpyBackend.sgd`; one pass over memory."""
        if not self._kernels.single(p=p, g=g, momentum_buffer=momentum_buffer):
            super().sgd(
                p, g, momentum_buffer, learning_rate, momentum, weight_decay, nesterov, first_step,
                grad_scale,
            )  # fmt: skip
            return
        self._kernels.sgd(
            p, self._kernels.contiguous(g), momentum_buffer, learning_rate, momentum, weight_decay,
            nesterov, first_step, grad_scale, get_num_threads(),
        )  # fmt: skip

    def sum_squares(self, arrays: Sequence[Array]) -> float:
        """See :meth:`NumpyBackend.sum_squares`; one pass over all of them."""
        narrow = [self._kernels.contiguous(a) for a in arrays if self._kernels.single(arrays=a)]
        wide = [a for a in arrays if not self._kernels.single(arrays=a)]
        total: float = self._kernels.sum_squares(narrow, get_num_threads())
        return total + (super().sum_squares(wide) if wide else 0.0)

    def scale(self, x: Array, factor: float) -> None:
        """See :meth:`NumpyBackend.scale`."""
        if not self._kernels.single(x=x) or not x.flags.c_contiguous:
            super().scale(x, factor)
            return
        self._kernels.scale(x, factor, x, get_num_threads())
