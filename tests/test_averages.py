"""Power averages: their lengths, their updates, and others rebuilt from snapshots of two, against direct sums."""

import numpy as np
import pytest

import averages
from averages import EVERY, LENGTHS, exponent, mixture, share, snapshot_steps
from config import TrainingConfig
from stages.evaluation import SWEPT_LENGTHS


def profile(steps, length):
    """How much each of the sampled steps up to the last counts, by the definition: s^g, normalised."""
    sampled = np.arange(1, steps + 1)
    weights = sampled ** exponent(length)
    return sampled, weights / weights.sum()


@pytest.mark.parametrize(("length", "expected"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_of_the_paper(length, expected):
    assert exponent(length) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_the_length_is_the_deviation_of_the_profile(length):
    sampled, weights = profile(20_000, length)
    mean = (weights * sampled).sum()
    deviation = np.sqrt((weights * (sampled - mean) ** 2).sum())
    assert deviation / 20_000 == pytest.approx(length, rel=2e-3)


@pytest.mark.parametrize("length", [0.0, 0.3, float("nan")])
def test_lengths_that_no_average_has_are_refused(length):
    with pytest.raises(ValueError, match="length must be within"):
        exponent(length)


def kept(weights, length, steps):
    """The average after `steps`, updated as a training does; weights (steps, D)."""
    average = np.zeros(weights.shape[1])
    for step in range(EVERY, steps + 1, EVERY):
        average += share(step, exponent(length)) * (weights[step - 1] - average)
    return average


def test_updates_come_to_the_profile():
    steps = 4000
    weights = np.eye(steps)[:, ::EVERY]  # the average shows how much each sampled step counts
    weights = np.roll(weights, EVERY - 1, axis=0)
    received = kept(weights, 0.1, steps)
    sampled = np.arange(EVERY, steps + 1, EVERY)
    expected = sampled ** exponent(0.1)
    np.testing.assert_allclose(received, expected / expected.sum(), atol=2e-5)
    assert received.sum() == pytest.approx(1)


@pytest.mark.parametrize(("count", "tolerance"), [(TrainingConfig.snapshots, 3e-3), (16, 1e-3)])
@pytest.mark.parametrize("length", SWEPT_LENGTHS)
def test_other_lengths_are_rebuilt_from_snapshots(length, count, tolerance):
    rng, steps = np.random.default_rng(0), 1600
    # Weights that wander as those of a training do, and jitter from step to step.
    weights = np.cumsum(rng.normal(size=(steps, 30)), axis=0) / 20 + rng.normal(size=(steps, 30)) / 10
    snapshots = [(step, kind) for step in snapshot_steps(steps, count) for kind in LENGTHS]
    parts = mixture(*zip(*snapshots, strict=True), steps, length)
    rebuilt = sum(
        part * kept(weights, kind, step) for part, (step, kind) in zip(parts, snapshots, strict=True)
    )
    direct = kept(weights, length, steps)
    assert np.linalg.norm(rebuilt - direct) < tolerance * np.linalg.norm(direct)


@pytest.mark.parametrize("length", SWEPT_LENGTHS)
@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_weight_that_never_moved_stays(length, count):
    steps, lengths = zip(
        *((step, kind) for step in snapshot_steps(800, count) for kind in LENGTHS), strict=True
    )
    assert mixture(steps, lengths, 800, length).sum() == pytest.approx(1)


def test_a_kept_average_is_rebuilt_as_it_is():
    steps = [400, 800, 1200]
    parts = mixture([*steps, *steps], [0.05] * 3 + [0.1] * 3, 1200, 0.1)
    np.testing.assert_allclose(parts, [0, 0, 0, 0, 0, 1], atol=1e-9)


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [(40, 2, [20, 40]), (6, 2, [4]), (3, 8, []), (1232, 4, [308, 616, 924, 1232]), (40, 0, [])],
)
def test_snapshots_are_spread_over_the_steps_that_update(steps, count, expected):
    assert snapshot_steps(steps, count) == expected
    assert all(step % averages.EVERY == 0 for step in expected)
