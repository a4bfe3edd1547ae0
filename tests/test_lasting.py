"""Arrays that stay: zeros of any shape, side by side, that nobody else writes to."""

import os
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopos.autograd import Parameter, Tensor
from loopos.backends import lasting as module
from loopos.backends.lasting import lasting, lasting_copy

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    "count", [0, 1, 16 * KIB - 1, 16 * KIB, MIB - 1, MIB, 5 * MIB], ids="{} floats".format
)
def test_zeros_of_their_own(count):
    arrays = [lasting((count,), np.float32) for _ in range(6)]
    for value, array in enumerate(arrays, 1):
        assert array.shape == (count,)
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.flags.aligned
        assert not array.any()
        array[:] = value
    for value, array in enumerate(arrays, 1):
        assert (array == value).all()


def test_those_of_a_size_lie_side_by_side_in_whole_pages():
    arrays = [lasting((300, 401), np.float32) for _ in range(80)]  # 38 MB
    places = sorted(array.ctypes.data for array in arrays)
    steps = np.diff(places)
    assert all(place % 64 == 0 for place in places)
    assert (steps >= arrays[0].nbytes).all()
    # All but those at the ends of blocks of 16 MiB, where others may have been before.
    assert np.sum(steps < arrays[0].nbytes + 64) >= 80 - 5
    starts = {array.base.ctypes.data for array in arrays if array.base is not None}
    assert len(starts) <= 5


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 60), min_size=0, max_size=4),
    dtype=st.sampled_from(["float32", "float64", "bool", "int64"]),
)
def test_any_shape_and_dtype(shape, dtype):
    array = lasting(tuple(shape), dtype)
    assert array.shape == tuple(shape)
    assert array.dtype == np.dtype(dtype)
    assert not array.any()


def test_a_copy_is_contiguous_and_apart():
    given_array = np.arange(200_000, dtype=np.float64).reshape(400, 500).T
    copy = lasting_copy(given_array)
    assert copy.flags.c_contiguous
    assert np.array_equal(copy, given_array)
    copy[0, 0] = -1
    assert given_array[0, 0] == 0


def test_threads_never_get_the_same_memory():
    made: list[np.ndarray] = []

    def make():
        for _ in range(40):
            made.append(lasting((30_000,), np.float32))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    places = sorted(array.ctypes.data for array in made)
    assert len(places) == 320
    assert (np.diff(places) >= 120_000).all()


def test_gradients_of_parameters_stay_and_others_share_nothing():
    # What comes and goes would keep the memory of what lies beside it.
    data = np.zeros((300, 401), np.float32)
    kept, _ = Parameter(data).grad_target()
    passing, _ = Tensor(data, requires_grad=True).grad_target()
    assert kept.base is not None
    assert passing.base is None
    assert kept.shape == passing.shape == data.shape


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_does_not_wait_for_a_thread_that_it_does_not_have():
    with module._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if not lasting((30_000,), np.float32).any() else 1)
    for _ in range(200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child waits")
    assert os.waitstatus_to_exitcode(status) == 0
