"""How the report's figures are made and saved: without a screen, as PNG."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def save(figure, path):
    """Writes a figure as PNG to `path`, its place or the file itself, open for bytes, and forgets it."""
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)
