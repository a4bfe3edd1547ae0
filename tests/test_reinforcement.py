"""Reward model and PPO in one: what is preferred is learnt, then sought."""

import json
from dataclasses import replace

import numpy as np
import pytest

from loopos import use_backend
from loopos.backends import available_backends
from loopos.data.preferences import plain_chat
from loopos.data.tokenizer import train_bpe
from loopos.errors import ConfigError
from loopos.methods.reinforcement import ModelReward, ReinforcementTrainer
from loopos.models import load_model
from loopos.models.reward import RewardModel, load_reward_model
from loopos.models.transformer import Transformer, TransformerConfig

FAST = "cython" if "cython" in available_backends() else "numpy"
WORDS = ["red", "green", "blue", "grey"]
PROMPTS = [f"say {a} {b}" for a in WORDS for b in WORDS]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([" ".join([*PROMPTS, *WORDS])] * 20, 300)


@pytest.fixture
def preferences(tmp_path):
    """Responses with more of "blue" are preferred."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(160):
        count = int(rng.integers(2, 5))
        chosen = ["blue" if rng.random() < 0.8 else str(rng.choice(WORDS)) for _ in range(count)]
        rejected = [str(rng.choice(["red", "green", "grey"])) for _ in range(count)]
        rows.append({"prompt": PROMPTS[index % 16], "chosen": " " + " ".join(chosen),
                     "rejected": " " + " ".join(rejected)})  # fmt: skip
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(tokenizer, **more):
    config = TransformerConfig(d_model=32, num_heads=4, num_layers=2, d_ff=64,
                               vocab_size=tokenizer.vocab_size, max_seq_len=48)  # fmt: skip
    given = {"learning_rate": 3e-3, "batch_size": 16, "max_new_tokens": 6, "seed": 0,
             "kl_coefficient": 0.02, "num_epochs": 25} | more  # fmt: skip
    return ReinforcementTrainer(Transformer(config, 0), tokenizer, **given)


def test_preferences_are_learnt_and_then_sought(tokenizer, preferences, tmp_path):
    with use_backend(FAST):
        trainer = make(tokenizer)
        start = {n: p.data.copy() for n, p in trainer.policy.parameters().items()}
        trainer.train_reward_model(preferences, learning_rate=3e-3, num_epochs=3)
        assert trainer.rewards.evaluate(preferences)["accuracy"] > 0.95
        for name, p in trainer.policy.parameters().items():
            np.testing.assert_array_equal(p.data, start[name])
        blue, red = trainer.compute_reward(["say red"] * 2, [" blue blue", " red red"])
        assert blue > red
        before = trainer.ppo_train_step(PROMPTS)
        model = {n: p.data.copy() for n, p in trainer.reward_model.parameters().items()}
        result = trainer.ppo_train(PROMPTS)
    scores = [record["reward/score"] for record in result.history]
    spread = np.std([row["score"] for row in trainer.ppo.samples])
    assert np.mean(scores[-3:]) > before["reward/score"] + 1.0
    assert spread < 5
    for name, p in trainer.reward_model.parameters().items():  # frozen
        np.testing.assert_array_equal(p.data, model[name])
    texts = trainer.generate_with_rl(PROMPTS[:2], max_new_tokens=4, seed=1)
    assert len(texts) == 2
    assert all(isinstance(text, str) for text in texts)
    trainer.save(tmp_path / "out")
    np.testing.assert_array_equal(
        load_model(tmp_path / "out/policy").head_weight.data, trainer.ppo.policy.head_weight.data
    )
    load_reward_model(tmp_path / "out/reward_model")
    with pytest.raises(ConfigError, match="PPO has begun"):
        trainer.train_reward_model(preferences)


def test_sampled_tokens_are_scored_as_they_are(tokenizer):
    """As the text's score, where the response ended: at its end-of-text token."""
    trainer = make(tokenizer, reward_model=RewardModel(make(tokenizer).policy, 3))
    ids = [np.array(tokenizer.encode(text), np.int32) for text in ("say red", " blue blue")]
    ended = np.append(ids[1], tokenizer.eos_id).astype(np.int32)
    found = ModelReward(trainer.reward_model).score(
        [], [], prompt_ids=[ids[0]] * 2, response_ids=[ended, ids[1]]
    )
    expected = trainer.compute_reward(["say red"], [" blue blue"])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert found[0] != found[1]


def test_rewards_of_the_facade(tokenizer):
    with pytest.raises(ConfigError, match=r"train_reward_model\(\) first"):
        make(tokenizer).ppo_train_step(PROMPTS[:4])
    with pytest.raises(ConfigError, match="reward_weight"):
        make(tokenizer, reward_weight=1.0)
    with pytest.raises(ConfigError, match="did you mean 'clip_epsilon'"):
        make(tokenizer, clip_epsilom=0.1)
    policy = make(tokenizer).policy
    other = replace(policy.config, vocab_size=policy.config.vocab_size + 1)
    with pytest.raises(ConfigError, match="the reward model has a vocab_size of"):
        make(tokenizer, reward_model=RewardModel(Transformer(other), 3))
    alone = make(tokenizer, reward=lambda p, r: [float(len(x)) for x in r])
    record = alone.ppo_train_step(PROMPTS[:4])
    assert record["reward/score"] == np.mean([len(row["response"]) for row in alone.ppo.samples])
    both = make(
        tokenizer, reward=lambda p, r: [1.0] * len(r), reward_weight=2.0,
        reward_model=RewardModel(make(tokenizer).policy, 3),
    )  # fmt: skip
    record = both.ppo_train_step(PROMPTS[:4])
    assert record["reward/extra"] == 1
    assert record["reward/score"] == pytest.approx(record["reward/model"] + 2)
    np.testing.assert_array_equal(  # the critic has moved from the reward model's head
        np.sign(both.ppo.critic.weight.data), np.sign(both.reward_model.weight.data)
    )


def test_conversations_are_written_by_the_template_of_the_facade():
    tokenizer = train_bpe([" ".join([*PROMPTS, *WORDS])] * 20, 300)
    tokenizer.chat_template = "{{ messages }}"
    blue, red = ([{"role": "assistant", "content": word}] for word in ("blue", "red"))
    rows = [{"prompt": [{"role": "user", "content": prompt}], "chosen": blue, "rejected": red}
            for prompt in PROMPTS]  # fmt: skip
    with pytest.raises(ConfigError, match="give the trainer what renders it, chat=..."):
        make(tokenizer).train_reward_model(rows, num_epochs=1)
    trainer = make(tokenizer, chat=plain_chat)
    trainer.train_reward_model(rows, num_epochs=6, batch_size=4, learning_rate=3e-3)
    asked = [plain_chat(row["prompt"], add_generation_prompt=True) for row in rows]
    blue, red = (trainer.compute_reward(asked, [f" {word}"] * 16) for word in ("blue", "red"))
    assert (blue > red).all()
