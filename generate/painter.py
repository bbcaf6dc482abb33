"""Drawing with networks in memory: what a request may ask for, and `Painter`, which draws it batch by batch."""

import functools
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from tqdm import tqdm

import parallel
from config import Config
from diffusion.guidance import guide, inpaint
from diffusion.samplers import SAMPLERS, STOCHASTIC
from diffusion.times import last_times, sampling_times
from input_pipeline import to_pixels

ALWAYS = (0.0, 1.0)  # the interval of all diffusion times
NOISE_KEY = 0x6E6F6973  # tells the noise of pictures from every other stateless draw


class Drawing(NamedTuple):
    """How pictures are drawn, as the keywords of `Painter.draw` and of `generate`.

    Args:
        steps: sampler steps.
        guidance: strength of classifier-free guidance; 1 is off.
        interval: (least, most) diffusion time to guide at.
        sampler: one of `diffusion.samplers.SAMPLERS`.
        spacing: of its times, see `diffusion.times.sampling_times`.
        negative: what guidance leads away from: int32 (T,), and to `generate` a str; None is the empty text.
        rescale: share of the spread that guidance adds which is taken back, see `diffusion.guidance.guide`.
        picture: uint8 (H, W, 3), that drawing begins with, or None.
        strength: share of the steps that are made, from the picture with the noise of the first of them; 1 begins
            with noise alone.
        area: float32 (H, W), how much of each pixel of the picture is drawn anew, 0 to 1; None is all of it.
    """

    steps: int = 20
    guidance: float = 2.5
    interval: tuple[float, float] = ALWAYS
    sampler: str = "ddim"
    spacing: str = "uniform"
    negative: np.ndarray | str | None = None
    rescale: float = 0.0
    picture: np.ndarray | None = None
    strength: float = 1.0
    area: np.ndarray | None = None


def drawing(config: Config, **given) -> dict:
    """How a run draws, as keywords of `Painter.draw`: its own settings, but for those that are given and not None."""
    judged = config.evaluation
    own = {name: getattr(judged, name) for name in ("steps", "guidance", "sampler", "spacing")}
    own["interval"] = judged.guidance_interval
    return own | {name: value for name, value in given.items() if value is not None}


