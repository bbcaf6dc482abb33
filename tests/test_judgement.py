"""An epoch is judged by the interval of its KID's difference from the best's, and says so in its row."""

from types import SimpleNamespace

import numpy as np
import pytest

from checkpoint import RunFolder
from config import EvaluationConfig
from errors import InputError
from metrics import KID, kid, kid_difference, kid_floor
from stages.judgement import KID_FEATURES, Judgement

PROTOCOL = {"network": "none"}
OFF = EvaluationConfig(autoguidance=1.0)


def features(seed, shift=0.0, n=24):
    return (np.random.default_rng(seed).normal(size=(n, 4)) + shift).astype("float32")


class Epochs:
    """A trainer whose pictures have the given features; KID of a picture is that of its own values."""

    def __init__(self, real):
        self.kid_metric = KID(lambda images, progress=False: images)
        self.kid_metric.set_real(real)
        self.painter, self.shown = SimpleNamespace(networks=None), []

    def plot_images(self, tokens, path):
        self.shown.append((list(tokens), path.name))

    def draw(self, values):
        self.kid_metric.reset_state()
        self.kid_metric.update_state(None, values)


@pytest.fixture
def run(tmp_path):
    with RunFolder.open(tmp_path / "run", {"seed": 0}) as run:
        yield run


@pytest.fixture
def trainer():
    return Epochs(features(0, n=30))


def judgement(run, trainer, protocol=PROTOCOL):
    return Judgement(run, trainer, OFF, protocol, [1, 2])


def judge(judged, trainer, epoch, values):
    """(the row's entries, what is chosen by) of an epoch that drew those."""
    row = {"step": 10 * epoch}
    if values is not None:
        trainer.draw(values)
        row["val_kid"] = 0.0
    judged.before_test(row["step"])
    return judged.finish_row(epoch - 1, row), judged.choose(row)


def keep(run, epoch, measured):
    state = {**measured.state, "step": 10 * epoch}
    change_high = measured.change.high if measured.change else None
    return run.save_best("diffusion", *measured.estimate, measured.tensors, state, change_high)


def test_the_first_is_measured_and_the_next_compared_with_the_best(run, trainer):
    judged, drawn = judgement(run, trainer), [features(1, 0.8), features(2, 0.9), features(3, 0.1)]
    kept = []
    for epoch, values in enumerate(drawn, 1):
        entries, measured = judge(judged, trainer, epoch, values)
        real = features(0, n=30)
        assert measured.estimate == kid(real, values)
        floor = kid_floor(real, n=len(values)).value
        assert (entries["val_kid_low"], entries["val_kid_floor"]) == (measured.estimate.low, floor)
        assert (entries["weak_step"], entries["protocol"]) == (None, PROTOCOL)
        if epoch == 1:
            assert measured.change is None and "val_kid_change" not in entries
        else:
            assert measured.change == kid_difference(real, values, drawn[0])  # the second was not kept
            names = ("val_kid_change", "val_kid_change_low", "val_kid_change_high")
            assert tuple(entries[name] for name in names) == measured.change
        kept.append(keep(run, epoch, measured))
    assert kept == [True, False, True]
    np.testing.assert_array_equal(run.best("diffusion").tensors[KID_FEATURES], drawn[2])
    assert judge(judged, trainer, 4, drawn[2])[1].change.value == 0
    again = judge(judgement(run, trainer), trainer, 3, drawn[2])  # as after a crash before the checkpoint
    assert again[1].change == kid_difference(features(0, n=30), drawn[2], drawn[0])
    assert trainer.shown == [([1, 2], f"epoch_{epoch:03d}.png") for epoch in (1, 2, 3, 4, 3)]


def test_a_resumed_run_compares_with_the_best_of_before(run, trainer):
    keep(run, 1, judge(judgement(run, trainer), trainer, 1, features(1, 0.5))[1])
    _, measured = judge(judgement(run, trainer), trainer, 2, features(2, 0.4))
    assert measured.change == kid_difference(features(0, n=30), features(2, 0.4), features(1, 0.5))


def test_without_kid_an_epoch_has_its_picture_only(run, trainer):
    judged = judgement(run, trainer)
    judge(judged, trainer, 1, features(1))
    assert judge(judged, trainer, 2, None) == ({}, None)
    assert len(trainer.shown) == 2


@pytest.mark.parametrize("kept", [{}, {KID_FEATURES: features(1, n=20)}])
def test_where_the_best_has_no_such_features_there_is_no_difference(run, trainer, kept):
    state = {"step": 10, "protocol": PROTOCOL}
    run.save_best("diffusion", 0.5, 0.4, 0.6, {"weight": np.zeros(1), **kept}, state)
    assert judge(judgement(run, trainer), trainer, 2, features(2))[1].change is None


def test_a_best_of_another_protocol_is_refused_in_a_line(run, trainer):
    keep(run, 1, judge(judgement(run, trainer), trainer, 1, features(1, n=20))[1])
    _, measured = judge(judgement(run, trainer, {"network": "other"}), trainer, 2, features(2))
    with pytest.raises(InputError, match="another protocol"):
        keep(run, 2, measured)


def test_a_damaged_best_is_refused_before_any_step(run, trainer):
    keep(run, 1, judge(judgement(run, trainer), trainer, 1, features(1))[1])
    (file,) = (run.path / "best").glob("**/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="to have the best chosen anew"):
        judgement(run, trainer)


def test_the_keeper_asks_here(run, trainer):
    judged, keeper = judgement(run, trainer), SimpleNamespace()
    judged.ask(keeper)
    asked = (keeper.before_test, keeper.finish_row, keeper.choose)
    assert asked == (judged.before_test, judged.finish_row, judged.choose)
