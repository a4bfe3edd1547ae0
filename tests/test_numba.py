"""The numba backend beyond the op cases: larger blocks, threads, NaN, the host, the cache."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import loopos
from loopos.backends import numba_pool, threads
from loopos.backends.numba_backend import NumbaBackend
from loopos.backends.numpy_backend import ACTIVATIONS, NumpyBackend

pytest.importorskip("numba")

NUMPY, NUMBA = NumpyBackend(), NumbaBackend()


def offsets(*lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def script(text, **environment):
    """Run a script in a process of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", text], env=os.environ | environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


# -- values at sizes that cross the blocks -----------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3, 40, 150])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_across_blocks_of_queries_and_keys(causal, window, kv_heads):
    rng = np.random.default_rng(0)
    at = offsets(300, 1, 0, 129, 32)
    q, dy = (rng.normal(size=(at[-1], 4, 10)) for _ in range(2))
    k, v = (rng.normal(size=(at[-1], kv_heads, 10)) for _ in range(2))
    options = (at, causal, 0.3, window, 0.2, 99, np.array([5, 1, 0, 2, 7], np.int32))
    y, lse = NUMPY.attention(q, k, v, *options)
    gradients = NUMPY.attention_backward(dy, q, k, v, y, lse, *options)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):
        single = [a.astype(dtype) for a in (q, k, v)]
        found = NUMBA.attention(*single, *options)
        close(found, (y, lse), tolerance)
        back = NUMBA.attention_backward(dy.astype(dtype), *single, *found, *options)
        close(back, gradients, tolerance)


def test_losses_of_a_large_vocabulary():
    rng = np.random.default_rng(1)
    h, w, w_ref = (rng.normal(size=(n, 16)).astype(np.float32) for n in (40, 5003, 5003))
    targets, up = rng.integers(0, 5003, 40), rng.normal(size=(2, 40)).astype(np.float32)
    need = {"need_dh": True, "need_dw": True, "need_db": False}
    wide = [a.astype(np.float64) for a in (h, w, w_ref, *up)]
    found = NUMBA.linear_cross_entropy(h, w, targets, **need)
    expected = NUMPY.linear_cross_entropy(wide[0], wide[1], targets, **need)
    close([np.float64(found[0]), *found[2:4]], [np.float64(expected[0]), *expected[2:4]])
    close(NUMBA.linear_logprobs(h, w, targets, 0.7), NUMPY.linear_logprobs(*wide[:2], targets, 0.7))
    _, entropy, lse = NUMPY.linear_logprobs(*wide[:2], targets, 0.7)
    narrow = [a.astype(np.float32) for a in (entropy, lse)]
    close(
        [NUMBA.linear_logprobs_backward(*up, h, w, targets, *narrow, 0.7)],
        [NUMPY.linear_logprobs_backward(*wide[3:], *wide[:2], targets, entropy, lse, 0.7)],
    )
    args = (wide[0], wide[1], wide[0], wide[2])
    kl = NUMPY.linear_kl(*args)
    close([NUMBA.linear_kl(h, w, h, w_ref)], [kl])
    close(
        [NUMBA.linear_kl_backward(up[0], kl.astype(np.float32), h, w, h, w_ref)],
        [NUMPY.linear_kl_backward(wide[3], kl, *args)],
    )


