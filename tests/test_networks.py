"""A run's networks are read from its best checkpoint, and what is no such run is refused."""

import json

import numpy as np
import pytest

from checkpoint import RunFolder, collect, named_variables
from config import to_dict
from errors import InputError
from generate import (
    load,
)
from input_pipeline import Vocabulary
from tests.drawings import (
    DRAWN_CONFIG,
    diffusion_tensors,
)


def test_load_takes_the_best_averaged_networks(run_path, networks):
    loaded, config = load(run_path)
    assert to_dict(config) == to_dict(DRAWN_CONFIG)
    assert config.run == str(run_path)
    for name in ("vae", "text_encoder", "unet"):
        own, other = getattr(loaded, name), getattr(networks, name)
        assert own is not other
        for weight, value in zip(own.weights, other.weights, strict=True):
            np.testing.assert_array_equal(weight, value, err_msg=weight.path)
    assert loaded.vocabulary.words == networks.vocabulary.words
    assert loaded.process == networks.process


def test_without_a_best_load_takes_the_newest(tmp_path, networks):
    with RunFolder.open(tmp_path / "run", to_dict(DRAWN_CONFIG)) as run:
        networks.vocabulary.save(run.vocabulary_path)
        run.finish("vae", collect(named_variables(networks.vae), "vae"), {})
        run.save("diffusion", 3, diffusion_tensors(networks, 0.25), {})
        run.save("diffusion", 6, diffusion_tensors(networks, 0.5), {})
    for weight, value in zip(load(tmp_path / "run")[0].unet.weights, networks.unet.weights, strict=True):
        np.testing.assert_allclose(weight, 0.5 * np.asarray(value))


def test_a_run_that_has_not_trained_a_u_net_yet_is_refused(tmp_path, networks):
    with RunFolder.open(tmp_path / "run", to_dict(DRAWN_CONFIG)) as run:
        run.finish("vae", collect(named_variables(networks.vae), "vae"), {})
    with pytest.raises(
        InputError, match="has trained no U-Net yet; expected one with a checkpoint: give its t"
    ):
        load(tmp_path / "run")
    with pytest.raises(InputError, match=r"without config\.json, expected the folder of a run"):
        load(tmp_path)


def test_a_run_of_another_config_is_refused(tmp_path, run_path):
    entries = json.loads((run_path / "config.json").read_text())
    del entries["seed"]
    (tmp_path / "config.json").write_text(json.dumps({**entries, "tricks": 1}))
    with pytest.raises(InputError, match=r"unknown keys \['tricks'\] and lacks \['seed'\]"):
        load(tmp_path)


def test_a_damaged_vocabulary_is_refused(run_path, tmp_path):
    (tmp_path / "v.json").write_text("{")
    with pytest.raises(InputError, match=r"v\.json: cannot be read as a vocabulary"):
        Vocabulary.load(tmp_path / "v.json")
