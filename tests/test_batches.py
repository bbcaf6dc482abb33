"""Batches are pure functions of (seed, step): each promise is compared with what it is drawn from."""

import itertools
import math

import numpy as np
import pytest
import tensorflow as tf

from diffusion.schedule import Process
from diffusion.times import training_times
from errors import InputError
from input_pipeline import batches
from input_pipeline.augmentation import Augmentation
from input_pipeline.batches import (
    latent_batches,
    picture_batches,
    picture_validation_batches,
    validation_batches,
)
from input_pipeline.caches import Latents, TextContext
from input_pipeline.vocabulary import Vocabulary

N, T, V, SHAPE = 20, 5, 2, (2, 2, 3)
VOCABULARY = Vocabulary(["<PAD>", *(f"w{i}" for i in range(70)), "<PAD>", "<RARE>"], length=T)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def latents():
    rng = np.random.default_rng(1)
    mean = np.arange(N)[:, None] * 10.0 + np.arange(V)  # tells picture and variant
    mean = np.broadcast_to(mean[..., None, None, None], (N, V, *SHAPE)).astype(np.float32)
    return Latents(mean, rng.uniform(-3, -1, mean.shape).astype(np.float32))


@pytest.fixture(scope="module")
def captions():
    """Picture i has 1 + i % 3 captions; caption j is the two words 3 i + j + 1 and 2."""
    rows = []
    for i in range(N):
        tokens = np.tile(VOCABULARY.empty(), (1 + i % 3, 1))
        tokens[:, 0], tokens[:, 1] = 3 * i + 1 + np.arange(len(tokens)), 2
        rows.append(tokens)
    return rows


def take(dataset, n):
    return [{name: value.numpy() for name, value in batch.items()} for batch in itertools.islice(dataset, n)]


