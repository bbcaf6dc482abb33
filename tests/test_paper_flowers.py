"""Paper flowers are where and what their attributes say, and a written data set is in the Cup's format."""

import ast
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dataset import _painter, paper_flowers
from dataset.paper_flowers import (
    BACKGROUNDS,
    CENTER_COLORS,
    HELD_OUT_PAIRS,
    PAIRS,
    PETAL_COLORS,
    PETAL_COUNTS,
    PETAL_SHAPES,
    TRAINING_PAIRS,
    Flower,
    captions,
    draw,
    sample_flower,
    write,
)
from dataset.probe import asked
from errors import InputError

SMALL = {"train": 7, "test": 5, "size": 32, "progress": False}


def flowers(n, seed=0, pairs=PAIRS):
    return [sample_flower(np.random.default_rng([seed, i]), pairs) for i in range(n)]


# What there is


def test_held_out_pairs_are_a_tenth_and_their_colors_occur_in_training():
    assert HELD_OUT_PAIRS < PAIRS
    assert 0.10 <= len(HELD_OUT_PAIRS) / len(PAIRS) <= 0.12
    assert {petal for petal, _ in TRAINING_PAIRS} == set(PETAL_COLORS)
    assert {center for _, center in TRAINING_PAIRS} == set(CENTER_COLORS)
    assert not TRAINING_PAIRS & HELD_OUT_PAIRS
    assert all(petal != center for petal, center in PAIRS)


def test_sampling_reaches_every_value_and_stays_in_the_picture():
    drawn = flowers(600)
    assert {(f.petal_color, f.center_color) for f in drawn} == PAIRS
    assert {f.petals for f in drawn} == set(PETAL_COUNTS)
    assert {f.petal_shape for f in drawn} == set(PETAL_SHAPES)
    assert {f.background for f in drawn} == set(BACKGROUNDS)
    assert {f.rings for f in drawn} == {1, 2}
    assert {(f.stem, f.leaves) for f in drawn} == {(False, 0), (True, 0), (True, 1), (True, 2)}
    for f in drawn:
        assert f.radius <= min(f.x, f.y, 1 - f.x, 1 - f.y)
        assert 0.3 <= f.radius <= 0.42


def test_training_flowers_have_no_held_out_pair():
    assert not {(f.petal_color, f.center_color) for f in flowers(600, pairs=TRAINING_PAIRS)} & HELD_OUT_PAIRS


def test_a_flower_depends_on_seed_and_index_only():
    assert _painter.flower_at(3, 5, train=6)[0] == _painter.flower_at(3, 5, train=600)[0]
    assert _painter.flower_at(3, 5, train=6)[0] != _painter.flower_at(3, 4, train=6)[0]
    assert _painter.flower_at(3, 5, train=6)[0] != _painter.flower_at(4, 5, train=6)[0]


# Captions


def test_captions_say_what_the_flower_is():
    for i in range(300):
        rng = np.random.default_rng(i)
        flower = sample_flower(rng, PAIRS)
        sentences = captions(flower, rng)
        assert len(set(sentences)) == len(sentences) == 5
        for k, sentence in enumerate(sentences):
            assert re.fullmatch(r"[a-z]+( [a-z]+)*", sentence)
            assert len(sentence.split()) <= 20
            wish = asked(sentence)
            assert (wish["petal_color"], wish["center_color"]) == (flower.petal_color, flower.center_color)
            assert wish["petals"] == flower.petals or (k == 4 and wish["petals"] is None)


def test_captions_vary_and_never_lie_about_the_rest():
    said = set()
    for i in range(400):
        rng = np.random.default_rng(i)
        flower = sample_flower(rng)
        for sentence in captions(flower, rng):
            words = set(sentence.split())
            said |= words
            assert words & set(PETAL_SHAPES) <= {flower.petal_shape}
            assert flower.rings == 2 or not words & {"rings", "double"}
            assert flower.rings == 1 or not words & {"ring", "single"} - (
                {"ring"} if "double" in words else set()
            )
            assert flower.stem or not words & {"stem", "leaf", "leaves", "leafy"}
            assert flower.leaves == 1 or "leaf" not in words
            assert flower.leaves == 2 or not words & {"leaves", "leafy"}
            assert flower.background == "sky" or "sky" not in words
    assert set(PETAL_SHAPES) | {"rings", "stem", "leaves", "meadow", "dusk", "an", "center", "middle"} <= said


