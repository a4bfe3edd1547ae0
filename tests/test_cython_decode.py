"""Attention on a cache: a token has the same bytes however the tokens before it were split."""

import numpy as np
import pytest

import loopos
from loopos.backends.threads import thread_limit

if "cython" not in loopos.available_backends():
    pytest.skip("the compiled kernels are not there", allow_module_level=True)

from loopos._ext import kernels
from loopos.backends.cython_backend import CythonBackend

LENGTH = 333


@pytest.fixture(params=kernels.levels())
def backend(request):
    before = kernels.level()
    chosen = CythonBackend()
    chosen.use_level(request.param)
    yield chosen
    chosen.use_level(before)


def make(heads, kv_heads, d, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((LENGTH, h, d), dtype=np.float32)
               for h in (heads, kv_heads, kv_heads))  # fmt: skip
    return q, k, v


def decode(backend, q, k, v, ends, window):
    """The tokens in parts that end at `ends`, each on the keys of itself and of those before."""
    parts, start = [], 0
    cache = np.full((2, 3, LENGTH + 7, *k.shape[1:]), np.nan, np.float32)
    for end in ends:
        parts.append(
            backend.attention_cached(
                q[start:end],
                k[start:end],
                v[start:end],
                cache[0],
                cache[1],
                np.array([0, end - start], np.int32),
                np.array([1], np.int32),
                np.array([end], np.int32),
                0.3,
                window,
            )
        )
        start = end
    for kept, given in zip(cache, (k, v), strict=True):
        np.testing.assert_array_equal(kept[1, :LENGTH], given)
        kept[1, :LENGTH] = np.nan
    assert np.isnan(cache).all()  # nothing else was written
    return np.concatenate(parts)


SPLITS = {
    "one by one": list(range(1, LENGTH + 1)),
    "a prompt, then one by one": [101, *range(102, LENGTH + 1)],
    "in pieces": [1, 5, 8, 13, 30, 31, 133, 262, 266, 270, LENGTH],
}


@pytest.mark.parametrize("window", [None, 1, 50, 200])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(2, 2, 64), (6, 2, 24), (10, 2, 7)])
def test_prefill_and_decode_give_the_same_bytes(backend, heads, kv_heads, d, window):
    q, k, v = make(heads, kv_heads, d)
    whole = decode(backend, q, k, v, [LENGTH], window)
    for name, ends in SPLITS.items():
        for threads in (1, 2):
            with thread_limit(threads):
                found = decode(backend, q, k, v, ends, window)
            assert found.tobytes() == whole.tobytes(), name
    trained, _ = backend.attention(q, k, v, np.array([0, LENGTH], np.int32), True, 0.3, window)
    if kernels.level() == "amx":  # which sums the sequences of training in an order of its own
        np.testing.assert_allclose(trained, whole, rtol=0, atol=1e-6 * np.abs(whole).max())
    else:
        assert trained.tobytes() == whole.tobytes()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_sequences_share_keys_between_heads_and_change_nothing(backend, threads):
    rng = np.random.default_rng(3)
    lengths = np.array([1, 333, 97, 96, 200, 12, 333], np.int32)
    heads, kv_heads, d = 9, 3, 20
    cache = rng.standard_normal((2, 8, 340, kv_heads, d), dtype=np.float32)
    new = np.array([1, 1, 4, 2, 9, 1, 0])
    offsets = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    slots = rng.permutation(8)[:7].astype(np.int32)
    q, k, v = (rng.standard_normal((new.sum(), h, d), dtype=np.float32)
               for h in (heads, kv_heads, kv_heads))  # fmt: skip
    kept = cache.copy()
    with thread_limit(threads):
        together = backend.attention_cached(q, k, v, *kept, offsets, slots, lengths, 0.2)
    for b in range(7):
        part = slice(offsets[b], offsets[b + 1])
        alone = backend.attention_cached(q[part], k[part], v[part], *cache,
                                         np.array([0, new[b]], np.int32),
                                         slots[b : b + 1], lengths[b : b + 1], 0.2)  # fmt: skip
        assert alone.tobytes() == together[part].tobytes()
    assert kept.tobytes() == cache.tobytes()
