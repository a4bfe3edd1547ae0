"""Reward models, by the numbered lines of the reference (shown as R1 ... R5)."""

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
from loopos.data.preferences import read_preferences
from loopos.data.readers import split
from loopos.data.responses import encode_responses
from loopos.data.tokenizer import train_bpe
from loopos.errors import ConfigError, DataError, InputError, ModelFormatError, NumericalError
from loopos.methods.reward_model import Options, RewardTrainer, _Objective
from loopos.models import Transformer, TransformerConfig
from loopos.models.adapter import LoraConfig
from loopos.models.reward import RewardModel, load_reward_model
from loopos.runner import run
from loopos.training.loop import Interrupted
from loopos.training.metrics import pair_metrics

VOCAB = 300
WORDS = ["red", "green", "blue", "warm", "cold", "long", "short", "old", "new", "odd"]
BACKENDS = sorted(available_backends())


def rows(count, seed, longest=6):
    """Return pairs whose chosen response says please."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        sides = [list(rng.choice(WORDS, rng.integers(2, longest))) for _ in range(2)]
        sides[0].insert(rng.integers(0, len(sides[0]) + 1), "please")
        prompt = f"Say {' '.join(rng.choice(WORDS, 3))}:"
        chosen, rejected = (" " + " ".join(side) for side in sides)
        found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return found


ROWS = rows(24, 0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([text for row in ROWS for text in row.values()], VOCAB)


def model(seed=0, dtype=np.float32, **changes):
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 32, "vocab_size": VOCAB}
    return Transformer(TransformerConfig(**(sizes | {"max_seq_len": 64} | changes)), seed, dtype)


def trainer_of(tokenizer, seed=0, **changes):
    return RewardTrainer(model(seed, **changes), tokenizer, seed=seed)


def weights(trainer):
    return {n: p.data.copy() for n, p in trainer.reward_model.parameters().items()}


def equal(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def message_of(kind, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- R1: the score -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_score_does_not_depend_on_what_else_is_in_the_batch(tokenizer, backend):
    with use_backend(backend):
        trainer = trainer_of(tokenizer, seed=2)
        prompts = [row["prompt"] for row in ROWS]
        responses = [row["chosen"] for row in ROWS]
        together = trainer.score(prompts, responses)
        alone = [trainer.score([p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
        backwards = trainer.score(prompts[::-1], responses[::-1], batch_tokens=50)[::-1]
        if backend == "cython":
            np.testing.assert_array_equal(together, alone)
            np.testing.assert_array_equal(together, backwards)
        np.testing.assert_allclose(together, alone, atol=1e-6)
        np.testing.assert_allclose(together, backwards, atol=1e-6)
        assert np.ptp(together) > 0.01


def test_the_score_is_that_of_the_last_token(tokenizer):
    trainer = trainer_of(tokenizer)
    prompt, response = ROWS[0]["prompt"], ROWS[0]["chosen"]
    ids = [*tokenizer.encode(prompt), *tokenizer.encode(response), tokenizer.eos_id]
    reward = trainer.reward_model
    hidden = reward.body.get_hidden_states(Batch.from_sequences([ids])).data
    expected = hidden[-1].astype(np.float64) @ reward.weight.data[0].astype(np.float64)
    assert trainer.score([prompt], [response])[0] == pytest.approx(expected, rel=1e-5)
    values = reward.token_scores(Batch.from_sequences([[5], ids, [7, 8]])).data
    assert values.shape == (len(ids) + 3,)
    assert values[len(ids)] == pytest.approx(expected, rel=1e-5)


# -- R2: the loss --------------------------------------------------------------------------------


def test_a_zero_head_has_the_loss_ln_2(tokenizer):
    trainer = trainer_of(tokenizer)
    trainer.reward_model.weight.data[:] = 0
    result = trainer.fit(ROWS, max_steps=1, batch_size=24, normalise=None)
    assert result.history[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert result.history[0]["rewards/accuracy"] == 0.5


def test_the_loss_is_bradley_terry_with_margins_and_centering(tokenizer):
    margins = np.linspace(-1, 2, len(ROWS))
    data = [row | {"margin": float(m)} for row, m in zip(ROWS, margins, strict=True)]
    trainer = trainer_of(tokenizer, seed=1)
    prompts = [row["prompt"] for row in ROWS]
    chosen = trainer.score(prompts, [row["chosen"] for row in ROWS]).astype(np.float64)
    rejected = trainer.score(prompts, [row["rejected"] for row in ROWS]).astype(np.float64)
    plain = np.log1p(np.exp(-(chosen - rejected))).mean()
    with_margins = np.log1p(np.exp(-(chosen - rejected - margins))).mean()
    centering = 0.3 * ((chosen + rejected) ** 2).mean()

    def first(rows, **options):
        fresh = trainer_of(tokenizer, seed=1)
        return fresh.fit(rows, max_steps=1, batch_size=24, **options).history[0]

    assert first(ROWS)["loss"] == pytest.approx(plain, rel=1e-5)
    assert "centering" not in first(ROWS)
    assert trainer.evaluate(ROWS)["loss"] == pytest.approx(plain, rel=1e-6)
    assert trainer.evaluate(data)["loss"] == pytest.approx(with_margins, rel=1e-6)
    both = first(data, centering_coefficient=0.3)
    assert both["bradley_terry"] == pytest.approx(with_margins, rel=1e-5)
    assert both["centering"] == pytest.approx(centering, rel=1e-5)
    assert both["loss"] == pytest.approx(with_margins + centering, rel=1e-5)
    lead = (chosen - rejected).mean()
    assert both["rewards/margin"] == pytest.approx(lead, rel=1e-4)
    assert both["rewards/chosen"] - both["rewards/rejected"] == pytest.approx(lead, rel=1e-4)


def test_accumulated_pairs_are_one_batch_of_them(tokenizer):
    # SGD: Adam makes much of the noise in gradients that are 0 in exact arithmetic.
    options = {"max_steps": 2, "optimizer": "sgd", "learning_rate": 1e-2,
               "centering_coefficient": 0.1}  # fmt: skip
    whole, parts = trainer_of(tokenizer), trainer_of(tokenizer)
    one = whole.fit(ROWS, batch_size=8, **options)
    many = parts.fit(ROWS, batch_size=1, gradient_accumulation_steps=8, **options)
    for a, b in zip(one.history, many.history, strict=True):
        for name in ("loss", "centering", "rewards/margin", "rewards/accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6)
        assert a["tokens"] == b["tokens"]
    for name, array in weights(whole).items():
        np.testing.assert_allclose(array, weights(parts)[name], atol=1e-6, err_msg=name)


def test_the_gradient_of_the_whole_network_is_right(tokenizer):
    body = model(3, np.float64)
    reward = RewardModel(body, seed=3)
    data = read_preferences([row | {"margin": 0.5} for row in ROWS[:6]])
    encoded = encode_responses(tokenizer, data, 64)
    objective = _Objective(reward, data.margins, Options(centering_coefficient=0.2))
    batch = encoded.batch(np.arange(6))
    parameters = reward.parameters()
    rng = np.random.default_rng(0)
    direction = {n: rng.standard_normal(p.shape) for n, p in parameters.items()}

    def total():
        return sum(term.item() for term in objective.losses(batch, None).values())

    backward([(term, 1.0) for term in objective.losses(batch, None).values()])
    found = sum(float((p.grad * direction[n]).sum()) for n, p in parameters.items())
    origin, h = {n: p.data.copy() for n, p in parameters.items()}, 1e-6
    sides = []
    for sign in (1, -1):
        for name, parameter in parameters.items():
            parameter.data[...] = origin[name] + sign * h * direction[name]
        sides.append(total())
    assert found == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=1e-6)


# -- R3: the head and the defaults ----------------------------------------------------------------


def test_the_head_starts_as_the_reference_says_and_one_epoch_is_the_default(tokenizer):
    reward = RewardModel(model(d_model=512, num_heads=2, num_layers=1, d_ff=8, vocab_size=300))
    assert reward.weight.data.std() == pytest.approx(1 / np.sqrt(513), rel=0.1)
    assert reward.bias.tolist() == [0.0]
    assert not np.array_equal(RewardModel(model(), 1).weight.data, RewardModel(model()).weight.data)
    result = trainer_of(tokenizer).fit(ROWS, batch_size=8)
    assert result.steps == 3


def test_dropout_is_off_unless_it_is_asked_for(tokenizer):
    def trained(rate, **options):
        trainer = trainer_of(tokenizer, dropout=rate)
        trainer.fit(ROWS, max_steps=2, **options)
        return weights(trainer)

    plain = trained(0.0)
    equal(trained(0.5), plain)
    assert not np.array_equal(trained(0.5, dropout=True)["score.weight"], plain["score.weight"])


@pytest.mark.parametrize(
    "option",
    [{"centering_coefficient": 0.5}, {"max_length": 11}, {"normalise": "mean_and_deviation"},
     {"lora": LoraConfig(rank=2)}],
    ids=str,
)  # fmt: skip
def test_every_option_changes_the_result(tokenizer, option):
    results = []
    for options in ({}, option):
        trainer = trainer_of(tokenizer)
        trainer.fit(ROWS, max_steps=3, learning_rate=1e-2, **options)
        results.append(trainer.reward_model.weight.data)
    assert not np.array_equal(*results)


# -- R4: normalisation -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", [None, "mean", "mean_and_deviation"])
def test_scores_are_normalised_after_training(tokenizer, how):
    trainer = trainer_of(tokenizer)
    trainer.fit(ROWS, max_steps=3, learning_rate=1e-3, normalise=how)
    prompts = [row["prompt"] for row in ROWS] * 2
    responses = [row[side] for side in ("chosen", "rejected") for row in ROWS]
    scores = trainer.score(prompts, responses).astype(np.float64)
    assert (abs(scores.mean()) < 1e-5) == (how is not None)
    assert (abs(scores.std() - 1) < 1e-4) == (how == "mean_and_deviation")


def test_equal_scores_have_a_mean_and_no_deviation(tokenizer):
    model = trainer_of(tokenizer).reward_model
    for scores in (np.full(3, 0.1), np.array([2e9, 2e9 + 1])):
        with pytest.raises(NumericalError, match="cannot be scaled on scores that are all equal"):
            model.normalise(scores, scale=True)
    before = model.bias.copy()
    model.normalise(np.array([2e9, 2e9 + 1]))
    np.testing.assert_allclose(model.bias, before - 2e9, rtol=1e-6)


def test_reference_samples_may_be_given(tokenizer):
    trainer = trainer_of(tokenizer)
    prompts, responses = [row["prompt"] for row in ROWS[:9]], [row["rejected"] for row in ROWS[:9]]
    before = trainer.score(prompts, responses).astype(np.float64)
    trainer.normalise(prompts, responses, scale=True)
    after = trainer.score(prompts, responses)
    np.testing.assert_allclose(after, (before - before.mean()) / before.std(), atol=1e-4)
    trainer.reward_model.weight.data[:] = 0
    assert message_of(NumericalError, trainer.normalise, prompts, responses, scale=True) == (
        "a reward model cannot be scaled on scores that are all equal"
    )


# -- R5: what is reported --------------------------------------------------------------------------


def test_a_preference_is_learned_and_held_out_pairs_are_told_apart(tokenizer):
    trainer = RewardTrainer(model(d_model=32, d_ff=64), tokenizer)
    before = trainer.evaluate(rows(80, 2))["accuracy"]
    result = trainer.fit(rows(300, 1), rows(80, 2), learning_rate=3e-3, batch_size=16, num_epochs=3)
    assert before < 0.8
    assert result.evaluations[-1]["eval"]["accuracy"] > 0.9
    found = trainer.evaluate(rows(80, 3))
    assert found["accuracy"] > 0.9 > found["longer_accuracy"]
    assert found["margin"] > 1


def test_figures_of_pairs_are_what_they_say():
    chosen, rejected = np.array([2.0, 0.0, 1.0, -1.0]), np.array([0.0, 1.0, 1.0, -3.0])
    lengths = np.array([5, 2, 3, 9]), np.array([4, 2, 6, 1])
    found = pair_metrics(chosen, rejected, *lengths, bins=5)
    assert found["accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert found["longer_accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert found["margin"] == 0.75
    both = np.concatenate([chosen, rejected]), np.concatenate(lengths)
    assert found["length_correlation"] == pytest.approx(np.corrcoef(*both)[0, 1])
    sure, unsure = 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-1))
    assert [row["count"] for row in found["calibration"]] == [1, 1, 2]
    assert [row["accuracy"] for row in found["calibration"]] == [0.5, 0.0, 1.0]
    assert [row["confidence"] for row in found["calibration"]] == pytest.approx([0.5, unsure, sure])
    error = (abs(0.5 - 0.5) + unsure + 2 * (1 - sure)) / 4
    assert found["calibration_error"] == pytest.approx(error)
    assert "length_correlation" not in pair_metrics(chosen * 0, rejected * 0, *lengths)
    assert "one pair or more" in message_of(DataError, pair_metrics, [], [], [], [])


def test_the_calibration_is_drawn(tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    trainer = trainer_of(tokenizer)
    trainer.plot_calibration(ROWS, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "tiff" in message_of(InputError, trainer.plot_calibration, ROWS, tmp_path / "c.abc")


def test_the_report_counts_pairs(tokenizer):
    data = read_preferences([*ROWS, ROWS[0] | {"rejected": ROWS[0]["chosen"]}])
    training, validation = split(data, 0.25, 0)
    report = trainer_of(tokenizer).report(training, validation, Options(max_length=11))
    assert report.ties.places == ["row 25"]
    assert report.rows + report.validation_rows + report.too_long.count == 24
    assert report.too_long.count > 0


# -- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"lora": LoraConfig(rank=2), "dropout": True}], ids=str)
def test_four_steps_are_two_and_two_more(tokenizer, tmp_path, options):
    options |= {"batch_size": 6, "num_epochs": 2, "max_steps": 4, "learning_rate": 1e-3}
    whole = trainer_of(tokenizer, dropout=0.1)
    whole.fit(ROWS, **options)
    stopped = trainer_of(tokenizer, dropout=0.1)
    steps = iter((False, True))
    result = stopped.fit(ROWS, output_dir=tmp_path, stop=lambda: next(steps), **options)
    assert (result.steps, result.stopped_reason) == (2, "interrupted")
    assert stopped.reward_model.bias.tolist() == [0.0]
    resumed = trainer_of(tokenizer, dropout=0.1)
    result = resumed.fit(ROWS, output_dir=tmp_path, resume=True, **options)
    assert (result.steps, len(result.history)) == (4, 2)
    equal(weights(resumed), weights(whole))
    np.testing.assert_array_equal(resumed.reward_model.bias, whole.reward_model.bias)


def test_backends_agree_over_twenty_steps(tokenizer):
    found = {}
    for backend in BACKENDS:
        with use_backend(backend):
            trainer = trainer_of(tokenizer)
            result = trainer.fit(ROWS, max_steps=20, num_epochs=5, batch_size=6)
            found[backend] = [record["loss"] for record in result.history]
    assert len(set(found["numpy"])) == 20
    for losses in found.values():
        np.testing.assert_allclose(losses, found["numpy"], rtol=1e-3)


@pytest.mark.skipif("cython" not in BACKENDS, reason="the compiled kernels are not there")
def test_a_reward_model_has_the_same_bytes_at_any_number_of_threads(tokenizer):
    found = []
    for threads in (1, 2, 5):
        with use_backend("cython"), thread_limit(threads):
            trainer = trainer_of(tokenizer)
            trainer.fit(ROWS, max_steps=3, learning_rate=1e-2)
            found.append(weights(trainer))
    equal(found[0], found[1])
    equal(found[0], found[2])


# -- files -----------------------------------------------------------------------------------------

LLAMA = {"norm": "rms_norm", "activation": "swiglu", "positions": "rope", "tied": False,
         "attention_bias": False, "attention_output_bias": False, "mlp_bias": False,
         "num_kv_heads": 1}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, LLAMA, {"window": 5}], ids=["gpt2", "llama", "own"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["whole", "lora"])
def test_what_was_saved_scores_the_same(tokenizer, tmp_path, changes, lora):
    trainer = trainer_of(tokenizer, **changes)
    trainer.fit(ROWS, max_steps=2, learning_rate=1e-2, lora=lora, normalise="mean_and_deviation")
    texts = [row["prompt"] for row in ROWS], [row["chosen"] for row in ROWS]
    scores, before = trainer.score(*texts), weights(trainer)
    trainer.save(tmp_path)
    equal(weights(trainer), before)
    again = RewardTrainer.load(tmp_path)
    tolerance = 0 if lora is None else 1e-5
    np.testing.assert_allclose(again.score(*texts), scores, rtol=0, atol=tolerance)
    assert again.evaluate(ROWS)["accuracy"] == trainer.evaluate(ROWS)["accuracy"]
    again.save(tmp_path / "twice")
    twice = RewardTrainer.load(tmp_path / "twice")
    np.testing.assert_array_equal(twice.score(*texts), again.score(*texts))


def test_what_was_saved_reads_conversations(tokenizer, tmp_path, monkeypatch):
    """As the run that saved it did: `loopos evaluate` asks it so."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    monkeypatch.setattr(tokenizer, "chat_template", template)
    trainer_of(tokenizer).save(tmp_path)
    turn = [{"role": "user", "content": "old"}]
    pairs = [{"prompt": turn, "chosen": [{"role": "assistant", "content": "new"}],
              "rejected": [{"role": "assistant", "content": "odd"}]}]  # fmt: skip
    assert RewardTrainer.load(tmp_path).evaluate(pairs)["count"] == 1


