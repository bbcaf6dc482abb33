"""The only room that knows file names in a run folder: atomic save, resume, keep best, keep last.

    config.json            everything the run was asked for, after defaults
    log.jsonl              a row an epoch
    vocabulary.json        the words the text encoder knows
    curves.png, samples/   what to look at
    cache/                 what can be made again: latents, text embeddings
    checkpoints/<stage>/<step>/   all that resume needs, the newest two
    best/<stage>/          the weights that the monitored metric chose
    networks/<stage>/      the final weights of a finished stage
    .lock                  held by the one process that may write

Each folder of the last three kinds is an *entry*: `tensors.safetensors`, and a `state.json` with the step,
the state and the SHA-256 of the tensors. An entry is written beside its place, flushed to the disk and then
renamed, so that it is there as a whole or not at all, whenever the process dies.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from errors import InputError

_TENSORS = "tensors.safetensors"
_STATE = "state.json"


class Saved(NamedTuple):
    """What a run folder gives back: arrays by name, and what JSON keeps of the state (tuples are lists)."""

    step: int
    tensors: dict[str, np.ndarray]
    state: dict


class RunFolder:
    """The folder of one run. Make one with `RunFolder.open` to train or with `RunFolder.read` to look.

    Attributes:
        path: the folder.
        config: the run's config, as JSON keeps it (tuples are lists).
    """

    def __init__(self, path: Path, config: dict, lock=None):
        self.path = path
        self.config = config
        self._lock = lock
        self._is_new = False

    @classmethod
    def open(cls, path, config: dict) -> "RunFolder":
        """Makes the run folder, or reopens it to go on, and locks it against other processes.

        Args:
            path: the folder; it may be missing, empty, or a run folder of the same config.
            config: nested dict of everything that defines the run.

        Raises:
            InputError: the folder holds something else, or a run of another config (each differing key is
                listed), or one that another process works on (its pid is named); or it cannot be written.
        """
        path, config = Path(path), _plain(config)
        _refuse_foreign(path)
        with _disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
        run = cls(path, config, lock)
        try:
            run._claim()
        except BaseException:
            run.close()
            raise
        return run

    @staticmethod
    def check(path, config: dict) -> None:
        """Refuses what `open` would refuse, but makes and changes nothing: for the time before any work.

        Args:
            path, config: see `open`.

        Raises:
            InputError: see `open`.
        """
        path = Path(path)
        with _disk_errors(path):
            _refuse_foreign(path)
            if (path / ".lock").exists():
                with open(path / ".lock", "a+") as lock:
                    _hold(lock, path)
        if (path / "config.json").exists():
            _refuse_other_config(path / "config.json", _plain(config))

    @classmethod
    def read(cls, path) -> "RunFolder":
        """Opens a run folder only to read it: without a lock, so also while it trains.

        Raises:
            InputError: `path` is no run folder.
        """
        config_file = Path(path) / "config.json"
        if not config_file.is_file():
            raise InputError(
                f"{path}: received a folder without config.json, expected the folder of a run, which "
                "`python cup3.py --run FOLDER` makes"
            )
        return cls(Path(path), _read_json(config_file))

    def close(self) -> None:
        """Lets other processes write. The end of the process does it too."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        # What was refused before anything was saved must not hold the folder against better settings.
        refused = kind is not None and issubclass(kind, InputError)
        if refused and self._is_new and not self._has_entries():
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def _has_entries(self):
        return any((self.path / name).exists() for name in ("checkpoints", "best", "networks"))

    # Places of what other rooms write.

    @property
    def vocabulary_path(self) -> Path:
        return self.path / "vocabulary.json"

    @property
    def curves_path(self) -> Path:
        return self.path / "curves.png"

    def sample_path(self, name: str) -> Path:
        return self.path / "samples" / name

    def cache_path(self, name: str) -> Path:
        return self.path / "cache" / name

    def write_json(self, name: str, value) -> Path:
        """Writes `value` as the file `name` of the run folder, atomically; NaN and infinities become null."""
        file = self.path / name
        with _disk_errors(file):
            _write_text(file, json.dumps(_plain(value), indent=2) + "\n")
        return file

    # Checkpoints: all that resume needs.

    def save(self, stage: str, step: int, tensors: dict[str, np.ndarray], state: dict, keep: int = 2) -> None:
        """Saves a checkpoint and then removes all but the newest `keep` of the stage.

        Args:
            stage: name of the stage, such as "vae".
            step: optimizer steps done.
            tensors: arrays by name: weights, EMA, optimizer slots.
            state: what else resume needs, in the types of JSON.

        Raises:
            InputError: the disk is full or read-only; the former checkpoints are intact.
        """
        folder = self.path / "checkpoints" / stage
        with self._writing(folder):
            _write_entry(folder / f"{step:08d}", step, tensors, state)
            # One that is newer than this was damaged, or this run would have gone on from there.
            older = [other for other in _steps(folder) if other <= step]
            for other in set(_steps(folder)) - set(older[-keep:]):
                _remove_entry(folder / f"{other:08d}")

    def latest(self, stage: str) -> Saved | None:
        """The newest checkpoint of `stage` whose checksum is right; None before the first.

        A damaged one is passed over with a warning line.

        Raises:
            InputError: there are checkpoints, and all are damaged.
        """
        folder = self.path / "checkpoints" / stage
        steps = _steps(folder)
        for step in reversed(steps):
            try:
                return _read_entry(folder / f"{step:08d}")
            except InputError as damage:
                print(f"warning: {damage}; trying the checkpoint before it", file=sys.stderr)
        if steps:
            damaged = "the only checkpoint is" if len(steps) == 1 else f"all {len(steps)} checkpoints are"
            raise InputError(f"{folder}: {damaged} damaged; remove it to start the stage again")
        return None

    # The best: chosen by the monitored metric.

    def save_best(
        self, stage: str, value: float, low: float, high: float, tensors: dict, state: dict
    ) -> bool:
        """Keeps `tensors` as the stage's best if `is_better` says so.

        Args:
            stage: name of the stage.
            value: the monitored metric, smaller is better.
            low, high: its confidence interval; equal to `value` where there is none.
            tensors: arrays by name.
            state: what else to remember, such as "step", "epoch" and the metric's "protocol".

        Returns:
            Whether it was kept.

        Raises:
            InputError: the best so far was measured by another protocol, or the disk is full or read-only.
        """
        folder = self.path / "best" / stage
        best = self.best_state(stage)
        if best is not None:
            protocols = {"protocol": _plain(state.get("protocol"))}, {"protocol": best.get("protocol")}
            _refuse_differences(folder, "protocol", *protocols)
        if not is_better(value, best):
            return False
        with self._writing(folder):
            state = {"value": value, "low": low, "high": high, **state}
            _write_entry(folder, state.get("step", 0), tensors, state)
        return True

    def best_state(self, stage: str) -> dict | None:
        """The state of the best so far, with its `value`, `low` and `high`, without reading tensors."""
        folder = _entry_place(self.path / "best" / stage)
        return _read_state(folder)["state"] if folder.exists() else None

    def best(self, stage: str) -> Saved | None:
        """The best so far; its state holds `value`, `low` and `high` too. InputError if damaged."""
        return _read_entry(self.path / "best" / stage)

    # Networks: the final weights of a finished stage.

    def finish(self, stage: str, tensors: dict[str, np.ndarray], state: dict) -> None:
        """Keeps the final weights of a stage, which marks the stage as finished."""
        folder = self.path / "networks" / stage
        with self._writing(folder):
            _write_entry(folder, state.get("step", 0), tensors, state)

    def finished(self, stage: str) -> Saved | None:
        """The final weights of a stage, or None while it is not finished. InputError if damaged."""
        return _read_entry(self.path / "networks" / stage)

    # The log.

    def log(self, row: dict) -> None:
        """Appends a row to `log.jsonl`; its "stage" and "step" let a resumed run drop what it repeats."""
        file = self.path / "log.jsonl"
        with self._writing(file), open(file, "ab") as log:
            log.write(json.dumps(_plain(row)).encode() + b"\n")
            log.flush()
            os.fsync(log.fileno())

    def rows(self) -> list[dict]:
        """All rows of the log, oldest first; a last one that a crash cut off is left out."""
        file = self.path / "log.jsonl"
        text = file.read_text() if file.exists() else ""
        whole_lines = text[: text.rfind("\n") + 1].splitlines()
        try:
            return [json.loads(line) for line in whole_lines]
        except ValueError as error:
            raise InputError(f"{file}: received a row that is no JSON: {error}") from error

    def truncate_log(self, stage: str, step: int) -> None:
        """Drops the stage's rows that are newer than `step`, where it goes on (0: from the start)."""
        kept = [row for row in self.rows() if row.get("stage") != stage or row.get("step", 0) <= step]
        self._write_rows(kept)

    def _write_rows(self, rows: list[dict]) -> None:
        file = self.path / "log.jsonl"
        with self._writing(file):
            _write_text(file, "".join(json.dumps(row) + "\n" for row in rows))

    def _claim(self) -> None:
        """Compares the config with the folder's, or writes it into a new one, and mends the log."""
        config_file = self.path / "config.json"
        if config_file.exists():
            _refuse_other_config(config_file, self.config)
        else:
            self.write_json("config.json", self.config)
            self._is_new = True
        with _disk_errors(self.path):
            for name in ("samples", "cache"):
                (self.path / name).mkdir(exist_ok=True)
        self._write_rows(self.rows())

    @contextlib.contextmanager
    def _writing(self, place: Path):
        if self._lock is None:
            raise RuntimeError(f"{self.path} was opened for reading only")
        with _disk_errors(place):
            yield


