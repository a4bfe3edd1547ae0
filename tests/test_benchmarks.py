"""The benchmarks' counts, rows and exit statuses. Nothing here asserts a time."""

import argparse
import dataclasses
import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import loopos

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
#: Keys of the rows that other programs read.
ROW = {
    "work", "dtype", "backend", "loopos_s", "peer", "peer_s", "ratio", "fraction_of_limit",
}  # fmt: skip


@pytest.fixture
def load(monkeypatch):
    """Return a function that imports a module of the benchmarks' folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def machine(load):
    """A machine of round figures."""
    return load("suite.machine").Machine(
        threads=2, fma_flops=200e9, update=20e9, read=30e9, copy=25e9
    )


def layer_parameters(width, inner):
    """Count by hand: four square matrices, two of the network inside, biases, two norms."""
    attention = 4 * (width * width + width)
    return attention + 2 * width * inner + inner + width + 4 * width


# -- the model of the limit ----------------------------------------------------------------------


def test_parameters_are_those_of_the_documented_models(load):
    limits, works = load("suite.limits"), load("suite.works")
    for config, layers in ((works.SEED_FINE_TUNING, 4), (works.SEED_REASONING, 6)):
        tables = 16000 * 384 + 512 * 384
        by_hand = tables + layers * layer_parameters(384, 1536) + 2 * 384
        assert limits.num_parameters(config) == by_hand
        assert limits.layer_matrices(config) == layers * (4 * 384**2 + 2 * 384 * 1536)
    assert limits.num_parameters(works.GPT2) == 124_439_808
    assert limits.layer_matrices(works.GPT2) == 84_934_656


def test_cost_of_the_fine_tuning_epoch(load):
    limits = load("suite.limits")
    layers = 4 * (4 * 384**2 + 2 * 384 * 1536)
    attention = 4 * 7 * 2 * 20 * 15**2 / 2 * 384
    head = 3 * 2 * 20 * 10 * 384
    found = limits.cost("A")
    assert found.flops == 3 * 2 * 300 * layers + attention + head
    parameters = 16000 * 384 + 512 * 384 + 4 * layer_parameters(384, 1536) + 2 * 384 + 3850
    assert found.update_bytes == 2 * 28 * parameters  # an update for each of two batches


@pytest.mark.parametrize(
    ("work", "lengths", "layers", "width", "vocab"),
    [
        ("B", [26] * 10, 6, 384, 16000),
        ("C", [256] * 4, 12, 768, 50257),
        ("K", None, 12, 768, 50257),
    ],
)
def test_cost_of_language_model_steps(load, work, lengths, layers, width, vocab):
    limits, works = load("suite.limits"), load("suite.works")
    lengths = works.ragged_lengths() if lengths is None else lengths
    matrices = layers * 12 * width**2 + vocab * width
    attention = layers * 7 * sum(n * n for n in lengths) * width
    found = limits.cost(work)
    assert found.flops == 6 * sum(lengths) * matrices + attention
    config = {"B": works.SEED_REASONING}.get(work, works.GPT2)
    assert found.update_bytes == 28 * limits.num_parameters(config)


@pytest.mark.parametrize(
    ("work", "layers", "width", "vocab", "positions", "prompt", "responses"),
    [
        ("D", 6, 384, 16000, 512, 8, [10] * 8),
        ("E", 12, 768, 50257, 1024, 64, [64] * 8),
        ("E-ragged", 12, 768, 50257, 1024, 64, [4, 13, 21, 30, 38, 47, 55, 64]),
    ],
)
def test_cost_of_ppo_steps(load, work, layers, width, vocab, positions, prompt, responses):
    limits, sizes = load("suite.limits"), load("suite.reinforcement").REINFORCEMENT[work]
    assert sizes.tokens == 8 * prompt + sum(responses)
    matrices, head = layers * 12 * width**2, vocab * width
    inputs = [prompt + n - 1 for n in responses]
    *sampling, learning = limits.phases(work)
    # Forward and backward of policy and critic, forward of the reference; the reward model reads
    # the last tokens too. Three products of the policy's head, one of the reference's.
    products = 2 * matrices * (7 * sum(inputs) + sum(inputs) + 8) + 8 * head * sum(responses)
    squares = [sum(n * n for n in inputs), sum((n + 1) ** 2 for n in inputs)]
    attention = layers * width * (16 * squares[0] + 2 * squares[1])
    assert learning.flops == products + attention
    body = (vocab + positions + 2) * width + layers * layer_parameters(width, 4 * width)
    assert learning.update_bytes == 28 * (2 * body + width + 1)
    assert len(sampling) == max(responses)
    assert sampling[0].read_bytes == 4 * (matrices + head)
    rows = sum(n > 1 for n in responses)
    assert sampling[1].flops == 2 * rows * (matrices + head)
    held = 8 * layers * width * rows * (prompt + 1)
    assert sampling[1].read_bytes == 4 * (matrices + head) + held


def test_cost_of_whole_methods(load):
    limits = load("suite.limits")
    layers, head, width, depth = 6 * 12 * 384**2, 16000 * 384, 384, 6
    body = (16000 + 512 + 2) * width + depth * layer_parameters(width, 4 * width)

    def trained(count, length, predicted):
        # Three products of layers and head, seven halves of the squares of attention.
        attention = depth * 7 * count * length**2 * width
        return 6 * (count * length * layers + predicted * head) + attention

    def read(count, length):
        return 2 * count * length * layers + depth * 2 * count * length**2 * width

    sft = limits.cost("sft")
    assert (sft.flops, sft.update_bytes) == (trained(10, 25, 160), 28 * body)
    judged = limits.cost("reward-model")
    assert (judged.flops, judged.update_bytes) == (trained(16, 18, 0), 28 * (body + width + 1))
    dpo = limits.cost("dpo")
    assert (dpo.flops, dpo.update_bytes) == (trained(16, 17, 160), 28 * body)

    prompts, first, *_, learning = limits.phases("grpo")
    assert prompts.flops == read(8, 8) + 2 * 8 * head  # once for the four responses to each
    assert first.flops == 2 * 32 * (layers + head)
    reference, rewards = read(32, 17) + 2 * 320 * head, read(32, 18)
    assert learning.flops == trained(32, 17, 320) + reference + rewards
    assert learning.update_bytes == 28 * body

    before, *step = limits.phases("RLHF")
    assert (before, step) == (judged, limits.phases("D"))
    *_, once = step
    *_, four = limits.phases("RLHF-default")
    update = trained(8, 17, 80) + trained(8, 17, 0)
    assert four.flops == once.flops + 3 * update
    assert four.update_bytes == 4 * once.update_bytes


def test_ragged_lengths_are_the_documented_ones(load):
    lengths = load("suite.works").ragged_lengths()
    assert (len(lengths), sum(lengths)) == (32, 2062)
    assert len(lengths) * max(lengths) == 5728
    assert min(lengths) >= 16


def test_seconds_of_a_cost(load, machine):
    limits = load("suite.limits")
    assert limits.seconds("L1", machine) == 7 * 2048**2 * 768 / 200e9
    assert limits.seconds("L2", machine) == 7 * 16 * 128**2 * 768 / 200e9
    assert limits.seconds("gemm dw 300x1536x384", machine) == 2 * 300 * 1536 * 384 / 200e9
    assert limits.Cost(400e9, 10e9).seconds(machine) == 2.5
    assert limits.seconds("import", machine) is None
    assert limits.seconds("A", None) is None
    # Its phases follow each other, and each waits for the slower of reading and the rest.
    computing = [(p.flops / 200e9 + p.update_bytes / 20e9) for p in limits.phases("D")]
    reading = [p.read_bytes / 30e9 for p in limits.phases("D")]
    assert computing[1] < reading[1]
    assert computing[-1] > reading[-1] == 0
    expected = pytest.approx(sum(map(max, computing, reading)))
    assert limits.seconds("D", machine) == expected
    assert limits.seconds("D", None) is None


def test_machine_is_measured_or_says_why_not(load, monkeypatch):
    module = load("suite.machine")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(module.NotMeasuredError, match="no-such-compiler is not there"):
        module.measure(1)
    monkeypatch.delenv("CC")
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler")
    found = module.measure(1, mebibytes=16, trials=1)
    assert found.threads == 1
    assert min(found.fma_flops, found.update, found.read, found.copy) > 0


# -- the works -----------------------------------------------------------------------------------


def test_a_work_trains(load):
    works = load("suite.works")
    with loopos.use_backend("numpy"):
        work = works.WORKS["A"]()
        before = work.first_loss()
        works.spent_s(work.run, runs=2, warmup=1)
        assert work.first_loss() < before
    assert (work.tokens, [b.num_sequences for b in work.batches]) == (300, [16, 4])
    assert before == pytest.approx(np.log(10), abs=0.1)
    trained = sum(p.data.size for p in work.model.parameters().values())
    assert 2 * 28 * trained == load("suite.limits").cost("A").update_bytes


def small(reinforcement, lengths):
    """A PPO step that takes no time."""
    config = loopos.TransformerConfig(
        d_model=16, num_heads=2, num_layers=1, d_ff=32, vocab_size=5000, max_seq_len=32
    )
    return reinforcement.Reinforcement(config, 4, lengths)


def test_a_ppo_step_has_the_tokens_it_says(load):
    reinforcement = load("suite.reinforcement")
    sizes = small(reinforcement, (6,) * 4)
    with loopos.use_backend("numpy"):
        work = reinforcement.ppo_step(sizes)
        times = work.times_s(runs=20, warmup=20)
    assert (len(times), work.tokens) == (sizes.most_runs, 4 * 10)
    body = load("suite.limits").num_parameters(sizes.config)
    found = work.figures(2)
    state = (16 * (2 * body + 17) + 4 * (2 * body + 17)) / 2**20
    assert found.pop("state_mb") == pytest.approx(state, rel=1e-5)
    assert 0 < found.pop("rollout_share") < 1
    assert found == {"tokens": 40, "updates": 1}


def test_ragged_responses_are_of_the_lengths_asked_for(load):
    reinforcement = load("suite.reinforcement")
    assert reinforcement.ragged_responses() == (4, 13, 21, 30, 38, 47, 55, 64)
    sizes = small(reinforcement, (2, 6, 4, 3))
    given = reinforcement.prompts(sizes)
    with loopos.use_backend("numpy"):
        trainer = reinforcement.make_trainer(sizes)
        work = reinforcement.repeated(trainer, sizes, given)
        for _ in range(2):
            work.run()  # fails where there are other tokens
            assert [row["tokens"] for row in trainer.samples] == [2, 6, 4, 3]
            assert [row["ended"] for row in trainer.samples] == [True, False, True, True]
        trainer.options = dataclasses.replace(trainer.options, stop_ids=())
        with pytest.raises(RuntimeError, match="expected 31 tokens, found 40"):
            work.run()


@pytest.mark.parametrize("passes", [1, 4])
def test_rlhf_epoch_trains_both(load, monkeypatch, passes):
    reinforcement = load("suite.reinforcement")
    monkeypatch.setitem(reinforcement.REINFORCEMENT, "D", small(reinforcement, (6,) * 4))
    made = []
    step = reinforcement.PPOTrainer.step
    monkeypatch.setattr(
        reinforcement.PPOTrainer, "step", lambda *given: made.append(step(*given)) or made[-1]
    )
    with loopos.use_backend("numpy"):
        work = reinforcement.rlhf_epoch(passes)
        work.run()
    assert work.tokens == 2 * 4 * 10 + 4 * 10
    assert [record["ppo/updates"] for record in made] == [passes]


@pytest.mark.parametrize(
    ("name", "tokens", "epochs"),
    [
        ("pretraining", 10 * 26, 17),
        ("sft", 10 * 26, 17),
        ("reward-model", 16 * 18, 17),
        ("dpo", 16 * 18, 17),
        ("grpo", 32 * 18, 5),
    ],
)
def test_whole_methods_make_the_steps_they_say(load, monkeypatch, name, tokens, epochs):
    methods = load("suite.methods")
    tiny = loopos.TransformerConfig(
        d_model=16, num_heads=2, num_layers=1, d_ff=32, vocab_size=16000, max_seq_len=64
    )
    monkeypatch.setattr(methods, "SEED_REASONING", tiny)
    results, made = [], methods.works.whole_epochs

    def whole_epochs(fit, *given):
        return made(lambda count: results.append(fit(count)) or results[-1], *given)

    monkeypatch.setattr(methods.works, "whole_epochs", whole_epochs)
    with loopos.use_backend("numpy"):
        work = methods.WORKS[name]()
        work.run()  # fails where a step has other tokens
        work.before()
    assert (work.units, work.tokens) == (epochs - 1, tokens * (epochs - 1))
    assert [len(result.history) for result in results] == [epochs, 1]
    last = results[-1].history[-1]
    if name != "grpo":
        assert last["loss"] < results[0].history[0]["loss"]
    else:
        assert (last["response/length"], last["response/eos_fraction"]) == (10, 0)
    with pytest.raises(RuntimeError, match="expected 1 steps of 1 tokens, found"):
        made(lambda count: results[-1], 1).before()


@pytest.mark.parametrize("threads", [1, 2])
def test_first_step_is_timed_at_several_threads(load, monkeypatch, threads):
    said = []
    first_step = load("suite.first_step")
    monkeypatch.setattr(first_step, "spent_s", lambda script, runs: said.append(script) or 0.5)
    assert 1 in first_step.FirstStep.params[1]
    assert first_step.FirstStep().track_multiple_of_target("cython", threads) == 0.5
    assert f"use_backend('cython'), thread_limit({threads}):" in said[0]


@pytest.mark.parametrize("form", ["forward", "dx", "dw"])
def test_products_are_the_same_by_both_sides(load, form):
    with loopos.use_backend("numpy"):
        ours, theirs = load("suite.works").gemm(form, 5, 7, 3)
        np.testing.assert_allclose(ours(), theirs(), rtol=1e-5)


@pytest.mark.parametrize("name", loopos.available_backends())
def test_subnormal_numbers_are_those_that_are_timed(load, name):
    works, tiny = load("suite.works"), np.finfo(np.float32).tiny
    with loopos.use_backend(name) as backend:
        y, _ = works.subnormal_op("linear", 1e-40)()
        if backend.describe()["isa"] == "amx":  # its products take them for 0
            assert not y.any()
        else:
            assert 0 < np.abs(y).max() < tiny
        found = works.subnormal_op("activation", 1e-40)()
        assert 0 < np.abs(found).max() < tiny
        timed = load("suite.kernels").Subnormals()
        for op in works.SUBNORMAL_OPS:
            assert timed.track_times_normal(name, op) > 0


def test_ops_are_timed_at_several_threads(load, monkeypatch):
    monkeypatch.setattr(loopos.backends, "_default", None)  # which asv's setup changes
    timed = load("suite.kernels").Op()
    for threads in timed.params[1]:
        timed.setup("numpy", threads, "linear[1x768x3072]")
        timed.time_op("numpy", threads, "linear[1x768x3072]")
        assert loopos.get_num_threads() == threads
        timed.teardown("numpy", threads, "linear[1x768x3072]")


def test_suite_times_every_work(load):
    timed = vars(load("suite.epochs")).values()
    letters = {work for cls in timed if (work := getattr(cls, "work", None)) is not None}
    modules = [load(f"suite.{name}") for name in ("works", "reinforcement", "methods")]
    assert letters == {name for module in modules for name in module.WORKS}
    assert letters == set(load("suite.methods").EVERY)
    for name in load("suite.methods").WORKS:
        assert load("suite.targets").seconds(name, "numpy") is not None
    for name in letters:
        assert name in load("loopos_half").ALL_WORKS
        assert name in load("peers").ALL_WORKS


# -- peers.py ------------------------------------------------------------------------------------


def test_rows_of_a_run_without_peer(load, machine, tmp_path, monkeypatch, capsys):
    peers = load("peers")
    monkeypatch.setattr(peers, "measure", lambda threads: machine)
    options = "--works A --backend numpy --rounds 1 --runs 1 --warmup 0 --threads 1 --no-peer"
    assert peers.main([*options.split(), "--json", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row.keys() >= ROW
    assert (row["work"], row["dtype"], row["backend"]) == ("A", "float32", "numpy")
    assert row["peer"] is row["peer_s"] is row["ratio"] is row["memory_ratio"] is None
    limit = load("suite.limits").seconds("A", machine)
    assert row["fraction_of_limit"] == pytest.approx(limit / row["loopos_s"])
    assert row["loopos_peak_mb"] > 100
    assert "200 GFLOP/s" in capsys.readouterr().out


def asked(peers, options):
    return peers.parser().parse_args(options.split())


def test_rows_are_medians_over_rounds(load, machine, monkeypatch):
    peers = load("peers")
    spent = {
        "loopos": iter((2.0, 9.0, 1.0)),
        "eager": iter((4.0, 3.0, 8.0)),
        "buckets": iter("345"),
    }

    def call(command, threads, python=None):
        assert threads == 2
        if "loopos_half" in command[0]:
            known = {"backend": "numpy", "threads": 2, "peak_mb": 100}
            return known | {"loopos_s": next(spent["loopos"])}, 0.0
        who = "buckets" if "--buckets" in command else "eager"
        return {"peer_s": float(next(spent[who])), "peak_mb": 400}, 0.0

    monkeypatch.setattr(peers, "call", call)
    monkeypatch.setattr(peers, "measure", lambda threads: machine)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    rows, limits = peers.compare(asked(peers, "--works K --backend numpy --threads 2 --buckets"))
    assert limits == machine
    assert [(r["peer"], r["buckets"], r["peer_s"], r["ratio"]) for r in rows] == [
        ("torch-eager", False, 4.0, 2.0), ("torch-eager", True, 4.0, 2.0),
    ]  # fmt: skip
    assert all(r["loopos_s"] == 2.0 and r["memory_ratio"] == 0.25 for r in rows)
    assert all(r.keys() >= ROW for r in rows)


def test_rows_of_ppo_steps(load, machine, monkeypatch):
    peers = load("peers")
    other = {}

    def call(command, threads, python=None):
        known = {"backend": "numpy", "threads": 2, "tokens": 144, "updates": 1}
        if "loopos_half" in command[0]:
            known |= {"peak_mb": 600, "state_mb": 500.0, "rollout_share": 0.25}
            return known | {"loopos_s": 2.0 if command[1] == "E-ragged" else 4.0}, 0.0
        assert (Path(command[0]).name, python) == ("trl_half.py", "other/python")
        return known | {"peer_s": 12.0, "peak_mb": 1200, "rollout_share": 0.3} | other, 0.0

    monkeypatch.setattr(peers, "call", call)
    monkeypatch.setattr(peers, "measure", lambda threads: machine)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    options = "--works E,E-ragged --backend numpy --threads 2 --trl-python other/python"
    rows, _ = peers.compare(asked(peers, options))
    step, ragged = load("suite.targets").with_ratios(rows)
    assert (step["peer"], step["ratio"], step["memory_ratio"]) == ("trl", 3.0, 0.5)
    assert (step["rollout_share"], step["peer_rollout_share"]) == (0.25, 0.3)
    assert step["times_state"] == ragged["times_state"] == 1.2
    assert (ragged["peer"], ragged["times_even"]) == (None, 0.5)
    other["updates"] = 2
    with pytest.raises(SystemExit, match="updates: 1 here, 2 by the peer"):
        peers.compare(asked(peers, options))


def test_trl_is_optional(load, monkeypatch):
    peers = load("peers")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    (pair,) = peers.plan(asked(peers, "--works D --backend numpy"))
    assert not pair.theirs
    (pair,) = peers.plan(asked(peers, "--works RLHF --backend numpy --trl-python python"))
    assert not pair.theirs


def test_methods_without_a_peer_are_timed_alone(load):
    peers = load("peers")
    for pair in peers.plan(asked(peers, "--works pretraining,sft,dpo,grpo --backend numpy")):
        assert pair.ours[0].command[1] == pair.work
        assert not pair.theirs


def test_rows_of_products_and_cold_starts(load, machine, monkeypatch):
    peers = load("peers")

    def call(command, threads, python=None):
        known = {"backend": "numpy", "threads": threads}
        if "gemm" in command:
            return [known | {"work": "gemm dx 60x384x384", "loopos_s": 1.0, "peer_s": 3.0}], 9.0
        if command[0] == "-c":
            return None, 0.75 if "loopos" in command[1] else 0.5
        assert command[-4:] == ("--runs", "1", "--warmup", "0")
        return known | {"loopos_s": 0.1}, 0.6

    monkeypatch.setattr(peers, "call", call)
    monkeypatch.setattr(peers, "measure", lambda threads: machine)
    options = "--works gemm,first-step,import --backend numpy --threads 1 --no-peer --rounds 1"
    rows, _ = peers.compare(asked(peers, options))
    assert [(r["work"], r["backend"], r["peer"], r["loopos_s"], r["ratio"]) for r in rows] == [
        ("gemm dx 60x384x384", "numpy", "openblas", 1.0, 3.0),
        ("first-step", "numpy", None, 0.6, None),
        ("import", None, None, 0.25, None),
    ]
    assert rows[0]["fraction_of_limit"] == 2 * 60 * 384 * 384 / 200e9


def test_without_a_compiler_there_is_no_fraction(load, monkeypatch, capsys):
    peers = load("peers")

    def no_compiler(threads):
        raise peers.NotMeasuredError("no C compiler")

    known = {"backend": "numpy", "threads": 1, "peak_mb": 1, "loopos_s": 1.0}
    monkeypatch.setattr(peers, "measure", no_compiler)
    monkeypatch.setattr(peers, "call", lambda *_: (known, 1.0))
    rows, machine = peers.compare(asked(peers, "--works A,L --backend numpy --no-peer"))
    assert machine is None
    assert [(r["work"], r["fraction_of_limit"]) for r in rows] == [
        ("A", None), ("L1", None), ("L2", None),
    ]  # fmt: skip
    assert "no C compiler" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--works A,Q --no-peer", "unknown work 'Q'"),
        ("--backend nunpy --no-peer", "'nunpy' cannot run here"),
        ("--works A --warmup 3", "at least 4"),
        ("--works A --rounds 0 --no-peer", "at least 1"),
        ("--works F --dtypes int9 --no-peer", "unknown dtype 'int9'"),
        ("--works A --no-peer --json nowhere/rows.json", "--json: nowhere is no directory"),
        ("--works A --no-peer --json .", "--json: . is a directory"),
    ],
)
def test_peers_refuses(load, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        load("peers").main(options.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_side_that_fails_is_named(load):
    peers = load("peers")
    with pytest.raises(SystemExit, match=r"(?s)-c raise ValueError\(7\) failed.*ValueError: 7"):
        peers.call(("-c", "raise ValueError(7)"), 1)


# -- targets.json and check_targets.py -----------------------------------------------------------


def test_targets_file(load):
    targets = load("suite.targets")
    described = json.loads(targets.PATH.read_text())
    documented = {}
    for target in targets.load():
        work = target.chooses["work"]
        assert target.figure in described["figures"]
        assert work.startswith("gemm ") or work in described["works"]
        if target.source.startswith("documented"):
            documented[work] = target.bound
    assert documented == {"A": 2, "B": 3, "RLHF": 10, "RLHF-default": 10}


def test_strictest_time_of_a_work(load, machine):
    targets, limits = load("suite.targets"), load("suite.limits")
    assert targets.seconds("A", "numpy", machine) == 0.5
    assert targets.seconds("B", "numpy", machine) == 3
    assert targets.seconds("C", "numpy", machine) is None
    assert targets.seconds("C", "cython", None) is None
    assert targets.seconds("C", "cython", machine) == limits.seconds("C", machine) / 0.82


def row(**values):
    return {"work": "A", "backend": "cython", "loopos_s": 0.1, "peer": None} | values


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([row()], 0),
        ([row(loopos_s=0.2)], 1),  # the documented target is met, ours is not
        ([row(backend="numpy", loopos_s=0.4)], 0),
        ([row(backend="numpy", loopos_s=0.4), row(backend="numba", loopos_s=0.2)], 0),
        ([row(backend="numpy", loopos_s=0.4), row(backend="numba", loopos_s=0.3)], 1),
        ([row(peer="torch-eager", ratio=1.31)], 0),
        ([row(peer="torch-eager", ratio=1.29)], 1),
        ([row(peer="torch-compile", ratio=0.5)], 0),  # no such target of A
        ([row(fraction_of_limit=0.6)], 1),
        ([row(work="K", loopos_s=9, peer="torch-eager", ratio=2.5, buckets=True)], 0),
        ([row(work="K", loopos_s=9, peer="torch-eager", ratio=2.5, buckets=False)], 1),
        ([row(work="C", loopos_s=9, peer="torch-eager", memory_ratio=0.9)], 1),
        ([row(work="D", peer="trl", ratio=3.6, rollout_share=0.3)], 0),
        ([row(work="E", peer="trl", ratio=2.3)], 1),
        ([row(work="E", peer="trl", ratio=2.5, rollout_share=0.16)], 1),
        ([row(work="E", times_state=1.31)], 1),
        ([row(work="E", tokens=10), row(work="E-ragged", tokens=5, loopos_s=0.06)], 0),
        ([row(work="E", tokens=10), row(work="E-ragged", tokens=5, loopos_s=0.07)], 1),
        ([row(work="RLHF", loopos_s=0.7)], 1),
        ([row(work="gemm dx 60x384x384", peer="openblas", ratio=0.9)], 1),
        ([row(work="gemm dx 60x384x384", fraction_of_limit=0.7)], 1),
        ([row(work="gemm dx 15x384x384", fraction_of_limit=0.7)], 0),
        ([row(work="C", backend="numpy")], 2),
        ([], 2),
    ],
)
def test_status_of_check_targets(load, tmp_path, rows, status, capsys):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert load("check_targets").main(["--json", str(tmp_path / "rows.json")]) == status
    assert ("MISSED" in capsys.readouterr().out) == (status == 1)


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"work": "A"}]'])
def test_check_targets_refuses_other_files(load, tmp_path, text, capsys):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        load("check_targets").main(["--json", str(tmp_path / "rows.json")])
    assert stopped.value.code == 2
    assert "rows.json: " in capsys.readouterr().err


# -- PyTorch's half ------------------------------------------------------------------------------


def test_first_loss_is_the_same_in_pytorch(load, tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    works = load("suite.works")
    exported = load("loopos_half").export(works.WORKS["A"](), tmp_path)
    threads = torch.get_num_threads()
    options = f"A --weights {tmp_path} --runs 1 --warmup 0 --threads {threads}"
    monkeypatch.setattr(sys, "argv", ["torch_half.py", *options.split()])
    load("torch_half").main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["first_loss"] == pytest.approx(exported["first_loss"], abs=1e-4)
    assert (found["peer"], found["work"], found["dtype"]) == ("torch-eager", "A", "float32")


def test_trl_half_has_the_same_steps(load):
    for needed in ("torch", "datasets", "trl"):
        pytest.importorskip(needed)
    half, reinforcement = load("trl_half"), load("suite.reinforcement")
    for name, sizes in half.WORKS.items():
        mine = reinforcement.REINFORCEMENT[name]
        vocab = mine.config.vocab_size
        np.testing.assert_array_equal(
            half.prompts(vocab, sizes.prompt_tokens), reinforcement.prompts(mine)
        )
        assert (sizes.tokens, sizes.most_runs, sizes.most_warmup) == (
            mine.tokens, mine.most_runs, mine.most_warmup,
        )  # fmt: skip
    tiny = {"vocab_size": 50, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    found = half.steps_of(half.Sizes(tiny, 4, 3), runs=2, warmup=1)
    assert (found["tokens"], found["updates"]) == (8 * 7, 1)
    config = loopos.TransformerConfig(
        d_model=8, num_heads=2, num_layers=1, d_ff=32, vocab_size=50, max_seq_len=32
    )
    assert found["trained"] == 2 * load("suite.limits").num_parameters(config) + 8


def test_halves_have_the_same_data(load):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    half, works = load("torch_half"), load("suite.works")
    assert tuple(half.ragged_lengths()) == works.ragged_lengths()
    assert half.ATTENTION_SIZES == works.ATTENTION_SIZES
    sequences = half.random_sequences(50257, half.ragged_lengths())
    (whole,), parts = half.padded(sequences, False), half.padded(sequences, True)
    assert tuple(whole["input_ids"].shape) == (32, 179)
    assert [len(part["input_ids"]) for part in parts] == [8, 8, 8, 8]
    for batches in ([whole], parts):
        assert sum(int(batch["attention_mask"].sum()) for batch in batches) == 2062
    for letter in ("A", "B"):
        given = argparse.Namespace(work=letter, weights=None, buckets=False)
        model, batches, tokens = half.training_data(given)
        config = works.SEED_FINE_TUNING if letter == "A" else works.SEED_REASONING
        head = 3840 if letter == "A" else 0
        count = load("suite.limits").num_parameters(config) + head
        assert sum(p.numel() for p in model.parameters()) == count
        assert sum(b["input_ids"].numel() for b in batches) == tokens == (300 if head else 260)
