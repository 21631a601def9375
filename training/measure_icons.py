"""Measure what the bundled model draws: the figures and the plots of its card.

    python training/measure_icons.py --data_dir data/icons --output_dir runs/measured

A judge turns pictures into vectors: the image encoder of the model, or another CLIP (`--clip`).
A drawing is right if, of all icons of its style, the one it was asked for is the nearest (top 1),
or among the five nearest (top 5); `random.Random(0)` picks what is asked for. It writes:

    measured.json   icons: right of "a fox, flat style", and the same of the autoencoder's
                    reconstructions, which are the ceiling; the style, right if of the icons of that
                    name the one in the style asked for is the nearest, to the judge and by pixels
                    (the judge mistakes flat for shaded), and which came for which;
                    KID to the icons of each style; and right of wordings that no caption has, of
                    backgrounds (the colour is that of the frame), counts and pairs
    *.png           what was drawn for it
    with --sweep    guidance, steps and schedulers: right and KID in the usual style, and a plot
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from make_dataset import (
    BACKGROUNDS,
    COUNTS,
    HERE,
    ICON_PACKAGES,
    USUAL_STYLE,
    Icon,
    blank,
    fetch_package,
    on_background,
    paste,
    plural,
    read_icons,
    with_article,
)
from PIL import Image, ImageColor
from torch import Tensor
from tqdm import tqdm

from latentgen import LatentDiffusion
from latentgen.evaluate import Judge, measure
from latentgen.images import contact_sheet
from latentgen.training.data import to_pictures, to_signal

SIDE = 128
STYLES = ("noto", "twemoji", "fluent", "flat")
BATCH = 16
WORDINGS = (
    "draw me {called}, {style} style",
    "{name} emoji, {style} style",
    "one {name} drawn in {style} style",
    "could I have {called}? {style} style",
)
GUIDANCE = (1, 1.5, 2, 3, 4, 5, 7, 10)
STEPS = (4, 6, 8, 10, 15, 20, 30, 50)
SCHEDULERS = ("ddim", "ddpm", "euler", "euler_a", "heun", "dpm++_2m", "dpm++_2m_sde", "unipc",
              "lcm", "pndm")  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One thing to draw: its name, its style, and the words that ask for it."""

    name: str
    style: str
    prompt: str


class Bench:
    """The model, the judge and the icons."""

    def __init__(self, model: Path, clip: Path | None, data_dir: Path) -> None:
        self.pipe = LatentDiffusion.from_pretrained(model)
        self.judge = Judge(clip or model)
        lines = (data_dir / "train" / "subjects.jsonl").read_text().splitlines()
        drawn = {(row["style"], row["name"]) for row in map(json.loads, lines)}
        self.icons: dict[str, dict[str, Icon]] = {}  # style, name
        for style in STYLES:
            tarball = fetch_package(ICON_PACKAGES[style][0], data_dir.parent / "packages")
            icons = [icon for icon in read_icons(tarball, style) if (style, icon.name) in drawn]
            self.icons[style] = {icon.name: icon for icon in icons}
        self.known = sorted(set.intersection(*(set(icons) for icons in self.icons.values())))

    def draw(self, prompts: list[str], **settings) -> list[Image.Image]:
        """A picture of each, from the seeds 0, 1, 2 …"""
        images: list[Image.Image] = []
        for start in tqdm(range(0, len(prompts), BATCH), leave=False):
            part = prompts[start : start + BATCH]
            images += self.pipe.generate(part, seed=start, **settings).images
        return images

    def right(self, drawn: list[Image.Image], bank: list[Image.Image], own: list[int]) -> dict:
        """How often picture i's nearest of the bank is number `own[i]`; and of the five nearest."""
        order = (self.judge.see(drawn) @ self.judge.see(bank).T).argsort(1, descending=True)
        hit = order == torch.tensor(own)[:, None]
        return {"top_1": share(hit[:, :1].any(1)), "top_5": share(hit[:, :5].any(1))}

    def reconstruct(self, images: list[Image.Image]) -> list[Image.Image]:
        """What the autoencoder makes of pictures."""
        vae, found = self.pipe.vae, []
        with torch.no_grad():
            for start in range(0, len(images), BATCH):
                arrays = np.stack([np.asarray(image) for image in images[start : start + BATCH]])
                pixels = to_signal(torch.from_numpy(arrays).permute(0, 3, 1, 2))
                latents = vae.encode(pixels.to(vae.device, vae.dtype)).latents
                found += to_pictures(vae.decode(latents).sample)
        return found

    def by_style(
        self,
        asked: list[Asked],
        drawn: list[Image.Image],
        picture: Callable[[Icon], Image.Image],
    ) -> dict[str, float]:
        """`right` of each style among the icons of all names, and the mean of the styles."""
        found = []
        for style in STYLES:
            names = list(self.icons[style])
            bank = [picture(icon) for icon in self.icons[style].values()]
            own = [i for i, one in enumerate(asked) if one.style == style]
            if own:
                wanted = [names.index(asked[i].name) for i in own]
                found.append(self.right([drawn[i] for i in own], bank, wanted))
        return {key: sum(each[key] for each in found) / len(found) for key in found[0]}


