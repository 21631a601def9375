"""How good a model's pictures are, measured by CLIP and by real pictures.

    clip_score          100 cos(picture, its prompt), the mean [1]
    retrieval_top_1/5   of how many pictures the own prompt is the nearest of all, or among the
                        five nearest; `retrieval_chance` is what a blind guess reaches
    kid                 kernel distance to a folder of real pictures in CLIP's features [2]: 0 is no
                        difference, and it needs no thousands of pictures as FID does
    diversity           cosine distance between pictures of one prompt from different seeds
    seconds_per_picture the only figure that differs when the same evaluation is run again

[1] Hessel et al. 2021, CLIPScore. [2] Binkowski et al. 2018, Demystifying MMD GANs.

A model folder may bring the image encoder that belongs to its text encoder; what that was trained
on is all it can judge. For other models, name a CLIP.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from .errors import InvalidRequest
from .images import contact_sheet
from .metadata import encode_result
from .modelfolder import fetch, is_hub_id
from .outputs import write_file
from .pipeline import LatentDiffusion, quietly
from .promptfile import PromptSet

__all__ = ["Evaluation", "Judge", "evaluate", "measure"]

KID_SUBSETS = 100
KID_SUBSET_SIZE = 100
BATCH = 32


@dataclass(frozen=True)
class Evaluation:
    """`metrics`: the figures by name. `settings`: what they were measured on. `files`: the pictures
    as PNG files that tell how they were drawn, if they were drawn here."""

    metrics: dict[str, float]
    settings: dict[str, Any]
    images: list[Image.Image]
    prompts: list[str]
    files: list[bytes] = field(default_factory=list)

    def save(self, folder: str | Path) -> list[Path]:
        """Write `evaluation.json`, the labelled `contact-sheet.png`, and every picture that was
        drawn here into the folder `pictures`, in place of those of an earlier evaluation."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        report = folder / "evaluation.json"
        facts = {"metrics": self.metrics, "settings": self.settings}
        report.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
        if self.files:
            (folder / "pictures").mkdir(exist_ok=True)
            for stale in (folder / "pictures").glob("[0-9][0-9][0-9][0-9].png"):
                stale.unlink()
            for i, file in enumerate(self.files):
                write_file(folder / "pictures" / f"{i:04d}.png", file)
        sheet = folder / "contact-sheet.png"
        each = len(self.images) // len(self.prompts)
        captions = [prompt for prompt in self.prompts for _ in range(each)]
        contact_sheet(list(map(_labelled, self.images, captions))).save(sheet)
        return [report, sheet]


class Judge:
    """CLIP: pictures and texts as unit vectors of one space."""

    def __init__(self, folder: str | Path) -> None:
        """`folder`: a CLIP in transformers' layout, a hub id, or a model folder with both a
        `text_encoder` and the `image_encoder` that was trained with it."""
        path = Path(folder)
        self.name = path.name
        processor: str | Path = path / "image_encoder"
        if (path / "image_encoder").is_dir():
            self.tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer")
            text = _load(CLIPTextModel, path / "text_encoder")
            vision = _load(CLIPVisionModelWithProjection, path / "image_encoder")
            self._read: Callable[[Tensor], Tensor] = lambda ids: text(ids).pooler_output
            self._see: Callable[[Tensor], Tensor] = lambda pixels: vision(pixels).image_embeds
        else:
            processor = folder
            hint = "a CLIP in transformers' layout, or a model folder with an image_encoder"
            if not path.is_dir():
                if not is_hub_id(folder):
                    raise InvalidRequest("clip", str(folder), f"no such folder; give {hint}")
                fetch(str(folder), ["*.json"], field="clip")  # at once, or not at all
            try:
                clip = _load(CLIPModel, folder)
            except (OSError, ValueError) as error:
                raise InvalidRequest("clip", str(folder), hint) from error
            self.tokenizer = CLIPTokenizer.from_pretrained(folder)
            self._read = lambda ids: clip.get_text_features(ids).pooler_output
            self._see = lambda pixels: clip.get_image_features(pixels).pooler_output
        self.processor = CLIPImageProcessorPil.from_pretrained(processor)

    @torch.no_grad()
    def read(self, texts: list[str]) -> Tensor:
        """(N, D), each of length 1. Texts longer than CLIP reads are cut at its 77 tokens."""
        ids = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").input_ids
        return torch.cat([F.normalize(self._read(part), dim=-1) for part in ids.split(BATCH)])

    @torch.no_grad()
    def see(self, images: list[Image.Image]) -> Tensor:
        """(N, D), each of length 1."""
        parts = []
        for start in range(0, len(images), BATCH):
            batch = [image.convert("RGB") for image in images[start : start + BATCH]]
            pixels = self.processor(images=batch, return_tensors="pt").pixel_values
            parts.append(F.normalize(self._see(pixels), dim=-1))
        return torch.cat(parts)


