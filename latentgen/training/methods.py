"""Which weights learn, and what file they become: LoRA, a new word, or everything.

Papers: Hu et al. 2021, LoRA; Liu et al. 2024, DoRA; Kalajdzievski 2023, rank-stabilised LoRA;
Gal et al. 2022, textual inversion; Roich et al. 2021, pivotal tuning (both at once).
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from latentgen.embeddings import add_word, parts_of_word, said
from latentgen.errors import DataError, TrainingError
from latentgen.lora import collect_lora, lora_metadata, write_lora
from latentgen.pipeline import LatentDiffusion
from latentgen.training.config import MANIFEST, at_least, flag, needs
from latentgen.training.finetune import Method
from latentgen.training.lesson import FineTuneConfig, Lesson
from latentgen.training.pictures import Picture

TEXT_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj"]


@dataclass(kw_only=True)
class LoraConfigFlags(FineTuneConfig):
    """The settings of a LoRA."""

    rank: int = flag(8, help="numbers between the two matrices of a layer")
    lora_alpha: float | None = flag(None, help="strength times rank; default: the rank")
    lora_dropout: float = flag(0.0, help="of what goes into the layers, while training")
    target_modules: list[str] = flag(
        ["to_q", "to_k", "to_v", "to_out.0"], help="ends of the names of the U-Net's layers"
    )
    use_dora: bool = flag(False, help="learn directions and lengths apart")
    use_rslora: bool = flag(False, help="divide by the root of the rank")
    train_text_encoder: bool = flag(False, help="its attention layers learn too")
    text_encoder_lr: float | None = flag(None, help="their rate; default: --learning_rate")
    lora_layout: Literal["kohya", "diffusers", "peft"] = flag("kohya", help="of the file")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "rank", 1)
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha: {self.lora_alpha}; use more than 0, the strength of it")
        if self.text_encoder_lr is not None and self.text_encoder_lr <= 0:
            raise ValueError(f"text_encoder_lr: {self.text_encoder_lr}; use more than 0")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: {self.lora_dropout} is not in [0, 1)")
        needs(self, ["text_encoder_lr"], self.train_text_encoder, "--train_text_encoder")


@dataclass(kw_only=True)
class WordFlags(FineTuneConfig):
    """The settings of a new word."""

    placeholder_token: str | None = flag(None, help="the new word, as it stands in the captions")
    initializer_token: str = flag("thing", help="a word that it begins as")
    num_vectors: int = flag(1, help="embeddings that make up the word")
    embedding_lr: float = flag(5e-3, help="their rate")

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ["initializer_token", "num_vectors", "embedding_lr"]
        needs(self, names, self.placeholder_token is not None, "--placeholder_token")
        at_least(self, "num_vectors", 1)
        if self.embedding_lr <= 0:
            raise ValueError(f"embedding_lr: {self.embedding_lr}; use more than 0")


def lora_method(config: LoraConfigFlags, trigger_phrase: str | None = None) -> Method:
    """Low-rank changes of the U-Net's layers and, if asked for, the text encoder's."""

    def adapt(unet: nn.Module, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        _inject(config, unet, config.target_modules)
        if config.train_text_encoder:
            _inject(config, text_encoder, TEXT_MODULES)

    def export(
        pipe: LatentDiffusion, lesson: Lesson, folder: Path, manifest: dict[str, Any]
    ) -> None:
        lora = collect_lora(pipe.unet, pipe.text_encoder if config.train_text_encoder else None)
        layer = next(iter(lora.layers.values()))  # all have the same rank and strength
        prediction_type = pipe.scheduler.config.prediction_type
        resolution = config.resolution if config.resolution is not None else pipe.model.height
        network = {"use_dora": config.use_dora, "use_rslora": config.use_rslora}
        metadata = lora_metadata(
            title=config.name,
            base_model=pipe.model.name,
            rank=layer.rank,
            alpha=layer.alpha,
            prediction_type=prediction_type,
            resolution=resolution,
            trigger_phrase=trigger_phrase or lesson.shared_phrase(),
            architecture=architecture(pipe.unet.config.cross_attention_dim, prediction_type),
            network_args=network,
            manifest=manifest,
        )
        metadata["ss_seed"] = str(config.seed)
        metadata["ss_tag_frequency"] = json.dumps(lesson.tag_frequency())
        # the other layouts have a file name of their own, by which their readers know them
        names = {"kohya": f"{config.name}.safetensors", "peft": config.name}
        name = names.get(config.lora_layout, "pytorch_lora_weights.safetensors")
        lora.metadata.update(metadata)
        write_lora(lora, folder / name, config.lora_layout)

    text_rate = config.text_encoder_lr
    share = 1.0 if text_rate is None else text_rate / config.learning_rate

    def rate_of(name: str) -> float:
        return share if name.startswith("text_encoder.") else 1.0

    return Method(adapt, export, rate_of)


def architecture(width: int, prediction_type: str) -> str:
    """ModelSpec's name of a family, by the width of its token states and what it predicts."""
    if width != 1024:
        return "stable-diffusion-v1"
    kind = "768-v" if prediction_type == "v_prediction" else "512"
    return f"stable-diffusion-v2-{kind}"


