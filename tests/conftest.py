"""What all tests share: a quiet TensorFlow on the CPU, two replicas, and the rule on skipped tests.

Set CUDA_VISIBLE_DEVICES to test on a GPU, CUP3_REAL_DATA to the folder that holds cup3_flowers/ to test on real
photographs, and CUP3_NO_SKIPS=1 to fail when a test is skipped for want of anything but torch.
"""

import contextlib
import csv
import gc
import importlib.util
import io
import os
import shutil

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("MPLBACKEND", "agg")

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from tensorflow.python.framework.ops import gradient_registry

import cup3
from checkpoint import RunFolder, collect, named_variables
from config import to_dict
from dataset import paper_flowers
from diffusion.schedule import Process
from generate import Networks, Painter
from input_pipeline import Vocabulary
from model.text_encoder import VocabularyEncoder
from model.unet import UNet
from model.vae import AutoencoderKL
from stages.devices import share_cores
from tests.drawings import DRAWN_CONFIG, diffusion_tensors
from tests.run_folders import CONFIG
from tests.tiny_runs import words

# Replicas need devices, and devices are fixed by the first operation: so here, before any test.
_CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(_CPU, [tf.config.LogicalDeviceConfiguration()] * 2)
# As fixed, and as a run in a process of its own has them: its bits are compared.
share_cores()
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})

_unmet = []


@pytest.fixture(scope="module", autouse=True)
def _traced_gradients():
    """Lets go of what a file has traced.

    TensorFlow keeps a gradient that is written out, of each norm of each graph, in a table for ever, and the graph
    with it: over all tests 20 GB.
    """
    kept = set(gradient_registry.list())
    yield
    for name in set(gradient_registry.list()) - kept:
        if name.startswith("CustomGradient-"):
            del gradient_registry._registry[name]
    gc.collect()


@pytest.fixture(scope="session")
def two_replicas():
    """A `tf.distribute` strategy of two replicas, both on the CPU."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture
def pair():
    """Clean latents and noise of 41 samples."""
    return tuple(np.random.default_rng(0).normal(size=(2, 41, 2, 3, 4)).astype("float32"))


@pytest.fixture
def run(tmp_path):
    """A new run folder, open for writing."""
    with RunFolder.open(tmp_path / "run", CONFIG) as run:
        yield run


TOY_TEXTS = ("one red flower", "a blue flower with a yellow center", "two green leaves")


@pytest.fixture(scope="session")
def toy_networks():
    """A function of a seed: the smallest `Networks`, none of whose weights is zero, for pictures of 16 px."""

    def make(seed=0, target="velocity", vocabulary=None, **process):
        keras.utils.set_random_seed(seed)
        vocabulary = vocabulary or Vocabulary.from_texts(TOY_TEXTS, length=7)
        vae = AutoencoderKL((4, 4), blocks=(0, 0), latent_channels=2, groups=2, attention=False)
        text_encoder = VocabularyEncoder(vocabulary.size, vocabulary.length, width=8, layers=1, heads=2)
        shape = {"head_channels": 4, "groups": 4, "ff_expansion": 1}
        unet = UNet(2, (8,), (True,), blocks=0, context_shape=text_encoder.context_shape, **shape)
        process = Process(target, max_signal_rate=0.95, min_signal_rate=0.02, **process)
        rng = np.random.default_rng(seed)
        for weight in vae.weights + text_encoder.weights + unet.weights:
            weight.assign_add(rng.uniform(0.05, 0.2, weight.shape))
        return Networks(vae, text_encoder, unet, process, vocabulary)

    return make


class LightUNet(keras.Model):
    """Stands for a U-Net with few variables: a step's graph is made in a second."""

    def __init__(self, length, width, name="unet"):
        latents, times = keras.Input((None, None, 2)), keras.Input(())
        context, mask = keras.Input((length, width)), keras.Input((length,), dtype="bool")
        seen = ops.cast(mask, "float32")[..., None]
        text = ops.sum(context * seen, axis=1) / ops.sum(seen, axis=1)  # (B, D)
        beside = keras.layers.Dense(width, name="beside")(ops.concatenate([text, times[:, None]], axis=-1))
        h = keras.layers.Conv2D(width, 3, padding="same", name="conv_in")(latents) + beside[:, None, None, :]
        h = ops.silu(keras.layers.LayerNormalization(name="norm")(h))
        out = keras.layers.Dense(2, name="conv_out")(h)
        super().__init__([latents, times, context, mask], out, name=name)
        self._arguments = {"length": length, "width": width, "name": name}

    def get_config(self):
        return dict(self._arguments)

    @property
    def predicting_variables(self):
        return self.variables

    def project_text(self, context, mask):
        return {"context": context, "mask": mask}

    def predict_from(self, latents, times, text):
        return self([latents, times, text["context"], text["mask"]])


