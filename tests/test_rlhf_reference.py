"""The list in docs/rlhf.md: every link in it is real, and the points no other file tests."""

import ast
import importlib
import math
import re
from pathlib import Path

import numpy as np
import pytest

from loopos import ops, use_backend
from loopos.data.batch import Batch
from loopos.data.tokenizer import train_bpe
from loopos.errors import ConfigError, DataError
from loopos.generation import SamplingOptions
from loopos.methods import policy_update, rollouts
from loopos.methods.dpo import DPOTrainer
from loopos.methods.grpo import GRPOTrainer
from loopos.methods.policy_update import PolicyUpdates
from loopos.methods.ppo import Options, PPOTrainer, preset
from loopos.methods.rollouts import Prompts, sample_rollout
from loopos.models.config import TransformerConfig
from loopos.models.transformer import Transformer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "rlhf.md"
LINK = re.compile(r"\[`([^`]+)`\]\(\.\./((?:loopos|tests)/[\w/]+\.py)\)")
PROMPTS = [[1 + i % 7, (3 * i) % 8, 2][: 1 + i % 3] for i in range(24)]


def model(seed=0, dtype=np.float32, **more):
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 24, "vocab_size": 9,
             "max_seq_len": 24} | more  # fmt: skip
    return Transformer(TransformerConfig(**sizes), seed, dtype)


def sharp(seed=0, dtype=np.float32):
    """One whose distributions are far from even."""
    made = model(seed, dtype)
    for parameter in made.parameters().values():
        parameter.data *= 5 if parameter.data.ndim == 2 else 1
    return made


def count_fives(prompts, responses):
    return [sum(token == 5 for token in response) / 6 for response in responses]


def trainer(policy=None, reward=count_fives, **options):
    given = {"learning_rate": 3e-3, "batch_size": 6, "max_new_tokens": 6, "stop_ids": (0,),
             "seed": 1} | options  # fmt: skip
    return PPOTrainer(policy or model(), None, reward, **given)


# -- the list itself -------------------------------------------------------------------------------


def links():
    found = LINK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(found) > 120
    return sorted(set(found))


def functions_of(file):
    return {node.name for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef)}  # fmt: skip


def test_every_test_of_the_list_exists():
    for name, path in links():
        if path.startswith("tests/"):
            file, _, function = name.partition("::")
            assert path == f"tests/{file}", name
            assert function in functions_of(ROOT / path), name


def test_every_piece_of_code_in_the_list_exists():
    """Names are a module's last part, and what is in it: ``ppo.Options.gamma``."""
    for name, path in links():
        if not path.startswith("loopos/"):
            continue
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        last, *attributes = name.split(".")
        assert last == Path(path).stem, name
        found = module
        for attribute in attributes:
            fields = getattr(found, "__dataclass_fields__", {})
            assert hasattr(found, attribute) or attribute in fields, name
            found = getattr(found, attribute, None)


def test_the_list_is_whole():
    page = PAGE.read_text(encoding="utf-8")
    body = page[page.index("## The list") :]
    rows = dict(re.findall(r"^\*\*(\d+)\.\*\* (.*?)(?=^\*\*\d|^#)", body, re.MULTILINE | re.DOTALL))
    assert list(rows) == [str(i) for i in range(1, 20)]
    for number, text in rows.items():
        paths = [path for _, path in LINK.findall(text)]
        assert any(path.startswith("loopos/") for path in paths), number
        assert any(path.startswith("tests/") for path in paths), number
    for figure in trainer(exact_kl=True).step(PROMPTS[:6]).keys() - {"step", "time_s"}:
        assert f"`{figure}`" in body, figure
    tables = [line for line in body.splitlines() if line.startswith("| ") and "---" not in line]
    complaints = [line for line in tables if re.search(r"\((?:trl|transformers|unsloth|ms-swift)",
                                                       line)]  # fmt: skip
    assert len(complaints) == 13
    assert all(LINK.search(line) for line in complaints)


# -- rollouts --------------------------------------------------------------------------------------


def test_line_6_one_temperature_for_all():
    """Logits over T, of policy, old policy and reference; the sampler's are the same."""
    policy, reference, t = sharp(dtype=np.float64), sharp(1, np.float64), 0.6
    made = PPOTrainer(policy, None, count_fives, reference=reference, temperature=t,
                      max_new_tokens=6, stop_ids=(0,), seed=1)  # fmt: skip
    rollout = made.sample(PROMPTS[:6])
    found = rollouts.collect(policy, rollout, t, reference)
    np.testing.assert_allclose(rollout.logprobs, found["logprobs"], atol=1e-6)
    for network, name in ((policy, "logprobs"), (reference, "ref_logprobs")):
        expected = []
        for i in range(6):
            tokens = rollout.tokens[slice(*rollout.offsets[i : i + 2])]
            logits = network.forward(Batch.from_sequences([tokens])).data / t
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
            start = rollout.prompt_lengths[i]
            rows = np.arange(start - 1, tokens.size - 1)
            expected.append(logits[rows, tokens[start:]])
        np.testing.assert_allclose(found[name], np.concatenate(expected), atol=1e-9)


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1},
                                 {"repetition_penalty": 1.1}])  # fmt: skip
