"""Which backend computes, what is said of it, and what happens when one is missing."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import loopos
from loopos import backends, measure
from loopos._ext import get_include
from loopos.backends import cython_backend
from loopos.cli import app
from loopos.config import load_config
from loopos.errors import BackendError
from loopos.runner import computing

CYTHON = pytest.mark.skipif(
    "cython" not in backends.available_backends(), reason="the cython backend cannot run here"
)


def command(*arguments, **variables):
    env = {k: v for k, v in os.environ.items() if k not in ("LOOPOS_BACKEND", "LOOPOS_CPU")}
    return subprocess.run([sys.executable, "-m", "loopos", *arguments], env=env | variables,
                          capture_output=True, text=True)  # fmt: skip


def test_the_first_that_can_run_is_taken():
    order = [name for name in ("cython", "numba", "numpy") if name in backends._BUILT_IN]
    assert list(reversed(backends._BUILT_IN)) == order
    assert backends.available_backends()[0] == next(
        name for name in order if name not in backends.unavailable_backends()
    )


@CYTHON
def test_a_lower_instruction_set_can_be_forced():
    with loopos.use_backend("cython") as backend:
        levels = backend.levels()
    for level in levels:
        script = "import loopos; print(loopos.get_backend().describe()['isa'])"
        env = os.environ | {"LOOPOS_CPU": level, "LOOPOS_BACKEND": "cython"}
        done = subprocess.run([sys.executable, "-c", script], env=env, check=True,
                              capture_output=True, text=True)  # fmt: skip
        assert done.stdout.strip() == level


@CYTHON
def test_an_instruction_set_that_cannot_run_is_one_sentence_and_exit_code_2():
    done = command("info", LOOPOS_CPU="v9")
    assert done.returncode == 2
    assert done.stdout == ""
    with loopos.use_backend("cython") as backend:
        expected = ", ".join(backend.levels())
    assert done.stderr == (
        f"error: LOOPOS_CPU: instruction set 'v9' cannot run here, expected one of {expected}\n"
    )


@pytest.fixture
def unchosen(monkeypatch):
    """Let the environment decide once more, in this process."""
    monkeypatch.setattr(backends, "_default", None)
    monkeypatch.setattr(backends, "_instances", {})
    monkeypatch.delenv("LOOPOS_CPU", raising=False)
    return monkeypatch.setenv


def computing_refuses(**computation):
    config = load_config("fine_tuning")
    computation = dataclasses.replace(config.computation, **computation)
    with pytest.raises(BackendError) as caught:
        computing(dataclasses.replace(config, computation=computation)).__enter__()
    return str(caught.value).partition(" (known")[0].partition(", expected")[0]


def test_whoever_named_a_backend_that_cannot_run_is_named(unchosen):
    unknown = "unknown backend 'nunpy'; did you mean 'numpy'?"
    unchosen("LOOPOS_BACKEND", "nunpy")
    assert computing_refuses() == f"LOOPOS_BACKEND: {unknown}"
    place = load_config("fine_tuning").where("computation.backend")
    assert computing_refuses(backend="nunpy") == f"{place}: {unknown}"


@CYTHON
@pytest.mark.parametrize("backend", ["", "auto", "cython"])
def test_an_instruction_set_that_cannot_run_is_no_fault_of_the_configuration(unchosen, backend):
    unchosen("LOOPOS_BACKEND", backend)
    unchosen("LOOPOS_CPU", "v9")
    assert computing_refuses() == "LOOPOS_CPU: instruction set 'v9' cannot run here"


def test_a_backend_that_was_not_built_says_why(tmp_path, monkeypatch):
    (tmp_path / "not_built.txt").write_text("the C compiler 'cc' failed\n")
    monkeypatch.setattr(cython_backend.loopos._ext, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setitem(sys.modules, "loopos._ext.kernels", None)
    reason = "its kernels were not built (the C compiler 'cc' failed)"
    assert backends.unavailable_backends()["cython"] == reason
    assert "cython" not in backends.available_backends()
    monkeypatch.setattr(backends, "_instances", {})
    with pytest.raises(BackendError, match="'cython' cannot run here: its kernels were not built"):
        loopos.set_backend("cython")
    shown = CliRunner().invoke(app, ["info"])
    assert shown.exit_code == 0
    assert f"unavailable  cython: {reason}" in shown.output


def test_auto_in_a_configuration_is_the_backend_in_force(tmp_path):
    config = tmp_path / "c.json"
    config.write_text(json.dumps({
        "model": {"d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 16, "vocab_size": 300},
        "computation": {"mode": "pretraining", "method": "autoregressive"},
        "training": {"learning_rate": 0.001, "max_steps": 1},
        "data": {"training_data": "t.txt", "output_dir": "out"},
    }))  # fmt: skip
    (tmp_path / "t.txt").write_text("a text")
    loaded = load_config(config)
    with loopos.use_backend("numpy"), computing(loaded):
        assert loopos.get_backend().name == "numpy"
    with loopos.use_backend(backends.available_backends()[0]) as first, computing(loaded):
        assert loopos.get_backend() is first


def test_info_says_when_a_number_of_threads_is_not_one(monkeypatch):
    reason = "OMP_NUM_THREADS: expected a whole number of at least 1, found 'abc'"
    for value, found in (("abc", True), ("1", False)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        shown = CliRunner().invoke(app, ["info"]).output
        assert (f"ignored      {reason}" in shown) == found


def test_info_measures_every_backend():
    facts = json.loads(command("info", "--json", "--measure").stdout)
    seconds = facts["measured"]["seconds"]
    assert set(seconds) == set(facts["backends"])
    assert all(0 < value < 60 for value in seconds.values())
    assert facts["cpus"] >= 1


def test_advice_is_given_when_another_backend_is_faster_by_more_than_noise(monkeypatch):
    seconds = {"a": 1.0, "b": 0.9, "c": 0.5}
    monkeypatch.setattr(measure, "_step_seconds", seconds.__getitem__)
    assert measure.measure_backends(["a", "b"], "a").advice is None
    assert measure.measure_backends(["a", "b", "c"], "c").advice is None
    assert measure.measure_backends(["a", "b", "c"], "a") == measure.Measured(
        seconds,
        "c is faster here than a; choose it with LOOPOS_BACKEND=c or computation.backend",
    )


def test_checkpoints_name_the_backend_and_another_one_may_continue(tmp_path, caplog):
    from loopos.methods.pretraining import Options, Pretrainer

    def trainer():
        config = loopos.TransformerConfig(
            d_model=8, num_heads=2, num_layers=1, d_ff=16, vocab_size=300, max_seq_len=32
        )
        tokenizer = loopos.load_tokenizer(tmp_path / "tokenizer")
        return Pretrainer(loopos.Transformer(config, seed=0), tokenizer)

    from loopos.data.tokenizer import train_bpe

    texts = ["a warm film", "a cold film", "no film at all"] * 4
    train_bpe(texts, 300).save(tmp_path / "tokenizer")
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    out = tmp_path / "out"
    with loopos.use_backend("numpy") as backend:
        options = Options(learning_rate=1e-3, max_steps=2, save_steps=2, batch_size=2)
        trainer().fit(tmp_path / "texts.txt", options=options, output_dir=out)
        described = backend.describe()
    state = next((out / "checkpoints").glob("step-*")) / "state.json"
    assert json.loads(state.read_text())["backend"] == described

    class Other(type(backend)):
        def describe(self):
            return super().describe() | {"isa": "of another machine"}

    with loopos.use_backend(Other()), caplog.at_level(logging.WARNING, "loopos"):
        options = Options(learning_rate=1e-3, max_steps=4, save_steps=2, batch_size=2)
        trainer().fit(tmp_path / "texts.txt", options=options, output_dir=out, resume=True)
    assert "resumed on backend numpy (of another machine) what ran on numpy (" in caplog.text


@pytest.mark.parametrize("value", ["no-such", "numpy, no-such"])
def test_a_required_backend_that_is_missing_stops_the_tests(value):
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(root / "tests" / "test_floors.py")], cwd=root,
        env=os.environ | {"LOOPOS_REQUIRE": value}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "LOOPOS_REQUIRE: backend 'no-such' is missing: there is no such backend" in done.stderr


def test_get_include_is_public():
    assert loopos.get_include() == get_include()
