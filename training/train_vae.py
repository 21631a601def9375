"""Train the autoencoder: pictures to latents an eighth of their side, with four channels.

    accelerate launch --mixed_precision bf16 training/train_vae.py \\
        --train_data_dir data/icons --output_dir runs/vae

The model is diffusers' `AutoencoderTiny`, an autoencoder without a posterior of its own. What
makes its latents fit for diffusion is done here: noise on the latents while training, so that the
decoder forgives a U-Net's small errors, and a penalty that keeps every latent channel near zero
mean and unit variance, so that `scaling_factor` is 1 and nothing needs normalising later.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional as F

from latentgen.training.checkpoint import load_checkpoint, resolve_checkpoint, save_checkpoint
from latentgen.training.data import load_pixels, random_crops, read_pictures
from latentgen.training.loop import TrainSettings, batch_indices, new_state, train
from latentgen.training.objective import moment_kl, reconstruction_loss

HELD_OUT_EVERY = 50  # one picture in fifty is never trained on and measures the PSNR


def build_vae() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(64, 64, 64, 64),
        num_encoder_blocks=(1, 2, 3, 3),
        num_decoder_blocks=(3, 3, 2, 1),
        latent_channels=4,
        scaling_factor=1.0,
    )


class CropAutoencoder(nn.Module):
    """Encode, disturb, decode: the autoencoder as the loss sees it."""

    def __init__(self, vae: AutoencoderTiny, latent_noise: float) -> None:
        super().__init__()
        self.vae = vae
        self.latent_noise = latent_noise

    def forward(self, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        latents = self.vae.encoder(pixels).float()  # (B, 4, h, w)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        level = torch.rand((len(latents), 1, 1, 1), generator=generator).to(latents.device)
        disturbed = latents + self.latent_noise * level * noise
        return latents, self.vae.decoder(disturbed).float()


@torch.no_grad()
def held_out_psnr(vae: AutoencoderTiny, pixels: Tensor, latent_noise: float = 0.0) -> float:
    """Mean over pictures of 10 log10(1 / MSE), pixels in [0, 1] and clamped."""
    generator = torch.Generator("cpu").manual_seed(0)
    values = []
    for batch in pixels.split(16):
        original = batch.float() / 127.5 - 1
        latents = vae.encode(original).latents
        latents = latents + latent_noise * torch.randn(latents.shape, generator=generator)
        decoded = vae.decode(latents).sample.clamp(-1, 1)
        mse = F.mse_loss(decoded, original, reduction="none").flatten(1).mean(1) / 4
        values.append(-10 * mse.log10())
    return torch.cat(values).mean().item()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train_data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=48, help="side of the random crops")
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--max_train_steps", type=int, default=12_000)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument(
        "--lr_decay_steps", type=int, default=None, help="default: --max_train_steps"
    )
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--ema_decay", type=float, default=0.998)
    parser.add_argument("--latent_noise", type=float, default=0.35, help="largest level of it")
    parser.add_argument("--chroma_weight", type=float, default=5.0)
    parser.add_argument("--kl_weight", type=float, default=0.05)
    parser.add_argument("--checkpointing_steps", type=int, default=1_000)
    parser.add_argument("--resume_from_checkpoint", type=str, default=None)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    accelerator = Accelerator()
    torch.manual_seed(args.seed)  # the initial weights; each step has a generator of its own
    pictures = read_pictures(args.train_data_dir)
    held_out_rows = range(0, len(pictures), HELD_OUT_EVERY)
    held_out = load_pixels(args.train_data_dir, [pictures[i] for i in held_out_rows])
    kept = [picture for i, picture in enumerate(pictures) if i % HELD_OUT_EVERY != 0]
    pixels = load_pixels(args.train_data_dir, kept)

    model = CropAutoencoder(build_vae(), args.latent_noise).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    state = new_state(model, optimizer, args.seed)
    if args.resume_from_checkpoint is not None:
        checkpoint = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
        if checkpoint is not None:
            load_checkpoint(state, checkpoint)

    def loss_function(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        rows = batch_indices(step, args.train_batch_size, len(pixels), args.seed)
        crops = random_crops(pixels, rows, args.resolution, generator)
        crops = crops.to(accelerator.device, memory_format=torch.channels_last)
        latents, decoded = model(crops, generator)
        return reconstruction_loss(decoded, crops, args.chroma_weight) + args.kl_weight * moment_kl(
            latents
        )

    settings = TrainSettings(
        args.max_train_steps,
        args.learning_rate,
        args.lr_warmup_steps,
        args.lr_decay_steps if args.lr_decay_steps is not None else args.max_train_steps,
        args.ema_decay,
        args.max_grad_norm,
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    started, mean_loss = time.monotonic(), 0.0
    for report in train(state, loss_function, settings, accelerator):
        mean_loss += report.loss / 100
        if report.step % 100 == 0:
            seconds = time.monotonic() - started
            print(f"step {report.step} loss {mean_loss:.4f} {seconds:.0f} s", flush=True)
            mean_loss = 0.0
        last = report.step == args.max_train_steps
        if report.step % args.checkpointing_steps == 0 or last:
            save_checkpoint(state, args.output_dir)

    vae = build_vae()
    ema = {name.removeprefix("vae."): value for name, value in state.ema.items()}
    vae.load_state_dict(ema)
    vae.save_pretrained(args.output_dir / "vae")
    measured = {
        "held_out_pictures": len(held_out),
        "psnr": held_out_psnr(vae.eval(), held_out),
        "psnr_with_latent_noise_0.2": held_out_psnr(vae, held_out, 0.2),
    }
    (args.output_dir / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(measured)


if __name__ == "__main__":
    main()
