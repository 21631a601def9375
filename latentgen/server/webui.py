"""The WebUI's API (AUTOMATIC1111's), as its clients speak it: `/sdapi/v1`.

Clients send some forty fields with every request, most of which ask for nothing. A field that has
no counterpart here is accepted at the values that ask for nothing (NEUTRAL) and refused by name at
any other. A pass at higher resolution, scripts, styles, variation seeds, face restoration, tiling
and refiners are such fields. Differences that are told rather than hidden:

- with `save_images` false, the job and its pictures are deleted once they are sent
- `eta` counts with DDIM and TCD; for other samplers 0 and 1 are accepted, as clients always send it
- `denoising_strength` without a picture, and the fields of masks without a mask, ask for nothing
- `inpainting_fill` 0 (the colours around) and 1 (the original) work; 2 and 3 (latent noise, latent
  nothing) are what `denoising_strength` 1 does anyway, and are refused below
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from PIL import Image, ImageChops, ImageFilter, ImageOps, ImageStat
from pydantic import BaseModel, ConfigDict, Field

from .. import __version__, lorafolder, metadata, schedulers
from ..errors import InvalidRequest
from ..images import load_image
from ..modelfolder import Model
from .drawing import MAX_PROMPT, Drawing, checked, decode_picture
from .jobs import JobState
from .native import TheService
from .service import Service
from .settings import Settings

__all__ = ["router"]

router = APIRouter(prefix="/sdapi/v1", tags=["WebUI"])

# Fields without a counterpart here, and the values at which they ask for nothing; null always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "styles": ([],),
    "subseed_strength": (0,),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
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
}
# Fields that say how something is done which is not done.
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
    "image_cfg_scale",
    "do_not_save_samples",  # the original overwrites both with save_images
    "do_not_save_grid",
    "force_task_id",
}
SETTINGS = {"sd_model_checkpoint", "samples_format"}  # what override_settings may name
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
}


class TextToImage(BaseModel):
    """`POST /sdapi/v1/txt2img`; more fields than these are accepted, see the module."""

    model_config = ConfigDict(extra="allow")

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
    denoising_strength: float | None = None
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool | None = True
    alwayson_scripts: dict[str, Any] | None = None
    send_images: bool = True
    save_images: bool = False


class ImageToImage(TextToImage):
    """`POST /sdapi/v1/img2img`."""

    init_images: list[str] | None = None
    resize_mode: int | None = Field(0, ge=0, le=3)
    denoising_strength: float | None = 0.75
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


@router.post("/txt2img")
async def txt2img(asked: TextToImage, request: Request, service: TheService) -> dict[str, Any]:
    """Draw pictures from text."""
    drawing = await service.aside(_drawing, asked, service)
    return await _answer(service, request, asked, drawing)


@router.post("/img2img")
async def img2img(asked: ImageToImage, request: Request, service: TheService) -> dict[str, Any]:
    """Redraw a picture, or with a mask the white part of it."""
    if not asked.init_images:
        raise HTTPException(404, "Init image not found")
    if len(asked.init_images) > 1:
        raise InvalidRequest("init_images", len(asked.init_images), "one picture at a time")
    drawing = await service.aside(_drawing, asked, service)
    image, mask = await service.aside(_pictures, asked, service.settings)
    more: dict[str, Any] = {"strength": asked.denoising_strength}
    if mask is not None:
        more["mask_blur"] = _blur(asked)
        if _only_masked(asked):
            more["padding_mask_crop"] = _or(asked.inpaint_full_res_padding, 0)
    wanted = drawing.model_copy(update=more)
    return await _answer(service, request, asked, wanted, image, mask)


async def _answer(
    service: Service,
    request: Request,
    asked: TextToImage,
    drawing: Drawing,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
) -> dict[str, Any]:
    job = await service.submit(drawing, image, mask)
    state = await service.finished(job, request)
    if state.status == "failed":
        raise HTTPException(500, state.error or "the job failed")
    pictures = service.pictures(state)  # of a job that was interrupted: none
    info = await asyncio.to_thread(_info, service, state, asked)
    images = [base64.b64encode(file.read_bytes()).decode() for file in pictures]
    echo = asked.model_dump()
    if isinstance(asked, ImageToImage) and not asked.include_init_images:
        echo |= {"init_images": None, "mask": None}
    if not asked.save_images:
        await service.delete(state)
    return {
        "images": images if asked.send_images else [],
        "parameters": echo,
        "info": json.dumps(info),
    }


def _drawing(asked: TextToImage, service: Service) -> Drawing:
    """The request in our own words; refuses what has none."""
    _refuse_the_rest(asked)
    override = asked.override_settings or {}
    for name in override.keys() - SETTINGS:
        hint = f"of the settings, these work: {sorted(SETTINGS)}"
        raise InvalidRequest(f"override_settings.{name}", override[name], hint)
    form = override.get("samples_format", "png")
    model = _named_model(service, override.get("sd_model_checkpoint"))
    if asked.override_settings_restore_afterwards is False:
        hint = "true: the settings of others stay as they are"
        raise InvalidRequest("override_settings_restore_afterwards", False, hint)
    name = asked.sampler_name or asked.sampler_index or "Euler"
    name = f"{name} {asked.scheduler or 'Automatic'}"  # the first may say it, too: they must agree
    eta = asked.eta if asked.eta is not None else 0.0
    if not schedulers.parse(name).entry.eta:
        if eta not in (0, 1):
            raise InvalidRequest("eta", eta, f"{name} takes none")
        eta = 0.0
    fields = {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt or None,
        "model": model.name,
        "num_inference_steps": _or(asked.steps, 50),
        "guidance_scale": _or(asked.cfg_scale, 7.0),
        "scheduler": name,
        "seed": None if asked.seed in (None, -1) else asked.seed,
        "num_images": _or(asked.batch_size, 1) * _or(asked.n_iter, 1),
        "width": _or(asked.width, 512),
        "height": _or(asked.height, 512),
        "eta": eta,
        "output_format": "jpeg" if form == "jpg" else form,
        "previews": 10,
    }
    return checked(Drawing, fields)


def _or(value: Any, default: Any) -> Any:
    """Their null is their default."""
    return value if value is not None else default


def _refuse_the_rest(asked: TextToImage) -> None:
    for name, value in (asked.model_extra or {}).items():
        if value is None or name in MOOT:
            continue
        if name not in NEUTRAL:
            raise InvalidRequest(name, value, "there is no such field here")
        if value not in NEUTRAL[name]:
            nothing = NEUTRAL[name][0]
            raise InvalidRequest(name, value, f"not done here; leave it out, or {nothing!r}")
    for name, script in (asked.alwayson_scripts or {}).items():
        arguments = script.get("args", []) if isinstance(script, dict) else script
        if arguments not in ([], [False]):
            raise InvalidRequest("alwayson_scripts", name, "there are no scripts here")


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
    width, height = _or(asked.width, 512), _or(asked.height, 512)
    if width * height > settings.max_pixels:
        hint = f"at most {settings.max_pixels} pixels in all"
        raise InvalidRequest("width", width, hint)
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


def _info(service: Service, state: JobState, asked: TextToImage) -> dict[str, Any]:
    """The `info` of an answer, as the original tells it."""
    request = state.job.request
    seeds, prompts = state.job.seeds, request["prompt"]
    negative = (request.get("negative_prompt") or [""])[0]
    texts = []
    for file in service.pictures(state):
        with Image.open(file) as image:
            texts.append(metadata.text_of(image) or "")
    found = service.settings.models()[state.job.model]
    batch = _or(asked.batch_size, 1)
    return {
        "prompt": prompts[0],
        "all_prompts": [prompts[0]] * len(seeds),
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * len(seeds),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": seeds[0],
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": request["width"],
        "height": request["height"],
        "sampler_name": schedulers.parse(request["scheduler"]).entry.label,
        "cfg_scale": request["guidance_scale"],
        "steps": request["num_inference_steps"],
        "batch_size": batch,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": found.name,
        "sd_model_hash": found.hash(),
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": request.get("strength"),
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(state.job.created)),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": found.sees_mask,
        "version": f"latentgen {__version__}",
    }


@router.get("/progress")
async def progress(
    service: TheService, skip_current_image: Annotated[bool, Query()] = False
) -> dict[str, Any]:
    """How far the oldest running job is."""
    running = service.live.running
    now = next(iter(running.values()), None)
    state = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "" if now is None else "scripts_txt2img",
        "job_count": len(running),
        "job_timestamp": time.strftime("%Y%m%d%H%M%S") if now is not None else "0",
        "job_no": 0,
        "sampling_step": 0 if now is None else now.index,
        "sampling_steps": 0 if now is None else now.total,
    }
    current = None
    if now is not None and now.previews and not skip_current_image:
        current = base64.b64encode(now.previews[-1]).decode()
    left = now.seconds_left if now is not None else 0.0
    return {
        "progress": 0.0 if now is None else min(1.0, 0.01 + now.fraction),
        "eta_relative": left if left is not None else 0.0,
        "state": state,
        "current_image": current,
        "textinfo": None,
    }


@router.post("/interrupt")
async def interrupt(service: TheService) -> dict[str, Any]:
    """Cancel what is being drawn."""
    for id in list(service.live.running):
        await service.live.cancel(id)
    return {}


@router.post("/skip")
async def skip(service: TheService) -> None:
    """The same: a request has one batch here."""
    await interrupt(service)


@router.get("/samplers")
def samplers() -> list[dict[str, Any]]:
    """The schedulers, by the WebUI's names."""
    return [
        {"name": entry.label, "aliases": [name], "options": {}}
        for name, entry in schedulers.NAMES.items()
    ]


