"""The exceptions of loopos: one sentence each, naming the file and line or the key at fault.

Every exception that loopos raises on purpose derives from :class:`LooposError`, and also from the
built-in exception a Python user would catch for the same fault. The command line turns
:class:`InputError` and :class:`OutputError` into exit code 2 and every other fault into 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LooposError(Exception):
    """Base class of every exception that loopos raises on purpose."""


class InputError(LooposError, ValueError):
    """What the user handed in is wrong: a configuration, a data file, a model, an argument."""


class ConfigError(InputError):
    """A configuration key is unknown, missing, or its value does not fit."""


class DataError(InputError):
    """A row of data cannot be used; the message names the file and line."""


class ModelFormatError(InputError):
    """A model directory does not hold what its configuration promises."""


class CheckpointError(InputError):
    """A checkpoint is damaged, foreign, or does not fit the run that wants to resume it."""


class BackendError(InputError):
    """A backend is unknown, or cannot run on this machine; the message says why."""


class MissingFileError(InputError, FileNotFoundError):
    """A file or directory that was named does not exist."""


class OutputError(LooposError, OSError):
    """An output cannot be written; whatever stood there before is intact."""


class NumericalError(LooposError, ArithmeticError):
    """A loss, gradient or weight is not finite, or nothing in a step counts."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest candidate, or an empty string.

    Parameters
    ----------
    name : str
        What was written.
    candidates : iterable of str
        What would have been valid.
    """
    match = difflib.get_close_matches(str(name), [str(c) for c in candidates], n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""
