"""Norms, activations, embeddings, dropout and optimizer updates of the Cython backend."""

from __future__ import annotations

from loopos.backends.numpy_backend import NumpyBackend


class CythonElementwise(NumpyBackend):
    """What walks over arrays once."""
