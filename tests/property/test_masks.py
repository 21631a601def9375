"""Whatever the mask, not one byte changes outside it."""

import numpy as np
import pytest
import torch
from fakes import autoencoder_tiny, parts
from PIL import Image

from latentgen import LatentDiffusion
from latentgen.images import composite, region, to_pil


def random_mask(rng, height, width):
    """A box, an ellipse, a line, loose pixels, or everything but these; never empty."""
    rows, columns = np.mgrid[:height, :width]
    top, left = rng.integers(height), rng.integers(width)
    tall, wide = rng.integers(1, height), rng.integers(1, width)
    shapes = [
        (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide),
        ((rows - top) / tall) ** 2 + ((columns - left) / wide) ** 2 <= 1,
        abs(rows - top - (columns - left)) <= 1,
        rng.random((height, width)) < 0.1,
    ]
    mask = shapes[rng.integers(len(shapes))] ^ bool(rng.integers(2))
    mask[top, left] = True
    return Image.fromarray(mask.astype(np.uint8) * 255)


def random_picture(rng, height, width):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_thousand_masks_keep_every_byte_outside():
    rng = np.random.default_rng(1)
    for _ in range(1000):
        height, width = rng.integers(2, 48, 2)
        original, mask = random_picture(rng, height, width), random_mask(rng, height, width)
        painted = rng.random((2, height, width, 3), dtype=np.float32)
        soft_edge = int(rng.integers(0, 9))
        box = (0, 0, width, height)
        for image in to_pil(composite(original, painted, mask, soft_edge, box)):
            outside = np.asarray(mask) == 0
            np.testing.assert_array_equal(np.asarray(image)[outside], np.asarray(original)[outside])


def test_without_a_soft_edge_every_byte_inside_is_the_painted_one():
    rng = np.random.default_rng(2)
    for _ in range(100):
        original, mask = random_picture(rng, 24, 16), random_mask(rng, 24, 16)
        painted = rng.random((1, 24, 16, 3), dtype=np.float32)
        [image] = to_pil(composite(original, painted, mask, 0, (0, 0, 16, 24)))
        inside = np.asarray(mask) == 255
        [expected] = to_pil(painted)
        np.testing.assert_array_equal(np.asarray(image)[inside], np.asarray(expected)[inside])


def test_a_soft_edge_rises_from_the_border_into_the_mask():
    pixels = np.zeros((1, 80), dtype=np.uint8)
    pixels[:, 30:] = 255
    mask = Image.fromarray(np.repeat(pixels, 8, axis=0))
    black, white = Image.new("RGB", mask.size), np.ones((1, 8, 80, 3), dtype=np.float32)
    row = composite(black, white, mask, 5, (0, 0, 80, 8))[0, 4, :, 0]
    assert (row[:30] == 0).all()
    assert (np.diff(row[30:]) >= 0).all()
    assert row[30] < 0.2
    assert row[-1] == 1


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("mask_blur", [1, 4, 64])
def test_a_soft_edge_leaves_every_pixel_of_a_thin_stroke_something_new(width, mask_blur):
    pixels = np.zeros((32, 32), dtype=np.uint8)
    pixels[10 : 10 + width, 4:28] = 255
    black, white = Image.new("RGB", (32, 32)), np.ones((1, 32, 32, 3), dtype=np.float32)
    found = composite(black, white, Image.fromarray(pixels), mask_blur, (0, 0, 32, 32))[0, :, :, 0]
    np.testing.assert_array_equal(found > 0, pixels > 0)


def test_a_mask_without_a_border_has_no_soft_edge():
    black, white = Image.new("RGB", (8, 8)), np.ones((1, 8, 8, 3), dtype=np.float32)
    assert composite(black, white, Image.new("L", (8, 8), 255), 4, (0, 0, 8, 8)).min() == 1


@pytest.mark.parametrize("trial", range(10))
def test_the_whole_pipeline_keeps_every_byte_outside(pipe, trial):
    rng = np.random.default_rng(100 + trial)
    height, width = 8 * rng.integers(1, 6, 2)
    original, mask = random_picture(rng, height, width), random_mask(rng, height, width)
    result = pipe.inpaint(
        "a lemon",
        original,
        mask,
        num_inference_steps=2,
        strength=float(rng.choice([0.5, 1.0])),
        mask_blur=int(rng.integers(0, 4)),
        seed=trial,
    )
    outside = np.asarray(mask) == 0
    assert result.image.size == original.size
    np.testing.assert_array_equal(np.asarray(result.image)[outside], np.asarray(original)[outside])


