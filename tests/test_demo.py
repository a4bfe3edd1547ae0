"""The embedded default: what ships is what its cards say, and the demo runs on it."""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import math
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

import loopos
from loopos import demo
from loopos.config import load_config, shipped_configs
from loopos.data.readers import read_labelled
from loopos.files import builtin
from loopos.methods.fine_tuning import FineTuner
from loopos.methods.pretraining import Pretrainer

ASSETS = Path(loopos.__file__).parent / "assets"
BASE = ASSETS / "base_model"
LABELS = ["negative", "positive"]


@pytest.fixture(scope="module")
def training():
    return read_labelled(builtin("sentiment_train.csv"))


@pytest.fixture(scope="module")
def validation():
    return read_labelled(builtin("sentiment_validation.csv"))


# -- assets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("directory", [ASSETS, BASE], ids=["data", "base_model"])
def test_files_are_those_of_the_card(directory):
    card = (directory / "README.md").read_text(encoding="utf-8")
    recorded = dict(re.findall(r"^\| `([^`]+)` \| `([0-9a-f]{64})` \|$", card, re.MULTILINE))
    shipped = {p.name for p in directory.iterdir() if p.is_file()} - {"README.md", "__init__.py"}
    assert set(recorded) == shipped
    for name, digest in recorded.items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest, name


def test_assets_are_small():
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) < 6_000_000


def test_both_classes_are_half_of_each_file(training, validation):
    for data, per_class in ((training, 1500), (validation, 400)):
        assert data.label_names == LABELS
        assert np.bincount(data.labels).tolist() == [per_class, per_class]
        assert not data.dropped


def _words(text):
    return re.findall(r"\w+", text.lower())


def _triples(text):
    words = _words(text)
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def test_no_text_stands_twice_and_none_on_both_sides(training, validation):
    keys = Counter(" ".join(_words(text)) for text in training.texts + validation.texts)
    assert keys.most_common(1)[0][1] == 1


def test_no_validation_text_is_close_to_a_training_text(training, validation):
    holders = defaultdict(list)
    sizes = []
    for index, text in enumerate(training.texts):
        triples = _triples(text)
        sizes.append(len(triples))
        for triple in triples:
            holders[triple].append(index)
    for text in validation.texts:
        own = _triples(text)
        shared = Counter(index for triple in own for index in holders[triple])
        assert all(n < 0.4 * min(len(own), sizes[i]) for i, n in shared.items()), text


def test_the_script_makes_these_bytes_and_hides_validation_from_pretraining(
    package_file, validation
):
    member = "additional_resources/hutto_ICWSM_2014.tar.gz"
    archive = package_file("vaderSentiment==3.3.2", member, source=True)
    script = Path(__file__).parents[1] / "tools" / "make_assets.py"
    spec = importlib.util.spec_from_file_location("make_assets", script)
    tool = importlib.util.module_from_spec(spec)
    sys.modules["make_assets"] = tool  # its dataclass looks itself up
    try:
        spec.loader.exec_module(tool)
        with open(archive, "rb") as file:
            rated = tool.read_rated(file)
        train, held = tool.choose(rated)
        pretraining = tool.pretraining_bytes(rated, held)
    finally:
        del sys.modules["make_assets"]
    assert tool.csv_bytes(train) == (ASSETS / "sentiment_train.csv").read_bytes()
    assert tool.csv_bytes(held) == (ASSETS / "sentiment_validation.csv").read_bytes()
    assert hashlib.sha256(pretraining).hexdigest() in (BASE / "README.md").read_text()
    seen = {
        " ".join(_words(json.loads(line)["text"])) for line in pretraining.decode().split("\n")[:-1]
    }
    assert len(seen) > 22_000
    assert not seen & {" ".join(_words(text)) for text in validation.texts}


def test_tokenizer_gives_back_every_text(validation):
    tokenizer = loopos.load_tokenizer(BASE)
    texts = [*validation.texts, "你好,世界", "שלום 👋🏽 naïve\tcafé\n", " two  spaces "]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 4096
    assert tokenizer.eos_id == tokenizer.token_to_id("<|endoftext|>")


def test_base_model_has_the_held_out_loss_of_its_card():
    card = (BASE / "README.md").read_text(encoding="utf-8")
    curve = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE)
    losses = [float(row[2]) for row in curve]
    pretrainer = Pretrainer(loopos.load_model(BASE), loopos.load_tokenizer(BASE))
    measured = pretrainer.evaluate(builtin("sentiment_validation.csv"))["loss"]
    assert measured == pytest.approx(losses[-1], abs=2e-3)
    assert measured < math.log(4096) - 3.0
    assert losses[-1] < losses[0] - 0.5


