"""Tracked numbers are those of the step's own tensors, and the first NaN is found where it is."""

import json
import math
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from errors import InputError
from optimizers import adamw
from tests.batches import IMAGE_SIZE, LATENT_SHAPE, distance, tensors
from tests.light_vae import LightVAE
from tracking import TRACKED, Measurer, Tracker, first_nonfinite, read_tracked
from trainer import LatentDiffusionTrainer, VAETrainer

BATCH = 4


def batch_of(step):
    rng = np.random.default_rng(step)
    pixels = rng.uniform(-1, 1, (BATCH, IMAGE_SIZE, IMAGE_SIZE, 3)).astype("float32")
    noise = rng.normal(size=(BATCH, *LATENT_SHAPE)).astype("float32")
    return tensors({"pixels": pixels, "posterior_noise": noise})


def vae_trainer(toy_networks, kind=VAETrainer):
    trainer = kind(toy_networks().vae, "mse", kl_weight=1e-2, perceptual=distance, perceptual_weight=0.1)
    trainer.compile(adamw(trainer.trained_variables, learning_rate=0.01, weight_decay=0.1, clip_norm=1.0))
    return trainer


@pytest.fixture
def trainer(toy_networks):
    return vae_trainer(toy_networks)


def by_hand(array):
    array = np.asarray(array, "float64")
    return {"norm": math.sqrt((array**2).sum()), "mean": array.mean(), "largest": np.abs(array).max()}


def assert_same(measured, expected, rel=1e-4):
    """Of two dicts by name of dicts of statistics, in one order."""
    assert list(measured) == list(expected)
    for name, numbers in expected.items():
        scale = numbers["largest"]  # a mean may be the small rest of large numbers
        assert measured[name] == pytest.approx(numbers, rel=rel, abs=rel * scale), name


def test_activations_are_what_the_layers_give_in_order(trainer):
    batch, vae = batch_of(0), trainer.vae
    expected, x = {}, batch["pixels"]
    for network in (vae.encoder, vae.decoder):
        layers = [layer for layer in network.layers if not isinstance(layer, keras.layers.InputLayer)]
        outputs = keras.Model(network.inputs, [*(layer.output for layer in layers), network.output])(x)
        expected |= {f"vae/{layer.name}": by_hand(y) for layer, y in zip(layers, outputs[:-1], strict=True)}
        mean, logvar = np.split(np.asarray(outputs[-1]), 2, axis=-1) if network is vae.encoder else (0, 0)
        x = mean + np.exp(0.5 * logvar) * batch["posterior_noise"] if network is vae.encoder else x
    measurer = Measurer(trainer)
    measured = measurer(batch)
    assert {"vae/encoder.conv_in", "vae/quant_conv", "vae/decoder.mid_block.resnets.0"} <= expected.keys()
    assert_same(measured["activations"], expected)
    assert measurer.not_run == []
    assert_same(measured["batch"], {name: by_hand(value) for name, value in batch.items()})
    losses = trainer.sample_losses(batch, training=True)
    assert_same(measured["losses"], {name: by_hand(value) for name, value in losses.items()})


def test_weights_and_gradients_are_those_of_the_step(trainer):
    batch = batch_of(0)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(trainer.sample_losses(batch, training=True)["loss"])
    gradients = tape.gradient(loss, trainer.trained_variables)
    names = [f"vae/{variable.path}" for variable in trainer.trained_variables]
    measured = Measurer(trainer)(batch)
    own = [by_hand(variable) for variable in trainer.trained_variables]
    assert_same(measured["weights"], dict(zip(names, own, strict=True)))
    assert_same(measured["gradients"], dict(zip(names, map(by_hand, gradients), strict=True)), rel=1e-3)


def test_two_replicas_measure_what_one_does(two_replicas, toy_networks):
    with two_replicas.scope():
        two = vae_trainer(toy_networks)
    one, batch = Measurer(vae_trainer(toy_networks))(batch_of(1)), batch_of(1)
    measured = Measurer(two)(batch)
    assert measured.keys() == one.keys()
    for kind, expected in one.items():
        assert_same(measured[kind], expected, rel=1e-3)


