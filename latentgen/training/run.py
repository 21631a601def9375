"""One run from its first step to its last: what every training script does around its loss.

Progress bar, log, held-out loss and sample pictures at intervals, checkpoints, resume, and an
orderly end when asked to stop. It does not know what is trained.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env, set_seed
from diffusers.utils import logging as diffusers_log
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_log

from latentgen.errors import LatentgenError, TrainingError
from latentgen.outputs import check_folder
from latentgen.training.checkpoint import (
    Export,
    best_loss,
    load_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
)
from latentgen.training.config import RunConfig, as_json
from latentgen.training.loop import (
    LossFunction,
    averaged,
    eight_bit_adam,
    new_state,
    put_weights,
    train,
)
from latentgen.training.pictures import Picture

FAST_BF16 = ("amx_bf16", "avx512_bf16", "bf16")  # x86, and Arm
PATIENCE = timedelta(hours=12)  # processes wait while one draws samples or reads a whole data set

Validation = Callable[[nn.Module], tuple[dict[str, float], Image.Image | None]]


def check_start(config: RunConfig) -> None:
    """Refuse a run that would end before its first step, and leave nothing behind.

    Raises TrainingError for a checkpoint to go on from that is not there, for libraries that are
    missing and for fp16 on a processor, and InvalidRequest for an `output_dir` that cannot be
    written.
    """
    resolve_checkpoint(config)
    check_folder(config.output_dir, "output_dir")
    if config.use_8bit_adam:
        eight_bit_adam()
    if config.report_to not in ("none", *map(str, get_available_trackers())):
        raise TrainingError(
            f"--report_to {config.report_to} needs `pip install {config.report_to}`"
        )
    if precision(config) == "fp16" and device_of_run().type == "cpu":
        raise TrainingError("fp16 trains on GPUs only; here, use --mixed_precision bf16 or no")


def device_of_run() -> torch.device:
    """Where the run will be: on the best device, unless `accelerate launch` says the processor."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return device


def precision(config: RunConfig) -> str:
    """Of the run: what the settings say, or else `accelerate launch`."""
    told = config.mixed_precision
    return told if told is not None else os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def start(config: RunConfig) -> Accelerator:
    """The accelerator of a run. From here on the initial weights depend on the seed alone, and the
    libraries keep to errors: what a run has to say stands in its log.

    Raises what `check_start` raises.
    """
    check_start(config)
    transformers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    diffusers_log.set_verbosity_error()
    diffusers_log.disable_progress_bar()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to if config.report_to != "none" else None,
        project_dir=config.output_dir / "logs",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise TrainingError(
            "the processes do not know each other; on processors, start them with "
            "`ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N SCRIPT …`"
        )
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
        raise TrainingError(
            "the settings of `accelerate launch` say another gradient_accumulation_steps: "
            f"{accelerator.gradient_accumulation_steps}, not {config.gradient_accumulation_steps}"
        )
    config.mixed_precision = accelerator.mixed_precision  # `accelerate launch` may have said it
    if (
        config.mixed_precision == "bf16"
        and accelerator.device.type == "cpu"
        and not any(torch.cpu.get_capabilities().get(name) for name in FAST_BF16)
    ):
        accelerator.print(
            "warning: this processor has no bf16 instructions: it can be many times slower than "
            "--mixed_precision no"
        )
    set_seed(config.seed)
    return accelerator


