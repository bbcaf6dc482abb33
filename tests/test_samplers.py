"""Samplers against their closed form on a Gaussian, at their orders, and by their identities."""

import functools
import math

import numpy as np
import pytest
import tensorflow as tf

from diffusion.samplers import SAMPLERS, ddim, evaluations, sampler, step_by_step
from diffusion.schedule import Process
from diffusion.targets import TARGETS, target_of
from diffusion.times import last_times, sampling_times

MU, SIGMA = 0.7, 0.5
PROCESS = Process()


def uniform_times(steps):
    return sampling_times(PROCESS, steps)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def gaussian_denoiser(process=PROCESS):
    """E[x_0 | x_t] for latents drawn from N(MU, SIGMA^2)."""

    def denoise(x, t):
        noise_rate, signal_rate = process.rates(tf.reshape(t, (1,)))
        gain = signal_rate * SIGMA**2 / (signal_rate**2 * SIGMA**2 + noise_rate**2)
        return MU + gain * (x - signal_rate * MU)

    return denoise


def spread(signal_rate):
    """Standard deviation of x_t where the signal rate is `signal_rate`."""
    return math.sqrt(signal_rate**2 * SIGMA**2 + 1 - signal_rate**2)


def limit(noise, process=PROCESS):
    """What infinitely many steps give: x_t keeps its quantile along the flow; at t = 0 it is denoised once more."""
    end, start = process.min_signal_rate, process.max_signal_rate
    quantile = (noise - end * MU) / spread(end)
    return MU + start * SIGMA**2 / spread(start) * quantile


def sample(noise, steps, denoise=None, process=PROCESS):
    denoise = denoise or gaussian_denoiser(process)
    return ddim(denoise, noise, uniform_times(steps), process.rates).numpy()


def test_one_step_is_one_denoising():
    noise = normal(5, 1, 1, 1)
    expected = gaussian_denoiser()(noise, tf.constant(1.0))
    np.testing.assert_array_equal(sample(noise, 1), expected)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_one_possible_picture_is_always_drawn(steps):
    picture = normal(1, 2, 3, 4)
    drawn = sample(normal(5, 2, 3, 4, seed=1), steps, lambda x, t: tf.broadcast_to(picture, x.shape))
    np.testing.assert_array_equal(drawn, np.broadcast_to(picture, (5, 2, 3, 4)))


def test_every_step_is_equation_12():
    """The same recursion in plain float64, by angles: s = cos a, n = sin a."""
    x = normal(6, 1, 1, 1).astype("float64")
    drawn, steps = sample(x.astype("float32"), 7), 7
    first, last = math.acos(0.95), math.acos(0.02)
    for k in range(steps):
        a, b = (first + (1 - i / steps) * (last - first) for i in (k, k + 1))
        gain = math.cos(a) * SIGMA**2 / spread(math.cos(a)) ** 2
        clean = MU + gain * (x - math.cos(a) * MU)
        x = math.cos(b) * clean + math.sin(b) * (x - math.cos(a) * clean) / math.sin(a)
    np.testing.assert_allclose(drawn, clean, atol=1e-5)


def test_the_error_halves_as_steps_double():
    noise = normal(64, 1, 1, 1)
    errors = [np.sqrt(np.mean((sample(noise, steps) - limit(noise)) ** 2)) for steps in (8, 16, 32, 64)]
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(slopes, 1, atol=0.15)


def test_samples_follow_the_data():
    """With rates that reach from nearly 1 to nearly 0, mean and spread are the data's."""
    process = Process(max_signal_rate=0.9999, min_signal_rate=1e-3)
    drawn = sample(normal(20_000, 1, 1, 1), 100, process=process)
    assert drawn.mean() == pytest.approx(MU, abs=0.02)
    assert drawn.std() == pytest.approx(SIGMA, rel=0.03)


def test_the_network_is_asked_once_a_step_at_falling_times():
    asked = []

    def denoise(x, t):
        asked.append(float(t))
        return x

    sample(normal(1, 1, 1, 1), 5, denoise)
    np.testing.assert_allclose(asked, [1, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)


def test_samples_do_not_mix():
    noise = normal(3, 2, 2, 1)
    alone = [sample(part[None], 6) for part in noise]
    np.testing.assert_allclose(sample(noise, 6), np.concatenate(alone), rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 4])
