"""Captioned pictures on disk: how they are listed, and what can be wrong with them.

Everything here happens before a model is loaded, and nothing here imports torch. A picture has any
number of captions: ways to ask for it, one of which is drawn at each use.
"""

import hashlib
import json
import os
import random
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from latentgen.errors import DataError, InvalidRequest
from latentgen.images import SUFFIXES, load_image, picture_files

SHOWN = 10  # problems of one kind that an error lists by name
ORDERS = 8  # of a shuffled caption's tags

# What may be wrong with a picture and still be trained on when it is allowed by name.
ALLOWABLE = {
    "unreadable": "left out",
    "duplicates": "trained on twice",
    "tiny": "enlarged",
    "uncaptioned": "trained on with the empty caption",
    "unlisted": "left out",
    "long_captions": "cut where the text encoder stops reading",
}


@dataclass(frozen=True)
class Picture:
    """`repeats`: how often it comes in an epoch. `mask`: a picture of the same size, white where
    the loss counts. `is_reg`: it shows the class, not the subject (prior preservation). `listed`:
    the folder's `metadata.jsonl` has a line for it, or there is none."""

    file: Path
    captions: tuple[str, ...]
    repeats: int = 1
    mask: Path | None = None
    random_flip: bool = False
    is_reg: bool = False
    listed: bool = True


@dataclass(frozen=True)
class Checked:
    """The pictures that can be trained on, in their order, and the size of each as (width,
    height); `fingerprint`: SHA-256 over the pixels of each in that order, its captions where they
    are read, its mask, and how it is used (repeats, flips, class), but not over where it lies;
    `warnings`: what was wrong and allowed."""

    pictures: list[Picture]
    sizes: list[tuple[int, int]]
    fingerprint: str
    warnings: str


def read_folder(folder: Path, metadata_file: str = "metadata.jsonl") -> list[Picture]:
    """The folder's pictures: the lines of its `metadata.jsonl` (`file_name` and `text`, a string
    or a list of strings), or without one every picture below it, captioned by the `.txt` file of
    the same name. Captions may be missing, and so may lines of `metadata.jsonl`; `check_pictures`
    decides whether that is an error. A listing of another name is a choice among the pictures."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    listing = folder / metadata_file
    if listing.is_file():
        lines = enumerate(_read_text(listing).split("\n"), 1)
        pictures = [_read_row(folder, listing, n, line) for n, line in lines if line.strip()]
        if pictures and metadata_file == "metadata.jsonl":
            told = {picture.file.resolve() for picture in pictures}
            others = [file for file in picture_files(folder) if file.resolve() not in told]
            pictures += [Picture(file, (), listed=False) for file in others]
    elif metadata_file != "metadata.jsonl":
        raise DataError(f"{listing} does not exist")
    else:
        pictures = [Picture(file, _text_beside(file)) for file in picture_files(folder)]
    if not pictures:
        names = ", ".join(sorted(SUFFIXES))
        raise DataError(f"no picture in {listing if listing.is_file() else folder} ({names})")
    return pictures


def read_dataset(
    name: str, image_column: str, caption_column: str, export_dir: Path
) -> list[Picture]:
    """A dataset of the Hugging Face hub, or a folder that `datasets` saved: its pictures are
    written below `export_dir` once, as PNG, and are files like all others from there on."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise DataError("--dataset_name needs `pip install datasets`") from error
    try:
        if Path(name).is_dir():
            rows = datasets.load_from_disk(name)
            if isinstance(rows, datasets.DatasetDict):
                if "train" not in rows:
                    raise ValueError(f"it has no split 'train'; it has {sorted(rows)}")
                rows = rows["train"]
        else:
            rows = datasets.load_dataset(name, split="train")
    except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        # RuntimeError: a loading script, which is remote code
        raise DataError(f"--dataset_name {name}: {error}") from error
    for column in (image_column, caption_column):
        if column not in rows.column_names:
            raise DataError(f"{name} has no column {column!r}; it has {rows.column_names}")
    # its own hash of the rows: another dataset, or the same one changed, is another folder
    key = hashlib.sha256(f"{rows._fingerprint} {image_column}".encode()).hexdigest()[:16]
    folder = export_dir / key
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number in range(len(rows)):
        try:
            row = rows[number]
            image, text = row[image_column], row[caption_column]
            file = folder / f"{number:06d}.png"
            if not hasattr(image, "convert"):
                raise DataError(f"{name}: row {number} has no picture in {image_column!r}")
            if not file.exists():
                partial = file.with_suffix(f".{os.getpid()}.partial")
                load_image(image).save(partial, "PNG")
                partial.replace(file)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"{name}: the picture of row {number} cannot be read: {error}"
            ) from error
        captions = _captions(text if text is not None else [])
        if captions is None:
            raise DataError(
                f"{name}: row {number} has {text!r} in {caption_column!r}; it must be a text, or "
                "a list of texts"
            )
        pictures.append(Picture(file, captions))
    return pictures


