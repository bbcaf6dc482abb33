"""What the optimizer (with a learning rate of its own) and the times do for the default preset, at equal steps.

python cup3.py
python benchmarks/recipe.py --vae-from runs/paper-flowers --epochs 9
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
VARIANTS = {  # muon at the preset's own learning rate, adamw at one that suits it
    "adamw, uniform": {"optimizer": "adamw", "learning-rate": 1.5e-3, "times": "uniform"},
    "muon, uniform": {"optimizer": "muon", "times": "uniform"},
    "muon, logit_normal": {"optimizer": "muon", "times": "logit_normal"},
}


@dataclass(frozen=True)
class Options:
    """Train the U-Net of the default preset by several recipes on one autoencoder, and compare."""

    vae_from: str = "runs/paper-flowers"  # run with the trained autoencoder
    out: str = "runs/recipe"  # folder of the runs that are made
    epochs: int = 9  # passes over the training pictures


def main(options):
    """Trains each variant (one that is finished already is only read) and prints a table in Markdown."""
    heads = ("recipe", "validation loss", "KID", "petal colour", "centre colour", "petals", "minutes")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, flags in VARIANTS.items():
        run = Path(options.out) / name.replace(", ", "-")
        words = ["--run", run, "--vae-from", options.vae_from, "--epochs", options.epochs]
        words += ["--evaluation.every", options.epochs]
        words += [word for flag, value in flags.items() for word in (f"--training.{flag}", value)]
        subprocess.run(
            [sys.executable, ROOT / "cup3.py", *map(str, words)], check=True, stdout=subprocess.DEVNULL
        )
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        last, probe = rows[-2], rows[-1]
        shares = " | ".join(f"{probe[key]:.1%}" for key in ("petal_color", "center_color", "petals"))
        kid = f"{last['val_kid']:.3f} [{last['val_kid_low']:.3f}, {last['val_kid_high']:.3f}]"
        print(
            f"| {name} | {last['val_loss']:.3f} | {kid} | {shares} | {last['seconds'] / 60:.1f} |", flush=True
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
