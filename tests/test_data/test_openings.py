"""Openings: one whole sentence, and to the letter what its author wrote next."""

import random

from hypothesis import given
from hypothesis import strategies as st

from data.kinds.openings import LEAST, MOST, draw_opening, first_words, sentence_ends
from data.shelf import Source

TEXT = " ".join(f"Ship {i} lay in the bay until March. Then it went {i}." for i in range(30))


def source(text: str, question: str = "") -> Source:
    return Source("d", "Ann", "t", None, text, question, 7)


def test_an_opening_is_a_sentence_and_the_rest_follows_it():
    found = {draw_opening(source(TEXT), 60, random.Random(seed)) for seed in range(60)}
    for opening in found - {None}:
        assert opening is not None
        assert opening.text.endswith("lay in the bay until March.")  # the other is too short
        assert f"{opening.text} {opening.rest}" in TEXT
        assert 60 <= len(opening.rest.split()) <= 60 + MOST + 10
    assert len(found - {None}) > 5


def test_a_short_writing_is_taken_whole():
    opening = draw_opening(source("Today I went to the big market. I ate."), 2, random.Random(0))
    assert opening is not None
    assert (opening.text, opening.rest) == ("Today I went to the big market.", "I ate.")


def test_what_would_be_rejected_anyway_is_refused():
    first = "Today I went to the big market."
    for rest in (
        "I ate.",
        "I met old Ann there, and so we ate and drank until ten.",
        "We ate. " * 9,
    ):
        expected = rest.count("We ate.") == 9  # else too short, or with the name of the writer
        opening = draw_opening(source(f"{first} {rest}"), 18, random.Random(0))
        assert (opening is not None) == expected
    assert draw_opening(source("I ate.", "Why?"), 18, random.Random(0)) is None


def test_the_question_of_a_writing_is_its_opening():
    opening = draw_opening(source(TEXT, " Why? "), 60, random.Random(0))
    assert opening is not None
    assert (opening.text, opening.rest) == ("Why?", TEXT)


def test_what_cannot_open_is_refused():
    short = "No. Not I. Never so. " * 20
    listed = "- one thing that I should like to have.\n- another thing that I want."
    quoted = '"I went to the market with my brother. We ate." So he said it. ' * 9
    endless = "so we went on " * 60
    for text in (short, listed, endless):
        assert draw_opening(source(text), 60, random.Random(0)) is None
    for seed in range(30):
        opening = draw_opening(source(quoted), 60, random.Random(seed))
        assert opening is None or opening.text.count('"') % 2 == 0


def test_first_words_ends_where_a_sentence_does():
    text = 'One two.  Three four five!\n\nSix (seven?) "Eight. Nine." Ten'
    assert [words for words, _ in sentence_ends(text)] == [2, 5, 7, 9]
    assert first_words(text, 1) == "One two."
    assert first_words(text, 5) == "One two.  Three four five!"
    assert first_words(text, 99) == text.removesuffix(" Ten")
    assert first_words("no end", 5) == ""


@given(
    st.lists(st.sampled_from(["a", "Mr.", "b.", "C!", '"d', 'e."', "\n\n", "- f"]), max_size=30),
    st.integers(0, 40),
)
def test_first_words_is_always_a_beginning(parts: list[str], words: int):
    text = " ".join(parts)
    found = first_words(text, words)
    assert text.strip().startswith(found)
    assert found == "" or found in {text[:end].strip() for _, end in sentence_ends(text)}


def test_the_least_opening():
    assert draw_opening(source("a b c d so. " * 20), 30, random.Random(0)) is None
    assert LEAST == 6
    assert draw_opening(source("a b c d e so. " * 20), 30, random.Random(0)) is not None
