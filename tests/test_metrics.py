"""Metrics against counts made by hand and scikit-learn's definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopos.errors import DataError
from loopos.training.metrics import classification_metrics, confusion_matrix

LABELS = [0, 0, 0, 1, 1, 2]
PREDICTED = [0, 0, 1, 1, 0, 1]


def test_a_case_counted_by_hand():
    m = classification_metrics(LABELS, PREDICTED, 4)
    assert m["confusion_matrix"] == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert m["accuracy"] == pytest.approx(1 / 2)
    # class 0: 2 of 3 predicted, 2 of 3 true; class 1: 1 of 3, 1 of 2; class 3 is never seen
    assert m["per_class"]["precision"] == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert m["per_class"]["recall"] == pytest.approx([2 / 3, 1 / 2, 0, 0])
    assert m["per_class"]["f1"] == pytest.approx([2 / 3, 2 / 5, 0, 0])
    assert m["per_class"]["support"] == [3, 2, 1, 0]
    assert m["precision_macro"] == pytest.approx((2 / 3 + 1 / 3) / 3)
    assert m["recall_macro"] == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert m["f1_macro"] == pytest.approx((2 / 3 + 2 / 5) / 3)
    assert m["f1_weighted"] == pytest.approx((3 * 2 / 3 + 2 * 2 / 5) / 6)
    assert m["f1_micro"] == m["precision_micro"] == m["recall_micro"] == m["accuracy"]
    assert m["count"] == 6


pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


@given(pairs)
def test_properties(rows):
    labels, predicted = np.array(rows).T
    m = classification_metrics(labels, predicted, 5)
    matrix = np.array(m["confusion_matrix"])
    assert matrix.sum() == len(rows) == m["count"]
    assert m["accuracy"] == pytest.approx(np.mean(labels == predicted))
    assert all(0 <= v <= 1 for v in m.values() if isinstance(v, float))
    assert m["recall_weighted"] == pytest.approx(m["accuracy"])
    transposed = classification_metrics(predicted, labels, 5)
    assert m["per_class"]["precision"] == pytest.approx(transposed["per_class"]["recall"])
    assert m["f1_macro"] == pytest.approx(transposed["f1_macro"])


@given(pairs)
def test_equal_scikit_learn(rows):
    sklearn = pytest.importorskip("sklearn.metrics")
    labels, predicted = np.array(rows).T
    m = classification_metrics(labels, predicted, 5)
    for average in ("macro", "micro", "weighted"):
        values = sklearn.precision_recall_fscore_support(
            labels, predicted, average=average, zero_division=0
        )
        for name, value in zip(("precision", "recall", "f1"), values, strict=False):
            assert m[f"{name}_{average}"] == pytest.approx(value)


def test_no_rows_give_zeros():
    m = classification_metrics([], [], 2)
    assert (m["accuracy"], m["f1_macro"], m["count"]) == (0.0, 0.0, 0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="2 labels for 1 predictions"):
        confusion_matrix([0, 1], [0], 2)
    with pytest.raises(DataError, match="label 2 is outside the 2 classes"):
        confusion_matrix([0, 2], [0, 1], 2)
    with pytest.raises(DataError, match="prediction -1 is outside"):
        confusion_matrix([0, 1], [0, -1], 2)


def test_booleans_are_classes_and_fractions_are_refused():
    found = confusion_matrix(np.array([True, False, True]), np.array([True, True, False]), 2)
    assert found.tolist() == [[0, 1], [1, 1]]
    with pytest.raises(DataError, match=r"labels are float64\[2\], expected a list of integers"):
        confusion_matrix(np.array([0.0, 1.0]), [0, 1], 2)
    with pytest.raises(DataError, match=r"predictions are int64\[2, 1\], expected a list"):
        confusion_matrix([0, 1], np.array([[0], [1]]), 2)
