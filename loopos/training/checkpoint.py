"""Checkpoints: directories of safetensors and JSON, checksummed, written beside and renamed.

``<root>/step-00000012/`` holds ``model.safetensors`` (parameters by name),
``optimizer.safetensors``, ``state.json`` (position, options, seed, versions) and
``manifest.json`` (size and SHA-256 of the other three). A directory without a manifest that fits
is damaged: it is skipped, never read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loopos.autograd import Parameter
from loopos.errors import CheckpointError, ConfigError, InputError, OutputError
from loopos.files import atomic_directory, read_json
from loopos.training.optim import Optimizer
from loopos.version import __version__

__all__ = ["damage", "find_checkpoint", "list_checkpoints", "load_checkpoint", "prune",
           "read_state", "require_json", "require_same_run", "require_unused",
           "save_checkpoint"]  # fmt: skip

FORMAT = 1
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
#: What of a state makes a run the same run, beside its options and its model.
_IDENTITY = ("seed", "num_samples", "lengths_sha256", "monitor")
#: Options that may differ in a continuation; `num_epochs` and `max_steps` may grow.
_MAY_CHANGE = {"num_epochs", "max_steps", "prefetch_batches", "num_workers"}
_NAME = re.compile(r"step-(\d{8,})")
#: What a checkpoint is called before the rename, see `files.atomic_directory`.
_TEMPORARY = re.compile(r"\.(step-\d{8,})\.[0-9a-f]{8}\.tmp")
_log = logging.getLogger("loopos")


def save_checkpoint(
    root: str | Path,
    parameters: Mapping[str, Parameter],
    optimizer: Optimizer,
    state: Mapping[str, Any],
) -> Path:
    """Write ``<root>/step-<state["step"]>``; it is there whole or not at all.

    Parameters
    ----------
    root : path
        Directory of a run's checkpoints.
    parameters : mapping of str to Parameter
    optimizer : Optimizer
    state : mapping
        JSON values, with the number of completed steps as ``step``.

    Raises
    ------
    OutputError
        If it cannot be written; older checkpoints are intact.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = Path(root) / f"step-{state['step']:08d}"
    slots = dict(optimizer.state_dict())
    header = {
        "format": FORMAT,
        "loopos_version": __version__,
        "optimizer_steps": slots.pop("steps"),
    }
    with atomic_directory(path) as directory:
        arrays = {name: np.ascontiguousarray(p.data) for name, p in parameters.items()}
        try:
            save_file(arrays, directory / "model.safetensors")
            save_file(slots, directory / "optimizer.safetensors")
        except SafetensorError as error:  # its own exception, for a full disk too
            raise OutputError(f"{path}: cannot be written ({error})") from error
        # Last, so that a directory whose files fit it is whole, renamed yet or not.
        _write_json(directory / "state.json", header | dict(state))
        _write_json(
            directory / "manifest.json", {name: _digest(directory / name) for name in _FILES}
        )
    return path


def _write_json(path: Path, value: Any) -> None:
    # In ASCII: names of files that are no UTF-8 come back as they were.
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="ascii")


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


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def damage(path: Path) -> str | None:
    """Return why the checkpoint at `path` is not whole, naming the file, or None if it is."""
    manifest = path / "manifest.json"
    if not manifest.is_file():
        return f"{manifest} is missing"
    try:
        expected = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{manifest} cannot be read ({error})"
    for name in _FILES:
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        try:
            found = _digest(file)
        except OSError as error:
            return f"{file} cannot be read ({error.strerror or error})"
        if not isinstance(expected, dict) or expected.get(name) != found:
            return f"{file} does not match its checksum"
    return None


def list_checkpoints(root: str | Path) -> list[Path]:
    """Return the checkpoints under `root`, damaged ones too, the newest first."""
    found = [(_NAME.fullmatch(path.name), path) for path in Path(root).glob("step-*")]
    steps = [(int(match[1]), path) for match, path in found if match]
    return [path for _, path in sorted(steps, reverse=True)]


def find_checkpoint(root: str | Path) -> Path | None:
    """Return the newest whole checkpoint under `root`, None where there is none at all.

    Damaged ones are skipped with a warning in the log. One that is whole, but whose run was killed
    just before the rename, is renamed first: of a checkpoint that was being replaced there may be
    no other.

    Raises
    ------
    CheckpointError
        If there are checkpoints and all are damaged.
    """
    _recover(Path(root))
    reasons = []
    for path in list_checkpoints(root):
        reason = damage(path)
        if reason is None:
            return path
        reasons.append(reason)
        _log.warning("skipped a damaged checkpoint: %s", reason)
    if reasons:
        raise CheckpointError(f"no checkpoint in {root} is whole: {reasons[0]}")
    return None


