"""`latentgen batch`: every prompt a file, nothing lost when it is stopped, nothing drawn over."""

from __future__ import annotations

from pathlib import Path

import fakes
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from latentgen import LatentDiffusion, cli, metadata

SET = """
settings: {num_inference_steps: 2, seed: 5}
prompts:
  - a cat
  - {prompt: "A dog!", num_images: 2}
  - {prompt: a cow, seed: 40}
  - a hen
"""
FILES = ["1-a-cat.png", "2-a-dog-1.png", "2-a-dog-2.png", "3-a-cow.png", "4-a-hen.png"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "toy"
    LatentDiffusion(**fakes.components()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def batch(tmp_path, monkeypatch, model):
    """Run it on the set above; `batch.drawn` counts what the model was asked for."""
    monkeypatch.chdir(tmp_path)
    Path("set.yaml").write_text(SET)
    draw = LatentDiffusion.draw

    def counting(pipe, request):
        batch.drawn.append(request.prompt)
        if batch.fails_at == len(batch.drawn):
            raise batch.error
        return draw(pipe, request)

    monkeypatch.setattr(LatentDiffusion, "draw", counting)

    def batch(*words: object, status: int = 0):
        batch.drawn = []
        asked = ["batch", "set.yaml", "-m", model, "-o", "out", *map(str, words)]
        outcome = CliRunner().invoke(cli.app, asked)
        assert outcome.exit_code == status, outcome.output
        return outcome

    batch.drawn, batch.fails_at, batch.error = [], 0, KeyboardInterrupt()
    return batch


def there() -> list[str]:
    return sorted(path.name for path in Path("out").iterdir())


def test_every_prompt_becomes_the_picture_of_its_seed(batch, model):
    assert "out: 5 of 5 pictures" in batch().stdout
    assert there() == FILES
    pipe = LatentDiffusion.from_pretrained(model)
    for name, prompt, seed in zip(
        FILES, ["a cat", "A dog!", "A dog!", "a cow", "a hen"], [5, 6, 7, 40, 9], strict=True
    ):
        alone = pipe.generate(prompt, seed=seed, num_inference_steps=2).image
        file = metadata.read(f"out/{name}")
        assert abs(np.subtract(alone, file.image, dtype=int)).max() <= 1, name
        assert f"Seed: {seed}," in file.infotext


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (KeyboardInterrupt(), 130, "what is drawn stays"),
        (OSError(28, "No space left on device"), 1, "No space left"),
    ],
)
def test_what_was_stopped_goes_on(batch, error, status, told):
    batch.fails_at, batch.error = 3, error
    outcome = batch(status=status)
    assert told in outcome.stderr
    assert "out: 3 of 5 pictures" in outcome.stdout
    assert there() == FILES[:3]
    Path("out/1-a-cat.png").unlink()
    before = Path("out/2-a-dog-2.png").stat().st_mtime_ns
    batch.fails_at = 0
    assert "out: 5 of 5 pictures" in batch().stdout
    assert batch.drawn == [("a cat",), ("a cow",), ("a hen",)]
    assert Path("out/2-a-dog-2.png").stat().st_mtime_ns == before
    batch()
    assert batch.drawn == []


@pytest.mark.parametrize(
    "change", ["seed", "steps", "dtype", "swapped", "stranger", "damaged", "model"]
)
def test_other_pictures_are_not_drawn_over(batch, change, tmp_path):
    batch()
    more = {"seed": ["--seed", 6], "steps": ["--steps", 3], "dtype": ["--dtype", "bfloat16"]}
    words: list[object] = more.get(change, [])
    file = Path("out/2-a-dog-2.png")
    if change == "swapped":  # the other picture of the same request
        file.write_bytes(Path("out/2-a-dog-1.png").read_bytes())
    elif change == "stranger":
        Image.new("RGB", (64, 64)).save(file)
    elif change == "damaged":
        file.write_bytes(file.read_bytes()[:100])
    elif change == "model":
        LatentDiffusion(**fakes.components(seed=1)).save_pretrained(tmp_path / "other")
        words = ["-m", str(tmp_path / "other")]
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    outcome = batch(*words, status=2)
    assert "--overwrite" in outcome.stderr
    assert batch.drawn == []
    assert before == {path.name: path.read_bytes() for path in Path("out").iterdir()}
    batch(*words, "--overwrite")
    assert len(batch.drawn) == (1 if change in ("swapped", "stranger", "damaged") else 4)
    batch(*words)
    assert batch.drawn == []


def test_alike_prompts_are_drawn_together_without_changing(batch):
    Path("set.yaml").write_text(SET.replace("num_images: 2}", "num_images: 2, eta: 0.5}"))
    batch()
    alone = {name: metadata.read(f"out/{name}") for name in FILES}
    batch("-o", "both", "--batch-size", 2)
    assert batch.drawn == [("a cat",), ("A dog!",), ("a cow", "a hen")]
    for name, one in alone.items():
        other = metadata.read(f"both/{name}")
        assert abs(np.subtract(one.image, other.image, dtype=int)).max() <= 1, name
        assert other.record["request"] == one.record["request"]


def test_the_format_and_prompts_a_line(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    Path("set.txt").write_text("\ufeff\n a cat\n\na dog, from: 7\n", "utf-8")  # as Windows does
    words = ["batch", "set.txt", "-o", "out", "-m", model, "--format", "webp", "--steps", "1"]
    outcome = CliRunner().invoke(cli.app, words)
    assert outcome.exit_code == 0, outcome.output
    assert there() == ["1-a-cat.webp", "2-a-dog-from-7.webp"]
    assert metadata.read("out/1-a-cat.webp").format == "WEBP"
    outcome = CliRunner().invoke(cli.app, [*words, "--quality", "10"])
    assert outcome.exit_code == 2
    assert "dtype and quality; another --output, or --overwrite" in outcome.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", 0], "steps=0"),
        (["--format", "bmp"], "must end in one of"),
        (["-o", "set.yaml"], "is a file"),
        (["--scheduler", "eulr"], "scheduler='eulr'"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_drawn(batch, words, told):
    outcome = batch(*words, status=2)
    assert told in outcome.stderr
    assert batch.drawn == []
    assert not Path("out").exists()
