"""An autoencoder trained alone, against a discriminator: what its run leaves, how it goes on, what is refused."""

import contextlib
import io
import json
import os
import re
import shlex
import signal

import numpy as np
import pytest
from PIL import Image

import callbacks
import cup3
from checkpoint import RunFolder
from config import to_dict
from tests.tiny_runs import TINY, assert_same, final_tensors, refusal, without_seconds, words

EPOCHS, STEPS, START = 3, 3, 4
# Which of the flags of a training there are.
AUTOENCODER = {
    name: value
    for name, value in TINY.items()
    if name.split(".")[0] not in ("unet", "text-encoder", "diffusion", "epochs", "batch-size")
}
ADVERSARIAL = {
    "vae_training.epochs": EPOCHS,
    "vae_training.ema": 0.5,
    "vae_training.schedule": "plateau",
    "vae_training.plateau_epochs": 1,
    "vae_training.kl_schedule": "cosine",
    "vae_training.kl_warmup_steps": 5,
    "vae_training.perceptual_weight": 0.1,
    "vae_training.perceptual_depth": 1,
    "vae_training.keep": "best",
    "adversarial.weight": 0.5,
    "adversarial.start": START,
    "adversarial.channels": 4,
    "adversarial.groups": 2,
    "adversarial.layers": 2,
    "adversarial.lecam_weight": 0.1,
    "adversarial.guard_ratio": 0.01,
}


def line(data, run, **changes):
    """The command line of a tiny adversarial training."""
    return ["train-vae", *words(data, run, of=AUTOENCODER, **(ADVERSARIAL | changes))]


@pytest.fixture(scope="module")
def alone(flowers, tmp_path_factory):
    """(run folder, what was printed) of an autoencoder's run that nothing stopped."""
    folder, printed = tmp_path_factory.mktemp("runs") / "vae", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cup3.main([*line(flowers, folder), "--track", "4"]) == 0
    return folder, printed.getvalue()


def test_its_run_folder_explains_itself(alone, flowers):
    folder, printed = alone
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for name in ("vae_curves.png", "curves.png", "latents.png", "latents.json", "tracked_vae.png"):
        assert name in found
    for entry in (
        "best/vae",
        "best/encoder",
        "best/decoder",
        "networks/vae",
        "checkpoints/vae_good/00000009",
    ):
        assert f"{entry}/tensors.safetensors" in found
    for name in ("vae_001", "vae_003", "vae_prior_003"):
        with Image.open(folder / "samples" / f"{name}.png") as sheet:
            assert np.asarray(sheet).std() > 5
    assert [json.loads(row)["step"] for row in (folder / "tracked_vae.jsonl").open()] == [0, 4, 8]
    command = re.search(r"^   python cup3.py (--vae-from .*)$", printed, re.MULTILINE)[1]
    others = cup3.parse(shlex.split(command))[1]
    assert (others.vae_from, others.data, others.image_size) == (str(folder), str(flowers), 32)
    assert json.loads(json.dumps(to_dict(others)["vae"])) == RunFolder.read(folder).config["vae"]
    assert json.loads((folder / "config.json").read_text())["conditioning"] == "none"


def test_its_rows_have_each_loss_once_it_counts(alone):
    rows = RunFolder.read(alone[0]).rows()
    assert [(row["stage"], row["epoch"], row["step"]) for row in rows] == [
        ("vae", 1, 3),
        ("vae", 2, 6),
        ("vae", 3, 9),
    ]
    judged = {"gen_loss", "disc_loss", "lecam_loss", "adversarial_weight", "gradient_ratio", "logit_gap"}
    assert [judged <= row.keys() for row in rows] == [False, True, True]
    assert not judged & rows[0].keys()
    for row in rows:
        for name in ("psnr", "ssim", "perceptual", "rkid"):
            assert row[f"val_{name}_low"] <= row[f"val_{name}"] <= row[f"val_{name}_high"]
        assert row["rkid_protocol"]["n"] == 6 and row["perceptual_protocol"]["depth"] == 1


def test_the_guard_holds_the_weight_down_from_the_epoch_after(alone):
    first, second, third = RunFolder.read(alone[0]).rows()
    assert (first["adversarial_scale"], second["adversarial_scale"]) == (1.0, 1.0)
    assert "guard" not in first and "times the reconstruction's" in second["guard"]
    assert third["adversarial_scale"] == pytest.approx(0.01 / second["gradient_ratio"], rel=1e-4)
    assert third["gradient_ratio"] < 0.1 * second["gradient_ratio"]


def test_what_it_keeps_is_the_averaged_best_and_its_halves(alone):
    run = RunFolder.read(alone[0])
    kept, best = run.finished("vae").tensors, run.best("vae")
    least = min(run.rows(), key=lambda row: row["val_loss"])
    assert best.step == least["step"]
    for name, tensor in kept.items():
        if "latent_" not in name:  # which are measured afterwards
            np.testing.assert_array_equal(tensor, best.tensors[f"ema_{name}"], err_msg=name)
    for half in ("encoder", "decoder"):
        own = run.best(half).tensors
        assert own
        for name, tensor in own.items():
            path = name.removeprefix(f"{half}/")
            np.testing.assert_array_equal(tensor, best.tensors[f"ema_vae/{path}"], err_msg=name)


