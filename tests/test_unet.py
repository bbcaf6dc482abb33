"""The U-Net: its parts against numpy, what the mask hides, its names, and one class for every size."""

import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from config import CUP3, part
from model.text_encoder import VocabularyEncoder
from model.unet import FeedForward, LogVariance, PooledContext, TimeEmbedding, TransformerBlock, UNet

SIZES = {
    "latent_channels": 3,
    "level_channels": (8, 16),
    "attention_levels": (False, True),
    "blocks": 1,
    "head_channels": 4,
    "context_shape": (5, 6),
    "groups": 4,
    "ff_expansion": 2,
}
STABLE_DIFFUSION = {"level_channels": (320, 640, 1280, 1280), "attention_levels": (True, True, True, False)}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def randomise(network):
    """Draws every weight anew: a new network's zeros would hide faults."""
    for index, variable in enumerate(network.variables):
        fan_in = math.prod(variable.shape[:-1]) if len(variable.shape) > 1 else 4
        variable.assign(normal(*variable.shape, seed=index) / math.sqrt(fan_in))


@pytest.fixture
def shapes_only():
    """Networks are built without memory for their weights; the session forgets them afterwards."""
    with keras.StatelessScope(initialize_variables=False):
        yield
    keras.backend.clear_session()


@pytest.fixture(scope="module")
def unet():
    network = UNet(**SIZES)
    randomise(network)
    return network


@pytest.fixture(scope="module")
def inputs():
    """Latents, times, context and mask of three samples."""
    mask = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    return [normal(3, 4, 6, 3), np.array([0.1, 0.5, 0.9], "float32"), normal(3, 5, 6, seed=1), mask]


# Parts


def test_time_embedding_is_its_formula():
    times = np.array([0.0, 0.002, 0.5, 1.0], "float32")
    layer = TimeEmbedding(8, 6)
    layer(times)
    randomise(layer)
    angles = 1000 * times[:, None] / 10000 ** (np.arange(4) / 4)
    waves = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    first, last = layer.linear_1, layer.linear_2
    h = waves @ first.kernel.numpy() + first.bias.numpy()
    expected = h / (1 + np.exp(-h)) @ last.kernel.numpy() + last.bias.numpy()
    np.testing.assert_allclose(layer(times), expected, rtol=1e-4, atol=1e-4)


def test_feed_forward_is_its_formula():
    x = normal(2, 3, 4)
    layer = FeedForward(4, expansion=3)
    layer(x)
    randomise(layer)
    value, gate = np.split(x @ layer.proj.kernel.numpy() + layer.proj.bias.numpy(), 2, -1)
    gelu = gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
    expected = (value * gelu) @ layer.out.kernel.numpy() + layer.out.bias.numpy()
    assert value.shape == (2, 3, 12)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_a_new_transformer_block_changes_nothing():
    x = normal(2, 3, 4, 8)
    np.testing.assert_array_equal(TransformerBlock(8, 2, groups=4)(x, normal(2, 5, 6)), x)


def test_a_transformer_block_moves_with_its_places():
    x, context = normal(1, 3, 4, 8), normal(1, 5, 6)
    layer = TransformerBlock(8, 2, groups=4)
    layer(x, context)
    randomise(layer)
    order = np.random.default_rng(0).permutation(12)
    moved = layer(x.reshape(1, 12, 8)[:, order].reshape(x.shape), context)
    expected = np.array(layer(x, context)).reshape(1, 12, 8)[:, order].reshape(x.shape)
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (lambda: TimeEmbedding(8, 6), (normal(2),)),
        (lambda: FeedForward(4, 3), (normal(2, 3, 4),)),
        (lambda: TransformerBlock(8, 2, 4, 2), (normal(2, 3, 4, 8), normal(2, 5, 6))),
    ],
    ids=["time", "feed forward", "transformer"],
)
def test_the_config_rebuilds_the_part(make, given):
    layer = make()
    expected = layer(*given)
    assert layer.compute_output_shape(*(x.shape for x in given)) == expected.shape
    again = type(layer).from_config(layer.get_config())
    again(*given)
    assert [v.path for v in again.variables] == [v.path for v in layer.variables]
    again.set_weights(layer.get_weights())
    np.testing.assert_array_equal(again(*given), expected)


# The whole


