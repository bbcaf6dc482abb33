"""A run folder keeps what it was given, whole or not at all, and gives it to the right run only."""

import contextlib
import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import checkpoint
from checkpoint import RunFolder, assign, collect, is_better
from errors import InputError

ROOT = Path(checkpoint.__file__).parent
CONFIG = {"seed": 1, "vae": {"levels": (32, 64), "rate": 1e-3}, "unet": {"width": 96}}


@pytest.fixture
def run(tmp_path):
    with RunFolder.open(tmp_path / "run", CONFIG) as run:
        yield run


def tensors(value, size=6):
    return {"w": np.full((size,), value, "float32"), "n": np.array(value)}


def python(script, *arguments, **options):
    """Starts a Python process in the repository's root."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )


# The folder and its config.


def test_a_new_folder_explains_itself_and_reopens(tmp_path):
    with RunFolder.open(tmp_path / "a" / "run", CONFIG) as run:
        assert json.loads((run.path / "config.json").read_text())["vae"] == {"levels": [32, 64], "rate": 1e-3}
        assert run.sample_path("x.png").parent.is_dir()
        assert run.cache_path("x.npy").parent.is_dir()
    with RunFolder.open(tmp_path / "a" / "run", CONFIG) as run:
        assert run.config == RunFolder.read(run.path).config


def test_another_config_is_refused_with_each_differing_key(run):
    run.close()
    config = {"seed": 2, "vae": {"levels": (32, 64), "rate": 1e-3, "tricks": True}, "unet": {}}
    before = (run.path / "config.json").read_bytes()
    with pytest.raises(InputError) as refusal:
        RunFolder.open(run.path, config)
    assert str(refusal.value) == (
        f"{run.path / 'config.json'}: another config: seed received 2, expected 1; "
        "unet received {}, expected nothing; unet.width received nothing, expected 96; "
        "vae.tricks received True, expected nothing; give --run another folder, or the settings of this one"
    )
    with pytest.raises(InputError) as early:
        RunFolder.check(run.path, config)
    assert str(early.value) == str(refusal.value)
    assert (run.path / "config.json").read_bytes() == before
    RunFolder.open(run.path, CONFIG).close()  # the refusal left no lock


def test_checking_a_folder_makes_and_changes_nothing(run, tmp_path):
    RunFolder.check(tmp_path / "new", CONFIG)
    assert not (tmp_path / "new").exists()
    before = {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    with pytest.raises(
        InputError, match=f"process {os.getpid()} works on this run.* give --run another folder"
    ):
        RunFolder.check(run.path, CONFIG)
    run.close()
    RunFolder.check(run.path, CONFIG)
    assert {path: path.read_bytes() for path in before} == before
    RunFolder.open(run.path, CONFIG).close()  # and holds nothing


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(
        InputError, match=r"holds thesis\.txt and no config\.json.* give --run another folder"
    ):
        RunFolder.open(tmp_path, CONFIG)
    with pytest.raises(InputError, match=r"holds thesis\.txt and no config\.json"):
        RunFolder.check(tmp_path, CONFIG)
    with pytest.raises(InputError, match="received a file, expected a folder"):
        RunFolder.open(tmp_path / "thesis.txt", CONFIG)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_folder_that_died_before_its_config_is_taken(tmp_path):
    (tmp_path / ".lock").write_text("123")
    RunFolder.open(tmp_path, CONFIG).close()
    assert RunFolder.read(tmp_path).config["seed"] == 1


def refuse(path, before=lambda run: None):
    """Opens the folder and meets input that cannot be used, after doing `before`."""
    with pytest.raises(InputError, match="bad data"), RunFolder.open(path, CONFIG) as run:
        before(run)
        raise InputError("bad data")


def test_a_new_run_that_is_refused_does_not_hold_its_folder(tmp_path):
    refuse(tmp_path / "run", lambda run: run.cache_path("pictures.npy").write_text("1"))
    assert not (tmp_path / "run").exists()
    RunFolder.open(tmp_path / "run", {"seed": 2}).close()


def test_a_refusal_takes_nothing_from_a_run_that_has_something(tmp_path):
    refuse(tmp_path / "trained", lambda run: run.save("vae", 3, tensors(3), {}))
    assert RunFolder.read(tmp_path / "trained").latest("vae").step == 3
    RunFolder.open(tmp_path / "older", CONFIG).close()
    refuse(tmp_path / "older")
    assert (tmp_path / "older" / "config.json").exists()
    with pytest.raises(KeyboardInterrupt), RunFolder.open(tmp_path / "stopped", CONFIG):
        raise KeyboardInterrupt
    assert (tmp_path / "stopped" / "config.json").exists()


@pytest.mark.parametrize("text", ["", '{"seed":', "[1]"])
def test_a_damaged_config_is_refused(run, text):
    run.close()
    (run.path / "config.json").write_text(text)
    for opened in (lambda: RunFolder.open(run.path, CONFIG), lambda: RunFolder.read(run.path)):
        with pytest.raises(InputError, match=r"config\.json: "):
            opened()


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_reading_what_is_no_run_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=rf"{name}: .* without config\.json"):
        RunFolder.read(tmp_path / name)
    assert os.listdir(tmp_path / "empty") == []


def test_a_reader_sees_what_a_writer_saved_but_cannot_write(run):
    run.save("vae", 3, tensors(3), {})
    reader = RunFolder.read(run.path)
    assert reader.latest("vae").step == 3
    for write in (
        lambda: reader.save("vae", 4, tensors(4), {}),
        lambda: reader.save_best("vae", 1.0, 1.0, 1.0, tensors(4), {}),
        lambda: reader.finish("vae", tensors(4), {}),
        lambda: reader.log({"loss": 1}),
        lambda: reader.truncate_log("vae", 0),
    ):
        with pytest.raises(RuntimeError, match="reading only"):
            write()
    assert run.latest("vae").step == 3


# Two processes.

HOLDER = """
import sys; from checkpoint import RunFolder
run = RunFolder.open(sys.argv[1], {}); print("ready", flush=True); sys.stdin.read()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_names_its_process_and_dies_with_it(tmp_path, end):
    with python(HOLDER, tmp_path / "run") as holder:
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(InputError, match=f"process {holder.pid} works on this run"):
            RunFolder.open(tmp_path / "run", {})
        holder.send_signal(end)
    RunFolder.open(tmp_path / "run", {}).close()


