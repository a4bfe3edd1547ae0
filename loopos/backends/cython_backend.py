"""The Cython backend: SIMD kernels of our own (``loopos/_ext``), for float32.

What is not float32 is computed by the NumPy backend, which is the oracle. Results do not depend on
the number of threads or on how rows are batched: each element of a product is summed in one order.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import loopos._ext
from loopos.backends.cython_attention import CythonAttention
from loopos.backends.cython_elementwise import CythonElementwise
from loopos.backends.cython_losses import CythonLosses
from loopos.backends.cython_quantized import CythonQuantized
from loopos.backends.numpy_backend import ACTIVATIONS, Array, NumpyBackend, Repeater
from loopos.backends.threads import get_num_threads
from loopos.errors import BackendError

#: Names an instruction set ("v2", "v3", "v4") to use instead of the best one.
LEVEL_VARIABLE = "LOOPOS_CPU"


class CythonBackend(
    CythonElementwise, CythonAttention, CythonLosses, CythonQuantized, NumpyBackend
):
    """Compiled kernels, chosen for this processor at run time.

    Raises
    ------
    BackendError
        If ``LOOPOS_CPU`` names an instruction set that cannot run here.
    """

    name = "cython"

    def __init__(self) -> None:
        self._kernels: Any = importlib.import_module("loopos._ext.kernels")
        wanted = os.environ.get(LEVEL_VARIABLE)
        if wanted:
            try:
                self.use_level(wanted)
            except BackendError as error:
                raise BackendError(f"{LEVEL_VARIABLE}: {error}") from error

    @classmethod
    def unavailable(cls) -> str | None:
        """Return why this backend cannot run here, or None when it can."""
        note = Path(loopos._ext.__file__).with_name("not_built.txt")
        try:
            kernels = importlib.import_module("loopos._ext.kernels")
        except ImportError as error:
            if note.exists():
                reason = note.read_text(encoding="utf-8").strip()
                return f"its kernels were not built ({reason})"
            return f"its kernels are not there ({error})"
        return None if kernels.levels() else "this processor is older than x86-64-v2"

    def levels(self) -> list[str]:
        """Return the instruction sets that can run here, best first."""
        names: list[str] = self._kernels.levels()
        return names

    def use_level(self, name: str) -> None:
        """Use the kernels for this instruction set, in the whole process.

        Raises
        ------
        BackendError
            If it cannot run here.
        """
        if name not in self.levels():
            raise BackendError(
                f"instruction set '{name}' cannot run here, expected one of "
                f"{', '.join(self.levels())}"
            )
        self._kernels.use_level(name)

    def describe(self) -> dict[str, Any]:
        """Return what runs; see :meth:`NumpyBackend.describe`."""
        return super().describe() | {
            "isa": self._kernels.level(),
            "threads": get_num_threads(),
            "products": "its own (one order of summation at any thread count and batch size)",
        }

    def repeater(self) -> Repeater:
        """Return what repeats kernels without Python; see :meth:`NumpyBackend.repeater`."""
        if type(self) is not CythonBackend:  # what a subclass does in Python would be lost
            return super().repeater()
        repeater: Repeater = self._kernels.Repeater()
        return repeater

    # -- linear ------------------------------------------------------------------------------

    def linear(
        self, x: Array, w: Array, b: Array | None = None, activation: str | None = None
    ) -> tuple[Array, Array | None]:
        """``y = act(x w^T + b)``; see :meth:`NumpyBackend.linear`."""
        if not self._kernels.single(x=x, w=w) or activation not in (None, *ACTIVATIONS):
            return super().linear(x, w, b, activation)
        y, pre = self._kernels.linear(
            self._kernels.contiguous(x),
            self._kernels.contiguous(w),
            self._kernels.contiguous(b),
            activation,
            get_num_threads(),
        )
        return y, pre

    def linears(self, x: Array, layers: Sequence[tuple[Array, Array | None]]) -> list[Array]:
        """``x w^T + b`` for each layer; see :meth:`NumpyBackend.linears`."""
        if not self._all_single(x, layers):
            return super().linears(x, layers)
        return self._linears(x, layers, None, decoding=False)

    def decode_linears(
        self,
        x: Array,
        layers: Sequence[tuple[Array, Array | None]],
        activation: str | None = None,
    ) -> list[Array]:
        """``act(x w^T + b)`` for each layer; see :meth:`NumpyBackend.decode_linears`."""
        if not self._all_single(x, layers) or activation not in (None, *ACTIVATIONS):
            return super().decode_linears(x, layers, activation)
        return self._linears(x, layers, activation, decoding=True)

    def _all_single(self, x: Array, layers: Sequence[tuple[Array, Array | None]]) -> bool:
        return all(self._kernels.single(x=x, w=w) for w, _ in layers)

    def _linears(
        self,
        x: Array,
        layers: Sequence[tuple[Array, Array | None]],
        activation: str | None,
        decoding: bool,
    ) -> list[Array]:
        contiguous = self._kernels.contiguous
        outputs: list[Array] = self._kernels.linears(
            contiguous(x),
            [(contiguous(w), contiguous(b)) for w, b in layers],
            activation,
            decoding,
            get_num_threads(),
        )
        return outputs

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
        """Gradients of :meth:`linear`; see :meth:`NumpyBackend.linear_backward`."""
        if not self._kernels.single(dy=dy, w=w):
            return super().linear_backward(
                dy, x, w, pre, activation,
                dw=dw, db=db, accumulate=accumulate, dx=dx, need_dx=need_dx,
            )  # fmt: skip
        threads, dz = get_num_threads(), self._kernels.contiguous(dy)
        if activation is not None and pre is not None:
            dz = self.activation_backward(dz, pre, activation)
        if dw is not None:
            self._kernels.linear_dw(dz, self._kernels.contiguous(x), dw, accumulate, threads)
        if db is not None:
            self._kernels.column_sums(dz, db, threads)
        if not need_dx:
            return None
        result: Array = self._kernels.linear_dx(dz, self._kernels.contiguous(w), dx, threads)
        return result
