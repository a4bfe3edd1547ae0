"""What lets a run begin in a directory, or continue what stands there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loopos.autograd import Parameter
from loopos.errors import CheckpointError, ConfigError, InputError
from loopos.files import locked_directory, tidy
from loopos.training.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_state,
    recover,
)
from loopos.training.optim import Optimizer

__all__ = ["MAY_CHANGE", "own_directory", "require_json", "require_same_run", "require_unused",
           "take_over"]  # fmt: skip

#: What no run can continue without.
_NEEDED = ("step", "epoch", "index", "total_steps", "options", "backend")
#: What of a state makes a run the same run, beside its options and its model.
_IDENTITY = ("seed", "num_samples", "lengths_sha256", "monitor")
#: Options that may differ in a continuation; `num_epochs` and `max_steps` may grow.
MAY_CHANGE = {"num_epochs", "max_steps", "prefetch_batches", "num_workers",
              "gradient_checkpointing", "tensorboard"}  # fmt: skip


@contextmanager
def own_directory(directory: str | Path) -> Iterator[None]:
    """Keep other runs out of a run's directory, and clear what killed ones left half-written.

    Raises
    ------
    InputError
        If a run is going in it (see :func:`loopos.files.locked_directory`).
    OutputError
        If it cannot be written.
    """
    with locked_directory(directory):
        recover(Path(directory) / "checkpoints")
        tidy(Path(directory), ["metrics.jsonl"])
        yield


def require_json(state: Mapping[str, Any]) -> None:
    """Check, before a run has done anything worth saving, that its state can be saved.

    Raises
    ------
    ConfigError
        Naming the first key whose value JSON cannot hold.
    """
    options = {f"training.{key}": value for key, value in state["options"].items()}
    for key, value in (options | dict(state)).items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{key}: a checkpoint cannot hold it ({error})") from error


def require_unused(directory: Path) -> None:
    """Refuse to delete the checkpoints of an earlier run, as keeping the best and the last would.

    Raises
    ------
    InputError
        If there are any under `directory`.
    """
    if list_checkpoints(directory / "checkpoints"):
        raise InputError(
            f"{directory}: already holds the checkpoints of a run; resume it, or choose "
            "another directory"
        )


def take_over(
    root: Path,
    parameters: Mapping[str, Parameter],
    optimizer: Optimizer,
    now: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> tuple[Path, dict[str, Any]]:
    """Put the newest whole checkpoint under `root` in place; return its path and its state.

    Parameters
    ----------
    root : Path
        Directory of the checkpoints.
    parameters : mapping of str to Parameter
    optimizer : Optimizer
    now, defaults : mapping
        As :func:`require_same_run` takes them.

    Raises
    ------
    CheckpointError
        If there is none, or it belongs to another run; nothing is changed then.
    """
    path = find_checkpoint(root)
    if path is None:
        raise CheckpointError(f"there is no checkpoint to resume in {root.parent}")
    require_same_run(path, read_state(path), now, defaults)
    return path, load_checkpoint(path, parameters, optimizer)


def require_same_run(
    path: Path, then: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Check that a run may continue from a checkpoint.

    Parameters
    ----------
    path : Path
        The checkpoint.
    then, now : mapping
        Its state, and that of the run which is to continue it.
    defaults : mapping
        Of the options: one that is not in the checkpoint had no effect then, as it has none now.

    Raises
    ------
    CheckpointError
        Naming the first thing that changed. A run may be made longer, and make its batches
        otherwise.
    """
    for key in _NEEDED:
        if key not in then:
            raise CheckpointError(f"{path}: holds no '{key}', so no run can continue from it")
    # Tuples are lists in the file.
    then, now = (json.loads(json.dumps(dict(state))) for state in (then, now))
    known = json.loads(json.dumps(dict(defaults))) | then["options"]
    _require_same(path, "", *({key: state.get(key) for key in _IDENTITY} for state in (then, now)))
    options = [
        {k: v for k, v in options.items() if k not in MAY_CHANGE}
        for options in (known, now["options"])
    ]
    _require_same(path, "training.", *options)
    was, found = (state.get("trained") or {} for state in (then, now))
    for name in found:
        if was.get(name, found[name]) != found[name]:
            words = ("trained", "frozen") if was[name] else ("frozen", "trained")
            raise CheckpointError(
                f"{path}: parameter '{name}' was {words[0]}, now it is {words[1]}"
            )
    if then["format"] > 1 and then.get("frozen_sha256") != now.get("frozen_sha256"):
        raise CheckpointError(
            f"{path}: the frozen parameters are not those that the run began with"
        )
    if now["total_steps"] < then["total_steps"]:
        for key in ("num_epochs", "max_steps"):
            was, found = known.get(key), now["options"].get(key)
            if was != found:
                raise CheckpointError(
                    f"{path}: training.{key} was {was}, now it is {found}: "
                    "a run can be made longer, not shorter"
                )


def _require_same(path: Path, prefix: str, then: Any, now: Any) -> None:
    for key in [*now, *(key for key in then if key not in now)]:
        was, found = then.get(key), now.get(key)
        if was != found:
            raise CheckpointError(f"{path}: {prefix}{key} was {was}, now it is {found}")
