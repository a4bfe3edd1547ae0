"""One transformer, driven by its configuration, written in ops: GPT-2, Llama, BERT and between.

Activations are ``[N, C]``: the tokens of all sequences of a batch, one after the other. Positions
and lengths follow from ``batch.offsets``; there is no padding and no mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loopos import ops
from loopos.autograd import Array, Parameter, Tensor, is_grad_enabled
from loopos.data.batch import Batch
from loopos.errors import ConfigError, DataError, LooposError
from loopos.models.adapter import Adapter, LoraConfig
from loopos.models.config import TransformerConfig
from loopos.models.parameters import initialise, parameter_shapes
from loopos.models.rope import inverse_frequencies
from loopos.ops import DropoutKeys

__all__ = ["AttentionCache", "Origin", "SavesTokenizer", "Transformer", "TransformerConfig",
           "parameter_shapes"]  # fmt: skip

States = tuple[Tensor, ...]


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


class AttentionCache(Protocol):
    """Keys and values of the tokens that came before, and where new tokens stand behind them.

    :class:`loopos.generation.KVCache` is one; whatever keeps them otherwise can be another.
    """

    def positions(self, batch: Batch) -> Array:
        """Return the position of each new token in its whole sequence, int32 [N]."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Keep the new keys and values, and let the new queries see all that are kept.

        Parameters
        ----------
        layer : int
        q : Tensor [N, H, D]
        k, v : Tensor [N, Hk, D]
        scale : float
            Factor on the scores.
        window : int or None
            A query sees keys closer than this many positions.

        Returns
        -------
        Tensor [N, H, D]
        """


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
            arrays = initialise(config, seed, self.dtype)
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

    def get_hidden_states(
        self,
        batch: Batch,
        dropout: DropoutKeys | None = None,
        cache: AttentionCache | None = None,
        rows: Array | None = None,
    ) -> Tensor:
        """Run the network up to and with its last norm.

        Parameters
        ----------
        batch : Batch
            Ragged token ids.
        dropout : DropoutKeys, optional
            Of this step; None means evaluation, without dropout.
        cache : AttentionCache, optional
            Holds the tokens before those of `batch`, which it takes in: generation, where nothing
            is recorded.
        rows : ndarray of int [R], optional
            The tokens whose states are wanted, each once. The last layer then computes no more than
            these need: all keys and values, but not the perceptron of the other tokens.

        Returns
        -------
        Tensor [N, d_model], or [R, d_model]
            What transformers calls ``last_hidden_state``.

        Raises
        ------
        DataError
            If an id is outside the vocabulary, or a sequence longer than the position table.
        ConfigError
            If there is a cache and the model is bidirectional.
        LooposError
            If there is a cache, and dropout keys or gradients that would be recorded.
        """
        self._check(batch, cache, dropout)
        x = self._embed(batch, dropout, cache)
        pre = self.config.norm_placement == "pre"
        # What runs through the layers: the residual stream, and before it its norm.
        states: States = (self._norm("layers.0.attention_norm", x), x) if pre else (x,)
        layer = self._pre_norm_layer if pre else self._post_norm_layer
        early = rows if self._keeps_all(dropout) else None
        for index in range(self.config.num_layers):
            of_layer = early if index + 1 == self.config.num_layers else None
            if self.gradient_checkpointing:
                run = partial(layer, index, cache=cache, rows=of_layer)
                states = self._recomputed(index, run, states, batch, dropout)
            else:
                states = layer(index, states, batch, dropout, cache, of_layer)
        return states[0] if rows is None or rows is early else ops.gather_rows(states[0], rows)

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
        return self.logits(self.get_hidden_states(batch, dropout))

    def logits(self, hidden: Tensor, decoding: bool = False) -> Tensor:
        """Return the head's scores ``[rows, V]`` of some rows of the hidden states.

        Parameters
        ----------
        hidden : Tensor [rows, d_model]
        decoding : bool
            As of a :class:`~loopos.Batch`, the one that the states are of.

        Raises
        ------
        ConfigError
            If the model has no language-model head.
        """
        if decoding:
            return ops.decode_linears(hidden, [(self.head_weight, None)])[0]
        return ops.linear(hidden, self.head_weight)

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
        rows = np.flatnonzero(weights)
        hidden = self.get_hidden_states(batch, dropout, rows=rows)
        return ops.linear_cross_entropy(hidden, head, targets[rows], weights[rows])

    def save(self, directory: str | Path, tokenizer: SavesTokenizer | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``; see :func:`weights.save_model`."""
        from loopos.models.weights import save_model

        save_model(self, directory, tokenizer)

    # -- the parts of the network ----------------------------------------------------------------

    def _keeps_all(self, dropout: DropoutKeys | None) -> bool:
        """Whether nothing is dropped: masks are made for whole sequences."""
        rates = [self.config.dropout, *(adapter.dropout for adapter in self.adapters.values())]
        return dropout is None or not any(rates)

    def _norm_after(self, index: int) -> str:
        """Return the name of the norm at the end of a pre-norm layer: the one of what follows."""
        last = index + 1 == self.config.num_layers
        return "final_norm" if last else f"layers.{index + 1}.attention_norm"

    def _recomputed(
        self,
        index: int,
        layer: Callable[..., States],
        states: States,
        batch: Batch,
        dropout: DropoutKeys | None,
    ) -> States:
        """Run a layer so that its backward computes it again, with the same dropout keys."""
        again = None if dropout is None else dropout.copy()
        keys = iter((dropout, again))
        names = [f"layers.{index}."]
        if self.config.norm_placement == "pre":
            names.append(f"{self._norm_after(index)}.")
        # Only what the layer uses: where all of it is frozen, it has no backward.
        used = [p for name, p in self.parameters().items() if name.startswith(tuple(names))]
        return ops.recompute(lambda *given: layer(given, batch, next(keys)), states, used)

    def _pre_norm_layer(
        self,
        index: int,
        states: States,
        batch: Batch,
        dropout: DropoutKeys | None,
        cache: AttentionCache | None = None,
        rows: Array | None = None,
    ) -> States:
        x, stream = states
        name = f"layers.{index}"
        branch = self._attention(index, x, batch, dropout, cache, rows)
        if rows is not None:
            stream = ops.gather_rows(stream, rows)
        x, stream = self._add_norm(f"{name}.mlp_norm", branch, stream)
        branch = self._mlp(name, x, batch, dropout)
        return self._add_norm(self._norm_after(index), branch, stream)

    def _post_norm_layer(
        self,
        index: int,
        states: States,
        batch: Batch,
        dropout: DropoutKeys | None,
        cache: AttentionCache | None = None,
        rows: Array | None = None,
    ) -> States:
        (x,), name = states, f"layers.{index}"
        branch = self._attention(index, x, batch, dropout, cache, rows)
        if rows is not None:
            x = ops.gather_rows(x, rows)
        x, _ = self._add_norm(f"{name}.attention_norm", branch, x)
        branch = self._mlp(name, x, batch, dropout)
        return self._add_norm(f"{name}.mlp_norm", branch, x)[:1]

    def _check(
        self, batch: Batch, cache: AttentionCache | None, dropout: DropoutKeys | None
    ) -> None:
        tokens, config = batch.tokens, self.config
        if cache is not None:
            if not config.causal:
                raise ConfigError("a bidirectional model (causal is false) cannot use a cache")
            if dropout is not None or is_grad_enabled():
                raise LooposError("a cache is for generation: no dropout, and inside no_grad()")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
            worst = tokens.max() if tokens.max() >= config.vocab_size else tokens.min()
            raise DataError(f"token id {worst} is outside the vocabulary of {config.vocab_size}")
        positions = batch.positions if cache is None else cache.positions(batch)
        if config.positions == "learned" and positions.max(initial=-1) >= config.max_seq_len:
            raise DataError(
                f"a sequence of {positions.max() + 1} tokens is longer than "
                f"max_seq_len {config.max_seq_len}"
            )
        types = batch.token_types
        if types is not None and types.size:
            if not config.token_types:
                raise DataError("the batch has token types but the model has none (token_types 0)")
            if not 0 <= types.min() <= types.max() < config.token_types:
                raise DataError(f"a token type is outside the model's {config.token_types}")

    def _embed(
        self, batch: Batch, dropout: DropoutKeys | None, cache: AttentionCache | None = None
    ) -> Tensor:
        p = self._parameters
        x = ops.embedding(batch.tokens, p["embeddings.tokens"])
        if self.config.token_types:
            types = batch.token_types
            kinds = np.zeros_like(batch.tokens) if types is None else types
            x = ops.add(x, ops.embedding(kinds, p["embeddings.token_types"]))
        if self.config.positions == "learned":
            positions = batch.positions if cache is None else cache.positions(batch)
            x = ops.add(x, ops.embedding(positions, p["embeddings.positions"]))
        if self.config.embedding_norm:
            x = self._norm("embeddings.norm", x)
        return self._drop(x, batch, dropout)

    def _attention(
        self,
        index: int,
        x: Tensor,
        batch: Batch,
        dropout: DropoutKeys | None,
        cache: AttentionCache | None = None,
        rows: Array | None = None,
    ) -> Tensor:
        config, size, layer = self.config, self.config.head_size, f"layers.{index}"
        names = tuple(f"{layer}.attention.{name}" for name in "qkv")
        q, k, v = self._linears(names, x, batch, dropout)
        if config.qk_norm:
            q = self._head_norm(f"{layer}.attention.q_norm", q)
            k = self._head_norm(f"{layer}.attention.k_norm", k)
        q = ops.reshape(q, (-1, config.num_heads, size))
        k = ops.reshape(k, (-1, config.kv_heads, size))
        v = ops.reshape(v, (-1, config.kv_heads, size))
        if config.positions == "rope":
            positions = batch.positions if cache is None else cache.positions(batch)
            q, k = ops.rope(q, k, positions, self._inv_freq)
        scale = 1 / math.sqrt(size)
        if cache is not None:
            mixed = cache.attend(index, q, k, v, scale, config.window)
        else:
            rate = config.dropout
            key = dropout.next() if dropout is not None and rate > 0 else None
            mixed = ops.attention(
                q, k, v, batch.offsets, config.causal, scale, config.window, rate, key,
                batch.sample_ids,
            )  # fmt: skip
        mixed = ops.reshape(mixed, (-1, config.num_heads * size))
        if rows is not None:
            mixed = ops.gather_rows(mixed, rows)
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
        layers = [
            (self._parameters[f"{name}.weight"], self._parameters.get(f"{name}.bias"))
            for name in names
        ]
        plain = bool(self.unmerged) or self.adapters.keys().isdisjoint(names)
        fused = activation if plain else None
        if batch.decoding:
            outputs = ops.decode_linears(x, layers, fused)
        elif fused is None:
            outputs = list(ops.linears(x, layers))
        else:
            outputs = [ops.linear(x, weight, bias, fused) for weight, bias in layers]
        return outputs if plain else self._adapted(names, outputs, x, batch, dropout, activation)

    def _adapted(
        self,
        names: tuple[str, ...],
        outputs: list[Tensor],
        x: Tensor,
        batch: Batch,
        dropout: DropoutKeys | None,
        activation: str | None,
    ) -> list[Tensor]:
        """Add the low-rank updates to the outputs of linear layers that have one input."""
        low: dict[Adapter, Tensor] = {}
        updated = []
        for name, y in zip(names, outputs, strict=True):
            adapter = self.adapters.get(name)
            if adapter is not None:
                if adapter not in low:
                    low[adapter] = adapter.down(x, batch, dropout)
                y = adapter.add_to(name, y, low[adapter])
            updated.append(y if activation is None else ops.activation(y, activation))
        return updated

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
