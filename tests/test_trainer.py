"""A step does what the formula says, on one replica and on two, and nothing else changes the weights."""

import functools
import math
from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import averages
from diffusion.schedule import Process
from generate import Painter, noise_of, to_images
from input_pipeline import (
    Augmentation,
    Latents,
    latent_batches,
    picture_batches,
    picture_validation_batches,
    validation_batches,
)
from metrics import KID, kid, psnr
from model.discriminator import PatchDiscriminator
from model.vae import AutoencoderKL
from optimizers import adamw, is_matrix, muon
from tests.batches import IMAGE_SIZE, LATENT_SHAPE, distance, rates, tensors
from tests.light_vae import LightVAE
from trainer import Adversary, LatentDiffusionTrainer, VAETrainer, reconstruct

STEPS, BATCH = 4, 8


EMA = 0.3  # so small that the warm-up (1 + step) / (10 + step) passes it within the few steps


CLIP_NORM = 0.05


REAL = np.random.default_rng(0).integers(0, 256, (7, IMAGE_SIZE, IMAGE_SIZE, 3)).astype("uint8")


def arrays(variables):
    return [np.asarray(variable) for variable in variables]


def largest_difference(one, other):
    """Of two lists of arrays, relative to the largest value of each."""
    assert len(one) == len(other) > 0
    return max(np.abs(a - b).max() / (np.abs(a).max() or 1) for a, b in zip(one, other, strict=True))


class Colours:
    """Features without a network: mean colours of a grid of fields."""

    def __call__(self, images, progress=False):
        fields = images.reshape(len(images), 4, IMAGE_SIZE // 4, 4, IMAGE_SIZE // 4, 3)
        return fields.mean(axis=(2, 4)).reshape(len(images), -1) / 255.0


class Watch(keras.callbacks.Callback):
    """Keeps what a training showed to its callbacks."""

    def on_train_begin(self, logs=None):
        self.raw, self.logs = [self._weights()], []

    def on_train_batch_end(self, batch, logs=None):
        self.raw.append(self._weights())

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))

    def _weights(self):
        return arrays(self.model.trained_variables)


class Trained(NamedTuple):
    trainer: keras.Model
    averaged_before: list
    watch: Watch
    history: dict
    validation: tf.data.Dataset


def latents(n=13):
    rng = np.random.default_rng(5)
    shape = (n, 2, *LATENT_SHAPE)
    return Latents(rng.normal(size=shape).astype("float32"), rng.normal(-3, 1, shape).astype("float32"))


def captions(n=13):
    tokens = np.random.default_rng(6).integers(1, 9, (n, 2, 7)).astype("int32")
    tokens[:, :, 4:] = 10
    return list(tokens)


def two_epochs(trainer, training, validation):
    """Trains and returns what can be seen of it."""
    watch = Watch()
    history = trainer.fit(
        training,
        steps_per_epoch=STEPS // 2,
        epochs=2,
        validation_data=validation,
        callbacks=[watch],
        shuffle=False,
        verbose=0,
    ).history
    return Trained(trainer, [], watch, history, validation)


def fit_diffusion(strategy, light_networks, micro_batches, optimizer=adamw):
    """Two epochs of the diffusion trainer; the gradient is never clipped, so that its scale shows in the optimizer."""
    with strategy.scope():
        networks = light_networks(1)
        settings = {"kid": KID(Colours()), "kid_images": REAL, "kid_tokens": np.concatenate(captions())[:6]}
        settings |= {"micro_batches": micro_batches, "power_averages": True}
        trainer = LatentDiffusionTrainer(
            networks, IMAGE_SIZE, EMA, draw={"steps": 2, "guidance": 2.0}, draw_batch=4, **settings
        )
        settings = {"learning_rate": 0.01, "weight_decay": 0.1, "clip_norm": 0}
        trainer.compile(optimizer(trainer.trained_variables, **settings))
    averaged = arrays(trainer.ema_unet.weights + trainer.ema_text_encoder.weights)
    data = (latents(), captions(), networks.vocabulary)
    stream = {"batch_size": BATCH, "seed": 3}
    validation = validation_batches(*data, batch_size=4, seed=3, ids=range(5))
    training = latent_batches(*data, **stream, caption_dropout=0.3, times=tf.identity)
    return two_epochs(trainer, training, validation)._replace(averaged_before=averaged)


