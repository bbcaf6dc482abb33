"""Where data comes from: draws a data set's flowers in several processes; how many changes nothing.

The processes are plain `python -m dataset._painter`: a fork of a process that runs TensorFlow may hang, and
one that multiprocessing spawns would import TensorFlow once more.
"""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dataset._drawing import draw
from dataset._flower import PAIRS, TRAINING_PAIRS, sample_flower

_ROOT = Path(__file__).resolve().parent.parent
_WORTH_A_PROCESS = 256  # a process that draws fewer pictures than this takes longer to start than to draw
_LENGTH_BYTES = 4  # each picture is preceded by its length


def flower_at(seed, index, train):
    """Flower number `index` (from 0) of a data set whose first `train` flowers are for training.

    Returns:
        The `Flower`, and the Generator that it was sampled from, for its captions.
    """
    rng = np.random.default_rng([seed, index])
    return sample_flower(rng, TRAINING_PAIRS if index < train else PAIRS), rng


def jpegs(seed, size, train, total):
    """Yields flowers 0 to total - 1 in order, each as the bytes of a JPEG file, `size` pixels a side."""
    processes = min(os.cpu_count() or 1, total // _WORTH_A_PROCESS)
    if processes < 2:
        yield from (_jpeg(seed, size, train, index) for index in range(total))
        return
    with contextlib.ExitStack() as stack:
        painters = [
            stack.enter_context(_painter(seed, size, train, total, k, processes)) for k in range(processes)
        ]
        for index in range(total):
            yield _receive(painters[index % processes])


def _jpeg(seed, size, train, index):
    file = io.BytesIO()
    flower, _ = flower_at(seed, index, train)
    Image.fromarray(draw(flower, size)).save(file, "JPEG", quality=95, subsampling="4:4:4")
    return file.getvalue()


@contextlib.contextmanager
def _painter(*arguments):
    """A process that runs `_main`; ended when the context is left.

    It has a session of its own, so that Ctrl-C reaches this process alone, which then ends it.
    """
    command = [sys.executable, "-m", "dataset._painter", *map(str, arguments)]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _receive(process):
    length = int.from_bytes(process.stdout.read(_LENGTH_BYTES))
    data = process.stdout.read(length)
    if not length or len(data) < length:
        raise RuntimeError(f"a process drawing paper flowers ended early with exit code {process.wait()}")
    return data


def _main(seed, size, train, total, first, step):
    """Writes flowers first, first + step, ... to the standard output."""
    for index in range(first, total, step):
        data = _jpeg(seed, size, train, index)
        sys.stdout.buffer.write(len(data).to_bytes(_LENGTH_BYTES) + data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
