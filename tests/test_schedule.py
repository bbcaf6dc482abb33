"""Schedules: their ends, their grids against the definition, their inverses; and what a process refuses."""

import math

import numpy as np
import pytest
from keras import ops

from diffusion.schedule import GRIDS, SCHEDULES, Process, cosine_rates, discrete_grid
from diffusion.targets import TARGETS, diffuse, distance, target_of, weights

TIMES = np.linspace(0, 1, 41, dtype="float32")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def test_rates_are_on_the_circle():
    noise_rates, signal_rates = cosine_rates(TIMES)
    assert noise_rates.shape == signal_rates.shape == (41, 1, 1, 1)
    assert noise_rates.dtype == signal_rates.dtype == "float32"
    np.testing.assert_allclose(noise_rates**2 + signal_rates**2, 1, rtol=1e-6)
    assert (np.diff(np.ravel(signal_rates)) < 0).all() and (np.diff(np.ravel(noise_rates)) > 0).all()


@pytest.mark.parametrize(("largest", "least"), [(0.95, 0.02), (0.99, 0.1)])
def test_rates_end_where_said(largest, least):
    noise_rates, signal_rates = (np.ravel(rates) for rates in cosine_rates(TIMES, largest, least))
    np.testing.assert_allclose(signal_rates[[0, -1]], [largest, least], rtol=1e-5)
    np.testing.assert_allclose(noise_rates[[0, -1]], np.sqrt(1 - np.square([largest, least])), rtol=1e-5)


def test_angles_are_evenly_spaced():
    noise_rates, signal_rates = (np.ravel(rates) for rates in cosine_rates(TIMES))
    steps = np.diff(np.arctan2(noise_rates, signal_rates))
    np.testing.assert_allclose(steps, (math.acos(0.02) - math.acos(0.95)) / 40, rtol=1e-3)


def test_unit_latents_stay_unit():
    latents, noise = normal(1, 100, 100, 20), normal(1, 100, 100, 20, seed=1)
    for time in (0.0, 0.3, 1.0):
        assert np.var(diffuse(latents, noise, *cosine_rates(np.array([time], "float32")))) == pytest.approx(
            1, abs=0.01
        )


@pytest.mark.parametrize("target", TARGETS)
def test_a_process_is_its_functions(target, pair):
    latents, noise = pair
    process = Process(target, max_signal_rate=0.9, min_signal_rate=0.1)
    rates = process.rates(TIMES)
    for ours, expected in zip(rates, cosine_rates(TIMES, 0.9, 0.1)):
        np.testing.assert_array_equal(ours, expected)
    prediction = target_of(target, latents, noise, *rates)
    clean = process.denoised(prediction, diffuse(latents, noise, *rates), TIMES)
    np.testing.assert_allclose(clean, latents, atol=1e-5)


@pytest.mark.parametrize(
    ("largest", "least"), [(1.0, 0.02), (0.95, 0.0), (0.02, 0.95), (0.5, 0.5), (0.95, -0.1), (math.nan, 0.02)]
)
def test_rates_out_of_range_are_refused(largest, least):
    with pytest.raises(ValueError, match="signal rates must fall"):
        Process(max_signal_rate=largest, min_signal_rate=least)


# Every schedule


def flat(rates):
    return tuple(np.ravel(rate).astype("float64") for rate in rates)


def target_for(schedule):
    """A target that the schedule can express, at zero terminal SNR too."""
    return "flow" if schedule in ("flow", "edm") else "image"


EVERY = [(name, False) for name in SCHEDULES] + [(name, True) for name in GRIDS]
every_schedule = pytest.mark.parametrize(("schedule", "zero"), EVERY)


def process_of(schedule, zero=False, **settings):
    return Process(target_for(schedule), schedule=schedule, zero_terminal_snr=zero, **settings)


