"""The products of the Cython backend: values, order of summation, what they refuse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loopos
from loopos.backends.threads import thread_limit

if "cython" not in loopos.available_backends():
    pytest.skip("the compiled kernels are not there", allow_module_level=True)

from loopos._ext import kernels
from loopos.backends.cython_backend import CythonBackend

LEVELS = kernels.levels()
SHAPES = [(1, 1, 1), (5, 7, 3), (15, 384, 100), (16, 400, 13), (33, 385, 27), (64, 770, 130),
          (65, 770, 33), (130, 1024, 20), (400, 800, 77), (30, 0, 4),
          # Too large to be packed at once: deep, wide and tall.
          (3300, 720, 710), (200, 3200, 800), (700, 3200, 130), (700, 1024, 60)]  # fmt: skip


@pytest.fixture(params=LEVELS)
def backend(request):
    before = kernels.level()
    chosen = CythonBackend()
    chosen.use_level(request.param)
    yield chosen
    chosen.use_level(before)


def array(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def close(found, expected, depth):
    """A sum of `depth` products of numbers about 1 is right to a few units in the last place."""
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    limit = 4e-7 * (depth + 1) ** 0.5 * max(1.0, np.sqrt(depth))
    assert np.abs(found - expected).max(initial=0) <= limit


@pytest.mark.parametrize("shape", SHAPES)
def test_the_three_products_of_a_linear_layer(backend, shape):
    n, c, o = shape
    x, w, b, dy = array(n, c), array(o, c, seed=1), array(o, seed=2), array(n, o, seed=3)
    wide = x.astype(np.float64), w.astype(np.float64), dy.astype(np.float64)
    close(backend.linear(x, w, b)[0], wide[0] @ wide[1].T + b, c)
    dw, db = np.ones_like(w), np.zeros_like(b)
    dx = backend.linear_backward(dy, x, w, dw=dw, db=db)
    close(dx, wide[2] @ wide[1], o)
    close(dw, 1 + wide[2].T @ wide[0], n)
    close(db, wide[2].sum(axis=0), n)


def exact(left, right):
    """The product in float64, and the sum of what it is made of without signs."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    return left @ right, np.abs(left) @ np.abs(right)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 1, 40), (20, 40, 33), (50, 700, 60), (400, 64, 70)]
)
def test_products_have_the_precision_of_float32(backend, shape):
    """With rows, columns and single numbers of very different sizes."""
    n, c, o = shape
    rng = np.random.default_rng(5)

    def numbers(rows, columns):
        powers = rng.integers(-12, 12, (rows, 1)) + rng.integers(-6, 6, (rows, columns))
        return np.ldexp(array(rows, columns, seed=int(powers.sum()) % 100 + 100), powers)

    x, w, dy = numbers(n, c), numbers(o, c), numbers(n, o)
    dw = np.zeros_like(w)
    dx = backend.linear_backward(dy, x, w, dw=dw)
    for found, left, right in ((backend.linear(x, w)[0], x, w.T), (dx, dy, w), (dw, dy.T, x)):
        expected, size = exact(left, right)
        limit = (0.5 + 1.5 * left.shape[1] ** 0.5) * 2.0**-24
        assert (np.abs(found - expected) <= limit * size).all()


def test_a_row_of_numbers_at_the_ends_of_the_range_changes_no_other(backend):
    x, w, dy = array(70, 500), array(75, 500, seed=1), array(70, 75, seed=2)
    dw = np.zeros_like(w)
    plain = backend.linear(x, w)[0], backend.linear_backward(dy, x, w, dw=dw)
    extreme = [3, 7, 11, 20, 25, 30, 44]
    others = np.delete(np.arange(70), extreme)
    for of, other in ((x, w.T), (dy, w)):
        of[3] *= 1e-25
        of[7] *= 1e20
        of[11, 5], of[20, 9], of[30, 2] = np.inf, np.nan, 3.4e38
        of[25] = 1e-42
        of[44] = 0
        found = backend.linear(x, w)[0] if of is x else backend.linear_backward(dy, x, w, dw=dw)
        assert found[others].tobytes() == plain[of is dy][others].tobytes()
        expected, size = exact(of, other)
        for row in (3, 7, 30):
            in_range = np.abs(expected[row]) < np.finfo(np.float32).max
            assert (np.abs(found[row] - expected[row]) <= 2e-6 * size[row])[in_range].all()
            assert (found[row] == np.sign(expected[row]) * np.inf)[~in_range].all()
        assert (found[11] == np.sign(other[5]) * np.inf).all()
        assert np.isnan(found[20]).all()
        assert (np.abs(found[25] - expected[25]) <= 1e-37).all()
        assert (found[44] == 0).all()
        for row in extreme:  # alone it is what it is among others
            part = of[row : row + 1]
            alone = (
                backend.linear(part, w)[0] if of is x else backend.linear_backward(part, x[:1], w)
            )
            assert alone.tobytes() == found[row : row + 1].tobytes()


