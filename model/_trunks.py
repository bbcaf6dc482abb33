"""Networks only: the convolutions of the three classifiers that LPIPS looks through, as torchvision laid them out.

VGG16 is that of Simonyan & Zisserman 2015 (arXiv:1409.1556), AlexNet the variant of Krizhevsky 2014 (arXiv:1404.5997),
SqueezeNet version 1.1 of Iandola et al. 2016 (arXiv:1602.07360). A module bears its number in torchvision's `features`.
"""

from typing import NamedTuple

import keras

from errors import InputError
from model.perceptual import with_weights


class _Level(NamedTuple):
    """The modules between one map that LPIPS takes and the next."""

    numbers: tuple[int, ...]
    channels: int
    pooled: bool = True  # whether max pooling comes before them
    kernel: int = 3
    fire: bool = False  # whether they are SqueezeNet's modules, not convolutions


class _Plan(NamedTuple):
    levels: tuple[_Level, ...]
    least: int  # side of the smallest pictures, px: below it a map would be empty
    stride: int = 1  # of the first convolution
    padding: int = 0  # of the first convolution, where its stride is not 1; all others keep their map's size
    pool: int = 3  # side of the pooling windows, whose stride is 2
    ceil: bool = False  # whether a pooling window may reach over the end of the map


PLANS = {
    "vgg16": _Plan(
        levels=(
            _Level((0, 2), 64, pooled=False),
            _Level((5, 7), 128),
            _Level((10, 12, 14), 256),
            _Level((17, 19, 21), 512),
            _Level((24, 26, 28), 512),
        ),
        least=16,
        pool=2,
    ),
    "alexnet": _Plan(
        levels=(
            _Level((0,), 64, pooled=False, kernel=11),
            _Level((3,), 192, kernel=5),
            _Level((6,), 384),
            _Level((8,), 256, pooled=False),
            _Level((10,), 256, pooled=False),
        ),
        least=31,
        stride=4,
        padding=2,
    ),
    "squeezenet": _Plan(
        levels=(
            _Level((0,), 64, pooled=False),
            _Level((3, 4), 128, fire=True),
            _Level((6, 7), 256, fire=True),
            _Level((9,), 384, fire=True),
            _Level((10,), 384, pooled=False, fire=True),
            _Level((11,), 512, pooled=False, fire=True),
            _Level((12,), 512, pooled=False, fire=True),
        ),
        least=17,
        stride=2,
        ceil=True,
    ),
}


def build_trunk(name, tensors, shift, scale):
    """Builds a frozen trunk.

    Arguments:
        name: one of `PLANS`.
        tensors: its arrays under torchvision's names, such as "features.0.weight" (out, in, k, k).
        shift, scale: three numbers each, of red, green and blue; the trunk sees (pixels - shift) / scale.

    Returns:
        Keras model of pixels float32 (B, H, W, 3) to a dict of "levels", maps float32 (B, h, w, C) after their ReLU.
    """
    return _Trunk(PLANS[name], tensors).model(name, shift, scale)


def trunk_shapes(name):
    """The shapes of a trunk's arrays, by torchvision's names."""
    shapes, channels = {}, 3
    for level in PLANS[name].levels:
        for number in level.numbers:
            shapes |= _module_shapes(f"features.{number}", channels, level)
            channels = level.channels
    return shapes


def _module_shapes(name, channels, level):
    if not level.fire:
        return _convolution_shapes(name, channels, level.channels, level.kernel)
    squeezed, half = level.channels // 8, level.channels // 2
    return {
        **_convolution_shapes(f"{name}.squeeze", channels, squeezed, 1),
        **_convolution_shapes(f"{name}.expand1x1", squeezed, half, 1),
        **_convolution_shapes(f"{name}.expand3x3", squeezed, half, 3),
    }


def _convolution_shapes(name, channels, filters, kernel):
    return {f"{name}.weight": (filters, channels, kernel, kernel), f"{name}.bias": (filters,)}


def check_shapes(source, kind, tensors, expected):
    """Refuses tensors of other names or shapes than a network has.

    Arguments:
        source: what the message begins with, best a path.
        kind: what should be there.
        tensors: dict of name -> array.
        expected: dict of name -> shape.

    Raises:
        InputError: the first difference, by its name.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{source}: holds no {kind}: {name} is missing")
        if tensors[name].shape != shape:
            received = tensors[name].shape
            raise InputError(f"{source}: holds no {kind}: {name} has shape {received}, expected {shape}")
    for name in sorted(tensors.keys() - expected.keys()):
        raise InputError(f"{source}: holds no {kind}: it has {name} besides")


class _Trunk:
    """Builds a trunk from its arrays; every method adds one part to the graph."""

    def __init__(self, plan, tensors):
        self.plan, self.tensors = plan, tensors

    def model(self, name, shift, scale):
        pixels = keras.Input((None, None, 3), dtype="float32", name="pixels")
        x = keras.layers.Rescaling(1 / scale, -shift / scale, dtype="float32", name="preprocess")(pixels)
        levels = []
        for level in self.plan.levels:
            x = self.pool(x) if level.pooled else x
            for number in level.numbers:
                x = (self.fire if level.fire else self.convolution)(x, f"features.{number}")
            levels.append(x)
        model = keras.Model(pixels, {"levels": levels}, name=name)
        model.trainable = False
        return model

    def pool(self, x):
        if self.plan.ceil:
            # A zero more at the end makes room for the last window, and changes no maximum after a ReLU.
            x = keras.layers.ZeroPadding2D(((0, 1), (0, 1)), dtype="float32")(x)
        return keras.layers.MaxPooling2D(self.plan.pool, strides=2, dtype="float32")(x)

    def fire(self, x, name):
        """A narrow convolution, then two wide ones side by side."""
        x = self.convolution(x, f"{name}.squeeze")
        sides = [self.convolution(x, f"{name}.{side}") for side in ("expand1x1", "expand3x3")]
        return keras.layers.Concatenate(dtype="float32")(sides)

    def convolution(self, x, name):
        kernel = self.tensors[f"{name}.weight"].transpose(2, 3, 1, 0)  # (k, k, in, out)
        # Keras pads a strided convolution otherwise than torch, so the padding is a layer of its own.
        stride = self.plan.stride if name == "features.0" else 1
        if stride > 1 and self.plan.padding:
            x = keras.layers.ZeroPadding2D(self.plan.padding, dtype="float32")(x)
        layer = keras.layers.Conv2D(
            kernel.shape[-1],
            kernel.shape[0],
            strides=stride,
            padding="same" if stride == 1 else "valid",
            activation="relu",
            dtype="float32",
            name=name.replace(".", "_"),
        )
        return with_weights(layer, x, kernel, self.tensors[f"{name}.bias"])
