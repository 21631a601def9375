"""Prompt sets: a YAML file of prompts and the settings they are drawn with.

    settings: {num_images: 2, guidance_scale: 4}    # optional; fields of a request, for all
    prompts:
      - a red apple
      - {prompt: a rocket, negative_prompt: smoke}  # fields of a request, for this one

Or a .txt file with a prompt a line. Picture i of a set has the seed `settings.seed + i`; a prompt
with a seed of its own begins there. It does not know what is done with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from .errors import InvalidRequest
from .request import OF_CONTROL, OF_PICTURES, Request

__all__ = ["PromptSet", "read_prompts"]

_FIELDS = {field.name for field in fields(Request)} - OF_PICTURES - {"output_type"}
_FIELDS -= {"controlnet", *OF_CONTROL}


@dataclass(frozen=True)
class PromptSet:
    """`entries`: one a prompt, each a dictionary of `Request` fields. `seed`: of all of them."""

    name: str
    entries: tuple[dict[str, Any], ...]
    seed: int = 0

    @property
    def prompts(self) -> list[str]:
        return [entry["prompt"] for entry in self.entries]

    def seeds(self, counts: Sequence[int], seed: int | None = None) -> list[int]:
        """The first seed of each prompt.

        Args:
            counts: how many pictures each gets.
            seed: of the first picture of all; None: what the set says.
        """
        first = seed if seed is not None else self.seed
        own = [None if seed is not None else entry.get("seed") for entry in self.entries]
        return [
            mine if mine is not None else first + passed
            for mine, passed in zip(own, accumulate(counts[:-1], initial=0), strict=True)
        ]


def read_prompts(file: str | Path) -> PromptSet:
    """Read a prompt set.

    Raises:
        InvalidRequest: no such file, no YAML, no prompts, or a setting that no request has.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows begins a file with a mark
        if path.suffix.lower() == ".txt":
            content: Any = {"prompts": [line.strip() for line in text.splitlines() if line.strip()]}
        else:
            content = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise InvalidRequest("prompts", path, "no such file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InvalidRequest("prompts", path, f"it is not readable: {reason}") from error
    known = {"settings", "prompts"}
    if not isinstance(content, dict) or not content.keys() <= known or not content.get("prompts"):
        raise InvalidRequest("prompts", path, "it needs a list `prompts`, and may have `settings`")
    if not isinstance(content["prompts"], list):
        raise InvalidRequest("prompts", path, "`prompts` must be a list")
    shared = _settings(content.get("settings") or {}, path)
    seed = shared.pop("seed", None)
    Request(prompt="any", seed=seed)  # refused here, if it is none
    entries = [shared | _entry(entry, path) for entry in content["prompts"]]
    return PromptSet(path.stem, tuple(entries), seed if seed is not None else 0)


def _entry(entry: Any, path: Path) -> dict[str, Any]:
    if isinstance(entry, dict) and isinstance(entry.get("prompt"), str):
        return _settings(entry, path)
    if not isinstance(entry, str):
        hint = "a prompt is a text or a mapping with `prompt` (quote what YAML takes for a number)"
        raise InvalidRequest("prompts", entry, f"{path}: {hint}")
    return {"prompt": entry}


def _settings(settings: Any, path: Path) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise InvalidRequest("settings", settings, f"{path}: it must be a mapping")
    for name in settings:
        if name not in _FIELDS:
            raise InvalidRequest(str(name), settings[name], f"{path}: use {sorted(_FIELDS)}")
    return settings
