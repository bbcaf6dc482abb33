"""The order of the work: data, autoencoder, latents, diffusion, pictures.

Every stage asks the run folder what is done already and goes on from there, so that the same command, given
again, resumes. The one room that sees the whole config.
"""

import contextlib
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import config as settings
import input_pipeline as pipeline
from callbacks import Bar, Interrupted, Keeper, Signals
from checkpoint import RunFolder, assign, collect, named_variables
from dataset import paper_flowers
from diffusion.schedule import Process
from diffusion.times import training_times
from errors import InputError
from evaluate import follows_captions, plot_curves
from generate import Networks, captioned_grid, make_diffusion, make_vae
from metrics import Protocol, psnr
from model.perceptual import FeatureNetwork, PerceptualDistance
from optimizers import OPTIMIZERS, warmup_cosine
from trainer import KID, LatentDiffusionTrainer, VAETrainer, reconstruct

LATENT_STATISTICS_FROM = 2048  # pictures from which the latents' mean and deviation are measured
FEWEST_FOR_KID = 3  # pictures on either side
SHOWN_RECONSTRUCTIONS = 8
PROBED_CAPTIONS = 256
PROBED_ATTRIBUTES = ("petal_color", "center_color", "petals")


class Stopped(Exception):
    """A signal stopped the run; it is saved. `signal` is the signal's number."""

    def __init__(self, run, number):
        super().__init__(f"Stopped; {run} is saved. Give the same command again to go on.")
        self.signal = number


class Clock:
    """Prints a heading for each stage and how long it took."""

    @contextlib.contextmanager
    def stage(self, name):
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        yield
        print(f"   {name}: {time.monotonic() - started:.1f} s", flush=True)


def train(config: settings.Config) -> Path:
    """Trains a text-to-image model end to end, or goes on where the run folder stands.

    Args:
        config: all settings.

    Returns:
        The run's folder.

    Raises:
        InputError: settings, data or run folder that cannot be used.
        Stopped: a signal came; everything is saved.
    """
    settings.check(config)
    batch_sizes = {
        "--vae-training.batch-size": config.vae_training.batch_size,
        "--batch-size": config.training.batch_size,
    }
    strategy, clock = devices(config.gpus, batch_sizes), Clock()
    with RunFolder.open(config.run, settings.to_dict(config)) as run, Signals() as signals:
        try:
            with clock.stage("data"):
                data = _data(config, run)
            if run.curves_path.exists():  # the last thing that a run writes
                print("\nThis run is finished; there is nothing left to do.")
            else:
                _train(config, run, data, strategy, signals, clock)
            _say_where(run, data)
        except Interrupted as stop:
            raise Stopped(config.run, stop.signal) from stop
    return run.path


def _train(config, run, data, strategy, signals, clock):
    judge = config.evaluation
    # First of all, so that what cannot be had is refused before anything is trained.
    features = FeatureNetwork(judge.network, judge.size, judge.weights)
    text = _text_encoder_from(config.text_from, data.vocabulary) if config.text_from else None
    with clock.stage("autoencoder"):
        vae = _autoencoder(config, run, data, strategy, signals)
    with clock.stage("latents"):
        latents = _latents(config, run, data, vae)
    with clock.stage("diffusion"):
        trainer = _diffusion(config, run, data, vae, latents, features, text, strategy, signals)
    with clock.stage("pictures"):
        _pictures(run, data, trainer)


def devices(gpus: str, batch_sizes: dict[str, int]):
    """The strategy that trains on the chosen devices: mirrored over several GPUs, plain on one or on the CPU.

    Args:
        gpus: "all", "none", or indices such as "0,2".
        batch_sizes: pictures a step, by the flag that sets them; several devices must divide them.

    Raises:
        InputError: there is no such GPU, or the batch does not divide.
    """
    found = tf.config.list_physical_devices("GPU")
    chosen = _choose_gpus(gpus, found)
    tf.config.set_visible_devices(chosen, "GPU")
    # Rewriting its graph delays the U-Net's first step by seconds, and on a CPU makes none faster.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not chosen})
    for gpu in chosen:
        tf.config.experimental.set_memory_growth(gpu, True)
    for flag, batch_size in batch_sizes.items():
        if batch_size % max(1, len(chosen)):
            raise InputError(f"{flag}: received {batch_size}, expected a multiple of the {len(chosen)} GPUs")
    if len(chosen) > 1:
        return tf.distribute.MirroredStrategy([f"GPU:{index}" for index in range(len(chosen))])
    return tf.distribute.get_strategy()


