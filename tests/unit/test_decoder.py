"""A decoder that learns what drawings mean: `training/train_decoder.py`."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import fakes
import pytest
import torch
from PIL import Image, ImageDraw

from latentgen import LatentDiffusion
from latentgen.errors import TrainingError
from latentgen.images import to_tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
train_decoder = pytest.importorskip("train_decoder")  # its progress bar is in the extra "train"

COLOURS = ("red", "green", "blue", "orange", "purple", "black", "teal", "pink")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eight captioned pictures, a disc of a colour each."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for colour in COLOURS:
        image = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(image).ellipse((4, 4, 28, 28), fill=colour)
        image.save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(colour)
    return folder


def run(monkeypatch, folder: Path, model: Path, out: Path, draw) -> None:
    """The script in this process, with drawings by `draw`: pipe, colours to latents."""

    def generate(pipe, prompts, **settings):
        assert settings["output_type"] == "latent"
        return SimpleNamespace(images=draw(pipe, prompts))

    monkeypatch.setattr(LatentDiffusion, "generate", generate)
    flags = {"pretrained_model_name_or_path": model, "train_data_dir": folder, "resolution": 32,
             "output_dir": out, "crop_size": 16, "max_train_steps": 80, "learning_rate": 3e-3,
             "lr_warmup_steps": 5, "ema_decay": 0.8, "report_to": "none"}  # fmt: skip
    words = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train_decoder.py", *words])
    train_decoder.train_decoder()


@pytest.fixture
def model(tmp_path) -> Path:
    pipe = LatentDiffusion(**fakes.components(sample_size=4) | {"vae": fakes.autoencoder_tiny()})
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def encoded(pipe, folder: Path, colours: list[str]) -> torch.Tensor:
    pictures = [Image.open(folder / f"{colour}.png") for colour in colours]
    pixels = torch.cat([to_tensor(picture) for picture in pictures])
    with torch.no_grad():
        return pipe.vae.encode(pixels).latents


def test_the_decoder_alone_learns_from_drawings_that_are_right(
    folder, model, tmp_path, monkeypatch, capsys
):
    def draw(pipe, colours):
        """A little off, and of black something else."""
        meant = ["red" if colour == "black" else colour for colour in colours]
        latents = encoded(pipe, folder, meant)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        return latents + 0.01 * latents.std() * noise

    run(monkeypatch, folder, model, tmp_path / "out", draw)
    said = capsys.readouterr().out  # a picture is held out
    assert "6 of 7 drawings are nearest" in said
    first, last = (
        {name: float(value) for name, value in re.findall(r"(\w+) (-?[\d.]+)", line)}
        for line in re.findall(r"step (?:0|80): (.*drawn_psnr.*)", said)
    )
    assert last["drawn_psnr"] > first["drawn_psnr"] + 1
    assert last["psnr"] > first["psnr"] + 1
    for part in ("unet", "text_encoder", "tokenizer", "scheduler"):
        for file in (model / part).iterdir():
            assert (tmp_path / "out" / part / file.name).read_bytes() == file.read_bytes()
    before, after = (
        LatentDiffusion.from_pretrained(path, "cpu").vae.state_dict()
        for path in (model, tmp_path / "out")
    )
    learnt = {name for name in before if not torch.equal(before[name].half(), after[name].half())}
    assert {name.split(".")[0] for name in learnt} == {"decoder"}


def test_a_model_that_draws_nothing_of_it_is_told(folder, model, tmp_path, monkeypatch):
    def draw(pipe, colours):
        return encoded(pipe, folder, colours[1:] + colours[:1])

    with pytest.raises(TrainingError, match="draws none of these pictures"):
        run(monkeypatch, folder, model, tmp_path / "out", draw)


def test_another_kind_of_autoencoder_is_told(folder, tmp_path, monkeypatch):
    LatentDiffusion(**fakes.components(sample_size=4)).save_pretrained(tmp_path / "kl")
    with pytest.raises(TrainingError, match="another autoencoder than AutoencoderTiny"):
        run(monkeypatch, folder, tmp_path / "kl", tmp_path / "out", None)
