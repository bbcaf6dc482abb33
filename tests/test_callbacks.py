"""A training keeps its rows, its checkpoints and its best, and a signal never cuts a step in two."""

import math
import os
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

import callbacks
from callbacks import MOST_SKIPPED, Bar, Diverged, Interrupted, Keeper, Measured, Signals, describe
from checkpoint import RunFolder
from input_pipeline import Latents, latent_batches, validation_batches
from metrics import Estimate
from optimizers import adamw
from trainer import LatentDiffusionTrainer

STEPS = 2  # an epoch
EPOCHS = 5  # planned; most tests stop before
NAN = Estimate(math.nan, math.nan, math.nan)


@pytest.fixture(scope="module")
def trainer(light_networks):
    trainer = LatentDiffusionTrainer(light_networks(), image_size=16)
    trainer.compile(adamw(trainer.trained_variables, learning_rate=0.01, weight_decay=0.1, clip_norm=1.0))
    return trainer


@pytest.fixture
def run(tmp_path):
    with RunFolder.open(tmp_path / "run", {"seed": 0}) as run:
        yield run


def variables(trainer):
    networks = [weight for network in trainer.networks.values() for weight in network.weights]
    counts = [variable for tracker in trainer.trackers.values() for variable in tracker.variables]
    return networks + trainer.optimizer.variables + counts


def scramble(trainer):
    """As good as another process: nothing that is not read back can be right."""
    for variable in variables(trainer):
        variable.assign(np.full(variable.shape, 7, variable.dtype))


def fit(trainer, keeper, epochs, others=()):
    vocabulary = trainer.painter.networks.vocabulary
    rng = np.random.default_rng(0)
    latents = Latents(*rng.normal(size=(2, 7, 1, 8, 8, 2)).astype("float32"))
    captions = [rows[None] for rows in np.resize(np.arange(1, 9), (7, 7)).astype("int32")]
    data, stream = (latents, captions, vocabulary), {"batch_size": 4, "seed": 0}
    trainer.fit(
        latent_batches(*data, **stream, caption_dropout=0.1, times=tf.identity, start_step=keeper.step),
        initial_epoch=keeper.step // STEPS,
        epochs=epochs,
        steps_per_epoch=STEPS,
        validation_data=validation_batches(*data, **stream),
        callbacks=[keeper, *others],
        shuffle=False,
        verbose=0,
    )


def keeper_of(run, **settings):
    return Keeper(run, "diffusion", STEPS, Signals(), EPOCHS, **settings)


# Signals.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_step_is_whole_and_is_acknowledged_at_once(number, capfd):
    former, done = signal.getsignal(number), []
    with pytest.raises(Interrupted) as stop, Signals() as signals:
        signals.shield()
        os.kill(os.getpid(), number)
        name = signal.Signals(number).name
        told = capfd.readouterr().err
        assert told.startswith(f"\n{name} received: stopping when the step under way ends, then saving.")
        assert told.count("\n") == 2
        os.kill(os.getpid(), number)
        assert capfd.readouterr().err == ""  # once is enough
        done.append("the step")
        signals.release()
        done.append("what follows")
    assert done == ["the step"]
    assert stop.value.signal == number
    assert signal.getsignal(number) is former


def test_a_signal_while_keras_traces_a_layer_comes_through_whole():
    class Slow(keras.layers.Layer):
        def call(self, x):
            os.kill(os.getpid(), signal.SIGINT)
            return x

    network = keras.Sequential([Slow()])
    with pytest.raises(Interrupted) as stop, Signals():
        tf.function(network)(tf.zeros((1, 2)))
    assert stop.value.signal == signal.SIGINT


def test_a_signal_between_the_steps_acts_at_once_and_only_once():
    with Signals() as signals:
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        signals.shield()
        signals.release()


# Keeper.


def test_each_epoch_leaves_a_row_and_a_checkpoint(run, trainer):
    keeper = keeper_of(run, finish_row=lambda epoch, row: {"twice": 2 * row["step"], "number": epoch})
    history = keras.callbacks.History()
    fit(trainer, keeper, 3, [history])
    rows = run.rows()
    assert [(row["stage"], row["epoch"], row["step"], row["twice"], row["number"]) for row in rows] == [
        ("diffusion", 1, 2, 4, 0),
        ("diffusion", 2, 4, 8, 1),
        ("diffusion", 3, 6, 12, 2),
    ]
    for name in ("loss", "val_loss"):
        assert [row[name] for row in rows] == pytest.approx(history.history[name], rel=1e-6)
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.01] * 3)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert not any(row["best"] for row in rows)  # nothing was measured to choose by
    assert run.best("diffusion") is None
    assert run.latest("diffusion").step == 6


