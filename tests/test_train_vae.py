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
    assert told.startswith(f"--vae-from: received {with_skips}, whose --vae.skips is True, expected False")
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
            "absent.pth: No such file or directory",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(flowers, tmp_path, capsys, changes, told):
    assert refusal(capsys, line(flowers, tmp_path / "run", **changes)).startswith(told)
    assert not (tmp_path / "run").exists()
