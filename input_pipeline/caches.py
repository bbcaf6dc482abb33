"""What frozen networks make of the data, computed once: latents and text embeddings, kept with their fingerprint.

The networks come in as functions, so that this room knows none of them.
"""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import tensorflow as tf
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import files
from errors import InputError
from input_pipeline.augmentation import augment, fit, to_pixels
from input_pipeline.randomness import key


class Latents(NamedTuple):
    """Gaussian posteriors of N pictures in V variants; variant 0 is the whole picture, unflipped.

    Attributes:
        mean: float32 (N, V, h, w, C).
        logvar: float32 (N, V, h, w, C), logarithm of the variance.
    """

    mean: np.ndarray
    logvar: np.ndarray


class TextContext(NamedTuple):
    """Text embeddings of N pictures' captions, padded to the largest number n of captions.

    Attributes:
        context: float32 (N, n, T, D).
        mask: bool (N, n, T).
        null_context: float32 (T, D), of the empty text.
        null_mask: bool (T,).
    """

    context: np.ndarray
    mask: np.ndarray
    null_context: np.ndarray
    null_mask: np.ndarray


def cached_latents(
    pictures,
    encode,
    *,
    cache_file,
    fingerprint,
    image_size,
    augmentation,
    crops=1,
    batch_size=32,
    seed=0,
    progress=True,
):
    """Latents of all pictures, from the cache file when it is of the same network, data and settings.

    Variants are crops x (plain, flipped if `augmentation.flip`). The first crop is the whole picture; each further
    one is changed as `augmentation` says, by a key of (seed, picture, crop).

    Args:
        pictures: uint8 (N, S, S, 3).
        encode: Function of pixels float32 (B, image_size, image_size, 3), -1..1, that returns (mean, logvar), each
            (B, h, w, C). It always gets `batch_size` pictures.
        cache_file: A `.safetensors` file.
        fingerprint: dict for JSON: what the latents depend on beside the settings here, such as the hash of the VAE's
            weights and that of the pictures. Its names are shown when they differ.
        image_size: Side in pixels that the network sees.
        augmentation: An `Augmentation`.
        crops: Number of crops a picture.
        batch_size: Pictures a call of `encode`.
        seed: Whole number.
        progress: Whether to show a bar and say whether the cache was used.

    Returns:
        Latents.

    Raises:
        InputError: the disk is full, or `crops` is less than 1.
    """
    if crops < 1:
        raise InputError(f"{crops} crops a picture, expected at least 1")
    settings = {"picture_shape": pictures.shape, "image_size": image_size, "crops": crops}
    settings |= {"flip": augmentation.flip}
    if crops > 1:  # otherwise nothing is drawn
        settings |= {"augmentation": dataclasses.asdict(augmentation), "seed": seed}

    def build():
        variants = [_crop(pictures, crop, image_size, augmentation, seed) for crop in range(crops)]
        flips = (False, True) if augmentation.flip else (False,)
        jobs = [(pixels_of, flip) for pixels_of in variants for flip in flips]
        return _encode_pictures(len(pictures), jobs, encode, batch_size, progress)

    return Latents(**_cached(cache_file, "latents", fingerprint, settings, build, progress))


def cached_text(captions, null_tokens, encode, *, cache_file, fingerprint, batch_size=64, progress=True):
    """Text embeddings of all captions, from the cache file when it is of the same network, captions and settings.

    Args:
        captions: N int32 arrays (n_i, T); they are part of the fingerprint.
        null_tokens: int32 (T,), the empty text.
        encode: Function of tokens int32 (B, T) that returns (context (B, T, D), mask (B, T)); it always gets
            `batch_size` rows.
        cache_file, fingerprint, batch_size, progress: As for `cached_latents`.

    Returns:
        TextContext.

    Raises:
        InputError: the disk is full.
    """
    table, _ = padded_captions(captions)  # (N, n, T)
    rows = np.concatenate([table.reshape(-1, table.shape[-1]), null_tokens[None]])

    def build():
        starts = tqdm(range(0, len(rows), batch_size), "text embeddings", disable=None if progress else True)
        parts = [_encode_fixed(encode, rows[start : start + batch_size], batch_size) for start in starts]
        context, mask = (np.concatenate(part) for part in zip(*parts, strict=True))
        return {
            "context": context[:-1].reshape(*table.shape, -1).astype(np.float32),
            "mask": mask[:-1].reshape(table.shape).astype(bool),
            "null_context": context[-1].astype(np.float32),
            "null_mask": mask[-1].astype(bool),
        }

    settings = {"captions": files.fingerprint(table, null_tokens)}
    return TextContext(**_cached(cache_file, "text embeddings", fingerprint, settings, build, progress))


