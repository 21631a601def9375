"""Teach the decoder of a finished model what its U-Net means.

    accelerate launch training/train_decoder.py --config training/configs/decoder.yaml

A decoder is trained on latents of pictures, and then gets those of a U-Net, which are a little off:
details melt. Here it sees both. The model draws each picture of the data set once, by its caption;
half of what the decoder learns from are these latents with the picture that was meant, the other
half are latents of pictures (all of `--kept_file`), so that it reconstructs as well as before.

Encoder, text encoder and U-Net stay: latents mean what they meant, and LoRAs go on to fit. The
result is the same model folder with another decoder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from train_vae import measure

from latentgen.images import contact_sheet
from latentgen.pipeline import LatentDiffusion
from latentgen.training.config import DataConfig, flag, parse_config
from latentgen.training.data import (
    Batch,
    cached,
    pixel_batches,
    read_data,
    to_pictures,
    to_signal,
    weights_key,
)
from latentgen.training.encoders import Encoders
from latentgen.training.objective import peak_signal_to_noise, reconstruction_loss
from latentgen.training.pictures import Picture, check_pictures, read_folder
from latentgen.training.run import main, replace_part, run, start

DRAWN_AT_ONCE = 16


@dataclass(kw_only=True)
class DecoderConfig(DataConfig):
    pretrained_model_name_or_path: Path = flag(help="the finished model's folder")
    kept_file: str = flag("metadata.jsonl", help="listing of pictures to go on reconstructing")
    num_inference_steps: int = flag(10, help="of the drawings that it learns from")
    chroma_weight: float = flag(5.0, help="weight of colour in the loss")
    max_train_steps: int = flag(1_500, help="steps of the optimizer")
    optimizer: Literal["adamw", "muon"] = flag("muon", help="adamw needs more steps")
    train_batch_size: int = flag(4, help="drawings, and as many pictures, a process and step")
    learning_rate: float = flag(3e-4, help="its highest value")
    ema_decay: float = flag(0.995, help="of the averaged weights, which are the result")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.pretrained_model_name_or_path / "vae").is_dir():
            raise ValueError(f"{self.pretrained_model_name_or_path} is no model folder")


class Decoder(nn.Module):
    """Latents (B, C, h, w) to pictures (B, 3, 8 h, 8 w) in [-1, 1]."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(latents).float()


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
    key = " ".join(map(weights_key, (pipe.vae, pipe.text_encoder, pipe.unet)))

    def all_pixels(of: list[Picture]) -> Tensor:
        return torch.cat(list(pixel_batches(of, config.square)))  # (N, 3, R, R)

    pixels, kept_pixels, held_out = map(all_pixels, (pictures, kept.pictures, unseen))

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
        encoders = Encoders(pipe.vae, pipe.text_encoder, pipe.tokenizer)
        return torch.cat([encoders.latents(part) for part in kept_pixels.split(64)])

    drawing = f"{data} {key} {config.num_inference_steps} {config.resolution}"
    with accelerator.main_process_first():
        drawn = cached(config.output_dir, drawing, draw_all)
        encoded = cached(config.output_dir, f"{kept.fingerprint} {key} encoded", encode_all)

    model = Decoder(pipe.vae.decoder).to(memory_format=torch.channels_last)
    model.requires_grad_(True)

    def error(model: nn.Module, latents: Tensor, wanted: Tensor) -> Tensor:
        wanted = to_signal(wanted).to(device, memory_format=torch.channels_last)
        latents = latents.to(device, memory_format=torch.channels_last)
        return reconstruction_loss(model(latents), wanted, config.chroma_weight)

    def loss_function(model: nn.Module, batch: Batch) -> Tensor:
        others = batch.rows_of(len(kept.pictures), len(batch.rows))
        meant = torch.cat([pixels[batch.rows], kept_pixels[others]])
        return error(model, torch.cat([drawn[batch.rows], encoded[others]]), meant)

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
