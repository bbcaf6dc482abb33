"""The autoencoder: its shapes, its scale, its posterior, and one class from the tiny one to Stable Diffusion's."""

import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from config import CUP3, Config, part
from model.vae import AutoencoderKL, Decoder, Encoder, SpatialAttention, kl_divergence, sample_posterior

LEVELS = {"level_channels": (4, 8), "blocks": (1, 1), "latent_channels": 3, "groups": 2, "attention": True}
ENDS = {"skips": True, "tanh": True}
STABLE_DIFFUSION = {"level_channels": (128, 256, 512, 512), "blocks": (2, 2, 2, 2), "latent_scale": 0.18215}
SCALE_WEIGHTS = 2 * 4  # latent_mean and latent_std, of four channels


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def randomise(network):
    """Draws every weight anew: a new network's zeros would hide faults."""
    for index, variable in enumerate(network.trainable_variables):
        variable.assign(0.3 * normal(*variable.shape, seed=index))


@pytest.fixture
def shapes_only():
    """Networks are built without memory for their weights; the session forgets them afterwards."""
    with keras.StatelessScope(initialize_variables=False):
        yield
    keras.backend.clear_session()


@pytest.fixture
def vae():
    network = AutoencoderKL(**LEVELS)
    randomise(network)
    return network


@pytest.fixture
def skipping():
    network = AutoencoderKL(**LEVELS, skips=True)
    randomise(network)
    return network


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).uniform(-1, 1, (4, 8, 12, 3)).astype("float32")


# Shapes and structure


