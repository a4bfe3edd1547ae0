"""A view of a model that computes its linear layers from weights in fewer bits, for inference.

Decoding reads every weight once a token, so half or a quarter of the bytes is close to twice or
four times the speed. The view shares every array of the model and holds the smaller weights beside
them: bfloat16 adds half of the linear layers' and the head's bytes, int8 a quarter.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from loopos import ops
from loopos.autograd import Array, Parameter, Tensor, is_grad_enabled
from loopos.backends import get_backend
from loopos.backends.quantized import QuantizedWeight
from loopos.data.batch import Batch
from loopos.errors import ConfigError, LooposError, nearest
from loopos.models.adapter import Adapter
from loopos.models.transformer import AttentionCache, Transformer, parameter_shapes
from loopos.ops import DropoutKeys

__all__ = ["WEIGHTS", "QuantizedTransformer", "with_weights"]

#: What weights can be computed with: the model's own, or a smaller kind.
WEIGHTS = ("float32", "bfloat16", "int8")


#: A weight, its bias, and how many outputs each of its layers has.
_Stack: TypeAlias = tuple[QuantizedWeight, Parameter | None, list[int]]


def with_weights(model: Transformer, kind: str) -> Transformer:
    """Return a model that computes with weights of some kind.

    Parameters
    ----------
    model : Transformer
        Not changed; the view shares its arrays. Weights that are trained later change under the
        view's norms and embeddings, but not in its smaller weights: make a new view then.
    kind : {"float32", "bfloat16", "int8"}
        "float32" gives `model` itself, whatever its dtype.

    Raises
    ------
    ConfigError
        If the kind is unknown, or the model is float64 or a view of another kind.
    """
    require_weights(kind)
    if kind == "float32" or (isinstance(model, QuantizedTransformer) and model.kind == kind):
        return model
    if isinstance(model, QuantizedTransformer):
        raise ConfigError(f"weights: this model has {model.kind} already, asked for {kind}")
    if model.dtype != np.float32:
        raise ConfigError(f"weights: {kind} is made of float32, the model is {model.dtype}")
    return QuantizedTransformer(model, kind)


def require_weights(kind: object) -> None:
    """Raise ConfigError unless `kind` is one of :data:`WEIGHTS`."""
    if kind not in WEIGHTS:
        raise ConfigError(
            f"weights: expected one of {', '.join(WEIGHTS)}, found {kind!r}"
            + nearest(str(kind), WEIGHTS)
        )


class QuantizedTransformer(Transformer):
    """The view that :func:`with_weights` makes; nothing in it is trained.

    Parameters
    ----------
    model : Transformer
        In float32. Its adapters, unless merged, stay in float32.
    kind : {"bfloat16", "int8"}
    """

    def __init__(self, model: Transformer, kind: str):
        given = model.parameters()
        arrays = {name: given[name].data for name in parameter_shapes(model.config)}
        super().__init__(model.config, dtype=model.dtype, arrays=arrays)
        for parameter in self._parameters.values():
            parameter.requires_grad = False
        self.kind = kind
        self.extra_tensors, self.origin = model.extra_tensors, model.origin
        if not model.unmerged:
            self._share_adapters(model)
        #: By the names of the layers that have one input: their weights as one matrix, their
        #: biases as one vector, and how many outputs each layer has.
        self._stacked: dict[tuple[str, ...], _Stack] = {}
        for index in range(model.config.num_layers):
            for names in self._groups(f"layers.{index}"):
                self._stacked[names] = self._stack(names)
        head = self.head_weight.data if model.config.lm_head else None
        self._head = None if head is None else get_backend().quantize(head, kind)

    def _share_adapters(self, model: Transformer) -> None:
        """Take the adapters of `model`, frozen: the same arrays."""
        twins: dict[Adapter, Adapter] = {}
        for name, adapter in model.adapters.items():
            if adapter not in twins:
                down = Parameter(adapter.a.data, adapter.a.name, requires_grad=False)
                up = {n: Parameter(b.data, b.name, False) for n, b in adapter.b.items()}
                twins[adapter] = Adapter(down, up, adapter.scale, adapter.dropout)
            self.adapters[name] = twins[adapter]
        self.lora = model.lora

    def _groups(self, layer: str) -> list[tuple[str, ...]]:
        inner = ("gate", "up") if self.config.activation == "swiglu" else ("up",)
        return [
            tuple(f"{layer}.attention.{name}" for name in "qkv"),
            (f"{layer}.attention.o",),
            tuple(f"{layer}.mlp.{name}" for name in inner),
            (f"{layer}.mlp.down",),
        ]

    def _stack(self, names: tuple[str, ...]) -> _Stack:
        weights = [self._parameters[f"{name}.weight"].data for name in names]
        biases = [self._parameters[f"{n}.bias"].data for n in names if self._has_bias(n)]
        whole = weights[0] if len(weights) == 1 else np.concatenate(weights)
        bias = Parameter(np.concatenate(biases), requires_grad=False) if biases else None
        return get_backend().quantize(whole, self.kind), bias, [len(weight) for weight in weights]

    def _has_bias(self, name: str) -> bool:
        return f"{name}.bias" in self._parameters

    @property
    def nbytes(self) -> int:
        """Bytes of the smaller weights alone."""
        held = [weight for weight, _, _ in self._stacked.values()]
        return sum(int(w.nbytes) for w in [*held, self._head] if w is not None)

    def get_hidden_states(
        self,
        batch: Batch,
        dropout: DropoutKeys | None = None,
        cache: AttentionCache | None = None,
        rows: Array | None = None,
    ) -> Tensor:
        """Run the network; see :meth:`Transformer.get_hidden_states`.

        Raises
        ------
        LooposError
            If dropout keys are given: this is no model to train.
        """
        if dropout is not None:
            raise self._not_trained()
        return super().get_hidden_states(batch, None, cache, rows)

    def logits(self, hidden: Tensor, decoding: bool = False) -> Tensor:
        """Return the head's scores of some rows; see :meth:`Transformer.logits`."""
        if self._head is None:
            return super().logits(hidden, decoding)  # which says what is missing
        return ops.linear_quantized(hidden, self._head, None, None)

    def next_token_loss(
        self, batch: Batch, dropout: DropoutKeys | None = None
    ) -> tuple[Tensor, float]:
        """Return the loss, for evaluation only; see :meth:`Transformer.next_token_loss`.

        The head is that of the model, unchanged.

        Raises
        ------
        LooposError
            If gradients would be recorded: this is no model to train.
        """
        if is_grad_enabled():
            raise self._not_trained()
        return super().next_token_loss(batch, dropout)

    def _not_trained(self) -> LooposError:
        return LooposError(
            f"a model with {self.kind} weights cannot be trained; train the model it was made of"
        )

    def _linears(
        self,
        names: tuple[str, ...],
        x: Tensor,
        batch: Batch,
        dropout: DropoutKeys | None,
        activation: str | None = None,
    ) -> list[Tensor]:
        weight, bias, sizes = self._stacked[names]
        plain = self.adapters.keys().isdisjoint(names)
        y = ops.linear_quantized(x, weight, bias, activation if plain else None)
        outputs = ops.split_columns(y, sizes)
        return outputs if plain else self._adapted(names, outputs, x, batch, dropout, activation)
