"""Teach a model a new word from a few pictures of what it means: textual inversion.

    accelerate launch training/train_textual_inversion.py --train_data_dir my/robot \
        --placeholder_token "<robot>" --initializer_token robot --output_dir runs/robot

Only the word's embedding learns; the result is a file of a few kilobytes for `latentgen generate
--embedding`. Captions that hold the word are used as they are; pictures without captions get
those of TEMPLATES.
"""

from dataclasses import dataclass, replace
from typing import Literal

from latentgen.errors import DataError
from latentgen.training.config import flag, parse_config
from latentgen.training.finetune import fine_tune
from latentgen.training.lesson import read_pictures
from latentgen.training.methods import WordFlags, word_method, written_out
from latentgen.training.run import main

TEMPLATES = {
    "object": ["{}", "a {}", "the {}", "one {}", "a picture of a {}", "an icon of a {}"],
    "style": ["{}", "{} style", "in {} style", "a picture in {} style"],
}


@dataclass(kw_only=True)
class TextualInversionConfig(WordFlags):
    """All that can be said about such a run."""

    learnable_property: Literal["object", "style"] = flag("object", help="what the word means")
    learning_rate: float = flag(5e-3, help="its highest value")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.placeholder_token is None:
            raise ValueError('placeholder_token: name the new word, for example "<robot>"')


def train_textual_inversion() -> None:
    config = parse_config(TextualInversionConfig, __doc__.split("\n")[0])
    token = config.placeholder_token
    templates = [template.format(token) for template in TEMPLATES[config.learnable_property]]
    pictures = []
    for picture in read_pictures(config):
        captions = list(picture.captions) or templates
        if silent := [caption for caption in captions if token not in caption]:
            raise DataError(f"{picture.file}: its caption does not hold {token}: {silent[0]!r}")
        written = tuple(written_out(caption, token, config.num_vectors) for caption in captions)
        pictures.append(replace(picture, captions=written))
    fine_tune(config, word_method(config), pictures)


if __name__ == "__main__":
    main(train_textual_inversion)
