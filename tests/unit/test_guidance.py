"""Guidance: identities, and the two formulas by hand."""

import numpy as np
import pytest
import torch

from latentgen.guidance import apply_guidance, guidance_embedding, rescale_guidance

UNCOND = torch.tensor([1.0, 2.0, 3.0, 6.0]).reshape(1, 1, 2, 2)
COND = torch.tensor([2.0, 2.0, 1.0, 7.0]).reshape(1, 1, 2, 2)


def test_guidance_by_hand():
    expected = torch.tensor([4.0, 2.0, -3.0, 9.0]).reshape(1, 1, 2, 2)
    assert torch.equal(apply_guidance(UNCOND, COND, 3.0), expected)


def test_scale_one_is_the_prompt_alone_and_scale_zero_the_negative():
    assert torch.equal(apply_guidance(UNCOND, COND, 1.0), COND)
    assert torch.equal(apply_guidance(UNCOND, COND, 0.0), UNCOND)


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5, 100.0])
def test_equal_predictions_make_the_scale_irrelevant(scale):
    assert torch.equal(apply_guidance(COND, COND, scale), COND)


def test_rescale_by_hand():
    guided = torch.tensor([0.0, 4.0, 8.0, 12.0]).reshape(1, 1, 2, 2)
    # std of guided = sqrt(80 / 3), of COND = sqrt(22 / 3); phi = 0.7
    factor = (22 / 80) ** 0.5
    expected = guided * (0.7 * factor + 0.3)
    torch.testing.assert_close(rescale_guidance(guided, COND, 0.7), expected)


def test_rescale_zero_changes_nothing_and_one_restores_the_spread():
    guided = apply_guidance(UNCOND, COND, 7.5)
    assert torch.equal(rescale_guidance(guided, COND, 0.0), guided)
    torch.testing.assert_close(rescale_guidance(guided, COND, 1.0).std(), COND.std())


def test_rescale_treats_every_picture_by_itself():
    guided = torch.randn(3, 4, 5, 5, generator=torch.manual_seed(0))
    cond = torch.randn(3, 4, 5, 5, generator=torch.manual_seed(1)) * torch.tensor(
        [1.0, 2.0, 3.0]
    ).reshape(3, 1, 1, 1)
    together = rescale_guidance(guided, cond, 0.6)
    for i in range(3):
        alone = rescale_guidance(guided[i : i + 1], cond[i : i + 1], 0.6)
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("dim", [8, 9, 256])
def test_the_embedding_of_the_scale_is_diffusers(dim):
    from diffusers import StableDiffusionPipeline

    embed = StableDiffusionPipeline.get_guidance_scale_embedding
    expected = embed(None, torch.tensor([7.5 - 1] * 2), dim)
    torch.testing.assert_close(guidance_embedding(7.5, 2, dim), expected, atol=2e-4, rtol=0)


@pytest.fixture
def rows_seen(pipe, monkeypatch):
    """How many rows each call of the U-Net had."""
    seen, forward = [], pipe.unet.forward

    def counting(sample, *args, **kwargs):
        seen.append(len(sample))
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", counting)
    return seen


@pytest.mark.parametrize(("scale", "rows"), [(1, 3), (1.0, 3), (1.01, 6), (7.5, 6)])
def test_scale_one_makes_half_the_rows(pipe, rows_seen, scale, rows):
    pipe.generate("x", guidance_scale=scale, num_images=3, num_inference_steps=2, seed=0)
    assert rows_seen == [rows, rows]


def test_equal_prompts_make_the_scale_irrelevant(pipe):
    options = {"num_inference_steps": 3, "output_type": "np", "seed": 4}
    for prompt in ("a red apple", "a red apple " * 20):
        alone = pipe.generate(prompt, guidance_scale=1, **options).images
        for scale in (2.0, 7.5):
            found = pipe.generate(prompt, prompt, guidance_scale=scale, **options).images
            # Two rows in one matrix product round differently from one, times the scale.
            np.testing.assert_allclose(found, alone, atol=1e-5)


def test_the_negative_prompt_matters_only_when_guided(pipe):
    options = {"num_inference_steps": 2, "output_type": "np", "seed": 4}
    plain, negative = (
        pipe.generate("x", text, guidance_scale=7.5, **options).images for text in (None, "dark")
    )
    assert not np.array_equal(plain, negative)
    with pytest.warns(UserWarning, match="negative_prompt has no effect"):
        pipe.generate("x", "dark", guidance_scale=1, **options)
