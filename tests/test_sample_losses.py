"""The losses of each sample are their formulas, for every target, weight and noise."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from diffusion.targets import uncertain
from tests.batches import IMAGE_SIZE, LATENT_SHAPE, distance, rates, tensors
from trainer import LatentDiffusionTrainer, VAETrainer
from trainer.losses import kl_factor


@pytest.mark.parametrize("recon_loss", ["l1", "mse"])
def test_the_autoencoders_losses_are_their_formulas(toy_networks, recon_loss):
    vae, rng = toy_networks().vae, np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (3, IMAGE_SIZE, IMAGE_SIZE, 3)).astype("float32")
    noise = rng.normal(size=(3, *LATENT_SHAPE)).astype("float32")
    weights = {"recon_weight": 1.5, "kl_weight": 0.3, "perceptual_weight": 0.7}
    trainer = VAETrainer(vae, recon_loss, perceptual=distance, **weights)
    losses = trainer.sample_losses({"pixels": pixels, "posterior_noise": noise}, training=False)
    mean, logvar = np.split(np.asarray(vae.encoder(pixels), "float64"), 2, axis=-1)
    rebuilt = np.asarray(vae.decoder((mean + np.exp(logvar / 2) * noise).astype("float32")))
    error = rebuilt - pixels
    recon = (np.abs(error) if recon_loss == "l1" else error**2).mean((1, 2, 3))
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).mean((1, 2, 3))
    far = (error**2).max((1, 2, 3))
    expected = {"recon_loss": recon, "kl_loss": kl, "perceptual_loss": far}
    expected["loss"] = 1.5 * recon + 0.3 * kl + 0.7 * far
    assert losses.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(losses[name], values, rtol=1e-4, err_msg=name)


def test_without_its_weight_the_perceptual_loss_is_left_out(toy_networks):
    trainer = VAETrainer(toy_networks().vae, perceptual=None)
    batch = {"pixels": np.zeros((1, 16, 16, 3), "float32"), "posterior_noise": np.zeros((1, *LATENT_SHAPE))}
    losses = trainer.sample_losses(batch, training=False)
    assert float(losses["perceptual_loss"][0]) == 0.0
    np.testing.assert_allclose(losses["loss"], losses["recon_loss"] + 1e-4 * losses["kl_loss"], rtol=1e-6)


# (settings of a warm-up of 8 steps, the factor of the KL's weight by how many steps are done)
KL_WARM_UPS = {
    "linear": ({"kl_schedule": "linear"}, {0: 0.0, 4: 0.5, 8: 1.0, 9: 1.0}),
    "cosine": ({"kl_schedule": "cosine"}, {0: 0.0, 2: 0.1464466, 4: 0.5, 8: 1.0}),
    "cyclical": (
        {"kl_schedule": "cyclical", "kl_cycles": 2},
        {0: 0.0, 1: 0.5, 2: 1.0, 4: 0.0, 5: 0.5, 8: 1.0},
    ),
}


@pytest.mark.parametrize("name", KL_WARM_UPS)
def test_the_kl_presses_in_training_as_its_schedule_says_and_channels_have_their_free_bits(
    toy_networks, name
):
    (schedule, factors), rng = KL_WARM_UPS[name], np.random.default_rng(0)
    vae, pixels = toy_networks().vae, rng.uniform(-1, 1, (3, IMAGE_SIZE, IMAGE_SIZE, 3)).astype("float32")
    batch = {"pixels": pixels, "posterior_noise": np.zeros((3, *LATENT_SHAPE), "float32")}
    mean, logvar = np.split(np.asarray(vae.encoder(pixels), "float64"), 2, axis=-1)
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).mean((1, 2))  # of each sample and channel
    free = float(np.median(kl))  # which some are below and some above
    pressure = 0.3 * np.maximum(kl, free).mean(1)
    weights = {"recon_weight": 0.0, "kl_weight": 0.3, "free_bits": free}
    trainer = VAETrainer(vae, **weights, kl_warmup_steps=8, **schedule)
    trainer.compile(keras.optimizers.SGD(1.0))
    for step, factor in factors.items():
        assert float(kl_factor(schedule["kl_schedule"], step, 8, 2)) == pytest.approx(factor, abs=1e-6)
        trainer.optimizer.iterations.assign(step)
        for training, expected in ((True, factor * pressure), (False, pressure)):
            received = trainer.sample_losses(batch, training=training)
            np.testing.assert_allclose(received["loss"], expected, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(received["kl_loss"], kl.mean(1), rtol=1e-4)


def test_an_unknown_reconstruction_loss_is_refused(toy_networks):
    with pytest.raises(ValueError, match="Received: 'l3'"):
        VAETrainer(toy_networks().vae, recon_loss="l3")


def diffusion_batch(times=(0.1, 0.4, 0.9)):
    """A batch of three for the diffusion trainer, without its text's embeddings."""
    clean, noise = np.random.default_rng(0).normal(size=(2, 3, *LATENT_SHAPE)).astype("float32")
    tokens = np.array([[1, 2, 3, 10, 10, 10, 10]] * 3, "int32")
    times = np.array(times, "float32")
    return {"latents": clean, "noise": noise, "diffusion_times": times, "tokens": tokens, "mask": tokens < 10}