def is_better(value: float, best: dict | None) -> bool:
    """Whether `value` of a metric, smaller is better, replaces the best so far.

    What is not finite never wins, and the first finite value always does. After that the value must lie
    below the *interval* of the best, not just below its value: many epochs are compared, and the luckiest
    measurement of equal networks would otherwise win. The interval stays the best's own, so slow but steady
    progress leaves it in the end.

    Args:
        value: the new value.
        best: dict with "value" and "low", as `RunFolder.best_state` returns it, or None.
    """
    if not math.isfinite(value):
        return False
    if best is None or not _is_finite(best.get("value")):
        return True
    low = best.get("low")
    return bool(value < (low if _is_finite(low) else best["value"]))


def named_variables(network) -> list:
    """(name, variable) of every weight of a network, as `collect` and `assign` take them; names are Keras paths."""
    return [(variable.path, variable) for variable in network.weights]


def collect(variables, prefix: str) -> dict[str, np.ndarray]:
    """Copies variables into arrays named `<prefix>/<name>`.

    Args:
        variables: list of (name, Keras variable); names are unique and the same in every process.
        prefix: tells apart several sets of variables in one checkpoint, such as "raw" and "ema".

    Raises:
        ValueError: two variables have one name.
    """
    return {name: np.asarray(variable).copy() for name, variable in _named(variables, prefix).items()}


