"""``loopos demo``: the shipped configuration ``demo``, run twice and compared.

The small base model that ships inside the package is fine-tuned on the film-review sentences that
ship beside it; then the same network is trained on them from random weights, with the same options
and seed. The demo fails, with exit code 1, when pretraining did not pay or when the result is less
than 10 points above always answering the commonest class.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loopos.config import RunConfig, load_config, shipped_configs
from loopos.data.readers import LabelledTexts
from loopos.display import say, show_prepared, show_summary
from loopos.files import write_json
from loopos.methods.fine_tuning import FineTuner
from loopos.models.weights import load_config as load_model_config
from loopos.runner import Prepared, Summary, run
from loopos.training.loop import Interrupted
from loopos.training.trackers import Callback, ConsoleProgress

__all__ = ["DemoResult", "Shown", "compare", "free_directory", "run_demo"]

#: How far above the commonest class the accuracy must be.
MARGIN = 0.10
FRESH = "without_pretraining"


@dataclass(frozen=True)
class Shown:
    """A held-out sentence, what raters and model say of it, and the model's probability of that."""

    text: str
    label: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo came to.

    Attributes
    ----------
    output_dir : Path
        The run directory that ``loopos predict`` takes; the run without pretraining lies in its
        ``without_pretraining``.
    accuracy, fresh_accuracy : float
        On the held-out sentences, fine-tuned from the base model and from random weights.
    majority : float
        Share of the commonest class among them.
    shown : tuple of Shown
        Three of them, drawn by the seed.
    seconds : float
        Wall-clock time of both runs.
    """

    output_dir: Path
    accuracy: float
    fresh_accuracy: float
    majority: float
    shown: tuple[Shown, ...]
    seconds: float

    @property
    def faults(self) -> list[str]:
        """What the demo promises and did not reach; empty when all is well."""
        found = []
        if self.accuracy < self.majority + MARGIN:
            found.append(
                f"accuracy {self.accuracy:.1%} is less than {100 * MARGIN:.0f} points above the "
                f"commonest class ({self.majority:.1%})"
            )
        if self.accuracy <= self.fresh_accuracy:
            found.append(
                f"accuracy {self.accuracy:.1%} is not above that of the same network without "
                f"pretraining ({self.fresh_accuracy:.1%})"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        values = dataclasses.asdict(self)
        return values | {"output_dir": str(self.output_dir), "faults": self.faults}

    def lines(self) -> list[str]:
        """Return the result as text for a terminal."""
        figures = (
            ("commonest class", self.majority),
            ("without pretraining", self.fresh_accuracy),
            ("pretrained", self.accuracy),
        )
        lines = ["== accuracy on held-out sentences =="]
        lines += [f"  {name:<20} {value:6.1%}" for name, value in figures]
        lines.append("== three of them ==")
        for one in self.shown:
            lines.append(f"  {one.text}")
            lines.append(f"    {one.predicted} ({one.probability:.0%}); raters say {one.label}")
        lines.append(f"done in {self.seconds:.0f} s; try it on a sentence of your own:")
        command = shlex.join(["loopos", "predict", str(self.output_dir)])
        return [*lines, f"  {command} 'a clever and moving film'"]


def free_directory(wanted: Path) -> Path:
    """Return `wanted`, or the first of ``wanted-2``, ``wanted-3``, ... that does not exist yet."""
    directory, number = wanted, 1
    while directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        number += 1
        directory = wanted.with_name(f"{wanted.name}-{number}")
    return directory


def configurations(output_dir: Path, seed: int, max_steps: int | None) -> list[RunConfig]:
    """Return the demo's configuration, and the same without pretraining."""
    shipped = load_config(shipped_configs()["demo"])
    pretrained = dataclasses.replace(
        shipped,
        computation=dataclasses.replace(shipped.computation, seed=seed),
        training=dataclasses.replace(shipped.training, max_steps=max_steps),
        data=dataclasses.replace(shipped.data, output_dir=str(output_dir)),
    )
    network = dataclasses.asdict(load_model_config(pretrained.path("pretrained_weights")))
    del network["family"]
    fresh = dataclasses.replace(
        pretrained,
        model=network | pretrained.model,
        data=dataclasses.replace(
            pretrained.data,
            pretrained_weights=None,
            tokenizer=pretrained.data.pretrained_weights,
            output_dir=str(output_dir / FRESH),
        ),
    )
    return [pretrained, fresh]


