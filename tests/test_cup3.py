"""Words become settings, and every refusal is one line and exit code 2."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import config as settings
import cup3
import generate
import stages
from checkpoint import RunFolder
from config import Config
from dataset import paper_flowers
from errors import InputError

ROOT = Path(cup3.__file__).parent
PARTS = [item.name.replace("_", "-") for item in dataclasses.fields(Config) if "Config" in str(item.type)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test finds the runs and the data of whoever runs it."""
    monkeypatch.chdir(tmp_path)


def test_no_word_at_all_trains_the_default_preset():
    assert cup3.parse([]) == ("train", Config())
    assert cup3.parse(["train"]) == ("train", Config())


def test_every_setting_has_its_flag():
    command, config = cup3.parse(
        "train --seed 3 --image-size 32 --epochs 9 --batch-size 5 --vae-training.epochs 2 --unet.level-channels 8 16"
        " --augmentation.no-flip --vae.latent-scale 0.18215 --train-vae True --training.steps-per-epoch None"
        " --evaluation.guidance 1.5 --gpus none --run r --data d".split()
    )
    assert command == "train"
    expected = Config(seed=3, image_size=32, train_vae=True, gpus="none", run="r", data="d")
    assert config == dataclasses.replace(
        expected,
        training=dataclasses.replace(Config().training, epochs=9, batch_size=5, steps_per_epoch=None),
        vae_training=dataclasses.replace(Config().vae_training, epochs=2),
        unet=dataclasses.replace(Config().unet, level_channels=(8, 16)),
        augmentation=dataclasses.replace(Config().augmentation, flip=False),
        vae=dataclasses.replace(Config().vae, latent_scale=0.18215),
        evaluation=dataclasses.replace(Config().evaluation, guidance=1.5),
    )


@pytest.mark.parametrize("words", [["--preset", "cup3"], ["--preset=cup3"], ["train", "--preset", "cup3"]])
def test_a_preset_sets_the_defaults(words):
    assert cup3.parse(words) == ("train", settings.preset("cup3"))
    changed = dataclasses.replace(settings.preset("cup3"), seed=4)
    assert cup3.parse([*words, "--seed", "4"]) == ("train", changed)


def test_light_is_a_preset_with_the_small_networks():
    small = settings.light(settings.preset("cup3"))
    assert cup3.parse(["--preset", "cup3", "--light"]) == ("train", small)
    assert cup3.parse(["--light", "--preset", "cup3", "--seed", "2"])[1] == dataclasses.replace(small, seed=2)


@pytest.mark.parametrize("words", [["--light"], ["--preset", "paper-flowers", "--light"]])
def test_light_is_refused_where_the_networks_are_small_already(words):
    with pytest.raises(
        InputError, match=r"^--light: received with --preset paper-flowers.* --preset cup3 --light"
    ):
        cup3.parse(words)


@pytest.mark.parametrize("words", [["--conditioning", "none"], ["--conditioning=none", "--seed", "0"]])
def test_a_conditioning_sets_what_goes_with_it(words):
    own = cup3.parse(words)[1]
    assert own == settings.conditioned(Config(), "none")
    assert (own.conditioning, own.evaluation.guidance) == ("none", 1)
    settings.check(own)
    light = settings.conditioned(settings.light(settings.preset("cup3")), "class")
    assert cup3.parse("--preset cup3 --light --conditioning class".split())[1] == light


def test_the_autoencoder_is_trained_or_not_by_a_flag_without_a_value():
    for words, value in (
        (["--train-vae"], True),
        (["--train-vae", "--seed", "1"], True),
        (["--train-vae", "True"], True),
        (["--no-train-vae"], False),
        (["--train-vae", "None"], None),
        (["--seed", "1"], None),
    ):
        assert cup3.parse([*words, "--vae-from", "r"])[1].train_vae is value


