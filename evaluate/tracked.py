"""Heat maps of what `tracking.Tracker` has written: layers by steps."""

import matplotlib.pyplot as plt
import numpy as np

from evaluate._figures import save

JOINED = {  # a statistic of a layer's several weights from those of each
    "norm": lambda values: np.sqrt(np.sum(np.square(values))),
    "mean": lambda values: values[np.argmax(np.abs(values))],
    "largest": np.max,
}
MOST_STEPS_NAMED = 6


def plot_tracked(rows, path, statistic="norm"):
    """Draws the logarithm of a statistic's size, a heat map each of activations, weights and gradients.

    What is NaN or Inf is red, what is 0 white. A layer's weights are joined: the norm is that of all of them, the
    largest value the largest of all, the mean the one of largest size.

    Args:
        rows: rows that a `tracking.Tracker` has written, at least one.
        path: PNG file to write: its place, or the file itself, open for bytes.
        statistic: "norm", "mean" or "largest".
    """
    maps = {kind: by_layer(rows, kind, statistic) for kind in ("activations", "weights", "gradients")}
    height = 1.6 + 0.14 * max(len(values) for values in maps.values())
    figure, axes = plt.subplots(1, len(maps), figsize=(17, max(4.0, height)), layout="constrained")
    for axis, (kind, values) in zip(axes, maps.items(), strict=True):
        _plot_map(figure, axis, values, [row["step"] for row in rows])
        axis.set(title=f"{kind}: log10 |{statistic}|", xlabel="step")
    figure.suptitle("red: NaN or Inf; white: 0", fontsize="medium")
    save(figure, path)


def by_layer(rows, kind, statistic):
    """A statistic by layer, float64 (steps,), of activations, weights or gradients; what is not finite is NaN."""
    parts = {}
    for name in dict.fromkeys(name for row in rows for name in row[kind]):
        values = [row[kind].get(name, {}).get(statistic) for row in rows]
        layer = "/".join(name.split("/")[:2])
        parts.setdefault(layer, []).append(np.array(values, "float64"))  # null is NaN
    return {
        layer: np.array([JOINED[statistic](column) for column in np.transpose(values)])
        for layer, values in parts.items()
    }


def _plot_map(figure, axis, values, steps):
    with np.errstate(divide="ignore"):
        sizes = np.log10(np.abs(np.stack(list(values.values()))))
    finite = sizes[np.isfinite(sizes)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    sizes[sizes == -np.inf] = low - 1.0  # matplotlib would show it as it shows NaN
    colours = plt.get_cmap("viridis").with_extremes(bad="red", under="white")
    shown = axis.imshow(sizes, aspect="auto", interpolation="nearest", cmap=colours, vmin=low, vmax=high)
    figure.colorbar(shown, ax=axis, fraction=0.05)
    axis.set_yticks(range(len(values)), list(values), fontsize=6)
    places = np.unique(np.linspace(0, len(steps) - 1, MOST_STEPS_NAMED).round().astype(int))
    axis.set_xticks(places, [steps[place] for place in places])