def test_compiled_is_eager(batch):
    noise, times = normal(batch, 2, 2, 1), uniform_times(6)
    compiled = tf.function(lambda x, t: ddim(gaussian_denoiser(), x, t, PROCESS.rates))
    np.testing.assert_allclose(compiled(noise, times), sample(noise, 6), rtol=1e-5, atol=1e-6)


def test_more_steps_are_no_larger_graph():
    def operations(steps):
        compiled = tf.function(lambda x: ddim(gaussian_denoiser(), x, uniform_times(steps), PROCESS.rates))
        graph = compiled.get_concrete_function(tf.TensorSpec((1, 2, 2, 1))).graph.as_graph_def()
        return len(graph.node) + sum(len(function.node_def) for function in graph.library.function)

    assert operations(50) == operations(2)


# Every sampler

STOCHASTIC = ("ddpm", "euler-ancestral", "dpmpp-2m-sde")
ORDERS = {name: 1 if name in ("ddpm", "ddim", "euler", "euler-ancestral") else 2 for name in SAMPLERS} | {
    "unipc": 3
}
PROCESSES = [
    PROCESS,
    Process("image", schedule="linear"),
    Process("image", schedule="scaled-linear", zero_terminal_snr=True),
    Process("flow", schedule="flow"),
    Process("edm", schedule="edm"),
]
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.schedule)


def run(name, denoise, noise, times, process=PROCESS, **settings):
    """A sample; what a stochastic sampler draws in step k depends on k and the row."""
    if name in STOCHASTIC:
        settings.setdefault("step_noise", lambda k: tf.random.stateless_normal(noise.shape, [7, k]))
    return SAMPLERS[name](denoise, tf.convert_to_tensor(noise), times, process.rates, **settings)


def crooked(process=PROCESS):
    """A denoiser that is not affine: every value of a sample depends on all its channels and on the time."""

    def denoise(x, t):
        noise_rate, signal_rate = process.rates(tf.reshape(t, (1,)))
        x = x / tf.sqrt(noise_rate**2 + signal_rate**2)
        return tf.tanh(x @ tf.constant(normal(4, 4, seed=9))) + tf.cos(3.0 * t) * tf.sin(x)

    return denoise


def closed_form(process, times, stochastic):
    """Mean and deviation of the samples that infinitely many steps give from standard normal noise.

    x at the last time asked is Gaussian: along the flow it keeps the quantile of its noise; with noise drawn anew it is
    what the diffusion of the data tells of it from where it was at the first time. It is denoised once more.
    """
    rates = [[np.asarray(rate, "float64").item() for rate in process.rates(t[None])] for t in times]
    (first_noise, first_signal), (last_noise, last_signal) = rates[0], rates[-2]
    start = first_signal**2 * SIGMA**2 + first_noise**2  # the variances of x at both times
    end = last_signal**2 * SIGMA**2 + last_noise**2
    if stochastic:
        gain = first_signal / last_signal * end / start
        variance = end - gain**2 * start + gain**2
    else:
        gain = math.sqrt(end / start)
        variance = gain**2
    shrinking = last_signal * SIGMA**2 / end
    return MU - shrinking * gain * first_signal * MU, shrinking * math.sqrt(variance)


def mean_and_deviation(name, process, denoise, times):
    """Of a sampler that is affine in its noise, as it is with a Gaussian's denoiser: one row is without noise, each
    other has noise 1 in one place alone, at the start or in one of the steps."""
    rows = len(times) + 1
    noise = tf.reshape(tf.one_hot(1, rows), (-1, 1, 1, 1))
    drawn = run(name, denoise, noise, times, process, **settings_of_unit_noise(name, rows))
    alone = np.ravel(drawn).astype("float64")
    return alone[0], math.sqrt(np.sum((alone[1:] - alone[0]) ** 2))


def settings_of_unit_noise(name, rows):
    unit = {"step_noise": lambda k: tf.reshape(tf.one_hot(k + 2, rows), (-1, 1, 1, 1))}
    return unit if name in STOCHASTIC else {}


