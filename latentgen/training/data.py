"""Captioned pictures on disk, checked before anything else is loaded, and the batches of a step.

A picture has any number of captions: ways to ask for it, one of which is drawn at each use.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentgen.errors import DataError, InvalidRequest
from latentgen.images import SUFFIXES, load_image
from latentgen.training.config import RunConfig

SHOWN = 10  # problems of one kind that an error lists by name


@dataclass(frozen=True)
class Picture:
    file: Path
    captions: tuple[str, ...]


def read_folder(folder: Path, metadata_file: str = "metadata.jsonl") -> list[Picture]:
    """The folder's pictures: the lines of its `metadata.jsonl` (`file_name` and `text`, a string
    or a list of strings), or without one every picture below it, captioned by the `.txt` file of
    the same name. Captions may be missing; `check_pictures` decides whether that is an error."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    listing = folder / metadata_file
    if listing.is_file():
        lines = enumerate(_read_text(listing).split("\n"), 1)
        return [_read_row(folder, listing, n, line) for n, line in lines if line.strip()]
    if metadata_file != "metadata.jsonl":
        raise DataError(f"{listing} does not exist")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    return [Picture(file, _text_beside(file)) for file in files]


def check_pictures(
    pictures: list[Picture], *, captions: bool = True, allow_duplicates: bool = False
) -> str:
    """Open every picture and raise one DataError that names all that is wrong: none or only one,
    missing, unreadable or truncated files, no caption, the same pixels twice.

    Returns the data's fingerprint (SHA-256 over pixels and captions), which a run remembers.
    """
    if len(pictures) < 2:
        found = "no picture" if not pictures else f"only one picture, {pictures[0].file}"
        raise DataError(f"found {found}; at least two are needed, {sorted(SUFFIXES)}")
    problems: dict[str, list[str]] = {}
    seen: dict[str, Path] = {}
    fingerprint = hashlib.sha256()
    for picture in pictures:
        if captions and not picture.captions:
            problems.setdefault("without a caption", []).append(f"{picture.file}")
        try:
            image = load_image(picture.file)
        except InvalidRequest as error:
            kind = "unreadable" if picture.file.exists() else "missing"
            problems.setdefault(kind, []).append(f"{picture.file}: {error.hint}")
            continue
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        if digest in seen and not allow_duplicates:
            problems.setdefault("duplicates", []).append(f"{picture.file} = {seen[digest]}")
        seen.setdefault(digest, picture.file)
        fingerprint.update(digest.encode())
        if captions:
            fingerprint.update("\n".join(picture.captions).encode())
    if problems:
        raise DataError("\n".join(_tell(kind, names) for kind, names in problems.items()))
    return fingerprint.hexdigest()