def test_line_6_rollouts_are_of_the_whole_distribution(cut):
    prompts = Prompts.of(PROMPTS[:2], None, model().config)
    options = SamplingOptions(max_new_tokens=3, temperature=1.0, **cut)
    with pytest.raises(ConfigError, match="sampled from the whole distribution"):
        sample_rollout(model(), None, prompts, options, samples=np.arange(2))
    greedy = SamplingOptions(max_new_tokens=3, temperature=0.0)
    with pytest.raises(ConfigError, match="rollouts need one above 0"):
        sample_rollout(model(), None, prompts, greedy, samples=np.arange(2))
    sampling = Options().sampling(0)
    assert (sampling.top_k, sampling.top_p) == (0, 1.0)


def test_line_6_a_finished_row_leaves_the_batch(monkeypatch):
    """Each token but the last of a response goes through the model once, and no other.

    Of prompts what several begin with is computed once; the last token of each always is, for its
    logits are wanted.
    """
    made = trainer(stop_ids=(0, 1, 2), max_new_tokens=12, batch_size=24)
    seen, inner = [], made.policy.get_hidden_states

    def counted(batch, *args, **kwargs):
        seen.append(batch.num_tokens)
        return inner(batch, *args, **kwargs)

    monkeypatch.setattr(made.policy, "get_hidden_states", counted)
    with use_backend("numpy"):
        rollout = made.sample(PROMPTS)
    assert rollout.lengths.min() < rollout.lengths.max()
    prefixes, repeated = set(), 0
    for prompt in PROMPTS:
        repeated += tuple(prompt) in prefixes
        prefixes |= {tuple(prompt[: n + 1]) for n in range(len(prompt))}
    assert repeated > 0
    assert len(prefixes) + repeated < rollout.prompt_lengths.sum()
    decoded = (rollout.lengths - 1).sum()
    assert sum(seen) == len(prefixes) + repeated + decoded
    assert seen[-1] == (rollout.lengths == rollout.lengths.max()).sum()


def test_line_7_the_stop_token_belongs_to_the_response():
    """It is the last token, has a probability and a gradient, and no id means "padding"."""
    made = trainer(max_new_tokens=20, stop_ids=(3,))
    rollout = made.sample(PROMPTS)
    assert rollout.ended.any()
    assert np.isin(rollout.targets, (0, 8)).any()  # the first and the last id are tokens too
    for i in np.flatnonzero(rollout.ended):
        tokens = rollout.targets[slice(*rollout.response_offsets[i : i + 2])]
        assert (tokens == 3).tolist() == [False] * (tokens.size - 1) + [True]
    assert rollout.logprobs.size == rollout.lengths.sum() == rollout.targets.size
    ended = rollout.take(np.flatnonzero(rollout.ended)[:1])
    data = rollouts.collect(made.policy, ended, 1.0, values=made.critic.values)
    advantages = np.zeros_like(data["logprobs"])
    advantages[-1] = 1.0  # of the stop token alone
    data |= {"advantages": advantages, "returns": data["values"]}
    made._gradients(ended, data, np.arange(1), first=True)
    assert np.any(made.policy.head_weight.grad[3])


# -- the update ------------------------------------------------------------------------------------


