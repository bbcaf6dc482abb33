"""The whole work in its order: what it leaves, that it goes on where it stopped, and what it refuses."""

import contextlib
import csv
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import cup3
import stages
from callbacks import Interrupted, Keeper, Signals
from checkpoint import RunFolder
from dataset import paper_flowers
from diffusion.schedule import Process
from diffusion.times import TIMES, training_times
from errors import InputError
from generate import load
from input_pipeline import Latents, latent_batches, load_data, read_pictures, split, validation_batches
from metrics import KID
from optimizers import OPTIMIZERS, adamw, warmup_cosine
from trainer import LatentDiffusionTrainer

ROOT = Path(stages.__file__).parent
STEPS, EPOCHS = 3, 2

# Every setting that the tests look at, so that none depends on the defaults.
TINY = {
    "image-size": 32,
    "vae.level-channels": (4, 4),
    "vae.blocks": (0, 0),
    "vae.latent-channels": 2,
    "vae.groups": 2,
    "text-encoder.width": 8,
    "text-encoder.layers": 1,
    "text-encoder.heads": 2,
    "unet.level-channels": 8,
    "unet.attention-levels": True,
    "unet.blocks": 0,
    "unet.head-channels": 4,
    "unet.groups": 4,
    "unet.ff-expansion": 1,
    "vae-training.epochs": EPOCHS,
    "vae-training.steps-per-epoch": STEPS,
    "vae-training.batch-size": 8,
    "vae-training.perceptual-weight": 0,
    "vae-training.optimizer": "adamw",
    "vae-training.learning-rate": 0.004,
    "training.optimizer": "muon",
    "training.learning-rate": 0.003,
    "training.times": "logit_normal",
    "epochs": EPOCHS,
    "training.steps-per-epoch": STEPS,
    "batch-size": 8,
    "training.validation-fraction": 0.125,
    "evaluation.size": 32,
    "evaluation.steps": 2,
    "evaluation.guidance": 2.0,
    "evaluation.images": 6,
    "evaluation.every": 1,
    "evaluation.previews": 4,
}


def words(data, run, /, **changes):
    """The command line of a tiny training."""
    flags = {**TINY, "data": data, "run": run, **{name.replace("_", "-"): changes[name] for name in changes}}
    line = []
    for name, value in flags.items():
        line += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return line


def config(data, run, /, **changes):
    return cup3.parse(words(data, run, **changes))[1]


def refusal(capsys, line):
    """The one line on standard error of a command that was refused."""
    assert cup3.main(line) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.removeprefix("cup3: ").rstrip("\n")


def final_tensors(run, stage):
    with RunFolder.open(run, RunFolder.read(run).config) as folder:
        return folder.latest(stage).tensors


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# One stage: stopped and resumed it equals one that was not, bit for bit.


class Colours:
    """Features without a network; `visited` is called whenever they are asked for."""

    def visited(self):
        pass

    def __call__(self, images, progress=False):
        self.visited()
        return images.reshape(len(images), -1)[:, ::37] / 255.0


@pytest.fixture(scope="module")
def trainer(light_networks):
    real = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3)).astype("uint8")
    trainer = LatentDiffusionTrainer(
        light_networks(),
        image_size=16,
        kid=KID(Colours()),
        kid_images=real,
        kid_tokens=np.stack(captions())[:4, 0],
        draw={"steps": 1, "guidance": 2.0},
    )
    rate = warmup_cosine(0.01, EPOCHS * STEPS, warmup_steps=2)
    trainer.compile(adamw(trainer.trained_variables, learning_rate=rate, weight_decay=0.1, clip_norm=1.0))
    return trainer


def captions():
    return list(np.resize(np.arange(1, 9), (7, 2, 7)).astype("int32"))


def state(trainer):
    """All that a training is: the rows of its log show the metrics."""
    networks = [weight for network in trainer.networks.values() for weight in network.weights]
    return networks + trainer.optimizer.variables


