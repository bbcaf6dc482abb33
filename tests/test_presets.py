"""Every system is in the table of presets, ready or with what it lacks."""

import dataclasses

import pytest

from config import (
    CONDITIONINGS,
    PRESETS,
    AdversarialConfig,
    Config,
    EvaluationConfig,
    TextEncoderConfig,
    autoencoder_alone,
    check,
    conditioned,
    light,
    preset,
)
from errors import InputError

SEVEN = ["paper-flowers", "cup3", "coco", "flickr8k", "afhq", "afhq-text", "ffhq-vae"]


READY = [name for name, entry in PRESETS.items() if entry.config and not entry.is_autoencoder]
LARGE = [name for name, entry in PRESETS.items() if entry.is_large]
AUTOENCODERS = [name for name, entry in PRESETS.items() if entry.config]


def test_all_seven_systems_are_named():
    assert list(PRESETS) == SEVEN
    for entry in PRESETS.values():
        assert entry.summary
        assert (entry.config is None) != (entry.lacks is None)


@pytest.mark.parametrize("name", SEVEN)
def test_a_preset_is_ready_or_says_what_it_lacks(name):
    if name in READY:
        assert preset(name).preset == name
        check(preset(name))
    if name in AUTOENCODERS:
        assert preset(name, diffusion=False).preset == name
        check(preset(name, diffusion=False), autoencoder_alone=True)
        return
    for diffusion, ready in ((True, READY), (False, AUTOENCODERS)):
        with pytest.raises(InputError) as refusal:
            preset(name, diffusion=diffusion)
        line = (
            f"--preset: received {name!r}, which needs {PRESETS[name].lacks}; this version cannot do that yet"
        )
        assert str(refusal.value) == f"{line}, expected one of {', '.join(ready)}"


def test_an_autoencoder_alone_is_no_diffusion_model():
    assert [name for name in AUTOENCODERS if name not in READY] == ["ffhq-vae"]
    with pytest.raises(InputError) as refusal:
        preset("ffhq-vae")
    assert str(refusal.value) == (
        f"--preset: received 'ffhq-vae', an autoencoder alone, expected one of {', '.join(READY)}; or type python "
        "cup3.py train-vae --preset ffhq-vae ..."
    )


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(InputError) as refusal:
        preset("roses")
    assert str(refusal.value) == f"--preset: received 'roses', expected one of {', '.join(SEVEN)}"


def test_the_default_config_is_the_default_preset():
    assert Config() == preset("paper-flowers")
    folders = [preset(name).run for name in READY]
    folders += [autoencoder_alone(preset(name, diffusion=False)).run for name in AUTOENCODERS]
    assert len(set(folders)) == len(folders)  # no two share one


def test_the_cups_preset_has_the_cups_shapes():
    cup = preset("cup3")
    assert cup.image_size == 128
    assert cup.unet.level_channels == (128, 256, 512, 512)
    assert (cup.training.epochs, cup.training.batch_size) == (50, 16)
    factor = 2 ** (len(cup.vae.level_channels) - 1)
    assert (cup.image_size // factor, cup.vae.latent_channels) == (16, 4)
    assert cup.text_encoder.width == 768


def test_the_animals_preset_has_its_losses():
    animals, stage = preset("afhq"), preset("afhq").vae_training
    assert (animals.image_size, animals.conditioning, animals.evaluation.guidance) == (512, "none", 1.0)
    assert (stage.recon_loss, stage.perceptual_network, stage.kl_weight > 0) == ("l1", "vgg16", True)
    adversarial = animals.adversarial
    assert adversarial.weight > 0 and adversarial.start > 0 and adversarial.adaptive and adversarial.guard


def test_the_faces_preset_has_its_losses():
    faces = preset("ffhq-vae", diffusion=False)
    stage = faces.vae_training
    assert (stage.recon_loss, stage.kl_schedule, stage.schedule, stage.keep) == (
        "mse",
        "linear",
        "plateau",
        "best",
    )
    assert stage.kl_warmup_steps > 0 and stage.clip_norm > 0
    assert stage.early_stopping > stage.plateau_epochs  # else no lower rate would be tried
    assert (faces.vae.tanh, faces.vae.skips, faces.adversarial.weight) == (True, False, 0.0)


@pytest.mark.parametrize("name", LARGE)
def test_light_keeps_the_data_and_the_judgement(name):
    small, whole = light(preset(name)), preset(name)
    check(small)
    for kept in ("preset", "data", "run", "seed", "image_size", "augmentation", "conditioning"):
        assert getattr(small, kept) == getattr(whole, kept)
    assert small.evaluation.guidance == whole.evaluation.guidance


@pytest.mark.parametrize("name", READY)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_conditioning_changes_what_goes_with_it_and_nothing_else(name, conditioning):
    base = dataclasses.replace(preset(name), data="elsewhere")
    config = conditioned(base, conditioning)
    check(config)
    assert config.conditioning == conditioning
    assert (config.text_encoder.layers > 0) == (conditioning == "text")
    assert (config.evaluation.guidance > 1) == (conditioning != "none")
    layers, guidance = base.text_encoder.layers, base.evaluation.guidance
    own = {
        "conditioning": base.conditioning,
        "text_encoder": dataclasses.replace(config.text_encoder, layers=layers),
        "evaluation": dataclasses.replace(config.evaluation, guidance=guidance),
    }
    assert dataclasses.replace(config, **own) == base
    assert conditioned(base, base.conditioning) == base


def test_what_had_a_conditioning_keeps_its_guidance_and_layers():
    base = preset("cup3")
    assert conditioned(base, "text") is base
    assert conditioned(base, "class").evaluation == base.evaluation
    animals = conditioned(preset("afhq"), "text")  # which had none
    assert animals.text_encoder.layers == TextEncoderConfig.layers
    assert animals.evaluation.guidance == EvaluationConfig.guidance


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_is_trained_alone_in_a_folder_of_its_own(name):
    base = preset(name, diffusion=False)
    alone = autoencoder_alone(base)
    check(alone, autoencoder_alone=True)
    assert alone.run == f"runs/{name.removesuffix('-vae')}-vae"
    assert (alone.conditioning, alone.train_vae, alone.vae_training.measure_every) == ("none", True, 1)
    assert (alone.text_encoder.layers, alone.evaluation.guidance) == (0, 1.0)
    own = {"run": base.run, "train_vae": base.train_vae, "vae_training": base.vae_training}
    expected = conditioned(base, "none")
    assert dataclasses.replace(alone, **own) == expected
    assert dataclasses.replace(alone.vae_training, measure_every=0) == base.vae_training
    assert autoencoder_alone(alone) == alone


def test_light_takes_smaller_networks_than_the_cups():
    small, whole = light(preset("cup3")), preset("cup3")
    assert sum(small.unet.level_channels) < sum(whole.unet.level_channels) / 2
    assert sum(small.vae.level_channels) < sum(whole.vae.level_channels)
    assert small.text_encoder.width < whole.text_encoder.width


def test_light_takes_a_small_autoencoder_and_no_discriminator_for_the_animals():
    small, whole = light(preset("afhq")), preset("afhq")
    assert sum(small.vae.level_channels) < sum(whole.vae.level_channels) / 8
    assert sum(small.unet.level_channels) < sum(whole.unet.level_channels) / 2
    assert small.adversarial == AdversarialConfig() and small.adversarial.weight == 0
    assert small.vae_training.perceptual_network == "efficientnet_lite0"  # which comes with pip
    assert small.vae_training.steps_per_epoch * small.vae_training.epochs <= 5000
