"""Names of schedulers: every spelling means one thing, and our own form of it is stable."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentgen import InvalidRequest
from latentgen.schedulers import NAMES, SPACINGS, SPREADS, parse

ALIASES = [alias for entry in NAMES.values() for alias in entry.aliases]
CLASSES = [entry.cls for entry in NAMES.values()]
LABELS = [entry.label for entry in NAMES.values()]
SPACING_WORDS = [*SPACINGS, "sgm uniform", "simple", "ddim uniform", "uniform", "align your steps"]


def parsed(text):
    try:
        return parse(text)
    except InvalidRequest as refused:
        return refused.field, refused.hint  # is the combination possible: the same for any spelling


@st.composite
def names(draw):
    words = [draw(st.sampled_from([*NAMES, *ALIASES, *CLASSES, *LABELS]))]
    words += draw(st.lists(st.sampled_from([*SPREADS, "automatic"]), max_size=1))
    words += draw(st.lists(st.sampled_from(SPACING_WORDS), max_size=1))
    return " ".join(words)


@given(names())
def test_our_own_form_parses_to_itself(text):
    name = parsed(text)
    if not isinstance(name, tuple):
        assert parse(str(name)) == name
        assert str(parse(str(name))) == str(name)


@given(names(), st.data())
def test_case_blanks_underscores_and_colons_do_not_matter(text, data):
    joined = data.draw(st.lists(st.sampled_from([" ", "_", ":", "  ", "\t"]), min_size=20))
    spelled = "".join(
        joined[i % len(joined)] if letter in " _" else letter for i, letter in enumerate(text)
    )
    change = data.draw(st.sampled_from([str.lower, str.upper, str.title, str.swapcase]))
    assert parsed(f" {change(spelled)} ") == parsed(text)


@pytest.mark.parametrize("name", NAMES)
def test_label_and_aliases_and_class_mean_the_name(name):
    entry = NAMES[name]
    for spelling in (entry.label, *entry.aliases, name.replace("dpm++", "dpmpp")):
        assert parse(spelling).name == name
    assert NAMES[parse(entry.cls).name].cls == entry.cls


def test_no_two_names_share_a_spelling():
    spellings = [
        spelling.replace("_", " ").lower()
        for name, entry in NAMES.items()
        for spelling in {name, *entry.aliases}
    ]
    for one, other in itertools.combinations(spellings, 2):
        assert one != other


@given(st.text())
def test_any_text_is_understood_or_refused_as_the_scheduler(text):
    name = parsed(text)
    assert not isinstance(name, tuple) or name[0] == "scheduler"
