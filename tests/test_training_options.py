"""Options of every method that reach the network or the optimizer: each changes what it should."""

import json
import sys

import numpy as np
import pytest

from loopos.data.readers import read_labelled
from loopos.data.tokenizer import train_bpe
from loopos.errors import ConfigError
from loopos.methods.common import rate_factors
from loopos.methods.fine_tuning import FineTuner, Options
from loopos.methods.pretraining import Options as PretrainingOptions
from loopos.methods.pretraining import Pretrainer
from loopos.models import Transformer, TransformerConfig, load_model
from loopos.models.lora import LoraConfig, merge_lora

ROWS = [
    {"text": f"{word} {thing}", "label": label}
    for label, words in (("praise", ["wonderful", "lovely"]), ("blame", ["awful", "boring"]))
    for word in words
    for thing in ("film", "story", "evening", "book")
]
FAST = Options(learning_rate=3e-3, batch_size=4, num_epochs=2)
LORA = LoraConfig(rank=2, alpha=4.0, target_modules=("q", "k", "v"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([row["text"] for row in ROWS], 290)


def body(seed=0, **changes):
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 3, "d_ff": 32, "vocab_size": 290}
    return Transformer(TransformerConfig(**sizes, max_seq_len=48, **changes), seed=seed)


def weights(tuner):
    return {name: p.data.copy() for name, p in tuner.classifier.parameters().items()}


def fitted(tokenizer, options=FAST, model=None, **kwargs):
    tuner = FineTuner(body() if model is None else model, tokenizer)
    return tuner, tuner.fit(ROWS, options=options, **kwargs)


# -- gradient checkpointing ------------------------------------------------------------------------


def test_gradient_checkpointing_changes_no_byte_of_a_run(tokenizer):
    runs = []
    for recompute in (False, True):
        tuner, result = fitted(
            tokenizer, model=body(dropout=0.2), gradient_checkpointing=recompute, max_grad_norm=0.5
        )
        assert tuner.body.gradient_checkpointing is recompute
        runs.append((weights(tuner), [(r["loss"], r["grad_norm"]) for r in result.history]))
    assert runs[0][1] == runs[1][1]
    assert all(np.array_equal(value, runs[1][0][name]) for name, value in runs[0][0].items())


# -- layer-wise rates ------------------------------------------------------------------------------


def test_factors_fall_from_the_head_to_the_embeddings():
    names = ["embeddings.tokens", "layers.0.mlp.up.weight", "layers.2.mlp_norm.bias",
             "final_norm.weight", "classifier.weight", "layers.10.attention.q.lora_a"]  # fmt: skip
    assert rate_factors(names, 11, 0.5) == {
        "embeddings.tokens": 0.5**12, "layers.0.mlp.up.weight": 0.5**11,
        "layers.2.mlp_norm.bias": 0.5**9, "layers.10.attention.q.lora_a": 0.5,
    }  # fmt: skip


def test_layerwise_decay_scales_the_step_of_each_layer(tokenizer):
    """One step of SGD: what moves is the gradient times the rate of the layer."""
    moves = []
    for decay in (1.0, 0.5):
        tuner = FineTuner(body(), tokenizer, num_classes=2)
        before = weights(tuner)
        tuner.fit(
            ROWS, options=FAST, max_steps=1, optimizer="sgd", momentum=0.0, weight_decay=0.0,
            learning_rate=0.1, layerwise_lr_decay=decay,
        )  # fmt: skip
        moves.append({name: value - before[name] for name, value in weights(tuner).items()})
    for name, factor in (
        ("classifier.weight", 1), ("layers.2.mlp.up.weight", 0.5),
        ("layers.0.mlp.up.weight", 0.125), ("embeddings.tokens", 0.0625),
    ):  # fmt: skip
        np.testing.assert_allclose(moves[1][name], factor * moves[0][name], rtol=1e-3, atol=1e-8)
        assert np.abs(moves[0][name]).max() > 1e-6


# -- LoRA ------------------------------------------------------------------------------------------


def test_lora_trains_adapters_and_the_head_and_leaves_the_base(tokenizer, tmp_path):
    base = body()
    kept = {name: p.data.copy() for name, p in base.parameters().items()}
    tuner, result = fitted(tokenizer, model=base, lora=LORA, output_dir=tmp_path / "run")
    trained = {n for n, p in tuner.classifier.parameters().items() if p.requires_grad}
    adapters = {f"layers.{i}.attention.{q}.lora_b" for i in range(3) for q in "qkv"}
    adapters |= {f"layers.{i}.attention.q.lora_a" for i in range(3)}  # one A: c_attn is one layer
    assert trained == adapters | {"classifier.weight", "classifier.bias"}
    assert all(np.array_equal(base.parameters()[n].data, a) for n, a in kept.items())
    assert all(tuner.body.parameters()[n].data is p.data for n, p in base.parameters().items())
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert any(np.abs(tuner.body.parameters()[n].data).max() > 0 for n in adapters if "_b" in n)


def test_lora_is_saved_without_its_base_and_loads_on_it(tokenizer, tmp_path):
    body().save(tmp_path / "base", tokenizer)
    tuner = FineTuner(tmp_path / "base")
    tuner.fit(ROWS, options=FAST, lora=LORA)
    tuner.save(tmp_path / "tuned")
    names = {path.name for path in (tmp_path / "tuned").iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "classifier.json",
        "classifier.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    again = FineTuner.load(tmp_path / "tuned")
    texts = [row["text"] for row in ROWS]
    expected = tuner.predict(texts).probabilities
    assert np.array_equal(again.predict(texts).probabilities, expected)
    again.fit(ROWS, options=FAST, lora=LORA, num_epochs=1)  # trains on, the same adapters
    with pytest.raises(ConfigError, match=r"training\.lora\.rank: 3, but the model has .* 2"):
        again.fit(ROWS, options=FAST, lora=LoraConfig(rank=3, alpha=4.0))
    with pytest.raises(ConfigError, match=r"target_modules: the model has adapters of other lay"):
        again.fit(ROWS, options=FAST, lora=LoraConfig(rank=2, alpha=4.0))
    merge_lora(again.body)
    with pytest.raises(ConfigError, match="are merged; unmerge them"):
        again.fit(ROWS, options=FAST)
    again.save(tmp_path / "merged")
    assert np.allclose(
        FineTuner.load(tmp_path / "merged").predict(texts).probabilities,
        again.predict(texts).probabilities,
        atol=1e-6,
    )


def test_a_run_with_lora_resumes_to_the_same_bytes(tokenizer, tmp_path):
    body(dropout=0.1).save(tmp_path / "base", tokenizer)
    config = LoraConfig(rank=2, dropout=0.2)
    whole = FineTuner(tmp_path / "base")
    whole.fit(ROWS, options=FAST, lora=config, output_dir=tmp_path / "whole")
    stops = iter([False, False, True])
    first = FineTuner(tmp_path / "base")
    first.fit(ROWS, options=FAST, lora=config, output_dir=tmp_path / "run",
              stop=lambda: next(stops))  # fmt: skip
    second = FineTuner(tmp_path / "base")
    second.fit(ROWS, options=FAST, lora=config, output_dir=tmp_path / "run", resume=True)
    for name, value in weights(whole).items():
        assert np.array_equal(value, weights(second)[name]), name


@pytest.mark.parametrize("train", ["head", 1])
def test_lora_and_a_choice_of_layers_exclude_each_other(tokenizer, train):
    with pytest.raises(
        ConfigError, match=r"training\.train: .* a model with adapters trains these"
    ):
        fitted(tokenizer, lora=LORA, train=train)


def test_pretraining_takes_lora_too(tokenizer, tmp_path):
    model = body()
    kept = {name: p.data.copy() for name, p in model.parameters().items()}
    trainer = Pretrainer(model, tokenizer)
    (tmp_path / "t.txt").write_text("\f".join(row["text"] for row in ROWS))
    options = PretrainingOptions(learning_rate=3e-2, num_epochs=8, batch_size=4, lora=LORA)
    result = trainer.fit(tmp_path / "t.txt", options=options)
    assert result.history[-1]["loss"] < result.history[0]["loss"] - 0.05
    assert all(np.array_equal(model.parameters()[n].data, a) for n, a in kept.items())
    assert {n for n, p in trainer.model.parameters().items() if p.requires_grad} == {
        n for n in trainer.model.parameters() if "lora_" in n
    }


# -- TensorBoard -----------------------------------------------------------------------------------


def events(directory):
    """Return what TensorBoard's own reader finds, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory), purge_orphaned_data=True)
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensorboard_reads_every_step_and_evaluation_once(tokenizer, tmp_path):
    pytest.importorskip("tensorboard")
    stops = iter([False, True])
    arguments = {"options": FAST, "tensorboard": True, "output_dir": tmp_path, "save_steps": 1}
    data, held_out = read_labelled(ROWS), read_labelled(ROWS[2:14])
    FineTuner(body(), tokenizer).fit(data, held_out, **arguments, stop=lambda: next(stops))
    FineTuner(body(), tokenizer).fit(data, held_out, **arguments, resume=True)
    found = events(tmp_path / "tensorboard")
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = [r for r in lines if "eval" not in r], [r for r in lines if "eval" in r]
    assert len(steps) == 8
    for name in ("loss", "learning_rate", "grad_norm", "tokens"):
        expected = [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in steps]
        assert found[f"train/{name}"] == expected
    expected = [(r["step"], pytest.approx(r["eval"]["accuracy"])) for r in evaluations]
    assert found["eval/accuracy"] == expected
    assert "eval/confusion_matrix" not in found


def test_tensorboard_needs_the_package_and_a_directory(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"training\.tensorboard: needs an output directory"):
        fitted(tokenizer, tensorboard=True)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(ConfigError, match=r"pip install 'loopos\[tensorboard\]'"):
        fitted(tokenizer, tensorboard=True, output_dir=tmp_path)


# -- configurations --------------------------------------------------------------------------------


def test_a_configuration_asks_for_lora(tmp_path, tokenizer):
    from loopos.config import load_config
    from loopos.runner import run

    body().save(tmp_path / "base", tokenizer)
    data = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "train.jsonl").write_text(data)
    values = {
        "computation": {"method": "fine_tuning"},
        "training": {"learning_rate": 3e-3, "batch_size": 4, "num_epochs": 1,
                     "lora": {"rank": 2, "target_modules": ["c_attn"]}},
        "data": {"pretrained_weights": "base", "training_data": "train.jsonl",
                 "output_dir": str(tmp_path / "run")},
    }  # fmt: skip
    path = tmp_path / "run.json"
    path.write_text(json.dumps(values, indent=1))
    config = load_config(path, ["training.lora.alpha=3"])
    assert config.training.lora == LoraConfig(rank=2, alpha=3.0, target_modules=("c_attn",))
    assert config.as_dict()["training"]["lora"]["target_modules"] == ["c_attn"]
    run(config)
    saved = load_model(tmp_path / "run" / "model")
    assert {name.rpartition(".")[2] for name in saved.adapters} == {"q", "k", "v"}
    assert saved.lora.alpha == 3.0

    def refused(*overrides):
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides)
        return str(caught.value)

    assert refused("training.lora.rnak=4") == (
        "--set training.lora.rnak: unknown key; did you mean 'rank'?"
    )
    assert "training.lora.rank: expected a whole number of at least 1" in refused(
        "training.lora.rank=0"
    )
    assert "training.lora: expected a section of keys, found 8" in refused("training.lora=8")
    sizes = {"d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 8, "vocab_size": 300}
    path.write_text(json.dumps(values | {"data": {"training_data": "t.jsonl"}, "model": sizes}))
    assert "training.lora: adapters need data.pretrained_weights" in refused()


# -- all of it together ----------------------------------------------------------------------------

PROBLEMS = {
    "classification": lambda row: row["label"],
    "regression": lambda row: float(len(row["text"])),
    "multi_label": lambda row: [row["label"], row["text"].split()[1]],
}
TOGETHER = {
    "accumulated": {"gradient_accumulation_steps": 2, "length_bucketing": True,
                    "layerwise_lr_decay": 0.7, "scheduler": "cosine_with_restarts",
                    "scheduler_cycles": 2, "max_grad_norm": 0.5},
    "by tokens": {"batch_tokens": 12, "early_stopping_patience": 9, "eval_steps": 2,
                  "gradient_checkpointing": True, "num_workers": 2},
}  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("options", TOGETHER)
def test_runs_with_everything_resume_to_the_same_bytes(tokenizer, tmp_path, problem, options):
    rows = [{"text": row["text"], "label": PROBLEMS[problem](row)} for row in ROWS]
    asked = Options(
        learning_rate=3e-3, batch_size=3, num_epochs=3, lora=LoraConfig(rank=2, dropout=0.3),
        **TOGETHER[options],
    )  # fmt: skip

    def fit(name, **kwargs):
        tuner = FineTuner(
            body(dropout=0.2), tokenizer, num_classes=1 if problem == "regression" else None
        )
        result = tuner.fit(rows, rows[::2], asked, output_dir=tmp_path / name, **kwargs)
        return weights(tuner), result

    whole, result = fit("whole")
    calls = []
    _, part = fit("cut", stop=lambda: calls.append(1) or len(calls) == 5)
    assert (part.stopped_reason, part.steps) == ("interrupted", 5)
    resumed, _ = fit("cut", resume=True)
    assert all(np.array_equal(value, resumed[name]) for name, value in whole.items())
    timeless = [
        [
            {k: v for k, v in json.loads(line).items() if k not in ("time_s", "tokens_per_s")}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "cut")
    ]
    assert timeless[0] == timeless[1]
    assert result.steps > 5
