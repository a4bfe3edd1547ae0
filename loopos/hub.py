"""Names on the Hugging Face Hub: the files of a model, fetched through `huggingface_hub`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loopos.errors import MissingFileError, nearest

__all__ = ["is_hub_name", "local_path", "nearest_path"]

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([\w./-]+))?")
#: Endings by which a name is a file here, never a model there.
_FILE_ENDINGS = (".gguf", ".json", ".safetensors", ".txt", ".bin")
#: What went wrong, by the name of the library's exception.
_REASONS = {
    "RepositoryNotFoundError": "the Hugging Face Hub has no such model, or it is private",
    "GatedRepoError": "access to it on the Hugging Face Hub has to be asked for",
    "RevisionNotFoundError": "the Hugging Face Hub has no revision '{revision}' of it",
    "LocalEntryNotFoundError": "the Hugging Face Hub cannot be reached and it is not in the cache",
    "OfflineModeIsEnabled": "the Hugging Face Hub is switched off and it is not in the cache",
}


def nearest_path(path: Path) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest name beside a missing path, or ``""``."""
    folder = path.parent
    try:
        beside = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    except OSError:  # a folder that may not be listed gives no hint
        beside = []
    return nearest(path.name, beside)


def is_hub_name(name: str | Path) -> bool:
    """Whether a name, where there is no such path, is that of a model on the Hub."""
    ending = Path(name).suffix.lower()
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and ending not in _FILE_ENDINGS


def local_path(name: str | Path, patterns: Sequence[str]) -> Path:
    """Return where a model is: the path that was given, or where its files were fetched to.

    Parameters
    ----------
    name : path or str
        Anything but a string that reads as "org/name" or "org/name@revision" is a path, and so is
        such a string where something has that path.
    patterns : sequence of str
        The files to fetch, all others stay where they are.

    Raises
    ------
    MissingFileError
        If the Hub has no such model or cannot be reached, or the `huggingface_hub` library is not
        installed; the nearest local name is given too.
    """
    path = Path(name)
    try:
        there = path.exists()
    except OSError as error:  # a name that is too long
        raise MissingFileError(f"{str(name)[:80]!r}: no such path ({error.strerror})") from error
    if there or not is_hub_name(name):
        return path
    repository, _, revision = str(name).partition("@")
    missing = f"{name}: no such directory{nearest_path(path)}".rstrip("?")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingFileError(
            f"{missing}, and fetching a model of that name from the Hugging Face Hub needs the "
            "huggingface_hub library; install it with: pip install 'loopos[hub]'"
        ) from error
    try:
        fetched = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=list(patterns),
            tqdm_class=_without_output(),
        )
    except Exception as error:  # the library's own, those of its HTTP client, and the system's
        reason = _reason(error).format(revision=revision)
        raise MissingFileError(f"{missing}, and {reason}") from error
    return Path(fetched)


def _reason(error: Exception) -> str:
    """Return in half a sentence why nothing was fetched."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    known = next((_REASONS[kind] for kind in kinds if kind in _REASONS), None)
    text = f"it cannot be fetched ({kinds[0]}: {' '.join(str(error).split())})"
    return known or text.replace("{", "{{").replace("}", "}}")


def _without_output() -> type:
    """Return a progress bar that shows nothing: a library does not write to the terminal."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **(options | {"disable": True}))

    return Silent
