"""Parses a command, prints what it will do, calls one function; holds no mathematics. Nobody imports it."""

import contextlib
import dataclasses
import faulthandler
import itertools
import json
import os
import re
import signal
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

import config as settings
from errors import InputError

HELP = """Cup3 trains a text-to-image latent diffusion model from captioned pictures, and draws pictures of sentences.

Start here:
  python cup3.py                            train on drawn flowers: needs nothing else, takes minutes
  python cup3.py generate --prompt "this flower has five pointed pink petals around a yellow center"

With your own pictures (dataset/README.md shows how to lay them out):
  python cup3.py --data my_pictures --run runs/mine
  python cup3.py generate --run runs/mine --prompt "..."
  python cup3.py --data my_pictures --run runs/mine --conditioning class    or none: pictures without captions

Commands:
  train       train a model, or go on with a run; may be left out
  train-vae   train its autoencoder alone: pictures without captions are enough
  generate    draw pictures of sentences with a trained run
  evaluate    measure the KID of a trained run, also of other averages of its weights
  data        draw paper flowers, the built-in data: other numbers or sizes

Each has its own settings: python cup3.py train --help
"""

FLOWERS = settings.Config.data


@dataclass(frozen=True)
class Data:
    """Draw the built-in data, captioned paper flowers in the Cup3 layout."""

    # folder to make; None: dataset/paper_flowers, with the numbers that differ from these defaults in its name
    out: str | None = None
    train: int = 4096  # training pictures
    test: int = 512  # test pictures, some of colour pairs that training never shows
    size: int = 64  # side in pixels, 32 to 512
    seed: int = 0  # the same seed gives the same files


@dataclass(frozen=True)
class Train(settings.Config):
    """Train a text-to-image model end to end, or go on with a run: the same command goes on where it stopped."""

    # the networks and recipe of --preset cup3 or afhq sized for two cores; paper-flowers is small and refuses it
    light: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


@dataclass(frozen=True)
class TrainVAE(settings.Config):
    """Train an autoencoder alone, or go on with a run. `train --vae-from` takes it then; with --vae-from it begins with
    another run's. Captions are not read. Of --training the validation fraction counts alone, and of --evaluation the
    network, size and weights: the rest is the U-Net's."""

    preset: str = "paper-flowers"  # where the defaults come from: paper-flowers, cup3, afhq or ffhq-vae
    # the autoencoder of --preset cup3 or afhq sized for two cores
    light: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    conditioning: tyro.conf.Suppress[str] = "none"
    train_vae: tyro.conf.Suppress[bool | None] = True
    text_from: tyro.conf.Suppress[str | None] = None
    text_encoder: tyro.conf.Suppress[settings.TextEncoderConfig] = field(
        default_factory=settings.TextEncoderConfig
    )
    unet: tyro.conf.Suppress[settings.UNetConfig] = field(default_factory=settings.UNetConfig)
    diffusion: tyro.conf.Suppress[settings.DiffusionConfig] = field(default_factory=settings.DiffusionConfig)


@dataclass(frozen=True)
class Generate:
    """Draw pictures from sentences with a trained run."""

    run: str = "runs/paper-flowers"  # folder of the run
    # a sentence, or the name of a class; give it again for more; a run without conditioning takes none
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    prompts: str | None = None  # text file with a sentence, or the name of a class, a line
    # draw with the newest checkpoint's averaged weights, not with those that KID or `evaluate` chose
    newest: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    count: int = 1  # pictures a sentence
    seed: int = 0  # of a sentence's first picture; the next ones have seed + 1, ...
    # ddpm, ddim, euler, euler-ancestral, heun, dpmpp-2m, dpmpp-2m-sde, unipc or pndm; None: the run's
    sampler: str | None = None
    # of the sampler's times: uniform, leading, trailing, karras or logsnr-uniform; None: the run's
    spacing: str | None = None
    steps: int | None = None  # sampler steps; None: the run's
    guidance: float | None = None  # strength of guidance, 1 is off; None: the run's
    # diffusion times to guide at, 0 1 is all; None: the run's
    guidance_interval: tuple[float, float] | None = None
    # share of the contrast that guidance adds to take back, 0 to 1; None: 0
    guidance_rescale: float | None = None
    # dynamic thresholding: quantile of each prediction's values, such as 0.995, that the largest are cut to
    threshold: float | None = None
    # with --threshold: the size, in standard deviations, below which nothing is cut; None: 3
    threshold_limit: float | None = None
    # strength of leading away from the run's own early weights, 1 is off; None: the run's
    autoguidance: float | None = None
    # the share of its training after which it had those, such as 0.25; None: the run's
    weak: float | None = None
    negative: str | None = None  # a sentence that guidance leads away from
    init_image: str | None = None  # picture file to begin with, instead of noise alone
    # how far from it, above 0 to 1, which takes none of it; None: 0.6, or 1 with a mask
    strength: float | None = None
    mask: str | None = None  # picture file of its size: white is drawn anew, black stays as it is
    to_prompt: str | None = None  # draws frames on the way from --prompt to this sentence
    # draws frames on the way from --seed to this one; with --to-prompt both at once
    to_seed: int | None = None
    frames: int | None = None  # pictures on the way, both ends counted; None: 8
    gif: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # the frames as an animated frames.gif too
    # a sheet 0000_steps.png beside each picture, of what it looks like after each step
    show_steps: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    batch_size: int = 16  # pictures drawn at once
    out: str = "pictures"  # folder for the PNG files and grid.png


