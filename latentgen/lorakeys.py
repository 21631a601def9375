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
    r"(?:base_model\.model\.)?(?:(unet|text_encoder(?:_2)?)\.)?(.+)"
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
_KOHYAS_PARTS = {
    "unet": "unet",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
}
# The names of the original repositories, in which kohya writes the U-Net of SDXL.
_ORIGINAL = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
}
_ORIGINAL_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}


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
        hint = f"{len(strange)} of its parts are not those of a Stable Diffusion LoRA"
        raise InvalidRequest("loras", str(file), f"{hint}: {listed}")


def place(key: str) -> tuple[str, str, str] | None:
    """Part, module path and role that a key stands for; None if it is not a LoRA's."""
    found = _KEY.fullmatch(_modern(key))
    if found is None:
        return None
    part, path, role = found.groups()
    if flat := re.fullmatch(r"lora_(unet|te[12]?)_(.+)", path):
        part = _KOHYAS_PARTS[flat[1]]
        path = unflatten_path(_modern_flat(flat[2]) if part == "unet" else flat[2])
    path = path.removeprefix("text_model.")
    root = path.partition(".")[0]
    encoders = ("text_encoder", "text_encoder_2") if root in _TEXT_ROOTS else ()
    owners = ("unet",) if root in _UNET_ROOTS else encoders
    if not owners or part not in (None, *owners):
        return None
    return part if part is not None else owners[0], path, _ROLES[role]


def flatten_path(path: str) -> str:
    """A module path as kohya writes it."""
    return path.replace(".", "_")


def unflatten_path(flat: str) -> str:
    """The module path that kohya wrote flat: `mid_block_resnets_0` is `mid_block.resnets.0`."""
    return ".".join(_WORD.findall(flat))


def _modern_flat(flat: str) -> str:
    """A flat name of the original repositories in diffusers' words, others as they are:
    `input_blocks_4_1_proj_in` is `down_blocks_1_attentions_0_proj_in`. All of Stable Diffusion has
    two resnets in a block, so each third of the input blocks goes down."""
    if found := re.fullmatch(r"middle_block_([012])_(.+)", flat):
        module = ("resnets_0", "attentions_0", "resnets_1")[int(found[1])]
        return f"mid_block_{module}_{_ORIGINAL_RESNET.get(found[2], found[2])}"
    found = re.fullmatch(r"(input|output)_blocks_(\d+)_(\d)_(.+)", flat)
    if found is None or flat in _ORIGINAL:
        return _ORIGINAL.get(flat, flat)
    side, column, rest = found[1], int(found[3]), found[4]
    block, layer = divmod(int(found[2]) - (side == "input"), 3)
    blocks = f"{'down' if side == 'input' else 'up'}_blocks_{block}"
    if rest in ("op", "conv"):
        return f"{blocks}_{'down' if rest == 'op' else 'up'}samplers_0_conv"
    if column == 0:
        return f"{blocks}_resnets_{layer}_{_ORIGINAL_RESNET.get(rest, rest)}"
    return f"{blocks}_attentions_{layer}_{rest}"


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
