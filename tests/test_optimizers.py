"""AdamW and Muon take the steps that their papers say, on one replica and on two."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import optimizers
from model.unet import LogVariance
from optimizers import NEWTON_SCHULZ, AdamW, Muon, adamw, is_matrix, muon, orthogonalised, warmup_cosine


def arrays(variables):
    return [np.asarray(variable).copy() for variable in variables]  # which an update in place would change


def reduced_step(strategy, gradients_of_replicas, optimizer, variables):
    """Applies to each replica its own share of the gradients, as `train_step` does."""

    def step():
        replica = tf.distribute.get_replica_context()
        shares = tf.constant(gradients_of_replicas)[replica.replica_id_in_sync_group]
        optimizer.apply([shares[0], shares[1:]], variables)

    strategy.run(tf.function(step))


def weights_of(networks):
    """The trainable variables of all three networks."""
    parts = (networks.vae, networks.text_encoder, networks.unet)
    return [variable for network in parts for variable in network.trainable_variables]


@pytest.mark.parametrize("gradients", [[[18.0, 24.0], [-6.0, -8.0]], [[6.0, 8.0], [6.0, 8.0]]])
def test_clipping_sees_the_gradient_of_the_whole_batch(two_replicas, gradients):
    # The mean over the replicas is (6, 8), whose norm of 10 is clipped to 1; replica by replica it would be 2 or 0.
    with two_replicas.scope():
        variables = [keras.Variable(0.0, name="a"), keras.Variable([0.0], name="b")]
        optimizer = AdamW(1.0, beta_1=0.0, weight_decay=0.0, global_clipnorm=1.0)
        optimizer.build(variables)
    reduced_step(two_replicas, np.divide(gradients, 2).astype("float32"), optimizer, variables)
    momentums = [np.asarray(momentum) for momentum in optimizer._momentums]  # beta 0: the gradient itself
    np.testing.assert_allclose(np.hstack(momentums), [0.6, 0.8], rtol=1e-6)


def adamw_in_numpy(values, gradients, rate, decay, clip_norm, decayed):
    """Loshchilov & Hutter 2019, algorithm 2, with the gradients of every step clipped by their global norm.

    Keras adds its epsilon before the bias correction, as Kingma & Ba 2015 do at the end of their section 2.
    """
    m, v = [np.zeros_like(value) for value in values], [np.zeros_like(value) for value in values]
    for t, own in enumerate(gradients, start=1):
        norm = math.sqrt(sum(np.square(gradient).sum() for gradient in own))
        for i, gradient in enumerate(own):
            gradient = gradient * min(1.0, clip_norm / norm)
            m[i], v[i] = 0.9 * m[i] + 0.1 * gradient, 0.99 * v[i] + 0.01 * gradient**2
            step = math.sqrt(1 - 0.99**t) / (1 - 0.9**t) * m[i] / (np.sqrt(v[i]) + 1e-7)
            values[i] = values[i] - rate * (step + decay * decayed[i] * values[i])
    return values


def test_adamw_is_the_papers_and_decays_kernels_only():
    layers = [keras.layers.Embedding(5, 3), keras.layers.LayerNormalization(), keras.layers.Dense(2)]
    tokens = np.array([[1, 1, 3], [3, 1, 0]], "int32")  # words come twice: their gradients must add up
    model = keras.Sequential(layers)
    model(tokens)
    embeddings, gamma, beta, kernel, bias = variables = model.trainable_variables
    before = [np.asarray(variable, "float64") for variable in variables]
    optimizer = adamw(variables, learning_rate=0.01, weight_decay=0.5, clip_norm=0.7)
    gradients = []
    for seed in range(3):
        pull = np.random.default_rng(seed).normal(size=(2, 3, 2)).astype("float32")
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(tokens) * pull)
        own = tape.gradient(loss, variables)
        gradients.append([tf.convert_to_tensor(gradient).numpy().astype("float64") for gradient in own])
        optimizer.apply(own, variables)
    expected = adamw_in_numpy(before, gradients, 0.01, 0.5, 0.7, decayed=(0, 0, 0, 1, 0))
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_allclose(variable, value, rtol=1e-4, atol=1e-6, err_msg=variable.path)


def test_of_our_networks_only_matrices_and_convolutions_decay(toy_networks):
    variables = weights_of(toy_networks())
    optimizer = adamw(variables, learning_rate=0.1, weight_decay=0.5, clip_norm=0)
    before = arrays(variables)
    optimizer.apply([tf.zeros(variable.shape) for variable in variables], variables)  # decay is all that acts
    for variable, value in zip(variables, before, strict=True):
        is_table = "words" in variable.path or "positions" in variable.path
        decayed = value.ndim > 1 and not is_table
        np.testing.assert_allclose(variable, value * (0.95 if decayed else 1.0), rtol=1e-6)


# Muon.


def newton_schulz(matrix):
    """The iteration on the singular values themselves."""
    u, values, v = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.linalg.norm(matrix)
    for a, b, c in NEWTON_SCHULZ:
        values = a * values + b * values**3 + c * values**5
    return u * values @ v


def test_each_step_of_newton_schulz_is_the_best_for_what_the_one_before_leaves():
    # Chebyshev: an odd polynomial of three coefficients is nearest to 1 where its errors alternate four times.
    least, most = 0.01, 1.0
    for step, (a, b, c) in enumerate(NEWTON_SCHULZ):
        x = np.geomspace(least, most, 20001)
        error = a * x + b * x**3 + c * x**5 - 1
        turns = np.flatnonzero(np.diff(np.sign(np.diff(error)))) + 1
        extremes = error[[0, *turns, -1]]
        np.testing.assert_allclose(
            np.abs(extremes), np.abs(extremes).max(), rtol=5e-3, err_msg=f"step {step}"
        )
        np.testing.assert_array_equal(np.sign(extremes), [-1, 1, -1, 1], err_msg=f"step {step}")
        least, most = 1 + error.min(), 1 + error.max()
    assert 0.729 < least < most < 1.271


def test_from_a_hundredth_on_three_steps_leave_less_than_five_of_the_first_published():
    values = published = np.geomspace(0.01, 1, 2001)  # Jordan et al. 2024
    for a, b, c in NEWTON_SCHULZ:
        values = a * values + b * values**3 + c * values**5
    for _ in range(5):
        published = 3.4445 * published - 4.7750 * published**3 + 2.0315 * published**5
    assert np.abs(values - 1).max() < np.abs(published - 1).max()


@pytest.mark.parametrize("shape", [(5, 5), (40, 6), (6, 40), (1, 7), (7, 1)])
def test_orthogonalised_matrices_are_that_iteration_s(shape):
    matrices = np.random.default_rng(0).normal(size=(3, *shape)).astype("float32")
    found = np.asarray(orthogonalised(tf.constant(matrices)))
    expected = [newton_schulz(matrix.astype("float64")) for matrix in matrices]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_orthogonalised_matrices_keep_directions_and_lose_lengths():
    u, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 4)))
    v, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))
    matrix = u @ np.diag([1.0, 0.5, 0.2, 0.05]) @ v
    found = np.asarray(orthogonalised(tf.constant(matrix[None], "float32")))[0]
    aligned = u.T @ found @ v.T  # diagonal, where the directions are kept
    np.testing.assert_allclose(aligned - np.diag(np.diag(aligned)), 0, atol=1e-4)
    assert 0.6 < np.diag(aligned).min() <= np.diag(aligned).max() < 1.3


def test_a_matrix_of_zeros_stays_zeros():
    np.testing.assert_array_equal(orthogonalised(tf.zeros((2, 4, 3))), np.zeros((2, 4, 3)))


def toy_variables():
    """A convolution, two matrices of one shape, a vector, and a first convolution, which is AdamW's."""
    rng = np.random.default_rng(3)
    shapes = {
        "conv": (3, 3, 2, 4),
        "one": (6, 4),
        "two": (6, 4),
        "bias": (4,),
        "conv_in_kernel": (3, 3, 1, 4),
    }
    return [
        keras.Variable(rng.normal(size=shape).astype("float32"), name=name) for name, shape in shapes.items()
    ]


