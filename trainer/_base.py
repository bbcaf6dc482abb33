"""The trainers' common part: the step, its division among replicas, and weighted means of the losses."""

import keras
import tensorflow as tf
from keras import ops

import parallel


class Trainer(keras.Model):
    """What both trainers share: the step, its division among replicas, and weighted means of the losses.

    A subclass lists the names of its losses in `loss_names` and gives `sample_losses(batch, training)`: a dict of the
    loss of each sample (B,), of which "loss" is minimised.

    Args:
        name: of the Keras model.
        micro_batches: parts of a batch (of this replica's share) whose gradients are added up, see
            `parallel.summed`; None chooses by `parallel.parts_of`.
    """

    loss_names = ("loss",)

    def __init__(self, name, micro_batches=None):
        super().__init__(name=name)
        self.micro_batches = micro_batches
        self.trackers = {name: keras.metrics.Mean(name=name) for name in self.loss_names}

    @property
    def metrics(self):
        return list(self.trackers.values())

    def make_train_function(self, force=False):
        if self.train_function is None or force:
            self.train_function = self._function_of(self.train_step)

    def make_test_function(self, force=False):
        if self.test_function is None or force:
            self.test_function = self._function_of(self.test_step)

    def _function_of(self, step):
        """What Keras calls at each step with an iterator: it takes the next batch and runs `step` on all replicas.

        One graph does it. Keras' own puts a second one around that, and has AutoGraph read the source of every layer,
        which nothing here needs: the first step waits for both.

        Args:
            step: batch -> dict of scalars, `train_step` or `test_step`.

        Returns:
            iterator -> dict of the scalars' means over the replicas.
        """
        strategy = self.distribute_strategy

        def on_replicas(batch):
            means = strategy.run(step, (batch,))
            return {name: strategy.reduce("MEAN", value, axis=None) for name, value in means.items()}

        if not self.run_eagerly:
            settings = {"autograph": False, "reduce_retracing": True, "jit_compile": self.jit_compile}
            on_replicas = tf.function(on_replicas, **settings)
        return lambda iterator: on_replicas(next(iterator))

    def train_step(self, batch):
        """One step on a batch (this replica's part of it)."""
        gradients, means = self._gradients(batch)
        self.optimizer.apply(gradients, self.trained_variables)
        self.after_step()
        return self._track(means)

    def _gradients(self, batch):
        """The gradients of the batch's mean loss, this replica's share of them, and the mean of each loss."""
        variables = self.trained_variables
        parts = parallel.parts_of(next(iter(batch.values())).shape[0], self.micro_batches)

        def part(rows):
            with tf.GradientTape() as tape:
                losses = self.sample_losses(rows, training=True)
                # The optimizer sums gradients over the replicas, so each takes its share of the mean.
                loss = ops.mean(losses["loss"]) / (parts * self.distribute_strategy.num_replicas_in_sync)
            gradients = [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, variables)]
            return gradients, {name: ops.mean(losses[name]) / parts for name in self.loss_names}

        zeros = (
            [tf.zeros(variable.shape) for variable in variables],
            dict.fromkeys(self.loss_names, tf.zeros(())),
        )
        return parallel.summed(part, batch, parts, zeros)

    def test_step(self, batch):
        """The losses of a validation batch; its "weight" (B,) is 0 for rows that only fill the batch up."""
        names = sorted(batch)

        def losses_of(*rows):
            losses = self.sample_losses(dict(zip(names, rows, strict=True)), training=False)
            return ops.stack([losses[name] for name in self.loss_names], axis=-1)

        losses = parallel.joined(losses_of, [batch[name] for name in names], [len(self.loss_names)])
        return self._track(
            dict(zip(self.loss_names, tf.unstack(losses, axis=-1), strict=True)), batch["weight"]
        )

    def after_step(self):
        """What follows the optimizer's step, such as averaging weights."""

    def _track(self, losses, weight=None):
        for name, tracker in self.trackers.items():
            tracker.update_state(losses[name], sample_weight=weight)
        return {name: tracker.result() for name, tracker in self.trackers.items()}

    def compile(self, optimizer, **kwargs):
        """Takes an optimizer that was built for `trained_variables`; XLA stays off unless asked for.

        Raises:
            ValueError: several steps an execution, between which callbacks would see nothing.
        """
        if kwargs.get("steps_per_execution", 1) != 1:
            raise ValueError(
                f"steps_per_execution must be 1. Received: {kwargs['steps_per_execution']}, "
                "of which callbacks that count steps would miss some"
            )
        super().compile(optimizer=optimizer, **{"jit_compile": False, **kwargs})

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Nothing is left to build; Keras would average a batch over the replicas for it, which fails on a mask."""
