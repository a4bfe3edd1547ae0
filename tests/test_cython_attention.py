"""Attention and rotary positions of the compiled kernels against the float64 reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopos import backends
from loopos.backends.numpy_backend import NumpyBackend
from loopos.backends.threads import thread_limit

pytestmark = pytest.mark.skipif(
    "cython" not in backends.available_backends(), reason="the kernels are not built"
)

REFERENCE = NumpyBackend()
TOLERANCE = 2e-5


@pytest.fixture
def backend():
    with backends.use_backend("cython") as chosen:
        level = chosen.describe()["isa"]
        yield chosen
        chosen.use_level(level)


def make(lengths, heads, kv_heads, d, seed=0):
    """Return dy, q, k, v and offsets."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    shapes = [(offsets[-1], h, d) for h in (heads, heads, kv_heads, kv_heads)]
    return [rng.standard_normal(s, dtype=np.float32) for s in shapes], offsets


def run(backend, arrays, offsets, **options):
    """Return y, lse, dq, dk, dv."""
    dy, q, k, v = arrays
    options = {"causal": True, "scale": q.shape[2] ** -0.5} | options
    y, lse = backend.attention(q, k, v, offsets, **options)
    return [y, lse, *backend.attention_backward(dy, q, k, v, y, lse, offsets, **options)]


def compare(found, expected):
    for name, value, reference in zip(
        ("y", "lse", "dq", "dk", "dv"), found, expected, strict=False
    ):
        assert value.shape == reference.shape
        assert value.dtype == np.float32
        if value.size:
            error = np.abs(value - reference).max() / max(1.0, np.abs(reference).max())
            assert error <= TOLERANCE, f"{name}: {error:.3g}"


def check(backend, lengths, heads, kv_heads, d, **options):
    arrays, offsets = make(lengths, heads, kv_heads, d)
    exact = [a.astype(np.float64) for a in arrays]
    compare(run(backend, arrays, offsets, **options), run(REFERENCE, exact, offsets, **options))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("d", [1, 5, 16, 48, 64, 80, 128])
@pytest.mark.parametrize("length", [1, 7, 15, 33, 130, 257])
def test_values(backend, length, d, heads, causal):
    check(backend, [length], *heads, d, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 2, 17, 64, 100, 300, 10**12])
@pytest.mark.parametrize("lengths", [[1], [130, 0, 31], [450]])
def test_windows(backend, lengths, window, causal):
    check(backend, lengths, 4, 2, 24, causal=causal, window=window)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [0, 3, 0, 0, 40, 1, 0]])
def test_empty_sequences(backend, lengths):
    check(backend, lengths, 2, 1, 8)


@pytest.mark.parametrize("d", [200, 256, 300])
def test_wide_heads_and_other_scales(backend, d):
    check(backend, [70, 33], 2, 1, d, scale=0.3 / d**0.5)
    check(backend, [20], 2, 1, d, scale=-1.0 / d**0.5)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_what_the_reference_keeps(backend, rate, window):
    lengths = [140, 5, 0, 33]
    samples = np.array([7, 0, 2**31 - 1, 3])
    check(
        backend, lengths, 4, 2, 16,
        dropout_rate=rate, key=2**64 - 59, sample_ids=samples, window=window,
    )  # fmt: skip
    check(backend, lengths, 4, 2, 16, dropout_rate=rate, key=5, causal=False)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    d=st.integers(1, 70),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 320),
    rate=st.sampled_from([0.0, 0.0, 0.2]),
)
def test_any_shape(lengths, kv_heads, group, d, causal, window, rate):
    with backends.use_backend("cython") as backend:
        check(
            backend, lengths, kv_heads * group, kv_heads, d,
            causal=causal, window=window, dropout_rate=rate,
        )  # fmt: skip


def test_every_instruction_set(backend):
    for level in backend.levels():
        backend.use_level(level)
        for d in (3, 16, 80, 130):
            for causal in (True, False):
                check(backend, [1, 130, 33, 0, 250], 4, 2, d, causal=causal)
        check(backend, [300], 2, 2, 32, window=40)
        check(backend, [700, 65], 2, 1, 64)
        check(backend, [450], 2, 2, 20, causal=False, window=90)
        check(backend, [70], 2, 2, 32, dropout_rate=0.3, key=1)


