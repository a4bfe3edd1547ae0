"""What configured runs that learn from samples write beside the rest: samples, and the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loopos.files import read_json, write_json
from loopos.methods.common import RunArguments
from loopos.training.trackers import Callback, RunInfo, SamplesFile

__all__ = ["StartFile", "begun", "compared", "sample_callbacks"]

#: Names of a policy's figures in ``evaluation.json``, and those of :meth:`PolicyTrainer.evaluate`.
_FIGURES = {"score": "reward/score", "length": "response/length", "ended": "response/eos_fraction"}


class StartFile(Callback):
    """Measures a policy before its first step, and keeps that in ``start.json`` for a resume.

    Parameters
    ----------
    root : Path or None
        Directory of the run, if it has one.
    measure : callable
        Returns figures of the policy as it is.

    Attributes
    ----------
    figures : dict
        Empty where there are none.
    """

    def __init__(self, root: Path | None, measure: Callable[[], Mapping[str, Any]]):
        self._file = None if root is None else root / "start.json"
        self._measure = measure
        self.figures: dict[str, Any] = {}

    def on_start(self, info: RunInfo) -> None:
        """Measure, or read what was measured."""
        if not info.start_step:
            self.figures = dict(self._measure())
            if self._file is not None and self.figures:
                write_json(self._file, self.figures)
        elif self._file is not None and self._file.is_file():
            self.figures = read_json(self._file)


def sample_callbacks(
    root: Path | None, given: Sequence[Callback], start: StartFile
) -> list[Callback]:
    """Return the callbacks of a run: ``samples.jsonl``, those that were given, the start."""
    files = [] if root is None else [SamplesFile(root / "samples.jsonl")]
    return [*files, *given, start]


def begun(root: Path | None, run: RunArguments) -> bool:
    """Whether there is something to resume under `root`, and the run is to."""
    return run["resume"] and root is not None and any((root / "checkpoints").glob("step-*"))


def compared(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return a policy's figures beside those of its start, where these are known."""
    figures: dict[str, Any] = {name: after[key] for name, key in _FIGURES.items()}
    if before:
        figures |= {f"{name}_before": before[key] for name, key in _FIGURES.items()}
        deviation = before["reward/score_std"]
        figures["score_std_before"] = deviation
        if deviation > 0:
            figures["score_gain"] = (figures["score"] - figures["score_before"]) / deviation
    if "kl/mean" in after:
        figures["kl"] = after["kl/mean"]
    return figures