@pytest.mark.parametrize(
    ("levels", "blocks"), [((4,), (1,)), ((4, 8), (2, 1)), ((4, 8, 8), (0, 1, 1)), ((4, 8, 6), (1, 0, 0))]
)
def test_shapes_are_as_said(levels, blocks):
    factor = 2 ** (len(levels) - 1)
    encoder, decoder = (part(levels, blocks, 3, groups=2) for part in (Encoder, Decoder))
    moments = encoder(np.zeros((2, 8, 16, 3), "float32"))
    assert moments.shape == (2, 8 // factor, 16 // factor, 6)
    assert decoder(moments[..., :3]).shape == (2, 8, 16, 3)


def test_shapes_of_the_autoencoder(vae, pixels):
    assert vae(pixels).shape == pixels.shape
    for mean, logvar in (vae.raw_moments(pixels), vae.encode(pixels)):
        assert mean.shape == logvar.shape == (4, 4, 6, 3)
    assert vae.decode(mean).shape == pixels.shape
    assert vae.factor == 2
    assert vae.latent_shape(8) == tuple(vae.encode(pixels[:, :8, :8])[0].shape[1:])


def test_pictures_do_not_mix(vae, pixels):
    whole = vae.encode(pixels)[0]
    alone = [vae.encode(picture[None])[0] for picture in pixels]
    np.testing.assert_allclose(whole, np.concatenate(alone), rtol=1e-4, atol=1e-5)
    decoded = [vae.decode(latent[None]) for latent in whole]
    np.testing.assert_allclose(vae.decode(whole), np.concatenate(decoded), rtol=1e-4, atol=1e-5)


def test_compiled_is_eager(vae, pixels):
    compiled = tf.function(lambda x: vae.decode(vae.encode(x)[0]))
    np.testing.assert_allclose(compiled(pixels), vae.decode(vae.encode(pixels)[0]), rtol=1e-4, atol=1e-5)


def test_names_are_unique_and_the_same_again(vae):
    paths = [variable.path for variable in vae.variables]
    assert len(set(paths)) == len(paths)
    keras.Sequential([keras.layers.Conv2D(2, 3), keras.layers.Dense(2)]).build((None, 8, 8, 3))
    assert [variable.path for variable in AutoencoderKL(**LEVELS).variables] == paths
    assert {
        "vae/latent_std",
        "quant_conv/kernel",
        "encoder.down_blocks.1.resnets.0/conv_shortcut/kernel",
        "decoder.mid_block.attentions.0/attn/to_q/kernel",
    } <= set(paths)


def rebuilt(network):
    """Another of the same config, which went through JSON, and of the same weights."""
    again = type(network).from_config(json.loads(json.dumps(network.get_config())))
    assert [v.path for v in again.variables] == [v.path for v in network.variables]
    again.set_weights(network.get_weights())
    return again


@pytest.mark.parametrize("ends", [{}, {"skips": True}, {"tanh": True}])
def test_the_config_rebuilds_the_autoencoder(ends, pixels):
    network = AutoencoderKL(**LEVELS, latent_scale=0.5, **ends)
    randomise(network)
    again = rebuilt(network)
    np.testing.assert_array_equal(again(pixels), network(pixels))
    np.testing.assert_array_equal(again.encode(pixels)[0], network.encode(pixels)[0])


@pytest.mark.parametrize("skips", [False, True])
def test_the_configs_rebuild_the_halves(skips):
    encoder, decoder = Encoder(**LEVELS, skips=skips), Decoder(**LEVELS, skips=skips, tanh=True)
    for network in (encoder, decoder):
        randomise(network)
        inputs = [
            normal(1, 8 // 2**halvings, 8 // 2**halvings, channels)
            for halvings, channels in ([(0, 3)] if network is encoder else [(1, 3), (0, 4), (1, 8)])
        ]
        inputs = inputs if skips and network is decoder else inputs[0]
        for ours, theirs in zip(
            keras.tree.flatten(rebuilt(network)(inputs)), keras.tree.flatten(network(inputs))
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_blocks_are_where_the_table_says():
    """One more on the way back, but none where a level only resamples."""
    network = AutoencoderKL((4, 6, 8), (0, 1, 2), groups=2)
    blocks = {tuple(v.path.split("/")[0].split(".")) for v in network.variables if ".resnets." in v.path}
    found = {
        half: sorted((int(level), int(index)) for _, _, level, _, index in (b for b in blocks if half in b))
        for half in ("down_blocks", "up_blocks")
    }
    assert found["down_blocks"] == [(1, 0), (2, 0), (2, 1)]
    assert found["up_blocks"] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_an_unequal_table_is_refused():
    with pytest.raises(ValueError, match=r"blocks for each level.*\(1, 1, 1\)"):
        AutoencoderKL((4, 8), (1, 1, 1))


def test_attention_is_a_switch():
    without = AutoencoderKL(**{**LEVELS, "attention": False})
    attending = [v.path for v in AutoencoderKL(**LEVELS).variables if "attentions" in v.path]
    assert len(attending) == 2 * 10  # in both halves: a norm, and four dense layers with bias
    assert not [v.path for v in without.variables if "attentions" in v.path]


def test_spatial_attention_reaches_every_place():
    """Moving the places moves the outcome with them, and a far place changes a near one."""
    layer = SpatialAttention(4, groups=2)
    x = normal(1, 3, 4, 4)
    layer(x)
    randomise(layer)
    order = np.random.default_rng(0).permutation(12)
    moved = layer(x.reshape(1, 12, 4)[:, order].reshape(x.shape))
    expected = np.array(layer(x)).reshape(1, 12, 4)[:, order].reshape(x.shape)
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-5)
    with tf.GradientTape() as tape:
        place = tf.Variable(x)
        corner = tf.reduce_sum(layer(place)[:, 0, 0])
    assert (np.abs(tape.gradient(corner, place)).sum((0, 3)) > 0).all()


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        (STABLE_DIFFUSION, 83_653_863 + SCALE_WEIGHTS),  # the count of the published weights
        (part(CUP3.vae), None),
        (part(Config().vae), None),
    ],
    ids=["stable diffusion", "cup3", "paper flowers"],
)
def test_one_class_from_tiny_to_stable_diffusion(shapes_only, settings, parameters):
    network = AutoencoderKL(**settings)
    pixels = keras.KerasTensor((2, 64, 64, 3))
    moments = network.encoder.compute_output_spec(pixels)
    height, width, channels = network.latent_shape(64)
    assert moments.shape == (2, height, width, 2 * channels)
    assert network.decoder.compute_output_spec(moments[..., :channels]).shape == pixels.shape
    assert parameters in (None, network.count_params())


@pytest.mark.parametrize("ends", [{}, ENDS], ids=["plain", "skips and tanh"])
def test_every_weight_has_a_gradient(ends, pixels):
    vae = AutoencoderKL(**LEVELS, **ends)
    randomise(vae)
    with tf.GradientTape() as tape:
        drawn, mean, logvar = vae.reparameterised(pixels, normal(4, 4, 6, 3), training=True)
        loss = tf.reduce_mean(tf.square(drawn - pixels)) + tf.reduce_mean(kl_divergence(mean, logvar))
    gradients = tape.gradient(loss, [variable.value for variable in vae.trainable_variables])
    for variable, gradient in zip(vae.trainable_variables, gradients):
        assert gradient is not None, variable.path
        # A bias of the keys adds the same to all scores of a query, which softmax does not see.
        assert np.any(gradient) or variable.path.endswith("to_k/bias"), variable.path


