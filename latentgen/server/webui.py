"""The WebUI's API (AUTOMATIC1111's), as its clients speak it: `/sdapi/v1`.

Clients send some forty fields with every request, most of which ask for nothing. A field that has
no counterpart here is accepted at the values that ask for nothing (NEUTRAL) and refused by name at
any other. A pass at higher resolution, scripts, styles, variation seeds, face restoration, tiling
and refiners are such fields. Differences that are told rather than hidden:

- with `save_images` false, the job and its pictures are deleted once they are sent
- `eta` counts with DDIM and TCD; for other samplers 0 and 1 are accepted, as clients always send it
- the negative prompt counts with guidance only: not at a `cfg_scale` of 1
- `denoising_strength` without a picture, and the fields of masks without a mask, ask for nothing
- of `alwayson_scripts` there is `controlnet`, with one unit and without preprocessors
- `inpainting_fill` 0 (the colours around) and 1 (the original) work; 2 and 3 (latent noise, latent
  nothing) are what `denoising_strength` 1 does anyway, and are refused below
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import re
import time
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response
from PIL import Image, ImageChops, ImageFilter, ImageOps, ImageStat
from pydantic import BaseModel, ConfigDict, Field

from .. import __version__, controlnet, lorafolder, metadata, schedulers
from ..errors import InvalidRequest
from ..images import load_image
from ..modelfolder import Model, read_header
from .controlunit import seen_by, unit_of
from .drawing import MAX_PROMPT, Drawing, Job, checked, decode_picture
from .jobs import JobState
from .native import TheService, pictures_of
from .service import Service, Sketch
from .settings import Settings

__all__ = ["router"]

router = APIRouter(prefix="/sdapi/v1", tags=["WebUI"])

# Fields without a counterpart here, and the values at which they ask for nothing; null always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "styles": ([],),
    "subseed_strength": (0,),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "clip_skip": (1,),
    "restore_faces": (False,),
    "tiling": (False,),
    "s_min_uncond": (0,),
    "s_churn": (0,),
    "s_tmin": (0,),
    "s_tmax": (0,),
    "s_noise": (1,),
    "refiner_checkpoint": ("", "None", "none"),
    "disable_extra_networks": (False,),
    "enable_hr": (False,),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "script_name": ("",),
    "script_args": ([],),
    "comments": ({},),
    "mask_round": (True,),
    "initial_noise_multiplier": (1,),
    "firstpass_image": ("",),
    "latent_mask": ("",),
    "infotext": ("",),
    "hr_additional_modules": ([], ["Use same choices"]),
}
# Fields that say how something is done which is not done: numbers and texts that nobody reads.
MOOT = {
    "subseed",
    "refiner_switch_at",
    "hr_scale",
    "hr_upscaler",
    "hr_second_pass_steps",
    "hr_resize_x",
    "hr_resize_y",
    "hr_checkpoint_name",
    "hr_sampler_name",
    "hr_scheduler",
    "hr_prompt",
    "hr_negative_prompt",
    "hr_cfg",
    "hr_distilled_cfg",
    "distilled_cfg_scale",
    "image_cfg_scale",
    "do_not_save_samples",  # the original overwrites both with save_images
    "do_not_save_grid",
    "force_task_id",
}
PRIVATE = {"url", "auth"}  # SillyTavern sends on where it sends to, with the password
SETTINGS = {"sd_model_checkpoint", "samples_format"}  # what override_settings may name
NEUTRAL_SETTINGS: dict[str, tuple[Any, ...]] = {  # and with these values
    "CLIP_stop_at_last_layers": (1,),
    "sd_vae": ("Automatic", "None", ""),
    "eta_noise_seed_delta": (0,),
}
EXTRA = (  # what of the infotext `info` tells in a place of its own
    "Schedule type",
    "Mask blur",
    "Inpaint area",
    "Masked area padding",
    "Lora hashes",
    "TI hashes",
)
HASH = re.compile("[0-9a-f]{10}")
SCHEDULE_TYPES = (
    "Automatic",
    "Uniform",
    "Karras",
    "Exponential",
    "SGM Uniform",
    "Align Your Steps",
    "Simple",
    "Normal",
    "DDIM",
    "Beta",
)
NOTHING: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {"schema": {"type": "null"}}}}
}
NAMES = {  # of our fields, in this API
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "num_images": "batch_size",
    "image": "init_images",
    "mask_image": "mask",
    "padding_mask_crop": "inpaint_full_res_padding",
    "strength": "denoising_strength",
    "scheduler": "sampler_name",
    "model": "sd_model_checkpoint",
    "output_format": "samples_format",
    "control_image": "image",
    "controlnet_conditioning_scale": "weight",
    "control_guidance_start": "guidance_start",
    "control_guidance_end": "guidance_end",
}


def _tell_the_rest(schema: dict[str, Any]) -> None:
    """The fields that are accepted besides those of the model, for the OpenAPI document."""
    told: dict[str, Any] = {name: {"enum": [*values, None]} for name, values in NEUTRAL.items()}
    kinds = ["string", "number", "boolean", "null"]
    told |= {name: {"type": kinds, "description": "without effect"} for name in sorted(MOOT)}
    schema["properties"] |= told
    schema["additionalProperties"] = False


class TextToImage(BaseModel):
    """`POST /sdapi/v1/txt2img`; more fields than these are accepted, see the module."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_tell_the_rest)

    prompt: str = Field("", max_length=MAX_PROMPT)
    negative_prompt: str | None = Field("", max_length=MAX_PROMPT)
    seed: int | None = -1
    sampler_name: str | None = Field(None, max_length=100)
    sampler_index: str | None = Field("Euler", max_length=100)
    scheduler: str | None = Field(None, max_length=100)
    batch_size: int | None = Field(1, ge=1)
    n_iter: int | None = Field(1, ge=1)
    steps: int | None = Field(50, ge=1)
    cfg_scale: float | None = 7.0
    width: int | None = Field(512, ge=1)
    height: int | None = Field(512, ge=1)
    eta: float | None = None
    denoising_strength: float | None = Field(None, ge=0, le=1)
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool | None = True
    alwayson_scripts: dict[str, Any] | None = None
    send_images: bool = True
    save_images: bool = False


