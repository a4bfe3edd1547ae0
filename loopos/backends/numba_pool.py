"""Threads of our own for compiled kernels that let go of Python's lock.

numba's threading layers are left alone: which one runs is the host's choice for the whole process,
the usual one on Linux ends a forked child, and ``workqueue`` ends a process whose threads call it
at once. Here a kernel is compiled as a serial loop over blocks, and several threads take blocks
from one counter. What a block computes does not depend on who takes it.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from loopos.backends.threads import get_num_threads

#: Work below this (in elements touched, about a nanosecond each) is not worth waking a thread.
SMALL_WORK = 1 << 16
#: Pieces a thread gets on average: more of them balance better, fewer cost less.
_PIECES = 4


class _Job:
    """One kernel over ``count`` blocks, cut into pieces."""

    def __init__(self, kernel: Callable[..., Any], args: tuple[Any, ...], count: int, step: int):
        self.kernel, self.args, self.count, self.step = kernel, args, count, step
        self.pieces = -(-count // step)
        self.error: BaseException | None = None
        # `next` on a counter is one step under Python's lock, so no lock of ours is needed.
        self.taken, self.done = itertools.count(), itertools.count(1)
        self.finished = threading.Lock()
        self.finished.acquire()

    def work(self) -> None:
        """Take pieces until there are none; whoever ends the last one says so."""
        for piece in self.taken:
            if piece >= self.pieces:
                return
            start = piece * self.step
            try:
                if self.error is None:
                    self.kernel(*self.args, start, min(start + self.step, self.count))
            except BaseException as error:  # raised again in the caller
                self.error = error
            if next(self.done) == self.pieces:
                self.finished.release()


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
        self._helpers = 0

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
        width = min(get_num_threads(), count) if work >= SMALL_WORK else 1
        if width <= 1:
            if count:
                kernel(*args, 0, count)
            return
        job = _Job(kernel, args, count, max(1, -(-count // (_PIECES * width))))
        self._start(width - 1)
        for _ in range(width - 1):
            self._queue.put(job)
        job.work()
        job.finished.acquire()
        if job.error is not None:
            raise job.error

    def _start(self, helpers: int) -> None:
        if self._helpers >= helpers:
            return
        with self._lock:
            while self._helpers < helpers:
                name = f"loopos-{self._helpers}"
                threading.Thread(target=_help, args=(self._queue,), name=name, daemon=True).start()
                self._helpers += 1


def _help(queue: SimpleQueue[_Job]) -> None:
    while True:
        job = queue.get()
        job.work()
        del job  # its arrays must not live on until the next job comes


POOL = Pool()