@pytest.mark.parametrize("options", [{}, {"causal": False, "window": 50}, {"dropout_rate": 0.2}])
def test_threads_and_companions_do_not_matter(backend, options):
    lengths = [33, 430, 0, 1, 129, 64]
    arrays, offsets = make(lengths, 6, 2, 40)
    samples = np.arange(len(lengths))
    with thread_limit(1):
        expected = run(backend, arrays, offsets, sample_ids=samples, **options)
    for count in (2, 5, 16):
        with thread_limit(count):
            found = run(backend, arrays, offsets, sample_ids=samples, **options)
        for value, reference in zip(found, expected, strict=True):
            np.testing.assert_array_equal(value, reference)
    for b, length in enumerate(lengths):
        rows = slice(offsets[b], offsets[b + 1])
        alone = run(
            backend, [a[rows] for a in arrays], np.array([0, length], np.int32),
            sample_ids=samples[b : b + 1], **options,
        )  # fmt: skip
        for value, reference in zip(alone, expected, strict=True):
            np.testing.assert_array_equal(value, reference[rows])


def test_a_query_does_not_depend_on_those_after_it(backend):
    (_, q, k, v), offsets = make([400], 2, 1, 40)
    for level in backend.levels():
        backend.use_level(level)
        y, lse = backend.attention(q, k, v, offsets, True, 0.2)
        for length in (65, 150, 290):
            some = np.array([0, length], np.int32)
            first, sums = backend.attention(q[:length], k[:length], v[:length], some, True, 0.2)
            np.testing.assert_array_equal(first, y[:length])
            np.testing.assert_array_equal(sums, lse[:length])


def test_every_instruction_set_has_the_precision_of_float32(backend):
    arrays, offsets = make([500, 100], 2, 2, 64)
    exact = run(REFERENCE, [a.astype(np.float64) for a in arrays], offsets)
    errors = {}
    for level in backend.levels():
        backend.use_level(level)
        errors[level] = [
            np.sqrt(np.mean((value - reference) ** 2) / np.mean(reference**2))
            for value, reference in zip(run(backend, arrays, offsets), exact, strict=True)
        ]
    for found in errors.values():
        assert max(found) <= 1e-6
    if "amx" in errors:
        assert all(a <= 1.2 * b for a, b in zip(errors["amx"], errors["v4"], strict=True))


@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38, 1e-30])
@pytest.mark.parametrize("name", ["dy", "q", "k", "v"])
def test_what_amx_cannot_multiply_is_as_without_it(backend, name, value):
    if backend.levels()[0] != "amx":
        pytest.skip("without AMX")
    (dy, q, k, v), offsets = make([130, 70], 2, 1, 40)
    arrays = {"dy": dy, "q": q, "k": k, "v": v}
    if value == 1e-30:  # all that comes of it is too small
        arrays[name][:130] *= np.float32(value)
    else:
        arrays[name][100, 0, 7] = value
    found = {}
    for level in ("amx", "v4"):
        backend.use_level(level)
        with np.errstate(all="ignore"):
            y, lse = backend.attention(q, k, v, offsets, True, 0.2)
            found[level] = [y, *backend.attention_backward(dy, q, k, v, y, lse, offsets, True, 0.2)]
    for a, b in zip(found["amx"], found["v4"], strict=True):
        assert np.isfinite(a[130:]).all()
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        scale = np.abs(b[:130], where=np.isfinite(b[:130]), out=np.zeros_like(b[:130])).max()
        assert np.isfinite(scale)
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(a[:130], b[:130], rtol=1e-4, atol=2e-6 * scale)


@pytest.mark.parametrize("length", [40, 100])
def test_what_is_not_a_number_stays_so_and_does_not_spread(backend, length):
    (dy, q, k, v), offsets = make([length, length], 2, 1, 20)
    q[25, 0, 3] = -1  # times minus infinity: the largest score
    clean, _ = backend.attention(q, k, v, offsets, True, 0.2)
    for array, value in ((q, np.nan), (k, np.nan), (v, np.nan), (q, np.inf), (k, -np.inf)):
        kept, array[25, 0, 3] = array[25, 0, 3], value
        y, lse = backend.attention(q, k, v, offsets, True, 0.2)
        with np.errstate(invalid="ignore"):
            exact = [a.astype(np.float64) for a in (dy, q, k, v)]
            expected, _, *exact_gradients = run(REFERENCE, exact, offsets, scale=0.2)
        assert np.isnan(y[25]).any()
        assert np.isnan(expected[25]).any()
        np.testing.assert_array_equal(np.isnan(y[26:length]), np.isnan(expected[26:length]))
        np.testing.assert_array_equal(y[length:], clean[length:])
        gradients = backend.attention_backward(dy, q, k, v, y, lse, offsets, True, 0.2)
        for gradient, reference in zip(gradients, exact_gradients, strict=True):
            assert np.isnan(gradient).any() == np.isnan(reference).any()
            assert np.isfinite(gradient[length:]).all()
        array[25, 0, 3] = kept


