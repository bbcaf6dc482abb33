"""LPIPS on random trunks: what holds of any distance, its definition, and every wrong file."""

import hashlib

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from errors import InputError
from model import lpips
from model._trunks import PLANS, trunk_shapes
from model.lpips import LPIPS, perceptual
from model.perceptual import PerceptualDistance
from tests.torch_files import save

# The smallest trunk in numbers: tests that any would do take it.
SMALL = "squeezenet"
CHANNELS = {
    "vgg16": (64, 128, 256, 512, 512),
    "alexnet": (64, 192, 384, 256, 256),
    "squeezenet": (64, 128, 256, 384, 384, 512, 512),
}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_trunk(network, rng):
    """He's initialisation, so that no level is silent, and biases that differ."""
    return {
        name: rng.normal(scale=0.05 if len(shape) == 1 else np.sqrt(2 / np.prod(shape[1:])), size=shape)
        for name, shape in trunk_shapes(network).items()
    }


def random_heads(network, rng):
    sizes = enumerate(CHANNELS[network])
    return {f"lin{index}.model.1.weight": rng.uniform(0, 1, (1, size, 1, 1)) for index, size in sizes}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A function of a network's name: (trunk file, heads file), random and saved once."""
    folder, made = tmp_path_factory.mktemp("lpips"), {}

    def make(network):
        if network not in made:
            rng = np.random.default_rng(len(network))
            trunk = random_trunk(network, rng) | {"classifier.1.weight": np.zeros((2, 3))}
            made[network] = (
                save(folder / f"{network}.pth", trunk, "zip"),
                save(folder / f"{network}_heads.pth", random_heads(network, rng), "legacy"),
            )
        return made[network]

    return make


@pytest.fixture(scope="module")
def distance(files):
    return LPIPS(SMALL, *files(SMALL))


def pictures(rng, n, side):
    """Smooth pixels in -1..1."""
    coarse = rng.uniform(-1, 1, (n, 8, 8, 3)).astype("float32")
    return tf.clip_by_value(tf.image.resize(coarse, (side, side), "bicubic"), -1, 1)


@pytest.mark.parametrize("network", PLANS)
def test_the_distance_is_zero_between_equal_pictures_and_symmetric(files, rng, network):
    distance = LPIPS(network, *files(network))
    a, b = pictures(rng, 2, 64)[:, None]
    assert distance(a, b).dtype == tf.float32 and distance(a, b).shape == (1,)
    assert float(distance(a, a)[0]) == 0 < float(distance(a, b)[0])
    np.testing.assert_allclose(distance(a, b), distance(b, a), rtol=1e-6)
    assert distance.trainable_variables == [] and distance.trunk.trainable_variables == []


@pytest.mark.parametrize("scale", [1, 1e-7])
def test_the_distance_is_its_definition(files, rng, tmp_path, scale):
    """Zhang et al. 2018, eq. 1, written as loops over levels and places; the vectors of a map may be short."""
    trunk = random_trunk(SMALL, rng)
    for part in ("weight", "bias"):
        trunk[f"features.0.{part}"] *= scale
    distance = LPIPS(SMALL, save(tmp_path / "trunk.pth", trunk), files(SMALL)[1])
    a, b = pictures(rng, 2, 40)[:, None]
    expected = 0.0
    levels = zip(distance.trunk(a)["levels"], distance.trunk(b)["levels"], distance.heads, strict=True)
    for level_a, level_b, head in levels:
        level_a, level_b = (np.asarray(level[0], "float64") for level in (level_a, level_b))
        for place in np.ndindex(level_a.shape[:2]):
            u, v = (x[place] / (np.linalg.norm(x[place]) + 1e-10) for x in (level_a, level_b))
            expected += np.sum(head * (u - v) ** 2) / np.prod(level_a.shape[:2])
    np.testing.assert_allclose(distance(a, b), [expected], rtol=1e-3)


def test_pictures_do_not_depend_on_their_batch(distance, rng):
    a, b = pictures(rng, 4, 32), pictures(rng, 4, 32)
    alone = [float(distance(a[i : i + 1], b[i : i + 1])[0]) for i in range(4)]
    np.testing.assert_allclose(distance(a, b), alone, rtol=1e-5)


