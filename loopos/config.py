"""Configurations: JSON, TOML or YAML, strict, each option defined once.

The ``training`` section is the method's ``Options`` dataclass, the ``model`` section the fields of
``TransformerConfig``; ``computation`` and ``data`` are defined here. A key that nobody knows is an
error that names the nearest one; so is a value of the wrong kind. Nothing is ignored.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loopos.errors import ConfigError, InputError, MissingFileError, nearest
from loopos.files import builtin, read_text
from loopos.methods import METHODS, PLANNED
from loopos.models.config import TransformerConfig
from loopos.training.options import TrainingOptions

__all__ = ["Computation", "Data", "RunConfig", "load_config", "shipped_configs"]

SHIPPED = Path(__file__).with_name("configs")
#: Fields of TransformerConfig that the files of a family decide, not a configuration.
_NOT_CONFIGURED = {"family"}


@dataclass(frozen=True)
class Computation:
    """What is computed, and on what.

    Attributes
    ----------
    method : str
        "fine_tuning", or "autoregressive" with the mode "pretraining".
    mode : {"posttraining", "pretraining"}
    description : str
        For people.
    backend : str
        "auto" or the name of a backend.
    num_threads : int or None
        Of matrix products; None means all.
    seed : int
        Of weights, order and dropout.
    """

    method: str
    mode: Literal["posttraining", "pretraining"] = "posttraining"
    description: str = ""
    backend: str = "auto"
    num_threads: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Data:
    """Where data come from and results go; ``builtin:NAME`` is a file that loopos ships.

    Attributes
    ----------
    training_data : str
        File of rows.
    validation_data : str or None
        Another; None splits the training data.
    validation_fraction : float
        Share of that split, in [0, 1); 0 means no validation.
    pretrained_weights : str or None
        Directory of a model; None starts fresh.
    tokenizer : str or None
        Directory or file; None takes the one beside the weights, or trains one on the training
        texts.
    text_field, label_field : str
        Names of the fields of a row.
    output_dir : str or None
        None means ``outputs/<method>``.
    """

    training_data: str
    validation_data: str | None = None
    validation_fraction: float = 0.1
    pretrained_weights: str | None = None
    tokenizer: str | None = None
    text_field: str = "text"
    label_field: str = "label"
    output_dir: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """A whole configuration.

    Attributes
    ----------
    source : str
        The file, for messages.
    model : dict
        What the ``model`` section says: sizes and options of the transformer, ``num_classes``.
    computation, data, training
        The other sections; `training` is the method's ``Options``.
    """

    source: str
    model: dict[str, Any]
    computation: Computation
    training: TrainingOptions
    data: Data

    @property
    def method(self) -> types.ModuleType:
        """The module of the method."""
        return importlib.import_module(METHODS[self.computation.mode, self.computation.method])

    @property
    def output_dir(self) -> Path:
        """Where the run goes."""
        return Path(self.data.output_dir or Path("outputs") / self.computation.method)

    def as_dict(self) -> dict[str, Any]:
        """Return the whole configuration, defaults included, as JSON values."""
        return {
            "model": {"type": "transformer"} | self.model,
            "computation": dataclasses.asdict(self.computation),
            "training": self.training.as_dict(),
            "data": dataclasses.asdict(self.data) | {"output_dir": str(self.output_dir)},
        }

    def path(self, key: str) -> Path:
        """Return the file that ``data.<key>`` names.

        ``builtin:NAME`` is shipped; a relative path is looked for from the current directory, then
        from that of the configuration.

        Raises
        ------
        MissingFileError
            If it does not exist.
        """
        value = str(getattr(self.data, key))
        where = f"{self.source}: data.{key}"
        if value.startswith("builtin:"):
            try:
                return builtin(value.removeprefix("builtin:"))
            except MissingFileError as error:
                raise MissingFileError(f"{where}: {error}") from error
        path = Path(value).expanduser()
        beside = Path(self.source).parent / path
        for candidate in (path, beside):
            if candidate.exists():
                return candidate
        directory = path.parent if path.parent.is_dir() else Path()
        hint = nearest(path.name, (p.name for p in directory.iterdir()))
        raise MissingFileError(f"{where}: {path}: no such file or directory{hint}")


def shipped_configs() -> dict[str, Path]:
    """Return the configurations that come with loopos, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.json"))}


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration.

    Parameters
    ----------
    source : path or str
        A .json, .toml, .yaml or .yml file, or the name of a shipped configuration.
    overrides : sequence of str
        ``"section.key=value"`` each; the value is JSON, or text where it is none.

    Raises
    ------
    MissingFileError
        If there is no such file.
    ConfigError
        If it cannot be read, or a key or value does not fit; one line for each fault.
    """
    path = Path(source)
    shipped = shipped_configs()
    if str(source) in shipped and not path.exists():
        path = shipped[str(source)]
    if not path.is_file():
        hint = nearest(str(source), shipped)
        raise MissingFileError(
            f"{source}: no such configuration{hint} (shipped: {', '.join(shipped)})"
        )
    text = read_text(path, ConfigError)
    raw = _parse(path, text)
    faults = _Faults(str(path), text)
    for section, content in raw.items():
        if section not in _SECTIONS:
            faults.add(section, f"unknown section{nearest(section, _SECTIONS)}")
        elif not isinstance(content, dict):
            faults.add(section, f"expected a section of keys, found {content!r}")
    faults.stop()
    sections = {name: dict(raw.get(name, {})) for name in _SECTIONS}
    for override in overrides:
        _override(sections, override, faults)
    return _build(sections, faults)


_SECTIONS = ("model", "computation", "training", "data")


class _Faults:
    """Collects what is wrong, each with file, line (where it can be told) and key."""

    def __init__(self, source: str, text: str):
        self.source, self._text = source, text
        self.set_keys: set[str] = set()
        self._lines: list[str] = []

    def add(self, key: str, message: str) -> None:
        """Remember one fault."""
        self._lines.append(f"{self._place(key)}: {key}: {message}")

    def _place(self, key: str) -> str:
        if key in self.set_keys:
            return "--set"
        name = re.escape(key.rpartition(".")[2])
        found = list(re.finditer(rf'(?<![\w."]){name}\s*[:=]|"{name}"\s*[:=]', self._text))
        if len(found) != 1:
            return self.source
        return f"{self.source}:{self._text.count(chr(10), 0, found[0].start()) + 1}"

    def stop(self) -> None:
        """Raise ConfigError if anything was wrong."""
        if self._lines:
            raise ConfigError("\n".join(self._lines))


# -- reading -------------------------------------------------------------------------------------


def _parse(path: Path, text: str) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if suffix == ".json":
        value = _parse_json(path, text)
    elif suffix == ".toml":
        import tomllib

        try:
            value = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from error
    elif suffix in (".yaml", ".yml"):
        value = _parse_yaml(path, text)
    else:
        raise ConfigError(f"{path}: expected a configuration ending in .json, .toml or .yaml")
    if not isinstance(value, dict):
        raise ConfigError(f"{path}:1: expected sections, found {type(value).__name__}")
    return value


def _parse_json(path: Path, text: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{path}: the key '{key}' stands twice in one section")
        return dict(items)

    def constant(name: str) -> Any:
        raise ConfigError(f"{path}: {name} is no number that JSON knows")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error


def _parse_yaml(path: Path, text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 reads 1e-5 as text; this reads it as people mean it."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
        list("-+.0123456789"),
    )
    try:
        return yaml.load(text, Loader=Loader)  # a SafeLoader: plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}") from error


def _override(sections: dict[str, dict[str, Any]], override: str, faults: _Faults) -> None:
    key, equals, value = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals or not dot or section not in sections:
        raise ConfigError(
            f"--set {override}: expected section.key=value"
            f"{nearest(section, _SECTIONS)} (sections: {', '.join(_SECTIONS)})"
        )
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    sections[section][name] = parsed
    faults.set_keys.add(f"{section}.{name}")


# -- validation ----------------------------------------------------------------------------------


def _build(sections: dict[str, dict[str, Any]], faults: _Faults) -> RunConfig:
    computation = _section("computation", Computation, sections["computation"], faults)
    faults.stop()
    key = (computation.mode, computation.method)
    if key not in METHODS:
        known = {method: mode for mode, method in METHODS}
        if computation.method in known:
            hint = f"; '{computation.method}' goes with the mode '{known[computation.method]}'"
        elif computation.method in PLANNED:
            hint = " in this version"
        else:
            hint = nearest(computation.method, known)
        faults.add(
            "computation.method",
            f"no method '{computation.method}' with mode '{computation.mode}'{hint} "
            f"(known: {', '.join(known)})",
        )
        faults.stop()
    method = importlib.import_module(METHODS[key])
    model = _model_section(sections["model"], faults)
    training = _section("training", method.Options, sections["training"], faults)
    data = _section("data", Data, sections["data"], faults)
    if data is not None and not 0 <= data.validation_fraction < 1:
        faults.add("data.validation_fraction", "expected a number in [0, 1)")
    faults.stop()
    return RunConfig(faults.source, model, computation, training, data)


def _model_section(raw: dict[str, Any], faults: _Faults) -> dict[str, Any]:
    hints = typing.get_type_hints(TransformerConfig)
    fields = {
        field.name: (hints[field.name], None)
        for field in dataclasses.fields(TransformerConfig)
        if field.name not in _NOT_CONFIGURED
    }
    fields["num_classes"] = (int, None)
    given = dict(raw)
    kind = given.pop("type", "transformer")
    if kind != "transformer":
        faults.add("model.type", f"expected 'transformer', found {kind!r}")
    given = {name: value for name, value in given.items() if value is not None}
    _check("model", fields, given, faults)
    return {name: value for name, value in given.items() if name in fields}


def _section(name: str, kind: type, raw: dict[str, Any], faults: _Faults) -> Any:
    """Return a dataclass made of a section, None if it does not fit."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: (hints[field.name], field.default) for field in dataclasses.fields(kind)}
    values = _check(name, fields, raw, faults)
    if values is None:
        return None
    try:
        return kind(**values)
    except InputError as error:  # a value of the right type, out of its range
        key, _, message = str(error).partition(": ")
        faults.add(key, message) if message else faults.add(name, key)
        return None


