"""Supervised fine-tuning: a language model learns to answer, from conversations.

Messages are written by the model's own chat template; the loss counts on what the assistant says
alone. Without a template, prompts and completions that are texts are joined as they stand, and the
completion is trained on with the token that ends a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from loopos.data.chat import ChatTemplate, TrainOn, chat_template
from loopos.data.conversations import Conversation, Conversations, read_conversations
from loopos.data.readers import Texts
from loopos.data.report import DataReport, Finding
from loopos.data.store import TextStore, TokenStore, TokenStoreBuilder
from loopos.data.tokenizer import Tokenizer
from loopos.errors import ConfigError, DataError, ModelFormatError
from loopos.methods.common import fit, train_only, trained_body, with_adapters, with_overrides
from loopos.methods.language_model import (
    NextTokenObjective,
    Piece,
    SpanWeights,
    endless,
    next_token_evaluator,
    require_language_model,
    weighted_pieces,
)
from loopos.models.transformer import Transformer
from loopos.training.loop import TrainingOptions, TrainResult
from loopos.training.trackers import Callback

__all__ = ["Options", "SupervisedFineTuner", "make", "read"]

Array = np.ndarray[Any, Any]

Overflow = Literal["drop", "truncate", "error"]
#: Places of conversations left out that a warning names.
_PLACES = 5


@dataclass(frozen=True)
class Options(TrainingOptions):
    """Options of a supervised fine-tuning run, beside those of every run.

    Attributes
    ----------
    max_length : int or None
        Tokens of a conversation at the most; None takes ``max_seq_len``.
    overflow : {"drop", "truncate", "error"}
        What becomes of longer conversations: left out and reported, cut at their end, or refused.
    train_on : {"assistant", "last_assistant", "all"}
        What counts in the loss: all that the assistant says, its last turn, or every token.
    """

    max_length: int | None = None
    overflow: Overflow = "drop"
    train_on: TrainOn = "assistant"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"training.max_length: expected at least 2, found {self.max_length}")
        for name, kind in (("overflow", Overflow), ("train_on", TrainOn)):
            value, known = getattr(self, name), get_args(kind)
            if value not in known:
                expected = ", ".join(f'"{choice}"' for choice in known)
                raise ConfigError(f"training.{name}: expected one of {expected}, found {value!r}")


@dataclass(frozen=True)
class _Samples:
    """What is trained on.

    Attributes
    ----------
    tokens, marks : TokenStore
        Ids, and 1 where one is trained on.
    rows : list of int
        Which conversation each sample is.
    lengths : ndarray int64
        Tokens of every conversation, also of those left out.
    left_out : list of int
        Conversations that are too long.
    """

    tokens: TokenStore
    marks: TokenStore
    rows: list[int]
    lengths: Array
    left_out: list[int]

    @property
    def weights(self) -> SpanWeights:
        return SpanWeights(self.marks, np.array([0.0, 1.0], dtype=np.float32))


class SupervisedFineTuner:
    """Trains a language model on conversations.

    Parameters
    ----------
    model : Transformer
        Causal, with a language-model head.
    tokenizer : Tokenizer
        With a chat template, unless all rows are prompts and completions that are texts.
    seed : int
        Of shuffling, adapters and dropout.

    Raises
    ------
    ConfigError
        If the model is bidirectional, has no head, or a smaller vocabulary than the tokenizer.
    ModelFormatError
        If the chat template cannot be read.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, seed: int = 0):
        require_language_model(model, tokenizer, "supervised fine-tuning")
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self._template = chat_template(tokenizer)

    def fit(
        self,
        training_data: Conversations | str | Path,
        validation_data: Conversations | str | Path | None = None,
        options: Options | None = None,
        *,
        output_dir: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        resume: bool = False,
        stop: Callable[[], bool] | None = None,
        run_config: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> TrainResult:
        """Train on conversations; parameters as :meth:`loopos.FineTuner.fit`.

        Raises
        ------
        DataError
            If the template refuses a conversation, or there is nothing in it to train on.
        ConfigError
            If an option has no such name or value, or a template is missing.
        NumericalError
            If a loss or gradient is not finite.
        """
        options = with_overrides(options or Options(), overrides)
        samples = self._samples(_conversations(training_data), options)
        self.model = with_adapters(self.model, options, self.seed)
        evaluate = None
        if validation_data is not None:
            held_out = self._samples(_conversations(validation_data), options)
            evaluate = next_token_evaluator(self.model, held_out.tokens, held_out.weights)
        train_only(self.model.parameters(), trained_body(self.model))
        return fit(
            self.model,
            self.model.parameters(),
            NextTokenObjective(self.model),
            samples.tokens,
            options,
            loss_weights=samples.weights,
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
        self,
        training: Conversations,
        validation: Conversations | None = None,
        options: Options | None = None,
    ) -> DataReport:
        """Return what the data holds, and which conversations are too long.

        It warns where no token ends an answer, so that the model would not learn to stop.
        """
        options = options or Options()
        limit, cut = self._limit(options), options.overflow == "truncate"
        found = [(data, self._samples(data, options)) for data in (training, validation)
                 if data is not None]  # fmt: skip
        report = DataReport.build(
            training,
            validation,
            found[0][1].lengths,
            limit if cut else None,
            found[1][1].lengths if validation is not None else None,
        )
        if not self._ends():
            report.warnings.append(endless("an answer", self._template is not None))
        places = [data.where[i] for data, samples in found for i in samples.left_out]
        if not places:
            return report
        few = ", ".join(places[:_PLACES]) + (", ..." if len(places) > _PLACES else "")
        why = (
            f"have nothing to train on in {limit} tokens"
            if cut
            else f"have more than {limit} tokens"
        )
        rows = report.rows + report.validation_rows
        warning = f"left out are {len(places)} of {rows} conversations, which {why} ({few})"
        dropped = Finding(
            report.dropped.count + len(places), [*report.dropped.places, *places][:_PLACES]
        )
        return replace(report, dropped=dropped, warnings=[*report.warnings, warning])

    def evaluate(
        self, data: Conversations | str | Path, options: Options | None = None
    ) -> dict[str, float]:
        """Return ``loss`` (nats per token trained on) and ``perplexity`` on conversations."""
        samples = self._samples(_conversations(data), options or Options())
        return next_token_evaluator(self.model, samples.tokens, samples.weights)()

    def preview(
        self, training: Conversations, options: Options | None = None, rows: int = 3
    ) -> list[list[Piece]]:
        """Return the first `rows` conversations in pieces, with how much each counts."""
        samples = self._samples(training, options or Options())
        weights = samples.weights
        return [
            weighted_pieces(self.tokenizer, samples.tokens[i], weights[i])
            for i in range(min(rows, len(samples.tokens)))
        ]

    def save(self, directory: str | Path) -> None:
        """Write model and tokenizer; transformers loads them back."""
        self.model.save(directory, self.tokenizer)

    def _ends(self) -> bool:
        """Whether a token ends what is trained on."""
        if self._template is None:
            return self.tokenizer.eos_id is not None
        try:
            return bool(self._template.stop_ids)
        except (DataError, ModelFormatError):  # it may want more than a question and an answer
            return True

    def _limit(self, options: Options) -> int:
        limit = self.model.config.max_seq_len
        if options.max_length is not None and options.max_length > limit:
            raise ConfigError(
                f"training.max_length: {options.max_length} is more than the model's "
                f"max_seq_len {limit}"
            )
        return options.max_length or limit

    def _samples(self, data: Conversations, options: Options) -> _Samples:
        """Encode conversations; those in a store remember what they were encoded to last."""
        memo = data.texts.memo if isinstance(data.texts, TextStore) else {}
        key = (options.train_on, options.overflow, self._limit(options))
        known = memo.get("supervised")
        # By identity: what made the ids is kept, so that no other template takes its place.
        if known is not None and known[0] is self.tokenizer and known[1:3] == (self._template, key):
            samples: _Samples = known[3]
            return samples
        samples = self._encode_all(data, options)
        memo["supervised"] = self.tokenizer, self._template, key, samples
        return samples

    def _encode_all(self, data: Conversations, options: Options) -> _Samples:
        limit = self._limit(options)
        tokens, marks = TokenStoreBuilder(), TokenStoreBuilder()
        rows: list[int] = []
        lengths, left_out = [], []
        for index, conversation in enumerate(data.conversations):
            ids, trained = self._encode(conversation, options.train_on, data.where[index])
            lengths.append(ids.size)
            if ids.size > limit:
                if options.overflow == "error":
                    raise DataError(
                        f"{data.where[index]}: has {ids.size} tokens, more than max_length {limit}"
                    )
                ids, trained = ids[:limit], trained[:limit]
                if options.overflow == "drop" or not trained[1:].any():
                    left_out.append(index)
                    continue
            tokens.append(ids)
            marks.append(trained.astype(np.int32))
            rows.append(index)
        if not rows:
            fitting = (
                "has anything to train on within" if options.overflow == "truncate" else "fits"
            )
            raise DataError(
                f"{data.where[0]}: neither this conversation nor any other {fitting} "
                f"max_length {limit}"
            )
        return _Samples(
            tokens.finish(), marks.finish(), rows, np.array(lengths, np.int64), left_out
        )

    def _encode(
        self, conversation: Conversation, train_on: TrainOn, place: str
    ) -> tuple[Array, Array]:
        """Return the ids of a conversation and which are trained on, at least one of them."""
        try:
            if self._template is not None:
                ids, trained = self._template.encode(
                    conversation.messages,
                    train_on=train_on,
                    first=conversation.first,
                    tools=conversation.tools,
                )
            elif conversation.plain:
                ids, trained = self._joined(conversation, train_on)
            else:
                ChatTemplate(self.tokenizer)  # says what is missing
                raise AssertionError("a tokenizer has a template that was not read")
        except (ConfigError, DataError, ModelFormatError) as error:
            raise type(error)(f"{place}: {error}") from error
        if not trained[1:].any():  # nothing predicts the first token
            raise DataError(f"{place}: there is no token in it to train on")
        return ids, trained

    def _joined(self, conversation: Conversation, train_on: TrainOn) -> tuple[Array, Array]:
        """Join a prompt, its completion and the token that ends a text."""
        prompt, completion = (message["content"] for message in conversation.messages)
        # As the prompt is encoded when text is generated; nothing opens the completion.
        (before,) = self.tokenizer.encode_open([prompt])
        after, _ = self.tokenizer.encode_with_offsets(completion)
        if self.tokenizer.eos_id is not None:
            after = np.append(after, np.int32(self.tokenizer.eos_id))
        trained: Array = np.zeros(before.size + after.size, dtype=bool)
        trained[0 if train_on == "all" else before.size :] = True
        return np.concatenate([before, after]), trained


def _conversations(data: Conversations | str | Path) -> Conversations:
    return data if isinstance(data, Conversations) else read_conversations(data)


def read(
    source: str | Path,
    text_field: str,
    label_field: str,
    *,
    options: Options,
    like: Texts | None = None,
    num_classes: int | None = None,
) -> Conversations:
    """Read conversations for a run; there are no labels to read.

    Raises
    ------
    ConfigError
        If `num_classes` is given: a language model has none.
    """
    if num_classes is not None:
        raise ConfigError("model.num_classes: a language model has no classes")
    return read_conversations(source)


def make(
    model: Transformer,
    tokenizer: Tokenizer,
    training: Conversations,
    *,
    num_classes: int | None = None,
    seed: int = 0,
) -> SupervisedFineTuner:
    """Make the trainer of a run."""
    return SupervisedFineTuner(model, tokenizer, seed=seed)
