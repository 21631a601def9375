"""Pictures in and out of arrays, and the rules for accepting them.

Does not know about models. A picture is checked from its header before it is decoded, so that a
small file that claims to be huge costs nothing.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from .errors import InvalidRequest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MAX_PIXELS",
    "SUFFIXES",
    "composite",
    "contact_sheet",
    "load_image",
    "load_mask",
    "picture_files",
    "read_pictures",
    "region",
    "resize_mask",
    "to_pil",
    "to_tensor",
    "to_unit_tensor",
]

MAX_PIXELS = 8192 * 8192
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".avif", ".gif", ".tif", ".tiff"}
)
# Listed as pictures too, so that a file that cannot be read is named and not passed over.
FOREIGN = frozenset({".heic", ".heif", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".nef"})


def load_image(source: Any, field: str = "image", background: str = "white") -> Image.Image:
    """Take a picture as a PIL image, an array or a path; return it as RGB.

    Orientation from EXIF is applied, colours of another profile become sRGB, transparency is laid
    on the background. Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), either 8-bit integers
    or floats in [0, 1].

    Raises:
        InvalidRequest: it is missing, not a picture, truncated, or of more than MAX_PIXELS pixels.
    """
    image = _open(source, field)
    if image.mode == "F":
        image = _from_array(np.asarray(image), field)
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def load_mask(source: Any, field: str = "mask_image") -> Image.Image:
    """Take a mask like a picture; return it as black and white ("L", 0 or 255), white = repaint.

    Grey counts as white from 128 on, and what is transparent is black: nothing is painted there.
    """
    grey = load_image(source, field, "black").convert("L")
    mask = grey.point(lambda value: 255 if value >= 128 else 0)
    if mask.getextrema() == (0, 0):
        hint = "all black, so nothing would be repainted; white is 255, or True or 1.0 in an array"
        raise InvalidRequest(field, source, hint)
    return mask


def resize_mask(
    mask: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int] | None = None
) -> Image.Image:
    """A mask of black and white, or the part of it in the box, in another size. A pixel that any
    white falls into is white: no thin stroke is lost."""
    share = np.asarray(mask.convert("F").resize(size, Image.Resampling.BOX, box))
    return Image.fromarray(np.where(share > 0, 255, 0).astype(np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (1, 3, H, W) in [-1, 1]; "L" mask -> (1, 1, H, W) in [0, 1]; float32."""
    tensor = to_unit_tensor(image)
    return tensor if image.mode == "L" else 2.0 * tensor - 1.0


def to_unit_tensor(image: Image.Image) -> Tensor:
    """A picture of C channels -> (1, C, H, W) in [0, 1]; float32."""
    import torch

    array = np.asarray(image, dtype=np.float32) / 255.0
    array = array.reshape(image.height, image.width, -1)
    # Batch first, then transposed: the strides decide which convolution runs, and so the last bit.
    return torch.from_numpy(array[None].transpose(0, 3, 1, 2))


def region(mask: Image.Image, size: tuple[int, int], padding: int) -> tuple[int, int, int, int]:
    """The part of a picture that holds all of the mask's white, with a margin of `padding` pixels
    and the proportions of `size` (width, height), as far as the picture reaches.

    Returns:
        left, upper, right, lower.
    """
    box = mask.getbbox()
    assert box is not None, "masks that are all black are refused"
    left, right = max(0, box[0] - padding), min(mask.width, box[2] + padding)
    upper, lower = max(0, box[1] - padding), min(mask.height, box[3] + padding)
    width = max(right - left, round((lower - upper) * size[0] / size[1]))
    height = max(lower - upper, round((right - left) * size[1] / size[0]))
    left, right = _widened(left, right, width, mask.width)
    upper, lower = _widened(upper, lower, height, mask.height)
    return left, upper, right, lower


