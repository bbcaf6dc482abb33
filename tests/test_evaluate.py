"""What follows a caption is told from what does not, and the curves show the rows of the log."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from dataset import paper_flowers, probe
from evaluate import follows_captions, plot_curves
from input_pipeline import Vocabulary


class Artist:
    """A painter that draws what a caption asks for, or what its first picture showed."""

    def __init__(self, flowers, captions, rightly=True):
        vocabulary = Vocabulary.from_texts(captions)
        self.networks = SimpleNamespace(vocabulary=vocabulary)
        self.flowers, self.rightly, self.asked = dict(zip(captions, flowers, strict=True)), rightly, []

    def draw(self, tokens, seeds, progress, steps):
        self.asked.append((list(seeds), steps))
        for caption in self.networks.vocabulary.decode(tokens):
            first = next(iter(self.flowers))
            yield paper_flowers.draw(self.flowers[caption if self.rightly else first], 64)


@pytest.fixture(scope="module")
def some_flowers():
    rng, flowers = np.random.default_rng(3), []
    while len(flowers) < 12:  # all of them unlike the first, so that drawing the first is wrong each time
        flower = paper_flowers.sample_flower(rng)
        first = flowers[0] if flowers else None
        unlike = first is None or (
            flower.petal_color != first.petal_color
            and flower.center_color != first.center_color
            and flower.petals != first.petals
        )
        flowers += [flower] if unlike else []
    captions = [paper_flowers.captions(flower, rng)[0] for flower in flowers]
    assert len(set(captions)) == len(captions)
    return flowers, captions


def test_an_artist_who_follows_the_captions_gets_full_marks(some_flowers):
    flowers, captions = some_flowers
    artist = Artist(flowers, captions)
    right = follows_captions(artist, captions, seed=5, steps=3)
    assert right["n"] == len(captions)
    assert [right[name] for name in ("petal_color", "center_color", "petals", "both_colors")] == [1, 1, 1, 1]
    assert artist.asked == [([5 + index for index in range(12)], 3)]


def test_an_artist_who_draws_one_flower_only_is_found_out(some_flowers):
    flowers, captions = some_flowers
    right = follows_captions(Artist(flowers, captions, rightly=False), captions, steps=3)
    counted = [probe.asked(caption)["petals"] is not None for caption in captions]
    assert right["petal_color"] == right["center_color"] == right["both_colors"] == pytest.approx(1 / 12)
    assert right["petals"] == pytest.approx(counted[0] / sum(counted))


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

    def plot(rows):
        plot_curves(rows, tmp_path / "curves.png")
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
