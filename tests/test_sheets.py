"""Pictures become PNGs and captioned grids, whole or not at all."""

import numpy as np
import pytest
from PIL import Image

from generate import (
    Picture,
    captioned_grid,
    save_gif,
    save_png,
)
from generate.sheets import save_all


def test_the_grid_shows_every_picture_above_its_caption():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, 128, 128, 3)).astype("uint8")
    sheet = np.asarray(captioned_grid(pictures, ["flower"] * 4 + [" "], columns=3))
    assert sheet.shape[1] == 3 * 136 + 8
    top = [row for row in range(sheet.shape[0]) if (sheet[row, 8:136] == pictures[0, 0]).all()]
    assert top == [8]
    tile = next(row for row in range(9, sheet.shape[0]) if (sheet[row, 8:136] == pictures[3, 0]).all()) - 8
    for index, picture in enumerate(pictures):
        left, upper = 8 + (index % 3) * 136, 8 + (index // 3) * tile
        np.testing.assert_array_equal(sheet[upper : upper + 128, left : left + 128], picture)
        has_text = (sheet[upper + 128 : upper + tile - 2, left : left + 128] < 128).any()
        assert has_text == (index != 4)


def test_small_pictures_are_enlarged_and_large_ones_kept():
    small, large = (np.zeros((side, side, 3), "uint8") for side in (16, 200))
    assert captioned_grid([small], [""]).size[0] == 128 + 16
    assert captioned_grid([large], [""]).size[0] == 200 + 16


def test_save_png_keeps_any_text(tmp_path):
    save_png(Picture(np.zeros((4, 4, 3), "uint8"), "ein „roter“ 花", -1), tmp_path / "x.png", note="ü\nb")
    with Image.open(tmp_path / "x.png") as file:
        assert file.text == {"prompt": "ein „roter“ 花", "seed": "-1", "note": "ü\nb"}


def test_a_picture_without_a_prompt_is_known_by_its_seed(tmp_path):
    picture = Picture(np.zeros((4, 4, 3), "uint8"), "", 7)
    assert (picture.caption, picture._replace(prompt="a rose").caption) == ("seed 7", "a rose")
    save_png(picture, tmp_path / "x.png", steps=2)
    with Image.open(tmp_path / "x.png") as file:
        assert file.text == {"seed": "7", "steps": "2"}


def test_a_picture_whose_writing_is_cut_is_not_there(tmp_path, monkeypatch):
    def cut(self, file, *arguments, **keywords):
        file.write(b"half of a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        save_png(Picture(np.zeros((4, 4, 3), "uint8"), "a flower", 0), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_a_gif_shows_every_picture_in_turn_for_ever(tmp_path):
    levels = (0, 100, 200)
    save_gif([np.full((6, 4, 3), level, "uint8") for level in levels], tmp_path / "x.gif", milliseconds=70)
    with Image.open(tmp_path / "x.gif") as file:
        assert (file.n_frames, file.size, file.info["loop"]) == (3, (4, 6), 0)
        for frame, level in enumerate(levels):
            file.seek(frame)
            assert file.info["duration"] == 70
            np.testing.assert_allclose(np.asarray(file.convert("RGB")).astype(int), level, atol=2)


def test_previews_lie_in_a_sheet_beside_their_picture(tmp_path):
    grey = [np.full((128, 128, 3), level, "uint8") for level in range(0, 260, 20)]  # 13
    pictures = [Picture(grey[12], "a flower", 3, 0.25), Picture(grey[0], "a leaf", 4)]
    paths = save_all(iter(pictures), tmp_path, {0: grey}, run="r")
    assert paths == [tmp_path / "0000.png", tmp_path / "0001.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0000.png",
        "0000_steps.png",
        "0001.png",
        "grid.png",
    ]
    for name in ("0000.png", "0000_steps.png"):
        with Image.open(tmp_path / name) as file:
            assert file.text == {"prompt": "a flower", "seed": "3", "share": "0.25", "run": "r"}
            sheet = np.asarray(file)
    assert sheet.shape[1] == 10 * 136 + 8  # ten a row
    assert [sheet[72, 72 + 136 * k, 0] for k in range(10)] == list(range(0, 200, 20))
    second = np.flatnonzero((sheet[:, 8:136] == 200).all(axis=(1, 2)))
    assert len(second) == 128
    assert [sheet[second[5], 72 + 136 * k, 0] for k in range(4)] == [200, 220, 240, 255]  # then white
