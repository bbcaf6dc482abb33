"""The networks that draw: made as a config describes them, or read from a run."""

import warnings
from typing import NamedTuple

import numpy as np

import averages
from checkpoint import RunFolder, Saved, assign, collect, named_variables
from config import Config, EvaluationConfig, from_dict, part
from diffusion.schedule import Process
from errors import InputError
from input_pipeline import Vocabulary
from model.text_encoder import VocabularyEncoder
from model.unet import UNet
from model.vae import AutoencoderKL


class Weights(NamedTuple):
    """Which weights of a run draw, always averaged ones.

    Attributes:
        kind: "best" by KID; "newest"; or "average", of another length, that an evaluation has settled on.
        step: of the training, that they are of.
        length: of such an average, or None.
    """

    kind: str
    step: int
    length: float | None = None

    def __str__(self):
        length = "" if self.length is None else f" of length {self.length:g}"
        return f"{self.kind}{length} of step {self.step}"


class Networks(NamedTuple):
    """All that drawing needs: the three networks, the process, the words, weaker networks or None.

    The weak ones are of the same process and words, but trained less, or smaller; autoguidance leads away from them.
    `weights` tells where those that `load` reads were from.
    """

    vae: AutoencoderKL
    text_encoder: VocabularyEncoder
    unet: UNet
    process: Process
    vocabulary: Vocabulary
    weak: "Networks | None" = None
    weights: Weights | None = None


def make_vae(config: Config) -> AutoencoderKL:
    """The autoencoder that a config describes, with new weights."""
    return AutoencoderKL(**part(config.vae))


def make_diffusion(config: Config, vocabulary: Vocabulary) -> tuple[UNet, VocabularyEncoder]:
    """The U-Net and text encoder that a config describes, with new weights."""
    text_encoder = VocabularyEncoder(vocabulary.size, vocabulary.length, **part(config.text_encoder))
    unet = UNet(config.vae.latent_channels, context_shape=text_encoder.context_shape, **part(config.unet))
    return unet, text_encoder


def load(path, newest=False) -> tuple[Networks, Config]:
    """The networks of a run, with averaged weights: those that an evaluation has settled on, or else the best
    checkpoint's, or the newest's where none is best yet. Where the run draws by autoguidance and has kept averages from
    before these, the weak networks are among them.

    Args:
        path: the run's folder.
        newest: whether to take those of the newest checkpoint, whatever KID or an evaluation has chosen.

    Raises:
        InputError: no run folder, or nothing trained in it yet.
    """
    run = RunFolder.read(path)
    config = from_dict(run.config, run=str(path))
    trained_vae = run.finished("vae")
    weights, saved = _weights_of(run, newest)
    if trained_vae is None or saved is None:
        raise InputError(
            f"{path}: received a run that has trained no U-Net yet; expected one with a checkpoint: "
            "give its training command again, which goes on, or after train-vae "
            f"`python cup3.py --vae-from {path} --run ANOTHER`"
        )
    vae, vocabulary = make_vae(config), Vocabulary.load(run.vocabulary_path)
    unet, text_encoder = make_diffusion(config, vocabulary)
    assign(named_variables(vae), trained_vae.tensors, "vae", source=path)
    assign(named_variables(unet), saved.tensors, "ema_unet", source=path)
    assign(named_variables(text_encoder), saved.tensors, "ema_text_encoder", source=path)
    process = Process(**part(config.diffusion))
    networks = Networks(vae, text_encoder, unet, process, vocabulary, weights=weights)
    if config.evaluation.autoguidance != 1:
        if any(step < saved.step for step in run.average_steps("diffusion")):
            networks = with_weak(networks, config)
        else:
            warnings.warn(
                f"{path} has kept no averages from before step {saved.step}, whose weights draw: they are led away "
                "from themselves, which only multiplies what guidance adds",
                stacklevel=2,
            )
    return networks, config


def chosen_weights(run: RunFolder) -> Saved | None:
    """The weights of a run's U-Net and text encoder that draw: those that an evaluation has settled on, or else
    `trained_weights`."""
    return _weights_of(run)[1]


def trained_weights(run: RunFolder) -> Saved | None:
    """The weights that training has chosen: the best checkpoint's, or the newest's where none is best yet."""
    return run.best("diffusion") or run.latest("diffusion")


def _weights_of(run, newest=False):
    """(`Weights`, `Saved`) of those that `load` takes; (None, None) before there are any."""
    average = None if newest else run.finished("diffusion")
    if average is not None:
        return Weights("average", average.step, average.state.get("length")), average
    best = None if newest else run.best("diffusion")
    saved = best or run.latest("diffusion")
    return saved and Weights("best" if best else "newest", saved.step), saved


