"""LoRA (Hu et al. 2021): train a low-rank update of some linear layers, leave the base as it is.

    policy = add_lora(base, LoraConfig(rank=8, alpha=16))

`policy` is a transformer whose weights are those of `base`, the same arrays in memory, frozen; what
is trained are its adapters. Files in PEFT's layout: :mod:`loopos.models.peft_files`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np

from loopos import ops
from loopos.autograd import Parameter, Tensor, no_grad
from loopos.errors import ConfigError, nearest
from loopos.models.adapter import ALL_LINEAR, Adapter, LoraConfig
from loopos.models.families import family_for
from loopos.models.transformer import Transformer, parameter_shapes

__all__ = ["LoraConfig", "add_lora", "linear_modules", "merge_lora", "unmerge_lora",
           "without_adapters"]  # fmt: skip


def linear_modules(model: Transformer) -> dict[str, tuple[str, ...]]:
    """Return the linear layers of a model as its family's files hold them.

    Returns
    -------
    dict of str to tuple of str
        Name of the module there, without the family's prefix (``"h.0.attn.c_attn"``), and our
        names of the layers in it (``("layers.0.attention.q", ...)``).
    """
    modules = {}
    for rule in family_for(model.config).rules(model.config):
        name = rule.names[0]
        if re.match(r"layers\.\d+\.(attention|mlp)\.\w+(?<!_norm)\.weight$", name):
            layers = tuple(n.removesuffix(".weight") for n in rule.names)
            modules[rule.hf_name.removesuffix(".weight")] = layers
    return modules


def add_lora(model: Transformer, config: LoraConfig | None = None, seed: int = 0) -> Transformer:
    """Return a model with the same weights, frozen and shared, and adapters that are trained.

    A starts from ``U(-1/sqrt(in), 1/sqrt(in))`` as in PEFT and B from 0, so that the new model
    computes at first what the old one does.

    Parameters
    ----------
    model : Transformer
        Without adapters; it is not changed. Its arrays are those of the new one too.
    config : LoraConfig, optional
    seed : int
        Of the A's.

    Raises
    ------
    ConfigError
        If the model has adapters already, or a target is no layer of it.
    """
    config = config or LoraConfig()
    if model.adapters:
        raise ConfigError("this model has adapters already; merge them first")
    adapted = _sharing(model)
    rng = np.random.default_rng(seed)
    for layers in _targets(linear_modules(model), config.target_modules).values():
        weights = [model.parameters()[f"{name}.weight"].data for name in layers]
        width = weights[0].shape[1]
        bound = 1 / math.sqrt(width)
        draws = rng.uniform(-bound, bound, (config.rank, width)).astype(model.dtype)
        down = Parameter(draws, f"{layers[0]}.lora_a")
        up = {}
        for name, weight in zip(layers, weights, strict=True):
            zeros = np.zeros((weight.shape[0], config.rank), model.dtype)
            up[name] = Parameter(zeros, f"{name}.lora_b")
        adapter = Adapter(down, up, config.scale, config.dropout)
        adapted.adapters |= dict.fromkeys(layers, adapter)
    adapted.lora = config
    return adapted


def without_adapters(model: Transformer) -> Transformer:
    """Return the base of an adapted model: the same arrays, without its adapters."""
    names = parameter_shapes(model.config)
    arrays = {name: model.unmerged.get(name, model.parameters()[name].data) for name in names}
    base = Transformer(model.config, dtype=model.dtype, arrays=arrays)
    base.extra_tensors, base.origin = model.extra_tensors, model.origin
    return base


def _sharing(model: Transformer) -> Transformer:
    """Return a model of the same arrays, all frozen."""
    twin = without_adapters(model)
    for parameter in twin.parameters().values():
        parameter.requires_grad = False
    return twin


def _targets(
    modules: dict[str, tuple[str, ...]], wanted: str | Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Return the modules that are asked for."""
    if wanted == ALL_LINEAR:
        return modules
    chosen: dict[str, tuple[str, ...]] = {}
    missing = dict.fromkeys(wanted)
    partly: dict[str, list[str]] = {}
    for module, layers in modules.items():
        hits = {target: _named(target, module, layers) for target in wanted}
        for target, found in hits.items():
            if found:
                missing.pop(target, None)
        held = set().union(*hits.values())
        if len(held) == len(layers):
            chosen[module] = layers
        elif held:
            partly.setdefault(module.rpartition(".")[2], sorted(held))
    if missing:
        known = {n.rpartition(".")[2] for m, layers in modules.items() for n in (m, *layers)}
        target = next(iter(missing))
        raise ConfigError(
            f"training.lora.target_modules: no linear layer '{target}'{nearest(target, known)} "
            f"(known: {', '.join(sorted(known))})"
        )
    for module, held_names in partly.items():
        raise ConfigError(
            f"training.lora.target_modules: {held_names[0].rpartition('.')[2]!r} is part of "
            f"'{module}' in this family; name '{module}', or all of its parts"
        )
    return chosen


def _named(target: str, module: str, layers: tuple[str, ...]) -> set[str]:
    """Return the layers of a module that `target` names: whole, or by its last parts."""
    if f".{module}".endswith(f".{target}"):
        return set(layers)
    return {name for name in layers if f".{name}".endswith(f".{target}")}


# -- merging ---------------------------------------------------------------------------------------


def merge_lora(model: Transformer) -> None:
    """Put the updates into the weights of `model`, which then computes as fast as its base.

    The base is not changed: adapted weights become arrays of the model's own. A merged model saves
    as a whole one; :func:`unmerge_lora` undoes it, to the byte.

    Raises
    ------
    ConfigError
        If there are no adapters, or they are merged already.
    """
    if not model.adapters:
        raise ConfigError("this model has no adapters to merge")
    if model.unmerged:
        raise ConfigError("the adapters are merged already")
    parameters = model.parameters()
    with no_grad():
        for name, adapter in model.adapters.items():
            parameter = parameters[f"{name}.weight"]
            # B A as a linear layer's product: A's columns are its inputs.
            update = ops.linear(adapter.b[name], Tensor(adapter.a.data.T))
            model.unmerged[parameter.name] = parameter.data
            parameter.data = ops.add(parameter, update, adapter.scale).data


def unmerge_lora(model: Transformer) -> None:
    """Take the updates out of the weights again.

    Raises
    ------
    ConfigError
        If they are not in them.
    """
    if not model.unmerged:
        raise ConfigError("the adapters are not merged")
    for name, array in model.unmerged.items():
        model.parameters()[name].data = array
    model.unmerged = {}