def require_unused(directory: Path) -> None:
    """Refuse to delete the checkpoints of an earlier run, as keeping best and last would.

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


def _recover(root: Path) -> None:
    left = [(_TEMPORARY.fullmatch(path.name), path) for path in root.glob(".step-*.tmp")]
    whole = [(match[1], path) for match, path in left if match and damage(path) is None]
    # The newer of two with one name: the other one was about to be replaced by it.
    for name, path in sorted(whole, key=lambda one: one[1].stat().st_mtime_ns, reverse=True):
        if (root / name).exists():
            continue
        try:
            path.rename(root / name)
        except OSError as error:
            _log.warning("%s is whole, but cannot be renamed (%s)", path, error.strerror or error)


def read_state(path: str | Path) -> dict[str, Any]:
    """Return the state of a checkpoint, refusing one of a format that this version cannot read."""
    file = Path(path) / "state.json"
    state = read_json(file, CheckpointError)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{file}: format {state.get('format')} was written by loopos "
            f"{state.get('loopos_version')}; loopos {__version__} reads format {FORMAT}"
        )
    return state


def require_same_run(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a run may continue from a checkpoint.

    Parameters
    ----------
    path : Path
        The checkpoint.
    then, now : mapping
        Its state, and that of the run which is to continue it.

    Raises
    ------
    CheckpointError
        Naming the first thing that changed. A run may be made longer, and make its batches
        otherwise.
    """
    now = json.loads(json.dumps(dict(now)))  # tuples are lists in the file
    _require_same(path, "", *({key: state.get(key) for key in _IDENTITY} for state in (then, now)))
    options = [
        {k: v for k, v in state["options"].items() if k not in _MAY_CHANGE} for state in (then, now)
    ]
    _require_same(path, "training.", *options)
    was, found = (state.get("trained") or {} for state in (then, now))
    for name in found:
        if was.get(name, found[name]) != found[name]:
            words = ("trained", "frozen") if was[name] else ("frozen", "trained")
            raise CheckpointError(
                f"{path}: parameter '{name}' was {words[0]}, now it is {words[1]}"
            )
    was, found = ((state.get("run_config") or {}).get("model") or {} for state in (then, now))
    # A size may be spelled out now that followed from the weights before, and the reverse.
    stated = ({k: m[k] for k in found if k in was} for m in (was, found))
    _require_same(path, "model.", *stated)
    if now["total_steps"] < then["total_steps"]:
        for key in ("num_epochs", "max_steps"):
            was, found = then["options"][key], now["options"][key]
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


def load_checkpoint(
    path: str | Path, parameters: Mapping[str, Parameter], optimizer: Optimizer | None = None
) -> dict[str, Any]:
    """Put the weights (and the optimizer's state) of a checkpoint in place; return its state.

    Raises
    ------
    CheckpointError
        If it is damaged, or its arrays are not those of `parameters`: nothing is changed then.
    """
    from safetensors.numpy import load_file

    path = Path(path)
    reason = damage(path)
    if reason is not None:
        raise CheckpointError(reason)
    state = read_state(path)
    file = path / "model.safetensors"
    arrays = load_file(file)
    for name in sorted({*arrays, *parameters}):
        if name not in arrays or name not in parameters:
            where = "the model" if name not in parameters else str(file)
            raise CheckpointError(f"{file}: parameter '{name}' is not in {where}")
        found, expected = arrays[name], parameters[name].data
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise CheckpointError(
                f"{file}: parameter '{name}' is {found.dtype}{list(found.shape)}, "
                f"expected {expected.dtype}{list(expected.shape)}"
            )
    if optimizer is not None:
        slots: dict[str, Any] = dict(load_file(path / "optimizer.safetensors"))
        try:
            optimizer.load_state_dict(slots | {"steps": state["optimizer_steps"]})
        except CheckpointError as error:
            raise CheckpointError(f"{path / 'optimizer.safetensors'}: {error}") from error
    for name, parameter in parameters.items():
        parameter.data[...] = arrays[name]
    return state


def prune(root: str | Path, keep: Iterable[Path]) -> None:
    """Delete the checkpoints under `root` that are not in `keep`, and what killed runs left.

    Raises
    ------
    OutputError
        If one cannot be deleted.
    """
    kept = {path.name for path in keep}
    old = [path for path in list_checkpoints(root) if path.name not in kept]
    for path in [*old, *Path(root).glob(".step-*.tmp")]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise OutputError(f"{path}: cannot be deleted ({error.strerror or error})") from error
