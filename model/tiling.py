"""Encodes and decodes pictures of any size in the memory of one tile.

The autoencoder normalises by means and variances over a picture (`model.common.GroupNorm`), which a tile alone cannot
know; so tiles are first only measured, and then normalised by the statistics of all of them together. What remains of
the difference from the whole picture: each tile is padded with zeros at its borders, which linear ramps over the
overlaps blend away as far as those are wide; and attention, if there is any, looks around within a tile.
"""

import math
from typing import NamedTuple

import numpy as np
from keras import ops

from model.common import GroupNormStatistics, pooled

ROUNDS = 2
SEEN = 16  # latents of overlap, in whose middle little is seen of the zeros at the borders


def tiled_encode(vae, pixels, tile=512, overlap=None, rounds=ROUNDS, encode=None):
    """The moments of a large picture's unit-scale latents, like `AutoencoderKL.encode`.

    The tiles are computed one after another and gathered in the host's memory, so call it eagerly. They are all of one
    shape, so a compiled `encode` is traced twice.

    Args:
        vae: the `model.vae.AutoencoderKL`.
        pixels: (B, H, W, 3) in -1..1; any height and width that are multiples of the autoencoder's factor.
        tile: side of a tile in pixels; a picture that is smaller has tiles as small as itself.
        overlap: of neighbouring tiles in pixels, at least; None is a quarter of a tile and 16 latents, at most half.
        rounds: how often all tiles are measured before they are computed, which takes as long each time; 0 normalises
            each by itself. After one round neighbours are normalised alike; the picture's tone is exact after as
            many as there are norms, and after `ROUNDS` near it (`benchmarks/tiles.py`).
        encode: the function that encodes a tile, such as `tf.function(measured(vae.encode))`; None is
            `measured(vae.encode)`.

    Returns:
        Mean and log-variance, numpy (B, h, w, C) each.

    Raises:
        ValueError: sizes that are not multiples of the factor, an overlap that is not smaller than a tile, or `rounds`
            below 0.
    """
    factor, encode = vae.factor, encode or measured(vae.encode)
    _, height, width, _ = pixels.shape
    sizes = {"height": height, "width": width, "tile": tile, "overlap": overlap or 0}
    wrong = {name: size for name, size in sizes.items() if size % factor}
    if wrong:
        received = ", ".join(f"{name} {size}" for name, size in wrong.items())
        raise ValueError(f"tiled_encode: received {received}, expected multiples of {factor}")

    def moments_of(rows, columns, weights, given):
        (mean, logvar), taken = encode(
            pixels[:, _scaled(rows, factor), _scaled(columns, factor)], weights, given
        )
        return ops.concatenate([mean, logvar], axis=-1), taken

    latent_overlap = None if overlap is None else overlap // factor
    grid = _grid(height // factor, width // factor, tile // factor, latent_overlap, factor)
    return tuple(np.split(_blended(moments_of, grid, rounds, scale=1), 2, axis=-1))


def tiled_decode(vae, latents, tile=64, overlap=None, rounds=ROUNDS, decode=None):
    """Unit-scale latents of any size -> pixels, like `AutoencoderKL.decode`; see `tiled_encode`.

    Args:
        vae: the `model.vae.AutoencoderKL`.
        latents: (B, h, w, C).
        tile: side of a tile in latents.
        overlap: of neighbouring tiles in latents, at least; None is a quarter of a tile and 16, at most half.
        rounds: see `tiled_encode`.
        decode: the function that decodes a tile, or None for `measured(vae.decode)`.

    Returns:
        Pixels, numpy (B, H, W, 3) in -1..1.

    Raises:
        ValueError: an overlap that is not smaller than a tile, `rounds` below 0, or an autoencoder with skip
            connections.
    """
    decode = decode or measured(vae.decode)
    _, height, width, _ = latents.shape

    def pixels_of(rows, columns, weights, given):
        return decode(latents[:, rows, columns], weights, given)

    return _blended(pixels_of, _grid(height, width, tile, overlap, vae.factor), rounds, scale=vae.factor)


def measured(function):
    """A function of a tile that also measures what its norms see.

    Args:
        function: such as `vae.decode`, not compiled: compile what comes out.

    Returns:
        (values, weights (H, W), given) -> (function(values), what `model.common.GroupNormStatistics` has taken), where
        `given` is empty or such a list. With weights of None nothing is taken or given.
    """

    def measuring(values, weights, given):
        if weights is None:
            return function(values), []
        with GroupNormStatistics(weights, given) as statistics:
            result = function(values)
        return result, statistics.taken

    return measuring


def _blended(compute, grid, rounds, scale):
    """The outcome of `compute` of every tile as one array (B, H, W, channels).

    Args:
        compute: (rows, columns, weights, given) -> the outcome (B, t, t, channels), and what was taken, see `measured`.
        grid: the tiles, from `_grid`.
        rounds: how often they are measured before.
        scale: pixels of the outcome a latent, along a side.
    """
    if rounds < 0:
        raise ValueError(f"tiles: received {rounds} rounds, expected 0 or more")
    if len(grid) == 1:
        return ops.convert_to_numpy(compute(grid[0].rows, grid[0].columns, None, ())[0])
    given = ()
    for _ in range(rounds):
        given = _together([compute(tile.rows, tile.columns, tile.weights, given)[1] for tile in grid], grid)
    size = scale * grid[-1].rows.stop, scale * grid[-1].columns.stop
    whole = None
    for tile in grid:
        part = ops.convert_to_numpy(compute(tile.rows, tile.columns, tile.weights, given)[0])
        if whole is None:
            whole = np.zeros((len(part), *size, part.shape[-1]), "float32")
        weights = ops.convert_to_numpy(pooled(tile.weights, *part.shape[1:3]))
        whole[:, _scaled(tile.rows, scale), _scaled(tile.columns, scale)] += weights[..., None] * part
    return whole


def _together(taken, grid):
    """The means and variances over all tiles of each norm, from those of each tile.

    Raises:
        ValueError: the function that computes a tile does not measure it.
    """
    if len({len(of_tile) for of_tile in taken}) != 1:
        raise ValueError("tiles: some were measured and others not; compile measured(function), not function")
    weights = np.array([np.sum(tile.weights, dtype="float64") for tile in grid])
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


class _Tile(NamedTuple):
    """A tile: slices of latents, and how much its pixels count along either side, 1 in all tiles together."""

    rows: slice
    columns: slice
    row_shares: np.ndarray
    column_shares: np.ndarray

    @property
    def weights(self):
        """Of its pixels, (H, W)."""
        return self.row_shares[:, None] * self.column_shares


def _grid(height, width, tile, overlap, factor):
    """The tiles of a picture of latents, row by row."""
    overlap = max(tile // 4, min(SEEN, tile // 2)) if overlap is None else overlap
    if not 0 <= overlap < tile:
        raise ValueError(
            f"tiles: received a tile of {tile} latents and an overlap of {overlap}, expected "
            "0 <= overlap < tile"
        )
    return [
        _Tile(rows, columns, row_shares, column_shares)
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
