"""The whole work in its order: what it leaves, that it goes on where it stopped, and what it refuses."""

import contextlib
import errno
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from PIL import Image

import callbacks
import config as settings
import cup3
import stages
from checkpoint import RunFolder
from config import TrainingConfig, checks
from diffusion.times import TIMES
from generate import load
from optimizers import OPTIMIZERS
from tests.tiny_runs import EPOCHS, assert_same, final_tensors, refusal, without_seconds, words

ROOT = Path(cup3.__file__).parent

# What a run leaves.


def test_a_run_folder_explains_itself(finished, flowers):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "averages",
        "best",
        "cache",
        "checkpoints",
        "config.json",
        "curves.png",
        "latents.json",
        "latents.png",
        "log.jsonl",
        "networks",
        "samples",
        "vae_curves.png",
        "vocabulary.json",
    }
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for entry in (
        "best/diffusion",
        "best/vae",
        "best/encoder",
        "best/decoder",
        "networks/vae",
        "checkpoints/vae/00000003",
        "checkpoints/diffusion/00000006",
        "averages/diffusion/00000004",
    ):
        assert {f"{entry}/state.json", f"{entry}/tensors.safetensors"} <= found
    samples = {f"samples/{name}_00{epoch}.png" for name in ("vae", "vae_prior", "epoch") for epoch in (1, 2)}
    assert samples <= found
    kept = json.loads((folder / "config.json").read_text())
    assert kept["data"] == str(flowers)
    assert kept["unet"]["level_channels"] == [8]
    assert kept["training"]["epochs"] == EPOCHS
    assert not {"run", "gpus", "track"} & kept.keys()


def test_the_log_has_a_row_an_epoch_with_its_protocol(finished):
    rows = RunFolder.read(finished[0]).rows()
    assert [(row["stage"], row.get("epoch"), row["step"]) for row in rows] == [
        ("vae", 1, 3),
        ("vae", 2, 6),
        ("diffusion", 1, 3),
        ("diffusion", 2, 6),
        ("probe", None, 0),
    ]
    common = {"stage", "epoch", "step", "loss", "val_loss", "learning_rate", "seconds", "best"}
    parts = {f"{val}{name}_loss" for val in ("", "val_") for name in ("recon", "kl", "perceptual")}
    rebuilt = {f"val_{name}{end}" for name in ("psnr", "ssim") for end in ("", "_low", "_high")}
    assert rows[0].keys() == common | parts | rebuilt | {"kl_weight"}
    measured = {"val_kid", "val_kid_low", "val_kid_high", "val_kid_floor", "weak_step", "protocol"}
    assert [row["weak_step"] for row in rows[2:4]] == [None, 4]  # averages were kept at step 4 only
    changed = {f"val_kid_change{end}" for end in ("", "_low", "_high")}
    for row, also in zip(rows[2:4], (set(), changed), strict=True):
        assert row.keys() == common | measured | also
        assert row["val_kid_low"] < row["val_kid"] < row["val_kid_high"]
        weights = row["protocol"].pop("weights")
        assert re.fullmatch("[0-9a-f]{64}", weights)
        assert row["protocol"].pop("resize")
        assert row["protocol"] == {
            "network": "efficientnet_lite0",
            "size": 32,
            "n_real": 6,
            "n_generated": 6,
            "sampler": "dpmpp-2m",
            "spacing": "trailing",
            "steps": 2,
            "guidance": 2.0,
            "guidance_from": 0.3,
            "guidance_to": 0.7,
            "autoguidance": 1.5,
            "weak": 0.5,
            "ema": True,
            "seed": 0,
        }
    assert [row["best"] for row in rows[2:4]][0] is True
    assert rows[4].keys() == {"stage", "step", "petal_color", "center_color", "petals", "both_colors", "n"}
    assert rows[4]["n"] == 8


def test_each_stage_follows_its_own_optimizer(finished):
    for stage, optimizer, other in (("vae", "adamw", "muon"), ("diffusion", "muon", "adamw")):
        names = list(final_tensors(finished[0], stage))
        assert any(name.startswith(f"optimizer/{optimizer}/") for name in names)
        assert not any(name.startswith(f"optimizer/{other}/") for name in names)


def test_the_command_line_offers_what_there_is():
    offered = {name: known for name, _, known in checks._choices(settings.Config())}
    assert offered["vae-training.optimizer"] == offered["training.optimizer"] == tuple(OPTIMIZERS)
    assert offered["training.times"] == tuple(TIMES)


