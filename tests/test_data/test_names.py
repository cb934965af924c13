"""Names: what counts as one, who signed, and what the last name is."""

import pytest

from data.names import Names, count_names, rare_names, surname, unsigned
from data.writings import Piece


def pieces(*texts: str) -> list[Piece]:
    return [Piece(f"a{i}", "t", None, text, "d") for i, text in enumerate(texts)]


def test_a_rare_name_is_in_capitals_inside_sentences():
    texts = ["So I met Heathcliff and Mary. Perhaps I'm mad.", "Then Mary went. Never mind."]
    names = count_names(pieces(*texts, *["Mary, never, perhaps."] * 8))["d"]
    assert names == Names(10, {"heathcliff": 1})  # all know Mary; the rest only open sentences


def test_words_that_look_like_names():
    text = "On a Monday in March I was OBSESSED with DAP. The Reed grew, a reed, the reed."
    assert count_names(pieces(text))["d"].rare == {"dap": 1}


def test_domains_are_counted_apart():
    other = Piece("b", "t", None, "So Heathcliff ran.", "e")
    assert count_names([*pieces("We saw Emma."), other])["e"].rare == {"heathcliff": 1}


def test_rare_names_of_a_text():
    known = Names(9, {"darcy": 1, "reed": 1})
    assert rare_names("Darcy's hat, the reed, Mr. Collins.", known) == {"darcy"}


@pytest.mark.parametrize(
    ("author", "name"),
    [
        ("Jane Austen", "Austen"),
        ("ed-mullen", "Mullen"),
        ("Martin King, Jr.", "King"),
        ("zoe", "Zoe"),
        ("u1", ""),
        ("---", ""),
    ],
)
def test_surnames(author: str, name: str):
    assert surname(author) == name


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("All set.\n\nThanks,\nTessa", "All set.\n\nThanks,"),
        ("All set.\n\nThanks, Tessa Long\n", "All set.\n\nThanks,"),
        ("All set.\n- tessa", "All set."),
        ("Tessa came.\nI left.", "Tessa came.\nI left."),
        ("Ask me.\nAnd then I shall ask Tessa too.", "Ask me.\nAnd then I shall ask Tessa too."),
    ],
)
def test_signatures(text: str, without: str):
    assert unsigned(text, "Tessa Long") == without
