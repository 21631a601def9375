"""The pictures of a fine-tuning: the settings, what they name, and what was found there.

All of it happens before any weights are read; of the model it knows its configuration and its
tokenizer.
"""

import atexit
import json
from collections import Counter
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPTokenizer

from latentgen import modelfolder
from latentgen.errors import DataError, TrainingError
from latentgen.images import picture_files
from latentgen.modelfolder import Model
from latentgen.outputs import write_file
from latentgen.training.buckets import Size, bucket_of, bucket_sizes
from latentgen.training.config import RunConfig, at_least, flag, needs
from latentgen.training.pictures import (
    ALLOWABLE,
    Checked,
    Picture,
    check_pictures,
    load_loss_mask,
    read_dataset,
    read_folder,
    read_kohya,
    shuffled,
    with_masks,
)
from latentgen.training.preflight import bucket_table

STEPS = 500
BUNDLED = Path(modelfolder.DEFAULT_MODEL).name


@dataclass(kw_only=True)
class FineTuneConfig(RunConfig):
    """The model, the pictures, and how they are used."""

    pretrained_model_name_or_path: str = flag(BUNDLED, help="a model folder or a hub id")
    revision: str | None = flag(None, help="its branch, tag or commit on the hub")
    train_data_dir: Path | None = flag(None, help="a folder of pictures with captions")
    metadata_file: str = flag("metadata.jsonl", help="the listing inside --train_data_dir")
    dataset_name: str | None = flag(None, help="or a Hugging Face dataset: hub id or folder")
    image_column: str = flag("image", help="of that dataset")
    caption_column: str = flag("text", help="of that dataset")
    dataset_config: Path | None = flag(None, help="or a TOML in kohya's format")
    mask_data_dir: Path | None = flag(
        None, help="loss masks: pictures of the same names, white = train"
    )
    validation_data_dir: Path | None = flag(None, help="pictures that measure")
    num_held_out: int | None = flag(
        None, help="or so many of the training's; default: a tenth, of 20 or more"
    )
    allow: list[str] = flag([], choices=list(ALLOWABLE), help="what may be wrong with pictures")
    resolution: int | None = flag(None, help="side of a square as large as a picture; the model's")
    enable_bucket: bool = flag(True, help="keep shapes; without, the middle square is taken")
    min_bucket_reso: int | None = flag(None, help="shortest side; half the resolution")
    max_bucket_reso: int | None = flag(None, help="longest side; twice the resolution")
    bucket_reso_steps: int | None = flag(None, help="sides are multiples of it; the model's least")
    bucket_no_upscale: bool = flag(False, help="never enlarge a picture to fill its bucket")
    random_flip: bool = flag(False, help="mirror half of the pictures")
    repeats: int = flag(1, help="how often a picture comes in an epoch")
    shuffle_caption: bool = flag(False, help="the tags of a caption, 'a, b, c', in any order")
    keep_tokens: int = flag(0, help="tags that stay in front")
    proportion_empty_prompts: float = flag(0.0, help="captions dropped")
    noise_offset: float = flag(0.0, help="noise of one value a channel, for dark and bright")
    snr_gamma: float | None = flag(None, help="min-SNR weighting; 5 is usual")
    loss: Literal["l2", "l1", "huber"] = flag("l2", help="of the prediction's error")
    prior_loss_weight: float = flag(
        1.0, help="of pictures that show the class (prior preservation)"
    )
    gradient_checkpointing: bool = flag(False, help="less memory for more time")
    enable_xformers_memory_efficient_attention: bool = flag(False, help="xformers, on CUDA")
    max_train_steps: int = flag(0, help=f"steps of the optimizer; default: {STEPS}")
    num_train_epochs: int | None = flag(None, help="or how often to see all pictures")
    train_batch_size: int = flag(4, help="pictures a process and micro-batch")
    learning_rate: float = flag(1e-4, help="its highest value")
    lr_scheduler: Literal["cosine", "linear", "constant"] = flag(
        "constant", help="how it falls to zero after the warm-up, if it does"
    )
    lr_warmup_steps: int = flag(0, help="steps of a linear rise from zero")
    adam_beta2: float = flag(0.999, help="AdamW: memory of its square")
    ema_decay: float = flag(0.0, help="of the averaged weights, which are the result; 0: none")
    validation_steps: int = flag(100, help="steps between measurements and sample pictures")
    checkpointing_steps: int = flag(100, help="steps between checkpoints")
    validation_prompts: list[str] = flag(
        [], aliases=["--validation_prompt"], help="of the sample pictures, before and after"
    )
    output_name: str | None = flag(None, help="of the file; default: that of --output_dir")
    dry_run: bool = flag(False, help="check everything, say what would be done, and stop")
    expect_data: str | None = flag(None, help="stop unless the data has this fingerprint")
    expect_model: list[str] = flag([], help="stop unless the model's files have these hashes")
    expect_processes: int | None = flag(None, help="stop unless so many processes train")

    def __post_init__(self) -> None:
        if self.max_train_steps and self.num_train_epochs is not None:
            raise ValueError("give max_train_steps or num_train_epochs, not both")
        if self.num_train_epochs is not None and self.num_train_epochs < 1:
            raise ValueError(f"num_train_epochs: {self.num_train_epochs}; use 1 or more")
        if self.max_train_steps == 0:
            self.max_train_steps = STEPS  # or what the epochs come to, once they are counted
        super().__post_init__()
        sources = [self.train_data_dir, self.dataset_name, self.dataset_config]
        if sum(source is not None for source in sources) != 1:
            raise ValueError(
                "give the pictures as one of --train_data_dir, --dataset_name, --dataset_config"
            )
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise ValueError(
                f"proportion_empty_prompts: {self.proportion_empty_prompts} is not in [0, 1]"
            )
        at_least(self, "repeats", 1)
        for name in ("num_held_out", "keep_tokens", "snr_gamma", "prior_loss_weight"):
            if getattr(self, name) is not None:
                at_least(self, name, 0)
        if any(not prompt.strip() for prompt in self.validation_prompts):
            raise ValueError("validation_prompts: one of them is empty")
        if self.optimizer != "adamw":
            raise ValueError(
                "optimizer: fine-tuning learns with adamw; muon is for training from zero"
            )
        if self.output_name is not None and (
            not self.output_name.strip() or Path(self.output_name).name != self.output_name
        ):
            raise ValueError(f"output_name: {self.output_name!r} is no plain name")
        needs(self, ["metadata_file"], self.train_data_dir is not None, "--train_data_dir")
        columns = ["image_column", "caption_column"]
        needs(self, columns, self.dataset_name is not None, "--dataset_name")
        needs(self, ["num_held_out"], self.validation_data_dir is None, "held-out pictures")
        needs(self, ["keep_tokens"], self.shuffle_caption, "--shuffle_caption")
        if self.shuffle_caption and self.dataset_config is not None:
            raise ValueError("shuffle_caption: say it in the file of --dataset_config")
        if self.dataset_config is None:  # a kohya file says all of them at once
            names = ["min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"]
            needs(self, names, self.enable_bucket, "--enable_bucket")

    @property
    def name(self) -> str:
        """Of the file that comes out."""
        own = self.output_name
        return own if own is not None else self.output_dir.resolve().name


