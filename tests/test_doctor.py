"""The doctor: every rule provoked by records that show it, and silent on healthy ones."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from loopos.errors import NumericalError
from loopos.methods.ppo import PPOTrainer
from loopos.models.transformer import Transformer, TransformerConfig
from loopos.reporting import diagnose, read_run, report_page
from loopos.reporting.doctor import RULES
from loopos.reporting.findings import ends, shown
from loopos.reporting.records import RunRecords, Series
from loopos.reporting.rules import diverged, nothing_moves

LOOPOS = str(Path(sys.executable).with_name("loopos"))
STEPS = 60
RANDOM = np.random.default_rng(0)
NOISE = RANDOM.normal(size=STEPS)
OTHER = RANDOM.normal(size=STEPS)
RISE = np.linspace(0, 1, STEPS)
UNLEARNT = np.maximum(0, 0.9 - 1.5 * RISE)
#: A held-out evaluation of a reward model that is good enough.
PAIRS = {"loss": 0.6, "accuracy": 0.68, "margin": 0.4, "longer_accuracy": 0.55,
         "length_correlation": 0.2, "calibration_error": 0.03, "count": 400}  # fmt: skip
POLICY = {
    "loss": 0.01 * NOISE, "reward/score": 0.1 + 0.7 * RISE + 0.03 * NOISE,
    "kl/mean": 6 * RISE + 0.1 * abs(NOISE), "entropy": 3 - RISE + 0.05 * NOISE,
    "ppo/approx_kl": 0.004 + 0.001 * abs(NOISE), "ppo/clip_fraction": 0.08 + 0.01 * NOISE,
    "ppo/ratio_max": 1.6 + 0.1 * abs(NOISE), "ppo/updates": np.full(STEPS, 4.0),
    "value/explained_variance": -0.2 + 0.8 * RISE, "response/length": 20 + 2 * RISE + OTHER,
    "response/eos_fraction": 0.9 + 0.02 * NOISE, "tokens_per_s": 1000 + 20 * NOISE,
    "learning_rate": np.full(STEPS, 1e-5),
}  # fmt: skip
FITTED = {"loss": 2.3 - 1.5 * RISE + 0.03 * NOISE, "tokens_per_s": 1000 + 20 * NOISE,
          "learning_rate": np.full(STEPS, 1e-4)}  # fmt: skip
DATA = {"rows": 900, "validation_rows": 100, "dropped": {"count": 3, "places": ["t.csv:4"]},
        "leaks": {"count": 0, "places": []}}  # fmt: skip


def samples(*, response="{i}", score=None, step=STEPS):
    return [{"step": step, "prompt": f"p{i}", "response": response.format(i=i),
             "score": i % 5 if score is None else score(i), "tokens": 10 + i, "ended": True}
            for i in range(16)]  # fmt: skip


def write(path, figures, evals=(), rows=(), state=None, data=None, evaluation=None, text=""):
    """Write a run directory as a run does."""
    path.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(figures.values()))) if figures else 0
    records = [{"step": i + 1, "epoch": 0, **{n: float(v[i]) for n, v in figures.items()}}
               for i in range(count)]  # fmt: skip
    records += [{"step": step, "epoch": 0, "eval": eval_, "best": True} for step, eval_ in evals]
    lines = [json.dumps(r) + "\n" for r in records]
    (path / "metrics.jsonl").write_text("".join(lines) + text)
    (path / "model").mkdir(exist_ok=True)
    if rows:
        (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if state is not None:
        checkpoint = path / "checkpoints" / "step-00000060"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps(state))
    for name, value in (("data_report", data), ("evaluation", evaluation)):
        if value is not None:
            (path / f"{name}.json").write_text(json.dumps(value))
    return path


def losses(values, **more):
    return [(10 * (i + 1), {"loss": v, **{n: m[i] for n, m in more.items()}})
            for i, v in enumerate(values)]  # fmt: skip


def policy(path, rows=None, state=None, evals=(), **changes):
    figures = POLICY | {name.replace("__", "/"): v for name, v in changes.items()}
    return write(path, figures, evals, samples() if rows is None else rows, state)


def fitted(path, evals=None, state=None, data=DATA, **changes):
    evals = losses([1.4, 1.1, 0.9]) if evals is None else evals
    return write(path, FITTED | changes, evals, state=state, data=data)


def judged(path, **figures):
    return write(
        path, {"loss": 0.7 - 0.1 * RISE, "rewards/margin": RISE}, evaluation=PAIRS | figures
    )


def at(step, value, base):
    changed = np.array(base)
    changed[step - 1] = value
    return changed


def spiky(loss):
    for step in (25, 36, 48):
        loss = at(step, 8.0, loss)
    return loss


HEALTHY = {"policy": policy, "fitted": fitted, "reward model": judged}
#: Of each rule: its name, whether it is a problem, records that show it, and what it must say.
SICK = [
    ("not_finite", True, lambda p: fitted(p, loss=at(7, np.nan, FITTED["loss"])), "loss at step 7"),
    ("learning_rate_too_high", True, lambda p: fitted(p, loss=2 + 3 * RISE), "loss 2.28"),
    ("loss_spikes", True, lambda p: fitted(p, loss=spiky(FITTED["loss"])), "steps 25, 36, 48;"),
    ("no_progress", True, lambda p: fitted(p, losses([2.3, 2.3]), loss=2.3 + 0.003 * NOISE),
     "learning rate up to 0.0001"),
    ("overfitting", True, lambda p: fitted(p, losses([1.4, 1.0, 1.2])), "1 at step 20, 1.2 at the"),
    ("overfitting", False, lambda p: fitted(p, losses([1.4, 1.0, 1.2], accuracy=[0.5, 0.7, 0.8])),
     "accuracy held, 0.7 to 0.8"),
    ("overfitting", True, lambda p: fitted(p, losses([1.4, 1.0, 1.2], accuracy=[0.5, 0.8, 0.7],
                                                      count=[100, 100, 100])), "at step 20"),
    ("leaks", True, lambda p: fitted(p, data=DATA | {"leaks": {"count": 9, "places": []}}),
     "9 of 100 validation rows"),
    ("rows_left_out", True, lambda p: fitted(p, data=DATA | {"dropped": {"count": 400}}),
     "400 of 1,400 rows: 400 without text"),
    ("slows_down", False, lambda p: fitted(p, tokens_per_s=1000 - 700 * RISE), "tokens/s 9"),
    ("unfinished", False, lambda p: unfinished(p), "step 60 of 90"),
    ("unfinished", False, lambda p: unfinished(p, 60), "60 of 60; all steps are made, but"),
    ("damaged_checkpoint", False, lambda p: damaged(p), "00000060/state.json:1: not valid JSON"),
    ("few_held_out_pairs", False, lambda p: judged(p, count=12), "12 held-out pairs, over"),
    ("weak_reward_model", True, lambda p: judged(p, accuracy=0.53, longer_accuracy=0.5),
     "accuracy 0.53 over 400 pairs"),
    ("below_length_rule", True, lambda p: judged(p, longer_accuracy=0.28), "right in 0.72"),
    ("score_follows_length", True, lambda p: judged(p, length_correlation=0.7), "0.7 over 400"),
    ("miscalibrated", False, lambda p: judged(p, calibration_error=0.2), "error 0.2 over 400"),
    ("kl_above_budget", True, lambda p: policy(p, state={"options": {"kl_budget": 5.0}}),
     "kl_budget 5 nats a response; KL 6."),
    ("kl_above_budget", True, lambda p: policy(p, state={
        "options": {"kl_budget": 8.0}, "exhausted": True, "total_steps": 90}), "after step 60"),
    ("kl_too_high", True, lambda p: policy(p, kl__mean=80 * RISE), "72.54 (steps 49 to 60)"),
    ("kl_blow_up", True, lambda p: policy(p, kl__mean=at(30, 40.0, POLICY["kl/mean"])), "step 30"),
    ("entropy_collapse", True, lambda p: policy(p, entropy=3 * (1 - RISE) ** 6), "nats a token"),
    ("same_responses", True, lambda p: policy(p, samples(response="Yes.")), "16 of 16 are 'Yes.'"),
    ("empty_responses", True, lambda p: policy(p, samples(response=" ")), "16 of 16 samples"),
    ("empty_responses", True, lambda p: policy(p, response__length=20 - 19 * RISE ** 0.3),
     "tokens of a response"),
    ("never_ends", True, lambda p: policy(p, response__eos_fraction=UNLEARNT),
     "with a stop token"),
    ("never_ends", False, lambda p: policy(p, response__eos_fraction=0 * RISE), "0 (steps 1 to"),
    ("never_ends", True, lambda p: policy(p, response__eos_fraction=0 * RISE, state={
        "options": {"missing_eos_penalty": 1.0}}), "0 (steps 1 to 12)"),
    ("dead_critic", True, lambda p: policy(p, value__explained_variance=-0.1 + 0.01 * NOISE),
     "explained variance -0."),
    ("learning_rate_too_high", True, lambda p: policy(p, ppo__approx_kl=0.5 + 0 * RISE),
     "ppo/approx_kl above 0.1 in 60 of 60 steps"),
    ("learning_rate_too_high", True, lambda p: policy(p, ppo__ratio_max=40 * RISE),
     "ppo/ratio_max above 10"),
    ("learning_rate_too_low", True, lambda p: policy(p, ppo__approx_kl=1e-9 + 0 * RISE), "1e-09"),
    ("length_hacking", True, lambda p: policy(p, samples(score=lambda i: i),
                                              response__length=20 + 30 * RISE), "length 1 over"),
    ("length_hacking", True, lambda p: policy(
        p, samples()[:2], response__length=20 + 30 * RISE + 3 * NOISE), "from step to step"),
    ("no_progress", True, lambda p: policy(p, reward__score=0.3 + 0.05 * NOISE), "score 0.3"),
    ("overfitting", True, lambda p: policy(p, evals=[
        (s, {"reward/score": v}) for s, v in ((10, 0.3), (30, 0.4), (60, 0.2))]), "0.3 -> 0.2"),
]  # fmt: skip


def unfinished(path, total=90):
    fitted(path, state={"total_steps": total})
    return begun(path)


def begun(path):
    """Make of records those of a configuration's run that has saved no model."""
    (path / "config.json").write_text('{"computation": {"method": "sft"}}')
    (path / "model").rmdir()
    return path


