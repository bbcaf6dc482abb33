"""A run trains on the devices that were chosen, or says which there are."""

import pytest
import tensorflow as tf

from errors import InputError
from stages.devices import strategy_on


@pytest.fixture
def three_gpus(monkeypatch):
    """A machine with three GPUs, as far as choosing them goes; what was done to them."""
    done = {"growth": []}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["g0", "g1", "g2"])
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda chosen, kind: done.update({kind: chosen}))
    monkeypatch.setattr(
        tf.config.experimental, "set_memory_growth", lambda gpu, on: done["growth"].append(gpu)
    )
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda names: names)
    return done


@pytest.mark.parametrize(
    ("gpus", "chosen"), [("all", ["g0", "g1", "g2"]), ("0,2", ["g0", "g2"]), ("1", ["g1"]), ("none", [])]
)
def test_the_chosen_gpus_are_seen_and_grow(three_gpus, gpus, chosen):
    strategy = strategy_on(gpus, {"--batch-size": (6, None)})
    assert three_gpus["GPU"] == three_gpus["growth"] == chosen
    if len(chosen) > 1:
        assert strategy == [f"GPU:{index}" for index in range(len(chosen))]
    else:
        assert strategy is tf.distribute.get_strategy()


@pytest.mark.parametrize("gpus", ["3", "-1", "0,0", "", "first", "0;1"])
def test_gpus_that_are_not_there_are_refused(three_gpus, gpus):
    with pytest.raises(
        InputError, match=f"--gpus: received '{gpus}', expected all, none, or indices below 3"
    ):
        strategy_on(gpus, {})


def test_where_there_is_no_gpu_the_refusal_says_so(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    with pytest.raises(InputError, match="received '0', expected all or none: TensorFlow finds no GPU here$"):
        strategy_on("0", {})


def test_a_batch_that_the_gpus_cannot_share_is_refused(three_gpus):
    with pytest.raises(InputError, match="--batch-size: received 8, expected a multiple of the 3 GPUs"):
        strategy_on("all", {"--vae-training.batch-size": (6, None), "--batch-size": (8, None)})


@pytest.mark.parametrize(("gpus", "micro_batches"), [("0,1", 4), ("none", 5)])
def test_a_batch_that_its_micro_batches_cannot_share_is_refused(three_gpus, gpus, micro_batches):
    wanted = f"--batch-size: received 12, expected {micro_batches} equal micro-batches on each device"
    with pytest.raises(InputError, match=wanted):
        strategy_on(gpus, {"--batch-size": (12, micro_batches)})
    strategy_on(gpus, {"--batch-size": (12, 3)})


def test_a_cpu_gives_each_part_of_a_batch_its_share_of_the_cores(monkeypatch):
    threads = {}
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(12)), raising=False)
    for kind in ("inter", "intra"):
        name = f"set_{kind}_op_parallelism_threads"
        monkeypatch.setattr(tf.config.threading, name, lambda count, kind=kind: threads.update({kind: count}))
    strategy_on("none", {})
    assert threads == {"inter": 2, "intra": 6}
