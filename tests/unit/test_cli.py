"""The command line: what it writes, what it says, and with which status it ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fakes
import numpy as np
import pytest
from PIL import Image
from single_file import save_single_file
from typer.testing import CliRunner

import latentgen
from latentgen import LatentDiffusion, cli, metadata
from latentgen.schedulers import NAMES


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "toy"
    LatentDiffusion(**fakes.components()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words: object, status: int = 0):
        outcome = CliRunner().invoke(cli.app, [str(word) for word in words])
        assert outcome.exit_code == status, outcome.output
        return outcome

    return run


@pytest.fixture
def drawn(run, model, tmp_path):
    """A picture and a mask in the current folder."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 10:50] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return pixels, mask


def test_generate_writes_pictures_a_sheet_and_an_animation(run, model, tmp_path):
    outcome = run(
        *("generate", "a cat", "-m", model, "--steps", 3, "--seed", 9, "-n", 4),
        *("-o", "cat.png", "--grid", "--gif", "steps.gif"),
    )
    names = {"cat-1.png", "cat-2.png", "cat-3.png", "cat-4.png", "cat-grid.png", "steps.gif"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert Image.open("cat-grid.png").size == (128, 128)
    assert Image.open("steps.gif").n_frames >= 3
    assert "64 x 64, seeds 9 to 12" in outcome.stdout
    solo = LatentDiffusion.from_pretrained(model).generate("a cat", seed=11, num_inference_steps=3)
    difference = np.subtract(solo.image, Image.open("cat-3.png"), dtype=int)
    assert abs(difference).max() <= 1  # another batch size, so another rounding


def test_the_ending_decides_the_format_and_a_name_is_made_up(run, model, tmp_path):
    run("generate", "A cat!", "-m", model, "--steps", 1, "--seed", 3)
    run("generate", "a cat", "-m", model, "--steps", 1, "-o", "cat.jpg")
    run("generate", "a cat", "-m", model, "--steps", 1, "-o", "cat.webp")
    formats = {path.name: Image.open(path).format for path in tmp_path.iterdir()}
    assert formats == {"a-cat-3.png": "PNG", "cat.jpg": "JPEG", "cat.webp": "WEBP"}
    for prompt in ("Ein Bär, größer", "猫と犬", "🦊"):
        run("generate", prompt, "-m", model, "--steps", 1, "--seed", 3)
    made_up = {path.name for path in tmp_path.iterdir()} - formats.keys()
    assert made_up == {"ein-bär-größer-3.png", "猫と犬-3.png", "picture-3.png"}


def test_every_flag_reaches_the_request(run, model):
    run(
        *("generate", "a cat", "-m", model, "-o", "x.png", "--steps", 2, "--seed", 4),
        *("--negative-prompt", "dog", "--guidance-scale", 3.5, "--scheduler", "ddim trailing"),
        *("--height", 32, "--width", 48, "--eta", 0.5, "--guidance-rescale", 0.7, "-n", 1),
    )
    assert metadata.read("x.png").record["request"] == {
        "prompt": ["a cat"],
        "negative_prompt": ["dog"],
        "num_inference_steps": 2,
        "guidance_scale": 3.5,
        "scheduler": "ddim trailing",
        "seed": 4,
        "num_images": 1,
        "height": 32,
        "width": 48,
        "eta": 0.5,
        "guidance_rescale": 0.7,
        "mask_blur": 0,
    }


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("scheduler", ["euler_a", "dpm++_2m karras"])
def test_replay_of_our_own_picture_differs_by_nothing(run, model, ending, scheduler):
    quality = ("--quality", 60) if ending != "png" else ()
    run(
        *("generate", "a cat", "-m", model, "--steps", 3, "-n", 3, *quality),
        *("--scheduler", scheduler, "-o", f"cat.{ending}"),
    )
    outcome = run("replay", f"cat-2.{ending}", "-m", model, "-o", "again.png")
    assert "largest pixel difference: 0\n" in outcome.stdout
    assert "not reproduced" not in outcome.stdout
    if ending == "png":
        assert np.array_equal(Image.open("again.png"), Image.open("cat-2.png"))


def test_a_quality_that_png_has_no_use_for_is_refused(run, model):
    for command in (("generate", "a cat", "-o", "cat.png"), ("generate", "a cat")):
        told = run(*command, "-m", model, "--quality", 60, status=2).stderr
        assert "quality=60: PNG loses nothing" in told


def test_replay_notices_another_picture(run, model):
    run("generate", "a cat", "-m", model, "--steps", 2, "-o", "cat.png")
    found = metadata.read("cat.png")
    known = json.loads(json.dumps(found.record))
    known["versions"]["torch"] = "1.0"
    changed = found.image.point(lambda value: min(255, value + 7))
    data = metadata.encode(changed, "PNG", found.infotext, known, 95)
    Path("other.png").write_bytes(data)
    outcome = run("replay", "other.png", "-m", model, status=1)
    assert "largest pixel difference: 7" in outcome.stdout
    assert "torch was 1.0" in outcome.stdout


def test_replay_of_a_sheet_and_of_another_model_says_so(run, model):
    run("generate", "a cat", "-m", model, "--steps", 1, "-n", 2, "--grid", "-o", "cat.png")
    told = run("replay", "cat-grid.png", "-m", model, status=1).stdout
    assert "the sizes differ, 128 x 64 and 64 x 64; it seems to be a sheet of several" in told
    assert "its model" not in told
    run("generate", "a cat", "-m", model, "--steps", 1, "-o", "cat.png")
    plain = metadata.read("cat.png")
    for change, expected in [("", 0), ("Model hash: ", 1)]:
        text = plain.infotext.replace(change, f"{change}0", 1) if change else plain.infotext
        Path("webui.png").write_bytes(metadata.encode(plain.image, "PNG", text, None, 95))
        told = run("replay", "webui.png", "-m", model).stdout
        assert told.count("not reproduced: its model, toy; this is toy") == expected


def test_inpainting_keeps_the_rest_and_replays_with_its_pictures(run, model, drawn):
    pixels, mask = drawn
    run("inpaint", "a dog", "in.png", "mask.png", "-m", model, "--steps", 2, "-o", "out.png")
    painted = np.asarray(Image.open("out.png"))
    assert np.array_equal(painted[mask == 0], pixels[mask == 0])
    assert not np.array_equal(painted, pixels)

    refused = run("replay", "out.png", "-m", model, status=2)
    assert refused.stderr.startswith("error: picture='out.png': it was made from another picture")
    assert "--image FILE" in refused.stderr
    again = ("replay", "out.png", "-m", model, "--mask-image", "mask.png", "--image")
    assert "largest pixel difference: 0\n" in run(*again, "in.png").stdout
    Image.new("RGB", (64, 64)).save("black.png")
    assert "image is not the picture" in run(*again, "black.png", status=1).stdout


def test_a_controlnet_is_followed_and_asked_for_again(run, model, drawn):
    told = ("--controlnet", fakes.controlnet(), "--control-image", "in.png")
    call = ("generate", "a dog", "-m", model, "--steps", 4, "--seed", 4)
    run(*call, "-o", "plain.png")
    run(*call, *told, "--control-guidance-end", 0.5, "-o", "led.png")
    assert not np.array_equal(
        np.asarray(Image.open("led.png")), np.asarray(Image.open("plain.png"))
    )
    request = metadata.read("led.png").record["request"]
    assert request["controlnet"]["name"] == "lines"
    assert request["control_guidance_end"] == 0.5

    again = ("replay", "led.png", "-m", model)
    assert "--control-image FILE" in run(*again, status=2).stderr
    assert "--controlnet FOLDER" in run(*again, *told[2:], status=2).stderr
    assert "largest pixel difference: 0\n" in run(*again, *told).stdout
    assert "leave it out" in run("replay", "plain.png", "-m", model, *told[:2], status=2).stderr
    refused = run(*call, "--control-image", "in.png", status=2).stderr
    assert refused.startswith("error: control-image=")


def test_img2img_of_a_webui_picture_can_be_replayed(run, model, drawn):
    text = "a dog\nSteps: 4, Sampler: Euler, CFG scale: 5, Seed: 1, Size: 64x64, "
    text += "Denoising strength: 0.5, ENSD: 31337"
    data = metadata.encode(Image.new("RGB", (64, 64)), "PNG", text, None, 95)
    Path("webui.png").write_bytes(data)
    outcome = run("replay", "webui.png", "-m", model, "--image", "in.png", status=1)
    assert "not reproduced: ENSD: 31337" in outcome.stdout
    assert "not reproduced: its noise was drawn on a GPU" in outcome.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["generate", " "], "prompt"),
        (["generate", "x", "--steps", "0"], "steps=0"),
        (["generate", "x", "--width", "65"], "64 or 72"),
        (["generate", "x", "--height", "99999"], "at most 4096|between 1 and 4096"),
        (["generate", "x", "--guidance-scale", "nan"], "guidance-scale=nan"),
        (["generate", "x", "--scheduler", "eulr"], "did you mean euler"),
        (["generate", "x", "--seed", "-1"], "seed=-1"),
        (["generate", "x", "-n", "1000"], "num-images=1000"),
        (["generate", "x", "-o", "no/such/folder/x.png"], "cannot be written"),
        (["generate", "x", "-o", "x.bmp"], "must end in"),
        (["generate", "x", "-o", "."], "must end in"),
        (["generate", "x", "--gif", "steps.mp4"], "must end in .gif"),
        (["generate", "x", "-m", "no/such/model/here"], "no such folder"),
        (["generate", "x", "-m", "model.ckpt"], "pickle"),
        (["generate", "x", "--device", "gpu"], "device='gpu': cuda, mps or cpu; this machine has"),
        (["generate", "x", "--attention", "xformers"], "latentgen[xformers]"),
        (["img2img", "x", "nothing.png"], "no such file"),
        (["img2img", "x", "in.png", "--strength", "0.001"], "leaves none"),
        (["inpaint", "x", "in.png", "small.png"], "size of the image"),
        (["replay", "in.png"], "carries no settings"),
    ],
)
def test_wrong_words_get_one_line_and_status_2(run, model, drawn, words, told):
    Image.new("L", (32, 32), 255).save("small.png")
    named = words if "-m" in words or words[0] == "replay" else [*words, "-m", model]
    outcome = run(*named, status=2)
    lines = outcome.stderr.strip().split("\n")
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert any(part in lines[0] for part in told.split("|")), lines[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"request": {"prompt": ["x"], "image": "in.png", "strength": 0.5}}, "none of ours"),
        ({"request": {"prompt": ["x"], "output_type": "np"}}, "none of ours"),
        ({"model": {"name": "other", "hub_id": "someone/other"}}, "say where it is"),
        ({"pictures": {"etc": "0"}}, "carries no settings"),
        ({"index": 7}, "damaged"),
    ],
)
def test_a_tampered_record_opens_and_fetches_nothing(run, model, drawn, change, told):
    run("generate", "a cat", "-m", model, "--steps", 1, "-o", "cat.png")
    known = {**metadata.read("cat.png").record, **change}
    Path("bad.png").write_bytes(metadata.encode(Image.open("cat.png"), "PNG", "x", known, 95))
    words = ["replay", "bad.png"] if "model" in change else ["replay", "bad.png", "-m", model]
    assert told in run(*words, status=2).stderr


