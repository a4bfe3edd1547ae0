"""PPO runs: invariants that stop them, rewards, resuming, interrupts, learning, backends."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest

from loopos import use_backend
from loopos.autograd import Tensor
from loopos.backends import available_backends
from loopos.errors import CheckpointError, ConfigError, DataError, LooposError, NumericalError
from loopos.methods import policy_training, policy_update, ppo, rollouts
from loopos.methods.ppo import Critic, PPOTrainer
from loopos.methods.rewards import Normaliser
from loopos.methods.rollouts import Prompts, Rollout
from loopos.models.lora import LoraConfig
from loopos.models.transformer import Transformer, TransformerConfig
from loopos.training.loop import Interrupted
from loopos.training.online import EndOfRun
from loopos.training.trackers import Callback

FAST = "cython" if "cython" in available_backends() else "numpy"
TIMED = ("time_s", "tokens_per_s", "time/rollout_s", "time/reward_s", "time/update_s")
PROMPTS = [[1 + i % 7, (3 * i) % 8, 2] for i in range(24)]


def model(seed=0, dtype=np.float32, **more):
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 24, "vocab_size": 9,
             "max_seq_len": 24} | more  # fmt: skip
    return Transformer(TransformerConfig(**sizes), seed, dtype)


def sharp():
    """One whose distributions are far from even."""
    made = model()
    for parameter in made.parameters().values():
        parameter.data *= 5 if parameter.data.ndim == 2 else 1
    return made


def count_fives(prompts, responses):
    return [sum(token == 5 for token in response) / 6 for response in responses]


def trainer(policy=None, reward=count_fives, **options):
    given = {"learning_rate": 3e-3, "batch_size": 6, "max_new_tokens": 6, "stop_ids": (0,),
             "seed": 1} | options  # fmt: skip
    return PPOTrainer(policy or model(), None, reward, **given)


def weights(of):
    return {name: p.data.copy() for name, p in of.parameters().items()}


def require_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def differ(a, b):
    return any(not np.array_equal(a[name], b[name]) for name in a)


def without_times(record):
    return {name: value for name, value in record.items() if name not in TIMED}


def one_response(length, prompt=(1, 2), **more):
    prompts = Prompts([np.array(prompt, np.int32)], [list(prompt)])
    return Rollout.of(prompts, [[3] * length], **more)


# -- invariants ------------------------------------------------------------------------------------


def test_stale_log_probabilities_stop_the_run(monkeypatch):
    made = trainer()
    collect = policy_training.collect

    def stale(*args, **more):
        found = collect(*args, **more)
        found["logprobs"][5] += 0.01
        found["ref_logprobs"][5] += 0.01
        return found

    rollout = made.sample(PROMPTS[:6])
    rollout.logprobs[:] = np.nan
    before = weights(made)
    monkeypatch.setattr(policy_training, "collect", stale)
    sample = rollout.sample_of(5)
    with pytest.raises(
        NumericalError, match=f"step 1: a token of the response to sample {sample} has a log ratio"
    ):
        made.learn_from(rollout)
    require_same(weights(made), before)


def test_wrong_temperature_or_weights_stop_the_run():
    hot = trainer(sharp(), temperature=1.0)
    cold = PPOTrainer(hot.policy, None, count_fives, hot.options, temperature=0.7)
    with pytest.raises(NumericalError, match=r"step 1: .* sample \d+ was sampled .*temperature"):
        cold.learn_from(hot.sample(PROMPTS[:6]))
    rollout = hot.sample(PROMPTS[:6])
    hot.step(PROMPTS[:6])
    with pytest.raises(NumericalError, match=r"step 2: .*other weights"):
        hot.learn_from(rollout)


def test_a_policy_that_is_not_its_reference_at_the_start():
    made = trainer()
    made.policy.head_weight.data[3, 0] += 1
    with pytest.raises(NumericalError, match=r"step 1: .*sample \d.* the reference's"):
        made.step(PROMPTS[:6])


def test_reward_at_the_wrong_token(monkeypatch):
    made = trainer()

    def at_the_first(kl, scores, offsets, coefficient):
        rewards = -coefficient * kl
        rewards[offsets[:-1]] += scores
        return rewards

    monkeypatch.setattr(ppo, "token_rewards", at_the_first)
    made.reward._parts[0] = replace(made.reward._parts[0], function=lambda p, r: [1.0] * len(r))
    with pytest.raises(NumericalError, match=r"step 1: .*sample \d .*the score is misplaced"):
        made.step(PROMPTS[:6])


@pytest.mark.parametrize(
    ("responses", "ended", "message"),
    [
        (
            [[3, 0], [4, 0, 8, 8]],
            [True, True],
            "sample 1 goes on after its stop token, the 2. of",
        ),
        ([[3, 0], [4, 3]], [True, True], "sample 1 is said to end with a stop token.*token is 3"),
        ([[3, 0], [4, 3]], [False, False], "sample 0 is said not to end .*token is 0"),
        ([[], []], [False, False], "step 1: no response has a token, so nothing counts"),
        ([[3], []], [False, False], "step 1: the response to sample 1 has no token"),
    ],
)
def test_responses_that_cannot_be(responses, ended, message):
    """Reference, point 7; and a batch without a counted token is an error, not loss 0."""
    made = trainer()
    with pytest.raises(NumericalError, match=message):
        made.learn_from(Rollout.of(made._take(PROMPTS[:2], None), responses, ended=ended))


def raises(prompts, responses):
    raise KeyError("score")


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (raises, LooposError, "step 1: the reward 'score' raised KeyError: 'score'"),
        (lambda p, r: [1.0], ConfigError, r"step 1: .*expected 6 numbers.*shape \(1,\)"),
        (lambda p, r: 1.0, ConfigError, "expected 6 numbers.*float of shape"),
        (lambda p, r: None, ConfigError, "expected 6 numbers.*NoneType"),
        (lambda p, r: ["good"] * 6, ConfigError, "expected 6 numbers.*list"),
        (lambda p, r: [[1.0]] * 6, ConfigError, r"shape \(6, 1\)"),
        (lambda p, r: [[1], [1, 2], 3, 4, 5, 6], ConfigError, "expected 6 numbers"),
        (lambda p, r: [0, 1, math.nan, 3, 4, 5], NumericalError, "step 1: .*is nan for sample 2"),
        (lambda p, r: [0, 1, 2, 3, math.inf, 5], NumericalError, "is inf for sample 4"),
        (
            lambda p, r: [1e39] * 6,
            NumericalError,
            "come to 1e[+]39 for sample 0, more than float32",
        ),
        ({"a": (lambda p, r: [1e200] * 6, 1e200)}, NumericalError, "come to inf for sample 0"),
        (lambda p, r: [1e30] * 6, NumericalError, "step 1: value_loss is inf .samples"),
    ],
)
def test_rewards_that_cannot_be(reward, error, message):
    made = trainer(reward=reward)
    before = weights(made)
    with pytest.raises(error, match=message) as caught:
        made.step(PROMPTS[:6])
    require_same(weights(made), before)
    if reward is raises:
        assert isinstance(caught.value.__cause__.__cause__, KeyError)


def test_a_gradient_that_is_not_finite(monkeypatch):
    made = trainer()
    monkeypatch.setattr("loopos.methods.policy_update.gradient_norm", lambda grads: math.inf)
    with pytest.raises(NumericalError, match="step 1: the gradient of all parameters together"):
        made.step(PROMPTS[:6])


def test_entropy_outside_its_bounds(monkeypatch):
    made = trainer()
    collect = policy_training.collect
    monkeypatch.setattr(
        policy_training, "collect",
        lambda *a, **m: (found := collect(*a, **m)) | {"entropy": found["entropy"] - 4},
    )  # fmt: skip
    with pytest.raises(NumericalError, match=r"an entropy .* outside \[0, ln V\]"):
        made.step(PROMPTS[:6])


@pytest.mark.parametrize(
    "options",
    [{"minibatches": 4, "batch_size": 4}, {"gradient_accumulation_steps": 4, "batch_size": 2}],
)
def test_the_last_step_of_an_epoch_may_be_short(options, monkeypatch):
    """9 prompts: what is left for the last step makes fewer updates, or fewer passes."""
    made = trainer(**options, ppo_epochs=1, num_epochs=2)
    sizes = []
    passes = policy_update.forward_pass
    monkeypatch.setattr(
        policy_update, "forward_pass", lambda *a, **m: sizes.append(len(a[1])) or passes(*a, **m)
    )
    result = made.fit(PROMPTS[:9])
    left = [step["ppo/updates"] for step in result.history]
    if "minibatches" in options:
        assert left == [4, 4, 1] * 2
        assert min(sizes) == max(sizes) == 1
    else:
        assert left == [1, 1] * 2
        assert sizes == [2, 2, 2, 2, 1] * 2
    with pytest.raises(ConfigError, match="training.minibatches: expected at most 2, the respons"):
        trainer(minibatches=3, batch_size=2)


def test_target_kl_ends_the_epochs_before_it_is_passed_for_good():
    free = trainer().step(PROMPTS[:6])
    assert free["ppo/updates"] == 4
    held = trainer(target_kl=1e-9).step(PROMPTS[:6])
    assert held["ppo/updates"] == 1
    assert held["ppo/approx_kl"] <= 1e-9


def test_kl_budget_ends_the_run_with_the_best(tmp_path):
    with pytest.raises(EndOfRun, match="above kl_budget") as caught:
        made, seen = trainer(kl_budget=1e-4, learning_rate=0.02), []
        for start in range(0, 24, 6):
            seen.append(weights(made))
            made.step(PROMPTS[start : start + 6])
    assert caught.value.reason == "kl_budget"
    require_same(weights(made), seen[-2])  # those whose own samples were within it
    run = trainer(kl_budget=0.5, learning_rate=0.01, num_epochs=40, eval_steps=1)
    result = run.fit(PROMPTS, output_dir=tmp_path)
    assert result.stopped_reason == "kl_budget"
    assert 0 < result.steps < 160
    assert max(record["kl/mean"] for record in result.history) <= 0.5
    assert result.best_checkpoint is not None
    within = [e["eval"] for e in result.evaluations if e["eval"]["kl/mean"] <= 0.5]
    assert result.best_metric == max(figures["reward/score"] for figures in within)
    from safetensors.numpy import load_file

    held = load_file(result.best_checkpoint / "model.safetensors")
    for name, p in run.parameters().items():
        if p.requires_grad:
            np.testing.assert_array_equal(p.data, held[name])
    again = trainer(kl_budget=0.5, learning_rate=0.01, num_epochs=40, eval_steps=1)
    assert again.fit(PROMPTS, output_dir=tmp_path, resume=True).stopped_reason == "kl_budget"


@pytest.mark.parametrize("kept", [True, False])
def test_a_policy_above_its_budget_is_never_kept(kept, tmp_path):
    """Whatever its score: here the reward is what takes it away from the reference."""
    run = trainer(kl_budget=0.5, learning_rate=0.02, num_epochs=40,
                  **({"eval_steps": 1} if kept else {}))  # fmt: skip
    result = run.fit(PROMPTS, PROMPTS[:6] if kept else None, output_dir=tmp_path if kept else None)
    assert result.stopped_reason == "kl_budget"
    over = [e["best"] for e in result.evaluations if e["eval"]["kl/mean"] > 0.5]
    assert over
    assert not any(over)
    assert run.evaluate(PROMPTS)["kl/mean"] <= 0.5


@pytest.mark.parametrize("seed", [0, 3])
def test_the_best_evaluation_within_the_budget_is_what_is_kept(seed, tmp_path):
    """Also where the step before the end was the best: its checkpoint is written again then."""
    run = trainer(kl_budget=0.5, learning_rate=0.01, num_epochs=40, eval_steps=1, seed=seed)
    result = run.fit(PROMPTS, output_dir=tmp_path)
    assert result.stopped_reason == "kl_budget"
    assert run.evaluate(PROMPTS[:6])["reward/score"] == result.best_metric


@pytest.mark.parametrize("kept", [True, False])
def test_the_last_update_of_a_run_is_held_to_the_budget_too(kept, tmp_path):
    run = trainer(kl_budget=0.2, learning_rate=0.3, max_steps=1, scheduler="constant")
    start = weights(run)
    result = run.fit(PROMPTS, output_dir=tmp_path if kept else None)
    assert result.stopped_reason == "finished"
    assert result.evaluations[-1]["eval"]["kl/mean"] > 0.2
    require_same(weights(run), start)
    if kept:  # as one that was killed before its model was saved
        again = trainer(kl_budget=0.2, learning_rate=0.3, max_steps=1, scheduler="constant")
        assert again.fit(PROMPTS, output_dir=tmp_path, resume=True).evaluations == []
        require_same(weights(again), start)


def test_a_budget_ends_a_resumed_run_as_one_that_went_on(tmp_path):
    given = {"kl_budget": 0.5, "learning_rate": 0.02, "num_epochs": 40}
    whole = trainer(**given)
    steps = whole.fit(PROMPTS, output_dir=tmp_path / "whole").steps
    assert steps > 1
    parts = trainer(**given)
    count = iter(range(1, 1000))
    parts.fit(PROMPTS, output_dir=tmp_path / "parts", stop=lambda: next(count) == steps)
    again = trainer(**given)
    result = again.fit(PROMPTS, output_dir=tmp_path / "parts", resume=True)
    assert (result.steps, result.stopped_reason) == (steps, "kl_budget")
    require_same(weights(again), weights(whole))


def test_what_is_held_out_is_checked_before_the_first_step(tmp_path):
    for data, more, error, words in (
        ([], {}, DataError, "there is no prompt to evaluate on"),
        (PROMPTS[:2], {"answers": [1] * 24}, ConfigError, "answers and validation_answers: expec"),
        (PROMPTS[:2], {"validation_answers": [1, 2]}, ConfigError, "answers and validation_answe"),
    ):
        made = trainer()
        before = weights(made)
        with pytest.raises(error, match=words):
            made.fit(PROMPTS, data, output_dir=tmp_path, **more)
        require_same(weights(made), before)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="there is no prompt to evaluate on"):
        made.evaluate([])


def test_an_evaluation_that_fails_saves_the_state_before_it(tmp_path):
    asked = []

    def failing(prompts, responses):
        asked.append(len(prompts))
        if len(prompts) == 5 and len(asked) < 20:
            raise RuntimeError("no answer")
        return count_fives(prompts, responses)

    given = {"eval_steps": 2, "num_epochs": 1}
    with pytest.raises(
        LooposError,
        match=r"step 2: the evaluation failed: the reward 'score' "
        r"raised RuntimeError: no answer; the state before it is in .*00000002$",
    ):
        trainer(reward=failing, **given).fit(PROMPTS, PROMPTS[:5], output_dir=tmp_path / "a")
    asked += [0] * 20
    again = trainer(reward=failing, **given)
    again.fit(PROMPTS, PROMPTS[:5], output_dir=tmp_path / "a", resume=True)
    whole = trainer(reward=failing, **given)
    whole.fit(PROMPTS, PROMPTS[:5], output_dir=tmp_path / "b")
    require_same(weights(again), weights(whole))


def test_a_horizon_that_could_make_the_coefficient_negative_is_refused():
    words = "training.adaptive_kl_horizon: expected more than a fifth of the 24 responses of a step"
    with pytest.raises(ConfigError, match=words):
        trainer(adaptive_kl_target=6.0, adaptive_kl_horizon=4.0, batch_size=24)
    made = trainer(adaptive_kl_target=6.0, adaptive_kl_horizon=4.0)
    before = weights(made)
    with pytest.raises(ConfigError, match=words):
        made.step(PROMPTS)
    require_same(weights(made), before)
    assert made.step(PROMPTS[:6])
    assert made.kl_coefficient == pytest.approx(0.1 * (1 - 0.2 * 6 / 4))


# -- rewards ---------------------------------------------------------------------------------------


class Untouchable:
    """As an array that another library does not hand out."""

    def __array__(self, *args, **kwargs):
        raise RuntimeError("call detach() first")


def test_an_array_that_cannot_be_taken_is_named():
    with pytest.raises(ConfigError, match=r"expected 6 numbers, found Untouchable \(call detach"):
        trainer(reward=lambda prompts, responses: Untouchable()).step(PROMPTS[:6])


@pytest.mark.parametrize("count", [1, 3, 24, 256])
@pytest.mark.parametrize("kind", ["mean_std", "running"])
def test_equal_scores_set_no_scale(count, kind):
    seen = Normaliser(kind).seen(np.full(count, 0.1))
    np.testing.assert_allclose(seen.apply(np.array([0.1, 1.0])), [0.0, 0.9], atol=1e-12)


def test_wrong_parts_are_named():
    with pytest.raises(ConfigError, match="training.stop_ids: expected a list of token ids"):
        trainer(stop_ids=0)
    with pytest.raises(ConfigError, match="critic: expected 'separate', 'shared' or a model with"):
        PPOTrainer(model(), None, count_fives, critic=model())


def test_rewards_of_several_kinds():
    class Model:
        def score(self, prompts, responses):
            return np.array([len(r) for r in responses])

    def by_ids(prompts, responses, prompt_ids, response_ids):
        assert [p.tolist() for p in prompt_ids] == prompts
        assert [r.tolist() for r in response_ids] == responses
        return [p[0] for p in prompt_ids]

    made = trainer(reward={"length": (Model(), 2.0), "first": (by_ids, -1.0)})
    record = made.step(PROMPTS[:6])
    expected = [2 * row["tokens"] - row["prompt"][0] for row in made.samples]
    np.testing.assert_allclose([row["score"] for row in made.samples], expected)
    assert record["reward/length"] == record["response/length"]
    assert record["reward/first"] == np.mean([p[0] for p in PROMPTS[:6]])
    listed = trainer(reward=[(Model(), 2.0), (by_ids, -1.0)]).step(PROMPTS[:6])
    assert listed["reward/score"] == record["reward/score"]
    answered = trainer(reward=lambda p, r, answers: answers).step(PROMPTS[:6], [1, 2, 3, 4, 5, 9])
    assert answered["reward/score"] == 4
    for bad, message in (
        (3, "a callable"), ([Model()], "a pair"), ({"a": (Model(), "b")}, "weight"),
        ([], "at least one"),
        ({"total": (by_ids, 1.0), "b": (by_ids, 1.0)}, "reward 'total': a part needs another name"),
        ({"score": (by_ids, 1.0), "b": (by_ids, 1.0)}, "reward 'score': a part needs another name"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            trainer(reward=bad)


@pytest.mark.parametrize("kind", ["mean", "mean_std"])
def test_normalised_rewards_have_mean_0_over_the_start(kind):
    """Reference, point 4."""
    made = trainer(reward=lambda p, r: [100.0 + 7 * len(x) for x in r], reward_normalisation=kind)
    record = made.step(PROMPTS)
    assert record["reward/score"] > 100  # reported as it was given
    calibrated = made._state.normaliser
    assert calibrated.count == 24
    made.step(PROMPTS[:6])
    assert made._state.normaliser == calibrated
    scores = np.array([107.0, 114.0])
    shifted = scores - calibrated.mean
    deviation = math.sqrt(calibrated.squares / 24)
    np.testing.assert_allclose(
        calibrated.apply(scores), shifted / (deviation if kind == "mean_std" else 1)
    )


def test_running_normalisation_has_seen_all():
    rng = np.random.default_rng(0)
    chunks = [rng.normal(3, 2, n) for n in (4, 1, 7)]
    seen = Normaliser("running")
    for chunk in chunks:
        seen = seen.seen(chunk)
    whole = np.concatenate(chunks)
    np.testing.assert_allclose(seen.apply(whole), (whole - whole.mean()) / whole.std())
    np.testing.assert_array_equal(Normaliser("running").seen(np.ones(1)).apply(np.ones(1)), [0.0])


# -- runs ------------------------------------------------------------------------------------------


class StopAfter(Callback):
    def __init__(self, step):
        self.step, self.seen = step, 0

    def on_step(self, record):
        self.seen = record["step"]

    def __call__(self):
        return self.seen >= self.step


RUNS = {
    "separate": {"adaptive_kl_target": 0.01, "adaptive_kl_horizon": 50.0, "whiten_rewards": True,
                 "reward_normalisation": "running", "minibatches": 2, "save_steps": 1,
                 "score_after_end": True},
    "shared": {"critic": "shared", "reward_normalisation": "mean_std", "tf1_epsilon": True,
               "optimizer": "adam"},
    "lora": {"lora": LoraConfig(rank=2), "adaptive_kl_target": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_two_steps_and_a_resume_are_four(name, tmp_path):
    def make():
        return trainer(model(0), num_epochs=1, **RUNS[name])

    whole = make()
    result = whole.fit(PROMPTS, PROMPTS[:5], output_dir=tmp_path / "whole")
    assert result.steps == 4
    first = make()
    stop = StopAfter(2)
    out = tmp_path / "part"
    part = first.fit(PROMPTS, PROMPTS[:5], output_dir=out, callbacks=[stop], stop=stop)
    assert (part.steps, part.stopped_reason) == (2, "interrupted")
    again = make()
    rest = again.fit(PROMPTS, PROMPTS[:5], output_dir=out, resume=True)
    assert (rest.steps, rest.stopped_reason) == (4, "finished")
    require_same(weights(whole), weights(again))
    assert again._state == whole._state
    require_same(
        {n: np.asarray(a) for n, a in whole.optimizer.state_dict().items()},
        {n: np.asarray(a) for n, a in again.optimizer.state_dict().items()},
    )
    records = [
        [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        for path in (tmp_path / "whole/metrics.jsonl", tmp_path / "part/metrics.jsonl")
    ]
    assert records[0] == records[1]
    assert len(records[0]) == 5


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from test_ppo_runs import PROMPTS, RUNS, Callback, model, trainer

    class Kill(Callback):
        def on_step(self, record):
            if record["step"] == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    made = trainer(model(0), num_epochs=1, **RUNS["separate"])
    made.fit(PROMPTS, PROMPTS[:5], output_dir={out!r}, callbacks=[Kill()])
"""


