"""Configuration files in JSON, TOML and YAML: their values, the line of every key, and faults.

All three are read strictly: a key that stands twice, a number that is none and text in another
encoding are errors with file and line, whatever the language itself would let pass.
"""

from __future__ import annotations

import glob
import json
import re
import types
import typing
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from loopos.data.rows import is_pattern, matching
from loopos.errors import ConfigError, MissingFileError
from loopos.files import builtin, read_text
from loopos.hub import nearest_path

__all__ = [
    "COMMAND",
    "Faults",
    "Lines",
    "describe",
    "exists",
    "expanded",
    "find_file",
    "find_files",
    "from_anywhere",
    "place",
    "read_config_file",
]

#: Line of each section ("model") and key ("model.d_model").
Lines = dict[str, int]
#: Instead of a line: the key was set on the command line.
COMMAND = 0

_KINDS = {type(None): "nothing", list: "a list", str: "text", bool: "true or false"}


def read_config_file(path: Path) -> tuple[dict[str, Any], Lines]:
    """Read a configuration file.

    Parameters
    ----------
    path : Path
        Its ending says the language: .json, .toml, .yaml or .yml.

    Returns
    -------
    values : dict
        What the file says, unchecked.
    lines : dict of str to int
        On which line each section and key stands, as far as it can be told.

    Raises
    ------
    ConfigError
        If the file cannot be read, naming its line.
    """
    readers = {".json": _json, ".toml": _toml, ".yaml": _yaml, ".yml": _yaml}
    reader = readers.get(path.suffix.lower())
    if path.is_dir():
        raise ConfigError(f"{path}: expected a configuration, found a directory")
    if reader is None:
        raise ConfigError(f"{path}: expected a configuration ending in .json, .toml or .yaml")
    text = read_text(path, ConfigError)
    language = path.suffix[1:].upper().replace("YML", "YAML")
    try:
        values, lines = reader(path, text)
    except RecursionError as error:
        raise ConfigError(f"{path}:1: not valid {language}: nested too deeply") from error
    if not isinstance(values, dict):
        found = _KINDS.get(type(values), "a number")
        raise ConfigError(f"{path}:1: expected sections, found {found}")
    return values, lines


def _twice(path: Path, key: str, line: int, first: int) -> ConfigError:
    return ConfigError(f"{path}:{line}: the key '{key}' stands twice, first on line {first}")


# -- JSON ----------------------------------------------------------------------------------------

_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:]|-?\b(?:NaN|Infinity)\b|\n')


def _json(path: Path, text: str) -> tuple[Any, Lines]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}"
        raise ConfigError(
            f"{place}: not valid JSON: {error.msg} at column {error.colno}"
        ) from error
    except ValueError as error:  # Python reads no integer of more than 4300 digits
        raise ConfigError(f"{path}:1: not valid JSON: a number with too many digits") from error
    lines: Lines = {}
    for key, line in _json_keys(path, text):
        if key in lines:
            raise _twice(path, key, line, lines[key])
        lines[key] = line
    return values, lines


def _json_keys(path: Path, text: str) -> Iterator[tuple[str, int]]:
    """Yield the dotted path and line of every key of a valid text; refuse NaN and infinity."""
    line, string, string_line = 1, "", 1
    open_keys: list[str] = []  # one for each open bracket: the key it is the value of
    key, unnamed = "", 0
    for token in _TOKENS.findall(text):
        if token == "\n":
            line += 1
        elif token[0] == '"':
            string, string_line = json.loads(token), line
        elif token == ":":
            key = ".".join([*open_keys[1:], string])
            yield key, string_line
            key = string
        elif token in "{[":
            if token == "{" and not key:  # in a list each object has keys of its own
                unnamed += 1
                key = f"[{unnamed}]"
            open_keys.append(key)
            key = ""
        elif token in "}]":
            open_keys.pop()
            key = ""
        else:
            raise ConfigError(f"{path}:{line}: {token} is no number of JSON")


# -- TOML ----------------------------------------------------------------------------------------

_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
_TOML_LINE = re.compile(r"""^\s*(?:\[\s*(?P<table>[\w."' -]+?)\s*\]|(?P<key>[\w."' -]+?)\s*=)""")


def _toml(path: Path, text: str) -> tuple[Any, Lines]:
    import tomllib

    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, place = str(error), _PLACE.search(str(error))
        last = text.count("\n") + 1
        line = place.group(1) if place and place.group(1) else last
        column = f" (column {place.group(2)})" if place and place.group(2) else ""
        message = _PLACE.sub("", message)
        raise ConfigError(f"{path}:{line}: not valid TOML: {message}{column}") from error
    except ValueError as error:  # Python reads no integer of more than 4300 digits
        raise ConfigError(f"{path}:1: not valid TOML: a number with too many digits") from error
    lines: Lines = {}
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        found = _TOML_LINE.match(line)
        if found is None:
            continue
        name = re.sub(r"""["' ]""", "", found["table"] or found["key"])
        key = f"{table}.{name}" if table and found["key"] else name
        table = name if found["table"] else table
        lines.setdefault(key.partition(".")[0], number)
        lines.setdefault(key, number)
    return values, lines


# -- YAML ----------------------------------------------------------------------------------------


