"""Where data comes from: reads a paper flower's attributes back from a picture.

So "did the picture follow the sentence?" is a number. Nothing here is learned: the picture's points vote for the
petals' colour; how near they are to it, and how far from the background, makes a soft mask; the mask's mean is
the flower's middle and its spread undoes the tilt; round the middle the mask repeats once a petal.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset._captions import CENTER_WORDS, NUMBER_WORDS
from dataset._drawing import CENTER_RGB, LEAF_RGB, PETAL_RGB, SCENES, STEM_RGB
from dataset._flower import CENTER_COLORS, PETAL_COLORS, PETAL_COUNTS

_SIDE = 64  # pictures of all sizes are read at this one, S
_ANGLES = 96  # points of the profile round the middle
_RADII = np.linspace(0.65, 1.2, 13)  # where it is taken: outside of a second ring, to beyond the tips
_HALF = 0.8  # six petals of two lengths are three: so much of the strongest period suffices for its double
_NUMBERS = {word: number for number, word in NUMBER_WORDS.items()}


class Readings(NamedTuple):
    """What was read from B pictures."""

    petal_colors: list  # B names out of PETAL_COLORS
    center_colors: list  # B names out of CENTER_COLORS
    petals: np.ndarray  # (B,) int64, out of PETAL_COUNTS


def read(images):
    """Reads colours and number of petals from pictures of paper flowers, whatever the flower's place and size.

    Args:
        images: uint8 (B, H, H, 3).

    Returns:
        `Readings`; there is no "don't know": a picture of something else gives an answer as well.
    """
    readings = [_read_one(np.asarray(image)) for image in images]
    petal_colors, center_colors, petals = zip(*readings) if readings else ((), (), ())
    return Readings(list(petal_colors), list(center_colors), np.array(petals, np.int64))


def asked(text):
    """What a caption of a paper flower, or a sentence like it, asks for.

    Returns:
        dict with `petal_color`, `center_color` (names) and `petals` (int); None for what it does not name.
    """
    words = text.lower().replace(",", " ").replace(".", " ").split()
    found = {"petal_color": None, "center_color": None, "petals": None}
    for i, word in enumerate(words):
        of_center = _is_center(words[i + 1 : i + 2]) or (
            words[i - 1 : i] == ["is"] and _is_center(words[i - 2 : i - 1])
        )
        if of_center and word in CENTER_COLORS:
            found["center_color"] = word
        elif not of_center and word in PETAL_COLORS:
            found["petal_color"] = word
        elif word in _NUMBERS:
            found["petals"] = _NUMBERS[word]
    return found


def _is_center(words):
    return any(word.removesuffix("s") in CENTER_WORDS for word in words)


def score(images, texts):
    """How far pictures show what sentences ask for.

    Args:
        images: uint8 (B, H, H, 3).
        texts: B sentences.

    Returns:
        dict: `petal_color`, `center_color`, `both_colors`, `petals`: fractions 0..1 that are right, of the
        sentences that name the thing (NaN where none does); `n`: the number of pictures.

    Raises:
        ValueError: texts and images differ in number.
    """
    readings = read(images)
    wishes = [asked(text) for text in texts]
    if len(wishes) != len(readings.petals):
        raise ValueError(
            f"as many texts as pictures are needed. Received: {len(wishes)} and {len(readings.petals)}"
        )
    petal = _right(readings.petal_colors, [wish["petal_color"] for wish in wishes])
    center = _right(readings.center_colors, [wish["center_color"] for wish in wishes])
    return {
        "petal_color": _fraction(petal),
        "center_color": _fraction(center),
        "both_colors": _fraction(petal * center),
        "petals": _fraction(_right(readings.petals, [wish["petals"] for wish in wishes])),
        "n": len(wishes),
    }


def _right(received, wanted):
    """1 where right, 0 where wrong, NaN where nothing was wanted, (B,)."""
    return np.array([np.nan if w is None else float(r == w) for r, w in zip(received, wanted, strict=True)])


def _fraction(right):
    judged = right[~np.isnan(right)]
    return float(judged.mean()) if len(judged) else float("nan")


# One picture


def _read_one(image):
    shrinks = len(image) > _SIDE
    filter_ = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    pixels = np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), filter_), np.float32) / 255  # (S, S, 3)
    petal_color = _petal_color(pixels)
    mask = _mask(pixels, petal_color)
    frame = _frame(mask)
    return petal_color, _center_color(pixels, frame, petal_color), _count(mask, frame)


def _shade_free(colors):
    """Features (..., 3) of colours (..., 3) in which light and shade of one colour lie close together."""
    red, green, blue = np.moveaxis(np.asarray(colors, np.float32), -1, 0)
    most = np.maximum(np.maximum(red, green), np.maximum(blue, 0.05))
    return np.stack([(red - green) / most, (green - blue) / most, 0.5 * most], -1)


def _references(table):
    return _shade_free(np.array(list(table.values())) / 255)


_PETAL_REFERENCES = _references(PETAL_RGB)
_CENTER_REFERENCES = _references(CENTER_RGB)
_OTHER_COLORS = [*(color for scene in SCENES.values() for color in scene), STEM_RGB, LEAF_RGB]
_VOTED_REFERENCES = np.concatenate([_PETAL_REFERENCES, _shade_free(np.array(_OTHER_COLORS) / 255)])


def _nearest(features, references):
    """Index of the nearest reference (n, 3) for features (..., 3)."""
    return ((features[..., None, :] - references) ** 2).sum(-1).argmin(-1)


def _petal_color(pixels):
    """The petal colour that most points show; points near the middle of the picture count more."""
    votes = _nearest(_shade_free(pixels), _VOTED_REFERENCES)  # (S, S)
    at = np.linspace(-1, 1, _SIDE)
    weight = np.exp(-0.5 * (at**2 + at[:, None] ** 2))
    return PETAL_COLORS[int(np.bincount(votes.ravel(), weight.ravel())[: len(PETAL_COLORS)].argmax())]


def _background(pixels):
    """Colour of the background in each row, from the picture's left and right edge, (S, 1, 3)."""
    edges = np.concatenate([pixels[:, :3], pixels[:, -3:]], 1)
    return np.median(edges, 1, keepdims=True)


