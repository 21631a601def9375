"""From pictures on disk to what one step sees: pixels, what is cached, rows and randomness."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentgen.errors import TrainingError
from latentgen.images import load_image
from latentgen.training.config import DataConfig
from latentgen.training.pictures import Picture, check_pictures, read_folder


def read_data(
    config: DataConfig,
    *,
    captions: bool,
    at_most: int,
    too_long: Callable[[str], bool] = lambda caption: False,
) -> tuple[list[Picture], list[Picture], str]:
    """A run's pictures to train on, pictures held out to measure with (spread over their folder,
    at most so many), and the fingerprint of both. `too_long`: whether a caption would be cut."""
    check = partial(
        check_pictures,
        captions=captions,
        allow=config.allow,
        too_small=lambda size: 2 * min(size) < config.resolution,
        too_long=too_long,
        seen={},
    )
    checked = check(read_folder(config.train_data_dir, config.metadata_file))
    pictures, data = checked.pictures, checked.fingerprint
    if config.validation_data_dir is not None:
        checked = check(read_folder(config.validation_data_dir), at_least=1)
        unseen, data = checked.pictures, data + checked.fingerprint
    else:
        last = len(pictures) - 1
        held = [i % 50 == 49 or i == last for i in range(len(pictures))]
        unseen = [picture for picture, out in zip(pictures, held, strict=True) if out]
        pictures = [picture for picture, out in zip(pictures, held, strict=True) if not out]
    return pictures, unseen[:: -(-len(unseen) // at_most)], data


def pixel_batches(
    pictures: list[Picture], size: tuple[int, int], count: int = 64
) -> Iterator[Tensor]:
    """All pictures in order, scaled, never stretched, until they cover `size` (height, width), and
    the middle of that: (B, 3, height, width), uint8."""
    for start in range(0, len(pictures), count):
        arrays = [  # one photo in memory at a time
            np.asarray(ImageOps.fit(load_image(picture.file), size[::-1], Image.Resampling.LANCZOS))
            for picture in pictures[start : start + count]
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
    """What `make` computes, kept in the run's `cache` folder under a key of all it depends on.

    Raises TrainingError when it cannot be written.
    """
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    file = output_dir / "cache" / f"{name}.safetensors"
    if not file.is_file():
        values = make().contiguous()
        partial = file.with_suffix(f".{os.getpid()}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"values": values}, partial)
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(partial, file)
        except (OSError, SafetensorError) as error:  # a full disk, most of the time
            partial.unlink(missing_ok=True)
            raise TrainingError(f"{file} cannot be written: {error}") from error
    return load_file(file)["values"]


def weights_key(model: nn.Module) -> str:
    """A hash of all of a model's weights."""
    return tensors_key(model.state_dict())


def tensors_key(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors and their names."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


class Batch:
    """One process's share of one micro-batch: which rows, and their randomness.

    All that a step draws depends on the run's seed, the step's number and a picture's place in the
    step's whole batch. So a resumed run repeats nothing and skips nothing, and two processes, or
    two micro-batches, draw what one process with twice the batch draws.
    """

    def __init__(
        self, seed: int, step: int, rows: Tensor, places: slice, of_class: Tensor | None = None
    ) -> None:
        """`rows`: those of the step's whole batch, (total,), of which `places` are this share;
        `of_class`: and as many of the class, if there is one."""
        self.step = step
        self.rows = rows[places]  # (B,)
        self.of_class = None if of_class is None else of_class[places]  # (B,)
        self._seed = seed
        self._places = places
        self._total = len(rows)
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

    def timesteps(self, count: int) -> Tensor:
        """(B,), from 0 to `count` - 1, spread evenly over the step's whole batch: row k of n draws
        from the k-th n-th of them. Each is as likely as with `integers`, and the mean loss of a
        step varies less (Kingma et al. 2021, Variational Diffusion Models, I.1)."""
        places = torch.arange(self._total) + torch.rand(self._total, generator=self._generator)
        return (places / self._total * count).long().clamp(max=count - 1)[self._places]

    def integers(self, high: int) -> Tensor:
        """(B,), from 0 to `high` - 1."""
        return torch.randint(high, (self._total,), generator=self._generator)[self._places]


def step_generator(seed: int, step: int, purpose: int = 0) -> torch.Generator:
    """The randomness of one step as a function of numbers, so that resuming needs no state."""
    return torch.Generator("cpu").manual_seed((seed * 1_000_003 + step) * 1_009 + purpose)


class Order:
    """Which rows each step sees. The batch of a step comes from one group (pictures of one size),
    which is drawn in proportion to what is in it; the rows of a group come as in `batch_rows`."""

    def __init__(self, seed: int, groups: list[Tensor], total: int) -> None:
        self._seed = seed
        self._groups = groups
        self._total = total
        self._share = torch.tensor([len(group) for group in groups]).cumsum(0)
        self._batches = [0] * len(groups)  # that each group has given so far
        self._picked: list[tuple[int, int]] = []  # of each step: the group and which of its batches

    def rows(self, step: int) -> Tensor:
        """The whole batch of a step, (total,)."""
        group, nth = (0, step) if len(self._groups) == 1 else self._group(step)
        rows = batch_rows(self._seed + group, nth, self._total, len(self._groups[group]))
        return self._groups[group][rows]

    def _group(self, step: int) -> tuple[int, int]:
        while len(self._picked) <= step:
            generator = step_generator(self._seed, len(self._picked), purpose=2)
            drawn = torch.randint(int(self._share[-1]), (1,), generator=generator)
            group = int(torch.searchsorted(self._share, drawn, right=True))
            self._picked.append((group, self._batches[group]))
            self._batches[group] += 1
        return self._picked[step]


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
