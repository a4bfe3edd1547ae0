"""Model directories in the Hugging Face layout: ``config.json`` and ``model.safetensors``.

Reading is strict: every tensor that the configuration promises must be there, with its shape and
finite, and nothing else but the buffers and heads that the family lists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loopos.autograd import Array
from loopos.backends.lasting import lasting_copy
from loopos.errors import (
    InputError,
    MissingFileError,
    ModelFormatError,
    NumericalError,
    OutputError,
    nearest,
)
from loopos.files import is_gguf, read_json, write_json
from loopos.hub import local_path, nearest_path
from loopos.models.config import TransformerConfig
from loopos.models.families import Family, Rule, family_for, family_of
from loopos.models.families.base import has_lm_head
from loopos.models.peft_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    load_adapters,
    read_adapter_config,
    save_adapters,
)
from loopos.models.tensor_file import TensorFile, read_finite, write_tensors
from loopos.models.transformer import Origin, SavesTokenizer, Transformer, parameter_shapes
from loopos.version import __version__

__all__ = ["is_adapter", "load_config", "load_model", "read_finite", "save_model", "to_hf_tensors"]

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
#: What is fetched of a model on the Hub: no pickles, no copies in other formats.
_HUB_FILES = (_CONFIG, _WEIGHTS, _INDEX, "model-*.safetensors", ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in ("float32", "float64")}
#: Keys in which a configuration says the dtype, new and old.
_DTYPE_KEYS = ("dtype", "torch_dtype")


def load_config(directory: str | Path) -> TransformerConfig:
    """Read only the configuration of a model.

    Parameters
    ----------
    directory : path or str
        With ``config.json``; or as for :func:`load_model`.

    Raises
    ------
    MissingFileError, ModelFormatError
        As :func:`load_model`.
    """
    path = local_path(directory, (_CONFIG, ADAPTER_CONFIG))
    if is_gguf(path):
        from loopos.models.gguf import load_gguf_config

        return load_gguf_config(path)
    return load_config(_base_of(path)) if is_adapter(path) else _read_config(path)[1]


def load_model(directory: str | Path, dtype: str = "float32") -> Transformer:
    """Read a model: GPT-2, Llama, Qwen2, Qwen3, Mistral or BERT; Hugging Face's layout or GGUF.

    Parameters
    ----------
    directory : path or str
        With ``config.json`` and ``model.safetensors`` (or its shards and their index); or with
        PEFT's ``adapter_config.json``, which names the base to load before the adapters; or a
        ``.gguf`` file, whose quantised tensors are dequantised; or, given as a string and where
        there is no such path, the name of a model on the Hugging Face Hub, "org/name" or
        "org/name@revision", of which only those files are fetched.
    dtype : {"float32", "float64"}
        Of the parameters; files in float16 and bfloat16 are converted.

    Returns
    -------
    Transformer
        Its ``config.dropout`` is the file's rate; it acts only when dropout keys are given.

    Raises
    ------
    MissingFileError
        If the directory or one of its files is not there.
    ModelFormatError
        If the configuration asks for what loopos does not compute, or a tensor is missing,
        unexpected, of another shape, cut off or not finite; one sentence with file and tensor.
    InputError
        If a library that this needs is not installed.
    """
    if dtype not in _DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}")
    path = local_path(directory, _HUB_FILES)
    if is_gguf(path):
        from loopos.models.gguf import load_gguf

        return load_gguf(path, _DTYPES[dtype])
    if is_adapter(path):
        return load_adapters(load_model(_base_of(path), dtype), path)
    family, config, values = _read_config(path)
    files = _tensor_files(path)
    prefix = family.prefix if any(name.startswith(family.prefix) for name in files) else ""
    found = _by_plain_name(family, prefix, files)
    arrays: dict[str, Array] = {}
    shapes = parameter_shapes(config)
    for rule in family.rules(config):
        if rule.hf_name not in found:
            name = (prefix if rule.prefixed else "") + rule.hf_name
            close = nearest(name, [actual for actual, _ in found.values()])
            raise ModelFormatError(f"{path}: tensor '{name}' is missing{close}")
        name, file = found.pop(rule.hf_name)
        arrays |= _read_rule(rule, shapes, name, file, _DTYPES[dtype])
    model = Transformer(config, dtype=_DTYPES[dtype], arrays=arrays)
    model.extra_tensors = _read_others(family, model, found)
    model.origin = Origin(values, prefix, str(directory))
    return model


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds adapters and no model of its own."""
    path = Path(directory)
    try:
        return (path / ADAPTER_CONFIG).is_file() and not (path / _CONFIG).is_file()
    except OSError:  # a name that is too long for a directory
        return False


