"""The frozen half of a latent diffusion model, run once before the first step.

It turns pictures into latents and captions into token states, which a run caches on disk, so that a
step needs the U-Net only.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from latentgen.training.data import Batch, cached, to_signal, weights_key
from latentgen.training.pictures import Picture


class Encoders:
    """An autoencoder, a text encoder and its tokenizer, where they are and as precise as they
    are."""

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
    ) -> None:
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self._shift = getattr(vae.config, "shift_factor", None) or 0.0
        self._scale = vae.config.scaling_factor
        self.vae_key = f"{weights_key(vae)} {self._shift} {self._scale}"
        self.text_key = weights_key(text_encoder)
        self.keys = (self.vae_key, self.text_key)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) bytes to latents, (B, C, H/8, W/8), scaled as the pipelines expect them."""
        encoded = self.vae.encode(to_signal(pixels).to(self.vae.device, self.vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return ((latents - self._shift) * self._scale).float().cpu()

    def token_ids(self, texts: list[str]) -> Tensor:
        """Padded to full length and cut there, as the pipelines do it: (N, 77)."""
        return self.tokenizer(
            texts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids

    @torch.no_grad()
    def states(self, texts: list[str]) -> Tensor:
        """The token states of each text, without a mask, as the pipelines make them: (N, 77, D),
        in half precision to save memory."""
        parts = self.token_ids(texts).to(self.text_encoder.device).split(128)
        return torch.cat([self.text_encoder(part)[0].half().cpu() for part in parts])

    def cached_states(self, texts: list[str], output_dir: Path) -> Tensor:
        """`states`, kept in the run's cache for these texts in this order."""
        key = f"{self.text_key} {self.token_ids(texts).tolist()}"
        return cached(output_dir, key, lambda: self.states(texts))


class Captions:
    """What the U-Net gets to read of all captions: a row of the data set has several, row 0 of
    `words` is ""."""

    def __init__(self, pictures: list[Picture], encode: Callable[[list[str]], Tensor]) -> None:
        """`encode`: texts to (N, 77, D) token states or (N, 77) token ids."""
        texts = {"": 0}
        choices = [
            [texts.setdefault(text, len(texts)) for text in picture.captions]
            for picture in pictures
        ]
        self.words = encode(list(texts))  # (captions, 77, …)
        self.count = torch.tensor([len(rows) for rows in choices])  # (N,)
        self.choices = torch.zeros((len(pictures), int(self.count.max())), dtype=torch.long)
        for picture, rows in enumerate(choices):
            self.choices[picture, : len(rows)] = torch.tensor(rows)

    def draw(self, batch: Batch, empty: float) -> Tensor:
        """One caption of each row, or "" for the proportion `empty`: (B, 77, …)."""
        choice = (batch.uniform() * self.count[batch.rows]).long()
        rows = self.choices[batch.rows, choice]
        return self.words[torch.where(batch.uniform() < empty, 0, rows)]

    def first(self, rows: Tensor) -> Tensor:
        """The first caption of each row: (B, 77, …)."""
        return self.words[self.choices[rows, 0]]
