"""The noise schedules as pure functions of the diffusion time, and `Process`: a schedule and what is learned on it.

A sample at time t is x_t = s(t) x_0 + n(t) e with the signal rate s, the noise rate n, clean latents x_0 and
standard normal noise e; t = 0 is clean, t = 1 is noise. log-SNR is log(s^2 / n^2), sigma is n / s.

The chains of 1,000 discrete steps are grids of the same time: step k = 0 ... 999 is the time (k + 1) / 1000, and time 0
is the clean sample, s = 1. Between two steps (s, n) moves along their chord, put back on the circle s^2 + n^2 = 1.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from keras import ops

from diffusion import targets
from diffusion._checks import one_of, within

STEPS = 1000  # of the discrete chains
GRIDS = ("cosine-squared", "linear", "scaled-linear", "sigmoid")
SCHEDULES = ("cosine", *GRIDS, "flow", "edm")
RHO = 7.0  # EDM's sigma^(1/7) is linear in the time
EDM_ENDS = (0.002 ** (1 / RHO), 80.0 ** (1 / RHO))


def cosine_rates(diffusion_times, max_signal_rate=0.95, min_signal_rate=0.02):
    """The cosine schedule by angles: s = cos a, n = sin a, with a linear in the time, and s(0) and s(1) given.

    A clipped form of the schedule of Nichol & Dhariwal 2021 (equation 17 without its square). Returns
    (noise_rates, signal_rates), each (B, 1, 1, 1), at diffusion_times (B,) in [0, 1].
    """
    start, end = math.acos(max_signal_rate), math.acos(min_signal_rate)
    angles = ops.reshape(start + diffusion_times * (end - start), (-1, 1, 1, 1))
    return ops.sin(angles), ops.cos(angles)


@functools.cache
def discrete_grid(schedule, zero_terminal_snr=False):
    """The (noise rate, signal rate) of the times 0, 1/1000, ..., 1 of a discrete chain, float64 (1001, 2).

    "linear" has betas 1e-4 to 0.02 (Ho et al. 2020); "scaled-linear" evenly spaced roots of betas 0.00085 to 0.012
    (Rombach et al. 2022); "sigmoid" betas 1e-4 to 0.02 (Xu et al. 2022); "cosine-squared" those of equation 17 of
    Nichol & Dhariwal 2021, up to 0.999. `zero_terminal_snr` shifts and stretches the signal rates so that the last is 0
    and the first what it was (Lin et al. 2023, algorithm 1).
    """
    one_of("schedule", schedule, GRIDS)
    rise = np.linspace(0, 1, STEPS)
    squares = np.cos((np.linspace(0, 1, STEPS + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = {
        "linear": 1e-4 + (0.02 - 1e-4) * rise,
        "scaled-linear": (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * rise) ** 2,
        "sigmoid": 1e-4 + (0.02 - 1e-4) / (1 + np.exp(6 - 12 * rise)),
        "cosine-squared": np.minimum(1 - squares[1:] / squares[:-1], 0.999),
    }[schedule]
    signal_rates = np.sqrt(np.cumprod(1 - betas))
    if zero_terminal_snr:
        first, last = signal_rates[[0, -1]]
        signal_rates = (signal_rates - last) * first / (first - last)
    signal_rates = np.append(1.0, signal_rates)
    return np.stack([np.sqrt(1 - signal_rates**2), signal_rates], axis=1)


def grid_rates(diffusion_times, grid):
    """(noise_rates, signal_rates), each (B, 1, 1, 1), between the points of a `discrete_grid`."""
    places = ops.cast(diffusion_times, "float32") * STEPS
    cells = ops.clip(ops.cast(ops.floor(places), "int32"), 0, STEPS - 1)  # (B,)
    shares = (places - ops.cast(cells, "float32"))[:, None]
    grid = ops.convert_to_tensor(grid, "float32")
    start, end = (ops.take(grid, cells + i, axis=0) for i in (0, 1))  # (B, 2)
    chord = (1.0 - shares) * start + shares * end
    chord = chord / ops.sqrt(ops.sum(chord**2, axis=1, keepdims=True))
    return tuple(ops.reshape(chord[:, i], (-1, 1, 1, 1)) for i in (0, 1))


def grid_times(angles, grid):
    """The inverse of `grid_rates`: times (B,) at which (n, s) is (sin a, cos a), for angles a (B,)."""
    known = ops.convert_to_tensor(np.arctan2(grid[:, 0], grid[:, 1]), "float32")
    cells = ops.clip(ops.searchsorted(known, angles, side="right") - 1, 0, STEPS - 1)
    grid = ops.convert_to_tensor(grid, "float32")
    start, end = (ops.take(grid, cells + i, axis=0) for i in (0, 1))  # (B, 2)
    # How far along the chord of its cell the ray of the angle crosses it.
    across = ops.stack([ops.cos(angles), -ops.sin(angles)], axis=1)
    shares = ops.sum(across * start, axis=1) / ops.sum(across * (start - end), axis=1)
    return (ops.cast(cells, "float32") + shares) / STEPS


@dataclass(frozen=True)
class Process:
    """A diffusion process: a schedule, what a network learns on it, and how its errors count.

    Args:
        target: what the network predicts, see `targets.target_of`.
        max_signal_rate, min_signal_rate: see `cosine_rates`.
        schedule, zero_terminal_snr: "cosine", see `cosine_rates`; a discrete one, see `discrete_grid`; "flow", s = 1 -
            t, n = t (Liu et al. 2023); "edm", s = 1, n from 0.002 to 80 (Karras et al. 2022, equation 5).
        shift: of the times of "flow" in training and sampling, see `times`.
        data_deviation: standard deviation of the latents, for the target "edm".
        weight, snr_cap, loss: how errors count at each time, see `targets.weights` and `targets.distance`.

    It raises ValueError on an unknown name, a number out of range, or a target that the schedule cannot express.
    """

    target: str = "velocity"
    max_signal_rate: float = 0.95
    min_signal_rate: float = 0.02
    schedule: str = "cosine"
    zero_terminal_snr: bool = False
    shift: float = 1.0
    data_deviation: float = 1.0
    weight: str = "none"
    snr_cap: float = 5.0
    loss: str = "mse"

    def __post_init__(self):
        one_of("target", self.target, targets.TARGETS)
        one_of("weight", self.weight, targets.WEIGHTS)
        one_of("loss", self.loss, targets.LOSSES)
        one_of("schedule", self.schedule, GRIDS if self.zero_terminal_snr else SCHEDULES)
        if not 0 < self.min_signal_rate < self.max_signal_rate < 1:
            raise ValueError(
                "signal rates must fall within (0, 1). "
                f"Received: max_signal_rate={self.max_signal_rate}, min_signal_rate={self.min_signal_rate}"
            )
        for name in ("shift", "data_deviation", "snr_cap"):
            within(name, getattr(self, name), 1e-3, 1e3)
        if self.shift != 1 and self.schedule != "flow":
            raise ValueError(f"shift must be 1 where the schedule is not flow. Received: {self.shift}")
        # The noise tells no latents where no signal is left, and the velocity is of schedules with s^2 + n^2 = 1.
        known = [
            name for name in targets.TARGETS if name != "velocity" or self.schedule not in ("flow", "edm")
        ]
        without_signal = self.schedule == "flow" or self.zero_terminal_snr
        one_of("target of this schedule", self.target, known[1:] if without_signal else known)

    def rates(self, diffusion_times):
        """(noise_rates, signal_rates), each (B, 1, 1, 1), at diffusion_times (B,) in [0, 1]."""
        within("diffusion times", diffusion_times, 0, 1)
        if self.schedule == "cosine":
            return cosine_rates(diffusion_times, self.max_signal_rate, self.min_signal_rate)
        if self.schedule in GRIDS:
            return grid_rates(diffusion_times, discrete_grid(self.schedule, self.zero_terminal_snr))
        t = ops.reshape(ops.cast(diffusion_times, "float32"), (-1, 1, 1, 1))
        if self.schedule == "flow":
            return t, 1.0 - t
        return (EDM_ENDS[0] + t * (EDM_ENDS[1] - EDM_ENDS[0])) ** RHO, ops.ones_like(t)

    def log_snr(self, diffusion_times):
        """log(s^2 / n^2) (B,) at diffusion_times (B,): falling, and infinite where a rate is 0."""
        noise_rates, signal_rates = self.rates(diffusion_times)
        return ops.reshape(2.0 * (ops.log(signal_rates) - ops.log(noise_rates)), (-1,))

    def times_of(self, log_snr):
        """The inverse of `log_snr`: times (B,) in [0, 1], the nearer end for what the schedule does not reach."""
        sigmas = ops.exp(-0.5 * ops.cast(log_snr, "float32"))
        angles = ops.arctan(sigmas)
        if self.schedule == "cosine":
            start, end = math.acos(self.max_signal_rate), math.acos(self.min_signal_rate)
            times = (angles - start) / (end - start)
        elif self.schedule == "flow":
            times = ops.sin(angles) / (ops.sin(angles) + ops.cos(angles))
        elif self.schedule == "edm":
            times = (sigmas ** (1 / RHO) - EDM_ENDS[0]) / (EDM_ENDS[1] - EDM_ENDS[0])
        else:
            times = grid_times(angles, discrete_grid(self.schedule, self.zero_terminal_snr))
        return ops.clip(times, 0.0, 1.0)

    def start(self, noise, diffusion_time, latents=None):
        """x (B, h, w, C) at the scalar time where sampling starts: pure noise, or `latents` as noisy as that time."""
        rates = self.rates(ops.reshape(diffusion_time, (1,)))
        if latents is not None:
            return targets.diffuse(latents, noise, *rates)
        return rates[0] * noise if self.schedule == "edm" else noise

    def scaled(self, x, diffusion_times):
        """x as the network takes it: of unit variance for "edm", schedule or target, and x itself for others."""
        if "edm" not in (self.schedule, self.target):
            return x
        return x / targets.deviation_of(*self.rates(diffusion_times), self.data_deviation)

    def denoised(self, prediction, x, diffusion_times):
        """The clean latents that the network's `prediction` implies at x, all (B, h, w, C)."""
        return targets.denoised(self.target, prediction, x, *self.rates(diffusion_times), self.data_deviation)

    def losses(self, prediction, latents, noise, diffusion_times, log_variance=None):
        """The loss of each sample, (B,), of a prediction (B, h, w, C) for latents and noise like it, at times (B,);
        log_variance (B,), the logarithm of the loss to expect at these, is for the weight "uncertainty"."""
        rates = self.rates(diffusion_times)
        wanted = targets.target_of(self.target, latents, noise, *rates, self.data_deviation)
        loss = targets.distance(self.loss, prediction, wanted)
        if self.weight != "none":
            loss = loss * targets.weights(self.weight, self.target, *rates, self.snr_cap, self.data_deviation)
        return targets.uncertain(loss, log_variance) if self.weight == "uncertainty" else loss
