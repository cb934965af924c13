"""The reply's grammar, by tables and by an independent regular expression; the sums on digits."""

import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanopersrm.judge.verdict import (
    LABELS,
    OPEN,
    beats,
    closing,
    parse,
    soft_score,
    write,
)

GOOD = "<think>\nTerse.\n</think>\n<scores>A=7 B=3</scores>"
HEAD = "<think>\nx\n</think>\n"

# The grammar once more, as one expression: thinking, one line of scores, nothing else.
THOUGHT = re.compile(r"\s*<think>(?:(?!</think>).)*</think>\s*(<scores>.*</scores>)\s*", re.DOTALL)


def well_formed(text: str, labels: str) -> list[int] | None:
    """The scores, by regular expressions only."""
    found = THOUGHT.fullmatch(text)
    line = r"<scores>\s*" + r"\s+".join(f"{label}=([1-9])" for label in labels) + r"\s*</scores>"
    digits = re.fullmatch(line, found[1]) if found else None
    return [int(digit) for digit in digits.groups()] if digits else None


@pytest.mark.parametrize(
    ("text", "reasoning", "scores"),
    [
        (GOOD, "Terse.", {"A": 7, "B": 3}),
        (f"\n  {GOOD}\n\n", "Terse.", {"A": 7, "B": 3}),
        (GOOD.replace("\n", "\r\n"), "Terse.", {"A": 7, "B": 3}),
        ("<think></think><scores>A=1 B=9</scores>", "", {"A": 1, "B": 9}),
        (HEAD + "<scores>\nA=2\tB=2\n</scores>", "x", {"A": 2, "B": 2}),
        ("<think>a\n\nb < c</think>\n\n<scores>A=5 B=5</scores>", "a\n\nb < c", {"A": 5, "B": 5}),
        ("<think><scores>A=1 B=1</scores></think><scores>A=2 B=3</scores>", None, {"A": 2, "B": 3}),
        ("<think>" + "ü" * 1_000_000 + "</think><scores>A=4 B=6</scores>", None, {"A": 4, "B": 6}),
    ],
)
def test_well_formed_replies(text, reasoning, scores):
    said = parse(text, "AB")
    assert (said.well_formed, said.problem, said.scores) == (True, None, scores)
    assert reasoning is None or said.reasoning == reasoning
    assert well_formed(text, "AB") == list(scores.values())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no <think>"),
        ("A is better.", "no <think>"),
        ("<THINK>x</THINK><scores>A=7 B=3</scores>", "no <think>"),
        ("<scores>A=7 B=3</scores>", "no <think>"),
        ("<think>", "no </think>"),
        ("<think>\nx\n<scores>A=7 B=3</scores>", "no </think>"),
        ("<think>\nx\n</think>", "no <scores> after </think>"),
        (HEAD + "A=7 B=3", "no <scores> after </think>"),
        (HEAD + "So: <scores>A=7 B=3</scores>", "no <scores> after </think>"),
        ("<think>a<think>b</think>c</think><scores>A=7 B=3</scores>", "no <scores> after </think>"),
        (HEAD + "<scores>A=7 B=3", "no </scores>"),
        (GOOD + " I am sure.", "text after </scores>"),
        (GOOD + "\n<scores>A=7 B=3</scores>", "text after </scores>"),
        (HEAD + "<scores>A=7, B=3</scores>", "not a score: 'A=7,'"),
        (HEAD + "<scores>A=7B=3</scores>", "not a score: 'A=7B=3'"),
        (HEAD + "<scores>A=7.5 B=3</scores>", "not a score: 'A=7.5'"),
        (HEAD + "<scores>a=7 b=3</scores>", "not a score: 'a=7'"),
        (HEAD + "<scores>А=7 B=3</scores>", "not a score: 'А=7'"),  # a Cyrillic A
        (HEAD + "<scores>A=0 B=3</scores>", "A=0 is not a digit from 1 to 9"),
        (HEAD + "<scores>A=10 B=3</scores>", "A=10 is not a digit from 1 to 9"),
        (HEAD + "<scores>A=7 A=3</scores>", "A is scored twice"),
        (HEAD + "<scores></scores>", "scores for nobody, not AB"),
        (HEAD + "<scores>A=7</scores>", "scores for A, not AB"),
        (HEAD + "<scores>B=3 A=7</scores>", "scores for BA, not AB"),
        (HEAD + "<scores>A=7 B=3 C=1</scores>", "scores for ABC, not AB"),
        ("<think>" * 150_000, "no </think>"),
        (HEAD + "<scores>A=" + "7" * 1_000_000, "no </scores>"),
        (HEAD + f"<scores>A={'7' * 10**6} B=3</scores>", f"A={'7' * 20} is not a digit from 1"),
        (HEAD + f"<scores>{'y' * 10**6}</scores>", f"not a score: '{'y' * 20}'"),
    ],
)
def test_rude_replies_have_a_reason_and_no_scores(text, problem):
    said = parse(text, "AB")
    assert said.problem is not None
    assert said.problem.startswith(problem)
    assert len(said.problem) < 100
    assert "\n" not in said.problem
    assert (said.well_formed, said.scores) == (False, None)
    assert len(text) > 10_000 or well_formed(text, "AB") is None