def toy_gradients(variables, seed):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=variable.shape).astype("float32") for variable in variables]


def test_muon_is_the_papers_for_matrices_and_adamw_for_the_rest():
    variables, twins = toy_variables(), toy_variables()
    settings = {"learning_rate": 0.01, "weight_decay": 0.5, "clip_norm": 2.0}
    optimizer, adam = muon(variables, **settings), adamw(twins, **settings)
    expected, momentums = arrays(variables[:3]), [np.zeros(variable.shape) for variable in variables[:3]]
    for seed in range(3):
        gradients = toy_gradients(variables, seed)
        optimizer.apply([tf.constant(gradient) for gradient in gradients], variables)
        adam.apply([tf.constant(gradient) for gradient in gradients], twins)
        norm = math.sqrt(sum(np.square(gradient).sum() for gradient in gradients))
        for i in range(3):
            gradient = gradients[i] * min(1.0, 2.0 / norm)
            momentums[i] = 0.95 * momentums[i] + 0.05 * gradient
            ahead = (0.95 * momentums[i] + 0.05 * gradient).reshape(-1, 4)
            step = 0.2 * math.sqrt(max(ahead.shape)) * newton_schulz(ahead).reshape(expected[i].shape)
            expected[i] = expected[i] * (1 - 0.01 * 0.5) - 0.01 * step
    for variable, value in zip(variables[:3], expected, strict=True):
        np.testing.assert_allclose(variable, value, rtol=2e-3, atol=2e-4, err_msg=variable.path)
    for variable, twin in zip(variables[3:], twins[3:], strict=True):
        np.testing.assert_array_equal(variable, twin, err_msg=variable.path)


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_amsgrad_is_refused(kind):
    with pytest.raises(ValueError, match="no amsgrad"):
        kind(0.1, amsgrad=True).build(toy_variables())


