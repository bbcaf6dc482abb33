"""Targets against their definitions, conversions there and back, weights by what they are equal to, and losses."""

import math

import numpy as np
import pytest

from diffusion.schedule import Process, cosine_rates
from diffusion.targets import (
    LOSSES,
    TARGETS,
    WEIGHTS,
    convert,
    denoised,
    deviation_of,
    diffuse,
    distance,
    perturbed,
    target_of,
    uncertain,
    weights,
)

TIMES = np.linspace(0, 1, 41, dtype="float32")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


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


@pytest.mark.parametrize("call", [target_of, denoised])
def test_unknown_targets_are_refused(call):
    x = np.zeros((1, 1, 1, 1), "float32")
    arguments = ("score", x, x, x, x)
    with pytest.raises(ValueError, match="noise, image, velocity, flow, edm. Received: 'score'"):
        call(*arguments)
    with pytest.raises(ValueError, match="Received: 'score'"):
        Process("score")


def test_the_flow_is_the_derivative_by_the_time_of_a_straight_line(pair):
    latents, noise = (values.astype("float64") for values in pair)
    slope = diffuse(latents, noise, 0.6, 0.4) - diffuse(latents, noise, 0.5, 0.5)
    np.testing.assert_allclose(target_of("flow", latents, noise, 0.3, 0.7), slope / 0.1, atol=1e-9)


