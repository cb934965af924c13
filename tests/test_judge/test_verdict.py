"""What must follow free prose, by a table; the sums on digits by hand."""

import math

import pytest

from nanopersrm.judge.verdict import beats, beats_jointly, closing, mean, soft_score


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
    assert beats_jointly([[0, 0.5], [0.25, 0.25]]) == 0.25 + 0.25 / 2
    assert (mean([[1, 2], [3, 6]]), mean([[1, 2]], 4)) == ([2, 4], [0.25, 0.5])


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
