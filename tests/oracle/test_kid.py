"""KID against torch-fidelity, on equal features."""

import sys
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from metrics import kid  # noqa: E402


@pytest.fixture(scope="module")
def torch_fidelity_kid():
    """torch-fidelity's function of features. Its package imports torchvision for pictures, which none are here."""
    names = (
        "torchvision",
        "torchvision.datasets",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    )
    stand_ins = {name: mock.MagicMock() for name in names}
    with mock.patch.dict(sys.modules, stand_ins):
        from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

        def measure(a, b):
            options = {"kid_subsets": 1, "kid_subset_size": len(a), "verbose": False}
            result = kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), **options)
            return result[KEY_METRIC_KID_MEAN]

        yield measure


@pytest.mark.parametrize("n, dimension, shift", [(50, 8, 0.0), (128, 1280, 0.05), (200, 2048, 1.0)])
def test_equal_features_give_torch_fidelitys_value(torch_fidelity_kid, n, dimension, shift):
    rng = np.random.default_rng(n)
    real = np.abs(rng.normal(size=(n, dimension)))
    generated = np.abs(rng.normal(shift, size=(n, dimension)))
    assert kid(real, generated).value == pytest.approx(torch_fidelity_kid(real, generated), rel=1e-6)
    assert kid(real, generated, block=17).value == pytest.approx(
        torch_fidelity_kid(real, generated), rel=1e-6
    )
