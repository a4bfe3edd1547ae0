"""Ragged batches, the order of samples, and making batches ahead in threads."""

import threading
import time
from contextvars import ContextVar
from dataclasses import FrozenInstanceError
from functools import partial
from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopos.data.batch import Batch
from loopos.data.sampler import BatchSampler, prefetch
from loopos.errors import ConfigError, DataError

SEQUENCES = st.lists(
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), min_size=1, max_size=7
)
LENGTHS = st.lists(st.integers(1, 60), max_size=80)


# -- batches -----------------------------------------------------------------------------------


def test_a_batch_is_its_sequences_one_after_the_other():
    batch = Batch.from_sequences([[5, 6, 7], [8], [9, 10]], labels=[1, 0, 1])
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.offsets.tolist() == [0, 3, 4, 6]
    assert batch.lengths.tolist() == [3, 1, 2]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.sample_ids.tolist() == [0, 1, 2]
    assert batch.loss_mask.tolist() == [True] * 6
    assert batch.labels.tolist() == [1, 0, 1]
    assert batch.token_types is None
    assert (batch.num_tokens, batch.num_sequences) == (6, 3)


def test_the_types_of_a_batch_do_not_depend_on_its_input():
    for given_type in (list, tuple, np.int64, np.uint8, np.int32):
        make = given_type if given_type in (list, tuple) else partial(np.array, dtype=given_type)
        batch = Batch.from_sequences([make([1, 2]), make([3])], sample_ids=[7, 9])
        assert batch.tokens.tolist() == [1, 2, 3]
        assert batch.sample_ids.tolist() == [7, 9]
        for array in (batch.tokens, batch.offsets, batch.sample_ids, batch.lengths):
            assert array.dtype == np.int32
        assert batch.positions.dtype == np.int32
        assert batch.loss_mask.dtype == bool


def test_a_batch_shares_no_memory_with_its_input():
    ids, mask = np.array([1, 2, 3], np.int32), np.array([True, True, False])
    batch = Batch.from_sequences([ids], loss_masks=[mask])
    ids[:], mask[:] = 0, False
    assert batch.tokens.tolist() == [1, 2, 3]
    assert batch.loss_mask.tolist() == [True, True, False]
    with pytest.raises(FrozenInstanceError):
        batch.tokens = ids


def test_targets_are_the_next_tokens_of_the_same_sequence():
    batch = Batch.from_sequences([[5, 6, 7], [8], [9, 10]])
    targets, weights = batch.next_token_targets()
    assert weights.tolist() == [1, 1, 0, 0, 1, 0]
    assert targets[weights > 0].tolist() == [6, 7, 10]
    assert (targets.dtype, weights.dtype) == (np.int32, np.float32)


def test_a_target_counts_where_its_own_mask_says_so():
    masks = [[False, False, True], [True], [True, True]]
    batch = Batch.from_sequences([[5, 6, 7], [8], [9, 10]], loss_masks=masks)
    targets, weights = batch.next_token_targets()
    assert weights.tolist() == [0, 1, 0, 0, 1, 0]
    assert targets[weights > 0].tolist() == [7, 10]


@given(SEQUENCES)
def test_the_targets_of_a_batch_are_those_of_each_sequence_alone(sequences):
    batch = Batch.from_sequences(sequences)
    targets, weights = batch.next_token_targets()
    assert weights.sum() == batch.num_tokens - batch.num_sequences
    for index, sequence in enumerate(sequences):
        part = slice(batch.offsets[index], batch.offsets[index + 1])
        assert batch.tokens[part].tolist() == sequence
        assert batch.positions[part].tolist() == list(range(len(sequence)))
        assert targets[part][:-1].tolist() == sequence[1:]
        assert weights[part].tolist() == [1.0] * (len(sequence) - 1) + [0.0]


def test_one_token_and_ten_thousand_stand_side_by_side():
    batch = Batch.from_sequences([[3], np.arange(10_000), [4]])
    assert batch.offsets.tolist() == [0, 1, 10_001, 10_002]
    assert batch.positions[10_000] == 9_999
    targets, weights = batch.next_token_targets()
    assert weights.sum() == 9_999
    assert targets[1:10_000].tolist() == list(range(1, 10_000))


