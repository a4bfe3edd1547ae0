"""What can be wrong with a policy that learns from its own samples (PPO, GRPO, RLOO)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from loopos.reporting.findings import MIN_STEPS, Finding, Rule, ends, first_step, shown
from loopos.reporting.records import Array, RunRecords, Series, number

__all__ = ["RULES"]

#: Nats a response. A policy of 1B over-optimises at 50 to 85 (Huang et al. 2024).
KL_LIMIT = 50.0
#: A step's KL over the mean of so many steps before it, and by how many nats, is a jump.
KL_JUMP, KL_JUMP_NATS, KL_WINDOW = 4.0, 10.0, 10
#: Entropy in nats a token below which a policy says one thing; and its share of the start's.
ENTROPY_LOW, ENTROPY_SHARE = 0.05, 0.1
#: Share of different responses in a table of samples, of two prompts or more.
DISTINCT_SHARE, TABLE_ROWS = 0.25, 8
#: Share of responses that say nothing.
EMPTY_SHARE = 0.5
#: Share of responses with a stop token that is next to none; and what it was once.
ENDED, ENDED_ONCE = 0.02, 0.1
#: Tokens of a response that is over as it begins, and how much longer it was.
SHORT_TOKENS, SHORTER = 2.0, 3.0
#: Half the mean squared log ratio: Spinning Up ends the updates of a step at 0.01 or 0.05.
APPROX_KL = 0.1
#: Of a single step: log ratios of more than 1, so probabilities e times as high or as low.
RUIN = 1.0
CLIP_FRACTION = 0.4
#: A ratio from which TRL's first trainer skipped a minibatch (its ratio_threshold).
RATIO = 10.0
#: Share of the steps in which an update may be too large.
LARGE_SHARE = 0.2
#: Below this (log ratios of a thousandth) an update changes nothing; N+ has 0.0004.
APPROX_KL_STILL = 1e-6
#: Growth of responses, and correlation of score and length, which together are suspicious.
LONGER, LENGTH_CORRELATION = 1.5, 0.5
#: Of the score's rise: how far it may stay from its highest, and vary, where a task is solved.
SOLVED = 0.1
#: Steps that such a correlation, and progress, are judged by.
JUDGED_STEPS = 20


def kl_above_budget(run: RunRecords) -> Finding | None:
    """The KL reached `kl_budget`, at which a run ends and keeps its best."""
    budget = number(run.options.get("kl_budget"))
    series = run.series("kl/mean")
    if budget is None or not len(series):
        return None
    above = series.values > budget
    patience = run.options.get("early_stopping_patience")
    if not above.any() and not (run.ended_early and patience is None):
        return None
    steps = first_step(series, above) or (run.last_step,)
    how = f"the run ended after step {run.last_step}" if run.ended_early else "steps above it"
    return Finding(
        "kl_above_budget", True, run.name, "The policy left the budget of KL to its reference.",
        f"kl_budget {shown(budget)} nats a response; KL {shown(series.values[-1])} at step "
        f"{series.steps[-1]}, {how}", steps,
        "Raise training.kl_coefficient (or set adaptive_kl_target), lower the learning rate or "
        "ppo_epochs. What was saved was within the budget.",
    )  # fmt: skip


def kl_too_high(run: RunRecords) -> Finding | None:
    """KL above what a policy survives: it writes for the reward model, not for people.

    Huang et al. 2024: at 50 to 85 nats a 1B policy was preferred in less than a fifth of cases.
    """
    series = run.series("kl/mean")
    found = ends(series)
    if found is None or found.last <= KL_LIMIT:
        return None
    return Finding(
        "kl_too_high", True, run.name, "The policy is far from its reference.",
        f"KL {found} nats a response; above {KL_LIMIT:g} policies over-optimise",
        first_step(series, series.values > KL_LIMIT),
        "Raise training.kl_coefficient or set adaptive_kl_target; training.kl_budget ends a run "
        "in time and keeps its best. Compare the samples of start and end.",
    )  # fmt: skip


def kl_jumps(run: RunRecords) -> Finding | None:
    """KL that multiplies within a step or two: an update went too far, and was not undone."""
    series = run.series("kl/mean")
    values, high = series.values, np.zeros(len(series), bool)
    if len(series) > KL_WINDOW:
        before = sliding_window_view(values[:-1], KL_WINDOW).mean(axis=1)
        high[KL_WINDOW:] = values[KL_WINDOW:] > np.maximum(KL_JUMP * before, before + KL_JUMP_NATS)
    if not high.any():
        return None
    at = int(high.argmax())
    return Finding(
        "kl_blow_up", True, run.name, "The KL to the reference blew up.",
        f"KL {shown(values[at])} nats a response at step {series.steps[at]}, "
        f"{shown(float(values[at - KL_WINDOW : at].mean()))} in the {KL_WINDOW} steps before",
        first_step(series, high),
        f"Lower training.learning_rate{_now(run, 'learning_rate')}, set target_kl to 0.02, and "
        "use fewer ppo_epochs.",
    )  # fmt: skip


def entropy_collapse(run: RunRecords) -> Finding | None:
    """Entropy near 0: the policy has stopped trying, so it can learn nothing more.

    A note where the score stays at its highest, as of a task that is solved.
    """
    series = run.series("entropy")
    found = ends(series)
    if found is None or found.last > min(ENTROPY_LOW, ENTROPY_SHARE * found.first):
        return None
    return Finding(
        "entropy_collapse", not _solved(run), run.name, "The policy says one thing only.",
        f"entropy {found} nats a token",
        first_step(series, series.values < ENTROPY_LOW),
        "Raise training.kl_coefficient or set entropy_coefficient (0.01), lower the learning rate, "
        "or stop earlier if the score is as high as it can be.",
    )  # fmt: skip


def same_responses(run: RunRecords) -> Finding | None:
    """Different prompts get the same answer: the collapse that readers of samples see first.

    A note where the score stays at its highest: that answer is what was rewarded.
    """
    step, rows = _last_table(run)
    texts = [str(row.get("response")) for row in rows]
    prompts = {str(row.get("prompt")) for row in rows}
    if len(rows) < TABLE_ROWS or len(prompts) < 2:
        return None
    distinct = len(set(texts))
    if distinct > max(1, DISTINCT_SHARE * min(len(rows), len(prompts))):
        return None
    common = max(set(texts), key=texts.count)
    return Finding(
        "same_responses", not _solved(run), run.name, "Different prompts get the same response.",
        f"{distinct} different response{'s' if distinct > 1 else ''} to {len(prompts)} prompts; "
        f"{texts.count(common)} of "
        f"{len(rows)} are {_quoted(common)}", (step,),
        "Look at what the reward gives for this text; then raise training.kl_coefficient, and "
        "lower the learning rate.",
    )  # fmt: skip


def empty_responses(run: RunRecords) -> Finding | None:
    """Responses without text, or over as they begin."""
    step, rows = _last_table(run)
    empty = sum(not str(row.get("response", "")).strip() for row in rows)
    series = run.series("response/length")
    found = ends(series)
    advice = (
        "Reward what is said, not its brevity: check the score of an empty response; a KL "
        "coefficient that is higher keeps the policy at its reference's length."
    )
    if len(rows) >= TABLE_ROWS and empty >= EMPTY_SHARE * len(rows):
        return Finding(
            "empty_responses", True, run.name, "Responses are empty.",
            f"{empty} of {len(rows)} samples have no text", (step,), advice,
        )  # fmt: skip
    if found is None or found.last > SHORT_TOKENS or found.first < SHORTER * found.last:
        return None
    return Finding(
        "empty_responses", True, run.name, "Responses end as they begin.",
        f"tokens of a response {found}", first_step(series, series.values <= SHORT_TOKENS), advice,
    )  # fmt: skip


def never_ends(run: RunRecords) -> Finding | None:
    """No response has a stop token: scores are of texts that were cut.

    A note where it was so from the beginning and no penalty asks for an end (the tokenizer may
    have none), and where the score stays at its highest all the same.
    """
    series = run.series("response/eos_fraction")
    found = ends(series)
    if found is None or found.last > ENDED:
        return None
    unlearnt = found.first > ENDED_ONCE
    asked = run.options.get("missing_eos_penalty") is not None
    advice = (
        "Set training.missing_eos_penalty, and look whether the reward pays for length."
        if unlearnt
        else "Raise training.max_new_tokens; start from a model that was fine-tuned on whole "
        "responses; name its end in training.stop_ids; set missing_eos_penalty."
    )
    return Finding(
        "never_ends", (unlearnt or asked) and not _solved(run), run.name,
        "Responses do not end, they are cut.",
        f"share of responses with a stop token {found}",
        first_step(series, series.values <= ENDED), advice,
    )  # fmt: skip


def dead_critic(run: RunRecords) -> Finding | None:
    """Explained variance at or below 0: the critic is no better than a constant.

    The figure is that of OpenAI's Baselines: 1 is a perfect critic, below 0 is worse than none.
    Judged over the second half, as a fresh critic begins there; not of a task that is solved,
    where returns hardly vary.
    """
    series = run.series("value/explained_variance")
    if len(series) < MIN_STEPS:
        return None
    half = Series(series.steps[len(series) // 2 :], series.values[len(series) // 2 :])
    if half.values.mean() > 0 or _solved(run):
        return None
    return Finding(
        "dead_critic", True, run.name, "The critic explains nothing.",
        f"explained variance {shown(float(half.values.mean()))} on average from step "
        f"{half.steps[0]} on, {shown(float(series.values.max()))} at its best",
        (int(half.steps[0]), int(half.steps[-1])),
        "Raise training.critic_learning_rate (three to ten times) or value_coefficient, start the "
        "critic from the reward model, take a wider value_clip; or use GRPO, which has none.",
    )  # fmt: skip


def updates_too_large(run: RunRecords) -> Finding | None:
    """Updates that leave the region in which PPO's bound means anything.

    Approximate KL above 0.1 (Spinning Up stops at 0.01 or 0.05), many of the tokens clipped, or
    ratios above 10, in more than a fifth of the steps; or a single update of more than a nat a
    token, from which no policy comes back.
    """
    limits = {
        "ppo/approx_kl": APPROX_KL,
        "ppo/clip_fraction": CLIP_FRACTION,
        "ppo/ratio_max": RATIO,
    }
    evidence, steps = [], list[int]()
    for name, limit in limits.items():
        series = run.series(name)
        above = series.values > limit
        if len(series) >= MIN_STEPS and above.mean() > LARGE_SHARE:
            evidence.append(
                f"{name} above {limit:g} in {int(above.sum())} of {len(series)} steps, "
                f"up to {shown(float(series.values.max()))}"
            )
            steps += first_step(series, above)
    series = run.series("ppo/approx_kl")
    ruin = series.values > RUIN
    if ruin.any() and not steps:
        at = int(series.steps[ruin][0])
        evidence.append(f"ppo/approx_kl {shown(float(series.values[ruin][0]))} at step {at}")
        steps = [at]
    if not evidence:
        return None
    return Finding(
        "learning_rate_too_high", True, run.name, "The updates of the policy are too large.",
        "; ".join(evidence), (min(steps), max(steps)),
        f"Lower training.learning_rate{_now(run, 'learning_rate')} to a third, use fewer "
        f"ppo_epochs{_now(run, 'ppo_epochs')}, or set target_kl to 0.02.",
    )  # fmt: skip


def updates_too_small(run: RunRecords) -> Finding | None:
    """No update changes probabilities by a thousandth: the learning rate is too low."""
    series = run.series("ppo/approx_kl")
    if len(series) < MIN_STEPS or series.values.max() >= APPROX_KL_STILL:
        return None
    if (run.series("ppo/updates").values == 0).mean() > LARGE_SHARE:  # no update, no change
        return None
    kl = run.series("kl/mean")
    far = f"; KL to the reference {shown(kl.values[-1])} at the end" if len(kl) else ""
    return Finding(
        "learning_rate_too_low", True, run.name, "The updates change next to nothing.",
        f"ppo/approx_kl {shown(float(series.values.max()))} at the most{far}",
        (int(series.steps[0]), int(series.steps[-1])),
        f"Raise training.learning_rate{_now(run, 'learning_rate')} ten times.",
    )  # fmt: skip


def length_hacking(run: RunRecords) -> Finding | None:
    """Responses grow, and a longer one scores higher: length is what is learnt.

    Singhal et al. 2023. Within the last table of samples, where there is one; else by the changes
    from step to step, which a common trend cannot feign.
    """
    series = run.series("response/length")
    found = ends(series)
    if found is None or found.first <= 0 or found.last < LONGER * found.first:
        return None
    correlation, where = _score_and_length(run)
    if correlation <= LENGTH_CORRELATION:
        return None
    return Finding(
        "length_hacking", True, run.name, "The policy learns length.",
        f"tokens of a response {found}; correlation of score and length {shown(correlation)} "
        f"{where}", (found.start_steps[0], found.end_steps[1]),
        "Train the reward model on pairs of like length, or add a reward that costs length; "
        "lower max_new_tokens, or set missing_eos_penalty.",
    )  # fmt: skip


def no_progress(run: RunRecords) -> Finding | None:
    """The score does not rise beyond its noise (one standard error)."""
    series = run.series("reward/score")
    found = ends(series) if len(series) >= JUDGED_STEPS else None
    if found is None or found.last - found.first > found.noise:
        return None
    flat = run.series("grpo/score_std")
    if len(flat) and np.median(flat.values) == 0:
        why = (
            "All responses of a group have one score, so nothing is compared: raise temperature "
            "or group_size, or take easier prompts."
        )
    else:
        why = (
            "Raise training.learning_rate or the batch; lower kl_coefficient; look whether any "
            "sample scores well, as only what is sampled can be learnt."
        )
    falls = found.first - found.last > 2 * found.noise
    what = "The score falls." if falls else "The score does not rise."
    return Finding(
        "no_progress", True, run.name, what, f"reward/score {found}{_kl_cost(run)}",
        found.end_steps, why,
    )  # fmt: skip


def held_out_falls(run: RunRecords) -> Finding | None:
    """The score on held-out prompts ends below its first, while that of training rises."""
    held_out, found = run.evaluated("reward/score"), ends(run.series("reward/score"))
    if len(held_out) < 3 or found is None or found.last - found.first <= found.noise:
        return None
    first, last = float(held_out.values[0]), float(held_out.values[-1])
    if last >= first:
        return None
    best = int(held_out.values.argmax())
    return Finding(
        "overfitting", True, run.name, "The score rises on the prompts of training only.",
        f"held-out score {shown(first)} -> {shown(last)}; training score {found}",
        (int(held_out.steps[best]), int(held_out.steps[-1])),
        "More prompts, fewer epochs, or training.early_stopping_patience.",
    )  # fmt: skip


def _solved(run: RunRecords) -> bool:
    """Whether the score has risen to its highest and stays there: the task may be solved.

    Never against a reward model, whose scores have no highest: there a policy that stays where it
    is has found what the model is wrong about.
    """
    if run.method == "rlhf" or any(part.name == "reward_model" for part in run.parts):
        return False
    series = run.series("reward/score")
    found = ends(series)
    if found is None or not found.last - found.first > 2 * found.noise:
        return False
    slack = SOLVED * (found.last - found.first)
    return bool(found.end.std() <= slack and found.last >= series.values.max() - slack)


def _kl_cost(run: RunRecords) -> str:
    kl = ends(run.series("kl/mean"))
    return f"; KL {kl} nats a response" if kl is not None else ""


def _now(run: RunRecords, name: str) -> str:
    value = number(run.options.get(name))
    return f" (now {shown(value)})" if value is not None else ""


def _last_table(run: RunRecords) -> tuple[int, list[dict[str, Any]]]:
    tables = run.sample_tables
    return next(reversed(tables.items())) if tables else (0, [])


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _score_and_length(run: RunRecords) -> tuple[float, str]:
    step, rows = _last_table(run)
    pairs = [(number(row.get("score")), number(row.get("tokens"))) for row in rows]
    known = np.array([pair for pair in pairs if None not in pair], np.float64).reshape(-1, 2)
    if len(known) >= 2 * TABLE_ROWS:
        return _correlation(known[:, 0], known[:, 1]), f"over the samples of step {step}"
    score, length = run.series("reward/score"), run.series("response/length")
    if len(score) < JUDGED_STEPS or len(score) != len(length):
        return 0.0, ""
    found = _correlation(np.diff(score.values), np.diff(length.values))
    return found, "of their changes from step to step"


def _correlation(a: Array, b: Array) -> float:
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


RULES: tuple[Rule, ...] = (
    kl_above_budget,
    kl_too_high,
    kl_jumps,
    updates_too_large,
    updates_too_small,
    entropy_collapse,
    same_responses,
    empty_responses,
    never_ends,
    dead_critic,
    length_hacking,
    no_progress,
    held_out_falls,
)
