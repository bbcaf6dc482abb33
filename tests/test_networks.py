"""A run's networks are read from its best checkpoint, and what is no such run is refused."""

import json

import numpy as np
import pytest

import averages
from checkpoint import RunFolder, collect, named_variables
from config import to_dict
from errors import InputError
from generate import led_away, load, rebuilt_average
from input_pipeline import Vocabulary
from tests.drawings import DRAWN_CONFIG, diffusion_tensors


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


def kept_averages(step, shape=(2, 3)):
    rng = np.random.default_rng(step)
    return {
        f"average/{length}/{path}": rng.normal(size=shape).astype("float32")
        for length in averages.LENGTHS
        for path in ("unet/kernel", "text_encoder/embeddings")
    }


@pytest.fixture
def run_of_networks(tmp_path, networks):
    """A run whose averages at a step are a thousandth of it of the networks."""
    with RunFolder.open(tmp_path / "networks", to_dict(DRAWN_CONFIG)) as run:
        for step in (400, 800, 1200):
            tensors = {
                f"average/{length}/{name.removeprefix('ema_')}": tensor
                for length in averages.LENGTHS
                for name, tensor in diffusion_tensors(networks, step / 1000).items()
                if name.startswith("ema_")
            }
            run.save_average("diffusion", step, tensors)
    return RunFolder.read(tmp_path / "networks")


@pytest.fixture
def run_of_averages(tmp_path):
    with RunFolder.open(tmp_path / "run", to_dict(DRAWN_CONFIG)) as run:
        for step in (400, 800, 1200):
            run.save_average("diffusion", step, kept_averages(step))
    return RunFolder.read(tmp_path / "run")


def test_an_average_that_was_kept_is_rebuilt_as_it_is(run_of_averages):
    rebuilt = rebuilt_average(run_of_averages, 0.1, step=800)
    assert rebuilt.keys() == {"ema_unet/kernel", "ema_text_encoder/embeddings"}
    expected = kept_averages(800)["average/0.1/unet/kernel"]
    np.testing.assert_allclose(rebuilt["ema_unet/kernel"], expected, atol=1e-3)  # kept in 16 bits


def test_another_average_is_the_mixture_of_those_that_were_kept(run_of_averages):
    marks = [(step, length) for step in (400, 800, 1200) for length in averages.LENGTHS]
    parts = averages.mixture(*zip(*marks, strict=True), 1200, 0.15)
    expected = sum(
        part * kept_averages(step)[f"average/{length}/unet/kernel"]
        for part, (step, length) in zip(parts, marks, strict=True)
    )
    assert np.abs(parts).min() > 1e-4
    np.testing.assert_allclose(rebuilt_average(run_of_averages, 0.15)["ema_unet/kernel"], expected, atol=3e-3)


def test_a_run_without_averages_is_refused(run_path):
    with pytest.raises(
        InputError, match=r"without averages, expected one trained with --training\.snapshots ab"
    ):
        rebuilt_average(RunFolder.read(run_path), 0.1)


def test_what_an_evaluation_has_settled_on_draws(tmp_path, networks):
    with RunFolder.open(tmp_path / "run", to_dict(DRAWN_CONFIG)) as run:
        networks.vocabulary.save(run.vocabulary_path)
        run.finish("vae", collect(named_variables(networks.vae), "vae"), {})
        run.save_best("diffusion", 0.1, 0.05, 0.15, diffusion_tensors(networks), {"step": 3})
        run.finish("diffusion", diffusion_tensors(networks, 0.25), {})
    for weight, value in zip(load(tmp_path / "run")[0].unet.weights, networks.unet.weights, strict=True):
        np.testing.assert_allclose(weight, 0.25 * np.asarray(value))


@pytest.mark.parametrize(
    ("step", "share", "expected"), [(1200, 0.25, 400), (1200, 0.6, 800), (1201, 0.9, 1200)]
)
def test_networks_are_led_away_from_the_nearest_average_before_them(
    run_of_networks, networks, toy_networks, step, share, expected
):
    own = networks._replace(weak=toy_networks(5))
    led, kept = led_away(own, run_of_networks, share, step)
    assert led is own
    assert kept == expected
    for name in ("unet", "text_encoder"):
        for weight, weak in zip(getattr(own, name).weights, getattr(own.weak, name).weights, strict=True):
            np.testing.assert_allclose(weak, expected / 1000 * np.asarray(weight), rtol=2e-3, atol=1e-6)


def test_before_there_is_an_average_networks_are_led_away_from_themselves(run_of_networks, networks):
    own, kept = led_away(networks, run_of_networks, 0.25, 400)
    assert kept is None
    assert own._replace(weak=None) == networks
    for weight, weak in zip(own.unet.weights, own.weak.unet.weights, strict=True):
        np.testing.assert_array_equal(weak, weight)
