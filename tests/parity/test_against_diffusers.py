"""Our pictures are diffusers' pictures, for every scheduler and every way of drawing.

The stock schedulers are spelled out here and share nothing with our table of names.
"""

import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from fakes import controlnet, drawer, parts
from PIL import Image

from latentgen import LatentDiffusion, schedulers

pytestmark = pytest.mark.usefixtures("stock_convolutions")

SEED = 40
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {**BETAS, "steps_offset": 1, "timestep_spacing": "leading"}
ALPHA = {"set_alpha_to_one": False, "clip_sample": False}
SINGLESTEP = "DPMSolverSinglestepScheduler"  # knows no spacing
SDE = {"algorithm_type": "sde-dpmsolver++"}
STOCK = {  # our name -> diffusers' class and what it differs in from its own defaults
    None: ("DDIMScheduler", ALPHA),
    "ddim": ("DDIMScheduler", ALPHA),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "deis": ("DEISMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", SDE),
    "dpm++_3m_sde": ("DPMSolverMultistepScheduler", {**SDE, "solver_order": 3}),
    "dpm++_sde": (SINGLESTEP, {**SDE, "lower_order_final": True}),
    "dpm++_2s": (SINGLESTEP, {"lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", ALPHA),
    "tcd": ("TCDScheduler", ALPHA),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE Exponential": (
        "DPMSolverMultistepScheduler",
        {**SDE, "use_exponential_sigmas": True},
    ),
    "dpm++_2m lu": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "unipc karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "euler beta": ("EulerDiscreteScheduler", {"use_beta_sigmas": True}),
    "heun exponential": ("HeunDiscreteScheduler", {"use_exponential_sigmas": True}),
    "ddim trailing": ("DDIMScheduler", {**ALPHA, "timestep_spacing": "trailing"}),
    "Euler a SGM Uniform": (
        "EulerAncestralDiscreteScheduler",
        {"timestep_spacing": "trailing"},
    ),
    "deis linspace": ("DEISMultistepScheduler", {"timestep_spacing": "linspace"}),
}
# arXiv 2404.14507, ten steps for Stable Diffusion 1.
ALIGN_YOUR_STEPS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]

every_scheduler = pytest.mark.parametrize("name", STOCK, ids=str)
batch_and_guidance = pytest.mark.parametrize(
    ("num_images", "guidance_scale"),
    [(1, 1.0), (1, 7.5), (2, 1.0), (2, 7.5)],
    ids=["solo", "solo-guided", "pair", "pair-guided"],
)
solo_or_guided_pair = pytest.mark.parametrize(
    ("num_images", "guidance_scale"), [(1, 1.0), (2, 7.5)], ids=["solo", "pair-guided"]
)


UNSAFE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def stock_scheduler(name, **more):
    cls, options = STOCK[name]
    known = {k: v for k, v in LEADING.items() if cls != SINGLESTEP or k in BETAS}
    return getattr(diffusers, cls)(**{**known, **options, **more})


def stock(pipeline, scheduler, prompt="a red apple", kind="4-channel", num_images=1, **options):
    """What diffusers draws, with one generator for each picture."""
    control = "ControlNet" in pipeline.__name__
    pipe = pipeline(
        **{**parts(kind), "scheduler": scheduler},
        **({"controlnet": ControlNetModel.from_pretrained(controlnet())} if control else {}),
        **({"add_watermarker": False} if "XL" in pipeline.__name__ else UNSAFE),
    )
    pipe.set_progress_bar_config(disable=True)
    count = num_images * (1 if isinstance(prompt, str) else len(prompt))
    generators = [torch.Generator("cpu").manual_seed(SEED + i) for i in range(count)]
    options = {"output_type": "np", "num_images_per_prompt": num_images, **options}
    return np.asarray(pipe(prompt, generator=generators, **options).images)


def ours(prompt="a red apple", kind="4-channel", **options):
    options = {"output_type": "np", "seed": SEED, **options}
    return np.asarray(drawer(kind).generate(prompt, **options).images)


def assert_same(found, expected):
    """Equal to the last bit: it is the same arithmetic in the same order."""
    assert found.shape == expected.shape
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(found, expected)


