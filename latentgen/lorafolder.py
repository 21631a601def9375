"""Which LoRAs a request means: files, names, and the `<lora:name:0.8>` of prompts.

A name is that of a LoRA which `load_lora` loaded, or of a file `NAME.safetensors` in the folder
`loras` of latentgen's home. Names are compared with the files that are there, so none leads out of
the folder.

Nothing here imports torch or reads weights: `lora.py` reads the files, `adapters.py` applies them.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from .errors import InvalidRequest
from .home import home
from .lorakeys import check_header
from .modelfolder import CONVERT, PICKLES, file_sha256

__all__ = [
    "PARTS",
    "LoraUse",
    "checked",
    "files_of",
    "folder",
    "names_there",
    "parse",
    "resolve",
    "take_tags",
]

MAX_WEIGHT = 100.0
PARTS = ("unet", "text_encoder", "text_encoder_2")  # of a model; a LoRA has layers of some
_TAG = re.compile(r"<lora:([^<>]*)>")


@dataclass(frozen=True)
class LoraUse:
    """One LoRA in one request.

    Attributes:
        name: what prompts and metadata call it; a file's is its name without the ending
            (or its folder's, where that is `pytorch_lora_weights` or `adapter_model`).
        weight: how strongly to apply its U-Net part; 1 as trained, 0 not at all; -100 to 100.
        text_encoder_weight: the same for its text encoder part; None: the same as `weight`.
        path: its file, or its folder in the PEFT layout; None: to be found by its name.
        sha256: of what is at `path`; filled in when it is found.
        webui_hash: 12 digits by which the WebUI knows it, whatever its metadata; filled in too.
    """

    name: str
    weight: float = 1.0
    text_encoder_weight: float = None  # type: ignore[assignment]
    path: Path | None = None
    sha256: str | None = None
    webui_hash: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise InvalidRequest("loras", self.name, "a LoRA is called by a name or a file")
        if self.text_encoder_weight is None:
            object.__setattr__(self, "text_encoder_weight", self.weight)
        for field in ("weight", "text_encoder_weight"):
            object.__setattr__(self, field, _number(getattr(self, field), self.name))

    def weighing(self, other: LoraUse) -> LoraUse:
        """This LoRA with the weights of another."""
        unet, text_encoder = other.weight, other.text_encoder_weight
        return replace(self, weight=unet, text_encoder_weight=text_encoder)

    @property
    def tag(self) -> str:
        """As the WebUI writes it into prompts."""
        if self.weight == self.text_encoder_weight:
            return f"<lora:{self.name}:{self.weight:g}>"
        return f"<lora:{self.name}:{self.text_encoder_weight:g}:{self.weight:g}>"


def parse(asked: Any) -> LoraUse:
    """Understand one item of `loras`.

    Args:
        asked: a file or a name, as text or path, `FILE:0.8` or `FILE:TEXT_ENCODER:UNET`; or a pair
            or triple (file, weights) in the same order; or a `LoraUse`.

    Raises:
        InvalidRequest: no such file, not a LoRA's, or a weight that is not a number.
    """
    if isinstance(asked, LoraUse):
        return asked
    whole, weights = asked, []
    if isinstance(asked, list | tuple) and 1 <= len(asked) <= 3:
        asked, *weights = asked
    elif isinstance(asked, str) and not os.path.exists(asked):
        # A colon before a slash belongs to the path (C:\...).
        if found := re.fullmatch(r"(.+?)((?::[^:/\\]*)+)", asked):
            asked, weights = found[1], found[2].split(":")[1:]
        if len(weights) > 2:
            raise InvalidRequest("loras", whole, "write FILE:0.8 or FILE:TEXT_ENCODER:UNET")
    if not isinstance(asked, str | os.PathLike) or not str(asked):
        raise InvalidRequest("loras", asked, "a file or name, perhaps with weights: 'FILE:0.8'")
    numbers = [_number(weight, whole) for weight in weights]
    text_encoder, unet = (numbers[0], numbers[-1]) if numbers else (1.0, 1.0)
    path = Path(asked).expanduser()
    is_path = len(path.parts) > 1 or path.suffix.lower() in {".safetensors", *PICKLES}
    if not is_path and not os.path.isfile(path) and not files_of(path):
        return LoraUse(str(asked), unet, text_encoder)
    return LoraUse(_name_of(path), unet, text_encoder, checked(path))


def take_tags(prompts: Sequence[str]) -> tuple[tuple[str, ...], tuple[LoraUse, ...]]:
    """Take `<lora:name:te:unet>` out of prompts.

    Raises:
        InvalidRequest: a tag that is not understood or has no end, or prompts with different tags,
            which one call of the model cannot draw together.
    """
    for text in prompts:
        _, unfinished, rest = _TAG.sub("", text).partition("<lora:")
        if unfinished:
            hint = "its > is missing; write <lora:NAME:0.8>"
            raise InvalidRequest("prompt", f"{unfinished}{rest}", hint)
    found = {tuple(_from_tag(body) for body in _TAG.findall(text)) for text in prompts}
    if len(found) > 1:
        hint = "the prompts of one call need the same <lora:...>; make a call for each"
        raise InvalidRequest("prompt", list(prompts), hint)
    tags = found.pop() if found else ()
    if not tags:
        return tuple(prompts), ()
    return tuple(_TAG.sub("", text).strip() for text in prompts), tags


def resolve(
    asked: Sequence[LoraUse], loaded: Mapping[str, LoraUse], field: str = "loras"
) -> tuple[LoraUse, ...]:
    """All LoRAs of a drawing, each with its file: those loaded, as they were asked for, and more.

    Raises:
        InvalidRequest: a name that is found nowhere (lists those there are), or that means another
            file than the one that is loaded.
    """
    uses = dict(loaded)
    there: dict[str, Path] | None = None
    for use in asked:
        if use.path is None and use.name in loaded:
            own = loaded[use.name]
            use = own.weighing(use)
        elif use.path is None:
            there = names_there() if there is None else there
            if use.name not in there:
                names = ", ".join(sorted({*loaded, *there})) or "none"
                hint = f"no LoRA of that name; there are: {names} (in {folder()})"
                raise InvalidRequest(field, use.name, hint)
            try:
                use = replace(use, path=checked(there[use.name]))
            except InvalidRequest as error:
                raise InvalidRequest(field, use.name, error.hint) from error
        if use.sha256 is None and use.path is not None:
            sha256, webui_hash = _hashes(use.path)
            use = replace(use, sha256=sha256, webui_hash=webui_hash)
        if use.name in loaded and loaded[use.name].sha256 != use.sha256:
            hint = "another file of that name is loaded; load_lora one of them under another name"
            raise InvalidRequest(field, str(use.path), hint)
        uses[use.name] = use
    return tuple(uses.values())


def folder() -> Path:
    """Where LoRAs are found by name."""
    return home() / "loras"


def _name_of(path: Path) -> str:
    """What a LoRA is called: as its file, or as its folder where programs call all files alike."""
    if path.stem in ("pytorch_lora_weights", "adapter_model"):
        above = [one for one in path.resolve().parents if one.name not in PARTS]
        if above[0].name and above[0] != folder().resolve():
            return above[0].name
    return path.stem if path.suffix == ".safetensors" else path.name


def files_of(path: Path) -> list[Path]:
    """The files that a LoRA consists of: itself, or in the PEFT layout weights and settings."""
    names = ("adapter_model.safetensors", "adapter_config.json")
    if os.path.isfile(path):
        settings = path.with_name(names[1])
        return [path, settings] if path.name == names[0] and settings.is_file() else [path]
    found = [path / name for name in names]
    found += [path / part / name for part in PARTS for name in names]
    return [file for file in found if os.path.isfile(file)]


def _hashes(path: Path) -> tuple[str, str]:
    """Of everything at the path, and the WebUI's of its weights."""
    files = files_of(path)
    each = [file_sha256(file) for file in files]
    whole = each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()
    weights = next((file for file in files if file.suffix == ".safetensors"), files[0])
    tensors = _tensors_sha256(weights, weights.stat().st_mtime_ns)
    return whole, tensors[:12]


@cache
def _tensors_sha256(file: Path, mtime_ns: int) -> str:
    """SHA-256 of a safetensors file behind its header, as in `sshs_model_hash`."""
    with file.open("rb") as stream:
        stream.seek(int.from_bytes(stream.read(8), "little") + 8)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def names_there() -> dict[str, Path]:
    """The files in the folder of LoRAs, by name."""
    return {file.stem: file for file in sorted(folder().glob("*.safetensors"))}


def checked(path: Path) -> Path:
    """The path, if a LoRA may be there.

    Raises:
        InvalidRequest: nothing is there, or a pickle, or something else; see `check_header`.
    """
    if path.suffix.lower() in PICKLES:
        raise InvalidRequest("loras", str(path), CONVERT)
    if os.path.isdir(path):
        if not files_of(path):
            hint = "a folder without adapter_model.safetensors; name a .safetensors file in it"
            raise InvalidRequest("loras", str(path), hint)
    elif not os.path.isfile(path):
        raise InvalidRequest("loras", str(path), "no such file")
    elif path.suffix != ".safetensors":
        raise InvalidRequest("loras", str(path), "a LoRA must be a .safetensors file")
    for file in files_of(path):
        if file.suffix == ".safetensors":
            check_header(file)
    return path


def _from_tag(body: str) -> LoraUse:
    name, *weights = (part.strip() for part in body.split(":"))
    text_encoder, unet = (weights[0], weights[-1]) if weights else ("1", "1")
    try:
        if len(weights) > 2:
            raise InvalidRequest("prompt", body, "")
        return LoraUse(name, _number(unet, name), _number(text_encoder, name))
    except InvalidRequest:
        hint = "write <lora:NAME:0.8> or <lora:NAME:TEXT_ENCODER:UNET>"
        raise InvalidRequest("prompt", f"<lora:{body}>", hint) from None


def _number(value: Any, asked: Any) -> float:
    """A weight of the LoRA that was asked for in these words."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= MAX_WEIGHT:  # also catches NaN
        hint = f"its weight must be a number from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}, not {value!r}"
        raise InvalidRequest("loras", asked, hint)
    return number
