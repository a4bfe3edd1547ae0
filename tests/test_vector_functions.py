"""Vectorised functions against exact values, over every exponent of float32."""

import numpy as np
import pytest
from scipy import special

import loopos

if "cython" not in loopos.available_backends():
    pytest.skip("the compiled kernels are not there", allow_module_level=True)

from loopos._ext import kernels

#: The largest error stated in math.h.inc, in units in the last place, and the exact function.
FUNCTIONS = {
    "exp": (1.0, np.exp),
    "exp_or_zero": (2.0, np.exp),
    "tanh": (2.0, np.tanh),
    "normal_cdf": (2.0, special.ndtr),
    "sigmoid": (3.0, special.expit),
}
#: Where that is so, if not everywhere; what is 0 below the normal range.
DOMAINS = {"normal_cdf": (0.0, np.inf), "exp_or_zero": (-np.inf, 88.0)}
OR_ZERO = ("exp_or_zero", "sigmoid")


@pytest.fixture(params=kernels.levels())
def level(request):
    before = kernels.level()
    kernels.use_level(request.param)
    yield request.param
    kernels.use_level(before)


def every_exponent(mantissas=4096):
    """Every sign and exponent with random mantissas, the smallest and the largest one."""
    exponents = np.arange(255, dtype=np.uint32)[:, None] << 23
    drawn = np.random.default_rng(0).integers(0, 1 << 23, (255, mantissas), dtype=np.uint32)
    drawn[:, 0], drawn[:, 1] = 0, (1 << 23) - 1
    values = (exponents | drawn).ravel().view(np.float32)
    return np.concatenate([values, -values])


def in_domain(name, x):
    low, high = DOMAINS.get(name, (-np.inf, np.inf))
    return ~((x < low) | (x > high))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_are_within_what_is_stated(level, name):
    limit, exact = FUNCTIONS[name]
    # Where results change, more of them than the exponents alone would give.
    x = np.concatenate([every_exponent(), np.linspace(-110, 110, 400_001, dtype=np.float32)])
    x = x[in_domain(name, x)]
    with np.errstate(over="ignore", under="ignore"):
        expected = exact(x.astype(np.float64))
        if name in OR_ZERO:
            expected[expected < np.finfo(np.float32).tiny] = 0
        rounded = expected.astype(np.float32)
    found = kernels.vector_function(name, x, 1)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(found[~finite], rounded[~finite])
    unit = np.spacing(np.abs(rounded[finite])).astype(np.float64)
    error = np.abs(found[finite].astype(np.float64) - expected[finite]) / unit
    assert error.max() <= limit, (x[finite][error.argmax()], error.max())


def test_the_left_tail_of_the_normal_distribution(level):
    x = np.concatenate([every_exponent(), np.linspace(-110, 0, 400_001, dtype=np.float32)])
    x = x[x < 0]
    found = kernels.vector_function("normal_cdf", x, 1).astype(np.float64)
    expected = special.ndtr(x.astype(np.float64))
    near = x >= -5.5
    assert (np.abs(found - expected)[near] / expected[near]).max() <= 4e-6
    assert np.abs(found - expected)[~near].max() <= 2e-8
    assert (found >= 0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(level, name):
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32)
    x = x[in_domain(name, x)]
    with np.errstate(all="ignore"):
        expected = FUNCTIONS[name][1](x.astype(np.float64)).astype(np.float32)
    found = kernels.vector_function(name, x, 1)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found[1:]), np.signbit(expected[1:]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_value_has_the_same_bytes_at_any_place(level, name):
    x = np.linspace(-9, 9, 1003, dtype=np.float32)
    whole = kernels.vector_function(name, x, 1)
    for start in (0, 1, 5, 998):
        part = kernels.vector_function(name, x[start : start + 7].copy(), 1)
        assert part.tobytes() == whole[start : start + 7].tobytes()
