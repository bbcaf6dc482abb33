"""Draws without state: the same key gives the same numbers, every other key others, and orders are permutations."""

import numpy as np
import pytest
import tensorflow as tf

from input_pipeline.randomness import key, keys, sample_order, split


def test_key_is_for_ever_the_same():
    """In every process, on every machine: a run begun elsewhere goes on with the same numbers."""
    assert key(3, 5, "noise").numpy().tolist() == [-8895850500695618538, 5]


def test_key_differs_by_seed_step_and_purpose():
    found = {
        tuple(key(seed, step, purpose).numpy())
        for seed in (0, 1, 2**40)
        for step in (0, 1, 2**33)
        for purpose in ("noise", "flip", "order")
    }
    assert len(found) == 27


def test_key_in_a_graph_is_the_eager_one():
    traced = tf.function(lambda step: key(7, step, "noise"))
    assert (traced(tf.constant(9, tf.int64)).numpy() == key(7, 9, "noise").numpy()).all()


def test_streams_are_independent():
    """Correlation of any two of six streams of 4,000 numbers stays within 4.5 standard errors."""
    streams = [
        (0, 0, "noise"),
        (0, 1, "noise"),
        (1, 0, "noise"),
        (0, 0, "time"),
        (0, 1, "time"),
        (1, 1, "time"),
    ]
    draws = np.stack([tf.random.stateless_normal([4000], key(*stream)).numpy() for stream in streams])
    assert np.abs(np.corrcoef(draws) - np.eye(6)).max() < 4.5 / np.sqrt(4000)


def test_keys_are_fold_in_of_each_id():
    parent, ids = key(1, 2, "augmentation"), [0, 5, 2**40]
    expected = [
        tf.random.experimental.stateless_fold_in(parent, tf.constant(i, tf.int64)).numpy() for i in ids
    ]
    assert (keys(parent, tf.constant(ids, tf.int64)).numpy() == expected).all()


def order(n, batch_size, steps, seed=0):
    return np.stack([sample_order(n, batch_size, step, seed).numpy() for step in steps])


def test_each_epoch_is_a_permutation():
    batches = order(12, 4, range(9))
    for epoch in batches.reshape(3, 12):
        assert sorted(epoch) == list(range(12))
    assert (batches[:3] != batches[3:6]).any()


def test_the_remainder_is_dropped_within_an_epoch():
    for epoch in order(11, 4, range(6)).reshape(3, 8):
        assert len(set(epoch)) == 8


@pytest.mark.parametrize(("n", "batch_size"), [(3, 8), (1, 4), (5, 5), (4, 5)])
def test_few_samples_wrap_around_without_a_gap(n, batch_size):
    stream = order(n, batch_size, range(n)).ravel()
    for epoch in stream.reshape(-1, n):
        assert sorted(epoch) == list(range(n))


def test_batches_are_a_function_of_their_step():
    assert (order(12, 4, [5, 2])[::-1] == order(12, 4, [2, 5])).all()
    traced = tf.function(lambda step: sample_order(12, 4, step, 0))
    assert (traced(tf.constant(5, tf.int64)).numpy() == order(12, 4, [5])[0]).all()


def test_another_seed_is_another_order():
    assert (order(100, 100, [0], seed=0) != order(100, 100, [0], seed=1)).any()


def test_every_sample_is_as_likely_in_every_place():
    first = order(4, 4, range(400))[:, 0]
    counts = np.bincount(first, minlength=4)
    assert np.abs(counts - 100).max() < 4 * np.sqrt(400 * 0.25 * 0.75)


@pytest.mark.parametrize(
    ("n", "fraction", "expected"), [(10, 0.2, 2), (10, 0.0, 1), (2, 0.9, 1), (10, 1.0, 9), (1, 0.5, 0)]
)
def test_split_is_a_partition(n, fraction, expected):
    train, validation = split(n, fraction, seed=0)
    assert len(validation) == expected
    assert sorted([*train, *validation]) == list(range(n))
    assert (np.sort(train) == train).all()


def test_split_follows_the_seed():
    assert (split(100, 0.1, 0)[1] == split(100, 0.1, 0)[1]).all()
    assert (split(100, 0.1, 0)[1] != split(100, 0.1, 1)[1]).any()
