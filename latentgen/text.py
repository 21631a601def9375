"""Prompts to embeddings.

A prompt of any length is encoded whole: CLIP reads 77 tokens at a time, so a longer prompt becomes
several chunks of 75 tokens, each between its own start and end token, and the U-Net attends to all
of them. Nothing is cut. What `emphasis` says counts more has its states multiplied. This module
does not know about guidance or batches of pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import emphasis

__all__ = ["by_length", "encode_prompts"]

Chunk = list[tuple[int, float]]  # tokens and how much they count


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
    size = _chunk_length(tokenizer, text_encoder)
    positive = [_chunks(tokenizer, size, text) for text in prompts]
    negative = [_chunks(tokenizer, size, text) for text in negatives]
    for one, other in zip(positive, negative, strict=False):  # no negatives, or as many
        one += [[] for _ in range(len(other) - len(one))]
        other += [[] for _ in range(len(one) - len(other))]
    return (
        _encode(tokenizer, text_encoder, size, positive),
        _encode(tokenizer, text_encoder, size, negative),
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


def _chunks(tokenizer, size: int, text: str) -> list[Chunk]:
    """The tokens of a text without start and end, at most `size - 2` in a chunk."""
    chunks = []
    for section in emphasis.read(text):
        tokens = [
            (token, weight)
            for piece, weight in section
            for token in tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        ]
        starts = range(0, max(1, len(tokens)), size - 2)
        chunks += [tokens[start : start + size - 2] for start in starts]
    return chunks


def _encode(tokenizer, text_encoder, size: int, texts: list[list[Chunk]]) -> list[Tensor]:
    """The token states of each text, (77 * its chunks, dim)."""
    if not texts:
        return []
    chunks = [chunk for text in texts for chunk in text]
    table = torch.full((len(chunks), size), tokenizer.pad_token_id)
    attention = torch.zeros_like(table)
    weights = torch.ones(table.shape)
    for row, chunk in enumerate(chunks):
        ids = [tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id]
        table[row, : len(ids)] = torch.tensor(ids)
        attention[row, : len(ids)] = 1
        weights[row, 1 : len(ids) - 1] = torch.tensor([weight for _, weight in chunk])

    uses_mask = getattr(text_encoder.config, "use_attention_mask", False)
    device = text_encoder.device
    hidden = text_encoder(
        table.to(device), attention_mask=attention.to(device) if uses_mask else None
    )[0]  # (all chunks, 77, dim)
    hidden = _weighted(hidden, weights.to(hidden))
    return [states.flatten(0, 1) for states in hidden.split([len(text) for text in texts])]


def _weighted(hidden: Tensor, weights: Tensor) -> Tensor:
    """The states times their weights, and each chunk's mean as it was before, as the WebUI does it.

    Where the states have no mean to speak of (some text encoders' are centred), there is none to
    restore: the quotient of two numbers near zero would be any number.

    Args:
        hidden: (chunks, tokens, dim).
        weights: (chunks, tokens).
    """
    rows = (weights != 1).any(1)
    if not rows.any():
        return hidden
    before = hidden[rows]
    after = before * weights[rows, :, None]
    mean, mean_after = before.mean((1, 2)), after.mean((1, 2))
    tells = (mean.abs() > 0.02 * before.std((1, 2))) & (mean * mean_after > 0)
    scale = torch.where(tells, mean / mean_after, torch.ones_like(mean))
    hidden = hidden.clone()
    hidden[rows] = after * scale[:, None, None]
    return hidden