def _widened(low: int, high: int, length: int, end: int) -> tuple[int, int]:
    """A span of that length around another, moved and cut to lie between 0 and `end`."""
    length = min(length, end)
    low = min(max(0, (low + high - length) // 2), end - length)
    return low, low + length


def composite(
    original: Image.Image,
    painted: np.ndarray,
    mask: Image.Image,
    mask_blur: int,
    box: tuple[int, int, int, int],
) -> np.ndarray:
    """Lay the repainted pixels over the original; outside the mask the original stays exactly.

    Args:
        original: RGB, H x W.
        painted: (B, h, w, 3), float32 in [0, 1]; scaled to the box if it has another size.
        mask: "L", 0 or 255, H x W.
        mask_blur: width in pixels of the soft edge, which lies inside the mask and leaves every
            pixel of it some of the new picture.
        box: where in the original they belong: left, upper, right, lower.

    Returns:
        (B, H, W, 3), float32 in [0, 1].
    """
    left, upper, right, lower = box
    size = (right - left, lower - upper)
    if painted.shape[2:0:-1] != size:
        scaled = [picture.resize(size, Image.Resampling.LANCZOS) for picture in to_pil(painted)]
        painted = np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in scaled])
    alpha = np.asarray(mask, dtype=np.float32) / 255
    if mask_blur and not alpha.all():
        from scipy.ndimage import distance_transform_edt

        inside = distance_transform_edt(alpha)  # pixels to the nearest one that stays
        alpha = (inside / (mask_blur + 1)).clip(0, 1).astype(np.float32)
    alpha = alpha[upper:lower, left:right, None]
    whole = np.asarray(original, dtype=np.float32) / 255
    pixels = np.repeat(whole[None], len(painted), axis=0)
    below = pixels[:, upper:lower, left:right]
    below[:] = alpha * painted + (1 - alpha) * below  # exact where alpha is 0 or 1
    return pixels


def to_pil(pixels: np.ndarray) -> list[Image.Image]:
    """(B, H, W, 3) in [0, 1] -> RGB pictures."""
    return [Image.fromarray(row) for row in (pixels * 255).round().astype(np.uint8)]


def contact_sheet(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """All pictures on one sheet, row by row, as square as can be unless `columns` is given."""
    columns = columns or int(np.ceil(len(images) ** 0.5))
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def picture_files(folder: Path) -> list[Path]:
    """Every picture below a folder, in the order of their paths; also those of kinds that cannot
    be read. What is hidden (`._photo.jpg` of a Mac, `.ipynb_checkpoints/`) is none."""
    endings = SUFFIXES | FOREIGN
    found = (file for file in folder.rglob("*") if file.suffix.lower() in endings)
    return sorted(
        file
        for file in found
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def read_pictures(folder: str | Path, field: str = "folder") -> list[Image.Image]:
    """Every picture below a folder in the order of their paths, in RGB on white.

    Raises:
        InvalidRequest: there is none, or one of them cannot be read; it is named.
    """
    files = picture_files(Path(folder))
    if not files:
        hint = f"it holds no pictures ({', '.join(sorted(SUFFIXES))})"
        raise InvalidRequest(field, str(folder), hint)
    return [load_image(file, "picture") for file in files]


def _open(source: Any, field: str) -> Image.Image:
    if not isinstance(source, str | Path | Image.Image):
        if not hasattr(source, "__array__"):
            raise InvalidRequest(field, source, "a PIL image, an array or the path of a picture")
        return _from_array(np.asarray(source), field)
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        _check_size(image.size, source, field)
        image.load()
        return _in_srgb(ImageOps.exif_transpose(image))
    except InvalidRequest:
        raise
    except FileNotFoundError as error:
        raise InvalidRequest(field, str(source), "no such file") from error
    except Image.DecompressionBombError as error:
        raise InvalidRequest(field, source, str(error)) from error
    except Exception as error:  # whatever a decoder makes of damaged bytes
        raise InvalidRequest(
            field, source, f"cannot be read as a picture ({error}); PNG, JPEG and WebP can"
        ) from error


def _in_srgb(image: Image.Image) -> Image.Image:
    """A picture with its colours as a screen shows them; one that is in sRGB stays as it is."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(own):
            return image
        mode = image.mode.replace("CMYK", "RGB")
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, own, srgb, outputMode=mode) or image
    except (ImageCms.PyCMSError, OSError):  # it is damaged, or of another kind of colours
        return image


def _from_array(array: np.ndarray, field: str) -> Image.Image:
    shape = f"an array of shape {array.shape} and type {array.dtype}"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or array.size == 0 or array.shape[2:] not in ((), (3,), (4,)):
        raise InvalidRequest(field, shape, "an array must be (H, W), (H, W, 3) or (H, W, 4)")
    _check_size(array.shape[1::-1], shape, field)
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise InvalidRequest(field, shape, "an array of floats must lie in [0, 1]")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise InvalidRequest(field, shape, "an array must be of type uint8, bool or float")
    return Image.fromarray(array)


def _check_size(size: tuple[int, int], source: Any, field: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise InvalidRequest(
            field, source, f"{size[0]} x {size[1]} pixels; at most {MAX_PIXELS} in all are accepted"
        )
