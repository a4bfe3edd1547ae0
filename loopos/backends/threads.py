"""How many threads may run, and who multiplies matrices."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loopos.errors import ConfigError

#: What was asked for by `set_num_threads`; None follows the machine.
_asked: int | None = None
#: What :func:`available_cpus` said, and until when it is believed; asking costs about as much as a
#: small kernel, and the answer hardly ever changes.
_found, _found_until = 1, 0.0
_FOUND_AGE_S = 1.0


@dataclass(frozen=True)
class Blas:
    """The library behind NumPy's matrix products."""

    name: str
    architecture: str
    num_threads: int


def blas() -> Blas:
    """Return the BLAS library that is loaded, the CPU kernels it chose and its thread count."""
    import numpy as np  # loads the library that is looked up below
    from threadpoolctl import threadpool_info

    for pool in threadpool_info():
        if pool["user_api"] == "blas":
            name = f"{pool['internal_api']} {pool['version'] or ''}".strip()
            return Blas(name, pool.get("architecture") or "unknown", int(pool["num_threads"]))
    name = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    return Blas(name, "unknown", available_cpus())


def _quota(directory: Path) -> float | None:
    """Return the CPUs that one control group (version 2 or 1) may use; None: no limit there."""
    try:
        if (directory / "cpu.max").exists():
            quota, period = (directory / "cpu.max").read_text().split()
        else:
            quota = (directory / "cpu.cfs_quota_us").read_text().strip()
            period = (directory / "cpu.cfs_period_us").read_text()
    except (OSError, ValueError):
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _cgroup_cpus(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float | None:
    """Return the CPU quota of this process's control group and of those above it, in CPUs."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None  # not Linux
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        inner = (top / path.lstrip("/")).resolve()
        # In a container the path may be the host's, which is not seen here: then the top is ours.
        groups = [inner, *inner.parents] if inner.exists() else [top.resolve()]
        found += [_quota(group) for group in groups if group.is_relative_to(root.resolve())]
    return min((quota for quota in found if quota is not None), default=None)


def available_cpus() -> int:
    """Return how many CPUs this process may use: affinity, control group, ``OMP_NUM_THREADS``."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = _cgroup_cpus()
    if quota is not None:
        count = min(count, max(1, int(quota)))
    wanted = _environment()
    return count if wanted is None else min(count, wanted)


def _environment() -> int | None:
    """Return what ``OMP_NUM_THREADS`` asks for, of a list the first; None where that is nothing."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else None


def ignored_environment() -> str | None:
    """Return why ``OMP_NUM_THREADS`` does not count, or None when it does or is not set."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if not given.strip() or _environment() is not None:
        return None
    return f"OMP_NUM_THREADS: expected a whole number of at least 1, found '{given}'"


def get_num_threads() -> int:
    """Return how many threads the kernels of loopos use.

    What :func:`set_num_threads` asked for, else what :func:`available_cpus` said at most a second
    ago. The threads of NumPy's BLAS are the host program's; this number says nothing of them.
    """
    global _found, _found_until
    if _asked is not None:
        return _asked
    now = time.monotonic()
    if now >= _found_until:
        _found, _found_until = available_cpus(), now + _FOUND_AGE_S
    return _found


def set_num_threads(num_threads: int | None) -> None:
    """Choose how many threads the kernels of loopos use, for the whole process.

    Parameters
    ----------
    num_threads : int or None
        At least 1; None follows the machine again. Results on the cython backend do not depend on
        it.

    Raises
    ------
    ConfigError
        If it is no whole number, or not positive.
    """
    global _asked, _found_until
    check_num_threads(num_threads)
    _asked, _found_until = num_threads, 0.0


def check_num_threads(num_threads: int | None, name: str = "num_threads") -> None:
    """Check a number of threads, which a fault calls `name`.

    Raises
    ------
    ConfigError
        If it is no whole number, or not positive, or more than the kernels can count.
    """
    if num_threads is None:
        return
    if isinstance(num_threads, bool) or not hasattr(num_threads, "__index__"):
        raise ConfigError(f"{name}: expected a whole number, found {num_threads!r}")
    if not 1 <= num_threads < 1 << 31:  # a C int; the pool itself starts no more than 256
        raise ConfigError(f"{name}: expected from 1 to 2**31 - 1, found {num_threads}")


@contextmanager
def thread_limit(num_threads: int | None) -> Iterator[None]:
    """Compute with at most `num_threads` threads inside the block; None changes nothing.

    Unlike :func:`set_num_threads` it holds for NumPy's BLAS too.

    Raises
    ------
    ConfigError
        If it is no whole number, or not positive.
    """
    if num_threads is None:
        yield
        return
    check_num_threads(num_threads)
    import numpy as np  # noqa: F401  (its BLAS must be loaded before it can be limited)
    from threadpoolctl import threadpool_limits

    before = _asked
    set_num_threads(num_threads)
    try:
        with threadpool_limits(num_threads, user_api="blas"):
            yield
    finally:
        set_num_threads(before)
