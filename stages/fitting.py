"""The order of the work: a stage's optimizer, and its `fit` from wherever it stopped."""

from tqdm import tqdm

from callbacks import Bar, Interrupted
from optimizers import OPTIMIZERS, warmup_cosine


def steps_an_epoch(stage, pictures):
    """Steps of an epoch of a stage (its part of the config): as it says, or one pass over so many pictures."""
    return stage.steps_per_epoch or max(1, pictures // stage.batch_size)


def optimizer_of(trainer, stage, steps_per_epoch):
    """The optimizer that a stage asks for, built for the trainer's variables."""
    return OPTIMIZERS[stage.optimizer](
        trainer.trained_variables,
        learning_rate=warmup_cosine(stage.learning_rate, stage.epochs * steps_per_epoch, stage.warmup_steps),
        weight_decay=stage.weight_decay,
        clip_norm=stage.clip_norm,
    )


def fit(trainer, keeper, batches_from, validation):
    """Keras' `fit` from wherever the keeper's checkpoint stands, in the middle of an epoch too.

    Args:
        trainer: a compiled trainer.
        keeper: the stage's `callbacks.Keeper`.
        batches_from: function of the step -> training batches from there on.
        validation: the validation batches.

    Raises:
        Interrupted: a signal came; everything is saved.
    """
    keeper.restore(trainer)
    total = keeper.epochs * keeper.steps_per_epoch
    if keeper.step:
        tqdm.write(f"   going on at step {keeper.step} of {total}")
    callbacks = [keeper, Bar(keeper.stage, total, keeper)]
    try:
        if keeper.pending:  # all steps of the epoch were done, but not what closes it
            keeper.set_model(trainer)
            epoch = keeper.step // keeper.steps_per_epoch - 1
            keeper.on_epoch_begin(epoch)
            logs = trainer.evaluate(validation, return_dict=True, verbose=0, callbacks=[keeper])
            keeper.on_epoch_end(epoch, {f"val_{name}": value for name, value in logs.items()})
        while keeper.step < total:
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
    except Interrupted:
        keeper.signals.shield()  # a second Ctrl-C must not cut the saving
        keeper.save(trainer)
        raise
