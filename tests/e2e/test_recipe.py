"""The recipe of `training/README.md` on a handful of pictures: every script as it is started."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import latentgen

ROOT = Path(__file__).parents[2]
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = {"circle": ImageDraw.ImageDraw.ellipse, "square": ImageDraw.ImageDraw.rectangle}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve captioned pictures: two shapes in six colours."""
    folder = tmp_path_factory.mktemp("pictures")
    for colour in COLOURS:
        for shape, draw in SHAPES.items():
            image = Image.new("RGB", (64, 64), "white")
            draw(ImageDraw.Draw(image), (12, 12, 52, 52), fill=colour)
            image.save(folder / f"{colour}-{shape}.png")
            (folder / f"{colour}-{shape}.txt").write_text(f"a {colour} {shape}")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def command(script: str, *flags: object) -> list[str]:
    words = [str(flag) for flag in flags]
    return [sys.executable, str(ROOT / "training" / script), *words, "--report_to", "none"]


def launch(script: str, *flags: object) -> str:
    """What the script said; it must end well."""
    done = subprocess.run(
        command(script, *flags), capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def vae(folder, runs) -> Path:
    out = runs / "vae"
    said = launch(
        *("train_vae.py", "--train_data_dir", folder, "--output_dir", out, "--resolution", 64),
        *("--max_train_steps", 4, "--validation_steps", 2, "--latent_channels", 4),
    )
    assert "step 4: psnr" in said
    return out


@pytest.fixture(scope="module")
def clip_text(folder, runs) -> Path:
    out = runs / "clip-text"
    said = launch(
        *("train_clip.py", "--train_data_dir", folder, "--output_dir", out, "--resolution", 64),
        *("--max_train_steps", 2, "--train_batch_size", 4, "--word_batch_size", 4),
        *("--vocab_size", 600),
    )
    assert "retrieval_top_1" in said
    return out


@pytest.fixture(scope="module")
def clip(folder, clip_text, runs) -> Path:
    out = runs / "clip"
    launch(
        *("train_clip.py", "--train_data_dir", folder, "--output_dir", out, "--resolution", 64),
        *("--max_train_steps", 2, "--train_batch_size", 4, "--pretrained_clip_path", clip_text),
    )
    return out


def test_the_image_encoder_learns_on_alone(clip_text, clip):
    before, after = (load_file(path / "model.safetensors") for path in (clip_text, clip))
    learnt = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in learnt} == {
        "vision_model",
        "visual_projection",
        "logit_scale",
    }


def drawing(folder, vae, clip, out, *more) -> list:
    return [
        *("train_text_to_image.py", "--train_data_dir", folder, "--output_dir", out),
        *("--pretrained_vae_path", vae, "--pretrained_text_encoder_path", clip),
        *("--resolution", 64, "--block_out_channels", 32, 64, "--train_batch_size", 4),
        *("--validation_steps", 100, "--checkpointing_steps", 2),
        *more,
    ]


@pytest.fixture(scope="module")
def model(folder, vae, clip, runs) -> Path:
    out = runs / "model"
    launch(*drawing(folder, vae, clip, out, "--max_train_steps", 6, "--random_flip", "true"))
    return out


def test_a_fresh_autoencoder_keeps_the_mean_colour_of_every_cell():
    sys.path.insert(0, str(ROOT / "training"))
    from train_vae import build_vae

    vae = build_vae(4)
    generator = torch.Generator().manual_seed(0)
    cells = 0.5 + 0.1 * torch.randn((1, 3, 4, 4), generator=generator)  # an icon's usual shades
    pixels = cells.repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latents).sample
    means = torch.nn.functional.avg_pool2d(decoded, 8)
    torch.testing.assert_close(means, cells, atol=0.02, rtol=0)


@pytest.mark.usefixtures("stock_convolutions")
def test_the_result_is_a_model_that_draws_as_stock_pipelines_do(model):
    from diffusers import StableDiffusionPipeline

    pipe = latentgen.LatentDiffusion.from_pretrained(model, device="cpu")
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0}
    ours = pipe.generate("a red circle", seed=3, **settings)
    assert ours.image.size == (64, 64)
    stock = StableDiffusionPipeline.from_pretrained(model)
    assert stock.image_encoder is not None
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    theirs = stock("a red circle", generator=generator, **settings).images[0]
    assert np.array_equal(np.asarray(ours.image), np.asarray(theirs))
    kept = {p.suffix for p in model.rglob("*") if p.is_file()}
    assert kept <= {".json", ".jsonl", ".safetensors", ".png", ".txt"}
    assert json.loads((model / "training_config.json").read_text())["max_train_steps"] == 6