def _yaml(path: Path, text: str) -> tuple[Any, Lines]:
    import yaml

    class Loader(yaml.SafeLoader):  # plain values only
        """YAML 1.1 reads 1e-5 as text; this reads it as people mean it."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
        list("-+.0123456789"),
    )
    lines: Lines = {}
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}:{line}: not valid YAML: {problem}") from error
    except ValueError as error:  # a number with too many digits, a day that no month has
        raise ConfigError(f"{path}:1: not valid YAML: {error}") from error
    if isinstance(node, yaml.MappingNode):
        _yaml_keys(path, node, lines)
    try:
        json.dumps(values, default=str)
    except (TypeError, ValueError) as error:
        what = "a key is no text" if isinstance(error, TypeError) else "a value contains itself"
        raise ConfigError(f"{path}:1: {what}") from error
    return values, lines


def _yaml_keys(path: Path, node: Any, lines: Lines, prefix: str = "") -> None:
    """Note the line of each section, and of each key of a section."""
    import yaml

    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in lines:
            raise _twice(path, name, line, lines[name])
        lines[name] = line
        if not prefix and isinstance(value, yaml.MappingNode):
            _yaml_keys(path, value, lines, f"{name}.")


# -- files that are named -------------------------------------------------------------------------


def exists(path: Path) -> bool:
    """Whether there is such a file or directory; a name that is too long names none."""
    try:
        return path.exists()
    except OSError:  # or a directory that may not be looked into
        return False


def expanded(value: str | Path) -> Path:
    """Return a path with the home that a ``~`` stands for; a name that only begins so stays."""
    path = Path(value)
    try:
        return path.expanduser()
    except RuntimeError:  # nobody is called so
        return path


def _candidates(value: str, beside: Path) -> tuple[Path, Path]:
    path = expanded(value)
    return path, beside / path


def find_file(value: str, beside: Path, where: str) -> Path:
    """Return what `value` names: something shipped, or a path from here or from `beside`.

    Raises
    ------
    MissingFileError
        If it does not exist, beginning with `where` it is named.
    """
    if value.startswith("builtin:"):
        try:
            return builtin(value.removeprefix("builtin:"))
        except MissingFileError as error:
            raise MissingFileError(f"{where}: {error}") from error
    candidates = _candidates(value, beside)
    for candidate in candidates:
        if exists(candidate):
            return candidate
    hint = next(filter(None, map(nearest_path, candidates)), "")
    raise MissingFileError(f"{where}: {candidates[0]}: no such file or directory{hint}")


def find_files(value: str, beside: Path, where: str) -> list[Path]:
    """Return the file that `value` names as :func:`find_file`, or those that it matches."""
    candidates = _candidates(value, beside)
    if value.startswith("builtin:") or not is_pattern(value) or any(map(exists, candidates)):
        return [find_file(value, beside, where)]
    matched = _matched(candidates)
    if matched is None:
        raise MissingFileError(f"{where}: {value}: no file matches")
    return matched[1]


def _matched(candidates: tuple[Path, Path]) -> tuple[Path, list[Path]] | None:
    """Return the first pattern that matches files, and those; None where neither does."""
    for candidate in candidates:
        with suppress(MissingFileError):
            return candidate, matching(candidate)
    return None


def from_anywhere(value: str, beside: Path) -> str:
    """Return what names the same files as `value` in :func:`find_files`, from every directory.

    What is no path that is there (shipped, or on the Hub) stays as it is.
    """
    if value.startswith("builtin:"):
        return value
    candidates = _candidates(value, beside)
    found = None
    if path := next(filter(exists, candidates), None):
        # Not the path itself: what a link points to may have another ending.
        found = str(path.parent.resolve() / path.name)
    elif is_pattern(value) and (matched := _matched(candidates)):
        # The directory that the pattern starts from may have a bracket in its name.
        found = str(Path(glob.escape(str(Path.cwd())), matched[0]))
    try:
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # the name of a directory that is no UTF-8
        return value
    return found or value


# -- faults --------------------------------------------------------------------------------------


def place(source: str, lines: Lines, key: str) -> str:
    """Return file, line (where it is known) and key, or the option that set it."""
    line = lines.get(key)
    if line == COMMAND:
        return f"--set {key}"
    return f"{source}: {key}" if line is None else f"{source}:{line}: {key}"


class Faults:
    """Collects what is wrong, each with file, line (where it can be told) and key."""

    def __init__(self, source: str, lines: Lines):
        self.source, self.lines = source, lines
        self._found: list[str] = []

    def add(self, key: str, message: str) -> None:
        """Remember one fault."""
        self._found.append(f"{place(self.source, self.lines, key)}: {message}")

    def stop(self) -> None:
        """Raise ConfigError if anything was wrong."""
        if self._found:
            raise ConfigError("\n".join(self._found))


_WORDS = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "an object",
}


def describe(kind: Any) -> str:
    """Say in words what values a type takes."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is type(None):
        return "null"
    if origin is Literal:
        return "one of " * (len(arguments) > 1) + ", ".join(repr(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(part) for part in arguments)
    if origin is list:
        return f"a list of {describe(arguments[0]).split(' ', 1)[-1]}s"
    if origin is tuple and arguments[1:] == (...,):
        inner = describe(arguments[0])
        choices = typing.get_origin(arguments[0]) is Literal
        return f"a list of {inner}" if choices else f"a list of {inner.split(' ', 1)[-1]}s"
    if origin is tuple:
        return f"a list of {len(arguments)} numbers"
    return _WORDS.get(kind, str(kind))
