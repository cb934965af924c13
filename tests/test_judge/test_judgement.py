"""From digits to scores, preferences, a ranking and a verdict, by hand; mirrored calls; NaN.

The probabilities are sixteenths, so that every sum is exact and "mirrored" can mean equal, bit for
bit. (`Judge` makes it so for all numbers by asking in an order of its own.)
"""

import json
import math
from dataclasses import dataclass
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanopersrm.judge.ranking import bradley_terry, preference, schedule

from nanopersrm import InputError
from nanopersrm.judge.judgement import (
    JudgeConfig,
    JudgedReply,
    Judgement,
    pairwise,
    pointwise,
    ranked,
    read_reply,
    verdict_of,
)
from nanopersrm.judge.verdict import write

NAN = math.nan


@dataclass
class Drawn:
    """An answer, as far as this file reads it."""

    digits: list[float]
    joint: list[list[float]] | None = None


def one_hot(digit: int) -> Drawn:
    return Drawn([float(d == digit) for d in range(1, 10)])


def both(cells: dict[tuple[int, int], float]) -> Drawn:
    """p(a, b) given at a few cells."""
    joint = [[cells.get((a, b), 0.0) for b in range(1, 10)] for a in range(1, 10)]
    return Drawn([math.fsum(row) for row in joint], joint)


SIXTEENTHS = st.lists(st.integers(1, 9), min_size=16, max_size=16).map(
    lambda digits: Drawn([digits.count(d) / 16 for d in range(1, 10)])
)
JOINT = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=16, max_size=16).map(
    lambda cells: both({cell: cells.count(cell) / 16 for cell in cells})
)


def in_pairs(n: int) -> list[tuple[int, ...]]:
    return [order for i, j in schedule(n) for order in ((i, j), (j, i))]


def test_pointwise_by_hand():
    """Nine against an even chance of one and nine: it wins half the time and ties the other."""
    asked = [(0,), (1,)]
    scores, table = pointwise(2, asked, [[one_hot(9)], [Drawn([0.5] + [0.0] * 7 + [0.5])]])
    assert scores == [9, 5]
    assert table == [[0.5, 0.75], [0.25, 0.5]]
    order = ranked(table)
    assert (order, verdict_of(scores, table, order)) == ([0, 1], 0)


def test_pointwise_averages_samples():
    asked = [(0,), (1,)]
    scores, table = pointwise(2, asked, [[one_hot(2), one_hot(8)], [one_hot(5), one_hot(5)]])
    assert scores == [5, 5]
    assert table[0][1] == 0.5
    assert verdict_of(scores, table, ranked(table)) == "tie"


def test_one_candidate():
    scores, table = pointwise(1, [(0,)], [[one_hot(4)]])
    assert (scores, table, ranked(table)) == ([4], [[0.5]], [0])
    assert verdict_of(scores, table, [0]) == 0


def test_pairwise_by_hand():
    """0 first: 7 against 3 for sure. 1 first: 5 against 5 or 6 against 2."""
    asked = [(0, 1), (1, 0)]
    answers = [[both({(7, 3): 1.0})], [both({(5, 5): 0.5, (6, 2): 0.5})]]
    scores, table = pairwise(2, asked, answers)
    # 0 beats 1: 1 in its own order; 1/4 in the other, so 5/8
    assert table == [[0.5, 0.625], [0.375, 0.5]]
    assert scores == [(7 + 3.5) / 2, (3 + 5.5) / 2]
    assert verdict_of(scores, table, ranked(table)) == 0


def test_pairwise_averages_samples_and_orders_alike():
    answers = [[both({(9, 1): 1.0}), both({(1, 9): 1.0})], [both({(2, 4): 1.0})] * 2]
    scores, table = pairwise(2, [(0, 1), (1, 0)], answers)
    assert table[0][1] == (1 + 0 + 1 + 1) / 4
    assert scores == [(9 + 1 + 4 + 4) / 4, (1 + 9 + 2 + 2) / 4]


def test_a_judge_that_only_sees_positions_finds_a_tie():
    """Always the first, in both orders: nothing is known, and nothing is said."""
    for n in (2, 5, 12):
        asked = in_pairs(n)
        scores, table = pairwise(n, asked, [[both({(8, 2): 1.0})] for _ in asked])
        assert table == [[0.5] * n for _ in range(n)]
        assert scores == [5.0] * n
        assert verdict_of(scores, table, ranked(table)) == "tie"


