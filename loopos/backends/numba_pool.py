"""Threads of our own for compiled kernels that let go of Python's lock.

numba's threading layers are left alone: which one runs is the host's choice for the whole process,
the usual one on Linux ends a forked child, and ``workqueue`` ends a process whose threads call it
at once. Here a kernel is compiled as a serial loop over blocks, and several threads take blocks
from one counter. What a block computes does not depend on who takes it.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from time import perf_counter
from typing import Any, NamedTuple

from loopos.backends.threads import get_num_threads

#: Work below this (in elements touched, about a nanosecond each) is not worth waking a thread:
#: to wake one and to wait for it takes a tenth of a millisecond.
SMALL_WORK = 1 << 18
#: Says on which CPU a thread runs, where the system can be told where to run it.
_current_cpu = (
    getattr(ctypes.CDLL(None), "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None
)
#: Pieces a thread gets on average: more of them balance better, fewer cost less.
_PIECES = 4


class Run(NamedTuple):
    """Calls ``kernel(*args, start, stop)`` over all of ``range(blocks)``."""

    kernel: Callable[..., Any]
    blocks: int
    args: tuple[Any, ...]


class _Job:
    """Kernels over their blocks, cut into pieces of about one size."""

    def __init__(self, runs: Sequence[Run], width: int):
        step = max(1, -(-sum(run.blocks for run in runs) // (_PIECES * width)))
        self.pieces = [
            (kernel, args, start, min(start + step, count))
            for kernel, count, args in runs
            for start in range(0, count, step)
        ]
        self.error: BaseException | None = None
        # `next` on a counter is one step under Python's lock, so no lock of ours is needed.
        self.taken, self.done = itertools.count(), itertools.count(1)
        self.finished = threading.Lock()
        self.finished.acquire()

    def work(self) -> None:
        """Take pieces until there are none; whoever ends the last one says so."""
        for piece in self.taken:
            if piece >= len(self.pieces):
                return
            kernel, args, start, stop = self.pieces[piece]
            try:
                if self.error is None:
                    kernel(*args, start, stop)
            except BaseException as error:  # raised again in the caller
                self.error = error
            if next(self.done) == len(self.pieces):
                self.finished.release()


class Pace:
    """Whether helpers have made a job faster lately.

    What streams through memory gains little from them where one core takes most of what memory
    gives, and loses where a helper shares its CPU with a thread of BLAS that still spins: this one
    then waits for the piece of a helper that does not run.
    """

    #: Calls that try both ways in turn, and how often the slower one is tried again.
    _FIRST, _AGAIN = 6, 32
    #: By so much what is remembered may grow in a call: a disturbed one counts for little.
    _GROWTH = 1.1

    def __init__(self) -> None:
        self._calls = 0
        self._seconds = [math.inf, math.inf]  # for an element, alone and with helpers

    def helped(self) -> bool:
        """Return which way the next call takes."""
        self._calls += 1
        alone, helped = self._seconds
        if self._calls <= self._FIRST:
            return self._calls % 2 == 1
        return (helped <= alone) == (self._calls % self._AGAIN != 0)

    def took(self, helped: bool, seconds: float) -> None:
        """Remember what an element took."""
        self._seconds[helped] = min(seconds, self._seconds[helped] * self._GROWTH)


class Pool:
    """Helper threads, started when they are first needed; callers may be many."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """Begin without helpers: a forked child has none of its parent's threads."""
        self._lock = threading.Lock()
        self._queue: SimpleQueue[_Job] = SimpleQueue()
        self._helpers: list[threading.Thread] = []
        self._avoided: int | None = None
        self._paces: dict[Any, Pace] = {}

    def run(self, kernel: Callable[..., Any], count: int, work: int, *args: Any) -> None:
        """Call ``kernel(*args, start, stop)`` over all of ``range(count)``, in pieces.

        Parameters
        ----------
        kernel : callable
            Compiled, without Python's lock; a block's result must not depend on the other blocks.
        count : int
            How many blocks there are.
        work : int
            Elements touched in all; little work stays in this thread.
        """
        self.run_all([Run(kernel, count, args)], work)

    def run_streams(self, runs: Sequence[Run], work: int) -> None:
        """Do what :meth:`run_all` does of kernels that stream through memory; see :class:`Pace`."""
        if work < SMALL_WORK or get_num_threads() == 1:
            self.run_all(runs, work)
            return
        key = (frozenset(run.kernel for run in runs), work.bit_length(), get_num_threads())
        pace = self._paces.setdefault(key, Pace())
        helped = pace.helped()
        start = perf_counter()
        self.run_all(runs, work if helped else 0)
        pace.took(helped, (perf_counter() - start) / work)

    def run_all(self, runs: Sequence[Run], work: int) -> None:
        """Do several of them at once, whose results must not depend on each other."""
        width = min(get_num_threads(), sum(run.blocks for run in runs)) if work >= SMALL_WORK else 1
        if width <= 1:
            for kernel, count, args in runs:
                if count:
                    kernel(*args, 0, count)
            return
        job = _Job(runs, width)
        self._start(width - 1)
        self._make_way()
        for _ in range(width - 1):
            self._queue.put(job)
        job.work()
        job.finished.acquire()
        if job.error is not None:
            raise job.error

    def _start(self, helpers: int) -> None:
        if len(self._helpers) >= helpers:
            return
        with self._lock:
            while len(self._helpers) < helpers:
                name = f"loopos-{len(self._helpers)}"
                helper = threading.Thread(target=_help, args=(self._queue,), name=name, daemon=True)
                helper.start()
                self._helpers.append(helper)
                self._avoided = None

    def _make_way(self) -> None:
        """Keep the helpers off the CPU of this thread.

        After a product the threads of BLAS spin for a while. To the system no CPU is idle then,
        and a helper that is woken would wait on this one until the work is done.
        """
        cpu = None if _current_cpu is None else _current_cpu()
        if cpu == self._avoided:
            return
        others = os.sched_getaffinity(0) - {cpu}
        if not others:
            return
        self._avoided = cpu
        for helper in self._helpers:
            if helper.native_id is not None:
                with suppress(OSError):  # a sandbox may forbid it; the work is done all the same
                    os.sched_setaffinity(helper.native_id, others)


def _help(queue: SimpleQueue[_Job]) -> None:
    while True:
        job = queue.get()
        job.work()
        del job  # its arrays must not live on until the next job comes


POOL = Pool()