def test_every_name_has_its_stock_scheduler_here():
    assert set(schedulers.NAMES) <= set(STOCK)


@batch_and_guidance
@every_scheduler
def test_text_to_image(name, num_images, guidance_scale):
    common = {"num_inference_steps": 3, "guidance_scale": guidance_scale, "num_images": num_images}
    assert_same(
        ours(scheduler=name, **common),
        stock(StableDiffusionPipeline, stock_scheduler(name), **common),
    )


@solo_or_guided_pair
@every_scheduler
def test_image_to_image(name, num_images, guidance_scale, picture):
    common = {
        "num_inference_steps": 4,
        "guidance_scale": guidance_scale,
        "num_images": num_images,
        "image": picture,
        "strength": 0.7,  # 2 of the 4 steps: 2.8 is cut
    }
    assert_same(
        ours(scheduler=name, **common),
        stock(StableDiffusionImg2ImgPipeline, stock_scheduler(name), **common),
    )


@solo_or_guided_pair
@pytest.mark.parametrize("kind", ["4-channel", "9-channel"])
@every_scheduler
def test_inpainting(name, kind, num_images, guidance_scale, picture, mask):
    common = {
        "kind": kind,
        "num_inference_steps": 3,
        "guidance_scale": guidance_scale,
        "num_images": num_images,
        "strength": 1.0,
        "output_type": "latent",  # before we lay the original's pixels back
    }
    assert_same(
        ours(scheduler=name, image=picture, mask_image=mask, **common),
        stock_inpainting(stock_scheduler(name), picture, mask, **common),
    )


def stock_inpainting(scheduler, picture, mask, num_images=1, **options):
    """Stock gets the picture once for each result.

    Given it once, diffusers samples the autoencoder's posterior once, from the first generator, for
    all. Ours samples it for each picture from its own, so that each can be made again alone.
    """
    return stock(
        StableDiffusionInpaintPipeline,
        scheduler,
        prompt=["a red apple"] * num_images,
        image=[picture] * num_images,
        mask_image=[mask] * num_images,
        **options,
    )


@pytest.mark.parametrize("name", ["ddim", "euler_a", "heun", "dpm++_2m_sde"])
@pytest.mark.parametrize("kind", ["4-channel", "9-channel"])
def test_inpainting_part_of_the_schedule(name, kind, picture, mask):
    common = {"kind": kind, "num_inference_steps": 5, "guidance_scale": 7.5, "strength": 0.7}
    common |= {"num_images": 2, "output_type": "latent"}
    assert_same(
        ours(scheduler=name, image=picture, mask_image=mask, **common),
        stock_inpainting(stock_scheduler(name), picture, mask, **common),
    )


def test_inpainted_pixels_inside_the_mask(picture, mask):
    common = {"num_inference_steps": 3, "guidance_scale": 7.5, "num_images": 2}
    inside = np.asarray(mask) == 255
    assert_same(
        ours(scheduler="euler", image=picture, mask_image=mask, **common)[:, inside],
        stock_inpainting(stock_scheduler("euler"), picture, mask, strength=1.0, **common)[
            :, inside
        ],
    )


NO_SAMPLE_PREDICTION = {"pndm", "euler_a", "dpm2", "dpm2_a", "Euler a SGM Uniform"}  # in diffusers


@pytest.mark.parametrize(
    ("kind", "name"),
    [("v-prediction", name) for name in STOCK]
    + [("sample-prediction", name) for name in STOCK if name not in NO_SAMPLE_PREDICTION],
)
def test_other_predictions(name, kind):
    common = {"kind": kind, "num_inference_steps": 3, "guidance_scale": 7.5, "num_images": 2}
    prediction_type = {"v-prediction": "v_prediction", "sample-prediction": "sample"}[kind]
    scheduler = stock_scheduler(name, prediction_type=prediction_type)
    assert_same(ours(scheduler=name, **common), stock(StableDiffusionPipeline, scheduler, **common))


