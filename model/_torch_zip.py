"""Networks only: the zip format of torch files, which `torch.save` writes since 1.6.

One folder holds the pickle of the state dict, a file for each storage and a few words on the whole. Nothing in it is
compressed, so an entry that is has been made by someone else, perhaps to fill the memory.
"""

import io
import zipfile

from errors import InputError
from model._torch_tensors import laid, load_views, numbers_of, storages_of

_ENCRYPTED = 1  # the bit of an entry's flags


def read_zip(file, size, prefix):
    """Reads the tensors of a zip-format torch file.

    Arguments:
        file: open for bytes.
        size: bytes in it.
        prefix: only tensors whose names start so are read.

    Returns:
        dict of name -> array.

    Raises:
        InputError: see `torch_weights.read`. A damaged archive raises what `zipfile` raises.
    """
    with zipfile.ZipFile(file) as archive:
        entries = _checked_entries(archive.infolist(), size)
        _check_order(archive, entries)
        views = _load_views(archive, entries)
        storages = storages_of(views)
        kept = {entry.removeprefix("data/") for entry in entries if entry.startswith("data/")}
        if kept != set(storages):
            raise InputError("holds other storages than its tensors use")
        wanted = {name: view for name, view in views.items() if name.startswith(prefix)}
        numbers = {
            key: _read_storage(archive, entries[f"data/{key}"], storage)
            for key, storage in storages_of(wanted).items()
        }
    return laid(wanted, numbers)


def _checked_entries(infos, size):
    """The archive's entries by their name in its one top folder, which bears the name of the file once saved."""
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
            raise InputError(f"entry {info.filename} is compressed or encrypted, expected plain bytes")
    names = [info.filename for info in infos]
    folders = {name.partition("/")[0] for name in names}
    if len(folders) != 1 or len(set(names)) < len(names):
        raise InputError(f"holds the entries {sorted(names)[:5]}, expected each once and in one folder")
    # Entries that lie on one another could give more bytes than the file has.
    if sum(info.file_size for info in infos) > size:
        raise InputError(f"claims more bytes in its entries than the {size} that it has")
    return {info.filename.partition("/")[2]: info for info in infos}


def _check_order(archive, entries):
    # Before torch 2.1 nothing was written of the order, which was little-endian nearly everywhere.
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise InputError("was written big-endian, expected little-endian")


def _load_views(archive, entries):
    if "data.pkl" not in entries:
        raise InputError(f"holds the entries {sorted(entries)[:5]}, expected data.pkl among them")
    with io.BytesIO(archive.read(entries["data.pkl"])) as file:
        views = load_views(file)
        if file.read(1):
            raise InputError("goes on after its pickle")
    return views


def _read_storage(archive, entry, storage):
    if entry.file_size != storage.n_bytes:
        raise InputError(
            f"is truncated or damaged: storage {storage.key} has {entry.file_size} bytes, "
            f"expected {storage.n_bytes}"
        )
    return numbers_of(storage, archive.read(entry))
