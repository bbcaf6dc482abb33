"""Files -> `tf.data` of batches: Cup3 pickles and dictionary, folders, CSV/JSONL; augmentation; caches.

The encoder comes in as a function.
"""

from input_pipeline.augmentation import Augmentation, augment, resized, to_pixels
from input_pipeline.batches import (
    latent_batches,
    picture_batches,
    picture_validation_batches,
    validation_batches,
)
from input_pipeline.caches import Latents, TextContext, cached_latents, cached_text
from input_pipeline.data_folder import CaptionedPictures, load_data
from input_pipeline.pictures import read_pictures
from input_pipeline.randomness import key, sample_order, split
from input_pipeline.safe_pickle import safe_read_pickle
from input_pipeline.vocabulary import RARE, Labels, Vocabulary

__all__ = [
    "RARE",
    "Augmentation",
    "CaptionedPictures",
    "Labels",
    "Latents",
    "TextContext",
    "Vocabulary",
    "augment",
    "cached_latents",
    "cached_text",
    "key",
    "latent_batches",
    "load_data",
    "picture_batches",
    "picture_validation_batches",
    "read_pictures",
    "resized",
    "safe_read_pickle",
    "sample_order",
    "split",
    "to_pixels",
    "validation_batches",
]
