"""Networks of torch with our weights: those of diffusers, by name, and a PatchGAN built of torch's layers."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

ENDINGS = {"kernel": "weight", "gamma": "weight", "beta": "bias", "bias": "bias", "embeddings": "weight"}
TRANSFORMER_PARTS = ("norm1", "norm2", "norm3", "attn1", "attn2", "ff")
NORM_WEIGHTS = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def diffusers_name(path):
    """`mid_block.attentions.0/attn1/to_out/kernel` -> diffusers' name of the same weight."""
    *parts, ending = path.split("/")
    if len(parts) > 1 and ".attentions." in parts[0] and parts[1] in TRANSFORMER_PARTS:
        parts.insert(1, "transformer_blocks.0")  # ours holds its one block's layers itself
    if parts[-1] == "to_out":
        parts[-1] = "to_out.0"
    return ".".join([*(part for part in parts if part != "attn"), ENDINGS[ending]])


def give_weights(oracle, weights):
    """Gives a network of diffusers our weights, every one of both sides exactly once.

    Args:
        oracle: the network of diffusers.
        weights: dict of arrays by the paths of our variables.
    """
    theirs = oracle.state_dict()
    ours = {diffusers_name(path): value for path, value in weights.items()}
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        # (kh, kw, in, out) -> (out, in, kh, kw); (in, out) -> (out, in)
        value = np.moveaxis(value, (-1, -2), (0, 1)) if value.ndim > 1 else value
        if theirs[name].ndim == value.ndim + 2:  # a 1x1 convolution for a dense layer
            value = value[..., None, None]
        assert value.shape == tuple(theirs[name].shape), name
        theirs[name] = torch.from_numpy(value.copy())
    oracle.load_state_dict(theirs)


def patch_discriminator(weights, groups=32, norm="group", spectral=False):
    """The PatchGAN of Isola et al. 2017 with our weights.

    Convolutions of stride 2, then two of stride 1; norms between; leaky ReLUs of 0.2 after all but the last.

    Args:
        weights: dict of arrays by the paths of the variables of a `model.discriminator.PatchDiscriminator`.
        groups: of the group norms.
        norm: "group", "batch" or "none".
        spectral: whether kernels are divided by their spectral norm.
    """
    by_layer = {}
    for path, value in weights.items():
        layer, kind = path.split(".", 1)[1].split("/")
        by_layer.setdefault(layer, {})[kind] = value
    layers = sum(layer.startswith("convs.") for layer in by_layer) - 2  # that halve the size
    parts = []
    for depth in range(layers + 2):
        parts.append(_convolution(by_layer[f"convs.{depth}"], 2 if depth < layers else 1, spectral))
        if 0 < depth <= layers and norm != "none":
            parts.append(_norm(by_layer[f"norms.{depth}"], norm, groups))
        if depth <= layers:
            parts.append(nn.LeakyReLU(0.2))
    return nn.Sequential(*parts)


def _convolution(weights, strides, spectral):
    """A layer of torch with our weights: (kh, kw, in, out) -> (out, in, kh, kw)."""
    kernel = torch.from_numpy(np.transpose(weights["kernel"], (3, 2, 0, 1)).copy())
    conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 4, strides, padding=1, bias="bias" in weights)
    conv.weight.data = kernel
    if conv.bias is not None:
        conv.bias.data = torch.from_numpy(weights["bias"].copy())
    if spectral:
        conv = spectral_norm(conv)
        u = torch.from_numpy(weights["u"].copy())
        conv.parametrizations.weight[0]._u = u
        conv.parametrizations.weight[0]._v = F.normalize(kernel.flatten(1).T @ u, dim=0)
    return conv


def _norm(weights, norm, groups):
    channels = len(weights["gamma"])
    layer = nn.GroupNorm(groups, channels) if norm == "group" else nn.BatchNorm2d(channels)
    state = {
        theirs: torch.from_numpy(weights[ours].copy())
        for theirs, ours in NORM_WEIGHTS.items()
        if ours in weights
    }
    layer.load_state_dict(state, strict=norm == "group")
    return layer
