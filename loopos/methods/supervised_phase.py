"""The first phase of RLHF, for a policy that cannot talk yet: it learns the chosen responses."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loopos.data.responses import Responses
from loopos.data.store import TokenStore, TokenStoreBuilder
from loopos.methods.common import RunArguments, fit, train_only, trained_body
from loopos.methods.language_model import NextTokenObjective, SpanWeights, next_token_evaluator
from loopos.models.transformer import Transformer
from loopos.models.weights import load_model
from loopos.training.loop import TrainResult
from loopos.training.options import TrainingOptions

__all__ = ["fit_chosen", "take_weights"]


def fit_chosen(
    model: Transformer,
    pairs: Responses,
    held_out: Responses | None,
    options: TrainingOptions,
    *,
    seed: int,
    run: RunArguments,
) -> TrainResult:
    """Train a language model on the chosen response of each pair; prompts do not count.

    Parameters
    ----------
    model : Transformer
        Trained in place.
    pairs, held_out : Responses
    options : TrainingOptions
    seed : int
    run : RunArguments
    """
    tokens, weights = _chosen(pairs)
    evaluate = None if held_out is None else next_token_evaluator(model, *_chosen(held_out))
    train_only(model.parameters(), trained_body(model))
    return fit(
        model, model.parameters(), NextTokenObjective(model), tokens, options,
        loss_weights=weights, seed=seed, evaluate=evaluate, run=run,
    )  # fmt: skip


def _chosen(pairs: Responses) -> tuple[TokenStore, SpanWeights]:
    """Return prompts with their chosen responses, and what of them counts."""
    tokens, marks = TokenStoreBuilder(), TokenStoreBuilder()
    for place in range(0, len(pairs.tokens), 2):
        ids = pairs.tokens[place]
        tokens.append(ids)
        marks.append((np.arange(len(ids)) >= pairs.prompts[place]).astype(np.int32))
    return tokens.finish(), SpanWeights(marks.finish(), np.array([0.0, 1.0], dtype=np.float32))


def take_weights(model: Transformer, directory: Path) -> None:
    """Put the weights that were saved in a directory into a model of the same sizes."""
    saved = load_model(directory, str(model.dtype)).parameters()
    for name, parameter in model.parameters().items():
        parameter.data[...] = saved[name].data
