"""The trainers' common part: the step, its division among replicas, and weighted means of the losses."""

import keras
import tensorflow as tf
from keras import ops

import parallel
from checkpoint import named_variables


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
        self.optimizer = None  # until `compile`; losses and gradients can be had before
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

    @property
    def optimizers_in_use(self):
        """The optimizer of `trained_variables`, then any others."""
        return [self.optimizer]

    @property
    def kept_variables(self):
        """What a checkpoint keeps: lists of (name, Keras variable), by a name of each list."""
        kept = {name: named_variables(network) for name, network in self.networks.items()}
        return kept | {"optimizer": [(variable.path, variable) for variable in self.optimizer.variables]}

    def train_step(self, batch):
        """One step on a batch (this replica's part of it)."""
        gradients, means = self._gradients(batch)
        self.optimizer.apply(refused_if(means["loss"], gradients), self.trained_variables)
        self.after_step()
        return self._track(means, skip_bad=True)

    def gradients_of(self, batch):
        """The gradients of a batch's mean loss (this replica's share of it) by `trained_variables`, as tensors."""
        scale = loss_scale(self.optimizer)
        return [gradient / scale for gradient in self._gradients(batch)[0]]

    def _gradients(self, batch):
        """The gradients of the batch's mean loss, this replica's share of them, and the mean of each loss."""
        variables = self.trained_variables
        parts, scale = self._parts_of(batch), self._loss_scale(self.optimizer)

        def part(rows):
            with tf.GradientTape() as tape:
                losses = self.sample_losses(rows, training=True)
                loss = ops.mean(losses["loss"]) * (scale / parts)
            gradients = [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, variables)]
            return gradients, {name: ops.mean(losses[name]) / parts for name in self.loss_names}

        zeros = (
            [tf.zeros(variable.shape) for variable in variables],
            dict.fromkeys(self.loss_names, tf.zeros(())),
        )
        return parallel.summed(part, batch, parts, zeros)

    def _parts_of(self, batch):
        return parallel.parts_of(next(iter(batch.values())).shape[0], self.micro_batches)

    def _loss_scale(self, optimizer):
        """What a mean over this replica's batch is multiplied by: the optimizer sums gradients over the replicas."""
        return loss_scale(optimizer) / self.distribute_strategy.num_replicas_in_sync

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

    def _track(self, losses, weight=None, skip_bad=False):
        """The running means of these losses; `skip_bad` leaves out what is not finite, as the step did."""
        for name, value in losses.items():
            if skip_bad:
                weight = tf.cast(tf.math.is_finite(value), tf.float32) * self._has_counted()
                value = tf.math.multiply_no_nan(value, weight)
            self.trackers[name].update_state(value, sample_weight=weight)
        return {name: self.trackers[name].result() for name in losses}

    def _has_counted(self):
        """1, or 0 where the optimizer has just skipped a step: on all replicas, also those whose losses are finite."""
        skips = getattr(self.optimizer, "skipped_in_row", None)
        return 1.0 if skips is None else tf.cast(tf.equal(skips.value, 0), tf.float32)

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
        # In 16 bits Keras would wrap the optimizer in one that scales losses by itself, and looks at one replica only.
        super().compile(optimizer=optimizer, **{"jit_compile": False, "auto_scale_loss": False, **kwargs})

    def _get_metrics_result_or_logs(self, logs):
        """The means over all replicas, with their weights; Keras would average the replicas' own where a tracker of
        another step, such as the adversarial one, is not among the logs."""
        return {name: self.trackers[name].result() for name in logs}

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Nothing is left to build; Keras would average a batch over the replicas for it, which fails on a mask."""


def loss_scale(optimizer):
    """The factor that an optimizer of `optimizers` wants its loss to have; 1 for any other."""
    return getattr(optimizer, "loss_scale", 1.0)


def refused_if(loss, gradients):
    """The gradients, which the optimizer refuses if the loss is not finite, even where they are."""
    first, *others = gradients
    return [tf.where(tf.math.is_finite(loss), first, float("nan")), *others]


def move_average(average, weights, decay, step):
    """Moves averaged variables towards the weights; the decay warms up as (1 + step) / (10 + step).

    Args:
        average, weights: lists of Keras variables of the same shapes.
        decay: of the average, once it is warm.
        step: steps done, a scalar tensor.
    """
    step = ops.cast(step, "float32")
    share = 1.0 - ops.minimum(decay, (1.0 + step) / (10.0 + step))
    for own, weight in zip(average, weights, strict=True):
        # own += share (weight - own); Keras' own operators take three times as long to trace.
        own, weight = own.value, weight.value
        own.assign_sub(share * (own - weight))


def copy(network):
    """A second network of the same shape and weights, which no gradient reaches."""
    copy = type(network).from_config(network.get_config())
    copy.set_weights(network.get_weights())
    copy.trainable = False
    return copy
