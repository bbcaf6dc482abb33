"""Where data comes from: paper flowers, the built-in data, drawn and captioned in the Cup3 format.

    rng = np.random.default_rng(0)
    flower = sample_flower(rng)
    images = draw(flower, 64)
    sentences = captions(flower, rng)

`write` makes a whole data set of them, `dataset.probe` reads the attributes back from pictures.
"""

import collections
import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from dataset._captions import CAPTION_LENGTH, captions
from dataset._drawing import draw
from dataset._flower import (
    BACKGROUNDS,
    CENTER_COLORS,
    HELD_OUT_PAIRS,
    PAIRS,
    PETAL_COLORS,
    PETAL_COUNTS,
    PETAL_SHAPES,
    TRAINING_PAIRS,
    Flower,
    sample_flower,
)
from dataset._painter import flower_at, jpegs
from errors import InputError

__all__ = [
    "BACKGROUNDS",
    "CENTER_COLORS",
    "HELD_OUT_PAIRS",
    "PAIRS",
    "PETAL_COLORS",
    "PETAL_COUNTS",
    "PETAL_SHAPES",
    "TRAINING_PAIRS",
    "Flower",
    "captions",
    "draw",
    "require_same",
    "sample_flower",
    "write",
]

SMALLEST_SIZE, LARGEST_SIZE = 32, 512
TRAIN, TEST, SIZE, SEED = 4096, 512, 64, 0  # of a data set whose numbers are not given
VERSION = 2  # to be raised with every change of what is drawn or said, which a test notices
_DRAWING = "drawing.json"


def write(folder, *, train=TRAIN, test=TEST, size=SIZE, seed=SEED, progress=True):
    """Draws a data set in the Cup3 layout; the same arguments give the same bytes in every file.

    The folder then holds

        dataset/text2ImgData.pkl    for training, a DataFrame: Captions (5 lists of 20 ids), ImagePath
        dataset/testData.pkl        for testing: ID (the number in the picture's name), Captions (20 ids)
        dictionary/word2Id.npy      rows (word, id); id2Word.npy: (id, word); vocab.npy: (word, occurrences)
        102flowers/image_NNNNN.jpg  training pictures from 00001 on, then those of testing
        attributes.csv              a row a picture: ImagePath, split and every attribute of its `Flower`
        drawing.json                the arguments, and the version of the drawing

    Colour pairs in `HELD_OUT_PAIRS` occur in the test pictures only.

    Args:
        folder: where to; must not exist or be empty. It appears when all is written, never before.
        train, test: numbers of pictures.
        size: side of the pictures in pixels, 32 to 512.
        seed: flower i depends on (seed, i) and on whether it is for training.
        progress: whether to show a progress bar.

    Raises:
        InputError: a number is out of its range, the folder is taken, or it cannot be written.
    """
    _check("size", size, SMALLEST_SIZE, LARGEST_SIZE)
    _check("train", train, 1)
    _check("test", test, 1)
    _check("seed", seed, 0)
    folder = Path(folder)
    with _refusing_os_errors(folder), _appearing_at_the_end(folder) as unfinished:
        drawing = json.dumps(_drawing(train, test, size, seed), indent=2)
        (unfinished / _DRAWING).write_text(drawing + "\n")
        _write_tables(unfinished, seed, train, train + test)
        files = jpegs(seed, size, train, train + test)
        pictures = tqdm(files, "drawing", train + test, disable=None if progress else True)
        for index, data in enumerate(pictures):
            (unfinished / _image_path(index)).write_bytes(data)


