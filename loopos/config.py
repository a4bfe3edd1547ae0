"""Configurations: JSON, TOML or YAML, strict, each option defined once.

The ``training`` section is the method's ``Options`` dataclass, the ``model`` section the fields of
``TransformerConfig``; ``computation`` and ``data`` are in :mod:`loopos.config_sections`. A key that
nobody knows is an error that names the nearest one; so is a value of the wrong kind. Nothing is
ignored.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loopos.config_checks import check_reward_model, check_rows, check_validation
from loopos.config_files import (
    COMMAND,
    Faults,
    Lines,
    describe,
    exists,
    expanded,
    find_file,
    find_files,
    from_anywhere,
    place,
    read_config_file,
)
from loopos.config_sections import Computation, Data, ModelKeys, at_least
from loopos.errors import ConfigError, InputError, MissingFileError, nearest
from loopos.hub import is_hub_name, nearest_path
from loopos.methods import DATA_KEYS, METHODS
from loopos.models.config import ACTIVATIONS, NORM_PLACEMENTS, NORMS, POSITIONS, TransformerConfig
from loopos.models.rope import RopeScaling
from loopos.training.options import TrainingOptions

__all__ = ["Computation", "Data", "ModelKeys", "RunConfig", "load_config", "model_fields",
           "shipped_configs"]  # fmt: skip

SHIPPED = Path(__file__).with_name("configs")
#: Fields of TransformerConfig that the files of a family decide, not a configuration.
_NOT_CONFIGURED = {"family"}
_CHOICES = {
    "norm": NORMS,
    "norm_placement": NORM_PLACEMENTS,
    "activation": ACTIVATIONS,
    "positions": POSITIONS,
}
#: Sizes that a fresh model cannot do without.
NEEDED_SIZES = tuple(
    f.name for f in dataclasses.fields(TransformerConfig) if f.default is dataclasses.MISSING
)
_SECTIONS = ("model", "computation", "training", "data")
#: Keys of the ``data`` section that name what a run reads.
_INPUTS = ("training_data", *dict.fromkeys(DATA_KEYS.values()), "validation_data",
           "pretrained_weights", "reward_model", "tokenizer")  # fmt: skip
#: Where editors look for the JSON Schema of a file; nothing to loopos.
_SCHEMA_KEY = "$schema"


@dataclass(frozen=True)
class RunConfig:
    """A whole configuration.

    Attributes
    ----------
    source : str
        The file, for messages.
    model : dict
        Sizes and options of the transformer, and ``num_classes``. What is absent follows from
        ``data.pretrained_weights``, and what is given must agree with them.
    computation : Computation
        What is computed, and on what.
    training : TrainingOptions
        How to train: the method's ``Options``.
    data : Data
        Where data come from and results go.
    lines : dict of str to int
        On which line of the file a key stands, for messages.
    """

    source: str
    model: dict[str, Any]
    computation: Computation
    training: TrainingOptions
    data: Data
    lines: Lines = field(default_factory=dict, repr=False, compare=False)

    def where(self, key: str) -> str:
        """Return file, line and name of a key such as ``"data.tokenizer"``, for messages."""
        return place(self.source, self.lines, key)

    @property
    def method(self) -> types.ModuleType:
        """The module of the method."""
        return importlib.import_module(METHODS[self.computation.mode, self.computation.method])

    @property
    def data_key(self) -> str:
        """Which key of the ``data`` section names the rows to train on."""
        return DATA_KEYS.get(self.computation.method, "training_data")

    @property
    def output_dir(self) -> Path:
        """Where the run goes."""
        return expanded(self.data.output_dir or Path("outputs") / self.computation.method)

    def as_dict(self) -> dict[str, Any]:
        """Return the whole configuration, defaults included, as JSON values."""
        model = {"type": "transformer"} | self.model
        if isinstance(model.get("rope_scaling"), RopeScaling):
            model["rope_scaling"] = dataclasses.asdict(model["rope_scaling"])
        return {
            "model": model,
            "computation": dataclasses.asdict(self.computation),
            "training": self.training.as_dict(),
            "data": dataclasses.asdict(self.data) | {"output_dir": str(self.output_dir)},
        }

    def inputs(self) -> dict[str, str | list[str]]:
        """Return the keys of ``data`` that name what is read, with absolute paths.

        ``builtin:NAME`` and names on the Hugging Face Hub stay as they are.
        """
        beside = Path(self.source).parent
        found: dict[str, str | list[str]] = {}
        for key in _INPUTS:
            value = getattr(self.data, key)
            if isinstance(value, list):
                found[key] = [from_anywhere(text, beside) for text in value]
            elif value is not None:
                found[key] = from_anywhere(value, beside)
        return found

    def path(self, key: str) -> Path:
        """Return the one file or directory that ``data.<key>`` names; see :meth:`paths`.

        Raises
        ------
        MissingFileError
            If it does not exist.
        ConfigError
            If several are named.
        """
        value = getattr(self.data, key)
        where = self.where(f"data.{key}")
        if isinstance(value, list):
            if len(value) > 1:
                raise ConfigError(f"{where}: expected one path, found {len(value)}")
            value = value[0]
        return find_file(str(value), Path(self.source).parent, where)

    def paths(self, key: str) -> list[Path]:
        """Return the files that ``data.<key>`` names.

        ``builtin:NAME`` is shipped; a relative path or pattern is looked for from the current
        directory, then from that of the configuration. The files of a pattern are sorted.

        Raises
        ------
        MissingFileError
            If one does not exist, or nothing matches a pattern.
        """
        value = getattr(self.data, key)
        beside, where = Path(self.source).parent, self.where(f"data.{key}")
        texts = value if isinstance(value, list) else [str(value)]
        return [path for text in texts for path in find_files(text, beside, where)]

    def model_source(self, key: str) -> str:
        """Return the path that ``data.<key>`` names, or else a name on the Hugging Face Hub.

        Raises
        ------
        MissingFileError
            If there is no such path and it is no such name.
        """
        try:
            return str(self.path(key))
        except MissingFileError:
            value = str(getattr(self.data, key))
            if not is_hub_name(value):
                raise
            return value


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
    path, shipped = Path(source), shipped_configs()
    if str(source) in shipped and not path.is_file():
        path = shipped[str(source)]
    if not exists(path):
        hints = [nearest(path.name, shipped), nearest_path(path)]
        if path.suffix:  # a file was meant: no shipped one is called so
            hints.reverse()
        hint = hints[0] or hints[1]
        raise MissingFileError(
            f"{source}: no such configuration{hint} (shipped: {', '.join(shipped)})"
        )
    raw, lines = read_config_file(path)
    faults = Faults(str(path), lines)
    raw.pop(_SCHEMA_KEY, None)
    for section, content in raw.items():
        if section not in _SECTIONS:
            faults.add(str(section), f"unknown section{nearest(str(section), _SECTIONS)}")
        elif not isinstance(content, dict):
            faults.add(section, f"expected a section of keys, found {content!r}")
    faults.stop()
    sections = {
        name: {str(key): value for key, value in raw.get(name, {}).items()} for name in _SECTIONS
    }
    for override in overrides:
        _override(sections, override, faults)
    return _build(sections, faults)


def _override(sections: dict[str, dict[str, Any]], override: str, faults: Faults) -> None:
    key, equals, value = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        hint = ""
        for home, names in _homes().items():
            if equals and section in names:
                hint = f", as in {home}.{override}"
        raise ConfigError(f"--set {override}: expected SECTION.KEY=VALUE{hint}")
    if section not in sections:
        raise ConfigError(
            f"--set {override}: unknown section '{section}'{nearest(section, _SECTIONS)} "
            f"(known: {', '.join(_SECTIONS)})"
        )
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = value
    texts = {"computation": Computation, "data": Data}.get(section)
    kind = typing.get_type_hints(texts).get(name) if texts else None
    kinds = (kind, *typing.get_args(kind))
    fits = (str, type(None), list) if list[str] in kinds else (str, type(None))
    if str in kinds and not isinstance(parsed, fits):
        parsed = value  # a directory may well be called 2024
    *outer, last = name.split(".")
    target = sections[section]
    for part in outer:  # as in training.lora.rank
        inner = target.get(part)
        target[part] = dict(inner) if isinstance(inner, dict) else {}
        target = target[part]
    target[last] = parsed
    faults.lines[f"{section}.{name}"] = COMMAND


# -- validation ----------------------------------------------------------------------------------


def _build(sections: dict[str, dict[str, Any]], faults: Faults) -> RunConfig:
    model = _model_section(sections["model"], faults)
    computation = _section("computation", Computation, sections["computation"], faults)
    # Whatever else is wrong with its section, a known method says which options there are.
    methods = {name: module for (_, name), module in METHODS.items()}
    asked = sections["computation"].get("method")
    if computation is not None and (computation.mode, computation.method) not in METHODS:
        _refuse_method(computation, faults)
        faults.stop()  # nobody can say which options and data it has
    training = None
    if isinstance(asked, str) and asked in methods:
        options = importlib.import_module(methods[asked]).Options
        training = _section("training", options, sections["training"], faults)
    data = _section("data", Data, sections["data"], faults)
    if data is not None and isinstance(asked, str) and asked in methods:
        check_rows(asked, data, faults)
    if model is not None and data is not None:
        _check_sizes(model, data, faults)
    if training is not None and data is not None:
        check_validation(training, data, faults)
        check_reward_model(training, data, faults)
        if training.lora is not None and data.pretrained_weights is None:
            faults.add(
                "training.lora",
                "adapters need data.pretrained_weights, as only they are trained and saved",
            )
    language_model = computation is not None and computation.method != "fine_tuning"
    if language_model and "num_classes" in (model or {}):
        faults.add("model.num_classes", "a language model has no classes")
    faults.stop()
    assert model is not None  # otherwise there was a fault; so with the other three
    assert computation is not None
    assert training is not None
    assert data is not None
    return RunConfig(faults.source, model, computation, training, data, faults.lines)


def _refuse_method(computation: Computation, faults: Faults) -> None:
    key, name, modes = "computation.method", computation.method, {m: mode for mode, m in METHODS}
    if name in modes:
        key = "computation.mode" if "computation.mode" in faults.lines else key
        message = f"the method '{name}' has the mode '{modes[name]}', found '{computation.mode}'"
    else:
        message = f"unknown method '{name}'{nearest(name, modes)} (known: {', '.join(modes)})"
    faults.add(key, message)


def model_fields() -> dict[str, tuple[Any, Any]]:
    """Return the type and the default of each key of the ``model`` section."""
    found: dict[str, tuple[Any, Any]] = {}
    for kind in (ModelKeys, TransformerConfig):
        hints = typing.get_type_hints(kind) | {n: Literal[c] for n, c in _CHOICES.items()}
        found |= {f.name: (hints[f.name], f.default) for f in dataclasses.fields(kind)}
    return {name: field for name, field in found.items() if name not in _NOT_CONFIGURED}


def _model_section(raw: dict[str, Any], faults: Faults) -> dict[str, Any] | None:
    """Return what the section says, null left out; None if it does not fit."""
    # What is absent follows from the weights, so nothing has a default here.
    fields = {name: (hint, None) for name, (hint, _) in model_fields().items()}
    fields["rope_scaling"] = dict | None, None  # which says itself what is wrong with it
    values = _check("model", fields, raw, faults)
    if values is None:
        return None
    given = {name: v for name, v in values.items() if v is not None and name != "type"}
    fine = True
    for name, value in given.items():
        least = {"token_types": 0}.get(name, 1)
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            faults.add(f"model.{name}", at_least(least, value))
            fine = False
    if not 0 <= given.get("dropout", 0) < 1:
        faults.add("model.dropout", f"expected a number in [0, 1), found {given['dropout']}")
        fine = False
    if "rope_scaling" in given:
        try:
            given["rope_scaling"] = RopeScaling.from_dict(given["rope_scaling"])
        except ConfigError as error:
            faults.add("model.rope_scaling", str(error))
            fine = False
    return given if fine else None


def _check_sizes(model: dict[str, Any], data: Data, faults: Faults) -> None:
    """Find sizes that are missing, or do not fit each other, of a model that is made fresh."""
    if data.pretrained_weights is not None:
        return
    missing = [name for name in NEEDED_SIZES if name not in model]
    for name in missing:
        faults.add(f"model.{name}", "is needed when data.pretrained_weights is absent")
    if missing:
        return
    try:
        TransformerConfig(**{name: v for name, v in model.items() if name != "num_classes"})
    except ConfigError as error:
        key = str(error).partition(" ")[0]
        named = str(error).startswith(f"{key} is ")
        faults.add(f"model.{key}" if named else "model", str(error))


def _section(name: str, kind: type, raw: dict[str, Any], faults: Faults) -> Any:
    """Return a dataclass made of a section, None if it does not fit."""
    hints = typing.get_type_hints(kind)
    fields = {f.name: (hints[f.name], f.default) for f in dataclasses.fields(kind)}
    # A section in a section, such as training.lora, is a dataclass of its own.
    inner = {key: _dataclass_of(hint) for key, (hint, _) in fields.items()}
    sections = {key: raw[key] for key in raw if inner.get(key) and raw[key] is not None}
    found = {}
    for key, content in sections.items():
        if isinstance(content, dict):
            found[key] = _section(f"{name}.{key}", inner[key], content, faults)
        else:
            found[key] = None
            faults.add(f"{name}.{key}", f"expected a section of keys, found {content!r}")
    values = _check(name, fields, {k: v for k, v in raw.items() if k not in sections}, faults)
    if values is None or None in found.values():
        return None
    try:
        return kind(**values, **found)
    except InputError as error:  # a value of the right type, out of its range
        key, _, message = str(error).partition(": ")
        if key.startswith("training.") and not key.startswith(f"{name}."):
            key = f"{name}.{key.rpartition('.')[2]}"  # such options know of no section around them
        faults.add(key, message)
        return None


def _dataclass_of(hint: Any) -> Any:
    """Return the dataclass that a type is or may be, None for others."""
    parts = (hint, *typing.get_args(hint))
    return next((part for part in parts if dataclasses.is_dataclass(part)), None)


def _check(
    section: str, fields: Mapping[str, tuple[Any, Any]], raw: dict[str, Any], faults: Faults
) -> dict[str, Any] | None:
    """Check keys and types strictly through pydantic; None if anything is wrong."""
    from pydantic import ValidationError

    halved = [name for name, value in raw.items() if _has_half_a_pair([name, value])]
    for name in halved:
        faults.add(f"{section}.{name}", "has half a surrogate pair, so no text")
    if halved:
        return None
    needed = frozenset(name for name, (_, d) in fields.items() if d is dataclasses.MISSING)
    checker = _checker(section, tuple((n, kind) for n, (kind, _) in fields.items()), needed)
    try:
        # JSON mode: a list may stand for a tuple, and nothing else is converted.
        checked = checker.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        found: dict[str, str] = {}
        for fault in error.errors():
            name = str(fault["loc"][0])
            found.setdefault(name, _explain(name, fault, fields, section, raw))
        for name in (*(n for n in raw if n in found), *(n for n in found if n not in raw)):
            faults.add(f"{section}.{name}", found[name])
        return None
    return {name: getattr(checked, name) for name in raw}


@functools.cache
def _checker(section: str, kinds: tuple[tuple[str, Any], ...], needed: frozenset[str]) -> Any:
    """Return the pydantic model of a section; to make one takes milliseconds."""
    from pydantic import ConfigDict, create_model

    definitions: dict[str, Any] = {n: (kind, ... if n in needed else None) for n, kind in kinds}
    return create_model(section, __config__=ConfigDict(extra="forbid", strict=True), **definitions)


def _has_half_a_pair(value: Any) -> bool:
    """Whether there is text in a value that no file could hold."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _explain(
    name: str, fault: Any, fields: Mapping[str, Any], section: str, raw: dict[str, Any]
) -> str:
    if fault["type"] == "extra_forbidden":
        owner = _owner(section, name)
        return f"unknown key{nearest(name, fields)}" if owner is None else owner
    if fault["type"] == "missing" and name not in raw:
        return "is needed"
    kind, value = fields[name][0], raw[name]
    hint = ""
    if isinstance(value, str):
        parts = (kind, *typing.get_args(kind))
        choices = [c for p in parts if typing.get_origin(p) is Literal for c in typing.get_args(p)]
        hint = nearest(value, choices)
    return f"expected {describe(kind)}, found {json.dumps(value, default=str)}{hint}"


def _homes() -> dict[str, set[str]]:
    """Return the keys of each section, the options of all methods together."""
    options = [importlib.import_module(module).Options for module in METHODS.values()]
    return {
        "model": set(model_fields()) - {"type"},
        "computation": _names(Computation),
        "training": set().union(*map(_names, options)),
        "data": _names(Data),
    }


def _names(kind: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)}


def _owner(section: str, name: str) -> str | None:
    """Say which method or section knows a key that this one does not."""
    homes = _homes()
    if section == "training" and name in homes["training"]:
        options = {m: importlib.import_module(module).Options for (_, m), module in METHODS.items()}
        home = f"method '{next(m for m in options if name in _names(options[m]))}'"
    else:
        others = [other for other in homes if other != section and name in homes[other]]
        if not others:
            return None
        home = f"section '{others[0]}'"
    return f"unknown key here; it belongs to the {home}"
