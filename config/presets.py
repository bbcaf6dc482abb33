"""The table of presets: systems by name."""

import dataclasses
import json
from dataclasses import dataclass

from config.checks import flag_of
from config.settings import (
    AdversarialConfig,
    AugmentationConfig,
    Config,
    DiffusionConfig,
    EvaluationConfig,
    TextEncoderConfig,
    TrainingConfig,
    UNetConfig,
    VAEConfig,
    VAETrainingConfig,
    to_dict,
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

LARGE_VAE = VAEConfig(level_channels=(128, 256, 512, 512), blocks=(2, 2, 2, 2), groups=32, attention=True)

AFHQ = Config(
    preset="afhq",
    data="afhq",
    run="runs/afhq",
    image_size=512,
    conditioning="none",
    vae=LARGE_VAE,
    text_encoder=TextEncoderConfig(layers=0),
    unet=dataclasses.replace(CUP3.unet, attention_levels=(False, True, True, True)),
    diffusion=DiffusionConfig(target="velocity"),
    vae_training=VAETrainingConfig(
        epochs=30,
        steps_per_epoch=None,
        batch_size=4,
        optimizer="adamw",
        learning_rate=1e-4,
        warmup_steps=1000,
        recon_loss="l1",
        kl_weight=1e-6,
        perceptual_weight=1.0,
        perceptual_network="vgg16",
        ema=0.999,
    ),
    adversarial=AdversarialConfig(weight=0.5, start=20_000),
    training=dataclasses.replace(CUP3.training, epochs=200, latent_crops=1),
    evaluation=dataclasses.replace(CUP3.evaluation, guidance=1.0),
)

FFHQ_VAE = Config(
    preset="ffhq-vae",
    data="ffhq",
    run="runs/ffhq-vae",
    image_size=256,
    conditioning="none",
    vae=VAEConfig(
        level_channels=(64, 128, 256, 256), blocks=(1, 1, 1, 1), groups=32, attention=True, tanh=True
    ),
    vae_training=VAETrainingConfig(
        epochs=50,
        steps_per_epoch=None,
        batch_size=16,
        optimizer="adamw",
        learning_rate=3e-4,
        warmup_steps=1000,
        kl_weight=1e-4,
        kl_schedule="linear",
        kl_warmup_steps=10_000,
        perceptual_weight=0.0,
        schedule="plateau",
        early_stopping=8,
        keep="best",
    ),
    text_encoder=TextEncoderConfig(layers=0),
    training=TrainingConfig(validation_fraction=0.03),
    evaluation=EvaluationConfig(guidance=1.0),
)


@dataclass(frozen=True)
class Preset:
    """A system by name: its settings, or what this version lacks to run it."""

    summary: str
    config: Config | None = None
    lacks: str | None = None
    is_large: bool = False  # whether `light` makes it smaller
    is_autoencoder: bool = False  # whether it has no diffusion model


PRESETS = {
    "paper-flowers": Preset("drawn flowers, 64 px, offline, minutes on two cores", Config()),
    "cup3": Preset("Deep Learning Cup 3: Oxford-102 flowers, 128 px, the Cup's U-Net", CUP3, is_large=True),
    "coco": Preset("COCO 2014 captions", lacks="CLIP, the linear schedule and 16-bit floats"),
    "flickr8k": Preset("Flickr8k with a fine-tuned CLIP", lacks="contrastive training of CLIP"),
    "afhq": Preset("AFHQv2, animals' faces at 512 px, unconditional", AFHQ, is_large=True),
    "afhq-text": Preset("cats at 512 px from captions", lacks="CLIP"),
    "ffhq-vae": Preset("faces: an autoencoder alone, by train-vae", FFHQ_VAE, is_autoencoder=True),
}


def preset(name: str, diffusion=True) -> Config:
    """The settings of a preset, for a diffusion model or for an autoencoder alone.

    Raises:
        InputError: the name is unknown, or names a system that this version cannot train yet, or not so.
    """
    ready = ", ".join(
        key for key, entry in PRESETS.items() if entry.config and not (diffusion and entry.is_autoencoder)
    )
    if name not in PRESETS:
        raise InputError(f"--preset: received {name!r}, expected one of {', '.join(PRESETS)}")
    if PRESETS[name].config is None:
        raise InputError(
            f"--preset: received {name!r}, which needs {PRESETS[name].lacks}; "
            f"this version cannot do that yet, expected one of {ready}"
        )
    if diffusion and PRESETS[name].is_autoencoder:
        raise InputError(
            f"--preset: received {name!r}, an autoencoder alone, expected one of {ready}; or type python cup3.py "
            f"train-vae --preset {name} ..."
        )
    return PRESETS[name].config


def conditioned(config: Config, conditioning: str) -> Config:
    """The same settings with pictures drawn from "text", "class" or "none", and what goes with it.

    A label, and the empty text of a model without conditioning, are one token: its learned embedding needs no
    transformer. Without conditioning there is nothing that guidance could follow, so it is off. Settings that had
    neither get the default ones.
    """
    if conditioning == config.conditioning == "text":
        return config
    layers = (config.text_encoder.layers or TextEncoderConfig.layers) if conditioning == "text" else 0
    guidance = EvaluationConfig.guidance if config.conditioning == "none" else config.evaluation.guidance
    return dataclasses.replace(
        config,
        conditioning=conditioning,
        text_encoder=dataclasses.replace(config.text_encoder, layers=layers),
        evaluation=dataclasses.replace(
            config.evaluation, guidance=1.0 if conditioning == "none" else guidance
        ),
    )


def autoencoder_alone(config: Config) -> Config:
    """The same autoencoder trained alone, on pictures, in a folder of its own, and measured each epoch."""
    vae_training = dataclasses.replace(config.vae_training, measure_every=1)
    run = config.run if config.run.endswith("-vae") else f"{config.run}-vae"
    return dataclasses.replace(
        conditioned(config, "none"), run=run, train_vae=True, vae_training=vae_training
    )


def flags_for_its_autoencoder(entries: dict) -> str:
    """The flags that another run needs to take the autoencoder of a run of these settings, as `to_dict` gives them."""
    default = json.loads(json.dumps(to_dict(Config())))  # lists for tuples, as a run folder keeps them
    flags = [
        flag_of("--", name, entries[name])
        for name in ("seed", "image_size")
        if entries[name] != default[name]
    ]
    flags += [
        flag_of("--vae.", name, value)
        for name, value in entries["vae"].items()
        if name != "latent_scale" and value != default["vae"][name]
    ]
    fraction = entries["training"][
        "validation_fraction"
    ]  # with the seed, it says which pictures are held out
    if fraction != default["training"]["validation_fraction"]:
        flags.append(flag_of("--training.", "validation_fraction", fraction))
    return " ".join(flags)


def light(config: Config) -> Config:
    """The same data and pictures with small networks, sized for photographs and an hour on two cores at 64 px."""
    return dataclasses.replace(
        config,
        vae=VAEConfig(latent_channels=8),
        text_encoder=TextEncoderConfig(),
        unet=UNetConfig(level_channels=(96, 192)),
        diffusion=dataclasses.replace(config.diffusion, max_signal_rate=0.995),
        vae_training=VAETrainingConfig(epochs=6, steps_per_epoch=500),
        adversarial=AdversarialConfig(),
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
