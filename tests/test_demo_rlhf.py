"""The shipped preferences, and the demo that learns from them, made small."""

import dataclasses
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import loopos
from loopos import cli, demo_rlhf
from loopos.data.preferences import read_preferences
from loopos.demo_rlhf import (
    OPTIONS,
    REWARD_OPTIONS,
    Answers,
    RlhfResult,
    answers_of,
    distinct_pairs,
    openings,
    run_rlhf_demo,
    side_by_side,
)
from loopos.methods.ppo import PPOTrainer
from loopos.methods.reinforcement import ModelReward
from loopos.methods.reward_model import RewardTrainer

ASSETS = Path(loopos.__file__).parent / "assets"
FILES = ("preferences_train.jsonl", "preferences_validation.jsonl")
SMALL = {
    "reward_options": dataclasses.replace(REWARD_OPTIONS, max_steps=2, warmup_steps=1),
    "options": dataclasses.replace(
        OPTIONS, max_steps=2, warmup_steps=1, batch_size=4, max_new_tokens=6, sample_steps=1,
        normalisation_samples=8,
    ),
    "prompts": 3,
}  # fmt: skip


# -- preferences ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preferences():
    return [read_preferences(ASSETS / name) for name in FILES]


def sentences(data):
    return [p + r for side in data.responses for p, r in zip(data.texts, side, strict=True)]


def test_the_card_says_what_they_are_and_whose(preferences):
    card = " ".join((ASSETS / "README.md").read_text(encoding="utf-8").split())
    for name, data in zip(FILES, preferences, strict=True):
        prompts = len(set(data.texts))
        assert f"`{name}` ({len(data.texts):,} pairs, {prompts} prompts)" in card
        assert (ASSETS / name).stat().st_size < 400_000
    assert "human preferences" in card
    assert "MIT licence, in `LICENSE-vader.txt`" in card
    assert "MIT" in (ASSETS / "LICENSE-vader.txt").read_text()


def test_no_pair_is_a_tie_and_margins_are_clear(preferences):
    for data in preferences:
        assert not data.ties
        assert not data.dropped
        assert data.margins.min() >= 1.5
        assert data.margins.max() <= 8


def test_a_sentence_is_in_one_pair_of_one_file(preferences):
    seen = [" ".join(re.findall(r"\w+", s.lower())) for d in preferences for s in sentences(d)]
    assert len(seen) == len(set(seen)) == 2 * sum(len(d.texts) for d in preferences)


def test_openings_are_disjoint(preferences):
    train, held_out = preferences
    assert not {s.split()[0] for s in sentences(train)} & {p.split()[0] for p in held_out.texts}
    assert not set(openings(train)) & set(openings(held_out))


def test_responses_continue_their_prompt(preferences):
    for data in preferences:
        for side in data.responses:
            assert all(re.match(r"\s?\S", r) for r in side)
        assert all(p == p.strip() and 1 <= len(p.split()) <= 4 for p in data.texts)


def test_length_does_not_tell(preferences):
    for data in preferences:
        lead = np.array([len(a) - len(b) for a, b in zip(*data.responses, strict=True)])
        share = ((lead > 0) + 0.5 * (lead == 0)).mean()
        assert abs(share - 0.5) < 3 * 0.5 / np.sqrt(lead.size)
        longest = np.maximum(*(np.array([len(r) for r in side]) for side in data.responses))
        assert (abs(lead) <= 0.3 * longest).all()


def test_the_script_makes_these_bytes(package_file, monkeypatch):
    member = "additional_resources/hutto_ICWSM_2014.tar.gz"
    archive = package_file("vaderSentiment==3.3.2", member, source=True)
    tools = Path(__file__).parents[1] / "tools"
    monkeypatch.syspath_prepend(str(tools))
    monkeypatch.delitem(sys.modules, "make_assets", raising=False)
    spec = importlib.util.spec_from_file_location("make_preferences", tools / "make_preferences.py")
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_preferences", tool)  # its dataclass looks itself up
    spec.loader.exec_module(tool)
    try:
        with open(archive, "rb") as file:
            made = tool.make(tool.read_rated(file))
    finally:
        sys.modules.pop("make_assets", None)
    card = (ASSETS / "README.md").read_text(encoding="utf-8")
    texts = {}
    for name, pairs in zip(FILES, made, strict=True):
        texts[name] = "".join(pair.row for pair in pairs)
        assert texts[name].encode() == (ASSETS / name).read_bytes(), name
    assert tool.updated(card, texts, tool.section(*made)) == card


# -- the demo ------------------------------------------------------------------------------------


