"""Metrics of classes, numbers and sets of labels, by scikit-learn's definitions."""

from __future__ import annotations

from typing import Any

import numpy as np

from loopos.errors import DataError

__all__ = [
    "classification_metrics",
    "confusion_matrix",
    "multi_label_metrics",
    "pair_metrics",
    "regression_metrics",
    "wins",
]

Array = np.ndarray[Any, Any]


def confusion_matrix(labels: Array, predictions: Array, num_classes: int) -> Array:
    """Return int64 ``[K, K]``: rows are true classes, columns predicted ones.

    Raises
    ------
    DataError
        If the lengths differ, or a class is no integer or outside ``0 .. num_classes - 1``.
    """
    labels, predictions = _classes("label", labels), _classes("prediction", predictions)
    if labels.shape != predictions.shape:
        raise DataError(f"{labels.size} labels for {predictions.size} predictions")
    for name, values in (("label", labels), ("prediction", predictions)):
        wrong = values[(values < 0) | (values >= num_classes)]
        if wrong.size:
            raise DataError(f"{name} {wrong[0]} is outside the {num_classes} classes")
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(matrix, (labels, predictions), 1)
    return matrix


def _classes(name: str, values: Array) -> Array:
    """Return class numbers as int64 [n]; booleans would index as a mask, fractions not at all."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise DataError(
            f"{name}s are {array.dtype}{list(array.shape)}, expected a list of integers"
        )
    return array.astype(np.int64)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Elementwise quotient, 0 where nothing is divided (scikit-learn's ``zero_division=0``)."""
    quotient = np.zeros(np.shape(numerator), dtype=np.float64)
    return np.divide(numerator, denominator, out=quotient, where=np.asarray(denominator) > 0)


def classification_metrics(labels: Array, predictions: Array, num_classes: int) -> dict[str, Any]:
    """Return accuracy, precision, recall, F1 and the confusion matrix.

    Parameters
    ----------
    labels, predictions : ndarray of int [n]
        True and predicted classes.
    num_classes : int
        K. Averages are over the classes that occur among labels or predictions.

    Returns
    -------
    dict
        ``accuracy``; ``precision_<avg>``, ``recall_<avg>``, ``f1_<avg>`` with ``<avg>`` one of
        ``macro``, ``micro``, ``weighted``; ``per_class`` (lists of precision, recall, f1 and
        support); ``confusion_matrix`` (list of rows); ``count``.
    """
    matrix = confusion_matrix(labels, predictions, num_classes)
    hits, support, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    count = int(matrix.sum())
    accuracy = float(hits.sum() / count) if count else 0.0
    scores = {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, support),
        "f1": _ratio(2.0 * hits, support + predicted),
    }
    seen = (support + predicted) > 0
    metrics: dict[str, Any] = {"accuracy": accuracy}
    for name, values in scores.items():
        metrics[f"{name}_macro"] = float(values[seen].mean()) if seen.any() else 0.0
        # One class per row: micro-averaged precision, recall and F1 are all the accuracy.
        metrics[f"{name}_micro"] = accuracy
        metrics[f"{name}_weighted"] = float((values * support).sum() / count) if count else 0.0
    per_class = {name: values.tolist() for name, values in scores.items()}
    metrics["per_class"] = per_class | {"support": support.tolist()}
    metrics["confusion_matrix"] = matrix.tolist()
    metrics["count"] = count
    return metrics


def regression_metrics(targets: Array, predictions: Array) -> dict[str, Any]:
    """Return mean squared error, mean absolute error and the coefficient of determination.

    Parameters
    ----------
    targets, predictions : ndarray of float [n]

    Returns
    -------
    dict
        ``mse``, ``mae``, ``count``, and ``r2`` where it is defined: where targets differ.

    Raises
    ------
    DataError
        If the lengths differ or there is none.
    """
    targets, predictions = (np.asarray(v, dtype=np.float64) for v in (targets, predictions))
    if targets.shape != predictions.shape or targets.ndim != 1 or not targets.size:
        raise DataError(f"{targets.size} targets for {predictions.size} predictions")
    errors = predictions - targets
    squares, spread = np.square(errors), np.square(targets - targets.mean())
    metrics = {"mse": float(squares.mean()), "mae": float(np.abs(errors).mean())}
    if spread.sum() > 0:
        metrics["r2"] = float(1.0 - squares.sum() / spread.sum())
    return metrics | {"count": targets.size}


