"""The table of presets: systems by name."""

import dataclasses
from dataclasses import dataclass

from config.settings import (
    AugmentationConfig,
    Config,
    DiffusionConfig,
    EvaluationConfig,
    TextEncoderConfig,
    TrainingConfig,
    UNetConfig,
    VAEConfig,
    VAETrainingConfig,
)
from errors import InputError

PHOTOGRAPHS = AugmentationConfig(resize_min=1.0, resize_max=1.15, brightness=0.1, contrast=0.1)

CUP3 = Config(
    preset="cup3",
    data="dataset",
    run="runs/cup3",
    image_size=128,
    augmentation=PHOTOGRAPHS,
    vae=VAEConfig(level_channels=(32, 64, 128, 128), blocks=(1, 1, 1, 1), latent_channels=4, attention=True),
    text_encoder=TextEncoderConfig(width=768, layers=2, heads=12),
    unet=UNetConfig(
        level_channels=(128, 256, 512, 512),
        attention_levels=(True, True, True, False),
        blocks=2,
        head_channels=64,
        groups=32,
        ff_expansion=4,
        pooled_context=False,
    ),
    diffusion=DiffusionConfig(target="velocity"),
    vae_training=VAETrainingConfig(
        epochs=20, steps_per_epoch=None, optimizer="adamw", learning_rate=1e-3, warmup_steps=500
    ),
    training=TrainingConfig(
        epochs=50,
        steps_per_epoch=None,
        batch_size=16,
        optimizer="adamw",
        learning_rate=1e-4,
        times="uniform",
        warmup_steps=1000,
        ema=0.999,
        validation_fraction=0.1,
        latent_crops=4,
        snapshots=4,
    ),
    evaluation=EvaluationConfig(
        images=512,
        sampler="ddim",
        steps=20,
        guidance=3.0,
        guidance_interval=(0.0, 1.0),
        autoguidance=1.0,
        batch_size=32,
    ),
)


@dataclass(frozen=True)
class Preset:
    """A system by name: its settings, or what this version lacks to run it."""

    summary: str
    config: Config | None = None
    lacks: str | None = None
    is_large: bool = False  # whether `light` makes it smaller


PRESETS = {
    "paper-flowers": Preset("drawn flowers, 64 px, offline, minutes on two cores", Config()),
    "cup3": Preset("Deep Learning Cup 3: Oxford-102 flowers, 128 px, the Cup's U-Net", CUP3, is_large=True),
    "coco": Preset("COCO 2014 captions", lacks="CLIP, the linear schedule and 16-bit floats"),
    "flickr8k": Preset("Flickr8k with a fine-tuned CLIP", lacks="contrastive training of CLIP"),
    "afhq": Preset("cats at 512 px, unconditional", lacks="the adversarial loss"),
    "afhq-text": Preset("cats at 512 px from captions", lacks="the adversarial loss and CLIP"),
    "ffhq-vae": Preset(
        "faces: an autoencoder alone", lacks="KL annealing and training of an autoencoder alone"
    ),
}


def preset(name: str) -> Config:
    """The settings of a preset.

    Raises:
        InputError: the name is unknown, or names a system that this version cannot train yet.
    """
    ready = ", ".join(key for key, entry in PRESETS.items() if entry.config)
    if name not in PRESETS:
        raise InputError(f"--preset: received {name!r}, expected one of {', '.join(PRESETS)}")
    if PRESETS[name].config is None:
        raise InputError(
            f"--preset: received {name!r}, which needs {PRESETS[name].lacks}; "
            f"this version cannot do that yet, expected one of {ready}"
        )
    return PRESETS[name].config


def conditioned(config: Config, conditioning: str) -> Config:
    """The same settings with pictures drawn from "text", "class" or "none", and what goes with it.

    A label, and the empty text of a model without conditioning, are one token: its learned embedding needs no
    transformer. Without conditioning there is nothing that guidance could follow, so it is off.
    """
    if conditioning != "text":
        text_encoder = dataclasses.replace(config.text_encoder, layers=0)
        config = dataclasses.replace(config, conditioning=conditioning, text_encoder=text_encoder)
    if conditioning == "none":
        evaluation = dataclasses.replace(config.evaluation, guidance=1.0)
        config = dataclasses.replace(config, evaluation=evaluation)
    return config


def light(config: Config) -> Config:
    """The same data and pictures with small networks, sized for photographs and an hour on two cores at 64 px."""
    return dataclasses.replace(
        config,
        vae=VAEConfig(latent_channels=8),
        text_encoder=TextEncoderConfig(),
        unet=UNetConfig(level_channels=(96, 192)),
        diffusion=dataclasses.replace(config.diffusion, max_signal_rate=0.995),
        vae_training=VAETrainingConfig(epochs=6, steps_per_epoch=500),
        training=TrainingConfig(
            epochs=15,
            steps_per_epoch=200,
            learning_rate=3e-3,
            latent_crops=4,
            ema=0.999,
            validation_fraction=0.1,
        ),
        evaluation=dataclasses.replace(config.evaluation, every=5, batch_size=64),
    )
