"""Recognises how a user laid out pictures, with captions, classes or neither, and checks every row at the door."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from errors import InputError
from input_pipeline.safe_pickle import safe_read_pickle
from input_pipeline.vocabulary import PAD, Labels, Vocabulary, words_of

CAPTION_LENGTH = 20  # ids a caption, as in the Deep Learning Cup 3
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # of pictures without a table
HELD_OUT = ("val", "valid", "validation", "test")  # folders of pictures that their owners keep from training

# The columns that may hold what a picture is drawn from, by conditioning; the first that is there is read.
COLUMNS = {"text": ("text",), "class": ("label", "class"), "none": ()}
WITHOUT_CAPTIONS = "without captions: --conditioning class (one folder a class, or a column label) or none"


@dataclass(frozen=True)
class CaptionedPictures:
    """Pictures with their captions as ids, and the test captions when there are any.

    A class is a caption of one id, and so is the empty caption of a picture that has none.

    Attributes:
        paths: N picture files; they exist and lie within the data folder.
        captions: N arrays int32 (n_i, T), the n_i >= 1 captions of each picture.
        vocabulary: The `Vocabulary` of the ids, or `Labels`.
        test_tokens: int32 (M, T), a caption each, or None.
    """

    paths: tuple[Path, ...]
    captions: list[np.ndarray]
    vocabulary: Vocabulary
    test_tokens: np.ndarray | None = None


def load_data(folder, conditioning="text"):
    """Load pictures, and what they are drawn from, from a folder of any known layout.

    Rows of pickles are counted from 0, as pandas does; lines of text files from 1, as editors do.

    Known are the Cup3 layout (`dataset/text2ImgData.pkl`, `dictionary/word2Id.npy`, optionally `dataset/testData.pkl`,
    image paths relative to `folder`), the same one folder deeper (`folder/dataset/dataset/...`, as in the original
    repository), and pictures beside a `metadata.csv` or `metadata.jsonl` with `file_name` and `text`, where several
    rows of one file are several captions of it.

    For classes the table has a column `label` or `class`; without a table each sub-folder is a class. Without
    conditioning captions and classes are not read, and pictures need no table: those of all sub-folders are taken.

    In a folder without a table, `train` beside `val`, `valid`, `validation` or `test` stands for the folder: it is
    loaded as if it were given itself, and nothing beside it is read.

    Args:
        folder: The data folder.
        conditioning: What pictures are drawn from: "text", "class" or "none".

    Returns:
        CaptionedPictures.

    Raises:
        InputError: names the file, the row and the value that cannot be used.
    """
    if conditioning not in COLUMNS:
        raise InputError(f"conditioning: received {conditioning!r}, expected one of {', '.join(COLUMNS)}")
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; expected one with pictures (see dataset/README.md)")
    for root in (folder, folder / "dataset"):
        if (root / "dataset" / "text2ImgData.pkl").is_file():
            return _load_cup3(root, conditioning)
    for name, read in (("metadata.csv", _read_csv), ("metadata.jsonl", _read_jsonl)):
        if (folder / name).is_file():
            return _load_metadata(folder / name, read, conditioning)
    if (train := _training_part(folder)) is not None:
        return load_data(train, conditioning)
    if conditioning != "text":
        return _load_folder(folder, conditioning)
    raise InputError(
        f"{folder}: holds neither metadata.csv nor metadata.jsonl nor dataset/text2ImgData.pkl; "
        f"give --data a folder that does (see dataset/README.md), or train {WITHOUT_CAPTIONS}"
    )


def _load_cup3(root, conditioning):
    file = root / "dataset" / "text2ImgData.pkl"
    if conditioning == "class":
        raise InputError(
            f"{file}: holds captions but no classes; expected --data with a column label in metadata.csv, or with "
            "one folder a class (see dataset/README.md)"
        )
    if conditioning == "none":
        return _labelled(_picture_paths(file, root, _table(file, ("ImagePath",))["ImagePath"]))
    vocabulary = Vocabulary.from_cup3(root / "dictionary" / "word2Id.npy", CAPTION_LENGTH)
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
        raise InputError(f"{where}: image {path} does not exist; mend the path, or remove the row")
    if not path.resolve().is_relative_to(inside):
        raise InputError(f"{where}: image path {name!r} is a link out of the data folder {root}")
    return path


def _load_metadata(file, read, conditioning):
    """A folder of pictures with one table of (file_name, text), (file_name, label) or (file_name)."""
    rows = read(file, conditioning)
    if not rows:
        raise InputError(f"{file}: has no rows, expected at least one")
    values_of = {}  # of a picture its first line, and what all its lines say
    for line, name, value in rows:
        if not isinstance(name, str):
            raise InputError(
                f"{file}: line {line}: file_name is {_short(name)}, expected the path of a picture"
            )
        values = values_of.setdefault(name, (line, []))[1]
        if conditioning == "text":
            values.append(_text(value, f"{file}: line {line}"))
        elif conditioning == "class":
            values.append(_label(value, values, f"{file}: line {line}"))
    inside = file.parent.resolve()
    paths = tuple(
        _picture_path(file.parent, inside, name, f"{file}: line {line}")
        for name, (line, _) in values_of.items()
    )
    if conditioning == "text":
        return _captioned(paths, [texts for _, texts in values_of.values()])
    return _labelled(paths, [labels[0] for _, labels in values_of.values() if labels])


def _text(value, where):
    if not isinstance(value, str) or not words_of(value):
        raise InputError(f"{where}: text is {_short(value)}, expected a caption")
    return value


def _label(value, before, where):
    """The label of a line, the same as `before`, in the picture's former lines; whole numbers are names too."""
    label = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if label in ("", PAD) or not label.isprintable():
        raise InputError(f"{where}: label is {_short(value)}, expected the name of a class")
    if before and label != before[0]:
        raise InputError(
            f"{where}: label is {_short(label)}, but {_short(before[0])} before; expected one a picture"
        )
    return label


