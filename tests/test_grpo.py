"""GRPO, Dr. GRPO, DAPO and RLOO: groups, their switches, resuming, learning to add."""

import json
from dataclasses import replace

import numpy as np
import pytest

from loopos import use_backend
from loopos.backends import available_backends
from loopos.data.tokenizer import train_bpe
from loopos.errors import ConfigError
from loopos.methods import rollouts
from loopos.methods.grpo import GRPOTrainer
from loopos.methods.policy_state import Scored
from loopos.methods.rewards import Normaliser
from loopos.methods.rollouts import Prompts, Rollout
from loopos.models.lora import LoraConfig
from loopos.models.transformer import Transformer, TransformerConfig
from loopos.training.trackers import Callback

FAST = "cython" if "cython" in available_backends() else "numpy"
TIMED = ("time_s", "tokens_per_s", "time/rollout_s", "time/reward_s", "time/update_s")
#: Two numbers; the answer is the larger one, said as a token from 4.
PROBLEMS = [[a, b] for a in range(4) for b in range(4)]
ANSWERS = [max(problem) + 4 for problem in PROBLEMS]


def model(seed=0, dtype=np.float32, **more):
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 24, "vocab_size": 9,
             "max_seq_len": 24} | more  # fmt: skip
    return Transformer(TransformerConfig(**sizes), seed, dtype)


def right(prompts, responses, answers):
    return [float(r[0] == a) for r, a in zip(responses, answers, strict=True)]


def fives(prompts, responses):
    return [sum(token == 5 for token in response) / 6 for response in responses]


def trainer(policy=None, reward=fives, **options):
    given = {"learning_rate": 3e-3, "batch_size": 4, "max_new_tokens": 6, "stop_ids": (0,),
             "group_size": 4, "seed": 1} | options  # fmt: skip
    return GRPOTrainer(policy or model(), None, reward, **given)


def weights(of):
    return {name: p.data.copy() for name, p in of.parameters().items()}


def require_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def learnt_from(made, scores, responses=([1], [2, 2], [3, 3], [4, 4, 4]), **data):
    count = len(responses)
    prompts = Prompts([np.array([1], np.int32)] * count, [[1]] * count)
    rollout = Rollout.of(prompts, responses)
    given = {"logprobs": np.zeros(rollout.response_offsets[-1])} | data
    scores = np.array(scores, float)
    scored = Scored(scores, scores, {}, Normaliser())
    return made._advantages(rollout, given, data.get("kl"), scored)


def test_advantages_of_groups_by_hand():
    options = {"group_size": 2, "loss_aggregation": "token"}
    scores = [1.0, 3.0, 5.0, 5.0]
    lengths = [1, 2, 2, 3]
    half = 1 / (np.sqrt(2) + 1e-4)
    for more, expected in (
        ({}, [-half, half, 0, 0]),
        ({"scale": "none"}, [-1, 1, 0, 0]),
        ({"scale": "batch"}, np.array([-1, 1, 0, 0]) / (np.std(scores, ddof=1) + 1e-4)),
        ({"scale": "none", "baseline": "leave_one_out"}, [-2, 2, 0, 0]),
    ):
        _, arrays, figures = learnt_from(trainer(**options, **more), scores)
        np.testing.assert_allclose(arrays["advantages"], np.repeat(expected, lengths))
        assert figures["grpo/flat_groups"] == 1
        assert figures["grpo/score_std"] == 0.5


def test_kl_in_the_reward_is_taken_off_the_score():
    made = trainer(group_size=2, kl_in="reward", kl_estimator="k1", kl_coefficient=0.5,
                   scale="none", loss_aggregation="token")  # fmt: skip
    kl = np.array([2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 4.0])
    _, arrays, figures = learnt_from(made, [1.0, 1.0, 0.0, 0.0], kl=kl)
    np.testing.assert_allclose(arrays["advantages"], [0, 0, 0, 1, 1, -1, -1, -1])
    assert figures["reward/total"] == pytest.approx(0.5 - 0.5 * 8 / 4)


