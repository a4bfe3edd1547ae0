"""Products with weights of 16 or 8 bits in NumPy: the reference, which widens the whole weight."""

from __future__ import annotations

from typing import Any

import numpy as np

from loopos.backends.quantized import (
    QuantizedWeight,
    check_kind,
    to_bfloat16,
    to_int8,
    to_panels,
)

Array = np.ndarray[Any, Any]


def check_weight(w: Array, kind: str) -> None:
    """Raise what :meth:`QuantizedOps.quantize` promises for a wrong kind, dtype or shape."""
    check_kind(kind)
    if not isinstance(w, np.ndarray):
        raise TypeError(f"w: expected a NumPy array, found {type(w).__name__}")
    if w.dtype.kind != "f":
        raise TypeError(f"w: expected an array of floats, found {w.dtype}")
    if w.ndim != 2:
        raise ValueError(f"w: expected shape [any, any], found {list(w.shape)}")


class QuantizedOps:
    """Weights in fewer bits, forward only."""

    def quantize(self, w: Array, kind: str) -> QuantizedWeight:
        """Round a weight to fewer bits.

        Parameters
        ----------
        w : ndarray [O, C]
            Rounded to float32 first.
        kind : str
            "bfloat16": to nearest, ties to even; NaN and infinity stay. "int8": whole multiples,
            from -127 to 127 and ties to even, of one scale an output, ``max|w| / 127``.

        Raises
        ------
        BackendError
            If the kind is unknown, or a weight for int8 is not finite.
        """
        check_weight(w, kind)
        shape = (w.shape[0], w.shape[1])
        single = np.ascontiguousarray(w, dtype=np.float32)
        if kind == "bfloat16":
            return QuantizedWeight(kind, shape, to_panels(to_bfloat16(single)))
        codes, scales = to_int8(single)
        return QuantizedWeight(kind, shape, to_panels(codes), scales)

    def linear_quantized(
        self,
        x: Array,
        w: QuantizedWeight,
        b: Array | None = None,
        activation: str | None = None,
    ) -> Array:
        """``y = act((x codes^T) scales + b)``: ``x[N, C]`` to ``[N, O]``, without a gradient.

        Only the weight has fewer bits: products and sums are those of the dtype of `x`, or as
        exact.
        """
        if x.ndim != 2 or x.shape[1] != w.shape[1]:
            raise ValueError(f"x: expected shape [any, {w.shape[1]}], found {list(x.shape)}")
        if b is not None and b.shape != (w.shape[0],):
            raise ValueError(f"b: expected shape [{w.shape[0]}], found {list(b.shape)}")
        y: Array = x @ w.codes().T.astype(x.dtype)
        if w.scales is not None:
            y *= w.scales.astype(x.dtype)
        if b is not None:
            y += b
        if activation is None:
            return y
        result: Array = self.activation(y, activation)  # type: ignore[attr-defined]
        return result
