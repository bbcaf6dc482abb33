"""Encodes and decodes pictures of any size in the memory of one tile.

The tiles overlap and are blended by linear ramps, which hide that each is padded with zeros at its borders. The
autoencoder normalises by means and variances over a picture (`model.common.GroupNorm`), which a tile alone cannot know;
so tiles are first only measured, and normalised by the statistics of all of them together. What remains of the
difference from the whole picture is that attention, if there is any, looks around within a tile.
"""

import math

import numpy as np
from keras import ops

from model.common import Statistics, pooled

ROUNDS = 2


def tiled_encode(vae, pixels, tile=512, overlap=None, rounds=ROUNDS, encode=None):
    """The moments of a large picture's unit-scale latents, like `AutoencoderKL.encode`.

    The tiles are computed one after another and gathered in the host's memory, so call it eagerly. They are all of one
    shape, so a compiled `encode` is traced twice.

    Args:
        vae: the `model.vae.AutoencoderKL`.
        pixels: (B, H, W, 3) in -1..1; any height and width that are multiples of the autoencoder's factor.
        tile: side of a tile in pixels; a picture that is smaller has tiles as small as itself.
        overlap: of neighbouring tiles in pixels, at least; None is a quarter of a tile.
        rounds: how often all tiles are measured before they are computed, which takes as long each time; 0 normalises
            each by itself. The first norm is exact after one round, the next after two; `ROUNDS` are nearly
            enough for all.
        encode: the function that encodes a tile, such as `tf.function(measured(vae.encode))`; None is
            `measured(vae.encode)`.

    Returns:
        Mean and log-variance, numpy (B, h, w, C) each.

    Raises:
        ValueError: sizes that are not multiples of the factor, or an overlap that is not smaller than a tile.
    """
    factor, encode = vae.factor, encode or measured(vae.encode)
    _, height, width, _ = pixels.shape
    sizes = {"height": height, "width": width, "tile": tile, "overlap": overlap or 0}
    if any(size % factor for size in sizes.values()):
        received = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"tiled_encode: received {received}, expected multiples of {factor}")

    def moments_of(rows, columns, shares, given):
        (mean, logvar), taken = encode(
            pixels[:, _scaled(rows, factor), _scaled(columns, factor)], shares, given
        )
        return ops.concatenate([mean, logvar], axis=-1), taken

    latent_overlap = None if overlap is None else overlap // factor
    places = _places(height // factor, width // factor, tile // factor, latent_overlap, factor)
    return tuple(np.split(_blended(moments_of, places, rounds, scale=1), 2, axis=-1))


def tiled_decode(vae, latents, tile=64, overlap=None, rounds=ROUNDS, decode=None):
    """Unit-scale latents of any size -> pixels, like `AutoencoderKL.decode`; see `tiled_encode`.

    Args:
        vae: the `model.vae.AutoencoderKL`.
        latents: (B, h, w, C).
        tile: side of a tile in latents.
        overlap: of neighbouring tiles in latents, at least; None is a quarter of a tile.
        rounds: see `tiled_encode`.
        decode: the function that decodes a tile, or None for `measured(vae.decode)`.

    Returns:
        Pixels, numpy (B, H, W, 3) in -1..1.

    Raises:
        ValueError: an overlap that is not smaller than a tile, or an autoencoder with skip connections.
    """
    decode = decode or measured(vae.decode)
    _, height, width, _ = latents.shape

    def pixels_of(rows, columns, shares, given):
        return decode(latents[:, rows, columns], shares, given)

    places = _places(height, width, tile, overlap, vae.factor)
    return _blended(pixels_of, places, rounds, scale=vae.factor)


def measured(function):
    """A function of a tile that also measures what its norms see.

    Args:
        function: such as `vae.decode`.

    Returns:
        (values, shares (H, W), given) -> (function(values), what `model.common.Statistics` has taken), where `given` is
        empty or such a list. With shares of None nothing is taken or given.
    """

    def measuring(values, shares, given):
        if shares is None:
            return function(values), []
        with Statistics(shares, given) as statistics:
            result = function(values)
        return result, statistics.taken

    return measuring


def _blended(compute, places, rounds, scale):
    """The outcome of `compute` of every tile as one array (B, H, W, channels).

    Args:
        compute: (rows, columns, shares, given) -> the outcome (B, t, t, channels), and what was taken, see `measured`.
        places: of the tiles, from `_places`.
        rounds: how often they are measured before.
        scale: pixels of the outcome a latent, along a side.
    """
    if len(places) == 1:
        rows, columns, _ = places[0]
        return ops.convert_to_numpy(compute(rows, columns, None, ())[0])
    given = ()
    for _ in range(rounds):
        given = _together([compute(*place, given)[1] for place in places], [place[2] for place in places])
    whole, (last_rows, last_columns, _) = None, places[-1]
    for rows, columns, shares in places:
        part = ops.convert_to_numpy(compute(rows, columns, shares, given)[0])
        if whole is None:
            size = scale * last_rows.stop, scale * last_columns.stop
            whole = np.zeros((len(part), *size, part.shape[-1]), "float32")
        own = ops.convert_to_numpy(pooled(shares, *part.shape[1:3]))
        whole[:, _scaled(rows, scale), _scaled(columns, scale)] += own[..., None] * part
    return whole


def _together(taken, shares):
    """The means and variances over all tiles of each norm, from those of each tile and its shares."""
    weights = np.array([np.sum(part, dtype="float64") for part in shares])
    weights = (weights / weights.sum())[:, None, None]
    statistics = []
    for of_norm in zip(*taken, strict=True):
        means, variances = (
            np.stack([np.asarray(ops.convert_to_numpy(part), "float64") for part in parts])
            for parts in zip(*of_norm, strict=True)
        )
        mean = np.sum(weights * means, axis=0)
        variance = np.sum(weights * (variances + np.square(means - mean)), axis=0)
        statistics.append((mean.astype("float32"), variance.astype("float32")))
    return statistics


def _places(height, width, tile, overlap, factor):
    """The tiles: rows and columns of each, slices of latents, and the shares of its pixels (H, W), 1 in all."""
    overlap = tile // 4 if overlap is None else overlap
    if not 0 <= overlap < tile:
        raise ValueError(
            f"tiles: received a tile of {tile} latents and an overlap of {overlap}, expected "
            "0 <= overlap < tile"
        )
    return [
        (rows, columns, row_shares[:, None] * column_shares)
        for rows, row_shares in _tiles(height, tile, overlap, factor)
        for columns, column_shares in _tiles(width, tile, overlap, factor)
    ]


def _tiles(length, tile, overlap, scale):
    """The tiles along one side: the slice of each, and its share of the outcome at each of its places.

    They are evenly spaced, and as few as the overlap allows, which so becomes larger rather than a tile smaller.
    """
    side = min(tile, length)
    count = 1 + math.ceil((length - side) / (tile - overlap))
    starts = np.rint(np.linspace(0, length - side, count)).astype(int)
    slices = [slice(int(start), int(start) + side) for start in starts]
    shares = _shares(scale * starts, scale * (starts + side))
    return [
        (tile_slice, row[_scaled(tile_slice, scale)]) for tile_slice, row in zip(slices, shares, strict=True)
    ]


def _shares(starts, stops):
    """The share of each tile at each place of a side, (tiles, places): linear ramps that add up to 1 everywhere."""
    places = np.arange(stops[-1]) + 0.5
    ramps = np.ones((len(starts), len(places)))
    for index in range(1, len(starts)):
        start, stop = starts[index], stops[index - 1]  # of the overlap of two neighbours
        rising = (places - start) / max(stop - start, 1e-6)  # without overlap a step
        ramps[index] = np.minimum(ramps[index], rising)
        ramps[index - 1] = np.minimum(ramps[index - 1], 1.0 - rising)
    ramps = np.clip(ramps, 0.0, 1.0)
    return (ramps / ramps.sum(axis=0)).astype("float32")


def _scaled(place, scale):
    return slice(scale * place.start, scale * place.stop)