def _choose_gpus(gpus, found):
    if gpus in ("all", "none"):
        return found if gpus == "all" else []
    try:
        indices = [int(index) for index in gpus.split(",")]
        if min(indices) < 0 or len(set(indices)) < len(indices):
            raise ValueError
        return [found[index] for index in indices]
    except (ValueError, IndexError):
        raise InputError(
            f"--gpus: received {gpus!r}, expected all, none, or indices below {len(found)}, such as 0"
        ) from None


class _Data:
    """The captioned pictures of a run: in memory or mapped, split, with their validation captions."""

    def __init__(self, config, captioned, pictures, name):
        self.captioned, self.pictures, self.name = captioned, pictures, name
        self.vocabulary, self.captions = captioned.vocabulary, captioned.captions
        self.train_ids, self.validation_ids = pipeline.split(
            len(pictures), config.training.validation_fraction, config.seed
        )
        first = np.stack([self.captions[index][0] for index in self.validation_ids])
        self.validation_tokens = first
        tests = captioned.test_tokens
        self.shown_tokens = first if tests is None else tests
        self.has_probe = (Path(config.data) / "attributes.csv").exists()
        self.fingerprint = pipeline.fingerprint(pictures)


def _data(config, run):
    folder = Path(config.data)
    if config.data == settings.Config.data and not folder.exists():
        print(f"   drawing paper flowers into {folder}")
        paper_flowers.write(folder, size=config.image_size)
    captioned = pipeline.load_data(folder)
    augmentation = pipeline.Augmentation(**settings.part(config.augmentation))
    pictures = pipeline.read_pictures(
        captioned.paths,
        augmentation.picture_side(config.image_size),
        cache_file=run.cache_path("pictures.npy"),
    )
    _check_validation(config, len(pictures))
    _keep_vocabulary(config, run, captioned.vocabulary)
    data = _Data(config, captioned, pictures, folder.name)
    print(
        f"   {len(pictures)} pictures of {pictures.shape[1]} px, {len(data.validation_ids)} of them for validation; "
        f"{data.vocabulary.size} words"
    )
    return data


def _check_validation(config, n):
    fraction = config.training.validation_fraction
    held_out = len(pipeline.split(n, fraction, config.seed)[1])
    if held_out < FEWEST_FOR_KID:
        raise InputError(
            f"{config.data}: received {n} pictures, of which --training.validation-fraction {fraction} holds out "
            f"{held_out}; expected at least {FEWEST_FOR_KID} for KID"
        )


def _keep_vocabulary(config, run, vocabulary):
    """Writes the words into the run folder; a run that goes on must find the same words in its data."""
    path = run.vocabulary_path
    if not path.exists():
        vocabulary.save(path)
    elif pipeline.Vocabulary.load(path).words != vocabulary.words:
        raise InputError(f"{config.data}: its words are no longer those of {path}; expected unchanged data")


def _whole(pictures, ids, image_size):
    """The pictures `ids` without augmentation, uint8 (N, image_size, image_size, 3)."""
    return pipeline.resized(np.asarray(pictures[ids]), image_size)


# The autoencoder.


def _autoencoder(config, run, data, strategy, signals):
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
    assign(named_variables(vae), saved.tensors, "vae", source=run.path)


