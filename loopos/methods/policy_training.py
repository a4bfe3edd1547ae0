"""What methods that learn from samples of a policy share: a step, its invariants, its record.

A step samples a response to each prompt, scores them, computes once what stays frozen (log-
probabilities of policy and reference, values, advantages) and makes several updates. Each invariant
that fails stops the run with a sentence that names the step, the sample and what was wrong. Dropout
is off throughout.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from loopos.autograd import Array, Parameter, Tensor
from loopos.backends.random_bits import derive_key
from loopos.data.tokenizer import Tokenizer
from loopos.errors import ConfigError, DataError
from loopos.files import locked_directory
from loopos.methods.common import restore_best, train_only, trained_body, with_adapters
from loopos.methods.language_model import require_language_model, require_reference
from loopos.methods.losses import kl_estimate
from loopos.methods.policy_checks import (
    ENTROPY_TOLERANCE,
    RATIO_TOLERANCE,
    SAMPLING_TOLERANCE,
    named_step,
    require_ends,
    require_finite,
    require_small,
)
from loopos.methods.policy_options import PolicyOptions
from loopos.methods.policy_state import LearnerState, Scored, copy_of
from loopos.methods.policy_update import PolicyUpdates
from loopos.methods.rewards import Normaliser, Reward
from loopos.methods.rollouts import (
    Forward,
    Prompts,
    Rollout,
    collect,
    sample_rollout,
    segment_sums,
)
from loopos.models.lora import without_adapters
from loopos.models.transformer import Transformer
from loopos.training.loop import TrainResult
from loopos.training.online import EndOfRun, train_online
from loopos.training.options import make_optimizer
from loopos.training.trackers import Callback

__all__ = ["PolicyTrainer", "Samples"]

#: Uses of the seed, so that no two of them share random numbers.
_SAMPLING, _EVALUATION, _CALIBRATION = 1, 2, 3

Samples = Callable[[int, list[dict[str, Any]]], None]


class PolicyTrainer(PolicyUpdates):
    """Base of the methods; see :class:`loopos.methods.ppo.PPOTrainer`."""

    method = "this method"
    #: Responses to each prompt.
    group_size = 1

    def __init__(
        self,
        policy: Transformer,
        tokenizer: Tokenizer | None,
        reward: Any,
        options: PolicyOptions,
        *,
        reference: Transformer | None = None,
        seed: int = 0,
    ):
        if tokenizer is not None:
            require_language_model(policy, tokenizer, self.method)
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
            raise ConfigError(f"seed: expected a whole number that is not negative, found {seed!r}")
        self.options, self.tokenizer, self.seed = options, tokenizer, int(seed)
        self.policy = with_adapters(policy, options, self.seed)
        self.policy.gradient_checkpointing = options.gradient_checkpointing
        _ = self.policy.head_weight  # says what is missing
        self.reward = Reward(reward)
        options.require_vocabulary(self.policy.config.vocab_size)
        if options.missing_eos_penalty is not None and not self._stops:
            raise ConfigError(
                "training.missing_eos_penalty: there is no stop token that could end a response"
            )
        train_only(self.policy.parameters(), trained_body(self.policy))
        if reference is policy:
            reference = None
        self.reference = self._reference(reference)
        self._base_is_reference = reference is None and bool(self.policy.adapters)
        ups = [up for adapter in self.policy.adapters.values() for up in adapter.b.values()]
        #: Until the first update: whether the reference computes what the policy does.
        self._starts_as_reference = reference is None and not any(np.any(up.data) for up in ups)
        #: The table of the last step: prompt, response, score, tokens, whether it ended.
        self.samples: list[dict[str, Any]] = []
        self._on_samples: Samples | None = None
        self._prompts: Prompts | None = None
        self._state = self._first_state()

    def _reference(self, given: Transformer | None) -> Transformer | None:
        if given is not None:
            require_reference(given, self.policy)
            return given
        if not self.options.needs_reference:
            return None
        return without_adapters(self.policy) if self.policy.adapters else copy_of(self.policy)

    @property
    def _stops(self) -> set[int]:
        ends = () if self.tokenizer is None else self.tokenizer.end_ids
        return {*self.options.stop_ids, *ends}

    def _first_state(self) -> LearnerState:
        normaliser = Normaliser(self.options.reward_normalisation)
        return LearnerState(0, self.options.kl_coefficient, normaliser)

    def _reset(self) -> None:
        """Forget moments and controllers."""
        self._state = self._first_state()
        responses = self.options.batch_size * self.group_size
        if self.options.minibatches > responses:
            raise ConfigError(
                f"training.minibatches: expected at most {responses}, the responses of a batch, "
                f"found {self.options.minibatches}"
            )
        trained = {n: p for n, p in self.parameters().items() if p.requires_grad}
        self.optimizer = make_optimizer(trained, self.options)
        self.optimizer.rate_factors = self._rate_factors()

    def _rate_factors(self) -> dict[str, float]:
        return {}

    def parameters(self) -> dict[str, Parameter]:
        """Return what is trained, as "policy.<name>", and beside it what is frozen."""
        found = {f"policy.{name}": p for name, p in self.policy.parameters().items()}
        found |= self._more_parameters()
        if self.reference is not None and not self._base_is_reference:
            for name, p in self.reference.parameters().items():
                p.requires_grad = False
                found[f"reference.{name}"] = p
        return found

    def _more_parameters(self) -> dict[str, Parameter]:
        return {}

    @property
    def steps(self) -> int:
        """Steps done."""
        return self._state.steps

    @property
    def kl_coefficient(self) -> float:
        """In force, after what a controller has done."""
        return self._state.kl_coefficient

    # -- what a method is ------------------------------------------------------------------------

    @abstractmethod
    def _advantages(
        self, rollout: Rollout, data: dict[str, Array], kl: Array | None, scored: Scored
    ) -> tuple[Rollout, dict[str, Array], dict[str, float]]:
        """Return what is learnt from: rollout, arrays ``[M]`` with "advantages", figures."""

    def _values(self) -> Callable[[Rollout, Tensor], Tensor] | None:
        """Return the critic, of a method that has one."""
        return None

    def _after(self, state: LearnerState, kl: float, responses: int) -> LearnerState:
        """Return the state after a step, in which a controller may have moved."""
        return state

    # -- a step ----------------------------------------------------------------------------------

    def step(self, prompts: Sequence[Any], answers: Sequence[Any] | None = None) -> dict[str, Any]:
        """Sample, score and update once; return the step's record.

        Parameters
        ----------
        prompts : sequence of str or of int sequences
        answers : sequence, optional
            For a verifiable reward, one a prompt.

        Raises
        ------
        DataError
            If a prompt cannot be used.
        ConfigError, LooposError
            If the reward returns what it should not, or raises.
        NumericalError
            If an invariant does not hold.
        EndOfRun
            If the KL is above its budget. The weights are then those before the last update.
        """
        given = self._take(prompts, answers)
        started = time.perf_counter()
        record = self._step(given, np.arange(len(given)), self.options.learning_rate, _nothing)
        spent = time.perf_counter() - started
        record |= {"tokens_per_s": record["tokens"] / spent, "time_s": spent}
        return {"step": self._state.steps, **record}

    def learn(
        self, samples: Array, rate: float, on_update: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        """Do a step of a run; see :class:`loopos.training.online.Learner`."""
        assert self._prompts is not None
        return self._step(self._prompts.take(samples), samples, rate, on_update or _nothing)

    def learn_from(self, rollout: Rollout, rate: float | None = None) -> dict[str, Any]:
        """Do a step with responses that are there already; returns and raises as :meth:`step`.

        Parameters
        ----------
        rollout : Rollout
            From this policy, such as recorded ones; see :meth:`sample`.
        rate : float, optional
            Learning rate, that of the options by default.
        """
        rate = self.options.learning_rate if rate is None else rate
        with named_step(self.steps + 1):
            return self._learn_from(rollout, rate, _nothing)

    def sample(
        self, prompts: Sequence[Any], answers: Sequence[Any] | None = None, seed: int | None = None
    ) -> Rollout:
        """Let the policy answer prompts, as it would in its next step (or with another seed)."""
        given = self._take(prompts, answers)
        return self._sampled(given, np.arange(len(given)), seed)

    def _take(self, prompts: Sequence[Any], answers: Sequence[Any] | None) -> Prompts:
        return Prompts.of(prompts, self.tokenizer, self.policy.config, answers)

    def _sampled(self, prompts: Prompts, samples: Array, seed: int | None = None) -> Rollout:
        if seed is None:
            seed = derive_key(self.seed, _SAMPLING, self._state.steps)
        options = self.options
        return sample_rollout(
            self.policy, self.tokenizer, prompts, options.sampling(seed, self.group_size),
            samples=samples, weights=options.rollout_weights,
            batch_size=options.rollout_batch_size,
        )  # fmt: skip

    def _step(
        self, prompts: Prompts, samples: Array, rate: float, on_update: Callable[[], None]
    ) -> dict[str, Any]:
        with named_step(self.steps + 1):
            started = time.perf_counter()
            if self._state.normaliser.calibrates:
                self._calibrate(self._prompts or prompts)
            rollout = self._sampled(prompts, samples)
            spent = time.perf_counter() - started
            return self._learn_from(rollout, rate, on_update, spent)

    def _learn_from(
        self, rollout: Rollout, rate: float, on_update: Callable[[], None], rollout_s: float = 0.0
    ) -> dict[str, Any]:
        options = self.options
        rollout.require_tokens()
        require_ends(rollout, self._stops)
        whole = options.minibatches * options.gradient_accumulation_steps == 1
        recorded: list[Forward] = []
        data = collect(
            self.policy, rollout, options.temperature, self.reference,
            options.exact_kl or options.kl_estimator == "exact", self._values(),
            recorded if whole else None,
        )  # fmt: skip
        self._check(rollout, data)
        kl = self._kl(data)
        record = self._kl_figures(rollout, data, kl)
        self._hold_to_budget(record, on_update)
        started = time.perf_counter()
        scored = self._score(rollout)
        record["time/reward_s"] = time.perf_counter() - started
        learnt, arrays, figures = self._advantages(rollout, data, kl, scored)
        require_finite(learnt, arrays)
        self._starts_as_reference = False
        started = time.perf_counter()
        if learnt is not rollout:
            recorded.clear()
        updates = self._update(learnt, arrays, rate, on_update, recorded)
        on_update()  # also where nothing was updated: the state changes now
        state = self._state
        record |= {
            "reward/score": float(scored.raw.mean()),
            **scored.parts,
            **figures,
            "entropy": float(data["entropy"].mean(dtype=np.float64)),
            **updates,
            "response/length": float(rollout.lengths.mean()),
            "response/eos_fraction": float(rollout.ended.mean()),
            "time/rollout_s": rollout_s,
            "time/update_s": time.perf_counter() - started,
            "tokens": int(rollout.tokens.size),
        }
        done = replace(state, steps=state.steps + 1, normaliser=scored.normaliser)
        self._state = self._after(done, record.get("kl/mean", 0.0), len(rollout))
        self._show(rollout, scored)
        return record

    def _show(self, rollout: Rollout, scored: Scored) -> None:
        """Keep the table of samples, and hand it on where one is due."""
        self.samples = [
            {"prompt": prompt, "response": text, "score": float(score), "tokens": int(n),
             "ended": bool(ended)}
            for prompt, text, score, n, ended in zip(
                rollout.prompts, rollout.texts, scored.raw, rollout.lengths, rollout.ended,
                strict=True)
        ]  # fmt: skip
        every, step = self.options.sample_steps, self._state.steps
        if self._on_samples is not None and every is not None and step % every == 0:
            self._on_samples(step, self.samples)

    # -- scores ----------------------------------------------------------------------------------

    def _calibrate(self, prompts: Prompts) -> None:
        """Let the start's own responses set the scale of the scores."""
        chosen = np.arange(min(len(prompts), self.options.normalisation_samples))
        seed = derive_key(self.seed, _CALIBRATION)
        scores, _ = self.reward(self._sampled(prompts.take(chosen), chosen, seed))
        self._state = replace(self._state, normaliser=self._state.normaliser.seen(scores))

    def _score(self, rollout: Rollout) -> Scored:
        options = self.options
        raw, parts = self.reward(rollout)
        normaliser = self._state.normaliser
        if normaliser.kind == "running" or normaliser.calibrates:
            normaliser = normaliser.seen(raw)
        final = normaliser.apply(raw)
        if options.missing_eos_penalty is not None:
            penalty = options.missing_eos_penalty
            worse = penalty if options.missing_eos_mode == "replace" else final - penalty
            final = np.where(rollout.ended, final, worse)
        return Scored(raw, final, parts, normaliser)

    def _kl(self, data: dict[str, Array]) -> Array | None:
        if "ref_logprobs" not in data:
            return None
        estimator = self.options.kl_estimator
        if estimator == "exact":
            return data["exact_kl"]
        return kl_estimate(data["logprobs"], data["ref_logprobs"], estimator)

    def _kl_figures(
        self, rollout: Rollout, data: dict[str, Array], kl: Array | None
    ) -> dict[str, float]:
        """Return KL in nats a response."""
        if kl is None:
            return {}
        figures = {"kl/mean": float(segment_sums(kl, rollout.response_offsets).mean())}
        if "exact_kl" in data:
            exact = segment_sums(data["exact_kl"], rollout.response_offsets)
            figures["kl/exact"] = float(exact.mean())
        return figures

    def within_budget(self, figures: Mapping[str, Any]) -> bool:
        """Whether the KL that was measured is within `kl_budget`."""
        budget = self.options.kl_budget
        return budget is None or figures["kl/mean"] <= budget

    def _hold_to_budget(self, figures: Mapping[str, float], on_update: Callable[[], None]) -> None:
        """End the run above the budget, with the last weights that were within it."""
        budget = self.options.kl_budget
        if budget is None:
            return
        if self.within_budget(figures):
            for name, parameter in self.optimizer.parameters.items():
                held = self.optimizer.held.setdefault(name, np.empty_like(parameter.data))
                np.copyto(held, parameter.data)
            return
        on_update()
        self._take_held()
        raise EndOfRun(
            f"the KL to the reference is {figures['kl/mean']:.4g} nats a response, "
            f"above kl_budget {budget:g}", "kl_budget",
        )  # fmt: skip

    def _take_held(self) -> None:
        """Put the weights whose KL was last within its budget in place."""
        for name, held in self.optimizer.held.items():
            np.copyto(self.optimizer.parameters[name].data, held)

    # -- invariants ------------------------------------------------------------------------------

    def _check(self, rollout: Rollout, data: dict[str, Array]) -> None:
        """Check what was computed again: finite, as it was sampled, within its bounds."""
        require_finite(rollout, {name: x for name, x in data.items() if name != "values"})
        if self.options.rollout_weights == "float32":
            off = np.abs(data["logprobs"] - rollout.logprobs)
            off[np.isnan(rollout.logprobs)] = 0
            require_small(
                rollout, off, SAMPLING_TOLERANCE,
                "was sampled with a log-probability that differs by {:.3g} from the policy's: "
                "another temperature, or other weights",
            )  # fmt: skip
        most = math.log(self.policy.config.vocab_size)
        entropy = data["entropy"]
        outside = np.maximum(-entropy, entropy - most)
        require_small(
            rollout, outside, ENTROPY_TOLERANCE, "has an entropy {:.3g} outside [0, ln V]"
        )
        if self._starts_as_reference and self._state.steps == 0 and "ref_logprobs" in data:
            require_small(
                rollout, np.abs(data["logprobs"] - data["ref_logprobs"]), RATIO_TOLERANCE,
                "has a log-probability that differs by {:.3g} from the reference's, which is the "
                "policy before its first update",
            )  # fmt: skip

    # -- a run -----------------------------------------------------------------------------------

    def fit(
        self,
        prompts: Sequence[Any],
        validation_prompts: Sequence[Any] | None = None,
        *,
        answers: Sequence[Any] | None = None,
        validation_answers: Sequence[Any] | None = None,
        output_dir: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        on_samples: Samples | None = None,
        resume: bool = False,
        stop: Callable[[], bool] | None = None,
        run_config: dict[str, Any] | None = None,
    ) -> TrainResult:
        """Run over prompts; with an output directory it ends with the best evaluation's weights.

        Parameters
        ----------
        prompts : sequence of str or of int sequences
        validation_prompts : sequence, optional
            Held out: their mean score says what is best, among what is within `kl_budget`. Without
            them, and with such a budget, the first prompts say it, as many as a step takes.
        answers, validation_answers : sequence, optional
            For a verifiable reward, one a prompt.
        output_dir, callbacks, resume, stop, run_config
            As :meth:`loopos.FineTuner.fit` takes them.
        on_samples : callable, optional
            ``(step, rows)``, every `sample_steps`: prompt, response, score, tokens and whether the
            response ended, of each sample.

        Raises
        ------
        ConfigError, DataError, LooposError, NumericalError
            As :meth:`step`; the state before that step is saved.
        CheckpointError, InputError, Interrupted
            As :func:`loopos.training.loop.train`.
        """
        given = self._take(prompts, answers)
        evaluate: Callable[[], dict[str, Any]] | None = None
        if validation_prompts is not None:
            if (answers is None) != (validation_answers is None):
                raise ConfigError("answers and validation_answers: expected both or none of them")
            held_out = self._held_out(validation_prompts, validation_answers)
            evaluate = lambda: self._judge(held_out)  # noqa: E731
        elif self.options.kl_budget is not None:
            count = self.options.batch_size * self.options.gradient_accumulation_steps
            asked = given.take(np.arange(min(count, len(given))))
            evaluate = lambda: self._judge(asked)  # noqa: E731
        self._reset()
        self._prompts, self._on_samples = given, on_samples
        try:
            # Locked to the end: the best checkpoint is read after the last step.
            with nullcontext() if output_dir is None else locked_directory(output_dir):
                result = train_online(
                    self.parameters(), self, given.lengths, self.options, seed=self.seed,
                    output_dir=output_dir, evaluate=evaluate, callbacks=callbacks, resume=resume,
                    stop=stop, run_config=run_config,
                )  # fmt: skip
                restore_best(result, self.parameters())
                self._end_within_budget(result)
        finally:
            self._prompts = self._on_samples = None
        return result

    def _end_within_budget(self, result: TrainResult) -> None:
        """Hold the last update to the budget too: no samples of a further step have measured it."""
        done = result.stopped_reason != "interrupted"
        if done and result.best_checkpoint is None and self._state.over_budget:
            self._take_held()

    def _judge(self, prompts: Prompts) -> dict[str, float]:
        """Evaluate, and remember whether that was within the budget."""
        figures = self._evaluate(prompts)
        self._state = replace(self._state, over_budget=not self.within_budget(figures))
        return figures

    def evaluate(
        self, prompts: Sequence[Any], answers: Sequence[Any] | None = None
    ) -> dict[str, float]:
        """Sample a response to each prompt; return scores (mean, deviation), KL, length, ends."""
        return self._evaluate(self._held_out(prompts, answers))

    def _held_out(self, prompts: Sequence[Any], answers: Sequence[Any] | None) -> Prompts:
        given = self._take(prompts, answers)
        if not len(given):
            raise DataError("there is no prompt to evaluate on")
        return given

    def _evaluate(self, prompts: Prompts) -> dict[str, float]:
        numbers = np.arange(len(prompts))
        options = self.options
        rollout = sample_rollout(
            self.policy, self.tokenizer, prompts,
            options.sampling(derive_key(self.seed, _EVALUATION)), samples=numbers,
            weights=options.rollout_weights, batch_size=options.rollout_batch_size,
        )  # fmt: skip
        scores, parts = self.reward(rollout)
        figures = {"reward/score": float(scores.mean()), **parts}
        figures["reward/score_std"] = float(scores.std())
        if self.reference is not None:
            exact = options.kl_estimator == "exact"
            data = collect(self.policy, rollout, options.temperature, self.reference, exact)
            kl = self._kl(data)
            assert kl is not None
            figures["kl/mean"] = float(segment_sums(kl, rollout.response_offsets).mean())
        figures["response/length"] = float(rollout.lengths.mean())
        figures["response/eos_fraction"] = float(rollout.ended.mean())
        return figures

    def state(self) -> dict[str, Any]:
        """Return what changes beside weights and optimizer, as JSON values."""
        return asdict(self._state)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        # What an older checkpoint does not hold is as it was at the start.
        values = vars(self._first_state()) | dict(state)
        self._state = LearnerState(**values | {"normaliser": Normaliser(**values["normaliser"])})

    def save(self, directory: str | Path) -> None:
        """Write policy and tokenizer; transformers loads them back."""
        self.policy.save(directory, self.tokenizer)


def _nothing() -> None:
    """Told of the first update of a step that nobody watches."""
