"""Settings that cannot work are refused by name."""

import contextlib
import dataclasses
import itertools
import math

import pytest

import config as settings
from config import Config, check, checks, part
from diffusion import samplers, schedule, targets, times
from errors import InputError
from model import discriminator, lpips
from model._trunks import PLANS
from trainer import losses


def changed(base, **changes):
    """The config with `part__name=value` or `name=value` replaced."""
    for place, value in changes.items():
        *parts, name = place.split("__")
        if parts:
            own = dataclasses.replace(getattr(base, parts[0]), **{name: value})
            base = dataclasses.replace(base, **{parts[0]: own})
        else:
            base = dataclasses.replace(base, **{name: value})
    return base


FINITE = "expected a finite number, at least"


def place(flag):
    """The keyword of `changed` for a flag."""
    short = {"epochs": "training.epochs", "batch-size": "training.batch-size"}
    return short.get(flag, flag).replace(".", "__").replace("-", "_")


TOO_SMALL = [  # setting, value, the least that works
    ("image-size", 4, 8),
    ("image-size", -64, 8),
    ("seed", -1, 0),
    ("epochs", 0, 1),
    ("batch-size", -5, 1),
    ("training.latent-crops", 0, 1),
    ("training.snapshots", -1, 0),
    ("vae-training.epochs", 0, 1),
    ("vae-training.batch-size", 0, 1),
    ("vae-training.kl-weight", -1.0, 0),
    ("vae-training.perceptual-weight", -1.0, 0),
    ("vae-training.recon-weight", -0.5, 0),
    ("vae-training.recon-weight", math.nan, 0),
    ("vae-training.kl-warmup-steps", -1, 0),
    ("vae-training.kl-cycles", 0, 1),
    ("vae-training.free-bits", -0.1, 0),
    ("vae-training.measure-every", -1, 0),
    ("vae-training.plateau-epochs", 0, 1),
    ("vae-training.early-stopping", 0, 1),
    ("vae-training.previews", 0, 1),
    ("vae-training.micro-batches", 0, 1),
    ("adversarial.weight", -0.5, 0),
    ("adversarial.weight", math.inf, 0),
    ("adversarial.start", -1, 0),
    ("adversarial.limit", math.nan, 0),
    ("adversarial.r1-weight", -1.0, 0),
    ("adversarial.lecam-weight", -1.0, 0),
    ("adversarial.learning-rate", -1e-4, 0),
    ("adversarial.channels", 0, 1),
    ("adversarial.layers", 0, 1),
    ("adversarial.groups", 0, 1),
    ("adversarial.guard-drop", -1.0, 0),
    ("adversarial.guard-drop", math.nan, 0),
    ("adversarial.guard-ratio", 0.0, 1e-6),
    ("adversarial.guard-gap", 0.0, 1e-6),
    ("track", -1, 0),
    ("diffusion.shift", 0.0, 0.001),
    ("diffusion.snr-cap", -5.0, 0.001),
    ("evaluation.images", 2, 3),
    ("evaluation.every", 0, 1),
    ("evaluation.steps", 0, 1),
    ("evaluation.batch-size", 0, 1),
    ("evaluation.previews", 0, 1),
    ("evaluation.size", 31, 32),
    ("vae.latent-channels", 0, 1),
    ("vae.groups", 0, 1),
    ("unet.groups", 0, 1),
    ("unet.blocks", -1, 0),
    ("unet.ff-expansion", 0, 1),
    ("text-encoder.width", 0, 1),
    ("text-encoder.heads", 0, 1),
    ("text-encoder.layers", -1, 0),
]


