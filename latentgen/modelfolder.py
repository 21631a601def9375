"""What a model says about itself before any of its weights are read.

A model is a folder in the diffusers layout, the id of such a folder on the Hugging Face hub, or a
single `.safetensors` checkpoint. This module finds it, refuses what is not one, and reads its JSON
files: sizes, defaults, the scheduler's configuration. It never imports torch, so that a wrong
request is answered at once.

A folder may bring `latentgen.json` beside `model_index.json` with defaults of its own:
`num_inference_steps`, `guidance_scale`, `scheduler`, `height`, `width`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import InvalidRequest
from .home import home

__all__ = [
    "CONVERT",
    "DEFAULT_MODEL",
    "PICKLES",
    "XL_GUIDANCE",
    "Model",
    "bundled_models",
    "cached_models",
    "check_weights",
    "fetch",
    "file_sha256",
    "find",
    "is_hub_id",
    "models_in",
    "of_variant",
    "read_header",
    "read_json",
    "schedule_of",
    "variant_of",
    "weights_of",
]

_BUNDLED = Path(__file__).parent / "models"
DEFAULT_MODEL = str(_BUNDLED / "latentgen-icons-128")

# Pipelines of diffusers with the components and the loop that this package draws with.
_KINDS = {
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline",
    "LatentDiffusion",
}
_XL_KINDS = {
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
}
_PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
_XL_PARTS = (*_PARTS, "text_encoder_2", "tokenizer_2")
_WEIGHTS = ("vae", "text_encoder", "text_encoder_2", "unet")
_OWN = {  # latentgen.json, and what its values are
    "num_inference_steps": int,
    "guidance_scale": int | float,
    "scheduler": str,
    "height": int,
    "width": int,
}
XL_GUIDANCE = 5.0  # by default, as in diffusers
PICKLES = {".ckpt", ".pt", ".pth", ".bin"}
CONVERT = (
    "pickle files can run code when opened and are never read; convert it once with "
    "`python -c \"import torch, safetensors.torch as s; t = torch.load('FILE', 'cpu', "
    "weights_only=True); t = t.get('state_dict', t.get('string_to_param', t)); s.save_file({k: "
    "v.clone().contiguous() for k, v in t.items() if hasattr(v, 'clone')}, 'NAME.safetensors')\"` "
    "or look for a .safetensors version"
)
_KINDS_OF_FILE = {
    "model": "a model; use it with --model (in Python: from_single_file)",
    "LoRA": "a LoRA; use it with --lora (in Python: load_lora)",
    "embedding": "a textual inversion; use it with --embedding (in Python: load_embedding)",
}
_OF_LORAS = re.compile(r"(^|[._])lora[._].*\.")  # and not a word such as <floral-style>
_OF_CHECKPOINTS = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
)
_WE_DRAW = "latentgen draws with models of Stable Diffusion 1, 2 and XL"
_OTHER_KINDS = {  # by what only they have in a checkpoint
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "edm_mean": "Playground v2.5",
    "edm_vpred.": "CosXL",
}
_OTHER_INPUTS = {  # by what their U-Net sees beside the latents
    5: "a model that sees depth",
    7: "an upscaler",
    8: "InstructPix2Pix or Stable Video Diffusion",
}
_PARTS_OF_CHECKPOINTS = {
    "autoencoder": ("first_stage_model.", "vae."),
    "text encoder": ("cond_stage_model.", "conditioner.embedders.0."),
}


@dataclass(frozen=True)
class Model:
    """A model that was found, and its facts.

    Attributes:
        name: what to call it: the name of its folder or file, or its hub id.
        path: its folder or file here (from the hub: perhaps only its JSON files); None for a model
            that was put together in memory.
        hub_id: the id on the hub, if that is where it comes from.
        revision: the revision on the hub that was asked for.
        vae_scale_factor: pixels for each latent, along a side.
        height, width: the size it was trained for, in pixels.
        num_inference_steps, guidance_scale, scheduler: its defaults; scheduler None is its own.
        scheduler_class: the class of its own scheduler in diffusers, where that is known.
        prediction_type: "epsilon", "v_prediction" or "sample".
        variant: "fp16" if its weights are there in that variant only.
        sees_mask: its U-Net has nine input channels and was trained for inpainting alone.
        embeds_guidance: its U-Net takes the guidance scale as an input (latent consistency models),
            so there is no second prediction to guide away from.
        is_xl: of the kind of SDXL, with two text encoders.
    """

    name: str
    path: Path | None = None
    hub_id: str | None = None
    revision: str | None = None
    vae_scale_factor: int = 8
    height: int = 512
    width: int = 512
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    scheduler: str | None = None
    scheduler_class: str = ""
    prediction_type: str = "epsilon"
    variant: str | None = None
    sees_mask: bool = False
    embeds_guidance: bool = False
    is_xl: bool = False

    @property
    def is_single_file(self) -> bool:
        return self.path is not None and self.path.is_file()

    def weight_file(self) -> Path | None:
        """The file that names the model's hash: the checkpoint, or the U-Net's first file."""
        if self.path is None or self.path.is_file():
            return self.path
        return next(iter(weights_of(self.path / "unet")), None)

    def unet_config(self) -> dict[str, Any]:
        """The U-Net's configuration as its folder tells it; {} for a model that is no folder."""
        if self.path is None or self.path.is_file():
            return {}
        return read_json(self.path / "unet" / "config.json")

    def hashes(self) -> list[str]:
        """Of all weights in its folder: `vae/name.safetensors 6ce0161689`, …"""
        if self.path is None:
            return []
        files = sorted(file for part in _WEIGHTS for file in weights_of(self.path / part))
        return [f"{file.parent.name}/{file.name} {file_sha256(file)[:10]}" for file in files]

    def write_defaults(self, folder: Path) -> None:
        """Write `latentgen.json`, so that the model keeps its defaults where it is saved."""
        names = ("num_inference_steps", "guidance_scale", "scheduler")  # the U-Net knows its size
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        (folder / "latentgen.json").write_text(json.dumps(own, indent=2) + "\n", "utf-8")

    def hash(self) -> str | None:
        """The first 10 hex digits of the SHA-256 of `weight_file()`, as the WebUI counts."""
        file = self.weight_file()
        return None if file is None else file_sha256(file)[:10]


