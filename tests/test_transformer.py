"""The network itself: gradients, ragged batches, and that every option does something."""

import math
from dataclasses import replace

import numpy as np
import pytest

from loopos import ops
from loopos.autograd import backward, no_grad
from loopos.backends import use_backend
from loopos.data.batch import Batch
from loopos.errors import ConfigError, DataError
from loopos.models import Transformer, TransformerConfig
from loopos.models.lora import LoraConfig, add_lora
from loopos.models.rope import RopeScaling
from loopos.ops import DropoutKeys

SIZES = {"d_model": 12, "num_heads": 4, "num_layers": 2, "d_ff": 18, "vocab_size": 23}
GPT2 = TransformerConfig(**SIZES, max_seq_len=16)
LLAMA = TransformerConfig(
    **SIZES,
    num_kv_heads=2,
    head_dim=6,
    max_seq_len=16,
    norm="rms_norm",
    norm_eps=1e-6,
    activation="swiglu",
    positions="rope",
    attention_bias=False,
    mlp_bias=False,
    tied=False,
)
BERT = TransformerConfig(
    **SIZES,
    max_seq_len=16,
    norm_placement="post",
    norm_eps=1e-12,
    activation="gelu",
    causal=False,
    token_types=2,
    embedding_norm=True,
)
QWEN2 = replace(LLAMA, attention_bias=True, attention_output_bias=False, tied=True)
QWEN3 = replace(LLAMA, d_model=14, qk_norm=True)
MISTRAL = replace(LLAMA, d_model=14, head_dim=10, window=3)
LINEAR = RopeScaling("linear", 2.5)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_seq_len=64)
SEQUENCES = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8, 9]]
TYPES = np.array([0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1], np.int32)


def scrambled(config, seed=0, dtype=np.float64):
    """A model whose every parameter matters: no bias is 0, no gain 1, no weight tiny."""
    model = Transformer(config, seed, dtype)
    rng = np.random.default_rng(seed)
    for parameter in model.parameters().values():
        parameter.data += (0.3 * rng.standard_normal(parameter.shape)).astype(dtype)
    return model


def batch_for(config, sequences=SEQUENCES):
    batch = Batch.from_sequences(sequences)
    if not config.token_types:
        return batch
    return replace(batch, token_types=TYPES[: batch.tokens.size] % config.token_types)


