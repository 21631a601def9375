"""Build the icon data set: captioned 128-px pictures in four art styles, from pinned npm packages.

    python training/make_dataset.py --output_dir data/icons

The same packages always give the same files: nothing here is random and nothing depends on the
order of a directory. The result is an image folder with a `metadata.jsonl` (`file_name`, `text` and
what other captions are made of: `name`, `style`, `labels`, `keywords`), a `SOURCES.json` with the
versions, checksums and licences, and a `skipped.txt` with the icons that could not be drawn.

This script knows icons and their names. It does not know which of them a model is trained on: that
is `training/subjects.txt`, read by the training scripts.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import resvg_py
from PIL import Image

ICON_PACKAGES = {
    "fluent": ("@iconify-json/fluent-emoji@1.2.7", "MIT, Microsoft Corporation"),
    "flat": ("@iconify-json/fluent-emoji-flat@1.2.6", "MIT, Microsoft Corporation"),
    "noto": ("@iconify-json/noto@1.2.9", "Apache-2.0, Google Inc."),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "CC-BY-4.0, Twitter, Inc. and other contributors"),
}
LABEL_PACKAGE = (
    "emojibase-data@17.0.0",
    "MIT, Miles Johnson; labels from Unicode CLDR, Unicode-3.0",
)

SKIN_TONE = re.compile(r"skin-tone|-(light|medium-light|medium|medium-dark|dark)$")
VARIATION_SELECTOR = "-fe0f"


def fetch_package(spec: str, package_dir: Path) -> Path:
    """The package's tarball, downloaded by `npm pack` unless it is there already."""
    name, version = spec.rsplit("@", 1)
    tarball = package_dir / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not tarball.exists():
        subprocess.run(["npm", "pack", spec], cwd=package_dir, check=True, capture_output=True)
    return tarball


def read_json(tarball: Path, member: str) -> dict | list:
    with tarfile.open(tarball) as archive:
        file = archive.extractfile(f"package/{member}")
        assert file is not None, f"{tarball.name} has no {member}"
        return json.load(file)


def read_labels(tarball: Path) -> dict[str, tuple[str, list[str]]]:
    """Code points ("1f34e") to the CLDR label and its keywords."""
    return {
        entry["hexcode"].lower().replace(VARIATION_SELECTOR, ""): (
            entry["label"],
            entry.get("tags", []),
        )
        for entry in read_json(tarball, "en/data.json")
    }


def icon_names(icons: dict, chars: dict[str, str]) -> dict[str, str | None]:
    """Icon name to its code points (None: the icon stands for no emoji), skin tones left out."""
    code_points: dict[str, str] = {}
    for code, name in sorted(chars.items()):
        code_points.setdefault(name, code.replace(VARIATION_SELECTOR, ""))
    return {
        name: code_points.get(name) for name in sorted(icons["icons"]) if not SKIN_TONE.search(name)
    }


def draw_icon(icons: dict, name: str, resolution: int, margin: float) -> Image.Image:
    """The icon on white, square, with `margin` of its longer side left free on each side."""
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    side = max(width, height) * (1 + 2 * margin)
    view_box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{view_box}" width="{resolution}" height="{resolution}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--package_dir", type=Path, default=None, help="default: beside the output")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--margin", type=float, default=0.04)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    default_packages = args.output_dir.parent / "packages"
    package_dir = args.package_dir if args.package_dir is not None else default_packages
    package_dir.mkdir(parents=True, exist_ok=True)

    labels_tarball = fetch_package(LABEL_PACKAGE[0], package_dir)
    labels = read_labels(labels_tarball)
    sources = [(LABEL_PACKAGE[0], LABEL_PACKAGE[1], labels_tarball)]
    records: list[dict] = []
    skipped: list[str] = []
    for style, (spec, licence) in ICON_PACKAGES.items():
        tarball = fetch_package(spec, package_dir)
        sources.append((spec, licence, tarball))
        icons = read_json(tarball, "icons.json")
        (args.output_dir / style).mkdir(parents=True, exist_ok=True)
        for icon, code in icon_names(icons, read_json(tarball, "chars.json")).items():
            try:
                image = draw_icon(icons, icon, args.resolution, args.margin)
            except BaseException as error:  # resvg's panics are no Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                skipped.append(f"{style}/{icon}: {type(error).__name__}")
                continue
            image.save(args.output_dir / style / f"{icon}.png")
            name = icon.replace("-", " ")
            label, keywords = labels.get(code or "", (name, []))
            records.append(
                {
                    "file_name": f"{style}/{icon}.png",
                    "text": f"{name}, {style} style",
                    "name": name,
                    "style": style,
                    "labels": sorted({label.lower().replace(":", "")} - {name}),
                    "keywords": keywords,
                }
            )
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (args.output_dir / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (args.output_dir / "skipped.txt").write_text("".join(f"{line}\n" for line in skipped))
    described = [
        {
            "package": spec,
            "licence": licence,
            "sha256": hashlib.sha256(tar.read_bytes()).hexdigest(),
        }
        for spec, licence, tar in sources
    ]
    (args.output_dir / "SOURCES.json").write_text(json.dumps(described, indent=2) + "\n")
    print(f"{len(records)} pictures, {len(skipped)} skipped, in {args.output_dir}")


if __name__ == "__main__":
    main()