def assign(variables, tensors: dict[str, np.ndarray], prefix: str, source="the checkpoint") -> None:
    """Sets variables to the arrays that `collect` made of them; all of them or, on an error, none.

    Args:
        variables: list of (name, Keras variable).
        tensors: arrays by name; those under other prefixes are ignored.
        prefix: as given to `collect`.
        source: what the error message calls the tensors' origin, best a path.

    Raises:
        InputError: a tensor is missing, left over, or of another shape.
        ValueError: two variables have one name.
    """
    variables = _named(variables, prefix)
    received = {name: tuple(array.shape) for name, array in tensors.items() if name.startswith(f"{prefix}/")}
    expected = {name: tuple(variable.shape) for name, variable in variables.items()}
    _refuse_differences(source, "set of variables", received, expected, at_most=5)
    for name, variable in variables.items():
        variable.assign(tensors[name])


def _named(variables, prefix: str) -> dict:
    named = {f"{prefix}/{name}": variable for name, variable in variables}
    if len(named) < len(variables):
        names = [name for name, _ in variables]
        raise ValueError(
            f"two variables have one name: {sorted({name for name in names if names.count(name) > 1})}"
        )
    return named


# Differences between what was received and what was expected.


def _refuse_differences(
    place, what: str, received: dict, expected: dict, at_most: int | None = None, way_out: str = ""
) -> None:
    """Raises an InputError that lists the keys whose values differ or that only one side has."""
    received, expected = _flat(received), _flat(expected)
    differences = [
        f"{key} received {received.get(key, 'nothing')}, expected {expected.get(key, 'nothing')}"
        for key in sorted(received.keys() | expected.keys())
        if key not in received or key not in expected or received[key] != expected[key]
    ]
    if differences:
        more = f"; and {len(differences) - at_most} more" if at_most and len(differences) > at_most else ""
        way_out = way_out and f"; {way_out}"
        raise InputError(f"{place}: another {what}: {'; '.join(differences[:at_most])}{more}{way_out}")