def find(model: str | Path, revision: str | None = None) -> Model:
    """Find a model and check everything about it that can be checked without its weights.

    Args:
        model: a folder, a `.safetensors` file, the name of a bundled model or of one in the folder
            `models` of latentgen's home, or a hub id such as `someone/some-model`. The hub is asked
            only for JSON files here, and not at all under `HF_HUB_OFFLINE=1`.
        revision: a branch, tag or commit on the hub.

    Raises:
        InvalidRequest: there is no such model, it is damaged, of another kind, or a pickle.
    """
    path = Path(model).expanduser()
    if path.suffix.lower() in PICKLES:
        raise InvalidRequest("model", str(model), CONVERT)
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            raise InvalidRequest("model", str(model), "a checkpoint must be a .safetensors file")
        return Model(path.stem, path, **_facts_of_checkpoint(path))
    if path.is_dir():
        return _from_folder(path, path.resolve().name)
    if not is_hub_id(model):
        for own in bundled_models() + models_in(home() / "models"):
            if own.name == str(model):
                return own
        raise InvalidRequest(
            "model",
            str(model),
            "no such folder or file; give a folder with a model_index.json, a .safetensors file, "
            "a name that `latentgen models` lists, or a hub id such as someone/some-model",
        )
    folder = fetch(str(model), ["*.json"], revision)
    return _from_folder(folder, str(model), str(model), revision)


def is_hub_id(name: str | Path) -> bool:
    """Whether a name may be that of somebody's repository on the hub: owner/name."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.safetensors)", str(name)) is not None


def fetch(
    hub_id: str, patterns: list[str], revision: str | None = None, field: str = "model"
) -> Path:
    """The folder with some files of a repository on the hub; what is here is not fetched again.

    Raises:
        InvalidRequest: there is no such repository, or the hub is out of reach.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        hint = f"there is no such folder, and it is no hub id: {error}"
        raise InvalidRequest(field, hub_id, hint) from error
    except LocalEntryNotFoundError as error:
        hint = "not on this machine, and the hub is out of reach (or HF_HUB_OFFLINE)"
        raise InvalidRequest(field, hub_id, hint) from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidRequest(field, hub_id, f"the hub says: {reason}") from error
    except OSError as error:
        raise InvalidRequest(field, hub_id, f"the hub is out of reach: {error}") from error


def bundled_models() -> list[Model]:
    """The models that come with the package."""
    return [find(index.parent) for index in sorted(_BUNDLED.glob("*/model_index.json"))]


def models_in(folder: Path) -> list[Model]:
    """The models that lie in a folder: folders and checkpoints."""
    models = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            models.append(find(path))
        except InvalidRequest:
            continue  # something else, or a copy that is not complete yet
    return models


