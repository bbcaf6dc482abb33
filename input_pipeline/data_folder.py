"""Recognises how a user laid out captioned pictures, and checks every row at the door."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from errors import InputError
from input_pipeline.safe_pickle import safe_read_pickle
from input_pipeline.vocabulary import Vocabulary, words_of

CAPTION_LENGTH = 20  # ids a caption, as in the Deep Learning Cup 3


@dataclass(frozen=True)
class CaptionedPictures:
    """Pictures with their captions as ids, and the test captions when there are any.

    Attributes:
        paths: N picture files; they exist and lie within the data folder.
        captions: N arrays int32 (n_i, T), the n_i >= 1 captions of each picture.
        vocabulary: The `Vocabulary` of the ids.
        test_tokens: int32 (M, T), a caption each, or None.
    """

    paths: tuple[Path, ...]
    captions: list[np.ndarray]
    vocabulary: Vocabulary
    test_tokens: np.ndarray | None = None


def load_data(folder):
    """Load captioned pictures from a folder of any known layout. Rows are counted from 0.

    Known are the Cup3 layout (`dataset/text2ImgData.pkl`, `dictionary/word2Id.npy`, optionally `dataset/testData.pkl`,
    image paths relative to `folder`), the same one folder deeper (`folder/dataset/dataset/...`, as in the original
    repository), and pictures beside a `metadata.csv` or `metadata.jsonl` with `file_name` and `text`, where several
    rows of one file are several captions of it.

    Args:
        folder: The data folder.

    Returns:
        CaptionedPictures.

    Raises:
        InputError: names the file, the row and the value that cannot be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: is no folder; expected one with captioned pictures (see dataset/README.md)"
        )
    for root in (folder, folder / "dataset"):
        if (root / "dataset" / "text2ImgData.pkl").is_file():
            return _load_cup3(root)
    for name, read in (("metadata.csv", _read_csv), ("metadata.jsonl", _read_jsonl)):
        if (folder / name).is_file():
            return _load_metadata(folder / name, read)
    raise InputError(
        f"{folder}: holds neither dataset/text2ImgData.pkl nor metadata.csv nor metadata.jsonl (see dataset/README.md)"
    )


def _load_cup3(root):
    vocabulary = Vocabulary.from_cup3(root / "dictionary" / "word2Id.npy", CAPTION_LENGTH)
    file = root / "dataset" / "text2ImgData.pkl"
    table = _table(file, ("Captions", "ImagePath"))
    captions = [
        _cup3_captions(cell, vocabulary, f"{file}: row {row}") for row, cell in enumerate(table["Captions"])
    ]
    paths = _picture_paths(file, root, table["ImagePath"])
    test_file = root / "dataset" / "testData.pkl"
    tests = _cup3_tests(test_file, vocabulary) if test_file.is_file() else None
    return CaptionedPictures(paths, captions, vocabulary, tests)


def _cup3_tests(file, vocabulary):
    """Test tokens int32 (M, T); a test row has a whole number for its `ID` and one caption, a plain list of ids."""
    table = _table(file, ("ID", "Captions"))
    if table["ID"].dtype.kind not in "iu":
        raise InputError(f"{file}: column ID is of type {table['ID'].dtype}, expected whole numbers")
    rows = [
        _cup3_captions([cell], vocabulary, f"{file}: row {row}")[0]
        for row, cell in enumerate(table["Captions"])
    ]
    return np.stack(rows)


def _table(file, columns):
    table = safe_read_pickle(file)
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(f"{file}: column {missing[0]} is missing; received {', '.join(map(str, table))}")
    if not len(table):
        raise InputError(f"{file}: has no rows, expected at least one")
    return table


def _cup3_captions(cell, vocabulary, where):
    """int32 (n, T) of one cell of `Captions`; id 0 becomes the usual padding."""
    if not isinstance(cell, list) or not cell:
        raise InputError(f"{where}: Captions is {_short(cell)}, expected a list of captions")
    tokens = np.array([_cup3_ids(caption, vocabulary, where) for caption in cell], np.int32)
    tokens[tokens == 0] = vocabulary.pad_id
    if (tokens == vocabulary.pad_id).all(axis=1).any():
        raise InputError(f"{where}: an empty caption (padding only), expected at least one word")
    return tokens


