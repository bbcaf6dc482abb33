"""A picture depends on its own prompt and seed only, and is what the pure functions give by hand."""

import re

import numpy as np
import pytest
import tensorflow as tf

import generate
import parallel
from diffusion.guidance import slerp, threshold
from diffusion.samplers import SAMPLERS, STOCHASTIC
from diffusion.times import sampling_times
from generate import (
    Painter,
    Way,
    noise_of,
    to_images,
)
from generate.painter import blended, latent_area
from model.unet import UNet
from tests.drawings import (
    ENDS,
    GUIDANCE,
    PROMPTS,
    STEPS,
    by_hand,
    denoiser,
    drawn,
    images,
    left_half,
    on_the_way,
    some_picture,
)


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
    vae, text_encoder, unet, process, vocabulary, *_ = networks
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


@pytest.fixture
def with_weak_ones(networks, toy_networks):
    """The networks with others to lead away from."""
    return networks._replace(weak=toy_networks(5)._replace(vae=networks.vae))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_autoguidance_leads_away_from_a_weaker_model_of_the_same_prompt(with_weak_ones, guidance):
    networks, interval = with_weak_ones, (0.3, 0.7)
    times = sampling_times(networks.process, STEPS)
    own, nothing = denoiser(networks, PROMPTS[0]), denoiser(networks, "")
    weak = denoiser(networks.weak, PROMPTS[0])

    def led(x, t):
        strength = guidance if interval[0] <= float(t) <= interval[1] else 1.0
        guided = nothing(x, t) + strength * (own(x, t) - nothing(x, t))
        return weak(x, t) + 3.0 * (guided - weak(x, t))

    expected = by_hand(networks, "ddim", times, 4, led)
    settings = {"seed": 4, "sampler": "ddim", "guidance": guidance, "interval": interval}
    (received,) = images(drawn(Painter(networks, 16), PROMPTS[:1], **settings, autoguidance=3.0))
    np.testing.assert_allclose(received, expected, atol=1)
    (plain,) = images(drawn(Painter(networks, 16), PROMPTS[:1], **settings))
    assert np.abs(plain - received).max() > 3


def test_networks_of_one_shape_share_a_graph(with_weak_ones):
    painter = Painter(with_weak_ones, 16)
    drawn(painter, PROMPTS[:1], autoguidance=2.0, guidance=3.0, interval=(0.3, 0.7))
    (denoised,) = painter._denoised.values()
    assert denoised.experimental_get_tracing_count() == 1


def test_other_networks_draw_their_own_pictures(with_weak_ones, toy_networks):
    painter, settings = Painter(with_weak_ones, 16), {"autoguidance": 2.0, "seed": 4}
    drawn(painter, PROMPTS[:1], **settings)
    for others in (toy_networks(7, target="image"), with_weak_ones._replace(weak=toy_networks(8))):
        painter.networks = others
        expected = images(drawn(Painter(others, 16), PROMPTS[:1], **settings))
        np.testing.assert_allclose(images(drawn(painter, PROMPTS[:1], **settings)), expected, atol=1)


def test_without_a_weaker_model_autoguidance_multiplies_what_guidance_adds(networks):
    settings = {"seed": 4, "sampler": "ddim", "interval": (0.3, 0.7)}
    away = images(drawn(Painter(networks, 16), PROMPTS[:1], **settings, guidance=2.5, autoguidance=2.0))
    stronger = images(drawn(Painter(networks, 16), PROMPTS[:1], **settings, guidance=4.0))
    np.testing.assert_allclose(away, stronger, atol=1)


def test_frames_can_be_led_away_from_a_weaker_model(with_weak_ones):
    painter = Painter(with_weak_ones, 16)
    frames = on_the_way(painter, **ENDS, seed=5, autoguidance=2.0)
    ends = images(drawn(painter, PROMPTS[:2], seed=5, autoguidance=2.0))
    np.testing.assert_allclose(frames[[0, -1]], ends, atol=1)


