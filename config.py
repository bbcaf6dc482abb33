"""Every setting of a run as frozen dataclasses, one per part, and the table of presets.

The fields of a part are that part's constructor keywords. Only `stages` receives the whole config, and `generate`,
which makes a run's networks from it.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from errors import InputError


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of a picture at each step; the defaults change nothing but left and right."""

    resize_min: float = 1.0  # least factor of the random resize that goes before the random crop
    resize_max: float = 1.0  # largest factor; 1 and 1 mean no crop
    flip: bool = True  # mirror half of the pictures
    brightness: float = 0.0  # largest shift, as a fraction of the range
    contrast: float = 0.0  # largest change of the contrast's factor from 1


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder's shape (`model.vae.AutoencoderKL`)."""

    level_channels: tuple[int, ...] = (16, 16, 32, 64)  # finest level first; each further one halves the size
    blocks: tuple[int, ...] = (0, 1, 1, 1)  # residual blocks of each level
    latent_channels: int = 4  # channels of the latents
    groups: int = 8  # groups of the normalisations
    attention: bool = False  # self-attention in the middle
    latent_scale: float | None = None  # factor to unit variance; None measures it after training


@dataclass(frozen=True)
class TextEncoderConfig:
    """The `vocabulary` text encoder's shape (`model.text_encoder.VocabularyEncoder`)."""

    width: int = 128  # width of the context
    layers: int = 1  # transformer blocks
    heads: int = 4  # attention heads


@dataclass(frozen=True)
class UNetConfig:
    """The U-Net's shape (`model.unet.UNet`)."""

    level_channels: tuple[int, ...] = (64, 128)  # finest level first
    attention_levels: tuple[bool, ...] = (False, True)  # which levels attend
    blocks: int = 1  # residual blocks a level
    head_channels: int = 32  # channels a head
    groups: int = 16  # groups of the normalisations
    ff_expansion: int = 2  # width of the feed-forward parts, in multiples of the channels
    pooled_context: bool = True  # whether the mean of the text's embeddings joins the time's


@dataclass(frozen=True)
class DiffusionConfig:
    """The process (`diffusion.schedule`) and what the U-Net predicts."""

    # what the U-Net predicts: noise, image, velocity, flow or edm; not every schedule can express each
    target: str = "velocity"
    max_signal_rate: float = 0.95  # signal rate at time 0 of the cosine schedule
    min_signal_rate: float = 0.02  # signal rate at time 1 of the cosine schedule
    # signal and noise at each time: cosine (by angles), cosine-squared, linear, scaled-linear, sigmoid, flow or edm
    schedule: str = "cosine"
    # leave no signal at time 1; for the schedules of 1,000 steps, cosine-squared, linear, scaled-linear and sigmoid
    zero_terminal_snr: bool = False
    shift: float = 1.0  # factor of the noise-to-signal ratio at the times of flow; above 1 for large pictures
    weight: str = "none"  # how errors count at each time: none, min-snr or edm
    snr_cap: float = 5.0  # largest signal-to-noise ratio that the weight min-snr counts
    loss: str = "mse"  # of a prediction: mse, mae or huber


@dataclass(frozen=True)
class VAETrainingConfig:
    """How the autoencoder is trained (`trainer.VAETrainer`)."""

    epochs: int = 4  # rounds of `steps_per_epoch`
    steps_per_epoch: int | None = 350  # None: one pass over the training pictures
    batch_size: int = 8  # pictures a step, over all devices
    micro_batches: int | None = None  # parts of a batch with gradients added up; None: 2 on a CPU, 1 on GPUs
    optimizer: str = "muon"  # adamw or muon; their learning rates differ
    learning_rate: float = 4e-3  # peak of the schedule; for adamw about 1e-3
    warmup_steps: int = 100  # linear warm-up, then cosine decay to a hundredth
    weight_decay: float = 0.0  # of kernels; never of biases and norms
    clip_norm: float = 1.0  # largest global norm of the gradient
    recon_loss: str = "mse"  # l1 or mse
    kl_weight: float = 1e-3  # of the KL divergence in nats a latent value
    perceptual_weight: float = 0.1  # of the distance in EfficientNet-Lite0 features; 0 leaves it out
    perceptual_depth: int = 3  # how many levels of those features, 1 to 5; each next one costs more


