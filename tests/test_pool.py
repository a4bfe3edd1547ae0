"""The threads and the memory of the kernels: forks, several callers, what the host sees."""

import ctypes
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info

import loopos
from loopos.backends import available_backends
from loopos.backends.threads import available_cpus

if "cython" not in available_backends():
    pytest.skip("the cython backend cannot run here", allow_module_level=True)

from loopos._ext import kernels

RNG = np.random.default_rng(0)
X, W = (RNG.normal(size=shape).astype(np.float32) for shape in ((200, 130), (310, 130)))
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells")
#: Python 3.12 warns of any fork beside threads, which is what is tested here.
FORK_WARNING = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def product(threads=2, x=X, w=W):
    return kernels.linear(x, w, None, None, threads)[0]


EXPECTED = product(1)


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_results_do_not_depend_on_the_number_of_threads():
    np.testing.assert_allclose(EXPECTED, X @ W.T, rtol=0, atol=2e-4)
    for threads in (2, 3, 7, 64, 1000):
        assert np.array_equal(product(threads), EXPECTED)


# -- forks -------------------------------------------------------------------------------------


@FORKS
@FORK_WARNING
def test_a_forked_child_computes_the_same():
    product(2)
    child = os.fork()
    if child == 0:  # no assertion may leave the child
        status = 1
        try:
            status = 0 if all(np.array_equal(product(2), EXPECTED) for _ in range(20)) else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(done[1]) == 0
    assert np.array_equal(product(2), EXPECTED)


def _bytes_of_a_product(threads):
    return product(threads).tobytes()


@FORKS
@FORK_WARNING
def test_a_child_forked_in_the_middle_of_a_job_of_another_thread():
    big = RNG.normal(size=(600, 600)).astype(np.float32)
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            product(2, big, big)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        with multiprocessing.get_context("fork").Pool(3) as pool:
            results = pool.map_async(_bytes_of_a_product, [1, 2, 3, 2, 1, 2]).get(timeout=60)
    finally:
        stop.set()
        thread.join()
    assert set(results) == {EXPECTED.tobytes()}


# -- several threads of the host -----------------------------------------------------------------


def test_four_threads_call_kernels_at_once():
    rng = np.random.default_rng(1)
    jobs = [(rng.normal(size=(n, 70)).astype(np.float32), rng.normal(size=(90, 70)).astype("f4"))
            for n in (50, 300, 7, 120)]  # fmt: skip
    alone = [product(1, *job) for job in jobs]
    start = threading.Barrier(4)

    def call(index):
        start.wait()
        return all(np.array_equal(product(2, *jobs[index]), alone[index]) for _ in range(100))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(call, range(4))) == [True] * 4


def test_thousands_of_small_jobs_from_several_threads():
    rng = np.random.default_rng(2)

    def call(seed):
        mine = np.random.default_rng(seed)
        for _ in range(500):
            m, k, n = (int(size) for size in mine.integers(1, 40, 3))
            x, w = left[:m, :k].copy(), right[:n, :k].copy()
            threads = int(mine.integers(1, 5))
            if not np.array_equal(product(threads, x, w), product(1, x, w)):
                return False
        return True

    left, right = (rng.normal(size=(40, 40)).astype(np.float32) for _ in range(2))
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(call, range(4)))


def test_other_python_threads_run_during_a_product():
    big = RNG.normal(size=(700, 700)).astype(np.float32)
    turns, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            turns[0] += 1
            time.sleep(0)  # offers the interpreter's lock, which is never taken away below

    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)
    thread = threading.Thread(target=count)
    try:
        thread.start()
        moved = 0
        for _ in range(200):
            before = turns[0]
            product(2, big, big)
            moved += turns[0] != before
            if moved:
                break
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert moved


