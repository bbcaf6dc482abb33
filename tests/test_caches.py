"""Caches hold what the network says of the pictures, and are made anew when anything they depend on changed."""

import errno
import os

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

from errors import InputError
from input_pipeline.augmentation import Augmentation, augment, to_pixels
from input_pipeline.caches import cached_latents, cached_text, padded_captions
from input_pipeline.randomness import key


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), np.uint8)


class Encoder:
    """Means of 4x4 patches, and half of them as the log-variance; counts its calls."""

    def __init__(self):
        self.sizes = []

    def __call__(self, pixels):
        self.sizes.append(len(pixels))
        mean = tf.nn.avg_pool2d(pixels, 4, 4, "VALID")
        return mean, 0.5 * mean


def latents_of(pictures, folder, encode=None, **keywords):
    keywords = {
        "fingerprint": {"vae": "abc", "data": "def"},
        "image_size": 16,
        "augmentation": Augmentation(flip=True),
        "batch_size": 3,
        "progress": False,
        **keywords,
    }
    return cached_latents(
        pictures, encode or Encoder(), cache_file=folder / "latents.safetensors", **keywords
    )


def patches(pixels):
    return pixels.reshape(len(pixels), 4, 4, 4, 4, 3).mean(axis=(2, 4))


def test_latents_are_of_plain_and_flipped_pictures(pictures, tmp_path):
    latents = latents_of(pictures, tmp_path)
    pixels = pictures / np.float32(127.5) - 1
    expected = np.stack([patches(pixels), patches(pixels[:, :, ::-1])], axis=1)  # (N, V, h, w, C)
    assert latents.mean.dtype == latents.logvar.dtype == np.float32
    assert (
        np.abs(latents.mean - expected).max() < 1e-6 and np.abs(latents.logvar - 0.5 * expected).max() < 1e-6
    )


def test_the_encoder_always_sees_whole_batches(pictures, tmp_path):
    encode = Encoder()
    latents_of(pictures, tmp_path, encode)
    assert encode.sizes == [3] * 6


def test_crops_are_augmentations_by_picture_and_crop(pictures, tmp_path):
    augmentation = Augmentation(resize_max=1.5, brightness=0.1)
    latents = latents_of(pictures, tmp_path, crops=3, augmentation=augmentation, seed=5)
    assert latents.mean.shape[:2] == (7, 3)
    assert np.abs(latents.mean[:, 0] - patches(pictures / np.float32(127.5) - 1)).max() < 1e-6
    for index, crop in ((0, 1), (6, 2)):
        own = key(5, index, f"crop {crop}")
        expected = augment(to_pixels(pictures[index]), 16, own, augmentation).numpy()
        assert np.abs(latents.mean[index, crop] - patches(expected[None])[0]).max() < 1e-6


def test_flipped_crops_mirror_their_own_crop(pictures, tmp_path):
    latents = latents_of(pictures, tmp_path, crops=2, augmentation=Augmentation(resize_max=1.5, flip=True))
    assert latents.mean.shape[1] == 4
    for plain in (0, 2):  # patch means of a mirrored picture are the mirrored patch means
        assert np.abs(latents.mean[:, plain + 1] - latents.mean[:, plain, :, ::-1]).max() < 1e-6


def test_the_cache_is_used_again(pictures, tmp_path, capsys):
    first, encode = latents_of(pictures, tmp_path, progress=True), Encoder()
    assert "latents: computed anew" in capsys.readouterr().out
    again = latents_of(pictures, tmp_path, encode, progress=True)
    line = capsys.readouterr().out
    assert line.startswith("latents: from the cache") and line.count("\n") == 1
    assert encode.sizes == []
    assert (again.mean == first.mean).all() and (again.logvar == first.logvar).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fingerprint": {"vae": "xyz", "data": "def"}}, "other vae"),
        ({"fingerprint": {"vae": "abc", "data": "xyz"}}, "other data"),
        ({"fingerprint": {"vae": "abc", "data": "def", "more": 1}}, "other more"),
        ({"image_size": 8}, "other image_size"),
        ({"augmentation": Augmentation()}, "other flip"),
        ({"crops": 2}, "other augmentation, crops, seed"),
    ],
)
def test_the_cache_is_made_anew_and_says_why(pictures, tmp_path, capsys, change, reason):
    latents_of(pictures, tmp_path)
    encode = Encoder()
    latents_of(pictures, tmp_path, encode, **change, progress=True)
    assert f"computed anew {tmp_path / 'latents.safetensors'} ({reason})" in capsys.readouterr().out
    assert encode.sizes