def test_a_batch_of_no_sequence_is_empty():
    for batch in (Batch.from_sequences([]), Batch.from_sequences([], labels=[], loss_masks=[])):
        assert (batch.num_tokens, batch.num_sequences) == (0, 0)
        assert batch.offsets.tolist() == [0]
        assert batch.positions.size == 0
        targets, weights = batch.next_token_targets()
        assert (targets.size, weights.size) == (0, 0)


@pytest.mark.parametrize(
    ("sequences", "options", "message"),
    [
        ([[1], []], {}, "sequence 1 is empty"),
        ([[1], np.zeros(0, np.int32)], {}, "sequence 1 is empty"),
        ([[1.5, 2]], {}, "sequence 0: expected a list of token ids, found 1 dimensions of float64"),
        ([[1], [True]], {}, "sequence 1: expected a list of token ids"),
        ([["a"]], {}, "sequence 0: expected a list of token ids"),
        ([[1], "text"], {}, "sequence 1: expected a list of token ids"),
        ([3], {}, "sequence 0: expected a list of token ids, found 0 dimensions"),
        ([[[1, 2], [3, 4]]], {}, "sequence 0: expected a list of token ids, found 2 dimensions"),
        ([[[1], [2, 3]]], {}, "sequence 0: expected a list of token ids"),
        ([[1], [2**31]], {}, "sequence 1: a token id does not fit 32 bits"),
        ([np.array([2**40 + 3])], {}, "sequence 0: a token id does not fit 32 bits"),
        ([[10**30]], {}, "sequence 0: expected a list of token ids"),
        ([[1], [2]], {"labels": [0]}, "expected labels for 2 sequences, found 1"),
        ([[1]], {"labels": 0}, "expected labels for 1 sequences, found a single value"),
        ([[1]], {"sample_ids": [0, 1]}, "expected sample_ids for 1 sequences, found 2"),
        ([[1], [2]], {"loss_masks": [[True]]}, "expected loss_masks for 2 sequences, found 1"),
        (
            [[1, 2], [3]],
            {"loss_masks": [[True], [True, True]]},
            "sequence 0: expected a loss mask of 2 values, found 1",
        ),
        (
            [[1, 2], [3]],
            {"loss_masks": [[True, False], [0.5]]},
            "sequence 1: expected a loss mask of true and false or 1 and 0",
        ),
        ([[1]], {"sample_ids": [0.5]}, "expected integers as sample_ids, found float64[1]"),
        ([[1]], {"sample_ids": [[0]]}, "expected integers as sample_ids, found int64[1, 1]"),
    ],
)
def test_what_makes_no_batch_is_said(sequences, options, message):
    with pytest.raises(DataError) as caught:
        Batch.from_sequences(sequences, **options)
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, ValueError)


# -- the order of samples ----------------------------------------------------------------------


def flat(batches):
    return [int(i) for micro in batches for part in micro for i in part]


def lists(batches):
    return [[part.tolist() for part in micro] for micro in batches]


def test_batches_without_shuffling_are_the_samples_in_their_order():
    sampler = BatchSampler(
        [1] * 7, batch_size=2, gradient_accumulation_steps=2, shuffle=False, seed=3
    )
    expected = [[[0, 1], [2, 3]], [[4, 5], [6]]]
    assert lists(sampler.epoch(0)) == lists(sampler.epoch(5)) == expected
    assert all(part.dtype == np.int64 for micro in sampler.epoch(0) for part in micro)


def test_the_shuffle_is_numpys_of_seed_and_epoch():
    sampler = BatchSampler([1] * 10, batch_size=3, seed=4)
    assert flat(sampler.epoch(2)) == np.random.default_rng([4, 2]).permutation(10).tolist()


