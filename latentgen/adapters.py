"""LoRAs at work: what they add to the outputs of a model's modules, and only where they should.

The weights of a model are never touched. Each module that a LoRA changes gets a hook, which adds
nothing unless the call comes from `applied(...)`. What is applied is known to the running thread
alone (a context variable), so drawings with different LoRAs may run at once, and taking a LoRA away
leaves the model as it was, bit for bit.

This module knows neither files nor prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InvalidRequest
from .lora import Layer, Lora
from .lorafolder import PARTS

__all__ = ["Adapter", "Changes", "adapted", "applied", "fit", "weighted"]


class Change:
    """What one layer of a LoRA adds to the output of one module."""

    def __init__(self, layer: Layer, module: nn.Linear | nn.Conv2d, device: torch.device) -> None:
        dtype = module.weight.dtype
        down, up = _shapes(layer, module)
        self.down = layer.down.reshape(down).to(device, dtype)
        self.up = layer.up.reshape(up).to(device, dtype)
        self.strength = layer.strength
        self.of_columns = layer.magnitude is not None and layer.magnitude.ndim == 2
        self.gain = None if layer.magnitude is None else _gain(layer, module).to(device)

    def __call__(self, module, x: Tensor, output: Tensor, weight: float) -> Tensor:
        """`x` and `output`: what the module was given, and what it made of it."""
        if self.gain is None:
            return self._low_rank(module, x, weight * self.strength)
        # DoRA: the weight becomes gain * (W + strength * up @ down); W is in the output already.
        gain, more = self.gain.to(x), (self.gain - 1).to(x)
        if self.of_columns:
            stretched = _run(module, more * x, module.weight)
            return weight * (stretched + self._low_rank(module, gain * x, self.strength))
        if module.bias is not None:
            output = output - _beside_channels(module.bias, module)
        return weight * (more * output + gain * self._low_rank(module, x, self.strength))

    def _low_rank(self, module, x: Tensor, factor: float) -> Tensor:
        down, up = self.down.to(x), self.up.to(x)
        hidden = _run(module, x, down)
        return (F.linear(hidden, up) if up.ndim == 2 else F.conv2d(hidden, up)) * factor


# What is added to a module's output, with weights; in the order of the LoRAs.
Changes = Mapping[nn.Module, list[tuple[Change, float]]]

_hooking = Lock()
_applied: ContextVar[Changes] = ContextVar("applied", default={})  # noqa: B039 (never written to)


@dataclass(frozen=True)
class Adapter:
    """A LoRA, fitted to the modules of a U-Net and of the text encoders; it changes nothing by
    itself."""

    unet: dict[nn.Module, Change]
    text_encoder: dict[nn.Module, Change]


def fit(
    lora: Lora, models: Mapping[str, nn.Module], device: torch.device, source: object
) -> Adapter:
    """Fit a LoRA to a model.

    Args:
        models: the parts of the model, by their names (`PARTS`).
        device: where the model runs.
        source: what to call the LoRA in an error.

    Raises:
        InvalidRequest: it is for another architecture; lists what does not fit.
    """
    misfits: list[str] = []
    fitted: dict[str, dict[nn.Module, Change]] = {}
    for part in PARTS:
        layers = getattr(lora, part)
        fitted[part] = {}
        if part in models:
            fitted[part] = _fit_part(layers, models[part], device, misfits)
        else:
            misfits += [f"{part}.{path}: the model has no {part}" for path in layers]
    if misfits:
        listed = "; ".join(misfits[:10]) + ("; ..." if len(misfits) > 10 else "")
        count = len(lora.layers)
        hint = f"made for another model: {len(misfits)} of {count} layers do not fit: {listed}"
        raise InvalidRequest("loras", str(source), hint)
    return Adapter(fitted["unet"], fitted["text_encoder"] | fitted["text_encoder_2"])


def weighted(parts: Iterable[tuple[dict[nn.Module, Change], float]]) -> Changes:
    """The changes of several LoRAs together; a weight of 0 leaves a LoRA out."""
    changes: dict[nn.Module, list[tuple[Change, float]]] = {}
    for part, weight in parts:
        for module, change in part.items() if weight != 0 else ():
            changes.setdefault(module, []).append((change, weight))
    return changes


@contextmanager
def applied(changes: Changes) -> Iterator[None]:
    """Apply changes to the models that this thread calls inside the `with`."""
    with _hooking:  # or two threads would both hook a module, and add everything twice
        for module in changes:
            if _add_changes not in module._forward_hooks.values():
                module.register_forward_hook(_add_changes)  # stays, and adds nothing outside
    token = _applied.set(changes)
    try:
        yield
    finally:
        _applied.reset(token)


def adapted(model: Callable, changes: Changes) -> Callable:
    """The model as a function, with changes applied in each of its calls and nowhere else."""
    if not changes:
        return model

    def call(*args, **kwargs):
        with applied(changes):
            return model(*args, **kwargs)

    return call


def _add_changes(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    added = output
    for change, weight in _applied.get().get(module, ()):
        added = added + change(module, args[0], output, weight)
    return added


def _fit_part(
    layers: Mapping[str, Layer], model: nn.Module, device: torch.device, misfits: list[str]
) -> dict[nn.Module, Change]:
    if not layers:
        return {}
    if any(module._compiled_call_impl is not None for module in model.modules()):
        hint = "a compiled model takes no LoRAs any more; load them into one that is not compiled"
        raise InvalidRequest("loras", type(model).__name__, hint)
    modules = {
        # PEFT, if somebody used it, keeps the module below itself.
        path.removeprefix("text_model.").removesuffix(".base_layer"): module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in path
    }
    fitted: dict[nn.Module, Change] = {}
    for path, layer in layers.items():
        if path not in modules:
            misfits.append(f"{path}: no such module")
        elif _fits(layer, module := modules[path]):
            fitted[module] = Change(layer, module, device)
        else:
            there = tuple(layer.up.shape[:1] + layer.down.shape[1:])
            misfits.append(f"{path}: {there}, not {_weight_shape(module)}")
    return fitted


def _weight_shape(module: nn.Linear | nn.Conv2d) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)


def _shapes(layer: Layer, module: nn.Linear | nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of down and up in this module, in which one pixel's convolution is linear."""
    out, *rest = _weight_shape(module)
    ones = (1,) * (len(rest) - 1)
    return (layer.rank, *rest), (out, layer.rank, *ones)