REFUSED = [
    *(
        ({place(flag): value}, f"--{flag}: received {value}, {FINITE} {least}")
        for flag, value, least in TOO_SMALL
    ),
    ({"seed": 2**32}, f"--seed: received {2**32}, expected at most {2**32 - 1}"),
    ({"evaluation__size": 1025}, "--evaluation.size: received 1025, expected at most 1024"),
    (
        {"evaluation__network": "inception_v3", "evaluation__size": 74},
        f"--evaluation.size: received 74, {FINITE} 75",
    ),
    ({"evaluation__guidance": math.nan}, "--evaluation.guidance: received nan, expected a finite number"),
    ({"evaluation__guidance": -math.inf}, "--evaluation.guidance: received -inf, expected a finite number"),
    (
        {"evaluation__network": "vgg"},
        "--evaluation.network: received 'vgg', expected one of efficientnet_lite0, inception_v3",
    ),
    ({"vae__level_channels": ()}, "--vae.level-channels: received none, expected the channels of a level"),
    ({"unet__level_channels": ()}, "--unet.level-channels: received none, expected the channels of a level"),
    (
        {"vae__level_channels": (8, 9, 8, 8), "vae__groups": 8},
        "--vae.level-channels: received 9, expected a multiple of --vae.groups (8)",
    ),
    (
        {"unet__level_channels": (-16, 16), "unet__groups": 16},
        "--unet.level-channels: received -16, expected a multiple of --unet.groups (16)",
    ),
    (
        {"vae__level_channels": (8, 8), "vae__blocks": (1,), "vae__groups": 8},
        "--vae.blocks: received 1, expected a number of at least 0 for each of the 2 levels",
    ),
    (
        {"vae__level_channels": (8, 8), "vae__blocks": (1, -1), "vae__groups": 8},
        "--vae.blocks: received 1 -1, expected a number of at least 0 for each of the 2 levels",
    ),
    ({"vae__latent_scale": 0.0}, "--vae.latent-scale: received 0.0, expected a positive number"),
    ({"vae__latent_scale": math.nan}, "--vae.latent-scale: received nan, expected a positive number"),
    (
        {"unet__level_channels": (32, 32), "unet__attention_levels": (True,)},
        "--unet.attention-levels: received 1, expected one for each of the 2 levels",
    ),
    (
        {"unet__level_channels": (32, 48), "unet__attention_levels": (True, True), "unet__head_channels": 32},
        "--unet.head-channels: received 32, expected a divisor of 48 channels",
    ),
    (
        {"text_encoder__width": 10, "text_encoder__heads": 4},
        "--text-encoder.heads: received 4, expected a divisor of the width 10",
    ),
    (
        {"image_size": 33, "vae__level_channels": (8, 8), "vae__blocks": (1, 1)},
        "--image-size: received 33, expected a multiple of 2, the factor of the autoencoder",
    ),
    (
        {"image_size": 34, "vae__level_channels": (8, 8), "vae__blocks": (1, 1)},
        "--image-size: received 34, whose latents of side 17 the U-Net cannot halve 1 times; "
        "expected a multiple of 4",
    ),
    ({"training__ema": 1.01}, "--training.ema: received 1.01, expected 0 to 1"),
    ({"training__offset_noise": -0.1}, "--training.offset-noise: received -0.1, expected 0 to 1"),
    ({"training__input_perturbation": 1.1}, "--training.input-perturbation: received 1.1, expected 0 to 1"),
    ({"training__caption_dropout": -0.1}, "--training.caption-dropout: received -0.1, expected 0 to 1"),
    (
        {"training__validation_fraction": math.nan},
        "--training.validation-fraction: received nan, expected 0 to 0.5",
    ),
    ({"augmentation__brightness": 2.0}, "--augmentation.brightness: received 2.0, expected 0 to 1"),
    ({"augmentation__contrast": -1.0}, "--augmentation.contrast: received -1.0, expected 0 to 1"),
    (
        {"augmentation__resize_min": 1.2, "augmentation__resize_max": 1.1},
        "--augmentation.resize-min: received 1.2, expected 1 to --augmentation.resize-max (1.1)",
    ),
    (
        {"augmentation__resize_min": 0.5},
        "--augmentation.resize-min: received 0.5, expected 1 to --augmentation.resize-max (1.0)",
    ),
    ({"augmentation__resize_max": 5.0}, "--augmentation.resize-max: received 5.0, expected at most 4"),
    (
        {"vae_training__optimizer": "sgd"},
        "--vae-training.optimizer: received 'sgd', expected one of adamw, muon",
    ),
    ({"training__optimizer": "Muon"}, "--training.optimizer: received 'Muon', expected one of adamw, muon"),
    (
        {"training__times": "normal"},
        "--training.times: received 'normal', expected one of uniform, logit_normal, log_normal, mixed",
    ),
    *(
        ({place(flag): value}, f"--{flag}: received {value!r}, expected one of {names}")
        for flag, value, names in (
            ("vae-training.recon-loss", "l3", "l1, mse, mix"),
            ("vae-training.kl-schedule", "sigmoid", "constant, linear, cosine, cyclical"),
            ("vae-training.schedule", "step", "cosine, constant, plateau"),
            ("vae-training.keep", "first", "last, best"),
            ("vae-training.perceptual-network", "vgg", "efficientnet_lite0, vgg16, alexnet, squeezenet"),
            ("adversarial.loss", "wgan", "hinge, vanilla, non-saturating"),
            ("adversarial.norm", "layer", "group, batch, none"),
        )
    ),
    ({"vae_training__ema": 1.5}, "--vae-training.ema: received 1.5, expected 0 to 1"),
    ({"vae_training__l1_share": -0.1}, "--vae-training.l1-share: received -0.1, expected 0 to 1"),
    (
        {"vae_training__plateau_factor": math.nan},
        "--vae-training.plateau-factor: received nan, expected 0 to 1",
    ),
    (
        {"adversarial__weight": 0.5, "adversarial__channels": 24},
        "--adversarial.channels: received 24, expected a multiple of --adversarial.groups (16)",
    ),
    (
        {"adversarial__weight": 0.5, "adversarial__layers": 5},
        "--adversarial.layers: received 5, whose patches are larger than pictures of 64 px; expected at most 4",
    ),
    (
        {"vae__skips": True},
        "--vae.skips: received with a diffusion model, whose samples such an autoencoder cannot decode, as it needs a "
        "picture's features; expected without, or python cup3.py train-vae",
    ),
    (
        {"vae_training__decoder_only": True},
        "--vae-training.decoder-only: received alone, expected --vae-from, the run whose encoder and latents stay as "
        "they are, and --train-vae or the command train-vae",
    ),
    (
        {"vae_training__perceptual_depth": 6},
        "--vae-training.perceptual-depth: received 6, expected one of 1, 2, 3, 4, 5",
    ),
    (
        {"vae_training__perceptual_weights": "none.pth"},
        "--vae-training.perceptual-weights none.pth: received a path that is no file, expected one of weights",
    ),
    (
        {"vae_training__perceptual_heads": "none.pth"},
        "--vae-training.perceptual-heads none.pth: received a path that is no file, expected one of weights",
    ),
    (
        {"diffusion__target": "score"},
        "--diffusion.target: received 'score', expected one of noise, image, velocity, flow, edm",
    ),
    (
        {"diffusion__schedule": "Linear"},
        "--diffusion.schedule: received 'Linear', expected one of cosine, cosine-squared, linear, scaled-linear, "
        "sigmoid, flow, edm",
    ),
    (
        {"diffusion__weight": "snr"},
        "--diffusion.weight: received 'snr', expected one of none, min-snr, edm, uncertainty",
    ),
    (
        {"evaluation__sampler": "DDIM"},
        "--evaluation.sampler: received 'DDIM', expected one of ddpm, ddim, euler, euler-ancestral, heun, dpmpp-2m, "
        "dpmpp-2m-sde, unipc, pndm",
    ),
    (
        {"evaluation__spacing": "linspace"},
        "--evaluation.spacing: received 'linspace', expected one of uniform, leading, trailing, karras, "
        "logsnr-uniform",
    ),
    (
        {"evaluation__spacing": "trailing", "evaluation__steps": 1001},
        "--evaluation.steps: received 1001 with --evaluation.spacing trailing, expected at most 1000",
    ),
    ({"diffusion__loss": "l1"}, "--diffusion.loss: received 'l1', expected one of mse, mae, huber"),
    ({"diffusion__snr_cap": 1001.0}, "--diffusion.snr-cap: received 1001.0, expected at most 1000.0"),
    (
        {"diffusion__zero_terminal_snr": True},
        "--diffusion.zero-terminal-snr: received with --diffusion.schedule cosine, expected with one of "
        "cosine-squared, linear, scaled-linear, sigmoid",
    ),
    (
        {"diffusion__schedule": "linear", "diffusion__shift": 3.0},
        "--diffusion.shift: received 3.0 with --diffusion.schedule linear, expected 1, or --diffusion.schedule flow",
    ),
    (
        {
            "diffusion__schedule": "linear",
            "diffusion__zero_terminal_snr": True,
            "diffusion__target": "noise",
        },
        "--diffusion.target: received noise with --diffusion.zero-terminal-snr, where time 1 has no signal and its "
        "noise tells nothing of the picture; expected one of image, velocity, flow, edm",
    ),
    (
        {"diffusion__schedule": "flow", "diffusion__target": "noise"},
        "--diffusion.target: received noise with --diffusion.schedule flow, where time 1 has no signal and its "
        "noise tells nothing of the picture; expected one of image, flow, edm",
    ),
    (
        {"diffusion__schedule": "edm", "diffusion__target": "velocity"},
        "--diffusion.target: received velocity with --diffusion.schedule edm, whose rates are on no circle; "
        "expected one of noise, image, flow, edm",
    ),
    *(
        (
            {"diffusion__min_signal_rate": least, "diffusion__max_signal_rate": most},
            f"--diffusion.min-signal-rate and --diffusion.max-signal-rate: received {least} and {most}, "
            "expected 0 < min < max < 1",
        )
        for least, most in ((0.0, 0.95), (0.02, 1.0), (0.5, 0.5), (math.nan, 0.95))
    ),
    (
        {"vae__level_channels": (8,)},
        "--vae.blocks: received 1 1, expected a number of at least 0 for each of the 1 level",
    ),
    ({"conditioning": "label"}, "--conditioning: received 'label', expected one of text, class, none"),
    (
        {"conditioning": "none", "evaluation__guidance": 2.0},
        "--evaluation.guidance: received 2.0 with --conditioning none, where there is nothing to follow; expected 1, "
        "which is off",
    ),
    (
        {"conditioning": "class"},
        "--conditioning: received class with dataset/paper_flowers, whose flowers have captions but no classes; "
        "expected --data with a folder of pictures in classes (see dataset/README.md)",
    ),
    *(
        ({"gpus": gpus}, f"--gpus: received {gpus!r}, expected all, none, or indices such as 0,2")
        for gpus in ("", "first", "-1", "0;1", "0,")
    ),
    (
        {"train_vae": False},
        "--no-train-vae: expected --vae-from, the run to take a trained autoencoder from",
    ),
    *(
        (
            {f"{stage}__{name}": value},
            f"--{flag}.{name.replace('_', '-')}: received {value}, {FINITE} {least}",
        )
        for stage, flag in (("training", "training"), ("vae_training", "vae-training"))
        for name, value, least in (
            ("warmup_steps", -1, 0),
            ("learning_rate", math.inf, 0),
            ("weight_decay", -0.1, 0),
            ("clip_norm", math.nan, 0),
            ("steps_per_epoch", 0, 1),
        )
    ),
]


