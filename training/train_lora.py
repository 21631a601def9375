"""Teach a model a style or a concept from captioned pictures: LoRA.

    accelerate launch training/train_lora.py --train_data_dir my/pictures --output_dir runs/mine

The result is one file, runs/mine/mine.safetensors, for `latentgen generate --lora` and for every
program that reads LoRAs. With `--placeholder_token` a new word learns at the same time (pivotal
tuning); its file lies in the folder `embeddings` beside it.
"""

from dataclasses import dataclass, replace

from latentgen.training.config import parse_config
from latentgen.training.finetune import fine_tune
from latentgen.training.lesson import read_pictures
from latentgen.training.methods import (
    LoraConfigFlags,
    WordFlags,
    both,
    lora_method,
    word_method,
    written_out,
)
from latentgen.training.run import main


@dataclass(kw_only=True)
class TrainLoraConfig(LoraConfigFlags, WordFlags):
    """All that can be said about such a run."""


def train_lora() -> None:
    config = parse_config(TrainLoraConfig, __doc__.split("\n")[0])
    pictures = read_pictures(config)
    token = config.placeholder_token
    if token is None:
        fine_tune(config, lora_method(config), pictures)
        return
    pictures = [
        replace(
            picture,
            captions=tuple(
                written_out(caption, token, config.num_vectors) for caption in picture.captions
            ),
        )
        for picture in pictures
    ]
    method = both(lora_method(config, trigger_phrase=token), word_method(config), "embeddings")
    fine_tune(config, method, pictures)


if __name__ == "__main__":
    main(train_lora)
