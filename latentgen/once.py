"""What is the same in every step of a drawing, done once.

The keys and values of the attention to the prompt, the prompt's share of the time embedding, and
what a ControlNet sees in its picture depend on nothing that changes from step to step. The modules
are the same and so is what they are given, so what they answer is the same too, bit for bit.

On a processor, the weights of a convolution are rearranged for its kernels in every call; here
they stay so for the drawing. These kernels add up in another order, so pictures move in the last
bits, as they do between a batch of one and of two.

In a small model each of the two, the first with what `_tell_signature` saves, is a tenth of the
time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.embeddings import TextTimeEmbedding
from torch import Tensor, nn

__all__ = ["once"]

# The weights of larger models are not rearranged ahead: it would take their memory twice, and save
# little, since their layers take so much longer than the rearranging.
MOST_PARAMETERS = 2**26

# In a drawing: of a module, what it was given last and what it made of it; of a module and a shape,
# its weight arranged for that. The running thread's own, so that drawings at once do not meet, and
# training never does.
_made: ContextVar[dict[object, Any] | None] = ContextVar("made", default=None)


def _answer(module: nn.Module, x: Tensor) -> Tensor:
    """The module's `forward`; given the same tensor again, it answers as before."""
    made = None if torch.compiler.is_compiling() else _made.get()
    if made is None:
        return type(module).forward(module, x)
    known = made.get(module)
    if known is None or known[0] is not x:
        known = made[module] = (x, type(module).forward(module, x))
    return known[1]


def _packed(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The module's `forward`, on weights that lie as the processor's kernels want them."""
    made = None if torch.compiler.is_compiling() else _made.get()
    if made is None or x.device.type != "cpu" or {x.dtype, module.weight.dtype} != {torch.float32}:
        return type(module).forward(module, x)
    key = module, x.shape
    if key not in made:
        made[key] = _pack(module, x.shape)
    return _convolve(module, x, made[key])


# What torch.compile itself calls; torch has no other way to it.
def _pack(module: nn.Conv2d, shape: torch.Size) -> Tensor:
    """The module's weight, rearranged for what is of that shape."""
    rearrange: Callable = torch._C._nn.mkldnn_reorder_conv2d_weight
    return rearrange(module.weight.to_mkldnn(), *_geometry(module), shape)


def _convolve(module: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """The module's `forward`, with its weight as `_pack` arranged it."""
    run: Callable = torch.ops.mkldnn._convolution_pointwise
    return run(x, weight, module.bias, *_geometry(module), "none", [], "")  # nothing after it


def _geometry(module: nn.Conv2d) -> tuple:
    return module.padding, module.stride, module.dilation, module.groups


@cache
@torch.inference_mode()
def _can_pack() -> bool:
    """Whether this torch has these operations, and they do what they did when this was written."""
    module = nn.utils.skip_init(nn.Conv2d, 2, 3, 3, stride=2, padding=1)  # takes no random numbers
    for parameter in module.parameters():
        parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    x = torch.linspace(1, -1, 140).view(2, 2, 7, 5)
    try:
        found = _convolve(module, x, _pack(module, x.shape))
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(found, module(x), atol=1e-5)


def once(model: nn.Module) -> Callable:
    """A U-Net or ControlNet as a function for all steps of one drawing, which hand it the same
    embeddings."""
    pack = _can_pack() and sum(p.numel() for p in model.parameters()) <= MOST_PARAMETERS
    for module in model.modules():
        if isinstance(module, Attention):
            _tell_signature(type(module.processor).__call__)
        for part in _readers(module):
            _replace(part, _answer)
        if pack and type(module) is nn.Conv2d and _pads_plainly(module):
            _replace(module, _packed)
    made: dict[object, Any] = {}

    def call(*args, **kwargs):
        token = _made.set(made)
        try:
            return model(*args, **kwargs)
        finally:
            _made.reset(token)

    return call


def _replace(module: nn.Module, forward: Callable) -> None:
    """It stays, and does nothing outside of `call`."""
    if "forward" not in vars(module):  # ours already, or somebody else's, who moves weights about
        module.forward = partial(forward, module)


def _pads_plainly(module: nn.Conv2d) -> bool:
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


@cache
def _tell_signature(function: Callable) -> None:
    """Attach a function's signature to it (PEP 362): diffusers asks for that of the processor in
    every call of an attention, and has it worked out anew each time."""
    if inspect.isfunction(function):
        function.__dict__["__signature__"] = inspect.signature(function)


def _readers(module: nn.Module) -> list[nn.Module]:
    """What of a module sees the embeddings, or the picture, and nothing else."""
    if isinstance(module, TextTimeEmbedding | ControlNetConditioningEmbedding):
        return [module]
    if isinstance(module, Attention) and module.is_cross_attention:
        return [part for part in (module.to_k, module.to_v) if isinstance(part, nn.Linear)]
    return []
