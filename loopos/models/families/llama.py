"""Llama (Touvron et al. 2023), SmolLM2 and others of its kind: biases everywhere or nowhere."""

from __future__ import annotations

from typing import Any

from loopos.models.config import TransformerConfig
from loopos.models.families.base import refuse
from loopos.models.families.decoder import decoder_family, one_window, read_decoder, write_decoder


def config_from_hf(values: dict[str, Any]) -> TransformerConfig:
    """Return the configuration that a Llama ``config.json`` describes."""
    refuse(values, {"sliding_window": (None,)})
    bias = values.get("attention_bias", False)
    return read_decoder(
        values,
        "llama",
        max_seq_len=2048,
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=values.get("mlp_bias", False),
        window=one_window(values, None),
    )


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """Return the keys of ``config.json`` that decide the computation."""
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return write_decoder(config) | biases


def expresses(config: TransformerConfig) -> bool:
    """Return whether Llama can hold this configuration, which has what all decoders have."""
    return (
        config.window is None
        and not config.qk_norm
        and config.attention_bias == config.attention_output_bias
        and config.d_model % config.num_heads == 0  # transformers asks for it, head_dim or not
    )


FAMILY = decoder_family("llama", "Llama", config_from_hf, config_to_hf, expresses)
