"""Every registered backend on the one list of op cases, and the registry itself."""

import os
import subprocess
import sys
import threading
from importlib.metadata import EntryPoint

import numpy as np
import pytest

import loopos
from loopos import backends
from loopos.backends import testing, threads
from loopos.backends.numpy_backend import NumpyBackend
from loopos.backends.op_cases import BENCHMARK_CASES, CASES
from loopos.errors import BackendError, ConfigError

NAMES = backends.available_backends()
#: Backends at each of their instruction sets, where they have several.
VARIANTS = [(name, None) for name in NAMES]
if "cython" in NAMES:
    with backends.use_backend("cython") as _compiled:
        LEVELS = _compiled.levels()
    VARIANTS += [("cython", level) for level in LEVELS[1:]]


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join(filter(None, variant)))
def backend(request):
    name, level = request.param
    with backends.use_backend(name) as chosen:
        if level is not None:
            before = chosen.describe()["isa"]
            chosen.use_level(level)
        yield chosen
        if level is not None:
            chosen.use_level(before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("check", ["check_values", "check_layouts", "check_gradients"])
def test_case(backend, case, check):
    getattr(testing, check)(backend, case)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_values_at_any_number_of_threads(backend, count):
    with threads.thread_limit(count):
        for case in CASES:
            testing.check_values(backend, case)


def test_case_names_are_unique_and_every_op_has_a_case():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    covered = {case.op for case in CASES}
    forwards = {op for op in NumpyBackend.ops() if not op.endswith("_backward")}
    assert forwards == covered
    assert {case.op for case in BENCHMARK_CASES} <= covered


def test_the_suite_finds_a_wrong_forward_a_wrong_gradient_and_a_changed_input():
    class WrongForward(NumpyBackend):
        def segment_mean(self, x, offsets):
            return super().segment_mean(x, offsets) * 1.001

    class WrongGradient(NumpyBackend):
        def swiglu_backward(self, dy, gate, up):
            dgate, dup = super().swiglu_backward(dy, gate, up)
            return dgate * 1.0001, dup

    class Overwrites(NumpyBackend):
        def swiglu(self, gate, up):
            gate += 0.0
            return super().swiglu(gate, up)

    for broken, message in (
        (WrongForward, r"segment_mean.*relative error"),
        (WrongGradient, r"swiglu.*relative error"),
        (Overwrites, r"read-only"),
    ):
        with pytest.raises((AssertionError, ValueError), match=message):
            testing.check_backend(broken())


def test_gradient_check_alone_finds_a_gradient_that_is_off_by_1e4():
    class Off(NumpyBackend):
        def swiglu_backward(self, dy, gate, up):
            dgate, dup = super().swiglu_backward(dy, gate, up)
            return dgate * 1.0001, dup

    case = next(c for c in CASES if c.op == "swiglu")
    testing.check_gradients(NumpyBackend(), case)
    with pytest.raises(AssertionError, match="gradient off"):
        testing.check_gradients(Off(), case)


def test_describe_lists_native_and_inherited_ops():
    class Half(NumpyBackend):
        name = "half"

        def swiglu(self, gate, up):
            return super().swiglu(gate, up)

    described = Half().describe()
    assert described["name"] == "half"
    assert described["native"] == ["swiglu"]
    assert "linear" in described["inherited"]
    assert described["threads"] >= 1
    reference = NumpyBackend().describe()
    assert reference["inherited"] == []
    assert reference["native"] == NumpyBackend.ops()
    assert reference["isa"]


# -- selection -------------------------------------------------------------------------------


@pytest.fixture
def second_backend(monkeypatch):
    """An out-of-tree backend, offered through the entry-point group."""

    class Second(NumpyBackend):
        name = "second"

    class Unable(NumpyBackend):
        name = "unable"

        @classmethod
        def unavailable(cls):
            return "it needs a CPU with seven legs"

    module = type(sys)("outside_backends")
    module.Second, module.Unable = Second, Unable
    monkeypatch.setitem(sys.modules, "outside_backends", module)
    points = {
        name: EntryPoint(name, f"outside_backends:{cls}", backends.ENTRY_POINT_GROUP)
        for name, cls in (("second", "Second"), ("unable", "Unable"), ("gone", "Nowhere"))
    }
    monkeypatch.setattr(backends, "_entry_points", lambda: points)
    numpy = {"numpy": backends._BUILT_IN["numpy"]}
    monkeypatch.setattr(backends, "_BUILT_IN", numpy)  # whatever else can run here
    monkeypatch.setattr(backends, "_instances", {})
    monkeypatch.setattr(backends, "_default", None)
    return Second


def test_entry_points_add_backends(second_backend):
    assert backends.available_backends() == ["numpy", "second"]
    assert backends.unavailable_backends()["unable"] == "it needs a CPU with seven legs"
    assert "cannot be loaded" in backends.unavailable_backends()["gone"]
    loopos.set_backend("second")
    assert isinstance(loopos.get_backend(), second_backend)


def test_a_failed_switch_leaves_the_choice_alone(second_backend):
    loopos.set_backend("second")
    with pytest.raises(BackendError, match=r"unknown backend 'nunpy'; did you mean 'numpy'\?"):
        loopos.set_backend("nunpy")
    with pytest.raises(BackendError, match="seven legs"):
        loopos.set_backend("unable")
    assert loopos.get_backend().name == "second"
    with pytest.raises(BackendError), loopos.use_backend("nunpy"):
        pass
    assert loopos.get_backend().name == "second"


def test_use_backend_is_local_to_its_context(second_backend):
    seen = []
    with loopos.use_backend("second"):
        thread = threading.Thread(target=lambda: seen.append(loopos.get_backend().name))
        thread.start()
        thread.join()
        with loopos.use_backend("numpy"):
            seen.append(loopos.get_backend().name)
        seen.append(loopos.get_backend().name)
    seen.append(loopos.get_backend().name)
    assert seen == ["numpy", "numpy", "second", "numpy"]


def test_environment_variable_and_empty_means_unset(second_backend, monkeypatch):
    monkeypatch.setenv("LOOPOS_BACKEND", "second")
    assert loopos.get_backend().name == "second"
    monkeypatch.setattr(backends, "_default", None)
    monkeypatch.setenv("LOOPOS_BACKEND", "")
    assert loopos.get_backend().name == "numpy"
    monkeypatch.setattr(backends, "_default", None)
    monkeypatch.setenv("LOOPOS_BACKEND", "no-such")
    with pytest.raises(BackendError, match="no-such"):
        loopos.get_backend()


def test_auto_is_the_first_available(second_backend):
    loopos.set_backend("second")
    loopos.set_backend("auto")
    assert loopos.get_backend().name == backends.available_backends()[0]


def test_two_names_of_one_row_both_count(backend):
    table = np.zeros((5, 3), np.float32)
    backend.embedding_backward(np.ones((3, 3), np.float32), np.array([-1, 4, 1]), table)
    np.testing.assert_array_equal(table[:, 0], [0, 1, 0, 0, 2])


def test_attention_of_what_is_not_finite_reaches_what_sees_it_alone(backend):
    """A NaN is in its own row, and in the gradients of the values that it sees."""
    rng = np.random.default_rng(0)
    q, k, v, dy = (rng.standard_normal((200, 2, 16)).astype(np.float32) for _ in range(4))
    offsets = np.array([0, 200], np.int32)
    q[100] = np.nan
    for window, first in ((None, 0), (7, 94)):
        with np.errstate(invalid="ignore"):
            y, lse = backend.attention(q, k, v, offsets, True, 0.25, window)[:2]
            *_, dv = backend.attention_backward(dy, q, k, v, y, lse, offsets, True, 0.25, window)
        np.testing.assert_array_equal(np.flatnonzero(np.isnan(y).any((1, 2))), [100])
        np.testing.assert_array_equal(
            np.flatnonzero(np.isnan(dv).any((1, 2))), np.arange(first, 101)
        )
    hidden = np.abs(rng.standard_normal((300, 1, 8))).astype(np.float32)
    keys = hidden.copy()
    keys[:130, 0, 0] = -np.inf  # a whole block of them, whose scores are all -inf
    with np.errstate(invalid="ignore"):
        y, _ = backend.attention(hidden, keys, hidden, np.array([0, 300]), True, 0.25)[:2]
    np.testing.assert_array_equal(np.isnan(y).any((1, 2)), np.arange(300) < 130)


# -- threads and import ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_class_that_is_ruled_out_costs_nothing_where_it_is_not_wanted(backend, dtype):
    logits = np.array([[0.0, -np.inf, 1.0], [2.0, 2.0, -np.inf]], dtype)
    total, count, dlogits = backend.cross_entropy(logits, np.array([2, 0]))
    assert count == 2
    np.testing.assert_allclose(total, np.log(1 + np.exp(-1)) + np.log(2), rtol=1e-6)
    p = 1 / (1 + np.e)
    np.testing.assert_allclose(dlogits, [[p, 0, -p], [-0.5, 0.5, 0]], rtol=1e-6)
    assert backend.cross_entropy(logits, np.array([1, 2]))[0] == np.inf
    assert backend.cross_entropy(logits, np.array([2, 0]), None, 0.1)[0] == np.inf


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_token_of_probability_zero_adds_nothing_to_entropy_and_divergence(backend, dtype):
    rng = np.random.default_rng(0)
    h, h_ref = (rng.standard_normal((5, 8)).astype(dtype) for _ in range(2))
    w, w_ref = (rng.standard_normal((41, 8)).astype(dtype) for _ in range(2))
    up = rng.standard_normal(5).astype(dtype)
    left = np.setdiff1d(np.arange(41), [0, 7, 16, 40])
    targets = np.array([1, 2, 8, 39, 17], np.int32)
    b = np.full(41, -np.inf, dtype)
    b[left] = 0  # what is left is a smaller vocabulary
    fewer = np.searchsorted(left, targets).astype(np.int32)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == np.float32 else {"rtol": 1e-9}

    found = backend.linear_logprobs(h, w, targets, 0.7, b)
    expected = backend.linear_logprobs(h, w[left], fewer, 0.7)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **close)
    dw, part = np.zeros_like(w), np.zeros_like(w[left])
    dh = backend.linear_logprobs_backward(up, up, h, w, targets, *found[1:], 0.7, b, dw=dw)
    dh_part = backend.linear_logprobs_backward(
        up, up, h, w[left], fewer, *expected[1:], 0.7, dw=part
    )
    np.testing.assert_allclose(dh, dh_part, **close)
    np.testing.assert_allclose(dw[left], part, **close)
    assert not np.delete(dw, left, axis=0).any()

    # By the reference too it has probability 0, or it has not: then the others share less.
    for b_ref in (b, None):
        kl = backend.linear_kl(h, w, h_ref, w_ref, 0.7, b, b_ref)
        logits = h_ref.astype(np.float64) @ w_ref.T / 0.7
        lost = np.log(np.exp(logits).sum(axis=1) / np.exp(logits[:, left]).sum(axis=1))
        kl_part = backend.linear_kl(h, w[left], h_ref, w_ref[left], 0.7)
        np.testing.assert_allclose(kl, kl_part + (0 if b_ref is b else lost), **close)
        dw, part = np.zeros_like(w), np.zeros_like(w[left])
        dh = backend.linear_kl_backward(up, kl, h, w, h_ref, w_ref, 0.7, b, b_ref, dw=dw)
        dh_part = backend.linear_kl_backward(
            up, kl_part, h, w[left], h_ref, w_ref[left], 0.7, dw=part
        )
        np.testing.assert_allclose(dh, dh_part, **close)
        np.testing.assert_allclose(dw[left], part, **close)
        assert not np.delete(dw, left, axis=0).any()
    # What the reference alone rules out is infinitely far from it.
    assert np.isposinf(backend.linear_kl(h, w, h_ref, w_ref, 0.7, None, b)).all()


