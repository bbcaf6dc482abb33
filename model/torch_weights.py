"""Networks only: reads a torch file into numpy arrays, without torch and without trusting it.

`torch.save` has written two formats. The zip format is that of today, see `_torch_zip`. In the legacy format, that of
torch before 1.6 (and of `torch.save(..., _use_new_zipfile_serialization=False)`), the file is three header pickles, one
pickle of the state dict whose tensors point at storages by key, one pickle that lists the keys, and then the raw
storages.
"""

import hashlib
from pathlib import Path

import numpy as np

from errors import InputError
from model._torch_tensors import Unpickler, laid, load_views, numbers_of, storages_of
from model._torch_zip import read_zip

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def read(path, sha256=None, prefix=""):
    """Returns the tensors of a torch file, by name.

    Arguments:
        path: the file, of the zip format or the legacy one.
        sha256: the file's expected checksum, hexadecimal; None does not look.
        prefix: only tensors whose names start so are read; a classifier's last layers can be most of its file.

    Returns:
        dict of name -> array: float32 for float and half tensors, int64 for the counters of batch normalisation.

    Raises:
        InputError: the file is missing, truncated, tampered with, of another format, or names anything but what a
            plain state dict is made of. Nothing that the file names is ever run.
    """
    path = Path(path)
    try:
        _check_hash(path, sha256)
        with path.open("rb") as file:
            is_zip = file.peek(2)[:2] == b"PK"
            return (read_zip if is_zip else _read_legacy)(file, path.stat().st_size, prefix)
    except (InputError, OSError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    # A damaged pickle can end in nearly any exception; each of them means the same thing to the user.
    except Exception as error:
        raise InputError(f"{path}: is no torch file, or damaged ({error!r})") from error


def _check_hash(path, expected):
    if expected is None:
        return
    received = hashlib.sha256(path.read_bytes()).hexdigest()
    if received != expected:
        raise InputError(f"has sha256 {received}, expected {expected}")


def _read_legacy(file, size, prefix):
    _check_header(file)
    views = load_views(file)
    keys = Unpickler(file).load()
    storages = storages_of(views)
    if type(keys) is not list or sorted(keys) != sorted(storages):
        raise InputError("lists other storages than its tensors use")
    wanted = {name: view for name, view in views.items() if name.startswith(prefix)}
    needed = storages_of(wanted)
    numbers = {key: _read_storage(file, storages[key], size, skip=key not in needed) for key in keys}
    if file.read(1):
        raise InputError(
            f"goes on after its last storage, expected the end at byte {file.tell() - 1} of {size}"
        )
    return laid(wanted, numbers)


def _check_header(file):
    magic, protocol, system = (Unpickler(file).load() for _ in range(3))
    if magic != _MAGIC or protocol != _PROTOCOL:
        raise InputError(f"has header {magic!r}, {protocol!r}, expected {_MAGIC}, {_PROTOCOL}")
    if system["little_endian"] is not True:
        raise InputError("was written big-endian, expected little-endian")


def _read_storage(file, storage, size, skip):
    count = int(np.frombuffer(file.read(8), "<i8")[0])
    if count != storage.count or storage.n_bytes > size - file.tell():
        raise InputError(
            f"is truncated or damaged: storage {storage.key} of {storage.count} numbers is not there"
        )
    if skip:
        file.seek(storage.n_bytes, 1)
        return None
    return numbers_of(storage, file.read(storage.n_bytes))