def forget(trainer):
    """As good as another process."""
    counts = [variable for tracker in trainer.trackers.values() for variable in tracker.variables]
    for variable in state(trainer) + counts:
        variable.assign(np.full(variable.shape, 7, variable.dtype))


class StoppingKeeper(Keeper):
    """Sends this process a signal, once, at the given place."""

    stop = None

    def _at(self, *place):
        if place == self.stop:
            self.stop = None
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_begin(self, batch, logs=None):
        super().on_train_batch_begin(batch, logs)
        self._at("step", self.step)

    def in_validation(self):
        self._at("validation", self.step)

    def _keep_best(self, row):
        self._at("closing", self.step)
        return super()._keep_best(row)


def interval(metric):
    _, low, high = metric.estimate()
    return {"val_kid_low": low, "val_kid_high": high, "val_kid_floor": metric.floor().value}


def work(trainer, folder, stop=None):
    """Runs the stage, or what is left of it; returns whether it came to its end."""
    vocabulary = trainer.painter.networks.vocabulary
    rng = np.random.default_rng(0)
    latents = Latents(*rng.normal(size=(2, 7, 2, 8, 8, 2)).astype("float32"))
    data, stream = (latents, captions(), vocabulary), {"batch_size": 4, "seed": 0}
    with RunFolder.open(folder, {"seed": 0}) as run, Signals() as signals:
        keeper = StoppingKeeper(run, "diffusion", STEPS, signals, EPOCHS)
        trainer.kid_metric.feature_network.visited = keeper.in_validation
        keeper.finish_row = lambda epoch, row: interval(trainer.kid_metric)
        keeper.choose = lambda row: (trainer.kid_metric.estimate(), {"protocol": {"network": "colours"}})
        keeper.stop = stop
        try:
            stages._fit(
                trainer,
                keeper,
                lambda step: latent_batches(*data, **stream, caption_dropout=0.2, start_step=step),
                validation_batches(*data, **stream),
            )
        except Interrupted:
            return False
    return True


@pytest.fixture(scope="module")
def first_state(trainer):
    return [np.asarray(variable) for variable in state(trainer)]


