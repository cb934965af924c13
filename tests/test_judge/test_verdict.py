"""The reply's grammar by tables and round trips; the sums on digits by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm.judge.verdict import LABELS, OPEN, beats, closing, parse, soft_score, write

GOOD = "<think>\nTerse.\n</think>\n<scores>A=7 B=3</scores>"
HEAD = "<think>\nx\n</think>\n"


@pytest.mark.parametrize(
    ("text", "reasoning", "scores"),
    [
        (f"\n  {GOOD}\n\n", "Terse.", {"A": 7, "B": 3}),
        ("<think></think><scores>A=1 B=9</scores>", "", {"A": 1, "B": 9}),
        (HEAD + "<scores>\nA=2\tB=2\n</scores>", "x", {"A": 2, "B": 2}),
        ("<think>a\n\nb < c</think>\n\n<scores>A=5 B=5</scores>", "a\n\nb < c", {"A": 5, "B": 5}),
        ("<think><scores>A=1</scores></think><scores>A=2 B=3</scores>", None, {"A": 2, "B": 3}),
        ("<think>" + "ü" * 1_000_000 + "</think><scores>A=4 B=6</scores>", None, {"A": 4, "B": 6}),
    ],
)
def test_well_formed_replies(text, reasoning, scores):
    verdict = parse(text, "AB")
    assert (verdict.problem, verdict.scores) == (None, scores)
    assert reasoning is None or verdict.reasoning == reasoning


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no <think>"),
        ("<THINK>x</THINK><scores>A=7 B=3</scores>", "no <think>"),
        ("<think>\nx\n<scores>A=7 B=3</scores>", "no </think>"),
        ("<think>" * 150_000, "no </think>"),
        ("<think>a<think>b</think>c</think><scores>A=7 B=3</scores>", "no <scores>"),
        (HEAD, "no <scores>"),
        (HEAD + "So: <scores>A=7 B=3</scores>", "no <scores>"),
        (HEAD + "<scores>A=7 B=3", "no <scores>"),
        (GOOD + " I am sure.", "no <scores>"),
        (HEAD + "<scores>A=7B=3</scores>", "no <scores>"),
        (HEAD + "<scores>А=7 B=3</scores>", "no <scores>"),  # a Cyrillic A
        (HEAD + "<scores>A=7 B=３</scores>", "no <scores>"),  # a wide 3
        (HEAD + "<scores>A=10 B=3</scores>", "no <scores>"),
        (HEAD + "<scores>B=3 A=7</scores>", "no <scores>"),
        (HEAD + "<scores>A=7 B=3 C=1</scores>", "no <scores>"),
        (HEAD + f"<scores>A={'7' * 10**6} B=3</scores>", "no <scores>"),
    ],
)
def test_rude_replies_have_a_reason_and_no_scores(text, problem):
    verdict = parse(text, "AB")
    assert verdict.scores is None
    assert verdict.problem is not None
    assert verdict.problem.startswith(problem)
    assert len(verdict.problem) < 100
    assert "\n" not in verdict.problem


TAGS = ["<think>", "</think>\n", "<scores>", "</scores>", "A=7", "B=3", "A=0", "=3", " ", "\n", "é"]


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(TAGS)).map("".join)))
def test_any_text_has_scores_or_a_problem(text):
    verdict = parse(text, "AB")
    assert (verdict.scores is None) == (verdict.problem is not None)


@settings(deadline=None)
@given(st.text(), st.lists(st.integers(1, 9), min_size=1, max_size=26))
def test_what_is_written_is_read_back(reasoning, digits):
    reasoning = reasoning.replace("</think>", "")
    labels = LABELS[: len(digits)]
    scores = dict(zip(labels, digits, strict=True))
    verdict = parse(write(reasoning, scores), labels)
    assert (verdict.reasoning, verdict.scores) == (reasoning.strip(), scores)


def test_soft_score_by_hand():
    assert soft_score([0] * 7 + [0.5, 0.5]) == 8.5
    assert soft_score([1 / 9] * 9) == pytest.approx(5)
    assert math.isnan(soft_score([math.nan] * 9))


def one_hot(digit: int) -> list[float]:
    return [float(d == digit) for d in range(1, 10)]


def test_beats_by_hand():
    assert beats(one_hot(9), [0.5] + [0.0] * 7 + [0.5]) == 0.75
    assert [beats(one_hot(4), one_hot(d)) for d in (5, 3, 4)] == [0, 1, 0.5]
    a = [0.5, 0, 0, 0, 0.5, 0, 0, 0, 0]
    b = [0, 0, 0.25, 0, 0.75, 0, 0, 0, 0]
    assert beats(a, b) == 1 - beats(b, a) == 1 / 2 * 1 / 4 + 1 / 2 * 3 / 4 / 2


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
        verdict = parse(f"{OPEN}{free}{forced}7</scores>", "A")
        assert (verdict.reasoning, verdict.scores) == (thought, {"A": 7})
