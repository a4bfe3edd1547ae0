"""From a configuration to a finished run: prepare, report, train, evaluate, save.

A run directory holds ``config.json``, ``data_report.json``, ``tokenizer/``, ``metrics.jsonl``,
``checkpoints/`` and at the end ``evaluation.json`` and ``model/``; of a method that learns from its
own samples also ``samples.jsonl`` and ``start.json``; and a directory for each stage before the
last, such as ``reward_model/``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopos.backends import get_backend, use_backend
from loopos.backends.threads import thread_limit
from loopos.config import RunConfig
from loopos.data.readers import Texts, split
from loopos.data.report import DataReport
from loopos.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from loopos.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    MissingFileError,
)
from loopos.files import atomic_directory, locked_directory, read_json, write_json
from loopos.methods import DATA_KEYS, STAGES
from loopos.models.config import TransformerConfig
from loopos.models.transformer import Transformer, parameter_shapes
from loopos.models.weights import load_config, load_model
from loopos.run_directory import check_directory, clear_results
from loopos.training.checkpoint import read_state
from loopos.training.loop import Interrupted, TrainResult
from loopos.training.options import TrainingOptions
from loopos.training.resume import MAY_CHANGE
from loopos.training.trackers import Callback, RunInfo

__all__ = ["Plan", "Prepared", "Summary", "computing", "plan", "prepare", "run"]

#: What may differ when a run is continued: data is compared by what it holds, not by its place.
_MAY_CHANGE = {
    "computation.description",
    "computation.backend",
    "computation.num_threads",
    "data.training_data",
    *(f"data.{key}" for key in DATA_KEYS.values()),
    "data.validation_data",
    "data.output_dir",
    *(f"training.{name}" for name in MAY_CHANGE),
}

#: Bytes of data that are read, and made a tokenizer of, before anybody wonders.
_LONG_BYTES = 1 << 17


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs, checked, before any training.

    Attributes
    ----------
    trainer : FineTuner or Pretrainer
        With its model and tokenizer.
    training, validation : Texts
        `validation` is None when there is none.
    report : DataReport
    num_parameters : int
    model : Transformer
        The body.
    """

    trainer: Any
    training: Texts
    validation: Texts | None
    report: DataReport
    num_parameters: int
    model: Transformer


@dataclass(frozen=True)
class Plan:
    """How long a run will be: optimizer steps in the first epoch, and in all; what it trains.

    Of a run in several stages, `stages` has a plan of each by its name, in their order; steps are
    those of all of them together, and trained parameters those of the last.
    """

    steps_per_epoch: int
    total_steps: int
    trained_parameters: int
    stages: dict[str, Plan] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What a run came to: the loop's result, final figures (empty without validation), places."""

    result: TrainResult
    evaluation: dict[str, Any]
    output_dir: Path


@contextmanager
def computing(config: RunConfig) -> Iterator[None]:
    """Compute inside the block with the backend and threads that the configuration names.

    "auto" is the backend in force: ``LOOPOS_BACKEND`` and ``set_backend`` count.

    Raises
    ------
    BackendError
        If the backend is unknown or cannot run here, naming the key where the configuration, the
        variable where the environment asked for it.
    """
    named = config.computation.backend
    try:
        backend = use_backend(get_backend() if named == "auto" else named)
        backend.__enter__()
    except BackendError as error:
        if named == "auto":  # the configuration is not at fault
            raise
        raise BackendError(f"{config.where('computation.backend')}: {error}") from error
    with ExitStack() as stack:
        stack.push(backend)
        stack.enter_context(thread_limit(config.computation.num_threads))
        yield


@contextmanager
def _located(config: RunConfig, key: str | None = None) -> Iterator[None]:
    """Say in which file and line the key at fault stands: `key`, or the one a message names."""
    try:
        yield
    except (ConfigError, DataError) as error:
        named, colon, _ = str(error).partition(": ")
        section, _, name = named.partition(".")
        if key is not None:
            raise ConfigError(f"{config.where(key)}: {error}") from error
        if colon and name.isidentifier() and section in ("model", "training", "data"):
            raise ConfigError(str(error).replace(named, config.where(named), 1)) from error
        raise


@contextmanager
def _named(config: RunConfig, key: str) -> Iterator[None]:
    """Say which key it was that named what is not there."""
    try:
        yield
    except MissingFileError as error:
        raise MissingFileError(f"{config.where(key)}: {error}") from error


def _nothing_said(line: str) -> None:
    pass


def _is_long(config: RunConfig) -> bool:
    """Whether there is so much data that people wait for it."""
    files = [path for path in config.paths(config.data_key) if path.is_file()]
    return sum(path.stat().st_size for path in files) > _LONG_BYTES


