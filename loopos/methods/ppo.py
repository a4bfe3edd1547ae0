"""Proximal policy optimisation of a language model (Ziegler et al. 2019; Stiennon et al. 2020).

The reward of a token is ``-kl_coefficient KL_t``, with the score of the whole response added at the
last one; advantages are those of generalised advantage estimation over the response; a critic gives
the value of each state. What each option stands for in papers and peers is said there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from loopos import ops
from loopos.autograd import Array, Parameter, Tensor
from loopos.data.tokenizer import Tokenizer
from loopos.errors import ConfigError, nearest
from loopos.methods.common import train_only, trained_body, with_overrides
from loopos.methods.language_model import require_same_vocabulary
from loopos.methods.losses import (
    adapted_kl_coefficient,
    gae,
    token_rewards,
    value_loss_and_grad,
    whiten,
)
from loopos.methods.policy_checks import require_finite, require_scores_at_end
from loopos.methods.policy_options import (
    PolicyOptions,
    require,
    require_choice,
    require_numbers,
)
from loopos.methods.policy_state import LearnerState, Scored, copy_of
from loopos.methods.policy_training import PolicyTrainer
from loopos.methods.policy_update import Terms
from loopos.methods.rollouts import Forward, Rollout, response_states, segment_sums
from loopos.models.lora import add_lora, merge_lora, unmerge_lora, without_adapters
from loopos.models.transformer import Transformer

__all__ = ["PRESETS", "Critic", "Options", "PPOTrainer", "preset"]


@dataclass(frozen=True)
class Options(PolicyOptions):
    """Options of a PPO run, beside those of :class:`PolicyOptions`.

    Attributes
    ----------
    adaptive_kl_target : float or None
        KL of a response, in nats, that the coefficient is steered towards; None leaves it.
    adaptive_kl_horizon : float
        Responses over which it moves by a factor of about 1.22 (e to the 0.2) at the most.
    gamma, lam : float
        Of generalised advantage estimation.
    whiten_advantages : bool
        Give the advantages of a step mean 0 and deviation 1.
    whiten_rewards : bool
        Give the rewards of its tokens deviation 1, their mean left as it is.
    whiten_unbiased : bool
        Whether those variances are divided by the number of tokens less one.
    critic : {"separate", "shared"}
        A network of its own, or a value head on the policy's.
    value_coefficient : float
        Factor of the value loss.
    value_clip : float or None
        How far from its old value a value may go before its loss no longer falls.
    critic_learning_rate : float or None
        The highest rate of the critic, where it differs.
    score_after_end : bool
        Take the state after a response that ended before `max_new_tokens` for one more: it has a
        value, and the score is its reward. So do the padded peers (TL;DR, TRL); a separate critic
        only.
    """

    adaptive_kl_target: float | None = None
    adaptive_kl_horizon: float = 10_000.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    whiten_unbiased: bool = True
    critic: Literal["separate", "shared"] = "separate"
    value_coefficient: float = 0.1
    value_clip: float | None = 0.2
    critic_learning_rate: float | None = None
    score_after_end: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        share = (False, lambda x: 0 <= x <= 1, "a number in [0, 1]")
        above_0 = (False, lambda x: x > 0, "a number above 0")
        require_numbers(self, {
            "adaptive_kl_target": above_0, "adaptive_kl_horizon": above_0, "gamma": share,
            "lam": share, "value_clip": above_0, "critic_learning_rate": above_0,
            "value_coefficient": (False, lambda x: x >= 0, "a number that is not negative"),
        })  # fmt: skip
        require_choice(self, "critic", ("separate", "shared"))
        for name in ("whiten_advantages", "whiten_rewards", "whiten_unbiased", "score_after_end"):
            require(self, name, isinstance(getattr(self, name), bool), "true or false")
        if self.critic_learning_rate is not None and self.critic == "shared":
            raise ConfigError("training.critic_learning_rate: a shared critic has the policy's")
        if self.adaptive_kl_target is not None and not self.kl_coefficient:
            raise ConfigError("training.adaptive_kl_target: steers a kl_coefficient above 0 only")
        if self.score_after_end and self.critic == "shared":
            raise ConfigError("training.score_after_end: needs a separate critic")

    @property
    def needs_reference(self) -> bool:
        """Whether anything compares with a reference."""
        return super().needs_reference or self.adaptive_kl_target is not None


#: The arithmetic of published recipes; sizes of batches are theirs too.
PRESETS: dict[str, dict[str, Any]] = {
    # Ziegler et al. 2019, as their code for the sentiment task has it.
    "openai-2019": {
        "learning_rate": 1e-5, "batch_size": 512, "optimizer": "adam", "eps": 1e-8,
        "tf1_epsilon": True, "scheduler": "linear", "kl_coefficient": 0.15,
        "adaptive_kl_target": 6.0, "adaptive_kl_horizon": 10_000.0, "whiten_rewards": True,
        "whiten_unbiased": False, "critic": "shared", "temperature": 0.7, "max_new_tokens": 24,
        "missing_eos_penalty": -1.0, "missing_eos_mode": "replace",
        "reward_normalisation": "mean_std", "normalisation_samples": 256,
    },
    # Huang et al. 2024, "The N+ implementation details of RLHF with PPO". Their decay is PyTorch's
    # default, which takes in biases and gains too.
    "tldr-2024": {
        "learning_rate": 3e-6, "batch_size": 512, "eps": 1e-5, "weight_decay": 0.01,
        "scheduler": "linear",
        "kl_coefficient": 0.05, "whiten_rewards": False, "whiten_unbiased": False,
        "critic": "separate", "score_after_end": True, "temperature": 0.7, "max_new_tokens": 53,
        "missing_eos_penalty": -1.0, "missing_eos_mode": "replace",
    },
    # Of TRL's PPOTrainer.
    "trl": {
        "learning_rate": 3e-6, "batch_size": 64, "eps": 1e-8, "scheduler": "linear",
        "kl_coefficient": 0.05, "whiten_rewards": False, "whiten_unbiased": True,
        "critic": "separate", "score_after_end": True, "temperature": 0.7, "max_new_tokens": 53,
        "missing_eos_penalty": None, "missing_eos_mode": "subtract",
    },
}  # fmt: skip


def preset(name: str, **overrides: Any) -> Options:
    """Return the options of a published recipe, some of them given anew.

    Parameters
    ----------
    name : {"openai-2019", "tldr-2024", "trl"}
    **overrides
        Options by name.

    Raises
    ------
    ConfigError
        If there is no such recipe or option.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"preset: expected one of {', '.join(PRESETS)}, found {name!r}{nearest(name, PRESETS)}"
        )
    return with_overrides(Options(), PRESETS[name] | overrides)


