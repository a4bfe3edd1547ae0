"""What `loopos validate` says a run will take, against what runs took. Time is in benchmarks/."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loopos.config import load_config
from loopos.errors import ConfigError, InputError, OutputError
from loopos.methods import rlhf
from loopos.rehearsal import Estimate, _due, _Few, _line, _shortened, rehearse
from loopos.training.options import TrainingOptions

RUN = """
import sys
from loopos.backends.memory import peak_bytes
from loopos.config import load_config
from loopos.runner import run
run(load_config(sys.argv[1], sys.argv[2:]))
print(peak_bytes())
"""
WIDE = {"d_model": 256, "num_heads": 4, "num_layers": 6, "d_ff": 1024, "vocab_size": 6000}
#: Overrides of shipped configurations: fewer steps, and models that are large beside Python.
CASES = {
    "full": ("fine_tuning", ["training.max_steps=12", "training.batch_size=64",
                             "training.max_length=64", "training.num_epochs=null"]),
    "accumulated": ("fine_tuning", ["training.max_steps=6", "training.batch_tokens=1500",
                                    "training.gradient_accumulation_steps=3",
                                    "training.num_epochs=null", "data.validation_fraction=0",
                                    "data.validation_data=null"]),
    "pretraining": ("pretraining", ["training.max_steps=8", "training.batch_size=16",
                                    "training.num_epochs=null", "training.eval_steps=4",
                                    *(f"model.{name}={size}" for name, size in WIDE.items())]),
}  # fmt: skip


def overrides(case, directory):
    return [*CASES[case][1], f"data.output_dir={json.dumps(str(directory))}"]


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's peak of a process"
)
@pytest.mark.parametrize("case", CASES)
def test_peak_memory_is_told_within_15_percent(case, tmp_path):
    given = overrides(case, tmp_path / "run")
    estimate = rehearse(load_config(CASES[case][0], given), given)
    assert list(tmp_path.iterdir()) == []  # nothing is left of it
    command = [sys.executable, "-c", RUN, CASES[case][0], *given]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    took = int(done.stdout.splitlines()[-1])
    assert estimate.peak_bytes == pytest.approx(took, rel=0.15)
    assert took > 100 * 2**20
    assert 0 < estimate.step_s < estimate.total_s
    assert estimate.fits


def test_what_steps_take_is_a_line_over_their_tokens():
    assert _line([(100, 1.2), (200, 2.2), (300, 3.2)]) == pytest.approx((0.2, 0.01))
    assert _line([(100, 1.0), (100, 3.0)])[0] >= 0
    first, each = _line([(100, 2.0), (200, 1.9), (300, 2.1)])
    assert min(first, each) >= 0
    assert first + 200 * each == pytest.approx(2.0, rel=0.05)


class Sampler:
    """Two epochs of three batches, of which the largest is in the second."""

    lengths = np.array([1, 2, 3, 4, 5, 60])

    def batches(self, k):
        pairs = [[0, 1], [2, 3], [4, 5]] if k else [[0, 5], [1, 4], [2, 3]]
        return [[np.array(pair)] for pair in pairs]


@pytest.mark.parametrize(
    ("options", "steps", "tokens"),
    [
        ({"num_epochs": 2}, 6, 150),
        ({"num_epochs": 2, "max_steps": 4}, 4, 100),
        ({"num_epochs": 1, "max_steps": 9}, 3, 75),
        ({"max_steps": 9}, 9, 225),
        ({}, 3, 75),
    ],
)
def test_the_whole_run_is_counted_from_a_few_batches(options, steps, tokens):
    few = _Few(TrainingOptions(**options))
    chosen = few(Sampler(), 0)
    assert (few.total_steps, few.steps_per_epoch, few.tokens) == (steps, 3, tokens)
    largest = [4, 5] if options.get("num_epochs") == 2 else [0, 5]
    assert chosen[0][0].tolist() == largest
    assert len(chosen) == 4


def test_evaluations_and_checkpoints_are_counted():
    few = _Few(TrainingOptions(num_epochs=2))
    few(Sampler(), 0)
    assert _due(None, few) == {3, 6}
    assert _due(4, few) == {4, 6}
    assert _due(2, few) == {2, 4, 6}


@pytest.mark.parametrize("mebibytes", [20, 70, 120])
def test_a_run_that_cannot_fit_is_refused(monkeypatch, tmp_path, mebibytes):
    given = overrides("full", tmp_path / "run")
    config = load_config("fine_tuning", given)
    monkeypatch.setattr("loopos.rehearsal.available_bytes", lambda: mebibytes * 2**20)
    with pytest.raises(
        ConfigError, match=r"needs more memory, and 0\.[01] GiB are free; smaller tr"
    ):
        rehearse(config, given)
    assert list(tmp_path.iterdir()) == []
    assert not Estimate(2, 1, 0.0, 0.0, 0.0, 0.0).fits
    assert Estimate(2, None, 0.0, 0.0, 0.0, 0.0).fits


def test_what_is_wrong_is_said_as_the_run_would_say_it(tmp_path):
    given = [f"data.output_dir={json.dumps(str(tmp_path / 'run'))}", "training.max_length=4096"]
    with pytest.raises(InputError, match=r"training\.max_length: 4096 is more than"):
        rehearse(load_config("fine_tuning", given), given)


def test_beside_the_root_is_the_root(monkeypatch):
    def full(prefix, dir):
        raise OSError(28, f"No space left on {dir}")

    monkeypatch.setattr("loopos.rehearsal.tempfile.TemporaryDirectory", full)
    for output in ("/", "/no-such/a/b", f"/{'x' * 300}/out"):
        config = load_config("fine_tuning", [f"data.output_dir={output}"])
        with pytest.raises(OutputError, match=r"^/: cannot be written \(No space left on /\)$"):
            rehearse(config)


def test_no_budget_of_divergence_ends_a_rehearsal():
    """But what it needs, a reference and a copy of the weights, is there."""
    options = rlhf.Options(kl_coefficient=0.0, kl_budget=1e-4, phases=("ppo",))
    short = _shortened(options)
    assert short.kl_budget == sys.float_info.max
    assert short.needs_reference
    assert _shortened(rlhf.Options(phases=("ppo",))).kl_budget is None
