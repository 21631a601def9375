"""Prompts to embeddings.

A prompt of any length is encoded whole: CLIP reads 77 tokens at a time, so a longer prompt becomes
several chunks of 75 tokens, each between its own start and end token, and the U-Net attends to all
of them. Nothing is cut. This module does not know about guidance or batches of pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["encode_prompts"]


@torch.inference_mode()
def encode_prompts(tokenizer, text_encoder, prompts: Sequence[str], negatives: Sequence[str]):
    """Encode prompts and their negatives to embeddings of one common length.

    Args:
        prompts: B texts.
        negatives: B texts, or none when there is no guidance.

    Returns:
        Two tensors, (B, 77 * chunks, dim) and (len(negatives), 77 * chunks, dim).
    """
    size = tokenizer.model_max_length
    ids = [_token_ids(tokenizer, text) for text in prompts]
    negative_ids = [_token_ids(tokenizer, text) for text in negatives]
    chunks = max(1, *(math.ceil(len(row) / (size - 2)) for row in [*ids, *negative_ids]))
    return tuple(_encode(tokenizer, text_encoder, rows, chunks) for rows in (ids, negative_ids))


def _token_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _encode(tokenizer, text_encoder, rows: list[list[int]], chunks: int) -> Tensor | None:
    if not rows:
        return None
    size = tokenizer.model_max_length
    table = torch.full((len(rows), chunks, size), tokenizer.pad_token_id)
    attention = torch.zeros_like(table)
    for row, ids in enumerate(rows):
        for chunk in range(chunks):
            part = ids[chunk * (size - 2) : (chunk + 1) * (size - 2)]
            part = [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
            table[row, chunk, : len(part)] = torch.tensor(part)
            attention[row, chunk, : len(part)] = 1

    uses_mask = getattr(text_encoder.config, "use_attention_mask", False)
    device = text_encoder.device
    hidden = text_encoder(
        table.flatten(0, 1).to(device),
        attention_mask=attention.flatten(0, 1).to(device) if uses_mask else None,
    )[0]  # (B * chunks, 77, dim)
    return hidden.unflatten(0, (len(rows), chunks)).flatten(1, 2)
