"""What is saved comes back, whole or not at all, whatever happens to the disk or the process."""

import errno
import math
import os
import time

import numpy as np
import pytest

from checkpoint import RunFolder
from errors import InputError
from tests.run_folders import file_size_limit, python, tensors

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


# Crashes.

CRASHER = """
import os, shutil, sys
from checkpoint import RunFolder
from tests.test_entries import fill

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
import sys; from checkpoint import RunFolder; from tests.run_folders import tensors
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
