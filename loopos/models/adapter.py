"""Low-rank updates of linear layers, and how they are configured; see :mod:`loopos.models.lora`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loopos import ops
from loopos.autograd import Parameter, Tensor
from loopos.data.batch import Batch
from loopos.errors import ConfigError
from loopos.ops import DropoutKeys

#: Every linear layer but the language-model head.
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how.

    Attributes
    ----------
    rank : int
        Rank of the update: the width between the two matrices of an adapter.
    alpha : float
        The update is ``alpha / rank * B A``.
    target_modules : "all-linear" or tuple of str
        Which linear layers: all of them, or those whose name ends so, by loopos' names ("q", "k",
        "v", "o", "gate", "up", "down") or by those of the model's family, as PEFT has them
        ("q_proj", "c_attn").
    dropout : float
        Rate on what enters the update, in [0, 1).
    rslora : bool
        Scale the update by ``alpha / sqrt(rank)`` instead (Kalajdzievski 2023).

    Raises
    ------
    ConfigError
        If a value does not fit, naming its key.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, expected: str) -> None:
            if not holds:
                found = getattr(self, name)
                raise ConfigError(f"training.lora.{name}: expected {expected}, found {found!r}")

        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        require("rank", whole and self.rank >= 1, "a whole number of at least 1")
        for name, limit, expected in (
            ("alpha", sys.float_info.max, "a positive number"),
            ("dropout", 1.0, "a number in [0, 1)"),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(name, number and 0 <= value < limit, expected)
            object.__setattr__(self, name, float(value))
        require("alpha", self.alpha > 0, "a positive number")
        require("rslora", isinstance(self.rslora, bool), "true or false")
        names = self.target_modules
        if not isinstance(names, str):
            fits = isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)
            require("target_modules", fits and len(names) > 0, "'all-linear' or names of layers")
            object.__setattr__(self, "target_modules", tuple(names))
        else:
            expected = "'all-linear' or a list of names"
            require("target_modules", names == ALL_LINEAR, expected)

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapter:
    """The update of one linear layer, or of several with one input that a file holds as one.

    ``W + scale B A`` without ever forming it (Hu et al. 2021, "LoRA", equation 3).

    Parameters
    ----------
    down : Parameter [rank, in]
        A, one for all layers of the adapter.
    up : mapping of str to Parameter [out, rank]
        B of each layer, by the layer's name.
    scale : float
        Of the update.
    dropout : float
        Rate on what enters A; acts only when dropout keys are given.
    """

    def __init__(self, down: Parameter, up: Mapping[str, Parameter], scale: float, dropout: float):
        self.a, self.b = down, dict(up)
        self.scale, self.dropout = scale, dropout

    def named(self) -> Iterator[tuple[str, Parameter]]:
        """Yield its parameters by name."""
        yield self.a.name, self.a
        for parameter in self.b.values():
            yield parameter.name, parameter

    def down(self, x: Tensor, batch: Batch, dropout: DropoutKeys | None) -> Tensor:
        """Return ``A dropout(x)``, ``[N, rank]``."""
        dropped = ops.dropout(x, self.dropout, dropout, batch.offsets, batch.sample_ids)
        return ops.linear(dropped, self.a)

    def add_to(self, name: str, y: Tensor, low: Tensor) -> Tensor:
        """Return the output `y` of layer `name`, updated by `low`, which :meth:`down` gave."""
        return ops.add(y, ops.linear(low, self.b[name]), self.scale)
