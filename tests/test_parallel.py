"""A batch in parts gives what the whole gives, whatever its size, in a graph and out of it."""

import numpy as np
import pytest
import tensorflow as tf

import parallel

ROWS = np.random.default_rng(0).normal(size=(12, 3)).astype("float32")


@pytest.fixture
def a_gpu(monkeypatch):
    """A machine with a GPU, as far as asking for it goes."""
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: ["gpu"])


def loops(function, *arguments):
    """The loops of a function's graph: how many of their rounds may overlap."""
    graph = tf.function(function).get_concrete_function(*arguments).graph
    return [
        operation.get_attr("parallel_iterations")
        for operation in graph.get_operations()
        if operation.type in ("While", "StatelessWhile")
    ]


def totals(rows):
    return {"sum": tf.reduce_sum(rows["x"], 0), "square": tf.reduce_sum(rows["x"] ** 2) * rows["y"][0]}


def added(parts, batch=None):
    zeros = {"sum": tf.zeros(3), "square": tf.zeros(())}
    return parallel.summed(totals, batch or {"x": ROWS, "y": np.full(12, 2, "float32")}, parts, zeros)


@pytest.mark.parametrize("parts", [1, 2, 3, 12])
@pytest.mark.parametrize("compiled", [False, True])
def test_parts_add_up_to_the_whole(parts, compiled):
    result = (tf.function(added) if compiled else added)(parts)
    np.testing.assert_allclose(result["sum"], ROWS.sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result["square"], 2 * (ROWS**2).sum(), rtol=1e-6)


def test_a_batch_that_does_not_come_out_even_has_no_equal_parts():
    with pytest.raises(tf.errors.InvalidArgumentError):
        added(5)


def test_parts_go_side_by_side_on_a_cpu():
    assert loops(lambda: added(2)) == [2]
    assert loops(lambda: added(3)) == [2]
    assert loops(lambda: added(1)) == []


def test_parts_go_in_turn_on_a_gpu(a_gpu):
    assert loops(lambda: added(3)) == [1]


def doubled(rows, other):
    assert rows.shape[1:] == (3,)
    return tf.cast(2 * rows + other[:, None], "float64")


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_join_in_their_order(count, compiled):
    def run(rows, other):
        return parallel.joined(doubled, [rows, other], [3], "float64")

    signature = [tf.TensorSpec([None, 3]), tf.TensorSpec([None])]
    other = np.arange(count, dtype="float32")
    result = (tf.function(run, input_signature=signature) if compiled else run)(ROWS[:count], other)
    np.testing.assert_array_equal(result, 2 * ROWS[:count] + other[:, None])


def test_rows_of_a_gpu_are_not_parted(a_gpu):
    seen = []

    def whole(rows):
        seen.append(len(rows))
        return rows

    np.testing.assert_array_equal(parallel.joined(whole, [ROWS], [3]), ROWS)
    assert seen == [12]


def test_batches_have_two_parts_where_they_come_out_even():
    assert [parallel.parts_of(size) for size in (1, 2, 7, 64)] == [1, 2, 1, 2]
    assert parallel.parts_of(64, 4) == 4


def test_batches_of_large_pictures_have_more_parts():
    side_64, side_256 = 64 * 64, 256 * 256
    assert [parallel.parts_of(size, places=side_64) for size in (4, 8, 16, 24, 7)] == [2, 2, 4, 6, 1]
    assert [parallel.parts_of(size, places=side_256) for size in (4, 6)] == [
        4,
        6,
    ]  # a picture each, and no fewer
    assert parallel.parts_of(16, 2, places=side_64) == 2


def test_batches_stay_whole_on_a_gpu(a_gpu):
    assert parallel.parts_of(64, places=256 * 256) == 1
    assert parallel.parts_of(64, 4) == 4
