"""What a fine-tuning will do, told before any weights are read.

The model is built without memory ("meta" tensors) from its configuration, so that its numbers can
be counted, one step of it run on nothing, and the arithmetic and the memory of that step added up.
"""

import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

EFFICIENCY = 0.35  # of a step, against matrix products of the same machine; see `Forecast.seconds`
ADAM = 2  # numbers that AdamW keeps of each weight


@dataclass(frozen=True)
class Forecast:
    """`weights`: numbers in the model, of which `trained` are. `flops`: of one micro-batch,
    forward and backward. `memory`: bytes at its peak."""

    weights: int
    trained: int
    flops: float
    memory: float

    def seconds(self, micro_batches: int, device: torch.device, dtype: torch.dtype) -> float:
        """How long so many micro-batches take, from how fast the device multiplies matrices now.
        A guess: within a factor of two where it was tried; the progress bar knows better."""
        return micro_batches * self.flops / (EFFICIENCY * products_per_second(device, dtype))


def forecast(model: nn.Module, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> Forecast:
    """Count one step of a model on the meta device. `dtype`: of the weights that are not trained
    and of what is computed; the trained ones are float32."""
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
    memory = (weights - trained + activations) * dtype.itemsize + trained * 4 * (2 + ADAM + 1)
    # backward: once for what flows through, once for the share of weights that learn; and once
    # more forward where activations are not kept
    again = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    passes = 2 + trained / weights + again
    return Forecast(weights, trained, passes * counter.get_total_flops(), memory)


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


def products_per_second(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Floating-point operations a second in products of square matrices."""
    matrix = torch.ones((size, size), device=device, dtype=dtype)
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2 or products < 3:
        (matrix @ matrix)[0, 0].item()
        products += 1
    return products * 2 * size**3 / (time.perf_counter() - started)


def bucket_table(sizes: list[tuple[int, int]], repeats: list[int]) -> str:
    """One line a bucket: its size, its pictures, and how many of them an epoch shows."""
    pictures, shown = Counter(sizes), Counter[tuple[int, int]]()
    for size, count in zip(sizes, repeats, strict=True):
        shown[size] += count
    lines = [f"{'bucket':>11}  pictures  an epoch"]
    for (height, width), count in sorted(pictures.items()):
        lines.append(f"{width:>5} x {height:<4}{count:>9}{shown[height, width]:>10}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """`90 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
