"""What a client asks for, and what the server promises: from a `Drawing` to an accepted `Job`.

Accepting means: every field is checked, every default is filled in, the seed is drawn and the names
of the files are fixed. From there on nothing is left to chance, so a job that was interrupted gives
the same pictures when it is done again.
"""

from __future__ import annotations

import base64
import binascii
import io
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image, ImageOps
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from .. import controlnet, metadata
from ..errors import InvalidRequest
from ..lorafolder import LoraUse
from ..modelfolder import Model
from ..outputs import write_file
from ..request import Request
from .settings import Settings

__all__ = [
    "FORMATS",
    "LAST_SEED",
    "MAX_PROMPT",
    "Drawing",
    "Job",
    "LoraChoice",
    "accept",
    "checked",
    "decode_picture",
    "first_of",
    "open_picture",
    "size_of",
]

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP", "avif": "AVIF"}
READ = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # formats of pictures that are sent
MAX_PROMPT = 20_000  # characters
MAX_PREVIEWS = 50
PICTURES = ("image", "mask_image", "control_image")  # that a drawing may have
LAST_SEED = 2**63 - 1024  # the last number that the OpenAPI document, which has floats, can tell


class LoraChoice(BaseModel):
    """A LoRA by its name, as the server lists it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(max_length=200)
    weight: float = Field(default=1.0, description="of its U-Net part")
    text_encoder_weight: float | None = Field(default=None, description="default: the same")

    @property
    def use(self) -> LoraUse:
        """As the library takes it: a name of the folder, never a path."""
        of_text = self.text_encoder_weight
        return LoraUse(self.name, self.weight, self.weight if of_text is None else of_text)


def _tell_aliases(schema: dict[str, Any], kind: type[BaseModel]) -> None:
    """Other names of fields, which pydantic takes but does not tell the OpenAPI document."""
    told = schema["properties"]
    for name, field in kind.model_fields.items():
        if isinstance(field.validation_alias, AliasChoices):
            for alias in field.validation_alias.choices[1:]:
                told[alias] = told[name] | {"title": alias, "description": f"the same as {name}"}


class Drawing(BaseModel):
    """What to draw; the names are those of Python. Pictures are base64, with or without
    `data:image/…;base64,` before it; nothing is ever fetched from a URL."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_tell_aliases)

    prompt: str = Field(max_length=MAX_PROMPT, description="`<lora:name:0.8>` works here too")
    negative_prompt: str | None = Field(default=None, max_length=MAX_PROMPT)
    model: str | None = Field(default=None, max_length=200, description="default: the server's")
    num_inference_steps: int | None = Field(
        default=None, ge=1, validation_alias=AliasChoices("num_inference_steps", "steps")
    )
    guidance_scale: float | None = Field(default=None, ge=1, description="1: off")
    scheduler: str | None = Field(
        default=None, max_length=100, validation_alias=AliasChoices("scheduler", "sampler")
    )
    seed: int | None = Field(
        default=None, ge=0, le=LAST_SEED, description="default: drawn, and told"
    )
    num_images: int = Field(default=1, ge=1, validation_alias=AliasChoices("num_images", "n"))
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    eta: float = Field(default=0.0, ge=0, le=1)
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    loras: list[LoraChoice] = Field(default=[], max_length=20)
    image: str | None = Field(default=None, description="start from it (img2img)")
    mask_image: str | None = Field(
        default=None, description="white = repaint; as large as the image"
    )
    strength: float | None = Field(
        default=None, ge=0, le=1, description="of img2img and inpainting"
    )
    mask_blur: int = Field(default=0, ge=0, description="pixels of a soft edge inside the mask")
    padding_mask_crop: int | None = Field(
        default=None,
        ge=0,
        description="draw only the part around the mask, with this margin in pixels",
    )
    controlnet: str | None = Field(
        default=None, max_length=200, description="the name of one that is here"
    )
    control_image: str | None = Field(default=None, description="what the controlnet sees")
    controlnet_conditioning_scale: float = Field(default=1.0, ge=0, le=10)
    control_guidance_start: float = Field(default=0.0, ge=0, le=1, description="share of the steps")
    control_guidance_end: float = Field(default=1.0, ge=0, le=1)
    output_format: Literal["png", "jpeg", "webp", "avif"] = "png"
    quality: int = Field(
        default=metadata.QUALITY, ge=1, le=100, description="not of PNG, which loses nothing"
    )
    previews: int = Field(default=0, ge=0, le=MAX_PREVIEWS, description="sent while it is drawn")


ALIASES = {
    alias: name
    for name, field in Drawing.model_fields.items()
    if isinstance(field.validation_alias, AliasChoices)
    for alias in field.validation_alias.choices[1:]
}
Fields = TypeVar("Fields", bound=BaseModel)


