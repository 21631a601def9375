"""Train a diffusion model from nothing: a U-Net that draws captions or, without them, pictures.

    accelerate launch training/train_text_to_image.py --config training/configs/unet-everyday.yaml

With captions it is a latent diffusion model: every picture passes through the frozen autoencoder
and every caption through the frozen text encoder once, before the first step. The words reach the
U-Net twice: token by token through cross-attention, and pooled into the time embedding
(`addition_embed_type="text"`), which is what makes a small model follow them early. The result is a
folder for `latentgen generate --model` and for diffusers' `StableDiffusionPipeline`.

With `--unconditional` it is DDPM on the pixels of a folder of pictures; the result is a folder for
diffusers' `DDPMPipeline`.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from latentgen.errors import TrainingError
from latentgen.images import contact_sheet
from latentgen.pipeline import LatentDiffusion, quietly
from latentgen.training.config import DataConfig, at_least, flag, needs, parse_config
from latentgen.training.data import (
    Batch,
    cached,
    pixel_batches,
    read_data,
    step_generator,
    to_signal,
)
from latentgen.training.encoders import Captions, Encoders
from latentgen.training.objective import (
    diffusion_loss,
    noisy_latents,
    prediction_target,
    sigmoid_betas,
)
from latentgen.training.pictures import Picture
from latentgen.training.run import main, run, start

# diffusers' names for the noise schedules that it has
SCHEDULE_NAMES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",  # linear in the square root
    "quadratic": "scaled_linear",  # another name for it
    "cosine": "squaredcos_cap_v2",
}


@dataclass(kw_only=True)
class TextToImageConfig(DataConfig):
    unconditional: bool = flag(False, help="without captions: DDPM on the pictures' pixels")
    pretrained_model_name_or_path: Path | None = flag(
        None, help="a model folder, for its autoencoder and text encoder; or the next two"
    )
    pretrained_vae_path: Path | None = flag(None, help="output of train_vae.py, or another `vae`")
    pretrained_text_encoder_path: Path | None = flag(
        None, help="output of train_clip.py, or another CLIP with its tokenizer"
    )
    pretrained_unet_path: Path | None = flag(
        None, help="begin with these weights (a new run with a new optimizer, not a resume)"
    )
    random_flip: bool = flag(False, help="mirror half of the pictures")
    block_out_channels: list[int] = flag([96, 160, 224], help="the U-Net's width at each level")
    layers_per_block: int = flag(1, help="residual blocks at each level")
    gradient_checkpointing: bool = flag(False, help="less memory for more time")
    proportion_empty_prompts: float = flag(0.1, help="captions dropped, for guidance")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = flag(
        "v_prediction", help="what the U-Net predicts"
    )
    beta_schedule: Literal["linear", "scaled_linear", "quadratic", "cosine", "sigmoid"] = flag(
        "scaled_linear", help="how noise grows from the first timestep to the last"
    )
    beta_start: float = flag(0.00085, help="its first beta (not for cosine)")
    beta_end: float = flag(0.02, help="its last beta (not for cosine)")
    rescale_betas_zero_snr: bool = flag(False, help="end in pure noise (arXiv 2305.08891)")
    loss: Literal["l2", "l1", "huber"] = flag("l2", help="of the prediction's error")
    snr_gamma: float | None = flag(5.0, help="min-SNR weighting; 0 for none")
    weight_dtype: Literal["float16", "float32"] = flag("float16", help="of the model that is saved")
    validation_prompts: list[str] = flag([], help="of the sample pictures")
    validation_guidance_scale: float = flag(3.0, help="of the samples, and the model's default")
    max_train_steps: int = flag(5_000, help="steps of the optimizer")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained_model_name_or_path is not None:
            if self.pretrained_vae_path is None:
                self.pretrained_vae_path = self.pretrained_model_name_or_path / "vae"
            if self.pretrained_text_encoder_path is None:
                self.pretrained_text_encoder_path = self.pretrained_model_name_or_path
        parts = (self.pretrained_vae_path, self.pretrained_text_encoder_path)
        if not self.unconditional and None in parts:
            raise ValueError(
                "--pretrained_model_name_or_path is needed, or --pretrained_vae_path and "
                "--pretrained_text_encoder_path (or --unconditional, for pictures without captions)"
            )
        if self.unconditional and parts != (None, None):
            raise ValueError("--unconditional works on pixels, without autoencoder and captions")
        for folder in (*parts, self.pretrained_unet_path):
            if folder is not None and not folder.is_dir():
                raise ValueError(f"{folder} is no folder")
        names = ["proportion_empty_prompts", "validation_prompts", "validation_guidance_scale"]
        needs(self, names, not self.unconditional, "captions (it says --unconditional)")
        if self.pretrained_unet_path is not None:
            names = ["block_out_channels", "layers_per_block"]
            needs(self, names, False, "a U-Net that begins from nothing")
        if wrong := [width for width in self.block_out_channels if width < 32 or width % 32]:
            raise ValueError(f"block_out_channels: {wrong[0]} is no multiple of 32")
        at_least(self, "layers_per_block", 1)
        if self.snr_gamma is not None:
            at_least(self, "snr_gamma", 0)
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise ValueError(
                f"proportion_empty_prompts: {self.proportion_empty_prompts} is not in [0, 1]"
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError("beta_start and beta_end: use 0 < beta_start <= beta_end < 1")
        if self.validation_guidance_scale < 1:
            raise ValueError("validation_guidance_scale: use 1 (no guidance) or more")
        if any(not prompt.strip() for prompt in self.validation_prompts):
            raise ValueError("validation_prompts: one of them is empty")
        cells = 2 ** (len(self.block_out_channels) - 1) * (1 if self.unconditional else 8)
        if self.resolution % cells:
            raise ValueError(f"resolution: {self.resolution} is no multiple of {cells}")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr: pure noise tells nothing about the picture, so epsilon "
                "cannot be learnt there; use --prediction_type v_prediction or sample"
            )
        if self.pretrained_unet_path is not None:
            self._check_schedule(self.pretrained_unet_path.parent / "scheduler")

    def _check_schedule(self, folder: Path) -> None:
        """Compare with what the U-Net has learnt, where its folder's neighbour tells it."""
        if not (folder / "scheduler_config.json").is_file():
            return
        learnt = quietly(DDPMScheduler.from_pretrained, folder)
        facts = learnt.config
        if facts.prediction_type != self.prediction_type:
            raise ValueError(
                f"prediction_type: the U-Net of pretrained_unet_path predicts "
                f"{facts.prediction_type}, not {self.prediction_type}"
            )
        now = build_scheduler(self, DDPMScheduler)
        if not torch.equal(learnt.alphas_cumprod, now.alphas_cumprod):
            names = ["beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr"]
            told = ", ".join(f"{name} {facts[name]}" for name in names)
            told = told if facts.trained_betas is None else "betas of its own, as sigmoid has them"
            raise ValueError(
                f"beta_schedule: the U-Net of pretrained_unet_path has learnt with {told}; "
                "train it with the same"
            )