@pytest.mark.parametrize("network", PLANS)
def test_the_gradient_is_finite_at_equal_pictures_and_where_a_map_is_silent(files, rng, tmp_path, network):
    """Half of the first map's vectors are zero, where the length itself has no slope."""
    trunk, heads, a = random_trunk(network, rng), files(network)[1], pictures(rng, 1, 48)
    first = LPIPS(network, save(tmp_path / "trunk.pth", trunk), heads).trunk(a)["levels"][0]
    last = f"features.{PLANS[network].levels[0].numbers[-1]}.bias"
    trunk[last] = trunk[last] - np.median(np.max(first, axis=-1))
    distance = LPIPS(network, save(tmp_path / "silent.pth", trunk), heads)
    silent = np.max(distance.trunk(a)["levels"][0], axis=-1) == 0
    assert silent.mean() == pytest.approx(0.5, abs=0.01)
    for b in (a, -a):
        with tf.GradientTape() as tape:
            tape.watch(a)
            value = distance(a, b)
        gradient = np.asarray(tape.gradient(value, a))
        assert np.isfinite(gradient).all()
        assert (np.abs(gradient).max() == 0) == (b is a)


def test_the_distance_has_the_gradient_of_its_values(distance, rng):
    a, b = pictures(rng, 2, 32)[:, None]
    with tf.GradientTape() as tape:
        tape.watch(a)
        value = distance(a, b)
    gradient = tape.gradient(value, a)
    slope = float(tf.norm(gradient))
    step = 3e-3 * gradient / slope
    ahead, behind = float(distance(a + step, b)[0]), float(distance(a - step, b)[0])
    assert slope == pytest.approx((ahead - behind) / 6e-3, rel=0.02)


def test_the_policy_changes_nothing(files, distance, rng):
    a, b = pictures(rng, 2, 40)[:, None]
    expected = distance(a, b)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        mixed = LPIPS(SMALL, *files(SMALL))
        np.testing.assert_array_equal(mixed(a, b), expected)
        assert {variable.dtype for variable in mixed.trunk.variables} == {"float32"}
        assert mixed(tf.cast(a, "float16"), b).dtype == tf.float32
    finally:
        keras.config.set_dtype_policy("float32")


def test_a_graph_gives_the_same_of_pictures_of_any_size(distance, rng):
    spec = tf.TensorSpec((None, None, None, 3), "float32")
    graph = tf.function(distance, input_signature=[spec, spec])
    for side in (17, 40):
        a, b = pictures(rng, 2, side)[:, None]
        np.testing.assert_allclose(graph(a, b), distance(a, b), rtol=1e-5)


# --- smallest pictures


@pytest.mark.parametrize("network, least", [("vgg16", 16), ("alexnet", 31), ("squeezenet", 17)])
def test_pictures_that_would_leave_a_map_empty_are_refused(files, rng, network, least):
    distance = LPIPS(network, *files(network))
    a, b = pictures(rng, 2, least)[:, None]
    assert min(distance.trunk(a)["levels"][-1].shape[1:3]) >= 1
    assert np.isfinite(distance(a, b)).all()
    message = f"received pictures of {least + 9} x {least - 1} px, expected sides of at least {least}"
    with pytest.raises(InputError, match=f"LPIPS with {network}: {message}"):
        distance(tf.zeros((1, least + 9, least - 1, 3)), tf.zeros((1, least + 9, least - 1, 3)))


# --- files


def test_formats_of_a_file_make_no_difference_and_the_protocol_tells_files_apart(files, distance, tmp_path):
    trunk = random_trunk(SMALL, np.random.default_rng(len(SMALL)))
    again = LPIPS(SMALL, save(tmp_path / "again.pth", trunk, "legacy"), files(SMALL)[1])
    assert again.protocol == distance.protocol
    assert again.protocol["network"] == SMALL
    assert all(len(distance.protocol[part]) == 64 for part in ("weights", "heads"))
    trunk["features.12.expand3x3.bias"][0] += 1
    other = LPIPS(SMALL, save(tmp_path / "other.pth", trunk), files(SMALL)[1])
    assert other.protocol | {"weights": None} == distance.protocol | {"weights": None}
    assert other.protocol["weights"] != distance.protocol["weights"]
    heads = random_heads(SMALL, np.random.default_rng(9))
    other = LPIPS(SMALL, files(SMALL)[0], save(tmp_path / "heads.pth", heads))
    assert other.protocol | {"heads": None} == distance.protocol | {"heads": None}
    assert other.protocol["heads"] != distance.protocol["heads"]


