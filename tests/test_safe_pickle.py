"""A pickle from anyone: what pandas wrote is read as pandas reads it; anything else is refused and nothing runs.

`data/pandas1.pkl` was written by pandas 1.5.3 with numpy 1.26.4, `data/pandas2.pkl` by pandas 2.2.3 with numpy 2.2.6.
"""

import io
import os
import pickle
import random
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from errors import InputError
from input_pipeline.safe_pickle import safe_read_pickle

DATA = Path(__file__).parent / "data"
needs_real_data = pytest.mark.skipif("CUP3_REAL_DATA" not in os.environ, reason="CUP3_REAL_DATA is not set")


class Named:
    """A global by its name alone, whether it exists or not."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self):
        raise AssertionError("only its name is written")


class Call:
    """Will be pickled as the call of a named global, with an optional state."""

    def __init__(self, module, name, *args, state=None):
        self.reduced = (Named(module, name), args, state)


class Forger(pickle._Pickler):
    """Writes pickles that no library would."""

    def reducer_override(self, obj):
        return (
            obj.reduced if isinstance(obj, Call) else ("named" if isinstance(obj, Named) else NotImplemented)
        )

    def save_global(self, obj, name=None):
        self.save(obj.module)
        self.save(obj.name)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)


def forged(path, obj):
    buffer = io.BytesIO()
    Forger(buffer, 5).dump(obj)
    path.write_bytes(buffer.getvalue())
    return path


def table(texts=("./a.jpg", "./b.jpg", "./c.jpg")):
    captions = [[["1", "2"], ["3", "1"]], [["2", "2"]], [["5", "6"], ["7", "8"]]]
    frame = pd.DataFrame({"Captions": captions, "ID": [3, 1, 2], "Share": [0.5, 1.5, np.inf]})
    return frame.assign(ImagePath=texts, Seen=[True, False, True])


def assert_same(received, expected):
    assert list(received) == list(expected)
    for name in expected:
        for ours, theirs in zip(received[name], expected[name], strict=True):
            assert ours == theirs or (ours is None and pd.isna(theirs))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["object", "str", "string[python]", "string[pyarrow]"])
def test_reads_what_pandas_wrote(tmp_path, protocol, dtype):
    expected = table().astype({"ImagePath": dtype})
    expected.to_pickle(tmp_path / "table.pkl", protocol=protocol)
    assert_same(safe_read_pickle(tmp_path / "table.pkl"), expected)


@pytest.mark.parametrize("dtype", ["str", "string[python]", "string[pyarrow]"])
def test_reads_missing_texts_slices_and_other_alphabets(tmp_path, dtype):
    expected = table(["é€", None, ""]).astype({"ImagePath": dtype})
    expected = pd.concat([expected, expected.iloc[1:]])[["ImagePath", "ID"]]
    expected.iloc[1:].to_pickle(tmp_path / "table.pkl")
    assert_same(safe_read_pickle(tmp_path / "table.pkl"), expected.iloc[1:])


@pytest.mark.parametrize("name", ["pandas1.pkl", "pandas2.pkl"])
def test_reads_older_pandas(name):
    expected = {
        "Captions": [[["1", "2"], ["3", "1"]], [["2", "2"]]],
        "ImagePath": ["./102flowers/a.jpg", "./102flowers/b.jpg"],
        "ID": [7, 9],
    }
    assert safe_read_pickle(DATA / name).to_dict("list") == expected


def test_reads_the_layout_before_pandas_1_3(tmp_path):
    def array(values):
        values = np.array(values, object)
        state = (1, values.shape, Call("numpy", "dtype", "O8", False, True), False, values.ravel().tolist())
        ndarray = Named("numpy", "ndarray")
        return Call("numpy.core.multiarray", "_reconstruct", ndarray, (0,), b"b", state=state)

    def new_index(kind, **parts):
        return Call("pandas.core.indexes.base", "_new_Index", Named("pandas.core.indexes.base", kind), parts)

    axes = [
        new_index("Index", data=array(["ImagePath"]), name=None),
        new_index("RangeIndex", start=0, stop=2, step=1, name=None),
    ]
    blocks = [{"values": array([["x", "y"]]), "mgr_locs": Call("builtins", "slice", 0, 1, 1)}]
    state = (axes, [], [], {"0.14.1": {"axes": axes, "blocks": blocks}})
    manager = Call("pandas.core.internals", "BlockManager", state=state)
    frame = Call("pandas.core.frame", "DataFrame", state={"_data": manager, "_typ": "dataframe"})
    received = safe_read_pickle(forged(tmp_path / "old.pkl", frame))
    assert received.to_dict("list") == {"ImagePath": ["x", "y"]}


@needs_real_data
@pytest.mark.parametrize("name", ["text2ImgData.pkl", "testData.pkl"])
def test_reads_the_real_files_as_pandas_does(name):
    file = Path(os.environ["CUP3_REAL_DATA"]) / "cup3_flowers" / "dataset" / name
    assert_same(safe_read_pickle(file), pd.read_pickle(file))


def attacks(canary):
    """Pickles that leave a file behind when anything of them runs, each with the name it must be refused for."""
    code = f"open({str(canary)!r}, 'w').close()"
    command = f"touch {canary}"
    return {
        "os.system": Call("os", "system", command),
        "posix.system": Call("posix", "system", command),
        "builtins.eval": Call("builtins", "eval", code),
        "builtins.exec": Call("builtins", "exec", code),
        "builtins.getattr": Call("builtins", "getattr", Named("pandas", "DataFrame"), "to_csv"),
        "builtins.open": Call("builtins", "open", str(canary), "w"),
        "functools.partial": Call("functools", "partial", Named("os", "system"), command),
        "subprocess.Popen": Call("subprocess", "Popen", ["touch", str(canary)]),
        "pandas.eval": Call("pandas", "eval", f"@__builtins__.{code}"),
        "pandas.read_pickle": Call("pandas", "read_pickle", str(canary)),
        "pandas.DataFrame.to_csv": Call(
            "pandas", "DataFrame.to_csv", Call("pandas", "DataFrame"), str(canary)
        ),
        "numpy.load": Call("numpy", "load", str(canary)),
        "numpy.save": Call("numpy", "save", str(canary), [1]),
        "numpy.testing._private.utils.runstring": Call("numpy.testing._private.utils", "runstring", code, {}),
        "pyarrow.OSFile": Call("pyarrow", "OSFile", str(canary), "w"),
        "_codecs.lookup": Call("_codecs", "lookup", "zip"),
        "importlib.import_module": Call("importlib", "import_module", "antigravity"),
    }


@pytest.mark.parametrize("name", attacks("canary"))
def test_refuses_other_names_and_runs_nothing(tmp_path, name):
    canary = tmp_path / "canary"
    file = forged(tmp_path / "attack.pkl", [table().to_dict(), attacks(canary)[name]])
    with pytest.raises(InputError, match="attack.pkl: refused, since the pickle names `.*`") as refusal:
        safe_read_pickle(file)
    assert not canary.exists()
    named = str(refusal.value).split("`")[1]
    assert named in (name, "os.system")  # `partial` is written after the function that it would call


def test_the_attacks_are_live(tmp_path):
    """The forged pickle is no dud: Python's own loader does run it."""
    canary = tmp_path / "canary"
    file = forged(tmp_path / "attack.pkl", attacks(canary)["builtins.eval"])
    pickle.loads(file.read_bytes())
    assert canary.exists()