def test_one_process_cannot_open_a_run_twice(run):
    with pytest.raises(InputError, match=f"process {os.getpid()} works on this run"):
        RunFolder.open(run.path, CONFIG)


# Checkpoints.


def test_a_checkpoint_returns_what_was_saved(run):
    saved = {
        "matrix": np.arange(12, dtype="float32").reshape(3, 4),
        "turned": np.arange(12, dtype="float32").reshape(3, 4).T,  # not in C order
        "every other": np.arange(8)[::2],
        "scalar": np.array(7, "int64"),
        "empty": np.zeros((0, 3), "float32"),
        "odd": np.array([np.nan, np.inf, -0.0, 1e-45], "float32"),
    }
    run.save(
        "vae", 12, saved, {"epoch": np.int64(3), "loss": np.float32(0.5), "bad": math.nan, "ids": (1, 2)}
    )
    step, loaded, state = run.latest("vae")
    assert step == 12
    assert loaded.keys() == saved.keys()
    for name, array in saved.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array, strict=True)
    assert np.signbit(loaded["odd"][2])
    assert state == {"epoch": 3, "loss": 0.5, "bad": None, "ids": [1, 2]}


def test_the_newest_two_of_each_stage_are_kept(run):
    assert run.latest("vae") is None
    for step in (9, 10, 100):
        run.save("vae", step, tensors(step), {})
    run.save("unet", 1, tensors(1), {})
    assert sorted(os.listdir(run.path / "checkpoints" / "vae")) == ["00000010", "00000100"]
    assert (run.latest("vae").step, run.latest("unet").step) == (100, 1)


def test_saving_a_step_again_replaces_it(run):
    run.save("vae", 5, tensors(1), {"v": 1})
    run.save("vae", 5, tensors(2), {"v": 2})
    assert run.latest("vae").tensors["n"] == 2
    assert os.listdir(run.path / "checkpoints" / "vae") == ["00000005"]


