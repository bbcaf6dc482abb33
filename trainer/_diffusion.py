"""The training of a U-Net, and of the text encoder with it."""

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import averages
from diffusion.targets import diffuse, perturbed
from generate import Networks, Painter, Picture, captioned_grid
from model.unet import LogVariance
from trainer._base import Trainer, copy, move_average


class LatentDiffusionTrainer(Trainer):
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
        micro_batches: see `Trainer`.
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
        self.ema_unet, self.ema_text_encoder = copy(self.unet), copy(self.text_encoder)
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

    @property
    def kept_variables(self):
        kept = {"average": self.power_averages.variables} if self.power_averages else {}
        return super().kept_variables | kept

    def after_step(self):
        """Moves the averaged networks towards the trained ones."""
        for name, network in self.averaged_networks.items():
            average = getattr(self, f"ema_{name}").weights
            move_average(average, network.weights, self.ema, self.optimizer.iterations)

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
