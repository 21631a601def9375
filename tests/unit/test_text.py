"""Prompts become embeddings: whole, in chunks, and up to 75 tokens exactly as diffusers does."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from fakes import parts
from torch import nn

from latentgen.text import encode_prompts

WORDS, ENCODER = parts()["tokenizer"], parts()["text_encoder"]
BOS, EOS, PAD = WORDS.bos_token_id, WORDS.eos_token_id, WORDS.pad_token_id


class Tokens(nn.Module):
    """Embeds every token as its own number."""

    config, device = None, torch.device("cpu")

    def forward(self, ids, attention_mask=None):
        assert attention_mask is None
        self.ids = ids
        return (ids[..., None].float(),)


def tokens(prompt, *negatives):
    """Those of the prompt, and of its negative if there is one."""
    positive, negative = encode_prompts([(WORDS, Tokens())], [prompt], negatives)
    return [words.states[:, 0].long().tolist() for words in [*positive, *negative]]


def letters(count):
    return "ab" * (count // 2) + "a" * (count % 2)


@pytest.mark.parametrize(
    ("length", "chunks"), [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3)]
)
def test_75_tokens_fill_a_chunk(length, chunks):
    assert len(WORDS(letters(length), add_special_tokens=False).input_ids) == length
    assert len(tokens(letters(length))[0]) == 77 * chunks


def test_every_chunk_has_its_own_start_and_end():
    ids = WORDS(letters(100), add_special_tokens=False).input_ids
    (found,) = tokens(letters(100))
    assert found[:77] == [BOS, *ids[:75], EOS]
    assert found[77:] == [BOS, *ids[75:], EOS, *[PAD] * 50]


def texts(prompt, words=WORDS):
    """What its chunks say, without blanks."""
    encoder = Tokens()
    encode_prompts([(words, encoder)], [prompt], [])
    rows = [words.convert_ids_to_tokens(row[1 : row.index(EOS)]) for row in encoder.ids.tolist()]
    return ["".join(row).replace("</w>", "") for row in rows]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a" * 55 + ",", "c" * 30),
        ("a" * 60 + ", " + "b" * 10 + ",", "c d" * 8),
        ("a" * 74 + ",", "c"),
        ("a" * 60 + ", " + "b" * 14, ", c"),  # a comma too much
        ("a" * 54 + ", " + "c" * 20, "c" * 10),  # 21 from the end
    ],
)
def test_a_chunk_ends_at_a_comma_as_in_the_webui(first, second):
    blank = "" if first[-1] == "c" else " "
    assert texts(first + blank + second) == [part.replace(" ", "") for part in (first, second)]


def test_a_chunk_ends_with_a_word():
    assert texts("a" * 70 + " house") == ["a" * 70 + "house"]
    assert texts("a" * 71 + " house (on a:1.2) hill") == ["a" * 71, "houseonahill"]


def test_a_textual_inversion_is_whole():
    words = copy.deepcopy(WORDS)
    new = ["<x>", *(f"<x>_{i}" for i in range(1, 30))]
    words.add_tokens(new)
    whole = "".join(new)
    assert texts(f"{45 * 'a'} {whole} b", words) == [45 * "a" + whole, "b"]
    for length in (46, 60, 74, 75):
        assert texts(f"{length * 'a'} {whole} b", words) == [length * "a", whole + "b"]
    more = [f"<x>_{i}" for i in range(30, 80)]
    words.add_tokens(more)
    assert len(texts("".join([*new, *more]), words)) == 2  # 80 vectors fit into none


def test_prompt_and_negative_get_one_length():
    long, short = tokens(letters(160), "a")
    assert len(long) == len(short) == 3 * 77
    assert short[77:] == [BOS, EOS, *[PAD] * 75] * 2
    long, short = tokens("a", letters(160))
    assert len(long) == len(short) == 3 * 77


def test_no_negatives_no_embeddings_of_them():
    assert len(tokens("a")) == 1


def test_a_tokenizer_that_does_not_know_its_length_takes_the_encoders():
    words = copy.deepcopy(WORDS)
    words.model_max_length = 10**30
    found, _ = encode_prompts([(words, ENCODER)], [letters(80)], [])
    expected, _ = encode_prompts([(WORDS, ENCODER)], [letters(80)], [])
    assert torch.equal(found[0].states, expected[0].states)


def test_another_prompt_of_the_call_changes_no_length():
    prompts, negatives = ["a", letters(80), "b"], ["", "c", letters(160)]
    for rows in encode_prompts([(WORDS, Tokens())], prompts, negatives):
        assert [len(words.states) for words in rows] == [77, 2 * 77, 3 * 77]


@pytest.mark.parametrize("prompt", ["", "a", "a red apple, on a table.", letters(74), letters(75)])
def test_up_to_75_tokens_the_embeddings_are_diffusers(prompt):
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline(
        **parts(), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    with torch.no_grad():
        expected = stock.encode_prompt(prompt, "cpu", 1, True, "dark")
    for (found,), (wanted,) in zip(
        encode_prompts([(WORDS, ENCODER)], [prompt], ["dark"]), expected, strict=True
    ):
        assert torch.equal(found.states, wanted)
        assert found.pooled is None


def test_a_longer_prompt_draws_another_picture_than_its_beginning(pipe):
    options = {"num_inference_steps": 2, "output_type": "pt", "seed": 1}
    whole = pipe.generate(letters(75) + " and a house", **options).images
    beginning = pipe.generate(letters(75), **options).images
    assert not torch.equal(whole, beginning)


def test_an_encoder_whose_weights_are_offloaded_is_given_tokens_where_it_runs():
    encoder, cpu = copy.deepcopy(ENCODER), torch.device("cpu")
    cpu_offload(encoder, cpu)
    assert encoder.device.type == "meta"
    found, _ = encode_prompts([(WORDS, encoder)], ["a cat"], [], cpu)
    expected, _ = encode_prompts([(WORDS, ENCODER)], ["a cat"], [])
    assert torch.equal(found[0].states, expected[0].states)


def test_an_encoder_that_was_trained_with_a_mask_gets_one():
    class Masked(Tokens):
        class config:
            use_attention_mask = True

        def forward(self, ids, attention_mask):
            self.mask = attention_mask
            return (ids[..., None].float(),)

    encoder = Masked()
    encode_prompts([(WORDS, encoder)], [letters(80)], [])
    assert encoder.mask.sum(dim=1).tolist() == [77, 7]