def _check(
    section: str, fields: Mapping[str, tuple[Any, Any]], raw: dict[str, Any], faults: _Faults
) -> dict[str, Any] | None:
    """Check keys and types strictly through pydantic; None if anything is wrong."""
    from pydantic import ConfigDict, ValidationError, create_model

    definitions: dict[str, Any] = {
        name: (kind, ... if default is dataclasses.MISSING else default)
        for name, (kind, default) in fields.items()
    }
    strict = ConfigDict(extra="forbid", strict=True)
    checker = create_model(section, __config__=strict, **definitions)
    try:
        # JSON mode: a list may stand for a tuple, and nothing else is converted.
        checked = checker.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        seen = set()
        for fault in error.errors():
            name = str(fault["loc"][0])
            if name not in seen:
                seen.add(name)
                faults.add(f"{section}.{name}", _explain(name, fault, fields, section, raw))
        return None
    return {name: getattr(checked, name) for name in raw}


def _explain(
    name: str, fault: Any, fields: Mapping[str, Any], section: str, raw: dict[str, Any]
) -> str:
    if fault["type"] == "extra_forbidden":
        owner = _owner(section, name)
        if owner is not None:
            return f"unknown key here; {owner}"
        return f"unknown key{nearest(name, fields)}"
    if fault["type"] == "missing":
        return "is needed"
    return f"expected {_describe(fields[name][0])}, found {json.dumps(raw[name], default=str)}"


def _owner(section: str, name: str) -> str | None:
    """Say which method or section knows a key that this one does not."""
    if section == "data" and name in PLANNED.values():
        method = next(m for m, key in PLANNED.items() if key == name)
        return f"it belongs to the method '{method}', which this version does not have"
    if section == "training":
        for (_, method), module in METHODS.items():
            options = importlib.import_module(module).Options
            if name in {field.name for field in dataclasses.fields(options)}:
                return f"it belongs to the method '{method}'"
    homes = {"computation": Computation, "data": Data, "training": TrainingOptions}
    for home, kind in homes.items():
        if home != section and name in {field.name for field in dataclasses.fields(kind)}:
            return f"it belongs to the section '{home}'"
    if section != "model" and name in {f.name for f in dataclasses.fields(TransformerConfig)}:
        return "it belongs to the section 'model'"
    return None


_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


def _describe(kind: Any) -> str:
    """Say in words what values a type takes."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is type(None):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(repr(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(part) for part in arguments)
    if origin is list:
        return f"a list of {_describe(arguments[0]).split(' ', 1)[-1]}s"
    if origin is tuple:
        return f"a list of {len(arguments)} numbers"
    return _WORDS.get(kind, str(kind))
