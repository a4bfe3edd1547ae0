"""The view of a model with smaller weights: what it shares, what it computes, what it refuses."""

from dataclasses import replace

import numpy as np
import pytest

from loopos import ops
from loopos.autograd import Tensor, no_grad
from loopos.backends import get_backend
from loopos.backends.numpy_backend import NumpyBackend
from loopos.data.batch import Batch
from loopos.errors import ConfigError, LooposError
from loopos.generation import generate
from loopos.models import TransformerConfig
from loopos.models.lora import LoraConfig, add_lora, merge_lora
from loopos.models.quantized import QuantizedTransformer, with_weights
from loopos.models.transformer import Transformer
from loopos.ops import DropoutKeys

GPT2 = TransformerConfig(
    d_model=64, num_heads=4, num_layers=2, d_ff=128, vocab_size=90, max_seq_len=64
)
LLAMA = TransformerConfig(
    d_model=64, num_heads=4, num_layers=2, d_ff=96, vocab_size=90, max_seq_len=64,
    num_kv_heads=2, head_dim=32, norm="rms_norm", activation="swiglu", positions="rope",
    attention_bias=False, mlp_bias=False,
)  # fmt: skip
CONFIGS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen2-untied": replace(
        LLAMA, attention_bias=True, attention_output_bias=False, tied=False, window=7
    ),
    "qwen3": replace(LLAMA, qk_norm=True, mlp_bias=True),
}
#: Share of the largest logit.
TOLERANCE = {"bfloat16": 0.03, "int8": 0.08}
BATCH = Batch.from_sequences([[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8]])


class RoundedWeight:
    """What a backend without kernels for smaller weights would do: round, and keep float32."""

    def __init__(self, w, kind):
        if kind == "bfloat16":
            bits = w.view(np.uint32)
            self.data = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
            self.nbytes = w.nbytes // 2
        else:
            scale = np.abs(w).max(axis=1, keepdims=True) / 127
            self.data = (np.round(w / scale) * scale).astype(np.float32)
            self.nbytes = w.nbytes // 4 + 4 * len(w)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Put rounding in the place of kernels where a backend has none."""
    if not hasattr(NumpyBackend, "quantize"):
        monkeypatch.setattr(
            NumpyBackend, "quantize", lambda self, w, kind: RoundedWeight(w, kind), raising=False
        )
    if not hasattr(ops, "linear_quantized"):
        monkeypatch.setattr(
            ops,
            "linear_quantized",
            lambda x, w, b, act: ops.linear(x, Tensor(w.data), b, act),
            raising=False,
        )


def scrambled(config):
    model = Transformer(config, seed=5)
    rng = np.random.default_rng(5)
    for name, parameter in model.parameters().items():
        if parameter.data.ndim == 1:
            parameter.data += 0.2 * rng.standard_normal(parameter.shape).astype(np.float32)
        elif "layers" in name:
            parameter.data *= 5
    return model


def logits(model):
    with no_grad():
        return model.forward(BATCH).data


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_near_those_of_the_model(name, kind):
    model = scrambled(CONFIGS[name])
    before = {n: p.data.copy() for n, p in model.parameters().items()}
    view = with_weights(model, kind)
    expected, found = logits(model), logits(view)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < error < TOLERANCE[kind]
    for n, parameter in view.parameters().items():
        assert parameter.data is model.parameters()[n].data
        np.testing.assert_array_equal(parameter.data, before[n])
        assert model.parameters()[n].requires_grad
        assert not parameter.requires_grad
    share = view.nbytes / sum(a.nbytes for n, a in before.items() if a.ndim == 2)
    assert share < {"bfloat16": 0.51, "int8": 0.35}[kind]


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_adapters_act_on_the_view(name, merged, kind):
    model = add_lora(scrambled(CONFIGS[name]), LoraConfig(rank=4))
    rng = np.random.default_rng(0)
    for parameter in model.parameters().values():
        if parameter.name.endswith("lora_b"):
            parameter.data += 0.1 * rng.standard_normal(parameter.shape).astype(np.float32)
    if merged:
        merge_lora(model)
    view = with_weights(model, kind)
    expected = logits(model)
    assert np.abs(logits(view) - expected).max() < TOLERANCE[kind] * np.abs(expected).max()
    assert not any(p.requires_grad for p in view.parameters().values())
    assert any(p.requires_grad for p in model.parameters().values())


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_generates_what_its_whole_forward_says(name, kind):
    model = scrambled(CONFIGS[name])
    view = with_weights(model, kind)
    prompts = [[3, 1, 4], list(range(40)), [9]]
    found = generate(model, prompts, temperature=0, max_new_tokens=8, weights=kind, batch_size=2)
    for prompt, row in zip(prompts, found, strict=True):
        with no_grad():
            tokens = np.append(prompt, row.ids[:-1])
            scores = view.forward(Batch.from_sequences([tokens])).data[len(prompt) - 1 :]
        chosen = np.take_along_axis(scores, row.ids[:, None], axis=1)[:, 0]
        assert (chosen >= scores.max(axis=1) - 1e-4).all()
    again = generate(view, prompts, temperature=0, max_new_tokens=8, batch_size=3)
    assert [g.ids.tolist() for g in again] == [g.ids.tolist() for g in found]


def test_float32_is_the_model_itself_and_a_view_stays_itself():
    model = scrambled(GPT2)
    assert with_weights(model, "float32") is model
    view = with_weights(model, "int8")
    assert isinstance(view, QuantizedTransformer)
    assert with_weights(view, "int8") is view
    assert with_weights(view, "float32") is view
    with pytest.raises(ConfigError, match="has int8 already, asked for bfloat16"):
        with_weights(view, "bfloat16")
    with pytest.raises(ConfigError, match="weights: expected one of float32, bfloat16, int8"):
        with_weights(model, "float16")
    with pytest.raises(ConfigError, match="int8 is made of float32, the model is float64"):
        with_weights(Transformer(GPT2, dtype=np.float64), "int8")


def test_a_model_without_a_head_has_a_view():
    model = Transformer(replace(GPT2, lm_head=False, causal=False))
    view = with_weights(model, "bfloat16")
    assert view.get_hidden_states(BATCH).shape == (12, 64)
    with pytest.raises(ConfigError, match="no language-model head"):
        view.forward(BATCH)


def test_it_is_not_trained():
    model = add_lora(scrambled(GPT2))
    view = with_weights(model, "int8")
    with pytest.raises(LooposError, match="int8 weights cannot be trained; train the model it was"):
        view.next_token_loss(BATCH)
    with pytest.raises(LooposError, match="cannot be trained"):
        view.get_hidden_states(BATCH, DropoutKeys(0, 0))
    with pytest.raises(LooposError, match="nothing that is trained"):
        view.get_hidden_states(BATCH).backward(np.ones((12, 64)))
    with no_grad():
        found, count = view.next_token_loss(BATCH)
        expected, _ = model.next_token_loss(BATCH)
    assert count == 9
    assert abs(found.item() - expected.item()) < 0.05 * abs(expected.item())


def test_one_product_for_layers_of_one_input():
    calls = []
    quantize = type(get_backend()).quantize

    class Counting(type(get_backend())):
        def quantize(self, w, kind):
            calls.append(w.shape)
            return quantize(self, w, kind)

    from loopos.backends import use_backend

    with use_backend(Counting()):
        with_weights(scrambled(LLAMA), "int8")
    layer = [(128 + 64 + 64, 64), (64, 128), (96 * 2, 64), (64, 96)]
    assert calls == [*layer, *layer, (90, 64)]
