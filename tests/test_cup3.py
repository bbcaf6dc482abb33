"""Words become settings, and every refusal is one line and exit code 2."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

import config as settings
import cup3
import generate
import stages
from config import Config
from dataset import paper_flowers

ROOT = Path(cup3.__file__).parent


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


def test_the_other_commands_have_their_settings():
    line = ["generate", "--run", "r", "--prompt", "a b", "--prompt", "c", "--count", "2", "--guidance", "1.5"]
    expected = cup3.Generate(run="r", prompt=("a b", "c"), count=2, guidance=1.5)
    assert cup3.parse(line) == ("generate", expected)
    assert cup3.parse(["data", "--train", "7"]) == ("data", cup3.Data(train=7))


def test_train_generate_and_data_reach_their_functions(monkeypatch, capsys):
    calls = {}
    monkeypatch.setattr(stages, "train", lambda config: calls.update(train=config))
    monkeypatch.setattr(generate, "write_pictures", lambda **request: calls.update(generate=request))
    monkeypatch.setattr(
        paper_flowers, "write", lambda folder, **numbers: calls.update(data=(folder, numbers))
    )
    assert cup3.main(["--seed", "5"]) == 0
    assert '"seed": 5' in capsys.readouterr().out  # a run prints its config
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
        (["rain"], "command: received 'rain', expected one of train, generate"),
        (["--preset", "roses"], "--preset: received 'roses', expected one of paper-flowers, cup3"),
        (["--preset", "coco"], "--preset: received 'coco', which needs CLIP"),
        (["--image-size", "63"], "--image-size: received 63, expected a multiple of"),
        (["--batch-size", "-5"], "--batch-size: received -5, expected"),
        (["--data", "absent", "--run", "r"], "absent: is no folder; expected one with captioned pictures"),
        (["--gpus", "first"], "--gpus: received 'first', expected all, none, or indices"),
        (["generate", "--run", "absent", "--prompt", "x"], "absent: received a folder without config.json"),
        (["generate", "--prompts", "absent.txt"], "--prompts: received absent.txt, expected a text file"),
        (["data", "--size", "16"], "paper flowers: size must be 32 to 512. Received: 16"),
        (["data", "--train", "0"], "paper flowers: train must be a whole number of at least 1"),
        (["data", "--out", "."], ".: expected a new or empty folder"),
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
    assert wanted.get(line[0], "python cup3.py generate --help") in shown


def test_ctrl_c_in_another_command_is_told_in_one_line(monkeypatch, capsys):
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


def test_the_words_are_parsed_without_tensorflow():
    # A mistyped flag is told at once, not after the seconds that TensorFlow takes to import.
    script = "import sys, cup3; code = cup3.main(['--preset', 'x']); "
    script += "sys.exit(code + 10 * ('tensorflow' in sys.modules))"
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("cup3: --preset: received 'x'")