@pytest.mark.parametrize("n", [3, 8, 11])
def test_many_are_ranked_by_their_strengths(n):
    """The lower index fits better, in each order, with 3 to 1: also for pairs never compared."""
    asked = in_pairs(n)
    answers = [
        [both({(7, 3): 0.75, (3, 7): 0.25} if a < b else {(3, 7): 0.75, (7, 3): 0.25})]
        for a, b in asked
    ]
    scores, table = pairwise(n, asked, answers)
    strengths = bradley_terry(n, dict.fromkeys(schedule(n), 0.75))
    far = min(3, n - 1)
    assert ((0, far) in schedule(n)) == (n <= 8)
    assert table[0][far] == preference(strengths[0], strengths[far])
    if n <= 8:
        assert ranked(table) == list(range(n))
        assert scores == sorted(scores, key=lambda score: -(score or 0))
    for i in range(n):
        for j in range(n):
            assert table[i][j] == (1 - table[j][i] if i > j else table[i][j])
            assert (table[i][j] > 0.5) == (strengths[i] > strengths[j])


@settings(max_examples=60, deadline=None)
@given(st.lists(SIXTEENTHS, min_size=2, max_size=5), st.randoms())
def test_pointwise_mirrors_exactly(drawn, random):
    n = len(drawn)
    order = list(range(n))
    random.shuffle(order)
    asked = [(i,) for i in range(n)]
    scores, table = pointwise(n, asked, [[one] for one in drawn])
    moved, mirrored = pointwise(n, asked, [[drawn[i]] for i in order])
    assert moved == [scores[i] for i in order]
    assert mirrored == [[table[i][j] for j in order] for i in order]
    assert all(table[i][j] + table[j][i] == 1 for i in range(n) for j in range(n))


@settings(max_examples=60, deadline=None)
@given(JOINT, JOINT)
def test_pairwise_mirrors_exactly(one, two):
    """The two candidates swapped: the same prompts, told the other way round."""
    asked = [(0, 1), (1, 0)]
    scores, table = pairwise(2, asked, [[one], [two]])
    swapped, mirrored = pairwise(2, asked, [[two], [one]])
    assert swapped == scores[::-1]
    assert mirrored == [row[::-1] for row in table[::-1]]
    before, after = ranked(table), ranked(mirrored)
    found, turned = verdict_of(scores, table, before), verdict_of(swapped, mirrored, after)
    assert turned == ({0: 1, 1: 0}[found] if isinstance(found, int) else found)


@settings(max_examples=20, deadline=None)
@given(st.lists(JOINT, min_size=12, max_size=12))
def test_four_in_pairs_mirror(drawn):
    """Strengths come from an iteration, so here "the same" is up to its end."""
    asked = in_pairs(4)
    by_pair = dict(zip(asked, drawn, strict=True))
    scores, table = pairwise(4, asked, [[one] for one in drawn])
    for order in list(permutations(range(4)))[5::7]:
        answers = [[by_pair[order[pair[0]], order[pair[1]]]] for pair in asked]
        moved, mirrored = pairwise(4, asked, answers)
        assert moved == [scores[i] for i in order]
        for i in range(4):
            expected = [table[order[i]][order[j]] for j in range(4)]
            assert mirrored[i] == pytest.approx(expected, abs=1e-4)


def test_identical_candidates_tie():
    drawn = [one_hot(3), one_hot(7), one_hot(7)]
    scores, table = pointwise(3, [(0,), (1,), (2,)], [[one] for one in drawn])
    order = ranked(table)
    assert order == [1, 2, 0]  # exact ties keep their order
    assert verdict_of(scores, table, order) == "tie"
    assert table[1][2] == 0.5


def test_a_tie_further_down_does_not_hide_the_best():
    drawn = [one_hot(3), one_hot(3), one_hot(7)]
    scores, table = pointwise(3, [(0,), (1,), (2,)], [[one] for one in drawn])
    assert ranked(table) == [2, 0, 1]
    assert verdict_of(scores, table, ranked(table)) == 2


def test_nearly_a_tie_is_none():
    table = [[0.5, 0.5 + 2**-50], [0.5 - 2**-50, 0.5]]
    assert verdict_of([5.0, 5.0], table, ranked(table)) == 0


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_probability_that_is_no_number_is_invalid_pointwise(bad):
    drawn = [one_hot(3), one_hot(5), one_hot(7)]
    drawn[bad] = Drawn([NAN] * 9)
    scores, table = pointwise(3, [(0,), (1,), (2,)], [[one] for one in drawn])
    assert [i for i in range(3) if scores[i] is None] == [bad]
    assert sorted(ranked(table)) == [0, 1, 2]
    assert verdict_of(scores, table, ranked(table)) == "invalid"
    others = [i for i in range(3) if i != bad]
    assert table[others[1]][others[0]] == 1  # what is known stays known
    assert all(math.isnan(table[i][bad]) for i in others)


