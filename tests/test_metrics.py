"""KID against its definition, its closed form and its own interval; protocols; PSNR and SSIM."""

import itertools
import json
import math

import keras
import numpy as np
import pytest

import metrics
from metrics import KID, Estimate, Protocol, kid, kid_difference, kid_floor, psnr, ssim


def kernel(a, b):
    return (float(np.dot(a, b)) / len(a) + 1) ** 3


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def definition(real, generated):
    """Gretton et al. 2012, eq. 3, pair by pair."""
    within_real = mean(kernel(a, b) for a, b in itertools.permutations(real, 2))
    within_generated = mean(kernel(a, b) for a, b in itertools.permutations(generated, 2))
    return (
        within_real + within_generated - 2 * mean(kernel(a, b) for a, b in itertools.product(real, generated))
    )


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_kid_is_its_definition(rng):
    real, generated = rng.normal(size=(6, 4)), rng.normal(0.5, size=(9, 4))
    assert kid(real, generated).value == pytest.approx(definition(real, generated), rel=1e-12)


def test_the_interval_is_the_delete_one_jackknife(rng):
    real, generated = rng.normal(size=(5, 3)), rng.normal(0.5, size=(8, 3))

    def variance(estimates):
        return (len(estimates) - 1) / len(estimates) * np.square(estimates - np.mean(estimates)).sum()

    without_real = [definition(np.delete(real, i, 0), generated) for i in range(5)]
    without_generated = [definition(real, np.delete(generated, i, 0)) for i in range(8)]
    error = math.sqrt(variance(without_real) + variance(without_generated))
    value, low, high = kid(real, generated)
    assert value - low == pytest.approx(1.959964 * error, rel=1e-9)
    assert high - value == pytest.approx(1.959964 * error, rel=1e-9)


def test_blocks_change_nothing(rng):
    real, generated = rng.normal(size=(23, 4)), rng.normal(size=(17, 4))
    assert kid(real, generated, block=5) == pytest.approx(kid(real, generated), rel=1e-12)


def test_real_and_generated_are_alike_to_it(rng):
    real, generated = rng.normal(size=(12, 4)), rng.normal(0.3, size=(15, 4))
    assert kid(real, generated) == pytest.approx(kid(generated, real), rel=1e-12)


# Features with finitely many values: then the true MMD^2 is (p - q) K (p - q), exactly.
VALUES = np.array([[0.0, 1.0, -1.0], [2.0, 0.0, 0.5], [-1.0, 1.5, 1.0], [0.5, -0.5, 2.0]])
REAL_WEIGHTS = np.array([0.4, 0.3, 0.2, 0.1])
OTHER_WEIGHTS = np.array([0.2, 0.2, 0.2, 0.4])


def draws(rng, weights, n):
    return VALUES[rng.choice(len(VALUES), n, p=weights)]


def true_kid(p, q):
    table = np.array([[kernel(a, b) for b in VALUES] for a in VALUES])
    return (p - q) @ table @ (p - q)


@pytest.mark.parametrize("weights", [REAL_WEIGHTS, OTHER_WEIGHTS], ids=["equal", "unlike"])
@pytest.mark.parametrize("n, m", [(40, 40), (120, 60)])
def test_it_is_unbiased_and_its_interval_covers_the_truth(rng, weights, n, m):
    truth = true_kid(REAL_WEIGHTS, weights)
    estimates = np.array([kid(draws(rng, REAL_WEIGHTS, n), draws(rng, weights, m)) for _ in range(400)])
    value, low, high = estimates.T
    assert abs(value.mean() - truth) < 4 * value.std() / math.sqrt(len(value))
    covered = np.mean((low <= truth) & (truth <= high))
    assert 0.88 <= covered <= 0.99


def test_a_difference_is_that_of_two_kids_with_the_jackknife_of_pairs(rng):
    real, one = rng.normal(size=(9, 4)), rng.normal(0.3, 1, (7, 4))
    other = one + rng.normal(0, 0.1, (7, 4))
    received = kid_difference(real, one, other)

    def difference(real, one, other):
        return definition(real, one) - definition(real, other)

    def variance(values):
        return (len(values) - 1) / len(values) * np.square(np.array(values) - np.mean(values)).sum()

    without_real = [difference(np.delete(real, i, 0), one, other) for i in range(9)]
    pairs = [difference(real, np.delete(one, i, 0), np.delete(other, i, 0)) for i in range(7)]
    error = 1.959964 * math.sqrt(variance(without_real) + variance(pairs))
    value = difference(real, one, other)
    np.testing.assert_allclose(received, [value, value - error, value + error], rtol=1e-6)
    apart = [kid(real, features) for features in (one, other)]
    assert received.high - received.low < min(each.high - each.low for each in apart)


