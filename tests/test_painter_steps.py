"""Pictures drawn step by step: how they look after each, and that they end as the compiled ones."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from diffusion.samplers import SAMPLERS, evaluations, step_by_step
from generate import (
    Painter,
    noise_of,
    to_images,
)
from tests.drawings import (
    ENDS,
    PROMPTS,
    denoiser,
    drawn,
    images,
    left_half,
    on_the_way,
    some_picture,
)


class Watch(list):
    """A callback of `Painter.draw` that keeps what it is called with."""

    def __call__(self, first, k, count, pictures):
        self.append((first, k, count, pictures.astype(int)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_step_by_step_and_compiled_draw_the_same(painter, sampler):
    settings, watch = {"sampler": sampler, "guidance": 1, "steps": 4, "seed": 3}, Watch()
    by_steps = images(drawn(painter, PROMPTS[:2], on_step=watch, **settings))
    np.testing.assert_allclose(by_steps, images(drawn(painter, PROMPTS[:2], **settings)), atol=1)
    count = evaluations(sampler, 4)
    assert [entry[:3] for entry in watch] == [(0, k, count) for k in range(count)]
    np.testing.assert_array_equal(watch[-1][3], by_steps)


def test_the_steps_are_the_predicted_clean_latents(networks, painter):
    watch, seen, denoise = Watch(), [], denoiser(networks, PROMPTS[0])
    note = lambda k, count, clean: seen.append(clean)  # noqa: E731

    drawn(painter, PROMPTS[:1], on_step=watch, guidance=1, steps=5, seed=3)
    noise = noise_of(tf.constant([3], tf.int64), (8, 8, 2))
    times = np.linspace(1, 0, 6, dtype="float32")
    loop = functools.partial(step_by_step, callback=note)
    SAMPLERS["ddim"](denoise, noise, times, networks.process.rates, loop=loop)
    for clean, (_, _, _, pictures) in zip(seen, watch, strict=True):
        expected = np.asarray(to_images(networks.vae.decode(clean))).astype(int)
        np.testing.assert_allclose(pictures, expected, atol=1)
    assert np.abs(watch[0][3] - watch[-1][3]).max() > 2


def test_steps_of_all_settings_keep_to_their_batches_and_trace_nothing_anew(networks):
    painter, watch = Painter(networks, 16, batch_size=2), Watch()
    settings = {
        "guidance": 3.0,
        "interval": (0.3, 0.8),
        "threshold": 0.9,
        "sampler": "dpmpp-2m-sde",
        "seed": 4,
    }
    settings |= {"picture": some_picture(), "area": left_half(), "steps": 4}
    by_steps = images(drawn(painter, PROMPTS, on_step=watch, **settings))
    assert [entry[:3] for entry in watch] == [(first, k, 4) for first in (0, 2) for k in range(4)]
    for first, _, _, pictures in watch:
        assert len(pictures) == (2 if first == 0 else 1)
        np.testing.assert_array_equal(pictures[:, :, 8:], len(pictures) * [some_picture()[:, 8:]])
    np.testing.assert_allclose(by_steps, images(drawn(painter, PROMPTS, **settings)), atol=1)
    frames = [on_the_way(painter, **ENDS, to_seed=1, on_step=step) for step in (Watch(), None)]
    np.testing.assert_allclose(*frames, atol=1)
    (denoised,) = painter._denoised.values()
    for function in (denoised, painter._decoded):  # for every sampler, batch, step and setting
        assert function.experimental_get_tracing_count() == 1
