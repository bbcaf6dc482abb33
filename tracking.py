"""What a step makes of a batch, layer by layer: activations, weights, gradients, and where NaN first appears."""

import collections
import contextlib
import json
import math
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from errors import InputError
from files import atomic_file

STATISTICS = ("norm", "mean", "largest")  # of a tensor: L2 norm, mean, largest absolute value
TRACKED = ("activations", "weights", "gradients")
PLACES = {  # in order of the computation, as `first_nonfinite` names them
    "batch": "the batch's {}",
    "activations": "the output of the layer {}",
    "losses": "the loss {}",
    "gradients": "the gradient of {}",
}


class Tracker(keras.callbacks.Callback):
    """Measures the networks every so many steps, before the step and with its batch, and writes what it finds.

    A row of `rows` is a JSON object: `step`, the steps done before; for each of `TRACKED` a dict by name of dicts of
    `STATISTICS`, null where any value of the tensor is NaN or Inf; and `not_run`, the networks that the losses do not
    run. TensorBoard finds the same numbers among its scalars, as "gradients norm/vae/encoder.conv_in/kernel". Measuring
    changes nothing: it draws no random number and assigns no variable.

    Args:
        batch_of: function of the step -> the batch that it trains with, a dict of tensors (B, ...).
        every: steps between two measurements, the first of which comes before the first step.
        keeper: what knows the `step`, such as `callbacks.Keeper`.
        rows: the JSONL file; rows from the keeper's step on are dropped where training begins there again.
        events: the folder of TensorBoard's files.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, batch_of, every, keeper, rows, events):
        super().__init__()
        self.batch_of, self.every, self.keeper = batch_of, every, keeper
        self.rows, self.events = Path(rows), Path(events)
        self._measurer = self._writer = None

    def on_train_begin(self, logs=None):
        self._measurer = self._measurer or Measurer(self.model)
        kept = [row for row in read_tracked(self.rows) if row["step"] < self.keeper.step]
        with atomic_file(self.rows) as file:
            file.writelines(map(_line, kept))
        self._writer = tf.summary.create_file_writer(str(self.events))

    def on_train_batch_begin(self, batch, logs=None):
        step = self.keeper.step
        if step % self.every == 0:
            measured = self._measurer(self.batch_of(step))
            self._write({"step": step, **{kind: measured[kind] for kind in TRACKED}})

    def on_train_end(self, logs=None):
        self._writer.close()

    def _write(self, row):
        with self._writer.as_default(step=row["step"]):
            for kind in TRACKED:
                for name, numbers in row[kind].items():
                    for statistic, number in numbers.items():
                        _scalar(f"{kind} {statistic}/{name}", number)
        self._writer.flush()
        try:
            with self.rows.open("ab") as file:
                file.write(_line({**row, "not_run": self._measurer.not_run}))
        except OSError as error:
            raise InputError(f"{self.rows}: cannot be written ({error.strerror})") from None


def _scalar(tag, number):
    """Writes a scalar as TensorBoard reads it; `tf.summary.scalar` asks for the package tensorboard."""
    metadata = tf.compat.v1.SummaryMetadata(data_class="DATA_CLASS_SCALAR")
    metadata.plugin_data.plugin_name = "scalars"
    tf.summary.write(tag, tf.constant(number, "float32"), metadata=metadata)


def _line(row):
    return json.dumps(_plain(row)).encode() + b"\n"


def _plain(value):
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_tracked(path):
    """The rows that a `Tracker` has written to `path`, oldest first; none where there is no file.

    A last row that was cut off is left out.

    Raises:
        InputError: a whole row that is no JSON.
    """
    text = Path(path).read_text() if Path(path).exists() else ""
    try:
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except ValueError as error:
        raise InputError(f"{path}: received a row that is no JSON: {error}") from None


def first_nonfinite(trainer, batch):
    """Where NaN or Inf first appears in a step of training on a batch.

    It looks at the batch, the layers' outputs in the order in which they are computed, the losses and the gradients.

    Args:
        trainer: see `Measurer`.
        batch: dict of tensors (B, ...).

    Returns:
        A sentence that names the place, or None where everything is finite.
    """
    measurer = Measurer(trainer)
    measured = measurer(batch)
    for kind, place in PLACES.items():
        for name, numbers in measured[kind].items():
            if not math.isfinite(numbers["largest"]):
                broken = measurer.broken_weights(name) if kind == "activations" else []
                cause = f", whose weights have it already: {', '.join(broken)}" if broken else ""
                return f"NaN or Inf appears first in {place.format(name)}{cause}"
    return None


def first_nonfinite_output(networks, run):
    """The first layer of networks by name whose output has NaN or Inf as `run()` calls them, or None."""
    with _recorded(_layers_by_name(networks)) as calls:
        run()
    outputs = ((name, part) for name, output in _numbered(calls) for part in _floats(output))
    return next((name for name, part in outputs if not np.all(np.isfinite(part))), None)


class Measurer:
    """Measures what a step computes from a batch: one forward pass and one of gradients, in one graph.

    A layer is one of a network's that is no network itself, so a residual block is one. Of a layer that runs more than
    once the later outputs are named "... (2)" and so on.

    Args:
        trainer: a `trainer.Trainer`: its `networks` by name, `trained_variables`, `sample_losses(batch, training)` and
            `gradients_of(batch)`, this replica's share of the gradients.

    Attributes:
        not_run: names of the networks that the losses do not run, after the first measurement.

    Call: batch, a dict of tensors (B, ...), of which every replica takes its part -> dict of "batch", "activations",
    "losses", "weights" and "gradients", each a dict by name, in order of the computation, of dicts of `STATISTICS`.
    All three are NaN where one value is not finite. Norms are over the whole batch.
    """

    def __init__(self, trainer):
        self._trainer, self._strategy = trainer, trainer.distribute_strategy
        self._layers = _layers_by_name(trainer.networks)
        self._weights = _weights_by_name(trainer.networks)
        self._names, self.not_run = {}, None
        self._compiled = tf.function(self._measure, autograph=False)

    def __call__(self, batch):
        per_replica, own, gradients = (
            np.asarray(rows, "float64") for rows in self._compiled(self._shared(batch))
        )
        joined, measured, start = _joined(per_replica), {}, 0
        for kind, names in self._names.items():
            measured[kind] = _by_name(names, joined[start : start + len(names)])
            start += len(names)
        measured["weights"] = _by_name([name for name, _ in self._weights], own)
        measured["gradients"] = _by_name(self._trained_names(), gradients)
        return measured

    def broken_weights(self, name):
        """The paths of the weights that are not finite, of the layer whose output has that name."""
        layers = [layer for own, layer in self._layers if own == name.split(" (")[0]]
        weights = [weight for layer in layers for weight in layer.weights]
        return [weight.path for weight in weights if not np.isfinite(np.asarray(weight)).all()]

    def _trained_names(self):
        names = {id(weight): name for name, weight in self._weights}
        return [names.get(id(variable), variable.path) for variable in self._trainer.trained_variables]

    def _shared(self, batch):
        """The batch as the replicas take it: each its part."""

        def part(context):
            count = len(next(iter(batch.values()))) // context.num_replicas_in_sync
            start = context.replica_id_in_sync_group * count
            return {name: values[start : start + count] for name, values in batch.items()}

        return self._strategy.experimental_distribute_values_from_function(part)

    def _measure(self, batch):
        per_replica, gradients = self._strategy.run(self._on_replica, (batch,))
        gradients = [self._strategy.reduce("SUM", gradient, axis=None) for gradient in gradients]
        own = _statistics([_flat(weight.value) for _, weight in self._weights])
        gathered = self._strategy.gather(per_replica, axis=0)
        return gathered, own, _statistics([_flat(gradient) for gradient in gradients])

    def _on_replica(self, batch):
        with _recorded(self._layers) as calls:
            losses = self._trainer.sample_losses(batch, training=True)
        ran = {name.split("/")[0] for name, _ in calls}
        self.not_run = [name for name in self._trainer.networks if name not in ran]
        groups = {"batch": batch.items(), "activations": _numbered(calls), "losses": losses.items()}
        groups = {kind: [pair for pair in group if _floats(pair[1])] for kind, group in groups.items()}
        self._names = {kind: [name for name, _ in group] for kind, group in groups.items()}
        values = [_flat(value) for group in groups.values() for _, value in group]
        return _statistics(values)[None], self._trainer.gradients_of(batch)


def _layers_by_name(networks):
    """(network/layer, layer) of every layer of networks by name, each layer once."""
    named = [
        (f"{name}/{layer.name}", layer) for name, network in networks.items() for layer in _leaves(network)
    ]
    return list({id(layer): (name, layer) for name, layer in reversed(named)}.values())


def _leaves(network):
    """The layers of a network that are no networks themselves."""
    if isinstance(network, keras.Model):
        return [leaf for layer in network.layers for leaf in _leaves(layer)]
    return [] if isinstance(network, keras.layers.InputLayer) else [network]


def _weights_by_name(networks):
    """(network/path, variable) of every trainable weight of networks by name."""
    return [
        (f"{name}/{weight.path}", weight)
        for name, network in networks.items()
        for weight in network.trainable_variables
    ]


@contextlib.contextmanager
def _recorded(layers):
    """A list to which every call of one of `layers`, pairs of name and layer, adds its name and output.

    An own `call` shadows each layer's meanwhile, so that networks of any make are seen as the losses run them.
    """
    calls = []

    def recording(name, call):
        def recorded(*args, **kwargs):
            calls.append((name, call(*args, **kwargs)))
            return calls[-1][1]

        return recorded

    try:
        for name, layer in layers:
            vars(layer)["call"] = recording(name, layer.call)
        yield calls
    finally:
        for _, layer in layers:
            vars(layer).pop("call", None)


def _numbered(calls):
    """The pairs, with the later ones of one name called "name (2)" and so on."""
    seen = collections.Counter()
    for name, output in calls:
        seen[name] += 1
        yield (name if seen[name] == 1 else f"{name} ({seen[name]})", output)


def _floats(value):
    return [part for part in tf.nest.flatten(value) if part is not None and part.dtype.is_floating]


def _flat(value):
    return tf.concat([tf.reshape(tf.cast(part, "float32"), [-1]) for part in _floats(value)], axis=0)


def _statistics(values):
    """Flat tensors -> their `STATISTICS` (n, 3)."""
    return tf.stack([_statistics_of(x) for x in values])


def _statistics_of(x):
    largest = tf.reduce_max(tf.abs(x))
    # By the largest value, as squares of small gradients are 0 in 32 bits.
    norm = largest * tf.norm(tf.math.divide_no_nan(x, largest))
    found = tf.stack([norm, tf.reduce_mean(x), largest])
    return tf.where(tf.reduce_all(tf.math.is_finite(x)), found, math.nan)


def _joined(per_replica):
    """The statistics (n, 3) of whole tensors from those of their parts, (replicas, n, 3)."""
    norms, means, largest = np.moveaxis(per_replica, -1, 0)
    return np.stack([np.linalg.norm(norms, axis=0), means.mean(axis=0), largest.max(axis=0)], axis=-1)


def _by_name(names, rows):
    return {
        name: dict(zip(STATISTICS, row, strict=True)) for name, row in zip(names, rows.tolist(), strict=True)
    }
