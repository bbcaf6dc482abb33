"""Augmentation: off is the identity, each range is kept, and a picture's changes depend on its key alone."""

import numpy as np
import pytest
import tensorflow as tf

from errors import InputError
from input_pipeline.augmentation import Augmentation, augment, augment_batch, resized, to_pixels
from input_pipeline.randomness import key, keys

EVERYTHING = Augmentation(resize_min=1.05, resize_max=1.4, flip=True, brightness=0.2, contrast=0.3)


@pytest.fixture(scope="module")
def pixels():
    return tf.constant(np.random.default_rng(0).uniform(-1, 1, (6, 12, 12, 3)), tf.float32)


def many(picture, augmentation, image_size=12, n=64):
    return np.stack([augment(picture, image_size, key(0, i, "test"), augmentation) for i in range(n)])


def test_off_is_the_identity(pixels):
    assert (augment(pixels[0], 12, key(0, 0, "test"), Augmentation()).numpy() == pixels[0].numpy()).all()


def test_off_at_another_size_is_the_antialiased_resize(pixels):
    expected = tf.image.resize(pixels[0], [6, 6], antialias=True).numpy()
    assert (augment(pixels[0], 6, key(0, 0, "test"), Augmentation()).numpy() == expected).all()


def test_flip_mirrors_every_other_picture(pixels):
    results = many(pixels[0], Augmentation(flip=True))
    plain = (results == pixels[0].numpy()).all(axis=(1, 2, 3))
    mirrored = (results == pixels[0].numpy()[:, ::-1]).all(axis=(1, 2, 3))
    assert (plain ^ mirrored).all()
    assert 16 <= plain.sum() <= 48  # 4 standard deviations round 32


def test_brightness_shifts_within_its_range():
    shifts = many(tf.zeros([12, 12, 3]), Augmentation(brightness=0.1))
    assert (shifts == shifts[:, :1, :1, :1]).all()
    shifts = shifts[:, 0, 0, 0]
    assert np.abs(shifts).max() <= 0.2 and shifts.min() < -0.15 and shifts.max() > 0.15


def test_contrast_scales_the_distance_from_the_mean(pixels):
    picture = 0.5 * pixels[0]
    mean = picture.numpy().mean()
    factors = (many(picture, Augmentation(contrast=0.2)) - mean) / (picture.numpy() - mean)
    assert np.ptp(factors, axis=(1, 2, 3)).max() < 1e-2
    factors = np.median(factors, axis=(1, 2, 3))
    assert 0.8 <= factors.min() < 0.85 and 1.15 < factors.max() <= 1.2


def test_results_stay_in_range(pixels):
    results = many(pixels[0], Augmentation(brightness=1, contrast=1), n=16)
    assert results.min() == -1 and results.max() == 1


def test_a_crop_shows_a_part_of_the_size_that_was_drawn():
    """On a ramp the slope of a crop tells the factor, and its first value the place."""
    ramp = np.broadcast_to((np.arange(48, dtype=np.float32) / 48)[None, :, None], (48, 48, 3))
    crops = many(tf.constant(ramp), Augmentation(resize_min=1.25, resize_max=2), image_size=24)
    slopes = np.diff(crops[:, 12, 4:-4, 0], axis=1)
    sides = 1 / slopes.mean(axis=1)
    assert np.ptp(slopes, axis=1).max() < 5e-3
    assert 29.5 < sides.min() < 32 and 45 < sides.max() < 48.5  # 24 times 1.25 to 2
    places = crops[:, 12, 12, 0] * sides - 12  # the crop's left edge in pixels of the resized picture
    assert places.min() < 2 and places.max() > 12


def test_a_crop_at_the_pictures_own_size_is_exact(pixels):
    """Twice the image size drawn for certain: no resize, so each crop is a window of the picture."""
    picture = pixels[0].numpy()
    windows = {picture[y : y + 6, x : x + 6].tobytes() for y in range(7) for x in range(7)}
    crops = many(pixels[0], Augmentation(resize_min=2, resize_max=2), image_size=6, n=200)
    found = {crop.tobytes() for crop in crops}
    assert found <= windows and len(found) > 40


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(flip=True), EVERYTHING])
@pytest.mark.parametrize("where", ["eager", "graph", "tf.data"])
def test_batched_is_one_by_one(pixels, augmentation, where):
    parent = key(3, 1, "augmentation")
    expected = [
        augment(one, 12, own, augmentation) for one, own in zip(pixels, keys(parent, range(6)), strict=True)
    ]

    def batch(values):
        return augment_batch(values, 12, parent, augmentation)

    if where == "tf.data":
        received = next(iter(tf.data.Dataset.from_tensors(pixels).map(batch)))
    else:
        received = tf.function(batch)(pixels) if where == "graph" else batch(pixels)
    # a graph folds constants, which rounds differently; a level of 256 is 8e-3
    assert np.abs(received.numpy() - np.stack(expected)).max() < 1e-5


def test_pictures_are_stored_large_enough_for_the_largest_crop():
    assert Augmentation(resize_max=1.15).picture_side(64) == 74
    assert Augmentation().picture_side(64) == 64


@pytest.mark.parametrize(
    "ranges",
    [
        {"resize_min": 0.5},
        {"resize_min": 1.5},
        {"brightness": -0.1},
        {"contrast": 1.5},
        {"resize_max": float("nan")},
    ],
)
def test_refuses_ranges(ranges):
    with pytest.raises(InputError, match="expected"):
        Augmentation(**ranges)


def test_pixels_reach_from_minus_one_to_one():
    assert to_pixels(np.array([0, 51, 255], np.uint8)).numpy() == pytest.approx([-1, -0.6, 1])


def test_resized_averages_and_rounds():
    images = np.zeros((2, 64, 64, 3), np.uint8)
    images[1] = 200
    images[0, :, ::2] = 255  # stripes of single pixels become even grey
    small = resized(images, 16)
    assert small.dtype == np.uint8 and (small[1] == 200).all()
    assert np.abs(small[0, :, 2:-2].astype(int) - 127.5).max() < 3
    assert (resized(images, 64) == images).all()
