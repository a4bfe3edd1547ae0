"""Floor 0: compiled kernels (``kernels``), where they could be built; sources in ``src``."""
