"""Samplers: functions of (`denoise`, `noise`, `times`, `rates`) that give clean latents (B, h, w, C).

`denoise(x, t)` takes x = x_t and a scalar time and returns the predicted clean latents; what depends on the prompt only
is computed once, before, and `denoise` closes over it. `noise` is x at the first time: standard normal, or what
`Process.start` makes of it. `times` (K + 1,) falls, and its last entry stands for clean latents, whatever the schedule
leaves there. `rates(t)` gives the (noise_rate, signal_rate) n, s of a time of shape (1,).

Between two times all of them go from s x_0 + n e to s' x_0 + n' e, and differ in the x_0 or e that they take there: in
x / s and sigma = n / s that is a step of Euler's method (Song et al. 2021, section 4.3). Each is a `loop` of
`step(j, state) -> state`, with one evaluation of `denoise`, whose state begins with x and the newest prediction.
"""

import functools

from keras import ops

from diffusion._checks import one_of, within

# Shares, in 1/24, of the noise found last, the one before, ...; the second row is the mean.
ADAMS_BASHFORTH = ((24, 0, 0, 0), (12, 12, 0, 0), (36, -12, 0, 0), (46, -32, 10, 0), (55, -59, 37, -9))


def compiled(step, state, count):
    """Runs `step` as one loop of the graph, whose size does not depend on the `count`."""
    return ops.fori_loop(0, count, step, state)


def step_by_step(step, state, count, callback):
    """Runs `step` in Python, and callback(j, count, predicted clean latents) after each."""
    for j in range(int(count)):
        state = step(j, state)
        callback(j, int(count), state[1])
    return state


class _Path:
    """The points that a sampler passes, worked out once: a point is its (noise rate, signal rate), and `rises` (K,) how
    much log(s / n) rises from each to the next, h in the papers on DPM-Solver."""

    def __init__(self, times, rates):
        self.times = ops.convert_to_tensor(times, "float32")
        self.steps = ops.shape(self.times)[0] - 1
        # One by one, as the rates of many times at once may differ in their last bit.
        points = ops.map(lambda t: ops.reshape(ops.stack(rates(ops.reshape(t, (1,)))), (2,)), self.times)
        self.points = ops.concatenate([points[:-1], ops.convert_to_tensor([[0.0, 1.0]])], axis=0)
        log_ratios = ops.log(self.points[:, 1]) - ops.log(self.points[:, 0])
        self.rises = log_ratios[1:] - log_ratios[:-1]

    def __getitem__(self, k):
        return self.points[k, 0], self.points[k, 1]

    def extrapolated(self, k, clean, previous):
        """The clean latents to expect half a step after point k, from the predictions there and at the point before."""
        inner = ops.logical_and(ops.greater(k, 0), ops.less(k, self.steps - 1))
        half = self.rises[k] / (2.0 * self.rises[ops.maximum(k - 1, 0)])
        return clean + ops.where(inner, half, 0.0) * (clean - previous)


def _noise_in(x, clean, point):
    return (x - point[1] * clean) / point[0]


def _move(x, clean, here, there, eta=0.0, fresh=None):
    """x at `there`, by its clean latents; eta of its noise is `fresh` (Song et al. 2021, equations 12 and 16)."""
    (n, s), (next_n, next_s), noise = here, there, _noise_in(x, clean, here)
    if eta:
        share = eta**2 * ops.maximum(1.0 - (next_n * s / (n * next_s)) ** 2, 0.0)
        noise = ops.sqrt(1.0 - share) * noise + ops.sqrt(share) * fresh
    return next_s * clean + next_n * noise


def _move_along(x, noise, clean, here, there):
    """x at `there`, by its noise; where no signal is, that says nothing of x_0, and `clean` is taken."""
    (n, s), (next_n, next_s) = here, there
    return next_s * ops.where(s > 0, (x - n * noise) / s, clean) + next_n * noise


def ddim(denoise, noise, times, rates, eta=0.0, step_noise=None, loop=compiled, order=1):
    """DDIM (Song et al. 2021): Euler's method with eta = 0, ancestral sampling (Ho et al. 2020) with eta = 1.

    Args:
        denoise, noise, times, rates: see the module, for the result too.
        eta: share of the noise that each step draws anew, 0 to 1.
        step_noise: function of the step k that gives standard normal noise like x, where eta is not 0.
        loop: `compiled`, or `step_by_step` with its callback (`functools.partial`).
        order: 2 makes it DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), and with eta = 1 its SDE form.
    """
    path = _Path(times, rates)
    within("eta", eta, 0, 1)
    if eta and step_noise is None:
        raise ValueError("step_noise must be a function of the step where eta is not 0. Received: None")

    def step(k, state):
        x, previous = state
        clean = denoise(x, path.times[k])
        expected = clean if order == 1 else path.extrapolated(k, clean, previous)
        return _move(x, expected, path[k], path[k + 1], eta, step_noise(k) if eta else None), clean

    return loop(step, (noise, ops.zeros_like(noise)), path.steps)[0]