def described(shown):
    """{flag: what a help says of it, without its default}"""
    entries = [[]]
    for line in re.sub("[╭╮╰╯│─|]", " ", shown).splitlines():
        if not line.startswith("   "):  # a flag, a heading or the edge of a box
            entries.append([])
        entries[-1].append(line.strip())
    default = re.compile(r"\(default:.*\)|\(repeatable\)")
    texts = {}
    for entry in entries:
        head, *text = re.split(r"  +", "  ".join(entry))
        for flag in re.findall(r"--?\w[\w.-]*", head if head.startswith("-") else ""):
            texts[flag] = default.sub("", " ".join(text)).strip()
    return texts


def test_what_a_help_says_of_a_flag_is_found():
    shown = "│ -h, --help  show │\n│ --a STR │\n│    of all │\n│    (default: 3) │\n"
    shown += "╰───╯\n│ part │\n│ ──── │\n│ --b INT │\n│  (default: 1) │"
    assert described(shown) == {"-h": "show", "--help": "show", "--a": "of all", "--b": ""}


@pytest.mark.parametrize("command", cup3.COMMANDS)
def test_every_flag_is_described(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cup3.parse([command, "--help"])
    texts = described(capsys.readouterr().out)
    assert cup3._flags(command) - {f"--{name}" for name in PARTS} <= texts.keys()
    assert [flag for flag, text in texts.items() if len(text) < 5] == []


def test_the_other_commands_have_their_settings():
    line = ["generate", "--run", "r", "--prompt", "a b", "--prompt", "c", "--count", "2", "--guidance", "1.5"]
    expected = cup3.Generate(run="r", prompt=("a b", "c"), count=2, guidance=1.5)
    assert cup3.parse(line) == ("generate", expected)
    line = "generate --prompt a --to-prompt b --to-seed -2 --frames 5 --gif --show-steps --threshold 0.99".split()
    expected = cup3.Generate(prompt=("a",), to_prompt="b", to_seed=-2, frames=5, threshold=0.99)
    expected = dataclasses.replace(expected, gif=True, show_steps=True, threshold_limit=2.5, newest=True)
    assert cup3.parse([*line, "--threshold-limit", "2.5", "--newest"]) == ("generate", expected)
    assert cup3.parse(["data", "--train", "7"]) == ("data", cup3.Data(train=7))


def test_train_generate_and_data_reach_their_functions(monkeypatch, capsys):
    calls = {}
    monkeypatch.setattr(stages, "train", lambda config: calls.update(train=config))
    monkeypatch.setattr(generate, "write_pictures", lambda **request: calls.update(generate=request))
    monkeypatch.setattr(
        paper_flowers, "write", lambda folder, **numbers: calls.update(data=(folder, numbers))
    )
    assert cup3.main(["--seed", "5"]) == 0
    *_, printed = capsys.readouterr().out.partition("{\n")  # a run prints its config, an entry a line
    assert json.loads("{" + printed)["seed"] == 5
    assert printed.count("\n") == len(dataclasses.fields(Config)) + 1
    with RunFolder.open("runs/paper-flowers", {}):
        pass
    assert cup3.main(["generate", "--prompt", "x", "--out", "o"]) == 0
    assert (
        cup3.main(["data", "--out", "o", "--train", "7", "--test", "2", "--size", "32", "--seed", "1"]) == 0
    )
    assert calls["train"] == Config(seed=5)
    assert calls["generate"] == dataclasses.asdict(cup3.Generate(prompt=("x",), out="o"))
    assert calls["data"] == ("o", {"train": 7, "test": 2, "size": 32, "seed": 1})


def test_data_draws_the_flowers(tmp_path, capsys):
    line = [
        "data",
        "--out",
        str(tmp_path / "a"),
        "--train",
        "3",
        "--test",
        "2",
        "--size",
        "32",
        "--seed",
        "4",
    ]
    assert cup3.main(line) == 0
    assert f"drawing 3 + 2 paper flowers of 32 px into {tmp_path / 'a'}" in capsys.readouterr().out
    paper_flowers.write(tmp_path / "b", train=3, test=2, size=32, seed=4, progress=False)
    files = [path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file()]
    assert len(files) == 12
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        (["rain"], "command: received 'rain', expected one of train, train-vae, generate"),
        (
            ["--train"],
            "--train: is a flag of data, not of train; type python cup3.py data --train ...; to train: p",
        ),
        (["--train=40"], "--train: is a flag of data, not of train; type python cup3.py data --train ..."),
        (["--generate"], "--generate: is a command, without dashes; type python cup3.py generate"),
        (
            ["--prompt", "x"],
            "--prompt: is a flag of generate, not of train; type python cup3.py generate --prompt",
        ),
        (
            ["data", "--epochs", "3"],
            "--epochs: is a flag of train, not of data; type python cup3.py train --epoch",
        ),
        (
            ["--seed", "1", "train"],
            "train: received after other words, but a command comes first; type python c",
        ),
        (
            ["generate", "a", "flower"],
            "generate: received 'a', expected a flag; a sentence follows --prompt, in",
        ),
        (
            ["generate"],
            'prompts: received none, expected at least one: --prompt "a sentence", or --prompts FILE',
        ),
        (
            ["generate", "--prompt", "x"],
            "runs/paper-flowers: received a folder without config.json, expected --r",
        ),
        (["--preset", "roses"], "--preset: received 'roses', expected one of paper-flowers, cup3"),
        (["--preset", "coco"], "--preset: received 'coco', which needs CLIP"),
        (["--image-size", "63"], "--image-size: received 63, expected a multiple of"),
        (["--batch-size", "-5"], "--batch-size: received -5, expected"),
        (["--data", "absent", "--run", "r"], "absent: is no folder; expected one with pictures"),
        (["--gpus", "first"], "--gpus: received 'first', expected all, none, or indices"),
        (["--conditioning", "labels"], "--conditioning: received 'labels', expected one of text, class"),
        (["generate", "--run", "absent", "--prompt", "x"], "absent: received a folder without config.json"),
        (
            ["generate", "--prompt", "x", "--sampler", "DDIM"],
            "--sampler: received 'DDIM', expected one of ddpm, ddim, euler, euler-ancestral, heun, dpmpp-2m, "
            "dpmpp-2m-sde, unipc, pndm",
        ),
        (
            ["generate", "--prompt", "x", "--spacing", "linspace"],
            "--spacing: received 'linspace', expected one of uniform, leading, trailing, karras, logsnr-uniform",
        ),
        (
            ["generate", "--prompt", "x", "--mask", "m.png"],
            "--mask: received m.png without --init-image, expected the picture to begin with",
        ),
        (
            ["generate", "--prompt", "x", "--strength", "0.5"],
            "--strength: received 0.5 without --init-image, expected the picture to begin with",
        ),
        (
            ["generate", "--prompt", "x", "--init-image", "absent.png"],
            "--init-image: received absent.png, expected a picture file (there is no such file)",
        ),
        (
            ["generate", "--prompt", "x", "--init-image", "mine.txt", "--mask", "absent.png"],
            "--mask: received absent.png, expected a picture file (there is no such file)",
        ),
        (
            ["--evaluation.sampler", "plms"],
            "--evaluation.sampler: received 'plms', expected one of ddpm, ddim",
        ),
        (["generate", "--prompts", "absent.txt"], "--prompts: received absent.txt, expected a text file"),
        (["data", "--size", "16"], "paper flowers: size must be 32 to 512. Received: 16"),
        (["data", "--train", "0"], "paper flowers: train must be a whole number of at least 1"),
        (
            ["data", "--out", "."],
            ".: expected a new or empty folder for paper flowers, but something is there already; give --out",
        ),
        (
            ["data", "--train", "40", "--out", "dataset/paper_flowers"],
            "--out: received dataset/paper_flowers, where runs look for flowers of the default numbers and refuse o",
        ),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, line, refusal):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("precious")
    assert cup3.main(line) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cup3: {refusal}")
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["mine.txt"]


