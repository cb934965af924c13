"""From digits to scores, preferences, a ranking and a verdict, by hand; mirrored calls; NaN.

The probabilities are sixteenths, so that every sum is exact and "mirrored" can mean equal, bit for
bit. (`Judge` makes it so for all numbers by asking in an order of its own.)
"""

import math
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm import InputError
from nanopersrm.judge.judgement import (
    ALL_PAIRS_UP_TO,
    PRIOR,
    JudgeConfig,
    bradley_terry,
    orders_of,
    pairwise,
    ranked,
    schedule,
    strength_preference,
    verdict_of,
)
from nanopersrm.judge.reply import Reply

NAN = math.nan


def both(cells: dict[tuple[int, int], float]) -> Reply:
    """p(a, b) given at a few cells."""
    joint = [[cells.get((a, b), 0.0) for b in range(1, 10)] for a in range(1, 10)]
    return Reply(digits=[math.fsum(row) for row in joint], joint=joint)


def test_pairwise_by_hand():
    """0 first: 7 against 3 for sure. 1 first: 5 against 5 or 6 against 2."""
    orders = [(0, 1), (1, 0)]
    answers = [[both({(7, 3): 1.0})], [both({(5, 5): 0.5, (6, 2): 0.5})]]
    scores, table = pairwise(2, orders, answers)
    # 0 beats 1: 1 in its own order; 1/4 in the other, so 5/8
    assert table == [[0.5, 0.625], [0.375, 0.5]]
    assert scores == [(7 + 3.5) / 2, (3 + 5.5) / 2]
    assert verdict_of(scores, table, ranked(table)) == 0


@pytest.mark.parametrize("n", [3, 8, 11])
def test_many_are_ranked_by_their_strengths(n):
    """The lower index fits better, in each order, with 3 to 1: also for pairs never compared."""
    orders = orders_of(n, "pairwise")
    answers = [
        [both({(7, 3): 0.75, (3, 7): 0.25} if a < b else {(3, 7): 0.75, (7, 3): 0.25})]
        for a, b in orders
    ]
    scores, table = pairwise(n, orders, answers)
    strengths = bradley_terry(n, dict.fromkeys(schedule(n), 0.75))
    far = min(3, n - 1)
    assert ((0, far) in schedule(n)) == (n <= 8)
    assert table[0][far] == strength_preference(strengths[0], strengths[far])
    if n <= 8:
        assert ranked(table) == list(range(n))
        assert scores == sorted(scores, key=lambda score: -(score or 0))
    for i in range(n):
        for j in range(n):
            assert table[i][j] == (1 - table[j][i] if i > j else table[i][j])
            assert (table[i][j] > 0.5) == (strengths[i] > strengths[j])


@pytest.mark.parametrize("n", [2, 3])
def test_a_probability_that_is_no_number_is_invalid_pairwise(n):
    orders = orders_of(n, "pairwise")
    answers = [[both({(5, 5): NAN if k == 1 else 1.0})] for k in range(len(orders))]
    scores, table = pairwise(n, orders, answers)
    assert [i for i in range(n) if scores[i] is None] == sorted(orders[1])
    assert verdict_of(scores, table, ranked(table)) == "invalid"


@pytest.mark.parametrize(
    "wrong",
    [{"think_tokens": 0}, {"think_lines": 0}, {"samples": -1}, {"temperature": NAN},
     {"mode": "listwise"}, {"choose": "best"}, {"free": True, "all_evidence": True},
     {"free": True, "think": False}, {"free": True, "choose": "random"}],
)  # fmt: skip
def test_a_wrong_setting_is_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        JudgeConfig(**wrong)


@pytest.mark.parametrize(
    ("settings", "by_rule", "rule", "most_lines", "temperature"),
    [
        ({}, False, "all", 8, 0.0),
        ({"think_lines": 3, "samples": 2}, False, "all", 3, 1.0),
        ({"choose": "menu", "temperature": 0.5}, True, "menu", 8, 0.5),
        ({"all_evidence": True, "choose": "menu"}, True, "all", 48, 0.0),
        ({"think": False}, False, "all", 0, 0.0),
        ({"free": True}, False, "all", 0, 0.0),
    ],
)
def test_what_settings_mean(settings, by_rule, rule, most_lines, temperature):
    config = JudgeConfig(**settings)
    settled = (config.by_rule, config.rule, config.most_lines, config.drawing_temperature)
    assert settled == (by_rule, rule, most_lines, temperature)


# Bradley-Terry


@pytest.mark.parametrize("n", [1, 2, 8, 9, 16, 26])
def test_schedule(n):
    """All pairs of few; of many a ring that reaches everyone in a few steps, all equally often."""
    pairs = schedule(n)
    assert all(0 <= i < j < n for i, j in pairs)
    if n <= ALL_PAIRS_UP_TO:
        assert pairs == list(combinations(range(n), 2))
    else:
        assert len(pairs) < n * (n - 1) / 2
    reached = {0}
    for _ in range(3):
        reached |= {b for p in pairs for a, b in (p, p[::-1]) if a in reached}
    assert len(reached) == n
    assert len({sum(i in pair for pair in pairs) for i in range(n)}) == 1


PREFERENCES = st.integers(2, 12).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(st.floats(0.05, 0.95), min_size=len(schedule(n)), max_size=len(schedule(n))),
    )
)


@settings(max_examples=30, deadline=None)
@given(PREFERENCES)
def test_strengths_explain_the_wins(case):
    """At the best strengths everyone's expected wins, prior included, are the wins they got; of two
    at 0.75 their ratio is 3 : 1, but for the prior, which draws them together."""
    a, b = bradley_terry(2, {(0, 1): 0.75})
    assert 1 < math.exp(a - b) < 3
    n, ps = case
    preferences = dict(zip(schedule(n), ps, strict=True))
    found = bradley_terry(n, preferences)
    assert all(map(math.isfinite, found))
    for i in range(n):
        got = sum(p if i == a else 1 - p for (a, b), p in preferences.items() if i in (a, b))
        expected = sum(
            strength_preference(found[i], found[b if i == a else a])
            for a, b in preferences
            if i in (a, b)
        )
        drawn = PRIOR * (strength_preference(found[i], 0) - 0.5)
        assert expected + drawn == pytest.approx(got, abs=1e-4)