@pytest.fixture(scope="module")
def straight(trainer, first_state, tmp_path_factory):
    """(state, rows, best, folder) of a training that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert work(trainer, folder)
    run = RunFolder.read(folder)
    return [np.asarray(variable) for variable in state(trainer)], run.rows(), run.best("diffusion"), folder


STOPS = {
    "in the first step": [("step", 0)],
    "in mid-epoch": [("step", 4)],
    "in the last step of an epoch": [("step", 2)],
    "in the last step of all": [("step", 5)],
    "in validation": [("validation", 3)],
    "at an epoch's end": [("closing", 3)],
    "all the time": [("step", 0), ("step", 1), ("step", 2), ("validation", 3), ("closing", 3)]
    + [("step", 4), ("step", 5), ("validation", 6), ("validation", 6), ("closing", 6)],
}


@pytest.mark.parametrize("stops", STOPS.values(), ids=STOPS)
def test_a_stopped_and_resumed_training_equals_one_that_was_not(
    trainer, first_state, straight, tmp_path, stops
):
    for variable, value in zip(state(trainer), first_state, strict=True):
        variable.assign(value)
    for stop in stops:
        assert not work(trainer, tmp_path / "run", stop)
        forget(trainer)
    assert work(trainer, tmp_path / "run")
    values, rows, best, _ = straight
    for variable, value in zip(state(trainer), values, strict=True):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)
    run = RunFolder.read(tmp_path / "run")
    assert without_seconds(run.rows()) == without_seconds(rows)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert run.best("diffusion").state == best.state
    assert_same(run.best("diffusion").tensors, best.tensors)


def test_a_crash_between_the_row_and_the_checkpoint_leaves_one_row(
    trainer, first_state, straight, tmp_path, monkeypatch
):
    for variable, value in zip(state(trainer), first_state, strict=True):
        variable.assign(value)
    assert not work(trainer, tmp_path / "run", ("step", 2))  # all steps of the epoch are done and saved
    forget(trainer)
    with monkeypatch.context() as broken:
        broken.setattr(RunFolder, "save", lambda *arguments: sys.exit("power is gone"))
        with pytest.raises(SystemExit):
            work(trainer, tmp_path / "run")
    assert [row["step"] for row in RunFolder.read(tmp_path / "run").rows()] == [3]
    forget(trainer)
    assert work(trainer, tmp_path / "run")
    assert without_seconds(RunFolder.read(tmp_path / "run").rows()) == without_seconds(straight[1])


def test_a_finished_stage_takes_no_step(trainer, straight):
    values, rows, _, folder = straight
    forget(trainer)
    assert work(trainer, folder, stop=("step", 0))
    assert RunFolder.read(folder).rows() == rows
    for variable, value in zip(state(trainer), values, strict=True):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)


def test_a_second_signal_does_not_cut_the_saving(trainer, tmp_path, monkeypatch):
    save = RunFolder.save

    def save_under_fire(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        save(*arguments)

    monkeypatch.setattr(RunFolder, "save", save_under_fire)
    assert not work(trainer, tmp_path / "run", ("step", 1))
    assert RunFolder.read(tmp_path / "run").latest("diffusion").step == 2


# A whole run.


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "flowers"
    paper_flowers.write(folder, train=48, test=8, size=32, progress=False)
    return folder


@pytest.fixture(scope="module")
def finished(flowers, tmp_path_factory):
    """(run folder, what was printed) of a run that nothing stopped."""
    folder, printed = tmp_path_factory.mktemp("runs") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cup3.main(words(flowers, folder)) == 0
    return folder, printed.getvalue()


def test_a_run_folder_explains_itself(finished, flowers):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "best",
        "cache",
        "checkpoints",
        "config.json",
        "curves.png",
        "log.jsonl",
        "networks",
        "samples",
        "vocabulary.json",
    }
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for entry in (
        "best/diffusion",
        "networks/vae",
        "checkpoints/vae/00000003",
        "checkpoints/diffusion/00000006",
    ):
        assert {f"{entry}/state.json", f"{entry}/tensors.safetensors"} <= found
    samples = {"samples/vae_001.png", "samples/vae_002.png", "samples/epoch_001.png", "samples/epoch_002.png"}
    assert samples <= found
    kept = json.loads((folder / "config.json").read_text())
    assert kept["data"] == str(flowers)
    assert kept["unet"]["level_channels"] == [8]
    assert kept["training"]["epochs"] == EPOCHS
    assert "run" not in kept and "gpus" not in kept


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
    assert rows[0].keys() == common | parts | {"val_psnr", "val_psnr_low", "val_psnr_high"}
    measured = {"val_kid", "val_kid_low", "val_kid_high", "val_kid_floor", "protocol"}
    for row in rows[2:4]:
        assert row.keys() == common | measured
        assert row["val_kid_low"] < row["val_kid"] < row["val_kid_high"]
        weights = row["protocol"].pop("weights")
        assert re.fullmatch("[0-9a-f]{64}", weights)
        assert row["protocol"].pop("resize")
        assert row["protocol"] == {
            "network": "efficientnet_lite0",
            "size": 32,
            "n_real": 6,
            "n_generated": 6,
            "sampler": "ddim",
            "steps": 2,
            "guidance": 2.0,
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


def test_the_times_are_drawn_as_the_settings_say(finished, flowers, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def latent_batches(*arguments, times, **keywords):
        raise Seen(times)

    monkeypatch.setattr(stages.pipeline, "latent_batches", latent_batches)
    shares = np.array([0.1, 0.4, 0.9], "float32")
    for times in TIMES:
        changes = {"vae-from": finished[0], "training.times": times}
        with pytest.raises(Seen) as seen:
            cup3.main(words(flowers, tmp_path / times, **changes))
        np.testing.assert_array_equal(seen.value.args[0](shares), training_times(times, Process())(shares))


def test_the_command_line_offers_what_there_is():
    offered = {name: known for name, _, known in stages.settings._choices(stages.settings.Config())}
    assert offered["vae-training.optimizer"] == offered["training.optimizer"] == tuple(OPTIMIZERS)
    assert offered["training.times"] == tuple(TIMES)


def test_the_grids_and_curves_are_pictures(finished):
    folder, _ = finished
    for name, columns in (("vae_002.png", 8), ("epoch_002.png", 4)):
        with Image.open(folder / "samples" / name) as sheet:
            assert sheet.width == columns * 136 + 8
            assert np.asarray(sheet).std() > 20
    with Image.open(folder / "curves.png") as curves:
        assert curves.width > 3 * 400  # two stages and KID


def test_the_run_says_what_it_does_and_where_things_are(finished):
    folder, printed = finished
    for stage in ("data", "autoencoder", "latents", "diffusion", "pictures"):
        assert f"\n== {stage}\n" in printed
        assert re.search(rf"^   {stage}: \d+\.\d s$", printed, re.MULTILINE)
    assert "48 pictures of 32 px, 6 of them for validation" in printed
    best = RunFolder.read(folder).best_state("diffusion")
    assert f"of epoch {best['epoch']}, KID {best['value']:.4f}" in printed
    assert f'python cup3.py generate --run {folder} --prompt "' in printed
    assert json.loads(printed[: printed.index("\n}") + 2])["image_size"] == 32


def test_the_latents_have_unit_scale(finished, flowers):
    networks, _ = load(finished[0])
    train_ids, _ = split(48, 0.125, seed=0)
    paths = sorted((flowers / "102flowers").iterdir())[:48]
    images = read_pictures(paths, 32, progress=False)[train_ids]
    mean, logvar = (np.asarray(part) for part in networks.vae.encode(images.astype("float32") / 127.5 - 1))
    latents = mean + np.exp(logvar / 2) * np.random.default_rng(0).normal(size=mean.shape)
    np.testing.assert_allclose(latents.mean((0, 1, 2)), 0, atol=0.04)
    np.testing.assert_allclose(latents.std((0, 1, 2)), 1, atol=0.04)


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


def test_the_same_command_again_does_nothing_more_and_says_so(finished, flowers, capsys):
    folder, printed = finished
    before = {path: path.stat().st_mtime_ns for path in folder.glob("[!l.]*") if path.is_file()}
    rows, started = RunFolder.read(folder).rows(), time.monotonic()
    assert cup3.main(words(flowers, folder)) == 0
    assert time.monotonic() - started < 5
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
latents = stages._latents
def latents_after_other_draws(*arguments):
    random.random()  # on which the first weights of what follows must not depend
    return latents(*arguments)
stages._latents = latents_after_other_draws
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
        patch.setattr(stages, "_latents", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
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


# Networks from elsewhere, and other data.


@pytest.fixture
def photographs(flowers, tmp_path):
    """A folder of pictures with a `metadata.csv`: so few that their KID has no floor."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for index, path in enumerate(sorted((flowers / "102flowers").iterdir())[:12]):
            shutil.copy(path, folder / path.name)
            table.writerow([path.name, f"Flower, number {index}!"])
            table.writerow([path.name, "the same one again"])
    return folder


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


