"""The training of an autoencoder, and its pictures there and back."""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import parallel
from generate import noise_of, to_images
from input_pipeline import to_pixels
from trainer import losses
from trainer._base import Trainer, copy, loss_scale, move_average, refused_if

PIXELS_AT_ONCE = 32 * 128 * 128  # of pictures, where there are no gradients


class VAETrainer(Trainer):
    """Trains an `AutoencoderKL` by reconstruction, KL and, if wanted, a perceptual and an adversarial loss.

    Args:
        vae: the `AutoencoderKL`.
        recon_loss: "l1", "mse" or "mix", see `trainer.losses.reconstruction`.
        recon_weight: its weight.
        l1_share: of "mix".
        kl_weight: weight of the KL divergence (nats, mean over the latents' values).
        kl_schedule, kl_warmup_steps, kl_cycles: how that weight begins, see `trainer.losses.kl_factor`.
        free_bits: nats a latent value below which a channel's KL is not pressed, see `trainer.losses.free_bits`.
        perceptual: function of (pixels, pixels) -> distance (B,), or None.
        perceptual_weight: its weight.
        adversary: an `Adversary`, or None. It trains with an optimizer of its own.
        decoder_only: whether the encoder stays as it is, and the latents with it.
        ema: decay of an averaged copy of the autoencoder, `ema_vae`; 0 keeps none.
        micro_batches: see `Trainer`.

    Batches are dicts of `pixels` (B, H, W, 3), `posterior_noise` (B, h, w, C) and, in validation, `weight` (B,).
    Validation has the full weight of the KL and no adversarial loss, so that epochs compare; with `ema` it is that of
    the averaged copy.
    """

    loss_names = ("loss", "recon_loss", "kl_loss", "perceptual_loss")

    def __init__(
        self,
        vae,
        recon_loss="l1",
        recon_weight=1.0,
        l1_share=0.5,
        kl_weight=1e-4,
        kl_schedule="constant",
        kl_warmup_steps=0,
        kl_cycles=4,
        free_bits=0.0,
        perceptual=None,
        perceptual_weight=0.0,
        adversary=None,
        decoder_only=False,
        ema=0.0,
        micro_batches=None,
    ):
        if recon_loss not in losses.ERRORS:
            raise ValueError(
                f"recon_loss must be one of {', '.join(losses.ERRORS)}. Received: {recon_loss!r}"
            )
        super().__init__("vae_trainer", micro_batches)
        self.vae, self.recon_loss, self.recon_weight, self.l1_share = vae, recon_loss, recon_weight, l1_share
        self.kl_weight, self.free_bits = kl_weight, free_bits
        self.kl_schedule = (kl_schedule, kl_warmup_steps, kl_cycles)
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.decoder_only, self.ema = decoder_only, ema
        self.ema_vae = copy(vae) if ema else None
        self.adversary = adversary
        if adversary:
            self.decoder_halves = vae.decoder.halves()
            self.trackers |= {name: keras.metrics.Mean(name=name) for name in adversary.names}
        self.step = 0
        self.built = True

    @property
    def trained_variables(self):
        return (self.vae.decoder if self.decoder_only else self.vae).trainable_variables

    @property
    def networks(self):
        """The networks that a checkpoint keeps, by name."""
        named = {"vae": self.vae, "ema_vae": self.ema_vae}
        named |= {"discriminator": self.adversary.discriminator} if self.adversary else {}
        return {name: network for name, network in named.items() if network is not None}

    @property
    def optimizers_in_use(self):
        return [self.optimizer, *([self.disc_optimizer] if self.adversary else [])]

    @property
    def kept_variables(self):
        kept = super().kept_variables
        if self.adversary:
            optimizer = [(variable.path, variable) for variable in self.disc_optimizer.variables]
            kept |= {"disc_optimizer": optimizer, "adversary": self.adversary.variables}
        return kept

    @property
    def averaged_vae(self):
        """The autoencoder to use: the averaged one where there is one."""
        return self.ema_vae or self.vae

    def compile(self, optimizer, disc_optimizer=None, **kwargs):
        """Takes an optimizer for `trained_variables` and, with an adversary, one for its discriminator's.

        Raises:
            ValueError: an adversary without its optimizer, or an optimizer without an adversary.
        """
        if (disc_optimizer is None) != (self.adversary is None):
            raise ValueError(
                "disc_optimizer goes with an adversary. "
                f"Received: disc_optimizer={disc_optimizer}, adversary={self.adversary}"
            )
        super().compile(optimizer=optimizer, **kwargs)
        self.disc_optimizer = disc_optimizer

    def fit(self, *args, **kwargs):
        """Keras' `fit`, from the step that the optimizer has come to."""
        self.step = int(np.asarray(self.optimizer.iterations))
        return super().fit(*args, **kwargs)

    def make_train_function(self, force=False):
        """As the base's; from the adversary's start on its step is another one, so each is traced when it comes."""
        if self.adversary is None:
            super().make_train_function(force)
        elif self.train_function is None or force:
            steps = {
                False: self._function_of(self.train_step),
                True: self._function_of(self.adversarial_step),
            }

            def train(iterator):
                is_adversarial = self.step >= self.adversary.start
                self.step += 1
                return steps[is_adversarial](iterator)

            self.train_function = train

    def call(self, pixels, training=False):
        return self.vae(pixels, training=training)

    def sample_losses(self, batch, training):
        """The losses of each sample, (B,) each."""
        vae = self.vae if training else self.averaged_vae
        pixels, noise = batch["pixels"], batch["posterior_noise"]
        reconstruction, mean, logvar = vae.reparameterised(pixels, noise, training)
        resemblance, named = self._resemblance(pixels, reconstruction)
        kl, pressure = self._kl(mean, logvar, training)
        return {"loss": resemblance + pressure, "kl_loss": kl, **named}

    def _resemblance(self, pixels, reconstruction):
        """What is minimised of reconstructions, (B,), and its parts before their weights."""
        recon = losses.reconstruction(self.recon_loss, pixels, reconstruction, self.l1_share)
        perceptual = (
            self.perceptual(pixels, reconstruction) if self.perceptual_weight else ops.zeros_like(recon)
        )
        total = self.recon_weight * recon + self.perceptual_weight * perceptual
        return total, {"recon_loss": recon, "perceptual_loss": perceptual}

    def _kl(self, mean, logvar, training):
        """The KL in nats a latent value, (B,), and what is minimised of it."""
        by_channel = losses.kl_by_channel(mean, logvar)
        factor = losses.kl_factor(*self._kl_step()) if training else 1.0
        pressure = self.kl_weight * factor * losses.free_bits(by_channel, self.free_bits)
        return ops.mean(by_channel, axis=-1), pressure

    def _kl_step(self):
        schedule, warmup_steps, cycles = self.kl_schedule
        step = self.optimizer.iterations.value if self.optimizer else 0
        return schedule, step, warmup_steps, cycles

    def after_step(self):
        """Moves the averaged copy, if there is one, towards the autoencoder."""
        if self.ema_vae is not None:
            move_average(self.ema_vae.weights, self.vae.weights, self.ema, self.optimizer.iterations)

    def _parts_of(self, batch):
        batch_size, height, width, _ = batch["pixels"].shape
        return parallel.parts_of(batch_size, self.micro_batches, height * width)

    # The adversarial step: both sides learn from one reconstruction.

    def adversarial_step(self, batch):
        """One step of the autoencoder and one of the discriminator on a batch (this replica's part of it)."""
        parts = self._cut(batch)
        looks = [self._look(rows, len(parts)) for rows in parts]
        weight, ratio = self._weight(looks)
        gradients = _added([self._pull(look, weight) for look in looks])
        disc_gradients = _added([look.disc_gradients for look in looks])
        means = dict(zip(looks[0].means, _added([list(look.means.values()) for look in looks]), strict=True))
        means["loss"] = means["loss"] + weight * means["gen_loss"]
        self.optimizer.apply(refused_if(means["loss"], gradients), self.trained_variables)
        judge = self.adversary.discriminator.trainable_variables
        self.disc_optimizer.apply(refused_if(means["disc_loss"], disc_gradients), judge)
        self.adversary.discriminator.update_spectral_norms()
        if self.adversary.lecam_weight:
            self.adversary.follow(*self._everywhere([means["real"], means["fake"]], "MEAN"))
        self.after_step()
        means |= {"adversarial_weight": weight, "gradient_ratio": ratio}
        return self._track({name: means[name] for name in self.trackers}, skip_bad=True)

    def _cut(self, batch):
        """The parts of a batch. They are not rounds of a loop: between their two halves all of them meet.

        So each has a graph of its own, and more of them save no memory.
        """
        whole = self.adversary.discriminator.takes_whole_batches
        n = 1 if whole else parallel.parts_of(batch["pixels"].shape[0], self.micro_batches)
        cut = {name: tf.split(rows, n) for name, rows in batch.items()}
        return [{name: rows[part] for name, rows in cut.items()} for part in range(n)]

    def _look(self, rows, parts):
        """What is known of a part of a batch before the weight of the adversarial loss is: a `_Look`."""
        pixels, scale = rows["pixels"], self._loss_scale(self.optimizer) / parts
        disc_scale = self._loss_scale(self.disc_optimizer) / parts
        to_features, to_picture = self.decoder_halves
        with tf.GradientTape() as trunk:
            inputs, mean, logvar = self.vae.drawn(pixels, rows["posterior_noise"], training=True)
            features = to_features(inputs, training=True)
            kl, pressure = self._kl(mean, logvar, training=True)
            scaled_pressure = ops.mean(pressure) * scale
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(features)
            reconstruction = ops.cast(to_picture(features, training=True), "float32")
            resemblance, named = self._resemblance(pixels, reconstruction)
            judged = self.adversary.judge(pixels, reconstruction)
            resembling, deceiving = (ops.mean(x) * scale for x in (resemblance, judged["gen_loss"]))
            judging = ops.mean(judged.pop("disc_total")) * disc_scale
        ends = [*to_picture.trainable_variables, features]
        samples = {"loss": resemblance + pressure, "kl_loss": kl, **named, **judged}
        return _Look(
            trunk,
            [features, scaled_pressure],
            tape.gradient(resembling, ends),
            tape.gradient(deceiving, ends),
            tape.gradient(judging, self.adversary.discriminator.trainable_variables),
            {name: ops.mean(values) / parts for name, values in samples.items()},
        )

    def _weight(self, looks):
        """The weight of the adversarial loss for this step, and the ratio of the two gradients."""
        sides = zip(*((look.resembling[0], look.deceiving[0]) for look in looks), strict=True)
        kernels = [tf.add_n(list(parts)) for parts in sides]
        scale = loss_scale(self.optimizer)
        norms = [tf.norm(kernel) / scale for kernel in self._everywhere(kernels, "SUM")]
        return self.adversary.weighed(*norms)

    def _pull(self, look, weight):
        """The gradients of a part by `trained_variables`, now that the weight is known."""
        *last, features = [
            one + tf.cast(weight, one.dtype) * other
            for one, other in zip(look.resembling, look.deceiving, strict=True)
        ]
        variables, ends = self.trained_variables, self.decoder_halves[1].trainable_variables
        known = {id(variable): gradient for variable, gradient in zip(ends, last, strict=True)}
        others = [variable for variable in variables if id(variable) not in known]
        gradients = look.trunk.gradient(
            look.outputs,
            others,
            output_gradients=[features, tf.ones_like(look.outputs[1])],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        known |= {id(variable): gradient for variable, gradient in zip(others, gradients, strict=True)}
        return [known[id(variable)] for variable in variables]

    def _everywhere(self, tensors, how):
        """The sum or the mean of tensors over all replicas."""
        replica = tf.distribute.get_replica_context()
        if replica is None or replica.num_replicas_in_sync == 1:
            return tensors
        return replica.all_reduce(how, tensors)


class _Look(NamedTuple):
    """A part of a batch, before the weight of the adversarial loss is known.

    Attributes:
        trunk: the tape up to the features before the decoder's last layer.
        outputs: those features, and what is minimised of the KL.
        resembling, deceiving: gradients of the loss of reconstruction and of the adversarial one, by the last layer's
            variables, its kernel first, and by those features.
        disc_gradients: of the discriminator's loss, by its variables.
        means: of all losses, this part's shares.
    """

    trunk: tf.GradientTape
    outputs: list
    resembling: list
    deceiving: list
    disc_gradients: list
    means: dict


def _added(lists):
    """The sums of tensors of the same place."""
    return [tf.add_n(list(tensors)) for tensors in zip(*lists, strict=True)]


def at_once(side, most=32):
    """How many square pictures of a side go through an autoencoder at once: fewer where they are large.

    Args:
        side: of the pictures in pixels.
        most: how many of small ones.
    """
    return max(1, min(most, PIXELS_AT_ONCE // side**2))


def reconstruct(vae, images, batch_size=None):
    """Images uint8 (N, H, W, 3) through the autoencoder's posterior mean and back; `at_once` so many, or as asked."""
    batch_size, rebuilt = batch_size or at_once(images.shape[1]), np.empty_like(images)
    for start in range(0, len(images), batch_size):
        pixels = to_pixels(images[start : start + batch_size])
        rebuilt[start : start + batch_size] = np.asarray(_there_and_back(vae, pixels))
    return rebuilt


def decode_noise(vae, number, image_size):
    """What the decoder makes of `number` draws of the latents' prior, N(0, 1) before scaling: uint8 (N, H, W, 3)."""
    noise, n = noise_of(tf.range(number), vae.latent_shape(image_size)), at_once(image_size)
    return np.concatenate(
        [np.asarray(_decoded(vae, noise[start : start + n])) for start in range(0, number, n)]
    )


@tf.function(reduce_retracing=True, autograph=False)
def _decoded(vae, z):  # not within `decode_noise`, for the same reason as below
    return to_images(ops.clip(ops.cast(vae.decoder(z), "float32"), -1.0, 1.0))


@tf.function(reduce_retracing=True, autograph=False)
def _there_and_back(vae, pixels):  # not within `reconstruct`, where every call would trace it anew
    def rebuild(pixels):
        return to_images(vae.reconstruct(pixels))

    return parallel.joined(rebuild, [pixels], pixels.shape[1:], "uint8")
