"""What a trainer of policies keeps between steps and within one, and copies of its networks."""

from __future__ import annotations

from dataclasses import dataclass

from loopos.autograd import Array
from loopos.backends.lasting import lasting_copy
from loopos.methods.rewards import Normaliser
from loopos.models.lora import without_adapters
from loopos.models.transformer import Transformer

__all__ = ["LearnerState", "Scored", "copy_of"]


@dataclass(frozen=True)
class LearnerState:
    """What changes beside weights and optimizer.

    Attributes
    ----------
    steps : int
    kl_coefficient : float
    normaliser : Normaliser
    over_budget : bool
        Whether the KL of the last evaluation was above `kl_budget`.
    """

    steps: int
    kl_coefficient: float
    normaliser: Normaliser
    over_budget: bool = False


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of a rollout: as the reward gave them, and as they count."""

    raw: Array
    final: Array
    parts: dict[str, float]
    normaliser: Normaliser


def copy_of(model: Transformer) -> Transformer:
    """Return a frozen copy of a model, adapters merged or left out as they are in it."""
    arrays = {n: lasting_copy(p.data) for n, p in without_adapters(model).parameters().items()}
    if model.unmerged:
        arrays |= {n: lasting_copy(model.parameters()[n].data) for n in model.unmerged}
    copy = Transformer(model.config, dtype=model.dtype, arrays=arrays)
    for parameter in copy.parameters().values():
        parameter.requires_grad = False
    return copy
