"""The order of the work: the devices that a run trains on."""

import tensorflow as tf

from errors import InputError


def strategy_on(gpus: str, batch_sizes: dict[str, int]):
    """The strategy that trains on the chosen devices: mirrored over several GPUs, plain on one or on the CPU.

    Args:
        gpus: "all", "none", or indices such as "0,2".
        batch_sizes: pictures a step, by the flag that sets them; several devices must divide them.

    Raises:
        InputError: there is no such GPU, or the batch does not divide.
    """
    found = tf.config.list_physical_devices("GPU")
    chosen = _choose_gpus(gpus, found)
    tf.config.set_visible_devices(chosen, "GPU")
    # Rewriting its graph delays the U-Net's first step by seconds, and on a CPU makes none faster.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not chosen})
    for gpu in chosen:
        tf.config.experimental.set_memory_growth(gpu, True)
    for flag, batch_size in batch_sizes.items():
        if batch_size % max(1, len(chosen)):
            raise InputError(f"{flag}: received {batch_size}, expected a multiple of the {len(chosen)} GPUs")
    if len(chosen) > 1:
        return tf.distribute.MirroredStrategy([f"GPU:{index}" for index in range(len(chosen))])
    return tf.distribute.get_strategy()


def _choose_gpus(gpus, found):
    if gpus in ("all", "none"):
        return found if gpus == "all" else []
    try:
        indices = [int(index) for index in gpus.split(",")]
        if min(indices) < 0 or len(set(indices)) < len(indices):
            raise ValueError
        return [found[index] for index in indices]
    except (ValueError, IndexError):
        raise InputError(
            f"--gpus: received {gpus!r}, expected all, none, or indices below {len(found)}, such as 0"
        ) from None