def damaged(path):
    fitted(path, state={"total_steps": 60})
    (path / "checkpoints" / "step-00000060" / "state.json").write_text('{"total')
    return path


@pytest.mark.parametrize(
    ("rule", "problem", "make", "says"), SICK, ids=[f"{n}-{row[0]}" for n, row in enumerate(SICK)]
)
def test_each_rule_is_provoked(rule, problem, make, says, tmp_path):
    found = diagnose(read_run(make(tmp_path / "run")))
    (finding,) = [f for f in found.findings if f.rule == rule]
    assert finding.problem is problem
    assert says in finding.evidence
    assert finding.advice
    assert found.healthy is not any(f.problem for f in found.findings)


@pytest.mark.parametrize("kind", HEALTHY)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_rule_speaks_of_a_healthy_run(rule, kind, tmp_path):
    assert rule(read_run(HEALTHY[kind](tmp_path / "run"))) is None


def test_every_rule_gives_its_reason_and_is_provoked():
    assert all(len(rule.__doc__.split()) > 7 for rule in RULES)
    assert len(RULES) == len({rule.__name__ for rule in RULES}) == 28


def test_a_run_is_finished_by_its_steps_and_its_model(tmp_path):
    def note(path):
        found = [f for f in diagnose(read_run(path)).findings if f.rule == "unfinished"]
        assert len(found) == int(not read_run(path).finished)
        return found[0].evidence if found else "finished"

    states = {
        "whole": {"total_steps": 60},
        "longer": {"total_steps": 90},
        "gone on": {"total_steps": 50},
        "early": {"total_steps": 90, "exhausted": True},
    }
    saved = {name: fitted(tmp_path / name, state=state) for name, state in states.items()}
    assert {name: note(path) for name, path in saved.items()} == {
        "whole": "finished",
        "longer": "step 60 of 90; the model in it is that of before it went on",
        # Killed before the first checkpoint since it was made longer.
        "gone on": "step 60; no checkpoint has the number of its steps yet; "
        "the model in it is that of before it went on",
        "early": "finished",
    }
    # What a trainer wrote by itself, or a round of a chain of thought, never has a model.
    for path in saved.values():
        (path / "model").rmdir()
    assert note(saved["whole"]) == note(saved["early"]) == "finished"
    assert note(saved["longer"]) == "step 60 of 90"
    for path in saved.values():
        (path / "model").mkdir()
    assert {name: note(begun(path)) for name, path in saved.items()} == {
        "whole": "step 60 of 60; all steps are made, but the model is not saved yet",
        "longer": "step 60 of 90",
        "gone on": "step 60; no checkpoint has the number of its steps yet",
        "early": "step 60 of 90; the run ended early, but the model is not saved yet",
    }
    assert note(begun(fitted(tmp_path / "none"))).startswith("step 60; no checkpoint has")
    (finding,) = diagnose(read_run(saved["whole"])).findings
    assert finding.advice == (
        "If it does not run any more, continue it with --resume, or resume=True."
    )


