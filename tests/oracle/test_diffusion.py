"""Schedules and samplers against diffusers' schedulers, fed the same network and the same noise.

The step k of a chain of 1,000 is our time (k + 1) / 1000, so 20 of our uniform times are diffusers' "trailing" ones.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg  # noqa: E402
from diffusers.training_utils import compute_snr  # noqa: E402

from diffusion.guidance import guide, inpaint, threshold  # noqa: E402
from diffusion.samplers import SAMPLERS  # noqa: E402
from diffusion.schedule import GRIDS, Process, discrete_grid  # noqa: E402
from diffusion.targets import convert, target_of, weights  # noqa: E402
from diffusion.times import last_times, sampling_times  # noqa: E402

STEPS = 20
SHAPE = (3, 4, 4, 5)
THEIR_TARGETS = {"noise": "epsilon", "image": "sample", "velocity": "v_prediction"}
THEIR_SCHEDULES = {
    "linear": "linear",
    "scaled-linear": "scaled_linear",
    "cosine-squared": "squaredcos_cap_v2",
}
BETAS = {
    "linear": {"beta_start": 1e-4, "beta_end": 0.02},
    "scaled-linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "cosine-squared": {},
}
NAMES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp-2m": "DPMSolverMultistepScheduler",
    "dpmpp-2m-sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "pndm": "PNDMScheduler",
}
SETTINGS = {
    "ddpm": {"clip_sample": False},
    "ddim": {"clip_sample": False},
    "dpmpp-2m-sde": {"algorithm_type": "sde-dpmsolver++"},
    "pndm": {"skip_prk_steps": True, "set_alpha_to_one": True},
}
IN_SIGMA = ("euler", "euler-ancestral", "heun")  # whose samples are x / s
STOCHASTIC = ("ddpm", "euler-ancestral", "dpmpp-2m-sde")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


NOISE = normal(*SHAPE)
STEP_NOISE = normal(STEPS, *SHAPE, seed=1)
MIX = 0.6 * normal(5, 5, seed=2)


def rates_of(process, time):
    return [np.asarray(rate, "float64") for rate in process.rates(np.array([time], "float32"))]


def picture(x, time):
    """What the network holds for the clean latents: anything smooth of x and the time."""
    return np.tanh(x.astype("float64") @ MIX + np.cos(3 * time))


def network(process, x, time):
    """A network's prediction at x and time, in NumPy, so that both sides run the very same one."""
    x, (noise_rate, signal_rate) = np.asarray(x), rates_of(process, time)
    clean = picture(x, time)
    noise = (x - signal_rate * clean) / noise_rate
    target = target_of(process.target, clean, noise, noise_rate, signal_rate, process.data_deviation)
    return np.asarray(target, "float32")


def ours(name, process, times, start=NOISE, **settings):
    def denoise(x, t):
        return process.denoised(network(process, x, float(t)), x, np.reshape(t, (1,)))

    if name in STOCHASTIC or settings.get("eta"):
        settings["step_noise"] = lambda k: STEP_NOISE[int(k)]
    return np.asarray(SAMPLERS[name](denoise, start, times, process.rates, **settings))


def scheduler_of(name, process, **settings):
    settings = {**BETAS[process.schedule], **SETTINGS.get(name, {}), **settings}
    settings.setdefault("timestep_spacing", "trailing")
    settings.setdefault("prediction_type", THEIR_TARGETS[process.target])
    return getattr(diffusers, NAMES[name])(beta_schedule=THEIR_SCHEDULES[process.schedule], **settings)


@pytest.fixture
def drawn_noise(monkeypatch):
    """diffusers' own draws become `STEP_NOISE`, one after the other."""
    rows = iter(STEP_NOISE)

    def randn_tensor(shape, **_):
        return torch.from_numpy(next(rows).copy())

    for module in (
        "ddpm",
        "ddim",
        "euler_ancestral_discrete",
        "dpmsolver_multistep",
        "edm_dpmsolver_multistep",
    ):
        path = f"diffusers.schedulers.scheduling_{module}.randn_tensor"
        monkeypatch.setattr(path, randn_tensor)


