"""Build the icon data set: captioned 128-px pictures in four art styles, from pinned npm packages.

    python training/make_dataset.py --output_dir data/icons

It writes two image folders in the layout of Hugging Face's imagefolder, pictures beside a
`metadata.jsonl` of `file_name` and `text` (a list: the ways to ask for this picture):

    data/icons/train/      fluent, flat, noto, twemoji: one icon a picture, on white
                           composed: backgrounds, places and sizes, counts, pairs
                           metadata.jsonl lists all of them; subjects.jsonl and everyday.jsonl the
                           icons of those files beside this script, everyday_noto.jsonl the latter
                           in one style, and composed.jsonl the compositions; styles.jsonl the
                           everyday icons with a background each, where a name without a style
                           means one style only, and broad.jsonl the same of all subjects
    data/icons/held_out/   for fine-tuning examples: the style noto-v1, and the subjects of
                           held_out.txt in every style; nothing of it is in train/

and SOURCES.json with versions, checksums and licences, by which it knows its folders when it makes
them anew, and skipped.txt with what could not be drawn. The same packages always give the same
files: what is random is drawn from `--seed`, and nothing depends on the order of a directory. This
script knows icons and their names; it does not know models.
"""

import argparse
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image, ImageColor

HERE = Path(__file__).parent
USUAL_STYLE = "noto"  # of names without a style, in the lessons that want one picture a name
ICON_PACKAGES = {  # style: package, licence, author
    "fluent": ("@iconify-json/fluent-emoji@1.2.7", "MIT", "Microsoft Corporation"),
    "flat": ("@iconify-json/fluent-emoji-flat@1.2.6", "MIT", "Microsoft Corporation"),
    "noto": ("@iconify-json/noto@1.2.9", "Apache-2.0", "Google Inc."),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "CC-BY-4.0", "Twitter, Inc. and contributors"),
    "noto-v1": ("@iconify-json/noto-v1@1.2.5", "Apache-2.0", "Google Inc."),
}
LABEL_PACKAGE = (
    "emojibase-data@17.0.0",
    "MIT",
    "Miles Johnson; labels and keywords from Unicode CLDR, Unicode-3.0",
)
HELD_OUT_STYLE = "noto-v1"

MARGIN = 0.04  # of the icon's longer side, free on each side
SKIN_TONE = re.compile(r"-(medium-)?(light|medium|dark)(-skin-tone)?$")
VARIATION_SELECTOR = "-fe0f"
BACKGROUNDS = {  # pale enough that the icon stands out
    "blue": "#9cc9f5",
    "green": "#a8dfa0",
    "yellow": "#fbe58a",
    "red": "#f29b94",
    "pink": "#f9c2dc",
    "orange": "#fbc27e",
    "purple": "#cdb2ee",
    "grey": "#c9ccd1",
    "black": "#26282c",
}
PLACES = {  # centre of the icon, as fractions of the picture
    "in the centre": (0.5, 0.5),
    "on the left": (0.28, 0.5),
    "on the right": (0.72, 0.5),
    "at the top": (0.5, 0.28),
    "at the bottom": (0.5, 0.72),
    "in the top left corner": (0.28, 0.28),
    "in the top right corner": (0.72, 0.28),
    "in the bottom left corner": (0.28, 0.72),
    "in the bottom right corner": (0.72, 0.72),
}
COUNTS = {  # side of one icon and the centres of all, as fractions of the picture
    "two": (0.46, ((0.27, 0.5), (0.73, 0.5))),
    "three": (0.44, ((0.5, 0.27), (0.27, 0.73), (0.73, 0.73))),
    "four": (0.42, ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73))),
    "five": (0.32, ((0.2, 0.2), (0.8, 0.2), (0.5, 0.5), (0.2, 0.8), (0.8, 0.8))),
}


@dataclass(frozen=True)
class Icon:
    """One drawing: `name` in words, the style, the SVG's body and its box (left, top, w, h)."""

    key: str
    name: str
    style: str
    body: str
    box: tuple[float, float, float, float]

    def draw(self, side: int) -> Image.Image:
        """The icon on a transparent square of `side` pixels."""
        left, top, width, height = self.box
        longer = max(width, height) * (1 + 2 * MARGIN)
        view_box = f"{left - (longer - width) / 2} {top - (longer - height) / 2} {longer} {longer}"
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{view_box}" width="{side}" height="{side}">{self.body}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def fetch_package(spec: str, package_dir: Path) -> Path:
    """The package's tarball, downloaded by `npm pack` unless it is there already."""
    name, version = spec.rsplit("@", 1)
    tarball = package_dir / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not tarball.exists():
        package_dir.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", spec], cwd=package_dir, check=True, capture_output=True)
    return tarball


