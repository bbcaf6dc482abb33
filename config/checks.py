"""Refusals of settings that cannot work, before anything is done and before TensorFlow is imported."""

import math
import re
from pathlib import Path

from config.settings import Config, part
from errors import InputError

LARGEST_VALIDATION_FRACTION = 0.5
LARGEST_SEED = 2**32 - 1  # that NumPy's generator takes
FEWEST_FOR_KID = 3  # pictures on either side, for its estimate and its interval
LARGEST_VIEW = 1024  # side at which a feature network sees pictures: far beyond what any was trained on
LARGEST_RESIZE = 4  # factor before the random crop

# The names that `diffusion` knows, here too so that a wrong one is refused before TensorFlow is imported.
GRIDS = ("cosine-squared", "linear", "scaled-linear", "sigmoid")  # schedules of 1,000 steps
SCHEDULES = ("cosine", *GRIDS, "flow", "edm")
TARGETS = ("noise", "image", "velocity", "flow", "edm")
WEIGHTS = ("none", "min-snr", "edm", "uncertainty")
LOSSES = ("mse", "mae", "huber")
TIMES = ("uniform", "logit_normal", "log_normal", "mixed")
SAMPLERS = ("ddpm", "ddim", "euler", "euler-ancestral", "heun", "dpmpp-2m", "dpmpp-2m-sde", "unipc", "pndm")
SPACINGS = ("uniform", "leading", "trailing", "karras", "logsnr-uniform")
# Most steps of the spacings leading and trailing, which take them from the discrete chain's.
GRID_STEPS = 1000
RECONSTRUCTION_LOSSES = ("l1", "mse", "mix")
KL_SCHEDULES = ("constant", "linear", "cosine", "cyclical")
ADVERSARIAL_LOSSES = ("hinge", "vanilla", "non-saturating")
NORMS = ("group", "batch", "none")
PERCEPTUAL_NETWORKS = ("efficientnet_lite0", "vgg16", "alexnet", "squeezenet")
RATE_SCHEDULES = ("cosine", "constant", "plateau")
CONDITIONINGS = ("text", "class", "none")
# Least side in pixels of what each network sees, and of the window of SSIM.
LEAST_SEEN = {"efficientnet_lite0": 8, "vgg16": 16, "alexnet": 31, "squeezenet": 17}
SSIM_WINDOW = 11
SMALLEST_LIMIT = 1e-6  # of what the guard holds the adversarial loss to
PROCESS_RANGE = (1e-3, 1e3)  # of the shift and the SNR's cap


def check(config: Config, autoencoder_alone=False) -> None:
    """Refuses settings that cannot work, before anything is done.

    Args:
        config: all settings.
        autoencoder_alone: whether nothing but the autoencoder will be trained.

    Raises:
        InputError: names the setting, the value received and the value expected.
    """
    _check_ranges(config)
    _check_guidance(config)
    _check_widths(config)
    _check_sides(config, autoencoder_alone)
    _check_names(config)
    if not autoencoder_alone:
        _check_conditioning(config)
    _check_adversary(config)
    _check_seen_size(config)
    _check_process(config.diffusion)
    check_sampling(
        "--evaluation.", config.evaluation.sampler, config.evaluation.spacing, config.evaluation.steps
    )
    _check_autoencoders_use(config, autoencoder_alone)
    _check_files(config)


def check_same(flag, path, prefix, received: dict, expected, but=()) -> None:
    """Refuses another run whose part of the settings differs from this one's.

    Args:
        flag: that named the other run.
        path: of the other run.
        prefix: of the part's flags, such as "--vae.".
        received: the part in the other run's config.
        expected: this run's part.
        but: names that may differ.

    Raises:
        InputError: names the settings that differ, and their flags.
    """
    told, flags = [], []
    for name, value in part(expected).items():
        # A run of before the setting is as its default.
        other = received.get(name, getattr(type(expected), name))
        if name not in but and _listed(other) != _listed(value):
            told.append(
                f"{prefix}{name.replace('_', '-')} is {_in_words(other)}, expected {_in_words(value)}"
            )
            flags.append(flag_of(prefix, name, other))
    if told:
        raise InputError(f"{flag}: received {path}, whose {', and '.join(told)}; give {' '.join(flags)}")