@every_schedule
def test_noise_rises_over_the_signal(schedule, zero):
    times = np.linspace(0, 1, 4001, dtype="float32")
    noise_rates, signal_rates = process_of(schedule, zero).rates(times)
    assert noise_rates.shape == signal_rates.shape == (4001, 1, 1, 1)
    assert noise_rates.dtype == signal_rates.dtype == "float32"
    noise_rates, signal_rates = flat((noise_rates, signal_rates))
    assert (np.diff(np.arctan2(noise_rates, signal_rates)) > 0).all()
    if schedule not in ("flow", "edm"):
        np.testing.assert_allclose(noise_rates**2 + signal_rates**2, 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [
        ("linear", lambda k: 1e-4 + (0.02 - 1e-4) * k / 999),
        (
            "scaled-linear",
            lambda k: (math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * k / 999) ** 2,
        ),
        ("sigmoid", lambda k: 1e-4 + (0.02 - 1e-4) / (1 + math.exp(6 - 12 * k / 999))),
    ],
)
def test_a_chain_of_1000_steps_multiplies_what_each_keeps(schedule, betas):
    process, kept = process_of(schedule), 1.0
    times = np.arange(1001, dtype="float32") / 1000
    noise_rates, signal_rates = flat(process.rates(times))
    assert (noise_rates[0], signal_rates[0]) == (0, 1)
    for k in range(1000):
        kept *= 1 - betas(k)
        assert signal_rates[k + 1] == pytest.approx(math.sqrt(kept), rel=2e-5)
        assert noise_rates[k + 1] == pytest.approx(math.sqrt(1 - kept), rel=2e-5)


