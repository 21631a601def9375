"""The settings of a run: a dataclass is the list of flags, filled from `--config` and the shell.

Flag names are those of diffusers' examples. It knows what every training shares; what a script
trains, it adds in a dataclass of its own.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from safetensors import SafetensorError, safe_open
from transformers import HfArgumentParser

import latentgen
from latentgen.training.pictures import ALLOWABLE, kohya_flags

# Settings of one run that nothing repeats.
ONCE = ("output_dir", "resume_from_checkpoint", "dry_run")
MANIFEST = "latentgen.manifest"  # in the header of a file: how it was made


def flag(default=..., *, help: str, **metadata):
    """A dataclass field whose `help` the shell shows; without a default it is required. `metadata`
    goes to the parser: `choices` of a list, `aliases`."""
    metadata["help"] = help
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class RunConfig:
    """What the loop, the checkpoints and the log need to know."""

    output_dir: Path = flag(help="where the result, checkpoints, samples and logs go")
    seed: int = flag(0, help="of the initial weights, the order of the data and all noise")
    max_train_steps: int = flag(1000, help="steps of the optimizer")
    train_batch_size: int = flag(32, help="pictures a process and micro-batch")
    gradient_accumulation_steps: int = flag(1, help="micro-batches a step")
    learning_rate: float = flag(1e-3, help="its highest value")
    lr_scheduler: Literal["cosine", "linear", "constant"] = flag(
        "cosine", help="how it falls to zero after the warm-up, if it does"
    )
    lr_warmup_steps: int = flag(200, help="steps of a linear rise from zero")
    optimizer: Literal["adamw", "muon"] = flag(
        "adamw", help="muon: AdamW, but orthogonal steps for hidden layers; for training from zero"
    )
    use_8bit_adam: bool = flag(False, help="AdamW in a quarter of the memory; bitsandbytes")
    adam_beta1: float = flag(0.9, help="AdamW: memory of the mean gradient")
    adam_beta2: float = flag(0.99, help="AdamW: memory of its square")
    adam_weight_decay: float = flag(0.01, help="AdamW: weight decay")
    max_grad_norm: float = flag(1.0, help="gradients longer than this are scaled down; 0: never")
    ema_decay: float = flag(0.999, help="of the averaged weights, which are the result")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None, help="default: what `accelerate launch` says"
    )
    validation_steps: int = flag(500, help="steps between held-out losses and sample pictures")
    checkpointing_steps: int = flag(500, help="steps between checkpoints")
    checkpoints_total_limit: int = flag(2, help="older checkpoints go when a new one is whole")
    resume_from_checkpoint: str | None = flag(
        None, help="`latest`, or a checkpoint's folder: go on exactly there"
    )
    report_to: Literal["tensorboard", "wandb", "none"] = flag(
        "tensorboard", help="where losses and samples are logged"
    )

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps"):
            at_least(self, name, 1)
        for name in ("validation_steps", "checkpointing_steps", "checkpoints_total_limit"):
            at_least(self, name, 1)
        for name in ("lr_warmup_steps", "adam_weight_decay", "max_grad_norm"):
            at_least(self, name, 0)
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: {value} is no number to train with")
        if self.use_8bit_adam and self.optimizer != "adamw":
            raise ValueError("use_8bit_adam goes with --optimizer adamw")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate: {self.learning_rate}; use more than 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: {self.seed} is not in [0, 2**32)")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not in [0, 1)")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: {self.ema_decay} is not in [0, 1); 0 means no average")
        for name in vars(self):
            if name.endswith("_data_dir"):
                outside(self, "output_dir", name)


@dataclass(kw_only=True)
class DataConfig(RunConfig):
    """And where the pictures of a training from nothing are."""

    train_data_dir: Path = flag(help="a folder of pictures, with captions where they are needed")
    metadata_file: str = flag("metadata.jsonl", help="the listing inside --train_data_dir")
    validation_data_dir: Path | None = flag(
        None, help="pictures that measure; default: every 50th of the training folder"
    )
    allow: list[str] = flag([], choices=list(ALLOWABLE), help="what may be wrong with pictures")
    resolution: int = flag(128, help="pixels of a picture's side")

    @property
    def square(self) -> tuple[int, int]:
        """The height and width of every picture."""
        return self.resolution, self.resolution


# Settings that may change between a checkpoint and the run that goes on from it.
FREE_TO_CHANGE = frozenset(
    {
        "output_dir",
        "validation_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "report_to",
        "dry_run",
        "expect_data",
        "expect_model",
        "expect_processes",
        "gradient_checkpointing",  # the same numbers in less memory
        "validation_prompts",
        "output_name",
        "lora_layout",
        # where the pictures are and what may be wrong with them; what they are is compared by
        # their fingerprint
        "allow",
        "train_data_dir",
        "metadata_file",
        "validation_data_dir",
        "mask_data_dir",
        "dataset_config",
        "dataset_name",
        "instance_data_dir",
        "class_data_dir",
    }
)

Config = TypeVar("Config", bound=RunConfig)


def parse_config(kind: type[Config], description: str, argv: list[str] | None = None) -> Config:
    """Flags from the shell over those of `--config FILE.yaml`, of a kohya data set's file, and of
    the run that `--from FILE` repeats; a wrong one ends the program with a line that names it."""
    argv = sys.argv[1:] if argv is None else argv
    usage = "%(prog)s --config FILE.yaml --flag value ... (--help lists the flags)"
    parser = HfArgumentParser(kind, usage=usage, description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="a YAML file of flags; the shell's win")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--from", type=Path, dest="repeat")
    first.add_argument("--dataset_config", "--dataset-config", type=Path)
    files = first.parse_known_args(argv)[0]
    known = {action.dest for action in parser._actions}
    words = []
    if "expect_data" in known:  # a script that writes files from which it can be repeated
        parser.add_argument(
            "--from", dest="repeat", metavar="FILE", help="repeat the run of a file"
        )
        if files.repeat is not None:
            words += _words(_manifest_flags(files.repeat, known, parser))
    settings = {} if files.config is None else _yaml_flags(files.config, parser)
    listing = files.dataset_config or settings.get("dataset_config")
    # a run to repeat knows its flags, also those that the shell had set over such a file's
    if listing is not None and "dataset_config" in known and files.repeat is None:
        words += _words(kohya_flags(Path(listing)))
    words += _words(settings)
    argv = [*words, *argv]
    namespace = vars(parser.parse_args(argv))
    del namespace["config"]
    namespace.pop("repeat", None)
    try:
        return kind(**namespace)
    except ValueError as error:
        raise SystemExit(parser.error(str(error))) from error


def as_json(config: RunConfig) -> dict:
    """The settings as JSON values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}


