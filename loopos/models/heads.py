"""Heads on a transformer's body: pooling the tokens of a sequence and classifying it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from loopos import ops
from loopos.autograd import Array, Parameter, Tensor
from loopos.data.batch import Batch
from loopos.data.labels import PROBLEMS, Problem
from loopos.errors import ConfigError, ModelFormatError, nearest
from loopos.files import read_json, write_json
from loopos.models.tensor_file import TensorFile, write_tensors
from loopos.models.transformer import SavesTokenizer, Transformer
from loopos.models.weights import load_model, read_finite
from loopos.ops import DropoutKeys

Pooling = Literal["mean", "last", "cls"]
POOLINGS: tuple[str, ...] = get_args(Pooling)

_INIT_STD = 0.02
_HEAD_FILE = "classifier.safetensors"
_HEAD_CONFIG = "classifier.json"


def pool(x: Tensor, offsets: Array, pooling: Pooling) -> Tensor:
    """Reduce the tokens of each sequence to one row.

    Parameters
    ----------
    x : Tensor [N, C]
        States of all tokens.
    offsets : ndarray int32 [B + 1]
        Where each sequence starts and ends.
    pooling : {"mean", "last", "cls"}
        The mean of all tokens, the last one, or the first one (where BERT has its CLS token).

    Returns
    -------
    Tensor [B, C]
    """
    if pooling == "mean":
        return ops.segment_mean(x, offsets)
    if pooling == "last":
        return ops.segment_last(x, offsets)
    return ops.gather_rows(x, offsets[:-1])


def _require_head(num_classes: Any, pooling: Any) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ConfigError(f"num_classes is {num_classes!r}, expected at least 1")
    if pooling not in POOLINGS:
        raise ConfigError(
            f"pooling is {pooling!r}, expected one of {', '.join(POOLINGS)}"
            + nearest(str(pooling), POOLINGS)
        )


class SequenceClassifier:
    """A transformer's body, pooled, under one linear layer.

    Parameters
    ----------
    body : Transformer
        Its hidden states are classified; it is held, not copied.
    num_classes : int
        Outputs: classes, labels, or 1 for a number.
    pooling : {"mean", "last", "cls"}
        See :func:`pool`.
    seed : int
        Of the head's weights, N(0, 0.02); its bias starts at 0.

    Attributes
    ----------
    labels : list of str or None
        The name of each class.
    problem : str
        What the outputs mean: "classification", "regression" or "multi_label".
    max_length : int or None
        Of its training texts the first so many tokens were seen; None: all that the body takes.

    Raises
    ------
    ConfigError
        If `num_classes` or `pooling` is none of these.
    """

    def __init__(
        self, body: Transformer, num_classes: int, pooling: Pooling = "mean", seed: int = 0
    ):
        _require_head(num_classes, pooling)
        self.body, self.num_classes, self.pooling = body, num_classes, pooling
        self.labels: list[str] | None = None
        self.max_length: int | None = None
        self.problem: Problem = "regression" if num_classes == 1 else "classification"
        draws = np.random.default_rng(seed).standard_normal((num_classes, body.config.d_model))
        weight = (draws * _INIT_STD).astype(body.dtype)
        self.weight = Parameter(weight, "classifier.weight")
        self.bias = Parameter(np.zeros(num_classes, body.dtype), "classifier.bias")

    def parameters(self) -> dict[str, Parameter]:
        """Return what the logits depend on: the body (without a language-model head), the head."""
        body = self.body.parameters()
        body.pop("lm_head.weight", None)  # no part in the logits, so never a gradient
        return body | {"classifier.weight": self.weight, "classifier.bias": self.bias}

    def logits(self, batch: Batch, dropout: DropoutKeys | None = None) -> Tensor:
        """Return the class logits ``[B, K]`` of each sequence of `batch`.

        Raises
        ------
        DataError
            As :meth:`Transformer.get_hidden_states`, and if a sequence is empty.
        """
        if self.pooling == "mean":
            pooled = pool(self.body.get_hidden_states(batch, dropout), batch.offsets, "mean")
        else:
            rows = batch.offsets[1:] - 1 if self.pooling == "last" else batch.offsets[:-1]
            pooled = self.body.get_hidden_states(batch, dropout, rows=rows)
        return ops.linear(pooled, self.weight, self.bias)

    def save(
        self,
        directory: str | Path,
        tokenizer: SavesTokenizer | None = None,
        labels: list[str] | None = None,
    ) -> None:
        """Write the body as :meth:`Transformer.save` does, and the head beside it.

        Parameters
        ----------
        directory : path
            Other files in it stay. transformers' AutoModel loads the body from it.
        tokenizer : Tokenizer, optional
            Saved with the model.
        labels : list of str, optional
            The name of each class; `self.labels` if None.

        Raises
        ------
        ConfigError
            If there are not `num_classes` labels.
        OutputError
            If the directory cannot be written.
        """
        labels = self.labels if labels is None else labels
        if labels is not None and len(labels) != self.num_classes:
            raise ConfigError(f"{len(labels)} labels for num_classes {self.num_classes}")
        directory = Path(directory)
        self.body.save(directory, tokenizer)
        head = {"classifier.weight": self.weight.data, "classifier.bias": self.bias.data}
        write_tensors(directory / _HEAD_FILE, head)
        values = {
            "num_classes": self.num_classes,
            "pooling": self.pooling,
            "labels": labels,
            "problem": self.problem,
            "max_length": self.max_length,
        }
        write_json(directory / _HEAD_CONFIG, values)


def load_classifier(directory: str | Path, dtype: str = "float32") -> SequenceClassifier:
    """Read what :meth:`SequenceClassifier.save` wrote.

    Parameters
    ----------
    directory : path
        With the body, ``classifier.safetensors`` and ``classifier.json``.
    dtype : {"float32", "float64"}
        Of the parameters.

    Raises
    ------
    MissingFileError
        If one of the files is not there.
    ModelFormatError
        If one of them does not hold what it should.
    """
    directory = Path(directory)
    values = read_json(directory / _HEAD_CONFIG, ModelFormatError)
    # What older files mean.
    values = {"problem": "classification", "max_length": None} | values
    expected = ["num_classes", "pooling", "labels", "problem", "max_length"]
    for key in [*expected, *values]:
        if key not in values or key not in expected:
            what = "unknown" if key in values else "missing"
            raise ModelFormatError(f"{directory / _HEAD_CONFIG}: key '{key}' is {what}")

    def fail(what: str) -> ModelFormatError:
        return ModelFormatError(f"{directory / _HEAD_CONFIG}: {what}")

    count, problem, labels = values["num_classes"], values["problem"], values["labels"]
    try:
        _require_head(count, values["pooling"])
    except ConfigError as error:
        raise fail(str(error)) from error
    if problem not in PROBLEMS:
        raise fail(
            f"key 'problem' is {problem!r}, expected one of {', '.join(PROBLEMS)}"
            + nearest(str(problem), PROBLEMS)
        )
    named = isinstance(labels, list) and all(isinstance(name, str) for name in labels)
    if labels is not None and not (named and len(labels) == count):
        raise fail(f"expected {count} labels")
    body = load_model(directory, dtype)
    longest, length = body.config.max_seq_len, values["max_length"]
    if length is not None and (type(length) is not int or not 1 <= length <= longest):
        raise fail(f"key 'max_length' is {length!r}, expected null or 1 to {longest}")
    file = TensorFile(directory / _HEAD_FILE)
    # Read first: only what the file holds is worth making room for.
    weight = read_finite(file, "classifier.weight", (count, body.config.d_model), body.dtype)
    bias = read_finite(file, "classifier.bias", (count,), body.dtype)
    file.refuse_others(["classifier.weight", "classifier.bias"])
    classifier = SequenceClassifier(body, count, values["pooling"])
    classifier.problem, classifier.labels, classifier.max_length = problem, labels, length
    classifier.weight.data, classifier.bias.data = weight, bias
    return classifier