def test_muon_keeps_no_squares_of_matrices():
    variables = toy_variables()
    optimizer = muon(variables, learning_rate=0.1, weight_decay=0, clip_norm=0)
    names = [variable.path for variable in optimizer.variables]
    assert sum("momentum" in name for name in names) == len(variables)
    assert sum("velocity" in name for name in names) == 2  # bias and conv_in


def test_muon_takes_kernels_but_the_first_and_last_of_our_networks(toy_networks):
    matrices, left = set(), set()
    for variable in weights_of(toy_networks()) + LogVariance().weights:
        if len(variable.shape) >= 2:
            (matrices if is_matrix(variable) else left).add(variable.path)
    ends = ["conv_in", "conv_out", "log_variance"]  # of the U-Net, and beside it
    ends += ["encoder.conv_in", "encoder.conv_out", "quant_conv"]
    ends += ["post_quant_conv", "decoder.conv_in", "decoder.conv_out"]
    tables = {path for path in left if path.endswith("/embeddings")}
    assert {path.rsplit("/", 1)[0].rsplit("/", 1)[-1] for path in tables} == {"words", "positions"}
    assert left - tables == {f"{layer}/kernel" for layer in ends}
    assert len(matrices) > 20


def test_muon_on_two_replicas_is_muon_on_one(two_replicas):
    def trained(strategy, shares):
        with strategy.scope():
            variables = toy_variables()
            optimizer = muon(variables, learning_rate=0.01, weight_decay=0.1, clip_norm=1.0)

        def step(seed):
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            gradients = [
                tf.gather(tf.stack([share * gradient for share in shares]), replica)
                for gradient in toy_gradients(variables, seed)
            ]
            optimizer.apply(gradients, variables)

        for seed in range(3):
            strategy.run(tf.function(step), args=(seed,))
        return [strategy.experimental_local_results(variable.value)[-1].numpy() for variable in variables]

    one, two = trained(tf.distribute.get_strategy(), [1.0]), trained(two_replicas, [0.25, 0.75])
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# The learning rate.


def test_the_learning_rate_climbs_linearly_and_falls_along_a_cosine():
    rate = warmup_cosine(2.0, steps=100, warmup_steps=20)
    for step in (0, 5, 20):
        assert float(rate(step)) == pytest.approx(0.1 + (2.0 - 0.1) * step / 20, rel=1e-5)
    for step in (20, 35, 60, 100, 200):
        fall = (1 + math.cos(math.pi * min(1.0, (step - 20) / 80))) / 2
        assert float(rate(step)) == pytest.approx(2.0 * (0.01 + 0.99 * fall), rel=1e-5)


