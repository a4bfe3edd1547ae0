"""What a run will take, found by doing a little of it: peak memory and time.

A process of its own carries out the whole course of the run (read, encode, train, evaluate, save,
finish) in a directory that is deleted, but trains on a few batches only, the largest ones among
them, and evaluates on a few rows, the longest ones among them. Its peak memory is that of the run;
its times, divided by what they were spent on, add up to the run's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from loopos.backends.memory import available_bytes, peak_bytes, peak_bytes_of
from loopos.config import RunConfig, load_config
from loopos.data.sampler import BatchSampler, choosing
from loopos.errors import ConfigError, InputError, LooposError, OutputError
from loopos.runner import Prepared, run
from loopos.training.loop import Interrupted
from loopos.training.options import TrainingOptions
from loopos.training.trackers import Callback, Record, RunInfo

__all__ = ["Estimate", "refuse_memory", "rehearse"]

Array = np.ndarray[Any, Any]

#: Exit codes of a rehearsal that ran out of memory, and of one that was interrupted.
_NO_MEMORY, _INTERRUPTED = 3, 130
#: How often the memory of a rehearsal is looked at, in seconds.
_LOOK_EVERY_S = 0.02
#: Batches of the training data that are tried, beside the largest one.
_BATCHES = 6
#: Epochs in which the largest batch is looked for.
_EPOCHS = 20
#: Rows of the validation data that are tried: so many of the longest, and of all.
_LONGEST, _ROWS = 64, 192
#: What makes a run as short as its batches: so each of its stages is rehearsed.
_SHORT = {"num_epochs": 1, "max_steps": None, "eval_steps": None, "save_steps": None,
          "early_stopping_patience": None}  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes
    ----------
    peak_bytes : int
        The most memory that it will hold at once.
    available_bytes : int or None
        What this machine has to give; None where that cannot be told.
    total_s, step_s, evaluation_s, save_s : float
        The whole run, a mean optimizer step, one evaluation, one checkpoint; seconds.
    stages_s : dict of str to float
        What the stages of a run with several take; empty for others.
    """

    peak_bytes: int
    available_bytes: int | None
    total_s: float
    step_s: float
    evaluation_s: float
    save_s: float
    stages_s: dict[str, float] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the memory is there."""
        return self.available_bytes is None or self.peak_bytes <= self.available_bytes


def rehearse(config: RunConfig, overrides: Sequence[str] = ()) -> Estimate:
    """Find what a run will take, in a process of its own.

    Parameters
    ----------
    config : RunConfig
        As :func:`loopos.config.load_config` gave it for ``config.source`` and `overrides`.
    overrides : sequence of str

    Raises
    ------
    ConfigError
        If there is not enough memory even for the rehearsal.
    OutputError
        If there is no room for it beside the output directory.
    InputError
        Whatever the run itself would say of its input.
    LooposError
        Whatever else the run would raise.
    """
    free = available_bytes()
    wanted = config.output_dir.absolute()
    # Of the root, which has no parents, it is the root itself.
    place = next(p for p in (wanted.parent, *wanted.parents) if os.path.isdir(p))
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".loopos-rehearsal-", dir=place)
    except OSError as error:
        raise OutputError(f"{place}: cannot be written ({error.strerror})") from error
    with scratch as directory:
        asked = {
            "source": config.source,
            "overrides": list(overrides),
            "directory": directory,
            "launched": time.time(),
        }
        command = [sys.executable, "-m", "loopos.rehearsal"]
        returncode, answer = _watch(command, json.dumps(asked), free)
    if returncode in (_NO_MEMORY, -signal.SIGKILL):  # the system's way to say the same
        refuse_memory(config, free, None)
    if returncode:
        raise LooposError(f"{config.source}: the rehearsal of the run failed")
    found = json.loads(answer.splitlines()[-1])
    if "error" in found:
        raise (InputError if found["input"] else LooposError)(found["error"])
    return Estimate(available_bytes=free, **found)


def _watch(command: Sequence[str], given: str, limit: int | None) -> tuple[int, str]:
    """Run a command, and end it when it holds more memory than `limit`; return code and output.

    It is given a line, and its input ends only when this process does, however that ends.

    A limit set by the system (``setrlimit``) would make allocations fail inside libraries that then
    end the process in ways of their own, or never.
    """
    # In a session of its own: Ctrl-C is for this process, which ends the other one.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    line, process.stdin = process.stdin, None  # `communicate` would close it
    assert line is not None
    try:
        with suppress(BrokenPipeError):  # its exit code says what is wrong
            print(given, file=line, flush=True)
        while True:
            with suppress(subprocess.TimeoutExpired):
                output = process.communicate(timeout=_LOOK_EVERY_S)[0]
                return process.returncode, output
            held = peak_bytes_of(process.pid)
            if limit is not None and held is not None and held > limit:
                process.kill()
    finally:
        process.kill()
        process.wait()
        with suppress(BrokenPipeError):
            line.close()


def refuse_memory(config: RunConfig, free: int | None, needed: int | None) -> NoReturn:
    """Raise ConfigError: the run does not fit."""
    amount = "more memory" if needed is None else f"about {_gib(needed)} of memory"
    has = "" if free is None else f", and {_gib(free)} are free"
    raise ConfigError(
        f"{config.source}: this run needs {amount}{has}; smaller training.batch_size or "
        "training.batch_tokens, training.gradient_checkpointing and training.lora lower it"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


# -- in the process of its own ---------------------------------------------------------------------


class _Few:
    """Chooses the batches of a rehearsal, and remembers what the whole run would be."""

    def __init__(self, options: TrainingOptions):
        self._options = options
        self.total_steps = self.steps_per_epoch = self.tokens = self.tried = 0

    def __call__(self, sampler: BatchSampler, k: int) -> list[list[Array]]:
        """Return the largest batch of the run, the largest of its first epoch, some of any size."""
        lengths, options = sampler.lengths, self._options
        epochs = [sampler.batches(i) for i in range(min(options.num_epochs or 1, _EPOCHS))]
        per_epoch = self.steps_per_epoch = len(epochs[0])
        whole, limit = per_epoch * (options.num_epochs or 1), options.max_steps
        if limit is None or (options.num_epochs is not None and whole < limit):
            limit = whole
        self.total_steps = limit
        self.tokens = int(lengths.sum() * self.total_steps / per_epoch)

        def microbatch(batch: list[Array]) -> int:
            return max(int(lengths[indices].sum()) for indices in batch)

        largest = max((batch for epoch in epochs for batch in epoch), key=microbatch)
        sizes = np.array([sum(int(lengths[m].sum()) for m in batch) for batch in epochs[0]])
        order = np.argsort(sizes, kind="stable")
        picked = order[np.linspace(0, per_epoch - 1, min(_BATCHES, per_epoch)).astype(int)]
        chosen = [largest, *(epochs[0][int(i)] for i in picked[::-1])]
        self.tried = sum(int(lengths[m].sum()) for batch in chosen for m in batch)
        return chosen


class _Choice:
    """Chooses for each stage of a run, which has a sampler of its own."""

    def __init__(self, stages: Sequence[TrainingOptions]):
        self._waiting = list(stages)
        self._sampler: BatchSampler | None = None
        self.made: list[_Few] = []

    def __call__(self, sampler: BatchSampler, k: int) -> list[list[Array]]:
        """Return batches of the stage that the sampler is of."""
        if sampler is not self._sampler:
            self._sampler = sampler
            self.made.append(_Few(self._waiting.pop(0)))
        return self.made[-1](sampler, k)


@dataclass
class _Times:
    """When what happened in a stage of a run, and tokens and seconds of its steps."""

    started: float
    steps: list[tuple[int, float]] = field(default_factory=list)
    trained: float = 0.0
    evaluated: float = 0.0
    ended: float = 0.0


class _Clock(Callback):
    """Notes when things happen."""

    def __init__(self) -> None:
        self.stages: list[_Times] = []

    def on_start(self, info: RunInfo) -> None:
        """Everything is read and encoded."""
        self.stages.append(_Times(time.time()))

    def on_step(self, record: Record) -> None:
        """A step was made."""
        now = self.stages[-1]
        now.steps.append((record["tokens"], record["time_s"]))
        now.trained = now.evaluated = time.time()

    def on_evaluate(self, record: Record) -> None:
        """The last step was evaluated; what follows is its checkpoint."""
        self.stages[-1].evaluated = time.time()

    def on_end(self) -> None:
        """The checkpoint is there; what follows is the next stage, or the end of the run."""
        self.stages[-1].ended = time.time()


def _part(prepared: Prepared) -> tuple[Prepared, float]:
    """Return the same with a part of the validation rows, and the part's share of the text."""
    validation = prepared.validation
    if validation is None:
        return prepared, 1.0
    lengths = np.array([len(text) for text in validation.texts])
    if lengths.size <= _LONGEST + _ROWS:
        return prepared, 1.0
    order = np.argsort(lengths, kind="stable")
    some = order[np.linspace(0, lengths.size - _LONGEST - 1, _ROWS).astype(int)]
    picked = np.sort(np.concatenate([order[-_LONGEST:], some]))
    share = float(lengths[picked].sum() / max(1, lengths.sum()))
    return dataclasses.replace(prepared, validation=validation.take(picked)), share


