"""The script `controlnet` of the WebUI's API, and `/controlnet`, where its clients look around.

There is one unit, and no preprocessor that finds edges or poses: its image is what the ControlNet
sees. Without an image, that is the picture that is redrawn; a ControlNet for inpainting sees where
that is repainted, as the preprocessor `inpaint_only` has it. The original may send what was seen
behind the pictures of an answer; here they come alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter
from PIL import Image, ImageOps
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from .. import controlnet
from ..errors import InvalidRequest
from ..images import load_image
from .drawing import checked, decode_picture
from .settings import Settings

__all__ = ["ControlUnit", "router", "seen_by", "unit_of"]

router = APIRouter(prefix="/controlnet", tags=["WebUI"])

NOTHING: tuple[Any, ...] = (
    {},
    [],
    [False],
    {"args": []},
    {"args": [False]},
)  # scripts that are switched off
# Fields of a unit without a counterpart here, and the values at which they ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "advanced_weighting": ([],),
    "batch_image_dir": ("",),
    "batch_images": ("",),
    "batch_mask_dir": ("",),
    "control_mode": (0, "Balanced", ["Balanced"]),
    "effective_region_mask": ("",),
    "generated_image": ("",),
    "inpaint_crop_input_image": (True,),
    "input_mode": (0, "simple", "InputMode.SIMPLE"),
    "ipadapter_input": ("",),
    "loopback": (False,),
    "mask": ("",),
    "mask_image": ("",),
    "output_dir": ("",),
    "pulid_mode": ("Fidelity",),
    "union_control_type": ("Unknown",),
    "use_preview_as_input": (False,),
}
# Fields that say how preprocessors work, or what the original does in between.
MOOT = {
    "hr_option",
    "is_ui",
    "low_vram",
    "lowvram",
    "pixel_perfect",
    "processor_res",
    "save_detected_map",
    "threshold_a",
    "threshold_b",
}
STRETCH, CROP, FILL = range(3)
RESIZE_MODES = {
    "Just Resize": STRETCH,
    "Crop and Resize": CROP,
    "Scale to Fit (Inner Fit)": CROP,
    "Inner Fit (Scale to Fit)": CROP,
    "Resize and Fill": FILL,
    "Envelope (Outer Fit)": FILL,
    "Outer Fit (Shrink to Fit)": FILL,
}


class ControlUnit(BaseModel):
    """A unit, without the fields that ask for nothing."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = True
    module: Literal["none", "None", "inpaint_only", None] = "none"
    model: str = Field("None", max_length=200)
    image: str | None = Field(None, validation_alias=AliasChoices("image", "input_image"))
    weight: float = 1.0
    resize_mode: int = Field(CROP, ge=STRETCH, le=FILL)
    guidance_start: float = 0.0
    guidance_end: float = 1.0

    @property
    def name(self) -> str:
        """The ControlNet's; some clients send its hash behind it."""
        return self.model.partition(" [")[0]


def unit_of(scripts: Mapping[str, Any] | None) -> ControlUnit | None:
    """The unit that is switched on, if one is.

    Raises:
        InvalidRequest: there are more than one, it asks for what is not done here, or there is
            another script.
    """
    units: list[ControlUnit] = []
    for name, script in (scripts or {}).items():
        if script in NOTHING:
            continue
        args = script.get("args") if isinstance(script, dict) and len(script) == 1 else None
        if name.lower() != "controlnet" or not isinstance(args, list):
            hint = "there are no scripts here but controlnet, with its units in `args`"
            raise InvalidRequest("alwayson_scripts", name, hint)
        units += [unit for told in args if (unit := _read(told)).enabled]
    if len(units) > 1:
        raise InvalidRequest("alwayson_scripts", f"{len(units)} units", "one of them works here")
    return units[0] if units else None


def _read(told: Any) -> ControlUnit:
    if not isinstance(told, dict):
        raise InvalidRequest("alwayson_scripts", told, "a unit of controlnet is an object")
    fields = {name: value for name, value in told.items() if name not in MOOT}
    for name, values in NEUTRAL.items():
        if fields.get(name) is None or fields[name] in values:
            fields.pop(name, None)
    for name in ("image", "input_image"):  # the picture and its mask, as Gradio had them
        if isinstance(sent := fields.get(name), dict) and not sent.get("mask"):
            fields[name] = sent.get("image")
    if (end := fields.pop("guidance", None)) is not None:  # as it was called once
        fields.setdefault("guidance_end", end)
    if isinstance(mode := fields.get("resize_mode"), str):
        fields["resize_mode"] = RESIZE_MODES.get(mode, mode)
    try:
        return checked(ControlUnit, fields)
    except InvalidRequest as error:
        hint = f"{error.field} of a unit of controlnet: {error.hint}"
        raise InvalidRequest("alwayson_scripts", error.value, hint) from error


def seen_by(
    unit: ControlUnit,
    settings: Settings,
    size: tuple[int, int] | None,
    redrawn: str | None = None,
    resize_mode: int = STRETCH,
) -> Image.Image:
    """What the ControlNet of a unit sees: its own image, or the one that is redrawn.

    Args:
        size: (width, height) of what is drawn; None: as it was sent.
        redrawn: that picture, in base64, and
        resize_mode: what is done with it.
    """
    field = "control_image"
    sent, mode = (unit.image, unit.resize_mode) if unit.image else (redrawn, resize_mode)
    if not sent:
        raise InvalidRequest(field, None, "the controlnet needs one to follow")
    image = load_image(decode_picture(sent, field, settings), field)
    if size is None:
        return image
    lanczos = Image.Resampling.LANCZOS
    if mode == STRETCH:
        return image.resize(size, lanczos)
    if mode == CROP:
        return ImageOps.fit(image, size, lanczos)
    pixels = np.asarray(image)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = tuple(np.median(edge, axis=0).astype(int).tolist())
    return ImageOps.pad(image, size, lanczos, colour)


class ControlNets(BaseModel):
    model_list: list[str]


class Modules(BaseModel):
    module_list: list[str] = ["none", "inpaint_only"]


class Version(BaseModel):
    version: int = 3


@router.get("/model_list")
def controlnets() -> ControlNets:
    """The ControlNets in the data folder."""
    return ControlNets(model_list=list(controlnet.names_there()))


@router.get("/module_list")
def modules() -> Modules:
    """The preprocessors."""
    return Modules()


@router.get("/version")
def version() -> Version:
    """Of this API."""
    return Version()