def test_large_scores_do_not_overflow(backend):
    (dy, q, k, v), offsets = make([50], 2, 2, 16)
    check_arrays = [dy, q * 1000, k * 1000, v]
    found = run(backend, check_arrays, offsets)
    assert all(np.isfinite(a).all() for a in found)
    exact = [a.astype(np.float64) for a in check_arrays]
    np.testing.assert_allclose(found[0], run(REFERENCE, exact, offsets)[0], atol=2e-2)


# -- cached ----------------------------------------------------------------------------------------


def make_cached(new, past, heads, kv_heads, d):
    rng = np.random.default_rng(1)
    lengths = np.array([a + b for a, b in zip(new, past, strict=True)], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    slots = rng.permutation(len(new) + 2)[: len(new)].astype(np.int32)
    q, k, v = (rng.standard_normal((offsets[-1], h, d), dtype=np.float32)
               for h in (heads, kv_heads, kv_heads))  # fmt: skip
    shape = (2, len(new) + 2, int(lengths.max(initial=0)) + 3, kv_heads, d)
    k_cache, v_cache = rng.standard_normal(shape, dtype=np.float32)
    return q, k, v, k_cache, v_cache, offsets, slots, lengths, d**-0.5


@pytest.mark.parametrize("window", [None, 1, 20, 200])
@pytest.mark.parametrize("d", [5, 64, 80])
@pytest.mark.parametrize("new", [(1, 1, 1, 1), (3, 1, 0, 50), (200, 2, 17, 1)])
def test_cached_values(backend, new, d, window):
    past = (130, 0, 9, 300)
    for level in backend.levels():
        backend.use_level(level)
        *arrays, offsets, slots, lengths, scale = make_cached(new, past, 6, 2, d)
        exact = [a.astype(np.float64) for a in arrays]
        rest = (offsets, slots, lengths, scale, window)
        found = backend.attention_cached(*arrays, *rest)
        compare([found], [REFERENCE.attention_cached(*exact, *rest)])
        for kept, reference in zip(arrays[3:], exact[3:], strict=True):
            np.testing.assert_array_equal(kept, reference)


def test_cached_does_not_depend_on_threads_or_companions(backend):
    new, past = (3, 1, 140, 1), (130, 0, 9, 300)
    q, k, v, *caches, offsets, slots, lengths, scale = make_cached(new, past, 4, 2, 24)
    with thread_limit(1):
        expected = backend.attention_cached(q, k, v, *caches, offsets, slots, lengths, scale)
    with thread_limit(5):
        found = backend.attention_cached(q, k, v, *caches, offsets, slots, lengths, scale)
    np.testing.assert_array_equal(found, expected)
    for b, count in enumerate(new):
        rows, one = slice(offsets[b], offsets[b + 1]), slice(b, b + 1)
        ends = np.array([0, count], np.int32)
        alone = backend.attention_cached(
            q[rows], k[rows], v[rows], *caches, ends, slots[one], lengths[one], scale
        )
        np.testing.assert_array_equal(alone, expected[rows])


# -- rotary positions ------------------------------------------------------------------------------


@pytest.mark.parametrize("rotated", [2, 6, 32, 64, 66])
def test_rope_there_and_back(backend, rotated):
    rng = np.random.default_rng(2)
    q = rng.standard_normal((67, 4, 66), dtype=np.float32)
    k = rng.standard_normal((67, 2, 66), dtype=np.float32)
    inv_freq = (10000.0 ** (-np.arange(rotated // 2) / rotated)).astype(np.float32)
    for positions in (np.arange(67) % 20, rng.integers(0, 10**6, 67), np.arange(67) - 30):
        for level in backend.levels():
            backend.use_level(level)
            found = backend.rope(q, k, positions.astype(np.int32), inv_freq)
            back = backend.rope_backward(*found, positions.astype(np.int32), inv_freq)
            expected = REFERENCE.rope(
                q.astype(np.float64), k.astype(np.float64), positions, inv_freq
            )
            for value, reference, again, start in zip(found, expected, back, (q, k), strict=True):
                np.testing.assert_allclose(value, reference, rtol=0, atol=1e-6)
                np.testing.assert_allclose(again, start, rtol=0, atol=1e-6)
                np.testing.assert_array_equal(value[..., rotated:], start[..., rotated:])


def test_rope_of_nothing(backend):
    q, k = np.zeros((0, 2, 4), np.float32), np.zeros((0, 1, 4), np.float32)
    found = backend.rope(q, k, np.zeros(0, np.int32), np.ones(2))
    assert [a.shape for a in found] == [(0, 2, 4), (0, 1, 4)]


# -- what the door turns away ----------------------------------------------------------------------


def wrong(array, *shape):
    return np.zeros(shape, array.dtype)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offsets": np.array([0, 5])}, ValueError, "offsets: expected to begin with 0 and end"),
        ({"offsets": np.array([1, 6])}, ValueError, "offsets: expected to begin with 0"),
        ({"offsets": np.array([0, 4, 3, 6])}, ValueError, "offsets: fall from 4 to 3 at index 2"),
        ({"offsets": np.zeros(0, np.int32)}, ValueError, "offsets: expected to begin"),
        ({"offsets": np.zeros((1, 2), np.int32)}, ValueError, r"offsets: expected shape \[any\]"),
        ({"q": np.zeros((6, 4), np.float32)}, ValueError, r"q: expected shape \[any, any, any\]"),
        ({"q": np.zeros((6, 3, 8), np.float32)}, ValueError, "k: 2 heads do not divide the 3"),
        ({"k": np.zeros((6, 0, 8), np.float32)}, ValueError, "k: 0 heads do not divide"),
        ({"k": np.zeros((5, 2, 8), np.float32)}, ValueError, r"k: expected shape \[6, any, 8\]"),
        ({"v": np.zeros((6, 1, 8), np.float32)}, ValueError, r"v: expected shape \[6, 2, 8\]"),
        ({"v": np.zeros((6, 2, 8), np.int32)}, TypeError, "v: expected an array of float32"),
        ({"window": 0}, ValueError, "window: expected at least 1, found 0"),
        ({"dropout_rate": 1.0}, ValueError, "dropout_rate: expected at least 0"),
        ({"sample_ids": np.arange(3)}, ValueError, r"sample_ids: expected shape \[2\]"),
    ],
)
def test_bad_arguments(backend, change, error, message):
    (dy, q, k, v), offsets = make([4, 2], 4, 2, 8)
    arguments = {"q": q, "k": k, "v": v, "offsets": offsets, "causal": True, "scale": 1.0}
    y, lse = backend.attention(**arguments)
    with pytest.raises(error, match=message):
        backend.attention(**arguments | change)
    with pytest.raises(error, match=message):
        backend.attention_backward(dy=dy, y=y, lse=lse, **arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": np.array([0, 4])}, "slots: 4 at index 1, the cache has 4 slots"),
        ({"slots": np.array([-1, 0])}, "slots: -1 at index 0"),
        ({"slots": np.array([0])}, r"slots: expected shape \[2\]"),
        ({"lengths": np.array([4, 99])}, "lengths: 99 at index 1, expected from 1"),
        ({"lengths": np.array([1, 4])}, "lengths: 1 at index 0, expected from 2"),
        ({"offsets": np.array([0, 2, 9])}, "offsets: expected to begin with 0 and end with 3"),
        ({"v_cache": np.zeros((4, 10, 2, 7), np.float32)}, r"v_cache: expected shape \[4, 10, 2"),
        ({"k_cache": np.zeros((10, 2, 8), np.float32)}, r"k_cache: expected shape \[any, any"),
        ({"k_cache": np.zeros((4, 20, 2, 8), np.float32)[:, ::2]}, "k_cache: expected a C-contig"),
        ({"v_cache": np.broadcast_to(np.zeros((), np.float32), (4, 10, 2, 8))}, "v_cache: "),
        ({"k": np.zeros((3, 3, 8), np.float32)}, "k: 3 heads do not divide the 4"),
        ({"v": np.zeros((2, 2, 8), np.float32)}, r"v: expected shape \[3, 2, 8\]"),
        ({"window": -3}, "window: expected at least 1"),
    ],
)
def test_bad_arguments_of_cached(backend, change, message):
    q, k, v, _, _, *rest = make_cached((2, 1), (3, 5), 4, 2, 8)
    k_cache, v_cache = np.zeros((2, 4, 10, 2, 8), np.float32)
    names = ("q", "k", "v", "k_cache", "v_cache", "offsets", "slots", "lengths", "scale")
    values = (q, k, v, k_cache, v_cache, *rest)
    arguments = dict(zip(names, values, strict=True))
    with pytest.raises(ValueError, match=message):
        backend.attention_cached(**arguments | change)
    assert not k_cache.any()
    assert not v_cache.any()


def test_bad_arguments_of_rope(backend):
    q, k = np.zeros((3, 2, 8), np.float32), np.zeros((3, 1, 8), np.float32)
    positions, inv_freq = np.arange(3), np.ones(4)
    with pytest.raises(ValueError, match=r"positions: expected shape \[3\]"):
        backend.rope(q, k, positions[:2], inv_freq)
    with pytest.raises(ValueError, match=r"inv_freq: expected shape \[at most 4\]"):
        backend.rope(q, k, positions, np.ones(5))
    with pytest.raises(ValueError, match=r"k: expected shape \[3, any, 8\]"):
        backend.rope(q, k[:2], positions, inv_freq)
