"""The measure of the bundled model's pictures: `training/measure_icons.py`."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import autoencoder_tiny
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
measure_icons = pytest.importorskip("measure_icons")  # icons are drawn by the extra "train"

COLOURS = ["red", "lime", "blue", "yellow", "cyan", "magenta", "white"]


class Eye:
    """Sees the mean colour."""

    def see(self, images):
        means = [np.asarray(image.convert("RGB")).mean((0, 1)) - 127.5 for image in images]
        return torch.nn.functional.normalize(torch.tensor(np.array(means)), dim=-1)


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (16, 16), colour)


def test_a_drawing_is_right_if_its_own_icon_is_nearest():
    bench = measure_icons.Bench.__new__(measure_icons.Bench)
    bench.judge = Eye()
    bank = [plain(colour) for colour in COLOURS]
    drawn = [plain("red"), plain("lime"), plain("magenta"), plain("cyan")]
    assert bench.right(drawn, bank, [0, 1, 5, 4]) == {"top_1": 1.0, "top_5": 1.0}
    assert bench.right(drawn, bank, [0, 1, 0, 0]) == {"top_1": 0.5, "top_5": 0.75}


def test_pictures_are_reconstructed_as_precisely_as_the_model_is():
    """A GPU's model has half precision; its pictures come in bytes."""
    bench = measure_icons.Bench.__new__(measure_icons.Bench)
    bench.pipe = SimpleNamespace(vae=autoencoder_tiny().to(torch.bfloat16))
    (found,) = bench.reconstruct([plain("red")])
    assert found.size == (16, 16)


def test_pictures_are_compared_within_their_name():
    real = [plain(colour) for colour in ("red", "lime", "blue", "white") * 2]
    rows = measure_icons.as_rows(real)
    assert rows.shape == (2, 4, 16 * 16 * 3)
    assert torch.cdist(rows, rows.flip(1)).argmin(-1).tolist() == [[3, 2, 1, 0]] * 2


def test_the_frame_tells_the_background():
    picture = Image.new("RGB", (128, 128), "#9cc9f5")
    picture.paste("red", (10, 10, 118, 118))
    picture.paste("black", (0, 0, 40, 3))
    assert measure_icons.frame(picture).tolist() == [0x9C, 0xC9, 0xF5]


def test_a_plot_is_drawn(tmp_path):
    found = {
        "guidance_scale": {"1": {"top_1": 0.2, "kid": 0.4}, "3": {"top_1": 0.8, "kid": 0.1}},
        "scheduler": {"ddim": {"top_1": 0.8, "kid": 0.1}, "euler": {"top_1": 0.7, "kid": 0.1}},
    }
    measure_icons.plot(found, tmp_path / "sweep.png")
    assert Image.open(tmp_path / "sweep.png").width > 600
