"""What the Cython backend does element by element and row by row, against the float64 reference."""

import numpy as np
import pytest

import loopos
from loopos.backends.numpy_backend import ACTIVATIONS, AdamwTensor, NumpyBackend
from loopos.backends.random_bits import keep_mask
from loopos.backends.threads import thread_limit

if "cython" not in loopos.available_backends():
    pytest.skip("the compiled kernels are not there", allow_module_level=True)

from loopos._ext import kernels
from loopos.backends.cython_backend import CythonBackend

ORACLE = NumpyBackend()
#: Rows and widths: one lane, odd tails, several tasks.
SIZES = [(1, 1), (3, 5), (33, 17), (70, 384), (130, 771), (0, 8)]


@pytest.fixture(params=kernels.levels())
def backend(request):
    before = kernels.level()
    chosen = CythonBackend()
    chosen.use_level(request.param)
    yield chosen
    chosen.use_level(before)


def array(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def close(found, expected, tolerance=2e-6, scale=1.0):
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    scale = max(scale, np.abs(expected).max(initial=0))
    assert np.abs(found - expected).max(initial=0) <= tolerance * scale


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_activations(backend, kind, size):
    x, dy = 3 * array(*size), array(*size, seed=1)
    wide = x.astype(np.float64)
    close(backend.activation(x, kind), ORACLE.activation(wide, kind))
    expected = ORACLE.activation_backward(dy.astype(np.float64), wide, kind)
    close(backend.activation_backward(dy, x, kind), expected)


@pytest.mark.parametrize("size", SIZES)
def test_swiglu(backend, size):
    gate, up, dy = 3 * array(*size), array(*size, seed=1), array(*size, seed=2)
    wide = [a.astype(np.float64) for a in (dy, gate, up)]
    close(backend.swiglu(gate, up), ORACLE.swiglu(*wide[1:]))
    pairs = zip(backend.swiglu_backward(dy, gate, up), ORACLE.swiglu_backward(*wide), strict=True)
    for found, expected in pairs:
        close(found, expected)


@pytest.mark.parametrize("size", [s for s in SIZES if s[0]])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norms(backend, size, with_residual):
    x, dy, ds = array(*size) + 2, array(*size, seed=1), array(*size, seed=2)
    g, b = array(size[1], seed=3), array(size[1], seed=4)
    residual = array(*size, seed=5) if with_residual else None
    wide = [None if a is None else a.astype(np.float64) for a in (x, g, b, residual, dy, ds)]
    y, s, mean, rstd = backend.layer_norm(x, g, b, 1e-5, residual)
    exact = ORACLE.layer_norm(*wide[:3], 1e-5, wide[3])
    assert (s is x) == (residual is None)
    for found, expected in zip((y, s, mean, rstd), exact, strict=True):
        close(found, expected, 5e-6)
    dg, db = np.ones_like(g), np.ones_like(b)
    wide_dg, wide_db = np.ones(size[1]), np.ones(size[1])
    dx = backend.layer_norm_backward(dy, s, g, mean, rstd, ds, dg=dg, db=db)
    expected = ORACLE.layer_norm_backward(
        wide[4], exact[1], wide[1], *exact[2:], wide[5], dg=wide_dg, db=wide_db
    )
    close(dx, expected, 1e-6, scale=rstd.max())  # what is subtracted is multiplied by rstd
    close(dg, wide_dg, 1e-5)
    close(db, wide_db, 1e-5)
    y, s, rstd = backend.rms_norm(x, g, 1e-6, residual)
    exact = ORACLE.rms_norm(wide[0], wide[1], 1e-6, wide[3])
    for found, expected in zip((y, s, rstd), exact, strict=True):
        close(found, expected, 5e-6)
    dg, wide_dg = np.zeros_like(g), np.zeros(size[1])
    dx = backend.rms_norm_backward(dy, s, g, rstd, None, dg=dg)
    close(dx, ORACLE.rms_norm_backward(wide[4], exact[1], wide[1], exact[2], dg=wide_dg), 1e-5)
    close(dg, wide_dg, 1e-5)
    assert backend.rms_norm_backward(dy, s, g, rstd, need_dx=False) is None


def test_rows_of_a_table(backend):
    table, dy = array(50, 300), array(200, 300, seed=1)
    ids = np.random.default_rng(2).integers(0, 50, 200).astype(np.int32)
    np.testing.assert_array_equal(backend.embedding(ids, table), table[ids])
    np.testing.assert_array_equal(backend.gather_rows(table, ids - 50), table[ids - 50])
    close(
        backend.gather_rows_backward(dy, ids, 50),
        ORACLE.gather_rows_backward(dy.astype(np.float64), ids, 50),
    )
    heads = array(20, 3, 7)
    np.testing.assert_array_equal(backend.gather_rows(heads, ids % 20), heads[ids % 20])
    with pytest.raises(IndexError, match="ids: 50 is outside of 50 rows"):
        backend.embedding(np.array([50], np.int32), table)
    with pytest.raises(IndexError, match="outside of 50 rows"):
        backend.gather_rows(table, np.array([-51]))
    with pytest.raises(TypeError, match="expected an array of integers, found float32"):
        backend.gather_rows(table, np.array([1.0], np.float32))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_draws_the_bits_of_the_reference(backend, rate):
    x, lengths, samples = array(90, 33), [40, 0, 50], np.array([7, 1, 3])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])
    keep = keep_mask(
        0xFEDCBA9876543210, np.repeat(samples, lengths), positions, np.arange(33), rate, np.float32
    )
    found = backend.dropout(x, rate, 0xFEDCBA9876543210, offsets, samples)
    np.testing.assert_array_equal(found, x * keep)


