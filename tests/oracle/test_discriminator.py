"""The discriminator and the adversarial losses against torch's: a PatchGAN built of torch's layers as the paper says.

First derivatives are compared through the adaptive weight, second ones through R1.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tensorflow as tf  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from benchmarks.torch_networks import patch_discriminator  # noqa: E402
from model.discriminator import PatchConv, PatchDiscriminator  # noqa: E402
from tests.torch_arrays import first, last, normal  # noqa: E402
from trainer import losses  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
CHANNELS, LAYERS, GROUPS = 6, 3, 3

each_norm = pytest.mark.parametrize("norm", ["group", "batch", "none"])
each_spectral = pytest.mark.parametrize("spectral", [False, True])


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).uniform(-1, 1, (3, 40, 47, 3)).astype("float32")


def drawn(norm, spectral):
    """Ours, with weights and statistics far from where they begin."""
    network = PatchDiscriminator(CHANNELS, LAYERS, norm, GROUPS, spectral)
    for index, weight in enumerate(network.weights):
        kind = weight.path.split("/")[-1]
        value = normal(*weight.shape, seed=index)
        if kind == "kernel":
            value = value / np.sqrt(np.prod(weight.shape[:-1]))
        elif kind in ("gamma", "moving_variance"):
            value = 1.0 + 0.3 * np.abs(value)
        elif kind == "u":
            value = value / np.linalg.norm(value)
        weight.assign(value)
    return network


def oracle_of(network, norm, spectral):
    weights = {weight.path: weight.numpy() for weight in network.weights}
    return patch_discriminator(weights, GROUPS, norm, spectral)


def pair(norm, spectral):
    network = drawn(norm, spectral)
    return network, oracle_of(network, norm, spectral)


def convolutions(oracle):
    return [layer for layer in oracle if isinstance(layer, nn.Conv2d)]


# Logits


@each_spectral
@each_norm
def test_logits_are_torchs(norm, spectral, pixels):
    network, oracle = pair(norm, spectral)
    theirs = last(oracle.eval()(first(pixels)))
    assert theirs.shape == (3, 3, 3, 1) and np.std(theirs) > 0.05
    np.testing.assert_allclose(network(pixels), theirs, **CLOSE)


@each_norm
def test_a_training_step_of_spectral_norm_is_torchs(norm, pixels):
    """Torch iterates at each call in training, ours when it is told to."""
    network, oracle = pair(norm, spectral=True)
    for _ in range(3):
        network.update_spectral_norms()
        theirs = last(oracle.train()(first(pixels)))
        np.testing.assert_allclose(network(pixels, training=True), theirs, **CLOSE)
    ours = [layer for layer in network.layers if isinstance(layer, PatchConv)]
    for mine, other in zip(ours, convolutions(oracle), strict=True):
        np.testing.assert_allclose(mine.u, other.parametrizations.weight[0]._u, **CLOSE)


def test_batch_statistics_are_torchs(pixels):
    network, oracle = pair("batch", spectral=False)
    theirs = last(oracle.train()(first(pixels)))
    np.testing.assert_allclose(network(pixels, training=True), theirs, **CLOSE)
    moving = [v.numpy() for v in network.non_trainable_variables]
    norms = [layer for layer in oracle if isinstance(layer, nn.BatchNorm2d)]
    # Torch keeps the unbiased variance, Keras the biased one: they differ by N / (N - 1) of what is new.
    places = [3 * height * width for height, width in ((10, 11), (5, 5), (4, 4))]
    for index, (norm, count) in enumerate(zip(norms, places, strict=True)):
        np.testing.assert_allclose(moving[2 * index], norm.running_mean, **CLOSE)
        start = drawn("batch", False).non_trainable_variables[2 * index + 1].numpy()
        new = (moving[2 * index + 1] - 0.9 * start) * count / (count - 1)
        np.testing.assert_allclose(0.9 * start + new, norm.running_var, **CLOSE)


# Losses


def theirs_of(kind, real, fake):
    """(generator's, discriminator's), means over all, as latent diffusion and Goodfellow et al. have them."""
    if kind == "hinge":
        return -torch.mean(fake), 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    if kind == "vanilla":
        return -torch.mean(fake), 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    entropy = F.binary_cross_entropy_with_logits
    return entropy(fake, ones), entropy(real, ones) + entropy(fake, zeros)


@pytest.mark.parametrize("kind", losses.ADVERSARIAL)
def test_adversarial_losses_are_torchs(kind):
    real, fake = 3 * normal(4, 5, 6, 1), 3 * normal(4, 5, 6, 1, seed=1)
    generator, discriminator = theirs_of(kind, torch.from_numpy(real), torch.from_numpy(fake))
    np.testing.assert_allclose(np.mean(losses.generator_loss(kind, fake)), generator, rtol=1e-5)
    np.testing.assert_allclose(np.mean(losses.discriminator_loss(kind, real, fake)), discriminator, rtol=1e-5)


def test_kl_is_torchs():
    mean, logvar = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1)
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(np.exp(0.5 * logvar))),
        torch.distributions.Normal(torch.zeros(()), torch.ones(())),
    )
    np.testing.assert_allclose(losses.kl_by_channel(mean, logvar), theirs.mean((1, 2)), **CLOSE)


# Gradients

HIDDEN = normal(3, 40, 47, 5, seed=7)  # what a decoder's last layer would see


def their_adaptive_weight(oracle, pixels, kernel, kind):
    weight = torch.from_numpy(np.transpose(kernel, (3, 2, 0, 1)).copy()).requires_grad_()
    rebuilt = F.conv2d(first(HIDDEN), weight, padding=1)
    logits = oracle.eval()(rebuilt)
    adversarial = theirs_of(kind, logits, logits)[0]
    of_error = torch.autograd.grad(torch.abs(first(pixels) - rebuilt).mean(), weight, retain_graph=True)[0]
    of_logits = torch.autograd.grad(adversarial, weight)[0]
    return torch.clamp(torch.norm(of_error) / (torch.norm(of_logits) + 1e-4), 0.0, 1e4)


def our_adaptive_weight(network, pixels, kernel, kind):
    kernel = tf.Variable(kernel)
    with tf.GradientTape(persistent=True) as tape:
        rebuilt = tf.nn.conv2d(HIDDEN, kernel, 1, "SAME")
        error = tf.reduce_mean(losses.reconstruction("l1", pixels, rebuilt))
        adversarial = tf.reduce_mean(losses.generator_loss(kind, network(rebuilt)))
    norms = (tf.norm(tape.gradient(loss, kernel)) for loss in (error, adversarial))
    return losses.adaptive_weight(*norms)


@each_norm
@pytest.mark.parametrize("kind", losses.ADVERSARIAL)
def test_the_adaptive_weight_is_torchs(kind, norm, pixels):
    network, oracle = pair(norm, spectral=False)
    kernel = 0.2 * normal(3, 3, 5, 3, seed=3)
    theirs = float(their_adaptive_weight(oracle, pixels, kernel, kind))
    assert 1e-2 < theirs < 1e3
    assert float(our_adaptive_weight(network, pixels, kernel, kind)) == pytest.approx(theirs, rel=1e-4)


def their_penalty(oracle, pixels):
    """R1 of each picture, and the gradients of its mean by kernels and scales, in the order of the layers."""
    real = first(pixels).requires_grad_()
    (slope,) = torch.autograd.grad(oracle(real).sum(), real, create_graph=True)
    penalty = slope.square().sum((1, 2, 3))
    penalty.mean().backward()
    gradients = []
    for layer in oracle:
        if isinstance(layer, nn.Conv2d):
            kernel = (
                layer.parametrizations.weight.original if hasattr(layer, "parametrizations") else layer.weight
            )
            gradients.append(np.transpose(kernel.grad.numpy(), (2, 3, 1, 0)))
        elif not isinstance(layer, nn.LeakyReLU):
            gradients.append(layer.weight.grad.numpy())
    return penalty.detach(), gradients


def our_penalty(network, pixels, training):
    weights = [weight.value for weight in network.weights if weight.path.endswith(("kernel", "gamma"))]
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            inner.watch(pixels)
            total = tf.reduce_sum(network(pixels, training=training))
        penalty = losses.r1(inner.gradient(total, pixels))
        mean = tf.reduce_mean(penalty)
    return penalty, outer.gradient(mean, weights)


@each_spectral
@pytest.mark.parametrize(
    ("norm", "training", "compiled"),
    [
        ("group", True, False),
        ("group", True, True),
        ("none", True, True),
        ("batch", False, True),
        ("batch", True, True),
    ],
)
def test_r1_and_its_gradients_are_torchs(norm, training, spectral, compiled, pixels):
    network, oracle = pair(norm, spectral)
    oracle.train(training)
    if spectral and training:
        network.update_spectral_norms()  # as torch does at its call
    theirs, their_gradients = their_penalty(oracle, pixels)
    function = tf.function(our_penalty) if compiled else our_penalty
    ours, our_gradients = function(network, tf.constant(pixels), training)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    for mine, other in zip(our_gradients, their_gradients, strict=True):
        size = np.abs(other).max()
        assert size > 1e-3
        np.testing.assert_allclose(mine / size, other / size, **CLOSE)