@pytest.mark.parametrize(("changes", "line"), REFUSED, ids=[line for _, line in REFUSED])
def test_what_cannot_work_is_refused_by_name(changes, line):
    base = changed(
        Config(),
        vae__level_channels=(8, 8),
        vae__blocks=(1, 1),
        vae__groups=8,
        unet__level_channels=(32, 32),
        unet__attention_levels=(False, True),
        unet__groups=16,
        unet__head_channels=32,
    )
    check(base)
    with pytest.raises(InputError) as refusal:
        check(changed(base, **changes))
    assert str(refusal.value) == line


def test_the_names_of_the_process_are_those_that_it_knows():
    assert settings.GRIDS == schedule.GRIDS
    assert settings.SCHEDULES == schedule.SCHEDULES
    assert settings.TARGETS == targets.TARGETS
    assert settings.LOSSES == targets.LOSSES
    assert settings.TIMES == times.TIMES
    assert settings.SPACINGS == times.SPACINGS
    assert settings.GRID_STEPS == schedule.STEPS
    assert settings.SAMPLERS == tuple(samplers.SAMPLERS)
    assert settings.WEIGHTS == targets.WEIGHTS


def test_the_names_of_the_autoencoders_training_are_those_that_it_knows():
    assert checks.RECONSTRUCTION_LOSSES == losses.ERRORS
    assert checks.KL_SCHEDULES == losses.KL_SCHEDULES
    assert checks.ADVERSARIAL_LOSSES == losses.ADVERSARIAL
    assert checks.NORMS == discriminator.NORMS
    with pytest.raises(InputError) as refusal:
        lpips.perceptual("none", 1)
    assert str(refusal.value).endswith(f"expected one of {list(checks.PERCEPTUAL_NETWORKS)}")
    assert (checks.PERCEPTUAL_NETWORKS[0], *PLANS) == checks.PERCEPTUAL_NETWORKS