def updates(dtype, subnormal=False):
    """Three tensors: smaller than a lane, empty, and several tasks."""
    rng = np.random.default_rng(3)
    tensors = []
    for i, n in enumerate((3, 0, 40_001)):
        p, g, m = (rng.normal(size=n).astype(np.float32).astype(dtype) for _ in range(3))
        v = rng.uniform(0, 1, n).astype(np.float32).astype(dtype)
        if subnormal:
            g, m, v = g * dtype(1e-41), m * dtype(1e-41), v * dtype(1e-41)
        tensors.append(AdamwTensor(p, g, m, v, 1e-2 / (i + 1), 0.1 * i, 2 * i + 1))
    return tensors


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("subnormal", [False, True])
def test_adamw_of_many_tensors(backend, decoupled, subnormal):
    found, expected = updates(np.float32, subnormal), updates(np.float64, subnormal)
    backend.adamw_many(found, 0.9, 0.999, 1e-8, 0.5, decoupled)
    ORACLE.adamw_many(expected, 0.9, 0.999, 1e-8, 0.5, decoupled)
    for one, exact in zip(found, expected, strict=True):
        for a, b in zip(one[:4], exact[:4], strict=True):
            np.testing.assert_allclose(a, b, rtol=3e-6, atol=3e-45 if subnormal else 1e-7)


def test_sum_of_squares(backend):
    arrays = [array(3), array(0), array(200, 300), array(16_385, seed=2)]
    exact = sum(float(np.sum(a.astype(np.float64) ** 2)) for a in arrays)
    assert backend.sum_squares(arrays) == pytest.approx(exact, rel=1e-6)
    assert backend.sum_squares([]) == 0


def test_a_gradient_may_be_strided(backend):
    p, m, v = (np.ones((4, 6), np.float32) for _ in range(3))
    wide = array(4, 12)
    found = [AdamwTensor(a.copy(), wide[:, ::2], m.copy(), v.copy(), 0.1, 0.01, 1) for a in (p, p)]
    backend.adamw_many(found[:1], 0.9, 0.999, 1e-8)
    ORACLE.adamw_many(found[1:], 0.9, 0.999, 1e-8)
    np.testing.assert_allclose(found[0].p, found[1].p, rtol=1e-6)


