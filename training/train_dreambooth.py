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

from accelerate import PartialState

from latentgen.pipeline import LatentDiffusion
from latentgen.training.config import flag, parse_config
from latentgen.training.finetune import fine_tune
from latentgen.training.lesson import find_model, read_pictures
from latentgen.training.methods import LoraConfigFlags, lora_method, whole_method
from latentgen.training.pictures import Picture, check_pictures, picture_files
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
        if not self.with_prior_preservation and needed != (None, None):
            raise ValueError("class_prompt and class_data_dir go with --with_prior_preservation")


def train_dreambooth() -> None:
    config = parse_config(DreamBoothConfig, __doc__.split("\n")[0])
    instances = [
        replace(picture, captions=(config.instance_prompt,)) for picture in read_pictures(config)
    ]
    check_pictures(instances, allow=config.allow)  # before the class is drawn
    if config.full_weights:
        method = whole_method(config.train_text_encoder)
    else:
        method = lora_method(config, trigger_phrase=config.instance_prompt)
    fine_tune(config, method, instances + class_pictures(config))


def class_pictures(config: DreamBoothConfig) -> list[Picture]:
    """The pictures of the class; those that are missing are drawn, unless this is a dry run."""
    if not config.with_prior_preservation:
        return []
    folder, prompt = config.class_data_dir, config.class_prompt
    folder.mkdir(parents=True, exist_ok=True)
    missing = config.num_class_images - len(picture_files(folder))
    if config.dry_run and missing > 0:
        print(f"{missing} pictures of {prompt!r} would be drawn into {folder}")
    elif missing > 0:
        state = PartialState()
        if state.is_main_process:
            draw_class_pictures(config)
        state.wait_for_everyone()
    return [Picture(file, (prompt,), is_reg=True) for file in picture_files(folder)]


def draw_class_pictures(config: DreamBoothConfig) -> None:
    """Picture i is drawn from seed i, so that a run that was stopped draws the missing ones."""
    found = find_model(config)
    pipe = LatentDiffusion.from_pretrained(found.hub_id or found.path, revision=config.revision)
    for seed in range(config.num_class_images):
        file = config.class_data_dir / f"{seed:04d}.png"
        if len(picture_files(config.class_data_dir)) >= config.num_class_images:
            break
        if not file.exists():
            partial = file.with_suffix(".partial")
            pipe.generate(config.class_prompt, seed=seed).image.save(partial, "PNG")
            partial.replace(file)


if __name__ == "__main__":
    main(train_dreambooth)