def test_the_interpreter_ends_while_a_thread_computes():
    script = """
import threading, time
import numpy as np
from loopos._ext import kernels
x = np.ones((400, 400), np.float32)
started = threading.Event()
def forever():
    while True:
        kernels.linear(x, x, None, None, 2)
        started.set()
for _ in range(2):
    threading.Thread(target=forever, daemon=True).start()
started.wait()
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")


@LINUX
def test_threads_that_end_leave_no_scratch_behind():
    x = np.ones((400, 400), np.float32)

    def one_thread():
        thread = threading.Thread(target=kernels.linear_dw, args=(x, x, np.empty_like(x), False, 1))
        thread.start()
        thread.join()

    for _ in range(20):
        one_thread()
    before = _resident()
    for _ in range(200):
        one_thread()
    assert _resident() - before < 30e6  # each had more than 500 kB


# -- what the host sees --------------------------------------------------------------------------


def _blas():
    return [(pool["internal_api"], pool["num_threads"]) for pool in threadpool_info()]


@LINUX
def test_signal_mask_and_threads_of_the_host_stay_as_they_are():
    import signal

    before = signal.pthread_sigmask(signal.SIG_BLOCK, []), _blas(), np.geterr()
    product(3)
    assert (signal.pthread_sigmask(signal.SIG_BLOCK, []), _blas(), np.geterr()) == before


@LINUX
@pytest.mark.skipif(available_cpus() < 2, reason="there is one CPU")
def test_workers_keep_off_the_cpu_of_their_caller():
    script = """
import os
os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
import numpy as np
from loopos._ext import kernels
x = np.ones((300, 300), np.float32)
before, allowed = set(os.listdir("/proc/self/task")), os.sched_getaffinity(0)
kernels.linear(x, x, None, None, 3)
workers = set(os.listdir("/proc/self/task")) - before
assert len(workers) == 2 and os.sched_getaffinity(0) == allowed
for cpu in sorted(allowed)[:2] * 2:
    for _ in range(100):  # the system may move this thread on at once
        os.sched_setaffinity(0, {cpu})
        os.sched_setaffinity(0, allowed)
        kernels.linear(x, x, None, None, 3)
        left = {frozenset(allowed - os.sched_getaffinity(int(w))) for w in workers}
        assert len(left) == 1 and len(next(iter(left))) == 1, left
        if left == {frozenset([cpu])}: break
    else:
        raise AssertionError((cpu, left))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@LINUX
def test_workers_take_no_signals_and_sleep_when_idle():
    script = """
import os, sys, time
os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
import numpy as np
from loopos._ext import kernels
x = np.ones((300, 300), np.float32)
before = set(os.listdir("/proc/self/task"))
kernels.linear(x, x, None, None, 4)
workers = set(os.listdir("/proc/self/task")) - before
assert len(workers) == 3, workers
for worker in workers:
    status = dict(line.split(":", 1) for line in open(f"/proc/self/task/{worker}/status"))
    assert int(status["SigBlk"], 16) & 0x7FFF == 0x7FFF & ~(1 << 8), status["SigBlk"]  # not SIGKILL
def asleep():
    return all(open(f"/proc/self/task/{w}/stat").read().rpartition(")")[2].split()[0] == "S"
               for w in workers)
for _ in range(500):
    if asleep(): break
    time.sleep(0.01)
assert asleep()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


class _Arithmetic:
    """The control bits of SSE arithmetic, through the C library's floating-point environment."""

    FLUSH = 0x8040

    def __init__(self):
        self.libm = ctypes.CDLL("libm.so.6")
        self.environment = (ctypes.c_uint32 * 8)()

    def get(self):
        assert self.libm.fegetenv(self.environment) == 0
        return self.environment[7] & ~0x3F

    def set(self, value):
        self.get()
        self.environment[7] = value
        assert self.libm.fesetenv(self.environment) == 0


@pytest.fixture
def without_amx():
    """The best level whose products have the arithmetic of the calling thread: AMX has its own."""
    before = kernels.level()
    kernels.use_level(next(level for level in kernels.levels() if level != "amx"))
    yield
    kernels.use_level(before)


@pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() == "x86_64"), reason="reads MXCSR"
)
def test_arithmetic_is_that_of_the_calling_thread_in_all_threads(without_amx):
    arithmetic = _Arithmetic()
    before = arithmetic.get()
    tiny, half = np.full((600, 64), 1e-38, np.float32), np.full((600, 64), 0.01, np.float32)
    kept = product(2, tiny, half)
    assert kept.min() > 0  # subnormal products that were not flushed
    assert arithmetic.get() == before
    try:
        arithmetic.set(before | arithmetic.FLUSH)
        flushed = [product(threads, tiny, half) for threads in (1, 2, 4)]
        after = arithmetic.get()
    finally:
        arithmetic.set(before)
    assert after == before | arithmetic.FLUSH
    assert all(np.array_equal(array, flushed[0]) for array in flushed)
    assert not np.array_equal(flushed[0], kept)
    assert all(np.array_equal(product(threads, tiny, half), kept) for threads in (1, 2, 4))


def _threads_in_a_child(prelude="", **variables):
    script = f"{prelude}\nimport loopos; print(loopos.get_backend().describe()['threads'])"
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | variables
    done = subprocess.run([sys.executable, "-c", script], env=env, check=True,
                          capture_output=True, text=True)  # fmt: skip
    return int(done.stdout)


def test_threads_follow_the_environment_the_affinity_and_the_call():
    backend = {"LOOPOS_BACKEND": "cython"}
    assert _threads_in_a_child(OMP_NUM_THREADS="1", **backend) == 1
    assert _threads_in_a_child(**backend) <= os.cpu_count()
    if hasattr(os, "sched_setaffinity"):
        one = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"
        assert _threads_in_a_child(one, **backend) == 1
    asked = "import loopos; loopos.set_num_threads(3)"
    assert _threads_in_a_child(asked, OMP_NUM_THREADS="1", **backend) == 3
    with loopos.use_backend("cython") as chosen:
        assert chosen.describe()["threads"] == available_cpus()


# -- memory --------------------------------------------------------------------------------------


_STEPS = """
import resource
import numpy as np
from loopos._ext import kernels

x, w, dy = (np.ones((768, 768), np.float32) for _ in range(3))  # 2.25 MiB each
dw = np.zeros_like(w)

def step():
    y, _ = kernels.linear(x, w, None, None, 2)
    dx = kernels.linear_dx(dy, w, None, 2)
    kernels.linear_dw(dy, x, dw, True, 2)
    return y, dx

for _ in range(2):
    held = step()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    held = step()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
assert held[0].nbytes + held[1].nbytes > 4 << 20
print(faults)
"""


def test_a_linear_layer_finds_the_pages_of_the_step_before():
    # In a child, whose one worker has scratch of its own; here there may be more of them by now.
    command = [sys.executable, "-c", _STEPS]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    # Fresh pages would be 11520; a worker that first takes part now finds its scratch untouched.
    assert int(done.stdout) < 1000


def test_arrays_are_given_back_counted_and_used_again():
    kernels.arena_trim()
    used, kept, peak = kernels.arena_state()
    assert kept == 0
    assert peak == used
    first = kernels.empty((1000, 1000))
    assert first.ctypes.data % 64 == 0
    held = kernels.arena_state()[0] - used
    assert first.nbytes <= held <= first.nbytes * 1.125
    address = first.ctypes.data
    view = first[5:]
    del first
    assert kernels.arena_state()[0] == used + held  # the view holds it
    del view
    assert kernels.arena_state() == (used, held, used + held)
    again = kernels.empty((1000, 1000))
    assert again.ctypes.data == address
    assert kernels.arena_state() == (used + held, 0, used + held)
    del again
    kernels.arena_trim()
    assert kernels.arena_state() == (used, 0, used)


@LINUX
def test_what_is_trimmed_goes_back_to_the_system():
    arrays = [kernels.empty((400, 1000)) for _ in range(100)]  # 160 MB in all
    for array in arrays:
        array[:] = 1
    full = _resident()
    arrays.clear()
    del array
    kernels.arena_trim()
    assert full - _resident() > 120e6


