"""The order of the work: a stage's optimizer, and its `fit` from wherever it stopped."""

from tqdm import tqdm

from callbacks import Bar, Diverged, Interrupted, skips_in_row
from errors import InputError
from evaluate import plot_tracked
from files import atomic_file
from optimizers import OPTIMIZERS, warmup_cosine
from tracking import Tracker, first_nonfinite, first_nonfinite_output, read_tracked


def steps_an_epoch(stage, pictures):
    """Steps of an epoch of a stage (its part of the config): as it says, or one pass over so many pictures."""
    return stage.steps_per_epoch or max(1, pictures // stage.batch_size)


def optimizer_of(trainer, stage, steps_per_epoch):
    """The optimizer that a stage asks for, built for the trainer's variables."""
    return OPTIMIZERS[stage.optimizer](
        trainer.trained_variables,
        learning_rate=learning_rate_of(stage, steps_per_epoch, stage.learning_rate),
        weight_decay=stage.weight_decay,
        clip_norm=stage.clip_norm,
    )


def learning_rate_of(stage, steps_per_epoch, peak, start=0):
    """The schedule of a stage's learning rate, or of one with another peak whose training starts later."""
    falls = getattr(stage, "schedule", "cosine") == "cosine"
    final = {} if falls else {"final": 1.0}
    return warmup_cosine(peak, stage.epochs * steps_per_epoch - start, stage.warmup_steps, **final)


def fit(trainer, keeper, batches_from, validation, track=0):
    """Keras' `fit` from wherever the keeper's checkpoint stands, in the middle of an epoch too.

    Args:
        trainer: a compiled trainer.
        keeper: the stage's `callbacks.Keeper`.
        batches_from: function of the step -> training batches from there on.
        validation: the validation batches.
        track: steps between two readings of all layers, see `tracking.Tracker`; 0: none.

    Raises:
        Interrupted: a signal came; everything is saved.
        InputError: step after step the gradient was not finite.
    """
    keeper.restore(trainer)
    total = keeper.epochs * keeper.steps_per_epoch
    if keeper.step:
        tqdm.write(f"   going on at step {keeper.step} of {total}")
    callbacks = [keeper, Bar(keeper.stage, total, keeper)]
    if track:
        rows, events = keeper.run.tracked_path(keeper.stage), keeper.run.events_path(keeper.stage)
        callbacks.append(Tracker(lambda step: next(iter(batches_from(step))), track, keeper, rows, events))
    try:
        if keeper.pending:  # all steps of the epoch were done, but not what closes it
            keeper.set_model(trainer)
            epoch = keeper.step // keeper.steps_per_epoch - 1
            keeper.on_epoch_begin(epoch)
            logs = trainer.evaluate(validation, return_dict=True, verbose=0, callbacks=[keeper])
            keeper.on_epoch_end(epoch, {f"val_{name}": value for name, value in logs.items()})
        while not keeper.is_done:
            epoch, done = divmod(keeper.step, keeper.steps_per_epoch)
            trainer.fit(
                batches_from(keeper.step),
                initial_epoch=epoch,
                epochs=epoch + 1 if done else keeper.epochs,
                steps_per_epoch=keeper.steps_per_epoch - done,
                validation_data=validation,
                callbacks=callbacks,
                shuffle=False,  # the stream is shuffled already; without it Keras warns
                verbose=0,
            )
    except Diverged as stop:
        raise InputError(_where_it_diverged(trainer, keeper, batches_from, stop)) from None
    except Interrupted:
        keeper.signals.shield()  # a second Ctrl-C must not cut the saving
        keeper.save(trainer)
        raise
    tracked = read_tracked(rows) if track else []
    if tracked:  # none where no step was left to measure
        with atomic_file(rows.with_suffix(".png")) as file:
            plot_tracked(tracked, file)


def _where_else(trainer, batch):
    """Which side it is, where the trainer's own losses are finite on the batch."""
    _, *others = trainer.optimizers_in_use
    if not any(skips_in_row(optimizer) for optimizer in others):
        return "the last of them is finite by itself"
    judge, pixels = trainer.adversary.discriminator, batch["pixels"]
    layer = first_nonfinite_output(
        {"discriminator": judge}, lambda: (judge(pixels), judge(trainer.vae(pixels)))
    )
    where = "its loss or gradient" if layer is None else f"the output of the layer {layer}"
    return f"it is the discriminator: NaN or Inf appears first in {where}"


def _where_it_diverged(trainer, keeper, batches_from, stop):
    """What to tell a user whose training has no finite gradients any more."""
    batch = next(iter(batches_from(stop.step - 1)))
    where = first_nonfinite(trainer, batch) or _where_else(trainer, batch)
    saved = keeper.run.checkpoint_steps(keeper.stage)
    good = (
        f"the run keeps its last good checkpoint, of step {saved[-1]}" if saved else "nothing was saved yet"
    )
    return f"{keeper.stage}: {stop}: {where}; {good}; a lower learning rate may help, in another --run"
