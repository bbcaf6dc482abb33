"""The losses of an autoencoder's training as pure functions: reconstruction, KL, and the adversarial ones.

All are computed and returned in float32, a value for each sample (B,) unless said otherwise, so that means are taken
in one place. Letters: B batch, H W place of a pixel, h w place of a latent or of a patch, C channels. All that take a
name raise InputError on one that they do not know.
"""

import math

from keras import ops

from errors import InputError
from model.vae import kl_divergence

ERRORS = ("l1", "mse", "mix")
KL_SCHEDULES = ("constant", "linear", "cosine", "cyclical")
ADVERSARIAL = ("hinge", "vanilla", "non-saturating")


def _one_of(name, value, known):
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}. Received: {value!r}")


def _floats(*tensors):
    return [ops.cast(tensor, "float32") for tensor in tensors]


def _sample_mean(values):
    """The mean of each sample, (B, ...) -> (B,)."""
    return ops.mean(values, axis=tuple(range(1, len(values.shape))))


# Reconstruction


def reconstruction(error_kind, pixels, reconstruction, l1_share=0.5):
    """The error d = reconstruction - pixels of each sample, a mean over its values; (B, H, W, 3) both -> (B,).

    "l1" takes |d|; "mse" d^2; "mix" l1_share |d| + (1 - l1_share) d^2.
    """
    _one_of("error_kind", error_kind, ERRORS)
    pixels, reconstruction = _floats(pixels, reconstruction)
    l1, mse = (
        _sample_mean(ops.abs(reconstruction - pixels)),
        _sample_mean(ops.square(reconstruction - pixels)),
    )
    return {"l1": l1, "mse": mse, "mix": l1_share * l1 + (1.0 - l1_share) * mse}[error_kind]


# KL


def kl_factor(schedule, step, warmup_steps, cycles=4):
    """What the weight of the KL divergence is multiplied by at a step, within 0..1: a scalar, or like `step`.

    With x = step / warmup_steps: "constant" is 1; "linear" x (Sonderby et al. 2016); "cosine" (1 - cos(pi x)) / 2;
    "cyclical" has `cycles` cycles of equal length, each of which rises linearly from 0 to 1 over its first half and
    stays there (Fu et al. 2019, with R = 0.5). From x = 1 on, all are 1.

    Args:
        schedule: one of `KL_SCHEDULES`.
        step: how many steps of the optimizer are done: a number or a tensor, also one within a graph.
        warmup_steps: in steps of the optimizer; 0 for none.
        cycles: of "cyclical", 1 or more.

    Raises:
        InputError: on an unknown schedule, negative `warmup_steps`, and less than one cycle.
    """
    _one_of("schedule", schedule, KL_SCHEDULES)
    if warmup_steps < 0 or cycles < 1:
        raise InputError(
            "the KL schedule needs warmup_steps of 0 or more and cycles of 1 or more. "
            f"Received: warmup_steps={warmup_steps}, cycles={cycles}"
        )
    step = ops.cast(step, "float32")
    if schedule == "constant" or not warmup_steps:
        return ops.ones_like(step)
    done = ops.minimum(step / warmup_steps, 1.0)
    if schedule == "cosine":
        return 0.5 * (1.0 - ops.cos(math.pi * done))
    if schedule == "cyclical":
        # step times cycles is a whole number, so that cycles begin where they should
        rise = 2.0 * ops.mod(step * cycles / warmup_steps, 1.0)
        return ops.where(done < 1.0, ops.minimum(rise, 1.0), 1.0)
    return done


def kl_by_channel(mean, logvar):
    """KL of N(mean, exp(logvar)) from N(0, 1), in nats a latent value: (B, h, w, C) both -> (B, C), means over places.

    `model.vae.kl_divergence` of each latent value.
    """
    mean, logvar = _floats(mean, logvar)
    return ops.mean(kl_divergence(mean, logvar), axis=(1, 2))


def free_bits(kl, least):
    """The mean over channels of max(kl, least), (B, C) -> (B,): a channel below `least` is not pressed further.

    Kingma et al. 2016, appendix C.8, with channels for groups. There the maximum is of a mean over the batch, here of
    each sample's, which so does not depend on the others in its batch.

    Args:
        kl: from `kl_by_channel`, nats a latent value (B, C).
        least: nats a latent value that each channel has free; 0 leaves the KL as it is.
    """
    (kl,) = _floats(kl)
    return ops.mean(ops.maximum(kl, least), axis=-1)