def cached_models() -> list[Model]:
    """The models in the hub library's cache that this package can draw with."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cached = scan_cache_dir()
    except CacheNotFound:
        return []
    models = []
    for repo in cached.repos:
        for revision in repo.revisions:
            try:
                models.append(_from_folder(revision.snapshot_path, repo.repo_id, repo.repo_id))
            except InvalidRequest:
                continue  # something else, or not complete
            break
    return models


def read_json(path: Path, field: str = "model") -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InvalidRequest: the file is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(field, str(path), f"cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InvalidRequest(field, str(path), "must hold a JSON object")
    return content


def read_header(
    file: Path, field: str = "model", wanted: str | None = None
) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, by name, from its header alone.

    Args:
        wanted: "model", "LoRA" or "embedding".

    Raises:
        InvalidRequest: there is no such file, its header is damaged or does not fit its size, or
            it is plainly of another kind than `wanted`.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise InvalidRequest(field, str(file), "no such file")
    try:
        with safe_open(file, framework="numpy") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        hint = f"damaged or not a safetensors file ({error}); fetch it again"
        raise InvalidRequest(field, str(file), hint) from error
    kind = _kind(shapes.keys())
    if None not in (kind, wanted) and kind != wanted:
        raise InvalidRequest(field, str(file), f"this is {_KINDS_OF_FILE[str(kind)]}")
    return shapes


def schedule_of(checkpoint: Path) -> dict[str, Any]:
    """What a single file tells of its noise, as entries of a scheduler's configuration: by the
    empty tensors `v_pred` and `ztsnr`, or by ModelSpec's `prediction_type` in its header.

    Most tell nothing. Then the folder given as `config` decides; without one, a file of Stable
    Diffusion 2 is judged by its weights, and any other predicts the noise.
    """
    from safetensors import safe_open

    with safe_open(checkpoint, framework="numpy") as opened:
        names, header = set(opened.keys()), opened.metadata() or {}
    told = {"v": "v_prediction", "epsilon": "epsilon"}.get(
        header.get("modelspec.prediction_type", "")
    )
    if "v_pred" in names:
        told = "v_prediction"
    schedule: dict[str, Any] = {} if told is None else {"prediction_type": told}
    if "ztsnr" in names:
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return schedule


def of_variant(variant: str | None, hub_id: str | None, load: Callable[[str | None], Any]) -> Any:
    """What `load` gives for a variant. Of a model on the hub nobody knows before whether there are
    others than "fp16"."""
    try:
        return load(variant)
    except OSError:
        if hub_id is None or variant is not None:
            raise
        return load("fp16")


def check_weights(folder: Path, field: str = "model") -> None:
    """Check the headers of the weights in a part's folder.

    Raises:
        InvalidRequest: there are none, or one is damaged.
    """
    files = weights_of(folder)
    if not files:
        pickles = [file for file in folder.iterdir() if file.suffix.lower() in PICKLES]
        hint = CONVERT if pickles else "its weights are missing: no .safetensors file there"
        raise InvalidRequest(field, str(pickles[0] if pickles else folder), hint)
    for file in files:
        read_header(file, field)


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, as hex digits; remembered until the file changes."""
    return _sha256(file, file.stat().st_mtime_ns)


def _from_folder(
    path: Path, name: str, hub_id: str | None = None, revision: str | None = None
) -> Model:
    if not (path / "model_index.json").is_file():
        raise InvalidRequest(
            "model", str(path), "not a model folder: it has no model_index.json (diffusers layout)"
        )
    index = read_json(path / "model_index.json")
    kind = index.get("_class_name")
    is_xl = kind in _XL_KINDS
    if kind not in _KINDS | _XL_KINDS:
        raise InvalidRequest("model", str(path), f"a {kind}; {_WE_DRAW}")
    parts = _XL_PARTS if is_xl else _PARTS
    if is_xl and index.get("text_encoder") in (None, [None, None]):
        raise InvalidRequest("model", str(path), "a refiner of SDXL; give the base model")
    for part in parts:
        config = "tokenizer_config.json" if part.startswith("tokenizer") else "config.json"
        config = "scheduler_config.json" if part == "scheduler" else config
        if not (path / part / config).is_file():
            raise InvalidRequest("model", str(path), f"its {part}/{config} is missing")
    if hub_id is None:
        for part in _WEIGHTS:
            if part in parts:
                check_weights(path / part)

    vae = read_json(path / "vae" / "config.json")
    unet = read_json(path / "unet" / "config.json")
    if vae.get("latents_mean") is not None:
        hint = "its autoencoder has a latents_mean, which latentgen does not know"
        raise InvalidRequest("model", str(path), hint)
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    factor = 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)
    sample = unet.get("sample_size") or 64
    rows, columns = sample if isinstance(sample, list) and len(sample) == 2 else (sample, sample)
    if not all(isinstance(side, int) for side in (rows, columns)):
        raise InvalidRequest("model", str(path), f"its U-Net's sample_size is {sample!r}")
    facts = {
        "vae_scale_factor": factor,
        "height": rows * factor,
        "width": columns * factor,
        "scheduler_class": scheduler.get("_class_name", ""),
        "prediction_type": scheduler.get("prediction_type", "epsilon"),
        "sees_mask": unet.get("in_channels") == 9,
        "embeds_guidance": unet.get("time_cond_proj_dim") is not None,
        "variant": variant_of(path / "unet"),
        "is_xl": is_xl,
    }
    if is_xl:
        facts["guidance_scale"] = XL_GUIDANCE
    own = path / "latentgen.json"
    if own.is_file():
        facts |= _own_defaults(own)
    return Model(name, path, hub_id, revision, **facts)


