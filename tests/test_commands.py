"""Commands beside run and validate: on classes, numbers, sets of labels, adapters, tokenizers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import loopos as library
from loopos.config import load_config
from loopos.data.tokenizer import load_tokenizer, train_bpe
from loopos.errors import ConfigError
from loopos.methods import pretraining
from loopos.methods.fine_tuning import FineTuner
from loopos.models import load_model
from loopos.models.lora import add_lora
from loopos.runner import run

LOOPOS = str(Path(sys.executable).with_name("loopos"))
SIZES = {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32, "vocab_size": 300}


def loopos(*arguments, cwd, code=0):
    done = subprocess.run(
        [LOOPOS, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def trained(directory, rows, **sections):
    """Write rows and a configuration, and run it."""
    (directory / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": SIZES,
        "computation": {"method": "fine_tuning"},
        "training": {"learning_rate": 0.01, "batch_size": 8, "num_epochs": 3},
        "data": {"training_data": str(directory / "t.jsonl"), "output_dir": str(directory / "out")},
    }
    for name, content in sections.items():
        values[name] = values[name] | content
    (directory / "run.json").write_text(json.dumps(values))
    run(load_config(directory / "run.json"))
    return directory


WORDS = ["warm", "fine", "dull", "cold"]
CLASSES = [{"text": f"{w} film {i}", "label": ["good", "bad"][w in WORDS[2:]]}
           for i in range(6) for w in WORDS]  # fmt: skip


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("classes"), CLASSES)


def test_evaluate_gives_the_figures_of_the_library(classifier):
    out = loopos("evaluate", "out", "t.jsonl", "--json", cwd=classifier)
    expected = FineTuner.load(classifier / "out" / "model").evaluate(classifier / "t.jsonl")
    assert json.loads(out) == expected
    lines = loopos("evaluate", "out", "t.jsonl", "--output", "f.json", cwd=classifier).splitlines()
    assert f"{'accuracy':<20} {expected['accuracy']:.4f}" in lines
    assert json.loads((classifier / "f.json").read_text()) == expected
    wrong = other(classifier, [{"text": "a", "label": "goood"}])
    assert "o.jsonl:1: unknown 'label' 'goood'; did you mean 'good'" in loopos(
        "evaluate", "out", wrong, cwd=classifier, code=2
    )


def other(directory, rows):
    (directory / "o.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "o.jsonl"


def test_a_regression_runs_predicts_and_evaluates(tmp_path):
    rows = [{"text": f"{w} film {i}", "label": float(WORDS.index(w))}
            for i in range(6) for w in WORDS]  # fmt: skip
    trained(tmp_path, rows, model=SIZES | {"num_classes": 1})
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(report) == {"loss", "mse", "mae", "r2", "count"}
    (line,) = loopos("predict", "out", "a warm film", "--json", cwd=tmp_path).splitlines()
    found = json.loads(line)
    assert set(found) == {"text", "value"}
    assert loopos("predict", "out", "a warm film", cwd=tmp_path).split()[0] == (
        f"{found['value']:.4g}"
    )
    figures = json.loads(loopos("evaluate", "out", "t.jsonl", "--json", cwd=tmp_path))
    assert figures["loss"] == pytest.approx(figures["mse"], rel=1e-6)
    assert "o.jsonl:1: expected 'label' to be a finite number, found 'high'" in loopos(
        "evaluate", "out", other(tmp_path, [{"text": "a", "label": "high"}]), cwd=tmp_path, code=2
    )


def test_several_labels_run_predict_and_evaluate(tmp_path):
    rows = [{"text": f"{w} {v}", "label": sorted({w, v})} for w in WORDS for v in WORDS] * 2
    trained(tmp_path, rows, training={"learning_rate": 0.01, "batch_size": 4, "num_epochs": 12})
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert figures["f1_micro"] > 0.8
    (line,) = loopos("predict", "out", "warm cold", "--json", cwd=tmp_path).splitlines()
    found = json.loads(line)
    assert found["labels"] == ["cold", "warm"]
    assert set(found["probabilities"]) == set(WORDS)
    shown = loopos("predict", "out", "warm cold", cwd=tmp_path)
    assert shown.startswith(f"cold {found['probabilities']['cold']:.0%}, warm ")
    assert json.loads(loopos("evaluate", "out", "t.jsonl", "--json", cwd=tmp_path))["count"] == 32


def test_a_table_of_several_labels_is_asked_for(tmp_path):
    lines = [f'"{w} {v}","{"|".join(sorted({w, v}))}"' for w in WORDS for v in WORDS] * 2
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    data = {"training_data": str(tmp_path / "t.csv"), "output_dir": str(tmp_path / "out")}
    trained(
        tmp_path, CLASSES, data=data,
        training={"batch_size": 4, "num_epochs": 2, "problem": "multi_label"},
    )  # fmt: skip
    labels = json.loads((tmp_path / "out" / "model" / "classifier.json").read_text())
    assert (labels["problem"], labels["labels"]) == ("multi_label", sorted(WORDS))
    with pytest.raises(ConfigError, match=r"training\.problem: .*found \"multi\""):
        load_config(tmp_path / "run.json", ["training.problem=multi"])


def test_adapters_are_merged_into_a_whole_model(tmp_path):
    tokenizer = train_bpe([row["text"] for row in CLASSES], 300)
    library.Transformer(library.TransformerConfig(**SIZES), seed=1).save(
        tmp_path / "base", tokenizer
    )
    trained(
        tmp_path, CLASSES, model={"num_classes": 2},
        training={"learning_rate": 0.01, "batch_size": 8, "num_epochs": 2, "lora": {"rank": 2}},
        data={"training_data": str(tmp_path / "t.jsonl"), "output_dir": str(tmp_path / "out"),
              "pretrained_weights": str(tmp_path / "base")},
    )  # fmt: skip
    assert loopos("merge", "out", "whole", cwd=tmp_path) == "saved in whole\n"
    assert not load_model(tmp_path / "whole").adapters
    texts = [row["text"] for row in CLASSES]
    apart, whole = (FineTuner.load(tmp_path / d) for d in ("out/model", "whole"))
    np.testing.assert_allclose(
        whole.predict(texts).probabilities, apart.predict(texts).probabilities, atol=1e-6
    )
    assert "whole: exists already" in loopos("merge", "out", "whole", cwd=tmp_path, code=2)
    assert "no adapters to merge" in loopos("merge", "whole", "again", cwd=tmp_path, code=2)
    assert not (tmp_path / "again").exists()
    assert "nothing: no such directory" in loopos("merge", "nothing", "x", cwd=tmp_path, code=2)


def test_what_is_merged_is_asked_problems_as_before(tmp_path):
    tokenizer = train_bpe([row["text"] for row in CLASSES], 300)
    sizes = library.TransformerConfig(**SIZES | {"vocab_size": tokenizer.vocab_size})
    library.Transformer(sizes, seed=1).save(tmp_path / "base")
    add_lora(load_model(tmp_path / "base")).save(tmp_path / "solver", tokenizer)
    (tmp_path / "solver" / "reasoning.json").write_text('{"chat": false}')
    loopos("merge", "solver", "whole", cwd=tmp_path)
    assert json.loads((tmp_path / "whole" / "reasoning.json").read_text()) == {"chat": False}


def test_a_tokenizer_is_trained_and_shown(tmp_path):
    (tmp_path / "a.txt").write_text("warm film, cold film\f電影 😀", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "warm evening"}) + "\n")
    (tmp_path / "c.jsonl").write_text(json.dumps({"body": "cold evening"}) + "\n")
    out = loopos("tokenizer", "train", "a.txt", "--vocab-size", "280", "--output", "tok",
                 cwd=tmp_path).splitlines()  # fmt: skip
    found = load_tokenizer(tmp_path / "tok")
    assert out[0].startswith(f"{found.vocab_size} tokens from 2 texts, ")
    assert out[-1] == "saved in tok"
    assert found.decode(found.encode("電影 😀")) == "電影 😀"
    shown = loopos("tokenizer", "show", "tok", "warm film", cwd=tmp_path).splitlines()
    assert [int(line.split()[0]) for line in shown[:-1]] == found.encode("warm film")
    assert shown[-1] == f"{len(shown) - 1} tokens"
    loopos("tokenizer", "train", "b.jsonl", "c.jsonl", "--text-field", "body", "--vocab-size",
           "270", "--output", "both", cwd=tmp_path)  # fmt: skip
    assert "already holds a tokenizer" in loopos(
        "tokenizer", "train", "a.txt", "--output", "tok", cwd=tmp_path, code=2
    )
    assert "257 tokens at least, found vocab_size 9" in loopos(
        "tokenizer", "train", "a.txt", "--output", "x", "--vocab-size", "9", cwd=tmp_path, code=2
    )


def test_a_language_model_is_evaluated_by_perplexity(tmp_path):
    tokenizer = train_bpe(["warm film"], 300)
    model = library.Transformer(library.TransformerConfig(**SIZES), seed=1)
    model.save(tmp_path / "lm", tokenizer)
    (tmp_path / "t.txt").write_text("a warm film, a cold film")
    figures = json.loads(loopos("evaluate", "lm", "t.txt", "--json", cwd=tmp_path))
    expected = library.Pretrainer(model, tokenizer).evaluate(tmp_path / "t.txt")
    assert figures == expected
    assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]))


def test_a_run_of_pretraining_is_evaluated_in_pieces_of_its_own_length(tmp_path):
    (tmp_path / "words.txt").write_text("a warm film, a cold film, a warm evening")
    trained(
        tmp_path, CLASSES, computation={"mode": "pretraining", "method": "autoregressive"},
        training={"sequence_length": 4, "batch_size": 8, "max_steps": 2},
    )  # fmt: skip
    figures = json.loads(loopos("evaluate", "out", "words.txt", "--json", cwd=tmp_path))
    inner = tmp_path / "out" / "model"
    trainer = library.Pretrainer(load_model(inner), load_tokenizer(inner))
    pieces = pretraining.Options(sequence_length=4)
    assert figures == trainer.evaluate(tmp_path / "words.txt", pieces)
    assert figures != trainer.evaluate(tmp_path / "words.txt")


def test_a_language_model_with_adapters_is_evaluated(tmp_path):
    tokenizer = train_bpe(["warm film"], 300)
    config = library.TransformerConfig(**SIZES)
    library.Transformer(config, seed=1).save(tmp_path / "base", tokenizer)
    add_lora(load_model(tmp_path / "base")).save(tmp_path / "adapters", tokenizer)
    (tmp_path / "t.txt").write_text("a warm film, a cold film")
    figures = [json.loads(loopos("evaluate", name, "t.txt", "--json", cwd=tmp_path))
               for name in ("base", "adapters")]  # fmt: skip
    assert figures[0] == figures[1]
    assert "adapters: is no classifier (classifier.json is missing)" in loopos(
        "predict", "adapters", "warm", cwd=tmp_path, code=2
    )


def test_a_policy_is_evaluated_by_a_judge_that_lies_beside_its_configuration(tmp_path):
    pairs = [{"prompt": f"the film {i} is", "chosen": " warm", "rejected": " cold"}
             for i in range(12)]  # fmt: skip
    conf = tmp_path / "conf"
    conf.mkdir()
    shared = {"learning_rate": 0.01, "batch_size": 4, "max_steps": 1, "num_epochs": 1}
    data = {"training_data": None, "preference_data": "t.jsonl", "validation_fraction": 0.25}
    trained(conf, pairs, computation={"method": "reward_model"}, training=shared,
            data=data | {"output_dir": str(tmp_path / "judged")})  # fmt: skip
    (tmp_path / "judged" / "model").rename(conf / "judge")
    trained(
        conf, pairs, computation={"method": "rlhf"},
        training=shared | {"phases": ["ppo"], "max_new_tokens": 4},
        data=data | {"reward_model": "judge", "tokenizer": "judge",
                     "output_dir": str(tmp_path / "ppo")},
    )  # fmt: skip
    written = json.loads((tmp_path / "ppo" / "config.json").read_text())["data"]
    assert (written["reward_model"], written["preference_data"]) == (
        str(conf / "judge"), str(conf / "t.jsonl")
    )  # fmt: skip
    figures = [json.loads(loopos("evaluate", tmp_path / "ppo", conf / "t.jsonl", "--json", cwd=d))
               for d in (tmp_path, conf, Path("/"))]  # fmt: skip
    assert figures[0]["prompts"] == 12
    assert figures[0] == figures[1] == figures[2]


@pytest.mark.parametrize("kind", ["messages", "prompt and completion"])
def test_a_supervised_run_is_evaluated_on_its_own_kind_of_rows(tmp_path, kind):
    rows = [{"prompt": f"{word}?", "completion": f" {word}!"} for word in WORDS]
    train_bpe(["warm fine"], 270).save(tmp_path / "words")
    if kind == "messages":
        rows = [{"messages": [{"role": "user", "content": row["prompt"]},
                              {"role": "assistant", "content": row["completion"]}]}
                for row in rows]  # fmt: skip
        template = "{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}"
        (tmp_path / "words" / "chat_template.jinja").write_text(template)
    trained(
        tmp_path, rows, computation={"method": "sft"}, training={"train_on": "all"},
        data={"tokenizer": str(tmp_path / "words"), "validation_data": str(tmp_path / "t.jsonl")},
    )  # fmt: skip
    expected = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    figures = json.loads(loopos("evaluate", "out", "t.jsonl", "--json", cwd=tmp_path))
    assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert figures.keys() == {"loss", "perplexity"}
    (tmp_path / "out" / "model").rename(tmp_path / "moved")
    assert "this run has not finished" in loopos("evaluate", "out", "t.jsonl", cwd=tmp_path, code=2)


def test_info_tells_what_there_is(tmp_path):
    facts = json.loads(loopos("info", "--json", cwd=tmp_path))
    assert {"gpt2", "llama", "qwen2", "qwen3", "mistral", "bert"} <= set(facts["families"])
    assert "posttraining/fine_tuning" in facts["methods"]
    assert facts["memory_bytes"] > 2**28
    assert set(facts["extras"]) == {"parquet", "gguf", "hub", "tensorboard", "plot"}
    lines = loopos("info", cwd=tmp_path).splitlines()
    assert any(line.startswith("memory ") and line.endswith(" GiB free") for line in lines)
