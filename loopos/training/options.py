"""The options of every run: the ``training`` section of a configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, Self

from loopos.autograd import Parameter
from loopos.errors import ConfigError, nearest
from loopos.models.adapter import LoraConfig
from loopos.training.optim import SGD, Adam, AdamW, Optimizer
from loopos.training.schedules import SCHEDULES, SHAPED, Shape

__all__ = ["TrainingOptions", "make_optimizer"]


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; methods add options of their own.

    Attributes
    ----------
    learning_rate : float
        The highest rate of the schedule.
    batch_size : int
        Samples in a batch; not heeded where `batch_tokens` is given.
    batch_tokens : int or None
        Tokens in a batch, instead of `batch_size`.
    num_epochs : int or None
        Passes over the data; None means 1, or as many as `max_steps` needs.
    max_steps : int or None
        Optimizer steps after which the run ends, whatever `num_epochs` says.
    optimizer : {"adamw", "adam", "sgd"}
        AdamW takes the weight decay off the weights, the other two add it to the gradients.
    weight_decay : float
        Of weight matrices; biases and gains do not decay.
    betas : tuple of float
        Decay rates of the running means of gradients and of their squares, of Adam and AdamW.
    eps : float
        Added to the root of the squares' mean, of Adam and AdamW.
    momentum : float
        Share of the running sum of gradients that each step of SGD keeps, in [0, 1).
    scheduler : {"constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "step", \
"inverse_sqrt"}
        How the rate falls after the warm-up; see :mod:`loopos.training.schedules`.
    warmup_steps : int
        Steps over which the rate grows from 0.
    min_learning_rate : float
        Where the rate falls to, instead of 0.
    scheduler_cycles : int or None
        Cycles of "cosine_with_restarts"; None means 1.
    scheduler_power : float or None
        Exponent of "polynomial"; None means 1.
    scheduler_step_size : int or None
        Steps after each of which "step" lowers the rate; None means a third of all.
    scheduler_gamma : float or None
        By what "step" multiplies the rate then; None means 0.1.
    scheduler_timescale : int or None
        Steps after which "inverse_sqrt" has fallen to 0.71 of the highest rate; None means
        `warmup_steps`, or 10,000 without a warm-up.
    layerwise_lr_decay : float
        The rate of a layer is that of the layer above it times this factor, in (0, 1]; the
        embeddings come below the first layer, heads have the whole rate.
    max_grad_norm : float or None
        Gradients are scaled down to this global norm; None leaves them as they are.
    gradient_accumulation_steps : int
        Batches in one optimizer step.
    gradient_checkpointing : bool
        Compute each layer again in the backward instead of keeping what it computed: less memory,
        about a third more time, the same bytes.
    lora : LoraConfig or None
        Train low-rank adapters (and heads) and leave the weights of the model as they are.
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
        Evaluations without a better loss after which the run ends; None never ends it early.
    save_steps : int or None
        Steps between checkpoints; None saves after every epoch.
    tensorboard : bool
        Write event files for TensorBoard into ``tensorboard/`` of the output directory.

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
    scheduler: Literal[
        "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "step", "inverse_sqrt"
    ] = "constant"
    warmup_steps: int = 0
    min_learning_rate: float = 0.0
    scheduler_cycles: int | None = None
    scheduler_power: float | None = None
    scheduler_step_size: int | None = None
    scheduler_gamma: float | None = None
    scheduler_timescale: int | None = None
    layerwise_lr_decay: float = 1.0
    max_grad_norm: float | None = None
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    shuffle: bool = True
    length_bucketing: bool = False
    prefetch_batches: int = 2
    num_workers: int = 0
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    save_steps: int | None = None
    tensorboard: bool = False

    def replaced(self, **overrides: Any) -> Self:
        """Return options of which some are others."""
        return replace(self, **overrides)

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
        if isinstance(self.lora, Mapping):  # as a configuration or a checkpoint has it
            object.__setattr__(self, "lora", LoraConfig(**self.lora))
        _require("lora", self.lora, self.lora is None or isinstance(self.lora, LoraConfig),
                 "a LoraConfig or nothing")  # fmt: skip
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Refuse what the schedule would not heed."""
        floor, rate = self.min_learning_rate, self.learning_rate
        _require("min_learning_rate", floor, floor <= rate, f"at most the learning_rate {rate:g}")
        if self.scheduler == "constant" and floor:
            raise ConfigError("training.min_learning_rate: a constant rate never falls")
        for name in (field.name for field in fields(Shape)):
            heeded = name in SHAPED.get(self.scheduler, ())
            if getattr(self, f"scheduler_{name}") is not None and not heeded:
                raise ConfigError(
                    f"training.scheduler_{name}: the scheduler '{self.scheduler}' has none"
                )

    @property
    def schedule_shape(self) -> Shape:
        """What the schedule has of its own."""
        names = [field.name for field in fields(Shape)]
        return Shape(**{name: getattr(self, f"scheduler_{name}") for name in names})

    def as_dict(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return {name: _listed(value) for name, value in asdict(self).items()}


_CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("adamw", "adam", "sgd"),
    "scheduler": tuple(SCHEDULES),
}
_SWITCHES = ("shuffle", "length_bucketing", "gradient_checkpointing", "tensorboard")
_OPTIONAL = ("batch_tokens", "num_epochs", "max_steps", "max_grad_norm", "eval_steps",
             "early_stopping_patience", "save_steps", "scheduler_cycles", "scheduler_power",
             "scheduler_step_size", "scheduler_gamma", "scheduler_timescale")  # fmt: skip
#: Names, their kind of number, what must hold, and that in words.
_NUMBERS: tuple[tuple[tuple[str, ...], type, Callable[[Any], bool], str], ...] = (
    (("batch_size", "gradient_accumulation_steps", "batch_tokens", "num_epochs", "max_steps",
      "eval_steps", "save_steps", "early_stopping_patience", "scheduler_cycles",
      "scheduler_step_size", "scheduler_timescale"),
     Integral, lambda n: n >= 1, "at least 1"),
    (("warmup_steps", "prefetch_batches", "num_workers"),
     Integral, lambda n: n >= 0, "a number that is not negative"),
    (("weight_decay", "min_learning_rate"), Real, lambda x: x >= 0,
     "a number that is not negative"),
    (("learning_rate", "eps", "max_grad_norm", "scheduler_power"),
     Real, lambda x: x > 0, "a positive number"),
    (("layerwise_lr_decay", "scheduler_gamma"), Real, lambda x: 0 < x <= 1, "a number in (0, 1]"),
    (("momentum",), Real, lambda x: 0 <= x < 1, "a number in [0, 1)"),
)  # fmt: skip


def _listed(value: Any) -> Any:
    """Return `value` with lists for its tuples, as JSON gives them back."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


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
