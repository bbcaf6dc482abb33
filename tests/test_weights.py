"""Weights come back under their names, all of them or none."""

import keras
import numpy as np
import pytest

from checkpoint import assign, collect
from errors import InputError


class Variable:
    """As much of a Keras variable as the room uses."""

    def __init__(self, *shape, value=0.0):
        self.array = np.full(shape, value, "float32")
        self.shape = shape

    def __array__(self, dtype=None, copy=None):
        return self.array

    def assign(self, value):
        self.array[...] = value


def test_variables_come_back_under_their_prefix():
    raw = [
        ("a/kernel", Variable(2, 3, value=1)),
        ("a/bias", Variable(3, value=2)),
        ("rate", Variable(value=3)),
    ]
    ema = [(name, Variable(*variable.shape, value=9)) for name, variable in raw]
    saved = collect(raw, "raw") | collect(ema, "ema") | {"raw2/other": np.zeros(1)}
    assert {"raw/a/kernel", "ema/a/kernel"} < saved.keys()
    for _, variable in raw:
        variable.assign(7)
    assign(raw, saved, "raw")
    assert [variable.array.flat[0] for _, variable in raw] == [1, 2, 3]  # so the arrays were copies


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"raw/a": None}, "raw/a received nothing, expected (2, 3)"),
        ({"raw/c": np.zeros(4)}, "raw/c received (4,), expected nothing"),
        ({"raw/b": np.zeros((3, 1))}, "raw/b received (3, 1), expected (3,)"),
        ({"raw/b": np.zeros(())}, "raw/b received (), expected (3,)"),  # would be broadcast
        ({"raw/a": None, "raw/b": None}, "raw/a received nothing, expected (2, 3); raw/b received nothing"),
    ],
)
def test_other_weights_are_refused_and_nothing_is_assigned(change, message):
    variables = [("a", Variable(2, 3)), ("b", Variable(3))]
    saved = {"raw/a": np.ones((2, 3)), "raw/b": np.ones(3), "ema/z": np.ones(5)} | change
    saved = {name: array for name, array in saved.items() if array is not None}
    with pytest.raises(InputError) as refusal:
        assign(variables, saved, "raw", source="runs/x")
    assert str(refusal.value).startswith(f"runs/x: another set of variables: {message}")
    assert all((variable.array == 0).all() for _, variable in variables)


def test_a_long_list_of_differences_is_cut():
    with pytest.raises(InputError, match="; and 95 more$"):
        assign([(f"{i:02d}", Variable(1)) for i in range(100)], {}, "raw")


def test_two_variables_of_one_name_are_refused():
    twins = [("a", Variable(1)), ("b", Variable(1)), ("a", Variable(1))]
    for use in (lambda: collect(twins, "raw"), lambda: assign(twins, {}, "raw")):
        with pytest.raises(ValueError, match=r"one name: \['a'\]"):
            use()


def test_a_keras_network_and_its_optimizer_come_back(run):
    def network(seed):
        keras.utils.set_random_seed(seed)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, name="d")], name="net")
        model.compile(keras.optimizers.AdamW(0.1, name="adamw"), "mse")
        model.fit(np.ones((8, 3)), np.zeros((8, 4)), epochs=seed, verbose=0)
        return model

    def parts(model):
        return [(v.path, v) for v in model.variables], [(v.path, v) for v in model.optimizer.variables]

    (weights, slots), (other_weights, other_slots) = parts(network(3)), parts(network(2))
    run.save("unet", 3, collect(weights, "raw") | collect(slots, "optimizer"), {})
    saved = run.latest("unet").tensors
    with pytest.raises(InputError, match="another set of variables"):
        assign(other_weights[:1], saved, "raw")  # a smaller network would fit into the file
    assert not np.array_equal(weights[0][1], other_weights[0][1])
    assign(other_weights, saved, "raw")
    assign(other_slots, saved, "optimizer")
    for (name, expected), (_, received) in zip(weights + slots, other_weights + other_slots):
        np.testing.assert_array_equal(received, expected, err_msg=name)
    assert int(dict(other_slots)["adamw/iteration"]) == 3