def _mask(pixels, petal_color):
    """How far each point is the petals' colour in any light, not background, stem or leaf, (S, S) in 0..1."""
    from_petal = _distance_to_shades(pixels, PETAL_RGB[petal_color], 0.7, 1.1)
    from_others = np.sqrt(((pixels - _background(pixels)) ** 2).sum(-1))
    for green in (STEM_RGB, LEAF_RGB):
        from_others = np.minimum(from_others, _distance_to_shades(pixels, green, 0.6, 1.2))
    share = from_others / (from_others + from_petal + 0.02)
    return np.clip(2.5 * share - 0.75, 0, 1)


def _distance_to_shades(pixels, color, darkest, lightest):
    """Distance of points (..., 3) from the line of a colour's shades, (...)."""
    color = np.float32(color) / 255
    shade = np.clip(pixels @ color / (color @ color), darkest, lightest)[..., None]
    return np.sqrt(((pixels - shade * color) ** 2).sum(-1))


class _Frame(NamedTuple):
    """Where a flower is: place in the picture = middle + axes @ place in the flower, whose tips are about 1 away."""

    middle: np.ndarray  # (2,), x and y
    axes: np.ndarray  # (2, 2)


_PLACES = np.stack(np.meshgrid(np.arange(_SIDE), np.arange(_SIDE)), -1)  # (S, S, 2), x and y
_TIPS = 1.5  # how far tips are from the middle, in standard deviations of the petals' points along an axis


def _frame(mask):
    """Middle, size and foreshortening, from the mask's mean and spread; what lies afar is left out more and more."""
    weight = mask * np.exp(-(((_PLACES / _SIDE - 0.5) / 0.5) ** 2).sum(-1))
    for _ in range(3):
        total = weight.sum() + 1e-6  # an empty mask has its frame as well
        middle = np.einsum("yx,yxi->i", weight, _PLACES) / total
        offset = _PLACES - middle
        spread = np.einsum("yx,yxi,yxj->ij", weight, offset, offset) / total + np.eye(2)
        values, vectors = np.linalg.eigh(spread)
        frame = _Frame(middle, _TIPS * (vectors * np.sqrt(values)) @ vectors.T)
        weight = mask * (_distance(frame) < 1.35)
    return frame


def _distance(frame):
    """How far each point is from the flower's middle, in radii of the flower, (S, S)."""
    inside = np.einsum("ij,yxj->yxi", np.linalg.inv(frame.axes), _PLACES - frame.middle)
    return np.sqrt((inside**2).sum(-1))


def _center_color(pixels, frame, petal_color):
    """The colour of the disc in the middle: any but the petals'."""
    distance = _distance(frame)
    disc = pixels[distance <= max(0.16, distance.min())]  # (n, 3)
    away = ((_shade_free(np.median(disc, 0)) - _CENTER_REFERENCES) ** 2).sum(-1)
    return min((d, name) for d, name in zip(away, CENTER_COLORS) if name != petal_color)[1]


def _profile(mask, frame):
    """Mean of the mask along each direction from the middle, at the petals' outer part, (angles,)."""
    angle = np.arange(_ANGLES) * 2 * np.pi / _ANGLES
    directions = frame.axes @ np.stack([np.cos(angle), np.sin(angle)])  # (2, angles)
    x, y = frame.middle[:, None, None] + directions[:, None] * _RADII[:, None]  # (radii, angles)
    return _sample(mask, x, y).mean(0)


def _sample(mask, x, y):
    """Bilinear interpolation; 0 outside of the picture."""
    padded = np.pad(mask, 1)
    x, y = np.clip(x + 1, 0, _SIDE), np.clip(y + 1, 0, _SIDE)
    left, top = x.astype(int), y.astype(int)
    fx, fy = x - left, y - top
    upper = padded[top, left] * (1 - fx) + padded[top, left + 1] * fx
    lower = padded[top + 1, left] * (1 - fx) + padded[top + 1, left + 1] * fx
    return upper * (1 - fy) + lower * fy


def _count(mask, frame):
    """The number of petals whose period is strongest in the profile."""
    strength = np.abs(np.fft.rfft(_profile(mask, frame)))
    count = max(PETAL_COUNTS, key=lambda n: strength[n])
    has_half = count in (2 * n for n in PETAL_COUNTS)
    return count // 2 if has_half and strength[count // 2] > _HALF * strength[count] else count
