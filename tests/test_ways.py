"""The way between two prompts and two seeds: its predictions, and what is none."""

import numpy as np
import pytest
import tensorflow as tf

from errors import InputError
from generate.ways import check_way, mixed


def test_each_sample_is_mixed_by_its_own_share():
    x = np.random.default_rng(0).normal(size=(3, 2, 2, 4)).astype("float32")
    factors = np.float32([1, 1, 1, -2, -2, -2]).reshape(6, 1, 1, 1)
    asked = []

    def denoise_pair(both, t):
        asked.append(t)
        return factors * both

    shares = np.float32([0, 0.5, 1]).reshape(3, 1, 1, 1)
    predicted = mixed(denoise_pair, tf.constant(shares))(x, 0.4)
    np.testing.assert_allclose(predicted, x * np.float32([1, -0.5, -2]).reshape(3, 1, 1, 1), rtol=1e-6)
    np.testing.assert_array_equal(predicted[::2], (x * factors[[0, 0, 3]])[::2])  # the ends to the bit
    assert asked == [0.4]


@pytest.mark.parametrize(
    ("way", "line"),
    [
        (
            {"frames": 3},
            "--frames: received 3 without --to-prompt or --to-seed, expected where the frames lead to",
        ),
        (
            {"gif": True},
            "--gif: received True without --to-prompt or --to-seed, expected where the frames lead to",
        ),
        (
            {"to_seed": 1, "prompts": []},
            "--to-seed: received with 0 prompts, expected one to start from",
        ),
        (
            {"to_prompt": "a", "prompts": ["a", "b"]},
            "--to-prompt: received with 2 prompts, expected one to start from",
        ),
        (
            {"to_seed": 1, "count": 4},
            "--to-seed: received with 4 pictures a prompt, expected one to start from",
        ),
        ({"to_seed": 1, "frames": 1}, "--frames: received 1, expected at least 2, the ends"),
        ({"to_seed": 1, "frames": -3}, "--frames: received -3, expected at least 2, the ends"),
        ({"to_prompt": " "}, "--to-prompt: received an empty text, expected words"),
        ({"to_seed": 2**63}, f"--to-seed: received {2**63}, expected a number of 64 bits"),
        ({"to_seed": 7}, "--to-seed: received 7, expected another seed than --seed"),
    ],
)
def test_what_is_no_way_is_refused(way, line):
    with pytest.raises(InputError) as refusal:
        check_way(**{"prompts": ["a flower"], "count": 1, "seed": 7, **way}, flag="--")
    assert str(refusal.value) == line
    with pytest.raises(InputError) as refusal:
        check_way(**{"prompts": ["a flower"], "count": 1, "seed": 7, **way})
    assert str(refusal.value).startswith(line.split(":")[0].removeprefix("--").replace("-", "_"))


@pytest.mark.parametrize("way", [{}, {"to_prompt": "a leaf", "frames": 2}, {"to_seed": -1, "gif": True}])
def test_a_way_and_none_at_all_pass(way):
    check_way(["a flower"], 1, 7, **way)


def test_many_pictures_without_a_way_pass():
    check_way(["a flower", "a leaf"], 4, 7)