def _line(steps: list[tuple[int, float]]) -> tuple[float, float]:
    """Return seconds a step and seconds a token that explain the steps best, neither negative."""
    from scipy.optimize import nnls

    tokens, spent = np.array(steps, dtype=np.float64).T
    # Relative errors: a small step counts as much as a large one.
    columns = np.stack([1 / spent, tokens / spent], axis=1)
    (first, each), _ = nnls(columns, np.ones(len(spent)))
    return float(first), float(each)


def _due(every: int | None, few: _Few) -> set[int]:
    """Return after which steps something happens that happens every so many (None: an epoch)."""
    step = every or few.steps_per_epoch
    return {*range(step, few.total_steps + 1, step), few.total_steps}


def _stages(options: TrainingOptions) -> dict[str, TrainingOptions]:
    """Return the options of each stage of a run, by name where there are several."""
    stages: dict[str, TrainingOptions] = getattr(options, "stages", lambda: {"": options})()
    return stages


def _shortened(options: Any) -> Any:
    """Return options of a run whose stages have one epoch each."""
    if not hasattr(options, "with_stage"):
        return dataclasses.replace(options, **_SHORT, **_unbudgeted(options))
    for name, stage in options.stages().items():
        options = options.with_stage(name, **_SHORT, **_unbudgeted(stage))
    return options