@pytest.mark.parametrize("name", [None, "ddim", "euler", "euler_a", "unipc", "dpm++_2m"], ids=str)
def test_zero_terminal_snr(name):
    common = {"kind": "zero-terminal-snr", "num_inference_steps": 3, "guidance_scale": 7.5}
    scheduler = stock_scheduler(
        name,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    common |= {"guidance_rescale": 0.7, "num_images": 2}
    assert_same(ours(scheduler=name, **common), stock(StableDiffusionPipeline, scheduler, **common))


@pytest.mark.parametrize("name", ["dpm++_2m", "euler", "heun", "ddpm"])
def test_align_your_steps(name):
    common = {"num_inference_steps": 10, "guidance_scale": 7.5}
    scheduler = stock_scheduler(name)
    expected = stock(StableDiffusionPipeline, scheduler, timesteps=ALIGN_YOUR_STEPS, **common)
    assert_same(ours(scheduler=f"{name} align your steps", **common), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_rescale": 0.7},
        {"negative_prompt": "blurry, dark"},
        {"prompt": ["a red apple", "a house"]},
        {"prompt": ["a red apple", "a house"], "num_images": 2},
        {"prompt": ["a red apple", "a house"], "negative_prompt": ["dark", "blurry, small"]},
        {"height": 40, "width": 64},
        {"num_inference_steps": 1},
    ],
    ids=lambda options: ",".join(options),
)
def test_every_option_of_a_call(options):
    common = {"num_inference_steps": 3, "guidance_scale": 7.5, **options}
    assert_same(
        ours(scheduler="euler_a", **common),
        stock(StableDiffusionPipeline, stock_scheduler("euler_a"), **common),
    )


@pytest.mark.parametrize("name", ["ddim", "tcd"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_eta(name, eta):
    common = {"num_inference_steps": 3, "guidance_scale": 7.5, "eta": eta, "num_images": 2}
    assert_same(
        ours(scheduler=name, **common),
        stock(StableDiffusionPipeline, stock_scheduler(name), **common),
    )


@pytest.mark.parametrize(
    "options", [{}, {"steps_offset": 0, "timestep_spacing": "leading"}], ids=str
)
@pytest.mark.parametrize(
    "cls", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "LCMScheduler"]
)
def test_the_models_own_scheduler_also_with_an_outdated_configuration(cls, options):
    common = {"num_inference_steps": 5, "guidance_scale": 7.5}
    own, other = (getattr(diffusers, cls)(**options) for _ in range(2))  # stock changes its own
    pipe = LatentDiffusion(**{**parts(), "scheduler": own})
    found = pipe.generate("a red apple", seed=SEED, output_type="np", **common).images
    assert_same(found, stock(StableDiffusionPipeline, other, **common))


@pytest.fixture
def control():
    """A ControlNet, and what it sees: of another size than what is drawn."""
    pixels = np.random.default_rng(1).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    return {"controlnet": controlnet(), "control_image": Image.fromarray(pixels)}


PART_OF_THE_STEPS = {"control_guidance_start": 0.25, "control_guidance_end": 0.8}
with_a_controlnet = pytest.mark.parametrize(
    ("name", "more"),
    [
        ("ddim", {}),
        ("euler_a", {"controlnet_conditioning_scale": 0.7}),
        ("dpm++_2m", {"controlnet_conditioning_scale": 1.5, **PART_OF_THE_STEPS}),
        ("heun", PART_OF_THE_STEPS),
    ],
)


@batch_and_guidance
@with_a_controlnet
def test_text_to_image_with_a_controlnet(name, more, num_images, guidance_scale, control):
    common = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "num_images": num_images}
    common |= {"height": 32, "width": 32, "controlnet_conditioning_scale": 1.0, **more}
    scheduler = stock_scheduler(name)
    picture = control["control_image"]
    expected = stock(StableDiffusionControlNetPipeline, scheduler, image=picture, **common)
    assert_same(ours(scheduler=name, **control, **common), expected)
    assert not np.array_equal(ours(scheduler=name, num_inference_steps=4), expected[:1])


@solo_or_guided_pair
@with_a_controlnet
def test_image_to_image_with_a_controlnet(name, more, num_images, guidance_scale, control, picture):
    common = {"num_inference_steps": 5, "guidance_scale": guidance_scale, "num_images": num_images}
    common |= {"image": picture, "strength": 0.8, "controlnet_conditioning_scale": 1.0, **more}
    seen = control["control_image"].resize(picture.size, Image.Resampling.LANCZOS)
    assert_same(
        ours(scheduler=name, **control, **common),
        stock(
            StableDiffusionControlNetImg2ImgPipeline,
            stock_scheduler(name),
            control_image=seen,
            **common,
        ),
    )


