"""The noise schedule and what a network is asked to predict, as pure functions of the diffusion time.

A sample at time t is x_t = s(t) x_0 + n(t) e with the signal rate s, the noise rate n, clean latents x_0 and
standard normal noise e; t = 0 is clean, t = 1 is noise.
"""

import math
from dataclasses import dataclass

from keras import ops

TARGETS = ("noise", "image", "velocity")


def cosine_rates(diffusion_times, max_signal_rate=0.95, min_signal_rate=0.02):
    """The cosine schedule by angles: s = cos a, n = sin a, with a linear in the time.

    A clipped form of the schedule of Nichol & Dhariwal 2021 (equation 17 without its square).

    Args:
        diffusion_times: (B,) in [0, 1].
        max_signal_rate: s(0).
        min_signal_rate: s(1).

    Returns:
        (noise_rates, signal_rates), each (B, 1, 1, 1).
    """
    start, end = math.acos(max_signal_rate), math.acos(min_signal_rate)
    angles = ops.reshape(start + diffusion_times * (end - start), (-1, 1, 1, 1))
    return ops.sin(angles), ops.cos(angles)


def diffuse(latents, noise, noise_rates, signal_rates):
    """x_t = s x_0 + n e; latents and noise (B, h, w, C), rates (B, 1, 1, 1)."""
    return signal_rates * latents + noise_rates * noise


def target_of(target, latents, noise, noise_rates, signal_rates):
    """What the network should predict for `target`, one of `TARGETS`.

    The velocity is v = s e - n x_0 (Salimans & Ho 2022), for rates with s^2 + n^2 = 1.

    Raises:
        ValueError: on an unknown target.
    """
    if target == "noise":
        return noise
    if target == "image":
        return latents
    if target == "velocity":
        return signal_rates * noise - noise_rates * latents
    raise ValueError(f"target must be one of {', '.join(TARGETS)}. Received: {target!r}")


def denoised(target, prediction, x, noise_rates, signal_rates):
    """The clean latents x_0 that `prediction` implies at x = x_t; the inverse of `target_of`.

    Raises:
        ValueError: on an unknown target.
    """
    if target == "noise":
        return (x - noise_rates * prediction) / signal_rates
    if target == "image":
        return prediction
    if target == "velocity":
        return signal_rates * x - noise_rates * prediction
    raise ValueError(f"target must be one of {', '.join(TARGETS)}. Received: {target!r}")


@dataclass(frozen=True)
class Process:
    """A diffusion process: a schedule and a target.

    Args:
        target: what the network predicts, one of `TARGETS`.
        max_signal_rate, min_signal_rate: see `cosine_rates`.

    Raises:
        ValueError: on an unknown target, or rates that do not fall within (0, 1).
    """

    target: str = "velocity"
    max_signal_rate: float = 0.95
    min_signal_rate: float = 0.02

    def __post_init__(self):
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}. Received: {self.target!r}")
        if not 0 < self.min_signal_rate < self.max_signal_rate < 1:
            raise ValueError(
                "signal rates must fall within (0, 1). "
                f"Received: max_signal_rate={self.max_signal_rate}, min_signal_rate={self.min_signal_rate}"
            )

    def rates(self, diffusion_times):
        """(noise_rates, signal_rates), each (B, 1, 1, 1), at diffusion_times (B,)."""
        return cosine_rates(diffusion_times, self.max_signal_rate, self.min_signal_rate)

    def denoised(self, prediction, x, diffusion_times):
        """The clean latents that the network's `prediction` implies at x, all (B, h, w, C)."""
        return denoised(self.target, prediction, x, *self.rates(diffusion_times))