# kohya's dataset file: the keys of a subset that say something about its pictures.
SUBSET_KEYS = {
    "image_dir",
    "class_tokens",
    "caption_extension",
    "num_repeats",
    "shuffle_caption",
    "keep_tokens",
    "caption_prefix",
    "caption_suffix",
    "flip_aug",
    "is_reg",
    "conditioning_data_dir",
}
# Keys that may stand there as long as they ask for nothing.
NEUTRAL = {
    "alpha_mask": False,
    "color_aug": False,
    "random_crop": False,
    "enable_wildcard": False,
    "caption_dropout_every_n_epochs": 0,
    "caption_tag_dropout_rate": 0,
    "token_warmup_step": 0,
    "token_warmup_min": 1,
}


def read_kohya(file: Path, seed: int = 0) -> list[Picture]:
    """The pictures that a TOML in kohya's format lists, `[[datasets]]` with `[[datasets.subsets]]`.
    What such a file says about size and batch, `kohya_flags` reads. `conditioning_data_dir` holds
    the loss masks."""
    pictures = []
    for dataset, subset in _kohya_subsets(file):
        settings = dataset | subset
        if "image_dir" not in subset:
            raise DataError(f"{file}: a subset has no image_dir")
        of_class = settings.get("is_reg", False)
        if of_class and (settings.get("flip_aug") or "conditioning_data_dir" in subset):
            raise DataError(f"{file}: pictures of the class (is_reg) take no flips and no masks")
        if of_class and subset.get("caption_dropout_rate"):
            raise DataError(f"{file}: pictures of the class (is_reg) keep their captions")
        folder = _folder_near(file, subset["image_dir"])
        ending = settings.get("caption_extension", ".caption")
        tokens = settings.get("class_tokens")
        affixes = (settings.get("caption_prefix", ""), settings.get("caption_suffix", ""))
        listed = []
        for picture in picture_files(folder):
            if picture.parent != folder:  # such a file means the top level only
                continue
            captions = _text_beside(picture, ending) or ((tokens,) if tokens else ())
            lines = [caption.splitlines()[0].strip() for caption in captions]
            captions = tuple(" ".join(filter(None, (affixes[0], c, affixes[1]))) for c in lines)
            if settings.get("shuffle_caption"):
                keep = settings.get("keep_tokens", 0)
                captions = tuple(o for c in captions for o in shuffled(c, keep, seed))
            listed.append(
                Picture(
                    picture,
                    captions,
                    repeats=settings.get("num_repeats", 1),
                    random_flip=settings.get("flip_aug", False),
                    is_reg=of_class,
                )
            )
        if not listed:
            raise DataError(
                f"{file}: no picture lies in {folder} itself; folders in it are not read"
            )
        masks = subset.get("conditioning_data_dir")
        pictures += listed if masks is None else with_masks(listed, _folder_near(file, masks))
    return pictures


KOHYA_FLAGS = {
    "resolution": "resolution",
    "batch_size": "train_batch_size",
    "caption_dropout_rate": "proportion_empty_prompts",
    "enable_bucket": "enable_bucket",
    "min_bucket_reso": "min_bucket_reso",
    "max_bucket_reso": "max_bucket_reso",
    "bucket_reso_steps": "bucket_reso_steps",
    "bucket_no_upscale": "bucket_no_upscale",
}
# Its keys that are whole numbers, with the least that each may be, and those that are true or
# false; the others are texts.
WHOLE = {
    "num_repeats": 1,
    "keep_tokens": 0,
    "resolution": 1,
    "batch_size": 1,
    "min_bucket_reso": 1,
    "max_bucket_reso": 1,
    "bucket_reso_steps": 1,
}
SWITCHES = {"shuffle_caption", "flip_aug", "is_reg", "enable_bucket", "bucket_no_upscale"}


def kohya_flags(file: Path) -> dict[str, Any]:
    """What a TOML in kohya's format says about the whole run, as our flags. Several datasets must
    agree: a run has one resolution and one batch size."""
    # its own defaults, not ours
    defaults = {"batch_size": 1, "enable_bucket": False, "caption_dropout_rate": 0.0}
    found: dict[str, Any] = {}
    for dataset, subset in _kohya_subsets(file):
        settings = defaults | dataset | subset
        for key, name in KOHYA_FLAGS.items():
            value = settings.get(key)
            of_instances = key == "caption_dropout_rate"  # the class keeps its captions
            if value is None or (of_instances and settings.get("is_reg")):
                continue
            if isinstance(value, list):
                if len(set(value)) != 1:
                    raise DataError(f"{file}: {key} {value}: one number, the side of a square")
                value = value[0]
            if found.setdefault(name, value) != value:
                raise DataError(f"{file}: its datasets or subsets differ in {key}; a run has one")
    return found