@dataclass(frozen=True)
class TrainingConfig:
    """How the U-Net and the text encoder are trained (`trainer.LatentDiffusionTrainer`)."""

    epochs: Annotated[int, tyro.conf.arg(prefix_name=False)] = 22  # rounds of `steps_per_epoch`
    steps_per_epoch: int | None = None  # None: one pass over the training pictures
    batch_size: Annotated[int, tyro.conf.arg(prefix_name=False)] = 64  # pictures a step, over all devices
    micro_batches: int | None = None  # parts of a batch with gradients added up; None: 2 on a CPU, 1 on GPUs
    optimizer: str = "muon"  # adamw or muon; their learning rates differ
    learning_rate: float = 4e-3  # peak of the schedule; for adamw about 1e-3
    warmup_steps: int = 100  # linear warm-up, then cosine decay to a hundredth
    weight_decay: float = 1e-2  # of kernels; never of biases and norms
    clip_norm: float = 1.0  # largest global norm of the gradient
    # distribution of the diffusion times: uniform, logit_normal (more in the middle), log_normal or mixed
    times: str = "logit_normal"
    latent_crops: int = 1  # crops of each picture in the cache of latents, when augmentation crops
    ema: float = 0.998  # decay of the averaged network, after its warm-up
    caption_dropout: float = 0.1  # share of captions left out, for guidance
    validation_fraction: float = 0.125  # share of the pictures held out of training


