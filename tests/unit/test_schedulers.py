"""The table of names: what each makes in diffusers, and what is refused."""

import json
from pathlib import Path

import diffusers
import pytest
from fakes import SCHEDULER, drawer, parts

from latentgen import InvalidRequest, LatentDiffusion, schedulers
from latentgen.schedulers import NAMES, SchedulerName, parse

CONFIG = {**SCHEDULER, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("euler", ("euler",)),
        ("Euler a", ("euler_a",)),
        ("euler_ancestral", ("euler_a",)),
        ("EulerAncestralDiscreteScheduler", ("euler_a",)),
        ("PLMS", ("pndm",)),
        ("DPM2 a Karras", ("dpm2_a", "karras")),
        ("DPM++ 2M Karras", ("dpm++_2m", "karras")),
        ("dpmpp_2m_sde_gpu", ("dpm++_2m_sde",)),
        ("dpm++_2m_sde_exponential", ("dpm++_2m_sde", "exponential")),
        ("DPM++ 3M SDE Automatic", ("dpm++_3m_sde", "exponential")),
        ("DPM++ 2M Karras Automatic", ("dpm++_2m", "karras")),
        ("DPM++ 2M SGM Uniform Automatic", ("dpm++_2m", None, "trailing")),
        ("Euler Karras karras", ("euler", "karras")),
        ("DPM++ 2S a", ("dpm++_2s",)),
        ("ddim trailing", ("ddim", None, "trailing")),
        ("ddim ddim uniform", ("ddim", None, "leading")),
        ("Euler SGM Uniform", ("euler", None, "trailing")),
        ("euler karras trailing", ("euler", "karras", "trailing")),
        ("euler trailing karras", ("euler", "karras", "trailing")),
        ("Euler Align Your Steps", ("euler", None, "align your steps")),
        ("DPM++ SDE Uniform", ("dpm++_sde", None, "linspace")),
        ("UniPC:beta", ("unipc", "beta")),
        ("euler normal", ("euler", "normal")),
    ],
)
def test_names_people_use(text, expected):
    assert parse(text) == SchedulerName(*expected)


@pytest.mark.parametrize(
    "text",
    ["ddim karras", "euler_a exponential", "euler lu", "pndm align your steps", "lcm beta",
     "karras", "automatic", "euler euler", "dpm++", "a", "dpm++_2m karras exponential trailing",
     "euler trailing leading", "lcm trailing", "tcd linspace", "DPM++ SDE SGM Uniform",
     "dpm++_2s leading", "DPM++ 2M Karras Align Your Steps", "euler normal karras",
     "euler align your steps simple"],
)  # fmt: skip
def test_what_cannot_be_is_refused(text):
    with pytest.raises(InvalidRequest) as refused:
        parse(text)
    assert refused.value.field == "scheduler"


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_keeps_the_models_noise_and_prediction(name):
    scheduler = schedulers.create(name, CONFIG)
    assert type(scheduler).__name__ == NAMES[name].cls
    for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type"):
        assert scheduler.config[key] == CONFIG[key]
    assert not scheduler.config.get("clip_sample", False)


def test_every_call_gets_a_scheduler_of_its_own():
    one, two = (schedulers.create("euler", CONFIG) for _ in range(2))
    assert one is not two


