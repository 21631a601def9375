"""What a fine-tuning will do, told before any weights are read.

The model is built without memory ("meta" tensors) from its configuration, so that its numbers can
be counted, one step of it run on nothing, and the arithmetic and the memory of that step added up.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from latentgen.training.config import RunConfig

EFFICIENCY = 0.35  # of a step, against matrix products of the same machine


@dataclass(frozen=True)
class Forecast:
    """`weights`: numbers in the model, of which `trained` are. `forward_flops`: of one micro-batch;
    `flops`: with the way back. `memory`: bytes at its peak."""

    weights: int
    trained: int
    forward_flops: float
    flops: float
    memory: float


def forecast(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype, bytes_each: int
) -> Forecast:
    """Count one step of a model on the meta device. `dtype`: of the weights that are not trained
    and of what is computed; `bytes_each`: of a weight that is trained."""
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept: dict[int, float] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[id(tensor.untyped_storage())] = tensor.numel()
        alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    counter = FlopCounterMode(display=False)
    with counter, FusedAttention(), saved_tensors_hooks(keep, lambda t: t):
        model(*inputs)
    own = {id(p.untyped_storage()) for p in model.parameters()}
    activations = sum(numbers for storage, numbers in kept.items() if storage not in own)
    memory = (weights - trained + activations) * dtype.itemsize + trained * bytes_each
    # backward: once for what flows through, once for the share of weights that learn; and once
    # more forward where activations are not kept
    again = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    passes = 2 + trained / weights + again
    forward = counter.get_total_flops()
    return Forecast(weights, trained, forward, passes * forward, memory)


def encoding_flops(encode: Callable[[torch.Tensor], Any], side: int) -> float:
    """Of one square picture, by an autoencoder on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encode(torch.zeros(1, 3, side, side, device="meta"))
    return counter.get_total_flops()


def bytes_each(config: RunConfig) -> int:
    """What a weight that learns takes, in float32: itself and its gradient, AdamW's two moments,
    and where there is an average, that and a copy of the weight while the average is measured."""
    moments = 2 * (1 if config.use_8bit_adam else 4)
    return 4 + 4 + moments + (4 + 4 if config.ema_decay > 0 else 0)


def memory_in_use() -> int:
    """The bytes that this process takes already, most of them for the libraries."""
    return psutil.Process().memory_info().rss


class FusedAttention(TorchFunctionMode):
    """Attention that keeps what a fused kernel keeps: on meta tensors, torch's own falls back to
    the form that stores a number for each pair of places."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return function(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(context, query, key, value):
        result = torch.empty_like(query)
        context.save_for_backward(query, key, value, result)
        return result


def expected_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a training, from how fast the device multiplies
    matrices now. A guess: within a factor of two where it was tried; the progress bar knows better.
    """
    return EFFICIENCY * products_per_second(device, dtype)


def products_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in products of square matrices."""
    size, together = (1024, 1) if device.type == "cpu" else (4096, 10)  # to fill a GPU
    matrix = torch.ones((size, size), device=device, dtype=dtype)
    (matrix @ matrix)[0, 0].item()  # the first one waits for libraries to load
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2 or products < 3:
        for _ in range(together):
            product = matrix @ matrix
        product[0, 0].item()  # waits for all of them
        products += together
    return products * 2 * size**3 / (time.perf_counter() - started)


def bucket_table(title: str, sizes: list[tuple[int, int]], repeats: list[int]) -> str:
    """One line a bucket: its size, its pictures, and how many of them an epoch shows."""
    pictures, shown = Counter(sizes), Counter[tuple[int, int]]()
    for size, count in zip(sizes, repeats, strict=True):
        shown[size] += count
    lines = [f"{title:>11}  pictures  an epoch"]
    for (height, width), count in sorted(pictures.items()):
        lines.append(f"{width:>5} x {height:<4}{count:>9}{shown[height, width]:>10}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """`90 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