def test_a_part_that_is_not_finished_says_it_for_the_run(tmp_path):
    run = write(tmp_path / "run", {}, state={"total_steps": 90})
    shutil.rmtree(run / "checkpoints")
    begun(run)
    part = judged(run / "reward_model")
    (finding,) = diagnose(read_run(run)).findings
    assert (finding.rule, finding.part) == ("unfinished", "")
    (part / "model").rmdir()
    (finding,) = diagnose(read_run(run)).findings
    assert (finding.rule, finding.part) == ("unfinished", "reward_model")


def test_a_stage_that_was_trained_by_itself_needs_no_model(tmp_path):
    """As ReinforcementTrainer leaves it: its `save` writes the model somewhere else."""
    part = judged(tmp_path / "run" / "reward_model")
    (part / "model").rmdir()
    assert "unfinished" not in [f.rule for f in diagnose(read_run(tmp_path / "run")).findings]
    (tmp_path / "run" / "config.json").write_text('{"computation": {"method": "rlhf"}}')
    assert "unfinished" in [f.rule for f in diagnose(read_run(tmp_path / "run")).findings]


def test_an_old_evaluation_is_not_that_of_a_run_that_goes_on(tmp_path):
    run = judged(tmp_path / "run", accuracy=0.5, longer_accuracy=0.5)
    assert [f.rule for f in diagnose(read_run(run)).problems] == ["weak_reward_model"]
    begun(run)
    found = read_run(run)
    assert (found.evaluation["accuracy"], found.last_evaluation) == (0.5, {})
    assert diagnose(found).healthy