@pytest.mark.parametrize("spread", ["karras", "exponential", "beta"])
def test_a_spread_replaces_the_models_own(spread):
    config = {**CONFIG, "_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}
    scheduler = schedulers.create(f"euler {spread}", config)
    on = {name for name, flag in schedulers.SPREADS.items() if flag and scheduler.config.get(flag)}
    assert on == {spread}
    assert schedulers.create("euler", config).config.use_karras_sigmas
    assert not schedulers.create("euler normal", config).config.use_karras_sigmas


def test_none_is_the_models_own():
    scheduler = schedulers.create(None, CONFIG)
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.config.steps_offset == 1


@pytest.mark.parametrize("spacing", schedulers.SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_a_spacing_is_what_the_scheduler_runs_or_it_is_refused(name, spacing):
    if spacing not in NAMES[name].spacings:
        with pytest.raises(InvalidRequest, match="has a spacing of its own"):
            parse(f"{name} {spacing}")
        return
    timesteps = [
        schedulers.plan(schedulers.create(text, CONFIG), text, 7, None, "cpu").round().tolist()
        for text in (f"{name} {spacing}", *(f"{name} {s}" for s in NAMES[name].spacings))
    ]
    others = [one for one in timesteps[1:] if one == timesteps[0]]
    assert len(others) == 1


def test_align_your_steps_takes_the_place_of_the_models_noise_levels():
    config = {**CONFIG, "_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}
    scheduler = schedulers.create("euler align your steps", config)
    assert len(schedulers.plan(scheduler, "euler align your steps", 4, None, "cpu")) == 4


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 33])
def test_align_your_steps_keeps_both_ends(steps):
    scheduler = schedulers.create("euler align your steps", CONFIG)
    timesteps = schedulers.plan(scheduler, "euler align your steps", steps, None, "cpu").tolist()
    assert len(timesteps) == steps
    assert timesteps[0] == 999
    assert timesteps == sorted(timesteps, reverse=True)
    if steps > 1:
        assert timesteps[-1] == 24


def test_align_your_steps_of_sdxl_are_its_own():
    scheduler = schedulers.create("euler align your steps", CONFIG)
    own = schedulers.plan(scheduler, "euler align your steps", 10, None, "cpu", is_xl=True)
    assert own.tolist() == [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]  # of the paper


@pytest.mark.parametrize("name", ["deis", "dpm++_2m", "dpm++_3m_sde", "dpm++_2s", "unipc"])
def test_the_first_timesteps_of_many_may_be_the_same(name):
    result = drawer().generate("a cat", scheduler=f"{name} beta", num_inference_steps=50, seed=0)
    assert result.image.getextrema() != ((0, 0), (0, 0), (0, 0))


def test_more_steps_than_a_scheduler_can_make_are_refused():
    with pytest.raises(InvalidRequest, match="LCMScheduler cannot run that") as refused:
        schedulers.plan(schedulers.create("lcm", CONFIG), "lcm", 51, None, "cpu")
    assert refused.value.field == "num_inference_steps"


OWN = ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler", "DDIMScheduler"]


def config_of_a_model_with(cls, **options):
    scheduler = getattr(diffusers, cls)(**options)
    return LatentDiffusion(**{**parts(), "scheduler": scheduler})._scheduler_config()


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_the_same_whatever_the_models_own_scheduler_leaves_at_its_default(name, own):
    made = schedulers.create(name, config_of_a_model_with(own)).config
    for option, value in NAMES[name].options.items():
        assert made[option] == value
    if NAMES[name].spreads:
        karras = schedulers.create(f"{name} karras", config_of_a_model_with(own)).config
        assert karras.get("use_karras_sigmas")
    if "trailing" in NAMES[name].spacings:
        trailing = schedulers.create(f"{name} trailing", config_of_a_model_with(own)).config
        assert trailing.timestep_spacing == "trailing"


@pytest.mark.parametrize("options", [{"steps_offset": 0, "clip_sample": True}, {}], ids=str)
@pytest.mark.parametrize("name", [None, "ddim", "ddpm", "euler"])
def test_old_configurations_are_repaired_as_diffusers_does(name, options):
    made = schedulers.create(name, config_of_a_model_with("DDIMScheduler", **options)).config
    assert made.steps_offset == 1
    assert not made.get("clip_sample", False)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_says_what_it_is_in_one_line(name):
    assert 10 < len(NAMES[name].about) <= 80
    assert "\n" not in NAMES[name].about


def test_the_bundled_models_default_is_a_name():
    own = Path(schedulers.__file__).parent / "models" / "latentgen-icons-128" / "latentgen.json"
    name = json.loads(own.read_text()).get("scheduler")
    assert name is None or str(parse(name)) == name
