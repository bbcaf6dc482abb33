"""What follows from a loss that stays is what Keras' callbacks do on the same losses."""

import math
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from stages.progress import epochs_without, rate_scale

FIRST_RATE = 1.0


def losses(seed, n=40):
    """Values that fall, stay, rise and are the same again, a few of them no numbers; the first is one."""
    rng = np.random.default_rng(seed)
    values = np.round(2 + rng.normal(size=n).cumsum() / 3 - 0.03 * np.arange(n), 1)
    values[1:][rng.random(n - 1) < 0.1] = np.nan
    return values.tolist()


def as_kept(values):
    """As rows of a log have them."""
    return [None if math.isnan(value) else value for value in values]


def told(callback, values):
    """A callback that has seen the values, and what it did to its model's rate after each."""
    optimizer = SimpleNamespace(learning_rate=keras.Variable(FIRST_RATE))
    model = SimpleNamespace(optimizer=optimizer, stop_training=False)
    callback.set_model(model)
    callback.monitor_op = np.less  # which it would find out from the model's metrics
    callback.on_train_begin()
    rates = []
    for epoch, value in enumerate(values):
        callback.on_epoch_end(epoch, {"val_loss": value})
        rates.append(float(optimizer.learning_rate))
        if model.stop_training:
            break
    return callback, rates


def test_the_losses_of_these_tests_have_all_there_is():
    values = losses(0)
    assert any(map(math.isnan, values)) and len(set(values)) < len(values)
    assert len({rate_scale(as_kept(losses(seed)), 3, 0.5) for seed in range(20)}) > 3


@pytest.mark.parametrize("patience", [1, 2, 3, 5])
@pytest.mark.parametrize("factor", [0.5, 0.1])
def test_the_rate_is_that_of_keras_plateau(patience, factor):
    for seed in range(20):
        values = losses(seed)
        plateau = {"factor": factor, "patience": patience, "min_delta": 0, "cooldown": 0, "min_lr": 0}
        _, rates = told(keras.callbacks.ReduceLROnPlateau(**plateau), values)
        own = [rate_scale(as_kept(values[: n + 1]), patience, factor) for n in range(len(values))]
        assert own == pytest.approx(rates, rel=1e-5)


@pytest.mark.parametrize("patience", [1, 2, 4, 7])
def test_it_stops_where_keras_stops(patience):
    ends = []
    for seed in range(30):
        values = losses(seed)
        stopping, _ = told(keras.callbacks.EarlyStopping(patience=patience, min_delta=0), values)
        own = [n for n in range(len(values)) if epochs_without(as_kept(values[: n + 1])) >= patience]
        ends.append(own[0] if own else 0)
        assert ends[-1] == stopping.stopped_epoch
    assert len(set(ends)) > 3


def test_a_loss_that_is_the_same_again_is_no_lower():
    assert [epochs_without([0.5] * n) for n in (1, 2, 3)] == [0, 1, 2]
    assert rate_scale([0.5] * 3, 2, 0.5) == 0.5


def test_without_a_number_nothing_is_least():
    assert epochs_without([]) == 0
    assert epochs_without([None] * 3) == 2
    assert epochs_without([None, None, 0.5, None]) == 1
    assert rate_scale([], 1, 0.5) == 1.0
    assert rate_scale([None, None, 0.5], 2, 0.5) == 0.5  # what brought no number brought no new least one