def test_another_networks_trunk_or_heads_are_refused_by_name(files):
    trunk, heads = files(SMALL)
    with pytest.raises(
        InputError, match=r"squeezenet\.pth: holds no torchvision's vgg16: features\.2\.weight is missing"
    ):
        LPIPS("vgg16", trunk, files("vgg16")[1])
    shapes = r"lin1\.model\.1\.weight has shape \(1, 128, 1, 1\), expected \(1, 192, 1, 1\)"
    with pytest.raises(
        InputError, match=rf"squeezenet_heads\.pth: holds no LPIPS heads of alexnet: {shapes}"
    ):
        LPIPS("alexnet", files("alexnet")[0], heads)
    with pytest.raises(InputError, match="holds no LPIPS heads of squeezenet: lin0"):
        LPIPS(SMALL, trunk, trunk)
    with pytest.raises(
        InputError, match=r"holds no torchvision's squeezenet: features\.0\.weight is missing"
    ):
        LPIPS(SMALL, heads, heads)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"features.9.squeeze.bias": None}, r"features\.9\.squeeze\.bias is missing"),
        (
            {"features.0.weight": np.zeros((64, 3, 7, 7))},
            r"features\.0\.weight has shape \(64, 3, 7, 7\), expected",
        ),
        ({"features.13.squeeze.bias": np.zeros(2)}, r"it has features\.13\.squeeze\.bias besides"),
    ],
)
def test_a_part_of_a_trunk_is_refused_by_name(files, rng, tmp_path, change, message):
    trunk = random_trunk(SMALL, rng) | change
    path = save(tmp_path / "mine.pth", {name: x for name, x in trunk.items() if x is not None})
    with pytest.raises(InputError, match=r"mine\.pth: holds no torchvision's squeezenet: " + message):
        LPIPS(SMALL, path, files(SMALL)[1])


def test_heads_of_more_levels_are_refused(files, rng, tmp_path):
    heads = random_heads("vgg16", rng) | {"lin5.model.1.weight": np.ones((1, 512, 1, 1))}
    with pytest.raises(InputError, match=r"LPIPS heads of vgg16: it has lin5\.model\.1\.weight besides"):
        LPIPS("vgg16", files("vgg16")[0], save(tmp_path / "heads.pth", heads))


@pytest.mark.parametrize("content", [None, b"", b"no weights"])
def test_files_that_are_none_are_refused_in_one_line(files, tmp_path, content):
    path = tmp_path / "broken.pth"
    if content is not None:
        path.write_bytes(content)
    for paths in ((path, files(SMALL)[1]), (files(SMALL)[0], path)):
        with pytest.raises(InputError, match=r"broken\.pth: (No such file|is no torch file)") as refusal:
            LPIPS(SMALL, *paths)
        assert "\n" not in str(refusal.value)


# --- Caffe's VGG16, as keras.applications hands it out


@pytest.fixture(scope="module")
def caffe(tmp_path_factory):
    """A random VGG16 in the layout of Keras' own file: a group a layer, in it its kernel and its bias."""
    keras.utils.set_random_seed(3)
    model = keras.applications.VGG16(include_top=False, weights=None)
    path = tmp_path_factory.mktemp("caffe") / "vgg16_notop.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in model.layers]
        for layer in model.layers:
            group, weights = file.create_group(layer.name), layer.get_weights()
            names = [f"{layer.name}_{part}_1:0" for part in "Wb"][: len(weights)]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, value in zip(names, weights, strict=True):
                group[name] = value
    return model, path


def test_caffes_network_sees_what_kerass_own_preprocessing_shows_it(caffe, files, rng):
    model, path = caffe
    distance = LPIPS("vgg16", path, files("vgg16")[1])
    a = pictures(rng, 2, 40)
    names = ("block1_conv2", "block2_conv2", "block3_conv3", "block4_conv3", "block5_conv3")
    keras_levels = keras.Model(model.input, [model.get_layer(name).output for name in names])
    images = (np.asarray(a) + 1) * 127.5
    expected = keras_levels(keras.applications.vgg16.preprocess_input(images))
    for level, values in zip(distance.trunk(a)["levels"], expected, strict=True):
        np.testing.assert_allclose(level, values, atol=1e-4 * np.abs(values).max())
    assert distance.protocol["network"] == "vgg16_caffe"