def spoil(folder, how):
    file = folder / ("state.json" if "state" in how else "tensors.safetensors")
    content = bytearray(file.read_bytes())
    if how == "flipped bit":
        content[-3] ^= 1
    if how == "cut tensors":
        content = content[:-1]
    if how == "cut state":
        content = content[:20]
    if how == "state of another program":
        content = b"{}"
    file.write_bytes(content)
    if how.startswith("no"):
        file.unlink()


DAMAGES = ["flipped bit", "cut tensors", "cut state", "state of another program", "no tensors", "no state"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(run, capsys, how):
    for step in (1, 2):
        run.save("vae", step, tensors(step), {})
    spoil(run.path / "checkpoints" / "vae" / "00000002", how)
    assert run.latest("vae").tensors["n"] == 1
    assert capsys.readouterr().err.count("\n") == 1
    run.save("vae", 2, tensors(2), {})  # what the resumed run does next
    assert run.latest("vae").tensors["n"] == 2
    assert capsys.readouterr().err == ""

    for step in (1, 2):
        spoil(run.path / "checkpoints" / "vae" / f"{step:08d}", how)
    with pytest.raises(InputError, match="all 2 checkpoints are damaged"):
        run.latest("vae")
    shutil.rmtree(run.path / "checkpoints" / "vae" / "00000001")
    with pytest.raises(
        InputError, match="the only checkpoint is damaged; remove it to start the stage again"
    ):
        run.latest("vae")


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_final_and_best_weights_are_refused(run, how):
    run.finish("vae", tensors(1), {})
    run.save_best("vae", 1.0, 0.9, 1.1, tensors(1), {})
    for kind, read in (("networks", run.finished), ("best", run.best)):
        spoil(run.path / kind / "vae", how)
        with pytest.raises(InputError, match=rf"{kind}/vae/"):
            read("vae")


def test_a_damaged_checkpoint_does_not_outlive_newer_work(run):
    for step in (10, 20):
        run.save("vae", step, tensors(step), {})
    spoil(run.path / "checkpoints" / "vae" / "00000020", "flipped bit")
    run.save("vae", 15, tensors(15), {})  # resumed from 10 and interrupted at 15
    assert sorted(os.listdir(run.path / "checkpoints" / "vae")) == ["00000010", "00000015"]


# Full and read-only disks.


@contextlib.contextmanager
def file_size_limit(size):
    """Lets writes beyond `size` bytes of a file fail, as they do on a full disk."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def fill(run, value, size=6):
    """Writes everything that a run writes."""
    state = {"v": value, "step": value}
    run.save("vae", value, tensors(value, size), state)
    run.save_best("vae", 1 / value, 1 / value, 1 / value, tensors(value, size), state)
    run.finish("vae", tensors(value, size), state)


def kept_value(run):
    """The value in each of what `fill` writes; asserts that each is whole."""
    entries = [run.latest("vae"), run.best("vae"), run.finished("vae")]
    for step, arrays, state in entries:
        np.testing.assert_array_equal(arrays["w"], np.full(arrays["w"].shape, state["v"]))
        assert step == state["v"] == arrays["n"]
    return [entry.step for entry in entries]


def test_a_full_disk_is_one_line_and_the_former_state_is_intact(run):
    fill(run, 1)
    listing = sorted(path.relative_to(run.path) for path in run.path.rglob("*"))
    state = {"v": 2, "step": 2}
    big = tensors(2, size=100_000)
    with file_size_limit(50_000):
        for write in (
            lambda: run.save("vae", 2, big, state),
            lambda: run.save_best("vae", 0.1, 0.1, 0.1, big, state),
            lambda: run.finish("vae", big, state),
            lambda: run.write_json("report.json", "x" * 100_000),
        ):
            with pytest.raises(InputError, match=r"cannot be written: .*File too large.* is intact$"):
                write()
    assert sorted(path.relative_to(run.path) for path in run.path.rglob("*")) == listing
    assert kept_value(run) == [1, 1, 1]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_each_error_of_the_disk_is_one_line(run, monkeypatch, code):
    fill(run, 1)

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        InputError, match=f"checkpoints/vae: cannot be written: {os.strerror(code)}"
    ) as refusal:
        run.save("vae", 2, tensors(2), {})
    assert "\n" not in str(refusal.value)
    assert os.listdir(run.path / "checkpoints" / "vae") == ["00000001"]


def test_a_row_that_did_not_fit_is_not_read(run):
    run.log({"stage": "vae", "step": 1})
    with file_size_limit(50_000), pytest.raises(InputError, match=r"log\.jsonl: cannot be written"):
        run.log({"stage": "vae", "step": 2, "note": "x" * 100_000})
    assert [row["step"] for row in run.rows()] == [1]
    run.close()
    with RunFolder.open(run.path, CONFIG) as resumed:
        resumed.log({"stage": "vae", "step": 3})
        assert [row["step"] for row in resumed.rows()] == [1, 3]


@contextlib.contextmanager
def without_privileges():
    """The superuser may write anywhere, so become nobody for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_read_only_folder_is_one_line():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to others
        path = Path(name)
        path.chmod(0o755)
        RunFolder.open(path / "run", CONFIG).close()
        (path / "run" / ".lock").chmod(0o444)
        (path / "run").chmod(0o555)
        path.chmod(0o555)
        with without_privileges():
            assert RunFolder.read(path / "run").config["seed"] == 1
            for place in ("run", "new"):
                with pytest.raises(InputError, match=rf"{place}: cannot be written: Permission denied"):
                    RunFolder.open(path / place, CONFIG)
        path.chmod(0o755)
        (path / "run").chmod(0o755)
        assert os.listdir(path) == ["run"]


# Crashes.

CRASHER = """
import os, shutil, sys
from checkpoint import RunFolder
from tests.test_checkpoint import fill

def die_at(call):
    calls = iter(range(1000))
    def bomb(module, name):
        function = getattr(module, name)
        def wrapped(*args, **kwargs):
            if next(calls) == call:
                os._exit(9)
            return function(*args, **kwargs)
        setattr(module, name, wrapped)
    for name in ("mkdir", "rename", "replace", "fsync"):
        bomb(os, name)
    bomb(shutil, "rmtree")

for call in range(1000):
    run = RunFolder.open(f"{sys.argv[1]}/{call}", {})
    fill(run, 1)
    child = os.fork()
    if not child:
        die_at(call)
        fill(run, 2)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
    run.close()
"""


def test_a_crash_at_any_call_to_the_disk_leaves_the_old_or_the_new(tmp_path):
    with python(CRASHER, tmp_path) as process:
        pass
    assert process.returncode == 0
    kept = []
    for path in sorted(tmp_path.iterdir(), key=lambda path: int(path.name)):
        kept.append(kept_value(RunFolder.read(path)))
        with RunFolder.open(path, {}) as run:  # the resumed run does the same work again
            fill(run, 2)
            assert kept_value(run) == [2, 2, 2]
        left = {place.name for place in (path / "best").iterdir()} | set(os.listdir(path / "networks"))
        assert left <= {"vae", ".vae.old"}  # the latter until the next write
    assert len(kept) > 20
    assert kept[0] == [1, 1, 1]
    assert kept[-1] == [2, 2, 2]
    assert kept == sorted(kept)  # no crash takes back what an earlier call made safe


WRITER = """
import sys; from checkpoint import RunFolder; from tests.test_checkpoint import tensors
run = RunFolder.open(sys.argv[1], {})
for step in range(1, 10**6):
    run.save("vae", step, tensors(step, 10**6), {"v": step})
    print(step, flush=True)
"""


def test_a_killed_writer_leaves_no_half_checkpoint(tmp_path, capsys):
    for delay in (0, 0.003, 0.01, 0.03):
        with python(WRITER, tmp_path) as writer:
            done = int(writer.stdout.readline())
            time.sleep(delay)
            writer.kill()
        step, arrays, state = RunFolder.read(tmp_path).latest("vae")
        assert step == state["v"] == arrays["n"] >= done
        np.testing.assert_array_equal(arrays["w"], np.full(10**6, step, "float32"))
    assert capsys.readouterr().err == ""  # nor a damaged one that was passed over


# The best.

BEST = {"value": 0.05, "low": 0.04, "high": 0.06}


@pytest.mark.parametrize(
    ("value", "best", "wins"),
    [
        (0.9, None, True),  # the first finite value always wins
        (math.nan, None, False),
        (math.inf, None, False),
        (-math.inf, None, False),
        (0.9, {"value": None, "low": None}, True),  # also over one that was not finite
        (0.9, {"value": math.nan, "low": math.nan}, True),
        (math.nan, BEST, False),
        (-math.inf, BEST, False),
        (0.06, BEST, False),
        (0.05, BEST, False),
        (0.041, BEST, False),  # a drop inside the interval
        (0.04, BEST, False),
        (0.039, BEST, True),
        (-0.001, BEST, True),  # an unbiased KID may be negative
        (0.049, {"value": 0.05, "low": None}, True),  # without interval, any drop
        (0.05, {"value": 0.05, "low": None}, False),
    ],
)
def test_is_better(value, best, wins):
    assert is_better(value, best) is wins
    assert is_better(np.float32(value), best) is wins or value == 0.04


def test_the_best_survives_a_resume(run):
    assert run.best("unet") is None
    assert run.best_state("unet") is None
    protocol = {"network": "lite0", "n_real": 512}
    epochs = [math.nan, 0.30, 0.29, 0.20, math.nan, 0.25, 0.185, 0.15]
    kept = []
    for epoch, value in enumerate(epochs):
        run.close()
        run = RunFolder.open(run.path, CONFIG)
        state = {"epoch": epoch, "step": 10 * epoch, "protocol": protocol}
        if run.save_best("unet", value, value - 0.02, value + 0.02, tensors(epoch), state):
            kept.append(epoch)
    assert kept == [1, 3, 7]
    step, arrays, state = run.best("unet")
    assert (step, int(arrays["n"])) == (70, 7)
    interval = {"value": 0.15, "low": pytest.approx(0.13), "high": pytest.approx(0.17)}
    assert state == {**interval, "epoch": 7, "step": 70, "protocol": protocol}
    assert run.best_state("unet") == state
    run.close()


def test_numbers_of_unlike_protocols_are_not_compared(run):
    run.save_best("unet", 0.3, 0.2, 0.4, tensors(1), {"protocol": {"size": 224, "steps": 20}})
    with pytest.raises(InputError, match=r"another protocol: protocol\.size received 299, expected 224$"):
        run.save_best("unet", 0.1, 0.1, 0.1, tensors(2), {"protocol": {"size": 299, "steps": 20}})
    assert run.best("unet").tensors["n"] == 1


def test_final_weights_mark_a_stage_as_finished(run):
    assert run.finished("vae") is None
    run.finish("vae", tensors(4), {"step": 40, "scale": 0.5})
    step, arrays, state = RunFolder.read(run.path).finished("vae")
    assert (step, int(arrays["n"]), state) == (40, 4, {"step": 40, "scale": 0.5})
    assert run.finished("unet") is None


# The log.


def test_the_log_keeps_rows_in_order_as_json(run):
    assert run.rows() == []
    rows = [
        {"stage": "vae", "step": 1, "loss": np.float32(0.5), "kid": math.nan},
        {"note": "größer", "n": np.int64(2)},
    ]
    for row in rows:
        run.log(row)
    assert run.rows() == [{"stage": "vae", "step": 1, "loss": 0.5, "kid": None}, {"note": "größer", "n": 2}]
    assert len((run.path / "log.jsonl").read_text().splitlines()) == 2


def test_a_resumed_run_drops_the_rows_it_repeats(run):
    for stage in ("vae", "unet"):
        for step in (10, 20, 30):
            run.log({"stage": stage, "step": step})
    run.truncate_log("unet", 20)
    assert [row["step"] for row in run.rows()] == [10, 20, 30, 10, 20]
    run.truncate_log("vae", 0)
    assert run.rows() == [{"stage": "unet", "step": 10}, {"stage": "unet", "step": 20}]


def test_a_row_that_is_no_json_is_refused(run):
    (run.path / "log.jsonl").write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"log\.jsonl: received a row that is no JSON"):
        run.rows()


