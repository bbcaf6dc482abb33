"""Infinite `tf.data` of training batches, and the finite, frozen ones of validation.

Each element is a whole global batch, a pure function of (seed, step), drawn before any split over replicas. It carries
its own noise and times, so that a resumed run, or one on more replicas, sees the same numbers.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

import parallel
from errors import InputError
from input_pipeline.augmentation import augment_batch, fit, to_pixels
from input_pipeline.caches import padded_captions
from input_pipeline.randomness import key, keys, sample_order

WORKERS = min(8, parallel.cores())
BATCHES_AHEAD = 4
LARGEST_IN_MEMORY = 2**30  # bytes; larger arrays stay where they are, for example mapped from a file


def picture_batches(
    pictures, *, image_size, batch_size, seed, augmentation, start_step=0, latent_shape=None, ids=None
):
    """Batches of augmented pictures for the autoencoder.

    Args:
        pictures: uint8 (N, S, S, 3).
        image_size: Side of the pixels, H = W.
        batch_size: B.
        seed: Whole number.
        augmentation: An `Augmentation`.
        start_step: Step of the first batch: batch k of the stream is the same wherever it is started.
        latent_shape: (h, w, C), for batches that carry the noise of the posterior.
        ids: The pictures to use, for example of `split`; default all.

    Returns:
        Infinite tf.data.Dataset of dicts: `pixels` float32 (B, H, W, 3), -1..1; `sample_ids` int64 (B,); with
        `latent_shape` also `posterior_noise` float32 (B, h, w, C), standard normal.
    """
    choose = _chooser(len(pictures), ids, batch_size, seed)
    pictures_of = _gatherer(pictures)

    def batch(step):
        sample_ids = choose(step)
        pixels = to_pixels(pictures_of(sample_ids))
        values = {
            "pixels": augment_batch(pixels, image_size, key(seed, step, "augmentation"), augmentation),
            "sample_ids": sample_ids,
        }
        if latent_shape is not None:
            values["posterior_noise"] = _Draws(batch_size, seed, step).normal(latent_shape, "posterior")
        return values

    return _endless(batch, start_step)


def latent_batches(
    latents,
    captions,
    vocabulary,
    *,
    batch_size,
    seed,
    caption_dropout,
    times,
    start_step=0,
    context=None,
    ids=None,
    offset_noise=False,
    input_noise=False,
):
    """Batches for the diffusion model, from cached latents.

    Args:
        latents: `Latents` of N pictures.
        captions: N int32 arrays (n_i, T); each step uses one of a picture's captions.
        vocabulary: The `Vocabulary` of the captions.
        batch_size: B.
        seed: Whole number.
        caption_dropout: Share of captions replaced by the empty text, for classifier-free guidance.
        times: Function from uniform shares of (0, 1), (B,), to diffusion times, such as `diffusion.times` makes.
        start_step: As for `picture_batches`.
        context: `TextContext` of a frozen text encoder, or None.
        ids: The pictures to use; default all.
        offset_noise, input_noise: Whether batches carry `offset_noise` float32 (B, 1, 1, C) and `input_noise` like
            `noise`, both standard normal, for `trainer.LatentDiffusionTrainer`.

    Returns:
        Infinite tf.data.Dataset of dicts: `latents`, of the posterior, and `noise`, float32 (B, h, w, C); `tokens`
        int32 (B, T), or with a context `context` float32 (B, T, D); `mask` bool (B, T); `diffusion_times` float32 (B,),
        in [0, 1], one in each B-th of their distribution; `sample_ids` int64 (B,).
    """
    choose = _chooser(len(latents.mean), ids, batch_size, seed)
    latents_of = _latents_gatherer(latents)
    n_variants, *shape = latents.mean.shape[1:]
    further = {"offset_noise": [1, 1, shape[-1]]} if offset_noise else {}
    further |= {"input_noise": shape} if input_noise else {}
    text_of, n_captions = _text_gatherer(captions, vocabulary, context)

    def batch(step):
        draw = _Draws(batch_size, seed, step)
        sample_ids = choose(step)
        variant = draw.below(n_variants, "variant")
        caption = draw.below(tf.gather(n_captions, sample_ids), "caption")
        dropped = draw.uniform("caption dropout") < caption_dropout
        return {
            **{name: draw.normal(own, name.replace("_", " ")) for name, own in further.items()},
            "latents": latents_of(sample_ids, variant, draw.normal(shape, "posterior")),
            **text_of(sample_ids, caption, dropped),
            "noise": draw.normal(shape, "noise"),
            "diffusion_times": times(draw.stratified("time")),
            "sample_ids": sample_ids,
        }

    return _endless(batch, start_step)


def validation_batches(latents, captions, vocabulary, *, batch_size, seed, context=None, ids=None):
    """One pass over frozen batches: values of two epochs differ only by the network.

    The noise and time of a sample depend on the seed and its id alone. First caption, no dropout, first variant, the
    posterior's mean. The last batch is filled up with its last sample, at weight 0.

    Args:
        latents, captions, vocabulary, batch_size, seed, context, ids: As for `latent_batches`.

    Returns:
        Finite tf.data.Dataset of the dicts of `latent_batches`, and `weight` float32 (B,): 1, or 0 for filling.
    """
    latents_of = _latents_gatherer(latents)
    text_of, _ = _text_gatherer(captions, vocabulary, context)
    shape = latents.mean.shape[2:]

    def batch(sample_ids, weight):
        first, kept = tf.zeros_like(sample_ids), tf.zeros_like(sample_ids, tf.bool)
        return {
            "latents": latents_of(sample_ids, first, None),
            **text_of(sample_ids, first, kept),
            "noise": _frozen_draw(tf.random.stateless_normal, shape, seed, "noise", sample_ids),
            "diffusion_times": _frozen_draw(tf.random.stateless_uniform, [], seed, "time", sample_ids),
            "sample_ids": sample_ids,
            "weight": weight,
        }

    return _one_pass(batch, len(latents.mean), ids, batch_size)


def picture_validation_batches(pictures, *, image_size, batch_size, seed, latent_shape=None, ids=None):
    """One pass over the pictures as they are, for the autoencoder's validation; noise as in `validation_batches`.

    Args:
        pictures, image_size, batch_size, seed, latent_shape, ids: As for `picture_batches`.

    Returns:
        Finite tf.data.Dataset of the dicts of `picture_batches`, and `weight` float32 (B,): 1, or 0 for filling.
    """
    pictures_of = _gatherer(pictures)

    def batch(sample_ids, weight):
        values = {
            "pixels": fit(to_pixels(pictures_of(sample_ids)), image_size),
            "sample_ids": sample_ids,
            "weight": weight,
        }
        if latent_shape is not None:
            draw = tf.random.stateless_normal
            values["posterior_noise"] = _frozen_draw(draw, latent_shape, seed, "posterior", sample_ids)
        return values

    return _one_pass(batch, len(pictures), ids, batch_size)


def _one_pass(batch, n, ids, batch_size):
    """batch(sample ids, weight) over all ids in their order; the last one filled up with its last id at weight 0."""
    _check_batch_size(batch_size)
    ids = np.asarray(np.arange(n) if ids is None else ids, np.int64)
    n_batches = -(-len(ids) // batch_size)
    place = np.arange(n_batches * batch_size)
    filled = ids[np.minimum(place, len(ids) - 1)].reshape(n_batches, batch_size)
    weights = (place < len(ids)).astype(np.float32).reshape(n_batches, batch_size)
    rows = tf.data.Dataset.from_tensor_slices((filled, weights))
    return _untuned(rows.map(_plain(batch)).prefetch(1))


def _frozen_draw(draw, shape, seed, what, sample_ids):
    """Stateless draws (B, *shape) of which row b depends on the seed and sample_ids[b] alone."""
    return tf.map_fn(
        lambda own: draw(shape, own),
        keys(key(seed, 0, f"validation {what}"), sample_ids),
        fn_output_signature=tf.TensorSpec(shape, tf.float32),
    )


def _endless(batch, start_step):
    """batch(step) for step = start_step, start_step + 1, ...; computed ahead and in order."""
    steps = tf.data.Dataset.range(start_step, np.iinfo(np.int64).max)
    batches = steps.map(_plain(batch), num_parallel_calls=WORKERS, deterministic=True)
    return _untuned(batches.prefetch(BATCHES_AHEAD))


def _plain(batch):
    """Without autograph, which reads the source of all that is called: none of it needs that."""
    return tf.autograph.experimental.do_not_convert(batch)


def _untuned(dataset):
    """Without tf.data's tuner: ending an iterator waits for it, up to most of a minute on a busy machine."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def _chooser(n, ids, batch_size, seed):
    """A function of the step that gives the sample ids of its batch."""
    _check_batch_size(batch_size)
    ids = _on_host(np.arange(n) if ids is None else np.asarray(ids, np.int64))
    n_used = len(ids)
    if not n_used:
        raise InputError("no pictures to train on, expected at least one")
    return lambda step: tf.gather(ids, sample_order(n_used, batch_size, step, seed))


