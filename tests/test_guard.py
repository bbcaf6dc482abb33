"""The guard weakens a discriminator that takes over, and brings back the weights from before a fall."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from config import AdversarialConfig
from model.discriminator import PatchDiscriminator
from model.vae import AutoencoderKL
from optimizers import adamw
from stages.guard import GOOD, Guard, verdict
from trainer import Adversary, VAETrainer

LIMITS = AdversarialConfig(weight=0.5, guard_drop=1.0, guard_ratio=2.0, guard_gap=5.0)
COUNTS = ("iteration", "skipped", "skipped_in_row")


def row(psnr=30.0, ratio=1.0, gap=1.0, epoch=1):
    """Of an epoch in which the adversary took part."""
    numbers = {"val_psnr": psnr, "gen_loss": 0.1, "gradient_ratio": ratio, "logit_gap": gap}
    return {"stage": "vae", "epoch": epoch, "step": 10 * epoch, **numbers}


def before_the_adversary(psnr, epoch=1):
    return {"stage": "vae", "epoch": epoch, "step": 10 * epoch, "val_psnr": psnr}


# The verdict.


def test_before_the_adversary_nothing_is_done():
    assert verdict(before_the_adversary(10.0), [before_the_adversary(30.0)], LIMITS) == (False, 1.0, None)


def test_a_fall_within_the_drop_is_none():
    former = [before_the_adversary(28.0), row(30.0)]
    for psnr in (31.0, 30.0, 29.5, 29.0):
        assert verdict(row(psnr), former, LIMITS) == (False, 1.0, None)


def test_a_fall_beyond_the_drop_goes_back():
    reason = "held-out PSNR fell by 1.25 dB"
    for former in ([before_the_adversary(30.0)], [row(30.0), row(29.5)], [row(29.5), row(30.0)]):
        assert verdict(row(28.75), former, LIMITS) == (True, 0.1, reason)
        assert verdict(row(28.75, gap=9.0), former, LIMITS) == (True, 0.1, reason)  # first of all
        assert verdict(row(28.75, ratio=8.0), former, LIMITS) == (True, 0.025, reason)  # and of that a tenth


@pytest.mark.parametrize("psnr", [math.nan, None])
def test_what_is_no_number_goes_back(psnr):
    assert verdict(row(psnr), [row(30.0)], LIMITS)[:2] == (True, 0.1)


def test_without_a_good_epoch_there_is_nothing_to_go_back_to():
    gone = row(40.0) | {"went_back": True}
    for former in ([], [gone], [row(None)]):
        assert verdict(row(10.0), former, LIMITS) == (False, 1.0, None)
        assert verdict(row(math.nan), former, LIMITS) == (False, 1.0, None)


def test_epochs_that_went_back_are_not_what_is_fallen_from():
    former = [row(30.0), row(40.0) | {"went_back": True}]
    assert not verdict(row(29.5), former, LIMITS).goes_back
    assert verdict(row(28.5), former, LIMITS).reason == "held-out PSNR fell by 1.50 dB"


def test_a_gradient_that_is_too_large_is_brought_to_the_ratio():
    own = verdict(row(ratio=8.0), [row()], LIMITS)
    assert own == (False, 0.25, "the adversarial gradient was 8 times the reconstruction's")
    assert verdict(row(ratio=8.0, gap=6.0), [row()], LIMITS) == own  # of both the ratio counts
    for ratio in (2.5, 20.0):
        assert verdict(row(ratio=ratio), [row()], LIMITS).factor * ratio == pytest.approx(2.0)
    assert verdict(row(ratio=2.0), [row()], LIMITS) == (False, 1.0, None)


def test_logits_that_are_too_far_apart_halve_the_weight():
    told = "the discriminator's logits were 6.5 apart"
    assert verdict(row(gap=6.5), [row()], LIMITS) == (False, 0.5, told)
    assert verdict(row(gap=6.5, ratio=math.nan), [row()], LIMITS) == (False, 0.5, told)
    for gap in (5.0, -6.5, math.nan, None):  # below 0 it takes the one for the other
        assert verdict(row(gap=gap), [row()], LIMITS) == (False, 1.0, None)


# The guard.


@pytest.fixture(scope="module", params=[1, 2])
def trainer(request, two_replicas):
    """On one replica or two."""
    strategy = {1: tf.distribute.get_strategy(), 2: two_replicas}[request.param]
    with strategy.scope():
        return made()


def made():
    keras.utils.set_random_seed(2)
    vae = AutoencoderKL((4, 4), blocks=(0, 0), latent_channels=2, groups=2, attention=False)
    shape = {"channels": 4, "layers": 1, "norm": "batch", "spectral_norm": True}
    adversary = Adversary(PatchDiscriminator(**shape), weight=0.5, lecam_weight=0.1)
    trainer = VAETrainer(vae, adversary=adversary, ema=0.9)
    step = {"learning_rate": 0.01, "weight_decay": 0.0, "clip_norm": 1.0}
    own = adamw(trainer.trained_variables, **step)
    trainer.compile(own, adamw(adversary.discriminator.trainable_variables, **step, name="disc_adamw"))
    return trainer


def all_kept(trainer):
    return {
        f"{prefix}/{name}": variable
        for prefix, variables in trainer.kept_variables.items()
        for name, variable in variables
    }


def set_to(trainer, seed):
    """Gives all that a checkpoint keeps other values; returns them by name."""
    rng = np.random.default_rng(seed)
    for variable in all_kept(trainer).values():
        variable.assign(rng.uniform(1, 100, variable.shape).astype(variable.dtype))
    trainer.adversary.scale.assign(1.0)
    return state(trainer)


def state(trainer):
    return {name: value_of(variable) for name, variable in all_kept(trainer).items()}


def value_of(variable):
    """Its value, which all replicas have."""
    first, *others = (np.asarray(copy).copy() for copy in getattr(variable.value, "values", [variable.value]))
    for other in others:
        np.testing.assert_array_equal(other, first, err_msg=variable.path)
    return first


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def epoch(run, trainer, own):
    """What the guard does after an epoch, and its row then."""
    entries = Guard(run, trainer, LIMITS)(own)
    run.log(own | entries)
    return entries


def test_a_fall_brings_back_all_but_counts_and_scale(run, trainer):
    good = set_to(trainer, 1)
    epoch(run, trainer, row(30.0))
    fallen = set_to(trainer, 2)
    entries = epoch(run, trainer, row(28.0, epoch=2))
    after = state(trainer)
    kept = {"optimizer/adamw": COUNTS, "disc_optimizer/disc_adamw": COUNTS, "adversary": ("scale",)}
    counts = {f"{prefix}/{name}" for prefix, names in kept.items() for name in names}
    assert counts < after.keys()
    scale = after.pop("adversary/scale")
    assert scale == np.float32(0.1)
    for name, value in after.items():
        # The average was measured: the raw weights, which may have been bad already, become its.
        kept_as = f"ema_{name}" if name.startswith("vae/") else name
        np.testing.assert_array_equal(value, (fallen if name in counts else good)[kept_as], err_msg=name)
    assert {name.split("/")[0] for name in after} == {
        "vae",
        "ema_vae",
        "discriminator",
        "optimizer",
        "disc_optimizer",
        "adversary",
    }
    assert sum("momentum" in name or "velocity" in name for name in after) == 2 * sum(
        len(network.trainable_variables) for network in (trainer.vae, trainer.adversary.discriminator)
    )
    told = "guard: held-out PSNR fell by 2.00 dB, so the weights went back to those of step 10; "
    told += "the adversarial weight is now 0.1 of its own"
    assert entries == {"adversarial_scale": 1.0, "went_back": True, "guard": told}


def test_a_second_fall_goes_back_to_the_same_and_weakens_it_further(run, trainer):
    good = set_to(trainer, 1)
    epoch(run, trainer, row(30.0))
    for number in (2, 3):
        trainer.vae.set_weights([weight + 1 for weight in trainer.vae.get_weights()])
        entries = epoch(run, trainer, row(math.nan, epoch=number))
        assert "the weights went back to those of step 10; " in entries["guard"]
    assert entries["adversarial_scale"] == pytest.approx(0.1)  # with which the epoch was trained
    assert float(trainer.adversary.scale.numpy()) == pytest.approx(0.01)
    after = state(trainer)
    for name in after:
        if name.startswith("vae/"):
            np.testing.assert_array_equal(after[name], good[f"ema_{name}"], err_msg=name)


def test_the_good_checkpoint_is_the_last_good_epochs(run, trainer):
    set_to(trainer, 1)
    epoch(run, trainer, before_the_adversary(30.0))
    assert run.checkpoint_steps(GOOD) == [10]
    second = set_to(trainer, 2)
    assert epoch(run, trainer, row(29.5, epoch=2)) == {"adversarial_scale": 1.0}  # nothing to tell
    assert run.checkpoint_steps(GOOD) == [20]
    kept = run.latest(GOOD).tensors
    assert_equal(kept, {name: second[name] for name in kept})
    assert second.keys() - kept.keys() == {
        *(f"optimizer/adamw/{name}" for name in COUNTS),
        *(f"disc_optimizer/disc_adamw/{name}" for name in COUNTS),
        "adversary/scale",
    }
    epoch(run, trainer, row(20.0, epoch=3))  # which is not kept
    assert run.checkpoint_steps(GOOD) == [20]


@pytest.mark.parametrize(
    ("own", "scale", "told"),
    [
        (row(ratio=8.0), 0.25, "guard: the adversarial gradient was 8 times the reconstruction's; the "),
        (row(gap=6.0), 0.5, "guard: the discriminator's logits were 6 apart; the "),
    ],
)
def test_a_discriminator_that_takes_over_is_weakened_and_the_weights_stay(run, trainer, own, scale, told):
    before = set_to(trainer, 1)
    trainer.adversary.scale.assign(0.5)
    entries = epoch(run, trainer, own)
    told += f"adversarial weight is now {0.5 * scale:.3g} of its own"
    assert entries == {"adversarial_scale": 0.5, "guard": told}
    after = state(trainer)
    assert after.pop("adversary/scale") == 0.5 * scale
    del before["adversary/scale"]
    assert_equal(after, before)
    assert run.checkpoint_steps(GOOD) == [10]  # weights that are good, if the discriminator is not


@pytest.mark.parametrize("psnr", [30.5, 28.0])
def test_what_a_crash_repeats_comes_out_the_same(run, trainer, psnr):
    set_to(trainer, 1)
    epoch(run, trainer, row(30.0))
    before = set_to(trainer, 2)
    own = row(psnr, ratio=4.0, epoch=2)
    entries = Guard(run, trainer, LIMITS)(own)  # and its row is lost
    after = state(trainer)
    for name, variable in all_kept(trainer).items():
        variable.assign(before[name])
    assert Guard(run, trainer, LIMITS)(own) == entries
    assert_equal(state(trainer), after)


def test_rows_of_other_stages_and_without_psnr_are_not_its(run, trainer):
    set_to(trainer, 1)
    run.log({"stage": "diffusion", "step": 5, "val_psnr": 99.0})
    run.log({"stage": "vae", "step": 5, "note": "none"})
    assert epoch(run, trainer, row(30.0)) == {"adversarial_scale": 1.0}
