"""Counter-based random bits: a pure function of (key, sample, position, channel).

Nothing is stored and nothing is sequential, so a dropout mask is the same at any thread count, in
any split of a batch, and in the backward. The mixer is SplitMix64's finaliser (Steele, Lea and
Flood 2014).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: Array) -> Array:
    """Scramble an array of uint64; arithmetic wraps."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def derive_key(*parts: int) -> int:
    """Fold integers (seed, step, number of the op) into one 64-bit key; the order matters."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = _mix(state + _GOLDEN + np.array([part & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    return int(state[0])


def keep_mask(
    key: int, samples: Array, positions: Array, channels: Array, rate: float, dtype: Any
) -> Array:
    """Return dropout factors ``[N, C]``: 0, or ``1 / (1 - rate)`` where kept.

    Parameters
    ----------
    key : int
        64 bits naming the run, step and op.
    samples, positions : ndarray of int [N]
        The sample in the effective batch and the position in it, per row.
    channels : ndarray of int [C]
    rate : float
        Probability of 0, in [0, 1).
    dtype : dtype
        Of the result.
    """
    row = _mix(np.asarray(samples).astype(np.uint64) * _GOLDEN + np.uint64(key))
    row = _mix(row + np.asarray(positions).astype(np.uint64) * _GOLDEN)
    bits = _mix(row[:, None] + (np.asarray(channels).astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    kept = (bits >> np.uint64(32)) >= np.uint64(round(rate * 2**32))
    return kept.astype(dtype) * np.dtype(dtype).type(1.0 / (1.0 - rate))
