"""From a request to pictures: what the pipeline promises besides the pixels."""

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
from fakes import components, drawer
from PIL import Image

from latentgen import DecodeError, InvalidRequest, LatentDiffusion

CALL = {"prompt": "a red apple", "seed": 3, "num_inference_steps": 3}


@pytest.mark.parametrize(
    ("output_type", "kind", "shape"),
    [
        ("np", np.ndarray, (2, 40, 32, 3)),
        ("pt", torch.Tensor, (2, 3, 40, 32)),
        ("latent", torch.Tensor, (2, 4, 5, 4)),
    ],
)
def test_output_types(pipe, output_type, kind, shape):
    result = pipe.generate(**CALL, num_images=2, height=40, output_type=output_type)
    assert isinstance(result.images, kind)
    assert tuple(result.images.shape) == shape
    if output_type != "latent":
        assert result.images.min() >= 0
        assert result.images.max() <= 1


def test_all_output_types_are_the_same_picture(pipe):
    pil, array, tensor = (
        pipe.generate(**CALL, output_type=kind).images for kind in ("pil", "np", "pt")
    )
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype(np.uint8))


def test_latents_can_be_trained_on(pipe):
    found = pipe.generate(**CALL, output_type="latent").images
    assert not found.is_inference()


def test_a_result_says_how_it_was_made(pipe):
    result = pipe.generate(**CALL, num_images=2)
    assert result.seeds == [3, 4]
    assert result.image is result.images[0]
    assert result.request.scheduler is None
    assert result.request.guidance_scale == 7.5
    assert result.model.name == "in memory"
    assert result.settings == {"device": "cpu", "dtype": "float32", "attention": "sdpa"}
    assert result.seconds > 0


def test_the_same_call_draws_the_same_bytes_and_another_seed_others(pipe):
    one, two = (pipe.generate(**CALL).image.tobytes() for _ in range(2))
    other = pipe.generate(**{**CALL, "seed": 4}).image.tobytes()
    assert one == two != other


def test_a_seed_that_was_drawn_is_told_and_makes_the_picture_again(pipe):
    result = pipe.generate("x", num_inference_steps=2)
    again = pipe.generate("x", num_inference_steps=2, seed=result.seeds[0])
    assert result.image.tobytes() == again.image.tobytes()


def test_drawing_leaves_the_global_random_state_alone(pipe):
    before = torch.get_rng_state()
    pipe.generate(**CALL, scheduler="dpm++_2m_sde")
    assert torch.equal(torch.get_rng_state(), before)


def test_drawing_leaves_the_pipelines_scheduler_alone(pipe):
    before = dict(vars(pipe.scheduler))
    pipe.generate(**CALL)
    pipe.generate(**CALL, scheduler="ddim")
    after = vars(pipe.scheduler)
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] for key in before)


def test_calling_the_pipeline_is_generating(pipe):
    assert pipe(**CALL).image.tobytes() == pipe.generate(**CALL).image.tobytes()


def test_a_stream_checks_the_request_before_its_first_step(pipe):
    with pytest.raises(InvalidRequest, match="height"):
        pipe.stream("x", height=3)


def test_a_stream_can_be_left_and_the_next_drawing_is_not_disturbed(pipe):
    expected = pipe.generate(**CALL, scheduler="euler_a").image.tobytes()
    for step in pipe.stream(**CALL, scheduler="euler_a"):
        if step.index == 1:
            break
    assert pipe.generate(**CALL, scheduler="euler_a").image.tobytes() == expected


def test_previews_show_each_picture_of_the_batch(pipe):
    for step in pipe.stream(**CALL, num_images=2):
        shown = [step.preview(), step.preview(1)]
        assert [image.size for image in shown] == [(32, 32)] * 2
        assert shown[0].tobytes() != shown[1].tobytes()


def test_the_last_preview_of_a_deterministic_drawing_is_nearly_the_picture():
    pipe = drawer()
    *_, last = pipe.stream(**CALL, scheduler="euler")  # its last step goes to the estimate
    difference = np.asarray(last.preview(), int) - np.asarray(last.result.image, int)
    assert abs(difference).max() <= 1