def _check_batch_size(batch_size):
    if batch_size < 1:
        raise InputError(f"batch size is {batch_size}, expected at least 1")


def _gatherer(array):
    """A function of ids (B,) that gives array[ids]; a large array is read where it lies."""
    if array.nbytes <= LARGEST_IN_MEMORY:
        tensor = _on_host(array)
        return lambda ids: tf.gather(tensor, ids)

    def gather(ids):
        rows = tf.numpy_function(lambda chosen: array[chosen], [ids], array.dtype, stateful=False)
        return tf.ensure_shape(rows, [ids.shape[0], *array.shape[1:]])

    return gather


def _on_host(array):
    """A tensor in the memory of the host, where the pipeline runs, also when there is a GPU."""
    with tf.device("CPU:0"):
        return tf.constant(np.asarray(array))


def _latents_gatherer(latents):
    """A function of (sample ids, variants, noise or None) that gives latents (B, h, w, C)."""
    n, n_variants, *shape = latents.mean.shape
    mean_of, logvar_of = (_gatherer(part.reshape(n * n_variants, *shape)) for part in latents)

    def gather(sample_ids, variant, noise):
        rows = sample_ids * n_variants + variant
        if noise is None:
            return mean_of(rows)
        return mean_of(rows) + tf.exp(0.5 * logvar_of(rows)) * noise

    return gather


