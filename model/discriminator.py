"""The discriminator: `PatchDiscriminator`, which tells real pixels from rebuilt ones, patch by patch.

The architecture is the PatchGAN of Isola et al. 2017 (pix2pix), as the autoencoder of Rombach et al. 2022 is trained
with.
"""

import zlib

import keras
import numpy as np
from keras import ops

from model.common import GroupNorm

NORMS = ("group", "batch", "none")
KERNEL = 4  # side of every convolution
SLOPE = 0.2  # of the leaky ReLU below 0
WIDEST = 8  # times `channels`, the most that a convolution has
SPREAD = 0.02  # standard deviation of the first weights
FIRST_ITERATIONS = 15  # of a new convolution's power iteration


class PatchConv(keras.layers.Layer):
    """A 4x4 convolution over pixels with one more of zeros on every side; its kernel may be W / sigma(W).

    sigma(W) is the spectral norm of W as a matrix, output channels by the rest (Miyato et al. 2018): u^T W v with
    v = W^T u / |W^T u|, so |W^T u|, whose gradient is the paper's, that of constant u and v. u is a weight of the layer
    that nothing but `power_iteration` changes: a call changes no weight, so that replicas and parts of a batch agree.
    sigma is computed in float32, whatever the layer computes in.

    Args:
        channels: output channels.
        strides: 1 or 2.
        use_bias: whether a bias is added.
        spectral_norm: whether the kernel is divided by its spectral norm.

    Call: x (B, H, W, C) -> (B, (H - 2) // strides + 1, (W - 2) // strides + 1, channels).
    """

    def __init__(self, channels, strides=1, use_bias=True, spectral_norm=False, **kwargs):
        super().__init__(**kwargs)
        self.channels, self.strides = channels, strides
        self.use_bias, self.spectral_norm = use_bias, spectral_norm

    def build(self, input_shape):
        spread = keras.initializers.RandomNormal(stddev=SPREAD)
        shape = (KERNEL, KERNEL, input_shape[-1], self.channels)
        self.kernel = self.add_weight(shape=shape, initializer=spread, autocast=False, name="kernel")
        if self.use_bias:
            self.bias = self.add_weight(shape=(self.channels,), initializer="zeros", name="bias")
        if self.spectral_norm:
            self.u = self.add_weight(
                shape=(self.channels,),
                initializer=self._first_direction,
                trainable=False,
                autocast=False,
                aggregation="only_first_replica",
                name="u",
            )
            self.power_iteration(FIRST_ITERATIONS)

    def _first_direction(self, shape, dtype):
        # Drawn from the name, so that it is the same on every replica and whatever was drawn before.
        draw = np.random.default_rng(zlib.crc32(self.name.encode())).normal(size=shape)
        return ops.convert_to_tensor(draw / np.linalg.norm(draw), dtype)

    def _matrix(self):
        """W^T, (places and input channels, output channels)."""
        return ops.reshape(self.kernel, (-1, self.channels))

    def power_iteration(self, iterations=1):
        """Moves u towards the first left singular vector of the kernel as it is now."""
        if self.spectral_norm:
            u, matrix = ops.convert_to_tensor(self.u), self._matrix()
            for _ in range(iterations):
                u = _unit(ops.matmul(_unit(ops.matmul(matrix, u)), matrix))
            self.u.assign(u)

    def _normalised_kernel(self):
        return self.kernel / ops.norm(ops.matmul(self._matrix(), self.u))

    def call(self, x):
        kernel = self._normalised_kernel() if self.spectral_norm else self.kernel
        x = ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = ops.conv(x, ops.cast(kernel, x.dtype), self.strides, "valid", data_format="channels_last")
        return x + self.bias if self.use_bias else x

    def compute_output_shape(self, input_shape):
        batch, *size, _ = input_shape
        size = (length and (length + 2 - KERNEL) // self.strides + 1 for length in size)
        return (batch, *size, self.channels)

    def get_config(self):
        names = ("channels", "strides", "use_bias", "spectral_norm")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def _unit(vector):
    return vector / ops.maximum(ops.norm(vector), 1e-12)


class _GroupNorm(GroupNorm):
    """A `GroupNorm` whose scale begins as pix2pix's norms do."""

    def build(self, input_shape):
        super().build(input_shape)
        self.gamma.assign(keras.initializers.RandomNormal(1.0, SPREAD)(self.gamma.shape))


def _norm(norm, groups, name):
    if norm == "group":
        return _GroupNorm(groups, name=name)
    # torch's momentum 0.1 and epsilon.
    return keras.layers.BatchNormalization(
        momentum=0.9,
        epsilon=1e-5,
        gamma_initializer=keras.initializers.RandomNormal(1.0, SPREAD),
        synchronized=True,
        name=name,
    )


class PatchDiscriminator(keras.Model):
    """One logit a patch: above 0 for real, below 0 for rebuilt (Isola et al. 2017, section 3.2.2).

    `layers` convolutions of stride 2, then two of stride 1, all 4x4; the channels double up to eight times the first;
    a leaky ReLU follows each but the last, and a norm each but the first and the last. Weights begin as N(0, 0.02), the
    norms' scales as N(1, 0.02).

    Args:
        channels: of the first convolution.
        layers: convolutions that halve the size, 1 or more.
        norm: "group", of each picture by itself (Wu & He 2018); "batch" (Ioffe & Szegedy 2015, as in the paper), whose
            statistics are of the batch on all replicas, so that the batch must come in one piece: not within
            `parallel.summed`, and with TensorFlow only; or "none". A convolution before a norm has no bias.
        groups: of the group norms; it must divide 2 `channels`.
        spectral_norm: whether kernels are divided by their spectral norm (Miyato et al. 2018); a trainer then calls
            `update_spectral_norms` once a step.

    Call: pixels (B, H, W, 3) in -1..1 -> logits (B, h, w, 1), float32, with h = H // 2^layers - 2, and w likewise.

    Raises:
        ValueError: on an unknown `norm`, on `layers` below 1, and when called on pictures that hold no patch.
    """

    def __init__(
        self, channels=64, layers=3, norm="group", groups=32, spectral_norm=False, name="discriminator"
    ):
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}. Received: {norm!r}")
        if layers < 1:
            raise ValueError(f"PatchDiscriminator needs 1 layer or more. Received: layers={layers}")
        x = pixels = keras.Input((None, None, 3), name="pixels")
        for depth in range(layers + 1):
            width, strides = channels * min(2**depth, WIDEST), 2 if depth < layers else 1
            bare = depth == 0 or norm == "none"
            x = PatchConv(width, strides, bare, spectral_norm, name=f"{name}.convs.{depth}")(x)
            x = x if bare else _norm(norm, groups, f"{name}.norms.{depth}")(x)
            x = ops.leaky_relu(x, SLOPE)
        last = {"spectral_norm": spectral_norm, "name": f"{name}.convs.{layers + 1}", "dtype": "float32"}
        super().__init__(pixels, PatchConv(1, **last)(x), name=name)
        self.norm = norm
        self._arguments = (channels, layers, norm, groups, spectral_norm, name)

    @property
    def _convolutions(self):
        return [layer for layer in self.layers if isinstance(layer, PatchConv)]

    @property
    def takes_whole_batches(self):
        """Whether a picture's logits in training depend on its batch, which so must not come in parts."""
        return self.norm == "batch"

    @property
    def receptive_field(self):
        """Side of a patch: the pixels that a logit can see, 70 for 3 layers."""
        field = 1
        for conv in reversed(self._convolutions):
            field = (field - 1) * conv.strides + KERNEL
        return field

    @property
    def least_size(self):
        """Side of the smallest picture with a logit, 24 for 3 layers."""
        size = 1
        for conv in reversed(self._convolutions):
            size = (size - 1) * conv.strides + KERNEL - 2
        return size

    def update_spectral_norms(self):
        """One power iteration of every convolution: once after each optimizer's step, outside `parallel.summed`."""
        for conv in self._convolutions:
            conv.power_iteration()

    def call(self, inputs, training=None, mask=None):
        height, width = inputs.shape[1:3]
        if min(side or self.least_size for side in (height, width)) < self.least_size:
            raise ValueError(
                f"PatchDiscriminator needs pixels of {self.least_size}x{self.least_size} or more. "
                f"Received: {height}x{width}"
            )
        return super().call(inputs, training=training, mask=mask)

    def get_config(self):
        names = ("channels", "layers", "norm", "groups", "spectral_norm", "name")
        return dict(zip(names, self._arguments, strict=True))
