"""What the strength of guidance, the times it acts at and what it leads away from do to KID and to the sentences.

python cup3.py
python benchmarks/guidance.py --run runs/paper-flowers
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from errors import InputError
from evaluate import follows_captions
from generate import Painter, drawing, load, with_weak
from input_pipeline import load_data, read_pictures, split
from metrics import kid
from model.perceptual import FeatureNetwork
from trainer import reconstruct

SETTINGS = [  # guidance and its interval, autoguidance and the share of the training of its weak model
    (1.0, (0.0, 1.0), 1.0, None),
    (3.0, (0.0, 1.0), 1.0, None),
    (3.0, (0.3, 0.85), 1.0, None),
    (4.0, (0.3, 0.7), 1.0, None),
    (5.0, (0.3, 0.8), 1.0, None),
    (1.0, (0.0, 1.0), 2.0, 0.25),
    (2.0, (0.3, 0.7), 2.0, 0.125),
    (2.0, (0.3, 0.7), 2.0, 0.25),
    (2.0, (0.3, 0.7), 2.0, 0.5),
    (2.5, (0.3, 0.7), 2.0, 0.25),
    (3.0, (0.3, 0.7), 2.0, 0.25),
    (2.5, (0.3, 0.7), 2.5, 0.25),
]


@dataclass(frozen=True)
class Options:
    """Draw with a run of paper flowers at several strengths and intervals of guidance; prints a table in Markdown."""

    run: str = "runs/paper-flowers"  # folder of the run
    count: int = 256  # pictures for each figure


def of_paper_flowers(run):
    """(networks, config, data, ids of the held-out pictures, these pictures) of a run of paper flowers.

    Raises:
        InputError: it has no trained U-Net, or other data.
    """
    networks, config = load(run)
    data = load_data(config.data)
    if data.test_tokens is None or not (Path(config.data) / "attributes.csv").is_file():
        raise InputError(f"--run: received {run}, expected a run that was trained on paper flowers")
    _, held_out = split(len(data.paths), config.training.validation_fraction, config.seed)
    pictures = read_pictures([data.paths[row] for row in held_out], config.image_size, progress=False)
    return networks, config, data, held_out, pictures


def main(options):
    """Prints the table; returns the exit code, 2 for what the user gave."""
    try:
        networks, config, data, held_out, pictures = of_paper_flowers(options.run)
    except InputError as error:
        print(f"guidance: {error}", file=sys.stderr)
        return 2
    judge = config.evaluation
    features = FeatureNetwork(judge.network, judge.size, judge.weights)
    real = features(pictures)
    print(f"KID of reconstructions: {kid(real, features(reconstruct(networks.vae, pictures))).value:.4f}\n")
    painters = {share: _painter(networks, config, share) for share in {share for *_, share in SETTINGS}}
    tokens = np.stack([data.captions[row][0] for row in held_out])[: options.count]
    tests = networks.vocabulary.decode(data.test_tokens[: options.count])
    heads = (
        "guidance",
        "from",
        "to",
        "autoguidance",
        "weak",
        "KID",
        "petal colour",
        "centre colour",
        "petals",
    )
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for guidance, interval, autoguidance, share in SETTINGS:
        painter, weak = painters[share], "" if share is None else f"{share:g}"
        settings = drawing(config, guidance=guidance, interval=interval, autoguidance=autoguidance)
        drawn = np.stack(list(painter.draw(tokens, np.arange(len(tokens)), **settings)))
        right = follows_captions(painter, tests, 1000, **settings)
        shares = " | ".join(f"{right[name]:.1%}" for name in ("petal_color", "center_color", "petals"))
        value = kid(real, features(drawn)).value
        strengths = f"{guidance:g} | {interval[0]:g} | {interval[1]:g} | {autoguidance:g} | {weak}"
        print(f"| {strengths} | {value:.4f} | {shares} |", flush=True)
    return 0


def _painter(networks, config, share):
    networks = networks._replace(weak=None) if share is None else with_weak(networks, config, share)
    return Painter(networks, config.image_size, config.evaluation.batch_size)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
