"""The names people use for schedulers, and what each means in diffusers.

A name is a scheduler, optionally followed by how its noise levels are spread and how its timesteps
are spaced, joined by blanks, underscores or colons: `euler`, `dpm++_2m karras`,
`dpm++_2m_sde_exponential`, `ddim trailing`. The names of other programs mean the same here:
`DPM++ 2M Karras`, `DPM2 a`, `PLMS`, `dpmpp_2m`, `euler_ancestral`.

The solvers are diffusers'; the table is ours. Every call gets a fresh scheduler: they hold state,
and shared state is how two pictures disturb each other. Reading names does not import torch.
"""

from __future__ import annotations

import difflib
import inspect
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from .errors import InvalidRequest

__all__ = ["MAX_STEPS", "NAMES", "SPACINGS", "SPREADS", "SchedulerName", "create", "parse", "plan"]


SPACINGS = ("leading", "linspace", "trailing")


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        cls: the class in diffusers.
        label: what the WebUI calls it, for the metadata of pictures.
        about: one line for people.
        options: what to change in the model's scheduler configuration.
        aliases: other names, in our spelling.
        spread_by_default: what the WebUI's schedule type "Automatic" means for it, if the name
            does not say more.
        spreads: whether it takes karras, exponential and beta noise levels.
        eta: whether its step takes `eta`.
        sample: whether it runs models that predict the clean sample.
        spacings: how its timesteps can be spaced.
    """

    cls: str
    label: str
    about: str
    options: dict[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    spread_by_default: str = ""
    spreads: bool = True
    eta: bool = False
    sample: bool = True
    spacings: tuple[str, ...] = SPACINGS


NAMES: dict[str, Entry] = {
    "ddim": Entry(
        "DDIMScheduler",
        "DDIM",
        "deterministic, the classic; with eta up to 1 as random as ddpm",
        spreads=False,
        eta=True,
    ),
    "ddpm": Entry(
        "DDPMScheduler", "DDPM", "the original random process; wants many steps", spreads=False
    ),
    "pndm": Entry(
        "PNDMScheduler",
        "PLMS",
        "linear multistep on the model's timesteps (Stable Diffusion 1's default)",
        {"skip_prk_steps": True},
        ("plms",),
        spreads=False,
        sample=False,
    ),
    "deis": Entry(
        "DEISMultistepScheduler", "DEIS", "exponential integrator, second order; few steps"
    ),
    "lms": Entry("LMSDiscreteScheduler", "LMS", "linear multistep in sigma"),
    "euler": Entry("EulerDiscreteScheduler", "Euler", "first order, fast and predictable"),
    "euler_a": Entry(
        "EulerAncestralDiscreteScheduler",
        "Euler a",
        "euler with fresh noise in every step; varied pictures",
        aliases=("euler_ancestral",),
        spreads=False,
        sample=False,
    ),
    "heun": Entry("HeunDiscreteScheduler", "Heun", "second order: two model calls a step, precise"),
    "dpm2": Entry(
        "KDPM2DiscreteScheduler",
        "DPM2",
        "second order with a midpoint: two model calls a step",
        aliases=("dpm_2",),
        spread_by_default="karras",
        sample=False,
    ),
    "dpm2_a": Entry(
        "KDPM2AncestralDiscreteScheduler",
        "DPM2 a",
        "dpm2 with fresh noise in every step",
        aliases=("dpm_2_ancestral", "dpm2_ancestral"),
        spread_by_default="karras",
        sample=False,
    ),
    "dpm++_2m": Entry(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M",
        "second order multistep; good pictures in 15 to 25 steps",
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
        spread_by_default="karras",
    ),
    "dpm++_2m_sde": Entry(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE",
        "dpm++_2m with fresh noise in every step",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
        spread_by_default="exponential",
    ),
    "dpm++_3m_sde": Entry(
        "DPMSolverMultistepScheduler",
        "DPM++ 3M SDE",
        "third order multistep with fresh noise; spreads a little too wide",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        spread_by_default="exponential",
    ),
    "dpm++_sde": Entry(
        "DPMSolverSinglestepScheduler",
        "DPM++ SDE",
        "singlestep with fresh noise in every step",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "lower_order_final": True},
        spread_by_default="karras",
        spacings=("linspace",),
    ),
    "dpm++_2s": Entry(
        "DPMSolverSinglestepScheduler",
        "DPM++ 2S a",
        "second order singlestep (the WebUI's '2S a', without its fresh noise)",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True},
        ("dpm++_2s_a", "dpm++_2s_ancestral"),
        spread_by_default="karras",
        spacings=("linspace",),
    ),
    "unipc": Entry(
        "UniPCMultistepScheduler",
        "UniPC",
        "predictor and corrector; good pictures in 8 to 15 steps",
        aliases=("uni_pc", "uni_pc_bh2"),
    ),
    "lcm": Entry(
        "LCMScheduler",
        "LCM",
        "for latent consistency models: 2 to 8 steps",
        spreads=False,
        spacings=(),
    ),
    "tcd": Entry(
        "TCDScheduler",
        "TCD",
        "for trajectory consistency models: 2 to 8 steps; eta is its gamma",
        spreads=False,
        eta=True,
        spacings=(),
    ),
}
MAX_STEPS = {"LCMScheduler": 50, "TCDScheduler": 50}  # they pick theirs out of fifty

SPREADS: dict[str, str] = {  # how the noise levels are spread -> the option of diffusers
    "normal": "",
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}
_AYS = "align your steps"
_TAKES_TIMESTEPS = ("DDPM", "EulerDiscrete", "Heun", "DPMSolver")


@dataclass(frozen=True)
class SchedulerName:
    """A scheduler's name, understood. `str()` gives our own short form, which parses to itself."""

    name: str
    spread: str | None = None
    spacing: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in (self.name, self.spread, self.spacing) if word)

    @property
    def entry(self) -> Entry:
        return NAMES[self.name]


