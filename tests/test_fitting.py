"""One stage: stopped and resumed it equals one that was not, bit for bit."""

import math
import os
import re
import signal
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from callbacks import Interrupted, Keeper, Signals
from checkpoint import RunFolder
from config import EvaluationConfig
from errors import InputError
from input_pipeline import Latents, latent_batches, validation_batches
from metrics import KID
from model.discriminator import PatchDiscriminator
from model.vae import AutoencoderKL
from optimizers import adamw, warmup_cosine
from stages.fitting import fit
from stages.judgement import Judgement
from tests.tiny_runs import EPOCHS, STEPS, assert_same, without_seconds
from trainer import Adversary, LatentDiffusionTrainer, VAETrainer


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
    trainer.tested_at = []
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

    stop, stops_early = None, False

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


def work(trainer, folder, stop=None, kind=StoppingKeeper):
    """Runs the stage, or what is left of it; returns whether it came to its end."""
    vocabulary = trainer.painter.networks.vocabulary
    rng = np.random.default_rng(0)
    latents = Latents(*rng.normal(size=(2, 7, 2, 8, 8, 2)).astype("float32"))
    data, stream = (latents, captions(), vocabulary), {"batch_size": 4, "seed": 0}
    with RunFolder.open(folder, {"seed": 0}) as run, Signals() as signals:
        keeper = kind(run, "diffusion", STEPS, signals, EPOCHS)
        trainer.kid_metric.feature_network.visited = keeper.in_validation
        shown = np.stack(captions())[:1, 0]
        Judgement(run, trainer, EvaluationConfig(autoguidance=1.0), {"network": "colours"}, shown).ask(keeper)
        keeper.before_test = lambda step: trainer.tested_at.append(step)
        keeper.act = keeper.stops_early and (lambda row: {"stopped": "stopped: it is settled"})
        keeper.stop = stop
        try:
            fit(
                trainer,
                keeper,
                lambda step: latent_batches(
                    *data, **stream, caption_dropout=0.2, times=tf.identity, start_step=step
                ),
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
    trainer, first_state, straight, tmp_path, stops, capsys
):
    for variable, value in zip(state(trainer), first_state, strict=True):
        variable.assign(value)
    for stop in stops:
        trainer.tested_at = []
        assert not work(trainer, tmp_path / "run", stop)
        forget(trainer)
    assert work(trainer, tmp_path / "run")
    values, rows, best, _ = straight
    for variable, value in zip(state(trainer), values, strict=True):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)
    at = re.findall(r"^   going on at step (\d) of 6$", capsys.readouterr().out, re.MULTILINE)
    assert len(at) == len(stops) - (at[:1] == []) and at == sorted(at)
    assert trainer.tested_at[-1] == EPOCHS * STEPS  # also where nothing but the epoch's end was left
    run = RunFolder.read(tmp_path / "run")
    assert without_seconds(run.rows()) == without_seconds(rows)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert ["val_kid_change" in row for row in rows] == [False, True]
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


def bad_work(trainer, folder, steps):
    """A stage of 2 epochs of so many steps, whose noise is no number."""
    vocabulary = trainer.painter.networks.vocabulary
    latents = Latents(*np.random.default_rng(0).normal(size=(2, 7, 2, 8, 8, 2)).astype("float32"))
    data, stream = (latents, captions(), vocabulary), {"batch_size": 4, "seed": 0}

    def batches_from(step):
        own = latent_batches(*data, **stream, caption_dropout=0.2, times=tf.identity, start_step=step)
        return own.map(lambda batch: {**batch, "noise": batch["noise"] * np.nan})

    with RunFolder.open(folder, {"seed": 0}) as run, Signals() as signals:
        keeper = Keeper(run, "diffusion", steps, signals, 2)
        protocol, shown = {"network": "colours"}, np.stack(captions())[:1, 0]
        Judgement(run, trainer, EvaluationConfig(autoguidance=1.0), protocol, shown).ask(keeper)
        fit(trainer, keeper, batches_from, validation_batches(*data, **stream))


