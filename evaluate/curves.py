"""Curves of a run against its epochs, and of KID against the length of an average."""

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from evaluate._figures import save

# Of the autoencoder's stage, in the order in which they are shown; "val_" twins stand beside them.
VAE_LOSSES = (
    "loss",
    "recon_loss",
    "kl_loss",
    "kl_weight",
    "perceptual_loss",
    "gen_loss",
    "disc_loss",
    "lecam_loss",
    "r1_loss",
    "adversarial_weight",
    "logit_gap",
    "gradient_ratio",
    "adversarial_scale",
    "skipped_steps",
)
VAE_QUALITIES = ("val_psnr", "val_ssim", "val_lpips", "val_perceptual", "val_rkid")
COLUMNS = 4  # panels a row
LOG_SCALE_FROM = 30.0  # how many times the largest value of a panel is the smallest, both above 0


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
    save(figure, path)


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
    save(figure, path)


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


def plot_vae_curves(rows, path):
    """Draws everything that the autoencoder's rows of a log have against the epochs, a panel each.

    Losses with those of validation, measures of quality with their intervals, and learning rates. What is absent or
    null in all rows has no panel; what is null in one row leaves a gap. A dotted line marks the best epoch.

    Args:
        rows: rows of a run's log, of any stages.
        path: PNG file to write: its place, or the file itself, open for bytes.

    Returns:
        Whether there was anything to draw; without rows of the stage "vae" nothing is written.
    """
    rows = [row for row in rows if row["stage"] == "vae"]
    panels = _vae_panels(rows)
    if not panels:
        return False
    lines = -(-len(panels) // COLUMNS)
    columns = min(COLUMNS, len(panels))
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 2.9 * lines), squeeze=False)
    for axis, names in zip(axes.flat[: len(panels)], panels, strict=True):
        _plot_panel(axis, rows, names)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    save(figure, path)
    return True


def _vae_panels(rows):
    """Lists of the names that share a panel."""
    known = list(dict.fromkeys(name for row in rows for name in row if _is_number(row[name])))
    trained = [name for name in known if not name.startswith("val_")]
    losses = [*VAE_LOSSES, *(name for name in trained if name.endswith("_loss") and name not in VAE_LOSSES)]
    measured = [name for name in known if name.startswith("val_") and f"{name}_low" in known]
    others = [name for name in measured if name not in VAE_QUALITIES and not name.endswith("_change")]
    rates = [name for name in trained if name.endswith("learning_rate")]
    twins = [[name, f"val_{name}"] for name in losses] + [
        [name] for name in (*VAE_QUALITIES, *others, *rates)
    ]
    present = [[name for name in names if name in known] for names in twins]
    return [names for names in present if names]


def _plot_panel(axis, rows, names):
    epochs, all_values = [row["epoch"] for row in rows], []
    for name in names:
        values, low, high = (_column(rows, f"{name}{end}") for end in ("", "_low", "_high"))
        if np.isfinite(low).any():
            around = [np.maximum(values - low, 0), np.maximum(high - values, 0)]
            axis.errorbar(epochs, values, around, marker="o", markersize=3, capsize=3, label=f"{name}, 95 %")
        else:
            axis.plot(epochs, values, marker="o", markersize=3, label=name)
        all_values += [value for value in values if np.isfinite(value)]
    if min(all_values) > 0 and max(all_values) > LOG_SCALE_FROM * min(all_values):
        axis.set_yscale("log")
    else:
        axis.ticklabel_format(axis="y", scilimits=(-3, 4))
    for row in [row for row in rows if row.get("best")][-1:]:
        axis.axvline(row["epoch"], color="gray", linestyle=":", label="best")
    axis.set(title=names[0], xlabel="epoch")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axis.legend(fontsize="small")


def _column(rows, name):
    return np.array([row[name] if _is_number(row.get(name)) else np.nan for row in rows], "float64")


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
