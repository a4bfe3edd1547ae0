"""The loop: what it divides by, when it evaluates and saves, and when it refuses to go on."""

import dataclasses
import json
import threading

import numpy as np
import pytest

from loopos import ops
from loopos.autograd import Parameter, Tensor
from loopos.data.batch import Batch
from loopos.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    LooposError,
    NumericalError,
    OutputError,
)
from loopos.training.checkpoint import find_checkpoint, read_state
from loopos.training.loop import TrainingOptions, train
from loopos.training.schedules import make_schedule
from loopos.training.trackers import Callback

ROWS, WIDTH = 20, 3


class Regression:
    """Softmax classification of fixed rows by one matrix; tokens hold the row numbers."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(ROWS, WIDTH))
        self.y = (self.x[:, 0] > 0).astype(np.int64)
        self.parameters = {
            "w": Parameter(rng.normal(size=(2, WIDTH)), "w"),
            "frozen": Parameter(np.ones(2), "frozen", requires_grad=False),
        }
        self.seen = []

    def counts(self, batch):
        return {"loss": float(batch.num_sequences)}

    def losses(self, batch, dropout):
        rows = batch.tokens
        self.seen.append(rows.tolist())
        logits = ops.linear(Tensor(self.x[rows]), self.parameters["w"])
        return {"loss": ops.cross_entropy(logits, self.y[rows])[0]}

    def make(self, indices, sample_ids):
        return Batch.from_sequences([[i] for i in indices], sample_ids=sample_ids)

    def value(self):
        z = self.x @ self.parameters["w"].data.T
        logp = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        return {"loss": float(-logp[np.arange(ROWS), self.y].mean())}

    def fit(self, options, **kwargs):
        lengths = np.ones(ROWS, np.int64)
        return train(self.parameters, self, self.make, lengths, options, **kwargs)


BASE = TrainingOptions(learning_rate=0.1, batch_size=8, num_epochs=2)


def change(**values):
    return dataclasses.replace(BASE, **values)


def final(options, seed=0):
    work = Regression()
    work.fit(options, seed=seed)
    return work.parameters["w"].data.copy()


def test_a_step_is_the_mean_gradient_of_the_whole_effective_batch():
    work = Regression()
    start = work.parameters["w"].data.copy()
    options = TrainingOptions(
        learning_rate=0.5, batch_size=7, gradient_accumulation_steps=3, max_steps=1,
        optimizer="sgd", momentum=0.0, weight_decay=0.0,
    )  # fmt: skip
    result = work.fit(options)
    z = work.x @ start.T
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    gradient = (p - np.eye(2)[work.y]).T @ work.x / ROWS
    np.testing.assert_allclose(work.parameters["w"].data, start - 0.5 * gradient, rtol=1e-12)
    assert [len(rows) for rows in work.seen] == [7, 7, 6]
    assert result.history[0]["grad_norm"] == pytest.approx(np.linalg.norm(gradient))
    assert result.history[0]["tokens"] == ROWS


def test_records_hold_what_dashboards_expect():
    work = Regression()
    result = work.fit(BASE)
    assert (result.steps, result.stopped_reason) == (6, "finished")
    assert [r["step"] for r in result.history] == [1, 2, 3, 4, 5, 6]
    assert [r["epoch"] for r in result.history] == [0, 0, 0, 1, 1, 1]
    for key in ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s", "time_s"):
        assert all(np.isfinite(r[key]) for r in result.history), key
    assert sorted(row for rows in work.seen[:3] for row in rows) == list(range(ROWS))


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 0.05}, {"batch_size": 5}, {"batch_tokens": 5}, {"num_epochs": 3},
        {"max_steps": 2}, {"optimizer": "adam", "weight_decay": 0.5}, {"optimizer": "sgd"},
        {"weight_decay": 0.5}, {"betas": (0.5, 0.9)}, {"eps": 1e-2},
        {"optimizer": "sgd", "momentum": 0.1}, {"scheduler": "linear"}, {"scheduler": "cosine"},
        {"warmup_steps": 3}, {"max_grad_norm": 0.01, "optimizer": "sgd"},
        {"gradient_accumulation_steps": 2}, {"shuffle": False},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_changes_the_result(values):
    base = BASE
    if values.get("optimizer") and len(values) > 1:
        base = change(optimizer=values["optimizer"])
    changed = dataclasses.replace(base, **values)
    assert np.abs(final(changed) - final(base)).max() > 1e-6


def test_the_seed_orders_and_workers_do_not_matter():
    assert not np.array_equal(final(BASE, seed=1), final(BASE))
    for depth, workers in ((2, 2), (5, 1)):
        assert np.array_equal(
            final(change(prefetch_batches=depth, num_workers=workers)), final(BASE)
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0), ("learning_rate", float("nan")), ("batch_size", 0),
        ("learning_rate", 10**400), ("batch_size", 10**400), ("max_grad_norm", float("inf")),
        ("batch_tokens", 0), ("num_epochs", 0), ("max_steps", 0), ("weight_decay", -1.0),
        ("betas", (0.9, 1.0)), ("eps", 0.0), ("momentum", 1.0), ("warmup_steps", -1),
        ("max_grad_norm", 0.0), ("gradient_accumulation_steps", 0), ("prefetch_batches", -1),
        ("num_workers", -1), ("eval_steps", 0), ("early_stopping_patience", 0),
        ("save_steps", 0), ("optimizer", "lion"), ("scheduler", "cosin"),
    ],
)  # fmt: skip
def test_options_out_of_range_name_their_key(name, value):
    with pytest.raises(ConfigError, match=rf"^training\.{name}: expected "):
        change(**{name: value})


def test_clipping_scales_to_the_norm():
    options = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "max_steps": 1}
    work = Regression()
    start = work.parameters["w"].data.copy()
    work.fit(change(max_grad_norm=0.01, **options))
    moved = np.linalg.norm(work.parameters["w"].data - start)
    assert moved == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_each_step_has_the_rate_of_its_number_from_0(name):
    history = Regression().fit(change(scheduler=name, warmup_steps=2)).history
    rate = make_schedule(name, 0.1, 2, 6)
    assert [r["learning_rate"] for r in history] == [rate(step) for step in range(6)]
    still = Regression()
    start = still.parameters["w"].data.copy()
    still.fit(change(scheduler=name, warmup_steps=2, max_steps=1))
    assert np.array_equal(still.parameters["w"].data, start)  # the first rate of a warm-up is 0


class Heard(Callback):
    def __init__(self):
        self.calls = []

    def on_start(self, info):
        self.calls.append(("start", info.total_steps))

    def on_step(self, record):
        self.calls.append(("step", record["step"]))

    def on_evaluate(self, record):
        self.calls.append(("eval", record["step"]))

    def on_end(self):
        self.calls.append(("end",))


def test_evaluations_come_when_they_are_due_and_at_the_end():
    for every, expected in ((None, [3, 6]), (2, [2, 4, 6]), (4, [4, 6])):
        work, heard = Regression(), Heard()
        work.fit(change(eval_steps=every), evaluate=work.value, callbacks=[heard])
        assert [c[1] for c in heard.calls if c[0] == "eval"] == expected
        assert heard.calls[0] == ("start", 6)
        assert heard.calls[-1] == ("end",)


def steps_saved(directory):
    return sorted(int(p.name.split("-")[1]) for p in (directory / "checkpoints").iterdir())


def test_the_best_and_the_last_checkpoint_are_kept(tmp_path):
    work = Regression()
    figures = iter([0.9, 0.3, 0.5, 0.4])
    result = work.fit(
        change(num_epochs=4), evaluate=lambda: {"loss": next(figures)}, output_dir=tmp_path
    )
    assert steps_saved(tmp_path) == [6, 12]
    assert (result.best_metric, result.best_checkpoint.name) == (0.3, "step-00000006")
    assert result.last_checkpoint.name == "step-00000012"


def test_the_monitor_may_go_up(tmp_path):
    work = Regression()
    figures = iter([0.1, 0.7, 0.5])
    result = work.fit(
        change(num_epochs=3), evaluate=lambda: {"accuracy": next(figures)},
        monitor=("accuracy", "max"), output_dir=tmp_path,
    )  # fmt: skip
    assert result.best_metric == 0.7
    with pytest.raises(ConfigError, match="no figure 'f1'"):
        Regression().fit(BASE, evaluate=lambda: {"loss": 1.0}, monitor=("f1", "max"))


def test_early_stopping_counts_evaluations_without_a_better_one():
    figures = iter([0.5, 0.6, 0.4, 0.45, 0.5, 0.1])
    result = Regression().fit(
        change(num_epochs=6, early_stopping_patience=2), evaluate=lambda: {"loss": next(figures)}
    )
    assert (result.stopped_reason, result.steps, result.best_metric) == ("early_stopping", 15, 0.4)


def test_a_tie_is_not_better():
    result = Regression().fit(
        change(num_epochs=5, early_stopping_patience=2), evaluate=lambda: {"loss": 0.5}
    )
    assert (result.stopped_reason, result.steps) == ("early_stopping", 9)
    assert [e["best"] for e in result.evaluations] == [True, False, False]


def test_nothing_is_written_without_an_output_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = Regression()
    result = work.fit(BASE, evaluate=work.value)
    assert list(tmp_path.iterdir()) == []
    assert (result.best_checkpoint, result.last_checkpoint) == (None, None)


def test_a_place_that_cannot_be_written_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    work = Regression()
    with pytest.raises(OutputError, match="cannot be written"):
        work.fit(BASE, output_dir=tmp_path / "file" / "run")
    assert work.seen == []


def test_save_steps(tmp_path):
    saved = []

    class Look(Callback):
        def on_step(self, record):
            saved.append(steps_saved(tmp_path) if record["step"] > 2 else None)

    Regression().fit(change(save_steps=2), output_dir=tmp_path, callbacks=[Look()])
    assert saved[2:] == [[2], [2], [2, 4], [2, 4]]
    assert steps_saved(tmp_path) == [4, 6]


# -- refusals ------------------------------------------------------------------------------------


def test_a_batch_where_nothing_counts_is_an_error_not_loss_0(tmp_path):
    work = Regression()
    work.counts = lambda batch: {"loss": 0.0 if 4 in batch.tokens else 8.0}
    message = r"step \d: nothing counts towards loss \(samples .*\b4\b.*; the state before it is in"
    with pytest.raises(NumericalError, match=message):
        work.fit(change(shuffle=False), output_dir=tmp_path)


def test_a_loss_that_is_not_finite_stops_with_the_state_before_it_saved(tmp_path):
    work, heard = Regression(), Heard()
    work.x[9] = np.nan
    options = change(shuffle=False, save_steps=100)
    with pytest.raises(NumericalError, match=r"^step 2: loss is nan \(samples 8, 9, 10"):
        work.fit(options, output_dir=tmp_path, callbacks=[heard])
    assert heard.calls[-1] == ("end",)
    assert steps_saved(tmp_path) == [1]
    assert np.isfinite(work.parameters["w"].data).all()


def test_a_gradient_that_is_not_finite_names_its_parameter():
    work = Regression()
    plain = work.losses

    def losses(batch, dropout):
        terms = plain(batch, dropout)
        work.parameters["w"].add_grad(np.full((2, WIDTH), np.inf))
        return terms

    work.losses = losses
    start = work.parameters["w"].data.copy()
    with pytest.raises(NumericalError, match=r"step 1: the gradient of 'w' is not finite"):
        work.fit(BASE)
    assert np.array_equal(work.parameters["w"].data, start)


def test_an_evaluation_that_is_not_finite_stops():
    with pytest.raises(NumericalError, match="step 3: the evaluation's loss is nan"):
        Regression().fit(BASE, evaluate=lambda: {"loss": float("nan")})


def test_there_must_be_something_to_train():
    work = Regression()
    work.parameters["w"].requires_grad = False
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        work.fit(BASE)
    with pytest.raises(ConfigError, match="no sample"):
        train({}, work, work.make, np.zeros(0), BASE)


# -- resume --------------------------------------------------------------------------------------


@pytest.fixture
def halted(tmp_path):
    asked = []
    Regression().fit(BASE, output_dir=tmp_path, stop=lambda: asked.append(1) or len(asked) == 4)
    assert steps_saved(tmp_path) == [3, 4]
    return tmp_path


def test_resume_needs_the_same_run(halted):
    with pytest.raises(CheckpointError, match=r"training.learning_rate was 0.1, now it is 0.2"):
        Regression().fit(change(learning_rate=0.2), output_dir=halted, resume=True)
    with pytest.raises(CheckpointError, match="seed was 0, now it is 1"):
        Regression().fit(BASE, output_dir=halted, resume=True, seed=1)
    other = Regression()
    with pytest.raises(CheckpointError, match="num_samples was 20, now it is 19"):
        train(
            other.parameters, other, other.make, np.ones(19), BASE, output_dir=halted, resume=True
        )
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        Regression().fit(BASE, output_dir=halted / "nothing", resume=True)


def test_a_run_may_be_made_longer(halted):
    longer = Regression()
    result = longer.fit(change(num_epochs=3), output_dir=halted, resume=True)
    assert result.steps == 9
    assert np.array_equal(longer.parameters["w"].data, final(change(num_epochs=3)))
    lines = [json.loads(x) for x in (halted / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(1, 10))


def test_resuming_a_finished_run_does_nothing_more(tmp_path):
    first = Regression()
    first.fit(BASE, output_dir=tmp_path)
    again = Regression()
    result = again.fit(BASE, output_dir=tmp_path, resume=True)
    assert (result.steps, result.history, again.seen) == (6, [], [])
    assert np.array_equal(again.parameters["w"].data, first.parameters["w"].data)


def test_an_interrupt_inside_the_update_saves_nothing_half_done(tmp_path, monkeypatch):
    from loopos.training.loop import Interrupted
    from loopos.training.optim import AdamW

    plain, calls = AdamW.step, []

    def step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            self.parameters["w"].data[0] = 99.0  # half of the update is there
            raise KeyboardInterrupt
        plain(self, *args, **kwargs)

    monkeypatch.setattr(AdamW, "step", step)
    with pytest.raises(Interrupted, match="in the update of step 4; continue from .*00000003"):
        Regression().fit(BASE, output_dir=tmp_path)
    monkeypatch.undo()
    rest = Regression()
    rest.fit(BASE, output_dir=tmp_path, resume=True)
    assert np.array_equal(rest.parameters["w"].data, final(BASE))


def test_a_refused_resume_changes_no_weight(halted):
    for values in ({"learning_rate": 0.2}, {"optimizer": "sgd"}, {"num_epochs": 1}):
        work = Regression()
        before = work.parameters["w"].data.copy()
        (name,) = values
        with pytest.raises(CheckpointError, match=rf"training\.{name} was "):
            work.fit(change(**values), output_dir=halted, resume=True)
        assert np.array_equal(work.parameters["w"].data, before)


def test_a_run_cannot_be_made_shorter(halted):
    with pytest.raises(CheckpointError, match=r"training.max_steps was None, now it is 5: a run"):
        Regression().fit(change(max_steps=5), output_dir=halted, resume=True)


def test_resume_needs_the_same_texts_and_keeps_what_it_is_told_beside_them(tmp_path):
    for heads in (2, 4):  # what a section of a configuration means is for its owner to compare
        config = {"model": {"num_heads": heads}}
        options = change(max_steps=heads)
        Regression().fit(options, output_dir=tmp_path, run_config=config, resume=heads == 4)
        assert read_state(find_checkpoint(tmp_path / "checkpoints"))["run_config"] == config
    other = Regression()
    lengths = np.ones(ROWS, np.int64)
    lengths[3] = 2
    options = change(max_steps=4)
    with pytest.raises(CheckpointError, match="lengths_sha256 was"):
        train(
            other.parameters, other, other.make, lengths, options, output_dir=tmp_path, resume=True
        )


def test_a_new_run_does_not_delete_the_checkpoints_of_another(halted):
    before = {p: p.read_bytes() for p in halted.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="already holds the checkpoints of a run; resume it"):
        Regression().fit(BASE, output_dir=halted)
    assert {p: p.read_bytes() for p in halted.rglob("*") if p.is_file()} == before


def test_resume_needs_a_directory():
    with pytest.raises(ConfigError, match="resume: needs the output_dir"):
        Regression().fit(BASE, resume=True)


def test_weights_that_are_not_finite_are_named_and_never_saved(tmp_path):
    work = Regression()
    work.parameters["w"].data[1, 2] = np.nan
    with pytest.raises(NumericalError, match="step 1: loss is nan .*parameter 'w' was not finite"):
        work.fit(BASE, output_dir=tmp_path)
    assert not (tmp_path / "checkpoints").exists()

    class Spoils(Callback):
        def on_step(self, record):
            if record["step"] == 5:
                broken.parameters["w"].data[0, 0] = np.inf

    broken = Regression()
    with pytest.raises(NumericalError, match="step 5: parameter 'w' is not finite any more"):
        broken.fit(change(save_steps=1), output_dir=tmp_path, callbacks=[Spoils()])
    assert steps_saved(tmp_path) == [3, 4]


def test_one_state_is_written_once(tmp_path, monkeypatch):
    import loopos.training.loop as loop

    plain, written = loop.save_checkpoint, []

    def save(root, parameters, optimizer, state):
        written.append(state["step"])
        return plain(root, parameters, optimizer, state)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    work = Regression()  # each evaluation is the best so far: best, epoch's end and run's end agree
    figures = iter([3.0, 2.0])
    work.fit(BASE, evaluate=lambda: {"loss": next(figures)}, output_dir=tmp_path)
    assert written == [3, 6]


def test_terms_without_a_count_and_counts_without_a_term_are_refused():
    work = Regression()
    plain = work.losses
    work.losses = lambda batch, dropout: {"nll": plain(batch, dropout)["loss"]}
    work.counts = lambda batch: {"nll": 8.0, "kl": 8.0}
    with pytest.raises(LooposError, match="the objective counts 'kl', but has no loss"):
        work.fit(BASE)
    work = Regression()
    work.counts = lambda batch: {"nll": 8.0}
    with pytest.raises(LooposError, match="the objective has a loss 'loss', but no count"):
        work.fit(BASE)


def test_what_cannot_be_is_refused_before_training():
    work = Regression()
    with pytest.raises(ConfigError, match="monitor: expected 'min' or 'max', found 'maximum'"):
        work.fit(BASE, evaluate=work.value, monitor=("loss", "maximum"))
    with pytest.raises(ConfigError, match=r"training.early_stopping_patience: needs validation"):
        work.fit(change(early_stopping_patience=1))
    assert work.seen == []


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("batch_size", "16", "an integer"), ("batch_size", 2.5, "an integer"),
        ("batch_size", None, "an integer"), ("num_epochs", True, "an integer"),
        ("learning_rate", "1e-4", "a number"), ("shuffle", 1, "true or false"),
        ("betas", (0.9,), "two numbers in"), ("betas", "no", "two numbers in"),
        ("optimizer", "adamm", "one of adamw, adam, sgd, found 'adamm'; did you mean 'adam"),
    ],
)  # fmt: skip
def test_options_of_the_wrong_kind_name_their_key(name, value, expected):
    with pytest.raises(ConfigError, match=rf"^training\.{name}: expected {expected}"):
        change(**{name: value})


def test_numbers_of_numpy_are_options_that_checkpoints_can_hold(tmp_path):
    options = change(batch_size=np.int64(8), learning_rate=np.float32(0.5), betas=[0.9, 0.99])
    assert (type(options.batch_size), type(options.learning_rate)) == (int, float)
    Regression().fit(options, output_dir=tmp_path)
    assert steps_saved(tmp_path) == [3, 6]


def test_an_interrupt_while_a_record_is_written_repeats_the_step(tmp_path, monkeypatch):
    from loopos.training.loop import Interrupted
    from loopos.training.trackers import MetricsFile

    plain = MetricsFile.on_step

    def half(self, record):
        if record["step"] == 4:
            self._file.write('{"step": 4, "lo')
            raise KeyboardInterrupt
        plain(self, record)

    monkeypatch.setattr(MetricsFile, "on_step", half)
    with pytest.raises(Interrupted, match="continue from .*00000003"):
        Regression().fit(BASE, output_dir=tmp_path)
    monkeypatch.undo()
    rest = Regression()
    rest.fit(BASE, output_dir=tmp_path, resume=True)
    assert np.array_equal(rest.parameters["w"].data, final(BASE))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_thread_outlives_a_run_that_failed(workers):
    work = Regression()
    work.x[9] = np.nan
    options = change(shuffle=False, batch_size=2, num_workers=workers, prefetch_batches=3)
    with pytest.raises(NumericalError) as caught:
        work.fit(options)
    names = [t.name for t in threading.enumerate()]
    assert caught.value.__traceback__ is not None  # the frames of the loop are still held
    assert [n for n in names if n.startswith("loopos-prefetch")] == []


class TwoTerms(Regression):
    """Ragged texts, dropout, and two terms that count different things."""

    def __init__(self, rate):
        super().__init__()
        rng = np.random.default_rng(1)
        self.rate = rate
        self.texts = [rng.integers(0, 9, size=n) for n in rng.integers(1, 6, size=ROWS)]
        self.parameters = {
            "table": Parameter(rng.normal(size=(9, 4)), "table"),
            "w": Parameter(rng.normal(size=(9, 4)), "w"),
            "head": Parameter(rng.normal(size=(2, 4)), "head"),
        }

    def counts(self, batch):
        tokens = batch.next_token_targets()[1].sum()
        return {"language": float(tokens), "texts": float(batch.num_sequences)}

    def losses(self, batch, dropout):
        h = ops.embedding(batch.tokens, self.parameters["table"])
        h = ops.dropout(h, self.rate, dropout, batch.offsets, batch.sample_ids)
        targets, weights = batch.next_token_targets()
        language, _ = ops.linear_cross_entropy(h, self.parameters["w"], targets, weights)
        logits = ops.linear(ops.segment_mean(h, batch.offsets), self.parameters["head"])
        return {"language": language, "texts": ops.cross_entropy(logits, batch.labels)[0]}

    def make(self, indices, sample_ids):
        texts = [self.texts[i] for i in indices]
        return Batch.from_sequences(texts, labels=self.y[indices], sample_ids=sample_ids)

    def after(self, size, accumulated):
        options = TrainingOptions(
            learning_rate=0.1, batch_size=size, gradient_accumulation_steps=accumulated,
            num_epochs=2, optimizer="sgd", max_grad_norm=0.5,
        )  # fmt: skip
        lengths = np.array([len(t) for t in self.texts])
        history = train(self.parameters, self, self.make, lengths, options).history
        weights = {name: p.data for name, p in self.parameters.items()}
        return weights, [
            [r[k] for k in ("loss", "language", "texts", "grad_norm")] for r in history
        ]


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_accumulating_is_one_large_batch_with_dropout_and_terms_of_unlike_counts(rate):
    weights, records = TwoTerms(rate).after(8, 1)
    assert len(records) == 6
    for size, accumulated in ((1, 8), (2, 4)):
        others, found = TwoTerms(rate).after(size, accumulated)
        np.testing.assert_allclose(found, records, rtol=1e-12)
        for name, expected in weights.items():
            np.testing.assert_allclose(others[name], expected, rtol=0, atol=1e-12, err_msg=name)
    # and another effective batch is another run
    assert TwoTerms(rate).after(3, 3)[1][0] != records[0]


def test_the_norm_is_over_all_that_is_trained_and_nothing_else():
    work = TwoTerms(0.0)
    work.parameters["w"].requires_grad = False
    before = {name: p.data.copy() for name, p in work.parameters.items()}
    options = TrainingOptions(
        learning_rate=1.0, batch_size=ROWS, max_steps=1, optimizer="sgd", momentum=0.0,
        weight_decay=0.0,
    )  # fmt: skip
    lengths = np.array([len(t) for t in work.texts])
    record = train(work.parameters, work, work.make, lengths, options).history[0]
    moves = {name: p.data - before[name] for name, p in work.parameters.items()}
    norms = {name: np.linalg.norm(move) for name, move in moves.items()}  # rate 1: gradients
    assert norms["w"] == 0
    assert min(norms["table"], norms["head"]) > 0.01
    assert record["grad_norm"] == pytest.approx(np.hypot(norms["table"], norms["head"]), rel=1e-9)


def test_dropout_is_on_and_each_step_has_its_own():
    assert TwoTerms(0.3).after(8, 1)[1] != TwoTerms(0.0).after(8, 1)[1]
    work, keys = TwoTerms(0.0), []  # the op draws no key at rate 0: the first is free to look at
    plain = work.losses
    work.losses = lambda batch, dropout: keys.append(dropout.next()) or plain(batch, dropout)
    work.after(2, 4)
    assert len(keys) == 20 // 2 * 2  # microbatches of two epochs
    assert len(set(keys)) == 6  # one key a step: microbatches of one step share it