def shuffled(caption: str, keep_tokens: int, seed: int) -> list[str]:
    """A caption of tags, "a, b, c", in several orders; the first `keep_tokens` stay in front."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept, loose = tags[:keep_tokens], tags[keep_tokens:]
    if len(loose) < 2:
        return [caption]
    order = random.Random(f"{seed} {caption}")
    orders = [", ".join(kept + order.sample(loose, len(loose))) for _ in range(ORDERS)]
    return list(dict.fromkeys(orders))


def with_masks(pictures: list[Picture], folder: Path) -> list[Picture]:
    """The pictures with the loss masks of a folder: files of the same stem, white = train. Those
    without one are trained on whole; a mask is no picture, also if its folder is inside theirs."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    files = picture_files(folder)
    if not files:
        raise DataError(f"{folder} has no masks")
    own = {file.resolve() for file in files}
    pictures = [picture for picture in pictures if picture.file.resolve() not in own]
    stems = [picture.file.stem for picture in pictures]
    masks = {file.stem: file for file in files}
    if strangers := sorted(masks.keys() - set(stems)):
        raise DataError(f"{folder} has masks of no picture: {', '.join(strangers[:SHOWN])}")
    twice = {stem for stem, count in Counter(stems).items() if count > 1} & masks.keys()
    if twice or len(masks) < len(files):
        raise DataError(
            f"{folder}: several pictures or masks are called {sorted(twice) or 'alike'}"
        )
    return [
        replace(picture, mask=masks.get(picture.file.stem, picture.mask)) for picture in pictures
    ]


def load_loss_mask(file: Path) -> Image.Image:
    """A loss mask, in grey ("L"): white = train."""
    return load_image(file, "mask", "black").convert("L")


def check_pictures(
    pictures: list[Picture],
    *,
    captions: bool = True,
    allow: list[str] | tuple[str, ...] = (),
    too_small: Callable[[tuple[int, int]], bool] = lambda size: False,
    too_long: Callable[[str], bool] = lambda caption: False,
    at_least: int = 2,
    seen: dict[str, Path] | None = None,
) -> Checked:
    """Open every picture and raise one DataError that names all that is wrong: too few, missing,
    unreadable or truncated files, no caption, the same pixels twice, sizes (width, height) that
    are `too_small`, captions that are `too_long`, masks that fit no picture or hide all of it.
    Kinds that `allow` names (see ALLOWABLE) become warnings. `seen`: the pixels of pictures that
    were checked before, to which these are added."""
    if len(pictures) < at_least:
        found = "no picture" if not pictures else f"only one picture, {pictures[0].file}"
        raise DataError(f"found {found}; at least {at_least} are needed")
    problems: dict[str, list[str]] = {}
    seen = {} if seen is None else seen
    fingerprint = hashlib.sha256()
    kept, sizes = [], []

    def note(kind: str, what: str) -> None:
        problems.setdefault(kind, []).append(what)

    for picture in pictures:
        if not picture.listed:
            note("unlisted", f"{picture.file}")
            continue
        if captions and not picture.captions:
            note("uncaptioned", f"{picture.file}")
        for caption in picture.captions if captions else ():
            if too_long(caption):
                note("long_captions", f"{picture.file}: {caption[:60]}…")
        try:
            image = load_image(picture.file)
        except InvalidRequest as error:
            note(
                "unreadable" if picture.file.exists() else "missing",
                f"{picture.file}: {error.hint}",
            )
            continue
        if too_small(image.size):
            note("tiny", f"{picture.file}: {image.width} x {image.height}")
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        if digest in seen:
            note("duplicates", f"{picture.file} = {seen[digest]}")
        seen.setdefault(digest, picture.file)
        fingerprint.update(digest.encode())
        if captions:
            fingerprint.update("\n".join(picture.captions).encode())
        if picture.mask is not None:
            fingerprint.update(_check_mask(picture, image.size, note))
        use = (picture.repeats, picture.random_flip, picture.is_reg)
        fingerprint.update(b"" if use == (1, False, False) else repr(use).encode())
        kept.append(
            picture if picture.captions or not captions else replace(picture, captions=("",))
        )
        sizes.append(image.size)
    refused = {kind: names for kind, names in problems.items() if kind not in allow}
    if refused:
        raise DataError("\n".join(_tell(kind, names) for kind, names in refused.items()))
    if len(kept) < at_least:
        raise DataError(f"only {len(kept)} of {len(pictures)} pictures can be read")
    warnings = [_tell(kind, names, ALLOWABLE[kind]) for kind, names in problems.items()]
    return Checked(kept, sizes, fingerprint.hexdigest(), "\n".join(warnings))