class ImageToImage(TextToImage):
    """`POST /sdapi/v1/img2img`."""

    init_images: list[str] | None = None
    resize_mode: int | None = Field(0, ge=0, le=3)
    denoising_strength: float | None = Field(0.75, ge=0, le=1)
    mask: str | None = None
    mask_blur: int | None = None
    mask_blur_x: int | None = 4
    mask_blur_y: int | None = 4
    inpainting_fill: int | None = Field(0, ge=0, le=3)
    inpaint_full_res: bool | int | None = True
    inpaint_full_res_padding: int | None = Field(0, ge=0)
    inpainting_mask_invert: int | None = Field(0, ge=0, le=1)
    include_init_images: bool = False


class PictureInfo(BaseModel):
    """`POST /sdapi/v1/png-info`."""

    model_config = ConfigDict(extra="forbid")

    image: str


class Drawn(BaseModel):
    """The answer to both."""

    images: list[str] = Field(description="in base64; none if the job was interrupted")
    parameters: dict[str, Any] = Field(description="what was asked")
    info: str = Field(description="JSON: seeds, prompts, infotexts and so on")


class State(BaseModel):
    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class Progress(BaseModel):
    progress: float = Field(default=0.0, description="from 0 to 1")
    eta_relative: float = Field(default=0.0, description="seconds left")
    state: State = State()
    current_image: str | None = None
    textinfo: str | None = None


class Sampler(BaseModel):
    name: str
    aliases: list[str]
    options: dict[str, str] = {}


