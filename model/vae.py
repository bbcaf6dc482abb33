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
        names = ("level_channels", "blocks", "latent_channels", "groups", "attention", "skips", "name")
        return dict(zip(names, self._arguments, strict=True))


class Encoder(_Half):
    """Pixels -> the moments of their latents.

    Args:
        level_channels: channels of each level, finest first; each level but the last halves the size.
        blocks: residual blocks of each level; a level of 0 only resamples, which is cheap at the finest sizes.
        latent_channels: channels C of the latents.
        groups: groups of the normalisations.
        attention: whether the middle block attends over places.
        skips: whether it also returns the features of each level, for the `Decoder`.

    Call: pixels (B, H, W, 3) in -1..1 -> moments (B, h, w, 2C): mean, then log-variance. With `skips` a list:
    the moments, then the features of each level before it is halved, finest first.
    """

    def __init__(
        self, level_channels, blocks, latent_channels, groups=32, attention=True, skips=False, name="encoder"
    ):
        pixels = keras.Input((None, None, 3), name="pixels")
        x = conv3(level_channels[0], f"{name}.conv_in")(pixels)
        features = []
        for level, channels in enumerate(level_channels):
            for block in range(blocks[level]):
                x = ResidualBlock(
                    channels, groups, NORM_EPSILON, name=f"{name}.down_blocks.{level}.resnets.{block}"
                )(x)
            features.append(x)
            if level < len(level_channels) - 1:
                x = Downsample(channels, name=f"{name}.down_blocks.{level}.downsamplers.0")(x)
        x = _middle(x, level_channels[-1], groups, attention, name)
        x = GroupNorm(groups, NORM_EPSILON, silu=True, name=f"{name}.conv_norm_out")(x)
        x = conv3(2 * latent_channels, f"{name}.conv_out")(x)
        moments = keras.layers.Conv2D(2 * latent_channels, 1, name="quant_conv")(x)
        super().__init__(pixels, [moments, *features] if skips else moments, name=name)
        self._arguments = (level_channels, blocks, latent_channels, groups, attention, skips, name)


class Decoder(_Half):
    """Latents, unscaled -> pixels.

    Its last convolution is the layer "decoder.conv_out", whose `input` are the last features.

    Args: as for `Encoder`; a level of n > 0 blocks has n + 1 here. With `skips` a 1x1 convolution of the encoder's
        features is added where a level begins. It starts from zero, as if there were none. To concatenate them would
        widen a 3x3 convolution of the level, which costs several times as much where the pictures are largest.
        tanh: whether the pixels go through a tanh, which keeps them within -1..1.

    Call: z (B, h, w, C), with `skips` a list of it and the encoder's features -> pixels (B, H, W, 3), about -1..1
    (not clipped).
    """

    def __init__(
        self,
        level_channels,
        blocks,
        latent_channels,
        groups=32,
        attention=True,
        skips=False,
        tanh=False,
        name="decoder",
    ):
        z = keras.Input((None, None, latent_channels), name="z")
        features = [
            keras.Input((None, None, channels), name=f"features.{level}")
            for level, channels in enumerate(level_channels)
        ]
        x = keras.layers.Conv2D(latent_channels, 1, name="post_quant_conv")(z)
        x = conv3(level_channels[-1], f"{name}.conv_in")(x)
        x = _middle(x, level_channels[-1], groups, attention, name)
        table = list(zip(level_channels, blocks, features, strict=True))[::-1]
        for level, (channels, level_blocks, level_features) in enumerate(table):
            place = f"{name}.up_blocks.{level}"
            if skips:
                x = x + _projected(level_features, x.shape[-1], f"{place}.skip")
            for block in range(level_blocks + 1 if level_blocks else 0):
                x = ResidualBlock(channels, groups, NORM_EPSILON, name=f"{place}.resnets.{block}")(x)
            if level < len(table) - 1:
                finer_channels, finer_blocks, _ = table[level + 1]
                x = Upsample(channels if finer_blocks else finer_channels, name=f"{place}.upsamplers.0")(x)
        x = GroupNorm(groups, NORM_EPSILON, silu=True, name=f"{name}.conv_norm_out")(x)
        pixels = conv3(3, f"{name}.conv_out")(x)
        if tanh:
            pixels = keras.layers.Activation("tanh", name=f"{name}.tanh")(pixels)
        super().__init__([z, *features] if skips else z, pixels, name=name)
        self._arguments = (level_channels, blocks, latent_channels, groups, attention, skips, name)
        self.tanh = tanh

    def halves(self):
        """The decoder in two, which share its layers: to the features before the last convolution, and from there."""
        last = self.get_layer(f"{self.name}.conv_out")
        return keras.Model(self.inputs, last.input), keras.Model(last.input, self.outputs[0])

    def get_config(self):
        return {**super().get_config(), "tanh": self.tanh}


def _projected(features, channels, name):
    return keras.layers.Conv2D(channels, 1, kernel_initializer="zeros", name=name)(features)


