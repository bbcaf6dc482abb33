"""A drawn flower is where and what its attributes say, and its pixels are filtered as they should be."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dataset._drawing import _PIXEL_FILTER, _SUPERSAMPLING, CENTER_RGB, PETAL_RGB, _reduced
from dataset.paper_flowers import CENTER_COLORS, PAIRS, PETAL_COUNTS, PETAL_SHAPES, draw, sample_flower


def flowers(n):
    return [sample_flower(np.random.default_rng([0, i]), PAIRS) for i in range(n)]


def facing(flower, **changes):
    """The flower seen from the front, so that its geometry is plain."""
    return dataclasses.replace(flower, tilt=0.0, brightness=1.0, tint=0.0, **changes)


def pixel_at(image, flower, radius, angle):
    """The pixel at a polar place in the flower."""
    x = flower.x + radius * flower.radius * np.cos(angle)
    y = flower.y + radius * flower.radius * np.sin(angle)
    return image[int(y * len(image)), int(x * len(image))].astype(float)


def hue_distance(pixel, rgb):
    """Angle between two colours as vectors: the same in any light."""
    rgb = np.array(rgb, float)
    return np.arccos(np.clip(pixel @ rgb / np.linalg.norm(pixel) / np.linalg.norm(rgb), -1, 1))


@pytest.mark.parametrize("size", [32, 64, 100])
def test_a_picture_is_a_pure_function_of_the_flower(size):
    for flower in flowers(4):
        images = draw(flower, size), draw(dataclasses.replace(flower), size)
        assert images[0].shape == (size, size, 3) and images[0].dtype == np.uint8
        np.testing.assert_array_equal(*images)


@pytest.mark.parametrize("petals", PETAL_COUNTS)
@pytest.mark.parametrize("shape", PETAL_SHAPES)
def test_petals_are_where_their_number_turn_and_radius_say(petals, shape):
    flower = facing(
        flowers(1)[0], petals=petals, petal_shape=shape, rings=1, petal_color="orange", center_color="green"
    )
    image = draw(flower, 256)
    step = 2 * np.pi / petals
    for k in range(petals):
        on_petal = pixel_at(image, flower, 0.7, flower.turn + k * step)
        assert hue_distance(on_petal, PETAL_RGB["orange"]) < 0.12
        between = pixel_at(image, flower, 0.93, flower.turn + (k + 0.5) * step)
        assert hue_distance(between, PETAL_RGB["orange"]) > 0.2
        beyond = pixel_at(image, flower, 1.05, flower.turn + k * step)
        assert hue_distance(beyond, PETAL_RGB["orange"]) > 0.2


@pytest.mark.parametrize("center", CENTER_COLORS)
def test_the_center_has_its_color_and_size(center):
    flower = facing(
        flowers(1)[0], center_color=center, petal_color="blue", petals=8, petal_shape="round", rings=1
    )
    image = draw(flower, 256)
    for angle in np.arange(8):
        assert (
            hue_distance(pixel_at(image, flower, 0.8 * flower.center_size, angle), CENTER_RGB[center]) < 0.1
        )
    on_petal = pixel_at(image, flower, flower.center_size + 0.15, flower.turn)
    assert hue_distance(on_petal, PETAL_RGB["blue"]) < 0.12


def test_a_second_ring_changes_the_inner_part_only():
    flower = facing(flowers(1)[0], petals=5, petal_shape="round", rings=1)
    once, twice = (draw(dataclasses.replace(flower, rings=rings), 128).astype(int) for rings in (1, 2))
    y, x = (np.mgrid[:128, :128] + 0.5) / 128
    radius = np.hypot(x - flower.x, y - flower.y) / flower.radius
    changed = np.abs(once - twice).max(-1) > 12
    assert changed[(radius > flower.center_size) & (radius < 0.6)].mean() > 0.2
    assert not changed[radius > 0.75].any()


def test_tilt_foreshortens_along_its_direction():
    flower = facing(
        flowers(1)[0], petals=8, petal_shape="round", rings=1, petal_color="orange", stem=False, leaves=0
    )
    tilted = dataclasses.replace(flower, tilt=0.6, tilt_direction=0.0)
    y, x = np.mgrid[:128, :128]
    widths = []
    for image in (draw(flower, 128), draw(tilted, 128)):
        red, _, blue = image.astype(int).transpose(2, 0, 1)
        petal = red - blue > 120
        widths.append((x[petal].std(), y[petal].std()))
    (wide, high), (tilted_wide, tilted_high) = widths
    assert tilted_wide / wide == pytest.approx(np.cos(0.6), abs=0.03)
    assert tilted_high / high == pytest.approx(1, abs=0.03)


def test_a_stem_stands_below_the_flower():
    flower = facing(flowers(1)[0], stem=True, leaves=0, background="soil", bend=0.05)
    foot = draw(flower, 128)[127, int((flower.x + flower.bend) * 128)].astype(int)
    bare = draw(dataclasses.replace(flower, stem=False), 128)[
        127, int((flower.x + flower.bend) * 128)
    ].astype(int)
    assert foot[1] > foot[0] + 30 and foot[1] > foot[2] + 30
    assert bare[0] > bare[1] > bare[2]  # brown


def test_sizes_show_the_same_picture():
    for flower in flowers(6):
        large = Image.fromarray(draw(flower, 256)).resize((64, 64), Image.Resampling.BILINEAR)
        large = large.filter(ImageFilter.GaussianBlur(0.6))  # as soft as the pixel filter of 64 pixels a side
        difference = np.abs(np.asarray(large, int) - draw(flower, 64)).mean()
        assert difference < 1.3


def test_the_first_petal_stands_up_give_or_take_a_little():
    turns = (
        np.array([flower.turn for flower in flowers(600)]) + np.pi / 2
    )  # from straight up, where y points down
    assert np.abs(turns).max() <= 0.2
    assert turns.min() < -0.19 and turns.max() > 0.19
    assert abs(turns.mean()) < 4 * 0.2 / np.sqrt(3 * 600)


def likeness_to_the_mirror(flower):
    """How well the petals cover their own mirror image, left to right about the flower's middle: 0..1."""
    red, _, blue = draw(flower, 256).astype(int).transpose(2, 0, 1)
    petal = red - blue > 90
    mirrored = petal[:, ::-1]
    return (petal & mirrored).sum() / (petal | mirrored).sum()


