"""One transformer, driven by its configuration, written in ops: GPT-2, Llama, BERT and between.

Activations are ``[N, C]``: the tokens of all sequences of a batch, one after the other. Positions
and lengths follow from ``batch.offsets``; there is no padding and no mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loopos import ops
from loopos.autograd import Array, Parameter, Tensor
from loopos.data.batch import Batch
from loopos.errors import ConfigError, DataError
from loopos.models.adapter import Adapter, LoraConfig
from loopos.models.config import TransformerConfig
from loopos.models.rope import inverse_frequencies
from loopos.ops import DropoutKeys

__all__ = ["Origin", "SavesTokenizer", "Transformer", "TransformerConfig", "parameter_shapes"]

States = tuple[Tensor, ...]

_INIT_STD = 0.02  # GPT-2 (Radford et al. 2019) and BERT (Devlin et al. 2019)


class SavesTokenizer(Protocol):
    """Whatever can write itself into a directory, such as a :class:`loopos.Tokenizer`."""

    def save(self, directory: Any) -> None:
        """Write the tokenizer's files into `directory`."""


@dataclass(frozen=True)
class Origin:
    """What a loaded model remembers of its files, so that `save` gives them back.

    Attributes
    ----------
    config : dict
        The whole ``config.json``, with the keys that do not concern the computation.
    prefix : str
        What stood before the body's tensor names, such as "transformer." or nothing.
    source : str
        Where it came from: a path, or the name of a model on the hub.
    """

    config: dict[str, Any]
    prefix: str
    source: str


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


def _initialise(config: TransformerConfig, seed: int, dtype: np.dtype[Any]) -> dict[str, Array]:
    """Draw fresh weights as GPT-2 does: N(0, 0.02), output projections smaller with depth."""
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
        # Drawn in float64 for either dtype, so that a seed names one model.
        arrays[name] = (rng.standard_normal(shape) * std).astype(dtype)
    return arrays


