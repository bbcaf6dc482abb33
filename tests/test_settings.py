"""A config survives the way to disk and back, and unknown keys are refused."""

import dataclasses
import json

import pytest

import config as settings
from config import PRESETS, Config, from_dict, part, preset, to_dict
from errors import InputError

READY = [name for name, entry in PRESETS.items() if entry.config]


@pytest.mark.parametrize("name", READY)
def test_a_config_survives_json(name):
    start = {"run": "elsewhere", "gpus": "0,2", "track": 5}
    config = dataclasses.replace(preset(name, diffusion=False), **start, seed=7)
    entries = json.loads(json.dumps(to_dict(config)))
    assert not entries.keys() & start.keys()
    assert from_dict(entries, **start) == config
    defaults = {name: getattr(Config, name) for name in start}
    assert from_dict(entries) == dataclasses.replace(config, **defaults)


def test_every_setting_is_kept():
    entries = to_dict(Config())
    flat = {item.name for item in dataclasses.fields(Config)} - {"run", "gpus", "track"}
    assert entries.keys() == flat
    parts = {
        "vae": settings.VAEConfig,
        "vae_training": settings.VAETrainingConfig,
        "adversarial": settings.AdversarialConfig,
    }
    for name, kind in parts.items():
        assert entries[name].keys() == {item.name for item in dataclasses.fields(kind)}


def test_unknown_and_missing_keys_are_refused():
    entries = to_dict(Config())
    with pytest.raises(
        InputError, match=r"^config: received unknown keys \['tricks'\] and lacks \[\]; expected"
    ):
        from_dict({**entries, "tricks": 1})
    with pytest.raises(
        InputError, match=r"^config\.unet: received unknown keys \['x'\] and lacks \['blocks'\]"
    ):
        unet = {name: value for name, value in entries["unet"].items() if name != "blocks"}
        from_dict({**entries, "unet": {**unet, "x": 1}})
    del entries["seed"]
    with pytest.raises(InputError, match=r"lacks \['seed'\]"):
        from_dict(entries)


def test_part_gives_the_keywords_of_a_constructor():
    keywords = part(settings.AugmentationConfig(flip=False))
    assert settings.AugmentationConfig(**keywords) == settings.AugmentationConfig(flip=False)
    assert keywords["flip"] is False


def test_settings_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().unet.blocks = 1
