"""Direct preference optimisation: the losses, the reference that never changes, resuming."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from loopos.autograd import backward
from loopos.backends import available_backends, use_backend
from loopos.backends.threads import thread_limit
from loopos.config import load_config
from loopos.data.batch import Batch
from loopos.data.preferences import read_judgements, read_preferences
from loopos.data.tokenizer import train_bpe
from loopos.errors import CheckpointError, ConfigError, DataError
from loopos.methods import losses
from loopos.methods.dpo import DPOTrainer, Options
from loopos.methods.logprobs import response_logprobs, response_sums
from loopos.models import Transformer, TransformerConfig, load_model
from loopos.models.adapter import LoraConfig
from loopos.runner import run
from loopos.training.loop import Interrupted

VOCAB = 300
WORDS = ["red", "green", "blue", "warm", "cold", "long", "short", "old", "new", "odd"]
BACKENDS = sorted(available_backends())
LOSSES = ["sigmoid", "ipo", "hinge", "orpo", "simpo", "kto"]
PAIRED = LOSSES[:-1]


def rows(count, seed):
    """Return pairs whose chosen response says please."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        sides = [list(rng.choice(WORDS, rng.integers(2, 6))) for _ in range(2)]
        sides[0].insert(rng.integers(0, len(sides[0]) + 1), "please")
        prompt = f"Say {' '.join(rng.choice(WORDS, 3))}:"
        chosen, rejected = (" " + " ".join(side) for side in sides)
        found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return found


ROWS = rows(24, 0)
SINGLE = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row, side in zip(ROWS, ["chosen", "rejected", "chosen"] * 8, strict=True)
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([text for row in ROWS for text in row.values()], VOCAB)


def model(seed=0, dtype=np.float32, **changes):
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 32, "vocab_size": VOCAB}
    return Transformer(TransformerConfig(**(sizes | {"max_seq_len": 64} | changes)), seed, dtype)


def data_of(kind):
    return SINGLE if kind == "kto" else ROWS


def trained(tokenizer, kind="sigmoid", rate=0.0, **options):
    """Return a trainer after some steps, and their records."""
    trainer = DPOTrainer(model(dropout=rate), tokenizer)
    defaults = {"max_steps": 3, "learning_rate": 1e-2, "batch_size": 6}
    result = trainer.fit(data_of(kind), loss_type=kind, **(defaults | options))
    return trainer, result.history


def weights(trainer):
    return {n: p.data.copy() for n, p in trainer.model.parameters().items()}