@pytest.mark.parametrize(
    ("steps", "good"),
    [(8, "the run keeps its last good checkpoint, of step 8"), (30, "nothing was saved yet")],
)
def test_a_training_that_diverges_ends_in_a_line_that_names_the_place(
    trainer, first_state, tmp_path, steps, good
):
    for _ in range(2):  # the same command comes to the same end
        forget(trainer)
        for variable, value in zip(state(trainer), first_state, strict=True):
            variable.assign(value)  # which a checkpoint takes the place of, where there is one
        with pytest.raises(InputError) as stop:
            bad_work(trainer, tmp_path / "run", steps)
        assert str(stop.value) == (
            "diffusion: 10 steps in a row, the last of them step 10, were not finite: NaN or Inf appears first in the "
            f"batch's noise; {good}; a lower learning rate may help, in another --run"
        )


def test_a_step_that_is_finite_again_when_it_is_looked_at_is_told_as_such(
    trainer, first_state, tmp_path, monkeypatch
):
    for variable, value in zip(state(trainer), first_state, strict=True):
        variable.assign(value)
    monkeypatch.setattr("stages.fitting.first_nonfinite", lambda trainer, batch: None)
    with pytest.raises(
        InputError, match="step 10, were not finite: the last of them is finite by itself; nothing"
    ):
        bad_work(trainer, tmp_path / "run", 30)


@pytest.mark.parametrize(
    ("broken", "place"),
    [
        ("kernel", "the output of the layer discriminator/discriminator.convs.1"),
        (None, "its loss or gradient"),
    ],
)
def test_a_discriminator_that_diverges_is_told_by_its_layer(tmp_path, broken, place):
    keras.utils.set_random_seed(0)
    vae = AutoencoderKL((4, 4), blocks=(0, 0), latent_channels=2, groups=2, attention=False)
    adversary = Adversary(PatchDiscriminator(4, 1, groups=2), r1_weight=0.0 if broken else math.nan)
    trainer = VAETrainer(vae, adversary=adversary)
    judge = adversary.discriminator.trainable_variables
    step = {"learning_rate": 1e-3, "weight_decay": 0.0, "clip_norm": 1.0}
    trainer.compile(adamw(trainer.trained_variables, **step), adamw(judge, **step, name="disc_adamw"))
    if broken:
        kernel = adversary.discriminator.get_layer("discriminator.convs.1").kernel
        kernel.assign(np.full(kernel.shape, np.nan))
    batch = {"pixels": tf.ones((2, 16, 16, 3)), "posterior_noise": tf.zeros((2, 8, 8, 2))}
    batches = tf.data.Dataset.from_tensors(batch).repeat()
    validation = tf.data.Dataset.from_tensors({**batch, "weight": tf.ones(2)})
    with RunFolder.open(tmp_path / "run", {"seed": 0}) as run, Signals() as signals:
        with pytest.raises(
            InputError, match=f"it is the discriminator: NaN or Inf appears first in {place}; "
        ):
            fit(trainer, Keeper(run, "vae", 12, signals, 1), lambda step: batches, validation)


class Settled(StoppingKeeper):
    """Stops a training at the end of its first epoch."""

    stops_early = True


def test_a_training_that_was_ended_before_stays_so(trainer, first_state, tmp_path):
    for variable, value in zip(state(trainer), first_state, strict=True):
        variable.assign(value)
    assert work(trainer, tmp_path / "run", kind=Settled)
    assert [row["stopped"] for row in RunFolder.read(tmp_path / "run").rows()] == ["stopped: it is settled"]
    ended = [np.asarray(variable) for variable in state(trainer)]
    forget(trainer)
    assert work(trainer, tmp_path / "run", ("step", 0))
    assert len(RunFolder.read(tmp_path / "run").rows()) == 1
    for variable, value in zip(state(trainer), ended, strict=True):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)


def test_an_epochs_end_that_was_cut_can_end_the_training_too(trainer, first_state, tmp_path):
    for variable, value in zip(state(trainer), first_state, strict=True):
        variable.assign(value)
    assert not work(
        trainer, tmp_path / "run", ("step", STEPS - 1)
    )  # all that is left is what closes the epoch
    assert work(trainer, tmp_path / "run", kind=Settled)
    run = RunFolder.read(tmp_path / "run")
    assert [row["step"] for row in run.rows()] == [STEPS] and run.latest("diffusion").state["stopped"]


def test_a_second_signal_does_not_cut_the_saving(trainer, tmp_path, monkeypatch):
    save = RunFolder.save

    def save_under_fire(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        save(*arguments)

    monkeypatch.setattr(RunFolder, "save", save_under_fire)
    assert not work(trainer, tmp_path / "run", ("step", 1))
    assert RunFolder.read(tmp_path / "run").latest("diffusion").step == 2
