"""Everything latentgen raises on purpose.

    LatentgenError
    ├── InvalidRequest (also a ValueError)   what was asked for cannot be done as asked
    ├── DecodeError                          the model drew nothing: black or not finite
    ├── DataError                            pictures or captions that cannot be trained on
    └── TrainingError                        a run that cannot start, go on or be trusted

An `InvalidRequest` is raised before any weights are read. The command line ends with status 2 for
it and with status 1 for anything else.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

__all__ = ["DataError", "DecodeError", "InvalidRequest", "LatentgenError", "TrainingError"]


class LatentgenError(Exception):
    """The parent of all errors that latentgen raises on purpose."""


class InvalidRequest(LatentgenError, ValueError):
    """A request that cannot be carried out as it stands.

    Args:
        field: the name of the argument, as in Python (`num_inference_steps`).
        value: what was given; shown shortened.
        hint: what would work.
    """

    def __init__(self, field: str, value: object, hint: str):
        self.field = field
        self.value = value
        self.hint = hint
        super().__init__(f"{field}={_shown(value)}: {hint}")


class DecodeError(LatentgenError):
    """The decoded picture is black or has values that are not finite, also in float32."""


class DataError(LatentgenError):
    """Pictures or captions that cannot be trained on or measured; names every one of them."""


class TrainingError(LatentgenError):
    """A checkpoint that is missing, damaged or of another run, or a loss that is not finite."""


def _shown(value: Any) -> str:
    value = str(value) if isinstance(value, PurePath) else value
    if hasattr(value, "getbands"):  # of Pillow, which is not imported for this
        return f"a picture of {value.width} x {value.height}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:37]}...{text[-40:]}"  # a path ends in its name
