"""What a picture says about itself, and how to read it back.

Every picture carries two texts: the WebUI's "infotext", which the tools of the field read, and a
JSON record of ours with all that is needed to make the picture again bit for bit.

    PNG               text chunks `parameters` and `latentgen`
    JPEG, WebP, AVIF  EXIF UserComment and MakerNote
    GIF               comment (the infotext alone)

The record holds fingerprints of an input picture and mask, never the pictures: what somebody
painted over must not travel inside the result. Of a LoRA or a ControlNet it holds name, weights
and a hash, and never where it was: a picture from elsewhere opens no files here.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, PngImagePlugin

from . import __version__, controlnet, lorafolder, schedulers
from .errors import InvalidRequest
from .images import load_image
from .lorafolder import LoraUse
from .outputs import write_file
from .request import OF_CONTROL, Request

if TYPE_CHECKING:
    from .pipeline import Result

__all__ = [
    "FORMATS",
    "Infotext",
    "Picture",
    "check_fits",
    "check_quality",
    "differences",
    "encode",
    "encode_result",
    "fingerprint",
    "infotext",
    "numbered",
    "parse_infotext",
    "picture_format",
    "read",
    "record",
    "recorded",
    "request_from_infotext",
    "request_from_record",
    "save_result",
    "text_of",
    "versions",
    "without_control",
]

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".avif": "AVIF"}
QUALITY = 95  # of the formats that lose detail

_EXIF, _MAKER_NOTE, _USER_COMMENT = 0x8769, 0x927C, 0x9286
_UNICODE = b"UNICODE\0"
_PICTURES = ("image", "mask_image", "control_image")
_OF_MASKS = ("mask_blur", "padding_mask_crop")
_NOT_RECORDED = {*_PICTURES, "output_type", "loras", "controlnet"}  # two in their own way
_LONGEST = 100_000  # characters of an infotext
# a name is bounded, else a long word is searched from each of its letters to its end
_PARAMETER = re.compile(r'(\w[\w \-/]{1,63}):[ \t]*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@dataclass(frozen=True)
class Infotext:
    """An infotext, taken apart: the prompt, the negative prompt, and the fields by name."""

    prompt: str
    negative_prompt: str
    fields: dict[str, str]


# Writing.


def save_result(result: Result, path: str | Path, quality: int | None = None) -> list[Path]:
    """Write all pictures of a result; see `Result.save`."""
    path = Path(path)
    if result.request.output_type != "pil":
        hint = "only results of output_type 'pil' can be saved"
        raise InvalidRequest("output_type", result.request.output_type, hint)
    format = picture_format(path)
    quality = quality if quality is not None else QUALITY
    if not isinstance(quality, int) or isinstance(quality, bool) or not 1 <= quality <= 100:
        raise InvalidRequest("quality", quality, "a whole number from 1 to 100")
    targets = numbered(path, len(result.images))
    for k, target in enumerate(targets):
        write_file(target, encode_result(result, k, format, quality))
    return targets


def numbered(path: Path, count: int) -> list[Path]:
    """Where `count` pictures go: the path itself, or apple-1.png, apple-2.png and so on."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{k + 1}{path.suffix}") for k in range(count)]


def check_fits(format: str, request: Request) -> None:
    """Refuse prompts that are too long for the metadata of a JPEG, before they are drawn."""
    texts = [*request.prompt, *(request.negative_prompt or ())]
    in_record = len(json.dumps(texts, ensure_ascii=False).encode())
    in_infotext = sum(len(text.encode("utf-16-be")) for text in texts)
    if format == "JPEG" and in_record + in_infotext > 60_000:
        raise InvalidRequest("output", "JPEG", "its metadata cannot hold such a prompt; PNG can")


def check_quality(format: str, quality: int) -> None:
    """Refuse a quality that a format has no use for."""
    if format == "PNG" and quality not in (QUALITY, 100):
        hint = "PNG loses nothing; it goes with the other formats"
        raise InvalidRequest("quality", quality, hint)


def picture_format(path: Path) -> str:
    """The format that a path's ending asks for.

    Raises:
        InvalidRequest: there is no such format.
    """
    format = FORMATS.get(path.suffix.lower())
    Image.init()
    if format is None or format not in Image.SAVE:
        able = ", ".join(ending for ending, name in FORMATS.items() if name in Image.SAVE)
        raise InvalidRequest("output", str(path), f"the name must end in one of {able}")
    return format


