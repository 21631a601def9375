"""Captioned pictures on disk: reading the folder, choosing subjects, writing captions."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Picture:
    """One line of `metadata.jsonl`: where the picture is, what it shows, in which style."""

    file_name: str
    name: str
    style: str
    labels: tuple[str, ...]
    keywords: tuple[str, ...]


def read_pictures(train_data_dir: Path) -> list[Picture]:
    """The folder's pictures in the order of its `metadata.jsonl`."""
    lines = (train_data_dir / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        Picture(
            row["file_name"],
            row["name"],
            row["style"],
            tuple(row["labels"]),
            tuple(row["keywords"]),
        )
        for row in map(json.loads, lines)
    ]


def load_pixels(train_data_dir: Path, pictures: list[Picture]) -> Tensor:
    """All pictures in memory: (N, 3, H, W), uint8."""
    arrays = [np.asarray(Image.open(train_data_dir / p.file_name)) for p in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def random_crops(pixels: Tensor, rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A `size`-px square from each of the rows, in [-1, 1]: (B, 3, size, size)."""
    height, width = pixels.shape[-2:]
    tops = torch.randint(0, height - size + 1, (len(rows),), generator=generator).tolist()
    lefts = torch.randint(0, width - size + 1, (len(rows),), generator=generator).tolist()
    crops = [
        pixels[row, :, top : top + size, left : left + size]
        for row, top, left in zip(rows.tolist(), tops, lefts, strict=True)
    ]
    return torch.stack(crops).float() / 127.5 - 1


def read_subjects(file: Path) -> dict[str, tuple[str, ...]]:
    """A subjects file: `icon-name: further name, another`, one a line; `#` begins a comment.

    Maps each name (spaces for dashes) to all its names, itself first.
    """
    subjects = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        icon, _, others = line.partition(":")
        if not icon.strip() or icon.startswith("#"):
            continue
        name = icon.strip().replace("-", " ")
        subjects[name] = (name, *(other.strip() for other in others.split(",") if other.strip()))
    return subjects


def caption_forms(name: str, style: str | None = None) -> tuple[str, ...]:
    """The ways people ask for a thing: "red apple", "a red apple", "a picture of a red apple",
    and the same with ", noto style" at the end when a style is given."""
    article = "an" if name[0] in "aeiou" else "a"
    forms = (name, f"{article} {name}", f"a picture of {article} {name}")
    styled = tuple(f"{form}, {style} style" for form in forms) if style is not None else ()
    return forms + styled
