"""What the doors of the compiled kernels turn away: errors that name the argument, no crash.

And what is not a number goes through every op as it does through NumPy's.
"""

import subprocess
import sys

import numpy as np
import pytest

import loopos
from loopos.backends.numpy_backend import NumpyBackend
from loopos.backends.op_cases import CASES
from loopos.backends.testing import make_inputs, run_case

if "cython" not in loopos.available_backends():
    pytest.skip("the compiled kernels are not there", allow_module_level=True)

from loopos._ext import kernels
from loopos.backends.cython_backend import CythonBackend

NATIVE = set(CythonBackend().describe()["native"])
#: Attention skips what a mask hides (tests/test_cython_attention.py); quantize rounds to integers.
NATIVE_CASES = [case for case in CASES if case.op in NATIVE - {"quantize"}
                and not case.op.startswith("attention")]  # fmt: skip

# In a process of its own: a kernel at fault ends it, and the last line printed is the case.
SCRIPT = """
import re
import numpy as np
from loopos import use_backend
from loopos.backends.op_cases import CASES
from loopos.backends.testing import make_inputs

class Foreign:
    '''An array of another library: its memory may lie on another device.'''
    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.ndim, self.size = array.ndim, array.size
        self.__cuda_array_interface__ = array.__array_interface__
    def __len__(self):
        return len(self.array)
    def __getitem__(self, index):
        return Foreign(self.array[index])
    def reshape(self, *shape):
        return Foreign(self.array.reshape(*shape))
    def __dlpack__(self):
        raise AssertionError("asked for the memory of another device")
    def __dlpack_device__(self):
        return (2, 0)

WRONG = {
    "none": lambda a: None,
    "list": lambda a: a.tolist(),
    "foreign": Foreign,
    "float16": lambda a: a.astype(np.float16),
    "complex": lambda a: a.astype(np.complex64),
    "objects": lambda a: a.astype(object),
    "bytes swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "one axis": lambda a: a.reshape(-1),
    "an axis more": lambda a: a[..., None],
    "nothing": lambda a: a[:0],
    "a row less": lambda a: a[:-1],
    "a column less": lambda a: a[..., :-1],
}
REFUSED = ("float16", "complex", "objects", "bytes swapped")
SAID = re.compile(r"^[a-z_]+: ")

def attempt(what, kind, call):
    print(what, flush=True)
    try:
        return call()
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        named = SAID.match(str(error)) is not None
        # Weights that are rounded, and those of tokens, may be floats of any size.
        rounds = kind in ("float16", "bytes swapped") and (": w," in what or ": weights" in what)
        if kind == "foreign" or (kind in REFUSED and not rounds):
            assert named and isinstance(error, TypeError), f"{what}: {error!r}"
        return None

with use_backend("cython") as backend:
    native = set(backend.describe()["native"])
    for case in CASES:
        if case.op not in native or case.op == "quantize":
            continue
        inputs = make_inputs(case, np.float32)
        good = case.forward(backend, inputs)
        floats = [n for n, v in inputs.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"]
        for name in floats:
            for kind, change in WRONG.items():
                if inputs[name].ndim == 0 or inputs[name].dtype != np.float32:
                    continue
                given = make_inputs(case, np.float32)
                given |= {name: change(given[name])}
                what = f"{case.name}: {name}, {kind}"
                attempt(what, kind, lambda: case.forward(backend, given))
        for i in range(case.differentiable if case.backward else 0):
            up = [np.ones(np.shape(out), np.float32) for out in good[: case.differentiable]]
            if up[i].ndim == 0 or f"{case.op}_backward" not in native:
                continue
            for kind, change in WRONG.items():
                wrong = [*up[:i], change(up[i]), *up[i + 1 :]]
                what = f"{case.name}: upstream {i}, {kind}"
                attempt(what, kind, lambda: case.backward(backend, inputs, good, wrong))
print("no crash")
"""