def encode_result(result: Result, k: int, format: str, quality: int = QUALITY) -> bytes:
    """Picture `k` of a result as a file with its metadata."""
    known = record(result, k, quality)
    return encode(result.images[k], format, infotext(result, k), known, quality)


def encode(
    image: Image.Image, format: str, text: str, record: dict[str, Any] | None, quality: int
) -> bytes:
    """A picture file with its metadata, as bytes."""
    packed = "" if record is None else json.dumps(record, ensure_ascii=False)
    options: dict[str, Any] = {}
    if format == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", text)
        if packed:
            info.add_itxt("latentgen", packed)
        options["pnginfo"] = info
    else:
        exif = Image.Exif()
        exif.endian = ">"
        exif[_EXIF] = {_USER_COMMENT: _UNICODE + text.encode("utf-16-be")}
        if packed:
            exif[_EXIF][_MAKER_NOTE] = packed.encode()
        options |= {"exif": exif, "quality": quality}
    stream = io.BytesIO()
    try:
        image.save(stream, format, **options)
    except ValueError as error:  # the EXIF of a JPEG holds 64 KiB
        hint = f"{format} cannot hold the metadata ({error}); PNG can"
        raise InvalidRequest("output", format, hint) from error
    return stream.getvalue()


def infotext(result: Result, k: int) -> str:
    """The WebUI's description of picture `k`."""
    request = result.request
    j = k // request.num_images
    lines = [" ".join([request.prompt[j], *(use.tag for use in request.loras)])]
    if request.negative_prompt and request.negative_prompt[j]:
        lines.append(f"Negative prompt: {request.negative_prompt[j]}")
    values: dict[str, Any] = {"Steps": request.num_inference_steps}
    if request.scheduler is not None:
        name = schedulers.parse(request.scheduler)
        values["Sampler"] = name.entry.label
        # Without a word, the WebUI would take its own "Automatic".
        default = "uniform" if name.entry.spread_by_default else None
        if spread := name.spread or name.spacing or default:
            values["Schedule type"] = {"trailing": "SGM Uniform"}.get(spread, spread.title())
    else:
        values["Sampler"] = result.model.scheduler_class
    values |= {
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": result.seeds[k],
        "Size": f"{request.width}x{request.height}",
        "Model hash": result.model.hash(),
        "Model": result.model.name,
        "Denoising strength": request.strength and f"{request.strength:g}",
        "Mask blur": request.mask_blur or None,
        "Inpaint area": None if request.padding_mask_crop is None else "Only masked",
        "Masked area padding": request.padding_mask_crop,
        "Lora hashes": ", ".join(f"{use.name}: {use.webui_hash}" for use in request.loras) or None,
        "TI hashes": result.settings.get("embeddings"),
        "ControlNet 0": _control_told(request),
        "RNG": "CPU",
        "Version": f"latentgen {__version__}",
    }
    told = [f"{key}: {_quoted(value)}" for key, value in values.items() if value is not None]
    return "\n".join([*lines, ", ".join(told)])


def _control_told(request: Request) -> str | None:
    """As the WebUI's extension writes it."""
    if (net := request.controlnet) is None:
        return None
    numbers = {
        "Weight": request.controlnet_conditioning_scale,
        "Guidance Start": request.control_guidance_start,
        "Guidance End": request.control_guidance_end,
    }
    told = [f"{name}: {value:g}" for name, value in numbers.items()]
    return ", ".join(["Module: none", f"Model: {net.name} [{net.hash()}]", *told])


def record(result: Result, k: int, quality: int = QUALITY) -> dict[str, Any]:
    """All that is needed to make picture `k` again, as JSON."""
    pictures = {name: getattr(result.request, name) for name in _PICTURES}
    model = result.model
    return {
        "index": k,
        "request": recorded(result.request),
        "pictures": {name: fingerprint(p) for name, p in pictures.items() if p is not None},
        "model": {
            "name": model.name,
            "hash": model.hash(),
            "hub_id": model.hub_id,
            "revision": model.revision,
        },
        "settings": result.settings,
        "quality": quality,
        "versions": versions(),
    }


