"""The autoencoder's losses: their closed forms, identities, the signs of their gradients, and the KL's schedules."""

import math

import numpy as np
import pytest
import tensorflow as tf

from errors import InputError
from model.vae import kl_divergence
from trainer import losses

LN2 = math.log(2.0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def logits(*values):
    """(B, 1, n, 1) of B lists of n."""
    return np.array(values, "float32")[:, None, :, None]


def gradient(function, values):
    values = tf.constant(values)
    with tf.GradientTape() as tape:
        tape.watch(values)
        total = tf.reduce_sum(function(values))
    return tape.gradient(total, values)


# Reconstruction


def test_errors_are_means_of_each_sample():
    pixels = np.zeros((2, 1, 2, 1), "float32")
    rebuilt = np.array([[[[0.5], [-0.5]]], [[[2.0], [0.0]]]], "float32")
    np.testing.assert_allclose(losses.reconstruction("l1", pixels, rebuilt), [0.5, 1.0])
    np.testing.assert_allclose(losses.reconstruction("mse", pixels, rebuilt), [0.25, 2.0])
    np.testing.assert_allclose(losses.reconstruction("mix", pixels, rebuilt), [0.375, 1.5])
    np.testing.assert_allclose(losses.reconstruction("mix", pixels, rebuilt, 0.2), [0.3, 1.8], rtol=1e-6)


def test_a_mix_of_one_kind_is_that_kind():
    pixels, rebuilt = normal(3, 4, 5, 3), normal(3, 4, 5, 3, seed=1)
    for share, kind in ((1.0, "l1"), (0.0, "mse")):
        mixed = losses.reconstruction("mix", pixels, rebuilt, share)
        np.testing.assert_allclose(mixed, losses.reconstruction(kind, pixels, rebuilt), rtol=1e-6)


@pytest.mark.parametrize("kind", losses.ERRORS)
def test_less_error_is_less_loss(kind):
    pixels, error = normal(2, 3, 3, 3), normal(2, 3, 3, 3, seed=1)
    slope = gradient(lambda rebuilt: losses.reconstruction(kind, pixels, rebuilt), pixels + error)
    np.testing.assert_array_equal(np.sign(slope), np.sign(error))


# KL


def factors(schedule, steps, warmup=100, cycles=4):
    return [float(losses.kl_factor(schedule, step, warmup, cycles)) for step in steps]


def test_schedules_at_their_marks():
    quarters = (0, 25, 50, 75, 100, 1000)
    np.testing.assert_allclose(factors("constant", quarters), np.ones(6))
    np.testing.assert_allclose(factors("linear", quarters), [0, 0.25, 0.5, 0.75, 1, 1])
    root = math.sqrt(0.5)
    expected = [0, (1 - root) / 2, 0.5, (1 + root) / 2, 1, 1]
    np.testing.assert_allclose(factors("cosine", quarters), expected, atol=1e-6)
    marks = (0, 5, 10, 15, 20, 24, 25, 30, 80, 99, 100, 101, 125)
    expected = (0, 0.4, 0.8, 1, 1, 1, 0, 0.4, 0.4, 1, 1, 1, 1)  # cycles of 25 steps, which rise over 12.5
    np.testing.assert_allclose(factors("cyclical", marks), expected, atol=1e-6)


@pytest.mark.parametrize("cycles", [1, 3, 7])
def test_cycles_begin_where_they_should_at_any_length(cycles):
    length = 1001
    values = np.array(factors("cyclical", range(0, cycles * length + 2, 7), cycles * length, cycles))
    places = np.arange(0, cycles * length + 2, 7)
    expected = np.where(places < cycles * length, np.minimum(2 * (places % length) / length, 1), 1)
    np.testing.assert_allclose(values, expected, atol=2e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_warm_ups_rise_steadily_from_0_to_1(schedule):
    values = factors(schedule, range(0, 121))
    assert values[0] == 0 and values[100] == values[120] == 1
    assert np.all(np.diff(values[:101]) > 0)


@pytest.mark.parametrize("schedule", losses.KL_SCHEDULES)
def test_no_warm_up_is_full_weight(schedule):
    assert factors(schedule, (0, 1, 10), warmup=0) == [1, 1, 1]


@pytest.mark.parametrize("schedule", losses.KL_SCHEDULES)
def test_a_step_within_a_graph_is_a_number(schedule):
    compiled = tf.function(lambda step: losses.kl_factor(schedule, step, 40, 3))
    steps = (0, 7, 13, 14, 27, 39, 40, 90)
    counted = tf.Variable(0, dtype="int64")
    for step, expected in zip(steps, factors(schedule, steps, 40, 3)):
        counted.assign(step)
        assert float(compiled(counted)) == pytest.approx(expected, abs=1e-6)


def test_kl_of_known_gaussians():
    mean = np.zeros((1, 2, 2, 3), "float32") + np.array([0, 2, 0], "float32")
    logvar = np.zeros((1, 2, 2, 3), "float32") + np.array([0, 0, 1], "float32")
    np.testing.assert_allclose(losses.kl_by_channel(mean, logvar), [[0, 2, (math.e - 2) / 2]], rtol=1e-6)


def test_kl_by_channel_is_the_autoencoders_kl():
    mean, logvar = normal(3, 2, 5, 4), normal(3, 2, 5, 4, seed=1)
    by_channel = losses.kl_by_channel(mean, logvar)
    assert by_channel.shape == (3, 4)
    whole = np.mean(kl_divergence(mean, logvar), axis=(1, 2, 3))
    np.testing.assert_allclose(np.mean(by_channel, -1), whole, rtol=1e-5)
    np.testing.assert_allclose(losses.free_bits(by_channel, 0.0), whole, rtol=1e-5)


def test_free_bits_spare_the_channels_below():
    kl = np.array([[0.1, 0.4], [0.0, 0.2]], "float32")
    np.testing.assert_allclose(losses.free_bits(kl, 0.25), [0.325, 0.25])
    slope = gradient(lambda values: losses.free_bits(values, 0.25), kl)
    np.testing.assert_allclose(slope, [[0, 0.5], [0, 0]])


# Adversarial

REAL, FAKE = logits([2.0, 0.0], [0.5, -0.5]), logits([-2.0, 0.0], [3.0, 1.0])


def entropy(x):
    """-log of the sigmoid, by its definition."""
    return -math.log(1 / (1 + math.exp(-x)))


@pytest.mark.parametrize(
    ("kind", "generator", "discriminator"),
    [
        ("hinge", [1, -2], [0.5 * (0.5 + 0.5), 0.5 * (1 + 3)]),
        (
            "vanilla",
            [1, -2],
            [
                (entropy(2) + LN2 + entropy(2) + LN2) / 4,
                (entropy(0.5) + entropy(-0.5) + entropy(-3) + entropy(-1)) / 4,
            ],
        ),
        (
            "non-saturating",
            [(entropy(-2) + LN2) / 2, (entropy(3) + entropy(1)) / 2],
            [
                (entropy(2) + LN2 + entropy(2) + LN2) / 2,
                (entropy(0.5) + entropy(-0.5) + entropy(-3) + entropy(-1)) / 2,
            ],
        ),
    ],
)
def test_adversarial_losses_by_hand(kind, generator, discriminator):
    np.testing.assert_allclose(losses.generator_loss(kind, FAKE), generator, rtol=1e-5)
    np.testing.assert_allclose(losses.discriminator_loss(kind, REAL, FAKE), discriminator, rtol=1e-5)


@pytest.mark.parametrize("kind", losses.ADVERSARIAL)
def test_the_two_pull_apart(kind):
    """The generator raises its logits; the discriminator lowers them and raises those of real pictures."""
    fake, real = normal(2, 3, 3, 1) / 2, normal(2, 3, 3, 1, seed=1) / 2
    assert np.all(gradient(lambda x: losses.generator_loss(kind, x), fake) < 0)
    assert np.all(gradient(lambda x: losses.discriminator_loss(kind, real, x), np.clip(fake, -0.9, 9)) > 0)
    assert np.all(gradient(lambda x: losses.discriminator_loss(kind, x, fake), np.clip(real, -9, 0.9)) < 0)


def test_the_hinge_lets_go_of_what_is_told_apart():
    slope = gradient(lambda x: losses.discriminator_loss("hinge", x, -x), logits([1.5, 7.0]))
    np.testing.assert_array_equal(slope, np.zeros((1, 1, 2, 1)))


@pytest.mark.parametrize("kind", ["vanilla", "non-saturating"])
def test_entropies_hold_at_any_logit(kind):
    far = logits([-1e4, 1e4])
    assert np.isfinite(losses.discriminator_loss(kind, far, far)).all()
    assert np.isfinite(gradient(lambda x: losses.generator_loss(kind, x), far)).all()


def test_the_adaptive_weight_makes_the_gradients_alike():
    assert float(losses.adaptive_weight(3.0, 1.5)) == pytest.approx(2.0, rel=1e-4)
    assert float(losses.adaptive_weight(3.0, 0.0)) == 1e4
    assert float(losses.adaptive_weight(1e-2, 0.0)) == pytest.approx(100)  # the 1e-4 below
    assert float(losses.adaptive_weight(3.0, 1.5, limit=0.5)) == 0.5
    assert float(losses.adaptive_weight(0.0, 1.5)) == 0.0
    assert gradient(lambda norms: losses.adaptive_weight(norms[0], norms[1]), [3.0, 1.5]) is None


def test_lecam_is_the_distance_from_the_others_average():
    real, fake = np.array([1.0, 0.0], "float32"), np.array([-1.0, 3.0], "float32")
    np.testing.assert_allclose(losses.lecam(real, fake, 0.5, -0.25), [1.25**2 + 1.5**2, 0.25**2 + 2.5**2])
    np.testing.assert_allclose(gradient(lambda x: losses.lecam(x, fake, 0.5, -0.25), real), [2.5, 0.5])
    np.testing.assert_allclose(gradient(lambda x: losses.lecam(real, x, 0.5, -0.25), fake), [-3.0, 5.0])
    assert gradient(lambda x: losses.lecam(real, fake, x[0], x[1]), [0.5, -0.25]) is None


def test_the_running_average_is_geometric():
    average, values = 0.5, normal(20)
    for value in values:
        average = losses.lecam_average(average, value, decay=0.9)
    weights = 0.1 * 0.9 ** np.arange(19, -1, -1)
    assert float(average) == pytest.approx(float(0.5 * 0.9**20 + weights @ values), rel=1e-5)
    assert float(losses.lecam_average(1.0, 0.0)) == pytest.approx(0.99)
    assert gradient(lambda mean: losses.lecam_average(0.0, mean), 1.0) is None


def test_r1_of_a_linear_discriminator_is_the_norm_of_its_weights():
    weights = normal(3, 4, 3)
    slope = gradient(lambda pixels: tf.reduce_sum(pixels * weights, axis=(1, 2, 3)), normal(2, 3, 4, 3))
    np.testing.assert_allclose(losses.r1(slope), np.full(2, np.sum(weights**2)), rtol=1e-5)


def test_the_gap_is_the_difference_of_means():
    np.testing.assert_allclose(losses.logit_gap(REAL, FAKE), [2.0, -2.0])
    np.testing.assert_array_equal(losses.logit_gap(FAKE, FAKE), [0.0, 0.0])


# All of them

IMAGES, MOMENTS, LOGITS, MEANS = (2, 4, 5, 3), (2, 3, 2, 4), (2, 3, 3, 1), (2,)
EACH_SAMPLE = {
    "l1": (lambda a, b: losses.reconstruction("l1", a, b), IMAGES),
    "mse": (lambda a, b: losses.reconstruction("mse", a, b), IMAGES),
    "mix": (lambda a, b: losses.reconstruction("mix", a, b), IMAGES),
    "kl": (losses.kl_by_channel, MOMENTS),
    "free bits": (lambda a, b: losses.free_bits(losses.kl_by_channel(a, b), 0.9), MOMENTS),
    **{
        f"{kind} generator": (lambda a, b, kind=kind: losses.generator_loss(kind, b), LOGITS)
        for kind in losses.ADVERSARIAL
    },
    **{
        f"{kind} discriminator": (lambda a, b, kind=kind: losses.discriminator_loss(kind, a, b), LOGITS)
        for kind in losses.ADVERSARIAL
    },
    "lecam": (lambda a, b: losses.lecam(a, b, 0.3, -0.2), MEANS),
    "r1": (lambda a, b: losses.r1(a), IMAGES),
    "gap": (losses.logit_gap, LOGITS),
}


@pytest.mark.parametrize("name", EACH_SAMPLE)
def test_samples_do_not_mix_and_a_graph_gives_the_same(name):
    function, shape = EACH_SAMPLE[name]
    pair = normal(*shape), normal(*shape, seed=1)
    whole = function(*pair)
    assert whole.shape[0] == 2 and whole.dtype == "float32"
    alone = [function(*(values[index : index + 1] for values in pair)) for index in range(2)]
    np.testing.assert_allclose(whole, np.concatenate(alone), rtol=1e-6)
    compiled = tf.function(function, input_signature=[tf.TensorSpec((None, *shape[1:]))] * 2)
    np.testing.assert_allclose(compiled(*pair), whole, rtol=1e-6)


@pytest.mark.parametrize("name", EACH_SAMPLE)
def test_half_precision_comes_out_as_float32(name):
    """Squares of logits and sums over pixels leave the range of half precision."""
    function, shape = EACH_SAMPLE[name]
    pair = [(8 * normal(*shape, seed=seed)).astype("float16") for seed in range(2)]
    halves, floats = function(*pair), function(*(values.astype("float32") for values in pair))
    assert halves.dtype == "float32"
    np.testing.assert_array_equal(halves, floats)


@pytest.mark.parametrize(
    ("call", "known"),
    [
        (lambda: losses.reconstruction("l2", REAL, FAKE), "l1, mse, mix"),
        (lambda: losses.kl_factor("l2", 1, 2, 3), "constant, linear, cosine, cyclical"),
        (lambda: losses.generator_loss("l2", FAKE), "hinge, vanilla, non-saturating"),
        (lambda: losses.discriminator_loss("l2", REAL, FAKE), "hinge, vanilla, non-saturating"),
    ],
)
def test_unknown_names_are_refused(call, known):
    with pytest.raises(InputError, match=f"one of {known}. Received: 'l2'"):
        call()


@pytest.mark.parametrize(("warmup", "cycles"), [(-1, 4), (10, 0)])
def test_a_schedule_without_length_is_refused(warmup, cycles):
    with pytest.raises(InputError, match=f"Received: warmup_steps={warmup}, cycles={cycles}"):
        losses.kl_factor("cyclical", 0, warmup, cycles)
