"""The order of the work: the devices that a run trains on."""

import contextlib

import tensorflow as tf

import parallel
from errors import InputError


def strategy_on(gpus: str, batches: dict[str, tuple[int, int | None]]):
    """The strategy that trains on the chosen devices: mirrored over several GPUs, plain on one or on the CPU.

    Args:
        gpus: "all", "none", or indices such as "0,2".
        batches: (pictures a step, its micro-batches) by the flag of the first; the devices and the micro-batches of
            each must divide it.

    Raises:
        InputError: there is no such GPU, or the batch does not divide.
    """
    found = tf.config.list_physical_devices("GPU")
    chosen = _choose_gpus(gpus, found)
    tf.config.set_visible_devices(chosen, "GPU")
    # Rewriting its graph delays the U-Net's first step by seconds, and on a CPU makes none faster.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not chosen})
    if not chosen:
        with contextlib.suppress(RuntimeError):  # another operation came before, and fixed the threads
            share_cores()
    for gpu in chosen:
        tf.config.experimental.set_memory_growth(gpu, True)
    for flag, (batch_size, micro_batches) in batches.items():
        if batch_size % max(1, len(chosen)):
            raise InputError(f"{flag}: received {batch_size}, expected a multiple of the {len(chosen)} GPUs")
        if batch_size // max(1, len(chosen)) % (micro_batches or 1):
            raise InputError(
                f"{flag}: received {batch_size}, expected {micro_batches} equal micro-batches on each device"
            )
    if len(chosen) > 1:
        return tf.distribute.MirroredStrategy([f"GPU:{index}" for index in range(len(chosen))])
    return tf.distribute.get_strategy()


def share_cores():
    """Gives each part of a batch its share of the cores, see `parallel`; sums in another order have other last bits.

    Raises:
        RuntimeError: TensorFlow has made its threads already.
    """
    tf.config.threading.set_inter_op_parallelism_threads(parallel.PARTS)
    tf.config.threading.set_intra_op_parallelism_threads(max(1, parallel.cores() // parallel.PARTS))


def devices_in_words() -> str:
    """The devices that `strategy_on` chose, for a user."""
    gpus = [gpu.name.removeprefix("/physical_device:") for gpu in tf.config.get_visible_devices("GPU")]
    return ", ".join(gpus) or "the CPU: no GPU is chosen, or TensorFlow finds none"


def _choose_gpus(gpus, found):
    if gpus in ("all", "none"):
        return found if gpus == "all" else []
    try:
        indices = [int(index) for index in gpus.split(",")]
        if min(indices) < 0 or len(set(indices)) < len(indices):
            raise ValueError
        return [found[index] for index in indices]
    except (ValueError, IndexError):
        indices = f"all, none, or indices below {len(found)}, such as 0"
        expected = indices if found else "all or none: TensorFlow finds no GPU here"
        raise InputError(f"--gpus: received {gpus!r}, expected {expected}") from None
