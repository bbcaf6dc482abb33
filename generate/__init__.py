"""The one way to get an image: prompts -> images, as an iterable over networks in memory.

The command line, previews in training, evaluation and the web page all call it.
"""

from generate.networks import (
    Networks,
    chosen_weights,
    lead_away,
    load,
    make_diffusion,
    make_vae,
    rebuilt_average,
    snapshots_of,
    trained_weights,
    with_weak,
)
from generate.painter import Painter, drawing, noise_of, to_images
from generate.requests import between, generate, write_pictures
from generate.sheets import Picture, captioned_grid, save_gif, save_png
from generate.ways import Way

__all__ = [
    "Networks",
    "Painter",
    "Picture",
    "Way",
    "between",
    "captioned_grid",
    "chosen_weights",
    "drawing",
    "generate",
    "lead_away",
    "load",
    "make_diffusion",
    "make_vae",
    "noise_of",
    "rebuilt_average",
    "save_gif",
    "save_png",
    "snapshots_of",
    "to_images",
    "trained_weights",
    "with_weak",
    "write_pictures",
]
