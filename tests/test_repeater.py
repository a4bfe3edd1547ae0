"""Steps that are repeated by their kernels alone: when they are, and that nobody can tell."""

import gc
import threading
from dataclasses import replace

import numpy as np
import pytest

import loopos
from loopos.backends import get_backend, use_backend
from loopos.backends.threads import thread_limit
from loopos.generation import SamplingOptions, generate
from loopos.generation.engine import Engine
from loopos.generation.kv_cache import KVCache
from loopos.models import TransformerConfig
from loopos.models.lora import LoraConfig, add_lora
from loopos.models.quantized import with_weights
from loopos.models.transformer import Transformer

if "cython" not in loopos.available_backends():
    pytest.skip("the compiled kernels are not there", allow_module_level=True)

from loopos._ext import kernels
from loopos.backends.cython_backend import CythonBackend

GPT2 = TransformerConfig(
    d_model=60, num_heads=3, num_layers=2, d_ff=70, vocab_size=31, max_seq_len=96
)
LLAMA = TransformerConfig(
    d_model=64, num_heads=4, num_layers=2, d_ff=90, vocab_size=31, max_seq_len=96, num_kv_heads=2,
    head_dim=12, norm="rms_norm", activation="swiglu", positions="rope", attention_bias=False,
    mlp_bias=False,
)  # fmt: skip
MODELS = {
    "gpt2": GPT2,
    "post-norm": replace(GPT2, norm_placement="post", embedding_norm=True, tied=False),
    "llama": LLAMA,
    "qwen2": replace(LLAMA, attention_bias=True, attention_output_bias=False, window=3),
    "qwen3": replace(LLAMA, qk_norm=True, mlp_bias=True),
}
PROMPTS = [np.arange(n) * 7 % 31 for n in (3, 40, 1, 17, 17, 20)]


@pytest.fixture(autouse=True)
def cython():
    with use_backend("cython"):
        yield get_backend()


@pytest.fixture(params=kernels.levels())
def level(request, cython):
    before = kernels.level()
    cython.use_level(request.param)
    yield request.param
    cython.use_level(before)


