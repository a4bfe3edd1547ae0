"""Pretraining: autoregressive language modelling on plain text, to make base models.

Each document is encoded, closed with the tokenizer's end-of-text token where it has one, and cut
into sequences of at most ``sequence_length`` tokens. A sequence stands alone: attention never
crosses from one document into the next, and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loopos.data.readers import Texts, read_texts, split
from loopos.data.report import DataReport
from loopos.data.store import TokenStore, TokenStoreBuilder
from loopos.data.tokenizer import Tokenizer
from loopos.errors import ConfigError, DataError
from loopos.methods.common import (
    encode_all,
    fit,
    train_only,
    trained_body,
    with_adapters,
    with_overrides,
)
from loopos.methods.language_model import (
    NextTokenObjective,
    Piece,
    next_token_evaluator,
    require_language_model,
    weighted_pieces,
)
from loopos.models.transformer import Transformer
from loopos.training.loop import TrainingOptions, TrainResult
from loopos.training.trackers import Callback

__all__ = ["Options", "Pretrainer", "make", "read"]


@dataclass(frozen=True)
class Options(TrainingOptions):
    """Options of a pretraining run, beside those of every run.

    Attributes
    ----------
    sequence_length : int or None
        Documents are cut into pieces of at most this many tokens; None takes ``max_seq_len``.
    """

    sequence_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length is not None and self.sequence_length < 2:
            raise ConfigError(
                f"training.sequence_length: expected at least 2, found {self.sequence_length}"
            )


class Pretrainer:
    """Trains a language model on plain text.

    Parameters
    ----------
    model : Transformer
        Causal, with a language-model head.
    tokenizer : Tokenizer
    seed : int
        Of shuffling and dropout.

    Raises
    ------
    ConfigError
        If the model is bidirectional, has no head, or a smaller vocabulary than the tokenizer.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, seed: int = 0):
        require_language_model(model, tokenizer, "pretraining")
        self.model, self.tokenizer, self.seed = model, tokenizer, seed

    def fit(
        self,
        training_data: Texts | str | Path,
        validation_data: Texts | str | Path | None = None,
        options: Options | None = None,
        *,
        output_dir: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        resume: bool = False,
        stop: Callable[[], bool] | None = None,
        run_config: dict[str, Any] | None = None,
        validation_fraction: float = 0.0,
        **overrides: Any,
    ) -> TrainResult:
        """Train on texts; other parameters as :meth:`loopos.FineTuner.fit`.

        Parameters
        ----------
        validation_fraction : float
            Share of the training data that is held out where there is no `validation_data`, as
            :func:`loopos.data.readers.split` does it with the trainer's seed: some of the texts,
            or of a single one the end. 0 holds out none.

        Raises
        ------
        DataError
            If no text has two tokens, or there is too little text to hold some out.
        ConfigError
            If an option has no such name or value.
        NumericalError
            If a loss or gradient is not finite.
        """
        options = with_overrides(options or Options(), overrides)
        training = _texts(training_data)
        validation = None if validation_data is None else _texts(validation_data)
        if validation is None and validation_fraction:
            training, validation = split(training, validation_fraction, self.seed)
        pieces = self._pieces(training, options)
        self.model = with_adapters(self.model, options, self.seed)
        evaluate = None
        if validation is not None:
            evaluate = next_token_evaluator(self.model, self._pieces(validation, options))
        train_only(self.model.parameters(), trained_body(self.model))
        return fit(
            self.model,
            self.model.parameters(),
            NextTokenObjective(self.model),
            pieces,
            options,
            seed=self.seed,
            evaluate=evaluate,
            run={
                "output_dir": output_dir,
                "callbacks": callbacks,
                "resume": resume,
                "stop": stop,
                "run_config": run_config,
            },
        )

    def report(
        self, training: Texts, validation: Texts | None = None, options: Options | None = None
    ) -> DataReport:
        """Return what the data holds; documents are cut into pieces, so none is truncated."""
        lengths = encode_all(self.tokenizer, training.texts).lengths
        return DataReport.build(training, validation, lengths, None)

    def evaluate(
        self, data: Texts | str | Path, options: Options | None = None
    ) -> dict[str, float]:
        """Return ``loss`` (nats per token) and ``perplexity`` on texts."""
        pieces = self._pieces(_texts(data), options or Options())
        return next_token_evaluator(self.model, pieces)()

    def preview(
        self, training: Texts, options: Options | None = None, rows: int = 3
    ) -> list[list[Piece]]:
        """Return the first `rows` sequences, of which every token counts but the first."""
        pieces = self._pieces(training, options or Options())
        return [weighted_pieces(self.tokenizer, ids, np.ones(len(ids))) for ids in pieces[:rows]]

    def save(self, directory: str | Path) -> None:
        """Write model and tokenizer; transformers loads them back."""
        self.model.save(directory, self.tokenizer)

    def _pieces(self, texts: Texts, options: Options) -> TokenStore:
        limit = self.model.config.max_seq_len
        length = options.sequence_length or limit
        if length > limit:
            raise ConfigError(
                f"training.sequence_length: {length} is more than the model's max_seq_len {limit}"
            )
        pieces = TokenStoreBuilder()
        for ids in encode_all(self.tokenizer, texts.texts).tokens:
            ids = self.tokenizer.closed(ids)
            for start in range(0, len(ids), length):
                piece = ids[start : start + length]
                if len(piece) > 1:  # a single token has nothing to predict
                    pieces.append(piece)
        if not len(pieces):
            raise DataError("no text has two tokens, so there is nothing to predict")
        return pieces.finish()


def _texts(data: Texts | str | Path) -> Texts:
    return data if isinstance(data, Texts) else read_texts(data)


def read(
    source: str | Path,
    text_field: str,
    label_field: str,
    *,
    options: Options,
    like: Texts | None = None,
    num_classes: int | None = None,
) -> Texts:
    """Read texts for a run; there are no labels to read.

    Raises
    ------
    ConfigError
        If `num_classes` is given: a language model has none.
    """
    if num_classes is not None:
        raise ConfigError("model.num_classes: a language model has no classes")
    return read_texts(source, text_field)


def make(
    model: Transformer,
    tokenizer: Tokenizer,
    training: Texts,
    *,
    num_classes: int | None = None,
    seed: int = 0,
) -> Pretrainer:
    """Make the trainer of a run."""
    return Pretrainer(model, tokenizer, seed=seed)
