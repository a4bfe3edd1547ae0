"""The updates of a step: several passes over its samples, clipped, each with its figures."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loopos.autograd import Array, Tensor, backward
from loopos.errors import NumericalError
from loopos.methods.losses import kl_estimate, kl_loss_and_grad, ppo_loss_and_grad
from loopos.methods.policy_checks import RATIO_TOLERANCE, require_small
from loopos.methods.policy_options import PolicyOptions
from loopos.methods.rollouts import Forward, Rollout, forward_pass, take_segments
from loopos.models.transformer import Transformer
from loopos.training.optim import AdamW, Optimizer, gradient_norm

__all__ = ["PolicyUpdates", "Terms"]

#: Tensors of a loss with the gradients of it.
Terms = list[tuple[Tensor, Array]]


@dataclass
class _Sums:
    """What the updates of a step add up to."""

    values: dict[str, float] = field(default_factory=dict)
    updates: int = 0
    norms: float = 0.0

    def add(self, found: dict[str, float]) -> None:
        self.values = _joined(self.values, found)

    def figures(self) -> dict[str, Any]:
        """Return means under the names of the record; no more than the count without an update."""
        if not self.updates:
            return {"loss": 0.0, "grad_norm": 0.0, "ppo/updates": 0}
        values, tokens = self.values, self.values["tokens"]
        means = {n: v / self.updates for n, v in values.items() if n.endswith("loss")}
        record: dict[str, Any] = {"loss": means.pop("loss"), "grad_norm": self.norms / self.updates}
        record |= {f"ppo/{name}": mean for name, mean in means.items()}
        return record | {
            "ppo/approx_kl": values["approx_kl"] / tokens,
            "ppo/clip_fraction": values["clipped"] / tokens,
            "ppo/ratio_max": values["ratio_max"],
            "ppo/updates": self.updates,
        }


def _joined(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    both = a.keys() & b.keys()
    joined = {name: a[name] + b[name] for name in both}
    if "ratio_max" in both:
        joined["ratio_max"] = max(a["ratio_max"], b["ratio_max"])
    return a | b | joined


class PolicyUpdates(ABC):
    """The part of a trainer that updates."""

    policy: Transformer
    options: PolicyOptions
    optimizer: Optimizer
    seed: int
    #: Whether the KL to the reference is a term of the loss.
    kl_in_loss = False
    #: Whether :meth:`_other_terms` go through the policy's states too.
    shared_trunk = False

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps done."""

    @property
    @abstractmethod
    def kl_coefficient(self) -> float:
        """In force."""

    def _denominator(self, rollout: Rollout) -> float:
        """Return what the policy's summed loss over a minibatch is divided by."""
        return float(rollout.response_offsets[-1])

    def _value_count(self, rollout: Rollout) -> float:
        """Return how many values there are in a minibatch."""
        return float(rollout.response_offsets[-1])

    def _other_terms(
        self, done: Forward, part: Rollout, data: dict[str, Array], count: float
    ) -> tuple[Terms, dict[str, float]]:
        """Return further terms of the loss, and their values by name, "loss" the sum of them.

        Parameters
        ----------
        done : Forward
            The pass over `part`; without the policy's states where the trunk is not shared.
        part : Rollout
        data : dict of str to ndarray [M]
        count : float
            Values in the whole minibatch.
        """
        return [], {}

    def _update(
        self,
        rollout: Rollout,
        data: dict[str, Array],
        rate: float,
        on_update: Callable[[], None],
        recorded: list[Forward],
    ) -> dict[str, Any]:
        """Go over the samples several times; return the figures.

        A pass over the whole rollout that was recorded already is taken for the first one.
        """
        options, sums, count = self.options, _Sums(), len(rollout)
        minibatches = min(options.minibatches, count)  # the last step of an epoch may be short
        for epoch in range(options.ppo_epochs if count else 0):
            order = np.random.default_rng([self.seed, self.steps, epoch]).permutation(count)
            if recorded:
                order = np.arange(count)
            for chosen in np.array_split(order, minibatches):
                done = recorded.pop() if recorded else None
                found = self._gradients(rollout, data, chosen, sums.updates == 0, done)
                limit = options.target_kl
                if limit is not None and found["approx_kl"] / found["tokens"] > limit:
                    return sums.figures()
                sums.add(found)
                sums.norms += self._apply(rate, on_update)
                sums.updates += 1
        return sums.figures()

    def _gradients(
        self,
        rollout: Rollout,
        data: dict[str, Array],
        chosen: Array,
        first: bool,
        done: Forward | None = None,
    ) -> dict[str, float]:
        """Compute the gradients of one minibatch; return its sums."""
        for parameter in self.optimizer.parameters.values():
            parameter.zero_grad()
        whole = rollout.take(chosen)
        denominator, values = self._denominator(whole), self._value_count(whole)
        total: dict[str, float] = {}
        passes = min(self.options.gradient_accumulation_steps, len(chosen))
        for indices in np.array_split(chosen, passes):
            part = rollout.take(indices)
            arrays = {
                name: take_segments(x, rollout.response_offsets, indices)
                for name, x in data.items()
            }
            now = done or forward_pass(self.policy, part, self.options.temperature)
            terms, found = self._policy_terms(now, part, arrays, denominator, first)
            self._require_finite(found, part)
            valued = now.values is not None  # the critic's pass is on the tape already
            if not (self.shared_trunk or valued):  # one network's activations at a time
                backward(terms)
                terms, now.states = [], None
            more, others = self._other_terms(now, part, arrays, values)
            loss = found.pop("loss") + others.pop("loss", 0.0)
            found |= others | {"loss": loss}  # last, so that its part at fault is named
            self._require_finite(found, part)
            if valued and not self.shared_trunk:
                # The critic first: the policy's logits need the memory that this leaves.
                backward(more)
                more, now.values = [], None
            backward([*terms, *more])
            total = _joined(total, found)
        return total

    def _require_finite(self, values: dict[str, float], part: Rollout) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                shown = ", ".join(map(str, part.samples[:8].tolist()))
                raise NumericalError(f"{name} is {value} (samples {shown})")

    def _policy_terms(
        self, done: Forward, part: Rollout, data: dict[str, Array], denominator: float, first: bool
    ) -> tuple[Terms, dict[str, float]]:
        options, logprobs, entropy = self.options, done.logprobs, done.entropy
        log_ratio, kind = logprobs.data - data["logprobs"], logprobs.dtype.type
        if first:
            require_small(
                part, np.abs(log_ratio), RATIO_TOLERANCE,
                "has a log ratio of {:.3g} before any update: its log-probabilities are stale",
            )  # fmt: skip
        # With w >= 0, w times the loss of an advantage A is the loss of w A.
        weights = data.get("weights", np.ones_like(log_ratio))
        advantages = data["advantages"] * weights
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is named after
            loss, count, dlogprobs = ppo_loss_and_grad(
                logprobs.data, data["logprobs"], advantages,
                options.clip_epsilon, options.clip_epsilon_high,
            )  # fmt: skip
            ratio = np.exp(log_ratio)
        sums = {"policy_loss": loss / denominator, "loss": loss / denominator}
        if self.kl_in_loss and "ref_logprobs" in data:
            estimator = options.kl_estimator
            assert estimator != "exact"
            kl = kl_estimate(logprobs.data, data["ref_logprobs"], estimator)
            _, _, dkl = kl_loss_and_grad(logprobs.data, data["ref_logprobs"], estimator)
            dlogprobs = dlogprobs + dkl * weights * kind(self.kl_coefficient)
            sums["kl_loss"] = float(np.sum(kl * weights, dtype=np.float64)) / denominator
            sums["loss"] += self.kl_coefficient * sums["kl_loss"]
        terms = [(logprobs, dlogprobs / kind(denominator))]
        if options.entropy_coefficient:
            bonus = options.entropy_coefficient / denominator
            terms.append((entropy, weights * kind(-bonus)))
            sums["loss"] -= bonus * float(np.sum(entropy.data * weights, dtype=np.float64))
        low, high = options.clip_epsilon, options.clip_epsilon_high or options.clip_epsilon
        clipped = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
        return terms, sums | {
            "tokens": count,
            "approx_kl": float(np.sum(log_ratio.astype(np.float64) ** 2)) / 2,
            "clipped": float(clipped.sum()),
            "ratio_max": float(ratio.max()),
        }

    def _apply(self, rate: float, on_update: Callable[[], None]) -> float:
        """Make one update with the gradients that are there; return their norm."""
        options, optimizer = self.options, self.optimizer
        norm = gradient_norm(optimizer.parameters.values())
        if not np.isfinite(norm):
            bad = [n for n, p in optimizer.parameters.items()
                   if p.grad is not None and not np.isfinite(p.grad).all()]  # fmt: skip
            of = f"'{bad[0]}'" if bad else "all parameters together"
            raise NumericalError(f"the gradient of {of} is not finite")
        limit = options.max_grad_norm
        scale = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        if options.tf1_epsilon and isinstance(optimizer, AdamW):
            left = 1 - optimizer.betas[1] ** (optimizer.steps + 1)
            optimizer.eps = options.eps / math.sqrt(left)
        on_update()
        optimizer.step(scale, rate)
        return norm