class Transformer:
    """A transformer language model or encoder.

    Parameters
    ----------
    config : TransformerConfig
        Sizes and options.
    seed : int
        Of the initial weights: N(0, 0.02), the projections that add to the residual stream
        divided by ``sqrt(2 num_layers)``; biases 0, gains 1.
    dtype : dtype
        float32 or float64.
    arrays : mapping of str to ndarray, optional
        Weights by parameter name, kept and not copied, in place of fresh ones.

    Attributes
    ----------
    config : TransformerConfig
        Sizes and options.
    dtype : dtype
        Of every parameter.
    extra_tensors : dict of str to ndarray
        Tensors of the file that are no part of this network (such as BERT's pooler), kept under
        their own names and saved back.
    origin : Origin or None
        Of a loaded model.
    adapters : dict of str to Adapter
        Low-rank updates by the name of their linear layer, such as "layers.0.attention.q"; see
        :func:`loopos.add_lora`.
    lora : LoraConfig or None
        What made them.
    unmerged : dict of str to ndarray
        While the weights hold the updates, and the adapters are left out: the weights without.
    gradient_checkpointing : bool
        Keep only what enters each layer and compute the layer again in the backward
        (:func:`ops.recompute`): less memory, one more forward, the same bytes.

    Raises
    ------
    ConfigError
        If the dtype is another, or `arrays` does not hold exactly the parameters of `config`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        seed: int = 0,
        dtype: Any = np.float32,
        *,
        arrays: Mapping[str, Array] | None = None,
    ):
        self.config = config
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise ConfigError(f"dtype is {self.dtype}, expected float32 or float64")
        if arrays is None:
            arrays = _initialise(config, seed, self.dtype)
        self._parameters: dict[str, Parameter] = {}
        for name, shape in parameter_shapes(config).items():
            if name not in arrays or arrays[name].shape != shape:
                found = f"shape {arrays[name].shape}" if name in arrays else "nothing"
                raise ConfigError(f"parameter '{name}': expected shape {shape}, found {found}")
            self._parameters[name] = Parameter(arrays[name].astype(dtype, copy=False), name)
        if len(arrays) != len(self._parameters):
            surplus = sorted(set(arrays) - set(self._parameters))
            raise ConfigError(f"'{surplus[0]}' is no parameter of this model")
        self.extra_tensors: dict[str, Array] = {}
        self.origin: Origin | None = None
        self.adapters: dict[str, Adapter] = {}
        self.lora: LoraConfig | None = None
        self.unmerged: dict[str, Array] = {}
        self.gradient_checkpointing = False
        self._inv_freq = inverse_frequencies(
            config.head_size, config.rope_theta, config.rope_scaling
        )

    def parameters(self) -> dict[str, Parameter]:
        """Return every parameter by name, such as "layers.0.attention.q.weight", in order.

        Those of adapters come last, such as "layers.0.attention.q.lora_a".
        """
        adapters = dict.fromkeys(self.adapters.values())  # one may serve several layers
        return self._parameters | {n: p for adapter in adapters for n, p in adapter.named()}

    def num_parameters(self) -> int:
        """Return how many numbers the parameters hold; a tied table counts once."""
        return sum(p.data.size for p in self.parameters().values())

    @property
    def head_weight(self) -> Parameter:
        """The language-model head ``[V, C]``: the token table when tied.

        Raises
        ------
        ConfigError
            If the model has no head.
        """
        if not self.config.lm_head:
            raise ConfigError("this model has no language-model head (lm_head is false)")
        return self._parameters["embeddings.tokens" if self.config.tied else "lm_head.weight"]

    def get_hidden_states(self, batch: Batch, dropout: DropoutKeys | None = None) -> Tensor:
        """Run the network up to and with its last norm.

        Parameters
        ----------
        batch : Batch
            Ragged token ids.
        dropout : DropoutKeys, optional
            Of this step; None means evaluation, without dropout.

        Returns
        -------
        Tensor [N, d_model]
            What transformers calls ``last_hidden_state``.

        Raises
        ------
        DataError
            If an id is outside the vocabulary, or a sequence longer than the position table.
        """
        self._check(batch)
        x = self._embed(batch, dropout)
        pre = self.config.norm_placement == "pre"
        # What runs through the layers: the residual stream, and before it its norm.
        states: States = (self._norm("layers.0.attention_norm", x), x) if pre else (x,)
        layer = self._pre_norm_layer if pre else self._post_norm_layer
        for index in range(self.config.num_layers):
            if self.gradient_checkpointing:
                states = self._recomputed(partial(layer, index), states, batch, dropout)
            else:
                states = layer(index, states, batch, dropout)
        return states[0]

    def forward(self, batch: Batch, dropout: DropoutKeys | None = None) -> Tensor:
        """Return the logits ``[N, V]`` of every token; for people and tests.

        Training uses :meth:`next_token_loss`, which never holds all logits at once.

        Raises
        ------
        ConfigError
            If the model has no language-model head.
        DataError
            As :meth:`get_hidden_states`.
        """
        head = self.head_weight
        return ops.linear(self.get_hidden_states(batch, dropout), head)

    def next_token_loss(
        self, batch: Batch, dropout: DropoutKeys | None = None
    ) -> tuple[Tensor, float]:
        """Return the summed cross-entropy of each next token, in nats, and how many counted.

        Parameters
        ----------
        batch : Batch
            Its ``loss_mask`` says which tokens count as targets.
        dropout : DropoutKeys, optional
            Of this step; None means evaluation.

        Raises
        ------
        ConfigError
            If the model is bidirectional (it sees the token it predicts) or has no head.
        """
        if not self.config.causal:
            raise ConfigError("a bidirectional model (causal is false) has no next-token loss")
        head = self.head_weight
        targets, weights = batch.next_token_targets()
        hidden = self.get_hidden_states(batch, dropout)
        return ops.linear_cross_entropy(hidden, head, targets, weights)

    def save(self, directory: str | Path, tokenizer: SavesTokenizer | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``; see :func:`weights.save_model`."""
        from loopos.models.weights import save_model

        save_model(self, directory, tokenizer)

    # -- the parts of the network ----------------------------------------------------------------

    def _recomputed(
        self,
        layer: Callable[..., States],
        states: States,
        batch: Batch,
        dropout: DropoutKeys | None,
    ) -> States:
        """Run a layer so that its backward computes it again, with the same dropout keys."""
        again = None if dropout is None else dropout.copy()
        keys = iter((dropout, again))
        return ops.recompute(
            lambda *given: layer(given, batch, next(keys)), states, self.parameters().values()
        )

    def _pre_norm_layer(
        self, index: int, states: States, batch: Batch, dropout: DropoutKeys | None
    ) -> States:
        x, stream = states
        name, last = f"layers.{index}", index + 1 == self.config.num_layers
        branch = self._attention(name, x, batch, dropout)
        x, stream = self._add_norm(f"{name}.mlp_norm", branch, stream)
        branch = self._mlp(name, x, batch, dropout)
        following = "final_norm" if last else f"layers.{index + 1}.attention_norm"
        return self._add_norm(following, branch, stream)

    def _post_norm_layer(
        self, index: int, states: States, batch: Batch, dropout: DropoutKeys | None
    ) -> States:
        (x,), name = states, f"layers.{index}"
        branch = self._attention(name, x, batch, dropout)
        x, _ = self._add_norm(f"{name}.attention_norm", branch, x)
        branch = self._mlp(name, x, batch, dropout)
        return self._add_norm(f"{name}.mlp_norm", branch, x)[:1]

    def _check(self, batch: Batch) -> None:
        tokens, config = batch.tokens, self.config
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
            worst = tokens.max() if tokens.max() >= config.vocab_size else tokens.min()
            raise DataError(f"token id {worst} is outside the vocabulary of {config.vocab_size}")
        longest = int(np.diff(batch.offsets).max(initial=0))
        if config.positions == "learned" and longest > config.max_seq_len:
            raise DataError(
                f"a sequence of {longest} tokens is longer than max_seq_len {config.max_seq_len}"
            )
        types = batch.token_types
        if types is not None and types.size:
            if not config.token_types:
                raise DataError("the batch has token types but the model has none (token_types 0)")
            if not 0 <= types.min() <= types.max() < config.token_types:
                raise DataError(f"a token type is outside the model's {config.token_types}")

    def _embed(self, batch: Batch, dropout: DropoutKeys | None) -> Tensor:
        p = self._parameters
        x = ops.embedding(batch.tokens, p["embeddings.tokens"])
        if self.config.token_types:
            types = batch.token_types
            kinds = np.zeros_like(batch.tokens) if types is None else types
            x = ops.add(x, ops.embedding(kinds, p["embeddings.token_types"]))
        if self.config.positions == "learned":
            x = ops.add(x, ops.embedding(batch.positions, p["embeddings.positions"]))
        if self.config.embedding_norm:
            x = self._norm("embeddings.norm", x)
        return self._drop(x, batch, dropout)

    def _attention(
        self, layer: str, x: Tensor, batch: Batch, dropout: DropoutKeys | None
    ) -> Tensor:
        config, size = self.config, self.config.head_size
        names = tuple(f"{layer}.attention.{name}" for name in "qkv")
        q, k, v = self._linears(names, x, batch, dropout)
        if config.qk_norm:
            q = self._head_norm(f"{layer}.attention.q_norm", q)
            k = self._head_norm(f"{layer}.attention.k_norm", k)
        q = ops.reshape(q, (-1, config.num_heads, size))
        k = ops.reshape(k, (-1, config.kv_heads, size))
        v = ops.reshape(v, (-1, config.kv_heads, size))
        if config.positions == "rope":
            q, k = ops.rope(q, k, batch.positions, self._inv_freq)
        mixed = ops.attention(
            q,
            k,
            v,
            batch.offsets,
            causal=config.causal,
            scale=1 / math.sqrt(size),
            window=config.window,
            dropout_rate=config.dropout,
            key=dropout.next() if dropout is not None and config.dropout > 0 else None,
            sample_ids=batch.sample_ids,
        )
        mixed = ops.reshape(mixed, (-1, config.num_heads * size))
        (branch,) = self._linears((f"{layer}.attention.o",), mixed, batch, dropout)
        return self._drop(branch, batch, dropout)

    def _mlp(self, layer: str, x: Tensor, batch: Batch, dropout: DropoutKeys | None) -> Tensor:
        kind, mlp = self.config.activation, f"{layer}.mlp"
        if kind == "swiglu":
            inner = ops.swiglu(*self._linears((f"{mlp}.gate", f"{mlp}.up"), x, batch, dropout))
        else:
            (inner,) = self._linears((f"{mlp}.up",), x, batch, dropout, activation=kind)
        (branch,) = self._linears((f"{mlp}.down",), inner, batch, dropout)
        return self._drop(branch, batch, dropout)

    def _linears(
        self,
        names: tuple[str, ...],
        x: Tensor,
        batch: Batch,
        dropout: DropoutKeys | None,
        activation: str | None = None,
    ) -> list[Tensor]:
        """Apply linear layers that have one input, each with its low-rank update if it has one."""
        low: dict[Adapter, Tensor] = {}
        outputs = []
        layers = [
            (self._parameters[f"{name}.weight"], self._parameters.get(f"{name}.bias"))
            for name in names
        ]
        if activation is None and (self.unmerged or self.adapters.keys().isdisjoint(names)):
            return list(ops.linears(x, layers))
        for name, (weight, bias) in zip(names, layers, strict=True):
            adapter = None if self.unmerged else self.adapters.get(name)
            if adapter is None:
                outputs.append(ops.linear(x, weight, bias, activation=activation))
                continue
            if adapter not in low:
                low[adapter] = adapter.down(x, batch, dropout)
            y = adapter.add_to(name, ops.linear(x, weight, bias), low[adapter])
            outputs.append(y if activation is None else ops.activation(y, activation))
        return outputs

    def _norm(self, name: str, x: Tensor) -> Tensor:
        gain, eps = self._parameters[f"{name}.weight"], self.config.norm_eps
        if self.config.norm == "rms_norm":
            return ops.rms_norm(x, gain, eps)
        return ops.layer_norm(x, gain, self._parameters[f"{name}.bias"], eps)

    def _head_norm(self, name: str, x: Tensor) -> Tensor:
        """Normalise every head of ``x[N, heads * head_dim]`` by itself, to ``[N * heads, D]``."""
        heads = ops.reshape(x, (-1, self.config.head_size))
        return ops.rms_norm(heads, self._parameters[f"{name}.weight"], self.config.norm_eps)

    def _add_norm(self, name: str, branch: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``norm(stream + branch)`` and the sum itself, in one pass over memory."""
        gain, eps = self._parameters[f"{name}.weight"], self.config.norm_eps
        if self.config.norm == "rms_norm":
            return ops.add_rms_norm(branch, stream, gain, eps)
        return ops.add_layer_norm(branch, stream, gain, self._parameters[f"{name}.bias"], eps)

    def _drop(self, x: Tensor, batch: Batch, dropout: DropoutKeys | None) -> Tensor:
        return ops.dropout(x, self.config.dropout, dropout, batch.offsets, batch.sample_ids)