def _captioned(paths, texts_of):
    """Pictures with the texts of each."""
    vocabulary = Vocabulary.from_texts((text for texts in texts_of for text in texts), CAPTION_LENGTH)
    counts = np.cumsum([len(texts) for texts in texts_of])[:-1]
    tokens, _ = vocabulary.encode([text for texts in texts_of for text in texts])
    return CaptionedPictures(paths, np.split(tokens, counts), vocabulary)


def _labelled(paths, labels=()):
    """Pictures with a label each, or without any."""
    vocabulary = Labels(sorted(set(labels)))
    tokens, _ = vocabulary.encode(labels or [""] * len(paths))  # (N, 1)
    return CaptionedPictures(paths, list(tokens[:, None]), vocabulary)


def _training_part(folder):
    """The folder `train` of one whose owner keeps other pictures for validation or tests; None of any other."""
    train = folder / "train"
    if not train.is_dir() or not any((folder / name).is_dir() for name in HELD_OUT):
        return None
    if not train.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{train}: is a link out of the data folder {folder}; give --data what it leads to")
    return train


def _load_folder(folder, conditioning):
    """Pictures without a table: all below the folder or, for classes, those of its sub-folders; ordered by name."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_dir())
    found = (path.relative_to(folder) for path in files)
    names = sorted(name.as_posix() for name in found if not any(part[0] == "." for part in name.parts))
    if not names:
        raise InputError(f"{folder}: holds no picture; expected files that end in {', '.join(SUFFIXES)}")
    inside = folder.resolve()
    paths = tuple(_picture_path(folder, inside, name, str(folder)) for name in names)
    if conditioning == "none":
        return _labelled(paths)
    for path, name in zip(paths, names, strict=True):
        if name.count("/") != 1:
            raise InputError(
                f"{path}: lies {'deeper than in' if '/' in name else 'beside'} the folders of the classes; expected "
                f"{folder}/CLASS/{path.name}, or a metadata.csv with a column label (see dataset/README.md)"
            )
    return _labelled(paths, [_folder_label(path.parent) for path in paths])


def _folder_label(folder):
    label = _label(folder.name, (), str(folder))
    if label != folder.name:  # beside one without the space it would be another class
        raise InputError(
            f"{folder}: label is {_short(folder.name)}, expected no space around the name of a class"
        )
    return label


def _read_csv(file, conditioning):
    """[(line, file_name, value)] of a CSV file with a header, whose fields commas, semicolons or tabs part.

    The value is that of the column which the conditioning reads, or None.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            delimiter = _delimiter(lines.readline(), conditioning)
            lines.seek(0)
            table = csv.DictReader(lines, delimiter=delimiter)
            column = _column(file, table.fieldnames or (), conditioning)
            return [_csv_row(file, table.line_num, row, delimiter, column) for row in table]
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: cannot be read as CSV in UTF-8 ({error}); a spreadsheet saves it as 'CSV UTF-8'"
        ) from None
    except csv.Error as error:
        raise InputError(f"{file}: cannot be read as CSV in UTF-8 ({error})") from None


def _delimiter(header, conditioning):
    """What parts the fields of a table: spreadsheets of some countries write semicolons for commas."""
    known = COLUMNS[conditioning]
    for delimiter in ",;\t":
        names = {name.strip('" \r\n') for name in header.split(delimiter)}
        if "file_name" in names and (not known or names & {*known}):
            return delimiter
    return ","


def _csv_row(file, line, row, delimiter, column):
    if None in row:  # where `csv` keeps what has no column
        part = {",": "commas", ";": "semicolons", "\t": "tabs"}[delimiter]
        raise InputError(
            f"{file}: line {line} has {len(row) - 1 + len(row[None])} fields, expected {len(row) - 1}; "
            f"a text with {part} stands in double quotes"
        )
    return line, row["file_name"], row.get(column)


def _read_jsonl(file, conditioning):
    """[(line, file_name, value)] of a file of one JSON object a line; empty lines are skipped; see `_read_csv`."""
    rows = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: cannot be read as UTF-8 ({error})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            item = _json_object(file, number, line)
            column = _column(f"{file}: line {number}", item, conditioning)
            rows.append((number, item["file_name"], item.get(column)))
    return rows


def _json_object(file, number, line):
    try:
        item = json.loads(line)
    except ValueError as error:
        raise InputError(f"{file}: line {number} is no JSON ({error})") from None
    if not isinstance(item, dict):
        raise InputError(f"{file}: line {number} is {_short(item)}, expected an object")
    return item


def _column(where, names, conditioning):
    """The name of the column that the conditioning reads; None where it reads none."""
    known = COLUMNS[conditioning]
    found = next((name for name in known if name in names), None)
    missing = "file_name" if "file_name" not in names else "" if found or not known else known[0]
    if missing:
        ways_out = {
            "text": f"; or train {WITHOUT_CAPTIONS}",
            "class": "; or no table, but one folder a class",
        }
        raise InputError(
            f"{where}: column {missing} is missing; received {', '.join(map(str, names)) or 'none'}; "
            f"expected {' and '.join(('file_name', *known[:1]))}"
            + (ways_out[conditioning] if missing != "file_name" else "")
        )
    return found


def _short(value):
    """A value for a message, on one line and not endless."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
