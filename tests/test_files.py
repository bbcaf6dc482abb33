"""Fingerprints tell things apart; a file is whole or absent."""

import errno
import hashlib
import os

import numpy as np
import pytest

from errors import InputError
from files import atomic_file, fingerprint


def test_fingerprint_is_the_same_for_the_same_things():
    array = np.arange(6).reshape(2, 3)
    assert fingerprint(array, {"a": 1, "b": [2]}) == fingerprint(array.T.copy().T, {"b": [2], "a": 1})


def test_fingerprint_differs_by_value_type_shape_place_and_kind():
    array = np.arange(4, dtype=np.int32)
    others = [
        (array,),
        (array + 1,),
        (array.astype(np.int64),),
        (array.reshape(2, 2),),
        (array.view(np.float32),),
        (array[:2], array[2:]),
        (array[:3], array[3:]),
        (array.tolist(),),
        ({"a": 1},),
        ({"a": "1"},),
        ("a",),
    ]
    assert len({fingerprint(*other) for other in others}) == len(others)


def test_fingerprint_is_for_ever():
    """A change here would rebuild everybody's caches: sha256 of 'json {"a": 1}' and a line feed."""
    assert fingerprint({"a": 1}) == hashlib.sha256(b'json {"a": 1}\n').hexdigest()


def test_a_file_appears_when_the_block_ends_well(tmp_path):
    with atomic_file(tmp_path / "deep" / "a.bin") as file:
        file.write(b"whole")
        assert not (tmp_path / "deep" / "a.bin").exists()
    assert (tmp_path / "deep" / "a.bin").read_bytes() == b"whole"
    assert os.listdir(tmp_path / "deep") == ["a.bin"]


def test_an_interrupted_write_leaves_the_former_file(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"former")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a.bin") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "a.bin").read_bytes() == b"former"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.bin").write_bytes(b"former")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="a.bin: the disk is full"), atomic_file(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"former"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_other_errors_keep_their_kind(tmp_path):
    with pytest.raises(IsADirectoryError):
        (tmp_path / "a").mkdir()
        with atomic_file(tmp_path / "a") as file:
            file.write(b"x")
