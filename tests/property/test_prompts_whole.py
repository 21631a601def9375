"""No token of a prompt is ever left out, whatever its length, and no word of it cut."""

import numpy as np
import pytest
import torch
from fakes import LETTERS, parts

from latentgen.text import encode_prompts


def random_prompts(seed):
    """One to three texts of up to 400 letters and blanks; short, long and empty ones."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, rng.choice([2, 80, 400]), rng.integers(1, 4))
    letters = [letter for letter in [*LETTERS, " "] if letter not in "()"]  # not weights
    return ["".join(rng.choice(letters, length)) for length in lengths]


class Recorder:
    """A text encoder that remembers the tokens it was given."""

    device = torch.device("cpu")
    config = None

    def __call__(self, ids, attention_mask=None):
        self.ids = ids
        return (torch.zeros(*ids.shape, 1),)


@pytest.mark.parametrize("seed", range(60))
def test_every_token_reaches_the_text_encoder_in_order(seed):
    prompts = random_prompts(seed)
    words, recorder = parts()["tokenizer"], Recorder()
    positive, _ = encode_prompts([(words, recorder)], prompts, [])
    counts = [len(told.states) // 77 for told in positive]
    chunks = recorder.ids.split(counts)  # of each prompt
    for rows, prompt in zip(chunks, prompts, strict=True):
        read: list[list[int]] = []
        for row in rows.tolist():
            assert row[0] == words.bos_token_id
            assert words.eos_token_id in row
            read.append(row[1 : row.index(words.eos_token_id)])
        assert [token for chunk in read for token in chunk] == words(
            prompt, add_special_tokens=False
        ).input_ids
        for chunk in read[:-1]:
            whole = words.convert_ids_to_tokens(chunk[-1]).endswith("</w>")
            assert 55 < len(chunk) < 76 if whole else len(chunk) == 75
        assert len(read) == 1 or read[-1]
