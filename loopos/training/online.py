"""Training on what the model itself produces: a step makes its own data, then updates.

Where :func:`loopos.training.loop.train` walks a fixed set, here a step hands some samples (prompts)
to a learner, which does with them what its method says, several optimizer steps among it. All else
is that loop's: order, schedule, evaluation, records, checkpoints, resuming, interrupts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loopos.autograd import Array, Parameter, Tensor
from loopos.data.batch import Batch
from loopos.errors import ConfigError, LooposError, OutputError
from loopos.ops import DropoutKeys
from loopos.training.checkpoint import load_checkpoint, read_state
from loopos.training.loop import TrainingOptions, TrainResult, _Run
from loopos.training.optim import Optimizer
from loopos.training.resume import own_directory, require_json, require_unused
from loopos.training.trackers import Callback, MetricsFile, TensorBoard

__all__ = ["EndOfRun", "Learner", "train_online"]


class EndOfRun(LooposError):
    """Raised by a learner in place of a step, to end the run; `reason` names why."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class Learner(Protocol):
    """What is trained, and how one step goes."""

    @property
    def optimizer(self) -> Optimizer:
        """Over the parameters that are trained."""

    def learn(
        self, samples: Array, rate: float, on_update: Callable[[], None] = ...
    ) -> dict[str, Any]:
        """Do one step; return its record.

        Parameters
        ----------
        samples : ndarray of int
            Indices of the step's samples.
        rate : float
            Learning rate.
        on_update : callable
            To be called before the first thing is changed.

        Raises
        ------
        EndOfRun
            If the run is to end before this step.
        """

    def within_budget(self, figures: Mapping[str, Any]) -> bool:
        """Whether what was evaluated may be kept as the best."""

    def state(self) -> dict[str, Any]:
        """Return what changes beside weights and optimizer, as JSON values."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave."""


def train_online(
    parameters: Mapping[str, Parameter],
    learner: Learner,
    lengths: Array,
    options: TrainingOptions,
    *,
    seed: int = 0,
    output_dir: str | Path | None = None,
    evaluate: Callable[[], dict[str, Any]] | None = None,
    monitor: tuple[str, str] = ("reward/score", "max"),
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    stop: Callable[[], bool] | None = None,
    run_config: dict[str, Any] | None = None,
) -> TrainResult:
    """Train; parameters and errors as :func:`loopos.training.loop.train`, the learner apart.

    A step that fails before it has changed a weight saves the state before it, as there. One that
    fails later, or is interrupted then, leaves the last checkpoint.

    Parameters
    ----------
    parameters : mapping of str to Parameter
        Of all networks. Frozen ones (a reference) are not saved, but resuming compares them.
    learner : Learner
    lengths : ndarray of int
        Tokens of each sample, by which a resumed run knows its data.
    options : TrainingOptions
        ``batch_size`` times ``gradient_accumulation_steps`` samples make a step.

    Returns
    -------
    TrainResult
        Its `stopped_reason` may also be that of an :class:`EndOfRun`.
    """
    root = None if output_dir is None else Path(output_dir)
    run = _OnlineRun(
        parameters, _Unused(), _no_batch, lengths, options, int(seed), root, evaluate, monitor,
        learner=learner,
    )  # fmt: skip
    run.stop, run.run_config = stop, run_config
    run.callbacks = callbacks
    if options.tensorboard:
        if root is None:
            raise ConfigError("training.tensorboard: needs an output directory")
        run.callbacks = [*callbacks, TensorBoard(root / "tensorboard")]
    if root is not None:
        run.metrics_file = MetricsFile(root / "metrics.jsonl")
        require_json(run._state())
    with nullcontext() if root is None else own_directory(root):
        if resume:
            run.restore()
        elif root is not None:
            require_unused(root)
        return run.go()


class _Unused:
    """The objective of a run whose learner has its own."""

    def counts(self, batch: Batch) -> dict[str, float]:
        raise LooposError("a learner counts for itself")

    def losses(self, batch: Batch, dropout: DropoutKeys | None) -> dict[str, Tensor]:
        raise LooposError("a learner has its own losses")


def _no_batch(indices: Array, sample_ids: Array) -> Batch:
    raise LooposError("a learner makes its own batches")


@dataclass
class _OnlineRun(_Run):
    learner: Learner | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.learner is not None
        self.optimizer = self.learner.optimizer

    def _make(self, microbatches: list[Array]) -> list[Batch]:
        return []

    def _may_be_best(self, figures: dict[str, Any]) -> bool:
        assert self.learner is not None
        return self.learner.within_budget(figures)

    def _step(self, batches: list[Batch], indices: list[Array], steps_in_epoch: int) -> None:
        assert self.learner is not None
        started, rate, epoch = time.perf_counter(), self.rate(self.at.step), self.at.epoch
        try:
            figures = self.learner.learn(np.concatenate(indices), rate, self._begin_update)
        except EndOfRun as end:
            best = self._checkpoint_of(self.at.best_step)
            if best is not None:  # it stays, also where it is the last one and is written again
                load_checkpoint(best, self.parameters)
            self.at.exhausted, self.at.reason = True, end.reason
            self.updating = False
            return
        except OutputError:
            raise
        except LooposError as error:
            raise type(error)(f"{error}{self._what_is_left()}") from error
        self._advance(steps_in_epoch)
        spent = time.perf_counter() - started
        record = {"step": self.at.step, "epoch": epoch, **figures, "learning_rate": rate}
        record |= {"tokens_per_s": figures["tokens"] / spent, "time_s": spent}
        self.history.append(record)
        self.metrics_file.on_step(record)
        self.updating = False
        for callback in self.callbacks:
            callback.on_step(record)

    def _begin_update(self) -> None:
        self.updating = True

    def _what_is_left(self) -> str:
        """Say where the run can go on after a fault."""
        if self.root is None:
            return ""
        if self.updating:
            return f"; continue from {self.saved}" if self.saved else "; nothing was saved"
        bad = self._bad_weight()
        if bad is not None:
            return f"; parameter '{bad}' was not finite before"
        return self._where_saved()

    def _state(self) -> dict[str, Any]:
        assert self.learner is not None
        return super()._state() | {"learner": self.learner.state()}

    def restore(self) -> None:
        """Take over the newest whole checkpoint, if it is one of this run."""
        super().restore()
        assert self.saved is not None
        assert self.learner is not None
        self.learner.load_state(read_state(self.saved)["learner"])
