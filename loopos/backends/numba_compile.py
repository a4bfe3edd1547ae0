"""Puts numba's compilers in place of the Python loops, once, when the first of them is needed."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

#: Sums may be made in another order (SIMD) and products fused into them. Nothing may assume that
#: there is no NaN or inf, and the scalar functions keep their order: they round by adding.
_SUMS, _SCALARS = {"reassoc", "contract"}, {"contract"}

_lock = threading.Lock()
_modules: tuple[ModuleType, ModuleType] | None = None
#: Where compiled code is kept between processes; None where no directory can be written.
cache_directory: str | None = None


def compiled() -> tuple[ModuleType, ModuleType]:
    """Return ``numba_kernels`` and ``numba_attention`` with their functions compiled on call."""
    global _modules
    if _modules is None:
        with _lock:
            if _modules is None:
                _modules = _compile()
    return _modules


def _compile() -> tuple[ModuleType, ModuleType]:
    from loopos.backends import numba_attention, numba_kernels

    _replace_scalars()
    helpers = {f.__name__: _jit(f) for m in (numba_kernels, numba_attention) for f in m.HELPERS}
    for module in (numba_kernels, numba_attention):
        for name in helpers.keys() & vars(module).keys():
            setattr(module, name, helpers[name])
        for kernel in module.KERNELS:
            setattr(module, kernel.__name__, _jit(kernel, cached=True))
    return numba_kernels, numba_attention


@cache
def _sources() -> str:
    """Return what changes with the sources of anything that is compiled into a kernel."""
    from loopos.backends import numba_attention, numba_kernels, numba_math

    files = [__file__, *(str(m.__file__) for m in (numba_attention, numba_kernels, numba_math))]
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:12]


def _jit(function: Callable[..., Any], cached: bool = False) -> Any:
    """Return numba's dispatcher: compiles one version for each set of argument types."""
    import numba

    global cache_directory
    dispatcher: Any = numba.njit(nogil=True, fastmath=_SUMS, error_model="numpy")(function)
    if cached:
        # The name of the file in which it is kept: numba looks at the kernel's own source alone,
        # and would take code that other helpers were compiled into.
        function.__qualname__ = f"{function.__name__}_{_sources()}"
        try:
            dispatcher.enable_caching()
        except RuntimeError:  # neither the package's directory nor the user's can be written
            cache_directory = None
        else:
            cache_directory = dispatcher.stats.cache_path
    return dispatcher


def target() -> str:
    """Return numba's version and the CPU that it compiles for."""
    import numba

    forced = getattr(numba.config, "CPU_NAME", None)
    cpu = forced or import_module("llvmlite.binding").get_host_cpu_name()
    return f"numba {numba.__version__} ({cpu})"


def _replace_scalars() -> None:
    """Give numba the compiled versions of ``numba_math``'s functions."""
    import numba
    from numba.extending import overload

    from loopos.backends import numba_math

    jit = numba.njit(fastmath=_SCALARS, error_model="numpy", forceinline=True)
    single, double = (numba_math.versions(f, jit) for f in (np.float32, np.float64))

    def register(name: str) -> None:
        in_single, in_double = single[name], double[name]

        def choose(x: Any) -> Any:
            if x == numba.types.float32:
                return lambda x: in_single(x)
            return lambda x: in_double(x)

        # Not inlined in time, a function would cost the loop around it its SIMD code. Annotations
        # differ, of which `strict` would complain.
        options: Any = {"forceinline": True}
        overload(getattr(numba_math, name), jit_options=options, strict=False)(choose)

    for name in single:
        register(name)
