"""One plain loop. It knows parameters and an objective; it knows no method and no model.

Per optimizer step: add up the counts of the whole effective batch, run each microbatch backward
with upstream gradient one over the total of each term, clip, update, record. The order of batches
is a function of the seed and the epoch, so a position is two integers, and resuming gives the same
bytes.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from loopos.autograd import Array, Parameter, Tensor, backward
from loopos.backends import get_backend
from loopos.data.batch import Batch
from loopos.data.sampler import BatchSampler, prefetch
from loopos.errors import ConfigError, LooposError, NumericalError, OutputError
from loopos.ops import DropoutKeys
from loopos.training.checkpoint import damage, frozen_sha256, prune, save_checkpoint
from loopos.training.optim import gradient_norm
from loopos.training.options import TrainingOptions, make_optimizer
from loopos.training.resume import own_directory, require_json, require_unused, take_over
from loopos.training.schedules import make_schedule
from loopos.training.trackers import Callback, MetricsFile, RunInfo, TensorBoard

__all__ = ["Interrupted", "Objective", "TrainResult", "TrainingOptions", "train"]

_log = logging.getLogger("loopos")

#: Columns of a step's record beside its terms.
_COLUMNS = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s",
            "time_s")  # fmt: skip


class Objective(Protocol):
    """What is minimised: terms, each a sum over what it counts.

    ``counts`` is asked of every microbatch of a step before the first ``losses``. An objective may
    have a method ``figures() -> dict`` too: what to record of a step beside its terms.
    """

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return the count of each term, from the data alone, before any forward."""

    def losses(self, batch: Batch, dropout: DropoutKeys | None) -> dict[str, Tensor]:
        """Return the sum of each term, a tensor with one element."""


class Interrupted(LooposError):
    """The run was interrupted; `checkpoint` is where it continues, None if nothing was saved."""

    def __init__(self, message: str, checkpoint: Path | None):
        super().__init__(message)
        self.checkpoint = checkpoint


@dataclass
class TrainResult:
    """What came of a run.

    Attributes
    ----------
    steps : int
        Optimizer steps done, those before a resume included.
    stopped_reason : {"finished", "early_stopping", "interrupted"}
    history : list of dict
        The records of the steps of this call.
    evaluations : list of dict
        The records of its evaluations.
    best_metric : float or None
        Best value of the monitored figure.
    best_checkpoint, last_checkpoint : Path or None
        Where they are, if the run writes.
    """

    steps: int
    stopped_reason: str
    history: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    best_metric: float | None
    best_checkpoint: Path | None
    last_checkpoint: Path | None


@dataclass
class _Progress:
    """Where a run is: all that changes beside weights and optimizer."""

    step: int = 0
    epoch: int = 0
    index: int = 0
    best_value: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    #: True while an evaluation that is due at `step` has not been made.
    evaluation_due: bool = False
    #: True once `early_stopping_patience` has run out, or what `reason` names has ended the run.
    exhausted: bool = False
    reason: str | None = None


