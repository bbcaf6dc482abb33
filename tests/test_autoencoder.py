"""A run's autoencoder is trained, taken from another run, or both; its latents have unit scale."""

import numpy as np
import tensorflow as tf

import cup3
from callbacks import Signals
from checkpoint import RunFolder
from config import to_dict
from generate import load
from input_pipeline import read_pictures, split
from stages.autoencoder import trained_autoencoder
from stages.data import prepared_data
from tests.tiny_runs import refusal, words


def test_the_latents_have_unit_scale(finished, flowers):
    networks, _ = load(finished[0])
    train_ids, _ = split(48, 0.125, seed=0)
    paths = sorted((flowers / "102flowers").iterdir())[:48]
    images = read_pictures(paths, 32, progress=False)[train_ids]
    mean, logvar = (np.asarray(part) for part in networks.vae.encode(images.astype("float32") / 127.5 - 1))
    latents = mean + np.exp(logvar / 2) * np.random.default_rng(0).normal(size=mean.shape)
    np.testing.assert_allclose(latents.mean((0, 1, 2)), 0, atol=0.04)
    np.testing.assert_allclose(latents.std((0, 1, 2)), 1, atol=0.04)


def test_train_vae_begins_with_the_other_runs_autoencoder(finished, flowers, tmp_path):
    still = {"vae_training.learning_rate": 0.0, "vae_training.epochs": 1, "vae_training.steps_per_epoch": 1}
    still |= {"vae_training.perceptual_weight": 0.1, "vae_training.perceptual_depth": 1}
    line = words(flowers, tmp_path / "run", vae_from=finished[0], **still)
    chosen = cup3.parse([*line, "--train-vae", "True"])[1]
    with RunFolder.open(tmp_path / "run", to_dict(chosen)) as run, Signals() as signals:
        data = prepared_data(chosen, run)
        trained_autoencoder(chosen, run, data, None, tf.distribute.get_strategy(), signals)
        (row,) = run.rows()
        assert (row["stage"], row["step"]) == ("vae", 1)  # it was trained
        assert row["loss"] > row["recon_loss"] and 0 < row["perceptual_loss"] < 4
        mine, others = run.finished("vae").tensors, RunFolder.read(finished[0]).finished("vae").tensors
    for name in mine:  # at no speed, so it is what it began with, and its statistics come out the same
        np.testing.assert_allclose(mine[name], others[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_an_autoencoder_of_another_shape_or_none_is_refused(finished, flowers, tmp_path, capsys):
    other_shape = words(flowers, tmp_path / "run", vae_from=finished[0], **{"vae.latent_channels": 3})
    line = refusal(capsys, other_shape)
    told = "whose --vae.latent-channels is 2, expected 3; give --vae.latent-channels 2"
    assert line == f"--vae-from: received {finished[0]}, {told}"
    other_levels = words(flowers, tmp_path / "run", vae_from=finished[0], **{"vae.level_channels": (4, 8)})
    assert refusal(capsys, other_levels).endswith(
        "whose --vae.level-channels is 4 4, expected 4 8; give --vae.level-channels 4 4"
    )
    both = {"vae.level_channels": (4, 8), "vae.latent_channels": 3}
    assert refusal(capsys, words(flowers, tmp_path / "run", vae_from=finished[0], **both)).endswith(
        "give --vae.level-channels 4 4 --vae.latent-channels 2"
    )
    with RunFolder.open(tmp_path / "bare", {"seed": 0}):
        pass
    bare = refusal(capsys, words(flowers, tmp_path / "run", vae_from=tmp_path / "bare"))
    assert bare == f"--vae-from: received {tmp_path / 'bare'}, expected a run with a trained autoencoder"
    none = refusal(capsys, words(flowers, tmp_path / "run", vae_from=tmp_path / "absent"))
    assert none.startswith(f"{tmp_path / 'absent'}: received a folder without config.json")
    assert not (tmp_path / "run").exists()
