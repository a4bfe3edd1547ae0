"""Pooling and the classifier on a body."""

import json

import numpy as np
import pytest
import safetensors.numpy

from loopos.autograd import Tensor
from loopos.data.batch import Batch
from loopos.errors import ConfigError, MissingFileError, ModelFormatError
from loopos.models import (
    SequenceClassifier,
    Transformer,
    TransformerConfig,
    load_classifier,
    load_model,
    pool,
)

CONFIG = TransformerConfig(
    d_model=12, num_heads=3, num_layers=2, d_ff=20, vocab_size=31, max_seq_len=16, tied=False
)
BATCH = Batch.from_sequences([[1, 2, 3, 4], [5], [6, 7]])


def test_pooling_takes_the_mean_the_last_or_the_first():
    x = np.random.default_rng(0).standard_normal((7, 3))
    offsets = BATCH.offsets
    expected = {
        "mean": [x[:4].mean(0), x[4], x[5:].mean(0)],
        "last": [x[3], x[4], x[6]],
        "cls": [x[0], x[4], x[5]],
    }
    for pooling, rows in expected.items():
        np.testing.assert_allclose(pool(Tensor(x), offsets, pooling).data, rows, rtol=1e-14)


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_logits_are_a_linear_map_of_the_pooled_states(pooling):
    body = Transformer(CONFIG, seed=1, dtype=np.float64)
    classifier = SequenceClassifier(body, 4, pooling, seed=2)
    pooled = pool(body.get_hidden_states(BATCH), BATCH.offsets, pooling).data
    classifier.bias.data[:] = [1, 2, 3, 4]
    expected = pooled @ classifier.weight.data.T + [1, 2, 3, 4]
    np.testing.assert_allclose(classifier.logits(BATCH).data, expected, rtol=1e-12)


def test_the_gradient_reaches_every_parameter_it_lists():
    classifier = SequenceClassifier(Transformer(CONFIG, dtype=np.float64), 3)
    classifier.logits(BATCH).backward(np.random.default_rng(0).standard_normal((3, 3)))
    names = list(classifier.parameters())
    assert names[-2:] == ["classifier.weight", "classifier.bias"]
    assert "lm_head.weight" not in names
    assert all(p.grad is not None for p in classifier.parameters().values())


def test_the_head_starts_small_and_by_its_seed():
    body = Transformer(
        TransformerConfig(d_model=256, num_heads=4, num_layers=1, d_ff=8, vocab_size=9)
    )
    first, again, other = (SequenceClassifier(body, 10, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.weight.data, again.weight.data)
    assert np.any(first.weight.data != other.weight.data)
    assert first.weight.data.std() == pytest.approx(0.02, rel=0.05)
    assert not np.any(first.bias.data)


@pytest.fixture
def saved(tmp_path):
    body = Transformer(CONFIG, seed=1)
    classifier = SequenceClassifier(body, 3, "last", seed=2)
    classifier.bias.data[:] = [0.5, -1, 2]
    classifier.save(tmp_path, labels=["no", "maybe", "是"])
    return tmp_path, classifier


def test_what_is_saved_comes_back(saved):
    directory, classifier = saved
    again = load_classifier(directory)
    assert (again.num_classes, again.pooling) == (3, "last")
    assert again.labels == ["no", "maybe", "是"]
    np.testing.assert_array_equal(again.logits(BATCH).data, classifier.logits(BATCH).data)
    body = load_model(directory)
    np.testing.assert_array_equal(
        body.get_hidden_states(BATCH).data, classifier.body.get_hidden_states(BATCH).data
    )
    again.save(directory)
    assert load_classifier(directory).labels == again.labels


def test_transformers_loads_the_body(saved):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    directory, classifier = saved
    model = transformers.AutoModel.from_pretrained(directory).eval()
    with torch.no_grad():
        found = model(input_ids=torch.tensor([[1, 2, 3, 4]])).last_hidden_state[0].numpy()
    expected = classifier.body.get_hidden_states(Batch.from_sequences([[1, 2, 3, 4]])).data
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"pooling": "max"}, "pooling is 'max', expected one of mean, last, cls"),
        ({"num_classes": 0}, "num_classes is 0, expected at least 1"),
        ({"labels": ["a", 1, {}]}, "expected 3 labels"),
        ({"problem": "regresion"}, "key 'problem' is 'regresion', .*did you mean 'regression'"),
        ({"num_classes": 4}, "expected 4 labels"),
        ({"pools": "mean"}, "key 'pools' is unknown"),
        ({"max_length": 0}, "key 'max_length' is 0, expected null or 1 to"),
        ({"max_length": True}, "key 'max_length' is True, expected null or 1 to"),
    ],
)
def test_a_wrong_head_configuration_is_named(saved, change, text):
    directory, _ = saved
    path = directory / "classifier.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelFormatError, match=rf"classifier\.json: {text}"):
        load_classifier(directory)


def test_a_size_is_believed_only_as_far_as_the_tensor_goes(saved):
    directory, _ = saved
    path = directory / "classifier.json"
    change = {"num_classes": 10**15, "labels": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelFormatError, match=r"has shape \[3, 12\], expected \[10{15}, 12\]"):
        load_classifier(directory)


def test_a_wrong_head_file_is_named(saved):
    directory, _ = saved
    path = directory / "classifier.safetensors"
    good = safetensors.numpy.load_file(path)
    wrong = {
        "has shape [3, 11], expected [3, 12]": good
        | {"classifier.weight": np.zeros((3, 11), np.float32)},
        "unexpected tensor 'more'": good | {"more": np.zeros(1, np.float32)},
        "'classifier.bias' is missing": {"classifier.weight": good["classifier.weight"]},
        "is nan at [0]": good | {"classifier.bias": np.full(3, np.nan, np.float32)},
    }
    for text, tensors in wrong.items():
        safetensors.numpy.save_file(tensors, path)
        with pytest.raises(ModelFormatError) as caught:
            load_classifier(directory)
        assert text in str(caught.value)
        assert "classifier.safetensors" in str(caught.value)
    path.unlink()
    with pytest.raises(MissingFileError, match=r"classifier\.safetensors: no such file"):
        load_classifier(directory)
    (directory / "classifier.json").unlink()
    with pytest.raises(MissingFileError, match=r"classifier\.json: no such file"):
        load_classifier(directory)


def test_wrong_arguments_are_refused(tmp_path):
    body = Transformer(CONFIG)
    with pytest.raises(ConfigError, match=r"pooling is 'means'.*did you mean 'mean'"):
        SequenceClassifier(body, 3, "means")
    with pytest.raises(ConfigError, match="num_classes is 0"):
        SequenceClassifier(body, 0)
    with pytest.raises(ConfigError, match="2 labels for num_classes 3"):
        SequenceClassifier(body, 3).save(tmp_path, labels=["a", "b"])
    assert not list(tmp_path.iterdir())
