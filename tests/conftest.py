"""What all tests share: a quiet TensorFlow on the CPU, two replicas, and the rule on skipped tests.

Set CUDA_VISIBLE_DEVICES to test on a GPU, CUP3_REAL_DATA to the folder that holds cup3_flowers/ to test on real
photographs, and CUP3_NO_SKIPS=1 to fail when a test is skipped for want of anything but torch.
"""

import importlib.util
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import tensorflow as tf

# Replicas need devices, and devices are fixed by the first operation: so here, before any test.
_CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(_CPU, [tf.config.LogicalDeviceConfiguration()] * 2)

_unmet = []


@pytest.fixture(scope="session")
def two_replicas():
    """A `tf.distribute` strategy of two replicas, both on the CPU."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


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