def test_gradients_of_weights_are_added_to_what_stands(monkeypatch):
    rng = np.random.default_rng(8)
    x, dy, w = (rng.normal(size=shape) for shape in ((70, 33), (70, 41), (41, 33)))
    targets, weights = rng.integers(0, 41, 70), (np.arange(70) % 3).astype(float)
    standing, results = (rng.normal(size=(41, 33)), rng.normal(size=41)), []
    for backend in (NUMBA, NUMPY):
        dw, db = (a.copy() for a in standing)
        dx = backend.linear_backward(dy, x, w, dw=dw, db=db)
        results.append([dx, dw, db])
    close(*results, 1e-12)
    monkeypatch.setattr("loopos.backends.numpy_losses._LOGIT_ELEMENTS", 16 * 41)  # three chunks
    need = {"need_dh": True, "need_dw": True, "need_db": True}
    for chosen in (weights, np.zeros(70)):
        found, expected = (
            b.linear_cross_entropy(x, w, targets, chosen, **need) for b in (NUMBA, NUMPY)
        )
        close(found[2:], expected[2:], 1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dropout_has_the_bits_of_the_reference(dtype):
    x = np.random.default_rng(2).normal(size=(70, 33)).astype(dtype)
    at, samples = offsets(50, 0, 20), np.array([2**31 - 1, 4, 0], np.int32)
    for key in (0, 2**64 - 1, 987654321):
        args = (x, 0.3, key, at, samples)
        assert np.array_equal(NUMBA.dropout(*args), NUMPY.dropout(*args))
        assert np.array_equal(NUMBA.dropout_backward(*args), NUMPY.dropout(*args))


def test_accuracy_of_float32_activations_over_their_range():
    x = np.linspace(-30, 30, 20011).astype(np.float32)
    one = np.ones_like(x)
    for kind in ACTIVATIONS:
        wide = x.astype(np.float64)
        close([NUMBA.activation(x, kind)], [NUMPY.activation(wide, kind)], 2e-7)
        slope = NUMPY.activation_backward(one.astype(np.float64), wide, kind)
        close([NUMBA.activation_backward(one, x, kind)], [slope], 1e-6)


# -- NaN and inf -------------------------------------------------------------------------------

STRANGE = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 200.0, -200.0, 90.0, -104.0, 1.0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_and_inf_come_out_of_elementwise_ops_as_from_numpy(dtype):
    x = np.tile(STRANGE, 7).astype(dtype)
    up = np.repeat(STRANGE, 7).astype(dtype)
    with np.errstate(all="ignore"):
        pairs = [(NUMBA.swiglu(x, up), NUMPY.swiglu(x, up))]
        pairs += zip(NUMBA.swiglu_backward(up, x, x), NUMPY.swiglu_backward(up, x, x), strict=True)
        for kind in ACTIVATIONS:
            pairs.append((NUMBA.activation(x, kind), NUMPY.activation(x, kind)))
            back = [b.activation_backward(up, x, kind) for b in (NUMBA, NUMPY)]
            pairs.append(tuple(back))
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_reach_sums_norms_updates_and_softmax(bad):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, 24)).astype(np.float32)
    x[5, 7] = x[33, 20] = bad
    g = np.ones(24, np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    w, targets = np.eye(24, dtype=np.float32), np.arange(40) % 24
    q, at = x.reshape(40, 2, 12), offsets(17, 23)
    state = [np.ones_like(x) for _ in range(3)]

    def results(b):
        p, m, v = (a.copy() for a in state)
        b.adamw(p, x, m, v, 1e-3, 0.9, 0.99, 1e-8, 0.1, 2)
        normed = b.layer_norm(x, g, g, 1e-5)
        ce = b.linear_cross_entropy(x, w, targets, need_dh=True)
        return [
            p, m, v, *normed, *b.rms_norm(x, g, 1e-5),
            b.layer_norm_backward(dy, x, g, *normed[2:]),
            *b.attention(q, q, q, at, False, 0.3), np.array(b.sum_squares([x])),
            np.array(ce[0]), ce[2], *b.linear_logprobs(x, w, targets),
        ]  # fmt: skip

    with np.errstate(all="ignore"):
        for found, expected in zip(results(NUMBA), results(NUMPY), strict=True):
            assert np.array_equal(np.isnan(found), np.isnan(expected))
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_indices_out_of_bounds_raise_and_write_nothing():
    h, w = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)
    for wrong in (4, -5):
        with pytest.raises(IndexError):
            NUMBA.embedding_backward(h, np.array([0, wrong]), w)
        with pytest.raises(IndexError):
            NUMBA.linear_cross_entropy(h, w, np.array([0, wrong]))
        with pytest.raises(IndexError):
            NUMBA.linear_logprobs(h, w, np.array([0, wrong]))
    assert (w == 1).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, g: NUMBA.swiglu(x, x[:2]), r"up: expected shape \[6, 4\], found \[2, 4\]"),
        (lambda x, g: NUMBA.swiglu_backward(x[:2], x, x), "dy: expected shape"),
        (lambda x, g: NUMBA.activation_backward(x[:2], x, "gelu"), "dy: expected shape"),
        (lambda x, g: NUMBA.layer_norm(x, g[:3], None, 1e-5), r"g: expected shape \[4\]"),
        (lambda x, g: NUMBA.rms_norm(x, g, 1e-5, x[:2]), "residual: expected shape"),
        (lambda x, g: NUMBA.rms_norm_backward(x, x, g, x[:2, :1]), r"rstd: .* shape \[6, 1\]"),
        (lambda x, g: NUMBA.embedding_backward(x[:2], np.zeros(6, int), x), "dy: expected shape"),
        (lambda x, g: NUMBA.gae(g, g[:2], offsets(4), 1, 1), "values: expected shape"),
        (lambda x, g: NUMBA.linear_logprobs(x, x, np.zeros(2, int)), r"targets: .* shape \[6\]"),
        (lambda x, g: NUMBA.linear_kl(x, x, x[:2], x), "h_ref: expected shape"),
        (lambda x, g: NUMBA.adamw(x, x[:2], x, x, 0, 0, 0, 0, 0, 1), "g: expected shape"),
        (lambda x, g: NUMBA.adamw(x.T, x.T, x, x, 0, 0, 0, 0, 0, 1), "p: expected a C-contig"),
        (lambda x, g: NUMPY.sgd(x.T, x.T, None, 0.1), "p: expected a C-contiguous array"),
        (lambda x, g: heads(2, 2, [0, 6], v=3), r"v: expected shape \[6, 2, 4\], found \[3,"),
        (lambda x, g: heads(3, 2, [0, 6]), "k: 2 heads do not divide the 3 heads of q"),
        (lambda x, g: heads(2, 2, [0, 9, 6]), "offsets: expected to rise from 0 to 6"),
        (lambda x, g: NUMBA.rope(x[:, None], x[:, None], np.arange(2), g[:2]), "positions: exp"),
        (lambda x, g: NUMBA.rope(x[:, None], x[:, None], np.arange(6), g), "inv_freq: expected"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(np.ones((6, 4), np.float32), np.ones(4, np.float32))


def heads(queries, keys, at, v=6):
    q, k = np.ones((6, queries, 4), "f4"), np.ones((6, keys, 4), "f4")
    return NUMBA.attention(q, k, k[:v], np.array(at, np.int32), True, 1.0)


def test_what_is_no_numpy_array_is_refused():
    with pytest.raises(TypeError, match="expected a NumPy array, found list"):
        NUMBA.activation([1.0], "gelu")


# -- threads -----------------------------------------------------------------------------------


def many_ops(seed=4):
    """The results of every compiled op but those with products, at sizes that threads share."""
    rng, f = np.random.default_rng(seed), np.float32
    x, dy, residual = (rng.normal(size=(300, 501)).astype(f) for _ in range(3))
    g, b = (rng.normal(size=501).astype(f) for _ in range(2))
    at = offsets(150, 3, 147)
    q, k, v, up = (rng.normal(size=(300, 6, 20)).astype(f) for _ in range(4))
    options = (at, True, 0.2, None, 0.1, 7)
    y, s, mean, rstd = NUMBA.layer_norm(x, g, b, 1e-5, residual)
    sums = np.zeros((3, 501), f)
    dx = NUMBA.layer_norm_backward(dy, s, g, mean, rstd, dy, dg=sums[0], db=sums[1])
    rms = NUMBA.rms_norm(x, g, 1e-5)
    drms = NUMBA.rms_norm_backward(dy, rms[1], g, rms[2], dg=sums[2])
    attended = NUMBA.attention(q, k, v, *options)
    back = NUMBA.attention_backward(up, q, k, v, *attended, *options)
    table = np.zeros((50, 501), f)
    NUMBA.embedding_backward(dy, rng.integers(0, 50, 300), table)
    p, m, velocity = (np.abs(rng.normal(size=(700, 501))).astype(f) for _ in range(3))
    NUMBA.adamw(p, p.copy(), m, velocity, 1e-3, 0.9, 0.99, 1e-8, 0.1, 2)
    NUMBA.sgd(p, m, velocity, 0.1, 0.9, 0.01)
    total = np.array(NUMBA.sum_squares([p, x]))
    NUMBA.scale(m, 0.37)
    samples = np.arange(3, dtype=np.int32)
    elementwise = [NUMBA.activation(x, kind) for kind in ACTIVATIONS]
    elementwise += [NUMBA.activation_backward(dy, x, kind) for kind in ACTIVATIONS]
    return [
        y, s, mean, rstd, sums, dx, *rms, drms, *attended, *back, table, p, m, velocity, total,
        *elementwise, NUMBA.swiglu(x, dy), *NUMBA.swiglu_backward(dy, x, residual),
        NUMBA.dropout(x, 0.2, 5, at, samples), NUMBA.segment_mean(x, at),
        NUMBA.segment_mean_backward(x[:3], at),
        *NUMBA.rope(q, k, np.arange(300), 1.0 / np.arange(1, 6)),
    ]  # fmt: skip


def same(a, b):
    for left, right in zip(a, b, strict=True):
        assert left.tobytes() == right.tobytes()


def test_results_are_the_same_bytes_at_any_number_of_threads_and_again(monkeypatch):
    monkeypatch.setattr(numba_pool, "SMALL_WORK", 1000)
    runs = []
    for count in (1, 2, 5, 2):
        monkeypatch.setattr(threads, "_asked", count)
        runs.append(many_ops())
    for other in runs[1:]:
        same(runs[0], other)


def test_losses_are_the_same_bytes_at_any_number_of_threads(monkeypatch):
    rng = np.random.default_rng(5)
    h, w = (rng.normal(size=(n, 8)).astype(np.float32) for n in (90, 3001))
    targets, runs = rng.integers(0, 3001, 90), []
    for count in (1, 2, 5):
        monkeypatch.setattr(threads, "_asked", count)
        out = NUMBA.linear_cross_entropy(h, w, targets, need_dh=True, need_dw=True)
        kl = NUMBA.linear_kl(h, w, -h, w)
        runs.append([np.array(out[0]), *out[2:4], *NUMBA.linear_logprobs(h, w, targets), kl])
    same(runs[0], runs[1])
    same(runs[0], runs[2])


def test_four_python_threads_call_ops_at_once(monkeypatch):
    monkeypatch.setattr(numba_pool, "SMALL_WORK", 1000)
    monkeypatch.setattr(threads, "_asked", 3)
    alone = [many_ops(seed) for seed in range(4)]
    together = [None] * 4

    def work(seed):
        for _ in range(3):
            together[seed] = many_ops(seed)

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for a, b in zip(alone, together, strict=True):
        same(a, b)


def test_an_error_in_a_helper_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(threads, "_asked", 3)

    def kernel(seen, lo, hi):
        seen.append((lo, hi))
        if hi == 40:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        numba_pool.POOL.run(kernel, 40, 1 << 20, [])
    monkeypatch.setattr(threads, "_asked", 4)
    seen = []
    numba_pool.POOL.run(lambda lo, hi: seen.extend(range(lo, hi)), 41, 1 << 20)
    assert sorted(seen) == list(range(41))
    numba_pool.POOL.run(kernel, 0, 1 << 20, seen)  # nothing to do
    assert len(seen) == 41


def test_jobs_are_cut_into_pieces_of_about_one_size(monkeypatch):
    monkeypatch.setattr(threads, "_asked", 2)
    seen, lock = [], threading.Lock()

    def kernel(name, lo, hi):
        with lock:
            seen.append((name, lo, hi))

    sizes = [1, 800, 3, 90]
    runs = [numba_pool.Run(kernel, count, (name,)) for name, count in enumerate(sizes)]
    numba_pool.POOL.run_all(runs, 1 << 20)
    blocks = [(name, i) for name, lo, hi in seen for i in range(lo, hi)]
    assert sorted(blocks) == [(name, i) for name, count in enumerate(sizes) for i in range(count)]
    assert len(seen) == 11  # of 112 blocks at most
    numba_pool.POOL.run_streams(runs, 1 << 20)
    assert len(seen) == 22


def paced(pace, alone, helped, calls):
    """Return which way each call took, when they take so many seconds."""
    ways = []
    for _ in range(calls):
        ways.append(pace.helped())
        pace.took(ways[-1], helped if ways[-1] else alone)
    return ways


def test_helpers_are_asked_where_they_help():
    pace = numba_pool.Pace()
    assert paced(pace, 2.0, 1.0, 6) == [True, False] * 3
    assert paced(pace, 2.0, 1.0, 94).count(False) == 3  # tried again
    ways = paced(pace, 1.0, 1.5, 400)  # other threads have come
    assert ways[-100:].count(True) <= 4
    ways = paced(pace, 2.0, 1.0, 400)  # and are gone
    assert ways[-100:].count(False) <= 4


def test_one_disturbed_call_does_not_change_the_way():
    pace = numba_pool.Pace()
    pace.helped()
    pace.took(True, 10.0)  # compiled
    assert paced(pace, 1.5, 1.0, 40)[5:].count(False) <= 2
    while not pace.helped():
        pace.took(False, 1.5)
    pace.took(True, 10.0)
    assert pace.helped()


GUEST = """
import os, warnings
import numpy as np, numba
numba.set_num_threads(1)
import loopos
from loopos.backends import threads
loopos.set_backend("numba"); threads.set_num_threads(3)
from loopos.backends import get_backend
b, x = get_backend(), np.linspace(-3, 3, 1 << 18).astype(np.float32)
first = b.activation(x, "silu")
"""


def test_the_hosts_numba_is_left_alone():
    text = """
import numpy as np, loopos
from loopos.backends import threads
loopos.set_backend("numba"); threads.set_num_threads(3)
b = loopos.get_backend()
b.activation(np.ones(1 << 18, np.float32), "silu")
import numba
try:
    numba.threading_layer()
except ValueError:
    print("not started", end=" ")
"""
    assert script(text) == "not started"
    assert script(GUEST + "print(numba.get_num_threads())") == "1"


@pytest.mark.skipif(
    sys.platform != "linux" or threads.available_cpus() < 2, reason="needs Linux and two CPUs"
)
def test_helpers_keep_off_the_cpu_of_their_caller():
    text = """
import threading
helpers = [t.native_id for t in threading.enumerate() if t.name.startswith("loopos-")]
allowed = os.sched_getaffinity(0)
for cpu in sorted(allowed)[:2]:
    for _ in range(100):  # the system may move this thread on at once
        os.sched_setaffinity(0, {cpu})
        os.sched_setaffinity(0, allowed)
        b.activation(x, "silu")
        left = [allowed - os.sched_getaffinity(helper) for helper in helpers]
        if left == [{cpu}, {cpu}]: break
    print(left == [{cpu}, {cpu}], os.sched_getaffinity(0) == allowed)
"""
    assert script(GUEST + text).split() == ["True"] * 4


def test_a_forked_child_computes_with_threads_of_its_own():
    text = """
import sys
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    same = np.array_equal(b.activation(x, "silu"), first)
    os._exit(0 if same else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(status, np.array_equal(b.activation(x, "silu"), first))
"""
    assert script(GUEST + text) == "0 True"


# -- what is loaded, kept and told -------------------------------------------------------------


def test_numba_is_imported_by_the_first_op_only():
    text = """
import sys
from loopos import backends
from loopos.backends import numba_backend, numba_kernels, numba_attention
b = numba_backend.NumbaBackend()
names = backends.available_backends()
assert names.index("numba") < names.index("numpy")
before = "numba" in sys.modules
import numpy as np
b.scale(np.ones(3), 2.0)
print(before, "numba" in sys.modules)
"""
    assert script(text) == "False True"


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert NumbaBackend.unavailable() == "numba is not installed; pip install 'loopos[numba]'"


def test_compiled_code_is_kept_where_numba_is_told_or_nowhere(tmp_path):
    text = """
import numpy as np, loopos
{}
loopos.set_backend("numba")
x = np.ones(3, np.float32)
loopos.get_backend().scale(x, 2.0)
assert (x == 2).all()
print(loopos.get_backend().describe()["cache"])
"""
    assert script(text.format(""), NUMBA_CACHE_DIR=str(tmp_path)).startswith(str(tmp_path))
    assert list(tmp_path.rglob("*.nbc"))
    nowhere = """
from numba.core import caching
(getattr(caching, "CacheImpl", None) or caching._CacheImpl)._locator_classes = []
"""
    assert script(text.format(nowhere)).startswith("none")


def test_code_compiled_from_other_sources_is_not_taken(tmp_path):
    """numba itself looks at the file of a kernel only, not at those of the functions it calls."""
    package = tmp_path / "loopos"
    shutil.copytree(
        Path(loopos.__file__).parent, package,
        ignore=shutil.ignore_patterns("__pycache__", "assets", "*.so", "*.c*", "*.pyx"),
    )  # fmt: skip
    text = """
import numpy as np, loopos
loopos.set_backend("numba")
print(loopos.get_backend().activation(np.ones(3, np.float32), "tanh")[0] > 1)
"""
    environment = {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert script(text, **environment) == "False"
    helpers = package / "backends" / "numba_math.py"
    far = "far = -far if x < zero else far"
    source = helpers.read_text(encoding="utf-8")
    assert far in source
    helpers.write_text(source.replace(far, far + " + two"), encoding="utf-8")
    assert script(text, **environment) == "True"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the code of x86-64")
def test_scalar_functions_leave_a_loop_its_simd_code():
    text = """
import re, numba, numpy as np
from loopos.backends import numba_compile, numba_math
numba_compile.compiled()
def loop(function):
    @numba.njit(nogil=True, fastmath=numba_compile._SUMS, error_model="numpy")
    def call(x, y):
        for i in range(x.size):
            y[i] = x[i] * function(x[i])
    return call
x = np.ones(64, np.float32)
for name in numba_math.versions(np.float32, lambda f: f):
    call = loop(getattr(numba_math, name))
    call(x, x.copy())
    (code,) = call.inspect_asm().values()
    print(name, len(re.findall(r"\\bv?(?:mul|fm|fnm)\\w*ps\\b", code)) > 4)
"""
    lines = script(text).splitlines()
    assert len(lines) > 5
    assert [line for line in lines if not line.endswith("True")] == []


def test_describe():
    described = NUMBA.describe()
    assert described["name"] == "numba"
    assert described["isa"].startswith("numba ")
    assert described["threads"] == threads.get_num_threads()
    assert {"attention", "adamw", "linear_cross_entropy"} <= set(described["native"])
    assert {"linear", "sample"} <= set(described["inherited"])


@pytest.mark.parametrize("offsets", [[0, 9, 5], [2, 5], [0, -1, 5]], ids=str)
def test_offsets_that_lead_outside_are_refused(offsets):
    """Compiled code would follow them without a look."""
    offsets = np.array(offsets, np.int32)
    x, count = np.ones((5, 2, 8), np.float32), offsets.size - 1
    rows, flat, cache = x[:, 0], x[:, 0, 0], np.zeros((4, 12, 2, 8), np.float32)
    slots, lengths = np.arange(count, dtype=np.int32), np.full(count, 9, np.int32)
    for call in (
        lambda: NUMBA.segment_mean(rows, offsets),
        lambda: NUMBA.segment_mean_backward(rows[:count], offsets),
        lambda: NUMBA.discounted_sum(flat, offsets, 0.9),
        lambda: NUMBA.gae(flat, flat, offsets, 0.9, 0.9),
        lambda: NUMBA.attention_cached(x, x, x, cache, cache, offsets, slots, lengths, 1.0),
    ):
        with pytest.raises(ValueError, match="offsets: expected to rise from 0 to 5"):
            call()
    with pytest.raises(ValueError, match=rf"lengths: expected shape \[{count}\], found \[9\]"):
        NUMBA.attention_cached(x, x, x, cache, cache, offsets, slots, np.ones(9, "i4"), 1.0)


def test_a_parameter_that_may_not_be_written_is_named():
    p, other = np.ones(4, np.float32), np.ones(4, np.float32)
    p.flags.writeable = False
    for backend in (NUMBA, NUMPY):
        with pytest.raises(ValueError, match="p: expected an array that may be written"):
            backend.adamw(p, other, other.copy(), other.copy(), 0.1, 0.9, 0.999, 1e-8, 0.0, 1)
