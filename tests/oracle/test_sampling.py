"""The benchmark of pictures a second lets both sides draw the same pictures."""

import json

import pytest

from benchmarks import sampling

pytest.importorskip("torch")
pytest.importorskip("diffusers")

TINY = sampling.Size(4, (8, 16), (False, True), 1, head_channels=4, context_shape=(5, 6), groups=4)


def test_our_rate_and_diffusers_are_of_the_same_pictures(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sampling.SIZES, "small", TINY)
    path = tmp_path / "figures.json"
    assert sampling.main(sampling.Options(batch=3, steps=4, rounds=3, json=str(path))) == 0
    figures = json.loads(path.read_text())
    assert figures == json.loads(capsys.readouterr().out)
    assert figures["largest difference of a pixel"] <= 1 and figures["spread of the pixels"] > 5
    assert figures["evaluations a picture"] == 8
    rates, taken = figures["pictures a second"], figures["seconds, by the clock and of all threads"]
    assert rates.keys() == taken.keys() and "cup3" in rates and len(rates) >= 2
    for name, rounds in taken.items():
        assert rates[name] == pytest.approx(3 / sorted(clock for clock, _ in rounds)[1])
    ours = rates.pop("cup3")
    assert figures["ratio"] == pytest.approx(ours / max(rates.values()))


def test_pictures_of_other_weights_would_differ(monkeypatch):
    monkeypatch.setitem(sampling.SIZES, "small", TINY)
    monkeypatch.setattr(sampling, "take_weights", lambda unet, theirs: None)
    figures = sampling.measure(sampling.Options(batch=2, steps=2, rounds=1))
    assert figures["largest difference of a pixel"] > 5
