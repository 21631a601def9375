"""Every bad request is refused with the name of its field; a good one has no open questions."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentgen import InvalidRequest, LatentgenError
from latentgen.modelfolder import Model
from latentgen.request import MAX_IMAGES, MAX_SEED, Request
from latentgen.schedulers import NAMES

MODEL = Model("tiny", Path(), height=32, width=48, num_inference_steps=20, guidance_scale=4.0,
              scheduler="euler", scheduler_class="DDIMScheduler")  # fmt: skip
PICTURE = Image.new("RGB", (32, 32), "red")
WHITE = Image.new("L", (32, 32), 255)
NAN = float("nan")

REFUSED = [  # field, arguments
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": "  \n"}),
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": 7}),
    ("prompt", {"prompt": b"apple"}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": ["a", ""]}),
    ("prompt", {"prompt": ["a", 7]}),
    ("negative_prompt", {"negative_prompt": 7}),
    ("negative_prompt", {"prompt": ["a", "b"], "negative_prompt": ["a"]}),
    ("num_inference_steps", {"num_inference_steps": 0}),
    ("num_inference_steps", {"num_inference_steps": -3}),
    ("num_inference_steps", {"num_inference_steps": 1001}),
    ("num_inference_steps", {"num_inference_steps": 2.5}),
    ("num_inference_steps", {"num_inference_steps": 20.0}),
    ("num_inference_steps", {"num_inference_steps": "20"}),
    ("num_inference_steps", {"num_inference_steps": True}),
    ("guidance_scale", {"guidance_scale": NAN}),
    ("guidance_scale", {"guidance_scale": float("inf")}),
    ("guidance_scale", {"guidance_scale": 0.5}),
    ("guidance_scale", {"guidance_scale": -1}),
    ("guidance_scale", {"guidance_scale": "7"}),
    ("guidance_rescale", {"guidance_rescale": NAN}),
    ("guidance_rescale", {"guidance_rescale": 1.1}),
    ("eta", {"eta": -0.1}),
    ("eta", {"eta": NAN}),
    ("eta", {"eta": 0.5, "scheduler": "euler"}),
    ("scheduler", {"scheduler": "oiler"}),
    ("scheduler", {"scheduler": 3}),
    ("scheduler", {"scheduler": ""}),
    ("scheduler", {"scheduler": "ddim karras"}),
    ("seed", {"seed": -1}),
    ("seed", {"seed": 2**63}),
    ("seed", {"seed": 1.0}),
    ("seed", {"seed": NAN}),
    ("num_images", {"num_images": 0}),
    ("num_images", {"num_images": MAX_IMAGES + 1}),
    *((name, {name: None}) for name in ("num_images", "eta", "guidance_rescale", "mask_blur")),
    ("num_images", {"prompt": ["a"] * 10, "num_images": 10}),
    ("height", {"height": 0}),
    ("height", {"height": -8}),
    ("height", {"height": 10**9}),
    ("width", {"width": 4104}),
    ("width", {"width": 64.0}),
    ("output_type", {"output_type": "jpeg"}),
    ("strength", {"strength": 0.5}),
    ("mask_image", {"mask_image": WHITE}),
    ("mask_blur", {"mask_blur": 4}),
    ("mask_blur", {"mask_blur": 4, "image": PICTURE}),
    ("mask_blur", {"mask_blur": -1, "image": PICTURE, "mask_image": WHITE}),
    ("padding_mask_crop", {"padding_mask_crop": 0, "image": PICTURE}),
    ("padding_mask_crop", {"padding_mask_crop": -1, "image": PICTURE, "mask_image": WHITE}),
    ("strength", {"image": PICTURE, "strength": NAN}),
    ("strength", {"image": PICTURE, "strength": 1.01}),
    ("strength", {"image": PICTURE, "strength": -0.1}),
    ("image", {"image": 7}),
    ("image", {"image": "nowhere.png"}),
    ("mask_image", {"image": PICTURE, "mask_image": "nowhere.png"}),
    ("mask_image", {"image": PICTURE, "mask_image": WHITE.resize((32, 40))}),
    ("mask_image", {"image": PICTURE, "mask_image": Image.new("L", (32, 32))}),
]
REFUSED_FOR_THE_MODEL = [
    ("height", {"height": 36}),
    ("width", {"width": 4}),
    ("width", {"width": 63}),
    ("height", {"image": PICTURE.resize((32, 30))}),
    ("width", {"image": PICTURE.resize((5000, 8))}),
    ("strength", {"image": PICTURE, "strength": 0.0}),
    ("strength", {"image": PICTURE, "strength": 0.04}),
    ("strength", {"image": PICTURE, "strength": 0.09, "num_inference_steps": 10}),
]


def ids(case):
    return ",".join(f"{k}={v!r}"[:40] for k, v in case.items()) if isinstance(case, dict) else case


@pytest.mark.parametrize(("field", "arguments"), REFUSED, ids=ids)
def test_refused_before_there_is_a_model(field, arguments):
    with pytest.raises(InvalidRequest) as refused:
        Request(**{"prompt": "x", **arguments})
    assert_says_what_would_work(refused.value, field)


@pytest.mark.parametrize(("field", "arguments"), REFUSED_FOR_THE_MODEL, ids=ids)
def test_refused_for_the_model(field, arguments):
    with pytest.raises(InvalidRequest) as refused:
        Request(**{"prompt": "x", **arguments}).resolve(MODEL)
    assert_says_what_would_work(refused.value, field)


def assert_says_what_would_work(error, field):
    assert error.field == field
    assert str(error).startswith(f"{field}=")
    assert "\n" not in str(error)
    assert len(error.hint) > 10
    assert isinstance(error, ValueError)
    assert isinstance(error, LatentgenError)


def test_an_argument_that_does_not_exist_is_not_accepted():
    with pytest.raises(TypeError, match="num_inference_step"):
        Request(prompt="x", num_inference_step=3)


def test_a_long_value_is_shown_short():
    with pytest.raises(InvalidRequest) as refused:
        Request(prompt="x", output_type="y" * 10_000)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("name", "near"),
    [("oiler", "euler"), ("eular a", "euler_a"), ("dpm+2m", "dpm++_2m"), ("ddmi", "ddim")],
)
def test_an_unknown_scheduler_is_told_the_nearest(name, near):
    with pytest.raises(InvalidRequest, match="did you mean") as refused:
        Request(prompt="x", scheduler=name)
    assert near in refused.value.hint


def test_the_model_fills_in_what_was_left_to_it():
    request = Request(prompt="x").resolve(MODEL)
    assert request.prompt == ("x",)
    assert (request.num_inference_steps, request.guidance_scale) == (20, 4.0)
    assert (request.scheduler, request.height, request.width) == ("euler", 32, 48)
    assert 0 <= request.seed < 2**32
    assert (request.strength, request.mode, request.steps_run) == (None, "txt2img", 20)


def test_what_was_asked_for_is_kept():
    asked = {"num_inference_steps": 3, "guidance_scale": 1.0, "scheduler": "heun", "seed": 0,
             "height": 8, "width": 16, "num_images": 2}  # fmt: skip
    request = Request(prompt=["x", "y"], **asked).resolve(MODEL)
    assert {name: getattr(request, name) for name in asked} == asked
    assert request.seeds == [0, 1, 2, 3]


def test_two_requests_without_a_seed_get_different_ones():
    request = Request(prompt="x")
    assert len({request.resolve(MODEL).seed for _ in range(8)}) > 1


def test_resolving_again_changes_nothing():
    once = Request(prompt="x", image=PICTURE, mask_image=WHITE, negative_prompt="y").resolve(MODEL)
    twice = once.resolve(MODEL)
    for field in dataclasses.fields(Request):
        one, two = getattr(once, field.name), getattr(twice, field.name)
        assert one.tobytes() == two.tobytes() if isinstance(one, Image.Image) else one == two


def test_a_request_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request(prompt="x").seed = 3


def test_default_strength_redraws_most_and_inpaints_all():
    assert Request(prompt="x", image=PICTURE).resolve(MODEL).strength == 0.8
    request = Request(prompt="x", image=PICTURE, mask_image=WHITE).resolve(MODEL)
    assert (request.strength, request.mode) == (1.0, "inpaint")


def test_a_picture_sets_the_size_unless_one_is_given():
    assert Request(prompt="x", image=PICTURE).resolve(MODEL).width == 32
    request = Request(prompt="x", image=PICTURE, mask_image=WHITE, width=64, height=16)
    request = request.resolve(MODEL)
    assert request.image.size == request.mask_image.size == (64, 16)
    assert set(np.unique(np.asarray(request.mask_image))) <= {0, 255}


def test_numbers_of_numpy_are_numbers():
    request = Request(prompt="x", seed=np.int64(5), guidance_scale=np.float32(2))
    assert (type(request.seed), type(request.guidance_scale)) == (int, float)


def test_the_largest_seed_leaves_room_for_every_picture_of_a_call():
    request = Request(prompt="x", seed=MAX_SEED - MAX_IMAGES, num_images=MAX_IMAGES).resolve(MODEL)
    assert max(request.seeds) < 2**63


def test_eta_needs_a_scheduler_that_takes_it_also_when_it_is_the_models_own():
    own = dataclasses.replace(MODEL, scheduler=None)
    assert Request(prompt="x", eta=0.5).resolve(own).eta == 0.5
    for model in (MODEL, dataclasses.replace(own, scheduler_class="EulerDiscreteScheduler")):
        with pytest.raises(InvalidRequest) as refused:
            Request(prompt="x", eta=0.5).resolve(model)
        assert refused.value.field == "eta"


def test_an_inpainting_model_wants_a_mask():
    model = dataclasses.replace(MODEL, sees_mask=True)
    for pictures in ({}, {"image": PICTURE}):
        with pytest.raises(InvalidRequest, match="give an image and a mask_image"):
            Request(prompt="x", **pictures).resolve(model)
    Request(prompt="x", image=PICTURE, mask_image=WHITE).resolve(model)


@pytest.mark.parametrize("option", [{"negative_prompt": "dark"}, {"guidance_rescale": 0.5}])
def test_what_has_no_effect_is_said(option):
    with pytest.warns(UserWarning, match="has no effect with guidance_scale 1"):
        Request(prompt="x", guidance_scale=1, **option).resolve(MODEL)


@pytest.mark.parametrize("option", [{"negative_prompt": "dark"}, {"guidance_rescale": 0.5}])
def test_it_is_said_of_a_model_that_takes_the_scale_as_an_input_and_once(option, recwarn):
    model = dataclasses.replace(MODEL, embeds_guidance=True)
    resolved = Request(prompt="x", guidance_scale=8, **option).resolve(model)
    resolved.resolve(model)
    [warning] = recwarn
    assert "has no effect with this model" in str(warning.message)


@pytest.mark.parametrize("how", ["asked", "own"])
def test_more_steps_than_a_scheduler_has_are_refused(how):
    own = {"scheduler": None, "scheduler_class": "LCMScheduler"} if how == "own" else {}
    model = dataclasses.replace(MODEL, **own)
    scheduler = "lcm" if how == "asked" else None
    with pytest.raises(InvalidRequest, match="50 steps at most") as refused:
        Request(prompt="x", num_inference_steps=51, scheduler=scheduler).resolve(model)
    assert refused.value.field == "num_inference_steps"
    Request(prompt="x", num_inference_steps=50, scheduler=scheduler).resolve(model)


def test_a_request_is_checked_without_importing_torch():
    code = (
        "import sys; from latentgen.request import Request; from latentgen.modelfolder import find;"
        "from latentgen import DEFAULT_MODEL; Request(prompt='x', scheduler='euler karras');"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_that_cannot_run_sample_prediction_is_refused_before_it_fails(name):
    """Which can is held against diffusers in the parity tests."""
    model = Model("toy", prediction_type="sample")
    request = Request(prompt="x", scheduler=name, num_inference_steps=2)
    if NAMES[name].sample:
        assert request.resolve(model).scheduler == name
    else:
        with pytest.raises(InvalidRequest, match="predicts the sample") as refused:
            request.resolve(model)
        assert refused.value.field == "scheduler"
