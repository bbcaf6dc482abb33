"""The benchmark of an autoencoder's training times two sides that train the same, and nothing else."""

import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from benchmarks import vae  # noqa: E402

TINY = vae.Size((8, 16), 32, 4, groups=4, judge_channels=4)
PLAIN = {"loss", "recon_loss", "kl_loss"}


@pytest.mark.parametrize(
    ("losses", "named"),
    [("plain", PLAIN), ("adversarial", PLAIN | {"gen_loss", "disc_loss", "adversarial_weight"})],
)
def test_both_sides_train_the_same(losses, named, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(vae.SIZES, "small", TINY)
    path = tmp_path / "figures.json"
    assert vae.main(vae.Options(losses=losses, rounds=1, steps=2, json=str(path))) == 0
    figures = json.loads(path.read_text())
    assert figures == json.loads(capsys.readouterr().out)
    ours, theirs = (figures["losses of the first step"][name] for name in ("cup3", "diffusers"))
    assert theirs.keys() == named <= ours.keys()
    for name, value in theirs.items():
        tolerance = 1e-3 if name == "adversarial_weight" else 1e-4
        assert abs(value) > 1e-3 and ours[name] == pytest.approx(value, rel=tolerance)
    for side, steps in figures["seconds, by the clock and of all threads"].items():
        assert len(steps) == 2
        assert figures["pictures a second"][side] == pytest.approx(
            4 / statistics.median(wall for wall, _ in steps)
        )
        assert figures["peak memory, MiB"][side] >= figures["of it before the first step"][side] > 50
    assert figures["versions"].keys() == {"tensorflow", "keras", "torch", "diffusers"}


class Told:
    """Stands for a side that took the steps `made`."""

    made = ()

    def __init__(self, build, *arguments):
        self.facts = {"cores": 2, "parameters": 3, "versions": {}, "resting": 1.0}
        self._steps = iter(self.made[build.__name__])
        (self.first,) = self.steps(1)
        self.seconds_to_first_step = 1.0

    def steps(self, count):
        return [next(self._steps) for _ in range(count)]

    def finish(self):
        return 200.0


def steps(losses, walls=(9, 9, 9, 9)):
    """The first step, the second, and those that are timed; these take twice as long on all threads."""
    return [
        vae.Step({"kl_loss": 0.1, "loss": loss}, wall, 2 * wall)
        for loss, wall in zip([*losses, 0, 0], walls, strict=True)
    ]


def told(monkeypatch, ours, theirs):
    monkeypatch.setattr(Told, "made", {"our_side": ours, "their_side": theirs})
    monkeypatch.setattr(vae, "Side", Told)


def test_rates_are_of_the_timed_steps_only(monkeypatch):
    told(monkeypatch, steps((1.0, 0.5), (50, 40, 2, 4)), steps((1.00005, 0.504), (1, 1, 7, 14)))
    figures = vae.measure(vae.Options(rounds=1, steps=2))
    assert figures["seconds a step"] == {"cup3": 3, "diffusers": 10.5}
    assert figures["least seconds a step"] == {"cup3": 2, "diffusers": 7}
    assert figures["ratio"] == figures["ratio of the least seconds"] == pytest.approx(3.5)
    assert figures["ratio of the least seconds of all threads"] == pytest.approx(3.5)
    assert figures["pictures a second"] == pytest.approx({"cup3": 16 / 3, "diffusers": 16 / 10.5})
    first, second = (figures["relative differences of the losses"][which] for which in ("first", "second"))
    assert first == pytest.approx({"kl_loss": 0, "loss": 5e-5}, rel=1e-3)
    assert second == pytest.approx({"kl_loss": 0, "loss": 0.004 / 0.504})


@pytest.mark.parametrize(
    ("losses", "which"),
    [((1.0002, 0.5), "first"), ((1.0, 0.51), "second"), ((float("nan"), 0.5), "first")],
)
def test_sides_that_do_not_train_the_same_have_no_figures(losses, which, monkeypatch, tmp_path, capsys):
    told(monkeypatch, steps((1.0, 0.5)), steps(losses))
    path = tmp_path / "figures.json"
    with pytest.raises(RuntimeError, match=f"losses of the {which} step differ"):
        vae.main(vae.Options(rounds=1, steps=2, json=str(path)))
    assert capsys.readouterr().out == "" and not path.exists()


def test_peak_memory_is_of_the_process_alone():
    """And not of the one that started it, as the system's own figure is; 200 MiB are taken and given back."""
    code = "from benchmarks.vae import peak_memory as peak; a = peak(); b'x' * 200 * 2**20; print(a, peak())"
    root = Path(vae.__file__).parent.parent
    printed = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True).stdout
    first, after = map(float, printed.split())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 > 300 > 150 > first
    assert 190 < after - first < 210


@pytest.mark.parametrize("name", ["rounds", "steps"])
def test_rates_that_cannot_be_measured_are_refused(name, capsys):
    assert vae.main(vae.Options(**{name: 0})) == 2
    assert capsys.readouterr().err == f"vae: --{name}: received 0, expected at least 1\n"


def test_rates_without_diffusers_are_refused(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert vae.main(vae.Options()) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "give `pip install -r requirements-oracle.txt` first" in printed
