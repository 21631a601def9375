"""The real weights that ship: they load everywhere, and they draw what is asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

import latentgen

SEEDS = range(4)


@pytest.fixture(scope="module")
def pipe():
    return latentgen.LatentDiffusion.from_pretrained(latentgen.DEFAULT_MODEL, device="cpu")


def colour(image) -> np.ndarray:
    """Mean colour (red, green, blue) of what is not background."""
    pixels = np.asarray(image, dtype=float).reshape(-1, 3)
    return pixels[pixels.min(axis=1) < 200].mean(axis=0)


def test_the_weights_are_half_precision_safetensors_of_at_most_40_megabytes():
    folder = Path(latentgen.DEFAULT_MODEL)
    files = list(folder.rglob("*.safetensors"))
    assert len(files) == 4
    assert sum(file.stat().st_size for file in files) <= 40e6
    for file in files:
        with safe_open(file, framework="pt") as weights:
            types = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
        assert types == {torch.float16}
    assert not [file for file in folder.rglob("*") if file.suffix in {".bin", ".pt", ".ckpt"}]


@pytest.mark.usefixtures("stock_convolutions")
def test_stock_diffusers_draws_the_same_picture_from_the_folder(pipe):
    stock = StableDiffusionPipeline.from_pretrained(
        latentgen.DEFAULT_MODEL, safety_checker=None, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        ["a rocket"],
        num_inference_steps=8,
        guidance_scale=3.0,
        num_images_per_prompt=2,
        generator=[torch.Generator("cpu").manual_seed(7 + i) for i in range(2)],
        output_type="np",
    ).images
    ours = pipe.generate(
        "a rocket",
        num_inference_steps=8,
        guidance_scale=3.0,
        num_images=2,
        seed=7,
        output_type="np",
    )
    assert np.array_equal(ours.images, theirs)


def test_the_plain_functions_draw_with_the_bundled_model(pipe):
    plain = latentgen.generate("a red apple", seed=3, num_inference_steps=6)
    assert plain.model.path == Path(latentgen.DEFAULT_MODEL)
    again = pipe.generate("a red apple", seed=3, num_inference_steps=6)
    assert np.array_equal(plain.image, again.image)


def test_colours_are_those_asked_for(pipe):
    def drawn(prompt):
        result = pipe.generate(prompt, seed=0, num_images=len(SEEDS))
        return np.mean([colour(image) for image in result.images], axis=0)

    red, green, blue = drawn("a red apple")
    assert red > green + 40
    assert red > blue + 40
    red, green, blue = drawn("a green apple")
    assert green > red
    red, green, blue = drawn("a lemon")
    assert min(red, green) > blue + 40


def test_another_prompt_is_another_picture_and_the_background_stays_white(pipe):
    result = pipe.generate(["a rocket", "a house"], seed=1)
    rocket, house = (np.asarray(image, dtype=float) for image in result.images)
    assert abs(rocket - house).mean() > 15
    for picture in (rocket, house):
        assert picture[:4, :4].mean() > 235


def test_inpainting_and_img2img_start_from_the_picture(pipe):
    apple = pipe.generate("a red apple", seed=2).image
    near = pipe.img2img("a green apple", apple, strength=0.3, seed=2).image
    far = pipe.img2img("a green apple", apple, strength=0.9, seed=2).image
    distance = [np.abs(np.subtract(other, apple, dtype=float)).mean() for other in (near, far)]
    assert distance[0] < distance[1]

    mask = np.zeros((128, 128), np.uint8)
    mask[:, 64:] = 255
    painted = np.asarray(pipe.inpaint("a yellow lemon", apple, mask, seed=2).image)
    assert np.array_equal(painted[:, :64], np.asarray(apple)[:, :64])
    assert not np.array_equal(painted, apple)


def test_a_saved_copy_keeps_the_models_defaults(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    copy = latentgen.LatentDiffusion.from_pretrained(tmp_path, device="cpu")
    first, second = (each.generate("a house", seed=1) for each in (pipe, copy))
    assert second.request == first.request
    assert np.array_equal(first.image, second.image)
