"""One thread, no chatter: tiny models are slower with more threads than with one."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # also of the processes that tests start
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from fakes import drawer
from PIL import Image

from latentgen import once

torch.set_num_threads(1)


def pytest_configure(config):
    for library in ("diffusers", "numpy"):  # numpy scalars of tensors, 100,000 times
        config.addinivalue_line("filterwarnings", f"ignore::DeprecationWarning:{library}")


def pytest_collection_modifyitems(config, items):
    """The mutations are minutes of work: they run when asked for with `-m mutation`."""
    if "mutation" not in config.getoption("markexpr"):
        slow = [item for item in items if "mutation" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def pipe():
    """A tiny model with four input channels that predicts the noise; 32 x 32 pixels."""
    return drawer()


@pytest.fixture(scope="session")
def picture():
    """32 x 32 pixels in which no two rows or columns are alike."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def mask():
    """A white box off the middle, not aligned to the latents' cells of eight pixels."""
    pixels = np.zeros((32, 32), dtype=np.uint8)
    pixels[5:21, 10:27] = 255
    return Image.fromarray(pixels)


@pytest.fixture
def stock_convolutions(monkeypatch):
    """Convolutions add up in the order that they have in diffusers: what is compared with it can be
    equal to the last bit. (unit/test_once.py compares the two orders.)"""
    monkeypatch.setattr(once, "_convolve", lambda module, x, _: torch.nn.Conv2d.forward(module, x))
