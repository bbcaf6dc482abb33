"""The curves show the rows of the log."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from evaluate import plot_curves, plot_vae_curves


def row(stage, epoch, loss, **more):
    return {
        "stage": stage,
        "epoch": epoch,
        "loss": loss,
        "val_loss": loss and loss / 2,
        "best": False,
        **more,
    }


def kid(value, low, high, floor=0.01):
    return {"val_kid": value, "val_kid_low": low, "val_kid_high": high, "val_kid_floor": floor}


ROWS = [
    row("vae", 1, 0.5),
    row("vae", 2, None),  # NaN, as the log keeps it
    row("diffusion", 1, 0.9, **kid(0.4, 0.3, 0.6)),
    row("diffusion", 2, 0.8),
    row("diffusion", 3, 0.7, **kid(0.2, 0.1, 0.25) | {"best": True}),
    row("diffusion", 4, 0.6, **kid(None, None, None)),
    {"stage": "probe", "step": 0, "petals": 0.5},
]


@pytest.fixture
def plotted(monkeypatch, tmp_path):
    """A function of rows that gives the axes that were saved."""
    closed = []
    monkeypatch.setattr(plt, "close", closed.append)

    def plot(rows, draw=plot_curves):
        draw(rows, tmp_path / "curves.png")
        return closed[-1].axes

    yield plot
    monkeypatch.undo()
    for figure in closed:
        plt.close(figure)


def curves(axis):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}


def test_the_curves_are_the_rows_of_the_log(plotted, tmp_path):
    vae, diffusion, kids = plotted(ROWS)
    assert [axis.get_title() for axis in (vae, diffusion, kids)] == ["vae", "diffusion", "KID"]
    assert curves(diffusion) == {
        "loss": ([1, 2, 3, 4], [0.9, 0.8, 0.7, 0.6]),
        "val_loss": ([1, 2, 3, 4], [0.45, 0.4, 0.35, 0.3]),
    }
    assert curves(vae)["loss"][1][0] == 0.5
    assert np.isnan(np.asarray(curves(vae)["loss"][1][1], "float64"))
    shown = curves(kids)
    assert shown["best"] == ([3], [0.2])
    assert set(shown["real against real"][1]) == {0.01}
    (bars,) = (container for container in kids.containers)
    (segments,) = bars.lines[2]
    ends = [segment[:, 1].tolist() for segment in segments.get_segments()]
    np.testing.assert_allclose(ends, [[0.3, 0.6], [0.1, 0.25]])
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"


def test_without_kid_there_is_no_axis_for_it(plotted):
    assert [axis.get_title() for axis in plotted(ROWS[:2])] == ["vae"]


def test_kid_without_a_floor_or_below_zero_is_drawn(plotted):
    rows = [row("diffusion", 1, 0.5, **kid(-0.1, -0.2, 0.0, floor=None))]
    kids = plotted(rows)[-1]
    assert "real against real" not in curves(kids)
    assert kids.get_ylim()[0] == -0.2
    assert plotted(ROWS)[-1].get_ylim()[0] == 0


def quality(name, value, low, high):
    return {f"val_{name}": value, f"val_{name}_low": low, f"val_{name}_high": high}


VAE_ROWS = [
    {"stage": "data", "step": 0},
    row("vae", 1, 2.0, kl_loss=900.0, val_kl_loss=800.0, gen_loss=None, learning_rate=1e-3)
    | quality("psnr", 20.0, 19.0, 21.5)
    | {"colour_loss": -0.5, "seconds": 3.5, "step": 10, "val_lpips": 0.3},
    row("vae", 2, None, kl_loss=0.5, val_kl_loss=None, gen_loss=None, learning_rate=5e-4)
    | quality("psnr", 22.0, None, None)  # a single picture has no interval
    | {"colour_loss": 0.5, "seconds": 3.5, "step": 20, "val_lpips": 0.2, "best": True},
    row("vae", 4, 1.0, kl_loss=0.4, val_kl_loss=0.3, gen_loss=None, learning_rate=0.0)
    | quality("psnr", 23.0, 22.0, 24.0)
    | quality("sharpness", 0.5, 0.4, 0.6)
    | quality("rkid_change", -0.1, -0.2, 0.1)
    | {"colour_loss": 0.5, "seconds": 3.5, "step": 30, "val_lpips": 0.1},
    row("diffusion", 1, 0.9, **kid(0.4, 0.3, 0.6)),
]
nan = float("nan")


def vae_panels(plotted, rows=VAE_ROWS):
    return {axis.get_title(): axis for axis in plotted(rows, plot_vae_curves)}


def test_every_number_of_the_autoencoders_rows_has_a_panel(plotted):
    panels = vae_panels(plotted)
    losses = ["loss", "kl_loss", "colour_loss"]  # not gen_loss, which is always null
    assert list(panels) == [*losses, "val_psnr", "val_lpips", "val_sharpness", "learning_rate"]
    shown = {name: values for axis in panels.values() for name, values in curves(axis).items()}
    expected = {
        "loss": [2.0, nan, 1.0],
        "val_loss": [1.0, nan, 0.5],
        "kl_loss": [900, 0.5, 0.4],
        "val_kl_loss": [800, nan, 0.3],
        "colour_loss": [-0.5, 0.5, 0.5],
        "val_lpips": [0.3, 0.2, 0.1],
        "learning_rate": [1e-3, 5e-4, 0],
    }
    for name, values in expected.items():
        assert shown[name][0] == [1, 2, 4]
        np.testing.assert_array_equal(shown[name][1], values, err_msg=name)


def test_quality_has_its_intervals_where_they_are_known(plotted):
    (bars,) = vae_panels(plotted)["val_psnr"].containers
    np.testing.assert_array_equal(bars.lines[0].get_ydata(), [20, 22, 23])
    segments = [
        segment for segment in bars.lines[2][0].get_segments() if len(segment)
    ]  # NaN gives an empty one
    ends = [tuple(segment[:, 1].tolist()) for segment in segments]
    assert ends == [(19, 21.5), (22, 24)]


def test_only_what_spans_magnitudes_is_logarithmic(plotted):
    scales = {name: axis.get_yscale() for name, axis in vae_panels(plotted).items()}
    assert [name for name, scale in scales.items() if scale == "log"] == ["kl_loss"]


def test_epochs_are_whole_and_the_best_is_marked(plotted):
    for axis in vae_panels(plotted).values():
        assert all(place == round(place) for place in axis.get_xticks())
        assert list(curves(axis)["best"][0]) == [2, 2]


def test_without_an_autoencoders_rows_no_file_is_written(tmp_path):
    assert not plot_vae_curves([VAE_ROWS[0], VAE_ROWS[-1]], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert plot_vae_curves(VAE_ROWS, tmp_path / "some.png")
    with Image.open(tmp_path / "some.png") as picture:
        assert picture.format == "PNG"


def test_an_early_or_short_log_is_drawn(plotted):
    assert list(vae_panels(plotted, VAE_ROWS[:2])) == [
        "loss",
        "kl_loss",
        "colour_loss",
        "val_psnr",
        "val_lpips",
        "learning_rate",
    ]
