"""A trained run is measured as in its training, and averages of other lengths beside it, of the same noise."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import cup3
from checkpoint import RunFolder
from generate import load, rebuilt_average
from metrics import Estimate
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
    assert f"KID: {best['value']:.4f} [" in capsys.readouterr().out
    assert not (copy / "ema_sweep.png").exists()


def test_the_sweep_measures_every_length_and_the_best_draws(copy, few_lengths, capsys):
    assert cup3.main(["evaluate", "--run", str(copy), "--ema-sweep"]) == 0
    sweep = json.loads((copy / "metrics.json").read_text())["ema_sweep"]
    assert [row["length"] for row in sweep["rows"]] == list(LENGTHS)
    values = [row["kid"] for row in sweep["rows"]]
    assert sweep["gain"] == pytest.approx(sweep["trained"]["value"] - min(values))
    assert sweep["length"] == LENGTHS[int(np.argmin(values))]
    assert Image.open(copy / "ema_sweep.png").size[0] > 300
    run, told = RunFolder.read(copy), capsys.readouterr().out
    if sweep["gain"] > 0:
        assert "it draws from now on" in told
        expected = rebuilt_average(run, sweep["length"])
        for weight in load(copy)[0].unet.weights:
            np.testing.assert_array_equal(weight, expected[f"ema_unet/{weight.path}"], err_msg=weight.path)
    else:
        assert "none has a lower KID" in told
        assert run.finished("diffusion") is None


@pytest.mark.parametrize(("trained", "adopted"), [(10.0, True), (-10.0, False)])
def test_only_a_better_average_takes_the_place_of_the_trained(
    copy, monkeypatch, few_lengths, trained, adopted
):
    values = iter([0.5, trained, 0.3, 0.2, 0.4])  # the run's own, training's, and of the lengths
    monkeypatch.setattr(evaluation, "measured_kid", lambda *_, **__: Estimate(*[next(values)] * 3))
    result = evaluation.evaluate(copy, ema_sweep=True)["ema_sweep"]
    assert result["length"] == 0.10
    assert result["gain"] == pytest.approx(trained - 0.2)
    saved = RunFolder.read(copy).finished("diffusion")
    assert (saved is not None) == adopted
    if adopted:
        assert saved.state == {"length": 0.1, "kid": 0.2, "gain": pytest.approx(9.8)}


def test_a_run_without_averages_is_refused_before_it_is_measured(copy, capsys):
    shutil.rmtree(copy / "averages")
    assert "received a run without averages" in refusal(
        capsys, ["evaluate", "--run", str(copy), "--ema-sweep"]
    )
    assert not (copy / "metrics.json").exists()


def test_no_run_is_refused(tmp_path, capsys):
    assert "expected --run with the folder of a run" in refusal(capsys, ["evaluate", "--run", str(tmp_path)])
