"""What the guard saves: an autoencoder trained alone, and against a discriminator that counts 50 times too much.

python benchmarks/guard.py --data path/to/pictures --json guard.json
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.runs import rows_of
from files import atomic_file

USUAL, TIMES = 0.5, 50
RUNS = {
    "no discriminator": {},
    "usual weight": {"adversarial.weight": USUAL},
    f"{TIMES} times the weight": {"adversarial.weight": USUAL * TIMES, "adversarial.no-guard": None},
    f"{TIMES} times the weight, guarded": {"adversarial.weight": USUAL * TIMES},
}
SHOWN = ("val_psnr", "val_ssim", "val_perceptual", "val_rkid")


@dataclass(frozen=True)
class Options:
    """Train the same autoencoder four times, and compare what is left of held-out pictures."""

    data: str = "dataset/paper_flowers"  # folder of pictures
    out: str = "runs/guard"  # folder of the runs that are made
    image_size: int = 64  # side in pixels
    epochs: int = 12  # of `steps` steps
    steps: int = 150
    start: int = 600  # steps before the discriminator begins
    json: str | None = None  # file for the rows of all runs


def main(options):
    """Trains each (a run that is finished already is only read) and prints a table in Markdown of the last epochs."""
    found = {}
    print(f"| run | {' | '.join(SHOWN)} | guard's actions |\n|{'---|' * (len(SHOWN) + 2)}")
    for name, flags in RUNS.items():
        found[name] = rows_of("train-vae", _flags(name, options) | flags)
        last = found[name][-1]
        numbers = (f"{last[key]:.4g} [{last[f'{key}_low']:.4g}, {last[f'{key}_high']:.4g}]" for key in SHOWN)
        actions = sum("guard" in row for row in found[name])
        print(f"| {name} | {' | '.join(numbers)} | {actions} |", flush=True)
    if options.json:
        with atomic_file(Path(options.json)) as file:
            file.write(json.dumps(found).encode())


def _flags(name, options):
    return {
        "run": Path(options.out) / name.replace(",", "").replace(" ", "-"),
        "data": options.data,
        "image-size": options.image_size,
        "vae-training.epochs": options.epochs,
        "vae-training.steps-per-epoch": options.steps,
        "vae-training.measure-every": options.epochs,
        "adversarial.start": options.start,
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
