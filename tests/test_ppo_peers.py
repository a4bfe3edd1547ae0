"""Whole PPO steps against PyTorch, written as the padded peers write them: masks, means, Adam.

The reference below is the arithmetic of TL;DR's code (Huang et al. 2024), of TRL's PPOTrainer and
of Ziegler et al. (2019), in float64 on a GPT-2 of transformers; responses are padded to their full
width, and everything is masked. Here nothing is padded. Weights after two steps must be the same.

The last test needs nothing of PyTorch: TRL's own loop has written what it found.
"""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from loopos.methods.ppo import PPOTrainer, preset
from loopos.methods.reinforcement import ModelReward
from loopos.methods.rollouts import Rollout
from loopos.models import load_model
from loopos.models.families import FAMILIES
from loopos.models.transformer import Transformer, TransformerConfig
from loopos.models.weights import to_hf_tensors

WIDTH, STOP, PAD = 5, 0, 8
PROMPTS = [[1, 2, 3], [4, 5, 6], [7, 1, 2], [3, 3, 5]]


def scores_of(prompts, responses):
    return [0.3 * len(r) - 0.2 * r[0] + 0.5 * (r[-1] == STOP) for r in responses]


def gpt2(directory, seed):
    config = TransformerConfig(d_model=8, num_heads=2, num_layers=2, d_ff=32, vocab_size=9,
                               max_seq_len=16)  # fmt: skip
    model = Transformer(config, seed)
    for parameter in model.parameters().values():
        if parameter.data.ndim == 2:
            parameter.data *= 6
    model.save(directory)
    return load_model(directory, "float64")


