"""`VAETrainer` and `LatentDiffusionTrainer`: networks and batches in, training out.

The only room with gradients and averaged weights. Both trainers are `keras.Model`s with `compile`
and `fit` and take Keras callbacks. Nothing in a step draws a random number: the batch carries its own, so N
replicas do what one does.
"""

from metrics import KID
from trainer._adversary import Adversary
from trainer._diffusion import LatentDiffusionTrainer
from trainer._vae import VAETrainer, at_once, decode_noise, reconstruct

__all__ = [
    "KID",
    "Adversary",
    "LatentDiffusionTrainer",
    "VAETrainer",
    "at_once",
    "decode_noise",
    "reconstruct",
]