def test_replay_says_what_is_not_told_and_needs_settings(run, model):
    Image.new("RGB", (64, 64)).save("gimp.jpg", comment=b"Created with GIMP")
    assert "carries no settings" in run("replay", "gimp.jpg", "-m", model, status=2).stderr
    text = "a cat\nSteps: 2, Sampler: Euler, CFG scale: 0.5, Seed: -1"
    data = metadata.encode(Image.new("RGB", (64, 64)), "PNG", text, None, 95)
    Path("webui.png").write_bytes(data)
    told = run("replay", "webui.png", "-m", model, status=1).stdout
    without = ("Size, which it does not tell", "its model, which it does not name")
    for lost in ("CFG scale: 0.5", "Seed: -1", *without):
        assert f"not reproduced: {lost}" in told
    run("generate", "a cat", "-m", model, "--steps", 1, "-o", "cat.png")
    refused = run("replay", "cat.png", "-m", model, "--image", "gimp.jpg", status=2)
    assert "not made from one" in refused.stderr


def test_every_file_is_known_to_be_writable_before_the_drawing(run, model, tmp_path):
    (tmp_path / "x-2.png").mkdir()
    (tmp_path / "y-grid.png").mkdir()
    for words in (["-o", "x.png", "-n", 2], ["-o", "y.png", "--grid"], ["--gif", "no/x.gif"]):
        refused = run("generate", "a cat", "-m", model, "--steps", 1, *words, status=2)
        assert "cannot be written" in refused.stderr
    refused = run("generate", "word " * 9000, "-m", model, "-o", "x.jpg", status=2)
    assert "PNG can" in refused.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"x-2.png", "y-grid.png"}