def assert_equal(received, expected):
    assert len(received) == len(expected)
    for ours, theirs in zip(received, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype and (ours[name] == theirs[name]).all(), name


EVERYTHING = Augmentation(resize_max=1.3, flip=True, brightness=0.1, contrast=0.1)


def pictures_of(pictures, augmentation=EVERYTHING, **keywords):
    keywords = {"batch_size": 4, "seed": 0, **keywords}
    return picture_batches(pictures, image_size=8, augmentation=augmentation, latent_shape=SHAPE, **keywords)


def latents_of(latents, captions, **keywords):
    keywords = {"batch_size": 8, "seed": 0, "caption_dropout": 0.25, "times": tf.identity, **keywords}
    return latent_batches(latents, captions, VOCABULARY, **keywords)


def certain(latents):
    """The same latents without variance: their samples are the mean."""
    return latents._replace(logvar=np.full_like(latents.logvar, -np.inf))


def test_pixels_are_the_pictures(pictures):
    for batch in take(pictures_of(pictures, Augmentation()), 5):
        restored = np.round((batch["pixels"] + 1) * 127.5).astype(np.uint8)
        assert (restored == pictures[batch["sample_ids"]]).all()
        assert batch["pixels"].dtype == np.float32 and batch["posterior_noise"].shape == (4, *SHAPE)


def test_an_epoch_shows_every_picture_once(pictures):
    ids = np.concatenate([batch["sample_ids"] for batch in take(pictures_of(pictures), 5)])
    assert sorted(ids) == list(range(N))


@pytest.mark.parametrize("start", [1, 7])
def test_a_stream_resumed_is_the_stream_uninterrupted(pictures, latents, captions, start):
    assert_equal(
        take(pictures_of(pictures, start_step=start), 3), take(pictures_of(pictures), 10)[start : start + 3]
    )
    resumed = take(latents_of(latents, captions, start_step=start), 3)
    assert_equal(resumed, take(latents_of(latents, captions), 10)[start : start + 3])


def test_another_seed_is_another_stream(pictures, latents, captions):
    for make, data in ((pictures_of, (pictures,)), (latents_of, (latents, captions))):
        first, other = take(make(*data), 1)[0], take(make(*data, seed=1), 1)[0]
        assert all((first[name] != other[name]).any() for name in first)


def test_flip_alone_in_the_pipeline_is_plain_or_mirrored(pictures):
    n_mirrored = 0
    for batch in take(pictures_of(pictures, Augmentation(flip=True)), 10):
        for pixels, plain in zip(
            batch["pixels"], pictures[batch["sample_ids"]] / np.float32(127.5) - 1, strict=True
        ):
            mirrored = np.abs(pixels - plain[:, ::-1]).max() < 1e-6
            assert mirrored or np.abs(pixels - plain).max() < 1e-6
            n_mirrored += mirrored
    assert 8 <= n_mirrored <= 32


def test_large_arrays_are_read_where_they_lie(pictures, latents, captions, monkeypatch, tmp_path):
    expected = take(pictures_of(pictures), 3), take(latents_of(latents, captions), 3)
    np.save(tmp_path / "pictures.npy", pictures)
    mapped = np.load(tmp_path / "pictures.npy", mmap_mode="r")
    monkeypatch.setattr(batches, "LARGEST_IN_MEMORY", 0)
    assert_equal(take(pictures_of(mapped), 3), expected[0])
    assert_equal(take(latents_of(latents, captions), 3), expected[1])


def test_replicas_share_the_batch_of_one(pictures, latents, captions, two_replicas):
    for dataset in (pictures_of(pictures), latents_of(latents, captions)):
        shared = two_replicas.experimental_distribute_dataset(dataset)
        for batch, parts in zip(take(dataset, 3), itertools.islice(shared, 3), strict=True):
            for name, whole in batch.items():
                halves = [part.numpy() for part in two_replicas.experimental_local_results(parts[name])]
                assert [len(half) for half in halves] == [len(whole) // 2] * 2
                assert (np.concatenate(halves) == whole).all(), name


def test_only_the_chosen_ids_are_drawn(pictures, latents, captions):
    ids = [3, 4, 11, 19]
    for dataset in (pictures_of(pictures, ids=ids), latents_of(latents, captions, ids=ids, batch_size=4)):
        for batch in take(dataset, 3):
            assert sorted(batch["sample_ids"]) == ids


def test_fewer_pictures_than_a_batch_still_train(pictures):
    ids = np.concatenate([batch["sample_ids"] for batch in take(pictures_of(pictures[:3], batch_size=4), 3)])
    assert np.bincount(ids).tolist() == [4, 4, 4]


@pytest.mark.parametrize("batch_size", [0, -4])
def test_refuses_a_batch_size(pictures, latents, captions, batch_size):
    with pytest.raises(InputError, match=f"batch size is {batch_size}, expected at least 1"):
        pictures_of(pictures, batch_size=batch_size)
    with pytest.raises(InputError, match=f"batch size is {batch_size}, expected at least 1"):
        latents_of(latents, captions, batch_size=batch_size)
    with pytest.raises(InputError, match=f"batch size is {batch_size}, expected at least 1"):
        validation_batches(latents, captions, VOCABULARY, batch_size=batch_size, seed=0)


def test_refuses_no_pictures(pictures):
    with pytest.raises(InputError, match="no pictures"):
        pictures_of(pictures, ids=[])


def test_latents_are_of_the_picture_in_any_variant(latents, captions):
    variants = []
    for batch in take(latents_of(certain(latents), captions), 10):
        variant = batch["latents"] - 10.0 * batch["sample_ids"][:, None, None, None]
        assert (variant == variant[:, :1, :1, :1]).all()
        variants.extend(variant[:, 0, 0, 0])
    assert set(variants) == {0, 1} and 20 <= sum(variants) <= 60


def test_posterior_samples_have_the_moments_of_the_posterior(latents, captions):
    standard = []
    for batch in take(latents_of(latents, captions, ids=[5, 6], batch_size=64), 40):
        deviation = np.exp(0.5 * latents.logvar)[batch["sample_ids"]]  # (B, V, h, w, C)
        mean = latents.mean[batch["sample_ids"]]
        variant = np.argmin(np.abs(batch["latents"][:, None] - mean).mean(axis=(2, 3, 4)), axis=1)
        rows = np.arange(64)
        standard.append((batch["latents"] - mean[rows, variant]) / deviation[rows, variant])
    standard = np.concatenate(standard)
    # 30,720 numbers; a few variants are taken for one another where the draws are far out
    assert abs(standard.mean()) < 0.03 and abs(standard.std() - 1) < 0.03


def test_noise_is_standard_normal_and_apart_from_the_posteriors(latents, captions):
    pairs = take(latents_of(latents, captions, batch_size=64), 40)
    noise = np.concatenate([batch["noise"] for batch in pairs])
    assert abs(noise.mean()) < 0.025 and abs(noise.std() - 1) < 0.02
    mean = take(latents_of(certain(latents), captions, batch_size=64), 40)
    posterior = np.concatenate([a["latents"] - b["latents"] for a, b in zip(pairs, mean, strict=True)])
    assert abs(np.corrcoef(noise.ravel(), posterior.ravel())[0, 1]) < 0.025  # 4 standard errors


def test_further_noises_are_standard_normal_and_change_nothing_else(latents, captions):
    plain = take(latents_of(latents, captions, batch_size=64), 40)
    more = take(latents_of(latents, captions, batch_size=64, offset_noise=True, input_noise=True), 40)
    for name, shape in (("offset_noise", (64, 1, 1, SHAPE[-1])), ("input_noise", (64, *SHAPE))):
        assert {batch[name].shape for batch in more} == {shape}
        own = np.concatenate([batch.pop(name) for batch in more])
        error = 4 / math.sqrt(own.size)  # 4 standard errors
        assert abs(own.mean()) < error and abs(own.std() - 1) < error
        noise = np.broadcast_to(np.concatenate([batch["noise"] for batch in plain]), (len(own), *SHAPE))
        alike = np.corrcoef(np.broadcast_to(own, noise.shape).ravel(), noise.ravel())[0, 1]
        assert abs(alike) < error
    assert_equal(more, plain)


def test_captions_are_of_the_picture_and_dropped_ones_are_empty(latents, captions):
    chosen, dropped = set(), []
    for batch in take(latents_of(latents, captions), 100):
        for i, tokens, mask in zip(batch["sample_ids"], batch["tokens"], batch["mask"], strict=True):
            dropped.append((tokens == VOCABULARY.pad_id).all())
            assert mask.tolist() == [True, not dropped[-1], False, False, False]
            if not dropped[-1]:
                assert (captions[i] == tokens).all(axis=1).sum() == 1
                chosen.add((int(i), int(tokens[0])))
    assert len(chosen) == sum(len(rows) for rows in captions)  # every caption gets its turn
    assert abs(np.mean(dropped) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 800)


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, False), (1.0, True)])
def test_dropout_none_and_all(latents, captions, dropout, expected):
    for batch in take(latents_of(latents, captions, caption_dropout=dropout), 5):
        assert ((batch["tokens"] == VOCABULARY.pad_id).all(axis=1) == expected).all()