@pytest.mark.parametrize("target", ["noise", "image", "velocity"])
def test_the_diffusion_loss_is_its_formula(toy_networks, target):
    trainer = LatentDiffusionTrainer(toy_networks(target=target), IMAGE_SIZE)
    batch = diffusion_batch(times=(0.0, 0.4, 1.0))
    clean, noise, times, tokens = (batch[name] for name in ("latents", "noise", "diffusion_times", "tokens"))
    n, s = rates(times)
    noisy = (s * clean + n * noise).astype("float32")
    mask = tf.constant(tokens < 10)
    context = trainer.text_encoder([tf.constant(tokens), mask])
    prediction = np.asarray(trainer.unet([tf.constant(noisy), tf.constant(times), context, mask]))
    wanted = {"noise": noise, "image": clean, "velocity": s * noise - n * clean}[target]
    expected = ((prediction - wanted) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(
        trainer.sample_losses(tensors(batch), training=False)["loss"], expected, rtol=1e-4
    )
    # A frozen text encoder's embeddings come with the batch and give the same.
    frozen = LatentDiffusionTrainer(toy_networks(target=target), IMAGE_SIZE, train_text_encoder=False)
    del batch["tokens"]
    losses = frozen.sample_losses(tensors({**batch, "context": context}), training=False)
    np.testing.assert_allclose(losses["loss"], expected, rtol=1e-4)
    assert [variable.path for variable in frozen.trained_variables] == [
        variable.path for variable in frozen.unet.trainable_variables
    ]


# (settings, (noise rate, signal rate) of t, the target of (x_0, e, n, s), the weight of (n, s), the error's distance)
PROCESSES = {
    "flow": (
        {"target": "flow", "schedule": "flow", "shift": 3.0},
        lambda t: (t, 1 - t),
        lambda x, e, n, s: e - x,
        lambda n, s: 1,
        np.square,
    ),
    "min-snr": (
        {"target": "noise", "weight": "min-snr", "snr_cap": 2.0},
        rates,
        lambda x, e, n, s: e,
        lambda n, s: np.minimum((s / n) ** 2, 2.0) / (s / n) ** 2,
        np.square,
    ),
    "min-snr of the velocity": (
        {"target": "velocity", "weight": "min-snr"},
        rates,
        lambda x, e, n, s: s * e - n * x,
        lambda n, s: np.minimum((s / n) ** 2, 5.0) / ((s / n) ** 2 + 1),
        np.square,
    ),
    "edm": (  # Karras et al. 2022, table 1, at a deviation of 1
        {"target": "edm", "schedule": "edm", "weight": "edm", "loss": "mae"},
        lambda t: ((0.002 ** (1 / 7) + t * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7, np.ones_like(t)),
        lambda x, e, n, s: (x - (x + n * e) / (n**2 + 1)) * np.sqrt(n**2 + 1) / n,
        lambda n, s: 1,
        np.abs,
    ),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_the_diffusion_loss_is_that_of_the_process(toy_networks, name):
    settings, rates_of, target_of, weight_of, distance_of = PROCESSES[name]
    trainer, batch = LatentDiffusionTrainer(toy_networks(**settings), IMAGE_SIZE), diffusion_batch()
    x, e = batch["latents"].astype("float64"), batch["noise"].astype("float64")
    n, s = rates_of(batch["diffusion_times"].astype("float64").reshape(-1, 1, 1, 1))
    noisy = s * x + n * e
    if settings["target"] == "edm":
        noisy /= np.sqrt(n**2 + 1)  # c_in
    given = tensors(batch)
    context = trainer.text_encoder([given["tokens"], given["mask"]])
    inputs = [tf.constant(noisy.astype("float32")), given["diffusion_times"], context, given["mask"]]
    error = np.asarray(trainer.unet(inputs)) - target_of(x, e, n, s)
    expected = np.mean(weight_of(n, s) * distance_of(error), axis=(1, 2, 3))
    losses = trainer.sample_losses(given, training=False)
    np.testing.assert_allclose(losses["loss"], expected, rtol=1e-4)


def perturbed_batch(**noises):
    """A batch whose further noises are given by their shapes after the first axis."""
    rng = np.random.default_rng(1)
    more = {name: rng.normal(size=(3, *shape)).astype("float32") for name, shape in noises.items()}
    return diffusion_batch() | more


def test_offset_noise_is_diffused_and_predicted(toy_networks):
    networks = toy_networks(target="noise")
    batch = perturbed_batch(offset_noise=(1, 1, 2))
    moved = {**batch, "noise": batch["noise"] + 0.3 * batch["offset_noise"]}
    expected = LatentDiffusionTrainer(networks, IMAGE_SIZE).sample_losses(tensors(moved), training=True)
    trainer = LatentDiffusionTrainer(networks, IMAGE_SIZE, offset_noise=0.3)
    received = trainer.sample_losses(tensors(batch), training=True)
    np.testing.assert_allclose(received["loss"], expected["loss"], rtol=1e-5)


def test_input_perturbation_is_diffused_and_not_predicted(toy_networks):
    networks = toy_networks(target="noise")
    trainer = LatentDiffusionTrainer(networks, IMAGE_SIZE, input_perturbation=0.3)
    batch = perturbed_batch(input_noise=LATENT_SHAPE)
    n, s = rates(batch["diffusion_times"])
    seen = s * batch["latents"] + n * (batch["noise"] + 0.3 * batch["input_noise"])
    given = tensors(batch)
    context = trainer.text_encoder([given["tokens"], given["mask"]])
    inputs = [tf.constant(seen.astype("float32")), given["diffusion_times"], context, given["mask"]]
    expected = np.mean((np.asarray(trainer.unet(inputs)) - batch["noise"]) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(trainer.sample_losses(given, training=True)["loss"], expected, rtol=1e-4)


def test_validation_sees_the_noise_as_it_is(toy_networks):
    networks, batch = toy_networks(), tensors(diffusion_batch())
    trainer = LatentDiffusionTrainer(networks, IMAGE_SIZE, offset_noise=0.3, input_perturbation=0.3)
    expected = LatentDiffusionTrainer(networks, IMAGE_SIZE).sample_losses(batch, training=False)
    received = trainer.sample_losses(batch, training=False)
    np.testing.assert_array_equal(received["loss"], expected["loss"])


def test_the_learned_weight_is_its_formula_in_training_and_one_in_validation(toy_networks):
    batch = tensors(diffusion_batch())
    plain = LatentDiffusionTrainer(toy_networks(weight="edm"), IMAGE_SIZE)
    expected = plain.sample_losses(batch, training=False)["loss"]
    trainer = LatentDiffusionTrainer(toy_networks(weight="uncertainty"), IMAGE_SIZE)
    trainer.log_variance.linear.kernel.assign_add(np.linspace(-0.1, 0.2, 128)[:, None])
    u = np.asarray(trainer.log_variance(batch["diffusion_times"]))
    received = trainer.sample_losses(batch, training=True)["loss"]
    np.testing.assert_allclose(received, expected / np.exp(u) + u, rtol=1e-4)
    np.testing.assert_allclose(trainer.sample_losses(batch, training=False)["loss"], expected, rtol=1e-6)


def test_the_learned_weight_comes_to_the_loss_at_each_time(toy_networks):
    trainer = LatentDiffusionTrainer(toy_networks(weight="uncertainty"), IMAGE_SIZE)
    batch = tensors(diffusion_batch())
    times, losses = batch["diffusion_times"], trainer.sample_losses(batch, training=False)["loss"]
    variables = trainer.log_variance.trainable_variables
    assert {id(variable) for variable in variables} <= {id(other) for other in trainer.trained_variables}
    optimizer = keras.optimizers.Adam(0.02)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = uncertain(losses, trainer.log_variance(times))  # the networks stand still
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        optimizer.apply(gradients, variables)

    for _ in range(400):
        step()
    np.testing.assert_allclose(np.exp(trainer.log_variance(times)), losses, rtol=0.02)
