"""Requests are checked before anything is drawn, and every picture is a file that says what it is."""

import json
import math
import os
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

import averages
import generate
from checkpoint import RunFolder
from config import to_dict
from errors import InputError
from generate import (
    Painter,
    captioned_grid,
    write_pictures,
)
from input_pipeline import Labels, read_pictures
from tests.drawings import (
    DRAWN_CONFIG,
    GUIDANCE,
    INTERVAL,
    PROMPTS,
    STEPS,
    diffusion_tensors,
    drawn,
    images,
    left_half,
    some_picture,
)


def test_words_that_the_run_does_not_know_are_named_once(run_path, tmp_path, capsys):
    request = {"steps": 1, "guidance": 1, "out": tmp_path}
    with pytest.warns(UserWarning) as caught:
        write_pictures(run_path, ["a zebra in one flower", "Zebra!"], **request)
    line = f"{run_path} was trained without the words zebra, in: read as <RARE>, any rare word"
    assert [str(warning.message) for warning in caught] == [line]
    assert capsys.readouterr().out.startswith("2 pictures and grid.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_pictures(run_path, ["one red flower"], **request)
    assert capsys.readouterr().out.startswith("1 picture and grid.png")


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        ({"prompts": []}, "prompts: received none, expected at least one"),
        ({"prompts": ["a", " "]}, "prompts: received an empty text in row 1, expected words"),
        ({"count": 0}, "count: received 0, expected at least 1"),
        ({"steps": 0}, "steps: received 0, expected at least 1"),
        ({"seed": 2**63}, f"seed: received {2**63}, expected a number of 64 bits"),
        ({"guidance": math.nan}, "guidance: received nan, expected a finite number"),
        ({"guidance": math.inf}, "guidance: received inf, expected a finite number"),
        (
            {"interval": (0.7, 0.3)},
            "interval: received (0.7, 0.3), expected the least and the most time, within 0 to 1",
        ),
        ({"rescale": math.nan}, "rescale: received nan, expected 0 to 1"),
        ({"threshold": 0.0}, "threshold: received 0.0, expected more than 0 and less than 1"),
        ({"threshold": 1.0}, "threshold: received 1.0, expected more than 0 and less than 1"),
        ({"threshold": math.nan}, "threshold: received nan, expected more than 0 and less than 1"),
        ({"threshold_limit": 0.0}, "threshold_limit: received 0.0, expected 0.001 to 1000"),
        ({"negative": " "}, "negative: received an empty text, expected words"),
        ({"strength": -0.5}, "strength: received -0.5, expected more than 0 and at most 1"),
        ({"strength": math.nan}, "strength: received nan, expected more than 0 and at most 1"),
        ({"strength": 0.5}, "strength: received without a picture to begin with, expected one"),
        ({"area": left_half()}, "area: received without a picture to begin with, expected one"),
        (
            {"spacing": "linspace"},
            "spacing: received 'linspace', expected one of uniform, leading, trailing, karras, logsnr-uniform",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(painter, request_, line):
    with pytest.raises(InputError) as refusal:
        next(generate.generate(painter, **{"prompts": PROMPTS, **request_}))
    assert str(refusal.value) == line


def test_every_picture_is_a_png_that_says_what_it_is(run_path, painter, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffone red flower\n\n  \ntwo green leaves\r\n", encoding="utf-8")
    settings = {"count": 2, "seed": 3, "steps": STEPS, "guidance": GUIDANCE, "guidance_interval": INTERVAL}
    settings |= {"sampler": "dpmpp-2m", "spacing": "karras"}
    with pytest.warns(UserWarning, match="without the word äther: read as <RARE>"):
        paths = write_pictures(run_path, ["äther"], prompts, **settings, out=tmp_path / "a" / "b")
    texts = ["äther", "one red flower", "two green leaves"]
    assert [path.name for path in paths] == [f"{index:04d}.png" for index in range(6)]
    expected = drawn(painter, texts, count=2, seed=3, interval=INTERVAL, sampler="dpmpp-2m", spacing="karras")
    for path, picture in zip(paths, expected, strict=True):
        with Image.open(path) as file:
            np.testing.assert_allclose(np.asarray(file).astype(int), picture.image, atol=1)
            assert file.text == {
                "prompt": picture.prompt,
                "seed": str(picture.seed),
                "sampler": "dpmpp-2m",
                "spacing": "karras",
                "steps": "3",
                "guidance": "2.0",
                "autoguidance": "1.0",
                "guidance_interval": "(0.0, 0.5)",
                "run": str(run_path),
                "weights": "best of step 3",
            }
    grid = captioned_grid([picture.image for picture in expected], [picture.prompt for picture in expected])
    with Image.open(tmp_path / "a" / "b" / "grid.png") as file:
        assert file.size == grid.size
        np.testing.assert_allclose(np.asarray(file).astype(int), np.asarray(grid), atol=1)
    assert sorted(os.listdir(tmp_path / "a" / "b")) == [*(path.name for path in paths), "grid.png"]
    assert f"6 pictures and grid.png in {tmp_path / 'a' / 'b'}" in capsys.readouterr().out


def test_a_picture_and_its_mask_are_read_as_for_training(run_path, painter, tmp_path):
    whole, white = some_picture(side=40)[:, 8:32], np.zeros((40, 24), "uint8")  # 24 x 40 pixels
    white[:20] = 255
    Image.fromarray(whole).save(tmp_path / "picture.png")
    Image.fromarray(white).save(tmp_path / "mask.png")
    settings = {"steps": 4, "guidance": 1.0, "sampler": "ddim", "spacing": "uniform"}
    files = {"init_image": tmp_path / "picture.png", "mask": tmp_path / "mask.png"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not that a mask is grey
        (path,) = write_pictures(run_path, PROMPTS[:1], **settings, **files, out=tmp_path / "masked")
    (seen,) = read_pictures([tmp_path / "picture.png"], 16, progress=False)
    with Image.open(path) as file:
        picture = np.asarray(file)
        assert file.text["init_image"] == str(files["init_image"])
        assert (file.text["mask"], file.text["strength"]) == (str(files["mask"]), "1.0")
    np.testing.assert_array_equal(
        picture[12:], seen[12:]
    )  # the mask's edge is as soft as the resize makes it
    assert np.abs(picture[:6].astype(int) - seen[:6]).max() > 2
    (path,) = write_pictures(
        run_path, PROMPTS[:1], **settings, init_image=files["init_image"], out=tmp_path / "i"
    )
    (expected,) = images(drawn(painter, PROMPTS[:1], **settings, picture=seen, strength=0.6))
    with Image.open(path) as file:
        assert file.text["strength"] == "0.6"
        np.testing.assert_allclose(np.asarray(file).astype(int), expected, atol=1)


def test_a_negative_prompt_and_the_rescaling_are_in_the_file(run_path, painter, tmp_path):
    settings = {"steps": STEPS, "guidance": 3.0, "sampler": "ddim", "spacing": "uniform"}
    with pytest.warns(UserWarning, match="without the word zebra: read as <RARE>"):
        (path,) = write_pictures(
            run_path, PROMPTS[:1], **settings, out=tmp_path, negative="a zebra", guidance_rescale=0.5
        )
    interval = DRAWN_CONFIG.evaluation.guidance_interval
    (expected,) = drawn(painter, PROMPTS[:1], **settings, interval=interval, negative="a zebra", rescale=0.5)
    with Image.open(path) as file:
        assert (file.text["negative"], file.text["guidance_rescale"]) == ("a zebra", "0.5")
        np.testing.assert_allclose(np.asarray(file).astype(int), expected.image, atol=1)


@pytest.fixture
def run_with_averages(tmp_path, run_path, networks):
    """`run_path`, whose networks had half their weights after half of the training, and a quarter after a quarter."""
    shutil.copytree(run_path, tmp_path / "run")
    with RunFolder.open(tmp_path / "run", to_dict(DRAWN_CONFIG)) as run:
        run.save_best("diffusion", 0.01, 0.005, 0.015, diffusion_tensors(networks), {"step": 800})
        for step, scale in ((200, 0.25), (400, 0.5), (800, 1.0)):
            kept = diffusion_tensors(networks, scale)
            run.save_average(
                "diffusion",
                step,
                {
                    f"average/{length}/{name.removeprefix('ema_')}": tensor
                    for length in averages.LENGTHS
                    for name, tensor in kept.items()
                    if name.startswith("ema_")
                },
            )
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("own", "asked", "drawn_by"),
    [
        ({}, {"autoguidance": 2.5, "weak": 0.4}, (2.5, 0.4)),
        ({"autoguidance": 2.5, "weak": 0.4}, {}, (2.5, 0.4)),
        ({"autoguidance": 2.0, "weak": 0.2}, {"weak": 0.4}, (2.0, 0.4)),
        ({"autoguidance": 2.0, "weak": 0.4}, {"autoguidance": 2.5}, (2.5, 0.4)),
        ({"autoguidance": 2.5, "weak": 0.4}, {"autoguidance": 1}, (1, None)),
    ],
)
def test_the_weak_model_is_the_run_s_own_of_that_share_of_its_training(
    run_with_averages, networks, toy_networks, own, asked, drawn_by
):
    early = toy_networks()
    for strong, weak in ((networks.unet, early.unet), (networks.text_encoder, early.text_encoder)):
        weak.set_weights([0.5 * value for value in strong.get_weights()])
    file = run_with_averages / "config.json"
    config = json.loads(file.read_text())
    config["evaluation"] |= own
    file.write_text(json.dumps(config))
    settings = {"steps": STEPS, "guidance": 3.0, "sampler": "ddim", "spacing": "uniform"}
    out = run_with_averages / "pictures"
    (path,) = write_pictures(run_with_averages, PROMPTS[:1], **settings, out=out, **asked)
    interval, (autoguidance, share) = DRAWN_CONFIG.evaluation.guidance_interval, drawn_by
    painter = Painter(networks._replace(weak=early._replace(vae=networks.vae)), 16)
    (expected,) = drawn(painter, PROMPTS[:1], **settings, interval=interval, autoguidance=autoguidance)
    with Image.open(path) as file:
        assert float(file.text["autoguidance"]) == autoguidance
        assert file.text.get("weak") == (None if share is None else str(share))
        np.testing.assert_allclose(np.asarray(file).astype(int), expected.image, atol=3)  # kept in 16 bits


def test_a_run_without_early_averages_is_led_away_from_itself_and_warned_of(run_path, tmp_path, networks):
    shutil.copytree(run_path, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    config["evaluation"] |= {"autoguidance": 2.0}
    file.write_text(json.dumps(config))
    settings = {"steps": STEPS, "guidance": 2.0, "sampler": "ddim", "spacing": "uniform"}
    with pytest.warns(UserWarning, match="has kept no averages from before step 3, whose weights draw"):
        (path,) = write_pictures(tmp_path / "run", PROMPTS[:1], **settings, out=tmp_path / "pictures")
    interval = DRAWN_CONFIG.evaluation.guidance_interval
    settings["guidance"] = 3.0  # what guidance adds, twice
    (expected,) = drawn(Painter(networks, 16), PROMPTS[:1], **settings, interval=interval)
    with Image.open(path) as file:
        assert "weak" not in file.text
        np.testing.assert_allclose(np.asarray(file).astype(int), expected.image, atol=1)


def test_a_text_in_place_of_a_list_is_refused(run_path, tmp_path):
    with pytest.raises(InputError, match="prompt: received the text 'a flower', expected a list of texts"):
        write_pictures(run_path, "a flower", out=tmp_path / "pictures")


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        ({"weak": 1.0}, "--weak: received 1.0, expected a share of the training, above 0 and below 1"),
        ({"weak": math.nan}, "--weak: received nan, expected a share of the training, above 0 and below 1"),
        (
            {"weak": 0.5, "autoguidance": 1},
            "--weak: received 0.5 with an autoguidance of 1, which is off and leads away from nothing; "
            "expected another --autoguidance",
        ),
        ({"autoguidance": math.inf}, "--autoguidance: received inf, expected a finite number"),
        (
            {"autoguidance": 2},
            "received a run without averages, expected one trained with --training.snapshots above 0, "
            "and for longer than to the first of them",
        ),
    ],
)
def test_a_weak_model_that_cannot_be_is_refused(run_path, tmp_path, request_, line):
    with pytest.raises(InputError) as refusal:
        write_pictures(run_path, PROMPTS[:1], out=tmp_path / "pictures", **request_)
    assert str(refusal.value).endswith(line)
    assert not (tmp_path / "pictures").exists()


def test_thresholding_is_in_the_file(run_path, painter, tmp_path):
    settings = {"steps": STEPS, "guidance": 1, "sampler": "ddim", "spacing": "uniform"}
    settings |= {"threshold": 0.8, "threshold_limit": 0.5}
    (path,) = write_pictures(run_path, PROMPTS[:1], **settings, out=tmp_path)
    (expected,) = images(drawn(painter, PROMPTS[:1], **settings))
    with Image.open(path) as file:
        assert (file.text["threshold"], file.text["threshold_limit"]) == ("0.8", "0.5")
        np.testing.assert_allclose(np.asarray(file).astype(int), expected, atol=1)


def test_frames_are_files_that_say_how_far_they_are(run_path, painter, tmp_path, capsys):
    settings = {
        "steps": STEPS,
        "guidance": 1,
        "sampler": "ddim",
        "spacing": "uniform",
        "seed": 3,
        "frames": 5,
    }
    goal = {"to_prompt": "two green zebras", "to_seed": 9}
    with pytest.warns(UserWarning, match="without the word zebras: read as <RARE>"):
        paths = write_pictures(run_path, PROMPTS[:1], **settings, **goal, gif=True, out=tmp_path)
    expected = list(generate.between(painter, PROMPTS[0], **settings, **goal))
    assert [picture.share for picture in expected] == [0, 0.25, 0.5, 0.75, 1]
    way = [f"{share} % of the way" for share in (25, 50, 75)]
    assert [picture.caption for picture in expected] == [PROMPTS[0], *way, "two green zebras"]
    between_seeds = generate.between(painter, PROMPTS[0], **{**settings, "frames": 2}, to_seed=9)
    assert [picture.caption for picture in between_seeds] == ["seed 3", "seed 9"]
    for path, picture in zip(paths, expected, strict=True):
        with Image.open(path) as file:
            np.testing.assert_allclose(np.asarray(file).astype(int), picture.image, atol=1)
            assert file.text["share"] == f"{picture.share:g}"
            assert (file.text["prompt"], file.text["seed"]) == (PROMPTS[0], "3")
            assert (file.text["to_prompt"], file.text["to_seed"]) == ("two green zebras", "9")
    with Image.open(tmp_path / "frames.gif") as file:
        assert (file.n_frames, file.size) == (5, (16, 16))
    files = [*(path.name for path in paths), "frames.gif", "grid.png"]
    assert sorted(os.listdir(tmp_path)) == files
    assert f"5 pictures, frames.gif and grid.png in {tmp_path}" in capsys.readouterr().out


def test_frames_are_eight_where_no_number_is_given(run_path, tmp_path):
    settings = {"steps": 1, "guidance": 1, "sampler": "ddim", "spacing": "uniform"}
    assert len(write_pictures(run_path, PROMPTS[:1], **settings, to_seed=9, out=tmp_path)) == 8


def test_the_steps_of_each_picture_are_shown_and_change_it_not(run_path, painter, tmp_path):
    settings = {"steps": STEPS, "guidance": 1, "sampler": "ddim", "spacing": "uniform"}
    paths = write_pictures(run_path, PROMPTS, **settings, batch_size=2, show_steps=True, out=tmp_path)
    for path, picture in zip(paths, drawn(painter, PROMPTS, **settings), strict=True):
        with Image.open(path) as file:
            last = np.asarray(file)
            np.testing.assert_allclose(last.astype(int), picture.image, atol=1)
        with Image.open(path.with_name(f"{path.stem}_steps.png")) as file:
            assert file.text["prompt"] == picture.prompt
            sheet = np.asarray(file)
        assert sheet.shape[1] == STEPS * 136 + 8
        enlarged = np.asarray(Image.fromarray(last).resize((128, 128), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(sheet[8:136, -136:-8], enlarged)
        assert (sheet[8:136, 8:136] != enlarged).any()


def test_how_pictures_are_drawn_defaults_to_the_runs(run_path, tmp_path):
    (path,) = write_pictures(run_path, ["one red flower"], out=tmp_path)
    with Image.open(path) as file:
        judged = DRAWN_CONFIG.evaluation
        for name in ("sampler", "spacing", "steps", "guidance", "guidance_interval"):
            assert file.text[name] == str(getattr(judged, name))


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        ({"prompt": ()}, "prompts: received none"),
        ({"prompt": ("",)}, "prompts: received an empty text in row 0"),
        ({"count": 0}, "count: received 0"),
        ({"steps": 0}, "--steps: received 0"),
        ({"batch_size": 0}, "--batch-size: received 0"),
        ({"sampler": "plms"}, "--sampler: received 'plms', expected one of ddpm, ddim, euler, "),
        ({"spacing": "even"}, "--spacing: received 'even', expected one of uniform, leading, "),
        (
            {"spacing": "leading", "steps": 1001},
            "--steps: received 1001 with --spacing leading, expected at most",
        ),
        ({"guidance": math.nan}, "--guidance: received nan"),
        ({"guidance_rescale": 1.2}, "--guidance-rescale: received 1.2, expected 0 to 1"),
        ({"threshold": 95.0}, "--threshold: received 95.0, expected more than 0 and less than 1"),
        ({"threshold_limit": 2.0}, "--threshold-limit: received 2.0 without --threshold, expected both"),
        (
            {"threshold": 0.9, "threshold_limit": -1.0},
            "--threshold-limit: received -1.0, expected 0.001 to 1000",
        ),
        ({"frames": 8}, "--frames: received 8 without --to-prompt or --to-seed, expected where the"),
        ({"to_seed": 0}, "--to-seed: received 0, expected another seed than --seed"),
        ({"to_seed": 1, "frames": 1}, "--frames: received 1, expected at least 2, the ends"),
        ({"to_prompt": "a", "count": 2}, "--to-prompt: received with 2 pictures a prompt, expected one"),
        ({"to_prompt": "a", "prompt": ("a", "b")}, "--to-prompt: received with 2 prompts, expected one"),
        ({"negative": ""}, "--negative: received an empty text, expected words"),
        ({"strength": 0.5}, "--strength: received 0.5 without --init-image, expected the picture to"),
        (
            {"mask": "picture.png"},
            "--mask: received picture.png without --init-image, expected the picture to",
        ),
        (
            {"init_image": "picture.png", "strength": 1.5},
            "--strength: received 1.5, expected more than 0 and at",
        ),
        (
            {"init_image": "picture.png", "strength": 0.1, "steps": 4},
            "--strength: received 0.1 of 4 steps, which is none of them; expected more of either",
        ),
        (
            {"init_image": "picture.png", "mask": "wide.png"},
            "--mask: received wide.png of 30x20 pixels, expected the 20x20 of --init-image picture.png",
        ),
        ({"init_image": "text.png"}, "text.png: cannot be read as a picture"),
        ({"init_image": "picture.png", "mask": "text.png"}, "text.png: cannot be read as a picture"),
        (
            {"negative": "a leaf", "guidance": 1},
            "--negative: received 'a leaf' with a guidance of 1, which is off",
        ),
        ({"guidance_interval": (0.7, 0.3)}, "--guidance-interval: received (0.7, 0.3), expected the least"),
        ({"guidance_interval": (0.0, math.nan)}, "--guidance-interval: received (0.0, nan)"),
        ({"prompts": "absent.txt"}, "--prompts: received absent.txt, expected a text file in UTF-8"),
        ({"run": "absent"}, "absent: received a folder without config.json"),
    ],
)
def test_a_refused_request_writes_nothing(run_path, tmp_path, monkeypatch, request_, line):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 20)).save("picture.png")
    Image.new("L", (30, 20)).save("wide.png")
    (tmp_path / "text.png").write_text("no picture")
    request = {"run": run_path, "prompt": ("one red flower",), "out": tmp_path / "out", **request_}
    with pytest.raises(InputError) as refusal:
        write_pictures(**request)
    assert str(refusal.value).startswith(line)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def class_painter(toy_networks):
    return Painter(toy_networks(vocabulary=Labels(["canna lily", "rose"])), image_size=16)


