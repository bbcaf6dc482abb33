"""The shared blocks against numpy in float64, and their identities."""

import math
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from model.common import (
    Attention,
    Downsample,
    GroupNorm,
    LayerNorm,
    ResidualBlock,
    Upsample,
    conv3,
    flatten_places,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def normal(*shape, seed=0, mean=0.0):
    return np.random.default_rng(seed).normal(mean, 1.0, shape).astype("float32")


def built(layer, *inputs, **keywords):
    """The layer, built on the inputs, with every weight drawn anew (zeros would hide faults)."""
    layer(*inputs, **keywords)
    for index, variable in enumerate(layer.variables):
        variable.assign(0.4 * normal(*variable.shape, seed=100 + index))
    return layer


def weights(layer):
    return {
        variable.path.split("/", 1)[1]: variable.numpy().astype("float64") for variable in layer.variables
    }


def group_norm(x, groups, gamma, beta, epsilon=1e-5):
    batch, height, width, channels = x.shape
    values = x.astype("float64").reshape(batch, height * width, groups, channels // groups)
    mean, variance = values.mean((1, 3), keepdims=True), values.var((1, 3), keepdims=True)
    return ((values - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * gamma + beta


def convolve(x, kernel, bias, padding, stride=1):
    """Cross-correlation of x (B, H, W, C), zero padded by ((above, below), (left, right))."""
    x = np.pad(x.astype("float64"), ((0, 0), *padding, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
    return np.einsum("bhwcij,ijco->bhwo", windows[:, ::stride, ::stride], kernel) + bias


def silu(x):
    return x / (1 + np.exp(-x))


SAME = ((1, 1), (1, 1))


# GroupNorm


@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_is_numpys(groups, mean):
    x = normal(2, 4, 3, 6, mean=mean)
    layer = built(GroupNorm(groups), x)
    expected = group_norm(x, groups, layer.gamma.numpy(), layer.beta.numpy())
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_group_norm_keeps_its_precision_beside_a_large_mean():
    """E[x^2] - E[x]^2 in float32 would lose every digit of the variance here."""
    x = normal(1, 8, 8, 4, mean=20_000.0)
    np.testing.assert_allclose(GroupNorm(2)(x), group_norm(x, 2, 1.0, 0.0), atol=5e-3)


def test_group_norm_is_keras():
    x = normal(2, 5, 4, 8)
    ours, theirs = built(GroupNorm(4, epsilon=1e-3), x), keras.layers.GroupNormalization(4, epsilon=1e-3)
    theirs.build(x.shape)
    theirs.set_weights(ours.get_weights())
    np.testing.assert_allclose(ours(x), theirs(x), **CLOSE)


def test_group_norm_takes_statistics_in_float32():
    x = (1000 * normal(1, 8, 8, 4)).astype("float16")  # its squares are out of float16's range
    y = GroupNorm(2, dtype="float16")(x)
    assert y.dtype == "float16"
    np.testing.assert_allclose(y, group_norm(x, 2, 1.0, 0.0), atol=5e-3)


def test_group_norm_with_a_silu_is_numpys():
    x = normal(2, 4, 3, 6)
    layer = built(GroupNorm(3, silu=True), x)
    np.testing.assert_allclose(
        layer(x), silu(group_norm(x, 3, layer.gamma.numpy(), layer.beta.numpy())), **CLOSE
    )


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_weights_are_not_rounded_before_they_are_used(policy):
    """In 16 bits only what a layer returns is rounded: norms and kernels are computed in 32."""
    x, unit = normal(1, 4, 4, 8), {"mixed_float16": 2**-11, "mixed_bfloat16": 2**-8}[policy]
    whole = GroupNorm(2, silu=True), LayerNorm(), Upsample(8)
    for exact in whole:
        built(exact, x)
        rounded = type(exact).from_config({**exact.get_config(), "dtype": policy})
        rounded.build(x.shape)
        for variable, own in zip(rounded.variables, exact.variables, strict=True):
            variable.assign(own)
        assert rounded.compute_dtype == policy.removeprefix("mixed_")
        difference = np.abs(np.asarray(tf.cast(rounded(x), "float32")) - np.asarray(exact(x)))
        rows = 1 if exact is not whole[-1] else 16  # sums of products are rounded where they are computed
        assert difference.max() <= rows * 1.5 * unit * np.abs(exact(x)).max()


def test_group_norm_refuses_channels_its_groups_do_not_divide():
    with pytest.raises(ValueError, match="divisible by 4. Received: 6"):
        GroupNorm(4)(normal(1, 2, 2, 6))


# The gradients of both norms are written out.

NORMS = {
    "group": (lambda: GroupNorm(4, 1e-3), lambda: keras.layers.GroupNormalization(4, epsilon=1e-3)),
    "group, silu": (
        lambda: GroupNorm(4, 1e-3, silu=True),
        lambda: keras.Sequential(
            [keras.layers.GroupNormalization(4, epsilon=1e-3), keras.layers.Activation("silu")]
        ),
    ),
    "layer": (lambda: LayerNorm(1e-3), lambda: keras.layers.LayerNormalization(epsilon=1e-3)),
}
each_norm = pytest.mark.parametrize("norm", NORMS)


def norms(norm, x):
    """Ours and Keras', of the same weights."""
    ours, theirs = (make() for make in NORMS[norm])
    built(ours, x)
    theirs.build(x.shape)
    theirs.set_weights(ours.get_weights())
    return ours, theirs


def gradients(layer, x, weights):
    """Of a weighted sum of the output by x, gamma and beta; and of the first of these, squared, by x and gamma."""
    gamma, beta = (variable.value for variable in layer.trainable_variables)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(weights * layer(x))
        first = tape.gradient(total, [x, gamma, beta])
        penalty = tf.reduce_sum(tf.square(first[0]))
    return [*first, *outer.gradient(penalty, [x, gamma])]


@each_norm
def test_the_gradient_of_a_norm_is_keras(norm):
    x, weights = (tf.constant(normal(2, 5, 4, 8, seed=seed, mean=2.0)) for seed in (0, 1))
    for ours, theirs in zip(*(gradients(layer, x, weights) for layer in norms(norm, x)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


@each_norm
def test_the_gradient_of_a_norm_serves_any_size(norm):
    x, weights = (tf.constant(normal(2, 5, 4, 8, seed=seed)) for seed in (0, 1))
    ours, _ = norms(norm, x)
    anywhere = tf.TensorSpec([None, None, None, 8])
    compiled = tf.function(lambda x, weights: gradients(ours, x, weights), input_signature=[anywhere] * 2)
    for known, unknown in zip(gradients(ours, x, weights), compiled(x, weights), strict=True):
        np.testing.assert_allclose(unknown, known, rtol=1e-4, atol=1e-5 * np.abs(known).max())


def test_layer_norm_takes_statistics_in_float32():
    x = (1000 * normal(3, 8)).astype("float16")
    y, exact = LayerNorm(dtype="float16")(x), x.astype("float64")
    assert y.dtype == "float16"
    expected = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    np.testing.assert_allclose(y, expected, atol=5e-3)


# ResidualBlock


@pytest.mark.parametrize("channels", [4, 6])
@pytest.mark.parametrize("timed", [False, True])
def test_residual_block_is_numpys(channels, timed):
    x, embedding = normal(2, 5, 4, 4), normal(2, 3, seed=1)
    inputs = (x, embedding) if timed else (x,)
    layer = built(ResidualBlock(channels, groups=2), *inputs)
    w = weights(layer)
    h = silu(group_norm(x, 2, w["norm1/gamma"], w["norm1/beta"]))
    h = convolve(h, w["conv1/kernel"], w["conv1/bias"], SAME)
    if timed:
        projected = silu(embedding) @ w["time_emb_proj/kernel"] + w["time_emb_proj/bias"]
        h = h + projected[:, None, None]
    h = silu(group_norm(h, 2, w["norm2/gamma"], w["norm2/beta"]))
    h = convolve(h, w["conv2/kernel"], w["conv2/bias"], SAME)
    shortcut = x if channels == 4 else x @ w["conv_shortcut/kernel"][0, 0] + w["conv_shortcut/bias"]
    np.testing.assert_allclose(layer(*inputs), h + shortcut, rtol=1e-4, atol=1e-4)


def test_a_new_residual_block_changes_nothing():
    x = normal(1, 4, 4, 4)
    np.testing.assert_array_equal(ResidualBlock(4, groups=2)(x, normal(1, 8)), x)


# Attention


def attention(x, context, mask, w, heads):
    """Softmax attention by loops: x (B, N, W), context (B, T, D), mask (B, T)."""
    q, k, v = (
        side @ w[f"{name}/kernel"] + w.get(f"{name}/bias", 0)
        for side, name in ((x, "to_q"), (context, "to_k"), (context, "to_v"))
    )
    size = q.shape[-1] // heads
    mixed = np.zeros_like(q)
    for b in range(len(x)):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = np.exp(q[b, :, part] @ k[b, mask[b], part].T / math.sqrt(size))
            mixed[b, :, part] = scores / scores.sum(-1, keepdims=True) @ v[b, mask[b], part]
    return mixed @ w["to_out/kernel"] + w["to_out/bias"]


@pytest.mark.parametrize(("heads", "qkv_bias"), [(1, True), (2, False), (4, True)])
def test_attention_is_numpys(heads, qkv_bias):
    x, context = normal(2, 5, 8), normal(2, 4, 6, seed=1)
    mask = np.array([[True, False, True, True], [False, True, False, False]])
    layer = built(Attention(8, heads, qkv_bias), x, context, mask)
    expected = attention(x, context, mask, weights(layer), heads)
    np.testing.assert_allclose(layer(x, context, mask), expected, **CLOSE)


def test_attention_without_context_looks_at_itself():
    x = normal(2, 5, 8)
    layer = built(Attention(8, 2), x)
    expected = attention(x, x, np.ones((2, 5), bool), weights(layer), heads=2)
    np.testing.assert_allclose(layer(x), expected, **CLOSE)
    np.testing.assert_array_equal(layer(x), layer(x, x))


def test_masked_places_have_no_influence():
    x, context = normal(2, 5, 8), normal(2, 4, 6, seed=1)
    mask = np.array([[True, True, False, False], [True, False, True, False]])
    layer = built(Attention(8, 2), x, context, mask)
    other = np.where(mask[..., None], context, 1000 * normal(2, 4, 6, seed=2))
    np.testing.assert_array_equal(layer(x, context, mask), layer(x, other, mask))
    assert np.abs(layer(x, context) - layer(x, other)).max() > 0.1


def test_attention_to_a_single_key_is_its_value_without_a_warning():
    x, context = normal(2, 5, 8), normal(2, 1, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = built(Attention(8, 2), x, context, np.ones((2, 1), bool))
        found = layer(x, context, np.ones((2, 1), bool))
    expected = attention(x, context, np.ones((2, 1), bool), weights(layer), heads=2)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found, np.repeat(found[:, :1], 5, axis=1), atol=1e-6)
    with tf.GradientTape() as tape:
        error = tf.reduce_sum(layer(x, context) ** 2)
    for weight, gradient in zip(
        layer.trainable_weights, tape.gradient(error, layer.trainable_weights), strict=True
    ):
        of_weights = "to_q" in weight.path or "to_k" in weight.path  # whose one value cannot change
        assert (np.abs(gradient).max() == 0) == of_weights, weight.path


def test_keys_and_values_made_once_stand_for_their_context():
    x, other, context = normal(2, 3, 8), normal(2, 6, 8, seed=1), normal(2, 5, 6, seed=2)
    layer, mask = built(Attention(8, 2), x, context), np.array([[1, 1, 1, 0, 0], [1] * 5], bool)
    made = layer.keys_values(context)
    assert [part.shape for part in made] == [(2, 5, 2, 4)] * 2
    for queries in (x, other):
        received = layer(queries, None, mask, made)
        np.testing.assert_array_equal(received, layer(queries, context, mask))


def test_attention_with_nothing_to_look_at_is_finite():
    x, context = normal(1, 5, 8), normal(1, 4, 6)
    layer = built(Attention(8, 2), x, context)
    assert np.isfinite(layer(x, context, np.zeros((1, 4), bool))).all()


def test_attention_refuses_a_width_its_heads_do_not_divide():
    with pytest.raises(ValueError, match="Received: 10 and 4"):
        Attention(10, 4)


# Resampling


def test_upsample_is_numpys():
    x = normal(2, 3, 5, 4)
    layer = built(Upsample(6), x)
    w = weights(layer)
    repeated = x.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(
        layer(x), convolve(repeated, w["conv/kernel"], w["conv/bias"], SAME), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_downsample_is_numpys(symmetric, size):
    x = normal(2, *size, 4)
    layer = built(Downsample(6, symmetric), x)
    w = weights(layer)
    edge = (int(symmetric), 1)
    expected = convolve(x, w["conv/kernel"], w["conv/bias"], (edge, edge), stride=2)
    np.testing.assert_allclose(layer(x), expected, **CLOSE)


def test_conv3_is_numpys():
    x = normal(2, 4, 3, 2)
    layer = built(conv3(5, "conv"), x)
    expected = convolve(x, layer.kernel.numpy(), layer.bias.numpy(), SAME)
    np.testing.assert_allclose(layer(x), expected, **CLOSE)


def test_flatten_places_goes_row_by_row():
    x = normal(2, 3, 5, 4)
    np.testing.assert_array_equal(flatten_places(x), x.reshape(2, 15, 4))


# What all of them promise

X, SEQUENCE = normal(3, 5, 7, 4), normal(3, 5, 4)
LAYERS = [
    (lambda: GroupNorm(2), (X,), (3, 5, 7, 4)),
    (lambda: LayerNorm(), (SEQUENCE,), (3, 5, 4)),
    (lambda: ResidualBlock(6, groups=2), (X, normal(3, 8)), (3, 5, 7, 6)),
    (lambda: Attention(4, 2), (SEQUENCE, normal(3, 2, 6)), (3, 5, 4)),
    (lambda: Upsample(6), (X,), (3, 10, 14, 6)),
    (lambda: Downsample(6), (X,), (3, 2, 3, 6)),
    (lambda: Downsample(6, symmetric=True), (X,), (3, 3, 4, 6)),
]
each_layer = pytest.mark.parametrize(
    ("make", "inputs", "shape"),
    LAYERS,
    ids=["norm", "layer norm", "residual", "attention", "upsample", "downsample", "symmetric"],
)


@each_layer
def test_shapes_are_as_said(make, inputs, shape):
    layer = make()
    assert layer(*inputs).shape == shape
    assert layer.compute_output_shape(*(value.shape for value in inputs)) == shape


@each_layer
def test_samples_do_not_mix(make, inputs, shape):
    layer = built(make(), *inputs)
    alone = [layer(*(value[i : i + 1] for value in inputs)) for i in range(3)]
    np.testing.assert_allclose(layer(*inputs), np.concatenate(alone), **CLOSE)


@each_layer
def test_the_config_rebuilds_the_layer(make, inputs, shape):
    layer = built(make(), *inputs)
    other = type(layer).from_config(layer.get_config())
    other(*inputs)
    assert [v.path for v in other.variables] == [v.path for v in layer.variables]
    other.set_weights(layer.get_weights())
    np.testing.assert_array_equal(layer(*inputs), other(*inputs))
