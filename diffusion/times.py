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


def stratified(draws):
    """Shares of (0, 1), one in each B-th of it, from B uniform draws (B,): less noise in a batch's loss.

    Row b falls in the b-th part. A whole global batch of them, made of draws that depend on (seed, step) alone, and
    shuffled by them, before it is split: so they are the same on any number of replicas, and after a resume.
    """
    size = ops.shape(draws)[0]
    return (ops.arange(size, dtype="float32") + draws) / ops.cast(size, "float32")


def training_times(name, process, mean=None, deviation=None, uniform_share=0.1):
    """A function from uniform shares of (0, 1), (B,), to diffusion times (B,): the quantiles of a distribution.

    Args:
        name: "uniform"; "logit_normal", the sigmoid of a normal variable of mean 0 and deviation 1, more in the middle
            (Esser et al. 2024, section 3.1); "log_normal", whose log sigma is normal, of mean -1.2 and deviation 1.2
            (Karras et al. 2022, table 1); "mixed", logit_normal but for `uniform_share`, which keeps both ends in.
        process: the `Process`.
        mean, deviation: others than these.

    Raises:
        ValueError: on an unknown name.
    """
    one_of("times", name, TIMES)
    mean = (-1.2 if name == "log_normal" else 0.0) if mean is None else mean
    deviation = (1.2 if name == "log_normal" else 1.0) if deviation is None else deviation

    def normal(shares):
        return mean + deviation * math.sqrt(2) * ops.erfinv(2.0 * ops.clip(shares, 1e-6, 1 - 1e-6) - 1.0)

    def times(shares):
        if name == "uniform":
            return shares
        if name == "log_normal":
            return process.times_of(-2.0 * normal(shares))
        if name == "logit_normal":
            return ops.sigmoid(normal(shares))
        inner = ops.sigmoid(normal((shares - uniform_share) / (1.0 - uniform_share)))
        return ops.where(shares < uniform_share, shares / uniform_share, inner)

    return times if name == "log_normal" else lambda shares: shifted(times(shares), process.shift)


def shifted(times, shift):
    """Times of "flow" with their noise-to-signal ratio times `shift`."""
    return times if shift == 1 else shift * times / (1.0 + (shift - 1.0) * times)


def uniform_times(steps):
    """The K + 1 evenly spaced times 1, 1 - 1/K, ..., 0 of a sampler of K `steps`, float32."""
    return ops.linspace(1.0, 0.0, steps + 1, dtype="float32")


def sampling_times(process, steps, spacing="uniform"):
    """The K + 1 falling times of a sampler of K `steps`, float32; the last, 0, stands for the clean end.

    Args:
        process: the `Process`.
        steps: K.
        spacing: "uniform", 1 - k/K; "trailing", the same on the grid of 1,000 steps; "leading", up from its first step,
            without its last (both Lin et al. 2023, table 2); "karras", sigma^(1/7) in equal steps (Karras et al. 2022,
            equation 5), or "logsnr-uniform", log-SNR in equal steps (Lu et al. 2022), from time 1 to the schedule's
            least noise, or time 1/1000 where it has none.

    Raises:
        ValueError: on an unknown spacing, or steps that are no whole number from 1 (to 1,000 on the grid).
    """
    one_of("spacing", spacing, SPACINGS)
    most = STEPS if spacing in ("leading", "trailing") else 10**9
    if steps != steps // 1 or not 1 <= steps <= most:
        raise ValueError(f"steps must be a whole number from 1 to {most:,}. Received: {steps}")
    if spacing == "uniform":
        return shifted(uniform_times(steps), process.shift)
    if spacing in ("leading", "trailing"):
        leading = np.arange(steps)[::-1] * (STEPS // steps) + 1
        trailing = np.round(STEPS * (1 - np.arange(steps) / steps))
        times = np.append(leading if spacing == "leading" else trailing, 0) / STEPS
        return shifted(ops.convert_to_tensor(times, "float32"), process.shift)
    ends = np.array(process.log_snr(np.array([1, 1 - 1 / STEPS, 1 / STEPS, 0], "float32")), "float64") / -2
    first, last = (ends[i] if np.isfinite(ends[i]) else ends[j] for i, j in ((0, 1), (3, 2)))  # of log sigma
    if spacing == "karras":
        log_sigmas = RHO * np.log(np.linspace(np.exp(first / RHO), np.exp(last / RHO), steps))
    else:
        log_sigmas = np.linspace(first, last, steps)
    times = process.times_of(ops.convert_to_tensor(-2 * log_sigmas[1:], "float32"))
    return ops.concatenate([ops.ones(1), times, ops.zeros(1)])


def last_times(times, strength):
    """The part of sampling `times` (K + 1,) for image-to-image: their last round(strength K) steps.

    1 keeps all, for a start from pure noise like a new picture's; less starts from the picture, as noisy as the first
    time left (`Process.start`; Meng et al. 2022). Raises ValueError where `strength` is outside [0, 1].
    """
    within("strength", strength, 0, 1)
    steps = len(times) - 1
    return times[steps - round(strength * steps) :]