# Sizes


@pytest.mark.parametrize(
    ("levels", "factor", "latent_channels"), [(3, 4, 4), (4, 8, 8), (5, 16, 16), (4, 8, 32)]
)
def test_every_size_of_the_factor_works(levels, factor, latent_channels):
    network = AutoencoderKL((2,) * levels, (0,) * levels, latent_channels, groups=1, attention=False)
    assert network.factor == factor
    for height, width in ((1, 1), (3, 1), (2, 5)):
        pixels = normal(1, factor * height, factor * width, 3)
        mean, logvar = network.encode(pixels)
        assert mean.shape == logvar.shape == (1, height, width, latent_channels)
        assert network.decode(mean).shape == network(pixels).shape == pixels.shape


@pytest.mark.parametrize("size", [(12, 16), (16, 20), (4, 8), (0, 8)])
def test_other_sizes_are_refused(size):
    network = AutoencoderKL((2, 2, 2, 2), (0, 0, 0, 0), groups=1, attention=False)
    pixels = np.zeros((1, *size, 3), "float32")
    for takes_pixels in (
        network,
        network.encode,
        network.reconstruct,
        lambda pixels: network.reparameterised(pixels, 0.0),
    ):
        with pytest.raises(
            ValueError, match=rf"received pixels of shape \(1, {size[0]}, {size[1]}, 3\), expected.* 8"
        ):
            takes_pixels(pixels)


# Skip connections and the last layers


def test_skips_only_add_their_weights():
    """The rest has the same names in the same order, so that a trained autoencoder can be given skips."""
    plain, skipping = (AutoencoderKL(**LEVELS, skips=skips) for skips in (False, True))
    paths = [variable.path for variable in skipping.variables]
    added = [path for path in paths if ".skip/" in path]
    assert added == [
        f"decoder.up_blocks.{level}.skip/{name}" for level in (0, 1) for name in ("kernel", "bias")
    ]
    assert [path for path in paths if path not in added] == [variable.path for variable in plain.variables]


def test_new_skips_change_nothing(vae, pixels):
    skipping = AutoencoderKL(**LEVELS, skips=True)
    weights = {variable.path: variable.numpy() for variable in vae.variables}
    for variable in skipping.variables:
        if variable.path in weights:
            variable.assign(weights[variable.path])
    np.testing.assert_array_equal(skipping(pixels), vae(pixels))
    np.testing.assert_array_equal(skipping.encode(pixels), vae.encode(pixels))


@pytest.mark.parametrize("level", [0, 1])
def test_the_features_of_each_level_go_to_the_decoder(skipping, pixels, level):
    """Without the weights of one skip, the decoder does as without the features of that level."""
    moments, *features = skipping.encoder(pixels)
    assert [feature.shape for feature in features] == [(4, 8, 12, 4), (4, 4, 6, 8)]
    whole = skipping(pixels)
    np.testing.assert_array_equal(skipping.decoder([moments[..., :3], *features]), whole)
    skip = skipping.decoder.get_layer(f"decoder.up_blocks.{1 - level}.skip")  # which begins at the coarsest
    features[level] = 0 * features[level]
    lacking = skipping.decoder([moments[..., :3], *features])
    skip.kernel.assign(0 * skip.kernel)
    np.testing.assert_allclose(skipping(pixels), lacking, rtol=1e-5, atol=1e-5)
    assert np.abs(lacking - whole).mean() > 0.01


def test_skips_carry_what_the_latents_lack(skipping, pixels):
    """With latents that are cut off from the pixels, these still change the reconstruction."""
    skipping.encoder.get_layer("quant_conv").kernel.assign(np.zeros((1, 1, 6, 6)))
    drawn, mean, _ = skipping.reparameterised(pixels, normal(4, 4, 6, 3))
    np.testing.assert_array_equal(mean, np.broadcast_to(mean[0, 0, 0], mean.shape))
    assert np.std(drawn, axis=0).mean() > 0.01