def test_a_checkpoint_brings_back_every_number(run, trainer):
    keeper = keeper_of(run)
    fit(trainer, keeper, 1)
    kept = [np.asarray(variable) for variable in variables(trainer)]
    scramble(trainer)
    other = keeper_of(run)
    other.restore(trainer)
    trainer.reset_metrics()
    assert other.step == STEPS
    for variable, value in zip(variables(trainer), kept, strict=True):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)


def test_a_resumed_stage_forgets_the_rows_after_its_checkpoint_and_no_others(run, trainer):
    fit(trainer, keeper_of(run), 1)
    run.log({"stage": "diffusion", "step": 4})
    run.log({"stage": "vae", "step": 4})
    keeper_of(run).restore(trainer)
    assert [(row["stage"], row["step"]) for row in run.rows()] == [("diffusion", 2), ("vae", 4)]


def chooser(estimates):
    """Measures what is given, epoch by epoch."""
    return lambda row: Measured(estimates[row["epoch"] - 1], {"protocol": {"network": "none"}})


def test_the_best_is_chosen_by_its_interval_and_nan_never_wins(run, trainer):
    measured = [
        NAN,
        Estimate(0.5, 0.4, 0.6),  # the first finite one
        Estimate(0.45, 0.35, 0.55),  # inside the interval of the best
        Estimate(0.3, 0.2, 0.4),  # below it
        NAN,
    ]
    fit(trainer, keeper_of(run, choose=chooser(measured)), 3)
    assert run.best_state("diffusion")["epoch"] == 2
    scramble(trainer)
    resumed = keeper_of(run, choose=chooser(measured))
    resumed.restore(trainer)
    weights = {}

    class Note(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            weights[resumed.step] = [np.asarray(weight) for weight in trainer.ema_unet.weights]

    fit(trainer, resumed, 5, [Note()])
    assert [row["best"] for row in run.rows()] == [False, True, False, True, False]
    best = run.best("diffusion")
    assert (best.state["value"], best.state["epoch"], best.step) == (0.3, 4, 8)
    assert best.state["protocol"] == {"network": "none"}
    for weight, value in zip(trainer.ema_unet.weights, weights[8], strict=True):
        np.testing.assert_array_equal(best.tensors[f"ema_unet/{weight.path}"], value)


def test_where_the_change_is_measured_its_interval_chooses(run, trainer):
    inside = Estimate(0.45, 0.35, 0.55)  # of the interval of the first
    changes = [None, Estimate(-0.05, -0.11, 0.01), Estimate(-0.05, -0.09, -0.01), NAN]

    def choose(row):
        k = row["epoch"] - 1
        estimate = inside if k else Estimate(0.5, 0.4, 0.6)
        return Measured(estimate, {}, {"features": np.full(2, k, "float32")}, changes[k])

    fit(trainer, keeper_of(run, choose=choose), 4)
    assert [row["best"] for row in run.rows()] == [True, False, True, False]
    np.testing.assert_array_equal(run.best("diffusion").tensors["features"], [2, 2])


def test_the_best_so_far_survives_a_resume(run, trainer):
    measured = [Estimate(0.5, 0.4, 0.6), Estimate(0.45, 0.35, 0.55)]
    fit(trainer, keeper_of(run, choose=chooser(measured)), 1)
    resumed = keeper_of(run, choose=chooser(measured))
    resumed.restore(trainer)
    fit(trainer, resumed, 2)
    assert [row["best"] for row in run.rows()] == [True, False]


def test_an_epoch_that_a_crash_repeats_says_the_same(run, trainer, monkeypatch):
    measured = [Estimate(0.5, 0.4, 0.6)]

    def crash(*arguments):
        raise SystemError("power is gone")

    keeper = keeper_of(run, choose=chooser(measured))
    keeper.save(trainer)  # step 0
    with monkeypatch.context() as broken:
        broken.setattr(run, "save", crash)  # between the best and the checkpoint
        with pytest.raises(SystemError):
            fit(trainer, keeper, 1)
    row = run.rows()[-1]
    scramble(trainer)
    resumed = keeper_of(run, choose=chooser(measured))
    resumed.restore(trainer)
    assert run.rows() == []
    fit(trainer, resumed, 1)
    again = run.rows()[-1]
    assert row["best"] is True
    assert {**row, "seconds": 0} == {**again, "seconds": 0}


def test_kid_is_due_every_so_many_epochs_and_at_both_ends(run, trainer):
    due = []
    keeper = keeper_of(run, kid_every=2, finish_row=lambda epoch, row: due.append(trainer.kid_due) or {})
    fit(trainer, keeper, EPOCHS)
    assert due == [True, True, False, True, True]


def test_what_acts_comes_after_the_best_and_before_the_checkpoint(run, trainer):
    seen = []

    def act(row):
        seen.append(
            (row["best"], run.best_state("diffusion")["step"], run.latest("diffusion"), len(run.rows()))
        )
        trainer.optimizer.rate_scale.assign(0.5)
        return {"note": "half the rate", "step_seen": row["step"]}

    keeper = keeper_of(run, choose=chooser([Estimate(0.5, 0.4, 0.6)]), act=act)
    fit(trainer, keeper, 1)
    assert seen == [(True, STEPS, None, 0)]
    (row,) = run.rows()
    assert (row["note"], row["step_seen"]) == ("half the rate", STEPS)
    assert row["learning_rate"] == pytest.approx(0.01)  # of the epoch that is over
    scramble(trainer)
    resumed = keeper_of(run)
    resumed.restore(trainer)
    assert float(np.asarray(trainer.optimizer.rate_scale)) == 0.5
    fit(trainer, resumed, 2)
    assert run.rows()[-1]["learning_rate"] == pytest.approx(0.005)
    trainer.optimizer.rate_scale.assign(1.0)


def test_what_acts_can_stop_a_training_for_good(run, trainer):
    act = {2: {"stopped": "stopped: it is enough"}}
    keeper = keeper_of(run, act=lambda row: act.get(row["epoch"], {}))
    fit(trainer, keeper, EPOCHS)
    assert [row.get("stopped") for row in run.rows()] == [None, "stopped: it is enough"]
    assert keeper.is_done and keeper.step == 2 * STEPS
    resumed = keeper_of(run)
    assert not resumed.is_done
    resumed.restore(trainer)
    assert resumed.is_done and resumed.step == 2 * STEPS


def poisoned(trainer, keeper, epochs, bad):
    """Trains on a batch whose gradient is not finite at the given steps."""
    vocabulary = trainer.painter.networks.vocabulary
    rng = np.random.default_rng(0)
    latents = Latents(*rng.normal(size=(2, 4, 1, 8, 8, 2)).astype("float32"))
    captions = [rows[None] for rows in np.resize(np.arange(1, 9), (4, 7)).astype("int32")]
    data, stream = (latents, captions, vocabulary), {"batch_size": 4, "seed": 0}
    batch = next(iter(latent_batches(*data, **stream, caption_dropout=0.1, times=tf.identity)))
    worse = {**batch, "noise": batch["noise"] * np.nan}
    batches = [worse if step in bad else batch for step in range(keeper.step + 1, epochs * STEPS + 1)]
    trainer.fit(
        _endless(batches),
        initial_epoch=keeper.step // STEPS,
        epochs=epochs,
        steps_per_epoch=STEPS,
        callbacks=[keeper],
        shuffle=False,
        verbose=0,
    )


def _endless(batches):
    signature = {name: tf.TensorSpec(value.shape, value.dtype) for name, value in batches[0].items()}
    return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=signature)