def recorded(request: Request) -> dict[str, Any]:
    """The request as JSON, without its pictures; `request_from_record` reads it."""
    fields_told = {
        field.name: getattr(request, field.name)
        for field in fields(Request)
        if field.name not in _NOT_RECORDED
        and (request.controlnet is not None or field.name not in OF_CONTROL)
    }
    if request.controlnet is not None:
        own = {"name": request.controlnet.name, "hash": request.controlnet.hash()}
        fields_told["controlnet"] = own
    if loras := [_told(use) for use in request.loras]:
        fields_told["loras"] = loras
    return {key: value for key, value in fields_told.items() if value is not None}


def versions() -> dict[str, str]:
    """The versions that can change a picture's last bits."""
    return {
        "latentgen": __version__,
        **{name: version(name) for name in ("torch", "diffusers", "transformers", "pillow")},
    }


def fingerprint(image: Image.Image) -> str:
    """SHA-256 of a picture's pixels."""
    head = f"{image.mode} {image.width} {image.height} ".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()


# Reading.


@dataclass(frozen=True)
class Picture:
    """A picture file, read: its pixels, its format, and what it says of itself, if anything."""

    image: Image.Image
    format: str
    infotext: str | None
    record: dict[str, Any] | None


def read(path: str | Path) -> Picture:
    """Read a picture with its metadata.

    Raises:
        InvalidRequest: it cannot be read as a picture.
    """
    image = load_image(path, "picture")
    with Image.open(path) as file:
        file.load()  # a PNG may have its text behind the pixels
        format, text, known = file.format, text_of(file), _record_of(file)
    return Picture(image, format if format and format in FORMATS.values() else "PNG", text, known)


def text_of(image: Image.Image) -> str | None:
    """The infotext of a picture that Pillow opened."""
    exif = _exif_of(image)
    text = image.info.get("parameters")
    if text is None and _USER_COMMENT in exif:
        text = _user_comment(exif[_USER_COMMENT])
    if text is None and isinstance(image.info.get("comment"), bytes):
        text = image.info["comment"].decode("utf-8", "replace")
    return text


def _exif_of(image: Image.Image) -> dict[int, Any]:
    try:
        return image.getexif().get_ifd(_EXIF)
    except Exception:  # Pillow raises many kinds for EXIF that is broken
        return {}


def _record_of(image: Image.Image) -> dict[str, Any] | None:
    packed = image.info.get("latentgen") or _exif_of(image).get(_MAKER_NOTE)
    try:
        known = json.loads(packed) if packed else None
    except (ValueError, TypeError, RecursionError):  # a camera's own maker note
        known = None
    return known if _is_record(known) else None


def parse_infotext(text: str) -> Infotext:
    """Take an infotext apart.

    The last line holds parameters only if there are three or more of them. A text that is longer
    than any program writes says nothing.
    """
    if len(text) > _LONGEST:
        return Infotext("", "", {})
    *lines, last = text.strip().split("\n")
    found = _PARAMETER.findall(last)
    if len(found) < 3:
        lines, found = [*lines, last], []
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    for line in lines:
        if line.startswith("Negative prompt:"):
            target, line = negative, line.removeprefix("Negative prompt:").strip()
        target.append(line)
    known = {key: _unquoted(value.strip()) for key, value in found}
    return Infotext("\n".join(prompt).strip(), "\n".join(negative).strip(), known)


def request_from_record(
    known: dict[str, Any],
    loras: Sequence[str | Path] = (),
    control: str | Path | None = None,
    **pictures: Any,
) -> Request:
    """The request that a picture of ours was made from.

    Args:
        known: our record.
        loras: files of the LoRAs that it was made with; others are looked up by their names.
        control: the ControlNet that it was made with; None: looked up by its name.
        pictures: `image`, `mask_image` and `control_image`, where it was made from such.
    """
    names = {field.name for field in fields(Request)} - _NOT_RECORDED
    settings = {**known["request"]}
    uses = _recorded_loras(settings.pop("loras", []), loras)
    net = _recorded_control(settings.pop("controlnet", None), control)
    if strange := sorted(settings.keys() - names):
        raise InvalidRequest("picture", strange, "its record has fields that none of ours has")
    given = _given(pictures)
    for name in _PICTURES:
        if name in given and name not in known["pictures"]:
            raise InvalidRequest(
                name, given[name], "the picture was not made from one; leave it out"
            )
    return Request(**settings, loras=uses, controlnet=net, **given)