def test_settings_that_change_nothing_keep_the_cache(pictures, tmp_path):
    latents_of(pictures, tmp_path)
    encode = Encoder()
    latents_of(pictures, tmp_path, encode, seed=1, augmentation=Augmentation(flip=True, contrast=0.5))
    assert encode.sizes == []


def test_the_seed_and_ranges_count_once_crops_are_drawn(pictures, tmp_path, capsys):
    drawn = {"crops": 2, "batch_size": 7}
    latents_of(pictures, tmp_path, **drawn, augmentation=Augmentation(resize_max=1.2))
    changed = {"augmentation": Augmentation(resize_max=1.3), "seed": 1}
    latents_of(pictures, tmp_path, **drawn, **changed, progress=True)
    assert "(other augmentation, seed)" in capsys.readouterr().out


def test_a_fingerprint_cannot_hide_a_setting(pictures, tmp_path):
    with pytest.raises(ValueError, match="crops"):
        latents_of(pictures, tmp_path, fingerprint={"crops": 1})


def test_refuses_no_crops(pictures, tmp_path):
    with pytest.raises(InputError, match="0 crops a picture, expected at least 1"):
        latents_of(pictures, tmp_path, crops=0)


@pytest.mark.parametrize("damage", [b"", b"junk" * 9, None])
def test_a_damaged_or_foreign_cache_is_made_anew(pictures, tmp_path, damage):
    expected, file = latents_of(pictures, tmp_path), tmp_path / "latents.safetensors"
    if damage is None:
        safetensors.numpy.save_file({"mean": np.zeros(3)}, file)
    else:
        file.write_bytes(damage)
    assert (latents_of(pictures, tmp_path).mean == expected.mean).all()


def test_a_truncated_cache_is_made_anew(pictures, tmp_path):
    expected, file = latents_of(pictures, tmp_path), tmp_path / "latents.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert (latents_of(pictures, tmp_path).mean == expected.mean).all()


def test_an_interrupted_encoding_leaves_the_former_cache(pictures, tmp_path):
    latents_of(pictures, tmp_path)

    def interrupted(pixels):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents_of(pictures, tmp_path, interrupted, fingerprint={"vae": "new"})
    encode = Encoder()
    latents_of(pictures, tmp_path, encode)
    assert encode.sizes == [] and os.listdir(tmp_path) == ["latents.safetensors"]


def test_a_full_disk_is_one_clear_line(pictures, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="latents.safetensors: the disk is full"):
        latents_of(pictures, tmp_path)
    assert os.listdir(tmp_path) == []


CAPTIONS = [np.array([[1, 2, 9], [3, 9, 9]], np.int32), np.array([[4, 5, 6]], np.int32)]


def test_padded_captions_repeat_the_first():
    table, counts = padded_captions(CAPTIONS)
    assert table.tolist() == [[[1, 2, 9], [3, 9, 9]], [[4, 5, 6], [4, 5, 6]]]
    assert counts.tolist() == [2, 1] and table.dtype == np.int32


def test_text_is_embedded_caption_by_caption(tmp_path):
    calls = []

    def encode(tokens):
        calls.append(len(tokens))
        return np.stack([tokens, -tokens], axis=-1).astype(np.float32), tokens != 9

    def cached(fingerprint, captions=CAPTIONS):
        return cached_text(
            captions,
            np.array([9, 9, 9], np.int32),
            encode,
            cache_file=tmp_path / "text.safetensors",
            fingerprint=fingerprint,
            batch_size=2,
            progress=False,
        )

    text = cached({"clip": "abc"})
    assert calls == [2, 2, 2]
    assert text.context[1, 0].tolist() == [[4, -4], [5, -5], [6, -6]]
    assert text.context.shape == (2, 2, 3, 2) and text.mask[0].tolist() == [
        [True, True, False],
        [True, False, False],
    ]
    assert text.null_context.tolist() == [[9, -9]] * 3 and text.null_mask.tolist() == [False] * 3
    again = cached({"clip": "abc"})
    assert len(calls) == 3 and all((a == b).all() for a, b in zip(again, text, strict=True))
    cached({"clip": "xyz"})
    assert len(calls) == 6
    other = cached({"clip": "xyz"}, [rows + 1 for rows in CAPTIONS])
    assert other.context[0, 0, 0].tolist() == [2, -2]