def to_repeat(config: RunConfig) -> dict:
    """The settings as a file tells them to whoever has it: without those of the one run, and with
    the last part only of an absolute path, for where somebody keeps things is their own."""
    settings = as_json(config)
    for name, value in asdict(config).items():
        is_path = isinstance(value, Path) or name in (
            "pretrained_model_name_or_path",
            "dataset_name",
        )
        if is_path and value is not None and Path(value).is_absolute():
            settings[name] = Path(value).name
    return {name: value for name, value in settings.items() if name not in ONCE}


def versions() -> dict[str, str]:
    """Of this package and the libraries on which the numbers of a fine-tuning depend."""
    import diffusers
    import peft
    import torch

    return {m.__name__: m.__version__ for m in (latentgen, torch, diffusers, peft)}


def say(text: str) -> None:
    """Print a text, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def _yaml_flags(file: Path, parser: HfArgumentParser) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {file}: {error}")
    if not isinstance(settings, dict):
        parser.error(f"--config {file}: it must be a list of `flag: value` lines")
    settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
    for name, value in settings.items():
        if name in ("config", "from"):
            parser.error(f"--config {file}: {name} is a flag of the shell only")
        if value is None:
            parser.error(f"--config {file}: {name} has no value; leave the line out")
    if settings.get("mixed_precision") is False:  # YAML takes a bare `no` for false
        settings["mixed_precision"] = "no"
    return settings


def _manifest_flags(file: Path, known: set[str], parser: HfArgumentParser) -> dict[str, Any]:
    """The settings of the run that made a file, and the hashes of what it read."""
    try:
        if file.suffix == ".json":
            manifest = json.loads(file.read_text("utf-8"))
        else:
            with safe_open(file, "pt") as content:
                manifest = json.loads((content.metadata() or {})[MANIFEST])
        config, hashes = manifest["config"], (manifest["data"], manifest["model"])
        processes, before = manifest["processes"], manifest["versions"]
        step, steps = manifest["step"], config["max_train_steps"]
    except (OSError, SafetensorError, KeyError, ValueError):
        parser.error(f"--from {file}: it is no file of ours that tells how it was made")
    if unknown := sorted(config.keys() - known):
        parser.error(f"--from {file}: {unknown} are no flags of this script")
    if step < steps:
        say(f"{file} is of step {step} of a run of {steps}; all of that run is repeated")
    for name, version in versions().items():
        if before.get(name) != version:
            say(f"{file} was made with {name} {before.get(name)}; here is {version}")
    if "instance_data_dir" in config:
        config.pop("train_data_dir", None)  # the same folder
    config |= {"expect_data": hashes[0], "expect_model": hashes[1], "expect_processes": processes}
    return {name: value for name, value in config.items() if value is not None}


def _words(settings: dict[str, Any]) -> list[str]:
    """Settings as the words that would be typed, so that one parser checks all."""
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(one) for one in values)] if values else []
    return words


def needs(config: RunConfig, names: list[str], condition: bool, what: str) -> None:
    """Refuse settings that would have no effect: those of `names` need `condition`."""
    if condition:
        return
    defaults = {
        one.name: one.default if one.default_factory is MISSING else one.default_factory()
        for one in fields(config)
    }
    for name in names:
        if getattr(config, name) != defaults[name]:
            raise ValueError(f"{name} has no effect without {what}")


def outside(config: RunConfig, written: str, read: str) -> None:
    """Refuse a folder whose pictures the next run would take for those of another."""
    inner, outer = getattr(config, written), getattr(config, read)
    if None not in (inner, outer) and inner.resolve().is_relative_to(outer.resolve()):
        raise ValueError(
            f"{written}: {inner} is in {read}, whose pictures are read; name a folder outside of it"
        )


def at_least(config: RunConfig, name: str, least: int) -> None:
    """Refuse a setting below its least value."""
    if getattr(config, name) < least:
        raise ValueError(f"{name}: {getattr(config, name)} is too small; use {least} or more")