def equal(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def message_of(kind, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def direct(network, tokenizer, prompt, response):
    """Return the log-probability of a response and its tokens, from all logits."""
    begin = tokenizer.encode(prompt)
    ids = [*begin, *tokenizer.encode(response), tokenizer.eos_id]
    logits = network.forward(Batch.from_sequences([ids])).data.astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = [logs[i - 1, ids[i]] for i in range(len(begin), len(ids))]
    return sum(found), len(found)


# -- log-probabilities -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probabilities_are_those_of_the_response_alone(tokenizer, backend):
    with use_backend(backend):
        trainer = DPOTrainer(model(3), tokenizer)
        encoded = trainer._encoded(read_preferences(ROWS), Options())
        found = response_logprobs(trainer.model, encoded.batch(np.arange(24)))
        for number, row in enumerate(ROWS):
            for side, name in enumerate(("chosen", "rejected")):
                expected = direct(trainer.model, tokenizer, row["prompt"], row[name])
                place = 2 * number + side
                assert found.sums[place] == pytest.approx(expected[0], rel=1e-5)
                assert found.lengths[place] == expected[1]
        alone = np.concatenate(
            [response_logprobs(trainer.model, encoded.batch(np.array([i]))).sums for i in range(24)]
        )
        if backend == "cython":
            np.testing.assert_array_equal(alone, found.sums)
            np.testing.assert_array_equal(response_sums(trainer.model, encoded, 50), found.sums)
        np.testing.assert_allclose(alone, found.sums, rtol=1e-6)


# -- the losses ------------------------------------------------------------------------------------


def test_the_first_step_has_the_loss_ln_2(tokenizer):
    _, history = trained(tokenizer)
    first, last = history[0], history[-1]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margin"):
        assert first[name] == pytest.approx(0, abs=1e-6)
    assert first["rewards/accuracy"] == pytest.approx(0.5, abs=0.5)
    assert last["rewards/margin"] != 0
    difference = last["rewards/chosen"] - last["rewards/rejected"]
    assert last["rewards/margin"] == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_is_that_of_the_pure_function(tokenizer, kind):
    start, other = model(1), model(2)
    trainer = DPOTrainer(start, tokenizer, reference=other)
    options = {"beta": 0.3} if kind != "kto" else {"beta": 0.3, "undesirable_weight": 1.5}
    if kind == "kto":
        sums, reference, mixed = [], [], []
        for i, row in enumerate(SINGLE):
            pair = row["prompt"], row["completion"]
            sums.append(direct(start, tokenizer, *pair)[0])
            reference.append(direct(other, tokenizer, *pair)[0])
            mix = row["prompt"], SINGLE[(i + 1) % 24]["completion"]
            mixed.append(direct(start, tokenizer, *mix)[0] - direct(other, tokenizer, *mix)[0])
        desirable = np.array([row["label"] for row in SINGLE])
        expected, count, _ = losses.kto_loss_and_grad(
            np.array(sums), np.array(reference), desirable, max(0, np.mean(mixed)), 0.3, 1.0, 1.5
        )
    else:
        found = [[direct(net, tokenizer, row["prompt"], row[side]) for row in ROWS]
                 for net in (start, other) for side in ("chosen", "rejected")]  # fmt: skip
        chosen, rejected, ref_chosen, ref_rejected = (
            np.array([value[0] for value in column]) for column in found
        )
        lengths = [np.array([value[1] for value in column]) for column in found[:2]]
        count = 24
        if kind == "simpo":
            expected = losses.simpo_loss_and_grad(chosen, rejected, *lengths, 0.3, 1.0)[0]
        elif kind == "orpo":
            expected = 0.3 * losses.orpo_loss_and_grad(chosen, rejected, *lengths)[0]
            expected += 24 * -chosen.sum() / lengths[0].sum()
        else:
            sides = chosen, rejected, ref_chosen, ref_rejected
            expected = losses.dpo_loss_and_grad(*sides, 0.3, kind)[0]
    evaluated = trainer.evaluate(data_of(kind), Options(loss_type=kind, **options))
    assert evaluated["loss"] == pytest.approx(expected / count, rel=1e-5)
    result = trainer.fit(
        data_of(kind), loss_type=kind, max_steps=1, batch_size=24, shuffle=False, **options
    )
    assert result.history[0]["loss"] == pytest.approx(expected / count, rel=1e-5)
    if kind == "kto":
        assert evaluated["kl"] == pytest.approx(max(0, np.mean(mixed)), abs=1e-4)
    if kind == "orpo":
        nll = result.history[0]["nll"]
        assert nll == pytest.approx(-chosen.sum() / lengths[0].sum(), rel=1e-5)


def test_every_loss_trains_another_model(tokenizer):
    results = [weights(trained(tokenizer, kind)[0]) for kind in LOSSES]
    tables = [result["embeddings.tokens"] for result in results]
    for i, one in enumerate(tables):
        assert np.isfinite(one).all()
        for other in tables[i + 1 :]:
            assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        *((kind, {"beta": 0.7}) for kind in LOSSES),
        ("sigmoid", {"label_smoothing": 0.2}),
        ("sigmoid", {"reference_free": True}),
        ("ipo", {"reference_free": True}),
        *((kind, {"nll_coefficient": 0.3}) for kind in PAIRED),
        ("simpo", {"simpo_margin": 0.2}),
        ("kto", {"desirable_weight": 2.0}),
        ("kto", {"undesirable_weight": 0.5}),
        ("sigmoid", {"max_length": 11}),
        ("sigmoid", {"dropout": True}),
        ("sigmoid", {"lora": LoraConfig(rank=2)}),
    ],
    ids=str,
)
def test_every_option_changes_the_result(tokenizer, kind, option):
    plain, _ = trained(tokenizer, kind, rate=0.3)
    changed, _ = trained(tokenizer, kind, rate=0.3, **option)
    probe = read_preferences(ROWS)
    sums = [response_sums(t.model, t._encoded(probe, Options())) for t in (plain, changed)]
    assert not np.array_equal(*sums)


