"""Updates of parameters and what they need, one pass over memory on all threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loopos.backends import numba_compile
from loopos.backends.numba_pool import POOL, Run
from loopos.backends.numba_support import as_input, expect, one_of
from loopos.backends.numpy_updates import AdamwTensor, UpdateOps, check_in_place

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
        tensor = AdamwTensor(p, g, m, v, learning_rate, weight_decay, step)
        self.adamw_many([tensor], beta1, beta2, eps, grad_scale, decoupled)

    def adamw_many(
        self,
        tensors: Sequence[AdamwTensor],
        beta1: float,
        beta2: float,
        eps: float,
        grad_scale: float = 1.0,
        decoupled: bool = True,
    ) -> None:
        """One AdamW step of every tensor, all of them at once."""
        kernels, _ = numba_compile.compiled()
        runs: list[Run] = []
        work = 0
        for t in tensors:
            if not one_of(t.p, t.g, t.m, t.v):  # all rows: those left out come out the same
                super().adamw(
                    *t[:4], t.learning_rate, beta1, beta2, eps, t.weight_decay, t.step, grad_scale,
                    decoupled,
                )  # fmt: skip
                continue
            check_in_place(p=t.p, m=t.m, v=t.v)
            expect(t.p.shape, g=t.g, m=t.m, v=t.v)
            if t.p.size == 0:
                continue
            first, second = 1.0 - beta1**t.step, 1.0 - beta2**t.step
            keep = 1.0 - t.learning_rate * t.weight_decay if decoupled else 1.0
            constants = (
                grad_scale, t.weight_decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2,
                1.0 / np.sqrt(second), eps, t.learning_rate / first, keep,
            )  # fmt: skip
            arrays, c = (t.p, as_input(t.g), t.m, t.v), np.array(constants, t.p.dtype)
            args: tuple[Any, ...]
            if t.rows is not None and t.some_rows(decoupled):
                expect((len(t.p),), rows=t.rows)
                args = (*(a.reshape(len(t.p), -1) for a in arrays), c, as_input(t.rows))
                runs.append(Run(kernels.adamw_rows, -(-len(t.p) // kernels.ROWS), args))
            else:
                l2 = bool(t.weight_decay) and not decoupled
                args = (*(a.reshape(-1) for a in arrays), c, l2)
                runs.append(Run(kernels.adamw, -(-t.p.size // kernels.ELEMENTS), args))
            work += t.p.size
        POOL.run_streams(runs, work)

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
        args = (
            p.reshape(-1), as_input(g).reshape(-1), buffer, constants,
            momentum_buffer is not None, bool(nesterov), bool(first_step),
        )  # fmt: skip
        blocks = -(-p.size // kernels.ELEMENTS)
        POOL.run_streams([Run(kernels.sgd, blocks, args)], p.size)

    def sum_squares(self, arrays: Sequence[Array]) -> float:
        """Sum of squares by fixed blocks, each summed in float64, added in their order."""
        kernels, _ = numba_compile.compiled()
        runs, work = [], 0
        for array in arrays:
            if not one_of(array):
                return super().sum_squares(arrays)
            sums = np.zeros(-(-array.size // kernels.ELEMENTS))
            runs.append(Run(kernels.sum_squares, sums.size, (as_input(array).reshape(-1), sums)))
            work += array.size // 2
        POOL.run_streams(runs, work)
        return float(sum(sum(run.args[1].tolist()) for run in runs))

    def scale(self, x: Array, factor: float) -> None:
        """Multiply `x` by `factor` in place."""
        if not (x.flags.carray and one_of(x)):
            super().scale(x, factor)
            return
        kernels, _ = numba_compile.compiled()
        flat, blocks = x.reshape(-1), -(-x.size // kernels.ELEMENTS)
        run = Run(kernels.scale, blocks, (flat, x.dtype.type(factor)))
        POOL.run_streams([run], x.size // 2)