# -- the demo ------------------------------------------------------------------------------------


def test_free_directory_never_takes_one_that_holds_something(tmp_path):
    wanted = tmp_path / "demo"
    assert demo.free_directory(wanted) == wanted
    wanted.mkdir()
    assert demo.free_directory(wanted) == wanted
    (wanted / "metrics.jsonl").touch()
    assert demo.free_directory(wanted) == tmp_path / "demo-2"
    (tmp_path / "demo-2").touch()
    assert demo.free_directory(wanted) == tmp_path / "demo-3"


def _result(accuracy, fresh, majority=0.5):
    return demo.DemoResult(Path("x"), accuracy, fresh, majority, (), 1.0)


def test_faults_name_what_was_missed():
    assert _result(0.75, 0.70).faults == []
    assert _result(0.60, 0.59).faults == []
    assert [f[:14] for f in _result(0.599, 0.55).faults] == ["accuracy 59.9%"]
    (fault,) = _result(0.70, 0.70).faults
    assert "without pretraining (70.0%)" in fault
    assert len(_result(0.5, 0.6).faults) == 2


def test_both_runs_differ_in_the_weights_alone(tmp_path):
    pretrained, fresh = demo.configurations(tmp_path, 7, None)
    assert pretrained.computation == fresh.computation
    assert pretrained.computation.seed == 7
    assert pretrained.training == fresh.training
    assert pretrained.training == load_config(shipped_configs()["demo"]).training
    assert fresh.data.pretrained_weights is None
    assert fresh.path("tokenizer") == pretrained.path("pretrained_weights") == BASE
    assert fresh.path("training_data") == pretrained.path("training_data")
    assert fresh.model["dropout"] == pretrained.model["dropout"]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Return directory, exit code and output of a demo of two steps a run."""
    directory = tmp_path_factory.mktemp("short") / "demo"
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "compare", functools.partial(demo.compare, max_steps=2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = demo.run_demo(directory, seed=3)
    return directory, code, out.getvalue(), err.getvalue()


def test_two_steps_are_an_honest_failure(short):
    _, code, out, err = short
    assert code == 1
    assert re.search(r"^error: accuracy \d", err, re.MULTILINE)
    assert "commonest class       50.0%" in out
    assert "3000 training, 800 validation" in out


def test_the_network_without_pretraining_is_the_same_one(short):
    directory = short[0]
    bodies = [loopos.load_model(d / "model") for d in (directory, directory / demo.FRESH)]
    shapes = [{n: p.shape for n, p in body.parameters().items()} for body in bodies]
    assert shapes[0] == shapes[1]
    base = loopos.load_model(BASE).parameters()["embeddings.tokens"].data
    moved = [np.abs(b.parameters()["embeddings.tokens"].data - base).max() for b in bodies]
    assert moved[0] < 1e-3 < 0.02 < moved[1]
    tokenizers = [(d / "tokenizer" / "tokenizer.json") for d in (directory, directory / demo.FRESH)]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()


def test_the_run_directory_predicts_what_was_shown(short, validation):
    directory, _, out, _ = short
    saved = json.loads((directory / "demo.json").read_text(encoding="utf-8"))
    assert len(saved["shown"]) == 3
    texts = [one["text"] for one in saved["shown"]]
    predictions = FineTuner.load(directory / "model").predict(texts)
    assert predictions.labels == [one["predicted"] for one in saved["shown"]]
    truth = dict(zip(validation.texts, validation.labels, strict=True))
    for one in saved["shown"]:
        assert one["label"] == LABELS[truth[one["text"]]]
        assert one["text"] in out
    evaluation = json.loads((directory / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["accuracy"] == saved["accuracy"]


def test_a_second_run_goes_elsewhere_and_says_so(short, monkeypatch, capsys):
    directory = short[0]
    before = (directory / "demo.json").read_bytes()
    monkeypatch.setattr(demo, "compare", functools.partial(demo.compare, max_steps=1))
    code = demo.run_demo(directory)
    out = capsys.readouterr().out
    assert f"{directory} is not empty, so this run goes to {directory}-2" in out
    assert code == 1
    assert (directory / "demo.json").read_bytes() == before


def test_stopping_says_where_the_state_is(tmp_path, capsys):
    asked = []

    def stop():
        asked.append(True)
        return True

    assert demo.run_demo(tmp_path / "demo", stop=stop) == 130
    assert len(asked) == 1
    assert "interrupted after step 1, saved in" in capsys.readouterr().err
    assert not (tmp_path / "demo" / "demo.json").exists()