@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
def test_a_precomputed_reference_says_the_same(tokenizer, kind):
    with use_backend("cython" if "cython" in BACKENDS else BACKENDS[0]):
        once, _ = trained(tokenizer, kind)
        always, _ = trained(tokenizer, kind, precompute_reference=False)
    if "cython" in BACKENDS:
        equal(weights(once), weights(always))
    for name, array in weights(once).items():
        np.testing.assert_allclose(array, weights(always)[name], atol=1e-4)


@pytest.mark.parametrize("kind", LOSSES)
def test_accumulated_samples_are_one_batch_of_them(tokenizer, kind):
    options = {"optimizer": "sgd", "learning_rate": 1e-2}
    one, whole = trained(tokenizer, kind, batch_size=8, **options)
    many, parts = trained(tokenizer, kind, batch_size=1, gradient_accumulation_steps=8, **options)
    for a, b in zip(whole, parts, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"time_s", "tokens_per_s"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
    for name, array in weights(one).items():
        np.testing.assert_allclose(array, weights(many)[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_gradient_of_the_whole_network_is_right(tokenizer, kind):
    policy, reference = model(3, np.float64), model(4, np.float64)
    trainer = DPOTrainer(policy, tokenizer, reference=reference)
    options = Options(loss_type=kind, nll_coefficient=None if kind == "kto" else 0.5)
    read = read_judgements if kind == "kto" else read_preferences
    data = read(data_of(kind)[:6])
    encoded = trainer._encoded(data, options)
    objective = trainer._objective(data, encoded, reference, options)
    batch = encoded.batch(np.arange(6))
    parameters = policy.parameters()
    rng = np.random.default_rng(0)
    direction = {n: rng.standard_normal(p.shape) for n, p in parameters.items()}
    objective.counts(batch)
    backward([(term, 1.0) for term in objective.losses(batch, None).values()])
    found = sum(float((p.grad * direction[n]).sum()) for n, p in parameters.items())
    origin, h = {n: p.data.copy() for n, p in parameters.items()}, 1e-7
    sides = []
    for sign in (1, -1):
        for name, parameter in parameters.items():
            parameter.data[...] = origin[name] + sign * h * direction[name]
        # No new counts: KTO's reference point is a constant of the step.
        sides.append(sum(term.item() for term in objective.losses(batch, None).values()))
    assert found == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=1e-6)


# -- the reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["whole", "lora"])
@pytest.mark.parametrize("precompute", [True, False])
def test_the_reference_never_changes(tokenizer, kind, lora, precompute):
    start = model(5)
    before = {name: p.data.tobytes() for name, p in start.parameters().items()}
    trainer = DPOTrainer(start, tokenizer)
    history = trainer.fit(
        data_of(kind), loss_type=kind, lora=lora, precompute_reference=precompute, max_steps=4,
        learning_rate=1e-2,
    ).history  # fmt: skip
    assert {n: p.data.tobytes() for n, p in trainer.reference.parameters().items()} == before
    assert not trainer.reference.adapters
    assert history[0]["loss"] == pytest.approx(0.5 if kind == "kto" else np.log(2), abs=1e-6)
    assert history[-1]["loss"] != pytest.approx(history[0]["loss"], abs=1e-6)
    if lora is not None:  # the base with adapters off: the same arrays, held once
        shared = trainer.reference.parameters()["layers.0.mlp.up.weight"].data
        assert shared is trainer.model.parameters()["layers.0.mlp.up.weight"].data


@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
def test_the_reference_is_asked_once_for_the_same_responses(tokenizer, kind, monkeypatch):
    calls = []

    def counted(model, encoded, *arguments):
        calls.append(len(encoded.tokens))
        return response_sums(model, encoded, *arguments)

    monkeypatch.setattr("loopos.methods.dpo.response_sums", counted)
    data = (read_judgements if kind == "kto" else read_preferences)(data_of(kind))
    trainer = DPOTrainer(model(), tokenizer)
    trainer.fit(data, loss_type=kind, max_steps=1)
    assert len(calls) == 1 + (kind == "kto")
    trainer.fit(data, loss_type=kind, max_steps=1)
    assert len(calls) == 1 + (kind == "kto")
    trainer.reference = model(9)
    trainer.fit(data, loss_type=kind, max_steps=1)
    assert len(calls) == 2 * (1 + (kind == "kto"))


def test_a_reference_is_made_only_where_the_loss_asks_for_one(tokenizer):
    for kind, option in (("orpo", {}), ("simpo", {}), ("sigmoid", {"reference_free": True})):
        trainer, _ = trained(tokenizer, kind, max_steps=1, **option)
        assert trainer.reference is None
    assert trained(tokenizer, max_steps=1)[0].reference is not None


# -- evaluation ------------------------------------------------------------------------------------


def test_held_out_pairs_are_ranked_better_than_by_the_reference(tokenizer):
    trainer = DPOTrainer(model(d_model=32, d_ff=64), tokenizer)
    held_out = rows(60, 2)
    before = trainer.evaluate(held_out)
    assert before["accuracy"] == pytest.approx(0.5, abs=0.5)
    assert before["margin"] == pytest.approx(0, abs=1e-6)
    trainer.fit(rows(300, 1), held_out, learning_rate=2e-3, batch_size=16, num_epochs=2)
    after = trainer.evaluate(held_out)
    assert after["accuracy"] > 0.9
    assert after["accuracy"] > after["reference_accuracy"] + 0.2
    assert after["reference_accuracy"] == before["reference_accuracy"]
    assert after["margin"] == pytest.approx(
        after["rewards/chosen"] - after["rewards/rejected"], rel=1e-6
    )
    assert (after["count"], after["left_out"]) == (60, 0)


def test_kto_learns_from_unpaired_responses(tokenizer):
    data = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for i, row in enumerate(rows(400, 1))
        for side in [("chosen", "rejected")[i % 2]]
    ]
    trainer = DPOTrainer(model(d_model=32, d_ff=64), tokenizer)
    options = Options(loss_type="kto", learning_rate=2e-3, num_epochs=2)
    trainer.fit(data, options=options)
    found = trainer.evaluate(rows(60, 2), options)
    assert found["accuracy"] > 0.9
    assert found["accuracy"] > found["reference_accuracy"] + 0.2
    assert found["rewards/desirable"] > found["rewards/undesirable"]
    assert found["kl"] >= 0


def test_the_report_is_of_pairs(tokenizer):
    data = read_preferences([*ROWS, ROWS[0] | {"rejected": ROWS[0]["chosen"]}])
    trainer = DPOTrainer(model(), tokenizer)
    report = trainer.report(data, None, Options())
    assert (report.rows, report.ties.count) == (24, 1)
    single = trainer.report(read_judgements(SINGLE), None, Options(loss_type="kto"))
    assert (single.rows, single.ties.count) == (24, 0)


# -- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, {}) for kind in LOSSES), ("sigmoid", {"lora": LoraConfig(rank=2), "dropout": True})],
    ids=str,
)
def test_four_steps_are_two_and_two_more(tokenizer, tmp_path, kind, options):
    options = options | {"batch_size": 6, "num_epochs": 2, "max_steps": 4, "learning_rate": 1e-3}
    whole, history = trained(tokenizer, kind, rate=0.1, **options)
    steps = iter((False, True))
    stopped = DPOTrainer(model(dropout=0.1), tokenizer)
    result = stopped.fit(
        data_of(kind), loss_type=kind, output_dir=tmp_path, stop=lambda: next(steps), **options
    )
    assert (result.steps, result.stopped_reason) == (2, "interrupted")
    resumed = DPOTrainer(model(dropout=0.1), tokenizer)
    result = resumed.fit(data_of(kind), loss_type=kind, output_dir=tmp_path, resume=True, **options)
    assert (result.steps, len(result.history)) == (4, 2)
    equal(weights(resumed), weights(whole))
    for found, expected in zip(result.history, history[2:], strict=True):
        assert {n: v for n, v in found.items() if "_s" not in n} == {
            n: v for n, v in expected.items() if "_s" not in n
        }


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["whole", "lora"])
@pytest.mark.parametrize("given", [False, True])
def test_a_run_goes_on_with_its_own_reference_only(tokenizer, tmp_path, lora, given):
    def trainer(seed, other):
        return DPOTrainer(model(seed), tokenizer, reference=model(other) if given else None)

    options = {"max_steps": 4, "save_steps": 2, "batch_size": 6, "lora": lora}
    stop = iter([False, True]).__next__
    trainer(0, 5).fit(ROWS, output_dir=tmp_path, stop=stop, **options)
    wrong = trainer(0, 6) if given else trainer(1, 5)
    with pytest.raises(CheckpointError, match="the frozen parameters are not those"):
        wrong.fit(ROWS, output_dir=tmp_path, resume=True, **options)
    result = trainer(0, 5).fit(ROWS, output_dir=tmp_path, resume=True, **options)
    assert result.steps == 4


