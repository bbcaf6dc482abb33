"""The only room that knows file names in a run folder: save, resume, keep best, keep last, and the log."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from checkpoint import entries
from checkpoint._differences import refuse_differences
from checkpoint._json import plain, read_json
from checkpoint.entries import Saved
from errors import InputError
from files import replacing


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
        path, config = Path(path), plain(config)
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
            _refuse_other_config(path / "config.json", plain(config))

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
        return cls(Path(path), read_json(config_file))

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

    @property
    def sweep_path(self) -> Path:
        return self.path / "ema_sweep.png"

    @property
    def vae_curves_path(self) -> Path:
        return self.path / "vae_curves.png"

    @property
    def latents_path(self) -> Path:
        return self.path / "latents.png"

    def tracked_path(self, stage: str) -> Path:
        return self.path / f"tracked_{stage}.jsonl"

    def events_path(self, stage: str) -> Path:
        return self.path / "tensorboard" / stage

    @property
    def is_finished(self) -> bool:
        """Whether all stages are done: curves are the last thing that a run writes."""
        return self.curves_path.exists()

    def sample_path(self, name: str) -> Path:
        """The place of a sample, in a folder that is there, also when somebody has taken it away."""
        folder = self.path / "samples"
        folder.mkdir(exist_ok=True)
        return folder / name

    def cache_path(self, name: str) -> Path:
        return self.path / "cache" / name

    def write_json(self, name: str, value) -> Path:
        """Writes `value` as the file `name` of the run folder, atomically; NaN and infinities become null."""
        file = self.path / name
        with _disk_errors(file):
            _write(file, json.dumps(plain(value), indent=2) + "\n")
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
            entries.write(folder / f"{step:08d}", step, tensors, state)
            # One that is newer than this was damaged, or this run would have gone on from there.
            older = [other for other in entries.steps(folder) if other <= step]
            for other in set(entries.steps(folder)) - set(older[-keep:]):
                entries.remove(folder / f"{other:08d}")

    def latest(self, stage: str) -> Saved | None:
        """The newest checkpoint of `stage` whose checksum is right; None before the first.

        A damaged one is passed over with a warning line.

        Raises:
            InputError: there are checkpoints, and all are damaged.
        """
        folder = self.path / "checkpoints" / stage
        steps = entries.steps(folder)
        for step in reversed(steps):
            try:
                return entries.read(folder / f"{step:08d}")
            except InputError as damage:
                print(f"warning: {damage}; trying the checkpoint before it", file=sys.stderr)
        if steps:
            damaged = "the only checkpoint is" if len(steps) == 1 else f"all {len(steps)} checkpoints are"
            raise InputError(f"{folder}: {damaged} damaged; remove it to start the stage again")
        return None

    def checkpoint_steps(self, stage: str) -> list[int]:
        """The steps of the checkpoints that are kept, oldest first."""
        return entries.steps(self.path / "checkpoints" / stage)

    # The best: chosen by the monitored metric.

    def save_best(
        self,
        stage: str,
        value: float,
        low: float,
        high: float,
        tensors: dict,
        state: dict,
        change_high: float | None = None,
    ) -> bool:
        """Keeps `tensors` as the stage's best if `is_better` says so.

        Args:
            stage: name of the stage.
            value: the monitored metric, smaller is better.
            low, high: its confidence interval; equal to `value` where there is none.
            tensors: arrays by name.
            state: what else to remember, such as "step", "epoch" and the metric's "protocol".
            change_high: see `is_better`.

        Returns:
            Whether it was kept.

        Raises:
            InputError: the best so far was measured by another protocol, or the disk is full or read-only.
        """
        folder = self.path / "best" / stage
        best = self.best_state(stage)
        if best is not None:
            protocols = {"protocol": plain(state.get("protocol"))}, {"protocol": best.get("protocol")}
            refuse_differences(folder, "protocol", *protocols)
        if not is_better(value, best, change_high):
            return False
        with self._writing(folder):
            state = {"value": value, "low": low, "high": high, **state}
            entries.write(folder, state.get("step", 0), tensors, state)
        return True

    def best_state(self, stage: str) -> dict | None:
        """The state of the best so far, with its `value`, `low` and `high`, without reading tensors."""
        folder = entries.place_of(self.path / "best" / stage)
        return entries.read_state(folder)["state"] if folder.exists() else None

    def best(self, stage: str) -> Saved | None:
        """The best so far; its state holds `value`, `low` and `high` too. InputError if damaged."""
        folder = self.path / "best" / stage
        try:
            return entries.read(folder)
        except InputError as damage:
            raise InputError(f"{damage}; remove {folder} to have the best chosen anew") from damage

    # Averages: of the weights, now and then, from which others can be rebuilt.

    def save_average(self, stage: str, step: int, tensors: dict[str, np.ndarray]) -> None:
        """Keeps averages of the weights at `step`, in 16 bits where these can hold them."""
        folder = self.path / "averages" / stage
        with self._writing(folder):
            small = {name: _halved(array) for name, array in tensors.items()}
            entries.write(folder / f"{step:08d}", step, small, {})

    def average_steps(self, stage: str) -> list[int]:
        """The steps of the averages that are kept, oldest first."""
        return entries.steps(self.path / "averages" / stage)

    def average(self, stage: str, step: int) -> dict[str, np.ndarray]:
        """The averages kept at `step`. InputError if damaged or not there."""
        folder = self.path / "averages" / stage / f"{step:08d}"
        saved = entries.read(folder)
        if saved is None:
            raise InputError(f"{folder}: there is none, expected the averages of that step")
        return saved.tensors

    # Networks: the final weights of a finished stage.

    def finish(self, stage: str, tensors: dict[str, np.ndarray], state: dict) -> None:
        """Keeps the final weights of a stage, which marks the stage as finished."""
        folder = self.path / "networks" / stage
        with self._writing(folder):
            entries.write(folder, state.get("step", 0), tensors, state)

    def finished(self, stage: str) -> Saved | None:
        """The final weights of a stage, or None while it is not finished. InputError if damaged."""
        return entries.read(self.path / "networks" / stage)

    def discard(self, stage: str) -> None:
        """Removes the final weights of a stage, where there are any."""
        with self._writing(self.path / "networks"):
            entries.remove(self.path / "networks" / stage)

    # The log.

    def log(self, row: dict) -> None:
        """Appends a row to `log.jsonl`; its "stage" and "step" let a resumed run drop what it repeats."""
        file = self.path / "log.jsonl"
        with self._writing(file), open(file, "ab") as log:
            log.write(json.dumps(plain(row)).encode() + b"\n")
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
            _write(file, "".join(json.dumps(row) + "\n" for row in rows))

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


def is_better(value: float, best: dict | None, change_high: float | None = None) -> bool:
    """Whether `value` of a metric, smaller is better, replaces the best so far.

    What is not finite never wins, and the first finite value always does. After that a value that is only lower does
    not: many epochs are compared, and the luckiest measurement of equal networks would win. Where the change itself
    was measured, its interval must lie below 0; otherwise the value must lie below the interval of the best. The
    comparison is always with the best, so slow but steady progress wins in the end.

    Args:
        value: the new value.
        best: dict with "value" and "low", as `RunFolder.best_state` returns it, or None.
        change_high: upper end of the interval of what the value is less the best's, or None where it was not measured.
    """
    if not math.isfinite(value):
        return False
    if best is None or not _is_finite(best.get("value")):
        return True
    if change_high is not None:
        return bool(change_high < 0)
    low = best.get("low")
    return bool(value < (low if _is_finite(low) else best["value"]))


def _refuse_other_config(config_file: Path, config: dict) -> None:
    way_out = "give --run another folder, or the settings of this one"
    refuse_differences(config_file, "config", config, read_json(config_file), way_out=way_out)


def _halved(array: np.ndarray) -> np.ndarray:
    """The array in 16 bits, or as it is where these cannot hold it."""
    with np.errstate(over="ignore"):
        small = array.astype("float16")
    return small if np.isfinite(small).all() else array


def _is_finite(value) -> bool:
    return value is not None and math.isfinite(value)


def _write(file: Path, text: str) -> None:
    with replacing(file) as stream:
        stream.write(text.encode())


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
