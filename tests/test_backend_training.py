"""Training on every backend: the losses of the reference, and the same bytes on any threads."""

import subprocess
import sys

import numpy as np
import pytest

import loopos
from loopos.backends.threads import thread_limit

SIZE = {"vocab_size": 101, "d_model": 24, "d_ff": 48, "num_layers": 2, "num_heads": 4}
GPT2 = SIZE | {"dropout": 0.1}
LLAMA = SIZE | {"num_kv_heads": 2, "norm": "rms_norm", "activation": "swiglu", "positions": "rope"}
BERT = SIZE | {"norm_placement": "post", "embedding_norm": True, "activation": "gelu"}
OTHERS = [name for name in loopos.available_backends() if name != "numpy"]


def train(name, options, steps=20, lengths=(9, 40, 2)):
    """Return (losses, the last weights' bytes)."""
    rng = np.random.default_rng(6)
    with loopos.use_backend(name):
        model = loopos.Transformer(loopos.TransformerConfig(**options), seed=0)
        optimizer = loopos.AdamW(model.parameters(), learning_rate=3e-3)
        losses = []
        for step in range(steps):
            rows = [rng.integers(0, options["vocab_size"], n) for n in lengths]
            batch = loopos.Batch.from_sequences(rows)
            loss, count = model.next_token_loss(batch, loopos.DropoutKeys(5, step))
            losses.append(float(loss.data) / count)
            loss.backward()
            optimizer.step(scale=1 / count)
            optimizer.zero_grad()
    return losses, [p.data.tobytes() for p in model.parameters().values()]


@pytest.mark.parametrize("options", [GPT2, LLAMA, BERT], ids=["gpt2", "llama", "bert"])
@pytest.mark.parametrize("name", OTHERS)
def test_twenty_steps_agree_with_the_reference(name, options):
    expected, _ = train("numpy", options)
    found, _ = train(name, options)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert len(set(expected)) == 20  # every step changed something


@pytest.mark.parametrize("options", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.skipif("cython" not in OTHERS, reason="the compiled kernels are not there")
def test_a_trained_model_has_the_same_bytes_at_any_number_of_threads(options):
    # Large enough that every kernel has several tasks.
    large = options | {"vocab_size": 1501, "d_model": 120, "d_ff": 400}
    found = []
    for threads in (1, 2, 5):
        with thread_limit(threads):
            found.append(train("cython", large, steps=4, lengths=(70, 3, 200, 129)))
    assert found[0] == found[1] == found[2]


_STEPS = """
import resource
import sys

import numpy as np

import loopos
from loopos.backends.threads import thread_limit

options = {"vocab_size": 4000, "d_model": 192, "d_ff": 768, "num_layers": 2, "num_heads": 4}
longest = np.array([[250] * 6] * 12)
lengths = longest if sys.argv[1] == "same" else np.random.default_rng(0).integers(1, longest)
lengths[0] = 250
with loopos.use_backend("cython"), thread_limit(1):
    model = loopos.Transformer(loopos.TransformerConfig(**options), seed=0)
    optimizer = loopos.AdamW(model.parameters(), learning_rate=3e-3)
    for row in lengths:
        batch = loopos.Batch.from_sequences([np.arange(length) for length in row])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        loss, count = model.next_token_loss(batch)
        loss.backward()
        optimizer.step(scale=1 / count)
        optimizer.zero_grad()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("lengths", ["same", "ragged"])
@pytest.mark.skipif("cython" not in OTHERS, reason="the compiled kernels are not there")
def test_a_step_finds_the_pages_of_the_steps_before(lengths):
    # In a child: what tests before this one left in the arena would be found, too.
    command = [sys.executable, "-c", _STEPS, lengths]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    faults = [int(line) for line in done.stdout.split()]
    assert faults[0] > 100  # what a step takes from the system, most of it in pages of 2 MiB
    # The interpreter's own objects find a new page now and then; an activation has hundreds.
    assert max(faults[2:]) < 40, faults


@pytest.mark.skipif("cython" not in OTHERS, reason="the compiled kernels are not there")
def test_a_fine_tuned_classifier_has_the_same_bytes_at_any_number_of_threads():
    words = ["good", "bad", "a wonderful film", "two hours of my life", "boring", "superb"] * 6
    rows = [{"text": " ".join(words[i : i + 7]), "label": "yn"[i % 2]} for i in range(24)]
    found = []
    for threads in (1, 2, 5):
        with loopos.use_backend("cython"), thread_limit(threads):
            tuner = loopos.FineTuner(loopos.builtin("base_model"))
            result = tuner.fit(rows, num_epochs=1, batch_size=8, learning_rate=1e-3)
            losses = [record["loss"] for record in result.history]
            weights = tuner.classifier.parameters().values()
            found.append((losses, [p.data.tobytes() for p in weights]))
    assert found[0] == found[1] == found[2]
