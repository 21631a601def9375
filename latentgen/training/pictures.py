"""Captioned pictures on disk: how they are listed, and what can be wrong with them.

Everything here happens before a model is loaded, and nothing here imports torch. A picture has any
number of captions: ways to ask for it, one of which is drawn at each use.
"""

import hashlib
import json
import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentgen.errors import DataError, InvalidRequest
from latentgen.images import SUFFIXES, load_image, load_mask

SHOWN = 10  # problems of one kind that an error lists by name
ORDERS = 8  # of a shuffled caption's tags

# What may be wrong with a picture and still be trained on when it is allowed by name.
ALLOWABLE = {
    "unreadable": "left out",
    "duplicates": "trained on twice",
    "tiny": "enlarged",
    "uncaptioned": "trained on with the empty caption",
    "long_captions": "cut where the text encoder stops reading",
}


@dataclass(frozen=True)
class Picture:
    """`repeats`: how often it comes in an epoch. `mask`: a picture of the same size, white where
    the loss counts. `is_reg`: it shows the class, not the subject (prior preservation)."""

    file: Path
    captions: tuple[str, ...]
    repeats: int = 1
    mask: Path | None = None
    random_flip: bool = False
    is_reg: bool = False


@dataclass(frozen=True)
class Checked:
    """The pictures that can be trained on, in their order, and the size of each as (width,
    height); `fingerprint`: SHA-256 over pixels, captions and masks; `warnings`: what was wrong and
    allowed."""

    pictures: list[Picture]
    sizes: list[tuple[int, int]]
    fingerprint: str
    warnings: str


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
    return [Picture(file, _text_beside(file)) for file in picture_files(folder)]


def picture_files(folder: Path) -> list[Path]:
    """Every picture below a folder, in the order of their paths."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def read_dataset(
    name: str, image_column: str, caption_column: str, export_dir: Path
) -> list[Picture]:
    """A dataset of the Hugging Face hub, or a folder that `datasets` saved: its pictures are
    written to `export_dir` once, as PNG, and are files like all others from there on."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("--dataset_name needs `pip install datasets`") from error
    try:
        if Path(name).is_dir():
            rows = datasets.load_from_disk(name)
            rows = rows["train"] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            rows = datasets.load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        raise DataError(f"--dataset_name {name}: {error}") from error
    for column in (image_column, caption_column):
        if column not in rows.column_names:
            raise DataError(f"{name} has no column {column!r}; it has {rows.column_names}")
    export_dir.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number, row in enumerate(rows):
        file = export_dir / f"{number:06d}.png"
        row[image_column].save(file)
        text = row[caption_column]
        pictures.append(Picture(file, tuple([text] if isinstance(text, str) else text)))
    return pictures


# kohya's dataset file: the keys of a subset that say something about its pictures.
SUBSET_KEYS = {
    "image_dir",
    "metadata_file",
    "class_tokens",
    "caption_extension",
    "num_repeats",
    "shuffle_caption",
    "keep_tokens",
    "flip_aug",
    "is_reg",
    "conditioning_data_dir",
    "alpha_mask",
}


def read_kohya(file: Path, seed: int = 0) -> list[Picture]:
    """The pictures that a TOML in kohya's format lists, `[[datasets]]` with `[[datasets.subsets]]`.
    What such a file says about size and batch, `kohya_flags` reads. `conditioning_data_dir` holds
    the loss masks."""
    pictures = []
    for dataset, subset in _kohya_subsets(file):
        settings = dataset | subset
        if unknown := sorted(subset.keys() - SUBSET_KEYS):
            raise DataError(f"{file}: a subset has {unknown}; known are {sorted(SUBSET_KEYS)}")
        if "image_dir" not in subset:
            raise DataError(f"{file}: a subset has no image_dir")
        if settings.get("alpha_mask"):
            raise DataError(f"{file}: alpha_mask is not supported; use conditioning_data_dir")
        folder = _folder_near(file, subset["image_dir"])
        ending = settings.get("caption_extension", ".caption")
        tokens = settings.get("class_tokens")
        listed = []
        for picture in picture_files(folder):
            captions = _text_beside(picture, ending) or ((tokens,) if tokens else ())
            if settings.get("shuffle_caption"):
                keep = settings.get("keep_tokens", 0)
                captions = tuple(o for c in captions for o in shuffled(c, keep, seed))
            listed.append(
                Picture(
                    picture,
                    captions,
                    repeats=settings.get("num_repeats", 1),
                    random_flip=settings.get("flip_aug", False),
                    is_reg=settings.get("is_reg", False),
                )
            )
        masks = subset.get("conditioning_data_dir")
        pictures += listed if masks is None else with_masks(listed, _folder_near(file, masks))
    return pictures