class AutoencoderKL(keras.Model):
    """The autoencoder of a latent diffusion model (Rombach et al. 2022, section 3.1).

    It returns latents of unit scale and takes them back; nobody else knows the factor.

    With `skips` the decoder sees the encoder's features, as in a U-Net (Ronneberger et al. 2015), and details that the
    latents lack come through. Such an autoencoder reconstructs pictures, but latents alone are not enough for it:
    **what a diffusion model samples cannot be decoded without a picture**.

    Args:
        level_channels, blocks, latent_channels, groups, attention: see `Encoder`. The number of levels gives
            `factor`, pixels a latent along a side: 4 with three levels, 8 with four, 16 with five.
        latent_scale: the factor from raw to unit-scale latents where it is known (Stable Diffusion's is
            0.18215), or None to have it measured by `set_latent_statistics`.
        skips: whether the encoder's features of each level go to the decoder.
        tanh: whether the decoder ends in a tanh.

    Call: pixels (B, H, W, 3) -> pixels (B, H, W, 3), through the posterior's mean.

    Raises:
        ValueError: by all that takes pixels, where a side is not a multiple of `factor`.
    """

    def __init__(
        self,
        level_channels=(16, 32, 64, 64),
        blocks=(0, 1, 1, 1),
        latent_channels=4,
        groups=32,
        attention=True,
        latent_scale=None,
        skips=False,
        tanh=False,
        name="vae",
    ):
        if len(blocks) != len(level_channels):
            raise ValueError(
                "AutoencoderKL needs a number of blocks for each level. "
                f"Received: blocks={blocks}, level_channels={level_channels}"
            )
        super().__init__(name=name)
        self.factor = 2 ** (len(level_channels) - 1)
        self.latent_channels, self.latent_scale, self.skips = latent_channels, latent_scale, skips
        parts = (tuple(level_channels), tuple(blocks), latent_channels, groups, attention, skips)
        self.encoder, self.decoder = Encoder(*parts), Decoder(*parts, tanh)
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
        mean, logvar, _ = self._encoded(pixels, training)
        return mean, logvar

    def encode(self, pixels):
        """Pixels (B, H, W, 3) -> mean and log-variance (B, h, w, C) of their unit-scale latents."""
        mean, logvar = self.raw_moments(pixels)
        return (mean - self.latent_mean) / self.latent_std, logvar - 2.0 * ops.log(self.latent_std)

    def decode(self, latents):
        """Unit-scale latents (B, h, w, C) -> pixels (B, H, W, 3) in -1..1.

        Raises:
            ValueError: with `skips`, where latents alone are not enough.
        """
        if self.skips:
            raise ValueError(
                "decode: received latents alone, expected a picture with them, as this autoencoder has skip "
                "connections: reconstruct(pixels) goes through them"
            )
        return _in_range(self.decoder(latents * self.latent_std + self.latent_mean))

    def reconstruct(self, pixels):
        """Pixels (B, H, W, 3) -> pixels (B, H, W, 3) in -1..1, through the posterior's mean and any skips."""
        return _in_range(self(pixels))

    def reparameterised(self, pixels, noise, training=False):
        """Pixels there and back through a draw of their posterior, as an autoencoder is trained.

        Args:
            pixels: (B, H, W, 3) in -1..1.
            noise: (B, h, w, C), standard normal.
            training: whether this is a training step.

        Returns:
            The reconstruction (B, H, W, 3) float32, not clipped; the posterior's mean and log-variance
            (B, h, w, C) before scaling.
        """
        inputs, mean, logvar = self.drawn(pixels, noise, training)
        return ops.cast(self.decoder(inputs, training=training), "float32"), mean, logvar

    def drawn(self, pixels, noise, training=False):
        """As `reparameterised`, but with what the decoder takes in place of what it makes of that."""
        mean, logvar, features = self._encoded(pixels, training)
        return self._inputs(sample_posterior(mean, logvar, noise), features), mean, logvar

    def call(self, pixels, training=False):
        mean, _, features = self._encoded(pixels, training)
        return self.decoder(self._inputs(mean, features), training=training)

    def _encoded(self, pixels, training):
        """Mean and log-variance before scaling, and the encoder's features, which are none without skips."""
        self._check_size(pixels.shape)
        encoded = self.encoder(pixels, training=training)
        moments, *features = encoded if self.skips else [encoded]
        mean, logvar = ops.split(ops.cast(moments, "float32"), 2, axis=-1)
        return mean, ops.clip(logvar, *LOGVAR_RANGE), features

    def _inputs(self, z, features):
        return [z, *features] if self.skips else z

    def _check_size(self, shape):
        sides = [side for side in shape[1:3] if side is not None]  # a traced function may leave them open
        if any(side < self.factor or side % self.factor for side in sides):
            raise ValueError(
                f"AutoencoderKL: received pixels of shape {tuple(shape)}, expected height and width to be "
                f"multiples of {self.factor}"
            )

    def get_config(self):
        return {**self.decoder.get_config(), "latent_scale": self.latent_scale, "name": self.name}


def _in_range(pixels):
    return ops.clip(ops.cast(pixels, "float32"), -1.0, 1.0)


def sample_posterior(mean, logvar, noise):
    """The reparameterised Gaussian of Kingma & Welling 2014: mean + std * noise; all (B, h, w, C)."""
    return mean + ops.exp(0.5 * logvar) * noise


def kl_divergence(mean, logvar):
    """KL of N(mean, exp(logvar)) from N(0, 1) in nats, of each value by itself (Kingma & Welling 2014, appendix B).

    Args:
        mean, logvar: tensors of one shape.

    Returns:
        Of that shape: (mean^2 + exp(logvar) - 1 - logvar) / 2.
    """
    return 0.5 * (ops.square(mean) + ops.exp(logvar) - 1.0 - logvar)