@dataclass(frozen=True)
class EvaluationConfig:
    """How an epoch is judged and shown."""

    network: str = "efficientnet_lite0"  # features of KID: efficientnet_lite0 or inception_v3
    size: int = 224  # side that pictures are resized to for it; 75 or 299 for inception_v3
    weights: str | None = None  # local file of the feature network's weights
    images: int = 256  # pictures drawn each time KID is measured
    every: int = 11  # epochs between two measurements; the first and the last are measured anyway
    # how pictures are drawn: ddpm, ddim, euler, euler-ancestral, heun, dpmpp-2m, dpmpp-2m-sde, unipc or pndm
    sampler: str = "ddim"
    spacing: str = "uniform"  # of the sampler's times: uniform, leading, trailing, karras or logsnr-uniform
    steps: int = 20  # sampler steps
    guidance: float = 4.0  # strength of classifier-free guidance; 1 is off
    guidance_interval: tuple[float, float] = (0.3, 0.7)  # least and most diffusion time to guide at
    batch_size: int = 64  # pictures drawn at once
    previews: int = 16  # captions in the grid of every epoch


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    preset: str = "paper-flowers"  # where the defaults come from: paper-flowers or cup3
    data: str = "dataset/paper_flowers"  # folder of captioned pictures
    run: str = "runs/paper-flowers"  # folder of the run
    seed: int = 0  # of every random draw
    image_size: int = 64  # side of the pictures in pixels
    gpus: str = "all"  # GPUs to train on: all, none, or indices such as 0,2
    # train the autoencoder, also one that --vae-from takes; None: only where there is none to take
    train_vae: bool | None = None
    # another run's folder, whose trained autoencoder is taken as it is, or trained further with --train-vae
    vae_from: str | None = None
    text_from: str | None = None  # another run's folder, whose text encoder is taken and stays as it is
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    vae_training: VAETrainingConfig = field(default_factory=VAETrainingConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


LARGEST_VALIDATION_FRACTION = 0.5
LARGEST_SEED = 2**32 - 1  # that NumPy's generator takes
FEWEST_FOR_KID = 3  # pictures on either side, for its estimate and its interval
LARGEST_VIEW = 1024  # side at which a feature network sees pictures: far beyond what any was trained on
LARGEST_RESIZE = 4  # factor before the random crop
START_ONLY = ("run", "gpus")  # what may differ from one start of a run to the next

# The names that `diffusion` knows, here too so that a wrong one is refused before TensorFlow is imported. A learned
# weight, "uncertainty", needs an output of the network that `trainer` does not have.
GRIDS = ("cosine-squared", "linear", "scaled-linear", "sigmoid")  # schedules of 1,000 steps
SCHEDULES = ("cosine", *GRIDS, "flow", "edm")
TARGETS = ("noise", "image", "velocity", "flow", "edm")
WEIGHTS = ("none", "min-snr", "edm")
LOSSES = ("mse", "mae", "huber")
TIMES = ("uniform", "logit_normal", "log_normal", "mixed")
SAMPLERS = ("ddpm", "ddim", "euler", "euler-ancestral", "heun", "dpmpp-2m", "dpmpp-2m-sde", "unipc", "pndm")
SPACINGS = ("uniform", "leading", "trailing", "karras", "logsnr-uniform")
GRID_STEPS = (
    1000  # most steps of the spacings leading and trailing, which take them from the discrete chain's
)
PROCESS_RANGE = (1e-3, 1e3)  # of the shift and the SNR's cap

PHOTOGRAPHS = AugmentationConfig(resize_min=1.0, resize_max=1.15, brightness=0.1, contrast=0.1)

CUP3 = Config(
    preset="cup3",
    data="dataset",
    run="runs/cup3",
    image_size=128,
    augmentation=PHOTOGRAPHS,
    vae=VAEConfig(level_channels=(32, 64, 128, 128), blocks=(1, 1, 1, 1), latent_channels=4, attention=True),
    text_encoder=TextEncoderConfig(width=768, layers=2, heads=12),
    unet=UNetConfig(
        level_channels=(128, 256, 512, 512),
        attention_levels=(True, True, True, False),
        blocks=2,
        head_channels=64,
        groups=32,
        ff_expansion=4,
        pooled_context=False,
    ),
    vae_training=VAETrainingConfig(
        epochs=20, steps_per_epoch=None, optimizer="adamw", learning_rate=1e-3, warmup_steps=500
    ),
    training=TrainingConfig(
        epochs=50,
        steps_per_epoch=None,
        batch_size=16,
        optimizer="adamw",
        learning_rate=1e-4,
        times="uniform",
        warmup_steps=1000,
        ema=0.999,
        validation_fraction=0.1,
        latent_crops=4,
    ),
    evaluation=EvaluationConfig(images=512, guidance=3.0, guidance_interval=(0.0, 1.0), batch_size=32),
)


@dataclass(frozen=True)
class Preset:
    """A system by name: its settings, or what this version lacks to run it."""

    summary: str
    config: Config | None = None
    lacks: str | None = None
    is_large: bool = False  # whether `light` makes it smaller


PRESETS = {
    "paper-flowers": Preset("drawn flowers, 64 px, offline, minutes on two cores", Config()),
    "cup3": Preset("Deep Learning Cup 3: Oxford-102 flowers, 128 px, the Cup's U-Net", CUP3, is_large=True),
    "coco": Preset("COCO 2014 captions", lacks="CLIP, the linear schedule and 16-bit floats"),
    "flickr8k": Preset("Flickr8k with a fine-tuned CLIP", lacks="contrastive training of CLIP"),
    "afhq": Preset("cats at 512 px, unconditional", lacks="the adversarial loss and unconditional training"),
    "afhq-text": Preset("cats at 512 px from captions", lacks="the adversarial loss and CLIP"),
    "ffhq-vae": Preset(
        "faces: an autoencoder alone", lacks="KL annealing and training of an autoencoder alone"
    ),
}


def preset(name: str) -> Config:
    """The settings of a preset.

    Raises:
        InputError: the name is unknown, or names a system that this version cannot train yet.
    """
    ready = ", ".join(key for key, entry in PRESETS.items() if entry.config)
    if name not in PRESETS:
        raise InputError(f"--preset: received {name!r}, expected one of {', '.join(PRESETS)}")
    if PRESETS[name].config is None:
        raise InputError(
            f"--preset: received {name!r}, which needs {PRESETS[name].lacks}; "
            f"this version cannot do that yet, expected one of {ready}"
        )
    return PRESETS[name].config


def light(config: Config) -> Config:
    """The same data and pictures with small networks, sized for photographs and an hour on two cores at 64 px."""
    return dataclasses.replace(
        config,
        vae=VAEConfig(latent_channels=8),
        text_encoder=TextEncoderConfig(),
        unet=UNetConfig(level_channels=(96, 192)),
        diffusion=dataclasses.replace(config.diffusion, max_signal_rate=0.995),
        vae_training=VAETrainingConfig(epochs=6, steps_per_epoch=500),
        training=TrainingConfig(
            epochs=15,
            steps_per_epoch=200,
            learning_rate=3e-3,
            latent_crops=4,
            ema=0.999,
            validation_fraction=0.1,
        ),
        evaluation=dataclasses.replace(config.evaluation, every=5, batch_size=64),
    )


def part(settings) -> dict:
    """A part's settings as the keywords of its constructor."""
    return {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}


def to_dict(config: Config) -> dict:
    """The config as nested dicts, as a run folder keeps it: without what may differ from one start to the next."""
    entries = dataclasses.asdict(config)
    return {name: value for name, value in entries.items() if name not in START_ONLY}


def from_dict(entries: dict, **start) -> Config:
    """The config of a run folder.

    Args:
        entries: as `to_dict` gives them.
        start: the fields that `to_dict` leaves out.

    Raises:
        InputError: a key is unknown or missing.
    """
    return _read(
        Config, {**{name: getattr(Config, name) for name in START_ONLY}, **entries, **start}, "config"
    )


def _read(kind, entries, where):
    known = {item.name: item for item in dataclasses.fields(kind)}
    if set(entries) != set(known):
        unknown, missing = sorted(set(entries) - set(known)), sorted(set(known) - set(entries))
        raise InputError(
            f"{where}: received unknown keys {unknown} and lacks {missing}; expected {sorted(known)}"
        )
    values = {}
    for name, value in entries.items():
        default = known[name].default_factory
        if dataclasses.is_dataclass(default):
            value = _read(default, value, f"{where}.{name}")
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def check(config: Config) -> None:
    """Refuses settings that cannot work, before anything is done.

    Raises:
        InputError: names the setting, the value received and the value expected.
    """
    for name, value, least in _least_values(config):
        if not least <= value < math.inf:  # written so that NaN is refused too
            raise InputError(f"--{name}: received {value}, expected a finite number, at least {least}")
    for name, value, most in _largest_values(config):
        if value > most:
            raise InputError(f"--{name}: received {value}, expected at most {most}")
    if not math.isfinite(config.evaluation.guidance):
        raise InputError(
            f"--evaluation.guidance: received {config.evaluation.guidance}, expected a finite number"
        )
    check_interval("--evaluation.guidance-interval", config.evaluation.guidance_interval)
    _check_widths(config)
    factor = 2 ** (len(config.vae.level_channels) - 1)
    if config.image_size % factor:
        raise InputError(
            f"--image-size: received {config.image_size}, expected a multiple of {factor}, "
            "the factor of the autoencoder"
        )
    latent_side, unet_factor = config.image_size // factor, 2 ** (len(config.unet.level_channels) - 1)
    if latent_side % unet_factor:
        raise InputError(
            f"--image-size: received {config.image_size}, whose latents of side {latent_side} the U-Net cannot halve "
            f"{len(config.unet.level_channels) - 1} times; expected a multiple of {factor * unet_factor}"
        )
    for name, value, most in _fractions(config):
        if not 0 <= value <= most:
            raise InputError(f"--{name}: received {value}, expected 0 to {most}")
    for name, value, known in _choices(config):
        if value not in known:
            raise InputError(f"--{name}: received {value!r}, expected one of {', '.join(map(str, known))}")
    _check_process(config.diffusion)
    check_sampling(
        "--evaluation.", config.evaluation.sampler, config.evaluation.spacing, config.evaluation.steps
    )
    if not re.fullmatch(r"all|none|\d+(,\d+)*", config.gpus):
        raise InputError(f"--gpus: received {config.gpus!r}, expected all, none, or indices such as 0,2")
    if config.train_vae is False and config.vae_from is None:
        raise InputError("--no-train-vae: expected --vae-from, the run to take a trained autoencoder from")


def check_interval(name, interval) -> None:
    """Refuses what is no interval of diffusion times, by the name of its setting.

    Raises:
        InputError: it is not (least, most) within 0 to 1.
    """
    if not 0 <= interval[0] < interval[1] <= 1:
        raise InputError(
            f"{name}: received {tuple(interval)}, expected the least and the most time, within 0 to 1"
        )


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


def _least_values(config):
    vae_training, training, evaluation = config.vae_training, config.training, config.evaluation
    yield "image-size", config.image_size, 8
    yield "seed", config.seed, 0
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
    yield "vae-training.kl-weight", vae_training.kl_weight, 0
    yield "vae-training.perceptual-weight", vae_training.perceptual_weight, 0
    yield "training.latent-crops", training.latent_crops, 1
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
    yield "training.ema", config.training.ema, 1
    yield "training.caption-dropout", config.training.caption_dropout, 1
    yield "training.validation-fraction", config.training.validation_fraction, LARGEST_VALIDATION_FRACTION
    yield "augmentation.brightness", config.augmentation.brightness, 1
    yield "augmentation.contrast", config.augmentation.contrast, 1


def _choices(config):
    yield "vae-training.recon-loss", config.vae_training.recon_loss, ("l1", "mse")
    yield "vae-training.optimizer", config.vae_training.optimizer, ("adamw", "muon")
    yield "training.optimizer", config.training.optimizer, ("adamw", "muon")
    yield "training.times", config.training.times, TIMES
    yield "diffusion.target", config.diffusion.target, TARGETS
    yield "diffusion.schedule", config.diffusion.schedule, SCHEDULES
    yield "diffusion.weight", config.diffusion.weight, WEIGHTS
    yield "diffusion.loss", config.diffusion.loss, LOSSES
    yield "vae-training.perceptual-depth", config.vae_training.perceptual_depth, (1, 2, 3, 4, 5)
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


def _levels(network):
    n = len(network.level_channels)
    return f"{n} level{'s' * (n != 1)}"


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
