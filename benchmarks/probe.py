"""How often the probe reads a paper flower's attributes right, as drawn and after damage.

python benchmarks/probe.py --count 1500
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import tyro
from PIL import Image, ImageFilter

from dataset import probe
from dataset._drawing import draw
from dataset._flower import sample_flower


@dataclass(frozen=True)
class Options:
    """Measure the probe on freshly drawn flowers."""

    count: int = 1500  # flowers
    size: int = 64  # side in pixels
    seed: int = 20261  # of the flowers and the damage


def _damaged(image, rng, blur, noise):
    picture = Image.fromarray(image).filter(ImageFilter.GaussianBlur(blur))
    values = np.asarray(picture) + rng.normal(0, noise, image.shape)
    return np.clip(values + 0.5, 0, 255).astype("uint8")


def _compressed(image, rng):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=50)
    return np.asarray(Image.open(file))


DAMAGES = {
    "as drawn": lambda image, rng: image,
    "blurred (sigma 0.8 px) and noisy (sigma 4)": lambda image, rng: _damaged(image, rng, 0.8, 4),
    "blurred (sigma 1.5 px) and noisy (sigma 6)": lambda image, rng: _damaged(image, rng, 1.5, 6),
    "JPEG of quality 50": _compressed,
}


def main(options):
    """Prints a table in Markdown."""
    rng = np.random.default_rng(options.seed)
    flowers = [sample_flower(rng) for _ in range(options.count)]
    images = [draw(flower, options.size) for flower in flowers]
    print("| pictures | petal colour | centre colour | petals |\n|---|---|---|---|")
    for name, damage in DAMAGES.items():
        read = probe.read([damage(image, rng) for image in images])
        pairs = (
            (read.petal_colors, [flower.petal_color for flower in flowers]),
            (read.center_colors, [flower.center_color for flower in flowers]),
            (read.petals, [flower.petals for flower in flowers]),
        )
        shares = [np.mean([a == b for a, b in zip(*pair, strict=True)]) for pair in pairs]
        print(f"| {name} | {' | '.join(f'{share:.1%}' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
