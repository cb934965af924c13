"""A ledger in sentences: the same numbers, and only words of the texts in quotes."""

import pytest

from nanopersrm.judge.tell import LONGEST_QUOTE, odds, quote, sentence
from nanopersrm.style.evidence import NGRAMS, READING
from nanopersrm.style.ledger import SUM, Line, Passage


def line(
    feature: str, decibans: float, *words: tuple[str, float], writer: float | None = None,
    candidate: float | None = None,
) -> Line:  # fmt: skip
    passages = tuple(Passage(0, len(text), text, worth) for text, worth in words)
    return Line(feature, writer, candidate, decibans, passages)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (line(READING, 6.1, ("the chain\n was dry", 4.0), ("so it was", 3.9), ("no", -9.0)),
         'It reads like the writer, most of all "the chain was dry" (+6.1).'),
        (line(READING, -2.0, ("lol", -4.0), ("the chain", 9.0)),
         'It reads unlike the writer, most of all "lol" (-2.0).'),
        (line(READING, 0.0, ("lol", -4.0)), "It reads like the writer (+0.0)."),
        (line(NGRAMS, 2.5), "It shares more groups of letters with the writer than usual (+2.5)."),
        (line(NGRAMS, -2.5),
         "It shares fewer groups of letters with the writer than usual (-2.5)."),
        (line("semicolons", 0.7, ("cure;", 0.7), writer=2.7, candidate=2.5),
         'It has many semicolons ("cure;"), the writer has many semicolons (+0.7).'),
        (line("semicolons", -3.4, writer=2.7, candidate=0.0),
         "It has no semicolons, the writer has many semicolons (-3.4)."),
        (line("sentence_length", -0.4, writer=40.0, candidate=5.0),
         "It has short sentences, about 5.0 words, the writer has long sentences, about 40 words "
         "(-0.4)."),
        (line(SUM, 6.8), "Together +6.8 decibans: 4.8 to 1 for this writer."),
    ],
)  # fmt: skip
def test_sentences(entry, expected):
    assert sentence(entry) == expected
    if entry.feature != SUM:
        assert sentence(entry, "B") == f"B {expected.removeprefix('It ')}"


def test_the_sum_of_one_of_two():
    assert sentence(line(SUM, -3.0), "B") == (
        "Together B has -3.0 decibans: 2.0 to 1 against this writer."
    )


@pytest.mark.parametrize(
    ("decibans", "expected"),
    [
        (10.0, "10 to 1 for this writer"),
        (-10.0, "10 to 1 against this writer"),
        (3.0, "2.0 to 1 for this writer"),
        (-0.1, "1.0 to 1 against this writer"),
        (26.0, "398 to 1 for this writer"),
        (0.0, "they say nothing either way"),
    ],
)
def test_odds(decibans, expected):
    assert odds(decibans) == expected


def test_a_quote_is_of_the_side_of_the_line_and_short():
    long = "x" * (LONGEST_QUOTE + 1)
    assert quote(line(READING, 1.0, (long, 1.0))) == ""
    assert quote(line(READING, 1.0, (long[1:], 1.0))) == long[1:]
    assert quote(line(READING, 1.0, ("a", -1.0), ("b", 0.0))) == ""
    assert quote(line(READING, -1.0, ("a", -1.0), ("b", -2.0), ("c", 9.0))) == "b"