def parse(text: str) -> SchedulerName:
    """Understand a scheduler's name.

    Raises:
        InvalidRequest: nobody calls a scheduler that (the nearest names are told), the scheduler
            cannot have its noise levels spread or its timesteps spaced like that, or two ways are
            named.
    """
    if not isinstance(text, str):
        raise InvalidRequest("scheduler", text, "the name of a scheduler, for example 'euler'")
    rest = re.sub(r"[\s_:]+", " ", text.strip().lower())
    rest = rest.replace("dpmpp", "dpm++").replace(" sde gpu", " sde")
    spreads: set[str] = set()
    spacings: set[str] = set()
    automatic = False
    while True:
        for words, meaning in _SUFFIXES.items():
            if not rest.endswith(" " + words):
                continue
            if words == "automatic":
                automatic = True
            else:
                (spreads if meaning in SPREADS else spacings).add(meaning)
            rest = rest.removesuffix(" " + words)
            break
        else:
            break

    name = _by_name().get(rest)
    if name is None:
        near = difflib.get_close_matches(rest, _by_name(), n=3, cutoff=0.5)
        names = list(dict.fromkeys(_by_name()[match] for match in near))
        hint = f"did you mean {' or '.join(names)}? " if names else ""
        raise InvalidRequest(
            "scheduler", text, f"no such scheduler; {hint}`latentgen schedulers` lists them all"
        )
    for said in (spreads, spacings):
        if len(said) > 1:
            hint = f"{' and '.join(sorted(said))} exclude each other; name one"
            raise InvalidRequest("scheduler", text, hint)
    spread, spacing = next(iter(spreads), None), next(iter(spacings), None)
    if automatic and not spread and not spacing:
        spread = NAMES[name].spread_by_default or None
    if spread and spread != "normal" and not _can_spread(name, spread):
        able = [other for other in NAMES if _can_spread(other, spread)]
        raise InvalidRequest(
            "scheduler", text, f"{name} has no {spread} noise levels; these have: {', '.join(able)}"
        )
    if spacing == _AYS and not NAMES[name].cls.startswith(_TAKES_TIMESTEPS):
        able = [other for other in NAMES if NAMES[other].cls.startswith(_TAKES_TIMESTEPS)]
        raise InvalidRequest(
            "scheduler",
            text,
            f"{name} has timesteps of its own; these can be told: {', '.join(able)}",
        )
    if spacing == _AYS and spread not in (None, "normal"):
        hint = f"align your steps names the timesteps, so there are no {spread} noise levels"
        raise InvalidRequest("scheduler", text, hint)
    if spacing in SPACINGS and spacing not in NAMES[name].spacings:
        able = [other for other in NAMES if spacing in NAMES[other].spacings]
        hint = f"{name} has a spacing of its own; {spacing} can be had with: {', '.join(able)}"
        raise InvalidRequest("scheduler", text, hint)
    return SchedulerName(name, spread, spacing)