def _base_of(directory: Path) -> str:
    base = read_adapter_config(directory)[1]
    if is_adapter(base):
        raise ModelFormatError(f"{directory / ADAPTER_CONFIG}: the base {base} holds adapters too")
    return base


def save_model(
    model: Transformer,
    directory: str | Path,
    tokenizer: SavesTokenizer | None = None,
    *,
    head: Mapping[str, Array] | None = None,
    head_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a model so that transformers and :func:`load_model` read it back with equal logits.

    A configuration that no Hugging Face family expresses is written in loopos' own format
    (``model_type`` "loopos"), which only :func:`load_model` reads.

    Parameters
    ----------
    model : Transformer
        Tied weights are written once; its `extra_tensors` under their own names.
    directory : path
        Made if need be; each file is written beside and renamed, other files stay.
    tokenizer : Tokenizer, optional
        Saved into the same directory.
    head : mapping of str to ndarray, optional
        Tensors of a head that stands beside the body.
    head_config : mapping, optional
        What ``config.json`` says of it.

    Raises
    ------
    NumericalError
        If a parameter is not finite; nothing is written.
    OutputError
        If the directory cannot be written, or holds adapters where a whole model is to be written,
        or the other way round.
    """
    directory = Path(directory)
    whole = not model.adapters or bool(model.unmerged)
    other, what = (ADAPTER_CONFIG, "adapters") if whole else (_CONFIG, "a whole model")
    if (directory / other).exists():
        raise OutputError(
            f"{directory}: not saved, it holds {what}, which would be mixed up with it"
        )
    if not whole:
        save_adapters(model, directory)
        if tokenizer is not None:
            tokenizer.save(directory)
        return
    arrays = {name: parameter.data for name, parameter in model.parameters().items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise NumericalError(f"{directory}: not saved, parameter '{name}' is not finite")
    family = family_for(model.config)
    values, prefix = _config_values(model, family, tokenizer)
    if head:  # names with the prefix are those of a body under a head
        prefix = family.prefix
    tensors = to_hf_tensors(family, model.config, arrays, prefix)
    write_tensors(directory / _WEIGHTS, tensors | model.extra_tensors | dict(head or {}))
    write_json(directory / _CONFIG, values | dict(head_config or {}))
    if tokenizer is not None:
        tokenizer.save(directory)


def to_hf_tensors(
    family: Family, config: TransformerConfig, arrays: Mapping[str, Array], prefix: str = ""
) -> dict[str, Array]:
    """Return arrays by parameter name (weights or gradients) under their Hugging Face names.

    Parameters
    ----------
    family : Family
        Whose names and layout to use.
    config : TransformerConfig
        Of the model.
    arrays : mapping of str to ndarray
        One for each parameter.
    prefix : str
        Put before the names of the body.
    """
    tensors = {}
    for rule in family.rules(config):
        parts = [arrays[name] for name in rule.names]
        array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        name = (prefix if rule.prefixed else "") + rule.hf_name
        tensors[name] = array.T if rule.transposed else array
    return tensors


# -- reading -------------------------------------------------------------------------------------


def _read_config(directory: Path) -> tuple[Family, TransformerConfig, dict[str, Any]]:
    if not directory.is_dir():
        if directory.exists():
            raise MissingFileError(
                f"{directory}: expected a directory or a .gguf file, found another file"
            )
        raise MissingFileError(f"{directory}: no such directory{nearest_path(directory)}")
    path = directory / _CONFIG
    if not path.is_file():
        files = sorted(directory.glob("*.gguf"))
        hint = f" (to read {files[0].name}, give the path of that file)" if files else ""
        raise MissingFileError(
            f"{directory}: holds no {_CONFIG}, so it is not a model directory{hint}"
        )
    values = read_json(path, ModelFormatError)
    try:
        family = family_of(values.get("model_type"))
        return family, family.config_from_hf(values), values
    except InputError as error:
        raise ModelFormatError(f"{path}: {error}") from error


def _tensor_files(directory: Path) -> dict[str, TensorFile]:
    """Return the file of each tensor of a model directory."""
    if (directory / _WEIGHTS).is_file():
        file = TensorFile(directory / _WEIGHTS)
        return dict.fromkeys(file.names, file)
    index = directory / _INDEX
    if not index.is_file():
        pickles = sorted(directory.glob("*.bin"))
        reason = (
            f" ({pickles[0].name} is a pickle, which loopos never opens; "
            "save the model with safe_serialization=True)"
            if pickles
            else ""
        )
        raise MissingFileError(f"{directory}: holds no {_WEIGHTS}{reason}")
    shards = read_json(index, ModelFormatError).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
        raise ModelFormatError(f"{index}: expected an object 'weight_map' of tensors to files")
    opened = {name: TensorFile(directory / Path(name).name) for name in set(shards.values())}
    for tensor, name in shards.items():
        if tensor not in opened[name].names:
            raise ModelFormatError(f"{opened[name].path}: tensor '{tensor}' is missing")
    for file in opened.values():
        file.refuse_others(shards)
    return {tensor: opened[name] for tensor, name in shards.items()}


def _by_plain_name(
    family: Family, prefix: str, files: Mapping[str, TensorFile]
) -> dict[str, tuple[str, TensorFile]]:
    """Return name in the file and the file, by the name without prefix and older endings."""
    found: dict[str, tuple[str, TensorFile]] = {}
    for name, file in files.items():
        plain = name.removeprefix(prefix)
        for old, new in family.renamed:
            plain = plain.removesuffix(old) + new if plain.endswith(old) else plain
        if plain in found:
            raise ModelFormatError(f"{file.path}: tensors '{found[plain][0]}' and '{name}' clash")
        found[plain] = name, file
    return found


def _read_rule(
    rule: Rule,
    shapes: Mapping[str, tuple[int, ...]],
    name: str,
    file: TensorFile,
    dtype: np.dtype[Any],
) -> dict[str, Array]:
    """Read the tensor of a rule; return the parameters it holds."""
    sizes = [shapes[name][0] for name in rule.names]
    expected = (sum(sizes), *shapes[rule.names[0]][1:])
    array = read_finite(file, name, expected[::-1] if rule.transposed else expected, dtype)
    parts = np.split(array.T if rule.transposed else array, np.cumsum(sizes)[:-1])
    return {part: lasting_copy(piece) for part, piece in zip(rule.names, parts, strict=True)}


def _read_others(
    family: Family, model: Transformer, found: Mapping[str, tuple[str, TensorFile]]
) -> dict[str, Array]:
    """Return the heads to keep; drop buffers and copies of the tied table; refuse the rest."""
    kept: dict[str, Array] = {}
    for plain, (name, file) in found.items():
        if model.config.tied and plain in family.tied_copies:
            table = model.parameters()["embeddings.tokens"].data
            if not np.array_equal(read_finite(file, name, table.shape, model.dtype), table):
                raise ModelFormatError(
                    f"{file.path}: tensor '{name}' differs from the token table, though the "
                    "configuration ties them (tie_word_embeddings is true)"
                )
        elif any(re.fullmatch(pattern, plain) for pattern in family.kept):
            kept[name] = read_finite(file, name, None, model.dtype)
        elif not any(re.fullmatch(pattern, plain) for pattern in family.ignored):
            expected = [rule.hf_name for rule in family.rules(model.config)]
            raise ModelFormatError(
                f"{file.path}: unexpected tensor '{name}' in a model of family '{family.name}' "
                f"with {model.config.num_layers} layers{nearest(plain, expected)}"
            )
    return kept


# -- writing -------------------------------------------------------------------------------------


def _config_values(
    model: Transformer, family: Family, tokenizer: SavesTokenizer | None
) -> tuple[dict[str, Any], str]:
    """Return what to write into ``config.json``, and the prefix of the tensors that fits it."""
    config, origin = model.config, model.origin
    if origin is not None and origin.config.get("model_type") in family.model_types:
        values, prefix = dict(origin.config), origin.prefix
        if replace(family.config_from_hf(values), family=None) != replace(config, family=None):
            values = {k: v for k, v in values.items() if k not in family.replaces}
            values |= family.config_to_hf(config)
            if config.causal and has_lm_head(values) != config.lm_head:
                values.pop("architectures", None)
    else:
        values = {"model_type": family.model_types[0], **family.config_to_hf(config)}
        if family.name == "loopos":
            values["loopos_version"] = __version__
        else:  # the defaults of transformers name rows that a smaller vocabulary does not have
            end = getattr(tokenizer, "eos_id", None)
            values |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
        prefix = family.prefix if config.lm_head else ""
    architecture = family.head_architecture if config.lm_head else family.base_architecture
    values.setdefault("architectures", [architecture])
    values = {k: v for k, v in values.items() if k not in _DTYPE_KEYS}
    return values | {"dtype": model.dtype.name}, prefix
