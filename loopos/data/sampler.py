"""Which samples make up each batch: a function of the seed and the epoch, and nothing else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

import numpy as np

from loopos.errors import ConfigError

__all__ = ["BatchSampler", "choosing", "prefetch"]

Array = np.ndarray[Any, Any]
T = TypeVar("T")

#: Effective batches whose samples are sorted by length together.
_BUCKET_WINDOW = 50


#: Returns the effective batches of an epoch, in place of :meth:`BatchSampler.batches`.
Choice = Callable[["BatchSampler", int], list[list[Array]]]
_choice: ContextVar[Choice | None] = ContextVar("loopos_batch_choice", default=None)


@contextmanager
def choosing(choose: Choice) -> Iterator[None]:
    """Inside the block, epochs hold the batches that `choose` returns: for rehearsals."""
    token = _choice.set(choose)
    try:
        yield
    finally:
        _choice.reset(token)


class BatchSampler:
    """Cuts each epoch's order into effective batches, and those into microbatches.

    Parameters
    ----------
    lengths : ndarray of int [n]
        Tokens of each sample.
    batch_size : int or None
        Samples in a microbatch.
    batch_tokens : int or None
        Tokens in a microbatch, instead; a longer sample stands alone.
    gradient_accumulation_steps : int
        Microbatches in an effective batch. With `batch_size`, effective batches are formed first,
        so 8 x 1 and 1 x 8 see the same samples in the same order.
    shuffle : bool
        Whether each epoch has an order of its own; otherwise the samples' own.
    length_bucketing : bool
        Sort by length within windows of 50 effective batches, then shuffle the batches.
    seed : int

    Raises
    ------
    ConfigError
        Unless exactly one of `batch_size` and `batch_tokens` is given, and every number fits.
    """

    def __init__(
        self,
        lengths: Any,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        gradient_accumulation_steps: int = 1,
        shuffle: bool = True,
        length_bucketing: bool = False,
        seed: int = 0,
    ):
        if (batch_size is None) == (batch_tokens is None):
            raise ConfigError("expected either batch_size or batch_tokens")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("batch_tokens", batch_tokens, 1),
            ("gradient_accumulation_steps", gradient_accumulation_steps, 1),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{name}: expected {least} at least, found {value}")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if self.lengths.ndim != 1:
            raise ConfigError(f"expected one length a sample, found {self.lengths.ndim} dimensions")
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self._accumulation = gradient_accumulation_steps
        self._shuffle, self._bucket, self._seed = shuffle, length_bucketing, seed

    def epoch(self, k: int) -> list[list[Array]]:
        """Return the effective batches of epoch `k`, each a list of microbatches (int64 [b])."""
        choose = _choice.get()
        return self.batches(k) if choose is None else choose(self, k)

    def batches(self, k: int) -> list[list[Array]]:
        """Return all effective batches of epoch `k`, whatever :func:`choosing` says."""
        rng = np.random.default_rng([self._seed, k])
        count = self.lengths.size
        order = rng.permutation(count) if self._shuffle else np.arange(count, dtype=np.int64)
        if self._bucket:
            order = self._sort_windows(order)
        batches = self._by_size(order) if self._batch_size else self._by_tokens(order)
        if self._bucket and self._shuffle:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches

    def count(self, num_epochs: int | None, limit: int | None = None) -> int:
        """Return the number of effective batches in the first `num_epochs`, at most `limit`.

        Without `num_epochs`: `limit`, over as many epochs as that needs, or else those of one.
        """
        if num_epochs is None:
            return len(self.epoch(0)) if limit is None else limit
        total = 0
        if self._batch_size or not self._shuffle:  # every epoch has as many
            total = len(self.epoch(0)) * num_epochs
            return total if limit is None else min(total, limit)
        for k in range(num_epochs):
            total += len(self.epoch(k))
            if limit is not None and total >= limit:
                return limit
        return total

    def _sort_windows(self, order: Array) -> Array:
        if self._batch_size:
            effective = self._batch_size * self._accumulation
        else:
            mean = max(1.0, float(self.lengths.mean())) if self.lengths.size else 1.0
            effective = max(1, int((self._batch_tokens or 1) * self._accumulation / mean))
        window = effective * _BUCKET_WINDOW
        parts = [order[start : start + window] for start in range(0, order.size, window)]
        ranked = [part[np.argsort(self.lengths[part], kind="stable")] for part in parts]
        return np.concatenate(ranked) if ranked else order

    def _by_size(self, order: Array) -> list[list[Array]]:
        size = self._batch_size or 1
        effective = size * self._accumulation
        return [
            [whole[i : i + size] for i in range(0, whole.size, size)]
            for whole in (order[s : s + effective] for s in range(0, order.size, effective))
        ]

    def _by_tokens(self, order: Array) -> list[list[Array]]:
        budget = self._batch_tokens or 1
        micro: list[Array] = []
        start = held = 0
        for position, length in enumerate(self.lengths[order]):
            if position > start and held + length > budget:
                micro.append(order[start:position])
                start, held = position, 0
            held += int(length)
        if start < order.size:
            micro.append(order[start:])
        step = self._accumulation
        return [micro[i : i + step] for i in range(0, len(micro), step)]


def prefetch(thunks: Iterable[Callable[[], T]], depth: int, num_workers: int) -> Iterator[T]:
    """Yield the results of `thunks` in their order, computing ahead in threads.

    Parameters
    ----------
    thunks : iterable of callable
        Each makes one item.
    depth : int
        Items computed ahead at the most; 0 as `num_workers` 0.
    num_workers : int
        Threads; 0 computes each item when it is asked for.

    Raises
    ------
    ConfigError
        If a number is negative.
    Exception
        Whatever a thunk, or the iteration over `thunks`, raises: at its place in the order.

    Notes
    -----
    Workers see the caller's context variables (the backend in use). Closing the iterator, or
    dropping it, cancels what has not begun and waits for what has.
    """
    for name, value in (("depth", depth), ("num_workers", num_workers)):
        if value < 0:
            raise ConfigError(f"{name}: expected 0 at least, found {value}")
    if num_workers == 0 or depth == 0:
        for thunk in thunks:
            yield thunk()
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="loopos-prefetch")
    waiting: deque[Future[T]] = deque()
    try:
        for future in _submitted(pool, thunks):
            waiting.append(future)
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also when the consumer stops early
        pool.shutdown(wait=True, cancel_futures=True)


def _submitted(pool: ThreadPoolExecutor, thunks: Iterable[Callable[[], T]]) -> Iterator[Future[T]]:
    """Yield a future for each thunk, and a failed one if `thunks` itself raises."""
    try:
        for thunk in thunks:
            yield pool.submit(copy_context().run, thunk)
    except Exception as error:
        # Raised here it would overtake the items that are still waiting.
        failed: Future[T] = Future()
        failed.set_exception(error)
        yield failed
