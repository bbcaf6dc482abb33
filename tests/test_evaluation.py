"""A trained run is measured as in its training, and averages of other lengths beside it, of the same noise."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import cup3
from checkpoint import RunFolder
from errors import InputError
from generate import load, rebuilt_average
from metrics import KID, Estimate
from stages import evaluation
from tests.tiny_runs import refusal

LENGTHS = (0.05, 0.10, 0.15)


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def few_lengths(monkeypatch):
    monkeypatch.setattr(evaluation, "SWEPT_LENGTHS", LENGTHS)


def test_a_runs_kid_is_that_of_its_best_checkpoint(copy, capsys):
    assert cup3.main(["evaluate", "--run", str(copy)]) == 0
    best = RunFolder.read(copy).best_state("diffusion")
    measured = json.loads((copy / "metrics.json").read_text())
    assert measured["kid"] == pytest.approx({name: best[name] for name in ("value", "low", "high")}, rel=1e-4)
    assert measured["protocol"] == best["protocol"]
    assert measured["weights"] == {"step": best["step"], "length": None, "weak_step": 4}
    assert (best["step"], best["weak_step"]) == (6, 4)
    assert f"KID: {best['value']:.4f} [" in capsys.readouterr().out
    assert not (copy / "ema_sweep.png").exists()


def with_averages(path, scales):
    """Keeps averages in a run that are its chosen weights times a factor by the length."""
    with RunFolder.open(path, RunFolder.read(path).config) as run:
        saved = run.best("diffusion").tensors
        for step in (8, 16, 24):
            run.save_average(
                "diffusion",
                step,
                {
                    f"average/{length}/{name.removeprefix('ema_')}": scale * tensor
                    for length, scale in scales.items()
                    for name, tensor in saved.items()
                    if name.startswith("ema_")
                },
            )


@pytest.mark.parametrize(("better", "adopted"), [(True, True), (False, False)])
def test_only_an_average_that_is_surely_better_draws_from_then_on(
    copy, few_lengths, monkeypatch, better, adopted
):
    with_averages(copy, {0.05: 0.5, 0.1: 2.0})

    def less(kid, features):
        value = -0.2 if better else -0.001
        return Estimate(value, value - 0.01, value + 0.01)

    monkeypatch.setattr(KID, "less", less)
    assert cup3.main(["evaluate", "--run", str(copy), "--ema-sweep"]) == 0
    sweep = json.loads((copy / "ema_sweep.json").read_text())
    assert [row["length"] for row in sweep["rows"]] == list(LENGTHS)
    kids = [row["kid"]["value"] for row in sweep["rows"]]
    assert len(set(kids)) == len(kids)
    assert sweep["length"] == LENGTHS[int(np.argmin(kids))]
    assert sweep["adopted"] == adopted
    assert sweep["trained"]["value"] == pytest.approx(
        RunFolder.read(copy).best_state("diffusion")["value"], rel=1e-4
    )
    assert Image.open(copy / "ema_sweep.png").size[0] > 300
    run, measured = RunFolder.read(copy), json.loads((copy / "metrics.json").read_text())
    assert measured["weights"]["length"] == (sweep["length"] if adopted else None)
    expected = (rebuilt_average(run, sweep["length"]) if adopted else {}) or run.best("diffusion").tensors
    for weight in load(copy)[0].unet.weights:
        np.testing.assert_array_equal(weight, expected[f"ema_unet/{weight.path}"], err_msg=weight.path)
    drawn = min(kids) if adopted else sweep["trained"]["value"]
    assert measured["kid"]["value"] == pytest.approx(drawn, rel=1e-4)
    assert measured["weights"]["weak_step"] == (8 if adopted else 4)  # of step 24, or 6
    again = evaluation.evaluate(copy)  # by what `load` gives, which draws
    assert again["kid"]["value"] == pytest.approx(drawn, rel=1e-4)
    assert again["weights"] == measured["weights"]
    assert load(copy)[0].weak is not None


def test_a_sweep_that_finds_nothing_better_takes_back_the_one_before(copy, few_lengths, monkeypatch):
    monkeypatch.setattr(KID, "less", lambda *_: Estimate(-1.0, -2.0, -0.5))
    assert evaluation.evaluate(copy, ema_sweep=True)["weights"]["length"] in LENGTHS
    monkeypatch.setattr(KID, "less", lambda *_: Estimate(-1.0, -2.0, 0.5))
    assert evaluation.evaluate(copy, ema_sweep=True)["weights"]["length"] is None
    assert RunFolder.read(copy).finished("diffusion") is None


@pytest.mark.parametrize(
    ("lost", "line"),
    [("averages", "received a run without averages"), ("curves.png", "a run that is still to be trained")],
)
def test_what_cannot_be_swept_is_refused_before_it_is_measured(copy, capsys, lost, line):
    shutil.rmtree(copy / lost) if (copy / lost).is_dir() else (copy / lost).unlink()
    assert line in refusal(capsys, ["evaluate", "--run", str(copy), "--ema-sweep"])
    assert not (copy / "metrics.json").exists()


def test_gpus_that_cannot_be_are_refused(copy, capsys):
    line = refusal(capsys, ["evaluate", "--run", str(copy), "--gpus", "first"])
    assert line == "--gpus: received 'first', expected all, none, or indices such as 0,2"


def test_no_run_is_refused(tmp_path, capsys):
    assert "expected --run with the folder of a run" in refusal(capsys, ["evaluate", "--run", str(tmp_path)])


def test_devices_are_chosen_before_tensorflow_makes_a_variable(copy, monkeypatch):
    order = []

    def strategy_on(gpus, batches):
        order.append(gpus)
        raise InputError("stop")

    monkeypatch.setattr(evaluation, "strategy_on", strategy_on)
    monkeypatch.setattr(evaluation, "load", lambda path: order.append("load"))
    with pytest.raises(InputError, match="stop"):
        evaluation.evaluate(copy, gpus="none")
    assert order == ["none"]