def test_a_killed_run_ends_as_the_one_that_never_was(tmp_path):
    code = textwrap.dedent(KILLED).format(tests=os.path.dirname(__file__), out=str(tmp_path / "a"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = trainer(model(0), num_epochs=1, **RUNS["separate"])
    assert again.fit(PROMPTS, PROMPTS[:5], output_dir=tmp_path / "a", resume=True).steps == 4
    whole = trainer(model(0), num_epochs=1, **RUNS["separate"])
    whole.fit(PROMPTS, PROMPTS[:5], output_dir=tmp_path / "b")
    require_same(weights(whole), weights(again))


def test_another_reference_cannot_continue_the_run(tmp_path):
    stop = StopAfter(1)
    trainer(model(0)).fit(PROMPTS, output_dir=tmp_path, callbacks=[stop], stop=stop)
    with pytest.raises(CheckpointError, match="frozen parameters are not those"):
        trainer(model(0), reference=model(1)).fit(PROMPTS, output_dir=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"training.clip_epsilon was 0.2, now it is 0.3"):
        trainer(model(0), clip_epsilon=0.3).fit(PROMPTS, output_dir=tmp_path, resume=True)


def test_a_step_that_fails_saves_the_state_before_it(tmp_path):
    calls = []

    def fails_at_third(prompts, responses):
        calls.append(1)
        return [math.nan if len(calls) == 3 else 1.0] * len(responses)

    made = trainer(reward=fails_at_third)
    with pytest.raises(NumericalError, match=r"step 3: .*is nan.*before it is in .*step-0000"):
        made.fit(PROMPTS, output_dir=tmp_path)
    assert (tmp_path / "checkpoints/step-00000002").is_dir()


def test_a_step_that_fails_within_its_updates_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    made = trainer(save_steps=1)
    norms = []

    def norm(grads):
        norms.append(1)
        return math.inf if len(norms) == 6 else 1.0

    monkeypatch.setattr("loopos.methods.policy_update.gradient_norm", norm)
    with pytest.raises(NumericalError, match=r"step 2: the gradient.*continue from .*step-0+1"):
        made.fit(PROMPTS, output_dir=tmp_path)
    assert not (tmp_path / "checkpoints/step-00000002").exists()


def test_an_interrupt_in_a_rollout_saves_the_step_before(tmp_path):
    calls = []

    def interrupted(prompts, responses):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [1.0] * len(responses)

    with pytest.raises(Interrupted, match="after step 1, saved in"):
        trainer(reward=interrupted).fit(PROMPTS, output_dir=tmp_path)
    assert (tmp_path / "checkpoints/step-00000001").is_dir()


def test_an_interrupt_in_an_update_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    norms = []

    def norm(grads):
        norms.append(1)
        if len(norms) == 6:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr("loopos.methods.policy_update.gradient_norm", norm)
    with pytest.raises(Interrupted, match=r"in the update of step 2; continue from .*step-0+1"):
        trainer(save_steps=1).fit(PROMPTS, output_dir=tmp_path)


def test_dropout_is_off():
    """Reference, point 9: in every network, or the first ratio would not be 1."""
    records = []
    for rate in (0.0, 0.5):
        lora = LoraConfig(rank=2, dropout=rate)
        made = trainer(model(dropout=rate), lora=lora, ppo_epochs=1)
        records.append([without_times(made.step(PROMPTS[i : i + 6])) for i in (0, 6, 12)])
    assert records[0] == records[1]


def test_rollouts_of_smaller_weights(monkeypatch):
    """Contract, point 8: log-probabilities are computed again, so the first ratio is 1."""
    asked = []

    def rounded(policy, weights):
        asked.append(weights)
        cut = np.uint32(0xFFFF0000)
        arrays = {n: (p.data.view(np.uint32) & cut).view(np.float32)
                  for n, p in policy.parameters().items()}  # fmt: skip
        return Transformer(policy.config, arrays=arrays)

    module = importlib.import_module("loopos.generation.generate")
    monkeypatch.setattr(module, "with_weights", rounded)
    made = trainer(sharp(), rollout_weights="bfloat16", ppo_epochs=1)
    rollout = made.sample(PROMPTS[:6])
    exact = rollouts.collect(made.policy, rollout, 1.0)["logprobs"]
    assert 1e-3 < np.abs(exact - rollout.logprobs).max() < 0.3
    assert made.step(PROMPTS[:6])["ppo/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert asked == ["bfloat16"] * 2
    with pytest.raises(NumericalError, match="was sampled with a log-probability that differs"):
        trainer(sharp(), rollout_weights="float32").step(PROMPTS[:6])


def test_a_second_run_goes_on_from_the_first():
    made = trainer()
    made.fit(PROMPTS)
    assert made.steps == 4
    again = made.fit(PROMPTS)
    assert made.steps == 4
    assert again.history[0]["kl/mean"] != 0  # the reference is still the start


def test_tables_of_samples():
    tables = []
    made = trainer(sample_steps=2)
    made.fit(PROMPTS, on_samples=lambda step, rows: tables.append((step, rows)))
    assert [step for step, _ in tables] == [2, 4]
    assert tables[0][1][0].keys() == {"prompt", "response", "score", "tokens", "ended"}
    assert len(tables[0][1]) == 6


def test_evaluation_is_the_same_whenever_it_is_asked_for():
    made = trainer()
    first = made.evaluate(PROMPTS)
    assert first == made.evaluate(PROMPTS)
    assert first["kl/mean"] == 0
    made.step(PROMPTS[:6])
    assert made.evaluate(PROMPTS) != first


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_programmatic_reward_is_learnt(seed):
    with use_backend(FAST):
        made = trainer(model(seed), batch_size=12, kl_coefficient=0.02, num_epochs=15, seed=seed)
        history = made.fit(PROMPTS).history
    start, end = (
        np.mean([r["reward/score"] for r in part]) for part in (history[:2], history[-3:])
    )
    assert start < 0.2
    assert end > 0.8


def test_backends_learn_alike_from_recorded_samples():
    recorder = trainer(model(0), learning_rate=1e-3)
    others = {
        name: trainer(model(0), learning_rate=1e-3)
        for name in sorted({*available_backends()} - {"numpy"})
    }
    for step in range(20):
        prompts = [PROMPTS[(6 * step + i) % 24] for i in range(6)]
        with use_backend("numpy"):
            rollout = recorder.sample(prompts)
            expected = without_times(recorder.learn_from(rollout))
        for name, made in others.items():
            with use_backend(name):
                found = without_times(made.learn_from(rollout))
            for key, value in expected.items():
                np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-3, err_msg=key)
    for made in others.values():
        for name, array in weights(made).items():
            np.testing.assert_allclose(array, recorder.parameters()[name].data, atol=1e-3)


def test_value_tensor_has_a_row_a_token():
    critic = Critic(None, np.ones((1, 2)), np.zeros(1))
    rollout = one_response(3)
    states = Tensor(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    np.testing.assert_array_equal(critic.values(rollout, states).data, [3.0, 7.0, 11.0])
