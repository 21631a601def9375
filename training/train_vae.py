"""Train the autoencoder: pictures to latents an eighth of their side.

    accelerate launch training/train_vae.py --config training/configs/vae.yaml

The model is diffusers' `AutoencoderTiny`, an autoencoder without a posterior of its own. What
makes its latents fit for diffusion is done here: noise on the latents while training, so that the
decoder forgives a U-Net's small errors, and a penalty that keeps every latent channel near zero
mean and unit variance, so that `scaling_factor` is 1 and nothing needs normalising later.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from PIL import Image
from torch import Tensor, nn

from latentgen.images import contact_sheet
from latentgen.training.config import DataConfig, at_least, flag, parse_config
from latentgen.training.data import (
    Batch,
    pixel_batches,
    random_crops,
    read_data,
    to_pictures,
    to_signal,
)
from latentgen.training.objective import moment_kl, peak_signal_to_noise, reconstruction_loss
from latentgen.training.run import main, run, start


@dataclass(kw_only=True)
class VAEConfig(DataConfig):
    crop_size: int = flag(48, help="pixels of the random crops that it learns from")
    latent_channels: int = flag(8, help="numbers a cell of 8 x 8 pixels becomes")
    latent_noise: float = flag(0.35, help="the largest standard deviation of noise on the latents")
    chroma_weight: float = flag(5.0, help="weight of colour in the loss")
    kl_weight: float = flag(0.05, help="weight of latents with zero mean and unit variance")
    max_train_steps: int = flag(6_000, help="steps of the optimizer")
    optimizer: Literal["adamw", "muon"] = flag("muon", help="adamw needs many times the steps")
    train_batch_size: int = flag(8, help="crops a process and micro-batch")
    learning_rate: float = flag(6e-4, help="its highest value")
    ema_decay: float = flag(0.998, help="of the averaged weights, which are the result")
    validation_steps: int = flag(1_000, help="steps between PSNRs and reconstructions")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "crop_size", 8)
        at_least(self, "latent_channels", 3)  # they begin as the mean colour
        for name in ("resolution", "crop_size"):
            if getattr(self, name) % 8:
                raise ValueError(f"{name}: {getattr(self, name)} is no multiple of 8")
        if self.crop_size > self.resolution:
            raise ValueError(f"crop_size: {self.crop_size} is more than the resolution")


def build_vae(latent_channels: int) -> AutoencoderTiny:
    """1.4 M parameters, which begin as the mean colour of each cell (see `start_as_mean`)."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(64, 64, 64, 64),
        num_encoder_blocks=(1, 2, 3, 3),
        num_decoder_blocks=(3, 3, 2, 1),
        latent_channels=latent_channels,
        scaling_factor=1.0,
    )
    start_as_mean(vae)
    return vae


# Brightness, red against green, blue against yellow; times what brings icons near unit variance.
OPPONENT = torch.tensor([[4 / 3, 4 / 3, 4 / 3], [6.0, -6.0, 0.0], [-2.5, -2.5, 5.0]])
MEAN = 0.75  # of the pixels of icons, in [0, 1]


@torch.no_grad()
def start_as_mean(vae: AutoencoderTiny) -> None:
    """Weights with which three latent channels are the mean colour of a cell of 8 x 8 pixels, and
    decode to it; the other channels and all blocks learn what is missing.

    From random weights the encoder spends thousands of steps on finding colour at all, and stays
    on a plateau where green and purple are grey.
    """
    for block in vae.modules():
        if isinstance(block, AutoencoderTinyBlock):
            nn.init.zeros_(block.conv[-1].weight)
            nn.init.zeros_(block.conv[-1].bias)
    for part in (vae.encoder, vae.decoder):
        convolutions = [layer for layer in part.layers if isinstance(layer, nn.Conv2d)]
        for layer in convolutions:  # channels 0 to 2 carry red, green and blue all the way
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            layer.weight[:3] = 0
            if layer.bias is not None:
                layer.bias[:3] = 0
            for channel in range(3):
                if layer.stride == (2, 2):
                    layer.weight[channel, channel, 1:, 1:] = 1 / 4
                else:
                    layer.weight[channel, channel, 1, 1] = 1
    to_latents, from_latents = vae.encoder.layers[-1], vae.decoder.layers[0]
    to_latents.weight[:3, :3, 1, 1] = OPPONENT
    to_latents.bias[:3] = -MEAN * OPPONENT.sum(1)
    from_latents.weight[:3, :3, 1, 1] = torch.linalg.inv(OPPONENT)
    from_latents.bias[:3] = MEAN
    vae.decoder.layers[-1].weight[:, 3:] = 0


