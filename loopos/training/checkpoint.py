"""Checkpoints: directories of safetensors and JSON, checksummed, written beside and renamed.

``<root>/step-00000012/`` holds ``model.safetensors`` (the parameters that are trained, by name),
``optimizer.safetensors``, ``state.json`` (position, options, seed, versions, one SHA-256 of all
parameters that are frozen) and ``manifest.json`` (size and SHA-256 of the other three). A directory
without a manifest that fits is damaged: it is skipped, never read.
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
from loopos.errors import CheckpointError, OutputError
from loopos.files import atomic_directory, read_json
from loopos.training.optim import Optimizer
from loopos.version import __version__

__all__ = ["damage", "find_checkpoint", "frozen_sha256", "list_checkpoints", "load_checkpoint",
           "prune", "read_state", "recover", "save_checkpoint"]  # fmt: skip

#: Format 1 held the frozen parameters too; it is still read.
FORMAT = 2
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_NAME = re.compile(r"step-(\d{8,})")
#: What a checkpoint is called before the rename, see `files.atomic_directory`.
_TEMPORARY = re.compile(r"\.(step-\d{8,})\.[0-9a-f]{8}(?:\.old)?\.tmp")
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
        Frozen ones are not written.
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
        trained = {name: p.data for name, p in parameters.items() if p.requires_grad}
        arrays = {name: np.ascontiguousarray(array) for name, array in trained.items()}
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


def frozen_sha256(parameters: Mapping[str, Parameter]) -> str | None:
    """Return one digest of the frozen parameters (names, dtypes, shapes, bytes); None without any.

    It reads all of them, so ask once a run.
    """
    frozen = {name: p.data for name, p in sorted(parameters.items()) if not p.requires_grad}
    digest = hashlib.sha256()
    for name, array in frozen.items():
        little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
        digest.update(json.dumps([name, little.dtype.str, array.shape]).encode("ascii"))
        digest.update(little.reshape(-1).view(np.uint8).data)
    return digest.hexdigest() if frozen else None


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
    except (OSError, ValueError, RecursionError) as error:
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

    Damaged ones are skipped with a warning in the log.

    Raises
    ------
    CheckpointError
        If there are checkpoints and all are damaged.
    """
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


def recover(root: str | Path) -> None:
    """Tidy up after a killed run, before a new one; nobody else may be writing under `root`.

    A checkpoint that is whole, but whose run was killed just before the rename, is renamed: of one
    that was being replaced there may be no other. What is half-written is deleted.

    Raises
    ------
    OutputError
        If something cannot be renamed or deleted.
    """
    root = Path(root)
    left = [(_TEMPORARY.fullmatch(path.name), path) for path in root.glob(".step-*.tmp")]
    whole = [(match[1], path) for match, path in left if match and damage(path) is None]
    # The newer of two with one name: the other one was about to be replaced by it.
    for name, path in sorted(whole, key=lambda one: one[1].stat().st_mtime_ns, reverse=True):
        if damage(root / name) is None:
            continue
        try:
            if (root / name).exists():
                shutil.rmtree(root / name)
            path.rename(root / name)
        except OSError as error:
            raise OutputError(f"{path}: cannot be renamed ({error.strerror or error})") from error
    _delete(path for match, path in left if match and path.exists())


def read_state(path: str | Path) -> dict[str, Any]:
    """Return the state of a checkpoint, refusing one of a format that this version cannot read."""
    file = Path(path) / "state.json"
    state = read_json(file, CheckpointError)
    found = state.get("format")
    if isinstance(found, bool) or not isinstance(found, int):
        raise CheckpointError(f"{file}: has no format number, so it is of no checkpoint of loopos")
    if not 1 <= found <= FORMAT:
        raise CheckpointError(
            f"{file}: format {found} was written by loopos {state.get('loopos_version')}; "
            f"loopos {__version__} reads formats 1 to {FORMAT}"
        )
    return state


def load_checkpoint(
    path: str | Path, parameters: Mapping[str, Parameter], optimizer: Optimizer | None = None
) -> dict[str, Any]:
    """Put the weights (and the optimizer's state) of a checkpoint in place; return its state.

    Frozen parameters are left as they are, but for a checkpoint of format 1, which holds them.

    Raises
    ------
    CheckpointError
        If it is damaged, or its arrays are not those of `parameters`: nothing is changed then.
    """
    path = Path(path)
    reason = damage(path)
    if reason is not None:
        raise CheckpointError(reason)
    state = read_state(path)
    steps = state.get("optimizer_steps")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise CheckpointError(
            f"{path / 'state.json'}: key 'optimizer_steps' is {steps!r}, expected a number of steps"
        )
    file = path / "model.safetensors"
    arrays = _arrays(file)
    held = {n for n, p in parameters.items() if p.requires_grad or state["format"] == 1}
    for name in sorted({*arrays, *held}):
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
        slots: dict[str, Any] = dict(_arrays(path / "optimizer.safetensors"))
        try:
            optimizer.load_state_dict(slots | {"steps": steps})
        except CheckpointError as error:
            raise CheckpointError(f"{path / 'optimizer.safetensors'}: {error}") from error
    for name, array in arrays.items():
        parameters[name].data[...] = array
    return state


def _arrays(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except SafetensorError as error:  # its checksum fits, but loopos has not written it
        raise CheckpointError(f"{file}: cannot be read ({error})") from error


def prune(root: str | Path, newest: Path, best: Path | None = None) -> None:
    """Delete the checkpoints under `root`, but for two or three of them.

    The newest and the best stay; where they are one, the one before it stays too, so that there is
    always another to continue from should a file be damaged.

    Raises
    ------
    OutputError
        If one cannot be deleted.
    """
    kept = {newest.name, (best or newest).name}
    found = list_checkpoints(root)
    before = [path.name for path in found[found.index(newest) + 1 :] if path.name not in kept]
    kept |= set(before[: 2 - len(kept)])
    _delete(path for path in found if path.name not in kept)


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise OutputError(f"{path}: cannot be deleted ({error.strerror or error})") from error
