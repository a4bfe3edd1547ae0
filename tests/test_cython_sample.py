"""Sampling in the Cython backend: the tokens of the reference, at every truncation."""

import numpy as np
import pytest

import loopos
from loopos.backends.numpy_backend import NumpyBackend
from loopos.backends.threads import thread_limit

if "cython" not in loopos.available_backends():
    pytest.skip("the compiled kernels are not there", allow_module_level=True)

from loopos._ext import kernels
from loopos.backends.cython_backend import CythonBackend

#: temperature, top_k, top_p, min_p
OPTIONS = [
    (0, 0, 1, 0), (1, 0, 1, 0), (0.7, 0, 1, 0), (1, 50, 1, 0), (0.8, 20, 0.9, 0), (1, 0, 0.9, 0),
    (1, 0, 0.5, 0), (1.3, 0, 0.99, 0), (1, 0, 0.99999, 0), (1, 0, 1, 0.05), (0.7, 40, 0.95, 0.02),
    (1, 700, 1, 0), (1, 700, 0.7, 0), (0.01, 0, 0.9, 0), (30, 0, 0.3, 0), (1, 0, 1e-9, 0),
]  # fmt: skip


@pytest.fixture(params=kernels.levels())
def backend(request):
    before = kernels.level()
    chosen = CythonBackend()
    chosen.use_level(request.param)
    yield chosen
    chosen.use_level(before)


@pytest.mark.parametrize(("fraction", "off"), [(0.5, -5e-4), (0.9, 2e-4), (0.97, 1e-3)])
def test_sums_of_a_large_vocabulary_of_equal_logits(backend, fraction, off):
    """All are rounded the same way when they are added up."""
    z = np.full((1, 262144), np.log(0.37), np.float32)
    z[0, 0], many = 0, int(z.size * fraction)
    z[0, many:] = np.log(0.37 / 2)
    e = np.exp(z[0].astype(np.float64))
    share = e[:many].sum() / e.sum() * (1 + off)
    drawn(backend, z, (1, 0, share, 0), np.array([0.99999999]))


def drawn(backend, z, options, u):
    """Check ids and log-probabilities against the reference in float64; return the ids."""
    ids, logp = backend.sample(z, *options, u)
    expected, exact = NumpyBackend().sample(z.astype(np.float64), *options, u)
    assert (ids.dtype, logp.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(logp, exact, rtol=1e-5, atol=1e-5)
    return ids


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("columns", "scale"), [(1, 1), (63, 2), (65, 1), (4100, 1), (4100, 5)])
def test_tokens_are_those_of_the_reference(backend, columns, scale, options):
    rng = np.random.default_rng(columns)
    z = (rng.standard_normal((40, columns)) * scale).astype(np.float32)
    u = rng.uniform(size=40)
    drawn(backend, z, options, u)
    ties = np.round(4 * z) / 4
    if columns > 1:
        ties[:, rng.integers(1, columns, 5)] = -np.inf
    ties[:, 0] = -0.0
    drawn(backend, ties, options, u)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_logits_are_kept_by_the_lower_number(backend, options):
    z, u = np.zeros((5, 307), np.float32), np.array([0, 0.203, 0.517, 0.911, 1 - 2**-53])
    drawn(backend, z, options, u)


def test_what_is_impossible_is_never_drawn(backend):
    z = np.full((3, 200), -np.inf, np.float32)
    z[:, [70, 130]] = 1.0
    for options in OPTIONS[1:]:
        ids = backend.sample(z, *options, np.array([0.0, 0.4999, 1 - 2**-53]))[0]
        assert set(ids.tolist()) <= {70, 130}
        assert ids[0] == 70


def test_rows_that_are_no_numbers_are_as_in_the_reference(backend):
    z = np.random.default_rng(0).standard_normal((4, 150)).astype(np.float32)
    z[0, 77], z[1, 5], z[2] = np.nan, np.inf, -np.inf
    for options in OPTIONS[:4]:
        with np.errstate(invalid="ignore"):
            ids, logp = backend.sample(z, *options, np.full(4, 0.5))
            expected, exact = NumpyBackend().sample(z.astype(np.float64), *options, np.full(4, 0.5))
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(np.isnan(logp), np.isnan(exact))


def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(backend):
    rng = np.random.default_rng(3)
    z, u = rng.standard_normal((33, 5000)).astype(np.float32), rng.uniform(size=33)
    for options in OPTIONS:
        found = []
        for threads in (1, 2, 5):
            with thread_limit(threads):
                ids, logp = backend.sample(z, *options, u)
            found.append((ids.tobytes(), logp.tobytes()))
        assert found[0] == found[1] == found[2]
        alone = backend.sample(z[7:8], *options, u[7:8])
        assert (alone[0][0], alone[1][0]) == (ids[7], logp[7])


def test_draws_have_the_probabilities_of_the_softmax(backend):
    z = np.random.default_rng(5).standard_normal(40).astype(np.float32)
    p = np.exp(z.astype(np.float64)) / np.exp(z.astype(np.float64)).sum()
    draws = 100_000
    u = np.random.default_rng(6).uniform(size=draws)
    ids = backend.sample(np.tile(z, (draws, 1)), 1.0, 0, 1.0, 0.0, u)[0]
    counts = np.bincount(ids, minlength=40)
    assert ((counts - draws * p) ** 2 / (draws * p)).sum() < 85  # 39 degrees: 1 in 40000 exceeds


def test_what_does_not_fit_is_refused(backend):
    z = np.zeros((2, 5), np.float32)
    with pytest.raises(ValueError, match=r"u: expected shape \[2\], found \[3\]"):
        backend.sample(z, 1.0, 0, 1.0, 0.0, np.zeros(3))
    with pytest.raises(ValueError, match=r"z: expected shape \[any, at least 1\], found \[2, 0\]"):
        backend.sample(z[:, :0], 1.0, 0, 1.0, 0.0, np.zeros(2))


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-30, 1e-11, 1e11, 1e30, 1e300])
def test_extreme_temperatures_stay_within_the_vocabulary(backend, temperature):
    rng = np.random.default_rng(2)
    z = (rng.standard_normal((9, 70)) * 5).astype(np.float32)
    ids = drawn(backend, z, (temperature, 0, 1, 0), np.append(rng.uniform(size=8), 1 - 2**-53))
    if temperature < 1:
        np.testing.assert_array_equal(ids, z.argmax(axis=1))
    else:
        assert ids[-1] == 69
