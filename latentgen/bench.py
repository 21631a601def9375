"""How fast this machine draws and how much memory that takes: settings side by side.

Every measurement is a process of its own, so it starts cold and its peak memory is its own. The
settings take turns, round after round, so that whatever else the machine does meets all of them;
figures are medians over the rounds, and `ratio` is the median of each round's own ratio to the
first settings.

    start     seconds from the start of the process to a model that is ready
    first     seconds of the first call: what is prepared once is in it
    picture   seconds for each picture of later calls
    memory    bytes: on CUDA the most that was allocated there, elsewhere
              the most that the process held

Nothing here imports torch before a measurement's own process does.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import yaml

from . import startup
from .errors import InvalidRequest, LatentgenError
from .modelfolder import Model
from .request import OF_PICTURES, Request

__all__ = ["Row", "compare", "read_settings", "report"]

CALLS = 2  # after the first
LOADING = ("device", "dtype", "attention", "config")
OTHERS = {item.name for item in fields(Request)} - OF_PICTURES - {"prompt", "output_type", "loras"}
DRAWING = {"steps": "num_inference_steps", **{name: name for name in OTHERS}}
FIGURES = ("start", "first", "picture", "memory")


@dataclass
class Row:
    """Some settings and what was measured with them; `rounds` holds each measurement."""

    settings: dict[str, Any]
    rounds: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    @property
    def name(self) -> str:
        """The settings as they are written: `steps=10,num_images=4`."""
        return ",".join(f"{key}={value}" for key, value in self.settings.items()) or "as it is"

    def median(self, figure: str) -> float | None:
        """Of all rounds; None if nothing was measured."""
        if not self.rounds:
            return None
        return statistics.median(measured[figure] for measured in self.rounds)

    def ratio(self, other: Row) -> float | None:
        """How many times longer than `other` a picture takes; None if one was not measured."""
        pairs = list(zip(self.rounds, other.rounds, strict=False))
        if not pairs:
            return None
        return statistics.median(mine["picture"] / its["picture"] for mine, its in pairs)


def read_settings(text: str, model: Model, shared: dict[str, Any]) -> Row:
    """Settings to compare, as text: `steps=10,num_images=4` or `dtype=bfloat16`.

    Args:
        shared: settings of all rows, which these win over.

    Raises:
        InvalidRequest: they are not of this form, or cannot be drawn.
    """
    settings: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in (*DRAWING, *LOADING):
            hint = f"NAME=VALUE, with commas between them; names are {', '.join(names())}"
            raise InvalidRequest("compare", part, hint)
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InvalidRequest("compare", part, "its value cannot be read") from error
    _request(shared | settings).resolve(model)
    return Row(settings)


def names() -> list[str]:
    """What settings can name."""
    return sorted({*DRAWING, *LOADING} - {"num_inference_steps"})


def compare(
    rows: Sequence[Row], model: str, shared: dict[str, Any], rounds: int
) -> Iterator[tuple[int, Row]]:
    """Measure all rows in turn, `rounds` times; yields the round and the row before each.

    A row that fails tells it in `error` and is not measured again; without the first, to which all
    are compared, nothing is.
    """
    for number in range(rounds):
        for row in rows:
            if row.error is None and rows[0].error is None:
                yield number, row
                try:
                    row.rounds.append(_measured_apart(model, shared | row.settings))
                except RuntimeError as error:
                    row.error = str(error)


def report(rows: Sequence[Row], model: str, shared: dict[str, Any]) -> dict[str, Any]:
    """All that was measured, and on what, as JSON."""
    machine = {
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
    }
    measured = [one for row in rows for one in row.rounds]
    facts = {key: measured[0][key] for key in ("device", "threads", "versions")} if measured else {}
    table = []
    for row in rows:
        figures = {name: row.median(name) for name in FIGURES} | {"ratio": row.ratio(rows[0])}
        table.append({"name": row.name, **figures, **asdict(row)})
    return {"model": model, "settings": shared, "machine": machine | facts, "rows": table}


def _request(settings: dict[str, Any]) -> Request:
    drawing = {DRAWING[key]: value for key, value in settings.items() if key in DRAWING}
    return Request(prompt="a red apple", **({"seed": 0} | drawing))


def _measured_apart(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in a process of its own.

    Raises:
        RuntimeError: it ended without one; the message is its own.
    """
    command = [sys.executable, "-m", "latentgen.bench", model, json.dumps(settings)]
    ended = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if ended.returncode != 0:
        lines = ended.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"ended with status {ended.returncode}")
    return json.loads(ended.stdout.splitlines()[-1])


def _measure(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    import psutil
    import torch

    from . import metadata
    from .pipeline import LatentDiffusion

    pipe = LatentDiffusion.from_pretrained(
        model, **{key: value for key, value in settings.items() if key in LOADING}
    )
    startup.end()
    start = time.time() - psutil.Process().create_time()
    request = pipe.resolve(_request(settings))
    seconds = []
    for _ in range(1 + CALLS):
        began = time.perf_counter()
        *_, last = pipe.draw(request)
        seconds.append(time.perf_counter() - began)
    assert last.result is not None
    return {
        "start": start,
        "first": seconds[0],
        "picture": statistics.median(seconds[1:]) / len(last.result.images),
        "memory": _peak_memory(pipe.device),
        "device": (torch.cuda.get_device_name if pipe.device.type == "cuda" else str)(pipe.device),
        "threads": torch.get_num_threads(),
        "versions": metadata.versions(),
    }


def _peak_memory(device) -> int:
    """In bytes."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    startup.begin()  # as the command line does
    try:
        print(json.dumps(_measure(sys.argv[1], json.loads(sys.argv[2]))))
    except LatentgenError as failed:
        sys.exit(str(failed))