def prepare(
    config: RunConfig,
    run_dir: Path | None = None,
    tell: Callable[[str], None] = _nothing_said,
) -> Prepared:
    """Read and check data, tokenizer and model; nothing is written.

    Parameters
    ----------
    config : RunConfig
    run_dir : Path, optional
        Of a run to be resumed: its tokenizer is used.
    tell : callable, optional
        Given a line before reading data and before training a tokenizer, where the data is more
        than a few rows.

    Raises
    ------
    InputError
        One sentence for whatever does not fit, naming the key, or file and line.
    """
    data, seed = config.data, config.computation.seed
    tell = tell if _is_long(config) else _nothing_said
    tell("reading data")
    whole = _read(config, config.data_key)
    training, validation = whole, None
    if data.validation_data is not None:
        validation = _read(config, "validation_data", like=whole)
    elif data.validation_fraction > 0:
        with _located(config, "data.validation_fraction"):
            training, validation = _split(whole, data.validation_fraction, seed)
    model = _model(config)
    tokenizer = _tokenizer(config, model, training, run_dir, tell)
    num_classes = config.model.get("num_classes")
    told = {key: _told(config, key) for key in getattr(config.method, "MAKE_TAKES", ())}
    with _located(config):
        trainer = config.method.make(
            model, tokenizer, training, num_classes=num_classes, seed=seed, **told
        )
        report = trainer.report(training, validation, config.training)
    return Prepared(trainer, training, validation, report, model.num_parameters(), model)


def _split(whole: Any, fraction: float, seed: int) -> tuple[Any, Any]:
    try:
        return split(whole, fraction, seed)
    except DataError as error:  # of a single row, for one
        raise DataError(
            f"{error}; name data.validation_data, or set data.validation_fraction to 0 to have none"
        ) from error


def _told(config: RunConfig, key: str) -> str | None:
    """Return the directory of another model that a method reads for itself."""
    if getattr(config.data, key) is None:
        return None
    with _named(config, f"data.{key}"):
        return config.model_source(key)


def _read(config: RunConfig, key: str, like: Texts | None = None) -> Any:
    """Read data files as the method wants them."""
    paths, data = config.paths(key), config.data
    num_classes = config.model.get("num_classes")
    source = paths[0] if len(paths) == 1 else paths
    try:
        return config.method.read(
            source,
            data.text_field,
            data.label_field,
            options=config.training,
            like=like,
            num_classes=num_classes,
        )
    except DataError as error:
        if any(str(path) in str(error) for path in paths):
            raise
        place = paths[0] if len(paths) == 1 else config.where(f"data.{key}")
        raise DataError(f"{place}: {error}") from error


def _model(config: RunConfig) -> Transformer:
    asked = {name: value for name, value in config.model.items() if name != "num_classes"}
    if config.data.pretrained_weights is None:
        with _located(config, "model"):
            transformer = TransformerConfig(**asked)
            _refuse_giants(transformer, config.training)
        return Transformer(transformer, seed=config.computation.seed)
    source = config.model_source("pretrained_weights")
    path = Path(source)
    if (path / "metrics.jsonl").is_file() and not (path / "model.safetensors").is_file():
        raise ConfigError(
            f"{config.where('data.pretrained_weights')}: {path} is a run directory; "
            f"its model is {path / 'model'}"
        )
    with _named(config, "data.pretrained_weights"):
        sizes = load_config(source)
        with _located(config, "data.pretrained_weights"):
            _refuse_giants(sizes, config.training)
        model = load_model(source)
    dropout = asked.pop("dropout", 0.0)
    for name, value in asked.items():
        found = getattr(model.config, name)
        if found != value:
            raise ConfigError(
                f"{config.where(f'model.{name}')}: {value!r}, but data.pretrained_weights "
                f"({source}) has {found!r}"
            )
    model.config = dataclasses.replace(model.config, dropout=dropout)
    return model


def _refuse_giants(transformer: TransformerConfig, options: TrainingOptions) -> None:
    """Refuse a model whose training cannot fit this machine, whatever its batches are."""
    if not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    count = sum(math.prod(shape) for shape in parameter_shapes(transformer).values())
    whole = options.lora is None and getattr(options, "train", "all") == "all"
    # Each trained parameter has a gradient and what the optimizer keeps of it.
    kept = 1 + (2 if options.optimizer != "sgd" else int(options.momentum > 0))
    needed = 4 * count * (1 + (kept if whole else 0))
    if needed > memory:
        raise ConfigError(
            f"{count:,} parameters need {needed / 2**30:,.0f} GiB to train, "
            f"this machine has {memory / 2**30:,.0f} GiB of memory"
        )


