"""Tokens become words, words become phrases, by hand; what is topic; texts of every kind."""

import json
import re
import time
from dataclasses import asdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm.style.phrases import (
    LEAST_GAIN,
    MOST_WORDS,
    Phrase,
    Word,
    only_exemplars,
    phrases,
    with_topics,
    words_of,
)


def spans_of(tokens: list[str]) -> list[tuple[int, int]]:
    """Where each token stands in the text that they make."""
    ends = [len("".join(tokens[: i + 1])) for i in range(len(tokens))]
    return [(end - len(token), end) for end, token in zip(ends, tokens, strict=True)]


def words(gains: dict[str, float] | list[tuple[str, float]], topics: str = "") -> list[Word]:
    """Words with a blank after each, and the gain of each."""
    pairs = [*(gains.items() if isinstance(gains, dict) else gains)]
    spans = spans_of([f"{word} " for word, _ in pairs])
    return [
        Word(start, end - 1, gain, word in topics.split())
        for (start, end), (word, gain) in zip(spans, pairs, strict=True)
    ]


def best(gains: dict[str, float], topics: str = "", count: int = 3) -> list[tuple[str, float]]:
    return [(p.text, p.gain) for p in phrases(words(gains, topics), " ".join(gains), count)]


# Words


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        # (token, gain) -> (word, gain)
        ([("The", 1), (" ca", 2), ("t", 4), (".", 8)], [("The", 1), ("cat.", 14)]),
        ([("so", 1), ("\n\n", 64), ("Be", 2), (" it", 4)], [("so", 1), ("Be", 2), ("it", 4)]),
        ([("on", 1), (" ", 2), ("4", 4), (" May", 8)], [("on", 1), ("4", 6), ("May", 8)]),
        ([("a b", 1), (" c ", 2), ("d", 4)], [("a", 0), ("b", 1), ("c", 2), ("d", 4)]),
        ([("a\r\n", 1), ("b", 2), ("  ", 4), ("\t", 8)], [("a", 1), ("b", 2)]),
        ([("no", 1), (" spa", 2)], [("no", 1), ("spa", 2)]),
        ([("oneword", 1.23456)], [("oneword", 1.2346)]),
        ([("?!", 1), ("…", 2)], [("?!…", 3)]),
        ([], []),
    ],
)
def test_tokens_become_words(tokens, expected):
    text = "".join(token for token, _ in tokens)
    found = words_of(text, spans_of([token for token, _ in tokens]), [gain for _, gain in tokens])
    assert [(text[word.start : word.end], word.gain) for word in found] == expected
    assert not any(word.topic for word in found)


def test_pieces_of_a_character_all_count():
    """Tokens of bytes: three of them make 😭, and each stands at the whole of it."""
    found = words_of("no 😭!", [(0, 2), (2, 4), (3, 4), (3, 4), (4, 5)], [1, 2, 4, 8, 16])
    assert found == [Word(0, 2, 1), Word(3, 5, 30)]


@pytest.mark.parametrize(
    ("text", "read", "expected"),
    [
        ("one two three", 7, ["one", "two"]),  # cut between words
        ("one two three", 8, ["one", "two"]),
        ("one two three", 10, ["one", "two"]),  # cut inside the third
        ("one two three", 13, ["one", "two", "three"]),
        ("onetwothree", 5, []),
        ("日本語の文章です。", 3, []),
    ],
)
def test_a_word_that_was_cut_is_left_out(text, read, expected):
    found = words_of(text, [(i, i + 1) for i in range(read)], [1.0] * read)
    assert [text[word.start : word.end] for word in found] == expected


# Phrases


def test_the_worked_example():
    gains = {"The": 0.1, "machine": 2, "has": 1.5, "since": 3, "failed": -1, "twice.": -2}
    found = phrases(words(gains), " ".join(gains))
    assert found == [Phrase(4, 21, "machine has since", 6.5), Phrase(22, 35, "failed twice.", -3)]


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({"a": 1.0, "b": -1.0, "c": 0.9, "d": -0.9}, [("a", 1), ("b", -1)]),  # the least gain
        ({"a": 2.0, "b": -0.4, "c": 2.0}, [("a b c", 3.6)]),  # a bridge that pays
        ({"a": 2.0, "b": -1.6, "c": 2.0}, [("a", 2), ("c", 2), ("b", -1.6)]),
        ({"a": 5.0, "b": 1.0, "c": 9.0}, [("a b c", 15)]),
        ({"a": 2.0, "b": 0.5, "c": 2.0}, [("a b c", 4.5)]),
        ({"a": 2.0, "b": 0.4}, [("a", 2)]),  # less than the margin
        (dict.fromkeys("abcd", 0.45), []),  # 1.8 nats, but no word brings the margin
        (dict.fromkeys("abcdefghijkl", 1.0), [("a b c d e f g h", 8), ("i j k l", 4)]),
        ({"I": 2.0, "came.": 2.0, "So": 2.0}, [("I came.", 4), ("So", 2)]),  # a sentence ends
        ({"Mr.": 2.0, "Wu": 2.0}, [("Mr. Wu", 4)]),
        ({"a": 0.0}, []),
        ({}, []),
    ],
)
def test_phrases_by_hand(gains, expected):
    assert best(gains) == expected


def test_so_many_of_each_and_the_greatest_first():
    gains = {f"w{i}": (-1) ** i * (i + 4.0) for i in range(9)}
    assert [gain for _, gain in best(gains)] == [12, 10, 8, -11, -9, -7]
    assert best(gains, count=1) == [("w8", 12), ("w7", -11)]