def test_the_model_itself_is_no_reference(tokenizer):
    """It would change with the policy: a copy of it is taken, as where none is given."""
    network = model()
    trainer = DPOTrainer(network, tokenizer, reference=network)
    options = {"max_steps": 3, "learning_rate": 1e-2, "batch_size": 6}
    result = trainer.fit(ROWS, precompute_reference=False, **options)
    assert [row["loss"] for row in result.history] == [row["loss"] for row in trained(tokenizer)[1]]
    twin = Transformer(network.config, arrays={n: p.data for n, p in network.parameters().items()})
    with pytest.raises(ConfigError, match="shares weights with the policy"):
        DPOTrainer(network, tokenizer, reference=twin).fit(ROWS, **options)
    larger = DPOTrainer(network, tokenizer, reference=model(vocab_size=VOCAB + 1))
    with pytest.raises(ConfigError, match="the reference has a vocab_size of 301, the policy"):
        larger.fit(ROWS, **options)


@pytest.mark.parametrize("kind", LOSSES)
def test_backends_agree_over_twenty_steps(tokenizer, kind):
    found = {}
    for backend in BACKENDS:
        with use_backend(backend):
            history = trained(tokenizer, kind, max_steps=20, num_epochs=5, learning_rate=1e-3)[1]
            found[backend] = [record["loss"] for record in history]
    assert len(set(found["numpy"])) == 20
    for losses_found in found.values():
        np.testing.assert_allclose(losses_found, found["numpy"], rtol=1e-3)


