"""``loopos demo``: the shipped configuration ``demo``, run twice and compared.

The small base model that ships inside the package is fine-tuned on the film-review sentences that
ship beside it; then the same network is trained on them from random weights, with the same options
and seed. The demo fails, with exit code 1, when pretraining did not pay or when the result is less
than 10 points above always answering the commonest class.
"""

from __future__ import annotations

import dataclasses
import json
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
from loopos.files import write_json
from loopos.models.weights import load_config as load_model_config
from loopos.runner import Prepared, Summary, prepare, run
from loopos.training.loop import Interrupted
from loopos.training.trackers import Callback

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
    summaries = []
    for config in configurations(output_dir, seed, max_steps):
        summary = run(config, callbacks=callbacks, stop=stop, on_prepared=on_prepared)
        summaries.append(summary)
        if on_run is not None:
            on_run(summary)
    seconds = time.perf_counter() - started
    held_out = _held_out(configurations(output_dir, seed, max_steps)[0])
    share = np.bincount(held_out.labels).max() / held_out.labels.size
    result = DemoResult(
        output_dir,
        *(float(summary.evaluation["accuracy"]) for summary in summaries),
        float(share),
        _show(output_dir, held_out, seed),
        seconds,
    )
    write_json(output_dir / "demo.json", _as_json(result))
    return result
