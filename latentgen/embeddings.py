"""Textual inversion (arXiv 2208.01618): files that hold a word, and words in tokenizers and texts.

diffusers  {token: (n, dim)} or {token: (dim,)}
WebUI      {"emb_params": (n, dim)}, called by the name of the file
SDXL       {"clip_l": (n, dim), "clip_g": (n, other dim)}, of its two text encoders, called so too

A word of n vectors is n tokens: `word`, `word_1` and so on. One of letters is found only where it
stands alone: `cat` is not in `concatenate`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AddedToken

from .errors import InvalidRequest
from .modelfolder import CONVERT, PICKLES, read_header

__all__ = ["add_word", "check_word", "parts_of_word", "read_embedding", "said"]


def read_embedding(path: str | Path, token: str | None = None) -> tuple[str, list[Tensor]]:
    """The word and its vectors, (n, dim) for each text encoder.

    Args:
        token: the word; None: the one in the file, or the file's name without its ending.

    Raises:
        InvalidRequest: no such file, or not a textual inversion.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise InvalidRequest("path", path, "the path of a .safetensors file")
    file = Path(path).expanduser()
    if file.suffix.lower() in PICKLES:
        raise InvalidRequest("path", str(file), CONVERT)
    shapes = read_header(file, "path", "embedding")
    is_xl = shapes.keys() == {"clip_l", "clip_g"}
    if len(shapes) != 1 and not is_xl:
        hint = f"a textual inversion holds one word, this file {len(shapes)} tensors"
        raise InvalidRequest("path", str(file), hint)
    tensors = load_file(file)
    for vectors in tensors.values():
        if vectors.ndim not in (1, 2) or vectors.numel() == 0 or not vectors.is_floating_point():
            hint = f"not vectors, but {tuple(vectors.shape)} of {vectors.dtype}"
            raise InvalidRequest("path", str(file), hint)
        if not torch.isfinite(vectors.float()).all():
            raise InvalidRequest("path", str(file), "it has numbers that are not finite")
    each = [one.reshape(-1, one.shape[-1]) for _, one in sorted(tensors.items(), reverse=True)]
    if len({len(one) for one in each}) > 1:
        hint = f"its two parts have {len(each[0])} and {len(each[1])} vectors"
        raise InvalidRequest("path", str(file), hint)
    if token is None:
        (word, *_) = tensors
        token = file.stem if word in ("emb_params", "*", "clip_l", "clip_g") else word
    if not isinstance(token, str) or token.split() != [token]:
        raise InvalidRequest("token", token, "a word without spaces")
    return token, each


def add_word(tokenizer, token: str, count: int, field: str = "token") -> list[int]:
    """Teach the tokenizer a word of `count` vectors.

    Returns:
        The ids of its tokens.

    Raises:
        InvalidRequest: see `check_word`.
    """
    check_word(tokenizer, token, count, field)
    alone, parts = _stands_alone(token), parts_of_word(token, count)
    tokenizer.add_tokens([AddedToken(part, single_word=alone) for part in parts])
    return tokenizer.convert_tokens_to_ids(parts)


def check_word(tokenizer, token: str, count: int, field: str = "token") -> None:
    """Refuse a word of `count` vectors that the tokenizer cannot be taught.

    Raises:
        InvalidRequest: it has spaces, or the tokenizer has it already, perhaps as an ordinary word.
    """
    if token.split() != [token]:
        raise InvalidRequest(field, token, "a word without spaces, like <this>")
    parts, known = parts_of_word(token, count), tokenizer.get_vocab()
    for part in parts:
        if part in known or len(tokenizer(part, add_special_tokens=False).input_ids) == 1:
            hint = "the tokenizer has this word already; choose another one, like <this>"
            raise InvalidRequest(field, part, hint)


def parts_of_word(token: str, count: int) -> list[str]:
    """The tokens of a word of `count` vectors, named as diffusers names them."""
    return [token, *(f"{token}_{i}" for i in range(1, count))]


def said(*tokens: str) -> re.Pattern[str]:
    """Where a text says one of these words, as the tokenizer finds them: the longest that begins
    there."""
    longest_first = sorted(tokens, key=len, reverse=True)
    words = (
        rf"(?<!\w){re.escape(token)}(?!\w)" if _stands_alone(token) else re.escape(token)
        for token in longest_first
    )
    return re.compile("|".join(words) or "(?!)", re.IGNORECASE)


def _stands_alone(token: str) -> bool:
    return re.fullmatch(r"\w(.*\w)?", token) is not None
