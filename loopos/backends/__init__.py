"""Backends: who computes. Registry, selection at run time, and the entry-point group for others.

A backend is an object with the methods of :class:`~loopos.backends.numpy_backend.NumpyBackend`,
usually a subclass that overrides what it makes faster. Other packages offer one through the
entry-point group ``loopos.backends``; nothing in loopos changes for it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from loopos.errors import BackendError, nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from loopos.backends.numpy_backend import NumpyBackend

__all__ = [
    "available_backends",
    "get_backend",
    "set_backend",
    "unavailable_backends",
    "use_backend",
]

ENTRY_POINT_GROUP = "loopos.backends"

#: Backends of this package, slowest first: "auto" takes the last one that can run.
_BUILT_IN = {
    "numpy": "loopos.backends.numpy_backend:NumpyBackend",
    "numba": "loopos.backends.numba_backend:NumbaBackend",
    "cython": "loopos.backends.cython_backend:CythonBackend",
}

_instances: dict[str, NumpyBackend] = {}
_default: NumpyBackend | None = None
_override: ContextVar[NumpyBackend | None] = ContextVar("loopos_backend", default=None)


def _entry_points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def _load_class(name: str) -> type[NumpyBackend]:
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name].split(":")
        backend: type[NumpyBackend] = getattr(importlib.import_module(module), attribute)
        return backend
    points = _entry_points()
    if name not in points:
        known = [*_BUILT_IN, *points]
        raise BackendError(
            f"unknown backend '{name}'{nearest(name, known)} (known: {', '.join(known)}, or 'auto')"
        )
    try:
        loaded: type[NumpyBackend] = points[name].load()
    except Exception as error:  # whatever a foreign package raises on import
        raise BackendError(f"backend '{name}' cannot be loaded: {error}") from error
    return loaded


def _require(name: str) -> type[NumpyBackend]:
    """Return the class of the backend called `name`, or say why it cannot run."""
    backend = _load_class(name)
    reason = backend.unavailable()
    if reason is not None:
        raise BackendError(f"backend '{name}' cannot run here: {reason}")
    return backend


def _resolve(name: str) -> NumpyBackend:
    """Return the one instance of the backend called `name`, or say why it cannot run."""
    if name == "auto":
        name = available_backends()[0]
    if name not in _instances:
        _instances[name] = _require(name)()
    return _instances[name]


def _from_environment() -> NumpyBackend:
    """Return the backend that ``LOOPOS_BACKEND`` names, else the fastest available."""
    name = os.environ.get("LOOPOS_BACKEND") or "auto"
    if name not in ("auto", *_instances):
        try:
            _require(name)
        except BackendError as error:
            raise BackendError(f"LOOPOS_BACKEND: {error}") from error
    return _resolve(name)  # what goes wrong now is no fault of the name


def _survey() -> tuple[list[str], dict[str, str]]:
    """Return (names that can run, name -> reason for those that cannot)."""
    able: list[str] = []
    unable: dict[str, str] = {}
    built_in = list(reversed(_BUILT_IN))
    for name in [*built_in, *sorted(set(_entry_points()) - set(built_in))]:
        try:
            reason = _load_class(name).unavailable()
        except BackendError as error:
            reason = str(error)
        if reason is None:
            able.append(name)
        else:
            unable[name] = reason
    return able, unable


def available_backends() -> list[str]:
    """Return the names of the backends that can run here, the one that "auto" takes first."""
    return _survey()[0]


def unavailable_backends() -> dict[str, str]:
    """Return the backends that cannot run here, each with the reason."""
    return _survey()[1]


def get_backend() -> NumpyBackend:
    """Return the backend in force.

    That of the innermost :func:`use_backend`, else of the last :func:`set_backend`, else of the
    environment variable ``LOOPOS_BACKEND`` (empty means unset), else the fastest available.

    Raises
    ------
    BackendError
        If ``LOOPOS_BACKEND`` names a backend that is unknown or cannot run.
    """
    global _default
    override = _override.get()
    if override is not None:
        return override
    if _default is None:
        _default = _from_environment()
    return _default


def set_backend(name: str) -> None:
    """Choose the backend for the whole process.

    Parameters
    ----------
    name : str
        One of :func:`available_backends`, or "auto".

    Raises
    ------
    BackendError
        If it is unknown or cannot run here; the choice in force stays.
    """
    global _default
    _default = _resolve(name)


@contextmanager
def use_backend(backend: str | NumpyBackend) -> Iterator[NumpyBackend]:
    """Choose the backend inside the block, for this thread or task only.

    Parameters
    ----------
    backend : str or NumpyBackend
        A name as for :func:`set_backend`, or an instance that need not be registered.

    Raises
    ------
    BackendError
        If it is unknown or cannot run here.
    """
    chosen = _resolve(backend) if isinstance(backend, str) else backend
    token = _override.set(chosen)
    try:
        yield chosen
    finally:
        _override.reset(token)