# Variables.


class Variable:
    """As much of a Keras variable as the room uses."""

    def __init__(self, *shape, value=0.0):
        self.array = np.full(shape, value, "float32")
        self.shape = shape

    def __array__(self, dtype=None, copy=None):
        return self.array

    def assign(self, value):
        self.array[...] = value


def test_variables_come_back_under_their_prefix():
    raw = [
        ("a/kernel", Variable(2, 3, value=1)),
        ("a/bias", Variable(3, value=2)),
        ("rate", Variable(value=3)),
    ]
    ema = [(name, Variable(*variable.shape, value=9)) for name, variable in raw]
    saved = collect(raw, "raw") | collect(ema, "ema") | {"raw2/other": np.zeros(1)}
    assert {"raw/a/kernel", "ema/a/kernel"} < saved.keys()
    for _, variable in raw:
        variable.assign(7)
    assign(raw, saved, "raw")
    assert [variable.array.flat[0] for _, variable in raw] == [1, 2, 3]  # so the arrays were copies


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"raw/a": None}, "raw/a received nothing, expected (2, 3)"),
        ({"raw/c": np.zeros(4)}, "raw/c received (4,), expected nothing"),
        ({"raw/b": np.zeros((3, 1))}, "raw/b received (3, 1), expected (3,)"),
        ({"raw/b": np.zeros(())}, "raw/b received (), expected (3,)"),  # would be broadcast
        ({"raw/a": None, "raw/b": None}, "raw/a received nothing, expected (2, 3); raw/b received nothing"),
    ],
)
def test_other_weights_are_refused_and_nothing_is_assigned(change, message):
    variables = [("a", Variable(2, 3)), ("b", Variable(3))]
    saved = {"raw/a": np.ones((2, 3)), "raw/b": np.ones(3), "ema/z": np.ones(5)} | change
    saved = {name: array for name, array in saved.items() if array is not None}
    with pytest.raises(InputError) as refusal:
        assign(variables, saved, "raw", source="runs/x")
    assert str(refusal.value).startswith(f"runs/x: another set of variables: {message}")
    assert all((variable.array == 0).all() for _, variable in variables)