def test_a_difference_of_what_is_no_pair_is_refused(rng):
    real, one = rng.normal(size=(9, 4)), rng.normal(size=(7, 4))
    for other in (one[:6], one[:, :3]):
        with pytest.raises(ValueError, match="expected one dimension, and pairs"):
            kid_difference(real, one, other)
    one[0, 0] = np.nan
    assert math.isnan(kid_difference(real, one, one).value)


def test_the_floor_is_that_of_two_disjoint_parts(rng, monkeypatch):
    parts = []
    monkeypatch.setattr(metrics, "kid", lambda a, b, block: parts.append((a[:, 0], b[:, 0])))
    real = np.arange(11.0)[:, None]
    for n in (None, 3, 100):
        kid_floor(real, n=n, seed=4)
    assert [len(a) for a, _ in parts] == [len(b) for _, b in parts] == [5, 3, 5]
    assert all(len({*a, *b}) == 2 * len(a) for a, b in parts)


def test_the_floor_is_about_zero_whatever_the_seed(rng):
    real = rng.normal(size=(200, 8))
    floors = np.array([kid_floor(real, seed=seed) for seed in range(40)])
    assert abs(floors[:, 0].mean()) < 4 * floors[:, 0].std() / math.sqrt(40)
    assert np.mean((floors[:, 1] <= 0) & (floors[:, 2] >= 0)) >= 0.88


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_give_nan(rng, bad):
    real, generated = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    generated[2, 1] = bad
    assert all(math.isnan(number) for number in kid(real, generated))


@pytest.mark.parametrize("shapes", [((2, 3), (5, 3)), ((5, 3), (2, 3)), ((5, 3), (5, 4)), ((5,), (5,))])
def test_features_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="features: received"):
        kid(np.zeros(shapes[0]), np.zeros(shapes[1]))


def corner_means(images):
    """A feature network that needs no weights: channel means of the two halves, (B, 6)."""
    halves = np.split(images.astype("float32") / 255, 2, axis=1)
    return np.concatenate([half.mean(axis=(1, 2)) for half in halves], axis=1)


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)


def test_the_metric_gathers_batches_into_one_estimate(images):
    metric = KID(corner_means)
    assert isinstance(metric, keras.metrics.Metric) and metric.name == "kid"
    assert math.isnan(metric.result())
    metric.update_state(images[:4], images[10:17])
    metric.update_state(images[4:10], images[17:])
    expected = kid(corner_means(images[:10]), corner_means(images[10:]))
    assert metric.estimate() == pytest.approx(expected, rel=1e-6)
    assert metric.result() == metric.estimate().value
    metric.reset_state()
    assert math.isnan(metric.result())


def test_real_features_given_once_outlive_the_epochs(images):
    metric = KID(corner_means)
    metric.set_real(corner_means(images[:10]))
    for _ in range(2):
        metric.reset_state()
        metric.update_state(None, images[10:])
        assert metric.estimate() == pytest.approx(
            kid(corner_means(images[:10]), corner_means(images[10:])), rel=1e-6
        )
    assert metric.floor(seed=2) == kid_floor(corner_means(images[:10]), seed=2)


def test_the_metric_wants_real_pictures_from_one_place(images):
    metric = KID(corner_means)
    with pytest.raises(ValueError, match="not both or neither"):
        metric.update_state(None, images)
    metric.set_real(corner_means(images))
    with pytest.raises(ValueError, match="not both or neither"):
        metric.update_state(images, images)
    with pytest.raises(ValueError, match="sample_weight"):
        metric.update_state(None, images, sample_weight=np.ones(20))


@pytest.fixture
def protocol():
    return Protocol(
        network="efficientnet_lite0",
        weights="5793",
        resize="antialiased bilinear",
        size=224,
        n_real=512,
        n_generated=256,
        sampler="heun",
        spacing="karras",
        steps=20,
        guidance=2.5,
        guidance_from=0.3,
        guidance_to=0.7,
        autoguidance=2.0,
        weak=0.25,
        ema=True,
        seed=0,
    )


def test_a_protocol_survives_json(protocol):
    assert Protocol(**json.loads(json.dumps(protocol.to_dict()))) == protocol


def test_psnr_of_a_constant_difference_is_its_closed_form():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    grey = black + np.array([10, 20], np.uint8)[:, None, None, None]
    first, second = 20 * math.log10(25.5), 20 * math.log10(12.75)
    value, low, high = psnr(black, grey)
    assert value == pytest.approx((first + second) / 2)
    # Two values: the standard error of their mean is half their distance.
    assert high - value == pytest.approx(1.959964 * (first - second) / 2, rel=1e-6)
    assert psnr(grey, black) == (value, low, high)