def test_latents_alone_are_refused_with_skips(skipping, pixels):
    mean, _ = skipping.encode(pixels)
    with pytest.raises(ValueError, match="received latents alone, expected a picture"):
        skipping.decode(mean)


@pytest.mark.parametrize("ends", [{}, ENDS], ids=["plain", "skips and tanh"])
def test_the_features_before_the_last_layer_can_be_had(ends, pixels):
    network = AutoencoderKL(**LEVELS, **ends)
    randomise(network)
    last = network.decoder.get_layer("decoder.conv_out")
    features = keras.Model(network.decoder.input, last.input)
    moments, *skipped = keras.tree.flatten(network.encoder(pixels))
    linear = last(features([moments[..., :3], *skipped] if ends else moments[..., :3]))
    np.testing.assert_allclose(np.tanh(linear) if ends else linear, network(pixels), rtol=1e-5, atol=1e-5)
    assert np.abs(linear).max() > 0.5  # where tanh and nothing differ


def test_reconstruct_is_there_and_back(vae, skipping, pixels):
    expected = vae.decode(vae.encode(pixels)[0])
    np.testing.assert_allclose(vae.reconstruct(pixels), expected, rtol=1e-5, atol=1e-5)
    vae.set_latent_statistics([0.1, 0.2, 0.3], [2.0, 3.0, 4.0])
    np.testing.assert_allclose(vae.reconstruct(pixels), expected, rtol=1e-5, atol=1e-5)
    wild = skipping(pixels).numpy()
    assert np.abs(wild).max() > 1
    np.testing.assert_array_equal(skipping.reconstruct(pixels), np.clip(wild, -1, 1))


# The latent scale