class ScheduleType(BaseModel):
    name: str
    label: str
    aliases: list[str] | None = None
    default_rho: float
    need_inner_model: bool = False


class ModelTold(BaseModel):
    title: str
    model_name: str
    hash: str | None
    sha256: str | None = None
    filename: str
    config: str | None = None


class LoraTold(BaseModel):
    name: str
    alias: str
    path: str
    metadata: dict[str, str] = {}


class Embedding(BaseModel):
    step: int | None = None
    sd_checkpoint: str | None = None
    sd_checkpoint_name: str | None = None
    shape: int | None = None
    vectors: int | None = None


class Embeddings(BaseModel):
    loaded: dict[str, Embedding] = {}
    skipped: dict[str, Embedding] = {}


class Options(BaseModel):
    sd_model_checkpoint: str
    sd_checkpoint_hash: str | None
    samples_format: str = "png"


class PictureTold(BaseModel):
    info: str
    items: dict[str, str]
    parameters: dict[str, str]


@router.post("/txt2img", response_model=Drawn)
async def txt2img(asked: TextToImage, request: Request, service: TheService) -> Response:
    """Draw pictures from text."""
    job = await service.submit(_sketch, asked, service)
    return await _answer(service, request, asked, job)


@router.post("/img2img", response_model=Drawn)
async def img2img(asked: ImageToImage, request: Request, service: TheService) -> Response:
    """Redraw a picture, or with a mask the white part of it."""
    if not asked.init_images:
        raise HTTPException(404, "Init image not found")
    if len(asked.init_images) > 1:
        raise InvalidRequest("init_images", len(asked.init_images), "one picture at a time")
    job = await service.submit(_redrawing, asked, service)
    return await _answer(service, request, asked, job)


def _sketch(asked: TextToImage, service: Service) -> Sketch:
    drawing = _drawing(asked, service)
    unit = unit_of(asked.alwayson_scripts)
    if unit is None:
        return drawing, {}
    more = {
        "controlnet": unit.name,
        "controlnet_conditioning_scale": unit.weight,
        "control_guidance_start": unit.guidance_start,
        "control_guidance_end": unit.guidance_end,
    }
    drawing, size = drawing.model_copy(update=more), (_or(asked.width, 512), _or(asked.height, 512))
    redrawn: dict[str, Any] = {}
    if isinstance(asked, ImageToImage):
        if asked.mask and not unit.image and controlnet.sees_mask(unit.name):
            return drawing, {}  # it sees what is repainted
        redrawn = {"redrawn": (asked.init_images or [""])[0], "resize_mode": asked.resize_mode or 0}
    if unit.module == "inpaint_only":
        hint = "inpaint_only goes with a mask, a model for inpainting and no image"
        raise InvalidRequest("alwayson_scripts", "controlnet", hint)
    whole = isinstance(asked, ImageToImage) and asked.mask and _only_masked(asked)
    seen = seen_by(unit, service.settings, None if whole else size, **redrawn)
    return drawing, {"control_image": seen}


def _redrawing(asked: ImageToImage, service: Service) -> Sketch:
    drawing, pictures = _sketch(asked, service)
    image, mask = _pictures(asked, service.settings)
    more: dict[str, Any] = {"strength": _or(asked.denoising_strength, 0.75)}
    if mask is not None:
        more["mask_blur"] = _blur(asked)
        if _only_masked(asked):
            more["padding_mask_crop"] = _or(asked.inpaint_full_res_padding, 0)
    given = {"image": image} if mask is None else {"image": image, "mask_image": mask}
    return drawing.model_copy(update=more), {**pictures, **given}


async def _answer(service: Service, request: Request, asked: TextToImage, job: Job) -> Response:
    state = await service.finished(job, request)
    if state.status == "failed":
        raise HTTPException(500, state.error or "the job failed")
    answer = await asyncio.to_thread(_drawn, service, state, asked)
    if not asked.save_images:
        await service.delete(state)
    return answer