def test_line_16_what_is_frozen_is_frozen_and_orders_are_fresh(monkeypatch):
    made = trainer(ppo_epochs=3, minibatches=2, learning_rate=0.02)
    orders, frozen, inner = [], [], PolicyUpdates._gradients

    def watched(self, rollout, data, chosen, first, done=None):
        orders.append(chosen.tolist())
        frozen.append({name: array.copy() for name, array in data.items()})
        return inner(self, rollout, data, chosen, first, done)

    monkeypatch.setattr(policy_update.PolicyUpdates, "_gradients", watched)
    record = made.step(PROMPTS[:6])
    assert record["ppo/updates"] == 6
    assert record["ppo/approx_kl"] > 0  # the policy has moved meanwhile
    names = {"logprobs", "ref_logprobs", "values", "advantages", "returns"}
    for data in frozen:
        assert data.keys() >= names
        for name in names:
            np.testing.assert_array_equal(data[name], frozen[0][name])
    epochs = [orders[i] + orders[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_line_17_a_critic_of_its_own_starts_from_a_head_of_zeros(critic):
    made = trainer(critic=critic)
    assert not made.critic.weight.data.any()
    assert not made.critic.bias.data.any()
    rollout = made.sample(PROMPTS[:6])
    values = rollouts.collect(made.policy, rollout, 1.0, values=made.critic.values)["values"]
    assert not values.any()
    if critic == "separate":
        theirs = made.critic.body.parameters()
        for name, mine in made.policy.parameters().items():
            if name in theirs:
                np.testing.assert_array_equal(theirs[name].data, mine.data)
                assert not np.shares_memory(theirs[name].data, mine.data)


def test_line_18_the_rate_falls_to_0_in_a_line():
    assert (Options().eps, Options().optimizer, Options().scheduler) == (1e-5, "adamw", "linear")
    rates = [row["learning_rate"] for row in trainer(num_epochs=2).fit(PROMPTS).history]
    np.testing.assert_allclose(rates, 3e-3 * (1 - np.arange(8) / 8), rtol=1e-12)


def test_line_19_sizes_of_the_recipe():
    tldr = preset("tldr-2024")
    assert (tldr.learning_rate, tldr.kl_coefficient, tldr.temperature) == (3e-6, 0.05, 0.7)
    assert (tldr.max_new_tokens, tldr.batch_size) == (53, 512)
    room = trainer(model(max_seq_len=8))
    with pytest.raises(DataError, match="leaves no room for a new one"):
        room.step([[1] * 8])


# -- at run time -----------------------------------------------------------------------------------


def test_figures_are_over_counted_tokens():
    """Means over response tokens, or sums of a response: prompts of any length count nothing."""
    made = trainer(sharp(), ppo_epochs=1, exact_kl=True, reference=sharp(1))
    rollout = made.sample(PROMPTS[:6])
    data = rollouts.collect(made.policy, rollout, 1.0, made.reference, exact=True)
    record = made.learn_from(rollout)
    tokens = rollout.lengths.sum()
    assert tokens < rollout.tokens.size
    assert record["entropy"] == pytest.approx(data["entropy"].sum() / tokens)
    k1 = (data["logprobs"] - data["ref_logprobs"]).sum() / 6
    assert record["kl/mean"] == pytest.approx(k1, rel=1e-5)
    assert record["kl/exact"] == pytest.approx(data["exact_kl"].sum() / 6, rel=1e-5)
    assert record["response/length"] == tokens / 6
    assert 0 <= record["entropy"] <= math.log(9)


def test_only_rows_of_responses_go_through_the_head(monkeypatch):
    """No logits of prompts, and none kept: a row for each response token, once a pass."""
    rows, inner = [], ops.linear_logprobs

    def counted(hidden, *args, **kwargs):
        rows.append(hidden.shape[0])
        return inner(hidden, *args, **kwargs)

    monkeypatch.setattr(ops, "linear_logprobs", counted)
    made = trainer(ppo_epochs=1)
    rollout = made.sample(PROMPTS[:6])
    rows.clear()
    made.learn_from(rollout)
    assert rows == [rollout.lengths.sum()] * 2  # policy and reference


def test_chunked_logprobs_equal_whole_ones(monkeypatch):
    policy, rollout = sharp(dtype=np.float64), trainer().sample(PROMPTS)
    with use_backend("numpy"):
        whole = rollouts.collect(policy, rollout, 0.8, sharp(1, np.float64), exact=True)
        monkeypatch.setattr("loopos.backends.numpy_losses._LOGIT_ELEMENTS", 4 * 9)
        parts = rollouts.collect(policy, rollout, 0.8, sharp(1, np.float64), exact=True)
    for name, array in whole.items():
        np.testing.assert_allclose(parts[name], array, rtol=1e-12, atol=1e-14)


# -- the relatives ---------------------------------------------------------------------------------


def test_k1_in_the_reward_is_unbiased_where_k3_in_the_loss_is_another_thing():
    """Both are offered, and they are not the same update."""
    found = []
    for options in ({"kl_in": "loss", "kl_estimator": "k3"},
                    {"kl_in": "reward", "kl_estimator": "k1"}):  # fmt: skip
        made = GRPOTrainer(sharp(), None, count_fives, reference=sharp(1), group_size=2,
                           batch_size=3, max_new_tokens=6, stop_ids=(0,), kl_coefficient=0.5,
                           learning_rate=1e-2, seed=1, **options)  # fmt: skip
        record = made.step(PROMPTS[:3])
        assert ("ppo/kl_loss" in record) == (options["kl_in"] == "loss")
        found.append(made.policy.head_weight.data.copy())
    assert not np.array_equal(*found)


def test_label_smoothing_is_the_conservative_loss():
    """At the start both losses are ln 2; a smoothed one moves the policy less far."""
    rows = [{"prompt": "say ", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(8)]
    tokenizer = train_bpe([r["chosen"] + r["rejected"] for r in rows], 270)
    margins = []
    for smoothing in (0.0, 0.3):
        made = DPOTrainer(model(vocab_size=tokenizer.vocab_size), tokenizer)
        history = made.fit(rows, label_smoothing=smoothing, learning_rate=3e-2, max_steps=40,
                           num_epochs=40, batch_size=8).history  # fmt: skip
        assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        margins.append(made.evaluate(rows)["margin"])
    assert margins[0] > margins[1] > 0
