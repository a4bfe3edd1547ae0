"""PPO step by step: goldens through the trainer, records, networks, and what options change."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from loopos import use_backend
from loopos.backends import available_backends
from loopos.errors import ConfigError, DataError
from loopos.methods import ppo, rollouts
from loopos.methods.policy_state import Scored
from loopos.methods.ppo import Critic, Options, PPOTrainer, preset
from loopos.methods.rewards import Normaliser
from loopos.methods.rollouts import Prompts, Rollout
from loopos.models.heads import SequenceClassifier
from loopos.models.lora import LoraConfig, add_lora
from loopos.models.transformer import Transformer, TransformerConfig

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


# -- goldens, through the trainer ------------------------------------------------------------------


def advantages_of(rewards, values, **options):
    """Advantages and returns for rewards of one response, given as its KL and its score."""
    made = trainer(kl_coefficient=1.0, **options)
    made._state = replace(made._state, kl_coefficient=1.0)
    rewards = np.asarray(rewards, np.float64)
    rollout = one_response(len(rewards))
    kl = -np.append(rewards[:-1], 0.0)
    scored = Scored(rewards[-1:], rewards[-1:], {}, Normaliser())
    data = {"values": np.asarray(values, np.float64)}
    _, arrays, figures = made._advantages(rollout, data, kl, scored)
    return arrays["advantages"], arrays["returns"], figures


def test_golden_of_advantages():
    """Reference, point 11."""
    advantages, returns, figures = advantages_of(
        [0, 0, 0, 1], [0, 0, 0, 1], gamma=0.9, lam=0.95, whiten_advantages=False
    )
    np.testing.assert_allclose(advantages, [0.657923, 0.7695, 0.9, 0], atol=1e-6)
    np.testing.assert_allclose(returns, [0.657923, 0.7695, 0.9, 1], atol=1e-6)
    assert figures["reward/total"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("unbiased", "expected"),
    [(True, [0.139407, 0.504555, 0.869703]), (False, [0.050807, 0.438105, 0.825403])],
)
def test_golden_of_whitened_rewards(unbiased, expected):
    """Reference, point 12: rewards keep their mean. With gamma 0 they are the advantages."""
    found, _, _ = advantages_of(
        np.arange(12, 21) / 10, np.zeros(9), gamma=0.0, lam=0.0, whiten_rewards=True,
        whiten_advantages=False, whiten_unbiased=unbiased,
    )  # fmt: skip
    np.testing.assert_allclose(found[:3], expected, atol=1e-6)


@pytest.mark.parametrize(("unbiased", "first"), [(True, -1.460593), (False, -1.549193)])
def test_golden_of_whitened_advantages(unbiased, first):
    """Reference, point 12: advantages lose theirs."""
    found, returns, _ = advantages_of(
        np.arange(12, 21) / 10, np.zeros(9), gamma=0.0, lam=0.0, whiten_unbiased=unbiased
    )
    np.testing.assert_allclose(found[0], first, atol=1e-6)
    assert abs(found.mean()) < 1e-12
    np.testing.assert_allclose(returns, np.arange(12, 21) / 10)  # made before


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", [-0.5, 0, 0.5]), ("k2", [0.125, 0, 0.125]), ("k3", [0.148721, 0, 0.106531])],
)
def test_golden_of_the_kl_estimators(estimator, expected):
    """Reference, point 10."""
    made = trainer(kl_estimator=estimator)
    kl = made._kl({"logprobs": np.array([-0.5, 0, 0.5]), "ref_logprobs": np.zeros(3)})
    np.testing.assert_allclose(kl, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected"),
    [(1, 1.5, -1.2), (-1, 0.5, 0.8), (1, math.exp(0.1), -1.105171)],
)
def test_golden_of_the_policy_loss(advantage, ratio, expected):
    """Reference, point 14."""
    made = trainer(model(dtype=np.float64))
    rollout = one_response(1)
    data = rollouts.collect(made.policy, rollout, 1.0, values=made.critic.values)
    data |= {"advantages": np.array([float(advantage)]), "returns": data["values"]}
    data["logprobs"] = data["logprobs"] - math.log(ratio)
    found = made._gradients(rollout, data, np.arange(1), first=False)
    assert found["policy_loss"] == pytest.approx(expected, abs=1e-6)
    assert found["ratio_max"] == pytest.approx(ratio)
    assert found["clipped"] == (abs(ratio - 1) > 0.2)


def test_value_loss_by_hand():
    """Reference, point 15: V = 1, old V = 0.5, R = 0: V is clipped to 0.7, and the worse counts."""
    made = trainer(model(dtype=np.float64), value_coefficient=0.1)
    made.critic.bias.data[:] = 1.0
    rollout = one_response(2)
    data = rollouts.collect(made.policy, rollout, 1.0, values=made.critic.values)
    np.testing.assert_allclose(data["values"], 1.0)
    data |= {"advantages": np.zeros(2), "returns": np.array([0.0, 2.0]), "values": np.full(2, 0.5)}
    found = made._gradients(rollout, data, np.arange(1), first=True)
    assert found["value_loss"] == pytest.approx(0.5 * (1.0 + (0.7 - 2) ** 2) / 2)
    assert found["loss"] == pytest.approx(0.1 * found["value_loss"])


def test_adaptive_kl_by_hand():
    """Reference, point 13: far above the target, the error is clipped at 0.2."""
    made = trainer(kl_coefficient=0.15, adaptive_kl_target=6.0, adaptive_kl_horizon=10_000.0)
    state = made._after(made._state, 60.0, 512)
    assert state.kl_coefficient == pytest.approx(0.15 * (1 + 0.2 * 512 / 10_000))
    assert made._after(state, 6.0, 512) == state
    fixed = trainer(kl_coefficient=0.15)
    assert fixed._after(fixed._state, 60.0, 512).kl_coefficient == 0.15


@pytest.mark.parametrize(
    ("mode", "penalty", "expected"), [("replace", -1.0, -1.0), ("subtract", 1.0, 4.0)]
)
def test_missing_stop_token(mode, penalty, expected):
    """Reference, point 8: TL;DR replaces the score, TRL lowers it."""
    made = trainer(reward=lambda p, r: [5.0] * len(r), missing_eos_penalty=penalty,
                   missing_eos_mode=mode)  # fmt: skip
    prompts = made._take(PROMPTS[:2], None)
    scored = made._score(Rollout.of(prompts, [[1, 0], [1, 2]], ended=[True, False]))
    np.testing.assert_allclose(scored.final, [5.0, expected])
    np.testing.assert_allclose(scored.raw, [5.0, 5.0])


def test_presets_are_their_recipes():
    """Reference, points 8, 12, 13, 17, 18, 19."""
    openai, tldr, trl = (preset(name, batch_size=4) for name in ppo.PRESETS)
    assert (openai.adaptive_kl_target, openai.adaptive_kl_horizon) == (6.0, 10_000.0)
    assert (openai.kl_coefficient, openai.critic, openai.tf1_epsilon) == (0.15, "shared", True)
    assert (openai.whiten_rewards, openai.whiten_unbiased) == (True, False)
    assert (tldr.kl_coefficient, tldr.learning_rate, tldr.eps) == (0.05, 3e-6, 1e-5)
    assert (tldr.missing_eos_mode, tldr.missing_eos_penalty) == ("replace", -1.0)
    assert (tldr.temperature, tldr.max_new_tokens, tldr.scheduler) == (0.7, 53, "linear")
    assert (tldr.ppo_epochs, tldr.minibatches, tldr.value_coefficient) == (4, 1, 0.1)
    assert (trl.missing_eos_mode, trl.whiten_unbiased, trl.whiten_rewards) == ("subtract", True,
                                                                              False)  # fmt: skip
    with pytest.raises(ConfigError, match="did you mean 'tldr-2024'"):
        preset("tldr-2025")
    with pytest.raises(ConfigError, match="unknown option 'clip_epsilom'.*clip_epsilon"):
        preset("trl", clip_epsilom=0.1)


# -- a step ----------------------------------------------------------------------------------------

NAMES = {
    "reward/score", "reward/total", "kl/mean", "entropy", "ppo/policy_loss", "ppo/value_loss",
    "ppo/approx_kl", "ppo/clip_fraction", "ppo/ratio_max", "value/explained_variance",
    "response/length", "response/eos_fraction", "time/rollout_s", "time/update_s", "tokens_per_s",
}  # fmt: skip


def test_record_of_a_step():
    """Reference, "reported per step", and the invariants that can be read there."""
    made = trainer(exact_kl=True)
    first = made.step(PROMPTS[:6])
    assert first.keys() >= NAMES | {"kl/exact", "loss", "grad_norm", "step"}
    assert json.loads(json.dumps(first)) == first
    assert first["kl/mean"] == first["kl/exact"] == 0.0
    assert 0 <= first["entropy"] <= math.log(9)
    assert first["ppo/ratio_max"] >= 1
    assert first["tokens"] == sum(3 + row["tokens"] for row in made.samples)
    assert first["response/length"] == np.mean([row["tokens"] for row in made.samples])
    assert first["response/eos_fraction"] == np.mean([row["ended"] for row in made.samples])
    assert first["reward/score"] == pytest.approx(np.mean([row["score"] for row in made.samples]))
    second = made.step(PROMPTS[6:12])
    assert second["step"] == 2
    assert second["kl/mean"] != 0.0
    assert second["kl/exact"] > 0.0


def test_one_epoch_of_one_minibatch_never_clips():
    record = trainer(ppo_epochs=1).step(PROMPTS[:6])
    assert record["ppo/clip_fraction"] == 0
    assert record["ppo/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert record["ppo/updates"] == 1


def test_reference_never_changes_and_the_policy_does():
    """Contract, point 9."""
    policy = model()
    before = {name: p.data.copy() for name, p in policy.parameters().items()}
    made = trainer(policy)
    for start in range(0, 24, 6):
        made.step(PROMPTS[start : start + 6])
    require_same({n: p.data for n, p in made.reference.parameters().items()}, before)
    for name, p in policy.parameters().items():
        if p.data.ndim == 2:
            assert not np.array_equal(p.data, before[name]), name


def test_with_adapters_the_reference_is_the_base():
    base = model()
    before = {name: p.data.copy() for name, p in base.parameters().items()}
    made = trainer(add_lora(base, LoraConfig(rank=2)))
    for start in range(0, 24, 6):
        made.step(PROMPTS[start : start + 6])
    require_same({n: p.data for n, p in base.parameters().items()}, before)
    for name, p in made.reference.parameters().items():
        assert np.shares_memory(p.data, base.parameters()[name].data)
        assert np.shares_memory(p.data, made.critic.body.parameters()[name].data)
    ups = [p for name, p in made.policy.parameters().items() if name.endswith("lora_b")]
    assert all(np.any(p.data) for p in ups)
    again = trainer(made.policy)  # whose adapters are not those of the reference any more
    assert again.step(PROMPTS[:6])["kl/mean"] != 0
    twin = trainer(model(), lora=LoraConfig(rank=2))
    twin.step(PROMPTS[:6])
    assert twin.policy.adapters


def test_critic_from_a_reward_model():
    """Reference, point 17."""
    start = SequenceClassifier(model(4), 1, "last", seed=2)
    made = trainer(critic=start)
    rollout = made.sample(PROMPTS[:6])
    values = rollouts.collect(made.policy, rollout, 1.0, values=made.critic.values)["values"]
    # The value of the last state but one is the reward model's score of what was there by then.
    cut = [rollout.tokens[a : b - 1] for a, b in
           zip(rollout.offsets[:-1], rollout.offsets[1:], strict=True)]  # fmt: skip
    from loopos.data.batch import Batch

    scores = start.logits(Batch.from_sequences(cut)).data[:, 0]
    np.testing.assert_allclose(values[rollout.response_offsets[1:] - 1], scores, atol=1e-5)
    before = {n: p.data.copy() for n, p in start.parameters().items()}
    made.step(PROMPTS[:6])
    require_same({n: p.data for n, p in start.parameters().items()}, before)
    with pytest.raises(ConfigError, match="one linear output"):
        trainer(critic=SequenceClassifier(model(4), 2, "last"))
    with pytest.raises(ConfigError, match="the critic has a vocab_size of 8, the policy has 9"):
        trainer(critic=SequenceClassifier(model(4, vocab_size=8), 1, "last"))
    with pytest.raises(ConfigError, match="shared critic"):
        PPOTrainer(model(), None, count_fives, Options(critic="shared"), critic=start)


def test_shared_critic_has_no_body_and_moves_the_policy():
    made = trainer(critic="shared", reward=lambda p, r: [1.0] * len(r), whiten_advantages=False)
    assert isinstance(made.critic, Critic)
    assert made.critic.body is None
    assert not any(name.startswith("critic.") for name in made.parameters())
    before = made.critic.weight.data.copy()
    made.step(PROMPTS[:6])
    assert not np.array_equal(before, made.critic.weight.data)


# -- options ---------------------------------------------------------------------------------------

CHANGES = {
    "clip_epsilon": 0.001, "clip_epsilon_high": 0.5, "kl_coefficient": 1.0, "kl_estimator": "k3",
    "entropy_coefficient": 0.5, "target_kl": 1e-9, "ppo_epochs": 2, "minibatches": 3,
    "temperature": 0.5, "max_new_tokens": 3, "missing_eos_penalty": 2.0,
    "reward_normalisation": "mean", "tf1_epsilon": True, "gamma": 0.5, "lam": 0.2,
    "whiten_advantages": False, "whiten_rewards": True, "whiten_unbiased": False,
    "critic": "shared", "value_coefficient": 1.0, "value_clip": 1e-3,
    "critic_learning_rate": 1e-5, "adaptive_kl_target": 0.01, "learning_rate": 1e-4, "eps": 1e-3,
    "max_grad_norm": 1e-4, "weight_decay": 0.5, "stop_ids": (0, 1, 2, 3), "optimizer": "sgd",
    "score_after_end": True,
}  # fmt: skip


@pytest.mark.parametrize("option", CHANGES)
def test_each_option_changes_the_result(option):
    common = {"clip_epsilon": 0.02, "kl_coefficient": 0.3, "learning_rate": 0.01,
              "adaptive_kl_horizon": 20.0}  # fmt: skip
    found = []
    for more in ({}, {option: CHANGES[option]}):
        made = trainer(model(0), **common | more)
        for start in (0, 6, 12):
            made.step(PROMPTS[start : start + 6])
        found.append({n: p.data for n, p in made.policy.parameters().items()}
                     | {"value_head.weight": made.critic.weight.data})  # fmt: skip
    assert differ(*found)


@pytest.mark.parametrize("option", ["missing_eos_mode", "kl_exact", "adaptive_kl_horizon", "noise"])
def test_options_that_depend_on_others(option):
    base, change = {
        "missing_eos_mode": ({"missing_eos_penalty": 2.0}, {"missing_eos_mode": "replace"}),
        "kl_exact": ({"kl_coefficient": 1.0}, {"kl_estimator": "exact"}),
        "adaptive_kl_horizon": ({"adaptive_kl_target": 1e-3}, {"adaptive_kl_horizon": 10.0}),
        "noise": ({}, {"seed": 2}),
    }[option]
    found = []
    for more in (base, base | change):
        made = trainer(model(0), learning_rate=0.02, whiten_advantages=False, **more)
        for start in (0, 6, 12):
            made.step(PROMPTS[start : start + 6])
        found.append({n: p.data for n, p in made.policy.parameters().items()})
    assert differ(*found)


def test_options_that_change_the_memory_only():
    found = []
    for more in ({}, {"rollout_batch_size": 2}, {"gradient_checkpointing": True}):
        made = trainer(model(0), **more)
        with use_backend(FAST):
            made.step(PROMPTS[:6])
        found.append(weights(made))
    require_same(found[0], found[1])
    require_same(found[0], found[2])


@pytest.mark.parametrize("more", [{}, {"critic": "shared"}, {"score_after_end": True}])
def test_the_first_pass_may_be_the_one_that_was_recorded(more, monkeypatch):
    found = []
    for tokens in (8192, 20):  # in pieces nothing is recorded, and the pass is made again
        monkeypatch.setattr(rollouts, "_PASS_TOKENS", tokens)
        made = trainer(model(0, np.float64), **more)
        rollout, passes = made.sample(PROMPTS[:6]), []
        forward = made.policy.get_hidden_states
        made.policy.get_hidden_states = lambda *a, f=forward, p=passes, **k: (
            p.append(1) or f(*a, **k)
        )
        made.learn_from(rollout)
        found.append(weights(made))
        assert (len(passes) == 4) == (tokens == 8192)  # one for each epoch
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"clip_epsilon": 0}, "training.clip_epsilon: expected a number above 0"),
        ({"temperature": 0}, "training.temperature: expected a number above 0"),
        ({"ppo_epochs": 1.5}, "training.ppo_epochs: expected a whole number"),
        ({"kl_estimator": "k4"}, "training.kl_estimator: expected one of k1, k2, k3, exact"),
        ({"missing_eos_mode": "subtracted"}, "did you mean 'subtract'"),
        ({"batch_tokens": 64}, "training.batch_tokens: of no use"),
        ({"length_bucketing": True}, "training.length_bucketing: of no use"),
        ({"lam": 1.2}, r"training.lam: expected a number in \[0, 1\]"),
        ({"critic": "seperate"}, "did you mean 'separate'"),
        ({"reward_normalisation": "std"}, "training.reward_normalisation"),
        ({"critic": "shared", "critic_learning_rate": 1e-3}, "shared critic has the policy's"),
        ({"critic": "shared", "score_after_end": True}, "needs a separate critic"),
        ({"kl_coefficient": 0.0, "adaptive_kl_target": 1.0}, "steers a kl_coefficient above 0"),
        ({"tf1_epsilon": True, "optimizer": "sgd"}, "sgd, which has no eps"),
        ({"max_new_tokens": True}, "training.max_new_tokens"),
        ({"stop_ids": (0, 9)}, "training.stop_ids: 9 is outside the vocabulary of 9"),
        ({"reference": model(1, vocab_size=11)}, "has a vocab_size of 11, the policy has 9"),
        ({"reference": model(1, causal=False)}, "the reference: expected a causal model"),
        ({"seed": -1}, "seed: expected a whole number that is not negative"),
    ],
)
def test_options_that_cannot_be(more, message):
    with pytest.raises(ConfigError, match=message):
        trainer(**more)


def test_prompts_that_cannot_be():
    with pytest.raises(ConfigError, match="there is no stop token that could end a response"):
        trainer(missing_eos_penalty=1.0, stop_ids=())
    made = trainer()
    for prompts, message in (
        ("text", "a list of prompts"), ([[]], "prompt 0"), ([[1], list(range(24))], "prompt 1 has"),
        (["hi"], "prompt 0 is a text"), ([[1.5]], "prompt 0"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            made.step(prompts)
    with pytest.raises(DataError, match="expected 2 answers"):
        made.step(PROMPTS[:2], [1])
    policy = model()
    twin = Transformer(policy.config, arrays={n: p.data for n, p in policy.parameters().items()})
    with pytest.raises(ConfigError, match="shares weights"):
        trainer(policy, reference=twin)
    same = trainer(policy, reference=policy)
    assert same.reference is not policy


def test_tf1_epsilon_is_added_before_the_correction():
    """Reference, point 18: the update of TensorFlow 1 by hand, for one step of one parameter."""
    made = trainer(model(0, np.float64), optimizer="adam", tf1_epsilon=True, eps=1e-3,
                   ppo_epochs=1)  # fmt: skip
    before, gradients = weights(made), {}
    step = made.optimizer.step

    def watched(scale, rate):
        gradients.update({n: p.grad.copy() for n, p in made.optimizer.parameters.items()})
        step(scale, rate)

    made.optimizer.step = watched
    made.step(PROMPTS[:6])
    b1, b2 = made.options.betas
    for name, g in gradients.items():
        m, v = (1 - b1) * g, (1 - b2) * g * g
        rate = 3e-3 * math.sqrt(1 - b2) / (1 - b1)
        expected = before[name] - rate * m / (np.sqrt(v) + 1e-3)
        np.testing.assert_allclose(made.parameters()[name].data, expected, rtol=1e-9, atol=1e-12)