@dataclass(frozen=True)
class Prior:
    """Pictures of the class that a subject belongs to: those in `folder`, to which the model adds
    until there are `count`, all captioned `prompt`."""

    folder: Path
    prompt: str
    count: int

    @property
    def note(self) -> Path:
        """The file that says of which prompt, and by which model, pictures were drawn."""
        return self.folder / "drawn.json"

    def pictures(self) -> list[Picture]:
        """Those that are there. Raises DataError when they were drawn for another prompt."""
        drawn = self._drawn("prompt")
        if drawn not in (None, self.prompt):
            raise DataError(f"{self.folder} holds pictures of {drawn!r}")
        files = picture_files(self.folder) if self.folder.is_dir() else []
        return [Picture(file, (self.prompt,), is_reg=True) for file in files]

    def check_model(self, hashes: list[str]) -> None:
        """Raises DataError when pictures were drawn by a model of other hashes: they would teach
        how that one draws the class."""
        if self._drawn("model") not in (None, hashes):
            raise DataError(
                f"{self.folder} holds pictures drawn by another model; name another "
                "--class_data_dir, or remove them to have them drawn again"
            )

    def _drawn(self, fact: str) -> Any:
        there = self.note.exists() and picture_files(self.folder)
        return modelfolder.read_json(self.note).get(fact) if there else None

    def write_note(self, hashes: list[str]) -> None:
        """Say what pictures are about to be drawn of, and by the model of which hashes."""
        note = {"prompt": self.prompt, "model": hashes}
        write_file(self.note, json.dumps(note, indent=2).encode() + b"\n")

    def missing(self) -> list[Path]:
        """The files that are to be drawn, named by their seeds."""
        files = [self.folder / f"{seed:04d}.png" for seed in range(self.count)]
        missing = [file for file in files if not file.exists()]
        return missing[: max(0, self.count - len(self.pictures()))]


