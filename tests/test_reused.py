"""Arrays in memory that was used before."""

import gc
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from loopos.backends import available_backends, reused


@pytest.fixture
def memory():
    return reused._Reused()


def address(array):
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(300, 501), (70_001,), (40, 50, 60), (3, 4), (), (0, 9)])
def test_an_array_is_like_one_of_numpy(memory, shape, dtype):
    array, expected = memory.empty(shape, dtype), np.empty(shape, dtype)
    assert type(array) is np.ndarray
    assert (array.shape, array.dtype, array.strides) == (shape, dtype, expected.strides)
    assert array.flags.carray
    if array.nbytes > 1 << 16:
        assert address(array) % 64 == 0
    array[...] = 3
    assert (array == 3).all()


def test_memory_is_used_again_when_the_last_view_is_gone(memory):
    first = memory.empty((300, 500), np.float32)
    at, view = address(first), first[7:].T
    view[...] = 5
    del first
    other = memory.empty((300, 500), np.float32)
    assert address(other) != at
    other[...] = 6
    assert (view == 5).all()
    del view
    again = memory.empty((500, 300), np.float32)
    assert address(again) == at


def _take_and_give(memory, seed):
    rng, held = np.random.default_rng(seed), []
    for number in range(1500):
        if held and rng.random() < 0.5:
            array, value = held.pop(rng.integers(len(held)))
            assert (array == value).all()
        else:
            array = memory.empty((int(2 ** rng.uniform(10, 17)),), np.float32)
            array[:] = value = seed * 10_000 + number
            held.append((array, value))
    assert all((array == value).all() for array, value in held)


def test_what_is_in_use_is_nobody_elses(memory):
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(_take_and_give, [memory] * 6, range(6)))
    assert memory._used == 0
    assert 0 < memory._kept <= 2 * memory._most
    assert memory._kept == sum(b.size for waiting in memory._free.values() for b in waiting)


def test_no_more_is_kept_than_was_in_use_at_once(memory):
    for size in range(100_000, 1_000_000, 10_000):  # of many sizes, one at a time
        memory.empty((size,), np.float32)
    assert memory._most < 1_000_000 * 4 * 1.2
    assert memory._kept <= 2 * memory._most
    held = [memory.empty((n,), np.float32) for n in range(1_000_000, 3_000_000, 100_000)]
    assert memory._used == memory._most
    assert memory._used + memory._kept <= 2 * memory._most
    del held
    assert memory._kept >= memory._most


def test_a_collection_of_garbage_within_gives_back(memory):
    class Node:
        pass

    threshold = gc.get_threshold()
    gc.set_threshold(1)  # now at every new object
    try:
        for number in range(200):
            node = Node()
            node.self, node.array = node, memory.empty((20_000 + 64 * number,), np.float32)
            del node
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert memory._used == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_goes_on_where_the_lock_was_held():
    def fork():
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(reused.empty((200, 300), np.float32).shape != (200, 300))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    # The fork is another thread's: the child's only thread does not hold the lock.
    with reused.empty.__self__._lock, ThreadPoolExecutor(1) as thread:
        assert thread.submit(fork).result() == 0


_STEPS = """
import resource
import numpy as np
import loopos
loopos.set_backend("numba")
model = loopos.Transformer(
    loopos.TransformerConfig(vocab_size=4000, d_model=192, d_ff=768, num_layers=2, num_heads=4)
)
optimizer = loopos.AdamW(model.parameters(), learning_rate=1e-3)
batch = loopos.Batch.from_sequences([np.arange(250)] * 4)
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    loss, count = model.next_token_loss(batch)
    loss.backward()
    optimizer.step(scale=1 / count)
    optimizer.zero_grad()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif("numba" not in available_backends(), reason="numba is not installed")
def test_a_step_of_the_numba_backend_finds_the_pages_of_the_steps_before():
    command = [sys.executable, "-c", _STEPS]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    faults = [int(line) for line in done.stdout.split()]
    assert faults[0] > 5000  # what a step takes from the system
    assert np.median(faults[3:]) < 300, faults
