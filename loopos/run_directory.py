"""Whether a run may begin, or go on, in a directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loopos.errors import CheckpointError, InputError
from loopos.files import read_json, remove, tidy
from loopos.training.checkpoint import find_checkpoint, recover

__all__ = ["check_directory", "clear_results"]

#: What a run leaves in its directory.
_OUTPUTS = (
    "config.json",
    "data_report.json",
    "metrics.jsonl",
    "tokenizer",
    "checkpoints",
    "evaluation.json",
    "model",
    "samples.jsonl",
    "start.json",
)


def check_directory(directory: Path, resume: bool, stages: Sequence[str] = ()) -> Path | None:
    """Refuse to write over a run and to resume what is not there, before anything is read.

    What a killed run left half-written is cleared; the directory is locked.

    Returns
    -------
    Path or None
        The checkpoint to continue from; None for a run from the beginning.
    """
    places = [directory, *(directory / stage for stage in reversed(stages))]
    for place in places:
        recover(place / "checkpoints")
    outputs = (*_OUTPUTS, *stages)
    held = [name for name in outputs if (directory / name).exists()]
    found = (find_checkpoint(place / "checkpoints") for place in places if resume)
    checkpoint = next((path for path in found if path is not None), None)
    if checkpoint is not None:
        tidy(directory, outputs)
        return checkpoint
    other = "choose another directory (--output-dir)"
    began = _began(directory, places)
    if resume and not began:
        raise CheckpointError(f"{directory}: there is no run to resume in it")
    if held and not resume:
        if "model" in held:
            raise InputError(f"{directory}: already holds a run ({held[0]}); {other}")
        if began:
            raise InputError(
                f"{directory}: holds a run that ended before its first checkpoint; "
                f"start it over with --resume, or {other}"
            )
        if any((place / "checkpoints").exists() for place in places):
            raise InputError(
                f"{directory}: already holds a run; continue it with --resume, or {other}"
            )
        raise InputError(f"{directory}: already holds {held[0]}, which is not of a run; {other}")
    tidy(directory, outputs)
    return None


def _began(directory: Path, places: Sequence[Path]) -> bool:
    """Whether a run was begun here that has no checkpoint yet, so that nothing is lost with it."""
    saved = (any((place / "checkpoints").glob("step-*")) for place in places)
    if (directory / "model").exists() or any(saved):
        return False
    # The first thing that a run, or a stage of it, writes.
    if not any((place / "metrics.jsonl").is_file() for place in places):
        return False
    config = directory / "config.json"
    return not config.is_file() or {"computation", "training"} <= set(read_json(config))


def clear_results(directory: Path) -> None:
    """Remove what the end of a run left in its directory, as the run goes on.

    Raises
    ------
    OutputError
        If something cannot be deleted.
    """
    for name in ("evaluation.json", "model"):
        remove(directory / name)
