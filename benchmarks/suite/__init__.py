"""asv benchmarks of loopos: epochs, ops, import time, memory, each against documented targets."""
