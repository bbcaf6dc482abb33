"""KID against evaluations of the U-Net, for every sampler.

python cup3.py
python benchmarks/samplers.py --run runs/paper-flowers --plot samplers.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.guidance import of_paper_flowers
from diffusion.samplers import SAMPLERS, evaluations
from diffusion.times import sampling_times
from errors import InputError
from generate import Painter, drawing
from metrics import kid
from model.perceptual import FeatureNetwork


@dataclass(frozen=True)
class Options:
    """Draw held-out captions of a run of paper flowers by every sampler; prints a table in Markdown and plots it."""

    run: str = "runs/paper-flowers"  # folder of the run
    count: int = 256  # pictures for each figure
    steps: tuple[int, ...] = (6, 9, 12, 20)  # of each sampler
    reference: int = 250  # steps of DDIM that the others are compared with
    plot: str | None = None  # PNG file to plot to


def asked(process, sampler, settings):
    """Evaluations of the U-Net for a picture, those with guidance counted as two, and one more each for autoguidance.

    The share with guidance is that of the times, which Heun's method asks about twice but for the first.
    """
    times = sampling_times(process, settings["steps"], settings["spacing"]).numpy()[:-1]
    least, most = settings["interval"]
    twice = np.sum((times >= least) & (times <= most)) if settings["guidance"] != 1 else 0
    away = settings["autoguidance"] != 1
    return evaluations(sampler, settings["steps"]) * (1 + away + twice / len(times))


def measure(networks, config, tokens, real, options):
    """Yields (sampler, steps, evaluations, KID), the reference first."""
    judge = config.evaluation
    features = FeatureNetwork(judge.network, judge.size, judge.weights)
    real = features(real)
    painter = Painter(networks, config.image_size, judge.batch_size)
    rows = [("ddim", options.reference), *((name, steps) for name in SAMPLERS for steps in options.steps)]
    for sampler, steps in rows:
        settings = drawing(config, sampler=sampler, steps=steps)
        drawn = np.stack(list(painter.draw(tokens, np.arange(len(tokens)), **settings)))
        yield sampler, steps, asked(networks.process, sampler, settings), kid(real, features(drawn))


def plot(rows, path):
    """A line for each sampler, and the reference with its interval as a band."""
    _, _, _, reference = rows[0]
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axis.axhspan(reference.low, reference.high, color="0.9", label=f"ddim, {rows[0][1]} steps, 95 %")
    for name in SAMPLERS:
        points = sorted((evaluated, value.value) for own, _, evaluated, value in rows[1:] if own == name)
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.set(xlabel="evaluations of the U-Net a picture", ylabel="KID", yscale="log")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(options):
    """Prints the table; returns the exit code, 2 for what the user gave."""
    try:
        networks, config, data, held_out, pictures = of_paper_flowers(options.run)
    except InputError as error:
        print(f"samplers: {error}", file=sys.stderr)
        return 2
    tokens = np.stack([data.captions[row][0] for row in held_out])[: options.count]
    print("| sampler | steps | evaluations | KID |\n|---|---|---|---|")
    rows = []
    for row in measure(networks, config, tokens, pictures, options):
        rows.append(row)
        sampler, steps, evaluated, value = row
        print(
            f"| {sampler} | {steps} | {evaluated:.0f} | {value.value:.4f} [{value.low:.4f}, {value.high:.4f}] |",
            flush=True,
        )
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
