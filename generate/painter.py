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
from diffusion.guidance import autoguide, guide, inpaint, slerp, threshold
from diffusion.samplers import SAMPLERS, STOCHASTIC, evaluations, step_by_step
from diffusion.times import last_times, sampling_times
from generate.ways import Way, mixed
from input_pipeline import to_pixels

ALWAYS = (0.0, 1.0)  # the interval of all diffusion times
NOISE_KEY = 0x6E6F6973  # tells the noise of pictures from every other stateless draw


class Drawing(NamedTuple):
    """How pictures are drawn, as the keywords of `Painter.draw` and of `generate`.

    Args:
        steps: sampler steps.
        guidance: strength of classifier-free guidance; 1 is off.
        interval: (least, most) diffusion time to guide at.
        autoguidance: how far the prediction so guided is then led away, at all times, from that of the weak networks
            without guidance; 1 is off. Without weak networks it is led away from the networks' own prediction, which
            only multiplies what guidance adds.
        sampler: one of `diffusion.samplers.SAMPLERS`.
        spacing: of its times, see `diffusion.times.sampling_times`.
        negative: what guidance leads away from: int32 (T,), and to `generate` a str; None is the empty text.
        rescale: share of the spread that guidance adds which is taken back, see `diffusion.guidance.guide`.
        threshold: the quantile of its magnitudes that each prediction is cut at, above 0 and below 1, see
            `diffusion.guidance.threshold`; None is off.
        threshold_limit: the magnitude below which nothing is cut, in standard deviations of the latents.
        picture: uint8 (H, W, 3), that drawing begins with, or None.
        strength: share of the steps that are made, from the picture with the noise of the first of them; 1 begins
            with noise alone.
        area: float32 (H, W), how much of each pixel of the picture is drawn anew, 0 to 1; None is all of it.
    """

    steps: int = 20
    guidance: float = 2.5
    interval: tuple[float, float] = ALWAYS
    autoguidance: float = 1.0
    sampler: str = "ddim"
    spacing: str = "uniform"
    negative: np.ndarray | str | None = None
    rescale: float = 0.0
    threshold: float | None = None
    threshold_limit: float = 3.0
    picture: np.ndarray | None = None
    strength: float = 1.0
    area: np.ndarray | None = None


def drawing(config: Config, **given) -> dict:
    """How a run draws, as keywords of `Painter.draw`: its own settings, but for those that are given and not None."""
    judged = config.evaluation
    names = ("steps", "guidance", "autoguidance", "sampler", "spacing")
    own = {name: getattr(judged, name) for name in names}
    own["interval"] = judged.guidance_interval
    return own | {name: value for name, value in given.items() if value is not None}


class Kind(NamedTuple):
    """What a graph of drawing is made for; all else are its inputs."""

    sampler: str
    guided: bool
    within: bool = False  # only at some times
    rescaled: bool = False
    away: bool = False  # from weaker networks
    thresholded: bool = False
    begun: bool = False  # from the latents of a picture
    masked: bool = False
    led: bool = False  # to another prompt
    turned: bool = False  # to another seed

    @classmethod
    def of(cls, asked: Drawing, way: Way | None):
        """The kind that such a drawing is of."""
        guided = asked.guidance != 1
        return cls(
            asked.sampler,
            guided,
            within=guided and tuple(asked.interval) != ALWAYS,
            rescaled=asked.rescale != 0,
            away=asked.autoguidance != 1,
            thresholded=asked.threshold is not None,
            begun=asked.picture is not None and asked.strength < 1,
            masked=asked.area is not None,
            led=way is not None and way.tokens is not None,
            turned=way is not None and way.seeds is not None,
        )

    @property
    def rows(self):
        """Names of the inputs that have a row a picture."""
        names = ["own", "other", "seeds"] + ["to"] * self.led + ["to_seeds"] * self.turned
        return names + ["shares"] * (self.led or self.turned)

    @property
    def shared(self):
        """Names of the inputs that all pictures share."""
        names = ["times", "guidance", "interval", "rescale"] + ["autoguidance"] * self.away
        names += ["threshold", "threshold_limit"] * self.thresholded
        return names + ["picture"] * (self.begun or self.masked) + ["area"] * self.masked