@pytest.mark.parametrize(("steps", "warmup_steps"), [(6, 100), (1, 100), (1, 0), (4, 0)])
def test_a_training_shorter_than_its_warm_up_still_learns(steps, warmup_steps):
    rate = warmup_cosine(2.0, steps, warmup_steps)
    rates = [float(rate(step)) for step in range(steps)]
    assert min(rates) > 0
    assert max(rates) == pytest.approx(2.0)


def test_a_rate_that_does_not_fall_stays_at_its_peak():
    rate = warmup_cosine(2.0, steps=100, warmup_steps=20, final=1.0)
    assert [float(rate(step)) for step in (20, 35, 100, 10**6)] == pytest.approx([2.0] * 4, rel=1e-6)
    falling = warmup_cosine(2.0, steps=100, warmup_steps=20)
    for step in (0, 5, 19):  # the climb is the same
        assert float(rate(step)) == float(falling(step)) < 2.0


COUNTED = ("iteration", "skipped", "skipped_in_row")


def state_of(optimizer):
    """All that an optimizer keeps, its counts apart."""
    return {
        variable.path: np.asarray(variable).copy()
        for variable in optimizer.variables
        if variable.path.split("/")[-1] not in COUNTED
    }


def stepped(make):
    """A matrix, which Muon has, and a bias, with an optimizer that has made a step."""
    variables = [
        keras.Variable(np.eye(3, 2, dtype="float32"), name="kernel"),
        keras.Variable([0.5, -1.0], name="bias"),
    ]
    optimizer = make(variables, learning_rate=0.1, weight_decay=0.1, clip_norm=1.0)
    optimizer.apply([tf.ones((3, 2)), tf.ones(2)], variables)
    return variables, optimizer


@pytest.mark.parametrize("make", [adamw, muon])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_counts(make, bad):
    variables, optimizer = stepped(make)
    weights, state = arrays(variables), state_of(optimizer)
    assert any(np.any(value) for value in state.values())
    for _ in range(2):
        optimizer.apply([tf.constant([[1.0, 1], [1, bad], [1, 1]]), tf.ones(2)], variables)
    for before, after in zip(weights, arrays(variables), strict=True):
        np.testing.assert_array_equal(after, before)
    for name, after in state_of(optimizer).items():
        np.testing.assert_array_equal(after, state[name], err_msg=name)
    assert (int(optimizer.iterations), int(optimizer.skipped), int(optimizer.skipped_in_row)) == (3, 2, 2)
    optimizer.apply([tf.ones((3, 2)), tf.ones(2)], variables)
    assert (int(optimizer.skipped), int(optimizer.skipped_in_row)) == (2, 0)
    assert not np.array_equal(arrays(variables)[0], weights[0])


def test_a_replica_that_is_not_finite_stops_the_step_of_all(two_replicas):
    with two_replicas.scope():
        variables = [keras.Variable(2.0, name="a"), keras.Variable([3.0], name="b")]
        optimizer = adamw(variables, learning_rate=0.1, weight_decay=0.0, clip_norm=1.0)
    reduced_step(two_replicas, [[1.0, 1.0], [1.0, np.nan]], optimizer, variables)
    for variable, value in zip(variables, (2.0, 3.0), strict=True):
        for own in two_replicas.experimental_local_results(variable.value):
            np.testing.assert_array_equal(np.ravel(own), value)
    assert np.asarray(optimizer.skipped) == 1
    reduced_step(two_replicas, [[1.0, 1.0], [1.0, 1.0]], optimizer, variables)
    assert np.asarray(optimizer.skipped) == 1 and np.asarray(variables[0]) < 2


@pytest.mark.parametrize("make", [adamw, muon])
def test_the_rates_factor_is_that_of_the_step(make):
    (slow, scaled), (fast, optimizer) = stepped(make), stepped(make)
    optimizer.rate_scale.assign(0.25)
    before = arrays(slow)
    for variables, own in ((slow, scaled), (fast, optimizer)):
        own.apply([tf.ones((3, 2)), tf.ones(2)], variables)
    for start, one, quarter in zip(before, arrays(slow), arrays(fast), strict=True):
        np.testing.assert_allclose(quarter - start, 0.25 * (one - start), rtol=1e-4, atol=1e-7)


