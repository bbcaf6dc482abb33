"""Guidance by its identities, and what else is put around a denoiser."""

import math

import numpy as np
import pytest
import tensorflow as tf

from diffusion.guidance import autoguide, guide, inpaint, lerp, slerp, threshold
from diffusion.samplers import SAMPLERS, ddim
from diffusion.schedule import Process
from diffusion.times import sampling_times

PROCESS = Process()


def uniform_times(steps):
    return sampling_times(PROCESS, steps)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def sample(noise, steps, denoise):
    return ddim(denoise, noise, uniform_times(steps), PROCESS.rates).numpy()


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


@pytest.mark.parametrize("guidance", [math.nan, math.inf, -math.inf])
def test_guidance_that_is_no_number_is_refused(guidance):
    with pytest.raises(ValueError, match=f"guidance must be within .* Received: {guidance}"):
        guide(denoise_pair, guidance)
    with pytest.raises(ValueError, match=f"guidance must be within .* Received: {guidance}"):
        autoguide(denoise_pair, denoise_pair, guidance)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rescale": 1.5}, "rescale must be within .* Received: 1.5"),
        ({"rescale": -0.1}, "rescale must be within .* Received: -0.1"),
        ({"interval": (0.2, 1.2)}, "guidance interval must be within .* Received: 1.2"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        guide(denoise_pair, 3.0, **settings)


def test_guidance_may_be_a_tensor_of_the_graph():
    compiled = tf.function(lambda x, guidance: guide(denoise_pair, guidance)(x, 0.4))
    np.testing.assert_allclose(compiled(normal(3, 2, 2, 1), tf.constant(2.5)), guided(2.5)[0], rtol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 3.0, 8.0])
def test_rescaled_guidance_has_the_spread_of_the_conditional_prediction(guidance):
    x = normal(3, 2, 2, 1)
    plain, whole, most = (
        guide(denoise_pair, guidance, rescale)(x, 0.4).numpy() for rescale in (0.0, 1.0, 0.7)
    )
    conditional = guided(1.0)[0]
    np.testing.assert_allclose(whole.std(axis=(1, 2, 3)), conditional.std(axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(most, 0.7 * whole + 0.3 * plain, rtol=1e-4, atol=1e-5)
    if guidance == 1:
        np.testing.assert_allclose(most, conditional, rtol=1e-5, atol=1e-6)


def test_outside_its_interval_guidance_asks_about_the_context_alone():
    asked = []

    def pair(x, t):
        asked.append("pair")
        return denoise_pair(x, t)

    def alone(x, t):
        asked.append("alone")
        return x * t + CONDITIONAL

    x, within = normal(3, 2, 2, 1), guide(pair, 4.0, interval=(0.3, 0.6), denoise=alone)
    both = guide(denoise_pair, 4.0, interval=(0.3, 0.6))
    for t in (0.2, 0.3, 0.5, 0.6, 0.7):
        np.testing.assert_allclose(within(x, t), both(x, t), rtol=1e-6)
    assert asked == ["alone", "pair", "pair", "pair", "alone"]


def test_guidance_keeps_to_its_interval():
    x = normal(3, 2, 2, 1)
    inside = guide(denoise_pair, 4.0, interval=(0.3, 0.6))
    for t, guidance in (
        (0.1, 1.0),
        (0.29, 1.0),
        (0.3, 4.0),
        (0.45, 4.0),
        (0.6, 4.0),
        (0.61, 1.0),
        (1.0, 1.0),
    ):
        np.testing.assert_allclose(inside(x, t), guide(denoise_pair, guidance)(x, t), rtol=1e-6)


def test_autoguidance_is_guidance_between_two_models():
    def strong(x, t):
        return x * t + CONDITIONAL

    def weak(x, t):
        return x * t * 0.5 + UNCONDITIONAL

    x = normal(3, 2, 2, 1)
    np.testing.assert_allclose(autoguide(strong, weak, 1.0)(x, 0.4), strong(x, 0.4), rtol=1e-5, atol=1e-6)
    for settings in ({}, {"rescale": 0.7}, {"interval": (0.5, 0.6)}):
        ours = autoguide(strong, weak, 2.5, **settings)(x, 0.4)
        np.testing.assert_allclose(ours, guide(denoise_pair, 2.5, **settings)(x, 0.4), rtol=1e-6)


# Thresholding


def test_thresholding_leaves_what_is_within_the_limit():
    clean = np.clip(normal(3, 4, 4, 2), -1, 1)
    np.testing.assert_array_equal(threshold(lambda x, t: clean)(clean, 0.5), clean)


def test_thresholding_brings_each_sample_to_the_limit():
    clean = normal(3, 8, 8, 4) * np.array([0.1, 3, 20], "float32").reshape(3, 1, 1, 1)
    thresholded = threshold(lambda x, t: clean, 0.9, limit=2.0)(clean, 0.5).numpy()
    np.testing.assert_array_equal(thresholded[0], clean[0])
    for before, after in zip(clean[1:], thresholded[1:]):
        cut = np.quantile(np.abs(before), 0.9)
        np.testing.assert_allclose(after, 2 * np.clip(before, -cut, cut) / cut, rtol=1e-5)


def test_thresholding_works_within_the_compiled_loop_of_any_batch():
    @tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 3)), tf.TensorSpec(()), tf.TensorSpec(())])
    def compiled(noise, share, limit):
        return ddim(threshold(crooked, share, limit), noise, uniform_times(5), PROCESS.rates)

    for count in (1, 3):
        noise = tf.constant(normal(count, 4, 4, 3))
        clean = [
            ddim(wrap(crooked), noise, uniform_times(5), PROCESS.rates) for wrap in (cut, lambda own: own)
        ]
        np.testing.assert_allclose(compiled(noise, 0.9, 0.5), clean[0], rtol=1e-4, atol=1e-5)
        assert np.abs(clean[0] - clean[1]).max() > 0.1
    assert compiled.experimental_get_tracing_count() == 1