def test_norms_of_numbers_whose_squares_are_zero_or_infinite():
    for size in (1e-30, 1e30):
        values = np.array([3.0, 4.0, 0.0]) * size
        trainer = standing_in({}, losses=lambda batch: {"loss": batch["x"]})
        measured = Measurer(trainer)({"x": tf.constant(values, "float32")})
        assert measured["batch"]["x"] == pytest.approx(by_hand(values), rel=1e-5)
    zero = Measurer(trainer)({"x": tf.zeros(3)})["batch"]["x"]
    assert zero == {"norm": 0, "mean": 0, "largest": 0}


def standing_in(networks, losses, gradients=lambda batch: [tf.zeros(1)]):
    """What a `Measurer` asks of a trainer, and no more."""
    return SimpleNamespace(
        networks=networks,
        trained_variables=[SimpleNamespace(path="alone")],
        sample_losses=lambda batch, training: losses(batch),
        gradients_of=gradients,
        distribute_strategy=tf.distribute.get_strategy(),
    )


@pytest.fixture
def network():
    """A small network with a layer that is used twice and one that is no float's."""
    keras.utils.set_random_seed(3)
    x = keras.Input((3,), name="x")
    twice = keras.layers.Dense(3, name="twice")
    h = twice(keras.layers.Dense(3, name="first")(x))
    places = keras.layers.CategoryEncoding(2, output_mode="one_hot", dtype="int32", name="places")
    h = keras.layers.Dense(2, name="last")(twice(h)) + keras.ops.cast(places(x[:, 0] > 0), "float32")
    return keras.Model(x, h, name="net")


def running(network, **others):
    """A stand-in whose loss is what the network gives, and a gradient the first entry of the batch."""
    networks = {"net": network, **others}
    losses = {"loss": lambda batch: network(batch["x"])[:, 0], "other": lambda batch: batch["other"]}
    trainer = standing_in(networks, lambda batch: {name: loss(batch) for name, loss in losses.items()})
    trainer.trained_variables = network.trainable_variables
    trainer.gradients_of = lambda batch: [
        batch["slope"] * variable for variable in network.trainable_variables
    ]
    return trainer


def good_batch():
    x = tf.constant([[1.0, 2.0, 3.0], [-1.0, 0.5, 0.0]])
    return {
        "x": x,
        "tokens": tf.constant([1, 2]),
        "other": tf.ones(2),
        "slope": tf.ones(2)[:, None][:1] * 2.0,
    }


def test_a_layer_that_runs_twice_is_measured_twice_and_whole_numbers_never(network):
    idle = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    measurer, batch = Measurer(running(network, idle=idle)), good_batch()
    measured = measurer(batch)
    first, twice = network.get_layer("first"), network.get_layer("twice")
    once = twice(first(batch["x"]))
    shown = measured["activations"]
    assert list(shown) == ["net/first", "net/twice", "net/twice (2)", "net/last"]
    assert_same({"net/twice": shown["net/twice"]}, {"net/twice": by_hand(once)})
    assert_same({"net/twice (2)": shown["net/twice (2)"]}, {"net/twice (2)": by_hand(twice(once))})
    assert list(measured["batch"]) == ["x", "other", "slope"]
    assert measurer.not_run == ["idle"]
    assert set(measured["weights"]) == {
        *(f"net/{name}/{part}" for name in ("first", "twice", "last") for part in ("kernel", "bias")),
        *(f"idle/{weight.path}" for weight in idle.weights),
    }


def test_measuring_leaves_the_layers_as_they_were(network):
    before, trainer = [dict(vars(layer)) for layer in network.layers], running(network)
    Measurer(trainer)(good_batch())
    assert [dict(vars(layer)) for layer in network.layers] == before

    def broken(batch):
        network(batch["x"])
        raise RuntimeError("in the losses")

    trainer.sample_losses = lambda batch, training: broken(batch)
    with pytest.raises(RuntimeError, match="in the losses"):
        Measurer(trainer)(good_batch())
    assert [dict(vars(layer)) for layer in network.layers] == before


