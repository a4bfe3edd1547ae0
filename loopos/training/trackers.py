"""Who is told about a run: the callback protocol, ``metrics.jsonl``, and the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from loopos.errors import CheckpointError, ConfigError, OutputError
from loopos.files import atomic_write_text, read_text
from loopos.training.samples import sample_lines, samples_table

__all__ = ["Callback", "ConsoleProgress", "MetricsFile", "RunInfo", "SamplesFile", "TensorBoard",
           "tell_samples"]  # fmt: skip

Record = Mapping[str, Any]

#: What is said of an evaluation, where it has any of these figures.
_TOLD = ("loss", "accuracy", "f1_macro", "perplexity", "reward/score", "kl/mean",
         "response/length")  # fmt: skip
#: Samples that are shown in a table, and as plain lines.
_ROWS, _LINES = 8, 3


@dataclass(frozen=True)
class RunInfo:
    """What is known when a run begins.

    Attributes
    ----------
    total_steps : int
        Optimizer steps of the whole run.
    start_step : int
        Steps that were done before, more than 0 on resume.
    num_samples : int
        Training samples.
    output_dir : Path or None
        Where the run writes.
    evaluation_due : bool
        Whether the evaluation after `start_step` is still to be made.
    trained_parameters : int
        How many numbers are trained.
    """

    total_steps: int
    start_step: int
    num_samples: int
    output_dir: Path | None
    evaluation_due: bool = False
    trained_parameters: int = 0


class Callback:
    """Told what happens; override what is of interest."""

    def on_start(self, info: RunInfo) -> None:
        """Before the first step."""

    def on_step(self, record: Record) -> None:
        """After every optimizer step."""

    def on_evaluate(self, record: Record) -> None:
        """After every evaluation; the metrics are ``record["eval"]``."""

    def on_samples(self, step: int, rows: Sequence[Record]) -> None:
        """When a table of samples is due, of a method that learns from its own: before `on_step`.

        A row has ``prompt``, ``response``, ``score``, ``tokens`` and whether it ``ended``.
        """

    def on_end(self) -> None:
        """After the last step, and when the run fails or is interrupted."""


def tell_samples(
    callbacks: Sequence[Callback],
) -> Callable[[int, Sequence[Record]], None]:
    """Return a function that hands samples to all of `callbacks`."""

    def tell(step: int, rows: Sequence[Record]) -> None:
        for callback in callbacks:
            callback.on_samples(step, rows)

    return tell


class MetricsFile(Callback):
    """One JSON object a line: every step, and every evaluation under the key ``eval``.

    Parameters
    ----------
    path : path
        Written to as the run goes, each line flushed. On resume, lines of steps after the
        checkpoint's are dropped: the run writes them again.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: IO[str] | None = None

    def on_start(self, info: RunInfo) -> None:
        """Open the file, keeping the lines up to the step that the run starts from.

        Raises
        ------
        CheckpointError
            If a line of those is no record; the file is left as it is.
        OutputError
            If the file cannot be written.
        """
        kept = self._lines_until(info) if info.start_step and self.path.exists() else []
        atomic_write_text(self.path, "".join(kept))
        try:
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror})") from error

    def _lines_until(self, info: RunInfo) -> list[str]:
        kept = []
        lines = read_text(self.path, CheckpointError).splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):  # cut short when the run was killed
                break
            try:
                record = json.loads(line)
                step = int(record["step"])
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{self.path}:{number}: not the record of a step") from error
            again = info.evaluation_due and "eval" in record
            if step > info.start_step or (again and step == info.start_step):
                break
            kept.append(line)
        return kept

    def _write(self, record: Record) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror})") from error

    def on_step(self, record: Record) -> None:
        """Write a step (raises OutputError)."""
        self._write(record)

    def on_evaluate(self, record: Record) -> None:
        """Write an evaluation (raises OutputError)."""
        self._write(record)

    def on_end(self) -> None:
        """Close the file (raises OutputError where the disk is full)."""
        file, self._file = self._file, None
        if file is None:
            return
        try:
            file.close()  # tries once more to write what could not be written before
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror})") from error


class SamplesFile(MetricsFile):
    """One JSON object a line for each sample that is shown: step, prompt, response, score...

    Parameters
    ----------
    path : path
        As that of :class:`MetricsFile`, and cut as that on resume.
    """

    def on_step(self, record: Record) -> None:
        """Nothing: steps are in ``metrics.jsonl``."""

    def on_evaluate(self, record: Record) -> None:
        """Nothing."""

    def on_samples(self, step: int, rows: Sequence[Record]) -> None:
        """Write a line for each row (raises OutputError)."""
        for row in rows:
            self._write({"step": step, **row})


