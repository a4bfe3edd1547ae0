"""Weights of 16 or 8 bits of the Cython backend: packed once, widened in registers."""

from __future__ import annotations

from typing import Any

import numpy as np

from loopos.backends.numpy_backend import ACTIVATIONS, Array, NumpyBackend
from loopos.backends.numpy_quantized import check_weight
from loopos.backends.quantized import QuantizedWeight, check_scales
from loopos.backends.threads import get_num_threads


class CythonQuantized(NumpyBackend):
    """Products that read a weight once, at the speed of memory."""

    _kernels: Any

    def quantize(self, w: Array, kind: str) -> QuantizedWeight:
        """Round a weight to fewer bits; see :meth:`NumpyBackend.quantize`."""
        check_weight(w, kind)
        bits = 8 if kind == "int8" else 16
        single = self._kernels.contiguous(w.astype(np.float32, copy=False))
        panels, scales = self._kernels.pack_weight(single, bits, get_num_threads())
        if scales is not None:
            check_scales(scales)
        return QuantizedWeight(kind, (w.shape[0], w.shape[1]), panels, scales)

    def linear_quantized(
        self,
        x: Array,
        w: QuantizedWeight,
        b: Array | None = None,
        activation: str | None = None,
    ) -> Array:
        """Product without a gradient; see :meth:`NumpyBackend.linear_quantized`."""
        if not self._kernels.single(x=x) or activation not in (None, *ACTIVATIONS):
            return super().linear_quantized(x, w, b, activation)
        y: Array = self._kernels.linear_packed(
            self._kernels.contiguous(x),
            w.panels,
            *w.shape,
            w.scales,
            self._kernels.contiguous(b),
            activation,
            get_num_threads(),
        )
        return y