def theirs(name, process, scheduler, predict=network, times=None, **step_settings):
    """Their sample; `times` are those that the network is asked, where they are not the scheduler's own."""
    scheduler.set_timesteps(STEPS)
    times = (scheduler.timesteps.numpy() + 1.0) / 1000 if times is None else times
    start_rate = rates_of(process, times[0])[1] if name in IN_SIGMA else 1.0
    x = torch.from_numpy((NOISE / start_rate).astype("float32"))
    for t, time in zip(scheduler.timesteps, times, strict=True):
        prediction = torch.from_numpy(predict(process, scheduler.scale_model_input(x, t).numpy(), time))
        x = scheduler.step(prediction, t, x, **step_settings).prev_sample
    return x.numpy()


def difference(mine, other):
    """The largest difference, relative to the largest value."""
    assert 0.1 < np.abs(other).max() < 10
    return np.abs(mine - other).max() / np.abs(other).max()


def predicted_noise(process, x, time):
    """The noise that the network's prediction implies, for schedulers that take no other prediction."""
    prediction = network(process, x, time)
    return np.asarray(convert(prediction, process.target, "noise", x, *rates_of(process, time)), "float32")


def agrees(name, process, spacing="uniform", **settings):
    predict = network
    # EulerAncestral takes no image prediction. PNDM takes none either, and it mixes velocities of different times and
    # reads the mix as if it were one of the newest time; Liu et al. 2022 mix the noise, as we do.
    if process.target != "noise" and (
        name == "pndm" or (name, process.target) == ("euler-ancestral", "image")
    ):
        predict, settings = predicted_noise, {**settings, "prediction_type": "epsilon"}
    scheduler = scheduler_of(name, process, **settings)
    mine = ours(name, process, sampling_times(process, STEPS, spacing))
    return difference(mine, theirs(name, process, scheduler, predict))


@pytest.mark.parametrize("schedule", ["linear", "scaled-linear"])
@pytest.mark.parametrize("target", THEIR_TARGETS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_are_diffusers(name, target, schedule, drawn_noise):
    assert agrees(name, Process(target, schedule=schedule)) < 1e-4


# DPM-Solver and UniPC divide the chain by one step more in diffusers' "leading": another grid than the others'.
@pytest.mark.parametrize("target", THEIR_TARGETS)
@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "euler-ancestral", "heun", "pndm"])
def test_leading_times_are_diffusers(name, target, drawn_noise):
    process = Process(target, schedule="scaled-linear")
    assert agrees(name, process, "leading", timestep_spacing="leading") < 1e-4


