"""What the tensors of a LoRA file are called, and whether they make up layers.

All of it is told by the names and shapes in the file's header: nothing here imports torch or reads
weights. The layouts are those of `lora.py`, which reads the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from .errors import InvalidRequest
from .modelfolder import read_header

__all__ = ["check_header", "flatten_path", "place", "unflatten_path"]

_UNET_ROOTS = {
    *("conv_in", "conv_out", "time_embedding", "add_embedding", "class_embedding"),
    *("down_blocks", "mid_block", "up_blocks", "encoder_hid_proj"),
}
_TEXT_ROOTS = {"encoder", "embeddings", "text_projection"}
_ROLES = {
    **dict.fromkeys(("lora_A", "lora_down", "lora.down", "lora_linear_layer.down"), "down"),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up", "lora_linear_layer.up"), "up"),
    **dict.fromkeys(("lora_magnitude_vector", "dora_scale"), "magnitude"),
    "alpha": "alpha",
}
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:(unet|text_encoder)\.)?(.+)"
    rf"\.({'|'.join(map(re.escape, _ROLES))})(?:\.default)?(?:\.weight)?"
)
# The words of module paths that have an underscore of their own.
_WORDS = (
    *("add_embedding", "add_k_proj", "add_q_proj", "add_v_proj", "class_embedding", "cond_proj"),
    *("conv_in", "conv_out", "conv_shortcut", "down_blocks", "encoder_hid_proj", "linear_1"),
    *("linear_2", "mid_block", "out_proj", "position_embedding", "proj_in", "proj_out"),
    *("k_proj", "q_proj", "self_attn", "text_model", "text_projection", "time_emb_proj"),
    *("time_embedding", "to_add_out", "to_k", "to_out", "to_q", "to_v", "token_embedding"),
    *("transformer_blocks", "up_blocks", "v_proj"),
)
_WORD = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))}|[^_]+)(?:_|$)")
_SDXL = re.compile(r"lora_te2_|text_encoder_2\.|lora_unet_(input|middle|output)_block|.*label_emb")


def check_header(file: Path) -> None:
    """Refuse a file that holds no LoRA, or one whose layers are not whole.

    Raises:
        InvalidRequest: it is damaged or of another kind; lists what is wrong in it.
    """
    shapes = read_header(file, "loras", "LoRA")
    if not shapes:
        raise InvalidRequest("loras", str(file), "there is nothing in it")
    strange: list[str] = []
    layers: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        if found := place(key):
            part, path, role = found
            layers.setdefault((part, path), {})[role] = shape
        else:
            strange.append(key)
    for (part, path), roles in layers.items():
        if wrong := _wrong(roles):
            strange.append(f"{part}.{path} ({wrong})")
    if strange:
        listed = ", ".join(strange[:10]) + (", ..." if len(strange) > 10 else "")
        other = "it is one for SDXL: " if any(map(_SDXL.match, shapes)) else ""
        hint = f"{len(strange)} of its parts are not those of a Stable Diffusion 1 or 2 LoRA"
        raise InvalidRequest("loras", str(file), f"{other}{hint}: {listed}")


def place(key: str) -> tuple[str, str, str] | None:
    """Part, module path and role that a key stands for; None if it is not a LoRA's."""
    found = _KEY.fullmatch(_modern(key))
    if found is None:
        return None
    part, path, role = found.groups()
    if flat := re.fullmatch(r"lora_(unet|te1?)_(.+)", path):
        part = "unet" if flat[1] == "unet" else "text_encoder"
        path = unflatten_path(flat[2])
    path = path.removeprefix("text_model.")
    root = path.partition(".")[0]
    owner = "unet" if root in _UNET_ROOTS else "text_encoder" if root in _TEXT_ROOTS else None
    if owner is None or part not in (None, owner):
        return None
    return owner, path, _ROLES[role]


def flatten_path(path: str) -> str:
    """A module path as kohya writes it."""
    return path.replace(".", "_")


def unflatten_path(flat: str) -> str:
    """The module path that kohya wrote flat: `mid_block_resnets_0` is `mid_block.resnets.0`."""
    return ".".join(_WORD.findall(flat))


def _modern(key: str) -> str:
    """A key of diffusers before 2024 as it is spelt since."""
    key = key.replace(".processor.", ".")
    key = re.sub(r"\.self_attn\.to_(\w+)_lora\.", r".self_attn.\1_proj.lora.", key)
    key = key.replace(".to_out_lora.", ".to_out.0.lora.")
    return re.sub(r"\.to_([qkv])_lora\.", r".to_\1.lora.", key)


def _wrong(roles: Mapping[str, tuple[int, ...]]) -> str | None:
    """What keeps the tensors of a layer, by role, from working together."""
    for role, names in (("down", "lora_down or lora_A"), ("up", "lora_up or lora_B")):
        if role not in roles:
            return f"its {names} is missing"
    down, up = roles["down"], roles["up"]
    if {len(down), len(up)} - {2, 4} or math.prod(up[1:]) != down[0] or down[0] == 0:
        return f"{down} and {up} do not fit together"
    return "its alpha is not one number" if math.prod(roles.get("alpha", ())) != 1 else None