def test_times_are_stratified_and_shuffled(latents, captions):
    orders = set()
    for batch in take(latents_of(latents, captions), 10):
        times = batch["diffusion_times"]
        assert (np.floor(np.sort(times) * 8) == np.arange(8)).all()
        orders.add(tuple(np.argsort(times)))
    assert len(orders) == 10


def test_no_stream_has_a_tuner_to_wait_for(latents, captions):
    pictures = np.zeros((4, 8, 8, 3), np.uint8)
    settings = {"image_size": 8, "batch_size": 2, "seed": 0}
    for stream in (
        latents_of(latents, captions),
        batches.validation_batches(latents, captions, VOCABULARY, batch_size=2, seed=0),
        batches.picture_batches(pictures, augmentation=Augmentation(), **settings),
        batches.picture_validation_batches(pictures, **settings),
    ):
        assert stream.options().autotune.enabled is False


def test_times_are_what_is_made_of_the_shares(latents, captions):
    make = training_times("logit_normal", Process())
    plain, made = (
        np.concatenate([b["diffusion_times"] for b in take(latents_of(latents, captions, times=times), 200)])
        for times in (tf.identity, make)
    )
    np.testing.assert_allclose(made, make(plain), rtol=1e-6)  # the same draws at other places
    assert (np.argsort(plain) == np.argsort(made)).all()
    logits = np.log(made / (1 - made))
    assert abs(logits.mean()) < 0.02
    assert abs(logits.std() - 1) < 0.03


