"""What a head's outputs mean: one class of several, numbers, or any of several labels.

Each problem knows its loss, its count, its metrics and how outputs become predictions; the rest of
fine-tuning does not ask which it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loopos import ops
from loopos.autograd import Array, Tensor
from loopos.data.batch import Batch
from loopos.training.metrics import (
    classification_metrics,
    multi_label_metrics,
    regression_metrics,
)

__all__ = ["OUTPUTS", "Classification", "MultiLabel", "Outputs", "Predictions", "Regression"]


@dataclass(frozen=True)
class Predictions:
    """What a model says of some texts.

    Attributes
    ----------
    labels : list
        Of each text: the name of its most probable class (its number where labels were integers);
        in a regression its number, a float; with several labels the list of those with a
        probability of one half or more.
    probabilities : ndarray [n, K] or None
        Of each class, or of each label by itself; None in a regression.
    ids : ndarray int64 [n] or None
        The most probable class; None where there are no classes.
    """

    labels: list[Any]
    probabilities: Array | None = None
    ids: Array | None = None
    #: Of classes or labels, in the order of `probabilities`.
    names: Sequence[str] = ()

    def rows(self, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield ``text`` and ``label``, ``labels`` or ``value``, and ``probabilities`` by name."""
        for index, (text, label) in enumerate(zip(texts, self.labels, strict=True)):
            key = {list: "labels", float: "value"}.get(type(label), "label")
            row = {"text": text, key: label}
            if self.probabilities is not None:
                values = map(float, self.probabilities[index])
                row["probabilities"] = dict(zip(self.names, values, strict=True))
            yield row


class Outputs(ABC):
    """One of ``OUTPUTS``."""

    name: str

    def count(self, batch: Batch) -> float:
        """Return what the loss of a batch is divided by: its rows, or their weights."""
        return float(batch.num_sequences)

    @abstractmethod
    def loss(self, outputs: Tensor, labels: Array) -> Tensor:
        """Return the summed loss of ``outputs[B, K]``."""

    @abstractmethod
    def metrics(self, outputs: Array, labels: Array) -> dict[str, Any]:
        """Return figures beside the loss."""

    @abstractmethod
    def predictions(self, outputs: Array, names: Sequence[str]) -> Predictions:
        """Return what ``outputs[n, K]`` say."""


class Classification(Outputs):
    """Cross-entropy over the classes, with class weights and label smoothing."""

    name = "classification"

    def __init__(self, class_weights: Array | None = None, label_smoothing: float = 0.0):
        self._weights, self._smoothing = class_weights, label_smoothing

    def count(self, batch: Batch) -> float:
        """Return the sum of the class weights of the labels."""
        if self._weights is None:
            return super().count(batch)
        return float(self._weights[batch.labels].sum())

    def loss(self, outputs: Tensor, labels: Array) -> Tensor:
        """Return the summed cross-entropy."""
        return ops.cross_entropy(outputs, labels, self._weights, self._smoothing)[0]

    def metrics(self, outputs: Array, labels: Array) -> dict[str, Any]:
        """Return accuracy, precision, recall, F1 and the confusion matrix."""
        return classification_metrics(labels, np.argmax(outputs, axis=1), outputs.shape[1])

    def predictions(self, outputs: Array, names: Sequence[str]) -> Predictions:
        """Return the most probable class of each row and all probabilities."""
        logits = outputs.astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        probabilities = np.exp(logits)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        ids = np.argmax(probabilities, axis=1)
        return Predictions([names[i] for i in ids.tolist()], probabilities, ids, names)


class Regression(Outputs):
    """Squared error of one number a row."""

    name = "regression"

    def loss(self, outputs: Tensor, labels: Array) -> Tensor:
        """Return the summed squared error."""
        return ops.mse(outputs, labels.reshape(outputs.shape))[0]

    def metrics(self, outputs: Array, labels: Array) -> dict[str, Any]:
        """Return MSE, MAE and R2."""
        return regression_metrics(labels, outputs[:, 0])

    def predictions(self, outputs: Array, names: Sequence[str]) -> Predictions:
        """Return the numbers."""
        return Predictions([float(value) for value in outputs[:, 0]])


class MultiLabel(Outputs):
    """Binary cross-entropy of each label, averaged over the labels of a row."""

    name = "multi_label"

    def loss(self, outputs: Tensor, labels: Array) -> Tensor:
        """Return the summed binary cross-entropy over the number of labels."""
        total, _ = ops.binary_cross_entropy(outputs, labels)
        return ops.add(Tensor(np.zeros_like(total.data)), total, 1.0 / outputs.shape[1])

    def metrics(self, outputs: Array, labels: Array) -> dict[str, Any]:
        """Return F1 and its relatives, subset accuracy and Hamming loss."""
        return multi_label_metrics(labels, outputs >= 0)

    def predictions(self, outputs: Array, names: Sequence[str]) -> Predictions:
        """Return the labels with a probability of one half or more, and all probabilities."""
        logits = outputs.astype(np.float64)
        decay = np.exp(-np.abs(logits))
        probabilities = np.where(logits >= 0, 1.0, decay) / (1.0 + decay)
        labels = [[names[int(i)] for i in np.flatnonzero(row >= 0)] for row in logits]
        return Predictions(labels, probabilities, names=names)


OUTPUTS: dict[str, type[Outputs]] = {
    problem.name: problem for problem in (Classification, Regression, MultiLabel)
}
