"""What a picture says about itself is read back as it was written, in every format."""

from __future__ import annotations

import errno
import json
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from latentgen import InvalidRequest, metadata
from latentgen.metadata import (
    infotext,
    parse_infotext,
    record,
    request_from_infotext,
    request_from_record,
)
from latentgen.modelfolder import Model
from latentgen.pipeline import Result
from latentgen.request import Request

WEBUI = """a (red:1.2) apple,
on a table
Negative prompt: blurry, "bad"
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 512x640, \
Model hash: 6ce0161689, Model: v1-5, Clip skip: 2, Lora hashes: "fruit: 0123456789ab"\
"""


@pytest.fixture
def result(tmp_path) -> Result:
    model = Model("toy", tmp_path, height=32, width=32, scheduler_class="DDIMScheduler")
    request = Request(
        prompt=["a cat: really, a cat", "ein Hügel\nwith 猫"],
        negative_prompt="blurry",
        scheduler="dpm++_2m karras",
        seed=5,
        num_images=2,
    ).resolve(model)
    noise = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)
    pictures = [Image.fromarray(row) for row in noise]
    settings = {"device": "cpu", "dtype": "float32", "attention": "sdpa"}
    return Result(pictures, request.seeds, request, model, settings, 0.5)


@pytest.mark.parametrize("quality", [0, -5, 101, 500, "95", 95.5, True])
def test_a_quality_that_is_none_is_refused_and_nothing_is_written(result, tmp_path, quality):
    for ending in ("png", "jpg", "webp"):
        with pytest.raises(InvalidRequest, match=r"quality.*a whole number from 1 to 100"):
            result.save(tmp_path / f"x.{ending}", quality)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_leaves_the_one_before(result, tmp_path, monkeypatch):
    result = replace(result, images=result.images[:1])
    (path,) = result.save(tmp_path / "x.png")
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("latentgen.outputs.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        result.save(tmp_path / "x.png", 90)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_lora_in_a_negative_prompt_of_the_webui_is_left_out_and_told():
    text = "a cat\nNegative prompt: bad, <lora:x:0.5>\nSteps: 2, Seed: 1, Size: 8x8, RNG: CPU"
    request, notes = request_from_infotext(parse_infotext(text))
    assert request.negative_prompt == ("bad,",)
    assert "<lora:x:0.5> in its negative prompt, which is left out" in notes


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "avif"])
def test_every_format_carries_the_infotext_and_the_record(result, tmp_path, ending):
    paths = result.save(tmp_path / f"x.{ending}")

    assert [path.name for path in paths] == [f"x-{k}.{ending}" for k in (1, 2, 3, 4)]
    found = metadata.read(paths[2])
    assert found.infotext == metadata.infotext(result, 2)
    assert found.record == json.loads(json.dumps(metadata.record(result, 2)))
    again = metadata.request_from_record(found.record).resolve(result.model)
    assert again == result.request


def test_png_keeps_the_pixels(result, tmp_path):
    path = result.save(tmp_path / "x.png")[1]
    assert metadata.fingerprint(metadata.read(path).image) == metadata.fingerprint(result.images[1])


def test_the_infotext_is_the_webuis(result):
    assert metadata.infotext(result, 1).split("\n") == [
        "a cat: really, a cat",
        "Negative prompt: blurry",
        "Steps: 50, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 6, "
        "Size: 32x32, Model: toy, RNG: CPU, Version: latentgen 0.1.0",
    ]


def test_an_infotext_of_the_webui_is_understood():
    info = parse_infotext(WEBUI)

    assert info.prompt == "a (red:1.2) apple,\non a table"
    assert info.negative_prompt == 'blurry, "bad"'
    assert info.fields["Lora hashes"] == "fruit: 0123456789ab"
    request, notes = request_from_infotext(info)
    assert request == Request(
        prompt=info.prompt,
        negative_prompt=info.negative_prompt,
        num_inference_steps=20,
        guidance_scale=7,
        scheduler="dpm++_2m karras",
        seed=42,
        width=512,
        height=640,
    )
    told = " / ".join(notes)
    for lost in ("Clip skip: 2", "Lora hashes: fruit", "noise"):
        assert lost in told
    assert "Steps" not in told
    assert "plain text" not in told  # its weights mean the same here