def zero_counts(trainer):
    for counter in (trainer.optimizer.skipped, trainer.optimizer.skipped_in_row):
        counter.assign(0)


def test_a_row_tells_of_the_steps_that_were_skipped_so_far(run, trainer):
    zero_counts(trainer)
    poisoned(trainer, keeper_of(run), 3, bad={3, 4, 5})
    rows = run.rows()
    assert [row.get("skipped_steps") for row in rows] == [None, 2, 3]
    assert "\n      3 steps so far were not finite and are skipped" in describe(rows[-1])


def test_ten_bad_steps_in_a_row_stop_the_training_and_fewer_do_not(run, trainer):
    zero_counts(trainer)
    poisoned(trainer, keeper_of(run), 6, bad=set(range(2, 11)) | {12})  # nine
    assert len(run.rows()) == 6
    zero_counts(trainer)
    weights = [np.asarray(weight) for weight in trainer.trained_variables]
    keeper = keeper_of(run)
    with pytest.raises(Diverged, match="10 steps in a row, the last of them step 10, ") as stop:
        poisoned(trainer, keeper, 9, bad=set(range(1, 19)))
    assert stop.value.step == keeper.step == MOST_SKIPPED
    for weight, value in zip(trainer.trained_variables, weights, strict=True):
        np.testing.assert_array_equal(weight, value, err_msg=weight.path)
    zero_counts(trainer)