@pytest.mark.parametrize("line", [["--batch-size", "many"], ["--tricks", "1"], ["generate", "--count", "x"]])
def test_a_flag_that_is_none_or_no_number_is_refused(line, capsys):
    with pytest.raises(SystemExit) as end:
        cup3.main(line)
    assert end.value.code == 2
    assert line[-2] in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", [["--help"], ["train", "--help"], ["generate", "--help"], ["data", "--help"]]
)
def test_help_explains_and_does_nothing(line, capsys):
    with pytest.raises(SystemExit) as end:
        cup3.main(line)
    assert end.value.code == 0
    shown = capsys.readouterr().out
    wanted = {"train": "--vae-training.learning-rate", "generate": "--guidance", "data": "--size"}
    assert wanted.get(line[0], "python cup3.py generate --prompt") in shown


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_the_first_help_is_for_users(word, capsys):
    with pytest.raises(SystemExit) as end:
        cup3.main([word])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert shown.startswith("Cup3 trains a text-to-image latent diffusion model")
    assert all(re.search(rf"^  {command} ", shown, re.MULTILINE) for command in cup3.COMMANDS)
    for words in re.findall(r"python cup3\.py ?(.*?)(?:   |\n)", shown):
        with contextlib.suppress(SystemExit):  # a command that shows its help
            assert cup3.parse(shlex.split(words))


