"""A picture depends on its prompt, its seed and the run's best networks, and on nothing else."""

import json
import math
import os
import warnings

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import generate
from checkpoint import RunFolder, collect, named_variables
from config import Config, EvaluationConfig, TextEncoderConfig, UNetConfig, VAEConfig, to_dict
from diffusion.samplers import SAMPLERS, STOCHASTIC
from diffusion.times import sampling_times
from errors import InputError
from generate import (
    Painter,
    Picture,
    blended,
    captioned_grid,
    latent_area,
    load,
    noise_of,
    save_png,
    to_images,
    write_pictures,
)
from input_pipeline import Vocabulary, read_pictures

PROMPTS = ["one red flower", "a blue flower with a yellow center", "two green leaves"]
STEPS, GUIDANCE = 3, 2.0
INTERVAL = (0.0, 0.5)


@pytest.fixture(scope="module")
def networks(toy_networks):
    return toy_networks()


@pytest.fixture(scope="module")
def painter(networks):
    return Painter(networks, image_size=16)


def drawn(painter, prompts, **settings):
    settings = {"steps": STEPS, "guidance": GUIDANCE, **settings}
    return list(generate.generate(painter, prompts, **settings))


def images(pictures):
    return np.stack([picture.image for picture in pictures]).astype(int)


