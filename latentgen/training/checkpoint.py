"""Save and resume a run: safetensors for tensors, JSON for the rest, never a pickle.

A checkpoint is a folder `checkpoint-<step>` that exists completely or not at all: it is written
under another name, flushed to the disk and renamed. It does not know what is trained.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from math import inf
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentgen.errors import TrainingError
from latentgen.training.config import FREE_TO_CHANGE, RunConfig, as_json
from latentgen.training.data import tensors_key
from latentgen.training.loop import TrainState, averaged, put_weights

PREFIX = "checkpoint-"
BEST = "checkpoint-best-"

Export = Callable[[Path, int], None]  # (folder, step)


def save_checkpoint(
    state: TrainState,
    config: RunConfig,
    accelerator: Accelerator,
    data: str,
    export: Export | None = None,
    best: float | None = None,
) -> Path:
    """Write `checkpoint-<step>`, then drop all but the newest. With `best`, a held-out loss that no
    step before reached, write `checkpoint-best-<step>`, then drop the best before. That of step 0
    holds no weights, only their hash, for they come from the model and the seed: it says that the
    run has begun.

    `data` is the data's fingerprint; `export` puts the result so far (of the averaged weights),
    ready for use, into the checkpoint's folder `result`.

    Raises TrainingError when it cannot be written; the ones before it stay.
    """
    prefix = PREFIX if best is None else BEST
    final = config.output_dir / f"{prefix}{state.step}"
    partial = config.output_dir / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(state, config, accelerator, data, partial, export, best)
    except (OSError, SafetensorError) as error:  # a full disk, most of the time
        shutil.rmtree(partial, ignore_errors=True)
        there = checkpoints(config.output_dir)
        last = f"the last one is {there[-1]}" if there else "there is none before it"
        raise TrainingError(f"{final} cannot be written: {error}; {last}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _flush(config.output_dir)
    there = checkpoints(config.output_dir, prefix)
    if best is not None:
        there.remove(final)
    else:  # later ones are left from before this run went back to an earlier one
        there = there[: there.index(final) + 1][: -config.checkpoints_total_limit]
    for old in there:
        shutil.rmtree(old)
    return final


def _write(
    state: TrainState,
    config: RunConfig,
    accelerator: Accelerator,
    data: str,
    folder: Path,
    export: Export | None,
    best: float | None,
) -> None:
    """All of a checkpoint, flushed to the disk."""
    folder.mkdir(parents=True)
    moments = {
        f"{index}.{name}": torch.as_tensor(value)
        for index, parameter in enumerate(_parameters(state))
        for name, value in state.optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor | int | float)
    }
    parts: dict[str, Mapping[str, Tensor]] = {
        "model": state.weights,
        "ema": state.ema,
        "optimizer": moments,
    }
    if state.step == 0:
        parts = {}
    hashes = {}
    for part, tensors in parts.items():
        file = folder / f"{part}.safetensors"
        save_file(_apart(tensors), file)
        hashes[file.name] = _sha256(file)
    if export is not None and state.step > 0:
        result = folder / "result"
        result.mkdir()
        with averaged(state):
            export(result, state.step)
    facts = {
        "step": state.step,
        "held_out_loss": best,
        "processes": accelerator.num_processes,
        "data": data,
        "config": as_json(config),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "sha256": hashes,
        "began_with": tensors_key(state.weights) if state.step == 0 else None,
    }
    (folder / "state.json").write_text(json.dumps(facts, indent=2) + "\n")
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def checkpoints(output_dir: Path, prefix: str = PREFIX) -> list[Path]:
    """The complete checkpoints of a run, oldest first; with the prefix BEST, the best."""
    name = re.compile(rf"{prefix}(\d+)")
    found = {path: name.fullmatch(path.name) for path in output_dir.glob(f"{prefix}*")}
    steps = {path: int(match[1]) for path, match in found.items() if match is not None}
    return sorted(steps, key=lambda path: steps[path])


def best_loss(output_dir: Path) -> float:
    """The lowest held-out loss of which there is a checkpoint; infinity while there is none."""
    found = checkpoints(output_dir, BEST)
    return json.loads((found[-1] / "state.json").read_text())["held_out_loss"] if found else inf


def resolve_checkpoint(config: RunConfig) -> Path | None:
    """The folder to go on from, or None for a run that starts: `latest` is the newest checkpoint
    of the run (the best while there is no other), anything else is a folder, or the name of one of
    the run's checkpoints.

    Raises TrainingError when there is no such checkpoint, and when a run would start where weights
    of another already are.
    """
    begun = config.output_dir / f"{PREFIX}0"
    found = [path for path in checkpoints(config.output_dir) if path != begun]
    found = found or checkpoints(config.output_dir, BEST)
    wanted = config.resume_from_checkpoint
    if wanted is None:
        if not found:
            return None
        raise TrainingError(
            f"{config.output_dir} has {found[-1].name}: go on with --resume_from_checkpoint "
            "latest, or name another --output_dir"
        )
    inside = config.output_dir / wanted
    chosen = inside if inside.is_dir() else Path(wanted)
    told = f"{chosen} is no checkpoint"
    if wanted == "latest":
        chosen = (found or [begun])[-1]
        told = f"{config.output_dir} has no checkpoint; a run begins without this flag"
    if not (chosen / "state.json").is_file():
        raise TrainingError(f"resume_from_checkpoint: {told}")
    return chosen


def load_checkpoint(
    state: TrainState, checkpoint: Path, config: RunConfig, accelerator: Accelerator, data: str
) -> None:
    """Put weights, average, optimizer and step back in place, exactly.

    The randomness needs no state of its own: a step draws from its number (`data.Batch`).
    Raises TrainingError when the checkpoint is damaged, or when settings, data or the number of
    processes are not those it was made with, for then the run would not be the same run.
    """
    try:
        facts = json.loads((checkpoint / "state.json").read_text())
        damaged = [n for n, sha in facts["sha256"].items() if _sha256(checkpoint / n) != sha]
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(f"{checkpoint} is damaged: {error}") from error
    if damaged:
        raise TrainingError(f"{checkpoint} is damaged: {', '.join(damaged)} changed on the disk")
    free, why = FREE_TO_CHANGE, ""
    if config.lr_scheduler != "constant":
        why = f" ({config.lr_scheduler} reaches zero there: only constant may go on longer)"
    elif config.max_train_steps >= facts["step"]:
        free |= {"max_train_steps"}
    now = as_json(config) | {"processes": accelerator.num_processes, "data": data}
    then = facts["config"] | {"processes": facts["processes"], "data": facts["data"]}
    changed = [
        f"{name} was {then.get(name)}, is {now.get(name)}{why if name == 'max_train_steps' else ''}"
        for name in sorted(now.keys() | then.keys())
        if now.get(name) != then.get(name) and name not in free
    ]
    if changed:
        raise TrainingError(
            f"{checkpoint} cannot be continued as the same run:\n  " + "\n  ".join(changed)
        )
    state.step = facts["step"]
    if state.step == 0:
        if facts["began_with"] != tensors_key(state.weights):
            raise TrainingError(f"{checkpoint}: the run began with other weights than these")
        return
    put_weights(state, load_file(checkpoint / "model.safetensors"))
    for name, value in load_file(checkpoint / "ema.safetensors").items():
        state.ema[name].copy_(value)
    parameters = _parameters(state)
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        # the moments keep the parameter's memory layout: fused kernels walk both side by side
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        else:
            value = value.to(parameter.device)
        whole_number = value.dtype == torch.int64 and value.dim() == 0
        state.optimizer.state[parameter][name] = int(value) if whole_number else value
    if accelerator.scaler is not None and facts["scaler"] is not None:
        accelerator.scaler.load_state_dict(facts["scaler"])


def _parameters(state: TrainState) -> list[nn.Parameter]:
    """Those of the optimizer, in the order of its groups."""
    return [parameter for group in state.optimizer.param_groups for parameter in group["params"]]


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the processor's memory, as files can hold them: 8-bit optimizers share tables
    between parameters, of which all but the first become copies."""
    own, storages = {}, set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        own[name] = value.clone() if storage in storages else value
        storages.add(storage)
    return own


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