@dataclass(frozen=True)
class Evaluate:
    """Measure the KID of a trained run as its training did, into metrics.json in its folder."""

    run: str = "runs/paper-flowers"  # folder of the run
    # also of averages over other lengths (post-hoc EMA); the best draws from then on if it is surely better
    ema_sweep: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    gpus: str = "all"  # GPUs to draw on: all, none, or indices such as 0,2


SETTINGS = {"train": Train, "train-vae": TrainVAE, "generate": Generate, "evaluate": Evaluate, "data": Data}
COMMANDS = tuple(SETTINGS)
TRAININGS = ("train", "train-vae")
UNPREFIXED = ("--epochs", "--batch-size")  # of `TrainingConfig`, which go without their part's name


def parse(argv):
    """The command of `argv` with its settings, without doing anything.

    Args:
        argv: the words after `python cup3.py`.

    Returns:
        (command, settings): "train" or "train-vae" with a `config.Config`, or another name with its dataclass.

    Raises:
        InputError: no such preset.
        SystemExit: tyro refused a flag (code 2) or printed the help (code 0).
    """
    if argv and argv[0] in ("-h", "--help", "help"):
        print(HELP)
        raise SystemExit(0)
    command, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("train", argv)
    if command not in COMMANDS:
        raise InputError(
            f"command: received {command!r}, expected one of {', '.join(COMMANDS)}; see python cup3.py --help"
        )
    _refuse_strays(command, rest)
    if command in TRAININGS:
        return command, _parse_train(command, rest)
    return command, tyro.cli(SETTINGS[command], args=rest, prog=f"cup3.py {command}")


def _refuse_strays(command, words):
    """Commands in the wrong place, and flags of another command: each in one line that says what to type."""
    for former, word in itertools.pairwise(["", *words]):
        flag = word.split("=")[0]
        part = re.sub("^--no-", "--", flag).split(".")[0]
        others = [other for other in COMMANDS if part in _flags(other)]
        if others and command not in others:
            beside = {"--train": "; to train: python cup3.py train"}
            if command == "train-vae":
                beside |= {name: f"; of the autoencoder: --vae-training.{name[2:]}" for name in UNPREFIXED}
            raise InputError(
                f"{flag}: is a flag of {others[0]}, not of {command}; type python cup3.py {others[0]} {flag} ..."
                + beside.get(flag, "")
            )
        if flag == "--generate":
            raise InputError("--generate: is a command, without dashes; type python cup3.py generate ...")
        if word in COMMANDS and not former.startswith("-"):
            raise InputError(
                f"{word}: received after other words, but a command comes first; type python cup3.py {word} ..."
            )
        if command == "generate" and not former and not word.startswith("-"):
            raise InputError(
                f"generate: received {word!r}, expected a flag; a sentence follows --prompt, in quotes: "
                'python cup3.py generate --prompt "a pink flower"'
            )


def _flags(command):
    """The flags of a command, of its parts' settings the part's name."""
    fields = dataclasses.fields(SETTINGS[command])
    names = {item.name for item in fields if tyro.conf.Suppress not in getattr(item.type, "__metadata__", ())}
    # Of train-vae they would be the U-Net's, and do nothing.
    return {f"--{name.replace('_', '-')}" for name in names} | set(UNPREFIXED if command == "train" else ())


