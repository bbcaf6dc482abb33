"""The networks against other people's, with the same random weights copied by name.

The autoencoder and the U-Net are those of diffusers, so they are Stable Diffusion's; the text encoder's blocks are
torch's own.
"""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from benchmarks.torch_networks import give_weights  # noqa: E402
from model.text_encoder import VocabularyEncoder  # noqa: E402
from model.unet import UNet  # noqa: E402
from model.vae import AutoencoderKL, sample_posterior  # noqa: E402
from tests.torch_arrays import first, last, normal  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def draw_weights(network):
    for index, variable in enumerate(network.trainable_variables):
        if variable.path.endswith("gamma"):
            variable.assign(1 + 0.2 * normal(*variable.shape, seed=index))
        else:
            fan_in = math.prod(variable.shape[:-1]) if len(variable.shape) > 1 else 10
            variable.assign(normal(*variable.shape, seed=index) / math.sqrt(fan_in))


def copy_weights(network, oracle):
    """Into a torch module, every weight of both sides exactly once."""
    give_weights(oracle, {variable.path: variable.numpy() for variable in network.trainable_variables})
    return oracle.eval()


def assert_close_and_lively(ours, theirs):
    """Equal, and not because the values died away on their way through the network."""
    assert 0.05 < np.std(theirs) < 100
    np.testing.assert_allclose(ours, theirs, **CLOSE)


# Autoencoder


def autoencoders(levels, blocks, groups, attention):
    """Ours and diffusers', of the same random weights."""
    ours = AutoencoderKL(
        levels, (blocks,) * len(levels), 4, groups=groups, attention=attention, latent_scale=0.18215
    )
    draw_weights(ours)
    oracle = diffusers.AutoencoderKL(
        block_out_channels=levels,
        layers_per_block=blocks,
        down_block_types=["DownEncoderBlock2D"] * len(levels),
        up_block_types=["UpDecoderBlock2D"] * len(levels),
        latent_channels=4,
        norm_num_groups=groups,
        mid_block_add_attention=attention,
        scaling_factor=0.18215,
    )
    return ours, copy_weights(ours, oracle)


@pytest.mark.parametrize(
    ("levels", "blocks", "attention"),
    [((8, 16, 32, 32), 2, True), ((8, 16), 1, False)],
    ids=["stable diffusion's levels", "tiny"],
)
def test_the_autoencoder_is_diffusers(levels, blocks, attention):
    ours, oracle = autoencoders(levels, blocks, groups=4, attention=attention)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype("float32")
    with torch.no_grad():
        posterior = oracle.encode(first(pixels)).latent_dist
        decoded = oracle.decode(posterior.mean).sample
    mean, logvar = ours.raw_moments(pixels)
    assert_close_and_lively(mean, last(posterior.mean))
    assert_close_and_lively(logvar, last(posterior.logvar))
    assert_close_and_lively(ours(pixels), last(decoded))

    scale = oracle.config.scaling_factor
    latents = last(posterior.mean * scale)
    np.testing.assert_allclose(ours.encode(pixels)[0], latents, **CLOSE)
    with torch.no_grad():
        expected = oracle.decode(first(latents) / scale).sample
    np.testing.assert_allclose(ours.decode(latents), np.clip(last(expected), -1, 1), **CLOSE)


