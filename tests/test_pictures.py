"""Picture files of every kind become the RGB squares that arithmetic says, or are refused by name."""

import contextlib
import errno
import os
import time
import warnings

import numpy as np
import pytest
from PIL import Image

import files
from errors import InputError
from input_pipeline import pictures
from input_pipeline.pictures import read_pictures


def gradient(height=16, width=16):
    """uint8 (H, W, 3): red grows to the right, green downwards, blue is 40."""
    picture = np.full((height, width, 3), 40, np.uint8)
    picture[..., 0] = np.linspace(0, 255, width)
    picture[..., 1] = np.linspace(0, 255, height)[:, None]
    return picture


def save(path, array, **keywords):
    Image.fromarray(array).save(path, **keywords)
    return path


def read(path, side=16):
    return read_pictures([path], side, progress=False)[0]


def test_a_picture_of_the_size_is_untouched(tmp_path):
    assert (read(save(tmp_path / "a.png", gradient())) == gradient()).all()


def test_the_middle_square_of_a_wide_and_of_a_tall_picture(tmp_path):
    wide = gradient(16, 30)
    assert (read(save(tmp_path / "a.png", wide)) == wide[:, 7:23]).all()
    tall = gradient(30, 16)
    assert (read(save(tmp_path / "b.png", tall)) == tall[7:23]).all()


def test_shrinking_is_antialiased(tmp_path):
    """A checkerboard of single pixels becomes even grey; without a low-pass it would be black or white."""
    board = np.where(np.indices((64, 64)).sum(axis=0) % 2, 255, 0).astype(np.uint8)
    assert np.abs(read(save(tmp_path / "a.png", np.stack([board] * 3, -1)))[2:-2, 2:-2] - 127.5).max() < 3


def test_order_is_kept(tmp_path):
    paths = [save(tmp_path / f"{level}.png", np.full((8, 8, 3), level, np.uint8)) for level in range(50)]
    assert read_pictures(paths, 8, progress=False)[:, 0, 0, 0].tolist() == list(range(50))


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    save(tmp_path / "a.png", gradient(), exif=exif)
    assert (read(tmp_path / "a.png") == np.rot90(gradient(), k=-1)).all()


def warned(path, kind):
    with pytest.warns(UserWarning, match=f"^pictures converted to RGB: 1 {kind}, of 1$"):
        return read(path)


def test_grey_is_spread_over_the_channels(tmp_path):
    grey = gradient()[..., 0]
    assert (warned(save(tmp_path / "a.png", grey), "grey") == grey[..., None]).all()


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    grey = gradient()[..., 0]
    save(tmp_path / "a.png", grey.astype(np.uint16) * 257)
    assert (warned(tmp_path / "a.png", "16-bit") == grey[..., None]).all()


def test_16_bit_tiff_is_scaled(tmp_path):
    grey = gradient()[..., 0]
    save(tmp_path / "a.tif", grey.astype(np.uint16) * 257)
    assert (warned(tmp_path / "a.tif", "16-bit") == grey[..., None]).all()


