"""What tests of the trainers share: an autoencoder whose steps are traced in a second."""

import keras

from model.vae import AutoencoderKL
from tests.batches import IMAGE_SIZE, LATENT_SHAPE


class LightVAE(AutoencoderKL):
    """An autoencoder with few variables."""

    def __init__(self):
        keras.Model.__init__(self, name="vae")
        self.factor, self.skips = 2, False
        self.encoder = keras.layers.Conv2D(4, 2, strides=2, name="encoder")
        self.decoder = keras.layers.Conv2DTranspose(3, 2, strides=2, name="decoder")
        self.encoder.build((None, IMAGE_SIZE, IMAGE_SIZE, 3))
        self.decoder.build((None, *LATENT_SHAPE))
        self.built = True