def _fits(layer: Layer, module: nn.Linear | nn.Conv2d) -> bool:
    down, up = _shapes(layer, module)
    spatial = tuple(layer.down.shape[2:]) or (1, 1)
    magnitudes = {(up[0],), (1, down[1])}
    return (
        (layer.down.shape[1], layer.up.shape[0]) == (down[1], up[0])
        and spatial == ((*down[2:],) or (1, 1))
        and getattr(module, "groups", 1) == 1
        and (layer.magnitude is None or tuple(layer.magnitude.shape) in magnitudes)
    )


def _gain(layer: Layer, module: nn.Linear | nn.Conv2d) -> Tensor:
    """By how much DoRA stretches each row (or column) of the changed weight, beside channels."""
    assert layer.magnitude is not None
    weight = module.weight.detach().float()
    changed = weight + layer.change(torch.float32).to(weight).reshape(weight.shape)
    rows = changed.transpose(0, 1) if layer.magnitude.ndim == 2 else changed
    gain = layer.magnitude.to(weight).flatten() / rows.flatten(1).norm(dim=1)
    return _beside_channels(gain, module)


def _beside_channels(values: Tensor, module: nn.Module) -> Tensor:
    return values if isinstance(module, nn.Linear) else values[:, None, None]


def _run(module: nn.Linear | nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """The module with another weight and no bias."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, module.stride, module.padding, module.dilation)