def _take_and_give(seed, steps=3000):
    """Take and give back arrays of all sizes in any order; each holds what was written to it."""
    rng = np.random.default_rng(seed)
    held = []
    for number in range(steps):
        if held and rng.random() < 0.5:
            array, value = held.pop(rng.integers(len(held)))
            assert (array == value).all()
        else:
            array = kernels.empty(int(2 ** rng.uniform(0, 19 if number % 50 else 23)))
            array[:] = number
            assert array.ctypes.data % 64 == 0
            held.append((array, number))
        if number % 1000 == 999 and seed % 2:
            kernels.arena_trim()
    assert all((array == value).all() for array, value in held)


def test_what_is_in_use_is_nobody_elses():
    kernels.arena_trim()
    used, _, _ = kernels.arena_state()
    _take_and_give(0)
    assert kernels.arena_state()[0] == used
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(_take_and_give, range(1, 9)))
    assert kernels.arena_state()[0] == used
    kernels.arena_trim()
    assert kernels.arena_state() == (used, 0, used)


def test_the_same_arrays_lie_at_the_same_addresses():
    sizes = [int(2**e) for e in np.random.default_rng(3).uniform(2, 21, 300)]

    def step():
        found, held = [], {}
        for number, size in enumerate(sizes):
            held[number] = kernels.empty(size)
            found.append(held[number].ctypes.data)
            held.pop(number * 7 % (number + 1), None)  # in another order than they came
            if len(held) > 20:
                held.pop(max(held))
        return found

    step()
    second = step()
    assert len(set(second)) > 20
    assert step() == second


_LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
import numpy as np
from loopos._ext import kernels
arrays = [kernels.empty(25_000_000) for _ in range(20)]  # 2 of 3 GB
for value, array in enumerate(arrays):
    array[:: 1 << 14] = value
assert all((array[:: 1 << 14] == value).all() for value, array in enumerate(arrays))
assert kernels.arena_state()[0] >= 2_000_000_000
arrays.clear()
del array
print(kernels.arena_state()[0])
try:
    kernels.empty(1 << 30)
except MemoryError as error:
    print(error)
"""


@LINUX
@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer needs more addresses"
)
def test_where_addresses_are_few_all_of_them_can_be_used():
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["0", f"no memory for {1 << 32} bytes"]


@LINUX
def test_small_blocks_lie_beside_each_other_and_what_is_trimmed_of_them_goes_back():
    kernels.arena_trim()
    before = _resident()
    sizes = [20_000, 100_000, 400_000, 31_000]  # floats: side by side in the same memory
    arrays = [kernels.empty((size,)) for _ in range(40) for size in sizes]
    for value, array in enumerate(arrays):
        assert array.ctypes.data % 64 == 0
        array[:] = value
    assert all((array == value).all() for value, array in enumerate(arrays))
    stays = arrays[1::4]  # a quarter of all blocks, 16 of 88 MB
    del array
    arrays.clear()
    kernels.arena_trim()  # their neighbours' pages go back
    left = _resident() - before
    assert left < 30e6, left
    assert all((array == 4 * i + 1).all() for i, array in enumerate(stays))
    stays.clear()
    kernels.arena_trim()
    assert _resident() - before < 8e6
    again = kernels.empty((100_000,))
    again[:] = 1
    assert again.sum() == 100_000


def test_what_is_kept_is_bounded():
    kernels.arena_trim()
    for size in range(1_000_000, 12_000_000, 250_000):  # of many sizes, one at a time
        del_me = kernels.empty((size,))
        del del_me
    _, kept, peak = kernels.arena_state()
    assert kept <= peak * 1.25 + (64 << 20)
    kernels.arena_trim()
    assert kernels.arena_state()[1] == 0


@pytest.mark.parametrize("shape", [(1 << 45,), (1 << 62,), (1 << 62, 4), (1 << 31, 1 << 31)])
def test_too_much_is_a_memory_error(shape):
    state = kernels.arena_state()[0]
    with pytest.raises(MemoryError, match="no memory for"):
        kernels.empty(shape)
    assert kernels.arena_state()[0] == state


def test_empty_arrays_and_bad_shapes():
    assert kernels.empty(3).shape == (3,)
    assert kernels.empty((0, 5)).shape == (0, 5)
    assert kernels.empty(()).shape == ()
    with pytest.raises(ValueError, match="no negative sizes"):
        kernels.empty((2, -1))
