"""`VAETrainer` and `LatentDiffusionTrainer`: networks and batches in, training out.

The only room with gradients and averaged weights. Both trainers are `keras.Model`s with `compile`
and `fit` and take Keras callbacks. Nothing in a step draws a random number: the batch carries its own, so N
replicas do what one does.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import averages
import parallel
from diffusion.targets import diffuse, perturbed
from generate import Networks, Painter, Picture, captioned_grid, to_images
from metrics import KID
from model.unet import LogVariance
from model.vae import kl_divergence, sample_posterior

__all__ = ["KID", "LatentDiffusionTrainer", "VAETrainer", "reconstruct"]


class _Trainer(keras.Model):
    """What both trainers share: the step, its division among replicas, and weighted means of the losses.

    A subclass lists the names of its losses in `loss_names` and gives `sample_losses(batch, training)`: a dict of the
    loss of each sample (B,), of which "loss" is minimised.

    Args:
        name: of the Keras model.
        micro_batches: parts of a batch (of this replica's share) whose gradients are added up, see
            `parallel.summed`; None chooses by `parallel.parts_of`.
    """

    loss_names = ("loss",)

    def __init__(self, name, micro_batches=None):
        super().__init__(name=name)
        self.micro_batches = micro_batches
        self.trackers = {name: keras.metrics.Mean(name=name) for name in self.loss_names}

    @property
    def metrics(self):
        return list(self.trackers.values())

    def make_train_function(self, force=False):
        if self.train_function is None or force:
            self.train_function = self._function_of(self.train_step)

    def make_test_function(self, force=False):
        if self.test_function is None or force:
            self.test_function = self._function_of(self.test_step)

    def _function_of(self, step):
        """What Keras calls at each step with an iterator: it takes the next batch and runs `step` on all replicas.

        One graph does it. Keras' own puts a second one around that, and has AutoGraph read the source of every layer,
        which nothing here needs: the first step waits for both.

        Args:
            step: batch -> dict of scalars, `train_step` or `test_step`.

        Returns:
            iterator -> dict of the scalars' means over the replicas.
        """
        strategy = self.distribute_strategy

        def on_replicas(batch):
            means = strategy.run(step, (batch,))
            return {name: strategy.reduce("MEAN", value, axis=None) for name, value in means.items()}

        if not self.run_eagerly:
            settings = {"autograph": False, "reduce_retracing": True, "jit_compile": self.jit_compile}
            on_replicas = tf.function(on_replicas, **settings)
        return lambda iterator: on_replicas(next(iterator))

    def train_step(self, batch):
        """One step on a batch (this replica's part of it)."""
        gradients, means = self._gradients(batch)
        self.optimizer.apply(gradients, self.trained_variables)
        self.after_step()
        return self._track(means)

    def _gradients(self, batch):
        """The gradients of the batch's mean loss, this replica's share of them, and the mean of each loss."""
        variables = self.trained_variables
        parts = parallel.parts_of(next(iter(batch.values())).shape[0], self.micro_batches)

        def part(rows):
            with tf.GradientTape() as tape:
                losses = self.sample_losses(rows, training=True)
                # The optimizer sums gradients over the replicas, so each takes its share of the mean.
                loss = ops.mean(losses["loss"]) / (parts * self.distribute_strategy.num_replicas_in_sync)
            gradients = [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, variables)]
            return gradients, {name: ops.mean(losses[name]) / parts for name in self.loss_names}

        zeros = (
            [tf.zeros(variable.shape) for variable in variables],
            dict.fromkeys(self.loss_names, tf.zeros(())),
        )
        return parallel.summed(part, batch, parts, zeros)

    def test_step(self, batch):
        """The losses of a validation batch; its "weight" (B,) is 0 for rows that only fill the batch up."""
        names = sorted(batch)

        def losses_of(*rows):
            losses = self.sample_losses(dict(zip(names, rows, strict=True)), training=False)
            return ops.stack([losses[name] for name in self.loss_names], axis=-1)

        losses = parallel.joined(losses_of, [batch[name] for name in names], [len(self.loss_names)])
        return self._track(
            dict(zip(self.loss_names, tf.unstack(losses, axis=-1), strict=True)), batch["weight"]
        )

    def after_step(self):
        """What follows the optimizer's step, such as averaging weights."""

    def _track(self, losses, weight=None):
        for name, tracker in self.trackers.items():
            tracker.update_state(losses[name], sample_weight=weight)
        return {name: tracker.result() for name, tracker in self.trackers.items()}

    def compile(self, optimizer, **kwargs):
        """Takes an optimizer that was built for `trained_variables`; XLA stays off unless asked for.

        Raises:
            ValueError: several steps an execution, between which callbacks would see nothing.
        """
        if kwargs.get("steps_per_execution", 1) != 1:
            raise ValueError(
                f"steps_per_execution must be 1. Received: {kwargs['steps_per_execution']}, "
                "of which callbacks that count steps would miss some"
            )
        super().compile(optimizer=optimizer, **{"jit_compile": False, **kwargs})

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Nothing is left to build; Keras would average a batch over the replicas for it, which fails on a mask."""


class VAETrainer(_Trainer):
    """Trains an `AutoencoderKL` by reconstruction, KL and, if wanted, perceptual loss.

    Args:
        vae: the `AutoencoderKL`.
        recon_loss: "l1" or "mse".
        kl_weight: weight of the KL divergence (nats, mean over the latents' values).
        perceptual: function of (pixels, pixels) -> distance (B,), or None.
        perceptual_weight: its weight.
        micro_batches: see `_Trainer`.

    Batches are dicts of `pixels` (B, H, W, 3), `posterior_noise` (B, h, w, C) and, in validation, `weight` (B,).
    """

    loss_names = ("loss", "recon_loss", "kl_loss", "perceptual_loss")

    def __init__(
        self,
        vae,
        recon_loss="l1",
        kl_weight=1e-4,
        perceptual=None,
        perceptual_weight=0.0,
        micro_batches=None,
    ):
        if recon_loss not in ("l1", "mse"):
            raise ValueError(f"recon_loss must be l1 or mse. Received: {recon_loss!r}")
        super().__init__("vae_trainer", micro_batches)
        self.vae, self.recon_loss, self.kl_weight = vae, recon_loss, kl_weight
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.built = True

    @property
    def trained_variables(self):
        return self.vae.trainable_variables

    @property
    def networks(self):
        """The networks that a checkpoint keeps, by name."""
        return {"vae": self.vae}

    def call(self, pixels, training=False):
        return self.vae(pixels, training=training)

    def sample_losses(self, batch, training):
        """The losses of each sample, (B,) each."""
        pixels = batch["pixels"]
        mean, logvar = self.vae.raw_moments(pixels, training)
        z = sample_posterior(mean, logvar, batch["posterior_noise"])
        reconstruction = ops.cast(self.vae.decoder(z, training=training), "float32")
        error = reconstruction - pixels
        recon = ops.mean(ops.abs(error) if self.recon_loss == "l1" else ops.square(error), axis=(1, 2, 3))
        kl = kl_divergence(mean, logvar) / float(np.prod(mean.shape[1:]))
        perceptual = self.perceptual(pixels, reconstruction) if self.perceptual_weight else ops.zeros_like(kl)
        total = recon + self.kl_weight * kl + self.perceptual_weight * perceptual
        return {"loss": total, "recon_loss": recon, "kl_loss": kl, "perceptual_loss": perceptual}


class LatentDiffusionTrainer(_Trainer):
    """Trains a U-Net, and the text encoder with it, to denoise latents (Ho et al. 2020, Rombach et al. 2022).

    It keeps an averaged copy of both networks (EMA), which draws all pictures.

    Args:
        networks: `generate.Networks`; its vae is frozen and only decodes.
        image_size: side of the pictures in pixels.
        ema: decay of the average; it warms up as (1 + step) / (10 + step).
        train_text_encoder: whether the text encoder learns too; batches then carry `tokens`, otherwise
            `context`.
        kid: a `metrics.KID`, or None to leave KID out of validation.
        kid_images: uint8 (N, H, W, 3), the real pictures for it, measured when first needed; None where its
            real features are set.
        kid_tokens: int32 (M, T), the captions drawn for it.
        draw: keywords of `Painter.draw` for previews and validation, such as `generate.drawing` gives.
        draw_batch: pictures drawn at once.
        micro_batches: see `_Trainer`.
        offset_noise: strength of the batch's `offset_noise` (B, 1, 1, C) in the noise of training.
        input_perturbation: strength of its `input_noise` (B, h, w, C) in what the U-Net sees of that noise; see
            `diffusion.targets.perturbed` for both.
        power_averages: whether `fit` also keeps the averages from which `averages` rebuilds any other.

    Batches are those of `input_pipeline.latent_batches`: `latents`, `noise` (B, h, w, C), `diffusion_times` (B,),
    `tokens` (B, T) or `context` (B, T, D), `mask` (B, T), and the two noises above where their strengths are not 0.
    """

    def __init__(
        self,
        networks: Networks,
        image_size,
        ema=0.999,
        train_text_encoder=True,
        kid=None,
        kid_images=None,
        kid_tokens=None,
        draw=None,
        draw_batch=64,
        micro_batches=None,
        offset_noise=0.0,
        input_perturbation=0.0,
        power_averages=False,
    ):
        super().__init__("latent_diffusion_trainer", micro_batches)
        self.unet, self.text_encoder = networks.unet, networks.text_encoder
        self.process, self.ema, self.train_text_encoder = networks.process, ema, train_text_encoder
        self.ema_unet, self.ema_text_encoder = _copy(self.unet), _copy(self.text_encoder)
        self.log_variance = LogVariance() if self.process.weight == "uncertainty" else None
        averaged = networks._replace(unet=self.ema_unet, text_encoder=self.ema_text_encoder)
        self.painter = Painter(averaged, image_size, draw_batch)
        self.kid_metric, self.kid_images, self.kid_tokens = kid, kid_images, kid_tokens
        self.draw_settings = draw or {}
        self.offset_noise, self.input_perturbation = offset_noise, input_perturbation
        self.power_averages = PowerAverages(self.averaged_networks) if power_averages else None
        self.kid_due = True
        self.built = True

    @property
    def trained_variables(self):
        text = self.text_encoder.trainable_variables if self.train_text_encoder else []
        weight = self.log_variance.trainable_variables if self.log_variance else []
        return self.unet.trainable_variables + text + weight

    @property
    def networks(self):
        """The networks that a checkpoint keeps, by name."""
        names = ("unet", "text_encoder", "ema_unet", "ema_text_encoder", "log_variance")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def averaged_networks(self):
        """The networks whose weights are averaged, by name."""
        text = {"text_encoder": self.text_encoder} if self.train_text_encoder else {}
        return {"unet": self.unet, **text}

    def fit(self, *args, callbacks=None, **kwargs):
        """Keras' `fit`, which moves the power averages after every `averages.EVERY` steps."""
        own = [_Averaging()] if self.power_averages else []
        return super().fit(*args, callbacks=[own, callbacks or []], **kwargs)  # which Keras flattens

    def diffusion_schedule(self, diffusion_times):
        """(noise_rates, signal_rates), each (B, 1, 1, 1), at diffusion_times (B,)."""
        return self.process.rates(diffusion_times)

    def call(self, inputs, training=False):
        return self.unet(inputs, training=training)

    def sample_losses(self, batch, training):
        """The loss of each sample, (B,): its error in the process' target, as the process weighs and measures it.

        The learned weight is for training only, so that the losses of validation compare: there it is 1.
        """
        latents, noise, times = batch["latents"], batch["noise"], batch["diffusion_times"]
        if training and self.offset_noise:
            noise = perturbed(noise, batch["offset_noise"], self.offset_noise)
        seen = noise
        if training and self.input_perturbation:
            seen = perturbed(noise, batch["input_noise"], self.input_perturbation)
        noisy = self.process.scaled(diffuse(latents, seen, *self.diffusion_schedule(times)), times)
        if self.train_text_encoder:
            context = self.text_encoder([batch["tokens"], batch["mask"]], training=training)
        else:
            context = batch["context"]
        prediction = self.unet([noisy, times, context, batch["mask"]], training=training)
        learns = training and self.log_variance is not None
        log_variance = self.log_variance(times) if learns else ops.zeros_like(times)
        return {"loss": self.process.losses(prediction, latents, noise, times, log_variance)}

    def after_step(self):
        """Moves the averaged networks towards the trained ones."""
        step = ops.cast(self.optimizer.iterations, "float32")
        share = 1.0 - ops.minimum(self.ema, (1.0 + step) / (10.0 + step))
        for average, weight in self._averages():
            # average += share (weight - average); Keras' own operators take three times as long to trace.
            average, weight = average.value, weight.value
            average.assign_sub(share * (average - weight))

    def _averages(self):
        for name, network in self.averaged_networks.items():
            yield from zip(getattr(self, f"ema_{name}").weights, network.weights, strict=True)

    def evaluate(self, *args, return_dict=False, **kwargs):
        """Keras' `evaluate`, and `kid` of pictures drawn from `kid_tokens` where it is due."""
        logs = super().evaluate(*args, return_dict=True, **kwargs)
        if self.kid_metric is not None and self.kid_due:
            logs["kid"] = float(self.measure_kid().value)
        return logs if return_dict else list(logs.values())

    def measure_kid(self):
        """Draws a picture for each of `kid_tokens`, of seeds 0, 1, ..., and returns KID as an `Estimate`."""
        if self.kid_images is not None:
            self.kid_metric.set_real(self.kid_metric.feature_network(self.kid_images, progress=True))
            self.kid_images = None
        return self.painter.measure(self.kid_metric, self.kid_tokens, **self.draw_settings)

    def generate_images(self, tokens, seeds=None, **settings):
        """Draws with the averaged networks.

        Args:
            tokens: int32 (N, T).
            seeds: N whole numbers; default 0 to N - 1.
            settings: keywords of `Painter.draw`, where they differ from the trainer's.

        Returns:
            uint8 (N, H, W, 3).
        """
        seeds = np.arange(len(tokens)) if seeds is None else seeds
        return np.stack(list(self.painter.draw(tokens, seeds, **{**self.draw_settings, **settings})))

    def plot_images(self, tokens, path, seeds=None, captions=None, **settings):
        """Draws pictures of `tokens` (N, T) and writes them as a captioned grid to `path`."""
        seeds = np.arange(len(tokens)) if seeds is None else seeds
        images = self.generate_images(tokens, seeds, **settings)
        if captions is None:
            texts = self.painter.networks.vocabulary.decode(tokens)
            captions = [Picture(*row).caption for row in zip(images, texts, seeds, strict=True)]
        captioned_grid(images, captions).save(path)


class PowerAverages:
    """Two power averages of networks' weights (Karras et al. 2024, section 3), see `averages`.

    Args:
        networks: Keras models by name; each average begins as their weights.

    Attributes:
        variables: (name, Keras variable) of all averages, named `<length>/<network>/<path of the weight>`.
    """

    def __init__(self, networks):
        self._exponents = [averages.exponent(length) for length in averages.LENGTHS]
        named = [
            (f"{name}/{weight.path}", weight) for name, net in networks.items() for weight in net.weights
        ]
        self._weights = [weight for _, weight in named]
        self._kept = [
            [keras.Variable(weight, trainable=False, name="average") for weight in self._weights]
            for _ in averages.LENGTHS
        ]
        self.variables = [
            (f"{length}/{name}", variable)
            for length, kept in zip(averages.LENGTHS, self._kept, strict=True)
            for (name, _), variable in zip(named, kept, strict=True)
        ]
        self._move = tf.function(self._moved, autograph=False)

    def update(self, step):
        """Moves the averages towards the weights that they have at `step`, a multiple of `averages.EVERY`."""
        self._move(tf.constant([averages.share(step, exponent) for exponent in self._exponents], "float32"))

    def _moved(self, shares):
        for kept, share in zip(self._kept, tf.unstack(shares), strict=True):
            for average, weight in zip(kept, self._weights, strict=True):
                average.assign(average + share * (weight - average))


class _Averaging(keras.callbacks.Callback):
    """Moves the power averages of a `LatentDiffusionTrainer` between its steps, outside their graph."""

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.optimizer.iterations.numpy())
        if step % averages.EVERY == 0:
            self.model.power_averages.update(step)


def _copy(network):
    """A second network of the same shape and weights, which no gradient reaches."""
    copy = type(network).from_config(network.get_config())
    copy.set_weights(network.get_weights())
    copy.trainable = False
    return copy


def reconstruct(vae, images, batch_size=32):
    """Images uint8 (N, H, W, 3) through the autoencoder's posterior mean and back."""
    chunks = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    parts = [_there_and_back(vae, tf.constant(chunk.astype("float32") / 127.5 - 1.0)) for chunk in chunks]
    return np.concatenate([np.asarray(part) for part in parts])


@tf.function(reduce_retracing=True, autograph=False)
def _there_and_back(vae, pixels):  # not within `reconstruct`, where every call would trace it anew
    def rebuild(pixels):
        return to_images(vae.decode(vae.encode(pixels)[0]))

    return parallel.joined(rebuild, [pixels], pixels.shape[1:], "uint8")
