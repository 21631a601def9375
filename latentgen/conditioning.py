"""Inpainting and ControlNet as data for the loop: extra input channels, a blend after each step,
or a U-Net that hears a second network.

Both ways of inpainting take the mask at the size of the latents, 1 = repaint. Which one is used
follows from the U-Net: nine input channels were trained to see the mask, four were not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MaskBlend", "controlled", "inpainting_channels", "latent_mask"]


@dataclass(frozen=True)
class MaskBlend:
    """Keep what the mask leaves out on the track of the original picture.

    After the step to `timesteps[i + 1]` the outside is replaced by the original, noised to that
    same time with the noise the drawing started from (RePaint, arXiv 2201.09865, equation 8); after
    the last step by the original itself.

    Attributes:
        original: (B, C, H/8, W/8), clean latents of the picture.
        noise: (B, C, H/8, W/8), the starting noise, unit variance.
        mask: (1, 1, H/8, W/8), 1 = repaint.
    """

    original: Tensor
    noise: Tensor
    mask: Tensor

    def __call__(self, scheduler, latents: Tensor, next_timestep: Tensor) -> Tensor:
        """`next_timestep`: (1,), or (0,) after the last step. Returns (B, C, H/8, W/8)."""
        outside = self.original
        if len(next_timestep):
            outside = scheduler.add_noise(outside, self.noise, next_timestep)
        return (1 - self.mask) * outside + self.mask * latents


def latent_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Bring a (1, 1, H, W) mask to (1, 1, height, width) by nearest neighbour.

    A mask so thin that nearest neighbour misses it altogether takes every cell that it touches.
    """
    small = torch.nn.functional.interpolate(mask, size=(height, width))
    if not small.any():
        small = torch.nn.functional.adaptive_max_pool2d(mask, (height, width))
    return small


def inpainting_channels(mask: Tensor, masked_image_latents: Tensor) -> Tensor:
    """Mask and masked picture as the last 1 + C input channels of a nine-channel U-Net.

    (1, 1, h, w) and (B, C, h, w) -> (B, 1 + C, h, w); never scaled by the scheduler.
    """
    return torch.cat([mask.expand(len(masked_image_latents), -1, -1, -1), masked_image_latents], 1)


def controlled(unet: Callable, controlnet: Callable, channels: int) -> Callable:
    """The U-Net with what a ControlNet adds to its skip connections (arXiv 2302.05543).

    The function takes `controlnet_cond`, the picture (B, 3, H, W) in [0, 1], and
    `conditioning_scale`, the strength; at 0 the ControlNet is not called.

    Args:
        channels: of the latents, which come first among the input's channels.
    """

    def call(
        sample: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float,
        **kwargs,
    ):
        if conditioning_scale != 0:
            down, middle = controlnet(
                sample[:, :channels],
                t,
                encoder_hidden_states=encoder_hidden_states,
                controlnet_cond=controlnet_cond,
                conditioning_scale=conditioning_scale,
                added_cond_kwargs=kwargs.get("added_cond_kwargs"),
                return_dict=False,
            )
            kwargs["down_block_additional_residuals"] = down
            kwargs["mid_block_additional_residual"] = middle
        return unet(sample, t, encoder_hidden_states=encoder_hidden_states, **kwargs)

    return call
