"""Which pairs are compared, and strengths that explain what was found."""

import math
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanopersrm.judge.ranking import ALL_PAIRS_UP_TO, PRIOR, bradley_terry, preference, schedule

from nanopersrm.judge import ranking


@pytest.mark.parametrize("n", range(1, 27))
def test_schedule(n):
    pairs = schedule(n)
    assert pairs == sorted(set(pairs))
    assert all(0 <= i < j < n for i, j in pairs)
    if n <= ALL_PAIRS_UP_TO:
        assert pairs == list(combinations(range(n), 2))
    else:
        assert len(pairs) <= n * math.ceil(math.log2(n))
        assert len(pairs) < n * (n - 1) / 2
    assert schedule(n) == pairs
    # from everyone to everyone in a few steps: a ring of chords of 1, 2, 4, 8, …
    for start in range(n):
        reached, steps = {start}, 0
        while len(reached) < n:
            new = {b for p in pairs for a, b in (p, p[::-1]) if a in reached} - reached
            assert new, f"{sorted(reached)} meet nobody else"
            reached |= new
            steps += 1
        assert steps <= 3
    met = [sum(i in pair for pair in pairs) for i in range(n)]
    assert n == 1 or min(met) >= min(n - 1, math.floor(math.log2(n)))
    assert max(met) == min(met)  # and nobody is compared more often than another


def test_schedule_by_hand():
    assert schedule(0) == schedule(1) == []
    assert schedule(3) == [(0, 1), (0, 2), (1, 2)]
    nine = schedule(9)
    assert len(nine) == 27  # 1, 2 and 4 around a circle of nine
    assert {pair for pair in nine if 0 in pair} == {(0, i) for i in (1, 2, 4, 5, 7, 8)}


def true_preferences(
    strengths: list[float], pairs: list[tuple[int, int]]
) -> dict[tuple[int, int], float]:
    return {(i, j): strengths[i] / (strengths[i] + strengths[j]) for i, j in pairs}


@pytest.mark.parametrize("n", [2, 5, 9, 26])
def test_known_strengths_are_recovered(n, monkeypatch):
    """Without the prior, exact preferences give the exact strengths, up to a common factor."""
    monkeypatch.setattr(ranking, "PRIOR", 1e-9)
    monkeypatch.setattr(ranking, "ROUNDS", 20_000)
    strengths = [1.3 ** ((7 * i) % n % 11) for i in range(n)]
    found = bradley_terry(n, true_preferences(strengths, schedule(n)))
    for i, j in combinations(range(n), 2):
        assert found[i] - found[j] == pytest.approx(math.log(strengths[i] / strengths[j]), abs=1e-5)


def test_worked_example(monkeypatch):
    """P = 0.75: strengths in the ratio 3 : 1, but for the prior, which draws them together."""
    a, b = bradley_terry(2, {(0, 1): 0.75})
    assert 1 < math.exp(a - b) < 3
    monkeypatch.setattr(ranking, "PRIOR", 1e-9)
    a, b = bradley_terry(2, {(0, 1): 0.75})
    assert math.exp(a - b) == pytest.approx(3, abs=1e-5)
    assert preference(a, b) == pytest.approx(0.75)


@pytest.mark.parametrize("n", [3, 9, 26])
def test_the_prior_shrinks_but_keeps_the_order(n):
    strengths = [1.2**i for i in range(n)]
    given_, found = true_preferences(strengths, schedule(n)), bradley_terry(n, {})
    assert found == [0.0] * n
    found = bradley_terry(n, given_)
    assert found == sorted(found)
    for i, j in given_:
        assert 0.5 > preference(found[i], found[j]) > given_[i, j] - 1e-9


PREFERENCES = st.integers(2, 12).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(st.floats(0.05, 0.95), min_size=len(schedule(n)), max_size=len(schedule(n))),
    )
)


@settings(max_examples=60, deadline=None)
@given(PREFERENCES)
def test_strengths_explain_the_wins(case):
    """At the best strengths everyone's expected wins, prior included, are the wins they got."""
    n, ps = case
    preferences = dict(zip(schedule(n), ps, strict=True))
    found = bradley_terry(n, preferences)
    assert all(map(math.isfinite, found))
    for i in range(n):
        got = sum(p if i == a else 1 - p for (a, b), p in preferences.items() if i in (a, b))
        expected = sum(
            preference(found[i], found[b if i == a else a]) for a, b in preferences if i in (a, b)
        )
        drawn = PRIOR * (preference(found[i], 0) - 0.5)
        assert expected + drawn == pytest.approx(got, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(PREFERENCES, st.randoms())
def test_names_do_not_matter(case, random):
    n, ps = case
    new = list(range(n))
    random.shuffle(new)
    preferences = dict(zip(schedule(n), ps, strict=True))
    renamed = {(new[i], new[j]): p for (i, j), p in preferences.items()}
    turned = {(j, i): 1 - p for (i, j), p in preferences.items()}
    found = bradley_terry(n, preferences)
    other = bradley_terry(n, renamed)
    assert [other[new[i]] for i in range(n)] == pytest.approx(found, abs=1e-6)
    assert bradley_terry(n, turned) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("n", [2, 3, 8, 26])
def test_certainty_stays_finite(n, p):
    found = bradley_terry(n, dict.fromkeys(schedule(n), p))
    assert all(map(math.isfinite, found))
    if n <= ALL_PAIRS_UP_TO:  # the first beats all, the second all but the first, …
        assert found == sorted(found, reverse=p == 1)
        assert len(set(found)) == n
    assert 0 < preference(found[0], found[-1]) < 1


def test_equals_are_exactly_equal():
    for n in (2, 5, 26):
        assert set(bradley_terry(n, dict.fromkeys(schedule(n), 0.5))) == {0.0}


def test_preference():
    assert preference(0.3, 0.3) == 0.5
    assert preference(math.log(3), 0) == pytest.approx(0.75)
    assert preference(-1, 2) + preference(2, -1) == pytest.approx(1)