@pytest.mark.parametrize("rows", [0, 3, 50])
def test_gradients_of_a_head_overwrite_what_a_buffer_holds(backend, rows, monkeypatch):
    for module in ("numpy_losses", "cython_losses"):  # several chunks
        monkeypatch.setattr(f"loopos.backends.{module}._LOGIT_ELEMENTS", 20 * 41)
    rng = np.random.default_rng(0)
    h, h_ref = (rng.standard_normal((rows, 8)).astype("f") for _ in range(2))
    w, w_ref = (rng.standard_normal((41, 8)).astype("f") for _ in range(2))
    up, targets = rng.standard_normal(rows).astype("f"), rng.integers(0, 41, rows).astype(np.int32)
    _, entropy, lse = backend.linear_logprobs(h, w, targets)
    kl = backend.linear_kl(h, w, h_ref, w_ref)
    for backward, given in (
        (backend.linear_logprobs_backward, (up, up, h, w, targets, entropy, lse)),
        (backend.linear_kl_backward, (up, kl, h, w, h_ref, w_ref)),
    ):
        added, written = np.zeros_like(w), np.full_like(w, np.nan)
        backward(*given, dw=added)
        backward(*given, dw=written, accumulate=False)
        np.testing.assert_array_equal(written, added)
        assert added.any() == (rows > 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("window", "error", "words"),
    [
        (0, ValueError, "window: expected at least 1, found 0"),
        (-3, ValueError, "window: expected at least 1, found -3"),
        (2.5, TypeError, r"window: expected a whole number or None, found 2\.5"),
        (True, TypeError, "window: expected a whole number or None, found True"),
    ],
)
def test_a_window_that_is_none_is_refused(backend, dtype, window, error, words):
    x, offsets = np.ones((3, 2, 4), dtype), np.array([0, 3], np.int32)
    y, lse = backend.attention(x, x, x, offsets, True, 0.5, np.int64(2))
    cache, slots, lengths = np.ones((1, 5, 2, 4), dtype), offsets[:1], offsets[1:]
    for call in (
        lambda: backend.attention(x, x, x, offsets, True, 0.5, window),
        lambda: backend.attention_backward(x, x, x, x, y, lse, offsets, True, 0.5, window),
        lambda: backend.attention_cached(
            x, x, x, cache, cache, offsets, slots, lengths, 0.5, window
        ),
    ):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_targets_that_are_no_integers_are_refused(backend, dtype):
    h, w, targets = np.ones((2, 3), dtype), np.ones((5, 3), dtype), np.zeros(2, np.float64)
    for call in (backend.linear_cross_entropy, backend.linear_logprobs):
        with pytest.raises((TypeError, IndexError), match="integer"):
            call(h, w, targets)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        ((3, 3), ValueError, r"sizes: expected 4 columns in all, found \[3, 3\]"),
        ((2, -1, 3), ValueError, "sizes: expected 4 columns in all"),
        ((), ValueError, "sizes: expected 4 columns in all"),
        (np.array([200, 60], np.uint8), ValueError, "sizes: expected 4 columns in all"),
        ((1.5, 2.5), TypeError, "sizes: expected whole numbers"),
        (4, TypeError, "sizes: expected whole numbers, found 4"),
        (None, TypeError, "sizes: expected whole numbers, found None"),
        (("2", 2), TypeError, "sizes: expected whole numbers"),
    ],
)
def test_columns_are_split_into_all_of_them(backend, dtype, sizes, error, words):
    x = np.arange(12, dtype=dtype).reshape(3, 4)
    with pytest.raises(error, match=words):
        backend.split_columns(x, sizes)
    with pytest.raises(ValueError, match=r"x: expected shape \[any, any\], found \[4\]"):
        backend.split_columns(x[0], (2, 2))
    for good in ((3, 1), [np.int8(3), 0, 1], iter((4,))):
        parts = backend.split_columns(x, good)
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), x)
        assert not any(np.shares_memory(part, x) for part in parts)