def without_control(known: dict[str, Any]) -> dict[str, Any]:
    """A record without its ControlNet, for those who draw without one."""
    names = {"controlnet", *OF_CONTROL}
    parts = {part: known[part].items() for part in ("request", "pictures")}
    return known | {
        part: {name: value for name, value in items if name not in names}
        for part, items in parts.items()
    }


def request_from_infotext(
    info: Infotext, loras: Sequence[str | Path] = (), **pictures: Any
) -> tuple[Request, list[str]]:
    """The nearest request to a WebUI picture, and what of it cannot be reproduced.

    Args:
        info: the infotext, taken apart.
        loras: files of the LoRAs that its prompt names; others are looked up by their names.
        pictures: `image` and `mask_image`, for a picture that was made from others.
    """
    left = dict(info.fields)
    prompt, uses, notes = _named_loras(info.prompt, left, loras)
    options: dict[str, Any] = {"prompt": prompt, "loras": uses}
    if info.negative_prompt:
        (options["negative_prompt"],), tags = lorafolder.take_tags([info.negative_prompt])
        notes += [f"{tag.tag} in its negative prompt, which is left out" for tag in tags]
    for name, (key, kind) in {
        "num_inference_steps": ("Steps", int),
        "guidance_scale": ("CFG scale", float),
        "seed": ("Seed", int),
        "strength": ("Denoising strength", float),
        "mask_blur": ("Mask blur", int),
        "padding_mask_crop": ("Masked area padding", int),
    }.items():
        if key in left:
            value = left.pop(key)
            try:
                options[name] = kind(value)
                if name not in ("strength", *_OF_MASKS):
                    Request(prompt="x", **{name: options[name]})
            except ValueError:  # also an InvalidRequest
                options.pop(name, None)
                notes.append(f"{key}: {value}")
        elif name in ("num_inference_steps", "guidance_scale", "seed"):
            notes.append(f"{key}, which it does not tell")
    if "strength" in options and pictures.get("image") is None:
        notes.append("it was made from another picture (give it with --image)")
        options.pop("strength")
    if pictures.get("mask_image") is None:
        for name in _OF_MASKS:
            options.pop(name, None)
    if size := re.fullmatch(r"(\d+)x(\d+)", left.pop("Size", "")):
        options |= {"width": int(size[1]), "height": int(size[2])}
    else:
        notes.append("Size, which it does not tell")
    if sampler := left.pop("Sampler", None):
        schedule = left.pop("Schedule type", "Automatic")
        for said in (schedule, "Automatic"):
            try:
                options["scheduler"] = str(schedulers.parse(f"{sampler} {said}"))
            except InvalidRequest:
                continue
            if said != schedule:
                notes.append(f"Schedule type: {schedule}, which {sampler} does not have here")
            break
        else:
            notes.append(f"the sampler {sampler!r} is not known here; the model's own is used")
    if left.pop("RNG", None) != "CPU":
        notes.append("its noise was drawn on a GPU, or by another program")
    for key in ("Model", "Model hash", "Version", "Inpaint area"):
        left.pop(key, None)
    if re.search(r"<|\[[^\]]*[:|]|\bAND\b", prompt):
        notes.append("<...>, [a:b:0.5], [a|b] and AND in its prompt are read as plain text")
    notes += [f"{key}: {value}" for key, value in left.items()]
    return Request(**options, **_given(pictures)), notes


def differences(known: dict[str, Any], result: Result) -> list[str]:
    """Why a picture made again from `known` may differ from the first one."""
    notes = []
    if known["model"].get("hash") != result.model.hash():
        then, now = known["model"].get("hash"), result.model.hash()
        notes.append(f"another model: {known['model'].get('name')} ({then}), now {now}")
    for name, now in versions().items():
        if (then := known["versions"].get(name)) != now:
            notes.append(f"{name} was {then}, is {now}")
    for name in known["settings"] | result.settings:
        then, now = known["settings"].get(name), result.settings.get(name)
        if then != now:
            notes.append(f"{name} was {then}, is {now}")
    before = {lora.get("name"): lora for lora in known["request"].get("loras", [])}
    for use in result.request.loras:
        if before.get(use.name) != _told(use):
            notes.append(f"the LoRA {use.name} is not the one that it was made with")
    net = result.request.controlnet
    if net is not None and known["request"]["controlnet"].get("hash") != net.hash():
        notes.append(f"the ControlNet {net.name} is not the one that it was made with")
    for name, then in known["pictures"].items():
        if fingerprint(getattr(result.request, name)) != then:
            notes.append(f"{name} is not the picture that it was made from")
    return notes


