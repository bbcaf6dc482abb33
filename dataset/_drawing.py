"""Where data comes from: paints one paper flower, layer on layer, the farthest first.

Every layer is a colour and a coverage 0..1 for each point of a grid finer than the picture; a shape's coverage
comes from the distance to its edge, so edges are smooth at any size.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

PETAL_RGB = {
    "red": (206, 26, 36),
    "orange": (246, 126, 20),
    "yellow": (252, 216, 44),
    "white": (246, 244, 240),
    "pink": (246, 130, 176),
    "purple": (126, 46, 172),
    "blue": (48, 92, 220),
}
CENTER_RGB = {
    "yellow": (246, 200, 36),
    "white": (240, 238, 228),
    "green": (92, 156, 48),
    "brown": (92, 56, 30),
    "purple": (104, 34, 140),
    "red": (186, 24, 32),
}
SCENES = {  # top, middle, bottom, colour of the spots
    "meadow": ((176, 196, 150), (128, 164, 96), (84, 122, 62), (190, 206, 140)),
    "sky": ((128, 170, 206), (154, 190, 216), (184, 208, 224), (194, 214, 228)),
    "shade": ((30, 58, 52), (38, 72, 54), (24, 46, 38), (92, 124, 84)),
    "soil": ((120, 100, 82), (94, 74, 58), (66, 50, 40), (132, 108, 86)),
    "dusk": ((56, 58, 92), (104, 88, 112), (172, 136, 112), (184, 150, 124)),
    "mist": ((172, 184, 186), (156, 172, 168), (128, 148, 136), (186, 196, 194)),
}
STEM_RGB = (74, 128, 52)
LEAF_RGB = (66, 132, 58)

_SUPERSAMPLING = 2  # grid points a pixel, each way; _PIXEL_FILTER depends on it
# Weights of the grid points about a pixel, each way: binomial.
_PIXEL_FILTER = np.float32([1, 9, 36, 84, 126, 126, 84, 36, 9, 1]) / 512
_SCENE_SIDE = 48  # backgrounds are smooth: painted at this size and enlarged
_STEPS = 1024  # entries of a petal's outline

# Half-widths along a petal are `width * s**base * (1 - s**belly)**tip`; notch: how deep the tip is cut in.
_OUTLINES = {
    "pointed": {"width": 0.95, "base": 0.75, "belly": 1.6, "tip": 1.0, "notch": 0.0},
    "round": {"width": 1.0, "base": 0.8, "belly": 4.0, "tip": 0.5, "notch": 0.0},
    "notched": {"width": 0.92, "base": 1.0, "belly": 5.0, "tip": 0.5, "notch": 0.14},
    "narrow": {"width": 0.6, "base": 0.6, "belly": 3.0, "tip": 0.6, "notch": 0.0},
}


def draw(flower, size):
    """Paints a flower.

    Args:
        flower: a `Flower`; the picture depends on nothing else.
        size: side of the picture in pixels.

    Returns:
        images uint8 (size, size, 3).
    """
    side = size * _SUPERSAMPLING  # S
    rng = np.random.default_rng(flower.detail)
    canvas = _scene(flower, side, rng)  # (3, S, S), 0..1
    if flower.stem:
        _paint_stem(canvas, flower, rng)
    _paint_bloom(canvas, flower, rng)
    pixels = _reduced(canvas) * flower.brightness  # (3, size, size)
    return np.ascontiguousarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))


def _reduced(canvas):
    """The picture's pixels from the grid: a Gaussian of deviation 0.75 pixels about each, (3, size, size).

    A usual filter of renderers (Pharr, Jakob & Humphreys, Physically Based Rendering, section 7.8). It leaves 4 % of
    the finest waves that the pixels could show; the mean over a pixel's own grid points alone looks cut out with
    scissors.
    """
    rim = (len(_PIXEL_FILTER) - _SUPERSAMPLING) // 2
    canvas = np.pad(canvas, ((0, 0), (rim, rim), (rim, rim)), mode="edge")
    places, last = range(len(_PIXEL_FILTER)), canvas.shape[-1] - len(_PIXEL_FILTER) + 1
    rows = sum(_PIXEL_FILTER[k] * canvas[:, k : k + last : _SUPERSAMPLING] for k in places)
    return sum(_PIXEL_FILTER[k] * rows[:, :, k : k + last : _SUPERSAMPLING] for k in places)


def _rgb(color):
    """0..255 -> 0..1, float32 (3,)."""
    return np.float32(color) / 255


# Background


def _scene(flower, side, rng):
    """A smooth gradient from top to bottom with soft round spots, (3, S, S)."""
    top, middle, bottom, spot = (_rgb(color) for color in SCENES[flower.background])
    at = (np.arange(_SCENE_SIDE, dtype=np.float32) + 0.5) / _SCENE_SIDE
    horizon = rng.uniform(0.35, 0.65)
    veil = _spots(at, rng)  # (s, s)
    # Each channel's colour by height, (s, 1).
    ramps = [np.interp(at, [0, horizon, 1], values)[:, None] for values in zip(top, middle, bottom)]
    channels = [Image.fromarray(np.float32(ramp * (1 - veil) + veil * c)) for ramp, c in zip(ramps, spot)]
    return np.stack([channel.resize((side, side), Image.Resampling.BICUBIC) for channel in channels])


def _spots(at, rng, count=7):
    """Opacity of out-of-focus lights, (s, s)."""
    drawn = rng.uniform([0, 0, 0.06, 0.15], [1, 1, 0.2, 0.5], (count, 4))
    x, y, radius, strength = np.float32(drawn).T[..., None, None]  # each (count, 1, 1)
    squared = ((at - x) ** 2 + (at[:, None] - y) ** 2) / radius**2  # (count, s, s)
    return (strength * np.exp(-(squared**2))).max(0)


# Shapes


@lru_cache
def _outline(shape):
    """Half-width of a petal of length and width 1 at `_STEPS` places from its foot to its tip, and its slope.

    The slope is kept finite, so that points beside a blunt tip do not count as near it.
    """
    form = _OUTLINES[shape]
    s = np.linspace(0, 1, _STEPS, dtype=np.float32)
    half = s ** form["base"] * (1 - s ** form["belly"]) ** form["tip"]
    half /= half.max()
    return half, np.clip(np.gradient(half, s[1]), -4, 4)


def _petal_edge(u, v, length, width, shape):
    """How deep a point lies inside of a petal (outside: negative), to first order, in units of u and v.

    Args:
        u, v: (...) coordinates along the petal from its foot, and across it.
        length, width: of the petal, half its breadth; may be arrays like u.
        shape: name of its outline.

    Returns:
        depth (...), place along the petal 0..1 (...), place across it -1..1 (...).
    """
    across = v / width
    cut = _OUTLINES[shape]["notch"]
    reach = length * (1 - cut * np.exp(-((across / 0.4) ** 2))) if cut else length
    along = u / reach
    place = np.clip(along, 0, 1)
    index = (place * (_STEPS - 1)).astype(np.int32)
    half, slope = (table[index] for table in _outline(shape))
    beyond = np.abs(along - place) * length  # past the tip or before the foot
    depth = (half - np.abs(across)) * width / np.sqrt(1 + (slope * width / length) ** 2)
    return depth - beyond, place, across / np.maximum(half, 0.05)


def _coverage(depth, pixel):
    return np.clip(depth / pixel + 0.5, 0, 1)


def _lay(canvas, color, light, coverage):
    """Paints colour (3,) times light (h, w) over the canvas (3, h, w) with opacity (h, w), in place."""
    for channel, value in zip(canvas, color.tolist()):
        channel += coverage * (value * light - channel)


def _window(side, x, y, reach):
    """The part of the picture within `reach` of (x, y).

    Returns:
        Its index (3 slices), and the coordinates of its points from (x, y): (1, w), (h, 1).
    """
    left, right, top, bottom = (
        round(min(max(edge, 0), 1) * side) for edge in (x - reach, x + reach, y - reach, y + reach)
    )
    columns = (np.arange(left, right, dtype=np.float32) + 0.5) / side - x
    rows = (np.arange(top, bottom, dtype=np.float32) + 0.5) / side - y
    return (slice(None), slice(top, bottom), slice(left, right)), columns[None], rows[:, None]


# Stem and leaves


def _paint_stem(canvas, flower, rng):
    side = canvas.shape[-1]
    thickness = rng.uniform(0.014, 0.02)
    left, right = sorted((flower.x, flower.x + flower.bend))
    for k in range(flower.leaves):
        _paint_leaf(canvas, flower, rng, k)
    top = round(flower.y * side)
    at = (np.arange(side, dtype=np.float32) + 0.5) / side
    middle = flower.x + flower.bend * ((at[top:] - flower.y) / (1 - flower.y)) ** 2  # (h,)
    columns = slice(max(int((left - 0.05) * side), 0), int((right + 0.05) * side))
    offset = (at[columns] - middle[:, None]) / thickness  # (h, w)
    light = 0.92 + 0.3 * math.cos(flower.light) * np.clip(offset, -1, 1)
    coverage = _coverage(thickness * (1 - np.abs(offset)), 1 / side)
    _lay(canvas[:, top:, columns], _rgb(STEM_RGB), light, coverage)


def _paint_leaf(canvas, flower, rng, k):
    side = canvas.shape[-1]
    share = rng.uniform(0.6, 0.9)  # of the stem's length
    x = flower.x + flower.bend * share**2
    y = flower.y + (1 - flower.y) * share
    rise = rng.uniform(0.2, 0.8)
    angle = -rise if (k + flower.detail) % 2 else math.pi + rise
    length = rng.uniform(0.28, 0.38)
    window, dx, dy = _window(side, x, y, length)
    u = dx * math.cos(angle) + dy * math.sin(angle)
    v = dy * math.cos(angle) - dx * math.sin(angle)
    depth, along, across = _petal_edge(u, v, length, 0.2 * length, "pointed")
    rib = 0.15 * np.exp(-((across / 0.12) ** 2))
    light = 0.85 + 0.2 * along + 0.12 * math.cos(flower.light) * np.sign(across) - rib
    _lay(canvas[window], _rgb(LEAF_RGB), light, _coverage(depth, 1 / side))


# Petals and centre


class _Face(NamedTuple):
    """A part of the picture, in coordinates where the flower faces the viewer and has radius 1."""

    canvas: np.ndarray  # (3, h, w), a view into the picture
    x: np.ndarray  # (h, w)
    y: np.ndarray  # (h, w)
    pixel: float  # distance of two grid points


def _face(canvas, flower, reach):
    """What lies within `reach`, in units of the flower's radius."""
    side = canvas.shape[-1]
    window, dx, dy = _window(side, flower.x, flower.y, reach * flower.radius)
    c, s = math.cos(flower.tilt_direction), math.sin(flower.tilt_direction)
    lost = (1 / math.cos(flower.tilt) - 1) * (dx * c + dy * s)  # the tilt foreshortens that way by its cosine
    x, y = (dx + lost * c) / flower.radius, (dy + lost * s) / flower.radius
    return _Face(canvas[window], x, y, 1 / (side * flower.radius))


