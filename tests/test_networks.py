"""A run's networks are read from its best checkpoint, and what is no such run is refused."""

import json
import shutil

import numpy as np
import pytest

import averages
from checkpoint import RunFolder, collect, named_variables
from config import EvaluationConfig, to_dict
from errors import InputError
from generate import Painter, lead_away, load, rebuilt_average, with_weak
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


def keep_networks(run, networks):
    for step in (400, 800, 1200):
        tensors = {
            f"average/{length}/{name.removeprefix('ema_')}": tensor
            for length in averages.LENGTHS
            for name, tensor in diffusion_tensors(networks, step / 1000).items()
            if name.startswith("ema_")
        }
        run.save_average("diffusion", step, tensors)


@pytest.fixture
def run_of_networks(tmp_path, networks):
    """A run whose averages at a step are a thousandth of it of the networks."""
    with RunFolder.open(tmp_path / "networks", to_dict(DRAWN_CONFIG)) as run:
        keep_networks(run, networks)
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


LED = EvaluationConfig(autoguidance=2.0, weak=0.25)


def weak_share(painter):
    """The one share of the painter's weights that its weak networks have."""
    shares = set()
    for name in ("unet", "text_encoder"):
        pairs = zip(
            getattr(painter.networks, name).weights, getattr(painter.networks.weak, name).weights, strict=True
        )
        for weight, weak in pairs:
            weight, weak = np.asarray(weight, "float64"), np.asarray(weak)
            share = round(float((weight * weak).sum() / max((weight**2).sum(), 1e-9)), 2)
            np.testing.assert_allclose(weak, share * weight, rtol=2e-3, atol=1e-3)
            if np.any(weight):
                shares.add(share)
    (share,) = shares
    return share


@pytest.mark.parametrize(
    ("step", "share", "expected"), [(1200, 0.25, 400), (1200, 0.6, 800), (1201, 0.9, 1200)]
)
def test_a_painter_leads_away_from_the_nearest_average_before(
    run_of_networks, networks, step, share, expected
):
    painter = Painter(networks, 16)
    assert (
        lead_away(painter, run_of_networks, EvaluationConfig(autoguidance=2.0, weak=share), step) == expected
    )
    assert weak_share(painter) == expected / 1000


def test_the_same_weak_networks_get_the_weights_of_each_step(run_of_networks, networks):
    painter = Painter(networks, 16)
    assert lead_away(painter, run_of_networks, LED, 400) is None  # none was kept before
    assert weak_share(painter) == 1
    weak = painter.networks.weak
    assert lead_away(painter, run_of_networks, LED, 1200) == 400
    assert painter.networks.weak is weak
    assert weak_share(painter) == 0.4


def test_where_autoguidance_is_off_there_are_no_weak_networks(run_of_networks, networks):
    painter = Painter(networks, 16)
    assert lead_away(painter, run_of_networks, EvaluationConfig(autoguidance=1.0), 1200) is None
    assert painter.networks is networks


def test_a_frozen_text_encoder_is_the_weak_one_too(run_of_networks, networks, monkeypatch):
    whole = RunFolder.average
    frozen = lambda *at: {name: t for name, t in whole(*at).items() if "/text_encoder/" not in name}  # noqa: E731
    monkeypatch.setattr(RunFolder, "average", frozen)
    painter = Painter(networks, 16)
    assert lead_away(painter, run_of_networks, LED, 1200) == 400
    for name, share in (("unet", 0.4), ("text_encoder", 1.0)):
        weak = getattr(painter.networks.weak, name).weights
        for weight, early in zip(getattr(networks, name).weights, weak, strict=True):
            np.testing.assert_allclose(early, share * np.asarray(weight), rtol=2e-3, atol=1e-3)


def test_a_damaged_average_is_passed_over_with_a_warning(run_of_networks, networks):
    (file,) = run_of_networks.path.glob("averages/**/*400*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    painter = Painter(networks, 16)
    with pytest.warns(UserWarning, match="damaged: its SHA-256 .*; passed over"):
        assert lead_away(painter, run_of_networks, LED, 1200) == 800


def test_the_newest_weights_are_led_away_from_what_they_were(tmp_path, run_path, networks):
    shutil.copytree(run_path, tmp_path / "run")
    with RunFolder.open(tmp_path / "run", to_dict(DRAWN_CONFIG)) as run:
        run.save("diffusion", 800, diffusion_tensors(networks), {})
        run.save_best("diffusion", 0.01, 0.005, 0.015, diffusion_tensors(networks), {"step": 1600})
        run.finish("diffusion", diffusion_tensors(networks), {"step": 1600, "length": 0.05})
        keep_networks(run, networks)
    told = {newest: load(tmp_path / "run", newest)[0].weights for newest in (False, True)}
    assert told == {False: ("average", 1600, 0.05), True: ("newest", 800, None)}
    shares = {}
    for newest in (False, True):
        led = with_weak(*load(tmp_path / "run", newest), 0.5)
        assert led.weak.weights is None
        shares[newest] = weak_share(Painter(led, 16))
    assert shares == {False: 0.8, True: 0.4}


def test_weak_networks_of_two_shares_are_two(tmp_path, run_path, networks):
    shutil.copytree(run_path, tmp_path / "run")
    with RunFolder.open(tmp_path / "run", to_dict(DRAWN_CONFIG)) as run:
        run.save_best("diffusion", 0.01, 0.005, 0.015, diffusion_tensors(networks), {"step": 1600})
        keep_networks(run, networks)
    loaded, config = load(tmp_path / "run")
    painters = [Painter(with_weak(loaded, config, share), 16) for share in (0.25, 0.5)]
    assert [weak_share(painter) for painter in painters] == [0.4, 0.8]
    again = with_weak(painters[0].networks, config, 0.75)
    assert weak_share(Painter(again, 16)) == 1.2
    assert weak_share(painters[0]) == 0.4