def _parse_train(command, words):
    words = list(_spelt_out(words))
    name = _flag(words, "--preset", "paper-flowers")
    defaults = settings.preset(name, diffusion=command == "train")
    if "--light" in words:
        if not settings.PRESETS[name].is_large:
            raise InputError(
                f"--light: received with --preset {name}, which has no smaller form; expected with --preset cup3 or "
                "afhq, whose recipes are for photographs: --preset cup3 --light --data FOLDER"
            )
        defaults = settings.light(defaults)
    if command == "train":
        defaults = settings.conditioned(defaults, _flag(words, "--conditioning", defaults.conditioning))
    else:
        defaults = settings.autoencoder_alone(defaults)
    kind = SETTINGS[command]
    parsed = tyro.cli(kind, args=words, default=kind(**settings.part(defaults)), prog=f"cup3.py {command}")
    return settings.Config(
        **{item.name: getattr(parsed, item.name) for item in dataclasses.fields(settings.Config)}
    )


def _spelt_out(words):
    """`--train-vae` and `--no-train-vae`, which take no value, as the setting of three values that they set."""
    for word, following in itertools.pairwise([*words, "--"]):
        if word == "--no-train-vae":
            yield from ("--train-vae", "False")
        else:
            yield word
            if word == "--train-vae" and following.startswith("-"):
                yield "True"


def _flag(words, name, default):
    """The value of a flag that must be known before the others, `--name value` or `--name=value`."""
    for index, word in enumerate(words):
        if word == name and index + 1 < len(words):
            return words[index + 1]
        if word.startswith(f"{name}="):
            return word.split("=", 1)[1]
    return default


