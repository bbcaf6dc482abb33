"""The heat maps show what was tracked: a row a layer, a column a step."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from evaluate import plot_tracked
from evaluate.tracked import by_layer


def numbers(norm, mean=0.0, largest=1.0):
    return {"norm": norm, "mean": mean, "largest": largest}


def row(step, scale):
    broken = numbers(None, None, None)
    return {
        "step": step,
        "activations": {"vae/conv": numbers(10.0 * scale), "vae/out": numbers(1.0) if step else broken},
        "weights": {
            "vae/conv/kernel": numbers(3.0 * scale, -0.5, 2.0),
            "vae/conv/bias": numbers(4.0 * scale, 0.25, 7.0),
            "vae/block/norm/gamma": numbers(2.0),
        },
        "gradients": {"vae/conv/kernel": numbers(0.0)},
    }


ROWS = [row(0, 1.0), row(100, 10.0)]


def test_a_layers_weights_are_joined():
    norms = by_layer(ROWS, "weights", "norm")
    assert list(norms) == ["vae/conv", "vae/block"]
    np.testing.assert_allclose(norms["vae/conv"], [5, 50])
    np.testing.assert_allclose(norms["vae/block"], [2, 2])
    assert by_layer(ROWS, "weights", "largest")["vae/conv"].tolist() == [7, 7]
    assert by_layer(ROWS, "weights", "mean")["vae/conv"].tolist() == [-0.5, -0.5]
    np.testing.assert_array_equal(by_layer(ROWS, "activations", "norm")["vae/out"], [np.nan, 1])


def test_a_layer_that_comes_later_is_unknown_before():
    later = {**ROWS[1], "gradients": {"vae/late": numbers(2.0), **ROWS[1]["gradients"]}}
    np.testing.assert_array_equal(by_layer([ROWS[0], later], "gradients", "norm")["vae/late"], [np.nan, 2])


@pytest.mark.parametrize("statistic", ["norm", "mean", "largest"])
def test_the_maps_show_logarithms_nan_in_red_and_zero_in_white(statistic, monkeypatch, tmp_path):
    closed = []
    monkeypatch.setattr(plt, "close", closed.append)
    plot_tracked(ROWS, tmp_path / "tracked.png", statistic)
    axes = [axis for axis in closed[0].axes if axis.get_title()]
    for axis, kind in zip(axes, ("activations", "weights", "gradients"), strict=True):
        assert axis.get_title() == f"{kind}: log10 |{statistic}|"
        (image,) = axis.get_images()
        values = by_layer(ROWS, kind, statistic)
        assert [label.get_text() for label in axis.get_yticklabels()] == list(values)
        assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "100"]
        shown, colours = image.get_array(), image.to_rgba(image.get_array())
        for line, sizes in enumerate(values.values()):
            for column, size in enumerate(sizes):
                if np.isnan(size):
                    assert colours[line, column].tolist() == [1, 0, 0, 1]
                elif size == 0:
                    assert colours[line, column].tolist() == [1, 1, 1, 1]
                else:
                    assert shown[line, column] == pytest.approx(np.log10(abs(size)))
                    assert colours[line, column].tolist() not in ([1, 0, 0, 1], [1, 1, 1, 1])
    monkeypatch.undo()
    plt.close(closed[0])
    with Image.open(tmp_path / "tracked.png") as picture:
        assert picture.format == "PNG"