class Painter:
    """Draws pictures with networks in memory; each sampler is compiled once, at its first use.

    Args:
        networks: see `Networks`.
        image_size: side of the pictures in pixels.
        batch_size: pictures drawn at once; it changes speed and memory, not the pictures.
    """

    def __init__(self, networks, image_size, batch_size=16):
        self.batch_size = batch_size
        self.image_size, self.latent_shape = image_size, networks.vae.latent_shape(image_size)
        length, spec = networks.vocabulary.length, tf.TensorSpec
        text = spec([None, length], tf.int32), spec([None, length], tf.bool)
        seeds, times, number = spec([None], tf.int64), spec([None], tf.float32), spec([], tf.float32)
        self._row_specs = {"own": text, "other": text, "to": text}
        self._row_specs |= {"seeds": seeds, "to_seeds": seeds, "shares": times}
        self._shared_specs = {"times": times, "interval": spec([2], tf.float32)}
        self._shared_specs |= dict.fromkeys(["guidance", "rescale", "autoguidance"], number)
        self._shared_specs |= dict.fromkeys(["threshold", "threshold_limit"], number)
        self._shared_specs["picture"] = spec([image_size, image_size, 3], tf.uint8)
        self._shared_specs["area"] = spec([image_size, image_size], tf.float32)
        self._latents, self._times = spec([None, *self.latent_shape], tf.float32), times
        self._networks = None
        self.networks = networks

    @property
    def networks(self):
        """The `Networks` that draw. Every sampler is compiled anew for other ones, but not for other weights."""
        return self._networks

    @networks.setter
    def networks(self, networks):
        if networks is self._networks:
            return
        self._networks, self._compiled = networks, {}
        # Traced once, for all kinds of drawing, also step by step.
        self._decoded = tf.function(self._decode, input_signature=[self._latents], autograph=False)
        self._denoised = {}  # by the U-Net's settings

    def draw(self, tokens, seeds, progress=None, way=None, on_step=None, **settings):
        """Draws one picture a row, lazily.

        Args:
            tokens: int32 (N, T) ids of the vocabulary.
            seeds: N whole numbers; a picture depends on its own seed and tokens only.
            progress: a label for a progress bar, or None.
            way: a `Way` to other tokens or seeds, or None.
            on_step: function (first, k, count, images), called after each evaluation k < count of the sampler with how
                the pictures from row `first` on look by then, uint8 (B, H, W, 3): their predicted clean latents, and
                at last themselves. The steps are then made one by one, not in one compiled loop, with the same
                pictures within a grey level. None is no such function.
            settings: see `Drawing`.

        Yields:
            uint8 (H, W, 3), N of them.
        """
        asked = Drawing(**settings)
        kind = Kind.of(asked, way)
        rows, shared = self._rows(kind, tokens, seeds, asked.negative, way), self._shared(kind, asked)
        silent = None if progress else True  # None: silent where standard error is no terminal
        with tqdm(total=len(seeds), desc=progress, unit="picture", leave=False, disable=silent) as bar:
            for first in range(0, len(seeds), self.batch_size):
                batch = tf.nest.map_structure(lambda row, i=first: row[i : i + self.batch_size], rows)
                if on_step is None:
                    images = self.compiled(*kind)(batch, shared)
                else:
                    images = self._draw_steps(batch, shared, kind, functools.partial(on_step, first))
                yield from np.asarray(images)
                bar.update(len(images))

    def measure(self, kid, tokens, **settings):
        """KID of a picture for each of `tokens` (N, T), of seeds 0, 1, ...: other weights draw from the same noise.

        Args:
            kid: a `metrics.KID` that has its real features.
            tokens, settings: see `draw`.

        Returns:
            metrics.Estimate.
        """
        kid.reset_state()
        images = self.draw(tokens, np.arange(len(tokens)), progress="drawing for KID", **settings)
        kid.update_state(None, np.stack(list(images)))
        return kid.estimate()

    def _rows(self, kind, tokens, seeds, negative, way):
        """The inputs of a kind of drawing that have a row a picture, as arrays by their names."""
        vocabulary, way = self.networks.vocabulary, way or Way(None)
        tokens = np.asarray(tokens, "int32")
        other = np.broadcast_to(vocabulary.empty() if negative is None else negative, tokens.shape)
        texts = {"own": tokens, "other": other, "to": way.tokens}
        seeds = {"seeds": seeds, "to_seeds": way.seeds}
        rows = {name: np.asarray(ids, "int32") for name, ids in texts.items() if name in kind.rows}
        rows = {name: (ids, vocabulary.mask(ids)) for name, ids in rows.items()}
        rows |= {name: np.asarray(own, "int64") for name, own in seeds.items() if name in kind.rows}
        return rows | ({"shares": np.asarray(way.shares, "float32")} if "shares" in kind.rows else {})

    def _shared(self, kind, asked):
        """The inputs of a kind of drawing that all pictures share, as tensors by their names."""
        times = sampling_times(self.networks.process, asked.steps, asked.spacing)
        values = asked._asdict() | {"times": last_times(times, asked.strength)}
        return {
            name: tf.convert_to_tensor(values[name], self._shared_specs[name].dtype) for name in kind.shared
        }

    def compiled(self, *kind, **kinds):
        """The drawing of a batch of a `Kind`, by its fields, as one `tf.function` for all batch sizes and steps."""
        kind = Kind(*kind, **kinds)
        if kind not in self._compiled:
            signature = [
                {name: specs[name] for name in names}
                for specs, names in ((self._row_specs, kind.rows), (self._shared_specs, kind.shared))
            ]
            draw = functools.partial(self._draw, kind=kind)
            self._compiled[kind] = tf.function(draw, input_signature=signature, autograph=False)
        return self._compiled[kind]

    def _predict(self, unet, x, t, weights, text):
        """The predicted clean latents (B, h, w, C), each of its own time (B,), by a U-Net with those weights.

        See `UNet.project_text` for the text.
        """
        process = self.networks.process
        with keras.StatelessScope(list(zip(unet.predicting_variables, weights, strict=True))):
            predicted = unet.predict_from(process.scaled(x, t), t, text)
        return process.denoised(predicted, x, t)

    def _ask(self, unet, x, t, weights, text):
        """`_predict` at one time, in the one graph of it, which all U-Nets of one shape share."""
        shape = repr(unet.get_config())
        if shape not in self._denoised:
            specs = tf.nest.map_structure(
                lambda part: tf.TensorSpec([None, *part.shape[1:]], part.dtype), text
            )
            weight_specs = [tf.TensorSpec(weight.shape, weight.dtype) for weight in weights]
            predict = functools.partial(self._predict, unet)
            signature = [self._latents, self._times, weight_specs, specs]
            self._denoised[shape] = tf.function(predict, input_signature=signature, autograph=False)
        return self._denoised[shape](x, ops.broadcast_to(t, ops.shape(x)[:1]), weights, text)

    def _decode(self, latents):
        return to_images(self.networks.vae.decode(latents))

    def _draw(self, rows, shared, kind):
        def draw(*parts):
            return self._draw_part(tf.nest.pack_sequence_as(rows, parts), shared, kind)

        return parallel.joined(draw, tf.nest.flatten(rows), [self.image_size, self.image_size, 3], "uint8")

    def _draw_steps(self, rows, shared, kind, on_step):
        """`_draw` step by step, in Python but for the networks."""

        def note(k, count, images):
            if k + 1 < count:  # the last prediction is not yet the picture, for samplers that mix several
                on_step(k, count, images.numpy())

        images = self._draw_part(rows, shared, kind, note).numpy()
        count = evaluations(kind.sampler, len(shared["times"]) - 1)
        on_step(count - 1, count, images)
        return images

    def _draw_part(self, rows, shared, kind, note=None):
        """Draws the rows, in one loop of the graph, or step by step with note(k, count, images) after each."""
        vae, process, times = self.networks.vae, self.networks.process, shared["times"]
        known = vae.encode(to_pixels(shared["picture"])[None])[0] if "picture" in shared else None
        noise, denoise = noise_of(rows["seeds"], self.latent_shape), self._denoiser(rows, shared, kind)
        if kind.turned:
            noise = slerp(noise, noise_of(rows["to_seeds"], self.latent_shape), _of_samples(rows["shares"]))
        if kind.masked:
            denoise = inpaint(denoise, known, latent_area(shared["area"], vae.factor))

        def step_noise(k):
            return noise_of(rows["seeds"], self.latent_shape, k + 1)

        def shown(latents):
            images = self._decoded(latents)
            return blended(shared["picture"], images, shared["area"]) if kind.masked else images

        own = {"step_noise": step_noise} if kind.sampler in STOCHASTIC else {}
        if note is not None:
            own["loop"] = functools.partial(
                step_by_step, callback=lambda k, count, clean: note(k, count, shown(clean))
            )
        noise = process.start(noise, times[0], known if kind.begun else None)
        return shown(SAMPLERS[kind.sampler](denoise, noise, times, process.rates, **own))

    def _denoiser(self, rows, shared, kind):
        """`denoise` for the prompts of the rows, with the guidance of that kind."""
        asking = self._asking(self.networks, rows)
        share = _of_samples(rows["shares"]) if kind.led else None

        def wanted(asking):  # by one model, without guidance
            return mixed(asking("own", "to"), share) if kind.led else asking("own")

        rescale = shared["rescale"] if kind.rescaled else 0.0
        guidance = shared["guidance"], rescale, tf.unstack(shared["interval"]) if kind.within else None
        denoise = wanted(asking)
        if kind.guided and kind.led:
            # What guidance leads to is no single context here, so it takes two denoisers, not a pair in one batch.
            denoise = autoguide(denoise, asking("other"), *guidance)
        elif kind.guided:
            denoise = guide(asking("own", "other"), *guidance, denoise)
        if kind.away:
            weak = wanted(self._asking(self.networks.weak or self.networks, rows))
            denoise = autoguide(denoise, weak, shared["autoguidance"])
        if kind.thresholded:
            denoise = threshold(denoise, shared["threshold"], shared["threshold_limit"])
        return denoise

    def _asking(self, networks, rows):
        """A function from names of texts, one or more, to a `denoise` by these networks over a batch that many times
        as large. What a U-Net makes of a text is made here, before the sampler's loop."""
        text_encoder, unet = networks.text_encoder, networks.unet
        # Read before the loop too: where that reads variables, the parts of a batch wait for one another.
        weights = [tf.convert_to_tensor(weight.value) for weight in unet.predicting_variables]

        @functools.cache
        def projected(name):
            return unet.project_text(text_encoder(list(rows[name])), rows[name][1])

        def asking(*names):
            texts = [projected(name) for name in names]
            text = tf.nest.map_structure(lambda *parts: ops.concatenate(parts, axis=0), *texts)
            return lambda x, t: self._ask(unet, x, t, weights, text)

        return asking


def _of_samples(shares):
    """Shares (B,) beside latents (B, h, w, C)."""
    return shares[:, None, None, None]


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
