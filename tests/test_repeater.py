"""Steps that are repeated by their kernels alone: when they are, and that nobody can tell."""

import gc
import os
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest

import loopos
from loopos.backends import get_backend, use_backend
from loopos.backends.threads import thread_limit
from loopos.errors import DataError
from loopos.generation import SamplingOptions, generate
from loopos.generation.engine import Engine
from loopos.generation.kv_cache import KVCache
from loopos.models import TransformerConfig
from loopos.models.lora import LoraConfig, add_lora, merge_lora, unmerge_lora
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
    return lambda compute: compute()


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


def counted(monkeypatch):
    """The numbers of rows of each step that Python runs."""
    seen, inner = [], Transformer.get_hidden_states

    def forward(self, batch, *args, **kwargs):
        if batch.decoding:
            seen.append(batch.num_tokens)
        return inner(self, batch, *args, **kwargs)

    monkeypatch.setattr(Transformer, "get_hidden_states", forward)
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
    seen = counted(monkeypatch)
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
        steps = counted(context)
        expected = generate(model, PROMPTS, options, batch_size=5)
    assert len({g.ids.size for g in expected}) > 5
    seen = counted(monkeypatch)
    assert_same(generate(model, PROMPTS, options, batch_size=5), expected)
    assert len(seen) < len(steps) / 2


def test_a_cache_that_grows_and_settings_that_change_between_steps(monkeypatch):
    model = scrambled(GPT2)
    options = SamplingOptions(max_new_tokens=80, temperature=0.0)
    expected = generate(model, [[1, 2, 3]], options)[0].ids.tolist()
    seen = counted(monkeypatch)
    with thread_limit(2):
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
    options = SamplingOptions(max_new_tokens=12, temperature=0.0)
    for in_place in (True, False):
        model = scrambled(GPT2)
        engine, row = one_row(model, [7], options)
        for _ in range(6):
            engine.step()
        for name in ("final_norm.weight", "final_norm.bias"):
            parameter = model.parameters()[name]
            if in_place:
                parameter.data[...] = 0
            else:
                parameter.data = np.zeros_like(parameter.data)
        engine.step()
        assert row.ids[-1] == 0  # the first of equal logits
        assert row.logprobs[-1] == pytest.approx(-np.log(31))


def test_adapters_that_are_merged_and_taken_out_between_steps(monkeypatch):
    def steps():
        model = adapted(LLAMA)
        engine, row = one_row(model, [7], SamplingOptions(max_new_tokens=40, temperature=0.0))
        for change in (merge_lora, unmerge_lora):
            for _ in range(5):
                engine.step()
            change(model)
        for name, parameter in model.parameters().items():
            if name.endswith("lora_b"):
                parameter.data *= -1
        for _ in range(5):
            engine.step()
        for adapter in model.adapters.values():
            adapter.scale *= 3
        for _ in range(5):
            engine.step()
        return row.ids, row.logprobs

    with monkeypatch.context() as context:
        context.setattr(CythonBackend, "repeater", never)
        expected = steps()
    assert steps() == expected


def test_a_row_that_is_too_long_is_refused():
    engine, _ = one_row(scrambled(GPT2), [7], SamplingOptions(max_new_tokens=300, temperature=0.0))
    with pytest.raises(DataError, match=r"a sequence of 97 tokens is longer than max_seq_len 96"):
        for _ in range(300):
            engine.step()


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
def test_what_a_subclass_does_on_the_way_is_not_lost(in_place):
    model = Biased(GPT2, seed=1)
    model.in_place = in_place
    (found,) = generate(model, [[1]], temperature=0, max_new_tokens=20)
    assert found.ids.tolist() == [3] * 20


