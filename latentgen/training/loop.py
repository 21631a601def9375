"""The training loop, as a generator: the caller owns logging, sampling, checkpoints and stopping.

It knows a model, an optimizer and a loss. It does not know what the model is, where the data comes
from or what is printed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentgen.errors import TrainingError
from latentgen.training.config import RunConfig
from latentgen.training.data import Batch, Picture
from latentgen.training.muon import Muon
from latentgen.training.objective import learning_rate_at

SKIPPED_AT_MOST = 50  # fp16 finds its scale in a few dozen steps, or never

LossFunction = Callable[[nn.Module, Batch], Tensor]


@dataclass
class TrainState:
    """Everything a run changes; a checkpoint is exactly this."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor]
    step: int = 0


@dataclass(frozen=True)
class StepReport:
    """`step` counts finished steps, from 1."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float


def new_state(model: nn.Module, config: RunConfig) -> TrainState:
    """The model with its optimizer and an average of its weights, before the first step."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = (
        Muon(model, **settings)
        if config.optimizer == "muon"
        else torch.optim.AdamW(trained, fused=True, **settings)
    )
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return TrainState(model, optimizer, ema)


def train(
    state: TrainState,
    loss_function: LossFunction,
    config: RunConfig,
    accelerator: Accelerator,
    pictures: list[Picture],
) -> Iterator[StepReport]:
    """Run the remaining steps, one a `next`. `loss_function(model, batch)` is the batch's mean.

    Raises TrainingError with the step's number and the files of the batch when the loss or the
    gradient is not finite, before the weights are touched.
    """
    model, optimizer = accelerator.prepare(state.model, state.optimizer)
    model.train()
    micro_batches = config.gradient_accumulation_steps
    share = config.train_batch_size
    total = share * micro_batches * accelerator.num_processes
    skipped = 0
    while state.step < config.max_train_steps:
        rate = learning_rate_at(
            state.step,
            config.learning_rate,
            config.lr_warmup_steps,
            config.max_train_steps,
            config.lr_scheduler,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        mean = torch.zeros((), device=accelerator.device)
        rows = []
        for micro_batch in range(micro_batches):
            start = (micro_batch * accelerator.num_processes + accelerator.process_index) * share
            places = slice(start, start + share)
            batch = Batch(config.seed, state.step, places, total, len(pictures))
            rows += batch.rows.tolist()
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = loss_function(model, batch)
                shared = accelerator.reduce(loss.detach(), "mean")
                if not torch.isfinite(shared):
                    raise _not_finite("loss", shared, state.step, pictures, batch.rows.tolist())
                mean += shared / micro_batches
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                    # fp16's scaler finds its scale by overflowing: it skips such steps itself
                    if accelerator.scaler is None and not torch.isfinite(norm):
                        raise _not_finite("gradient", norm, state.step, pictures, rows)
                optimizer.step()
                optimizer.zero_grad()
        skipped = skipped + 1 if optimizer.step_was_skipped else 0
        if skipped > SKIPPED_AT_MOST:
            raise _not_finite("gradient (in fp16)", norm, state.step, pictures, rows)
        state.step += 1
        update_ema(state, config.ema_decay)
        yield StepReport(state.step, mean.item(), rate, float(norm))


@torch.no_grad()
def update_ema(state: TrainState, decay: float) -> None:
    """ema += (1 - decay) (weights - ema); young averages forget faster: (1 + n) / (10 + n)."""
    weights = state.model.state_dict()
    young = min(decay, (1 + state.step) / (10 + state.step))
    torch._foreach_lerp_(list(state.ema.values()), [weights[n] for n in state.ema], 1 - young)


@contextmanager
def averaged(state: TrainState) -> Iterator[nn.Module]:
    """The model with its averaged weights, in evaluation mode; its own come back afterwards."""
    own = {name: value.clone() for name, value in state.model.state_dict().items()}
    state.model.load_state_dict(state.ema)
    state.model.eval()
    try:
        with torch.no_grad():
            yield state.model
    finally:
        state.model.load_state_dict(own)
        state.model.train()


def _not_finite(
    what: str, value: Tensor, step: int, pictures: list[Picture], rows: list[int]
) -> TrainingError:
    files = "\n  ".join(str(pictures[row].file) for row in rows)
    return TrainingError(
        f"the {what} of step {step + 1} is {value.item()}; no weights were changed by it, and what "
        f"checkpoints there are are good. The batch:\n  {files}"
    )
