"""The settings of each part, and those of a run as nested dicts."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from errors import InputError

START_ONLY = ("run", "gpus", "track")  # what may differ from one start of a run to the next


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
    # the encoder's features go to the decoder too; then latents alone make no picture, so it is for train-vae only
    skips: bool = False
    tanh: bool = False  # tanh on the decoder's output
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
    target: str = "image"
    max_signal_rate: float = 0.95  # signal rate at time 0 of the cosine schedule
    min_signal_rate: float = 0.02  # signal rate at time 1 of the cosine schedule
    # signal and noise at each time: cosine (by angles), cosine-squared, linear, scaled-linear, sigmoid, flow or edm
    schedule: str = "cosine"
    # leave no signal at time 1; for the schedules of 1,000 steps, cosine-squared, linear, scaled-linear and sigmoid
    zero_terminal_snr: bool = False
    shift: float = 1.0  # factor of the noise-to-signal ratio at the times of flow; above 1 for large pictures
    weight: str = "none"  # how errors count at each time: none, min-snr, edm or uncertainty, which is learned
    snr_cap: float = 5.0  # largest signal-to-noise ratio that the weight min-snr counts
    loss: str = "mse"  # of a prediction: mse, mae or huber


@dataclass(frozen=True)
class VAETrainingConfig:
    """How the autoencoder is trained (`trainer.VAETrainer`)."""

    epochs: int = 4  # rounds of `steps_per_epoch`
    steps_per_epoch: int | None = 250  # None: one pass over the training pictures
    batch_size: int = 8  # pictures a step, over all devices
    micro_batches: int | None = None  # parts of a batch with gradients added up; None: 2 or more on a CPU
    optimizer: str = "muon"  # adamw or muon; their learning rates differ
    learning_rate: float = 4e-3  # peak of the schedule; for adamw about 1e-3
    warmup_steps: int = 100  # of the linear warm-up, before the schedule
    weight_decay: float = 0.0  # of kernels; never of biases and norms
    clip_norm: float = 1.0  # largest global norm of the gradient
    # of the learning rate, after its warm-up: cosine, constant, or plateau, which lowers it when val_loss stays
    schedule: str = "cosine"
    plateau_epochs: int = 3  # of plateau: epochs without a lower val_loss before it is lowered
    plateau_factor: float = 0.5  # of plateau: what it is multiplied by then
    # epochs without a lower val_loss after which the training stops; None: never
    early_stopping: int | None = None
    keep: str = "last"  # what the stage ends with: the weights of the last epoch, or of the best by val_loss
    ema: float = 0.0  # decay of an averaged copy, which is the one that is kept; 0: none
    # train the decoder only: the latents, and the U-Nets that draw them, stay good; needs --vae-from
    decoder_only: bool = False
    recon_loss: str = "mse"  # l1, mse or mix of both
    recon_weight: float = 1.0  # of the reconstruction loss
    l1_share: float = 0.5  # of mix: the share of l1
    kl_weight: float = 1e-3  # of the KL divergence in nats a latent value
    kl_schedule: str = "constant"  # how that weight begins: constant, linear, cosine or cyclical
    kl_warmup_steps: int = 0  # steps until it is whole
    kl_cycles: int = 4  # of cyclical: cycles within those steps
    free_bits: float = 0.0  # nats a latent value that each channel may have without the KL's pressure
    perceptual_weight: float = 0.1  # of the perceptual distance; 0 leaves it out
    # what sees it: efficientnet_lite0, which comes with pip, or LPIPS by vgg16, alexnet or squeezenet
    perceptual_network: str = "efficientnet_lite0"
    perceptual_depth: int = 3  # levels of efficientnet_lite0's features, 1 to 5; each next one costs more
    perceptual_weights: str | None = None  # local file of that network's weights; None: pip's, or downloaded
    perceptual_heads: str | None = None  # local file of LPIPS's linear heads; None: downloaded
    # epochs between measurements of the perceptual distance and KID of reconstructions (rKID); 0: none
    measure_every: int = 0
    previews: int = 8  # pictures shown there and back after each epoch


@dataclass(frozen=True)
class AdversarialConfig:
    """The discriminator that the autoencoder is trained against (`trainer.Adversary`), and the guard over both."""

    weight: float = 0.0  # of the adversarial loss; 0 leaves it out, 0.5 is usual
    loss: str = "hinge"  # hinge, vanilla or non-saturating
    start: int = 0  # steps of the autoencoder before the discriminator begins
    # make its gradient as large as the reconstruction's, in the decoder's last layer, before the weight counts
    adaptive: bool = True
    limit: float = 1e4  # largest factor of adaptive
    r1_weight: float = 0.0  # of the R1 penalty on the discriminator's gradient; 0 leaves it out
    lecam_weight: float = 0.0  # of LeCam's penalty on its logits; 0 leaves it out
    learning_rate: float = 2e-4  # of the discriminator, by AdamW
    channels: int = 64  # of its first layer
    layers: int = 3  # that halve the size; each patch is judged by itself
    norm: str = "group"  # group, batch (over all devices) or none
    groups: int = 16  # of the norm group
    spectral_norm: bool = False  # spectral normalisation of its convolutions
    guard: bool = True  # back off, or go back to the last good checkpoint, when it takes over
    guard_drop: float = 1.0  # fall of the held-out PSNR in dB, from its best, that goes back
    guard_ratio: float = 2.0  # adversarial gradient to the reconstruction's, above which its weight backs off
    guard_gap: float = 5.0  # real logits less reconstructions', above which it does too


@dataclass(frozen=True)
class TrainingConfig:
    """How the U-Net and the text encoder are trained (`trainer.LatentDiffusionTrainer`)."""

    epochs: Annotated[int, tyro.conf.arg(prefix_name=False)] = 30  # rounds of `steps_per_epoch`
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
    # times that two further averages are kept, for `evaluate --ema-sweep` and autoguidance; 0: none
    snapshots: int = 8
    caption_dropout: float = 0.1  # share of captions left out, for guidance
    offset_noise: float = 0.0  # strength of added noise that a whole channel shares; 0.1 is usual
    input_perturbation: float = 0.0  # strength of noise that the U-Net sees but is not asked for
    validation_fraction: float = 0.125  # share of the pictures held out of training


@dataclass(frozen=True)
class EvaluationConfig:
    """How an epoch is judged and shown."""

    network: str = "efficientnet_lite0"  # features of KID: efficientnet_lite0 or inception_v3
    size: int = 224  # side that pictures are resized to for it; 75 or 299 for inception_v3
    weights: str | None = None  # local file of the feature network's weights
    images: int = 256  # pictures drawn each time KID is measured
    every: int = 15  # epochs between two measurements; the first and the last are measured anyway
    # how pictures are drawn: ddpm, ddim, euler, euler-ancestral, heun, dpmpp-2m, dpmpp-2m-sde, unipc or pndm
    sampler: str = "dpmpp-2m"
    spacing: str = "uniform"  # of the sampler's times: uniform, leading, trailing, karras or logsnr-uniform
    steps: int = 8  # sampler steps
    guidance: float = 3.0  # strength of classifier-free guidance; 1 is off
    guidance_interval: tuple[float, float] = (0.3, 0.7)  # least and most diffusion time to guide at
    autoguidance: float = 2.0  # strength of leading away from the run's own early weights; 1 is off
    weak: float = 0.25  # share of the training so far after which it had those
    batch_size: int = 64  # pictures drawn at once
    previews: int = 16  # captions in the grid of every epoch


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    preset: str = "paper-flowers"  # where the defaults come from: paper-flowers, cup3 or afhq
    data: str = "dataset/paper_flowers"  # folder of pictures, with their captions or classes
    run: str = "runs/paper-flowers"  # folder of the run
    seed: int = 0  # of every random draw
    image_size: int = 64  # side of the pictures in pixels
    # what pictures are drawn from: text, their captions; class, one label each; or none, which needs neither
    conditioning: str = "text"
    gpus: str = "all"  # GPUs to train on: all, none, or indices such as 0,2
    # steps between two readings of all layers' activations, weights and gradients, for TensorBoard and a plot; 0: none
    track: int = 0
    # train the autoencoder, also one that --vae-from takes; None: only where there is none to take
    train_vae: bool | None = None
    # another run's folder, whose trained autoencoder is taken: as it is, or to be trained further by train-vae
    vae_from: str | None = None
    text_from: str | None = None  # another run's folder, whose text encoder is taken and stays as it is
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    vae_training: VAETrainingConfig = field(default_factory=VAETrainingConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


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
