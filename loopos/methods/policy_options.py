"""The options that methods which learn from samples of a policy share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loopos.errors import ConfigError, nearest
from loopos.generation import SamplingOptions
from loopos.methods.losses import KL_ESTIMATORS
from loopos.methods.rewards import NORMALISATIONS, Normalisation
from loopos.training.options import TrainingOptions

__all__ = ["PolicyOptions", "require", "require_choice", "require_numbers"]

#: Of an option: whether it must be a whole number, what must hold, and that in words.
Rule = tuple[bool, Callable[[float], bool], str]


@dataclass(frozen=True)
class PolicyOptions(TrainingOptions):
    """Options of a run that learns from its own samples, beside those of every run.

    A step takes `batch_size` times `gradient_accumulation_steps` prompts; the latter is also into
    how many passes a minibatch is cut. Dropout is off, always.

    Attributes
    ----------
    clip_epsilon : float
        The ratio of the probabilities is clipped to ``1 - clip_epsilon .. 1 + clip_epsilon``.
    clip_epsilon_high : float or None
        Of the upper bound, where it differs.
    kl_coefficient : float
        How much a nat of KL to the reference costs. With 0, and nothing else that needs it, there
        is no reference.
    kl_estimator : {"k1", "k2", "k3", "exact"}
        See :func:`loopos.methods.losses.kl_estimate`; "exact" goes over the whole vocabulary.
    exact_kl : bool
        Report the exact KL too, whatever the estimator.
    entropy_coefficient : float
        Of the entropy, which is added to what is maximised.
    target_kl : float or None
        The updates of a step end before the one whose ``approx_kl`` is above this.
    kl_budget : float or None
        The run ends when the mean KL of a response, in nats, is above this. The best evaluation
        within it is kept, or else the last weights whose samples were: a copy of what is trained.
    ppo_epochs : int
        Passes over the samples of a step.
    minibatches : int
        Updates in each of them; fewer in a step of fewer responses.
    temperature : float
        Of the samples, and of every probability that is compared with them.
    max_new_tokens : int
        Tokens of a response at the most.
    stop_ids : tuple of int
        Tokens that end a response, beside the tokenizer's ends of text.
    missing_eos_penalty : float or None
        For responses without a stop token.
    missing_eos_mode : {"subtract", "replace"}
        Whether it is taken off the score (1 lowers it), or stands in its place (-1 is a low one).
    reward_normalisation : {"none", "mean", "mean_std", "running"}
        See :class:`loopos.methods.rewards.Normaliser`.
    normalisation_samples : int
        Prompts whose first responses set the scale, of "mean" and "mean_std".
    rollout_weights : {"float32", "bfloat16", "int8"}
        What samples are computed with; the log-probabilities are computed again in any case.
    rollout_batch_size : int
        Responses that are sampled at once.
    tf1_epsilon : bool
        Add Adam's `eps` where TensorFlow 1 did, before the correction of the bias.
    sample_steps : int or None
        Steps between two tables of samples.
    """

    learning_rate: float = 1e-6
    batch_size: int = 8
    weight_decay: float = 0.0
    eps: float = 1e-5
    scheduler: Literal[
        "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "step", "inverse_sqrt"
    ] = "linear"
    clip_epsilon: float = 0.2
    clip_epsilon_high: float | None = None
    kl_coefficient: float = 0.1
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    exact_kl: bool = False
    entropy_coefficient: float = 0.0
    target_kl: float | None = None
    kl_budget: float | None = None
    ppo_epochs: int = 4
    minibatches: int = 1
    temperature: float = 1.0
    max_new_tokens: int = 64
    stop_ids: tuple[int, ...] = ()
    missing_eos_penalty: float | None = None
    missing_eos_mode: Literal["subtract", "replace"] = "subtract"
    reward_normalisation: Normalisation = "none"
    normalisation_samples: int = 256
    rollout_weights: Literal["float32", "bfloat16", "int8"] = "float32"
    rollout_batch_size: int = 64
    tf1_epsilon: bool = False
    sample_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_numbers(self, _NUMBERS)
        require_choice(self, "kl_estimator", (*KL_ESTIMATORS, "exact"))
        require_choice(self, "missing_eos_mode", ("subtract", "replace"))
        require_choice(self, "reward_normalisation", NORMALISATIONS)
        require_choice(self, "rollout_weights", ("float32", "bfloat16", "int8"))
        for name in ("exact_kl", "tf1_epsilon"):
            require(self, name, isinstance(getattr(self, name), bool), "true or false")
        require(self, "temperature", self.temperature > 0, "a number above 0")
        require(self, "tf1_epsilon", not self.tf1_epsilon or self.optimizer != "sgd",
                "false with sgd, which has no eps")  # fmt: skip
        many = isinstance(self.stop_ids, Iterable)
        require(self, "stop_ids", many, "a list of token ids")
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        self.sampling(0)  # checks what it takes
        for name, holds in (
            ("batch_tokens", self.batch_tokens is None),
            ("length_bucketing", not self.length_bucketing),
            ("layerwise_lr_decay", self.layerwise_lr_decay == 1.0),
        ):
            if not holds:
                raise ConfigError(f"training.{name}: of no use to a method that samples prompts")

    def sampling(self, seed: int, num_samples: int = 1) -> SamplingOptions:
        """Return how responses are sampled, so many to each prompt."""
        return SamplingOptions(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature,
            stop_ids=self.stop_ids, seed=seed, num_samples=num_samples,
        )  # fmt: skip

    def require_vocabulary(self, size: int) -> None:
        """Raise ConfigError unless the stop tokens are in a vocabulary of this size."""
        outside = [i for i in self.stop_ids if i >= size]
        if outside:
            raise ConfigError(
                f"training.stop_ids: {outside[0]} is outside the vocabulary of {size}"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether anything compares with a reference."""
        return self.kl_coefficient > 0 or self.kl_budget is not None or self.exact_kl


