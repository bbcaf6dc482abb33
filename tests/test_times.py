"""Times of training by their distributions, and of sampling by their definitions."""

import math

import numpy as np
import pytest

from diffusion.schedule import GRIDS, Process
from diffusion.times import (
    SPACINGS,
    TIMES,
    last_times,
    sampling_times,
    training_times,
)

FLOW, EDM = Process("flow", schedule="flow"), Process("edm", schedule="edm")
SHARES = ((np.arange(20_000) + 0.5) / 20_000).astype("float32")


def drawn(name, process=FLOW, **settings):
    return np.asarray(training_times(name, process, **settings)(SHARES), "float64")


def uniform_times(steps):
    return sampling_times(Process(), steps)


# Training


def test_uniform_times_of_training_are_the_shares():
    np.testing.assert_array_equal(training_times("uniform", FLOW)(SHARES), SHARES)


@pytest.mark.parametrize(("mean", "deviation"), [(None, None), (0.5, 0.8)])
def test_logit_normal_times_are_the_sigmoid_of_a_normal_variable(mean, deviation):
    times = drawn("logit_normal", mean=mean, deviation=deviation)
    logits = np.log(times / (1 - times))
    mean, deviation = mean or 0.0, deviation or 1.0
    assert logits.mean() == pytest.approx(mean, abs=1e-3)
    assert logits.std() == pytest.approx(deviation, abs=1e-3)
    for quantile, z in ((0.0228, -2), (0.1587, -1), (0.5, 0), (0.8413, 1), (0.9772, 2)):
        assert np.quantile(logits, quantile) == pytest.approx(mean + deviation * z, abs=0.01)


@pytest.mark.parametrize("process", [EDM, FLOW])
def test_log_normal_times_have_edms_noise(process):
    times = drawn("log_normal", process)
    noise_rates, signal_rates = (np.ravel(rates) for rates in process.rates(times.astype("float32")))
    log_sigmas = np.log(noise_rates / signal_rates)
    assert log_sigmas.mean() == pytest.approx(-1.2, abs=0.01)
    assert log_sigmas.std() == pytest.approx(1.2, abs=0.01)


def test_mixed_times_are_a_share_of_each():
    times, inner = np.sort(drawn("mixed", uniform_share=0.25)), drawn("logit_normal")
    for time in (0.02, 0.3, 0.5, 0.98):
        expected = 0.25 * time + 0.75 * (inner < time).mean()
        assert (times < time).mean() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", TIMES)
def test_the_shift_multiplies_the_ratio_of_noise_to_signal(name):
    plain, moved = drawn(name), drawn(name, Process("flow", schedule="flow", shift=3.0))
    factor = 1 if name == "log_normal" else 3  # whose ratio is given
    np.testing.assert_allclose(moved / (1 - moved), factor * plain / (1 - plain), rtol=1e-2)


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("process", [FLOW, EDM, Process(), Process(schedule="linear")])
def test_times_of_training_are_in_range(name, process):
    shares = np.array([0, 1e-7, 0.5, 1 - 6e-8, 1], "float32")
    times = np.asarray(training_times(name, process)(shares))
    assert times.dtype == "float32" and times.shape == (5,)
    assert ((times >= 0) & (times <= 1)).all()


def test_unknown_times_are_refused():
    with pytest.raises(ValueError, match="uniform, logit_normal, log_normal, mixed. Received: 'normal'"):
        training_times("normal", FLOW)


# Sampling

PROCESSES = [
    Process(),
    FLOW,
    EDM,
    *(Process("image", schedule=grid) for grid in GRIDS),
    Process("image", schedule="scaled-linear", zero_terminal_snr=True),
]