KOHYA_FLAGS = {
    "resolution": "resolution",
    "batch_size": "train_batch_size",
    "enable_bucket": "enable_bucket",
    "min_bucket_reso": "min_bucket_reso",
    "max_bucket_reso": "max_bucket_reso",
    "bucket_reso_steps": "bucket_reso_steps",
    "bucket_no_upscale": "bucket_no_upscale",
}


def kohya_flags(file: Path) -> dict[str, Any]:
    """What a TOML in kohya's format says about the whole run, as our flags. Several datasets must
    agree: a run has one resolution and one batch size."""
    found: dict[str, Any] = {}
    for dataset, _ in _kohya_subsets(file):
        for key, name in KOHYA_FLAGS.items():
            if key not in dataset:
                continue
            value = dataset[key]
            if isinstance(value, list):
                if len(set(value)) != 1:
                    raise DataError(f"{file}: {key} {value}: one number, the side of a square")
                value = value[0]
            if found.setdefault(name, value) != value:
                raise DataError(f"{file}: its datasets differ in {key}; a run has one")
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
    without one are trained on whole."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    masks = {file.stem: file for file in picture_files(folder)}
    if strangers := sorted(masks.keys() - {picture.file.stem for picture in pictures}):
        raise DataError(f"{folder} has masks of no picture: {', '.join(strangers[:SHOWN])}")
    return [
        replace(picture, mask=masks.get(picture.file.stem, picture.mask)) for picture in pictures
    ]


def check_pictures(
    pictures: list[Picture],
    *,
    captions: bool = True,
    allow: list[str] | tuple[str, ...] = (),
    least_side: int = 0,
    too_long: Callable[[str], bool] = lambda caption: False,
    at_least: int = 2,
) -> Checked:
    """Open every picture and raise one DataError that names all that is wrong: too few, missing,
    unreadable or truncated files, no caption, the same pixels twice, a side shorter than
    `least_side`, captions that are `too_long`, masks that fit no picture or hide all of it. Kinds
    that `allow` names (see ALLOWABLE) become warnings."""
    if len(pictures) < at_least:
        found = "no picture" if not pictures else f"only one picture, {pictures[0].file}"
        raise DataError(f"found {found}; at least two are needed, {sorted(SUFFIXES)}")
    problems: dict[str, list[str]] = {}
    seen: dict[str, Path] = {}
    fingerprint = hashlib.sha256()
    kept, sizes = [], []

    def note(kind: str, what: str) -> None:
        problems.setdefault(kind, []).append(what)

    for picture in pictures:
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
        if min(image.size) < least_side:
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
        mask = load_mask(picture.mask)
    except InvalidRequest as error:
        note("masks that cannot be used", f"{picture.mask}: {error.hint}")
        return b""
    if mask.size != size:
        note("masks that cannot be used", f"{picture.mask}: its picture has another size")
    return mask.tobytes()


def _kohya_subsets(file: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every subset with the settings of its dataset over those of [general]."""
    try:
        content = tomllib.loads(_read_text(file))
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{file}: {error}") from error
    known = SUBSET_KEYS | KOHYA_FLAGS.keys()
    if unknown := sorted(content.keys() - {"general", "datasets"}):
        raise DataError(f"{file}: {unknown}; known are [general] and [[datasets]]")
    pairs = []
    for dataset in content.get("datasets", []):
        settings = content.get("general", {}) | dataset
        subsets = settings.pop("subsets", [])
        if unknown := sorted(settings.keys() - known):
            raise DataError(f"{file}: {unknown} are not supported; known are {sorted(known)}")
        pairs += [(settings, subset) for subset in subsets]
    if not pairs:
        raise DataError(f"{file}: it lists no [[datasets.subsets]]")
    return pairs


def _folder_near(file: Path, name: str) -> Path:
    """A folder as kohya finds it, from where one stands, or else beside the file that names it."""
    for folder in (Path(name), file.parent / name):
        if folder.is_dir():
            return folder
    raise DataError(f"{file}: {name} is no folder, neither here nor beside the file")


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


def _text_beside(file: Path, ending: str = ".txt") -> tuple[str, ...]:
    caption = file.with_suffix(ending)
    if not caption.is_file():
        return ()
    text = _read_text(caption).strip()
    return (text,) if text else ()


WORDS = {
    "uncaptioned": "without a caption",
    "tiny": "tiny (much smaller than the model draws)",
    "long_captions": "captions longer than the text encoder reads",
}


def _tell(kind: str, names: list[str], consequence: str = "") -> str:
    more = f"\n  and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    way_out = f"; --allow {kind}: {ALLOWABLE[kind]}" if kind in ALLOWABLE else ""
    end = f", {consequence}:" if consequence else f"{way_out}:"
    return f"{len(names)} {WORDS.get(kind, kind)}{end}\n  " + "\n  ".join(names[:SHOWN]) + more
