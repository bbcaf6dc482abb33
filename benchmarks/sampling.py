"""Pictures a second of our U-Net and sampler against those of diffusers, on the same weights, noise and text.

pip install -r requirements-oracle.txt
python benchmarks/sampling.py --json sampling.json
"""

import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import parallel
from benchmarks.runs import tell
from errors import InputError

GUIDANCE = 2.5
SCALE = 0.2  # of latents that are shown as pixels, so that few are clipped


class Size(NamedTuple):
    """A U-Net, with two groups of keywords of `model.unet.UNet`, and the side of its latents."""

    latent_side: int
    level_channels: tuple[int, ...]
    attention_levels: tuple[bool, ...]
    blocks: int
    head_channels: int = 64
    context_shape: tuple[int, int] = (77, 768)
    groups: int = 32


SIZES = {
    "small": Size(8, (128, 256, 256), (True, True, False), 1),
    "cup": Size(16, (128, 256, 512, 512), (True, True, True, False), 2),
}


@dataclass(frozen=True)
class Options:
    """Draw latents by DDIM with guidance, in turn with our U-Net and sampler and with diffusers'; CPU only."""

    size: Literal["small", "cup"] = (
        "small"  # the U-Net: 26 million parameters on 8x8x4 latents, or the Cup's 142
    )
    batch: int = 16  # pictures drawn at once; guidance makes them two halves of a batch of twice the size
    steps: int = 10  # of DDIM, two evaluations each
    rounds: int = 5  # how often each side draws
    json: str | None = None  # file for the figures


class _Shown:
    """Stands for the autoencoder: shows three channels of the latents as pixels."""

    factor = 1

    def latent_shape(self, side):
        return side, side, 4

    def decode(self, latents):
        return SCALE * latents[..., :3]


def our_side(size, batch, steps):
    """(the U-Net, the text (2 B, T, D) with and without words, a function that draws uint8 (B, h, w, 3))."""
    import keras
    import tensorflow as tf

    from diffusion.schedule import Process
    from diffusion.times import sampling_times
    from generate import Networks, Painter
    from input_pipeline import Vocabulary
    from model.text_encoder import VocabularyEncoder
    from model.unet import UNet

    length, width = size.context_shape
    keras.utils.set_random_seed(0)  # so that every run draws the same; their side has the U-Net's weights
    vocabulary = Vocabulary.from_texts([" ".join(f"word{index}" for index in range(length))], length=length)
    text_encoder = VocabularyEncoder(vocabulary.size, length, width, layers=0)
    unet = UNet(4, **{name: value for name, value in size._asdict().items() if name != "latent_side"})
    process = Process("velocity", schedule="scaled-linear")
    painter = Painter(Networks(_Shown(), text_encoder, unet, process, vocabulary), size.latent_side, batch)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, vocabulary.size, (2, batch, length)).astype("int32")
    mask = np.ones((batch, length), bool)  # diffusers, too, is told to look at all words
    rows = {"own": (tf.constant(tokens[0]), mask), "other": (tf.constant(tokens[1]), mask)}
    rows["seeds"] = tf.range(batch, dtype=tf.int64)
    shared = {
        "times": sampling_times(process, steps),
        "guidance": GUIDANCE,
        "interval": (0.0, 1.0),
        "rescale": 0.0,
    }
    context = np.concatenate([text_encoder([rows, mask]) for rows in tokens])
    draw = painter.compiled("ddim", guided=True)
    return unet, context, lambda: draw(rows, shared).numpy()


