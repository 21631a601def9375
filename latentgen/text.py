"""Prompts to embeddings.

A prompt of any length is encoded whole: CLIP reads 77 tokens at a time, so a longer prompt becomes
several chunks of 75 tokens, each between its own start and end token, and the U-Net attends to all
of them. Nothing is cut. This module does not know about guidance or batches of pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["by_length", "encode_prompts"]


@torch.inference_mode()
def encode_prompts(
    tokenizer, text_encoder, prompts: Sequence[str], negatives: Sequence[str]
) -> tuple[list[Tensor], list[Tensor]]:
    """Encode prompts and their negatives. A prompt and its own negative get one length, which no
    other prompt of the call changes.

    Args:
        prompts: B texts.
        negatives: B texts, or none when there is no guidance.

    Returns:
        B embeddings and as many as there are negatives, each (77 * its chunks, dim).
    """
    ids = [_token_ids(tokenizer, text) for text in prompts]
    negative_ids = [_token_ids(tokenizer, text) for text in negatives]
    beside = negative_ids or [[]] * len(ids)
    longest = [max(len(one), len(other)) for one, other in zip(ids, beside, strict=True)]
    chunks = [
        max(1, math.ceil(count / (_chunk_length(tokenizer, text_encoder) - 2))) for count in longest
    ]
    return (
        _encode(tokenizer, text_encoder, ids, chunks),
        _encode(tokenizer, text_encoder, negative_ids, chunks),
    )


def by_length(unet: Callable[..., tuple[Tensor, ...]], lengths: Sequence[int]) -> Callable:
    """The U-Net for embeddings of several lengths, padded at the end to one.

    Rows of one length go through it together, without the padding: it would attend to that, and a
    picture would depend on what else is drawn with it.

    Args:
        lengths: tokens of each row of the U-Net's batch.
    """
    groups = {length: [i for i, n in enumerate(lengths) if n == length] for length in lengths}
    order = torch.tensor([i for rows in groups.values() for i in rows]).argsort()

    def call(sample: Tensor, t: Tensor, encoder_hidden_states: Tensor, **kwargs):
        parts = []
        for length, rows in groups.items():
            # what is a tensor has a row for each picture: `timestep_cond`
            own = {k: v[rows] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            words = encoder_hidden_states[rows, :length]
            parts.append(unet(sample[rows], t, encoder_hidden_states=words, **own)[0])
        return (torch.cat(parts)[order.to(sample.device)],)

    return call


def _chunk_length(tokenizer, text_encoder) -> int:
    """77; some tokenizers do not know their own length."""
    known = tokenizer.model_max_length
    return min(known, getattr(text_encoder.config, "max_position_embeddings", known))


def _token_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _encode(tokenizer, text_encoder, texts: list[list[int]], chunks: Sequence[int]) -> list[Tensor]:
    """The token states of each text, cut into its number of chunks or filled up to it."""
    if not texts:
        return []
    size = _chunk_length(tokenizer, text_encoder)
    parts = [
        [tokenizer.bos_token_id, *ids[start : start + size - 2], tokenizer.eos_token_id]
        for ids, count in zip(texts, chunks, strict=True)
        for start in range(0, count * (size - 2), size - 2)
    ]
    table = torch.full((len(parts), size), tokenizer.pad_token_id)
    attention = torch.zeros_like(table)
    for row, part in enumerate(parts):
        table[row, : len(part)] = torch.tensor(part)
        attention[row, : len(part)] = 1

    uses_mask = getattr(text_encoder.config, "use_attention_mask", False)
    device = text_encoder.device
    hidden = text_encoder(
        table.to(device), attention_mask=attention.to(device) if uses_mask else None
    )[0]  # (all chunks, 77, dim)
    return [states.flatten(0, 1) for states in hidden.split(list(chunks))]
