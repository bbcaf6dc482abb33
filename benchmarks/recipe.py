"""What schedule, target, weight, times and optimizer do for the default preset, at equal steps, over several seeds.

python cup3.py
python benchmarks/recipe.py --vae-from runs/paper-flowers --epochs 11 --seeds 0 1
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.runs import rows_of

VELOCITY = {"diffusion.target": "velocity"}
# The first is the preset's own; what a recipe does not name is the preset's.
RECIPES = {
    "cosine, image, none": {},
    "cosine, velocity, none": VELOCITY,
    "cosine, velocity, min-snr": {**VELOCITY, "diffusion.weight": "min-snr"},
    "cosine, velocity, uncertainty": {**VELOCITY, "diffusion.weight": "uncertainty"},
    "cosine, noise, none": {"diffusion.target": "noise"},
    "cosine, noise, min-snr": {"diffusion.target": "noise", "diffusion.weight": "min-snr"},
    "flow, flow, none": {"diffusion.schedule": "flow", "diffusion.target": "flow"},
    "edm, edm, edm": {
        "diffusion.schedule": "edm",
        "diffusion.target": "edm",
        "diffusion.weight": "edm",
        "training.times": "log_normal",
    },
    "cosine, velocity, none, uniform times": {**VELOCITY, "training.times": "uniform"},
    "cosine, velocity, none, mixed times": {**VELOCITY, "training.times": "mixed"},
    "cosine, velocity, none, adamw": {
        **VELOCITY,
        "training.optimizer": "adamw",
        "training.learning-rate": 1.5e-3,
    },
}
HEADS = ("recipe", "KID", "petal colour", "centre colour", "petals", "minutes")


@dataclass(frozen=True)
class Options:
    """Train the U-Net of the default preset by several recipes on one autoencoder, and compare."""

    vae_from: str = "runs/paper-flowers"  # run with the trained autoencoder
    data: str = "dataset/paper_flowers"  # its data
    out: str = "runs/recipe"  # folder of the runs that are made
    epochs: int = 11  # passes over the training pictures
    seeds: tuple[int, ...] = (0, 1)  # each recipe is trained once for each
    recipes: tuple[str, ...] = tuple(RECIPES)  # which of them


def main(options):
    """Trains each recipe (a run that is finished already is only read) and prints a table in Markdown.

    KID is that of each seed; the shares of pictures that follow their caption, and the minutes, are means over seeds.
    """
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for name in options.recipes:
        ends = [_trained(name, seed, options) for seed in options.seeds]
        kids = ", ".join(f"{last['val_kid']:.4f}" for last, _ in ends)
        followed = np.mean(
            [[probe[key] for key in ("petal_color", "center_color", "petals")] for _, probe in ends], 0
        )
        shares = " | ".join(f"{share:.1%}" for share in followed)
        minutes = np.mean([last["seconds"] for last, _ in ends]) / 60
        print(f"| {name} | {kids} | {shares} | {minutes:.1f} |", flush=True)


def _trained(name, seed, options):
    """The last row of the log of that training, and its row of the probe."""
    run = Path(options.out) / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    flags = {
        "run": run,
        "data": options.data,
        "vae-from": options.vae_from,
        "seed": seed,
        "epochs": options.epochs,
        "evaluation.every": options.epochs,
        **RECIPES[name],
    }
    rows = rows_of("train", flags)
    return rows[-2], rows[-1]


if __name__ == "__main__":
    main(tyro.cli(Options))