def test_ctrl_c_in_another_command_is_told_in_one_line(monkeypatch, capsys):
    with RunFolder.open("runs/paper-flowers", {}):
        pass

    def interrupted(**request):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "write_pictures", interrupted)
    assert cup3.main(["generate", "--prompt", "x"]) == 130
    assert capsys.readouterr().err == "\ncup3: stopped; nothing was half written\n"


def test_a_stopped_training_ends_with_the_signals_code(monkeypatch, capsys):
    def stopped(config):
        raise stages.Stopped("runs/x", 15)

    monkeypatch.setattr(stages, "train", stopped)
    with pytest.raises(SystemExit) as end:
        cup3.main([])
    assert end.value.code == 143
    message = "cup3: Stopped; runs/x is saved. Give the same command again to go on."
    assert capsys.readouterr().err == f"\n{message}\n"


def test_faults_of_our_own_are_not_dressed_up(monkeypatch):
    def fault(config):
        raise RuntimeError("a fault")

    monkeypatch.setattr(stages, "train", fault)
    with pytest.raises(RuntimeError, match="a fault"):
        cup3.main([])


REFUSED_AT_ONCE = [
    ["--preset", "x"],
    ["--image-size", "63"],
    ["--gpus", "first"],
    ["--data", "absent"],
    ["--vae-from", "absent"],
    ["--run", "other"],
    ["--run", "begun", "--seed", "1"],
    ["generate"],
    ["generate", "--prompt", "x", "--sampler", "plms"],
    ["generate", "--prompt", "x", "--run", "absent"],
]


def test_what_can_be_refused_at_once_is_refused_before_tensorflow_and_the_settings(tmp_path):
    # Not after the seconds that TensorFlow takes to import and a screen full of settings.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with RunFolder.open(tmp_path / "begun", settings.to_dict(Config())):
        pass
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import cup3\n"
    script += f"codes = [cup3.main(line) for line in {REFUSED_AT_ONCE}]\n"
    script += "sys.exit(0 if set(codes) == {2} and 'tensorflow' not in sys.modules else 1)"
    process = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "")
    received = ["'x'", "63", "'first'", "absent", "absent", "other", "begun/config.json", "none"]
    received += ["'plms'", "absent"]
    for line, value in zip(process.stderr.splitlines(), received, strict=True):
        assert line.startswith("cup3: ") and value in line
    assert sorted(os.listdir(tmp_path)) == ["begun", "other"]


def test_a_run_without_conditioning_needs_no_prompt(monkeypatch):
    requests = []
    monkeypatch.setattr(generate, "write_pictures", lambda **request: requests.append(request))
    for name in ("none", "class"):
        with RunFolder.open(name, settings.to_dict(settings.conditioned(Config(), name))):
            pass
        assert cup3.main(["generate", "--run", name, "--count", "3"]) == (0 if name == "none" else 2)
    assert [(request["prompt"], request["count"]) for request in requests] == [((), 3)]