def test_a_small_run_says_what_it_came_to(tmp_path, capsys, monkeypatch):
    code = run_rlhf_demo(tmp_path / "out", **SMALL)
    shown = capsys.readouterr()
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["prompts"], result["seed"], result["stopped"]) == (3, 0, "finished")
    assert code == 1  # two steps gain nothing
    assert "error: the mean score rose by only" in shown.err
    assert f"  as people chose      {result['accuracy']:6.1%}" in shown.out
    assert (
        f"{'mean score':<26}{result['score_before']:8.2f}{result['score_after']:8.2f}" in shown.out
    )
    assert re.search(r"^  \[2\] [+-]\d\.\d\d  ", shown.out, re.MULTILINE)
    rise = result["score_after"] - result["score_before"]
    assert result["gain"] == pytest.approx(rise / result["deviation"])
    assert result["faults"][-1] in shown.err
    (said,) = re.findall(r"^  loopos (generate .*)$", shown.out, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", ["loopos", *shlex.split(said), "--max-new-tokens", "3"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert capsys.readouterr().out.strip()
    assert result["kl"] > 0


def test_what_it_saves_can_be_used_and_is_the_same_again(tmp_path, capsys):
    learnt = [demo_rlhf.learn(tmp_path / name, 1, **SMALL) for name in "ab"]
    times = dict.fromkeys(("reward_s", "ppo_s", "seconds"), 0.0)
    first, second = (result.as_dict() | times for result in learnt)
    assert first == second
    before, after = learnt[0].before, learnt[0].after
    saved = tmp_path / "a"
    judge = RewardTrainer.load(saved / "reward_model")
    tokenizer = loopos.load_tokenizer(saved / "model")
    again = PPOTrainer(
        loopos.load_model(saved / "model"), tokenizer, ModelReward(judge.reward_model),
        SMALL["options"],
    )  # fmt: skip
    found = answers_of(again, sorted(set(after.prompts)), 1)
    assert found.prompts == after.prompts == before.prompts
    assert found.texts == after.texts
    assert found.texts != before.texts
    np.testing.assert_allclose(found.scores, after.scores, atol=1e-5)
    assert len(found.texts) == 3 * demo_rlhf.PER_PROMPT


def test_it_stops_when_asked(tmp_path, capsys):
    assert run_rlhf_demo(tmp_path / "o", **SMALL, stop=lambda: True) == 130
    assert "interrupted" in capsys.readouterr().err


def answers(scores, kl=0.0):
    scores, words = np.array(scores), ["dull", "fine"]
    return Answers(["It is"] * 2, [f" {w}" for w in words], scores, scores < 9, kl, 1.0, 2.0)


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({}, []),
        ({"accuracy": 0.59}, ["judges only 59.0% of the held-out pairs"]),
        ({"longer_accuracy": 0.71}, ["expected 71.0%"]),
        ({"after": answers([1.0, 2.9])}, ["rose by only 0.95 standard deviations, expected 1"]),
        ({"after": answers([1.0, 3.0], 10.5)}, ["the KL is 10.50 nats, above its budget 10"]),
        ({"after": answers([1.0, 3.0], 10.5), "kl_budget": None}, []),
        ({"after": answers([0, 0], float("nan"))}, ["rose by only -1.00", "the KL is nan"]),
    ],
)
def test_what_is_promised(changes, faults):
    good = RlhfResult(0.7, 0.5, 300, answers([0.0, 2.0]), answers([1.0, 3.0]), 10.0, 1.0, 2.0, 3.0)
    found = dataclasses.replace(good, **changes).faults
    assert len(found) == len(faults)
    assert all(part in fault for part, fault in zip(faults, found, strict=True))


def test_repetition_is_seen():
    assert distinct_pairs(["a b c", "c d"]) == 1.0
    assert distinct_pairs(["good good good good", "good good"]) == 0.25
    assert distinct_pairs(["one", ""]) == 0.0


def test_samples_stand_side_by_side():
    columns = [
        Answers(["It is"] * 3, [f" {word} {i}" for i in range(3)], np.arange(3.0),
                np.ones(3, bool), 0.0, 1.0, 2.0)
        for word in ("dull", "fine")
    ]  # fmt: skip
    lines = side_by_side(*columns, seed=0, width=20)
    assert lines[0] == f"  {'before':<20}  after"
    assert sorted(line for line in lines[1:] if line) == [
        f"  {f'(+{i}.00) It is dull {i}':<20}  (+{i}.00) It is fine {i}" for i in range(3)
    ]


# -- the benchmark -------------------------------------------------------------------------------


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("rlhf_preferences")


def test_the_first_layers_are_those_of_the_whole_model(benchmark):
    config = loopos.TransformerConfig(
        d_model=8,
        num_heads=2,
        num_layers=3,
        d_ff=16,
        vocab_size=11,
        max_seq_len=8,
        positions="rope",
    )
    model = loopos.Transformer(config, seed=1)
    part = benchmark.first_layers(model, 2)
    assert part.config == dataclasses.replace(config, num_layers=2)
    whole = model.parameters()
    assert set(part.parameters()) < set(whole)
    assert all(np.array_equal(p.data, whole[name].data) for name, p in part.parameters().items())


def test_the_table_has_mean_and_spread(benchmark):
    rows = [{"part": "x", "seed": seed, "accuracy": 0.5 + 0.1 * seed} for seed in (0, 1, 2)]
    head, row = benchmark.table(rows)
    assert head.split() == ["seed", "0", "seed", "1", "seed", "2", "mean", "spread"]
    assert row.split() == ["accuracy", "0.5", "0.6", "0.7", "0.6", "0.1"]