@pytest.fixture(scope="session")
def light_networks(toy_networks):
    """`toy_networks` with a text encoder of few variables and a `LightUNet`."""

    def make(seed=0):
        networks = toy_networks(seed)
        length, width = networks.vocabulary.length, 8
        unet = LightUNet(length, width)
        text_encoder = VocabularyEncoder(networks.vocabulary.size, length, width, layers=0)
        return networks._replace(unet=unet, text_encoder=text_encoder)

    return make


@pytest.fixture(scope="module")
def networks(toy_networks):
    return toy_networks()


@pytest.fixture(scope="module")
def painter(networks):
    return Painter(networks, image_size=16)


@pytest.fixture(scope="module")
def run_path(tmp_path_factory, networks):
    """A trained run, whose newest checkpoint is not its best."""
    path = tmp_path_factory.mktemp("runs") / "run"
    with RunFolder.open(path, to_dict(DRAWN_CONFIG)) as run:
        networks.vocabulary.save(run.vocabulary_path)
        run.finish("vae", collect(named_variables(networks.vae), "vae"), {})
        run.save("diffusion", 6, diffusion_tensors(networks, 0.5), {})
        run.save_best("diffusion", 0.1, 0.05, 0.15, diffusion_tensors(networks), {"step": 3})
    return path


@pytest.fixture(scope="session")
def flowers(tmp_path_factory):
    """A folder of 48 paper flowers for training and 8 for testing."""
    folder = tmp_path_factory.mktemp("data") / "flowers"
    paper_flowers.write(folder, train=48, test=8, size=32, progress=False)
    return folder


@pytest.fixture(scope="session")
def finished(flowers, tmp_path_factory):
    """(run folder, what was printed) of a run that nothing stopped."""
    folder, printed = tmp_path_factory.mktemp("runs") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cup3.main(words(flowers, folder)) == 0
    return folder, printed.getvalue()


@pytest.fixture
def photographs(flowers, tmp_path):
    """A folder of pictures with a `metadata.csv`: so few that their KID has no floor."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for index, path in enumerate(sorted((flowers / "102flowers").iterdir())[:12]):
            shutil.copy(path, folder / path.name)
            table.writerow([path.name, f"Flower, number {index}!"])
            table.writerow([path.name, "the same one again"])
    return folder


@pytest.fixture(scope="module")
def in_classes(flowers, tmp_path_factory):
    """A folder of 24 pictures in one folder a class, of two classes."""
    root = tmp_path_factory.mktemp("in_classes")
    for index, path in enumerate(sorted((flowers / "102flowers").iterdir())[:24]):
        folder = root / ("canna lily" if index % 3 else "rose")
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder)
    return root


def _note_skip(report):
    # The oracle tests are skipped where requirements-oracle.txt is not installed.
    wants_torch = importlib.util.find_spec("torch") is None and "'torch'" in str(report.longrepr)
    if report.skipped and not hasattr(report, "wasxfail") and not wants_torch:
        _unmet.append(f"{report.nodeid}: {report.longrepr[-1]}")


pytest_collectreport = pytest_runtest_logreport = _note_skip


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if _unmet and os.environ.get("CUP3_NO_SKIPS") == "1":
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if _unmet and os.environ.get("CUP3_NO_SKIPS") == "1":
        terminalreporter.section("skipped, but CUP3_NO_SKIPS=1")
        for line in _unmet:
            terminalreporter.line(line)
