"""Reads a pandas pickle without running it: every global that it names becomes an inert record.

An allow-list of real functions still has holes: `numpy.scalar` of an object dtype reads a pointer, Arrow buffers with
false offsets read past their end. So nothing of numpy, pandas or pyarrow is called while the pickle is read. The
allowed names turn into records of their arguments, and the table is put together here from what those records hold,
with each length checked. Any other name is refused before anything is made of it.
"""

import io
import pickle
import re
from pathlib import Path

import numpy as np
import pandas as pd

from errors import InputError


class _Record:
    """An inert stand-in for one allowed global: keeps its arguments and its state, does nothing."""

    __slots__ = ("args", "state")
    name = ""

    def __new__(cls, *args):
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state):
        self.state = state


def _record(name):
    return type(name, (_Record,), {"__slots__": (), "name": name})


_DTYPE = re.compile(
    r"[biufU]\d+"
)  # as a pickle writes them; objects are named beside it, nothing else is needed


class _Dtype(_record("dtype")):
    """A numpy dtype of booleans, numbers, texts or objects."""

    def resolve(self):
        code = self.args[0]
        if code in ("O8", "O4", "O"):
            return np.dtype(object)
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise pickle.UnpicklingError(f"a column of numpy type {code!r}")
        order = self.state[1] if self.state else "="
        return np.dtype(code).newbyteorder(order if order in ("<", ">") else "=")


class _Scalar(_record("scalar")):
    """A numpy scalar becomes the Python value at once, as a Cup3 pickle holds hundreds of thousands of them."""

    __slots__ = ()

    def __new__(cls, dtype, raw):
        return np.frombuffer(_raw_bytes(raw), _numeric(dtype), count=1)[0].item()


_Array, _Buffer = _record("_reconstruct"), _record("_frombuffer")
_Bytes, _Encoded, _Slice = _record("bytearray"), _record("encode"), _record("slice")
_Frame, _Manager, _Block = _record("DataFrame"), _record("BlockManager"), _record("_unpickle_block")
_Index, _NewIndex, _Range = _record("Index"), _record("_new_Index"), _record("RangeIndex")
_StringArray, _NewStringArray = _record("StringArray"), _record("__pyx_unpickle_NDArrayBacked")
_ArrowArray, _Arrow, _Chunked = (
    _record("ArrowStringArray"),
    _record("_restore_array"),
    _record("chunked_array"),
)
_ArrowType, _ArrowBuffer = _record("type_for_alias"), _record("py_buffer")
_Missing, _Ignored = _record("NA"), _record("ndarray")  # neither is ever called

_NUMPY = {
    "_reconstruct": _Array,
    "scalar": _Scalar,
    "_frombuffer": _Buffer,
    "ndarray": _Ignored,
    "dtype": _Dtype,
}
_PANDAS = {
    "DataFrame": _Frame,
    "BlockManager": _Manager,
    "_unpickle_block": _Block,
    "new_block": _Block,
    "Index": _Index,
    "Int64Index": _Index,
    "_new_Index": _NewIndex,
    "RangeIndex": _Range,
    "StringDtype": _Ignored,
    "NA": _Missing,
    "StringArray": _StringArray,
    "__pyx_unpickle_NDArrayBacked": _NewStringArray,
    "ArrowStringArray": _ArrowArray,
}
_ARROW = {
    "_restore_array": _Arrow,
    "chunked_array": _Chunked,
    "type_for_alias": _ArrowType,
    "py_buffer": _ArrowBuffer,
}
_BUILTINS = {"slice": _Slice, "bytearray": _Bytes}
_ALLOWED = {
    "numpy": _NUMPY,
    "pandas": _PANDAS,
    "pyarrow": _ARROW,
    "builtins": _BUILTINS,
    "__builtin__": _BUILTINS,
    "_codecs": {"encode": _Encoded},
}


class _Refused(Exception):
    """The pickle names a global that no table of captions needs."""


