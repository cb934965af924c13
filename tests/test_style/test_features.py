"""Counts are right, layout does not matter, no text is too rude."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm.style.features import FACTORS, measure
from nanopersrm.style.profile import factor_distance, ngram_similarity, profile

DEMO = Path(__file__).parents[2] / "data" / "demo"
WRITERS = {
    folder.name: [path.read_text("utf-8") for path in sorted(folder.glob("*.txt"))]
    for folder in sorted(DEMO.iterdir())
}
EVERY_TEXT = [text for texts in WRITERS.values() for text in texts]
PLAIN = "The cat sat on a mat near the old door. It saw a bird there. The bird flew off at noon."

# (factor, text, expected), each worked by hand.
WORKED = [
    ("sentence_length", "I came; I saw. Did you?", 3.0),  # 6 words, 2 sentences
    ("sentence_length", "Mr. Hall met Dr. Poe in the U.S. at 3.15 p.m. sharp. He left.", 8.0),
    ("sentence_length", '"Why?" she said. "Because."', 2.0),  # 3 + 1 words
    ("sentence_spread", "One two. One two three four. One two three four five six.", 50.0),
    ("short_sentences", "Go now. This sentence has more than five words in it.", 50.0),
    ("semicolons", "I came; I saw. Did you?", 100 / 6),
    ("semicolons", "one two three four ;) five six seven eight nine ten", 0.0),  # a smiley
    ("dashes", "One - two -- three — four well-known 1914–18 words go on", 100 * 3 / 11),
    ("ellipses", "Well... so… it goes. Yes.", 100 * 2 / 5),
    ("brackets", "We (two of us) left.", 20.0),
    ("quotes", 'He said "no" and “yes” to us.', 100 * 2 / 7),
    ("contractions", "I don't know; it's John's.", 40.0),  # John's is a genitive
    ("contractions", "I don’t know; it’s John’s.", 40.0),
    ("first_person", "I gave him my book.", 40.0),
    ("hedges", "Perhaps it might rain, I think.", 50.0),  # perhaps, might, I think
    ("boosters", "It is very, very good.", 40.0),
    ("word_length", "a bb ccc", 2.0),
    ("variety", " ".join(["same"] * 40), 2.5),
    ("variety", "too short a text", None),
    ("british", "My favourite color is grey.", 200 / 3),
    ("british", "Nothing to see here.", None),
    ("opening_variety", "He ran. He sat. She left.", 200 / 3),  # 1 of 3 pairs alike
    ("conjunction_openings", "And so it was. He left. But why?", 200 / 3),
    ("paragraphs", "One two.\n\nThree four.\n\n\n\nFive.", 40.0),
    ("list_lines", "Bring:\n- milk\n- bread", 200 / 3),
    ("list_lines", "I went home\n- tired as I was - and slept.", 0.0),  # a wrapped dash
    ("lowercase_starts", "no. Yes. 3 times no.", 100 / 3),
    ("capitals", "I said NO to a NATO man", 100 * 2 / 7),
    ("emoji", "ok 😭😭 then :) bye 👩‍🚀", 100 * 4 / 3),
    ("digits", "Room 3 at 10 pm", 40.0),
    ("passives", "It was quickly closed and was taken away by us.", 20.0),
    ("latinate", "The organization of government is hard.", 100 * 2 / 6),
]


@pytest.mark.parametrize(("name", "text", "expected"), WORKED)
def test_worked_by_hand(name: str, text: str, expected: float | None) -> None:
    assert measure([text])[name] == (None if expected is None else pytest.approx(expected))


# What to add, after PLAIN, so that each other factor must rise.
RAISES = {
    "clauses": "Although it fell, which was odd, it ran because it could.",
    "commas": "Red, green, blue, black.",
    "colons": "It ran: it hid.",
    "exclamations": "It ran!",
    "questions": "Did it?",
    "we": "We ran.",
    "second_person": "You ran.",
    "third_person": "She ran.",
    "negations": "It did not run.",
    "duties": "It must run.",
    "informal": "yeah, ok then.",
    "long_words": "Extraordinary circumstances.",
    "adverbs": "It ran quickly.",
    "pronoun_openings": "We ran. They hid.",
    "be": "It was here.",
    "the": "The the the.",
    "of": "Some of it.",
    "and": "Red and blue.",
    "but": "Not red but blue.",
    "that": "All that.",
    "which": "Which one?",
}


@pytest.mark.parametrize("factor", RAISES)
def test_more_of_it_raises_it(factor: str) -> None:
    low, high = measure([PLAIN])[factor], measure([f"{PLAIN} {RAISES[factor]}"])[factor]
    assert low is not None
    assert high is not None
    assert high > low


def test_every_factor_is_tested() -> None:
    assert {factor.name for factor in FACTORS} == {*RAISES, *(name for name, *_ in WORKED)}


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.replace("\n", "  \n") + "   \n\n",
        lambda t: t.replace("\n", "\r\n"),
        lambda t: "\n\n" + t.replace("\n\n", "\n \n\n\n"),
        lambda t: t.replace("'", "’").replace('"', "”"),
        lambda t: t.replace(" ", "  ").replace("\n  ", "\n "),
    ],
    ids=["trailing", "crlf", "blank-lines", "curly", "double-blanks"],
)
def test_layout_changes_nothing(change) -> None:
    for text in EVERY_TEXT:
        assert measure([change(text)]) == measure([text])


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(), max_size=3), st.text())
def test_never_raises_on_any_text(texts: list[str], other: str) -> None:
    for value in measure(texts).values():
        assert value is None or value >= 0.0
    profile(texts)
    assert 0.0 <= ngram_similarity(texts, other) <= 1.0
    assert factor_distance(texts, other) >= 0.0


@pytest.mark.parametrize("unit", [".", "a'", "- ", " :)", "www.", "\u0301\u0316", "(:", "-\n"])
def test_long_texts_take_time_in_proportion(unit: str) -> None:
    def seconds(size: int) -> float:
        text = unit * (size // len(unit)) + "x"
        start = time.perf_counter()
        measure([text])
        return time.perf_counter() - start

    seconds(1_000)
    # Quadratic work on 200,000 characters would take minutes; this takes a fraction of a second.
    assert seconds(200_000) < 3.0
