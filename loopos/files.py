"""Writing that never leaves a half-written file, and reading that says what is wrong and where."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from loopos.errors import InputError, LooposError, MissingFileError, OutputError, nearest

#: What `_temporary` and `_aside` make of a name.
_LEFT = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}(?P<aside>\.old)?\.tmp")


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


def _aside(temporary: Path) -> Path:
    """Return where what `temporary` replaces is kept until it is replaced, always whole."""
    return temporary.with_name(temporary.name.removesuffix("tmp") + "old.tmp")


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
    temporary = _temporary(target)
    old = _aside(temporary)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if _is_no_directory(target):
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
    except OutputError as error:  # it says already what is wrong, but where nobody will find it
        raise OutputError(str(error).replace(str(temporary), str(path))) from error
    except LooposError:  # some of them are OSErrors too
        raise
    except OSError as error:
        raise _output_error(Path(path), error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists():
            with suppress(OSError):  # what cannot be moved back stays under its other name
                # Under that name it is whole or not at all, so that `tidy` may put it back.
                os.replace(old, temporary if target.exists() else target)
            shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file or a directory, if it is there; what a link stands for, and not the link.

    Raises
    ------
    OutputError
        If it cannot be deleted.
    """
    target = _target(path)
    if not target.exists():
        return
    # In one move: nobody finds half of it, and what a kill leaves of it `tidy` clears.
    gone = _temporary(target)
    try:
        os.replace(target, gone)
        if gone.is_dir():
            shutil.rmtree(gone)
        else:
            gone.unlink()
    except OSError as error:
        raise OutputError(f"{path}: cannot be deleted ({error.strerror or error})") from error


def tidy(directory: Path, names: Iterable[str]) -> None:
    """Clear what killed writers of `names` left in `directory` and in directories of these names.

    What was moved aside to be replaced, and was not replaced, is put back first. Nobody may be
    writing there: see :func:`locked_directory`.

    Raises
    ------
    OutputError
        If something cannot be moved or deleted.
    """
    wanted = set(names)
    for place in (directory, *(directory / name for name in sorted(wanted))):
        found = [(_LEFT.fullmatch(path.name), path) for path in place.glob(".*.tmp")]
        left = [(match, path) for match, path in found if match]
        for match, path in sorted(left, key=lambda one: one[0]["aside"] is None):
            if place == directory and match["name"] not in wanted:
                continue
            try:
                if match["aside"] and not (place / match["name"]).exists():
                    path.rename(place / match["name"])
                elif path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except OSError as error:
                raise OutputError(
                    f"{path}: cannot be deleted ({error.strerror or error})"
                ) from error


class _Held(threading.local):
    """The directories that this thread has locked, each with the process that did it."""

    def __init__(self) -> None:
        self.by: dict[Path, int] = {}


_held = _Held()


@contextmanager
def locked_directory(path: str | Path) -> Iterator[None]:
    """Keep every other run out of the directory `path` while the block runs.

    The lock is the operating system's, on the file ``.lock`` in it: however the process ends, it
    is free then. A block within a block of the same thread passes. The directory is made if there
    is none; what was made is removed again if the block leaves it empty.

    Raises
    ------
    InputError
        If another thread or process holds it.
    OutputError
        If the directory cannot be written.
    """
    target = _target(path)
    process = os.getpid()
    if _held.by.get(target) == process:
        yield
        return
    with ExitStack() as stack:
        try:
            _lock(path, target, stack)
        except LooposError:  # some of them are OSErrors, and say already what is wrong
            raise
        except OSError as error:
            raise _output_error(Path(path), error) from error
        _held.by[target] = process
        try:
            yield
        finally:
            del _held.by[target]
            if os.getpid() != process:  # a fork is leaving the block: the lock is not its own
                stack.pop_all()


def _lock(path: str | Path, target: Path, stack: ExitStack) -> None:
    """Lock the directory `target`; `stack` undoes it."""
    from filelock import FileLock, Timeout

    lock = FileLock(target / ".lock", fallback_to_soft=False)
    for attempt in range(100):
        for directory in reversed((target, *target.parents)):
            if not os.path.lexists(directory):
                stack.callback(_forget, directory.rmdir)
        try:
            target.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
            break
        except (FileExistsError, FileNotFoundError) as error:
            if _is_no_directory(target):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
            if attempt == 99:  # else whoever made the directory has just removed it again
                raise
        except Timeout as error:
            raise InputError(
                f"{path}: another run is going in this directory; wait for its end, or choose "
                "another directory"
            ) from error
    stack.callback(lock.release)
    # While it is locked: whoever has opened it already finds that it has no name any more.
    stack.callback(_forget, (target / ".lock").unlink)


def _is_no_directory(path: Path) -> bool:
    """Return whether something else is at `path`: in one look, as others make and remove it."""
    try:
        return not stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _forget(remove: Callable[[], None]) -> None:
    with suppress(OSError):  # a directory that is not empty; a file that is gone
        remove()


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