def _drawn(service: Service, state: JobState, asked: TextToImage) -> Response:
    """The whole answer, ready to be sent; of a job that was interrupted, without pictures."""
    pictures = pictures_of(service, state)
    echo = asked.model_dump(exclude=PRIVATE)
    if isinstance(asked, ImageToImage) and not asked.include_init_images:
        echo |= {"init_images": None, "mask": None}
    body = {
        "images": [base64.b64encode(data).decode() for _, data in pictures if asked.send_images],
        "parameters": echo,
        "info": json.dumps(_info(service, state, asked, pictures)),
    }
    return _json(body)


def _json(body: dict[str, Any]) -> Response:
    """An answer with all letters as escapes, so that it can tell whatever was sent."""
    return Response(json.dumps(body), media_type="application/json")


def _drawing(asked: TextToImage, service: Service) -> Drawing:
    """The request in our own words; refuses what has none."""
    _refuse_the_rest(asked)
    width, height = _or(asked.width, 512), _or(asked.height, 512)
    if width * height > service.settings.max_pixels:  # before pictures are brought to that size
        hint = f"at most {service.settings.max_pixels} pixels in all"
        raise InvalidRequest("width", width, hint)
    override = asked.override_settings or {}
    for name, value in override.items():
        if name in SETTINGS or _asks_for_nothing(name, value):
            continue
        hint = f"of the settings, these work: {sorted(SETTINGS)}"
        raise InvalidRequest("override_settings", name, hint)
    form = override.get("samples_format", "png")
    model = _named_model(service, override.get("sd_model_checkpoint"))
    changes = form != "png" or model.name != next(iter(service.settings.models()))
    if asked.override_settings_restore_afterwards is False and changes:
        hint = "true: the settings of others stay as they are"
        raise InvalidRequest("override_settings_restore_afterwards", False, hint)
    name = asked.sampler_name or asked.sampler_index or "Euler"
    name = f"{name} {asked.scheduler or 'Automatic'}"  # the first may say it, too: they must agree
    eta = asked.eta if asked.eta is not None else 0.0
    if not schedulers.parse(name).entry.eta:
        if eta not in (0, 1):
            raise InvalidRequest("eta", eta, f"{name} takes none")
        eta = 0.0
    count = _or(asked.batch_size, 1) * _or(asked.n_iter, 1)
    if count > service.settings.max_images and _or(asked.n_iter, 1) > 1:
        hint = f"times batch_size, at most {service.settings.max_images}"
        raise InvalidRequest("n_iter", asked.n_iter, hint)
    unguided = _or(asked.cfg_scale, 7.0) == 1 or model.embeds_guidance
    negative = None if unguided else asked.negative_prompt or None
    fields = {
        "prompt": asked.prompt,
        "negative_prompt": negative,
        "model": model.name,
        "num_inference_steps": _or(asked.steps, 50),
        "guidance_scale": _or(asked.cfg_scale, 7.0),
        "scheduler": name,
        "seed": None if asked.seed in (None, -1) else asked.seed,
        "num_images": count,
        "width": width,
        "height": height,
        "eta": eta,
        "output_format": "jpeg" if form == "jpg" else form,
        "previews": 10,
    }
    return checked(Drawing, fields)


def _asks_for_nothing(setting: str, value: Any) -> bool:
    return value is None or value in NEUTRAL_SETTINGS.get(setting, ())


def _or(value: Any, default: Any) -> Any:
    """Their null is their default."""
    return value if value is not None else default


def _refuse_the_rest(asked: TextToImage) -> None:
    for name, value in (asked.model_extra or {}).items():
        if value is None:
            continue
        if name in MOOT | PRIVATE:
            _check_plain(name, value)
            continue
        if name not in NEUTRAL:
            raise HTTPException(400, f"{name[:80]!r}: there is no such field here")
        if value not in NEUTRAL[name]:
            nothing = NEUTRAL[name][0]
            raise InvalidRequest(name, value, f"not done here; leave it out, or {nothing!r}")