def test_aggregations_weigh_tokens_as_they_say():
    """Of responses of 1, 2, 2 and 3 tokens; the loss at the start is the mean of -A."""
    scores = np.array([0.0, 3.0, 1.0, 7.0])
    centred = scores - scores.mean()
    lengths = np.array([1, 2, 2, 3])
    for how, expected in (
        ("token", -(centred * lengths).sum() / lengths.sum()),
        ("sequence", -centred.mean()),
        ("constant", -(centred * lengths).sum() / (4 * 6)),
    ):
        made = trainer(model(dtype=np.float64), loss_aggregation=how, scale="none",
                       kl_coefficient=0.0)  # fmt: skip
        rollout, arrays, _ = learnt_from(made, scores)
        arrays |= rollouts.collect(made.policy, rollout, 1.0)
        found = made._gradients(rollout, arrays, np.arange(4), first=True)
        assert found["policy_loss"] == pytest.approx(expected, abs=1e-12)


def test_groups_without_spread_are_left_out():
    """DAPO: and counted; where nothing is left, nothing is updated, and the record says so."""
    made = trainer(dynamic_sampling=True, group_size=2)
    kept, arrays, figures = learnt_from(made, [1.0, 3.0, 5.0, 5.0])
    np.testing.assert_array_equal(kept.targets, [1, 2, 2])
    assert {array.size for array in arrays.values()} == {3}
    assert figures["grpo/flat_groups"] == 1
    whole, _, _ = learnt_from(trainer(group_size=2), [1.0, 3.0, 5.0, 5.0])
    assert len(whole) == 4
    _, _, figures = learnt_from(trainer(group_size=3), [0.1] * 3 + [0.1, 0.1, 0.2], [[1]] * 6)
    assert figures["grpo/flat_groups"] == 1  # though the mean of three 0.1 is none
    flat = trainer(dynamic_sampling=True, reward=lambda p, r: [1.0] * len(r))
    before = weights(flat)
    record = flat.step(PROBLEMS[:4])
    assert (record["ppo/updates"], record["grpo/flat_groups"]) == (0, 4)
    assert flat.steps == 1
    require_same(weights(flat), before)


def test_a_divergence_in_the_reward_makes_groups_that_teach():
    options = {"dynamic_sampling": True, "kl_in": "reward", "kl_coefficient": 0.5}
    apart = GRPOTrainer(model(), None, lambda p, r: [1.0] * len(r), reference=model(1),
                        max_new_tokens=4, batch_size=4, **options)  # fmt: skip
    record = apart.step(PROBLEMS[:4])
    assert (record["grpo/flat_groups"], record["grpo/score_std"]) == (0, 0.0)
    assert record["ppo/updates"] == apart.options.ppo_epochs


def test_record_and_groups_of_a_step():
    made = trainer(reward=right)
    record = made.step(PROBLEMS[:4], ANSWERS[:4])
    assert json.loads(json.dumps(record)) == record
    assert record["kl/mean"] == 0
    assert record["ppo/kl_loss"] == pytest.approx(0, abs=1e-6)
    assert [row["prompt"] for row in made.samples] == [p for p in PROBLEMS[:4] for _ in range(4)]
    assert len({tuple(row["response"]) for row in made.samples[:4]}) > 1
    unfixed = trainer(kl_coefficient=0.0)
    assert unfixed.reference is None
    assert "kl/mean" not in unfixed.step(PROBLEMS[:4])


