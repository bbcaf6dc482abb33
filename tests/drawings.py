"""Requests, pictures and a small run for the tests of `generate`."""

import numpy as np
import tensorflow as tf
from PIL import Image

import generate
from checkpoint import collect, named_variables
from config import Config, DiffusionConfig, EvaluationConfig, TextEncoderConfig, UNetConfig, VAEConfig
from diffusion.samplers import SAMPLERS

PROMPTS = ["one red flower", "a blue flower with a yellow center", "two green leaves"]
STEPS, GUIDANCE = 3, 2.0
INTERVAL = (0.0, 0.5)
ENDS = {"prompt": PROMPTS[0], "to_prompt": PROMPTS[1]}  # of three and seven words


def drawn(painter, prompts, **settings):
    settings = {"steps": STEPS, "guidance": GUIDANCE, **settings}
    return list(generate.generate(painter, prompts, **settings))


def images(pictures):
    return np.stack([picture.image for picture in pictures]).astype(int)


def on_the_way(painter, frames=3, **settings):
    settings = {"steps": STEPS, "guidance": GUIDANCE, **settings}
    return images(generate.between(painter, frames=frames, **settings))


def some_picture(seed=0, side=16):
    """Smooth colours, uint8 (side, side, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype("uint8")
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def left_half(side=16):
    return np.repeat(np.arange(side)[None] < side // 2, side, axis=0).astype("float32")


DRAWN_CONFIG = Config(
    image_size=16,
    vae=VAEConfig(level_channels=(4, 4), blocks=(0, 0), latent_channels=2, groups=2),
    text_encoder=TextEncoderConfig(width=8, layers=1, heads=2),
    unet=UNetConfig((8,), (True,), blocks=0, head_channels=4, groups=4, ff_expansion=1, pooled_context=False),
    diffusion=DiffusionConfig(target="velocity"),
    evaluation=EvaluationConfig(sampler="unipc", spacing="logsnr-uniform", autoguidance=1.0),
)


def diffusion_tensors(networks, scale=1.0):
    tensors = {}
    for name in ("unet", "text_encoder"):
        own = collect(named_variables(getattr(networks, name)), f"ema_{name}")
        raw = collect(named_variables(getattr(networks, name)), name)
        tensors |= {key: scale * value for key, value in own.items()} | {key: 0 * raw[key] for key in raw}
    return tensors


def denoiser(networks, prompt):
    """`denoise` of a picture without guidance, by the networks themselves."""
    _, text_encoder, unet, process, vocabulary, *_ = networks
    tokens, mask = map(tf.constant, vocabulary.encode([prompt]))
    context = text_encoder([tokens, mask])

    def denoise(x, t):
        t = tf.reshape(t, [1])
        return process.denoised(unet([process.scaled(x, t), t, context, mask]), x, t)

    return denoise


def by_hand(networks, sampler, times, seed, denoise, noise=None):
    """A picture, uint8 (H, W, 3), by the pure function of that name."""
    vae, process, shape = networks.vae, networks.process, (8, 8, 2)

    def step_noise(k):
        return generate.noise_of(tf.constant([seed], tf.int64), shape, k + 1)

    own = {"step_noise": step_noise} if sampler in ("ddpm", "euler-ancestral", "dpmpp-2m-sde") else {}
    noise = generate.noise_of(tf.constant([seed], tf.int64), shape) if noise is None else noise
    latents = SAMPLERS[sampler](denoise, process.start(noise, times[0]), times, process.rates, **own)
    return np.asarray(generate.to_images(vae.decode(latents))).astype(int)[0]
