"""What the tests of whole runs share: the command line of a tiny training, and what is compared of two runs."""

import numpy as np

import cup3
from checkpoint import RunFolder

STEPS, EPOCHS = 3, 2

# Every setting that the tests look at, so that none depends on the defaults.
TINY = {
    "image-size": 32,
    "vae.level-channels": (4, 4),
    "vae.blocks": (0, 0),
    "vae.latent-channels": 2,
    "vae.groups": 2,
    "text-encoder.width": 8,
    "text-encoder.layers": 1,
    "text-encoder.heads": 2,
    "unet.level-channels": 8,
    "unet.attention-levels": True,
    "unet.blocks": 0,
    "unet.head-channels": 4,
    "unet.groups": 4,
    "unet.ff-expansion": 1,
    "vae-training.epochs": EPOCHS,
    "vae-training.steps-per-epoch": STEPS,
    "vae-training.batch-size": 8,
    "vae-training.perceptual-weight": 0,
    "vae-training.optimizer": "adamw",
    "vae-training.learning-rate": 0.004,
    "diffusion.weight": "uncertainty",
    "training.optimizer": "muon",
    "training.learning-rate": 0.003,
    "training.times": "logit_normal",
    "training.offset-noise": 0.1,
    "training.input-perturbation": 0.1,
    "training.snapshots": 2,
    "epochs": EPOCHS,
    "training.steps-per-epoch": STEPS,
    "batch-size": 8,
    "training.validation-fraction": 0.125,
    "evaluation.size": 32,
    "evaluation.sampler": "dpmpp-2m",
    "evaluation.spacing": "trailing",
    "evaluation.steps": 2,
    "evaluation.guidance": 2.0,
    "evaluation.autoguidance": 1.5,
    "evaluation.weak": 0.5,
    "evaluation.images": 6,
    "evaluation.every": 1,
    "evaluation.previews": 4,
}


def words(data, run, /, of=TINY, **changes):
    """The command line of a tiny training, of the settings `of` and what changes them."""
    flags = {**of, "data": data, "run": run, **{name.replace("_", "-"): changes[name] for name in changes}}
    line = []
    for name, value in flags.items():
        line += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return line


def config(data, run, /, **changes):
    return cup3.parse(words(data, run, **changes))[1]


def refusal(capsys, line):
    """The one line on standard error of a command that was refused."""
    assert cup3.main(line) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.removeprefix("cup3: ").rstrip("\n")


def final_tensors(run, stage):
    with RunFolder.open(run, RunFolder.read(run).config) as folder:
        return folder.latest(stage).tensors


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
