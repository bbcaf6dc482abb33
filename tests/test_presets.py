"""Every system is in the table of presets, ready or with what it lacks."""

import dataclasses

import pytest

from config import CONDITIONINGS, PRESETS, Config, check, conditioned, light, preset
from errors import InputError

SEVEN = ["paper-flowers", "cup3", "coco", "flickr8k", "afhq", "afhq-text", "ffhq-vae"]


READY = [name for name, entry in PRESETS.items() if entry.config]


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
        return
    with pytest.raises(InputError) as refusal:
        preset(name)
    line = f"--preset: received {name!r}, which needs {PRESETS[name].lacks}; this version cannot do that yet"
    assert str(refusal.value) == f"{line}, expected one of {', '.join(READY)}"


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(InputError) as refusal:
        preset("roses")
    assert str(refusal.value) == f"--preset: received 'roses', expected one of {', '.join(SEVEN)}"


def test_the_default_config_is_the_default_preset():
    assert Config() == preset("paper-flowers")
    assert len({preset(name).run for name in READY}) == len(READY)  # no two presets share a folder


def test_the_cups_preset_has_the_cups_shapes():
    cup = preset("cup3")
    assert cup.image_size == 128
    assert cup.unet.level_channels == (128, 256, 512, 512)
    assert (cup.training.epochs, cup.training.batch_size) == (50, 16)
    factor = 2 ** (len(cup.vae.level_channels) - 1)
    assert (cup.image_size // factor, cup.vae.latent_channels) == (16, 4)
    assert cup.text_encoder.width == 768


@pytest.mark.parametrize("name", READY)
def test_light_keeps_the_data_and_the_judgement(name):
    small, whole = light(preset(name)), preset(name)
    check(small)
    for kept in ("preset", "data", "run", "seed", "image_size", "augmentation"):
        assert getattr(small, kept) == getattr(whole, kept)
    assert small.evaluation.guidance == whole.evaluation.guidance


@pytest.mark.parametrize("name", READY)
def test_a_conditioning_changes_what_goes_with_it_and_nothing_else(name):
    base = dataclasses.replace(preset(name), data="elsewhere")
    for conditioning in CONDITIONINGS:
        config = conditioned(base, conditioning)
        check(config)
        assert config.conditioning == conditioning
        expected_layers = base.text_encoder.layers if conditioning == "text" else 0
        expected_guidance = 1 if conditioning == "none" else base.evaluation.guidance
        assert (config.text_encoder.layers, config.evaluation.guidance) == (
            expected_layers,
            expected_guidance,
        )
        text_encoder = dataclasses.replace(config.text_encoder, layers=base.text_encoder.layers)
        evaluation = dataclasses.replace(config.evaluation, guidance=base.evaluation.guidance)
        own = {"conditioning": "text", "text_encoder": text_encoder, "evaluation": evaluation}
        assert dataclasses.replace(config, **own) == base
    assert conditioned(base, "text") is base


def test_light_takes_smaller_networks_than_the_cups():
    small, whole = light(preset("cup3")), preset("cup3")
    assert sum(small.unet.level_channels) < sum(whole.unet.level_channels) / 2
    assert sum(small.vae.level_channels) < sum(whole.vae.level_channels)
    assert small.text_encoder.width < whole.text_encoder.width