def test_tiny_numbers_among_others(backend):
    """Such as probabilities that are nearly 0: they add nothing, and change nothing."""
    rng = np.random.default_rng(6)
    logits = 20 * rng.standard_normal((150, 700))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    dy = (p / p.sum(axis=1, keepdims=True)).astype(np.float32)
    assert ((dy > 0) & (dy < 1e-33)).mean() > 0.05
    x, w = array(150, 90), array(700, 90, seed=1)
    for of in (x, w):
        tiny = rng.random(of.shape) < 0.3
        of[tiny] = np.ldexp(of[tiny], rng.integers(-150, -95, tiny.sum()))
    dw = np.zeros_like(w)
    dx = backend.linear_backward(dy, x, w, dw=dw)
    for found, left, right in ((backend.linear(x, w)[0], x, w.T), (dx, dy, w), (dw, dy.T, x)):
        expected, size = exact(left, right)
        limit = (0.5 + 1.5 * left.shape[1] ** 0.5) * 2.0**-24
        assert (np.abs(found - expected) <= limit * size + 1e-36).all()


@given(st.integers(1, 70), st.integers(1, 500), st.integers(1, 90), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_any_shape(n, c, o, threads):
    backend = CythonBackend()
    x, w, dy = array(n, c), array(o, c, seed=1), array(n, o, seed=3)
    with thread_limit(threads):
        close(backend.linear(x, w)[0], x.astype(np.float64) @ w.T.astype(np.float64), c)
        dw = np.full_like(w, np.nan)
        dx = backend.linear_backward(dy, x, w, dw=dw, accumulate=False)
    close(dx, dy.astype(np.float64) @ w, o)
    close(dw, dy.T.astype(np.float64) @ x, n)


@pytest.mark.parametrize("activation", [None, "relu", "gelu_tanh"])
def test_a_row_has_the_same_bytes_whatever_stands_beside_it(backend, activation):
    c, o = 800, 130
    w, b = array(o, c, seed=1), array(o, seed=2)
    rows, dys = array(800, c), array(800, o, seed=3)
    whole = backend.linear(rows, w, b, activation)
    dx = backend.linear_backward(dys, None, w)
    for part in (slice(0, 1), slice(7, 8), slice(3, 20), slice(100, 164), slice(40, 440),
                 slice(90, 790)):  # fmt: skip
        y, pre = backend.linear(rows[part], w, b, activation)
        assert y.tobytes() == whole[0][part].tobytes()
        if activation is not None:
            assert pre.tobytes() == whole[1][part].tobytes()
        assert backend.linear_backward(dys[part], None, w).tobytes() == dx[part].tobytes()


@pytest.mark.parametrize(
    "shape", [(1, 70), (30, 64), (40, 129), (800, 15), (1000, 700), (2000, 100)]
)
def test_a_row_of_dx_has_the_same_bytes_whatever_stands_beside_it(backend, shape):
    outputs, inputs = shape
    dy, w, x = array(100, outputs), array(outputs, inputs, seed=1), array(100, inputs, seed=2)
    dy[5] *= 1e-25  # which AMX leaves to be made again
    whole, sums = backend.linear_backward(dy, x, w), x.copy()
    backend.linear_backward(dy, x, w, dx=sums)
    np.testing.assert_allclose(sums, x + whole, rtol=1e-5, atol=1e-5)
    for rows in (1, 2, 15, 16, 17, 32, 33):
        for threads in (1, 2, 5):
            with thread_limit(threads):
                some, added = backend.linear_backward(dy[:rows], x[:rows], w), x[:rows].copy()
                backend.linear_backward(dy[:rows], x[:rows], w, dx=added)
            assert some.tobytes() == whole[:rows].tobytes()
            assert added.tobytes() == sums[:rows].tobytes()


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_row_that_is_decoded_has_the_same_bytes_whatever_stands_beside_it(backend, activation):
    layers = [(array(o, 800, seed=o), array(o, seed=1)) for o in (130, 7)]
    rows = array(100, 800)
    whole = backend.decode_linears(rows, layers, activation)
    for part in (slice(0, 1), slice(7, 8), slice(3, 20), slice(30, 96)):
        for threads in (1, 2, 5):
            with thread_limit(threads):
                found = backend.decode_linears(rows[part], layers, activation)
            assert [y.tobytes() for y in found] == [y[part].tobytes() for y in whole]


def test_decoding_sums_as_the_best_set_without_amx_does(backend):
    x, layers = array(3, 800), [(array(130, 800, seed=1), array(130, seed=2))]
    (found,) = backend.decode_linears(x, layers)
    if kernels.level() == "amx":
        backend.use_level("v4")
    assert found.tobytes() == backend.linear(x, *layers[0])[0].tobytes()


@pytest.mark.parametrize("rows", [30, 200, 800])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "tanh"])
def test_a_deep_product_ends_once_with_bias_and_activation(backend, rows, activation):
    x, w, b = array(rows, 2000), array(70, 2000, seed=1) / 40, array(70, seed=2)
    y, pre = backend.linear(x, w, b, activation)
    close(pre, x.astype(np.float64) @ w.T.astype(np.float64) + b, 2000)
    assert y.tobytes() == backend.activation(pre, activation).tobytes()
    dy = array(rows, 2000, seed=3)
    dx = np.ones((rows, 60), np.float32)
    backend.linear_backward(dy, None, array(2000, 60, seed=4), dx=dx)
    close(dx, 1 + dy.astype(np.float64) @ array(2000, 60, seed=4), 2000)


