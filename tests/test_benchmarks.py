"""What the benchmarks measure is what the run draws, and what they cannot measure is one line and exit code 2."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import config
import cup3
from benchmarks import guard, paper_flowers, parts, recipe, runs, samplers, sampling, tiles
from benchmarks.paper_flowers import Options, main
from diffusion.samplers import SAMPLERS
from diffusion.schedule import Process
from generate import Painter, load
from input_pipeline import load_data, read_pictures
from metrics import psnr
from trainer import reconstruct


def refusal(capsys, **options):
    assert main(Options(**options)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("paper_flowers: ").rstrip("\n")


def test_the_figures_are_those_of_the_runs_pictures(finished, flowers, tmp_path, monkeypatch, capsys):
    asked = []

    def follows_captions(painter, captions, seed, **settings):
        asked.append((captions, seed, settings))
        return {"n": len(captions)}

    monkeypatch.setattr(paper_flowers, "follows_captions", follows_captions)
    options = Options(
        run=str(finished[0]), count=5, steps=1, guidance=0.0, json=str(tmp_path / "figures.json")
    )
    assert main(options) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures == json.loads(capsys.readouterr().out)
    data = load_data(flowers)
    settings = {"steps": 1, "guidance": 0.0, "interval": (0.3, 0.7), "autoguidance": 1.5}
    settings |= {"sampler": "dpmpp-2m", "spacing": "trailing"}
    assert asked[0] == (data.vocabulary.decode(data.test_tokens[:5]), 1000, settings)
    held_out = [paper_flowers.HELD_OUT_PAIRS & pairs_of(caption) for caption in asked[1][0]]
    assert len(held_out) == 5 and all(held_out)
    networks, _ = load(finished[0])
    paths = sorted((flowers / "102flowers").iterdir())[48:]
    pictures = read_pictures(paths, 32, progress=False)
    assert figures["test PSNR"]["value"] == pytest.approx(
        psnr(pictures, reconstruct(networks.vae, pictures)).value
    )


def pairs_of(caption):
    words = caption.split()
    return {(petal, center) for petal in words for center in words}


def test_the_runs_own_settings_are_taken_where_none_is_given(finished, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Painter, "draw", lambda self, tokens, seeds, **settings: seen.append(settings) or drawn(tokens)
    )
    assert main(Options(run=str(finished[0]), count=3)) == 0
    assert [(settings["steps"], settings["guidance"]) for settings in seen] == [(2, 2.0)] * 2
    assert [(settings["sampler"], settings["spacing"]) for settings in seen] == [("dpmpp-2m", "trailing")] * 2


def drawn(tokens):
    return np.zeros((len(tokens), 32, 32, 3), "uint8")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"steps": 0}, "--steps: received 0, expected at least 1"),
        ({"count": -1}, "--count: received -1, expected at least 1"),
        (
            {"run": "absent"},
            "absent: received a folder without config.json, expected the folder of a run, which "
            "`python cup3.py --run FOLDER` makes",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys, options, line):
    assert refusal(capsys, **options) == line


def test_more_steps_than_the_spacing_of_the_run_has_are_refused(finished, capsys):
    line = "--steps: received 1001 with --spacing trailing, expected at most 1000"
    assert refusal(capsys, run=str(finished[0]), steps=1001) == line


def test_a_run_on_other_data_is_refused(finished, photographs, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    for entry in finished[0].iterdir():
        os.symlink(entry, folder / entry.name)
    (folder / "config.json").unlink()
    config = json.loads((finished[0] / "config.json").read_text()) | {"data": str(photographs)}
    (folder / "config.json").write_text(json.dumps(config))
    line = refusal(capsys, run=str(folder))
    assert line.startswith(f"--run: received {folder}, whose data {photographs} are no paper flowers")


@pytest.mark.parametrize(
    ("sampler", "steps", "guidance", "interval", "autoguidance", "evaluations"),
    [
        ("ddim", 4, 1.0, (0.0, 1.0), 1.0, 4),
        ("ddim", 4, 3.0, (0.0, 1.0), 1.0, 8),
        ("ddim", 4, 1.0, (0.0, 1.0), 2.0, 8),
        ("dpmpp-2m", 4, 3.0, (0.3, 0.8), 1.0, 6),  # at times 1, 0.75, 0.5 and 0.25
        ("dpmpp-2m", 4, 3.0, (0.3, 0.8), 2.0, 10),
        ("heun", 4, 3.0, (0.0, 1.0), 1.0, 14),
    ],
)
def test_evaluations_count_twice_where_guidance_acts(
    sampler, steps, guidance, interval, autoguidance, evaluations
):
    settings = {"steps": steps, "guidance": guidance, "interval": interval, "spacing": "uniform"}
    settings["autoguidance"] = autoguidance
    assert samplers.asked(Process(), sampler, settings) == pytest.approx(evaluations)


def test_every_sampler_is_measured_and_plotted(finished, tmp_path, monkeypatch, capsys):
    chosen = {name: SAMPLERS[name] for name in ("ddim", "heun")}
    monkeypatch.setattr(samplers, "SAMPLERS", chosen)
    plotted = tmp_path / "plot.png"
    options = samplers.Options(str(finished[0]), count=4, steps=(1, 2), reference=3, plot=str(plotted))
    assert samplers.main(options) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| ddim", "3"],
        *([f"| {name}", str(steps)] for name in chosen for steps in (1, 2)),
    ]
    assert plotted.read_bytes().startswith(b"\x89PNG")


def test_samplers_of_what_is_no_run_are_refused(tmp_path, capsys):
    assert samplers.main(samplers.Options(str(tmp_path / "none"))) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("samplers: ") and printed.err.count("\n") == 1


def write_log(run, rows):
    folder = Path(run)
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_guards_benchmark_trains_four_that_differ_by_the_discriminator_alone(
    tmp_path, monkeypatch, capsys
):
    asked = []

    def run(command, check, stdout):
        _, settings = cup3.parse(command[2:])
        config.check(settings, autoencoder_alone=True)
        asked.append(settings)
        psnr = 30 - settings.adversarial.weight / 5
        last = {f"{name}{end}": psnr for name in guard.SHOWN for end in ("", "_low", "_high")}
        write_log(settings.run, [last | {"guard": "guard: a reason"}, last])

    monkeypatch.setattr(runs.subprocess, "run", run)
    guard.main(guard.Options(out=str(tmp_path / "out"), json=str(tmp_path / "guard.json")))
    table = capsys.readouterr().out.splitlines()[2:]
    assert table[0].startswith("| no discriminator | 30 [30, 30] |") and table[2].endswith(
        "25 [25, 25] | 1 |"
    )
    assert [(one.adversarial.weight, one.adversarial.guard) for one in asked] == [
        (0.0, True),
        (0.5, True),
        (25.0, False),
        (25.0, True),
    ]
    assert len({(one.data, one.vae, one.vae_training, one.adversarial.start) for one in asked}) == 1
    assert list(json.loads((tmp_path / "guard.json").read_text())) == list(guard.RUNS)


def test_every_recipe_is_one_that_a_run_takes(tmp_path, monkeypatch, capsys):
    asked = []

    def run(command, check, stdout):
        _, settings = cup3.parse(command[2:])
        config.check(settings)
        asked.append(settings)
        rows = [
            {"val_kid": 0.05 + settings.seed / 100, "seconds": 120},
            {"petal_color": 1.0, "center_color": 0.9, "petals": 0.5 + settings.seed / 10},
        ]
        write_log(settings.run, rows)

    monkeypatch.setattr(runs.subprocess, "run", run)
    recipe.main(recipe.Options(out=str(tmp_path / "out"), epochs=3))
    table = capsys.readouterr().out.splitlines()[2:]
    assert len(table) == len(recipe.RECIPES)
    assert table[0] == "| cosine, image, none | 0.0500, 0.0600 | 100.0% | 90.0% | 55.0% | 2.0 |"
    assert len({(*map(str, (one.diffusion, one.training)),) for one in asked}) == len(recipe.RECIPES)
    assert [one.seed for one in asked] == [0, 1] * len(recipe.RECIPES)
    assert {(one.training.epochs, one.evaluation.every) for one in asked} == {(3, 3)}


def test_parts_take_turns_and_are_told_by_their_medians(monkeypatch, capsys):
    seconds = {  # of both networks, in each of the rounds
        "whole": [(0.2, 0.5), (9.0, 0.4), (0.1, 0.7)],
        "2 parts": [(0.15, 0.25), (0.05, 0.8), (0.16, 0.1)],
        "4 parts": [(0.3, 1.0), (0.3, 1.5), (0.0, 1.1)],
    }
    asked = []

    def run(command, check, capture_output, text):
        assert command[:2] == [sys.executable, parts.__file__] and check and capture_output and text
        asked.append(command[2])
        vae, unet = seconds[command[2]][asked.count(command[2]) - 1]
        return SimpleNamespace(stdout=f"autoencoder {vae}\nu-net {unet}\n")

    monkeypatch.setattr(parts.subprocess, "run", run)
    parts.main()
    assert asked == ["whole", "2 parts", "4 parts"] * 3
    assert capsys.readouterr().out.splitlines() == [
        "autoencoder, whole: 0.2000 s, ratio 1.00",
        "autoencoder, 2 parts: 0.1500 s, ratio 0.75",
        "autoencoder, 4 parts: 0.3000 s, ratio 1.50",
        "u-net, whole: 0.5000 s, ratio 1.00",
        "u-net, 2 parts: 0.2500 s, ratio 0.50",
        "u-net, 4 parts: 1.1000 s, ratio 2.20",
    ]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"batch": 0}, "--batch: received 0, expected at least 1"),
        ({"steps": -1}, "--steps: received -1, expected at least 1"),
        ({"steps": 1001}, "--steps: received 1001, expected at most 1000"),
        ({"rounds": 0}, "--rounds: received 0, expected at least 1"),
    ],
)
def test_rates_that_cannot_be_measured_are_refused(capsys, options, line):
    assert sampling.main(sampling.Options(**options)) == 2
    assert capsys.readouterr().err == f"sampling: {line}\n"


def test_rates_without_diffusers_are_refused(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert sampling.main(sampling.Options()) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "give `pip install -r requirements-oracle.txt` first" in printed


def test_the_benchmark_of_tiles_tells_seams_from_tone(finished, capsys):
    """Tiles that are normalised alike agree, and with as many rounds as norms they are nearly the whole picture."""
    options = tiles.Options(run=str(finished[0]), tile=32, overlap=16, count=1)
    assert tiles.main(options) == 0
    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    rounds, seams, means = zip(*((int(row[0]), float(row[1]), float(row[2])) for row in table), strict=True)
    assert rounds[:4] == (0, 1, 2, 3) and rounds[4] > 4
    assert max(seams[1:]) < 0.1 * seams[0]
    assert means[4] < 0.2 * means[0]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"tile": 0}, "--tile: received 0, expected at least 2"),
        ({"across": 1}, "--across: received 1, expected at least 2"),
        (
            {"overlap": 8, "tile": 8},
            "--overlap: received 8, expected an even number from 2 on below --tile 8",
        ),
        ({"overlap": 3}, "--overlap: received 3, expected an even number"),
        ({"pictures": "nowhere"}, "nowhere"),
        ({"run": "nowhere"}, "nowhere"),
    ],
)
def test_tiles_that_cannot_be_measured_are_refused(finished, capsys, options, line):
    options = tiles.Options(**{"run": str(finished[0]), "tile": 32, "count": 1, **options})
    assert tiles.main(options) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("tiles: ") and line in printed and printed.count("\n") == 1
