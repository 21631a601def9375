"""Writes a model as one file in the layout of the original Stable Diffusion repositories.

The names of the tensors are those of CompVis' code: `model.diffusion_model` is the U-Net,
`first_stage_model` the autoencoder, `cond_stage_model.transformer` the text encoder. SDXL has
`conditioner` with two of them, the second as OpenCLIP names it.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def save_single_file(pipe, path: Path) -> None:
    """Write the U-Net, the autoencoder and the text encoder of `pipe` to one checkpoint."""
    tensors = {}
    for name, tensor in pipe.unet.state_dict().items():
        tensors["model.diffusion_model." + unet_name(name, pipe.unet.config)] = tensor
    blocks = len(pipe.vae.config.block_out_channels)
    for name, tensor in pipe.vae.state_dict().items():
        old = _vae_name(name, blocks)
        is_matrix = ".attn_1." in old and "norm" not in old and tensor.ndim == 2
        tensors["first_stage_model." + old] = tensor[:, :, None, None] if is_matrix else tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        name = "text_model." + name.removeprefix("text_model.")
        place = "cond_stage_model" if pipe.text_encoder_2 is None else "conditioner.embedders.0"
        tensors[f"{place}.transformer.{name}"] = tensor
    if pipe.text_encoder_2 is not None:
        for name, tensor in _open_clip(pipe.text_encoder_2.state_dict()).items():
            tensors["conditioner.embedders.1.model." + name] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _open_clip(tensors: dict) -> dict:
    """In OpenCLIP query, key and value are one matrix, and the projection stands upright."""
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in OPEN_CLIP.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    renamed["text_projection"] = renamed.pop("text_projection.weight").T
    for name in [name for name in renamed if ".q_proj." in name]:
        three = [renamed.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        renamed[name.replace(".q_proj.", ".in_proj_")] = torch.cat(three)
    return renamed


def unet_name(name: str, config) -> str:
    for new, old in UNET.items():
        if name.startswith(new + "."):
            return _resnet_name(old + name.removeprefix(new))
    side, block, kind, layer, rest = re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name
    ).groups()
    a_block = config.layers_per_block + 1
    if side == "down":
        place = f"input_blocks.{int(block) * a_block + 1 + int(layer)}"
        if kind == "downsamplers":
            place = f"input_blocks.{(int(block) + 1) * a_block}"
            rest = rest.replace("conv", "op")
    else:
        place = f"output_blocks.{int(block) * a_block + int(layer)}"
        if kind == "upsamplers":
            place = f"output_blocks.{int(block) * a_block + config.layers_per_block}"
    attends = "CrossAttn" in config[f"{side}_block_types"][int(block)]
    column = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 + attends}[kind]
    return _resnet_name(f"{place}.{column}.{rest}")


def controlnet_name(name: str, config) -> str:
    """As the original repository's `control_model` names it."""
    place, _, rest = name.partition(".")
    number, _, end = rest.partition(".")
    if place == "controlnet_cond_embedding":
        if number == "blocks":
            layer, _, end = end.partition(".")
            return f"input_hint_block.{2 * int(layer) + 2}.{end}"
        return f"input_hint_block.{ {'conv_in': 0, 'conv_out': 14}[number] }.{end}"
    if place == "controlnet_down_blocks":
        return f"zero_convs.{number}.0.{end}"
    if place == "controlnet_mid_block":
        return f"middle_block_out.0.{rest}"
    return unet_name(name, config)


def _resnet_name(name: str) -> str:
    for new, old in RESNET.items():
        name = re.sub(
            rf"^((?:input|output|middle)_block(?:s\.\d+)?\.\d+\.){new}\b", rf"\1{old}", name
        )
    return name


def _vae_name(name: str, blocks: int) -> str:
    def up(match):
        return f"up.{blocks - 1 - int(match[1])}."

    name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d+)\.", up, name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = name.replace("resnets.", "block.").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    name = name.replace("conv_norm_out", "norm_out")
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for new, old in VAE_ATTENTION.items():
            name = name.replace(f".{new}.", f".{old}.")
    return name
