"""The options of every run: the ``training`` section of a configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, Literal

from loopos.autograd import Parameter
from loopos.errors import ConfigError, nearest
from loopos.training.optim import SGD, Adam, AdamW, Optimizer
from loopos.training.schedules import SCHEDULES

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

    Raises
    ------
    ConfigError
        If a value does not fit, naming its key.
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
        for name, choices in _CHOICES.items():
            _require_choice(name, getattr(self, name), choices)
        for name in _SWITCHES:
            value = getattr(self, name)
            _require(name, value, isinstance(value, bool), "true or false")
        for names, kind, holds, expected in _NUMBERS:
            for name in names:
                value = getattr(self, name)
                if value is None and name in _OPTIONAL:
                    continue
                words = "an integer" if kind is Integral else "a number"
                _require(name, value, _is_number(value, kind), words)
                _require(name, value, _is_finite(value) and holds(value), expected)
                # NumPy's numbers are welcome, but checkpoints hold JSON.
                object.__setattr__(self, name, int(value) if kind is Integral else float(value))
        pair = self.betas
        numbers = isinstance(pair, (tuple, list)) and all(_is_number(b, Real) for b in pair)
        fits = numbers and len(pair) == 2 and all(0 <= beta < 1 for beta in pair)
        _require("betas", pair, fits, "two numbers in [0, 1)")
        object.__setattr__(self, "betas", (float(self.betas[0]), float(self.betas[1])))

    def as_dict(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        values = asdict(self)
        return values | {"betas": list(self.betas)}


_CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("adamw", "adam", "sgd"),
    "scheduler": tuple(SCHEDULES),
}
_SWITCHES = ("shuffle", "length_bucketing")
_OPTIONAL = ("batch_tokens", "num_epochs", "max_steps", "max_grad_norm", "eval_steps",
             "early_stopping_patience", "save_steps")  # fmt: skip
#: Names, their kind of number, what must hold, and that in words.
_NUMBERS: tuple[tuple[tuple[str, ...], type, Callable[[Any], bool], str], ...] = (
    (("batch_size", "gradient_accumulation_steps", "batch_tokens", "num_epochs", "max_steps",
      "eval_steps", "save_steps", "early_stopping_patience"),
     Integral, lambda n: n >= 1, "at least 1"),
    (("warmup_steps", "prefetch_batches", "num_workers"),
     Integral, lambda n: n >= 0, "a number that is not negative"),
    (("weight_decay",), Real, lambda x: x >= 0, "a number that is not negative"),
    (("learning_rate", "eps", "max_grad_norm"), Real, lambda x: x > 0, "a positive number"),
    (("momentum",), Real, lambda x: 0 <= x < 1, "a number in [0, 1)"),
)  # fmt: skip


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _require(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"training.{name}: expected {expected}, found {value!r}")


def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(
            f"training.{name}: expected one of {', '.join(choices)}, found {value!r}"
            f"{nearest(value, choices)}"
        )


def make_optimizer(parameters: dict[str, Parameter], options: TrainingOptions) -> Optimizer:
    """Return the optimizer that the options ask for, over the trained parameters."""
    rate, decay = options.learning_rate, options.weight_decay
    if options.optimizer == "sgd":
        return SGD(parameters, rate, options.momentum, decay)
    kind = AdamW if options.optimizer == "adamw" else Adam
    return kind(parameters, rate, options.betas, options.eps, decay)
