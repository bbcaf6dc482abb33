"""The discriminator: its patches, its norms, its spectral norms, and that replicas and graphs agree about them."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from model import discriminator
from model.discriminator import NORMS, PatchConv, PatchDiscriminator

TINY = {"channels": 4, "layers": 2, "groups": 2}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

each_norm = pytest.mark.parametrize("norm", NORMS)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def randomise(network):
    """Draws every weight anew: a new network's logits are too small to tell faults."""
    for index, variable in enumerate(network.trainable_variables):
        spread = 0.2 if len(variable.shape) > 1 else 0.5
        variable.assign(spread * normal(*variable.shape, seed=index) + variable.path.endswith("gamma"))
    network.update_spectral_norms()
    return network


def tiny(**arguments):
    """The same network at every call: directions of spectral norms begin by the kernel drawn first."""
    keras.utils.set_random_seed(0)
    return randomise(PatchDiscriminator(**{**TINY, **arguments}))


def singular_values(kernel):
    return np.linalg.svd(np.reshape(kernel, (-1, kernel.shape[-1])), compute_uv=False)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).uniform(-1, 1, (4, 16, 20, 3)).astype("float32")


# Patches


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (49, 79)])
def test_shapes_are_as_said(layers, height, width):
    network = PatchDiscriminator(2, layers, "none")
    expected = (2, height // 2**layers - 2, width // 2**layers - 2, 1)
    assert network(np.zeros((2, height, width, 3), "float32")).shape == expected
    assert network.compute_output_shape((2, height, width, 3)) == expected


@pytest.mark.parametrize(("layers", "side"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch_of_its_receptive_field(layers, side):
    network = randomise(PatchDiscriminator(2, layers, "none"))
    assert network.receptive_field == side
    size = 2 * side
    with tf.GradientTape() as tape:
        pixels = tf.Variable(normal(1, size, size, 3))
        logits = network(pixels)
        middle = logits[0, logits.shape[1] // 2, logits.shape[2] // 2, 0]
    seen = np.abs(tape.gradient(middle, pixels)[0]).sum(-1) > 0
    for axis in (0, 1):
        places = np.flatnonzero(seen.any(axis))
        assert places[-1] - places[0] + 1 == side
        assert 0 < places[0] and places[-1] < size - 1  # or the border would have cut it


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_picture_without_a_patch_is_refused(layers):
    network = PatchDiscriminator(2, layers, "none")
    least = network.least_size
    assert network(np.zeros((1, least, least, 3), "float32")).shape == (1, 1, 1, 1)
    for height, width in ((least - 1, least), (least, least - 1)):
        message = f"needs pixels of {least}x{least} or more. Received: {height}x{width}"
        with pytest.raises(ValueError, match=message):
            network(np.zeros((1, height, width, 3), "float32"))


def test_the_default_is_the_papers():
    """Channels 64-128-256-512; the count of the published network's weights, worked out by hand."""
    network = PatchDiscriminator(norm="batch")
    assert network.receptive_field == 70
    kernels = [v for v in network.trainable_variables if v.path.endswith("kernel")]
    assert [kernel.shape[-1] for kernel in kernels] == [64, 128, 256, 512, 1]
    norms = 2 * (128 + 256 + 512)
    expected = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + norms + 64 + 1  # and two biases
    assert sum(int(np.prod(v.shape)) for v in network.trainable_variables) == expected == 2_765_633
    deep = PatchDiscriminator(1, 6, "none")
    assert [v.shape[-1] for v in deep.variables if v.path.endswith("kernel")] == [1, 2, 4, 8, 8, 8, 8, 1]


@each_norm
def test_only_a_convolution_before_a_norm_has_no_bias(norm):
    names = {v.path.split(".", 1)[1] for v in PatchDiscriminator(**TINY, norm=norm).trainable_variables}
    biases = {name for name in names if name.endswith("bias")}
    inner = {"convs.1/bias", "convs.2/bias"}
    assert biases == {"convs.0/bias", "convs.3/bias"} | (inner if norm == "none" else set())
    scales = {name for name in names if name.endswith("gamma")}
    assert scales == (set() if norm == "none" else {"norms.1/gamma", "norms.2/gamma"})


def test_mirrored_kernels_see_mirrored_pictures(pixels):
    """So the padding is the same on both sides."""
    network, mirrored = tiny(), tiny()
    for conv in mirrored.layers:
        if isinstance(conv, PatchConv):
            conv.kernel.assign(conv.kernel.numpy()[::-1, ::-1])
    logits = mirrored(pixels[:, ::-1, ::-1])
    np.testing.assert_allclose(logits[:, ::-1, ::-1], network(pixels), **CLOSE)


def test_weights_begin_as_the_papers():
    keras.utils.set_random_seed(0)
    for norm in ("group", "batch"):
        for weight in PatchDiscriminator(norm=norm, channels=32).trainable_variables:
            kind, values = weight.path.rsplit("/")[-1], weight.numpy()
            if kind in ("bias", "beta"):
                np.testing.assert_array_equal(values, 0)
            else:
                error = 4 * 0.02 / np.sqrt(values.size)  # four standard errors
                assert values.mean() == pytest.approx(1 if kind == "gamma" else 0, abs=error)
                assert values.std() == pytest.approx(0.02, abs=error)


# Names, configuration, refusals


@pytest.mark.parametrize("spectral_norm", [False, True])
@each_norm
def test_the_config_rebuilds_the_network(norm, spectral_norm, pixels):
    network = tiny(norm=norm, spectral_norm=spectral_norm, name="critic")
    paths = [variable.path for variable in network.variables]
    assert len(set(paths)) == len(paths) and all(path.startswith("critic.") for path in paths)
    again = PatchDiscriminator.from_config(json.loads(json.dumps(network.get_config())))
    assert [variable.path for variable in again.variables] == paths
    again.set_weights(network.get_weights())
    np.testing.assert_array_equal(again(pixels), network(pixels))


def test_a_convolutions_config_rebuilds_it(pixels):
    conv = PatchConv(3, strides=2, use_bias=False, spectral_norm=True, name="conv")
    expected = conv(pixels)
    again = PatchConv.from_config(conv.get_config())
    assert again.compute_output_shape(pixels.shape) == expected.shape == again(pixels).shape
    again.set_weights(conv.get_weights())
    np.testing.assert_array_equal(again(pixels), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "layer"}, "group, batch, none. Received: 'layer'"),
        ({"layers": 0}, "1 layer or more. Received: layers=0"),
        ({"channels": 4, "groups": 32}, "divisible by 32. Received: 8"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchDiscriminator(**arguments)


# Norms


@pytest.mark.parametrize("training", [False, True])
@each_norm
def test_compiled_is_eager(norm, training, pixels):
    network, twin = (tiny(norm=norm, spectral_norm=True) for _ in range(2))
    compiled = tf.function(
        lambda x: twin(x, training=training), input_signature=[tf.TensorSpec((None,) * 3 + (3,))]
    )
    np.testing.assert_allclose(compiled(pixels), network(pixels, training=training), **CLOSE)
    for ours, theirs in zip(network.variables, twin.variables):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


@pytest.mark.parametrize(("norm", "training"), [("group", True), ("none", True), ("batch", False)])
def test_pictures_do_not_mix(norm, training, pixels):
    network = tiny(norm=norm)
    alone = [network(picture[None], training=training) for picture in pixels]
    np.testing.assert_allclose(network(pixels, training=training), np.concatenate(alone), **CLOSE)


def moving(network):
    return {v.path: v.numpy() for v in network.variables if "moving" in v.path}


def test_replicas_share_the_statistics_of_their_batch(two_replicas, pixels):
    one = tiny(norm="batch")
    with two_replicas.scope():
        two = tiny(norm="batch")
    shares = two_replicas.experimental_distribute_values_from_function(
        lambda replica: tf.constant(np.split(pixels, 2)[replica.replica_id_in_sync_group])
    )
    step = tf.function(lambda x: two_replicas.run(lambda x: two(x, training=True), (x,)))
    logits = tf.concat(two_replicas.experimental_local_results(step(shares)), 0)
    before = moving(one)
    np.testing.assert_allclose(logits, one(pixels, training=True), **CLOSE)
    for path, value in moving(two).items():
        np.testing.assert_allclose(value, moving(one)[path], **CLOSE)
        assert np.abs(value - before[path]).max() > 1e-3


@pytest.fixture(params=["mixed_float16", "mixed_bfloat16"])
def policy(request):
    keras.mixed_precision.set_global_policy(request.param)
    yield request.param
    keras.mixed_precision.set_global_policy("float32")


@each_norm
def test_weights_and_logits_are_float32_under_mixed_precision(norm, policy, pixels):
    network = tiny(norm=norm, spectral_norm=True)
    keras.mixed_precision.set_global_policy("float32")
    expected = tiny(norm=norm, spectral_norm=True)
    assert {variable.dtype for variable in network.variables} == {"float32"}
    assert convolutions(network)[1].compute_dtype == policy.removeprefix("mixed_")
    logits = network(pixels)
    assert logits.dtype == "float32"
    np.testing.assert_allclose(logits, expected(pixels), atol=0.02 if policy == "mixed_float16" else 0.1)


def test_spectral_norms_hold_beyond_half_precision(policy, pixels):
    network = tiny(norm="none", spectral_norm=True)
    expected = network(pixels)
    for conv in convolutions(network):
        conv.kernel.assign(2.0**20 * conv.kernel)  # which changes no digit
    np.testing.assert_array_equal(network(pixels), expected)


# Spectral norms


def convolutions(network):
    return [layer for layer in network.layers if isinstance(layer, PatchConv)]


def effective_kernel(conv):
    """The kernel that pixels meet, read off the answers to single bright pixels; only for stride 1 and no bias."""
    # A bright pixel at the middle of 7x7 meets each place of the kernel, from its end, at one place of the outcome.
    channels = conv.kernel.shape[2]
    bright = np.zeros((channels, 7, 7, channels), "float32")
    bright[np.arange(channels), 3, 3, np.arange(channels)] = 1.0
    answers = conv(bright).numpy()[:, 1:5, 1:5][:, ::-1, ::-1]  # (C, 4, 4, channels)
    return np.moveaxis(answers, 0, 2)


def test_the_kernel_that_pixels_meet_has_spectral_norm_1():
    conv = PatchConv(5, use_bias=False, spectral_norm=True, name="conv")
    conv.build((None, None, None, 3))
    conv.kernel.assign(0.3 * normal(4, 4, 3, 5))
    conv.power_iteration(200)
    kernel = effective_kernel(conv)
    np.testing.assert_allclose(kernel, conv.kernel / singular_values(conv.kernel.numpy())[0], **CLOSE)
    assert singular_values(kernel)[0] == pytest.approx(1, abs=1e-4)
    plain = PatchConv(5, use_bias=False)
    plain.build((None, None, None, 3))
    np.testing.assert_allclose(effective_kernel(plain), plain.kernel, **CLOSE)


def test_one_power_iteration_is_that_of_the_paper():
    """Algorithm 1 of Miyato et al. 2018, written down: v = W^T u, u = W v, each brought to length 1."""
    conv = PatchConv(5, spectral_norm=True, name="conv")
    conv.build((None, None, None, 3))
    conv.kernel.assign(normal(4, 4, 3, 5))
    matrix, u = conv.kernel.numpy().reshape(-1, 5).T, conv.u.numpy()
    v = matrix.T @ u / np.linalg.norm(matrix.T @ u)
    u = matrix @ v / np.linalg.norm(matrix @ v)
    conv.power_iteration()
    np.testing.assert_allclose(conv.u, u, **CLOSE)


def test_a_new_networks_spectral_norms_are_nearly_1():
    for conv in convolutions(PatchDiscriminator(8, 3, groups=8, spectral_norm=True)):
        matrix, u = conv.kernel.numpy().reshape(-1, conv.channels), conv.u.numpy()
        assert np.linalg.norm(matrix @ u) == pytest.approx(singular_values(matrix)[0], rel=0.03)


def test_the_first_direction_does_not_depend_on_what_was_drawn_before(monkeypatch):
    monkeypatch.setattr(discriminator, "FIRST_ITERATIONS", 0)
    convs = [PatchConv(6, spectral_norm=True, name=name) for name in ("conv", "conv", "other")]
    for conv in convs:
        conv.build((None, None, None, 3))
        assert np.linalg.norm(conv.u) == pytest.approx(1)
    np.testing.assert_array_equal(convs[0].u, convs[1].u)
    assert np.abs(convs[0].u - convs[2].u).max() > 0.1
    assert np.abs(convs[0].kernel - convs[1].kernel).max() > 0.01


def test_the_scale_of_a_kernel_does_not_matter(pixels):
    network = tiny(spectral_norm=True)
    expected = network(pixels)
    for conv in convolutions(network):
        conv.kernel.assign(3.0 * conv.kernel)
    np.testing.assert_allclose(network(pixels), expected, **CLOSE)


@each_norm
def test_gradients_leave_the_scale_of_kernels_alone(norm, pixels):
    """As the scale does not matter, <gradient, W> = 0; so it is only if the gradient goes through sigma."""
    network = tiny(norm=norm, spectral_norm=True)
    kernels = [conv.kernel for conv in convolutions(network)]
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(network(pixels, training=True) - 1.0))
    for gradient, kernel in zip(tape.gradient(loss, [kernel.value for kernel in kernels]), kernels):
        along = float(np.sum(gradient * kernel))
        assert abs(along) < 1e-3 * np.linalg.norm(gradient) * np.linalg.norm(kernel)
        assert np.linalg.norm(gradient) > 1e-4


@pytest.mark.parametrize("training", [False, True])
def test_a_call_changes_no_weight(training, pixels):
    network = tiny(spectral_norm=True)
    before = network.get_weights()
    network(pixels, training=training)
    tf.function(lambda x: network(x, training=training))(pixels)
    for old, new in zip(before, network.get_weights()):
        np.testing.assert_array_equal(old, new)


def test_an_update_moves_the_directions_only():
    network = PatchDiscriminator(**TINY, spectral_norm=True)
    for index, conv in enumerate(convolutions(network)):
        conv.kernel.assign(normal(*conv.kernel.shape, seed=index))
    before = {variable.path: variable.numpy() for variable in network.variables}
    network.update_spectral_norms()
    moved = {v.path for v in network.variables if np.abs(v.numpy() - before[v.path]).max() > 1e-4}
    # the last convolution has one channel, so one direction
    assert moved == {f"discriminator.convs.{index}/u" for index in range(3)}


def test_without_spectral_norm_there_is_nothing_to_update(pixels):
    network = tiny(norm="none")
    assert not network.non_trainable_variables
    before = network(pixels)
    network.update_spectral_norms()
    np.testing.assert_array_equal(network(pixels), before)


def test_two_replicas_hold_the_directions_of_one(two_replicas, pixels):
    one = tiny(norm="none", spectral_norm=True)
    with two_replicas.scope():
        two = tiny(norm="none", spectral_norm=True)
    start = one.non_trainable_variables[0].numpy()

    def step(x):
        logits = two(x, training=True)
        two.update_spectral_norms()
        return logits

    compiled = tf.function(lambda x: two_replicas.run(step, (x,)))
    for _ in range(2):
        expected = one(pixels, training=True)
        one.update_spectral_norms()
        for logits in two_replicas.experimental_local_results(compiled(tf.constant(pixels))):
            np.testing.assert_allclose(logits, expected, **CLOSE)
    assert np.abs(one.non_trainable_variables[0] - start).max() > 1e-4
    for ours, theirs in zip(one.non_trainable_variables, two.non_trainable_variables):
        for held in two_replicas.experimental_local_results(theirs.value):
            np.testing.assert_allclose(held, ours, **CLOSE)