@every_sampler
def test_mean_and_deviation_converge_at_the_samplers_order(name):
    """Noise levels spaced evenly between fixed ends; so the last prediction's error does not depend on the steps."""
    process = Process(max_signal_rate=0.9999, min_signal_rate=0.1)
    errors = []
    for steps in (16, 32, 64):
        times = np.asarray(sampling_times(process, steps, "logsnr-uniform"))
        found = mean_and_deviation(name, process, gaussian_denoiser(process), times)
        errors.append(np.abs(np.subtract(found, closed_form(process, times, name in STOCHASTIC))))
    mean_slopes, slopes = np.log2(np.divide(errors[:-1], errors[1:])).T
    np.testing.assert_allclose(slopes, ORDERS[name], atol=0.2)
    if name in STOCHASTIC:  # the mean is exact in any number of steps
        assert np.max(errors, axis=0)[0] < 1e-6
    else:
        np.testing.assert_allclose(mean_slopes, ORDERS[name], atol=0.2)


@every_sampler
@every_process
def test_samples_come_close_to_the_data(name, process):
    times = np.asarray(sampling_times(process, 60, "logsnr-uniform"))
    start = process.start(normal(4000, 1, 1, 1), 1.0)
    drawn = run(name, gaussian_denoiser(process), start, times, process)
    if process is PROCESS:  # the clipped schedule ends in predictions, which are narrower than the data
        mean, deviation = closed_form(process, times, name in STOCHASTIC)
    else:
        mean, deviation = MU, SIGMA
    assert np.mean(drawn) == pytest.approx(mean, abs=0.04)
    assert np.std(drawn) == pytest.approx(deviation, rel=0.15 if ORDERS[name] == 1 else 0.03)


@every_sampler
@pytest.mark.parametrize("steps", [1, 2, 5])
@every_process
def test_one_possible_picture_is_drawn_by_every_sampler(name, steps, process):
    picture = normal(1, 2, 3, 4)
    start = process.start(normal(5, 2, 3, 4, seed=1), 1.0)
    times = sampling_times(process, steps)
    drawn = run(name, lambda x, t: tf.broadcast_to(picture, x.shape), start, times, process)
    np.testing.assert_allclose(drawn, np.broadcast_to(picture, (5, 2, 3, 4)), atol=2e-4)


@every_sampler
def test_compiled_is_step_by_step(name):
    noise, seen = normal(3, 2, 2, 4), []

    def note(j, count, clean):
        seen.append((j, count, clean.numpy()))

    @tf.function
    def compiled(x, times):
        return run(name, crooked(), x, times)

    by_steps = run(
        name, crooked(), noise, uniform_times(9), loop=functools.partial(step_by_step, callback=note)
    )
    np.testing.assert_allclose(compiled(noise, uniform_times(9)), by_steps, rtol=1e-5, atol=1e-6)
    count = evaluations(name, 9)
    assert [entry[:2] for entry in seen] == [(j, count) for j in range(count)]
    if name in ("ddim", "unipc", "dpmpp-2m", "dpmpp-2m-sde", "ddpm"):  # whose last prediction is the sample
        np.testing.assert_allclose(seen[-1][2], by_steps, rtol=1e-6)


@every_sampler
def test_each_step_asks_the_network_once(name):
    asked = []

    def denoise(x, t):
        asked.append(float(t))
        return x

    run(name, denoise, normal(1, 1, 1, 1), uniform_times(5))
    expected = [1, 0.8, 0.6, 0.4, 0.2]
    expected = {"heun": np.repeat(expected, 2)[1:], "pndm": [1, *expected[1:2], *expected[1:]]}.get(
        name, expected
    )
    np.testing.assert_allclose(asked, expected, rtol=1e-6)
    assert len(asked) == evaluations(name, 5)


@every_sampler
def test_one_trace_is_of_one_size_for_any_number_of_steps(name):
    def operations(steps):
        compiled = tf.function(lambda x: run(name, gaussian_denoiser(), x, uniform_times(steps)))
        graph = compiled.get_concrete_function(tf.TensorSpec((1, 2, 2, 1))).graph.as_graph_def()
        return len(graph.node) + sum(len(function.node_def) for function in graph.library.function)

    assert operations(50) == operations(2)