def test_thread_limit_holds_inside_the_block_only():
    before = threads.blas().num_threads
    with threads.thread_limit(1):
        assert threads.blas().num_threads == 1
    assert threads.blas().num_threads == before
    with pytest.raises(ConfigError, match="num_threads"), threads.thread_limit(0):
        pass


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2", 10**30])
def test_a_number_of_threads_is_checked_before_it_holds(wrong):
    before = threads.get_num_threads()
    with pytest.raises(ConfigError, match="num_threads: expected"):
        loopos.set_num_threads(wrong)
    assert threads.get_num_threads() == before


def test_available_cpus_respects_the_environment(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    everything = threads.available_cpus()
    assert 1 <= everything <= os.cpu_count()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads.available_cpus() == 1
    assert threads.ignored_environment() is None
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert threads.available_cpus() == everything
    assert threads.ignored_environment() is None
    for wrong in ("abc", "0", "-1", "\u00b2"):
        monkeypatch.setenv("OMP_NUM_THREADS", wrong)
        assert threads.available_cpus() == everything
        assert threads.ignored_environment() == (
            f"OMP_NUM_THREADS: expected a whole number of at least 1, found '{wrong}'"
        )


@pytest.mark.parametrize(
    ("files", "own", "cpus"),
    [
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({}, "0::/", None),
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 3.0),
        ({"a/cpu.max": "100000 100000", "a/b/cpu.max": "400000 100000"}, "0::/a/b", 1.0),
        ({"cpu.max": "200000 100000"}, "0::/of/the/host", 2.0),
        (
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000\n",
             "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
            "3:memory:/a\n2:cpu,cpuacct:/a", 0.5,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "2:cpu:/", None),
    ],
)  # fmt: skip
def test_quota_of_the_control_group(tmp_path, monkeypatch, files, own, cpus):
    for name, text in files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text)
    (tmp_path / "own").write_text(own + "\n")
    found = threads._cgroup_cpus(tmp_path / "tree", tmp_path / "own")
    assert found == cpus
    assert threads._cgroup_cpus(tmp_path / "tree", tmp_path / "absent") is None
    monkeypatch.setattr(threads, "_cgroup_cpus", lambda: cpus)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if cpus is not None:
        assert 1 <= threads.available_cpus() <= max(1, int(cpus))