@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt2", "llama"])
def test_transformers_gives_the_same_scores(tokenizer, tmp_path, changes):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    # Ids that the tokenizer does not use: one of them can be the pad token.
    trainer = trainer_of(tokenizer, **(changes | {"vocab_size": tokenizer.vocab_size + 2}))
    trainer.fit(ROWS, max_steps=2, learning_rate=1e-2)
    trainer.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert (config["num_labels"], config["pad_token_id"]) == (1, tokenizer.vocab_size)
    loader = transformers.AutoModelForSequenceClassification
    theirs, info = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.num_labels == 1
    prompts, responses = [row["prompt"] for row in ROWS], [row["chosen"] for row in ROWS]
    expected = trainer.score(prompts, responses)
    ids = [[*tokenizer.encode(p), *tokenizer.encode(r), tokenizer.eos_id]
           for p, r in zip(prompts, responses, strict=True)]  # fmt: skip
    longest, pad = max(map(len, ids)), tokenizer.vocab_size
    padded = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])
    with torch.no_grad():
        found = theirs.eval()(padded, attention_mask=(padded != pad).long()).logits
    assert found.shape == (len(ROWS), 1)
    # The heads there have no bias: what normalisation adds is in a file of its own.
    bias = json.loads((tmp_path / "reward_model.json").read_text())["bias"]
    assert bias != 0
    np.testing.assert_allclose(found[:, 0].numpy() + bias, expected, atol=1e-5)