def _unbudgeted(options: Any) -> dict[str, float]:
    """Return a budget of KL that ends no run, where there is one: what it needs is needed yet."""
    return {} if getattr(options, "kl_budget", None) is None else {"kl_budget": sys.float_info.max}


def _share_of(options: TrainingOptions, part: int, whole: int, share: float) -> float:
    """Return the share of an evaluation that is rehearsed.

    It takes as long as the text is, but where only so many prompts of a set are ever answered.
    """
    if not (share and hasattr(options, "sample_steps")):
        return share
    most = getattr(options, "eval_prompts", getattr(options, "eval_problems", whole))
    return min(most, part) / min(most, whole)


def _stage(options: TrainingOptions, few: _Few, times: _Times, share: float) -> dict[str, float]:
    """Add up what a whole stage would take."""
    samples = hasattr(options, "sample_steps")
    evaluations = _due(options.eval_steps, few) if share else set()
    # Every evaluation may be the best so far, and then it is saved.
    saves = evaluations | _due(options.save_steps, few)
    evaluation_s = (times.evaluated - times.trained) / share if share else 0.0
    save_s = times.ended - times.evaluated
    # Of what is sampled the tokens of a batch are known only then.
    tokens = few.tokens * sum(n for n, _ in times.steps) / few.tried
    first, each = _line(times.steps[1:])  # the first step finds no buffers yet
    training_s = first * few.total_steps + each * tokens
    # A policy is evaluated before its first step too.
    total_s = training_s + (len(evaluations) + (samples and share > 0)) * evaluation_s
    return {
        "training_s": training_s,
        "total_s": total_s + len(saves) * save_s,
        "evaluation_s": evaluation_s,
        "save_s": save_s,
    }


def _measure(config: RunConfig, directory: Path, launched: float) -> dict[str, Any]:
    """Carry out a little of the run, and add up what all of it would take."""
    options, clock = config.training, _Clock()
    stages = _stages(options)
    choice = _Choice(list(stages.values()))
    elsewhere = dataclasses.replace(config.data, output_dir=str(directory / "run"))
    rehearsed = dataclasses.replace(config, training=_shortened(options), data=elsewhere)
    shares, rows = [1.0], (1, 1)

    def shorten(prepared: Prepared) -> Prepared:
        nonlocal rows
        part, share = _part(prepared)
        shares.append(share if part.validation is not None else 0.0)
        if part.validation is not None and prepared.validation is not None:
            rows = len(part.validation.texts), len(prepared.validation.texts)
        return part

    with choosing(choice):
        run(rehearsed, callbacks=[clock], on_prepared=shorten)
    ended, peak = time.time(), peak_bytes()  # before anything else is loaded
    of_stages = [_share_of(stage, *rows, shares[-1]) for stage in stages.values()]
    found = [
        _stage(*parts) for parts in zip(stages.values(), choice.made, clock.stages, of_stages,
                                        strict=True)
    ]  # fmt: skip
    edges = [launched, *(moment for s in clock.stages for moment in (s.started, s.ended)), ended]
    # Before, between and after the stages; the end evaluates once more, here on a part.
    around = [edges[i + 1] - edges[i] for i in range(0, len(edges), 2)]
    rest_s = [one["evaluation_s"] * (1 - s) if s else 0.0
              for one, s in zip(found, of_stages, strict=True)]  # fmt: skip
    return {
        "peak_bytes": peak,
        "total_s": sum(around) + sum(one["total_s"] for one in found) + sum(rest_s),
        "step_s": sum(one["training_s"] for one in found)
        / sum(few.total_steps for few in choice.made),
        "evaluation_s": max(one["evaluation_s"] for one in found),
        "save_s": max(one["save_s"] for one in found),
        "stages_s": {name: one["total_s"] for name, one in zip(stages, found, strict=True)}
        if len(stages) > 1
        else {},
    }


def _end_with_parent(directory: str) -> None:
    """Wait until the process that asked for the rehearsal is gone; clear the directory, and end."""
    while os.read(0, 1):
        pass
    # Another program in this process: the rehearsal would go on writing while it is cleared.
    script = "import shutil, sys; shutil.rmtree(sys.argv[1], ignore_errors=True)"
    os.execv(sys.executable, [sys.executable, "-I", "-c", script, directory])


def _main() -> int:
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, args=(asked["directory"],), daemon=True).start()
    try:
        config = load_config(asked["source"], asked["overrides"])
        found = _measure(config, Path(asked["directory"]), asked["launched"])
    except MemoryError:
        return _NO_MEMORY
    except (KeyboardInterrupt, Interrupted):
        return _INTERRUPTED
    except LooposError as error:
        found = {"error": str(error), "input": isinstance(error, (InputError, OutputError))}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
