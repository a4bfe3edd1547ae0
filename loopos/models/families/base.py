"""What a Hugging Face family is to loopos: a configuration and a list of tensor names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from loopos.errors import ModelFormatError
from loopos.models.config import TransformerConfig

#: Activations by the names that Hugging Face has for them; the first of a kind is written.
HF_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

#: Sizes that every family but GPT-2 has, by the names that Hugging Face has for them.
HF_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}

#: Endings of the architectures that have a next-token head.
_LM_ENDINGS = ("LMHeadModel", "ForCausalLM", "DoubleHeadsModel")

# No family here implements these, and each changes what is computed.
_NEVER: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": (None, {}),
}


@dataclass(frozen=True)
class Rule:
    """One tensor of a file and the parameters it holds.

    Attributes
    ----------
    hf_name : str
        Without the family's prefix.
    names : tuple of str
        Parameters, concatenated along their first axis.
    transposed : bool
        Whether the file holds ``[in, out]`` (GPT-2's Conv1D) where loopos has ``[out, in]``.
    prefixed : bool
        Whether the family's prefix may stand before the name.
    """

    hf_name: str
    names: tuple[str, ...]
    transposed: bool = False
    prefixed: bool = True


@dataclass(frozen=True)
class Family:
    """A Hugging Face family: how to read and write its configuration and its tensor names.

    Attributes
    ----------
    name : str
        As in ``TransformerConfig.family``.
    model_types : tuple of str
        Values of ``model_type`` in ``config.json`` that it reads; the first is written.
    prefix : str
        That may stand before the body's tensor names, such as "transformer.".
    base_architecture, head_architecture : str
        Written as ``architectures`` for a model without and with a language-model head.
    config_from_hf : callable
        ``config.json`` to TransformerConfig; refuses what loopos does not compute.
    config_to_hf : callable
        TransformerConfig to the keys of ``config.json`` that decide the computation.
    expresses : callable
        Whether the family can hold a configuration without loss.
    rules : callable
        TransformerConfig to one Rule a tensor.
    ignored : tuple of str
        Regular expressions of buffers that hold no weights, without the prefix.
    kept : tuple of str
        Regular expressions of heads that are kept and saved back, without the prefix.
    tied_copies : tuple of str
        Names under which a file may repeat the token table.
    renamed : tuple of (str, str)
        Older endings of tensor names and today's.
    replaces : tuple of str
        Older configuration keys that those of `config_to_hf` stand for, dropped on saving.
    """

    name: str
    model_types: tuple[str, ...]
    prefix: str
    base_architecture: str
    head_architecture: str
    config_from_hf: Callable[[dict[str, Any]], TransformerConfig]
    config_to_hf: Callable[[TransformerConfig], dict[str, Any]]
    expresses: Callable[[TransformerConfig], bool]
    rules: Callable[[TransformerConfig], list[Rule]]
    ignored: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    tied_copies: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    replaces: tuple[str, ...] = ()


def require(values: dict[str, Any], key: str) -> Any:
    """Return a key that has no default.

    Raises
    ------
    ModelFormatError
        If it is absent.
    """
    if values.get(key) is None:
        raise ModelFormatError(f"key '{key}' is missing")
    return values[key]


def sizes(values: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes of `HF_SIZES`, none of which has a default, by loopos' names.

    Raises
    ------
    ModelFormatError
        If one is absent.
    """
    return {own: require(values, key) for key, own in HF_SIZES.items()}


def hf_sizes(config: TransformerConfig) -> dict[str, Any]:
    """Return the sizes of `HF_SIZES` by Hugging Face's names."""
    return {key: getattr(config, own) for key, own in HF_SIZES.items()}


def refuse(values: dict[str, Any], allowed: dict[str, tuple[Any, ...]]) -> None:
    """Raise ModelFormatError if a key that is present has a value that loopos does not compute."""
    for key, accepted in {**_NEVER, **allowed}.items():
        if key in values and values[key] not in accepted:
            raise ModelFormatError(
                f"key '{key}' is {values[key]!r}, which loopos does not compute "
                f"(it computes {' or '.join(repr(value) for value in accepted)})"
            )


def activation(values: dict[str, Any], key: str, default: str) -> str:
    """Return loopos' name of the activation under `key`.

    Raises
    ------
    ModelFormatError
        If loopos does not have it.
    """
    name = values.get(key, default)
    if not isinstance(name, str) or name not in HF_ACTIVATIONS:
        raise ModelFormatError(
            f"key '{key}' is {name!r}, expected one of {', '.join(HF_ACTIVATIONS)}"
        )
    return HF_ACTIVATIONS[name]


def hf_activation(kind: str) -> str:
    """Return Hugging Face's name of one of loopos' activations."""
    return next(name for name, value in HF_ACTIVATIONS.items() if value == kind)


def one_dropout(values: dict[str, Any], keys: Iterable[str], default: float) -> float:
    """Return the dropout rate that all `keys` share.

    Raises
    ------
    ModelFormatError
        If they differ: loopos has one rate.
    """
    rates = {key: values.get(key, default) for key in keys}
    first = next(iter(rates.values()))
    if any(rate != first for rate in rates.values()):
        listed = ", ".join(f"'{key}' {rate}" for key, rate in rates.items())
        raise ModelFormatError(f"keys {listed} differ; loopos has one dropout rate for all places")
    return first


def has_lm_head(values: dict[str, Any]) -> bool:
    """Return whether ``architectures`` promises a next-token head; yes when it is absent.

    Raises
    ------
    ModelFormatError
        If it is no list of names.
    """
    architectures = values.get("architectures") or []
    named = isinstance(architectures, list) and all(isinstance(n, str) for n in architectures)
    if not named:
        raise ModelFormatError(
            f"key 'architectures' is {architectures!r}, expected a list of names"
        )
    return not architectures or any(name.endswith(_LM_ENDINGS) for name in architectures)


def weight_and_bias(
    hf_name: str, names: tuple[str, ...], bias: bool = True, transposed: bool = False
) -> list[Rule]:
    """Return the rules of one linear layer or norm."""
    rules = [Rule(f"{hf_name}.weight", tuple(f"{n}.weight" for n in names), transposed)]
    if bias:
        rules.append(Rule(f"{hf_name}.bias", tuple(f"{n}.bias" for n in names)))
    return rules