def _check_mask(picture: Picture, size: tuple[int, int], note: Callable[[str, str], None]) -> bytes:
    try:
        assert picture.mask is not None
        mask = load_loss_mask(picture.mask)
    except InvalidRequest as error:
        note("masks that cannot be used", f"{picture.mask}: {error.hint}")
        return b""
    if mask.size != size:
        note("masks that cannot be used", f"{picture.mask}: its picture has another size")
    if mask.getextrema() == (0, 0):
        note("masks that cannot be used", f"{picture.mask}: all black, so nothing would be learnt")
    return mask.tobytes()


def _kohya_subsets(file: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every subset with the settings of its dataset over those of [general]."""
    try:
        content = tomllib.loads(_read_text(file))
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{file}: {error}") from error
    known = SUBSET_KEYS | KOHYA_FLAGS.keys()

    def table(value: Any, what: str, allowed: set[str]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise DataError(f"{file}: {what} must be a table, not {value!r}")
        loud = {key: v for key, v in value.items() if key not in NEUTRAL or NEUTRAL[key] != v}
        if unknown := sorted(loud.keys() - allowed):
            raise DataError(f"{file}: {what} has {unknown}; known are {sorted(allowed)}")
        for key in loud.keys() & known:  # the others are tables themselves
            _check_type(file, key, loud[key])
        return loud

    def tables(value: Any, what: str) -> list[Any]:
        if not isinstance(value, list):
            raise DataError(f"{file}: write [[{what}]], in two brackets: there may be several")
        return value

    content = table(content, "it", {"general", "datasets"})
    general = table(content.get("general", {}), "[general]", known)
    pairs = []
    for dataset in tables(content.get("datasets", []), "datasets"):
        own = table(dataset, "a dataset", known | {"subsets"})
        subsets = tables(own.pop("subsets", []), "datasets.subsets")
        allowed = SUBSET_KEYS | {"caption_dropout_rate"}
        pairs += [(general | own, table(subset, "a subset", allowed)) for subset in subsets]
    if not pairs:
        raise DataError(f"{file}: it lists no [[datasets.subsets]]")
    return pairs


def _check_type(file: Path, key: str, value: Any) -> None:
    """Refuse a value that is not of its key's type: "2", 2.5 or true for a whole number."""
    if key in WHOLE:
        one = value[0] if key == "resolution" and isinstance(value, list) and value else value
        right = type(one) is int and one >= WHOLE[key]
        needed = f"a whole number, {WHOLE[key]} or more"
    elif key in SWITCHES:
        right, needed = isinstance(value, bool), "true or false"
    elif key == "caption_dropout_rate":
        right, needed = type(value) in (int, float), "a number"
    elif key == "caption_extension":
        right = isinstance(value, str) and re.fullmatch(r"\.[^/\\]*[^./\\]", value) is not None
        needed = 'an ending such as ".txt"'
    else:
        right, needed = isinstance(value, str), "a text"
    if not right:
        raise DataError(f"{file}: {key} must be {needed}; it is {value!r}")


def _folder_near(file: Path, name: str) -> Path:
    """A folder as kohya finds it, from where one stands, or else beside the file that names it."""
    for folder in (Path(name), file.parent / name):
        if folder.is_dir():
            return folder
    raise DataError(f"{file}: {name} is no folder, neither here nor beside the file")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}") from error


def _read_row(folder: Path, listing: Path, number: int, line: str) -> Picture:
    try:
        row = json.loads(line)
        name, text = row["file_name"], row.get("text", [])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        name = text = None
    captions = _captions(text)
    if captions is None or not isinstance(name, str):
        needed = '{"file_name": "…", "text": "…"}, where text may be a list'
        raise DataError(f"{listing}, line {number} must be {needed}; it is {line[:80]}")
    return Picture(folder / name, captions)


def _captions(text: Any) -> tuple[str, ...] | None:
    """A text, or a list of texts, without the empty ones; None for anything else."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
        return None
    return tuple(one for one in texts if one.strip())


def _text_beside(file: Path, ending: str = ".txt") -> tuple[str, ...]:
    caption = file.with_suffix(ending)
    if not caption.is_file():
        return ()
    text = _read_text(caption).strip()
    return (text,) if text else ()


WORDS = {
    "unlisted": "not listed in metadata.jsonl",
    "uncaptioned": "without a caption",
    "tiny": "tiny (much smaller than the model draws)",
    "long_captions": "captions longer than the text encoder reads",
}


def _tell(kind: str, names: list[str], consequence: str = "") -> str:
    more = f"\n  and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    way_out = f"; --allow {kind}: {ALLOWABLE[kind]}" if kind in ALLOWABLE else ""
    end = f", {consequence}:" if consequence else f"{way_out}:"
    return f"{len(names)} {WORDS.get(kind, kind)}{end}\n  " + "\n  ".join(names[:SHOWN]) + more
