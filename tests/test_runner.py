"""From a configuration to a run: every option is honoured, and what does not fit is found first."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from loopos.backends import get_backend
from loopos.config import load_config
from loopos.data.tokenizer import load_tokenizer, train_bpe
from loopos.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    MissingFileError,
    ModelFormatError,
    OutputError,
)
from loopos.models.transformer import Transformer, TransformerConfig
from loopos.rehearsal import rehearse
from loopos.run_directory import clear_results
from loopos.runner import computing, plan, prepare, run
from loopos.training.checkpoint import _digest
from loopos.training.loop import Interrupted
from loopos.training.trackers import Callback

CONFIG = {
    "model": {"d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 32, "vocab_size": 300,
              "max_seq_len": 64},
    "computation": {"method": "fine_tuning"},
    "training": {"learning_rate": 0.003, "batch_size": 4, "num_epochs": 1},
    "data": {"training_data": "t.csv", "output_dir": "out"},
}  # fmt: skip


def rows(count, seed=0, classes=("neg", "pos")):
    rng = np.random.default_rng(seed)
    words = [["dull", "cold", "silly"], ["warm", "clever", "fine"], ["long", "short", "odd"]]
    return [
        (" ".join(rng.choice([*words[i % len(classes)], "film", "story"], 3 + i % 5)) + f" {i}",
         classes[i % len(classes)])
        for i in range(count)
    ]  # fmt: skip


def write_csv(path, data, header=("text", "label")):
    lines = [",".join(map(str, row)) for row in (header, *data)]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Stand in a directory with ``run.json`` and 24 rows; load it with overrides."""
    monkeypatch.chdir(tmp_path)
    Path("run.json").write_text(json.dumps(CONFIG, indent=1))
    write_csv("t.csv", rows(24))

    def configure(*overrides):
        return load_config("run.json", overrides)

    return configure


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Return a directory with a small model and its tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = train_bpe([text for text, _ in rows(24)], 280)
    config = TransformerConfig(16, 2, 2, 32, 300, max_seq_len=64)
    Transformer(config, seed=5).save(directory, tokenizer)
    return directory


def weights(directory):
    return (Path(directory) / "model" / "model.safetensors").read_bytes()


def refused(action, *arguments, kind=InputError, **keywords):
    with pytest.raises(kind) as caught:
        action(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- every option is honoured --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("norm", "rms_norm"), ("activation", "swiglu"), ("activation", "relu"), ("positions", "rope"),
     ("positions", "none"), ("dropout", 0.25), ("head_dim", 4), ("num_kv_heads", 1),
     ("max_seq_len", 32), ("num_layers", 1), ("d_ff", 8), ("vocab_size", 280), ("d_model", 32),
     ("num_heads", 4), ("causal", False), ("norm_placement", "post"), ("tied", False),
     ("window", 3), ("norm_eps", 1e-3), ("attention_bias", False), ("mlp_bias", False)],
)  # fmt: skip
def test_options_of_the_model_reach_the_model(configure, name, value):
    model = prepare(configure(f"model.{name}={json.dumps(value)}")).model
    assert getattr(model.config, name) == value
    plain = prepare(configure()).model
    shapes = [{n: p.shape for n, p in m.parameters().items()} for m in (model, plain)]
    without_weights = {"dropout", "causal", "window", "norm_eps", "num_heads"}
    same = name in without_weights or value == "relu"
    assert (shapes[0] == shapes[1]) == same


#: Options of training that change the result, with whatever they need beside them.
CHANGES = {
    "learning_rate": ["0.01"], "batch_size": ["3"], "batch_tokens": ["40"], "num_epochs": ["2"],
    "max_steps": ["2"], "optimizer": ["sgd"], "weight_decay": ["0.5"], "scheduler": ["cosine"],
    "warmup_steps": ["3"], "max_grad_norm": ["0.01"], "gradient_accumulation_steps": ["2"],
    "shuffle": ["false"], "length_bucketing": ["true"], "betas": ["[0.5, 0.9]"], "eps": ["0.01"],
    "pooling": ["last"], "train": ["head", "1"], "class_weights": ["[1, 3]"],
    "label_smoothing": ["0.2"], "max_length": ["4"],
}  # fmt: skip
#: Options that must not change it.
KEEPS = {"prefetch_batches": ["0", "5"], "num_workers": ["2"], "eval_steps": ["2"],
         "save_steps": ["1"]}  # fmt: skip


def test_options_of_training_change_the_result_or_must_not(configure):
    run(configure())
    plain = weights("out")
    found = {}
    for name, values in (CHANGES | KEEPS).items():
        for value in values:
            # The best evaluation decides which weights are kept: here the last ones are.
            run(configure(f"training.{name}={value}", f"data.output_dir={name}-{value}"))
            found[f"{name}={value}"] = weights(f"{name}-{value}") != plain
    expected = {f"{n}={v}": n in CHANGES for n, vs in (CHANGES | KEEPS).items() for v in vs}
    assert found == expected


