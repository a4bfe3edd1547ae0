"""Numbers and sets of labels instead of classes: losses, metrics, predictions, files."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopos.autograd import Tensor
from loopos.data.readers import read_labelled
from loopos.data.tokenizer import train_bpe
from loopos.errors import ConfigError, DataError
from loopos.methods.fine_tuning import FineTuner, Options
from loopos.methods.outputs import Classification, MultiLabel, Regression
from loopos.models import Transformer, TransformerConfig
from loopos.training.metrics import multi_label_metrics, regression_metrics

WORDS = ["alpha", "beta", "gamma", "delta", "omega", "kappa"]
FAST = Options(learning_rate=3e-3, batch_size=8, num_epochs=40)


def texts(count, seed):
    rng = np.random.default_rng(seed)
    return [list(rng.permutation(WORDS)[: rng.integers(1, 5)]) for _ in range(count)]


def numbers(count, seed):
    """A text's number: how many of its words are in the first half, less the others."""
    return [
        {"text": " ".join(words), "label": sum(1.0 if w in WORDS[:3] else -0.5 for w in words)}
        for words in texts(count, seed)
    ]


def sets(count, seed):
    names = {"alpha": "a", "gamma": "g", "kappa": "k"}
    return [
        {"text": " ".join(words), "label": [names[w] for w in words if w in names]}
        for words in texts(count, seed)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([" ".join(WORDS)] * 3, 300)


def body(seed=0):
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32, "vocab_size": 300}
    return Transformer(TransformerConfig(**sizes, max_seq_len=32), seed=seed)


def message_of(kind, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- learning --------------------------------------------------------------------------------------


def test_a_regression_is_learned_saved_and_loaded(tokenizer, tmp_path):
    tuner = FineTuner(body(), tokenizer, num_classes=1)
    train, held_out = numbers(80, 0), numbers(30, 1)
    result = tuner.fit(train, held_out, FAST)
    figures = result.evaluations[-1]["eval"]
    assert figures["loss"] == pytest.approx(figures["mse"], rel=1e-6)
    assert figures["r2"] > 0.9
    assert figures["mae"] < 0.35
    found = tuner.predict([row["text"] for row in held_out])
    assert found.probabilities is None
    assert found.ids is None
    errors = np.array(found.labels) - np.array([row["label"] for row in held_out])
    assert np.square(errors).mean() == pytest.approx(figures["mse"], rel=1e-5)
    tuner.save(tmp_path / "model")
    again = FineTuner.load(tmp_path / "model")
    assert again.classifier.problem == "regression"
    assert again.predict(["alpha beta"]).labels == tuner.predict(["alpha beta"]).labels
    assert next(found.rows([row["text"] for row in held_out])) == {
        "text": held_out[0]["text"], "value": found.labels[0],
    }  # fmt: skip


def test_several_labels_are_learned_saved_and_loaded(tokenizer, tmp_path):
    tuner = FineTuner(body(), tokenizer)
    train, held_out = sets(80, 0), sets(30, 1)
    result = tuner.fit(train, held_out, FAST)
    assert tuner.label_names == ["a", "g", "k"]
    assert result.history[0]["loss"] == pytest.approx(np.log(2), abs=0.05)
    figures = result.evaluations[-1]["eval"]
    assert figures["f1_micro"] > 0.97
    assert figures["subset_accuracy"] > 0.9
    tuner.save(tmp_path / "model")
    again = FineTuner.load(tmp_path / "model")
    assert again.classifier.problem == "multi_label"
    asked = ["alpha beta", "kappa gamma delta", "beta delta"]
    found = again.predict(asked)
    assert found.labels == [["a"], ["g", "k"], []]
    assert found.labels == tuner.predict(asked).labels
    assert found.probabilities.shape == (3, 3)
    assert ((found.probabilities >= 0.5) == np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0]])).all()
    assert again.evaluate(held_out)["loss"] == pytest.approx(figures["loss"], rel=1e-5)


# -- losses ----------------------------------------------------------------------------------------