def test_both_networks_of_a_diffusion_model_are_measured(light_networks):
    trainer = LatentDiffusionTrainer(light_networks(), IMAGE_SIZE)
    rng = np.random.default_rng(0)
    clean, noise = rng.normal(size=(2, BATCH, *LATENT_SHAPE)).astype("float32")
    tokens = np.tile(np.array([1, 2, 3, 10, 10, 10, 10], "int32"), (BATCH, 1))
    times = np.linspace(0.1, 0.9, BATCH, dtype="float32")
    batch = {
        "latents": clean,
        "noise": noise,
        "diffusion_times": times,
        "tokens": tokens,
        "mask": tokens < 10,
    }
    measurer = Measurer(trainer)
    measured = measurer(tensors(batch))
    assert measurer.not_run == ["ema_unet", "ema_text_encoder"]
    ran = list(measured["activations"])
    assert ran[0].startswith("text_encoder/") and ran[-1] == "unet/conv_out"
    assert set(measured["gradients"]) == set(measured["weights"])
    assert len(measured["weights"]) == len(trainer.trained_variables)
    mean_loss = np.mean(trainer.sample_losses(tensors(batch), training=True)["loss"])
    assert measured["losses"]["loss"]["mean"] == pytest.approx(mean_loss, rel=1e-5)


# Where the first NaN is.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_nan_is_named(network, bad):
    def at(entry, place):
        batch = good_batch()
        array = np.array(batch[entry])
        array[place] = bad
        return {**batch, entry: tf.constant(array)}

    trainer, found = running(network), "NaN or Inf appears first in "
    assert first_nonfinite(trainer, good_batch()) is None
    assert first_nonfinite(trainer, at("x", (1, 2))) == found + "the batch's x"
    late, values = network.get_layer("last"), network.get_layer("last").get_weights()
    for number, (weight, value) in enumerate(zip(late.weights, values, strict=True)):
        value = value.copy()
        value.flat[0] = bad
        weight.assign(value)
        path = ("last/kernel", "last/bias")[number]
        whole = f"{found}the output of the layer net/last, whose weights have it already: {path}"
        assert first_nonfinite(trainer, good_batch()) == whole
        late.set_weights(values)
    assert first_nonfinite(trainer, good_batch()) is None


def test_a_layer_that_overflows_of_itself_is_named_alone(network):
    first = network.get_layer("first")
    first.kernel.assign(np.full((3, 3), 3e38))
    found = first_nonfinite(running(network), good_batch())
    assert found == "NaN or Inf appears first in the output of the layer net/first"
    first.kernel.assign(np.eye(3))
    network.get_layer("twice").kernel.assign(1e25 * np.eye(3))
    found = first_nonfinite(running(network), good_batch())
    assert found == "NaN or Inf appears first in the output of the layer net/twice (2)"


def test_losses_come_after_layers_and_gradients_last(network):
    trainer, batch = running(network), good_batch()
    losses = trainer.sample_losses
    trainer.sample_losses = lambda batch, training: (
        losses(batch, training) | {"other": tf.math.log(-batch["other"])}
    )
    assert first_nonfinite(trainer, batch) == "NaN or Inf appears first in the loss other"
    trainer.sample_losses = losses
    kernel = network.get_layer("twice").kernel

    def gradients_of(batch):
        return [
            variable.value * (math.nan if variable is kernel else 1.0)
            for variable in network.trainable_variables
        ]

    trainer.gradients_of = gradients_of
    assert first_nonfinite(trainer, batch) == "NaN or Inf appears first in the gradient of net/twice/kernel"


def test_a_nan_in_an_autoencoder_is_found_by_its_layer(trainer):
    layer = trainer.vae.decoder.get_layer("decoder.mid_block.resnets.1")
    weight = layer.conv1.kernel
    weight.assign(np.where(np.arange(weight.shape[-1]) == 2, np.nan, weight))
    found = first_nonfinite(trainer, batch_of(0))
    assert found.startswith(
        f"NaN or Inf appears first in the output of the layer vae/{layer.name}, whose weights"
    )
    assert found.endswith(f": {weight.path}")


# The callback.


class Steps(keras.callbacks.Callback):
    """Knows the step, as `callbacks.Keeper` does, and keeps the weights before each."""

    def __init__(self, step=0):
        super().__init__()
        self.step, self.weights = step, {}

    def on_train_batch_begin(self, batch, logs=None):
        self.weights[self.step] = self.model.get_weights()

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1