def test_the_text_encoder_comes_with_a_judge(model, clip, folder):
    from transformers import CLIPModel

    from latentgen.evaluate import Judge

    own, whole = Judge(model), Judge(clip)
    prompts = [file.read_text() for file in sorted(folder.glob("*.txt"))]
    pictures = [Image.open(file) for file in sorted(folder.glob("*.png"))]
    torch.testing.assert_close(own.read(prompts), whole.read(prompts), atol=5e-3, rtol=0)
    torch.testing.assert_close(own.see(pictures), whole.see(pictures), atol=5e-3, rtol=0)
    projection = CLIPModel.from_pretrained(clip).text_projection.weight
    assert torch.equal(projection, torch.eye(len(projection)))


def test_evaluate_says_the_same_twice(model, folder, tmp_path):
    file = tmp_path / "shapes.yaml"
    file.write_text("prompts: [a red circle, a blue square, a green circle]\n")
    figures = []
    for name in ("one", "two"):
        subprocess.run(
            [
                *(sys.executable, "-m", "latentgen.cli", "evaluate", str(file), "-m", str(model)),
                *("-n", "2", "--steps", "2", "--real-dir", str(folder), "-o", str(tmp_path / name)),
            ],
            check=True,
            env=environment(),
            capture_output=True,
        )
        found = json.loads((tmp_path / name / "evaluation.json").read_text())["metrics"]
        assert found.pop("seconds_per_picture") > 0
        figures.append(found)
    assert figures[0] == figures[1]
    assert {"clip_score", "retrieval_top_1", "diversity", "kid"} <= figures[0].keys()


def test_killed_at_any_moment_it_ends_in_the_same_weights(folder, vae, clip, model, runs):
    out = runs / "killed"
    flags = drawing(folder, vae, clip, out, "--max_train_steps", 6, "--random_flip", "true")
    again = ["--resume_from_checkpoint", "latest"]
    for checkpoint, more in (("checkpoint-2", []), ("checkpoint-4", again)):
        process = subprocess.Popen(
            command(*flags, *more),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not (out / checkpoint).exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    launch(*flags, *again)
    for part in ("model", "ema", "optimizer"):
        name = f"checkpoint-6/{part}.safetensors"
        one, other = load_file(model / name), load_file(out / name)
        assert all(torch.equal(one[key], other[key]) for key in one), part


def test_without_captions_it_is_ddpm(folder, tmp_path):
    from diffusers import DDPMPipeline

    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.glob("*.png"):
        (bare / file.name).write_bytes(file.read_bytes())
    flags = ["train_text_to_image.py", "--train_data_dir", bare, "--output_dir", tmp_path / "ddpm"]
    flags += ["--resolution", 32, "--block_out_channels", 32, 64, "--train_batch_size", 4]
    flags += ["--max_train_steps", 2, "--validation_steps", 100]
    refused = subprocess.run(command(*flags), env=environment(), capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--unconditional" in refused.stderr
    for schedule, predicted in [("quadratic", "epsilon"), ("cosine", "sample")]:
        out = tmp_path / schedule
        flags[4] = out
        launch(
            *flags, "--unconditional", "true", "--beta_schedule", schedule, "--beta_start", 0.0001,
            *("--prediction_type", predicted, "--loss", "huber"),
        )  # fmt: skip
        pipeline = DDPMPipeline.from_pretrained(out)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.scheduler.config.prediction_type == predicted
        assert pipeline(num_inference_steps=2).images[0].size == (32, 32)


def test_bad_data_is_told_before_any_model_is_loaded(folder, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "torn.png").write_bytes(next(folder.glob("*.png")).read_bytes()[:50])
    (bad / "text.png").write_text("no picture")
    empty = tmp_path / "empty"  # where models would be, if any were loaded
    empty.mkdir()
    flags = drawing(bad, empty, empty, tmp_path / "out")
    ended = subprocess.run(command(*flags), env=environment(), capture_output=True, text=True)
    assert ended.returncode == 1
    assert "2 unreadable" in ended.stderr
    assert "torn.png" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()
