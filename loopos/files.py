"""Writing that never leaves a half-written file, and reading that says what is wrong and where."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loopos.errors import InputError, LooposError, MissingFileError, OutputError, nearest


def _output_error(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path}: cannot be written ({error.strerror or error})")


def _sync(path: Path) -> None:
    """Flush one file or directory to disk, so that a rename never outruns its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    if os.name == "posix":  # directories cannot be opened for fsync elsewhere
        _sync(path)


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"


def _target(path: str | Path) -> Path:
    """Return what `path` stands for: a link is written through, not replaced."""
    return Path(os.path.realpath(path))


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; renamed onto it when the block ends without error.

    Raises
    ------
    OutputError
        If the file cannot be written; what stood at `path` before is intact.
    """
    target = _target(path)
    temporary = _temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync_directory(target.parent)
    except LooposError:  # some of them are OSErrors, and say already what is wrong
        raise
    except OSError as error:
        raise _output_error(Path(path), error) from error
    finally:
        with suppress(OSError):  # where nothing could be written, nothing can be removed
            temporary.unlink()


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file and a rename (raises OutputError)."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8 through a temporary file and a rename."""
    atomic_write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON through a temporary file and a rename."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes `path` when the block ends without error.

    An existing `path` is moved aside, replaced and only then removed. If the block raises, the
    temporary directory is removed and `path` is as it was.

    Raises
    ------
    OutputError
        If the directory cannot be written.
    """
    target = _target(path)
    temporary, old = _temporary(target), _temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() or file.is_dir():
                (_sync if file.is_file() else _sync_directory)(file)
        _sync_directory(temporary)
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
        _sync_directory(target.parent)
    except LooposError:  # some of them are OSErrors, and say already what is wrong
        raise
    except OSError as error:
        raise _output_error(Path(path), error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            with suppress(OSError):  # it stays under its other name
                os.replace(old, target)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


ASSETS = Path(__file__).with_name("assets")


def builtin(name: str) -> Path:
    """Return the path of a file or directory that loopos ships, such as ``"base_model"``.

    Raises
    ------
    MissingFileError
        If there is none of that name.
    """
    names = sorted(path.name for path in ASSETS.iterdir() if not path.name.startswith("_"))
    if name not in names:
        raise MissingFileError(f"loopos ships no '{name}'{nearest(name, names)}")
    return ASSETS / name


#: The first bytes of a GGUF file.
GGUF_MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Return whether a path names a GGUF file, by its ending or its first bytes.

    Raises
    ------
    InputError
        If there is a file that cannot be read.
    """
    if path.suffix.lower() == ".gguf":
        return not path.is_dir()
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as stream:
            return stream.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_text(path: str | Path, error: type[InputError] = InputError) -> str:
    """Return the UTF-8 text of `path`; a byte-order mark is dropped.

    Raises
    ------
    MissingFileError
        If there is no such file.
    InputError
        (or the class given as `error`) if it is a directory, unreadable, or not UTF-8.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError as fault:
        raise MissingFileError(f"{path}: no such file") from fault
    except OSError as fault:
        raise error(f"{path}: cannot be read ({fault.strerror or fault})") from fault
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = raw[: fault.start].count(b"\n") + 1
        byte = raw[fault.start]
        raise error(f"{path}:{line}: not UTF-8 text (byte 0x{byte:02x})") from fault


def read_json(path: str | Path, error: type[InputError] = InputError) -> dict[str, Any]:
    """Return the JSON object in `path`; faults are one sentence naming file and line.

    Raises
    ------
    MissingFileError
        If there is no such file.
    InputError
        (or the class given as `error`) if the file is not a JSON object in UTF-8.
    """
    text = read_text(path, error)  # its errors are ValueErrors too
    try:
        value = json.loads(text)
    except json.JSONDecodeError as fault:
        raise error(f"{path}:{fault.lineno}: not valid JSON ({fault.msg})") from fault
    except RecursionError as fault:
        raise error(f"{path}:1: not valid JSON (nested too deeply)") from fault
    except ValueError as fault:  # Python reads no integer of more than 4300 digits
        raise error(f"{path}:1: not valid JSON (a number with too many digits)") from fault
    if not isinstance(value, dict):
        raise error(f"{path}:1: expected a JSON object, found {type(value).__name__}")
    return value