def test_previews_of_a_part_lie_over_the_whole_picture(pipe, picture, mask):
    whole = picture.resize((64, 64))
    small = Image.new("L", whole.size)
    small.paste(mask, (8, 8))
    request = {"image": whole, "mask_image": small, "padding_mask_crop": 2}
    for step in pipe.stream("a cat", **request, num_inference_steps=2):
        shown = step.preview()
        assert shown.size == whole.size
        assert not (np.asarray(shown) != np.asarray(whole))[np.asarray(small) == 0].any()


@pytest.mark.parametrize("missing", ["image", "mask_image"])
def test_a_missing_picture_is_refused_not_ignored(pipe, picture, mask, missing):
    with pytest.raises(InvalidRequest) as refused:
        pipe.inpaint("x", **{"image": picture, "mask_image": mask, missing: None})
    assert refused.value.field == missing


def test_an_inpainting_model_draws_nothing_without_a_mask(picture):
    with pytest.raises(InvalidRequest, match="nine input channels"):
        drawer("9-channel").img2img("x", picture)


@pytest.mark.parametrize("kind", ["4-channel", "9-channel"])
def test_inpainting_repaints_the_inside(kind, picture, mask):
    result = drawer(kind).inpaint("x", picture, mask, seed=1, num_inference_steps=2)
    changed = (np.asarray(result.image) != np.asarray(picture)).any(axis=2)
    inside = np.asarray(mask) == 255
    assert changed[inside].mean() > 0.9
    assert not changed[~inside].any()


def test_img2img_with_little_strength_stays_nearer_to_the_picture_than_with_much(pipe, picture):
    near, far = (
        pipe.img2img("x", picture, strength=s, num_inference_steps=10, seed=1, output_type="latent")
        for s in (0.1, 1.0)
    )
    start = pipe.img2img(
        "x", picture, strength=0.02, num_inference_steps=50, seed=1, output_type="latent"
    ).images
    assert (near.images - start).abs().mean() < (far.images - start).abs().mean()


@pytest.mark.parametrize("kind", ["array", "path", "picture"])
def test_a_picture_comes_as_array_path_or_pil(pipe, picture, tmp_path, kind):
    picture.save(tmp_path / "p.png")
    source = {"array": np.asarray(picture), "path": tmp_path / "p.png", "picture": picture}[kind]
    found = pipe.img2img("x", source, seed=1, num_inference_steps=2).image
    assert (
        found.tobytes() == pipe.img2img("x", picture, seed=1, num_inference_steps=2).image.tobytes()
    )


def test_the_callers_pictures_are_not_changed(pipe, picture, mask):
    before = picture.tobytes(), mask.tobytes()
    pipe.inpaint("x", picture, mask, seed=1, num_inference_steps=2, mask_blur=3)
    assert (picture.tobytes(), mask.tobytes()) == before


def test_broken_weights_end_in_an_error_not_in_a_black_picture():
    parts = components(sample_size=4)
    with torch.no_grad():
        parts["unet"].conv_out.bias.fill_(torch.nan)
    with pytest.raises(DecodeError, match="latents are not finite"):
        LatentDiffusion(**parts).generate(**CALL)


def test_sizes_need_not_be_square_or_the_models_own(pipe):
    for width, height in [(8, 8), (64, 8), (8, 72)]:
        image = pipe.generate(**CALL, width=width, height=height).image
        assert image.size == (width, height)
        assert isinstance(image, Image.Image)


def test_a_distilled_model_takes_the_scale_as_an_input_in_one_row_a_picture():
    parts = components(sample_size=4)
    config = dict(parts["unet"].config)
    config.pop("_use_default_values")  # else from_config forgets the next line's change
    torch.manual_seed(0)
    parts["unet"] = UNet2DConditionModel.from_config(config | {"time_cond_proj_dim": 8}).eval()
    parts["scheduler"] = LCMScheduler.from_config(parts["scheduler"].config)
    stock = LatentConsistencyModelPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 7.5, "output_type": "np"}
    found = LatentDiffusion(**parts).generate("x", seed=1, **options).images
    expected = stock("x", generator=[torch.Generator("cpu").manual_seed(1)], **options).images
    # The embedding of the scale is computed in another order.
    np.testing.assert_allclose(found, expected, atol=1e-4)