def test_an_orange_flower_has_the_right_article():
    rng = np.random.default_rng(0)
    texts = [
        s for _ in range(60) for s in captions(dataclasses.replace(flowers(1)[0], petal_color="orange"), rng)
    ]
    assert any("an orange" in text for text in texts)
    assert not any(re.search(r"\ba [aeiou]", text) for text in texts)


# The data set


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flowers") / "paper_flowers"
    write(folder, **SMALL)
    return folder


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_tables_are_the_cups(written):
    training = pd.read_pickle(written / "dataset" / "text2ImgData.pkl")
    testing = pd.read_pickle(written / "dataset" / "testData.pkl")
    assert list(training.columns) == ["Captions", "ImagePath"] and list(testing.columns) == ["ID", "Captions"]
    assert training.index.equals(pd.RangeIndex(7)) and testing.index.equals(pd.RangeIndex(5))
    assert training.Captions.dtype == object and testing.Captions.dtype == object
    assert isinstance(training.ImagePath.dtype, pd.StringDtype) and testing.ID.dtype == np.int64
    assert training.ImagePath[0] == "./102flowers/image_00001.jpg"
    assert testing.ID.tolist() == [8, 9, 10, 11, 12]
    assert all(len(five) == 5 and {len(ids) for ids in five} == {20} for five in training.Captions)
    assert all(len(ids) == 20 and {type(i) for i in ids} == {str} for ids in testing.Captions)


def test_the_dictionary_is_the_cups_and_decodes_the_captions(written):
    word2id, id2word, vocab = (
        np.load(written / "dictionary" / f"{n}.npy") for n in ("word2Id", "id2Word", "vocab")
    )
    size = len(word2id)
    assert word2id.dtype.kind == id2word.dtype.kind == vocab.dtype.kind == "U"
    np.testing.assert_array_equal(word2id, id2word[:, ::-1])
    assert word2id[:, 1].tolist() == [str(i) for i in range(size)]
    assert word2id[0].tolist() == ["<PAD>", "0"]
    assert word2id[-2:].tolist() == [["<PAD>", str(size - 2)], ["<RARE>", str(size - 1)]]
    np.testing.assert_array_equal(vocab[:, 0], word2id[:-2, 0])
    counts = vocab[1:, 1].astype(int)
    assert (np.diff(counts) <= 0).all()

    words = dict(id2word.tolist())
    training = pd.read_pickle(written / "dataset" / "text2ImgData.pkl")
    for index, five in enumerate(training.Captions):
        flower, rng = _painter.flower_at(0, index, train=7)
        decoded = [" ".join(words[i] for i in ids if i != str(size - 2)) for ids in five]
        assert decoded == captions(flower, rng)
    everything = [i for five in training.Captions for ids in five for i in ids]
    assert "0" not in everything and str(size - 1) not in everything


# What version 2 says and draws: of its first 50 flowers the SHA-256 of the sentences; of four the mean of each
# quarter's red, green and blue, and of the differences between neighbours, which tell how sharp the picture is.
SAID = "73940ab912b7f964ff392fa3732212a0344a1c72f7e3725047aeccdea699767f"
DRAWN = [
    [172.0, 189.2, 143.1, 172.0, 182.9, 143.2, 133.7, 162.0, 108.4, 126.2, 150.3, 100.3, 4.7],
    [163.1, 154.6, 179.3, 164.5, 165.8, 181.1, 147.6, 121.6, 153.3, 142.8, 137.6, 156.7, 2.6],
    [161.0, 175.2, 111.4, 140.3, 165.3, 107.4, 117.6, 142.1, 74.3, 117.3, 142.8, 75.1, 3.0],
    [148.7, 146.6, 201.7, 143.5, 147.9, 201.5, 163.4, 153.8, 202.0, 149.8, 160.6, 187.4, 5.2],
]


