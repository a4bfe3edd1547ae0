"""The version of loopos, read by setup.py and by checkpoints."""

__version__ = "0.1.0"