def _train_autoencoder(config, run, data, vae, strategy, signals):
    stage = config.vae_training
    steps_per_epoch = stage.steps_per_epoch or max(1, len(data.train_ids) // stage.batch_size)
    keeper = Keeper(run, "vae", steps_per_epoch, signals, stage.epochs)
    augmentation = pipeline.Augmentation(**settings.part(config.augmentation))
    held_out = _whole(data.pictures, data.validation_ids, config.image_size)
    stream = {
        "image_size": config.image_size,
        "batch_size": stage.batch_size,
        "seed": config.seed,
        "latent_shape": vae.latent_shape(config.image_size),
    }
    with strategy.scope():
        perceptual = PerceptualDistance(stage.perceptual_depth) if stage.perceptual_weight else None
        trainer = VAETrainer(vae, stage.recon_loss, stage.kl_weight, perceptual, stage.perceptual_weight)
        trainer.compile(_optimizer(trainer, stage, steps_per_epoch))

    def finish_row(epoch, row):
        shown = held_out[:SHOWN_RECONSTRUCTIONS]
        rebuilt = reconstruct(vae, held_out)
        _save_pairs(shown, rebuilt[:SHOWN_RECONSTRUCTIONS], run.sample_path(f"vae_{epoch + 1:03d}.png"))
        quality = psnr(held_out, rebuilt)
        return {"val_psnr": quality.value, "val_psnr_low": quality.low, "val_psnr_high": quality.high}

    keeper.finish_row = finish_row
    _fit(
        trainer,
        keeper,
        lambda step: pipeline.picture_batches(
            data.pictures, augmentation=augmentation, ids=data.train_ids, start_step=step, **stream
        ),
        pipeline.picture_validation_batches(held_out, **stream),
    )
    if config.vae.latent_scale is None:
        vae.set_latent_statistics(*_latent_statistics(vae, data, config))


def _latent_statistics(vae, data, config):
    """Mean and standard deviation (C,) of raw posterior samples, over training pictures."""
    ids = data.train_ids[:LATENT_STATISTICS_FROM]
    raw_moments = tf.function(vae.raw_moments)
    means, variances = [], []
    for chunk in np.array_split(ids, max(1, len(ids) // 64)):
        pixels = _whole(data.pictures, chunk, config.image_size).astype("float32") / 127.5 - 1.0
        mean, logvar = raw_moments(pixels)
        means.append(np.asarray(mean))
        variances.append(np.exp(np.asarray(logvar)))
    means, variances = np.concatenate(means), np.concatenate(variances)
    return means.mean((0, 1, 2)), np.sqrt(means.var((0, 1, 2)) + variances.mean((0, 1, 2)))


def _save_pairs(originals, rebuilt, path):
    pairs = [image for pair in zip(originals, rebuilt, strict=True) for image in pair]
    captions = ["original", "reconstruction"] * len(originals)
    _save_grid(pairs, captions, path, columns=8)


def _save_grid(images, captions, path, columns=4):
    path.parent.mkdir(exist_ok=True)
    captioned_grid(images, captions, columns=columns).save(path)


# Diffusion.


def _latents(config, run, data, vae):
    @tf.function
    def encode(pixels):
        return vae.encode(pixels)

    return pipeline.cached_latents(
        data.pictures,
        lambda pixels: tuple(np.asarray(part) for part in encode(pixels)),
        cache_file=run.cache_path("latents.safetensors"),
        fingerprint={
            "vae": pipeline.fingerprint(*(np.asarray(weight) for weight in vae.weights)),
            "pictures": data.fingerprint,
        },
        image_size=config.image_size,
        augmentation=pipeline.Augmentation(**settings.part(config.augmentation)),
        crops=config.training.latent_crops,
        seed=config.seed,
    )


def _diffusion(config, run, data, vae, latents, features, text, strategy, signals):
    stage, judge = config.training, config.evaluation
    steps_per_epoch = stage.steps_per_epoch or max(1, len(data.train_ids) // stage.batch_size)
    keeper = Keeper(run, "diffusion", steps_per_epoch, signals, stage.epochs, kid_every=judge.every)
    draw = {"steps": judge.steps, "guidance": judge.guidance}
    keras.utils.set_random_seed(config.seed)  # again: a resumed run may not have trained the autoencoder
    with strategy.scope():
        unet, text_encoder = make_diffusion(config, data.vocabulary)
        if text:
            assign(named_variables(text_encoder), text, "ema_text_encoder", source=config.text_from)
        process = Process(**settings.part(config.diffusion))
        trainer = LatentDiffusionTrainer(
            Networks(vae, text_encoder, unet, process, data.vocabulary),
            config.image_size,
            ema=stage.ema,
            train_text_encoder=text is None,
            kid=KID(features),
            kid_images=_whole(data.pictures, data.validation_ids, config.image_size),
            kid_tokens=data.validation_tokens[: judge.images],
            draw=draw,
            draw_batch=judge.batch_size,
        )
        trainer.compile(_optimizer(trainer, stage, steps_per_epoch))
    protocol = _protocol(config, trainer, data)
    shown_tokens = data.shown_tokens[: judge.previews]

    def finish_row(epoch, row):
        trainer.plot_images(shown_tokens, _made(run.sample_path(f"epoch_{epoch + 1:03d}.png")))
        if "val_kid" not in row:
            return {}
        estimate, floor = trainer.kid_metric.estimate(), trainer.kid_metric.floor()
        measured = {"val_kid_low": estimate.low, "val_kid_high": estimate.high, "val_kid_floor": floor.value}
        return {**measured, "protocol": protocol}

    def choose(row):
        if "val_kid" not in row:
            return None
        return trainer.kid_metric.estimate(), {"protocol": protocol}

    keeper.finish_row, keeper.choose = finish_row, choose
    stream = {
        "captions": data.captions,
        "vocabulary": data.vocabulary,
        "batch_size": stage.batch_size,
        "context": _text_context(run, data, text_encoder) if text else None,
    }
    _fit(
        trainer,
        keeper,
        lambda step: pipeline.latent_batches(
            latents,
            seed=config.seed,
            caption_dropout=stage.caption_dropout,
            times=training_times(stage.times, process),
            start_step=step,
            ids=data.train_ids,
            **stream,
        ),
        pipeline.validation_batches(latents, seed=config.seed, ids=data.validation_ids, **stream),
    )
    return trainer


def _text_encoder_from(path, vocabulary):
    """The tensors of another run of the same words, among them its averaged text encoder."""
    run = RunFolder.read(path)
    saved = run.best("diffusion") or run.latest("diffusion")
    if saved is None:
        raise InputError(f"--text-from: received {path}, expected a run with a trained text encoder")
    if pipeline.Vocabulary.load(run.vocabulary_path).words != vocabulary.words:
        raise InputError(f"--text-from: received {path}, whose words are not those of the data")
    return saved.tensors


def _text_context(run, data, text_encoder):
    """The embeddings of all captions by the frozen text encoder, computed once."""

    @tf.function
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
        fingerprint={
            "text encoder": pipeline.fingerprint(*(np.asarray(weight) for weight in text_encoder.weights))
        },
    )


def _made(path):
    path.parent.mkdir(exist_ok=True)
    return path


def _protocol(config, trainer, data):
    return Protocol(
        **trainer.kid_metric.feature_network.protocol,
        n_real=len(data.validation_ids),
        n_generated=len(trainer.kid_tokens),
        sampler="ddim",
        steps=config.evaluation.steps,
        guidance=config.evaluation.guidance,
        ema=True,  # the averaged networks draw
        seed=0,
    ).to_dict()


def _optimizer(trainer, stage, steps_per_epoch):
    return OPTIMIZERS[stage.optimizer](
        trainer.trained_variables,
        learning_rate=warmup_cosine(stage.learning_rate, stage.epochs * steps_per_epoch, stage.warmup_steps),
        weight_decay=stage.weight_decay,
        clip_norm=stage.clip_norm,
    )


def _fit(trainer, keeper, batches_from, validation):
    """Keras' `fit` from wherever the keeper's checkpoint stands, in the middle of an epoch too."""
    keeper.restore(trainer)
    total = keeper.epochs * keeper.steps_per_epoch
    callbacks = [keeper, Bar(keeper.stage, total, keeper)]
    try:
        if keeper.pending:  # all steps of the epoch were done, but not what closes it
            keeper.set_model(trainer)
            epoch = keeper.step // keeper.steps_per_epoch - 1
            keeper.on_epoch_begin(epoch)
            logs = trainer.evaluate(validation, return_dict=True, verbose=0)
            keeper.on_epoch_end(epoch, {f"val_{name}": value for name, value in logs.items()})
        while keeper.step < total:
            epoch, done = divmod(keeper.step, keeper.steps_per_epoch)
            trainer.fit(
                batches_from(keeper.step),
                initial_epoch=epoch,
                epochs=epoch + 1 if done else keeper.epochs,
                steps_per_epoch=keeper.steps_per_epoch - done,
                validation_data=validation,
                callbacks=callbacks,
                shuffle=False,  # the stream is shuffled already; without it Keras warns
                verbose=0,
            )
    except Interrupted:
        keeper.signals.shield()  # a second Ctrl-C must not cut the saving
        keeper.save(trainer)
        raise


# The end.


def _pictures(run, data, trainer):
    best = run.best("diffusion")
    if best:  # the best averaged networks take the place of the last ones; the compiled painter stays
        for name in ("ema_unet", "ema_text_encoder"):
            assign(named_variables(trainer.networks[name]), best.tensors, name, source=run.path)
    if data.has_probe:
        captions = data.vocabulary.decode(data.shown_tokens[:PROBED_CAPTIONS])
        _report_probe(run, follows_captions(trainer.painter, captions, **trainer.draw_settings))
    unfinished = run.curves_path.with_name(".curves.png")
    plot_curves(run.rows(), unfinished)
    unfinished.replace(run.curves_path)


def _say_where(run, data):
    best = run.best_state("diffusion")
    prompt = data.vocabulary.decode(data.shown_tokens[:1])[0]
    print(f"   pictures         {run.path / 'samples'}")
    print(f"   curves           {run.curves_path}")
    if best:
        interval = f"[{best['low']:.4f}, {best['high']:.4f}]"
        print(
            f"   best checkpoint  {run.path / 'best'}, of epoch {best['epoch']}, KID {best['value']:.4f} {interval}"
        )
    print(f'\nDraw a picture:\n   python cup3.py generate --run {run.path} --prompt "{prompt}"')


def _report_probe(run, right):
    run.truncate_log("probe", -1)
    run.log({"stage": "probe", "step": 0, **right})
    shares = ", ".join(f"{name.replace('_', ' ')} {right[name]:.1%}" for name in PROBED_ATTRIBUTES)
    print(f"   of {right['n']} test captions the pictures follow: {shares}")
