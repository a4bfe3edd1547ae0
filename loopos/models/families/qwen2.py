"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on queries, keys and values only."""

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
    """Return the configuration that a Qwen2 ``config.json`` describes."""
    return read_decoder(
        values,
        "qwen2",
        max_seq_len=32768,
        num_kv_heads=32,
        attention_bias=True,
        attention_output_bias=False,
        mlp_bias=False,
        window=qwen_window(values),
    )


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """Return the keys of ``config.json`` that decide the computation."""
    return write_decoder(config) | write_qwen_window(config)


def expresses(config: TransformerConfig) -> bool:
    """Return whether Qwen2 can hold this configuration, which has what all decoders have."""
    biases = (config.attention_bias, config.attention_output_bias, config.mlp_bias)
    return biases == (True, False, False) and not config.qk_norm


FAMILY = decoder_family("qwen2", "Qwen2", config_from_hf, config_to_hf, expresses)