@pytest.fixture(scope="module")
def unconditional_painter(toy_networks):
    return Painter(toy_networks(vocabulary=Labels(())), image_size=16)


def test_a_class_is_drawn_by_its_name_and_followed_by_guidance(class_painter):
    settings = {"guidance": 6.0, "seed": 3}
    both = drawn(class_painter, ["canna lily", "rose"], **settings)
    assert [picture.prompt for picture in both] == ["canna lily", "rose"]
    lily, rose = images(both)
    assert np.abs(lily - rose).max() > 2
    (alone,) = images(drawn(class_painter, ["rose"], **settings))
    np.testing.assert_allclose(alone, rose, atol=1)
    (unguided,) = images(drawn(class_painter, ["rose"], seed=3, guidance=1.0))
    assert np.abs(unguided - rose).max() > 2
    (away,) = images(drawn(class_painter, ["rose"], **settings, negative="canna lily"))
    assert np.abs(away - rose).max() > 2


def test_without_conditioning_pictures_are_those_of_their_seeds(unconditional_painter):
    pictures = drawn(unconditional_painter, [""], count=3, seed=5, guidance=1.0)
    assert [(picture.prompt, picture.seed) for picture in pictures] == [("", 5), ("", 6), ("", 7)]
    first, second, _ = images(pictures)
    assert np.abs(first - second).max() > 2
    (again,) = images(drawn(unconditional_painter, [""], seed=6, guidance=1.0))
    np.testing.assert_allclose(again, second, atol=1)


