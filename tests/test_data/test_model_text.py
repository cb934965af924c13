"""Model text: plain typography, loops cut off, and every way to fail has its reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.kinds.model_text import loops, model_fault, packed, paragraphs, tidy, without_loop

GOOD = (
    "The men had gone by noon, and the yard was quiet. A dog slept near the gate. Nobody could say "
    "where the key was, so we climbed in at the back window and made tea. It rained until six."
)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("“Well”—he said…", '"Well" - he said...'),
        ("one -- two – three", "one - two - three"),
        ("from 1914–1918", "from 1914–1918"),
        ("It’s. . . late", "It's... late"),
        ("a line\nwrapped  here \n\n\nnext", "a line wrapped here\n\nnext"),
        ("This:\n\n1. one\n2. two", "This:\n\n1. one\n2. two"),
        ("  \n ", ""),
    ],
)
def test_tidy(reply: str, text: str):
    assert tidy(reply) == text
    assert tidy(text) == text


@given(st.text(alphabet="ab .!\n-—’…1", max_size=60))
def test_tidy_never_raises_and_is_done_at_once(reply: str):
    assert tidy(tidy(reply)) == tidy(reply)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (
            "He sat in the sun. She saw it. He sat in the sun. More.",
            "He sat in the sun. She saw it.",
        ),
        ("I was alone! So it was. I was alone! I was", "I was alone! So it was."),
        ("One.\n\nThey had the old men and they had the old men and they had the old men.", "One."),
        (GOOD, GOOD),
        ("No end mark", "No end mark"),
        ("", ""),
    ],
)
def test_without_loop(text: str, kept: str):
    assert without_loop(text) == kept
    assert without_loop(kept) == kept


def test_paragraphs_survive():
    assert without_loop("One thing is so.\n\nTwo things are not.") == (
        "One thing is so.\n\nTwo things are not."
    )


def test_short_paragraphs_are_joined():
    long = " ".join(["word"] * 30)
    assert paragraphs("One.\n\nTwo.\n\nThree.") == "One. Two. Three."
    assert paragraphs(f"{long}.\n\n{long}.") == f"{long}.\n\n{long}."
    assert paragraphs(f"{long}.\n\nTwo.\n\n{long}.") == f"{long}. Two.\n\n{long}."
    assert paragraphs("So:\n\n1. one") == "So:\n\n1. one"


def test_four_words_three_times_are_a_loop():
    once = "they had no men and"
    assert not loops(f"{once} {once} then")
    assert loops(f"{once} {once} {once}")
    assert loops("They had, no men! and they had no men - they HAD no men")


def test_a_text_that_packs_too_well_is_repetition():
    words = ["sun", "sea", "sky"]
    text = " ".join(f"The {words[i % 3]} and the {words[i % 2]}." for i in range(30))
    assert packed(text) < 0.45 < packed(GOOD)
    assert model_fault(text, 10, 200) == "model: repetition"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        ("Sure! " + GOOD, "model: chat phrase"),
        ("Here is more. " + GOOD, "model: chat phrase"),
        (GOOD + " As an AI language model I cannot go on.", "model: chat phrase"),
        (GOOD + " The sentence is a paradox.", "model: chat phrase"),
        (GOOD + " The use of the word tea is odd.", "model: chat phrase"),
        ("Assistant: " + GOOD, "model: chat phrase"),
        (GOOD + "\n\n1. Tea\n2. Milk", "model: markup"),
        (GOOD + " <|im_end|>", "model: markup"),
        (GOOD + " **Tea**", "model: markup"),
        (GOOD + " \U0001f600", "model: odd characters"),
        ("Too short.", "model: too short"),
        ("", "model: too short"),
        (GOOD + " " + " ".join(f"w{i}" for i in range(99)) + ".", "model: too long"),
        (GOOD + " It was late" * 4 + ".", "model: repetition"),
        (GOOD + " The ships lay in the bay until the spring.", "model: echo"),
        (GOOD + " Said the Clerk.", "model: style's name"),
    ],
)
def test_reasons(text: str, reason: str | None):
    shown = ["In those years the ships lay in the bay until the spring came."]
    assert model_fault(text, 20, 90, shown, ["clerk"]) == reason


def test_seven_words_in_common_are_no_echo():
    shown = ["the ships lay in the bay until May"]
    assert model_fault(GOOD + " The ships lay in the bay until then.", 20, 90, shown) is None