def test_caffes_network_is_refused_where_it_is_not_whole_or_not_vgg16(caffe, files, tmp_path):
    _, path = caffe
    with pytest.raises(InputError, match=r"vgg16_notop\.h5: is an HDF5 file, expected torchvision's alexnet"):
        LPIPS("alexnet", path, files("alexnet")[1])
    part = tmp_path / "part.h5"
    part.write_bytes(path.read_bytes())
    with h5py.File(part, "r+") as file:
        del file["block5_conv3"]
    with pytest.raises(InputError, match=r"part\.h5: holds no VGG16 without top: .* expected 14714688"):
        LPIPS("vgg16", part, files("vgg16")[1])


# --- downloads


def test_files_are_downloaded_from_their_publishers_with_their_checksums(files, monkeypatch):
    asked = []

    def answer(name, url, **options):
        asked.append((url, options["file_hash"]))
        return str(files(SMALL)[len(asked) == 1])  # heads first

    monkeypatch.setattr(keras.utils, "get_file", answer)
    LPIPS(SMALL)
    heads = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/squeeze.pth"
    trunk = "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"
    assert [url for url, _ in asked] == [heads, trunk]
    assert asked[0][1].startswith("4a5350f2") and asked[1][1].startswith("b8a52dc0")


@pytest.mark.parametrize("network", PLANS)
def test_torchvisions_file_names_begin_their_checksums(network):
    url, sha256 = lpips._TRUNK_FILES[network]
    assert url.removesuffix(".pth").endswith("-" + sha256[:8]) and len(sha256) == 64


def test_a_download_is_checked_and_kept(files, tmp_path, monkeypatch):
    """Through Keras' own function, from this machine's disk."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(keras.src.utils.file_utils.config, "keras_home", lambda: str(tmp_path / "home"))
    served = tmp_path / "squeeze.pth"
    served.write_bytes(files(SMALL)[1].read_bytes())
    sha256 = hashlib.sha256(served.read_bytes()).hexdigest()
    monkeypatch.setitem(lpips._HEADS_FILES, SMALL, (served.as_uri(), sha256))
    LPIPS(SMALL, weights=files(SMALL)[0])
    served.unlink()
    LPIPS(SMALL, weights=files(SMALL)[0])
    monkeypatch.setitem(lpips._HEADS_FILES, SMALL, (served.as_uri(), "0" * 64))
    with pytest.raises(InputError, match="failed"):
        LPIPS(SMALL, weights=files(SMALL)[0])


def test_a_failed_download_says_how_to_go_on(files, monkeypatch):
    def fail(*_, **__):
        raise Exception("URL fetch failure on somewhere")

    monkeypatch.setattr(keras.utils, "get_file", fail)
    for paths in ({}, {"weights": files("vgg16")[0]}, {"heads": files("vgg16")[1]}):
        with pytest.raises(InputError) as refusal:
            LPIPS("vgg16", **paths)
        said = str(refusal.value)
        assert "URL fetch failure on somewhere" in said and "\n" not in said
        assert "--vae-training.perceptual-weights" in said and "--vae-training.perceptual-heads" in said
        assert "vgg16-397923af.pth and " in said and "v0.1/vgg.pth where" in said


# --- by name


def test_the_distance_comes_by_its_networks_name(files):
    lite0 = perceptual("efficientnet_lite0", 2)
    assert isinstance(lite0, PerceptualDistance) and lite0.depth == 2
    other = perceptual(SMALL, 2, *files(SMALL))
    assert isinstance(other, LPIPS) and other.protocol["network"] == SMALL


def test_unknown_names_are_refused(files):
    with pytest.raises(
        InputError, match="received 'resnet', expected one of .*efficientnet_lite0.*squeezenet"
    ):
        perceptual("resnet", 3)
    with pytest.raises(InputError, match="LPIPS: received network 'vgg', expected one of"):
        LPIPS("vgg", *files(SMALL))
    with pytest.raises(InputError, match=r"perceptual heads: received 'x\.pth', expected none"):
        perceptual("efficientnet_lite0", 3, heads="x.pth")
