"""What the comparisons with torch share: random arrays, and pictures with their channels first or last."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def first(images):
    """Channels first, as torch has them."""
    return torch.from_numpy(np.moveaxis(images, -1, 1).copy())


def last(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)