def test_momentum_is_that_of_sgd(configure):
    for momentum in (0.0, 0.9):
        run(configure("training.optimizer=sgd", f"training.momentum={momentum}",
                      f"data.output_dir=m{momentum}"))  # fmt: skip
    assert weights("m0.0") != weights("m0.9")


def test_batch_tokens_bound_the_tokens_of_a_step(configure):
    result = run(configure("training.batch_tokens=40")).result
    assert len(result.history) > 1
    assert all(record["tokens"] <= 40 for record in result.history)


def test_warmup_and_schedule_reach_the_learning_rate(configure):
    result = run(configure("training.warmup_steps=2", "training.scheduler=linear")).result
    rates = [record["learning_rate"] for record in result.history]
    assert rates == pytest.approx([0.003 * f for f in (0, 0.5, 1, 0.75, 0.5, 0.25)])


def test_workers_and_prefetch_reach_the_loop(configure, monkeypatch):
    from loopos.training import loop

    seen = []
    inner = loop.prefetch

    def recording(thunks, depth, num_workers):
        seen.append((depth, num_workers))
        return inner(thunks, depth, num_workers)

    monkeypatch.setattr(loop, "prefetch", recording)
    run(configure("training.prefetch_batches=3", "training.num_workers=2"))
    assert set(seen) == {(3, 2)}


def test_eval_steps_and_early_stopping(configure):
    result = run(configure("training.eval_steps=2", "training.num_epochs=2")).result
    assert [record["step"] for record in result.evaluations] == [2, 4, 6, 8, 10, 12][
        : len(result.evaluations)
    ]
    worse = ("training.optimizer=sgd", "training.learning_rate=30", "training.momentum=0.0")
    stopped = run(configure(*worse, "training.eval_steps=1", "training.num_epochs=50",
                            "training.early_stopping_patience=2",
                            "data.output_dir=early")).result  # fmt: skip
    assert stopped.stopped_reason == "early_stopping"
    losses = [record["eval"]["loss"] for record in stopped.evaluations]
    assert min(losses) == losses[-3]
    assert stopped.steps == len(losses) < 50


def test_save_steps_is_how_often_a_checkpoint_is_written(configure):
    class Watch(Callback):
        found: set[str] = set()  # noqa: RUF012

        def on_step(self, record):
            self.found |= {path.name for path in Path("out/checkpoints").glob("step-*")}

    run(configure("training.save_steps=2", "data.validation_fraction=0"), callbacks=[Watch()])
    assert Watch.found == {"step-00000002", "step-00000004"}


def test_validation_data_and_fraction(configure):
    whole = prepare(configure("data.validation_fraction=0"))
    assert (len(whole.training.texts), whole.validation) == (24, None)
    third = prepare(configure("data.validation_fraction=0.33"))
    assert (len(third.training.texts), len(third.validation.texts)) == (16, 8)
    write_csv("v.csv", rows(6, seed=9))
    given = prepare(configure("data.validation_data=v.csv"))
    assert len(given.training.texts) == 24
    assert given.validation.where[0] == "v.csv:2"


def test_without_validation_there_is_no_evaluation(configure):
    summary = run(configure("data.validation_fraction=0"))
    assert summary.evaluation == {}
    assert not Path("out/evaluation.json").exists()
    assert (summary.output_dir / "model" / "classifier.json").exists()


def test_names_of_fields(configure):
    write_csv("t.csv", [(i, label, text) for i, (text, label) in enumerate(rows(24))],
              ("id", "kind", "body"))  # fmt: skip
    prepared = prepare(configure("data.text_field=body", "data.label_field=kind"))
    assert prepared.training.label_names == ["neg", "pos"]
    assert "film" in " ".join(prepared.training.texts)
    assert refused(prepare, configure()) == "t.csv:2: no field 'text' (found: id, kind, body)"


def test_the_seed_decides_split_weights_and_order(configure):
    first, again, other = (prepare(configure(f"computation.seed={seed}")) for seed in (1, 1, 2))
    tables = [p.model.parameters()["embeddings.tokens"].data for p in (first, again, other)]
    assert np.array_equal(tables[0], tables[1])
    assert not np.array_equal(tables[0], tables[2])
    assert first.validation.texts == again.validation.texts != other.validation.texts
    heads = [p.trainer.classifier.weight.data for p in (first, again, other)]
    assert np.array_equal(heads[0], heads[1])
    assert not np.array_equal(heads[0], heads[2])


def test_num_threads_holds_inside_the_run_only(configure):
    from threadpoolctl import threadpool_info

    def threads():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    before = threads()
    with computing(configure("computation.num_threads=1")):
        assert threads() == {1}
    assert threads() == before


def test_the_backend_is_the_one_that_is_named(configure):
    with computing(configure("computation.backend=numpy")):
        assert get_backend().describe()["name"] == "numpy"
    message = refused(run, configure("computation.backend=nunpy"), kind=BackendError)
    assert message.startswith(
        "--set computation.backend: unknown backend 'nunpy'; did you mean 'numpy'? (known: numpy, "
    )
    assert not Path("out").exists()


