"""LoRA files: read, written and converted, without a change of what they do.

A LoRA adds `alpha / rank * up @ down` to the weights of some modules (arXiv 2106.09685). The field
stores these matrices under three layouts, and a `Lora` is what they have in common:

    kohya      lora_unet_down_blocks_0_..._to_q.lora_down.weight, .lora_up.weight, .alpha;
               lora_te_...; for SDXL lora_te1_ and lora_te2_, and read are input_blocks_1_... too
    diffusers  unet.down_blocks.0....to_q.lora_A.weight, .lora_B.weight; alphas in the header
    peft       a folder for each part: adapter_model.safetensors and adapter_config.json

DoRA (arXiv 2402.09353) adds a magnitude to a layer. This module knows files and the modules that
PEFT trains, but no pipeline: `adapters.py` applies a LoRA.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .errors import InvalidRequest
from .lorafolder import PARTS, checked, files_of
from .lorakeys import flatten_path, place, unflatten_path
from .outputs import check_file, check_folder, write_file

__all__ = [
    "LAYOUTS",
    "Layer",
    "Lora",
    "collect_lora",
    "convert",
    "describe",
    "flatten_path",
    "largest_difference",
    "lora_metadata",
    "read_lora",
    "unflatten_path",
    "write_lora",
]

LAYOUTS = ("kohya", "diffusers", "peft")
MANIFEST = "latentgen.manifest"

_ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers' key for PEFT's configuration


@dataclass(frozen=True)
class Layer:
    """What a LoRA holds for one module.

    Attributes:
        down: (rank, in), or (rank, in, k, k) for a convolution.
        up: (out, rank), or (out, rank, 1, 1).
        alpha: the strength is `alpha / rank`.
        magnitude: of a DoRA: (out,), the norms of the weight's rows; or (1, in), of its columns,
            as some programs train it.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def strength(self) -> float:
        return self.alpha / self.rank

    def change(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """What is added to the weight, (out, in) or (out, in, k, k); a DoRA's before its norm."""
        flat = self.up.to(dtype).flatten(1) @ self.down.to(dtype).flatten(1)
        return self.strength * flat.reshape(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class Lora:
    """A LoRA: its layers by module path, without the `text_model.` of older text encoders.

    Attributes:
        metadata: the header of its safetensors file.
        layout: how the file was laid out, one of `LAYOUTS`.
    """

    unet: dict[str, Layer]
    text_encoder: dict[str, Layer]
    text_encoder_2: dict[str, Layer] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    layout: str = "kohya"

    @property
    def layers(self) -> dict[str, Layer]:
        """All layers. The U-Net's and a text encoder's paths have nothing in common; those of the
        second text encoder begin with its name."""
        second = {f"text_encoder_2.{path}": layer for path, layer in self.text_encoder_2.items()}
        return {**self.unet, **self.text_encoder, **second}

    @property
    def is_xl(self) -> bool:
        """Whether it is for SDXL: by a second text encoder, or by how wide its words are."""
        readers = (layer for path, layer in self.unet.items() if ".attn2.to_k" in path)
        return bool(self.text_encoder_2) or any(one.down.shape[1] == 2048 for one in readers)


# Reading.


def read_lora(file: str | Path) -> Lora:
    """Read a LoRA in any of the layouts.

    Args:
        file: a `.safetensors` file, or a folder with the two files of PEFT, or with such folders
            named after the parts of the model, `unet` and `text_encoder`.

    Raises:
        InvalidRequest: it is missing, damaged, not a LoRA, has numbers that are not finite, or was
            trained on changed weights of its model (PiSSA and its like).
    """
    path = checked(Path(file))
    tensors: dict[tuple[str, str], dict[str, Tensor]] = {}
    configs: dict[str, dict[str, Any]] = {}
    metadata: dict[str, str] = {}
    layout = "peft" if path.is_dir() else "diffusers"
    for source in files_of(path):
        if source.suffix == ".json":
            continue
        found, header = _load(source)
        metadata |= header
        configs |= _configs(header)
        own = _own_config(source, found)
        for key, value in found.items():
            known = place(key)
            assert known is not None  # or it would have been refused
            part, module, role = known
            if own is not None and part != "unet" and source.parent.name == "text_encoder_2":
                part = "text_encoder_2"
            is_kohyas = key.startswith("lora_")
            layout = "kohya" if is_kohyas else layout
            if role == "magnitude":
                # kohya: (out, 1) or (1, in), with more ones for a convolution; PEFT: (1, out, 1, 1)
                of_columns = is_kohyas and value.ndim > 1 and value.shape[0] == 1
                value = value.flatten(1) if of_columns else value.flatten()
            tensors.setdefault((part, module), {})[role] = value
            if own is not None:
                configs[part] = own
    for config in configs.values():
        _check_plain(path, config)

    layers: dict[str, dict[str, Layer]] = {part: {} for part in PARTS}
    for (part, module), roles in tensors.items():
        down, up = roles["down"], roles["up"]
        if "alpha" in roles:
            alpha = roles["alpha"].item()
        else:
            alpha = _configured_alpha(configs.get(part), module, down.shape[0])
        layers[part][module] = Layer(down, up, alpha, roles.get("magnitude"))
    metadata.pop("format", None)
    metadata.pop(_ADAPTER_METADATA, None)
    return Lora(**layers, metadata=metadata, layout=layout)


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            header = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InvalidRequest("loras", str(file), f"cannot be read ({error})") from error
    for key, value in tensors.items():
        if not torch.isfinite(value.float()).all():  # float8 knows no isfinite
            raise InvalidRequest("loras", str(file), f"{key} has numbers that are not finite")
    return tensors, header


def _configs(header: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's configuration of each part, from the header of a file of diffusers."""
    try:
        packed = json.loads(header.get(_ADAPTER_METADATA, "{}"))
        return {
            part: {
                key.removeprefix(f"{part}."): value
                for key, value in packed.items()
                if key.startswith(f"{part}.")
            }
            for part in PARTS
            if f"{part}.lora_alpha" in packed
        }
    except (ValueError, TypeError, AttributeError) as error:
        hint = f"its {_ADAPTER_METADATA} is not a JSON object ({error})"
        raise InvalidRequest("loras", _ADAPTER_METADATA, hint) from error


def _check_plain(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a LoRA of which PEFT's configuration says that the model's own weights were changed
    before it learnt (PiSSA, OLoRA, CorDA and others): its tensors alone have another effect."""
    begun = config.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.lower() not in {"gaussian", "orthogonal", "eva", "mica"}:
        hint = (
            f"init_lora_weights is {begun!r}: such a LoRA belongs to changed weights of its "
            "model; save it as a plain one, with "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
        raise InvalidRequest("loras", str(path), hint)


def _own_config(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The configuration beside a file of PEFT's; without it nobody knows the strength."""
    if not any(key.startswith("base_model.model.") for key in tensors):
        return None
    config = file.with_name("adapter_config.json")
    try:
        return {"lora_alpha": 8, **json.loads(config.read_text("utf-8"))}  # PEFT's default
    except OSError as error:
        raise InvalidRequest("loras", str(config), "a PEFT adapter needs this file") from error
    except (ValueError, TypeError) as error:
        raise InvalidRequest("loras", str(config), f"not a JSON object ({error})") from error


def _configured_alpha(config: Mapping[str, Any] | None, path: str, rank: int) -> float:
    """The alpha that PEFT would use; without a configuration the rank, which means strength 1."""
    if config is None:
        return float(rank)
    try:
        alpha = config["lora_alpha"]
        for pattern, own in (config.get("alpha_pattern") or {}).items():
            # PEFT's patterns are regular expressions for the end of a path.
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = own
                break
        return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
    except (re.error, ValueError, TypeError, AttributeError) as error:
        hint = f"PEFT's settings of this LoRA are damaged ({error})"
        raise InvalidRequest("loras", path, hint) from error


# From modules in training.


def collect_lora(unet: nn.Module, text_encoder: nn.Module | None = None, adapter="default") -> Lora:
    """The LoRA in modules into which PEFT put adapter layers, as copies on the CPU."""
    return Lora(_collect(unet, adapter), _collect(text_encoder, adapter))


def _collect(model: nn.Module | None, adapter: str) -> dict[str, Layer]:
    from peft.tuners.lora.layer import LoraLayer

    layers = {}
    for path, module in model.named_modules() if model is not None else ():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        if module.lora_B[adapter].bias is not None:
            raise InvalidRequest("lora_bias", True, "LoRA files hold no biases; train without")
        down, up = _copy(module.lora_A[adapter].weight), _copy(module.lora_B[adapter].weight)
        magnitude = None
        if adapter in module.lora_magnitude_vector:
            magnitude = _copy(module.lora_magnitude_vector[adapter].weight).flatten()
        alpha = module.scaling[adapter] * down.shape[0]
        path = path.removeprefix("base_model.model.").removeprefix("text_model.")
        layers[path] = Layer(down, up, alpha, magnitude)
    return layers


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", copy=True).contiguous()


# Writing.


def write_lora(
    lora: Lora, file: str | Path, layout: str = "kohya", dtype: torch.dtype | None = None
) -> Path:
    """Write a LoRA, whole or not at all.

    Args:
        file: a `.safetensors` file; for the layout "peft" a folder, in which each part of the
            model becomes a folder.
        layout: one of `LAYOUTS`.
        dtype: of the matrices; None leaves them as they are. Alphas and magnitudes are not rounded.

    Returns:
        `file`.
    """
    path = Path(file)
    if layout not in LAYOUTS:
        raise InvalidRequest("layout", layout, f"one of {', '.join(LAYOUTS)}")
    if layout != "peft" and path.suffix != ".safetensors":
        raise InvalidRequest("file", str(path), "the name must end in .safetensors")
    (check_folder if layout == "peft" else check_file)(path, "file")
    parts = {part: layers for part in PARTS if (layers := getattr(lora, part))}
    if layout == "kohya":
        tensors = _kohya_tensors(parts, dtype, lora.is_xl)
        _write_safetensors(path, tensors, _minimum(lora) | lora.metadata)
    elif layout == "diffusers":
        tensors = {
            f"{part}.{key}": value
            for part, layers in parts.items()
            for key, value in _peft_tensors(layers, dtype, part).items()
        }
        config = {
            f"{part}.{key}": value
            for part, layers in parts.items()
            for key, value in _peft_config(layers, part).items()
        }
        packed = {_ADAPTER_METADATA: json.dumps(config, sort_keys=True), "format": "pt"}
        _write_safetensors(path, tensors, {**lora.metadata, **packed})
    else:
        for part, layers in parts.items():
            tensors = {
                f"base_model.model.{key}": value
                for key, value in _peft_tensors(layers, dtype).items()
            }
            header = {**lora.metadata, "format": "pt"}
            _write_safetensors(path / part / "adapter_model.safetensors", tensors, header)
            config = {"peft_type": "LORA", **_peft_config(layers, part)}
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            write_file(path / part / "adapter_config.json", text.encode())
    return path


def lora_metadata(
    *,
    title: str,
    base_model: str,
    rank: int | str,
    alpha: float | str,
    prediction_type: str,
    resolution: int | tuple[int, int],
    trigger_phrase: str | None = None,
    description: str | None = None,
    author: str | None = None,
    architecture: str = "stable-diffusion-v1",
    network_args: Mapping[str, Any] | None = None,
    manifest: Mapping[str, Any] | None = None,
    date: datetime | None = None,
) -> dict[str, str]:
    """The header of a LoRA file: kohya's `ss_` keys and ModelSpec 1.0.1.

    Args:
        prediction_type: "epsilon", "v_prediction" or "sample".
        resolution: in pixels: of a square, or (width, height).
        network_args: what else describes the network, for `ss_network_args`.
        manifest: how the file was made, as JSON under `latentgen.manifest`.
        date: when it was made; None: now.
    """
    width, height = resolution if isinstance(resolution, tuple) else (resolution, resolution)
    version_2 = "v2" in architecture
    made = date if date is not None else datetime.now(UTC)
    values: dict[str, str | None] = {
        "ss_v2": str(version_2),
        "ss_base_model_version": "sd_v2" if version_2 else "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}" if isinstance(alpha, float) else str(alpha),
        "ss_network_args": json.dumps(dict(network_args or {})),
        "ss_output_name": title,
        "ss_sd_model_name": base_model,
        "ss_resolution": f"({width}, {height})",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.date": made.isoformat(timespec="seconds"),
        "modelspec.author": author,
        "modelspec.description": description,
        "modelspec.trigger_phrase": trigger_phrase,
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else prediction_type,
        MANIFEST: None if manifest is None else json.dumps(manifest, sort_keys=True),
    }
    return {key: value for key, value in values.items() if value is not None}


def largest_difference(one: Lora, other: Lora) -> float:
    """The largest difference of any entry of what two LoRAs add to the weights; float64.

    Raises:
        InvalidRequest: they do not change the same modules.
    """
    first, second = one.layers, other.layers
    if missing := sorted(first.keys() ^ second.keys()):
        raise InvalidRequest("loras", missing[:10], "only one of the two has these layers")
    largest = 0.0
    for path, layer in first.items():
        twin = second[path]
        shape = (layer.up.shape[0], -1)  # a convolution of one pixel is a matrix
        difference = layer.change().reshape(shape) - twin.change().reshape(shape)
        largest = max(largest, difference.abs().max().item())
        if (layer.magnitude is None) != (twin.magnitude is None):
            raise InvalidRequest("loras", path, "only one of the two has its DoRA magnitude")
        if layer.magnitude is not None and twin.magnitude is not None:
            distance = (layer.magnitude.double() - twin.magnitude.double()).abs().max()
            largest = max(largest, distance.item())
    return largest


def convert(
    file: str | Path, to: str | Path, layout: str, dtype: str | None = None
) -> tuple[float, float]:
    """Write the LoRA of `file` in another layout, read it back and compare.

    Args:
        to: where to write, as for `write_lora`.
        dtype: "float32", "float16" or "bfloat16"; None leaves the matrices as they are.

    Returns:
        The largest difference of any entry of what the two add to the weights, and the largest
        entry itself.
    """
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype is not None and dtype not in dtypes:
        raise InvalidRequest("dtype", dtype, f"one of {', '.join(dtypes)}")
    if Path(to).resolve() == Path(file).resolve():
        raise InvalidRequest("output", str(to), "this is the LoRA itself; choose another name")
    lora = read_lora(file)
    written = read_lora(write_lora(lora, to, layout, dtypes[dtype] if dtype is not None else None))
    largest = max(layer.change().abs().max().item() for layer in lora.layers.values())
    return largest_difference(lora, written), largest


def describe(lora: Lora) -> dict[str, str]:
    """What a LoRA holds, for people."""
    facts = {"layout": lora.layout}
    for name, part in (("U-Net", "unet"), *((p.replace("_", " "), p) for p in PARTS[1:])):
        layers = getattr(lora, part)
        if not layers:
            if part != "text_encoder_2":  # which most models do not have
                facts[name] = "not changed"
            continue
        norms = [layer.change(torch.float32).norm().item() for layer in layers.values()]
        dora = any(layer.magnitude is not None for layer in layers.values())
        facts[name] = (
            f"{len(layers)} layers, rank {_range(x.rank for x in layers.values())}, "
            f"alpha {_range(x.alpha for x in layers.values())}, "
            f"norm of the change {_range(norms)}" + (", DoRA" if dora else "")
        )
    dtypes = {str(x.down.dtype).removeprefix("torch.") for x in lora.layers.values()}
    facts["dtype"] = ", ".join(sorted(dtypes))
    for name, keys in {
        "title": ("modelspec.title", "ss_output_name"),
        "base model": ("ss_sd_model_name", "ss_base_model_version"),
        "architecture": ("modelspec.architecture",),
        "trigger phrase": ("modelspec.trigger_phrase",),
        "prediction": ("modelspec.prediction_type",),
        "resolution": ("modelspec.resolution", "ss_resolution"),
        "date": ("modelspec.date",),
    }.items():
        facts[name] = next((lora.metadata[key] for key in keys if key in lora.metadata), "not told")
    return facts


def _range(values: Iterable[float]) -> str:
    ordered = sorted(values)
    ends = f"{ordered[0]:.4g}", f"{ordered[-1]:.4g}"
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _kohya_tensors(
    parts: Mapping[str, Mapping[str, Layer]], dtype: torch.dtype | None, is_xl: bool
) -> dict[str, Tensor]:
    tensors = {}
    starts = {"unet": "unet", "text_encoder": "te1" if is_xl else "te", "text_encoder_2": "te2"}
    for part, layers in parts.items():
        for path, layer in layers.items():
            of_model = "" if part == "unet" or path == "text_projection" else "text_model_"
            name = f"lora_{starts[part]}_{of_model}{flatten_path(path)}"
            tensors[f"{name}.lora_down.weight"] = layer.down.to(dtype or layer.down.dtype)
            tensors[f"{name}.lora_up.weight"] = layer.up.to(dtype or layer.up.dtype)
            tensors[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
            if layer.magnitude is not None:
                ones = (1,) * (layer.down.ndim - 2)
                rows = layer.magnitude.unsqueeze(1) if layer.magnitude.ndim == 1 else None
                scale = rows if rows is not None else layer.magnitude
                tensors[f"{name}.dora_scale"] = scale.reshape(*scale.shape, *ones)
    return tensors


def _peft_tensors(
    layers: Mapping[str, Layer], dtype: torch.dtype | None, part: str | None = None
) -> dict[str, Tensor]:
    """PEFT's keys; those of a `part` that is a text encoder are spelt as diffusers does."""
    start, down, up, magnitude = "", "lora_A", "lora_B", "lora_magnitude_vector"
    if part is not None and part != "unet":
        start, down, up = "text_model.", "lora_linear_layer.down", "lora_linear_layer.up"
        magnitude = "lora_magnitude_vector.weight"  # transformers reads it under this name only
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{start}{path}.{down}.weight"] = layer.down.to(dtype or layer.down.dtype)
        tensors[f"{start}{path}.{up}.weight"] = layer.up.to(dtype or layer.up.dtype)
        if layer.magnitude is None:
            continue
        if layer.magnitude.ndim > 1:
            hint = "its DoRA magnitudes are those of columns, which only kohya files can hold"
            raise InvalidRequest("layout", path, hint)
        shape = (-1,) if layer.down.ndim == 2 else (1, -1, 1, 1)
        tensors[f"{start}{path}.{magnitude}"] = layer.magnitude.reshape(shape)
    return tensors


def _peft_config(layers: Mapping[str, Layer], part: str) -> dict[str, Any]:
    """PEFT's `LoraConfig`: the commonest rank and alpha, and the others by path."""
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    # PEFT compares patterns with the end of a path. In the U-Net "^" makes that the whole path; in
    # a text encoder there may be a "text_model." before it.
    pattern = {path: ("^" if part == "unet" else "") + re.escape(path) for path in layers}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {pattern[p]: x.rank for p, x in layers.items() if x.rank != rank},
        "alpha_pattern": {pattern[p]: x.alpha for p, x in layers.items() if x.alpha != alpha},
        "target_modules": sorted(layers),
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
    }


def _minimum(lora: Lora) -> dict[str, str]:
    """What kohya's programs want to find in every file."""
    ranks = {layer.rank for layer in lora.layers.values()}
    alphas = {layer.alpha for layer in lora.layers.values()}
    return {
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0" if lora.is_xl else "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        "ss_network_args": "{}",
    }


def _write_safetensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a file whose header holds the hashes of its tensors."""
    tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
    # kohya hashes a file that has only its `ss_` keys, so that other metadata may change later.
    training = {key: value for key, value in header.items() if key.startswith("ss_")}
    data = save(tensors, training)
    behind_header = int.from_bytes(data[:8], "little") + 8
    digest = hashlib.sha256(data[behind_header:]).hexdigest()
    hashes = {
        "sshs_model_hash": digest,
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{digest}",
    }
    write_file(path, save(tensors, {**header, **hashes}))