def find_model(config: FineTuneConfig) -> Model:
    """The model's facts, without its weights."""
    name = config.pretrained_model_name_or_path
    found = modelfolder.find(
        modelfolder.DEFAULT_MODEL if name == BUNDLED else name, config.revision
    )
    if found.is_single_file:
        raise TrainingError(
            f"{name}: training needs a model folder; make one with "
            "LatentDiffusion.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if found.is_xl:
        raise TrainingError(f"{name} is an SDXL model: such are drawn with, not trained here")
    if found.sees_mask:
        raise TrainingError(f"{name} is an inpainting model (nine channels); train the plain one")
    return found


def read_pictures(config: FineTuneConfig) -> list[Picture]:
    """The pictures that the settings name, with the settings that concern them all."""
    if config.train_data_dir is not None:
        pictures = read_folder(config.train_data_dir, config.metadata_file)
    elif config.dataset_name is not None:
        exported = config.output_dir / "cache" / "dataset"
        if config.dry_run:  # which leaves nothing behind
            passing = TemporaryDirectory()
            atexit.register(passing.cleanup)
            exported = Path(passing.name)
        columns = (config.image_column, config.caption_column)
        pictures = read_dataset(config.dataset_name, *columns, exported)
    else:
        assert config.dataset_config is not None
        pictures = read_kohya(config.dataset_config, config.seed)
    if config.shuffle_caption:
        pictures = [
            replace(
                picture,
                captions=tuple(
                    order
                    for caption in picture.captions
                    for order in shuffled(caption, config.keep_tokens, config.seed)
                ),
            )
            for picture in pictures
        ]
    if config.mask_data_dir is not None:
        pictures = with_masks(pictures, config.mask_data_dir)
    return [
        replace(
            picture,
            repeats=picture.repeats * config.repeats,
            random_flip=picture.random_flip or config.random_flip,
        )
        for picture in pictures
    ]


class Lesson:
    """The pictures of a run, checked and sorted: instances to learn, the class to preserve, those
    held out to measure with, and the bucket of each."""

    def __init__(
        self,
        config: FineTuneConfig,
        found: Model,
        tokenizer: CLIPTokenizer,
        pictures: list[Picture],
        unseen: list[Picture] | None,
    ) -> None:
        """`unseen`: pictures to measure with; None: some of `pictures` are held out."""
        self._config = config
        self._choose_sizes(config, found)
        self.limit = tokenizer.model_max_length - 2
        self._length = lambda caption: len(tokenizer(caption, add_special_tokens=False).input_ids)

        self._seen: dict[str, Path] = {}  # a picture must not be of two kinds, either
        instances = self._check([picture for picture in pictures if not picture.is_reg])
        self.warnings = [instances.warnings]
        self.fingerprint = instances.fingerprint
        if unseen is None:
            instances, held_out = _hold_out(instances, config.num_held_out)
        else:
            held_out = self._check(unseen, at_least=1)
            self.warnings.append(held_out.warnings)
            self.fingerprint += f" {held_out.fingerprint}"
        self.instances, self.unseen = instances.pictures, held_out.pictures
        self.buckets = [self.bucket(size) for size in instances.sizes]
        self.unseen_buckets = [self.bucket(size) for size in held_out.sizes]
        for picture, size in zip(self.instances, self.buckets, strict=True):
            if picture.mask is not None and fitted_mask(picture, size).getextrema() == (0, 0):
                raise DataError(f"{picture.mask}: nothing of its white is left in the bucket")
        self.classes: list[Picture] = []
        self.class_buckets: list[Size] = []
        if of_class := [picture for picture in pictures if picture.is_reg]:
            self.add_class(of_class)

    def add_class(self, pictures: list[Picture]) -> None:
        """Add pictures of the class; they are checked like all others."""
        checked = self._check(pictures, at_least=1)
        self.warnings.append(checked.warnings)
        self.fingerprint += f" {checked.fingerprint}"
        self.classes += checked.pictures
        self.class_buckets += [self.bucket(size) for size in checked.sizes]

    def _choose_sizes(self, config: FineTuneConfig, found: Model) -> None:
        """The buckets there may be."""
        side = config.resolution if config.resolution is not None else found.height
        factor = found.vae_scale_factor
        usual = factor * 2 ** (len(found.unet_config()["block_out_channels"]) - 1)
        self.step = config.bucket_reso_steps if config.bucket_reso_steps is not None else usual
        for name, value in (("resolution", side), ("bucket_reso_steps", self.step)):
            if value < 1 or value % factor:
                raise DataError(f"{name}: {value} is no multiple of {factor}, as the model needs")
        self.square = (side, side)
        shortest, longest = config.min_bucket_reso, config.max_bucket_reso
        shortest = shortest if shortest is not None else side // 2
        longest = longest if longest is not None else 2 * side
        self.sizes = bucket_sizes(side, self.step, shortest, longest)
        if config.enable_bucket and not self.sizes:
            raise DataError(f"no bucket has sides from {shortest} to {longest}")

    def _check(self, pictures: list[Picture], at_least: int = 2) -> Checked:
        return check_pictures(
            pictures,
            allow=self._config.allow,
            too_small=self._too_small,
            too_long=lambda caption: self._length(caption) > self.limit,
            at_least=at_least,
            seen=self._seen,
        )

    def _too_small(self, size: tuple[int, int]) -> bool:
        """Whether a picture (width, height) would be enlarged more than twice."""
        height, width = self.bucket(size)
        return max(width / size[0], height / size[1]) > 2

    def groups(self) -> list[Tensor]:
        """The rows of each bucket, a picture as often as it is repeated."""
        return _groups(self.instances, self.buckets)

    def class_groups(self) -> list[Tensor]:
        """The same of the pictures of the class."""
        return _groups(self.classes, self.class_buckets)

    def describe(self) -> str:
        """What is there, and what is wrong with it but allowed."""
        captions = [caption for picture in self.instances for caption in picture.captions]
        lengths = [self._length(caption) for caption in captions]
        flips = sum(picture.random_flip for picture in self.instances)
        masks = sum(picture.mask is not None for picture in self.instances)
        facts = [
            f"{len(self.instances)} pictures, {len(captions)} captions of "
            f"{min(lengths)} to {max(lengths)} tokens (at most {self.limit})",
            *([f"{flips} may be mirrored"] if flips else []),
            *([f"{masks} with a loss mask"] if masks else []),
            *([f"{len(self.classes)} pictures of the class"] if self.classes else []),
            f"{len(self.unseen)} held out to measure with"
            if self.unseen
            else "none held out: the loss at fixed noise is that of pictures it trains on",
        ]
        example = f"first caption: {captions[0]!r}"
        warnings = [warning for warning in self.warnings if warning]
        parts = [("bucket", self.instances, self.buckets)]
        parts += [("the class", self.classes, self.class_buckets)] if self.classes else []
        tables = [
            bucket_table(title, buckets, [picture.repeats for picture in pictures])
            for title, pictures, buckets in parts
        ]
        return "\n".join([*warnings, *facts, example, *tables])

    def shared_phrase(self) -> str | None:
        """The words with which all captions end or begin, up to a comma: what calls a style."""
        words = [c.split() for picture in self.instances for c in picture.captions]
        head = " ".join(_common_beginning(words)).partition(",")[0]
        tail = " ".join(_common_beginning([row[::-1] for row in words])[::-1]).rpartition(",")[2]
        longest = max(tail.strip(), head.strip(), key=len)
        return longest if len(longest) > 3 else None  # not of an article

    def tag_frequency(self) -> dict[str, dict[str, int]]:
        """How many pictures of each folder have a tag: the captions' parts between commas."""
        found: dict[str, Counter[str]] = {}
        for picture in self.instances:
            parts = {part.strip() for c in picture.captions for part in c.split(",")} - {""}
            found.setdefault(picture.file.parent.name, Counter()).update(parts)
        return {folder: dict(sorted(tags.items())) for folder, tags in found.items()}

    def epoch(self) -> int:
        """Pictures in an epoch."""
        return sum(picture.repeats for picture in self.instances)

    def bucket(self, size: tuple[int, int]) -> Size:
        """Of a picture (width, height)."""
        if not self._config.enable_bucket:
            return self.square
        return bucket_of(size[::-1], self.sizes, self.step, self._config.bucket_no_upscale)


def fitted_mask(picture: Picture, size: Size) -> Image.Image:
    """The picture's loss mask as its pixels are cut, in grey; all white if it has none."""
    if picture.mask is None:
        return Image.new("L", size[::-1], 255)
    return ImageOps.fit(load_loss_mask(picture.mask), size[::-1], Image.Resampling.LANCZOS)


def rows_by_bucket(buckets: list[Size]) -> dict[Size, list[int]]:
    """The rows of each bucket, smallest first."""
    return {
        size: [row for row, bucket in enumerate(buckets) if bucket == size]
        for size in sorted(set(buckets))
    }


def _groups(pictures: list[Picture], buckets: list[Size]) -> list[Tensor]:
    repeats = torch.tensor([picture.repeats for picture in pictures])
    return [
        torch.tensor(rows).repeat_interleave(repeats[rows])
        for rows in rows_by_bucket(buckets).values()
    ]


def _common_beginning(rows: list[list[str]]) -> list[str]:
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return [column[0] for column in columns]


def _hold_out(checked: Checked, count: int | None) -> tuple[Checked, Checked]:
    """Pictures to train on, and pictures spread among them that are kept back."""
    total = len(checked.pictures)
    count = (total // 10 if total >= 20 else 0) if count is None else count
    if count > total - 1:
        raise DataError(f"num_held_out: {count} of {total} pictures leave none to train on")
    out = {(2 * i + 1) * total // (2 * count) for i in range(count)}

    def part(rows: list[int]) -> Checked:
        pictures, sizes = [checked.pictures[i] for i in rows], [checked.sizes[i] for i in rows]
        return replace(checked, pictures=pictures, sizes=sizes)

    kept = [i for i in range(total) if i not in out]
    return part(kept), part(sorted(out))