@pytest.mark.parametrize("size", [24, 64, 95, 96])
def test_a_discriminators_layers_are_those_that_a_picture_has_a_patch_for(size):
    base = changed(
        Config(), image_size=size, vae__level_channels=(8,), vae__blocks=(0,), adversarial__weight=0.5
    )
    for layers in range(1, 7):
        least = discriminator.PatchDiscriminator(4, layers, groups=2).least_size
        refused = pytest.raises(InputError, match=f"^--adversarial.layers: received {layers}, ")
        with contextlib.nullcontext() if least <= size else refused:
            check(changed(base, adversarial__layers=layers), autoencoder_alone=True)


def test_an_autoencoder_alone_may_be_what_no_unet_takes():
    no_unet_halves = changed(Config(), image_size=40)  # latents of side 5
    with pytest.raises(InputError, match="^--image-size: received 40, whose latents of side 5"):
        check(no_unet_halves)
    check(no_unet_halves, autoencoder_alone=True)
    with pytest.raises(
        InputError, match="^--image-size: received 42, expected a multiple of 8, the factor of"
    ):
        check(changed(Config(), image_size=42), autoencoder_alone=True)
    check(changed(Config(), vae__skips=True, vae__tanh=True), autoencoder_alone=True)
    with pytest.raises(InputError, match="^--vae-training.epochs: received 0"):  # as ever
        check(changed(Config(), vae_training__epochs=0), autoencoder_alone=True)