def evaluate(
    pipe: LatentDiffusion,
    prompts: PromptSet,
    judge: Judge,
    real: list[Image.Image] | None = None,
    num_images: int | None = None,
    seed: int | None = None,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
    **settings: Any,
) -> Evaluation:
    """Draw every prompt and measure the pictures.

    Args:
        real: pictures that the drawn ones should be like, for `kid`.
        num_images: of each prompt; None: what the prompt set says, or 1.
        seed: picture i of the set has the seed `seed + i`; None: what the prompt set says.
        on_picture: called with the number of pictures drawn and of all.
        settings: fields of a request that win over those of the prompt set.
    """
    each = num_images_of(prompts, num_images)
    if real is not None:
        _check_enough(len(prompts.entries) * each, len(real))
    images: list[Image.Image] = []
    files: list[bytes] = []
    total = len(prompts.entries) * each
    seconds = 0.0
    seeds = prompts.seeds([each] * len(prompts.entries), seed)
    for entry, first in zip(prompts.entries, seeds, strict=True):
        own = entry | settings | {"num_images": each, "seed": first}
        started = time.perf_counter()
        result = pipe.generate(**own)
        seconds += time.perf_counter() - started
        images += result.images
        files += [encode_result(result, k, "PNG") for k in range(each)]
        on_picture(len(images), total)
    metrics = measure(images, prompts.prompts, judge, real)
    metrics["seconds_per_picture"] = seconds / total
    one, *others = prompts.entries
    shared = {k: v for k, v in one.items() if all(other.get(k) == v for other in others)}
    facts = {
        **{name: value for name, value in shared.items() if name != "prompt"},
        "model": pipe.model.name,
        "prompts": prompts.name,
        "num_prompts": len(prompts.entries),
        "num_images": each,
        "seed": seeds[0],
        "clip": judge.name,
        "num_real": len(real) if real is not None else None,
        **settings,
    }
    return Evaluation(metrics, facts, images, prompts.prompts, files)


def num_images_of(prompts: PromptSet, num_images: int | None) -> int:
    """How many pictures a prompt gets: the same for all, or they could not be compared."""
    found = {entry.get("num_images", 1) for entry in prompts.entries}
    if num_images is None and len(found) > 1:
        raise InvalidRequest("num_images", sorted(found), "the prompts must have the same number")
    return num_images if num_images is not None else found.pop()


def measure(
    images: list[Image.Image],
    prompts: list[str],
    judge: Judge,
    real: list[Image.Image] | None = None,
) -> dict[str, float]:
    """The figures of pictures, an equal number for each prompt, in the order of the prompts."""
    if not prompts or not images or len(images) % len(prompts):
        hint = f"{len(prompts)} prompts need as many pictures each"
        raise InvalidRequest("images", f"{len(images)} pictures", hint)
    distinct = list(dict.fromkeys(prompts))
    texts, seen = judge.read(distinct), judge.see(images)
    each = len(images) // len(prompts)
    own = torch.tensor([distinct.index(prompt) for prompt in prompts]).repeat_interleave(each)
    similarity = seen @ texts.T  # (pictures, distinct prompts)
    metrics = {
        "clip_score": 100 * similarity[torch.arange(len(own)), own].mean().item(),
        "retrieval_chance": 1 / len(distinct),
    }
    for k in (1, 5):
        if k < len(distinct):
            accuracy = multiclass_accuracy(
                similarity, own, num_classes=len(distinct), average="micro", top_k=k
            )
            metrics[f"retrieval_top_{k}"] = accuracy.item()
    if each > 1:
        groups = seen.reshape(len(prompts), each, -1)
        pairs = groups @ groups.transpose(1, 2)  # (prompts, each, each)
        others = ~torch.eye(each, dtype=torch.bool)
        metrics["diversity"] = (1 - pairs[:, others]).mean().item()
    if real is not None:
        metrics["kid"] = _kid(seen, judge.see(real))
    return metrics


def _load(kind: Any, folder: str | Path) -> Any:
    return quietly(kind.from_pretrained, folder, use_safetensors=True)


def _kid(drawn: Tensor, real: Tensor) -> float:
    """KID with the kernel (cos + 1)^3, over subsets that are always the same."""
    _check_enough(len(drawn), len(real))
    size = min(len(drawn), len(real), KID_SUBSET_SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all features in memory
        metric = KernelInceptionDistance(torch.nn.Identity(), KID_SUBSETS, size, gamma=1.0)
    metric.update(drawn, real=False)
    metric.update(real, real=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return metric.compute()[0].item()


def _check_enough(drawn: int, real: int) -> None:
    if min(drawn, real) < 2:
        hint = f"KID needs two of each at least; there are {drawn} to compare them with"
        raise InvalidRequest("real", f"{real} pictures", hint)


def _labelled(image: Image.Image, caption: str) -> Image.Image:
    """The picture above its caption, as much of it as there is room for."""
    height = 14
    page = Image.new("RGB", (image.width + 4, image.height + height), "white")
    page.paste(image, (2, 0))
    draw = ImageDraw.Draw(page)
    caption = " ".join(caption.split())
    while draw.textlength(caption) > page.width - 4 and len(caption) > 1:
        caption = caption[:-2].rstrip() + "…"
    draw.text((2, image.height + 1), caption, fill="black")
    return page
