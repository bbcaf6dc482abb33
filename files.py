"""Fingerprints, and files that are whole or absent.

The one home of how a file is replaced: what is written lies beside its place, is flushed to the disk and then renamed.
"""

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from errors import InputError


def fingerprint(*parts):
    """sha256 of arrays and of anything that JSON can write, dicts in any order of keys.

    Args:
        *parts: numpy arrays (dtype and shape count), or dicts, lists, texts and numbers.

    Returns:
        str of 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"array {part.dtype.str} {part.shape}\n".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(f"json {json.dumps(part, sort_keys=True)}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(path):
    """Open a file for writing bytes that appears under its name only when the block ends well.

    Its folder is made where there is none.

    Raises:
        InputError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            yield file
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{path}: the disk is full, nothing was written") from None
        if error.errno in (errno.EACCES, errno.EROFS):
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        raise


@contextlib.contextmanager
def replacing(path):
    """As `atomic_file`, for a folder that is there, with every error of the disk as it comes."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def flush(place):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