@pytest.mark.parametrize("deviation", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("sigma", [0.002, 0.3, 1.0, 80.0])
def test_edm_targets_have_unit_variance_and_its_preconditioning(deviation, sigma):
    """Table 1 of Karras et al. 2022, written down for signal rate 1."""
    noise_rates, signal_rates = np.full((1, 1, 1, 1), sigma), np.ones((1, 1, 1, 1))
    latents, noise = deviation * normal(1, 200, 200, 5).astype("float64"), normal(1, 200, 200, 5, seed=1)
    prediction = target_of("edm", latents, noise, noise_rates, signal_rates, deviation)
    assert np.var(prediction) == pytest.approx(1, abs=0.02)
    c_skip = deviation**2 / (sigma**2 + deviation**2)
    c_out = sigma * deviation / math.sqrt(sigma**2 + deviation**2)
    x = latents + sigma * noise
    ours = denoised("edm", prediction, x, noise_rates, signal_rates, deviation)
    np.testing.assert_allclose(ours, c_skip * x + c_out * prediction, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours, latents, rtol=1e-6, atol=1e-6)
    c_in = 1 / math.sqrt(sigma**2 + deviation**2)
    assert float(1 / deviation_of(noise_rates, signal_rates, deviation).numpy().item()) == pytest.approx(
        c_in, rel=1e-6
    )


def test_edm_is_minus_the_velocity_on_the_circle(pair):
    rates = cosine_rates(TIMES)
    np.testing.assert_allclose(
        target_of("edm", *pair, *rates), -target_of("velocity", *pair, *rates), atol=1e-5
    )


@pytest.mark.parametrize("source", TARGETS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("deviation", [1.0, 0.5])
def test_conversions_go_there_and_back(source, target, deviation, pair):
    rates = tuple(rate.numpy().astype("float64") for rate in cosine_rates(TIMES))
    x = diffuse(*pair, *rates)
    prediction = target_of(source, *pair, *rates, deviation)
    there = convert(prediction, source, target, x, *rates, deviation)
    np.testing.assert_allclose(there, target_of(target, *pair, *rates, deviation), atol=1e-5)
    np.testing.assert_allclose(convert(there, target, source, x, *rates, deviation), prediction, atol=1e-5)


@pytest.mark.parametrize("source", ["image", "velocity", "flow", "edm"])
def test_conversions_hold_where_no_signal_is_left(source):
    latents, noise, rates = (
        normal(1, 2, 2, 3),
        normal(1, 2, 2, 3, seed=1),
        (np.ones((1, 1, 1, 1)), np.zeros((1, 1, 1, 1))),
    )
    prediction = target_of(source, latents, noise, *rates)
    for target in TARGETS:
        expected = target_of(target, latents, noise, *rates)
        np.testing.assert_allclose(convert(prediction, source, target, noise, *rates), expected, atol=1e-6)


# Weights


def rates_at(snr):
    """Rates (B, 1, 1, 1) on the circle with these signal-to-noise ratios."""
    snr = np.asarray(snr, "float64").reshape(-1, 1, 1, 1)
    return np.sqrt(1 / (1 + snr)), np.sqrt(snr / (1 + snr))


SNRS = np.array([1e-3, 0.1, 1.0, 4.9, 5.1, 60.0, 1e4])


def test_min_snr_weights_are_the_papers_of_each_target():
    capped = np.minimum(SNRS, 5)
    for target, expected in {
        "noise": capped / SNRS,
        "image": capped,
        "velocity": capped / (SNRS + 1),
        "edm": capped / (SNRS + 1),
        "flow": capped / (1 + np.sqrt(SNRS)) ** 2,
    }.items():
        np.testing.assert_allclose(weights("min-snr", target, *rates_at(SNRS)), expected, rtol=1e-9)


@pytest.mark.parametrize("weight", ["min-snr", "edm"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("deviation", [1.0, 0.5])
def test_a_weighted_loss_is_the_reweighted_loss_of_the_noise(weight, target, deviation):
    """Whatever a network predicts, its weighted error is that of the noise it implies, weighted for the noise."""
    rates = rates_at(SNRS)
    latents, noise, error = (normal(7, 2, 2, 3, seed=seed).astype("float64") for seed in range(3))
    x = diffuse(latents, noise, *rates)
    right = target_of(target, latents, noise, *rates, deviation)
    wrong = right + 0.1 * error
    implied = convert(wrong, target, "noise", x, *rates, deviation)
    ours = weights(weight, target, *rates, 5.0, deviation) * distance("mse", wrong, right)
    by_noise = weights(weight, "noise", *rates, 5.0, deviation) * distance("mse", implied, noise)
    np.testing.assert_allclose(ours, by_noise, rtol=1e-6)
    if weight == "min-snr":
        snr_times = np.minimum(SNRS, 5) / SNRS * np.mean((implied - noise) ** 2, axis=(1, 2, 3))
        np.testing.assert_allclose(ours, snr_times, rtol=1e-6)


def test_edm_weights_are_one_for_its_own_target_and_equation_8_for_the_image():
    sigma, deviation = np.array([0.002, 0.5, 1.0, 80.0]), 0.5
    rates = sigma.reshape(-1, 1, 1, 1), np.ones((4, 1, 1, 1))
    np.testing.assert_allclose(weights("edm", "edm", *rates, data_deviation=deviation), 1, rtol=1e-9)
    expected = (sigma**2 + deviation**2) / (sigma * deviation) ** 2
    np.testing.assert_allclose(weights("edm", "image", *rates, data_deviation=deviation), expected, rtol=1e-9)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("target", TARGETS)
def test_weights_are_finite_where_no_noise_is_left(weight, target):
    values = np.asarray(
        weights(weight, target, np.zeros((1, 1, 1, 1), "float32"), np.ones((1, 1, 1, 1), "float32"))
    )
    assert values.shape == (1,) and np.isfinite(values).all() and (values >= 0).all()


def test_no_weight_is_one():
    np.testing.assert_array_equal(weights("none", "velocity", *rates_at(SNRS)), np.ones(7))


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match="none, min-snr, edm, uncertainty. Received: 'snr'"):
        weights("snr", "noise", *rates_at(SNRS))


# Losses


def test_losses_are_means_over_a_sample():
    prediction, target = normal(3, 2, 4, 5).astype("float64"), normal(3, 2, 4, 5, seed=1)
    error = (prediction - target).reshape(3, -1)
    np.testing.assert_allclose(distance("mse", prediction, target), (error**2).mean(axis=1), rtol=1e-9)
    np.testing.assert_allclose(distance("mae", prediction, target), np.abs(error).mean(axis=1), rtol=1e-9)
    for width in (0.1, 2.0):
        expected = (2 * width * (np.hypot(error, width) - width)).mean(axis=1)
        np.testing.assert_allclose(distance("huber", prediction, target, width), expected, rtol=1e-9)


def test_huber_is_the_square_of_small_errors_and_straight_for_large_ones():
    target = np.zeros((1, 1, 1, 1))
    assert float(distance("huber", target + 1e-3, target).numpy()[0]) == pytest.approx(1e-6, rel=1e-3)
    assert float(distance("huber", target + 100.0, target).numpy()[0]) == pytest.approx(0.2 * 99.9, rel=1e-3)


def test_unknown_losses_are_refused():
    with pytest.raises(ValueError, match=f"{', '.join(LOSSES)}. Received: 'l2'"):
        distance("l2", np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1, 1)))


def test_an_uncertain_loss_is_least_where_u_is_its_logarithm():
    loss, steps = 0.3, np.linspace(-3, 1, 4001)
    best = steps[np.argmin(uncertain(loss, steps))]
    assert best == pytest.approx(math.log(loss), abs=2e-3)


# Noise that is not white


def test_offset_noise_moves_whole_channels():
    noise, offset = normal(50, 20, 20, 4), normal(50, 1, 1, 4, seed=1)
    moved = perturbed(noise, offset, 0.1)
    np.testing.assert_allclose(moved - noise, np.broadcast_to(0.1 * offset, moved.shape), atol=1e-6)
    means = np.mean(moved, axis=(1, 2))
    assert np.std(means) == pytest.approx(math.hypot(0.1, 1 / 20), rel=0.15)


def test_input_perturbation_widens_the_noise_that_the_network_sees():
    noise, other = normal(1, 200, 200, 4), normal(1, 200, 200, 4, seed=1)
    seen = diffuse(0 * noise, perturbed(noise, other, 0.1), *cosine_rates(np.array([0.5], "float32")))
    rate = cosine_rates(np.array([0.5], "float32"))[0].numpy().item()
    assert np.std(seen) == pytest.approx(rate * math.hypot(1, 0.1), rel=0.01)
