"""Teach a model a new word from a few pictures of what it means: textual inversion.

    accelerate launch training/train_textual_inversion.py --train_data_dir my/robot \
        --placeholder_token "<robot>" --initializer_token robot --output_dir runs/robot

Only the word's embedding learns; the result is a file of a few kilobytes for `latentgen generate
--embedding`. Captions that hold the word are used as they are; pictures without captions get
those of TEMPLATES.
"""

from dataclasses import dataclass, replace
from typing import Literal

from latentgen.training.config import flag, needs, parse_config
from latentgen.training.finetune import fine_tune
from latentgen.training.methods import WordFlags, saying_word, word_method
from latentgen.training.pictures import Picture
from latentgen.training.run import main

TEMPLATES = {
    "object": ["{}", "a {}", "the {}", "one {}", "a picture of a {}", "an icon of a {}"],
    "style": ["{}", "{} style", "in {} style", "a picture in {} style"],
}


@dataclass(kw_only=True)
class TextualInversionConfig(WordFlags):
    """All that can be said about such a run."""

    learning_rate: float = flag(5e-3, help="its highest value")
    learnable_property: Literal["object", "style"] = flag("object", help="what the word means")

    def __post_init__(self) -> None:
        super().__post_init__()
        of_class = "pictures of the class (is_reg in --dataset_config)"
        needs(self, ["prior_loss_weight"], self.dataset_config is not None, of_class)
        needs(self, ["embedding_lr"], False, "a LoRA; here it is --learning_rate")
        if self.placeholder_token is None:
            raise ValueError('placeholder_token: name the new word, for example "<robot>"')


def train_textual_inversion() -> None:
    config = parse_config(TextualInversionConfig, __doc__.split("\n")[0])
    templates = TEMPLATES[config.learnable_property]
    usual = tuple(template.format(config.placeholder_token) for template in templates)

    def prepare(picture: Picture) -> Picture:
        captions = picture.captions if picture.captions else usual
        return saying_word(replace(picture, captions=captions), config)

    fine_tune(config, word_method(config, config.learning_rate), prepare)


if __name__ == "__main__":
    main(train_textual_inversion)
