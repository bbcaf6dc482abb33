"""Picture files of any kind -> one uint8 array of equal squares."""

import collections
import contextlib
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from errors import InputError
from files import atomic_file, fingerprint

SMALLEST_SIDE = 8  # pixels
_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def read_pictures(paths, side, *, least_side=1, cache_file=None, progress=True):
    """Read pictures, resized by their short side and cut to their middle square.

    EXIF orientation is applied; grey, palette, CMYK, transparent (over white) and 16-bit pictures become RGB, and one
    warning counts them; another counts those that were smaller. A cache file is written as they are read, so that there
    may be more of them than fit into memory.

    Args:
        paths: N picture files.
        side: Pixels, S.
        least_side: Pixels that the shorter side of a picture must have, such as those of one latent; never less than
            `SMALLEST_SIDE`.
        cache_file: A `.npy` file that keeps the result; used again while files, sizes, times and both sides are the
            same.
        progress: Whether to show a bar.

    Returns:
        uint8 (N, S, S, 3), read-only and mapped from the file when cached.

    Raises:
        InputError: a picture is missing, truncated, animated, too small or none at all; or the disk is full.
    """
    paths = [Path(path) for path in paths]
    least_side = max(least_side, SMALLEST_SIDE)
    if cache_file is None:
        pictures = np.empty((len(paths), side, side, 3), np.uint8)
        for index, picture in enumerate(_squares(paths, side, least_side, progress)):
            pictures[index] = picture
        return pictures
    cache_file = Path(cache_file)
    key_file = cache_file.with_name(cache_file.name + ".json")
    wanted = {
        "side": side,
        "least_side": least_side,
        "files": fingerprint([_identity(path) for path in paths]),
    }
    if cache_file.is_file() and _read_key(key_file) == wanted:
        return np.load(cache_file, mmap_mode="r", allow_pickle=False)
    with atomic_file(cache_file) as file:
        key_file.unlink(missing_ok=True)  # first, so that a key never stands beside pictures of another
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), side, side, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        for picture in _squares(paths, side, least_side, progress):
            file.write(picture.tobytes())  # not through a map: a full disk would then kill the process
    with atomic_file(key_file) as file:
        file.write(json.dumps(wanted).encode())
    return np.load(cache_file, mmap_mode="r", allow_pickle=False)


def _identity(path):
    """What tells that a file is still the same one."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return [str(path), status.st_size, status.st_mtime_ns]


def _read_key(file):
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text())
    return None


def _squares(paths, side, least_side, progress):
    """Yield each picture uint8 (S, S, 3), in order; decoded by threads, as Pillow lets go of the interpreter."""
    converted, enlarged = collections.Counter(), 0
    silent = None if progress else True  # None: silent where standard error is no terminal
    n_threads = os.cpu_count()
    with ThreadPoolExecutor(n_threads) as pool:
        try:
            # not `pool.map`, which reads on while a slow disk writes, until all pictures are in memory
            squares = _in_order(pool, lambda path: _square(path, side, least_side), paths, 2 * n_threads)
            for picture, kind, was_small in tqdm(squares, "pictures", len(paths), disable=silent):
                converted.update([kind] if kind else [])
                enlarged += was_small
                yield picture
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if converted:
        kinds = ", ".join(f"{count} {kind}" for kind, count in converted.most_common())
        warnings.warn(f"pictures converted to RGB: {kinds}, of {len(paths)}", stacklevel=3)
    if enlarged:
        warnings.warn(f"pictures enlarged to {side} px: {enlarged} of {len(paths)}", stacklevel=3)


def _in_order(pool, function, items, ahead):
    """Yield function(item) of each item, computed by a pool; at most `ahead` results wait to be taken."""
    waiting = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _square(path, side, least_side):
    """(uint8 (S, S, 3), what kind it was if not RGB, whether it was smaller)."""
    try:
        with Image.open(path) as image:
            _check(path, image, least_side)
            image.draft(
                image.mode, (2 * side, 2 * side)
            )  # lets libjpeg skip detail that the resize would drop
            kind, image = _to_rgb(path, ImageOps.exif_transpose(image))
            was_small = min(image.size) < side
            return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)), kind, was_small
    except InputError:
        raise
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise InputError(f"{path}: cannot be read as a picture ({type(error).__name__}: {error})") from None


def _check(path, image, least_side):
    if getattr(image, "n_frames", 1) > 1:
        raise InputError(f"{path}: is animated ({image.n_frames} frames), expected one picture")
    if min(image.size) < least_side:
        width, height = image.size
        raise InputError(f"{path}: has {width}x{height} pixels, expected at least {least_side} on a side")


def _to_rgb(path, image):
    """(kind, RGB picture) of any mode; kind None for RGB."""
    if image.mode in _SIXTEEN_BIT:
        values = np.asarray(image).astype(np.float32)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(
                f"{path}: has {values.min():g} to {values.max():g} as grey, expected at most 16 bits"
            )
        return "16-bit", Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise InputError(f"{path}: has floating-point pixels, expected 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return "transparent", Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(
            "RGB"
        )
    kind = {"RGB": None, "L": "grey", "1": "black-and-white", "P": "palette"}.get(image.mode, image.mode)
    return kind, image.convert("RGB")