@pytest.mark.parametrize("steps", [1, 7, 20, 30, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_times_of_the_grid_are_diffusers(steps, spacing):
    process = Process("noise", schedule="linear")
    scheduler = scheduler_of("ddim", process, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    times = np.asarray(sampling_times(process, steps, spacing))
    assert np.round(1000 * times[:-1] - 1).tolist() == scheduler.timesteps.tolist()
    assert times[-1] == 0


@pytest.mark.parametrize("target", THEIR_TARGETS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_eta_is_diffusers(eta, target, drawn_noise):
    process = Process(target, schedule="scaled-linear")
    mine = ours("ddim", process, sampling_times(process, STEPS), eta=eta)
    assert difference(mine, theirs("ddim", process, scheduler_of("ddim", process), eta=eta)) < 1e-4


@pytest.mark.parametrize("schedule", ["linear", "scaled-linear", "cosine-squared"])
@pytest.mark.parametrize("zero", [False, True])
def test_grids_are_diffusers(schedule, zero):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=THEIR_SCHEDULES[schedule], rescale_betas_zero_snr=zero, **BETAS[schedule]
    )
    signal_rates = scheduler.alphas_cumprod.double().sqrt().numpy()
    # Theirs is a product of 1,000 rounded numbers in float32.
    np.testing.assert_allclose(discrete_grid(schedule, zero)[1:, 1], signal_rates, rtol=2e-4, atol=1e-6)


def test_the_sigmoid_grid_is_diffusers():
    scheduler = diffusers.DDPMScheduler(beta_schedule="sigmoid")
    signal_rates = scheduler.alphas_cumprod.double().sqrt().numpy()
    np.testing.assert_allclose(discrete_grid("sigmoid")[1:, 1], signal_rates, rtol=2e-4)
    assert set(GRIDS) == {*BETAS, "sigmoid"}


@pytest.mark.parametrize("target", ["image", "velocity"])
def test_zero_terminal_snr_is_diffusers(target):
    process = Process(target, schedule="scaled-linear", zero_terminal_snr=True)
    scheduler = scheduler_of("ddim", process, rescale_betas_zero_snr=True)
    mine = ours("ddim", process, sampling_times(process, STEPS))
    assert difference(mine, theirs("ddim", process, scheduler)) < 1e-4


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp-2m", "dpmpp-2m-sde", "unipc"])
def test_karras_noise_levels_are_diffusers(name, drawn_noise):
    """Both networks are asked at our times: diffusers reads a time between two steps off another line than our chord
    (Euler, Heun), or takes the nearest whole step (the others), which is not the time of that noise."""
    process = Process("noise", schedule="scaled-linear")
    scheduler = scheduler_of(name, process, use_karras_sigmas=True, timestep_spacing="linspace")
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.numpy()
    times = np.asarray(sampling_times(process, STEPS, "karras"))
    asked = times[:-1]
    if name == "heun":  # which lists each level but the first twice
        sigmas, asked = sigmas[[0, *range(1, len(sigmas), 2)]], np.append(times[0], np.repeat(times[1:-1], 2))
    noise_rates, signal_rates = (np.ravel(rates) for rates in process.rates(times))
    np.testing.assert_allclose((noise_rates / signal_rates)[:-1], sigmas[:-1], rtol=1e-4)
    mine = ours(name, process, times)
    assert difference(mine, theirs(name, process, scheduler, times=asked)) < 1e-4


# Flow


def flow_process(shift):
    return Process("flow", schedule="flow", shift=shift)


def their_flow(scheduler, times):
    x = torch.from_numpy(NOISE.copy())
    for t, time in zip(scheduler.timesteps, times, strict=True):
        assert float(t) / 1000 == pytest.approx(time, abs=1e-6)
        prediction = torch.from_numpy(network(flow_process(1.0), x.numpy(), float(t) / 1000))
        x = scheduler.step(prediction, t, x).prev_sample
    return x.numpy()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_diffusers(shift):
    """Their default times end at 1/1000; SD3's and Flux's pipelines set 1 ... 1/K, as ours are, before the shift."""
    process = flow_process(shift)
    times = np.asarray(sampling_times(process, STEPS))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))
    assert difference(ours("euler", process, times), their_flow(scheduler, times[:-1])) < 1e-4


@pytest.mark.parametrize("name", ["dpmpp-2m", "unipc"])
def test_solvers_on_the_flow_are_diffusers(name):
    """On their times, which leave 1 out, where their log-SNR would be infinite."""
    process = flow_process(1.0)
    scheduler = getattr(diffusers, NAMES[name])(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_timesteps(STEPS)
    times = scheduler.sigmas.numpy()
    x = torch.from_numpy(NOISE.copy())
    for t, time in zip(scheduler.timesteps, times):
        prediction = torch.from_numpy(network(process, x.numpy(), time))
        x = scheduler.step(prediction, t, x).prev_sample
    assert difference(ours(name, process, times), x.numpy()) < 1e-4


# EDM

EDM = Process("edm", schedule="edm", data_deviation=0.5)


def edm_start():
    return np.asarray(EDM.start(NOISE, np.float32(1.0)))


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("euler", "EDMEulerScheduler", {}),
        ("dpmpp-2m", "EDMDPMSolverMultistepScheduler", {}),
        ("dpmpp-2m-sde", "EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_edm_is_diffusers(name, kind, settings, drawn_noise):
    scheduler = getattr(diffusers, kind)(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, **settings)
    scheduler.set_timesteps(STEPS)
    times = np.asarray(sampling_times(EDM, STEPS, "karras"))
    noise_rates, _ = EDM.rates(times[:-1])
    np.testing.assert_allclose(np.ravel(noise_rates), scheduler.sigmas[:-1].numpy(), rtol=1e-5)
    x = torch.from_numpy(edm_start())
    for t, time in zip(scheduler.timesteps, times[:-1], strict=True):
        seen = scheduler.scale_model_input(x, t)
        assert difference(np.asarray(EDM.scaled(x.numpy(), time[None])), seen.numpy()) < 1e-4
        prediction = torch.from_numpy(network(EDM, x.numpy(), time))
        x = scheduler.step(prediction, t, x).prev_sample
    assert difference(ours(name, EDM, times, start=edm_start()), x.numpy()) < 1e-4


# Weights and guidance


@pytest.mark.parametrize("target", THEIR_TARGETS)
def test_min_snr_weights_are_those_of_diffusers_training_scripts(target):
    """They divide min(SNR, gamma) by SNR for the noise and by SNR + 1 for the velocity, and know no image."""
    process = Process(target, schedule="linear")
    steps = np.array([0, 10, 100, 500, 900, 999])
    scheduler = scheduler_of("ddpm", process)
    snr = compute_snr(scheduler, torch.from_numpy(steps)).double()
    divisor = {"noise": snr, "image": torch.ones_like(snr), "velocity": snr + 1}[target]
    expected = torch.minimum(snr, torch.tensor(5.0)) / divisor
    rates = process.rates(((steps + 1) / 1000).astype("float32"))
    np.testing.assert_allclose(weights("min-snr", target, *rates, 5.0), expected, rtol=1e-3)


def test_rescaled_guidance_is_diffusers():
    """Theirs rescales what the network predicts, ours the clean latents; the rule is one."""
    pair = normal(6, 4, 4, 5, seed=4)
    mine = guide(lambda x, t: pair, 7.5, rescale=0.7)(NOISE, 0.5)
    conditional, unconditional = (torch.from_numpy(half.copy()) for half in np.split(pair, 2))
    guided = unconditional + 7.5 * (conditional - unconditional)
    np.testing.assert_allclose(mine, rescale_noise_cfg(guided, conditional, 0.7), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [1.0, 2.0])
def test_dynamic_thresholding_is_diffusers(limit):
    """Theirs knows data of magnitude 1 only."""
    scheduler = diffusers.DDIMScheduler(dynamic_thresholding_ratio=0.9, sample_max_value=100.0)
    clean = 2 * normal(*SHAPE, seed=5)
    mine = threshold(lambda x, t: clean, 0.9, limit)(NOISE, 0.5)
    expected = limit * scheduler._threshold_sample(torch.from_numpy(clean / np.float32(limit))).numpy()
    np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)


# Pictures to start from


def test_image_to_image_is_diffusers():
    """The last steps of the chain, from the picture with the noise of the first of them."""
    process, strength, latents = Process("noise", schedule="scaled-linear"), 0.6, normal(*SHAPE, seed=6)
    times = last_times(sampling_times(process, STEPS), strength)
    mine = ours("ddim", process, times, start=process.start(NOISE, times[0], latents))
    scheduler = scheduler_of("ddim", process)
    scheduler.set_timesteps(STEPS)
    left = scheduler.timesteps[STEPS - int(STEPS * strength) :]
    x = scheduler.add_noise(torch.from_numpy(latents), torch.from_numpy(NOISE), left[:1])
    for t in left:
        prediction = torch.from_numpy(network(process, x.numpy(), (float(t) + 1) / 1000))
        x = scheduler.step(prediction, t, x).prev_sample
    assert difference(mine, x.numpy()) < 1e-4


def test_inpainting_is_diffusers():
    """Theirs puts the known latents, as noisy as each time, over what was drawn after each step."""
    process, latents = Process("noise", schedule="scaled-linear"), normal(*SHAPE, seed=6)
    mask = (normal(1, 4, 4, 1, seed=7) > 0).astype("float32")
    times = sampling_times(process, STEPS)
    scheduler = scheduler_of("ddim", process)
    scheduler.set_timesteps(STEPS)

    # At the first time theirs shows pure noise, ours the known latents with it: start both where theirs go on.
    def covered(x, t):
        known = scheduler.add_noise(torch.from_numpy(latents), torch.from_numpy(NOISE), t[None])
        return torch.from_numpy(mask) * x + (1 - torch.from_numpy(mask)) * known

    x = covered(torch.from_numpy(NOISE.copy()), scheduler.timesteps[0])
    start = x.numpy().copy()
    for t, following in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None]):
        prediction = torch.from_numpy(network(process, x.numpy(), (float(t) + 1) / 1000))
        x = scheduler.step(prediction, t, x).prev_sample
        if following is not None:
            x = covered(x, following)
    x = torch.from_numpy(mask) * x + (1 - torch.from_numpy(mask)) * torch.from_numpy(latents)

    def denoise(x, t):
        return process.denoised(network(process, x, float(t)), x, np.reshape(t, (1,)))

    mine = SAMPLERS["ddim"](inpaint(denoise, latents, mask), start, times, process.rates)
    assert difference(np.asarray(mine), x.numpy()) < 1e-4
