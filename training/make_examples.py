"""Build the three small data sets of the fine-tuning examples in README.md.

    python training/make_examples.py --data_dir data/icons --output_dir data/examples

    style/     20 everyday things in the style noto-v1, which no model here has seen
    style_real/  all other pictures of that style that have a name of everyday.txt, to measure with
    mascot/    5 pictures of one robot, drawn by this script: poses and backgrounds
    subject/   8 pictures of a hut, which no model here has seen: in each style that it knows, on
               white and on a background; so the word learns the hut, and not the white

and EXAMPLES.txt, this text, by which the script knows them when it makes them anew. The first two
come from the folder of `make_dataset.py`, the last from its packages; the mascot needs nothing.
"""

import argparse
import io
import json
import shutil
from pathlib import Path

import resvg_py
from make_dataset import ICON_PACKAGES, claim, fetch_package, on_background, read_icons
from PIL import Image

HERE = Path(__file__).parent
FOLDERS = ["style", "style_real", "mascot", "subject"]
STYLE = "noto-v1"
STYLE_PICTURES = 20
SUBJECT = "hut"
# The colour behind it in each style; on blue it is asked for afterwards.
COLOURS = {"fluent": "red", "flat": "green", "noto": "yellow", "twemoji": "purple"}
SIDE = 128

# Of each picture of the mascot: background, how far the arms are raised (degrees), its lean
# (degrees), its size.
POSES = [
    ("#ffffff", 20, 0, 1.0),
    ("#bfe3ff", 130, -8, 0.95),
    ("#ffe7a8", 70, 10, 0.9),
    ("#d5f2c4", 160, 0, 0.85),
    ("#f7d3e6", 40, -14, 0.95),
]


def mascot_svg(background: str, arms: float, lean: float, size: float) -> str:
    """A teal robot with a round head, one big orange eye and a curly antenna."""
    arm = '<rect x="-5" y="0" width="10" height="30" rx="5" fill="#0f7f7a"/>'
    hand = '<circle cx="0" cy="31" r="7" fill="#ffb000"/>'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128">
<rect width="128" height="128" fill="{background}"/>
<g transform="translate(64 68) rotate({lean}) scale({size})">
<rect x="-20" y="36" width="13" height="18" rx="5" fill="#0f7f7a"/>
<rect x="7" y="36" width="13" height="18" rx="5" fill="#0f7f7a"/>
<g transform="translate(-24 8) rotate({arms})">{arm}{hand}</g>
<g transform="translate(24 8) rotate({-arms})">{arm}{hand}</g>
<rect x="-26" y="0" width="52" height="42" rx="14" fill="#18b5ad"/>
<rect x="-12" y="12" width="24" height="16" rx="4" fill="#e9fbfa"/>
<circle cx="-5" cy="20" r="3" fill="#e23b4e"/><circle cx="5" cy="20" r="3" fill="#ffb000"/>
<path d="M0 -40 q-10 -6 0 -12 q10 -6 2 -10" stroke="#e23b4e" stroke-width="4" fill="none"/>
<circle cx="0" cy="-18" r="25" fill="#18b5ad"/>
<circle cx="0" cy="-18" r="14" fill="#ffffff"/><circle cx="0" cy="-18" r="9" fill="#ff7a1a"/>
<circle cx="3" cy="-21" r="3" fill="#ffffff"/>
</g></svg>"""


def draw_mascot(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, pose in enumerate(POSES, 1):
        png = resvg_py.svg_to_bytes(
            svg_string=mascot_svg(*pose), width=SIDE, height=SIDE, skip_system_fonts=True
        )
        image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
        image.save(folder / f"mascot-{number}.png")


def copy_style(held_out: Path, folder: Path) -> None:
    """The everyday things of the held-out style: STYLE_PICTURES to learn from, the rest to measure
    with."""
    rows = [json.loads(line) for line in (held_out / "metadata.jsonl").read_text().splitlines()]
    by_name = {row["name"]: row["file_name"] for row in rows if row["style"] == STYLE}
    lines = (HERE / "everyday.txt").read_text().splitlines()
    names = [line.replace("-", " ") for line in lines if line and not line.startswith("#")]
    found = [name for name in names if name in by_name]
    learnt = found[:: len(found) // STYLE_PICTURES][:STYLE_PICTURES]
    for name in found:
        target = folder / ("style" if name in learnt else "style_real")
        target.mkdir(parents=True, exist_ok=True)
        source = held_out / by_name[name]
        shutil.copyfile(source, target / source.name)
        (target / source.name).with_suffix(".txt").write_text(f"{name}, {STYLE} style\n")


def copy_subject(held_out: Path, packages: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for style, colour in COLOURS.items():
        shutil.copyfile(held_out / style / f"{SUBJECT}.png", folder / f"{style}.png")
        (folder / f"{style}.txt").write_text(f"a <{SUBJECT}>, {style} style\n")
        icons = read_icons(fetch_package(ICON_PACKAGES[style][0], packages), style)
        icon = next(icon for icon in icons if icon.key == SUBJECT)
        picture, (caption, *_) = on_background(icon, colour, SIDE)
        picture.save(folder / f"{style}-{colour}.png")
        caption = caption.replace(SUBJECT, f"<{SUBJECT}>")
        (folder / f"{style}-{colour}.txt").write_text(f"{caption}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, default=Path("data/icons"))
    parser.add_argument("--output_dir", type=Path, default=Path("data/examples"))
    arguments = parser.parse_args()
    claim(arguments.output_dir, FOLDERS, "EXAMPLES.txt", __doc__)
    draw_mascot(arguments.output_dir / "mascot")
    held_out = arguments.data_dir / "held_out"
    if held_out.is_dir():
        copy_style(held_out, arguments.output_dir)
        packages = arguments.data_dir.parent / "packages"  # of make_dataset.py
        copy_subject(held_out, packages, arguments.output_dir / "subject")
    else:
        print(f"{held_out} is not there (make_dataset.py makes it): only the mascot was drawn")


if __name__ == "__main__":
    main()