def processes():
    """Every schedule with every target, with and without signal at its end, and with a shift of the times."""
    for name, target in itertools.product(settings.SCHEDULES, settings.TARGETS):
        for own in ({}, {"zero_terminal_snr": True}, {"shift": 3.0}):
            yield settings.DiffusionConfig(target=target, schedule=name, **own)


def test_a_process_is_refused_where_the_schedule_cannot_express_it():
    for own in processes():
        with contextlib.ExitStack() as refusals:
            try:
                schedule.Process(**part(own))
            except ValueError:
                refusals.enter_context(
                    pytest.raises(InputError, match=r"^--diffusion\.[a-z-]+: received [^\n]*$")
                )
            check(dataclasses.replace(Config(), diffusion=own))


def test_the_targets_that_a_refusal_names_work():
    for own in processes():
        try:
            check(dataclasses.replace(Config(), diffusion=own))
        except InputError as refusal:
            if str(refusal).startswith("--diffusion.target"):
                named = str(refusal).split("expected one of ")[1].split(", ")
                for target in settings.TARGETS:
                    other = dataclasses.replace(own, target=target)
                    with contextlib.nullcontext() if target in named else pytest.raises(InputError):
                        check(dataclasses.replace(Config(), diffusion=other))


def test_what_is_at_the_edge_works():
    check(changed(Config(), conditioning="none", evaluation__guidance=1.0))
    check(changed(Config(), conditioning="class", data="elsewhere"))
    check(changed(Config(), seed=2**32 - 1, training__warmup_steps=0, training__clip_norm=0.0))
    check(changed(Config(), training__steps_per_epoch=None, vae_training__steps_per_epoch=None))
    check(changed(Config(), evaluation__size=1024, augmentation__resize_max=4.0))
    check(changed(Config(), train_vae=False, vae_from="elsewhere"))
    check(
        changed(
            Config(), vae__tanh=True, track=1, vae_training__early_stopping=1, vae_training__recon_weight=0.0
        )
    )
    check(changed(Config(), vae_training__decoder_only=True, vae_from="elsewhere", train_vae=True))
    check(changed(Config(), vae_training__ema=1.0))
    check(changed(Config(), vae_training__free_bits=0.0, vae_training__plateau_factor=0.0))
    check(changed(Config(), adversarial__layers=9))  # of none
    check(changed(Config(), adversarial__norm="none", adversarial__channels=3, adversarial__weight=0.5))
    check(changed(Config(), adversarial__guard_drop=0.0, adversarial__start=10**9))
    check(changed(Config(), training__ema=0.0, training__caption_dropout=1.0, vae__latent_scale=0.18215))
