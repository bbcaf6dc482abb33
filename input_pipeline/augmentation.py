"""Random changes of training pictures: resize and crop, flip, brightness, contrast. Stateless, float32."""

import math
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from errors import InputError
from input_pipeline.randomness import keys

N_DRAWS = 6  # uniform numbers a picture needs: resize, crop y, crop x, flip, brightness, contrast


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes; the default changes nothing.

    Attributes:
        resize_min: Smallest side before the random crop, as a factor of the image size, at least 1.
        resize_max: Largest such side; 1 means no crop.
        flip: Mirror every other picture, left to right.
        brightness: Largest shift, as a fraction of the range from black to white.
        contrast: Largest relative change of the distance from the picture's mean.

    Raises:
        InputError: a range is outside what is said above.
    """

    resize_min: float = 1.0
    resize_max: float = 1.0
    flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0

    def __post_init__(self):
        if not 1 <= self.resize_min <= self.resize_max:
            raise InputError(
                f"expected 1 <= resize_min <= resize_max, received {self.resize_min}, {self.resize_max}"
            )
        if not (0 <= self.brightness <= 1 and 0 <= self.contrast <= 1):
            raise InputError(
                f"expected 0 to 1, received brightness {self.brightness}, contrast {self.contrast}"
            )

    @property
    def resizes(self):
        """Whether pictures are resized and cropped at random."""
        return self.resize_max > 1

    def picture_side(self, image_size):
        """Side in pixels at which pictures should be stored, so that no crop is enlarged."""
        return math.ceil(image_size * self.resize_max)


def augment(pixels, image_size, key, augmentation):
    """Change one picture at random, as its key says. What is switched off is not computed.

    Args:
        pixels: float32 (S, S, 3), -1..1.
        image_size: Side of the result.
        key: int (2,), a stateless key.
        augmentation: An `Augmentation`.

    Returns:
        float32 (image_size, image_size, 3), -1..1.
    """
    draws = tf.random.stateless_uniform([1, N_DRAWS], key)
    return _augmented(pixels[None], image_size, draws, augmentation)[0]


def augment_batch(pixels, image_size, key, augmentation):
    """`augment` for each picture b with key `keys(key, range(B))[b]`, in one go where sizes allow it.

    Args:
        pixels: float32 (B, S, S, 3), -1..1.
        image_size, key, augmentation: As for `augment`.

    Returns:
        float32 (B, image_size, image_size, 3).
    """
    if augmentation == Augmentation():
        return fit(pixels, image_size)
    draws = tf.map_fn(
        lambda own: tf.random.stateless_uniform([1, N_DRAWS], own),
        keys(key, tf.range(tf.shape(pixels)[0])),
        fn_output_signature=tf.TensorSpec([1, N_DRAWS], tf.float32),
    )  # (B, 1, N_DRAWS)
    if not augmentation.resizes:
        return _augmented(pixels, image_size, draws[:, 0], augmentation)
    return tf.map_fn(
        lambda one: _augmented(one[0][None], image_size, one[1], augmentation)[0],
        (pixels, draws),
        fn_output_signature=tf.TensorSpec([image_size, image_size, 3], tf.float32),
    )


def to_pixels(images):
    """images uint8 (B, H, W, 3) -> pixels float32 -1..1."""
    return tf.cast(images, tf.float32) / 127.5 - 1


def resized(images, image_size):
    """Pictures at the size that the networks see, whole and unchanged otherwise.

    Args:
        images: uint8 (N, S, S, 3).
        image_size: Side of the result.

    Returns:
        uint8 (N, image_size, image_size, 3), an array; antialiased and rounded when the size differs.
    """
    if images.shape[1] == image_size:
        return np.asarray(images)
    pixels = fit(tf.cast(images, tf.float32), image_size)
    return np.asarray(tf.cast(tf.clip_by_value(tf.round(pixels), 0, 255), tf.uint8))


def fit(pixels, image_size):
    """Pictures (B, S, S, 3) resized to (B, image_size, image_size, 3), antialiased; untouched when they fit."""
    if pixels.shape[1] == image_size and pixels.shape[2] == image_size:
        return pixels
    return tf.image.resize(pixels, [image_size, image_size], antialias=True)


def _augmented(pixels, image_size, draws, augmentation):
    """Pictures (B, S, S, 3) by draws (B, N_DRAWS); a random resize gives one size to all, so there B is 1."""
    resize, crop_y, crop_x, flip, brightness, contrast = tf.unstack(draws[:, :, None, None, None], axis=1)
    if augmentation.resizes:
        pixels = _random_crop(
            pixels, image_size, tf.squeeze(resize), tf.squeeze(crop_y), tf.squeeze(crop_x), augmentation
        )
    else:
        pixels = fit(pixels, image_size)
    if augmentation.flip:
        mirrored = tf.cast(flip < 0.5, tf.float32)  # a product with 1 and 0 is exact, and faster than `where`
        pixels = mirrored * tf.reverse(pixels, axis=[2]) + (1 - mirrored) * pixels
    if augmentation.contrast:
        mean = tf.reduce_mean(pixels, axis=[1, 2, 3], keepdims=True)
        pixels = mean + (pixels - mean) * (1 + augmentation.contrast * (2 * contrast - 1))
    if augmentation.brightness:
        pixels += 2 * augmentation.brightness * (2 * brightness - 1)  # the range -1..1 is 2 wide
    if augmentation.contrast or augmentation.brightness:
        pixels = tf.clip_by_value(pixels, -1, 1)
    return pixels


def _random_crop(pixels, image_size, resize, crop_y, crop_x, augmentation):
    """Resize to a side between the two factors, then cut the image size out of it at a random place."""
    factor = augmentation.resize_min + resize * (augmentation.resize_max - augmentation.resize_min)
    side = tf.cast(tf.round(image_size * factor), tf.int32)
    pixels = tf.image.resize(pixels, tf.stack([side, side]), antialias=True)
    n_places = tf.cast(side - image_size + 1, tf.float32)
    top, left = (tf.cast(tf.floor(place * n_places), tf.int32) for place in (crop_y, crop_x))
    return tf.image.crop_to_bounding_box(pixels, top, left, image_size, image_size)