def test_without_a_terminal_nothing_but_news_is_told(run, model):
    assert run("generate", "a cat", "-m", model, "--steps", 1, "-o", "x.png").stderr == ""


def test_evaluate_checks_its_words_before_it_draws(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr(LatentDiffusion, "from_pretrained", None)
    (tmp_path / "set.yaml").write_text("prompts: [a cat]")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine" / "pictures").mkdir(parents=True)
    (tmp_path / "mine" / "pictures" / "1.png").write_text("mine")
    words = ("evaluate", "set.yaml", "-m", model, "--clip")
    for more, told in [
        (("nothere", "-o", "file"), "output='file': cannot be written"),
        (("nothere", "-o", "file/x"), "output='file/x': cannot be written"),
        (("nothere",), "clip='nothere': no such folder"),
        (("someone/some-clip",), "clip='someone/some-clip': not on this machine"),
        (("x", "--images", "empty", "--steps", "9"), "images='empty': pictures that are there"),
        (("x", "-n", "65"), "num-images=65"),
        ((model, "--images", "empty"), "clip="),  # a model without an image_encoder
        (("x", "--embedding", "no.safetensors"), "embedding='no.safetensors': no such file"),
        (("x", "-o", "mine"), "output='mine/pictures': has pictures that no evaluation drew"),
        (("x", "--real-dir", "empty"), "real-dir='empty': it holds no pictures (.avif, "),
    ]:
        refused = run(*words, *more, status=2)
        assert refused.stderr.startswith(f"error: {told}")
        assert refused.stderr.count("\n") == 1
    refused = run("evaluate", "set.yaml", "-m", model, status=2)
    assert "--clip openai/clip-vit-base-patch32" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "mine", "set.yaml"]