def test_import_is_light_and_changes_nothing_of_the_host():
    script = """
import sys, random, signal
import numpy as np
np.random.seed(7); random.seed(7)
state, handler, errors = np.random.get_state()[1].copy(), signal.getsignal(2), np.geterr()
import loopos
loopos.Transformer, loopos.FineTuner, loopos.get_backend()
heavy = {"numba", "torch", "pydantic", "rich", "typer", "tensorboard", "yaml"} & set(sys.modules)
assert not heavy, heavy
assert np.array_equal(state, np.random.get_state()[1])
assert signal.getsignal(2) is handler and np.geterr() == errors
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_plain_import_loads_neither_scipy_nor_tokenizers():
    script = (
        "import sys, loopos; print(sorted({'scipy', 'tokenizers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


def test_dropout_keeps_the_promised_share_and_ignores_the_split():
    backend = NumpyBackend()
    x = np.ones((4096, 64))
    offsets = np.array([0, 1000, 4096], dtype=np.int32)
    samples = np.array([3, 9], dtype=np.int32)
    whole = backend.dropout(x, 0.25, 77, offsets, samples)
    kept = np.count_nonzero(whole) / whole.size
    assert abs(kept - 0.75) < 4 * np.sqrt(0.25 * 0.75 / whole.size)
    assert set(np.unique(whole)) == {0.0, 1 / 0.75}
    alone = backend.dropout(
        x[1000:], 0.25, 77, np.array([0, 3096], np.int32), np.array([9], np.int32)
    )
    assert np.array_equal(alone, whole[1000:])
    assert not np.array_equal(whole, backend.dropout(x, 0.25, 78, offsets, samples))


def test_attention_dropout_does_not_depend_on_the_split_of_the_batch():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(12, 2, 4)) for _ in range(3))
    backend = NumpyBackend()
    args = (True, 0.5, None, 0.4, 5)
    both, _ = backend.attention(
        q, k, v, np.array([0, 7, 12], np.int32), *args, np.array([4, 2], np.int32)
    )
    second, _ = backend.attention(
        q[7:], k[7:], v[7:], np.array([0, 5], np.int32), *args, np.array([2], np.int32)
    )
    np.testing.assert_allclose(both[7:], second, rtol=0, atol=1e-15)
    plain, _ = backend.attention(q, k, v, np.array([0, 7, 12], np.int32), True, 0.5)
    assert np.abs(plain - both).max() > 0.01


def test_attention_by_blocks_equals_attention_at_once(monkeypatch):
    rng = np.random.default_rng(1)
    q, k, v, dy = (rng.normal(size=(50, 4, 8)) for _ in range(4))
    offsets = np.array([0, 37, 50], np.int32)
    backend = NumpyBackend()
    for causal, window in ((True, None), (False, None), (True, 5), (False, 5)):
        args = (offsets, causal, 0.3, window)
        y, lse = backend.attention(q, k, v, *args)
        grads = backend.attention_backward(dy, q, k, v, y, lse, *args)
        monkeypatch.setattr("loopos.backends.numpy_attention._SCORE_ELEMENTS", 400)
        y2, lse2 = backend.attention(q, k, v, *args)
        grads2 = backend.attention_backward(dy, q, k, v, y, lse, *args)
        monkeypatch.undo()
        for a, b in zip((y, lse, *grads), (y2, lse2, *grads2), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_chunked_losses_equal_whole_ones(monkeypatch):
    rng = np.random.default_rng(2)
    h, w = rng.normal(size=(100, 8)), rng.normal(size=(40, 8))
    targets = rng.integers(0, 40, 100)
    backend = NumpyBackend()
    need = {"need_dh": True, "need_dw": True, "need_db": False}
    whole = backend.linear_cross_entropy(h, w, targets, **need)
    monkeypatch.setattr("loopos.backends.numpy_losses._LOGIT_ELEMENTS", 16 * 40)
    parts = backend.linear_cross_entropy(h, w, targets, **need)
    for a, b in zip(whole[:4], parts[:4], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_gae_golden():
    values = np.array([0.0, 0, 0, 1])
    advantages, returns = NumpyBackend().gae(
        values, values, np.array([0, 4], np.int32), gamma=0.9, lam=0.95
    )
    np.testing.assert_allclose(advantages, [0.65792250, 0.7695, 0.9, 0], atol=1e-6)
    np.testing.assert_allclose(returns, [0.65792250, 0.7695, 0.9, 1], atol=1e-6)


def test_sample_follows_the_distribution_and_reports_untruncated_logp():
    rng = np.random.default_rng(3)
    logits = np.array([[2.0, 1.0, 0.0, -1.0, -3.0]])
    draws = 100_000
    u = rng.uniform(size=draws)
    tiled = np.repeat(logits, draws, axis=0)
    for options in ((1.0, 0, 1.0, 0.0), (0.7, 3, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (2.0, 0, 1.0, 0.3)):
        t, top_k, top_p, min_p = options
        p = np.exp(logits[0] / t)
        p /= p.sum()
        kept = p.copy()
        if top_k:
            kept[top_k:] = 0
        if top_p < 1:
            kept[np.cumsum(kept) - kept >= top_p] = 0
        kept[kept < min_p * kept.max()] = 0
        expected = kept / kept.sum()
        ids, logp = NumpyBackend().sample(tiled, *options, u)
        counts = np.bincount(ids, minlength=5)
        assert np.all(counts[expected == 0] == 0)
        live = expected > 0
        chi2 = np.sum((counts[live] - draws * expected[live]) ** 2 / (draws * expected[live]))
        assert chi2 < 25, (options, counts, expected)
        np.testing.assert_allclose(logp, np.log(p)[ids], atol=1e-12)
    greedy, _ = NumpyBackend().sample(tiled[:3], 0.0, 0, 1.0, 0.0, u[:3])
    assert greedy.tolist() == [0, 0, 0]
