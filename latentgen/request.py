"""What can be asked for: every default and every check, once.

A `Request` is frozen and valid from the moment it exists. It goes through two stages, neither of
which reads weights or imports torch: `Request(...)` checks what can be checked without a model, and
`request.resolve(model)` fills in what was left to the model, draws a seed if none was given, and
checks the rest. What the pipeline sees, a `ResolvedRequest`, has no open questions.
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypedDict

from PIL import Image

from . import controlnet, emphasis, lorafolder, schedulers
from .errors import InvalidRequest
from .images import load_image, load_mask, region, resize_mask
from .lorafolder import LoraUse
from .modelfolder import Model

__all__ = [
    "MAX_IMAGES",
    "MAX_SEED",
    "MAX_SIDE",
    "MAX_STEPS",
    "OF_CONTROL",
    "OF_PICTURES",
    "OUTPUT_TYPES",
    "Request",
    "ResolvedRequest",
    "can_join",
    "together",
]

MAX_SIDE = 4096  # pixels
MAX_STEPS = 1000
MAX_IMAGES = 64
MAX_SEED = 2**63 - 1
_TAKE_ETA = {entry.cls for entry in schedulers.NAMES.values() if entry.eta}
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
OF_PICTURES = {"image", "mask_image", "strength", "mask_blur", "padding_mask_crop"}
OF_CONTROL = (  # fields that go with a `controlnet`
    "control_image",
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
)


class Options(TypedDict, total=False):
    """The keyword arguments of every drawing function; see `Request`."""

    num_inference_steps: int | None
    guidance_scale: float | None
    scheduler: str | None
    seed: int | None
    num_images: int
    height: int | None
    width: int | None
    eta: float
    guidance_rescale: float
    output_type: str
    loras: Sequence[Any]
    controlnet: Any
    control_image: Any
    controlnet_conditioning_scale: float
    control_guidance_start: float
    control_guidance_end: float


class EditOptions(Options, total=False):
    """Those of img2img and inpainting."""

    negative_prompt: str | Sequence[str] | None
    strength: float | None


class InpaintOptions(EditOptions, total=False):
    """Those of inpainting."""

    mask_blur: int
    padding_mask_crop: int | None


class StreamOptions(Options, total=False):
    """Those of `stream`, which can do everything."""

    image: Any
    mask_image: Any
    strength: float | None
    mask_blur: int
    padding_mask_crop: int | None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of the pipeline; the names are diffusers'.

    Attributes:
        prompt: one text, or a list of texts; `(word:1.3)`, `[word]` and `BREAK` mean what
            `latentgen.emphasis` says; `<lora:name:0.8>` is taken out and joins `loras`.
        negative_prompt: what to keep away from: one text for all, or one for each prompt; an empty
            one is the same as none.
        num_inference_steps: length of the schedule, before `strength`; 1 to 1000.
        guidance_scale: how strongly to follow the prompt; 1 = not at all guided.
        scheduler: a name that `latentgen.schedulers.parse` understands; None: the model's own.
        seed: picture i is drawn from `seed + i`; None draws one.
        num_images: pictures for each prompt.
        height, width: in pixels; an input picture of another size is resized to it, unless only a
            part of it is drawn (`padding_mask_crop`).
        eta: 0 to 1, DDIM's randomness (arXiv 2010.02502); for ddim and tcd.
        guidance_rescale: 0 to 1, arXiv 2305.08891, section 3.4.
        output_type: "pil", "np" (B, H, W, 3), "pt" (B, 3, H, W), both in [0, 1], or "latent".
        loras: files or names of LoRAs, perhaps with weights: "style.safetensors:0.8"; all that
            `latentgen.lorafolder.parse` understands. They add up with those of `load_lora`.
        controlnet: a folder, file, name or hub id of a ControlNet, see `latentgen.controlnet.find`.
        control_image: what it sees (edges, a pose, depths; as it was trained for); resized to
            `height` x `width`, or cut like the image where only a part of that is drawn. Inpainting
            ControlNets (with "inpaint" in their name) need none: they see the image, and -1 where
            it is repainted.
        controlnet_conditioning_scale: how strongly it is followed, 0 to 10.
        control_guidance_start, control_guidance_end: 0 to 1, the share of the steps in which it is.
        image: the picture to start from, for img2img and inpainting.
        mask_image: white = repaint; needs `image` and makes it inpainting.
        strength: 0 to 1, how much of the schedule to run: `int(num_inference_steps * strength)`.
        mask_blur: width in pixels of a soft edge inside the mask.
        padding_mask_crop: draw only the part of the picture around the mask, with this margin in
            pixels, at `height` x `width`, and put it back in its place; the picture keeps its size.
            None: the whole picture is drawn.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    seed: int | None = None
    num_images: int = 1
    height: int | None = None
    width: int | None = None
    eta: float = 0.0
    guidance_rescale: float = 0.0
    output_type: str = "pil"
    loras: Sequence[Any] = ()
    controlnet: Any = None
    control_image: Any = field(default=None, repr=False)
    controlnet_conditioning_scale: float = 1.0
    control_guidance_start: float = 0.0
    control_guidance_end: float = 1.0
    image: Any = field(default=None, repr=False)
    mask_image: Any = field(default=None, repr=False)
    strength: float | None = None
    mask_blur: int = 0
    padding_mask_crop: int | None = None

    def __post_init__(self) -> None:
        prompts, tags = lorafolder.take_tags(_texts("prompt", self.prompt))
        if not prompts or not all(text.strip() for text in prompts):
            raise InvalidRequest(
                "prompt", self.prompt, "say what to draw, for example 'a red apple'"
            )
        for text in prompts:
            emphasis.read(text)
        self._set("prompt", prompts)
        self._take_loras(tags)
        if self.negative_prompt is not None:
            negatives = _texts("negative_prompt", self.negative_prompt)
            if isinstance(self.negative_prompt, str):
                negatives = negatives * len(prompts)
            if len(negatives) != len(prompts):
                hint = f"one text, or as many as there are prompts ({len(prompts)})"
                raise InvalidRequest("negative_prompt", self.negative_prompt, hint)
            if any("<lora:" in text for text in negatives):
                hint = "<lora:...> belongs into the prompt, perhaps with a weight below 0"
                raise InvalidRequest("negative_prompt", self.negative_prompt, hint)
            for text in negatives:
                emphasis.read(text, "negative_prompt")
            self._set("negative_prompt", negatives)

        self._integer("num_inference_steps", 1, MAX_STEPS)
        self._integer("num_images", 1, MAX_IMAGES)
        if self.num_images * len(prompts) > MAX_IMAGES:
            total = self.num_images * len(prompts)
            hint = f"{total} pictures in one call; at most {MAX_IMAGES}: make several calls"
            raise InvalidRequest("num_images", self.num_images, hint)
        self._integer("seed", 0, MAX_SEED - MAX_IMAGES)
        self._integer("height", 1, MAX_SIDE)
        self._integer("width", 1, MAX_SIDE)
        self._integer("mask_blur", 0, 256)
        self._integer("padding_mask_crop", 0, MAX_SIDE)
        self._number("guidance_scale", 1, 1000)
        self._number("guidance_rescale", 0, 1)
        self._number("eta", 0, 1)
        self._number("strength", 0, 1)
        self._number("controlnet_conditioning_scale", 0, 10)
        self._number("control_guidance_start", 0, 1)
        self._number("control_guidance_end", 0, 1)
        if self.output_type not in OUTPUT_TYPES:
            raise InvalidRequest("output_type", self.output_type, f"one of {OUTPUT_TYPES}")

        if self.scheduler is not None:
            name = schedulers.parse(self.scheduler)
            if self.eta and not name.entry.eta:
                able = " and ".join(key for key, entry in schedulers.NAMES.items() if entry.eta)
                raise InvalidRequest("eta", self.eta, f"{name} takes no eta; {able} do")
            self._set("scheduler", str(name))
        self._take_pictures()
        self._take_control()

    def _take_loras(self, tags: Sequence[LoraUse]) -> None:
        given = self.loras
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise InvalidRequest("loras", given, "a list, like ['style.safetensors:0.8']")
        uses = (*map(lorafolder.parse, given), *tags)
        names = [use.name for use in uses]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InvalidRequest("loras", ", ".join(twice), "named twice in one request")
        self._set("loras", uses)

    def _take_pictures(self) -> None:
        if self.image is None:
            for name in ("mask_image", "strength"):
                if getattr(self, name) is not None:
                    raise InvalidRequest(name, getattr(self, name), "goes with an image; give one")
        else:
            self._set("image", load_image(self.image))
        if self.mask_image is None:
            for name in ("mask_blur", "padding_mask_crop"):
                if (value := getattr(self, name)) != getattr(Request, name):
                    raise InvalidRequest(name, value, "goes with a mask_image")
            return
        self._set("mask_image", load_mask(self.mask_image))
        if self.mask_image.size != self.image.size:
            hint = f"must have the size of the image, {self.image.width} x {self.image.height}"
            size = f"{self.mask_image.width} x {self.mask_image.height}"
            raise InvalidRequest("mask_image", size, hint)

    def _take_control(self) -> None:
        if self.controlnet is None:
            picture, *numbers = OF_CONTROL
            given = [picture] if self.control_image is not None else []
            given += [name for name in numbers if getattr(self, name) != getattr(Request, name)]
            if given:
                hint = "goes with a controlnet; name one"
                raise InvalidRequest(given[0], getattr(self, given[0]), hint)
            return
        self._set("controlnet", controlnet.find(self.controlnet))
        if self.control_guidance_start >= self.control_guidance_end:
            hint = f"must lie before control_guidance_end, {self.control_guidance_end:g}"
            raise InvalidRequest("control_guidance_start", self.control_guidance_start, hint)
        if self.control_image is None:
            if self.mode == "inpaint" and controlnet.sees_mask(self.controlnet.name):
                return
            hint = "it follows a picture; give one as control_image"
            raise InvalidRequest("controlnet", self.controlnet.name, hint)
        self._set("control_image", load_image(self.control_image, "control_image"))
        if self.padding_mask_crop is not None and self.control_image.size != self.image.size:
            hint = f"must have the size of the image, {self.image.width} x {self.image.height}"
            size = f"{self.control_image.width} x {self.control_image.height}"
            raise InvalidRequest("control_image", size, hint)

    def resolve(
        self, model: Model, loaded_loras: Mapping[str, LoraUse] | None = None
    ) -> ResolvedRequest:
        """The same request with every open question answered for `model`.

        Args:
            loaded_loras: by name, those that every drawing has.

        Raises:
            InvalidRequest: a size that the VAE's factor does not divide, a strength that leaves no
                step to run, more steps than the scheduler has, or a LoRA that is found nowhere.
        """
        if model.sees_mask and self.mode != "inpaint":
            hint = "an inpainting model (nine input channels): give an image and a mask_image"
            raise InvalidRequest("model", model.name, hint)
        chosen: dict[str, Any] = {"loras": lorafolder.resolve(self.loras, loaded_loras or {})}
        for name in ("num_inference_steps", "guidance_scale", "scheduler"):
            if getattr(self, name) is None:
                chosen[name] = getattr(model, name)
        if self.seed is None:
            chosen["seed"] = secrets.randbelow(2**32)
        whole = self.image is not None and self.padding_mask_crop is None
        size = self.image.size if whole else (model.width, model.height)
        width = self.width if self.width is not None else size[0]
        height = self.height if self.height is not None else size[1]
        for name, value in (("height", height), ("width", width)):
            _check_side(name, value, model.vae_scale_factor)
        chosen |= {"width": width, "height": height}
        if whole and self.image.size != (width, height):
            chosen["image"] = self.image.resize((width, height), Image.Resampling.LANCZOS)
            if self.mask_image is not None:
                chosen["mask_image"] = resize_mask(self.mask_image, (width, height))
        if self.image is not None and self.strength is None:
            chosen["strength"] = 0.8 if self.mask_image is None else 1.0
        asked = {item.name: getattr(self, item.name) for item in fields(self)}
        resolved = ResolvedRequest(**{**asked, **chosen})

        if resolved.strength is not None and resolved.steps_run == 0:
            steps = resolved.num_inference_steps
            least = min(1.0, math.ceil(100 / steps) / 100)
            hint = f"leaves none of the {steps} steps to run; give at least {least:g} or more steps"
            raise InvalidRequest("strength", resolved.strength, hint)
        solver = model.scheduler_class
        if resolved.scheduler is not None:
            solver = schedulers.parse(resolved.scheduler).entry.cls
        most = schedulers.MAX_STEPS.get(solver, MAX_STEPS)
        if resolved.num_inference_steps > most:
            hint = f"{solver} has {most} steps at most; 2 to 8 are what it is for"
            raise InvalidRequest("num_inference_steps", resolved.num_inference_steps, hint)
        if self.eta and resolved.scheduler is None and model.scheduler_class not in _TAKE_ETA:
            hint = f"the model's own {model.scheduler_class} takes no eta; scheduler='ddim' does"
            raise InvalidRequest("eta", self.eta, hint)
        if resolved.scheduler is not None and model.prediction_type == "sample":
            entry = schedulers.parse(resolved.scheduler).entry
            if not entry.sample:
                able = ", ".join(name for name, other in schedulers.NAMES.items() if other.sample)
                hint = f"cannot run a model that predicts the sample; these can: {able}"
                raise InvalidRequest("scheduler", resolved.scheduler, hint)
        if not isinstance(self, ResolvedRequest):  # told already
            for name, why in resolved.without_effect(model).items():
                warnings.warn(f"{name} has no effect with {why}", stacklevel=2)
        return resolved

    @property
    def mode(self) -> Literal["txt2img", "img2img", "inpaint"]:
        """What kind of drawing this is."""
        if self.image is None:
            return "txt2img"
        return "img2img" if self.mask_image is None else "inpaint"

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if value is None and getattr(Request, name) is None:  # left to the model
            return
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise InvalidRequest(name, value, f"a whole number from {low} to {high}")
        if not low <= value <= high:
            random = "; leave it out for a random one" if name == "seed" else ""
            raise InvalidRequest(name, value, f"must lie between {low} and {high}{random}")
        self._set(name, value.__index__())

    def _number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if value is None and getattr(Request, name) is None:  # left to the model
            return
        if isinstance(value, bool | str) or not hasattr(value, "__float__"):
            raise InvalidRequest(name, value, f"a number from {low} to {high}")
        if not low <= float(value) <= high:  # also catches NaN
            off = "; 1 turns guidance off" if name == "guidance_scale" else ""
            raise InvalidRequest(name, value, f"must lie between {low} and {high}{off}")
        self._set(name, float(value))


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest(Request):
    """A request with every open question answered; made by `Request.resolve`.

    A `scheduler` of None still means the model's own, which need not be in our table.
    """

    prompt: tuple[str, ...]
    negative_prompt: tuple[str, ...] | None = None
    num_inference_steps: int
    guidance_scale: float
    seed: int
    height: int
    width: int
    loras: tuple[LoraUse, ...] = ()
    picture_seeds: tuple[int, ...] | None = None  # of requests drawn together

    @property
    def steps_run(self) -> int:
        """How many steps of the schedule a resolved request runs."""
        strength = 1.0 if self.strength is None else self.strength
        return int(self.num_inference_steps * strength)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The part of `image` that is drawn: left, upper, right, lower, in pixels."""
        if self.padding_mask_crop is None:
            return (0, 0, *self.image.size)
        return region(self.mask_image, (self.width, self.height), self.padding_mask_crop)

    def without_effect(self, model: Model) -> dict[str, str]:
        """Fields that were given and change nothing, and with what."""
        found = {}
        if model.embeds_guidance or self.guidance_scale == 1:
            why = "this model" if model.embeds_guidance else "guidance_scale 1"
            found = {n: why for n in ("negative_prompt", "guidance_rescale") if getattr(self, n)}
        scale = self.controlnet_conditioning_scale
        start, end = self.control_guidance_start, self.control_guidance_end
        steps = self.steps_run
        if self.controlnet is not None and not any(controlnet.scales(scale, start, end, steps)):
            why = f"no whole one of its {steps} steps from {start:g} to {end:g}"
            found["controlnet"] = why if scale else "controlnet_conditioning_scale 0"
        return found

    @property
    def seeds(self) -> list[int]:
        """The seed of each picture; all pictures of one prompt together."""
        if self.picture_seeds is not None:
            return list(self.picture_seeds)
        return [self.seed + i for i in range(len(self.prompt) * self.num_images)]


