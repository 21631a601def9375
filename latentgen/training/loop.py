"""The training loop, as a generator: the caller owns logging, sampling, checkpoints and stopping.

It knows a model, an optimizer and a loss. It does not know what the model is, where the data comes
from or what is printed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentgen.training.objective import learning_rate_at

LossFunction = Callable[[nn.Module, int, torch.Generator], Tensor]


@dataclass
class TrainState:
    """Everything a run changes; a checkpoint is exactly this."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor]
    seed: int
    step: int = 0


@dataclass(frozen=True)
class TrainSettings:
    """What the loop itself needs to know; defaults belong to the scripts."""

    max_train_steps: int
    learning_rate: float
    lr_warmup_steps: int
    lr_decay_steps: int
    ema_decay: float
    max_grad_norm: float


@dataclass(frozen=True)
class StepReport:
    """`step` counts finished steps, from 1."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float


def new_state(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> TrainState:
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return TrainState(model, optimizer, ema, seed)


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """The randomness of one step on one process: a function of numbers, so resuming is exact."""
    return torch.Generator("cpu").manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


def batch_indices(step: int, batch_size: int, size: int, seed: int) -> Tensor:
    """The rows of batch `step`: every epoch is a permutation of its own, and batches run on across
    epochs, so that no row is dropped and any step's batch can be named without the ones before."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    rows = torch.empty_like(positions)
    for epoch in torch.unique(positions // size).tolist():
        order = torch.randperm(size, generator=step_generator(seed, epoch, rank=1_008))
        inside = positions // size == epoch
        rows[inside] = order[positions[inside] % size]
    return rows


def train(
    state: TrainState,
    loss_function: LossFunction,
    settings: TrainSettings,
    accelerator: Accelerator,
) -> Iterator[StepReport]:
    """Run the remaining steps, one a `next`. `loss_function(model, step, generator)` is a scalar.

    Raises FloatingPointError with the step's number when the loss is not finite, before the weights
    are touched.
    """
    model, optimizer = accelerator.prepare(state.model, state.optimizer)
    model.train()
    while state.step < settings.max_train_steps:
        generator = step_generator(state.seed, state.step, accelerator.process_index)
        rate = learning_rate_at(
            state.step, settings.learning_rate, settings.lr_warmup_steps, settings.lr_decay_steps
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        with accelerator.autocast():
            loss = loss_function(model, state.step, generator)
        value = loss.item()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss of step {state.step} is {value}")
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        update_ema(state, settings.ema_decay)
        yield StepReport(state.step, value, rate, float(norm))


@torch.no_grad()
def update_ema(state: TrainState, decay: float) -> None:
    """ema += (1 - decay) (weights - ema); young averages forget faster: (1 + n) / (10 + n)."""
    weights = state.model.state_dict()
    young = min(decay, (1 + state.step) / (10 + state.step))
    torch._foreach_lerp_(list(state.ema.values()), [weights[n] for n in state.ema], 1 - young)