def read_json(tarball: Path, member: str):
    with tarfile.open(tarball) as archive:
        file = archive.extractfile(f"package/{member}")
        assert file is not None, f"{tarball.name} has no {member}"
        return json.load(file)


def read_icons(tarball: Path, style: str) -> list[Icon]:
    """All icons of a package but variants of skin tone ("traffic-light" is none: there is no
    "traffic")."""
    data = read_json(tarball, "icons.json")
    icons = []
    for key, icon in sorted(data["icons"].items()):
        base = key
        while SKIN_TONE.search(base):
            base = SKIN_TONE.sub("", base)
        if base != key and ("skin-tone" in key or base in data["icons"]):
            continue
        size = icon.get("width", data.get("width", 16)), icon.get("height", data.get("height", 16))
        box = (icon.get("left", 0), icon.get("top", 0), *size)
        icons.append(Icon(key, key.replace("-", " "), style, icon["body"], box))
    return icons


def read_paraphrases(labels: Path, packages: dict[str, Path]) -> dict[str, list[str]]:
    """Icon name to its CLDR label and those CLDR keywords that at most two names carry
    ("puppy", but not "animal": a picture asked for by it could be anything), that are no other
    icon's name, and no plural of its own."""
    by_code = {
        entry["hexcode"].lower().replace(VARIATION_SELECTOR, ""): entry
        for entry in read_json(labels, "en/data.json")
    }
    entries = {}
    for tarball in packages.values():
        for code, name in sorted(read_json(tarball, "chars.json").items()):
            entry = by_code.get(code.replace(VARIATION_SELECTOR, ""))
            if entry is not None:
                entries.setdefault(name, entry)
    carriers = Counter(tag for entry in entries.values() for tag in set(entry.get("tags", [])))
    paraphrases = {}
    for key, entry in entries.items():
        name = key.replace("-", " ")
        told = [tag.lower() for tag in entry.get("tags", []) if carriers[tag] <= 2]
        told = [tag for tag in told if tag.replace(" ", "-") not in entries]
        told = [tag for tag in told if tag.rstrip("es") != name.rstrip("es")]
        label = entry["label"].lower().replace(":", "")
        paraphrases[name] = [text for text in dict.fromkeys([label, *told]) if text != name]
    return paraphrases


def read_subjects(file: Path) -> dict[str, list[str]]:
    """A subjects file: `icon-name: further name, another`, one a line; `#` begins a comment."""
    subjects = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        key, _, others = line.partition(":")
        if key.strip() and not key.startswith("#"):
            names = [name.strip() for name in others.split(",") if name.strip()]
            subjects[key.strip().replace("-", " ")] = names
    return subjects


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str | None:
    """ "rockets"; None where an "s" would not make one ("glasses", "face with tears")."""
    if name.endswith("s") or re.search(r" (with|of|in|on|behind|without) ", name):
        return None
    irregular = {"mouse": "mice", "goose": "geese", "wolf": "wolves", "leaf": "leaves"}
    *before, head = name.split(" ")
    if head in irregular:
        head = irregular[head]
    elif re.search(r"(x|z|ch|sh|ato)$", head):
        head += "es"
    elif re.search(r"[^aeiou]y$", head):
        head = head[:-1] + "ies"
    else:
        head += "s"
    return " ".join([*before, head])


def in_style(texts: list[str], style: str) -> list[str]:
    """Each way to ask, with the style at the end and without."""
    texts = list(dict.fromkeys(texts))
    return [f"{text}, {style} style" for text in texts] + texts


def caption_icon(icon: Icon, names: list[str], paraphrases: list[str]) -> list[str]:
    """Its name four ways, every further name two ways, every paraphrase as it is."""
    called = with_article(icon.name)
    forms = [icon.name, called, f"a picture of {called}", f"{called} on a white background"]
    forms += [form for name in names for form in (name, with_article(name))]
    return in_style(forms + paraphrases, icon.style)


