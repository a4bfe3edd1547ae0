"""Qwen3 (Yang et al. 2025): Llama with an RMS norm of every head of queries and keys."""

from __future__ import annotations

from typing import Any

from loopos.models.config import TransformerConfig
from loopos.models.families.decoder import (
    decoder_family,
    qwen_window,
    read_decoder,
    write_decoder,
    write_qwen_window,
)


def config_from_hf(values: dict[str, Any]) -> TransformerConfig:
    """Return the configuration that a Qwen3 ``config.json`` describes."""
    bias = values.get("attention_bias", False)
    return read_decoder(
        values,
        "qwen3",
        max_seq_len=32768,
        num_kv_heads=32,
        head_dim=128,
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=False,
        qk_norm=True,
        window=qwen_window(values),
    )


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """Return the keys of ``config.json`` that decide the computation."""
    return (
        write_decoder(config)
        | write_qwen_window(config)
        | {"attention_bias": config.attention_bias}
    )


def expresses(config: TransformerConfig) -> bool:
    """Return whether Qwen3 can hold this configuration, which has what all decoders have."""
    return (
        config.qk_norm
        and config.attention_bias == config.attention_output_bias
        and not config.mlp_bias
    )


FAMILY = decoder_family("qwen3", "Qwen3", config_from_hf, config_to_hf, expresses)
