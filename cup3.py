"""Parses a command, prints what it will do, calls one function; holds no mathematics. Nobody imports it.

python cup3.py                     train the default preset, end to end
python cup3.py train --help        every setting
python cup3.py generate --help     pictures from sentences with a trained run
python cup3.py data --help         draw the built-in data
"""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tyro

import config as settings
from errors import InputError

COMMANDS = ("train", "generate", "data")


@dataclass(frozen=True)
class Data:
    """Draw the built-in data, captioned paper flowers in the Cup3 layout."""

    out: str = "dataset/paper_flowers"  # folder to make
    train: int = 4096  # training pictures
    test: int = 512  # test pictures, some of colour pairs that training never shows
    size: int = 64  # side in pixels, 32 to 512
    seed: int = 0  # the same seed gives the same files


@dataclass(frozen=True)
class Generate:
    """Draw pictures from sentences with a trained run."""

    run: str = "runs/paper-flowers"  # folder of the run
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # a sentence; give it again for more
    prompts: str | None = None  # text file with a sentence a line
    count: int = 1  # pictures a sentence
    seed: int = 0  # of a sentence's first picture; the next ones have seed + 1, ...
    steps: int | None = None  # sampler steps; default: the run's
    guidance: float | None = None  # strength of guidance, 1 is off; default: the run's
    batch_size: int = 16  # pictures drawn at once
    out: str = "pictures"  # folder for the PNG files and grid.png


def parse(argv):
    """The command of `argv` with its settings, without doing anything.

    Args:
        argv: the words after `python cup3.py`.

    Returns:
        (command, settings): "train" with a `config.Config`, or another name with its dataclass.

    Raises:
        InputError: no such preset.
        SystemExit: tyro refused a flag (code 2) or printed the help (code 0).
    """
    command, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("train", argv)
    if command not in COMMANDS:
        raise InputError(f"command: received {command!r}, expected one of {', '.join(COMMANDS)}")
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0)
    if command == "train":
        return command, _parse_train(rest)
    kind = {"generate": Generate, "data": Data}[command]
    return command, tyro.cli(kind, args=rest, prog=f"cup3.py {command}")


def _parse_train(rest):
    defaults = settings.preset(_flag(rest, "--preset", "paper-flowers"))
    light = "--light" in rest
    if light:
        rest = [word for word in rest if word != "--light"]
        defaults = settings.light(defaults)
    return tyro.cli(
        settings.Config, args=rest, default=defaults, prog="cup3.py train", description=TRAIN_HELP
    )


TRAIN_HELP = """Train a text-to-image model end to end, or go on with a run. Besides the settings below:
--light takes the small networks and a recipe for two cores."""


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
        command, options = parse(sys.argv[1:] if argv is None else argv)
        {"train": _train, "generate": _generate, "data": _data}[command](options)
    except InputError as error:
        print(f"cup3: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncup3: stopped; nothing was half written", file=sys.stderr)
        return 130
    return 0


def _train(options):
    print(json.dumps(dataclasses.asdict(options), indent=2))
    import stages  # TensorFlow takes seconds to import: only once the words are known to be right

    try:
        stages.train(options)
    except stages.Stopped as stop:
        print(f"\ncup3: {stop}", file=sys.stderr)
        raise SystemExit(128 + stop.signal) from None


def _generate(options):
    import generate

    generate.write_pictures(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    )


def _data(options):
    from dataset import paper_flowers

    print(f"drawing {options.train} + {options.test} paper flowers of {options.size} px into {options.out}")
    paper_flowers.write(
        options.out, train=options.train, test=options.test, size=options.size, seed=options.seed
    )


if __name__ == "__main__":
    sys.exit(main())
