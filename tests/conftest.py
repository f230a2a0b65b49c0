"""What every test has: one thread, here and in the processes that it starts, and the same random numbers.

Property tests draw new examples on every run, but the same ones in CI: what fails there must fail again.
"""

import functools
import os
import random
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch as it is imported
os.environ["WANDB_CONSOLE"] = "off"  # it would wrap a stream of pytest's and write to it after the test

import numpy as np
import pytest
import torch
from absl import logging as absl_logging
from hypothesis import settings
from torch.onnx._internal._lazy_import import onnxscript_apis

from qat.kernels import dispatch

# Hydra closes the handlers that it finds, and this one closes its stream with it, if that is not sys.stderr just then:
# pytest's own, if it was made (as TensorBoard was imported) in one test and Hydra called in another that captures.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

# torch reads the sources of its 500 ONNX functions anew for each export: a quarter of what one of a small model takes.
onnxscript_apis.get_torchlib_ops = functools.cache(onnxscript_apis.get_torchlib_ops)

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collectstart(collector: pytest.Collector) -> None:
    seed()  # modules of tests hold models, too


@pytest.fixture(autouse=True)
def seeded():
    seed()


@pytest.fixture
def kernel_settings():
    """What the test chooses by `kernels.configure` ends with it."""
    before = dict(dispatch._settings)
    yield
    dispatch._settings.update(before)
