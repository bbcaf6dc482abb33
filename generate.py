"""The one way to get an image: prompts -> images, as an iterable over networks in memory.

The command line, previews in training, evaluation and the web page all call it.
"""

import functools
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from keras import ops
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from tqdm import tqdm

import parallel
from checkpoint import RunFolder, assign, named_variables
from config import Config, check_interval, check_sampling, from_dict, part
from diffusion.guidance import guide, inpaint
from diffusion.samplers import SAMPLERS, STOCHASTIC
from diffusion.schedule import Process
from diffusion.times import last_times, sampling_times
from errors import InputError
from files import atomic_file
from input_pipeline import RARE, Vocabulary, read_pictures, to_pixels
from model.text_encoder import VocabularyEncoder
from model.unet import UNet
from model.vae import AutoencoderKL

ALWAYS = (0.0, 1.0)  # the interval of all diffusion times
STRENGTH = 0.6  # of drawing from a picture, where none is given: its layout stays, its details change
NOISE_KEY = 0x6E6F6973  # tells the noise of pictures from every other stateless draw


class Networks(NamedTuple):
    """All that drawing needs: the three networks, the process, and the words."""

    vae: AutoencoderKL
    text_encoder: VocabularyEncoder
    unet: UNet
    process: Process
    vocabulary: Vocabulary


class Picture(NamedTuple):
    """A drawn picture, uint8 (H, W, 3), and what it was drawn from."""

    image: np.ndarray
    prompt: str
    seed: int


def make_vae(config: Config) -> AutoencoderKL:
    """The autoencoder that a config describes, with new weights."""
    return AutoencoderKL(**part(config.vae))


def make_diffusion(config: Config, vocabulary: Vocabulary) -> tuple[UNet, VocabularyEncoder]:
    """The U-Net and text encoder that a config describes, with new weights."""
    text_encoder = VocabularyEncoder(vocabulary.size, vocabulary.length, **part(config.text_encoder))
    unet = UNet(config.vae.latent_channels, context_shape=text_encoder.context_shape, **part(config.unet))
    return unet, text_encoder


