"""Updates of parameters and what they need, one pass over memory on all threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loopos.backends import numba_compile
from loopos.backends.numba_pool import POOL
from loopos.backends.numba_support import as_input, expect, one_of
from loopos.backends.numpy_updates import UpdateOps, check_in_place

Array = np.ndarray[Any, Any]


class NumbaUpdates(UpdateOps):
    """The optimizers of ``numpy_updates``, sums of squares and scaling."""

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
        """One AdamW step in place, one pass over memory."""
        if not one_of(p, g, m, v):
            super().adamw(
                p, g, m, v, learning_rate, beta1, beta2, eps, weight_decay, step, grad_scale,
                decoupled,
            )  # fmt: skip
            return
        kernels, _ = numba_compile.compiled()
        check_in_place(p=p, m=m, v=v)
        expect(p.shape, g=g, m=m, v=v)
        keep = 1.0 - learning_rate * weight_decay if decoupled else 1.0
        constants = (
            grad_scale, weight_decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2,
            1.0 / np.sqrt(1.0 - beta2**step), eps, learning_rate / (1.0 - beta1**step), keep,
        )  # fmt: skip
        POOL.run(
            kernels.adamw, -(-p.size // kernels.ELEMENTS), p.size,
            p.reshape(-1), as_input(g).reshape(-1), m.reshape(-1), v.reshape(-1),
            np.array(constants, p.dtype), decoupled,
        )  # fmt: skip

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
        """One step of SGD with momentum in place, one pass over memory."""
        if not one_of(p, g, momentum_buffer):
            super().sgd(
                p, g, momentum_buffer, learning_rate, momentum, weight_decay, nesterov, first_step,
                grad_scale,
            )  # fmt: skip
            return
        kernels, _ = numba_compile.compiled()
        check_in_place(p=p, momentum_buffer=momentum_buffer)
        expect(p.shape, g=g, momentum_buffer=momentum_buffer)
        buffer = np.empty(0, p.dtype) if momentum_buffer is None else momentum_buffer.reshape(-1)
        constants = np.array((grad_scale, weight_decay, momentum, learning_rate), p.dtype)
        POOL.run(
            kernels.sgd, -(-p.size // kernels.ELEMENTS), p.size,
            p.reshape(-1), as_input(g).reshape(-1), buffer, constants,
            momentum_buffer is not None, bool(nesterov), bool(first_step),
        )  # fmt: skip

    def sum_squares(self, arrays: Sequence[Array]) -> float:
        """Sum of squares by fixed blocks, each summed in float64, added in their order."""
        kernels, _ = numba_compile.compiled()
        total = 0.0
        for array in arrays:
            if not one_of(array):
                total += super().sum_squares([array])
                continue
            sums = np.zeros(-(-array.size // kernels.ELEMENTS))
            POOL.run(
                kernels.sum_squares, sums.size, array.size // 2, as_input(array).reshape(-1), sums
            )
            total += sum(sums.tolist())
        return total

    def scale(self, x: Array, factor: float) -> None:
        """Multiply `x` by `factor` in place."""
        if not (x.flags.carray and one_of(x)):
            super().scale(x, factor)
            return
        kernels, _ = numba_compile.compiled()
        flat, blocks = x.reshape(-1), -(-x.size // kernels.ELEMENTS)
        POOL.run(kernels.scale, blocks, x.size // 2, flat, x.dtype.type(factor))