def test_times_fall_evenly_from_one_to_zero():
    times = uniform_times(4)
    assert times.dtype == "float32"
    np.testing.assert_allclose(times, [1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.schedule)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_times_of_sampling_fall_to_zero(steps, process, spacing):
    times = np.asarray(sampling_times(process, steps, spacing))
    assert times.dtype == "float32" and times.shape == (steps + 1,)
    assert times[0] == 1 or spacing == "leading"
    falls = np.diff(times)
    assert (falls[:-1] < 0).all()
    assert times[-1] == 0 and falls[-1] <= 0  # EDM's least noise lies at time 0 itself


def test_times_of_the_grid_are_those_of_the_paper():
    """Lin et al. 2023, table 2, for 10 steps: 901, 801, ..., 1 and 1000, 900, ..., 100 of 1,000."""
    process = Process(schedule="linear")
    leading, trailing = (
        np.asarray(sampling_times(process, 10, spacing)) for spacing in ("leading", "trailing")
    )
    np.testing.assert_allclose(leading[:-1] * 1000, np.arange(901, 0, -100), rtol=1e-6)
    np.testing.assert_allclose(trailing * 1000, np.arange(1000, -1, -100), rtol=1e-6)


def log_sigmas(process, times):
    noise_rates, signal_rates = (np.ravel(rates).astype("float64") for rates in process.rates(times))
    return np.log(noise_rates / signal_rates)


@pytest.mark.parametrize("process", [*PROCESSES[:1], *PROCESSES[2:-1]], ids=lambda process: process.schedule)
def test_noise_levels_are_evenly_spaced_in_their_own_measure(process):
    even = log_sigmas(process, sampling_times(process, 12, "logsnr-uniform")[:-1])
    np.testing.assert_allclose(np.diff(even), np.diff(even).mean(), rtol=5e-3)
    roots = np.exp(log_sigmas(process, sampling_times(process, 12, "karras")[:-1]) / 7)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots).mean(), rtol=5e-3)
    ends = np.array([1, 0 if process.schedule in ("cosine", "edm") else 1e-3], "float32")
    np.testing.assert_allclose(even[[0, -1]], log_sigmas(process, ends), atol=1e-4)


@pytest.mark.parametrize("process", [FLOW, PROCESSES[-1]], ids=lambda process: process.schedule)
def test_noise_without_signal_stands_for_the_level_beside_it(process):
    times = np.asarray(sampling_times(process, 12, "logsnr-uniform"))
    assert times[0] == 1
    levels = log_sigmas(process, np.append(np.float32(0.999), times[1:-1]))
    np.testing.assert_allclose(np.diff(levels), np.diff(levels).mean(), rtol=5e-3)


def test_the_shift_moves_sampling_to_more_noise():
    shifted, plain = Process("flow", schedule="flow", shift=3.0), np.asarray(uniform_times(8))
    np.testing.assert_allclose(sampling_times(shifted, 8), 3 * plain / (1 + 2 * plain), rtol=1e-6)
    for spacing in ("karras", "logsnr-uniform"):  # whose noise levels are given
        np.testing.assert_array_equal(sampling_times(shifted, 8, spacing), sampling_times(FLOW, 8, spacing))


@pytest.mark.parametrize(
    ("steps", "spacing"), [(0, "uniform"), (-1, "karras"), (2.5, "uniform"), (math.nan, "uniform")]
)
def test_steps_that_cannot_be_are_refused(steps, spacing):
    with pytest.raises(ValueError, match=f"steps must be a whole number from 1 .* Received: {steps}"):
        sampling_times(Process(), steps, spacing)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_more_steps_than_the_grid_has_are_refused(spacing):
    with pytest.raises(ValueError, match="to 1,000. Received: 1001"):
        sampling_times(Process(), 1001, spacing)


def test_unknown_spacings_are_refused():
    with pytest.raises(
        ValueError, match="uniform, leading, trailing, karras, logsnr-uniform. Received: 'linspace'"
    ):
        sampling_times(Process(), 10, "linspace")


@pytest.mark.parametrize(("strength", "left"), [(1, 10), (1.0, 10), (0.6, 6), (0.04, 0), (0, 0)])
def test_strength_is_the_share_of_the_steps_that_are_made(strength, left):
    times = uniform_times(10)
    np.testing.assert_array_equal(last_times(times, strength), np.asarray(times)[10 - left :])


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match=f"strength must be within .* Received: {strength:g}"):
        last_times(uniform_times(10), strength)
