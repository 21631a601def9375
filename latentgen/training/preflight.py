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
    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda t: t):
        model(*inputs).sum().backward()
    own = {id(p.untyped_storage()) for p in model.parameters()}
    activations = sum(numbers for storage, numbers in kept.items() if storage not in own)
    memory = (weights - trained + activations) * dtype.itemsize + trained * 4 * (2 + ADAM + 1)
    return Forecast(weights, trained, counter.get_total_flops(), memory)


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