def prepared(data, folder, **changes):
    """(config, run, data) as they are when the stage of the autoencoder begins."""
    chosen = config(data, folder, **changes)
    run = RunFolder.open(folder, stages.settings.to_dict(chosen))
    return chosen, run, stages._data(chosen, run)


def test_train_vae_begins_with_the_other_runs_autoencoder(finished, flowers, tmp_path):
    still = {"vae_training.learning_rate": 0.0, "vae_training.epochs": 1, "vae_training.steps_per_epoch": 1}
    still |= {"vae_training.perceptual_weight": 0.1, "vae_training.perceptual_depth": 1}
    line = words(flowers, tmp_path / "run", vae_from=finished[0], **still)
    chosen = cup3.parse([*line, "--train-vae", "True"])[1]
    with RunFolder.open(tmp_path / "run", stages.settings.to_dict(chosen)) as run, Signals() as signals:
        data = stages._data(chosen, run)
        stages._autoencoder(chosen, run, data, tf.distribute.get_strategy(), signals)
        (row,) = run.rows()
        assert (row["stage"], row["step"]) == ("vae", 1)  # it was trained
        assert row["loss"] > row["recon_loss"] and 0 < row["perceptual_loss"] < 4
        mine, others = run.finished("vae").tensors, RunFolder.read(finished[0]).finished("vae").tensors
    for name in mine:  # at no speed, so it is what it began with, and its statistics come out the same
        np.testing.assert_allclose(mine[name], others[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_an_autoencoder_of_another_shape_or_none_is_refused(finished, flowers, tmp_path, capsys):
    other_shape = words(flowers, tmp_path / "run", vae_from=finished[0], **{"vae.latent_channels": 3})
    assert refusal(capsys, other_shape).startswith(f"{finished[0]}: another set of variables: vae/")
    with RunFolder.open(tmp_path / "bare", {"seed": 0}):
        pass
    bare = refusal(capsys, words(flowers, tmp_path / "run", vae_from=tmp_path / "bare"))
    assert bare == f"--vae-from: received {tmp_path / 'bare'}, expected a run with a trained autoencoder"
    none = refusal(capsys, words(flowers, tmp_path / "run", vae_from=tmp_path / "absent"))
    assert none.startswith(f"{tmp_path / 'absent'}: received a folder without config.json")
    assert not (tmp_path / "run").exists()


def test_text_from_takes_the_text_encoder_of_another_run_as_it_is(finished, flowers, tmp_path, monkeypatch):
    seen = {}

    def look(trainer, keeper, batches_from, validation):
        batch = next(iter(batches_from(3)))
        seen.update(trainer=trainer, batches=[batch, next(iter(validation))])
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(stages, "_fit", look)
    sources = {"vae_from": finished[0], "text_from": finished[0]}
    with pytest.raises(SystemExit):
        cup3.main(words(flowers, tmp_path / "run", **sources, **{"training.caption_dropout": 0}))
    encoder, best = seen["trainer"].text_encoder, RunFolder.read(finished[0]).best("diffusion").tensors
    for weight in encoder.weights:
        np.testing.assert_array_equal(weight, best[f"ema_text_encoder/{weight.path}"])
    assert seen["trainer"].trained_variables == seen["trainer"].unet.trainable_variables
    data = load_data(flowers)
    for batch in seen["batches"]:
        assert "tokens" not in batch
        for index, context, mask in zip(batch["sample_ids"], batch["context"], batch["mask"], strict=True):
            tokens = data.captions[int(index)]
            masks = data.vocabulary.mask(tokens)
            own = np.asarray(encoder([tf.constant(tokens), tf.constant(masks)]))
            nearest = np.abs(own - context).max((1, 2)).argmin()  # one of its five captions
            np.testing.assert_allclose(own[nearest], context, atol=1e-5)
            np.testing.assert_array_equal(masks[nearest], mask)


def test_a_text_encoder_of_other_words_or_none_is_refused(finished, photographs, tmp_path, capsys):
    changes = {"training.validation_fraction": 0.25}
    other_words = words(photographs, tmp_path / "run", text_from=finished[0], **changes)
    line = f"--text-from: received {finished[0]}, whose words are not those of the data"
    assert refusal(capsys, other_words) == line
    with RunFolder.open(tmp_path / "bare", {"seed": 0}):
        pass
    bare = refusal(capsys, words(photographs, tmp_path / "run", text_from=tmp_path / "bare", **changes))
    assert bare == f"--text-from: received {tmp_path / 'bare'}, expected a run with a trained text encoder"
    assert not (tmp_path / "run").exists()


# What is refused: one line, exit code 2, nothing half written.


def test_another_config_is_refused_with_its_keys(finished, flowers, capsys):
    folder, _ = finished
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    line = refusal(capsys, words(flowers, folder, seed=1, **{"unet.groups": 2}))
    assert line == (
        f"{folder / 'config.json'}: another config: seed received 1, expected 0; unet.groups received 2, expected 4"
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
        ({"gpus": "7"}, "--gpus: received '7', expected all, none, or indices below"),
        ({"data": "absent"}, "absent: is no folder"),
        ({"training.validation_fraction": 0.04}, "holds out 2; expected at least 3 for KID"),
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


def test_data_whose_words_changed_is_refused(photographs, tmp_path):
    changes = {"training.validation_fraction": 0.25}
    _, run, _ = prepared(photographs, tmp_path / "run", **changes)
    run.close()
    table = photographs / "metadata.csv"
    table.write_text(table.read_text().replace("again", "anew"))
    with pytest.raises(InputError, match=r"its words are no longer those of .*vocabulary\.json"):
        prepared(photographs, tmp_path / "run", **changes)


def test_the_built_in_data_is_drawn_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = []

    def write(folder, size):
        drawn.append((str(folder), size))
        shutil.copytree(source, folder)

    source = tmp_path / "source"
    paper_flowers.write(source, train=24, test=1, size=32, progress=False)
    monkeypatch.setattr(stages.paper_flowers, "write", write)
    chosen = config("dataset/paper_flowers", "run")
    for start in range(2):
        with RunFolder.open("run", stages.settings.to_dict(chosen)) as run:
            data = stages._data(chosen, run)
        assert drawn == [("dataset/paper_flowers", 32)], start
    assert data.has_probe
    assert sorted([*data.train_ids, *data.validation_ids]) == list(range(24))
    assert data.shown_tokens.shape == (1, 20)  # the test caption


# Devices.


@pytest.fixture
def three_gpus(monkeypatch):
    """A machine with three GPUs, as far as choosing them goes; what was done to them."""
    done = {"growth": []}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["g0", "g1", "g2"])
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda chosen, kind: done.update({kind: chosen}))
    monkeypatch.setattr(
        tf.config.experimental, "set_memory_growth", lambda gpu, on: done["growth"].append(gpu)
    )
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda names: names)
    return done


@pytest.mark.parametrize(
    ("gpus", "chosen"), [("all", ["g0", "g1", "g2"]), ("0,2", ["g0", "g2"]), ("1", ["g1"]), ("none", [])]
)
def test_the_chosen_gpus_are_seen_and_grow(three_gpus, gpus, chosen):
    strategy = stages.devices(gpus, {"--batch-size": 6})
    assert three_gpus["GPU"] == three_gpus["growth"] == chosen
    if len(chosen) > 1:
        assert strategy == [f"GPU:{index}" for index in range(len(chosen))]
    else:
        assert strategy is tf.distribute.get_strategy()


@pytest.mark.parametrize("gpus", ["3", "-1", "0,0", "", "first", "0;1"])
def test_gpus_that_are_not_there_are_refused(three_gpus, gpus):
    with pytest.raises(
        InputError, match=f"--gpus: received '{gpus}', expected all, none, or indices below 3"
    ):
        stages.devices(gpus, {})


def test_a_batch_that_the_gpus_cannot_share_is_refused(three_gpus):
    with pytest.raises(InputError, match="--batch-size: received 8, expected a multiple of the 3 GPUs"):
        stages.devices("all", {"--vae-training.batch-size": 6, "--batch-size": 8})