def test_a_run_that_is_missing_is_refused_with_those_that_are_there(tmp_path, capsys):
    for name in ("b", "a"):
        with RunFolder.open(tmp_path / "runs" / name, {}):
            pass
    assert cup3.main(["generate", "--prompt", "x"]) == 2
    assert capsys.readouterr().err.endswith("; there are: runs/a, runs/b\n")


# As a user meets it: processes of their own.


def started(words, **options):
    command = [sys.executable, str(ROOT / "cup3.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_reader_that_leaves_ends_it_quietly():
    process = started(["train", "--help"])
    process.stdout.close()  # as `head` does when it has seen enough
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 128 + signal.SIGPIPE


def run_script(script, error=subprocess.PIPE, **environment):
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import cup3, os, warnings\n{script}"
    kept = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    environment = {**kept, **environment}
    streams = {"stdout": subprocess.PIPE, "stderr": error, "text": True}
    return subprocess.run([sys.executable, "-c", script], env=environment, **streams)


def test_tensorflow_is_imported_without_a_word():
    process = run_script(
        "with cup3._without_notes():\n import tensorflow as tf\ntf.config.list_physical_devices()"
    )
    assert (process.returncode, process.stderr) == (0, "")


SAID = "I0000 00:00 port.cc: oneDNN\nlast words\n"
SAYING = f"with cup3._without_notes():\n os.write(2, {SAID.encode()}); {{}}\nos.write(2, b'I0000 later\\n')"


@pytest.mark.parametrize(("level", "told"), [(None, "last words\n"), ("1", "last words\n"), ("0", SAID)])
def test_only_notes_are_kept_from_the_user_and_only_unasked(level, told):
    environment = {} if level is None else {"TF_CPP_MIN_LOG_LEVEL": level}
    process = run_script(SAYING.format("print('so far', file=sys.stderr)"), **environment)
    assert (process.returncode, process.stderr) == (0, f"{told}so far\nI0000 later\n")


def test_an_import_that_fails_tells_everything():
    process = run_script(SAYING.format("import no_such_module"))
    assert process.returncode == 1
    assert process.stderr.startswith(f"{SAID}Traceback") and "no_such_module" in process.stderr
    process = run_script(SAYING.format("raise KeyboardInterrupt"))
    assert process.stderr.startswith("last words\nTraceback")  # which is no failure


def test_an_import_that_kills_the_process_leaves_its_place():
    process = run_script(f"def imported():\n os.abort()\n{SAYING.format('imported()')}")
    assert process.returncode == -signal.SIGABRT
    assert process.stderr.startswith("Fatal Python error: Aborted\n") and "in imported" in process.stderr
    later = run_script(SAYING.format("pass") + "\nos.abort()")
    assert later.stderr == "last words\nI0000 later\n"  # as Python has it
    later = run_script(SAYING.format("pass") + "\nos.abort()", PYTHONFAULTHANDLER="1")
    assert later.stderr.startswith("last words\nI0000 later\nFatal Python error: Aborted\n")


def test_a_process_that_an_import_leaves_behind_holds_nothing_up():
    script = "import subprocess\nwith cup3._without_notes():\n subprocess.Popen(['sleep', '20'], stdout=-3)\n"
    started = time.monotonic()
    process = run_script(script + "os.write(1, b'on\\n')", error=subprocess.DEVNULL)
    assert (process.returncode, process.stdout) == (0, "on\n")
    assert time.monotonic() - started < 15


def test_a_warning_is_a_line_for_users():
    script = "warnings.formatwarning = cup3._plain_warning\nwarnings.warn('2 texts cut')\n"
    script += "warnings.warn('an old call', FutureWarning)"
    lines = run_script(script).stderr.splitlines()
    assert lines[0] == "warning: 2 texts cut"
    assert lines[1].endswith("FutureWarning: an old call")
