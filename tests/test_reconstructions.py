"""The sheets of an autoencoder show its pictures as they are, and the difference as it says."""

import numpy as np
import pytest

from evaluate import prior_sheet, reconstruction_sheet
from evaluate.reconstructions import AMPLIFIED
from generate import captioned_grid
from metrics import psnr

SIDE, GAP = 128, 8


def tiles(sheet, lines, columns):
    """The pictures of a sheet, (lines, columns, H, W, 3); they have `SIDE`, at which a grid shows them as they are."""
    sheet = np.asarray(sheet)
    height = (sheet.shape[0] - GAP) // lines
    return np.array(
        [
            [sheet[GAP + k * height :, GAP + j * (SIDE + GAP) :][:SIDE, :SIDE] for j in range(columns)]
            for k in range(lines)
        ]
    )


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, SIDE, SIDE, 3)).astype("uint8")
    rebuilt = np.clip(images + rng.integers(-90, 90, images.shape), 0, 255).astype("uint8")
    return images, rebuilt


def test_inputs_stand_above_reconstructions_above_differences(pictures):
    images, rebuilt = pictures
    shown = tiles(reconstruction_sheet(images, rebuilt), 3, 3)
    np.testing.assert_array_equal(shown[0], images)
    np.testing.assert_array_equal(shown[1], rebuilt)
    difference = np.abs(images.astype(float) - rebuilt.astype(float))
    expected = np.where(difference * AMPLIFIED > 255, 255, difference * AMPLIFIED)
    np.testing.assert_array_equal(shown[2], expected)
    assert {0, 255} <= set(shown[2].ravel())


def test_the_captions_name_the_factor_and_the_quality(pictures, monkeypatch):
    images, rebuilt = pictures
    rebuilt[1] = images[1]
    seen = []
    monkeypatch.setattr(
        "evaluate.reconstructions.captioned_grid",
        lambda images, captions, **settings: (
            seen.append(captions) or captioned_grid(images, captions, **settings)
        ),
    )
    reconstruction_sheet(images, rebuilt)
    first, last = (f"rebuilt, {psnr(images[i : i + 1], rebuilt[i : i + 1]).value:.1f} dB" for i in (0, 2))
    expected = ["input"] * 3 + [first, "rebuilt, inf dB", last] + [f"difference x {AMPLIFIED}"] * 3
    assert seen == [expected]
    assert max(map(len, expected)) <= 22  # what a line of a caption holds


def test_prior_samples_are_shown_in_rows_of_eight():
    images = np.random.default_rng(0).integers(0, 256, (11, SIDE, SIDE, 3)).astype("uint8")
    shown = tiles(prior_sheet(images), 2, 8)
    np.testing.assert_array_equal(shown[0], images[:8])
    np.testing.assert_array_equal(shown[1, :3], images[8:])
    assert (shown[1, 3:] == 255).all()


def test_pictures_that_do_not_pair_are_refused(pictures):
    images, rebuilt = pictures
    with pytest.raises(ValueError, match="expected equal shapes"):
        reconstruction_sheet(images, rebuilt[:, :64])
    with pytest.raises(ValueError, match="a picture at least"):
        reconstruction_sheet(images[:0], rebuilt[:0])
