"""Mistral (Jiang et al. 2023): Llama without biases and with a sliding window."""

from __future__ import annotations

from typing import Any

from loopos.models.config import TransformerConfig
from loopos.models.families.decoder import decoder_family, one_window, read_decoder, write_decoder


def config_from_hf(values: dict[str, Any]) -> TransformerConfig:
    """Return the configuration that a Mistral ``config.json`` describes."""
    return read_decoder(
        values,
        "mistral",
        max_seq_len=131072,
        num_kv_heads=8,
        attention_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
        window=one_window(values, values.get("sliding_window", 4096)),
    )


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """Return the keys of ``config.json`` that decide the computation."""
    return write_decoder(config) | {"sliding_window": config.window}


def expresses(config: TransformerConfig) -> bool:
    """Return whether Mistral can hold this configuration, which has what all decoders have."""
    biases = (config.attention_bias, config.attention_output_bias, config.mlp_bias)
    return not any(biases) and not config.qk_norm


FAMILY = decoder_family("mistral", "Mistral", config_from_hf, config_to_hf, expresses)
