"""Teach the decoder of a finished model what its U-Net means.

    accelerate launch training/train_decoder.py --config training/configs/decoder.yaml

A decoder is trained on latents of pictures, and then gets those of a U-Net, which are a little off:
details melt. Here it sees both. The model draws each picture of the data set once, by its caption;
half of what the decoder learns from are these latents with the picture that was meant, if it is the
nearest of all; the other half are latents of pictures (all of `--kept_file`), so that it goes on
reconstructing.

Encoder, text encoder and U-Net stay: latents mean what they meant, and LoRAs go on to fit. The
result is the same model folder with another decoder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from train_vae import measure

from latentgen.errors import TrainingError
from latentgen.images import contact_sheet
from latentgen.pipeline import LatentDiffusion
from latentgen.training.config import DataConfig, flag, parse_config
from latentgen.training.data import (
    Batch,
    cached,
    pixel_batches,
    random_crops,
    read_data,
    to_pictures,
    to_signal,
    weights_key,
)
from latentgen.training.encoders import Encoders
from latentgen.training.objective import peak_signal_to_noise, reconstruction_loss
from latentgen.training.pictures import Picture, check_pictures, read_folder
from latentgen.training.run import main, replace_part, run, start

CELL = 8  # pixels to a side of a latent
DRAWN_AT_ONCE = 16


@dataclass(kw_only=True)
class DecoderConfig(DataConfig):
    pretrained_model_name_or_path: Path = flag(help="the finished model's folder")
    kept_file: str = flag("metadata.jsonl", help="listing of pictures to go on reconstructing")
    num_inference_steps: int = flag(10, help="of the drawings that it learns from")
    chroma_weight: float = flag(5.0, help="weight of colour in the loss")
    crop_size: int = flag(64, help="side of the crops it learns from, in pixels")
    max_train_steps: int = flag(500, help="steps of the optimizer")
    optimizer: Literal["adamw", "muon"] = flag("muon", help="adamw needs more steps")
    train_batch_size: int = flag(4, help="drawings, and as many pictures, a process and step")
    learning_rate: float = flag(2e-4, help="its highest value")
    lr_warmup_steps: int = flag(50, help="steps of a linear rise from zero")
    ema_decay: float = flag(0.99, help="of the averaged weights, which are the result")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.pretrained_model_name_or_path / "vae").is_dir():
            raise ValueError(f"{self.pretrained_model_name_or_path} is no model folder")
        if self.crop_size % CELL or not 0 < self.crop_size <= self.resolution:
            raise ValueError(
                f"crop_size: {self.crop_size} is no multiple of {CELL} up to the resolution, "
                f"{self.resolution}"
            )


class Decoder(nn.Module):
    """Latents (B, C, h, w) to pictures (B, 3, 8 h, 8 w) in [-1, 1]; only the decoder learns."""

    def __init__(self, vae: AutoencoderTiny) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        vae.decoder.requires_grad_(True)

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample.float()


def train_decoder() -> None:
    config = parse_config(DecoderConfig, __doc__.split("\n")[0])
    pictures, unseen, data = read_data(config, captions=True, at_most=256)
    kept = check_pictures(
        read_folder(config.train_data_dir, config.kept_file),
        captions=False,
        allow=config.allow,
        seen={},
    )
    accelerator = start(config)
    device = accelerator.device
    folder = config.pretrained_model_name_or_path
    pipe = LatentDiffusion.from_pretrained(folder, device, torch.float32)
    if not isinstance(pipe.vae, AutoencoderTiny):
        raise TrainingError(f"{folder} has another autoencoder than AutoencoderTiny")
    key = " ".join(map(weights_key, (pipe.vae, pipe.text_encoder, pipe.unet)))

    def read(chosen: list[Picture]) -> Tensor:
        return torch.cat(list(pixel_batches(chosen, config.square)))  # (N, 3, R, R)

    pixels, held_out = read(pictures), read(unseen)

    def draw_all() -> Tensor:
        """The model's latents of each picture's caption: (N, C, h, w). Picture k takes its k-th
        caption, so that all wordings are there, and the seed k."""
        prompts = [one.captions[k % len(one.captions)] for k, one in enumerate(pictures)]
        settings = {
            "num_inference_steps": config.num_inference_steps,
            "height": config.resolution,
            "width": config.resolution,
            "output_type": "latent",
        }
        parts = [
            pipe.generate(prompts[k : k + DRAWN_AT_ONCE], seed=k, **settings).images.cpu()
            for k in tqdm(range(0, len(prompts), DRAWN_AT_ONCE), "drawing", mininterval=30)
        ]
        return torch.cat(parts)

    def encode_all() -> Tensor:
        return torch.cat([encoders.latents(part) for part in pixels.split(64)])

    encoders = Encoders(pipe.vae, pipe.text_encoder, pipe.tokenizer)
    drawing = f"{data} {key} {config.num_inference_steps} {config.resolution}"
    with accelerator.main_process_first():
        drawn = cached(config.output_dir, drawing, draw_all)
        encoded = cached(config.output_dir, f"{data} {encoders.vae_key}", encode_all)
    known = torch.cdist(drawn.flatten(1), encoded.flatten(1)).argmin(1) == torch.arange(len(drawn))
    accelerator.print(f"{known.sum()} of {len(known)} drawings are nearest to what was meant")
    if not known.any():
        raise TrainingError(f"{folder} draws none of these pictures by its caption")
    drawn, pixels = drawn[known], pixels[known]
    pictures = [picture for picture, right in zip(pictures, known.tolist(), strict=True) if right]

    model = Decoder(pipe.vae).to(memory_format=torch.channels_last)
    cells = config.crop_size // CELL
    places = config.resolution // CELL - cells + 1
    corners = config.resolution - config.crop_size + 1

    def loss_function(model: nn.Module, batch: Batch) -> Tensor:
        tops, lefts = batch.integers(places), batch.integers(places)
        latents = random_crops(drawn[batch.rows], cells, tops, lefts)
        meant = random_crops(pixels[batch.rows], config.crop_size, CELL * tops, CELL * lefts)
        others = read([kept.pictures[row] for row in batch.rows_of(len(kept.pictures), len(tops))])
        others = random_crops(
            others, config.crop_size, batch.integers(corners), batch.integers(corners)
        )
        latents = torch.cat([latents, encoders.latents(others)])
        wanted = to_signal(torch.cat([meant, others]))
        decoded = model(latents.to(device, memory_format=torch.channels_last))
        return reconstruction_loss(decoded, wanted.to(device), config.chroma_weight)

    measured = torch.arange(len(pictures))[:: -(-len(pictures) // 256)]

    @torch.no_grad()
    def validate(model: nn.Module) -> tuple[dict[str, float], Image.Image]:
        """PSNR of held-out pictures' reconstructions, with and without noise, and of drawings to
        what they were meant to be (which are seen in training); these, above them."""
        decoded = torch.cat([model(part.to(device)).cpu() for part in drawn[measured].split(16)])
        meant = to_signal(pixels[measured])
        numbers, _ = measure(pipe.vae, held_out)
        psnr = peak_signal_to_noise(decoded.clamp(-1, 1), meant)
        shown = slice(0, None, max(1, len(measured) // 12))
        sheet = to_pictures(meant[shown]) + to_pictures(decoded[shown])
        return numbers | {"drawn_psnr": psnr.mean().item()}, contact_sheet(sheet, len(sheet) // 2)

    key = f"{drawing} {kept.fingerprint}"
    run(model, loss_function, config, accelerator, pictures, key, validate, classes=kept.pictures)
    if accelerator.is_main_process:
        replace_part(folder, config.output_dir, "vae", pipe.vae)


if __name__ == "__main__":
    main(train_decoder)
