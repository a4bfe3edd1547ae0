"""How much memory there is, and how much this process has used."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def _status(field: str, path: str) -> int | None:
    """Return a field in kB of one of Linux' status files, in bytes."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_left() -> int | None:
    """Return what the control group (v2) still allows, in bytes; caches count as free."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        stat = Path("/sys/fs/cgroup/memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    cached = sum(int(line.split()[1]) for line in stat.splitlines()
                 if line.startswith(("inactive_file ", "active_file ")))  # fmt: skip
    return int(limit) - used + cached


def available_bytes() -> int | None:
    """Return how much memory this process may still take; None where that cannot be told."""
    free = _status("MemAvailable", "/proc/meminfo")
    if free is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [value for value in (free, _cgroup_left()) if value is not None]
    return min(limits, default=None)


def peak_bytes() -> int:
    """Return the most memory that this process has held at once (its resident set)."""
    # Not ru_maxrss on Linux: a program started by a large one begins with that one's peak.
    peak = _status("VmHWM", "/proc/self/status")
    if peak is not None:
        return peak
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_bytes_of(pid: int) -> int | None:
    """Return :func:`peak_bytes` of another process; None where that cannot be told."""
    return _status("VmHWM", f"/proc/{pid}/status")
