"""Flowers of other numbers do not go where the default run looks for its own."""

import shlex
from pathlib import Path

import pytest

import config as settings
import cup3
from dataset import paper_flowers


@pytest.mark.parametrize(
    ("words", "folder", "side"),
    [
        ([], "dataset/paper_flowers", None),
        (["--train", "40"], "dataset/paper_flowers-train40", 64),
        (["--size", "96"], "dataset/paper_flowers-size96", 96),
        (["--size", "40", "--seed", "2"], "dataset/paper_flowers-size40-seed2", 32),
        (["--train", "40", "--out", "here"], "here", 64),
    ],
)
def test_flowers_of_other_numbers_get_a_folder_of_their_own(monkeypatch, capsys, words, folder, side):
    drawn = []
    monkeypatch.setattr(paper_flowers, "write", lambda folder, **numbers: drawn.append(folder))
    assert cup3.main(["data", *words]) == 0
    assert drawn == [folder]
    shown = capsys.readouterr().out
    if side is None:
        assert "--data" not in shown
    else:
        note = " (at 32 px: the networks take multiples of 16)" if side == 32 else ""
        line = f"   python cup3.py --data {folder} --run runs/{Path(folder).name} --image-size {side}"
        assert shown.endswith(f"\nTrain on them{note}:\n{line}\n")
        parsed = cup3.parse(shlex.split(line)[2:])[1]
        assert (parsed.data, parsed.image_size) == (folder, side)
        settings.check(parsed)
