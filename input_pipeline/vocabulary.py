"""Words and their ids: the Cup3 dictionary, or one counted from captions; and the labels of classes, read as words."""

import collections
import json
import re
import warnings
from pathlib import Path

import numpy as np

from errors import InputError
from files import atomic_file

PAD, RARE = "<PAD>", "<RARE>"
SHOWN_LABELS = 5  # in a message
_PUNCTUATION = re.compile(r"[^\w\s]|_")


def words_of(text):
    """Lower-case words of a text; punctuation separates words as a space does."""
    return _PUNCTUATION.sub(" ", text.lower()).split()


class Vocabulary:
    """Translates texts to rows of ids and back.

    As in the Deep Learning Cup 3's dictionary, id 0 and the last but one are both '<PAD>' and the last is '<RARE>'.
    Captions are padded with the last '<PAD>' (`pad_id`, 5427 there); id 0 also reads as padding.

    Args:
        words: Sequence of str, the word of each id.
        length: Ids in a row, T.

    Raises:
        InputError: '<PAD>' or '<RARE>' is missing, or one word has two ids.
    """

    _specials = (PAD, RARE)

    def __init__(self, words, length=20):
        self.words, self.length = tuple(words), int(length)
        counts = collections.Counter(self.words)
        for special in self._specials:
            if not counts[special]:
                raise InputError(
                    f"dictionary: the word {special} is missing; received {len(self.words)} words"
                )
        doubled = [word for word, count in counts.items() if count > 1 and word != PAD]
        if doubled:
            raise InputError(
                f"dictionary: the word {doubled[0]!r} has {counts[doubled[0]]} ids, expected one"
            )
        self._ids = {
            word: index for index, word in enumerate(self.words)
        }  # of several '<PAD>' the last stays
        self.pad_id, self.rare_id = self._ids.pop(PAD), self._ids.get(RARE)
        self._pads = np.array([index for index, word in enumerate(self.words) if word == PAD], np.int32)

    @property
    def size(self):
        """Number of ids, paddings included: the rows of an embedding table."""
        return len(self.words)

    @property
    def is_unconditional(self):
        """Whether there is no word to draw from, as where a model is trained on pictures alone."""
        return self.size == len(self._pads)

    def check(self, texts, name="prompts"):
        """Refuses texts that cannot be encoded: of words there are none, as an unknown one is a '<RARE>' one."""

    def encode(self, texts):
        """Ids of texts: lower-cased, punctuation stripped, unknown words '<RARE>', padded or cut to `length`.

        Args:
            texts: Sequence of B str.

        Returns:
            (tokens int32 (B, T), mask bool (B, T)); see `mask`. One warning counts the texts that were cut.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of str, received one str")
        rows = [self._encode(text) for text in texts]
        tokens = np.full((len(rows), self.length), self.pad_id, np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids[: self.length]
        n_cut = sum(len(ids) > self.length for ids in rows)
        if n_cut:
            texts, whose = f"{len(rows)} text{'s' * (len(rows) != 1)}", "its" if n_cut == 1 else "their"
            warnings.warn(f"{n_cut} of {texts} cut to {whose} first {self.length} words", stacklevel=2)
        return tokens, self.mask(tokens)

    def unknown(self, texts):
        """The words of texts that `encode` reads as '<RARE>', each once, in the order in which they come first."""
        words = (word for text in texts for word in self._words(text))
        return list(dict.fromkeys(word for word in words if word not in self._ids))

    def _encode(self, text):
        return [self._ids.get(word, self.rare_id) for word in self._words(text)]

    def _words(self, text):
        """A word as the dictionary writes it, '<RARE>' included, counts before its punctuation is stripped."""
        for chunk in text.split():
            yield from [chunk] if chunk in self._ids else words_of(chunk)

    def decode(self, tokens):
        """Texts of rows of ids: `encode(decode(tokens))` gives `tokens` back where padding (`pad_id`) only trails.

        Args:
            tokens: int (B, T).

        Returns:
            list of B str, padding left out.

        Raises:
            InputError: an id outside the dictionary.
        """
        tokens = np.asarray(tokens)
        outside = (tokens < 0) | (tokens >= self.size)
        if outside.any():
            raise InputError(
                f"token {tokens[outside][0]} is not in the dictionary, expected 0 to {self.size - 1}"
            )
        return [" ".join(self.words[index] for index in row if self.words[index] != PAD) for row in tokens]

    def mask(self, tokens):
        """Where attention may look: at words. The first place is always open, so that an empty text is defined.

        Args:
            tokens: int (B, T).

        Returns:
            bool (B, T).
        """
        mask = ~np.isin(tokens, self._pads)
        mask[..., 0] = True
        return mask

    def empty(self):
        """Tokens int32 (T,) of the empty text, which stands for "no caption" in classifier-free guidance."""
        return np.full((self.length,), self.pad_id, np.int32)

    def save(self, path):
        """Write the words, or labels, as JSON."""
        with atomic_file(path) as file:
            file.write(json.dumps(self._content(), ensure_ascii=False, indent=0).encode())

    def _content(self):
        return {"length": self.length, "words": self.words}

    @classmethod
    def load(cls, path):
        """Read what `save` wrote: a `Vocabulary`, or `Labels`.

        Raises:
            InputError: the file is missing or holds something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if "labels" in content:
                return Labels(map(str, content["labels"]))
            words, length = tuple(map(str, content["words"])), int(content["length"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise InputError(f"{path}: cannot be read as a vocabulary ({problem})") from None
        return cls(words, length)

    @classmethod
    def from_cup3(cls, path, length=20):
        """Read the Cup3 dictionary `word2Id.npy`: rows (word, id) of text, ids 0 to N-1, without unpickling.

        Raises:
            InputError: the file is missing, holds pickled objects, is truncated or has other ids.
        """
        try:
            table = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError) as error:
            raise InputError(
                f"{path}: cannot be read as a dictionary ({type(error).__name__}: {error})"
            ) from None
        if (
            not isinstance(table, np.ndarray)
            or table.dtype.kind != "U"
            or table.ndim != 2
            or table.shape[1] != 2
        ):
            raise InputError(f"{path}: expected rows of (word, id) as texts, received {_describe(table)}")
        for row, (_, index) in enumerate(table):
            if index != str(row):
                raise InputError(f"{path}: row {row} has id {str(index)!r}, expected '{row}'")
        return cls(table[:, 0].tolist(), length)

    @classmethod
    def from_texts(cls, texts, length=20):
        """Count the words of texts: the most frequent gets id 1, as in the Cup3 dictionary.

        Args:
            texts: Iterable of str.
            length: Ids in a row, T.
        """
        counts = collections.Counter(word for text in texts for word in words_of(text))
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return cls([PAD, *words, PAD, RARE], length)


class Labels(Vocabulary):
    """The classes of pictures as a vocabulary whose texts are one label each: so labels go the way of captions.

    Id 0 is '<PAD>', the text of no label, for classifier-free guidance; label k has id k + 1. Without any label all
    pictures have the text of none: they are those of an unconditional model.

    Args:
        labels: Sequence of str, the names of the classes, of any words; none at all for an unconditional model.

    Raises:
        InputError: a label twice, or one that is '<PAD>', empty, has blanks at its ends or cannot be printed.
    """

    _specials = (PAD,)

    def __init__(self, labels):
        self.labels = tuple(labels)
        for label in self.labels:
            if label in ("", PAD) or label != label.strip() or not label.isprintable():
                raise InputError(f"labels: received {label!r}, expected the name of a class")
        super().__init__([PAD, *self.labels], length=1)

    def check(self, texts, name="prompts"):
        """Refuses texts that are neither a label nor empty, which is that of no label.

        Args:
            texts: Sequence of str.
            name: What the message calls them.

        Raises:
            InputError: an unknown label; the line names the first of those that are known.
        """
        unknown = self.unknown(texts)
        if unknown:
            raise InputError(f"{name}: received {unknown[0]!r}, expected {self._known()}")

    def _known(self):
        if not self.labels:
            return "none: the model was trained on pictures alone (--conditioning none)"
        further = len(self.labels) - SHOWN_LABELS
        shown = ", ".join(map(repr, self.labels[:SHOWN_LABELS]))
        return f"a class: {shown}" + (f" or {further} more, see vocabulary.json" if further > 0 else "")

    def _words(self, text):
        """The whole text is one label."""
        return [text.strip()] if text.strip() else []

    def _encode(self, text):
        self.check([text])
        return super()._encode(text)

    def _content(self):
        return {"labels": self.labels}


def _describe(table):
    return f"{table.dtype} of shape {table.shape}" if isinstance(table, np.ndarray) else type(table).__name__