def _told(use: LoraUse) -> dict[str, Any]:
    """What the record says of a LoRA."""
    names = ("name", "weight", "text_encoder_weight", "sha256")
    return {name: getattr(use, name) for name in names}


def _recorded_loras(told: Any, files: Sequence[str | Path]) -> list[LoraUse]:
    """The LoRAs of a record, each with its file if it is among `files`."""
    given = lorafolder.resolve([lorafolder.parse([file]) for file in files], {}, "lora")
    by_hash = {use.sha256: use for use in given}
    by_name = {use.name: use for use in given}
    uses = []
    try:
        for lora in told:
            own = by_hash.get(lora["sha256"]) or by_name.get(lora["name"])
            use = LoraUse(lora["name"], lora["weight"], lora["text_encoder_weight"])
            uses.append(use if own is None else replace(own, name=use.name).weighing(use))
    except (TypeError, KeyError, AttributeError) as error:
        raise InvalidRequest("picture", told, "its record is damaged") from error
    return uses


def _recorded_control(told: Any, given: str | Path | None) -> str | Path | None:
    """The ControlNet of a record: what was given in its place, or the one here of that name."""
    if told is None:
        if given is not None:
            hint = "the picture was not made with one; leave it out"
            raise InvalidRequest("controlnet", str(given), hint)
        return None
    if not isinstance(told, dict) or not isinstance(told.get("name"), str):
        raise InvalidRequest("picture", told, "its record is damaged")
    if given is not None:
        return given
    if told["name"] not in controlnet.names_there():
        hint = "it was made with this ControlNet, which is not here; name it: --controlnet FOLDER"
        raise InvalidRequest("controlnet", told["name"], hint)
    return told["name"]


def _named_loras(
    text: str, left: dict[str, str], files: Sequence[str | Path]
) -> tuple[str, list[LoraUse], list[str]]:
    """The prompt without its LoRAs, those of them that are here, and notes about the others."""
    (prompt,), tags = lorafolder.take_tags([text])
    told = {}
    if tags:
        pairs = (pair.partition(":") for pair in left.pop("Lora hashes", "").split(","))
        told = {name.strip(): digits.strip() for name, _, digits in pairs}
    given = lorafolder.resolve([lorafolder.parse([file]) for file in files], {}, "lora")
    loaded = {use.name: use for use in given}
    here = loaded.keys() | lorafolder.names_there().keys()
    notes = [f"the LoRA {tag.name}, which is not here" for tag in tags if tag.name not in here]
    found = lorafolder.resolve([tag for tag in tags if tag.name in here], loaded)
    uses = [use for use in found if use.name in {tag.name for tag in tags}]
    for use in uses:
        if told.get(use.name, use.webui_hash) != use.webui_hash:
            notes.append(f"the LoRA {use.name} is not the one that it was made with")
    return prompt, uses, notes


def _given(pictures: dict[str, Any]) -> dict[str, Any]:
    return {name: picture for name, picture in pictures.items() if picture is not None}


def _is_record(known: Any) -> bool:
    """Has it the parts of a record of ours? Anybody can write anything into a picture."""
    parts: dict[str, type] = dict.fromkeys(
        ("request", "pictures", "model", "settings", "versions"), dict
    )
    parts |= {"index": int, "quality": int}
    return (
        isinstance(known, dict)
        and all(isinstance(known.get(name), kind) for name, kind in parts.items())
        and set(known["pictures"]) <= set(_PICTURES)
    )


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def _unquoted(text: str) -> str:
    if text.startswith('"') and text.endswith('"'):
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text


def _user_comment(value: bytes | str | Sequence[int]) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):  # numbers, if they are bytes too; one alone is no text
        numbers = value if isinstance(value, tuple) else ()
        value = bytes(n for n in numbers if isinstance(n, int) and 0 <= n < 256)
    if not value.startswith(_UNICODE):
        return value[8:].decode("utf-8", "replace").strip("\0")
    body = value.removeprefix(_UNICODE)
    orders = [body.decode(order, "replace") for order in ("utf-16-be", "utf-16-le")]
    return max(orders, key=lambda text: sum(letter.isascii() for letter in text))