@solo_or_guided_pair
@with_a_controlnet
def test_inpainting_with_a_controlnet(
    name, more, num_images, guidance_scale, control, picture, mask
):
    common = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "strength": 1.0}
    common |= {"controlnet_conditioning_scale": 1.0, "output_type": "latent", **more}
    expected = stock(
        StableDiffusionControlNetInpaintPipeline,
        stock_scheduler(name),
        prompt=["a red apple"] * num_images,
        image=[picture] * num_images,
        mask_image=[mask] * num_images,
        control_image=[control["control_image"].resize(picture.size, Image.Resampling.LANCZOS)]
        * num_images,
        **common,
    )
    common |= {"image": picture, "mask_image": mask, "num_images": num_images}
    assert_same(ours(scheduler=name, **control, **common), expected)


@solo_or_guided_pair
def test_inpainting_with_a_controlnet_that_sees_what_is_repainted(
    num_images, guidance_scale, picture, mask, tmp_path
):
    common = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "strength": 1.0}
    common |= {"controlnet_conditioning_scale": 1.0, "output_type": "latent"}
    seen = torch.from_numpy(np.asarray(picture) / np.float32(255)).permute(2, 0, 1)
    seen = seen.masked_fill(torch.from_numpy(np.asarray(mask) > 127), -1.0)  # (3, H, W)
    expected = stock(
        StableDiffusionControlNetInpaintPipeline,
        stock_scheduler("ddim"),
        prompt=["a red apple"] * num_images,
        image=[picture] * num_images,
        mask_image=[mask] * num_images,
        control_image=seen.repeat(num_images, 1, 1, 1),
        **common,
    )
    folder = shutil.copytree(controlnet(), tmp_path / "control_v11p_sd15_inpaint")
    common |= {"image": picture, "mask_image": mask, "num_images": num_images}
    assert_same(ours(scheduler="ddim", controlnet=folder, **common), expected)


@pytest.mark.filterwarnings("ignore:negative_prompt has no effect")
@pytest.mark.parametrize("negative_prompt", [None, "dark, blurry"], ids=["", "negative"])
@batch_and_guidance
@pytest.mark.parametrize("name", [None, "ddim", "euler_a", "dpm++_2m"], ids=str)
def test_text_to_image_with_sdxl(name, num_images, guidance_scale, negative_prompt):
    common = {"num_inference_steps": 3, "guidance_scale": guidance_scale, "num_images": num_images}
    common |= {"kind": "xl", "negative_prompt": negative_prompt, "height": 32, "width": 40}
    assert_same(
        ours(scheduler=name, **common),
        stock(StableDiffusionXLPipeline, stock_scheduler(name), **common),
    )


@solo_or_guided_pair
@pytest.mark.parametrize("name", ["ddim", "euler_a"])
def test_image_to_image_with_sdxl(name, num_images, guidance_scale, picture):
    common = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "num_images": num_images}
    common |= {"kind": "xl", "image": picture, "strength": 0.7}
    assert_same(
        ours(scheduler=name, **common),
        stock(StableDiffusionXLImg2ImgPipeline, stock_scheduler(name), **common),
    )


@solo_or_guided_pair
@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("kind", ["xl", "xl-9-channel"])
@pytest.mark.parametrize("name", ["ddim", "euler_a"])
def test_inpainting_with_sdxl(name, kind, strength, num_images, guidance_scale, picture, mask):
    common = {"kind": kind, "num_inference_steps": 4, "guidance_scale": guidance_scale}
    common |= {"strength": strength, "output_type": "latent"}
    prompts = ["a red apple"] * num_images  # encoded together, as in stock: the last bit
    expected = stock(
        StableDiffusionXLInpaintPipeline,
        stock_scheduler(name),
        prompt=prompts,
        image=[picture] * num_images,
        mask_image=[mask] * num_images,
        height=32,
        width=32,
        **common,
    )
    assert_same(
        ours(scheduler=name, prompt=prompts, image=picture, mask_image=mask, **common), expected
    )
