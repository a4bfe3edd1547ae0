"""Fifty steps of fine-tuning against PyTorch: every parameter, AdamW, clipping, cosine schedule."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from loopos import ops
from loopos.data.batch import Batch
from loopos.models import SequenceClassifier, load_model
from loopos.models.families import FAMILIES
from loopos.models.weights import to_hf_tensors
from loopos.training.optim import AdamW, gradient_norm
from loopos.training.schedules import make_schedule

FIXTURES = Path(__file__).parent / "fixtures"


def section(reference, prefix):
    return {k.removeprefix(prefix): reference[k] for k in reference if k.startswith(prefix)}


def load(name, directory, dtype, fixtures=FIXTURES):
    """The reference, its options and the classifier it starts from."""
    with np.load(fixtures / f"trajectory_{name}.npz") as file:
        reference = dict(file)
    (directory / "config.json").write_text(str(reference["config"]))
    weights = section(reference, "weights/")
    safetensors.numpy.save_file(weights, directory / "model.safetensors", {"format": "pt"})
    options = json.loads(str(reference["options"]))
    classifier = SequenceClassifier(load_model(directory, dtype), options["num_classes"], "mean")
    classifier.weight.data[:] = reference["head/weight"]
    return reference, options, classifier


def train(reference, options, classifier):
    """Return the losses, gradient norms and learning rates of a loop of loopos' own parts."""
    parameters = classifier.parameters()
    optimizer = AdamW(
        parameters,
        learning_rate=options["learning_rate"],
        betas=(options["beta1"], options["beta2"]),
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        decay_groups="matrices",
    )
    rate_at = make_schedule(
        "cosine", options["learning_rate"], options["warmup_steps"], options["steps"]
    )
    sequences = np.split(reference["tokens"], reference["offsets"][1:-1])
    losses, norms, rates = [], [], []
    for step, samples in enumerate(reference["batches"]):
        labels = reference["labels"][samples]
        batch = Batch.from_sequences([sequences[i] for i in samples], labels=labels)
        total, count = ops.cross_entropy(classifier.logits(batch), labels)
        optimizer.zero_grad()
        total.backward()
        norms.append(gradient_norm(parameters.values()) / count)
        clip = min(1.0, options["max_grad_norm"] / (norms[-1] + 1e-6))  # torch's clip_grad_norm_
        rates.append(rate_at(step))
        optimizer.step(scale=clip / count, learning_rate=rates[-1])
        losses.append(float(total.data) / count)
    return np.array(losses), np.array(norms), np.array(rates)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_float64_follows_pytorch(name, tmp_path):
    reference, options, classifier = load(name, tmp_path, "float64")
    losses, norms, rates = train(reference, options, classifier)
    assert np.all(reference["norms"] > options["max_grad_norm"])  # clipping bites at every step
    np.testing.assert_allclose(rates, reference["learning_rates"], rtol=1e-12)
    np.testing.assert_allclose(losses, reference["losses"], rtol=1e-8)
    np.testing.assert_allclose(norms, reference["norms"], rtol=1e-8)
    body = classifier.body
    arrays = {key: parameter.data for key, parameter in body.parameters().items()}
    found = to_hf_tensors(FAMILIES[body.config.family], body.config, arrays)
    expected = section(reference, "final/")
    assert set(found) == set(expected)
    for key, array in expected.items():
        np.testing.assert_allclose(found[key], array, rtol=0, atol=1e-8, err_msg=key)
    np.testing.assert_allclose(classifier.weight.data, reference["final_head/weight"], atol=1e-8)
    np.testing.assert_allclose(classifier.bias.data, reference["final_head/bias"], atol=1e-8)


def test_follows_pytorch_live(tmp_path, monkeypatch):
    """Another seed than the fixture's, run by PyTorch here and now."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("make_fixtures", FIXTURES / "make_fixtures.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "HERE", tmp_path)
    exact = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**script.GPT2 | script.IDS | exact)
    script.trajectory("gpt2", transformers.GPT2Model(config), 21)
    reference, options, classifier = load("gpt2", tmp_path, "float64", tmp_path)
    with np.load(FIXTURES / "trajectory_gpt2.npz") as committed:
        assert not np.array_equal(committed["losses"], reference["losses"])
    losses, norms, _ = train(reference, options, classifier)
    np.testing.assert_allclose(losses, reference["losses"], rtol=1e-8)
    np.testing.assert_allclose(norms, reference["norms"], rtol=1e-8)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_float32_follows_pytorch(name, tmp_path):
    reference, options, classifier = load(name, tmp_path, "float32")
    losses, norms, _ = train(reference, options, classifier)
    np.testing.assert_allclose(losses, reference["losses"], rtol=1e-3)
    np.testing.assert_allclose(norms, reference["norms"], rtol=1e-3)
    assert abs(np.mean(losses - reference["losses"])) <= 1e-5
    assert losses[-10:].mean() < 0.6 * losses[:10].mean()  # it learns