def lossy(values):
    steps = [{"step": i + 1, "loss": float(value)} for i, value in enumerate(values)]
    return RunRecords(Path(), "", steps, [])


@pytest.mark.parametrize(("steps", "most"), [(10, 0.0), (20, 0.06), (40, 0.05), (100, 0.04)])
def test_a_loss_that_is_noise_has_seldom_diverged(steps, most):
    means = np.random.default_rng(0).normal(0.65, 0.45, (1000, steps, 4)).mean(axis=2)
    assert np.mean([diverged(lossy(values)) is not None for values in means]) <= most


@pytest.mark.parametrize("steps", [20, 40, 100])
def test_a_loss_that_diverges_is_found_within_its_noise(steps):
    noise = 1 + np.random.default_rng(0).normal(0, 0.7, (200, steps, 4)).mean(axis=2)
    late = np.append(np.ones(steps - 3), (10, 100, 1000))
    for course in (np.where(np.arange(steps) < steps // 2, 1, 5), late):
        found = [diverged(lossy(0.65 * course * one)) is not None for one in noise]
        assert np.mean(found) >= 0.95


def test_a_loss_that_ends_above_its_start_by_noise_does_not_fall():
    run = lossy([0.4, 1.0, 0.7, 0.5, *[0.65] * 12, 0.9, 0.4, 0.6, 1.0])
    found = ends(run.series("loss"))
    assert found.last > 1.1 * found.first
    assert diverged(run) is None
    assert nothing_moves(run).rule == "no_progress"


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ("fine_tuning", "see data_report.json in the run directory."),
        ("reward_model", "see data_report.json in the run directory."),
        ("sft", "look at its texts with 'loopos preview'."),
        ("autoregressive", "look at its texts with 'loopos preview'."),
    ],
)
def test_the_advice_names_what_the_method_has(method, advice):
    run = lossy(np.full(20, 0.7))
    run.config["computation"] = {"method": method}
    found = nothing_moves(run).advice
    assert found.endswith(advice)
    assert ("preview" in found) is ("preview" in advice)


