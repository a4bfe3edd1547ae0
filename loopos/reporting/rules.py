"""What can be wrong with any run: each rule one function, its reason and its source beside it."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from loopos.reporting.findings import MIN_STEPS, Ends, Finding, Rule, ends, first_step, shown
from loopos.reporting.records import Array, RunRecords, Series, number

__all__ = ["RULES"]

#: The loss at the end over the loss at the start, from which a run has diverged; and by how many
#: standard errors of the difference.
DIVERGED, DIVERGED_ERRORS = 1.1, 2.0
#: A run whose last values are all so many times as high as its start has run away.
RUN_AWAY, RUN_AWAY_STEPS = 2.0, 3
#: A spike is this many (robust) standard deviations above what was before it...
SPIKE_DEVIATIONS = 6.0
#: ...and this many times as high; so many of them are too many.
SPIKE_FACTOR = 1.5
#: ...and at least this share of the loss at the start higher: a loss near 0 may well wobble.
SPIKE_SHARE = 0.1
SPIKES = 3
#: Steps before a step that say what is usual there.
SPIKE_WINDOW = 20
#: A loss that fell by less than this share has not moved.
MOVED = 0.01
#: Steps before a loss should have moved, and a speed be known.
JUDGED_STEPS = 20
#: The held-out loss over its best, from which it is worse.
OVERFITTED = 1.05
#: Speed at the end over the speed at the start, below which something holds the run up.
SLOWER = 0.5
#: Share of the rows that may be left out, and of the validation rows that may be known already.
DROPPED_SHARE = 0.1
LEAKED_SHARE = 0.01
#: Methods that train on tokens of texts, which 'loopos preview' shows.
PREVIEWED = ("autoregressive", "chain_of_thought", "sft")


def not_finite(run: RunRecords) -> Finding | None:
    """NaN or infinity in the records.

    Numbers beyond float32 come of steps that are too large far more often than of a fault in the
    data: the remedy that every training guide begins with is a lower rate.
    """
    bad = {name: steps[0] for name in run.figures if (steps := run.not_finite(name))}
    if not bad:
        return None
    name, step = min(bad.items(), key=lambda item: item[1])
    return Finding(
        "not_finite", True, run.name, "A figure is not a finite number.",
        f"{name} at step {step}" + (f", {len(bad) - 1} others later" if len(bad) > 1 else ""),
        (step,),
        "Lower training.learning_rate to a third, set training.max_grad_norm to 1.0, "
        "and add training.warmup_steps.",
    )  # fmt: skip


def diverged(run: RunRecords) -> Finding | None:
    """A loss that ends above where it began, beyond its noise: the learning rate is too high.

    Of methods with a fixed objective only: the losses of PPO and GRPO are of another sample at
    each step, and have no direction.
    """
    found = _judged_loss(run)
    if found is None or not _rises(found):
        return None
    return Finding(
        "learning_rate_too_high", True, run.name, "The loss ends above where it began.",
        f"loss {found}", found.end_steps,
        _lower(run, "a third") + " More warm-up and max_grad_norm 1.0 help too.",
    )  # fmt: skip


def _judged_loss(run: RunRecords) -> Ends | None:
    """Return both ends of a loss that has a direction, of a run that is long enough."""
    series = run.series("loss")
    found = None if _is_policy(run) or len(series) < JUDGED_STEPS else ends(series)
    return found if found is not None and found.first > 0 else None


def _rises(found: Ends) -> bool:
    """Whether a loss ends higher than its noise can make it."""
    beyond = found.last - found.first > DIVERGED_ERRORS * found.noise
    # A loss that multiplies from step to step makes more noise than it rises.
    away = bool(found.end[-RUN_AWAY_STEPS:].min() > RUN_AWAY * found.first)
    return found.last > DIVERGED * found.first and (beyond or away)


def spikes(run: RunRecords) -> Finding | None:
    """Several jumps of the loss far above what it was: the learning rate is at its limit.

    Spikes of this kind are reported of large runs (Chowdhery et al. 2022, PaLM, section 5.1); a
    few are recovered from. Measured against the median and its absolute deviation before each.
    """
    series = Series(np.zeros(0), np.zeros(0)) if _is_policy(run) else run.series("loss")
    high = _spikes(series)
    if high.sum() < SPIKES:
        return None
    steps = series.steps[high]
    listed = ", ".join(map(str, steps[:5].tolist())) + (", ..." if steps.size > 5 else "")
    return Finding(
        "loss_spikes", True, run.name, "The loss jumps again and again.",
        f"{steps.size} jumps, at steps {listed}; the highest is {shown(series.values[high].max())}",
        first_step(series, high),
        _lower(run, "half") + " Set training.max_grad_norm to 1.0 if it is not set.",
    )  # fmt: skip


def _spikes(series: Series) -> Array:
    values, high = series.values, np.zeros(len(series), bool)
    least = SPIKE_SHARE * float(np.abs(values[:SPIKE_WINDOW]).mean()) if len(series) else 0.0
    if len(series) <= SPIKE_WINDOW:
        return high
    before = sliding_window_view(values[:-1], SPIKE_WINDOW)
    middle = np.median(before, axis=1)
    deviation = 1.4826 * np.median(np.abs(before - middle[:, None]), axis=1)
    above = np.maximum(SPIKE_DEVIATIONS * deviation, (SPIKE_FACTOR - 1) * middle)
    above = np.maximum(above, least)
    high[SPIKE_WINDOW:] = (middle > 0) & (values[SPIKE_WINDOW:] > middle + above)
    return high


def nothing_moves(run: RunRecords) -> Finding | None:
    """A loss that stays where it was: the rate is too low, or nothing in the data can be learnt."""
    found = _judged_loss(run)
    if found is None or found.last <= (1 - MOVED) * found.first or _rises(found):
        return None
    held_out = run.evaluated("loss").values
    if held_out.size > 1 and held_out.min() < (1 - MOVED) * held_out[0]:
        return None
    return Finding(
        "no_progress", True, run.name, "The loss does not fall.",
        f"loss {found}{_rate(run)}", found.end_steps,
        "Raise training.learning_rate (three times, then ten times), or train longer; if it stays, "
        + ("look at its texts with 'loopos preview'." if run.method in PREVIEWED
           else "look at labels and texts: see data_report.json in the run directory."),
    )  # fmt: skip


def overfitting(run: RunRecords) -> Finding | None:
    """Held-out loss rises from its best while the training loss goes on falling.

    A held-out accuracy that does not fall with it, but for one standard error, makes it a note:
    the model only grows too sure of itself (Guo et al. 2017).
    """
    held_out, losses = run.evaluated("loss"), run.series("loss")
    if len(held_out) < 3 or _is_policy(run):
        return None
    best = int(held_out.values.argmin())
    low, last = float(held_out.values[best]), float(held_out.values[-1])
    if low <= 0 or last <= OVERFITTED * low:
        return None
    before = losses.values[losses.steps <= held_out.steps[best]][-MIN_STEPS:]
    after = losses.values[-MIN_STEPS:]
    if not before.size or not after.size or after.mean() >= before.mean():
        return None
    accuracy = run.evaluated("accuracy")
    still = len(accuracy) == len(held_out) and bool(
        accuracy.values[-1] >= accuracy.values[best] - _standard_error(run)
    )
    then, now = shown(float(before.mean())), shown(float(after.mean()))
    evidence = (
        f"held-out loss {shown(low)} at step {held_out.steps[best]}, {shown(last)} at the end; "
        f"training loss {then} there, {now} at the end"
    )
    if still:
        evidence += (
            f"; held-out accuracy held, {shown(float(accuracy.values[best]))} to "
            f"{shown(float(accuracy.values[-1]))} (noise {shown(_standard_error(run))})"
        )
    return Finding(
        "overfitting", not still, run.name,
        "The model grows surer than it is right." if still
        else "The model learns the training data by heart.",
        evidence, (int(held_out.steps[best]), int(held_out.steps[-1])),
        "Train for fewer epochs or set training.early_stopping_patience; more data, dropout or "
        "weight_decay help. The model that was saved is that of the best evaluation.",
    )  # fmt: skip


def _standard_error(run: RunRecords) -> float:
    """Return that of a held-out accuracy; 0 where it is not known over how many rows it is."""
    counts = run.evaluated("count").values
    if not counts.size:
        counts = run.evaluated("asked").values  # of a chain of thought: the problems
    return float(0.5 / np.sqrt(counts[-1])) if counts.size and counts[-1] > 0 else 0.0


def slows_down(run: RunRecords) -> Finding | None:
    """Tokens per second fall to half: the machine is shared, out of memory, or waits for data."""
    series = run.series("tokens_per_s")
    found = ends(Series(series.steps[1:], series.values[1:]))  # the first step warms up
    if found is None or len(series) < JUDGED_STEPS or found.first <= 0:
        return None
    start, end = float(np.median(found.start)), float(np.median(found.end))
    if end >= SLOWER * start:
        return None
    return Finding(
        "slows_down", False, run.name, "The run grew slow.",
        f"median tokens/s {shown(start)} (steps {found.start_steps[0]} to {found.start_steps[1]}) "
        f"-> {shown(end)} (steps {found.end_steps[0]} to {found.end_steps[1]})",
        found.end_steps,
        "Look whether other programs compute on the machine or its memory is full; with plain data "
        "raise training.prefetch_batches and training.num_workers.",
    )  # fmt: skip


def rows_left_out(run: RunRecords) -> Finding | None:
    """More than a tenth of the rows cannot be used: what is trained on is not what was meant."""
    rows = number(run.data_report.get("rows")) or 0.0
    out = {name: _count(run, name) for name in ("dropped", "too_long", "ties")}
    total = sum(out.values())
    whole = rows + (number(run.data_report.get("validation_rows")) or 0.0) + total
    if not total or total <= DROPPED_SHARE * whole:
        return None
    words = {"dropped": "without text", "too_long": "too long", "ties": "without a preference"}
    said = ", ".join(f"{out[name]:,} {words[name]}" for name in out if out[name])
    return Finding(
        "rows_left_out", True, run.name, "Many rows of the data are left out.",
        f"{total:,} of {whole:,.0f} rows: {said}", (),
        "See data_report.json for the first places; check data.text_field and the files, or raise "
        "training.max_length.",
    )  # fmt: skip


def leaks(run: RunRecords) -> Finding | None:
    """Validation rows that stand in the training set too: held-out figures promise too much."""
    known = _count(run, "leaks")
    rows = number(run.data_report.get("validation_rows")) or 0.0
    if not rows or known <= LEAKED_SHARE * rows:
        return None
    return Finding(
        "leaks", True, run.name, "Held-out figures are of rows that were trained on.",
        f"{known:,} of {rows:,.0f} validation rows stand in the training data", (),
        "Take them out of one of the two files; see data_report.json for the first places.",
    )  # fmt: skip


def _count(run: RunRecords, name: str) -> int:
    found = run.data_report.get(name)
    return int(number(found.get("count")) or 0) if isinstance(found, dict) else 0


def unfinished(run: RunRecords) -> Finding | None:
    """Steps that were not made, or no model: the run goes on, was stopped, or failed."""
    if run.finished or not run.ending:
        return None
    if not run.last_step and any(unfinished(part) for part in run.parts):
        return None  # it has no step of its own yet, and its part says how far it is
    total = run.total_steps
    seen = f"step {run.last_step}" + (f" of {total}" if total is not None else "")
    if run.steps_made:
        seen += f"; {run.ending}"
    elif total is None:
        seen += "; no checkpoint has the number of its steps yet"
    if run.saved and not run.steps_made:
        seen += "; the model in it is that of before it went on"
    torn = f"; {run.torn[0]} ends in half a line, so it was killed" if run.torn else ""
    return Finding(
        "unfinished", False, run.name, "The run is not finished.",
        f"{seen}{torn}", (run.last_step,),
        "If it does not run any more, continue it with --resume, or resume=True.",
    )  # fmt: skip


def damaged_checkpoint(run: RunRecords) -> Finding | None:
    """A checkpoint that cannot be read: as they are written whole, a disk or a copy is at fault.

    Its state was not used; ``--resume`` takes the one before it.
    """
    if not run.damaged:
        return None
    return Finding(
        "damaged_checkpoint", False, run.name, "A checkpoint cannot be read.",
        "; ".join(run.damaged), (),
        "Look after the disk; --resume goes on from the newest checkpoint that is whole.",
    )  # fmt: skip


def _is_policy(run: RunRecords) -> bool:
    return "reward/score" in run.figures


def _rate(run: RunRecords) -> str:
    rate = run.series("learning_rate").values
    return f"; learning rate up to {shown(float(rate.max()))}" if rate.size else ""


def _lower(run: RunRecords, to: str) -> str:
    rate = number(run.options.get("learning_rate"))
    now = f" (now {shown(rate)})" if rate else ""
    return f"Lower training.learning_rate{now} to {to}."


RULES: tuple[Rule, ...] = (
    not_finite,
    diverged,
    spikes,
    nothing_moves,
    overfitting,
    leaks,
    rows_left_out,
    slows_down,
    unfinished,
    damaged_checkpoint,
)