def test_a_checkpoint_is_drawn_at_its_own_size_with_the_configuration_of_a_folder(
    run, model, tmp_path
):
    save_single_file(LatentDiffusion.from_pretrained(model), tmp_path / "one.safetensors")
    words = ("generate", "a cat", "--seed", 3, "--steps", 2, "--scheduler", "ddim", "-m")
    run(*words, "one.safetensors", "--config", model, "-o", "one.png")
    run(*words, model, "-o", "folder.png")
    one, folder = Image.open("one.png"), Image.open("folder.png")
    assert (one.size, one.tobytes()) == (folder.size, folder.tobytes())
    refused = run(*words, model, "--config", model, "-o", "x.png", status=2)
    assert "goes with a .safetensors checkpoint" in refused.stderr
    again = run("replay", "folder.png", "-m", "one.safetensors", "--config", model)
    assert "largest pixel difference: 0\n" in again.stdout
    (tmp_path / "set.txt").write_text("a cat")
    words = ("set.txt", "--seed", 3, "--steps", 2, "--scheduler", "ddim", "-m", "one.safetensors")
    run("batch", *words, "--config", model, "-o", "set")
    assert Image.open("set/1-a-cat.png").tobytes() == folder.tobytes()


def test_interrupting_ends_cleanly(run, model, monkeypatch, tmp_path):
    def interrupt(self, request):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(LatentDiffusion, "draw", interrupt)
    outcome = run("generate", "a cat", "-m", model, "-o", "x.png", status=130)
    assert "interrupted; nothing was written" in outcome.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "reason",
    ["CUDA out of memory. Tried to allocate 9 GiB.", "DefaultCPUAllocator: can't allocate memory"],
)
def test_too_little_memory_is_told_in_a_line(run, model, monkeypatch, reason):
    def draw(self, request):
        raise RuntimeError(f"{reason}\nmore")

    monkeypatch.setattr(LatentDiffusion, "draw", draw)
    told = run("generate", "a cat", "-m", model, "-o", "x.png", status=1).stderr
    assert told.startswith(f"error: {reason} (smaller or fewer pictures, --dtype float16 and")
    assert told.count("\n") == 1


def test_a_model_that_draws_nothing_ends_with_status_1(run, tmp_path):
    parts = fakes.components()
    for parameter in parts["unet"].parameters():
        parameter.data.fill_(float("nan"))
    LatentDiffusion(**parts).save_pretrained(tmp_path / "broken")
    outcome = run("generate", "x", "-m", tmp_path / "broken", "-o", "x.png", status=1)
    assert "not finite" in outcome.stderr
    assert not (tmp_path / "x.png").exists()


def test_the_lists_name_everything(run, model, tmp_path, monkeypatch):
    told = run("schedulers").stdout
    assert all(name in told for name in NAMES)
    assert "latentgen-icons-128" in run("models").stdout
    assert "toy" not in run("models").stdout
    shutil.copytree(model, tmp_path / "models" / "toy")
    monkeypatch.setenv("LATENTGEN_HOME", str(tmp_path))
    assert "toy" in run("models").stdout
    long = "a-name-of-many-words" * 5
    shutil.copytree(model, tmp_path / "models" / long)
    assert long in run("models").stdout  # whole, for programs
    assert run("--version").stdout == f"latentgen {latentgen.__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["generate", "--help"],
        ["generate", ""],
        ["generate", "x", "--steps", "zero"],
    ],
)
def test_help_and_errors_in_the_arguments_do_not_import_torch(words):
    code = (
        "import sys; from latentgen import cli\n"
        f"sys.argv = ['latentgen', *{words!r}]\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