def test_whatever_is_given_for_an_array_is_an_error_and_no_crash():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    last = done.stdout.splitlines()[-1:]
    assert (done.returncode, last) == (0, ["no crash"]), f"{last}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: kernels.linear(None, np.ones((2, 2), "f4"), None, None, 1), "x"),
        (lambda: kernels.linear(np.ones((2, 2), "f4"), None, None, None, 1), "w"),
        (lambda: kernels.linear_dw(np.ones((2, 2), "f4"), None, np.ones((2, 2), "f4"), 0, 1), "x"),
        (lambda: kernels.column_sums(np.ones((2, 2), "f4"), None, 1), "db"),
        (lambda: kernels.sample(None, 1, 0, 1, 0, np.ones(2), 1), "z"),
        (lambda: kernels.take_rows(None, np.zeros(2, "i4"), 1), "table"),
        (lambda: kernels.kl_rows(np.ones((2, 2), "f4"), None, 1, 1), "z_ref"),
        (lambda: kernels.norm(np.ones((2, 2), "f4"), None, None, None, True, 1e-5, 1), "g"),
        (
            lambda: kernels.norm_backward(
                np.ones((2, 2), "f4"), np.ones((2, 2), "f4"), np.ones(2, "f4"), None, None, None,
                None, None, True, 1,
            ),
            "rstd",
        ),
    ],
)  # fmt: skip
def test_none_is_refused_where_an_array_is_needed(call, name):
    with pytest.raises(TypeError, match=rf"^{name}: expected a NumPy array of float32, found None"):
        call()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda b, h, w: b.linear_logprobs(h, w, np.zeros(2, "i4")), ValueError,
         r"targets: expected shape \[3\], found \[2\]"),
        (lambda b, h, w: b.linear_cross_entropy(h, w, [0, 1, 2]), TypeError, "targets: expected a"),
        (lambda b, h, w: b.linear_cross_entropy(h, w, np.zeros(3)), TypeError,
         "targets: expected an array of integers, found float64"),
        (lambda b, h, w: b.embedding(np.array([2**40]), w), ValueError, "rows: some do not fit"),
        (lambda b, h, w: b.linear(h, w, activation="gelo"), loopos.LooposError, "did you mean"),
        (lambda b, h, w: b.linear_kl(h, w, h[:2], w), ValueError, "z_ref: expected shape"),
        (lambda b, h, w: kernels.split_columns(w, [3, 2], 1), ValueError,
         r"sizes: expected 4 columns in all, found \[3, 2\]"),
        (lambda b, h, w: kernels.split_columns(w, [2.0, 2], 1), TypeError, "integer"),
        (lambda b, h, w: b.sgd(w, w[:2], None, 0.1), ValueError, r"g: expected shape \[5, 4\]"),
        (lambda b, h, w: b.sgd(w.T, w.T, None, 0.1), ValueError, "p: expected a C-contiguous"),
        (lambda b, h, w: b.adamw(w.T, w.T, w.T, w.T, 0, 0, 0, 0, 0, 1), ValueError,
         "p: expected a C-contiguous"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, error, words):
    h, w = np.ones((3, 4), np.float32), np.ones((5, 4), np.float32)
    with pytest.raises(error, match=words):
        call(CythonBackend(), h, w)