def test_only_the_norm_of_all_clips():
    with pytest.raises(ValueError, match="clipnorm=1.0"):
        AdamW(0.1, clipnorm=1.0)


# The scale of the loss in 16 bits.


def scaled(kind=AdamW, **settings):
    """A matrix and a bias with an optimizer that scales the loss."""
    variables = [
        keras.Variable(np.eye(3, 2, dtype="float32"), name="kernel"),
        keras.Variable([0.5, -1.0], name="bias"),
    ]
    optimizer = kind(0.1, scales_loss=True, weight_decay=0.1, global_clipnorm=1.0, **settings)
    optimizer.build(variables)
    return variables, optimizer


def some_gradients(seed):
    rng = np.random.default_rng(seed)
    return [tf.constant(rng.normal(size=shape).astype("float32")) for shape in ((3, 2), (2,))]


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_gradients_of_a_scaled_loss_make_the_step_of_those_that_are_not(kind, monkeypatch):
    monkeypatch.setattr(optimizers, "STEPS_TO_DOUBLE", 2)  # so that the scale changes on the way
    variables, optimizer = scaled(kind)
    twins = [keras.Variable(variable, name=variable.name) for variable in variables]
    plain = kind(0.1, weight_decay=0.1, global_clipnorm=1.0)
    plain.build(twins)
    scales = []
    for seed in range(5):
        scales.append(float(optimizer.loss_scale))
        gradients = [own * (0.1 if seed % 2 else 10.0) for own in some_gradients(seed)]  # clipped and not
        optimizer.apply([own * optimizer.loss_scale for own in gradients], variables)
        plain.apply(gradients, twins)
    assert scales == [2.0**15, 2.0**15, 2.0**16, 2.0**16, 2.0**17]
    assert plain.loss_scale == 1.0
    for variable, twin in zip(variables, twins, strict=True):
        np.testing.assert_array_equal(variable, twin, err_msg=variable.path)  # powers of two lose no bit


def test_the_scale_halves_at_a_bad_step_and_doubles_after_good_ones(monkeypatch):
    monkeypatch.setattr(optimizers, "STEPS_TO_DOUBLE", 3)
    variables, optimizer = scaled()
    scales = []
    for is_good in (1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1):  # a bad one begins the count anew
        before = arrays(variables)
        bad = tf.constant(0.0 if is_good else math.inf)
        optimizer.apply([own + bad for own in some_gradients(0)], variables)
        scales.append(float(optimizer.loss_scale) / 2.0**15)
        assert np.array_equal(arrays(variables)[0], before[0]) != bool(is_good)
    assert scales == [1, 1, 0.5, 0.5, 0.5, 1, 1, 1, 0.5, 0.25, 0.25, 0.25, 0.5]


def test_the_scale_is_never_below_1():
    variables, optimizer = scaled()
    for _ in range(17):
        optimizer.apply([tf.fill((3, 2), math.nan), tf.zeros(2)], variables)
    assert float(optimizer.loss_scale) == 1.0
    assert int(optimizer.skipped) == 17


def test_16_bits_want_a_scale_and_32_none():
    variables = [keras.Variable([0.5, -1.0], name="bias")]
    former = keras.config.dtype_policy()
    wanted = {}
    try:
        for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
            keras.config.set_dtype_policy(policy)
            own = adamw(variables, learning_rate=0.1, weight_decay=0.0, clip_norm=1.0)
            wanted[policy] = float(own.loss_scale)
    finally:
        keras.config.set_dtype_policy(former)
    assert wanted == {"float32": 1.0, "mixed_bfloat16": 1.0, "mixed_float16": 2.0**15}


def test_a_replica_that_is_not_finite_halves_the_scale_of_all(two_replicas):
    with two_replicas.scope():
        variables = [keras.Variable(2.0, name="a"), keras.Variable([3.0], name="b")]
        optimizer = AdamW(0.1, scales_loss=True, weight_decay=0.0, global_clipnorm=1.0)
        optimizer.build(variables)
    reduced_step(two_replicas, [[1.0, 1.0], [1.0, np.nan]], optimizer, variables)
    for own in two_replicas.experimental_local_results(optimizer.loss_scale):
        assert float(own) == 2.0**14