def train(
    parameters: Mapping[str, Parameter],
    objective: Objective,
    make_batch: Callable[[Array, Array], Batch],
    lengths: Array,
    options: TrainingOptions,
    *,
    seed: int = 0,
    output_dir: str | Path | None = None,
    evaluate: Callable[[], dict[str, Any]] | None = None,
    monitor: tuple[str, str] = ("loss", "min"),
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    stop: Callable[[], bool] | None = None,
    run_config: dict[str, Any] | None = None,
    rate_factors: Mapping[str, float] | None = None,
) -> TrainResult:
    """Train.

    Parameters
    ----------
    parameters : mapping of str to Parameter
        Frozen ones are not touched, and not saved.
    objective : Objective
        What is minimised.
    make_batch : callable
        ``(indices, sample_ids) -> Batch`` of the samples `indices`; ``sample_ids`` are their places
        in the effective batch.
    lengths : ndarray of int
        Tokens of each sample.
    options : TrainingOptions
        How to train.
    seed : int
        Of the order of samples and of dropout.
    output_dir : path, optional
        Gets ``metrics.jsonl`` and ``checkpoints/`` (the best and the last, two at the
        least); None writes nothing.
    evaluate : callable, optional
        Returns figures on held-out data.
    monitor : (str, "min" or "max")
        Which of them says what is best.
    callbacks : sequence of Callback
        Told of every step and evaluation.
    resume : bool
        Continue from the newest whole checkpoint.
    stop : callable, optional
        Asked after every step; True saves and ends the run.
    run_config : dict, optional
        Kept in checkpoints.
    rate_factors : mapping of str to float, optional
        Factor of the learning rate for some parameters.

    Raises
    ------
    ConfigError
        If an option asks for what is not there: an output directory, an evaluation, a figure; or
        JSON cannot hold what checkpoints are to keep.
    InputError
        If `output_dir` holds the checkpoints of a run, and this is not its continuation; or another
        run is going in it.
    CheckpointError
        If there is nothing whole to resume, or it belongs to another run; nothing is changed then.
    NumericalError
        If a loss, gradient or figure is not finite or nothing counts; the state before it is saved.
    Interrupted
        On KeyboardInterrupt; the last completed step is saved.
    """
    root = None if output_dir is None else Path(output_dir)
    try:
        seed = operator.index(seed)  # checkpoints hold JSON, which knows none of NumPy's numbers
    except TypeError as error:
        raise ConfigError(f"seed: expected an integer, found {seed!r}") from error
    run = _Run(parameters, objective, make_batch, lengths, options, seed, root, evaluate, monitor)
    run.stop, run.run_config = stop, run_config
    if root is not None:
        run.metrics_file = MetricsFile(root / "metrics.jsonl")
        require_json(run._state())
    run.callbacks = callbacks
    if options.tensorboard:
        if root is None:
            raise ConfigError("training.tensorboard: needs an output directory")
        run.callbacks = [*callbacks, TensorBoard(root / "tensorboard")]
    run.optimizer.rate_factors = dict(rate_factors or {})
    with nullcontext() if root is None else own_directory(root):
        if resume:
            run.restore()
        elif root is not None:
            require_unused(root)
        return run.go()


