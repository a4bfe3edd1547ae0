"""Names and shapes of the parameters of a transformer, and what they are before training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from loopos.autograd import Array
from loopos.backends.lasting import lasting
from loopos.models.config import TransformerConfig

_INIT_STD = 0.02  # GPT-2 (Radford et al. 2019) and BERT (Devlin et al. 2019)
#: Numbers that stay in the cache from their drawing to their rounding.
_DRAWN_AT_ONCE = 1 << 15


def _linear_shapes(name: str, out: int, width: int, bias: bool) -> Iterator[tuple[str, tuple]]:
    yield f"{name}.weight", (out, width)
    if bias:
        yield f"{name}.bias", (out,)


def _norm_shapes(config: TransformerConfig, name: str) -> Iterator[tuple[str, tuple]]:
    yield f"{name}.weight", (config.d_model,)
    if config.norm == "layer_norm":
        yield f"{name}.bias", (config.d_model,)


def _layer_shapes(config: TransformerConfig, layer: str) -> Iterator[tuple[str, tuple]]:
    width, queries = config.d_model, config.num_heads * config.head_size
    keys = config.kv_heads * config.head_size
    yield from _norm_shapes(config, f"{layer}.attention_norm")
    for name, out in (("q", queries), ("k", keys), ("v", keys)):
        yield from _linear_shapes(f"{layer}.attention.{name}", out, width, config.attention_bias)
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        yield f"{layer}.attention.{name}.weight", (config.head_size,)
    output_bias = bool(config.attention_output_bias)
    yield from _linear_shapes(f"{layer}.attention.o", width, queries, output_bias)
    yield from _norm_shapes(config, f"{layer}.mlp_norm")
    for name in ("gate", "up") if config.activation == "swiglu" else ("up",):
        yield from _linear_shapes(f"{layer}.mlp.{name}", config.d_ff, width, config.mlp_bias)
    yield from _linear_shapes(f"{layer}.mlp.down", width, config.d_ff, config.mlp_bias)


def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every parameter of a model, in order.

    Parameters
    ----------
    config : TransformerConfig
        Of the model.
    """

    def shapes() -> Iterator[tuple[str, tuple]]:
        yield "embeddings.tokens", (config.vocab_size, config.d_model)
        if config.positions == "learned":
            yield "embeddings.positions", (config.max_seq_len, config.d_model)
        if config.token_types:
            yield "embeddings.token_types", (config.token_types, config.d_model)
        if config.embedding_norm:
            yield from _norm_shapes(config, "embeddings.norm")
        for index in range(config.num_layers):
            yield from _layer_shapes(config, f"layers.{index}")
        if config.norm_placement == "pre":
            yield from _norm_shapes(config, "final_norm")
        if config.lm_head and not config.tied:
            yield "lm_head.weight", (config.vocab_size, config.d_model)

    return dict(shapes())


def initialise(config: TransformerConfig, seed: int, dtype: np.dtype[Any]) -> dict[str, Array]:
    """Draw fresh weights as GPT-2 does: N(0, 0.02), output projections smaller with depth.

    Parameters
    ----------
    config : TransformerConfig
        Of the model.
    seed : int
    dtype : dtype
        Of the weights; a seed names one model whatever it is.
    """
    rng = np.random.default_rng(seed)
    residual_std = _INIT_STD / math.sqrt(2 * config.num_layers)
    arrays: dict[str, Array] = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 1:
            fill = 1.0 if name.endswith("norm.weight") else 0.0
            arrays[name] = np.full(shape, fill, dtype=dtype)
            continue
        adds_to_stream = name.endswith(("attention.o.weight", "mlp.down.weight"))
        std = residual_std if adds_to_stream else _INIT_STD
        arrays[name] = _normal(rng, shape, std, dtype)
    return arrays


def _normal(
    rng: np.random.Generator, shape: tuple[int, ...], std: float, dtype: np.dtype[Any]
) -> Array:
    """Draw N(0, std), in float64 for either dtype, so that a seed names one model."""
    array = lasting(shape, dtype)
    flat = array.reshape(-1)
    draws = np.empty(min(flat.size, _DRAWN_AT_ONCE))
    for start in range(0, flat.size, _DRAWN_AT_ONCE):
        part = flat[start : start + _DRAWN_AT_ONCE]
        rng.standard_normal(out=draws[: part.size])
        np.multiply(draws[: part.size], std, out=part, casting="same_kind")
    return array