def test_the_autoencoder_of_stable_diffusions_size_is_diffusers():
    """There and back through the posterior's mean, and through a draw with diffusers' own noise."""
    ours, oracle = autoencoders((128, 256, 512, 512), 2, groups=32, attention=True)
    assert sum(weights.numel() for weights in oracle.parameters()) == 83_653_863  # of the published weights
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 3)).astype("float32")
    noise = last(torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        posterior = oracle.encode(first(pixels)).latent_dist
        z = posterior.sample(torch.Generator().manual_seed(0))
        decoded = [oracle.decode(latents).sample for latents in (posterior.mode(), z)]
    drawn, mean, logvar = ours.reparameterised(pixels, noise)
    assert_close_and_lively(mean, last(posterior.mode()))
    assert_close_and_lively(logvar, last(posterior.logvar))
    assert_close_and_lively(sample_posterior(mean, logvar, noise), last(z))
    assert_close_and_lively(ours(pixels), last(decoded[0]))
    assert_close_and_lively(drawn, last(decoded[1]))
    assert np.abs(last(decoded[1] - decoded[0])).mean() > 0.05


# U-Net


@pytest.mark.parametrize(
    ("levels", "attends", "blocks", "linear"),
    [
        ((8, 16, 32, 32), (True, True, True, False), 2, True),
        ((8, 16), (False, True), 1, False),
    ],
    ids=["stable diffusion's levels", "tiny"],
)
def test_the_unet_is_diffusers(levels, attends, blocks, linear):
    ours = UNet(4, levels, attends, blocks, head_channels=4, context_shape=(5, 6), groups=4)
    draw_weights(ours)
    oracle = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=levels,
        layers_per_block=blocks,
        down_block_types=["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attends],
        up_block_types=["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attends)],
        attention_head_dim=[channels // 4 for channels in levels],  # the number of heads, for all its name
        cross_attention_dim=6,
        norm_num_groups=4,
        use_linear_projection=linear,
    )
    copy_weights(ours, oracle)
    latents, context = normal(2, 8, 16, 4), normal(2, 5, 6, seed=1)
    times = np.array([0.02, 0.7], "float32")
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    with torch.no_grad():
        expected = oracle(
            first(latents),
            torch.from_numpy(1000 * times),
            torch.from_numpy(context),
            encoder_attention_mask=torch.from_numpy(mask),
        ).sample
    assert_close_and_lively(ours([latents, times, context, mask]), last(expected))


# Text encoder


def torch_layer(network, index, width, heads):
    """Layer `index` as torch's, which keeps queries, keys and values in one weight."""
    ours = {v.path: torch.from_numpy(v.numpy().copy()) for v in network.variables}
    place = f"layers.{index}"
    state = {}
    dense = {"self_attn.out_proj": "attn/to_out", "linear1": "fc1", "linear2": "fc2"}
    for theirs, mine in dense.items():
        state[f"{theirs}.weight"] = ours[f"{place}/{mine}/kernel"].T
        state[f"{theirs}.bias"] = ours[f"{place}/{mine}/bias"]
    for norm in ("norm1", "norm2"):
        state[f"{norm}.weight"], state[f"{norm}.bias"] = (
            ours[f"{place}/{norm}/{x}"] for x in ("gamma", "beta")
        )
    state["self_attn.in_proj_weight"] = torch.cat([ours[f"{place}/attn/to_{x}/kernel"].T for x in "qkv"])
    state["self_attn.in_proj_bias"] = torch.cat([ours[f"{place}/attn/to_{x}/bias"] for x in "qkv"])
    layer = torch.nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    layer.load_state_dict(state)
    return layer.eval()


def test_the_text_encoder_is_torchs():
    ours = VocabularyEncoder(vocabulary_size=13, length=6, width=16, layers=2, heads=4)
    draw_weights(ours)
    weights = {v.path: torch.from_numpy(v.numpy().copy()) for v in ours.variables}
    tokens = np.array([[3, 1, 4, 1, 0, 0], [5, 9, 2, 6, 12, 8]], "int32")
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    with torch.no_grad():
        x = weights["words/embeddings"][torch.from_numpy(tokens).long()] + weights["positions/embeddings"]
        for index in range(2):
            x = torch_layer(ours, index, 16, 4)(x, src_key_padding_mask=torch.from_numpy(~mask))
        gamma, beta = (weights[f"final_norm/{name}"] for name in ("gamma", "beta"))
        expected = torch.nn.functional.layer_norm(x, (16,), gamma, beta, 1e-5).numpy()
    assert_close_and_lively(ours([tokens, mask]).numpy()[mask], expected[mask])