def array(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


# -- steps of generation --------------------------------------------------------------------------


def never(self):
    return lambda key, compute: compute()


def scrambled(config):
    model = Transformer(config, seed=5)
    for index, parameter in enumerate(model.parameters().values()):
        parameter.data += 0.3 * array(*parameter.shape, seed=index)
    return model


def assert_same(found, expected):
    assert [g.ids.tolist() for g in found] == [g.ids.tolist() for g in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.logprobs.tobytes() == b.logprobs.tobytes()


def one_row(model, tokens, options, capacity=64):
    """An engine with one row that has its first token, and the row."""
    ids, cache = np.array(tokens, np.int32), KVCache(model.config, 1, capacity)
    cache.allocate()
    engine = Engine(model, None, cache, options)
    row = engine.start(0, 0, ids, 0)
    engine.choose([row], engine.prefill([ids], [0]))
    engine.arrange()
    return engine, row


def adapted(config):
    model = add_lora(scrambled(config), LoraConfig(rank=3, alpha=6.0))
    for name, parameter in model.parameters().items():
        if name.endswith("lora_b"):
            parameter.data += array(*parameter.shape)
    return model


def counted(model, monkeypatch):
    """The numbers of rows of each step that Python runs."""
    seen, inner = [], model.get_hidden_states

    def forward(batch, *args, **kwargs):
        if batch.decoding:
            seen.append(batch.num_tokens)
        return inner(batch, *args, **kwargs)

    monkeypatch.setattr(model, "get_hidden_states", forward)
    return seen


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("make", [scrambled, adapted])
@pytest.mark.parametrize("name", MODELS)
def test_steps_have_the_bytes_of_forwards(name, make, kind, level, monkeypatch):
    model = with_weights(make(MODELS[name]), kind)
    options = SamplingOptions(max_new_tokens=15, temperature=0.9, num_samples=2, seed=1)
    with monkeypatch.context() as context:
        context.setattr(CythonBackend, "repeater", never)
        expected = generate(model, PROMPTS, options, batch_size=4)
    seen = counted(model, monkeypatch)
    assert_same(generate(model, PROMPTS, options, batch_size=4), expected)
    assert seen == [4, 4]  # the recordings of 3 x 14 steps
    with thread_limit(1):
        assert_same(generate(model, PROMPTS, options, batch_size=4), expected)


def test_rows_that_come_and_go(monkeypatch):
    model = scrambled(LLAMA)
    options = SamplingOptions(max_new_tokens=30, temperature=1.3, num_samples=3, seed=4,
                              stop_ids=(0, 11, 23), repetition_penalty=1.3)  # fmt: skip
    with monkeypatch.context() as context:
        context.setattr(CythonBackend, "repeater", never)
        expected = generate(model, PROMPTS, options, batch_size=5)
    assert len({g.ids.size for g in expected}) > 5
    assert_same(generate(model, PROMPTS, options, batch_size=5), expected)


def test_a_cache_that_grows_and_settings_that_change_between_steps(monkeypatch):
    model = scrambled(GPT2)
    options = SamplingOptions(max_new_tokens=80, temperature=0.0)
    expected = generate(model, [[1, 2, 3]], options)[0].ids.tolist()
    seen = counted(model, monkeypatch)
    engine, row = one_row(model, [1, 2, 3], options, capacity=1)
    for step in range(79):
        if step == 20:
            with use_backend("numpy"):
                engine.step()
        elif 30 <= step < 35:
            with thread_limit(1):
                engine.step()
        else:
            engine.step()
    assert row.ids == expected
    assert engine.cache.capacity > 64
    # Twice: at the beginning, after NumPy's step, with one thread, after that, and with the larger
    # cache.
    assert seen == [1] * 11


def test_weights_that_change_between_steps_are_used():
    model = scrambled(GPT2)
    options = SamplingOptions(max_new_tokens=12, temperature=0.0)
    engine, row = one_row(model, [7], options)
    for _ in range(6):
        engine.step()
    model.parameters()["final_norm.weight"].data[...] = 0
    model.parameters()["final_norm.bias"].data[...] = 0
    engine.step()
    assert row.ids[-1] == 0  # the first of equal logits
    assert row.logprobs[-1] == pytest.approx(-np.log(31))


class Biased(Transformer):
    """What a user may write: scores that NumPy changes, in an array of their own or in place."""

    in_place = False

    def logits(self, hidden, decoding=False):
        scores = super().logits(hidden, decoding)
        if self.in_place:
            scores.data[:, 3] += 100
        else:
            scores.data = scores.data + 100 * (np.arange(scores.data.shape[1]) == 3).astype("f")
        return scores


@pytest.mark.parametrize("in_place", [False, True])
def test_what_numpy_does_on_the_way_is_not_lost(in_place):
    model = Biased(GPT2, seed=1)
    model.in_place = in_place
    (found,) = generate(model, [[1]], temperature=0, max_new_tokens=20)
    assert found.ids.tolist() == [3] * 20


def test_threads_that_generate_at_once():
    model, results = scrambled(LLAMA), {}
    options = SamplingOptions(max_new_tokens=40, temperature=1.0, num_samples=2)
    expected = generate(model, PROMPTS, options, batch_size=3)

    def work(index):
        with use_backend("cython"):
            results[index] = generate(model, PROMPTS, options, batch_size=3)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert_same(results[index], expected)


def test_a_step_that_was_interrupted_is_begun_again(monkeypatch):
    model = scrambled(GPT2)
    options = SamplingOptions(max_new_tokens=9, temperature=0.0)
    expected = generate(model, [[1, 2]], options)[0].ids.tolist()
    engine, row = one_row(model, [1, 2], options)
    for step in range(8):
        if step < 2:
            with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
                context.setattr(model, "logits", interrupted)
                engine.step()
        engine.step()
    assert row.ids == expected


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


# -- the repeater itself --------------------------------------------------------------------------


def test_what_only_kernels_do_is_repeated(cython):
    x, w, table = array(5, 40), array(33, 40), array(33, 30)
    ids, rng = np.zeros(5, np.int32), np.random.default_rng(0)
    repeater, calls = kernels.Repeater(), []

    def compute():
        calls.append(1)
        (y,) = cython.decode_linears(x, [(w, None)], "relu")
        a, _ = cython.split_columns(y, (30, 3))
        a = cython.swiglu(a, cython.add(a, a, 2.0))
        return cython.add(cython.activation(a, "gelu"), cython.gather_rows(table, ids))

    for _ in range(6):
        x[...], ids[...] = rng.standard_normal(x.shape), rng.integers(0, 33, 5)
        expected = compute().tobytes()
        assert repeater(1, compute).tobytes() == expected
    assert repeater.settled
    assert len(calls) == 6 + 2


def test_a_number_that_changes_is_not_repeated(cython):
    x, repeater = array(5, 40), kernels.Repeater()
    for factor in range(8):
        found = repeater(1, lambda factor=factor: cython.add(x, x, float(factor)))
        np.testing.assert_allclose(found, (1 + factor) * x, rtol=1e-6)
        del found
    assert not repeater.settled


@pytest.mark.parametrize(
    "outside",
    [
        pytest.param(lambda b, x, w: b.linear(x * 2, w)[0], id="made before"),
        pytest.param(lambda b, x, w: b.linear(x, w)[0] * 2, id="made after"),
        pytest.param(lambda b, x, w: b.add(b.linear(x, w)[0] * 2, b.linear(x, w)[0]), id="between"),
        pytest.param(lambda b, x, w: in_place(b.linear(x, w)[0], x), id="in place"),
        pytest.param(lambda b, x, w: b.linear(x, w)[0][:, ::2].copy(), id="a copy"),
        pytest.param(lambda b, x, w: b.loss_probe(x, w), id="another kernel"),
        pytest.param(lambda b, x, w: b.linear(x.astype("d"), w.astype("d"))[0], id="float64"),
        pytest.param(lambda b, x, w: [1, 2], id="no array"),
    ],
)
def test_what_others_do_as_well_is_computed_each_time(cython, outside, monkeypatch):
    x, w, rng = array(5, 40), array(33, 40), np.random.default_rng(0)

    def change():
        x[...] = rng.standard_normal(x.shape)

    def probe(a, b):  # log-probabilities, by a kernel that is not repeated, as an array of kernels
        y = cython.linear(a, b)[0]
        logp = cython.linear_logprobs(a, b, np.zeros(5, np.int32))[0]
        return cython.add(y, np.repeat(logp[:, None], 33, axis=1))

    monkeypatch.setattr(cython, "loss_probe", probe, raising=False)
    repeater = kernels.Repeater()
    for _ in range(8):
        change()
        expected = np.asarray(outside(cython, x, w)).tobytes()
        assert np.asarray(repeater(1, lambda: outside(cython, x, w))).tobytes() == expected
    assert not repeater.settled


def in_place(y, x):
    y += x[0, 0]
    return y


def test_another_key_is_recorded_anew(cython):
    x, repeater, calls = {n: array(n, 8) for n in (2, 3)}, kernels.Repeater(), []

    def compute(n):
        calls.append(n)
        return cython.add(x[n], x[n])

    for n in (2, 2, 2, 3, 3, 3, 3, 2, 2, 2):
        x[n] += 1
        np.testing.assert_array_equal(repeater(n, lambda n=n: compute(n)), 2 * x[n])
    assert calls == [2, 2, 3, 3, 2, 2]


def test_memory_is_given_back_and_arrays_are_kept_alive(cython):
    gc.collect()
    kernels.arena_trim()
    used = kernels.arena_state()[0]
    x, w = array(4, 64), [array(64, 64)]
    repeater = kernels.Repeater()
    for _ in range(2):
        repeater(0, lambda: cython.linear(cython.linear(x, w[0])[0], w[0])[0])
    y = repeater(0, None)
    expected = y.copy()
    assert repeater.settled
    assert kernels.arena_state()[0] > used
    w.clear()  # what the kernels read is still there
    others = [array(64, 64, seed=i) for i in range(50)]
    np.testing.assert_array_equal(repeater(0, None), expected)
    del others, repeater
    np.testing.assert_array_equal(y, expected)
    del y
    assert kernels.arena_state()[0] == used


def test_arrays_of_the_memory_of_a_recording_can_outlive_it(cython):
    x, kept, repeater = array(4, 64), [], kernels.Repeater()

    def compute():
        y = cython.add(x, x)
        kept.append(cython.add(y, y))
        return y

    for _ in range(6):
        repeater(0, compute)
    assert not repeater.settled  # each time the kept array was another
    del repeater
    for y in kept:
        np.testing.assert_array_equal(y, 4 * x)


def test_a_computation_that_fails_is_not_recorded(cython):
    x, repeater = array(4, 8), kernels.Repeater()
    with pytest.raises(ZeroDivisionError):
        repeater(0, lambda: cython.add(x, x) / 0 if 1 / 0 else None)
    for _ in range(3):
        np.testing.assert_array_equal(repeater(0, lambda: cython.add(x, x)), 2 * x)
    assert repeater.settled


def test_arrays_of_other_threads_are_none_of_a_recording(cython):
    x, w, repeater, others = array(4, 8), array(8, 8), kernels.Repeater(), []

    def aside():
        with use_backend("cython"):
            others.append(get_backend().linear(x, w)[0])

    def compute():
        thread = threading.Thread(target=aside)
        thread.start()
        thread.join()
        return cython.add(x, x)

    for _ in range(4):
        repeater(0, compute)
    assert repeater.settled
    expected = [y.copy() for y in others]
    x += 1
    repeater(0, compute)
    for y, before in zip(others, expected, strict=True):
        np.testing.assert_array_equal(y, before)
