"""Which figures a page shows, in which order, under which names; and the few at its top."""

from __future__ import annotations

import numpy as np

from loopos.reporting.charts import Chart, chart
from loopos.reporting.findings import ends, shown
from loopos.reporting.records import RunRecords

__all__ = ["charts_of", "constants_of", "main_chart", "tiles_of"]

#: Title and unit of what is known; all else has its own name.
_KNOWN: dict[str, dict[str, tuple[str, str]]] = {
    "Learning": {
        "reward/score": ("Score", "mean of the responses"),
        "loss": ("Loss", ""),
        "perplexity": ("Perplexity", ""),
        "accuracy": ("Accuracy", "held-out"),
        "rewards/accuracy": ("Accuracy in training", "share of pairs"),
        "answer_accuracy": ("Right answers", "held-out"),
        "f1_macro": ("F1, macro", "held-out"),
        "reward/total": ("Score less the cost of KL", "a response"),
        "margin": ("Margin", "held-out"),
        "rewards/margin": ("Margin in training", "chosen less rejected"),
        "rewards/chosen": ("Reward of the chosen", ""),
        "rewards/rejected": ("Reward of the rejected", ""),
    },
    "Policy": {
        "kl/mean": ("KL to the reference", "nats a response"),
        "kl/exact": ("KL, exact", "nats a response"),
        "entropy": ("Entropy", "nats a token"),
        "kl/coefficient": ("KL coefficient", ""),
        "ppo/policy_loss": ("Policy loss", ""),
        "ppo/value_loss": ("Value loss", ""),
        "value/explained_variance": ("Explained variance of the critic", ""),
        "ppo/approx_kl": ("KL of the updates", "approximate"),
        "ppo/clip_fraction": ("Clipped", "share of tokens"),
        "ppo/ratio_max": ("Highest ratio", ""),
        "ppo/kl_loss": ("KL in the loss", ""),
        "grpo/score_std": ("Spread of scores in a group", ""),
        "grpo/flat_groups": ("Groups with one score", ""),
    },
    "Responses": {
        "response/length": ("Length of the responses", "tokens"),
        "response/eos_fraction": ("Responses that end", "share"),
    },
    "Optimiser and speed": {
        "learning_rate": ("Learning rate", ""),
        "grad_norm": ("Norm of the gradient", ""),
        "ppo/updates": ("Updates a step", ""),
        "tokens_per_s": ("Speed", "tokens/s"),
        "time_s": ("Time of a step", "s"),
        "time/rollout_s": ("Time of the samples", "s"),
        "time/reward_s": ("Time of the reward", "s"),
        "time/update_s": ("Time of the updates", "s"),
        "tokens": ("Tokens of a step", ""),
    },
}
#: The group of what is not known.
OTHERS = "Other figures"
#: The first of these that a run has is shown large.
_MAIN = ("reward/score", "loss", "accuracy")
#: Figures of evaluations that say how they were made, not how good the model is.
_NO_CURVE = {"count", "left_out"}


def main_chart(run: RunRecords) -> Chart | None:
    """Return the chart that says most of a run."""
    for name in _MAIN:
        made = chart(run, name, *_KNOWN["Learning"][name], large=True)
        if made is not None:
            return made
    return None


def charts_of(run: RunRecords, without: str = "") -> dict[str, list[Chart]]:
    """Return the charts of a run but one, by group; a group without any is left out."""
    names = dict.fromkeys([*run.figures, *run.evaluated_figures])
    names.pop(without, None)
    known = {name for group in _KNOWN.values() for name in group}
    groups = {title: dict(figures) for title, figures in _KNOWN.items()}
    rest = [name for name in names if name not in known | _NO_CURVE]
    groups[OTHERS] = {name: (name, _held_out_only(run, name)) for name in rest}
    found = {
        title: [made for name, (said, unit) in figures.items() if name in names
                and (made := chart(run, name, said, unit)) is not None]
        for title, figures in groups.items()
    }  # fmt: skip
    return {title: charts for title, charts in found.items() if charts}


def _held_out_only(run: RunRecords, name: str) -> str:
    return "" if name in run.figures else "held-out"


def constants_of(run: RunRecords) -> dict[str, str]:
    """Return the figures of steps that have one value throughout, which need no curve."""
    titles = {name: title for group in _KNOWN.values() for name, (title, _) in group.items()}
    found = {}
    for name in run.figures:
        values = run.series(name).values
        if values.size == len(run.steps) and np.ptp(values) == 0:
            said = titles.get(name, name)
            found[said if said[:2].isupper() else said[0].lower() + said[1:]] = shown(
                float(values[0])
            )
    return found


def tiles_of(run: RunRecords) -> list[tuple[str, str, str]]:
    """Return the figures at the top: what, its value, and what it was at the start."""
    tiles = []
    policy = "reward/score" in run.figures
    names = ("reward/score", "kl/mean", "entropy", "response/length") if policy else ("loss",)
    said = {"reward/score": "Score", "kl/mean": "KL, nats", "entropy": "Entropy, nats",
            "response/length": "Tokens a response", "loss": "Training loss"}  # fmt: skip
    for name in names:
        series = run.series(name)
        if len(series):
            found = ends(series)
            first, last = (
                (found.first, found.last)
                if found is not None
                else (float(series.values[0]), float(series.values[-1]))
            )
            tiles.append((said[name], shown(last), f"from {shown(first)}"))
    tiles += _held_out_tiles(run)
    spent, tokens = run.series("time_s").values, run.series("tokens").values
    if spent.size:
        tiles.append(("Time of the steps", duration(float(spent.sum())), f"{len(spent):,} steps"))
    if tokens.size and spent.size and spent.sum() > 0:
        tiles.append(
            ("Tokens", f"{tokens.sum():,.0f}", f"{tokens.sum() / spent.sum():,.0f} a second")
        )
    return tiles


def _held_out_tiles(run: RunRecords) -> list[tuple[str, str, str]]:
    names = ("reward/score", "accuracy", "answer_accuracy", "r2", "f1_macro", "perplexity", "loss")
    said = {"reward/score": "score", "f1_macro": "F1", "answer_accuracy": "right answers"}
    figures = run.last_evaluation
    for name in names:
        value = figures.get(name)
        if isinstance(value, float):
            count = figures.get("count")
            over = f"over {count:,}" if isinstance(count, int) else f"step {run.last_step}"
            return [(f"Held-out {said.get(name, name)}", shown(value), over)]
    return []


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