def everything(backend):
    """The bytes of every op on inputs that make several tasks."""
    x, dy = array(700, 130), array(700, 130, seed=1)
    g, b = array(130, seed=3), array(130, seed=4)
    ids = np.random.default_rng(2).integers(0, 50, 700).astype(np.int32)
    offsets, samples = np.array([0, 300, 700], np.int32), np.array([1, 2])
    y, s, mean, rstd = backend.layer_norm(x, g, b, 1e-5, dy)
    dg, db, total = np.zeros_like(g), np.zeros_like(b), np.zeros_like(b)
    dx = backend.layer_norm_backward(dy, s, g, mean, rstd, dg=dg, db=db)
    table = array(50, 130, seed=6)
    backend.embedding_backward(dy, ids, table)
    kernels.column_sums(x, total, loopos.get_num_threads())
    tensors = updates(np.float32)
    backend.adamw_many(tensors, 0.9, 0.999, 1e-8)
    arrays = [
        y, s, mean, rstd, dx, dg, db, table, total,
        backend.activation(x, "gelu"), backend.add(x, dy, 0.3), *backend.swiglu_backward(dy, x, y),
        backend.dropout(x, 0.3, 5, offsets, samples), *(a for t in tensors for a in t[:4]),
    ]  # fmt: skip
    return [a.tobytes() for a in arrays] + [backend.sum_squares([x, y])]


def test_bytes_do_not_depend_on_threads(backend):
    found = []
    for threads in (1, 2, 5):
        with thread_limit(threads):
            found.append(everything(backend))
    assert found[0] == found[1] == found[2]


def test_a_row_has_the_same_bytes_whatever_stands_beside_it(backend):
    x, g, b = array(100, 77), array(77, seed=3), array(77, seed=4)
    whole = backend.layer_norm(x, g, b, 1e-5)[0]
    for part in (slice(0, 1), slice(31, 64), slice(99, 100)):
        assert backend.layer_norm(x[part], g, b, 1e-5)[0].tobytes() == whole[part].tobytes()


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_what_is_not_finite_goes_the_way_of_numpy(backend, kind):
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 1e-40, -0.0, 2.0], np.float32)
    with np.errstate(all="ignore"):
        expected = ORACLE.activation(x, kind)
    found = backend.activation(x, kind)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    finite = ~np.isnan(expected)
    np.testing.assert_allclose(found[finite], expected[finite], rtol=1e-6, atol=1e-38)


def test_a_row_that_is_not_finite_spoils_only_itself(backend):
    x, g, b = array(40, 33), array(33, seed=3), array(33, seed=4)
    x[3, 32], x[5, 0] = np.nan, np.inf
    y = backend.layer_norm(x, g, b, 1e-5)[0]
    assert np.isnan(y).any(axis=1).nonzero()[0].tolist() == [3, 5]
    dx = backend.layer_norm_backward(x, array(40, 33, seed=9), g, np.zeros((40, 1), np.float32),
                                     np.ones((40, 1), np.float32))  # fmt: skip
    assert np.isnan(dx).any(axis=1).nonzero()[0].tolist() == [3, 5]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda b: b.activation(np.zeros(3, np.int32), "gelu"), TypeError, "x: expected an array"),
        (lambda b: b.activation([1.0], "gelu"), TypeError, "x: expected a NumPy array, found list"),
        (lambda b: b.activation_backward(array(3), array(4), "relu"), ValueError, r"shape \[4\]"),
        (lambda b: b.swiglu(array(3, 2), array(2, 3)), ValueError, r"up: expected shape \[3, 2\]"),
        (lambda b: b.layer_norm(array(3, 2), array(3), None, 1e-5), ValueError, r"g: .*\[2\]"),
        (lambda b: b.layer_norm(array(6), array(6), None, 1e-5), ValueError, "x: expected shape"),
        (lambda b: b.add(array(3), array(2)), ValueError, r"b: expected shape \[3\], found \[2\]"),
        (
            lambda b: b.embedding_backward(
                array(2, 3), np.zeros(2, np.int32), np.zeros((4, 5), np.float32)
            ),
            ValueError,
            r"dy: expected shape \[2, 5\], found \[2, 3\]",
        ),
        *(
            (
                lambda b, table=table, accumulate=accumulate: b.embedding_backward(
                    np.zeros((2, *table.shape[1:]), np.float32),
                    np.zeros(2, np.int32),
                    table,
                    accumulate,
                ),
                ValueError,
                "^dtable: expected a C-contiguous array",
            )
            for table in (array(4, 6)[:, ::2], array(4, 3, 6)[..., ::2])
            for accumulate in (True, False)
        ),
        (
            lambda b: b.layer_norm_backward(array(3, 2), array(3, 2), array(2), None, array(3, 1)),
            ValueError,
            "^mean: expected a NumPy array of float32, found None",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(CythonBackend())