def test_the_grids_and_curves_are_pictures(finished):
    folder, _ = finished
    for name, columns in (("vae_002.png", 6), ("epoch_002.png", 4)):
        with Image.open(folder / "samples" / name) as sheet:
            assert sheet.width == columns * 136 + 8
            assert np.asarray(sheet).std() > 20
    with Image.open(folder / "curves.png") as curves:
        assert curves.width > 3 * 400  # two stages and KID


def test_the_run_says_what_it_does_and_where_things_are(finished, flowers):
    folder, printed = finished
    for stage in ("data", "autoencoder", "latents", "diffusion", "pictures"):
        assert f"\n== {stage}\n" in printed
        assert re.search(rf"^   {stage}: \d+\.\d s$", printed, re.MULTILINE)
    assert "48 pictures of 32 px, 6 of them for validation" in printed
    assert re.search(rf"^   from {flowers}$", printed, re.MULTILINE)
    note = "note: 6 steps of the U-Net in all are too few"
    assert printed.count("note: ") == printed.count(note) == 1  # the other is for the built-in data
    assert re.search(r"^training on (GPU:|the CPU: )", printed, re.MULTILINE)
    assert re.search(r"^   of 8 test captions the pictures follow: petal color", printed, re.MULTILINE)
    best = RunFolder.read(folder).best_state("diffusion")
    assert f"of epoch {best['epoch']}, KID {best['value']:.4f}" in printed
    assert f'python cup3.py generate --run {folder} --prompt "' in printed
    assert json.loads(printed[: printed.index("\n}") + 2])["image_size"] == 32


@pytest.mark.parametrize(
    ("epochs", "pictures", "noted"), [(1, 3199, True), (1, 3200, False), (200, 5, False)]
)
def test_few_steps_are_noted(capsys, epochs, pictures, noted):
    stages._note_few_steps(TrainingConfig(epochs=epochs, batch_size=16), pictures)
    assert ("too few for more than blots" in capsys.readouterr().out) is noted


def test_the_command_that_it_ends_with_draws_a_picture(finished, tmp_path, capsys):
    folder, printed = finished
    prompt = printed.rsplit('--prompt "', 1)[1].split('"')[0]
    line = ["generate", "--run", str(folder), "--prompt", prompt, "--prompt", "a red flower", "--count", "2"]
    assert cup3.main([*line, "--out", str(tmp_path / "out")]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        "0000.png",
        "0001.png",
        "0002.png",
        "0003.png",
        "grid.png",
    ]
    with Image.open(tmp_path / "out" / "0003.png") as picture:
        assert picture.size == (32, 32)
        assert (picture.text["prompt"], picture.text["seed"]) == ("a red flower", "1")
    assert "4 pictures and grid.png" in capsys.readouterr().out


@pytest.mark.parametrize(("best", "step"), [(SimpleNamespace(tensors={}, step=4), 4), (None, 6)])
def test_the_last_pictures_are_led_away_as_their_weights_are(tmp_path, monkeypatch, best, step):
    led = []
    monkeypatch.setattr(stages, "lead_away", lambda *given: led.append(given))
    monkeypatch.setattr(stages, "assign", lambda *given, **kinds: None)
    monkeypatch.setattr(stages, "named_variables", lambda network: [])
    monkeypatch.setattr(stages, "plot_curves", lambda rows, file: None)
    run = SimpleNamespace(
        path=tmp_path, best=lambda stage: best, rows=list, curves_path=tmp_path / "curves.png"
    )
    names = ("ema_unet", "ema_text_encoder")
    optimizer = SimpleNamespace(iterations=np.array(6))
    trainer = SimpleNamespace(networks=dict.fromkeys(names), painter="painter", optimizer=optimizer)
    config = SimpleNamespace(evaluation="evaluation")
    stages._pictures(config, run, SimpleNamespace(has_probe=False), trainer)
    assert led == [("painter", run, "evaluation", step)]