def their_side(size, context, batch, steps):
    """(diffusers' U-Net of that size, a function that draws the same)."""
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from generate import noise_of

    attends = size.attention_levels
    torch.manual_seed(0)  # so that every run draws the same
    unet = UNet2DConditionModel(
        block_out_channels=size.level_channels,
        layers_per_block=size.blocks,
        down_block_types=["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attends],
        up_block_types=["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attends)],
        attention_head_dim=[n // size.head_channels for n in size.level_channels],  # the number of heads
        cross_attention_dim=size.context_shape[1],
        norm_num_groups=size.groups,
        use_linear_projection=True,
    ).eval()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",  # our uniform times
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    context = torch.from_numpy(context)
    noise = np.asarray(noise_of(np.arange(batch), (size.latent_side, size.latent_side, 4)))
    noise = torch.from_numpy(np.moveaxis(noise, -1, 1).copy())

    @torch.inference_mode()
    def draw():
        x = noise
        for step in scheduler.timesteps:
            # Our time embedding counts the chain's steps from 1.
            wanted, other = unet(torch.cat([x, x]), step + 1, context).sample.chunk(2)
            x = scheduler.step(other + GUIDANCE * (wanted - other), step, x).prev_sample
        shown = np.moveaxis(SCALE * x[:, :3].numpy(), 1, -1)
        return np.round(np.clip(shown * 127.5 + 127.5, 0, 255)).astype("uint8")

    return unet, draw


def take_weights(unet, theirs):
    """Gives our U-Net the weights of diffusers', all of them."""
    from benchmarks.torch_networks import diffusers_name

    values = {name: value.numpy() for name, value in theirs.state_dict().items()}
    for variable in unet.variables:
        value = values.pop(diffusers_name(variable.path))
        # (out, in, kh, kw) -> (kh, kw, in, out); (out, in) -> (in, out)
        variable.assign(np.moveaxis(value, (0, 1), (-1, -2)) if value.ndim > 1 else value)
    assert not values, f"weights without a counterpart: {sorted(values)}"


def timed(draw):
    """(seconds by the clock, seconds of all threads) of a drawing."""
    wall, cpu = time.perf_counter(), time.process_time()
    draw()
    return time.perf_counter() - wall, time.process_time() - cpu


def with_threads(count, draw):
    """`draw` with that many threads of torch."""
    import torch

    def drawn():
        torch.set_num_threads(count)
        return draw()

    return drawn


def check(options):
    """Raises InputError for settings that cannot be, or where torch or diffusers is missing."""
    for name in ("batch", "steps", "rounds"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}: received {getattr(options, name)}, expected at least 1")
    if options.steps > 1000:
        raise InputError(f"--steps: received {options.steps}, expected at most 1000")
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error}; give `pip install -r requirements-oracle.txt` first") from error


def measure(options):
    """The figures, after both sides have drawn the same pictures.

    In each round each side draws once, diffusers with one thread and with one for each core; the faster counts.
    """
    check(options)
    import stages.devices

    stages.devices.strategy_on("none", {})
    size = SIZES[options.size]
    unet, context, ours = our_side(size, options.batch, options.steps)
    their_unet, theirs = their_side(size, context, options.batch, options.steps)
    take_weights(unet, their_unet)
    pictures = [draw().astype(int) for draw in (ours, theirs)]  # the first of ours is traced
    sides = {"cup3": ours}
    for threads in sorted({1, parallel.cores()}):
        sides[f"diffusers, threads: {threads}"] = with_threads(threads, theirs)
    taken = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, draw in sides.items():
            taken[name].append(timed(draw))
    seconds, cpu_seconds = (
        {name: statistics.median(times[kind] for times in every) for name, every in taken.items()}
        for kind in (0, 1)
    )
    theirs = min((name for name in sides if name != "cup3"), key=seconds.get)
    least_cpu = min(value for name, value in cpu_seconds.items() if name != "cup3")
    return {
        "size": options.size,
        "parameters": unet.count_params(),
        "batch": options.batch,
        "evaluations a picture": 2 * options.steps,
        "largest difference of a pixel": int(np.abs(pictures[0] - pictures[1]).max()),
        "spread of the pixels": float(pictures[0].std()),
        "cores": parallel.cores(),
        "pictures a second": {name: options.batch / value for name, value in seconds.items()},
        "ratio": seconds[theirs] / seconds["cup3"],
        "ratio by CPU seconds": least_cpu
        / cpu_seconds["cup3"],  # of all threads: other work disturbs it less
        "seconds, by the clock and of all threads": taken,
    }


def main(options):
    """Tells the figures; returns the exit code, see `benchmarks.runs.tell`."""
    return tell("sampling", measure, options)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