def test_a_tokenizer_may_be_given_and_is_trained_otherwise(configure, pretrained, tmp_path):
    given = load_tokenizer(pretrained)
    for name in (str(pretrained), str(pretrained / "tokenizer.json")):
        tokenizer = prepare(configure(f"data.tokenizer={name}")).trainer.tokenizer
        assert tokenizer.encode("a clever film") == given.encode("a clever film")
    trained = prepare(configure("model.vocab_size=270")).trainer.tokenizer
    assert trained.vocab_size == 270


def test_pretrained_weights_give_sizes_and_tokenizer(configure, pretrained):
    Path("run.json").write_text(json.dumps(CONFIG | {"model": {"dropout": 0.3}}))
    prepared = prepare(configure(f"data.pretrained_weights={pretrained}"))
    assert prepared.model.config.d_model == 16
    assert prepared.model.config.dropout == 0.3
    assert prepared.trainer.tokenizer.vocab_size == 280
    table = prepared.model.parameters()["embeddings.tokens"].data
    assert np.array_equal(
        table, Transformer(TransformerConfig(16, 2, 2, 32, 300, max_seq_len=64), seed=5)
        .parameters()["embeddings.tokens"].data
    )  # fmt: skip


def test_the_seeds_default_file_runs_once_its_paths_are_set(configure, tmp_path):
    sizes = {"d_model": 384, "num_heads": 8, "num_layers": 4, "d_ff": 1536, "vocab_size": 16000,
             "num_classes": 10}  # fmt: skip
    base = tmp_path / "base"
    tokenizer = train_bpe([text for text, _ in rows(24)], 280)
    small = sizes | {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32}
    names = {name: value for name, value in small.items() if name != "num_classes"}
    Transformer(TransformerConfig(**names)).save(base, tokenizer)
    data = [{"text": f"{text} {i}", "label": i % 10} for i, (text, _) in enumerate(rows(40))]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, data)))
    seed = {
        "model": {"type": "transformer"} | small,
        "computation": {"mode": "posttraining", "method": "fine_tuning", "description": "..."},
        "training": {"learning_rate": 0.00001, "batch_size": 16, "prefetch_batches": 2,
                     "num_workers": 2, "shuffle": True, "num_epochs": 5},
        "data": {"pretrained_weights": str(base), "training_data": "train.jsonl",
                 "output_dir": "outputs/fine_tuned"},
    }  # fmt: skip
    Path("run.json").write_text(json.dumps(seed))
    summary = run(configure())
    assert summary.result.steps == 5 * 2  # 30 rows (one of each class is held out), 16 a batch
    assert len(summary.evaluation["confusion_matrix"]) == 10
    seed["model"] |= sizes  # the sizes as they stand in the seed's file
    Path("run.json").write_text(json.dumps(seed))
    message = refused(prepare, configure(), kind=ConfigError)
    assert message == (
        f"run.json:1: model.d_model: 384, but data.pretrained_weights ({base}) has 16"
    )


# -- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "has"),
    [("d_model", 32, 16), ("num_heads", 4, 2), ("num_layers", 3, 2), ("d_ff", 64, 32),
     ("vocab_size", 301, 300), ("max_seq_len", 128, 64), ("num_kv_heads", 1, 2),
     ("head_dim", 4, 8), ("norm", "rms_norm", "'layer_norm'"), ("positions", "rope", "'learned'"),
     ("activation", "gelu", "'gelu_tanh'"), ("causal", False, True)],
)  # fmt: skip
def test_sizes_that_disagree_with_the_weights_name_both(configure, pretrained, name, value, has):
    Path("run.json").write_text(json.dumps(CONFIG | {"model": {}}))
    config = configure(f"model.{name}={json.dumps(value)}", f"data.pretrained_weights={pretrained}")
    assert refused(prepare, config, kind=ConfigError) == (
        f"--set model.{name}: {value!r}, but data.pretrained_weights ({pretrained}) has {has}"
    )


def test_classes_that_are_more_or_fewer_than_num_classes(configure):
    write_csv("t.csv", rows(24, classes=("bad", "fine", "good")))
    assert refused(prepare, configure("model.num_classes=2")) == (
        "t.csv: 'label' has 3 different names (bad, fine, good), more than num_classes 2"
    )
    assert refused(prepare, configure("model.num_classes=4"), kind=ConfigError) == (
        "--set model.num_classes: 4, but the data has 3 classes (bad, fine, good)"
    )
    assert prepare(configure("model.num_classes=3")).trainer.classifier.num_classes == 3


def test_labels_out_of_range_are_named_with_file_and_line(configure):
    data = rows(24, classes=(0, 1))
    data[7] = (data[7][0], 5)
    write_csv("t.csv", data)
    assert refused(prepare, configure("model.num_classes=2"), kind=DataError) == (
        "t.csv:9: expected 'label' from 0 to 1, found 5"
    )
    write_csv("t.csv", rows(24))
    write_csv("v.csv", [*rows(4), ("odd", "negg")])
    assert refused(prepare, configure("data.validation_data=v.csv"), kind=DataError) == (
        "v.csv:6: unknown 'label' 'negg'; did you mean 'neg'? (known: neg, pos)"
    )