class CropAutoencoder(nn.Module):
    """Encode, disturb, decode: the autoencoder as the loss sees it."""

    def __init__(self, vae: AutoencoderTiny, latent_noise: float) -> None:
        super().__init__()
        self.vae = vae
        self.latent_noise = latent_noise

    def forward(self, pixels: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """`pixels` (B, 3, H, W), `noise` (B, C, H/8, W/8), `level` (B,) in [0, 1]."""
        latents = self.vae.encoder(pixels).float()
        disturbed = latents + self.latent_noise * level.reshape(-1, 1, 1, 1) * noise
        return latents, self.vae.decoder(disturbed).float()


def train_vae() -> None:
    config = parse_config(VAEConfig, __doc__.split("\n")[0])
    pictures, unseen, data = read_data(config, captions=False, at_most=256)
    pixels = torch.cat(list(pixel_batches(pictures, config.square)))  # (N, 3, R, R)
    held_out = torch.cat(list(pixel_batches(unseen, config.square)))

    accelerator = start(config)
    device = accelerator.device
    model = CropAutoencoder(build_vae(config.latent_channels), config.latent_noise)
    model.to(memory_format=torch.channels_last)
    corners = config.resolution - config.crop_size + 1
    cell = config.crop_size // 8

    def loss_function(model: nn.Module, batch: Batch) -> Tensor:
        tops, lefts = batch.integers(corners), batch.integers(corners)
        crops = to_signal(random_crops(pixels[batch.rows], config.crop_size, tops, lefts))
        crops = crops.to(device, memory_format=torch.channels_last)
        noise = batch.normal(config.latent_channels, cell, cell).to(device)
        latents, decoded = model(crops, noise, batch.uniform().to(device))
        reconstruction = reconstruction_loss(decoded, crops, config.chroma_weight)
        return reconstruction + config.kl_weight * moment_kl(latents)

    def validate(model: nn.Module) -> tuple[dict[str, float], Image.Image]:
        return measure(model.vae, held_out)

    run(model, loss_function, config, accelerator, pictures, data, validate)
    if accelerator.is_main_process:
        model.vae.to("cpu", memory_format=torch.contiguous_format)
        model.vae.save_pretrained(config.output_dir)


@torch.no_grad()
def measure(vae: AutoencoderTiny, pixels: Tensor) -> tuple[dict[str, float], Image.Image]:
    """PSNR with and without noise on the latents, and pictures above their reconstructions."""
    generator = torch.Generator("cpu").manual_seed(0)
    clean, disturbed, shown = [], [], []
    for part in pixels.split(16):
        original = to_signal(part).to(vae.device)
        latents = vae.encode(original).latents
        noise = torch.randn(latents.shape, generator=generator).to(vae.device)
        decoded = vae.decode(latents).sample.clamp(-1, 1)
        clean.append(peak_signal_to_noise(decoded, original))
        disturbed.append(
            peak_signal_to_noise(vae.decode(latents + 0.2 * noise).sample.clamp(-1, 1), original)
        )
        shown.append(decoded[:1])
    numbers = {
        "psnr": torch.cat(clean).mean().item(),
        "psnr_with_latent_noise_0.2": torch.cat(disturbed).mean().item(),
    }
    originals = to_pictures(torch.cat([to_signal(part[:1]) for part in pixels.split(16)])[:12])
    return numbers, contact_sheet(originals + to_pictures(torch.cat(shown)[:12]), len(originals))


if __name__ == "__main__":
    main(train_vae)
