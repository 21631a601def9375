"""Tiny random models, made on the spot: the architecture of Stable Diffusion at toy widths."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from latentgen import LatentDiffusion

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.()-'"


@cache
def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with one token a letter: 75 letters fill a chunk."""
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder = Path(mkdtemp())
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )


def components(
    in_channels: int = 4,
    prediction_type: str = "epsilon",
    sample_size: int = 8,
    rescale_betas_zero_snr: bool = False,
    seed: int = 0,
    xl: bool = False,
) -> dict:
    """The parts of a tiny model; pictures of `sample_size * 8` pixels by default.

    `xl`: with the two text encoders and the sizes of SDXL.
    """
    torch.manual_seed(seed)
    words = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16 + 12 * xl,
        attention_head_dim=4,
        **(
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 6 * 4 + 10,
                "use_linear_projection": True,
            }
            if xl
            else {}
        ),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )
    text = {
        "vocab_size": len(words),
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 77,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    text_encoder = CLIPTextModel(CLIPTextConfig(hidden_size=16, **text))
    second = {}
    if xl:
        config = CLIPTextConfig(hidden_size=12, projection_dim=10, **text)
        other_words = copy.deepcopy(words)
        other_words.pad_token = "a</w>"  # SDXL's second tokenizer pads with another token, too
        second["text_encoder_2"] = CLIPTextModelWithProjection(config).eval()
        second["tokenizer_2"] = other_words
    scheduler = DDIMScheduler(
        **SCHEDULER,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=rescale_betas_zero_snr,
        timestep_spacing="trailing" if rescale_betas_zero_snr else "leading",
    )
    return {
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": words,
        "unet": unet.eval(),
        "scheduler": scheduler,
        **second,
    }


def autoencoder_tiny() -> AutoencoderTiny:
    """An autoencoder without a posterior, which makes latents an eighth of a picture's size."""
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).eval()


KINDS = {
    "4-channel": {},
    "9-channel": {"in_channels": 9},
    "v-prediction": {"prediction_type": "v_prediction"},
    "sample-prediction": {"prediction_type": "sample"},
    "xl": {"xl": True},
    "xl-9-channel": {"xl": True, "in_channels": 9},
    "zero-terminal-snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


@cache
def parts(kind: str = "4-channel") -> dict:
    """The parts of a tiny model for pictures of 32 x 32 pixels, made once; treat as read-only."""
    return components(sample_size=4, **KINDS[kind])


@cache
def controlnet() -> Path:
    """The folder of a ControlNet that changes pictures: what such begin with as zeros is noise."""
    torch.manual_seed(1)
    net = ControlNetModel.from_unet(
        parts()["unet"], conditioning_embedding_out_channels=(4, 4, 8, 8)
    )
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    folder = Path(mkdtemp()) / "lines"
    net.save_pretrained(folder)
    return folder


@cache
def drawer(kind: str = "4-channel") -> LatentDiffusion:
    """`parts(kind)` as our pipeline."""
    return LatentDiffusion(**parts(kind))