def paste(canvas: Image.Image, icon: Icon, side: float, centre: tuple[float, float]) -> None:
    size = round(side * canvas.width)
    corner = [round(at * canvas.width - size / 2) for at in centre]
    corner = [min(max(at, 0), canvas.width - size) for at in corner]
    drawn = icon.draw(size)
    canvas.paste(drawn, tuple(corner), drawn)


def blank(resolution: int, colour: str = "white") -> Image.Image:
    return Image.new("RGB", (resolution, resolution), ImageColor.getrgb(colour))


def on_background(icon: Icon, colour: str, resolution: int) -> tuple[Image.Image, list[str]]:
    canvas = blank(resolution, BACKGROUNDS[colour])
    paste(canvas, icon, 0.92, (0.5, 0.5))
    texts = [f"{name} on a {colour} background" for name in (with_article(icon.name), icon.name)]
    return canvas, in_style(texts, icon.style)


def at_place(icon: Icon, resolution: int, rng: random.Random) -> tuple[Image.Image, list[str]]:
    place = rng.choice(list(PLACES))
    canvas = blank(resolution)
    paste(canvas, icon, 0.48, PLACES[place])
    return canvas, in_style([f"a small {icon.name} {place}"], icon.style)


def several(icon: Icon, resolution: int, rng: random.Random) -> tuple[Image.Image, list[str]]:
    count = rng.choice(list(COUNTS))
    canvas = blank(resolution)
    side, centres = COUNTS[count]
    for centre in centres:
        paste(canvas, icon, side, centre)
    return canvas, in_style([f"{count} {plural(icon.name)}"], icon.style)


def pair(
    icon: Icon, other: Icon, resolution: int, rng: random.Random
) -> tuple[Image.Image, list[str]]:
    canvas = blank(resolution)
    paste(canvas, icon, 0.48, (0.26, 0.5))
    paste(canvas, other, 0.48, (0.74, 0.5))
    one, two = with_article(icon.name), with_article(other.name)
    texts = [f"{one} next to {two}", f"{one} and {two}", f"{one} to the left of {two}"]
    return canvas, in_style([*texts, f"{two} to the right of {one}"], icon.style)


def compose(
    icons: list[Icon], resolution: int, seed: int
) -> Iterator[tuple[str, Icon, Image.Image, list[str]]]:
    """Five compositions of every icon: (file stem, icon, picture, captions). What is random in
    those of an icon depends on the seed, its style and its name only."""
    by_style = defaultdict(list)
    for icon in icons:
        by_style[icon.style].append(icon)
    for icon in icons:
        rng = random.Random(f"{seed} {icon.style} {icon.key}")
        colours = rng.sample(list(BACKGROUNDS), 2)
        for kind in (*colours, "place", "count", "pair"):
            stem = f"{icon.style}-{icon.key}-{kind}"
            if kind == "place":
                picture, texts = at_place(icon, resolution, rng)
            elif kind == "count":
                if plural(icon.name) is None:
                    continue
                picture, texts = several(icon, resolution, rng)
            elif kind == "pair":
                other = rng.choice([one for one in by_style[icon.style] if one != icon])
                picture, texts = pair(icon, other, resolution, rng)
            else:
                picture, texts = on_background(icon, kind, resolution)
            yield stem, icon, picture, texts


def one_picture_a_name(icons: list[dict], composed: list[dict]) -> list[dict]:
    """The icons and the first background of each; captions without a style stay in one style."""
    names = {row["name"] for row in icons}
    on_colour = [row for row in composed if row["name"] in names and is_on_background(row)]
    first = {(row["style"], row["name"]): row for row in reversed(on_colour)}
    rows = []
    for row in icons + [row for row in on_colour if row is first[row["style"], row["name"]]]:
        texts = [text for text in row["text"] if text.endswith(" style")]
        rows.append(row if row["style"] == USUAL_STYLE else row | {"text": texts})
    return rows


def is_on_background(row: dict) -> bool:
    return Path(row["file_name"]).stem.rsplit("-", 1)[-1] in BACKGROUNDS


def claim(output_dir: Path, names: Iterable[str], mark: str, text: str) -> None:
    """Clear the folders of these names and write the file `mark`, which says whose they are: where
    it is missing they are somebody's own."""
    for name in names:
        if (output_dir / name).exists() and not (output_dir / mark).exists():
            raise SystemExit(
                f"{output_dir / name} is not of this script, for there is no {output_dir / mark}; "
                "name another folder, or move it away"
            )
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / mark).write_text(text)
    for name in names:
        shutil.rmtree(output_dir / name, ignore_errors=True)