def test_cmyk(tmp_path):
    """Pure cyan, magenta, yellow and black ink are the complements of red, green, blue and white."""
    inks = np.zeros((16, 16, 4), np.uint8)
    for quarter, ink in enumerate(np.eye(4, dtype=bool)):
        inks[:, 4 * quarter : 4 * quarter + 4, ink] = 255
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tif")
    expected = [[0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]
    assert warned(tmp_path / "a.tif", "CMYK")[0, ::4].tolist() == expected


def test_cmyk_jpeg(tmp_path):
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[..., 0] = 255
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(warned(tmp_path / "a.jpg", "CMYK").astype(int) - [0, 255, 255]).max() < 8


def test_palette(tmp_path):
    red = Image.new("RGB", (16, 16), (250, 10, 20)).quantize(4)
    red.save(tmp_path / "a.png")
    assert (warned(tmp_path / "a.png", "palette") == [250, 10, 20]).all()


def test_transparency_shows_white(tmp_path):
    picture = np.full((16, 16, 4), (200, 0, 0, 0), np.uint8)
    picture[:8, :, 3] = 255
    picture[8:12, :, 3] = 128
    received = warned(save(tmp_path / "a.png", picture), "transparent").astype(int)
    assert (received[:8] == [200, 0, 0]).all() and (received[12:] == 255).all()
    assert np.abs(received[8:12] - [227, 127, 127]).max() <= 1


def test_one_line_counts_all_kinds(tmp_path):
    paths = [save(tmp_path / f"{i}.png", gradient()[..., 0]) for i in range(3)]
    paths.append(save(tmp_path / "rgb.png", gradient()))
    paths.append(save(tmp_path / "16.png", gradient()[..., 0].astype(np.uint16)))
    with pytest.warns(UserWarning, match="^pictures converted to RGB: 3 grey, 1 16-bit, of 5$") as caught:
        read_pictures(paths, 16, progress=False)
    assert len(caught) == 1


def test_a_warning_counts_pictures_that_were_smaller(tmp_path):
    paths = []
    for width, height in ((16, 20), (15, 40), (40, 9)):
        paths.append(save(tmp_path / f"{width}.png", np.zeros((height, width, 3), np.uint8)))
    with pytest.warns(UserWarning, match="^pictures enlarged to 16 px: 2 of 3$") as caught:
        read_pictures(paths, 16, progress=False)
    assert len(caught) == 1


def test_rgb_warns_of_nothing(tmp_path):
    save(tmp_path / "a.png", gradient())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(tmp_path / "a.png")


def truncated(path):
    save(path, np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:-1500])


