"""The training core: the objective by hand, exact resume, and the tokenizer's 77 ids."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from latentgen.training import objective
from latentgen.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
)
from latentgen.training.data import caption_forms, random_crops, read_subjects
from latentgen.training.loop import TrainSettings, batch_indices, new_state, step_generator, train

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
    with pytest.raises(ValueError, match=r"prediction_type.*'v_prediction'"):
        objective.prediction_target(X_0, NOISE, ALPHAS, "velocity")


@pytest.mark.parametrize(
    ("prediction_type", "alpha", "weight"),
    [
        ("epsilon", 0.36, 1.0),  # snr 0.5625 is below gamma: snr / snr
        ("epsilon", 0.9, 5 / 9),  # snr 9 is above it: gamma / snr
        ("v_prediction", 0.36, 0.5625 / 1.5625),
        ("v_prediction", 0.9, 5 / 10),
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


def test_learning_rate_rises_then_falls_to_zero():
    rates = [objective.learning_rate_at(step, 2.0, 4, 12) for step in range(13)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)
    assert rates[12] == pytest.approx(0.0)


def test_every_epoch_is_a_permutation_and_batches_cross_epochs():
    rows = torch.cat([batch_indices(step, 4, 10, seed=3) for step in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
    assert not torch.equal(batch_indices(0, 4, 10, seed=4), rows[:4])


def test_random_crops_are_windows_of_the_right_rows():
    pixels = torch.arange(3 * 3 * 8 * 8).reshape(3, 3, 8, 8).remainder(256).to(torch.uint8)
    crops = random_crops(pixels, torch.tensor([2, 0]), 4, step_generator(0, 0))
    found = ((crops + 1) * 127.5).round()
    for row, crop in zip((2, 0), found, strict=True):
        windows = pixels[row].unfold(1, 4, 1).unfold(2, 4, 1).permute(1, 2, 0, 3, 4)
        assert (windows == crop).flatten(2).all(-1).any()


def test_captions_hold_the_forms_people_type(tmp_path):
    forms = caption_forms("red apple", "noto")
    assert {"red apple", "a red apple", "a red apple, noto style"} <= set(forms)
    assert "an octopus" in caption_forms("octopus")
    file = tmp_path / "subjects.txt"
    file.write_text("# things\n\nred-apple: apple, fruit\nrocket\n")
    assert read_subjects(file) == {
        "red apple": ("red apple", "apple", "fruit"),
        "rocket": ("rocket",),
    }


def tiny_state(seed: int = 1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 1))
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    return new_state(model, optimizer, seed)


def run_steps(state, steps: int):
    """`steps` more of a run of 8, on noise that the step's generator draws."""

    def loss_function(model, step, generator):
        rows = batch_indices(step, 3, 5, state.seed).float().reshape(3, 1, 1, 1)
        picture = torch.randn((3, 2, 4, 4), generator=generator) + rows
        return (model(picture) - picture).square().mean()

    loop = train(
        state, loss_function, TrainSettings(8, 1e-2, 2, 8, 0.9, 1.0), Accelerator(cpu=True)
    )
    return [next(loop).loss for _ in range(steps)]


def assert_same_run(one, other):
    assert one.step == other.step
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
        assert torch.equal(one.ema[name], other.ema[name]), name
    moments, others = (run.optimizer.state_dict()["state"] for run in (one, other))
    for index, entry in moments.items():
        for name, value in entry.items():
            assert torch.equal(value, others[index][name]), (index, name)


def test_four_steps_equal_two_and_two_more_after_a_resume(tmp_path):
    whole = tiny_state()
    losses = run_steps(whole, 4)
    first = tiny_state()
    first_losses = run_steps(first, 2)
    save_checkpoint(first, tmp_path)

    second = tiny_state()
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.add_(1)  # whatever it began with must not matter
    load_checkpoint(second, resolve_checkpoint("latest", tmp_path))
    assert_same_run(second, first)
    assert first_losses + run_steps(second, 2) == losses
    assert_same_run(second, whole)


def test_resume_in_a_new_process_gives_the_same_weights(tmp_path):
    whole = tiny_state()
    run_steps(whole, 4)
    first = tiny_state()
    run_steps(first, 2)
    save_checkpoint(first, tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_training import *\n"
        "folder = Path(sys.argv[1]); state = tiny_state()\n"
        "load_checkpoint(state, resolve_checkpoint('latest', folder))\n"
        "run_steps(state, 2); save_checkpoint(state, folder)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    found = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, found[name]), name


def test_checkpoints_are_whole_counted_and_free_of_pickles(tmp_path):
    state = tiny_state()
    assert resolve_checkpoint("latest", tmp_path) is None
    for _ in range(3):
        run_steps(state, 1)
        save_checkpoint(state, tmp_path, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    files = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json"}
    with pytest.raises(ValueError, match="seed"):
        load_checkpoint(tiny_state(seed=2), resolve_checkpoint("latest", tmp_path))


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    state = tiny_state()
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    settings = TrainSettings(8, 1e-2, 2, 8, 0.9, 1.0)
    loop = train(
        state, lambda model, *_: model[0].weight.sum() / 0, settings, Accelerator(cpu=True)
    )
    with pytest.raises(FloatingPointError, match="step 0"):
        next(loop)
    assert all(map(torch.equal, before, state.model.parameters()))


def test_ema_follows_the_weights_slowly():
    state = tiny_state()
    start = state.ema["0.bias"].clone()
    run_steps(state, 1)
    weights = state.model.state_dict()["0.bias"]
    young = 1 - 2 / 11  # decay (1 + n) / (10 + n) at n = 1
    torch.testing.assert_close(state.ema["0.bias"], start + young * (weights - start))
    assert not torch.equal(weights, start)


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
