"""Prompts to embeddings.

A prompt of any length is encoded whole: CLIP reads 77 tokens at a time, so a longer prompt becomes
several chunks of up to 75 tokens, each between its own start and end token, and the U-Net attends
to all of them. Nothing is left out. What `emphasis` says counts more has its states multiplied.
SDXL reads a prompt with two encoders. This module does not know about guidance or batches of
pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import emphasis

__all__ = ["Words", "by_length", "encode_prompts"]

Chunk = list[tuple[int, float]]  # tokens and how much they count

REACH = 20  # tokens: so much shorter a chunk may be, to end at a comma or a word


@dataclass(frozen=True)
class Words:
    """What a U-Net is told of one text.

    Attributes:
        states: (77 * chunks, dim), of its tokens; two encoders' side by side in `dim`.
        pooled: (dim,), of the whole text (of its first chunk), if there are two encoders.
    """

    states: Tensor
    pooled: Tensor | None = None

    def silenced(self) -> Words:
        """As many zeros: what SDXL was trained to take for no text."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return Words(torch.zeros_like(self.states), pooled)


@torch.inference_mode()
def encode_prompts(
    encoders: Sequence[tuple[Any, Any]],
    prompts: Sequence[str],
    negatives: Sequence[str],
    device: torch.device | None = None,
) -> tuple[list[Words], list[Words]]:
    """Encode prompts and their negatives. A prompt and its own negative get one length, which no
    other prompt of the call changes.

    Args:
        encoders: a tokenizer and its text encoder; of SDXL two pairs, of which the second pools.
        prompts: B texts.
        negatives: B texts, or none when there is no guidance.
        device: where the encoders run; None: where their weights are, if they are not offloaded.
    """
    read = [[_read(*encoder, texts) for texts in (prompts, negatives)] for encoder in encoders]
    for family in zip(*(texts for kinds in read for texts in kinds if texts), strict=True):
        longest = max(map(len, family))
        for chunks in family:
            chunks += [[] for _ in range(longest - len(chunks))]
    positive, negative = (_encode_all(encoders, texts, device) for texts in zip(*read, strict=True))
    return positive, negative


def _encode_all(
    encoders: Sequence[tuple[Any, Any]],
    texts: Sequence[list[list[Chunk]]],
    device: torch.device | None,
) -> list[Words]:
    """What each encoder makes of the texts as it has read them; of two, side by side."""
    if len(encoders) == 1:
        return _encode(*encoders[0], texts[0], device)
    first, second = (
        _encode(*encoder, own, device, of_two=True)
        for encoder, own in zip(encoders, texts, strict=True)
    )
    return [
        Words(torch.cat([one.states, two.states], dim=-1), two.pooled)
        for one, two in zip(first, second, strict=True)
    ]


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
            own = {name: _of_rows(value, rows) for name, value in kwargs.items()}
            words = encoder_hidden_states[rows, :length]
            parts.append(unet(sample[rows], t, encoder_hidden_states=words, **own)[0])
        return (torch.cat(parts)[order.to(sample.device)],)

    return call


def _of_rows(value: Any, rows: list[int]) -> Any:
    """What is a tensor has a row for each picture: `timestep_cond`, `added_cond_kwargs`."""
    if isinstance(value, dict):
        return {name: _of_rows(part, rows) for name, part in value.items()}
    return value[rows] if isinstance(value, Tensor) else value


def _chunk_length(tokenizer, text_encoder) -> int:
    """77; some tokenizers do not know their own length."""
    known = tokenizer.model_max_length
    return min(known, getattr(text_encoder.config, "max_position_embeddings", known))


def _read(tokenizer, text_encoder, texts: Sequence[str]) -> list[list[Chunk]]:
    """The chunks of each text."""
    size = _chunk_length(tokenizer, text_encoder)
    return [_chunks(tokenizer, size, text) for text in texts]


def _chunks(tokenizer, size: int, text: str) -> list[Chunk]:
    """The tokens of a text without start and end, at most `size - 2` in a chunk."""
    chunks = []
    for section in emphasis.read(text):
        tokens = [
            (token, weight)
            for piece, weight in section
            for token in tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        ]
        names = tokenizer.convert_ids_to_tokens([token for token, _ in tokens])
        while len(tokens) > size - 2:
            end = _end(names, size - 2, tokenizer.added_tokens_encoder.keys())
            chunks.append(tokens[:end])
            tokens, names = tokens[end:], names[end:]
        chunks.append(tokens)
    return chunks


def _end(names: list[str], size: int, added: Set[str]) -> int:
    """How many of more than `size` tokens make a chunk: as in the WebUI up to the last comma, if it
    is near, or else up to a word's end, and never a part of a textual inversion."""
    inside = {name for name in added if name.rpartition("_")[0] in added}
    ends = [i for i in range(size, 0, -1) if names[i] not in inside]
    near = [i for i in ends if i > size - REACH]
    commas = [i for i in near if ",</w>" in names[i - 1 : i + 1]]  # it may begin the next one, too
    words = [i for i in near if names[i - 1].endswith("</w>") or names[i - 1] in added]
    return [*commas, *words, *ends, size][0]


def _encode(
    tokenizer,
    text_encoder,
    texts: list[list[Chunk]],
    device: torch.device | None,
    of_two: bool = False,
) -> list[Words]:
    """`of_two`: as SDXL reads, from the last layer but one, and with what is pooled."""
    if not texts:
        return []
    size = _chunk_length(tokenizer, text_encoder)
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
    device = device if device is not None else text_encoder.device
    options = {"output_hidden_states": True} if of_two else {}
    mask = attention.to(device) if uses_mask else None
    told = text_encoder(table.to(device), attention_mask=mask, **options)
    hidden = told.hidden_states[-2] if of_two else told[0]  # (all chunks, 77, dim)
    hidden = _weighted(hidden, weights.to(hidden))
    counts = [len(text) for text in texts]
    states = [part.flatten(0, 1) for part in hidden.split(counts)]
    whole = told.get("text_embeds") if of_two else None  # (all chunks, other dim)
    if whole is None:  # as of the first of two
        return [Words(part) for part in states]
    firsts = [part[0] for part in whole.split(counts)]
    return [Words(*both) for both in zip(states, firsts, strict=True)]


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