def _tokenizer(
    config: RunConfig,
    model: Transformer,
    training: Texts,
    run_dir: Path | None,
    tell: Callable[[str], None],
) -> Tokenizer:
    size = model.config.vocab_size
    if run_dir is not None:
        return load_tokenizer(run_dir / "tokenizer")
    if config.data.tokenizer is None and config.data.pretrained_weights is None:
        with _located(config, "model.vocab_size"):
            tell(f"training a tokenizer of {size:,} tokens")
            digits = getattr(config.method, "INDIVIDUAL_DIGITS", False)
            return train_bpe(training.corpus, size, individual_digits=digits)
    key = "pretrained_weights" if config.data.tokenizer is None else "tokenizer"
    source = config.model_source(key)
    with _named(config, f"data.{key}"):
        tokenizer = load_tokenizer(source)
    if tokenizer.vocab_size > size:
        raise ConfigError(
            f"{config.where(f'data.{key}')}: the tokenizer in {source} has {tokenizer.vocab_size} "
            f"ids, more than the model's vocab_size {size}"
        )
    return tokenizer


# -- how long -----------------------------------------------------------------------------------


class _Known(Exception):
    """Leaves a run at its very start, with what is known of it then."""

    def __init__(self, info: RunInfo):
        self.info = info


class _Leave(Callback):
    def on_start(self, info: RunInfo) -> None:
        """Leave."""
        raise _Known(info)


def plan(config: RunConfig, prepared: Prepared) -> Plan:
    """Return how many optimizer steps a run will make; nothing is trained or written.

    The method goes as far as the first step, so that everything it checks before is checked.

    Raises
    ------
    InputError
        As :func:`run`.
    """
    trainer, options = prepared.trainer, config.training
    data = prepared.training, prepared.validation
    if not hasattr(trainer, "stage_fits"):

        def fit(**overrides: Any) -> None:
            changed = dataclasses.replace(options, **overrides)
            trainer.fit(*data, changed, callbacks=[_Leave()])

        return _plan_of(config, fit)
    fits = trainer.stage_fits(*data, options, callbacks=[_Leave()])
    plans = {name: _plan_of(config, fit) for name, fit in fits.items()}
    return Plan(
        sum(stage.steps_per_epoch for stage in plans.values()),
        sum(stage.total_steps for stage in plans.values()),
        [*plans.values()][-1].trained_parameters,
        plans,
    )


def _plan_of(config: RunConfig, fit: Callable[..., Any]) -> Plan:
    """Plan what `fit` does, which takes options by name and leaves before its first step."""

    def known(**overrides: Any) -> RunInfo:
        with _located(config):
            try:
                fit(**overrides)
            except _Known as left:
                return left.info
        raise AssertionError("a run called no callback")

    whole = known()
    steps_per_epoch = known(num_epochs=1, max_steps=None).total_steps
    return Plan(steps_per_epoch, whole.total_steps, whole.trained_parameters)


# -- the run -------------------------------------------------------------------------------------


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    stop: Callable[[], bool] | None = None,
    on_prepared: Callable[[Prepared], Prepared | None] | None = None,
    tell: Callable[[str], None] = _nothing_said,
) -> Summary:
    """Carry out a configuration.

    Parameters
    ----------
    config : RunConfig
    resume : bool
        Continue the run in the output directory from its newest whole checkpoint.
    callbacks : sequence of Callback
    stop : callable, optional
        Asked after every step; True saves the state and ends the run.
    on_prepared : callable, optional
        Given what was prepared, before the first step; may return what to go on with instead.
    tell : callable, optional
        As that of :func:`prepare`.

    Raises
    ------
    InputError
        If anything in the configuration or the data does not fit, or the directory holds a run, or
        another run is going in it.
    OutputError
        If the output directory cannot be written.
    Interrupted
        If `stop` ended the run; the state is saved.
    """
    directory = config.output_dir
    with locked_directory(directory), computing(config):
        checkpoint = check_directory(directory, resume, STAGES.get(config.computation.method, ()))
        prepared = prepare(config, None if checkpoint is None else directory, tell)
        record = config.as_dict() | {"places": _places(config)} | _identity(prepared)
        if checkpoint is not None:
            _refuse_changes(config, checkpoint, record)
        if on_prepared is not None:
            prepared = on_prepared(prepared) or prepared
        with _located(config):
            result = prepared.trainer.fit(
                prepared.training,
                prepared.validation,
                config.training,
                output_dir=directory,
                callbacks=[_Opening(config, prepared, directory), *callbacks],
                resume=checkpoint is not None,
                stop=stop,
                run_config=record,
            )
        if result.stopped_reason == "interrupted":
            raise Interrupted(
                f"interrupted after step {result.steps}, saved in {result.last_checkpoint}",
                result.last_checkpoint,
            )
        evaluation: dict[str, Any] = {}
        if prepared.validation is not None:
            evaluation = prepared.trainer.evaluate(prepared.validation, config.training)
            write_json(directory / "evaluation.json", evaluation)
        with atomic_directory(directory / "model") as temporary:
            prepared.trainer.save(temporary)
    return Summary(result, evaluation, directory)