OPTIONS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "bert": BERT,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3-window": replace(QWEN3, window=3, attention_bias=True, attention_output_bias=True),
    "mistral": MISTRAL,
    "llama-linear": replace(LLAMA, rope_scaling=LINEAR),
    "llama-llama3": replace(LLAMA, head_dim=12, rope_scaling=LLAMA3),
    "qk-norm": replace(GPT2, qk_norm=True),
    "qk-norm-bert": replace(BERT, qk_norm=True, num_kv_heads=1),
    "rms": replace(GPT2, norm="rms_norm"),
    "post": replace(GPT2, norm_placement="post"),
    "post-rms": replace(LLAMA, norm_placement="post"),
    "gelu": replace(GPT2, activation="gelu"),
    "relu": replace(GPT2, activation="relu"),
    "silu": replace(GPT2, activation="silu"),
    "swiglu": replace(GPT2, activation="swiglu"),
    "rope": replace(GPT2, positions="rope", head_dim=4),
    "no-positions": replace(GPT2, positions="none"),
    "grouped": replace(GPT2, num_kv_heads=2),
    "one-kv-head": replace(GPT2, num_kv_heads=1),
    "head-size": replace(GPT2, head_dim=5),
    "bidirectional": replace(GPT2, causal=False, lm_head=True),
    "window": replace(GPT2, window=2),
    "window-both-sides": replace(BERT, window=2),
    "no-attention-bias": replace(GPT2, attention_bias=False, attention_output_bias=False),
    "no-output-bias": replace(GPT2, attention_output_bias=False),
    "no-mlp-bias": replace(GPT2, mlp_bias=False),
    "untied": replace(GPT2, tied=False),
    "types": replace(GPT2, token_types=2),
    "embedding-norm": replace(GPT2, embedding_norm=True),
    "embedding-norm-rms": replace(LLAMA, embedding_norm=True),
    "eps": replace(GPT2, norm_eps=0.1),
    "dropout": replace(GPT2, dropout=0.2),
    "dropout-bert": replace(BERT, dropout=0.2),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_of_the_whole_model(name):
    """A random direction through all parameters, by central differences in float64."""
    config = OPTIONS[name]
    model, batch = scrambled(config), batch_for(config)
    rng = np.random.default_rng(7)
    with no_grad():
        shape = model.get_hidden_states(batch).shape
    upstream = rng.standard_normal(shape)

    def value():
        keys = DropoutKeys(3, 1)
        hidden = model.get_hidden_states(batch, keys)
        total = float(np.sum(hidden.data * upstream))
        if not config.lm_head:
            return total, [(hidden, upstream)]
        if not config.causal:
            head = model.forward(batch, DropoutKeys(3, 1))
            weights = rng_logits[: head.data.size].reshape(head.shape)
            return total + float(np.sum(head.data * weights)), [(hidden, upstream), (head, weights)]
        loss, count = model.next_token_loss(batch, DropoutKeys(3, 1))
        assert count == 10
        return total + float(loss.data), [(hidden, upstream), (loss, 1.0)]

    rng_logits = rng.standard_normal(13 * SIZES["vocab_size"])
    backward(value()[1])
    parameters = model.parameters()
    direction = {name: rng.standard_normal(p.shape) for name, p in parameters.items()}
    slope = sum(np.sum(p.grad * direction[n]) for n, p in parameters.items() if p.grad is not None)
    assert all(p.grad is not None for p in parameters.values())
    estimates = []
    # Richardson: the error of the pair is of fourth order. relu has kinks, so it steps little.
    for step in (1e-7, 5e-8) if config.activation == "relu" else (1e-4, 5e-5):
        ends = []
        for sign in (1, -1):
            for key, parameter in parameters.items():
                parameter.data += sign * step * direction[key]
            with no_grad():
                ends.append(value()[0])
            for key, parameter in parameters.items():
                parameter.data -= sign * step * direction[key]
        estimates.append((ends[0] - ends[1]) / (2 * step))
    numeric = (4 * estimates[1] - estimates[0]) / 3
    assert slope == pytest.approx(numeric, rel=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_ragged_batch_is_each_sequence_alone(name):
    config = OPTIONS[name]
    model, batch = scrambled(config), batch_for(config)
    together = model.get_hidden_states(batch, DropoutKeys(5, 2)).data
    for index, (start, stop) in enumerate(zip(batch.offsets, batch.offsets[1:], strict=False)):
        alone = Batch.from_sequences([batch.tokens[start:stop]])
        types = None if batch.token_types is None else batch.token_types[start:stop]
        # The sample's index in the whole batch keys its dropout.
        alone = replace(alone, token_types=types, sample_ids=np.array([index], np.int32))
        found = model.get_hidden_states(alone, DropoutKeys(5, 2)).data
        np.testing.assert_allclose(found, together[start:stop], rtol=0, atol=1e-12)


CHANGES = [
    (GPT2, {"norm": "rms_norm"}),
    (GPT2, {"norm_placement": "post"}),
    (GPT2, {"norm_eps": 1e-2}),
    (GPT2, {"activation": "gelu"}),
    (GPT2, {"activation": "relu"}),
    (GPT2, {"activation": "silu"}),
    (GPT2, {"activation": "swiglu"}),
    (GPT2, {"positions": "none"}),
    (LLAMA, {"positions": "none"}),
    (GPT2, {"positions": "rope", "head_dim": 4}),
    (LLAMA, {"rope_theta": 100.0}),
    (LLAMA, {"rope_scaling": LINEAR}),
    (LLAMA, {"head_dim": 12, "rope_scaling": LLAMA3}),
    (replace(LLAMA, rope_scaling=LINEAR), {"rope_scaling": replace(LINEAR, factor=4.0)}),
    (GPT2, {"qk_norm": True}),
    (LLAMA, {"qk_norm": True}),
    (QWEN3, {"norm_eps": 1e-2}),
    (MISTRAL, {"window": 4}),
    (GPT2, {"causal": False, "lm_head": True}),
    (GPT2, {"window": 3}),
    (BERT, {"window": 3}),
    (GPT2, {"num_kv_heads": 2}),
    (GPT2, {"head_dim": 4}),
    (GPT2, {"attention_bias": False}),
    (GPT2, {"attention_output_bias": False}),
    (GPT2, {"mlp_bias": False}),
    (GPT2, {"tied": False}),
    (GPT2, {"token_types": 2}),
    (GPT2, {"embedding_norm": True}),
    (GPT2, {"num_layers": 1}),
]


@pytest.mark.parametrize(("config", "change"), CHANGES)
def test_every_option_changes_the_result(config, change):
    """Parameters that both models have are equal, so that only the option differs."""
    first, second = scrambled(config), scrambled(replace(config, **change), seed=1)
    for name, parameter in second.parameters().items():
        other = first.parameters().get(name)
        if other is not None:
            cut = tuple(slice(0, n) for n in np.minimum(other.shape, parameter.shape))
            parameter.data[cut] = other.data[cut]
    batch = Batch.from_sequences(SEQUENCES)

    def outputs(model):
        return (model.forward(batch) if config.lm_head else model.get_hidden_states(batch)).data

    assert np.abs(outputs(first) - outputs(second)).max() > 1e-4


def test_heads_are_normalised_one_by_one_before_they_are_rotated():
    """The first layer against the formula of Qwen3, written out head by head."""
    config = replace(QWEN3, num_layers=1)
    model = scrambled(config)
    values = {name: parameter.data for name, parameter in model.parameters().items()}

    def rms(x, gain):
        return x / np.sqrt(np.mean(x * x) + config.norm_eps) * gain

    def rotated(x, position):
        half, angles = config.head_dim // 2, position * 10000.0 ** -(np.arange(3) / 3)
        a, b = x[:half], x[half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin])

    layer, tokens = "layers.0.attention", [3, 1, 4]
    x = np.array([rms(values["embeddings.tokens"][t], 1.0) for t in tokens])
    x *= values["layers.0.attention_norm.weight"]
    flat = {n: (x @ values[f"{layer}.{n}.weight"].T).reshape(3, -1, 6) for n in "qkv"}
    mixed = np.zeros((3, config.num_heads, 6))
    for t in range(3):
        for head in range(config.num_heads):
            group = head // 2
            query = rotated(rms(flat["q"][t, head], values[f"{layer}.q_norm.weight"]), t)
            keys = [
                rotated(rms(flat["k"][s, group], values[f"{layer}.k_norm.weight"]), s)
                for s in range(t + 1)
            ]
            weights = np.exp(np.array(keys) @ query / math.sqrt(6))
            mixed[t, head] = weights / weights.sum() @ flat["v"][: t + 1, group]
    expected = mixed.reshape(3, -1) @ values[f"{layer}.o.weight"].T
    batch = Batch.from_sequences([tokens])
    found = model._attention(
        0, model._norm("layers.0.attention_norm", model._embed(batch, None)), batch, None
    )
    np.testing.assert_allclose(found.data, expected, rtol=1e-11, atol=1e-12)