def test_losses_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    outputs, labels = rng.normal(0, 3, (6, 4)), rng.integers(0, 2, (6, 4))
    tensors = torch.tensor(outputs), torch.tensor(labels, dtype=torch.float64)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(*tensors).item()
    assert MultiLabel().loss(Tensor(outputs), labels).item() / 6 == pytest.approx(expected)
    targets = rng.normal(size=6)
    expected = torch.nn.functional.mse_loss(tensors[0][:, 0], torch.tensor(targets)).item()
    found = Regression().loss(Tensor(outputs[:, :1]), targets).item() / 6
    assert found == pytest.approx(expected)
    classes = rng.integers(0, 4, 6)
    expected = torch.nn.functional.cross_entropy(tensors[0], torch.tensor(classes)).item()
    assert Classification().loss(Tensor(outputs), classes).item() / 6 == pytest.approx(expected)


def test_options_of_classes_are_refused_elsewhere(tokenizer):
    tuner = FineTuner(body(), tokenizer, num_classes=1)
    message = message_of(ConfigError, tuner.fit, numbers(9, 0), options=FAST, label_smoothing=0.1)
    assert message == "training.label_smoothing: only for classification, the data is regression"
    tuner = FineTuner(body(), tokenizer)
    message = message_of(ConfigError, tuner.fit, sets(9, 0), options=FAST, class_weights="balanced")
    assert message == "training.class_weights: only for classification, the data is multi_label"


def test_data_of_another_problem_is_refused(tokenizer):
    tuner = FineTuner(body(), tokenizer)
    tuner.fit(sets(9, 0), options=FAST, num_epochs=1)
    unknown = [{"text": "alpha", "label": ["a"]}, {"text": "beta", "label": ["gg"]}]
    assert message_of(DataError, tuner.fit, unknown).startswith("row 2: unknown 'label' 'gg'")
    classes = [{"text": "alpha", "label": "a"}, {"text": "beta", "label": "g"}]
    as_classes = read_labelled(classes)
    assert message_of(DataError, tuner.evaluate, as_classes).startswith("row 1: ")
    regression = FineTuner(body(), tokenizer, num_classes=1)
    assert "row 1" in message_of(DataError, regression.fit, classes)


# -- metrics ---------------------------------------------------------------------------------------

finite = st.floats(-1e3, 1e3)


@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=30))
def test_regression_metrics_are_scikit_learn_s(rows):
    sklearn = pytest.importorskip("sklearn.metrics")
    targets, predictions = np.array(rows).T
    m = regression_metrics(targets, predictions)
    assert m["count"] == len(rows)
    assert m["mse"] == pytest.approx(sklearn.mean_squared_error(targets, predictions))
    assert m["mae"] == pytest.approx(sklearn.mean_absolute_error(targets, predictions))
    if np.ptp(targets) > 1e-6:
        assert m["r2"] == pytest.approx(sklearn.r2_score(targets, predictions), rel=1e-6)


def test_r2_is_left_out_where_it_is_not_defined():
    assert regression_metrics(np.ones(3), np.array([1.0, 2.0, 3.0])) == {
        "mse": pytest.approx(5 / 3), "mae": 1.0, "count": 3,
    }  # fmt: skip


matrices = st.integers(1, 12).flatmap(
    lambda n: st.lists(
        st.tuples(*[st.lists(st.booleans(), min_size=3, max_size=3)] * 2), min_size=n, max_size=n
    )
)


@given(matrices)
def test_multi_label_metrics_are_scikit_learn_s(rows):
    sklearn = pytest.importorskip("sklearn.metrics")
    labels, predicted = (np.array([row[i] for row in rows]).astype(int) for i in (0, 1))
    m = multi_label_metrics(labels, predicted)
    assert m["subset_accuracy"] == pytest.approx(sklearn.accuracy_score(labels, predicted))
    assert m["hamming_loss"] == pytest.approx(sklearn.hamming_loss(labels, predicted))
    for average in ("macro", "micro", "weighted"):
        values = sklearn.precision_recall_fscore_support(
            labels, predicted, average=average, zero_division=0
        )
        for name, value in zip(("precision", "recall", "f1"), values, strict=False):
            assert m[f"{name}_{average}"] == pytest.approx(value)
    assert m["per_label"]["support"] == labels.sum(axis=0).tolist()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="2 targets for 3 predictions"):
        regression_metrics(np.ones(2), np.ones(3))
    with pytest.raises(DataError, match=r"labels \[2, 3\] for predictions \[2, 2\]"):
        multi_label_metrics(np.ones((2, 3)), np.ones((2, 2)))
