"""The schedule's circle and ends, and targets against their definitions."""

import math

import numpy as np
import pytest

from diffusion.schedule import TARGETS, Process, cosine_rates, denoised, diffuse, target_of

TIMES = np.linspace(0, 1, 41, dtype="float32")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@pytest.fixture
def pair():
    """Clean latents and noise of 41 samples, one a time."""
    return normal(41, 2, 3, 4), normal(41, 2, 3, 4, seed=1)


def test_rates_are_on_the_circle():
    noise_rates, signal_rates = cosine_rates(TIMES)
    assert noise_rates.shape == signal_rates.shape == (41, 1, 1, 1)
    assert noise_rates.dtype == signal_rates.dtype == "float32"
    np.testing.assert_allclose(noise_rates**2 + signal_rates**2, 1, rtol=1e-6)
    assert (np.diff(np.ravel(signal_rates)) < 0).all() and (np.diff(np.ravel(noise_rates)) > 0).all()


@pytest.mark.parametrize(("largest", "least"), [(0.95, 0.02), (0.99, 0.1)])
def test_rates_end_where_said(largest, least):
    noise_rates, signal_rates = (np.ravel(rates) for rates in cosine_rates(TIMES, largest, least))
    np.testing.assert_allclose(signal_rates[[0, -1]], [largest, least], rtol=1e-5)
    np.testing.assert_allclose(noise_rates[[0, -1]], np.sqrt(1 - np.square([largest, least])), rtol=1e-5)


def test_angles_are_evenly_spaced():
    noise_rates, signal_rates = (np.ravel(rates) for rates in cosine_rates(TIMES))
    steps = np.diff(np.arctan2(noise_rates, signal_rates))
    np.testing.assert_allclose(steps, (math.acos(0.02) - math.acos(0.95)) / 40, rtol=1e-3)


def test_unit_latents_stay_unit():
    latents, noise = normal(1, 100, 100, 20), normal(1, 100, 100, 20, seed=1)
    for time in (0.0, 0.3, 1.0):
        assert np.var(diffuse(latents, noise, *cosine_rates(np.array([time], "float32")))) == pytest.approx(
            1, abs=0.01
        )


@pytest.mark.parametrize("target", TARGETS)
def test_denoised_inverts_target_of(target, pair):
    latents, noise = pair
    rates = cosine_rates(TIMES)
    prediction = target_of(target, latents, noise, *rates)
    clean = denoised(target, prediction, diffuse(latents, noise, *rates), *rates)
    # At the end the noise target divides by the signal rate 0.02, float32's error with it.
    np.testing.assert_allclose(clean, latents, atol=1e-4 if target == "noise" else 1e-5)


def test_targets_are_what_they_are_called(pair):
    latents, noise = pair
    rates = cosine_rates(TIMES)
    np.testing.assert_array_equal(target_of("noise", latents, noise, *rates), noise)
    np.testing.assert_array_equal(target_of("image", latents, noise, *rates), latents)


def test_velocity_is_the_derivative_by_the_angle(pair):
    latents, noise = (values.astype("float64") for values in pair)
    angle, h = np.linspace(0.3, 1.5, 41).reshape(-1, 1, 1, 1), 1e-5

    def at(a):
        return diffuse(latents, noise, np.sin(a), np.cos(a))

    velocity = target_of("velocity", latents, noise, np.sin(angle), np.cos(angle))
    np.testing.assert_allclose(velocity, (at(angle + h) - at(angle - h)) / (2 * h), atol=1e-8)


@pytest.mark.parametrize("target", TARGETS)
def test_a_process_is_its_functions(target, pair):
    latents, noise = pair
    process = Process(target, max_signal_rate=0.9, min_signal_rate=0.1)
    rates = process.rates(TIMES)
    for ours, expected in zip(rates, cosine_rates(TIMES, 0.9, 0.1)):
        np.testing.assert_array_equal(ours, expected)
    prediction = target_of(target, latents, noise, *rates)
    clean = process.denoised(prediction, diffuse(latents, noise, *rates), TIMES)
    np.testing.assert_allclose(clean, latents, atol=1e-5)


@pytest.mark.parametrize("call", [target_of, denoised])
def test_unknown_targets_are_refused(call):
    x = np.zeros((1, 1, 1, 1), "float32")
    arguments = ("score", x, x, x, x)
    with pytest.raises(ValueError, match="noise, image, velocity. Received: 'score'"):
        call(*arguments)
    with pytest.raises(ValueError, match="Received: 'score'"):
        Process("score")


@pytest.mark.parametrize(
    ("largest", "least"), [(1.0, 0.02), (0.95, 0.0), (0.02, 0.95), (0.5, 0.5), (0.95, -0.1), (math.nan, 0.02)]
)
def test_rates_out_of_range_are_refused(largest, least):
    with pytest.raises(ValueError, match="signal rates must fall"):
        Process(max_signal_rate=largest, min_signal_rate=least)
