"""Every random draw as a pure function of (seed, step, purpose): no generator state to save, nothing to replay."""

import hashlib

import numpy as np
import tensorflow as tf


def key(seed, step, purpose):
    """Key of one stateless draw: other seeds, steps and purposes give independent streams.

    Args:
        seed: Whole number.
        step: Whole number or int64 scalar tensor: a step, an epoch or a sample id.
        purpose: What is drawn, for example "noise".

    Returns:
        int64 (2,) tensor for the `seed` argument of `tf.random.stateless_*`.
    """
    stream = tf.random.experimental.stateless_fold_in((int(seed) % 2**63, 0), _number(purpose))
    return tf.random.experimental.stateless_fold_in(stream, tf.cast(step, tf.int64))


def keys(parent, ids):
    """One key for each id, int64 (B, 2): row b equals `tf.random.experimental.stateless_fold_in(parent, ids[b])`."""
    ids = tf.cast(ids, tf.int64)
    # fold_in draws one number from the parent and sets the id beside it; here for B ids at once
    drawn = tf.random.stateless_uniform([1], parent, minval=None, maxval=None, dtype=tf.int64)
    return tf.stack([tf.repeat(drawn, tf.size(ids)), ids], axis=1)


def _number(purpose):
    """The same 63 bits in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little") >> 1


def sample_order(n, batch_size, step, seed):
    """Sample ids of batch `step` of the infinite stream of shuffled epochs.

    Each epoch is a permutation of the n samples, cut to whole batches. With fewer samples than a batch holds, the
    stream runs through the epochs without a cut, so that a tiny data set trains as well.

    Args:
        n: Number of samples.
        batch_size: Ids in a batch, B.
        step: Whole number or int64 scalar tensor.
        seed: Whole number.

    Returns:
        int64 (B,) tensor.
    """
    used = n if n < batch_size else n // batch_size * batch_size  # samples that an epoch gives
    position = tf.cast(step, tf.int64) * batch_size + tf.range(batch_size, dtype=tf.int64)
    epoch, place = position // used, position % used
    n_epochs = 1 if n >= batch_size else batch_size // n + 2  # that a batch may touch
    orders = tf.stack([_epoch_order(n, epoch[0] + i, seed) for i in range(n_epochs)])
    return tf.gather_nd(orders, tf.stack([epoch - epoch[0], place], axis=1))


def _epoch_order(n, epoch, seed):
    return tf.random.experimental.stateless_shuffle(tf.range(n, dtype=tf.int64), key(seed, epoch, "order"))


def split(n, fraction, seed):
    """Split n samples into training and validation, at random but for ever the same.

    Args:
        n: Number of samples.
        fraction: Share of validation, 0 to 1; at least one sample stays on either side when n >= 2.
        seed: Whole number.

    Returns:
        (train ids, validation ids): sorted int64 arrays, disjoint, together 0 to n - 1.
    """
    n_validation = min(max(1, round(n * fraction)), n - 1)
    order = tf.random.experimental.stateless_shuffle(
        tf.range(n, dtype=tf.int64), key(seed, 0, "split")
    ).numpy()
    return np.sort(order[n_validation:]), np.sort(order[:n_validation])