def test_one_trace_serves_every_batch_and_number_of_steps(networks):
    painter = Painter(networks, 16, batch_size=2)
    for steps in (1, 2, 5):
        drawn(painter, PROMPTS, steps=steps)
    assert painter.compiled("ddim", guided=True).experimental_get_tracing_count() == 1
    drawn(painter, PROMPTS, sampler="heun", spacing="karras")
    assert painter.compiled("heun", guided=True).experimental_get_tracing_count() == 1
    assert painter.compiled("ddim", guided=True).experimental_get_tracing_count() == 1
    np.testing.assert_allclose(sampling_times(networks.process, 5), [1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-6)


TEXT_WEIGHT = re.compile(r"/attn2/to_[kv]/|^pooled_context/")


@pytest.mark.parametrize(
    "kind",
    [
        {"guided": False},
        {"guided": True},
        {"guided": True, "within": True, "rescaled": True},
        {"guided": True, "masked": True},
    ],
    ids=lambda kind: " ".join(kind),
)
@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_the_samplers_loop_takes_every_weight_but_those_of_the_text(networks, monkeypatch, kind, sampler):
    monkeypatch.setattr(parallel, "on_cpu", lambda: False)  # one part: the loop lies in the outer graph
    text_encoder = networks.text_encoder
    shape = {"head_channels": 4, "groups": 4, "ff_expansion": 1, "context_shape": text_encoder.context_shape}
    unet = UNet(2, (8, 8), (True, False), 1, pooled_context=True, **shape)
    draw = Painter(networks._replace(unet=unet), 16).compiled(sampler, **kind).get_concrete_function()
    captured = {id(inside): id(outside) for outside, inside in draw.graph.captures}
    operations = draw.graph.get_operations()
    given = [value for op in operations if op.type in ("While", "StatelessWhile") for value in op.inputs]
    within = {id(value) for value in given}
    reads = [op for op in operations if op.type == "ReadVariableOp"]
    handles = {captured[id(op.inputs[0])] for op in reads if id(op.outputs[0]) in within}
    inside = {weight.path for weight in unet.weights if id(weight.value.handle) in handles}
    paths = {weight.path for weight in unet.weights}
    text = {path for path in paths if TEXT_WEIGHT.search(path)}
    assert len(text) == 2 * 4 + 4  # keys and values of each block; two dense layers
    assert inside == paths - text
    assert not any(value.shape[1:] == text_encoder.context_shape for value in given)
    # A loop that reads variables makes the parts of a batch wait for one another.
    assert not any(value.dtype == tf.resource for value in given)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_painter_draws_with_the_sampler_and_the_times_that_are_named(networks, painter, sampler):
    settings = {"sampler": sampler, "guidance": 1, "steps": 4}
    pictures = [
        images(drawn(painter, PROMPTS[:2], **settings, spacing=name)) for name in ("karras", "leading")
    ]
    for spacing, own in zip(("karras", "leading"), pictures, strict=True):
        times = sampling_times(networks.process, 4, spacing)
        expected = by_hand(networks, sampler, times, 0, denoiser(networks, PROMPTS[1]))
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
        denoise = denoiser(networks, PROMPTS[0])
        expected = by_hand(networks, sampler, sampling_times(networks.process, STEPS), 2, denoise)
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


def test_strength_1_takes_nothing_of_the_picture(painter):
    plain = images(drawn(painter, PROMPTS, seed=4))
    np.testing.assert_array_equal(plain, images(drawn(painter, PROMPTS, seed=4, picture=some_picture())))


def test_drawing_from_a_picture_is_the_last_steps_from_its_latents(networks, painter):
    # Meng et al. 2022: x at the first time left is the picture's latents with that time's noise; then DDIM.
    vae, text_encoder, unet, process, vocabulary, *_ = networks
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


# Dynamic thresholding


def test_every_prediction_is_thresholded(networks, painter):
    settings = {"guidance": 1, "seed": 3, "threshold": 0.8, "threshold_limit": 0.5}
    together = images(drawn(painter, PROMPTS, **settings))
    times = sampling_times(networks.process, STEPS)
    for prompt, picture in zip(PROMPTS, together, strict=True):
        denoise = threshold(denoiser(networks, prompt), 0.8, 0.5)
        np.testing.assert_allclose(picture, by_hand(networks, "ddim", times, 3, denoise), atol=1)
    assert np.abs(together - images(drawn(painter, PROMPTS, guidance=1, seed=3))).max() > 5


def test_thresholding_is_of_each_picture_after_its_guidance(networks):
    settings = {
        "guidance": 6.0,
        "interval": (0.2, 0.8),
        "rescale": 0.3,
        "threshold": 0.9,
        "threshold_limit": 0.7,
    }
    settings |= {"picture": some_picture(), "area": left_half(), "seed": 4}
    painter = Painter(networks, 16, batch_size=3)
    together = images(drawn(painter, PROMPTS, **settings))
    painter.batch_size = 1
    np.testing.assert_allclose(together, images(drawn(painter, PROMPTS, **settings)), atol=1)
    without = images(drawn(painter, PROMPTS, **settings | {"threshold": 0.999, "threshold_limit": 1000.0}))
    assert np.abs(together - without).max() > 5
    assert (together[:, :, 8:] == some_picture()[:, 8:]).all()  # what is known is not thresholded
    kind = {"within": True, "rescaled": True, "thresholded": True, "masked": True}
    assert painter.compiled("ddim", True, **kind).experimental_get_tracing_count() == 1
    plain = {name: value for name, value in settings.items() if not name.startswith("threshold")}
    np.testing.assert_allclose(without, images(drawn(painter, PROMPTS, **plain)), atol=1)


# On the way between two prompts and two seeds


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance": 1},
        {"guidance": 4.0, "interval": (0.5, 0.8), "negative": PROMPTS[2], "rescale": 0.5},
        {"picture": some_picture(), "strength": 0.6},
    ],
)
def test_frames_begin_and_end_with_the_pictures_of_the_prompts(painter, settings):
    frames = on_the_way(painter, **ENDS, seed=5, **settings)
    plain = images(drawn(painter, PROMPTS[:2], seed=5, **settings))
    np.testing.assert_allclose(frames[[0, -1]], plain, atol=1)
    for end in plain:
        assert np.abs(frames[1] - end).max() > 2


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_frames_begin_and_end_with_the_pictures_of_the_seeds(painter, sampler):
    settings = {"sampler": sampler, "guidance": 1}
    frames = on_the_way(painter, prompt=PROMPTS[1], seed=5, to_seed=-7, **settings)
    plain = [images(drawn(painter, PROMPTS[1:2], seed=seed, **settings))[0] for seed in (5, -7)]
    np.testing.assert_allclose(frames[[0, -1]], plain, atol=1)
    for end in plain:
        assert np.abs(frames[1] - end).max() > 2


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_frame_is_of_mixed_predictions_and_of_noise_on_the_arc(networks, painter, sampler):
    frames = on_the_way(painter, 5, **ENDS, seed=5, to_seed=6, sampler=sampler, guidance=1)
    ends, times = (
        [denoiser(networks, prompt) for prompt in PROMPTS[:2]],
        sampling_times(networks.process, STEPS),
    )
    noises = [noise_of(np.array([seed]), (8, 8, 2)) for seed in (5, 6)]
    for share, frame in zip((0.0, 0.25, 0.5, 0.75, 1.0), frames, strict=True):

        def denoise(x, t, share=share):
            return (1 - share) * ends[0](x, t) + share * ends[1](x, t)

        # The noise that ddpm's steps draw anew stays the first seed's.
        expected = by_hand(networks, sampler, times, 5, denoise, slerp(*noises, share))
        np.testing.assert_allclose(frame, expected, atol=1)


