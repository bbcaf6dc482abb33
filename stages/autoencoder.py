"""The order of the work: the autoencoder, trained, taken from another run, or both."""

import keras
import numpy as np
import tensorflow as tf

import input_pipeline as pipeline
from callbacks import Keeper
from checkpoint import RunFolder, assign, collect, named_variables
from errors import InputError
from generate import captioned_grid, make_vae
from metrics import psnr
from model.perceptual import PerceptualDistance
from stages.fitting import fit, optimizer_of, steps_an_epoch
from trainer import VAETrainer, reconstruct

LATENT_STATISTICS_FROM = 2048  # pictures from which the latents' mean and deviation are measured
SHOWN_RECONSTRUCTIONS = 8


def trained_autoencoder(config, run, data, strategy, signals):
    """The run's finished autoencoder: trained here, taken from another run, or both."""
    keras.utils.set_random_seed(config.seed)  # for the first weights; no step draws from it
    with strategy.scope():
        vae = make_vae(config)
    if run.finished("vae") is None:
        if config.vae_from:
            _assign_vae(vae, RunFolder.read(config.vae_from), "--vae-from")
        if config.train_vae or not config.vae_from:
            _train_autoencoder(config, run, data, vae, strategy, signals)
        run.finish("vae", collect(named_variables(vae), "vae"), {"from": config.vae_from})
    else:
        _assign_vae(vae, run, "--run")
        print("   trained already")
    return vae


def _assign_vae(vae, run, flag):
    saved = run.finished("vae")
    if saved is None:
        raise InputError(f"{flag}: received {run.path}, expected a run with a trained autoencoder")
    try:
        assign(named_variables(vae), saved.tensors, "vae", source=run.path)
    except InputError as refusal:
        raise InputError(f"{refusal}; give the --vae.* settings of {run.path / 'config.json'}") from None


def _train_autoencoder(config, run, data, vae, strategy, signals):
    stage = config.vae_training
    steps_per_epoch = steps_an_epoch(stage, len(data.train_ids))
    keeper = Keeper(run, "vae", steps_per_epoch, signals, stage.epochs)
    held_out = data.whole(data.validation_ids, config.image_size)
    stream = {
        "image_size": config.image_size,
        "batch_size": stage.batch_size,
        "seed": config.seed,
        "latent_shape": vae.latent_shape(config.image_size),
    }
    with strategy.scope():
        perceptual = PerceptualDistance(stage.perceptual_depth) if stage.perceptual_weight else None
        trainer = VAETrainer(
            vae,
            stage.recon_loss,
            stage.kl_weight,
            perceptual,
            stage.perceptual_weight,
            stage.micro_batches,
        )
        trainer.compile(optimizer_of(trainer, stage, steps_per_epoch))

    def finish_row(epoch, row):
        shown = held_out[:SHOWN_RECONSTRUCTIONS]
        rebuilt = reconstruct(vae, held_out)
        _save_pairs(shown, rebuilt[:SHOWN_RECONSTRUCTIONS], run.sample_path(f"vae_{epoch + 1:03d}.png"))
        quality = psnr(held_out, rebuilt)
        return {"val_psnr": quality.value, "val_psnr_low": quality.low, "val_psnr_high": quality.high}

    keeper.finish_row = finish_row
    fit(
        trainer,
        keeper,
        lambda step: pipeline.picture_batches(
            data.pictures, augmentation=data.augmentation, ids=data.train_ids, start_step=step, **stream
        ),
        pipeline.picture_validation_batches(held_out, **stream),
    )
    if config.vae.latent_scale is None:
        vae.set_latent_statistics(*_latent_statistics(vae, data, config))


def _latent_statistics(vae, data, config):
    """Mean and standard deviation (C,) of raw posterior samples, over training pictures."""
    ids = data.train_ids[:LATENT_STATISTICS_FROM]
    raw_moments = tf.function(vae.raw_moments, autograph=False)
    means, variances = [], []
    for chunk in np.array_split(ids, max(1, len(ids) // 64)):
        pixels = data.whole(chunk, config.image_size).astype("float32") / 127.5 - 1.0
        mean, logvar = raw_moments(pixels)
        means.append(np.asarray(mean))
        variances.append(np.exp(np.asarray(logvar)))
    means, variances = np.concatenate(means), np.concatenate(variances)
    return means.mean((0, 1, 2)), np.sqrt(means.var((0, 1, 2)) + variances.mean((0, 1, 2)))


def _save_pairs(originals, rebuilt, path):
    pairs = [image for pair in zip(originals, rebuilt, strict=True) for image in pair]
    captions = ["original", "reconstruction"] * len(originals)
    captioned_grid(pairs, captions, columns=8).save(path)
