"""What can be wrong with a reward model, by its held-out pairs."""

from __future__ import annotations

import math
from typing import Any

from loopos.reporting.findings import Finding, Rule, shown
from loopos.reporting.records import RunRecords, number

__all__ = ["RULES"]

#: Held-out accuracy below which a reward model says next to nothing. The weakest published one for
#: TL;DR (Huang et al. 2024) has 0.628.
WEAK = 0.55
#: Held-out pairs below which nothing is said of a reward model but that they are too few.
PAIRS = 50
#: Standard errors above one half that an accuracy must be to be no chance, and above its limit that
#: a correlation must be.
STANDARD_ERRORS = 2.0
#: A quarter of the variance of scores is then that of lengths.
LENGTH_CORRELATION = 0.5
#: Mean distance of confidence and accuracy (Guo et al. 2017), and pairs that can tell it.
CALIBRATION = 0.1
CALIBRATION_PAIRS = 100


def too_few_pairs(run: RunRecords) -> Finding | None:
    """Figures of a few pairs: what looks like a fault of the reward model may be chance."""
    figures = _pairs(run)
    count = figures.get("count", 0.0)
    if not 0 < count < PAIRS:
        return None
    return Finding(
        "few_held_out_pairs", False, run.name,
        "There are too few held-out pairs to tell how good the reward model is.",
        f"{_count(figures)} held-out pairs, over which chance alone gives an accuracy of up to "
        f"{shown(_chance(count))}", (),
        f"Hold out {PAIRS} pairs or more; some hundreds tell small differences too.",
    )  # fmt: skip


def weak(run: RunRecords) -> Finding | None:
    """Held-out accuracy near one half: PPO would climb what is noise.

    The standard error of a share is that of tossed coins, ``sqrt(0.25 / n)``.
    """
    figures = _enough_pairs(run)
    accuracy = figures.get("accuracy")
    if accuracy is None:
        return None
    chance = _chance(figures["count"])
    if accuracy >= max(WEAK, chance):
        return None
    return Finding(
        "weak_reward_model", True, run.name, "The reward model is hardly better than chance.",
        f"{_accuracy(figures)}; chance alone gives up to {shown(chance)}, published ones have "
        "0.63 to 0.69", (),
        "More preferences, a larger or better pretrained body, or a higher learning rate; do not "
        "start PPO from it." + (" More held-out pairs would tell." if chance > WEAK else ""),
    )  # fmt: skip


def below_length_rule(run: RunRecords) -> Finding | None:
    """Choosing by length alone is better: the scores add nothing to a ruler.

    Singhal et al. 2023, "A long way to go", show how much of what reward models reward is length.
    Better by more than the standard error of a difference of two shares, ``sqrt(2 * 0.25 / n)``.
    """
    figures = _enough_pairs(run)
    accuracy, longer = figures.get("accuracy"), figures.get("longer_accuracy")
    if accuracy is None or longer is None:
        return None
    error = math.sqrt(0.5 / figures["count"])
    if max(longer, 1 - longer) - accuracy <= error:
        return None
    which = "longer" if longer >= 0.5 else "shorter"
    return Finding(
        "below_length_rule", True, run.name,
        f"Choosing the {which} response does better than the reward model.",
        f"{_accuracy(figures)}; the {which} one is right in {shown(max(longer, 1 - longer))} "
        f"(noise {shown(error)})", (),
        "More preferences, pairs of like length among them, or a better body.",
    )  # fmt: skip


def follows_length(run: RunRecords) -> Finding | None:
    """Scores that go with length: PPO will make responses longer (or shorter) for their own sake.

    Singhal et al. 2023 find most of the reward that PPO gains on such models to be length. The
    standard error of a correlation over both responses of n pairs is about ``1 / sqrt(2 n)``.
    """
    figures = _enough_pairs(run)
    correlation = figures.get("length_correlation")
    if correlation is None:
        return None
    noise = STANDARD_ERRORS / math.sqrt(2 * figures["count"])
    if abs(correlation) <= LENGTH_CORRELATION + noise:
        return None
    return Finding(
        "score_follows_length", True, run.name, "The scores follow the length of the responses.",
        f"correlation of score and length {shown(correlation)} over {_count(figures)} held-out "
        "pairs", (),
        "Balance the lengths of chosen and rejected responses, or let a second reward, with a "
        "weight of its own, cost what is too long.",
    )  # fmt: skip


def miscalibrated(run: RunRecords) -> Finding | None:
    """Differences of scores promise more, or less, certainty than there is."""
    figures = _pairs(run)
    error, count = figures.get("calibration_error"), figures.get("count") or 0
    if error is None or error <= CALIBRATION or count < CALIBRATION_PAIRS:
        return None
    return Finding(
        "miscalibrated", False, run.name, "The scores are surer than they are right, or less sure.",
        f"calibration error {shown(error)} over {_count(figures)} held-out pairs", (),
        "Train for one epoch only, with a lower rate, or set training.centering_coefficient to "
        "0.01; a reward_normalisation sets the scale for PPO.",
    )  # fmt: skip


def _pairs(run: RunRecords) -> dict[str, float]:
    """Return the held-out figures of pairs; empty for what is no reward model."""
    found: Any = run.last_evaluation
    if "longer_accuracy" not in found:
        found = found.get("reward_model")
        if any(_pairs(part) for part in run.parts):
            return {}  # a run that trained its reward model repeats what is said of that part
    if not isinstance(found, dict) or "longer_accuracy" not in found:
        return {}
    return {name: value for name, v in found.items() if (value := number(v)) is not None}


def _enough_pairs(run: RunRecords) -> dict[str, float]:
    """Return the held-out figures where they are of enough pairs to judge by."""
    figures = _pairs(run)
    return figures if figures.get("count", 0.0) >= PAIRS else {}


def _chance(count: float) -> float:
    """Return the accuracy that tossed coins may reach over so many pairs."""
    return min(1.0, 0.5 + STANDARD_ERRORS * math.sqrt(0.25 / count))


def _accuracy(figures: dict[str, float]) -> str:
    return f"held-out accuracy {shown(figures['accuracy'])} over {_count(figures)} pairs"


def _count(figures: dict[str, float]) -> str:
    return f"{int(figures.get('count') or 0):,}"


RULES: tuple[Rule, ...] = (too_few_pairs, weak, below_length_rule, follows_length, miscalibrated)
