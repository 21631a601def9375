"""OpenAI's images API, as its own Python client speaks it: `/v1/images/…` and `/v1/models`.

What a field of theirs means here:

    n, size             num_images; WIDTHxHEIGHT or "auto", the model's own size
    quality             "low" half the model's steps, "high" and "hd" twice as many; `steps` says it
    response_format     "url" (the default; a picture on this server) or "b64_json"
    output_compression  the quality of JPEG and WebP
    stream              events; `partial_images` previews before the picture
    moderation          nothing is moderated, so "auto" and "low" are the same
    user                kept in the log
    background          "auto" and "opaque"

In edits, what is transparent in the mask (or, without a mask, in the image) is repainted; an image
without any is redrawn as a whole. `seed`, `steps`, `negative_prompt`, `guidance_scale`,
`scheduler`, `loras` and `strength` are ours; with the client, they go into `extra_body`. Any other
field is an error.
"""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from PIL import Image, ImageChops
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import FormData, UploadFile

from .. import metadata
from ..errors import InvalidRequest
from .drawing import MAX_PROMPT, Drawing, Job, LoraChoice, checked, open_picture
from .native import TheService
from .service import Service

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["OpenAI"])
log = logging.getLogger(__name__)

QUALITY = {"low": 0.5, "high": 2.0, "hd": 2.0}  # of the model's steps
NAMES = {  # of our fields, in this API
    "num_inference_steps": "steps",
    "num_images": "n",
    "width": "size",
    "height": "size",
    "mask_image": "mask",
    "quality": "output_compression",
}


# an answer in one piece, or a stream of events
EITHER: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}}
}