def test_a_window_as_long_as_the_sequence_changes_nothing():
    batch = Batch.from_sequences(SEQUENCES)
    whole, windowed = scrambled(GPT2), scrambled(replace(GPT2, window=8))
    np.testing.assert_allclose(
        windowed.forward(batch).data, whole.forward(batch).data, rtol=0, atol=1e-12
    )


def test_token_types_of_a_batch_count_and_default_to_zero():
    model = scrambled(BERT)
    batch = Batch.from_sequences(SEQUENCES)
    plain = model.get_hidden_states(batch).data
    zeros = replace(batch, token_types=np.zeros(13, np.int32))
    np.testing.assert_array_equal(model.get_hidden_states(zeros).data, plain)
    typed = model.get_hidden_states(replace(batch, token_types=TYPES)).data
    assert np.abs(typed - plain).max() > 1e-3


def test_a_causal_model_does_not_look_ahead_and_a_bidirectional_one_does():
    for config in (GPT2, LLAMA):
        model = scrambled(config)
        first = model.get_hidden_states(Batch.from_sequences([[1, 2, 3, 4]])).data
        second = model.get_hidden_states(Batch.from_sequences([[1, 2, 3, 9]])).data
        np.testing.assert_array_equal(first[:3], second[:3])
        assert np.abs(first[3] - second[3]).max() > 1e-3
    model = scrambled(BERT)
    first = model.get_hidden_states(Batch.from_sequences([[1, 2, 3, 4]])).data
    second = model.get_hidden_states(Batch.from_sequences([[1, 2, 3, 9]])).data
    assert np.abs(first[0] - second[0]).max() > 1e-3


