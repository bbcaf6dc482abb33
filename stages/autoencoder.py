"""The order of the work: the autoencoder, trained, taken from another run, or both."""

import keras
import numpy as np
import tensorflow as tf

import input_pipeline as pipeline
from callbacks import Keeper
from checkpoint import RunFolder, assign, collect, named_variables
from config import check_same
from errors import InputError
from evaluate import latent_report, latent_scale, plot_latents, plot_vae_curves
from generate import make_vae
from model.discriminator import PatchDiscriminator
from model.lpips import perceptual
from optimizers import adamw
from stages.appraisal import Appraisal, save_plot
from stages.fitting import fit, learning_rate_of, optimizer_of, steps_an_epoch
from trainer import Adversary, VAETrainer, at_once

LATENT_STATISTICS_FROM = 2048  # pictures from which the latents' mean and deviation are measured
# Of the discriminator's Adam: its gradients of long ago are of other pictures (Radford et al. 2016).
DISC_BETA_1 = 0.5
# Of `VAETrainer`, that have the same name in the config.
OWN_SETTINGS = (
    "recon_loss",
    "recon_weight",
    "l1_share",
    "kl_weight",
    "kl_schedule",
    "kl_warmup_steps",
    "kl_cycles",
    "free_bits",
    "perceptual_weight",
    "decoder_only",
    "ema",
    "micro_batches",
)


def trained_autoencoder(config, run, data, features, strategy, signals):
    """The run's finished autoencoder: trained here, taken from another run, or both.

    Args:
        config, run, data, strategy, signals: of the run.
        features: images -> features for the KID of reconstructions.
    """
    keras.utils.set_random_seed(config.seed)  # for the first weights; no step draws from it
    with strategy.scope():
        vae = make_vae(config)
    if run.finished("vae") is None:
        if config.vae_from:
            _take_from(config, vae)
        if config.train_vae or not config.vae_from:
            _train_autoencoder(config, run, data, vae, features, strategy, signals)
        run.finish("vae", collect(named_variables(vae), "vae"), {"from": config.vae_from})
    else:
        _assign_vae(vae, run)
        print("   trained already")
    return vae


def _assign_vae(vae, run):
    assign(named_variables(vae), run.finished("vae").tensors, "vae", source=run.path)


def _take_from(config, vae):
    """Sets the autoencoder to that of the run that `--vae-from` names, which must be of the same shape."""
    other = RunFolder.read(config.vae_from)
    if other.finished("vae") is None:
        raise InputError(f"--vae-from: received {other.path}, expected a run with a trained autoencoder")
    if other.config["vae"].get("skips") and not config.vae.skips:
        raise InputError(
            f"--vae-from: received {config.vae_from}, whose autoencoder has skip connections and decodes nothing "
            "without a picture; expected one without (train-vae takes it with --vae.skips)"
        )
    check_same(
        "--vae-from", config.vae_from, "--vae.", other.config["vae"], config.vae, but=("latent_scale",)
    )
    _assign_vae(vae, other)


def _train_autoencoder(config, run, data, vae, features, strategy, signals):
    stage = config.vae_training
    steps_per_epoch = steps_an_epoch(stage, len(data.train_ids))
    _check_start(config.adversarial, stage.epochs * steps_per_epoch)
    keeper = Keeper(run, "vae", steps_per_epoch, signals, stage.epochs)
    held_out = data.whole(data.validation_ids, config.image_size)
    stream = {
        "image_size": config.image_size,
        "batch_size": stage.batch_size,
        "seed": config.seed,
        "latent_shape": vae.latent_shape(config.image_size),
    }
    with strategy.scope():
        trainer = _trainer(config, vae)
        trainer.compile(
            optimizer_of(trainer, stage, steps_per_epoch), _disc_optimizer(config, trainer, steps_per_epoch)
        )
    Appraisal(run, trainer, config, held_out, features).ask(keeper)
    fit(
        trainer,
        keeper,
        lambda step: pipeline.picture_batches(
            data.pictures, augmentation=data.augmentation, ids=data.train_ids, start_step=step, **stream
        ),
        pipeline.picture_validation_batches(held_out, **stream),
        track=config.track,
    )
    _take_over(vae, trainer, run, stage)
    _measure_latents(config, run, data, vae)
    save_plot(plot_vae_curves, run.vae_curves_path, run.rows())