@pytest.mark.parametrize(
    ("steps", "change", "newest"),
    [((10, 20), (-0.5, 0.1), True), ((10, 20), (0.01, 0.5), False), ((20, 20), (-0.5, -0.1), False)],
)
def test_where_kid_cannot_tell_the_newest_weights_are_offered(tmp_path, capsys, steps, change, newest):
    data = SimpleNamespace(
        vocabulary=SimpleNamespace(decode=lambda tokens: ["a rose"]),
        shown_tokens=[0],
        validation_ids=range(3),
    )
    with RunFolder.open(tmp_path / "run", {}) as run:
        run.save_best("diffusion", 0.5, 0.1, 0.9, {}, {"step": steps[0], "epoch": 1})
        row = {"stage": "diffusion", "step": steps[1], "val_kid": 0.4}
        run.log({**row, "val_kid_change_low": change[0], "val_kid_change_high": change[1]})
        run.log({"stage": "probe", "step": 0})
        stages._say_where(run, data)
    shown = capsys.readouterr().out
    assert ("cannot tell the last epoch from it with 3 pictures held out" in shown) is newest
    assert shown.endswith('--prompt "a rose"' + " --newest" * newest + "\n")


def test_the_same_command_again_does_nothing_more_and_says_so(finished, flowers, monkeypatch, capsys):
    folder, printed = finished
    before = {path: path.stat().st_mtime_ns for path in folder.glob("[!l.]*") if path.is_file()}
    rows = RunFolder.read(folder).rows()
    monkeypatch.setattr(stages, "_train", lambda *arguments: pytest.fail("it begins again"))
    monkeypatch.setattr(keras.Model, "__init__", lambda *arguments: pytest.fail("it makes a network"))
    assert cup3.main(words(flowers, folder)) == 0
    again = capsys.readouterr().out
    assert "This run is finished; there is nothing left to do." in again
    assert "== autoencoder" not in again
    assert again.endswith(printed[printed.index("   pictures         ") :])
    assert RunFolder.read(folder).rows() == rows
    assert {path: path.stat().st_mtime_ns for path in before} == before


# Stopped by signals, in processes of their own.

CHILD = """
import random, signal, sys, time
import callbacks, cup3, stages
stage, step = sys.argv[1], int(sys.argv[2])
latents = stages.latents_of
def latents_after_other_draws(*arguments):
    random.random()  # on which the first weights of what follows must not depend
    return latents(*arguments)
stages.latents_of = latents_after_other_draws
begin = callbacks.Keeper.on_train_batch_begin
def wait_in_the_step(self, batch, logs=None):
    begin(self, batch, logs)
    if (self.stage, self.step) == (stage, step):
        print("NOW", flush=True)
        while self.signals._received is None:
            time.sleep(0.01)
callbacks.Keeper.on_train_batch_begin = wait_in_the_step
sys.exit(cup3.main(sys.argv[3:]))
"""


