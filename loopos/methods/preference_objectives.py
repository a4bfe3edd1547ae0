"""What direct preference optimisation minimises, by `loss_type`: the options and the objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from loopos.autograd import Array, Tensor, no_grad
from loopos.data.batch import Batch
from loopos.data.responses import Overflow, Responses
from loopos.errors import ConfigError
from loopos.methods import losses
from loopos.methods.common import in_order, with_gradient
from loopos.methods.logprobs import Reference, ResponseLogprobs, response_logprobs
from loopos.models.transformer import Transformer
from loopos.ops import DropoutKeys
from loopos.training.loop import TrainingOptions
from loopos.training.metrics import wins

__all__ = ["LossType", "Options", "PairObjective", "SingleObjective"]

LossType = Literal["sigmoid", "ipo", "hinge", "orpo", "simpo", "kto"]

#: Which losses heed an option that others would ignore.
_HEEDED: dict[str, tuple[str, ...]] = {
    "label_smoothing": ("sigmoid",),
    "simpo_margin": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference_free": ("sigmoid", "ipo", "hinge"),
    "nll_coefficient": ("sigmoid", "ipo", "hinge", "orpo", "simpo"),
}
#: Losses without any reference, on log-probabilities of a token in the mean.
_MEANS = ("orpo", "simpo")
_SIMPO_MARGIN = 1.0


@dataclass(frozen=True)
class Options(TrainingOptions):
    """Options of direct preference optimisation, beside those of every run.

    Attributes
    ----------
    loss_type : {"sigmoid", "ipo", "hinge", "orpo", "simpo", "kto"}
        DPO's loss, IPO's, SLiC's hinge; ORPO and SimPO, which need no reference; KTO, on responses
        that are good or bad by themselves.
    beta : float or None
        How strongly the policy is held to the reference; of "orpo" the weight of the odds ratio.
        None means 0.1, of "simpo" 2.
    label_smoothing : float
        Share of pairs that are believed to be the wrong way round, in [0, 0.5); of "sigmoid".
    simpo_margin : float or None
        By how much "simpo" wants the chosen response to lead; None means 1.
    desirable_weight, undesirable_weight : float
        Of good and bad responses, of "kto".
    nll_coefficient : float or None
        Weight of the cross-entropy of the chosen response; None means 1 for "orpo", else 0.
    reference_free : bool
        Take a reference that finds all responses equally probable; of "sigmoid", "ipo", "hinge".
    precompute_reference : bool
        Compute what the reference says once, before the first step, and not in every step.
    max_length : int or None
        Tokens of prompt and response at the most; None takes ``max_seq_len``.
    overflow : {"drop", "error"}
        What becomes of rows with a longer response: left out and reported, or refused.
    dropout : bool
        Whether the model's dropout acts in training.
    """

    loss_type: LossType = "sigmoid"
    beta: float | None = None
    label_smoothing: float = 0.0
    simpo_margin: float | None = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    nll_coefficient: float | None = None
    reference_free: bool = False
    precompute_reference: bool = True
    max_length: int | None = None
    overflow: Overflow = "drop"
    dropout: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("loss_type", LossType), ("overflow", Overflow)):
            found, known = getattr(self, name), get_args(kind)
            if found not in known:
                expected = ", ".join(f'"{choice}"' for choice in known)
                raise ConfigError(f"training.{name}: expected one of {expected}, found {found!r}")
        for name in ("reference_free", "precompute_reference", "dropout"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"training.{name}: expected true or false, found {getattr(self, name)!r}"
                )
        for name, least, most, expected in (
            ("beta", 1e-9, 1e9, "a positive number"),
            ("label_smoothing", 0.0, 0.499999, "a number in [0, 0.5)"),
            ("simpo_margin", 0.0, 1e9, "a number that is not negative"),
            ("desirable_weight", 0.0, 1e9, "a number that is not negative"),
            ("undesirable_weight", 0.0, 1e9, "a number that is not negative"),
            ("nll_coefficient", 0.0, 1e9, "a number that is not negative"),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and least <= value <= most):
                raise ConfigError(f"training.{name}: expected {expected}, found {value!r}")
        for name, heeding in _HEEDED.items():
            changed = getattr(self, name) != type(self).__dataclass_fields__[name].default
            if changed and self.loss_type not in heeding:
                raise ConfigError(f"training.{name}: the loss '{self.loss_type}' has none")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"training.max_length: expected at least 2, found {self.max_length}")

    @property
    def strength(self) -> float:
        """What `beta` means."""
        return self.beta if self.beta is not None else 2.0 if self.loss_type == "simpo" else 0.1

    @property
    def cross_entropy(self) -> float:
        """What `nll_coefficient` means."""
        default = 1.0 if self.loss_type == "orpo" else 0.0
        return default if self.nll_coefficient is None else self.nll_coefficient

    @property
    def needs_reference(self) -> bool:
        """Whether the loss asks a reference."""
        return self.loss_type not in _MEANS and not self.reference_free


class PairObjective:
    """The losses on pairs, chosen and rejected response one after the other."""

    def __init__(self, model: Transformer, reference: Reference, options: Options):
        self._model, self.reference, self._options = model, reference, options
        self._sums: dict[str, float] = {}

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return the pairs, and the tokens of chosen responses where their loss counts."""
        counts = {"preference": float(batch.num_sequences // 2)}
        if self._options.cross_entropy > 0:
            counts["nll"] = float(np.add.reduceat(batch.loss_mask, batch.offsets[:-1],
                                                  dtype=np.int64)[0::2].sum())  # fmt: skip
        return counts

    def losses(self, batch: Batch, dropout: DropoutKeys | None) -> dict[str, Tensor]:
        """Return the sum of each term over the pairs of a batch."""
        options = self._options
        found = response_logprobs(self._model, batch, dropout if options.dropout else None)
        reference = self.reference.sums(batch)
        total, *grads = self.preference(found, reference)
        self._add(found, reference)
        gradient = found.gradient(np.stack(grads, axis=1).reshape(-1))
        terms = {"preference": with_gradient(total, [found.tokens], [gradient])}
        if options.cross_entropy > 0:
            gradient = np.where(found.owner % 2 == 0, -options.cross_entropy, 0.0)
            total = -options.cross_entropy * float(found.sums[0::2].sum())
            terms["nll"] = with_gradient(
                total, [found.tokens], [gradient.astype(found.tokens.dtype)]
            )
        return terms

    def preference(self, found: ResponseLogprobs, reference: Array) -> tuple[float, Array, Array]:
        """Return the summed loss of some pairs, and its gradients along both sums."""
        options = self._options
        chosen, rejected = found.sums[0::2], found.sums[1::2]
        lengths = found.lengths[0::2], found.lengths[1::2]
        beta, kind = options.strength, options.loss_type
        if kind == "simpo":
            margin = _SIMPO_MARGIN if options.simpo_margin is None else options.simpo_margin
            total, _, *grads = losses.simpo_loss_and_grad(chosen, rejected, *lengths, beta, margin)
        elif kind == "orpo":
            total, _, *grads = losses.orpo_loss_and_grad(chosen, rejected, *lengths)
            total, grads = beta * total, [beta * gradient for gradient in grads]
        else:
            assert kind != "kto"  # has an objective of its own
            total, _, *grads = losses.dpo_loss_and_grad(
                chosen, rejected, reference[0::2], reference[1::2], beta, kind,
                options.label_smoothing,
            )  # fmt: skip
        return total, grads[0], grads[1]

    def rewards(self, found: ResponseLogprobs, reference: Array) -> Array:
        """Return what each loss ranks responses by: beta times the (mean) log-ratio."""
        scale = found.lengths if self._options.loss_type in _MEANS else 1.0
        rewards: Array = self._options.strength * (found.sums - reference) / scale
        return rewards

    def _add(self, found: ResponseLogprobs, reference: Array) -> None:
        rewards = self.rewards(found, reference)
        chosen, rejected = rewards[0::2], rewards[1::2]
        values = {
            "pairs": chosen.size,
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/accuracy": wins(chosen - rejected).sum(),
            "rewards/margin": (chosen - rejected).sum(),
            "logps/chosen": found.sums[0::2].sum(),
            "logps/rejected": found.sums[1::2].sum(),
        }
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def figures(self) -> dict[str, float]:
        """Return the means over the pairs of the step that ends."""
        sums, self._sums = self._sums, {}
        pairs = sums.pop("pairs")
        return {name: value / pairs for name, value in sums.items()}


class SingleObjective:
    """KTO, on single responses.

    Its reference point, the KL of policy and reference, is estimated from each prompt with the
    response of another row (Ethayarajh et al. 2024, sec. 4.1), over the whole effective batch: so
    that 8 x 1 accumulated equals 1 x 8.
    """

    def __init__(
        self,
        model: Transformer,
        reference: Reference,
        others: Responses,
        reference_of_others: Reference,
        desirable: Array,
        options: Options,
    ):
        self._model, self.reference, self._options = model, reference, options
        self._others, self._reference_of_others = others, reference_of_others
        self.desirable = desirable
        self._step: list[Array] = []
        self._point: float | None = None
        self._sums: dict[str, float] = {}

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return the responses; the loop asks this of all batches of a step before any loss."""
        assert batch.labels is not None
        if self._point is not None:
            self._step, self._point = [], None
        self._step.append(batch.labels)
        return {"loss": float(batch.num_sequences)}

    def losses(self, batch: Batch, dropout: DropoutKeys | None) -> dict[str, Tensor]:
        """Return the summed loss of a batch."""
        options = self._options
        if self._point is None:
            self._point = self.reference_point(np.concatenate(self._step))
        found = response_logprobs(self._model, batch, dropout if options.dropout else None)
        desirable, reference = self.desirable[batch.labels], self.reference.sums(batch)
        total, _, gradient = losses.kto_loss_and_grad(
            found.sums, reference, desirable, self._point, options.strength,
            options.desirable_weight, options.undesirable_weight,
        )  # fmt: skip
        self._add(options.strength * (found.sums - reference), found.sums, desirable)
        return {"loss": with_gradient(total, [found.tokens], [found.gradient(gradient)])}

    def reference_point(self, which: Array, batch_tokens: int = 4096) -> float:
        """Return the estimated KL, at least 0; nothing is recorded."""
        total = 0.0
        with no_grad():
            for group in in_order(self._others.tokens.lengths[which], batch_tokens):
                batch = self._others.batch_of(which[group])
                policy = response_logprobs(self._model, batch).sums
                total += float((policy - self._reference_of_others.sums(batch)).sum())
        return max(0.0, total / len(which))

    def _add(self, rewards: Array, logps: Array, desirable: Array) -> None:
        for name, rows in (("desirable", desirable), ("undesirable", ~desirable)):
            for key, value in (("rows", rows.sum()), ("rewards", rewards[rows].sum()),
                               ("logps", logps[rows].sum())):  # fmt: skip
                self._sums[f"{key}/{name}"] = self._sums.get(f"{key}/{name}", 0.0) + float(value)

    def figures(self) -> dict[str, float]:
        """Return the means of the step that ends, of the kinds of responses that it had."""
        sums, self._sums = self._sums, {}
        found = {"kl": self._point or 0.0}
        for name in ("desirable", "undesirable"):
            rows = sums[f"rows/{name}"]
            if rows:
                found |= {f"{k}/{name}": sums[f"{k}/{name}"] / rows for k in ("rewards", "logps")}
        return found