def weights_of(folder: Path) -> list[Path]:
    """The files of weights in a part's folder that are read: of a variant only where there are no
    others, and of `non_ema` never."""
    names = ("model", "diffusion_pytorch_model")
    files = sorted(f for f in folder.glob("*.safetensors") if f.name.startswith(names))
    files = [file for file in files if ".non_ema" not in file.name]
    return [file for file in files if ".fp16" not in file.name] or files


def variant_of(folder: Path) -> str | None:
    """ "fp16" if a part's weights are there in that variant only."""
    files = weights_of(folder)
    return "fp16" if files and ".fp16" in files[0].name else None


def _own_defaults(path: Path) -> dict[str, Any]:
    own = read_json(path)
    if unknown := sorted(own.keys() - _OWN.keys()):
        raise InvalidRequest("model", str(path), f"does not know {unknown}; knows {sorted(_OWN)}")
    for name, value in own.items():
        kind = _OWN[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InvalidRequest("model", str(path), f"its {name} is {value!r}")
    return own


def _kind(names: Set[str]) -> str | None:
    """What kind of file has tensors of these names, where that is plain."""
    if any(map(_OF_LORAS.search, names)):
        return "LoRA"
    if any(name.startswith(_OF_CHECKPOINTS) for name in names):
        return "model"
    return "embedding" if len(names) == 1 or names == {"clip_l", "clip_g"} else None


def _facts_of_checkpoint(file: Path) -> dict[str, Any]:
    shapes = read_header(file, "model", "model")
    if hint := _unfit(shapes):
        raise InvalidRequest("model", str(file), hint)
    is_xl = any(name.startswith("conditioner.embedders.1.") for name in shapes)
    sees_mask = _inputs(shapes) == 9
    words = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    is_2 = shapes.get(words, ())[-1:] == (1024,)
    predicts = schedule_of(file).get("prediction_type")
    if predicts is None:
        is_v = is_2 and not sees_mask and _spreads_as_v(file)
        predicts = "v_prediction" if is_v else "epsilon"
    size = 1024 if is_xl else 768 if is_2 and predicts == "v_prediction" else 512
    facts = {"height": size, "width": size, "prediction_type": predicts, "sees_mask": sees_mask}
    return facts | ({"is_xl": True, "guidance_scale": XL_GUIDANCE} if is_xl else {})


def _unfit(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What keeps a checkpoint of these tensors from being drawn with."""

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in shapes)

    if not has("model.diffusion_model."):
        return "no Stable Diffusion checkpoint: it holds no model.diffusion_model"
    if has("conditioner.embedders.0.model.text_projection"):
        return "a refiner of SDXL; give the base model"
    kinds = [kind for start, kind in _OTHER_KINDS.items() if has(start)]
    if kinds or (inputs := _inputs(shapes)) not in (4, 9):
        kind = kinds[0] if kinds else _OTHER_INPUTS.get(inputs, "a model of another kind")
        return f"{kind}; {_WE_DRAW}"
    for part, starts in _PARTS_OF_CHECKPOINTS.items():
        if not has(*starts):
            return f"its {part} is missing; give a checkpoint of the whole model, or a model folder"
    return None


def _inputs(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The input channels of a checkpoint's U-Net; 0: it is none of Stable Diffusion's."""
    _, channels, *_ = (*shapes.get("model.diffusion_model.input_blocks.0.0.weight", ()), 0, 0)
    return channels


def _spreads_as_v(file: Path) -> bool:
    """How ComfyUI tells that a U-Net of Stable Diffusion 2 predicts v, as those for 768 pixels do:
    by a bias that spreads wide. No, where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    bias = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    with safe_open(file, framework="numpy") as opened:
        try:
            return bool(opened.get_tensor(bias).astype("float32").std() > 0.09)
        except (SafetensorError, TypeError):  # there is none, or numpy does not know its numbers
            return False


@cache
def _sha256(file: Path, mtime_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
