"""Pictures a second of an autoencoder's training against a torch loop with diffusers', on the same weights and batch.

pip install -r requirements-oracle.txt
python benchmarks/vae.py --json vae.json
"""

import importlib.util
import itertools
import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks.runs import tell
from errors import InputError

LATENT_CHANNELS = 4
KL_WEIGHT, ADVERSARIAL_WEIGHT = 1e-6, 0.5
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 1e-2, 1.0
BETAS, EPSILON = (0.9, 0.99), 1e-7
JUDGE = "discriminator"  # the first word of the paths of its variables
FIRST_TOLERANCE = 1e-4  # relative, of each loss of the first step
SECOND_TOLERANCE = 1e-2  # of those of the second, which has gone through all gradients and both optimizers
# How many times the tolerance with a discriminator: a quotient of two gradients, which in float32 are themselves 1e-4
# from the truth, and the sum of all losses, in which the adversarial one has that weight and the other sign.
LENIENCE = {"adversarial_weight": 10, "loss": 10}


class Size(NamedTuple):
    """An autoencoder and its discriminator, one residual block a level, and the batch that they learn."""

    level_channels: tuple[int, ...]
    side: int  # of the pictures
    batch: int
    groups: int = 32
    judge_channels: int = 64


SIZES = {
    "small": Size((32, 64, 128, 128), 64, 16),
    "large": Size((64, 128, 256, 256), 128, 8),
}


@dataclass(frozen=True)
class Options:
    """Train an autoencoder, in turn by our trainer and by a torch loop with diffusers' AutoencoderKL; CPU only."""

    size: Literal["small", "large"] = (
        "small"  # 32 to 128 channels, 16 pictures of 64 px; or 64 to 256, 8 of 128 px
    )
    losses: Literal["plain", "adversarial"] = (
        "plain"  # L1 and KL; or a PatchGAN's hinge loss too, with an adaptive weight
    )
    rounds: int = 5  # how often each side has its turn
    steps: int = 4  # of a turn
    json: str | None = None  # file for the figures


# Our side


def our_side(pipe, size, adversarial, weights_path):
    """Builds our trainer, writes its first weights, and takes steps when told to."""
    import keras
    import tensorflow as tf

    import parallel
    import stages.devices

    stages.devices.strategy_on("none", {})
    keras.utils.set_random_seed(0)  # so that every run trains the same; the other side has these weights
    trainer, trained = our_trainer(size, adversarial)
    np.savez(weights_path, **{variable.path: variable.numpy() for variable in trained})
    trainer.make_train_function()
    batches = itertools.repeat({name: tf.constant(rows) for name, rows in batch_of(size).items()})

    def step():
        for mean in trainer.metrics:  # running means, which would hold the steps before
            mean.reset_state()
        return {name: float(value) for name, value in trainer.train_function(batches).items()}

    facts = {"cores": parallel.cores(), "parameters": sum(math.prod(v.shape) for v in trained)}
    obey(pipe, step, facts | {"versions": {"tensorflow": tf.__version__, "keras": keras.__version__}})