def forged_frame(values, dtype="O8", block=None):
    """A frame of one column whose stored values are forged."""
    array = Call(
        "numpy.core.multiarray",
        "_reconstruct",
        Named("numpy", "ndarray"),
        (0,),
        b"b",
        state=(1, (1, 1), Call("numpy", "dtype", dtype, False, True), False, values),
    )
    place = Call("builtins", "slice", 0, 1, 1)
    block = Call("pandas._libs.internals", "_unpickle_block", block or array, place, 2)

    def index(stop):
        parts = {"start": 0, "stop": stop, "step": 1, "name": None}
        return Call("pandas.core.indexes.base", "_new_Index", Named("pandas", "RangeIndex"), parts)

    manager = Call("pandas.core.internals.managers", "BlockManager", (block,), [index(1), index(1)])
    return Call("pandas", "DataFrame", state={"_mgr": manager})


def arrow(offsets, texts=b"abc", length=1):
    def buffer(data):
        return Call("pyarrow.lib", "py_buffer", data)

    kind = Call("pyarrow.lib", "type_for_alias", "large_string")
    parts = (
        kind,
        length,
        0,
        0,
        [None, buffer(struct.pack(f"<{len(offsets)}q", *offsets)), buffer(texts)],
        [],
        None,
    )
    return Call(
        "pandas.arrays", "ArrowStringArray", state={"_pa_array": Call("pyarrow.lib", "_restore_array", parts)}
    )


