"""Small batches for the tests of the trainers, and what they should come to."""

import math

import numpy as np
import tensorflow as tf

IMAGE_SIZE, LATENT_SHAPE = 16, (8, 8, 2)


def rates(times):
    """(noise rates, signal rates) of the default schedule by its definition: angles linear in the time."""
    angles = math.acos(0.95) + np.reshape(times, (-1, 1, 1, 1)) * (math.acos(0.02) - math.acos(0.95))
    return np.sin(angles), np.cos(angles)


def tensors(batch):
    return {name: tf.convert_to_tensor(value) for name, value in batch.items()}


def distance(pixels, others):
    """A stand-in for the perceptual distance."""
    return tf.reduce_max(tf.square(pixels - others), axis=(1, 2, 3))
