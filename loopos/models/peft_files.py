"""Adapters in PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``.

https://huggingface.co/docs/peft, "Checkpoint format". PEFT reads what is written here, and what it
wrote is read here where that asks for nothing that loopos does not compute.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from loopos.autograd import Array
from loopos.errors import ConfigError, ModelFormatError, NumericalError, nearest
from loopos.files import read_json, write_json
from loopos.hub import is_hub_name
from loopos.models.adapter import LoraConfig
from loopos.models.families import family_for
from loopos.models.lora import add_lora, linear_modules
from loopos.models.tensor_file import TensorFile, read_finite, write_tensors
from loopos.models.transformer import Transformer, parameter_shapes

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "load_adapters",
    "read_adapter_config",
    "save_adapters",
]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
#: Keys that change nothing of what is computed from weights that are there already.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "corda_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "lora_alpha", "lora_dropout", "revision",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
#: Values of ``init_lora_weights`` with which PEFT takes something off the base's weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_adapters(model: Transformer, directory: str | Path) -> None:
    """Write the adapters of a model, and no weight of its base.

    Parameters
    ----------
    model : Transformer
        With adapters. ``base_model_name_or_path`` becomes the place that its base was loaded from.
    directory : path
        Other files in it stay.

    Raises
    ------
    ConfigError
        If there are no adapters, or the base was not loaded from files.
    NumericalError
        If a weight is not finite; nothing is written.
    OutputError
        If the directory cannot be written.
    """
    directory, config = Path(directory), model.lora
    if config is None:
        raise ConfigError("this model has no adapters to save")
    if model.origin is None:
        raise ConfigError(
            f"{directory}: adapters are saved without their base, and this one was not loaded from "
            "files; save the base and load it first, or merge the adapters into it"
        )
    tensors = _tensors(model)
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise NumericalError(f"{directory}: not saved, tensor '{name}' is not finite")
    rules = family_for(model.config).rules(model.config)
    base, revision = _absolute(model.origin.source), None
    if is_hub_name(base):
        base, _, revision = base.partition("@")
    values = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": any(rule.transposed for rule in rules),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "revision": revision or None,
        "target_modules": _target_modules(model),
        "task_type": "CAUSAL_LM" if model.config.lm_head else "FEATURE_EXTRACTION",
        "use_rslora": config.rslora,
    }
    write_tensors(directory / ADAPTER_WEIGHTS, tensors)
    write_json(directory / ADAPTER_CONFIG, values)


def _absolute(source: str) -> str:
    """Return a path that holds wherever the adapters are read from; a name on the hub as it is."""
    path = Path(source)
    return str(path.resolve()) if path.exists() else source


def _target_modules(model: Transformer) -> list[str]:
    """Return the last parts of the adapted modules' names, whole names if those say too much."""
    modules = linear_modules(model)
    adapted = [module for module, layers in modules.items() if layers[0] in model.adapters]
    endings = {module.rpartition(".")[2] for module in adapted}
    named = [module for module in modules if module.rpartition(".")[2] in endings]
    return sorted(endings if named == adapted else adapted)


def _tensors(model: Transformer) -> dict[str, Array]:
    """Return A and B of each module under PEFT's names."""
    family = family_for(model.config)
    prefix = _PREFIX + (family.prefix if model.config.lm_head else "")
    tensors: dict[str, Array] = {}
    for module, layers in linear_modules(model).items():
        adapter = model.adapters.get(layers[0])
        if adapter is not None:
            tensors[f"{prefix}{module}.lora_A.weight"] = adapter.a.data
            parts = [adapter.b[name].data for name in layers]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            tensors[f"{prefix}{module}.lora_B.weight"] = whole
    return tensors


# -- reading ---------------------------------------------------------------------------------------


def read_adapter_config(directory: str | Path) -> tuple[LoraConfig, str]:
    """Read ``adapter_config.json``.

    Returns
    -------
    config : LoraConfig
        Without its targets: the tensors say which they are.
    base : str
        Path or name of the base model.

    Raises
    ------
    MissingFileError
        If it is not there.
    ModelFormatError
        If it asks for what loopos does not compute.
    """
    path = Path(directory) / ADAPTER_CONFIG
    values = read_json(path, ModelFormatError)

    def fail(key: str, expected: str) -> ModelFormatError:
        return ModelFormatError(f"{path}: key '{key}' is {values.get(key)!r}, expected {expected}")

    if values.get("peft_type") != "LORA":
        raise fail("peft_type", "'LORA'")
    if values.get("bias", "none") != "none":
        raise fail("bias", "'none'")
    for key, value in values.items():
        if value and key not in {*_HARMLESS, "bias"}:
            raise fail(key, "nothing, as loopos does not compute it")
    try:
        config = LoraConfig(
            rank=values.get("r", 8),
            alpha=values.get("lora_alpha", 8),
            dropout=values.get("lora_dropout", 0.0),
            rslora=values.get("use_rslora", False),
        )
    except ConfigError as error:
        raise ModelFormatError(f"{path}: {error}") from error
    base = values.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise fail("base_model_name_or_path", "where the base model is")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise fail("init_lora_weights", "one that leaves the base as it is; PEFT can convert them")
    revision = values.get("revision")
    if isinstance(revision, str) and revision and "@" not in base and is_hub_name(base):
        base = f"{base}@{revision}"
    return config, base


def load_adapters(model: Transformer, directory: str | Path) -> Transformer:
    """Return `model` with adapters from PEFT's files; its weights are shared, not copied.

    Parameters
    ----------
    model : Transformer
        The base that they were trained on.
    directory : path
        With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises
    ------
    MissingFileError
        If one of the files is not there.
    ModelFormatError
        If they do not fit the model or each other.
    """
    directory = Path(directory)
    config, _ = read_adapter_config(directory)
    file = TensorFile(directory / ADAPTER_WEIGHTS)
    modules, prefix = linear_modules(model), _prefix(model, file)
    names = {f"{prefix}{module}.lora_{side}.weight": module for module in modules for side in "AB"}
    for name in file.names:
        if name not in names:
            raise ModelFormatError(
                f"{file.path}: tensor '{name}' belongs to no linear layer of the base"
                f"{nearest(name, names)}"
            )
    found = tuple(dict.fromkeys(names[name] for name in file.names))
    if not found:
        raise ModelFormatError(f"{file.path}: there is no adapter in it")
    # Read first: only what the file holds is worth making room for.
    shapes = parameter_shapes(model.config)
    downs, ups = {}, {}
    for module in found:
        layers = [shapes[f"{layer}.weight"] for layer in modules[module]]
        a_name, b_name = (f"{prefix}{module}.lora_{side}.weight" for side in "AB")
        downs[module] = read_finite(file, a_name, (config.rank, layers[0][1]), model.dtype)
        rows = [shape[0] for shape in layers]
        whole = read_finite(file, b_name, (sum(rows), config.rank), model.dtype)
        ups[module] = np.split(whole, np.cumsum(rows)[:-1])
    adapted = add_lora(model, replace(config, target_modules=found))
    for module in found:
        adapter = adapted.adapters[modules[module][0]]
        adapter.a.data = downs[module]
        for parameter, part in zip(adapter.b.values(), ups[module], strict=True):
            parameter.data = np.ascontiguousarray(part)
    return adapted


def _prefix(model: Transformer, file: TensorFile) -> str:
    """Return what stands before the modules' names: with a head, the body has a name of its own."""
    body = family_for(model.config).prefix
    whole = _PREFIX + body
    return whole if body and any(name.startswith(whole) for name in file.names) else _PREFIX
