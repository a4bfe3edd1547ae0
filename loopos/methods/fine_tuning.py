"""Fine-tuning: a pretrained (or fresh) transformer learns to classify texts.

    tuner = FineTuner("path/to/model", num_classes=2)
    tuner.fit(train, validation, num_epochs=3, learning_rate=5e-5)
    tuner.predict(["a wonderful little film"]).labels

The body's token states are pooled, a linear head gives class logits, and cross-entropy trains all
weights, only the head, or the head and the last k layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loopos.autograd import Array, Tensor, no_grad
from loopos.data.batch import Batch
from loopos.data.labels import PROBLEMS, Problem
from loopos.data.readers import LabelledTexts, Source, read_labelled
from loopos.data.report import DataReport
from loopos.data.tokenizer import Tokenizer, load_tokenizer
from loopos.errors import ConfigError, DataError, nearest
from loopos.methods.common import (
    Encoded,
    encode,
    fit,
    in_order,
    require_finite,
    train_only,
    trained_body,
    with_adapters,
    with_overrides,
)
from loopos.methods.outputs import OUTPUTS, Classification, Outputs, Predictions
from loopos.models.heads import POOLINGS, Pooling, SequenceClassifier, load_classifier
from loopos.models.transformer import Transformer
from loopos.models.weights import load_model
from loopos.ops import DropoutKeys
from loopos.training.loop import TrainingOptions, TrainResult
from loopos.training.trackers import Callback

__all__ = ["FineTuner", "Options", "Predictions", "make", "read"]

Labelled = LabelledTexts | Source


@dataclass(frozen=True)
class Options(TrainingOptions):
    """Options of a fine-tuning run, beside those of every run.

    Attributes
    ----------
    pooling : {"mean", "last", "cls"} or None
        What stands for a text: the mean of its token states, the last or the first one. None keeps
        what the classifier has, the mean for a new one.
    train : {"all", "head"} or int
        Which weights are trained: all, only the head, or the head, the last norm and the last so
        many layers.
    class_weights : "balanced", list of float or None
        Weight of each class in the loss; "balanced" is ``rows / (classes * rows of the class)``.
    label_smoothing : float
        Share of the target spread evenly over the classes, in [0, 1).
    max_length : int or None
        Texts are cut to this many tokens; None takes the model's ``max_seq_len``.
    problem : {"classification", "regression", "multi_label"} or None
        What labels are: one class of several, a number, or any of several labels, in tables as
        "a|b". None goes by what they look like.
    """

    pooling: Pooling | None = None
    train: Literal["all", "head"] | int = "all"
    class_weights: Literal["balanced"] | list[float] | None = None
    label_smoothing: float = 0.0
    max_length: int | None = None
    problem: Problem | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise ConfigError(
                f"training.pooling: expected one of {', '.join(POOLINGS)}, found {self.pooling!r}"
                + nearest(str(self.pooling), POOLINGS)
            )
        if self.problem is not None and self.problem not in PROBLEMS:
            raise ConfigError(
                f"training.problem: expected one of {', '.join(PROBLEMS)}, found {self.problem!r}"
                + nearest(str(self.problem), PROBLEMS)
            )
        number = isinstance(self.train, int) and not isinstance(self.train, bool)
        if not (self.train in ("all", "head") or (number and int(self.train) >= 1)):
            expected = "'all', 'head' or a number of layers"
            raise ConfigError(f"training.train: expected {expected}, found {self.train!r}")
        if isinstance(self.class_weights, str) and self.class_weights != "balanced":
            raise ConfigError(
                "training.class_weights: expected 'balanced' or a number for each class, "
                f"found {self.class_weights!r}"
            )
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(
                f"training.label_smoothing: expected a number in [0, 1), "
                f"found {self.label_smoothing}"
            )
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"training.max_length: expected at least 1, found {self.max_length}")


class _Objective:
    """The loss over the outputs of a head."""

    def __init__(self, model: SequenceClassifier, outputs: Outputs):
        self._model, self._outputs = model, outputs

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return what the loss of the batch is divided by."""
        return {"loss": self._outputs.count(batch)}

    def losses(self, batch: Batch, dropout: DropoutKeys | None) -> dict[str, Tensor]:
        """Return the summed loss of the batch."""
        assert batch.labels is not None
        return {"loss": self._outputs.loss(self._model.logits(batch, dropout), batch.labels)}


