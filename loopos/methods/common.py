"""What several methods do alike: encode texts, choose what is trained, train, walk a set."""

from __future__ import annotations

import array
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar, cast

import numpy as np

from loopos.autograd import Parameter, Tensor, record
from loopos.data.batch import Batch
from loopos.data.store import TextStore, TokenStore, TokenStoreBuilder
from loopos.errors import ConfigError, DataError, NumericalError, nearest
from loopos.files import locked_directory
from loopos.models.lora import add_lora, without_adapters
from loopos.models.transformer import Transformer
from loopos.training.checkpoint import load_checkpoint
from loopos.training.loop import Objective, TrainingOptions, TrainResult, train
from loopos.training.trackers import Callback

Array = np.ndarray[Any, Any]
OptionsType = TypeVar("OptionsType", bound=TrainingOptions)

#: What is encoded at once.
_CHUNK_CHARACTERS, _CHUNK_TEXTS = 1 << 18, 4096


class Encoder(Protocol):
    """Turns texts into token ids, as :class:`loopos.Tokenizer` does."""

    def encode_batch(self, texts: Sequence[str], max_length: int | None = None) -> list[Array]:
        """Return int32 ids of each text, at most `max_length` of them."""


@dataclass(frozen=True)
class Encoded:
    """Texts as token ids.

    Attributes
    ----------
    tokens : sequence of ndarray int32
        At most `max_length` each; a ``TokenStore``, whose ``lengths`` are those of `tokens`.
    lengths : ndarray int64
        Tokens of each text before truncation.
    """

    tokens: TokenStore
    lengths: Array


def encode(
    tokenizer: Encoder, texts: Sequence[str], max_length: int, where: Sequence[str] | None = None
) -> Encoded:
    """Encode `texts`; those over `max_length` tokens are cut, their full lengths are kept.

    Texts in a ``TextStore`` remember what they were encoded to last: asked again with the same
    tokenizer and length, that is returned.

    Raises
    ------
    DataError
        If a text has no token, naming its place in `where`, its index without.
    OutputError
        If there is more than memory should hold, and no room for a temporary file.
    """
    encoded = encode_all(tokenizer, texts, max_length)
    for index in np.flatnonzero(encoded.lengths == 0)[:1].tolist():
        place = f"text {index}" if where is None else where[index]
        raise DataError(f"{place}: the tokenizer finds no token in this text")
    return encoded


def encode_all(tokenizer: Encoder, texts: Sequence[str], max_length: int | None = None) -> Encoded:
    """Encode `texts` as :func:`encode`, cut only if asked to, also those without any token."""
    memo = texts.memo if isinstance(texts, TextStore) else {}
    known = memo.get("encoded")
    # By identity: what made the ids is kept, so that no other tokenizer takes its place.
    if known is not None and known[0] is tokenizer and known[1] == max_length:
        return cast(Encoded, known[2])
    builder = TokenStoreBuilder()
    lengths = array.array("q")
    for chunk in _chunks(texts):
        tokens = tokenizer.encode_batch(chunk)
        lengths.extend(map(len, tokens))
        if max_length is not None:
            over = [i for i, ids in enumerate(tokens) if len(ids) > max_length]
            cut = tokenizer.encode_batch([chunk[i] for i in over], max_length) if over else []
            for index, ids in zip(over, cut, strict=True):
                tokens[index] = ids
        for ids in tokens:
            builder.append(ids)
    counted = np.array(lengths, dtype=np.int64)
    counted.flags.writeable = False  # whoever asks again gets this very array
    encoded = Encoded(builder.finish(), counted)
    memo["encoded"] = tokenizer, max_length, encoded
    return encoded


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield texts in lists of a size that a tokenizer's own records do not fill memory with."""
    chunk: list[str] = []
    held = 0
    for text in texts:
        chunk.append(text)
        # Whatever is no text has no length here: the tokenizer says so.
        held += len(text) if isinstance(text, str) else 0
        if held >= _CHUNK_CHARACTERS or len(chunk) >= _CHUNK_TEXTS:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def in_order(lengths: Array, batch_tokens: int = 4096) -> Iterator[Array]:
    """Yield indices in groups of at most `batch_tokens` tokens, shortest sequences first.

    For passes without training, where the order does not matter and equal lengths are fastest.
    """
    group: list[int] = []
    held = 0
    for index in np.argsort(lengths, kind="stable"):
        if group and held + lengths[index] > batch_tokens:
            yield np.array(group)
            group, held = [], 0
        group.append(int(index))
        held += int(lengths[index])
    if group:
        yield np.array(group)


def with_overrides(options: OptionsType, overrides: Mapping[str, Any]) -> OptionsType:
    """Return `options` with some fields replaced; ConfigError for a name that is none of them."""
    known = [field.name for field in fields(options)]
    for name in overrides:
        if name not in known:
            raise ConfigError(f"unknown option '{name}'{nearest(name, known)}")
    return options.replaced(**overrides)


def trained_body(model: Transformer) -> set[str]:
    """Return the names of what is trained of a body: its adapters if it has any, or all."""
    adapters = {parameter.name for adapter in model.adapters.values()
                for _, parameter in adapter.named()}  # fmt: skip
    return adapters or set(model.parameters())


def train_only(parameters: Mapping[str, Parameter], wanted: set[str]) -> None:
    """Freeze every parameter whose name is not in `wanted`."""
    for name, parameter in parameters.items():
        parameter.requires_grad = name in wanted
        parameter.zero_grad()


