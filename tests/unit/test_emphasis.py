"""The WebUI's prompt syntax: what counts how much, and what it does to the embeddings."""

import contextlib
import time

import pytest
import torch
from fakes import parts
from hypothesis import given
from hypothesis import strategies as st

from latentgen import InvalidRequest, emphasis
from latentgen.request import Request
from latentgen.text import encode_prompts

WORDS, ENCODER = parts()["tokenizer"], parts()["text_encoder"]


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a red apple", [("a red apple", 1)]),
        ("a (red) apple", [("a ", 1), ("red", 1.1), (" apple", 1)]),
        ("a [red] apple", [("a ", 1), ("red", 1 / 1.1), (" apple", 1)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red : .5 )", [("red ", 0.5)]),
        ("(red:-1)", [("red", -1)]),
        ("((red))", [("red", 1.21)]),
        ("(a (red:2) apple)", [("a ", 1.1), ("red", 2.2), (" apple", 1.1)]),
        ("([red])", [("red", 1)]),
        ("(red [old) apple]", [("red ", 1.1), ("old", 1), (" apple", 1 / 1.1)]),
        (r"a \(red\) \[apple\] \\", [("a (red) [apple] \\", 1)]),
        ("a (red apple", [("a ", 1), ("red apple", 1.1)]),
        ("a [red apple", [("a ", 1), ("red apple", 1 / 1.1)]),
        ("a red) apple]", [("a red) apple]", 1)]),
        ("a:1.3) b", [("a:1.3) b", 1)]),
        ("(a: b)", [("a: b", 1.1)]),
        ("red (apple:1.0) pie", [("red apple pie", 1)]),
        ("xBREAKx", [("xBREAKx", 1)]),
        ("", []),
        ("()", []),
    ],
)
def test_what_counts_how_much(prompt, pieces):
    [found] = emphasis.read(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


def test_break_begins_a_section_and_weights_go_on():
    assert emphasis.read("a BREAK b") == [[("a ", 1)], [(" b", 1)]]
    assert emphasis.read("BREAK BREAK a") == [[], [(" ", 1)], [(" a", 1)]]
    for nothing_more in ("a BREAK", "a BREAK "):  # as in the WebUI
        assert emphasis.read(nothing_more) == [[("a ", 1)]]
    assert emphasis.read("BREAK") == [[]]
    assert emphasis.read("(a BREAK b:2)") == [[("a ", 2)], [(" b", 2)]]


@given(st.text(st.characters(exclude_characters="()[]\\", exclude_categories=["Cs"])))
def test_a_text_without_brackets_stays_as_it_is(text):
    if "BREAK" not in text:
        [found] = emphasis.read(text)
        assert "".join(piece for piece, _ in found) == text
        assert len(found) <= 1


@pytest.mark.parametrize(
    ("prompt", "told"),
    [("(" * 33 + "a", "at most 32"), ("(a:101)", "weights lie"), ("(a:" + "9" * 400 + ")", "lie")],
)
def test_what_no_model_could_draw_is_refused(prompt, told):
    for fields in ({"prompt": prompt}, {"prompt": "a", "negative_prompt": prompt}):
        with pytest.raises(InvalidRequest, match=told) as refused:
            Request(**fields)
        assert refused.value.field == list(fields)[-1]


@pytest.mark.parametrize("part", ["(a", "a)", " ", ":", "[a]", "\\", "(a:1.1) ", "BREAK "])
def test_long_prompts_are_read_in_a_moment(part):
    begin = time.monotonic()
    with contextlib.suppress(InvalidRequest):
        emphasis.read(part * (20_000 // len(part)))
    assert time.monotonic() - begin < 2  # what took a square of the length would take minutes


def states(prompt):
    (found,), _ = encode_prompts([(WORDS, ENCODER)], [prompt], [])
    return found.states


def test_the_states_of_a_word_are_multiplied_and_the_mean_restored():
    plain, found = states("a red apple"), states("a (red:1.5) apple")
    ids = WORDS("a red apple").input_ids
    red = slice(len(WORDS("a").input_ids) - 1, len(WORDS("a red").input_ids) - 1)
    assert WORDS("red", add_special_tokens=False).input_ids == ids[red]
    expected = plain.clone()
    expected[red] *= 1.5
    tells = plain.mean().abs() > 0.02 * plain.std()
    if tells and plain.mean() * expected.mean() > 0:
        expected *= plain.mean() / expected.mean()
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, plain)


class Known:
    """A text encoder with given states."""

    config, device = None, torch.device("cpu")

    def __init__(self, mean):
        generator = torch.Generator().manual_seed(0)
        self.states = torch.randn(1, 77, 8, generator=generator)
        self.states += mean - self.states.mean()

    def __call__(self, ids, attention_mask=None):
        return (self.states.expand(len(ids), -1, -1),)


@pytest.mark.parametrize(("mean", "restored"), [(0.5, True), (-0.5, True), (0.0, False)])
def test_only_a_mean_that_says_something_is_restored(mean, restored):
    encoder = Known(mean)
    (words,), _ = encode_prompts([(WORDS, encoder)], ["(a red apple:1.8)"], [])
    found = words.states
    first, last = found[0] / encoder.states[0, 0], found[1] / encoder.states[0, 1]
    torch.testing.assert_close(last / first, torch.full((8,), 1.8))
    if restored:
        assert found.mean().item() == pytest.approx(mean, abs=1e-4)
    else:
        torch.testing.assert_close(first, torch.ones(8))


def test_a_weight_of_one_and_escaped_brackets_change_no_bit():
    assert torch.equal(states("a (red:1.0) apple"), states("a red apple"))
    assert torch.equal(states(r"a \(red\)"), states(r"a \(red)"))


def test_each_section_has_a_chunk_of_its_own():
    assert torch.equal(states("a cat BREAK a hat")[77:], states("a hat"))
    assert len(states("a cat BREAK a hat")) == 2 * 77


def test_weights_of_one_prompt_change_no_other_picture(pipe):
    options = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 3}
    both = pipe.generate(["a (cat:1.8)", "a dog"], ["", "[red]"], seed=3, **options).images
    for k, (prompt, negative) in enumerate([("a (cat:1.8)", ""), ("a dog", "[red]")]):
        alone = pipe.generate(prompt, negative, seed=3 + k, **options).images
        torch.testing.assert_close(both[k], alone[0], atol=1e-5, rtol=0)
    plain = pipe.generate("a cat", seed=3, **options).images
    assert (both[0] - plain[0]).abs().max() > 1e-4
