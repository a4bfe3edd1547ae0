"""Llama (Touvron et al. 2023): pre-norm RMS, rotary positions, SwiGLU, grouped-query attention."""

from __future__ import annotations

from typing import Any

from loopos.errors import ModelFormatError
from loopos.models.config import TransformerConfig
from loopos.models.families.base import Family, Rule, has_lm_head, refuse, require, weight_and_bias

#: transformers has no residual dropout for Llama; ours is kept under a key of our own.
_DROPOUT = "loopos_dropout"
_ROPE_KEYS = ("rope_parameters", "rope_scaling")


def _rope_theta(values: dict[str, Any]) -> float:
    """Return the rotary base from the keys of transformers 4 or 5.

    Raises
    ------
    ModelFormatError
        If the frequencies are scaled in any way.
    """
    theta = values.get("rope_theta")
    for key in _ROPE_KEYS:
        rope = values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ModelFormatError(f"key '{key}' is {rope!r}, expected an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        unknown = set(rope) - {"rope_type", "type", "rope_theta"}
        unknown -= {"partial_rotary_factor"} if rope.get("partial_rotary_factor") == 1 else set()
        if kind != "default" or unknown:
            raise ModelFormatError(
                f"key '{key}' is {rope!r}, which loopos does not compute "
                "(it computes rope_type 'default' without further keys)"
            )
        own = rope.get("rope_theta")
        if own is not None and theta is not None and own != theta:
            raise ModelFormatError(f"keys 'rope_theta' {theta} and '{key}' {rope!r} disagree")
        theta = theta if own is None else own
    return 10000.0 if theta is None else theta


def config_from_hf(values: dict[str, Any]) -> TransformerConfig:
    """Return the configuration that a Llama ``config.json`` describes."""
    allowed: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"),
        "attention_dropout": (0, None),
        "partial_rotary_factor": (1, None),
        "sliding_window": (None,),
    }
    refuse(values, allowed)
    bias = values.get("attention_bias", False)
    return TransformerConfig(
        d_model=require(values, "hidden_size"),
        num_heads=require(values, "num_attention_heads"),
        num_layers=require(values, "num_hidden_layers"),
        d_ff=require(values, "intermediate_size"),
        vocab_size=require(values, "vocab_size"),
        num_kv_heads=values.get("num_key_value_heads"),
        head_dim=values.get("head_dim"),
        max_seq_len=values.get("max_position_embeddings", 2048),
        norm="rms_norm",
        norm_eps=values.get("rms_norm_eps", 1e-6),
        activation="swiglu",
        positions="rope",
        rope_theta=_rope_theta(values),
        dropout=values.get(_DROPOUT, 0.0),
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=values.get("mlp_bias", False),
        tied=values.get("tie_word_embeddings", False),
        lm_head=has_lm_head(values),
        family="llama",
    )


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """Return the keys of ``config.json`` that decide the computation."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        # For transformers 4 and 5 in turn.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tied,
        **({_DROPOUT: config.dropout} if config.dropout else {}),
    }


def expresses(config: TransformerConfig) -> bool:
    """Return whether Llama can hold this configuration."""
    return (
        config.causal
        and config.window is None
        and config.positions == "rope"
        and (config.norm, config.norm_placement) == ("rms_norm", "pre")
        and config.activation == "swiglu"
        and config.attention_bias == config.attention_output_bias
        and config.d_model % config.num_heads == 0  # transformers asks for it, head_dim or not
        and not config.token_types
        and not config.embedding_norm
    )


def rules(config: TransformerConfig) -> list[Rule]:
    """Return one rule a tensor."""
    found = [Rule("embed_tokens.weight", ("embeddings.tokens",))]
    for index in range(config.num_layers):
        hf, own = f"layers.{index}", f"layers.{index}"
        found += weight_and_bias(f"{hf}.input_layernorm", (f"{own}.attention_norm",), bias=False)
        for name in "qkvo":
            source, target = f"{hf}.self_attn.{name}_proj", f"{own}.attention.{name}"
            found += weight_and_bias(source, (target,), bias=config.attention_bias)
        found += weight_and_bias(f"{hf}.post_attention_layernorm", (f"{own}.mlp_norm",), bias=False)
        for name in ("gate", "up", "down"):
            source, target = f"{hf}.mlp.{name}_proj", f"{own}.mlp.{name}"
            found += weight_and_bias(source, (target,), bias=config.mlp_bias)
    found += weight_and_bias("norm", ("final_norm",), bias=False)
    if config.lm_head and not config.tied:
        found.append(Rule("lm_head.weight", ("lm_head.weight",), prefixed=False))
    return found


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    prefix="model.",
    base_architecture="LlamaModel",
    head_architecture="LlamaForCausalLM",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    expresses=expresses,
    rules=rules,
    ignored=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    kept=(r"(score|classifier|qa_outputs)\..*",),
    tied_copies=("lm_head.weight",),
    replaces=("rope_scaling", _DROPOUT),
)