@router.get("/schedulers")
def schedule_types() -> list[dict[str, Any]]:
    """How noise levels may be spread."""
    names = {"automatic": "Automatic", "uniform": "Uniform", "sgm_uniform": "SGM Uniform"}
    names |= {name: name.title() for name in schedulers.SPREADS}
    return [
        {
            "name": name,
            "label": label,
            "aliases": None,
            "default_rho": 7.0 if name == "karras" else -1.0,
            "need_inner_model": False,
        }
        for name, label in names.items()
    ]


@router.get("/sd-models")
def sd_models(service: TheService) -> list[dict[str, Any]]:
    """The models there are."""
    return [
        {
            "title": _title(found),
            "model_name": found.name,
            "hash": found.hash(),
            "sha256": None,
            "filename": found.name,  # where it lies is the server's own business
            "config": None,
        }
        for found in service.settings.models().values()
    ]


@router.get("/loras")
def loras() -> list[dict[str, Any]]:
    """The LoRAs in the data folder."""
    return [
        {"name": name, "alias": name, "path": file.name, "metadata": {}}
        for name, file in lorafolder.names_there().items()
    ]


@router.get("/embeddings")
def embeddings(service: TheService) -> dict[str, Any]:
    """The textual inversions in the data folder."""
    files = sorted(service.settings.embeddings.glob("*.safetensors"))
    about = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
    return {"loaded": {file.stem: about for file in files}, "skipped": {}}