class TensorBoard(Callback):
    """Event files for TensorBoard: ``train/`` figures of every step, ``eval/`` of evaluations.

    Parameters
    ----------
    directory : path
        Where they go. On resume, events after the step that the run starts from are purged by
        TensorBoard itself.

    Raises
    ------
    ConfigError
        If tensorboard is not installed.
    """

    def __init__(self, directory: str | Path):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ConfigError(
                "training.tensorboard: needs tensorboard; pip install 'loopos[tensorboard]'"
            ) from error
        self.directory = Path(directory)
        self._event, self._summary, self._open = event_pb2, summary_pb2, EventFileWriter
        self._writer: Any = None

    def on_start(self, info: RunInfo) -> None:
        """Open the file (raises OutputError)."""
        try:
            self._writer = self._open(str(self.directory))
        except OSError as error:
            raise OutputError(f"{self.directory}: cannot be written ({error.strerror})") from error
        log = self._event.SessionLog(status=self._event.SessionLog.START)
        self._add(info.start_step + 1, session_log=log)

    def on_step(self, record: Record) -> None:
        """Write the step's figures."""
        self._scalars("train", record, record)

    def on_evaluate(self, record: Record) -> None:
        """Write the evaluation's figures that are single numbers."""
        self._scalars("eval", record["eval"], record)

    def on_end(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _scalars(self, group: str, figures: Mapping[str, Any], record: Record) -> None:
        values = [
            self._summary.Summary.Value(tag=f"{group}/{name}", simple_value=float(figure))
            for name, figure in figures.items()
            if name != "step" and np.ndim(figure) == 0 and not isinstance(figure, (str, Mapping))
        ]
        self._add(record["step"], summary=self._summary.Summary(value=values))

    def _add(self, step: int, **content: Any) -> None:
        event = self._event.Event(wall_time=time.time(), step=step, **content)
        self._writer.add_event(event)


def _plain(value: Any) -> Any:
    """Return `value` as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    return value


class ConsoleProgress(Callback):
    """A bar with loss, tokens/s and time left on a terminal; plain lines elsewhere.

    Of a method that learns from its own samples, reward, KL and length stand in place of the loss,
    and above the bar a table of prompts, responses and scores.

    Parameters
    ----------
    stream : text stream, optional
        Standard error by default.
    interval_s : float
        Seconds between plain lines.
    """

    def __init__(self, stream: IO[str] | None = None, interval_s: float = 5.0):
        self._stream = sys.stderr if stream is None else stream
        self._interval_s = interval_s
        self._progress: Any = None
        self._task: Any = None
        self._table: Any = None
        self._total = 0
        self._last = self._started = self._shown = 0.0
        self._first = 0
        self._unheard = False

    def on_start(self, info: RunInfo) -> None:
        """Show the bar, or remember when the run began."""
        self._total, self._first = info.total_steps, info.start_step
        self._last = self._started = time.monotonic()
        if not self._stream.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        console = Console(file=self._stream)
        if console.is_dumb_terminal:  # a bar would stay unseen up to the end
            return

        class WithTable(Progress):
            """The bar, and above it the samples that were shown last."""

            def get_renderables(bar) -> Any:
                if self._table is not None:
                    yield self._table
                yield bar.make_tasks_table(bar.tasks)

        self._progress = WithTable(*columns, console=console, expand=True)
        self._task = self._progress.add_task("", total=info.total_steps, completed=info.start_step)
        self._progress.start()

    def on_step(self, record: Record) -> None:
        """Move the bar; or print a line when the last one is old enough."""
        text = f"{_told(record)}  {record['tokens_per_s']:,.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"], description=text)
            return
        now = time.monotonic()
        if now - self._last < self._interval_s:
            return
        self._last = now
        done = record["step"] - self._first
        left_s = (now - self._started) / done * (self._total - record["step"])
        self._print(f"step {record['step']}/{self._total}  {text}  {_duration(left_s)} left")

    def on_samples(self, step: int, rows: Sequence[Record]) -> None:
        """Show samples above the bar; or print some of them where the last lines are old enough."""
        if self._progress is not None:
            self._table = samples_table(step, rows[:_ROWS], self._progress.console.width)
            return
        now = time.monotonic()
        if now - self._shown < self._interval_s:
            return
        self._shown = now
        for line in sample_lines(step, rows[:_LINES]):
            self._print(line)

    def on_evaluate(self, record: Record) -> None:
        """Print the figures of an evaluation."""
        numbers = {n: float(v) for n, v in record["eval"].items() if np.ndim(v) == 0
                   and isinstance(v, (float, np.floating))}  # fmt: skip
        known = [n for n in _TOLD if n in numbers]
        figures = [f"{name} {numbers[name]:z.4f}" for name in known or numbers]
        self._print(f"step {record['step']}/{self._total}  evaluation: {', '.join(figures)}")

    def on_end(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, line: str) -> None:
        if self._unheard:
            return
        try:
            if self._progress is not None:
                self._progress.console.print(line, highlight=False, markup=False)
            else:
                print(line, file=self._stream, flush=True)
        except OSError:  # the reader has left: hours of training are worth more than a line
            self._unheard = True


def _told(record: Record) -> str:
    """Say how a step went: by its loss, or of a policy by reward, KL and length."""
    if "reward/score" not in record:
        return f"loss {record['loss']:.4f}"
    parts = [f"reward {record['reward/score']:.4f}"]
    if "kl/mean" in record:
        parts.append(f"KL {record['kl/mean']:z.3f}")
    return "  ".join([*parts, f"length {record['response/length']:.1f}"])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
