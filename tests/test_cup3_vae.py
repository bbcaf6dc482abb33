"""The command train-vae trains an autoencoder alone, and knows which flags are none of its own."""

import dataclasses
import os
import re

import pytest

import config as settings
import cup3
import stages
from checkpoint import RunFolder
from config import Config
from errors import InputError

READY = [name for name, entry in settings.PRESETS.items() if entry.config]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test finds the runs and the data of whoever runs it."""
    monkeypatch.chdir(tmp_path)


def test_without_a_flag_it_is_the_default_presets_autoencoder():
    command, config = cup3.parse(["train-vae"])
    assert (command, config) == ("train-vae", settings.autoencoder_alone(Config()))
    assert type(config) is Config
    assert (config.run, config.conditioning, config.train_vae) == ("runs/paper-flowers-vae", "none", True)
    settings.check(config, autoencoder_alone=True)


@pytest.mark.parametrize("name", READY)
def test_a_preset_sets_the_defaults_and_a_folder_of_its_own(name):
    expected = settings.autoencoder_alone(settings.preset(name, diffusion=False))
    for words in (["--preset", name], [f"--preset={name}"]):
        assert cup3.parse(["train-vae", *words]) == ("train-vae", expected)
    assert expected.run == f"runs/{name.removesuffix('-vae')}-vae"


def test_its_settings_have_their_flags():
    line = "train-vae --run r --data d --seed 3 --image-size 32 --track 5 --vae-from other --vae.skips --vae.tanh"
    line += " --vae-training.epochs 2 --vae-training.recon-loss mix --vae-training.l1-share 0.25"
    line += " --vae-training.kl-schedule cyclical --vae-training.early-stopping 4 --vae-training.keep best"
    line += " --vae-training.decoder-only --vae-training.perceptual-heads h --vae-training.schedule plateau"
    line += (
        " --adversarial.weight 0.5 --adversarial.no-guard --adversarial.spectral-norm --adversarial.norm none"
    )
    line += " --training.validation-fraction 0.25"
    _, config = cup3.parse(line.split())
    base = settings.autoencoder_alone(Config())
    stage = {"epochs": 2, "recon_loss": "mix", "l1_share": 0.25, "kl_schedule": "cyclical", "keep": "best"}
    stage |= {"early_stopping": 4, "decoder_only": True, "perceptual_heads": "h", "schedule": "plateau"}
    adversarial = {"weight": 0.5, "guard": False, "spectral_norm": True, "norm": "none"}
    start = {"run": "r", "data": "d", "seed": 3, "image_size": 32, "track": 5, "vae_from": "other"}
    assert config == dataclasses.replace(
        base,
        **start,
        vae=dataclasses.replace(base.vae, skips=True, tanh=True),
        vae_training=dataclasses.replace(base.vae_training, **stage),
        adversarial=dataclasses.replace(base.adversarial, **adversarial),
        training=dataclasses.replace(base.training, validation_fraction=0.25),
    )


def test_light_is_the_small_autoencoder_alone():
    for name in ("cup3", "afhq"):
        small = settings.autoencoder_alone(settings.light(settings.preset(name)))
        assert cup3.parse(["train-vae", "--preset", name, "--light"]) == ("train-vae", small)
        settings.check(small, autoencoder_alone=True)
    with pytest.raises(InputError, match="^--light: received with --preset ffhq-vae, "):
        cup3.parse(["train-vae", "--preset", "ffhq-vae", "--light"])


def test_the_help_shows_no_flag_of_the_networks_that_it_does_not_train(capsys):
    with pytest.raises(SystemExit) as end:
        cup3.parse(["train-vae", "--help"])
    assert end.value.code == 0
    flags = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
    parts = {flag.split(".")[0] for flag in flags}
    assert not parts & {"--unet", "--text-encoder", "--diffusion", "--conditioning", "--text-from"}
    assert {"--vae-training.kl-schedule", "--adversarial.guard-drop", "--vae.skips", "--preset"} <= flags


REFUSED = [
    (
        "train-vae --unet.blocks 1",
        "--unet.blocks: is a flag of train, not of train-vae; type python cup3.py train ",
    ),
    ("train-vae --diffusion.target=flow", "--diffusion.target: is a flag of train, not of train-vae; type "),
    (
        "train-vae --conditioning text",
        "--conditioning: is a flag of train, not of train-vae; type python cup3.py",
    ),
    (
        "train-vae --text-from r",
        "--text-from: is a flag of train, not of train-vae; type python cup3.py train",
    ),
    (
        "train-vae --no-train-vae",
        "--no-train-vae: is a flag of train, not of train-vae; type python cup3.py tra",
    ),
    (
        "train-vae --train-vae",
        "--train-vae: is a flag of train, not of train-vae; type python cup3.py train --tr",
    ),
    (
        "train-vae --epochs 3",
        "--epochs: is a flag of train, not of train-vae; type python cup3.py train --epochs ...; of the autoencoder: "
        "--vae-training.epochs\n",
    ),
    (
        "train-vae --batch-size=3",
        "--batch-size: is a flag of train, not of train-vae; type python cup3.py train --batch-size ...; of the "
        "autoencoder: --vae-training.batch-size\n",
    ),
    (
        "train-vae --prompt x",
        "--prompt: is a flag of generate, not of train-vae; type python cup3.py generate --",
    ),
    (
        "generate --vae-training.epochs 3",
        "--vae-training.epochs: is a flag of train, not of generate; type python ",
    ),
    (
        "data --adversarial.weight=1",
        "--adversarial.weight: is a flag of train, not of data; type python cup3.py t",
    ),
    (
        "--seed 1 train-vae",
        "train-vae: received after other words, but a command comes first; type python cup3.py",
    ),
    (
        "train --preset ffhq-vae",
        "--preset: received 'ffhq-vae', an autoencoder alone, expected one of paper-flowers, cup3, afhq; or type "
        "python cup3.py train-vae --preset ffhq-vae ...\n",
    ),
    (
        "--preset=ffhq-vae",
        "--preset: received 'ffhq-vae', an autoencoder alone, expected one of paper-flowers",
    ),
    ("train-vae --preset coco", "--preset: received 'coco', which needs CLIP"),
    ("train-vae --preset ffhq-vae", "ffhq: is no folder; expected one with pictures"),
    ("train-vae --vae-from absent", "absent: received a folder without config.json"),
    (
        "train-vae --image-size 60",
        "--image-size: received 60, expected a multiple of 8, the factor of the autoen",
    ),
    (
        "train-vae --vae-training.decoder-only",
        "--vae-training.decoder-only: received alone, expected --vae-from, the run whose e",
    ),
    ("--vae.skips", "--vae.skips: received with a diffusion model, whose samples such an autoencoder cannot"),
]


@pytest.mark.parametrize(("line", "refusal"), REFUSED, ids=[line for line, _ in REFUSED])
def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path, capsys, line, refusal):
    assert cup3.main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cup3: {refusal}")
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_it_reaches_its_function_and_no_other(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(stages, "train_vae", calls.append)
    monkeypatch.setattr(stages, "train", lambda config: pytest.fail("the whole model is trained"))
    assert cup3.main(["train-vae", "--seed", "5", "--vae.skips", "--image-size", "40"]) == 0
    expected = cup3.parse(["train-vae", "--seed", "5", "--vae.skips", "--image-size", "40"])[1]
    assert calls == [expected]
    assert '"run": "runs/paper-flowers-vae"' in capsys.readouterr().out


def test_a_run_folder_of_a_whole_model_is_refused(capsys):
    with RunFolder.open("r", settings.to_dict(Config())):
        pass
    assert cup3.main(["train-vae", "--run", "r"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cup3: r/config.json: another config") and error.count("\n") == 1


def test_a_stop_ends_it_with_the_signals_code(monkeypatch, capsys):
    def stopped(config):
        raise stages.Stopped("runs/x", 2)

    monkeypatch.setattr(stages, "train_vae", stopped)
    with pytest.raises(SystemExit) as end:
        cup3.main(["train-vae"])
    assert end.value.code == 130
    assert capsys.readouterr().err.startswith("\ncup3: Stopped; runs/x is saved.")