@pytest.mark.parametrize("gap", [" ", "\n", " \n ", "\r\n", "\t"])
@pytest.mark.parametrize("blank", ["\n\n", "\r\n\r\n", "\n \t\n", "\r\r", " \n\n\n"])
def test_a_blank_line_ends_a_phrase_and_a_line_break_does_not(gap, blank):
    text = f"one{gap}two{blank}three"
    found = [Word(*match.span(), gain=2.0) for match in re.finditer(r"\S+", text)]
    assert [phrase.text for phrase in phrases(found, text)] == [f"one{gap}two", "three"]


# Topic


EXEMPLARS = ["The MACHINE failed; Mr. Wu’s report says so.", "Nobody saw the report, Mr. Wu."]


@pytest.mark.parametrize(
    ("word", "exemplar"),
    [
        ("machine", 0),
        ("“Machine,”", 0),
        ("nobody", None),  # common
        ("saw", 1),
        ("Wu", 1),  # the other has "wu's"
        ("Wu's", 0),
        ("report.", None),  # both have it
        ("the", None),
        ("tractor", None),  # nobody has it
        ("machine-saw", None),  # of two
        ("machine-tractor", 0),
        ("!!", None),
        ("1,000", None),
    ],
)
def test_words_of_one_exemplar(word, exemplar):
    exemplars = [f"{EXEMPLARS[0]} 1,000 !!", EXEMPLARS[1]]
    expected = {} if exemplar is None else {0: exemplar}
    assert only_exemplars(word, words({word: LEAST_GAIN}), exemplars) == expected
    assert only_exemplars(word, words({word: LEAST_GAIN - 0.1}), exemplars) == {}
    assert only_exemplars(word, words({word: -LEAST_GAIN}), exemplars) == {}


@pytest.mark.parametrize(
    ("without", "only", "topic"),
    [
        (0.99, {1: 0}, True),  # of 4 nats
        (1.0, {1: 0}, False),  # a quarter stays
        (-3.0, {1: 0}, True),
        (0.0, {1: 1}, False),  # another exemplar has it
        (0.0, {0: 0}, False),
        (0.0, {}, False),
    ],
)
def test_a_word_whose_gain_vanishes_is_topic(without, only, topic):
    before, after = words({"a": 3.0, "saw": 4.0}), words({"a": 3.0, "saw": without})
    assert with_topics(before, after, only, 0) == [before[0], Word(2, 5, 4.0, topic)]


def test_topic_comes_after_style():
    """A phrase is topic where topic words have more than half of its gain."""
    gains = {"saw": 9.0, "no": -2.0, "more": 3.0, "rain": 2.0, "ever": 2.0}
    found = phrases(words(gains, "saw rain"), " ".join(gains))
    expected = [("more rain ever", False), ("saw", True), ("no", False)]
    assert [(p.text, p.topic) for p in found] == expected
    half = phrases(words({"rain": 2.0, "ever": 2.0}, "rain"), "rain ever")
    assert [(p.text, p.topic) for p in half] == [("rain ever", False)]


# Any text


HOSTILE = [
    "",
    " \r\n\t ",
    "😭",
    "👩‍👩‍👧 naïve… süß",
    "?!;—",
    "One\r\n\r\ntwo.\rThree\x00\x1b[2J",
    "日本語の文章です。次の文。",
    "a\u2028b\u3000c\u200bd\ufeff",
    "x" * 5000,
]


@settings(max_examples=60, deadline=None)
@given(
    text=st.one_of(st.sampled_from(HOSTILE), st.text(alphabet="ab. \n\r😭;", max_size=60)),
    gains=st.lists(st.floats(-9, 9), min_size=60, max_size=60),
    steps=st.lists(st.integers(1, 4), min_size=60, max_size=60),
)
def test_words_and_phrases_of_any_text(text, gains, steps):
    """Places are true and in order, nothing overlaps, no word is split, nothing is lost."""
    ends = [sum(steps[: i + 1]) for i in range(60)]
    spans = [
        (end - step, min(end, len(text)))
        for end, step in zip(ends, steps, strict=True)
        if end - step < len(text)
    ]
    found = words_of(text, spans, gains[: len(spans)])
    read = spans[-1][1] if spans else 0
    assert [text[w.start : w.end] for w in found] == [
        match[0] for match in re.finditer(r"\S+", text) if match.end() <= read
    ]
    shown = phrases(found, text)
    json.dumps([asdict(phrase) for phrase in shown], allow_nan=False)
    for a, b in pairwise(sorted(shown, key=lambda phrase: phrase.start)):
        assert a.end <= b.start
    for phrase in shown:
        assert phrase.text == text[phrase.start : phrase.end]
        within = [w for w in found if phrase.start <= w.start and w.end <= phrase.end]
        assert (within[0].start, within[-1].end) == (phrase.start, phrase.end)
        assert len(within) <= MOST_WORDS
        assert phrase.gain == pytest.approx(sum(w.gain for w in within), abs=1e-3)
        assert abs(phrase.gain) >= LEAST_GAIN
        assert not re.search(r"\n\s*\n", phrase.text)


def test_ten_thousand_words_are_quick():
    long = words([(f"w{i % 7}", (i * 7919 % 61 - 30) / 10) for i in range(10_000)])
    text = " ".join(f"w{i % 7}" for i in range(10_000))
    start = time.process_time()
    assert words_of(text, [(w.start, w.end) for w in long], [w.gain for w in long]) == long
    assert len(phrases(long, text)) == 6
    assert time.process_time() - start < 2
