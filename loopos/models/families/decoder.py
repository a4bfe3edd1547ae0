"""What Llama and its relatives share: pre-norm RMS, rotary positions, SwiGLU, grouped queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loopos.errors import ModelFormatError
from loopos.models.config import TransformerConfig
from loopos.models.families.base import (
    Family,
    Rule,
    has_lm_head,
    hf_sizes,
    refuse,
    require,
    sizes,
    weight_and_bias,
)
from loopos.models.families.rope_keys import REPLACED, read_rope, write_rope

#: transformers has no residual dropout for these families; ours is kept under a key of our own.
_DROPOUT = "loopos_dropout"
_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_decoder(
    values: dict[str, Any],
    family: str,
    *,
    max_seq_len: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    **own: Any,
) -> TransformerConfig:
    """Return the configuration that a ``config.json`` describes.

    Parameters
    ----------
    values : dict
        The whole of it.
    family : str
        Its name.
    max_seq_len, num_kv_heads, head_dim
        The family's defaults where ``config.json`` has no such key.
    **own
        What the family has of its own: biases, ``qk_norm``, ``window``.

    Raises
    ------
    ModelFormatError
        If it asks for what loopos does not compute.
    """
    allowed: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"),
        "attention_dropout": (0, None),
        "partial_rotary_factor": (1, None),
    }
    refuse(values, allowed)
    length = values.get("max_position_embeddings", max_seq_len)
    return TransformerConfig(
        **sizes(values),
        num_kv_heads=values.get("num_key_value_heads", num_kv_heads),
        head_dim=values.get("head_dim", head_dim),
        max_seq_len=length,
        norm="rms_norm",
        norm_eps=values.get("rms_norm_eps", 1e-6),
        activation="swiglu",
        positions="rope",
        **read_rope(values, length),
        dropout=values.get(_DROPOUT, 0.0),
        tied=values.get("tie_word_embeddings", False),
        lm_head=has_lm_head(values),
        family=family,
        **own,
    )


def write_decoder(config: TransformerConfig) -> dict[str, Any]:
    """Return the keys of ``config.json`` that all of these families have."""
    return {
        **hf_sizes(config),
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        **write_rope(config),
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied,
        **({_DROPOUT: config.dropout} if config.dropout else {}),
    }


def is_decoder(config: TransformerConfig) -> bool:
    """Return whether a configuration is one of these, biases, window and `qk_norm` apart."""
    return (
        config.causal
        and config.positions == "rope"
        and (config.norm, config.norm_placement) == ("rms_norm", "pre")
        and config.activation == "swiglu"
        and not config.token_types
        and not config.embedding_norm
    )


def decoder_rules(config: TransformerConfig) -> list[Rule]:
    """Return one rule a tensor."""
    biases = dict.fromkeys("qkv", config.attention_bias) | {"o": bool(config.attention_output_bias)}
    found = [Rule("embed_tokens.weight", ("embeddings.tokens",))]
    for index in range(config.num_layers):
        hf, own = f"layers.{index}", f"layers.{index}"
        found += weight_and_bias(f"{hf}.input_layernorm", (f"{own}.attention_norm",), bias=False)
        for name, bias in biases.items():
            source, target = f"{hf}.self_attn.{name}_proj", f"{own}.attention.{name}"
            found += weight_and_bias(source, (target,), bias=bias)
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            source, target = f"{hf}.self_attn.{name}", f"{own}.attention.{name}"
            found += weight_and_bias(source, (target,), bias=False)
        found += weight_and_bias(f"{hf}.post_attention_layernorm", (f"{own}.mlp_norm",), bias=False)
        for name in ("gate", "up", "down"):
            source, target = f"{hf}.mlp.{name}_proj", f"{own}.mlp.{name}"
            found += weight_and_bias(source, (target,), bias=config.mlp_bias)
    found += weight_and_bias("norm", ("final_norm",), bias=False)
    if config.lm_head and not config.tied:
        found.append(Rule("lm_head.weight", ("lm_head.weight",), prefixed=False))
    return found


def decoder_family(
    name: str,
    architecture: str,
    config_from_hf: Callable[[dict[str, Any]], TransformerConfig],
    config_to_hf: Callable[[TransformerConfig], dict[str, Any]],
    expresses: Callable[[TransformerConfig], bool],
) -> Family:
    """Return the family `name`, whose classes in transformers begin with `architecture`."""
    return Family(
        name=name,
        model_types=(name,),
        prefix="model.",
        base_architecture=f"{architecture}Model",
        head_architecture=f"{architecture}ForCausalLM",
        config_from_hf=config_from_hf,
        config_to_hf=config_to_hf,
        expresses=lambda config: is_decoder(config) and expresses(config),
        rules=decoder_rules,
        ignored=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
        kept=(r"(score|classifier|qa_outputs)\..*",),
        tied_copies=("lm_head.weight",),
        replaces=(*REPLACED, _DROPOUT),
    )


# -- sliding windows -----------------------------------------------------------------------------


def one_window(values: dict[str, Any], window: int | None) -> int | None:
    """Return `window` if ``layer_types`` gives it to every layer, None if to none.

    Both loopos and transformers count the token itself: a window of 3 sees two tokens before it.

    Parameters
    ----------
    values : dict
        The whole ``config.json``; without ``layer_types`` every layer has the window.
    window : int or None
        Of the layers that slide.

    Raises
    ------
    ModelFormatError
        If layers differ, or slide without a window, or have a kind that is unknown.
    """
    kinds = values.get("layer_types")
    if kinds is None:
        return window
    count = require(values, "num_hidden_layers")
    if not isinstance(kinds, list) or len(kinds) != count:
        raise ModelFormatError(f"key 'layer_types' is {kinds!r}, expected a list of {count} kinds")
    for kind in kinds:
        if kind not in (_FULL, _SLIDING):
            raise ModelFormatError(
                f"key 'layer_types' has {kind!r}, which loopos does not compute "
                f"(it computes {_FULL} or {_SLIDING})"
            )
    if len(set(kinds)) > 1:
        raise ModelFormatError(
            f"key 'layer_types' has {kinds.count(_SLIDING)} layers of {_SLIDING} and "
            f"{kinds.count(_FULL)} of {_FULL}; loopos computes one kind for all layers"
        )
    if kinds[0] == _SLIDING and window is None:
        raise ModelFormatError(
            f"key 'layer_types' has {_SLIDING}, but there is no 'sliding_window'"
        )
    return window if kinds[0] == _SLIDING else None


def qwen_window(values: dict[str, Any]) -> int | None:
    """Return the window of Qwen2 and Qwen3, which layers from ``max_window_layers`` on have.

    Raises
    ------
    ModelFormatError
        As :func:`one_window`.
    """
    refuse(values, {"use_sliding_window": (True, False, None)})
    window = values.get("sliding_window", 4096) if values.get("use_sliding_window") else None
    if window is None or values.get("layer_types") is not None:
        return one_window(values, window)
    count, first = require(values, "num_hidden_layers"), values.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise ModelFormatError(f"key 'max_window_layers' is {first!r}, expected a whole number")
    if isinstance(count, int) and first >= count:
        return None
    if first > 0:
        raise ModelFormatError(
            f"key 'max_window_layers' is {first} of {count} layers; loopos computes one kind of "
            "attention for all layers"
        )
    return window


def write_qwen_window(config: TransformerConfig) -> dict[str, Any]:
    """Return the keys that :func:`qwen_window` reads."""
    slides = config.window is not None
    return {
        "use_sliding_window": slides,
        "sliding_window": config.window,
        "max_window_layers": 0 if slides else config.num_layers,
        "layer_types": [_SLIDING if slides else _FULL] * config.num_layers,
    }
