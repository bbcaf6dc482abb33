"""A run folder keeps what it was given, and gives it to the right run only."""

import contextlib
import json
import math
import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest

from checkpoint import RunFolder, is_better
from errors import InputError
from tests.run_folders import CONFIG, file_size_limit, python, tensors

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


@pytest.mark.parametrize(
    ("value", "best", "change", "wins"),
    [
        (0.049, BEST, -0.001, True),  # inside the interval of the best, but surely lower
        (0.01, BEST, 0.001, False),  # below it, but not surely lower
        (0.01, BEST, math.nan, False),
        (0.01, BEST, 0.0, False),  # the very same pictures
        (math.nan, BEST, -0.001, False),
        (0.9, None, 0.001, True),
    ],
)
def test_a_measured_change_decides(value, best, change, wins):
    assert is_better(value, best, change) is wins


def test_a_damaged_best_is_refused_with_a_way_out(run):
    run.save_best("unet", 0.3, 0.2, 0.4, tensors(1), {"step": 1})
    (file,) = (run.path / "best").glob("unet/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"damaged: .*; remove .*best.unet to have the best chosen anew$"):
        run.best("unet")


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


def test_a_row_that_did_not_fit_is_not_read(run):
    run.log({"stage": "vae", "step": 1})
    with file_size_limit(50_000), pytest.raises(InputError, match=r"log\.jsonl: cannot be written"):
        run.log({"stage": "vae", "step": 2, "note": "x" * 100_000})
    assert [row["step"] for row in run.rows()] == [1]
    run.close()
    with RunFolder.open(run.path, CONFIG) as resumed:
        resumed.log({"stage": "vae", "step": 3})
        assert [row["step"] for row in resumed.rows()] == [1, 3]


# A folder that cannot be written.


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