def snapshots_of(run: RunFolder) -> list[int]:
    """The steps whose averages a run has kept; InputError if there are none."""
    steps = run.average_steps("diffusion")
    if not steps:
        raise InputError(
            f"{run.path}: received a run without averages, expected one trained with --training.snapshots above 0, "
            "and for longer than to the first of them"
        )
    return steps


def with_weak(networks: Networks, config: Config, share=None) -> Networks:
    """The networks of a run with new weaker ones to lead away from: themselves as they were early in their training
    (autoguidance, Karras et al. 2024).

    Args:
        networks, config: as `load` gives them.
        share: of the training up to the weights that draw; of the averages kept before those the nearest is taken.
            None is the run's.

    Raises:
        InputError: the run has kept no averages, or none before the weights that draw.
    """
    run, share = RunFolder.read(config.run), config.evaluation.weak if share is None else share
    earliest, *_ = snapshots_of(run)
    step = networks.weights.step
    if earliest >= step:
        raise InputError(
            f"{run.path}: received a run whose first averages are of step {earliest}, expected some from before "
            f"step {step}, whose weights draw"
        )
    networks = _with_new_weak(networks)
    _weaken(networks, run, share, step)
    return networks


def lead_away(painter, run: RunFolder, evaluation: EvaluationConfig, step) -> int | None:
    """Has a painter lead away, where the run's evaluation does, from the run's early weights.

    These are the average of `averages.LENGTHS[-1]` that was kept nearest to the evaluation's share of the step, and
    before it; or, before there is any, the networks' own weights, which only multiplies what guidance adds.

    Args:
        painter: a `Painter` of the run's networks; it gets weak ones at the first call, and their weights at each.
        run: the run's folder.
        evaluation: of the run's config.
        step: of the weights that draw.

    Returns:
        The average's step, or None.
    """
    if evaluation.autoguidance == 1:
        return None
    if painter.networks.weak is None:
        painter.networks = _with_new_weak(painter.networks)
    return _weaken(painter.networks, run, evaluation.weak, step)


def _with_new_weak(networks):
    made = (type(own).from_config(own.get_config()) for own in (networks.unet, networks.text_encoder))
    unet, text_encoder = made
    weak = networks._replace(unet=unet, text_encoder=text_encoder, weak=None, weights=None)
    return networks._replace(weak=weak)


def _weaken(networks, run, share, step):
    """Gives the weak networks their weights, see `lead_away`; returns the average's step, or None."""
    kept, early = _early_average(run, share, step)
    for name in ("unet", "text_encoder"):
        prefix = f"ema_{name}"
        tensors = early
        if not any(
            path.startswith(f"{prefix}/") for path in early
        ):  # none kept, or the text encoder was frozen
            tensors = collect(named_variables(getattr(networks, name)), prefix)
        assign(named_variables(getattr(networks.weak, name)), tensors, prefix, source=run.path)
    return kept


def _early_average(run, share, step):
    """(step, tensors as a checkpoint has them) of the average nearest to a share of `step`; (None, {}) without any."""
    prefix = f"average/{averages.LENGTHS[-1]}/"
    early = [kept for kept in run.average_steps("diffusion") if kept < step]
    for kept in sorted(early, key=lambda kept: abs(kept - share * step)):
        try:
            tensors = run.average("diffusion", kept)
        except InputError as error:
            warnings.warn(f"{error}; passed over, as autoguidance has others", stacklevel=4)
            continue
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        return kept, {
            f"ema_{name.removeprefix(prefix)}": tensor.astype("float32") for name, tensor in own.items()
        }
    return None, {}


def rebuilt_average(run: RunFolder, length, step=None) -> dict[str, np.ndarray]:
    """The averaged networks of another length than was kept in training (Karras et al. 2024), see `averages`.

    Args:
        run: the run's folder.
        length: of the power average, as a share of the steps up to it.
        step: where it ends, one of `RunFolder.average_steps`; None is the last.

    Returns:
        Tensors by name, as a checkpoint has them: those of `ema_unet`, and of `ema_text_encoder` if it was trained.

    Raises:
        InputError: the run has kept no averages.
    """
    steps = snapshots_of(run)
    step = steps[-1] if step is None else step
    kept = [(early, kind) for early in steps if early <= step for kind in averages.LENGTHS]
    weights = averages.mixture(*zip(*kept, strict=True), step, length)
    total = {}
    for early in dict.fromkeys(early for early, _ in kept):
        weight_of = {
            kind: weight for (other, kind), weight in zip(kept, weights, strict=True) if other == early
        }
        for name, tensor in run.average("diffusion", early).items():
            kind, path = name.removeprefix("average/").split("/", 1)
            part = np.float32(weight_of[float(kind)]) * tensor.astype("float32")
            total[f"ema_{path}"] = total.get(f"ema_{path}", 0) + part
    return total
