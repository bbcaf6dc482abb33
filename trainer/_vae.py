"""The training of an autoencoder, and its pictures there and back."""

import numpy as np
import tensorflow as tf
from keras import ops

import parallel
from generate import to_images
from model.vae import kl_divergence, sample_posterior
from trainer._base import Trainer


class VAETrainer(Trainer):
    """Trains an `AutoencoderKL` by reconstruction, KL and, if wanted, perceptual loss.

    Args:
        vae: the `AutoencoderKL`.
        recon_loss: "l1" or "mse".
        kl_weight: weight of the KL divergence (nats, mean over the latents' values).
        perceptual: function of (pixels, pixels) -> distance (B,), or None.
        perceptual_weight: its weight.
        micro_batches: see `Trainer`.

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
