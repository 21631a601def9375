"""Teach a model one subject from 3 to 10 pictures of it: DreamBooth (Ruiz et al. 2022).

    accelerate launch training/train_dreambooth.py --instance_data_dir my/robot \
        --instance_prompt "sks robot" --with_prior_preservation --class_prompt "robot" \
        --class_data_dir runs/class-robot --output_dir runs/sks

With prior preservation, the model keeps what the class looks like: it draws pictures of
`--class_prompt` before it learns, once, and trains on them too. The result is a LoRA file, or with
`--full_weights` a whole model.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from latentgen.training.config import flag, needs, outside, parse_config
from latentgen.training.finetune import fine_tune
from latentgen.training.lesson import Prior
from latentgen.training.methods import LoraConfigFlags, lora_method, whole_method
from latentgen.training.run import main


@dataclass(kw_only=True)
class DreamBoothConfig(LoraConfigFlags):
    """All that can be said about such a run."""

    instance_data_dir: Path = flag(help="3 to 10 pictures of the subject")
    instance_prompt: str = flag(help="what they show, with a rare word: 'sks robot'")
    with_prior_preservation: bool = flag(False, help="keep what the class looks like")
    class_data_dir: Path | None = flag(None, help="its pictures; what is missing is drawn")
    class_prompt: str | None = flag(None, help="what they show, without that word: 'robot'")
    num_class_images: int = flag(50, help="how many there must be")
    full_weights: bool = flag(False, help="all weights of the U-Net learn, not a LoRA")

    def __post_init__(self) -> None:
        if self.train_data_dir is not None and self.train_data_dir != self.instance_data_dir:
            raise ValueError("train_data_dir: here it is called --instance_data_dir")
        self.train_data_dir = self.instance_data_dir
        super().__post_init__()
        if not self.instance_prompt.strip():
            raise ValueError("instance_prompt: say what the pictures show")
        needed = (self.class_data_dir, self.class_prompt)
        if self.with_prior_preservation and None in needed:
            raise ValueError(
                "with_prior_preservation needs --class_prompt and --class_data_dir, a folder for "
                "the pictures that the model draws of it"
            )
        names = ["class_data_dir", "class_prompt", "num_class_images", "prior_loss_weight"]
        needs(self, names, self.with_prior_preservation, "--with_prior_preservation")
        outside(self, "class_data_dir", "instance_data_dir")
        if self.num_class_images < 1:
            raise ValueError(f"num_class_images: {self.num_class_images}; use 1 or more")
        names = ["rank", "lora_alpha", "lora_dropout", "target_modules", "lora_layout"]
        names += ["use_dora", "use_rslora", "text_encoder_lr", "output_name"]
        needs(self, names, not self.full_weights, "a LoRA (it says --full_weights)")
        needs(self, ["shuffle_caption"], False, "captions: all pictures have --instance_prompt")


def train_dreambooth() -> None:
    config = parse_config(DreamBoothConfig, __doc__.split("\n")[0])
    if config.full_weights:
        method = whole_method(config.train_text_encoder)
    else:
        method = lora_method(config, trigger_phrase=config.instance_prompt)
    prior = None
    if config.with_prior_preservation:
        prior = Prior(config.class_data_dir, config.class_prompt, config.num_class_images)
    fine_tune(
        config,
        method,
        lambda picture: replace(picture, captions=(config.instance_prompt,)),
        prior,
    )


if __name__ == "__main__":
    main(train_dreambooth)