@given(
    LENGTHS,
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
    st.integers(0, 5),
)
def test_an_epoch_has_every_sample_once(lengths, size, steps, by_tokens, shuffle, bucket, seed, k):
    limit = {"batch_tokens": 8 * size} if by_tokens else {"batch_size": size}
    options = {
        "gradient_accumulation_steps": steps,
        "shuffle": shuffle,
        "length_bucketing": bucket,
        "seed": seed,
    }
    batches = BatchSampler(lengths, **limit, **options).epoch(k)
    assert sorted(flat(batches)) == list(range(len(lengths)))
    assert lists(batches) == lists(BatchSampler(lengths, **limit, **options).epoch(k))
    for micro in batches:
        assert 1 <= len(micro) <= steps
        for part in micro:
            assert part.size > 0
            if by_tokens:
                total = sum(lengths[i] for i in part)
                assert total <= 8 * size or part.size == 1
            else:
                assert part.size <= size
    assert sum(len(micro) < steps for micro in batches) <= 1


@given(LENGTHS, st.booleans(), st.booleans(), st.integers(0, 99))
def test_accumulation_sees_the_same_samples_in_the_same_order(lengths, shuffle, bucket, seed):
    options = {"shuffle": shuffle, "length_bucketing": bucket, "seed": seed}
    whole = BatchSampler(lengths, batch_size=8, **options).epoch(1)
    for size, steps in ((1, 8), (2, 4), (4, 2)):
        parts = BatchSampler(
            lengths, batch_size=size, gradient_accumulation_steps=steps, **options
        ).epoch(1)
        assert [flat([micro]) for micro in parts] == [flat([micro]) for micro in whole]


def test_a_token_budget_is_filled_greedily_and_a_longer_sample_stands_alone():
    lengths = [4, 4, 3, 50, 1, 9, 10, 10]
    sampler = BatchSampler(lengths, batch_tokens=10, shuffle=False)
    assert lists(sampler.epoch(0)) == [[[0, 1]], [[2]], [[3]], [[4, 5]], [[6]], [[7]]]
    sampler = BatchSampler(lengths, batch_tokens=10, shuffle=False, gradient_accumulation_steps=4)
    assert lists(sampler.epoch(0)) == [[[0, 1], [2], [3], [4, 5]], [[6], [7]]]


def test_one_token_and_ten_thousand_fit_a_budget():
    lengths = [1, 10_000, 1, 1]
    batches = BatchSampler(lengths, batch_tokens=512, shuffle=False).epoch(0)
    assert lists(batches) == [[[0]], [[1]], [[2, 3]]]


def test_every_option_changes_the_order():
    lengths = np.random.default_rng(0).integers(1, 200, 300)
    base = {"batch_size": 4, "seed": 0}
    reference = lists(BatchSampler(lengths, **base).epoch(0))
    assert lists(BatchSampler(lengths, **base).epoch(1)) != reference
    for change in (
        {"seed": 1},
        {"batch_size": 5},
        {"batch_size": None, "batch_tokens": 400},
        {"gradient_accumulation_steps": 2},
        {"shuffle": False},
        {"length_bucketing": True},
    ):
        assert lists(BatchSampler(lengths, **(base | change)).epoch(0)) != reference


@pytest.mark.parametrize("limit", [{"batch_size": 8}, {"batch_tokens": 800}])
def test_bucketing_puts_like_lengths_together_and_keeps_their_order_random(limit):
    lengths = np.random.default_rng(0).integers(1, 200, 2000)

    def spread(batches):
        return np.mean([np.ptp(lengths[part]) for micro in batches for part in micro])

    plain = BatchSampler(lengths, **limit).epoch(0)
    sampler = BatchSampler(lengths, **limit, length_bucketing=True)
    bucketed = sampler.epoch(0)
    assert spread(bucketed) < 0.1 * spread(plain)
    means = np.array([lengths[part].mean() for micro in bucketed for part in micro])
    ranks = np.corrcoef(np.arange(means.size), means)[0, 1]
    assert abs(ranks) < 0.2  # sorted batches would have 1
    together = [{frozenset(flat([micro])) for micro in sampler.epoch(k)} for k in (0, 1)]
    assert together[0] != together[1]