def some_picture(seed=0, side=16):
    """Smooth colours, uint8 (side, side, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype("uint8")
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def left_half(side=16):
    return np.repeat(np.arange(side)[None] < side // 2, side, axis=0).astype("float32")


# Pictures.


def test_a_picture_does_not_depend_on_its_batch(networks, painter):
    together = drawn(painter, PROMPTS, count=2, seed=5)
    one_by_one = drawn(Painter(networks, 16, batch_size=1), PROMPTS, count=2, seed=5)
    in_fours = drawn(Painter(networks, 16, batch_size=4), PROMPTS, count=2, seed=5)  # the last batch holds 2
    for other in (one_by_one, in_fours):
        np.testing.assert_allclose(images(together), images(other), atol=1)
    assert [(picture.prompt, picture.seed) for picture in together] == [
        (prompt, seed) for prompt in PROMPTS for seed in (5, 6)
    ]


def test_a_picture_follows_its_own_seed_and_prompt(painter):
    pictures = images(drawn(painter, PROMPTS, count=2, seed=5))
    alone = images(drawn(painter, PROMPTS[1:2], seed=6))
    np.testing.assert_allclose(alone[0], pictures[3], atol=1)
    differences = [np.abs(pictures[i] - pictures[j]).max() for i, j in np.ndindex(6, 6) if i < j]
    assert min(differences) > 2


def test_pictures_come_one_batch_at_a_time(networks):
    painter = Painter(networks, 16, batch_size=1)
    calls = []
    draw = lambda *arguments: calls.append(arguments) or np.zeros((1, 16, 16, 3), "uint8")  # noqa: E731
    painter.compiled = lambda *kind, **kinds: draw
    pictures = generate.generate(painter, PROMPTS)
    next(pictures)
    assert len(calls) == 1


def test_guidance_1_is_the_conditional_picture(painter):
    plain = images(drawn(painter, PROMPTS, guidance=1))
    barely_guided = images(drawn(painter, PROMPTS, guidance=1 + 1e-6))  # through the graph of guidance
    guided = images(drawn(painter, PROMPTS, guidance=4.0))
    np.testing.assert_allclose(plain, barely_guided, atol=1)
    assert np.abs(plain - guided).max() > 5


@pytest.mark.parametrize(
    ("guidance", "interval", "negative", "rescale"),
    [
        (1.0, (0.0, 1.0), None, 0.0),
        (2.5, (0.0, 1.0), None, 0.0),
        (2.5, (0.5, 0.8), None, 0.0),
        (2.5, (0.0, 0.5), None, 0.0),
        (2.5, (0.0, 1.0), "two green leaves", 0.0),
        (4.0, (0.0, 1.0), None, 0.7),
        (4.0, (0.5, 1.0), "one red flower", 0.3),
    ],
)
def test_the_compiled_painter_is_ddim_with_guidance_by_hand(
    networks, painter, guidance, interval, negative, rescale
):
    # Song et al. 2021, equation 12 with eta = 0; Ho & Salimans 2022, equation 6; Lin et al. 2023, equations 14 to 16.
    vae, text_encoder, unet, process, vocabulary = networks
    tokens, mask = vocabulary.encode(PROMPTS[:1])
    texts = [(tokens, mask), (vocabulary.empty()[None], vocabulary.mask(vocabulary.empty()[None]))]
    if negative:
        texts[1] = vocabulary.encode([negative])
    x = np.asarray(noise_of(np.array([9]), (8, 8, 2)))
    times = np.linspace(1, 0, STEPS + 1, dtype="float32")
    for t, following in zip(times[:-1], times[1:], strict=True):
        (n, s), (next_n, next_s) = (
            [np.asarray(rate) for rate in process.rates(u[None])] for u in (t, following)
        )
        clean = []
        for own_tokens, own_mask in texts:
            own_tokens, own_mask = tf.constant(own_tokens), tf.constant(own_mask)
            context = text_encoder([own_tokens, own_mask])
            velocity = np.asarray(unet([tf.constant(x), tf.constant(t[None]), context, own_mask]))
            clean.append(s * x - n * velocity)
        strength = guidance if interval[0] <= t <= interval[1] else 1.0
        guided = clean[1] + strength * (clean[0] - clean[1])
        guided = rescale * guided * np.std(clean[0]) / np.std(guided) + (1 - rescale) * guided
        x = (next_s * guided + next_n * (x - s * guided) / n).astype("float32")
    expected = np.clip(np.asarray(vae.decode(guided.astype("float32"))) * 127.5 + 127.5, 0, 255)
    settings = {"guidance": guidance, "interval": interval, "negative": negative, "rescale": rescale}
    picture = drawn(painter, PROMPTS[:1], seed=9, **settings)[0].image
    assert picture.std() > 5  # not a plain grey one
    assert np.abs(picture - expected[0]).max() <= 1.01


def test_a_negative_prompt_is_led_away_from(painter):
    plain, negative = (images(drawn(painter, PROMPTS[:2], negative=text)) for text in (None, PROMPTS[1]))
    assert np.abs(plain[0] - negative[0]).max() > 2
    # Away from itself is nowhere: the conditional picture, at any guidance.
    conditional = images(drawn(painter, PROMPTS[1:2], guidance=1, seed=0))
    np.testing.assert_allclose(negative[1], conditional[0], atol=1)


def test_one_trace_serves_every_batch_and_number_of_steps(networks):
    painter = Painter(networks, 16, batch_size=2)
    for steps in (1, 2, 5):
        drawn(painter, PROMPTS, steps=steps)
    assert painter.compiled("ddim", guided=True).experimental_get_tracing_count() == 1
    drawn(painter, PROMPTS, sampler="heun", spacing="karras")
    assert painter.compiled("heun", guided=True).experimental_get_tracing_count() == 1
    assert painter.compiled("ddim", guided=True).experimental_get_tracing_count() == 1
    np.testing.assert_allclose(sampling_times(networks.process, 5), [1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-6)


def by_hand(networks, sampler, times, seed, prompt):
    """A picture without guidance, uint8 (H, W, 3), by the pure function of that name."""
    vae, text_encoder, unet, process, vocabulary = networks
    tokens, mask = map(tf.constant, vocabulary.encode([prompt]))
    context, shape = text_encoder([tokens, mask]), (8, 8, 2)

    def denoise(x, t):
        t = tf.reshape(t, [1])
        return process.denoised(unet([process.scaled(x, t), t, context, mask]), x, t)

    def step_noise(k):
        return noise_of(tf.constant([seed], tf.int64), shape, k + 1)

    own = {"step_noise": step_noise} if sampler in ("ddpm", "euler-ancestral", "dpmpp-2m-sde") else {}
    noise = process.start(noise_of(tf.constant([seed], tf.int64), shape), times[0])
    latents = SAMPLERS[sampler](denoise, noise, times, process.rates, **own)
    return np.asarray(to_images(vae.decode(latents))).astype(int)[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_painter_draws_with_the_sampler_and_the_times_that_are_named(networks, painter, sampler):
    settings = {"sampler": sampler, "guidance": 1, "steps": 4}
    pictures = [
        images(drawn(painter, PROMPTS[:2], **settings, spacing=name)) for name in ("karras", "leading")
    ]
    for spacing, own in zip(("karras", "leading"), pictures, strict=True):
        times = sampling_times(networks.process, 4, spacing)
        expected = by_hand(networks, sampler, times, 0, PROMPTS[1])
        assert expected.std() > 5
        np.testing.assert_allclose(own[1], expected, atol=1)
    assert np.abs(pictures[0] - pictures[1]).max() > 2


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_noise_drawn_anew_is_of_each_pictures_seed_and_step(networks, painter, sampler):
    settings = {"sampler": sampler, "count": 2, "seed": 5}
    together = images(drawn(painter, PROMPTS, **settings))
    one_by_one = images(drawn(Painter(networks, 16, batch_size=1), PROMPTS, **settings))
    np.testing.assert_allclose(together, one_by_one, atol=1)
    assert np.abs(together - images(drawn(painter, PROMPTS, count=2, seed=5))).max() > 2  # ddim draws none


def test_the_noises_of_a_seed_are_unlike():
    noises = np.stack([noise_of(np.array([3]), (32, 32, 4), number)[0] for number in (0, 1, 2, 1000)])
    assert np.abs(np.corrcoef(noises.reshape(4, -1)) - np.eye(4)).max() < 4 / 64


@pytest.mark.parametrize(
    "process", [{"target": "flow", "schedule": "flow"}, {"target": "edm", "schedule": "edm"}]
)
def test_every_process_draws_with_every_sampler(toy_networks, process):
    networks = toy_networks(**process)
    painter = Painter(networks, 16)
    for sampler in SAMPLERS:
        (picture,) = images(drawn(painter, PROMPTS[:1], sampler=sampler, guidance=1, seed=2))
        expected = by_hand(networks, sampler, sampling_times(networks.process, STEPS), 2, PROMPTS[0])
        np.testing.assert_allclose(picture, expected, atol=1)
        assert picture.std() > 5


def test_the_noise_of_a_seed_is_its_own_and_standard_normal():
    seeds = np.array([3, -4, 2**62])
    noise = np.asarray(noise_of(seeds, (32, 32, 4)))
    np.testing.assert_array_equal(noise[1:], noise_of(seeds[1:], (32, 32, 4)))
    for own in noise:
        assert abs(own.mean()) < 4 / 64
        assert own.std() == pytest.approx(1, abs=4 / 90)
    correlations = np.corrcoef(noise.reshape(3, -1))
    assert np.abs(correlations - np.eye(3)).max() < 4 / 64


def test_pixels_become_images_by_rounding_and_clipping():
    pixels = np.array([-2.0, -1.0, -1 + 1.2 / 255, -1 + 0.8 / 255, 0.999, 1.0, 7.0], "float32")
    received = to_images(np.tile(pixels[:, None, None, None], (1, 1, 1, 3)))
    assert received.dtype == "uint8"
    assert np.asarray(received)[:, 0, 0, 0].tolist() == [0, 0, 1, 0, 255, 255, 255]
    every = np.arange(256, dtype="float32")
    np.testing.assert_array_equal(to_images(every / 127.5 - 1), every)


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


# From a picture.


def test_strength_1_takes_nothing_of_the_picture(painter):
    plain = images(drawn(painter, PROMPTS, seed=4))
    np.testing.assert_array_equal(plain, images(drawn(painter, PROMPTS, seed=4, picture=some_picture())))


def test_drawing_from_a_picture_is_the_last_steps_from_its_latents(networks, painter):
    # Meng et al. 2022: x at the first time left is the picture's latents with that time's noise; then DDIM.
    vae, text_encoder, unet, process, vocabulary = networks
    tokens, mask = map(tf.constant, vocabulary.encode(PROMPTS[:1]))
    context, noise = text_encoder([tokens, mask]), np.asarray(noise_of(np.array([9]), (8, 8, 2)))
    latents = np.asarray(vae.encode(tf.constant(some_picture()[None] / np.float32(127.5) - 1))[0])
    x, clean = None, None
    for t, following in ((0.5, 0.25), (0.25, 0.0)):  # of 1, 0.75, 0.5, 0.25, 0
        (n, s), (next_n, next_s) = (
            [np.asarray(r) for r in process.rates(np.float32([u]))] for u in (t, following)
        )
        x = s * latents + n * noise if x is None else x
        clean = s * x - n * np.asarray(unet([tf.constant(x), tf.constant([t]), context, mask]))
        x = (next_s * clean + next_n * (x - s * clean) / n).astype("float32")
    expected = np.asarray(to_images(vae.decode(clean.astype("float32")))).astype(int)
    settings = {"steps": 4, "guidance": 1, "seed": 9, "picture": some_picture(), "strength": 0.5}
    picture = images(drawn(painter, PROMPTS[:1], **settings))
    np.testing.assert_allclose(picture, expected, atol=1)
    assert np.abs(picture - images(drawn(painter, PROMPTS[:1], **settings | {"strength": 1}))).max() > 2


def test_an_empty_mask_returns_the_picture(painter):
    settings = {"picture": some_picture(), "area": np.zeros((16, 16), "float32")}
    for picture in images(drawn(painter, PROMPTS, seed=4, **settings)):
        np.testing.assert_array_equal(picture, some_picture())


def test_a_full_mask_takes_nothing_of_the_picture(painter):
    settings = {"picture": some_picture(), "area": np.ones((16, 16), "float32")}
    pictures = images(drawn(painter, PROMPTS, seed=4, **settings))
    np.testing.assert_allclose(pictures, images(drawn(painter, PROMPTS, seed=4)), atol=1)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m-sde"])
def test_what_the_mask_leaves_out_stays_and_the_rest_follows_it(networks, painter, sampler):
    settings = {"picture": some_picture(), "area": left_half(), "sampler": sampler, "seed": 4}
    together = images(drawn(painter, PROMPTS, **settings))
    one_by_one = images(drawn(Painter(networks, 16, batch_size=1), PROMPTS, **settings))
    np.testing.assert_allclose(together, one_by_one, atol=1)
    for picture in together:
        np.testing.assert_array_equal(picture[:, 8:], some_picture()[:, 8:])
    assert np.abs(together[:, :, :8] - some_picture()[:, :8]).max() > 2
    # What is drawn anew depends on what stays.
    other = images(drawn(painter, PROMPTS, **settings | {"picture": some_picture(1)}))
    assert np.abs(together[:, :, :8] - other[:, :, :8]).max() > 2


def test_latents_are_drawn_anew_where_any_of_their_pixels_is():
    area = np.zeros((4, 6), "float32")
    area[1, 3], area[2, 0] = 1.0, 0.25
    expected = [[0, 1, 0], [0.25, 0, 0]]
    np.testing.assert_array_equal(latent_area(area, 2), np.reshape(expected, (1, 2, 3, 1)).astype("float32"))


def test_grey_of_the_mask_mixes():
    picture, drawing = np.full((1, 3, 3), 100, "uint8"), np.full((2, 1, 3, 3), 200, "uint8")
    mixed = np.asarray(blended(picture, drawing, np.array([[0.0, 0.25, 1.0]], "float32")))
    assert mixed.dtype == np.uint8
    assert mixed[..., 0].tolist() == [[[100, 125, 200]]] * 2


# Runs.

CONFIG = Config(
    image_size=16,
    vae=VAEConfig(level_channels=(4, 4), blocks=(0, 0), latent_channels=2, groups=2),
    text_encoder=TextEncoderConfig(width=8, layers=1, heads=2),
    unet=UNetConfig((8,), (True,), blocks=0, head_channels=4, groups=4, ff_expansion=1, pooled_context=False),
    evaluation=EvaluationConfig(sampler="unipc", spacing="logsnr-uniform"),
)


def diffusion_tensors(networks, scale=1.0):
    tensors = {}
    for name in ("unet", "text_encoder"):
        own = collect(named_variables(getattr(networks, name)), f"ema_{name}")
        raw = collect(named_variables(getattr(networks, name)), name)
        tensors |= {key: scale * value for key, value in own.items()} | {key: 0 * raw[key] for key in raw}
    return tensors


@pytest.fixture(scope="module")
def run_path(tmp_path_factory, networks):
    """A trained run, whose newest checkpoint is not its best."""
    path = tmp_path_factory.mktemp("runs") / "run"
    with RunFolder.open(path, to_dict(CONFIG)) as run:
        networks.vocabulary.save(run.vocabulary_path)
        run.finish("vae", collect(named_variables(networks.vae), "vae"), {})
        run.save("diffusion", 6, diffusion_tensors(networks, 0.5), {})
        run.save_best("diffusion", 0.1, 0.05, 0.15, diffusion_tensors(networks), {"step": 3})
    return path


def test_load_takes_the_best_averaged_networks(run_path, networks):
    loaded, config = load(run_path)
    assert to_dict(config) == to_dict(CONFIG)
    assert config.run == str(run_path)
    for name in ("vae", "text_encoder", "unet"):
        own, other = getattr(loaded, name), getattr(networks, name)
        assert own is not other
        for weight, value in zip(own.weights, other.weights, strict=True):
            np.testing.assert_array_equal(weight, value, err_msg=weight.path)
    assert loaded.vocabulary.words == networks.vocabulary.words
    assert loaded.process == networks.process


def test_without_a_best_load_takes_the_newest(tmp_path, networks):
    with RunFolder.open(tmp_path / "run", to_dict(CONFIG)) as run:
        networks.vocabulary.save(run.vocabulary_path)
        run.finish("vae", collect(named_variables(networks.vae), "vae"), {})
        run.save("diffusion", 3, diffusion_tensors(networks, 0.25), {})
        run.save("diffusion", 6, diffusion_tensors(networks, 0.5), {})
    for weight, value in zip(load(tmp_path / "run")[0].unet.weights, networks.unet.weights, strict=True):
        np.testing.assert_allclose(weight, 0.5 * np.asarray(value))


def test_a_run_that_has_not_trained_a_u_net_yet_is_refused(tmp_path, networks):
    with RunFolder.open(tmp_path / "run", to_dict(CONFIG)) as run:
        run.finish("vae", collect(named_variables(networks.vae), "vae"), {})
    with pytest.raises(
        InputError, match="has trained no U-Net yet; expected one with a checkpoint: give its t"
    ):
        load(tmp_path / "run")
    with pytest.raises(InputError, match=r"without config\.json, expected the folder of a run"):
        load(tmp_path)


def test_a_run_of_another_config_is_refused(tmp_path, run_path):
    entries = json.loads((run_path / "config.json").read_text())
    del entries["seed"]
    (tmp_path / "config.json").write_text(json.dumps({**entries, "tricks": 1}))
    with pytest.raises(InputError, match=r"unknown keys \['tricks'\] and lacks \['seed'\]"):
        load(tmp_path)


# Files.


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
                "guidance_interval": "(0.0, 0.5)",
                "run": str(run_path),
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
    interval = CONFIG.evaluation.guidance_interval
    (expected,) = drawn(painter, PROMPTS[:1], **settings, interval=interval, negative="a zebra", rescale=0.5)
    with Image.open(path) as file:
        assert (file.text["negative"], file.text["guidance_rescale"]) == ("a zebra", "0.5")
        np.testing.assert_allclose(np.asarray(file).astype(int), expected.image, atol=1)


def test_how_pictures_are_drawn_defaults_to_the_runs(run_path, tmp_path):
    (path,) = write_pictures(run_path, ["one red flower"], out=tmp_path)
    with Image.open(path) as file:
        judged = CONFIG.evaluation
        for name in ("sampler", "spacing", "steps", "guidance", "guidance_interval"):
            assert file.text[name] == str(getattr(judged, name))


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        ({"prompt": ()}, "prompts: received none"),
        ({"prompt": ("",)}, "prompts: received an empty text in row 0"),
        ({"count": 0}, "count: received 0"),
        ({"steps": 0}, "steps: received 0"),
        ({"batch_size": 0}, "--batch-size: received 0"),
        ({"sampler": "plms"}, "--sampler: received 'plms', expected one of ddpm, ddim, euler, "),
        ({"spacing": "even"}, "--spacing: received 'even', expected one of uniform, leading, "),
        (
            {"spacing": "leading", "steps": 1001},
            "--steps: received 1001 with --spacing leading, expected at most",
        ),
        ({"guidance": math.nan}, "guidance: received nan"),
        ({"guidance_rescale": 1.2}, "--guidance-rescale: received 1.2, expected 0 to 1"),
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


# Sheets.


def test_the_grid_shows_every_picture_above_its_caption():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, 128, 128, 3)).astype("uint8")
    sheet = np.asarray(captioned_grid(pictures, ["flower"] * 4 + [" "], columns=3))
    assert sheet.shape[1] == 3 * 136 + 8
    top = [row for row in range(sheet.shape[0]) if (sheet[row, 8:136] == pictures[0, 0]).all()]
    assert top == [8]
    tile = next(row for row in range(9, sheet.shape[0]) if (sheet[row, 8:136] == pictures[3, 0]).all()) - 8
    for index, picture in enumerate(pictures):
        left, upper = 8 + (index % 3) * 136, 8 + (index // 3) * tile
        np.testing.assert_array_equal(sheet[upper : upper + 128, left : left + 128], picture)
        has_text = (sheet[upper + 128 : upper + tile - 2, left : left + 128] < 128).any()
        assert has_text == (index != 4)


def test_small_pictures_are_enlarged_and_large_ones_kept():
    small, large = (np.zeros((side, side, 3), "uint8") for side in (16, 200))
    assert captioned_grid([small], [""]).size[0] == 128 + 16
    assert captioned_grid([large], [""]).size[0] == 200 + 16


def test_save_png_keeps_any_text(tmp_path):
    save_png(Picture(np.zeros((4, 4, 3), "uint8"), "ein „roter“ 花", -1), tmp_path / "x.png", note="ü\nb")
    with Image.open(tmp_path / "x.png") as file:
        assert file.text == {"prompt": "ein „roter“ 花", "seed": "-1", "note": "ü\nb"}


def test_a_damaged_vocabulary_is_refused(run_path, tmp_path):
    (tmp_path / "v.json").write_text("{")
    with pytest.raises(InputError, match=r"v\.json: cannot be read as a vocabulary"):
        Vocabulary.load(tmp_path / "v.json")


def test_a_picture_whose_writing_is_cut_is_not_there(tmp_path, monkeypatch):
    def cut(self, file, *arguments, **keywords):
        file.write(b"half of a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        save_png(Picture(np.zeros((4, 4, 3), "uint8"), "a flower", 0), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
