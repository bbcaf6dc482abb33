"""Networks only: reads a legacy-format torch file into numpy arrays, without torch and without trusting it.

Such a file is three header pickles, one pickle of the state dict whose tensors point at storages by key, one
pickle that lists the keys, and then the raw storages (`torch.save(..., _use_new_zipfile_serialization=False)`).
A pickle may call anything, so only the four names below are resolved, and none of them to something that acts.
"""

import hashlib
import math
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import InputError

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_DTYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


class _Storage(NamedTuple):
    """What a persistent id says of the numbers that lie at the end of the file."""

    dtype: np.dtype
    key: str
    count: int


class _View(NamedTuple):
    """A tensor that has not met its numbers yet: a window on a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _view(storage, offset, shape, strides, *_grad_and_hooks):
    return _View(storage, offset, shape, strides)


_ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    **{("torch", name): name for name in _DTYPES},
}


class _Unpickler(pickle.Unpickler):
    """Resolves the allowed names only; everything else is refused before it can run."""

    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise InputError(
                f"names {module}.{name}, expected only {sorted('.'.join(key) for key in _ALLOWED)}"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid):
        kind, storage, key, _device, count, view = pid
        if kind != "storage" or view is not None or type(count) is not int or count < 0:
            raise InputError(f"holds a persistent id {pid!r}, expected a whole storage")
        return _Storage(_DTYPES[storage], key, count)


def read(path, sha256=None):
    """Returns the tensors of a legacy torch file, by name.

    Arguments:
        path: the file.
        sha256: the file's expected checksum, hexadecimal; None does not look.

    Returns:
        dict of name -> array: float32 for float tensors, int64 for the counters of batch normalisation.

    Raises:
        InputError: the file is missing, truncated, tampered with, of another format, or names anything but the
            four globals of a plain state dict. Nothing that the file names is ever run.
    """
    path = Path(path)
    try:
        _check_hash(path, sha256)
        with path.open("rb") as file:
            return _read_stream(file, path.stat().st_size)
    except (InputError, OSError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    # A damaged pickle can end in nearly any exception; each of them means the same thing to the user.
    except Exception as error:
        raise InputError(f"{path}: is no legacy torch file, or damaged ({error!r})") from error


def _check_hash(path, expected):
    if expected is None:
        return
    received = hashlib.sha256(path.read_bytes()).hexdigest()
    if received != expected:
        raise InputError(f"has sha256 {received}, expected {expected}")


def _read_stream(file, size):
    _check_header(file)
    state = _Unpickler(file).load()
    keys = _Unpickler(file).load()
    views = _checked_views(state)
    storages = {view.storage.key: view.storage for view in views.values()}
    if type(keys) is not list or sorted(keys) != sorted(storages):
        raise InputError("lists other storages than its tensors use")
    numbers = {key: _read_storage(file, storages[key], size) for key in keys}
    if file.read(1):
        raise InputError(
            f"goes on after its last storage, expected the end at byte {file.tell() - 1} of {size}"
        )
    return {name: _window(name, view, numbers[view.storage.key]) for name, view in views.items()}


def _check_header(file):
    if file.peek(2)[:2] == b"PK":
        raise InputError("is a zip-format torch file, expected the legacy format")
    magic, protocol, system = (_Unpickler(file).load() for _ in range(3))
    if magic != _MAGIC or protocol != _PROTOCOL:
        raise InputError(f"has header {magic!r}, {protocol!r}, expected {_MAGIC}, {_PROTOCOL}")
    if system["little_endian"] is not True:
        raise InputError("was written big-endian, expected little-endian")


def _checked_views(state):
    if type(state) is not OrderedDict:
        raise InputError(f"holds a {type(state).__name__}, expected an OrderedDict of tensors")
    for name, view in state.items():
        if type(name) is not str or type(view) is not _View or type(view.storage) is not _Storage:
            raise InputError(f"holds {name!r}: {type(view).__name__}, expected named tensors only")
    return state


def _read_storage(file, storage, size):
    count = int(np.frombuffer(file.read(8), "<i8")[0])
    wanted = storage.count * storage.dtype.itemsize
    if count != storage.count or wanted > size - file.tell():
        raise InputError(
            f"is truncated or damaged: storage {storage.key} of {storage.count} numbers is not there"
        )
    return np.frombuffer(file.read(wanted), storage.dtype)


def _window(name, view, numbers):
    """Lays the view on its storage. Every index is checked first: `as_strided` itself would read anywhere."""
    extents = (view.offset, *view.shape, *view.strides)
    if len(view.shape) != len(view.strides) or any(type(n) is not int or n < 0 for n in extents):
        raise InputError(
            f"tensor {name} has offset {view.offset}, shape {view.shape}, strides {view.strides}"
        )
    reach = sum((length - 1) * stride for length, stride in zip(view.shape, view.strides, strict=True))
    # The product bounds memory: strides of 0 could otherwise spread one number over terabytes.
    if view.offset + reach >= len(numbers) or math.prod(view.shape) > len(numbers):
        raise InputError(f"tensor {name} of shape {view.shape} reaches outside its storage of {len(numbers)}")
    strides = [stride * numbers.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(numbers[view.offset :], view.shape, strides).copy()
