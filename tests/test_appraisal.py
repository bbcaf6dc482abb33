"""An epoch of the autoencoder is measured, shown, kept and acted on as its rows say, before and after a resume."""

import dataclasses
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from callbacks import Keeper, Signals
from checkpoint import RunFolder
from config import AdversarialConfig, Config, VAETrainingConfig
from evaluate import prior_sheet, reconstruction_sheet
from metrics import kid, kid_floor, mean_estimate, psnr, ssim
from model.discriminator import PatchDiscriminator
from model.vae import AutoencoderKL
from optimizers import adamw
from stages import appraisal
from stages.appraisal import Appraisal, distances, save_plot
from tests.batches import IMAGE_SIZE, distance
from tests.tiny_runs import without_seconds
from trainer import Adversary, VAETrainer, decode_noise, reconstruct

STEPS = 3  # an epoch
HELD_OUT = np.random.default_rng(0).integers(0, 256, (20, IMAGE_SIZE, IMAGE_SIZE, 3)).astype("uint8")
SHOWN = {"n": 20, "image_size": IMAGE_SIZE}  # what a protocol says of them
SHAPE = {"blocks": (0, 0), "latent_channels": 2, "groups": 2, "attention": False}


class Colours:
    """Features without a network: mean colours of a grid of fields."""

    protocol = {"network": "colours"}

    def __call__(self, images, progress=False):
        fields = images.reshape(len(images), 4, IMAGE_SIZE // 4, 4, IMAGE_SIZE // 4, 3)
        return fields.mean(axis=(2, 4)).reshape(len(images), -1) / 255.0


class Seen:
    """A perceptual distance without a network."""

    protocol = {"network": "largest"}

    def __init__(self, name):
        self.name = name

    def __call__(self, pixels, others):
        return distance(pixels, others)


def compiled(vae, perceptual=None, adversary=None, ema=0.0):
    trainer = VAETrainer(vae, perceptual=perceptual, adversary=adversary, ema=ema)
    step = {"learning_rate": 0.01, "weight_decay": 0.0, "clip_norm": 1.0}
    own, judge = adamw(trainer.trained_variables, **step), None
    if adversary:
        judge = adamw(adversary.discriminator.trainable_variables, **step, name="disc_adamw")
    trainer.compile(own, judge)
    return trainer


@pytest.fixture(scope="module")
def vae():
    keras.utils.set_random_seed(2)
    return AutoencoderKL((4, 4), **SHAPE)


@pytest.fixture(scope="module")
def guarded(vae):
    """A trainer with an average, which has weights of its own, and an adversary."""
    adversary = Adversary(PatchDiscriminator(4, 1, groups=2))
    trainer = compiled(vae, Seen("lpips"), adversary, ema=0.9)
    trainer.ema_vae.set_weights([weight + 0.1 for weight in vae.get_weights()])
    return trainer


@pytest.fixture(scope="module")
def plain(vae):
    return compiled(vae)


def settings(adversarial=None, **stage):
    stage = VAETrainingConfig(**{"epochs": 9, "previews": 3, **stage})
    return dataclasses.replace(Config(), vae_training=stage, adversarial=adversarial or AdversarialConfig())


def keeper_of(run, trainer, config):
    """A keeper of the stage that asks an appraisal, which need not measure: a guard's PSNR is given."""
    keeper = Keeper(run, "vae", STEPS, Signals(), config.vae_training.epochs)
    judged = Appraisal(run, trainer, config, HELD_OUT, Colours())
    judged.ask(keeper)
    assert keeper.finish_row == judged.finish_row
    keeper.finish_row = lambda epoch, row: {"val_psnr": 20.0}
    keeper.set_model(trainer)
    return keeper


def finish(keeper, losses, first=0, **logs):
    """Ends epochs that had these losses in validation; returns their rows, as far as it went on."""
    for epoch, value in enumerate(losses[first:], start=first):
        if keeper.stopped:
            break
        keeper.step = STEPS * (epoch + 1)
        keeper.on_epoch_end(epoch, {"val_loss": value, **logs})
    return keeper.run.rows()


def entries(name, estimate):
    return {f"val_{name}": estimate[0], f"val_{name}_low": estimate[1], f"val_{name}_high": estimate[2]}


# What is measured.


def test_a_row_has_what_metrics_say_of_the_averages_reconstructions(run, guarded):
    judged = Appraisal(run, guarded, settings(measure_every=1), HELD_OUT, Colours())
    rebuilt, see = reconstruct(guarded.ema_vae, HELD_OUT), Colours()
    assert not np.array_equal(rebuilt, reconstruct(guarded.vae, HELD_OUT))
    pixels, others = (images.astype("float32") / 127.5 - 1 for images in (HELD_OUT, rebuilt))
    largest = np.square(pixels - others).max(axis=(1, 2, 3)).astype("float64")
    expected = entries("psnr", psnr(HELD_OUT, rebuilt)) | entries("ssim", ssim(HELD_OUT, rebuilt))
    expected |= entries("rkid", kid(see(HELD_OUT), see(rebuilt)))
    expected |= {"val_rkid_floor": kid_floor(see(HELD_OUT), n=20).value}
    protocols = {"rkid_protocol": {"network": "colours"} | SHOWN}
    protocols |= {
        "lpips_protocol": {"network": "largest"} | SHOWN,
        "kl_weight": settings().vae_training.kl_weight,
    }
    for _ in range(2):  # an epoch's measurements leave nothing behind for the next
        row = judged.finish_row(0, {"step": 1})
        seen = [row.pop(name) for name in ("val_lpips", "val_lpips_low", "val_lpips_high")]
        assert seen == pytest.approx(list(mean_estimate(largest)), rel=1e-5)
        assert row == expected | protocols


def test_another_distance_is_no_lpips(run, vae):
    trainer = compiled(vae, Seen("perceptual_distance"))
    row = Appraisal(run, trainer, settings(measure_every=1), HELD_OUT, Colours()).finish_row(0, {"step": 1})
    assert row["perceptual_protocol"] == {"network": "largest", **SHOWN} and row["val_perceptual"] > 0
    assert not any("lpips" in name for name in row)


def test_distances_of_pairs_do_not_depend_on_how_they_are_cut():
    others = HELD_OUT[::-1]
    pixels = [tf.constant(images.astype("float32") / 127.5 - 1) for images in (HELD_OUT, others)]
    for size in (1, 7, 16, 32):
        found = distances(Seen("lpips"), HELD_OUT, others, batch_size=size)
        assert found.dtype == "float64"
        np.testing.assert_allclose(found, distance(*pixels), rtol=1e-5)


@pytest.mark.parametrize(
    ("every", "due"), [(0, []), (1, [1, 2, 3, 4]), (2, [1, 2, 4]), (3, [1, 3, 4]), (9, [1, 4])]
)
def test_kid_is_measured_when_it_is_due_and_psnr_always(run, plain, monkeypatch, every, due):
    judged = Appraisal(run, plain, settings(epochs=4, measure_every=every), HELD_OUT, Colours())
    monkeypatch.setattr(judged, "_save_sheets", lambda *arguments: None)
    rows = [judged.finish_row(epoch, {"step": 1}) for epoch in range(4)]
    assert [epoch + 1 for epoch, row in enumerate(rows) if "val_rkid" in row] == due
    assert all(rows[0][name] == row[name] for row in rows for name in ("val_psnr", "val_ssim"))
    assert not any("perceptual" in name for row in rows for name in row)  # without one


def test_no_more_than_so_many_are_measured(run, plain, monkeypatch):
    monkeypatch.setattr(appraisal, "MEASURED", 7)
    row = Appraisal(run, plain, settings(measure_every=1), HELD_OUT, Colours()).finish_row(0, {"step": 1})
    assert row["val_psnr"] == psnr(HELD_OUT[:7], reconstruct(plain.vae, HELD_OUT[:7])).value
    assert row["rkid_protocol"]["n"] == 7


# What is shown.


def test_the_sheets_show_the_pictures_there_and_back_and_decoded_noise(run, guarded):
    Appraisal(run, guarded, settings(previews=3), HELD_OUT, Colours()).finish_row(4, {"step": 1})
    spread = HELD_OUT[[0, (len(HELD_OUT) - 1) // 2, len(HELD_OUT) - 1]]
    expected = {
        "vae_005.png": reconstruction_sheet(spread, reconstruct(guarded.ema_vae, spread)),
        "vae_prior_005.png": prior_sheet(decode_noise(guarded.ema_vae, 16, IMAGE_SIZE)),
    }
    assert {path.name for path in (run.path / "samples").iterdir()} == expected.keys()
    for name, sheet in expected.items():
        with Image.open(run.path / "samples" / name) as shown:
            np.testing.assert_array_equal(shown, sheet)


def test_with_skips_there_is_no_prior(run):
    trainer = compiled(AutoencoderKL((4, 4), **SHAPE, skips=True))
    row = Appraisal(run, trainer, settings(), HELD_OUT, Colours()).finish_row(0, {"step": 1})
    assert row["val_psnr"] == psnr(HELD_OUT, reconstruct(trainer.vae, HELD_OUT)).value
    assert [path.name for path in (run.path / "samples").iterdir()] == ["vae_001.png"]


# What is kept.


def test_the_best_is_that_of_the_least_loss_and_its_halves_are_the_wholes(run, guarded):
    keeper = keeper_of(run, guarded, settings())
    for epoch, value in enumerate([math.nan, 0.5, 0.4, 0.45, math.nan]):
        weights = [weight + 0.01 for weight in guarded.ema_vae.get_weights()]
        guarded.ema_vae.set_weights(weights)
        if value == 0.4:
            kept = {variable.path: variable.numpy() for variable in guarded.ema_vae.weights}
        keeper.step = STEPS * (epoch + 1)
        keeper.on_epoch_end(epoch, {"val_loss": value})
    assert [row["best"] for row in run.rows()] == [False, True, True, False, False]
    whole = run.best("vae")
    halves = {name: run.best(name) for name in ("encoder", "decoder")}
    for name, half in halves.items():
        assert (half.step, half.state["epoch"], half.state["value"]) == (9, 3, 0.4)
        assert half.state["protocol"] == whole.state["protocol"] == {"metric": "val_loss"}
        assert len(half.tensors) == len(getattr(guarded.vae, name).weights) > 0
        for path, array in half.tensors.items():
            path = path.removeprefix(f"{name}/")
            np.testing.assert_array_equal(array, whole.tensors[f"ema_vae/{path}"], err_msg=path)
            np.testing.assert_array_equal(array, kept[path], err_msg=path)


def test_halves_that_a_crash_kept_from_being_written_are_when_it_is_repeated(run, plain, monkeypatch):
    keeper = keeper_of(run, plain, settings())
    save, calls = run.save_best, []

    def save_one(name, *arguments):
        if name == "decoder" and not calls:
            calls.append(name)
            raise SystemError("power is gone")
        return save(name, *arguments)

    monkeypatch.setattr(run, "save_best", save_one)
    with pytest.raises(SystemError):
        finish(keeper, [0.5])
    assert run.best("decoder") is None and run.rows() == []
    finish(keeper_of(run, plain, settings()), [0.5])
    assert run.best("decoder").step == run.best("encoder").step == STEPS


# What follows.


LOSSES = [0.5, 0.4, 0.4, math.nan, 0.41, 0.3, 0.31, 0.31, 0.32, 0.33]


def test_the_plateaus_rate_is_both_optimizers_and_told_once(run, guarded):
    rule = {"schedule": "plateau", "plateau_epochs": 2, "plateau_factor": 0.1}  # no binary fraction
    keeper, scales = keeper_of(run, guarded, settings(**rule, epochs=20)), []
    for epoch in range(len(LOSSES)):
        finish(keeper, LOSSES[: epoch + 1], first=epoch)
        own, judges = (float(np.asarray(each.rate_scale)) for each in guarded.optimizers_in_use)
        assert own == judges
        scales.append(own)
    expected = [1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001]
    assert scales == pytest.approx(expected)
    told = {row["epoch"]: row["rate"] for row in run.rows() if "rate" in row}
    line = "val_loss stays, so the learning rate is now {} of its schedule"
    assert told == {4: line.format(0.1), 8: line.format(0.01), 10: line.format(0.001)}
    # A row tells the rate with which its epoch was trained.
    trained = [0.01 * scale for scale in [1, *expected[:-1]]]
    assert [row["learning_rate"] for row in run.rows()] == pytest.approx(trained)


def test_other_schedules_leave_the_rate_alone(run, plain):
    plain.optimizer.rate_scale.assign(0.75)
    finish(keeper_of(run, plain, settings(schedule="constant", plateau_epochs=1)), LOSSES[:5])
    assert float(np.asarray(plain.optimizer.rate_scale)) == 0.75
    plain.optimizer.rate_scale.assign(1.0)


def test_a_loss_that_does_not_fall_any_more_ends_the_training(run, plain):
    keeper = keeper_of(run, plain, settings(early_stopping=3))
    rows = finish(keeper, LOSSES)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row.get("stopped") for row in rows] == [None] * 4 + ["stopped: 3 epochs without a lower val_loss"]
    assert keeper.is_done and plain.stop_training
    resumed = keeper_of(run, plain, settings(early_stopping=3))
    resumed.restore(plain)
    assert resumed.is_done and resumed.step == 5 * STEPS


def test_a_resumed_run_decides_as_one_that_was_not_stopped(tmp_path, guarded):
    adversarial = AdversarialConfig(weight=0.5, guard_gap=1.0)
    config = settings(
        adversarial, schedule="plateau", plateau_epochs=1, plateau_factor=0.1, early_stopping=4, epochs=20
    )
    logs = {"gen_loss": 0.0, "gradient_ratio": 0.5, "logit_gap": 2.0}
    rows = []
    for resumes in (False, True):
        guarded.adversary.scale.assign(1.0)
        for optimizer in guarded.optimizers_in_use:
            optimizer.rate_scale.assign(1.0)
        with RunFolder.open(tmp_path / str(resumes), {"seed": 0}) as run:
            keeper = keeper_of(run, guarded, config)
            for epoch in range(len(LOSSES)):
                if resumes:  # another process, which knows what the folder says and nothing else
                    guarded.adversary.scale.assign(7.0 if epoch else 1.0)
                    keeper = keeper_of(run, guarded, config)
                    keeper.restore(guarded)
                finish(keeper, LOSSES[: epoch + 1], first=epoch, **logs)
            rows.append(without_seconds(run.rows()))
    assert rows[0] == rows[1]
    assert [row["epoch"] for row in rows[0] if "stopped" in row] == [10]
    assert [row["adversarial_scale"] for row in rows[0][:3]] == [1.0, 0.5, 0.25]
    assert sum("rate" in row for row in rows[0]) == 7


def test_the_guard_is_asked_where_it_is_wanted(run, guarded, plain):
    logs = {"val_loss": 0.5, "gen_loss": 0.0, "gradient_ratio": 8.0, "logit_gap": 0.0}
    row = {"stage": "vae", "epoch": 1, "step": 3, "best": False, "val_psnr": 20.0, **logs}
    for trainer, guard, is_asked in ((guarded, True, True), (guarded, False, False), (plain, True, False)):
        judged = Appraisal(run, trainer, settings(AdversarialConfig(guard=guard)), HELD_OUT, Colours())
        assert ("guard" in judged.act(row)) == is_asked


# Plots.


def test_a_plot_that_fails_leaves_the_former_one(tmp_path):
    def plot(number, file):
        file.write(b"new")
        if number:
            raise ValueError("no such curve")

    save_plot(plot, tmp_path / "plot.png", 0)
    assert (tmp_path / "plot.png").read_bytes() == b"new"
    (tmp_path / "plot.png").write_bytes(b"old")
    with pytest.raises(ValueError, match="no such curve"):
        save_plot(plot, tmp_path / "plot.png", 1)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("plot.png", b"old")]
