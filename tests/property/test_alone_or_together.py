"""A picture does not depend on the batch, the thread or the call it was drawn in."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen import latents
from latentgen.request import Request, can_join, together

STOCHASTIC = ["euler_a", "dpm++_2m_sde", "dpm2_a", "ddpm", "lcm"]


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("scheduler", ["ddim", *STOCHASTIC])
def test_picture_k_of_four_is_the_solo_picture_at_seed_plus_k(pipe, scheduler, k):
    options = {"scheduler": scheduler, "num_inference_steps": 3, "output_type": "np"}
    together = pipe.generate("a red apple", seed=70, num_images=4, **options)
    alone = pipe.generate("a red apple", seed=together.seeds[k], **options)
    assert together.seeds == [70, 71, 72, 73]
    # Matrix products of four rows round differently from those of one.
    np.testing.assert_allclose(together.images[k], alone.images[0], atol=1e-5)


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("with_mask", [False, True])
def test_so_is_one_drawn_from_a_picture(pipe, picture, mask, with_mask, strength, k):
    options = {"num_inference_steps": 2, "output_type": "latent", "strength": strength}
    options |= {"image": picture, "mask_image": mask if with_mask else None}
    together = pipe.generate("a red apple", seed=70, num_images=4, **options)
    alone = pipe.generate("a red apple", seed=70 + k, **options)
    np.testing.assert_allclose(together.images[k], alone.images[0], atol=1e-5)


def test_prompts_come_before_pictures_in_a_batch(pipe):
    options = {"num_inference_steps": 2, "output_type": "np"}
    batch = pipe.generate(["a cat", "a dog"], seed=5, num_images=2, **options)
    assert batch.seeds == [5, 6, 7, 8]
    for k, prompt in enumerate(["a cat", "a cat", "a dog", "a dog"]):
        alone = pipe.generate(prompt, seed=5 + k, **options)
        np.testing.assert_allclose(batch.images[k], alone.images[0], atol=1e-5)


@pytest.mark.parametrize("with_mask", [False, True])
def test_a_long_prompt_in_the_batch_changes_no_other_picture(pipe, picture, mask, with_mask):
    """CLIP reads 75 tokens at a time: more of them are more for the U-Net to attend to."""
    options = {"num_inference_steps": 2, "output_type": "latent", "num_images": 2}
    options |= {"image": picture, "mask_image": mask} if with_mask else {}
    prompts = ["a cat", "a red apple " * 40, "a dog"]
    negatives = ["", "blue", "a sad face " * 60]
    batch = pipe.generate(prompts, negatives, seed=70, **options)
    for k, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = pipe.generate(prompt, negative, seed=70 + 2 * k, **options)
        np.testing.assert_allclose(batch.images[2 * k : 2 * k + 2], alone.images, atol=1e-5)


@settings(max_examples=50)
@given(seed=st.integers(0, 2**62), count=st.integers(1, 6), data=st.data())
def test_starting_noise_is_bit_equal_alone_or_together(seed, count, data):
    k = data.draw(st.integers(0, count - 1))
    shape, like = (4, 3, 5), latents.torch.empty(0)
    seeds = [seed + i for i in range(count)]
    together = latents.draw_noise(latents.make_generators(seeds), shape, like)
    alone = latents.draw_noise(latents.make_generators([seed + k]), shape, like)
    assert latents.torch.equal(together[k], alone[0])


@pytest.mark.parametrize("scheduler", ["euler_a", "dpm++_2m_sde"])
def test_two_threads_at_once_draw_what_each_draws_alone(pipe, scheduler):
    calls = [
        {"prompt": "a cat", "seed": 1, "num_inference_steps": 6},
        {"prompt": "a dog", "seed": 2, "num_inference_steps": 9},
    ]

    def draw(call):
        return pipe.generate(**call, scheduler=scheduler, output_type="np").images

    alone = [draw(call) for call in calls]
    together = [None, None]
    gate = threading.Barrier(2)

    def work(i):
        gate.wait()
        together[i] = draw(calls[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_two_streams_stepped_in_turn_do_not_disturb_each_other(pipe):
    options = {"scheduler": "dpm++_2m_sde", "num_inference_steps": 4, "output_type": "np"}
    alone = [pipe.generate("a cat", seed=seed, **options).images for seed in (1, 2)]
    streams = [pipe.stream("a cat", seed=seed, **options) for seed in (1, 2)]
    *_, last = zip(*streams, strict=True)
    for step, expected in zip(last, alone, strict=True):
        np.testing.assert_array_equal(step.result.images, expected)


def test_requests_drawn_together_are_those_drawn_alone(pipe):
    shared = {"num_inference_steps": 2, "output_type": "np", "scheduler": "euler_a"}
    asked = [
        Request(prompt="a cat", seed=5, num_images=2, **shared),
        Request(prompt=["a dog", "a cow"], negative_prompt="blue", seed=9, **shared),
        Request(prompt="a cat", seed=5, **shared),
    ]
    resolved = [pipe.resolve(request) for request in asked]
    whole = together(resolved)
    assert whole.seeds == [5, 6, 9, 10, 5]
    *_, last = pipe.draw(whole)
    parts = pipe.split(last.result, resolved)
    for part, request in zip(parts, resolved, strict=True):
        *_, alone = pipe.draw(request)
        assert (part.request, part.seeds) == (request, alone.result.seeds)
        np.testing.assert_allclose(part.images, alone.result.images, atol=1e-5)


def test_only_alike_requests_join(pipe, picture):
    first = pipe.resolve(Request(prompt="a cat", seed=1))
    others = [{"guidance_scale": 2}, {"height": 16}, {"scheduler": "ddim"}, {"image": picture}]
    others += [{"num_inference_steps": 3}, {"eta": 0.5, "scheduler": "ddim"}, {"loras": []}]
    joins = [can_join(first, pipe.resolve(Request(prompt="b", **other))) for other in others]
    assert joins == [False] * (len(others) - 1) + [True]
    with_picture = pipe.resolve(Request(prompt="a cat", image=picture))
    assert not can_join(with_picture, with_picture)