def test_buckets_are_sorted_within_fifty_effective_batches():
    lengths = np.random.default_rng(1).integers(1, 10_000, 250)
    sampler = BatchSampler(
        lengths, batch_size=1, gradient_accumulation_steps=2, shuffle=False, length_bucketing=True
    )
    order = flat(sampler.epoch(0))
    for start, stop in ((0, 100), (100, 200), (200, 250)):
        part = order[start:stop]
        assert sorted(part) == list(range(start, stop))
        assert np.all(np.diff(lengths[part]) >= 0)


@given(
    LENGTHS, st.integers(1, 9), st.integers(1, 3), st.booleans(), st.booleans(), st.booleans(),
    st.integers(1, 4), st.one_of(st.none(), st.integers(1, 30)),
)  # fmt: skip
def test_the_count_is_that_of_all_epochs(
    lengths, size, steps, by_tokens, shuffle, bucket, epochs, limit
):
    kind = {"batch_tokens": 8 * size} if by_tokens else {"batch_size": size}
    sampler = BatchSampler(
        lengths, **kind, gradient_accumulation_steps=steps, shuffle=shuffle, length_bucketing=bucket
    )
    total = sum(len(sampler.epoch(k)) for k in range(epochs))
    assert sampler.count(epochs, limit) == (total if limit is None else min(total, limit))
    assert sampler.count(None, limit) == (len(sampler.epoch(0)) if limit is None else limit)


def test_the_count_of_shuffled_token_budgets_is_not_that_of_one_epoch_times():
    lengths = np.random.default_rng(0).integers(1, 60, 80)
    sampler = BatchSampler(lengths, batch_tokens=64)
    each = [len(sampler.epoch(k)) for k in range(4)]
    assert each == [52, 53, 54, 52]
    assert [sampler.count(n) for n in (1, 2, 3, 4)] == [52, 105, 159, 211]
    assert [sampler.count(4, limit) for limit in (1, 52, 100, 211, 999)] == [1, 52, 100, 211, 211]


def test_no_sample_makes_no_batch():
    for limit in ({"batch_size": 2}, {"batch_tokens": 9}):
        for bucket in (False, True):
            assert BatchSampler([], **limit, length_bucketing=bucket).epoch(0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected either batch_size or batch_tokens"),
        ({"batch_size": 1, "batch_tokens": 1}, "expected either batch_size or batch_tokens"),
        ({"batch_size": 0}, "batch_size: expected 1 at least, found 0"),
        ({"batch_tokens": -5}, "batch_tokens: expected 1 at least, found -5"),
        (
            {"batch_size": 1, "gradient_accumulation_steps": 0},
            "gradient_accumulation_steps: expected 1 at least, found 0",
        ),
        ({"batch_size": 1, "seed": -1}, "seed: expected 0 at least, found -1"),
        ({"batch_size": 1, "lengths": [[1, 2]]}, "expected one length a sample, found 2"),
    ],
)
def test_a_sampler_refuses_what_does_not_fit(options, message):
    with pytest.raises(ConfigError) as caught:
        BatchSampler(**({"lengths": [1, 2, 3]} | options))
    assert str(caught.value).startswith(message)


# -- ahead, in threads -------------------------------------------------------------------------

WORKERS = pytest.mark.parametrize(("depth", "workers"), [(2, 0), (0, 2), (1, 1), (3, 2), (9, 4)])


def loopos_threads():
    return [t for t in threading.enumerate() if t.name.startswith("loopos-prefetch")]


def failing(error):
    raise error


@WORKERS
def test_items_come_in_order_however_long_each_takes(depth, workers):
    def make(i):
        time.sleep(0.002 * (i % 3 == 0))
        return i

    assert list(prefetch((partial(make, i) for i in range(30)), depth, workers)) == list(range(30))
    assert list(prefetch([], depth, workers)) == []
    assert loopos_threads() == []