def _check_plain(name: str, value: Any) -> None:
    """A field that nobody reads comes back in the answer, so it holds what it can tell."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequest(name, value, "must be a finite number")
    if not isinstance(value, str | int | float) or len(str(value)) > MAX_PROMPT:
        raise InvalidRequest(name, value, f"a number or a text of at most {MAX_PROMPT} characters")


def _pictures(asked: ImageToImage, settings: Settings) -> tuple[Image.Image, Image.Image | None]:
    """What it starts from and what is repainted of it, both of the size that the answer has."""
    assert asked.init_images
    image = decode_picture(asked.init_images[0], "init_images", settings)
    image, mask = load_image(image, "init_images"), None
    if asked.mask:
        mask = _mask(decode_picture(asked.mask, "mask", settings), asked)
        if mask.size != image.size:
            size = f"{mask.width} x {mask.height}"
            raise InvalidRequest("mask", size, "not as large as the image")
    image, mask = _resized(image, mask, asked)
    return (image if mask is None else _filled(image, mask, asked)), mask


def _mask(mask: Image.Image, asked: ImageToImage) -> Image.Image:
    """White = repaint, or its alpha if it has one that says something."""
    if "A" in mask.getbands() and mask.getchannel("A").getextrema() != (255, 255):
        mask = mask.getchannel("A")
    mask = mask.convert("L")
    return ImageChops.invert(mask) if asked.inpainting_mask_invert else mask


def _blur(asked: ImageToImage) -> int:
    if asked.mask_blur is not None:
        return asked.mask_blur
    if asked.mask_blur_x != asked.mask_blur_y:
        raise InvalidRequest("mask_blur_y", asked.mask_blur_y, "must be mask_blur_x here")
    return _or(asked.mask_blur_x, 4)


def _filled(image: Image.Image, mask: Image.Image, asked: ImageToImage) -> Image.Image:
    """What the repainted part starts from, as `inpainting_fill` says."""
    fill, strength = _or(asked.inpainting_fill, 0), _or(asked.denoising_strength, 0.75)
    if fill in (2, 3) and strength < 1:
        hint = "use 0 (the colours around) or 1 (the original), or denoising_strength 1"
        raise InvalidRequest("inpainting_fill", fill, hint)
    return around(image, mask) if fill == 0 else image


def around(image: Image.Image, mask: Image.Image) -> Image.Image:
    """An RGB picture whose masked part (white) is filled with the colours around it, the nearer the
    more."""
    kept = mask.point(lambda value: 0 if value >= 128 else 255)
    if kept.getbbox() is None:
        return image
    layer = image.copy()
    layer.putalpha(kept)
    layer = layer.convert("RGBa")  # so that what is masked has no colour to blur
    mean = tuple(round(value) for value in ImageStat.Stat(image, kept).mean)
    filled = Image.new("RGBA", image.size, mean)
    for radius in (64, 16, 4):
        blurred = layer.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        filled = Image.alpha_composite(filled, blurred)
    return Image.composite(image, filled.convert("RGB"), kept)


def _only_masked(asked: ImageToImage) -> bool:
    """Whether only the part around the mask is drawn, at the size asked for."""
    return bool(_or(asked.inpaint_full_res, True))


def _resized(
    image: Image.Image, mask: Image.Image | None, asked: ImageToImage
) -> tuple[Image.Image, Image.Image | None]:
    """Picture and mask at the size asked for: stretched (0) or covering it (1)."""
    size = (_or(asked.width, 512), _or(asked.height, 512))
    if image.size == size or (mask is not None and _only_masked(asked)):
        return image, mask
    mode = _or(asked.resize_mode, 0)
    if mode not in (0, 1):
        raise InvalidRequest("resize_mode", mode, "0 (stretch) and 1 (crop) work here")
    lanczos, nearest = Image.Resampling.LANCZOS, Image.Resampling.NEAREST
    if mode == 0:
        return image.resize(size, lanczos), None if mask is None else mask.resize(size, nearest)
    return ImageOps.fit(image, size, lanczos), None if mask is None else ImageOps.fit(
        mask, size, nearest
    )


def _info(
    service: Service, state: JobState, asked: TextToImage, pictures: list[tuple[int, bytes]]
) -> dict[str, Any]:
    """The `info` of an answer, as the original tells it."""
    request = state.job.request
    seeds, first = [seed for seed, _ in pictures], state.job.seeds[0]
    negative = asked.negative_prompt or ""
    texts = []
    for _, data in pictures:
        with Image.open(io.BytesIO(data)) as image:
            texts.append(metadata.text_of(image) or "")
    told = metadata.parse_infotext(texts[0]).fields if texts else {}
    found = service.settings.models().get(state.job.model)
    return {
        "prompt": asked.prompt,
        "all_prompts": [asked.prompt] * len(seeds),
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * len(seeds),
        "seed": first,
        "all_seeds": seeds,
        "subseed": first,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": request["width"],
        "height": request["height"],
        "sampler_name": schedulers.parse(request["scheduler"]).entry.label,
        "cfg_scale": request["guidance_scale"],
        "steps": request["num_inference_steps"],
        "batch_size": _or(asked.batch_size, 1),
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": state.job.model,
        "sd_model_hash": told.get("Model hash"),
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": request.get("strength"),
        "extra_generation_params": {name: told[name] for name in EXTRA if name in told},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(state.job.created)),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": found is not None and found.sees_mask,
        "version": f"latentgen {__version__}",
    }


@router.get("/progress")
async def progress(
    service: TheService, skip_current_image: Annotated[bool, Query()] = False
) -> Progress:
    """How far the oldest running job is."""
    running = service.live.running
    now = next(iter(running.values()), None)
    if now is None:
        return Progress()
    state = State(
        job="scripts_txt2img",
        job_count=len(running),
        job_timestamp=time.strftime("%Y%m%d%H%M%S"),
        sampling_step=now.index,
        sampling_steps=now.total,
    )
    current = None
    if now.previews and not skip_current_image:
        current = base64.b64encode(now.previews[-1]).decode()
    return Progress(
        progress=min(1.0, 0.01 + now.fraction),
        eta_relative=_or(now.seconds_left, 0.0),
        state=state,
        current_image=current,
    )


@router.post("/interrupt")
async def interrupt(service: TheService) -> dict[str, str]:
    """Cancel what is being drawn; the answer is empty."""
    for id in list(service.live.running):
        await service.live.cancel(id)
    return {}


@router.post("/skip", responses=NOTHING)
async def skip(service: TheService) -> None:
    """The same: a request has one batch here."""
    await interrupt(service)


@router.get("/samplers")
def samplers() -> list[Sampler]:
    """The schedulers, by the WebUI's names."""
    return [Sampler(name=entry.label, aliases=[name]) for name, entry in schedulers.NAMES.items()]


