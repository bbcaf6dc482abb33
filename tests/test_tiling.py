"""Tiles: they cover a picture in one shape, add up to the whole, fade into one another and are barely seen."""

import itertools
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from model.common import GroupNorm, GroupNormStatistics
from model.tiling import measured, tiled_decode, tiled_encode
from model.vae import AutoencoderKL

FACTOR = 2


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def enlarge(latents):
    """A decoder of places that do not see one another."""
    return np.tanh(latents[..., :3]).repeat(FACTOR, 1).repeat(FACTOR, 2)


def reduce(pixels):
    """The encoder that belongs to it: mean, and what stands for a log-variance."""
    batch, height, width, channels = pixels.shape
    patches = pixels.reshape(batch, height // FACTOR, FACTOR, width // FACTOR, FACTOR, channels)
    return patches.mean((2, 4)), patches.max((2, 4))


@pytest.fixture
def placewise():
    return SimpleNamespace(factor=FACTOR, encode=reduce, decode=enlarge)


@pytest.fixture(scope="module")
def vae():
    """A network of every kind of layer but attention, whose pixels have a spread of about 0.25."""
    network = AutoencoderKL((16, 16, 16), (0, 1, 1), groups=4, attention=False)
    for index, variable in enumerate(network.trainable_variables):
        values = normal(*variable.shape, seed=index)
        if len(variable.shape) > 1:
            variable.assign(values / math.sqrt(math.prod(variable.shape[:-1])))
        else:
            variable.assign(0.1 * values + variable.path.endswith("gamma"))
    last = network.decoder.get_layer("decoder.conv_out").kernel
    last.assign(0.5 * last)
    return network


def recorded(function):
    """The function, measured, and the shapes that it will have been given."""
    shapes = []

    def recording(values):
        shapes.append(tuple(values.shape[1:3]))
        return function(values)

    return measured(recording), shapes


@pytest.mark.parametrize("size", [(4, 4), (5, 4), (9, 7), (16, 3), (1, 23), (2, 2)])
@pytest.mark.parametrize("overlap", [None, 0, 1, 2, 3])
def test_tiles_add_up_to_the_whole(placewise, size, overlap):
    """Where places do not see one another, tiles change nothing, whatever their number and overlap."""
    latents, pixels = normal(2, *size, 4), normal(2, FACTOR * size[0], FACTOR * size[1], 3)
    decoded = tiled_decode(placewise, latents, tile=4, overlap=overlap)
    np.testing.assert_allclose(decoded, enlarge(latents), rtol=1e-5, atol=1e-6)
    pixel_overlap = None if overlap is None else FACTOR * overlap
    encoded = tiled_encode(placewise, pixels, tile=FACTOR * 4, overlap=pixel_overlap)
    np.testing.assert_allclose(encoded, reduce(pixels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "count", "shape"),
    [
        ((8, 8), 1, (8, 8)),
        ((9, 8), 2, (8, 8)),
        ((20, 14), 12, (8, 8)),
        ((5, 21), 5, (5, 8)),
        ((3, 4), 1, (3, 4)),
    ],
)
def test_tiles_are_of_one_shape_and_few(placewise, size, count, shape):
    """A tile every 4 latents, of 8 by default overlap; smaller only where the picture is."""
    decode, decoded = recorded(enlarge)
    tiled_decode(placewise, normal(1, *size, 4), tile=8, rounds=0, decode=decode)
    assert decoded == [shape] * count
    encode, encoded = recorded(reduce)
    pixels = normal(1, FACTOR * size[0], FACTOR * size[1], 3)
    tiled_encode(placewise, pixels, tile=FACTOR * 8, rounds=0, encode=encode)
    assert encoded == [(FACTOR * shape[0], FACTOR * shape[1])] * count


@pytest.mark.parametrize("axis", [1, 2])
def test_tiles_fade_into_one_another_linearly(placewise, axis):
    """Each tile has a value of its own: 0, then 1."""
    values = iter([0.0, 1.0])

    def decode(latents):
        return np.full((1, FACTOR * latents.shape[1], FACTOR * latents.shape[2], 3), next(values), "float32")

    shape = (1, 12, 4, 4) if axis == 1 else (1, 4, 12, 4)
    pixels = tiled_decode(placewise, np.zeros(shape, "float32"), tile=8, rounds=0, decode=measured(decode))
    profile = np.moveaxis(pixels, axis, 1)[:, :, 0, :]
    ramp = (np.arange(8) + 0.5) / 8  # two tiles of 16 pixels over 24
    expected = np.concatenate([np.zeros(8), ramp, np.ones(8)])
    np.testing.assert_allclose(profile, np.broadcast_to(expected[None, :, None], profile.shape), atol=1e-6)


@pytest.mark.parametrize("tile", [8, 16])
def test_one_tile_is_the_whole(vae, tile):
    pixels = normal(2, 32, 28, 3)
    for ours, whole in zip(tiled_encode(vae, pixels, tile=4 * tile), vae.encode(pixels)):
        np.testing.assert_array_equal(ours, whole)
    latents = normal(2, 8, 7, 4)
    np.testing.assert_array_equal(tiled_decode(vae, latents, tile=tile), vae.decode(latents))


def test_seams_are_barely_seen(vae):
    """Of latents like those of a diffusion model, unit normal, the pixels differ by less than 1 of 255 on average."""
    latents = normal(1, 80, 104, 4)
    whole = vae.decode(latents).numpy()
    assert whole.std() > 0.2 and np.mean(np.abs(whole) == 1) < 0.01
    difference = np.abs(tiled_decode(vae, latents) - whole) * 127.5
    assert difference.mean() < 1
    mean, logvar = vae.encode(whole)
    for ours, expected in zip(tiled_encode(vae, whole, tile=256), (mean, logvar)):
        assert np.abs(ours - expected).mean() < 0.03 * np.std(expected)


def test_overlaps_take_away_the_borders(vae):
    """Where a tile is padded with zeros, neighbours that see beyond it take its place."""
    latents = normal(1, 16, 48, 4)
    whole = vae.decode(latents).numpy()
    border = np.abs(tiled_decode(vae, latents, tile=24, overlap=0) - whole)[:, :, 92:100].mean()
    blended = np.abs(tiled_decode(vae, latents, tile=24, overlap=8) - whole)
    assert blended[:, :, 92:100].mean() < 0.5 * border


# Statistics of the whole picture


def halves():
    """Latents of which the left half is nearly even and the right one is not: each tile sees other statistics."""
    latents = normal(1, 16, 40, 4)
    latents[:, :, :20] = 0.1 * latents[:, :, :20] + np.float32([1.5, -1.0, 0.5, -0.5])
    return latents


def seam(vae, latents, rounds):
    """The mean difference of two neighbouring tiles in the middle of what both have computed, of 255."""
    made = []

    def decode(*arguments):
        pixels, taken = measured(vae.decode)(*arguments)
        made.append(pixels.numpy())
        return pixels, taken

    tiled_decode(vae, latents, tile=32, overlap=24, rounds=rounds, decode=decode)
    left, right = made[-2:]  # columns of latents 0 to 32 and 8 to 40, of 4 pixels each
    return np.abs(left[:, :, 76:84] - right[:, :, 44:52]).mean() * 127.5


def test_shared_statistics_take_away_the_seams(vae):
    assert seam(vae, halves(), rounds=0) > 3
    assert seam(vae, halves(), rounds=1) < 0.01
    assert seam(vae, halves(), rounds=2) < 0.01


class Pointwise:
    """A decoder of two norms, whose places do not see one another otherwise."""

    factor = FACTOR

    def __init__(self):
        self.norms = [GroupNorm(2, silu=True), GroupNorm(2)]
        for index, norm in enumerate(self.norms):
            norm.build((None, None, None, 4))
            norm.gamma.assign(1 + 0.3 * normal(4, seed=index))
            norm.beta.assign(normal(4, seed=10 + index))

    def decode(self, latents):
        first, second = self.norms
        x = first(tf.convert_to_tensor(latents)) ** 2
        return second(tf.repeat(tf.repeat(x, FACTOR, 1), FACTOR, 2))


@pytest.mark.parametrize(("tile", "overlap"), [(6, 2), (6, 0), (7, 5), (5, None)])
def test_norms_are_exact_one_round_after_the_other(tile, overlap):
    """Each place counts once, however many tiles have it, in each of two pictures of uneven sides."""
    slope = np.linspace(0.2, 3.0, 17, dtype="float32")[:, None]
    latents, pointwise = normal(2, 13, 17, 4) * slope + slope, Pointwise()
    whole = pointwise.decode(latents).numpy()

    def furthest(rounds):
        return np.abs(tiled_decode(pointwise, latents, tile, overlap, rounds) - whole).max()

    assert furthest(2) < 5e-5
    assert min(furthest(0), furthest(1)) > 0.1


def test_as_many_rounds_as_norms_are_the_whole(vae):
    latents = halves()
    whole = vae.decode(latents).numpy()
    with GroupNormStatistics(np.ones(whole.shape[1:3], "float32")) as statistics:
        vae.decode(latents)

    def difference(rounds):
        return np.abs(tiled_decode(vae, latents, tile=24, rounds=rounds) - whole).mean() * 127.5

    exact = difference(len(statistics.taken))
    assert exact < 0.1 * difference(0)  # of what zeros at the borders of tiles leave
    mean, _ = vae.encode(whole)
    ours, _ = tiled_encode(vae, whole, tile=96, rounds=12)
    assert np.abs(ours - mean).mean() < 0.03 * np.std(mean)


def test_a_picture_with_its_own_statistics_is_as_it_was(vae):
    latents, shares = halves(), np.ones((64, 160), "float32")
    _, taken = measured(vae.decode)(latents, shares, ())
    pixels, again = measured(vae.decode)(latents, shares, taken)
    np.testing.assert_allclose(pixels, vae.decode(latents), atol=1e-5)
    for one, other in zip(taken, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_statistics_for_another_number_of_norms_are_refused(vae):
    latents, shares = halves(), np.ones((64, 160), "float32")
    _, taken = measured(vae.decode)(latents, shares, ())
    for given in (taken[:-1], [*taken, taken[0]]):
        with pytest.raises(
            RuntimeError, match=f"{len(taken)} norms were called. Received: {len(given)} entries"
        ):
            measured(vae.decode)(latents, shares, given)


def test_statistics_are_not_taken_within_others():
    weights = np.ones((2, 2), "float32")
    with GroupNormStatistics(weights), pytest.raises(RuntimeError, match="one is open already"):
        with GroupNormStatistics(weights):
            pass
    assert GroupNormStatistics.current() is None


def test_another_thread_knows_nothing_of_statistics():
    norm, x = GroupNorm(1), normal(1, 2, 2, 2)
    with GroupNormStatistics(np.ones((2, 2), "float32")) as statistics:
        thread = threading.Thread(target=norm, args=(x,))
        thread.start()
        thread.join()
        assert statistics.taken == []
        norm(x)
        assert len(statistics.taken) == 1


def test_a_function_that_was_compiled_before_is_refused(vae):
    """It would be normalised by itself, and nobody would know."""
    measuring = measured(vae.decode)
    turns = itertools.cycle([True, False])

    def decode(*arguments):
        pixels, taken = measuring(*arguments)
        return pixels, taken if next(turns) else []

    with pytest.raises(ValueError, match=r"compile measured\(function\), not function"):
        tiled_decode(vae, halves(), tile=24, decode=decode)


def test_rounds_below_zero_are_refused(placewise):
    with pytest.raises(ValueError, match="received -1 rounds, expected 0 or more"):
        tiled_decode(placewise, normal(1, 8, 8, 4), tile=4, rounds=-1)


def test_a_failure_leaves_no_statistics_behind(vae):
    with pytest.raises(ValueError, match="multiples"):
        measured(vae.encode)(normal(1, 5, 5, 3), np.ones((5, 5), "float32"), ())
    assert GroupNormStatistics.current() is None


def test_a_compiled_function_is_traced_twice(vae):
    """Without given statistics, and with them."""
    traced = []

    @tf.function(autograph=False)
    def decode(latents, shares, given):
        traced.append(latents.shape)
        return measured(vae.decode)(latents, shares, given)

    latents = normal(1, 11, 14, 4)
    compiled = tiled_decode(vae, latents, tile=6, decode=decode)
    assert len(traced) == 2
    np.testing.assert_allclose(compiled, tiled_decode(vae, latents, tile=6), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "received"),
    [({"pixels": normal(1, 15, 16, 3)}, "height 15"), ({"tile": 9}, "tile 9"), ({"overlap": 3}, "overlap 3")],
)
def test_sizes_that_are_no_multiples_are_refused(placewise, settings, received):
    settings = {"pixels": normal(1, 16, 16, 3), "tile": 8, **settings}
    with pytest.raises(ValueError, match=f"tiled_encode: received {received}, expected multiples of 2"):
        tiled_encode(placewise, **settings)


@pytest.mark.parametrize(("tile", "overlap"), [(8, 8), (8, -1), (0, None)])
def test_overlaps_that_are_no_smaller_than_a_tile_are_refused(placewise, tile, overlap):
    with pytest.raises(
        ValueError, match=f"tile of {tile} latents and an overlap of .*, expected 0 <= overlap < tile"
    ):
        tiled_decode(placewise, normal(1, 16, 16, 4), tile=tile, overlap=overlap)


def test_an_autoencoder_with_skips_has_no_tiles_of_latents():
    skipping = AutoencoderKL((2, 2), (0, 0), groups=1, attention=False, skips=True)
    with pytest.raises(ValueError, match="expected a picture"):
        tiled_decode(skipping, normal(1, 4, 4, 4), tile=2)