def test_a_tokenizer_larger_than_the_vocabulary(configure, pretrained):
    config = configure(f"data.tokenizer={pretrained}", "model.vocab_size=279")
    assert refused(prepare, config, kind=ConfigError) == (
        f"--set data.tokenizer: the tokenizer in {pretrained} has 280 ids, "
        "more than the model's vocab_size 279"
    )


def test_a_vocabulary_too_small_for_a_byte_level_tokenizer(configure):
    assert refused(prepare, configure("model.vocab_size=100"), kind=ConfigError) == (
        "--set model.vocab_size: a byte-level vocabulary needs 257 tokens at least, "
        "found vocab_size 100"
    )


def test_a_model_that_no_machine_holds(configure):
    message = refused(prepare, configure("model.d_model=10000000"), kind=ConfigError)
    assert message.startswith(
        "run.json:2: model: 800,005,120,000,064 parameters need 11,921,005 GiB to train, "
    )
    assert message.endswith(" GiB of memory")


PLAYS = "".join(f"line {i}: to be or not to be, that is the question\n" for i in range(200))
ONE_TEXT = ["computation.mode=pretraining", "computation.method=autoregressive",
            "data.training_data=one.txt"]  # fmt: skip


def test_of_a_single_text_the_end_is_held_out(configure):
    Path("one.txt").write_text(PLAYS)
    prepared = prepare(configure(*ONE_TEXT))
    [training], [validation] = prepared.training.texts, prepared.validation.texts
    assert training + validation == PLAYS
    assert training.endswith("\n")
    assert validation.startswith("line 1")
    assert len(validation) == pytest.approx(0.1 * len(PLAYS), abs=len("line 180: ...") + 50)
    told = (
        f"the end of the only text, {len(validation):,} of {len(PLAYS):,} bytes "
        f"({len(validation) / len(PLAYS):.1%})"
    )
    assert prepared.report.held_out == prepared.report.to_dict()["held_out"] == told
    assert prepared.report.lines()[:2] == [
        f"{'rows':<15}1 training, 1 validation", f"{'held out':<15}{told}",
    ]  # fmt: skip
    # The tokenizer has not seen it.
    ids = train_bpe([training], 300).encode(PLAYS)
    np.testing.assert_array_equal(prepared.trainer.tokenizer.encode(PLAYS), ids)
    # In half or in no part, if that is wanted; the seed has no say.
    halves = prepare(configure(*ONE_TEXT, "data.validation_fraction=0.5"))
    assert len(halves.validation.texts[0]) == pytest.approx(0.5 * len(PLAYS), abs=60)
    again = prepare(configure(*ONE_TEXT, "computation.seed=9"))
    assert again.validation.texts == [validation]
    assert prepare(configure(*ONE_TEXT, "data.validation_fraction=0")).validation is None


def test_a_run_on_a_single_text_is_rehearsed_and_resumed(configure):
    Path("one.txt").write_text(PLAYS)
    asked = [*ONE_TEXT, "training.eval_steps=4", "training.max_steps=6"]
    estimate = rehearse(configure(*asked), asked)
    assert estimate.evaluation_s > 0
    whole = run(configure(*asked))
    assert whole.evaluation["loss"] == whole.result.evaluations[-1]["eval"]["loss"]
    assert "the end of the only text" in Path("out/data_report.json").read_text()
    parts = configure(*asked, "data.output_dir=parts")
    interrupt(parts)
    resumed = run(parts, resume=True)
    assert resumed.evaluation == whole.evaluation
    assert weights("parts") == weights("out")


def test_a_single_text_too_short_to_hold_some_out(configure):
    Path("one.txt").write_text("to be\n" + "\n" * 40)
    assert refused(prepare, configure(*ONE_TEXT), kind=ConfigError).endswith(
        "data.validation_fraction: the text is too short to hold out a validation fraction of 0.1; "
        "name data.validation_data, or set data.validation_fraction to 0 to have none"
    )


def test_too_few_rows_to_split(configure):
    write_csv("t.csv", [("one", "a"), ("two", "b")])
    config = configure("data.validation_fraction=0.1")
    assert refused(prepare, config, kind=ConfigError) == (
        "--set data.validation_fraction: 2 rows are too few to split off a validation fraction "
        "of 0.1; name data.validation_data, or set data.validation_fraction to 0 to have none"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_length=65", "65 is more than the model's max_seq_len 64"),
        ("training.train=3", "3 layers asked for, the model has 2"),
        ("training.class_weights=[1, 2, 3]", "3 numbers for 2 classes"),
        ("training.class_weights=[1, -2]", "expected numbers that are not negative"),
    ],
)
def test_options_that_do_not_fit_the_model_are_found_before_anything_is_written(
    configure, override, message
):
    config = configure(override)
    key = override.partition("=")[0]
    assert refused(run, config, kind=ConfigError) == f"--set {key}: {message}"
    assert not Path("out").exists()

    def check():
        plan(config, prepare(config))

    assert refused(check, kind=ConfigError) == f"--set {key}: {message}"