@pytest.mark.parametrize("size", [(2, 4), (4, 6), (8, 4)])
def test_shape_is_that_of_the_latents(unet, inputs, size):
    latents = normal(3, *size, 3)
    assert unet([latents, *inputs[1:]]).shape == latents.shape


def test_a_new_unet_predicts_zero(inputs):
    assert not np.any(UNet(**SIZES)(inputs))


def test_samples_do_not_mix(unet, inputs):
    alone = [unet([value[i : i + 1] for value in inputs]) for i in range(3)]
    np.testing.assert_allclose(unet(inputs), np.concatenate(alone), rtol=1e-4, atol=1e-5)


def test_compiled_is_eager(unet, inputs):
    np.testing.assert_allclose(tf.function(unet)(inputs), unet(inputs), rtol=1e-4, atol=1e-5)


def test_masked_context_has_no_influence(unet, inputs):
    latents, times, context, mask = inputs
    other = np.where(mask[..., None], context, 100 * normal(3, 5, 6, seed=2))
    np.testing.assert_array_equal(unet(inputs), unet([latents, times, other, mask]))


@pytest.mark.filterwarnings("error")  # Keras would warn of a mask given by its name
@pytest.mark.parametrize("pooled_context", [False, True])
@pytest.mark.parametrize("run", [lambda function: function, tf.function], ids=["eager", "compiled"])
def test_a_text_that_is_projected_once_serves_every_time(inputs, pooled_context, run):
    network = UNet(**SIZES, pooled_context=pooled_context)
    randomise(network)
    latents, times, context, mask = inputs
    paths = [variable.path for variable in network.variables]
    text = run(network.project_text)(context, mask)
    assert ("pooled_context" in text) == pooled_context
    assert {part.shape[0] for part in tf.nest.flatten(text)} == {3}
    for shift in (0.0, 0.05):
        received = run(network.predict_from)(latents + shift, times + shift, text)
        expected = network([latents + shift, times + shift, context, mask])
        assert received.dtype == "float32"
        np.testing.assert_allclose(received, expected, rtol=1e-5, atol=2e-6)
    assert [variable.path for variable in network.variables] == paths


