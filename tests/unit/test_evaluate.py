"""The figures of `latentgen evaluate`, on a judge whose vectors are known, and its prompt sets."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from latentgen import InvalidRequest, metadata
from latentgen.evaluate import Evaluation, evaluate, measure
from latentgen.promptfile import PromptSet, read_prompts

PROMPTS = [f"colour {i}" for i in range(8)]


class ColourJudge:
    """Each prompt is a colour of its own; a picture is where its mean colour is among them."""

    name = "colours"
    colours = torch.rand((8, 3), generator=torch.Generator().manual_seed(3))

    def read(self, texts):
        return F.normalize(self.colours[[int(text.split()[1]) for text in texts]] - 0.5, dim=-1)

    def see(self, images):
        means = np.stack([np.asarray(image).mean((0, 1)) / 255 for image in images])
        return F.normalize(torch.from_numpy(means).float() - 0.5, dim=-1)


def painted(numbers) -> list[Image.Image]:
    colours = (ColourJudge.colours * 255).round().byte().tolist()
    return [Image.new("RGB", (8, 8), tuple(colours[number])) for number in numbers]


def test_right_pictures_score_full():
    found = measure(painted(range(8)), PROMPTS, ColourJudge())
    assert found["retrieval_top_1"] == found["retrieval_top_5"] == 1
    assert found["clip_score"] == pytest.approx(100, abs=1)
    assert found["retrieval_chance"] == 1 / 8
    assert "diversity" not in found  # one picture a prompt says nothing about it
    assert "kid" not in found


def test_wrong_pictures_and_noise_score_what_they_are():
    shifted = measure(painted([(i + 1) % 8 for i in range(8)]), PROMPTS, ColourJudge())
    assert shifted["retrieval_top_1"] == 0
    half = measure(painted([0, 1, 2, 3, 5, 6, 7, 4]), PROMPTS, ColourJudge())
    assert half["retrieval_top_1"] == 0.5
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(400)]
    found = measure(noise, PROMPTS, ColourJudge())
    assert found["retrieval_top_1"] == pytest.approx(1 / 8, abs=0.02)
    assert abs(found["clip_score"]) < 30


def test_a_prompt_asked_twice_is_one_answer():
    found = measure(painted([0, 0, 1]), ["colour 0", "colour 0", "colour 1"], ColourJudge())
    assert found["retrieval_top_1"] == 1
    assert found["retrieval_chance"] == 0.5


def test_diversity_is_the_distance_within_a_prompt():
    same = measure(painted([0, 0, 1, 1]), PROMPTS[:2], ColourJudge())
    assert same["diversity"] == pytest.approx(0, abs=1e-6)
    judge = ColourJudge()
    seen = judge.see(painted([0, 1]))
    apart = measure(painted([0, 1, 1, 0]), PROMPTS[:2], judge)
    assert apart["diversity"] == pytest.approx(1 - (seen[0] @ seen[1]).item(), abs=1e-5)


def test_kid_is_nothing_for_the_same_pictures_and_repeats_itself():
    pictures = painted([0, 1, 2, 3, 4, 5, 6, 7] * 4)
    near = measure(pictures, PROMPTS, ColourJudge(), pictures)["kid"]
    far = measure(painted([0] * 32), PROMPTS, ColourJudge(), pictures)["kid"]
    torch.rand(7)
    assert measure(painted([0] * 32), PROMPTS, ColourJudge(), pictures)["kid"] == far
    assert abs(near) < 0.1 * far


def test_pictures_that_do_not_fit_the_prompts_are_refused():
    with pytest.raises(InvalidRequest, match="as many pictures each"):
        measure(painted([0, 1, 2]), PROMPTS[:2], ColourJudge())
    with pytest.raises(InvalidRequest, match="KID needs two"):
        measure(painted([0, 1]), PROMPTS[:2], ColourJudge(), painted([0]))


def test_evaluating_twice_gives_the_same_figures(pipe, tmp_path):
    prompts = PromptSet("set", ({"prompt": "colour 0"}, {"prompt": "colour 1", "eta": 0.5}))
    asked = {"num_images": 2, "num_inference_steps": 2, "seed": 5}
    counted = []
    runs = [
        evaluate(pipe, prompts, ColourJudge(), on_picture=lambda *n: counted.append(n), **asked)
        for _ in range(2)
    ]
    first, second = (run.metrics | {"seconds_per_picture": 0} for run in runs)
    assert first == second
    assert runs[0].metrics["seconds_per_picture"] > 0
    assert counted[:2] == [(2, 4), (4, 4)]
    file = {"prompt": "colour 0", "num_images": 2, "seed": 5}  # what a set says is what is drawn
    again = evaluate(pipe, PromptSet("set", (file,)), ColourJudge(), num_inference_steps=2)
    assert [a.tobytes() for a in again.images] == [b.tobytes() for b in runs[0].images[:2]]
    mixed = PromptSet("set", (file, {"prompt": "colour 1"}))
    with pytest.raises(InvalidRequest, match="the same number"):
        evaluate(pipe, mixed, ColourJudge())
    alone = pipe.generate("colour 1", seed=7, num_inference_steps=2, eta=0.5, num_images=2)
    assert [a.tobytes() for a in runs[0].images[2:]] == [b.tobytes() for b in alone.images]
    written = runs[0].save(tmp_path / "report")
    report = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert report["metrics"] == runs[0].metrics
    assert report["settings"]["num_inference_steps"] == 2
    pictures = sorted((tmp_path / "report" / "pictures").iterdir())
    assert len(pictures) == 4
    known = metadata.read(pictures[3]).record  # `replay` repeats it
    assert (known["request"]["prompt"], known["index"]) == (["colour 1"], 1)
    with Image.open(written[1]) as sheet:
        assert sheet.height > 2 * 32  # the captions have room


def test_saved_pictures_come_back_in_their_order(tmp_path):
    from latentgen.images import read_pictures

    for pictures, prompts in (
        (painted([0] * 9), ["a\nprompt of two lines"]),
        (painted(range(8)), PROMPTS),
    ):
        files = [metadata.encode(picture, "PNG", "", None, 95) for picture in pictures]
        Evaluation({}, {}, pictures, prompts, files).save(tmp_path)
    found = measure(read_pictures(tmp_path / "pictures"), PROMPTS, ColourJudge())
    assert found["retrieval_top_1"] == 1


def test_what_was_measured_is_not_overwritten(tmp_path):
    picture = tmp_path / "pictures" / "0001.png"
    picture.parent.mkdir()
    picture.write_bytes(b"mine")
    Evaluation({}, {}, painted(range(8)), PROMPTS).save(tmp_path)
    assert picture.read_bytes() == b"mine"
    assert (tmp_path / "evaluation.json").is_file()
    assert list(picture.parent.iterdir()) == [picture]


def test_prompt_sets_are_read_with_their_settings(tmp_path):
    file = tmp_path / "set.yaml"
    file.write_text(
        "settings: {guidance_scale: 4}\n"
        "prompts:\n  - a red apple\n  - {prompt: a rocket, guidance_scale: 2, seed: 3}\n"
    )
    found = read_prompts(file)
    assert found.prompts == ["a red apple", "a rocket"]
    assert found.entries[0] == {"prompt": "a red apple", "guidance_scale": 4}
    assert found.entries[1] == {"prompt": "a rocket", "guidance_scale": 2, "seed": 3}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("prompts: []", "list `prompts`"),
        ("- a red apple", "list `prompts`"),
        ("prompts: [a]\nsteps: 3", "list `prompts`"),
        ("prompts: {a: b}", "must be a list"),
        ("prompts: [7]", "a prompt is a text"),
        ("prompts: [{prompt: a, steps: 3}]", "steps=3.*num_inference_steps"),
        ("settings: {image: a.png}\nprompts: [a]", "image"),
        ("prompts: [a", "not readable"),
        ("settings: {seed: -1}\nprompts: [a]", "seed=-1"),
    ],
)
def test_a_wrong_prompt_set_says_what_would_work(tmp_path, content, told):
    file = tmp_path / "set.yaml"
    file.write_text(content)
    with pytest.raises(InvalidRequest, match=told):
        read_prompts(file)
    with pytest.raises(InvalidRequest, match="no such file"):
        read_prompts(tmp_path / "none.yaml")


def test_the_prompt_sets_that_ship_can_be_read():
    files = sorted((Path(__file__).parents[2] / "prompts").glob("*.yaml"))
    assert files
    for file in files:
        prompts = read_prompts(file).prompts
        assert len(prompts) == len(set(prompts))