def test_context_takes_the_place_of_tokens(latents, captions):
    n, width = 3, 4
    context = np.arange(N * n * T * width, dtype=np.float32).reshape(N, n, T, width)
    mask = np.random.default_rng(0).uniform(size=(N, n, T)) < 0.5
    text = TextContext(context, mask, -np.ones((T, width), np.float32), np.eye(T, dtype=bool)[0])
    plain = take(latents_of(latents, captions), 20)
    for batch, other in zip(take(latents_of(latents, captions, context=text), 20), plain, strict=True):
        assert "tokens" not in batch
        for i, row in enumerate(batch["sample_ids"]):
            if (other["tokens"][i] == VOCABULARY.pad_id).all():
                assert (batch["context"][i] == -1).all() and batch["mask"][i].tolist() == [True] + [False] * 4
            else:
                caption = other["tokens"][i, 0] - 3 * row - 1  # the same draw chooses caption and embedding
                assert (batch["context"][i] == context[row, caption]).all()
                assert (batch["mask"][i] == mask[row, caption]).all()
    frozen = take(validation_batches(latents, captions, VOCABULARY, batch_size=N, seed=0, context=text), 1)[0]
    assert (frozen["context"] == context[:, 0]).all() and (frozen["mask"] == mask[:, 0]).all()


def by_id(batch_list, name):
    return {
        int(i): value
        for batch in batch_list
        for i, value, weight in zip(batch["sample_ids"], batch[name], batch["weight"], strict=True)
        if weight
    }


def test_validation_is_one_frozen_pass(latents, captions):
    dataset = validation_batches(latents, captions, VOCABULARY, batch_size=8, seed=0)
    first = take(dataset, 99)
    assert_equal(take(dataset, 99), first)
    assert [batch["weight"].sum() for batch in first] == [8, 8, 4]
    assert {batch["latents"].shape for batch in first} == {(8, *SHAPE)}
    assert sorted(by_id(first, "latents")) == list(range(N))
    for i, value in by_id(first, "latents").items():
        assert (value == latents.mean[i, 0]).all()
    for i, value in by_id(first, "tokens").items():
        assert (value == captions[i][0]).all()


@pytest.mark.parametrize("name", ["noise", "diffusion_times"])
def test_validation_draws_depend_on_the_sample_alone(latents, captions, name):
    whole = by_id(take(validation_batches(latents, captions, VOCABULARY, batch_size=8, seed=0), 9), name)
    ids = [13, 2, 7]
    part = by_id(
        take(validation_batches(latents, captions, VOCABULARY, batch_size=2, seed=0, ids=ids), 9), name
    )
    assert list(part) == ids
    assert all((part[i] == whole[i]).all() for i in ids)
    assert len({np.asarray(value).tobytes() for value in whole.values()}) == N
    other = by_id(take(validation_batches(latents, captions, VOCABULARY, batch_size=8, seed=1), 9), name)
    assert all((other[i] != whole[i]).any() for i in range(N))


def test_picture_validation_is_one_frozen_pass_over_the_pictures(pictures):
    def run(batch_size, **keywords):
        keywords = {"image_size": 8, "seed": 0, "latent_shape": SHAPE, **keywords}
        return take(picture_validation_batches(pictures, batch_size=batch_size, **keywords), 99)

    whole = run(8)
    assert_equal(run(8), whole)
    assert [batch["weight"].sum() for batch in whole] == [8, 8, 4]
    for i, pixels in by_id(whole, "pixels").items():
        assert (np.round((pixels + 1) * 127.5) == pictures[i]).all()
    noise, part = by_id(whole, "posterior_noise"), by_id(run(2, ids=[9, 1, 4]), "posterior_noise")
    assert list(part) == [9, 1, 4] and all((part[i] == noise[i]).all() for i in part)
    assert len({value.tobytes() for value in noise.values()}) == N
    half = tf.image.resize(pictures / np.float32(127.5) - 1, [4, 4], antialias=True).numpy()
    assert np.abs(np.stack(list(by_id(run(8, image_size=4), "pixels").values())) - half).max() < 1e-6


def test_validation_of_nothing_is_empty(latents, captions):
    assert take(validation_batches(latents, captions, VOCABULARY, batch_size=8, seed=0, ids=[]), 1) == []


def test_batch_shapes_are_static(pictures, latents, captions):
    """Otherwise every replica would retrace, and a network could not be built from the batch."""
    validation = validation_batches(latents, captions, VOCABULARY, batch_size=8, seed=0)
    for dataset in (pictures_of(pictures), latents_of(latents, captions), validation):
        assert all(spec.shape.is_fully_defined() for spec in tf.nest.flatten(dataset.element_spec))