def our_trainer(size, adversarial):
    """(the compiled `VAETrainer`, the variables of all that it trains)."""
    from model.discriminator import PatchDiscriminator
    from model.vae import AutoencoderKL
    from optimizers import adamw
    from trainer import Adversary, VAETrainer

    settings = {"weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM, "beta_2": BETAS[1], "epsilon": EPSILON}

    def optimizer(variables, name):
        return adamw(variables, learning_rate=LEARNING_RATE, beta_1=BETAS[0], name=name, **settings)

    blocks = (1,) * len(size.level_channels)
    vae = AutoencoderKL(size.level_channels, blocks, LATENT_CHANNELS, size.groups, attention=True)
    adversary = judge_optimizer = None
    trained = list(vae.trainable_variables)
    if adversarial:
        judge = PatchDiscriminator(size.judge_channels, groups=size.groups, name=JUDGE)
        adversary = Adversary(judge, weight=ADVERSARIAL_WEIGHT)
        judge_optimizer = optimizer(judge.trainable_variables, "disc_adamw")
        trained += judge.trainable_variables
    trainer = VAETrainer(vae, "l1", kl_weight=KL_WEIGHT, adversary=adversary)
    trainer.compile(optimizer(trainer.trained_variables, "adamw"), judge_optimizer)
    return trainer, trained


# Their side


def their_side(pipe, size, adversarial, weights_path, threads):
    """Builds diffusers' autoencoder and a PatchGAN with our weights, and takes steps when told to."""
    import diffusers
    import torch

    from benchmarks.torch_networks import give_weights, patch_discriminator

    torch.set_num_threads(threads)
    weights = dict(np.load(weights_path))
    judges = {path: weights.pop(path) for path in list(weights) if path.startswith(JUDGE)}
    levels = len(size.level_channels)
    vae = diffusers.AutoencoderKL(
        block_out_channels=size.level_channels,
        layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=size.groups,
    )
    give_weights(vae, weights)
    batch = {name: torch.from_numpy(np.moveaxis(rows, -1, 1).copy()) for name, rows in batch_of(size).items()}
    if adversarial:
        step = their_adversarial_step(vae.train(), patch_discriminator(judges, size.groups), **batch)
    else:
        step = their_plain_step(vae.train(), **batch)
    obey(pipe, step, {"versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}})


def their_plain_step(vae, pixels, posterior_noise):
    descend = descent_of(vae)

    def step():
        reconstruction, recon, kl = rebuilt(vae, pixels, posterior_noise)
        loss = recon + KL_WEIGHT * kl
        descend(loss)
        return {"loss": loss.item(), "recon_loss": recon.item(), "kl_loss": kl.item()}

    return step


def their_adversarial_step(vae, judge, pixels, posterior_noise):
    """A step as Esser et al. 2021 have it; one reconstruction serves both networks, as it does on our side.

    The discriminator takes no gradient while the autoencoder learns, which spares this side work.
    """
    import torch
    from torch.nn import functional as F

    descend, judge_descend = descent_of(vae), descent_of(judge)
    last = vae.decoder.conv_out.weight

    def norm_in_last(loss):
        return torch.autograd.grad(loss, last, retain_graph=True)[0].norm()

    def step():
        reconstruction, recon, kl = rebuilt(vae, pixels, posterior_noise)
        judge.requires_grad_(False)
        deceiving = -judge(reconstruction).mean()
        adaptive = torch.clamp(norm_in_last(recon) / (norm_in_last(deceiving) + 1e-4), 0.0, 1e4)
        weight = ADVERSARIAL_WEIGHT * adaptive.detach()
        loss = recon + KL_WEIGHT * kl + weight * deceiving
        descend(loss)

        judge.requires_grad_(True)
        real, fake = judge(pixels), judge(reconstruction.detach())
        judging = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        judge_descend(judging)
        named = {"loss": loss, "recon_loss": recon, "kl_loss": kl, "gen_loss": deceiving}
        named |= {"disc_loss": judging, "adversarial_weight": weight}
        return {name: value.item() for name, value in named.items()}

    return step


def rebuilt(vae, pixels, noise):
    """The reconstruction, its L1 error, and the KL in nats a latent value."""
    posterior = vae.encode(pixels).latent_dist
    mean, logvar = posterior.mean, posterior.logvar
    reconstruction = vae.decode(mean + posterior.std * noise).sample
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    return reconstruction, (reconstruction - pixels).abs().mean(), kl


def descent_of(network):
    """A function of a loss: a step of AdamW, which leaves biases and norms undecayed as ours does."""
    import torch

    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, BETAS, EPSILON)

    def descend(loss):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()

    return descend


# Both sides


def batch_of(size):
    """Pixels (B, H, W, 3) and posterior noise (B, h, w, C), the same in every process."""
    rng = np.random.default_rng(0)
    latent_side = size.side // 2 ** (len(size.level_channels) - 1)
    pixels = rng.uniform(-1, 1, (size.batch, size.side, size.side, 3))
    noise = rng.normal(size=(size.batch, latent_side, latent_side, LATENT_CHANNELS))
    return {"pixels": pixels.astype("float32"), "posterior_noise": noise.astype("float32")}


def obey(pipe, step, facts):
    """Sends the facts, then takes as many steps as it receives and sends what they were, until it receives None."""
    pipe.send(facts | {"resting": peak_memory()})
    for count in iter(pipe.recv, None):
        pipe.send([timed(step) for _ in range(count)])
    pipe.send(peak_memory())


class Step(NamedTuple):
    """A step's losses, its seconds by the clock, and those of all threads."""

    losses: dict
    wall: float
    cpu: float


def timed(step):
    wall, cpu = time.perf_counter(), time.process_time()
    losses = step()
    return Step(losses, time.perf_counter() - wall, time.process_time() - cpu)


def peak_memory():
    """The most memory that this process has had so far, in MiB.

    The system's `ru_maxrss` begins at that of the process which started this one, so Linux' own line comes first.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1024**2 if sys.platform == "darwin" else 1024)


class Side:
    """A side in a process of its own, with its threads and its memory.

    Attributes:
        facts: what it sent when it was built.
        first: its first step.
        seconds_to_first_step: from the start of the process to the end of that step.
    """

    def __init__(self, build, *arguments):
        spawning = multiprocessing.get_context("spawn")  # a fork would share our libraries' threads
        began = time.perf_counter()
        self._pipe, end = spawning.Pipe()
        self._process = spawning.Process(target=build, args=(end, *arguments), daemon=True)
        self._process.start()
        end.close()  # so that a side that fails ends the pipe
        self.facts = self._pipe.recv()
        (self.first,) = self.steps(1)
        self.seconds_to_first_step = time.perf_counter() - began

    def steps(self, count):
        self._pipe.send(count)
        return self._pipe.recv()

    def finish(self):
        """Ends the process; returns its peak memory in MiB."""
        self._pipe.send(None)
        peak = self._pipe.recv()
        self._process.join()
        return peak


# The figures


def check_alike(ours, theirs, tolerance, which):
    """The relative differences of the losses that both sides have, by name.

    Raises:
        RuntimeError: one is beyond the tolerance: the two do not train the same.
    """
    found = {name: abs(ours[name] - theirs[name]) / abs(theirs[name]) for name in theirs}
    lenience = LENIENCE if "adversarial_weight" in theirs else {}
    beyond = {name: value for name, value in found.items() if not value <= tolerance * lenience.get(name, 1)}
    if beyond:
        raise RuntimeError(
            f"losses of the {which} step differ: relative differences {beyond}, at most {tolerance:.0e} is expected, "
            f"of {ours} and {theirs}"
        )
    return found


def check(options):
    """Raises InputError for settings that cannot be, or where torch or diffusers is missing."""
    for name in ("rounds", "steps"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}: received {getattr(options, name)}, expected at least 1")
    for package in ("torch", "diffusers"):  # looked for and not imported: this process is to stay small
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"No module named '{package}'; give `pip install -r requirements-oracle.txt` first"
            )


def measure(options):
    """The figures of both sides, which take turns.

    Raises:
        RuntimeError: the sides do not train the same.
    """
    check(options)
    size, adversarial = SIZES[options.size], options.losses == "adversarial"
    with tempfile.TemporaryDirectory() as folder:
        asked = (size, adversarial, f"{folder}/weights.npz")
        ours = Side(our_side, *asked)
        theirs = Side(their_side, *asked, ours.facts["cores"])
    sides = {"cup3": ours, "diffusers": theirs}
    alike = {"first": check_alike(*(side.first.losses for side in sides.values()), FIRST_TOLERANCE, "first")}
    second = [side.steps(1)[0].losses for side in sides.values()]
    alike["second"] = check_alike(*second, SECOND_TOLERANCE, "second")
    taken = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            taken[name] += side.steps(options.steps)
    peaks = {name: side.finish() for name, side in sides.items()}
    return {
        "size": options.size,
        "losses": options.losses,
        "parameters": ours.facts["parameters"],
        "batch": size.batch,
        "side of the pictures": size.side,
        "cores": ours.facts["cores"],
        "versions": {
            name: version for side in sides.values() for name, version in side.facts["versions"].items()
        },
        "losses of the first step": {name: side.first.losses for name, side in sides.items()},
        "relative differences of the losses": alike,
        **rates(taken, size.batch),
        "seconds to the end of the first step": {
            name: side.seconds_to_first_step for name, side in sides.items()
        },
        "of them the step itself": {name: side.first.wall for name, side in sides.items()},
        "peak memory, MiB": peaks,
        "of it before the first step": {name: side.facts["resting"] for name, side in sides.items()},
        "ratio of peak memory": peaks["cup3"] / peaks["diffusers"],
        "seconds, by the clock and of all threads": {
            name: [(step.wall, step.cpu) for step in steps] for name, steps in taken.items()
        },
    }


def rates(taken, batch):
    """Medians over all timed steps, and the ratios: how many times as fast we are.

    Other work on the machine holds torch's threads up more than ours, which do not wait for each other so often: the
    ratio of the least seconds, and that of the least of all threads, are of the steps that it held up least.
    """
    walls, cpus = (
        {name: [getattr(step, kind) for step in steps] for name, steps in taken.items()}
        for kind in ("wall", "cpu")
    )
    medians, least = (
        {name: choose(seconds) for name, seconds in walls.items()} for choose in (statistics.median, min)
    )
    return {
        "seconds a step": medians,
        "least seconds a step": least,
        "pictures a second": {name: batch / seconds for name, seconds in medians.items()},
        "ratio": medians["diffusers"] / medians["cup3"],
        "ratio of the least seconds": least["diffusers"] / least["cup3"],
        "ratio of the least seconds of all threads": min(cpus["diffusers"]) / min(cpus["cup3"]),
    }


def main(options):
    """Tells the figures; returns the exit code, see `benchmarks.runs.tell`."""
    return tell("vae", measure, options)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