@pytest.mark.parametrize("prompt", ["a [cat:dog:0.5]", "a [cat|dog]", "a cat AND a dog", "<x:y>"])
def test_what_a_prompt_of_the_webui_means_only_there_is_told(prompt):
    _, notes = request_from_infotext(parse_infotext(f"{prompt}\nSteps: 2, Seed: 1, Size: 8x8"))
    assert any("plain text" in note for note in notes)


def test_only_masked_means_the_same_here_and_there(pipe, picture, mask):
    options = {"num_inference_steps": 2, "seed": 1, "strength": 0.5, "mask_blur": 2}
    result = pipe.inpaint("a lemon", picture, mask, padding_mask_crop=7, **options)
    text = infotext(result, 0)
    assert "Mask blur: 2, Inpaint area: Only masked, Masked area padding: 7," in text
    given = {"image": picture, "mask_image": mask}
    request, notes = request_from_infotext(parse_infotext(text), **given)
    assert (request.padding_mask_crop, request.mask_blur, request.strength) == (7, 2, 0.5)
    assert "Inpaint area" not in " ".join(notes)
    again = request_from_record(record(result, 0), **given)
    assert pipe.resolve(again) == result.request


def test_what_the_webui_says_in_values_that_hold_commas_survives(result):
    model = replace(result.model, name='a, "b": c')
    text = metadata.infotext(replace(result, model=model), 0)
    assert parse_infotext(text).fields["Model"] == 'a, "b": c'
    assert parse_infotext(text).fields["Seed"] == "5"


@pytest.mark.parametrize("text", ["just a prompt", "two lines\nSteps: 20", ""])
def test_a_text_without_three_parameters_is_all_prompt(text):
    assert parse_infotext(text).prompt == text
    assert parse_infotext(text).fields == {}


@pytest.mark.parametrize("piece", ["a", "a ", "a: ", 'aa:"', "aa: \\", ", ", "aa:,", " "])
@pytest.mark.parametrize("length", [100_000, 200_000])
def test_no_text_takes_long_to_take_apart(piece, length):
    """A word of 40,000 letters took 51 seconds once."""
    begin = time.perf_counter()
    info = parse_infotext("a cat\n" + (piece * length)[: length - 6])
    assert time.perf_counter() - begin < 2
    assert length <= 100_000 or info == parse_infotext("")


def test_little_endian_user_comments_are_read(tmp_path):
    exif = Image.Exif()
    exif[0x8769] = {0x9286: b"UNICODE\0" + WEBUI.encode("utf-16-le")}
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", exif=exif)
    assert metadata.read(tmp_path / "x.jpg").infotext == WEBUI


def test_a_cameras_maker_note_is_not_a_record(tmp_path):
    exif = Image.Exif()
    exif[0x8769] = {0x927C: b"\x01\x02Nikon"}
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", exif=exif)
    assert metadata.read(tmp_path / "x.jpg").record is None


def test_an_unknown_ending_is_refused_with_those_that_work(result, tmp_path):
    with pytest.raises(InvalidRequest, match=r"\.png, \.jpg") as caught:
        result.save(tmp_path / "x.tiff")
    assert caught.value.field == "output"
    assert list(tmp_path.iterdir()) == []


def test_the_record_holds_no_input_picture(result, tmp_path):
    secret = Image.effect_noise((32, 32), 90)
    request = Request(prompt="x", image=secret, seed=1).resolve(result.model)
    known = metadata.record(replace(result, request=request), 0)
    assert set(known["pictures"]) == {"image"}
    assert len(known["pictures"]["image"]) == 64
    assert "image" not in known["request"]
