"""Metrics against numbers worked out by hand, and against judges whose worth is known."""

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm.evaluate.metrics import GROUPS, KEYS, MORE, Record, Said, measure, record, said_of
from nanopersrm.evaluate.predictions import Opinion, from_scores
from nanopersrm.pairs import Pair

OTHER: dict[Said, Said] = {"right": "wrong", "wrong": "right", "tie": "tie", "invalid": "invalid"}


def row(name: str, said: Said, twin: str = "", author: str = "x", **more) -> Record:
    return Record(name, twin, author, "d", "cross_author", 1, said, 0.0, **more)


def couples(said: list[tuple[Said, Said]]) -> list[Record]:
    """Pairs with twins by two authors each."""
    rows = []
    for i, (one, two) in enumerate(said):
        rows.append(row(f"{i}a", one, f"{i}b", f"author {i % 5}"))
        rows.append(row(f"{i}b", two, f"{i}a", f"author {i % 5 + 5}"))
    return rows


def value(found: dict, key: str) -> float | None:
    return found[key]["value"]


def test_hand_worked():
    """Couples: both right, one right, both wrong, tie and right, invalid and wrong."""
    rows = couples(
        [
            ("right", "right"),
            ("right", "wrong"),
            ("wrong", "wrong"),
            ("tie", "right"),
            ("invalid", "wrong"),
        ]
    )
    found = measure(rows)
    assert value(found, "pair_accuracy") == pytest.approx(4 / 10)
    assert value(found, "twin_accuracy") == pytest.approx(2 / 10)
    # right on the pair: 4 of 10; twin wrong: 1 + 2 + 1 = 4 of 10
    assert value(found, "swap_gap") == pytest.approx(0)
    assert value(found, "invalid_rate") == pytest.approx(1 / 10)
    assert value(found, "tie_rate") == pytest.approx(1 / 10)
    assert value(found, "lenient_accuracy") == pytest.approx(4.5 / 9)
    assert found["n"] == 10
    for key in ("no_exemplar_accuracy", "order_consistency", "ece", "brier"):
        assert found[key] == {"value": None, "low": None, "high": None}


def test_a_couple_of_two_authors_is_drawn_once():
    """Four couples, each between an author and a fifth: the interval is of four single records."""
    said: list[Said] = ["right", "wrong", "right", "wrong"]
    apart = []
    for i, own in enumerate(said):
        apart.append(row(f"{i}a", own, f"{i}b", f"author {i}"))
        apart.append(row(f"{i}b", "right", f"{i}a", "all second ones"))
    found = measure(apart, seed=3)["twin_accuracy"]
    # the second author has none of the couples, so draws of five authors are means of the others
    alone = [row(f"{i}", own, author=f"author {i}") for i, own in enumerate(said)]
    alone.append(row("nobody's", "invalid", author="all second ones"))
    assert found == measure(alone, seed=3)["lenient_accuracy"]


def test_domains_have_authors_of_their_own():
    """Two of the same name in two domains are two clusters; one cluster has no interval."""
    same = [row("a", "right"), row("b", "wrong")]
    assert measure(same)["pair_accuracy"]["low"] is None
    apart = [same[0], replace(same[1], domain="another")]
    assert measure(apart)["pair_accuracy"]["low"] == 0


def test_probabilities_by_hand():
    """Confidences 0.8 (right), 0.8 (wrong), 0.6 (right), and a coin."""
    rows = [
        row("a", "right", preference=0.8),
        row("b", "wrong", preference=0.2),
        row("c", "right", preference=0.62),
        row("d", "tie", preference=0.5),
        row("e", "invalid"),
    ]
    found = measure(rows)
    # bins: {0.8, 0.8}: |1.6 - 1|, {0.62}: |0.62 - 1|, {0.5}: |0.5 - 0.5|
    assert value(found, "ece") == pytest.approx((0.6 + 0.38 + 0) / 4)
    assert value(found, "brier") == pytest.approx((0.04 + 0.64 + 0.1444 + 0.25) / 4)


def test_certain_and_right_falls_in_the_last_bin():
    found = measure([row("a", "right", preference=1.0), row("b", "wrong", preference=0.0)])
    assert value(found, "ece") == pytest.approx(0.5)


def test_length_correlation():
    gaps = [(1.0, 10.0), (-2.0, -20.0), (0.5, 5.0)]
    rows = [
        replace(row(str(i), "right"), score_gap=g, length_gap=n) for i, (g, n) in enumerate(gaps)
    ]
    assert value(measure(rows), "length_correlation") == pytest.approx(1)
    turned = [replace(rows[0], score_gap=-1.0, length_gap=-10.0), *rows[1:]]  # the other way round
    assert value(measure(turned), "length_correlation") == pytest.approx(1)
    mixed = [replace(rows[0], score_gap=3.0, length_gap=4.0), replace(rows[1], score_gap=4.0)]
    mixed[1] = replace(mixed[1], length_gap=-3.0)
    assert value(measure(mixed), "length_correlation") == pytest.approx(0)


def test_an_oracle_and_its_opposite():
    oracle = measure(couples([("right", "right")] * 6))
    swapped = measure(couples([("wrong", "wrong")] * 6))
    for key, good, bad in (("pair_accuracy", 1, 0), ("twin_accuracy", 1, 0), ("swap_gap", 1, -1)):
        assert oracle[key] == {"value": good, "low": good, "high": good}
        assert swapped[key] == {"value": bad, "low": bad, "high": bad}


