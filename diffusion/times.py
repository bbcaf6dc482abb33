"""The diffusion times that a network is trained at, and those that a sampler asks.

Both shift those of "flow" to shift t / (1 + (shift - 1) t), towards noise (Esser et al. 2024, equation 23).
"""

import math

import numpy as np
from keras import ops

from diffusion._checks import one_of, within
from diffusion.schedule import RHO, STEPS

TIMES = ("uniform", "logit_normal", "log_normal", "mixed")
SPACINGS = ("uniform", "leading", "trailing", "karras", "logsnr-uniform")


def training_times(name, process, mean=None, deviation=None, uniform_share=0.1):
    """A function from uniform shares of (0, 1), (B,), to diffusion times (B,): the quantiles of a distribution.

    It draws nothing, so shares that are stratified over a batch, one in each B-th, give times that are so too.
    "uniform"; "logit_normal", the sigmoid of a normal variable of, if not given, mean 0 and deviation 1 (Esser et al.
    2024, section 3.1); "log_normal", whose log sigma is normal, of mean -1.2 and deviation 1.2 (Karras et al. 2022,
    table 1); "mixed", logit_normal but for a `uniform_share`, which keeps both ends in.
    """
    one_of("times", name, TIMES)
    mean = (-1.2 if name == "log_normal" else 0.0) if mean is None else mean
    deviation = (1.2 if name == "log_normal" else 1.0) if deviation is None else deviation

    def normal(shares):
        return mean + deviation * math.sqrt(2) * ops.erfinv(2.0 * ops.clip(shares, 1e-6, 1 - 1e-6) - 1.0)

    def mixed(shares):
        inner = ops.sigmoid(normal((shares - uniform_share) / (1.0 - uniform_share)))
        return shifted(ops.where(shares < uniform_share, shares / uniform_share, inner), process.shift)

    return {
        "uniform": lambda shares: shifted(shares, process.shift),
        "logit_normal": lambda shares: shifted(ops.sigmoid(normal(shares)), process.shift),
        "log_normal": lambda shares: process.times_of(-2.0 * normal(shares)),
        "mixed": mixed,
    }[name]


def shifted(times, shift):
    """Times of "flow" with their noise-to-signal ratio times `shift`."""
    return times if shift == 1 else shift * times / (1.0 + (shift - 1.0) * times)


def sampling_times(process, steps, spacing="uniform"):
    """The K + 1 falling times of a sampler of K `steps`, float32; the last, 0, stands for the clean end.

    `spacing` is "uniform", 1 - k/K; "trailing", the same on the grid of 1,000 steps; "leading", up from its first step,
    without its last (both Lin et al. 2023, table 2); "karras", sigma^(1/7) in equal steps (Karras et al. 2022,
    equation 5), or "logsnr-uniform", log-SNR in equal steps (Lu et al. 2022), from time 1 to the schedule's least
    noise, or to time 1/1000 where that is none. Raises ValueError on an unknown one, and on steps that cannot be.
    """
    one_of("spacing", spacing, SPACINGS)
    most = STEPS if spacing in ("leading", "trailing") else 10**9
    if steps != steps // 1 or not 1 <= steps <= most:
        raise ValueError(f"steps must be a whole number from 1 to {most:,}. Received: {steps}")
    if spacing == "uniform":
        return shifted(ops.linspace(1.0, 0.0, steps + 1, dtype="float32"), process.shift)
    if spacing in ("leading", "trailing"):
        left = np.arange(steps)[::-1]
        numbers = (
            left * (STEPS // steps) + 1 if spacing == "leading" else np.round((left + 1) * (STEPS / steps))
        )
        return shifted(ops.convert_to_tensor(np.append(numbers, 0) / STEPS, "float32"), process.shift)
    ends = np.array(process.log_snr(np.array([1, 1 - 1 / STEPS, 1 / STEPS, 0], "float32")), "float64") / -2
    first, last = (ends[i] if np.isfinite(ends[i]) else ends[j] for i, j in ((0, 1), (3, 2)))  # of log sigma
    if spacing == "karras":
        log_sigmas = RHO * np.log(np.linspace(np.exp(first / RHO), np.exp(last / RHO), steps))
    else:
        log_sigmas = np.linspace(first, last, steps)
    times = process.times_of(ops.convert_to_tensor(-2 * log_sigmas[1:], "float32"))
    return ops.concatenate([ops.ones(1), times, ops.zeros(1)])


def last_times(times, strength):
    """The last round(strength K) steps of sampling `times` (K + 1,), for image-to-image (Meng et al. 2022).

    Strength 1 starts from pure noise like a new picture, less from the picture, as noisy as the first time left
    (`Process.start`). Raises ValueError where it is outside [0, 1].
    """
    within("strength", strength, 0, 1)
    steps = len(times) - 1
    return times[steps - round(strength * steps) :]
