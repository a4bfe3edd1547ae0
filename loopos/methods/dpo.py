"""Direct preference optimisation: a policy learns from preferences without a reward model.

    trainer = DPOTrainer(loopos.load_model("policy"), tokenizer)
    trainer.fit("preferences.jsonl", beta=0.1, learning_rate=1e-6)

DPO and its relatives differ in the loss on the log-probabilities of whole responses
(:mod:`loopos.methods.losses`). The reference is a frozen copy of the policy as it began; with
LoRA it is the base without its adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from loopos.autograd import Array, Parameter, Tensor
from loopos.backends.lasting import lasting_copy
from loopos.data.chat import renderer
from loopos.data.preferences import (
    Judgements,
    Preferences,
    Render,
    read_judgements,
    read_preferences,
)
from loopos.data.readers import Source
from loopos.data.responses import PreferenceReport, Responses, encode_responses
from loopos.data.tokenizer import Tokenizer
from loopos.errors import ConfigError, DataError
from loopos.methods import losses
from loopos.methods.common import (
    fit,
    require_finite,
    train_only,
    trained_body,
    with_adapters,
    with_overrides,
)
from loopos.methods.language_model import require_language_model, require_reference
from loopos.methods.logprobs import Reference, ResponseLogprobs, response_sums
from loopos.methods.preference_objectives import Options, PairObjective, SingleObjective
from loopos.models.lora import without_adapters
from loopos.models.transformer import Transformer
from loopos.training.loop import TrainResult
from loopos.training.metrics import wins
from loopos.training.trackers import Callback

__all__ = ["DPOTrainer", "Options", "make", "read"]

Data = Preferences | Judgements | Source


class DPOTrainer:
    """Trains a language model on preferences.

    Parameters
    ----------
    model : Transformer
        Causal, with a language-model head: the policy.
    tokenizer : Tokenizer
    reference : Transformer, optional
        What the policy is held to. By default a copy of the policy as it is when training first
        begins, or with adapters its base; it is never changed.
    chat : callable, optional
        Writes conversations as the model's chat template does, such as ``ChatTemplate.render``:
        ``(messages, *, add_generation_prompt=False) -> str``.
    seed : int
        Of shuffling, adapters and dropout.

    Raises
    ------
    ConfigError
        If the model is bidirectional, has no head, or a smaller vocabulary than the tokenizer; when
        training begins, if the reference shares what is trained, or has another vocabulary.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        reference: Transformer | None = None,
        chat: Render | None = None,
        seed: int = 0,
    ):
        if reference is model:
            reference = None
        for network in (model, *([] if reference is None else [reference])):
            require_language_model(network, tokenizer, "direct preference optimisation")
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.reference, self.chat = reference, chat
        #: Of the last training: what `evaluate` measures with.
        self._options: Options | None = None
        self._known = WeakKeyDictionary[Responses, tuple[Transformer, Array]]()
        self._mixed = WeakKeyDictionary[Responses, tuple[int, Responses]]()

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
        training = _read(training_data, options)
        encoded = self._encoded(training, options)
        self.model = with_adapters(self.model, options, self.seed)
        reference, self._options = self._reference(options), options
        evaluate = None
        if validation_data is not None:
            evaluate = self._evaluator(_read(validation_data, options), options)
        train_only(self.model.parameters(), trained_body(self.model))
        return fit(
            self.model,
            self._parameters(reference),
            self._objective(training, encoded, reference, options),
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

    def report(
        self,
        training: Preferences | Judgements,
        validation: Preferences | Judgements | None = None,
        options: Options | None = None,
    ) -> PreferenceReport:
        """Return what the data holds, before anything is trained."""
        options = options or Options()
        held_out = None if validation is None else self._encoded(validation, options)
        return PreferenceReport.of(
            training, validation, self._encoded(training, options), held_out, self._limit(options)
        )

    def evaluate(self, data: Data, options: Options | None = None) -> dict[str, Any]:
        """Return how the policy ranks responses, and how the reference does.

        By default with the options that it was trained with.

        Of pairs: ``loss``; ``accuracy``, the share of pairs whose chosen response has the higher
        implicit reward, equal ones count half; ``margin`` and means of the rewards;
        ``reference_accuracy``, the same by the log-probabilities of the reference alone (its
        implicit rewards are all 0, so that by definition it is right half of the time). Of single
        responses: ``loss``, ``kl``, means of the rewards, and as ``accuracy`` the probability that
        a good one has a higher reward than a bad one. ``count`` and ``left_out`` are rows.

        Raises
        ------
        ConfigError
            If these options need a reference, and the policy was trained without one.
        """
        trained, options = self._options is not None, options or self._options or Options()
        unknown = self.reference is None and not self.model.adapters
        if trained and unknown and options.needs_reference:
            raise ConfigError(
                f"training.loss_type: {options.loss_type!r} compares with a reference, but the "
                "policy was trained without; give one as DPOTrainer(reference=...)"
            )
        return self._evaluator(_read(data, options), options)()

    def save(self, directory: str | Path) -> None:
        """Write model (or adapters) and tokenizer; transformers (PEFT) loads them back."""
        self.model.save(directory, self.tokenizer)

    # -- inside --------------------------------------------------------------------------------

    def _limit(self, options: Options) -> int:
        limit = self.model.config.max_seq_len
        if options.max_length is not None and options.max_length > limit:
            raise ConfigError(
                f"training.max_length: {options.max_length} is more than the model's "
                f"max_seq_len {limit}"
            )
        return options.max_length or limit

    def _encoded(self, data: Preferences | Judgements, options: Options) -> Responses:
        return encode_responses(
            self.tokenizer, data, self._limit(options), options.overflow, self.chat
        )

    def _reference(self, options: Options) -> Transformer | None:
        """Return the reference, made when it is first asked for; None where the loss has none."""
        if not options.needs_reference:
            return None
        if self.reference is None:
            base = without_adapters(self.model)  # the same arrays
            if not self.model.adapters:
                arrays = {name: lasting_copy(p.data) for name, p in base.parameters().items()}
                base = Transformer(base.config, dtype=base.dtype, arrays=arrays)
            self.reference = base
        return self.reference

    def _parameters(self, reference: Transformer | None) -> dict[str, Parameter]:
        """Return those of the model, and beside them what the reference has of its own."""
        found = dict(self.model.parameters())
        if reference is None:
            return found
        require_reference(reference, self.model)
        known = {id(parameter.data) for parameter in found.values()}
        for name, parameter in reference.parameters().items():
            if id(parameter.data) not in known:  # with adapters the base is the model's
                parameter.requires_grad = False
                found[f"reference.{name}"] = parameter
        return found

    def _objective(
        self,
        data: Preferences | Judgements,
        encoded: Responses,
        reference: Transformer | None,
        options: Options,
    ) -> PairObjective | SingleObjective:
        said = self._said(reference, encoded, options)
        if not isinstance(data, Judgements):
            return PairObjective(self.model, said, options)
        if len(encoded.rows) < 2:
            raise DataError(f"{data.where[0]}: the loss 'kto' needs two rows at least, found one")
        others = self._others(encoded, options)
        said_of_others = self._said(reference, others, options)
        desirable = data.desirable[encoded.rows]
        return SingleObjective(self.model, said, others, said_of_others, desirable, options)

    def _said(
        self, reference: Transformer | None, encoded: Responses, options: Options
    ) -> Reference:
        """Return what the reference says, computed once for the same responses."""
        if reference is None or not options.precompute_reference:
            return Reference(reference, encoded)
        known = self._known.get(encoded)
        if known is None or known[0] is not reference:
            known = self._known[encoded] = reference, response_sums(reference, encoded)
        return Reference(reference, encoded, known[1])

    def _others(self, encoded: Responses, options: Options) -> Responses:
        """Return each prompt with another row's response, made once for the same rows."""
        limit = self._limit(options)
        made = self._mixed.get(encoded)
        if made is None or made[0] != limit:
            made = self._mixed[encoded] = limit, encoded.mismatched(limit)
        return made[1]

    def _evaluator(
        self, data: Preferences | Judgements, options: Options
    ) -> Callable[[], dict[str, Any]]:
        """Return a function that evaluates the policy as it is when called."""
        encoded, reference = self._encoded(data, options), self._reference(options)
        objective = self._objective(data, encoded, reference, options)
        said = objective.reference.of_all()
        rows = {"count": int(encoded.rows.size), "left_out": int(encoded.too_long.size)}

        def evaluate() -> dict[str, Any]:
            sums = response_sums(self.model, encoded)
            lengths = encoded.response_lengths.astype(np.float64)
            if isinstance(objective, PairObjective):
                owner = np.arange(sums.size)
                found = ResponseLogprobs(Tensor(sums), owner, sums, lengths)
                figures = _of_pairs(objective, found, said, options)
                if reference is not None:
                    figures["reference_accuracy"] = _ranked(said)
            else:
                figures = _of_single(objective, sums, said, options)
            require_finite(figures["loss"], "the loss on the evaluation data")
            return figures | rows

        return evaluate


def _of_pairs(
    objective: PairObjective, found: ResponseLogprobs, said: Array, options: Options
) -> dict[str, float]:
    """Return loss and rewards of pairs, of which the reference says `said`."""
    total = objective.preference(found, said)[0] / (found.sums.size // 2)
    if options.cross_entropy > 0:
        chosen, tokens = float(found.sums[0::2].sum()), float(found.lengths[0::2].sum())
        total -= options.cross_entropy * chosen / tokens
    rewards = objective.rewards(found, said)
    return {
        "loss": total,
        "accuracy": _ranked(rewards),
        "margin": float((rewards[0::2] - rewards[1::2]).mean()),
        "rewards/chosen": float(rewards[0::2].mean()),
        "rewards/rejected": float(rewards[1::2].mean()),
    }


def _of_single(
    objective: SingleObjective, sums: Array, said: Array, options: Options
) -> dict[str, float]:
    """Return loss and rewards of single responses, of which the reference says `said`."""
    kl, desirable = objective.reference_point(np.arange(sums.size)), objective.desirable
    total, count, _ = losses.kto_loss_and_grad(
        sums, said, desirable, kl, options.strength, options.desirable_weight,
        options.undesirable_weight,
    )  # fmt: skip
    rewards = options.strength * (sums - said)
    figures = {"loss": total / count, "kl": kl}
    kinds = {"desirable": rewards[desirable], "undesirable": rewards[~desirable]}
    figures |= {f"rewards/{name}": float(v.mean()) for name, v in kinds.items() if v.size}
    if all(values.size for values in kinds.values()):
        figures["accuracy"] = _above(*kinds.values())
        figures["reference_accuracy"] = _above(said[desirable], said[~desirable])
    return figures


def _ranked(values: Array) -> float:
    """Return the share of pairs whose chosen response has the higher value, equal ones as half."""
    return float(wins(values[0::2] - values[1::2]).mean())


def _above(good: Array, bad: Array) -> float:
    """Return the probability that one of `good` is above one of `bad`, equal ones as half."""
    order = np.sort(bad)
    below = np.searchsorted(order, good, side="left")
    upto = np.searchsorted(order, good, side="right")
    return float((below + upto).mean() / (2 * bad.size))


def _read(data: Data, options: Options) -> Preferences | Judgements:
    single = options.loss_type == "kto"
    if not isinstance(data, (Preferences, Judgements)):
        return read_judgements(data) if single else read_preferences(data)
    if isinstance(data, Judgements) != single:
        expected = "single responses with labels" if single else "pairs of responses"
        raise DataError(f"{data.where[0]}: the loss '{options.loss_type}' needs {expected}")
    return data


def read(
    source: Source,
    text_field: str,
    label_field: str,
    *,
    options: Options,
    like: Preferences | Judgements | None = None,
    num_classes: int | None = None,
) -> Preferences | Judgements:
    """Read preferences for a run: pairs, or single responses for "kto".

    Raises
    ------
    ConfigError
        If `num_classes` is given: a language model has none.
    """
    if num_classes is not None:
        raise ConfigError("model.num_classes: a language model has no classes")
    return _read(source, options)


def make(
    model: Transformer,
    tokenizer: Tokenizer,
    training: Preferences | Judgements,
    *,
    num_classes: int | None = None,
    seed: int = 0,
) -> DPOTrainer:
    """Make the trainer of a run."""
    return DPOTrainer(model, tokenizer, chat=renderer(tokenizer), seed=seed)