@every_sampler
@every_process
def test_batched_is_one_by_one(name, process):
    noise, fresh = process.start(normal(3, 2, 2, 4), 1.0), normal(6, 3, 2, 2, 4, seed=3)

    def drawn(rows):
        settings = {"step_noise": lambda k: fresh[int(k)][rows]} if name in STOCHASTIC else {}
        return run(
            name, crooked(process), np.asarray(noise)[rows], uniform_times(6), process, **settings
        ).numpy()

    alone = [drawn(slice(i, i + 1)) for i in range(3)]
    np.testing.assert_allclose(drawn(slice(None)), np.concatenate(alone), rtol=1e-4, atol=1e-5)


@every_process
def test_ddim_is_eulers_method_on_the_flow_in_its_variables(process):
    """y = x / s and sigma = n / s: dy = (y - x_0) / sigma dsigma (Song et al. 2021, section 4.3), in plain float64."""
    noise, times = (
        process.start(normal(3, 2, 2, 4), 1.0),
        np.asarray(uniform_times(12))[1:],
    )  # from where s > 0
    rates = [[np.asarray(rate, "float64").item() for rate in process.rates(t[None])] for t in times[:-1]]
    sigmas, y = [n / s for n, s in rates] + [0.0], np.asarray(noise, "float64") / rates[0][1]
    denoise = crooked(process)
    for k, t in enumerate(times[:-1]):
        clean = np.asarray(denoise((y * rates[k][1]).astype("float32"), t), "float64")
        y = y + (y - clean) / sigmas[k] * (sigmas[k + 1] - sigmas[k])
    drawn = run("ddim", denoise, noise, times, process)
    np.testing.assert_allclose(drawn, y, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "noise"])
def test_what_the_network_predicts_does_not_change_the_sample(target):
    """A network of each target that holds the same clean latents draws the same picture."""
    process, noise = Process(target), normal(2, 2, 2, 4)

    def denoise(x, t):
        rates = process.rates(tf.reshape(t, (1,)))
        clean = crooked()(x, t)
        prediction = target_of(target, clean, (x - rates[1] * clean) / rates[0], *rates)
        return process.denoised(prediction, x, tf.reshape(t, (1,)))

    np.testing.assert_allclose(
        run("ddim", denoise, noise, uniform_times(10)),
        run("ddim", crooked(), noise, uniform_times(10)),
        atol=1e-4,
    )


# Image to image


@every_sampler
@every_process
def test_strength_1_is_a_new_picture_and_strength_0_the_old_one(name, process):
    noise, latents, times = normal(2, 2, 2, 4), normal(2, 2, 2, 4, seed=1), uniform_times(8)
    denoise = crooked(process)
    new = run(name, denoise, process.start(noise, times[0]), times, process)
    again = run(name, denoise, process.start(noise, times[0]), last_times(times, 1.0), process)
    np.testing.assert_array_equal(again, new)
    left = last_times(times, 0.0)
    np.testing.assert_array_equal(left, [0])
    kept = run(name, denoise, latents, left, process)
    np.testing.assert_array_equal(kept, latents)


def test_less_strength_leaves_more_of_the_picture():
    latents, noise = normal(64, 2, 2, 4), normal(64, 2, 2, 4, seed=1)
    distances = []
    for strength in (0.2, 0.5, 0.8, 0.95):
        times = last_times(uniform_times(20), strength)
        drawn = run("ddim", gaussian_denoiser(), PROCESS.start(noise, times[0], latents), times)
        distances.append(np.mean((drawn - latents) ** 2))
    assert (np.diff(distances) > 0.05).all()


# Bad input


def test_unknown_samplers_are_refused():
    with pytest.raises(ValueError, match="ddpm, ddim, euler, .*, pndm. Received: 'dpm'"):
        sampler("dpm")
    assert sampler("ddim") is ddim


@pytest.mark.parametrize("name", STOCHASTIC)
def test_new_noise_without_its_source_is_refused(name):
    with pytest.raises(ValueError, match="step_noise must be a function .* Received: None"):
        SAMPLERS[name](gaussian_denoiser(), normal(1, 1, 1, 1), uniform_times(3), PROCESS.rates)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_an_eta_out_of_range_is_refused(eta):
    with pytest.raises(ValueError, match=f"eta must be within .* Received: {eta}"):
        run("ddim", gaussian_denoiser(), normal(1, 1, 1, 1), uniform_times(3), eta=eta)
