"""The order of the work: latents and text, encoded once, and the U-Net that is trained on them."""

import keras
import numpy as np
import tensorflow as tf

import averages
import config as settings
import input_pipeline as pipeline
import parallel
from callbacks import Keeper
from checkpoint import RunFolder, assign, named_variables
from diffusion.schedule import Process
from diffusion.times import training_times
from errors import InputError
from files import fingerprint
from generate import Networks, chosen_weights, drawing, make_diffusion
from metrics import Protocol
from stages.fitting import fit, optimizer_of, steps_an_epoch
from stages.judgement import Judgement
from trainer import KID, LatentDiffusionTrainer


def latents_of(config, run, data, vae):
    """The `input_pipeline.Latents` of all pictures, from the run's cache where it is of this autoencoder."""

    latent_shape = vae.latent_shape(config.image_size)

    @tf.function(autograph=False)
    def encode(pixels):
        moments = parallel.joined(
            lambda pixels: tf.concat(vae.encode(pixels), -1),
            [pixels],
            [*latent_shape[:2], 2 * latent_shape[2]],
        )
        return tf.split(moments, 2, -1)

    return pipeline.cached_latents(
        data.pictures,
        lambda pixels: tuple(np.asarray(part) for part in encode(pixels)),
        cache_file=run.cache_path("latents.safetensors"),
        fingerprint={
            "vae": fingerprint(*(np.asarray(weight) for weight in vae.weights)),
            "pictures": data.fingerprint,
        },
        image_size=config.image_size,
        augmentation=data.augmentation,
        crops=config.training.latent_crops,
        seed=config.seed,
    )


def trained_diffusion(config, run, data, vae, latents, features, text, strategy, signals):
    """Trains the U-Net, and the text encoder unless `text` gives it; returns the trainer.

    Args:
        config, run, data, strategy, signals: of the run.
        vae: its trained autoencoder.
        latents: of all its pictures, by `latents_of`.
        features: images -> features for KID.
        text: tensors of another run's text encoder, by `text_encoder_from`, or None.
    """
    stage = config.training
    steps_per_epoch = steps_an_epoch(stage, len(data.train_ids))
    keeper = Keeper(
        run,
        "diffusion",
        steps_per_epoch,
        signals,
        stage.epochs,
        kid_every=config.evaluation.every,
        snapshots=averages.snapshot_steps(stage.epochs * steps_per_epoch, stage.snapshots),
    )
    keras.utils.set_random_seed(config.seed)  # again: a resumed run may not have trained the autoencoder
    with strategy.scope():
        trainer = _trainer(config, data, vae, features, text)
        trainer.compile(optimizer_of(trainer, stage, steps_per_epoch))
    judge = config.evaluation
    protocol = protocol_of(config, trainer.kid_metric, len(data.validation_ids), len(trainer.kid_tokens))
    Judgement(run, trainer, judge, protocol, data.shown_tokens[: judge.previews]).ask(keeper)
    stream = {
        "captions": data.captions,
        "vocabulary": data.vocabulary,
        "batch_size": stage.batch_size,
        "seed": config.seed,
        "context": _text_context(run, data, trainer.text_encoder) if text else None,
    }
    fit(
        trainer,
        keeper,
        lambda step: pipeline.latent_batches(
            latents,
            caption_dropout=stage.caption_dropout,
            times=training_times(stage.times, trainer.process),
            start_step=step,
            ids=data.train_ids,
            offset_noise=bool(stage.offset_noise),
            input_noise=bool(stage.input_perturbation),
            **stream,
        ),
        pipeline.validation_batches(latents, ids=data.validation_ids, **stream),
    )
    return trainer


def _trainer(config, data, vae, features, text):
    """The trainer of new networks, of which the text encoder gets the weights of `text` if there are any."""
    judge = config.evaluation
    unet, text_encoder = make_diffusion(config, data.vocabulary)
    if text:
        assign(named_variables(text_encoder), text, "ema_text_encoder", source=config.text_from)
    process = Process(**settings.part(config.diffusion))
    return LatentDiffusionTrainer(
        Networks(vae, text_encoder, unet, process, data.vocabulary),
        config.image_size,
        ema=config.training.ema,
        train_text_encoder=text is None,
        kid=KID(features),
        kid_images=data.whole(data.validation_ids, config.image_size),
        kid_tokens=data.validation_tokens[: judge.images],
        draw=drawing(config),
        draw_batch=judge.batch_size,
        micro_batches=config.training.micro_batches,
        offset_noise=config.training.offset_noise,
        input_perturbation=config.training.input_perturbation,
        power_averages=config.training.snapshots > 0,
    )


def protocol_of(config, kid, n_real, n_generated) -> dict:
    """The protocol of a run's KID (a `metrics.KID`) between so many pictures."""
    return Protocol(
        **kid.feature_network.protocol,
        n_real=n_real,
        n_generated=n_generated,
        sampler=config.evaluation.sampler,
        spacing=config.evaluation.spacing,
        steps=config.evaluation.steps,
        guidance=config.evaluation.guidance,
        guidance_from=config.evaluation.guidance_interval[0],
        guidance_to=config.evaluation.guidance_interval[1],
        autoguidance=config.evaluation.autoguidance,
        weak=config.evaluation.weak,
        ema=True,  # the averaged networks draw
        seed=0,
    ).to_dict()


def text_encoder_from(config, vocabulary):
    """The tensors of another run of the same words, among them its averaged text encoder."""
    path, run = config.text_from, RunFolder.read(config.text_from)
    saved = chosen_weights(run)
    if saved is None:
        raise InputError(f"--text-from: received {path}, expected a run with a trained text encoder")
    if pipeline.Vocabulary.load(run.vocabulary_path).words != vocabulary.words:
        raise InputError(
            f"--text-from: received {path}, whose words are not those of the data; expected a run of the same data"
        )
    settings.check_same(
        "--text-from", path, "--text-encoder.", run.config["text_encoder"], config.text_encoder
    )
    return saved.tensors


def _text_context(run, data, text_encoder):
    """The embeddings of all captions by the frozen text encoder, computed once."""

    @tf.function(autograph=False)
    def encode(tokens, mask):
        return text_encoder([tokens, mask])

    def context_and_mask(tokens):
        mask = data.vocabulary.mask(tokens)
        return np.asarray(encode(tokens, mask)), mask

    return pipeline.cached_text(
        data.captions,
        data.vocabulary.empty(),
        context_and_mask,
        cache_file=run.cache_path("text.safetensors"),
        fingerprint={"text encoder": fingerprint(*(np.asarray(weight) for weight in text_encoder.weights))},
    )