def _text_gatherer(captions, vocabulary, context):
    """(function of (sample ids, caption, dropped) that gives the text entries of a batch, counts of captions (N,))."""
    table, counts = padded_captions(captions)  # (N, n, T)
    n, n_most = table.shape[:2]
    if context is None:
        parts = {"tokens": (table, vocabulary.empty())}
        parts["mask"] = (vocabulary.mask(table), vocabulary.mask(vocabulary.empty()))
    else:
        parts = {
            "context": (context.context, context.null_context),
            "mask": (context.mask, context.null_mask),
        }
    gatherers = {
        name: (_gatherer(rows.reshape(n * n_most, *rows.shape[2:])), _on_host(null))
        for name, (rows, null) in parts.items()
    }

    def gather(sample_ids, caption, dropped):
        rows = sample_ids * n_most + caption
        return {
            name: tf.where(tf.reshape(dropped, [-1] + [1] * len(null.shape)), null, rows_of(rows))
            for name, (rows_of, null) in gatherers.items()
        }

    return gather, _on_host(counts)


class _Draws(NamedTuple):
    """What is drawn for a batch: pure functions of seed, step and a purpose."""

    batch_size: int
    seed: int
    step: tf.Tensor

    def uniform(self, purpose):
        """Uniform in [0, 1), float32 (B,)."""
        return tf.random.stateless_uniform([self.batch_size], key(self.seed, self.step, purpose))

    def below(self, bounds, purpose):
        """Whole numbers from 0 to below their bounds, int64 (B,)."""
        return tf.cast(self.uniform(purpose) * tf.cast(bounds, tf.float32), tf.int64)

    def normal(self, shape, purpose):
        """Standard normal, float32 (B, *shape)."""
        return tf.random.stateless_normal([self.batch_size, *shape], key(self.seed, self.step, purpose))

    def stratified(self, purpose):
        """Uniform in [0, 1], one in each B-th, shuffled: as times, less noise in the loss than independent ones."""
        shares = (tf.range(self.batch_size, dtype=tf.float32) + self.uniform(purpose)) / self.batch_size
        return tf.random.experimental.stateless_shuffle(shares, key(self.seed, self.step, f"{purpose} order"))