class _Opening(Callback):
    """Writes what a run starts from, once everything is checked and the first step is next.

    What an earlier end of the run left is older than the run from here on, and goes.
    """

    def __init__(self, config: RunConfig, prepared: Prepared, directory: Path):
        self._config, self._prepared, self._directory = config, prepared, directory

    def on_start(self, info: RunInfo) -> None:
        """Write configuration, report and tokenizer; clear results if there are steps left."""
        values = self._config.as_dict()
        values["data"] |= self._config.inputs()  # whoever reads it stands somewhere else
        write_json(self._directory / "config.json", values)
        write_json(self._directory / "data_report.json", self._prepared.report.to_dict())
        self._prepared.trainer.tokenizer.save(self._directory / "tokenizer")
        if info.start_step < info.total_steps and not _ended(info):
            clear_results(self._directory)


def _ended(info: RunInfo) -> bool:
    """Whether the checkpoint that a run goes on from says that no further step is to be made."""
    if info.output_dir is None:
        return False
    checkpoint = info.output_dir / "checkpoints" / f"step-{info.start_step:08d}"
    return checkpoint.is_dir() and bool(read_state(checkpoint).get("exhausted"))


def _places(config: RunConfig) -> dict[str, str]:
    """Return where models and tokenizers lie, seen from the run's directory.

    By that a continuation knows them, however its configuration writes their paths.
    """
    start = config.output_dir.resolve()
    found = {key: path for key, path in config.inputs().items() if isinstance(path, str)}
    return {
        # A name on the Hub has no anchor, and another drive is not seen from here.
        key: os.path.relpath(path, start) if Path(path).anchor == start.anchor else path
        for key, path in found.items()
        if f"data.{key}" not in _MAY_CHANGE
    }


def _identity(prepared: Prepared) -> dict[str, Any]:
    """Return what must be the same when a run is continued, beside its options."""
    digest = hashlib.sha256()
    for data in (prepared.training, prepared.validation):
        for part in () if data is None else data.parts():
            digest.update(part.encode("utf-8"))
        digest.update(b"\1")
    return {
        "data_sha256": digest.hexdigest(),
        "transformer": dataclasses.asdict(prepared.model.config),
    }


def _refuse_changes(config: RunConfig, checkpoint: Path, now: dict[str, Any]) -> None:
    """Refuse to continue with other options, model or data than the run began with."""
    was = read_state(checkpoint).get("run_config")
    if not isinstance(was, dict):
        raise CheckpointError(f"{checkpoint}: was not saved by 'loopos run'")
    kinds = {"model": TransformerConfig} | {
        name: type(getattr(config, name)) for name in ("computation", "training", "data")
    }
    # What lies in the same place, though it is written in another way: seen from the run's
    # directory, which moves with its project, or as the run's own config.json has it.
    places, own = was.get("places", {}), config.output_dir / "config.json"
    written = read_json(own).get("data", {}) if own.is_file() else {}
    unmoved = {name for name, path in now["places"].items() if path == places.get(name)}
    unmoved |= {name for name, path in config.inputs().items() if path == written.get(name)}
    for section, kind in kinds.items():
        kept = "transformer" if section == "model" else section
        for name, after in now[kept].items():
            key = f"{section}.{name}"
            default = getattr(kind, name, None)
            default = list(default) if isinstance(default, tuple) else default  # as JSON holds it
            # What it does not know did not change anything then, as its default does not now.
            before = was.get(kept, {}).get(name, default)
            same = before == after or (section == "data" and name in unmoved)
            if key not in _MAY_CHANGE and not same:
                raise CheckpointError(
                    f"{config.where(key)}: {after!r}, but the run to be continued "
                    f"({checkpoint.parent.parent}) has {before!r}"
                )
    if was.get("data_sha256") != now["data_sha256"]:
        raise CheckpointError(
            f"{config.where(f'data.{config.data_key}')}: the data is not that of the run to be "
            f"continued ({checkpoint.parent.parent})"
        )