def padded_captions(captions):
    """Captions as one table: int32 (N, n, T), short rows repeat their first caption, and counts int32 (N,)."""
    counts = np.array([len(rows) for rows in captions], np.int32)
    table = np.stack(
        [np.concatenate([rows, rows[:1].repeat(counts.max() - len(rows), axis=0)]) for rows in captions]
    )
    return table.astype(np.int32), counts


def _crop(pictures, crop, image_size, augmentation, seed):
    """A function of ids that gives the pixels of one crop of those pictures."""
    unflipped = dataclasses.replace(augmentation, flip=False)

    def whole(ids):
        return fit(to_pixels(pictures[ids]), image_size)

    def changed(ids):
        pixels = to_pixels(pictures[ids])
        rows = [
            augment(one, image_size, key(seed, index, f"crop {crop}"), unflipped)
            for one, index in zip(pixels, ids, strict=True)
        ]
        return tf.stack(rows)

    return changed if crop else whole


def _encode_pictures(n, jobs, encode, batch_size, progress):
    """{mean, logvar} (N, V, h, w, C); each job is a function of ids and whether to mirror what it gives."""
    results = {}
    with tqdm(total=n * len(jobs), desc="latents", disable=None if progress else True) as bar:
        for variant, (pixels_of, flip) in enumerate(jobs):
            for start in range(0, n, batch_size):
                ids = np.arange(start, min(start + batch_size, n))
                pixels = pixels_of(ids)
                parts = _encode_fixed(encode, tf.reverse(pixels, axis=[2]) if flip else pixels, batch_size)
                for name, part in zip(("mean", "logvar"), parts, strict=True):
                    if name not in results:
                        results[name] = np.empty((n, len(jobs), *part.shape[1:]), np.float32)
                    results[name][ids, variant] = part
                bar.update(len(ids))
    return results


def _encode_fixed(encode, rows, batch_size):
    """Call `encode` with `batch_size` rows, the last one repeated where they are fewer: one shape, one trace."""
    n = len(rows)
    index = np.minimum(np.arange(batch_size), n - 1)
    return [np.asarray(part)[:n] for part in encode(tf.gather(rows, index))]


def _cached(cache_file, what, fingerprint, settings, build, progress):
    """The tensors of the cache file if it is of this fingerprint and these settings; otherwise built and written."""
    cache_file = Path(cache_file)
    if fingerprint.keys() & settings.keys():
        raise ValueError(f"fingerprint names {fingerprint.keys() & settings.keys()}, which are settings here")
    wanted = json.loads(json.dumps({**fingerprint, **settings}))  # as it reads back
    tensors, reason = _read_cache(cache_file, wanted)
    _say(f"{what}: {'from the cache' if tensors else 'computed anew'} {cache_file} ({reason})", progress)
    if tensors is None:
        tensors = {name: np.ascontiguousarray(value) for name, value in build().items()}
        with files.atomic_file(cache_file) as file:
            file.write(safetensors.numpy.save(tensors, {"fingerprint": json.dumps(wanted)}))
    return tensors


def _read_cache(cache_file, wanted):
    """(tensors or None, why)."""
    if not cache_file.is_file():
        return None, "there was none"
    try:
        with safe_open(cache_file, "numpy") as file:
            found = dict(json.loads((file.metadata() or {}).get("fingerprint", "{}")))
            changed = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            if changed:
                return None, f"other {', '.join(changed)}"
        return safetensors.numpy.load_file(cache_file), "same network, data and settings"
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        return None, f"the old one cannot be read: {error}"


def _say(line, progress):
    if progress:
        tqdm.write(line)