@pytest.mark.parametrize("petals", PETAL_COUNTS)
def test_an_upright_flower_is_its_own_mirror_image_and_a_turned_one_is_not(petals):
    plain = {"petals": petals, "petal_shape": "narrow", "petal_color": "orange", "center_color": "green"}
    flower = facing(flowers(1)[0], **plain, rings=1, x=0.5, stem=False, leaves=0, background="sky")
    upright = likeness_to_the_mirror(dataclasses.replace(flower, turn=-np.pi / 2))
    turned = likeness_to_the_mirror(dataclasses.replace(flower, turn=-np.pi / 2 + np.pi / (2 * petals)))
    assert upright > 0.75  # but for what is irregular in every petal
    assert turned < 0.3


# The pixel filter


def canvas(side=24, seed=0):
    return np.random.default_rng(seed).random((3, side, side)).astype("float32")


def test_the_weights_of_the_filter_are_symmetric_and_sum_to_one():
    assert _PIXEL_FILTER.sum() == 1
    np.testing.assert_array_equal(_PIXEL_FILTER, _PIXEL_FILTER[::-1])
    places = (np.arange(len(_PIXEL_FILTER)) - (len(_PIXEL_FILTER) - 1) / 2) / _SUPERSAMPLING  # in pixels
    assert np.sqrt((_PIXEL_FILTER * places**2).sum()) == pytest.approx(0.75, abs=0.005)
    finest = np.cos(np.pi * places)  # half a wave a pixel
    assert (_PIXEL_FILTER * finest).sum() == pytest.approx(0.04, abs=0.005)


def test_a_plain_canvas_stays_plain_up_to_its_rim():
    plain = np.broadcast_to(np.float32([0.2, 0.5, 0.9])[:, None, None], (3, 16, 16))
    np.testing.assert_allclose(_reduced(plain), plain[:, ::_SUPERSAMPLING, ::_SUPERSAMPLING], rtol=1e-6)


def test_pixels_are_the_weighted_sums_over_their_grid_points():
    fine = canvas()
    weights = np.outer(_PIXEL_FILTER, _PIXEL_FILTER)
    reduced = _reduced(fine)
    assert reduced.shape == (3, 12, 12)
    reach = len(_PIXEL_FILTER) // 2  # grid points on either side of a pixel's middle
    for row, column in np.ndindex(12, 12):
        middle = np.array([row, column]) * _SUPERSAMPLING + _SUPERSAMPLING // 2
        ys, xs = (np.clip(np.arange(at - reach, at + reach), 0, 23) for at in middle)  # the rim goes on
        expected = (fine[:, ys[:, None], xs] * weights).sum((1, 2))
        np.testing.assert_allclose(reduced[:, row, column], expected, rtol=1e-5)


@pytest.mark.parametrize("axis", [1, 2])
def test_a_mirrored_canvas_gives_the_mirrored_pixels(axis):
    mirrored = _reduced(np.flip(canvas(), axis))
    np.testing.assert_allclose(np.flip(mirrored, axis), _reduced(canvas()), rtol=1e-5)
