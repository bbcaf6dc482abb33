"""Draws through `generate`, measures through `metrics`, writes the report."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from dataset import probe


def follows_captions(painter, captions, seed=0, **settings):
    """Draws a picture of each caption of paper flowers and reads it back with the probe.

    Args:
        painter: a `generate.Painter`.
        captions: list of str, in the words of the built-in data.
        seed: of the first picture; the k-th has `seed + k`.
        settings: keywords of `generate.Painter.draw`.

    Returns:
        dict: the fractions right that `dataset.probe.score` gives, and `n`.
    """
    tokens, _ = painter.networks.vocabulary.encode(captions)
    seeds = seed + np.arange(len(captions))
    images = np.stack(list(painter.draw(tokens, seeds, progress="drawing for the probe", **settings)))
    return probe.score(images, captions)


def plot_sweep(rows, trained, path):
    """Draws KID with its interval against the length of the average.

    Args:
        rows: dicts of `length` and `kid`, a dict of `value`, `low` and `high`.
        trained: the KID of the weights that training has chosen.
        path: PNG file to write: its place, or the file itself, open for bytes.
    """
    lengths = [row["length"] for row in rows]
    values, lows, highs = (np.array([row["kid"][end] for row in rows]) for end in ("value", "low", "high"))
    figure, axis = plt.subplots(figsize=(5, 3.4))
    axis.errorbar(
        lengths, values, [values - lows, highs - values], marker="o", capsize=3, label="rebuilt, 95 %"
    )
    axis.axhline(trained, color="gray", linestyle="--", label="chosen in training")
    axis.set(title="KID", xlabel="length of the average, as a share of the training")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def plot_curves(rows, path):
    """Draws the losses of every stage, PSNR and KID with its interval against the epochs.

    Args:
        rows: rows of a run's log.
        path: PNG file to write: its place, or the file itself, open for bytes.
    """
    stages = list(dict.fromkeys(row["stage"] for row in rows if "loss" in row))
    has_kid = [row for row in rows if row.get("val_kid") is not None]
    figure, axes = plt.subplots(
        1, len(stages) + bool(has_kid), figsize=(4.5 * (len(stages) + bool(has_kid)), 3.4), squeeze=False
    )
    for axis, stage in zip(axes[0, : len(stages)], stages, strict=True):
        own = [row for row in rows if row["stage"] == stage]
        for name in ("loss", "val_loss"):
            axis.plot([row["epoch"] for row in own], [row[name] for row in own], marker="o", label=name)
        axis.set(title=stage, xlabel="epoch", ylabel="loss")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    if has_kid:
        _plot_kid(axes[0][-1], has_kid)
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def _plot_kid(axis, rows):
    epochs = [row["epoch"] for row in rows]
    values, lows, highs = (np.array([row[f"val_kid{end}"] for row in rows]) for end in ("", "_low", "_high"))
    axis.errorbar(
        epochs, values, [values - lows, highs - values], marker="o", capsize=3, label="val_kid, 95 %"
    )
    floor = rows[-1]["val_kid_floor"]
    if floor is not None:  # fewer than 6 real pictures have none
        axis.axhline(floor, color="gray", linestyle="--", label="real against real")
    best = [row for row in rows if row["best"]][-1:]
    axis.plot(
        [row["epoch"] for row in best], [row["val_kid"] for row in best], "*", markersize=14, label="best"
    )
    axis.set(title="KID", xlabel="epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    # The floor, which may lie below zero, shows beside the values.
    axis.set_ylim(bottom=min(0.0, *lows, 1.2 * (floor or 0.0)))
    axis.legend()