def _by_noise(denoise, noise, times, rates, loop, plan, count):
    """A sampler of count(K) evaluations that moves by shares of the last four noises found.

    `plan(j)` tells of the j-th where x lies, 1 where the step to there is made again, knowing its end, and the shares.
    """
    path, table = _Path(times, rates), ops.convert_to_tensor(ADAMS_BASHFORTH, "float32") / 24.0

    def step(j, state):
        x, _, base, *past = state
        k, back, row = plan(j)
        clean = denoise(x, path.times[k])
        found = [_noise_in(x, clean, path[k]), *past]
        mean = sum(table[row, i] * noise for i, noise in enumerate(found))
        base, *past = (ops.where(ops.equal(back, 1), *pair) for pair in zip([base, *past], [x, *found]))
        return _move_along(base, mean, clean, path[k - back], path[k - back + 1]), clean, base, *past

    return loop(step, (noise, *[ops.zeros_like(noise)] * 5), count(path.steps))[0]


def heun(denoise, noise, times, rates, loop=compiled):
    """Heun's method in x / s and sigma (Karras et al. 2022, algorithm 1), 2 K - 1 evaluations; see `ddim`."""

    def plan(j):
        return (j + 1) // 2, j % 2, j % 2

    return _by_noise(denoise, noise, times, rates, loop, plan, lambda k: 2 * k - 1)


def pndm(denoise, noise, times, rates, loop=compiled):
    """PNDM's linear multi-step form, PLMS (Liu et al. 2022), K + 1 evaluations, two in the first step; see `ddim`."""

    def plan(j):
        return j - ops.cast(ops.greater(j, 1), "int32"), ops.cast(ops.equal(j, 1), "int32"), ops.minimum(j, 4)

    return _by_noise(denoise, noise, times, rates, loop, plan, lambda k: k + ops.minimum(k - 1, 1))


def unipc(denoise, noise, times, rates, loop=compiled):
    """UniPC of order 2, B(h) = e^h - 1 (Zhao et al. 2023): a prediction also corrects the step to it; see `ddim`."""
    path = _Path(times, rates)

    def corrected(k, clean, previous, older):
        """The clean latents to take from point k - 1 to k, by the predictions at k, k - 1 and k - 2."""
        h, last = (path.rises[ops.maximum(k - i, 0)] for i in (1, 2))
        b_1 = -1.0 / h - 1.0 / ops.expm1(-h)
        b_2 = -2.0 * b_1 / h - 1.0 / ops.expm1(-h)
        share = (b_1 - b_2) / (1.0 + last / h)
        weights = ops.where(ops.greater(k, 1), ops.stack([share * h / last, b_1 - share]), [0.0, 0.5])
        return previous + weights[0] * (previous - older) + weights[1] * (clean - previous)

    def step(k, state):
        x, previous, older, base = state
        clean, before = denoise(x, path.times[k]), ops.maximum(k - 1, 0)
        better = _move(base, corrected(k, clean, previous, older), path[before], path[before + 1])
        x = ops.where(ops.greater(k, 0), better, x)
        return _move(x, path.extrapolated(k, clean, previous), path[k], path[k + 1]), clean, previous, x

    return loop(step, (noise, *[ops.zeros_like(noise)] * 3), path.steps)[0]


SAMPLERS = {
    "ddpm": functools.partial(ddim, eta=1.0),
    "ddim": ddim,
    "euler": ddim,
    "euler-ancestral": functools.partial(ddim, eta=1.0),
    "heun": heun,
    "dpmpp-2m": functools.partial(ddim, order=2),
    "dpmpp-2m-sde": functools.partial(ddim, order=2, eta=1.0),
    "unipc": unipc,
    "pndm": pndm,
}

# Those that ask for `step_noise`.
STOCHASTIC = tuple(name for name, own in SAMPLERS.items() if getattr(own, "keywords", {}).get("eta"))


def sampler(name):
    """The sampler of that name; raises ValueError where it is not in `SAMPLERS`."""
    one_of("sampler", name, SAMPLERS)
    return SAMPLERS[name]


def evaluations(name, steps):
    """How often a sampler asks its denoiser in K `steps`."""
    return {"heun": 2 * steps - 1, "pndm": steps + (steps > 1)}.get(name, steps)