@router.get("/options")
def options_now(service: TheService) -> dict[str, Any]:
    """The options that mean something here."""
    found = next(iter(service.settings.models().values()))
    return {
        "sd_model_checkpoint": _title(found),
        "sd_checkpoint_hash": found.hash(),
        "samples_format": "png",
    }


@router.post("/options")
def set_options(options: dict[str, Any], service: TheService) -> None:
    """The server's settings are its operator's: only what is so already may be set."""
    now = options_now(service)
    for name, value in options.items():
        if name == "sd_model_checkpoint":
            value = _title(_named_model(service, value))
        if name not in now or now[name] != value:
            hint = "not changed for everybody; a request may say it in override_settings"
            raise InvalidRequest(name, value, hint)


@router.post("/png-info")
def png_info(asked: PictureInfo, service: TheService) -> dict[str, Any]:
    """What a picture tells of itself."""
    image = decode_picture(asked.image, "image", service.settings)
    text = metadata.text_of(image)
    if text is None:
        return {"info": "", "items": {}, "parameters": {}}
    found = metadata.parse_infotext(text)
    told = {"Prompt": found.prompt, "Negative prompt": found.negative_prompt, **found.fields}
    if size := told.pop("Size", None):
        told["Size-1"], _, told["Size-2"] = size.partition("x")
    return {"info": text, "items": {}, "parameters": told}


@router.get("/scripts")
def scripts() -> dict[str, list[str]]:
    """There are none; clients ask."""
    return {"txt2img": [], "img2img": []}


@router.get("/upscalers")
def upscalers() -> list[dict[str, Any]]:
    """There are none; clients ask."""
    return []


@router.get("/sd-vae")
def sd_vae() -> list[dict[str, Any]]:
    """Each model has its own; clients ask."""
    return []


def _title(found: Model) -> str:
    return f"{found.name} [{found.hash()}]" if found.hash() is not None else found.name


def _named_model(service: Service, name: Any) -> Model:
    """A model by its name, title or hash; None: the default."""
    models = service.settings.models()
    if name is None:
        return next(iter(models.values()))
    for found in models.values():
        if name in (found.name, _title(found), found.hash(), f"{found.name}.safetensors"):
            return found
    raise InvalidRequest("sd_model_checkpoint", name, f"one of {', '.join(models)}")