def flag_of(prefix, name, value) -> str:
    """A setting as the command line takes it: `--vae.tanh`, `--vae.no-tanh`, `--vae.blocks 0 1`."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"{prefix}{flag}" if value else f"{prefix}no-{flag}"
    return f"{prefix}{flag} {_in_words(value)}"


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def _in_words(value):
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def vae_factor(config: Config) -> int:
    """Pixels a latent along a side, as each level of the autoencoder but the last halves it."""
    return 2 ** (len(config.vae.level_channels) - 1)


def size_multiple(config: Config) -> int:
    """What the side of the pictures must be a multiple of, as each level of the autoencoder and the U-Net halves it."""
    return vae_factor(config) * 2 ** (len(config.unet.level_channels) - 1)


def check_interval(name, interval) -> None:
    """Refuses what is no interval of diffusion times, by the name of its setting.

    Raises:
        InputError: it is not (least, most) within 0 to 1.
    """
    if not 0 <= interval[0] < interval[1] <= 1:
        raise InputError(
            f"{name}: received {tuple(interval)}, expected the least and the most time, within 0 to 1"
        )


def check_strength(name, strength) -> None:
    """Refuses a strength of guidance, by the name of its setting, that is no finite number, with an InputError."""
    if not math.isfinite(strength):
        raise InputError(f"{name}: received {strength}, expected a finite number")


def check_weak(name, share) -> None:
    """Refuses what is no share of a training, by the name of its setting, with an InputError."""
    if not 0 < share < 1:
        raise InputError(f"{name}: received {share}, expected a share of the training, above 0 and below 1")


def check_sampling(prefix, sampler, spacing, steps) -> None:
    """Refuses a sampler and times that cannot be, by the names of their settings with a prefix, such as "--".

    Raises:
        InputError: an unknown name, or a number of steps that the spacing does not have.
    """
    for name, value, known in (("sampler", sampler, SAMPLERS), ("spacing", spacing, SPACINGS)):
        if value not in known:
            raise InputError(f"{prefix}{name}: received {value!r}, expected one of {', '.join(known)}")
    if spacing in ("leading", "trailing") and steps > GRID_STEPS:
        raise InputError(
            f"{prefix}steps: received {steps} with {prefix}spacing {spacing}, expected at most {GRID_STEPS}"
        )


def _check_ranges(config):
    for name, value, least in _least_values(config):
        if not least <= value < math.inf:  # written so that NaN is refused too
            raise InputError(f"--{name}: received {value}, expected a finite number, at least {least}")
    for name, value, most in _largest_values(config):
        if value > most:
            raise InputError(f"--{name}: received {value}, expected at most {most}")


def _check_guidance(config):
    evaluation = config.evaluation
    check_strength("--evaluation.guidance", evaluation.guidance)
    check_interval("--evaluation.guidance-interval", evaluation.guidance_interval)
    check_strength("--evaluation.autoguidance", evaluation.autoguidance)
    check_weak("--evaluation.weak", evaluation.weak)
    if evaluation.autoguidance != 1 and not config.training.snapshots:
        raise InputError(
            f"--evaluation.autoguidance: received {evaluation.autoguidance} with --training.snapshots 0, which "
            "keeps no early weights to lead away from; expected snapshots, or 1, which is off"
        )


def _check_sides(config, autoencoder_alone):
    """Refuses sides that the autoencoder, or the U-Net after it, cannot halve as often as it does."""
    factor, multiple = vae_factor(config), size_multiple(config)
    if config.image_size % factor:
        raise InputError(
            f"--image-size: received {config.image_size}, expected a multiple of {factor}, "
            "the factor of the autoencoder"
        )
    if config.image_size % multiple and not autoencoder_alone:
        raise InputError(
            f"--image-size: received {config.image_size}, whose latents of side {config.image_size // factor} the "
            f"U-Net cannot halve {len(config.unet.level_channels) - 1} times; expected a multiple of {multiple}"
        )


def _check_names(config):
    """Refuses shares out of 0 to their largest, names that nothing has, and GPUs that are no list."""
    for name, value, most in _fractions(config):
        if not 0 <= value <= most:
            raise InputError(f"--{name}: received {value}, expected 0 to {most}")
    for name, value, known in _choices(config):
        if value not in known:
            raise InputError(f"--{name}: received {value!r}, expected one of {', '.join(map(str, known))}")
    if not re.fullmatch(r"all|none|\d+(,\d+)*", config.gpus):
        raise InputError(f"--gpus: received {config.gpus!r}, expected all, none, or indices such as 0,2")


def _check_autoencoders_use(config, autoencoder_alone):
    """Refuses what does not go together of the autoencoder: where it is from, what of it is trained, and what for."""
    if config.vae.skips and not autoencoder_alone:
        raise InputError(
            "--vae.skips: received with a diffusion model, whose samples such an autoencoder cannot decode, as it "
            "needs a picture's features; expected without, or python cup3.py train-vae"
        )
    if config.vae_from and config.vae.latent_scale is not None and not config.train_vae:
        raise InputError(
            f"--vae.latent-scale: received {config.vae.latent_scale} with --vae-from, whose latents have a scale "
            "already; expected None, or --train-vae too"
        )
    if config.vae_training.decoder_only and not (config.vae_from and config.train_vae):
        raise InputError(
            "--vae-training.decoder-only: received alone, expected --vae-from, the run whose encoder and latents stay "
            "as they are, and --train-vae or the command train-vae"
        )
    if config.train_vae is False and config.vae_from is None:
        raise InputError("--no-train-vae: expected --vae-from, the run to take a trained autoencoder from")


def _check_files(config):
    """Refuses files of weights that are not there, before anything else is fetched."""
    for name in ("perceptual_weights", "perceptual_heads"):
        file = getattr(config.vae_training, name)
        if file is not None and not Path(file).is_file():
            flag = flag_of("--vae-training.", name, file)
            raise InputError(f"{flag}: received a path that is no file, expected one of weights")


def _least_values(config):
    vae_training, training, evaluation = config.vae_training, config.training, config.evaluation
    yield "image-size", config.image_size, 8
    yield "seed", config.seed, 0
    yield "track", config.track, 0
    yield "epochs", training.epochs, 1
    yield "batch-size", training.batch_size, 1
    yield "vae-training.epochs", vae_training.epochs, 1
    yield "vae-training.batch-size", vae_training.batch_size, 1
    for prefix, stage in (("vae-training", vae_training), ("training", training)):
        yield f"{prefix}.warmup-steps", stage.warmup_steps, 0
        yield f"{prefix}.learning-rate", stage.learning_rate, 0
        yield f"{prefix}.weight-decay", stage.weight_decay, 0
        yield f"{prefix}.clip-norm", stage.clip_norm, 0
        if stage.steps_per_epoch is not None:
            yield f"{prefix}.steps-per-epoch", stage.steps_per_epoch, 1
        if stage.micro_batches is not None:
            yield f"{prefix}.micro-batches", stage.micro_batches, 1
    for name in (
        "recon_weight",
        "kl_weight",
        "kl_warmup_steps",
        "free_bits",
        "perceptual_weight",
        "measure_every",
    ):
        yield f"vae-training.{name.replace('_', '-')}", getattr(vae_training, name), 0
    for name in ("kl_cycles", "plateau_epochs", "previews"):
        yield f"vae-training.{name.replace('_', '-')}", getattr(vae_training, name), 1
    if vae_training.early_stopping is not None:
        yield "vae-training.early-stopping", vae_training.early_stopping, 1
    adversarial = config.adversarial
    for name in ("weight", "start", "limit", "r1_weight", "lecam_weight", "learning_rate", "guard_drop"):
        yield f"adversarial.{name.replace('_', '-')}", getattr(adversarial, name), 0
    for name in ("channels", "layers", "groups"):
        yield f"adversarial.{name}", getattr(adversarial, name), 1
    for name in ("guard_ratio", "guard_gap"):
        yield f"adversarial.{name.replace('_', '-')}", getattr(adversarial, name), SMALLEST_LIMIT
    yield "training.latent-crops", training.latent_crops, 1
    yield "training.snapshots", training.snapshots, 0
    yield "diffusion.shift", config.diffusion.shift, PROCESS_RANGE[0]
    yield "diffusion.snr-cap", config.diffusion.snr_cap, PROCESS_RANGE[0]
    yield "evaluation.images", evaluation.images, FEWEST_FOR_KID
    yield "evaluation.size", evaluation.size, 75 if evaluation.network == "inception_v3" else 32
    for name in ("every", "steps", "batch_size", "previews"):
        yield f"evaluation.{name.replace('_', '-')}", getattr(evaluation, name), 1
    yield "vae.latent-channels", config.vae.latent_channels, 1
    yield "vae.groups", config.vae.groups, 1
    yield "unet.groups", config.unet.groups, 1
    yield "unet.head-channels", config.unet.head_channels, 1
    yield "unet.blocks", config.unet.blocks, 0
    yield "unet.ff-expansion", config.unet.ff_expansion, 1
    yield "text-encoder.width", config.text_encoder.width, 1
    yield "text-encoder.heads", config.text_encoder.heads, 1
    yield "text-encoder.layers", config.text_encoder.layers, 0


def _largest_values(config):
    yield "seed", config.seed, LARGEST_SEED
    yield "evaluation.size", config.evaluation.size, LARGEST_VIEW
    yield "diffusion.shift", config.diffusion.shift, PROCESS_RANGE[1]
    yield "diffusion.snr-cap", config.diffusion.snr_cap, PROCESS_RANGE[1]
    yield "augmentation.resize-max", config.augmentation.resize_max, LARGEST_RESIZE


def _fractions(config):
    yield "vae-training.ema", config.vae_training.ema, 1
    yield "vae-training.l1-share", config.vae_training.l1_share, 1
    yield "vae-training.plateau-factor", config.vae_training.plateau_factor, 1
    yield "training.ema", config.training.ema, 1
    yield "training.caption-dropout", config.training.caption_dropout, 1
    yield "training.offset-noise", config.training.offset_noise, 1
    yield "training.input-perturbation", config.training.input_perturbation, 1
    yield "training.validation-fraction", config.training.validation_fraction, LARGEST_VALIDATION_FRACTION
    yield "augmentation.brightness", config.augmentation.brightness, 1
    yield "augmentation.contrast", config.augmentation.contrast, 1


def _choices(config):
    yield "conditioning", config.conditioning, CONDITIONINGS
    vae_training, adversarial = config.vae_training, config.adversarial
    yield "vae-training.recon-loss", vae_training.recon_loss, RECONSTRUCTION_LOSSES
    yield "vae-training.kl-schedule", vae_training.kl_schedule, KL_SCHEDULES
    yield "vae-training.schedule", vae_training.schedule, RATE_SCHEDULES
    yield "vae-training.keep", vae_training.keep, ("last", "best")
    yield "vae-training.perceptual-network", vae_training.perceptual_network, PERCEPTUAL_NETWORKS
    yield "vae-training.optimizer", vae_training.optimizer, ("adamw", "muon")
    yield "adversarial.loss", adversarial.loss, ADVERSARIAL_LOSSES
    yield "adversarial.norm", adversarial.norm, NORMS
    yield "training.optimizer", config.training.optimizer, ("adamw", "muon")
    yield "training.times", config.training.times, TIMES
    yield "diffusion.target", config.diffusion.target, TARGETS
    yield "diffusion.schedule", config.diffusion.schedule, SCHEDULES
    yield "diffusion.weight", config.diffusion.weight, WEIGHTS
    yield "diffusion.loss", config.diffusion.loss, LOSSES
    yield "vae-training.perceptual-depth", vae_training.perceptual_depth, (1, 2, 3, 4, 5)
    yield "evaluation.network", config.evaluation.network, ("efficientnet_lite0", "inception_v3")


def _check_widths(config):
    for name, settings in (("vae", config.vae), ("unet", config.unet)):
        if not settings.level_channels:
            raise InputError(f"--{name}.level-channels: received none, expected the channels of a level")
        for channels in settings.level_channels:
            if channels < 1 or channels % settings.groups:
                raise InputError(
                    f"--{name}.level-channels: received {channels}, expected a multiple of --{name}.groups "
                    f"({settings.groups})"
                )
    vae, unet, text = config.vae, config.unet, config.text_encoder
    if len(vae.blocks) != len(vae.level_channels) or min(vae.blocks) < 0:
        raise InputError(
            f"--vae.blocks: received {' '.join(map(str, vae.blocks))}, expected a number of at least 0 for each "
            f"of the {_levels(vae)}"
        )
    if vae.latent_scale is not None and not 0 < vae.latent_scale < math.inf:
        raise InputError(f"--vae.latent-scale: received {vae.latent_scale}, expected a positive number")
    if len(unet.attention_levels) != len(unet.level_channels):
        raise InputError(
            f"--unet.attention-levels: received {len(unet.attention_levels)}, expected one for each of the "
            f"{_levels(unet)}"
        )
    for channels in unet.level_channels:
        if channels % unet.head_channels:
            raise InputError(
                f"--unet.head-channels: received {unet.head_channels}, expected a divisor of {channels} channels"
            )
    if text.width % text.heads:
        raise InputError(
            f"--text-encoder.heads: received {text.heads}, expected a divisor of the width {text.width}"
        )
    resize = config.augmentation
    if not 1 <= resize.resize_min <= resize.resize_max:
        raise InputError(
            f"--augmentation.resize-min: received {resize.resize_min}, expected 1 to --augmentation.resize-max "
            f"({resize.resize_max})"
        )


def _check_adversary(config):
    adversarial, micro_batches = config.adversarial, config.vae_training.micro_batches
    # So that a picture holds a patch, see `model.discriminator.PatchDiscriminator.least_size`.
    most = (config.image_size // 3).bit_length() - 1
    if adversarial.weight and adversarial.layers > most:
        raise InputError(
            f"--adversarial.layers: received {adversarial.layers}, whose patches are larger than pictures of "
            f"{config.image_size} px; expected at most {most}"
        )
    if adversarial.weight and adversarial.norm == "batch" and (micro_batches or 1) > 1:
        raise InputError(
            f"--vae-training.micro-batches: received {micro_batches} with --adversarial.norm batch, whose statistics "
            "are of whole batches; expected 1"
        )
    if adversarial.weight and adversarial.norm == "group" and adversarial.channels % adversarial.groups:
        raise InputError(
            f"--adversarial.channels: received {adversarial.channels}, expected a multiple of --adversarial.groups "
            f"({adversarial.groups})"
        )


def _check_seen_size(config):
    """Refuses pictures that are too small for what looks at reconstructions."""
    stage, size = config.vae_training, config.image_size
    least = LEAST_SEEN[stage.perceptual_network] if stage.perceptual_weight else SSIM_WINDOW
    if size < max(least, SSIM_WINDOW):
        seen = (
            f"--vae-training.perceptual-network {stage.perceptual_network}" if least > SSIM_WINDOW else "SSIM"
        )
        raise InputError(
            f"--image-size: received {size}, expected at least {max(least, SSIM_WINDOW)}, the least for {seen}"
        )


def _levels(network):
    n = len(network.level_channels)
    return f"{n} level{'s' * (n != 1)}"


def _check_conditioning(config):
    """Refuses a conditioning with what it cannot have: guidance that has nothing to follow, or classes nobody named."""
    if config.conditioning == "none" and config.evaluation.guidance != 1:
        raise InputError(
            f"--evaluation.guidance: received {config.evaluation.guidance} with --conditioning none, where there is "
            "nothing to follow; expected 1, which is off"
        )
    if config.conditioning == "class" and config.data == Config.data:
        raise InputError(
            f"--conditioning: received class with {config.data}, whose flowers have captions but no classes; "
            "expected --data with a folder of pictures in classes (see dataset/README.md)"
        )


def _check_process(diffusion):
    """Refuses what each setting allows alone but not together, as `diffusion.schedule.Process` does."""
    least, most = diffusion.min_signal_rate, diffusion.max_signal_rate
    if not 0 < least < most < 1:
        raise InputError(
            f"--diffusion.min-signal-rate and --diffusion.max-signal-rate: received {least} and {most}, "
            "expected 0 < min < max < 1"
        )
    target, schedule = diffusion.target, diffusion.schedule
    if diffusion.zero_terminal_snr and schedule not in GRIDS:
        raise InputError(
            f"--diffusion.zero-terminal-snr: received with --diffusion.schedule {schedule}, expected with one of "
            + ", ".join(GRIDS)
        )
    if diffusion.shift != 1 and schedule != "flow":
        raise InputError(
            f"--diffusion.shift: received {diffusion.shift} with --diffusion.schedule {schedule}, expected 1, or "
            "--diffusion.schedule flow"
        )
    if target == "noise" and (diffusion.zero_terminal_snr or schedule == "flow"):
        without_signal = "--diffusion.zero-terminal-snr" if schedule in GRIDS else "--diffusion.schedule flow"
        raise InputError(
            f"--diffusion.target: received noise with {without_signal}, where time 1 has no signal and its noise "
            f"tells nothing of the picture; expected one of {', '.join(_without(TARGETS, 'noise', schedule))}"
        )
    if target == "velocity" and schedule in ("flow", "edm"):
        raise InputError(
            f"--diffusion.target: received velocity with --diffusion.schedule {schedule}, whose rates are on no "
            f"circle; expected one of {', '.join(_without(TARGETS, 'velocity', schedule))}"
        )


def _without(targets, refused, schedule):
    """The targets that are left to a schedule that refuses one of them."""
    also = {"flow": ("noise", "velocity"), "edm": ("velocity",)}.get(schedule, ())
    return [name for name in targets if name not in (refused, *also)]
