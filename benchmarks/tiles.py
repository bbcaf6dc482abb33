"""What tiles do to large pictures: how far neighbours disagree, and all of them together with the picture made whole.

python cup3.py
python benchmarks/tiles.py --run runs/paper-flowers
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from checkpoint import RunFolder, assign, named_variables
from config import from_dict
from dataset import paper_flowers
from errors import InputError
from generate import make_vae
from input_pipeline import load_data, read_pictures, to_pixels
from model.common import GroupNormStatistics
from model.tiling import measured, tiled_decode


@dataclass(frozen=True)
class Options:
    """Decode large pictures in tiles with more and more rounds; prints a table in Markdown, in 1/255 of the range."""

    run: str = "runs/paper-flowers"  # folder of the run
    pictures: str | None = None  # folder of pictures; None: paper flowers, drawn for it
    tile: int = 32  # side of a tile in latents
    overlap: int = 16  # of neighbouring tiles in latents
    across: int = 2  # tiles along each side of a picture
    count: int = 4  # pictures


def main(options):
    """Prints the table; returns the exit code, 2 for what the user gave."""
    try:
        check(options)
        vae = read_vae(options.run)
        print("| rounds | neighbours | whole picture | its worst pixel |\n|---|---|---|---|")
        for rounds, (seam, mean, worst) in measure(vae, options).items():
            print(f"| {rounds} | {seam:.3f} | {mean:.2f} | {worst:.1f} |", flush=True)
    except InputError as error:
        print(f"tiles: {error}", file=sys.stderr)
        return 2
    return 0


def check(options):
    """Raises InputError for settings that cannot be."""
    for name, least in (("tile", 2), ("across", 2), ("count", 1)):
        if getattr(options, name) < least:
            raise InputError(f"--{name}: received {getattr(options, name)}, expected at least {least}")
    if options.overlap % 2 or not 2 <= options.overlap < options.tile:
        raise InputError(
            f"--overlap: received {options.overlap}, expected an even number from 2 on below --tile {options.tile}"
        )


def read_vae(folder):
    """The autoencoder of a run."""
    run = RunFolder.read(folder)
    config, kept = from_dict(run.config), run.finished("vae")
    if kept is None or config.vae.skips:
        raise InputError(f"--run: received {folder}, expected one with a finished autoencoder without skips")
    vae = make_vae(config)
    assign(named_variables(vae), kept.tensors, "vae", source=run.path)
    return vae


def large_pictures(options, side):
    """Pixels (N, side, side, 3) in -1..1."""
    with tempfile.TemporaryDirectory() as drawn:
        folder = options.pictures or Path(drawn) / "flowers"
        if options.pictures is None:
            size = min(side, paper_flowers.LARGEST_SIZE)
            paper_flowers.write(folder, train=options.count, test=1, size=size, progress=False)
        paths = load_data(folder, "none").paths[: options.count]
        return to_pixels(read_pictures(paths, side, progress=False))


def measure(vae, options):
    """(Disagreement of neighbours, mean difference from the whole, that of its worst pixel), of 255, by rounds.

    Each is the mean over all pictures.
    """
    side = vae.factor * (options.tile + (options.across - 1) * (options.tile - options.overlap))
    encode, decode = tf.function(vae.encode), tf.function(measured(vae.decode))
    found = {}
    for picture in np.asarray(large_pictures(options, side)):
        latents = encode(picture[None])[0].numpy()
        whole = vae.decode(latents).numpy()
        with GroupNormStatistics(np.ones(whole.shape[1:3], "float32")) as statistics:
            vae.decode(latents)
        for rounds in (0, 1, 2, 3, len(statistics.taken)):
            seam, tiled = seams(latents, options, rounds, decode, vae)
            difference = np.abs(tiled - whole)
            found.setdefault(rounds, []).append((seam, difference.mean(), difference.max()))
    return {rounds: 127.5 * np.mean(rows, axis=0) for rounds, rows in found.items()}


def seams(latents, options, rounds, decode, vae):
    """How far the first two tiles disagree where both count alike, and the pixels of all tiles together.

    That is in the middle of what they share, over the width of a latent to either side.
    """
    made = []

    def keeping(*arguments):
        pixels, taken = decode(*arguments)
        made.append(pixels.numpy())
        return pixels, taken

    tiled = tiled_decode(vae, latents, options.tile, options.overlap, rounds, keeping)
    left, right = made[-(options.across**2) :][:2]
    middle = vae.factor * options.overlap // 2
    from_left = left[:, :, left.shape[2] - middle - vae.factor :][:, :, : 2 * vae.factor]
    from_right = right[:, :, middle - vae.factor :][:, :, : 2 * vae.factor]
    return np.abs(from_left - from_right).mean(), tiled


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
