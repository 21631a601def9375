"""The objectives as pure functions: nothing here knows a model, a device or a data set.

Papers: [1] Ho et al. 2020, DDPM. [2] Salimans & Ho 2022, progressive distillation (v-prediction).
[3] Hang et al. 2023, min-SNR weighting. [4] van den Oord et al. 2018, CPC (InfoNCE).
[5] Xu et al. 2022, GeoDiff.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def noisy_latents(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, [1] (4). `alphas_cumprod`: (B,), one a_t a row."""
    signal, scale = _broadcast(alphas_cumprod, latents)
    return signal * latents + scale * noise


def prediction_target(
    latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> Tensor:
    """What the U-Net predicts: the noise [1], the picture itself (`sample`), or
    v = sqrt(a_t) noise - sqrt(1 - a_t) x_0 [2]."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    if prediction_type == "v_prediction":
        signal, scale = _broadcast(alphas_cumprod, latents)
        return signal * noise - scale * latents
    raise ValueError(
        f"prediction_type: {prediction_type!r} is unknown; "
        "use 'epsilon', 'v_prediction' or 'sample'"
    )


def min_snr_weight(alphas_cumprod: Tensor, prediction_type: str, snr_gamma: float) -> Tensor:
    """The weight of each row's squared error, (B,): min(snr, gamma) on x_0, [3] (6).

    The squared error of the noise is snr times that of x_0 and the one of v is snr + 1 times it, so
    the weights on these are min(snr, gamma) / snr and min(snr, gamma) / (snr + 1).
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    per_error = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[
        prediction_type
    ]
    return snr.clamp(max=snr_gamma) / per_error


def diffusion_loss(
    prediction: Tensor,
    target: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: str,
    snr_gamma: float | None,
    loss: str = "l2",
    mask: Tensor | None = None,
) -> Tensor:
    """Mean error of each row, weighted by row when `snr_gamma` is given; a scalar, in fp32.

    `loss`: `l2`, `l1`, or `huber` (l2 up to an error of 0.1, l1 beyond). `mask`: (B, 1, H, W) in
    [0, 1], how much each place counts in the mean of its row.
    """
    error = LOSSES[loss](prediction.float() - target.float())  # (B, C, H, W)
    weight = torch.ones_like(error) if mask is None else mask.float().expand_as(error)
    rows = (error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)  # (B,)
    if snr_gamma is not None:
        rows = rows * min_snr_weight(alphas_cumprod, prediction_type, snr_gamma)
    return rows.mean()


HUBER_DELTA = 0.1
LOSSES = {
    "l2": torch.square,
    "l1": torch.abs,
    "huber": lambda error: F.huber_loss(
        error, torch.zeros_like(error), reduction="none", delta=HUBER_DELTA
    ),
}


def sigmoid_betas(steps: int, beta_start: float, beta_end: float) -> Tensor:
    """A noise schedule that grows slowly at both ends, (steps,), [5]. diffusers has the others."""
    return torch.linspace(-6, 6, steps).sigmoid() * (beta_end - beta_start) + beta_start


def reconstruction_loss(decoded: Tensor, pixels: Tensor, chroma_weight: float) -> Tensor:
    """L1 + L2 + edges + colour, for pictures in [-1, 1], (B, 3, H, W).

    Edges: L1 between neighbouring pixels' differences, so that shapes are sharp. Colour: what is
    left after averaging 8 x 8 pixels, which no sharp edge can hide; L1 on the three channels, and
    L2 on the two opponent ones (red - green, blue - yellow), because a rare colour (green, purple)
    that becomes grey costs an L1 loss little and a person much.
    """
    difference = decoded - pixels
    across = (difference[..., :, 1:] - difference[..., :, :-1]).abs().mean()
    down = (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
    coarse = F.avg_pool2d(difference, 8)  # (B, 3, H/8, W/8)
    red, green, blue = coarse.unbind(1)
    chroma = (red - green).square().mean() + (blue - (red + green) / 2).square().mean()
    sharp = difference.abs().mean() + difference.square().mean() + across + down
    return sharp + 2 * coarse.abs().mean() + chroma_weight * chroma


def peak_signal_to_noise(decoded: Tensor, pixels: Tensor) -> Tensor:
    """10 log10(peak^2 / mean squared error) of each picture in dB, (B,), for values in [-1, 1]."""
    return 10 * (4 / (decoded - pixels).square().flatten(1).mean(1)).log10()


def moment_kl(latents: Tensor) -> Tensor:
    """KL of N(mean, variance) of each latent channel over the batch to N(0, 1), a scalar.

    Weaker than a VAE's KL on each picture: it keeps the latents near zero mean and unit variance as
    a set, which is what the diffusion and the tiny autoencoder's clamp at +-3 need.
    """
    variance, mean = torch.var_mean(latents, dim=(0, 2, 3))  # (C,)
    return 0.5 * (mean.square() + variance - 1 - variance.log()).mean()


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cosine distance to the teacher's vectors plus InfoNCE [4] within the batch; both (B, D)."""
    similarity = cosines(student, teacher)  # (B, B)
    labels = torch.arange(len(student), device=student.device)
    return (1 - similarity.diagonal()).mean() + F.cross_entropy(similarity / temperature, labels)


def contrastive_loss(images: Tensor, texts: Tensor, logit_scale: Tensor | float) -> Tensor:
    """CLIP's: InfoNCE [4] of pictures among texts and of texts among pictures; both (B, D)."""
    logits = logit_scale * cosines(images, texts)  # (B, B)
    labels = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """Between all (N, D) and all (M, D): (N, M), in fp32 also where autocast would take less."""
    with torch.autocast(rows.device.type, enabled=False):
        return F.normalize(rows.float(), dim=-1) @ F.normalize(columns.float(), dim=-1).T


def learning_rate_at(
    step: int, peak: float, warmup_steps: int, total_steps: int, schedule: str = "cosine"
) -> float:
    """Linear warm-up, then constant, or down to zero at `total_steps`: half a cosine or a line."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    shapes = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }
    return peak * shapes[schedule]


def _broadcast(alphas_cumprod: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a_t) and sqrt(1 - a_t), shaped (B, 1, 1, 1) like the latents they multiply."""
    column = alphas_cumprod.reshape(-1, *[1] * (latents.dim() - 1)).to(latents.dtype)
    return column.sqrt(), (1 - column).sqrt()
