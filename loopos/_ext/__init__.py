"""Floor 0: the place of compiled kernels. This version has none; the numpy backend computes all."""
