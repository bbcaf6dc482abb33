"""Requests: prompts -> pictures in memory, or files of them, checked before anything is drawn."""

import collections
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from checkpoint import RunFolder
from config import check_interval, check_sampling, check_strength, check_weak
from errors import InputError
from generate.networks import load, with_weak
from generate.painter import Drawing, Painter, drawing
from generate.sheets import Picture, save_all
from generate.ways import FRAMES, LARGEST_SEED, Way, check_way
from input_pipeline import RARE, read_pictures

STRENGTH = 0.6  # of drawing from a picture, where none is given: its layout stays, its details change
THRESHOLD_LIMITS = 1e-3, 1e3


def generate(painter, prompts, count=1, seed=0, progress=None, negative=None, on_step=None, **settings):
    """Draws `count` pictures of every prompt, lazily; picture k of a prompt has the seed `seed + k`.

    Args:
        painter: a `Painter`.
        prompts: list of str: sentences, or names of classes; empty ones, such as [""], where the painter's networks are
            unconditional.
        count: pictures a prompt.
        seed, progress: of the first picture of a prompt, and a label for a progress bar, or None.
        negative: a str, what guidance leads away from, or None.
        on_step: see `Painter.draw`.
        settings: see `Drawing`.

    Yields:
        Picture.

    Raises:
        InputError: no prompt, an empty one or no class, or a count, a seed or a setting that cannot be.
    """
    _check_request(painter.networks.vocabulary, prompts, count, seed, negative=negative, **settings)
    tokens, settings = _read_tokens(painter, prompts, negative, settings)
    seeds = np.tile(seed + np.arange(count), len(prompts))
    images = painter.draw(np.repeat(tokens, count, axis=0), seeds, progress, on_step=on_step, **settings)
    for index, image in enumerate(images):
        yield Picture(image, prompts[index // count], int(seeds[index]))


def between(
    painter,
    prompt,
    to_prompt=None,
    seed=0,
    to_seed=None,
    frames=FRAMES,
    progress=None,
    negative=None,
    on_step=None,
    **settings,
):
    """Draws pictures at even shares of the way from one prompt, seed or both to another, lazily.

    The first is that of `prompt` and `seed` alone, and the last that of `to_prompt` and `to_seed`, within a grey level;
    but the last with another seed by a stochastic sampler is not, see `Way`.

    Args:
        painter: a `Painter`.
        prompt, seed: a str and a whole number, where the way begins.
        to_prompt, to_seed: where it ends; None for the same.
        frames: how many pictures, both ends counted.
        progress, negative, on_step, settings: see `generate`.

    Yields:
        Picture, with its share of the way.

    Raises:
        InputError: nothing to go to, fewer than two frames, or see `generate`.
    """
    check_way([prompt], 1, seed, to_prompt, to_seed, frames)
    vocabulary = painter.networks.vocabulary
    _check_request(vocabulary, [prompt], 1, seed, negative=negative, **settings)
    if to_prompt is not None:
        vocabulary.check([to_prompt], "to_prompt")
    tokens, settings = _read_tokens(painter, [prompt], negative, settings)
    shares = np.linspace(0, 1, frames, dtype="float32")
    way = Way(
        shares,
        None if to_prompt is None else _read_tokens(painter, [to_prompt])[0].repeat(frames, axis=0),
        None if to_seed is None else np.full(frames, to_seed),
    )
    images = painter.draw(
        tokens.repeat(frames, axis=0), np.full(frames, seed), progress, way, on_step, **settings
    )
    ends = (f"seed {seed}", f"seed {to_seed}") if to_prompt is None else (prompt, to_prompt)
    captions = [ends[0], *(f"{100 * share:.0f} % of the way" for share in shares[1:-1]), ends[1]]
    for image, share, caption in zip(images, shares, captions, strict=True):
        yield Picture(image, prompt, seed, float(share), caption)


def _read_tokens(painter, prompts, negative=None, settings=()):
    """The prompts as ids, int32 (N, T), and settings that have the negative one as ids (T,) too."""
    encode = painter.networks.vocabulary.encode
    own = {} if negative is None else {"negative": encode([negative])[0][0]}
    return encode(prompts)[0], {**dict(settings), **own}


def _check_request(vocabulary, prompts, count, seed, flag="", **settings):
    """Refuses what cannot be drawn; `flag` goes before the names of settings in the message: "--", or nothing."""
    _check_prompts(vocabulary, prompts, count, seed)
    asked = Drawing(**settings)
    _check_steps(asked, flag)
    if vocabulary.is_unconditional:
        _check_unguided(asked, flag)
    _check_guidance(asked, flag)
    if asked.negative is not None:
        vocabulary.check([asked.negative], f"{flag}negative")
    _check_threshold(asked, flag)


def _check_prompts(vocabulary, prompts, count, seed):
    if not prompts:
        raise InputError("prompts: received none, expected at least one")
    for row, prompt in enumerate(prompts):
        if not prompt.strip() and not vocabulary.is_unconditional:
            raise InputError(f"prompts: received an empty text in row {row}, expected words")
    vocabulary.check(prompts)
    if count < 1:
        raise InputError(f"count: received {count}, expected at least 1")
    if not abs(seed) + count <= LARGEST_SEED:
        raise InputError(f"seed: received {seed}, expected a number of 64 bits")


def _check_steps(asked, flag):
    steps, strength = asked.steps, asked.strength
    if steps < 1:
        raise InputError(f"{flag}steps: received {steps}, expected at least 1")
    check_sampling(flag, asked.sampler, asked.spacing, steps)
    if not 0 < strength <= 1:
        raise InputError(f"{flag}strength: received {strength}, expected more than 0 and at most 1")
    if not round(strength * steps):
        raise InputError(
            f"{flag}strength: received {strength} of {steps} steps, which is none of them; expected more of either"
        )
    if asked.picture is None and (strength != 1 or asked.area is not None):
        raise InputError(
            f"{'strength' if asked.area is None else 'area'}: received without a picture to begin with, expected one"
        )


def _check_unguided(asked, flag):
    """Refuses to guide a model that was trained on pictures alone."""
    why = "for a model without conditioning, where there is nothing to follow"
    if asked.guidance != 1:
        raise InputError(f"{flag}guidance: received {asked.guidance} {why}; expected 1, which is off")
    if asked.negative is not None:
        raise InputError(f"{flag}negative: received {asked.negative!r} {why}; expected none")


def _check_guidance(asked, flag):
    guidance, rescale, negative = asked.guidance, asked.rescale, asked.negative
    check_strength(f"{flag}guidance", guidance)
    check_strength(f"{flag}autoguidance", asked.autoguidance)
    check_interval("--guidance-interval" if flag else "interval", asked.interval)
    if not 0 <= rescale <= 1:
        name = "--guidance-rescale" if flag else "rescale"
        raise InputError(f"{name}: received {rescale}, expected 0 to 1")
    if negative is not None and not negative.strip():
        raise InputError(f"{flag}negative: received an empty text, expected words")
    if negative is not None and guidance == 1:
        raise InputError(
            f"{flag}negative: received {negative!r} with a guidance of 1, which is off and leads away from nothing; "
            "expected another guidance"
        )


def _check_threshold(asked, flag):
    share, limit = asked.threshold, asked.threshold_limit
    if share is not None and not 0 < share < 1:
        raise InputError(f"{flag}threshold: received {share}, expected more than 0 and less than 1")
    least, most = THRESHOLD_LIMITS
    if not least <= limit <= most:
        name = "--threshold-limit" if flag else "threshold_limit"
        raise InputError(f"{name}: received {limit}, expected {least:g} to {most:g}")


class Request(NamedTuple):
    """What pictures are asked of a run, by the names of the flags of `generate`.

    Args:
        prompt, prompts: sentences or names of classes, and a text file with one a line, or None; neither for a run
            without conditioning.
        newest: whether the weights of the newest checkpoint draw, see `load`.
        count, seed: see `generate`.
        sampler, spacing, steps, guidance, guidance_interval: the sampler, its times and their number, the strength of
            guidance and the times it acts at; None takes the run's.
        guidance_rescale, threshold, threshold_limit: see `Drawing`; None takes its defaults.
        autoguidance, weak: the strength of leading away from the run's own early weights, and the share of its
            training, above 0 and below 1, after which it had them, see `with_weak`; None takes the run's.
        negative: a sentence that guidance leads away from, or None.
        init_image, mask: picture files, see `begun_with`, or None.
        strength: see `Drawing`; None is 1 with a mask, `STRENGTH` without.
        to_prompt, to_seed, frames: draws these frames instead, see `between`; None is `FRAMES`.
        gif: whether the frames become an animated `frames.gif` too.
        show_steps: whether a sheet beside each PNG shows it after each of the sampler's steps.
        batch_size: pictures drawn at once.
        out: folder for the files; it is made.
    """

    prompt: tuple[str, ...] = ()
    prompts: str | Path | None = None
    newest: bool = False
    count: int = 1
    seed: int = 0
    sampler: str | None = None
    spacing: str | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float | None = None
    autoguidance: float | None = None
    weak: float | None = None
    negative: str | None = None
    init_image: str | Path | None = None
    strength: float | None = None
    mask: str | Path | None = None
    threshold: float | None = None
    threshold_limit: float | None = None
    to_prompt: str | None = None
    to_seed: int | None = None
    frames: int | None = None
    gif: bool = False
    show_steps: bool = False
    batch_size: int = 16
    out: str | Path = "pictures"


def write_pictures(run, prompt=(), prompts=None, **flags):
    """Draws pictures with a run and writes them, one PNG each and a captioned `grid.png`.

    Args:
        run: the run's folder.
        prompt, prompts, flags: of a `Request`.

    Returns:
        The paths of the pictures' PNG files.

    Raises:
        InputError: see `load`, `with_weak`, `begun_with`, `generate` and `between`; or `prompts` cannot be read, or
            `out` not written.
    """
    if isinstance(prompt, str):
        raise InputError(f"prompt: received the text {prompt!r}, expected a list of texts")
    asked = Request(prompt, prompts, **flags)
    _check_numbers(asked)
    texts = [*asked.prompt, *(_read_prompts(asked.prompts) if asked.prompts else ())]
    networks, config = load(run, asked.newest)
    if networks.vocabulary.is_unconditional:
        texts = texts or [""]
    settings = _settings(asked, config)
    _check_texts(asked, texts, networks.vocabulary, settings)
    _warn_of_unknown(run, networks.vocabulary, [*texts, *filter(None, (asked.negative, asked.to_prompt))])
    networks, led = _led(asked, networks, config, settings)
    painter = Painter(networks, config.image_size, asked.batch_size)
    written = {"run": run, "weights": networks.weights, **_written(settings, asked), **led}
    previews = collections.defaultdict(list)
    settings |= {"progress": "drawing", "on_step": _collect(previews) if asked.show_steps else None}
    if asked.to_prompt is None and asked.to_seed is None:
        pictures = generate(painter, texts, asked.count, asked.seed, **settings)
    else:
        way = asked.to_prompt, asked.seed, asked.to_seed, asked.frames or FRAMES
        pictures = between(painter, texts[0], *way, **settings)
    paths = _save(pictures, Path(asked.out), previews, asked.gif, **written)
    print(f"by the weights: {networks.weights}{_other_weights(RunFolder.read(run), networks.weights)}")
    return paths


def _other_weights(run, weights):
    """What a user may want to know of the run's other weights, present and to come."""
    told, steps = "", run.checkpoint_steps("diffusion")
    if steps and weights.kind != "newest" and weights != ("best", steps[-1], None):
        told += f"; the newest, of step {steps[-1]}, draw with --newest"
    if not run.is_finished:
        told += "; the training is not finished, and its command goes on"
    return told


def _led(asked, networks, config, settings):
    """The networks with the weak ones that are asked for, and of these what a PNG keeps."""
    if settings["autoguidance"] == 1:
        if asked.weak is not None:
            raise InputError(
                f"--weak: received {asked.weak} with an autoguidance of 1, which is off and leads away from nothing; "
                "expected another --autoguidance"
            )
        return networks, {}
    # A run that draws otherwise has no weak networks yet; one that has lost its averages was warned of by `load`.
    if asked.weak is not None or config.evaluation.autoguidance == 1:
        networks = with_weak(networks, config, asked.weak)
    share = config.evaluation.weak if asked.weak is None else asked.weak
    return networks, {"weak": share} if networks.weak else {}


def _check_numbers(asked):
    """Refuses numbers that are wrong whatever the run is."""
    if asked.batch_size < 1:
        raise InputError(f"--batch-size: received {asked.batch_size}, expected at least 1")
    if asked.threshold_limit is not None and asked.threshold is None:
        raise InputError(
            f"--threshold-limit: received {asked.threshold_limit} without --threshold, expected both"
        )
    if asked.weak is not None:
        check_weak("--weak", asked.weak)


def _check_texts(asked, texts, vocabulary, settings):
    """Refuses what cannot be drawn of these texts by a run of this vocabulary."""
    check_way(
        texts, asked.count, asked.seed, asked.to_prompt, asked.to_seed, asked.frames, asked.gif, flag="--"
    )
    _check_request(vocabulary, texts, asked.count, asked.seed, **settings, flag="--")
    if asked.to_prompt is not None:
        vocabulary.check([asked.to_prompt], "--to-prompt")


def _settings(asked, config):
    """A request's keywords of `Painter.draw`; what it leaves open is the run's."""
    own = (
        "sampler",
        "spacing",
        "steps",
        "guidance",
        "autoguidance",
        "negative",
        "threshold",
        "threshold_limit",
    )
    given = {name: getattr(asked, name) for name in own}
    given |= {"interval": asked.guidance_interval, "rescale": asked.guidance_rescale}
    begun = begun_with(asked.init_image, asked.mask, asked.strength, config.image_size)
    return drawing(config, **given) | begun


def _save(pictures, out, previews, gif, **written):
    """`save_all`, with an error of the disk as a refusal and a line that tells what is where."""
    try:
        paths = save_all(pictures, out, previews, gif, **written)
    except OSError as error:
        raise InputError(
            f"--out: received {out}, which cannot be written ({error.strerror}); give another folder"
        ) from error
    names = [f"{len(paths)} picture{'s' * (len(paths) != 1)}"] + ["frames.gif"] * gif
    print(f"{', '.join(names)} and grid.png in {out}")
    return paths


def _collect(previews):
    """A callback of `Painter.draw` that appends what each picture looks like to its list of a dict of lists."""

    def on_step(first, k, count, images):
        for number, image in enumerate(images, first):
            previews[number].append(image)

    return on_step


def _warn_of_unknown(run, vocabulary, texts):
    unknown = vocabulary.unknown(texts)
    if unknown:
        warnings.warn(
            f"{run} was trained without the word{'s' * (len(unknown) != 1)} {', '.join(unknown)}: "
            f"read as {RARE}, any rare word",
            stacklevel=3,
        )


def begun_with(init_image, mask, strength, image_size):
    """What drawing begins with, as keywords of `Painter.draw`: none, or a picture, a strength and perhaps an area.

    Args:
        init_image: a picture file, resized and cut as for training, or None.
        mask: a picture file of its size, whose white is drawn anew, whose black stays as it is and whose grey is mixed;
            or None.
        strength: see `Drawing`, or None.
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


def _written(settings, asked):
    """Keywords of `Painter.draw` by the names of their flags, as a PNG keeps them; pictures by their files."""
    flags = {"interval": "guidance_interval", "rescale": "guidance_rescale"}
    settings = {
        flags.get(name, name): value for name, value in settings.items() if name not in ("picture", "area")
    }
    others = {name: getattr(asked, name) for name in ("init_image", "mask", "to_prompt", "to_seed")}
    return settings | {name: value for name, value in others.items() if value is not None}


def _read_prompts(path):
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts: received {path}, expected a text file in UTF-8 ({error})") from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise InputError(f"--prompts: received {path}, which is empty; expected a sentence a line")
    return texts