def test_problems_of_a_chain_of_thought_have_their_noise(tmp_path):
    for name in ("count", "asked"):
        evals = losses([1.4, 1.0, 1.2], accuracy=[0.5, 0.8, 0.76], **{name: [25, 25, 25]})
        (finding,) = diagnose(read_run(fitted(tmp_path / name, evals))).findings
        assert (finding.rule, finding.problem) == ("overfitting", False)
        assert "0.8 to 0.76 (noise 0.1)" in finding.evidence


@pytest.mark.parametrize("count", [1, 12, 49, 50])
def test_few_held_out_pairs_say_nothing_of_a_reward_model(count, tmp_path):
    bad = {"accuracy": 0.5, "longer_accuracy": 1.0, "length_correlation": 1.0}
    found = diagnose(read_run(judged(tmp_path / "run", count=count, **bad)))
    if count == 50:
        assert [f.rule for f in found.problems] == [
            "weak_reward_model", "below_length_rule", "score_follows_length"]  # fmt: skip
        return
    (finding,) = found.findings
    assert (finding.rule, finding.problem) == ("few_held_out_pairs", False)
    chance = {1: "1", 12: "0.7887", 49: "0.6429"}[count]
    assert finding.evidence == (
        f"{count} held-out pairs, over which chance alone gives an accuracy of up to {chance}"
    )


@pytest.mark.parametrize(
    ("rule", "figures", "found"),
    [
        # Of 100 pairs the difference of two accuracies has a standard error of 0.071.
        ("below_length_rule", {"longer_accuracy": 0.74, "count": 100}, False),
        ("below_length_rule", {"longer_accuracy": 0.76, "count": 100}, True),
        ("below_length_rule", {"longer_accuracy": 0.74, "count": 400}, True),
        ("below_length_rule", {"longer_accuracy": 0.26, "count": 400}, True),
        # Of both responses of 100 pairs two standard errors of a correlation are 0.141.
        ("score_follows_length", {"length_correlation": 0.63, "count": 100}, False),
        ("score_follows_length", {"length_correlation": -0.65, "count": 100}, True),
        ("score_follows_length", {"length_correlation": 0.63, "count": 400}, True),
    ],
)
def test_figures_of_pairs_are_judged_beyond_their_noise(rule, figures, found, tmp_path):
    rules = [f.rule for f in diagnose(read_run(judged(tmp_path / "run", **figures))).problems]
    assert rules == ([rule] if found else [])


def test_what_resembles_a_fault_and_is_none(tmp_path):
    # Responses grow, but the longer ones score no better.
    grown = policy(tmp_path / "a", response__length=20 + 30 * RISE + OTHER)
    # Everything ends, with responses that say something.
    ended = policy(tmp_path / "b", response__eos_fraction=np.ones(STEPS))
    # One jump of the loss is recovered from; a loss that starts low stays low.
    once = fitted(tmp_path / "c", loss=at(30, 8.0, FITTED["loss"]))
    # The held-out loss is a little worse than its best.
    flat = fitted(tmp_path / "d", losses([1.4, 1.0, 1.02]))
    # A loss near 0 wobbles by what is much of itself, and little of what it was.
    low = np.where(np.arange(STEPS) % 12 == 11, 0.3, 6 * 0.9 ** np.arange(STEPS) + 0.02)
    near = fitted(tmp_path / "e", loss=low)
    # Of 25 rows, 0.76 and 0.8 are the same accuracy: a note at the most.
    rows = losses([1.4, 1.0, 1.2], accuracy=[0.5, 0.8, 0.76], count=[25, 25, 25])
    assert diagnose(read_run(fitted(tmp_path / "f", rows))).healthy
    for path in (near, grown, ended, once, flat):
        assert diagnose(read_run(path)).findings == []


