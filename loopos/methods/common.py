"""What several methods do alike: encode texts, freeze parameters, walk a set without training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from loopos.autograd import Parameter
from loopos.errors import ConfigError, DataError, NumericalError, nearest
from loopos.training.checkpoint import load_checkpoint
from loopos.training.loop import TrainingOptions, TrainResult

Array = np.ndarray[Any, Any]
OptionsType = TypeVar("OptionsType", bound=TrainingOptions)


class Encoder(Protocol):
    """Turns texts into token ids, as :class:`loopos.Tokenizer` does."""

    def encode_batch(self, texts: Sequence[str], max_length: int | None = None) -> list[Array]:
        """Return int32 ids of each text, at most `max_length` of them."""


@dataclass(frozen=True)
class Encoded:
    """Texts as token ids.

    Attributes
    ----------
    tokens : list of ndarray int32
        At most `max_length` each.
    lengths : ndarray int64
        Tokens of each text before truncation.
    """

    tokens: list[Array]
    lengths: Array


def encode(
    tokenizer: Encoder, texts: Sequence[str], max_length: int, where: Sequence[str] | None = None
) -> Encoded:
    """Encode `texts`; those over `max_length` tokens are cut, their full lengths are kept.

    Raises
    ------
    DataError
        If a text has no token, naming its place in `where`, its index without.
    """
    tokens = tokenizer.encode_batch(texts)
    lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
    for index in np.flatnonzero(lengths == 0)[:1]:
        place = f"text {index}" if where is None else where[index]
        raise DataError(f"{place}: the tokenizer finds no token in this text")
    over = np.flatnonzero(lengths > max_length)
    if over.size:
        cut = tokenizer.encode_batch([texts[i] for i in over.tolist()], max_length)
        for index, ids in zip(over, cut, strict=True):
            tokens[index] = ids
    return Encoded(tokens, lengths)


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
    return replace(options, **overrides)


def train_only(parameters: Mapping[str, Parameter], wanted: set[str]) -> None:
    """Freeze every parameter whose name is not in `wanted`."""
    for name, parameter in parameters.items():
        parameter.requires_grad = name in wanted
        parameter.zero_grad()


def restore_best(result: TrainResult, parameters: Mapping[str, Parameter]) -> None:
    """Put the weights of the best evaluation in place, unless the run is to be continued."""
    best = result.best_checkpoint
    if best is not None and result.stopped_reason != "interrupted":
        load_checkpoint(best, parameters)


def require_finite(value: float, what: str) -> float:
    """Return `value`, or raise NumericalError naming what it is."""
    if not np.isfinite(value):
        raise NumericalError(f"{what} is {value}, expected a finite number")
    return value
