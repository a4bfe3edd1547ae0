"""Optimizers: in place on named parameters, all of them in one op of the backend.

``step(scale=...)`` multiplies gradients by a factor on the way, so that a division by a count and
clipping cost no pass over memory. Frozen parameters have no state and are never touched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from loopos.autograd import Array, Parameter
from loopos.backends import get_backend
from loopos.backends.lasting import lasting
from loopos.backends.numpy_updates import AdamwTensor
from loopos.errors import CheckpointError, ConfigError

#: Where arrays that are held stand in the state.
_HELD = "held"

__all__ = ["SGD", "Adam", "AdamW", "DecayGroups", "Optimizer", "gradient_norm"]

DecayGroups = Literal["matrices", "all"] | Callable[[str, Parameter], bool]


def gradient_norm(parameters: Iterable[Parameter]) -> float:
    """Return the global L2 norm of all gradients that are there."""
    grads = [grad for grad, _ in (p.grad_and_rows for p in parameters) if grad is not None]
    return float(np.sqrt(get_backend().sum_squares(grads)))


class _Update(NamedTuple):
    """A parameter that is due, with the learning rate and weight decay that are its own."""

    name: str
    data: Array
    grad: Array
    rows: Array | None
    rate: float
    decay: float


class Optimizer(ABC):
    """What all optimizers share: named parameters, decay groups, state in and out.

    Parameters
    ----------
    parameters : mapping of str to Parameter, or iterable of Parameter
        What is trained; frozen ones are left out.
    learning_rate : float
        Default of :meth:`step`.
    weight_decay : float
        Of the parameters in the decay group.
    decay_groups : {"matrices", "all"} or callable
        Which parameters decay: those with two axes or more (not biases and gains), all, or those
        for which ``decay_groups(name, parameter)`` is true.

    Attributes
    ----------
    rate_factors : dict of str to float
        Factor of the learning rate for some parameters, 1 for all others.
    held : dict of str to ndarray
        What whoever trains keeps for a parameter, in its shape: saved and loaded with the state.

    Raises
    ------
    ConfigError
        If a number is out of range, or a name or a parameter stands twice.
    """

    #: Names of the arrays kept for each parameter, in its shape.
    slots: tuple[str, ...] = ()
    #: Names of the numbers kept for each parameter, arrays of int64 without axes.
    counters: tuple[str, ...] = ()

    def __init__(
        self,
        parameters: Mapping[str, Parameter] | Iterable[Parameter],
        learning_rate: float,
        weight_decay: float,
        decay_groups: DecayGroups = "matrices",
    ):
        for key, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
            _require(0 <= value < np.inf, key, "a finite number that is not negative", value)
        self.parameters = _named(parameters)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.steps = 0
        self.rate_factors: dict[str, float] = {}
        self.held: dict[str, Array] = {}
        self._decayed = {
            name for name, p in self.parameters.items() if _decays(decay_groups, name, p)
        }
        self._state: dict[str, dict[str, Array]] = {
            slot: {} for slot in (*self.slots, *self.counters)
        }

    def step(self, scale: float = 1.0, learning_rate: float | None = None) -> None:
        """Update every trained parameter that has a gradient.

        Parameters
        ----------
        scale : float
            Factor on all gradients, such as one over the number of tokens, or that of clipping.
        learning_rate : float, optional
            Of this step, from a schedule.

        Raises
        ------
        ConfigError
            If a parameter's array cannot be updated in place; nothing is changed then.
        """
        rate = self.learning_rate if learning_rate is None else learning_rate
        due = [(n, p, *p.grad_and_rows) for n, p in self.parameters.items() if p.requires_grad]
        due = [entry for entry in due if entry[2] is not None]
        for name, parameter, _, _ in due:
            flags = parameter.data.flags
            if not (flags.c_contiguous and flags.writeable):
                # A backend walks the flat array: of any other it would update a copy, in silence.
                raise ConfigError(f"parameter '{name}' is not a writeable, C-contiguous array")
        self.steps += 1
        updates = []
        for name, parameter, grad, rows in due:
            assert grad is not None
            decay = self.weight_decay if name in self._decayed else 0.0
            own = rate * self.rate_factors.get(name, 1.0)
            updates.append(_Update(name, parameter.data, grad, rows, own, decay))
        self._apply(updates, scale)

    @abstractmethod
    def _apply(self, updates: list[_Update], scale: float) -> None:
        """Step these parameters."""

    def _slot(self, slot: str, name: str, like: Array) -> Array:
        arrays = self._state[slot]
        if name not in arrays:
            arrays[name] = lasting(like.shape, like.dtype)
        return arrays[name]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters.values():
            parameter.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return ``steps`` and every state array as ``"<slot>/<parameter>"``."""
        state: dict[str, Any] = {"steps": self.steps}
        for slot, arrays in self._state.items():
            state |= {f"{slot}/{name}": array for name, array in arrays.items()}
        return state | {f"{_HELD}/{name}": array for name, array in self.held.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises
        ------
        CheckpointError
            If an array belongs to no parameter here, is missing, or has another shape or dtype;
            nothing is changed then.
        """
        fresh: dict[str, dict[str, Array]] = {slot: {} for slot in (*self._state, _HELD)}
        if "steps" not in state:
            raise CheckpointError("optimizer state 'steps' is missing")
        for key, value in state.items():
            if key == "steps":
                continue
            slot, _, name = key.partition("/")
            if slot not in fresh or name not in self.parameters:
                raise CheckpointError(f"optimizer state '{key}' belongs to no parameter here")
            data = self.parameters[name].data
            counts = slot in self.counters
            expected = (np.dtype(np.int64), ()) if counts else (data.dtype, data.shape)
            if (value.dtype, value.shape) != expected:
                raise CheckpointError(
                    f"optimizer state '{key}' is {value.dtype}{list(value.shape)}, "
                    f"expected {expected[0]}{list(expected[1])}"
                )
            fresh[slot][name] = np.array(value, order="C")
        held = fresh.pop(_HELD)
        for name in {name for arrays in fresh.values() for name in arrays}:
            for slot, arrays in fresh.items():
                if name not in arrays:
                    raise CheckpointError(f"optimizer state '{slot}/{name}' is missing")
        self._state, self.steps, self.held = fresh, int(state["steps"]), held


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, as PyTorch's (``buf = momentum buf + g``).

    Parameters
    ----------
    parameters, learning_rate, weight_decay, decay_groups
        See :class:`Optimizer`; the decay is added to the gradient.
    momentum : float
        In [0, 1).
    nesterov : bool
        Step along ``g + momentum buf`` instead of ``buf``.
    """

    slots = ("momentum",)

    def __init__(
        self,
        parameters: Mapping[str, Parameter] | Iterable[Parameter],
        learning_rate: float = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        decay_groups: DecayGroups = "matrices",
    ):
        super().__init__(parameters, learning_rate, weight_decay, decay_groups)
        _require(0 <= momentum < 1, "momentum", "a number in [0, 1)", momentum)
        _require(not nesterov or momentum > 0, "nesterov", "a momentum beside it", nesterov)
        self.momentum, self.nesterov = momentum, nesterov

    def _apply(self, updates: list[_Update], scale: float) -> None:
        for update in updates:
            first = update.name not in self._state["momentum"]
            buffer = self._slot("momentum", update.name, update.data) if self.momentum else None
            get_backend().sgd(
                update.data, update.grad, buffer, update.rate, self.momentum, update.decay,
                self.nesterov, first, scale,
            )  # fmt: skip


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2): the decay is apart from the gradient.

    Parameters
    ----------
    parameters, learning_rate, weight_decay, decay_groups
        See :class:`Optimizer`.
    betas : tuple of float
        Decay rates of the two moments, each in [0, 1).
    eps : float
        Added to the root of the second moment.
    """

    slots = ("first_moment", "second_moment")
    #: The bias of the moments depends on a parameter's own updates: it may be unfrozen late.
    counters = ("updates",)
    _decoupled = True

    def __init__(
        self,
        parameters: Mapping[str, Parameter] | Iterable[Parameter],
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decay_groups: DecayGroups = "matrices",
    ):
        super().__init__(parameters, learning_rate, weight_decay, decay_groups)
        _require(len(betas) == 2, "betas", "two numbers", betas)
        for beta in betas:
            _require(0 <= beta < 1, "betas", "numbers in [0, 1)", beta)
        _require(eps > 0, "eps", "a positive number", eps)
        self.betas, self.eps = betas, eps
        #: Rows whose moments may differ from 0, of parameters that ever had a gradient in some.
        self._used_rows: dict[str, Array] = {}

    def _apply(self, updates: list[_Update], scale: float) -> None:
        tensors = []
        for update in updates:
            first, second = (self._slot(slot, update.name, update.data) for slot in self.slots)
            count = self._state["updates"].setdefault(update.name, np.zeros((), np.int64))
            count += 1
            rows = self._rows_in_use(update.name, update.rows, first, second)
            tensors.append(
                AdamwTensor(
                    update.data, update.grad, first, second, update.rate, update.decay, int(count),
                    rows,
                )
            )  # fmt: skip
        get_backend().adamw_many(tensors, *self.betas, self.eps, scale, self._decoupled)

    def _rows_in_use(
        self, name: str, rows: Array | None, first: Array, second: Array
    ) -> Array | None:
        """Return which rows are not 0 in the gradient and both moments; None: any may be."""
        if rows is None:
            self._used_rows.pop(name, None)
            return None
        if name not in self._used_rows:
            used = np.zeros(len(first), bool)
            for moment in (first, second):
                used |= moment.any(axis=tuple(range(1, moment.ndim)))
            self._used_rows[name] = used
        self._used_rows[name] |= rows
        return self._used_rows[name]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Optimizer.load_state_dict`."""
        super().load_state_dict(state)
        self._used_rows = {}


