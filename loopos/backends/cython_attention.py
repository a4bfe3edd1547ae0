"""Rotary positions and attention of the Cython backend."""

from __future__ import annotations

from loopos.backends.numpy_backend import NumpyBackend


class CythonAttention(NumpyBackend):
    """Attention in blocks that stay in cache."""
