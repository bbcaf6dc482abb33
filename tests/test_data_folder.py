"""Layouts of captioned pictures: each is read to what was laid out, and each fault is named at the door."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from errors import InputError
from input_pipeline.data_folder import load_data

WORDS = ["<PAD>", "flower", "petals", "pink", "<PAD>", "<RARE>"]  # padding is '4'
REAL = os.environ.get("CUP3_REAL_DATA")


def row(*ids):
    return [str(i) for i in ids] + ["4"] * (20 - len(ids))


def cup3(
    root, captions=None, images=("./102flowers/image_00001.jpg", "./102flowers/image_00002.jpg"), tests=True
):
    """Write two pictures with their captions in the Cup3 layout."""
    for folder in ("dataset", "dictionary", "102flowers"):
        (root / folder).mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (16, 16)).save(root / "102flowers" / f"image_{number:05}.jpg")
    np.save(root / "dictionary" / "word2Id.npy", np.array([(word, str(i)) for i, word in enumerate(WORDS)]))
    captions = [[row(1, 2), row(3)], [row(5, 0, 1)]] if captions is None else captions
    table = pd.DataFrame({"Captions": captions, "ImagePath": list(images)})
    table.to_pickle(root / "dataset" / "text2ImgData.pkl")
    if tests:
        test_table = pd.DataFrame({"ID": [7, 9], "Captions": [row(1), row(2, 3)]})
        test_table.to_pickle(root / "dataset" / "testData.pkl")
    return root


def contents(folder):
    """Everything below a folder with its time and, of a file, its bytes; links are not followed."""
    return {
        path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


def refused(folder, *parts, conditioning="text"):
    """Asserts that the folder is refused in one line, which begins with a place in it, holds `parts` in their order and
    tells no more than a line can; and that nothing in the folder changed."""
    before = contents(folder)
    with pytest.raises(InputError) as refusal:
        load_data(folder, conditioning)
    message = str(refusal.value)
    assert message.isprintable() and len(message) < 400
    assert message.startswith(str(folder))
    place = 0
    for part in parts:
        assert part in message[place:], f"{part!r} is missing after place {place} of {message!r}"
        place = message.index(part, place)
    assert contents(folder) == before


@pytest.mark.parametrize(("laid", "given"), [(".", "."), ("dataset", "dataset"), ("dataset", ".")])
def test_cup3_layout_in_both_arrangements(tmp_path, laid, given):
    root = cup3(tmp_path / laid)
    data = load_data(tmp_path / given)
    assert data.paths == tuple(root / "102flowers" / f"image_0000{number}.jpg" for number in (1, 2))
    assert [rows[:, :3].tolist() for rows in data.captions] == [[[1, 2, 4], [3, 4, 4]], [[5, 4, 1]]]
    assert all(rows.dtype == np.int32 and rows.shape[1] == 20 for rows in data.captions)
    assert data.vocabulary.decode(data.test_tokens) == ["flower", "petals pink"]


def test_tests_may_be_absent(tmp_path):
    data = load_data(cup3(tmp_path / "d", tests=False))
    assert data.test_tokens is None


def test_a_linked_data_folder_is_fine(tmp_path):
    (tmp_path / "link").symlink_to(cup3(tmp_path / "d"))
    assert len(load_data(tmp_path / "link").paths) == 2


@pytest.mark.parametrize(
    ("captions", "parts"),
    [
        ([[row(1)], [row(1), row(6)]], ["row 1", "id 6", "expected 0 to 5"]),
        ([[row(1)], [row(-1)]], ["row 1", "id -1"]),
        ([[row(1)], [row("rose")]], ["row 1", "'rose'"]),
        ([[row(1)[:19]], [row(1)]], ["row 0", "a list of 20 ids"]),
        ([[row(1)], []], ["row 1", "[]", "expected a list of captions"]),
        ([[row(1)], "flower"], ["row 1", "'flower'"]),
        ([[row(1)], [row()]], ["row 1", "empty caption"]),
        ([[row(1)], [row(0, 0)]], ["row 1", "empty caption"]),
        ([[row(1)], row(1)], ["row 1", "caption '1'"]),
    ],
)
def test_refuses_captions(tmp_path, captions, parts):
    refused(cup3(tmp_path / "d", captions), "text2ImgData.pkl", *parts)


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("./102flowers/image_00009.jpg", ["row 1", "image_00009.jpg does not exist"]),
        ("../secret.jpg", ["row 1", "'../secret.jpg'", "leaves the data folder"]),
        ("102flowers/../../secret.jpg", ["row 1", "leaves the data folder"]),
        ("/etc/hostname", ["row 1", "'/etc/hostname'", "leaves the data folder"]),
        ("..\\secret.jpg", ["row 1", "leaves the data folder"]),
        ("102flowers/link.jpg", ["row 1", "link out of the data folder"]),
        ("linked/secret.jpg", ["row 1", "link out of the data folder"]),
        ("102flowers", ["row 1", "does not exist"]),
        ("", ["row 1", "''"]),
    ],
)
def test_refuses_image_paths(tmp_path, image, parts):
    (tmp_path / "outside").mkdir()
    for secret in (tmp_path / "secret.jpg", tmp_path / "outside" / "secret.jpg"):
        Image.new("RGB", (16, 16)).save(secret)
    root = cup3(tmp_path / "d", images=("./102flowers/image_00001.jpg", image))
    (root / "102flowers" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "linked").symlink_to(tmp_path / "outside")
    refused(root, "text2ImgData.pkl", *parts)


def test_refuses_missing_columns_and_empty_tables(tmp_path):
    root = cup3(tmp_path / "d")
    file = root / "dataset" / "text2ImgData.pkl"
    pd.DataFrame({"Captions": [[row(1)]], "Image": ["a"]}).to_pickle(file)
    refused(root, "text2ImgData.pkl", "column ImagePath is missing", "received Captions, Image")
    pd.DataFrame({"Captions": [], "ImagePath": []}).to_pickle(file)
    refused(root, "text2ImgData.pkl", "has no rows")
    file.write_bytes(file.read_bytes()[:-9])
    refused(root, "text2ImgData.pkl", "truncated")


def test_refuses_bad_tests(tmp_path):
    root = cup3(tmp_path / "d")
    file = root / "dataset" / "testData.pkl"
    pd.DataFrame({"ID": [1, 2], "Captions": [row(1), row(8)]}).to_pickle(file)
    refused(root, "testData.pkl", "row 1", "id 8")
    pd.DataFrame({"ID": ["a"], "Captions": [row(1)]}).to_pickle(file)
    refused(root, "testData.pkl", "column ID", "expected whole numbers")
    pd.DataFrame({"Captions": [row(1)]}).to_pickle(file)
    refused(root, "testData.pkl", "column ID is missing")


def test_refuses_missing_folders_and_dictionaries(tmp_path):
    refused(tmp_path / "none", "none", "is no folder")
    ways_out = ["give --data a folder that does", "--conditioning class", "none"]
    refused(tmp_path, str(tmp_path), "holds neither", *ways_out)
    root = cup3(tmp_path / "d")
    (root / "dictionary" / "word2Id.npy").write_bytes(b"junk")
    refused(root, "word2Id.npy", "cannot be read as a dictionary")
    (root / "dictionary" / "word2Id.npy").unlink()
    refused(root, "word2Id.npy", "cannot be read as a dictionary")


ROWS = [("a.png", "A red rose."), ("sub/b.png", "two, tulips"), ("a.png", "a rose")]


def metadata(folder, kind, rows=ROWS, names=("file_name", "text")):
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (16, 16)).save(folder / name)
    if kind == "csv":
        pd.DataFrame(rows, columns=names).to_csv(folder / "metadata.csv", index=False)
    else:
        lines = [json.dumps(dict(zip(names, values, strict=True))) for values in rows]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_with_metadata(tmp_path, kind):
    data = load_data(metadata(tmp_path / "d", kind))
    assert data.paths == (tmp_path / "d" / "a.png", tmp_path / "d" / "sub" / "b.png")
    assert [data.vocabulary.decode(rows) for rows in data.captions] == [
        ["a red rose", "a rose"],
        ["two tulips"],
    ]
    assert data.vocabulary.words[1:3] == ("a", "rose")
    assert data.test_tokens is None


@pytest.mark.parametrize(("kind", "header"), [("csv", 1), ("jsonl", 0)])
@pytest.mark.parametrize(
    ("rows", "line", "part"),
    [
        ([("a.png", "rose"), ("c.png", "rose")], 2, "c.png does not exist; mend the path, or remove the row"),
        ([("a.png", "rose"), ("../c.png", "rose")], 2, "leaves the data folder"),
        ([("a.png", " .,"), ("a.png", "rose")], 1, "expected a caption"),
        ([("a.png", ""), ("a.png", "rose")], 1, "expected a caption"),
        ([], None, "has no rows"),
    ],
)
def test_refuses_metadata_rows_by_their_line(tmp_path, kind, header, rows, line, part):
    place = f": line {line + header}: " if line else ""
    refused(metadata(tmp_path / "d", kind, rows), f"metadata.{kind}{place}", part)


def test_a_line_is_that_of_the_file_where_texts_and_gaps_take_several(tmp_path):
    folder = metadata(tmp_path / "d", "csv")
    (folder / "metadata.csv").write_text('file_name,text\na.png,"a\nrose"\n\nc.png,rose\n')
    refused(folder, "metadata.csv: line 5: image")
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text('\n{"file_name": "c.png", "text": "rose"}\n')
    refused(folder, "metadata.jsonl: line 2: image")


@pytest.mark.parametrize("delimiter", [";", "\t"])
@pytest.mark.parametrize("header", ["file_name{}text", '"file_name"{}"text"', "number{}text{}file_name"])
def test_tables_of_semicolons_and_tabs_are_read(tmp_path, delimiter, header):
    folder = metadata(tmp_path / "d", "csv")
    names = header.replace('"', "").split("{}")
    rows = [{"number": "1", "file_name": name, "text": text} for name, text in ROWS]
    lines = [
        header.format(delimiter, delimiter),
        *(delimiter.join(row[name] for name in names) for row in rows),
    ]
    expected = load_data(folder)
    (folder / "metadata.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    found = load_data(folder)
    assert found.paths == expected.paths and found.vocabulary.words == expected.vocabulary.words
    for own, other in zip(found.captions, expected.captions, strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_refuses_metadata_without_the_columns(tmp_path, kind):
    folder = metadata(tmp_path / "d", kind, names=("file", "text"))
    parts = ["column file_name is missing", "received file, text", "expected file_name and text"]
    refused(folder, f"metadata.{kind}", *parts)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "rose"}\n{"file', ["line 2", "no JSON"]),
        ("metadata.jsonl", b"[1]", ["line 1", "expected an object"]),
        ("metadata.jsonl", b"\xff\xff", ["cannot be read as UTF-8"]),
        ("metadata.jsonl", b"", ["has no rows"]),
        ("metadata.csv", b"file_name,text\na.png,\xff", ["cannot be read as CSV in UTF-8", "'CSV UTF-8'"]),
        ("metadata.csv", b"file_name,text\na.png\n", ["line 2", "expected a caption"]),
        (
            "metadata.csv",
            b"file_name;text\na.png;a;b\n",
            ["line 2 has 3 fields, expected 2", "with semicolons"],
        ),
        (
            "metadata.csv",
            b"file_name|text\na.png|a\n",
            ["column file_name is missing; received file_name|text"],
        ),
        ("metadata.csv", b"", ["column file_name is missing"]),
        (
            "metadata.csv",
            b"file_name,text\na.png,rose\nb.png,a rose, in a garden, at dusk\n",
            ["line 3 has 4 fields, expected 2", "in double quotes"],
        ),
    ],
)
def test_refuses_damaged_metadata(tmp_path, name, content, parts):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, name, *parts)


# Classes, and pictures alone.


def labels(data):
    """What `load_data` says of each picture, by its name."""
    assert all(rows.shape == (1, 1) and rows.dtype == np.int32 for rows in data.captions)
    texts = (data.vocabulary.decode(rows)[0] for rows in data.captions)
    return {path.name: text for path, text in zip(data.paths, texts, strict=True)}


LABELLED = [("a.png", "canna lily"), ("sub/b.png", " Iris "), ("a.png", "canna lily")]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("column", ["label", "class"])
def test_a_table_of_labels(tmp_path, kind, column):
    data = load_data(metadata(tmp_path / "d", kind, LABELLED, ("file_name", column)), "class")
    assert labels(data) == {"a.png": "canna lily", "b.png": "Iris"}
    assert data.vocabulary.labels == ("Iris", "canna lily")
    assert data.test_tokens is None


def test_a_label_may_be_a_number_and_stand_beside_other_columns(tmp_path):
    rows = [("a.png", "a rose", 1, "x"), ("sub/b.png", "a tulip", 0, "y")]
    for kind in ("csv", "jsonl"):
        folder = metadata(tmp_path / kind, kind, rows, ("file_name", "text", "label", "class"))
        assert labels(load_data(folder, "class")) == {"a.png": "1", "b.png": "0"}
        assert load_data(folder).vocabulary.words[1] == "a"
    (tmp_path / "csv" / "metadata.csv").write_text("label;file_name\n3;a.png\n")
    assert labels(load_data(tmp_path / "csv", "class")) == {"a.png": "3"}


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([("a.png", "rose"), ("sub/b.png", " ")], ["line 2", "label is ' '", "expected the name of a class"]),
        ([("a.png", "rose"), ("sub/b.png", "<PAD>")], ["line 2", "'<PAD>'"]),
        ([("a.png", True)], ["line 1", "label is True"]),
        ([("a.png", None)], ["line 1", "label is None"]),
        ([("a.png", "two\nlines")], ["line 1", r"'two\nlines'"]),
        (
            [("a.png", "rose"), ("a.png", "iris")],
            ["line 2", "'iris', but 'rose' before; expected one a picture"],
        ),
        ([("a.png", "rose"), ("c.png", "rose")], ["line 2", "c.png does not exist"]),
        ([], ["has no rows"]),
    ],
)
def test_refuses_labels_by_their_line(tmp_path, rows, parts):
    folder = metadata(tmp_path / "d", "jsonl", rows, ("file_name", "label"))
    refused(folder, "metadata.jsonl", *parts, conditioning="class")


def in_folders(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / name)
    return folder


def test_folders_are_classes_where_there_is_no_table(tmp_path):
    folder = in_folders(tmp_path / "d", "canna lily/b.JPG", "canna lily/.c.png", "Iris/a.webp", ".git/d.png")
    (folder / "Iris" / "notes.txt").write_text("no picture")
    (folder / "empty").mkdir()
    data = load_data(folder, "class")
    assert labels(data) == {"a.webp": "Iris", "b.JPG": "canna lily"}
    assert data.paths == (folder / "Iris" / "a.webp", folder / "canna lily" / "b.JPG")
    assert data.vocabulary.labels == ("Iris", "canna lily")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("top.png", ["top.png: lies beside the folders of the classes", "/CLASS/top.png", "a column label"]),
        ("train/rose/b.png", ["b.png: lies deeper than in the folders of the classes", "/CLASS/b.png"]),
        (" rose/b.png", ["/ rose: label is ' rose', expected no space around the name of a class"]),
    ],
)
def test_refuses_pictures_that_are_in_no_class(tmp_path, name, parts):
    folder = in_folders(tmp_path / "d", "rose/a.png", name)
    refused(folder, *parts, conditioning="class")


def test_captions_are_no_classes_and_labels_no_captions(tmp_path):
    column = "column label is missing; received file_name, text; expected file_name and label"
    captioned = metadata(tmp_path / "captioned", "csv")
    refused(captioned, "metadata.csv", column, "one folder a class", conditioning="class")
    refused(cup3(tmp_path / "cup"), "text2ImgData.pkl: holds captions but no classes", conditioning="class")
    labelled = metadata(tmp_path / "labelled", "csv", LABELLED, ("file_name", "label"))
    column = "column text is missing; received file_name, label; expected file_name and text"
    refused(labelled, "metadata.csv", column, "--conditioning class", "or none")


def test_without_conditioning_any_folder_of_pictures_does(tmp_path):
    folders = {
        "alone": in_folders(tmp_path / "alone", "b.png", "sub/deeper/a.jpg"),
        "captioned": metadata(tmp_path / "captioned", "csv"),
        "listed": metadata(tmp_path / "listed", "jsonl", [("sub/b.png",)], ("file_name",)),
        "cup": cup3(tmp_path / "cup", captions=[None, None]),
    }
    (tmp_path / "cup" / "dictionary" / "word2Id.npy").unlink()
    expected = {
        "alone": ["b.png", "a.jpg"],
        "captioned": ["a.png", "b.png"],
        "listed": ["b.png"],
        "cup": ["image_00001.jpg", "image_00002.jpg"],
    }
    for name, folder in folders.items():
        data = load_data(folder, "none")
        assert labels(data) == dict.fromkeys(expected[name], "")
        assert data.vocabulary.is_unconditional and data.test_tokens is None


def test_refuses_folders_without_pictures_and_links_out_of_them(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for conditioning in ("class", "none"):
        refused(folder, "holds no picture", ".jpg", conditioning=conditioning)
    in_folders(tmp_path, "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    refused(folder, "'link.png' is a link out of the data folder", conditioning="none")


# Pictures alone as their owners publish them: FFHQ and AFHQ.


def test_flat_faces_and_those_in_folders_of_a_thousand_come_in_one_order(tmp_path):
    """FFHQ, flat, and as its `images1024x1024` and `thumbnails128x128` are laid out."""
    numbers = (0, 2, 10, 999, 1000, 69999)
    flat = in_folders(tmp_path / "flat", *(f"{number:05}.png" for number in reversed(numbers)))
    nested = [f"{number // 1000 * 1000:05}/{number:05}.png" for number in numbers]
    deep = in_folders(tmp_path / "thumbnails128x128", *reversed(nested))
    (deep / "00000" / "LICENSE.txt").write_text("no picture")
    assert load_data(flat, "none").paths == tuple(flat / f"{number:05}.png" for number in numbers)
    assert load_data(deep, "none").paths == tuple(deep / name for name in nested)


TRAIN = ["train/cat/1.jpg", "train/cat/2.jpg", "train/dog/3.jpg", "train/wild/4.jpg"]


@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "test"])
@pytest.mark.parametrize("conditioning", ["none", "class"])
def test_train_beside_a_held_out_part_stands_for_the_folder(tmp_path, held_out, conditioning):
    """AFHQ: `val`, or `test` in its second version, has pictures of the same names and is not read."""
    others = (f"{held_out}/cat/1.jpg", f"{held_out}/dog/9.jpg", "example.jpg", "__MACOSX/train/cat/._1.jpg")
    folder = in_folders(tmp_path / "afhq", *TRAIN, *others)
    expected = {"none": ["", "", "", ""], "class": ["cat", "cat", "dog", "wild"]}[conditioning]
    for given in (folder, folder / "train"):
        data = load_data(given, conditioning)
        assert data.paths == tuple(folder / name for name in TRAIN)
        assert list(labels(data).values()) == expected
    held = load_data(folder / held_out, conditioning).paths
    assert held == (folder / held_out / "cat" / "1.jpg", folder / held_out / "dog" / "9.jpg")


def test_one_kind_of_animal_is_its_folder(tmp_path):
    folder = in_folders(tmp_path / "afhq", *TRAIN, "val/cat/1.jpg")
    cats = folder / "train" / "cat"
    assert load_data(cats, "none").paths == (cats / "1.jpg", cats / "2.jpg")
    refused(cats, "1.jpg: lies beside the folders of the classes", conditioning="class")


def test_train_alone_or_a_file_beside_it_is_one_folder_of_many(tmp_path):
    folder = in_folders(tmp_path / "d", "rose/a.png", "train/b.png")
    (folder / "val").write_text("no folder")
    assert labels(load_data(folder, "class")) == {"a.png": "rose", "b.png": "train"}
    assert set(labels(load_data(folder, "none"))) == {"a.png", "b.png"}


def test_a_table_goes_before_train_and_one_in_train_is_read(tmp_path):
    folder = metadata(in_folders(tmp_path / "d", "test/c.png") / "train", "csv").parent
    for conditioning in ("text", "none"):
        assert load_data(folder, conditioning).paths == load_data(folder / "train", conditioning).paths
    assert load_data(folder).vocabulary.words[1] == "a"
    (folder / "metadata.csv").write_text("file_name,text\ntest/c.png,tulip\n")
    assert load_data(folder).paths == load_data(folder, "none").paths == (folder / "test" / "c.png",)


@pytest.mark.parametrize("conditioning", ["none", "class", "text"])
def test_refuses_a_train_without_pictures_and_one_that_leads_out(tmp_path, conditioning):
    folder = in_folders(tmp_path / "d", "val/cat/a.png")
    (folder / "train").mkdir()
    what = "holds neither metadata.csv" if conditioning == "text" else "holds no picture; expected files that"
    refused(folder, f"d/train: {what}", conditioning=conditioning)
    (folder / "train").rmdir()
    (folder / "train").symlink_to(in_folders(tmp_path / "outside", "cat/a.png"))
    refused(folder, f"d/train: is a link out of the data folder {folder}; give", conditioning=conditioning)


def test_refuses_an_unknown_conditioning(tmp_path):
    with pytest.raises(
        InputError, match="^conditioning: received 'labels', expected one of text, class, none$"
    ):
        load_data(tmp_path, "labels")


@pytest.mark.skipif(REAL is None, reason="CUP3_REAL_DATA is not set")
def test_the_real_flowers():
    data = load_data(Path(REAL) / "cup3_flowers")
    assert len(data.paths) == len(data.captions) == 7370
    assert {rows.shape for rows in data.captions} == {(5, 20)}
    assert data.test_tokens.shape == (819, 20) and data.vocabulary.size == 5429
    first = pd.read_pickle(Path(REAL) / "cup3_flowers" / "dataset" / "text2ImgData.pkl").iloc[0]
    assert data.captions[0].tolist() == [[int(i) for i in caption] for caption in first["Captions"]]
    assert data.paths[0].name == Path(first["ImagePath"]).name
