"""DDIM against its closed form on a Gaussian, and guidance by its identities."""

import math

import numpy as np
import pytest
import tensorflow as tf

from diffusion.samplers import ddim, guide, uniform_times
from diffusion.schedule import Process

MU, SIGMA = 0.7, 0.5
PROCESS = Process()


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def gaussian_denoiser(process=PROCESS):
    """E[x_0 | x_t] for latents drawn from N(MU, SIGMA^2)."""

    def denoise(x, t):
        noise_rate, signal_rate = process.rates(tf.reshape(t, (1,)))
        gain = signal_rate * SIGMA**2 / (signal_rate**2 * SIGMA**2 + noise_rate**2)
        return MU + gain * (x - signal_rate * MU)

    return denoise


def spread(signal_rate):
    """Standard deviation of x_t where the signal rate is `signal_rate`."""
    return math.sqrt(signal_rate**2 * SIGMA**2 + 1 - signal_rate**2)


def limit(noise, process=PROCESS):
    """What infinitely many steps give: x_t keeps its quantile along the flow; at t = 0 it is denoised once more."""
    end, start = process.min_signal_rate, process.max_signal_rate
    quantile = (noise - end * MU) / spread(end)
    return MU + start * SIGMA**2 / spread(start) * quantile


def sample(noise, steps, denoise=None, process=PROCESS):
    denoise = denoise or gaussian_denoiser(process)
    return ddim(denoise, noise, uniform_times(steps), process.rates).numpy()


def test_times_fall_evenly_from_one_to_zero():
    times = uniform_times(4)
    assert times.dtype == "float32"
    np.testing.assert_allclose(times, [1, 0.75, 0.5, 0.25, 0])


def test_one_step_is_one_denoising():
    noise = normal(5, 1, 1, 1)
    expected = gaussian_denoiser()(noise, tf.constant(1.0))
    np.testing.assert_array_equal(sample(noise, 1), expected)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_one_possible_picture_is_always_drawn(steps):
    picture = normal(1, 2, 3, 4)
    drawn = sample(normal(5, 2, 3, 4, seed=1), steps, lambda x, t: tf.broadcast_to(picture, x.shape))
    np.testing.assert_array_equal(drawn, np.broadcast_to(picture, (5, 2, 3, 4)))


def test_every_step_is_equation_12():
    """The same recursion in plain float64, by angles: s = cos a, n = sin a."""
    x = normal(6, 1, 1, 1).astype("float64")
    drawn, steps = sample(x.astype("float32"), 7), 7
    first, last = math.acos(0.95), math.acos(0.02)
    for k in range(steps):
        a, b = (first + (1 - i / steps) * (last - first) for i in (k, k + 1))
        gain = math.cos(a) * SIGMA**2 / spread(math.cos(a)) ** 2
        clean = MU + gain * (x - math.cos(a) * MU)
        x = math.cos(b) * clean + math.sin(b) * (x - math.cos(a) * clean) / math.sin(a)
    np.testing.assert_allclose(drawn, clean, atol=1e-5)


def test_the_error_halves_as_steps_double():
    noise = normal(64, 1, 1, 1)
    errors = [np.sqrt(np.mean((sample(noise, steps) - limit(noise)) ** 2)) for steps in (8, 16, 32, 64)]
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(slopes, 1, atol=0.15)


def test_samples_follow_the_data():
    """With rates that reach from nearly 1 to nearly 0, mean and spread are the data's."""
    process = Process(max_signal_rate=0.9999, min_signal_rate=1e-3)
    drawn = sample(normal(20_000, 1, 1, 1), 100, process=process)
    assert drawn.mean() == pytest.approx(MU, abs=0.02)
    assert drawn.std() == pytest.approx(SIGMA, rel=0.03)


def test_the_network_is_asked_once_a_step_at_falling_times():
    asked = []

    def denoise(x, t):
        asked.append(float(t))
        return x

    sample(normal(1, 1, 1, 1), 5, denoise)
    np.testing.assert_allclose(asked, [1, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)


def test_samples_do_not_mix():
    noise = normal(3, 2, 2, 1)
    alone = [sample(part[None], 6) for part in noise]
    np.testing.assert_allclose(sample(noise, 6), np.concatenate(alone), rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 4])
def test_compiled_is_eager(batch):
    noise, times = normal(batch, 2, 2, 1), uniform_times(6)
    compiled = tf.function(lambda x, t: ddim(gaussian_denoiser(), x, t, PROCESS.rates))
    np.testing.assert_allclose(compiled(noise, times), sample(noise, 6), rtol=1e-5, atol=1e-6)


def test_more_steps_are_no_larger_graph():
    def operations(steps):
        compiled = tf.function(lambda x: ddim(gaussian_denoiser(), x, uniform_times(steps), PROCESS.rates))
        graph = compiled.get_concrete_function(tf.TensorSpec((1, 2, 2, 1))).graph.as_graph_def()
        return len(graph.node) + sum(len(function.node_def) for function in graph.library.function)

    assert operations(50) == operations(2)


# Guidance

CONDITIONAL, UNCONDITIONAL = normal(3, 2, 2, 1, seed=1), normal(3, 2, 2, 1, seed=2)


def denoise_pair(x, t):
    """Answers that depend on x and t, in the order: with the context, then without."""
    with_context, without = tf.split(x, 2)
    return tf.concat([with_context * t + CONDITIONAL, without * t * 0.5 + UNCONDITIONAL], 0)


def guided(guidance):
    x = normal(3, 2, 2, 1)
    return guide(denoise_pair, guidance)(x, 0.4).numpy(), x


def test_guidance_1_is_the_conditional_prediction():
    prediction, x = guided(1.0)
    np.testing.assert_allclose(prediction, 0.4 * x + CONDITIONAL, rtol=1e-5, atol=1e-6)


def test_guidance_0_is_the_unconditional_prediction():
    prediction, x = guided(0.0)
    np.testing.assert_array_equal(prediction, tf.constant(x) * 0.4 * 0.5 + UNCONDITIONAL)


@pytest.mark.parametrize("guidance", [-1.0, 2.5, 7.0])
def test_guidance_is_linear(guidance):
    nothing, whole = guided(0.0)[0], guided(1.0)[0]
    expected = nothing + guidance * (whole - nothing)
    np.testing.assert_allclose(guided(guidance)[0], expected, rtol=1e-4, atol=1e-4)


def test_guidance_draws_like_the_denoiser_it_makes():
    """A pair of exact denoisers of two single pictures: guidance 3 draws b + 3 (a - b)."""
    pictures = np.concatenate([CONDITIONAL, UNCONDITIONAL])
    drawn = sample(normal(3, 2, 2, 1), 4, guide(lambda x, t: tf.constant(pictures), 3.0))
    expected = UNCONDITIONAL + 3 * (CONDITIONAL - UNCONDITIONAL)
    np.testing.assert_allclose(drawn, expected, rtol=1e-5, atol=1e-6)
