"""Every prompt of a set as picture files: what `latentgen batch` does.

A file is written whole or not at all, and is named after its prompt's place and words. A file that
is there is read: if its own record says that it came from the same request and model, it is done;
any other is somebody's picture, and nothing is drawn. So a run that was stopped goes on when it is
started again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import metadata
from .errors import InvalidRequest
from .modelfolder import Model
from .outputs import check_folder, in_name, write_file
from .promptfile import PromptSet
from .request import Request, ResolvedRequest, can_join, together

if TYPE_CHECKING:
    from .pipeline import LatentDiffusion

__all__ = ["Task", "draw", "plan"]


@dataclass(frozen=True)
class Task:
    """A prompt: its request, and the file of each of its pictures."""

    request: ResolvedRequest
    files: list[Path]

    def is_done(
        self, pipe: LatentDiffusion, overwrite: bool = False, quality: int | None = None
    ) -> bool:
        """Whether all its pictures are there.

        Args:
            pipe: what it would be drawn with.
            overwrite: other pictures under these names count as none, instead of being refused.
            quality: what it would be written with, see `draw`.

        Raises:
            InvalidRequest: a file under one of these names is not from this request and model.
        """
        there = [file for file in self.files if file.exists()]
        quality = quality if quality is not None else metadata.QUALITY
        strange = [file for file in there if not self._came_from_this(file, pipe, quality)]
        if strange and not overwrite:
            hint = "not a picture of this prompt, these settings, this model, dtype and quality"
            raise InvalidRequest(
                "output", str(strange[0]), f"{hint}; another --output, or --overwrite"
            )
        return len(there) - len(strange) == len(self.files)

    def _came_from_this(self, file: Path, pipe: LatentDiffusion, quality: int) -> bool:
        try:
            known = metadata.read(file).record
        except InvalidRequest:
            return False
        if known is None:
            return False
        if file.suffix.lower() != ".png" and known["quality"] != quality:  # PNG loses nothing
            return False
        dtype = str(pipe.unet.dtype).removeprefix("torch.")
        settings = {"dtype": dtype, **pipe.embeddings_in(self.request)}
        asked = json.loads(json.dumps(metadata.recorded(self.request)))  # its tuples are lists
        own = (self.files.index(file), asked, pipe.model.hash(), settings)
        then = {k: v for k, v in known["settings"].items() if k in ("dtype", "embeddings")}
        return own == (known["index"], known["request"], known["model"].get("hash"), then)


def plan(
    prompts: PromptSet,
    model: Model,
    folder: Path,
    ending: str = ".png",
    seed: int | None = None,
    **settings: Any,
) -> list[Task]:
    """Check every prompt and say where its pictures go, before anything is drawn.

    Args:
        seed: of the first picture of all; None: what the prompt set says.
        settings: fields of a request that win over those of the prompt set.

    Raises:
        InvalidRequest: for a prompt or setting that cannot be drawn, or a folder that cannot be
            written into.
    """
    check_folder(folder)
    entries = [entry | settings for entry in prompts.entries]
    asked = [Request(**entry) for entry in entries]
    seeds = prompts.seeds([request.num_images for request in asked], seed)
    digits = len(str(len(entries)))
    tasks = []
    for number, (entry, first) in enumerate(zip(entries, seeds, strict=True), 1):
        request = Request(**(entry | {"seed": first})).resolve(model)
        file = folder / f"{number:0{digits}d}-{in_name(entry['prompt'])}{ending}"
        metadata.check_fits(metadata.picture_format(file), request)
        tasks.append(Task(request, metadata.numbered(file, request.num_images)))
    return tasks


def draw(
    pipe: LatentDiffusion, tasks: Sequence[Task], batch_size: int = 1, quality: int | None = None
) -> Iterator[list[Path]]:
    """Draw tasks in their order and yield the files of each as they are written.

    Args:
        batch_size: alike prompts in a row are drawn together while their pictures are no more.
        quality: 1 to 100, for the formats that lose detail.
    """
    quality = quality if quality is not None else metadata.QUALITY
    for group in _groups(tasks, batch_size):
        requests = [task.request for task in group]
        *_, last = pipe.draw(together(requests) if len(group) > 1 else requests[0])
        assert last.result is not None
        parts = pipe.split(last.result, requests) if len(group) > 1 else [last.result]
        for task, part in zip(group, parts, strict=True):
            for k, file in enumerate(task.files):
                format = metadata.picture_format(file)
                write_file(file, metadata.encode_result(part, k, format, quality))
            yield task.files


def _groups(tasks: Sequence[Task], batch_size: int) -> Iterator[list[Task]]:
    group: list[Task] = []
    for task in tasks:
        pictures = sum(len(one.files) for one in [*group, task])
        if group and (pictures > batch_size or not can_join(group[0].request, task.request)):
            yield group
            group = []
        group.append(task)
    if group:
        yield group
