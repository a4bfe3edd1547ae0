"""Learning from groups of answers to one prompt: GRPO (Shao et al. 2024), Dr. GRPO, DAPO, RLOO.

No critic: a response is compared with the others of its group. Made for verifiable rewards, any
``reward(prompts, responses, answers) -> scores``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from loopos.autograd import Array
from loopos.data.tokenizer import Tokenizer
from loopos.errors import ConfigError
from loopos.methods.common import with_overrides
from loopos.methods.losses import grpo_advantages, rloo_advantages
from loopos.methods.policy_options import PolicyOptions, require, require_choice, require_numbers
from loopos.methods.policy_state import Scored
from loopos.methods.policy_training import PolicyTrainer
from loopos.methods.rollouts import Rollout, segment_sums, take_segments
from loopos.models.transformer import Transformer

__all__ = ["GRPOTrainer", "Options"]


@dataclass(frozen=True)
class Options(PolicyOptions):
    """Options of a GRPO run, beside those of :class:`PolicyOptions`; one pass a step by default.

    Attributes
    ----------
    group_size : int
        Responses to each prompt.
    baseline : {"group", "leave_one_out"}
        What a score is compared with: the mean of its group, or that of the others (RLOO).
    scale : {"group", "batch", "none"}
        By what the difference is divided: the standard deviation of the group, of the batch, or
        nothing (Dr. GRPO). Not heeded by, and not allowed with "leave_one_out", but for "none".
    loss_aggregation : {"token", "sequence", "constant"}
        What the loss is a mean of: all tokens (DAPO), the means of the responses (GRPO), or the
        sums of the responses over `max_new_tokens` (Dr. GRPO).
    kl_in : {"loss", "reward"}
        Whether the KL is a term of the loss, estimated anew for each update, or taken off the
        score of the response.
    dynamic_sampling : bool
        Leave out groups whose scores are all the same, from which nothing is learnt (DAPO).
    """

    ppo_epochs: int = 1
    kl_coefficient: float = 0.04
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k3"
    group_size: int = 8
    baseline: Literal["group", "leave_one_out"] = "group"
    scale: Literal["group", "batch", "none"] = "group"
    loss_aggregation: Literal["token", "sequence", "constant"] = "sequence"
    kl_in: Literal["loss", "reward"] = "loss"
    dynamic_sampling: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_numbers(self, {"group_size": (True, lambda n: n >= 2, "at least 2")})
        require_choice(self, "baseline", ("group", "leave_one_out"))
        require_choice(self, "scale", ("group", "batch", "none"))
        require_choice(self, "loss_aggregation", ("token", "sequence", "constant"))
        require_choice(self, "kl_in", ("loss", "reward"))
        flag = isinstance(self.dynamic_sampling, bool)
        require(self, "dynamic_sampling", flag, "true or false")
        if self.baseline == "leave_one_out" and self.scale != "none":
            raise ConfigError("training.scale: expected 'none' with the baseline 'leave_one_out'")
        if self.kl_in == "loss" and self.kl_estimator == "exact":
            raise ConfigError("training.kl_estimator: 'exact' needs kl_in 'reward'")


class GRPOTrainer(PolicyTrainer):
    """Trains a policy against a reward, without a critic.

    Parameters, attributes and errors as :class:`loopos.methods.ppo.PPOTrainer`, the critic apart;
    `batch_size` prompts make ``batch_size group_size`` responses.
    """

    method = "GRPO"
    options: Options

    def __init__(
        self,
        policy: Transformer,
        tokenizer: Tokenizer | None,
        reward: Any,
        options: Options | None = None,
        *,
        reference: Transformer | None = None,
        seed: int = 0,
        **overrides: Any,
    ):
        chosen = with_overrides(options or Options(), overrides)
        super().__init__(policy, tokenizer, reward, chosen, reference=reference, seed=seed)
        self.group_size = chosen.group_size
        self.kl_in_loss = chosen.kl_in == "loss" and chosen.kl_coefficient > 0
        self._reset()

    def _denominator(self, rollout: Rollout) -> float:
        how = self.options.loss_aggregation
        if how == "token":
            return super()._denominator(rollout)
        return float(len(rollout) * (self.options.max_new_tokens if how == "constant" else 1))

    def _advantages(
        self, rollout: Rollout, data: dict[str, Array], kl: Array | None, scored: Scored
    ) -> tuple[Rollout, dict[str, Array], dict[str, float]]:
        options, size = self.options, self.options.group_size
        scores = scored.final
        if len(scores) % size:
            raise ConfigError(f"expected groups of {size} responses, found {len(scores)} in all")
        if kl is not None and options.kl_in == "reward":
            scores = scores - options.kl_coefficient * segment_sums(kl, rollout.response_offsets)
        figures = {"reward/total": float(scores.mean())}
        if options.baseline == "leave_one_out":
            advantages = rloo_advantages(scores, size)
        else:
            advantages = grpo_advantages(scores, size, options.scale)
        groups = scored.final.reshape(-1, size)
        # The deviation of equal scores may be rounded.
        flat = np.ptp(scores.reshape(-1, size), axis=1) == 0
        figures["grpo/score_std"] = float(groups.std(axis=1).mean())
        figures["grpo/flat_groups"] = int(flat.sum())
        lengths = rollout.lengths
        dtype = data["logprobs"].dtype
        arrays = data | {"advantages": np.repeat(advantages, lengths).astype(dtype)}
        if options.loss_aggregation == "sequence":
            arrays["weights"] = np.repeat(1.0 / lengths, lengths).astype(dtype)
        if options.dynamic_sampling and flat.any():
            rollout, arrays = _left(rollout, arrays, np.repeat(~flat, size))
        return rollout, arrays, figures


def _left(
    rollout: Rollout, arrays: dict[str, Array], keep: Array
) -> tuple[Rollout, dict[str, Array]]:
    """Return what is left of a rollout and its arrays; both may be empty."""
    chosen, offsets = np.flatnonzero(keep), rollout.response_offsets
    kept = {name: take_segments(x, offsets, chosen) for name, x in arrays.items()}
    return rollout.take(chosen), kept