# Adversarial


def generator_loss(kind, logits_fake):
    """What the autoencoder minimises of the logits of its pictures, means over patches: (B, h, w, 1) -> (B,).

    "hinge" and "vanilla" -f (Lim & Ye 2017; both so in Esser et al. 2021); "non-saturating" log(1 + e^-f) (Goodfellow
    et al. 2014, section 3).
    """
    _one_of("kind", kind, ADVERSARIAL)
    (fake,) = _floats(logits_fake)
    return _sample_mean(ops.softplus(-fake) if kind == "non-saturating" else -fake)


def discriminator_loss(kind, logits_real, logits_fake):
    """What the discriminator minimises, means over patches: (B, h, w, 1) both -> (B,).

    "hinge" (max(0, 1 - r) + max(0, 1 + f)) / 2 (Lim & Ye 2017); "vanilla" (log(1 + e^-r) + log(1 + e^f)) / 2; both with
    the half of Esser et al. 2021. "non-saturating" log(1 + e^-r) + log(1 + e^f), the cross-entropy of Goodfellow et al.
    2014.
    """
    _one_of("kind", kind, ADVERSARIAL)
    real, fake = _floats(logits_real, logits_fake)
    if kind == "hinge":
        return 0.5 * (_sample_mean(ops.relu(1.0 - real)) + _sample_mean(ops.relu(1.0 + fake)))
    entropy = _sample_mean(ops.softplus(-real)) + _sample_mean(ops.softplus(fake))
    return 0.5 * entropy if kind == "vanilla" else entropy


def adaptive_weight(norm_reconstruction, norm_adversarial, limit=1e4):
    """The weight of the adversarial loss by which its gradient is as large as the reconstruction's: a scalar.

    lambda = |grad L_rec| / (|grad L_adv| + 1e-4), at most `limit`, both gradients with respect to the kernel of the
    decoder's last layer (Esser et al. 2021, equation 7; the constant and the limit are of their code). A constant, as
    far as gradients go.

    Args:
        norm_reconstruction: norm of the gradient of the reconstruction loss, the perceptual one included.
        norm_adversarial: norm of the gradient of `generator_loss`.
        limit: the largest weight.
    """
    numerator, denominator = _floats(norm_reconstruction, norm_adversarial)
    return ops.stop_gradient(ops.clip(numerator / (denominator + 1e-4), 0.0, limit))


def lecam(mean_real, mean_fake, average_real, average_fake):
    """How far logits are from the others' running average: (B,) -> (B,); it holds the discriminator back.

    (r - a_fake)^2 + (f - a_real)^2 (Tseng et al. 2021, section 3; their code drops the terms of r < a_fake and of
    f > a_real). No gradient goes through the averages.

    Args:
        mean_real, mean_fake: each sample's mean over patches of its logits, (B,).
        average_real, average_fake: scalars, moved by `lecam_average`.
    """
    real, fake, average_real, average_fake = _floats(mean_real, mean_fake, average_real, average_fake)
    to_fake = ops.square(real - ops.stop_gradient(average_fake))
    return to_fake + ops.square(fake - ops.stop_gradient(average_real))


def lecam_average(average, mean, decay=0.99):
    """The running average after a step, decay * average + (1 - decay) * mean: scalars, `mean` of a batch's logits."""
    average, mean = _floats(average, mean)
    return ops.stop_gradient(decay * average + (1.0 - decay) * mean)


def r1(gradient):
    """The squared norm of each sample's gradient, (B, H, W, 3) -> (B,), to be weighed by gamma / 2.

    R1 of Mescheder et al. 2018, equation 9, is gamma / 2 E |grad D(x)|^2 over real x.

    Args:
        gradient: by real pixels, of D(x), each sample's mean over patches of its logits, summed over the batch.
    """
    (gradient,) = _floats(gradient)
    return ops.sum(ops.square(gradient), axis=tuple(range(1, len(gradient.shape))))


def logit_gap(logits_real, logits_fake):
    """How much higher real pictures score, means over patches: (B, h, w, 1) both -> (B,); 0 where it cannot tell."""
    real, fake = _floats(logits_real, logits_fake)
    return _sample_mean(real) - _sample_mean(fake)