@dataclass
class _Run:
    parameters: Mapping[str, Parameter]
    objective: Objective
    make_batch: Callable[[Array, Array], Batch]
    lengths: Array
    options: TrainingOptions
    seed: int
    root: Path | None
    evaluate: Callable[[], dict[str, Any]] | None
    monitor: tuple[str, str]
    stop: Callable[[], bool] | None = None
    run_config: dict[str, Any] | None = None
    metrics_file: Callback = field(default_factory=Callback)
    callbacks: Sequence[Callback] = ()
    at: _Progress = field(default_factory=_Progress)
    history: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    saved: Path | None = None
    saved_state: dict[str, Any] | None = None
    #: True from the first changed weight until position and record of the step are in accord.
    updating: bool = False

    def __post_init__(self) -> None:
        options = self.options
        if len(self.lengths) == 0:
            raise ConfigError("there is no sample to train on")
        if self.monitor[1] not in ("min", "max"):
            raise ConfigError(f"monitor: expected 'min' or 'max', found {self.monitor[1]!r}")
        if options.early_stopping_patience is not None and self.evaluate is None:
            raise ConfigError("training.early_stopping_patience: needs validation data")
        self.sampler = BatchSampler(
            self.lengths,
            batch_size=None if options.batch_tokens else options.batch_size,
            batch_tokens=options.batch_tokens,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            shuffle=options.shuffle,
            length_bucketing=options.length_bucketing,
            seed=self.seed,
        )
        self.total_steps = self.sampler.count(options.num_epochs, options.max_steps)
        self.rate = make_schedule(
            options.scheduler,
            options.learning_rate,
            options.warmup_steps,
            self.total_steps,
            min_learning_rate=options.min_learning_rate,
            shape=options.schedule_shape,
        )
        trained = {n: p for n, p in self.parameters.items() if p.requires_grad}
        if not trained:
            raise ConfigError("every parameter is frozen, so there is nothing to train")
        self.optimizer = make_optimizer(trained, options)

    # -- the loop --------------------------------------------------------------------------------

    def go(self) -> TrainResult:
        """Run to the end, and tell callbacks whatever happens."""
        at = self.at
        trained = sum(parameter.data.size for parameter in self.optimizer.parameters.values()
                      if parameter.requires_grad)  # fmt: skip
        info = RunInfo(
            self.total_steps, at.step, len(self.lengths), self.root, at.evaluation_due, trained
        )
        with ExitStack() as stack:
            for callback in (self.metrics_file, *self.callbacks):
                stack.callback(callback.on_end)
                callback.on_start(info)
            try:
                reason = self._epochs()
                if self.root is not None:
                    self.save()
            except KeyboardInterrupt as interrupt:
                raise self._interrupted() from interrupt
        return TrainResult(
            self.at.step, reason, self.history, self.evaluations, self.at.best_value,
            self._checkpoint_of(self.at.best_step), self.saved,
        )  # fmt: skip

    def _epochs(self) -> str:
        """Return why the run ended."""
        if self.at.evaluation_due:
            self._evaluate()
        while self.at.step < self.total_steps and not self.at.exhausted:
            batches = self.sampler.epoch(self.at.epoch)
            plan = batches[self.at.index :][: self.total_steps - self.at.step]
            thunks = [partial(self._make, micro) for micro in plan]
            ahead = self.options.prefetch_batches, self.options.num_workers
            for made in prefetch(thunks, *ahead):
                self._step(made, batches[self.at.index], len(batches))
                self._after_step()
                if self.at.exhausted:
                    break
                if self.stop is not None and self.at.step < self.total_steps and self.stop():
                    return "interrupted"
        return (self.at.reason or "early_stopping") if self.at.exhausted else "finished"

    def _make(self, microbatches: list[Array]) -> list[Batch]:
        """Make the microbatches of one step; a sample's place in the whole keys its dropout."""
        starts = np.cumsum([0, *(len(indices) for indices in microbatches)])
        return [
            self.make_batch(indices, np.arange(start, start + len(indices), dtype=np.int32))
            for start, indices in zip(starts, microbatches, strict=False)
        ]

    def _step(self, batches: list[Batch], indices: list[Array], steps_in_epoch: int) -> None:
        started = time.perf_counter()
        totals, sums = self._totals(batches, indices), dict[str, float]()
        for parameter in self.parameters.values():
            parameter.zero_grad()
        for batch, samples in zip(batches, indices, strict=True):
            terms = self.objective.losses(batch, DropoutKeys(self.seed, self.at.step))
            for name, term in terms.items():
                if name not in totals:
                    raise LooposError(f"the objective has a loss '{name}', but no count of it")
                sums[name] = sums.get(name, 0.0) + term.item()
                if not np.isfinite(sums[name]):
                    self._fail(f"{name} is {term.item()}", samples)
            backward([(term, 1.0 / totals[name]) for name, term in terms.items()])
        for name in totals:
            if name not in sums:
                raise LooposError(f"the objective counts '{name}', but has no loss of that name")
        norm = gradient_norm(self.optimizer.parameters.values())
        if not np.isfinite(norm):
            bad = _first_not_finite({n: p.grad for n, p in self.optimizer.parameters.items()})
            of = f"'{bad}'" if bad else "all parameters together"
            self._fail(f"the gradient of {of} is not finite", indices)
        limit = self.options.max_grad_norm
        scale = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        rate = self.rate(self.at.step)
        epoch = self.at.epoch
        self.updating = True
        self.optimizer.step(scale, rate)
        self._advance(steps_in_epoch)
        means = {name: sums[name] / totals[name] for name in sums}
        tokens, spent = sum(batch.num_tokens for batch in batches), time.perf_counter() - started
        record: dict[str, Any] = {"step": self.at.step, "epoch": epoch}
        record |= {"loss": sum(means.values()), **(means if len(means) > 1 else {})}
        record |= {"learning_rate": rate, "grad_norm": norm, "tokens": tokens}
        record |= {"tokens_per_s": tokens / spent, "time_s": spent}
        # Of an objective that measures more than it minimises: figures of the step that ends.
        record |= getattr(self.objective, "figures", dict)()
        self.history.append(record)
        self.metrics_file.on_step(record)
        self.updating = False
        for callback in self.callbacks:
            callback.on_step(record)

    def _totals(self, batches: list[Batch], indices: list[Array]) -> dict[str, float]:
        totals: dict[str, float] = {}
        for batch in batches:
            for name, count in self.objective.counts(batch).items():
                totals[name] = totals.get(name, 0.0) + count
        for name, total in totals.items():
            if len(totals) > 1 and name in _COLUMNS:
                raise LooposError(f"the objective's term '{name}' is called as a column of records")
            if not total > 0:
                self._fail(f"nothing counts towards {name}", indices)
        return totals

    def _fail(self, what: str, samples: Any) -> NoReturn:
        """Stop the run with a sentence that names the samples."""
        rows = np.concatenate([np.atleast_1d(s) for s in samples]).tolist()
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        self._halt(f"step {self.at.step + 1}: {what} (samples {shown})")

    def _halt(self, message: str) -> NoReturn:
        """Save the last good state and stop the run."""
        bad = self._bad_weight()
        if bad is not None:
            message += f"; parameter '{bad}' was not finite before"
        else:
            message += self._where_saved()
        raise NumericalError(message)

    def _where_saved(self) -> str:
        """Save the state, and say where."""
        if self.root is None:
            return ""
        try:
            return f"; the state before it is in {self.save()}"
        except (OutputError, NumericalError) as error:
            return f"; the state before it is lost: {error}"

    def _bad_weight(self) -> str | None:
        return _first_not_finite({name: p.data for name, p in self.parameters.items()})

    # -- after a step ------------------------------------------------------------------------------

    def _advance(self, steps_in_epoch: int) -> None:
        """Move on by one step, all at once: an interrupt must find position and plans in accord."""
        at = self.at
        at.step, at.index = at.step + 1, at.index + 1
        if at.index == steps_in_epoch:
            at.epoch, at.index = at.epoch + 1, 0
        at.evaluation_due = self.evaluate is not None and self._due(self.options.eval_steps)

    def _due(self, every: int | None) -> bool:
        """Whether what happens every so many steps (None: every epoch) is due after this one."""
        if self.at.step == self.total_steps:
            return True
        return self.at.index == 0 if every is None else self.at.step % every == 0

    def _after_step(self) -> None:
        if self.at.evaluation_due:
            self._evaluate()
        if self.root is not None and self._due(self.options.save_steps):
            self.save()

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        try:
            figures = self.evaluate()
        except (Interrupted, OutputError):
            raise
        except LooposError as error:  # a resumed run begins with this evaluation
            said = f"step {self.at.step}: the evaluation failed: {error}"
            raise type(error)(said + self._where_saved()) from error
        at, (name, direction) = self.at, self.monitor
        if name not in figures:
            raise ConfigError(f"the evaluation has no figure '{name}' to monitor")
        for key, figure in figures.items():
            if isinstance(figure, (float, np.floating)) and not np.isfinite(figure):
                self._halt(f"step {at.step}: the evaluation's {key} is {figure}")
        value = float(figures[name])
        sign = 1.0 if direction == "min" else -1.0
        better = self._may_be_best(figures) and (
            at.best_value is None or sign * value < sign * at.best_value
        )
        record = {"step": at.step, "epoch": at.epoch, "eval": figures, "best": better}
        self.evaluations.append(record)
        for callback in (self.metrics_file, *self.callbacks):
            callback.on_evaluate(record)
        since = 0 if better else at.evaluations_since_best + 1
        patience = self.options.early_stopping_patience
        # In one assignment: an interrupt saves the state before the evaluation or the one after it.
        self.at = replace(
            at,
            evaluation_due=False,
            evaluations_since_best=since,
            exhausted=patience is not None and since >= patience,
            best_value=value if better else at.best_value,
            best_step=at.step if better else at.best_step,
        )
        if better and self.root is not None:
            self.save()

    def _may_be_best(self, figures: dict[str, Any]) -> bool:
        return True

    # -- checkpoints -------------------------------------------------------------------------------

    def _checkpoint_of(self, step: int | None) -> Path | None:
        if step is None or self.root is None:
            return None
        return self.root / "checkpoints" / f"step-{step:08d}"

    @cached_property
    def frozen(self) -> str | None:
        """One digest of all frozen parameters."""
        return frozen_sha256(self.parameters)

    def _state(self) -> dict[str, Any]:
        """Return all that a checkpoint holds beside arrays, as JSON values."""
        lengths = np.ascontiguousarray(self.lengths, dtype="<i8")
        return {
            **vars(self.at),
            "seed": self.seed,
            "num_samples": len(lengths),
            "lengths_sha256": hashlib.sha256(lengths.tobytes()).hexdigest(),
            "monitor": list(self.monitor),
            "total_steps": self.total_steps,
            "options": self.options.as_dict(),
            "trained": {name: p.requires_grad for name, p in self.parameters.items()},
            "frozen_sha256": self.frozen,
            "run_config": self.run_config,
            "backend": get_backend().describe(),
        }

    def save(self) -> Path:
        """Write the state after the last completed step; keep it and the best one.

        Raises
        ------
        NumericalError
            If a weight is not finite: the last good checkpoint is not to be lost for it.
        """
        assert self.root is not None
        state = self._state()
        if self.saved is not None and state == self.saved_state:
            return self.saved  # the best one, the last of an epoch and the end may be one step
        bad = self._bad_weight()
        if bad is not None:
            raise NumericalError(f"step {self.at.step}: parameter '{bad}' is not finite any more")
        checkpoints = self.root / "checkpoints"
        self.saved = save_checkpoint(checkpoints, self.parameters, self.optimizer, state)
        self.saved_state = state
        prune(checkpoints, self.saved, self._checkpoint_of(self.at.best_step))
        return self.saved

    def restore(self) -> None:
        """Take over the newest whole checkpoint, if it is one of this run."""
        if self.root is None:
            raise ConfigError("resume: needs the output_dir of the run to continue")
        defaults = {name: getattr(type(self.options), name, None) for name in vars(self.options)}
        path, state = take_over(
            self.root / "checkpoints", self.parameters, self.optimizer, self._state(), defaults
        )
        if state["format"] == 1:
            vars(self).pop("frozen", None)  # it has brought its own
        self.at = _Progress(**{name: state.get(name, was) for name, was in vars(self.at).items()})
        self.saved = path
        best = self._checkpoint_of(self.at.best_step)
        if best is not None and (reason := damage(best)):  # not known only when the run is done
            _log.warning("the best checkpoint is lost, the next evaluation is the best: %s", reason)
            self.at = replace(self.at, best_value=None, best_step=None)
        now, was = (
            f"{what['name']} ({what.get('isa', 'unknown')})"
            for what in (get_backend().describe(), state["backend"])
        )
        if was != now:  # allowed, but not to the byte
            _log.warning("resumed on backend %s what ran on %s", now, was)

    def _interrupted(self) -> Interrupted:
        if self.updating:
            where = f"; continue from {self.saved}" if self.saved else "; nothing was saved"
            return Interrupted(
                f"interrupted in the update of step {self.at.step + 1}{where}", self.saved
            )
        if self.root is None:
            return Interrupted(f"interrupted after step {self.at.step}", None)
        return Interrupted(
            f"interrupted after step {self.at.step}, saved in {self.save()}", self.saved
        )


def _first_not_finite(arrays: Mapping[str, Array | None]) -> str | None:
    for name, array in arrays.items():
        if array is not None and not np.isfinite(array).all():
            return name
    return None
