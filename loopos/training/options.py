"""The options of every run: the ``training`` section of a configuration."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from loopos.autograd import Parameter
from loopos.errors import ConfigError
from loopos.training.optim import SGD, Adam, AdamW, Optimizer

__all__ = ["TrainingOptions", "make_optimizer"]


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; methods add options of their own.

    Attributes
    ----------
    learning_rate : float
        The highest rate of the schedule.
    batch_size : int
        Samples in a batch.
    batch_tokens : int or None
        Tokens in a batch, instead of `batch_size`.
    num_epochs : int or None
        Passes over the data; None means 1, or as many as `max_steps` needs.
    max_steps : int or None
        Optimizer steps after which the run ends, whatever `num_epochs` says.
    optimizer : {"adamw", "adam", "sgd"}
    weight_decay : float
        Of weight matrices; biases and gains do not decay.
    betas, eps
        Of Adam and AdamW.
    momentum : float
        Of SGD.
    scheduler : {"constant", "linear", "cosine"}
    warmup_steps : int
        Steps over which the rate grows from 0.
    max_grad_norm : float or None
        Gradients are scaled down to this global norm.
    gradient_accumulation_steps : int
        Batches in one optimizer step.
    shuffle : bool
        Whether each epoch has an order of its own.
    length_bucketing : bool
        Put texts of like length into one batch, in random order of batches.
    prefetch_batches : int
        Batches made ahead by the workers.
    num_workers : int
        Threads that make batches; 0 makes them in the loop.
    eval_steps : int or None
        Steps between evaluations; None evaluates after every epoch.
    early_stopping_patience : int or None
        Evaluations without a better loss after which the run ends.
    save_steps : int or None
        Steps between checkpoints; None saves after every epoch.
    """

    learning_rate: float = 5e-5
    batch_size: int = 16
    batch_tokens: int | None = None
    num_epochs: int | None = None
    max_steps: int | None = None
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    scheduler: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    gradient_accumulation_steps: int = 1
    shuffle: bool = True
    length_bucketing: bool = False
    prefetch_batches: int = 2
    num_workers: int = 0
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    save_steps: int | None = None

    def __post_init__(self) -> None:
        positive = ("batch_size", "gradient_accumulation_steps", "batch_tokens", "num_epochs",
                    "max_steps", "eval_steps", "save_steps", "early_stopping_patience")  # fmt: skip
        for name in positive:
            _require(self, name, lambda value: value >= 1, "at least 1")
        for name in ("warmup_steps", "prefetch_batches", "num_workers", "weight_decay"):
            _require(self, name, lambda value: value >= 0, "a number that is not negative")
        for name in ("learning_rate", "eps", "max_grad_norm"):
            _require(self, name, lambda value: value > 0, "a positive number")
        _require(self, "momentum", lambda value: 0 <= value < 1, "a number in [0, 1)")
        _require(self, "betas", lambda pair: all(0 <= b < 1 for b in pair), "numbers in [0, 1)")

    def as_dict(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        values = asdict(self)
        return values | {"betas": list(self.betas)}


def _require(options: TrainingOptions, name: str, holds: Any, expected: str) -> None:
    value = getattr(options, name)
    if value is None:
        return
    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(n, float) and not math.isfinite(n) for n in numbers) or not holds(value):
        raise ConfigError(f"training.{name}: expected {expected}, found {value!r}")


def make_optimizer(parameters: dict[str, Parameter], options: TrainingOptions) -> Optimizer:
    """Return the optimizer that the options ask for, over the trained parameters."""
    rate, decay = options.learning_rate, options.weight_decay
    if options.optimizer == "sgd":
        return SGD(parameters, rate, options.momentum, decay)
    kind = AdamW if options.optimizer == "adamw" else Adam
    return kind(parameters, rate, options.betas, options.eps, decay)
