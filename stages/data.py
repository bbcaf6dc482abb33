"""The order of the work: the pictures of a run and their captions or classes, checked and split."""

from pathlib import Path

import numpy as np

import config as settings
import input_pipeline as pipeline
from dataset import paper_flowers
from errors import InputError
from files import fingerprint


class Data:
    """The pictures of a run: in memory or mapped, split, with their validation captions (or classes, as captions).

    Attributes:
        pictures: uint8 (N, S, S, 3), of a side S that leaves room for the augmentation.
        captions, vocabulary: as in `input_pipeline.CaptionedPictures`.
        augmentation: the `input_pipeline.Augmentation` of the run.
        train_ids, validation_ids: int64, disjoint.
        validation_tokens: int32 (M, T), the first caption of each validation picture.
        shown_tokens: int32 (K, T), what samples are drawn from: the test captions, or those of validation.
        has_probe: whether these are paper flowers with captions, which the probe can compare with pictures.
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
        is_described = config.conditioning == "text"
        self.has_probe = is_described and (Path(config.data) / "attributes.csv").exists()
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
    captioned = pipeline.load_data(folder, config.conditioning)
    augmentation = pipeline.Augmentation(**settings.part(config.augmentation))
    pictures = pipeline.read_pictures(
        captioned.paths,
        augmentation.picture_side(config.image_size),
        least_side=settings.vae_factor(config),
        cache_file=run.cache_path("pictures.npy"),
    )
    _check_validation(config, len(pictures))
    _keep_vocabulary(config, run, captioned.vocabulary)
    data = Data(config, captioned, pictures, augmentation)
    print(
        f"   {len(pictures)} pictures of {pictures.shape[1]} px, {len(data.validation_ids)} of them for validation; "
        f"{_in_words(data.vocabulary)}\n   from {folder}"
    )
    if config.data == settings.Config.data and len(pictures) != paper_flowers.TRAIN:  # no run begins so
        print(
            f"   note: the settings are sized for {paper_flowers.TRAIN} pictures here; "
            f"to have them drawn, move {folder} away and give another --run"
        )
    return data


def _in_words(vocabulary):
    """How much a vocabulary knows, for a user."""
    if vocabulary.is_unconditional:
        return "without captions"
    if isinstance(vocabulary, pipeline.Labels):
        n = len(vocabulary.labels)
        return f"{n} class{'es' * (n != 1)}"
    return f"{vocabulary.size} words"


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
            f"{config.data}: received {n} picture{'s' * (n != 1)}, of which "
            f"--training.validation-fraction {fraction} holds out {held_out}; "
            f"expected at least {settings.FEWEST_FOR_KID} for KID: {_more_held_out(n, config.seed)}"
        )


def _more_held_out(n, seed):
    """How `n` pictures can do, if they can."""
    most = settings.LARGEST_VALIDATION_FRACTION
    for hundredths in range(1, round(100 * most) + 1):
        if len(pipeline.split(n, hundredths / 100, seed)[1]) >= settings.FEWEST_FOR_KID:
            return f"give --training.validation-fraction {hundredths / 100}, or more pictures"
    return "give more pictures"


def _keep_vocabulary(config, run, vocabulary):
    """Writes the words into the run folder; a run that goes on must find the same words in its data."""
    path = run.vocabulary_path
    if not path.exists():
        vocabulary.save(path)
    elif pipeline.Vocabulary.load(path).words != vocabulary.words:
        what = "words" if config.conditioning == "text" else "classes"
        raise InputError(
            f"{config.data}: its {what} are no longer those of {path}; expected unchanged data, or another --run"
        )