@pytest.mark.parametrize("shape", [(10600, 300, 660), (660, 300, 10600)])
def test_an_operand_that_is_kept_in_parts_by_threads(backend, shape):
    rows, c, o = shape
    x, w, b = array(rows, c), array(o, c, seed=1), array(o, seed=2)
    y, pre = backend.linear(x, w, b, "relu")
    close(pre, x.astype(np.float64) @ w.T.astype(np.float64) + b, c)
    np.testing.assert_array_equal(y, np.maximum(pre, 0))


@pytest.mark.parametrize("shape", [(400, 900, 1000), (300, 2100, 2000), (390, 1000, 900)])
def test_a_gradient_of_which_an_operand_is_kept_in_parts(backend, shape):
    """Its bytes are those of the same sums in smaller products, whose operand is kept whole."""
    rows, c, o = shape
    x, w, dy = array(rows, c), array(o, c, seed=1), array(rows, o, seed=3)
    dw, parts = np.zeros_like(w), np.zeros_like(w)
    backend.linear_backward(dy, x, w, dw=dw, need_dx=False)
    close(dw, dy.T.astype(np.float64) @ x, rows)
    for at in range(0, o, 500):
        some = slice(at, at + 500)
        backend.linear_backward(dy[:, some], x, w[some], dw=parts[some], need_dx=False)
    assert parts.tobytes() == dw.tobytes()


@pytest.mark.parametrize("depth", [1024, 1039, 3072])
def test_few_rows_by_a_weight_whose_rows_fight_for_places_in_the_cache(backend, depth):
    """Rows of so many bytes that a tile of them shares the sets of a cache, and others."""
    x, w, b = array(60, depth), array(400, depth, seed=1), array(400, seed=2)
    expected = x.astype(np.float64) @ w.T.astype(np.float64) + b
    for rows in (9, 16, 33, 60):
        y = backend.linear(x[:rows], w, b)[0]
        close(y, expected[:rows], depth)
        many = backend.linear(np.concatenate([x[:rows]] * 10), w, b)[0]
        assert y.tobytes() == many[:rows].tobytes()


@pytest.mark.parametrize(
    "shape",
    [(800, 400, 700), (60, 400, 700), (15, 400, 700),
     # Deep, with few sums: blocks of the depth go by at once where there are threads for them.
     (300, 2000, 100), (15, 2000, 100), (300, 13000, 70), (2000, 70, 300)],
)  # fmt: skip
def test_bytes_do_not_depend_on_threads(backend, shape):
    rows, c, o = shape
    x, w, dy = array(rows, c), array(o, c, seed=1), array(rows, o, seed=3)
    found = []
    for threads in (1, 2, 5, 16):
        with thread_limit(threads):
            dw, added = np.ones_like(w), x.copy()
            dx = backend.linear_backward(dy, x, w, dw=dw)
            backend.linear_backward(dy, x, w, dx=added)
            whole, few = (backend.linear(a, w, w[:, 0].copy(), "silu")[0] for a in (x, x[:40]))
            found.append([a.tobytes() for a in (whole, few, dx, added, dw)])
    assert all(each == found[0] for each in found)


def test_gradients_add_up_or_overwrite_in_the_buffers_given(backend):
    x, w, dy = array(9, 20), array(7, 20, seed=1), array(9, 7, seed=3)
    dw, dx = np.full_like(w, 2), np.full_like(x, 3)
    assert backend.linear_backward(dy, x, w, dw=dw, dx=dx) is dx
    close(dw, 2 + dy.T.astype(np.float64) @ x, 9)
    close(dx, 3 + dy.astype(np.float64) @ w, 7)
    again = np.full_like(w, np.nan)
    assert backend.linear_backward(dy, x, w, dw=again, accumulate=False, need_dx=False) is None
    close(again, dy.T.astype(np.float64) @ x, 9)


