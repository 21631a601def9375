"""ControlNets: which one a request means, and its weights.

A ControlNet (arXiv 2302.05543) makes a U-Net draw along a second picture: edges, a pose, depths. It
is a folder in the diffusers layout, a single `.safetensors` file, the name of one of these in the
folder `controlnets` of latentgen's home, or the id of one on the Hugging Face hub. What it does in
a drawing is in `conditioning.py`.

Importing this module does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from . import modelfolder
from .errors import InvalidRequest
from .home import home

if TYPE_CHECKING:
    import torch
    from diffusers import ControlNetModel

__all__ = ["ControlNet", "check_fits", "find", "load", "names_there", "scales", "sees_mask"]

# What must be as in the U-Net that a ControlNet works with.
_SHARED = ("block_out_channels", "layers_per_block", "cross_attention_dim")

# The convolution that sees the picture: in the diffusers layout, and in the one of the original
# repository, of which a file may also hold the model.
_FIRST = {
    "controlnet_cond_embedding.conv_in.weight": "",
    "input_hint_block.0.weight": "",
    "control_model.input_hint_block.0.weight": "control_model.",
}


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet that was found.

    Attributes:
        name: what to call it: as it was asked for by name, the name of its folder or file, or its
            hub id.
        path: its folder or file here (from the hub: perhaps only its configuration).
        hub_id: the id on the hub, if that is where it comes from.
    """

    name: str
    path: Path
    hub_id: str | None = None

    def hash(self) -> str | None:
        """The first 10 hex digits of the SHA-256 of its weights; None before they are here."""
        files = [self.path] if self.path.is_file() else modelfolder.weights_of(self.path)
        file = next(iter(files), None)
        return None if file is None else modelfolder.file_sha256(file)[:10]


def find(source: Any) -> ControlNet:
    """Find a ControlNet, and check what can be checked without its weights.

    Args:
        source: a folder, a file, the name of one in the folder `controlnets` of latentgen's home,
            a hub id, or what this function gave before.

    Raises:
        InvalidRequest: there is none, it is damaged, of another kind or a pickle.
    """
    if isinstance(source, ControlNet):
        return source
    if not isinstance(source, str | Path) or not str(source).strip():
        raise InvalidRequest("controlnet", source, "a folder, a file, a name or a hub id")
    folder = names_there().get(str(source), Path(source).expanduser())
    if folder.is_file():
        return _find_file(folder)
    if folder.is_dir():
        modelfolder.check_weights(folder, "controlnet")
        name = str(source) if str(source) in names_there() else folder.resolve().name
        found = ControlNet(name, folder)
    elif modelfolder.is_hub_id(source) and not folder.exists():
        path = modelfolder.fetch(str(source), ["config.json"], field="controlnet")
        found = ControlNet(str(source), path, str(source))
    else:
        hint = (
            "no such folder or file; give a folder in the diffusers layout (config.json and a "
            f".safetensors file), a .safetensors file, the name of one in {home() / 'controlnets'},"
            " or a hub id such as lllyasviel/sd-controlnet-canny"
        )
        raise InvalidRequest("controlnet", str(source), hint)
    config = modelfolder.read_json(found.path / "config.json", "controlnet")
    if (kind := config.get("_class_name")) != "ControlNetModel":
        raise InvalidRequest("controlnet", str(source), f"a {kind}, not a ControlNetModel")
    if config.get("global_pool_conditions"):
        hint = "it pools its conditions (shuffle), which latentgen does not draw with"
        raise InvalidRequest("controlnet", str(source), hint)
    if (channels := config.get("conditioning_channels", 3)) != 3:
        raise InvalidRequest(
            "controlnet", str(source), f"it sees {channels} channels, not a picture"
        )
    return found


def names_there() -> dict[str, Path]:
    """The folders and files in latentgen's folder of ControlNets, by name."""
    there = sorted((home() / "controlnets").glob("*"))
    files = {path.stem: path for path in there if path.suffix == ".safetensors"}
    return files | {path.name: path for path in there if path.is_dir()}


def _find_file(file: Path) -> ControlNet:
    if file.suffix.lower() in modelfolder.PICKLES:
        raise InvalidRequest("controlnet", str(file), modelfolder.CONVERT)
    if file.suffix.lower() != ".safetensors":
        raise InvalidRequest("controlnet", str(file), "a ControlNet must be a .safetensors file")
    shapes = modelfolder.read_header(file, "controlnet")
    sees = next((shapes[first] for first in _FIRST if first in shapes), None)
    if "lora_controlnet" in shapes:
        hint = "a Control-LoRA, which latentgen does not draw with"
    elif sees is None:
        hint = "no ControlNet: nothing in it sees a picture"
    elif sees[1] != 3:
        hint = f"it sees {sees[1]} channels, not a picture"
    elif "shuffle" in file.stem.lower():  # only its name tells
        hint = "it pools its conditions (shuffle), which latentgen does not draw with"
    else:
        return ControlNet(file.stem, file)
    raise InvalidRequest("controlnet", str(file), hint)