_ANY: Rule = (False, math.isfinite, "a finite number")
_COUNT: Rule = (True, lambda n: n >= 1, "a whole number of at least 1")
_AT_LEAST_0: Rule = (False, lambda x: x >= 0, "a number that is not negative")
_ABOVE_0: Rule = (False, lambda x: x > 0, "a number above 0")
_NUMBERS: dict[str, Rule] = {
    "clip_epsilon": _ABOVE_0, "clip_epsilon_high": _ABOVE_0, "kl_coefficient": _AT_LEAST_0,
    "entropy_coefficient": _ANY, "target_kl": _ABOVE_0, "kl_budget": _ABOVE_0,
    "ppo_epochs": _COUNT, "minibatches": _COUNT, "temperature": _ABOVE_0,
    "max_new_tokens": _COUNT, "missing_eos_penalty": _ANY, "normalisation_samples": _COUNT,
    "rollout_batch_size": _COUNT, "sample_steps": _COUNT,
}  # fmt: skip
#: Those that may be None.
_OPTIONAL = {"clip_epsilon_high", "target_kl", "kl_budget", "missing_eos_penalty", "sample_steps",
             "value_clip", "critic_learning_rate", "adaptive_kl_target"}  # fmt: skip


def require(options: Any, name: str, holds: bool, expected: str) -> None:
    """Raise ConfigError, naming the option, unless something holds."""
    if not holds:
        raise ConfigError(f"training.{name}: expected {expected}, found {getattr(options, name)!r}")


def require_choice(options: Any, name: str, known: tuple[str, ...]) -> None:
    """Refuse any other value than the known ones."""
    value = getattr(options, name)
    if value not in known:
        raise ConfigError(
            f"training.{name}: expected one of {', '.join(known)}, found {value!r}"
            f"{nearest(str(value), known)}"
        )


def require_numbers(options: Any, rules: Mapping[str, Rule]) -> None:
    """Check numbers, and keep them as Python's."""
    for name, (whole, holds, expected) in rules.items():
        value = getattr(options, name)
        if value is None and name in _OPTIONAL:
            continue
        kind = int if whole else (int, float)
        number = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
        require(options, name, number and holds(value), expected)
        object.__setattr__(options, name, int(value) if whole else float(value))