def test_the_latents_kept_have_the_scale_of_its_report(alone):
    report = json.loads((alone[0] / "latents.json").read_text())
    kept = RunFolder.read(alone[0]).finished("vae").tensors
    for number, channel in enumerate(report["channels"]):
        assert channel["mean"] == pytest.approx(kept["vae/vae/latent_mean"][number], abs=1e-5)
        assert channel["std"] == pytest.approx(kept["vae/vae/latent_std"][number], rel=1e-4)
        assert (channel["unit_mean"], channel["unit_std"]) == pytest.approx((0, 1), abs=1e-4)


def test_two_optimizers_that_were_stopped_end_as_those_that_were_not(alone, flowers, tmp_path, monkeypatch):
    whole, run = RunFolder.read(alone[0]), tmp_path / "run"
    begin = callbacks.Keeper.on_train_batch_begin
    for stop in (1, START + 1):  # before the discriminator begins, and after
        with monkeypatch.context() as patch:

            def stop_in_the_step(keeper, batch, logs=None, stop=stop):
                begin(keeper, batch, logs)
                if keeper.step == stop:
                    os.kill(os.getpid(), signal.SIGTERM)

            patch.setattr(callbacks.Keeper, "on_train_batch_begin", stop_in_the_step)
            with pytest.raises(SystemExit) as end:
                cup3.main(line(flowers, run))
        assert (end.value.code, RunFolder.read(run).latest("vae").step) == (143, stop + 1)
    assert cup3.main(line(flowers, run)) == 0
    mine = RunFolder.read(run)
    tensors = final_tensors(run, "vae")
    for part in ("vae", "ema_vae", "discriminator", "optimizer", "disc_optimizer", "adversary"):
        assert any(name.startswith(f"{part}/") for name in tensors)
    assert_same(tensors, final_tensors(alone[0], "vae"))
    assert_same(mine.latest("vae_good").tensors, whole.latest("vae_good").tensors)
    assert_same(mine.finished("vae").tensors, whole.finished("vae").tensors)
    assert without_seconds(mine.rows()) == without_seconds(whole.rows())


def test_fine_tuning_the_decoder_leaves_the_latents_as_they_are(alone, flowers, tmp_path):
    changes = {"vae_training.epochs": 1, "adversarial.weight": 0.0, "vae_training.measure_every": 0}
    tuned = line(flowers, tmp_path / "run", vae_from=alone[0], **changes)
    assert cup3.main([*tuned, "--vae-training.decoder-only"]) == 0
    mine = RunFolder.read(tmp_path / "run").finished("vae").tensors
    others = RunFolder.read(alone[0]).finished("vae").tensors
    moved = {name for name in mine if not np.array_equal(mine[name], others[name])}
    assert moved and all("decoder" in name or "post_quant_conv" in name for name in moved)


@pytest.fixture(scope="module")
def with_skips(flowers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "skips"
    changes = {"adversarial.weight": 0.0, "vae_training.epochs": 1, "vae_training.measure_every": 0}
    assert cup3.main([*line(flowers, folder, **changes), "--vae.skips"]) == 0
    return folder


def test_an_autoencoder_with_skips_is_trained_but_is_no_ground_for_diffusion(
    with_skips, flowers, tmp_path, capsys
):
    assert not list((with_skips / "samples").glob("vae_prior*"))
    capsys.readouterr()
    run = tmp_path / "run"
    told = refusal(capsys, words(flowers, run, vae_from=with_skips))
    assert told.startswith(f"--vae-from: received {with_skips}, whose autoencoder has skip connections")
    told = refusal(capsys, [*words(flowers, run, vae_from=with_skips), "--vae.skips"])
    assert told.startswith("--vae.skips: received with a diffusion model")
    assert not run.exists()


def test_an_autoencoder_alone_draws_no_pictures(alone, tmp_path, capsys):
    told = refusal(
        capsys, ["generate", "--run", str(alone[0]), "--count", "1", "--out", str(tmp_path / "no")]
    )
    assert str(alone[0]) in told and "train" in told
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"adversarial.start": 9},
            "--adversarial.start: received 9, expected less than the 9 steps of the autoencoder's training",
        ),
        (
            {"adversarial.layers": 4},
            "--adversarial.layers: received 4, whose patches are larger than pictures of 32 px; expected at most 3",
        ),
        (
            {"vae_training.perceptual_network": "vgg16", "vae_training.perceptual_heads": "absent.pth"},
            "--vae-training.perceptual-heads absent.pth: received a path that is no file, expected one of weights",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(flowers, tmp_path, capsys, changes, told):
    assert refusal(capsys, line(flowers, tmp_path / "run", **changes)).startswith(told)
    assert not (tmp_path / "run").exists()


def test_steps_in_a_row_that_are_not_finite_end_it_in_one_line(flowers, tmp_path, capsys):
    changes = {f"vae_training.{name}": 0 for name in ("ema", "perceptual_weight", "warmup_steps")}
    changes |= {"vae_training.learning_rate": 1e30, "vae_training.steps_per_epoch": 20}
    told = refusal(capsys, line(flowers, tmp_path / "run", **changes, **{"adversarial.weight": 0}))
    assert told.startswith("vae: 10 steps in a row, the last of them step ")
    assert "were not finite: NaN or Inf appears first in the output of the layer vae/encoder." in told
    assert told.endswith("; nothing was saved yet; a lower learning rate may help, in another --run")
    assert not (tmp_path / "run").exists()


# The presets.


def pictures_at(folder, names, side=32):
    """Pictures of soft colours at these names within a folder."""
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3)).astype("uint8"))
        picture.resize((side, side), Image.Resampling.BICUBIC).save(folder / name)
    return folder


