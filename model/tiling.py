"""Encodes and decodes pictures of any size in the memory of one tile.

The tiles overlap and are blended by linear ramps. What a tile cannot see is what remains of the difference from the
whole picture: the autoencoder normalises by the statistics of the tile (`model.common.GroupNorm`), attends within it,
and pads its borders with zeros. The ramps hide the borders; tiles that are small beside the picture's larger shapes
may still differ in colour or contrast, for which larger tiles are the remedy.
"""

import math

import numpy as np
from keras import ops


def tiled_encode(vae, pixels, tile=512, overlap=None, encode=None):
    """The moments of a large picture's unit-scale latents, like `AutoencoderKL.encode`.

    The tiles are computed one after another and gathered in the host's memory, so call it eagerly. They are all of one
    shape, so a compiled `encode` is traced once.

    Args:
        vae: the `model.vae.AutoencoderKL`.
        pixels: (B, H, W, 3) in -1..1; any height and width that are multiples of the autoencoder's factor.
        tile: side of a tile in pixels; a picture that is smaller has tiles as small as itself.
        overlap: of neighbouring tiles in pixels, at least; None is a quarter of a tile.
        encode: the function that encodes a tile, such as `tf.function(vae.encode)`; None is `vae.encode`.

    Returns:
        Mean and log-variance, numpy (B, h, w, C) each.

    Raises:
        ValueError: sizes that are not multiples of the factor, or an overlap that is not smaller than a tile.
    """
    factor, encode = vae.factor, encode or vae.encode
    _, height, width, _ = pixels.shape
    sizes = {"height": height, "width": width, "tile": tile, "overlap": overlap or 0}
    if any(size % factor for size in sizes.values()):
        received = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"tiled_encode: received {received}, expected multiples of {factor}")

    def moments_of(rows, columns):
        mean, logvar = encode(pixels[:, _scaled(rows, factor), _scaled(columns, factor)])
        return ops.concatenate([mean, logvar], axis=-1)

    latent_overlap = None if overlap is None else overlap // factor
    moments = _blended(moments_of, height // factor, width // factor, tile // factor, latent_overlap)
    return tuple(np.split(moments, 2, axis=-1))


def tiled_decode(vae, latents, tile=64, overlap=None, decode=None):
    """Unit-scale latents of any size -> pixels, like `AutoencoderKL.decode`; see `tiled_encode`.

    Args:
        vae: the `model.vae.AutoencoderKL`.
        latents: (B, h, w, C).
        tile: side of a tile in latents.
        overlap: of neighbouring tiles in latents, at least; None is a quarter of a tile.
        decode: the function that decodes a tile, or None for `vae.decode`.

    Returns:
        Pixels, numpy (B, H, W, 3) in -1..1.

    Raises:
        ValueError: an overlap that is not smaller than a tile, or an autoencoder with skip connections.
    """
    decode = decode or vae.decode
    _, height, width, _ = latents.shape

    def pixels_of(rows, columns):
        return decode(latents[:, rows, columns])

    return _blended(pixels_of, height, width, tile, overlap, scale=vae.factor)


def _blended(compute, height, width, tile, overlap, scale=1):
    """The outcome of `compute` of every tile, `scale` times as large, as one array (B, H, W, channels).

    Args:
        compute: function of the rows and columns of a tile, slices of latents, -> (B, t, t, channels).
        height, width, tile, overlap: in latents.
    """
    overlap = tile // 4 if overlap is None else overlap
    if not 0 <= overlap < tile:
        raise ValueError(
            f"tiles: received a tile of {tile} latents and an overlap of {overlap}, expected "
            "0 <= overlap < tile"
        )
    whole = None
    for rows, row_shares in _tiles(height, tile, overlap, scale):
        for columns, column_shares in _tiles(width, tile, overlap, scale):
            part = ops.convert_to_numpy(compute(rows, columns))
            if whole is None:
                whole = np.zeros((len(part), scale * height, scale * width, part.shape[-1]), "float32")
            shares = row_shares[:, None, None] * column_shares[:, None]
            whole[:, _scaled(rows, scale), _scaled(columns, scale)] += shares * part
    return whole


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
