"""latentgen: pictures from text with latent diffusion, offline from the first minute.

    import latentgen

    latentgen.generate("a red apple", seed=7).save("apple.png")

Importing this package does not import torch; using it does.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from . import startup
from .errors import DecodeError, InvalidRequest, LatentgenError
from .modelfolder import DEFAULT_MODEL

if TYPE_CHECKING:
    from .pipeline import LatentDiffusion, Result, generate, img2img, inpaint

__version__ = "0.1.0"
__all__ = [
    "DEFAULT_MODEL",
    "DecodeError",
    "InvalidRequest",
    "LatentDiffusion",
    "LatentgenError",
    "Result",
    "generate",
    "img2img",
    "inpaint",
]

_FROM_PIPELINE = {"LatentDiffusion", "Result", "generate", "img2img", "inpaint"}


def __getattr__(name: str) -> Any:
    if name in _FROM_PIPELINE:
        # Without torchvision, importing diffusers makes transformers print a page of warnings
        # about picture processors that nothing here uses.
        logger = logging.getLogger("transformers")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with startup.importing():
                from . import pipeline
        finally:
            logger.setLevel(level)
        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
