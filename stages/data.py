"""The order of the work: the pictures and captions of a run, checked and split."""

from pathlib import Path

import numpy as np

import config as settings
import input_pipeline as pipeline
from dataset import paper_flowers
from errors import InputError
from files import fingerprint


class Data:
    """The captioned pictures of a run: in memory or mapped, split, with their validation captions.

    Attributes:
        pictures: uint8 (N, S, S, 3), of a side S that leaves room for the augmentation.
        captions, vocabulary: as in `input_pipeline.CaptionedPictures`.
        augmentation: the `input_pipeline.Augmentation` of the run.
        train_ids, validation_ids: int64, disjoint.
        validation_tokens: int32 (M, T), the first caption of each validation picture.
        shown_tokens: int32 (K, T), what samples are drawn from: the test captions, or those of validation.
        has_probe: whether these are paper flowers, whose attributes the probe can read.
        fingerprint: of the pictures.
    """

    def __init__(self, config, captioned, pictures, augmentation):
        self.pictures, self.augmentation = pictures, augmentation
        self.vocabulary, self.captions = captioned.vocabulary, captioned.captions
        self.train_ids, self.validation_ids = pipeline.split(
            len(pictures), config.training.validation_fraction, config.seed
        )
        self.validation_tokens = np.stack([self.captions[index][0] for index in self.validation_ids])
        tests = captioned.test_tokens
        self.shown_tokens = self.validation_tokens if tests is None else tests
        self.has_probe = (Path(config.data) / "attributes.csv").exists()
        self.fingerprint = fingerprint(pictures)

    def whole(self, ids, image_size):
        """The pictures `ids` without augmentation, uint8 (N, image_size, image_size, 3)."""
        return pipeline.resized(np.asarray(self.pictures[ids]), image_size)


def prepared_data(config, run) -> Data:
    """Reads the data folder (the built-in data is drawn where it is missing) and keeps its words in the run folder.

    Raises:
        InputError: data that cannot be used, or too few pictures.
    """
    folder = Path(config.data)
    if config.data == settings.Config.data:
        _provide_paper_flowers(folder, config.image_size, run)
    captioned = pipeline.load_data(folder)
    augmentation = pipeline.Augmentation(**settings.part(config.augmentation))
    pictures = pipeline.read_pictures(
        captioned.paths,
        augmentation.picture_side(config.image_size),
        cache_file=run.cache_path("pictures.npy"),
    )
    _check_validation(config, len(pictures))
    _keep_vocabulary(config, run, captioned.vocabulary)
    data = Data(config, captioned, pictures, augmentation)
    print(
        f"   {len(pictures)} pictures of {pictures.shape[1]} px, {len(data.validation_ids)} of them for validation; "
        f"{data.vocabulary.size} words"
    )
    return data


def _provide_paper_flowers(folder, size, run):
    """Draws the built-in data where it is missing; where it is there, it must be what would be drawn."""
    if not folder.exists():
        print(f"   drawing paper flowers into {folder}")
        paper_flowers.write(folder, size=size)
    elif not run.vocabulary_path.exists():  # a run that has begun stays with the data that it began with
        paper_flowers.require_same(folder, size=size)


def _check_validation(config, n):
    fraction = config.training.validation_fraction
    held_out = len(pipeline.split(n, fraction, config.seed)[1])
    if held_out < settings.FEWEST_FOR_KID:
        raise InputError(
            f"{config.data}: received {n} pictures, of which --training.validation-fraction {fraction} holds out "
            f"{held_out}; expected at least {settings.FEWEST_FOR_KID} for KID"
        )


def _keep_vocabulary(config, run, vocabulary):
    """Writes the words into the run folder; a run that goes on must find the same words in its data."""
    path = run.vocabulary_path
    if not path.exists():
        vocabulary.save(path)
    elif pipeline.Vocabulary.load(path).words != vocabulary.words:
        raise InputError(f"{config.data}: its words are no longer those of {path}; expected unchanged data")
