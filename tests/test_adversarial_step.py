"""A step against a discriminator is what its formulas say, for both sides, in one pass over both halves."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel
from model.discriminator import PatchConv, PatchDiscriminator
from model.vae import AutoencoderKL
from optimizers import adamw
from tests.batches import IMAGE_SIZE, LATENT_SHAPE, distance
from trainer import Adversary, VAETrainer, losses

RATE = 0.5  # of plain gradient descent, which shows gradients as they are


def trainer_of(optimizer=None, adversary=(), micro_batches=1, shape=(), judge=(), **settings):
    """A tiny trainer whose optimizers are gradient descent, unless `optimizer` makes others."""
    keras.utils.set_random_seed(4)
    tiny = {"blocks": (0, 0), "latent_channels": 2, "groups": 2, "attention": False}
    opponent = Adversary(
        PatchDiscriminator(4, 1, groups=2, **dict(judge)), **({"weight": 0.7} | dict(adversary))
    )
    settings = {
        "recon_loss": "mix",
        "kl_weight": 0.3,
        "perceptual": distance,
        "perceptual_weight": 0.1,
    } | settings
    vae = AutoencoderKL((4, 4), **tiny, **dict(shape))
    trainer = VAETrainer(vae, **settings, adversary=opponent, micro_batches=micro_batches)
    make = optimizer or (lambda variables, **_: keras.optimizers.SGD(RATE))
    others = opponent.discriminator.trainable_variables
    trainer.compile(make(trainer.trained_variables), make(others, name="disc"))
    return trainer


def batch_of(rows=4, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.uniform(-1, 1, (rows, IMAGE_SIZE, IMAGE_SIZE, 3)).astype("float32")
    noise = rng.normal(size=(rows, *LATENT_SHAPE)).astype("float32")
    return {"pixels": tf.constant(pixels), "posterior_noise": tf.constant(noise)}


def arrays(variables):
    return [np.asarray(variable).copy() for variable in variables]


def by_the_formulas(trainer, batch):
    """(gradients of the autoencoder, of the discriminator, lambda, both norms) by plain tapes over whole losses."""
    adversary, vae = trainer.adversary, trainer.vae
    pixels, judge = batch["pixels"], trainer.adversary.discriminator
    with tf.GradientTape(persistent=True) as tape:
        rebuilt, mean, logvar = vae.reparameterised(pixels, batch["posterior_noise"], training=True)
        recon = losses.reconstruction(trainer.recon_loss, pixels, rebuilt, trainer.l1_share)
        resembling = tf.reduce_mean(recon + 0.1 * distance(pixels, rebuilt))
        pressing = 0.3 * tf.reduce_mean(losses.kl_by_channel(mean, logvar))
        reconstructing = resembling + pressing
        fake, real = judge(rebuilt, training=True), judge(pixels, training=True)
        deceiving = tf.reduce_mean(losses.generator_loss(adversary.loss, fake))
        judging = tf.reduce_mean(
            losses.discriminator_loss(adversary.loss, real, judge(tf.stop_gradient(rebuilt)))
        )
        with tf.GradientTape() as inner:
            inner.watch(pixels)
            total = tf.reduce_sum(tf.reduce_mean(judge(pixels, training=True), axis=(1, 2, 3)))
        penalty = tf.reduce_mean(tf.reduce_sum(inner.gradient(total, pixels) ** 2, axis=(1, 2, 3)))
        judging += 0.5 * adversary.r1_weight * penalty
    kernel = vae.decoder.get_layer("decoder.conv_out").kernel
    norms = [float(tf.norm(tape.gradient(loss, kernel))) for loss in (resembling, deceiving)]
    factor = norms[0] / (norms[1] + 1e-4) if adversary.adaptive else 1.0
    variables = trainer.trained_variables
    own, other = (
        tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        for loss in (reconstructing, deceiving)
    )
    weight = adversary.weight * factor
    return (
        [np.asarray(one + weight * two) for one, two in zip(own, other, strict=True)],
        arrays(tape.gradient(judging, judge.trainable_variables)),
        weight,
        norms,
    )


def assert_close(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(b).max(), 1e-2))


@pytest.mark.parametrize(
    ("settings", "micro_batches"),
    [
        ({}, 1),
        ({}, 2),
        ({"adversary": {"adaptive": False, "loss": "non-saturating", "r1_weight": 0.2}}, 2),
        ({"adversary": {"loss": "vanilla"}, "shape": {"skips": True, "tanh": True}}, 1),
        ({"decoder_only": True}, 2),
    ],
)
def test_both_sides_follow_the_gradients_of_their_losses(settings, micro_batches):
    trainer = trainer_of(micro_batches=micro_batches, **settings)
    batch, judge = batch_of(), trainer.adversary.discriminator.trainable_variables
    gradients, disc_gradients, weight, (resembling, deceiving) = by_the_formulas(trainer, batch)
    before = arrays(trainer.trained_variables), arrays(judge)
    logs = tf.function(trainer.adversarial_step, autograph=False)(batch)
    for start, variables, expected in zip(
        before, (trainer.trained_variables, judge), (gradients, disc_gradients), strict=True
    ):
        steps = [(first - last) / RATE for first, last in zip(start, arrays(variables), strict=True)]
        assert_close(steps, expected)
    assert float(logs["adversarial_weight"]) == pytest.approx(weight, rel=1e-4)
    assert float(logs["gradient_ratio"]) == pytest.approx(weight * deceiving / resembling, rel=1e-4)


def test_batch_statistics_are_of_the_whole_batch_however_it_is_cut():
    moved = []
    for micro_batches in (1, 2):
        trainer = trainer_of(judge={"norm": "batch"}, micro_batches=micro_batches)
        tf.function(trainer.adversarial_step, autograph=False)(batch_of())
        moved.append(arrays(trainer.vae.weights + trainer.adversary.discriminator.weights))
    assert_close(*moved)


def test_large_pictures_are_cut_into_more_parts_but_never_for_the_adversarial_step(monkeypatch):
    monkeypatch.setattr(parallel, "MOST_PLACES", 2 * IMAGE_SIZE * IMAGE_SIZE)
    trainer, cut = trainer_of(micro_batches=None), {"plain": [], "adversarial": []}
    losses_of, judge = trainer.sample_losses, trainer.adversary.judge

    def sample_losses(batch, training):
        cut["plain"].append(len(batch["pixels"]))
        return losses_of(batch, training)

    def judged(pixels, reconstruction):
        cut["adversarial"].append(len(pixels))
        return judge(pixels, reconstruction)

    monkeypatch.setattr(trainer, "sample_losses", sample_losses)
    monkeypatch.setattr(trainer.adversary, "judge", judged)
    trainer.train_step(batch_of(rows=8))
    trainer.adversarial_step(batch_of(rows=8))
    assert cut == {"plain": [2, 2, 2, 2], "adversarial": [4, 4]}


def test_a_step_moves_the_directions_of_the_spectral_norms():
    trainer = trainer_of(judge={"norm": "none", "spectral_norm": True}, micro_batches=2)
    convolutions = [
        layer for layer in trainer.adversary.discriminator.layers if isinstance(layer, PatchConv)
    ][:-1]
    before = [np.asarray(conv.u).copy() for conv in convolutions]
    trainer.adversarial_step(batch_of())
    for conv, u in zip(convolutions, before, strict=True):
        matrix = conv.kernel.numpy().reshape(-1, conv.channels).astype("float64")  # as it is after the step
        expected = matrix.T @ (matrix @ u)
        np.testing.assert_allclose(conv.u, expected / np.linalg.norm(expected), rtol=1e-4, atol=1e-5)
        assert np.abs(conv.u - u).max() > 1e-5


def test_lecam_holds_logits_to_their_averages_and_these_follow():
    trainer = trainer_of(adversary={"lecam_weight": 0.4})
    batch, adversary = batch_of(), trainer.adversary
    adversary.average_real.assign(0.3)
    adversary.average_fake.assign(-0.2)
    rebuilt = trainer.vae.reparameterised(batch["pixels"], batch["posterior_noise"], training=True)[0]
    real, fake = (np.asarray(adversary.discriminator(x)).mean((1, 2, 3)) for x in (batch["pixels"], rebuilt))
    logs = trainer.adversarial_step(batch)
    expected = ((real + 0.2) ** 2 + (fake - 0.3) ** 2).mean()
    assert float(logs["lecam_loss"]) == pytest.approx(expected, rel=1e-4)
    assert float(adversary.average_real.numpy()) == pytest.approx(0.99 * 0.3 + 0.01 * real.mean(), rel=1e-4)
    assert float(adversary.average_fake.numpy()) == pytest.approx(0.99 * -0.2 + 0.01 * fake.mean(), rel=1e-4)


def decaying(variables, name="adamw"):
    return adamw(variables, learning_rate=0.01, weight_decay=0.1, clip_norm=1.0, name=name)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_changes_neither_side_and_no_mean(bad):
    trainer = trainer_of(decaying, adversary={"lecam_weight": 0.4})
    trainer.adversarial_step(batch_of())
    kept = {name: arrays(variable for _, variable in part) for name, part in trainer.kept_variables.items()}
    named = {name: [own for own, _ in part] for name, part in trainer.kept_variables.items()}
    batch = batch_of(seed=1)
    logs = trainer.adversarial_step(
        batch | {"pixels": batch["pixels"] * tf.constant([1.0, bad, 1, 1])[:, None, None, None]}
    )
    for name, part in trainer.kept_variables.items():
        for path, before, (_, after) in zip(named[name], kept[name], part, strict=True):
            if path.split("/")[-1] not in ("iteration", "skipped", "skipped_in_row"):
                np.testing.assert_array_equal(after, before, err_msg=path)
    assert [int(optimizer.skipped) for optimizer in trainer.optimizers_in_use] == [1, 1]
    assert all(np.isfinite(value) for value in logs.values())


def test_the_discriminator_waits_for_its_start():
    trainer = trainer_of(decaying, adversary={"start": 2})
    batches = tf.data.Dataset.from_tensors(batch_of()).repeat()
    judge, before = trainer.adversary.discriminator, []
    before.append(arrays(judge.weights))
    assert "gen_loss" not in trainer.fit(batches, steps_per_epoch=2, epochs=1, verbose=0).history
    before.append(arrays(judge.weights))
    logs = trainer.fit(batches, steps_per_epoch=1, epochs=1, verbose=0).history
    assert "gen_loss" in logs
    for first, second in zip(*before, strict=True):
        np.testing.assert_array_equal(first, second)
    assert any((first != last).any() for first, last in zip(before[1], arrays(judge.weights), strict=True))


def test_both_optimizers_scale_their_losses_in_16_bits():
    steps = {}
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        try:
            trainer = trainer_of(decaying, perceptual=None, perceptual_weight=0.0)
            scales = [float(optimizer.loss_scale) for optimizer in trainer.optimizers_in_use]
            trainer.adversarial_step(batch_of())
        finally:
            keras.config.set_dtype_policy("float32")
        assert scales == ([1.0, 1.0] if policy == "float32" else [2.0**15] * 2)
        steps[policy] = [
            np.concatenate([np.ravel(moment) for moment in optimizer._momentums])
            for optimizer in trainer.optimizers_in_use
        ]
        assert [int(optimizer.skipped) for optimizer in trainer.optimizers_in_use] == [0, 0]
    for whole, half in zip(*steps.values(), strict=True):
        assert np.linalg.norm(half - whole) < 0.03 * np.linalg.norm(whole)


def test_an_adversary_and_its_optimizer_go_together():
    with pytest.raises(ValueError, match="disc_optimizer goes with an adversary"):
        trainer_of().compile(keras.optimizers.SGD(1.0))