KEPT_VAE_LOSSES = {"recon_loss": "mse", "kl_weight": 1e-2, "perceptual": distance, "perceptual_weight": 0.1}


def fit_vae(strategy, _, micro_batches):
    """Two epochs of the autoencoder's trainer; every gradient is clipped."""
    keras.utils.set_random_seed(2)
    with strategy.scope():
        trainer = VAETrainer(LightVAE(), **KEPT_VAE_LOSSES, micro_batches=micro_batches)
        optimizer = adamw(
            trainer.trained_variables, learning_rate=0.01, weight_decay=0.1, clip_norm=CLIP_NORM
        )
        trainer.compile(optimizer)
    return vae_epochs(trainer)


def fit_adversarial(strategy, _, micro_batches):
    """The same against a discriminator that begins with the second step, with all its penalties and an average."""
    keras.utils.set_random_seed(2)
    with strategy.scope():
        shape = {"blocks": (0, 0), "latent_channels": 2, "groups": 2, "attention": False}
        penalties = {"r1_weight": 0.1, "lecam_weight": 0.3}
        adversary = Adversary(PatchDiscriminator(4, 1, groups=2), weight=0.7, start=1, **penalties)
        trainer = VAETrainer(
            AutoencoderKL((4, 4), **shape),
            **KEPT_VAE_LOSSES,
            kl_schedule="linear",
            kl_warmup_steps=3,
            adversary=adversary,
            ema=EMA,
            micro_batches=micro_batches,
        )
        step = {"learning_rate": 0.01, "weight_decay": 0.1, "clip_norm": CLIP_NORM}
        own = adamw(trainer.trained_variables, **step)
        trainer.compile(own, adamw(adversary.discriminator.trainable_variables, **step, name="disc_adamw"))
    return vae_epochs(trainer)


def vae_epochs(trainer):
    pictures = np.random.default_rng(0).integers(0, 256, (13, IMAGE_SIZE, IMAGE_SIZE, 3)).astype("uint8")
    stream = {"image_size": IMAGE_SIZE, "seed": 3, "latent_shape": LATENT_SHAPE}
    validation = picture_validation_batches(pictures[:5], batch_size=4, **stream)
    training = picture_batches(pictures, batch_size=BATCH, augmentation=Augmentation(), **stream)
    return two_epochs(trainer, training, validation)


class CountingTrainer(VAETrainer):
    """Counts how often Python goes through the losses of training and of validation."""

    def sample_losses(self, batch, training):
        self.counts[training] += 1
        return super().sample_losses(batch, training)