def read_data(
    config: RunConfig, *, captions: bool, at_most: int
) -> tuple[list[Picture], list[Picture], str]:
    """A run's pictures to train on, pictures held out to measure with (spread over their folder,
    at most so many), and the fingerprint of both."""
    twice = config.allow_duplicates
    pictures = read_folder(config.train_data_dir, config.metadata_file)
    data = check_pictures(pictures, captions=captions, allow_duplicates=twice)
    if config.validation_data_dir is not None:
        unseen = read_folder(config.validation_data_dir)
        data += check_pictures(unseen, captions=captions, allow_duplicates=twice)
    else:
        last = len(pictures) - 1
        held = [i % 50 == 49 or i == last for i in range(len(pictures))]
        unseen = [picture for picture, out in zip(pictures, held, strict=True) if out]
        pictures = [picture for picture, out in zip(pictures, held, strict=True) if not out]
    return pictures, unseen[:: -(-len(unseen) // at_most)], data


def pixel_batches(pictures: list[Picture], resolution: int, size: int = 64) -> Iterator[Tensor]:
    """All pictures in order, the shorter side scaled to `resolution` and the middle square of it:
    (B, 3, resolution, resolution), uint8."""
    for start in range(0, len(pictures), size):
        images = [load_image(picture.file) for picture in pictures[start : start + size]]
        square = (resolution, resolution)
        arrays = [
            np.asarray(ImageOps.fit(image, square, Image.Resampling.LANCZOS)) for image in images
        ]
        yield torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def to_signal(pixels: Tensor) -> Tensor:
    """Bytes to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pictures(signal: Tensor) -> list[Image.Image]:
    """[-1, 1], (B, 3, H, W), to pictures; what is outside is clamped."""
    values = ((signal.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in values.cpu()]


def random_crops(pixels: Tensor, size: int, tops: Tensor, lefts: Tensor) -> Tensor:
    """A `size`-px square of each picture, at the given corners: (B, 3, size, size)."""
    crops = [
        picture[:, top : top + size, left : left + size]
        for picture, top, left in zip(pixels, tops.tolist(), lefts.tolist(), strict=True)
    ]
    return torch.stack(crops)


def cached(output_dir: Path, key: str, make: Callable[[], Tensor]) -> Tensor:
    """What `make` computes, kept in the run's `cache` folder under a key of all it depends on."""
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    file = output_dir / "cache" / f"{name}.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        save_file({"values": make().contiguous()}, partial)
        os.replace(partial, file)
    return load_file(file)["values"]


def weights_key(model: nn.Module) -> str:
    """A hash of all of a model's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Batch:
    """One process's share of one micro-batch: which rows, and their randomness.

    All that a step draws depends on the run's seed, the step's number and a picture's place in the
    step's whole batch. So a resumed run repeats nothing and skips nothing, and two processes, or
    two micro-batches, draw what one process with twice the batch draws.
    """

    def __init__(self, seed: int, step: int, places: slice, total: int, size: int) -> None:
        """`total` places in the step's whole batch, of which `places` are this share; `size`
        pictures in the data set."""
        self.step = step
        self._seed = seed
        self.rows = batch_rows(seed, step, total, size)[places]  # (B,)
        self._places = places
        self._total = total
        self._generator = step_generator(seed, step)

    def rows_of(self, size: int, count: int) -> Tensor:
        """`count` rows of another list of `size`, for this share: (count,)."""
        share = len(self.rows)
        start = self._places.start // share * count
        total = self._total // share * count
        return batch_rows(self._seed, self.step, total, size)[start : start + count]

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape), from N(0, 1)."""
        return torch.randn((self._total, *shape), generator=self._generator)[self._places]

    def uniform(self) -> Tensor:
        """(B,), from [0, 1)."""
        return torch.rand(self._total, generator=self._generator)[self._places]

    def integers(self, high: int) -> Tensor:
        """(B,), from 0 to `high` - 1."""
        return torch.randint(high, (self._total,), generator=self._generator)[self._places]


def step_generator(seed: int, step: int, purpose: int = 0) -> torch.Generator:
    """The randomness of one step as a function of numbers, so that resuming needs no state."""
    return torch.Generator("cpu").manual_seed((seed * 1_000_003 + step) * 1_009 + purpose)


def batch_rows(seed: int, step: int, total: int, size: int) -> Tensor:
    """The rows of a step: every epoch is a permutation of its own, and batches run on across
    epochs, so that no row is dropped and any step's batch can be named without the ones before."""
    positions = torch.arange(step * total, (step + 1) * total)
    rows = torch.empty_like(positions)
    for epoch in torch.unique(positions // size).tolist():
        order = torch.randperm(size, generator=step_generator(seed, epoch, purpose=1))
        inside = positions // size == epoch
        rows[inside] = order[positions[inside] % size]
    return rows


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}") from error


def _read_row(folder: Path, listing: Path, number: int, line: str) -> Picture:
    try:
        row = json.loads(line)
        name, text = row["file_name"], row.get("text", [])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        name = text = None
    captions = [text] if isinstance(text, str) else text
    right = isinstance(captions, list) and all(isinstance(one, str) for one in captions)
    if not right or not isinstance(name, str):
        needed = '{"file_name": "…", "text": "…"}, where text may be a list'
        raise DataError(f"{listing}, line {number} must be {needed}; it is {line[:80]}")
    return Picture(folder / name, tuple(caption for caption in captions if caption.strip()))


def _text_beside(file: Path) -> tuple[str, ...]:
    caption = file.with_suffix(".txt")
    if not caption.is_file():
        return ()
    text = _read_text(caption).strip()
    return (text,) if text else ()


def _tell(kind: str, names: list[str]) -> str:
    more = f"\n  and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {kind}:\n  " + "\n  ".join(names[:SHOWN]) + more
