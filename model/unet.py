"""The U-Net: noisy latents, a time and a context in; a prediction of the latents' shape out.

Time embedding, residual blocks, self- and cross-attention as in Rombach et al. 2022; a table of levels makes
the tiny one of the default preset and the Cup's 128-256-512-512 the same class.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import keras
from keras import ops

from model.common import (
    Attention,
    Downsample,
    GroupNorm,
    LayerNorm,
    ResidualBlock,
    Upsample,
    conv3,
    flatten_places,
)

TIME_STEPS = 1000.0  # a time of 1 is embedded as the step 1000 of the discrete chains


def waves(times, features):
    """Sines and cosines of the times (B,), at frequencies from 1 to 1/10,000 a step (Ho et al. 2020): (B, features)."""
    # angle_k = 1000 t / 10000^(k / K), K = features / 2
    half = features // 2
    frequencies = ops.exp(-math.log(10000.0) * ops.arange(half, dtype="float32") / half)
    angles = TIME_STEPS * ops.cast(times, "float32")[:, None] * frequencies  # (B, K)
    return ops.concatenate([ops.cos(angles), ops.sin(angles)], axis=-1)


class TimeEmbedding(keras.layers.Layer):
    """Sinusoidal embedding of the time (Ho et al. 2020), then two dense layers.

    Args:
        features: number of sines and cosines.
        width: width E of the embedding.

    Call: times (B,) in [0, 1] -> (B, E).
    """

    def __init__(self, features, width, **kwargs):
        super().__init__(**kwargs)
        self.features, self.width = features, width
        self.linear_1 = keras.layers.Dense(width, activation="silu", name="linear_1", dtype=self.dtype_policy)
        self.linear_2 = keras.layers.Dense(width, name="linear_2", dtype=self.dtype_policy)

    def build(self, times_shape):
        self.linear_1.build((times_shape[0], self.features))
        self.linear_2.build((times_shape[0], self.width))

    def call(self, times):
        return self.linear_2(self.linear_1(waves(times, self.features)))

    def compute_output_shape(self, times_shape):
        return (times_shape[0], self.width)

    def get_config(self):
        return {**super().get_config(), "features": self.features, "width": self.width}


class PooledContext(keras.layers.Layer):
    """The mean of the context's words as an embedding for every residual block, as the pooled text of SDXL is.

    Cross-attention finds out slowly which word matters where; what a sentence says as a whole comes in here.

    Args:
        width: width E of the embedding.

    Call: context (B, T, D), mask (B, T) bool -> (B, E).
    """

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.linear_1 = keras.layers.Dense(width, activation="silu", name="linear_1", dtype=self.dtype_policy)
        self.linear_2 = keras.layers.Dense(width, name="linear_2", dtype=self.dtype_policy)

    def build(self, context_shape, mask_shape=None):
        self.linear_1.build((context_shape[0], context_shape[-1]))
        self.linear_2.build((context_shape[0], self.width))

    def call(self, context, mask=None):
        weights = (
            ops.ones_like(context[..., :1]) if mask is None else ops.cast(mask, context.dtype)[..., None]
        )
        mean = ops.sum(context * weights, axis=1) / ops.sum(weights, axis=1)
        return self.linear_2(self.linear_1(mean))

    def compute_output_shape(self, context_shape, mask_shape=None):
        return (context_shape[0], self.width)

    def get_config(self):
        return {**super().get_config(), "width": self.width}


class FeedForward(keras.layers.Layer):
    """GEGLU feed-forward block (Shazeer 2020): (B, N, width) -> (B, N, width)."""

    def __init__(self, width, expansion=4, **kwargs):
        super().__init__(**kwargs)
        self.width, self.expansion = width, expansion
        self.proj = keras.layers.Dense(2 * expansion * width, name="net.0.proj", dtype=self.dtype_policy)
        self.out = keras.layers.Dense(width, name="net.2", dtype=self.dtype_policy)

    def build(self, input_shape):
        self.proj.build(input_shape)
        self.out.build((*input_shape[:-1], self.expansion * self.width))

    def call(self, x):
        value, gate = ops.split(self.proj(x), 2, axis=-1)
        return self.out(value * ops.gelu(gate, approximate=False))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "width": self.width, "expansion": self.expansion}


class TransformerBlock(keras.layers.Layer):
    """Self-attention over places, cross-attention to the context, feed-forward, all residual.

    Args:
        channels: channels of the feature map.
        heads: attention heads.
        groups: groups of the first normalisation.
        expansion: width of the feed-forward part as a multiple of `channels`.

    Call: x (B, H, W, C), context (B, T, D), mask (B, T) -> (B, H, W, C). `keys_values` may take the context's place,
    see `Attention`.
    """

    def __init__(self, channels, heads, groups=32, expansion=4, **kwargs):
        super().__init__(**kwargs)
        self.channels, self.heads, self.groups, self.expansion = channels, heads, groups, expansion
        policy = {"dtype": self.dtype_policy}
        self.norm = GroupNorm(groups, 1e-6, name="norm", **policy)
        self.proj_in = keras.layers.Dense(channels, name="proj_in", **policy)
        self.norms = [LayerNorm(1e-5, name=f"norm{i}", **policy) for i in (1, 2, 3)]
        self.attn1 = Attention(channels, heads, name="attn1", **policy)
        self.attn2 = Attention(channels, heads, name="attn2", **policy)
        self.ff = FeedForward(channels, expansion, name="ff", **policy)
        self.proj_out = keras.layers.Dense(channels, kernel_initializer="zeros", name="proj_out", **policy)

    def build(self, x_shape, context_shape, mask_shape=None):
        sequence = (x_shape[0], None, self.channels)
        self.norm.build(x_shape)
        for layer in (self.proj_in, *self.norms, self.attn1, self.ff, self.proj_out):
            layer.build(sequence)
        self.attn2.build(sequence, context_shape)

    def call(self, x, context=None, mask=None, keys_values=None):
        h = self.proj_in(flatten_places(self.norm(x)))  # (B, H*W, C)
        h = h + self.attn1(self.norms[0](h))
        h = h + self.attn2(self.norms[1](h), context, mask, keys_values)
        h = h + self.ff(self.norms[2](h))
        return x + ops.reshape(self.proj_out(h), ops.shape(x))

    def compute_output_shape(self, x_shape, context_shape, mask_shape=None):
        return x_shape

    def get_config(self):
        own = {
            "channels": self.channels,
            "heads": self.heads,
            "groups": self.groups,
            "expansion": self.expansion,
        }
        return {**super().get_config(), **own}


class UNet(keras.Model):
    """Predicts what the diffusion process asks for from noisy latents (Rombach et al. 2022, section 3.2).

    Args:
        latent_channels: channels C of the latents.
        level_channels: channels of each level, finest first; each level but the last halves the size.
        attention_levels: for each level, whether its blocks attend.
        blocks: residual blocks a level on the way down (one more on the way up).
        head_channels: channels a head of the attention: one number, or one for each level (Stable Diffusion 1
            has 8 heads everywhere, so 40, 80, 160, 160).
        context_shape: (T, D) of the context.
        groups: groups of the normalisations.
        ff_expansion: width of the feed-forward parts as a multiple of the channels.
        pooled_context: whether the mean of the context joins the time embedding (see `PooledContext`).

    Call: [latents (B, h, w, C), times (B,), context (B, T, D), mask (B, T)] -> (B, h, w, C), float32. A sampler, which
    asks many times about one text, calls `project_text` once and `predict_from` each time, for the same values.

    Raises:
        ValueError: when `attention_levels` and `level_channels` differ in length.
    """

    def __init__(
        self,
        latent_channels=4,
        level_channels=(96, 192),
        attention_levels=(True, True),
        blocks=1,
        head_channels=32,
        context_shape=(20, 128),
        groups=32,
        ff_expansion=4,
        pooled_context=False,
        name="unet",
    ):
        if len(attention_levels) != len(level_channels):
            raise ValueError(
                "UNet needs one attention flag a level. "
                f"Received: attention_levels={attention_levels}, level_channels={level_channels}"
            )
        heads = (head_channels,) * len(level_channels) if isinstance(head_channels, int) else head_channels
        levels = [_Level(*row) for row in zip(level_channels, heads, attention_levels, strict=True)]
        width = level_channels[0]

        latents = keras.Input((None, None, latent_channels), name="latents")
        times = keras.Input((), name="times")
        context = keras.Input(context_shape, name="context")
        mask = keras.Input((context_shape[0],), dtype="bool", name="mask")
        embedding = TimeEmbedding(width, 4 * width, name="time_embedding")(times)
        if pooled_context:
            embedding = embedding + PooledContext(4 * width, name="pooled_context")(context, mask)
        table = _Table(levels, blocks, groups, ff_expansion, latent_channels)
        out = table.predict(latents, embedding, lambda _: (context, mask), _new)

        super().__init__([latents, times, context, mask], out, name=name)
        self._arguments = {
            "latent_channels": latent_channels,
            "level_channels": level_channels,
            "attention_levels": attention_levels,
            "blocks": blocks,
            "head_channels": head_channels,
            "context_shape": context_shape,
            "groups": groups,
            "ff_expansion": ff_expansion,
            "pooled_context": pooled_context,
            "name": name,
        }
        self._table = table

    def get_config(self):
        return dict(self._arguments)

    def project_text(self, context, mask):
        """All that the network makes of a text alone, for `predict_from`.

        Args:
            context: (B, T, D).
            mask: (B, T) bool.

        Returns:
            dict of name -> tensor or pair of tensors, whose first axis is B: the mask, keys and values (B, T, H, C / H)
            of each transformer block, and the pooled context (B, E) where the network has it.
        """
        layers = {layer.name: layer for layer in self.layers}
        text = {"mask": mask}
        if "pooled_context" in layers:
            text["pooled_context"] = layers["pooled_context"](context, mask)
        blocks = {name: layer for name, layer in layers.items() if isinstance(layer, TransformerBlock)}
        return text | {name: layer.attn2.keys_values(context) for name, layer in blocks.items()}

    @property
    def predicting_variables(self):
        """The variables that `predict_from` reads: all but those that `project_text` does."""
        layers = [layer for layer in self.layers if layer.name == "pooled_context"]
        for block in (layer for layer in self.layers if isinstance(layer, TransformerBlock)):
            layers += [block.attn2.to_k, block.attn2.to_v]
        of_text = {id(variable) for layer in layers for variable in layer.variables}
        return [variable for variable in self.variables if id(variable) not in of_text]

    def predict_from(self, latents, times, text):
        """The prediction (B, h, w, C), float32, from latents (B, h, w, C), times (B,) and what `project_text` gave."""
        layers = {layer.name: layer for layer in self.layers}
        embedding = layers["time_embedding"](times)
        if "pooled_context" in text:
            embedding = embedding + text["pooled_context"]

        def read(name):
            return None, text["mask"], text[name]

        def existing(_kind, *_arguments, name, **_keywords):
            return layers[name]

        return self._table.predict(latents, embedding, read, existing)


class LogVariance(keras.Model):
    """How large the U-Net's error is to be expected at a time: its logarithm (Karras et al. 2024, equation 21).

    It is 0 everywhere at first. Only training needs it, for the weight "uncertainty".

    Args:
        features: number of sines and cosines that it is a weighted sum of.

    Call: times (B,) -> (B,).
    """

    def __init__(self, features=128, name="log_variance"):
        super().__init__(name=name)
        self.features = features
        self.linear = keras.layers.Dense(1, kernel_initializer="zeros", name="log_variance", dtype="float32")
        self.linear.build((None, features))
        self.built = True

    def call(self, times):
        return self.linear(waves(times, self.features))[:, 0]

    def get_config(self):
        return {"features": self.features, "name": self.name}


class _Level(NamedTuple):
    """A row of the table of levels."""

    channels: int
    head_channels: int  # channels a head of the attention
    attends: bool


class _Table(NamedTuple):
    """The network but for its embeddings, as a function that is given its layers: so it builds them, and finds them."""

    levels: list[_Level]
    blocks: int
    groups: int
    ff_expansion: int
    latent_channels: int

    def predict(self, latents, embedding, read, layer):
        """The prediction, of the latents' shape.

        Args:
            latents: (B, h, w, C).
            embedding: (B, E), of the time and perhaps of the pooled context.
            read: the name of a transformer block -> what it sees of the text: context, mask and perhaps `keys_values`.
            layer: (class, arguments, name and keywords) -> the layer of that name.
        """
        block = _Blocks(self.groups, self.ff_expansion, embedding, read, layer)
        last = self.levels[-1]
        x = layer(conv3, self.levels[0].channels, name="conv_in")(latents)
        x, skips = _down(x, self.levels, self.blocks, block)
        x = block(x, last._replace(attends=True), "mid_block", 0)
        x = block(x, last._replace(attends=False), "mid_block", 1)
        x = _up(x, skips, self.levels, self.blocks, block)
        x = layer(GroupNorm, self.groups, 1e-5, silu=True, name="conv_norm_out")(x)
        final = {"kernel_initializer": "zeros", "dtype": "float32"}
        return layer(conv3, self.latent_channels, name="conv_out", **final)(x)


def _new(kind, *arguments, **keywords):
    return kind(*arguments, **keywords)


class _Blocks(NamedTuple):
    """Applies a residual block, and a transformer block where the level attends; what all blocks see is given once."""

    groups: int
    ff_expansion: int
    embedding: keras.KerasTensor  # (B, E), see `_Table.predict` for all three
    read: Callable
    layer: Callable

    def __call__(self, x, level, place, index):
        """(B, H, W, Cin) -> (B, H, W, C); `place` and `index` name the layers."""
        name = f"{place}.resnets.{index}"
        x = self.layer(ResidualBlock, level.channels, self.groups, name=name)(x, self.embedding)
        if not level.attends:
            return x
        name, heads = f"{place}.attentions.{index}", level.channels // level.head_channels
        arguments = level.channels, heads, self.groups, self.ff_expansion
        return self.layer(TransformerBlock, *arguments, name=name)(x, *self.read(name))


def _down(x, levels, blocks, block):
    """From the finest level to the coarsest: (its feature map, all that the way up takes from the way down)."""
    skips = [x]
    for number, level in enumerate(levels):
        for index in range(blocks):
            x = block(x, level, f"down_blocks.{number}", index)
            skips.append(x)
        if number < len(levels) - 1:
            name = f"down_blocks.{number}.downsamplers.0"
            x = block.layer(Downsample, level.channels, symmetric=True, name=name)(x)
            skips.append(x)
    return x, skips


def _up(x, skips, levels, blocks, block):
    """From the coarsest level to the finest; every block takes one of `skips`, the last first."""
    for number, level in enumerate(reversed(levels)):
        for index in range(blocks + 1):
            x = ops.concatenate([x, skips.pop()], axis=-1)
            x = block(x, level, f"up_blocks.{number}", index)
        if number < len(levels) - 1:
            x = block.layer(Upsample, level.channels, name=f"up_blocks.{number}.upsamplers.0")(x)
    return x