def test_a_long_list_of_differences_is_cut():
    with pytest.raises(InputError, match="; and 95 more$"):
        assign([(f"{i:02d}", Variable(1)) for i in range(100)], {}, "raw")


def test_two_variables_of_one_name_are_refused():
    twins = [("a", Variable(1)), ("b", Variable(1)), ("a", Variable(1))]
    for use in (lambda: collect(twins, "raw"), lambda: assign(twins, {}, "raw")):
        with pytest.raises(ValueError, match=r"one name: \['a'\]"):
            use()


def test_a_keras_network_and_its_optimizer_come_back(run):
    keras = pytest.importorskip("keras")

    def network(seed):
        keras.utils.set_random_seed(seed)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, name="d")], name="net")
        model.compile(keras.optimizers.AdamW(0.1, name="adamw"), "mse")
        model.fit(np.ones((8, 3)), np.zeros((8, 4)), epochs=seed, verbose=0)
        return model

    def parts(model):
        return [(v.path, v) for v in model.variables], [(v.path, v) for v in model.optimizer.variables]

    (weights, slots), (other_weights, other_slots) = parts(network(3)), parts(network(2))
    run.save("unet", 3, collect(weights, "raw") | collect(slots, "optimizer"), {})
    saved = run.latest("unet").tensors
    with pytest.raises(InputError, match="another set of variables"):
        assign(other_weights[:1], saved, "raw")  # a smaller network would fit into the file
    assert not np.array_equal(weights[0][1], other_weights[0][1])
    assign(other_weights, saved, "raw")
    assign(other_slots, saved, "optimizer")
    for (name, expected), (_, received) in zip(weights + slots, other_weights + other_slots):
        np.testing.assert_array_equal(received, expected, err_msg=name)
    assert int(dict(other_slots)["adamw/iteration"]) == 3