def test_what_comes_before_a_test_is_told_the_step(run, trainer):
    keeper, steps = keeper_of(run), []
    keeper.before_test = steps.append
    fit(trainer, keeper, 3)
    assert steps == [2, 4, 6]


# What the console shows.


def test_a_row_is_told_in_one_line():
    row = {"stage": "diffusion", "epoch": 3, "step": 6, "loss": 0.25, "val_loss": 1 / 3, "seconds": 61.7}
    assert describe(row) == "epoch 3   loss 0.25   val_loss 0.3333   after 62 s"
    kid = {"val_kid": 0.1, "val_kid_low": 0.05, "val_kid_high": 0.15, "val_kid_floor": 0.01}
    line = (
        "epoch 3   loss 0.25   val_loss 0.3333   KID 0.1000 [0.0500, 0.1500], floor 0.0100   after 62 s"
        "   best so far"
    )
    assert describe({**row, **kid, "best": True}) == line
    for none in (math.nan, None):  # as measured, and as the log keeps it
        without = line.replace("floor 0.0100", "no floor (it takes 6 validation pictures)")
        assert describe({**row, **kid, "best": True, "val_kid_floor": none}) == without
    assert "KID" not in describe({**row, **kid, "val_kid": math.nan})
    assert "val_psnr 27.12" in describe({**row, "val_psnr": 27.1234, "val_psnr_low": 26.0})


def test_what_was_done_about_an_epoch_stands_below_its_line():
    row = {"epoch": 3, "loss": 0.25, "val_ssim": 0.91234, "val_rkid": 0.01, "seconds": 61.7, "best": True}
    told = {
        "stopped": "stopped: enough",
        "rate": "a lower rate",
        "guard": "guard: weaker",
        "skipped_steps": 2,
    }
    assert describe({**row, **told}).split("\n      ") == [
        "epoch 3   loss 0.25   val_ssim 0.9123   val_rkid 0.01   after 62 s   best so far",
        "guard: weaker",
        "a lower rate",
        "stopped: enough",
        "2 steps so far were not finite and are skipped",
    ]


class FakeBar:
    """Stands for tqdm on a terminal."""

    def __init__(self, total, initial, **settings):
        self.total, self.n, self.disable, self.postfix, self.closed = total, initial, False, [], False
        FakeBar.last = self

    def update(self):
        self.n += 1

    def set_postfix(self, entries):
        self.postfix.append(entries)

    def close(self):
        self.closed = True


def test_the_bar_counts_all_steps_of_a_stage_and_shows_loss_and_kid(run, trainer, monkeypatch):
    monkeypatch.setattr(callbacks, "tqdm", FakeBar)
    monkeypatch.setattr(FakeBar, "write", print, raising=False)
    monkeypatch.setattr(callbacks, "SHOW_EVERY", STEPS)
    keeper = keeper_of(run)
    bar = Bar("drawing", 3 * STEPS, keeper)
    fit(trainer, keeper, 1, [bar])
    bar.kid = 0.125  # as `on_epoch_end` notes it of the logs
    resumed = keeper_of(run)
    resumed.restore(trainer)
    bar.keeper = resumed
    first = FakeBar.last
    fit(trainer, resumed, 3, [bar])
    assert (first.n, first.total, first.closed) == (STEPS, 3 * STEPS, True)
    assert FakeBar.last.n == FakeBar.last.total == 3 * STEPS
    rows = run.rows()
    assert first.postfix == [{"loss": f"{rows[0]['loss']:.4f}"}]
    assert FakeBar.last.postfix == [{"loss": f"{row['loss']:.4f}", "KID": "0.1250"} for row in rows[1:]]


def test_the_bar_notes_the_last_kid():
    bar = Bar("", 1, None)
    for logs in ({"val_kid": 0.5}, {}, {"val_kid": 0.25}, None):
        bar.on_epoch_end(0, logs)
    assert bar.kid == 0.25