def test_the_version_says_when_the_drawing_has_changed():
    """A failure asks for a higher `VERSION`, with the new numbers here, so that nobody trains on a mix of both."""
    said, drawn = hashlib.sha256(), []
    for index in range(50):
        flower, rng = _painter.flower_at(0, index, train=25)
        said.update("\n".join(captions(flower, rng)).encode())
        if index < len(DRAWN):
            image = draw(flower, 64).astype(float)
            quarters = image.reshape(2, 32, 2, 32, 3).mean((1, 3)).ravel()
            drawn.append([*quarters, np.abs(np.diff(image, axis=1)).mean()])
    assert paper_flowers.VERSION == 2
    assert said.hexdigest() == SAID
    np.testing.assert_allclose(drawn, DRAWN, atol=0.15)


def test_a_data_set_keeps_what_it_was_drawn_from(written):
    kept = json.loads((written / "drawing.json").read_text())
    assert kept == {"version": 2, "train": 7, "test": 5, "size": 32, "seed": 0}
    paper_flowers.require_same(written, train=7, test=5, size=32)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"version": 0}, "version 0, expected 2"),
        ({"size": 64, "seed": 3}, "size 64, expected 32; seed 3, expected 0"),
        ({"train": None}, "train unknown, expected 7"),
        (None, "version unknown, expected 2; train unknown, expected 7; test unknown, expected 5;"),
    ],
)
def test_data_that_would_be_drawn_otherwise_are_refused_and_left_alone(written, tmp_path, change, line):
    folder = tmp_path / "flowers"
    shutil.copytree(written, folder)
    file = folder / "drawing.json"
    if change is None:  # as versions before the first left it
        file.unlink()
    else:
        kept = json.loads(file.read_text()) | change
        file.write_text(json.dumps({name: value for name, value in kept.items() if value is not None}))
    before = contents(folder)
    with pytest.raises(InputError) as refusal:
        paper_flowers.require_same(folder, train=7, test=5, size=32)
    assert str(refusal.value).startswith(f"{folder}: received paper flowers of {line}")
    assert str(refusal.value).endswith(
        "; rename the folder to have them drawn anew; to train on these, give its new name to --data"
    )
    assert contents(folder) == before


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_note_of_the_drawing_is_refused(tmp_path, text):
    (tmp_path / "drawing.json").write_text(text)
    with pytest.raises(InputError, match=r"drawing\.json: cannot be read|version unknown"):
        paper_flowers.require_same(tmp_path)


