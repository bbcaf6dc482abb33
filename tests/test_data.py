"""A run's data are what the folder holds, drawn where it is missing, and unchanged when the run goes on."""

import os
import shutil

import pytest

import config as settings
from checkpoint import RunFolder
from dataset import paper_flowers
from errors import InputError
from stages.data import prepared_data
from tests.tiny_runs import config


def prepared(folder, run_folder, **changes):
    """The data as they are when the run has just begun, or goes on."""
    chosen = config(folder, run_folder, **changes)
    with RunFolder.open(run_folder, settings.to_dict(chosen)) as run:
        return prepared_data(chosen, run)


def test_data_whose_words_changed_is_refused(photographs, tmp_path):
    changes = {"training.validation_fraction": 0.25}
    prepared(photographs, tmp_path / "run", **changes)
    table = photographs / "metadata.csv"
    table.write_text(table.read_text().replace("again", "anew"))
    with pytest.raises(InputError, match=r"its words are no longer those of .*vocabulary\.json"):
        prepared(photographs, tmp_path / "run", **changes)


def test_the_built_in_data_is_drawn_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = []

    def write(folder, size):
        drawn.append((str(folder), size))
        shutil.copytree(source, folder)

    source = tmp_path / "source"
    paper_flowers.write(source, train=24, test=1, size=32, progress=False)
    monkeypatch.setattr(paper_flowers, "write", write)
    for start in range(
        2
    ):  # a run that has begun takes what it began with, though these are not the usual number
        data = prepared("dataset/paper_flowers", "run")
        assert drawn == [("dataset/paper_flowers", 32)], start
    assert data.has_probe
    assert sorted([*data.train_ids, *data.validation_ids]) == list(range(24))
    assert data.shown_tokens.shape == (1, 20)  # the test caption


def test_built_in_data_that_would_be_drawn_otherwise_is_no_ground_to_begin_on(flowers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(flowers, "dataset/paper_flowers")
    line = "^dataset/paper_flowers: received paper flowers of train 48, expected 4096; test 8, expected 512; remove"
    with pytest.raises(InputError, match=line):
        prepared("dataset/paper_flowers", "run")
    assert not (tmp_path / "run").exists()
    os.rename("dataset/paper_flowers", "mine")  # of another name it is the user's choice
    assert prepared("mine", "run").has_probe