def test_the_pad_token_is_never_the_end_of_text(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    trainer = trainer_of(tokenizer, vocab_size=tokenizer.vocab_size)
    trainer.save(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.pad_token_id is None
    ids = [*tokenizer.encode(ROWS[0]["prompt"]), *tokenizer.encode(ROWS[0]["chosen"])]
    with torch.no_grad():
        found = theirs(torch.tensor([[*ids, tokenizer.eos_id]])).logits.item()
    expected = trainer.score([ROWS[0]["prompt"]], [ROWS[0]["chosen"]])[0]
    assert found == pytest.approx(expected, abs=1e-5)


def test_reward_models_of_transformers_are_read(tokenizer, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=VOCAB,
                                     n_positions=64, num_labels=1)  # fmt: skip
    theirs = transformers.GPT2ForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ids = [5, 7, 11, 13]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.item()
    found = load_reward_model(tmp_path).scores(Batch.from_sequences([[3], ids])).data
    assert found[1] == pytest.approx(expected, abs=1e-6)


def test_files_that_hold_no_reward_model_are_refused(tokenizer, tmp_path):
    model().save(tmp_path / "lm", tokenizer)
    assert message_of(ModelFormatError, load_reward_model, tmp_path / "lm") == (
        f"{tmp_path / 'lm'}: tensor 'score.weight' is missing, so no reward model"
    )
    trainer_of(tokenizer).save(tmp_path / "rm")
    (tmp_path / "rm" / "reward_model.json").write_text('{"bias": "1"}')
    assert message_of(ModelFormatError, load_reward_model, tmp_path / "rm") == (
        f"{tmp_path / 'rm' / 'reward_model.json'}: expected an object with one finite number 'bias'"
    )


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"centering_coefficient": -1},
         "training.centering_coefficient: expected a number that is not negative, found -1"),
        ({"max_length": 1}, "training.max_length: expected at least 2, found 1"),
        ({"max_length": 65}, "training.max_length: 65 is more than the model's max_seq_len 64"),
        ({"overflow": "cut"}, "training.overflow: expected \"drop\" or \"error\", found 'cut'"),
        ({"normalise": "std"},
         "training.normalise: expected \"mean\" or \"mean_and_deviation\", found 'std'"),
        ({"dropout": 0.1}, "training.dropout: expected true or false, found 0.1"),
        ({"centring": 1}, "unknown option 'centring'"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_named(tokenizer, options, message):
    assert message_of(ConfigError, trainer_of(tokenizer).fit, ROWS, **options) == message


def test_models_and_texts_that_do_not_fit_are_refused(tokenizer):
    assert message_of(ConfigError, trainer_of, tokenizer, causal=False) == (
        "a reward model needs a causal model, whose last token sees all"
    )
    assert "more than the model's vocab_size 100" in message_of(
        ConfigError, trainer_of, tokenizer, vocab_size=100
    )
    trainer = trainer_of(tokenizer)
    assert message_of(DataError, trainer.score, ["a"], []) == "0 responses for 1 prompts"
    assert message_of(DataError, trainer.score, "a", ["b"]) == (
        "prompts: expected a list of texts, found one text"
    )
    assert message_of(DataError, trainer.score, ["a"], [" red" * 90]).startswith(
        "sample 0: prompt and response have "
    )
    assert trainer.score([], []).shape == (0,)


# -- the command line ------------------------------------------------------------------------------


@pytest.fixture
def configure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps(row) + "\n" for row in [*ROWS, ROWS[0] | {"rejected": ROWS[0]["chosen"]}]]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32, "vocab_size": 300}
    config = {
        "model": sizes | {"max_seq_len": 64},
        "computation": {"method": "reward_model"},
        "training": {"learning_rate": 0.003, "batch_size": 4},
        "data": {"preference_data": "p.jsonl", "output_dir": "out"},
    }
    (tmp_path / "run.json").write_text(json.dumps(config, indent=1))
    return lambda *overrides: load_config("run.json", overrides)


