"""BERT (Devlin et al. 2019): bidirectional, post-norm, token types, normalised embeddings."""

from __future__ import annotations

from typing import Any

from loopos.errors import ModelFormatError
from loopos.models.config import TransformerConfig
from loopos.models.families.base import (
    Family,
    Rule,
    activation,
    hf_activation,
    hf_sizes,
    one_dropout,
    refuse,
    sizes,
    weight_and_bias,
)

_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def config_from_hf(values: dict[str, Any]) -> TransformerConfig:
    """Return the configuration that a BERT ``config.json`` describes."""
    refuse(values, {"position_embedding_type": ("absolute",), "is_decoder": (False,)})
    if values.get("type_vocab_size") == 0:
        raise ModelFormatError("key 'type_vocab_size' is 0; BERT has a token-type table")
    return TransformerConfig(
        **sizes(values),
        max_seq_len=values.get("max_position_embeddings", 512),
        norm_placement="post",
        norm_eps=values.get("layer_norm_eps", 1e-12),
        activation=activation(values, "hidden_act", "gelu"),
        causal=False,
        dropout=one_dropout(values, _DROPOUTS, 0.1),
        tied=values.get("tie_word_embeddings", True),
        lm_head=False,
        token_types=values.get("type_vocab_size", 2),
        embedding_norm=True,
        family="bert",
    )


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """Return the keys of ``config.json`` that decide the computation."""
    return {
        **hf_sizes(config),
        "hidden_act": hf_activation(config.activation),
        "max_position_embeddings": config.max_seq_len,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_eps,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": config.tied,
        **dict.fromkeys(_DROPOUTS, config.dropout),
    }


def expresses(config: TransformerConfig) -> bool:
    """Return whether BERT can hold this configuration."""
    return (
        not config.causal
        and not config.lm_head
        and config.window is None
        and config.positions == "learned"
        and (config.norm, config.norm_placement) == ("layer_norm", "post")
        and config.activation != "swiglu"
        and config.kv_heads == config.num_heads
        and config.head_size * config.num_heads == config.d_model
        and bool(config.attention_bias and config.attention_output_bias and config.mlp_bias)
        and config.token_types > 0
        and config.embedding_norm
        and not config.qk_norm
    )


def rules(config: TransformerConfig) -> list[Rule]:
    """Return one rule a tensor."""
    found = [
        Rule("embeddings.word_embeddings.weight", ("embeddings.tokens",)),
        Rule("embeddings.position_embeddings.weight", ("embeddings.positions",)),
        Rule("embeddings.token_type_embeddings.weight", ("embeddings.token_types",)),
        *weight_and_bias("embeddings.LayerNorm", ("embeddings.norm",)),
    ]
    parts = {
        "attention.self.query": "attention.q",
        "attention.self.key": "attention.k",
        "attention.self.value": "attention.v",
        "attention.output.dense": "attention.o",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "mlp.up",
        "output.dense": "mlp.down",
        "output.LayerNorm": "mlp_norm",
    }
    for index in range(config.num_layers):
        for source, target in parts.items():
            name = f"encoder.layer.{index}.{source}"
            found += weight_and_bias(name, (f"layers.{index}.{target}",))
    return found


FAMILY = Family(
    name="bert",
    model_types=("bert",),
    prefix="bert.",
    base_architecture="BertModel",
    head_architecture="BertModel",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    expresses=expresses,
    rules=rules,
    ignored=(r"embeddings\.(position_ids|token_type_ids)",),
    kept=(r"(pooler|cls|classifier|qa_outputs)\..*",),
    tied_copies=("cls.predictions.decoder.weight",),
    renamed=((".gamma", ".weight"), (".beta", ".bias")),
)