def stopped_process(line, stage, step, number):
    """Starts the command, sends it the signal in the given step; returns (exit code, standard error)."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, stage, str(step), *line],
        cwd=ROOT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for text in process.stdout:
            if text == "NOW\n":
                process.send_signal(number)
        return process.wait(60), process.stderr.read()
    finally:
        process.kill()


def test_a_stopped_run_saves_says_how_to_go_on_and_ends_as_one_that_was_not(
    finished, flowers, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    line = words(flowers, folder)
    to_go_on = f"\ncup3: Stopped; {folder} is saved. Give the same command again to go on.\n"

    # SIGKILL in the autoencoder's second epoch: its steps since the first are lost, and taken again
    code, _ = stopped_process(line, "vae", 5, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert RunFolder.read(folder).latest("vae").step == 3

    # Ctrl-C in the autoencoder's second epoch
    code, error = stopped_process(line, "vae", 4, signal.SIGINT)
    assert (code, error.endswith(to_go_on)) == (130, True), error
    assert RunFolder.read(folder).latest("vae").step == 5
    assert [row["step"] for row in RunFolder.read(folder).rows()] == [3]

    # SIGTERM between the stages, when the next one has no weights yet
    with monkeypatch.context() as patch:
        patch.setattr(stages, "latents_of", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as end:
            cup3.main(line)
    assert end.value.code == 143
    assert capsys.readouterr().err.endswith(to_go_on)

    # SIGTERM in the second epoch of the U-Net
    code, error = stopped_process(line, "diffusion", 4, signal.SIGTERM)
    assert (code, error.endswith(to_go_on)) == (143, True), error
    assert RunFolder.read(folder).latest("diffusion").step == 5
    assert not (folder / "curves.png").exists()

    assert cup3.main(line) == 0
    run, whole = RunFolder.read(folder), RunFolder.read(finished[0])
    assert_same(run.finished("vae").tensors, whole.finished("vae").tensors)
    for stage in ("vae", "diffusion"):
        assert_same(run.latest(stage).tensors, whole.latest(stage).tensors)
    assert_same(run.best("diffusion").tensors, whole.best("diffusion").tensors)
    assert without_seconds(run.rows()) == without_seconds(whole.rows())


# Other data.


def test_a_folder_with_metadata_trains_on_another_runs_autoencoder(finished, photographs, tmp_path, capsys):
    folder = tmp_path / "run"
    changes = {"vae_from": finished[0], "training.validation_fraction": 0.25}
    changes |= {"epochs": 1, "training.steps_per_epoch": 2, "batch_size": 4}
    assert cup3.main(words(photographs, folder, **changes)) == 0
    run, other = RunFolder.read(folder), RunFolder.read(finished[0])
    assert_same(run.finished("vae").tensors, other.finished("vae").tensors)
    assert run.finished("vae").state == {"from": str(finished[0])}
    (row,) = run.rows()  # nothing was trained but the U-Net, and the probe knows paper flowers only
    assert (row["stage"], row["step"], row["protocol"]["n_real"]) == ("diffusion", 2, 3)
    assert row["val_kid_floor"] is None
    assert math.isfinite(row["val_kid"])
    assert (folder / "curves.png").exists()
    networks, _ = load(folder)
    assert {"flower", "number", "11", "again"} <= set(networks.vocabulary.words)


CONDITIONED = {
    "class": {"conditioning": "class"},
    "none": {"conditioning": "none", "evaluation.guidance": 1.0},
}
LABELS = {"class": ["canna lily", "rose"], "none": []}


def without_captions(conditioning, data, run, vae_from):
    """The command line of a tiny training on pictures in classes."""
    changes = {**CONDITIONED[conditioning], "vae_from": vae_from, "training.validation_fraction": 0.25}
    return words(data, run, **changes)


@pytest.fixture(scope="module", params=CONDITIONED)
def uncaptioned(request, finished, in_classes, tmp_path_factory):
    """(conditioning, run folder, what was printed) of a run on pictures without captions that nothing stopped."""
    folder, printed = tmp_path_factory.mktemp("runs") / request.param, io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cup3.main(without_captions(request.param, in_classes, folder, finished[0])) == 0
    return request.param, folder, printed.getvalue()


def test_a_run_without_captions_is_measured_and_shown_as_any_other(uncaptioned):
    conditioning, folder, printed = uncaptioned
    run, labels = RunFolder.read(folder), LABELS[conditioning]
    rows = run.rows()  # none of the probe
    assert [(row["stage"], row["protocol"]["n_generated"]) for row in rows] == [("diffusion", 6)] * 2
    assert all(row["val_kid_low"] < row["val_kid"] < row["val_kid_high"] for row in rows)
    assert json.loads((folder / "vocabulary.json").read_text()) == {"labels": labels}
    embeddings = run.latest("diffusion").tensors["ema_text_encoder/words/embeddings"]
    assert embeddings.shape == (1 + len(labels), 8)
    with Image.open(folder / "samples" / "epoch_002.png") as sheet:
        assert np.asarray(sheet).std() > 20
    what = f'--prompt "({"|".join(labels)})"' if labels else "--count 4"
    assert re.search(rf"\n   python cup3\.py generate --run {folder} {what}\n$", printed)


def test_a_run_without_captions_draws_classes_or_seeds_and_nothing_else(uncaptioned, tmp_path, capsys):
    conditioning, folder, _ = uncaptioned
    line = ["generate", "--run", str(folder), "--out"]
    request, expected = {
        "class": (["--prompt", "rose", "--prompt", "canna lily"], [("rose", "0"), ("canna lily", "0")]),
        "none": (["--count", "3", "--seed", "5"], [(None, "5"), (None, "6"), (None, "7")]),
    }[conditioning]
    assert cup3.main([*line, str(tmp_path / "out"), *request]) == 0
    found = []
    for path in sorted((tmp_path / "out").glob("0*.png")):
        with Image.open(path) as picture:
            assert picture.size == (32, 32)
            found.append((picture.text.get("prompt"), picture.text["seed"]))
    assert found == expected
    assert (tmp_path / "out" / "grid.png").exists()
    capsys.readouterr()
    expected = {
        "class": "a class: 'canna lily', 'rose'",
        "none": "none: the model was trained on pictures alone",
    }
    told = refusal(capsys, [*line, str(tmp_path / "no"), "--prompt", "tulip"])
    assert told.startswith(f"prompts: received 'tulip', expected {expected[conditioning]}")
    if conditioning == "none":
        told = refusal(capsys, [*line, str(tmp_path / "no"), "--guidance", "3"])
        assert told.startswith("--guidance: received 3.0 for a model without conditioning")
    assert not (tmp_path / "no").exists()


def test_a_stopped_run_without_captions_ends_as_one_that_was_not(
    uncaptioned, finished, in_classes, tmp_path, monkeypatch
):
    conditioning, whole, _ = uncaptioned
    line = without_captions(conditioning, in_classes, tmp_path / "run", finished[0])
    begin = callbacks.Keeper.on_train_batch_begin

    def stop_in_the_step(keeper, batch, logs=None):
        begin(keeper, batch, logs)
        if keeper.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Keeper, "on_train_batch_begin", stop_in_the_step)
        with pytest.raises(SystemExit) as end:
            cup3.main(line)
    run, whole = RunFolder.read(tmp_path / "run"), RunFolder.read(whole)
    assert (end.value.code, run.latest("diffusion").step) == (143, 2)
    assert cup3.main(line) == 0
    assert_same(run.latest("diffusion").tensors, whole.latest("diffusion").tensors)
    assert without_seconds(run.rows()) == without_seconds(whole.rows())


def test_pictures_without_captions_are_no_ground_for_a_model_of_text(in_classes, tmp_path, capsys):
    line = refusal(capsys, words(in_classes, tmp_path / "run"))
    assert line.startswith(f"{in_classes}: holds neither metadata.csv nor metadata.jsonl")
    assert "--conditioning class" in line and "or none" in line
    line = refusal(capsys, words(in_classes / "rose", tmp_path / "run", conditioning="class"))
    assert "lies beside the folders of the classes" in line
    assert not (tmp_path / "run").exists()


# What is refused: one line, exit code 2, nothing half written.


def test_another_config_is_refused_with_its_keys(finished, flowers, capsys):
    folder, _ = finished
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    line = refusal(capsys, words(flowers, folder, seed=1, **{"unet.groups": 2}))
    assert line == (
        f"{folder / 'config.json'}: another config: seed received 1, expected 0; unet.groups received 2, expected 4"
        "; give --run another folder, or the settings of this one"
    )
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_another_process_holds_is_refused(finished, flowers, capsys):
    with RunFolder.open(finished[0], RunFolder.read(finished[0]).config):
        line = refusal(capsys, words(flowers, finished[0]))
    assert line.startswith(f"{finished[0]}: process {os.getpid()} works on this run")


def test_a_run_folder_that_cannot_be_written_is_refused(flowers, tmp_path, monkeypatch, capsys):
    mkdir = os.mkdir

    def read_only(path, *mode):
        if Path(path).is_relative_to(tmp_path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        mkdir(path, *mode)

    monkeypatch.setattr(os, "mkdir", read_only)
    line = refusal(capsys, words(flowers, tmp_path / "run"))
    assert line.startswith(f"{tmp_path / 'run'}: cannot be written: Read-only file system")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"image_size": 33}, "--image-size: received 33, expected a multiple of 2"),
        ({"batch_size": -8}, "--batch-size: received -8, expected a finite number, at least 1"),
        ({"gpus": "7"}, "--gpus: received '7', expected all"),
        ({"data": "absent"}, "absent: is no folder"),
        (
            {"training.validation_fraction": 0.04},
            "holds out 2; expected at least 3 for KID: give --training.validation-fraction 0.06, or more pictures",
        ),
        ({"evaluation.weights": "absent.pth"}, "absent.pth"),
    ],
)
def test_settings_that_cannot_work_leave_no_run_folder(flowers, tmp_path, capsys, changes, line):
    assert line in refusal(capsys, words(flowers, tmp_path / "run", **changes))
    assert os.listdir(tmp_path) == []


def test_a_damaged_picture_is_refused_and_named(photographs, tmp_path, capsys):
    victim = sorted(photographs.glob("*.jpg"))[5]
    victim.write_bytes(victim.read_bytes()[:200])
    assert str(victim) in refusal(capsys, words(photographs, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
