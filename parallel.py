"""A batch in parts: computed side by side on a CPU's cores, and added up or joined again.

One operation on all cores at once waits for the slowest at its end, and a small network has hundreds of small
operations. A part on each core waits once. `benchmarks/parts.py` measures it.
"""

import os

import tensorflow as tf

PARTS = 2
MOST_PLACES = 4 * 64 * 64  # of a part's pictures: more of them in one part need memory and save no time


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_cpu():
    """Whether there is no GPU to compute on."""
    return not tf.config.get_visible_devices("GPU")


def parts_of(batch_size, asked=None, places=1):
    """How many equal parts a training batch has.

    Args:
        batch_size: rows of the batch.
        asked: the answer, unless it is None.
        places: height times width of a row.

    Returns:
        As asked; or 1 on GPUs; or on a CPU the least multiple of `PARTS` whose parts have no more than `MOST_PLACES`,
        or the largest that divides the batch where all have more; 1 where none divides it.
    """
    if asked or not on_cpu():
        return asked or 1
    even = [parts for parts in range(PARTS, batch_size + 1, PARTS) if batch_size % parts == 0]
    small = [parts for parts in even if batch_size // parts * places <= MOST_PLACES]
    return small[0] if small else max(even, default=1)


def summed(function, batch, parts, zeros):
    """The sum of `function` over equal parts of a batch.

    Args:
        function: rows -> a nest of tensors; it must not change variables.
        batch: dict of tensors (B, ...).
        parts: how many; it must divide B. Without a GPU `PARTS` at a time are computed side by side, otherwise one.
        zeros: what the sum begins with, of the structure and the shapes that `function` returns.
    """
    if parts == 1:
        return function(batch)
    cut = {name: tf.reshape(rows, (parts, -1, *rows.shape[1:])) for name, rows in batch.items()}

    def add(part, total):
        new = function({name: rows[part] for name, rows in cut.items()})
        return part + 1, tf.nest.map_structure(tf.add, total, new)

    together = PARTS if on_cpu() else 1
    return tf.while_loop(lambda part, _: part < parts, add, (0, zeros), parallel_iterations=together)[1]


def joined(function, rows, shape, dtype="float32"):
    """function(*rows), where `function` treats each row by itself; without a GPU it gets `PARTS` parts side by side.

    Args:
        function: tensors (B, ...), any B above 0 -> one tensor (B, *shape).
        rows: list of tensors (B, ...).
        shape, dtype: of a row of the result.
    """
    if not on_cpu():
        return function(*rows)
    count = tf.shape(rows[0])[0]
    parts = tf.minimum(PARTS, count)

    def write(part, done):
        start, stop = part * count // parts, (part + 1) * count // parts
        return part + 1, done.write(part, function(*(row[start:stop] for row in rows)))

    done = tf.TensorArray(dtype, parts, infer_shape=False, element_shape=[None, *shape])
    done = tf.while_loop(lambda part, _: part < parts, write, (0, done), parallel_iterations=PARTS)[1]
    return tf.ensure_shape(done.concat(), [rows[0].shape[0], *shape])