def word_method(config: WordFlags, rate: float) -> Method:
    """The embeddings of a new word, at their learning rate; everything else stays as it is."""
    token = config.placeholder_token
    assert token is not None

    def adapt(unet: nn.Module, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        begin = tokenizer(config.initializer_token, add_special_tokens=False).input_ids
        if not begin:
            raise TrainingError(f"initializer_token: {config.initializer_token!r} is no word")
        ids = add_word(tokenizer, token, config.num_vectors, "placeholder_token")
        base = text_encoder.get_input_embeddings()
        if ids[0] != base.num_embeddings:
            raise TrainingError("the model's tokenizer and text encoder count different words")
        known = base.weight[torch.tensor(begin)]  # (tokens, D)
        vectors = known.mean(0, keepdim=True).repeat(config.num_vectors, 1)
        text_encoder.set_input_embeddings(WordEmbedding(base, vectors))

    def export(
        pipe: LatentDiffusion, lesson: Lesson, folder: Path, manifest: dict[str, Any]
    ) -> None:
        vectors = pipe.text_encoder.get_input_embeddings().learned  # (num_vectors, D)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {token: vectors.detach().float().cpu().contiguous()},
            folder / f"{config.name}.safetensors",
            {MANIFEST: json.dumps(manifest, sort_keys=True)},
        )

    return Method(adapt, export, lambda name: rate / config.learning_rate)


def whole_method(train_text_encoder: bool) -> Method:
    """All weights of the U-Net, and of the text encoder if asked for; the result is a model."""

    def adapt(unet: nn.Module, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        unet.requires_grad_(True)
        text_encoder.requires_grad_(train_text_encoder)

    def export(
        pipe: LatentDiffusion, lesson: Lesson, folder: Path, manifest: dict[str, Any]
    ) -> None:
        pipe.save_pretrained(folder)
        (folder / "latentgen_manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")

    return Method(adapt, export, whole=True)


def both(lora: Method, word: Method, word_folder: str) -> Method:
    """A LoRA and a word at once; the word's file goes into a folder of its own."""

    def adapt(unet: nn.Module, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        lora.adapt(unet, text_encoder, tokenizer)
        word.adapt(unet, text_encoder, tokenizer)

    def export(
        pipe: LatentDiffusion, lesson: Lesson, folder: Path, manifest: dict[str, Any]
    ) -> None:
        lora.export(pipe, lesson, folder, manifest)
        word.export(pipe, lesson, folder / word_folder, manifest)

    def rate_of(name: str) -> float:
        return (word if name.endswith(".learned") else lora).rate_of(name)

    return Method(adapt, export, rate_of)


class WordEmbedding(nn.Module):
    """A text encoder's embeddings, frozen, and those of new words behind them, which learn."""

    def __init__(self, base: nn.Embedding, vectors: Tensor) -> None:
        super().__init__()
        self.base = base
        self.learned = nn.Parameter(vectors.detach().clone())  # (new, D)

    def forward(self, ids: Tensor) -> Tensor:
        """(…,) ids to (…, D)."""
        first = self.base.num_embeddings
        known = self.base(ids.clamp(max=first - 1))
        new = F.embedding((ids - first).clamp(min=0), self.learned).to(known.dtype)
        return torch.where((ids >= first).unsqueeze(-1), new, known)


def saying_word(picture: Picture, config: WordFlags) -> Picture:
    """The picture with every part of the new word in its captions, each of which must hold it."""
    token = config.placeholder_token
    assert token is not None
    if silent := [caption for caption in picture.captions if not said(token).search(caption)]:
        raise DataError(f"{picture.file}: its caption does not hold {token}: {silent[0]!r}")
    parts = " ".join(parts_of_word(token, config.num_vectors))
    captions = tuple(said(token).sub(lambda _: parts, caption) for caption in picture.captions)
    return replace(picture, captions=captions)


def _inject(config: LoraConfigFlags, model: nn.Module, target_modules: list[str]) -> None:
    paths = [path for path, one in model.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)]
    for end in target_modules:
        if not any(path == end or path.endswith(f".{end}") for path in paths):
            ends = sorted({re.split(r"\.(?=\D)", path)[-1] for path in paths})
            raise TrainingError(f"target_modules: no layer ends in {end!r}; some of: {ends}")
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha if config.lora_alpha is not None else config.rank,
        lora_dropout=config.lora_dropout,
        target_modules=target_modules,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        init_lora_weights="gaussian",
    )
    inject_adapter_in_model(settings, model)
