"""Where data comes from: what a paper flower is, in words and numbers, and how one is sampled."""

import itertools
from dataclasses import dataclass

import numpy as np

PETAL_COLORS = ("red", "orange", "yellow", "white", "pink", "purple", "blue")
CENTER_COLORS = ("yellow", "white", "green", "brown", "purple", "red")
PETAL_COUNTS = (3, 4, 5, 6, 8)
PETAL_SHAPES = ("pointed", "round", "notched", "narrow")
BACKGROUNDS = ("meadow", "sky", "shade", "soil", "dusk", "mist")

# A centre of its petals' colour could not be told from them.
PAIRS = frozenset((p, c) for p, c in itertools.product(PETAL_COLORS, CENTER_COLORS) if p != c)
# For testing only: four of 38. Training sees each of their colours in other company.
HELD_OUT_PAIRS = frozenset({("pink", "green"), ("blue", "white"), ("orange", "purple"), ("yellow", "red")})
TRAINING_PAIRS = PAIRS - HELD_OUT_PAIRS


@dataclass(frozen=True)
class Flower:
    """Everything that a picture of one flower depends on.

    Lengths are fractions of the picture's side; angles are radians, clockwise from the right (y points down).

    Attributes:
        petal_color, center_color: names out of `PETAL_COLORS` and `CENTER_COLORS`.
        petals: how many petals a ring has, out of `PETAL_COUNTS`.
        petal_shape: a name out of `PETAL_SHAPES`.
        rings: 1, or 2 where a smaller ring lies on the first, turned by half a petal.
        background: a name out of `BACKGROUNDS`.
        stem: whether there is a stem; leaves: how many leaves it bears, 0 to 2.
        radius: from the middle of the flower to the tips of its petals.
        x, y: where the middle is.
        center_size: radius of the centre as a fraction of `radius`.
        turn: direction of the first petal; about upwards.
        tilt: how far the flower is turned away from the viewer; tilt_direction: where to.
        bend: how far the stem's foot lies to the right of the flower.
        light: where the light comes from.
        brightness: factor on all light, about 1.
        tint: place of the petals within their colour's range, -1 (deeper) to 1 (paler).
        detail: seed of what has no name: the irregularity of petals, the spots of the background.
    """

    petal_color: str
    center_color: str
    petals: int
    petal_shape: str
    rings: int
    background: str
    stem: bool
    leaves: int
    radius: float
    x: float
    y: float
    center_size: float
    turn: float
    tilt: float
    tilt_direction: float
    bend: float
    light: float
    brightness: float
    tint: float
    detail: int


def sample_flower(rng, pairs=TRAINING_PAIRS):
    """One random flower.

    Args:
        rng: numpy Generator; it is advanced.
        pairs: (petal colour, centre colour) names to choose from; all are equally likely.

    Returns:
        A `Flower` that lies within the picture.
    """
    petal_color, center_color = _choice(rng, sorted(pairs))
    radius = rng.uniform(0.33, 0.42)
    room = 0.48 - radius  # how far the middle may leave the middle of the picture
    stem = bool(rng.random() < 0.75)
    return Flower(
        petal_color=petal_color,
        center_color=center_color,
        petals=_choice(rng, PETAL_COUNTS),
        petal_shape=_choice(rng, PETAL_SHAPES),
        rings=1 if rng.random() < 0.65 else 2,
        background=_choice(rng, BACKGROUNDS),
        stem=stem,
        leaves=int(rng.integers(3)) if stem else 0,
        radius=radius,
        x=0.5 + room * rng.uniform(-1, 1),
        y=0.5 + room * rng.uniform(-1, 0.2 if stem else 1),  # a stem wants to be seen
        center_size=rng.uniform(0.27, 0.33),
        turn=rng.uniform(-0.2, 0.2) - np.pi / 2,  # the first petal stands up, as a stem holds it
        tilt=rng.uniform(0, 0.6),
        tilt_direction=rng.uniform(0, 2 * np.pi),
        bend=rng.uniform(-0.14, 0.14),
        light=rng.uniform(np.pi, 2 * np.pi),  # from above
        brightness=rng.uniform(0.92, 1.05),
        tint=rng.uniform(-1, 1),
        detail=int(rng.integers(2**31)),
    )


def _choice(rng, items):
    return items[rng.integers(len(items))]