def test_psnr_without_difference_or_without_spread():
    image = np.full((1, 4, 4, 3), 7, np.uint8)
    assert psnr(image, image).value == math.inf
    assert psnr(image, image + np.uint8(1)) == Estimate(
        pytest.approx(20 * math.log10(255)), -math.inf, math.inf
    )


def test_ssim_of_constant_pictures_is_its_closed_form():
    """Without variance only the luminance's term is left."""
    values = [(10, 10), (10, 200), (0, 255)]
    one, other = (np.array(side, np.uint8)[:, None, None, None] for side in zip(*values))
    picture = np.ones((3, 12, 14, 3), np.uint8)
    c1 = 2.55**2
    expected = [(2.0 * a * b + c1) / (a * a + b * b + c1) for a, b in values]
    received = ssim(picture * one, picture * other)
    assert received.value == pytest.approx(np.mean(expected), rel=1e-9)
    error = np.std(expected, ddof=1) / math.sqrt(3)
    assert received.high - received.value == pytest.approx(1.959964 * error, rel=1e-9)


def ssim_window_by_window(a, b):
    """The definition for one channel (H, W): every 11x11 window, weighed by a two-dimensional Gaussian."""
    y, x = np.mgrid[-5:6, -5:6]
    weights = np.exp(-(x**2 + y**2) / (2 * 1.5**2)).ravel()
    weights = weights / weights.sum()
    values = []
    for i, j in itertools.product(range(a.shape[0] - 10), range(a.shape[1] - 10)):
        p, q = (side[i : i + 11, j : j + 11].ravel().astype(float) for side in (a, b))
        mean_p, mean_q = weights @ p, weights @ q
        var_p, var_q = weights @ (p - mean_p) ** 2, weights @ (q - mean_q) ** 2
        covariance = weights @ ((p - mean_p) * (q - mean_q))
        luminance = (2 * mean_p * mean_q + 6.5025) / (mean_p**2 + mean_q**2 + 6.5025)
        values.append(luminance * (2 * covariance + 58.5225) / (var_p + var_q + 58.5225))
    return np.mean(values)


def test_ssim_is_its_definition(rng):
    one = rng.integers(0, 256, (2, 13, 15, 3), dtype=np.uint8)
    other = np.clip(one + rng.normal(0, 40, one.shape), 0, 255).astype(np.uint8)
    pictures = [
        np.mean([ssim_window_by_window(a[..., channel], b[..., channel]) for channel in range(3)])
        for a, b in zip(one, other)
    ]
    value, low, high = ssim(one, other)
    assert value == pytest.approx(np.mean(pictures), rel=1e-9)
    assert high - low == pytest.approx(1.959964 * abs(pictures[0] - pictures[1]), rel=1e-6)
    assert ssim(other, one) == pytest.approx((value, low, high), rel=1e-12)


def test_ssim_falls_from_1_with_the_difference(rng):
    picture = rng.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    noise = rng.normal(size=picture.shape)
    noisy = [np.clip(picture + size * noise, 0, 255).astype(np.uint8) for size in (0, 10, 30, 90)]
    values = [ssim(picture, other).value for other in noisy]
    assert values[0] == pytest.approx(1, abs=1e-12)
    assert values == sorted(values, reverse=True)
    assert ssim(picture, 255 - picture).value < -0.9


@pytest.mark.parametrize("size", [(10, 16), (16, 10)])
def test_ssim_refuses_pictures_smaller_than_its_window(size):
    picture = np.zeros((1, *size, 3), np.uint8)
    with pytest.raises(
        ValueError, match=r"ssim: received pictures of shape \(1, 1., 1., 3\), expected 11x11"
    ):
        ssim(picture, picture)


@pytest.mark.parametrize("measure", [psnr, ssim])
@pytest.mark.parametrize(
    "other",
    [
        np.zeros((1, 12, 12, 3), "float32"),
        np.zeros((1, 12, 13, 3), np.uint8),
        np.zeros((2, 12, 12, 3), np.uint8),
    ],
)
def test_pictures_that_do_not_fit_are_refused(measure, other):
    with pytest.raises(ValueError, match=f"{measure.__name__}: received .*, expected equal shapes of uint8"):
        measure(np.zeros((1, 12, 12, 3), np.uint8), other)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_no_picture_is_refused(measure):
    with pytest.raises(ValueError, match="a picture at least"):
        measure(np.zeros((0, 12, 12, 3), np.uint8), np.zeros((0, 12, 12, 3), np.uint8))