class Critic:
    """The value of the states that a response goes through.

    Parameters
    ----------
    body : Transformer or None
        A network of its own; None reads the policy's states.
    weight, bias : ndarray [1, C] and [1]
        Of the value head.
    """

    def __init__(self, body: Transformer | None, weight: Array, bias: Array):
        self.body = body
        self.weight = Parameter(weight, "value_head.weight")
        self.bias = Parameter(bias, "value_head.bias")

    def parameters(self) -> dict[str, Parameter]:
        """Return its parameters, as "critic.<name>" and "value_head.<name>"."""
        body = {} if self.body is None else self.body.parameters()
        body.pop("lm_head.weight", None)  # no part in the values, so never a gradient
        found = {f"critic.{name}": p for name, p in body.items()}
        return found | {"value_head.weight": self.weight, "value_head.bias": self.bias}

    def values(self, rollout: Rollout, states: Tensor | None) -> Tensor:
        """Return a value for each response token ``[M]``: of the state that it was chosen in.

        Parameters
        ----------
        rollout : Rollout
        states : Tensor [M, C] or None
            Of the policy, for a critic without a body.
        """
        if self.body is not None:
            states = response_states(self.body, rollout)
        assert states is not None
        return ops.reshape(ops.linear(states, self.weight, self.bias), (len(rollout.rows),))


