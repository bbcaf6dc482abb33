"""Whether pictures show what their captions ask for."""

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