class Adam(AdamW):
    """Adam (Kingma and Ba 2015); a weight decay is added to the gradient (L2).

    Parameters as :class:`AdamW`, with no decay by default.
    """

    _decoupled = False

    def __init__(
        self,
        parameters: Mapping[str, Parameter] | Iterable[Parameter],
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay_groups: DecayGroups = "matrices",
    ):
        super().__init__(parameters, learning_rate, betas, eps, weight_decay, decay_groups)


def _named(parameters: Mapping[str, Parameter] | Iterable[Parameter]) -> dict[str, Parameter]:
    named: dict[str, Parameter] = {}
    if isinstance(parameters, Mapping):
        named.update(parameters)
    else:
        for index, parameter in enumerate(parameters):
            name = parameter.name or f"parameter_{index}"
            if name in named:
                raise ConfigError(f"two parameters are called '{name}'")
            named[name] = parameter
    seen: dict[int, str] = {}
    for name, parameter in named.items():
        first = seen.setdefault(id(parameter), name)
        if first != name:  # a tied one: it would be updated twice, and counted twice in the norm
            raise ConfigError(f"'{first}' and '{name}' are one parameter")
    return named


def _decays(groups: DecayGroups, name: str, parameter: Parameter) -> bool:
    if callable(groups):
        return groups(name, parameter)
    if groups not in ("matrices", "all"):
        raise ConfigError(f"decay_groups is {groups!r}, expected 'matrices', 'all' or a callable")
    return groups == "all" or parameter.data.ndim >= 2


def _require(holds: bool, name: str, expected: str, found: Any) -> None:
    if not holds:
        raise ConfigError(f"{name} is {found!r}, expected {expected}")
