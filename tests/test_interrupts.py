"""What is left of a run that is interrupted, killed or broken, and how it goes on."""

import dataclasses
import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import loopos
from loopos import ops
from loopos.autograd import Parameter, Tensor
from loopos.data.batch import Batch
from loopos.errors import CheckpointError, ConfigError, LooposError, NumericalError, OutputError
from loopos.methods.common import restore_best
from loopos.training.checkpoint import (
    damage,
    find_checkpoint,
    frozen_sha256,
    load_checkpoint,
    recover,
    save_checkpoint,
)
from loopos.training.loop import Interrupted, TrainingOptions, train
from loopos.training.trackers import Callback, MetricsFile, RunInfo

ROWS = 20
#: Three steps an epoch, six in all; evaluations and checkpoints do not fall on one step.
OPTIONS = TrainingOptions(
    learning_rate=0.05, batch_size=4, gradient_accumulation_steps=2, num_epochs=2,
    scheduler="cosine", warmup_steps=2, max_grad_norm=0.5, eval_steps=2, save_steps=3,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Weighted(TrainingOptions):
    class_weights: object = None


class Languages:
    """Next tokens of ragged texts under dropout; raises at a chosen call of a chosen function."""

    def __init__(self, moment=None, call=0):
        rng = np.random.default_rng(1)
        self.texts = [rng.integers(0, 9, size=n) for n in rng.integers(2, 7, size=ROWS)]
        self.parameters = {
            "table": Parameter(rng.normal(size=(9, 4)), "table"),
            "w": Parameter(rng.normal(size=(9, 4)), "w"),
            "frozen": Parameter(rng.normal(size=3), "frozen", requires_grad=False),
            "unused": Parameter(rng.normal(size=3), "unused"),
        }
        self.moment, self.left, self.masked = moment, call, ()

    def _at(self, moment):
        if moment == self.moment:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def counts(self, batch):
        return {"loss": float(batch.next_token_targets()[1].sum())}

    def losses(self, batch, dropout):
        self._at("losses")
        h = ops.embedding(batch.tokens, self.parameters["table"])
        h = ops.dropout(h, 0.3, dropout, batch.offsets, batch.sample_ids)
        return {
            "loss": ops.linear_cross_entropy(
                h, self.parameters["w"], *batch.next_token_targets()
            )[0]
        }  # fmt: skip

    def make(self, indices, sample_ids):
        self._at("make")
        masks = [np.full(len(self.texts[i]), i not in self.masked) for i in indices]
        texts = [self.texts[i] for i in indices]
        return Batch.from_sequences(texts, loss_masks=masks, sample_ids=sample_ids)

    def evaluate(self):
        self._at("evaluate")
        h, w = self.parameters["table"].data, self.parameters["w"].data
        return {"loss": float(np.square(h).sum() + np.square(w).sum())}

    def fit(self, options=OPTIONS, **kwargs):
        lengths = np.array([len(t) for t in self.texts])
        kwargs = {"evaluate": self.evaluate} | kwargs
        return train(self.parameters, self, self.make, lengths, options, **kwargs)


def records(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    timed = ("time_s", "tokens_per_s")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def arrays(directory, step):
    path = directory / "checkpoints" / f"step-{step:08d}"
    names = ("model.safetensors", "optimizer.safetensors")
    return {name: (path / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of the run that nothing interrupts."""
    directory = tmp_path_factory.mktemp("whole")
    assert Languages().fit(output_dir=directory).steps == 6
    return directory


def resumed_is(whole, directory, **kwargs):
    assert Languages().fit(output_dir=directory, resume=True, **kwargs).steps == 6
    assert arrays(directory, 6) == arrays(whole, 6)
    assert records(directory) == records(whole)
    assert not list((directory / "checkpoints").glob(".*"))


# Microbatches: 2 a step, but 1 in the third, whose effective batch has 4 samples.
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("moment", "call", "step"),
    [
        ("losses", 1, 0), ("losses", 2, 0), ("losses", 8, 4), ("losses", 10, 5),
        ("evaluate", 1, 2), ("evaluate", 3, 6), ("make", 1, 0), ("make", 7, None),
    ],
)  # fmt: skip
def test_ctrl_c_anywhere_and_a_resume_give_the_bytes_of_the_whole_run(
    whole, tmp_path, moment, call, step, workers
):
    options = dataclasses.replace(OPTIONS, num_workers=workers)
    with pytest.raises(Interrupted, match=r"^interrupted after step \d, saved in ") as caught:
        Languages(moment, call).fit(options, output_dir=tmp_path)
    found = json.loads((caught.value.checkpoint / "state.json").read_text())["step"]
    if step is not None:  # with workers, batches are made steps ahead
        assert found == step
    resumed_is(whole, tmp_path)


@pytest.mark.parametrize("halt", [1, 2, 3, 4, 5])
def test_stopping_and_resuming_give_the_bytes_of_the_whole_run(whole, tmp_path, halt):
    asked = []
    stopped = Languages().fit(
        output_dir=tmp_path, stop=lambda: asked.append(1) or len(asked) == halt
    )
    assert (stopped.stopped_reason, stopped.steps) == ("interrupted", halt)
    resumed_is(whole, tmp_path)


def test_an_interrupt_while_the_evaluation_is_noted_saves_before_or_after_it(
    whole, tmp_path, monkeypatch
):
    import loopos.training.loop as loop

    plain = loop.replace

    def torn(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "replace", torn)
    with pytest.raises(Interrupted) as caught:
        Languages().fit(output_dir=tmp_path)
    monkeypatch.setattr(loop, "replace", plain)
    state = json.loads((caught.value.checkpoint / "state.json").read_text())
    assert (state["evaluation_due"], state["best_step"]) == (True, None)
    resumed_is(whole, tmp_path)


def test_what_never_had_a_gradient_has_no_state_and_what_is_frozen_stays(whole):
    last = whole / "checkpoints" / "step-00000006"
    slots = load_file(last / "optimizer.safetensors")
    assert sorted({key.split("/")[1] for key in slots}) == ["table", "w"]
    weights, start = load_file(last / "model.safetensors"), Languages().parameters
    assert sorted(weights) == ["table", "unused", "w"]
    assert np.array_equal(weights["unused"], start["unused"].data)
    after = Languages()
    load_checkpoint(last, after.parameters)
    assert np.array_equal(after.parameters["frozen"].data, start["frozen"].data)


def test_the_best_weights_are_put_back_and_frozen_ones_are_left(tmp_path):
    figures = iter([0.1, 0.5, 0.6])
    work, start = Languages(), Languages().parameters
    result = work.fit(output_dir=tmp_path, evaluate=lambda: {"loss": next(figures)})
    assert result.best_checkpoint.name == "step-00000002"
    best = load_file(result.best_checkpoint / "model.safetensors")
    assert not np.array_equal(work.parameters["w"].data, best["w"])
    restore_best(result, work.parameters)
    for name in ("table", "w", "unused"):
        assert np.array_equal(work.parameters[name].data, best[name])
    assert np.array_equal(work.parameters["frozen"].data, start["frozen"].data)


# -- killed --------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("move", [1, 2])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_while_a_checkpoint_is_replaced_leaves_one_to_resume(tmp_path, move):
    """A checkpoint is moved aside (1), then the new one takes its place (2)."""
    parameters = Languages().parameters
    optimizer = loopos.AdamW(parameters)
    save_checkpoint(tmp_path, parameters, optimizer, {"step": 5, "written": 1})
    child = os.fork()
    if child == 0:
        plain, moves = os.replace, []

        def replace(a, b):
            if os.path.isdir(a):
                moves.append(1)
                if len(moves) == move:
                    os._exit(9)
            plain(a, b)

        os.replace = replace
        save_checkpoint(tmp_path, parameters, optimizer, {"step": 5, "written": 2})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (find_checkpoint(tmp_path) is None) == (move == 2)
    recover(tmp_path)
    path = find_checkpoint(tmp_path)
    assert path == tmp_path / "step-00000005"
    assert os.listdir(tmp_path) == ["step-00000005"]
    # Before the first move the old one is in place; after it, the new one is the newer of two.
    assert json.loads((path / "state.json").read_text())["written"] == move


def test_what_was_killed_before_its_rename_takes_the_place_of_a_damaged_one(tmp_path):
    parameters = Languages().parameters
    save_checkpoint(tmp_path, parameters, loopos.AdamW(parameters), {"step": 5})
    shutil.copytree(tmp_path / "step-00000005", tmp_path / ".step-00000005.0123abcd.old.tmp")
    (tmp_path / "step-00000005" / "model.safetensors").write_bytes(b"")
    recover(tmp_path)
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000005"
    assert os.listdir(tmp_path) == ["step-00000005"]


def test_what_a_kill_left_half_written_is_not_taken_for_a_checkpoint(tmp_path):
    parameters = Languages().parameters
    save_checkpoint(tmp_path, parameters, loopos.AdamW(parameters), {"step": 5})
    half = tmp_path / ".step-00000006.0123abcd.tmp"
    shutil.copytree(tmp_path / "step-00000005", half)
    (half / "manifest.json").unlink()
    assert find_checkpoint(tmp_path).name == "step-00000005"
    assert half.exists()  # somebody may be writing it
    recover(tmp_path)
    assert os.listdir(tmp_path) == ["step-00000005"]


@pytest.mark.parametrize("damaged", ["model.safetensors", "optimizer.safetensors", "state.json",
                                     "manifest.json"])  # fmt: skip
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole, tmp_path, caplog, damaged):
    asked = []
    Languages().fit(output_dir=tmp_path, stop=lambda: asked.append(1) or len(asked) == 5)
    file = tmp_path / "checkpoints" / "step-00000005" / damaged
    file.write_bytes(file.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING, "loopos"):
        resumed_is(whole, tmp_path)
    [warned] = [r.getMessage() for r in caplog.records]
    assert warned.startswith(f"skipped a damaged checkpoint: {file} ")


# -- checkpoints of other versions ---------------------------------------------------------------

FORMAT_1 = Path(__file__).with_name("fixtures") / "checkpoint_format_1"


def test_a_run_goes_on_from_a_checkpoint_of_format_1(whole, tmp_path):
    """The fixture is this run, stopped after step 3 by the code that wrote format 1."""
    shutil.copytree(FORMAT_1, tmp_path, dirs_exist_ok=True)
    stopped, asked = tmp_path / "now", []
    Languages().fit(output_dir=stopped, stop=lambda: asked.append(1) or len(asked) == 3)
    then, now = Languages(), Languages()
    state = load_checkpoint(find_checkpoint(tmp_path / "checkpoints"), then.parameters)
    assert (state["format"], state["step"]) == (1, 3)
    load_checkpoint(find_checkpoint(stopped / "checkpoints"), now.parameters)
    moments = [load_file(d / "checkpoints/step-00000003/optimizer.safetensors")
               for d in (tmp_path, stopped)]  # fmt: skip
    result = Languages().fit(output_dir=tmp_path, resume=True)
    assert (result.steps, result.best_checkpoint.name) == (6, "step-00000006")
    last = json.loads((tmp_path / "checkpoints/step-00000006/state.json").read_text())
    expected = json.loads((whole / "checkpoints/step-00000006/state.json").read_text())
    assert (last["format"], last["frozen_sha256"]) == (2, expected["frozen_sha256"])
    for name, parameter in now.parameters.items():
        np.testing.assert_allclose(then.parameters[name].data, parameter.data, rtol=1e-9)
    # Other processors and libraries round otherwise; where they do not, all bytes are the same.
    pairs = [(then.parameters[n].data, p.data) for n, p in now.parameters.items()]
    pairs += [(array, moments[1][name]) for name, array in moments[0].items()]
    if all(np.array_equal(before, after) for before, after in pairs):
        assert arrays(tmp_path, 6) == arrays(whole, 6)
        assert records(tmp_path) == records(whole)
    else:
        ends = [load_file(d / "checkpoints/step-00000006/model.safetensors")
                for d in (tmp_path, whole)]  # fmt: skip
        for name, array in ends[1].items():
            np.testing.assert_allclose(ends[0][name], array, rtol=1e-9)


def test_a_checkpoint_of_format_1_brings_its_frozen_parameters(tmp_path):
    shutil.copytree(FORMAT_1, tmp_path, dirs_exist_ok=True)
    work, plain = Languages(), Languages()
    work.parameters["frozen"].data[:] = 7.0
    work.fit(output_dir=tmp_path, resume=True)
    assert np.array_equal(work.parameters["frozen"].data, plain.parameters["frozen"].data)
    state = json.loads((tmp_path / "checkpoints/step-00000006/state.json").read_text())
    assert state["frozen_sha256"] == frozen_sha256(plain.parameters)


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype", "one more"])
def test_other_frozen_parameters_are_refused_and_nothing_is_changed(tmp_path, change):
    asked = []
    Languages().fit(output_dir=tmp_path, stop=lambda: asked.append(1) or len(asked) == 3)
    other = Languages()
    frozen = other.parameters["frozen"].data
    if change == "value":
        frozen[1] = np.nextafter(frozen[1], 1.0)
    elif change == "one more":
        other.parameters["more"] = Parameter(frozen, "more", requires_grad=False)
    elif change == "name":
        del other.parameters["frozen"]
        other.parameters["cold"] = Parameter(frozen, "cold", requires_grad=False)
    else:
        frozen = frozen[None] if change == "shape" else frozen.astype(np.float32)
        other.parameters["frozen"] = Parameter(frozen, "frozen", requires_grad=False)
    before = {n: p.data.copy() for n, p in other.parameters.items()}
    with pytest.raises(CheckpointError) as caught:
        other.fit(output_dir=tmp_path, resume=True)
    assert str(caught.value) == (
        f"{tmp_path}/checkpoints/step-00000003: "
        "the frozen parameters are not those that the run began with"
    )
    assert all(np.array_equal(p.data, before[n]) for n, p in other.parameters.items())


def test_the_digest_of_frozen_parameters_is_computed_once_a_run(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "loopos.training.loop.frozen_sha256",
        lambda parameters: calls.append(1) or frozen_sha256(parameters),
    )
    Languages().fit(dataclasses.replace(OPTIONS, save_steps=1), output_dir=tmp_path)
    assert len(calls) == 1
    Languages().fit(output_dir=tmp_path / "none written")
    assert len(calls) == 2
    Languages().fit()
    assert len(calls) == 2


def test_an_option_that_a_checkpoint_does_not_know_has_its_default(tmp_path):
    asked = []
    Languages().fit(output_dir=tmp_path, stop=lambda: asked.append(1) or len(asked) == 3)
    options = {f.name: getattr(OPTIONS, f.name) for f in dataclasses.fields(OPTIONS)}
    with pytest.raises(CheckpointError, match=r"training\.class_weights was None, now it is \[2.0"):
        Languages().fit(Weighted(**options, class_weights=[2.0]), output_dir=tmp_path, resume=True)
    assert Languages().fit(Weighted(**options), output_dir=tmp_path, resume=True).steps == 6


def test_a_checkpoint_that_no_run_wrote_is_no_run_to_continue(tmp_path):
    work = Languages()
    optimizer = loopos.AdamW({n: p for n, p in work.parameters.items() if p.requires_grad})
    save_checkpoint(tmp_path / "checkpoints", work.parameters, optimizer, {"step": 5})
    with pytest.raises(CheckpointError, match=r"step-00000005: holds no 'epoch', so no run can"):
        work.fit(output_dir=tmp_path, resume=True)


# -- refused, or told ------------------------------------------------------------------------------


def test_a_lost_best_checkpoint_is_told_on_resume_not_when_all_is_done(tmp_path, caplog):
    figures, asked = iter([0.1, 0.5]), []
    Languages().fit(
        output_dir=tmp_path, evaluate=lambda: {"loss": next(figures)},
        stop=lambda: asked.append(1) or len(asked) == 5,
    )  # fmt: skip
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    with caplog.at_level(logging.WARNING, "loopos"):
        result = Languages().fit(output_dir=tmp_path, evaluate=lambda: {"loss": 0.7}, resume=True)
    assert "the best checkpoint is lost" in caplog.text
    assert "step-00000002" in caplog.text
    assert (result.best_metric, result.best_checkpoint.name) == (0.7, "step-00000006")
    assert result.best_checkpoint.is_dir()


@pytest.mark.parametrize(
    ("name", "trained", "words"),
    [("frozen", True, "was frozen, now it is trained"), ("w", False, "was trained, now it is f")],
)
def test_resume_needs_the_same_parameters_trained(tmp_path, name, trained, words):
    Languages().fit(output_dir=tmp_path)
    other = Languages()
    other.parameters[name].requires_grad = trained
    before = {n: p.data.copy() for n, p in other.parameters.items()}
    with pytest.raises(CheckpointError, match=f"parameter '{name}' {words}"):
        other.fit(dataclasses.replace(OPTIONS, num_epochs=3), output_dir=tmp_path, resume=True)
    assert all(np.array_equal(p.data, before[n]) for n, p in other.parameters.items())


def test_what_no_checkpoint_can_hold_is_found_before_training(tmp_path):
    for value in ({"data": {"path": tmp_path}}, {"rate": float("nan")}):
        with pytest.raises(ConfigError, match="^run_config: a checkpoint cannot hold it"):
            Languages("make", 1).fit(output_dir=tmp_path, run_config=value)
    with pytest.raises(ConfigError, match=r"^training\.class_weights: a checkpoint cannot hold it"):
        Languages("make", 1).fit(Weighted(class_weights=np.ones(2)), output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tuples_and_lists_of_options_are_the_same_on_resume(tmp_path):
    for weights, resume in (((1.0, 3.0), False), ([1.0, 3.0], True), ([1.0, 0.1 + 0.2], None)):
        options = Weighted(max_steps=2, class_weights=weights)
        if resume is None:
            with pytest.raises(CheckpointError, match=r"class_weights was \[1.0, 3.0\], now it is"):
                Languages().fit(options, output_dir=tmp_path, resume=True)
        else:
            assert Languages().fit(options, output_dir=tmp_path, resume=resume).steps == 2


def test_an_integer_of_numpy_is_a_seed_and_a_fraction_is_none(tmp_path):
    Languages().fit(output_dir=tmp_path / "a", seed=np.int64(3))
    Languages().fit(output_dir=tmp_path / "b", seed=3)
    assert arrays(tmp_path / "a", 6) == arrays(tmp_path / "b", 6)
    with pytest.raises(ConfigError, match=r"seed: expected an integer, found 3\.5"):
        Languages().fit(seed=3.5)


def test_any_figure_that_is_not_finite_is_named_and_the_state_saved(tmp_path):
    figures = {"loss": 1.0, "auc": np.float32("nan"), "curve": [[1.0], [2.0, 3.0]]}
    with pytest.raises(NumericalError, match=r"step 2: the evaluation's auc is nan; the state"):
        Languages().fit(output_dir=tmp_path, evaluate=lambda: figures)
    assert find_checkpoint(tmp_path / "checkpoints").name == "step-00000002"
    assert [r["step"] for r in records(tmp_path)] == [1, 2]


def test_a_full_disk_does_not_hide_what_was_wrong(tmp_path, monkeypatch):
    def full(*args):
        raise OutputError("there: cannot be written (No space left on device)")

    monkeypatch.setattr("loopos.training.loop.save_checkpoint", full)
    work = Languages()
    work.losses = lambda batch, dropout: {"loss": Tensor(np.array(np.nan))}
    with pytest.raises(
        NumericalError, match=r"loss is .*; the state before it is lost: .*No space"
    ):
        work.fit(output_dir=tmp_path)


@pytest.mark.parametrize(
    ("function", "least"), [("os.fsync", 12), ("os.replace", 3), ("pathlib.Path.write_text", 4)]
)
def test_a_disk_that_is_full_at_any_moment_loses_no_checkpoint(
    whole, tmp_path, monkeypatch, function, least
):
    """Each call in turn fails, as the first of a full disk; with space again, the run goes on."""
    module, _, name = function.rpartition(".")
    owner = Path if module == "pathlib.Path" else os
    plain = getattr(owner, name)
    for failing in range(1, 1000):
        directory, calls, before = tmp_path / str(failing), [], []

        def full(
            *arguments, _calls=calls, _failing=failing, _before=before, _in=directory, **named
        ):
            _calls.append(1)
            if len(_calls) >= _failing:
                _before[:] = [p for p in (_in / "checkpoints").glob("step-*") if not damage(p)]
                raise OSError(28, "No space left on device")
            return plain(*arguments, **named)

        monkeypatch.setattr(owner, name, full)
        told = None
        try:
            Languages().fit(output_dir=directory)
        except OutputError as error:
            told = str(error)
        monkeypatch.setattr(owner, name, plain)
        if told is None:
            break
        assert re.fullmatch(r"/.*: cannot be written \(No space left on device\)", told)
        assert [path for path in before if damage(path)] == []
        found = find_checkpoint(directory / "checkpoints")
        assert (found is None) == (before == [])
        if found is None:
            Languages().fit(output_dir=directory)
            assert arrays(directory, 6) == arrays(whole, 6)
        else:
            resumed_is(whole, directory)
        assert not list(directory.rglob("*.tmp"))
    assert failing > least  # there were so many calls to fail
    assert arrays(directory, 6) == arrays(whole, 6)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence_when_metrics_are_closed_too(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.on_start(RunInfo(2, 0, 4, tmp_path))
    file._file.close()
    file._file = Path("/dev/full").open("w")  # noqa: SIM115
    with pytest.raises(OutputError, match=r"metrics.jsonl: cannot be written \(No space left"):
        file.on_step({"step": 1})
    with pytest.raises(OutputError, match=r"metrics.jsonl: cannot be written \(No space left"):
        file.on_end()
    file.on_end()  # once is enough


def test_a_term_may_not_take_the_place_of_a_column():
    work = Languages()
    plain = work.losses

    def losses(batch, dropout):
        return {"tokens": plain(batch, dropout)["loss"], "kl": plain(batch, dropout)["loss"]}

    work.losses, work.counts = losses, lambda batch: {"tokens": 1.0, "kl": 1.0}
    with pytest.raises(LooposError, match="the objective's term 'tokens' is called as a column"):
        work.fit()


def test_a_masked_microbatch_among_others_changes_nothing_but_the_count():
    """The samples of one microbatch count nothing: the step is that of the others."""
    options = dataclasses.replace(
        OPTIONS, shuffle=False, max_steps=1, optimizer="sgd", max_grad_norm=None,
        scheduler="constant", warmup_steps=0,
    )  # fmt: skip
    masked, alone = Languages(), Languages()
    masked.masked = (4, 5, 6, 7)
    alone.texts = alone.texts[:4]
    results = [w.fit(options, evaluate=None) for w in (masked, alone)]
    assert results[0].history[0]["loss"] == pytest.approx(results[1].history[0]["loss"], rel=1e-12)
    for name, parameter in alone.parameters.items():
        np.testing.assert_allclose(masked.parameters[name].data, parameter.data, rtol=1e-12)
    masked.masked = range(8)
    with pytest.raises(NumericalError, match=r"step 1: nothing counts towards loss \(samples 0, 1"):
        masked.fit(options, evaluate=None)


@pytest.mark.parametrize(
    ("epochs", "limit", "steps", "last"),
    [(2, 4, 4, 1), (2, 99, 6, 1), (None, 7, 7, 2), (None, None, 3, 0), (10**9, 4, 4, 1)],
)
def test_a_run_ends_after_its_epochs_or_its_steps_whichever_is_first(epochs, limit, steps, last):
    options = dataclasses.replace(OPTIONS, num_epochs=epochs, max_steps=limit)
    result = Languages().fit(options)
    assert (result.steps, result.history[-1]["epoch"]) == (steps, last)


@pytest.mark.parametrize("fails", ["on_start", "on_step", "on_evaluate"])
def test_every_callback_is_told_of_the_end_whoever_fails(fails):
    ended = []

    class Ends(Callback):
        def on_end(self):
            ended.append(self)

    class Fails(Ends):
        def on_end(self):
            super().on_end()
            raise RuntimeError("at the end too")

    def fail(*args):
        raise RuntimeError("no")

    first, second = Ends(), Fails()
    setattr(second, fails, fail)
    with pytest.raises(RuntimeError):
        Languages().fit(callbacks=[first, second])
    assert ended == [second, first]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_where_the_newest_checkpoint_is_damaged_the_run_goes_on_from_the_one_before(
    tmp_path, name, caplog
):
    """The newest is the best too, as every evaluation is better than the one before."""
    figures = iter(range(100, 0, -1))

    def work():
        made = Languages()
        made.evaluate = lambda: {"loss": float(next(figures))}
        return made

    options = dataclasses.replace(OPTIONS, eval_steps=1, save_steps=1)
    work().fit(options, output_dir=tmp_path / "whole")
    asked = []
    work().fit(options, output_dir=tmp_path / "cut", stop=lambda: asked.append(1) or len(asked) > 3)
    file = tmp_path / "cut" / "checkpoints" / "step-00000004" / name
    flipped = bytearray(file.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    file.write_bytes(flipped)
    with caplog.at_level(logging.WARNING, "loopos"):
        work().fit(options, output_dir=tmp_path / "cut", resume=True)
    assert "skipped a damaged checkpoint" in caplog.text
    assert "step-00000004" in caplog.text
    assert arrays(tmp_path / "cut", 6) == arrays(tmp_path / "whole", 6)
    steps = [r["step"] for r in records(tmp_path / "cut") if "eval" not in r]
    assert steps == [1, 2, 3, 4, 5, 6]
