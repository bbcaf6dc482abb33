"""Samplers: functions of (`denoise`, `noise`, `times`), and guidance, which wraps `denoise`.

`denoise(x, t)` takes noisy latents (B, h, w, C) and a scalar time and returns the predicted clean latents;
`rates(t)` gives the (noise_rate, signal_rate) of a time of shape (1,). `times` (K + 1,) falls from 1 to 0.
"""

from keras import ops

SAMPLERS = ("ddim",)


def uniform_times(steps):
    """The K + 1 evenly spaced times 1, 1 - 1/K, ..., 0 of a sampler of K `steps`, float32."""
    return ops.linspace(1.0, 0.0, steps + 1, dtype="float32")


def ddim(denoise, noise, times, rates):
    """Deterministic DDIM (Song et al. 2021, equation 12 with eta = 0), as one compiled loop.

    Args:
        denoise, times, rates: see the module.
        noise: (B, h, w, C) standard normal.

    Returns:
        Clean latents (B, h, w, C).
    """

    def step(k, state):
        x, _ = state
        noise_rate, signal_rate = rates(ops.reshape(times[k], (1,)))
        next_noise_rate, next_signal_rate = rates(ops.reshape(times[k + 1], (1,)))
        clean = denoise(x, times[k])
        predicted_noise = (x - signal_rate * clean) / noise_rate
        return next_signal_rate * clean + next_noise_rate * predicted_noise, clean

    # The last prediction is the sample: s(0) < 1 in the clipped schedules, so x itself keeps some noise.
    _, clean = ops.fori_loop(0, ops.shape(times)[0] - 1, step, (noise, ops.zeros_like(noise)))
    return clean


def guide(denoise_pair, guidance):
    """Classifier-free guidance (Ho & Salimans 2022) as a wrapper.

    Args:
        denoise_pair: like `denoise`, over a batch of twice the size: the first half with its context, the
            second half without.
        guidance: scalar; 1 is the conditional prediction itself, larger follows the context more strongly.

    Returns:
        A `denoise` over the single batch: unconditional + guidance * (conditional - unconditional).
    """

    def denoise(x, t):
        conditional, unconditional = ops.split(denoise_pair(ops.concatenate([x, x], axis=0), t), 2, axis=0)
        return unconditional + guidance * (conditional - unconditional)

    return denoise