def test_a_function_in_the_place_of_a_method_is_called_for_each_step():
    model, calls = scrambled(GPT2), []
    inner = model.get_hidden_states

    def watched(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    model.get_hidden_states = watched
    generate(model, [[1]], temperature=0, max_new_tokens=20)
    assert len(calls) == 20


def test_a_backend_that_overrides_an_op_is_called_for_each_step():
    class Watched(CythonBackend):
        calls = 0

        def layer_norm(self, *args, **kwargs):
            self.calls += 1
            return super().layer_norm(*args, **kwargs)

    watched = Watched()
    with use_backend(watched):
        generate(scrambled(GPT2), [[1]], temperature=0, max_new_tokens=20)
    assert watched.calls == 20 * 5


def test_threads_that_generate_at_once(monkeypatch):
    model, results = scrambled(LLAMA), {}
    options = SamplingOptions(max_new_tokens=40, temperature=1.0, num_samples=2)
    expected = generate(model, PROMPTS, options, batch_size=3)

    def work(index):
        with use_backend("cython"):
            results[index] = generate(model, PROMPTS, options, batch_size=3)

    seen = counted(monkeypatch)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert_same(results[index], expected)
    assert len(seen) < 4 * 4 * 39 / 2  # of four waves of 39 steps in each of four threads


def test_a_step_that_was_interrupted_is_begun_again(monkeypatch):
    model = scrambled(GPT2)
    options = SamplingOptions(max_new_tokens=9, temperature=0.0)
    expected = generate(model, [[1, 2]], options)[0].ids.tolist()
    engine, row = one_row(model, [1, 2], options)
    for step in range(8):
        if step < 4:
            with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
                # At the end of a step that Python runs, or after one that is repeated.
                context.setattr(Transformer, "logits", interrupted)
                context.setattr(KVCache, "commit", interrupted)
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
        assert repeater(compute).tobytes() == expected
    assert repeater.settled
    assert len(calls) == 6 + 2


def test_a_number_that_changes_is_not_repeated(cython):
    x, repeater = array(5, 40), kernels.Repeater()
    for factor in range(8):
        found = repeater(lambda factor=factor: cython.add(x, x, float(factor)))
        np.testing.assert_allclose(found, (1 + factor) * x, rtol=1e-6)
        del found
    assert not repeater.settled


@pytest.mark.parametrize(
    "outside",
    [
        pytest.param(lambda b, x, w: b.linear(x * 2, w)[0], id="made before"),
        pytest.param(lambda b, x, w: b.linear(x, w)[0] * 2, id="made after"),
        pytest.param(lambda b, x, w: b.add(b.linear(x, w)[0] * 2, b.linear(x, w)[0]), id="between"),
        pytest.param(lambda b, x, w: b.linear(x, w)[0][:, ::2].copy(), id="a copy"),
        pytest.param(lambda b, x, w: b.loss_probe(x, w), id="another kernel"),
        pytest.param(lambda b, x, w: b.linear(x.astype("d"), w.astype("d"))[0], id="float64"),
        pytest.param(lambda b, x, w: b.linear(x[:, ::2], w[:, ::2])[0], id="a copy before"),
        pytest.param(lambda b, x, w: b.gather_rows(w, np.array([-1, 2])), id="rows from the end"),
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
        assert np.asarray(repeater(lambda: outside(cython, x, w))).tobytes() == expected
    assert not repeater.settled


def test_memory_is_given_back_and_arrays_are_kept_alive(cython):
    gc.collect()
    kernels.arena_trim()
    used = kernels.arena_state()[0]
    x, w = array(4, 64), [array(64, 64)]
    repeater = kernels.Repeater()
    for _ in range(2):
        repeater(lambda: cython.linear(cython.linear(x, w[0])[0], w[0])[0])
    y = repeater(None)
    expected = y.copy()
    assert repeater.settled
    assert kernels.arena_state()[0] > used
    w.clear()  # what the kernels read is still there
    others = [array(64, 64, seed=i) for i in range(50)]
    np.testing.assert_array_equal(repeater(None), expected)
    del others, repeater
    np.testing.assert_array_equal(y, expected)
    del y
    assert kernels.arena_state()[0] == used


def test_another_part_of_the_result_is_another_result(cython):
    x, repeater = array(4, 8), kernels.Repeater()
    for row in (1, 2, 1, 2):
        found = repeater(lambda row=row: cython.add(x, x)[row])
        np.testing.assert_array_equal(found, 2 * x[row])
        del found
    assert not repeater.settled


def test_no_memory_for_an_array_of_a_recording(cython):
    x, kept, repeater = array(1, 8), [], kernels.Repeater()

    def compute():
        kept.append(cython.add(x, x))
        return kernels.empty(1 << 45)

    for _ in range(3):
        with pytest.raises(MemoryError):
            repeater(compute)
    with pytest.raises(MemoryError):
        kernels.Repeater()(lambda: kernels.empty(1 << 45))
    repeater(lambda: cython.add(x, x, 100.0))
    for y in kept:
        np.testing.assert_array_equal(y, 2 * x)


def test_copies_are_not_kept(cython):
    x, w, repeater = array(2, 500), array(500, 1000)[:, ::2], kernels.Repeater()
    seen, as_they_are = [], kernels.contiguous

    def watched(given):
        copy = as_they_are(given)
        if copy is not None:
            seen.append(weakref.ref(copy))
        return copy

    with pytest.MonkeyPatch.context() as context:
        context.setattr(kernels, "contiguous", watched)
        for _ in range(3):
            repeater(lambda: cython.linear(x, w)[0])
    alive = {id(ref()) for ref in seen if ref() is not None}
    assert alive == {id(x)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_of_a_process_that_records(cython):
    x, repeater = array(4, 8), kernels.Repeater()

    def compute():
        if not children:
            children.append(os.fork())
        return cython.add(x, x)

    children = []
    repeater(compute)
    if children[0] == 0:  # the recording thread's twin: it records nothing, and repeats its own
        own = kernels.Repeater()
        for _ in range(3):
            own(lambda: cython.add(x, x))
        os._exit(0 if own.settled else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0


def test_arrays_of_the_memory_of_a_recording_can_outlive_it(cython):
    x, kept, repeater = array(4, 64), [], kernels.Repeater()

    def compute():
        y = cython.add(x, x)
        kept.append(cython.add(y, y))
        return y

    for _ in range(6):
        repeater(compute)
    assert not repeater.settled  # for a kept array would be overwritten
    del repeater
    for y in kept:
        np.testing.assert_array_equal(y, 4 * x)


def test_a_computation_that_fails_is_not_recorded(cython):
    x, repeater = array(4, 8), kernels.Repeater()

    def fails():
        cython.add(x, x)
        raise ZeroDivisionError

    repeater(lambda: cython.add(x, x))
    with pytest.raises(ZeroDivisionError):
        repeater(fails)
    for _ in range(3):
        np.testing.assert_array_equal(repeater(lambda: cython.add(x, x)), 2 * x)
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
        repeater(compute)
    assert repeater.settled
    expected = [y.copy() for y in others]
    x += 1
    repeater(compute)
    for y, before in zip(others, expected, strict=True):
        np.testing.assert_array_equal(y, before)
