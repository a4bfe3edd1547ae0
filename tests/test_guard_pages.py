"""No kernel reads or writes beside its arrays: inputs lie against pages that may not be touched.

Outputs lie in memory of the kernels' own; CI runs this file on kernels that were built with the
address sanitizer, which watches those.
"""

import subprocess
import sys

import pytest

from loopos.backends import available_backends, use_backend

LEVELS = []
if "cython" in available_backends():
    with use_backend("cython") as compiled:
        LEVELS = compiled.levels()

# In a process of its own: a kernel at fault ends it, and the last name printed is the case.
SCRIPT = """
import ctypes, mmap, sys
import numpy as np
from loopos import set_num_threads, use_backend
from loopos.backends import op_cases
from loopos.backends.testing import make_inputs

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
AT_END = sys.argv[2] == "end"


def guarded(array):
    '''A copy whose last byte, or first, touches a page that may not be touched.'''
    if not isinstance(array, np.ndarray):
        return array
    pages = -(-array.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (0, pages + 1):
        if libc.mprotect(address + guard * PAGE, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE * (pages + 1) - array.nbytes if AT_END else PAGE
    copy = np.ndarray(array.shape, array.dtype, memory, offset)
    copy[...] = array
    return copy


def zeros(a, *names):
    return {f"d{name}": guarded(np.zeros_like(a[name], order="C")) for name in names}


def run(backend, case, inputs):
    outputs = [guarded(out) for out in case.forward(backend, inputs)]
    result = {f"out{i}": out for i, out in enumerate(outputs) if out is not None}
    if case.backward is not None:
        rng = np.random.default_rng(1)
        upstream = [guarded(np.asarray(rng.normal(size=np.shape(outputs[i])), np.float32))
                    for i in range(case.differentiable)]
        result |= case.backward(backend, inputs, outputs, upstream)
    return result


plain = op_cases._zeros
with use_backend("cython") as backend:
    backend.use_level(sys.argv[1])
    set_num_threads(2)
    native = set(backend.describe()["native"])
    for case in op_cases.CASES:
        print(case.name, flush=True)
        keep = guarded
        guarded, op_cases._zeros = (lambda array: array), plain
        expected = run(backend, case, make_inputs(case, np.float32))
        guarded, op_cases._zeros = keep, zeros
        inputs = {name: guarded(value) for name, value in make_inputs(case, np.float32).items()}
        found = run(backend, case, inputs)
        for name, value in expected.items():
            same = np.array_equal(found[name], value)
            # NumPy's loops, which some ops inherit, may sum in another order at an odd address.
            own = case.op in native and (name[:3] == "out" or case.op + "_backward" in native)
            if not own:
                same = np.allclose(found[name], value, rtol=1e-5, atol=1e-5)
            assert same, f"{case.name} {name}: another result at another address"
print("all cases hold")
"""


@pytest.mark.skipif(not LEVELS, reason="the cython backend cannot run here")
@pytest.mark.skipif(sys.platform != "linux", reason="protects pages through Linux' C library")
@pytest.mark.parametrize("place", ["end", "start"])
@pytest.mark.parametrize("level", LEVELS)
def test_no_case_touches_what_lies_beside_its_arrays(level, place):
    done = subprocess.run([sys.executable, "-c", SCRIPT, level, place], capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    last = done.stdout.splitlines()[-1:]
    assert (done.returncode, last) == (0, ["all cases hold"]), f"{last}\n{done.stderr[-3000:]}"