def _paint_bloom(canvas, flower, rng):
    """Rings of petals, then the centre."""
    color = _petal_color(flower)
    _paint_ring(_face(canvas, flower, 1.03), flower, rng, color=color, length=1.0, turn=flower.turn)
    if flower.rings == 2:
        inner, turn = _face(canvas, flower, 0.8), flower.turn + math.pi / flower.petals
        _paint_ring(inner, flower, rng, color=color * 0.94, length=0.56, turn=turn)
    _paint_center(_face(canvas, flower, flower.center_size + 0.12), flower)


def _petal_color(flower):
    """The petals' colour within its range: deeper or paler by the tint, (3,)."""
    color = _rgb(PETAL_RGB[flower.petal_color])
    if flower.tint < 0:
        return color * (1 + 0.1 * flower.tint)
    return color + (1 - color) * (0.1 * flower.tint)


def _petal_width(petals, shape):
    """Half the breadth of a petal of length 1: neighbours overlap below the middle and part towards the tips."""
    return min(0.4, 0.57 * math.tan(math.pi / petals)) * _OUTLINES[shape]["width"]


def _paint_ring(face, flower, rng, *, color, length, turn):
    """One ring of petals, each of which lies over the next.

    A point is covered by no other petals than the two between whose axes it lies, so two passes paint them all.
    """
    n = flower.petals
    angles = turn + (np.arange(n) + rng.uniform(-0.05, 0.05, n)) * 2 * math.pi / n
    lengths = length * rng.uniform(0.93, 1.0, n)
    widths = length * _petal_width(n, flower.petal_shape) * rng.uniform(0.94, 1.06, n)
    tones = rng.uniform(0.95, 1.04, n)
    petals = np.float32([np.cos(angles), np.sin(angles), lengths, widths, tones])  # (5, n)

    sector = np.floor((np.arctan2(face.y, face.x) - turn) * (n / (2 * math.pi))).astype(np.int32)
    upper_depth, upper_light = _petal(face, flower, petals[:, sector % n])
    lower_depth, lower_light = _petal(face, flower, petals[:, (sector + 1) % n])
    if length < 1:  # an inner ring throws its shadow on the outer one
        _lay(face.canvas, np.zeros(3), 0.0, _shadow(np.maximum(upper_depth, lower_depth)))
    _lay(face.canvas, color, lower_light * (1 - _shadow(upper_depth)), _coverage(lower_depth, face.pixel))
    _lay(face.canvas, color, upper_light, _coverage(upper_depth, face.pixel))