def cut(denoise):
    return threshold(denoise, 0.9, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"), [({"share": 1.2}, "share .* 1.2"), ({"limit": 0.0}, "limit .* 0")]
)
def test_thresholds_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        threshold(denoise_pair, **settings)


# Inpainting

LATENTS = normal(2, 4, 4, 3, seed=5)
MASK = np.zeros((1, 4, 4, 1), "float32")
MASK[:, 1:3, :2] = 1


def crooked(x, t):
    return tf.tanh(x @ tf.constant(normal(3, 3, seed=9))) + tf.cos(3.0 * t) * tf.sin(x)


def inpainted(name, mask, start=None):
    noise = normal(2, 4, 4, 3)
    start = noise if start is None else start
    fresh = {"step_noise": lambda k: tf.random.stateless_normal(noise.shape, [7, k])}
    settings = fresh if name in ("ddpm", "euler-ancestral", "dpmpp-2m-sde") else {}
    denoise = inpaint(crooked, LATENTS, mask)
    return SAMPLERS[name](denoise, tf.constant(start), uniform_times(8), PROCESS.rates, **settings).numpy()


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_empty_mask_returns_the_picture(name):
    np.testing.assert_allclose(inpainted(name, 0 * MASK), LATENTS, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_full_mask_draws_a_new_picture_and_a_part_keeps_the_rest(name):
    noise = tf.constant(normal(2, 4, 4, 3))
    fresh = {"step_noise": lambda k: tf.random.stateless_normal(noise.shape, [7, k])}
    settings = fresh if name in ("ddpm", "euler-ancestral", "dpmpp-2m-sde") else {}
    new = SAMPLERS[name](crooked, noise, uniform_times(8), PROCESS.rates, **settings)
    np.testing.assert_allclose(inpainted(name, MASK**0), new, rtol=1e-5, atol=1e-5)
    part = inpainted(name, MASK)
    outside = np.broadcast_to(MASK == 0, part.shape)
    np.testing.assert_allclose(part[outside], LATENTS[outside], atol=1e-4)
    np.testing.assert_allclose(
        part[~outside], new.numpy()[~outside], rtol=1e-4, atol=1e-4
    )  # no value sees another's


def test_known_latents_pass_every_time_with_its_noise():
    """Where nothing is drawn, x is the known latents diffused with the noise it began with."""
    noise, seen = normal(2, 4, 4, 3), []

    def denoise(x, t):
        seen.append((float(t), np.asarray(x)))
        return x

    start = PROCESS.start(noise, 1.0, LATENTS)
    ddim(inpaint(denoise, LATENTS, 0 * MASK), start, uniform_times(8), PROCESS.rates)
    for t, x in seen:
        np.testing.assert_allclose(x, PROCESS.start(noise, t, LATENTS), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (1, 4, 4, 3), (4, 4, 1), (2, 4, 1, 1)])
def test_a_mask_of_another_size_is_refused(shape):
    with pytest.raises(ValueError, match=r"mask must be of shape \(B, 4, 4, 1\). Received: \("):
        inpaint(crooked, LATENTS, np.ones(shape, "float32"))


# Between two samples


@pytest.mark.parametrize("way", [lerp, slerp])
def test_ways_begin_and_end_where_they_should(way):
    start, end = normal(3, 4, 4, 2), normal(3, 4, 4, 2, seed=1)
    np.testing.assert_allclose(way(start, end, 0.0), start, atol=1e-5)
    np.testing.assert_allclose(way(start, end, 1.0), end, atol=1e-5)
    np.testing.assert_allclose(way(start, start, 0.3), start, atol=1e-5)
    np.testing.assert_allclose(way(start, end, 0.25), way(end, start, 0.75), atol=1e-5)


def test_the_arc_keeps_the_norm_and_turns_evenly():
    start, end = (noise / np.linalg.norm(noise) for noise in (normal(1, 4, 4, 2), normal(1, 4, 4, 2, seed=1)))
    points = [slerp(start, end, share).numpy().ravel() for share in np.linspace(0, 1, 6, dtype="float32")]
    np.testing.assert_allclose([np.linalg.norm(point) for point in points], 1, rtol=1e-5)
    turns = [math.acos(a @ b) for a, b in zip(points, points[1:])]
    np.testing.assert_allclose(turns, turns[0], rtol=1e-3)


def test_each_sample_has_its_own_arc():
    start, end = normal(3, 4, 4, 2), normal(3, 4, 4, 2, seed=1)
    alone = [slerp(start[i : i + 1], end[i : i + 1], 0.3) for i in range(3)]
    np.testing.assert_allclose(slerp(start, end, 0.3), np.concatenate(alone), rtol=1e-6)
