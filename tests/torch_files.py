"""Files as torch writes them, of both formats, made opcode by opcode without torch."""

import io
import pickle
import struct
import zipfile

import numpy as np

STORAGES = {"<f4": "FloatStorage", "<f2": "HalfStorage", "<i8": "LongStorage"}
HEADER = (
    pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    + pickle.dumps(1001, 2)
    + pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}, 2)
)


def opcodes(value):
    """What pickle writes for a plain value, without its first (protocol) and last (stop) opcode."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(
    key, count, offset, shape, strides, storage="FloatStorage", form="legacy", rebuild="_rebuild_tensor_v2"
):
    """The call that makes a tensor; the legacy form's storages also say that they are no view."""
    storage_id = b"(" + opcodes("storage") + f"ctorch\n{storage}\n".encode()
    storage_id += opcodes(key) + opcodes("cpu") + opcodes(count) + (b"N" if form == "legacy" else b"") + b"tQ"
    arguments = storage_id + opcodes(offset) + opcodes(shape) + opcodes(strides)
    if rebuild == "_rebuild_tensor_v2":
        arguments += b"\x89ccollections\nOrderedDict\n)R"  # no gradient, no hooks
    return f"ctorch._utils\n{rebuild}\n(".encode() + arguments + b"tR"


def state_pickle(**tensors):
    items = b"".join(opcodes(name) + value for name, value in tensors.items())
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u."


def legacy_bytes(state, arrays):
    """A legacy file of a pickled state and the storages that it points at, an array a key."""
    storages = [struct.pack("<q", array.size) + array.tobytes() for array in arrays.values()]
    return HEADER + state + pickle.dumps(list(arrays), 2) + b"".join(storages)


def zip_entries(state, arrays, folder="weights"):
    """The entries of a zip file of a pickled state and its storages, by name."""
    entries = {"data.pkl": state, ".format_version": b"1", "byteorder": b"little"}
    entries |= {f"data/{key}": array.tobytes() for key, array in arrays.items()}
    return {f"{folder}/{name}": content for name, content in (entries | {"version": b"3\n"}).items()}


def zip_bytes(entries, **options):
    """A zip file of entries, a dict or pairs; options are those of `zipfile.ZipFile`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, content in entries.items() if isinstance(entries, dict) else entries:
            archive.writestr(zipfile.ZipInfo(name), content, archive.compression)
    return file.getvalue()


def packed(form, state, arrays):
    """A file of either form, "legacy" or "zip"."""
    return legacy_bytes(state, arrays) if form == "legacy" else zip_bytes(zip_entries(state, arrays))


def save(path, arrays, form="zip"):
    """Writes a state dict of float32 arrays, each with a storage of its own, as `torch.save` does."""
    arrays = {name: np.ascontiguousarray(array, "<f4") for name, array in arrays.items()}
    calls = {}
    for key, (name, array) in enumerate(arrays.items()):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        calls[name] = tensor(str(key), array.size, 0, array.shape, strides, form=form)
    storages = {str(key): array for key, array in enumerate(arrays.values())}
    path.write_bytes(packed(form, state_pickle(**calls), storages))
    return path
