"""A run's data are what the folder holds, drawn where it is missing, and unchanged when the run goes on."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import config as settings
import cup3
from checkpoint import RunFolder
from dataset import paper_flowers
from errors import InputError
from stages.data import _check_validation, prepared_data
from tests.tiny_runs import config, refusal, words

ROOT = Path(cup3.__file__).parent


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
    with pytest.raises(
        InputError, match=r"its words are no longer those of .*vocabulary\.json.* another --run"
    ):
        prepared(photographs, tmp_path / "run", **changes)


def test_data_whose_classes_changed_is_refused(in_classes, tmp_path, capsys):
    changes = {"training.validation_fraction": 0.25, "conditioning": "class"}
    own = shutil.copytree(in_classes, tmp_path / "own")
    data = prepared(own, tmp_path / "run", **changes)
    assert "   24 pictures of 32 px, 6 of them for validation; 2 classes\n" in capsys.readouterr().out
    assert sorted(set(data.vocabulary.decode(data.shown_tokens))) == ["canna lily", "rose"]
    np.testing.assert_array_equal(data.shown_tokens, data.validation_tokens)
    os.rename(own / "rose", own / "tulip")
    with pytest.raises(InputError, match=r"its classes are no longer those of .*vocabulary\.json"):
        prepared(own, tmp_path / "run", **changes)


F16 = {"vae.level_channels": (4,) * 5, "vae.blocks": (0,) * 5, "training.validation_fraction": 0.25}


@pytest.mark.parametrize("sides", [(15, 40), (40, 15)])
def test_a_picture_smaller_than_a_latent_of_the_autoencoder_is_refused(photographs, tmp_path, capsys, sides):
    victim, line = sorted(photographs.glob("*.jpg"))[5], words(photographs, tmp_path / "run", **F16)
    Image.new("RGB", sides).save(victim)
    told = f"{victim}: has {sides[0]}x{sides[1]} pixels, expected at least 16 on a side"
    assert refusal(capsys, line) == told
    assert not (tmp_path / "run").exists()
    Image.new("RGB", (16, 40)).save(victim)
    with pytest.warns(UserWarning, match="^pictures enlarged to 32 px: 1 of 12$"):
        assert len(prepared(photographs, tmp_path / "run", **F16).pictures) == 12


def test_flowers_without_their_captions_are_no_ground_for_the_probe(flowers, tmp_path, capsys):
    data = prepared(flowers, tmp_path / "run", conditioning="none", **{"evaluation.guidance": 1})
    assert "   48 pictures of 32 px, 6 of them for validation; without captions\n" in capsys.readouterr().out
    assert not data.has_probe
    assert data.shown_tokens.tolist() == data.validation_tokens.tolist() == [[0]] * 6


def test_the_built_in_data_is_drawn_where_it_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drawn = []

    def write(folder, size):
        drawn.append((str(folder), size))
        shutil.copytree(source, folder)

    source = tmp_path / "source"
    paper_flowers.write(source, train=24, test=1, size=32, progress=False)
    monkeypatch.setattr(paper_flowers, "write", write)
    for start in range(2):  # a run that has begun stays with what it began with, though these are few
        data = prepared("dataset/paper_flowers", "run")
        assert drawn == [("dataset/paper_flowers", 32)], start
    printed = capsys.readouterr().out
    assert "   24 pictures of 32 px, 3 of them for validation" in printed
    assert "   from dataset/paper_flowers\n   note: the settings are sized for 4096 pictures here" in printed
    assert data.has_probe
    assert sorted([*data.train_ids, *data.validation_ids]) == list(range(24))
    assert data.shown_tokens.shape == (1, 20)  # the test caption


def test_built_in_data_that_would_be_drawn_otherwise_is_no_ground_to_begin_on(flowers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(flowers, "dataset/paper_flowers")
    line = "^dataset/paper_flowers: received paper flowers of train 48, expected 4096; test 8, expected 512; rename"
    with pytest.raises(InputError, match=line):
        prepared("dataset/paper_flowers", "run")
    assert not (tmp_path / "run").exists()
    os.rename("dataset/paper_flowers", "mine")  # of another name it is the user's choice
    assert prepared("mine", "run").has_probe


@pytest.mark.parametrize(("preset", "least"), [("paper-flowers", 21), ("cup3", 26)])
def test_the_fewest_pictures_that_the_readme_names(preset, least):
    chosen = cup3.parse(["--preset", preset])[1]
    _check_validation(chosen, least)
    with pytest.raises(
        InputError, match=rf"received {least - 1} pictures.* --training\.validation-fraction 0\.1"
    ):
        _check_validation(chosen, least - 1)
    half = cup3.parse(["--training.validation-fraction", "0.5"])[1]
    _check_validation(half, 6)
    with pytest.raises(InputError, match="received 5 pictures.* for KID: give more pictures$"):
        _check_validation(half, 5)
    with pytest.raises(InputError, match="received 1 picture, of which .* holds out 0; expected at least 3"):
        _check_validation(half, 1)
    readme = (ROOT / "README.md").read_text()
    assert f"{least}" in re.search(r"fewer than 21 pictures.*?\.", readme, re.DOTALL)[0]
