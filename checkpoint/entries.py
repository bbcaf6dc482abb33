"""The only room that knows file names in a run folder: entries, which are tensors and their state.

An entry is a folder of `tensors.safetensors`, and a `state.json` with the step, the state and the SHA-256 of the
tensors. It is written beside its place, flushed to the disk and then renamed, so that it is there as a whole or not at
all, whenever the process dies.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from checkpoint._json import plain, read_json
from errors import InputError
from files import flush, replacing

_TENSORS = "tensors.safetensors"
_STATE = "state.json"


class Saved(NamedTuple):
    """What a run folder gives back: arrays by name, and what JSON keeps of the state (tuples are lists)."""

    step: int
    tensors: dict[str, np.ndarray]
    state: dict


def write(folder: Path, step: int, tensors: dict, state: dict) -> None:
    """Puts an entry at `folder`, in the place of one that is there; errors of the disk are raised as they come."""
    new = folder.parent / ".new"
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        _write_tensors(new / _TENSORS, tensors)
        entry = {"step": int(step), "sha256": _sha256(new / _TENSORS), "state": plain(state)}
        with replacing(new / _STATE) as file:
            file.write(json.dumps(entry, indent=2).encode() + b"\n")
        _swap(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _swap(new: Path, folder: Path) -> None:
    """Puts `new` in the place of `folder`. Between the two renames, `place_of` finds the old one."""
    old = _old(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def read(folder: Path) -> Saved | None:
    """The entry at `folder`, None if there is none; InputError if it is damaged."""
    folder = place_of(folder)
    if not folder.exists():
        return None
    entry = read_state(folder)
    try:
        if _sha256(folder / _TENSORS) != entry["sha256"]:
            raise InputError(f"{folder / _TENSORS}: damaged: its SHA-256 is not the one in {_STATE}")
        return Saved(entry["step"], load_file(folder / _TENSORS), entry["state"])
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / _TENSORS}: cannot be read: {error}") from error


def read_state(folder: Path) -> dict:
    """The step, checksum and state of the entry at `folder`, without its tensors."""
    entry = read_json(folder / _STATE)
    missing = {"step", "sha256", "state"} - entry.keys()
    if missing:
        raise InputError(f"{folder / _STATE}: damaged: it has no {sorted(missing)[0]}")
    return entry


def remove(folder: Path) -> None:
    """Removes the entry, and what a process that died in writing it has left."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(_old(folder), ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def place_of(folder: Path) -> Path:
    """Where the entry is: in its place, or moved aside by a process that died before it put the new one in."""
    return folder if folder.exists() or not _old(folder).exists() else _old(folder)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, oldest first."""
    names = os.listdir(folder) if folder.exists() else []
    matches = [re.fullmatch(r"(\d{8,})|\.(\d{8,})\.old", name) for name in names]
    return sorted({int(match[1] or match[2]) for match in matches if match})


def _write_tensors(file: Path, tensors: dict) -> None:
    # safetensors writes memory as it lies: an array that is not in C order would be saved scrambled.
    save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, file)
    flush(file)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