def _shadow(depth):
    """How dark it is beside a petal, fading with the distance from its edge."""
    return 0.3 * np.exp(np.minimum(depth, 0) / 0.05)


def _petal(face, flower, petal):
    """Depth within the petal (h, w), and how light it is there (h, w)."""
    cos, sin, length, width, tone = petal  # each (h, w)
    u, v = face.x * cos + face.y * sin, face.y * cos - face.x * sin
    depth, along, across = _petal_edge(u, v, length, width, flower.petal_shape)
    # Petals are arched: the side turned to the light is lighter, and so are the petals that point to it.
    light_x, light_y = math.cos(flower.light), math.sin(flower.light)
    toward = 0.05 * (cos * light_x + sin * light_y) + 0.12 * across * (cos * light_y - sin * light_x)
    veins = 0.035 * np.cos(across * 14) * along + 0.1 * np.exp(-((across / 0.1) ** 2)) * (1 - along)
    return depth, tone * (0.84 + 0.24 * along + toward - veins)


def _paint_center(face, flower):
    """A domed disc with seeds, on the shadow it throws."""
    size = flower.center_size
    radius = np.sqrt(face.x**2 + face.y**2)
    shadow = 0.45 * np.exp(-((np.maximum(radius - size, 0) / 0.05) ** 2))
    _lay(face.canvas, np.zeros(3), 0.0, shadow)
    toward = (face.x * math.cos(flower.light) + face.y * math.sin(flower.light)) / size
    dome = 0.95 + 0.14 * toward - 0.12 * (radius / size) ** 4
    light = dome + 0.16 * _seeds(face, size, flower.turn)
    _lay(face.canvas, _rgb(CENTER_RGB[flower.center_color]), light, _coverage(size - radius, face.pixel))


def _seeds(face, size, turn, count=34):
    """Seeds on the golden spiral (Vogel 1979): 1 on a seed, 0 between them, (h, w)."""
    k = np.arange(count) + 0.5
    angle = turn + k * math.pi * (3 - math.sqrt(5))
    reach = 0.9 * size * np.sqrt(k / count)
    x, y = np.float32([reach * np.cos(angle), reach * np.sin(angle)])[..., None, None]
    squared = ((face.x - x) ** 2 + (face.y - y) ** 2).min(0)  # to the nearest seed
    return np.exp(-squared / (0.07 * size) ** 2)