def build_scheduler(config: TextToImageConfig, kind: type) -> DDIMScheduler | DDPMScheduler:
    """The forward process, and how a pipeline goes back along it. The defaults end near sigma 64:
    nearly pure noise, yet finite, so any scheduler can start there."""
    settings = {"beta_start": config.beta_start, "beta_end": config.beta_end}
    if config.beta_schedule in SCHEDULE_NAMES:
        settings["beta_schedule"] = SCHEDULE_NAMES[config.beta_schedule]
    else:
        settings["trained_betas"] = sigmoid_betas(1000, **settings).tolist()
    if kind is DDIMScheduler:
        settings |= {"steps_offset": 1, "set_alpha_to_one": False}
    return kind(
        num_train_timesteps=1000,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        timestep_spacing="trailing",
        clip_sample=config.unconditional,
        **settings,
    )


def build_unet(config: TextToImageConfig, channels: int, side: int, text_width: int) -> nn.Module:
    """A U-Net for latents and texts, or (text_width 0) for pixels alone. Attention is left to the
    lower levels."""
    widths, levels = tuple(config.block_out_channels), len(config.block_out_channels)
    common = {
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": config.layers_per_block,
    }
    if text_width == 0:
        return UNet2DModel(
            **common,
            down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        )
    return UNet2DConditionModel(
        **common,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
        mid_block_type=None,  # the lowest level is small already and looks at the words itself
        up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
        cross_attention_dim=text_width,
        attention_head_dim=4,  # diffusers' name for the number of heads
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def load_tokenizer(config: TextToImageConfig) -> CLIPTokenizer:
    folder = config.pretrained_text_encoder_path
    return CLIPTokenizer.from_pretrained(folder / "tokenizer" if is_model(folder) else folder)


def load_encoders(
    config: TextToImageConfig, tokenizer: CLIPTokenizer, device: torch.device
) -> Encoders:
    vae_facts = json.loads((config.pretrained_vae_path / "config.json").read_text())
    kinds = {"AutoencoderTiny": AutoencoderTiny, "AutoencoderKL": AutoencoderKL}
    vae_kind = kinds[vae_facts["_class_name"]]
    vae = vae_kind.from_pretrained(config.pretrained_vae_path, use_safetensors=True)
    folder = config.pretrained_text_encoder_path
    text_encoder = CLIPTextModel.from_pretrained(
        folder / "text_encoder" if is_model(folder) else folder, use_safetensors=True
    )
    if len(tokenizer) != text_encoder.config.vocab_size:
        raise TrainingError(f"{folder}: its tokenizer is not that of its text encoder")
    return Encoders(vae.eval().to(device), text_encoder.eval().to(device), tokenizer)


def is_model(folder: Path) -> bool:
    """Or else a CLIP."""
    return (folder / "text_encoder").is_dir()


def load_image_encoder(folder: Path) -> CLIPVisionModelWithProjection | None:
    """The half of CLIP that belongs to the text encoder in `folder`, if the projection of texts is
    the identity, so that nothing stands between."""
    see = CLIPVisionModelWithProjection.from_pretrained
    if is_model(folder):
        own = folder / "image_encoder"
        return see(own, use_safetensors=True) if own.is_dir() else None
    if json.loads((folder / "config.json").read_text())["model_type"] != "clip":
        return None
    clip = CLIPModel.from_pretrained(folder, use_safetensors=True)
    projection = clip.text_projection.weight
    if not torch.equal(projection, torch.eye(*projection.shape)):
        return None
    return see(folder, use_safetensors=True)


def train_text_to_image() -> None:
    config = parse_config(TextToImageConfig, __doc__.split("\n")[0])
    tokenizer = None if config.unconditional else load_tokenizer(config)

    def too_long(caption: str) -> bool:
        return len(tokenizer(caption).input_ids) > tokenizer.model_max_length

    captioned = {"captions": True, "too_long": too_long} if tokenizer else {"captions": False}
    pictures, unseen, data = read_data(config, at_most=64, **captioned)
    accelerator = start(config)
    device = accelerator.device
    encoders = None if tokenizer is None else load_encoders(config, tokenizer, device)
    images = encode_pictures(pictures + unseen, encoders, config, data)  # (1 or 2, N, C, h, w)
    captions = None
    if encoders is not None:
        states = partial(encoders.cached_states, output_dir=config.output_dir)
        captions = Captions(pictures + unseen, states)
    held_rows = torch.arange(len(pictures), len(pictures) + len(unseen))
    accelerator.print(
        f"{len(pictures)} pictures, {len(unseen)} held out; numbers of mean "
        f"{images.mean():.3f} and standard deviation {images.std():.3f}"
    )

    scheduler = build_scheduler(config, DDPMScheduler if config.unconditional else DDIMScheduler)
    alphas_cumprod = scheduler.alphas_cumprod
    if config.pretrained_unet_path is not None:
        kind = UNet2DModel if config.unconditional else UNet2DConditionModel
        unet = kind.from_pretrained(config.pretrained_unet_path, use_safetensors=True)
    else:
        text_width = 0 if captions is None else captions.words.shape[-1]
        unet = build_unet(config, images.shape[2], images.shape[-1], text_width)
    unet.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()

    def denoising_loss(
        model: nn.Module, x_0: Tensor, noise: Tensor, timesteps: Tensor, prompt: Tensor | None
    ) -> Tensor:
        alphas = alphas_cumprod[timesteps].to(device)
        x_0, noise = x_0.to(device), noise.to(device)
        target = prediction_target(x_0, noise, alphas, config.prediction_type)
        x_t = noisy_latents(x_0, noise, alphas).contiguous(memory_format=torch.channels_last)
        words = () if prompt is None else (prompt.to(device, torch.float32),)
        prediction = model(x_t, timesteps.to(device), *words).sample  # (B, C, h, w)
        gamma = config.snr_gamma or None
        return diffusion_loss(
            prediction, target, alphas, config.prediction_type, gamma, config.loss
        )

    def loss_function(model: nn.Module, batch: Batch) -> Tensor:
        x_0 = images[batch.integers(len(images)), batch.rows]
        timesteps = batch.timesteps(len(alphas_cumprod))
        noise = batch.normal(*images.shape[2:])
        empty = config.proportion_empty_prompts
        prompt = None if captions is None else captions.draw(batch, empty)
        return denoising_loss(model, x_0, noise, timesteps, prompt)

    def validate(model: nn.Module) -> tuple[dict[str, float], Image.Image]:
        """The loss of the pictures held out, always with the same noise and timesteps, and
        pictures of the same prompts from the same seeds."""
        generator = step_generator(0, 0)
        timesteps = torch.randint(len(alphas_cumprod), (len(unseen),), generator=generator)
        noise = torch.randn((len(unseen), *images.shape[2:]), generator=generator)
        prompt = None if captions is None else captions.first(held_rows)
        loss = denoising_loss(model, images[0, held_rows], noise, timesteps, prompt)
        return {"held_out_loss": loss.item()}, draw_samples(model)

    def draw_samples(model: nn.Module) -> Image.Image:
        if encoders is None:
            pipeline = DDPMPipeline(model, scheduler)
            pipeline.set_progress_bar_config(disable=True)
            generator = torch.Generator("cpu").manual_seed(0)
            return contact_sheet(pipeline(8, generator, num_inference_steps=50).images, 4)
        prompts = config.validation_prompts or [picture.captions[0] for picture in unseen[:8]]
        pipeline = LatentDiffusion(
            encoders.vae, encoders.text_encoder, encoders.tokenizer, model, scheduler
        )
        guidance = config.validation_guidance_scale
        asked = {"seed": 0, "scheduler": "ddim", "num_inference_steps": 20}
        return contact_sheet(pipeline.generate(prompts, guidance_scale=guidance, **asked).images)

    if encoders is not None:  # another autoencoder or text encoder would be other data
        data = f"{data} {encoders.vae_key} {encoders.text_key}"
    run(unet, loss_function, config, accelerator, pictures, data, validate)
    if accelerator.is_main_process:
        unet.to("cpu", memory_format=torch.contiguous_format)
        if encoders is None:
            DDPMPipeline(unet, scheduler).save_pretrained(config.output_dir)
        else:
            save_model(unet, encoders, scheduler, config)


def encode_pictures(
    pictures: list[Picture], encoders: Encoders | None, config: TextToImageConfig, data: str
) -> Tensor:
    """What the U-Net learns to draw, (1 or 2, N, C, h, w): latents or pixels, and mirrored."""

    def make() -> Tensor:
        encode = to_signal if encoders is None else encoders.latents
        plain, mirrored = [], []
        for pixels in pixel_batches(pictures, config.square):
            plain.append(encode(pixels))
            if config.random_flip:
                mirrored.append(encode(pixels.flip(-1)))
        return torch.stack([torch.cat(part) for part in (plain, mirrored) if part])

    if encoders is None:
        return make()
    key = f"{data} {encoders.vae_key} {config.resolution} {config.random_flip}"
    return cached(config.output_dir, key, make)


def save_model(
    unet: nn.Module, encoders: Encoders, scheduler: DDIMScheduler, config: TextToImageConfig
) -> None:
    """A folder in diffusers' layout. When the text encoder is half of a CLIP whose text projection
    is the identity (train_clip.py), the other half goes along as `image_encoder`: it is what
    `latentgen evaluate` measures with."""
    folder, dtype = config.output_dir, getattr(torch, config.weight_dtype)
    pipeline = StableDiffusionPipeline(
        encoders.vae,
        encoders.text_encoder,
        encoders.tokenizer,
        unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=load_image_encoder(config.pretrained_text_encoder_path),
        requires_safety_checker=False,
    )
    pipeline.to("cpu", dtype).save_pretrained(folder)
    pipeline.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))  # for older readers
    if pipeline.image_encoder is not None:
        source = config.pretrained_text_encoder_path
        source = source / "image_encoder" if is_model(source) else source
        CLIPImageProcessorPil.from_pretrained(source).save_pretrained(folder / "image_encoder")
    for file in folder.glob("*/config.json"):
        facts = json.loads(file.read_text())
        facts.pop("_name_or_path", None)  # where this machine keeps its runs is nobody's business
        # transformers would load its models in the type that their configuration names, diffusers
        # its own in float32; a pipeline loaded without a type must be of one
        if "dtype" in facts:
            facts["dtype"] = "float32"
        file.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    defaults = {
        "num_inference_steps": 20,
        "guidance_scale": config.validation_guidance_scale,
        "scheduler": "ddim",
        "height": config.resolution,
        "width": config.resolution,
    }
    (folder / "latentgen.json").write_text(json.dumps(defaults, indent=2) + "\n")


if __name__ == "__main__":
    main(train_text_to_image)