@WORKERS
def test_an_exception_comes_at_its_place(depth, workers):
    error = KeyError("third")
    thunks = [lambda: 0, lambda: 1, partial(failing, error), lambda: 3]
    items = prefetch(thunks, depth, workers)
    found = [next(items), next(items)]
    with pytest.raises(KeyError) as caught:
        next(items)
    assert found == [0, 1]
    assert caught.value is error
    assert loopos_threads() == []


@WORKERS
def test_an_exception_of_the_source_does_not_overtake_items(depth, workers):
    def source():
        yield lambda: 0
        yield lambda: 1
        raise OSError("no more")

    items = prefetch(source(), depth, workers)
    found = [next(items), next(items)]
    with pytest.raises(OSError, match="no more"):
        next(items)
    assert found == [0, 1]
    assert loopos_threads() == []


def test_no_more_is_computed_ahead_than_asked_for():
    begun = []
    items = prefetch((partial(begun.append, i) for i in count()), depth=3, num_workers=2)
    assert begun == []  # nothing before the first item is asked for
    for taken in range(1, 6):
        next(items)
        assert len(begun) <= taken + 3
    items.close()


def test_items_are_made_ahead():
    ready = threading.Event()
    items = prefetch([lambda: 0, ready.set, lambda: 2], depth=2, num_workers=1)
    assert next(items) == 0
    assert ready.wait(5)  # made while nobody asks for it
    assert list(items) == [None, 2]


def test_closing_stops_the_workers_and_cancels_what_has_not_begun():
    begun, second, release = [], threading.Event(), threading.Event()

    def make(i):
        begun.append(i)
        if i:
            second.set()
            release.wait(60)
        return i

    items = prefetch((partial(make, i) for i in range(100)), depth=8, num_workers=1)
    assert next(items) == 0
    assert second.wait(60)  # the worker is busy with item 1; six more wait behind it
    timer = threading.Timer(1.0, release.set)  # long after close() has cancelled those
    timer.start()
    items.close()
    timer.join()
    assert begun == [0, 1]
    assert loopos_threads() == []


def test_an_abandoned_iterator_leaves_no_thread():
    assert list(islice(prefetch((partial(int, i) for i in count()), 4, 2), 3)) == [0, 1, 2]
    for item in prefetch((partial(int, i) for i in count()), 4, 2):
        if item == 5:
            break
    del item
    assert loopos_threads() == []


def test_workers_see_the_context_of_the_caller():
    variable = ContextVar("variable", default="unset")
    token = variable.set("of the caller")
    try:
        assert list(prefetch([variable.get] * 4, 2, 2)) == ["of the caller"] * 4
    finally:
        variable.reset(token)


@pytest.mark.parametrize(("depth", "workers"), [(-1, 2), (2, -1)])
def test_negative_numbers_are_refused(depth, workers):
    with pytest.raises(ConfigError, match="expected 0 at least, found -1"):
        next(prefetch([lambda: 0], depth, workers))


def test_loss_weights_say_how_much_each_next_token_counts():
    batch = Batch.from_sequences([[5, 6, 7], [8, 9]], loss_weights=[[9, 0, 0.5], [1, 2]])
    targets, weights = batch.next_token_targets()
    assert targets[[0, 1, 3]].tolist() == [6, 7, 9]
    assert weights.tolist() == [0, 0.5, 0, 2, 0]
    assert batch.loss_mask.tolist() == [True, False, True, True, True]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[1, 1]], "expected loss_weights for 2 sequences, found 1"),
        ([[1, 1], [1]], "sequence 0: expected 3 loss weights, found 2"),
        ([[1, -1, 1], [1, 1]], "sequence 0: expected finite loss weights of at least 0"),
        ([[1, 1, 1], [1, float("nan")]], "sequence 1: expected finite loss weights of at least 0"),
    ],
)
def test_loss_weights_that_do_not_fit_are_named(weights, message):
    with pytest.raises(DataError, match=message):
        Batch.from_sequences([[5, 6, 7], [8, 9]], loss_weights=weights)


def test_loss_weights_and_masks_together_are_refused():
    with pytest.raises(DataError, match="found both"):
        Batch.from_sequences([[5, 6]], loss_masks=[[1, 1]], loss_weights=[[1, 1]])
