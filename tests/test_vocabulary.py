"""Words and ids: the dictionary's own rows are the truth, and encode and decode undo each other."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from errors import InputError
from input_pipeline.vocabulary import Labels, Vocabulary

WORDS = ["<PAD>", "flower", "petals", "pink", "rare", "<PAD>", "<RARE>"]


@pytest.fixture
def vocabulary():
    return Vocabulary(WORDS, length=4)


def test_special_ids_are_the_last_padding_and_rare(vocabulary):
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.rare_id, vocabulary.length) == (7, 5, 6, 4)


def test_encode_lowers_strips_pads_and_marks_unknown_words(vocabulary):
    tokens, mask = vocabulary.encode(["Pink, FLOWER!", "blue-petals", ""])
    assert tokens.tolist() == [[3, 1, 5, 5], [6, 2, 5, 5], [5, 5, 5, 5]]
    assert mask.tolist() == [[True, True, False, False]] * 2 + [[True, False, False, False]]
    assert (tokens.dtype, mask.dtype) == (np.int32, bool)


def test_both_paddings_are_masked(vocabulary):
    assert vocabulary.mask(np.array([[1, 0, 5, 2]])).tolist() == [[True, False, False, True]]


def test_truncation_warns_once_and_counts(vocabulary):
    with pytest.warns(UserWarning, match="^2 of 3 texts cut to their first 4 words$") as caught:
        tokens, _ = vocabulary.encode(["pink " * 5, "pink", "flower " * 9])
    assert len(caught) == 1
    assert tokens.tolist() == [[3, 3, 3, 3], [3, 5, 5, 5], [1, 1, 1, 1]]


def test_one_text_that_is_cut_is_no_plural(vocabulary):
    with pytest.warns(UserWarning, match="^1 of 1 text cut to its first 4 words$"):
        vocabulary.encode(["pink " * 5])


def test_unknown_words_are_named_once_each_and_are_those_that_become_rare(vocabulary):
    texts = ["Pink zebra, flower-zebra!", "<RARE> a zebra", "petals", "<PAD>"]
    assert vocabulary.unknown(texts) == ["zebra", "a", "pad"]
    assert vocabulary.unknown(["pink <RARE>", ""]) == []
    for word in ("zebra", "a", "pad"):
        assert vocabulary.encode([word])[0][0, 0] == vocabulary.rare_id


def test_no_warning_at_exactly_the_length(vocabulary):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vocabulary.encode(["pink " * 4])


def test_a_padding_typed_by_a_user_is_an_unknown_word(vocabulary):
    assert vocabulary.encode(["<PAD> pink"])[0].tolist() == [[6, 3, 5, 5]]


def test_decode_then_encode_gives_the_tokens_back(vocabulary):
    rng = np.random.default_rng(0)
    tokens = rng.choice([1, 2, 3, 4, 6], size=(50, 4)).astype(np.int32)  # '<RARE>' and 'rare' are told apart
    tokens[np.arange(4) >= rng.integers(0, 5, 50)[:, None]] = vocabulary.pad_id
    assert (vocabulary.encode(vocabulary.decode(tokens))[0] == tokens).all()


def test_decode_refuses_ids_outside(vocabulary):
    with pytest.raises(InputError, match="token 7 is not in the dictionary, expected 0 to 6"):
        vocabulary.decode([[1, 7, 5, 5]])


def test_one_text_for_many_is_a_mistake(vocabulary):
    with pytest.raises(TypeError):
        vocabulary.encode("pink")


def test_json_round_trip(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "v.json")
    loaded = Vocabulary.load(tmp_path / "v.json")
    assert (loaded.words, loaded.length) == (vocabulary.words, vocabulary.length)


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"words": ["a"]}', '{"words": 3, "length": 20}', '{"labels": 3}']
)
def test_load_refuses_other_files(tmp_path, text):
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(InputError, match="v.json"):
        Vocabulary.load(tmp_path / "v.json")


def test_from_texts_counts_words_in_the_order_of_the_cup():
    vocabulary = Vocabulary.from_texts(["A rose, a rose.", "a Tulip"], length=5)
    assert vocabulary.words == ("<PAD>", "a", "rose", "tulip", "<PAD>", "<RARE>")
    assert vocabulary.encode(["a tulip"])[0].tolist() == [[1, 3, 4, 4, 4]]


FLOWERS = ("canna lily", "Iris", "tulip")


def test_a_label_is_a_text_of_one_id_whatever_its_words():
    labels = Labels(FLOWERS)
    tokens, mask = labels.encode(["tulip", " canna lily", ""])
    assert (tokens.tolist(), mask.tolist()) == ([[3], [1], [0]], [[True]] * 3)
    assert tokens.dtype == np.int32
    assert labels.decode(tokens) == ["tulip", "canna lily", ""]
    assert (labels.size, labels.length, labels.empty().tolist()) == (4, 1, [0])
    assert not labels.is_unconditional and not Vocabulary(WORDS).is_unconditional


def test_an_unknown_label_is_refused_with_the_first_that_are_known():
    with pytest.raises(
        InputError, match="^prompts: received 'lily', expected a class: 'canna lily', 'Iris', 't"
    ):
        Labels(FLOWERS).encode(["tulip", "lily"])
    many = Labels([f"c{index}" for index in range(8)])
    with pytest.raises(
        InputError, match=r"^a: received 'c9', expected a class: 'c0', .*'c4' or 3 more, see vocab"
    ):
        many.check(["c1", "c9"], "a")
    for text in ("iris", "tulip canna lily", "<PAD>", "<RARE>"):
        assert Labels(FLOWERS).unknown(["tulip", "", text]) == [text]


def test_without_labels_there_is_the_empty_text_only():
    labels = Labels(())
    assert labels.is_unconditional
    assert labels.encode(["", " "])[0].tolist() == [[0], [0]] == [labels.empty().tolist()] * 2
    with pytest.raises(InputError, match="^prompts: received 'a rose', expected none: .*--conditioning none"):
        labels.check(["", "a rose"])


@pytest.mark.parametrize("labels", [FLOWERS, ()])
def test_labels_survive_json(labels, tmp_path):
    Labels(labels).save(tmp_path / "v.json")
    loaded = Vocabulary.load(tmp_path / "v.json")
    assert (type(loaded), loaded.labels, loaded.words) == (Labels, labels, ("<PAD>", *labels))


@pytest.mark.parametrize("label", ["", " rose", "<PAD>", "a\nb", "\udcff"])
def test_refuses_labels_that_nobody_could_name(label):
    with pytest.raises(InputError, match="^labels: received .*, expected the name of a class$"):
        Labels(["tulip", label])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["<PAD>", "a"], "<RARE> is missing"),
        (["a", "<RARE>"], "<PAD> is missing"),
        (["<PAD>", "a", "a", "<RARE>"], "'a' has 2 ids"),
    ],
)
def test_refuses_broken_word_lists(words, message):
    with pytest.raises(InputError, match=message):
        Vocabulary(words)


def test_reads_the_cup3_dictionary(tmp_path):
    np.save(tmp_path / "word2Id.npy", np.array([(word, str(i)) for i, word in enumerate(WORDS)]))
    assert Vocabulary.from_cup3(tmp_path / "word2Id.npy", length=4).words == tuple(WORDS)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.array([("<PAD>", "0"), ("<RARE>", "7")]), "row 1 has id '7', expected '1'"),
        (np.zeros((3, 2)), "expected rows of .word, id. as texts, received float64"),
        (np.array(["<PAD>", "<RARE>"]), "received <U6 of shape"),
    ],
)
def test_refuses_other_dictionaries(tmp_path, table, message):
    np.save(tmp_path / "word2Id.npy", table)
    with pytest.raises(InputError, match=message):
        Vocabulary.from_cup3(tmp_path / "word2Id.npy")


class _Trap:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return (os.mkdir, (self.canary,))


def test_a_dictionary_with_pickled_objects_is_refused_and_runs_nothing(tmp_path):
    canary = tmp_path / "canary"
    np.save(tmp_path / "word2Id.npy", np.array([_Trap(canary)], object), allow_pickle=True)
    with pytest.raises(InputError, match="word2Id.npy: cannot be read as a dictionary"):
        Vocabulary.from_cup3(tmp_path / "word2Id.npy")
    assert not canary.exists()


@pytest.mark.parametrize("content", [b"", b"no numpy", b"\x93NUMPY\x01\x00v\x00{'descr': '<U9', 'fortran"])
def test_refuses_damaged_dictionaries(tmp_path, content):
    (tmp_path / "word2Id.npy").write_bytes(content)
    with pytest.raises(InputError, match="word2Id.npy: cannot be read as a dictionary"):
        Vocabulary.from_cup3(tmp_path / "word2Id.npy")


@pytest.mark.skipif("CUP3_REAL_DATA" not in os.environ, reason="CUP3_REAL_DATA is not set")
def test_the_real_dictionary_has_the_ids_of_the_cup():
    folder = Path(os.environ["CUP3_REAL_DATA"]) / "cup3_flowers" / "dictionary"
    vocabulary = Vocabulary.from_cup3(folder / "word2Id.npy")
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.rare_id) == (5429, 5427, 5428)
    word_of = dict(np.load(folder / "id2Word.npy"))  # written by the Cup, independently of word2Id
    tokens = np.arange(1, 5401, dtype=np.int32).reshape(-1, 20)
    assert vocabulary.decode(tokens)[17] == " ".join(word_of[str(i)] for i in tokens[17])
    assert (vocabulary.encode(vocabulary.decode(tokens))[0] == tokens).all()