def load(path) -> tuple[Networks, Config]:
    """The networks of a run, with the best checkpoint's averaged weights, or the newest where none is best yet.

    Args:
        path: the run's folder.

    Raises:
        InputError: no run folder, or nothing trained in it yet.
    """
    run = RunFolder.read(path)
    config = from_dict(run.config, run=str(path))
    trained_vae = run.finished("vae")
    saved = run.best("diffusion") or run.latest("diffusion")
    if trained_vae is None or saved is None:
        raise InputError(
            f"{path}: received a run that has trained no U-Net yet; expected one with a checkpoint: "
            "give its training command again, which goes on"
        )
    vae, vocabulary = make_vae(config), Vocabulary.load(run.vocabulary_path)
    unet, text_encoder = make_diffusion(config, vocabulary)
    assign(named_variables(vae), trained_vae.tensors, "vae", source=path)
    assign(named_variables(unet), saved.tensors, "ema_unet", source=path)
    assign(named_variables(text_encoder), saved.tensors, "ema_text_encoder", source=path)
    return Networks(vae, text_encoder, unet, Process(**part(config.diffusion)), vocabulary), config


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

    def draw(
        self,
        tokens,
        seeds,
        steps=20,
        guidance=2.5,
        interval=ALWAYS,
        progress=None,
        sampler="ddim",
        spacing="uniform",
        negative=None,
        rescale=0.0,
        picture=None,
        strength=1.0,
        area=None,
    ):
        """Draws one picture a row, lazily.

        Args:
            tokens: int32 (N, T) ids of the vocabulary.
            seeds: N whole numbers; a picture depends on its own seed and tokens only.
            steps: sampler steps.
            guidance: strength of classifier-free guidance; 1 is off.
            interval: (least, most) diffusion time to guide at.
            progress: a label for a progress bar, or None.
            sampler: one of `diffusion.samplers.SAMPLERS`.
            spacing: of its times, see `diffusion.times.sampling_times`.
            negative: int32 (T,), what guidance leads away from; None is the empty text.
            rescale: share of the spread that guidance adds which is taken back, see `diffusion.guidance.guide`.
            picture: uint8 (H, W, 3), that drawing begins with, or None.
            strength: share of the steps that are made, from the picture with the noise of the first of them; 1 begins
                with noise alone.
            area: float32 (H, W), how much of each pixel of the picture is drawn anew, 0 to 1; None is all of it.

        Yields:
            uint8 (H, W, 3), N of them.
        """
        tokens, seeds = np.asarray(tokens, "int32"), np.asarray(seeds, "int64")
        times = last_times(sampling_times(self.networks.process, steps, spacing), strength)
        vocabulary = self.networks.vocabulary
        other = np.broadcast_to(vocabulary.empty() if negative is None else negative, tokens.shape)
        begun, masked = picture is not None and strength < 1, area is not None
        draw = self.compiled(sampler, guidance != 1, rescale != 0, begun, masked)
        settings = [times, guidance, interval, rescale, *[picture] * (begun or masked), *[area] * masked]
        silent = None if progress else True  # None: silent where standard error is no terminal
        with tqdm(total=len(tokens), desc=progress, unit="picture", leave=False, disable=silent) as bar:
            for start in range(0, len(tokens), self.batch_size):
                rows = slice(start, start + self.batch_size)
                text = [part for own in (tokens[rows], other[rows]) for part in (own, vocabulary.mask(own))]
                yield from np.asarray(draw(*text, seeds[rows], *settings))
                bar.update(len(tokens[rows]))

    def compiled(self, sampler, guided, rescaled=False, begun=False, masked=False):
        """The drawing of a batch as one `tf.function`, which serves every batch size and number of steps."""
        kind = sampler, guided, rescaled, begun, masked
        if kind not in self._compiled:
            draw = functools.partial(
                self._draw, sampler=sampler, guided=guided, rescaled=rescaled, begun=begun
            )
            more = [self._picture] * (begun or masked) + [self._area] * masked
            self._compiled[kind] = tf.function(draw, input_signature=self._signature + more)
        return self._compiled[kind]

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
        rescaled,
        begun=False,
    ):
        vae, text_encoder, unet, process, _ = self.networks
        context = text_encoder([tokens, mask])
        if guided:
            context = ops.concatenate([context, text_encoder([other, other_mask])], axis=0)
            mask = ops.concatenate([mask, other_mask], axis=0)

        def denoise(x, t):
            t = ops.broadcast_to(t, ops.shape(x)[:1])
            return process.denoised(unet([process.scaled(x, t), t, context, mask]), x, t)

        def step_noise(k):
            return noise_of(seeds, self.latent_shape, k + 1)

        known = None if picture is None else vae.encode(to_pixels(picture)[None])[0]
        noise = process.start(noise_of(seeds, self.latent_shape), times[0], known if begun else None)
        if guided:
            denoise = guide(denoise, guidance, rescale if rescaled else 0.0, tf.unstack(interval))
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


