"""Between pixels and latents, and where every picture's own noise comes from.

Each picture of a call has its own generator on the CPU, seeded with `seed + i`. It alone decides
that picture's random numbers, so a picture does not depend on the batch it was drawn in, and a
seed means the same on every device.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from diffusers import AutoencoderTiny
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .errors import DecodeError

__all__ = [
    "decode",
    "decode_unchecked",
    "draw_noise",
    "encode",
    "has_posterior",
    "make_generators",
]


def make_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each picture."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def draw_noise(
    generators: list[torch.Generator], shape: tuple[int, ...], like: Tensor
) -> Tensor:  # (B, *shape)
    """Unit noise for each picture from its own generator, drawn in float32, then cast."""
    noise = randn_tensor((len(generators), *shape), generator=generators, dtype=torch.float32)
    return noise.to(device=like.device, dtype=like.dtype)


def has_posterior(vae) -> bool:
    """Does encoding give a distribution to sample from (AutoencoderKL) or just latents?"""
    return not isinstance(vae, AutoencoderTiny)


@torch.inference_mode()
def encode(
    vae, image: Tensor, generators: list[torch.Generator], device: torch.device | None = None
) -> Tensor:
    """Pixels (1, 3, H, W) in [-1, 1] -> latents (B, C, H/8, W/8), one row for each generator.

    A KL autoencoder is sampled (its posterior is a distribution), each row from its own generator;
    an autoencoder without a posterior gives the same row for all.

    Args:
        device: where it runs; None: where its weights are, if they are not offloaded.
    """
    image = image.to(device=device if device is not None else vae.device, dtype=vae.dtype)
    encoded = vae.encode(image)
    if has_posterior(vae):
        rows = [encoded.latent_dist.sample(generator) for generator in generators]
    else:
        rows = [encoded.latents] * len(generators)
    return vae.config.scaling_factor * torch.cat(rows)


@torch.inference_mode()
def decode(vae, latents: Tensor) -> Tensor:
    """Latents (B, C, H/8, W/8) -> pixels (B, 3, H, W), float32 in [0, 1].

    Half precision overflows in some autoencoders and gives a black picture. That is noticed: the
    decoding is repeated once in float32.

    Raises:
        DecodeError: a picture is still black or has values that are not finite.
    """
    pixels = decode_unchecked(vae, latents)
    if _drew_nothing(pixels) and vae.dtype != torch.float32:
        pixels = decode_unchecked(
            copy.deepcopy(vae).float(), latents.float()
        )  # other threads keep theirs
    if _drew_nothing(pixels):
        cause = "decode to black" if latents.isfinite().all() else "are not finite"
        raise DecodeError(
            f"the latents {cause}, also in float32: the model cannot draw this request; "
            "try another scheduler, more steps, a lower guidance_scale or dtype float32"
        )
    return pixels


@torch.inference_mode()
def decode_unchecked(vae, latents: Tensor) -> Tensor:
    """`decode` as it comes; values that are not finite become NaN."""
    latents = latents.to(vae.dtype)
    pixels = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    pixels = pixels.masked_fill(~pixels.isfinite(), torch.nan)  # clamp would hide infinities
    return (pixels * 0.5 + 0.5).clamp(0, 1).float()


def _drew_nothing(pixels: Tensor) -> bool:
    """Is any picture of the batch not finite, or black in 8 bits?"""
    brightest = pixels.amax(dim=(1, 2, 3))  # NaN wins in amax
    return bool((~(brightest * 255 >= 0.5)).any())