def _cup3_ids(caption, vocabulary, where):
    if not isinstance(caption, list) or len(caption) != vocabulary.length:
        raise InputError(f"{where}: caption {_short(caption)}, expected a list of {vocabulary.length} ids")
    try:
        ids = [int(index) for index in caption]
    except (ValueError, TypeError):
        raise InputError(f"{where}: caption {_short(caption)} holds something else than ids") from None
    for index in ids:
        if not 0 <= index < vocabulary.size:
            raise InputError(
                f"{where}: id {index} is not in the dictionary, expected 0 to {vocabulary.size - 1}"
            )
    return ids


def _picture_paths(file, root, names):
    """The picture files of all rows, each within the data folder."""
    inside = root.resolve()
    return tuple(_picture_path(root, inside, name, f"{file}: row {row}") for row, name in enumerate(names))


def _picture_path(root, inside, name, where):
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: image path {_short(name)}, expected a text")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise InputError(
            f"{where}: image path {name!r} leaves the data folder {root}; expected one relative to it"
        )
    path = root / pure
    if not path.is_file():
        raise InputError(f"{where}: image {path} does not exist")
    if not path.resolve().is_relative_to(inside):
        raise InputError(f"{where}: image path {name!r} is a link out of the data folder {root}")
    return path


def _load_metadata(file, read):
    """A folder of pictures with one table of (file_name, text)."""
    rows = read(file)
    if not rows:
        raise InputError(f"{file}: has no rows, expected at least one")
    texts_of = {}
    for row, (name, text) in enumerate(rows):
        if not isinstance(text, str) or not words_of(text):
            raise InputError(f"{file}: row {row}: text is {_short(text)}, expected a caption")
        texts_of.setdefault(name, (row, []))[1].append(text)
    vocabulary = Vocabulary.from_texts((text for _, text in rows), CAPTION_LENGTH)
    inside = file.parent.resolve()
    paths = tuple(
        _picture_path(file.parent, inside, name, f"{file}: row {row}") for name, (row, _) in texts_of.items()
    )
    counts = np.cumsum([len(texts) for _, texts in texts_of.values()])[:-1]
    tokens, _ = vocabulary.encode([text for _, texts in texts_of.values() for text in texts])
    return CaptionedPictures(paths, np.split(tokens, counts), vocabulary)


def _read_csv(file):
    """[(file_name, text)] of a CSV file with a header."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines)
            _require(file, table.fieldnames or ())
            return [_csv_row(file, table.line_num, row) for row in table]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: cannot be read as CSV in UTF-8 ({error})") from None


def _csv_row(file, line, row):
    if None in row:  # where `csv` keeps what has no column
        raise InputError(
            f"{file}: line {line} has {len(row) - 1 + len(row[None])} fields, expected {len(row) - 1}; "
            "a text with commas stands in double quotes"
        )
    return row["file_name"], row["text"]


def _read_jsonl(file):
    """[(file_name, text)] of a file of one JSON object a line; empty lines are skipped."""
    rows = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: cannot be read as UTF-8 ({error})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            item = _json_object(file, number, line)
            rows.append((item["file_name"], item["text"]))
    return rows


def _json_object(file, number, line):
    try:
        item = json.loads(line)
    except ValueError as error:
        raise InputError(f"{file}: line {number} is no JSON ({error})") from None
    if not isinstance(item, dict):
        raise InputError(f"{file}: line {number} is {_short(item)}, expected an object")
    _require(f"{file}: line {number}", item)
    return item


def _require(where, names):
    for name in ("file_name", "text"):
        if name not in names:
            raise InputError(
                f"{where}: column {name} is missing; received {', '.join(map(str, names)) or 'none'}"
            )


def _short(value):
    """A value for a message, on one line and not endless."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
