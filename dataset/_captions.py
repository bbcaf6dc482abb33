"""Where data comes from: the sentences about a paper flower, and what such a sentence asks for."""

NUMBER_WORDS = {3: "three", 4: "four", 5: "five", 6: "six", 8: "eight"}
CENTER_WORDS = ("center", "middle", "stamen")
CAPTION_LENGTH = 20  # words, as in the Cup's data

# Every sentence names both colours. A colour belongs to the centre when a word for the centre follows it,
# or stands before it as in "its center is yellow"; `asked` relies on that.
_WITH_COUNT = (
    "this flower has {count} {shape} {petal} petals around {a_center} {middle}",
    "this flower has {count} {petal} petals and {a_center} {middle}",
    "{a_petal} flower with {count} {shape} petals and {a_center} {middle}",
    "{a_petal} flower with {count} petals around its {center} {middle}",
    "the {count} petals of this flower are {petal} and {shape} and its {middle} is {center}",
    "{count} {shape} {petal} petals surround {a_center} {middle}",
    "this {petal} flower with {a_center} {middle} has {count} {shape} petals",
    "the petals are {petal} and there are {count} of them around {a_center} {middle}",
    "a flower with {count} {petal} petals whose {middle} is {center}",
    "{a_center} {middle} is surrounded by {count} {shape} petals that are {petal}",
)
_WITHOUT_COUNT = (
    "{a_petal} flower with {a_center} {middle}",
    "this flower has {shape} petals that are {petal} and {a_center} {middle}",
    "a flower with {petal} petals and {a_center} {middle}",
    "the {shape} petals of this flower are {petal} and its {middle} is {center}",
)
_RINGS = {1: ("in one ring", "in a single ring"), 2: ("in two rings", "in a double ring")}
_PLACES = {
    "meadow": ("in a meadow", "in the grass"),
    "sky": ("against the sky", "under a clear sky"),
    "shade": ("in the shade", "in a dark garden"),
    "soil": ("over bare soil", "above the earth"),
    "dusk": ("at dusk", "in the evening"),
    "mist": ("in the mist", "on a foggy morning"),
}
_LEAVES = {
    0: ("on a stem", "on a bare stem"),
    1: ("with one leaf",),
    2: ("with two leaves", "on a leafy stem"),
}


def captions(flower, rng):
    """Five different sentences about a flower.

    Args:
        flower: a `Flower`.
        rng: numpy Generator; it is advanced.

    Returns:
        Five str in lower case without punctuation, at most 20 words each. All name the petals' and the
        centre's colour; the first four name the number of petals, the last does so every other time.
    """
    counted = rng.choice(len(_WITH_COUNT), 5, replace=False)
    sentences = [_WITH_COUNT[i] for i in counted]
    if rng.random() < 0.5:
        sentences[4] = _pick(rng, _WITHOUT_COUNT)
    return [_sentence(pattern, flower, rng) for pattern in sentences]


def _sentence(pattern, flower, rng):
    text = pattern.format(
        count=NUMBER_WORDS[flower.petals],
        shape=flower.petal_shape,
        petal=flower.petal_color,
        center=flower.center_color,
        a_petal=_with_article(flower.petal_color),
        a_center=_with_article(flower.center_color),
        middle=_pick(rng, ("center", *CENTER_WORDS)),
    )
    for addition in _additions(flower, rng):
        if len((text + " " + addition).split()) <= CAPTION_LENGTH:
            text += " " + addition
    return text


def _additions(flower, rng):
    """What a sentence may say besides: rings, stem and leaves, place; each in about every third sentence."""
    if rng.random() < (0.5 if flower.rings == 2 else 0.15):
        yield _pick(rng, _RINGS[flower.rings])
    if flower.stem and rng.random() < 0.3:
        yield _pick(rng, _LEAVES[flower.leaves])
    if rng.random() < 0.35:
        yield _pick(rng, _PLACES[flower.background])


def _with_article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def _pick(rng, items):
    return items[rng.integers(len(items))]
