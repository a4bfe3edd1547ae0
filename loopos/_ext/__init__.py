"""Floor 0: compiled kernels (``kernels``), where they could be built; sources in ``src``."""

from __future__ import annotations

from pathlib import Path

__all__ = ["get_include"]


def get_include() -> str:
    """Return the directory of ``loopos.h`` and ``loopos_import.h``, for the build of other modules.

    It is all that ``cimport loopos._ext.kernels`` needs; nothing is linked.
    """
    return str(Path(__file__).parent / "src")