TAGS = ["<think>", "<think>\n", "</think>", "\n</think>\n", "<scores>", "</scores>"]
MARKS = ["A=7", "B=3", "A=0", "B=10", "C=1", "A=", "=3", "７", "A=7 B=3", " ", "\n", "\r\n", "\t"]
WHOLES = ["<scores>A=7 B=3</scores>", "</think>\n<scores>A=1 B=9</scores>", "\0", "é", "\u2028"]
PIECES = [*TAGS, *MARKS, *WHOLES]
REPLIES = st.one_of(
    st.text(),
    st.lists(st.sampled_from(PIECES)).map("".join),
    st.lists(st.one_of(st.sampled_from(PIECES), st.characters())).map(
        lambda middle: HEAD + "<scores>" + "".join(middle) + "</scores>"
    ),
)


@settings(max_examples=300, deadline=None)
@given(REPLIES, st.integers(1, 3))
@example(GOOD, 2)
@example(HEAD + "<scores>A=7</scores>", 1)
def test_scores_only_where_the_grammar_says_so(text, count):
    """Total, and agreed upon: no text raises, and none scores that is not well formed."""
    labels = LABELS[:count]
    said, expected = parse(text, labels), well_formed(text, labels)
    assert (said.scores is None) == (said.problem is not None) == (not said.well_formed)
    assert said.scores == (None if expected is None else dict(zip(labels, expected, strict=True)))


@settings(deadline=None)
@given(st.text(), st.lists(st.integers(1, 9), min_size=1, max_size=26))
def test_what_is_written_is_read_back(reasoning, digits):
    reasoning = reasoning.replace("</think>", "")
    labels = LABELS[: len(digits)]
    scores = dict(zip(labels, digits, strict=True))
    said = parse(write(reasoning, scores), labels)
    assert (said.reasoning, said.scores, said.problem) == (reasoning.strip(), scores, None)


def test_soft_score_by_hand():
    assert soft_score([0] * 7 + [0.5, 0.5]) == 8.5
    assert soft_score([1] + [0] * 8) == 1
    assert soft_score([1 / 9] * 9) == pytest.approx(5)
    assert math.isnan(soft_score([math.nan] * 9))
    with pytest.raises(ValueError, match="zip"):
        soft_score([0.5, 0.5])


def one_hot(digit: int) -> list[float]:
    return [float(d == digit) for d in range(1, 10)]


def test_beats_by_hand():
    assert beats(one_hot(9), [0.5] + [0.0] * 7 + [0.5]) == 0.75
    assert beats(one_hot(3), one_hot(4)) == 0
    assert beats(one_hot(4), one_hot(3)) == 1
    assert beats(one_hot(4), one_hot(4)) == 0.5
    # a is 1 or 5, b is 3 with 1/4 and 5 with 3/4: wins 1/2 · 1/4, ties 1/2 · 3/4
    a = [0.5, 0, 0, 0, 0.5, 0, 0, 0, 0]
    b = [0, 0, 0.25, 0, 0.75, 0, 0, 0, 0]
    assert beats(a, b) == 0.125 + 0.375 / 2
    assert beats(b, a) == 1 - beats(a, b)


@pytest.mark.parametrize(
    ("free", "thought", "forced"),
    [
        ("", "", "</think>\n<scores>A="),
        ("Terse.", "Terse.", "\n</think>\n<scores>A="),
        ("Terse.\n", "Terse.", "</think>\n<scores>A="),
        (" Terse. \n</think>", "Terse.", "\n<scores>A="),
        ("Terse.\n</think>\n", "Terse.", "<scores>A="),
        ("a</think> b", "a", "\n<scores>A="),
    ],
)
def test_closing_makes_a_reply_of_anything(free, thought, forced):
    assert closing(free) == (thought, forced)
    if not free.endswith("b"):
        said = parse(f"{OPEN}{free}{forced}7</scores>", "A")
        assert (said.reasoning, said.scores) == (thought, {"A": 7})