CHANGES = {
    "group_size": 2, "scale": "none", "loss_aggregation": "token", "kl_in": "reward",
    "dynamic_sampling": True, "clip_epsilon_high": 0.3, "kl_coefficient": 0.0, "kl_estimator": "k2",
    "ppo_epochs": 1, "temperature": 0.7, "entropy_coefficient": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("option", CHANGES)
def test_each_option_changes_the_result(option):
    found = []
    for more in ({}, {option: CHANGES[option]}):
        common = {"ppo_epochs": 3, "clip_epsilon": 0.01, "learning_rate": 0.02,
                  "kl_coefficient": 0.5, "weight_decay": 0.1}  # fmt: skip
        made = trainer(model(0), lambda p, r: [float(x[0] == 3) for x in r], **common | more)
        for start in (0, 4, 8):
            made.step(PROBLEMS[start : start + 4])
        found.append({n: p.data for n, p in made.policy.parameters().items()})
    assert any(not np.array_equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"group_size": 1}, "training.group_size: expected at least 2"),
        ({"scale": "groups"}, "did you mean 'group'"),
        ({"baseline": "leave_one_out"}, "training.scale: expected 'none'"),
        ({"kl_estimator": "exact"}, "needs kl_in 'reward'"),
        ({"loss_aggregation": "tokens"}, "did you mean 'token'"),
        ({"kl_in": "score"}, "training.kl_in"),
        ({"dynamic_sampling": 1}, "training.dynamic_sampling: expected true or false"),
        ({"critic": "shared"}, "unknown option 'critic'"),
    ],
)
def test_options_that_cannot_be(more, message):
    with pytest.raises(ConfigError, match=message):
        trainer(**more)
    made = trainer()
    rollout = made.sample(PROBLEMS[:1])
    with pytest.raises(ConfigError, match="groups of 4 responses, found 3"):
        made.learn_from(rollout.take(np.arange(3)))


class StopAfter(Callback):
    def __init__(self, step):
        self.step, self.seen = step, 0

    def on_step(self, record):
        self.seen = record["step"]

    def __call__(self):
        return self.seen >= self.step


@pytest.mark.parametrize(
    "more",
    [
        {"dynamic_sampling": True, "ppo_epochs": 2, "reward_normalisation": "running"},
        {"scale": "none", "baseline": "leave_one_out", "lora": LoraConfig(rank=2)},
    ],
)
def test_two_steps_and_a_resume_are_four(more, tmp_path):
    def make():
        return trainer(model(0), right, **more)

    def run(made, where, **how):
        return made.fit(PROBLEMS, answers=ANSWERS, output_dir=tmp_path / where, **how)

    whole = make()
    assert run(whole, "whole").steps == 4
    stop = StopAfter(2)
    assert run(make(), "part", callbacks=[stop], stop=stop).stopped_reason == "interrupted"
    again = make()
    assert run(again, "part", resume=True).steps == 4
    require_same(weights(whole), weights(again))
    assert again._state == whole._state
    records = [
        [{k: v for k, v in json.loads(line).items() if k not in TIMED}
         for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "part")
    ]  # fmt: skip
    assert records[0] == records[1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_verifiable_answers_are_learnt(seed):
    """No response but the right one scores."""
    with use_backend(FAST):
        made = trainer(
            model(seed, d_model=32, d_ff=64), right, batch_size=16, group_size=8, num_epochs=50,
            max_new_tokens=1, learning_rate=5e-3, stop_ids=(), kl_coefficient=0.001, seed=seed,
        )  # fmt: skip
        start = made.evaluate(PROBLEMS, ANSWERS)["reward/score"]
        made.fit(PROBLEMS, answers=ANSWERS)
        end = made.evaluate(PROBLEMS, ANSWERS)["reward/score"]
    assert start < 0.4
    assert end > start + 0.5


def test_texts_with_a_tokenizer():
    tokenizer = train_bpe(["one two three four five"] * 20, 270)
    policy = model(vocab_size=tokenizer.vocab_size)
    seen = []

    def reward(prompts, responses, answers):
        seen.append((prompts, responses, answers))
        return [float(len(r) + a) for r, a in zip(responses, answers, strict=True)]

    made = GRPOTrainer(policy, tokenizer, reward, group_size=2, max_new_tokens=5, batch_size=2)
    record = made.step(["one two", tokenizer.encode("three")], [1, 2])
    prompts, responses, answers = seen[0]
    assert prompts == ["one two"] * 2 + ["three"] * 2
    assert answers == [1, 1, 2, 2]
    assert all(isinstance(r, str) for r in responses)
    assert record["reward/score"] == np.mean([len(r) + a for r, a in
                                              zip(responses, answers, strict=True)])  # fmt: skip


def test_a_rollout_takes_its_parts():
    rollout = trainer().sample(PROBLEMS[:3])
    again = rollout.take(np.arange(len(rollout)))
    for name in ("tokens", "offsets", "response_offsets", "logprobs", "ended", "samples"):
        np.testing.assert_array_equal(getattr(again, name), getattr(rollout, name))
    assert replace(again, texts=rollout.texts).texts == rollout.texts
