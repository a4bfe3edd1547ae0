"""The cache of keys and values: the same numbers as without, whoever comes and goes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopos.autograd import no_grad
from loopos.backends import available_backends, use_backend
from loopos.data.batch import Batch
from loopos.errors import ConfigError, DataError, LooposError
from loopos.generation import KVCache
from loopos.generation.kv_cache import BLOCK_TOKENS
from loopos.models import TransformerConfig
from loopos.models.lora import LoraConfig, add_lora, merge_lora
from loopos.models.rope import RopeScaling
from loopos.models.transformer import Transformer
from loopos.ops import DropoutKeys

GPT2 = TransformerConfig(
    d_model=12, num_heads=3, num_layers=2, d_ff=20, vocab_size=31, max_seq_len=96
)
LLAMA = TransformerConfig(
    d_model=14, num_heads=4, num_layers=2, d_ff=18, vocab_size=31, max_seq_len=96,
    num_kv_heads=2, head_dim=6, norm="rms_norm", activation="swiglu", positions="rope",
    attention_bias=False, mlp_bias=False,
)  # fmt: skip
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_seq_len=64)
CAUSAL = {
    "gpt2": GPT2,
    "gpt2-relu-untied": replace(GPT2, activation="relu", tied=False),
    "gpt2-post-norm": replace(GPT2, norm_placement="post", embedding_norm=True),
    "no-positions": replace(GPT2, positions="none"),
    "llama": LLAMA,
    "llama-llama3": replace(LLAMA, rope_scaling=LLAMA3, mlp_bias=True, tied=False),
    "qwen2-window": replace(LLAMA, attention_bias=True, attention_output_bias=False, window=3),
    "qwen3": replace(LLAMA, qk_norm=True, head_dim=10),
    "mistral": replace(LLAMA, window=20, num_kv_heads=1),
}


def scrambled(config, dtype=np.float32, seed=5):
    """A model whose every parameter matters."""
    model = Transformer(config, seed=seed, dtype=dtype)
    rng = np.random.default_rng(seed)
    for parameter in model.parameters().values():
        parameter.data += (0.3 * rng.standard_normal(parameter.shape)).astype(dtype)
    return model


def adapted(config, dtype=np.float32):
    model = add_lora(scrambled(config, dtype), LoraConfig(rank=3, alpha=6.0))
    rng = np.random.default_rng(1)
    for name, parameter in model.parameters().items():
        if name.endswith("lora_b"):
            parameter.data += rng.standard_normal(parameter.shape).astype(dtype)
    return model


def run(model, cache, slots, tokens):
    """One pass: the logits of the new tokens."""
    cache.begin(np.array(slots, np.int32), np.array([len(t) for t in tokens], np.int32))
    with no_grad():
        hidden = model.get_hidden_states(Batch.from_sequences(tokens), cache=cache)
        logits = model.logits(hidden).data
    cache.commit()
    return np.split(logits, np.cumsum([len(t) for t in tokens])[:-1])


def whole(model, tokens):
    with no_grad():
        return model.forward(Batch.from_sequences([tokens])).data


def assert_close(found, expected, dtype):
    limit = 1e-4 if dtype == np.float32 else 1e-9
    assert np.abs(found - expected).max() <= limit * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CAUSAL)
def test_logits_with_the_cache_are_those_without(name, dtype, backend):
    model = scrambled(CAUSAL[name], dtype)
    tokens = np.random.default_rng(0).integers(0, 31, 70)
    with use_backend(backend):
        expected = whole(model, tokens)
        for cuts in ([], [69], [1, 2, 3, 5, 40, 41], [16, 32], [33], range(1, 70)):
            cache = KVCache(model.config, 1, 80, dtype)
            slot = cache.allocate()
            parts = [run(model, cache, [slot], [t])[0] for t in np.split(tokens, list(cuts))]
            assert_close(np.concatenate(parts), expected, dtype)
            assert cache.lengths[slot] == 70


@given(st.data())
def test_any_split_of_rows_that_come_and_go(data):
    name = data.draw(st.sampled_from(sorted(CAUSAL)))
    model = scrambled(CAUSAL[name], np.float64)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    cache = KVCache(model.config, 3, 8, np.float64)
    rows = {}
    for _ in range(data.draw(st.integers(3, 12))):
        if cache.free and data.draw(st.booleans()):
            tokens = rng.integers(0, 31, data.draw(st.integers(1, 50)))
            rows[cache.allocate()] = (tokens, whole(model, tokens))
        elif rows and data.draw(st.booleans()):
            slot = data.draw(st.sampled_from(sorted(rows)))
            del rows[slot]
            cache.release(slot)
        now = [s for s, (tokens, _) in rows.items() if cache.lengths[s] < tokens.size]
        if not now:
            continue
        starts = [int(cache.lengths[s]) for s in now]
        counts = [
            data.draw(st.integers(1, rows[s][0].size - a)) for s, a in zip(now, starts, strict=True)
        ]
        new = [rows[s][0][a : a + n] for s, a, n in zip(now, starts, counts, strict=True)]
        for s, a, n, found in zip(now, starts, counts, run(model, cache, now, new), strict=True):
            assert_close(found, rows[s][1][a : a + n], np.float64)


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_work_with_the_cache(merged):
    model = adapted(LLAMA, np.float64)
    if merged:
        merge_lora(model)
    tokens = np.arange(25) % 31
    cache = KVCache(LLAMA, 1, 32, np.float64)
    parts = [run(model, cache, [cache.allocate()], [tokens[:20]])[0]]
    parts += [run(model, cache, [0], [[t]])[0] for t in tokens[20:]]
    assert_close(np.concatenate(parts), whole(model, tokens), np.float64)


def test_a_model_that_recomputes_its_layers_can_use_a_cache():
    model, tokens = scrambled(GPT2, np.float64), np.arange(20)
    model.gradient_checkpointing = True
    cache = KVCache(GPT2, 1, 32, np.float64)
    (found,) = run(model, cache, [cache.allocate()], [tokens])
    assert_close(found, whole(model, tokens), np.float64)


def test_a_copied_prefix_is_that_of_the_other_slot():
    model, tokens = scrambled(GPT2), np.arange(30)
    cache = KVCache(GPT2, 3, 40)
    a, b = cache.allocate(), cache.allocate()
    run(model, cache, [a], [tokens])
    cache.copy_prefix(a, b, 20)
    other = np.append(tokens[:20], [3, 3, 3])
    (found,) = run(model, cache, [b], [other[20:]])
    assert_close(found, whole(model, other)[20:], np.float32)


@pytest.mark.parametrize("backend", available_backends())
def test_tokens_have_the_same_bytes_however_they_are_computed(backend):
    """In parts, one after the other, all at once, with neighbours, behind a copied prefix."""
    model, tokens = scrambled(LLAMA), np.random.default_rng(3).integers(0, 31, 75)
    with use_backend(backend):
        cache = KVCache(LLAMA, 4, 80)
        slots = [cache.allocate() for _ in range(4)]
        (together,) = run(model, cache, slots[:1], [tokens])
        one = [run(model, cache, slots[1:2], [p])[0]
               for p in np.split(tokens, [1, 2, 3, 19, 20, 40, 58])]  # fmt: skip
        beside = run(model, cache, slots[2:], [tokens[:7], tokens])[1]
        cache.copy_prefix(slots[0], slots[2], 45)
        (behind,) = run(model, cache, slots[2:3], [tokens[45:]])
    for found, expected in (
        (np.concatenate(one), together), (beside, together), (behind, together[45:])
    ):  # fmt: skip
        if backend == "cython":
            np.testing.assert_array_equal(found, expected)
        else:
            assert_close(found, expected, np.float32)


def test_it_grows_by_blocks_and_keeps_what_it_holds():
    model, tokens = scrambled(GPT2, np.float64), np.arange(90) % 31
    cache = KVCache(GPT2, 2, 1, np.float64)
    assert cache.capacity == BLOCK_TOKENS
    assert cache.nbytes == KVCache.bytes_for(GPT2, 2, 1, np.float64) == 2 * 2 * 2 * 64 * 12 * 8
    cache.allocate()
    slot = cache.allocate()
    run(model, cache, [slot], [tokens[:60]])
    parts = [run(model, cache, [slot], [[t]])[0] for t in tokens[60:]]
    assert cache.capacity == 2 * BLOCK_TOKENS
    assert_close(np.concatenate(parts), whole(model, tokens)[60:], np.float64)


def test_a_pass_that_was_interrupted_is_begun_again():
    model, tokens = scrambled(GPT2, np.float64), np.arange(20)
    cache = KVCache(GPT2, 1, 32, np.float64)
    slot = cache.allocate()
    run(model, cache, [slot], [tokens[:8]])
    cache.begin(np.array([slot], np.int32), np.array([12], np.int32))
    with no_grad():
        model.get_hidden_states(Batch.from_sequences([tokens[:12]]), cache=cache)  # wrong tokens
    assert cache.lengths[slot] == 8
    (found,) = run(model, cache, [slot], [tokens[8:]])
    assert_close(found, whole(model, tokens)[8:], np.float64)


def test_slots_are_given_and_given_back():
    cache = KVCache(GPT2, 2, 8)
    a, b = cache.allocate(), cache.allocate()
    assert {a, b} == {0, 1}
    with pytest.raises(LooposError, match="all 2 slots"):
        cache.allocate()
    cache.release(a)
    with pytest.raises(LooposError, match="not in use"):
        cache.release(a)
    with pytest.raises(LooposError, match=f"slot {b} of the cache is in use"):
        cache.allocate(b)
    assert cache.free == (a,)
    assert cache.allocate(a) == a


def test_wrong_uses_are_refused():
    model, batch = scrambled(GPT2), Batch.from_sequences([[1, 2]])
    with pytest.raises(ConfigError, match="slots: expected a whole number of at least 1, found 0"):
        KVCache(GPT2, 0, 8)
    cache = KVCache(GPT2, 1, 8)
    with no_grad(), pytest.raises(LooposError, match="begin"):
        model.get_hidden_states(batch, cache=cache)
    cache.begin(np.array([cache.allocate()], np.int32), np.array([3], np.int32))
    with no_grad(), pytest.raises(LooposError, match="expects 3 new tokens, found 2"):
        model.get_hidden_states(batch, cache=cache)
    with pytest.raises(LooposError, match="no_grad"):
        model.get_hidden_states(batch, cache=cache)
    with no_grad(), pytest.raises(LooposError, match="no dropout"):
        model.get_hidden_states(batch, DropoutKeys(0, 0), cache=cache)
    both = scrambled(replace(GPT2, causal=False, lm_head=True))
    with no_grad(), pytest.raises(ConfigError, match="bidirectional"):
        both.get_hidden_states(batch, cache=cache)
    cache.begin(np.array([0], np.int32), np.array([97], np.int32))
    with no_grad(), pytest.raises(DataError, match="a sequence of 97 tokens is longer"):
        model.get_hidden_states(Batch.from_sequences([[1] * 97]), cache=cache)
