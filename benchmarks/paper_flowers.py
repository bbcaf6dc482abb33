"""Measures a trained run on the test part of paper flowers: does the picture follow the sentence, and PSNR.

python benchmarks/paper_flowers.py --run runs/paper-flowers --json paper_flowers.json
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pandas as pd
import tyro

from benchmarks.runs import tell
from config import check_sampling
from dataset.paper_flowers import HELD_OUT_PAIRS, captions, sample_flower
from errors import InputError
from evaluate import follows_captions
from generate import Painter, drawing, load
from input_pipeline import load_data, read_pictures
from metrics import psnr
from trainer import reconstruct


@dataclass(frozen=True)
class Options:
    """Measure a run on the test part of paper flowers."""

    run: str = "runs/paper-flowers"  # folder of the run
    count: int = 256  # sentences
    steps: int | None = None  # sampler steps; default: the run's
    guidance: float | None = None  # strength of guidance; default: the run's
    seed: int = 1000  # of the first picture
    json: str | None = None  # file for the figures


def test_pictures(folder, side):
    """The test pictures of the data folder, uint8 (N, side, side, 3)."""
    table = pd.read_csv(folder / "attributes.csv")
    names = table.loc[table["split"] == "test", "ImagePath"]
    return read_pictures([folder / name for name in names], side, progress=False)


def held_out_captions(count, seed=0):
    """Captions of flowers whose pair of colours training never shows."""
    rng = np.random.default_rng(seed)
    return [captions(sample_flower(rng, HELD_OUT_PAIRS), rng)[0] for _ in range(count)]


def measure(options):
    """The figures of a run.

    Raises:
        InputError: settings that cannot be, a run that cannot draw, or one that was not trained on paper flowers.
    """
    for name in ("count", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name}: received {value}, expected at least 1")
    networks, config = load(options.run)
    data = load_data(config.data)
    if data.test_tokens is None or not (Path(config.data) / "attributes.csv").is_file():
        raise InputError(
            f"--run: received {options.run}, whose data {config.data} are no paper flowers: they have no "
            "attributes.csv or no test captions; expected a run on data that `python cup3.py data` drew"
        )
    settings = drawing(config, steps=options.steps, guidance=options.guidance)
    check_sampling("--", settings["sampler"], settings["spacing"], settings["steps"])
    painter = Painter(networks, config.image_size, config.evaluation.batch_size)
    tests = networks.vocabulary.decode(data.test_tokens[: options.count])
    pictures = test_pictures(Path(config.data), config.image_size)
    return {
        **settings,
        "test captions": follows_captions(painter, tests, options.seed, **settings),
        "held-out pairs": follows_captions(
            painter, held_out_captions(options.count), options.seed, **settings
        ),
        "test PSNR": psnr(pictures, reconstruct(networks.vae, pictures))._asdict(),
    }


def main(options):
    """Tells the figures; returns the exit code, see `benchmarks.runs.tell`."""
    return tell("paper_flowers", measure, options)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