# What makes a run of a large preset a tiny one: all else is as the preset has it.
SMALL = {
    "image_size": 32,
    "vae.level_channels": (8, 8, 8, 8),
    "vae.blocks": (0, 0, 0, 0),
    "vae.groups": 4,
    "vae_training.epochs": 1,
    "vae_training.steps_per_epoch": 2,
    "vae_training.batch_size": 2,
    "vae_training.micro_batches": 1,
    "evaluation.size": 32,
}


def preset_run(name, data, folder, **changes):
    """(run, its row) of one small epoch of a preset, whose files are there."""
    assert cup3.main(["train-vae", "--preset", name, *words(data, folder, of={}, **(SMALL | changes))]) == 0
    run, report = RunFolder.read(folder), json.loads((folder / "latents.json").read_text())
    assert len(report["channels"]) == 4
    for sheet in ("vae_001", "vae_prior_001"):
        with Image.open(folder / "samples" / f"{sheet}.png") as picture:
            assert np.asarray(picture).std() > 5
    (row,) = run.rows()
    assert (row["stage"], row["epoch"], row["step"], row["best"]) == ("vae", 1, 2, True)
    assert all(np.isfinite(value) for value in row.values() if isinstance(value, float))
    return run, row


def test_the_preset_of_faces_trains_on_a_flat_folder(tmp_path, capsys):
    faces = pictures_at(tmp_path / "faces", [f"{number:05}.png" for number in range(100)])
    run, row = preset_run("ffhq-vae", faces, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "   100 pictures of 32 px, 3 of them for validation; without captions\n" in printed
    assert "   kept: the weights of epoch 1, of the least val_loss" in printed
    assert row["kl_weight"] == pytest.approx(1e-4 * 1 / 10_000)  # of its second step
    assert row["val_loss"] == pytest.approx(row["val_recon_loss"] + 1e-4 * row["val_kl_loss"], rel=1e-5)
    assert row["perceptual_loss"] == 0 and "gen_loss" not in row and "val_perceptual" not in row
    assert run.config["vae"]["tanh"] and run.config["vae_training"]["recon_loss"] == "mse"
    kept, best = run.finished("vae").tensors, run.best("vae").tensors
    for name, tensor in kept.items():
        if "latent_" not in name:
            np.testing.assert_array_equal(tensor, best[name], err_msg=name)


def test_the_preset_of_animals_trains_on_their_training_part(tmp_path, capsys):
    names = [f"{kind}/{number}.jpg" for number in range(15) for kind in ("cat", "dog")]
    animals = pictures_at(tmp_path / "afhq", [f"train/{name}" for name in names])
    pictures_at(animals, ["val/cat/0.jpg", "val/dog/99.jpg"])
    discriminator = {"start": 1, "channels": 4, "groups": 2, "layers": 1}
    discriminator = {f"adversarial.{name}": value for name, value in discriminator.items()}
    # for LPIPS, which would be downloaded
    sees = {"vae_training.perceptual_network": "efficientnet_lite0", "vae_training.perceptual_depth": 1}
    run, row = preset_run("afhq", animals, tmp_path / "run", **discriminator, **sees)
    assert "   30 pictures of 32 px, 3 of them for validation; without captions\n" in capsys.readouterr().out
    assert {"gen_loss", "disc_loss", "adversarial_weight", "gradient_ratio", "logit_gap"} <= row.keys()
    assert row["adversarial_scale"] == 1.0 and row["adversarial_weight"] > 0 and row["disc_loss"] > 0
    assert run.config["vae"]["attention"] and run.config["vae_training"]["recon_loss"] == "l1"
    assert row["kl_weight"] == 1e-6 and row["val_perceptual_loss"] > 0
    total = row["val_recon_loss"] + 1e-6 * row["val_kl_loss"] + 1.0 * row["val_perceptual_loss"]
    assert row["val_loss"] == pytest.approx(total, rel=1e-5)
    tensors, kept = run.latest("vae").tensors, run.finished("vae").tensors
    own = [name for name in kept if "latent_" not in name]
    for name in own:  # the averaged weights, which differ from those of the last step
        np.testing.assert_array_equal(kept[name], tensors[f"ema_{name}"], err_msg=name)
    assert any((kept[name] != tensors[name]).any() for name in own)