# Requests may differ in these and still be drawn together.
_MAY_DIFFER = {"prompt", "negative_prompt", "seed", "num_images", "picture_seeds"}


def can_join(one: ResolvedRequest, other: ResolvedRequest) -> bool:
    """Whether two requests can be drawn in one batch: both from text, alike but for what they say
    and their seeds."""
    if one.mode != "txt2img" or other.mode != "txt2img":
        return False
    alike = (item.name for item in fields(one) if item.name not in _MAY_DIFFER)
    return all(getattr(one, name) == getattr(other, name) for name in alike)


def together(requests: Sequence[ResolvedRequest]) -> ResolvedRequest:
    """One request for the pictures of several, in their order; each picture keeps its own seed, so
    it is the one that its own request gives. Split the result with `LatentDiffusion.split`."""
    first = requests[0]
    assert all(can_join(first, other) for other in requests[1:])
    prompts: list[str] = []
    negatives: list[str] = []
    for request in requests:
        own = request.negative_prompt or ("",) * len(request.prompt)
        for prompt, negative in zip(request.prompt, own, strict=True):
            prompts += [prompt] * request.num_images
            negatives += [negative] * request.num_images
    return replace(
        first,
        prompt=tuple(prompts),
        negative_prompt=tuple(negatives) if any(negatives) else None,
        num_images=1,
        picture_seeds=tuple(seed for request in requests for seed in request.seeds),
    )


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or isinstance(texts, bytes):
        raise InvalidRequest(name, value, "a text or a list of texts")
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(name, value, "a text or a list of texts")
    for text in texts:
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InvalidRequest(name, text, "plain Unicode text; this has NUL or lone surrogates")
    return tuple(texts)


def _check_side(name: str, value: int, factor: int) -> None:
    if value > MAX_SIDE:
        raise InvalidRequest(name, value, f"at most {MAX_SIDE} pixels")
    if value % factor or value < factor:
        below = max(factor, value // factor * factor)
        hint = f"must be a multiple of {factor}: {below} or {below + factor} would work"
        raise InvalidRequest(name, value, hint)