@router.get("/schedulers")
def schedule_types() -> list[ScheduleType]:
    """How noise levels may be spread; not every sampler takes every one."""
    return [
        ScheduleType(
            name=label.lower().replace(" ", "_"),
            label=label,
            default_rho=7.0 if label == "Karras" else -1.0,
        )
        for label in SCHEDULE_TYPES
    ]


@router.get("/sd-models")
def sd_models(service: TheService) -> list[ModelTold]:
    """The models there are, with the hashes of those that were drawn with."""
    return [
        ModelTold(
            title=_title(service, found),
            model_name=found.name,
            hash=service.live.hash_of(found),
            filename=found.name,  # where it lies is the server's own business
        )
        for found in service.settings.models().values()
    ]


@router.get("/loras")
def loras() -> list[LoraTold]:
    """The LoRAs in the data folder."""
    return [
        LoraTold(name=name, alias=name, path=file.name)
        for name, file in lorafolder.names_there().items()
    ]


@router.get("/embeddings")
def embeddings(service: TheService) -> Embeddings:
    """The textual inversions in the data folder, by the words that prompts say; `skipped`: files
    that hold none."""
    told = Embeddings()
    for file in sorted(service.settings.embeddings.glob("*.safetensors")):
        try:
            tensors = [*read_header(file, "path", "embedding").items()]
        except InvalidRequest:
            tensors = []
        match tensors:
            case [(word, (*count, width))] if len(count) < 2:
                name = file.stem if word in ("emb_params", "*") else word
                told.loaded[name] = Embedding(shape=width, vectors=count[0] if count else 1)
            case _:
                told.skipped[file.stem] = Embedding()
    return told