def test_dropout_acts_only_with_keys_and_depends_on_them():
    model = scrambled(replace(GPT2, dropout=0.3))
    batch = Batch.from_sequences(SEQUENCES)
    plain = scrambled(GPT2).get_hidden_states(batch).data
    np.testing.assert_array_equal(model.get_hidden_states(batch).data, plain)
    first, again, later, other = (
        model.get_hidden_states(batch, DropoutKeys(*key)).data
        for key in ((1, 1), (1, 1), (1, 2), (2, 1))
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 1e-2
    assert np.abs(first - later).max() > 1e-2
    assert np.abs(first - other).max() > 1e-2


@pytest.mark.parametrize("config", [GPT2, LLAMA, BERT])
def test_dropout_acts_at_the_embeddings_and_three_times_a_layer(config):
    """Embeddings, then attention probabilities and the two branches: each key does something."""
    model, batch = scrambled(replace(config, dropout=0.3)), batch_for(config)

    class Keys(DropoutKeys):
        """The keys of (1, 1), but for the one at `place`."""

        def __init__(self, place):
            super().__init__(1, 1)
            self.place, self.handed = place, 0

        def next(self):
            key = super().next()
            self.handed += 1
            return key ^ 1 if self.handed - 1 == self.place else key

    untouched = Keys(None)
    expected = model.get_hidden_states(batch, untouched).data
    assert untouched.handed == 1 + 3 * config.num_layers
    for place in range(untouched.handed):
        found = model.get_hidden_states(batch, Keys(place)).data
        assert np.abs(found - expected).max() > 1e-3, place


def test_the_loss_is_the_summed_log_likelihood_of_whole_logits():
    model = scrambled(GPT2)
    mask = [np.array([True] * 8), np.array([True]), np.array([True, False, True, True])]
    batch = Batch.from_sequences(SEQUENCES, loss_masks=mask)
    logits = model.forward(batch).data
    expected, counted = 0.0, 0
    for start, sequence, counts in zip((0, 8, 9), SEQUENCES, mask, strict=True):
        for position in range(len(sequence) - 1):
            if counts[position + 1]:
                row = logits[start + position]
                expected += np.log(np.sum(np.exp(row))) - row[sequence[position + 1]]
                counted += 1
    total, count = model.next_token_loss(batch)
    assert count == counted == 9
    np.testing.assert_allclose(total.data, expected, rtol=1e-12)


def test_a_frozen_lower_part_gets_no_gradient_and_the_rest_the_same_one():
    batch = Batch.from_sequences(SEQUENCES)
    whole, half = scrambled(GPT2), scrambled(GPT2)
    for name, parameter in half.parameters().items():
        parameter.requires_grad = name.startswith(("layers.1.", "final_norm"))
    whole.next_token_loss(batch)[0].backward()
    half.next_token_loss(batch)[0].backward()
    for name, parameter in half.parameters().items():
        if parameter.requires_grad:
            np.testing.assert_allclose(parameter.grad, whole.parameters()[name].grad, rtol=1e-12)
        else:
            assert parameter.grad is None
    hidden = half._embed(batch, None)
    assert not hidden.requires_grad  # no tape below the first trained layer


def test_initial_weights_follow_gpt2():
    config = TransformerConfig(
        d_model=64, num_heads=4, num_layers=8, d_ff=256, vocab_size=500, max_seq_len=64
    )
    parameters = Transformer(config, seed=1).parameters()
    assert parameters["embeddings.tokens"].data.std() == pytest.approx(0.02, rel=0.03)
    assert parameters["layers.3.mlp.up.weight"].data.std() == pytest.approx(0.02, rel=0.03)
    for name in ("layers.3.attention.o.weight", "layers.3.mlp.down.weight"):
        assert parameters[name].data.std() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert np.all(parameters["layers.0.attention_norm.weight"].data == 1)
    assert not np.any(parameters["layers.0.attention.q.bias"].data)
    assert all(p.dtype == np.float32 for p in parameters.values())


def test_a_seed_names_one_model_in_both_precisions():
    first, again = Transformer(LLAMA, seed=4), Transformer(LLAMA, seed=4)
    double, other = Transformer(LLAMA, seed=4, dtype=np.float64), Transformer(LLAMA, seed=5)
    for name, parameter in first.parameters().items():
        np.testing.assert_array_equal(parameter.data, again.parameters()[name].data)
        rounded = double.parameters()[name].data.astype(np.float32)
        np.testing.assert_array_equal(parameter.data, rounded)
    name = "layers.0.attention.q.weight"
    assert np.any(first.parameters()[name].data != other.parameters()[name].data)


def test_parameters_are_named_and_counted_once():
    names = list(Transformer(LLAMA).parameters())
    assert names[:4] == [
        "embeddings.tokens",
        "layers.0.attention_norm.weight",
        "layers.0.attention.q.weight",
        "layers.0.attention.k.weight",
    ]
    assert names[-2:] == ["final_norm.weight", "lm_head.weight"]
    # GPT-2: tables, then per layer 4 d^2 + 4 d, 2 d f + f + d, two norms of 2 d; one final norm.
    d, f = 12, 18
    layer = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d
    assert Transformer(GPT2).num_parameters() == (23 + 16) * d + 2 * layer + 2 * d
    untied = Transformer(replace(GPT2, tied=False))
    assert untied.num_parameters() == Transformer(GPT2).num_parameters() + 23 * d
    assert untied.head_weight is untied.parameters()["lm_head.weight"]
    tied = Transformer(GPT2)
    assert tied.head_weight is tied.parameters()["embeddings.tokens"]


def test_float32_stays_float32():
    model = scrambled(GPT2, dtype=np.float32)
    batch = Batch.from_sequences(SEQUENCES)
    assert model.forward(batch).dtype == np.float32
    exact = scrambled(GPT2).forward(batch).data
    assert np.abs(model.forward(batch).data - exact).max() < 1e-5 * np.abs(exact).max()
    model.next_token_loss(batch)[0].backward()
    assert all(p.grad.dtype == np.float32 for p in model.parameters().values())


WRONG = [
    ({"d_model": 13}, "d_model 13 is not a multiple of num_heads 4"),
    ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ({"positions": "rope", "head_dim": 3}, "head_dim 3 is odd"),
    ({"num_layers": 0}, "num_layers is 0, expected a whole number of at least 1"),
    ({"vocab_size": 2.5}, r"vocab_size is 2\.5, expected a whole number"),
    ({"d_ff": True}, "d_ff is True"),
    ({"norm": "layernorm"}, r"norm is 'layernorm'.*did you mean 'layer_norm'\?"),
    ({"activation": "gelu_tan"}, "activation is 'gelu_tan'.*did you mean 'gelu_tanh'"),
    ({"positions": "alibi"}, "positions is 'alibi', expected one of learned, rope, none"),
    ({"norm_placement": "sandwich"}, "norm_placement is 'sandwich'"),
    ({"dropout": 1.0}, r"dropout is 1\.0, expected a number in \[0, 1\)"),
    ({"norm_eps": "small"}, "norm_eps is 'small'"),
    ({"causal": "yes"}, "causal is 'yes', expected true or false"),
    ({"window": 0}, "window is 0"),
    ({"qk_norm": 1}, "qk_norm is 1, expected true or false"),
    ({"rope_scaling": LINEAR}, "rope_scaling needs positions 'rope', found 'learned'"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
]


@pytest.mark.parametrize(("change", "text"), WRONG)
def test_a_wrong_configuration_names_its_key(change, text):
    with pytest.raises(ConfigError, match=text):
        TransformerConfig(**{**SIZES, **change})


def test_inputs_that_do_not_fit_are_refused():
    model = Transformer(GPT2)
    with pytest.raises(DataError, match="token id 23 is outside the vocabulary of 23"):
        model.forward(Batch.from_sequences([[1, 23]]))
    with pytest.raises(DataError, match="token id -1 is outside"):
        model.forward(Batch.from_sequences([[1, -1]]))
    with pytest.raises(DataError, match="a sequence of 17 tokens is longer than max_seq_len 16"):
        model.forward(Batch.from_sequences([[1] * 17]))
    typed = replace(Batch.from_sequences([[1, 2]]), token_types=np.array([0, 1], np.int32))
    with pytest.raises(DataError, match="the model has none"):
        model.forward(typed)
    with pytest.raises(DataError, match="token type is outside"):
        Transformer(BERT).get_hidden_states(replace(typed, token_types=np.array([0, 2], np.int32)))
    with pytest.raises(ConfigError, match="no language-model head"):
        Transformer(BERT).forward(Batch.from_sequences([[1]]))
    with pytest.raises(ConfigError, match="bidirectional"):
        Transformer(BERT).next_token_loss(Batch.from_sequences([[1, 2]]))
    with pytest.raises(ConfigError, match="dtype is float16"):
        Transformer(GPT2, dtype=np.float16)
    with pytest.raises(ConfigError, match=r"'embeddings\.tokens': expected shape \(23, 12\)"):
        Transformer(GPT2, arrays={})


def test_rope_runs_beyond_max_seq_len():
    model = Transformer(LLAMA)
    assert model.forward(Batch.from_sequences([[1] * 40])).shape == (40, 23)


# -- gradient checkpointing ----------------------------------------------------------------------


@pytest.mark.parametrize("config", [GPT2, LLAMA, BERT, QWEN3, MISTRAL])
@pytest.mark.parametrize("how", ["plain", "recomputed", "dropped", "adapted"])
@pytest.mark.parametrize("rows", [[0, 7, 8, 12], [12, 3], [8], []])
def test_states_of_some_rows_are_those_of_all_and_so_are_the_gradients(config, how, rows):
    model = scrambled(replace(config, dropout=0.5 if how == "dropped" else 0.0))
    model.gradient_checkpointing = how == "recomputed"
    if how == "adapted":
        model = add_lora(model, LoraConfig(rank=2))
        for adapter in model.adapters.values():
            for up in adapter.b.values():
                up.data[:] = 0.1
    batch, rows = batch_for(config), np.array(rows, np.int64)

    def of(states):
        keys = DropoutKeys(seed=1, step=2) if how in ("dropped", "adapted") else None
        y = states(keys)
        if rows.size:
            y.backward(np.random.default_rng(3).normal(size=y.shape))
        found = {name: p.grad for name, p in model.parameters().items() if p.grad is not None}
        found = {name: grad.copy() for name, grad in found.items()}
        for p in model.parameters().values():
            p.zero_grad()
        return y.data, found

    some, gradients = of(lambda keys: model.get_hidden_states(batch, keys, rows=rows))
    whole, expected = of(lambda keys: ops.gather_rows(model.get_hidden_states(batch, keys), rows))
    np.testing.assert_allclose(some, whole, rtol=1e-12)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-9, atol=1e-12)


def test_a_row_of_the_last_layer_does_not_depend_on_which_others_are_wanted():
    model = Transformer(replace(GPT2, d_model=48, d_ff=96), seed=1)
    batch = batch_for(GPT2)
    with no_grad(), use_backend("cython"):
        whole = model.get_hidden_states(batch).data
        for rows in ([2], [12, 0], [5, 6, 7]):
            np.testing.assert_array_equal(
                model.get_hidden_states(batch, rows=np.array(rows)).data, whole[rows]
            )


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("frozen", [(), ("embeddings.tokens", "layers.0.attention.q.weight")])
def test_recomputing_layers_changes_no_byte(placement, frozen):
    config = TransformerConfig(
        d_model=12, num_heads=3, num_layers=3, d_ff=20, vocab_size=31, max_seq_len=16,
        norm_placement=placement, dropout=0.2,
    )  # fmt: skip
    batch = Batch.from_sequences([[3, 1, 4, 1, 5], [9], [2, 6, 5, 30]])
    runs = []
    for recompute in (False, True):
        model = Transformer(config, seed=1)
        model.gradient_checkpointing = recompute
        for name in frozen:
            model.parameters()[name].requires_grad = False
        keys = DropoutKeys(3, 4)
        loss, _ = model.next_token_loss(batch, keys)
        loss.backward()
        grads = {n: p.grad for n, p in model.parameters().items()}
        runs.append((loss.item(), keys.next(), grads))
    assert runs[0][:2] == runs[1][:2]
    for name, grad in runs[0][2].items():
        assert (grad is None) == (name in frozen)
        assert grad is None or np.array_equal(grad, runs[1][2][name]), name


@pytest.mark.parametrize(
    ("placement", "again"),
    # With the norm first, a layer ends with that of the next, which is trained.
    [("pre", ["layers.3", "layers.2"]), ("post", ["layers.3"])],
)
def test_frozen_layers_are_not_computed_again(placement, again, monkeypatch):
    config = TransformerConfig(
        d_model=12, num_heads=3, num_layers=4, d_ff=20, vocab_size=31, max_seq_len=16,
        norm_placement=placement, tied=False,
    )  # fmt: skip
    batch = Batch.from_sequences([[3, 1, 4, 1, 5], [9], [2, 6, 5, 30]])
    computed: list[str] = []
    whole = Transformer._mlp

    def mlp(self, name, x, batch, dropout):
        computed.append(name)
        return whole(self, name, x, batch, dropout)

    monkeypatch.setattr(Transformer, "_mlp", mlp)
    found = []
    for recompute in (False, True):
        model = Transformer(config, seed=1)
        model.gradient_checkpointing = recompute
        for name, parameter in model.parameters().items():
            parameter.requires_grad = name.startswith(("layers.3.", "final_norm."))
        loss, _ = model.next_token_loss(batch)
        computed.clear()
        loss.backward()
        assert computed == (again if recompute else [])
        found.append({n: p.grad for n, p in model.parameters().items() if p.grad is not None})
    assert found[0].keys() == found[1].keys() > {"layers.3.mlp.up.weight"}
    for name, gradient in found[0].items():
        assert np.array_equal(gradient, found[1][name]), name


def test_recomputing_keeps_what_enters_a_layer_only():
    import tracemalloc

    config = TransformerConfig(
        d_model=16, num_heads=2, num_layers=8, d_ff=64, vocab_size=31, max_seq_len=256
    )
    batch = Batch.from_sequences([np.arange(256) % 31])
    held = []
    for recompute in (False, True):
        model = Transformer(config)
        model.gradient_checkpointing = recompute
        tracemalloc.start()  # it sees what NumPy allocates
        with use_backend("numpy"):
            loss, _ = model.next_token_loss(batch)
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        del loss
    layer_states = 2 * 256 * 16 * 4  # the stream and its norm
    assert held[1] < 8 * layer_states * 1.5 + 200_000
    assert held[0] > 4 * held[1]


def test_nothing_is_recomputed_where_nothing_is_trained(monkeypatch):
    model = Transformer(TransformerConfig(12, 3, 2, 20, 31))
    model.gradient_checkpointing = True
    batch = Batch.from_sequences([[3, 1, 4]])
    for parameter in model.parameters().values():
        parameter.requires_grad = False
    assert not model.get_hidden_states(batch).requires_grad
    with no_grad():
        assert not Transformer(model.config).get_hidden_states(batch).requires_grad
