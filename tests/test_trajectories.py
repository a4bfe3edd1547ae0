"""Runs that must be the same run: accumulated or not, interrupted or not, on any backend."""

import dataclasses
import json

import numpy as np
import pytest

import loopos
import loopos.training.trackers
from loopos.data.readers import read_labelled
from loopos.data.tokenizer import train_bpe
from loopos.methods.fine_tuning import Options
from loopos.training.loop import Interrupted

WORDS = {"good": "superb warm clever funny bright", "bad": "dull loud empty weak tired"}


def rows():
    rng = np.random.default_rng(5)
    data = []
    for index in range(48):
        label = ("good", "bad")[index % 2]
        words = rng.choice(WORDS[label].split(), size=rng.integers(2, 9))
        data.append({"text": f"film {index} " + " ".join(words), "label": label})
    return read_labelled(data)


def tuner(dtype=np.float32, dropout=0.1, seed=3):
    data = rows()
    config = loopos.TransformerConfig(
        d_model=16, num_heads=2, num_layers=2, d_ff=32, vocab_size=300, max_seq_len=64,
        dropout=dropout,
    )  # fmt: skip
    model = loopos.Transformer(config, seed=0, dtype=dtype)
    return loopos.FineTuner(model, train_bpe(data.texts, 300), num_classes=2, seed=seed)


OPTIONS = Options(
    learning_rate=3e-3, batch_size=8, num_epochs=2, scheduler="cosine", warmup_steps=3,
    max_grad_norm=0.5, save_steps=1, eval_steps=5, weight_decay=0.1,
)  # fmt: skip


def weights(tuner):
    return {name: p.data.copy() for name, p in tuner.classifier.parameters().items()}


def same_bytes(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]), name


def records(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    timed = ("time_s", "tokens_per_s")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_eight_times_one_equals_one_times_eight(optimizer):
    base = dataclasses.replace(OPTIONS, optimizer=optimizer, class_weights=[1.0, 3.0])
    results = []
    for size, accumulated in ((8, 1), (1, 8), (2, 4)):
        trained = tuner(np.float64)
        options = dataclasses.replace(
            base, batch_size=size, gradient_accumulation_steps=accumulated
        )
        history = trained.fit(rows(), options=options).history
        results.append((weights(trained), [r["loss"] for r in history]))
    for found, losses in results[1:]:
        np.testing.assert_allclose(losses, results[0][1], rtol=1e-11)
        for name, expected in results[0][0].items():
            # Adam divides by the root of tiny second moments, which amplifies the last bits.
            np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-9, err_msg=name)


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not():
    first, second, other = tuner(), tuner(), tuner(seed=4)
    for one in (first, second, other):
        one.fit(rows(), options=OPTIONS)
    same_bytes(weights(first), weights(second))
    assert not np.array_equal(
        weights(first)["classifier.weight"], weights(other)["classifier.weight"]
    )


@pytest.mark.parametrize("halt", [1, 2, 4, 5, 6, 7, 11])
def test_stopping_and_resuming_gives_the_bytes_of_the_uninterrupted_run(tmp_path, halt):
    whole = tuner()
    done = whole.fit(rows(), rows(), OPTIONS, output_dir=tmp_path / "whole")
    assert done.steps == 12
    steps = []
    half = tuner()
    stopped = half.fit(
        rows(), rows(), OPTIONS, output_dir=tmp_path / "half",
        stop=lambda: steps.append(1) or len(steps) == halt,
    )  # fmt: skip
    assert (stopped.stopped_reason, stopped.steps) == ("interrupted", halt)
    rest = tuner()
    resumed = rest.fit(rows(), rows(), OPTIONS, output_dir=tmp_path / "half", resume=True)
    assert resumed.steps == 12
    same_bytes(weights(whole), weights(rest))
    assert records(tmp_path / "whole") == records(tmp_path / "half")
    for name in ("model.safetensors", "optimizer.safetensors"):
        kept = [d / "checkpoints" / "step-00000012" / name
                for d in (tmp_path / "whole", tmp_path / "half")]  # fmt: skip
        assert kept[0].read_bytes() == kept[1].read_bytes()


class Interrupts(loopos.training.trackers.Callback):
    """Raises KeyboardInterrupt as Ctrl-C would, at a chosen moment."""

    def __init__(self, moment, step):
        self.moment, self.step = moment, step

    def on_step(self, record):
        if self.moment == "step" and record["step"] == self.step:
            raise KeyboardInterrupt

    def on_evaluate(self, record):
        if self.moment == "evaluate" and record["step"] == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["step", "evaluate"])
def test_ctrl_c_at_an_evaluation_step_loses_and_repeats_nothing(tmp_path, moment):
    whole = tuner()
    whole.fit(rows(), rows(), OPTIONS, output_dir=tmp_path / "whole")
    half = tuner()
    with pytest.raises(Interrupted) as caught:
        half.fit(
            rows(), rows(), OPTIONS, output_dir=tmp_path / "half",
            callbacks=[Interrupts(moment, 5)],
        )  # fmt: skip
    assert caught.value.checkpoint == tmp_path / "half" / "checkpoints" / "step-00000005"
    rest = tuner()
    rest.fit(rows(), rows(), OPTIONS, output_dir=tmp_path / "half", resume=True)
    same_bytes(weights(whole), weights(rest))
    assert records(tmp_path / "whole") == records(tmp_path / "half")
