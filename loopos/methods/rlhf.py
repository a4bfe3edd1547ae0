"""Learning from human preferences as a configuration asks for it: all its phases, or some.

    rlhf = RLHF(loopos.load_model("policy"), tokenizer)
    rlhf.fit("preferences.jsonl", "held_out.jsonl", output_dir="outputs/rlhf")

First a reward model is trained on the preferences, in ``reward_model/`` of the output directory;
then the policy by PPO against it, on the prompts of the same preferences, each of them once. A
policy that cannot talk yet may learn the chosen responses before. A run that was stopped in any
phase goes on there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loopos.autograd import Array, Parameter
from loopos.data.chat import ChatTemplate, chat_template
from loopos.data.preferences import Preferences, Render, read_preferences
from loopos.data.readers import Source
from loopos.data.responses import PreferenceReport, Responses, encode_responses
from loopos.data.tokenizer import Tokenizer
from loopos.errors import ConfigError, DataError
from loopos.files import atomic_directory
from loopos.methods.common import RunArguments, train_only, with_overrides
from loopos.methods.language_model import require_language_model
from loopos.methods.policy_runs import StartFile, begun, compared, sample_callbacks
from loopos.methods.policy_state import copy_of
from loopos.methods.ppo import PPOTrainer
from loopos.methods.reinforcement import ModelReward
from loopos.methods.reward_model import RewardTrainer
from loopos.methods.rlhf_judge import load_judge, require_same_judge
from loopos.methods.rlhf_options import Options, Phase
from loopos.methods.supervised_phase import fit_chosen, take_weights
from loopos.models.reward import RewardModel, load_reward_model
from loopos.models.transformer import Transformer
from loopos.models.weights import load_model
from loopos.training.checkpoint import frozen_sha256
from loopos.training.loop import TrainResult
from loopos.training.trackers import Callback, tell_samples

__all__ = ["MAKE_TAKES", "RLHF", "Options", "RLHFReport", "make", "read"]

#: What :func:`make` is told beside the model.
MAKE_TAKES = ("reward_model",)


@dataclass(frozen=True)
class RLHFReport(PreferenceReport):
    """What preferences hold, and the different prompts in them.

    Attributes
    ----------
    prompts : int
        That the policy is trained on.
    held_out_prompts : int
        That are in the validation set and not in the training set.
    """

    prompts: int = 0
    held_out_prompts: int = 0

    def lines(self) -> list[str]:
        """Return the report as lines of plain text."""
        lines = super().lines()
        told = f"{'prompts':<15}{self.prompts:,} training, {self.held_out_prompts:,} held out"
        return [lines[0], told, *lines[1:]]


@contextmanager
def _named(phase: Phase) -> Iterator[None]:
    """Name an option of a phase as the configuration has it."""
    try:
        yield
    except ConfigError as error:
        if not str(error).startswith("training."):
            raise
        inner = str(error).replace("training.", f"training.{phase}.", 1)
        raise ConfigError(inner) from error


class RLHF:
    """Trains a reward model and then a policy, in one run.

    Parameters
    ----------
    model : Transformer
        The policy, trained in place; the reward model starts from a copy of it.
    tokenizer : Tokenizer
    chat : ChatTemplate, optional
        Writes conversations; its stop tokens end responses.
    reward_model : RewardModel, optional
        A trained one, in place of the first phase.
    seed : int

    Raises
    ------
    ConfigError
        If the model is no language model, or has another vocabulary than the reward model.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        chat: ChatTemplate | None = None,
        reward_model: RewardModel | None = None,
        seed: int = 0,
    ):
        require_language_model(model, tokenizer, "RLHF")
        if reward_model is not None:
            found, wanted = reward_model.body.config.vocab_size, model.config.vocab_size
            if found != wanted:
                raise ConfigError(
                    f"data.reward_model: has a vocab_size of {found}, the policy has {wanted}"
                )
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.reward_model = reward_model
        self._judged = reward_model is not None
        self._chat = chat
        self._render: Render | None = None if chat is None else chat.render
        self._ppo: PPOTrainer | None = None
        self._start: dict[str, Any] = {}
        #: The prompts that the policy was trained on.
        self._learnt: set[bytes] = set()

    # -- training --------------------------------------------------------------------------------

    def fit(
        self,
        training_data: Preferences | Source,
        validation_data: Preferences | Source | None = None,
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

        Returns
        -------
        TrainResult
            Of the last phase, or of the one that was interrupted.

        Raises
        ------
        DataError
            If a row cannot be used, none is short enough, or no prompt is held out.
        ConfigError
            If an option has no such name or value, or there is no reward model.
        LooposError, NumericalError
            As :meth:`loopos.methods.ppo.PPOTrainer.fit`.
        """
        options = with_overrides(options or Options(), overrides)
        options = self._without_judging(options)
        if "ppo" in options.phases:  # said before the phases that come first, which take long
            options.require_vocabulary(self.model.config.vocab_size)
        training, validation = _preferences(training_data), None
        if validation_data is not None:
            validation = _preferences(validation_data)
        run = RunArguments(
            output_dir=output_dir, callbacks=callbacks, resume=resume, stop=stop,
            run_config=run_config,
        )  # fmt: skip
        if "supervised" in options.phases:
            result = self._fit_supervised(training, validation, options, run)
            if result is not None:
                return result
        if "reward_model" in options.phases:
            result = self._fit_reward_model(training, validation, options, run)
            if result is not None:
                return result
        return self._fit_policy(training, validation, options, run)

    def _without_judging(self, options: Options) -> Options:
        """Leave out the phase that trains a reward model, where one was given."""
        if not self._judged or "reward_model" not in options.phases:
            return options
        if "ppo" not in options.phases:
            raise ConfigError(
                "training.phases: a reward model was given, so there is none to train; "
                "expected 'ppo'"
            )
        phases = tuple(phase for phase in options.phases if phase != "reward_model")
        return replace(options, phases=phases)

    def stage_fits(
        self,
        training: Preferences,
        validation: Preferences | None,
        options: Options,
        callbacks: Sequence[Callback],
    ) -> dict[str, Callable[..., TrainResult]]:
        """Return for each phase what begins it alone, with options of it that are given by name.

        Without a reward model the policy is scored by an untrained one: to see how a run goes on.
        """

        def begins(phase: Phase) -> Callable[..., TrainResult]:
            def begin(**overrides: Any) -> TrainResult:
                if phase == "ppo" and self.reward_model is None:
                    self.reward_model = RewardModel(copy_of(self.model), self.seed)
                # What the first phase leads to is not done: a run is left before its first step.
                after = "ppo" if self._judged else "reward_model"
                phases = ("supervised", after) if phase == "supervised" else (phase,)
                changed = options.with_stage(phase, **overrides)
                return self.fit(training, validation, changed, phases=phases, callbacks=callbacks)

            return begin

        return {phase: begins(phase) for phase in self._without_judging(options).phases}

    def _fit_supervised(
        self,
        training: Preferences,
        validation: Preferences | None,
        options: Options,
        run: RunArguments,
    ) -> TrainResult | None:
        """Let the policy learn the chosen responses; return a result if the run ends with it."""
        root = None if run["output_dir"] is None else Path(run["output_dir"]) / "supervised"
        saved = None if root is None else root / "model"
        if run["resume"] and saved is not None and saved.is_dir():
            take_weights(self.model, saved)
            self._rebase(saved, options)
            return None
        pairs = [None if data is None else self._encoded(data, options)
                 for data in (training, validation)]  # fmt: skip
        assert pairs[0] is not None
        with _named("supervised"):
            result = fit_chosen(
                self.model, pairs[0], pairs[1], options.of_supervised, seed=self.seed,
                run={**run, "output_dir": root, "resume": begun(root, run)},
            )  # fmt: skip
        if result.stopped_reason == "interrupted":
            return result
        if saved is not None:
            with atomic_directory(saved) as temporary:
                self.model.save(temporary, self.tokenizer)
        self._rebase(saved, options)
        return None

    def _rebase(self, saved: Path | None, options: Options) -> None:
        """Let adapters, which are saved without their base, name the one that they change."""
        if options.lora is not None:
            self.model.origin = None if saved is None else load_model(saved).origin

    def _fit_reward_model(
        self,
        training: Preferences,
        validation: Preferences | None,
        options: Options,
        run: RunArguments,
    ) -> TrainResult | None:
        """Train the reward model; return a result if the run ends with it."""
        root = None if run["output_dir"] is None else Path(run["output_dir"]) / "reward_model"
        saved, alone = None if root is None else root / "model", "ppo" not in options.phases
        if run["resume"] and saved is not None and saved.is_dir() and not alone:
            self.reward_model = load_reward_model(saved)
            return None
        trainer = self._reward_trainer(RewardModel(copy_of(self.model), self.seed))
        arguments: RunArguments = {**run, "output_dir": root, "resume": begun(root, run)}
        with _named("reward_model"):
            inner = options.of_reward_model
            result = trainer.fit(training, validation, inner, **arguments)
        self.reward_model = trainer.reward_model
        if result.stopped_reason == "interrupted":
            return result
        if saved is not None:
            with atomic_directory(saved) as temporary:
                trainer.save(temporary)
            if not alone:  # what scores is what was saved, whether the run goes on or is resumed
                del trainer
                self.reward_model = None  # or there would be two for a moment
                self.reward_model = load_reward_model(saved)
        return result if alone else None

    def _reward_trainer(self, model: RewardModel) -> RewardTrainer:
        return RewardTrainer(model, self.tokenizer, chat=self._render, seed=self.seed)

    def _fit_policy(
        self,
        training: Preferences,
        validation: Preferences | None,
        options: Options,
        run: RunArguments,
    ) -> TrainResult:
        if self.reward_model is None:
            raise ConfigError("data.reward_model: is needed where training.phases trains none")
        prompts, held_out = self._prompts(training, validation, options)
        self._require_room([*prompts, *held_out], options)
        root = None if run["output_dir"] is None else Path(run["output_dir"])
        again, config = begun(root, run), run["run_config"]
        if config is not None:
            config = config | {"reward_model_sha256": self._judge_sha256()}
            if again and root is not None:
                require_same_judge(root, config)
        separate = self.reward_model if options.critic == "separate" else None
        trainer = self._ppo = PPOTrainer(
            self.model, self.tokenizer, ModelReward(self.reward_model), self._stopping(options),
            critic=separate, seed=self.seed,
        )  # fmt: skip
        self.model = trainer.policy
        self._learnt = {ids.tobytes() for ids in prompts}
        start = StartFile(root, (lambda: trainer.evaluate(held_out)) if held_out else dict)
        callbacks = sample_callbacks(root, run["callbacks"], start)
        result = trainer.fit(
            prompts, held_out or None, on_samples=tell_samples(callbacks),
            **RunArguments(
                **{**run, "callbacks": callbacks, "resume": again, "run_config": config}
            ),
        )  # fmt: skip
        self._start = start.figures
        return result

    def _judge_sha256(self) -> str | None:
        """Return a digest of the reward model, which is frozen from now on."""
        assert self.reward_model is not None
        parameters = self.reward_model.parameters()
        train_only(parameters, set())
        bias = Parameter(self.reward_model.bias, "bias")
        bias.requires_grad = False
        return frozen_sha256(parameters | {"bias": bias})

    def _stopping(self, options: Options) -> Options:
        """Return the options with the tokens that end a turn of the chat template."""
        ends = () if self._chat is None else tuple(self._chat.stop_ids)
        return replace(options, stop_ids=tuple(dict.fromkeys([*options.stop_ids, *ends])))

    # -- data ------------------------------------------------------------------------------------

    def report(
        self,
        training: Preferences,
        validation: Preferences | None = None,
        options: Options | None = None,
    ) -> RLHFReport:
        """Return what the data holds, before anything is trained."""
        options = options or Options()
        trainer = self._reward_trainer(self.reward_model or RewardModel(self.model, self.seed))
        with _named("reward_model"):
            report = trainer.report(training, validation, options.of_reward_model)
        prompts, held_out = self._prompts(training, validation, options)
        if "ppo" in options.phases:
            self._require_room([*prompts, *held_out], options)
        return RLHFReport(**vars(report), prompts=len(prompts), held_out_prompts=len(held_out))

    def _prompts(
        self, training: Preferences, validation: Preferences | None, options: Options
    ) -> tuple[list[Array], list[Array]]:
        """Return the different prompts to train on, and some of those that are held out."""
        learnt = self._different(training, options)
        if validation is None:
            return list(learnt.values()), []
        others = self._different(validation, options)
        held_out = [ids for key, ids in others.items() if key not in learnt]
        if not held_out and "ppo" in options.phases:
            raise DataError(
                f"{validation.where[0]}: every prompt of the validation data is a training prompt, "
                "so none is held out"
            )
        return list(learnt.values()), held_out[: options.eval_prompts]

    def _different(self, data: Preferences, options: Options) -> dict[bytes, Array]:
        found = self._encoded(data, options)
        prompts: dict[bytes, Array] = {}
        for place in range(0, len(found.tokens), 2):
            ids = np.asarray(found.tokens[place][: found.prompts[place]])
            prompts.setdefault(ids.tobytes(), ids)
        return prompts

    def _encoded(self, data: Preferences, options: Options) -> Responses:
        """Return pairs as tokens that both the policy and the reward model have room for."""
        inner = options.of_reward_model
        bodies = [self.model] if self.reward_model is None else [self.model, self.reward_model.body]
        limit = min(body.config.max_seq_len for body in bodies)
        return encode_responses(
            self.tokenizer, data, inner.max_length or limit, inner.overflow, self._render
        )

    def _require_room(self, prompts: Sequence[Array], options: Options) -> None:
        """Refuse a reward model that could not read what the policy will write."""
        if self.reward_model is None:
            return
        limit, longest = self.reward_model.body.config.max_seq_len, max(map(len, prompts))
        needed = min(longest + options.max_new_tokens, self.model.config.max_seq_len)
        if needed > limit:
            raise ConfigError(
                f"data.reward_model: reads {limit} tokens, but prompt and response may have "
                f"{needed}; lower training.max_new_tokens"
            )

    # -- use -------------------------------------------------------------------------------------

    def evaluate(
        self, data: Preferences | Source, options: Options | None = None
    ) -> dict[str, Any]:
        """Return how the policy scores on prompts that are held out, and how good the scores are.

        Of a run without PPO, the figures of :meth:`RewardTrainer.evaluate`.

        Returns
        -------
        dict
            ``score``, ``length``, ``ended`` (share of responses) of the policy, with ``_before``
            those of its start; ``score_gain`` in standard deviations of the start's scores
            (``score_std_before``); ``kl`` to the reference in nats a response, where there is
            one; ``reward_accuracy``, ``reward_margin`` and ``reward_length_correlation`` of the
            reward model on the pairs; ``reward_model``, all its figures; ``prompts``.
        """
        options, given = options or Options(), _preferences(data)
        if self.reward_model is None:
            raise ConfigError("there is no reward model to evaluate with")
        with _named("reward_model"):
            trainer = self._reward_trainer(self.reward_model)
            judged = trainer.evaluate(given, options.of_reward_model)
        if "ppo" not in options.phases:
            return judged
        policy = self._ppo or self._scorer(options)
        different = self._different(given, options)
        prompts = [ids for key, ids in different.items() if key not in self._learnt]
        chosen = prompts[: options.eval_prompts]
        if not chosen:
            raise DataError(f"{given.where[0]}: every prompt is a training prompt")
        figures = compared(policy.evaluate(chosen), self._start)
        for name in ("accuracy", "margin", "length_correlation"):
            if name in judged:
                figures[f"reward_{name}"] = judged[name]
        return figures | {"prompts": len(chosen), "reward_model": judged}

    def _scorer(self, options: Options) -> PPOTrainer:
        """Return what samples and scores without a reference, of a policy that is only used."""
        assert self.reward_model is not None
        plain = replace(
            self._stopping(options), kl_coefficient=0.0, kl_budget=None, exact_kl=False,
            adaptive_kl_target=None, critic="shared", critic_learning_rate=None,
            score_after_end=False, lora=self.model.lora,
        )  # fmt: skip
        reward = ModelReward(self.reward_model)
        return PPOTrainer(self.model, self.tokenizer, reward, plain, seed=self.seed)

    def save(self, directory: str | Path) -> None:
        """Write policy and tokenizer; of a run without PPO, the reward model."""
        if self._ppo is None and self.reward_model is not None:
            self._reward_trainer(self.reward_model).save(directory)
        else:
            self.model.save(directory, self.tokenizer)


def _preferences(data: Preferences | Source) -> Preferences:
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
        If `num_classes` is given: a language model has none.
    """
    if num_classes is not None:
        raise ConfigError("model.num_classes: a language model has no classes")
    return read_preferences(source)


def make(
    model: Transformer,
    tokenizer: Tokenizer,
    training: Preferences,
    *,
    num_classes: int | None = None,
    seed: int = 0,
    reward_model: str | None = None,
) -> RLHF:
    """Make the trainer of a run; `reward_model` is the directory of a trained one.

    Raises
    ------
    ConfigError
        If it is the directory of a run, or its tokenizer writes other tokens.
    MissingFileError, ModelFormatError
        As :func:`loopos.models.reward.load_reward_model`.
    """
    chat = chat_template(tokenizer)
    judge = None if reward_model is None else load_judge(Path(reward_model), tokenizer, training)
    return RLHF(model, tokenizer, chat=chat, reward_model=judge, seed=seed)