class PPOTrainer(PolicyTrainer):
    """Trains a policy against a reward.

    Parameters
    ----------
    policy : Transformer
        What is trained, in place; its weights are also the reference's, as they are now. With
        LoRA, adapters alone are trained and the reference is the model without them.
    tokenizer : Tokenizer or None
        None takes prompts as ids and shows ids to the reward.
    reward : callable, object with ``score``, or a weighted sum
        See :class:`loopos.methods.rewards.Reward`.
    options : Options, optional
        See also :func:`preset`.
    reference : Transformer, optional
        In place of a copy of the start.
    critic : {"separate", "shared"} or model with ``body`` and ``weight`` (and ``bias``), optional
        The option of that name; or a reward model that a separate critic starts from, as a copy,
        in place of the policy's body under a head of zeros.
    seed : int
        Of samples, minibatches and adapters.
    **overrides
        Options by name.

    Attributes
    ----------
    policy, reference, critic
        The networks.
    samples : list of dict
        The table of the last step.
    steps : int
    kl_coefficient : float

    Raises
    ------
    ConfigError
        If the parts do not go together.
    """

    method = "PPO"
    options: Options

    def __init__(
        self,
        policy: Transformer,
        tokenizer: Tokenizer | None,
        reward: Any,
        options: Options | None = None,
        *,
        reference: Transformer | None = None,
        critic: Any = None,
        seed: int = 0,
        **overrides: Any,
    ):
        if isinstance(critic, str):
            overrides["critic"], critic = critic, None
        chosen = with_overrides(options or Options(), overrides)
        super().__init__(policy, tokenizer, reward, chosen, reference=reference, seed=seed)
        self.critic = self._make_critic(critic)
        self.shared_trunk = self.critic.body is None
        self._reset()

    def _make_critic(self, start: Any) -> Critic:
        policy, shared = self.policy, self.options.critic == "shared"
        width, dtype = policy.config.d_model, policy.dtype
        if start is None:
            body = None if shared else self._own_body(policy)
            return Critic(body, np.zeros((1, width), dtype), np.zeros(1, dtype))
        if shared:
            raise ConfigError("critic: a shared critic has the policy's body, and starts from 0")
        if not hasattr(start, "body") or not hasattr(start, "weight"):
            raise ConfigError(
                "critic: expected 'separate', 'shared' or a model with a body and a weight, found "
                f"{type(start).__name__}"
            )
        source, weight = start.body, np.asarray(start.weight.data, dtype)
        bias = getattr(start, "bias", None)
        if weight.shape != (1, source.config.d_model) or not source.config.causal:
            raise ConfigError("critic: expected a causal body under one linear output")
        require_same_vocabulary(source, policy, "the critic")
        with ExitStack() as stack:
            if source.adapters and not source.unmerged:
                merge_lora(source)
                stack.callback(unmerge_lora, source)
            body = self._trained(copy_of(source))
        values = bias.data if isinstance(bias, Tensor) else bias
        shift = np.zeros(1, dtype) if values is None else np.array(values, dtype).reshape(1)
        return Critic(body, weight.copy(), shift)

    def _own_body(self, policy: Transformer) -> Transformer:
        if policy.adapters:  # the frozen weights are shared, the adapters are its own
            return self._trained(add_lora(without_adapters(policy), policy.lora, self.seed + 1))
        return self._trained(copy_of(policy))

    def _trained(self, body: Transformer) -> Transformer:
        train_only(body.parameters(), trained_body(body))
        body.gradient_checkpointing = self.options.gradient_checkpointing
        return body

    def _more_parameters(self) -> dict[str, Parameter]:
        return self.critic.parameters()

    def _rate_factors(self) -> dict[str, float]:
        own = self.options.critic_learning_rate
        if own is None:
            return {}
        return dict.fromkeys(self.critic.parameters(), own / self.options.learning_rate)

    def _values(self) -> Callable[[Rollout, Tensor], Tensor]:
        if not self.options.score_after_end:
            return self.critic.values
        return lambda rollout, states: self.critic.values(self._valued(rollout)[0], states)

    def _valued(self, rollout: Rollout) -> tuple[Rollout, Array]:
        """Return the rollout whose every response token has a value, and which are real, [M]."""
        if not self.options.score_after_end:
            return rollout, np.ones(len(rollout.rows), bool)
        more = rollout.ended & (rollout.lengths < self.options.max_new_tokens)
        valued = rollout.with_end_states(more)
        real = np.ones(len(valued.rows), bool)
        real[valued.response_offsets[1:][more] - 1] = False
        return valued, real

    def _value_count(self, rollout: Rollout) -> float:
        return float(self._valued(rollout)[1].size)

    def _advantages(
        self, rollout: Rollout, data: dict[str, Array], kl: Array | None, scored: Scored
    ) -> tuple[Rollout, dict[str, Array], dict[str, float]]:
        options, values = self.options, data["values"]
        self._require_horizon(len(rollout))  # before anything is updated
        valued, real = self._valued(rollout)
        require_finite(valued, {"values": values})
        offsets, cost = valued.response_offsets, np.zeros_like(values)
        if kl is not None:
            cost[real] = kl
        rewards = token_rewards(cost, scored.final, offsets, self.kl_coefficient)
        require_scores_at_end(valued, rewards, self.kl_coefficient * cost, scored.final)
        figures = {"reward/total": float(segment_sums(rewards, offsets).mean())}
        if options.whiten_rewards:
            rewards = whiten(rewards, shift_mean=False, unbiased=options.whiten_unbiased)
        advantages, returns = gae(rewards, values, offsets, options.gamma, options.lam)
        figures["value/explained_variance"] = explained_variance(values, returns)
        figures["kl/coefficient"] = self.kl_coefficient
        advantages = advantages[real]
        if options.whiten_advantages:
            advantages = whiten(advantages, unbiased=options.whiten_unbiased)
        arrays = data | {"advantages": advantages}
        for name, x in (("values", values), ("returns", returns)):
            arrays[name], arrays[f"end_{name}"] = x[real], _at_ends(x, real)
        return rollout, arrays, figures

    def _other_terms(
        self, done: Forward, part: Rollout, data: dict[str, Array], count: float
    ) -> tuple[Terms, dict[str, float]]:
        options = self.options
        valued, real = self._valued(part)
        values = done.values
        if values is None:
            values = self.critic.values(valued, done.states)
        old, returns = data["values"], data["returns"]
        if not real.all():
            old = _with_ends(old, data["end_values"], real)
            returns = _with_ends(returns, data["end_returns"], real)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is named after
            total, _, dvalues = value_loss_and_grad(values.data, old, returns, options.value_clip)
        kind, factor = values.dtype.type, options.value_coefficient
        figures = {"value_loss": total / count, "loss": factor * total / count}
        return [(values, dvalues * kind(factor / count))], figures

    def _reset(self) -> None:
        super()._reset()
        self._require_horizon(self.options.batch_size * self.options.gradient_accumulation_steps)

    def _require_horizon(self, responses: int) -> None:
        """Refuse an adaptive coefficient that so many responses could bring below 0."""
        if self.options.adaptive_kl_target is not None:
            adapted_kl_coefficient(1.0, 0.0, responses, horizon=self.options.adaptive_kl_horizon)

    def _after(self, state: LearnerState, kl: float, responses: int) -> LearnerState:
        target, horizon = self.options.adaptive_kl_target, self.options.adaptive_kl_horizon
        if target is None:
            return state
        adapted = adapted_kl_coefficient(state.kl_coefficient, kl, responses, target, horizon)
        return replace(state, kl_coefficient=adapted)


def _at_ends(x: Array, real: Array) -> Array:
    """Return, at the real tokens, what stands at the state behind each: 0 where there is none."""
    behind = np.append(~real[1:], False)
    return np.where(behind, np.append(x[1:], 0), 0).astype(x.dtype)[real]


def _with_ends(x: Array, ends: Array, real: Array) -> Array:
    """Undo that: put the values of states after the end between those of the real tokens."""
    joined = np.empty(real.size, x.dtype)
    joined[real] = x
    held = np.empty(real.size, x.dtype)
    held[real] = ends
    joined[~real] = held[np.flatnonzero(~real) - 1]
    return joined


def explained_variance(values: Array, returns: Array) -> float:
    """Return ``1 - var(returns - values) / var(returns)``; 0 where the returns do not vary."""
    variance = float(np.var(returns, dtype=np.float64))
    if variance == 0:
        return 0.0
    return 1.0 - float(np.var(returns.astype(np.float64) - values)) / variance