class Peer:
    """Policy, critic and reference of PyTorch, and a step as the peers make it."""

    def __init__(self, torch, directory, options, shared):
        from transformers import GPT2LMHeadModel, GPT2Model

        self.torch, self.o, self.shared = torch, options, shared
        torch.manual_seed(0)
        load = {"dtype": torch.float64, "attn_implementation": "eager"}
        self.policy = GPT2LMHeadModel.from_pretrained(directory, **load).eval()
        self.reference = GPT2LMHeadModel.from_pretrained(directory, **load).eval()
        self.critic = self.policy.transformer
        parameters = list(self.policy.parameters())
        if not shared:
            self.critic = GPT2Model.from_pretrained(directory, **load).eval()
            parameters += list(self.critic.parameters())
        self.head = torch.nn.Linear(8, 1, dtype=torch.float64)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.parameters = [*parameters, *self.head.parameters()]
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self.updates, self.beta = 0, options.kl_coefficient

    def logprobs(self, model, tokens, mask, responses):
        logits = model(tokens, attention_mask=mask).logits[:, 2:-1] / self.o.temperature
        return self.torch.gather(logits.log_softmax(-1), 2, responses[:, :, None])[:, :, 0]

    def values(self, tokens, mask):
        hidden = self.critic(tokens, attention_mask=mask).last_hidden_state
        return self.head(hidden)[:, 2:-1, 0]

    def whiten(self, x, mask, shift):
        mean = (x * mask).sum() / mask.sum()
        variance = (((x - mean) ** 2) * mask).sum() / mask.sum()
        if self.o.whiten_unbiased:
            variance = variance * mask.sum() / (mask.sum() - 1)
        white = (x - mean) * self.torch.rsqrt(variance + 1e-8)
        return white if shift else white + mean

    def step(self, responses, scores, rate):
        torch, o = self.torch, self.o
        lengths = torch.tensor([len(r) for r in responses])
        ended = torch.tensor([r[-1] == STOP for r in responses])
        padded = torch.tensor([list(r) + [PAD] * (WIDTH - len(r)) for r in responses])
        tokens = torch.cat([torch.tensor(PROMPTS), padded], 1)
        seen = torch.arange(3 + WIDTH)[None] < 3 + lengths[:, None]
        place = torch.arange(WIDTH)[None]
        real = place < lengths[:, None]
        # One position past the end, where the peers put the score of what ended early.
        valued = place <= lengths[:, None] if o.score_after_end else real
        last = lengths - 1
        if o.score_after_end:
            last = torch.where(lengths < WIDTH, lengths, lengths - 1)
        scores = torch.tensor(scores, dtype=torch.float64)
        if o.missing_eos_penalty is not None:
            worse = (
                torch.full_like(scores, o.missing_eos_penalty)
                if o.missing_eos_mode == "replace"
                else scores - o.missing_eos_penalty
            )
            scores = torch.where(ended, scores, worse)
        with torch.no_grad():
            old = self.logprobs(self.policy, tokens, seen, padded)
            ref = self.logprobs(self.reference, tokens, seen, padded)
            kl = (old - ref) * real
            old_values = self.values(tokens, seen) * valued
            rewards = -self.beta * kl
            rewards[torch.arange(len(last)), last] += scores
            if o.whiten_rewards:
                rewards = self.whiten(rewards, valued, False) * valued
            advantages, carried = [], 0.0
            for t in reversed(range(WIDTH)):
                following = old_values[:, t + 1] if t < WIDTH - 1 else 0.0
                delta = rewards[:, t] + o.gamma * following - old_values[:, t]
                carried = delta + o.gamma * o.lam * carried
                advantages.append(carried)
            advantages = torch.stack(advantages[::-1], 1)
            returns = advantages + old_values
            advantages = self.whiten(advantages, real, True) * real
        for _ in range(o.ppo_epochs):
            new = self.logprobs(self.policy, tokens, seen, padded)
            values = self.values(tokens, seen)
            near = torch.clamp(values, old_values - o.value_clip, old_values + o.value_clip)
            worst = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
            value_loss = 0.5 * (worst * valued).sum() / valued.sum()
            ratio = torch.exp((new - old) * real)
            clipped = torch.clamp(ratio, 1 - o.clip_epsilon, 1 + o.clip_epsilon)
            losses = torch.maximum(-advantages * ratio, -advantages * clipped)
            loss = (losses * real).sum() / real.sum() + o.value_coefficient * value_loss
            for parameter in self.parameters:
                parameter.grad = None
            loss.backward()
            self.adam(rate)
        mean_kl = kl.sum(1).mean().item()
        if o.adaptive_kl_target is not None:
            error = np.clip(mean_kl / o.adaptive_kl_target - 1, -0.2, 0.2)
            self.beta *= 1 + error * len(responses) / o.adaptive_kl_horizon
        return mean_kl

    def adam(self, rate):
        b1, b2 = self.o.betas
        self.updates += 1
        left1, left2 = 1 - b1**self.updates, 1 - b2**self.updates
        with self.torch.no_grad():
            for p, (m, v) in zip(self.parameters, self.moments, strict=True):
                if p.grad is None:
                    continue
                if p.ndim > 1:  # PyTorch's own decay takes in biases and gains too
                    p.mul_(1 - rate * self.o.weight_decay)
                m.mul_(b1).add_((1 - b1) * p.grad)
                v.mul_(b2).add_((1 - b2) * p.grad**2)
                if self.o.tf1_epsilon:
                    p -= rate * left2**0.5 / left1 * m / (v**0.5 + self.o.eps)
                else:
                    p -= rate * (m / left1) / ((v / left2) ** 0.5 + self.o.eps)


