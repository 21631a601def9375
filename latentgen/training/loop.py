"""The training loop, as a generator: the caller owns logging, sampling, checkpoints and stopping.

It knows a model, an optimizer and a loss. It does not know what the model is, where the data comes
from or what is printed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentgen.errors import TrainingError
from latentgen.training.config import RunConfig
from latentgen.training.data import Batch, Order, step_generator
from latentgen.training.muon import Muon
from latentgen.training.objective import learning_rate_at
from latentgen.training.pictures import Picture

SKIPPED_AT_MOST = 50  # fp16 finds its scale in a few dozen steps, or never

LossFunction = Callable[[nn.Module, Batch], Tensor]


@dataclass
class TrainState:
    """Everything a run changes; a checkpoint is exactly this. `weights` are the model's parameters
    that are trained, by name, and `ema` is their average, empty if there is none."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    weights: dict[str, nn.Parameter]
    ema: dict[str, Tensor]
    step: int = 0


@dataclass(frozen=True)
class StepReport:
    """`step` counts finished steps, from 1."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float


def new_state(
    model: nn.Module, config: RunConfig, rate_of: Callable[[str], float] = lambda name: 1.0
) -> TrainState:
    """The model with its optimizer and an average of its weights, before the first step.

    `rate_of`: the share of the learning rate that the parameter of a name gets.
    """
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
    }
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rates = {name: rate_of(name) for name in weights}
    groups = [
        {"params": [p for name, p in weights.items() if rates[name] == rate], "rate": rate}
        for rate in dict.fromkeys(rates.values())
    ]
    if config.optimizer == "muon":
        optimizer: torch.optim.Optimizer = Muon(model, **settings)
    elif config.use_8bit_adam:
        optimizer = eight_bit_adam()(groups, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **settings)
    average = config.ema_decay > 0
    ema = {name: value.detach().clone() for name, value in weights.items()} if average else {}
    return TrainState(model, optimizer, weights, ema)


def train(
    state: TrainState,
    loss_function: LossFunction,
    config: RunConfig,
    accelerator: Accelerator,
    pictures: list[Picture],
    groups: list[Tensor] | None = None,
    classes: Sequence[Picture] = (),
    class_groups: list[Tensor] | None = None,
) -> Iterator[StepReport]:
    """Run the remaining steps, one a `next`. `loss_function(model, batch)` is the batch's mean.

    `groups`: rows that may share a batch (see `data.Order`); default: all may. `classes`: pictures
    of which each batch sees as many as of `pictures`, by groups of their own.

    Raises TrainingError with the step's number and the files that any process saw when the loss or
    the gradient is not finite, before the weights are touched.
    """
    model, optimizer = accelerator.prepare(state.model, state.optimizer)
    model.train()
    micro_batches = config.gradient_accumulation_steps
    share = config.train_batch_size
    total = share * micro_batches * accelerator.num_processes
    order = Order(config.seed, groups or [torch.arange(len(pictures))], total)
    class_order = Order(config.seed, class_groups or [torch.arange(len(classes))], total)
    skipped = 0

    def batch_of(places: slice) -> Batch:
        of_class = class_order.rows(state.step) if classes else None
        return Batch(config.seed, state.step, order.rows(state.step), places, of_class)

    def not_finite(what: str, value: Tensor, first: int = 0, count: int = total) -> TrainingError:
        """`count` rows of the step's whole batch, from the `first` on, are what it comes from."""
        batch = batch_of(slice(first, first + count))
        shown = [pictures[row] for row in batch.rows.tolist()]
        if batch.of_class is not None:
            shown += [classes[row] for row in batch.of_class.tolist()]
        files = "\n  ".join(str(picture.file) for picture in shown)
        return TrainingError(
            f"the {what} of step {state.step + 1} is {value.item()}; no weights were changed by "
            f"it, and what checkpoints there are are good. The batch:\n  {files}"
        )

    while state.step < config.max_train_steps:
        rate = learning_rate_at(
            state.step,
            config.learning_rate,
            config.lr_warmup_steps,
            config.max_train_steps,
            config.lr_scheduler,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)
        mean = torch.zeros((), device=accelerator.device)
        for micro_batch in range(micro_batches):
            start = (micro_batch * accelerator.num_processes + accelerator.process_index) * share
            batch = batch_of(slice(start, start + share))
            # dropout draws from torch's own generator: it, too, must be a function of the step
            torch.manual_seed(step_generator(config.seed, state.step, start + 2).initial_seed())
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = loss_function(model, batch)
                shared = accelerator.reduce(loss.detach(), "mean")
                if not torch.isfinite(shared):
                    together = share * accelerator.num_processes
                    raise not_finite("loss", shared, micro_batch * together, together)
                mean += shared / micro_batches
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    limit = config.max_grad_norm if config.max_grad_norm > 0 else math.inf
                    norm = accelerator.clip_grad_norm_(model.parameters(), limit)
                    # fp16's scaler finds its scale by overflowing: it skips such steps itself
                    if accelerator.scaler is None and not torch.isfinite(norm):
                        raise not_finite("gradient", norm)
                optimizer.step()
                optimizer.zero_grad()
        skipped = 0 if torch.isfinite(norm) else skipped + 1
        if skipped > SKIPPED_AT_MOST:
            raise not_finite("gradient (in fp16)", norm)
        state.step += 1
        update_ema(state, config.ema_decay)
        yield StepReport(state.step, mean.item(), rate, float(norm))


@torch.no_grad()
def update_ema(state: TrainState, decay: float) -> None:
    """ema += (1 - decay) (weights - ema); young averages forget faster: (1 + n) / (10 + n)."""
    if not state.ema:
        return
    young = min(decay, (1 + state.step) / (10 + state.step))
    torch._foreach_lerp_(list(state.ema.values()), list(state.weights.values()), 1 - young)


@contextmanager
def averaged(state: TrainState) -> Iterator[nn.Module]:
    """The model with its averaged weights, in evaluation mode; its own come back afterwards."""
    own = {name: state.weights[name].detach().clone() for name in state.ema}
    put_weights(state, state.ema)
    state.model.eval()
    try:
        with torch.no_grad():
            yield state.model
    finally:
        put_weights(state, own)
        state.model.train()


@torch.no_grad()
def put_weights(state: TrainState, values: dict[str, Tensor]) -> None:
    """Copy `values` into the trained weights of the same names."""
    for name, value in values.items():
        state.weights[name].copy_(value)


def eight_bit_adam() -> Any:
    """Its class; raises TrainingError where its library is missing."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise TrainingError("--use_8bit_adam needs `pip install bitsandbytes`") from error
    return AdamW8bit
