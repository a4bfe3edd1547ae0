"""Frequencies of rotary positions, plain or scaled for contexts longer than those trained on."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from loopos.errors import ConfigError, nearest

__all__ = ["ROPE_KINDS", "RopeScaling", "inverse_frequencies"]

ROPE_KINDS = ("linear", "llama3")

_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_seq_len")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled, so that a model reads further than it was trained to.

    Parameters
    ----------
    kind : {"linear", "llama3"}
        "linear" divides all frequencies by `factor` (Chen et al. 2023, position interpolation).
        "llama3" divides the slow ones, keeps the fast ones and goes over from one to the other in
        between (Llama 3.1, Grattafiori et al. 2024).
    factor : float
        By how much, at least 1.
    low_freq_factor : float, optional
        "llama3" only, and needed there: waves longer than ``original_max_seq_len /
        low_freq_factor`` are slow.
    high_freq_factor : float, optional
        "llama3" only, and needed there: waves shorter than ``original_max_seq_len /
        high_freq_factor`` are fast.
    original_max_seq_len : int, optional
        "llama3" only, and needed there: the length the model was trained on before scaling.

    Raises
    ------
    ConfigError
        If a value is out of range, missing, or does not belong to the kind; the message begins
        with ``rope_scaling`` and names the key.
    """

    kind: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_seq_len: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ConfigError(
                f"rope_scaling.kind is {self.kind!r}, expected one of {', '.join(ROPE_KINDS)}"
                + nearest(str(self.kind), ROPE_KINDS)
            )
        self._check_number("factor", 1.0)
        if self.kind == "linear":
            for key in _LLAMA3_KEYS:
                if getattr(self, key) is not None:
                    raise ConfigError(f"rope_scaling.{key} belongs to kind 'llama3', not 'linear'")
            return
        length = self.original_max_seq_len
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ConfigError(
                f"rope_scaling.original_max_seq_len is {length!r}, expected a whole number of at "
                "least 1"
            )
        low = self._check_number("low_freq_factor", 0.0)
        high = self._check_number("high_freq_factor", 0.0)
        if not 0 < low < high:
            raise ConfigError(
                f"rope_scaling.low_freq_factor is {low!r}, expected more than 0 and less than "
                f"high_freq_factor, which is {high!r}"
            )

    def _check_number(self, key: str, low: float) -> float:
        value = getattr(self, key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= sys.float_info.max:
            raise ConfigError(
                f"rope_scaling.{key} is {value!r}, expected a finite number of at least {low:g}"
            )
        return float(value)

    @classmethod
    def from_dict(cls, values: Any) -> RopeScaling:
        """Make one from keys and values, as they stand in a file.

        Raises
        ------
        ConfigError
            If it is no object, a key is unknown or missing, or its value is wrong.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"rope_scaling is {values!r}, expected an object")
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"rope_scaling has the unknown key '{key}'{nearest(key, known)}")
        for key in ("kind", "factor"):
            if key not in values:
                raise ConfigError(f"rope_scaling has no key '{key}'")
        return cls(**values)


def inverse_frequencies(
    head_size: int, theta: float, scaling: RopeScaling | None = None
) -> npt.NDArray[np.float64]:
    """Return the angle by which each pair of a head turns per position: ``[head_size / 2]``.

    Parameters
    ----------
    head_size : int
        Width of one head, even.
    theta : float
        Base of the frequencies ``theta ** (-2 i / head_size)`` (Su et al. 2021, eq. 15).
    scaling : RopeScaling, optional
        None for plain frequencies.
    """
    plain = theta ** -(np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if scaling is None:
        return plain
    slow = plain / scaling.factor
    if scaling.kind == "linear":
        return slow
    assert scaling.low_freq_factor is not None  # checked when the scaling was made
    assert scaling.high_freq_factor is not None
    assert scaling.original_max_seq_len is not None
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # Turns over the original length: few for slow waves (0 of them plain), many for fast (1).
    turns = scaling.original_max_seq_len * plain / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - share) * slow + share * plain
