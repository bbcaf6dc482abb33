"""The networks that draw: made as a config describes them, or read from a run."""

from typing import NamedTuple

from checkpoint import RunFolder, assign, named_variables
from config import Config, from_dict, part
from diffusion.schedule import Process
from errors import InputError
from input_pipeline import Vocabulary
from model.text_encoder import VocabularyEncoder
from model.unet import UNet
from model.vae import AutoencoderKL


class Networks(NamedTuple):
    """All that drawing needs: the three networks, the process, and the words."""

    vae: AutoencoderKL
    text_encoder: VocabularyEncoder
    unet: UNet
    process: Process
    vocabulary: Vocabulary


def make_vae(config: Config) -> AutoencoderKL:
    """The autoencoder that a config describes, with new weights."""
    return AutoencoderKL(**part(config.vae))


def make_diffusion(config: Config, vocabulary: Vocabulary) -> tuple[UNet, VocabularyEncoder]:
    """The U-Net and text encoder that a config describes, with new weights."""
    text_encoder = VocabularyEncoder(vocabulary.size, vocabulary.length, **part(config.text_encoder))
    unet = UNet(config.vae.latent_channels, context_shape=text_encoder.context_shape, **part(config.unet))
    return unet, text_encoder


def load(path) -> tuple[Networks, Config]:
    """The networks of a run, with the best checkpoint's averaged weights, or the newest where none is best yet.

    Args:
        path: the run's folder.

    Raises:
        InputError: no run folder, or nothing trained in it yet.
    """
    run = RunFolder.read(path)
    config = from_dict(run.config, run=str(path))
    trained_vae = run.finished("vae")
    saved = run.best("diffusion") or run.latest("diffusion")
    if trained_vae is None or saved is None:
        raise InputError(
            f"{path}: received a run that has trained no U-Net yet; expected one with a checkpoint: "
            "give its training command again, which goes on"
        )
    vae, vocabulary = make_vae(config), Vocabulary.load(run.vocabulary_path)
    unet, text_encoder = make_diffusion(config, vocabulary)
    assign(named_variables(vae), trained_vae.tensors, "vae", source=path)
    assign(named_variables(unet), saved.tensors, "ema_unet", source=path)
    assign(named_variables(text_encoder), saved.tensors, "ema_text_encoder", source=path)
    return Networks(vae, text_encoder, unet, Process(**part(config.diffusion)), vocabulary), config