def test_a_task_that_is_solved_is_not_a_collapse(tmp_path):
    solved = np.minimum(1.0, 2 * RISE)
    figures = {"reward__score": solved, "entropy": 3 * (1 - RISE) ** 6,
               "response__eos_fraction": UNLEARNT,
               "value__explained_variance": -0.1 + 0.01 * NOISE}  # fmt: skip
    found = diagnose(read_run(policy(tmp_path / "run", samples(response="5 5 5"), **figures)))
    assert [f.rule for f in found.findings] == ["entropy_collapse", "same_responses", "never_ends"]
    assert found.healthy
    judged(tmp_path / "run" / "reward_model")  # of a reward model's scores there is no highest
    rules = [f.rule for f in diagnose(read_run(tmp_path / "run")).problems]
    assert rules == ["entropy_collapse", "same_responses", "never_ends", "dead_critic"]


def test_a_healthy_verdict_names_what_was_looked_at(tmp_path):
    found = diagnose(read_run(policy(tmp_path / "run", evals=[(60, {"reward/score": 0.7})])))
    assert found.verdict == "Nothing wrong was found"
    assert found.looked_at["score"].endswith("(steps 49 to 60)")
    assert found.looked_at["held-out reward/score"] == "0.7 (step 60)"
    assert "loss" not in found.looked_at  # of a policy it has no direction
    few = diagnose(read_run(write(tmp_path / "few", {"loss": np.array([2.0, 1.9])})))
    assert few.healthy
    assert "too few to say how figures move" in few.verdict
    assert few.looked_at["loss"] == "2 -> 1.9"


@pytest.mark.parametrize("kind", HEALTHY)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, 3e38])
def test_no_figure_breaks_a_rule(kind, value, tmp_path):
    run = read_run(HEALTHY[kind](tmp_path / "run"))
    for number, record in enumerate(run.steps):
        record.update((name, value) for name in run.figures if number % 3)
    found = diagnose(run)
    assert ("not_finite" in [f.rule for f in found.problems]) is not (value == 3e38)
    assert "<figure" in report_page(run)


def test_parts_of_a_run_are_judged_too(tmp_path):
    run = policy(tmp_path / "run")
    judged(run / "reward_model", accuracy=0.5, longer_accuracy=0.5)
    (finding,) = diagnose(read_run(run)).findings
    assert (finding.rule, finding.part) == ("weak_reward_model", "reward_model")


def test_a_reward_model_is_judged_once_where_the_run_repeats_its_figures(tmp_path):
    run = policy(tmp_path / "run")
    judged(run / "reward_model", accuracy=0.5, longer_accuracy=0.5)
    figures = json.loads((run / "reward_model" / "evaluation.json").read_text(encoding="utf-8"))
    (run / "evaluation.json").write_text(json.dumps({"reward_model": figures}), encoding="utf-8")
    assert [f.part for f in diagnose(read_run(run)).findings] == ["reward_model"]
    shutil.rmtree(run / "reward_model")
    assert [f.rule for f in diagnose(read_run(run)).findings] == ["weak_reward_model"]


def test_ends_of_a_series():
    found = ends(Series(np.arange(1, 21), np.repeat([1.0, 2.0, 3.0, 4.0, 5.0], 4)))
    assert (found.first, found.last, found.noise) == (1.0, 5.0, 0.0)
    assert str(found) == "1 (steps 1 to 4) -> 5 (steps 17 to 20)"
    assert ends(Series(np.arange(9), np.ones(9))) is None
    few = ends(Series(np.arange(10), np.array([1.0, 2, 3, 0, 0, 0, 0, 1, 2, 3])))
    assert few.noise == pytest.approx((2 / 3) ** 0.5)  # of three values with a variance of 1
    assert [shown(v) for v in (0.0, 1.0, 0.12345, -1234.5, 1e-5, 3e7, float("nan"))] == [
        "0", "1", "0.1235", "-1,234", "1e-05", "3e+07", "nan"]  # fmt: skip


