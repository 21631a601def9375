"""Assemble a model folder in the diffusers layout, in fp16, from what the other scripts trained.

    python training/export_model.py --vae runs/vae/vae --text_encoder runs/clip \\
        --unet runs/unet/unet --output_dir latentgen/models/latentgen-icons-128

Only files that a pipeline reads are written: weights, configurations, the tokenizer (`vocab.json`
and `merges.txt` too, for readers older than `tokenizer.json`), the sampler's settings and
`latentgen.json` with the defaults of a request. README.md and NOTICE of the folder are written by
people and left alone.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from train_text_to_image import build_scheduler
from transformers import CLIPTextModel, CLIPTokenizer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--text_encoder", type=Path, required=True, help="output of train_clip.py")
    parser.add_argument("--unet", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--prediction_type", default="v_prediction")
    parser.add_argument("--scheduler", default="ddim", help="the default sampler's name")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    trained = args.text_encoder / "text_encoder_with_projection"
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(args.vae),
        text_encoder=CLIPTextModel.from_pretrained(trained),
        tokenizer=CLIPTokenizer.from_pretrained(args.text_encoder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(args.unet),
        scheduler=build_scheduler(args.prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(args.output_dir)
    # transformers would load the text encoder in the type its configuration names, diffusers its
    # models in float32; a pipeline loaded without a type must be of one.
    config = args.output_dir / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    pipeline.tokenizer.backend_tokenizer.model.save(str(args.output_dir / "tokenizer"))
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    defaults = {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "scheduler": args.scheduler,
        "height": side,
        "width": side,
    }
    (args.output_dir / "latentgen.json").write_text(json.dumps(defaults, indent=2) + "\n")
    files = [file for file in args.output_dir.rglob("*") if file.is_file()]
    for file in files:
        file.chmod(0o644)
    for config in args.output_dir.glob("*/config.json"):
        facts = json.loads(config.read_text())
        facts.pop("_name_or_path", None)  # where this machine keeps its runs is nobody's business
        config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    print(f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB in {args.output_dir}")


if __name__ == "__main__":
    main()
