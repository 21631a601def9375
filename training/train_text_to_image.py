"""Train the conditional U-Net on cached latents and cached text states.

    accelerate launch --mixed_precision bf16 training/train_text_to_image.py \\
        --pretrained_vae_path runs/vae/vae --pretrained_text_encoder_path runs/clip \\
        --train_data_dir data/icons --subjects_file training/subjects.txt --style noto \\
        --output_dir runs/unet

The autoencoder and the text encoder are frozen, so every picture and every caption passes through
them once, before the first step. The words reach the U-Net twice: token by token through
cross-attention, and pooled into the time embedding (`addition_embed_type="text"`), which is what
makes a small model follow them early. It does not assemble a pipeline: export_model.py does.
"""

import argparse
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from latentgen.training.checkpoint import load_checkpoint, resolve_checkpoint, save_checkpoint
from latentgen.training.data import caption_forms, load_pixels, read_pictures, read_subjects
from latentgen.training.loop import TrainSettings, batch_indices, new_state, train
from latentgen.training.objective import diffusion_loss, noisy_latents, prediction_target


def build_unet(sample_size: int, latent_channels: int, text_width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(96, 160, 224),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None,  # the lowest level is 4 x 4 already and looks at the words itself
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,  # diffusers' name for the number of heads
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def build_scheduler(prediction_type: str) -> DDIMScheduler:
    """Noise that ends near sigma 64: nearly pure, yet finite, so any sampler can start there."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.02,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


@torch.no_grad()
def encode_pixels(vae: AutoencoderTiny, pixels: Tensor) -> Tensor:
    """(N, 3, H, W) bytes to latents, (N, C, H/8, W/8), scaled as the pipelines expect them."""
    parts = [vae.encode(part.float() / 127.5 - 1).latents for part in pixels.split(16)]
    return torch.cat(parts) * vae.config.scaling_factor


@torch.no_grad()
def encode_texts(encoder: nn.Module, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """The token states of each text, padded to full length without a mask, as the stock pipelines
    do it: (N, 77, D), in half precision to save memory."""
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.cat([encoder(part).last_hidden_state.half() for part in ids.split(128)])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pretrained_vae_path", type=Path, required=True)
    parser.add_argument("--pretrained_text_encoder_path", type=Path, required=True)
    parser.add_argument("--train_data_dir", type=Path, required=True)
    parser.add_argument("--subjects_file", type=Path, required=True)
    parser.add_argument("--style", type=str, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--random_flip", action="store_true", help="mirror half of the pictures")
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--max_train_steps", type=int, default=5_000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument(
        "--lr_decay_steps", type=int, default=None, help="default: --max_train_steps"
    )
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument(
        "--prediction_type", choices=("epsilon", "v_prediction"), default="v_prediction"
    )
    parser.add_argument("--snr_gamma", type=float, default=5.0)
    parser.add_argument("--proportion_empty_prompts", type=float, default=0.1)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--resume_from_checkpoint", type=str, default=None)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    accelerator = Accelerator()
    device = accelerator.device
    torch.manual_seed(args.seed)  # the initial weights; each step has a generator of its own
    vae = AutoencoderTiny.from_pretrained(args.pretrained_vae_path).eval()
    text_folder = args.pretrained_text_encoder_path
    tokenizer = CLIPTokenizer.from_pretrained(text_folder / "tokenizer")
    encoder = CLIPTextModelWithProjection.from_pretrained(
        text_folder / "text_encoder_with_projection"
    ).eval()

    subjects = read_subjects(args.subjects_file)
    pictures = [
        picture
        for picture in read_pictures(args.train_data_dir)
        if picture.style == args.style and picture.name in subjects
    ]
    captions, first_caption, caption_count = [""], [], []
    for picture in pictures:
        names = dict.fromkeys((*subjects[picture.name], *picture.labels))
        forms = [form for name in names for form in caption_forms(name, args.style)]
        first_caption.append(len(captions))
        caption_count.append(len(forms))
        captions += forms
    first, count = torch.tensor(first_caption), torch.tensor(caption_count)
    states = encode_texts(encoder, tokenizer, captions)  # (captions, 77, D); row 0 is the empty one
    pixels = load_pixels(args.train_data_dir, pictures)
    latents = encode_pixels(vae, pixels)[None]  # (1 or 2, pictures, C, h, w)
    if args.random_flip:
        latents = torch.cat([latents, encode_pixels(vae, pixels.flip(-1))[None]])
    print(
        f"{len(pictures)} pictures, {len(captions)} captions, latents' mean "
        f"{latents.mean():.3f} and standard deviation {latents.std():.3f}",
        flush=True,
    )

    unet = build_unet(latents.shape[-1], latents.shape[2], states.shape[-1])
    unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    state = new_state(unet, optimizer, args.seed)
    if args.resume_from_checkpoint is not None:
        checkpoint = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
        if checkpoint is not None:
            load_checkpoint(state, checkpoint)
    scheduler = build_scheduler(args.prediction_type)

    def loss_function(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        size = args.train_batch_size
        rows = batch_indices(step, size, len(pictures), args.seed)
        mirrored = torch.randint(0, len(latents), (size,), generator=generator)
        x_0 = latents[mirrored, rows]
        choice = (torch.rand(size, generator=generator) * count[rows]).long()
        dropped = torch.rand(size, generator=generator) < args.proportion_empty_prompts
        prompt = states[torch.where(dropped, 0, first[rows] + choice)].to(device, torch.float32)
        noise = torch.randn(x_0.shape, generator=generator)
        timesteps = torch.randint(0, len(scheduler.alphas_cumprod), (size,), generator=generator)
        alphas = scheduler.alphas_cumprod[timesteps].to(device)
        x_0, noise = x_0.to(device), noise.to(device)
        target = prediction_target(x_0, noise, alphas, args.prediction_type)
        x_t = noisy_latents(x_0, noise, alphas).contiguous(memory_format=torch.channels_last)
        prediction = model(x_t, timesteps.to(device), prompt).sample  # (B, C, h, w)
        return diffusion_loss(prediction, target, alphas, args.prediction_type, args.snr_gamma)

    settings = TrainSettings(
        args.max_train_steps,
        args.learning_rate,
        args.lr_warmup_steps,
        args.lr_decay_steps if args.lr_decay_steps is not None else args.max_train_steps,
        args.ema_decay,
        args.max_grad_norm,
    )
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
            averaged = build_unet(latents.shape[-1], latents.shape[2], states.shape[-1])
            averaged.load_state_dict(state.ema)
            averaged.save_pretrained(args.output_dir / "unet")


if __name__ == "__main__":
    main()
