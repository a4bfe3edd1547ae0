"""GPT-2 (Radford et al. 2019): pre-norm, learned positions, Conv1D weights, tied head."""

from __future__ import annotations

from typing import Any

from loopos.models.config import TransformerConfig
from loopos.models.families.base import (
    Family,
    Rule,
    activation,
    has_lm_head,
    hf_activation,
    one_dropout,
    refuse,
    require,
    weight_and_bias,
)

_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def config_from_hf(values: dict[str, Any]) -> TransformerConfig:
    """Return the configuration that a GPT-2 ``config.json`` describes."""
    refuse(values, {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)})
    width = require(values, "n_embd")
    inner = values.get("n_inner")
    return TransformerConfig(
        d_model=width,
        num_heads=require(values, "n_head"),
        num_layers=require(values, "n_layer"),
        d_ff=4 * width if inner is None else inner,
        vocab_size=require(values, "vocab_size"),
        max_seq_len=values.get("n_positions", 1024),
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        activation=activation(values, "activation_function", "gelu_new"),
        dropout=one_dropout(values, _DROPOUTS, 0.1),
        tied=values.get("tie_word_embeddings", True),
        lm_head=has_lm_head(values),
        family="gpt2",
    )


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """Return the keys of ``config.json`` that decide the computation."""
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.d_ff,
        "n_positions": config.max_seq_len,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": hf_activation(config.activation),
        "tie_word_embeddings": config.tied,
        **dict.fromkeys(_DROPOUTS, config.dropout),
    }


def expresses(config: TransformerConfig) -> bool:
    """Return whether GPT-2 can hold this configuration."""
    return (
        config.causal
        and config.window is None
        and config.positions == "learned"
        and (config.norm, config.norm_placement) == ("layer_norm", "pre")
        and config.activation != "swiglu"
        and config.kv_heads == config.num_heads
        and config.head_size * config.num_heads == config.d_model
        and bool(config.attention_bias and config.attention_output_bias and config.mlp_bias)
        and not config.token_types
        and not config.embedding_norm
        and not config.qk_norm
    )


def rules(config: TransformerConfig) -> list[Rule]:
    """Return one rule a tensor."""
    found = [
        Rule("wte.weight", ("embeddings.tokens",)),
        Rule("wpe.weight", ("embeddings.positions",)),
    ]
    for index in range(config.num_layers):
        hf, own = f"h.{index}", f"layers.{index}"
        queries_keys_values = tuple(f"{own}.attention.{name}" for name in "qkv")
        found += weight_and_bias(f"{hf}.ln_1", (f"{own}.attention_norm",))
        found += weight_and_bias(f"{hf}.attn.c_attn", queries_keys_values, transposed=True)
        found += weight_and_bias(f"{hf}.attn.c_proj", (f"{own}.attention.o",), transposed=True)
        found += weight_and_bias(f"{hf}.ln_2", (f"{own}.mlp_norm",))
        found += weight_and_bias(f"{hf}.mlp.c_fc", (f"{own}.mlp.up",), transposed=True)
        found += weight_and_bias(f"{hf}.mlp.c_proj", (f"{own}.mlp.down",), transposed=True)
    found += weight_and_bias("ln_f", ("final_norm",))
    if config.lm_head and not config.tied:
        found.append(Rule("lm_head.weight", ("lm_head.weight",), prefixed=False))
    return found


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    prefix="transformer.",
    base_architecture="GPT2Model",
    head_architecture="GPT2LMHeadModel",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    expresses=expresses,
    rules=rules,
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
    kept=(r"(score|classifier|qa_outputs|multiple_choice_head)\..*",),
    tied_copies=("lm_head.weight",),
)