class FineTuner:
    """Trains and serves a text classifier.

    Parameters
    ----------
    model : Transformer, SequenceClassifier or path
        The body, or a classifier to train on; a path is loaded with its tokenizer.
    tokenizer : Tokenizer, optional
        May be absent when `model` is a path.
    num_classes : int, optional
        Taken from the first training set when absent; 1 for a regression.
    label_names : list of str, optional
        Name of each class; taken from the first training set when absent.
    seed : int
        Of the head's weights, of shuffling and of dropout.

    Raises
    ------
    ConfigError
        If there is no tokenizer, or it has ids outside the model's vocabulary.
    """

    def __init__(
        self,
        model: Transformer | SequenceClassifier | str | Path,
        tokenizer: Tokenizer | None = None,
        *,
        num_classes: int | None = None,
        label_names: Sequence[str] | None = None,
        seed: int = 0,
    ):
        if isinstance(model, (str, Path)):
            tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
            model = load_model(model)
        if tokenizer is None:
            raise ConfigError("FineTuner needs a tokenizer beside a model that is not a path")
        self.tokenizer, self.seed = tokenizer, seed
        self.label_names = None if label_names is None else list(label_names)
        self._classifier: SequenceClassifier | None = None
        #: Whether the head has seen data, or comes from a file, so that its problem is settled.
        self._fitted = isinstance(model, SequenceClassifier)
        if isinstance(model, SequenceClassifier):
            self._classifier, self.body = model, model.body
            self.label_names = self.label_names or model.labels
        else:
            self.body = model
        if tokenizer.vocab_size > self.body.config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} ids, "
                f"more than the model's vocab_size {self.body.config.vocab_size}"
            )
        if self._classifier is None and num_classes is not None:
            self._make_head(num_classes)

    # -- training ------------------------------------------------------------------------------

    def fit(
        self,
        training_data: Labelled,
        validation_data: Labelled | None = None,
        options: Options | None = None,
        *,
        output_dir: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        resume: bool = False,
        stop: Callable[[], bool] | None = None,
        run_config: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> TrainResult:
        """Train on labelled texts.

        Parameters
        ----------
        training_data, validation_data : LabelledTexts, path or iterable of mappings
            Rows with ``text`` and ``label``. With validation data the model is evaluated as the
            options say, and ends with its best weights if `output_dir` is given.
        options : Options, optional
            How to train; any of its fields may be given by name instead.
        output_dir : path, optional
            Where ``metrics.jsonl`` and ``checkpoints/`` go; None writes nothing.
        callbacks : sequence of Callback
            Called at every step and evaluation.
        resume : bool
            Continue from the newest whole checkpoint in `output_dir`.
        stop : callable, optional
            Asked after every step; True saves and ends the run.
        run_config : dict, optional
            Kept in checkpoints, and compared on resume.

        Returns
        -------
        TrainResult

        Raises
        ------
        DataError
            If a row cannot be used, or a label has no class.
        ConfigError
            If an option has no such name or value.
        NumericalError
            If a loss or gradient is not finite.
        """
        options = with_overrides(options or Options(), overrides)
        training = self._labelled(training_data, options.problem)
        model = self._head_for(training)
        model.pooling = options.pooling or model.pooling
        limit = self._max_length(options)
        model.max_length = options.max_length
        classes = model.problem == "classification"
        if classes and np.unique(training.labels).size < 2:
            raise DataError(
                f"{training.where[0]}: every row has the class "
                f"'{training.label_names[training.labels[0]]}', expected two classes at least"
            )
        encoded = encode(self.tokenizer, training.texts, limit, training.where)
        validation = None if validation_data is None else self._labelled(validation_data)
        evaluate = None
        if validation is not None:
            self._check_labels(validation)
            held_out = encode(self.tokenizer, validation.texts, limit, validation.where)
            evaluate = self._evaluator(held_out, validation.labels)
        self.body = model.body = with_adapters(self.body, options, self.seed)
        train_only(model.parameters(), self._trained_names(options))
        return fit(
            self.body,
            model.parameters(),
            _Objective(model, self._outputs(options, training)),
            encoded.tokens,
            options,
            labels=training.labels,
            seed=self.seed,
            evaluate=evaluate,
            run={
                "output_dir": output_dir,
                "callbacks": callbacks,
                "resume": resume,
                "stop": stop,
                "run_config": run_config,
            },
        )

    def report(
        self,
        training: LabelledTexts,
        validation: LabelledTexts | None = None,
        options: Options | None = None,
    ) -> DataReport:
        """Return what the data holds, before anything is trained."""
        limit = self._max_length(options or Options())
        lengths = encode(self.tokenizer, training.texts, limit).lengths
        held_out = None
        if validation is not None:
            held_out = encode(self.tokenizer, validation.texts, limit).lengths
        return DataReport.build(training, validation, lengths, limit, held_out)

    # -- use -----------------------------------------------------------------------------------

    def evaluate(self, data: Labelled, options: Options | None = None) -> dict[str, Any]:
        """Return the loss and the metrics of the problem on labelled texts.

        See :mod:`loopos.training.metrics`.

        Of `options` only ``max_length`` matters; without them texts are cut as in the training.
        """
        labelled = self._labelled(data)
        self._check_labels(labelled)
        limit = self._max_length(options or self._as_trained())
        encoded = encode(self.tokenizer, labelled.texts, limit, labelled.where)
        return self._evaluator(encoded, labelled.labels)()

    def predict(self, texts: Sequence[str], batch_tokens: int = 4096) -> Predictions:
        """Say of each text what the model was trained to say: class, number or labels.

        Parameters
        ----------
        texts : sequence of str
        batch_tokens : int
            Tokens computed at once; changes memory and speed, not results.

        Raises
        ------
        DataError
            If an entry is not a string or has no token.
        """
        if isinstance(texts, str):
            raise DataError("predict() takes a list of texts, found one string")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {index}: expected a string, found {type(text).__name__}")
            if not text.strip():
                raise DataError(f"text {index}: there is nothing in it")
        encoded = encode(self.tokenizer, texts, self._max_length(self._as_trained()))
        names = self.label_names or [str(i) for i in range(self.classifier.num_classes)]
        return OUTPUTS[self.classifier.problem]().predictions(
            self._logits(encoded, batch_tokens), names
        )

    def save(self, directory: str | Path) -> None:
        """Write body, head, labels and tokenizer; transformers' AutoModel loads the body."""
        self.classifier.save(directory, self.tokenizer, self.label_names)

    @classmethod
    def load(cls, directory: str | Path) -> FineTuner:
        """Read what :meth:`save` wrote."""
        return cls(load_classifier(directory), load_tokenizer(directory))

    @property
    def classifier(self) -> SequenceClassifier:
        """The model with its head.

        Raises
        ------
        ConfigError
            If there is no head yet: give `num_classes`, or call :meth:`fit` first.
        """
        if self._classifier is None:
            raise ConfigError("this classifier has no head yet: give num_classes or call fit()")
        return self._classifier

    # -- inside --------------------------------------------------------------------------------

    def _head_for(self, training: LabelledTexts) -> SequenceClassifier:
        """Return the classifier, its head made and its classes named after the first data."""
        names = training.label_names
        if self._classifier is None:
            self.label_names = self.label_names or names or None
            self._make_head(len(names) or 1, training.problem)
        elif not self._fitted:
            self._classifier.problem = training.problem
        self._fitted = True
        self._check_labels(training)
        if self.label_names is None and names:
            classes = self.classifier.num_classes
            if len(names) > classes:
                raise ConfigError(f"num_classes is {classes} but the data names {len(names)}")
            # Classes that the data does not show have numbers only.
            numbers = names == [str(i) for i in range(len(names))]
            self.label_names = names + [
                str(i) if numbers else f"class {i}" for i in range(len(names), classes)
            ]
        self.classifier.labels = self.label_names
        return self.classifier

    def _make_head(self, num_classes: int, problem: Problem | None = None) -> None:
        names = self.label_names
        if names is not None and len(names) != num_classes:
            raise ConfigError(f"num_classes is {num_classes} but {len(names)} labels are named")
        self._classifier = SequenceClassifier(self.body, num_classes, seed=self.seed)
        self._classifier.labels = names
        self._classifier.problem = problem or self._classifier.problem

    def _labelled(self, data: Labelled, asked: Problem | None = None) -> LabelledTexts:
        known = self._classifier
        problem = known.problem if known is not None and self._fitted else asked
        if not isinstance(data, LabelledTexts):
            outputs = None if known is None else known.num_classes
            classes = outputs if outputs == 1 or problem == "multi_label" else None
            return read_labelled(
                data, label_names=self.label_names, num_classes=classes, problem=problem
            )
        return data if self.label_names is None else data.with_label_names(self.label_names)

    def _check_labels(self, data: LabelledTexts) -> None:
        """Refuse data of another problem, and classes that the head does not have."""
        model = self.classifier
        if len(data.texts) == 0:
            raise DataError("there is no labelled text")
        if data.problem != model.problem:
            raise DataError(
                f"{data.where[0]}: expected labels for {model.problem}, found {data.problem}"
            )
        classes = model.num_classes
        if model.problem == "multi_label" and data.labels.shape[1] != classes:
            raise DataError(
                f"{data.where[0]}: {data.labels.shape[1]} labels, the model has {classes}"
            )
        if model.problem == "classification":
            for row in np.flatnonzero((data.labels < 0) | (data.labels >= classes))[:1]:
                raise DataError(
                    f"{data.where[row]}: label {data.labels[row]} is outside the {classes} classes"
                )

    def _outputs(self, options: Options, training: LabelledTexts) -> Outputs:
        """Return what the head's outputs mean, with what the options say of their loss."""
        kind = self.classifier.problem
        if kind == "classification":
            weights = _class_weights(
                options.class_weights, training.labels, self.classifier.num_classes
            )
            return Classification(weights, options.label_smoothing)
        for name in ("class_weights", "label_smoothing"):
            if getattr(options, name):
                raise ConfigError(f"training.{name}: only for classification, the data is {kind}")
        return OUTPUTS[kind]()

    def _as_trained(self) -> Options:
        return Options(max_length=self.classifier.max_length)

    def _max_length(self, options: Options) -> int:
        limit = self.body.config.max_seq_len
        if options.max_length is not None and options.max_length > limit:
            raise ConfigError(
                f"training.max_length: {options.max_length} is more than the model's "
                f"max_seq_len {limit}"
            )
        return options.max_length or limit

    def _trained_names(self, options: Options) -> set[str]:
        model = self.classifier
        head = {"classifier.weight", "classifier.bias"}
        if options.train == "all":
            return head | (trained_body(self.body) & set(model.parameters()))
        if self.body.adapters:
            raise ConfigError(
                f"training.train: {options.train!r}, but a model with adapters trains these"
            )
        if options.train == "head":
            return head
        layers = self.body.config.num_layers
        if options.train > layers:
            raise ConfigError(
                f"training.train: {options.train} layers asked for, the model has {layers}"
            )
        wanted = tuple(f"layers.{i}." for i in range(layers - options.train, layers))
        return head | {n for n in model.parameters() if n.startswith((*wanted, "final_norm."))}

    def _logits(self, encoded: Encoded, batch_tokens: int = 4096) -> Array:
        lengths = encoded.tokens.lengths
        logits = np.zeros((lengths.size, self.classifier.num_classes), self.body.dtype)
        with no_grad():
            for indices in in_order(lengths, batch_tokens):
                batch = Batch.from_sequences([encoded.tokens[i] for i in indices])
                logits[indices] = self.classifier.logits(batch).data
        return logits

    def _evaluator(self, encoded: Encoded, labels: Array) -> Callable[[], dict[str, Any]]:
        """Return a function that evaluates the model as it is when called."""

        def evaluate() -> dict[str, Any]:
            meaning = OUTPUTS[self.classifier.problem]()
            logits = self._logits(encoded)
            with no_grad():
                total = meaning.loss(Tensor(logits), labels).item()
            loss = require_finite(total / len(labels), "the loss on the evaluation data")
            return {"loss": loss} | meaning.metrics(logits, labels)

        return evaluate


def read(
    source: Source,
    text_field: str,
    label_field: str,
    *,
    options: Options,
    like: LabelledTexts | None = None,
    num_classes: int | None = None,
) -> LabelledTexts:
    """Read labelled texts for a run, with the classes of `like` where it is given."""
    names = None if like is None else like.label_names
    problem = options.problem if like is None else like.problem
    return read_labelled(source, text_field, label_field, names, num_classes, problem)


def make(
    model: Transformer,
    tokenizer: Tokenizer,
    training: LabelledTexts,
    *,
    num_classes: int | None = None,
    seed: int = 0,
) -> FineTuner:
    """Make the trainer of a run."""
    names = training.label_names
    outputs = len(names) or 1
    if num_classes is not None and num_classes != outputs:
        raise ConfigError(
            f"model.num_classes: {num_classes}, but the data has {outputs} classes "
            f"({', '.join(names[:10])})"
        )
    return FineTuner(model, tokenizer, num_classes=outputs, label_names=names or None, seed=seed)


def _class_weights(
    asked: str | list[float] | None, labels: Array, num_classes: int
) -> Array | None:
    if asked is None:
        return None
    if isinstance(asked, str):
        counts = np.bincount(labels, minlength=num_classes)
        # A class without rows gets no weight: nothing would ever be divided by it.
        present = np.maximum(counts, 1)
        return np.where(counts > 0, labels.size / (num_classes * present), 0.0)
    if len(asked) != num_classes:
        raise ConfigError(f"training.class_weights: {len(asked)} numbers for {num_classes} classes")
    weights = np.asarray(asked, dtype=np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ConfigError("training.class_weights: expected numbers that are not negative")
    return weights
