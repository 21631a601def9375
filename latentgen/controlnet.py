"""ControlNets: which one a request means, and its weights.

A ControlNet (arXiv 2302.05543) makes a U-Net draw along a second picture: edges, a pose, depths. It
is a folder in the diffusers layout, the name of one in the folder `controlnets` of latentgen's
home, or the id of one on the Hugging Face hub. What it does in a drawing is in `conditioning.py`.

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import modelfolder
from .errors import InvalidRequest
from .home import home

if TYPE_CHECKING:
    import torch
    from diffusers import ControlNetModel

__all__ = ["ControlNet", "check_fits", "find", "load", "names_there", "scales"]

# What must be as in the U-Net that a ControlNet works with.
_SHARED = ("block_out_channels", "layers_per_block", "cross_attention_dim")


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet that was found.

    Attributes:
        name: what to call it: as it was asked for by name, the name of its folder, or its hub id.
        path: its folder here (from the hub: perhaps only its configuration).
        hub_id: the id on the hub, if that is where it comes from.
    """

    name: str
    path: Path
    hub_id: str | None = None

    def hash(self) -> str | None:
        """The first 10 hex digits of the SHA-256 of its weights; None before they are here."""
        file = next(iter(modelfolder.weights_of(self.path)), None)
        return None if file is None else modelfolder.file_sha256(file)[:10]


def find(source: Any) -> ControlNet:
    """Find a ControlNet, and check what can be checked without its weights.

    Args:
        source: a folder, the name of one in the folder `controlnets` of latentgen's home, a hub
            id, or what this function gave before.

    Raises:
        InvalidRequest: there is none, it is damaged, of another kind or a pickle.
    """
    if isinstance(source, ControlNet):
        return source
    if not isinstance(source, str | Path) or not str(source).strip():
        raise InvalidRequest("controlnet", source, "a folder, a name or a hub id")
    folder = names_there().get(str(source), Path(source).expanduser())
    if folder.is_dir():
        modelfolder.check_weights(folder, "controlnet")
        name = str(source) if str(source) in names_there() else folder.resolve().name
        found = ControlNet(name, folder)
    elif modelfolder.is_hub_id(source) and not folder.exists():
        path = modelfolder.fetch(str(source), ["config.json"], field="controlnet")
        found = ControlNet(str(source), path, str(source))
    else:
        what = "a file, and they are read from folders" if folder.is_file() else "no such folder"
        hint = (
            f"{what}; give one in the diffusers layout (config.json and a .safetensors file), the "
            f"name of one in {home() / 'controlnets'}, or a hub id such as "
            "lllyasviel/sd-controlnet-canny"
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
    """The folders in latentgen's folder of ControlNets, by name."""
    return {path.name: path for path in sorted((home() / "controlnets").glob("*")) if path.is_dir()}


def scales(scale: float, start: float, end: float, steps: int) -> list[float]:
    """A ControlNet's strength in each step: `scale` in those that lie between `start` and `end`,
    which are shares of all steps, and 0 in the others."""
    return [scale if start <= i / steps and (i + 1) / steps <= end else 0.0 for i in range(steps)]


def check_fits(found: ControlNet, unet: Mapping[str, Any]) -> None:
    """Compare it with the configuration of the U-Net that it is to work with.

    Raises:
        InvalidRequest: it was made for another model.
    """
    config = modelfolder.read_json(found.path / "config.json", "controlnet")
    for name in _SHARED:
        own, wanted = config.get(name), unet[name]
        wanted = list(wanted) if isinstance(wanted, tuple) else wanted
        if own is not None and own != wanted:
            hint = f"made for another model: its {name} is {own}, the model's {wanted}"
            raise InvalidRequest("controlnet", found.name, hint)


def load(found: ControlNet, device: torch.device, dtype: torch.dtype) -> ControlNetModel:
    """Read the weights.

    Raises:
        InvalidRequest: its files do not fit together.
    """
    from diffusers import ControlNetModel

    source = found.path if found.hub_id is None else found.hub_id
    options = {"use_safetensors": True, "torch_dtype": dtype, "output_loading_info": True}
    try:
        model, told = modelfolder.of_variant(
            modelfolder.variant_of(found.path),
            found.hub_id,
            lambda variant: ControlNetModel.from_pretrained(source, variant=variant, **options),
        )
        if missing := sorted(told["missing_keys"]):
            raise ValueError(f"its weights lack {missing[0]}")
        if more := sorted(told["unexpected_keys"]):
            raise ValueError(f"it has {more[0]}, which a ControlNetModel has not")
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = f"its files do not fit together ({reason})"
        raise InvalidRequest("controlnet", found.name, hint) from error
    return model.eval().requires_grad_(False).to(device)