def create(text: str | None, config: dict[str, Any]):
    """A fresh diffusers scheduler for one call.

    Args:
        text: a name as `parse` understands it, or None for the model's own scheduler.
        config: the model's scheduler configuration; what the name does not settle comes from it.
    """
    import diffusers

    if text is None:
        return getattr(diffusers, config["_class_name"]).from_config(config)
    wanted = parse(text)
    cls = getattr(diffusers, wanted.entry.cls)
    # Latents are not pixels: clipping them to [-1, 1], DDIM's and DDPM's default, ruins them.
    options: dict[str, Any] = {"clip_sample": config.get("clip_sample", False)}
    options |= wanted.entry.options
    if wanted.spread or wanted.spacing == _AYS:
        options |= {flag: name == wanted.spread for name, flag in SPREADS.items() if flag}
    if wanted.spacing and wanted.spacing != _AYS:
        options["timestep_spacing"] = wanted.spacing
    known = inspect.signature(cls.__init__).parameters
    # As arguments: from_config drops entries of a config that were its old class's defaults.
    return cls.from_config(config, **{k: v for k, v in options.items() if k in known})


def plan(
    scheduler,
    text: str | None,
    num_inference_steps: int,
    strength: float | None,
    device,
    is_xl: bool = False,
):
    """The timesteps a call will run, (T,), descending; sets the scheduler up for them.

    Args:
        strength: None to start from pure noise; else the last `int(steps * strength)` of the steps,
            as img2img and inpainting run them. A second-order scheduler has two timesteps a step.
        is_xl: whether the model is of the kind of SDXL, which aligned steps were found for too.

    Raises:
        InvalidRequest: the scheduler cannot make that many steps.
    """
    try:
        if text is not None and parse(text).spacing == _AYS:
            own = _align_your_steps(num_inference_steps, is_xl)
            scheduler.set_timesteps(timesteps=own, device=device)
        else:
            scheduler.set_timesteps(num_inference_steps, device=device)
    except (ValueError, IndexError) as error:
        hint = f"{type(scheduler).__name__} cannot run that: {error}"
        raise InvalidRequest("num_inference_steps", num_inference_steps, hint) from error
    first = 0
    if strength is not None:
        first = (num_inference_steps - int(num_inference_steps * strength)) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):  # it would look for the timestep, which may repeat
        scheduler.set_begin_index(first)
    return scheduler.timesteps[first:]


def _align_your_steps(num_inference_steps: int, is_xl: bool) -> list[int]:
    """The timesteps of arXiv 2404.14507 for Stable Diffusion 1 or XL, stretched to other counts."""
    import numpy as np
    from diffusers.schedulers import AysSchedules

    known = AysSchedules[f"StableDiffusion{'XL' if is_xl else ''}Timesteps"]
    places = np.linspace(0, len(known) - 1, num_inference_steps)
    return np.interp(places, np.arange(len(known)), known).round().astype(int).tolist()


def _can_spread(name: str, spread: str) -> bool:
    if spread == "lu":
        return NAMES[name].cls == "DPMSolverMultistepScheduler"
    return NAMES[name].spreads


@cache
def _by_name() -> dict[str, str]:
    """Every accepted spelling, with blanks, -> our name."""
    table: dict[str, str] = {}
    for name, entry in NAMES.items():
        table.setdefault(entry.cls.lower(), name)
        for spelling in (name, *entry.aliases):
            table[spelling.replace("_", " ")] = name
    return table


# Words that may follow a name -> a spread, a spacing, or what a WebUI schedule type means here.
_SUFFIXES = {
    **{spread: spread for spread in SPREADS},
    **{spacing: spacing for spacing in SPACINGS},
    "automatic": "automatic",
    "sgm uniform": "trailing",
    "simple": "trailing",
    "ddim uniform": "leading",
    "ddim": "leading",
    "uniform": "linspace",
    "align your steps": _AYS,
}
