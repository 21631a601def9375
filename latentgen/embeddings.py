"""Textual inversion files (arXiv 2208.01618): a word, and the vectors it stands for.

diffusers  {token: (n, dim)} or {token: (dim,)}
WebUI      {"emb_params": (n, dim)}, called by the name of the file
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import InvalidRequest
from .modelfolder import CONVERT, PICKLES

__all__ = ["read_embedding"]


def read_embedding(file: Path, token: str | None = None) -> tuple[str, Tensor]:
    """The word and its vectors (n, dim).

    Args:
        token: the word; None: the one in the file, or the file's name without its ending.

    Raises:
        InvalidRequest: no such file, or not a textual inversion.
    """
    if file.suffix.lower() in PICKLES:
        raise InvalidRequest("path", str(file), CONVERT)
    try:
        found = load_file(file)
    except (SafetensorError, OSError) as error:
        hint = f"damaged, missing or not a safetensors file ({error})"
        raise InvalidRequest("path", str(file), hint) from error
    if len(found) != 1:
        hint = f"a textual inversion holds one word, this file {len(found)} tensors"
        raise InvalidRequest("path", str(file), hint)
    ((word, vectors),) = found.items()
    if vectors.ndim not in (1, 2) or not torch.isfinite(vectors).all():
        hint = f"not vectors, but {tuple(vectors.shape)}, or not finite"
        raise InvalidRequest("path", str(file), hint)
    if token is None:
        token = file.stem if word in ("emb_params", "*") else word
    if not token or token != token.strip():
        raise InvalidRequest("token", token, "a word without spaces around it")
    return token, vectors.reshape(-1, vectors.shape[-1])
