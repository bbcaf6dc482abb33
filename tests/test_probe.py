"""The probe reads what was drawn, also from pictures as soft and noisy as a model paints them."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dataset import probe
from dataset.paper_flowers import CENTER_COLORS, PAIRS, PETAL_COLORS, PETAL_COUNTS, draw, sample_flower


def sampled(n, seed):
    return [sample_flower(np.random.default_rng([seed, i]), PAIRS) for i in range(n)]


def drawn(flowers, size=64):
    return np.stack([draw(flower, size) for flower in flowers])


def blurred_and_noisy(images, blur, noise):
    rng = np.random.default_rng(0)
    soft = [Image.fromarray(image).filter(ImageFilter.GaussianBlur(blur)) for image in images]
    return np.clip(np.stack(soft) + rng.normal(0, noise, images.shape) + 0.5, 0, 255).astype(np.uint8)


def fractions_right(images, flowers):
    petal_colors, center_colors, petals = probe.read(images)
    return (
        np.mean([read == flower.petal_color for read, flower in zip(petal_colors, flowers)]),
        np.mean([read == flower.center_color for read, flower in zip(center_colors, flowers)]),
        np.mean([read == flower.petals for read, flower in zip(petals, flowers)]),
    )


@pytest.fixture(scope="module")
def flowers():
    return sampled(300, seed=20_000)


@pytest.fixture(scope="module")
def images(flowers):
    return drawn(flowers)


# Reading


def test_reads_fresh_flowers(images, flowers):
    petal, center, count = fractions_right(images, flowers)
    assert petal >= 0.99 and center >= 0.99 and count >= 0.98


def test_reads_blurred_and_noisy_flowers(images, flowers):
    petal, center, count = fractions_right(blurred_and_noisy(images, 0.8, 4), flowers)
    assert petal >= 0.98 and center >= 0.98 and count >= 0.96


@pytest.mark.parametrize("size", [32, 96, 256])
def test_reads_other_sizes(size):
    flowers = sampled(40, seed=20_001)
    assert min(fractions_right(drawn(flowers, size), flowers)) >= 0.97


@pytest.mark.parametrize("petals", PETAL_COUNTS)
def test_reads_every_count_wherever_the_flower_is(petals):
    flowers = [dataclasses.replace(f, petals=petals, radius=0.33) for f in sampled(3, seed=20_002)]
    places = [(0.36, 0.36), (0.64, 0.36), (0.5, 0.5), (0.64, 0.64)]
    moved = [dataclasses.replace(f, x=x, y=y) for f in flowers for x, y in places]
    assert fractions_right(drawn(moved), moved) == (1, 1, 1)


def test_each_picture_is_read_by_itself(images):
    together = probe.read(images[:6])
    for i in range(6):
        alone = probe.read(images[i : i + 1])
        assert alone.petal_colors[0] == together.petal_colors[i]
        assert alone.center_colors[0] == together.center_colors[i]
        assert alone.petals[0] == together.petals[i]


def test_answers_even_where_there_is_no_flower():
    rng = np.random.default_rng(0)
    nothing = np.stack([np.full((64, 64, 3), v, np.uint8) for v in (0, 128, 255)])
    noise = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
    readings = probe.read(np.concatenate([nothing, noise]))
    assert len(readings.petal_colors) == len(readings.center_colors) == len(readings.petals) == 5
    assert set(readings.petal_colors) <= set(PETAL_COLORS) and set(readings.center_colors) <= set(
        CENTER_COLORS
    )
    assert set(readings.petals.tolist()) <= set(PETAL_COUNTS)
    assert not any(petal == center for petal, center in zip(readings.petal_colors, readings.center_colors))


def test_no_pictures_no_readings():
    readings = probe.read(np.zeros((0, 64, 64, 3), np.uint8))
    assert readings.petal_colors == readings.center_colors == [] and readings.petals.shape == (0,)


# What a sentence asks for


@pytest.mark.parametrize(
    ("text", "petal_color", "center_color", "petals"),
    [
        ("this flower has five pointed pink petals around a yellow center", "pink", "yellow", 5),
        ("A white flower, with three petals and a red middle.", "white", "red", 3),
        ("the eight petals of this flower are blue and its center is white", "blue", "white", 8),
        ("a brown center is surrounded by six round petals that are red", "red", "brown", 6),
        ("four purple petals with yellow stamens in two rings with two leaves", "purple", "yellow", 4),
        ("an orange flower with a purple center", "orange", "purple", None),
        ("a red flower", "red", None, None),
        ("white", "white", None, None),
        ("a lake at noon", None, None, None),
        ("", None, None, None),
    ],
)
def test_asked(text, petal_color, center_color, petals):
    assert probe.asked(text) == {"petal_color": petal_color, "center_color": center_color, "petals": petals}


# Scores


def test_score_counts_what_is_right():
    flower = dataclasses.replace(sampled(1, seed=5)[0], petal_color="pink", center_color="yellow", petals=5)
    texts = [
        "five pink petals around a yellow center",
        "five pink petals around a white center",
        "six pink petals around a yellow center",
        "a red flower with a yellow center",
    ]
    result = probe.score(drawn([flower] * 4), texts)
    assert result == {
        "petal_color": 3 / 4,
        "center_color": 3 / 4,
        "both_colors": 2 / 4,
        "petals": pytest.approx(2 / 3),  # one sentence names no number
        "n": 4,
    }


def test_score_of_what_no_sentence_names_is_not_a_number(images):
    result = probe.score(images[:2], ["a flower", "a flower"])
    assert np.isnan(
        [result["petal_color"], result["center_color"], result["both_colors"], result["petals"]]
    ).all()


def test_shuffled_sentences_score_at_chance(images, flowers):
    texts = [f"{f.petal_color} petals around a {f.center_color} center" for f in flowers]
    assert probe.score(images[:150], texts[:150])["both_colors"] >= 0.98
    assert probe.score(images[:150], texts[150:])["both_colors"] < 0.10  # one pair of 38 by chance


def test_score_needs_a_text_for_every_picture(images):
    with pytest.raises(ValueError, match="Received: 1 and 2"):
        probe.score(images[:2], ["a red flower"])
