"""Save and resume a run: safetensors for tensors, JSON for the rest, never a pickle.

A checkpoint is a folder `checkpoint-<step>` that exists completely or not at all: it is written
under another name and renamed when everything is on disk. It does not know what is trained.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentgen.training.loop import TrainState

PREFIX = "checkpoint-"


def save_checkpoint(state: TrainState, output_dir: Path, keep: int = 2) -> Path:
    """Write `checkpoint-<step>` and drop all but the newest `keep`."""
    final = output_dir / f"{PREFIX}{state.step}"
    partial = output_dir / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_contiguous(state.model.state_dict()), partial / "model.safetensors")
    save_file(_contiguous(state.ema), partial / "ema.safetensors")
    optimizer = state.optimizer.state_dict()["state"]
    tensors = {
        f"{index}.{name}": value
        for index, entry in optimizer.items()
        for name, value in entry.items()
    }
    save_file(_contiguous(tensors), partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": state.step, "seed": state.seed}))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = output_dir.glob(f"{PREFIX}*")
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def resolve_checkpoint(resume_from_checkpoint: str, output_dir: Path) -> Path | None:
    """`latest` is the newest one of the run (None when it has none yet), else a path."""
    if resume_from_checkpoint == "latest":
        found = checkpoints(output_dir)
        return found[-1] if found else None
    return Path(resume_from_checkpoint)


def load_checkpoint(state: TrainState, checkpoint: Path) -> None:
    """Put weights, EMA, optimizer and step back in place, exactly.

    The randomness needs no state of its own: every step draws from a generator seeded by the run's
    seed and the step's number (`loop.step_generator`).
    """
    facts = json.loads((checkpoint / "state.json").read_text())
    if facts["seed"] != state.seed:
        raise ValueError(f"seed: the checkpoint was made with {facts['seed']}, not {state.seed}")
    state.step = facts["step"]
    state.model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    for name, value in load_file(checkpoint / "ema.safetensors").items():
        state.ema[name].copy_(value)
    tensors = load_file(checkpoint / "optimizer.safetensors")
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        # the moments keep the parameter's memory layout: fused kernels walk both side by side
        like = torch.empty_like(parameter) if value.shape == parameter.shape else value.clone()
        state.optimizer.state[parameter][name] = like.copy_(value)


def load_weights(model: nn.Module, file: Path) -> None:
    model.load_state_dict(load_file(file))


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in tensors.items()}