def animated(path):
    frames = [Image.new("RGB", (16, 16), (level, 0, 0)) for level in (0, 100, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("cut.jpg", truncated, "cannot be read as a picture .*truncated"),
        ("cut.png", truncated, "cannot be read as a picture"),
        ("moves.gif", animated, "is animated .3 frames., expected one picture"),
        ("moves.png", animated, "is animated .3 frames., expected one picture"),
        ("dot.png", lambda path: save(path, gradient(1, 1)), "has 1x1 pixels, expected at least 8 on a side"),
        ("line.png", lambda path: save(path, gradient(7, 99)), "has 99x7 pixels"),
        ("text.jpg", lambda path: path.write_text("no picture"), "cannot be read as a picture"),
        ("empty.jpg", lambda path: path.write_bytes(b""), "cannot be read as a picture"),
        ("none.jpg", lambda path: None, "cannot be read as a picture .FileNotFoundError"),
        ("float.tif", lambda path: save(path, np.ones((16, 16), np.float32)), "has floating-point pixels"),
        (
            "deep.tif",
            lambda path: save(path, np.full((16, 16), 2**20, np.int32)),
            "has .* as grey, expected at most 16 bits",
        ),
    ],
)
def test_refuses_by_name(tmp_path, name, make, message):
    good = save(tmp_path / "good.png", gradient())
    make(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: {message}"):
        read_pictures([good, tmp_path / name, good], 16, progress=False)


@pytest.mark.parametrize(
    ("shape", "least_side", "expected"),
    [((4, 40), 8, 8), ((4, 40), 2, 8), ((40, 31), 32, 32), ((16, 15), 16, 16)],
)
def test_refuses_a_picture_smaller_than_one_latent(tmp_path, shape, least_side, expected):
    path = save(tmp_path / "small.png", gradient(*shape))
    size = f"{shape[1]}x{shape[0]}"
    with pytest.raises(
        InputError, match=f"small.png: has {size} pixels, expected at least {expected} on a side$"
    ):
        read_pictures([path], 64, least_side=least_side, progress=False)


def test_a_picture_of_one_latent_will_do(tmp_path):
    path = save(tmp_path / "a.png", gradient(16, 40))
    assert (read_pictures([path], 16, least_side=16, progress=False)[0] == gradient(16, 40)[:, 12:28]).all()


@pytest.fixture
def two(tmp_path):
    (tmp_path / "in").mkdir()
    return [save(tmp_path / "in" / f"{i}.png", gradient() + np.uint8(i)) for i in range(2)]


def cached(paths, folder, side=16):
    return read_pictures(paths, side, cache_file=folder / "cache" / "p.npy", progress=False)


def test_the_cache_gives_the_same_pictures_without_the_decoder(two, tmp_path, monkeypatch):
    expected = read_pictures(two, 16, progress=False)
    assert (cached(two, tmp_path) == expected).all()
    monkeypatch.setattr(Image, "open", None)
    again = cached(two, tmp_path)
    assert isinstance(again, np.memmap) and (again == expected).all()
    assert sorted(os.listdir(tmp_path / "cache")) == ["p.npy", "p.npy.json"]


def test_the_cache_is_made_anew_when_anything_changed(two, tmp_path):
    cached(two, tmp_path)
    assert (cached(two[::-1], tmp_path) == read_pictures(two[::-1], 16, progress=False)).all()
    assert cached(two[::-1], tmp_path, side=8).shape == (2, 8, 8, 3)
    save(two[0], 255 - gradient())
    os.utime(two[0], ns=(0, time.time_ns()))
    assert (cached(two, tmp_path)[0] == 255 - gradient()).all()


def test_the_cache_lets_no_picture_through_that_reading_would_refuse(two, tmp_path):
    cache = {"cache_file": tmp_path / "p.npy", "progress": False}
    read_pictures(two, 16, least_side=8, **cache)
    with pytest.raises(InputError, match="0.png: has 16x16 pixels, expected at least 17 on a side"):
        read_pictures(two, 16, least_side=17, **cache)


class SlowDisk:
    """A file that takes its time, and counts what was decoded beyond what it was given."""

    def __init__(self, file, decoded):
        self.file, self.decoded, self.n_written, self.most_ahead = file, decoded, 0, 0

    def write(self, content):
        time.sleep(0.003)
        self.most_ahead = max(self.most_ahead, len(self.decoded) - self.n_written)
        self.n_written += 1
        return self.file.write(content)


def test_a_slow_disk_does_not_let_pictures_gather_in_memory(tmp_path, monkeypatch):
    paths = [save(tmp_path / f"{i}.png", gradient(8, 8) + np.uint8(i)) for i in range(60)]
    decoded, disks, square = [], [], pictures._square

    @contextlib.contextmanager
    def slow_file(path):
        with files.atomic_file(path) as file:
            disks.append(SlowDisk(file, decoded))
            yield disks[-1]

    def counted(*arguments):
        decoded.append(arguments)
        return square(*arguments)

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(pictures, "atomic_file", slow_file)
    monkeypatch.setattr(pictures, "_square", counted)
    received = read_pictures(paths, 8, cache_file=tmp_path / "p.npy", progress=False)
    assert (
        disks[0].n_written > 60 and 1 <= disks[0].most_ahead <= 6
    )  # of two threads, and the header is a write
    assert (received == [gradient(8, 8) + np.uint8(i) for i in range(60)]).all()


def test_a_missing_file_is_named_by_the_cache_too(two, tmp_path):
    two[1].unlink()
    with pytest.raises(InputError, match="1.png: cannot be read"):
        cached(two, tmp_path)


def test_an_interrupted_cache_is_no_cache(two, tmp_path):
    truncated(tmp_path / "bad.jpg")
    cached(two, tmp_path)
    with pytest.raises(InputError):
        cached([*two, tmp_path / "bad.jpg"], tmp_path)
    assert "p.npy.json" not in os.listdir(tmp_path / "cache")
    assert (cached(two, tmp_path) == read_pictures(two, 16, progress=False)).all()


def test_a_full_disk_leaves_nothing_half_written(two, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(InputError, match="p.npy: the disk is full"):
        cached(two, tmp_path)
    assert os.listdir(tmp_path / "cache") == []