@pytest.mark.parametrize("name", ["openai-2019", "tldr-2024", "trl", "trl-k-penalty"])
def test_two_steps_are_those_of_the_peer(name, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    more = {"missing_eos_penalty": 0.7, "whiten_rewards": True} if name == "trl-k-penalty" else {}
    options = preset(
        name.removesuffix("-k-penalty"), batch_size=4, max_new_tokens=WIDTH, stop_ids=(STOP,),
        learning_rate=1e-3, adaptive_kl_horizon=20.0, kl_coefficient=0.3,
        **({"reward_normalisation": "none"} if name == "openai-2019" else {}), **more,
    )  # fmt: skip
    policy = gpt2(tmp_path / "model", 3)
    trainer = PPOTrainer(policy, None, scores_of, options, seed=0)
    peer = Peer(torch, tmp_path / "model", options, options.critic == "shared")
    rng = np.random.default_rng(0)
    responses = [
        [[5, 3, STOP], [2, 4, 6, 1, 7], [STOP], [1, 1, 2, 3, STOP]],
        [[3, STOP], [2, 2, 2, 2, STOP], rng.integers(1, 8, 5).tolist(), [6, 5, 4, STOP]],
    ]
    for index, given in enumerate(responses):
        rate = 1e-3 * (1 - index / 2)
        rollout = Rollout.of(
            trainer._take(PROMPTS, None), given, ended=[r[-1] == STOP for r in given]
        )
        record = trainer.learn_from(rollout, rate)
        kl = peer.step(given, scores_of(None, given), rate)
        np.testing.assert_allclose(record["kl/mean"], kl, atol=1e-12)
    np.testing.assert_allclose(trainer.kl_coefficient, peer.beta, rtol=1e-12)
    if options.adaptive_kl_target is not None:
        assert trainer.kl_coefficient != 0.3
    compare(trainer.policy, peer.policy, "transformer.")
    if options.critic == "separate":
        compare(trainer.critic.body, peer.critic, "")
    np.testing.assert_allclose(
        trainer.critic.weight.data, peer.head.weight.detach().numpy(), rtol=1e-6, atol=1e-12
    )


def compare(mine, theirs, prefix):
    arrays = {name: p.data for name, p in mine.parameters().items()}
    found = to_hf_tensors(FAMILIES[mine.config.family], mine.config, arrays)
    expected = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    checked = 0
    for name, array in found.items():
        for key in (name, prefix + name, name.removeprefix("transformer.")):
            if key in expected:
                scale = np.abs(expected[key]).max()
                np.testing.assert_allclose(array, expected[key], atol=1e-6 * scale, err_msg=name)
                checked += 1
                break
    assert checked >= len(expected) - 1  # a tied head stands once


TOOLS = Path(__file__).parents[1] / "tools"
FIXTURE = Path(__file__).parent / "fixtures" / "trl_ppo.json"


@pytest.mark.parametrize("name", ["default", "k3, whitened rewards, penalty"])
def test_the_preset_is_what_trl_computes(name, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    maker = importlib.import_module("make_trl_fixture")
    recorded = json.loads(FIXTURE.read_text())
    assert recorded["trl"] == "1.9.2"
    expected, case = recorded["cases"][name], dict(maker.CASES[name])
    policy, reference, critic, reward = maker.networks()
    options = preset(
        "trl", batch_size=8, ppo_epochs=maker.PASSES, max_new_tokens=maker.WIDTH,
        stop_ids=(maker.STOP,), learning_rate=maker.RATE,
        temperature=maker.TEMPERATURE + 1e-7,  # as it has it
        **case,
    )  # fmt: skip
    trainer = PPOTrainer(
        policy, None, ModelReward(reward), options, reference=reference, critic=critic
    )
    trainer.critic.bias.requires_grad = False  # transformers' classifiers have none
    for step, responses in zip(expected["steps"], maker.RESPONSES, strict=True):
        ended = [response[-1] == maker.STOP for response in responses]
        rollout = Rollout.of(trainer._take(maker.PROMPTS, None), responses, ended=ended)
        record = trainer.learn_from(rollout, step["lr"])
        # Its mean is over all places, those of the padding too.
        places = sum(map(len, responses)) / (len(responses) * maker.WIDTH)
        found = {
            "objective/kl": record["kl/mean"],
            "objective/rlhf_reward": record["reward/total"],
            "policy/approxkl_avg": record["ppo/approx_kl"] * places,
            "loss/policy_avg": record["ppo/policy_loss"],
            "loss/value_avg": record["ppo/value_loss"],
        }
        assert found == pytest.approx({key: step[key] for key in found}, rel=1e-6, abs=1e-9)
    digests(maker, trainer.policy, expected["policy"])
    digests(maker, trainer.critic.body, expected["critic"])
    head = maker.digest(trainer.critic.weight.data)
    np.testing.assert_allclose(head, expected["critic"]["score.weight"], rtol=1e-6, atol=1e-8)


def digests(maker, mine, expected):
    """Compare weights with two numbers of each of TRL's."""
    arrays = {name: p.data for name, p in mine.parameters().items()}
    found = to_hf_tensors(FAMILIES["gpt2"], mine.config, arrays)
    names = {name.removeprefix("transformer."): name for name in expected}
    checked = 0
    for name, array in found.items():
        key = names.get(name.removeprefix("transformer."))
        if key is not None:
            np.testing.assert_allclose(
                maker.digest(array), expected[key], rtol=1e-6, atol=1e-7, err_msg=name
            )
            checked += 1
    assert checked == len([name for name in expected if name != "score.weight"])
