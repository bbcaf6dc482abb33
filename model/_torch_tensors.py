"""Networks only: what both formats of torch files share, a state dict's pickle and tensors as windows on storages.

A pickle may call anything, so only the names in `_ALLOWED` are resolved, and none of them to something that acts.
"""

import math
import pickle
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from errors import InputError

_DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
}


class _Storage(NamedTuple):
    """What a persistent id says of numbers that lie elsewhere in the file."""

    dtype: np.dtype
    key: str
    count: int

    @property
    def n_bytes(self):
        return self.count * self.dtype.itemsize


class _View(NamedTuple):
    """A tensor that has not met its numbers yet: a window on a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __setstate__(self, state):
        """Files from before torch 0.4 give a parameter a state, which says nothing of its numbers."""


def _view(storage, offset, shape, strides, *_grad_and_hooks):
    return _View(storage, offset, shape, strides)


def _parameter(view, *_grad_and_hooks):
    return view


_ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _view,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.nn.parameter", "Parameter"): _parameter,
    **{("torch", name): name for name in _DTYPES},
}


class Unpickler(pickle.Unpickler):
    """Resolves the allowed names only; everything else is refused before it can run."""

    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise InputError(
                f"names {module}.{name}, expected only {sorted('.'.join(key) for key in _ALLOWED)}"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid):
        kind, storage, key, _device, count, *view = (
            pid  # the legacy format alone tells of a view, mostly None
        )
        if kind != "storage" or view not in ([], [None]) or type(count) is not int or count < 0:
            raise InputError(f"holds a persistent id {pid!r}, expected a whole storage")
        return _Storage(_DTYPES[storage], key, count)


def load_views(file):
    """Unpickles a state dict: a dict of name -> view, none of which has been held against its storage yet."""
    state = Unpickler(file).load()
    if type(state) is not OrderedDict:
        raise InputError(f"holds a {type(state).__name__}, expected an OrderedDict of tensors")
    for name, view in state.items():
        if type(name) is not str or type(view) is not _View or type(view.storage) is not _Storage:
            raise InputError(f"holds {name!r}: {type(view).__name__}, expected named tensors only")
    return state


def storages_of(views):
    """The storages that the views need, by key."""
    return {view.storage.key: view.storage for view in views.values()}


def numbers_of(storage, content):
    """The numbers of a storage; half precision is widened to float32, in which the networks compute."""
    numbers = np.frombuffer(content, storage.dtype)
    return numbers.astype("float32") if storage.dtype.itemsize == 2 else numbers


def laid(views, numbers):
    """Lays views on their storages' numbers.

    Arguments:
        views: dict of name -> view.
        numbers: dict of storage key -> array (N,).

    Returns:
        dict of name -> array.

    Raises:
        InputError: a view reaches outside its storage.
    """
    return {name: _window(name, view, numbers[view.storage.key]) for name, view in views.items()}


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