def with_adapters(model: Transformer, options: TrainingOptions, seed: int) -> Transformer:
    """Return `model` as ``options.lora`` asks: with new adapters, or with those that it has.

    Raises
    ------
    ConfigError
        If the model has other adapters, or has them merged.
    """
    wanted = options.lora
    if model.unmerged:
        raise ConfigError("the adapters of this model are merged; unmerge them to train on")
    if wanted is None or not model.adapters:
        return model if wanted is None else add_lora(model, wanted, seed)
    has = model.lora or wanted
    for field in fields(wanted):
        if field.name != "target_modules" and getattr(wanted, field.name) != getattr(
            has, field.name
        ):
            raise ConfigError(
                f"training.lora.{field.name}: {getattr(wanted, field.name)!r}, but the model has "
                f"adapters with {getattr(has, field.name)!r}"
            )
    if list(add_lora(without_adapters(model), wanted).adapters) != list(model.adapters):
        raise ConfigError("training.lora.target_modules: the model has adapters of other layers")
    return model


def rate_factors(names: Iterable[str], num_layers: int, decay: float) -> dict[str, float]:
    """Return the factor of each parameter's learning rate (Clark et al. 2020, "ELECTRA", 3.1).

    Layer i of L has ``decay^(L - i)``, the embeddings ``decay^(L + 1)``, all else 1.
    """
    factors = {}
    for name in names:
        layer = re.match(r"layers\.(\d+)\.", name)
        if layer:
            factors[name] = decay ** (num_layers - int(layer[1]))
        elif name.startswith("embeddings."):
            factors[name] = decay ** (num_layers + 1)
    return factors


class RunArguments(TypedDict):
    """What :func:`loopos.training.loop.train` is told of where and how a run goes."""

    output_dir: str | Path | None
    callbacks: Sequence[Callback]
    resume: bool
    stop: Callable[[], bool] | None
    run_config: dict[str, Any] | None


def fit(
    model: Transformer,
    parameters: Mapping[str, Parameter],
    objective: Objective,
    tokens: TokenStore,
    options: TrainingOptions,
    *,
    labels: Array | None = None,
    loss_weights: Sequence[Array] | None = None,
    make_batch: Callable[[Array, Array], Batch] | None = None,
    lengths: Array | None = None,
    seed: int,
    evaluate: Callable[[], dict[str, Any]] | None,
    run: RunArguments,
) -> TrainResult:
    """Train on encoded texts, and end with the weights of the best evaluation.

    Parameters
    ----------
    model : Transformer
        The body.
    parameters : mapping of str to Parameter
        Of the body and its heads.
    objective : Objective
    tokens : TokenStore
        A sequence for each sample.
    options : TrainingOptions
    labels : ndarray [n, ...], optional
        Of the samples.
    loss_weights : sequence of ndarray float32, optional
        How much each token of each sample counts as a target.
    make_batch, lengths : callable and ndarray of int [n], optional
        ``(indices, sample_ids) -> Batch``, and the tokens of each sample, where a sample is more
        than one sequence of `tokens`.
    seed : int
    evaluate : callable or None
    run : RunArguments
    """

    def batch_of(indices: Array, sample_ids: Array) -> Batch:
        sequences = [tokens[i] for i in indices]
        marks = None if labels is None else labels[indices]
        weights = None if loss_weights is None else [loss_weights[i] for i in indices]
        return Batch.from_sequences(
            sequences, labels=marks, sample_ids=sample_ids, loss_weights=weights
        )

    model.gradient_checkpointing = options.gradient_checkpointing
    decay = options.layerwise_lr_decay
    root = run["output_dir"]
    # Locked to the end: the best checkpoint is read after the last step.
    with nullcontext() if root is None else locked_directory(root):
        result = train(
            parameters,
            objective,
            make_batch or batch_of,
            tokens.lengths if lengths is None else lengths,
            options,
            seed=seed,
            evaluate=evaluate,
            rate_factors=rate_factors(parameters, model.config.num_layers, decay),
            **run,
        )
        restore_best(result, parameters)
    return result


def restore_best(result: TrainResult, parameters: Mapping[str, Parameter]) -> None:
    """Put the weights of the best evaluation in place, unless the run is to be continued."""
    best = result.best_checkpoint
    if best is not None and result.stopped_reason != "interrupted":
        load_checkpoint(best, parameters)


def with_gradient(total: float, inputs: Sequence[Tensor], gradients: Sequence[Array]) -> Tensor:
    """Return a sum whose gradient along some tensors is known: those of ``losses.py`` on the tape.

    Parameters
    ----------
    total : float
    inputs : sequence of Tensor
    gradients : sequence of ndarray
        Of `total` along each of `inputs`, in its shape.
    """

    def backward(grads: Sequence[Array | None]) -> Sequence[Array | None]:
        assert grads[0] is not None  # of the only output
        upstream = float(grads[0])
        return [gradient * gradient.dtype.type(upstream) for gradient in gradients]

    result: Tensor = record([np.asarray(total, dtype=np.float64)], inputs, backward)
    return result


def require_finite(value: float, what: str) -> float:
    """Return `value`, or raise NumericalError naming what it is."""
    if not np.isfinite(value):
        raise NumericalError(f"{what} is {value}, expected a finite number")
    return value