def _refuse_other_config(config_file: Path, config: dict) -> None:
    way_out = "give --run another folder, or the settings of this one"
    _refuse_differences(config_file, "config", config, _read_json(config_file), way_out=way_out)


def _flat(value, name: str = "") -> dict:
    """{"vae": {"side": 64}} -> {"vae.side": 64}"""
    if not isinstance(value, dict) or (name and not value):
        return {name: value}
    return {
        key: leaf for part in value for key, leaf in _flat(value[part], f"{name}.{part}".lstrip(".")).items()
    }


def _is_finite(value) -> bool:
    return value is not None and math.isfinite(value)


# JSON.


def _plain(value):
    """What JSON can keep of `value`: numbers of numpy become Python's, what is not finite becomes null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: received {type(value).__name__}, expected a JSON object")
    return value


# Entries: tensors and their state, whole or not at all.


def _write_entry(folder: Path, step: int, tensors: dict, state: dict) -> None:
    new = folder.parent / ".new"
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        _write_tensors(new / _TENSORS, tensors)
        entry = {"step": int(step), "sha256": _sha256(new / _TENSORS), "state": _plain(state)}
        _write_text(new / _STATE, json.dumps(entry, indent=2) + "\n")
        _swap(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _swap(new: Path, folder: Path) -> None:
    """Puts `new` in the place of `folder`. Between the two renames, `_entry_place` finds the old one."""
    old = _old(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _read_entry(folder: Path) -> Saved | None:
    """The entry at `folder`, None if there is none; InputError if it is damaged."""
    folder = _entry_place(folder)
    if not folder.exists():
        return None
    entry = _read_state(folder)
    try:
        if _sha256(folder / _TENSORS) != entry["sha256"]:
            raise InputError(f"{folder / _TENSORS}: damaged: its SHA-256 is not the one in {_STATE}")
        return Saved(entry["step"], load_file(folder / _TENSORS), entry["state"])
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / _TENSORS}: cannot be read: {error}") from error


def _read_state(folder: Path) -> dict:
    entry = _read_json(folder / _STATE)
    missing = {"step", "sha256", "state"} - entry.keys()
    if missing:
        raise InputError(f"{folder / _STATE}: damaged: it has no {sorted(missing)[0]}")
    return entry


def _remove_entry(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(_old(folder), ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _entry_place(folder: Path) -> Path:
    """Where the entry is: in its place, or moved aside by a process that died before it put the new one in."""
    return folder if folder.exists() or not _old(folder).exists() else _old(folder)


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, oldest first."""
    names = os.listdir(folder) if folder.exists() else []
    matches = [re.fullmatch(r"(\d{8,})|\.(\d{8,})\.old", name) for name in names]
    return sorted({int(match[1] or match[2]) for match in matches if match})


def _write_tensors(file: Path, tensors: dict) -> None:
    # safetensors writes memory as it lies: an array that is not in C order would be saved scrambled.
    save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, file)
    _flush(file)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# The disk.


def _write_text(file: Path, text: str) -> None:
    new = file.with_name(f".{file.name}.new")
    try:
        new.write_text(text)
        _flush(new)
        os.replace(new, file)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _flush(file.parent)


def _flush(place: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _disk_errors(place: Path):
    """Turns a full or read-only disk into one clear line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{place}: cannot be written: {error.strerror}; what was saved before is intact"
        ) from error
    except SafetensorError as error:
        raise InputError(f"{place}: cannot be written: {error}; what was saved before is intact") from error


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: received a file, expected a folder for the run")
    is_run = (path / "config.json").exists()
    # Hidden files do not count: a process that died before it wrote config.json leaves its lock.
    strange = [name for name in os.listdir(path) if name[0] != "."] if path.exists() and not is_run else []
    if strange:
        raise InputError(
            f"{path}: received a folder that holds {min(strange)} and no config.json, "
            "expected the folder of a run or an empty one; give --run another folder"
        )


def _lock(path: Path):
    """Takes the folder's lock, which the system frees when this process ends, however it ends."""
    lock = open(path / ".lock", "a+")
    try:
        _hold(lock, path)
    except BaseException:
        lock.close()
        raise
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _hold(lock, path: Path) -> None:
    """Locks an open lock file until it is closed."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise InputError(
            f"{path}: process {lock.read()} works on this run; wait for it, stop it, or give --run another folder"
        ) from None