def require_same(folder, *, train=TRAIN, test=TEST, size=SIZE, seed=SEED):
    """Refuses paper flowers that `write` would draw otherwise today; data of another kind are passed over.

    Args:
        folder: a data folder. Nothing in it is changed.
        train, test, size, seed: as for `write`.

    Raises:
        InputError: names what differs, and what can be done.
    """
    folder = Path(folder)
    if not any((folder / name).exists() for name in (_DRAWING, "attributes.csv")):
        return
    found, wanted = _read_drawing(folder / _DRAWING), _drawing(train, test, size, seed)
    unlike = [
        f"{name} {found.get(name, 'unknown')}, expected {value}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if unlike:
        raise InputError(
            f"{folder}: received paper flowers of {'; '.join(unlike)}; rename the folder to have them drawn anew; "
            "to train on these, give its new name to --data"
        )


def _drawing(train, test, size, seed):
    """All that the files depend on, as `drawing.json` keeps it."""
    return {"version": VERSION, "train": int(train), "test": int(test), "size": int(size), "seed": int(seed)}


def _read_drawing(file):
    """What `_drawing` gave; empty where an older version wrote none."""
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _check(name, value, least, most=None):
    fits = isinstance(value, int | np.integer) and least <= value and (most is None or value <= most)
    if not fits:
        wanted = f"{least} to {most}" if most else f"a whole number of at least {least}"
        raise InputError(f"paper flowers: {name} must be {wanted}. Received: {value!r}")


@contextlib.contextmanager
def _refusing_os_errors(folder):
    """A full disk, a read-only folder and the like, in one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{folder}: paper flowers cannot be written here: {error.strerror or error}"
        ) from error


@contextlib.contextmanager
def _appearing_at_the_end(folder):
    """Gives a folder beside the wanted one, which takes its name when all went well and vanishes otherwise."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder}: expected a new or empty folder for paper flowers, but something is there already; "
            "give --out another folder, or remove this one"
        )
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=parent, prefix=f".{folder.name}.unfinished-"))
    try:
        unfinished.chmod(0o755)
        for name in ("dataset", "dictionary", "102flowers"):
            (unfinished / name).mkdir()
        yield unfinished
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_tables(folder, seed, train, total):
    """Everything but the pictures."""
    flowers, sentences = [], []
    for index in range(total):
        flower, rng = flower_at(seed, index, train)
        flowers.append(flower)
        sentences.append(captions(flower, rng))
    ids = _write_dictionary(folder / "dictionary", sentences)
    paths = [f"./{_image_path(index)}" for index in range(total)]

    encoded = [[_encode(sentence, ids) for sentence in five] for five in sentences[:train]]
    training = pd.DataFrame({"Captions": encoded, "ImagePath": paths[:train]})
    training.to_pickle(folder / "dataset" / "text2ImgData.pkl")
    encoded = [_encode(five[0], ids) for five in sentences[train:]]
    testing = pd.DataFrame({"ID": np.arange(train + 1, total + 1, dtype=np.int64), "Captions": encoded})
    testing.to_pickle(folder / "dataset" / "testData.pkl")

    attributes = pd.DataFrame([dataclasses.asdict(flower) for flower in flowers])
    attributes.insert(0, "ImagePath", paths)
    attributes.insert(1, "split", ["train"] * train + ["test"] * (total - train))
    attributes.to_csv(folder / "attributes.csv", index=False)


def _write_dictionary(folder, sentences):
    """Writes the three tables of words; returns the id of each word, and of '<PAD>', as str."""
    counts = collections.Counter(word for five in sentences for sentence in five for word in sentence.split())
    words = sorted(counts, key=lambda word: (-counts[word], word))
    paddings = sum(len(five) for five in sentences) * CAPTION_LENGTH - counts.total()
    rows = [(word, str(number)) for number, word in enumerate(["<PAD>", *words, "<PAD>", "<RARE>"])]
    np.save(folder / "word2Id.npy", np.array(rows))
    np.save(folder / "id2Word.npy", np.array([(number, word) for word, number in rows]))
    np.save(
        folder / "vocab.npy",
        np.array([("<PAD>", str(paddings)), *((word, str(counts[word])) for word in words)]),
    )
    return dict(rows)  # of the two paddings the last counts, as in the Cup's data


def _encode(sentence, ids):
    """A sentence as `CAPTION_LENGTH` ids, each a str."""
    words = sentence.split()
    return [ids[word] for word in words] + [ids["<PAD>"]] * (CAPTION_LENGTH - len(words))


def _image_path(index):
    return f"102flowers/image_{index + 1:05d}.jpg"