@pytest.mark.parametrize(
    ("which", "request_", "line"),
    [
        (
            "class",
            {"prompts": ["tulip"]},
            "prompts: received 'tulip', expected a class: 'canna lily', 'rose'",
        ),
        ("class", {"prompts": ["rose", ""]}, "prompts: received an empty text in row 1, expected words"),
        (
            "class",
            {"prompts": ["rose"], "negative": "lily"},
            "negative: received 'lily', expected a class: 'canna lily', 'rose'",
        ),
        (
            "none",
            {"prompts": ["rose"], "guidance": 1},
            "prompts: received 'rose', expected none: the model was trained on pictures alone (--conditioning none)",
        ),
        (
            "none",
            {"prompts": [""]},
            "guidance: received 2.5 for a model without conditioning, where there is nothing to follow; expected 1, "
            "which is off",
        ),
        (
            "none",
            {"prompts": [""], "guidance": 1, "negative": "rose"},
            "negative: received 'rose' for a model without conditioning, where there is nothing to follow; "
            "expected none",
        ),
    ],
)
def test_what_no_class_says_or_nothing_could_follow_is_refused(
    class_painter, unconditional_painter, which, request_, line
):
    painter = {"class": class_painter, "none": unconditional_painter}[which]
    with pytest.raises(InputError) as refusal:
        next(generate.generate(painter, **request_))
    assert str(refusal.value) == line


def test_a_prompts_file_that_is_no_text_is_refused(run_path, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(InputError, match=r"empty\.txt, which is empty; expected a sentence a line"):
        write_pictures(run_path, prompts=tmp_path / "empty.txt", out=tmp_path / "out")
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe\x00flower\x9d")
    with pytest.raises(InputError, match="expected a text file in UTF-8"):
        write_pictures(run_path, prompts=tmp_path / "prompts.txt", out=tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_refused(run_path, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Painter, "draw", lambda *request: pytest.fail("refused only after drawing"))
    with pytest.raises(
        InputError, match=r"--out: received .*file, which cannot be written \(File exists\); give an"
    ):
        write_pictures(run_path, ["one red flower"], out=tmp_path / "file")
