"""What is a picture, and what becomes of it."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from latentgen import InvalidRequest
from latentgen.images import (
    contact_sheet,
    load_image,
    load_mask,
    resize_mask,
    to_pil,
    to_tensor,
)

RED = (255, 0, 0)


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def test_a_path_a_picture_and_an_array_are_the_same_picture(photo):
    from_path = load_image(photo)
    pixels = np.asarray(from_path)
    sources = [str(photo), Image.open(photo), pixels, pixels / np.float32(255), pixels / 255.0]
    for source in sources:
        assert load_image(source).tobytes() == from_path.tobytes()


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    assert [load_image(image).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), RED]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert load_image(grey).getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_colour_of_a_palette_is_laid_on_white(tmp_path):
    image = Image.new("P", (1, 1), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "p.png", transparency=0)
    assert load_image(tmp_path / "p.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_picture_of_floats_is_taken_like_an_array_of_them(tmp_path):
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(tmp_path / "x.tiff")
    assert [load_image(tmp_path / "x.tiff").getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    with pytest.raises(InvalidRequest, match=r"must lie in \[0, 1\]"):
        load_image(Image.fromarray(np.array([[0, 200]], np.float32)))


def test_the_orientation_of_a_camera_is_applied(tmp_path):
    image = Image.new("RGB", (16, 8), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (8, 16)


def test_colours_of_another_profile_become_srgb(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other = srgb.replace(b"rXYZ", b"then").replace(b"gXYZ", b"rXYZ").replace(b"then", b"gXYZ")
    other = other.replace("sRGB".encode("utf-16-be"), "xxxx".encode("utf-16-be"))
    photo = Image.new("RGBA", (1, 1), RED)
    for profile, seen in ((srgb, RED), (other, (0, 255, 0)), (b"damaged", RED)):
        photo.save(tmp_path / "photo.png", icc_profile=profile)
        assert load_image(tmp_path / "photo.png").getpixel((0, 0)) == seen


def test_sixteen_bits_become_eight(tmp_path):
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    found = np.asarray(load_image(tmp_path / "deep.png"))
    assert found[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX", "LA"])
def test_every_mode_becomes_rgb(mode):
    assert load_image(Image.new("RGB", (3, 2), "red").convert(mode)).mode == "RGB"


def png(width, height):
    """A valid beginning of a picture of that size: a header and a little data."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)


@pytest.mark.parametrize("size", [(100_000, 100_000), (20_000, 4_000), (2**31 - 1, 1)])
def test_a_bomb_is_refused_from_its_header(tmp_path, size):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(*size))
    # Pillow refuses the largest itself, in its own words.
    with pytest.raises(InvalidRequest, match=r"pixels; at most|exceeds limit") as refused:
        load_image(bomb)
    assert refused.value.field == "image"


def broken(kind, photo):
    data = photo.read_bytes()
    return {"truncated": data[: len(data) // 2], "text": b"not a picture", "empty": b""}[kind]


@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_what_is_no_picture_is_refused(tmp_path, photo, kind):
    path = tmp_path / "broken.png"
    path.write_bytes(broken(kind, photo))
    for load, field in ((load_image, "image"), (load_mask, "mask_image")):
        with pytest.raises(InvalidRequest, match="cannot be read as a picture") as refused:
            load(path)
        assert refused.value.field == field


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="no such file"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(InvalidRequest, match="image"):
        load_image(tmp_path)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4), np.int64),
        np.full((4, 4), 2.0),
        np.full((4, 4), -0.1),
        np.full((4, 4), np.nan),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_an_array_of_another_shape_type_or_range_is_refused(array):
    with pytest.raises(InvalidRequest, match="array"):
        load_image(array)


def test_a_mask_is_black_and_white_from_128_on():
    mask = load_mask(np.array([[0, 127, 128, 255]], dtype=np.uint8))
    assert np.asarray(mask).tolist() == [[0, 0, 255, 255]]
    assert np.asarray(load_mask(np.array([[True, False]]))).tolist() == [[255, 0]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_strokes_on_a_transparent_mask_are_the_mask(mode):
    """As paint programs write a layer: what is not painted on is not repainted."""
    mask = Image.new("RGBA", (3, 1))
    mask.putpixel((1, 0), (255, 255, 255, 255))
    mask.putpixel((2, 0), (255, 255, 255, 0))
    assert np.asarray(load_mask(mask.convert(mode))).tolist() == [[0, 255, 0]]


def test_a_mask_keeps_its_thin_strokes_in_any_size():
    mask = Image.new("L", (1024, 1024))
    mask.putpixel((700, 300), 255)
    for size in ((64, 64), (1024, 32), (1500, 1500)):
        found = np.asarray(resize_mask(mask, size))
        assert set(np.unique(found)) == {0, 255}
        place = [300 * size[1] // 1024, 700 * size[0] // 1024]
        assert np.argwhere(found)[0].tolist() == place
    assert np.asarray(resize_mask(mask, (4, 4), (704, 0, 1024, 1024))).max() == 0


def test_whatever_a_decoder_raises_is_told_in_a_line(photo, monkeypatch):
    """AVIF's has errors of its own."""

    def fail(self):
        raise RuntimeError("Failed to decode image")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(InvalidRequest, match="cannot be read as a picture"):
        load_image(photo)


def test_a_black_mask_is_refused():
    with pytest.raises(InvalidRequest, match="nothing would be repainted"):
        load_mask(np.full((4, 4), 127, dtype=np.uint8))


def test_tensors_by_hand():
    image = Image.new("RGB", (2, 1), (0, 255, 51))
    tensor = to_tensor(image)
    assert tensor.shape == (1, 3, 1, 2)
    np.testing.assert_allclose(tensor[0, :, 0, 1], [-1, 1, -0.6], atol=1e-6)
    mask = to_tensor(Image.fromarray(np.array([[0, 255]], dtype=np.uint8)))
    assert mask.tolist() == [[[[0.0, 1.0]]]]


def test_every_byte_survives_the_way_to_floats_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    [image] = to_pil(pixels.astype(np.float32) / 255)
    np.testing.assert_array_equal(np.asarray(image), pixels[0])


def test_floats_are_rounded_to_the_nearest_byte():
    pixels = np.array([0.4, 0.6, 254.4, 254.6], dtype=np.float32).reshape(1, 1, 4, 1) / 255
    [image] = to_pil(pixels.repeat(3, axis=3))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 254, 255]


def test_a_contact_sheet_is_as_square_as_can_be():
    pictures = [Image.new("RGB", (10, 8), colour) for colour in ("red", "green", "blue")]
    assert contact_sheet(pictures).size == (20, 16)
    assert contact_sheet(pictures, columns=3).size == (30, 8)
    assert contact_sheet(pictures).getpixel((15, 12)) == (255, 255, 255)
    assert contact_sheet(pictures).getpixel((5, 12)) == (0, 0, 255)