def test_nan_and_infinity_propagate_as_in_numpy(backend):
    x, w = array(20, 50), array(30, 50, seed=1)
    x[3, 7], x[5, 1], w[11, 4] = np.nan, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        expected = x @ w.T
    found = backend.linear(x, w)[0]
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    assert np.isnan(found[3]).all()


def test_layouts_and_read_only_inputs(backend):
    x, w = array(20, 60), array(30, 60, seed=1)
    expected = backend.linear(x, w)[0]
    x.flags.writeable = w.flags.writeable = False
    assert backend.linear(x, w)[0].tobytes() == expected.tobytes()
    spread = np.zeros((20, 120), np.float32)
    spread[:, ::2] = x
    turned = np.asfortranarray(w)
    assert backend.linear(spread[:, ::2], turned)[0].tobytes() == expected.tobytes()
    shifted = np.zeros(20 * 60 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(20, 60)
    shifted[...] = x
    assert backend.linear(shifted, w)[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": np.zeros((4, 5), np.int64)}, TypeError, "x: expected an array of float32, found in"),
        ({"w": np.zeros((3, 5), np.float16)}, TypeError, "w: expected an array of float32, found"),
        ({"w": np.zeros((3, 6), np.float32)}, ValueError, r"w: expected shape \[any, 5\], found"),
        ({"x": np.zeros(5, np.float32)}, ValueError, r"x: expected shape \[any, any\], found"),
        ({"b": np.zeros(4, np.float32)}, ValueError, r"b: expected shape \[3\], found \[4\]"),
        ({"b": [0.0, 0.0, 0.0]}, TypeError, "b: expected a NumPy array of float32, found"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, words):
    given = {
        "x": np.zeros((4, 5), np.float32),
        "w": np.zeros((3, 5), np.float32),
        "b": np.zeros(3, np.float32),
    }
    with pytest.raises(error, match=words):
        CythonBackend().linear(**(given | change))


def test_a_gradient_buffer_that_cannot_be_written_is_refused():
    x, w, dy = array(4, 5), array(3, 5), array(4, 3)
    frozen = np.zeros_like(w)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="dw: is read-only"):
        CythonBackend().linear_backward(dy, x, w, dw=frozen)
    with pytest.raises(ValueError, match="dw: expected a C-contiguous array"):
        CythonBackend().linear_backward(dy, x, w, dw=np.zeros((3, 10), np.float32)[:, ::2])
    with pytest.raises(ValueError, match=r"dw: expected shape \[3, 5\], found \[5, 3\]"):
        CythonBackend().linear_backward(dy, x, w, dw=np.zeros((5, 3), np.float32))


def test_targets_outside_the_vocabulary_are_refused():
    h, w = array(3, 4), array(5, 4)
    with pytest.raises(IndexError, match="targets: 5 is outside of 5 columns"):
        CythonBackend().linear_cross_entropy(h, w, np.array([0, 5, 1], np.int32))


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_losses_over_the_vocabulary(backend, rows):
    h, w, b = array(rows, 24), array(333, 24, seed=1), array(333, seed=2)
    targets = np.random.default_rng(4).integers(0, 333, rows).astype(np.int32)
    weights = np.random.default_rng(5).uniform(size=rows).astype(np.float32)
    weights[::3] = 0
    oracle = loopos.backends.numpy_backend.NumpyBackend()
    wide = [a.astype(np.float64) for a in (h, w, weights, b)]
    every = {"need_dh": True, "need_dw": True, "need_db": True}
    expected = oracle.linear_cross_entropy(wide[0], wide[1], targets, wide[2], wide[3], **every)
    found = backend.linear_cross_entropy(h, w, targets, weights, b, **every)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-6)
    for value, reference in zip(found[2:], expected[2:], strict=True):
        np.testing.assert_allclose(value, reference, atol=2e-6 * np.abs(reference).max(initial=1))
    for temperature in (1.0, 0.7):
        exact = oracle.linear_logprobs(wide[0], wide[1], targets, temperature, wide[3])
        close_to = backend.linear_logprobs(h, w, targets, temperature, b)
        for value, reference in zip(close_to, exact, strict=True):
            np.testing.assert_allclose(value, reference, rtol=1e-5, atol=1e-5)


def test_losses_have_the_same_bytes_at_any_number_of_threads(backend):
    h, w = array(70, 64), array(2000, 64, seed=1)
    targets = np.random.default_rng(4).integers(0, 2000, 70).astype(np.int32)
    found = []
    for threads in (1, 2, 5):
        with thread_limit(threads):
            total, _, dh, dw, _ = backend.linear_cross_entropy(
                h, w, targets, need_dh=True, need_dw=True
            )
        found.append((total, dh.tobytes(), dw.tobytes()))
    assert found[0] == found[1] == found[2]