def test_a_step_is_traced_once_and_does_what_it_does_eagerly():
    pixels = np.random.default_rng(0).uniform(-1, 1, (4, IMAGE_SIZE, IMAGE_SIZE, 3)).astype("float32")
    batch = {"pixels": pixels, "posterior_noise": np.zeros((4, *LATENT_SHAPE), "float32")}
    batches = tf.data.Dataset.from_tensors({**batch, "weight": np.ones(4, "float32")}).repeat(6)
    ends = {}
    for run_eagerly in (False, True):
        keras.utils.set_random_seed(2)
        trainer = CountingTrainer(LightVAE(), "mse", 1e-2, micro_batches=1)
        trainer.counts = {False: 0, True: 0}
        optimizer = adamw(trainer.trained_variables, learning_rate=0.01, weight_decay=0.1, clip_norm=1.0)
        for _ in range(2):  # a new `compile` makes new functions
            trainer.compile(optimizer, run_eagerly=run_eagerly)
            trainer.fit(
                batches,
                steps_per_epoch=3,
                epochs=2,
                validation_data=batches.take(2),
                shuffle=False,
                verbose=0,
            )
        ends[run_eagerly] = arrays(trainer.trained_variables)
        # Eagerly each validation batch goes in two parts, see `parallel.joined`.
        assert trainer.counts == ({True: 12, False: 16} if run_eagerly else {True: 2, False: 2})
    for compiled, eager in zip(*ends.values(), strict=True):
        np.testing.assert_allclose(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def often():
    """Power averages are updated within the few steps of these trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(averages, "EVERY", 2)
        yield


@pytest.fixture(scope="module")
def trained(two_replicas, light_networks, often):
    """A function (kind, replicas, micro_batches) -> Trained; each is trained once."""
    strategies, done = {1: tf.distribute.get_strategy(), 2: two_replicas}, {}
    by_muon = functools.partial(fit_diffusion, optimizer=muon)
    fits = {
        "diffusion": fit_diffusion,
        "diffusion by muon": by_muon,
        "vae": fit_vae,
        "adversarial": fit_adversarial,
    }

    def get(kind, replicas=1, micro_batches=1):
        key = kind, replicas, micro_batches
        if key not in done:
            done[key] = fits[kind](strategies[replicas], light_networks, micro_batches)
        return done[key]

    return get


each_kind = pytest.mark.parametrize("kind", ["diffusion", "diffusion by muon", "vae", "adversarial"])


# Of a deeper network: before a normalisation biases have no gradient but rounding, and Adam makes it large.
ROUNDING = {"adversarial": 1e-4}


each_number = pytest.mark.parametrize("replicas", [1, 2])


def state_beside_weights(trainer):
    """The variables of the optimizers and of all else that a checkpoint keeps."""
    kept = {name: part for name, part in trainer.kept_variables.items() if name not in trainer.networks}
    return [variable for part in kept.values() for _, variable in part]


def assert_same_training(one, two, rounding=1e-5):
    """Weights, moments and logs of two trainings agree up to rounding."""
    for name, network in one.trainer.networks.items():
        other = two.trainer.networks[name]
        assert largest_difference(arrays(network.weights), arrays(other.weights)) < rounding
    # The optimizers' steps hide the gradient's scale; their moments show it.
    slots = [arrays(state_beside_weights(run.trainer)) for run in (one, two)]
    assert largest_difference(*slots) < 100 * rounding
    assert one.history.keys() == two.history.keys()
    for name, values in one.history.items():
        assert two.history[name] == pytest.approx(values, rel=1e-4), name


@each_kind
def test_two_replicas_do_what_one_does(trained, kind):
    assert_same_training(trained(kind, 1), trained(kind, 2), ROUNDING.get(kind, 1e-5))


@each_kind
@pytest.mark.parametrize(("replicas", "micro_batches"), [(1, None), (1, 4), (2, 2)])
def test_micro_batches_do_what_the_whole_batch_does(trained, kind, replicas, micro_batches):
    assert_same_training(trained(kind), trained(kind, replicas, micro_batches), ROUNDING.get(kind, 1e-5))


def test_muon_has_matrices_and_others_to_move(trained):
    trainer = trained("diffusion by muon").trainer
    assert trainer.optimizer.name == "muon"
    assert {is_matrix(variable) for variable in trainer.trained_variables} == {True, False}


@each_kind
def test_training_moves_every_weight(trained, kind):
    watch = trained(kind).watch
    assert len(watch.raw) == STEPS + 1
    assert all((first != last).any() for first, last in zip(watch.raw[0], watch.raw[-1], strict=True))


@each_kind
def test_all_replicas_hold_the_same_numbers(trained, kind):
    trainer = trained(kind, 2).trainer
    variables = [variable for network in trainer.networks.values() for variable in network.weights]
    for variable in variables + state_beside_weights(trainer):
        first, second = (np.asarray(value) for value in variable.value.values)
        np.testing.assert_array_equal(first, second, err_msg=variable.path)


def test_the_networks_draw_nothing_themselves(toy_networks):
    # A seed generator inside a network would give every replica the same numbers, and none of them to a resumed run.
    networks = toy_networks()
    for network in (networks.vae, networks.text_encoder, networks.unet):
        assert len(network.variables) == len(network.weights), network.name


def test_replicas_see_different_noise(toy_networks):
    vocabulary = toy_networks(1).vocabulary
    same = Latents(*(np.repeat(part[:1], 8, axis=0) for part in latents()))
    text = [captions()[0][:1]] * 8
    batch = next(
        iter(
            latent_batches(same, text, vocabulary, batch_size=8, seed=0, caption_dropout=0, times=tf.identity)
        )
    )  # one picture, eight times
    for name in ("noise", "latents", "diffusion_times"):
        rows = np.asarray(batch[name]).reshape(8, -1)
        assert len(np.unique(rows, axis=0)) == 8, name


@each_number
def test_the_average_follows_its_recurrence(trained, replicas):
    run = trained("diffusion", replicas)
    expected = [value.astype("float64") for value in run.averaged_before]
    for step, raw in enumerate(run.watch.raw[1:], start=1):
        decay = min(EMA, (1 + step) / (10 + step))
        expected = [
            decay * average + (1 - decay) * value for average, value in zip(expected, raw, strict=True)
        ]
    averaged = arrays(run.trainer.ema_unet.weights + run.trainer.ema_text_encoder.weights)
    assert largest_difference(expected, averaged) < 1e-6


@each_number
def test_power_averages_follow_their_recurrence(trained, replicas):
    run = trained("diffusion", replicas)
    kept = dict(run.trainer.power_averages.variables)
    for length in averages.LENGTHS:
        expected = [np.zeros(value.shape) for value in run.watch.raw[0]]
        for step in (2, 4):
            decay = (1 - 2 / step) ** (averages.exponent(length) + 1)
            expected = [
                decay * old + (1 - decay) * new
                for old, new in zip(expected, run.watch.raw[step], strict=True)
            ]
        received = [
            np.asarray(kept[f"{length}/{name}/{weight.path}"])
            for name, network in run.trainer.averaged_networks.items()
            for weight in network.weights
        ]
        assert largest_difference(expected, received) < 1e-6
        assert largest_difference(run.watch.raw[4], received) > 1e-6


def test_two_replicas_keep_the_power_averages_of_one(trained):
    one, two = (dict(trained("diffusion", n).trainer.power_averages.variables) for n in (1, 2))
    assert one.keys() == two.keys()
    assert largest_difference(arrays(one.values()), arrays(two.values())) < 1e-5


@each_number
def test_the_raw_weights_are_not_the_average_after_fit(trained, replicas):
    run = trained("diffusion", replicas)
    raw = arrays(run.trainer.unet.weights + run.trainer.text_encoder.weights)
    for value, last in zip(raw, run.watch.raw[-1], strict=True):
        np.testing.assert_array_equal(value, last)
    averaged = arrays(run.trainer.ema_unet.weights + run.trainer.ema_text_encoder.weights)
    assert largest_difference(raw, averaged) > 1e-3


@each_kind
@each_number
def test_validation_is_the_mean_over_the_real_pictures(trained, kind, replicas):
    # 5 samples in batches of 4: the last batch holds 3 rows, and on two replicas a whole share, of mere filling.
    run = trained(kind, replicas)
    batches = list(run.validation.as_numpy_iterator())
    assert [batch["weight"].tolist() for batch in batches] == [[1, 1, 1, 1], [1, 0, 0, 0]]
    real = {name: np.concatenate([batch[name] for batch in batches])[:5] for name in batches[0]}
    for name, losses in run.trainer.sample_losses(tensors(real), training=False).items():
        assert run.history[f"val_{name}"][-1] == pytest.approx(float(np.mean(losses)), rel=1e-4, abs=1e-7)


def test_reconstruction_does_not_depend_on_the_batch(toy_networks):
    vae = toy_networks().vae
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)).astype("uint8")
    rebuilt = reconstruct(vae, images, batch_size=2)
    pixels = vae.decode(vae.encode(images.astype("float32") / 127.5 - 1)[0])
    by_hand = np.clip(np.asarray(pixels) * 127.5 + 127.5, 0, 255)
    assert rebuilt.dtype == np.uint8
    assert np.abs(rebuilt - by_hand).max() <= 0.51  # rounding
    assert psnr(rebuilt, reconstruct(vae, images)).value > 45


@pytest.mark.parametrize("name", ["flow", "edm"])
def test_a_picture_starts_and_ends_by_the_rates_of_its_process(toy_networks, name):
    networks, asked = toy_networks(target=name, schedule=name), []
    painter = Painter(networks, IMAGE_SIZE)

    class Asked:
        predicting_variables = networks.unet.predicting_variables
        project_text = networks.unet.project_text

        def predict_from(self, *inputs):
            asked.append(inputs)
            return networks.unet.predict_from(*inputs)

    painter.networks = networks._replace(unet=Asked())
    # Not traced, so that what is asked can be read.
    painter._ask = lambda unet, x, t, *rest: painter._predict(unet, x, tf.reshape(t, [1]), *rest)
    seeds = np.array([3])
    by_steps = {"on_step": lambda *step: None, "steps": 1, "guidance": 1}
    drawn = list(painter.draw(captions()[0][:1], seeds, **by_steps))
    # The network is first asked about pure noise, of unit variance also for EDM, whose noise rate there is 80.
    noise, deviation = np.asarray(noise_of(seeds, LATENT_SHAPE)), math.sqrt(80**2 + 1)
    np.testing.assert_allclose(asked[0][0], noise * (80 / deviation if name == "edm" else 1), rtol=1e-4)
    (prediction,) = (np.asarray(networks.unet.predict_from(*inputs)) for inputs in asked)
    # At time 1 flow's e - x_0 is solved by x = e; EDM's F by c_skip x + c_out F.
    edm = 80 * noise / deviation**2 + 80 / deviation * prediction
    by_hand = to_images(networks.vae.decode(noise - prediction if name == "flow" else edm))
    np.testing.assert_allclose(np.asarray(drawn, int), np.asarray(by_hand, int), atol=1)


def test_the_schedule_is_the_cosine_by_angles(trained):
    noise_rates, signal_rates = trained("diffusion").trainer.diffusion_schedule(
        np.array([0.0, 0.5, 1.0], "f4")
    )
    n, s = rates(np.array([0.0, 0.5, 1.0]))
    assert noise_rates.shape == signal_rates.shape == (3, 1, 1, 1)
    np.testing.assert_allclose(noise_rates, n, rtol=1e-5)
    np.testing.assert_allclose(signal_rates, s, rtol=1e-4)
    assert np.ravel(signal_rates)[[0, -1]] == pytest.approx([0.95, 0.02], rel=1e-4)


@each_number
def test_kid_of_validation_reaches_logs_history_and_callbacks(trained, replicas):
    run = trained("diffusion", replicas)
    assert [logs["val_kid"] for logs in run.watch.logs] == run.history["val_kid"]
    metric, tokens = run.trainer.kid_metric, run.trainer.kid_tokens
    drawn = Colours()(run.trainer.generate_images(tokens))
    expected = kid(Colours()(REAL), drawn)
    assert run.history["val_kid"][-1] == pytest.approx(expected.value, rel=1e-6)
    assert metric.estimate() == pytest.approx(expected, rel=1e-6)


def test_kid_is_left_out_where_it_is_not_due(trained):
    run = trained("diffusion")
    run.trainer.kid_due = False
    try:
        assert run.trainer.evaluate(run.validation, return_dict=True, verbose=0).keys() == {"loss"}
        losses = run.trainer.evaluate(run.validation, verbose=0)
        assert losses == pytest.approx([run.history["val_loss"][-1]], rel=1e-6)
    finally:
        run.trainer.kid_due = True


def test_pictures_come_from_the_averaged_networks_and_always_the_same(trained):
    run = trained("diffusion")
    tokens = captions()[0]
    images = run.trainer.generate_images(tokens)
    assert images.dtype == np.uint8
    assert images.shape == (2, IMAGE_SIZE, IMAGE_SIZE, 3)
    np.testing.assert_array_equal(images, run.trainer.generate_images(tokens, seeds=[0, 1]))
    assert (images != run.trainer.generate_images(tokens, seeds=[2, 3])).any()
    assert (images != run.trainer.generate_images(tokens, steps=3)).any()
    networks = run.trainer.painter.networks
    assert networks.unet is run.trainer.ema_unet
    assert networks.text_encoder is run.trainer.ema_text_encoder
    process = Process("velocity", max_signal_rate=0.95, min_signal_rate=0.02)
    again = Painter(networks._replace(process=process), IMAGE_SIZE, batch_size=1)
    settings = {"steps": 2, "guidance": 2.0}
    np.testing.assert_allclose(images, np.stack(list(again.draw(tokens, [0, 1], **settings))), atol=1)


def test_plot_images_writes_the_pictures_as_a_grid(trained, tmp_path):
    trainer, tokens = trained("diffusion").trainer, captions()[0]
    trainer.plot_images(tokens, tmp_path / "a.png")
    trainer.plot_images(tokens, tmp_path / "b.png", captions=["one", "two"])
    sheet, other = (np.asarray(Image.open(tmp_path / name), "int16") for name in ("a.png", "b.png"))
    for index, image in enumerate(trainer.generate_images(tokens)):
        left = 8 + index * 136
        shown = np.asarray(Image.fromarray(image).resize((128, 128), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(sheet[8:136, left : left + 128], shown)
        np.testing.assert_array_equal(other[8:136, left : left + 128], shown)
    assert (sheet != other).any()  # the texts differ
