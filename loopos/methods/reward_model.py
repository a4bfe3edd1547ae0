"""Reward models: which of two responses would people rather have.

    trainer = RewardTrainer(loopos.load_model("policy"), tokenizer)
    trainer.fit("preferences.jsonl", learning_rate=1e-5)
    trainer.score(["Say hello."], ["Hello!"])

A scalar head on the body scores prompt and response at the last token; the two responses of a pair
stand in one ragged batch, and their scores in the Bradley-Terry loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from loopos.autograd import Array, Tensor, no_grad
from loopos.data.batch import Batch
from loopos.data.chat import renderer
from loopos.data.preferences import Judgements, Preferences, Render, read_preferences
from loopos.data.readers import Source
from loopos.data.responses import Overflow, PreferenceReport, Responses, encode_responses
from loopos.data.tokenizer import Tokenizer, load_tokenizer
from loopos.errors import ConfigError, DataError
from loopos.methods.common import (
    fit,
    in_order,
    require_finite,
    train_only,
    trained_body,
    with_adapters,
    with_gradient,
    with_overrides,
)
from loopos.methods.losses import bradley_terry_loss_and_grad, centering_loss_and_grad
from loopos.models.reward import RewardModel, load_reward_model
from loopos.models.transformer import Transformer
from loopos.ops import DropoutKeys
from loopos.training.loop import TrainingOptions, TrainResult
from loopos.training.metrics import pair_metrics, wins
from loopos.training.trackers import Callback

__all__ = ["Options", "RewardTrainer", "make", "read"]

Data = Preferences | Source
Normalise = Literal["mean", "mean_and_deviation"]


@dataclass(frozen=True)
class Options(TrainingOptions):
    """Options of a reward model's training, beside those of every run.

    Attributes
    ----------
    centering_coefficient : float
        Weight of the squared sum of both scores of a pair, which keeps scores around 0.
    max_length : int or None
        Tokens of prompt and response at the most; None takes ``max_seq_len``.
    overflow : {"drop", "error"}
        What becomes of pairs with a longer response: left out and reported, or refused.
    dropout : bool
        Whether the model's dropout acts in training.
    normalise : {"mean", "mean_and_deviation"} or None
        After the last step the head is changed so that the scores of all training responses have
        the mean 0, or also the standard deviation 1; None leaves it.
    """

    centering_coefficient: float = 0.0
    max_length: int | None = None
    overflow: Overflow = "drop"
    dropout: bool = False
    normalise: Normalise | None = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.centering_coefficient
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
            raise ConfigError(
                "training.centering_coefficient: expected a number that is not negative, "
                f"found {value!r}"
            )
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"training.max_length: expected at least 2, found {self.max_length}")
        for name, kind in (("overflow", Overflow), ("normalise", Normalise)):
            found, known = getattr(self, name), get_args(kind)
            if found not in known and not (name == "normalise" and found is None):
                expected = " or ".join(f'"{choice}"' for choice in known)
                raise ConfigError(f"training.{name}: expected {expected}, found {found!r}")
        if not isinstance(self.dropout, bool):
            raise ConfigError(f"training.dropout: expected true or false, found {self.dropout!r}")


class _Objective:
    """Bradley-Terry on the two scores of each pair, and what keeps them around 0."""

    def __init__(self, model: RewardModel, margins: Array | None, options: Options):
        self._model, self._margins, self._options = model, margins, options
        self._sums: dict[str, float] = {}

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return the pairs, which each term is divided by."""
        pairs = float(batch.num_sequences // 2)
        names = ("bradley_terry", "centering")
        return dict.fromkeys(names[: 1 + (self._options.centering_coefficient > 0)], pairs)

    def losses(self, batch: Batch, dropout: DropoutKeys | None) -> dict[str, Tensor]:
        """Return the sum of each term over the pairs of a batch."""
        assert batch.labels is not None
        scores = self._model.scores(batch, dropout if self._options.dropout else None)
        chosen, rejected = scores.data[0::2], scores.data[1::2]
        margins = None if self._margins is None else self._margins[batch.labels[0::2] // 2]
        total, _, *grads = bradley_terry_loss_and_grad(chosen, rejected, margins)
        terms = {"bradley_terry": with_gradient(total, [scores], [_interleaved(*grads)])}
        weight = self._options.centering_coefficient
        if weight > 0:
            total, _, *grads = centering_loss_and_grad(chosen, rejected)
            gradient = _interleaved(*grads) * scores.dtype.type(weight)
            terms["centering"] = with_gradient(weight * total, [scores], [gradient])
        self._add(chosen, rejected)
        return terms

    def _add(self, chosen: Array, rejected: Array) -> None:
        found = {
            "pairs": chosen.size,
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/accuracy": wins(chosen - rejected).sum(),
            "rewards/margin": (chosen - rejected).sum(),
        }
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def figures(self) -> dict[str, float]:
        """Return the means over the pairs of the step that ends."""
        sums, self._sums = self._sums, {}
        pairs = sums.pop("pairs")
        return {name: value / pairs for name, value in sums.items()}


def _interleaved(chosen: Array, rejected: Array) -> Array:
    """Return the values of pairs in the order of their responses in a batch."""
    return np.stack([chosen, rejected], axis=1).reshape(-1)


class RewardTrainer:
    """Trains a reward model on preferences, and scores with it.

    Parameters
    ----------
    model : Transformer or RewardModel
        A causal body, which gets a new head; or a reward model to go on with.
    tokenizer : Tokenizer
    chat : callable, optional
        Writes conversations as the model's chat template does, such as ``ChatTemplate.render``:
        ``(messages, *, add_generation_prompt=False) -> str``.
    seed : int
        Of the head, of shuffling, adapters and dropout.

    Attributes
    ----------
    reward_model : RewardModel

    Raises
    ------
    ConfigError
        If the model is bidirectional, or has a smaller vocabulary than the tokenizer.
    """

    def __init__(
        self,
        model: Transformer | RewardModel,
        tokenizer: Tokenizer,
        *,
        chat: Render | None = None,
        seed: int = 0,
    ):
        self.reward_model = model if isinstance(model, RewardModel) else RewardModel(model, seed)
        self.tokenizer, self.chat, self.seed = tokenizer, chat, seed
        size = self.reward_model.body.config.vocab_size
        if tokenizer.vocab_size > size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} ids, "
                f"more than the model's vocab_size {size}"
            )

    # -- training ------------------------------------------------------------------------------

    def fit(
        self,
        training_data: Data,
        validation_data: Data | None = None,
        options: Options | None = None,
        *,
        output_dir: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        resume: bool = False,
        stop: Callable[[], bool] | None = None,
        run_config: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> TrainResult:
        """Train on preferences; parameters as :meth:`loopos.FineTuner.fit`.

        Raises
        ------
        DataError
            If a row cannot be used, or none is short enough.
        ConfigError
            If an option has no such name or value.
        NumericalError
            If a loss or gradient is not finite.
        """
        options = with_overrides(options or Options(), overrides)
        training, model = _preferences(training_data), self.reward_model
        encoded = self._encoded(training, options)
        evaluate = None
        if validation_data is not None:
            evaluate = self._evaluator(_preferences(validation_data), options)
        model.body = with_adapters(model.body, options, self.seed)
        parameters = model.parameters()
        train_only(parameters, trained_body(model.body) & set(parameters) | {model.weight.name})
        model.bias = np.zeros_like(model.bias)  # of an earlier normalisation
        result = fit(
            model.body,
            parameters,
            _Objective(model, _margins(training, encoded), options),
            encoded.tokens,
            options,
            make_batch=encoded.batch,
            lengths=encoded.lengths,
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
        if options.normalise is not None and result.stopped_reason != "interrupted":
            scores = self._scores(encoded)
            model.normalise(scores, scale=options.normalise == "mean_and_deviation")
        return result

    def normalise(
        self, prompts: Sequence[str], responses: Sequence[str], scale: bool = False
    ) -> None:
        """Make the mean score of some samples 0, such as those of the policy before PPO.

        Parameters
        ----------
        prompts, responses : sequence of str
        scale : bool
            Make their standard deviation 1 too.

        Raises
        ------
        DataError
            As :meth:`score`.
        NumericalError
            If all scores are equal and `scale` is asked for.
        """
        self.reward_model.normalise(self.score(prompts, responses), scale)

    def report(
        self,
        training: Preferences,
        validation: Preferences | None = None,
        options: Options | None = None,
    ) -> PreferenceReport:
        """Return what the data holds, before anything is trained."""
        options = options or Options()
        held_out = None if validation is None else self._encoded(validation, options)
        return PreferenceReport.of(
            training, validation, self._encoded(training, options), held_out, self._limit(options)
        )

    # -- use -----------------------------------------------------------------------------------

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], batch_tokens: int = 4096
    ) -> Array:
        """Return the score of each response, ``[B]``.

        Parameters
        ----------
        prompts, responses : sequence of str
            A response is closed by the tokenizer's end-of-text token, as in training.
        batch_tokens : int
            Tokens computed at once; changes memory and speed, not results.

        Raises
        ------
        DataError
            If there is not one response for each prompt, one has no token, or both together have
            more than the model's ``max_seq_len``.
        """
        for what, texts in (("prompts", prompts), ("responses", responses)):
            if isinstance(texts, str):
                raise DataError(f"{what}: expected a list of texts, found one text")
        if len(prompts) != len(responses):
            raise DataError(f"{len(responses)} responses for {len(prompts)} prompts")
        if not len(prompts):
            return np.zeros(0, self.reward_model.body.dtype)
        where = [f"sample {i}" for i in range(len(prompts))]
        data = Judgements(prompts, where, responses, np.ones(len(prompts), bool))
        limit = self.reward_model.body.config.max_seq_len
        return self._scores(encode_responses(self.tokenizer, data, limit, "error"), batch_tokens)

    def evaluate(self, data: Data, options: Options | None = None) -> dict[str, Any]:
        """Return how well the scores agree with preferences.

        Of `options` only ``max_length`` and ``overflow`` matter.

        Returns
        -------
        dict
            ``loss``, and the figures of :func:`loopos.training.metrics.pair_metrics`.
        """
        return self._evaluator(_preferences(data), options or Options())()

    def plot_calibration(
        self, data: Data, path: str | Path, options: Options | None = None
    ) -> None:
        """Write an image of how often the response with the higher score was the chosen one.

        Against how probable the scores say that is; of a calibrated model it is the diagonal.

        Raises
        ------
        InputError
            If matplotlib is not installed.
        OutputError
            If the image cannot be written.
        """
        from loopos.training.plots import plot_calibration

        plot_calibration(self.evaluate(data, options)["calibration"], path)

    def save(self, directory: str | Path) -> None:
        """Write model and tokenizer; transformers loads them as a sequence classifier."""
        self.reward_model.save(directory, self.tokenizer)

    @classmethod
    def load(cls, directory: str | Path) -> RewardTrainer:
        """Read what :meth:`save` wrote."""
        tokenizer = load_tokenizer(directory)
        return cls(load_reward_model(directory), tokenizer, chat=renderer(tokenizer))

    # -- inside --------------------------------------------------------------------------------

    def _limit(self, options: Options) -> int:
        limit = self.reward_model.body.config.max_seq_len
        if options.max_length is not None and options.max_length > limit:
            raise ConfigError(
                f"training.max_length: {options.max_length} is more than the model's "
                f"max_seq_len {limit}"
            )
        return options.max_length or limit

    def _encoded(self, data: Preferences, options: Options) -> Responses:
        return encode_responses(
            self.tokenizer, data, self._limit(options), options.overflow, self.chat
        )

    def _scores(self, encoded: Responses, batch_tokens: int = 4096) -> Array:
        lengths = encoded.tokens.lengths
        scores = np.zeros(lengths.size, self.reward_model.body.dtype)
        with no_grad():
            for which in in_order(lengths, batch_tokens):
                scores[which] = self.reward_model.scores(encoded.batch_of(which)).data
        return scores

    def _evaluator(self, data: Preferences, options: Options) -> Callable[[], dict[str, Any]]:
        """Return a function that evaluates the model as it is when called."""
        encoded = self._encoded(data, options)
        margins, lengths = _margins(data, encoded), encoded.response_lengths

        def evaluate() -> dict[str, Any]:
            scores = self._scores(encoded).astype(np.float64)
            chosen, rejected = scores[0::2], scores[1::2]
            total, count, *_ = bradley_terry_loss_and_grad(chosen, rejected, margins)
            loss = require_finite(total / count, "the loss on the evaluation data")
            figures = pair_metrics(chosen, rejected, lengths[0::2], lengths[1::2])
            return {"loss": loss} | figures | {"left_out": int(encoded.too_long.size)}

        return evaluate


def _margins(data: Preferences, encoded: Responses) -> Array | None:
    return None if data.margins is None else data.margins[encoded.rows]


def _preferences(data: Data) -> Preferences:
    return data if isinstance(data, Preferences) else read_preferences(data)


def read(
    source: Source,
    text_field: str,
    label_field: str,
    *,
    options: Options,
    like: Preferences | None = None,
    num_classes: int | None = None,
) -> Preferences:
    """Read preferences for a run.

    Raises
    ------
    ConfigError
        If `num_classes` is given: a reward model has one output.
    """
    if num_classes is not None:
        raise ConfigError("model.num_classes: a reward model has no classes")
    return read_preferences(source)


def make(
    model: Transformer,
    tokenizer: Tokenizer,
    training: Preferences,
    *,
    num_classes: int | None = None,
    seed: int = 0,
) -> RewardTrainer:
    """Make the trainer of a run."""
    return RewardTrainer(model, tokenizer, chat=renderer(tokenizer), seed=seed)