class Painter:
    """Draws pictures with networks in memory; each sampler is compiled once, at its first use.

    Args:
        networks: see `Networks`.
        image_size: side of the pictures in pixels.
        batch_size: pictures drawn at once; it changes speed and memory, not the pictures.
    """

    def __init__(self, networks, image_size, batch_size=16):
        self.networks, self.batch_size = networks, batch_size
        self.image_size, self.latent_shape = image_size, networks.vae.latent_shape(image_size)
        length = networks.vocabulary.length
        text = [tf.TensorSpec([None, length], tf.int32), tf.TensorSpec([None, length], tf.bool)]
        self._signature = [
            *(text + text),
            tf.TensorSpec([None], tf.int64),
            tf.TensorSpec([None], tf.float32),
            tf.TensorSpec([], tf.float32),
            tf.TensorSpec([2], tf.float32),
            tf.TensorSpec([], tf.float32),
        ]
        self._picture = tf.TensorSpec([image_size, image_size, 3], tf.uint8)
        self._area = tf.TensorSpec([image_size, image_size], tf.float32)
        self._compiled = {}
        self._denoised = tf.function(self._predict)  # traced once, for both cases within and without guidance

    def draw(self, tokens, seeds, progress=None, **settings):
        """Draws one picture a row, lazily.

        Args:
            tokens: int32 (N, T) ids of the vocabulary.
            seeds: N whole numbers; a picture depends on its own seed and tokens only.
            progress: a label for a progress bar, or None.
            settings: see `Drawing`.

        Yields:
            uint8 (H, W, 3), N of them.
        """
        asked = Drawing(**settings)
        tokens, seeds = np.asarray(tokens, "int32"), np.asarray(seeds, "int64")
        times = last_times(sampling_times(self.networks.process, asked.steps, asked.spacing), asked.strength)
        vocabulary = self.networks.vocabulary
        negative = vocabulary.empty() if asked.negative is None else asked.negative
        other = np.broadcast_to(negative, tokens.shape)
        begun, masked = asked.picture is not None and asked.strength < 1, asked.area is not None
        guided, within = asked.guidance != 1, tuple(asked.interval) != ALWAYS
        draw = self.compiled(
            asked.sampler,
            guided,
            within=guided and within,
            rescaled=asked.rescale != 0,
            begun=begun,
            masked=masked,
        )
        numbers = [times, asked.guidance, asked.interval, asked.rescale]
        numbers += [asked.picture] * (begun or masked) + [asked.area] * masked
        silent = None if progress else True  # None: silent where standard error is no terminal
        with tqdm(total=len(tokens), desc=progress, unit="picture", leave=False, disable=silent) as bar:
            for start in range(0, len(tokens), self.batch_size):
                rows = slice(start, start + self.batch_size)
                text = [part for own in (tokens[rows], other[rows]) for part in (own, vocabulary.mask(own))]
                yield from np.asarray(draw(*text, seeds[rows], *numbers))
                bar.update(len(tokens[rows]))

    def compiled(self, sampler, guided, *, within=False, rescaled=False, begun=False, masked=False):
        """The drawing of a batch as one `tf.function`, which serves every batch size and number of steps."""
        kind = sampler, guided, within, rescaled, begun, masked
        if kind not in self._compiled:
            draw = functools.partial(
                self._draw, sampler=sampler, guided=guided, within=within, rescaled=rescaled, begun=begun
            )
            more = [self._picture] * (begun or masked) + [self._area] * masked
            self._compiled[kind] = tf.function(draw, input_signature=self._signature + more)
        return self._compiled[kind]

    def _predict(self, x, t, weights, text):
        """The predicted clean latents (B, h, w, C), each of its own time (B,), by the U-Net with those weights.

        See `UNet.project_text` for the text.
        """
        _, _, unet, process, _ = self.networks
        with keras.StatelessScope(list(zip(unet.variables, weights))):
            predicted = unet.predict_from(process.scaled(x, t), t, text)
        return process.denoised(predicted, x, t)

    def _draw(self, tokens, mask, other, other_mask, seeds, *settings, **kind):
        def draw(*rows):
            return self._draw_part(*rows, *settings, **kind)

        rows = [tokens, mask, other, other_mask, seeds]
        return parallel.joined(draw, rows, [self.image_size, self.image_size, 3], "uint8")

    def _draw_part(
        self,
        tokens,
        mask,
        other,
        other_mask,
        seeds,
        times,
        guidance,
        interval,
        rescale,
        picture=None,
        area=None,
        *,
        sampler,
        guided,
        within,
        rescaled,
        begun,
    ):
        vae, text_encoder, unet, process, _ = self.networks
        # Read before the sampler's loop: where that reads variables, the parts of a batch wait for one another.
        weights = [tf.convert_to_tensor(weight.value) for weight in unet.variables]

        def denoiser(text):
            return lambda x, t: self._denoised(x, ops.broadcast_to(t, ops.shape(x)[:1]), weights, text)

        context = text_encoder([tokens, mask])
        if guided:
            context = ops.concatenate([context, text_encoder([other, other_mask])], axis=0)
            mask = ops.concatenate([mask, other_mask], axis=0)
        text = unet.project_text(context, mask)  # before the loop too: once for all its steps

        def step_noise(k):
            return noise_of(seeds, self.latent_shape, k + 1)

        known = None if picture is None else vae.encode(to_pixels(picture)[None])[0]
        noise = process.start(noise_of(seeds, self.latent_shape), times[0], known if begun else None)
        denoise = denoiser(text)
        if guided:
            alone = denoiser(tf.nest.map_structure(lambda rows: rows[: ops.shape(seeds)[0]], text))
            rescale = rescale if rescaled else 0.0
            denoise = guide(denoise, guidance, rescale, tf.unstack(interval) if within else None, alone)
        if area is not None:
            denoise = inpaint(denoise, known, latent_area(area, vae.factor))
        if sampler in STOCHASTIC:
            draw = functools.partial(SAMPLERS[sampler], step_noise=step_noise)
        else:
            draw = SAMPLERS[sampler]
        latents = draw(denoise, noise, times, process.rates)
        images = to_images(vae.decode(latents))
        return images if area is None else blended(picture, images, area)


def latent_area(area, factor):
    """The area (H, W) to draw anew, 0 to 1, as that of latents, (1, h, w, 1): the most of each one's pixels."""
    return ops.max_pool(area[None, ..., None], factor, strides=factor)


def blended(picture, images, area):
    """The picture (H, W, 3) with each of the images (B, H, W, 3) in its place, as far as the area (H, W) says."""
    area, picture, images = area[..., None], ops.cast(picture, "float32"), ops.cast(images, "float32")
    return ops.cast(ops.round(picture + area * (images - picture)), "uint8")


def noise_of(seeds, shape, number=0):
    """Standard normal noise (B, *shape), each sample from its own seed; seeds int64 (B,).

    The number is 0 for the noise that a picture starts from, and k + 1 for what its sampler's step k draws anew.
    """
    own_key = NOISE_KEY + tf.cast(number, tf.int64) * 2**32

    def one(seed):
        return tf.random.stateless_normal(shape, tf.stack([seed, own_key]))

    return tf.map_fn(one, tf.cast(seeds, tf.int64), fn_output_signature=tf.TensorSpec(shape, tf.float32))


def to_images(pixels):
    """Pixels (B, H, W, 3) in -1..1 -> images uint8, rounded."""
    return ops.cast(ops.round(ops.clip(ops.cast(pixels, "float32") * 127.5 + 127.5, 0.0, 255.0)), "uint8")