def multi_label_metrics(labels: Array, predictions: Array) -> dict[str, Any]:
    """Return precision, recall and F1 over sets of labels, subset accuracy and Hamming loss.

    Parameters
    ----------
    labels, predictions : ndarray of 0 and 1 [n, K]

    Returns
    -------
    dict
        ``subset_accuracy`` (rows with every label right); ``hamming_loss`` (share of wrong
        entries); ``precision_<avg>``, ``recall_<avg>``, ``f1_<avg>`` with ``<avg>`` one of
        ``macro``, ``micro``, ``weighted``; ``per_label`` (lists of precision, recall, f1 and
        support); ``count``. A quotient of nothing by nothing is 0.

    Raises
    ------
    DataError
        If the shapes differ or there is no row.
    """
    labels, predictions = np.asarray(labels).astype(bool), np.asarray(predictions).astype(bool)
    if labels.shape != predictions.shape or labels.ndim != 2 or not labels.size:
        raise DataError(f"labels {list(labels.shape)} for predictions {list(predictions.shape)}")
    hits = (labels & predictions).sum(axis=0)
    support, predicted = labels.sum(axis=0), predictions.sum(axis=0)
    metrics: dict[str, Any] = {
        "subset_accuracy": float((labels == predictions).all(axis=1).mean()),
        "hamming_loss": float((labels != predictions).mean()),
    }
    parts = {
        "precision": (hits, predicted),
        "recall": (hits, support),
        "f1": (2.0 * hits, support + predicted),
    }
    per_label = {}
    for name, (above, below) in parts.items():
        values = _ratio(above, below)
        metrics[f"{name}_macro"] = float(values.mean())
        metrics[f"{name}_micro"] = float(_ratio(above.sum(), below.sum()))
        metrics[f"{name}_weighted"] = float(_ratio((values * support).sum(), support.sum()))
        per_label[name] = values.tolist()
    metrics["per_label"] = per_label | {"support": support.tolist()}
    return metrics | {"count": len(labels)}


def pair_metrics(
    chosen: Array, rejected: Array, chosen_lengths: Array, rejected_lengths: Array, bins: int = 5
) -> dict[str, Any]:
    """Return how well scores agree with preferences.

    Parameters
    ----------
    chosen, rejected : ndarray of float [n]
        Scores of the two responses of each pair.
    chosen_lengths, rejected_lengths : ndarray of int [n]
        Tokens of the responses.
    bins : int
        Of the calibration table.

    Returns
    -------
    dict
        ``accuracy`` (share of pairs whose chosen response scores higher, equal scores count half);
        ``margin`` and ``margin_deviation`` of the difference; ``score_mean`` and
        ``score_deviation`` of all responses; ``longer_accuracy``, what choosing the longer
        response would reach; ``length_correlation``, Pearson's, of score and length, where it is
        defined; ``calibration_error``, the mean distance of confidence and accuracy;
        ``calibration``, a list of ``from``, ``to``, ``count``, ``confidence`` and ``accuracy``:
        of pairs by the probability that Bradley-Terry gives to the response with the higher score,
        and how often that was the chosen one; ``count``.

    Raises
    ------
    DataError
        If the lengths differ or there is none.
    """
    columns = (chosen, rejected, chosen_lengths, rejected_lengths)
    chosen, rejected, chosen_lengths, rejected_lengths = (
        np.asarray(column, dtype=np.float64) for column in columns
    )
    if not chosen.size or len({np.shape(column) for column in columns}) > 1:
        raise DataError("expected two scores and two lengths for each of one pair or more")
    lead = chosen - rejected
    scores = np.concatenate([chosen, rejected])
    lengths = np.concatenate([chosen_lengths, rejected_lengths])
    metrics: dict[str, Any] = {
        "accuracy": wins(lead).mean(),
        "margin": lead.mean(),
        "margin_deviation": lead.std(),
        "score_mean": scores.mean(),
        "score_deviation": scores.std(),
        "longer_accuracy": wins(chosen_lengths - rejected_lengths).mean(),
    }
    metrics = {name: float(value) for name, value in metrics.items()}
    if scores.std() > 0 and lengths.std() > 0:
        metrics["length_correlation"] = float(np.corrcoef(scores, lengths)[0, 1])
    table = _calibration(lead, bins)
    distances = [row["count"] * abs(row["confidence"] - row["accuracy"]) for row in table]
    metrics["calibration_error"] = sum(distances) / chosen.size
    return metrics | {"calibration": table, "count": chosen.size}


def wins(lead: Array) -> Array:
    """Return 1 where `lead` is above 0, 0 below, one half where there is nothing to choose."""
    found: Array = (lead > 0) + 0.5 * (lead == 0)
    return found


def _calibration(lead: Array, bins: int) -> list[dict[str, Any]]:
    confidence, right = 1 / (1 + np.exp(-np.abs(lead))), wins(lead)
    edges = np.linspace(0.5, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    table = []
    for number in range(bins):
        inside = place == number
        if inside.any():
            row = {"from": edges[number], "to": edges[number + 1], "count": int(inside.sum())}
            row |= {"confidence": confidence[inside].mean(), "accuracy": right[inside].mean()}
            table.append({n: v if n == "count" else float(v) for n, v in row.items()})
    return table