@given(st.lists(st.sampled_from(["right", "wrong"]), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_who_does_not_read_the_exemplars_is_at_chance(said):
    """Whatever it prefers, it is right on exactly one of a pair and its twin."""
    found = measure(couples([(one, OTHER[one]) for one in said]), resamples=50)
    assert value(found, "pair_accuracy") == 0.5
    assert value(found, "twin_accuracy") == 0
    assert found["swap_gap"] == {"value": 0, "low": 0, "high": 0}


def test_a_coin():
    rng = random.Random(3)
    flips: list[Said] = [rng.choice(["right", "wrong"]) for _ in range(4000)]
    found = measure(couples(list(zip(flips[::2], flips[1::2], strict=True))))
    assert value(found, "pair_accuracy") == pytest.approx(0.5, abs=0.03)
    assert value(found, "twin_accuracy") == pytest.approx(0.25, abs=0.03)
    assert value(found, "swap_gap") == pytest.approx(0, abs=0.05)


@given(
    st.lists(
        st.tuples(*[st.sampled_from(["right", "wrong", "tie", "invalid"])] * 2),
        min_size=1,
        max_size=30,
    )
)
@settings(max_examples=30, deadline=None)
def test_an_invalid_never_helps(said):
    """Turned from invalid to wrong, nothing that is strict moves, and lenient does not rise."""
    rows = couples(said)
    plain = [replace(r, said="wrong") if r.said == "invalid" else r for r in rows]
    one, two = measure(rows, resamples=20), measure(plain, resamples=20)
    for key in ("pair_accuracy", "twin_accuracy"):
        assert value(one, key) == value(two, key)
    lenient = value(one, "lenient_accuracy")
    assert lenient is None or lenient >= (value(two, "lenient_accuracy") or 0)


def test_missing_twins_are_left_out_of_what_needs_them():
    rows = [
        row("a", "right", "b"),
        row("b", "right", "a"),
        row("c", "wrong"),
        row("d", "wrong", "e"),
    ]
    found = measure(rows)
    assert value(found, "twin_accuracy") == 1
    assert value(found, "swap_gap") == 1
    assert value(found, "pair_accuracy") == 0.5


def test_intervals_draw_whole_authors():
    """Ten authors of one habit each: as wide as ten observations, however many pairs they have."""

    def rows(each: int) -> list[Record]:
        return [
            row(f"{a}.{i}", "right" if a < 5 else "wrong", author=str(a))
            for a in range(10)
            for i in range(each)
        ]

    few, many = measure(rows(1))["pair_accuracy"], measure(rows(40))["pair_accuracy"]
    assert few == many
    assert few["low"] == pytest.approx(0.2, abs=0.1)
    assert few["high"] == pytest.approx(0.8, abs=0.1)


def test_intervals_cover():
    """Of 100 samples of 40 authors with accuracies around 0.6, about 95 intervals hold 0.6."""
    held = 0
    for trial in range(100):
        rng = random.Random(f"cover/{trial}")
        rows = []
        for author in range(40):
            p = rng.choice([0.4, 0.8])
            rows += [
                row(f"{author}.{i}", "right" if rng.random() < p else "wrong", author=str(author))
                for i in range(8)
            ]
        found = measure(rows, seed=trial, resamples=300)["pair_accuracy"]
        held += found["low"] <= 0.6 <= found["high"]
    assert 87 <= held <= 99


def test_one_author_has_no_interval():
    assert measure([row("a", "right")])["pair_accuracy"] == {"value": 1, "low": None, "high": None}


def test_the_same_seed_gives_the_same_interval():
    rng = random.Random(1)
    rows = [row(str(i), "right", author=str(i % 17), preference=rng.random()) for i in range(50)]
    assert measure(rows, seed=1) == measure(rows, seed=1)
    assert measure(rows, seed=1) != measure(rows, seed=2)


def test_groups_and_keys():
    rows = [*couples([("right", "right")] * 2), row("z", "wrong", author="other")]
    rows[-1] = replace(rows[-1], kind="restyle", domain="e", exemplars=3)
    found = measure(rows)
    assert list(found) == [*KEYS, *MORE, *(f"by_{group}" for group in GROUPS)]
    assert set(found["by_kind"]) == {"cross_author", "restyle"}
    assert set(found["by_exemplars"]) == {"1", "3"}
    assert value(found["by_domain"]["d"], "pair_accuracy") == 1
    assert value(found["by_domain"]["d"], "twin_accuracy") == 1
    assert value(found["by_domain"]["e"], "pair_accuracy") == 0
    json.dumps(found, allow_nan=False)


def test_nothing_judged():
    found = measure([])
    assert found["n"] == 0
    assert value(found, "pair_accuracy") is None


def test_records_turn_to_the_chosen():
    pair = Pair("p", "t", "x", "d", "test", "restyle", ("e",), "", "b b b", "a", "x/1", "y/1")
    opinion = Opinion(1, (2.0, 5.0), 0.1, True)
    made = record(pair, 1, 2, opinion, Opinion("tie", (1.0, 1.0), 0.5))
    assert made.said == "right"
    assert (made.score_gap, made.length_gap, made.exemplars) == (3.0, 2, 2)
    assert made.preference == pytest.approx(0.9)
    assert made.neutral == "tie"
    assert said_of(opinion, 0) == "wrong"
    assert record(pair, 0, 2, from_scores(None)).said == "invalid"