def test_the_squared_cosine_is_equation_17_until_its_betas_are_clipped():
    def remains(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2

    times = np.arange(1, 999, dtype="float32") / 1000
    _, signal_rates = flat(process_of("cosine-squared").rates(times))
    np.testing.assert_allclose(signal_rates**2, [remains(t) for t in times], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("schedule", GRIDS)
def test_zero_terminal_snr_leaves_the_first_step_and_no_signal_at_the_last(schedule):
    plain, rescaled = discrete_grid(schedule), discrete_grid(schedule, True)
    assert rescaled[-1].tolist() == [1, 0]
    np.testing.assert_allclose(rescaled[:2], plain[:2], rtol=1e-12)
    # A line takes the old signal rates to the new ones.
    ratios = (rescaled[2:, 1] - rescaled[1, 1]) / (plain[2:, 1] - plain[1, 1])
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9)
    assert np.isinf(process_of(schedule, True).log_snr(np.ones(1, "float32"))).all()


def test_the_flow_is_a_straight_line():
    noise_rates, signal_rates = process_of("flow").rates(TIMES)
    np.testing.assert_allclose(np.ravel(noise_rates), TIMES)
    np.testing.assert_allclose(np.ravel(signal_rates), 1 - TIMES)


def test_edm_noise_is_equation_5():
    """Time 1 - i / (N - 1) is the i-th of N noise levels from 80 to 0.002."""
    noise_rates, signal_rates = flat(process_of("edm").rates(1 - TIMES))
    expected = [(80 ** (1 / 7) + i / 40 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(41)]
    np.testing.assert_allclose(noise_rates, expected, rtol=1e-5)
    assert (signal_rates == 1).all()


@every_schedule
def test_log_snr_and_times_are_each_others_inverse(schedule, zero):
    process, times = process_of(schedule, zero), np.linspace(0, 1, 3001, dtype="float32")[1:-1]
    noise_rates, signal_rates = flat(process.rates(times))
    log_snr = process.log_snr(times)
    np.testing.assert_allclose(log_snr, np.log(signal_rates**2 / noise_rates**2), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(process.times_of(log_snr), times, atol=1e-5)
    assert process.times_of(np.array([-np.inf, np.inf], "float32")).numpy().tolist() == [1, 0]


def test_pure_noise_is_as_wide_as_the_schedule_says():
    noise, latents = normal(2, 3, 3, 4), normal(2, 3, 3, 4, seed=1)
    np.testing.assert_array_equal(Process().start(noise, 1.0), noise)
    np.testing.assert_allclose(process_of("edm").start(noise, 1.0), 80 * noise, rtol=1e-5)
    np.testing.assert_allclose(
        process_of("flow").start(noise, 0.3, latents), 0.7 * latents + 0.3 * noise, atol=1e-6
    )


@pytest.mark.parametrize(
    ("process", "deviation"),
    [
        (process_of("edm"), 1.0),
        (process_of("edm", data_deviation=0.5), 0.5),
        (Process("edm", schedule="linear"), 1.0),
    ],
)
def test_edm_networks_take_samples_of_unit_variance(process, deviation):
    latents, noise = deviation * normal(1, 100, 100, 20), normal(1, 100, 100, 20, seed=1)
    for time in (0.1, 0.5, 0.9):
        times = np.array([time], "float32")
        assert np.var(process.scaled(diffuse(latents, noise, *process.rates(times)), times)) == pytest.approx(
            1, abs=0.01
        )


def test_other_networks_take_samples_as_they_are():
    x = normal(2, 3, 3, 4)
    assert Process().scaled(x, TIMES[:2]) is x


@every_schedule
@pytest.mark.parametrize("target", TARGETS)
def test_a_process_expresses_each_target_or_refuses_it_by_name(schedule, zero, target):
    without_signal = schedule == "flow" or zero
    if (target == "noise" and without_signal) or (target == "velocity" and schedule in ("flow", "edm")):
        with pytest.raises(
            ValueError, match=f"target of this schedule must be one of .*, edm. Received: '{target}'"
        ):
            Process(target, schedule=schedule, zero_terminal_snr=zero)
        return
    process, times = Process(target, schedule=schedule, zero_terminal_snr=zero), TIMES[1:]
    latents, noise = normal(40, 2, 3, 4), normal(40, 2, 3, 4, seed=1)
    x = diffuse(latents, noise, *process.rates(times))
    prediction = target_of(target, latents, noise, *process.rates(times))
    assert np.abs(process.losses(prediction, latents, noise, times)).max() == 0
    # What n / s of rounding leaves, most of it where no signal is; EDM's sigma is 80 there.
    noise_rates, signal_rates = process.rates(times)
    size = ops.sqrt(noise_rates**2 + signal_rates**2) / ops.maximum(
        signal_rates, 1e-9 if target == "noise" else 1
    )
    np.testing.assert_allclose(
        (process.denoised(prediction, x, times) - latents) / (1 + size), 0 * latents, atol=2e-6
    )


def test_a_loss_is_its_weighted_distance():
    latents, noise, prediction = (normal(5, 2, 2, 3, seed=seed) for seed in range(3))
    times = TIMES[4:9]
    process = Process("noise", weight="min-snr", snr_cap=3.0, loss="huber")
    rates = process.rates(times)
    expected = distance("huber", prediction, noise) * weights("min-snr", "noise", *rates, 3.0)
    np.testing.assert_allclose(process.losses(prediction, latents, noise, times), expected, rtol=1e-6)
    learned = Process("image", weight="uncertainty")
    log_variance = normal(5)
    plain = Process("image", weight="edm").losses(prediction, latents, noise, times)
    np.testing.assert_allclose(
        learned.losses(prediction, latents, noise, times, log_variance),
        plain / np.exp(log_variance) + log_variance,
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, "schedule must be one of cosine, .*, edm. Received: 'cosin'"),
        ({"target": "score"}, "target must be one of noise, image, velocity, flow, edm. Received: 'score'"),
        ({"weight": "snr"}, "weight must be one of none, min-snr, edm, uncertainty. Received: 'snr'"),
        ({"loss": "l2"}, "loss must be one of mse, mae, huber. Received: 'l2'"),
        (
            {"zero_terminal_snr": True},
            "schedule must be one of cosine-squared, linear, .* Received: 'cosine'",
        ),
        ({"shift": 3.0}, "shift must be 1 .* Received: 3.0"),
        ({"shift": 0.0, "schedule": "flow", "target": "flow"}, "shift must be within .* Received: 0"),
        ({"snr_cap": math.nan}, "snr_cap must be within .* Received: nan"),
        ({"data_deviation": -1.0}, "data_deviation must be within .* Received: -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        Process(**settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("times", [[0.5, 1.01], [-0.01], [math.nan]])
def test_times_out_of_range_are_refused(times):
    with pytest.raises(ValueError, match=f"diffusion times must be within .* Received: {times[-1]:g}"):
        Process().rates(np.array(times, "float32"))
    with pytest.raises(ValueError, match="diffusion times must be within"):
        Process().rates(ops.convert_to_tensor(times, "float32"))