def generate(painter, prompts, count=1, seed=0, progress=None, negative=None, **settings):
    """Draws `count` pictures of every prompt, lazily; picture k of a prompt has the seed `seed + k`.

    Args:
        painter: a `Painter`.
        prompts: list of str.
        count: pictures a prompt.
        seed, progress: of the first picture of a prompt, and a label for a progress bar, or None.
        negative: a str, what guidance leads away from, or None.
        settings: more keywords of `Painter.draw`.

    Yields:
        Picture.

    Raises:
        InputError: no prompt, an empty one, or a count, a seed or a setting that cannot be.
    """
    _check_request(prompts, count, seed, negative=negative, **settings)
    tokens, _ = painter.networks.vocabulary.encode(prompts)
    if negative is not None:
        settings["negative"] = painter.networks.vocabulary.encode([negative])[0][0]
    seeds = np.tile(seed + np.arange(count), len(prompts))
    images = painter.draw(np.repeat(tokens, count, axis=0), seeds, progress=progress, **settings)
    for index, image in enumerate(images):
        yield Picture(image, prompts[index // count], int(seeds[index]))


def _check_request(
    prompts,
    count,
    seed,
    steps=20,
    guidance=2.5,
    interval=ALWAYS,
    sampler="ddim",
    spacing="uniform",
    negative=None,
    rescale=0.0,
    picture=None,
    strength=1.0,
    area=None,
    flag="",
):
    """Refuses what cannot be drawn; `flag` goes before the names of settings in the message: "--", or nothing."""
    if not prompts:
        raise InputError("prompts: received none, expected at least one")
    for row, prompt in enumerate(prompts):
        if not prompt.strip():
            raise InputError(f"prompts: received an empty text in row {row}, expected words")
    if count < 1:
        raise InputError(f"count: received {count}, expected at least 1")
    if not abs(seed) + count < 2**63:
        raise InputError(f"seed: received {seed}, expected a number of 64 bits")
    if steps < 1:
        raise InputError(f"steps: received {steps}, expected at least 1")
    if not np.isfinite(guidance):
        raise InputError(f"guidance: received {guidance}, expected a finite number")
    check_sampling(flag, sampler, spacing, steps)
    check_interval("--guidance-interval" if flag else "interval", interval)
    if not 0 <= rescale <= 1:
        name = "--guidance-rescale" if flag else "rescale"
        raise InputError(f"{name}: received {rescale}, expected 0 to 1")
    if not 0 < strength <= 1:
        raise InputError(f"{flag}strength: received {strength}, expected more than 0 and at most 1")
    if not round(strength * steps):
        raise InputError(
            f"{flag}strength: received {strength} of {steps} steps, which is none of them; expected more of either"
        )
    if picture is None and (strength != 1 or area is not None):
        raise InputError(
            f"{'strength' if area is None else 'area'}: received without a picture to begin with, expected one"
        )
    if negative is not None and not negative.strip():
        raise InputError(f"{flag}negative: received an empty text, expected words")
    if negative is not None and guidance == 1:
        raise InputError(
            f"{flag}negative: received {negative!r} with a guidance of 1, which is off and leads away from nothing; "
            "expected another guidance"
        )


def write_pictures(
    run,
    prompt=(),
    prompts=None,
    count=1,
    seed=0,
    sampler=None,
    spacing=None,
    steps=None,
    guidance=None,
    guidance_interval=None,
    guidance_rescale=None,
    negative=None,
    init_image=None,
    strength=None,
    mask=None,
    batch_size=16,
    out="pictures",
):
    """Draws pictures with a run and writes them, one PNG each and a captioned `grid.png`.

    Args:
        run: the run's folder.
        prompt: sentences.
        prompts: a text file with a sentence a line, or None.
        count, seed: see `generate`.
        sampler, spacing, steps, guidance, guidance_interval: the sampler, its times and their number, the strength of
            guidance and the times it acts at; None takes the run's.
        guidance_rescale: see `Painter.draw`; None is 0.
        negative: a sentence that guidance leads away from, or None.
        init_image, mask: picture files, see `begun_with`, or None.
        strength: see `Painter.draw`; None is 1 with a mask, `STRENGTH` without.
        batch_size: pictures drawn at once.
        out: folder for the files; it is made.

    Returns:
        The paths of the PNG files, without the grid's.

    Raises:
        InputError: see `load`, `begun_with` and `generate`; or `prompts` cannot be read, or `out` not written.
    """
    if batch_size < 1:
        raise InputError(f"--batch-size: received {batch_size}, expected at least 1")
    texts = [*prompt, *(_read_prompts(prompts) if prompts else ())]
    networks, config = load(run)
    settings = {"sampler": sampler, "spacing": spacing, "steps": steps, "guidance": guidance}
    settings |= {"interval": guidance_interval, "rescale": guidance_rescale, "negative": negative}
    settings = drawing(config, **settings)
    settings |= begun_with(init_image, mask, strength, config.image_size)
    _check_request(texts, count, seed, **settings, flag="--")
    unknown = networks.vocabulary.unknown(texts if negative is None else [*texts, negative])
    if unknown:
        warnings.warn(
            f"{run} was trained without the word{'s' * (len(unknown) != 1)} {', '.join(unknown)}: "
            f"read as {RARE}, any rare word",
            stacklevel=2,
        )
    painter = Painter(networks, config.image_size, batch_size)
    written = _written(settings, init_image=init_image, mask=mask)
    try:
        pictures = generate(painter, texts, count, seed, progress="drawing", **settings)
        paths = _save_all(pictures, Path(out), **written, run=run)
    except OSError as error:
        raise InputError(
            f"--out: received {out}, which cannot be written ({error.strerror}); give another folder"
        ) from error
    print(f"{len(paths)} picture{'s' * (len(paths) != 1)} and grid.png in {Path(out)}")
    return paths


def _save_all(pictures, folder, **settings):
    """Writes each picture as soon as it is drawn, and their grid; returns the paths without the grid's."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, images, captions = [], [], []
    for number, picture in enumerate(pictures):
        paths.append(folder / f"{number:04d}.png")
        save_png(picture, paths[-1], **settings)
        images.append(picture.image)
        captions.append(picture.prompt)
    with atomic_file(folder / "grid.png") as file:
        captioned_grid(images, captions).save(file, "PNG")
    return paths


def begun_with(init_image, mask, strength, image_size):
    """What drawing begins with, as keywords of `Painter.draw`: none, or a picture, a strength and perhaps an area.

    Args:
        init_image: a picture file, resized and cut as for training, or None.
        mask: a picture file of its size, whose white is drawn anew, whose black stays as it is and whose grey is mixed;
            or None.
        strength: see `Painter.draw`, or None.
        image_size: side of the pictures in pixels.

    Raises:
        InputError: a file that is no picture, a mask of another size, or a mask or strength without a picture.
    """
    if init_image is None:
        for flag, value in (("--mask", mask), ("--strength", strength)):
            if value is not None:
                raise InputError(
                    f"{flag}: received {value} without --init-image, expected the picture to begin with"
                )
        return {}
    begun = {"picture": read_pictures([init_image], image_size, progress=False)[0]}
    if mask is None:
        return begun | {"strength": STRENGTH if strength is None else strength}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is grey, as masks are
        white = read_pictures([mask], image_size, progress=False)[0].mean(axis=-1, dtype="float32") / 255.0
    expected, received = _size(init_image), _size(mask)
    if expected != received:
        raise InputError(
            f"--mask: received {mask} of {received} pixels, expected the {expected} of --init-image {init_image}"
        )
    return begun | {"strength": 1.0 if strength is None else strength, "area": white}


def _size(path):
    with Image.open(path) as image:
        return "x".join(map(str, ImageOps.exif_transpose(image).size))


def _written(settings, **files):
    """Keywords of `Painter.draw` by the names of their flags, as a PNG keeps them; pictures by the names of `files`."""
    flags = {"interval": "guidance_interval", "rescale": "guidance_rescale"}
    settings = {
        flags.get(name, name): value for name, value in settings.items() if name not in ("picture", "area")
    }
    return settings | {name: path for name, path in files.items() if path is not None}


def _read_prompts(path):
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts: received {path}, expected a text file in UTF-8 ({error})") from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise InputError(f"--prompts: received {path}, which is empty; expected a sentence a line")
    return texts


def save_png(picture: Picture, path, **settings):
    """Writes a picture as PNG, with prompt, seed and `settings` as text entries of the file."""
    info = PngImagePlugin.PngInfo()
    for name, value in {"prompt": picture.prompt, "seed": picture.seed, **settings}.items():
        info.add_itxt(name, str(value))
    with atomic_file(path) as file:
        Image.fromarray(picture.image).save(file, "PNG", pnginfo=info)


def captioned_grid(images, captions, columns=4, cell=128, lines=3) -> Image.Image:
    """A sheet of pictures, each with its caption below.

    Args:
        images: uint8 (H, W, 3) each.
        captions: a str each.
        columns: pictures a row.
        cell: side in pixels at which a picture is shown; smaller ones are enlarged.
        lines: lines of text below a picture.
    """
    font = ImageFont.load_default(size=cell // 11)
    side = max(cell, images[0].shape[0])
    line_height = round(1.3 * side / 11)
    tile_height = side + lines * line_height + 6
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 8) + 8, rows * tile_height + 8), "white")
    write = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = 8 + (index % columns) * (side + 8), 8 + (index // columns) * tile_height
        shown = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(shown, (left, top))
        text = "\n".join(textwrap.wrap(caption, width=22, max_lines=lines, placeholder=" ..."))
        write.multiline_text((left, top + side + 2), text, fill="black", font=font, spacing=2)
    return sheet
