"""What a network is asked to predict, and how its errors count, as pure functions of the rates.

x = s x_0 + n e throughout, with clean latents x_0 and noise e (B, h, w, C), the signal rates s and noise rates n
(B, 1, 1, 1), and the signal-to-noise ratio SNR = s^2 / n^2. All raise ValueError on a name that they do not know.
"""

from keras import ops

from diffusion._checks import one_of

TARGETS = ("noise", "image", "velocity", "flow", "edm")
WEIGHTS = ("none", "min-snr", "edm", "uncertainty")
LOSSES = ("mse", "mae", "huber")
LEAST_NOISE = 1e-4  # in weights, so that they stay finite where no noise is left


def diffuse(latents, noise, noise_rates, signal_rates):
    """x_t = s x_0 + n e; latents and noise (B, h, w, C), rates (B, 1, 1, 1)."""
    return signal_rates * latents + noise_rates * noise


def perturbed(noise, other, strength):
    """noise + strength * other, standard normal both.

    With `other` (B, 1, 1, C) it is offset noise, to be diffused and predicted (Guttenberg 2023, strength 0.1); with one
    like the noise it is input perturbation, to be diffused but not predicted (Ning et al. 2023, strength 0.1).
    """
    return noise + strength * other


def deviation_of(noise_rates, signal_rates, data_deviation=1.0):
    """Standard deviation of x (B, 1, 1, 1), for latents of `data_deviation`; EDM's networks take x divided by it."""
    return ops.sqrt(noise_rates**2 + (signal_rates * data_deviation) ** 2)


def _parts(target, n, s, data_deviation):
    """(a, b, d): the target is a x_0 + b e, and d = s b - n a, by which x and the target are solved for x_0 and e."""
    one_of("target", target, TARGETS)
    if target == "edm":
        deviation = deviation_of(n, s, data_deviation)
        return n / data_deviation / deviation, -s * data_deviation / deviation, -deviation / data_deviation
    return {"noise": (0, 1, s), "image": (1, 0, -n), "velocity": (-n, s, 1), "flow": (-1, 1, s + n)}[target]


def target_of(target, latents, noise, noise_rates, signal_rates, data_deviation=1.0):
    """What the network should predict, (B, h, w, C).

    "noise" is e; "image" x_0; "velocity" s e - n x_0, for rates with s^2 + n^2 = 1 (Salimans & Ho 2022); "flow" e - x_0
    (Liu et al. 2023); "edm" F of x_0 = c_skip x + c_out F, of unit variance for latents of `data_deviation` (Karras et
    al. 2022, equation 7), and minus the velocity where that is 1.
    """
    a, b, _ = _parts(target, noise_rates, signal_rates, data_deviation)
    return a * latents + b * noise


def denoised(target, prediction, x, noise_rates, signal_rates, data_deviation=1.0):
    """The clean latents x_0 that `prediction` implies at x; the inverse of `target_of`, with its errors."""
    _, b, d = _parts(target, noise_rates, signal_rates, data_deviation)
    return prediction if target == "image" else (b * x - noise_rates * prediction) / d


def convert(prediction, source, target, x, noise_rates, signal_rates, data_deviation=1.0):
    """A prediction of `source` at x as one of `target`, both among `TARGETS`.

    It needs what the source does not know: no signal is no way from "noise", no noise no way from "image".
    """
    a, _, d = _parts(source, noise_rates, signal_rates, data_deviation)
    latents = denoised(source, prediction, x, noise_rates, signal_rates, data_deviation)
    noise = prediction if source == "noise" else (signal_rates * prediction - a * x) / d
    return target_of(target, latents, noise, noise_rates, signal_rates, data_deviation)


def weights(weight, target, noise_rates, signal_rates, snr_cap=5.0, data_deviation=1.0):
    """How the squared error of `target` counts at each time, (B,).

    An error of the target moves x_0 by n / d times as much (see `_parts`), so a weight of the error of x_0, times the
    square of that, is the same weight whatever the network predicts. "none" is 1; "min-snr" min(SNR, snr_cap) of x_0,
    so min(SNR, c) / SNR of the noise and min(SNR, c) / (SNR + 1) of the velocity (Hang et al. 2023); "edm" 1 / c_out^2
    of x_0, so 1 of its own target (Karras et al. 2022); "uncertainty" that of "edm", for `uncertain`.
    """
    one_of("weight", weight, WEIGHTS)
    n, s = ops.reshape(ops.maximum(noise_rates, LEAST_NOISE), (-1,)), ops.reshape(signal_rates, (-1,))
    gain, edm_gain = (ops.square(n / _parts(name, n, s, data_deviation)[2]) for name in (target, "edm"))
    if weight == "none":
        return ops.ones_like(gain)
    return gain * ops.minimum((s / n) ** 2, snr_cap) if weight == "min-snr" else gain / edm_gain


def distance(loss, prediction, target, width=0.1):
    """The error of each sample (B,) of a prediction like the target (B, h, w, C): a mean over its values d.

    "mse" takes d^2; "mae" |d|; "huber" 2 c (sqrt(d^2 + c^2) - c) with the width c, the smooth pseudo-Huber loss: d^2
    for small errors, so that learning rates and weights carry over, 2 c |d| for large ones (Charbonnier et al. 1997).
    """
    one_of("loss", loss, LOSSES)
    values = ops.abs(prediction - target) if loss == "mae" else ops.square(prediction - target)
    if loss == "huber":
        values = 2.0 * width * (ops.sqrt(values + width**2) - width)
    return ops.mean(values, axis=(1, 2, 3))


def uncertain(loss, log_variance):
    """loss / e^u + u with a learned u, all (B,): so every time counts alike (Karras et al. 2024, equation 21)."""
    return loss * ops.exp(-log_variance) + log_variance
