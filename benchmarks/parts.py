"""How long a training step of the default preset takes on a CPU: its batch whole on all cores, or in 2 or 4 parts.

python benchmarks/parts.py
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROUNDS, STEPS = 3, 30
WAYS = {"whole": 1, "2 parts": 2, "4 parts": 4}


def main():
    """Alternates fresh processes, since threads are fixed by the first operation, and prints medians and ratios."""
    times = {}
    for _ in range(ROUNDS):
        for way in WAYS:
            output = subprocess.run(
                [sys.executable, __file__, way], check=True, capture_output=True, text=True
            ).stdout
            for line in output.splitlines():
                network, seconds = line.split()
                times.setdefault(network, {}).setdefault(way, []).append(float(seconds))
    for network, of_way in times.items():
        medians = {way: statistics.median(seconds) for way, seconds in of_way.items()}
        for way, seconds in medians.items():
            print(f"{network}, {way}: {seconds:.4f} s, ratio {seconds / medians['whole']:.2f}")


def one(way):
    """Prints the median seconds of a step of each network."""
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    import stages.devices
    from config import Config, part
    from diffusion.schedule import Process
    from generate import Networks, make_diffusion, make_vae
    from input_pipeline import Vocabulary
    from model.perceptual import PerceptualDistance
    from stages.fitting import optimizer_of
    from trainer import LatentDiffusionTrainer, VAETrainer

    config = Config()
    if way == "whole":
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    else:
        stages.devices.strategy_on("none", {})
    micro_batches = WAYS[way]
    vae, stage = make_vae(config), config.vae_training
    shape = vae.latent_shape(config.image_size)
    trainer = VAETrainer(
        vae,
        stage.recon_loss,
        kl_weight=stage.kl_weight,
        perceptual=PerceptualDistance(stage.perceptual_depth),
        perceptual_weight=stage.perceptual_weight,
        micro_batches=micro_batches,
    )
    pixels = tf.random.uniform((stage.batch_size, config.image_size, config.image_size, 3), -1, 1)
    batch = {"pixels": pixels, "posterior_noise": tf.random.normal((stage.batch_size, *shape))}
    print("autoencoder", seconds_a_step(trainer, optimizer_of(trainer, stage, 100), batch))

    vocabulary, stage = Vocabulary.from_texts(["a red flower"]), config.training
    unet, text_encoder = make_diffusion(config, vocabulary)
    networks = Networks(vae, text_encoder, unet, Process(**part(config.diffusion)), vocabulary)
    trainer = LatentDiffusionTrainer(networks, config.image_size, micro_batches=micro_batches)
    rows = stage.batch_size
    batch = {
        "latents": tf.random.normal((rows, *shape)),
        "noise": tf.random.normal((rows, *shape)),
        "diffusion_times": tf.random.uniform((rows,)),
        "tokens": tf.ones((rows, vocabulary.length), tf.int32),
        "mask": tf.ones((rows, vocabulary.length), tf.bool),
    }
    print("u-net", seconds_a_step(trainer, optimizer_of(trainer, stage, 100), batch))


def seconds_a_step(trainer, optimizer, batch):
    import tensorflow as tf

    trainer.compile(optimizer)
    step = tf.function(trainer.train_step, autograph=False)
    step(batch)
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step(batch)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    one(*sys.argv[1:]) if sys.argv[1:] else main()