def compare(
    output_dir: Path,
    seed: int = 0,
    *,
    max_steps: int | None = None,
    callbacks: Sequence[Callback] = (),
    stop: Callable[[], bool] | None = None,
    on_prepared: Callable[[Prepared], None] | None = None,
    on_run: Callable[[Summary], None] | None = None,
) -> DemoResult:
    """Fine-tune the base model and the same network without pretraining, and compare them.

    Parameters
    ----------
    output_dir : Path
        A new or empty directory.
    seed : int
        Of the head's (and fresh network's) weights, order and dropout.
    max_steps : int, optional
        End both runs early.
    callbacks, stop, on_prepared
        As :func:`loopos.runner.run` takes them, for both runs.
    on_run : callable, optional
        Given what each run came to.

    Raises
    ------
    InputError, OutputError, Interrupted
        As :func:`loopos.runner.run`.
    """
    started = time.perf_counter()
    prepared: list[Prepared] = []
    summaries: list[Summary] = []

    def keep(one: Prepared) -> None:
        prepared.append(one)
        if on_prepared is not None:
            on_prepared(one)

    for config in configurations(output_dir, seed, max_steps):
        summaries.append(run(config, callbacks=callbacks, stop=stop, on_prepared=keep))
        if on_run is not None:
            on_run(summaries[-1])
    held_out = prepared[0].validation
    assert isinstance(held_out, LabelledTexts)  # the shipped configuration names a file of them
    accuracy, fresh_accuracy = (float(summary.evaluation["accuracy"]) for summary in summaries)
    result = DemoResult(
        output_dir,
        accuracy,
        fresh_accuracy,
        float(np.bincount(held_out.labels).max() / held_out.labels.size),
        _show(output_dir, held_out, seed),
        time.perf_counter() - started,
    )
    write_json(output_dir / "demo.json", result.as_dict())
    return result


def _show(directory: Path, held_out: LabelledTexts, seed: int) -> tuple[Shown, ...]:
    """Classify three held-out sentences with what the run saved."""
    indices = np.random.default_rng(seed).choice(len(held_out.texts), size=3, replace=False)
    picked = held_out.take(indices)
    predictions = FineTuner.load(directory / "model").predict(picked.texts)
    rows = predictions.rows(picked.texts)
    return tuple(
        Shown(row["text"], picked.label_names[label], row["label"],
              max(row["probabilities"].values()))
        for row, label in zip(rows, picked.labels, strict=True)
    )  # fmt: skip


def run_demo(
    output_dir: Path | None = None, *, seed: int = 0, stop: Callable[[], bool] | None = None
) -> int:
    """Run the demo on the terminal; see :func:`compare`.

    Parameters
    ----------
    output_dir : Path, optional
        Where the run goes, ``outputs/demo`` by default. A directory with anything in it is left
        alone: the first free of ``outputs/demo-2``, ``outputs/demo-3``, ... is taken.
    seed : int
    stop : callable, optional
        Asked after every step; True saves the state and ends the demo.

    Returns
    -------
    int
        Exit code: 0 done, 1 when the result is not what the demo promises, 130 when stopped.
    """
    wanted = output_dir or Path(load_config(shipped_configs()["demo"]).output_dir)
    directory = free_directory(wanted)
    if directory != wanted:
        say(f"{wanted} is not empty, so this run goes to {directory}")
    shown: list[Prepared] = []

    def prepared(one: Prepared) -> None:
        if shown:  # the same data again
            say("== the same network without pretraining ==")
        else:
            say("== from the pretrained base model ==")
            show_prepared(one)
        shown.append(one)

    def done(summary: Summary) -> None:
        if summary.output_dir == directory:
            show_summary(summary)

    try:
        result = compare(
            directory,
            seed,
            callbacks=[ConsoleProgress()],
            stop=stop,
            on_prepared=prepared,
            on_run=done,
        )
    except Interrupted as interrupted:
        print(f"{interrupted}; 'loopos demo' starts again in a new directory", file=sys.stderr)
        return 130
    for line in result.lines():
        say(line)
    for fault in result.faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if result.faults else 0
