"""Teach a model a style or a concept from captioned pictures: LoRA.

    accelerate launch training/train_lora.py --train_data_dir my/pictures --output_dir runs/mine

The result is one file, runs/mine/mine.safetensors, for `latentgen generate --lora` and for every
program that reads LoRAs. With `--placeholder_token` a new word learns at the same time (pivotal
tuning); its file lies in the folder `embeddings` beside it.
"""

from dataclasses import dataclass

from latentgen.training.config import needs, parse_config
from latentgen.training.finetune import fine_tune
from latentgen.training.methods import (
    LoraConfigFlags,
    WordFlags,
    both,
    lora_method,
    saying_word,
    word_method,
)
from latentgen.training.run import main


@dataclass(kw_only=True)
class TrainLoraConfig(LoraConfigFlags, WordFlags):
    """All that can be said about such a run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        of_class = "pictures of the class (is_reg in --dataset_config)"
        needs(self, ["prior_loss_weight"], self.dataset_config is not None, of_class)


def train_lora() -> None:
    config = parse_config(TrainLoraConfig, __doc__.split("\n")[0])
    if config.placeholder_token is None:
        fine_tune(config, lora_method(config))
    else:
        lora = lora_method(config, trigger_phrase=config.placeholder_token)
        method = both(lora, word_method(config, config.embedding_lr), "embeddings")
        fine_tune(config, method, lambda picture: saying_word(picture, config))


if __name__ == "__main__":
    main(train_lora)
