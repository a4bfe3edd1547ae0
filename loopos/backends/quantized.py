"""Weights of 16 or 8 bits, for inference: what the ops ``quantize`` and ``linear_quantized`` share.

A weight lies in panels of 32 outputs, so that a product reads it once from end to end. A line of a
panel has 32 bits for each output, the numbers of two or four inputs; lines come in multiples of 16.
The layout is the same for every backend and instruction set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from loopos.errors import BackendError, nearest

Array = np.ndarray[Any, Any]

#: Outputs that lie side by side.
PANEL = 32
#: Lines of a panel come in so many, zeros at the end.
LINES_TOGETHER = 16
#: What a weight can be rounded to, and how its numbers are stored.
KINDS: dict[str, Any] = {"bfloat16": np.uint16, "int8": np.int8}


def check_kind(kind: str) -> None:
    """Raise BackendError unless `kind` is one of ``KINDS``."""
    if kind not in KINDS:
        raise BackendError(
            f"unknown kind of weights '{kind}', expected {' or '.join(KINDS)}{nearest(kind, KINDS)}"
        )


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight ``[O, C]`` in fewer bits.

    Attributes
    ----------
    kind : str
        "bfloat16" (the upper half of a float32) or "int8" (a whole number from -127 to 127, times
        the scale of its output).
    shape : tuple of int
        ``(O, C)``.
    panels : ndarray uint16 or int8 [ceil(O / 32), lines, 32, 2 or 4]
        Zeros beyond the last output and the last input.
    scales : ndarray float32 [O] or None
        For int8 only.
    """

    kind: str
    shape: tuple[int, int]
    panels: Array
    scales: Array | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit each other.

        Raises
        ------
        BackendError
            If the kind is unknown.
        ValueError
            If an array has another dtype or shape.
        """
        check_kind(self.kind)
        outputs, inputs = self.shape
        dtype = np.dtype(KINDS[self.kind])
        expected = panels_shape(outputs, inputs, dtype)
        if self.panels.dtype != dtype or self.panels.shape != expected:
            raise ValueError(
                f"panels: expected {dtype} of shape {list(expected)}, found "
                f"{self.panels.dtype} of shape {list(self.panels.shape)}"
            )
        if (self.scales is not None) != (self.kind == "int8"):
            has = "one an output" if self.kind == "int8" else "none"
            raise ValueError(f"scales: a weight of kind {self.kind} has {has}")
        if self.scales is None:
            return
        if self.scales.dtype != np.float32 or self.scales.shape != (outputs,):
            raise ValueError(
                f"scales: expected float32 of shape [{outputs}], found "
                f"{self.scales.dtype} of shape {list(self.scales.shape)}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.panels.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def codes(self) -> Array:
        """Return the stored numbers as float32 ``[O, C]``, before their scales."""
        outputs, inputs = self.shape
        padded, lines, _, per_line = self.panels.shape
        flat = self.panels.transpose(0, 2, 1, 3).reshape(padded * PANEL, lines * per_line)
        flat = flat[:outputs, :inputs]
        if self.kind == "int8":
            return flat.astype(np.float32)
        return (flat.astype(np.uint32) << np.uint32(16)).view(np.float32)

    def dequantized(self) -> Array:
        """Return the weight as float32 ``[O, C]``."""
        codes = self.codes()
        return codes if self.scales is None else codes * self.scales[:, None]


def panels_shape(outputs: int, inputs: int, dtype: Any) -> tuple[int, int, int, int]:
    """Return the shape of the panels of a weight ``[O, C]`` whose numbers are of `dtype`."""
    per_line = 4 // np.dtype(dtype).itemsize
    lines = -(-inputs // (per_line * LINES_TOGETHER)) * LINES_TOGETHER
    return -(-outputs // PANEL), lines, PANEL, per_line


def to_panels(codes: Array) -> Array:
    """Return ``[O, C]`` as panels, zeros beyond O and C."""
    outputs, inputs = codes.shape
    count, lines, _, per_line = panels_shape(outputs, inputs, codes.dtype)
    padded = np.zeros((count * PANEL, lines * per_line), codes.dtype)
    padded[:outputs, :inputs] = codes
    return np.ascontiguousarray(padded.reshape(count, PANEL, lines, per_line).transpose(0, 2, 1, 3))


def to_bfloat16(w: Array) -> Array:
    """Return float32 rounded to the upper 16 bits, to nearest, ties to even; NaN stays NaN."""
    bits = w.view(np.uint32)
    high = bits >> np.uint32(16)
    rounded = (bits + np.uint32(0x7FFF) + (high & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(w), high | np.uint32(0x40), rounded).astype(np.uint16)


def to_int8(w: Array) -> tuple[Array, Array]:
    """Return whole numbers and the scale ``max|w| / 127`` of each row (1 for a row of zeros)."""
    scales = np.abs(w).max(axis=1, initial=0) / np.float32(127)
    scales[scales == 0] = 1
    check_scales(scales)
    codes = np.clip(np.rint(w / scales[:, None]), -127, 127)
    return codes.astype(np.int8), scales


def check_scales(scales: Array) -> None:
    """Raise BackendError for an output with a weight that is not finite: int8 cannot hold it."""
    wrong = np.flatnonzero(~np.isfinite(scales))
    if wrong.size:
        raise BackendError(
            f"w: output {wrong[0]} has a weight that is not finite, which int8 cannot hold"
        )