@pytest.mark.skipif("cython" not in BACKENDS, reason="the compiled kernels are not there")
def test_a_policy_has_the_same_bytes_at_any_number_of_threads(tokenizer):
    found = []
    for threads in (1, 2, 5):
        with use_backend("cython"), thread_limit(threads):
            found.append(weights(trained(tokenizer, batch_size=12)[0]))
    equal(found[0], found[1])
    equal(found[0], found[2])


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo"},
         'training.loss_type: expected one of "sigmoid", "ipo", "hinge", "orpo", "simpo", "kto", '
         "found 'dpo'"),
        ({"beta": 0}, "training.beta: expected a positive number, found 0"),
        ({"label_smoothing": 0.5},
         "training.label_smoothing: expected a number in [0, 0.5), found 0.5"),
        ({"loss_type": "ipo", "label_smoothing": 0.1},
         "training.label_smoothing: the loss 'ipo' has none"),
        ({"simpo_margin": 1.0}, "training.simpo_margin: the loss 'sigmoid' has none"),
        ({"desirable_weight": 2.0}, "training.desirable_weight: the loss 'sigmoid' has none"),
        ({"loss_type": "kto", "reference_free": True},
         "training.reference_free: the loss 'kto' has none"),
        ({"loss_type": "kto", "nll_coefficient": 1.0},
         "training.nll_coefficient: the loss 'kto' has none"),
        ({"max_length": 65}, "training.max_length: 65 is more than the model's max_seq_len 64"),
        ({"overflow": "cut"}, 'training.overflow: expected one of "drop", "error", found \'cut\''),
        ({"dropout": 1}, "training.dropout: expected true or false, found 1"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_named(tokenizer, options, message):
    trainer = DPOTrainer(model(), tokenizer)
    assert message_of(ConfigError, trainer.fit, ROWS, **options) == message


def test_models_and_data_that_do_not_fit_are_refused(tokenizer):
    assert message_of(ConfigError, DPOTrainer, model(causal=False), tokenizer) == (
        "direct preference optimisation needs a causal model with a language-model head"
    )
    trainer = DPOTrainer(model(), tokenizer)
    pairs, single = read_preferences(ROWS), read_judgements(SINGLE)
    assert message_of(DataError, trainer.fit, single) == (
        "row 1: the loss 'sigmoid' needs pairs of responses"
    )
    assert message_of(DataError, trainer.fit, pairs, loss_type="kto") == (
        "row 1: the loss 'kto' needs single responses with labels"
    )
    assert message_of(DataError, trainer.fit, SINGLE[:1], loss_type="kto") == (
        "row 1: the loss 'kto' needs two rows at least, found one"
    )


# -- the command line ------------------------------------------------------------------------------


@pytest.fixture
def configure(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    for name, data in (("p.jsonl", ROWS), ("k.jsonl", SINGLE)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in data))
    model(7).save(tmp_path / "base", tokenizer)
    config = {
        "computation": {"method": "dpo"},
        "training": {"learning_rate": 0.003, "batch_size": 4},
        "data": {"preference_data": "p.jsonl", "pretrained_weights": "base", "output_dir": "out"},
    }
    (tmp_path / "run.json").write_text(json.dumps(config, indent=1))
    return lambda *overrides: load_config("run.json", overrides)


@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
def test_a_configuration_trains_a_policy(configure, tmp_path, tokenizer, kind):
    file = "k.jsonl" if kind == "kto" else "p.jsonl"
    summary = run(configure(f"training.loss_type={kind}", f"data.preference_data={file}"))
    assert summary.result.stopped_reason == "finished"
    assert {"loss", "reference_accuracy"} <= set(summary.evaluation)
    policy = load_model(tmp_path / "out" / "model")
    again = DPOTrainer(policy, tokenizer, reference=load_model(tmp_path / "base"))
    figures = again.evaluate(file, Options(loss_type=kind))
    assert np.isfinite(figures["loss"])
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    names = {"kl", "rewards/desirable"} if kind == "kto" else {"rewards/margin", "logps/chosen"}
    assert any(names <= set(json.loads(line)) for line in lines)


def test_a_run_that_was_stopped_continues_to_the_same_bytes(configure, tmp_path):
    run(configure("data.output_dir=whole"))
    steps = iter((False, True))
    with pytest.raises(Interrupted):
        run(configure(), stop=lambda: next(steps))
    run(configure(), resume=True)
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole/model", "out/model"))
    assert one.read_bytes() == other.read_bytes()
    figures = [json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("whole", "out")]
    assert figures[0] == figures[1]


KILLED = """
import os, signal, sys
from loopos.backends.threads import thread_limit
from loopos.config import load_config
from loopos.runner import run
steps = iter(range(1, 100))
run(load_config("run.json", ["training.save_steps=2"]),
    stop=lambda: next(steps) == 3 and os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals that kill")
def test_a_run_that_was_killed_continues_to_the_same_bytes(configure, tmp_path):
    run(configure("data.output_dir=whole", "training.save_steps=2"))
    killed = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "out" / "checkpoints").glob("step-*")] == ["step-00000002"]
    run(configure("training.save_steps=2"), resume=True)
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole/model", "out/model"))
    assert one.read_bytes() == other.read_bytes()


def test_the_command_line_validates_and_says_what_does_not_fit(configure, tmp_path):
    def loopos(*arguments):
        command = [sys.executable, "-m", "loopos", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    code, said = loopos("validate", "run.json")
    assert (code, "ties" in said) == (0, True), said
    code, said = loopos("validate", "run.json", "--set=training.simpo_margin=1")
    assert (code, "simpo_margin: the loss 'sigmoid' has none" in said) == (2, True), said
    code, said = loopos("run", "run.json")
    assert code == 0, said
    assert "reference_accuracy" in said
    with (tmp_path / "p.jsonl").open("a") as file:
        file.write('{"prompt": "a", "chosen": "b"}\n')
    code, said = loopos("run", "run.json", "--output-dir=other")
    assert (code, "p.jsonl:25: no field 'rejected'" in said) == (2, True), said


@pytest.mark.parametrize("kind", ["simpo", "orpo"])
def test_what_is_trained_is_evaluated_with_its_own_options(kind, tokenizer):
    trainer = DPOTrainer(model(), tokenizer)
    given = Options(loss_type=kind, max_steps=12, batch_size=8, learning_rate=1e-2)
    trainer.fit(ROWS, options=given)
    figures = trainer.evaluate(ROWS)
    assert figures == trainer.evaluate(ROWS, given)
    assert figures["accuracy"] > 0.5
    words = "training.loss_type: 'sigmoid' compares with a reference, but the policy was trained w"
    with pytest.raises(ConfigError, match=words):
        trainer.evaluate(ROWS, Options())


def test_a_response_without_text_is_its_end(tokenizer):
    row = {"prompt": "Say red:", "chosen": " red", "rejected": ""}
    trainer = DPOTrainer(model(), tokenizer)
    figures = trainer.evaluate([row, row])
    said = trainer.evaluate([row | {"rejected": tokenizer.decode([tokenizer.eos_id])}] * 2)
    assert figures == said
