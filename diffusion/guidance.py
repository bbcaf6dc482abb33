"""Wrappers of `denoise`, each a `denoise` again: guidance, thresholding and inpainting; and ways between two samples.

They act on predicted clean latents (B, h, w, C), so they hold for every schedule, target and sampler.
"""

from keras import ops

from diffusion._checks import within

AXES = (1, 2, 3)  # of a sample


def guide(denoise_pair, guidance, rescale=0.0, interval=None, denoise=None):
    """Classifier-free guidance: unconditional + guidance * (conditional - unconditional) (Ho & Salimans 2022).

    Args:
        denoise_pair: like `denoise`, over a batch of twice the size: the first half with its context, the second with
            none, or with a negative prompt's.
        guidance: scalar; 1 is the conditional prediction itself, larger follows the context more strongly.
        rescale: how far each sample of the result gets back the standard deviation of the conditional prediction (Lin
            et al. 2023, section 3.4; 0.7 there).
        interval: (least, most) time to guide at; elsewhere guidance is 1 (Kynkäänniemi et al. 2024).
        denoise: `denoise` over the single batch with its context, for the times elsewhere, at half the cost; without it
            the pair serves.

    Returns a `denoise` over the single batch. Raises ValueError on a number that is NaN or out of range.
    """

    def both(x, t):
        return ops.split(denoise_pair(ops.concatenate([x, x], axis=0), t), 2, axis=0)

    return _guided(both, denoise or (lambda x, t: both(x, t)[0]), guidance, rescale, interval)


def autoguide(denoise, weak, guidance, rescale=0.0, interval=None):
    """`guide` away from `weak`, a worse model of the same data: smaller, or trained less (Karras et al. 2024)."""
    return _guided(lambda x, t: (denoise(x, t), weak(x, t)), denoise, guidance, rescale, interval)


def _guided(both, alone, guidance, rescale, interval):
    within("guidance", guidance, -1e6, 1e6)
    within("rescale", rescale, 0, 1)
    for edge in interval or ():
        within("guidance interval", edge, 0, 1)

    def guided(x, t):
        wanted, other = both(x, t)
        led = other + guidance * (wanted - other)
        if isinstance(rescale, (int, float)) and not rescale:
            return led
        ratio = ops.std(wanted, axis=AXES, keepdims=True) / ops.std(led, axis=AXES, keepdims=True)
        return led * (rescale * ratio + (1.0 - rescale))

    if interval is None:
        return guided

    def guided_within(x, t):
        inside = ops.logical_and(t >= interval[0], t <= interval[1])
        return ops.cond(inside, lambda: guided(x, t), lambda: alone(x, t))

    return guided_within


def threshold(denoise, share=0.995, limit=1.0):
    """Dynamic thresholding (Saharia et al. 2022, section 2.3), against strong guidance that saturates a sample.

    It cuts a sample's magnitudes at their quantile `share`, and shrinks all until that is `limit`, the largest of the
    data: 1 for pixels. Latents have no such bound; 3 to 4 of their deviations are near.
    """
    within("share", share, 0, 1)
    within("limit", limit, 1e-3, 1e3)

    def thresholded(x, t):
        clean = denoise(x, t)
        largest = ops.maximum(ops.quantile(ops.abs(clean), share, axis=AXES, keepdims=True), limit)
        return ops.clip(clean, -largest, largest) * (limit / largest)

    return thresholded


def inpaint(denoise, latents, mask):
    """Draws only where `mask` (B or 1, h, w, 1) is 1: where it is 0 the prediction is the known `latents` (B, h, w, C).

    So any sampler keeps those, at each time with that time's noise, and ends with themselves. Raises ValueError on a
    mask of another size.
    """
    expected = (*latents.shape[1:3], 1)
    if len(mask.shape) != 4 or tuple(mask.shape[1:]) != expected:
        raise ValueError(
            f"mask must be of shape (B, {', '.join(map(str, expected))}). Received: {tuple(mask.shape)}"
        )
    return lambda x, t: mask * denoise(x, t) + (1.0 - mask) * latents


def lerp(start, end, share):
    """The point at `share` of the straight way, for two contexts."""
    return (1.0 - share) * start + share * end


def slerp(start, end, share):
    """The point at `share` of the arc, for two noises (B, h, w, C), which keeps their norm (Shoemake 1985)."""
    norms = ops.sqrt(ops.sum(start**2, axis=AXES, keepdims=True) * ops.sum(end**2, axis=AXES, keepdims=True))
    cosine = ops.clip(ops.sum(start * end, axis=AXES, keepdims=True) / norms, -1.0, 1.0)
    angle = ops.arccos(cosine)
    arc = (ops.sin((1.0 - share) * angle) * start + ops.sin(share * angle) * end) / ops.sin(angle)
    return ops.where(ops.abs(cosine) > 0.9999, lerp(start, end, share), arc)