def test_missing_files_name_the_key_and_the_nearest(configure):
    message = refused(run, configure("data.training_data=tt.csv"), kind=MissingFileError)
    assert message == (
        "--set data.training_data: tt.csv: no such file or directory; did you mean 't.csv'?"
    )
    for key in ("validation_data", "tokenizer", "pretrained_weights"):
        message = refused(run, configure(f"data.{key}=zzz"), kind=MissingFileError)
        assert message == f"--set data.{key}: zzz: no such file or directory"
    assert not Path("out").exists()


def test_pretrained_weights_that_are_a_file(configure):
    Path("model.gguf").write_bytes(b"GGUF")
    assert refused(prepare, configure("data.pretrained_weights=model.gguf")) == (
        "model.gguf: cut off or damaged at byte 4, within the version"
    )
    Path("model.bin").write_bytes(b"PK")
    assert refused(prepare, configure("data.pretrained_weights=model.bin")) == (
        "--set data.pretrained_weights: model.bin: expected a directory or a .gguf file, "
        "found another file"
    )


def test_a_run_directory_is_no_model_but_holds_one(configure):
    run(configure())
    Path("run.json").write_text(json.dumps(CONFIG | {"model": {}}))
    config = configure("data.pretrained_weights=out", "data.output_dir=next")
    assert refused(prepare, config, kind=ConfigError) == (
        "--set data.pretrained_weights: out is a run directory; its model is out/model"
    )
    assert prepare(configure("data.pretrained_weights=out/model")).model.config.d_model == 16


def test_a_directory_without_a_model(configure):
    Path("empty").mkdir()
    assert refused(prepare, configure("data.pretrained_weights=empty"), kind=MissingFileError) == (
        "--set data.pretrained_weights: empty: holds no config.json, so it is not a model directory"
    )
    write_csv("empty/t.csv", rows(4))
    assert refused(prepare, configure("data.tokenizer=empty"), kind=MissingFileError).startswith(
        "--set data.tokenizer: empty: no tokenizer in it"
    )
    with pytest.raises(DataError, match="^empty"):
        prepare(configure("data.training_data=empty"))


def test_damaged_weights_are_named(configure, pretrained):
    shutil.copytree(pretrained, "base")
    Path("run.json").write_text(json.dumps(CONFIG | {"model": {}}))
    file = Path("base/model.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    message = refused(run, configure("data.pretrained_weights=base"), kind=ModelFormatError)
    assert message.startswith(f"{file}: ")
    assert not Path("out").exists()


# -- how long a run will be ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [(), ("training.num_epochs=3",), ("training.batch_tokens=40", "training.num_epochs=2"),
     ("training.max_steps=2",), ("training.num_epochs=null", "training.max_steps=9"),
     ("training.gradient_accumulation_steps=4",), ("data.validation_fraction=0",)],
)  # fmt: skip
def test_the_plan_is_what_happens(configure, overrides):
    config = configure(*overrides)
    prepared = prepare(config)
    planned = plan(config, prepared)
    assert sorted(p.name for p in Path().iterdir()) == ["run.json", "t.csv"]
    result = run(config).result
    assert result.steps == planned.total_steps
    first = [record for record in result.history if record["epoch"] == 0]
    assert planned.steps_per_epoch == len(first) or result.steps < planned.steps_per_epoch


def test_planning_changes_nothing_of_the_run(configure):
    config = configure()
    prepared = prepare(config)
    plan(config, prepared)
    before = {name: p.data.copy() for name, p in prepared.model.parameters().items()}
    plan(config, prepared)
    after = prepared.model.parameters()
    assert all(np.array_equal(before[name], after[name].data) for name in before)


# -- the run directory ---------------------------------------------------------------------------


def test_what_a_run_leaves(configure):
    summary = run(configure("data.output_dir=deep/er/out"))
    directory = Path("deep/er/out")
    assert summary.output_dir == directory
    assert sorted(path.name for path in directory.iterdir()) == [
        "checkpoints", "config.json", "data_report.json", "evaluation.json", "metrics.jsonl",
        "model", "tokenizer",
    ]  # fmt: skip
    written = json.loads((directory / "config.json").read_text())
    expected = configure("data.output_dir=deep/er/out").as_dict()
    expected["data"]["training_data"] = str(Path("t.csv").resolve())
    assert written == expected
    assert json.loads((directory / "data_report.json").read_text())["rows"] == 22
    evaluation = json.loads((directory / "evaluation.json").read_text())
    assert evaluation == summary.evaluation
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "eval" not in s] == [1, 2, 3, 4, 5, 6]


def snapshot(directory):
    return {str(p): p.read_bytes() for p in sorted(Path(directory).rglob("*")) if p.is_file()}


def test_a_directory_that_holds_a_run_is_refused_and_untouched(configure):
    run(configure())
    before = snapshot("out")
    assert refused(run, configure()) == (
        "out: already holds a run (config.json); choose another directory (--output-dir)"
    )
    assert snapshot("out") == before


def test_a_model_directory_is_never_written_into(configure, pretrained):
    shutil.copytree(pretrained, "out")
    before = snapshot("out")
    assert refused(run, configure()) == (
        "out: already holds config.json, which is not of a run; "
        "choose another directory (--output-dir)"
    )
    assert refused(run, configure(), resume=True) == "out: there is no run to resume in it"
    assert snapshot("out") == before


