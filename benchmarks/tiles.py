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
from input_pipeline import read_pictures, to_pixels
from model.common import Statistics
from model.tiling import measured, tiled_decode

SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Options:
    """Decode large pictures in tiles with more and more rounds; prints a table in Markdown, in 1/255 of the range."""

    run: str = "runs/paper-flowers"  # folder of the run
    pictures: str | None = None  # folder of pictures; None: paper flowers, drawn for it
    side: int = 512  # of the pictures in pixels, to which they are cut and resized
    tile: int = 32  # side of a tile in latents
    count: int = 4  # pictures


def main(options):
    """Prints the table; returns the exit code, 2 for what the user gave."""
    try:
        vae, pictures = read_vae(options.run), large_pictures(options)
        step = vae.factor * options.tile // 2
        if options.tile % 2 or options.side % step or options.side <= 2 * step:
            raise InputError(
                f"--side: received {options.side} with tiles of {options.tile} latents, expected a multiple of {step}, "
                "half a tile, above a tile"
            )
        print("| rounds | neighbours | whole picture | its worst pixel |\n|---|---|---|---|")
        for rounds, (seam, mean, worst) in measure(vae, pictures, options.tile).items():
            print(f"| {rounds} | {seam:.3f} | {mean:.2f} | {worst:.1f} |", flush=True)
    except InputError as error:
        print(f"tiles: {error}", file=sys.stderr)
        return 2
    return 0


def read_vae(run):
    run = RunFolder.read(run)
    vae = make_vae(from_dict(run.config))
    assign(named_variables(vae), run.finished("vae").tensors, "vae", source=run.path)
    return vae


def large_pictures(options):
    """Pixels (N, side, side, 3) in -1..1."""
    with tempfile.TemporaryDirectory() as drawn:
        folder = options.pictures or Path(drawn) / "flowers"
        if options.pictures is None:
            paper_flowers.write(folder, train=options.count, test=1, size=options.side, progress=False)
        paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise InputError(f"--pictures: received {folder}, expected a folder with {', '.join(SUFFIXES)}")
        return to_pixels(read_pictures(paths[: options.count], options.side, progress=False))


def measure(vae, pictures, tile):
    """(Disagreement of neighbours, mean difference from the whole, largest difference), of 255, by rounds."""
    encode, decode = tf.function(vae.encode), tf.function(measured(vae.decode))
    found = {}
    for picture in np.asarray(pictures):
        latents = encode(picture[None])[0].numpy()
        whole = tf.function(vae.decode)(latents).numpy()
        with Statistics(np.ones(whole.shape[1:3], "float32")) as statistics:
            vae.decode(latents)
        for rounds in (0, 1, 2, 3, len(statistics.taken)):
            seam, tiled = seams(latents, tile, rounds, decode, vae)
            difference = np.abs(tiled - whole)
            found.setdefault(rounds, []).append((seam, difference.mean(), difference.max()))
    return {rounds: 127.5 * np.mean(rows, axis=0) for rounds, rows in found.items()}


def seams(latents, tile, rounds, decode, vae):
    """How far the first two tiles disagree where both count alike, and the pixels of all tiles together.

    That is in the middle of the half that they share, over the width of a latent to either side.
    """
    made = []

    def keeping(*arguments):
        pixels, taken = decode(*arguments)
        made.append(pixels.numpy())
        return pixels, taken

    tiled = tiled_decode(vae, latents, tile, overlap=tile // 2, rounds=rounds, decode=keeping)
    left, right = made[len(made) * rounds // (rounds + 1) :][:2]
    quarter = vae.factor * tile // 4
    from_left, from_right = (
        pixels[:, :, at - vae.factor : at + vae.factor]
        for pixels, at in ((left, 3 * quarter), (right, quarter))
    )
    return np.abs(from_left - from_right).mean(), tiled


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