def test_measured_statistics_give_unit_latents(vae, pixels):
    raw = vae.raw_moments(pixels)[0].numpy()
    before = vae.decode(vae.encode(pixels)[0]).numpy()
    vae.set_latent_statistics(raw.mean((0, 1, 2)), raw.std((0, 1, 2)))
    unit = vae.encode(pixels)[0].numpy()
    np.testing.assert_allclose(unit.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(unit.std((0, 1, 2)), 1, atol=1e-5)
    np.testing.assert_allclose(vae.decode(unit), before, atol=1e-5)


def test_the_scale_goes_through_the_posterior(vae, pixels):
    """Drawing, then scaling equals scaling the moments, then drawing."""
    noise, mean, std = normal(4, 4, 6, 3), np.array([1.0, -2.0, 0.5]), np.array([2.0, 0.25, 3.0])
    raw = sample_posterior(*vae.raw_moments(pixels), noise)
    vae.set_latent_statistics(mean, std)
    scaled = sample_posterior(*vae.encode(pixels), noise)
    np.testing.assert_allclose(scaled, (raw - mean) / std, rtol=1e-4, atol=1e-4)


def test_stable_diffusions_scale_is_a_factor(pixels):
    network = AutoencoderKL(**LEVELS, latent_scale=0.18215)
    randomise(network)
    raw = network.raw_moments(pixels)[0]
    latents = network.encode(pixels)[0]
    np.testing.assert_allclose(latents, raw * 0.18215, rtol=1e-6)
    expected = np.clip(network.decoder(latents / 0.18215), -1, 1)
    np.testing.assert_allclose(network.decode(latents), expected, atol=1e-5)


def test_the_scale_is_saved_but_not_trained(vae):
    kept = [v.path for v in vae.non_trainable_variables]
    assert kept == ["vae/latent_mean", "vae/latent_std"]


def test_decode_stays_in_the_range_of_pixels(vae):
    vae.decoder.get_layer("decoder.conv_out").kernel.assign(normal(3, 3, 4, 3))
    decoded = vae.decode(normal(2, 4, 4, 3)).numpy()
    assert decoded.min() == -1 and decoded.max() == 1


def test_call_goes_through_the_mean(vae, pixels):
    vae.set_latent_statistics([0.1, 0.2, 0.3], [2.0, 3.0, 4.0])
    expected = vae.decode(vae.encode(pixels)[0])
    np.testing.assert_allclose(np.clip(vae(pixels), -1, 1), expected, atol=1e-5)


def test_extreme_log_variances_are_held():
    network = AutoencoderKL(**LEVELS)
    bias = next(v for v in network.encoder.variables if v.path == "quant_conv/bias")
    bias.assign([0, 0, 0, -1e4, 1e4, 0])
    logvar = network.raw_moments(np.zeros((1, 4, 4, 3), "float32"))[1].numpy()
    assert np.all(logvar[..., 0] == -30) and np.all(logvar[..., 1] == 20)


# The posterior


def test_sample_posterior_inverts():
    mean, logvar, noise = normal(2, 3, 4, 2), normal(2, 3, 4, 2, seed=1), normal(2, 3, 4, 2, seed=2)
    drawn = sample_posterior(mean, logvar, noise)
    np.testing.assert_allclose((drawn - mean) / np.exp(logvar / 2), noise, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(sample_posterior(mean, logvar, 0 * noise), mean)


def test_reparameterised_goes_through_a_draw(vae, pixels):
    noise = normal(4, 4, 6, 3)
    vae.set_latent_statistics([0.1, 0.2, 0.3], [2.0, 3.0, 4.0])  # which training does not know yet
    drawn, *moments = vae.reparameterised(pixels, noise, training=True)
    np.testing.assert_array_equal(moments, vae.raw_moments(pixels))
    np.testing.assert_array_equal(drawn, vae.decoder(sample_posterior(*moments, noise)))
    assert np.abs(drawn - vae(pixels)).mean() > 0.01


@pytest.mark.parametrize("ends", [{}, ENDS], ids=["plain", "skips and tanh"])
def test_without_noise_the_draw_is_the_mean(ends, pixels):
    network = AutoencoderKL(**LEVELS, **ends)
    randomise(network)
    compiled = tf.function(network.reparameterised, autograph=False)
    np.testing.assert_allclose(
        compiled(pixels, np.zeros((4, 4, 6, 3), "float32"))[0], network(pixels), rtol=1e-4, atol=1e-5
    )


def test_half_precision_gives_full_precision_back(pixels):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        network = AutoencoderKL(**LEVELS, **ENDS)
    finally:
        keras.config.set_dtype_policy("float32")
    assert network.decoder.get_layer("decoder.up_blocks.0.skip").compute_dtype == "float16"
    values = network.reparameterised(pixels, normal(4, 4, 6, 3))
    assert {value.dtype for value in values} == {tf.float32}


@pytest.mark.parametrize(("mean", "logvar"), [(0.0, 0.0), (1.5, 0.0), (0.0, -3.0), (-0.7, 1.2)])
def test_kl_divergence_is_its_integral(mean, logvar):
    std = math.exp(logvar / 2)
    x = np.linspace(mean - 12 * std, mean + 12 * std, 200_001)
    log_p = -0.5 * ((x - mean) / std) ** 2 - math.log(std)  # both without the common -log(2 pi) / 2
    log_q = -0.5 * x**2
    density = np.exp(log_p) / math.sqrt(2 * math.pi)
    integral = np.sum(density * (log_p - log_q)) * (x[1] - x[0])
    ours = kl_divergence(np.float32([mean]), np.float32([logvar]))
    np.testing.assert_allclose(ours, [integral], rtol=1e-5, atol=1e-7)


def test_kl_divergence_is_of_each_value_by_itself():
    mean, logvar = normal(3, 2, 4, 2), normal(3, 2, 4, 2, seed=1)
    single = np.vectorize(lambda m, v: 0.5 * (m * m + math.exp(v) - 1 - v))(mean, logvar)
    np.testing.assert_allclose(kl_divergence(mean, logvar), single, rtol=1e-5, atol=1e-6)


def test_kl_divergence_is_what_draws_of_the_posterior_give():
    """The mean of log q(z) - log p(z) over many z of q, within four standard errors."""
    mean, logvar = normal(1, 2, 3, 2), 0.5 * normal(1, 2, 3, 2, seed=1)
    z = sample_posterior(mean, logvar, normal(100_000, 2, 3, 2, seed=2)).numpy().astype("float64")
    log_q = -0.5 * ((z - mean) ** 2 / np.exp(logvar) + logvar)  # both without the common -log(2 pi) / 2
    log_p = -0.5 * z**2
    draws = (log_q - log_p).sum((1, 2, 3))
    error = draws.std() / math.sqrt(len(draws))
    assert error < 0.01 * draws.mean()
    assert abs(np.sum(kl_divergence(mean, logvar)) - draws.mean()) < 4 * error