def test_one_bad_sample_of_several_is_not_averaged_away():
    answers = [[one_hot(3), Drawn([NAN] * 9)], [one_hot(4), one_hot(4)]]
    scores, table = pointwise(2, [(0,), (1,)], answers)
    assert scores == [None, 4]
    assert verdict_of(scores, table, ranked(table)) == "invalid"


@pytest.mark.parametrize("n", [2, 3, 9])
def test_a_probability_that_is_no_number_is_invalid_pairwise(n):
    asked = in_pairs(n)
    answers = [[both({(5, 5): 1.0})] for _ in asked]
    answers[1] = [both({(5, 5): NAN})]
    scores, table = pairwise(n, asked, answers)
    assert [i for i in range(n) if scores[i] is None] == sorted(asked[1])
    assert verdict_of(scores, table, ranked(table)) == "invalid"


def test_verdict_is_invalid_whichever_part_is():
    fine = [[0.5, 1.0], [0.0, 0.5]]
    assert verdict_of([7.0, 3.0], fine, [0, 1]) == 0
    assert verdict_of([7.0, None], fine, [0, 1]) == "invalid"
    assert verdict_of([7.0, 3.0], [[0.5, NAN], [NAN, 0.5]], [0, 1]) == "invalid"


def test_a_pair_needs_joint_digits():
    with pytest.raises(AssertionError, match="joint"):
        pairwise(2, [(0, 1), (1, 0)], [[one_hot(3)], [one_hot(4)]])


def test_json_has_no_nan():
    reply = JudgedReply((0,), "<think>\nx\n</think>", "x", "no <scores> after </think>", True)
    judgement = Judgement(
        scores=[None, 4.0],
        preference=[[0.5, NAN], [NAN, 0.5]],
        ranking=[0, 1],
        verdict="invalid",
        reasoning=["x"],
        well_formed=False,
        tokens=3,
        prompt_tokens=5,
        seconds=0.5,
        replies=[reply],
    )
    plain = json.loads(json.dumps(judgement.as_dict(), allow_nan=False))
    assert plain["preference"] == [[0.5, None], [None, 0.5]]
    assert plain["scores"] == [None, 4.0]
    assert plain["replies"][0]["problem"] == "no <scores> after </think>"
    assert math.isnan(judgement.preference[0][1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"think_tokens": 0}, "think_tokens: expected a whole number of at least 1, got 0"),
        ({"samples": -1}, "samples: expected a whole number of at least 1, got -1"),
        ({"seed": 0.5}, "seed: expected a whole number, got 0.5"),
        ({"temperature": -0.1}, "temperature: expected 0 to 100, got -0.1"),
        ({"temperature": NAN}, "temperature: expected 0 to 100, got nan"),
        ({"temperature": "hot"}, "temperature: expected 0 to 100, got 'hot'"),
        ({"think": "no"}, "think: expected True or False, got 'no'"),
        ({"copy_quotes": None}, "copy_quotes: expected True or False, got None"),
        ({"mode": "listwise"}, "mode: expected pointwise or pairwise, got 'listwise'"),
    ],
)
def test_a_wrong_setting_is_named(wrong, message):
    with pytest.raises(InputError) as caught:
        JudgeConfig(**wrong)
    assert str(caught.value) == message


def test_what_a_reply_claims_is_measured_again():
    """Once as it is, once not, and a quote that nobody wrote."""
    own, other = "It rained; we stayed; nobody came.", "It rained. We stayed. Nobody came."
    text = write(
        'The writer has many semicolons, as in "we stayed", and A has many semicolons, '
        'as in "she left".',
        {"A": 3},
    )
    found = read_reply((1,), text, False, [own], [other])
    assert (found.candidates, found.problem) == ((1,), None)
    assert (found.claims, found.claims_true) == (2, 1)
    assert found.untrue == ("A, many semicolons", '"she left"')
    assert found.checked == '1 of 2 claims hold; untrue: A, many semicolons; "she left"'
    text = text.replace(", and A", ".\n<think>\nA")  # a tag of the model's own hides nothing
    assert read_reply((1,), text, False, [own], [other]).untrue == found.untrue
    silent = read_reply((0,), write("", {"A": 3}), False, [own], [other])
    assert (silent.claims, silent.untrue) == (0, ())
