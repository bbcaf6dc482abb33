"""Networks only: LPIPS, the perceptual distance whose weights were fitted to what people call similar.

Written with `keras.ops` and in float32 whatever the policy is. No weight is trainable.
"""

import h5py
import keras
import numpy as np

from errors import InputError
from model import torch_weights
from model._trunks import PLANS, build_trunk, check_shapes, trunk_shapes
from model.perceptual import (
    PerceptualDistance,
    global_policy,
    hash_arrays,
    load_hdf5,
    perceptual_distance,
)

# LPIPS' own scaling: ImageNet's mean and deviation, in -1..1.
_SHIFT, _SCALE = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
# Caffe's: the mean of red, green and blue is subtracted from 0..255.
_CAFFE_SHIFT, _CAFFE_SCALE = np.array([123.68, 116.779, 103.939]) / 127.5 - 1.0, np.full(3, 1 / 127.5)
_EPSILON = 1e-20  # LPIPS adds 1e-10 to the length itself

_TRUNKS_AT = "https://download.pytorch.org/models/"
_TRUNK_FILES = {  # address, sha256
    "vgg16": (
        _TRUNKS_AT + "vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    "alexnet": (
        _TRUNKS_AT + "alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    ),
    "squeezenet": (
        _TRUNKS_AT + "squeezenet1_1-b8a52dc0.pth",
        "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
    ),
}
_HEADS_AT = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/"
_HEADS_FILES = {
    "vgg16": (_HEADS_AT + "vgg.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    "alexnet": (_HEADS_AT + "alex.pth", "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"),
    "squeezenet": (
        _HEADS_AT + "squeeze.pth",
        "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
    ),
}


def perceptual(network, depth, weights=None, heads=None):
    """Returns the perceptual distance by a network's name.

    Arguments:
        network: "efficientnet_lite0" for `PerceptualDistance`; "vgg16", "alexnet" or "squeezenet" for `LPIPS`.
        depth: levels of `PerceptualDistance`; LPIPS always takes all of its network's.
        weights: the network's file; None is the default of each.
        heads: see `LPIPS`.

    Returns:
        Layer of pixels (B, H, W, 3), pixels (B, H, W, 3) -> distance float32 (B,).

    Raises:
        InputError: an unknown name, or weights that cannot be had.
    """
    if network == "efficientnet_lite0":
        if heads is not None:
            raise InputError(f"perceptual heads: received {heads!r}, expected none with efficientnet_lite0")
        return PerceptualDistance(depth, weights)
    if network not in PLANS:
        names = ["efficientnet_lite0", *PLANS]
        raise InputError(f"perceptual network: received {network!r}, expected one of {names}")
    return LPIPS(network, weights, heads)


class LPIPS(keras.layers.Layer):
    """Learned perceptual image patch similarity, version 0.1 (Zhang et al. 2018, arXiv:1801.03924, eq. 1).

    Maps of a network that classifies ImageNet are taken at five levels (seven of SqueezeNet); their vectors of channels
    are brought to unit length, the squared differences weighted channel by channel, summed, averaged over space, and
    added up over levels. Differentiable in both pictures.

    Arguments:
        network: "vgg16", usual in losses; "alexnet", usual in reports; or "squeezenet", the smallest.
        weights: torchvision's file of that network; None downloads it, once, into Keras' folder of models.
            For "vgg16" it may also be keras.applications' vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5. Those are
            Caffe's weights, with Caffe's preprocessing, to which the heads were never fitted: such numbers are no
            published LPIPS, and their protocol names the network "vgg16_caffe".
        heads: the weights of the channels: `vgg.pth`, `alex.pth` or `squeeze.pth` of the repository
            richzhang/PerceptualSimilarity, version 0.1; None downloads the network's own, once.

    Call arguments:
        pixels_a, pixels_b: float (B, H, W, 3) in -1..1, sides at least 16 px with "vgg16", 31 with "alexnet", 17 with
            "squeezenet".

    Returns:
        float32 (B,), 0 between equal pictures, mostly below 1.

    Attributes:
        protocol: dict of network, weights and heads (sha256 over the bytes of their arrays): what a number depends on
            besides the pictures.

    Raises:
        InputError: unknown name, a file that does not hold the network or the heads, a failed download, or, in a call,
            pictures too small for the network.
    """

    def __init__(self, network="vgg16", weights=None, heads=None, name="lpips"):
        super().__init__(name=name, dtype="float32", trainable=False)
        if network not in PLANS:
            raise InputError(f"LPIPS: received network {network!r}, expected one of {list(PLANS)}")
        self.network = network
        # The heads come first: their file is small, and a wrong one is told at once.
        self.heads = _read_heads(network, heads or _download_heads(network))
        path = weights or _download_trunk(network)
        self.is_caffe = h5py.is_hdf5(path)
        tensors = _read_caffe_vgg16(network, path) if self.is_caffe else _read_trunk(network, path)
        preprocess = (_CAFFE_SHIFT, _CAFFE_SCALE) if self.is_caffe else (_SHIFT, _SCALE)
        self.trunk = build_trunk(network, tensors, *preprocess)

    @property
    def protocol(self):
        return {
            "network": f"{self.network}_caffe" if self.is_caffe else self.network,
            "weights": hash_arrays(self.trunk.get_weights()),
            "heads": hash_arrays(self.heads),
        }

    def call(self, pixels_a, pixels_b):
        levels_a, levels_b = (self._levels(pixels) for pixels in (pixels_a, pixels_b))
        return perceptual_distance(levels_a, levels_b, self.heads, _EPSILON)

    def _levels(self, pixels):
        sides, least = pixels.shape[1:3], PLANS[self.network].least
        if any(side is not None and side < least for side in sides):
            received = " x ".join(map(str, sides))
            raise InputError(
                f"LPIPS with {self.network}: received pictures of {received} px, "
                f"expected sides of at least {least}"
            )
        return self.trunk(pixels)["levels"]

    def compute_output_shape(self, pixels_a_shape, pixels_b_shape):
        return (pixels_a_shape[0],)


def _read_heads(network, path):
    """Returns a vector of weights (C,) for each level."""
    channels = [level.channels for level in PLANS[network].levels]
    names = [f"lin{index}.model.1.weight" for index in range(len(channels))]
    tensors = torch_weights.read(path)
    shapes = {name: (1, size, 1, 1) for name, size in zip(names, channels, strict=True)}
    check_shapes(path, f"LPIPS heads of {network}", tensors, shapes)
    return tuple(tensors[name].reshape(-1) for name in names)


def _read_trunk(network, path):
    tensors = torch_weights.read(path, prefix="features.")
    check_shapes(path, f"torchvision's {network}", tensors, trunk_shapes(network))
    return tensors


def _read_caffe_vgg16(network, path):
    """Returns the arrays of Keras' VGG16 under torchvision's names and in its layout."""
    if network != "vgg16":
        raise InputError(f"{path}: is an HDF5 file, expected torchvision's {network}")
    with global_policy("float32"):
        model = keras.applications.VGG16(include_top=False, weights=None)
    load_hdf5(model, path, "VGG16 without top")
    arrays = model.get_weights()  # kernel, bias, kernel, bias, ...
    arrays[0] = arrays[0][:, :, ::-1]  # Caffe counts blue, green, red
    layouts = {1: (0,), 4: (3, 2, 0, 1)}
    arrays = [array.transpose(layouts[array.ndim]) for array in arrays]
    return dict(zip(trunk_shapes(network), arrays, strict=True))


def _download_trunk(network):
    return _download(network, *_TRUNK_FILES[network])


def _download_heads(network):
    return _download(network, *_HEADS_FILES[network])


def _download(network, url, sha256):
    name = url.rpartition("/")[2]
    try:
        return keras.utils.get_file(
            name, url, cache_subdir="models/lpips", file_hash=sha256, hash_algorithm="sha256"
        )
    # Keras reports a failed download as a bare Exception, and a wrong checksum as ValueError.
    except Exception as error:
        trunk, heads = (files[network][0] for files in (_TRUNK_FILES, _HEADS_FILES))
        raise InputError(
            f"LPIPS: the download of {url} failed ({error}); fetch {trunk} and {heads} where there is a network, "
            "and give their paths as --vae-training.perceptual-weights and --vae-training.perceptual-heads"
        ) from error