def checked(kind: type[Fields], values: dict[str, Any]) -> Fields:
    """Fields that an API did not read itself, as its model.

    Raises:
        InvalidRequest: names the first field that is wrong.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        field, hint = first_of(error.errors())
        raise InvalidRequest(field, values.get(field), hint) from error


def first_of(errors: Sequence[Any]) -> tuple[str, str]:
    """The field of the first error that pydantic tells, and what is wrong with it."""
    first = errors[0]
    unknown = first["type"] == "extra_forbidden"
    field = ".".join(str(part) for part in first["loc"])
    if not unknown:
        return field, first["msg"]
    if (same := ALIASES.get(str(first["loc"][-1]))) is not None:
        return field, f"the same as {same}; send one of them"
    return field, "there is no such field here"


class Job(BaseModel):
    """An accepted drawing: all that is needed to do it, as JSON. It is what the queue keeps."""

    model_config = ConfigDict(frozen=True)

    id: str
    created: float = Field(description="seconds since 1970")
    model: str
    request: dict[str, Any] = Field(description="as in the metadata of pictures; all resolved")
    seeds: list[int] = Field(description="of each picture")
    inputs: list[str] = Field(
        default=[], description="which of image, mask_image and control_image it needs"
    )
    output_format: str
    quality: int
    previews: int = 0

    def input_file(self, settings: Settings, name: str) -> Path:
        """Where a picture that it needs is kept."""
        return settings.inputs / f"{self.id}-{name}.png"

    def output_files(self, settings: Settings) -> list[Path]:
        """Where its pictures go."""
        day = time.strftime("%Y-%m-%d", time.gmtime(self.created))
        return [
            settings.outputs / day / f"{self.id}-{k}.{self.output_format}"
            for k in range(len(self.seeds))
        ]

    def to_request(self, settings: Settings) -> Request:
        """The request of the library."""
        pictures: dict[str, Any] = {n: self.input_file(settings, n) for n in self.inputs}
        known = {"request": self.request, "pictures": dict.fromkeys(self.inputs, "")}
        return metadata.request_from_record(known, **pictures)


def accept(
    drawing: Drawing,
    settings: Settings,
    pictures: Mapping[str, Image.Image] | None = None,
) -> Job:
    """Check a drawing, decide what it left open, and keep the pictures that it needs.

    Args:
        pictures: those of the drawing that its API had in another form, by the names of the fields.

    Raises:
        InvalidRequest: names the field, its value and what would work.
    """
    models = settings.models()
    name = drawing.model if drawing.model is not None else next(iter(models))
    if name not in models:
        raise InvalidRequest("model", name, f"one of {', '.join(models)}")
    there = controlnet.names_there()
    if drawing.controlnet is not None and drawing.controlnet not in there:
        hint = f"one of {', '.join(there)}" if there else "there are none here"
        raise InvalidRequest("controlnet", drawing.controlnet, hint)
    given: dict[str, Any] = dict(pictures or {})
    for field in PICTURES:
        if (sent := getattr(drawing, field)) is not None:
            given[field] = decode_picture(sent, field, settings)
    asked = drawing.model_dump(
        exclude={"model", "loras", "output_format", "quality", "previews", *PICTURES}
    )
    loras = [lora.use for lora in drawing.loras]
    request = Request(**asked, loras=loras, **given)
    resolved = request.resolve(models[name])
    if request.controlnet is not None:
        controlnet.check_fits(request.controlnet, models[name].unet_config())
    for field, why in resolved.without_effect(models[name]).items():
        raise InvalidRequest(field, getattr(drawing, field), f"has no effect with {why}")
    for field, value, most in (
        ("num_images", resolved.num_images, settings.max_images),
        ("num_inference_steps", resolved.num_inference_steps, settings.max_steps),
        ("width", resolved.width * resolved.height, settings.max_pixels),
    ):
        if value > most:
            what = "pixels in all" if field == "width" else "here"
            raise InvalidRequest(field, getattr(resolved, field), f"at most {most} {what}")
    form = drawing.output_format
    metadata.check_quality(FORMATS[form], drawing.quality)
    try:
        metadata.check_fits(FORMATS[form], resolved)
    except InvalidRequest as error:
        raise InvalidRequest("output_format", form, error.hint) from error

    job = Job(
        id=str(uuid.uuid4()),
        created=time.time(),
        model=name,
        request=metadata.recorded(resolved),
        seeds=resolved.seeds,
        inputs=list(given),
        output_format=form,
        quality=drawing.quality,
        previews=drawing.previews,
    )
    for kind in given:
        file = job.input_file(settings, kind)
        stream = io.BytesIO()
        getattr(request, kind).save(stream, "PNG")
        write_file(file, stream.getvalue())
    return job


def size_of(image: Image.Image, model: Model) -> dict[str, int]:
    """The picture's size, or the next smaller one that the model can draw."""
    factor = model.vae_scale_factor
    sides = {"width": image.width, "height": image.height}
    return {side: max(factor, length // factor * factor) for side, length in sides.items()}


def decode_picture(text: str, field: str, settings: Settings) -> Image.Image:
    """A picture in base64, perhaps as a data URL.

    Raises:
        InvalidRequest: it is something else, too large, or no picture that is read here.
    """
    if text.startswith(("http:", "https:", "file:")):
        raise InvalidRequest(field, text, "URLs are not fetched; send the picture as base64")
    body = text.partition(",")[2] if text.startswith("data:") else text
    try:
        data = base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(field, text, "not base64") from None
    return open_picture(data, field, settings)


def open_picture(data: bytes, field: str, settings: Settings) -> Image.Image:
    """A picture file, upright, its size checked by its header before it is decoded; transparency is
    kept.

    Raises:
        InvalidRequest: it is too large, or no picture that is read here.
    """
    able = ", ".join(READ)
    most = f"at most {settings.max_pixels} pixels in all"
    try:
        image = Image.open(io.BytesIO(data), formats=READ)
        if image.width * image.height > settings.max_pixels:
            size = f"{image.width} x {image.height}"
            raise InvalidRequest(field, size, most)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # as everybody sees it, and masks it
    except Image.DecompressionBombError as error:
        raise InvalidRequest(field, f"{len(data)} bytes", most) from error
    except InvalidRequest:
        raise
    except Exception as error:  # Pillow raises many kinds for files that are broken
        raise InvalidRequest(
            field, f"{len(data)} bytes", f"no picture that is read ({able})"
        ) from error
    return image