def sees_mask(name: str) -> bool:
    """Whether a ControlNet was trained for inpainting, as only its name tells: it sees the picture,
    and -1 where that is repainted."""
    return "inpaint" in name.lower()


def scales(scale: float, start: float, end: float, steps: int) -> list[float]:
    """A ControlNet's strength in each step: `scale` in those that lie between `start` and `end`,
    which are shares of all steps, and 0 in the others."""
    return [scale if start <= i / steps and (i + 1) / steps <= end else 0.0 for i in range(steps)]


def check_fits(found: ControlNet, unet: Mapping[str, Any]) -> None:
    """Compare it with the configuration of the U-Net that it is to work with.

    Raises:
        InvalidRequest: it was made for another model.
    """
    config = _config_of(found.path)
    for name in _SHARED:
        own, wanted = config.get(name), unet.get(name)
        wanted = list(wanted) if isinstance(wanted, tuple) else wanted
        if None not in (own, wanted) and own != wanted:
            hint = f"made for another model: its {name} is {own}, the model's {wanted}"
            raise InvalidRequest("controlnet", found.name, hint)


def _config_of(path: Path) -> dict[str, Any]:
    """Its configuration. A file does not hold it, but the shapes of its weights tell some of it."""
    if path.is_dir():
        return modelfolder.read_json(path / "config.json", "controlnet")
    for name, shape in modelfolder.read_header(path, "controlnet").items():
        if name.endswith("attn2.to_k.weight") and not name.startswith("model."):
            return {"cross_attention_dim": shape[1]}
    return {}


def load(
    found: ControlNet, unet: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> ControlNetModel:
    """Read the weights.

    Args:
        unet: the configuration of the U-Net that it is to work with. A file is built like it.

    Raises:
        InvalidRequest: its files do not fit together, or to the U-Net.
    """
    is_file = found.path.is_file()
    try:
        model = _read_file(found.path, unet, dtype) if is_file else _read_folder(found, dtype)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = "it does not fit the model" if is_file else "its files do not fit together"
        raise InvalidRequest("controlnet", found.name, f"{what} ({reason})") from error
    return model.eval().requires_grad_(False).to(device)


def _read_folder(found: ControlNet, dtype: torch.dtype) -> ControlNetModel:
    from diffusers import ControlNetModel

    source = found.path if found.hub_id is None else found.hub_id
    options = {"use_safetensors": True, "torch_dtype": dtype, "output_loading_info": True}
    model, told = modelfolder.of_variant(
        modelfolder.variant_of(found.path),
        found.hub_id,
        lambda variant: ControlNetModel.from_pretrained(source, variant=variant, **options),
    )
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"its weights lack {missing[0]}")
    if more := sorted(told["unexpected_keys"]):
        raise ValueError(f"it has {more[0]}, which a ControlNetModel has not")
    return model


def _read_file(file: Path, unet: Mapping[str, Any], dtype: torch.dtype) -> ControlNetModel:
    import torch
    from diffusers import ControlNetModel

    shapes = modelfolder.read_header(file, "controlnet")
    prefix = next(prefix for first, prefix in _FIRST.items() if first in shapes)
    own = [name for name in shapes if name.startswith(prefix)]
    config = {name: unet[name] for name in signature(ControlNetModel).parameters if name in unet}
    for name in ("conv_in.weight", f"{prefix}input_blocks.0.0.weight"):
        if name in shapes:
            config["in_channels"] = shapes[name][1]  # no mask, where the U-Net sees one
    with torch.device("meta"):
        wanted = ControlNetModel(**config).state_dict()
    if len(own) != len(wanted):
        count = f"it has {len(own)} weights, and one like the U-Net {len(wanted)}"
        raise ValueError(f"{count}; if it comes with a config.json, give the folder of both")
    with TemporaryDirectory() as folder:
        settings = {"_class_name": ControlNetModel.__name__} | config
        Path(folder, "config.json").write_text(json.dumps(settings), "utf-8")
        return ControlNetModel.from_single_file(str(file), config=folder, torch_dtype=dtype)
