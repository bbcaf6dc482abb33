"""The only room that knows file names in a run folder: what JSON keeps, and reading it back."""

import json
import math
import os
from pathlib import Path

from errors import InputError


def plain(value):
    """What JSON can keep of `value`: numbers of numpy become Python's, what is not finite becomes null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: received {type(value).__name__}, expected a JSON object")
    return value
