"""The way between two prompts, two seeds or both: what lies on it, and what cannot be one."""

from typing import NamedTuple

import numpy as np
from keras import ops

from diffusion.guidance import lerp
from errors import InputError

FRAMES = 8  # where no number is given
LARGEST_SEED = 2**63 - 1


class Way(NamedTuple):
    """Where each of N pictures lies between its own prompt and seed and those of another.

    Args:
        shares: float32 (N,) of the way, 0 for its own and 1 for the other.
        tokens: int32 (N, T) of the other prompts, or None to keep its own; see `mixed`.
        seeds: N whole numbers, or None to keep its own. The noise that drawing starts from turns from the one's to the
            other's (`diffusion.guidance.slerp`); what the steps of a stochastic sampler draw anew stays its own's.
    """

    shares: np.ndarray
    tokens: np.ndarray | None = None
    seeds: np.ndarray | None = None


def mixed(denoise_pair, share):
    """A `denoise` on the way between two prompts: the predictions for both, `share` (B, 1, 1, 1) of the second's.

    The score that a mean of predictions stands for is that of the product of both distributions, each to the power of
    its share at each time (Liu et al. 2022). So the way begins and ends with just what each prompt alone
    predicts, and no place is half a word: a mean of the embeddings would need one mask for prompts of unlike lengths,
    under which the shorter one's padding is attended to, or a word of the longer one appears at once.

    Args:
        denoise_pair: like `denoise`, over a batch of twice the size: the first half with the one's context, the second
            with the other's.
    """

    def denoise(x, t):
        start, end = ops.split(denoise_pair(ops.concatenate([x, x], axis=0), t), 2, axis=0)
        return lerp(start, end, share)

    return denoise


def check_way(prompts, count, seed, to_prompt=None, to_seed=None, frames=None, gif=False, flag=""):
    """Refuses frames that cannot be drawn; `flag` goes before the names of settings in the message: "--", or nothing.

    Raises:
        InputError: names the setting, the value received and the value expected.
    """

    def named(name):
        return flag + (name.replace("_", "-") if flag else name)

    goals = {
        name: goal for name, goal in (("to_prompt", to_prompt), ("to_seed", to_seed)) if goal is not None
    }
    for name, value in (("frames", frames), ("gif", gif or None)):
        if value is not None and not goals:
            raise InputError(
                f"{named(name)}: received {value} without {named('to_prompt')} or {named('to_seed')}, "
                "expected where the frames lead to"
            )
    for name in goals:
        for what, number in (("prompts", len(prompts)), ("pictures a prompt", count)):
            if number != 1:
                raise InputError(f"{named(name)}: received with {number} {what}, expected one to start from")
    if frames is not None and frames < 2:
        raise InputError(f"{named('frames')}: received {frames}, expected at least 2, the ends")
    if to_prompt is not None and not to_prompt.strip():
        raise InputError(f"{named('to_prompt')}: received an empty text, expected words")
    if to_seed is not None and not abs(to_seed) <= LARGEST_SEED:
        raise InputError(f"{named('to_seed')}: received {to_seed}, expected a number of 64 bits")
    if to_seed is not None and to_seed == seed:
        raise InputError(
            f"{named('to_seed')}: received {to_seed}, expected another seed than {named('seed')}"
        )
