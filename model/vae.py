"""The autoencoder: `Encoder`, `Decoder` and `AutoencoderKL`, which owns the latent scale.

The architecture is the KL autoencoder of Rombach et al. 2022; a table of levels makes the tiny one of the
default preset and Stable Diffusion's the same class.
"""

import keras
import numpy as np
from keras import ops

from model.common import Attention, Downsample, GroupNorm, ResidualBlock, Upsample, conv3, flatten_places

NORM_EPSILON = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


class SpatialAttention(keras.layers.Layer):
    """Single-head self-attention over the places of a feature map, with a residual connection.

    Call: x (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, channels, groups=32, **kwargs):
        super().__init__(**kwargs)
        self.channels, self.groups = channels, groups
        self.group_norm = GroupNorm(groups, NORM_EPSILON, name="group_norm", dtype=self.dtype_policy)
        self.attention = Attention(channels, heads=1, qkv_bias=True, name="attn", dtype=self.dtype_policy)

    def build(self, input_shape):
        self.group_norm.build(input_shape)
        self.attention.build((input_shape[0], None, input_shape[-1]))

    def call(self, x):
        attended = self.attention(flatten_places(self.group_norm(x)))
        return x + ops.reshape(attended, ops.shape(x))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "channels": self.channels, "groups": self.groups}


def _middle(x, channels, groups, attention, part):
    x = ResidualBlock(channels, groups, NORM_EPSILON, name=f"{part}.mid_block.resnets.0")(x)
    if attention:
        x = SpatialAttention(channels, groups, name=f"{part}.mid_block.attentions.0")(x)
    return ResidualBlock(channels, groups, NORM_EPSILON, name=f"{part}.mid_block.resnets.1")(x)


class _Half(keras.Model):
    """What `Encoder` and `Decoder` share: the arguments that rebuild them."""

    def get_config(self):
        names = ("level_channels", "blocks", "latent_channels", "groups", "attention", "name")
        return dict(zip(names, self._arguments, strict=True))


class Encoder(_Half):
    """Pixels -> the moments of their latents.

    Args:
        level_channels: channels of each level, finest first; each level but the last halves the size.
        blocks: residual blocks of each level; a level of 0 only resamples, which is cheap at the finest sizes.
        latent_channels: channels C of the latents.
        groups: groups of the normalisations.
        attention: whether the middle block attends over places.

    Call: pixels (B, H, W, 3) in -1..1 -> moments (B, h, w, 2C): mean, then log-variance.
    """

    def __init__(self, level_channels, blocks, latent_channels, groups=32, attention=True, name="encoder"):
        pixels = keras.Input((None, None, 3), name="pixels")
        x = conv3(level_channels[0], f"{name}.conv_in")(pixels)
        for level, channels in enumerate(level_channels):
            for block in range(blocks[level]):
                x = ResidualBlock(
                    channels, groups, NORM_EPSILON, name=f"{name}.down_blocks.{level}.resnets.{block}"
                )(x)
            if level < len(level_channels) - 1:
                x = Downsample(channels, name=f"{name}.down_blocks.{level}.downsamplers.0")(x)
        x = _middle(x, level_channels[-1], groups, attention, name)
        x = ops.silu(GroupNorm(groups, NORM_EPSILON, name=f"{name}.conv_norm_out")(x))
        x = conv3(2 * latent_channels, f"{name}.conv_out")(x)
        moments = keras.layers.Conv2D(2 * latent_channels, 1, name="quant_conv")(x)
        super().__init__(pixels, moments, name=name)
        self._arguments = (level_channels, blocks, latent_channels, groups, attention, name)


class Decoder(_Half):
    """Latents, unscaled -> pixels.

    Args: as for `Encoder`; a level of n > 0 blocks has n + 1 here.

    Call: z (B, h, w, C) -> pixels (B, H, W, 3), about -1..1 (not clipped).
    """

    def __init__(self, level_channels, blocks, latent_channels, groups=32, attention=True, name="decoder"):
        z = keras.Input((None, None, latent_channels), name="z")
        x = keras.layers.Conv2D(latent_channels, 1, name="post_quant_conv")(z)
        x = conv3(level_channels[-1], f"{name}.conv_in")(x)
        x = _middle(x, level_channels[-1], groups, attention, name)
        table = list(zip(level_channels, blocks, strict=True))[::-1]
        for level, (channels, level_blocks) in enumerate(table):
            place = f"{name}.up_blocks.{level}"
            for block in range(level_blocks + 1 if level_blocks else 0):
                x = ResidualBlock(channels, groups, NORM_EPSILON, name=f"{place}.resnets.{block}")(x)
            if level < len(table) - 1:
                finer_channels, finer_blocks = table[level + 1]
                x = Upsample(channels if finer_blocks else finer_channels, name=f"{place}.upsamplers.0")(x)
        x = ops.silu(GroupNorm(groups, NORM_EPSILON, name=f"{name}.conv_norm_out")(x))
        super().__init__(z, conv3(3, f"{name}.conv_out")(x), name=name)
        self._arguments = (level_channels, blocks, latent_channels, groups, attention, name)


class AutoencoderKL(keras.Model):
    """The autoencoder of a latent diffusion model (Rombach et al. 2022, section 3.1).

    It returns latents of unit scale and takes them back; nobody else knows the factor.

    Args:
        level_channels, blocks, latent_channels, groups, attention: see `Encoder`.
        latent_scale: the factor from raw to unit-scale latents where it is known (Stable Diffusion's is
            0.18215), or None to have it measured by `set_latent_statistics`.

    Call: pixels (B, H, W, 3) -> pixels (B, H, W, 3), through the posterior's mean.
    """

    def __init__(
        self,
        level_channels=(16, 32, 64, 64),
        blocks=(0, 1, 1, 1),
        latent_channels=4,
        groups=32,
        attention=True,
        latent_scale=None,
        name="vae",
    ):
        if len(blocks) != len(level_channels):
            raise ValueError(
                "AutoencoderKL needs a number of blocks for each level. "
                f"Received: blocks={blocks}, level_channels={level_channels}"
            )
        super().__init__(name=name)
        self.factor = 2 ** (len(level_channels) - 1)
        self.latent_channels, self.latent_scale = latent_channels, latent_scale
        parts = (tuple(level_channels), tuple(blocks), latent_channels, groups, attention)
        self.encoder, self.decoder = Encoder(*parts), Decoder(*parts)
        self.latent_mean = self.add_weight(
            shape=(latent_channels,), initializer="zeros", trainable=False, name="latent_mean"
        )
        self.latent_std = self.add_weight(
            shape=(latent_channels,),
            initializer=keras.initializers.Constant(1.0 / (latent_scale or 1.0)),
            trainable=False,
            name="latent_std",
        )
        self.built = True

    def latent_shape(self, image_size):
        """The shape (h, w, C) of the latents of square pictures of `image_size`."""
        return (image_size // self.factor, image_size // self.factor, self.latent_channels)

    def set_latent_statistics(self, mean, std):
        """Sets the mean and standard deviation (C,) of the raw latents, which `encode` takes out."""
        self.latent_mean.assign(np.asarray(mean, "float32"))
        self.latent_std.assign(np.asarray(std, "float32"))

    def raw_moments(self, pixels, training=False):
        """Pixels (B, H, W, 3) -> mean and log-variance (B, h, w, C) of the latents before scaling."""
        moments = ops.cast(self.encoder(pixels, training=training), "float32")
        mean, logvar = ops.split(moments, 2, axis=-1)
        return mean, ops.clip(logvar, *LOGVAR_RANGE)

    def encode(self, pixels):
        """Pixels (B, H, W, 3) -> mean and log-variance (B, h, w, C) of their unit-scale latents."""
        mean, logvar = self.raw_moments(pixels)
        return (mean - self.latent_mean) / self.latent_std, logvar - 2.0 * ops.log(self.latent_std)

    def decode(self, latents):
        """Unit-scale latents (B, h, w, C) -> pixels (B, H, W, 3) in -1..1."""
        pixels = self.decoder(latents * self.latent_std + self.latent_mean)
        return ops.clip(ops.cast(pixels, "float32"), -1.0, 1.0)

    def call(self, pixels, training=False):
        return self.decoder(self.raw_moments(pixels, training)[0], training=training)

    def get_config(self):
        return {**self.encoder.get_config(), "latent_scale": self.latent_scale, "name": self.name}


def sample_posterior(mean, logvar, noise):
    """The reparameterised Gaussian of Kingma & Welling 2014: mean + std * noise; all (B, h, w, C)."""
    return mean + ops.exp(0.5 * logvar) * noise


def kl_divergence(mean, logvar):
    """KL of N(mean, exp(logvar)) from N(0, 1), in nats, summed over each sample: (B, h, w, C) -> (B,)."""
    return 0.5 * ops.sum(ops.square(mean) + ops.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))