def test_a_configuration_of_the_user_is_never_written_over(configure):
    shutil.copy("run.json", "config.json")
    before = snapshot(".")
    config = load_config("config.json", ["data.output_dir=."])
    message = ".: already holds config.json, which is not of a run"
    assert refused(run, config).startswith(message)
    assert refused(run, config, resume=True) == ".: there is no run to resume in it"
    assert snapshot(".") == before


def test_other_files_in_the_directory_stay(configure):
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    run(configure())
    assert Path("out/notes.txt").read_text() == "mine"


def test_an_output_directory_that_cannot_be(configure):
    Path("file").write_text("x")
    for name, reason in (("file", "Not a directory"), ("file/out", "Not a directory"),
                         ("x" * 300, "File name too long")):  # fmt: skip
        message = refused(run, configure(f"data.output_dir={name}"), kind=OutputError)
        assert message == f"{name}: cannot be written ({reason})"
    assert Path("file").read_text() == "x"


def test_a_bad_configuration_leaves_no_directory_behind(configure):
    write_csv("t.csv", [("one", "a"), ("two", "a")])
    refused(run, configure("data.output_dir=new/out"), kind=DataError)
    assert not Path("new").exists()


def interrupt(config, after=2, **keywords):
    """Run and stop after some steps."""
    calls = iter(range(1, 1000))
    with pytest.raises(Interrupted) as caught:
        run(config, stop=lambda: next(calls) >= after, **keywords)
    return caught.value


def test_an_interrupted_run_resumes_to_the_same_bytes(configure):
    options = ("training.num_epochs=2", "model.dropout=0.1")
    run(configure(*options, "data.output_dir=whole"))
    stopped = interrupt(configure(*options), after=3)
    assert str(stopped) == f"interrupted after step 3, saved in {stopped.checkpoint}"
    assert not Path("out/model").exists()
    summary = run(configure(*options), resume=True)
    assert summary.result.steps == 12
    for name in ("model/model.safetensors", "model/classifier.safetensors", "evaluation.json"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes(), name
    times = {"time_s", "tokens_per_s"}
    lines = [
        [{k: v for k, v in json.loads(line).items() if k not in times}
         for line in Path(place, "metrics.jsonl").read_text().splitlines()]
        for place in ("whole", "out")
    ]  # fmt: skip
    assert lines[0] == lines[1]


def test_a_finished_run_goes_on_with_more_epochs(configure):
    run(configure())
    summary = run(configure("training.num_epochs=2"), resume=True)
    assert summary.result.steps == 12
    assert json.loads(Path("out/config.json").read_text())["training"]["num_epochs"] == 2


class Results(Callback):
    """Notes whether a model and its figures are in ``out`` whenever something happens."""

    def __init__(self):
        self.seen = []

    def _look(self, *_):
        self.seen.append([Path("out", n).exists() for n in ("model", "evaluation.json")])

    on_start = on_step = _look


def longer(configure, *options):
    """Make the finished run in ``out`` longer, with a stop; nothing in it is older than the run."""
    watch = Results()
    interrupt(configure(*options, "training.num_epochs=2"), 1, resume=True, callbacks=[watch])
    assert watch.seen == [[False, False]] * len(watch.seen)
    assert len(watch.seen) > 1
    assert not Path("out/model").exists()
    summary = run(configure(*options, "training.num_epochs=2"), resume=True)
    assert Path("out/model").is_dir()
    assert json.loads(Path("out/evaluation.json").read_text()) == summary.evaluation
    assert not list(Path("out").rglob("*.tmp"))
    return summary


def test_a_finished_run_that_goes_on_has_no_model_of_before(configure):
    run(configure())
    before = snapshot("out")
    other = ("training.num_epochs=2", "training.learning_rate=0.1")
    refused(run, configure(*other), resume=True, kind=CheckpointError)
    lines = Path("out/metrics.jsonl").read_text()
    Path("out/metrics.jsonl").write_text("no record\n" + lines)
    refused(run, configure("training.num_epochs=2"), resume=True, kind=CheckpointError)
    Path("out/metrics.jsonl").write_text(lines)
    assert snapshot("out") == before
    assert longer(configure).result.steps == 12


def test_a_model_that_is_a_link_is_cleared_where_it_lies(configure):
    run(configure())
    Path("out/model").rename("disk")
    Path("out/model").symlink_to(Path("disk").absolute())
    longer(configure)
    assert Path("out/model").is_symlink()
    assert Path("disk/model.safetensors").is_file()


def test_results_that_cannot_be_deleted_are_named(configure, monkeypatch):
    run(configure())

    def cannot(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("loopos.files.os.replace", cannot)
    with pytest.raises(OutputError, match=r"^out/evaluation\.json: cannot be deleted \(Perm"):
        clear_results(Path("out"))


def test_the_results_of_a_run_without_a_step_left_stay(configure):
    run(configure())
    watch = Results()
    assert run(configure(), resume=True, callbacks=[watch]).result.steps == 6
    assert watch.seen == [[True, True]]
    shutil.rmtree("out")
    worse = ("training.optimizer=sgd", "training.learning_rate=30", "training.momentum=0.0",
             "training.eval_steps=1", "training.early_stopping_patience=2")  # fmt: skip
    stopped = run(configure(*worse, "training.num_epochs=50")).result
    watch = Results()
    again = run(configure(*worse, "training.num_epochs=60"), resume=True, callbacks=[watch])
    assert (again.result.steps, again.result.stopped_reason) == (stopped.steps, "early_stopping")
    assert watch.seen == [[True, True]]


def write_rows(path, data):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in data))