def test_pictures_of_the_users_own_are_no_paper_flowers(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    paper_flowers.require_same(tmp_path)


@pytest.mark.skipif(
    "CUP3_REAL_DATA" not in os.environ, reason="CUP3_REAL_DATA does not name the real data's folder"
)
def test_types_equal_those_of_the_real_files(written):
    real = Path(os.environ["CUP3_REAL_DATA"]) / "cup3_flowers"
    for name in ("text2ImgData.pkl", "testData.pkl"):
        ours, theirs = (pd.read_pickle(folder / "dataset" / name) for folder in (written, real))
        assert ours.dtypes.to_dict() == theirs.dtypes.to_dict()
        assert type(ours.index) is type(theirs.index)
    for name in ("word2Id", "id2Word", "vocab"):
        ours, theirs = (np.load(folder / "dictionary" / f"{name}.npy") for folder in (written, real))
        assert ours.dtype.kind == theirs.dtype.kind and ours.shape[1] == theirs.shape[1]
        special = np.isin(theirs, ["<PAD>", "<RARE>"]).any(1)
        assert special.sum() == np.isin(ours, ["<PAD>", "<RARE>"]).any(1).sum()
    real_sizes = [len(np.load(real / "dictionary" / f"{n}.npy")) for n in ("word2Id", "vocab")]
    our_sizes = [len(np.load(written / "dictionary" / f"{n}.npy")) for n in ("word2Id", "vocab")]
    assert real_sizes[0] - real_sizes[1] == our_sizes[0] - our_sizes[1]


def test_the_attributes_redraw_the_pictures(written):
    rows = pd.read_csv(written / "attributes.csv")
    assert rows.split.tolist() == ["train"] * 7 + ["test"] * 5
    for row in rows.to_dict("records"):
        path = written / row.pop("ImagePath")
        is_training = row.pop("split") == "train"
        flower = Flower(**row)
        assert not (is_training and (flower.petal_color, flower.center_color) in HELD_OUT_PAIRS)
        with Image.open(path) as picture:
            assert picture.format == "JPEG" and picture.mode == "RGB" and picture.size == (32, 32)
            assert all((h, v) == (1, 1) for _, h, v, _ in picture.layer)  # 4:4:4
            assert np.abs(np.asarray(picture, int) - draw(flower, 32)).mean() < 3
    assert len(list((written / "102flowers").iterdir())) == 12


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_processes(written, tmp_path, monkeypatch):
    write(tmp_path / "again", **SMALL)
    assert contents(tmp_path / "again") == contents(written)
    monkeypatch.setattr(_painter, "_WORTH_A_PROCESS", 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)  # 12 pictures: 3 processes
    write(tmp_path / "processes", **SMALL)
    assert contents(tmp_path / "processes") == contents(written)


def test_another_seed_gives_other_pictures(written, tmp_path):
    write(tmp_path / "other", **SMALL, seed=1)
    ours, theirs = contents(written), contents(tmp_path / "other")
    pictures = [name for name in ours if name.endswith(".jpg")]
    assert len(pictures) == 12 and all(ours[name] != theirs[name] for name in pictures)


def test_data_beside_the_module_of_its_name_does_not_hide_it(tmp_path):
    """The default data folder is dataset/paper_flowers, beside dataset/paper_flowers.py."""
    package = tmp_path / "dataset"
    package.mkdir()
    for name in (
        "__init__.py",
        "paper_flowers.py",
        "_captions.py",
        "_drawing.py",
        "_flower.py",
        "_painter.py",
    ):
        (package / name).write_bytes((Path(_painter.__file__).parent / name).read_bytes())
    (tmp_path / "errors.py").write_bytes((Path(_painter.__file__).parent.parent / "errors.py").read_bytes())
    program = (
        "from dataset.paper_flowers import write; write('dataset/paper_flowers', train=1, test=1, size=32)\n"
    )
    for expected in (0, 1):  # the second time the module is still found, and refuses to overwrite
        run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == expected, run.stderr
    assert "InputError" in run.stderr and "new or empty folder" in run.stderr


@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        ("size", 31, "size must be 32 to 512"),
        ("size", 513, "Received: 513"),
        ("size", 64.0, "Received: 64.0"),
        ("train", 0, "train must be a whole number of at least 1. Received: 0"),
        ("test", -3, "test must be a whole number of at least 1. Received: -3"),
        ("seed", -1, "seed must be a whole number of at least 0. Received: -1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_made(tmp_path, argument, value, named):
    with pytest.raises(InputError, match=re.escape(named)):
        write(tmp_path / "flowers", **{**SMALL, argument: value})
    assert not list(tmp_path.iterdir())


def test_a_taken_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="new or empty folder"):
        write(tmp_path, **SMALL)
    with pytest.raises(InputError, match="notes.txt"):
        write(tmp_path / "notes.txt", **SMALL)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_an_empty_folder_is_taken(written, tmp_path):
    (tmp_path / "flowers").mkdir()
    write(tmp_path / "flowers", **SMALL)
    assert contents(tmp_path / "flowers") == contents(written)


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written here") as caught:
        write(tmp_path / "file" / "flowers", **SMALL)
    assert "\n" not in str(caught.value) and str(tmp_path / "file") in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, fault, seen):
    write_bytes = Path.write_bytes

    def failing(path, data):
        if path.name == "image_00009.jpg":
            assert not (tmp_path / "flowers").exists()  # nothing looks finished before all is there
            raise fault
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", failing)
    with pytest.raises(seen):
        write(tmp_path / "flowers", **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_drawing_process_that_dies_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(_painter, "_WORTH_A_PROCESS", 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended early with exit code 1"):
        write(tmp_path / "flowers", **SMALL)
    assert not list(tmp_path.iterdir())


def test_the_drawing_processes_do_not_import_tensorflow():
    """What `python -m dataset._painter` imports is what it costs to start; read from the source."""
    for name in ("_painter", "_drawing", "_flower"):
        tree = ast.parse((Path(_painter.__file__).parent / f"{name}.py").read_text())
        imported = {
            getattr(n, "module", None) or n.names[0].name for n in ast.walk(tree) if hasattr(n, "names")
        }
        assert not {module.split(".")[0] for module in imported} & {"tensorflow", "keras", "pandas"}
