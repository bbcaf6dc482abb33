"""LPIPS against the lpips package, with its published heads on random trunks in torchvision's layout."""

import hashlib
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from model import lpips  # noqa: E402
from model._trunks import PLANS  # noqa: E402
from model.lpips import LPIPS  # noqa: E402
from model.perceptual import perceptual_distance  # noqa: E402
from tests.torch_arrays import first  # noqa: E402

SHORT = {"vgg16": "vgg", "alexnet": "alex", "squeezenet": "squeeze"}  # the package's names


# --- the trunks as torchvision builds them, which has no build beside a CPU torch


class Fire(nn.Module):
    def __init__(self, channels, squeezed, half):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, half, 1)
        self.expand3x3 = nn.Conv2d(squeezed, half, 3, padding=1)

    def forward(self, x):
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


def vgg16():
    """Configuration D of the VGG paper: numbers are widths, M is max pooling."""
    layers, channels = [], 3
    for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


def alexnet():
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
    )


def squeezenet1_1():
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(64, 16, 64),
        Fire(128, 16, 64),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(128, 32, 128),
        Fire(256, 32, 128),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(256, 48, 192),
        Fire(384, 48, 192),
        Fire(384, 64, 256),
        Fire(512, 64, 256),
    )


class Classifier(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.features = features


def made(make):
    def make_network(pretrained=False):
        assert not pretrained
        return Classifier(make())

    return make_network


def stand_ins():
    models = ModuleType("torchvision.models")
    for make in (vgg16, alexnet, squeezenet1_1):
        setattr(models, make.__name__, made(make))
    torchvision = ModuleType("torchvision")
    torchvision.models = models
    # Its trainer, which no test uses, asks for scipy.
    scipy = {name: mock.MagicMock() for name in ("scipy", "scipy.ndimage")}
    return {"torchvision": torchvision, "torchvision.models": models, **scipy}


@pytest.fixture(scope="module")
def package():
    with mock.patch.dict(sys.modules, stand_ins()):
        import lpips as package
    return package


@pytest.fixture(scope="module")
def heads(package):
    """A function of a network's name: the path of its published heads."""
    return lambda network: Path(package.__file__).parent / f"weights/v0.1/{SHORT[network]}.pth"


@pytest.fixture(scope="module")
def pairs(package, heads, tmp_path_factory):
    """A function of a network's name: (the package's LPIPS, ours) with one random trunk and the published heads."""
    folder, made = tmp_path_factory.mktemp("trunks"), {}

    def make(network):
        if network not in made:
            torch.manual_seed(len(network))
            theirs = package.LPIPS(net=SHORT[network], pnet_rand=True, verbose=False)
            path = folder / f"{network}.pth"
            torch.save(randomized(theirs.net), path)
            # Torch in float64, so that what is left between the two is our float32.
            made[network] = theirs.double(), LPIPS(network, path, heads(network))
        return made[network]

    return make


def randomized(trunk):
    """Draws a trunk's weights and returns them under torchvision's names."""
    state = OrderedDict()
    for name, value in trunk.state_dict().items():
        if value.ndim == 1:
            nn.init.normal_(value, std=0.05)
        else:
            nn.init.kaiming_normal_(value)
        # The package's "slice1.0.weight" is torchvision's "features.0.weight".
        state[f"features.{name.partition('.')[2]}"] = value
    return state


def pictures(side, width=None):
    """Two pairs of pictures with shapes in them, in -1..1, channels last."""
    noise = torch.from_numpy(np.random.default_rng(side).uniform(-1, 1, (4, 3, 9, 9)))
    smooth = nn.functional.interpolate(noise, size=(side, width or side), mode="bicubic").clamp(-1, 1)
    a, b = smooth.permute(0, 2, 3, 1).numpy().astype("float32").reshape(2, 2, side, -1, 3)
    return a, (a + b) / 2


def in_float64(layer):
    """Our function of two pictures, with every layer computing in float64."""

    def widened(part):
        return part.from_config(part.get_config() | {"dtype": "float64"})

    trunk = keras.models.clone_model(layer.trunk, clone_function=widened)
    trunk.set_weights([weight.astype("float64") for weight in layer.trunk.get_weights()])
    heads = [head.astype("float64") for head in layer.heads]
    return lambda a, b: perceptual_distance(trunk(a)["levels"], trunk(b)["levels"], heads, lpips._EPSILON)


def with_gradients(distance, a, b):
    with tf.GradientTape() as tape:
        tape.watch([a, b])
        values = distance(a, b)
    return values, tape.gradient(values, [a, b])


def relative_error(value, expected):
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("network", SHORT)
@pytest.mark.parametrize("side", [64, 65, 128])
def test_the_distance_and_its_gradients_are_the_packages(pairs, network, side):
    theirs, ours = pairs(network)
    a, b = (tf.constant(pixels[:1]) for pixels in pictures(side))
    torch_a, torch_b = (first(x.numpy()).requires_grad_() for x in (a, b))
    expected = theirs(torch_a, torch_b)
    expected.sum().backward()
    expected, gradients = expected.item(), [x.grad.permute(0, 2, 3, 1).numpy() for x in (torch_a, torch_b)]

    value, ours32 = with_gradients(ours, a, b)
    assert float(value[0]) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01
    value, ours64 = with_gradients(in_float64(ours), tf.cast(a, "float64"), tf.cast(b, "float64"))
    assert float(value[0]) == pytest.approx(expected, rel=1e-6)
    for one, two, truth in zip(ours32, ours64, gradients, strict=True):
        assert relative_error(two, truth) < 1e-6
        # Float32 puts one of millions of values on the other side of its ReLU, here as in torch.
        assert relative_error(one, truth) < 2e-2


@pytest.mark.parametrize("network", SHORT)
def test_every_map_is_the_packages_at_any_size(pairs, network):
    """Pooling and padding show at the edges, so sides of every remainder are seen, and rectangles."""
    theirs, ours = pairs(network)
    for side, width in [*((side, side) for side in range(33, 42)), (64, 45)]:
        a, _ = pictures(side, width)
        expected = theirs.net(theirs.scaling_layer(first(a)))
        levels = ours.trunk(a)["levels"]
        assert len(levels) == len(expected)
        for level, values in zip(levels, expected, strict=True):
            values = values.permute(0, 2, 3, 1).detach().numpy()
            np.testing.assert_allclose(level, values, atol=1e-5 * np.abs(values).max())


@pytest.mark.parametrize("network", SHORT)
def test_the_least_side_is_torchs(pairs, network):
    theirs, ours = pairs(network)
    least = PLANS[network].least
    a, b = pictures(least)
    expected = theirs(first(a), first(b)).detach().numpy().reshape(-1)
    np.testing.assert_allclose(ours(a, b), expected, rtol=1e-4)
    with pytest.raises(RuntimeError, match="too small"):
        theirs(first(a[:, 1:]), first(b[:, 1:]))


@pytest.mark.parametrize("network", SHORT)
def test_the_heads_are_those_whose_checksums_the_download_asks_for(heads, network):
    _, sha256 = lpips._HEADS_FILES[network]
    assert hashlib.sha256(heads(network).read_bytes()).hexdigest() == sha256


ON_ANOTHER_BACKEND = """
import sys
import numpy as np
from model.lpips import LPIPS
a, b = np.load(sys.argv[1])
distance = LPIPS("squeezenet", *sys.argv[3:])(a, b)
np.save(sys.argv[2], distance.detach().numpy())
"""


def test_another_keras_backend_measures_the_same(pairs, heads, tmp_path):
    theirs, ours = pairs("squeezenet")
    a, b = pictures(40)
    np.save(tmp_path / "pictures.npy", np.stack([a, b]))
    state = {f"features.{name.partition('.')[2]}": value for name, value in theirs.net.state_dict().items()}
    torch.save(OrderedDict((name, value.float()) for name, value in state.items()), tmp_path / "trunk.pth")
    paths = [tmp_path / name for name in ("pictures.npy", "seen.npy", "trunk.pth")]
    root = Path(__file__).parents[2]
    environment = os.environ | {"KERAS_BACKEND": "torch", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", ON_ANOTHER_BACKEND, *paths, heads("squeezenet")]
    subprocess.run(command, check=True, cwd=root, env=environment)
    np.testing.assert_allclose(np.load(paths[1]), ours(a, b), rtol=1e-4)