PAIRS = [{"prompt": f"The hen {i // 2} says", "chosen": f" yes {i % 3}", "rejected": f" no {i}"}
         for i in range(24)]  # fmt: skip
PROBLEMS = [{"problem": f"Say {i}.", "reasoning": [f"it is {i}"], "answer": f"{i}"}
            for i in range(12)]  # fmt: skip


@pytest.mark.parametrize("method", ["rlhf", "chain_of_thought"])
def test_a_run_in_stages_goes_on_and_keeps_the_models_of_its_stages(configure, method):
    inner = {"learning_rate": 0.003, "batch_size": 8}
    training, key, data = {
        "rlhf": (
            {"phases": ["supervised", "reward_model", "ppo"], "supervised": inner,
             "reward_model": inner, "max_new_tokens": 4, "batch_size": 4},
            "preference_data", PAIRS,
        ),
        "chain_of_thought": (
            {"rounds": 1, "samples": 1, "max_new_tokens": 4, "batch_size": 4},
            "reasoning_examples", PROBLEMS,
        ),
    }[method]  # fmt: skip
    write_rows("d.jsonl", data)
    values = CONFIG | {
        "computation": {"method": method},
        "training": {"learning_rate": 0.003, "num_epochs": 1} | training,
        "data": {key: "d.jsonl", "output_dir": "out", "validation_fraction": 0.25},
    }
    Path("run.json").write_text(json.dumps(values))
    first = run(configure())
    stages = {"rlhf": ["supervised/model", "reward_model/model"],
              "chain_of_thought": ["round-1/kept.jsonl"]}[method]  # fmt: skip
    kept = [snapshot(f"out/{stage}") or Path("out", stage).read_bytes() for stage in stages]
    second = longer(configure)
    assert second.result.steps == 2 * first.result.steps
    assert kept == [snapshot(f"out/{s}") or Path("out", s).read_bytes() for s in stages]


@pytest.fixture
def elsewhere(configure, pretrained):
    """Run a configuration in ``conf`` whose data and base lie beside it; stand in ``there``."""
    Path("conf").mkdir()
    Path("there").mkdir()
    shutil.move("t.csv", "conf/t.csv")
    shutil.copytree(pretrained, "conf/base")
    data = CONFIG["data"] | {"pretrained_weights": "base", "validation_data": ["t*.csv"]}
    Path("conf/run.json").write_text(json.dumps(CONFIG | {"model": {}, "data": data}))
    interrupt(load_config("conf/run.json"))


def test_the_configuration_that_a_run_writes_can_be_read_from_anywhere(
    elsewhere, tmp_path, monkeypatch
):
    written = json.loads(Path("out/config.json").read_text())["data"]
    beside = tmp_path / "conf"
    assert (written["training_data"], written["pretrained_weights"]) == (
        str(beside / "t.csv"), str(beside / "base")
    )  # fmt: skip
    assert written["validation_data"] == [str(beside / "t*.csv")]
    assert (written["tokenizer"], written["output_dir"]) == (None, "out")
    monkeypatch.chdir("there")
    config = load_config("../out/config.json")
    assert config.paths("validation_data") == [beside / "t.csv"]
    assert run(config).result.steps == 6
    # By either file, from either place, the interrupted run goes on.
    there = ["data.output_dir=../out"]
    interrupt(load_config("../out/config.json", there), 1, resume=True)
    assert run(load_config("../conf/run.json", there), resume=True).result.steps == 6
    assert weights("../out") == weights("out")


def test_a_run_that_was_moved_goes_on_by_its_own_configuration(elsewhere):
    Path("runs").mkdir()
    shutil.move("out", "runs/out")
    there = ["data.output_dir=runs/out"]
    shutil.copytree("conf/base", "runs/base")
    other = load_config("runs/out/config.json", [*there, "data.pretrained_weights=runs/base"])
    assert "data.pretrained_weights: 'runs/base', but the run to be continued" in refused(
        run, other, resume=True, kind=CheckpointError
    )
    assert run(load_config("runs/out/config.json", there), resume=True).result.steps == 6