def test_frames_do_not_depend_on_their_batch_and_come_closer_as_they_grow_more(networks):
    painter = Painter(networks, 16, batch_size=16)
    frames = on_the_way(painter, 5, **ENDS, seed=5, to_seed=6)
    painter.batch_size = 2
    more = on_the_way(painter, 17, **ENDS, seed=5, to_seed=6)
    np.testing.assert_allclose(more[::4], frames, atol=1)
    moves = [np.abs(np.diff(pictures, axis=0)).mean() for pictures in (frames, more)]
    assert moves[1] < moves[0] / 2
    kind = {"led": True, "turned": True}
    assert painter.compiled("ddim", True, **kind).experimental_get_tracing_count() == 1


def test_every_picture_may_have_a_way_of_its_own(painter):
    tokens, _ = painter.networks.vocabulary.encode(PROMPTS)
    way = Way([0.0, 0.5, 1.0], tokens=tokens[[1, 2, 0]])
    pictures = np.stack(
        list(painter.draw(tokens, [5, 5, 5], way=way, steps=STEPS, guidance=GUIDANCE))
    ).astype(int)
    plain = images(drawn(painter, PROMPTS, seed=5))
    np.testing.assert_allclose(pictures[[0, 2]], plain[[0, 0]], atol=1)
    ends = {"prompt": PROMPTS[1], "to_prompt": PROMPTS[2]}
    np.testing.assert_allclose(pictures[1], on_the_way(painter, **ends, seed=5)[1], atol=1)