class _RecordingUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return _ALLOWED[module.partition(".")[0]][name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


def safe_read_pickle(path):
    """Read a DataFrame from a pickle that need not be trusted; nothing named in it is ever called.

    Reads what pandas 1, 2 and 3 write for columns of numbers, texts and Python lists (protocols 2 to 5, uncompressed).
    The row index is not read: rows are counted from 0.

    Args:
        path: The `.pkl` file.

    Returns:
        A DataFrame; text columns are of dtype object.

    Raises:
        InputError: the file is missing or truncated, is no DataFrame, or names a global outside the allow-list.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return _frame(_RecordingUnpickler(io.BytesIO(data)).load())
    except _Refused as error:
        raise InputError(
            f"{path}: refused, since the pickle names `{error}`; expected a pandas DataFrame of captions, "
            "and nothing of the file was run"
        ) from None
    except Exception as error:  # the pickle module documents that damaged data may raise any exception
        raise InputError(
            f"{path}: is truncated or is not a pickled DataFrame ({type(error).__name__}: {error})"
        ) from None


def _frame(record):
    """The DataFrame of a `_Frame` record: each block holds some of the columns, one row of values a column."""
    manager = _the(record, _Frame).state
    manager = _the(manager.get("_mgr", manager.get("_data")), _Manager)
    (names, rows), blocks = _blocks_of(manager)
    names, n_rows = _labels(names), _length(rows)
    columns = {}
    for values, places in blocks:
        values = _column_values(values)
        places = range(len(names))[_slice(places)] if isinstance(places, _Slice) else _array(places).tolist()
        if values.shape != (len(places), n_rows):
            raise pickle.UnpicklingError(f"a block of shape {values.shape}, expected {(len(places), n_rows)}")
        columns.update({names[place]: column for place, column in zip(places, values, strict=True)})
    if len(columns) != len(names):
        raise pickle.UnpicklingError(f"{len(columns)} columns with values, expected {len(names)}")
    return pd.DataFrame({name: _series(columns[name]) for name in names})


def _series(values):
    """Objects stay objects: pandas 3 would make Arrow texts of them."""
    return pd.Series(values, dtype=object if values.dtype.kind in "OU" else values.dtype)


def _blocks_of(manager):
    """Axes and (values, places) of each block; before pandas 1.3 they lay in the state under the key '0.14.1'."""
    if manager.state is None:
        blocks, axes = manager.args
        return axes, [_the(block, _Block).args[:2] for block in blocks]
    state = manager.state[3]["0.14.1"]
    return state["axes"], [(block["values"], block["mgr_locs"]) for block in state["blocks"]]


def _the(record, kind):
    if not isinstance(record, kind):
        raise pickle.UnpicklingError(f"{type(record).__name__} where {kind.name} was expected")
    return record


def _slice(record):
    if not all(part is None or isinstance(part, int) for part in record.args):
        raise pickle.UnpicklingError("a slice of something else than whole numbers")
    return slice(*record.args)


def _labels(record):
    """The column names, a list or a range."""
    kind, parts = _the(record, _NewIndex).args
    if kind is _Range:
        return range(parts["start"], parts["stop"], parts["step"])
    return _column_values(parts["data"])[0].tolist()


def _length(record):
    """How many rows the row index counts."""
    kind, parts = _the(record, _NewIndex).args
    if kind is _Range:
        return len(range(parts["start"], parts["stop"], parts["step"]))
    return _column_values(parts["data"]).shape[1]


def _column_values(record):
    """Any kind of stored values as an array (columns, rows)."""
    if isinstance(record, _ArrowArray):
        values = _arrow_texts(
            record.state["_pa_array"] if "_pa_array" in record.state else record.state["_data"]
        )
    elif isinstance(record, (_NewStringArray, _StringArray)):
        values = next(_array(part) for part in _parts(record.state) if isinstance(part, (_Array, _Buffer)))
    else:
        values = _array(record)
    return values[None] if values.ndim == 1 else values


def _parts(state):
    return state.values() if isinstance(state, dict) else state


def _array(record):
    """The numpy array of a record, of objects or of plain numbers."""
    if isinstance(record, _Buffer):
        raw, dtype, shape, order = record.args[:4]
        axes = record.args[4] if order == "K" else None
        return _shaped(np.frombuffer(_raw_bytes(raw), _numeric(dtype)), shape, order, axes)
    _, shape, dtype, is_fortran, data = _the(record, _Array).state
    if _the(dtype, _Dtype).resolve().kind != "O":
        return _shaped(np.frombuffer(_raw_bytes(data), _numeric(dtype)), shape, "F" if is_fortran else "C")
    values = np.empty(len(data), object)
    values[:] = [_plain(value) for value in data]
    return _shaped(values, shape, "F" if is_fortran else "C")


def _shaped(flat, shape, order, axes=None):
    if order != "K":
        return flat.reshape(shape, order=order)
    return flat.reshape(shape).transpose(axes)  # numpy wrote the shape in the order of memory


def _numeric(dtype):
    dtype = _the(dtype, _Dtype).resolve()
    if dtype.kind == "O":
        raise pickle.UnpicklingError("raw bytes that claim to be objects")
    return dtype


def _raw_bytes(data):
    """Bytes of any protocol: protocol 2 writes them as a text in Latin-1."""
    if isinstance(data, (_Encoded, _Bytes)):
        data, *encoding = data.args or (b"",)
        if encoding not in ([], ["latin1"], ["latin-1"]):
            raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
        data = data.encode("latin-1") if isinstance(data, str) else _raw_bytes(data)
    if not isinstance(data, (bytes, bytearray, pickle.PickleBuffer)):
        raise pickle.UnpicklingError(f"{type(data).__name__} where bytes were expected")
    return data


def _plain(value):
    """A cell of an object column: Python values and lists of them, never a record."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (_Array, _Buffer)):
        return _array(value).tolist()
    if value is _Missing:
        return None
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise pickle.UnpicklingError(f"a cell that holds {type(value).__name__}")


def _arrow_texts(record):
    """Texts of an Arrow array from its buffers: validity bits, offsets, UTF-8 bytes."""
    if isinstance(record, _Chunked):
        return np.concatenate([np.empty(0, object), *(_arrow_texts(chunk) for chunk in record.args[0])])
    kind, length, _, start, buffers = _the(record, _Arrow).args[0][:5]
    width = {"string": np.int32, "large_string": np.int64}[_the(kind, _ArrowType).args[0]]
    validity, offsets, texts = (_arrow_bytes(buffer) for buffer in buffers)
    offsets = np.frombuffer(offsets, width)[start : start + length + 1]
    if (
        len(offsets) != length + 1
        or offsets[0] < 0
        or (np.diff(offsets) < 0).any()
        or offsets[-1] > len(texts)
    ):
        raise pickle.UnpicklingError("Arrow offsets outside their texts")
    valid = np.unpackbits(np.frombuffer(validity, np.uint8), bitorder="little") if validity else None
    values = np.empty(length, object)
    for row in range(length):
        if valid is None or valid[start + row]:
            values[row] = bytes(texts[offsets[row] : offsets[row + 1]]).decode("utf-8")
    return values


def _arrow_bytes(buffer):
    return b"" if buffer is None else memoryview(_raw_bytes(_the(buffer, _ArrowBuffer).args[0]))