# -- the command -----------------------------------------------------------------------------------


def loopos(*arguments):
    done = subprocess.run([LOOPOS, *map(str, arguments)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_exit_codes_and_json(tmp_path):
    code, out, _ = loopos("doctor", fitted(tmp_path / "well"))
    assert code == 0
    assert out.startswith(f"{tmp_path / 'well'}: nothing wrong was found\n\nlooked at\n  loss ")
    sick = fitted(tmp_path / "sick", loss=2 + 3 * RISE)
    code, out, _ = loopos("doctor", sick)
    assert code == 1
    assert "problem: The loss ends above where it began. (steps 49 to 60)\n  seen    loss" in out
    code, out, _ = loopos("doctor", sick, "--json")
    assert code == 1
    values = json.loads(out)
    assert values["healthy"] is False
    assert values["findings"][0]["rule"] == "learning_rate_too_high"
    assert values["findings"][0]["steps"] == [49, 60]
    code, out, _ = loopos("doctor", fitted(tmp_path / "slow", tokens_per_s=1000 - 700 * RISE))
    assert code == 0  # a note is no fault
    assert "nothing wrong was found, 1 note" in out
    assert "note: The run grew slow." in out


@pytest.mark.parametrize("command", ["doctor", "report"])
def test_what_is_no_run(command, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    write(tmp_path / "begun", {})
    write(tmp_path / "stepless", {}, text='{"loss": 1.0}\n')
    write(tmp_path / "broken", {}, text='{"step": 1, "loss": 1.0}\n{"step": 2, "lo\n{"step": 3}\n')
    write(tmp_path / "bytes", {})
    (tmp_path / "bytes" / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\n')
    for name, message in {
        "none": "none: no such directory",
        "empty": "empty: is not a run directory (metrics.jsonl is missing)",
        "file": "file: is a file; expected a run directory",
        "begun": "begun/metrics.jsonl: there is no step in it yet",
        "stepless": "metrics.jsonl:1: not the record of a step ('step' is missing)",
        "broken": "metrics.jsonl:2: not a JSON object",
        "bytes": "metrics.jsonl:2: not UTF-8 text",
    }.items():
        code, out, err = loopos(command, tmp_path / name)
        assert (code, out) == (2, ""), name
        assert err == f"error: {tmp_path}/" + err.removeprefix(f"error: {tmp_path}/")
        assert err.rstrip("\n").endswith(message), err
        assert err.count("\n") == 1


# -- real runs -------------------------------------------------------------------------------------


def learner(rate, **more):
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 24, "vocab_size": 9,
             "max_seq_len": 24}  # fmt: skip
    return PPOTrainer(
        Transformer(TransformerConfig(**sizes), 0), None,
        lambda prompts, responses: [sum(t == 5 for t in r) / 6 for r in responses],
        learning_rate=rate, batch_size=6, max_new_tokens=6, stop_ids=(0,), seed=1, **more,
    )  # fmt: skip


PROMPTS = [[1 + i % 7, (3 * i) % 8, 2] for i in range(72)]


def test_a_run_with_a_huge_rate_is_found_out(tmp_path):
    with suppress(NumericalError):  # it may die of it, too
        learner(0.5, num_epochs=2).fit(PROMPTS, output_dir=tmp_path / "run")
    found = diagnose(read_run(tmp_path / "run"))
    rules = [f.rule for f in found.problems]
    assert "learning_rate_too_high" in rules
    assert "entropy_collapse" in rules
    assert "learning_rate_too_low" not in rules


def test_a_run_with_a_tiny_rate_is_found_out(tmp_path):
    learner(1e-9, num_epochs=2).fit(PROMPTS, output_dir=tmp_path / "run")
    found = diagnose(read_run(tmp_path / "run"))
    assert "learning_rate_too_low" in [f.rule for f in found.problems]


def test_a_run_that_learns_is_well(tmp_path):
    learner(3e-3, num_epochs=8, kl_coefficient=0.02, critic_learning_rate=1e-2).fit(
        PROMPTS, output_dir=tmp_path / "run"
    )
    found = diagnose(read_run(tmp_path / "run"))
    assert found.problems == []