def fitted(folder, steps, start=0, weights=None, tracked=True):
    """A trainer after some steps from `start` on, and its `Steps`."""
    keras.utils.set_random_seed(0)
    trainer, keeper = VAETrainer(LightVAE(), "mse", kl_weight=1e-2, micro_batches=1), Steps(start)
    trainer.compile(adamw(trainer.trained_variables, learning_rate=0.01, weight_decay=0.1, clip_norm=1.0))
    if weights:
        trainer.set_weights(weights)
    batches = [batch_of(step) for step in range(start, start + steps)]
    stacked = {name: tf.stack([batch[name] for batch in batches]) for name in batches[0]}
    tracker = Tracker(batch_of, 2, keeper, folder / "tracked.jsonl", folder / "events")
    trainer.fit(
        tf.data.Dataset.from_tensor_slices(stacked),
        callbacks=[keeper, *([tracker] * tracked)],
        shuffle=False,
        verbose=0,
    )
    return trainer, keeper


def test_the_callback_measures_each_step_before_it_is_made(tmp_path):
    trainer, keeper = fitted(tmp_path, 5)
    rows = read_tracked(tmp_path / "tracked.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[0].keys() == {"step", *TRACKED, "not_run"}
    assert list(rows[0]["activations"]) == ["vae/encoder", "vae/decoder"]
    measurer = Measurer(trainer)
    for row in rows:
        trainer.set_weights(keeper.weights[row["step"]])
        measured = measurer(batch_of(row["step"]))
        for kind in TRACKED:
            assert_same(row[kind], measured[kind], rel=1e-5)
    assert rows[0]["weights"] != rows[1]["weights"]


def test_tracking_changes_nothing(tmp_path):
    ends = [fitted(tmp_path, 5, tracked=tracked)[0].get_weights() for tracked in (True, False)]
    for tracked, alone in zip(*ends, strict=True):
        np.testing.assert_array_equal(tracked, alone)


def scalars(folder):
    """(step, tag) -> number of every scalar that TensorBoard finds in a folder."""
    found = {}
    for file in folder.iterdir():
        for record in tf.data.TFRecordDataset(str(file)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                assert value.metadata.data_class == 1  # a scalar
                assert value.metadata.plugin_data.plugin_name == "scalars"
                found[event.step, value.tag] = float(tf.make_ndarray(value.tensor))
    return found


def test_tensorboard_finds_the_same_numbers(tmp_path):
    fitted(tmp_path, 3)
    expected = {
        (row["step"], f"{kind} {statistic}/{name}"): number
        for row in read_tracked(tmp_path / "tracked.jsonl")
        for kind in TRACKED
        for name, numbers in row[kind].items()
        for statistic, number in numbers.items()
    }
    assert scalars(tmp_path / "events") == pytest.approx(expected, rel=1e-6)
    assert (2, "gradients norm/vae/encoder/kernel") in expected


def test_a_resumed_training_goes_on_with_its_rows(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _, keeper = fitted(whole, 5)
    fitted(cut, 5)
    rows = read_tracked(cut / "tracked.jsonl")
    rows[-1]["weights"] = {}  # of a later step than where it goes on, and so to be measured again
    (cut / "tracked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "w')
    fitted(cut, 2, start=3, weights=keeper.weights[3])
    again, first = (read_tracked(folder / "tracked.jsonl") for folder in (cut, whole))
    assert [row["step"] for row in again] == [0, 2, 4]
    assert again[-1]["weights"].keys() == first[-1]["weights"].keys()


def test_nan_becomes_null(tmp_path):
    weights = fitted(tmp_path / "good", 1)[0].get_weights()
    fitted(tmp_path, 1, weights=[np.full_like(weights[0], np.nan), *weights[1:]])
    (row,) = read_tracked(tmp_path / "tracked.jsonl")
    nothing = dict.fromkeys(("norm", "mean", "largest"))
    assert row["weights"]["vae/encoder/kernel"] == row["activations"]["vae/decoder"] == nothing
    assert None not in row["weights"]["vae/decoder/kernel"].values()
    assert "NaN" not in (tmp_path / "tracked.jsonl").read_text()


def test_a_row_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "tracked.jsonl").write_text("step 3\n")
    with pytest.raises(InputError, match="tracked.jsonl: received a row that is no JSON"):
        read_tracked(tmp_path / "tracked.jsonl")
    assert read_tracked(tmp_path / "absent.jsonl") == []