def run(
    model: nn.Module,
    loss_function: LossFunction,
    config: RunConfig,
    accelerator: Accelerator,
    pictures: list[Picture],
    data: str,
    validate: Validation,
    *,
    groups: list[Tensor] | None = None,
    classes: Sequence[Picture] = (),
    class_groups: list[Tensor] | None = None,
    rate_of: Callable[[str], float] = lambda name: 1.0,
    export: Export | None = None,
) -> None:
    """Train `model` to the last step; it ends with its averaged weights in place.

    `pictures` are those that the batches' rows name, `data` is their fingerprint, and
    `validate(model)` measures the averaged weights, before the first step and at intervals: numbers
    for the log and, if it has one, a picture. The checkpoint with the lowest `held_out_loss` is
    kept as `checkpoint-best-<step>`. `groups`, `classes`, `class_groups` and `rate_of`: see `loop`;
    `export(folder, step)` writes the result so far into each checkpoint.

    Raises TrainingError (see `loop.train`, `checkpoint.load_checkpoint`), and SystemExit once a
    checkpoint is written after SIGTERM or Ctrl-C.
    """
    resume = resolve_checkpoint(config)
    model.to(accelerator.device)
    state = new_state(model, config, rate_of)
    if resume is not None:
        load_checkpoint(state, resume, config, accelerator, data)
        accelerator.print(f"going on from {resume}")
    if accelerator.is_main_process:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(as_json(config), indent=2) + "\n"
        (config.output_dir / "training_config.json").write_text(settings)
        if resume is None:
            save_checkpoint(state, config, accelerator, data)
    accelerator.init_trackers("latentgen" if config.report_to == "wandb" else "")

    def measure() -> dict[str, float]:
        with averaged(state) as average:
            measured, picture = validate(average)
        told = "  ".join(f"{name} {value:.4f}" for name, value in measured.items())
        bar.write(f"step {state.step}: {told}", file=sys.stdout)
        if picture is not None:
            _keep_picture(picture, state.step, config.output_dir, accelerator)
        loss = measured.get("held_out_loss", float("inf"))
        if state.step > 0 and loss < best_loss(config.output_dir):
            save_checkpoint(state, config, accelerator, data, export, loss)
        return measured

    bar = tqdm(
        total=config.max_train_steps,
        initial=state.step,
        disable=not accelerator.is_main_process,
        mininterval=0.1 if sys.stderr.isatty() else 30,
        unit="step",
    )
    with stop_requests() as requested, bar:
        if accelerator.is_main_process:
            accelerator.log(measure(), step=state.step)
        steps = train(
            state, loss_function, config, accelerator, pictures, groups, classes, class_groups
        )
        for report in steps:
            bar.update()
            bar.set_postfix(loss=f"{report.loss:.4f}", refresh=False)
            numbers = {
                "loss": report.loss,
                "learning_rate": report.learning_rate,
                "grad_norm": report.grad_norm,
            }
            last = report.step == config.max_train_steps
            stop = _any_process(accelerator, bool(requested))
            if last or stop or report.step % config.checkpointing_steps == 0:
                if accelerator.is_main_process:
                    save_checkpoint(state, config, accelerator, data, export)
                accelerator.wait_for_everyone()
            if accelerator.is_main_process and (last or report.step % config.validation_steps == 0):
                numbers |= measure()
            accelerator.log(numbers, step=report.step)
            if stop and not last:
                accelerator.end_training()
                accelerator.print(f"stopped after step {report.step}; its checkpoint is written")
                raise SystemExit(128 + requested[0] if requested else 1)
    accelerator.end_training()
    put_weights(state, state.ema)
    model.eval()


def main(train_model: Callable[[], None]) -> None:
    """Call a script's `train_model` and end with a plain message for what went wrong on purpose."""
    try:
        train_model()
    except (LatentgenError, OSError) as error:  # a full disk, most of the time
        sys.exit(f"{type(error).__name__}: {error}")


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that receives the number of the first SIGTERM or SIGINT; a second one ends the
    process at once, and so does the first once the block is left."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    for each in before:
        signal.signal(each, handle)
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _any_process(accelerator: Accelerator, requested: bool) -> bool:
    """Whether any process was asked to stop: all must leave the loop at the same step."""
    if accelerator.num_processes == 1:
        return requested
    told = torch.tensor(float(requested), device=accelerator.device)
    return bool(accelerator.reduce(told, "sum") > 0)


def _keep_picture(
    picture: Image.Image, step: int, output_dir: Path, accelerator: Accelerator
) -> None:
    samples = output_dir / "samples"
    samples.mkdir(exist_ok=True)
    picture.save(samples / f"step-{step:06d}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.asarray(picture)
            tracker.writer.add_image("samples", pixels, step, dataformats="HWC")
        else:
            tracker.log_images({"samples": [picture]}, step=step)
