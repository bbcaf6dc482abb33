"""The vocabulary encoder: what padding may and may not do, order, names, gradients."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from model.text_encoder import VocabularyEncoder

SIZES = {"vocabulary_size": 13, "length": 5, "width": 8, "layers": 2, "heads": 2}
TOKENS = np.array([[3, 1, 4, 0, 0], [5, 9, 2, 6, 0], [0, 0, 0, 0, 0]], "int32")
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]], bool)


@pytest.fixture(scope="module")
def encoder():
    network = VocabularyEncoder(**SIZES)
    for index, variable in enumerate(network.variables):
        variable.assign(np.random.default_rng(index).normal(0, 0.5, variable.shape))
    return network


@pytest.mark.filterwarnings("error:.*mask")  # that a layer would let fall
def test_shape_is_as_said(encoder):
    assert encoder([TOKENS, MASK]).shape == (3, 5, 8)
    assert encoder.context_shape == (5, 8)


def test_the_ids_of_padding_do_not_matter(encoder):
    other = np.where(MASK, TOKENS, 7)
    context, changed = encoder([TOKENS, MASK]), encoder([other, MASK])
    np.testing.assert_array_equal(context.numpy()[MASK], changed.numpy()[MASK])


def test_every_word_matters_to_every_word(encoder):
    before = encoder([TOKENS, MASK]).numpy()
    for place in range(4):
        tokens = TOKENS.copy()
        tokens[1, place] = 11
        change = np.abs(encoder([tokens, MASK]).numpy() - before).max(-1)
        assert (change[1][MASK[1]] > 1e-4).all()
        assert (change[[0, 2]] == 0).all()


def test_order_matters(encoder):
    swapped = TOKENS[:, [1, 0, 2, 3, 4]]
    change = np.abs(encoder([swapped, MASK]).numpy()[0] - encoder([TOKENS, MASK]).numpy()[0])
    assert change[2].max() > 1e-3


def test_words_without_places_would_be_a_set(encoder):
    """Without the vectors of the places the encoder moves with its words: they alone carry the order."""
    places = next(v for v in encoder.variables if v.path == "positions/embeddings")
    kept = places.numpy()
    order = [2, 0, 1, 3, 4]
    try:
        places.assign(np.zeros_like(kept))
        context, moved = encoder([TOKENS, MASK]).numpy(), encoder([TOKENS[:, order], MASK[:, order]]).numpy()
    finally:
        places.assign(kept)
    np.testing.assert_allclose(moved, context[:, order], rtol=1e-4, atol=1e-5)


def test_captions_do_not_mix(encoder):
    alone = [encoder([TOKENS[i : i + 1], MASK[i : i + 1]]) for i in range(3)]
    np.testing.assert_allclose(encoder([TOKENS, MASK]), np.concatenate(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_a_caption_of_padding_alone_has_a_context(encoder, first):
    mask = np.zeros((1, 5), bool)
    mask[0, 0] = first
    assert np.isfinite(encoder([np.zeros((1, 5), "int32"), mask])).all()


def test_compiled_is_eager(encoder):
    compiled = tf.function(encoder)([TOKENS, MASK])
    np.testing.assert_allclose(compiled, encoder([TOKENS, MASK]), rtol=1e-5, atol=1e-5)


def test_names_are_unique_and_the_same_again(encoder):
    paths = [variable.path for variable in encoder.variables]
    assert len(set(paths)) == len(paths)
    keras.layers.Embedding(3, 2).build(())
    assert [variable.path for variable in VocabularyEncoder(**SIZES).variables] == paths
    assert {"words/embeddings", "positions/embeddings", "layers.1/attn/to_q/kernel"} <= set(paths)


def test_the_config_rebuilds_the_network(encoder):
    again = VocabularyEncoder.from_config(json.loads(json.dumps(encoder.get_config())))
    assert [v.path for v in again.variables] == [v.path for v in encoder.variables]
    again.set_weights(encoder.get_weights())
    np.testing.assert_array_equal(again([TOKENS, MASK]), encoder([TOKENS, MASK]))


def test_every_weight_has_a_gradient(encoder):
    goal = np.random.default_rng(0).normal(size=(3, 5, 8))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(encoder([TOKENS, MASK], training=True) * goal)
    gradients = tape.gradient(loss, [variable.value for variable in encoder.trainable_variables])
    for variable, gradient in zip(encoder.trainable_variables, gradients):
        assert gradient is not None, variable.path
        # A bias of the keys adds the same to all scores of a query, which softmax does not see.
        assert np.any(tf.convert_to_tensor(gradient)) or variable.path.endswith("to_k/bias"), variable.path


def test_only_the_words_of_a_batch_move(encoder):
    words = next(v for v in encoder.trainable_variables if v.path == "words/embeddings")
    goal = np.random.default_rng(0).normal(size=(3, 5, 8))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(encoder([TOKENS, MASK], training=True) * goal)
    gradient = tf.convert_to_tensor(tape.gradient(loss, words.value)).numpy()
    moved = np.flatnonzero(np.abs(gradient).sum(-1))
    assert moved.tolist() == np.unique(TOKENS).tolist()