@pytest.mark.parametrize("rows", [4, 400])
def test_no_thread_at_all_is_the_caller_alone(rows):
    """Of the functions that C calls too; a division by it would end the process."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((n, 300)).astype(np.float32) for n in (rows, 4000))
    for threads in (0, -1):
        found, alone = (kernels.linear(x, w, None, None, n)[0] for n in (threads, 1))
        np.testing.assert_array_equal(found, alone)
    packed = CythonBackend().quantize(w, "int8")
    found, expected = (
        kernels.linear_packed(x, packed.panels, 4000, 300, packed.scales, None, None, threads)
        for threads in (0, 1)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.fixture(params=kernels.levels())
def backend(request):
    before = kernels.level()
    chosen = CythonBackend()
    chosen.use_level(request.param)
    yield chosen
    chosen.use_level(before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", NATIVE_CASES, ids=lambda case: case.name)
def test_nan_goes_where_it_goes_in_numpy(backend, case):
    plain = make_inputs(case, np.float32)
    for name, value in plain.items():
        if not isinstance(value, np.ndarray) or value.dtype != np.float32 or not value.size:
            continue
        if name == "w" and "int8" in case.name:  # int8 has no NaN: refused when it is rounded
            continue
        results = []
        for chosen in (backend, NumpyBackend()):
            inputs = make_inputs(case, np.float32)
            inputs[name].reshape(-1)[value.size // 2] = np.nan
            results.append(run_case(chosen, case, inputs))
        for key, expected in results[1].items():
            found = np.isnan(results[0][key])
            np.testing.assert_array_equal(found, np.isnan(expected), f"NaN in {name}: {key}")


# -- divergences, whose rows are long -------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocabulary", [1, 15, 333, 2000])
def test_divergences_over_the_vocabulary(backend, vocabulary, temperature, monkeypatch):
    rng = np.random.default_rng(vocabulary)
    h, h_ref = rng.normal(size=(2, 40, 24))
    w, w_ref = rng.normal(size=(2, vocabulary, 24))
    b, b_ref = rng.normal(size=(2, vocabulary))
    dkl = rng.normal(size=40)
    wide = (h, w, h_ref, w_ref, temperature, b, b_ref)
    narrow = [a.astype(np.float32) if isinstance(a, np.ndarray) else a for a in wide]
    kl = NumpyBackend().linear_kl(*wide)
    found = backend.linear_kl(*narrow)
    np.testing.assert_allclose(found, kl, rtol=1e-5, atol=1e-5)
    sums = [[np.zeros_like(a) for a in side[1::4]] for side in (wide, narrow)]  # of w and b
    exact = NumpyBackend().linear_kl_backward(dkl, kl, *wide, dw=sums[0][0], db=sums[0][1])
    monkeypatch.setattr("loopos.backends.cython_losses._LOGIT_ELEMENTS", 30 * vocabulary)
    dh = backend.linear_kl_backward(
        dkl.astype(np.float32), found, *narrow, dw=sums[1][0], db=sums[1][1]
    )
    for value, reference in zip((dh, *sums[1]), (exact, *sums[0]), strict=True):
        scale = np.abs(reference).max(initial=1)
        np.testing.assert_allclose(value, reference, rtol=0, atol=2e-5 * scale)


def test_a_divergence_from_itself_is_exactly_nothing(backend):
    h, w = np.random.default_rng(0).normal(size=(2, 9, 24)).astype(np.float32)
    assert backend.linear_kl(h, w, h, w).tolist() == [0] * 9
    assert not backend.linear_kl_backward(np.ones(9, "f4"), np.zeros(9, "f4"), h, w, h, w).any()


def test_bytes_of_divergences_and_of_sgd_do_not_depend_on_threads(backend):
    rng = np.random.default_rng(1)
    h, h_ref, w = (rng.normal(size=(n, 64)).astype("f4") for n in (70, 70, 2000))
    results = []
    for threads in (1, 2, 5):
        with loopos.backends.threads.thread_limit(threads):
            kl = backend.linear_kl(h, w, h_ref, w)
            dw, p, m = np.zeros_like(w), w.copy(), w.copy()
            dh = backend.linear_kl_backward(kl, kl, h, w, h_ref, w, dw=dw)
            backend.sgd(p, w, m, 0.1, 0.9, 0.01, nesterov=True)
        results.append([a.tobytes() for a in (kl, dh, dw, p, m)])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("columns", [1, 7, 64, 200])
def test_a_loss_and_its_gradient_at_once_are_those_one_by_one(backend, columns):
    rng = np.random.default_rng(columns)
    z = (30 * rng.standard_normal((9, columns))).astype(np.float32)
    z[3, columns // 2] = -np.inf
    targets, dlogp = rng.integers(0, columns, 9).astype(np.int32), rng.random(9).astype("f4")
    targets[3] = (columns // 2 + 1) % columns
    dlogp[5] = 0
    logp, lse, _ = kernels.loss_rows(z, targets, 0.7, False, 2)
    one, other = z.copy(), z.copy()
    kernels.loss_rows_gradient(one, targets, 0.7, dlogp, lse, None, None, 2)
    at_once = kernels.loss_rows(other, targets, 0.7, False, 2, dlogp)
    np.testing.assert_array_equal(at_once[:2], (logp, lse))
    if columns > 1:
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
        exact = np.exp(0.7 * z.astype("f8") - lse[:, None].astype("f8")) * -0.7 * dlogp[:, None]
        exact[np.arange(9), targets] += 0.7 * dlogp
        np.testing.assert_allclose(other, exact, atol=3e-6)
    with pytest.raises(ValueError, match="dlogp: expected None where the entropy is wanted"):
        kernels.loss_rows(other, targets, 0.7, True, 2, dlogp)
    with pytest.raises(ValueError, match=r"dlogp: expected shape \[9\]"):
        kernels.loss_rows(other, targets, 0.7, False, 2, dlogp[:3])