def test_a_configuration_trains_a_reward_model(configure, tmp_path):
    summary = run(configure())
    assert summary.result.stopped_reason == "finished"
    assert {"loss", "accuracy", "length_correlation", "calibration"} <= set(summary.evaluation)
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report["ties"] == {"count": 1, "places": ["p.jsonl:25"]}
    reward = RewardTrainer.load(tmp_path / "out" / "model")
    assert np.isfinite(reward.score(["Say red:"], [" red please"])[0])
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {"rewards/chosen", "rewards/accuracy"} <= set(records[0])


def test_a_run_that_was_stopped_continues_to_the_same_bytes(configure, tmp_path):
    run(configure("data.output_dir=whole"))
    steps = iter((False, True))
    with pytest.raises(Interrupted):
        run(configure(), stop=lambda: next(steps))
    run(configure(), resume=True)
    one, other = (tmp_path / name / "model" for name in ("whole", "out"))
    for file in ("model.safetensors", "reward_model.json", "config.json"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


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


def test_a_run_is_evaluated_on_other_pairs(configure, tmp_path):
    run(configure())
    command = [sys.executable, "-m", "loopos", "evaluate", "out", "p.jsonl", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures == RewardTrainer.load(tmp_path / "out" / "model").evaluate("p.jsonl")


def test_rows_and_classes_that_do_not_fit_name_their_place(configure, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.num_classes: a language model has no classes"):
        configure("model.num_classes=2")
    with (tmp_path / "p.jsonl").open("a") as file:
        file.write('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:26: no field 'rejected'"):
        run(configure())
