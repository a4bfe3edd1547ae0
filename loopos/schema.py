"""The JSON Schema of configurations, made from the dataclasses that define them.

Types and defaults are those of the fields, descriptions those of the docstrings: nothing about an
option is written down twice. What depends on several keys at once is said where JSON Schema can say
it; ranges and the rest are for :func:`loopos.config.load_config`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from loopos.config import (
    NEEDED_SIZES,
    Computation,
    Data,
    ModelKeys,
    RunConfig,
    model_fields,
)
from loopos.methods import METHODS
from loopos.models.config import TransformerConfig
from loopos.models.rope import ROPE_KINDS, RopeScaling

__all__ = ["descriptions", "json_schema"]

Schema = dict[str, Any]

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_SIMPLE = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
#: Fields with an annotation of text, of which there are only some.
_CHOICES: dict[type, dict[str, tuple[str, ...]]] = {RopeScaling: {"kind": ROPE_KINDS}}


def json_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of whole configurations, as JSON values."""
    sections = descriptions(RunConfig)
    computation = _object(Computation)
    computation["properties"]["method"] |= {"enum": [method for _, method in METHODS]}
    computation["properties"]["method"].pop("type")
    properties: Schema = {
        "$schema": {"type": "string", "description": "Where this schema is, for editors; ignored."},
        "model": _fields(model_fields(), descriptions(TransformerConfig) | descriptions(ModelKeys)),
        "computation": computation,
        "training": {"type": "object"},
        "data": _object(Data),
    }
    for name, description in sections.items():
        if name in properties:
            properties[name]["description"] = description
    return {
        "$schema": _DRAFT,
        "title": "Configuration of loopos",
        "type": "object",
        "properties": properties,
        "required": ["computation", "data"],
        "additionalProperties": False,
        "allOf": [*(_of_method(mode, method) for mode, method in METHODS), *_of_weights()],
        "$defs": {method: _options(module) for (_, method), module in METHODS.items()},
    }


def descriptions(kind: type) -> dict[str, str]:
    """Return what the docstring of a dataclass says of each field, inherited fields too.

    Returns
    -------
    dict of str to str
        In Markdown, with JSON's words for None, True and False.
    """
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _documented(base)
    return found


# -- sections --------------------------------------------------------------------------------------


def _options(module: str) -> Schema:
    """Return the section ``training`` of a method."""
    return _object(importlib.import_module(module).Options)


def _of_method(mode: str, method: str) -> Schema:
    """Return what holds where the configuration names `method`."""
    asked = {"properties": {"method": {"const": method}}, "required": ["method"]}
    computation: Schema = {"properties": {"mode": {"const": mode}}}
    if mode != Computation.mode:  # where the default is another one, it must be given
        computation["required"] = ["mode"]
    then: Schema = {"training": {"$ref": f"#/$defs/{method}"}, "computation": computation}
    if method != "fine_tuning":  # a language model has no classes
        then["model"] = {"properties": {"num_classes": {"type": "null"}}}
    return {
        "if": {"properties": {"computation": asked}, "required": ["computation"]},
        "then": {"properties": then},
    }


def _of_weights() -> list[Schema]:
    """Return what holds where there are no pretrained weights."""
    named = {
        "properties": {"pretrained_weights": {"type": "string"}},
        "required": ["pretrained_weights"],
    }
    pretrained = {"properties": {"data": named}, "required": ["data"]}
    fresh = {
        "properties": {
            "model": {"required": list(NEEDED_SIZES)},
            "training": {"properties": {"lora": {"type": "null"}}},
        },
        "required": ["model"],
    }
    return [{"if": {"not": pretrained}, "then": fresh}]


def _object(kind: type) -> Schema:
    """Return the schema of a dataclass: an object with its fields and no others."""
    hints = typing.get_type_hints(kind)
    fields = {f.name: (hints[f.name], f.default) for f in dataclasses.fields(kind)}
    for name, choices in _CHOICES.get(kind, {}).items():
        fields[name] = (Literal[choices], fields[name][1])
    needed = [name for name, (_, default) in fields.items() if default is _MISSING]
    return _fields(fields, descriptions(kind)) | ({"required": needed} if needed else {})


def _fields(fields: Mapping[str, tuple[Any, Any]], described: Mapping[str, str]) -> Schema:
    properties = {}
    for name, (hint, default) in fields.items():
        properties[name] = _type(hint) | {"description": described[name]}
        if default is not _MISSING:
            properties[name]["default"] = list(default) if isinstance(default, tuple) else default
    return {"type": "object", "properties": properties, "additionalProperties": False}


# -- types -----------------------------------------------------------------------------------------

_MISSING = dataclasses.MISSING


def _type(hint: Any) -> Schema:
    """Return the schema of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    if dataclasses.is_dataclass(hint):
        return _object(typing.cast(type, hint))
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list or arguments[1:] == (...,):
        return {"type": "array", "items": _type(arguments[0])}
    if origin is tuple:
        count = len(arguments)
        return {"type": "array", "items": _type(arguments[0]), "minItems": count, "maxItems": count}
    if origin in (typing.Union, types.UnionType):
        return _union([_type(part) for part in arguments])
    raise TypeError(f"no schema for {hint!r}")


def _union(parts: list[Schema]) -> Schema:
    """Return the schema of several types, in one word each where that is possible."""
    if all(set(part) == {"type"} for part in parts):
        return {"type": [part["type"] for part in parts]}
    choices = [part for part in parts if set(part) == {"enum"}]
    others = [part for part in parts if part not in choices]
    if choices and others == [{"type": "null"}]:
        return {"enum": [*choices[0]["enum"], None]}
    return {"anyOf": parts}


# -- docstrings ------------------------------------------------------------------------------------

_SECTION = re.compile(r"^(?:Attributes|Parameters)\n-+\n(?P<body>.*?)(?=^\S[^\n]*\n-{3,}\n|\Z)",
                      re.MULTILINE | re.DOTALL)  # fmt: skip
_ENTRY = re.compile(r"^(?P<names>\w+(?:, \w+)*)(?: : [^\n]*)?\n(?P<text>(?:[ ]{4}[^\n]*\n|\n)*)",
                    re.MULTILINE)  # fmt: skip
_WORDS = {"None": "null", "True": "true", "False": "false"}


def _documented(kind: type) -> dict[str, str]:
    """Return the entries of a docstring in NumPy's style that have a text."""
    section = _SECTION.search(f"{inspect.cleandoc(kind.__doc__ or '')}\n")
    found: dict[str, str] = {}
    for entry in _ENTRY.finditer(section["body"] if section else ""):
        text = _markdown(" ".join(entry["text"].split()))
        found |= dict.fromkeys(entry["names"].split(", "), text) if text else {}
    return found


def _markdown(text: str) -> str:
    """Turn reStructuredText into Markdown, and Python's words into JSON's."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`")
    return re.sub(r"\b(?:None|True|False)\b", lambda word: _WORDS[word[0]], text)
