"""What the tests of run folders share: a config, arrays, another process, a disk that is full."""

import contextlib
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
CONFIG = {"seed": 1, "vae": {"levels": (32, 64), "rate": 1e-3}, "unet": {"width": 96}}


def tensors(value, size=6):
    return {"w": np.full((size,), value, "float32"), "n": np.array(value)}


def python(script, *arguments, **options):
    """Starts a Python process in the repository's root."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )


@contextlib.contextmanager
def file_size_limit(size):
    """Lets writes beyond `size` bytes of a file fail, as they do on a full disk."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
