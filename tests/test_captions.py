"""A painter that follows its captions is told from one that does not."""

from types import SimpleNamespace

import numpy as np
import pytest

from dataset import paper_flowers, probe
from evaluate import follows_captions
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
