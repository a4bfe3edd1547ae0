"""From a configuration to a finished run: prepare, report, train, evaluate, save.

A run directory holds ``config.json``, ``data_report.json``, ``tokenizer/``, ``metrics.jsonl``,
``checkpoints/`` and at the end ``evaluation.json`` and ``model/``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopos.backends import use_backend
from loopos.backends.threads import thread_limit
from loopos.config import RunConfig
from loopos.data.readers import Texts, split
from loopos.data.report import DataReport
from loopos.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from loopos.errors import CheckpointError, ConfigError, InputError, OutputError
from loopos.files import write_json
from loopos.models.transformer import Transformer, TransformerConfig
from loopos.models.weights import load_model
from loopos.training.checkpoint import damage
from loopos.training.loop import Interrupted, TrainResult
from loopos.training.trackers import Callback

__all__ = ["Prepared", "Summary", "computing", "prepare", "run"]

#: Sizes that a fresh model cannot do without.
_NEEDED = ("d_model", "num_heads", "num_layers", "d_ff", "vocab_size")


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
    """

    trainer: Any
    training: Texts
    validation: Texts | None
    report: DataReport
    num_parameters: int


@dataclass(frozen=True)
class Summary:
    """What a run came to: the loop's result, final figures (empty without validation), places."""

    result: TrainResult
    evaluation: dict[str, Any]
    output_dir: Path


@contextmanager
def computing(config: RunConfig) -> Iterator[None]:
    """Compute inside the block with the backend and threads that the configuration names."""
    computation = config.computation
    with use_backend(computation.backend), thread_limit(computation.num_threads):
        yield


def prepare(config: RunConfig, run_dir: Path | None = None) -> Prepared:
    """Read and check data, tokenizer and model; nothing is written.

    Parameters
    ----------
    config : RunConfig
    run_dir : Path, optional
        Of a run to be resumed: its tokenizer is used.

    Raises
    ------
    InputError
        One sentence for whatever does not fit, naming the key, or file and line.
    """
    method, data, num_classes = config.method, config.data, config.model.get("num_classes")
    fields = (data.text_field, data.label_field)
    whole = method.read(config.path("training_data"), *fields, num_classes=num_classes)
    training, validation = whole, None
    if data.validation_data is not None:
        path = config.path("validation_data")
        validation = method.read(path, *fields, like=whole, num_classes=num_classes)
    elif data.validation_fraction > 0:
        training, validation = split(whole, data.validation_fraction, config.computation.seed)
    model = _model(config)
    tokenizer = _tokenizer(config, model, training, run_dir)
    seed = config.computation.seed
    trainer = method.make(model, tokenizer, training, num_classes=num_classes, seed=seed)
    report = trainer.report(training, validation, config.training)
    return Prepared(trainer, training, validation, report, model.num_parameters())


def _model(config: RunConfig) -> Transformer:
    asked = {name: value for name, value in config.model.items() if name != "num_classes"}
    where = f"{config.source}: model"
    if config.data.pretrained_weights is None:
        missing = [name for name in _NEEDED if name not in asked]
        if missing:
            raise ConfigError(
                f"{where}.{missing[0]}: is needed when data.pretrained_weights is absent"
            )
        try:
            return Transformer(TransformerConfig(**asked), seed=config.computation.seed)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    path = config.path("pretrained_weights")
    model = load_model(path)
    dropout = asked.pop("dropout", 0.0)
    for name, value in asked.items():
        found = getattr(model.config, name)
        if found != value:
            raise ConfigError(
                f"{where}.{name}: {value!r}, but data.pretrained_weights ({path}) has {found!r}"
            )
    model.config = dataclasses.replace(model.config, dropout=dropout)
    return model


def _tokenizer(
    config: RunConfig, model: Transformer, training: Texts, run_dir: Path | None
) -> Tokenizer:
    if run_dir is not None:
        return load_tokenizer(run_dir / "tokenizer")
    if config.data.tokenizer is not None:
        return load_tokenizer(config.path("tokenizer"))
    if config.data.pretrained_weights is not None:
        return load_tokenizer(config.path("pretrained_weights"))
    return train_bpe(training.texts, model.config.vocab_size)


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    stop: Callable[[], bool] | None = None,
    on_prepared: Callable[[Prepared], None] | None = None,
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
        Given what was prepared, before the first step.

    Raises
    ------
    InputError
        If anything in the configuration or the data does not fit, or the directory holds a run.
    OutputError
        If the output directory cannot be written.
    Interrupted
        If `stop` ended the run; the state is saved.
    """
    directory = config.output_dir
    _check_directory(directory, resume)
    with computing(config):
        prepared = prepare(config, directory if resume else None)
        if on_prepared is not None:
            on_prepared(prepared)
        trainer = prepared.trainer
        if not resume:
            trainer.tokenizer.save(directory / "tokenizer")
        write_json(directory / "config.json", config.as_dict())
        write_json(directory / "data_report.json", prepared.report.to_dict())
        result = trainer.fit(
            prepared.training,
            prepared.validation,
            config.training,
            output_dir=directory,
            callbacks=callbacks,
            resume=resume,
            stop=stop,
            run_config=config.as_dict(),
        )
        if result.stopped_reason == "interrupted":
            raise Interrupted(
                f"interrupted after step {result.steps}, saved in {result.last_checkpoint}",
                result.last_checkpoint,
            )
        evaluation: dict[str, Any] = {}
        if prepared.validation is not None:
            evaluation = trainer.evaluate(prepared.validation, config.training)
            write_json(directory / "evaluation.json", evaluation)
        trainer.save(directory / "model")
    return Summary(result, evaluation, directory)


def _check_directory(directory: Path, resume: bool) -> None:
    """Refuse to write over a run, and to resume what is not there, before anything is read."""
    checkpoints = directory / "checkpoints"
    if resume:
        if not any(damage(path) is None for path in checkpoints.glob("step-*")):
            raise CheckpointError(f"{directory}: there is no whole checkpoint to resume from")
        return
    held = [
        n
        for n in ("config.json", "metrics.jsonl", "checkpoints", "model")
        if (directory / n).exists()
    ]
    if held:
        raise InputError(
            f"{directory}: already holds a run ({held[0]}); choose another output directory "
            "(--output-dir), or continue it with --resume"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"{directory}: cannot be written ({error.strerror})") from error