def write_rows(file: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--package_dir", type=Path, default=None, help="default: beside the output")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", type=Path, default=None, help="a subjects file: draw nothing else (for a trial)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    default_packages = args.output_dir.parent / "packages"
    package_dir = args.package_dir if args.package_dir is not None else default_packages
    packages = {
        style: fetch_package(spec, package_dir) for style, (spec, _, _) in ICON_PACKAGES.items()
    }
    labels = fetch_package(LABEL_PACKAGE[0], package_dir)
    paraphrases = read_paraphrases(labels, packages)
    subjects = read_subjects(HERE / "subjects.txt")
    everyday = read_subjects(HERE / "everyday.txt")
    held_out = read_subjects(HERE / "held_out.txt")
    only = read_subjects(args.only) if args.only is not None else None

    rows: dict[str, list[dict]] = {"train": [], "held_out": []}
    drawn: list[Icon] = []
    by_pixels: dict[bytes, dict] = {}
    skipped: list[str] = []
    described = [
        {
            "package": spec,
            "licence": licence,
            "author": author,
            "sha256": hashlib.sha256(tarball.read_bytes()).hexdigest(),
        }
        for (spec, licence, author), tarball in zip(
            [*ICON_PACKAGES.values(), LABEL_PACKAGE], [*packages.values(), labels], strict=True
        )
    ]
    claim(args.output_dir, rows, "SOURCES.json", json.dumps(described, indent=2) + "\n")
    for style, tarball in packages.items():
        # subjects first: of icons that look the same, the first gives the picture its name
        for icon in sorted(read_icons(tarball, style), key=lambda icon: icon.name not in subjects):
            if only is not None and icon.name not in only:
                continue
            folder = "held_out" if style == HELD_OUT_STYLE or icon.name in held_out else "train"
            file = args.output_dir / folder / style / f"{icon.key}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                picture = icon.draw(args.resolution)
            except BaseException as error:  # resvg's panics are no Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                skipped.append(f"{style}/{icon.key}: {type(error).__name__}")
                continue
            canvas = blank(args.resolution)
            canvas.paste(picture, (0, 0), picture)
            names, told = subjects.get(icon.name, []), paraphrases.get(icon.name, [])
            texts = caption_icon(icon, names, told)
            same = by_pixels.get(canvas.tobytes())
            if same is not None:
                if same in rows[folder]:  # what is held out tells nothing to what is not
                    same["text"] = list(dict.fromkeys(same["text"] + texts))
                continue
            canvas.save(file)
            facts = {"name": icon.name, "style": style}
            row = {"file_name": f"{style}/{icon.key}.png", "text": texts, **facts}
            by_pixels[canvas.tobytes()] = row
            rows[folder].append(row)
            if folder == "train":
                drawn.append(icon)
    train = args.output_dir / "train"
    asked_for = [row for row in rows["train"] if row["name"] in subjects]
    write_rows(train / "subjects.jsonl", asked_for)
    lesson = [row for row in rows["train"] if row["name"] in everyday]
    write_rows(train / "everyday.jsonl", lesson)
    usual = [row for row in lesson if row["style"] == USUAL_STYLE]
    write_rows(train / "everyday_noto.jsonl", usual)
    composed = []
    (train / "composed").mkdir()
    known = [icon for icon in drawn if icon.name in subjects]
    for stem, icon, picture, texts in compose(known, args.resolution, args.seed):
        picture.save(train / "composed" / f"{stem}.png")
        facts = {"name": icon.name, "style": icon.style}
        composed.append({"file_name": f"composed/{stem}.png", "text": texts, **facts})
    write_rows(train / "composed.jsonl", composed)
    write_rows(train / "styles.jsonl", one_picture_a_name(lesson, composed))
    write_rows(train / "broad.jsonl", one_picture_a_name(asked_for, composed))
    write_rows(train / "metadata.jsonl", rows["train"] + composed)
    write_rows(args.output_dir / "held_out" / "metadata.jsonl", rows["held_out"])
    (args.output_dir / "skipped.txt").write_text("".join(f"{line}\n" for line in skipped))
    print(
        f"{len(rows['train'])} icons and {len(composed)} compositions to train on, "
        f"{len(rows['held_out'])} icons held out, {len(skipped)} skipped, in {args.output_dir}"
    )


if __name__ == "__main__":
    main()