def share(hits: Tensor) -> float:
    return round(hits.float().mean().item(), 4)


def as_rows(images: list[Image.Image]) -> Tensor:
    """(names, 4, numbers): all pixels of each picture, the four styles of a name together."""
    arrays = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(arrays).reshape(-1, len(STYLES), arrays[0].size)


def plain(icon: Icon) -> Image.Image:
    canvas = blank(SIDE)
    paste(canvas, icon, 1.0, (0.5, 0.5))
    return canvas


def names_and_styles(bench: Bench, count: int) -> list[Asked]:
    names = random.Random(0).sample(bench.known, min(count, len(bench.known)))
    return [
        Asked(name, style, f"{with_article(name)}, {style} style")
        for name in names
        for style in STYLES
    ]


def one_style_a_name(bench: Bench, count: int) -> list[Asked]:
    """The same names, each in one of its styles by turns."""
    asked = names_and_styles(bench, count)
    return [asked[4 * i + i % 4] for i in range(len(asked) // 4)]


def measure_icons(bench: Bench, count: int, output: Path) -> dict:
    asked = names_and_styles(bench, count)
    real = [plain(bench.icons[one.style][one.name]) for one in asked]
    drawn = bench.draw([one.prompt for one in asked])
    contact_sheet(drawn[: 4 * 25], 20).save(output / "icons.png")
    for i, image in enumerate(drawn):
        (output / "icons").mkdir(exist_ok=True)
        image.save(output / "icons" / f"{i:04d}.png")
    ceiling = bench.by_style(asked, bench.reconstruct(real), plain)
    found = bench.by_style(asked, drawn, plain)
    seen, reals = bench.judge.see(drawn), bench.judge.see(real)
    of_name = seen.reshape(-1, 4, seen.shape[-1]) @ reals.reshape(-1, 4, reals.shape[-1]).mT
    nearest = of_name.argmax(-1)
    by_pixels = torch.cdist(as_rows(drawn), as_rows(real)).argmin(-1)  # (names, 4)
    wrong = [(s, n) for row in nearest.tolist() for s, n in enumerate(row) if s != n]
    came = Counter(f"{STYLES[n]} for {STYLES[s]}" for s, n in wrong)
    kid = {}
    for k, name in enumerate(STYLES):
        prompts = [one.prompt for one in asked[k::4]]
        kid[name] = round(measure(drawn[k::4], prompts, bench.judge, real[k::4])["kid"], 4)
    of_ceiling = {key: round(found[key] / ceiling[key], 4) for key in found}
    return {
        "pictures": len(drawn),
        "drawn": found,
        "reconstructions": ceiling,
        "of_the_ceiling": of_ceiling,
        "style": share(nearest == torch.arange(4)),
        "style_by_pixels": share(by_pixels == torch.arange(4)),
        "other_style": dict(came.most_common()),
        "kid": kid,
    }


def measure_wordings(bench: Bench, count: int, output: Path) -> dict:
    rng = random.Random(1)
    asked = []
    for one in one_style_a_name(bench, count):
        words = {"name": one.name, "called": with_article(one.name), "style": one.style}
        asked.append(replace(one, prompt=rng.choice(WORDINGS).format(**words)))
    drawn = bench.draw([one.prompt for one in asked])
    contact_sheet(drawn[: 4 * 25], 20).save(output / "wordings.png")
    return bench.by_style(asked, drawn, plain)


def measure_backgrounds(bench: Bench, count: int, output: Path) -> dict:
    rng = random.Random(2)
    asked, colours = [], []
    for one in one_style_a_name(bench, count):
        colour = rng.choice(list(BACKGROUNDS))
        prompt = f"{with_article(one.name)} on a {colour} background, {one.style} style"
        asked.append(replace(one, prompt=prompt))
        colours.append(colour)
    drawn = bench.draw([one.prompt for one in asked])
    contact_sheet(drawn[: 4 * 25], 20).save(output / "backgrounds.png")
    palette = {"white": "#ffffff"} | BACKGROUNDS
    values = np.array([ImageColor.getrgb(value) for value in palette.values()])
    frames = [list(palette)[((values - frame(image)) ** 2).sum(1).argmin()] for image in drawn]
    right = [frame == colour for frame, colour in zip(frames, colours, strict=True)]
    subject = 0.0
    for colour in BACKGROUNDS:
        own = [i for i in range(len(asked)) if colours[i] == colour]
        if own:
            found = bench.by_style(
                [asked[i] for i in own],
                [drawn[i] for i in own],
                lambda icon, colour=colour: on_background(icon, colour, SIDE)[0],
            )
            subject += found["top_1"] * len(own) / len(asked)
    return {"colour": share(torch.tensor(right)), "top_1": round(subject, 4)}


def frame(image: Image.Image) -> np.ndarray:
    """The median colour of the outermost three pixels."""
    pixels = np.asarray(image.convert("RGB"))
    inner = np.zeros(pixels.shape[:2], bool)
    inner[3:-3, 3:-3] = True
    return np.median(pixels[~inner], axis=0)


def measure_counts(bench: Bench, count: int, output: Path) -> dict:
    rng = random.Random(3)
    icons = bench.icons[USUAL_STYLE]
    names = [name for name in bench.known if plural(name) is not None]
    names = rng.sample(names, min(count, len(names)))
    wanted = [(name, rng.choice(list(COUNTS))) for name in names]
    drawn = bench.draw([f"{number} {plural(name)}, {USUAL_STYLE} style" for name, number in wanted])
    contact_sheet(drawn[:40], 10).save(output / "counts.png")
    bank, labels = [], []
    for name in names:
        for number, (side, centres) in {"one": (1.0, ((0.5, 0.5),)), **COUNTS}.items():
            canvas = blank(SIDE)
            for centre in centres:
                paste(canvas, icons[name], side, centre)
            bank.append(canvas)
            labels.append((name, number))
    nearest = (bench.judge.see(drawn) @ bench.judge.see(bank).T).argmax(1).tolist()
    found = [labels[i] for i in nearest]
    pairs = list(zip(found, wanted, strict=True))
    return {
        "number": share(torch.tensor([a[1] == b[1] for a, b in pairs])),
        "subject": share(torch.tensor([a[0] == b[0] for a, b in pairs])),
        "both": share(torch.tensor([a == b for a, b in pairs])),
    }


def measure_pairs(bench: Bench, count: int, output: Path) -> dict:
    rng = random.Random(4)
    icons = bench.icons[USUAL_STYLE]
    wanted = [tuple(rng.sample(bench.known, 2)) for _ in range(count)]
    prompts = [
        f"{with_article(one)} next to {with_article(two)}, {USUAL_STYLE} style"
        for one, two in wanted
    ]
    drawn = bench.draw(prompts)
    contact_sheet(drawn[:40], 10).save(output / "pairs.png")
    bank = []
    for pair in wanted:
        canvas = blank(SIDE)
        for name, x in zip(pair, (0.26, 0.74), strict=True):
            paste(canvas, icons[name], 0.48, (x, 0.5))
        bank.append(canvas)
    return bench.right(drawn, bank, list(range(count)))


def sweep(bench: Bench, count: int, output: Path) -> dict:
    """How right and KID move with one setting while the others stay at the model's defaults."""
    asked = names_and_styles(bench, count)[STYLES.index(USUAL_STYLE) :: 4]
    real = [plain(bench.icons[USUAL_STYLE][one.name]) for one in asked]
    axes = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, "scheduler": SCHEDULERS}
    found: dict[str, dict] = {}
    for axis, values in axes.items():
        found[axis] = {}
        for value in values:
            drawn = bench.draw([one.prompt for one in asked], **{axis: value})
            contact_sheet(drawn[:24], 12).save(output / f"{axis}-{value}.png")
            kid = measure(drawn, [one.prompt for one in asked], bench.judge, real)["kid"]
            found[axis][str(value)] = bench.by_style(asked, drawn, plain) | {"kid": round(kid, 4)}
            print(axis, value, found[axis][str(value)], flush=True)
    plot(found, output / "sweep.png")
    return found


def plot(found: dict[str, dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.4), layout="constrained")
    kids = [each["kid"] for values in found.values() for each in values.values()]
    for left, (axis, values) in zip(axes, found.items(), strict=True):
        places = [str(value) for value in values]
        lines = axis != "scheduler"  # which have no order
        right = left.twinx()
        (one,) = left.plot(
            places, [each["top_1"] for each in values.values()], "o-" if lines else "o"
        )
        (two,) = right.plot(
            places, [each["kid"] for each in values.values()], "s--" if lines else "s", color="C1"
        )
        left.set(title=axis, ylim=(0, 1.05))
        right.set_ylim(min(0, *kids) - 0.02, max(0, *kids) + 0.02)  # the same in all
        left.set_ylabel("right, top 1", color="C0")
        right.set_ylabel("KID", color="C1")
        if not lines:
            left.set_xticks(range(len(places)), places, rotation=50, ha="right")
    figure.legend([one, two], ["right", "KID to the icons"], loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=110)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    bundled = HERE.parent / "latentgen" / "models" / "latentgen-icons-128"
    parser.add_argument("--model", type=Path, default=bundled, help="a model folder")
    parser.add_argument("--clip", type=Path, default=None, help="another judge, a CLIP's folder")
    parser.add_argument("--data_dir", type=Path, default=Path("data/icons"))
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--names", type=int, default=200, help="to draw, each in four styles")
    parser.add_argument("--sweep", action="store_true", help="settings instead of prompts")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.model, args.clip, args.data_dir)
    if args.sweep:
        parts = {"sweep": sweep}
    else:
        parts = {
            "icons": measure_icons,
            "wordings": measure_wordings,
            "backgrounds": measure_backgrounds,
            "counts": measure_counts,
            "pairs": measure_pairs,
        }
    report = {"model": args.model.name, "judge": bench.judge.name, "names": args.names}
    for name, part in parts.items():
        report[name] = part(bench, args.names, args.output_dir)
        print(name, json.dumps(report[name]), flush=True)
    file = args.output_dir / f"{'sweep' if args.sweep else 'measured'}.json"
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
