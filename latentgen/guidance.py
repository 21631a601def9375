"""Classifier-free guidance as pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_guidance", "guidance_embedding", "rescale_guidance"]


def apply_guidance(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """Push the prediction away from the negative prompt: `uncond + s * (cond - uncond)`.

    Classifier-free guidance, arXiv 2207.12598, in the parametrisation where s = 1 is no guidance.
    All tensors: (B, C, H/8, W/8).
    """
    return uncond + guidance_scale * (cond - uncond)


def rescale_guidance(guided: Tensor, cond: Tensor, guidance_rescale: float) -> Tensor:
    """Bring the spread of a guided prediction back towards that of `cond`.

    arXiv 2305.08891, section 3.4, equations 15 and 16; `guidance_rescale` is its phi, in [0, 1].
    """
    dims = list(range(1, cond.ndim))
    factor = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return guidance_rescale * (guided * factor) + (1 - guidance_rescale) * guided


def guidance_embedding(guidance_scale: float, batch_size: int, dim: int) -> Tensor:
    """Sinusoidal embedding of the guidance scale, (B, dim), float32, on the CPU.

    For U-Nets that were distilled to take the scale as an input (`time_cond_proj_dim`, latent
    consistency models, arXiv 2310.04378); these are never guided by a second, negative batch.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = torch.full((batch_size, 1), (guidance_scale - 1) * 1000.0) * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))