def main(argv=None):
    """Runs a command; returns the exit code: 0, 2 for what the user gave, or 128 + the signal's number."""
    try:
        try:
            return _main(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # here, where it can still be told that nobody reads any more
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return 128 + signal.SIGPIPE


def _main(argv):
    try:
        command, options = parse(argv)
        work = {
            "train": _train,
            "train-vae": _train_vae,
            "generate": _generate,
            "evaluate": _evaluate,
            "data": _data,
        }
        work[command](options)
    except InputError as error:
        print(f"cup3: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncup3: stopped; nothing was half written", file=sys.stderr)
        return 130
    return 0


def _train(options):
    settings.check(options)
    _run("train", options)


def _train_vae(options):
    settings.check(options, autoencoder_alone=True)
    _run("train_vae", options)


def _run(name, options):
    _check_folders(options)
    print(_in_lines(dataclasses.asdict(options)), flush=True)
    with _without_notes():
        import stages  # TensorFlow takes seconds to import: only once the words are known to be right

    try:
        getattr(stages, name)(options)
    except stages.Stopped as stop:
        print(f"\ncup3: {stop}", file=sys.stderr)
        raise SystemExit(128 + stop.signal) from None


def _in_lines(entries):
    """A dict as JSON with a line for each entry, however deep that is."""
    lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def _check_folders(options):
    """Refuses folders that cannot be used; their contents are checked when they are read."""
    from checkpoint import RunFolder

    if options.data != FLOWERS and not Path(options.data).is_dir():
        raise InputError(f"{options.data}: is no folder; expected one with pictures (see dataset/README.md)")
    RunFolder.check(options.run, settings.to_dict(options))
    for other in filter(None, (options.vae_from, options.text_from)):
        RunFolder.read(other)


def _generate(options):
    _check_request(options)
    print(f"reading {options.run}; a drawing takes some seconds to begin", flush=True)
    with _without_notes():
        import generate

    generate.write_pictures(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    )


def _evaluate(options):
    _check_is_run(options.run)
    with _without_notes():
        from stages import evaluation

    evaluation.evaluate(options.run, options.ema_sweep, options.gpus)


def _check_request(options):
    """Refuses what is missing or has no such name; `generate` checks the rest."""
    if not options.prompt and options.prompts is None and not _is_unconditional(options.run):
        raise InputError(
            'prompts: received none, expected at least one: --prompt "a sentence", or --prompts FILE'
        )
    if options.prompts is not None and not Path(options.prompts).is_file():
        raise InputError(
            f"--prompts: received {options.prompts}, expected a text file in UTF-8 (there is no such file)"
        )
    for name in ("strength", "mask"):
        if getattr(options, name) is not None and options.init_image is None:
            raise InputError(
                f"--{name}: received {getattr(options, name)} without --init-image, expected the picture to begin with"
            )
    for name in ("init_image", "mask"):
        path = getattr(options, name)
        if path is not None and not Path(path).is_file():
            raise InputError(
                f"--{name.replace('_', '-')}: received {path}, expected a picture file (there is no such file)"
            )
    judged = settings.EvaluationConfig
    settings.check_sampling(
        "--", options.sampler or judged.sampler, options.spacing or judged.spacing, steps=1
    )
    _check_is_run(options.run)


def _check_is_run(folder):
    if not (Path(folder) / "config.json").is_file():
        runs = ", ".join(str(file.parent) for file in sorted(Path("runs").glob("*/config.json")))
        raise InputError(
            f"{folder}: received a folder without config.json, expected --run with the folder of a run; "
            + (f"there are: {runs}" if runs else "train one first: python cup3.py")
        )


def _is_unconditional(run):
    """Whether there is a run in the folder, and it draws from nothing but seeds."""
    from checkpoint import RunFolder

    has_run = (Path(run) / "config.json").is_file()
    return has_run and RunFolder.read(run).config.get("conditioning") == "none"


def _data(options):
    from dataset import paper_flowers

    own_folder = flowers_folder(options)
    out = options.out or own_folder
    if Path(out) == Path(FLOWERS) and own_folder != FLOWERS:
        raise InputError(
            f"--out: received {out}, where runs look for flowers of the default numbers and refuse others; "
            f"give another folder, or no --out for {own_folder}"
        )
    print(
        f"drawing {options.train} + {options.test} paper flowers of {options.size} px into {out}", flush=True
    )
    paper_flowers.write(out, train=options.train, test=options.test, size=options.size, seed=options.seed)
    if Path(out) != Path(FLOWERS):
        multiple = settings.size_multiple(settings.Config())
        side = options.size - options.size % multiple
        note = "" if side == options.size else f" (at {side} px: the networks take multiples of {multiple})"
        print(
            f"\nTrain on them{note}:\n   python cup3.py --data {out} --run runs/{Path(out).name} --image-size {side}"
        )


def flowers_folder(options):
    """Where flowers go that no folder was named for: the default run's folder is for the default's flowers only."""
    parts = [
        f"-{name}{getattr(options, name)}"
        for name in ("train", "test", "size", "seed")
        if getattr(options, name) != getattr(Data, name)
    ]
    return FLOWERS + "".join(parts)


# Python and TensorFlow speak to programmers; these make them speak to users.

NOTES = re.compile(rb"I\d{4} |WARNING: All log messages before absl|To enable the following instructions")


@contextlib.contextmanager
def _without_notes():
    """Keeps TensorFlow's notes of its import (oneDNN, CPU features) off standard error.

    All else that is said meanwhile comes at the end; where the import fails, the notes too. Set
    TF_CPP_MIN_LOG_LEVEL=0 to have everything at once.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0" or "tensorflow" in sys.modules:
        yield
        return
    # Its errors are mostly that there is no GPU, which is news only where there is a driver.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2" if os.path.exists("/proc/driver/nvidia") else "3")
    failed = False
    with tempfile.TemporaryFile() as said:
        try:
            with _standard_error_into(said):
                yield
        except Exception:
            failed = True
            raise
        finally:
            said.seek(0)
            with open(2, "wb", closefd=False) as error:
                error.writelines(line for line in said if failed or not NOTES.match(line))


@contextlib.contextmanager
def _standard_error_into(file):
    """Standard error of the whole process, C++ included, goes into a file; only a crash still says where it was."""
    sys.stderr.flush()
    standard_error, crashes_were_told = os.dup(2), faulthandler.is_enabled()
    faulthandler.enable(standard_error)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(standard_error, 2)
        faulthandler.disable()
        if crashes_were_told:
            faulthandler.enable(sys.__stderr__)
        os.close(standard_error)


def _plain_warning(message, category, filename, lineno, line=None):
    """A warning as a user wants it: without the place in the code where it was raised, if it is for users."""
    if issubclass(category, UserWarning):
        return f"warning: {message}\n"
    return _programmers_warning(message, category, filename, lineno, line)


_programmers_warning = warnings.formatwarning


if __name__ == "__main__":
    warnings.formatwarning = _plain_warning
    sys.exit(main())
