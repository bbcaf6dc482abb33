"""Blocks that two networks or more share: normalisation, residual and attention blocks, resampling.

Written with `keras.ops`. Every block names its layers, so that the path of a variable is the same in every
process; the names are those of the Stable Diffusion family (`resnets`, `to_q`, `ff`), which users of its
weights know.
"""

import contextvars
import functools
import math

import keras
import numpy as np
from keras import ops

MASKED_SCORE = -1e9
# What a pixel, repeated, adds to the four places around it through the three weights of a convolution.
REPEATED = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], "float32")


class GroupNormStatistics:
    """What each `GroupNorm` sees that is called within it, or what it is to use in place of that.

    with GroupNormStatistics(weights, given) as statistics:
        pixels = vae.decode(tile)
    statistics.taken

    So several tiles can be normalised as the picture is of which they are parts (`model.tiling`). No gradient is
    written out for it. A function that was compiled before knows nothing of it: compile what is around it.

    Args:
        weights: (H, W), how much each place counts; where a feature map is smaller, its places count their mean.
        given: a (mean, variance) for each norm, (B, groups) each, in the order in which the norms are called; empty:
            each uses what it sees.

    Attributes:
        taken: what each has seen, like `given`: means over the weights.

    Raises:
        RuntimeError: within another one; or when norms were called more or less often than `given` has entries.
    """

    _open = contextvars.ContextVar("group_norm_statistics", default=None)

    def __init__(self, weights, given=()):
        self.weights, self.given, self.taken = weights, given, []

    @classmethod
    def current(cls):
        """The one that is open in this thread, or None."""
        return cls._open.get()

    def __enter__(self):
        if self.current() is not None:
            raise RuntimeError("GroupNormStatistics: one is open already")
        self._token = self._open.set(self)
        return self

    def __exit__(self, error, *_):
        self._open.reset(self._token)
        if error is None and self.given and len(self.given) != len(self.taken):
            raise RuntimeError(
                f"GroupNormStatistics: {len(self.taken)} norms were called. Received: {len(self.given)} entries"
            )

    def of(self, x, groups):
        """The mean and variance (B, groups) by which x (B, H, W, C) is to be normalised."""
        _, height, width, channels = ops.shape(x)
        values = ops.reshape(x, (-1, height * width, groups, channels // groups))
        weights = ops.reshape(pooled(self.weights, height, width), (1, -1, 1, 1))
        weights = weights / (ops.sum(weights) * (channels // groups))
        mean = ops.sum(values * weights, axis=(1, 3))
        centred = values - mean[:, None, :, None]
        self.taken.append((mean, ops.sum(ops.square(centred) * weights, axis=(1, 3))))
        # Of too few entries the end tells, with both numbers.
        return (self.given or self.taken)[min(len(self.taken), len(self.given or self.taken)) - 1]


def pooled(values, height, width):
    """Values (H, W) as means (height, width) over patches of one size."""
    rows, columns = (long // short for long, short in zip(ops.shape(values), (height, width), strict=True))
    return ops.mean(ops.reshape(values, (height, rows, width, columns)), axis=(1, 3))


class GroupNorm(keras.layers.Layer):
    """Group normalisation (Wu & He 2018), folded into one multiply and one add per element, and a SiLU if wanted.

    Statistics are taken in float32 whatever the layer computes in. Its gradient is written out: what automatic
    differentiation makes of it takes twice as long to trace, goes over the memory twice as often, and keeps what the
    SiLU was given besides what it returned.

    Args:
        groups: number of groups; it must divide the channels.
        epsilon: added to the variance.
        silu: whether x sigmoid(x) (Elfwing et al. 2018) follows.

    Call: x (B, H, W, C) -> (B, H, W, C).

    Raises:
        ValueError: when the channels are not a multiple of `groups`.
    """

    def __init__(self, groups, epsilon=1e-5, silu=False, **kwargs):
        super().__init__(**kwargs)
        self.groups, self.epsilon, self.silu = groups, epsilon, silu

    def build(self, input_shape):
        channels = input_shape[-1]
        if channels % self.groups:
            raise ValueError(f"GroupNorm needs channels divisible by {self.groups}. Received: {channels}")
        own = {"shape": (channels,), "autocast": False}
        self.gamma = self.add_weight(**own, initializer="ones", name="gamma")
        self.beta = self.add_weight(**own, initializer="zeros", name="beta")

    def call(self, x):
        values, gamma, beta = (ops.cast(part, "float32") for part in (x, self.gamma, self.beta))
        if GroupNormStatistics.current() is None:
            normal = _group_normalised(self.groups, self.epsilon, self.silu)(values, gamma, beta)
        else:
            normal = self._as_told(values, gamma, beta)
        return ops.cast(normal, self.compute_dtype)

    def _as_told(self, x, gamma, beta):
        """x normalised by what `GroupNormStatistics` says."""
        size = x.shape[-1] // self.groups
        mean, variance = (
            ops.repeat(part, size, axis=-1)[:, None, None, :]
            for part in GroupNormStatistics.current().of(x, self.groups)
        )
        normal = (x - mean) * (ops.rsqrt(variance + self.epsilon) * gamma) + beta
        return ops.silu(normal) if self.silu else normal

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        own = {"groups": self.groups, "epsilon": self.epsilon, "silu": self.silu}
        return {**super().get_config(), **own}


@functools.cache
def _group_normalised(groups, epsilon, silu):
    """The function (x (B, H, W, C), gamma (C,), beta (C,)) -> x normalised and, if wanted, through a SiLU."""

    @ops.custom_gradient
    def normalised(x, gamma, beta):
        # B batch, H W place, C channels
        _, height, width, channels = ops.shape(x)
        size = channels // groups
        # Sums over places (B, C), multiplied by it, become in each channel the mean of its group.
        mixing = np.kron(np.eye(groups), np.ones((size, size))).astype("float32") / size
        places = height * width
        mixing = mixing / (places if isinstance(places, int) else ops.cast(places, "float32"))

        def over_group(sums):
            return ops.matmul(sums, mixing)

        def spread(statistic):
            return ops.reshape(statistic, (-1, 1, 1, channels))

        centred = x - spread(over_group(ops.sum(x, axis=(1, 2))))
        inverse = ops.rsqrt(over_group(ops.sum(ops.square(centred), axis=(1, 2))) + epsilon)  # (B, C)
        scale = inverse * gamma
        normal = centred * spread(scale) + beta
        result = normal * ops.sigmoid(normal) if silu else normal

        def gradient(upstream):
            if silu:
                # What the SiLU was given is made anew: to keep it costs more memory than time is saved. In 32 bits the
                # result is kept anyway, by the convolution that takes it.
                gate = ops.sigmoid(centred * spread(scale) + beta)
                upstream = upstream * (result + gate * (1.0 - result))
            given = ops.sum(upstream, axis=(1, 2))  # (B, C)
            along = ops.sum(upstream * centred, axis=(1, 2))
            # d centred and d inverse, brought back to x through the group's mean and variance
            slope = ops.square(inverse) * inverse * over_group(gamma * along)
            shift = inverse * over_group(gamma * given)
            back = upstream * spread(scale) - centred * spread(slope) - spread(shift)
            return back, ops.sum(along * inverse, axis=0), ops.sum(given, axis=0)

        return result, gradient

    return normalised


class LayerNorm(keras.layers.Layer):
    """Layer normalisation of each token (Ba et al. 2016), in float32, with its gradient written out as `GroupNorm`'s.

    Args:
        epsilon: added to the variance.

    Call: x (..., C) -> (..., C).
    """

    def __init__(self, epsilon=1e-5, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, input_shape):
        own = {"shape": input_shape[-1:], "autocast": False}
        self.gamma = self.add_weight(**own, initializer="ones", name="gamma")
        self.beta = self.add_weight(**own, initializer="zeros", name="beta")

    def call(self, x):
        values, gamma, beta = (ops.cast(part, "float32") for part in (x, self.gamma, self.beta))
        return ops.cast(_layer_normalised(self.epsilon)(values, gamma, beta), self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}


@functools.cache
def _layer_normalised(epsilon):
    """The function (x (..., C), gamma (C,), beta (C,)) -> x normalised, with its gradient."""

    def mean(values):
        return ops.mean(values, axis=-1, keepdims=True)

    @ops.custom_gradient
    def normalised(x, gamma, beta):
        centred = x - mean(x)
        inverse = ops.rsqrt(mean(ops.square(centred)) + epsilon)
        normal = centred * inverse

        def gradient(upstream):
            given, tokens = upstream * gamma, tuple(range(len(x.shape) - 1))
            back = inverse * (given - mean(given) - normal * mean(given * normal))
            return back, ops.sum(upstream * normal, axis=tokens), ops.sum(upstream, axis=tokens)

        return normal * gamma + beta, gradient

    return normalised


def conv3(channels, name, strides=1, **kwargs):
    """A 3x3 convolution that keeps the size (or halves it, with strides 2)."""
    return keras.layers.Conv2D(channels, 3, strides=strides, padding="same", name=name, **kwargs)


class ResidualBlock(keras.layers.Layer):
    """Normalise, SiLU, convolve, twice; the time embedding is added in between (Ho et al. 2020).

    Args:
        channels: output channels; a 1x1 convolution widens the shortcut when they differ from the input's.
        groups: groups of its normalisations.
        epsilon: of its normalisations.

    Call: x (B, H, W, Cin), optional embedding (B, E) -> (B, H, W, channels).
    """

    def __init__(self, channels, groups=32, epsilon=1e-5, **kwargs):
        super().__init__(**kwargs)
        self.channels, self.groups, self.epsilon = channels, groups, epsilon
        self.norm1 = GroupNorm(groups, epsilon, silu=True, name="norm1", dtype=self.dtype_policy)
        self.conv1 = conv3(channels, "conv1", dtype=self.dtype_policy)
        self.norm2 = GroupNorm(groups, epsilon, silu=True, name="norm2", dtype=self.dtype_policy)
        self.conv2 = conv3(channels, "conv2", kernel_initializer="zeros", dtype=self.dtype_policy)
        self.shortcut = self.time_projection = None

    def build(self, x_shape, embedding_shape=None):
        self.norm1.build(x_shape)
        self.conv1.build(x_shape)
        inner = (*x_shape[:-1], self.channels)
        self.norm2.build(inner)
        self.conv2.build(inner)
        if x_shape[-1] != self.channels:
            self.shortcut = keras.layers.Conv2D(
                self.channels, 1, name="conv_shortcut", dtype=self.dtype_policy
            )
            self.shortcut.build(x_shape)
        if embedding_shape is not None:
            self.time_projection = keras.layers.Dense(
                self.channels, name="time_emb_proj", dtype=self.dtype_policy
            )
            self.time_projection.build(embedding_shape)

    def call(self, x, embedding=None):
        h = self.conv1(self.norm1(x))
        if embedding is not None:
            h = h + ops.reshape(self.time_projection(ops.silu(embedding)), (-1, 1, 1, self.channels))
        h = self.conv2(self.norm2(h))
        return h + (x if self.shortcut is None else self.shortcut(x))

    def compute_output_shape(self, x_shape, embedding_shape=None):
        return (*x_shape[:-1], self.channels)

    def get_config(self):
        own = {"channels": self.channels, "groups": self.groups, "epsilon": self.epsilon}
        return {**super().get_config(), **own}


class Attention(keras.layers.Layer):
    """Multi-head attention of a sequence over itself or over a context (Vaswani et al. 2017).

    Args:
        width: channels of the queries and of the output.
        heads: number of heads; it must divide `width`.
        qkv_bias: whether queries, keys and values have a bias.

    Call: x (B, N, width), context (B, T, D) or None for x itself, mask (B, T) bool, True where the context
    may be looked at -> (B, N, width). In place of the context, `keys_values` takes what the method of that name
    made of it, which serves any number of calls.
    """

    def __init__(self, width, heads, qkv_bias=False, **kwargs):
        super().__init__(**kwargs)
        if width % heads:
            raise ValueError(f"Attention needs a width divisible by its heads. Received: {width} and {heads}")
        self.width, self.heads, self.qkv_bias = width, heads, qkv_bias
        self.to_q, self.to_k, self.to_v = (
            keras.layers.Dense(width, use_bias=qkv_bias, name=name, dtype=self.dtype_policy)
            for name in ("to_q", "to_k", "to_v")
        )
        self.to_out = keras.layers.Dense(width, name="to_out", dtype=self.dtype_policy)

    def build(self, x_shape, context_shape=None, mask_shape=None):
        context_shape = x_shape if context_shape is None else context_shape
        self.to_q.build(x_shape)
        self.to_k.build(context_shape)
        self.to_v.build(context_shape)
        self.to_out.build((*x_shape[:-1], self.width))

    def keys_values(self, context):
        """The keys and values of a context (B, T, D), each (B, T, heads, width / heads)."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def call(self, x, context=None, mask=None, keys_values=None):
        # B batch, N queries, T keys, H heads, D width of a head
        q = self._split(self.to_q(x))
        k, v = self.keys_values(x if context is None else context) if keys_values is None else keys_values
        scores = ops.cast(ops.einsum("bnhd,bthd->bhnt", q, k), "float32")
        scores = scores / math.sqrt(self.width // self.heads)
        if mask is not None:
            scores = ops.where(mask[:, None, None, :], scores, MASKED_SCORE)
        # Of a single key the weight is 1, with gradients of 0; Keras warns of a softmax over one value.
        weights = ops.exp(scores - scores) if scores.shape[-1] == 1 else ops.softmax(scores, axis=-1)
        weights = ops.cast(weights, self.compute_dtype)
        mixed = ops.einsum("bhnt,bthd->bnhd", weights, v)
        return self.to_out(ops.reshape(mixed, (-1, ops.shape(x)[1], self.width)))

    def _split(self, sequence):
        return ops.reshape(
            sequence, (-1, ops.shape(sequence)[1], self.heads, self.width // self.heads)
        )  # (B, N, H, D)

    def compute_output_shape(self, x_shape, context_shape=None, mask_shape=None):
        return (*x_shape[:-1], self.width)

    def get_config(self):
        return {**super().get_config(), "width": self.width, "heads": self.heads, "qkv_bias": self.qkv_bias}


def flatten_places(x):
    """(B, H, W, C) -> (B, H*W, C)."""
    _, height, width, channels = ops.shape(x)
    return ops.reshape(x, (-1, height * width, channels))


class _Conv3Weights(keras.layers.Layer):
    """The weights of a 3x3 convolution, in float32 whatever the layer around them computes in."""

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self._initializer = keras.initializers.GlorotUniform()

    def build(self, input_shape):
        shape = (3, 3, input_shape[-1], self.channels)
        self.kernel = self.add_weight(
            shape=shape, initializer=self._initializer, autocast=False, name="kernel"
        )
        self.bias = self.add_weight(shape=shape[-1:], initializer="zeros", autocast=False, name="bias")


class Upsample(keras.layers.Layer):
    """Doubles height and width by repeating pixels, then convolves 3x3.

    Both at once are one transposed convolution of stride 2, whose 4x4 kernel adds up the weights that fall on the same
    pixel: 16 products for each pixel given in place of 36, and no large picture of repeated pixels.

    Args:
        channels: output channels.

    Call: x (B, H, W, C) -> (B, 2H, 2W, channels).
    """

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self.conv = _Conv3Weights(channels, name="conv", dtype=self.dtype_policy)

    def build(self, input_shape):
        self.conv.build(input_shape)

    def call(self, x):
        # a, b places of the 4x4 kernel, m, n of the 3x3 one, i channels in, o out
        kernel = ops.einsum("am,bn,mnio->aboi", REPEATED, REPEATED, self.conv.kernel)
        kernel = ops.cast(kernel, self.compute_dtype)
        doubled = ops.conv_transpose(ops.cast(x, self.compute_dtype), kernel, strides=2, padding="same")
        return doubled + ops.cast(self.conv.bias, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        batch, height, width, _ = input_shape
        return (batch, height and 2 * height, width and 2 * width, self.channels)

    def get_config(self):
        return {**super().get_config(), "channels": self.channels}


class Downsample(keras.layers.Layer):
    """Halves height and width by a 3x3 convolution of stride 2.

    Args:
        channels: output channels.
        symmetric: pad one pixel on every side (the U-Net of Stable Diffusion) instead of only below and to
            the right (its autoencoder).

    Call: x (B, H, W, C) -> (B, H/2, W/2, channels).
    """

    def __init__(self, channels, symmetric=False, **kwargs):
        super().__init__(**kwargs)
        self.channels, self.symmetric = channels, symmetric
        self.conv = keras.layers.Conv2D(
            channels, 3, strides=2, padding="valid", name="conv", dtype=self.dtype_policy
        )

    def build(self, input_shape):
        self.conv.build(input_shape)

    def call(self, x):
        before = 1 if self.symmetric else 0
        return self.conv(ops.pad(x, ((0, 0), (before, 1), (before, 1), (0, 0))))

    def compute_output_shape(self, input_shape):
        batch, height, width, _ = input_shape
        before = int(self.symmetric)
        return (batch, height and (height + before) // 2, width and (width + before) // 2, self.channels)

    def get_config(self):
        return {**super().get_config(), "channels": self.channels, "symmetric": self.symmetric}
