"""OpenAI's images API, as its own Python client speaks it: `/v1/images/…` and `/v1/models`.

What a field of theirs means here:

    n, size             num_images; WIDTHxHEIGHT or "auto": the model's own size, or the picture's,
                        if need be a little smaller, so that the model can draw it
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

import asyncio
import base64
import io
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from PIL import Image, ImageChops
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile

from .. import metadata
from ..errors import InvalidRequest
from .drawing import LAST_SEED, MAX_PROMPT, Drawing, Job, LoraChoice, checked, open_picture, size_of
from .native import TheService, pictures_of
from .service import Leaving, Service, Sketch

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["OpenAI"])
log = logging.getLogger(__name__)

PING = 15.0  # seconds after which a stream says something, so that nobody takes it for dead
AT_ONCE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy keeps events back
QUALITY = {"low": 0.5, "high": 2.0, "hd": 2.0}  # of the model's steps
NAMES = {  # of our fields, in this API
    "num_inference_steps": "steps",
    "num_images": "n",
    "width": "size",
    "height": "size",
    "mask_image": "mask",
    "quality": "output_compression",
}


# besides an answer in one piece, a stream of events, told as FastAPI tells those of /jobs
EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["event", "data"],
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"itemSchema": EVENT}}}
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
    seed: int | None = Field(None, ge=0, le=LAST_SEED)
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


class Picture(BaseModel):
    """One of `b64_json` and `url`."""

    b64_json: str | None = None
    url: str | None = None


class Usage(BaseModel):
    total_tokens: int
    input_tokens: int
    output_tokens: int
    input_tokens_details: dict[str, int]


class Answer(BaseModel):
    """The answer of all three endpoints."""

    created: int
    data: list[Picture]
    size: str
    quality: str
    background: str
    output_format: str
    usage: Usage


class ModelView(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "latentgen"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelView]


def _form(kind: type[BaseModel], files: set[str]) -> dict[str, Any]:
    """What the OpenAPI document says of a form: the fields, the image, and files that may come
    along. A form has no null: what is not given is left out."""
    fields = kind.model_json_schema()
    properties: dict[str, Any] = {}
    for name, field in fields["properties"].items():
        kinds = [one for one in field.get("anyOf", [field]) if one.get("type") != "null"]
        if kinds:
            properties[name] = kinds[0]
    properties["loras"] = {"type": "string", "description": "JSON"}
    texts = {"type": "array", "items": {"type": "string"}}
    properties |= {f"loras[][{name}]": texts for name in LoraChoice.model_fields}
    file = {"type": "string", "format": "binary"}
    properties |= dict.fromkeys(("image", *sorted(files)), file)
    properties["image[]"] = file | {
        "description": "in place of `image`: a list of one, as the client sends it"
    }
    schema = {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "required": [*fields.get("required", []), "image"],
    }
    content = {"multipart/form-data": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/images/generations", response_model=Answer, responses=STREAM)
async def generations(asked: Generation, request: Request, service: TheService) -> Response:
    """Draw pictures from text."""
    job = await service.submit(lambda: (_drawing(asked, service), {}))
    return await _answer(service, request, asked, "image_generation", job)


@router.post(
    "/images/edits",
    response_model=Answer,
    responses=STREAM,
    openapi_extra=_form(Edit, {"mask"}),
)
async def edits(request: Request, service: TheService) -> Response:
    """Repaint what is transparent in the mask or the image; without any, redraw the image."""
    async with request.form(max_files=20, max_fields=100) as form:
        files = await _files(form, {"image", "mask"})
        asked = _fields(form, Edit)
    job = await service.submit(_edit, asked, files, service)
    return await _answer(service, request, asked, "image_edit", job)


@router.post("/images/variations", response_model=Answer, openapi_extra=_form(Variation, set()))
async def variations(request: Request, service: TheService) -> Response:
    """Redraw a picture, by the prompt that its metadata tells or by `prompt`, a field of ours."""
    async with request.form(max_files=2, max_fields=100) as form:
        files = await _files(form, {"image"})
        asked = _fields(form, Variation)
    job = await service.submit(_variation, asked, files, service)
    wanted = Edit(prompt="", **asked.model_dump(exclude={"prompt"}))
    return await _answer(service, request, wanted, "image_edit", job)


@router.get("/models")
def models(service: TheService) -> ModelList:
    """The models there are."""
    return ModelList(data=[ModelView(id=name) for name in service.settings.models()])


@router.get("/models/{id:path}")
def model(id: str, service: TheService) -> ModelView:
    """One of them."""
    if id not in service.settings.models():
        raise HTTPException(404, f"there is no model {id[:200]!r}")
    return ModelView(id=id)


def _edit(asked: Edit, files: dict[str, bytes], service: Service) -> Sketch:
    image = open_picture(files["image"], "image", service.settings)
    mask = None
    if "mask" in files:
        mask = open_picture(files["mask"], "mask", service.settings)
        if mask.size != image.size:
            size = f"{mask.width} x {mask.height}"
            hint = f"must have the size of the image, {image.width} x {image.height}"
            raise InvalidRequest("mask", size, hint)
    repaint = _transparent(mask if mask is not None else image)
    if mask is not None and repaint is None:
        raise InvalidRequest("mask", "a picture", "nothing in it is transparent, to be repainted")
    pictures = {"image": image} if repaint is None else {"image": image, "mask_image": repaint}
    return _drawing(asked, service, image), pictures


def _variation(asked: Variation, files: dict[str, bytes], service: Service) -> Sketch:
    image = open_picture(files["image"], "image", service.settings)
    prompt = asked.prompt if asked.prompt is not None else _prompt_of(image)
    if not prompt:
        hint = "the picture does not tell its prompt; send one (with the client: extra_body)"
        raise InvalidRequest("prompt", None, hint)
    wanted = checked(Edit, asked.model_dump(exclude={"prompt"}) | {"prompt": prompt})
    return _drawing(wanted, service, image), {"image": image}


async def _answer(
    service: Service, request: Request, asked: Generation, kind: str, job: Job
) -> Response:
    """Wait for a job and answer in one piece, or in events."""
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
        events = _events(service, job, kind, facts)
        return EventSourceResponse(events, headers=AT_ONCE)
    state = await service.finished(job, request)
    if state.status == "failed":
        raise HTTPException(500, state.error or "the job failed")
    if state.status == "cancelled":
        raise HTTPException(400, "the job was cancelled")

    def told() -> Response:
        if asked.response_format == "b64_json":
            data = [{"b64_json": _encoded(file)} for _, file in pictures_of(service, state)]
        else:
            files = service.pictures(state)
            urls = (request.url_for("get_image", day=f.parent.name, name=f.name) for f in files)
            data = [{"url": str(url)} for url in urls]
        body = {"created": int(job.created), "data": data, **facts, "usage": _usage()}
        return JSONResponse(body)

    return await asyncio.to_thread(told)


async def _events(
    service: Service, job: Job, kind: str, facts: dict[str, Any]
) -> AsyncIterator[bytes]:
    """The stream: partial images, then each picture. The client takes no `id:` and no `retry:`."""
    created = {"created_at": int(job.created), **facts}
    shown, ended, said = 0, False, time.monotonic()
    try:
        async for state in service.live.follow(job.id):
            ended = state.ended is not None
            if service.leaving and not ended:
                yield _failed(str(Leaving(job.id)))
                return
            progress = service.live.running.get(job.id)
            for png in progress.previews[shown:] if progress is not None and not ended else ():
                preview = await asyncio.to_thread(_recoded, png, job)
                told = {"partial_image_index": shown, **created}
                yield await asyncio.to_thread(_event, f"{kind}.partial_image", told, preview)
                shown, said = shown + 1, time.monotonic()
            if not ended and time.monotonic() - said > PING:
                said = time.monotonic()
                yield b": waiting\n\n"  # a comment, which clients pass over
            if state.status == "done":
                for _, picture in await asyncio.to_thread(pictures_of, service, state):
                    told = {"usage": _usage(), **created}
                    yield await asyncio.to_thread(_event, f"{kind}.completed", told, picture)
            elif ended:
                yield _failed(service.settings.told(state.error or "the job was cancelled"))
    finally:
        if not ended:  # the client hung up
            await service.abandon(job.id)


def _failed(message: str) -> bytes:
    error = {"message": message, "type": "server_error", "param": None, "code": None}
    return _event("error", {"error": error})


def _event(kind: str, facts: dict[str, Any], picture: bytes | None = None) -> bytes:
    told = {} if picture is None else {"b64_json": _encoded(picture)}
    return format_sse_event(event=kind, data_str=json.dumps({"type": kind, **told, **facts}))


def _encoded(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def _recoded(png: bytes, job: Job) -> bytes:
    """A preview in the format that was asked for."""
    if job.output_format == "png":
        return png
    stream = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.save(stream, job.output_format.upper(), quality=job.quality)
    return stream.getvalue()


def _drawing(asked: Generation, service: Service, image: Image.Image | None = None) -> Drawing:
    """The request in our own words."""
    partial = asked.partial_images or 0
    if partial and not asked.stream:
        raise InvalidRequest("partial_images", partial, "goes with stream")
    if asked.stream and asked.response_format == "url":
        raise InvalidRequest("response_format", "url", "a stream sends pictures as b64_json")
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
    models = service.settings.models()
    model = models.get(asked.model) if asked.model is not None else next(iter(models.values()))
    if image is not None and model is not None:
        fields = size_of(image, model) | fields
    if asked.output_compression is not None:
        fields["quality"] = max(1, asked.output_compression)
    if asked.quality in QUALITY and asked.steps is None and model is not None:
        steps = round(model.num_inference_steps * QUALITY[asked.quality])
        fields["num_inference_steps"] = max(1, min(steps, service.settings.max_steps))
    if "strength" in fields and image is None:
        raise InvalidRequest("strength", fields["strength"], "goes with an image")
    return checked(Drawing, fields)


async def _files(form: FormData, names: set[str]) -> dict[str, bytes]:
    """The files of a form, by name; `image[]` is `image`."""
    found: dict[str, bytes] = {}
    for key, value in form.multi_items():
        if isinstance(value, UploadFile):
            name = key.removesuffix("[]")
            if name not in names:
                raise InvalidRequest(key, "a file", f"files here are {sorted(names)}")
            if name in found:
                raise InvalidRequest(key, "several files", "one picture at a time is edited here")
            found[name] = await value.read()
    if "image" not in found:
        raise InvalidRequest("image", None, "send the picture as a file")
    return found


def _fields(form: FormData, kind: type[Any]) -> Any:
    """The text fields of a form. `loras` come as JSON, or in the client's way: each of them as
    `loras[][name]` and, behind it, its other fields."""
    values: dict[str, Any] = {}
    loras: list[dict[str, str]] = []
    for key, value in form.multi_items():
        if not isinstance(value, str):
            continue
        if part := re.fullmatch(r"loras\[\]\[(\w+)\]", key):
            if part[1] == "name" or not loras:
                loras.append({})
            target, name = loras[-1], part[1]
        else:
            target, name = values, key
        if name in target:
            raise InvalidRequest(key, value, "is in the form twice")
        target[name] = value
    if loras and "loras" in values:
        raise InvalidRequest("loras", values["loras"], "is in the form twice")
    if loras:
        values["loras"] = loras
    elif "loras" in values:
        try:
            values["loras"] = json.loads(values["loras"])
        except (ValueError, RecursionError):
            hint = 'no JSON; a list like [{"name": "style", "weight": 0.8}]'
            raise InvalidRequest("loras", values["loras"], hint) from None
    try:
        return kind.model_validate(values)
    except ValidationError as error:  # told as FastAPI tells those of JSON
        told = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise RequestValidationError(told) from error


def _prompt_of(image: Image.Image) -> str | None:
    """What a picture tells of its prompt; a text without parameters is a comment of any kind."""
    text = metadata.text_of(image)
    found = metadata.parse_infotext(text) if text is not None else None
    return found.prompt if found is not None and found.fields else None


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
