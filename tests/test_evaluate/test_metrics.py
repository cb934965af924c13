"""Metrics against numbers worked out by hand, and against judges whose worth is known."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm.evaluate.judges import Prediction, from_scores
from nanopersrm.evaluate.metrics import GROUPS, Outcome, Record, compare, measure, record, sign_test
from nanopersrm.pairs import Pair

OTHER: dict[Outcome, Outcome] = {"right": "wrong", "wrong": "right"}
NOTHING = {"value": None, "low": None, "high": None}


def row(
    name: str, outcome: Outcome, twin="", author="x", preference=None, domain="d", kind="one", n=1
) -> Record:
    texts = (("e",) * n, "", "b b b", "a", "x/1", "y/1")
    return Record(Pair(name, twin, author, domain, "test", kind, *texts), outcome, preference)


def twins(outcomes: list[tuple[Outcome, Outcome]]) -> list[Record]:
    """Pairs with twins by two authors each."""
    rows = []
    for i, (pair, twin) in enumerate(outcomes):
        rows.append(row(f"{i}a", pair, f"{i}b", f"author {i % 5}"))
        rows.append(row(f"{i}b", twin, f"{i}a", f"author {i % 5 + 5}"))
    return rows


def value(result: dict, metric: str) -> float | None:
    return result[metric]["value"]


def test_hand_worked():
    """Both right, one right, both wrong, tie and right, invalid and wrong."""
    rows = [("right", "right"), ("right", "wrong"), ("wrong", "wrong"), ("tie", "right")]
    result = measure(twins([*rows, ("invalid", "wrong")]))  # type: ignore[list-item]
    assert value(result, "pair_accuracy") == pytest.approx(4 / 10)
    assert value(result, "twin_accuracy") == pytest.approx(1 / 5)
    # right on the pair: 4 of 10; the twin wrong: 1 + 2 + 1 of 10
    assert value(result, "swap_gap") == pytest.approx(0)
    assert value(result, "invalid_rate") == pytest.approx(1 / 10)
    assert result["n"] == 10
    assert result["ece"] == result["brier"] == NOTHING


def test_twins_of_two_authors_are_drawn_once():
    """Four twin pairs, each of one author and a fifth: the interval is of four single records."""
    outcomes: list[Outcome] = ["right", "wrong", "right", "wrong"]
    apart, single = [], [row("nobody's", "tie", "none", "second")]  # who has no twins of his own
    for i, outcome in enumerate(outcomes):
        apart.append(row(f"{i}a", outcome, f"{i}b", f"author {i}"))
        apart.append(row(f"{i}b", "right", f"{i}a", "second"))
        single.append(row(f"{i}", outcome, "", f"author {i}", float(outcome == "wrong")))
    brier = measure(single, seed=3)["brier"]  # (1 - p)² is 1 where right, 0 where wrong
    assert measure(apart, seed=3)["twin_accuracy"] == brier


def test_probabilities_by_hand():
    """Confidences 0.8 (right), 0.8 (wrong), 0.62 (right), a coin, and none."""
    rows = [
        row("a", "right", preference=0.8),
        row("b", "wrong", preference=0.2),
        row("c", "right", preference=0.62),
        row("d", "tie", preference=0.5),
        row("e", "invalid"),
    ]
    result = measure(rows)
    # bins: {0.8, 0.8}: |1.6 - 1|, {0.62}: |0.62 - 1|, {0.5}: |0.5 - 0.5|
    assert value(result, "ece") == pytest.approx((0.6 + 0.38 + 0) / 4)
    assert value(result, "brier") == pytest.approx((0.04 + 0.64 + 0.1444 + 0.25) / 4)
    certain = measure([row("a", "right", preference=1.0), row("b", "wrong", preference=0.0)])
    assert value(certain, "ece") == pytest.approx(0.5)


@given(st.lists(st.sampled_from(["right", "wrong"]), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_who_does_not_read_the_exemplars_is_at_chance(outcomes):
    """Whatever it prefers, it is right on exactly one of a pair and its twin."""
    result = measure(twins([(outcome, OTHER[outcome]) for outcome in outcomes]), resamples=50)
    assert value(result, "pair_accuracy") == 0.5
    assert value(result, "twin_accuracy") == value(result, "swap_gap") == 0


def test_intervals_cover():
    """Of 60 samples of 40 authors with accuracies around 0.6, about 57 intervals hold 0.6."""
    held = 0
    for sample in range(60):
        rng = random.Random(f"cover/{sample}")
        rows = []
        for author in range(40):
            p = rng.choice([0.4, 0.8])
            rows += [
                row(f"{author}.{i}", "right" if rng.random() < p else "wrong", author=str(author))
                for i in range(8)
            ]
        interval = measure(rows, seed=sample, resamples=200)["pair_accuracy"]
        held += interval["low"] <= 0.6 <= interval["high"]
    assert 51 <= held <= 60


def test_groups():
    rows = [*twins([("right", "right")] * 2), row("z", "wrong", kind="restyle", domain="e", n=3)]
    result = measure(rows)
    assert {f"by_{group}" for group in GROUPS} < set(result)
    assert set(result["by_kind"]) == {"one", "restyle"}
    assert set(result["by_exemplars"]) == {"1", "3"}
    assert value(result["by_domain"]["d"], "twin_accuracy") == 1
    assert result["by_domain"]["e"]["pair_accuracy"] == {"value": 0, "low": None, "high": None}
    assert result["by_domain"]["d"]["n"] == 4
    json.dumps(result, allow_nan=False)
    assert value(measure([]), "pair_accuracy") is None


def test_records_turn_to_the_chosen():
    pair, prediction = row("p", "tie").pair, Prediction(1, (2.0, 5.0), 0.1)
    right, wrong = record(pair, 1, prediction), record(pair, 0, prediction)
    assert (right.outcome, right.preference) == ("right", pytest.approx(0.9))
    assert (wrong.outcome, wrong.preference) == ("wrong", 0.1)
    assert record(pair, 0, from_scores(None)).outcome == "invalid"


# Two judges, pair by pair


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [
        (0, 0, 1),
        (1, 0, 1),
        (4, 1, 12 / 32),
        (8, 2, 0.109375),
        (16, 4, 0.01181793212890625),
        (520, 480, pytest.approx(0.218, rel=0.01)),  # z = 1.23, with half a pair for the steps
    ],
)
def test_the_sign_test_by_hand(won, lost, p):
    assert sign_test(won, lost) == sign_test(lost, won) == p


def test_comparison_by_hand():
    """Four twin pairs: won both, won one of them, lost a twin pair by one pair, and both alike."""
    first = twins([("right", "right"), ("right", "right"), ("right", "tie"), ("wrong", "right")])
    second = twins(
        [("wrong", "invalid"), ("wrong", "right"), ("right", "right"), ("wrong", "right")]
    )
    parts = compare(first, second)
    numbers = {k: (part["won"], part["lost"]) for k, part in parts.items()}
    assert numbers == {"pairs": (3, 1), "twins": (2, 1)}
    assert value(parts["pairs"], "difference") == 2 / 8
    assert value(parts["twins"], "difference") == 1 / 4
    assert parts["twins"]["p"] == sign_test(2, 1)


def test_nothing_to_compare():
    rows = twins([("right", "wrong"), ("tie", "right")])
    for part in compare(rows, rows).values():
        assert (part["won"], part["lost"], part["p"]) == (0, 0, 1)
    away = [row("a", "right", twin="z"), row("b", "wrong", twin="a")]  # twins not judged
    none = {"won": 0, "lost": 0, "p": None, "difference": NOTHING}
    assert compare(away, away)["twins"] == none
    with pytest.raises(ValueError, match="same pairs"):
        compare(rows, rows[::-1])