def test_the_forged_frame_is_read_when_it_is_sound(tmp_path):
    assert safe_read_pickle(forged(tmp_path / "a.pkl", forged_frame(["x"]))).to_dict("list") == {0: ["x"]}
    sound = forged_frame(None, block=arrow([1, 3]))
    assert safe_read_pickle(forged(tmp_path / "b.pkl", sound)).to_dict("list") == {0: ["bc"]}


@pytest.mark.parametrize(
    "frame",
    [
        forged_frame(b"\x01" * 8),  # bytes that would be read as a pointer
        forged_frame([Call("numpy.core.multiarray", "scalar", Call("numpy", "dtype", "O8"), b"\x01" * 8)]),
        forged_frame(b"\x01" * 8, dtype="V8"),
        forged_frame(b"\x01" * 4, dtype="i8"),
        forged_frame(b"\x01" * 16, dtype="i8"),
        forged_frame([{"a": 1}]),
        forged_frame([Call("numpy", "ndarray")]),
        forged_frame(None, block=arrow([0, 2**40])),
        forged_frame(None, block=arrow([-5, 2])),
        forged_frame(None, block=arrow([0], length=10**15)),
        forged_frame(None, block=arrow([0, 1, 2], length=2)),
        Call("pandas", "DataFrame"),
        Call("pandas", "DataFrame", state={"_mgr": 1}),
        Call("pandas", "Index"),
        [1, 2],
    ],
)
def test_refuses_a_frame_that_lies_about_its_memory(tmp_path, frame):
    with pytest.raises(InputError, match="a.pkl: is truncated or is not a pickled DataFrame"):
        safe_read_pickle(forged(tmp_path / "a.pkl", frame))


def test_refuses_every_truncation(tmp_path):
    table().to_pickle(tmp_path / "whole.pkl")
    whole = (tmp_path / "whole.pkl").read_bytes()
    for length in range(0, len(whole), 37):
        (tmp_path / "cut.pkl").write_bytes(whole[:length])
        with pytest.raises(InputError, match="cut.pkl: is truncated"):
            safe_read_pickle(tmp_path / "cut.pkl")


def test_damaged_bytes_give_a_table_or_a_clear_line(tmp_path):
    whole, rng = (DATA / "pandas1.pkl").read_bytes(), random.Random(0)
    n_refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "damaged.pkl").write_bytes(damaged)
        try:
            assert isinstance(safe_read_pickle(tmp_path / "damaged.pkl"), pd.DataFrame)
        except InputError as error:
            assert "damaged.pkl" in str(error)
            n_refused += 1
    assert n_refused > 100  # the damage was real


def test_names_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="none.pkl: cannot be read"):
        safe_read_pickle(tmp_path / "none.pkl")