@router.get("/options")
def options_now(service: TheService) -> Options:
    """The options that mean something here."""
    found = next(iter(service.settings.models().values()))
    return Options(
        sd_model_checkpoint=_title(service, found),
        sd_checkpoint_hash=service.live.hash_of(found),
    )


@router.post("/options", responses=NOTHING)
def set_options(options: dict[str, Any], service: TheService) -> None:
    """The server's settings are its operator's: only what is so already may be set."""
    now = options_now(service).model_dump()
    for name, value in options.items():
        if name == "sd_model_checkpoint":
            value = _title(service, _named_model(service, value))
        if _asks_for_nothing(name, value) or (name in now and now[name] == value):
            continue
        hint = f"of the settings, these can be chosen: {sorted(SETTINGS)}"
        if name in SETTINGS:
            hint = "not changed for everybody; a request may say it in override_settings"
        raise InvalidRequest(name, value, hint)


@router.post("/png-info", response_model=PictureTold)
def png_info(asked: PictureInfo, service: TheService) -> Response:
    """What a picture tells of itself."""
    try:
        image = decode_picture(asked.image, "image", service.settings)
    except InvalidRequest as error:  # told as it is: not one of the fields in NAMES
        raise HTTPException(400, str(error)) from error
    text = metadata.text_of(image)
    if text is None:
        return _json({"info": "", "items": {}, "parameters": {}})
    found = metadata.parse_infotext(text)
    told = {"Prompt": found.prompt, "Negative prompt": found.negative_prompt, **found.fields}
    if size := told.pop("Size", None):
        told["Size-1"], _, told["Size-2"] = size.partition("x")
    return _json({"info": text, "items": {}, "parameters": told})


@router.get("/scripts")
def scripts() -> dict[str, list[str]]:
    """Those that requests may name."""
    return {"txt2img": ["controlnet"], "img2img": ["controlnet"]}


@router.get("/upscalers")
def upscalers() -> list[dict[str, str]]:
    """There are none; clients ask."""
    return []


@router.get("/latent-upscale-modes")
def latent_upscale_modes() -> list[dict[str, str]]:
    """There are none; clients ask."""
    return []


@router.get("/sd-vae")
def sd_vae() -> list[dict[str, str]]:
    """Each model has its own; clients ask."""
    return []


def _title(service: Service, found: Model) -> str:
    known = service.live.hash_of(found)
    return f"{found.name} [{known}]" if known is not None else found.name


def _named_model(service: Service, name: Any) -> Model:
    """A model by its name, title or hash; None: the default."""
    models = service.settings.models()
    if name is None:
        return next(iter(models.values()))
    for found in models.values():
        if name in (found.name, f"{found.name}.safetensors"):
            return found
    title, _, told = str(name).removesuffix("]").rpartition(" [")
    for found in models.values():  # whole files are read for what may be a hash only
        if title in ("", found.name) and HASH.fullmatch(told) and found.hash() == told:
            return found
    raise InvalidRequest("sd_model_checkpoint", name, f"one of {', '.join(models)}")
