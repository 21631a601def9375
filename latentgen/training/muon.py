"""Muon: momentum whose direction, as a matrix, is made orthogonal before it is taken.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; its step is scaled to
the length of AdamW's, so that both share a learning rate (Liu et al. 2025, arXiv 2502.16982). A
convolution's weight counts as a matrix with a row for each output channel, because such weights are
what autoencoders and U-Nets are made of (torch's own Muon takes matrices only).
"""

from typing import Any

import torch
from torch import Tensor, nn

# Newton and Schulz's quintic: after five iterations every singular value lies near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95
NARROW = 16  # weights with fewer channels on either side are first or last layers


class Muon(torch.optim.Optimizer):
    """Muon for the hidden layers of a model, AdamW for the rest: embeddings, norms, biases, and
    layers that begin or end in a few channels."""

    def __init__(
        self, model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        hidden, rest = split_parameters(model)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8}
        groups = [{"params": hidden, "orthogonal": True}, {"params": rest, "orthogonal": False}]
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                gradient = weight.grad
                if gradient is None:
                    continue
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                if group["orthogonal"]:
                    direction = self._orthogonal(weight, gradient)
                else:
                    direction = self._adam(weight, gradient, group["betas"], group["eps"])
                weight.add_(direction, alpha=-group["lr"])

    def _orthogonal(self, weight: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's; (out, in x kernel)
        length = 0.2 * max(ahead.shape) ** 0.5  # each number moves as far as AdamW's on average
        return length * orthogonalized(ahead).view(weight.shape)

    def _adam(
        self, weight: Tensor, gradient: Tensor, betas: tuple[float, float], eps: float
    ) -> Tensor:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        step = state["step"].item()
        mean = state["exp_avg"].lerp_(gradient, 1 - betas[0]) / (1 - betas[0] ** step)
        square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - betas[1])
        return mean / ((square / (1 - betas[1] ** step)).sqrt() + eps)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights of hidden layers, and all other parameters that are trained."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        wide = parameter.dim() > 1 and min(parameter.shape[:2]) >= NARROW
        (hidden if wide and id(parameter) not in embeddings else rest).append(parameter)
    return hidden, rest


def orthogonalized(matrix: Tensor, iterations: int = 5) -> Tensor:
    """`matrix` (rows, columns) with all its singular values moved near 1.

    A convolution's matrix has nine columns a row, so the iterations run on its square alone: each
    is a polynomial of it, they commute, and their product goes to the matrix once, at the end.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    square = x @ x.T
    product = one = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        polynomial = a * one + b * square + c * square @ square
        product = polynomial @ product
        square = polynomial @ square @ polynomial
    x = product @ x
    return x.T if tall else x
