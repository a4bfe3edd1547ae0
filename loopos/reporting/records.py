"""Reading what a run has left in its directory, whole or cut short, its parts included."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from loopos.errors import InputError, MissingFileError
from loopos.files import read_json
from loopos.methods import STAGES
from loopos.training.checkpoint import list_checkpoints

__all__ = ["RunRecords", "Series", "number", "read_run"]

Array = np.ndarray[Any, Any]

#: What a run is called by the method of its configuration.
_METHODS = {
    "autoregressive": "Pretraining",
    "chain_of_thought": "Chain of thought",
    "dpo": "Preference optimisation (DPO)",
    "fine_tuning": "Fine-tuning of a classifier",
    "grpo": "Group-relative policy optimisation (GRPO)",
    "ppo": "Proximal policy optimisation (PPO)",
    "preferences": "Training on preferences",
    "reward_model": "Reward model",
    "rlhf": "RLHF: reward model and PPO",
    "sft": "Supervised fine-tuning",
}
#: Of float32, in which runs compute: beyond it a figure is as good as infinite.
_LARGEST = float(np.finfo(np.float32).max)
#: A run that was not begun from a configuration is known by a figure that only its method has.
_KNOWN_BY = {
    "value/explained_variance": "ppo",
    "grpo/score_std": "grpo",
    "rewards/margin": "preferences",
}


@dataclass(frozen=True)
class Series:
    """One figure over the steps that have it.

    Attributes
    ----------
    steps : ndarray of int [n]
    values : ndarray of float64 [n]
        Finite: what is not is a matter of `RunRecords.not_finite`.
    """

    steps: Array
    values: Array

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class RunRecords:
    """The records of a run.

    Attributes
    ----------
    directory : Path
    name : str
        Of a part of a run, such as ``reward_model``; empty for the run itself.
    steps, evaluations : list of dict
        The lines of ``metrics.jsonl``.
    samples : list of dict
        The lines of ``samples.jsonl``.
    config, data_report, evaluation, state : dict
        Empty where there is none. `state` is that of the newest checkpoint.
    torn : list of str
        Files whose last line was cut short, as in a run that was killed.
    damaged : list of str
        What is wrong with the newest checkpoints; `state` is then that of one before them.
    saved : bool
        Whether there is a model in it; of a run that goes on it may be that of before.
    labels : list of str
        Names of the classes of a saved classifier.
    parts : list of RunRecords
        Runs within it: the reward model of an RLHF run, the rounds of a chain of thought.
    """

    directory: Path
    name: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    data_report: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    torn: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    saved: bool = False
    labels: list[str] = field(default_factory=list)
    parts: list[RunRecords] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The name of the run, or of the part."""
        return self.name or self.directory.resolve().name

    @property
    def method(self) -> str:
        """Key of the method, such as "fine_tuning"; empty where nothing tells."""
        named = _section(self.config, "computation").get("method")
        if named:
            return str(named)
        if self.name == "reward_model":
            return self.name
        for figure, method in _KNOWN_BY.items():
            if any(figure in record for record in self.steps[:1]):
                return method
        return ""

    @property
    def method_title(self) -> str:
        """The method in words."""
        return _METHODS.get(self.method, self.method.replace("_", " ").capitalize() or "Training")

    @property
    def options(self) -> dict[str, Any]:
        """Options of training: all of them where there is a checkpoint, else those given."""
        return _section(self.state, "options") or _section(self.config, "training")

    @cached_property
    def last_step(self) -> int:
        """The last step on record; 0 without any."""
        return max((r["step"] for r in (*self.steps, *self.evaluations)), default=0)

    @property
    def total_steps(self) -> int | None:
        """Steps that the run is to make, where it is known.

        It is not where the run was made longer, and has no checkpoint since.
        """
        total = self.state.get("total_steps")
        return total if isinstance(total, int) and self.last_step <= total else None

    @property
    def ended_early(self) -> bool:
        """Whether the run ended itself before its last step: its patience or its budget was out."""
        total = self.total_steps
        return bool(self.state.get("exhausted")) and total is not None and self.last_step < total

    @property
    def steps_made(self) -> bool:
        """Whether no step is left: all are made, or the run ended early."""
        return self.ended_early or self.last_step == self.total_steps

    @property
    def saves_model(self) -> bool:
        """Whether it saves a model at its end.

        What a trainer wrote by itself saves none, nor does the round of a chain of thought.
        """
        run = self.config
        if self.name in STAGES["rlhf"]:  # a stage has no configuration of its own
            run = _json(self.directory.parent / "config.json")
        return "computation" in run

    @property
    def finished(self) -> bool:
        """Whether no step is left and its model is saved, where it saves one."""
        if "total_steps" not in self.state:
            return self.saved
        return self.steps_made and (self.saved or not self.saves_model)

    @property
    def ending(self) -> str:
        """How the run stands, in words; empty where nothing tells."""
        if self.finished:
            early = "; ended by itself before its last step" if self.ended_early else ""
            return f"finished{early}"
        if self.steps_made:
            done = "the run ended early" if self.ended_early else "all steps are made"
            return f"{done}, but the model is not saved yet"
        return "not finished" if "total_steps" in self.state or self.saves_model else ""

    @cached_property
    def figures(self) -> list[str]:
        """Names of all figures of steps that are numbers, in the order of their records."""
        names: dict[str, None] = {}
        for record in self.steps:
            names |= dict.fromkeys(n for n, v in record.items() if number(v) is not None)
        return [name for name in names if name not in ("step", "epoch")]

    @cached_property
    def evaluated_figures(self) -> list[str]:
        """Names of all figures of evaluations that are numbers."""
        names: dict[str, None] = {}
        for record in self.evaluations:
            names |= dict.fromkeys(n for n, v in record["eval"].items() if number(v) is not None)
        return list(names)

    def series(self, name: str) -> Series:
        """Return a figure of the steps; empty where no step has it."""
        if name not in self._known:  # every rule asks, and there may be many steps
            pairs = ((record["step"], record.get(name)) for record in self.steps)
            self._known[name] = _series(pairs)
        return self._known[name]

    def not_finite(self, name: str) -> list[int]:
        """Return the steps at which a figure is NaN, or beyond what float32 holds."""
        values = ((record["step"], number(record.get(name))) for record in self.steps)
        return [step for step, value in values if value is not None and not _fits(value)]

    @cached_property
    def _known(self) -> dict[str, Series]:
        return {}

    def evaluated(self, name: str) -> Series:
        """Return a figure of the evaluations."""
        return _series((record["step"], record["eval"].get(name)) for record in self.evaluations)

    @cached_property
    def last_evaluation(self) -> dict[str, Any]:
        """The final evaluation of a run that is finished, or the last one on record."""
        final = self.evaluation if self.finished else {}
        return final or (self.evaluations[-1]["eval"] if self.evaluations else {})

    @cached_property
    def sample_tables(self) -> dict[int, list[dict[str, Any]]]:
        """The samples of each step that has any, in order."""
        tables: dict[int, list[dict[str, Any]]] = {}
        for row in self.samples:
            tables.setdefault(row["step"], []).append(row)
        return dict(sorted(tables.items()))