def test_a_part_of_a_picture_holds_the_mask_in_the_proportions_that_are_drawn():
    rng = np.random.default_rng(4)
    for _ in range(1000):
        height, width = rng.integers(2, 48, 2)
        mask = random_mask(rng, height, width)
        size = tuple(int(side) for side in 8 * rng.integers(1, 9, 2))
        padding = int(rng.integers(0, 20))
        left, upper, right, lower = region(mask, size, padding)
        assert 0 <= left < right <= width
        assert 0 <= upper < lower <= height
        assert not np.delete(np.asarray(mask), np.s_[upper:lower], axis=0).any()
        assert not np.delete(np.asarray(mask), np.s_[left:right], axis=1).any()
        rows, columns = np.nonzero(np.asarray(mask))
        assert left <= max(0, columns.min() - padding)
        assert lower >= min(height, rows.max() + 1 + padding)
        if right - left < width and lower - upper < height:
            unlike = abs((right - left) / size[0] - (lower - upper) / size[1])
            assert unlike * min(size) < 0.51  # of a pixel: rounding


@pytest.mark.parametrize("trial", range(10))
def test_drawing_only_around_the_mask_keeps_every_byte_outside(pipe, trial):
    rng = np.random.default_rng(200 + trial)
    height, width = rng.integers(9, 90, 2)  # also sizes that no model draws
    original, mask = random_picture(rng, height, width), random_mask(rng, height, width)
    options = {"num_inference_steps": 2, "strength": float(rng.choice([0.5, 1.0])), "seed": trial}
    result = pipe.inpaint("a lemon", original, mask, padding_mask_crop=trial, **options)
    outside = np.asarray(mask) == 0
    assert result.image.size == original.size
    changed = (np.asarray(result.image) != np.asarray(original)).any(axis=2)
    assert not changed[outside].any()
    assert changed[~outside].mean() > 0.8


def test_what_is_drawn_around_a_mask_is_the_part_drawn_alone(pipe):
    rng = np.random.default_rng(5)
    original, mask = random_picture(rng, 70, 90), Image.new("L", (90, 70))
    mask.paste(255, (20, 10, 40, 30))
    found = pipe.inpaint("a lemon", original, mask, seed=3, padding_mask_crop=6)
    box = (14, 4, 46, 36)  # with the margin 32 x 32, as the model draws: nothing is scaled
    alone = pipe.inpaint("a lemon", original.crop(box), mask.crop(box), seed=3)
    assert found.image.crop(box) == alone.image
    assert (found.request.width, found.request.height) == (32, 32)


def test_no_pixel_of_a_mask_is_lost_when_its_part_is_drawn_smaller():
    vae = autoencoder_tiny()  # so what is not repainted is the same for every seed
    torch.nn.init.constant_(vae.decoder.layers[-1].bias, 0.5)  # a middle grey
    pipe = LatentDiffusion(**(parts() | {"vae": vae}))
    original, mask = random_picture(np.random.default_rng(6), 96, 96), Image.new("L", (96, 96))
    for place in range(0, 96, 12):  # between the pixels that the nearest of each three would be
        mask.putpixel((place, place), 255)
    inside = np.asarray(mask) == 255
    one, other = (
        np.asarray(pipe.inpaint("a lemon", original, mask, seed=s, padding_mask_crop=96).image)
        for s in (1, 2)
    )
    assert (one[inside] != other[inside]).any(axis=1).all()


@pytest.mark.parametrize("where", [(0, 0), (3, 9), (31, 31), (17, 4)])
def test_a_mask_of_one_pixel_repaints_that_pixel(pipe, picture, where):
    pixels = np.zeros((32, 32), dtype=np.uint8)
    pixels[where] = 255
    mask = Image.fromarray(pixels)
    result = pipe.inpaint("a lemon", picture, mask, num_inference_steps=2, seed=0)
    changed = (np.asarray(result.image) != np.asarray(picture)).any(axis=2)
    assert np.argwhere(changed).tolist() == [list(where)]
