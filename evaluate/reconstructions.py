"""Sheets that show what an autoencoder does to pictures, and what it makes of noise."""

import numpy as np

from generate import captioned_grid
from metrics import psnr

AMPLIFIED = 4  # times the difference is shown, the same in every epoch so that they compare
SAMPLES_A_ROW = 8


def reconstruction_sheet(images, rebuilt):
    """A row of pictures, below it their reconstructions with PSNR, below it what is between them.

    The difference is the absolute one, `AMPLIFIED` times and clipped at white, channel by channel: black is no error.

    Args:
        images: uint8 (N, H, W, 3).
        rebuilt: their reconstructions, of the same shape.

    Returns:
        A PIL image.

    Raises:
        ValueError: dtypes or shapes that do not fit, or no picture.
    """
    decibels = [psnr(images[i : i + 1], rebuilt[i : i + 1]).value for i in range(max(1, len(images)))]
    difference = np.abs(images.astype("int32") - rebuilt)
    difference = np.minimum(AMPLIFIED * difference, 255).astype("uint8")
    captions = [
        *(["input"] * len(images)),
        *(f"rebuilt, {value:.1f} dB" for value in decibels),
        *([f"difference x {AMPLIFIED}"] * len(images)),
    ]
    return captioned_grid([*images, *rebuilt, *difference], captions, columns=len(images), lines=1)


def prior_sheet(images):
    """Decoded draws from the prior of the latents, as a captioned grid.

    Args:
        images: uint8 (N, H, W, 3).

    Returns:
        A PIL image.
    """
    captions = [f"prior sample {number}" for number in range(1, len(images) + 1)]
    return captioned_grid(images, captions, columns=SAMPLES_A_ROW, lines=1)