def _check_start(adversarial, steps):
    if adversarial.weight and adversarial.start >= steps:
        raise InputError(
            f"--adversarial.start: received {adversarial.start}, expected less than the {steps} steps of the "
            "autoencoder's training"
        )


def _trainer(config, vae):
    stage = config.vae_training
    sees = stage.perceptual_network, stage.perceptual_depth, stage.perceptual_weights, stage.perceptual_heads
    return VAETrainer(
        vae,
        perceptual=perceptual(*sees) if stage.perceptual_weight else None,
        adversary=_adversary(config.adversarial) if config.adversarial.weight else None,
        **{name: getattr(stage, name) for name in OWN_SETTINGS},
    )


def _adversary(settings):
    shape = {
        name: getattr(settings, name) for name in ("channels", "layers", "norm", "groups", "spectral_norm")
    }
    names = ("loss", "weight", "start", "adaptive", "limit", "r1_weight", "lecam_weight")
    return Adversary(PatchDiscriminator(**shape), **{name: getattr(settings, name) for name in names})


def _disc_optimizer(config, trainer, steps_per_epoch):
    if trainer.adversary is None:
        return None
    stage, adversarial = config.vae_training, config.adversarial
    return adamw(
        trainer.adversary.discriminator.trainable_variables,
        learning_rate=learning_rate_of(stage, steps_per_epoch, adversarial.learning_rate, adversarial.start),
        weight_decay=0.0,
        clip_norm=stage.clip_norm,
        beta_1=DISC_BETA_1,
        name="disc_adamw",
    )


def _take_over(vae, trainer, run, stage):
    """Sets the autoencoder to the weights that the stage ends with: the averaged ones, or the best epoch's."""
    best = run.best("vae") if stage.keep == "best" else None
    if best:
        source = "ema_vae" if stage.ema else "vae"
        assign(named_variables(vae), best.tensors, source, source=run.path)
        print(
            f"   kept: the weights of epoch {best.state['epoch']}, of the least val_loss {best.state['value']:.4g}"
        )
    elif stage.ema:
        vae.set_weights(trainer.ema_vae.get_weights())


def _measure_latents(config, run, data, vae):
    """Gives the autoencoder the scale of its latents, where it is to be measured, and writes the report of them."""
    mean, logvar = _moments(vae, data, config)
    given = config.vae.latent_scale
    if given is not None:  # another run's autoencoder, with which this one began, may have had another
        vae.set_latent_statistics(np.zeros(mean.shape[-1]), np.full(mean.shape[-1], 1.0 / given))
    elif not config.vae_training.decoder_only:  # else its latents are those of before, scale and all
        vae.set_latent_statistics(*latent_scale(mean, logvar))
    scale = np.asarray(vae.latent_mean), np.asarray(vae.latent_std)
    report = latent_report(mean, logvar, *scale, config.image_size)
    run.write_json("latents.json", report)
    save_plot(plot_latents, run.latents_path, report)
    if report["dead_channels"]:
        print(
            f"   note: {report['dead_channels']} of {len(report['channels'])} channels of the latents are dead: see "
            f"{run.latents_path}"
        )


def _moments(vae, data, config):
    """Mean and log-variance (N, h, w, C) of the raw latents of training pictures."""
    ids = data.train_ids[:LATENT_STATISTICS_FROM]
    raw_moments = tf.function(vae.raw_moments, autograph=False)
    parts = []
    for chunk in np.array_split(ids, max(1, len(ids) // at_once(config.image_size, most=64))):
        pixels = pipeline.to_pixels(data.whole(chunk, config.image_size))
        parts.append([np.asarray(part) for part in raw_moments(pixels)])
    return [np.concatenate(part) for part in zip(*parts, strict=True)]