def test_samples_of_a_projected_text_do_not_mix(unet, inputs):
    latents, times, context, mask = inputs
    last = tf.nest.map_structure(lambda rows: rows[2:], unet.project_text(context, mask))
    received = unet.predict_from(latents[2:], times[2:], last)
    np.testing.assert_allclose(received, unet(inputs)[2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_every_input_has_influence(unet, inputs, changed):
    """Also the context's word of the second sample, the one place that its mask shows."""
    other = [*inputs]
    other[changed] = inputs[changed] * 0.5
    change = np.abs(unet(other) - unet(inputs)).reshape(3, -1).max(-1)
    assert (change > 1e-3).all()


def test_the_context_is_a_set(unet, inputs):
    """Its order is the text encoder's business: moving context and mask together changes nothing."""
    latents, times, context, mask = inputs
    order = [3, 0, 4, 2, 1]
    moved = unet([latents, times, context[:, order], mask[:, order]])
    np.testing.assert_allclose(moved, unet(inputs), rtol=1e-4, atol=1e-5)


def test_the_ids_of_padding_never_reach_the_picture(unet, inputs):
    latents, times, _, mask = inputs
    text_encoder = VocabularyEncoder(9, length=5, width=6, layers=1, heads=2)
    tokens = np.arange(15, dtype="int32").reshape(3, 5) % 9

    def draw(tokens):
        return unet([latents, times, text_encoder([tokens, mask]).numpy(), mask])

    np.testing.assert_array_equal(draw(tokens), draw(np.where(mask, tokens, 8)))
    assert np.abs(draw(tokens) - draw(np.where(mask, 8, tokens))).max() > 1e-3


def test_attention_is_where_the_table_says(unet):
    attending = {v.path.split(".attentions")[0] for v in unet.variables if ".attentions." in v.path}
    assert attending == {"down_blocks.1", "mid_block", "up_blocks.0"}


def test_names_are_unique_and_the_same_again(unet):
    paths = [variable.path for variable in unet.variables]
    assert len(set(paths)) == len(paths)
    keras.layers.Conv2D(2, 3).build((None, 4, 4, 3))
    assert [variable.path for variable in UNet(**SIZES).variables] == paths
    assert {
        "time_embedding/linear_1/kernel",
        "down_blocks.1.attentions.0/attn2/to_k/kernel",
        "mid_block.resnets.1/time_emb_proj/bias",
        "up_blocks.1.resnets.1/conv_shortcut/kernel",
    } <= set(paths)


def test_the_config_rebuilds_the_network(unet, inputs):
    again = UNet.from_config(json.loads(json.dumps(unet.get_config())))
    assert [v.path for v in again.variables] == [v.path for v in unet.variables]
    again.set_weights(unet.get_weights())
    np.testing.assert_array_equal(again(inputs), unet(inputs))


def test_every_weight_has_a_gradient(unet, inputs):
    goal = normal(*inputs[0].shape, seed=3)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(unet(inputs, training=True) * goal)
    gradients = tape.gradient(loss, [variable.value for variable in unet.trainable_variables])
    for variable, gradient in zip(unet.trainable_variables, gradients):
        assert gradient is not None, variable.path
        assert np.any(gradient), variable.path


def test_in_16_bits_the_prediction_is_float32(unet, inputs):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        short = UNet(**SIZES)
    finally:
        keras.config.set_dtype_policy(policy)
    short.set_weights(unet.get_weights())
    exact, rounded = unet(inputs).numpy(), short(inputs)
    assert short.get_layer("conv_in").compute_dtype == "bfloat16"
    assert rounded.dtype == "float32"
    assert np.linalg.norm(rounded - exact) < 0.05 * np.linalg.norm(exact)
    latents, times, context, mask = inputs
    again = short.predict_from(latents, times, short.project_text(context, mask))
    assert again.dtype == "float32"
    np.testing.assert_array_equal(again, rounded)


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        ({**part(CUP3.unet), "context_shape": (77, 768)}, 142_236_036),
        # The counts of the published weights, versions 1 and 2
        ({**STABLE_DIFFUSION, "blocks": 2, "head_channels": 40, "context_shape": (77, 768)}, 859_520_964),
        ({**STABLE_DIFFUSION, "blocks": 2, "head_channels": 64, "context_shape": (77, 1024)}, 865_910_724),
    ],
    ids=["cup3", "stable diffusion 1", "stable diffusion 2"],
)
def test_one_class_from_tiny_to_stable_diffusion(shapes_only, settings, parameters):
    network = UNet(**settings)
    assert network.count_params() == parameters
    assert network.output_shape == (None, None, None, 4)


def test_refuses_an_unequal_table():
    with pytest.raises(ValueError, match=r"one attention flag a level.*\(True,\)"):
        UNet(level_channels=(8, 16), attention_levels=(True,))


# The pooled context.


def test_pooled_context_is_the_mean_of_the_words_through_two_dense_layers():
    layer = PooledContext(6)
    context = normal(2, 5, 4)
    mask = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], bool)
    pooled = np.asarray(layer(context, mask))
    means = np.stack([context[0, :2].mean(0), context[1, :4].mean(0)])
    first, second = ([np.asarray(w) for w in dense.weights] for dense in (layer.linear_1, layer.linear_2))
    hidden = means @ first[0] + first[1]
    hidden = hidden / (1 + np.exp(-hidden))
    np.testing.assert_allclose(pooled, hidden @ second[0] + second[1], atol=1e-5)


def test_pooled_context_ignores_what_is_masked():
    layer = PooledContext(6)
    context = normal(1, 5, 4)
    mask = np.array([[1, 1, 1, 0, 0]], bool)
    changed = np.where(mask[..., None], context, 99.0).astype("float32")
    np.testing.assert_array_equal(np.asarray(layer(context, mask)), np.asarray(layer(changed, mask)))


def test_log_variance_is_zero_at_first_and_then_a_sum_of_waves():
    network, times = LogVariance(features=6), normal(4) ** 2
    np.testing.assert_array_equal(network(times), np.zeros(4))
    randomise(network)
    angles = 1000 * times[:, None] * 10000.0 ** (-np.arange(3) / 3)
    waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    kernel, bias = network.get_weights()
    np.testing.assert_allclose(network(times), (waves @ kernel + bias)[:, 0], atol=2e-3)
    assert LogVariance.from_config(network.get_config()).features == 6