def test_a_run_of_which_only_the_names_are_known_goes_on(elsewhere, monkeypatch):
    """Of one that was begun by a version that wrote no places into checkpoints."""
    (checkpoint,) = Path("out/checkpoints").glob("step-*")
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["run_config"].pop("places") == {"pretrained_weights": "../conf/base"}
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["state.json"] = _digest(checkpoint / "state.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.chdir("there")
    config = load_config("../conf/run.json", ["data.output_dir=../out"])
    shutil.copytree("../conf/base", "other")
    other = load_config("../conf/run.json",
                        ["data.output_dir=../out", "data.pretrained_weights=other"])  # fmt: skip
    assert refused(run, other, resume=True, kind=CheckpointError) == (
        "--set data.pretrained_weights: 'other', but the run to be continued (../out) has 'base'"
    )
    assert run(config, resume=True).result.steps == 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rate=0.1",
         "--set training.learning_rate: 0.1, but the run to be continued (out) has 0.003"),
        ("training.batch_size=3",
         "--set training.batch_size: 3, but the run to be continued (out) has 4"),
        ("model.dropout=0.5",
         "--set model.dropout: 0.5, but the run to be continued (out) has 0.0"),
        ("model.num_heads=4",
         "--set model.num_heads: 4, but the run to be continued (out) has 2"),
        ("computation.seed=1",
         "--set computation.seed: 1, but the run to be continued (out) has 0"),
        ("data.validation_fraction=0.3", "--set data.validation_fraction: 0.3, but the run to be "
         "continued (out) has 0.1"),
        ("training.pooling=last",
         "--set training.pooling: 'last', but the run to be continued (out) has None"),
    ],
)  # fmt: skip
def test_a_run_is_not_continued_with_other_options(configure, override, message):
    interrupt(configure())
    before = snapshot("out")
    assert refused(run, configure(override), resume=True, kind=CheckpointError) == message
    assert snapshot("out") == before


def test_a_run_is_not_continued_on_other_data(configure):
    interrupt(configure())
    before = snapshot("out")
    shutil.copy("t.csv", "moved.csv")
    data = rows(24)
    data[3] = ("changed", data[3][1])
    write_csv("t.csv", data)
    line = 1 + next(i for i, text in enumerate(Path("run.json").read_text().splitlines())
                    if "training_data" in text)  # fmt: skip
    assert refused(run, configure(), resume=True, kind=CheckpointError) == (
        f"run.json:{line}: data.training_data: the data is not that of the run to be continued "
        "(out)"
    )
    assert snapshot("out") == before
    # The same rows in another place are the same data.
    assert run(configure("data.training_data=moved.csv"), resume=True).result.steps == 6


def test_what_may_change_may_change(configure):
    interrupt(configure())
    summary = run(
        configure("training.num_epochs=2", "training.num_workers=1", "training.prefetch_batches=1",
                  "computation.description=\"other\"", "computation.num_threads=1",
                  "computation.backend=numpy"),
        resume=True,
    )  # fmt: skip
    assert summary.result.steps == 12


def test_resume_without_a_run(configure):
    assert refused(run, configure(), resume=True, kind=CheckpointError) == (
        "out: there is no run to resume in it"
    )
    assert not Path("out").exists()


def test_a_run_that_ended_before_its_first_checkpoint_is_started_over(configure):
    class Die(Callback):
        def on_step(self, record):
            raise ZeroDivisionError  # as a kill would, but in this process

    with pytest.raises(ZeroDivisionError):
        run(configure(), callbacks=[Die()])
    assert not list(Path("out").glob("checkpoints/step-*"))
    assert refused(run, configure()) == (
        "out: holds a run that ended before its first checkpoint; start it over with --resume, "
        "or choose another directory (--output-dir)"
    )
    run(configure(), resume=True)
    run(configure("data.output_dir=whole"))
    assert weights("out") == weights("whole")


def test_damaged_checkpoints_are_not_resumed(configure):
    interrupt(configure())
    (checkpoint,) = Path("out/checkpoints").glob("step-*")
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    before = snapshot("out")
    assert refused(run, configure(), resume=True, kind=CheckpointError) == (
        f"no checkpoint in out/checkpoints is whole: {file} does not match its checksum"
    )
    assert snapshot("out") == before


def test_a_run_in_checkpoints_only_is_refused(configure):
    interrupt(configure())
    assert refused(run, configure()) == (
        "out: already holds a run; continue it with --resume, "
        "or choose another directory (--output-dir)"
    )


# -- pretraining ---------------------------------------------------------------------------------


def test_pretraining_makes_a_base_model_that_fine_tuning_takes(configure):
    base = CONFIG | {
        "computation": {"mode": "pretraining", "method": "autoregressive"},
        "data": {"training_data": "t.csv", "output_dir": "base"},
    }
    Path("base.json").write_text(json.dumps(base))
    summary = run(load_config("base.json", ["training.sequence_length=8"]))
    assert summary.evaluation["perplexity"] == pytest.approx(np.exp(summary.evaluation["loss"]))
    Path("run.json").write_text(json.dumps(CONFIG | {"model": {}}))
    tuned = run(configure("data.pretrained_weights=base/model"))
    assert tuned.evaluation["accuracy"] >= 0
    config = load_config("base.json", ["training.sequence_length=65"])
    assert refused(prepare_and_plan, config, kind=ConfigError) == (
        "--set training.sequence_length: 65 is more than the model's max_seq_len 64"
    )


def prepare_and_plan(config):
    return plan(config, prepare(config))
