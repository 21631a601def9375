"""The denoising loop: the one place where pictures come from noise.

Text-to-image, image-to-image and inpainting are this loop with other data: other starting latents,
another slice of timesteps, extra input channels, a blend after the step. The loop does not know
what a prompt or a picture is, nor how far the caller wants to go: it is a generator, so progress,
previews and cancelling are ordinary iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .conditioning import MaskBlend
from .guidance import apply_guidance, rescale_guidance

__all__ = ["Denoised", "denoise"]


@dataclass(frozen=True)
class Denoised:
    """The state after one step of the loop.

    Attributes:
        index: which step this was, from 0.
        total: how many the loop will run.
        latents: (B, C, H/8, W/8), the sample after the step.
        estimate: () -> (B, C, H/8, W/8), the clean latents as the model saw them in this step;
            computed only when called.
    """

    index: int
    total: int
    latents: Tensor
    estimate: Callable[[], Tensor]


@torch.inference_mode()
def denoise(
    unet: Callable[..., tuple[Tensor, ...]],
    scheduler,
    timesteps: Tensor,  # (T,), descending; a slice of scheduler.timesteps
    latents: Tensor,  # (B, C, H/8, W/8), noised to timesteps[0]
    embeddings: Tensor,  # (B or 2B, tokens, dim); [negative, positive] when guided
    *,
    guidance_scale: float | None = None,  # None: one row a picture, no guidance
    guidance_rescale: float = 0.0,
    extra_channels: Tensor | None = None,  # (B, 1 + C, H/8, W/8): mask and masked-image latents
    blend: MaskBlend | None = None,
    control_scales: Sequence[float] | None = None,  # of each step, for a U-Net that takes them
    unet_kwargs: dict | None = None,
    step_kwargs: dict | None = None,
) -> Iterator[Denoised]:
    """Run the reverse process over `timesteps` and yield after every step.

    One `yield` for each call of the U-Net: a second-order scheduler (Heun, DPM2) makes two for a
    step of its schedule. Random numbers come only from `step_kwargs["generator"]`.
    """
    guided = guidance_scale is not None
    if extra_channels is not None and guided:
        extra_channels = torch.cat([extra_channels] * 2)

    for i, t in enumerate(timesteps):
        rows = torch.cat([latents] * 2) if guided else latents  # (2B, C, H/8, W/8)
        rows = scheduler.scale_model_input(rows, t)
        model_input = rows if extra_channels is None else torch.cat([rows, extra_channels], dim=1)

        options = {"return_dict": False, **(unet_kwargs or {})}
        if control_scales is not None:
            options["conditioning_scale"] = control_scales[i]
        prediction = unet(model_input, t, encoder_hidden_states=embeddings, **options)[0]
        if guidance_scale is not None:
            uncond, cond = prediction.chunk(2)
            prediction = apply_guidance(uncond, cond, guidance_scale)
            if guidance_rescale > 0:
                prediction = rescale_guidance(prediction, cond, guidance_rescale)

        scaled = rows.chunk(2)[0] if guided else rows  # what the U-Net saw of each picture
        options = {"return_dict": False, **(step_kwargs or {})}
        latents = scheduler.step(prediction, t, latents, **options)[0]
        if blend is not None:
            latents = blend(scheduler, latents, timesteps[i + 1 : i + 2])

        yield Denoised(i, len(timesteps), latents, _estimate(scheduler, prediction, scaled, t))


def _estimate(scheduler, prediction: Tensor, scaled: Tensor, t: Tensor) -> Callable[[], Tensor]:
    """The clean latents x0 implied by one prediction (arXiv 2202.00512, section 4).

    `scaled` is the variance-preserving sample, x_t = sqrt(a) x0 + sqrt(1 - a) noise, with a the
    cumulative alpha at t (interpolated: Karras timesteps are fractions).
    """

    @torch.inference_mode()
    def estimate() -> Tensor:
        alphas = scheduler.alphas_cumprod
        time = t.to(device=alphas.device, dtype=torch.float32).clamp(0, len(alphas) - 1)
        a = torch.lerp(alphas[time.floor().long()], alphas[time.ceil().long()], time.frac())
        a = a.to(scaled.device, torch.float32).clamp(min=1e-6)
        x, out = scaled.float(), prediction.float()
        match scheduler.config.prediction_type:
            case "epsilon":
                clean = (x - (1 - a).sqrt() * out) / a.sqrt()
            case "v_prediction":
                clean = a.sqrt() * x - (1 - a).sqrt() * out
            case _:
                clean = out
        return clean.to(scaled.dtype)

    return estimate


def accepted(function: Callable, **arguments) -> dict:
    """Those of `arguments` that `function` takes: schedulers differ in what `step` wants."""
    import inspect

    names = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in names}