class Common(BaseModel):
    """The fields of all three endpoints. An explicit null means: not given."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, max_length=200)
    n: int | None = Field(None, ge=1, le=10)
    size: str | None = Field(None, pattern=r"^(auto|\d{1,5}x\d{1,5})$")
    response_format: Literal["url", "b64_json"] | None = None
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)
    seed: int | None = None
    steps: int | None = Field(None, ge=1)
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)
    guidance_scale: float | None = None
    scheduler: str | None = Field(None, max_length=100)
    loras: list[LoraChoice] | None = None


class Generation(Common):
    """`POST /v1/images/generations`."""

    prompt: str = Field(max_length=MAX_PROMPT)
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)


class Edit(Generation):
    """`POST /v1/images/edits`, without its files."""

    moderation: None = None
    strength: float | None = Field(None, ge=0, le=1)


class Variation(Common):
    """`POST /v1/images/variations`, without its file."""

    prompt: str | None = Field(None, max_length=MAX_PROMPT)
    strength: float | None = Field(None, ge=0, le=1)


def _form(kind: type[BaseModel], files: dict[str, bool]) -> dict[str, Any]:
    """What the OpenAPI document says of a form: fields, and files that must or may come along."""
    fields = kind.model_json_schema()
    properties = fields["properties"] | {"loras": {"type": "string", "description": "JSON"}}
    properties |= {name: {"type": "string", "format": "binary"} for name in files}
    needed = fields.get("required", []) + [name for name, must in files.items() if must]
    schema = {"type": "object", "properties": properties, "required": needed}
    content = {"multipart/form-data": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/images/generations", response_model=None, responses=EITHER)
async def generations(asked: Generation, request: Request, service: TheService) -> Response:
    """Draw pictures from text."""
    return await _answer(service, request, asked, "image_generation")


@router.post(
    "/images/edits",
    response_model=None,
    responses=EITHER,
    openapi_extra=_form(Edit, {"image": True, "mask": False}),
)
async def edits(request: Request, service: TheService) -> Response:
    """Repaint what is transparent in the mask or the image; without any, redraw the image."""
    async with request.form(max_files=20, max_fields=100) as form:
        files = await _files(form, {"image", "mask"}, service)
        asked = _fields(form, Edit)
    image, mask = files["image"], files.get("mask")
    if mask is not None and mask.size != image.size:
        size = f"{mask.width} x {mask.height}"
        hint = f"must have the size of the image, {image.width} x {image.height}"
        raise InvalidRequest("mask", size, hint)
    repaint = await service.aside(_transparent, mask if mask is not None else image)
    if mask is not None and repaint is None:
        raise InvalidRequest("mask", "a picture", "nothing in it is transparent, to be repainted")
    return await _answer(service, request, asked, "image_edit", image, repaint)


@router.post(
    "/images/variations",
    response_model=None,
    openapi_extra=_form(Variation, {"image": True}),
)
async def variations(request: Request, service: TheService) -> Response:
    """Redraw a picture, by the prompt that its metadata tells or by `prompt`, a field of ours."""
    async with request.form(max_files=2, max_fields=100) as form:
        files = await _files(form, {"image"}, service)
        asked = _fields(form, Variation)
    image = files["image"]
    prompt = asked.prompt
    if prompt is None:
        text = metadata.text_of(image)
        prompt = metadata.parse_infotext(text).prompt if text is not None else None
    if not prompt:
        hint = "the picture does not tell its prompt; send one (with the client: extra_body)"
        raise InvalidRequest("prompt", None, hint)
    wanted = checked(Edit, asked.model_dump(exclude={"prompt"}) | {"prompt": prompt})
    return await _answer(service, request, wanted, "image_edit", image)


@router.get("/models")
def models(service: TheService) -> dict[str, Any]:
    """The models there are."""
    listed = [_model(name) for name in service.settings.models()]
    return {"object": "list", "data": listed}


@router.get("/models/{id:path}")
def model(id: str, service: TheService) -> dict[str, Any]:
    """One of them."""
    if id not in service.settings.models():
        raise HTTPException(404, f"there is no model {id[:200]!r}")
    return _model(id)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "latentgen"}


async def _answer(
    service: Service,
    request: Request,
    asked: Generation,
    kind: str,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
) -> Response:
    """Draw it and answer in one piece, or in events."""
    partial = asked.partial_images or 0
    if partial and not asked.stream:
        raise InvalidRequest("partial_images", partial, "goes with stream")
    if asked.stream and asked.response_format == "url":
        raise InvalidRequest("response_format", "url", "a stream sends pictures as b64_json")
    drawing = await service.aside(_drawing, asked, service, image is not None)
    job = await service.submit(drawing, image, mask)
    for name in ("user", "safety_identifier"):
        if who := getattr(asked, name):
            log.info("job %s: %s %r", job.id, name, who)
    facts = {
        "size": f"{job.request['width']}x{job.request['height']}",
        "quality": asked.quality if asked.quality is not None else "auto",
        "background": "opaque",
        "output_format": job.output_format,
    }
    if asked.stream:
        return EventSourceResponse(_events(service, job, kind, facts))
    state = await service.finished(job, request)
    if state.status == "failed":
        raise HTTPException(500, state.error or "the job failed")
    if state.status == "cancelled":
        raise HTTPException(400, "the job was cancelled")
    data = []
    for file in service.pictures(state):
        if asked.response_format == "b64_json":
            data.append({"b64_json": base64.b64encode(file.read_bytes()).decode()})
        else:
            name = f"{file.parent.name}/{file.name}"
            data.append({"url": str(request.url_for("get_image", **_parts(name)))})
    body = {"created": int(job.created), "data": data, **facts, "usage": _usage()}
    return JSONResponse(body)


def _parts(name: str) -> dict[str, str]:
    day, _, file = name.partition("/")
    return {"day": day, "name": file}


async def _events(
    service: Service, job: Job, kind: str, facts: dict[str, Any]
) -> AsyncIterator[bytes]:
    """The stream: partial images, then each picture. The client takes no `id:` and no `retry:`."""
    created = {"created_at": int(job.created), **facts}
    shown, ended = 0, False
    try:
        async for state in service.live.follow(job.id):
            ended = state.ended is not None
            progress = service.live.running.get(job.id)
            for png in progress.previews[shown:] if progress is not None and not ended else ():
                told = {"b64_json": _recoded(png, job), "partial_image_index": shown}
                yield _event(f"{kind}.partial_image", {**told, **created})
                shown += 1
            if state.status == "done":
                for file in service.pictures(state):
                    picture = base64.b64encode(file.read_bytes()).decode()
                    told = {"b64_json": picture, "usage": _usage(), **created}
                    yield _event(f"{kind}.completed", told)
            elif ended:
                message = service.settings.told(state.error or "the job was cancelled")
                error = {"message": message, "type": "server_error", "param": None, "code": None}
                yield _event("error", {"error": error})
    finally:
        if not ended:  # the client hung up
            await service.abandon(job.id)


def _event(kind: str, facts: dict[str, Any]) -> bytes:
    return format_sse_event(event=kind, data_str=json.dumps({"type": kind, **facts}))


def _recoded(png: bytes, job: Job) -> str:
    """A preview in the format that was asked for."""
    if job.output_format == "png":
        return base64.b64encode(png).decode()
    stream = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.save(stream, job.output_format.upper(), quality=job.quality)
    return base64.b64encode(stream.getvalue()).decode()


def _drawing(asked: Generation, service: Service, from_picture: bool) -> Drawing:
    """The request in our own words."""
    fields: dict[str, Any] = {
        "prompt": asked.prompt,
        "model": asked.model,
        "num_images": asked.n if asked.n is not None else 1,
        "loras": asked.loras if asked.loras is not None else [],
        "output_format": asked.output_format if asked.output_format is not None else "png",
        "previews": asked.partial_images if asked.partial_images is not None else 0,
        "num_inference_steps": asked.steps,
    }
    for name in ("negative_prompt", "guidance_scale", "scheduler", "seed", "strength"):
        if (value := getattr(asked, name, None)) is not None:
            fields[name] = value
    if asked.size is not None and asked.size != "auto":
        width, _, height = asked.size.partition("x")
        fields |= {"width": int(width), "height": int(height)}
    if asked.output_compression is not None:
        if fields["output_format"] == "png" and asked.output_compression != 100:
            hint = "PNG loses nothing; it goes with jpeg and webp"
            raise InvalidRequest("output_compression", asked.output_compression, hint)
        fields["quality"] = max(1, asked.output_compression)
    if asked.quality in QUALITY and asked.steps is None:
        models = service.settings.models()
        found = models.get(asked.model) if asked.model is not None else next(iter(models.values()))
        if found is not None:
            fields["num_inference_steps"] = round(
                found.num_inference_steps * QUALITY[asked.quality]
            )
    if "strength" in fields and not from_picture:
        raise InvalidRequest("strength", fields["strength"], "goes with an image")
    return checked(Drawing, fields)


async def _files(form: FormData, names: set[str], service: Service) -> dict[str, Image.Image]:
    """The pictures of a form, by name; `image[]` is `image`."""
    found: dict[str, Image.Image] = {}
    for key, value in form.multi_items():
        if isinstance(value, UploadFile):
            name = key.removesuffix("[]")
            if name not in names:
                raise InvalidRequest(key, "a file", f"files here are {sorted(names)}")
            if name in found:
                raise InvalidRequest(key, "several files", "one picture at a time is edited here")
            data = await value.read()
            found[name] = await service.aside(open_picture, data, name, service.settings)
    if "image" not in found:
        raise InvalidRequest("image", None, "send the picture as a file")
    return found


def _fields(form: FormData, kind: type[Any]) -> Any:
    """The text fields of a form. Lists and objects come as JSON."""
    values: dict[str, Any] = {}
    for key, value in form.multi_items():
        if isinstance(value, str):
            values[key] = value
    if "loras" in values:
        try:
            values["loras"] = json.loads(values["loras"])
        except (ValueError, RecursionError):
            hint = 'no JSON; a list like [{"name": "style", "weight": 0.8}]'
            raise InvalidRequest("loras", values["loras"], hint) from None
    return checked(kind, values)


def _transparent(image: Image.Image) -> Image.Image | None:
    """White where a picture is transparent; None if it is nowhere."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    clear = ImageChops.invert(alpha).point(lambda value: 255 if value >= 128 else 0)
    return clear if clear.getbbox() is not None else None


def _usage() -> dict[str, Any]:
    """Nothing is counted here, so nothing is."""
    none = {"text_tokens": 0, "image_tokens": 0}
    return {
        "total_tokens": 0,
        "input_tokens": 0,
        "output_tokens": 0,
        "input_tokens_details": none,
    }