def number(value: Any) -> float | None:
    """Return a JSON value as a float if it is a single number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number beyond all floats
        return math.copysign(math.inf, value)


def _fits(value: float) -> bool:
    return abs(value) <= _LARGEST  # false of NaN too


def _section(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def _series(pairs: Any) -> Series:
    numbers = ((step, number(value)) for step, value in pairs)
    kept = [(step, v) for step, v in numbers if v is not None and _fits(v)]
    steps, values = zip(*kept, strict=True) if kept else ((), ())
    return Series(np.array(steps, np.int64), np.array(values, np.float64))


# -- reading ---------------------------------------------------------------------------------------


def read_run(directory: str | Path) -> RunRecords:
    """Read a run directory, or one that a trainer wrote with `output_dir`.

    A last line that was cut short, as a killed run leaves it, is left out and named in `torn`.

    Parameters
    ----------
    directory : path

    Raises
    ------
    MissingFileError
        If there is no such directory.
    InputError
        If it holds no run or no step, or a line is not what a run writes; with file and line.
    """
    directory = Path(directory)
    if not directory.exists():
        raise MissingFileError(f"{directory}: no such directory")
    if not directory.is_dir():
        raise InputError(f"{directory}: is a file; expected a run directory")
    parts = [_read(path.parent, path.parent.name, []) for path in _within(directory)]
    # An RLHF run has a reward model before it has steps of its own; a folder of runs is no run.
    begun = parts and ((directory / "config.json").is_file() or parts[0].name == "reward_model")
    if not (directory / "metrics.jsonl").is_file() and not begun:
        raise InputError(f"{directory}: is not a run directory (metrics.jsonl is missing)")
    whole = _read(directory, "", parts)
    if not any(part.steps or part.evaluations for part in (whole, *parts)):
        raise InputError(f"{directory / 'metrics.jsonl'}: there is no step in it yet")
    return whole


def _within(directory: Path) -> list[Path]:
    """Return the metrics of runs within a run: round 10 after round 9."""

    def order(path: Path) -> list[tuple[int, str]]:
        return [(int(d or -1), t) for t, d in re.findall(r"(\D*)(\d*)", path.parent.name)]

    return sorted(directory.glob("*/metrics.jsonl"), key=order)


def _read(directory: Path, name: str, parts: Sequence[RunRecords]) -> RunRecords:
    torn: list[str] = []
    damaged: list[str] = []
    metrics = directory / "metrics.jsonl"
    records = _metrics(metrics, torn) if metrics.is_file() else []
    samples = directory / "samples.jsonl"
    return RunRecords(
        directory,
        name,
        [record for record in records if "eval" not in record],
        [record for record in records if "eval" in record],
        _samples(samples, torn) if samples.is_file() else [],
        _json(directory / "config.json"),
        _json(directory / "data_report.json"),
        _json(directory / "evaluation.json"),
        _state(directory / "checkpoints", damaged),
        torn,
        damaged,
        (directory / "model").is_dir(),
        [str(name) for name in _json(directory / "model" / "classifier.json").get("labels") or ()],
        list(parts),
    )


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _state(checkpoints: Path, damaged: list[str]) -> dict[str, Any]:
    """Return the state of the newest checkpoint that has one, without checking its arrays."""
    for path in list_checkpoints(checkpoints):
        try:
            return read_json(path / "state.json")
        except InputError as error:
            damaged.append(str(error))
    return {}


def _metrics(path: Path, torn: list[str]) -> list[dict[str, Any]]:
    records = _lines(path, torn)
    for place, record in records:
        if not _is_step(record.get("step")):
            raise InputError(f"{place}: not the record of a step ('step' is missing)")
        if not isinstance(record.get("eval", {}), dict):
            raise InputError(f"{place}: 'eval' is not an object of figures")
    return [record for _, record in records]


def _samples(path: Path, torn: list[str]) -> list[dict[str, Any]]:
    records = _lines(path, torn)
    for place, record in records:
        if not _is_step(record.get("step")):
            raise InputError(f"{place}: not a sample of a step ('step' is missing)")
    return [record for _, record in records]


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _lines(path: Path, torn: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects of a file of JSON lines, each with its place."""
    whole, rest = _up_to_last_newline(path)
    if rest.strip():
        torn.append(path.name)
    found = []
    # Not splitlines: a text may hold a line separator that JSON leaves as it is.
    for line_number, line in enumerate(whole.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{line_number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not a JSON object") from error
        if not isinstance(value, dict):
            raise InputError(f"{place}: not a JSON object")
        found.append((place, value))
    return found


def _up_to_last_newline(path: Path) -> tuple[str, bytes]:
    """Return the whole lines, and what follows them: perhaps half a character."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    end = raw.rfind(b"\n") + 1
    try:
        return raw[:end].decode("utf-8-sig"), raw[end:]
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text") from error
