"""Weights of 16 and 8 bits: how they are rounded and packed, and products with them."""

import numpy as np
import pytest

import loopos
from loopos import ops
from loopos.autograd import Tensor, no_grad
from loopos.backends.numpy_backend import NumpyBackend
from loopos.backends.quantized import KINDS, QuantizedWeight
from loopos.backends.threads import thread_limit
from loopos.errors import BackendError, LooposError

VARIANTS = [("numpy", None)]
if "cython" in loopos.available_backends():
    from loopos._ext import kernels

    VARIANTS += [("cython", level) for level in kernels.levels()]
SHAPES = [(1, 1), (32, 16), (33, 385), (7, 3), (100, 33), (64, 800), (5, 0), (0, 4)]


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join(filter(None, variant)))
def backend(request):
    name, level = request.param
    with loopos.use_backend(name) as chosen:
        before = chosen.describe()["isa"]
        if level is not None:
            chosen.use_level(level)
        yield chosen
        if level is not None:
            chosen.use_level(before)


@pytest.fixture
def compiled(backend):
    if backend.name != "cython":
        pytest.skip("promised by the cython backend only")
    return backend


def array(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def bits(value):
    return int(np.float32(value).view(np.uint32))


# -- rounding ----------------------------------------------------------------------------------


def test_bfloat16_is_rounded_to_nearest_ties_to_even_and_keeps_what_is_no_number(backend):
    words = {
        0x3F800000: 0x3F80,  # 1
        0x3F808000: 0x3F80,  # a tie, down to even
        0x3F818000: 0x3F82,  # a tie, up to even
        0x3F808001: 0x3F81,
        0xBF80FFFF: 0xBF81,
        0x7F7FFFFF: 0x7F80,  # the largest float32 is nearer to infinity
        0x7F800000: 0x7F80,
        0xFF800000: 0xFF80,
        0x00000001: 0x0000,
        0x80000000: 0x8000,
        0x00008001: 0x0001,
        0x7FC00000: 0x7FC0,
        0x7F800001: 0x7FC0,  # a NaN whose upper half alone would be infinity
        0xFFFFFFFF: 0xFFFF,
    }
    w = np.array([list(words)], np.uint32).view(np.float32)
    packed = backend.quantize(w, "bfloat16")
    assert packed.panels.dtype == np.uint16
    assert packed.panels.shape == (1, 16, 32, 2)
    assert packed.panels[0, :7, 0].reshape(-1).tolist() == list(words.values())
    assert not packed.panels[0, 7:].any()
    assert not packed.panels[:, :, 1:].any()
    wide = packed.dequantized()
    np.testing.assert_array_equal(np.isnan(wide), np.isnan(w))


def test_int8_is_a_multiple_of_the_scale_of_its_output(backend):
    w = np.array(
        [[127, -127, 2.5, 3.5, -2.5, 0.49], [0, 0, 0, 0, 0, 0], [-1e-3, 5e-4, 0, 1e-3, 1e-9, 0]],
        np.float32,
    )
    packed = backend.quantize(w, "int8")
    assert packed.scales.tolist() == [1.0, 1.0, float(np.float32(1e-3) / np.float32(127))]
    assert packed.panels.shape == (1, 16, 32, 4)
    assert packed.panels[0, :2, 0].reshape(-1).tolist() == [127, -127, 2, 4, -2, 0, 0, 0]
    assert packed.panels[0, :2, 1].reshape(-1).tolist() == [0] * 8
    assert packed.panels[0, :2, 2].reshape(-1).tolist() == [-127, 64, 0, 127, 0, 0, 0, 0]
    assert not packed.panels[0, 2:].any()
    error = np.abs(packed.dequantized() - w)
    assert (error <= 0.5001 * packed.scales[:, None]).all()


def test_numbers_too_small_for_a_scale_become_zero(backend):
    w = np.array([[1e-45, -1e-45], [3e-38, 1e-40]], np.float32)
    packed = backend.quantize(w, "int8")
    assert packed.scales[0] == 1
    np.testing.assert_allclose(packed.dequantized(), w, atol=2e-40)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_packs_the_same_bytes(backend, kind, shape):
    w = array(*shape) * 10.0 ** np.random.default_rng(1).integers(-20, 20, (shape[0], 1))
    found, expected = backend.quantize(w, kind), NumpyBackend().quantize(w, kind)
    per_line = 2 if kind == "bfloat16" else 4
    lines = -(-shape[1] // (16 * per_line)) * 16
    assert found.panels.shape == (-(-shape[0] // 32), lines, 32, per_line)
    np.testing.assert_array_equal(found.panels, expected.panels)
    if kind == "int8":
        np.testing.assert_array_equal(found.scales, expected.scales)
    assert found.nbytes == expected.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_already_rounded_stays(backend, kind):
    once = backend.quantize(array(70, 45), kind)
    twice = backend.quantize(once.dequantized(), kind)
    np.testing.assert_array_equal(twice.panels, once.panels)


# -- products ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 12, 16, 17, 24, 25, 33, 77, 400, 513, 529])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner", [33, 800])
def test_products_are_those_of_the_rounded_weight(backend, kind, rows, inner):
    w, b, x = array(161, inner, seed=1), array(161, seed=2), array(rows, inner)
    packed = backend.quantize(w, kind)
    exact = x.astype(np.float64) @ packed.dequantized().T.astype(np.float64)
    for bias, activation in ((None, None), (b, None), (b, "relu")):
        y = backend.linear_quantized(x, packed, bias, activation)
        expected = exact if bias is None else exact + bias
        expected = np.maximum(expected, 0) if activation else expected
        assert (y.dtype, y.shape) == (np.float32, (rows, 161))
        assert np.abs(y - expected).max(initial=0) <= 2e-5 * inner**0.5


def test_sums_of_whole_numbers_are_exact(backend):
    rng = np.random.default_rng(4)
    codes = rng.integers(-127, 128, (70, 900)).astype(np.float32)
    codes[:, 0] = 127
    packed = backend.quantize(codes, "int8")
    x = rng.integers(-(2**7), 2**7 + 1, (37, 900)).astype(np.float32)
    for n in (1, 2, 5, 6, 16, 37):
        y = backend.linear_quantized(x[:n], packed)
        np.testing.assert_array_equal(y, (x[:n].astype(np.int64) @ codes.T.astype(np.int64)))


#: Numbers at the ends of what three digits hold, and far from 1.
EXTREMES = [1e-45, 1.0, 1.984375, np.nextafter(np.float32(1.984375), np.float32(0)), 1.9921875,
            np.nextafter(np.float32(2), np.float32(0)), 8355711 / 2**22, 1.3e-38, 3e-33, 2e-20,
            3e33]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_number_is_multiplied_to_rounding_whatever_its_size(backend, kind):
    codes = np.array([[127], [-127], [1], [64], [-3], [0]], np.float32)
    packed = backend.quantize(np.repeat(codes, 3, axis=1) * [[1, 0, 0]], kind)
    flushed = kind == "bfloat16" and backend.describe()["isa"] == "amx"  # subnormal numbers are
    for value in EXTREMES[1:] if flushed else EXTREMES:
        for sign in (1, -1):
            x = np.zeros((4, 3), np.float32)
            x[:2, 0] = np.float32(sign * value)
            expected = x.astype(np.float64) @ packed.dequantized().T.astype(np.float64)
            for n in (1, 4):
                y = backend.linear_quantized(x[:n], packed)
                np.testing.assert_allclose(y, expected[:n], rtol=5e-7, atol=1.5e-45)


@pytest.mark.parametrize("largest", [1, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_some_bits_of_a_rows_largest_number(backend, kind, largest):
    bits = 2.0**-21 if backend.describe()["isa"] == "amx" else 2.0**-18  # sums of float32
    w, x = array(96, 768, seed=1), array(20, 768)
    x[:, 5] *= largest
    packed = backend.quantize(w, kind)
    wide = packed.codes().astype(np.float64)
    if packed.scales is not None:
        wide *= packed.scales[:, None]
    exact = x.astype(np.float64) @ wide.T
    limit = np.abs(x).max(axis=1)[:, None] * np.linalg.norm(wide, axis=1) * bits
    for n in (1, 20):
        error = np.abs(backend.linear_quantized(x[:n], packed) - exact[:n])
        assert (error <= limit[:n]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_that_is_not_finite_is_as_in_numpy_and_leaves_the_others_alone(backend, kind):
    packed = backend.quantize(np.abs(array(40, 70, seed=1)) + 1, kind)
    x = array(21, 70)
    before = backend.linear_quantized(x, packed)
    x[0, 3], x[7, 0], x[20, 69], x[20, 5] = np.nan, np.inf, -np.inf, np.inf
    for rows in (slice(0, 1), slice(7, 8), slice(None)):
        y = backend.linear_quantized(x[rows], packed)
        expected = x[rows] @ packed.dequantized().T
        np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
        np.testing.assert_array_equal(
            np.isinf(y) * np.sign(y), np.isinf(expected) * np.sign(expected)
        )
    others = [row for row in range(21) if row not in (0, 7, 20)]
    np.testing.assert_allclose(y[others], before[others], rtol=0, atol=1e-4)
    if backend.name == "cython":
        assert y[others].tobytes() == before[others].tobytes()


def test_tiny_sums_keep_their_bits(backend):
    w, x = array(40, 100, seed=1), array(9, 100)
    w[:8] *= 1e-20
    x[2:4] *= 1e-25
    packed = backend.quantize(w, "bfloat16")
    x_wide, w_wide = x.astype(np.float64), packed.dequantized().astype(np.float64)
    exact = x_wide @ w_wide.T
    size = np.linalg.norm(x_wide, axis=1)[:, None] * np.linalg.norm(w_wide, axis=1)
    for n in (1, 9):
        error = np.abs(backend.linear_quantized(x[:n], packed) - exact[:n])
        assert (error <= 1e-6 * size[:n] + 1e-44).all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_has_the_bytes_it_has_among_others_whatever_its_numbers(compiled, kind):
    rng = np.random.default_rng(6)
    sizes = 2.0 ** rng.integers(-60, 30, (2, 200))
    w = (array(130, 200, seed=1) * sizes[0]).astype(np.float32)
    x = (array(40, 200) * sizes[1]).astype(np.float32)
    packed = compiled.quantize(w, kind)
    whole = compiled.linear_quantized(x, packed)
    for row in range(40):
        assert compiled.linear_quantized(x[row : row + 1], packed).tobytes() == whole[row].tobytes()


@pytest.mark.parametrize("inner", [2**17 - 1, 2**17, 2**18])
def test_the_longest_sums_of_digits_do_not_wrap(compiled, inner):
    w = np.random.default_rng(7).choice(np.array([-127, 127], np.float32), (3, inner))
    packed = compiled.quantize(w, "int8")
    x = np.repeat(np.sign(w[:1]) * np.float32(1.98), 2, axis=0)  # its highest digit is 127
    expected = x.astype(np.float64) @ w.T.astype(np.float64)
    for n in (1, 2):
        y = compiled.linear_quantized(x[:n], packed)
        np.testing.assert_allclose(y, expected[:n], rtol=2e-5, atol=200)


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic_of_all_threads_is_as_before_a_product(compiled, kind):
    packed = compiled.quantize(array(4000, 300, seed=1), kind)
    small = np.full((1000, 1000), 1e-40, np.float32)
    with thread_limit(2):
        before = compiled.add(small, small)
        assert before.min() > 0
        for rows in (1, 3):
            compiled.linear_quantized(array(rows, 300), packed)
            assert compiled.add(small, small).tobytes() == before.tobytes()


@pytest.mark.parametrize("activation", [None, "relu", "gelu_tanh"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bytes_whatever_stands_beside_it(compiled, kind, activation):
    packed, b = compiled.quantize(array(150, 800, seed=1), kind), array(150, seed=2)
    rows = array(450, 800)
    whole = compiled.linear_quantized(rows, packed, b, activation)
    for part in (slice(0, 1), slice(449, 450), slice(3, 5), slice(7, 19), slice(20, 33),
                 slice(100, 124), slice(200, 226), slice(40, 440), slice(0, 17),
                 slice(5, 38)):  # fmt: skip
        y = compiled.linear_quantized(rows[part], packed, b, activation)
        assert y.tobytes() == whole[part].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_do_not_depend_on_threads(compiled, kind):
    w, x = array(1500, 400, seed=1), array(500, 400)
    found = []
    for threads in (1, 2, 5):
        with thread_limit(threads):
            packed = compiled.quantize(w, kind)
            parts = [compiled.linear_quantized(x[:n], packed) for n in (1, 3, 16, 500)]
        found.append([packed.panels.tobytes(), *(part.tobytes() for part in parts)])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_product_with_the_codes_has_the_same_bytes(compiled, kind):
    packed, x = compiled.quantize(array(70, 500, seed=1), kind), array(40, 500)
    plain = QuantizedWeight(kind, packed.shape, packed.panels, packed.scales)
    expected = compiled.linear(x, plain.codes())[0]
    if kind == "int8":
        expected *= packed.scales
    for n in (1, 4, 40):
        found = compiled.linear_quantized(x[:n], plain)
        if compiled.describe()["isa"] == "amx":  # float32 has another order there
            limit = 1e-6 * np.abs(expected).max()
            np.testing.assert_allclose(found, expected[:n], rtol=0, atol=limit)
        else:
            np.testing.assert_array_equal(found, expected[:n])


def test_nan_and_infinity_in_a_bfloat16_weight_reach_their_outputs(backend):
    w, x = array(40, 50, seed=1), np.abs(array(20, 50)) + 1
    w[3, 7], w[11, 1], w[35, 4] = np.nan, np.inf, -np.inf
    packed = backend.quantize(w, "bfloat16")
    for n in (1, 20, 20):
        y = backend.linear_quantized(x[:n], packed)
        assert np.isnan(y[:, 3]).all()
        assert (y[:, 11] == np.inf).all()
        assert (y[:, 35] == -np.inf).all()
        assert np.isfinite(np.delete(y, [3, 11, 35], axis=1)).all()


# -- what is refused -----------------------------------------------------------------------------


def test_a_wrong_kind_weight_or_shape_is_refused(backend):
    w = array(3, 5)
    with pytest.raises(BackendError, match=r"unknown kind of weights 'int9', expected bfloat16 or "
                                           r"int8; did you mean 'int8'\?"):  # fmt: skip
        backend.quantize(w, "int9")
    with pytest.raises(ValueError, match=r"w: expected shape \[any, any\], found \[5\]"):
        backend.quantize(w[0], "int8")
    with pytest.raises(TypeError, match="w: expected an array of floats, found int64"):
        backend.quantize(np.zeros((3, 5), np.int64), "int8")
    for value in (np.nan, np.inf):
        broken = w.copy()
        broken[1, 2] = value
        with pytest.raises(BackendError, match="w: output 1 has a weight that is not finite"):
            backend.quantize(broken, "int8")
    packed = backend.quantize(w, "int8")
    with pytest.raises(ValueError, match=r"x: expected shape \[any, 5\], found \[2, 4\]"):
        backend.linear_quantized(array(2, 4), packed)
    with pytest.raises(ValueError, match=r"b: expected shape \[3\], found \[4\]"):
        backend.linear_quantized(array(2, 5), packed, array(4))


def test_parts_that_do_not_fit_are_refused():
    panels = np.zeros((1, 16, 32, 4), np.int8)
    with pytest.raises(ValueError, match=r"panels: expected int8 of shape \[2, 16, 32, 4\], found"):
        QuantizedWeight("int8", (33, 5), panels, np.ones(33, np.float32))
    with pytest.raises(ValueError, match="panels: expected uint16"):
        QuantizedWeight("bfloat16", (3, 5), panels)
    with pytest.raises(ValueError, match="scales: a weight of kind int8 has one an output"):
        QuantizedWeight("int8", (3, 5), panels)
    with pytest.raises(ValueError, match=r"scales: expected float32 of shape \[3\], found"):
        QuantizedWeight("int8", (3, 5), panels, np.ones(4, np.float32))
    with pytest.raises(BackendError, match="unknown kind of weights 'float8'"):
        QuantizedWeight("float8", (3, 5), panels)


def test_the_op_is_for_inference_only(backend):
    packed = backend.quantize(array(3, 5), "int8")
    x = Tensor(array(2, 5), requires_grad=True)
    with pytest.raises(LooposError, match=r"linear_quantized has no gradient: call it under no_g"):
        ops.linear_quantized(x, packed)
    with no_grad():
        y = ops.linear_quantized(x, packed, activation="relu")
    np.testing.assert_array_equal(y.data, backend.linear_quantized(x.data, packed, None, "relu"))
    assert not y.requires_grad
