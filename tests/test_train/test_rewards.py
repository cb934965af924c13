"""Rewards: every part by hand, and what cannot be played."""

import math
import time
from collections.abc import Sequence
from dataclasses import fields, replace

import pytest

from nanopersrm import InputError
from nanopersrm.judge.faithful import LONGEST_QUOTE
from nanopersrm.judge.verdict import write
from nanopersrm.train.rewards import (
    FORMS,
    PARTS,
    Plan,
    RewardConfig,
    Role,
    Rollout,
    Shown,
    by_margin,
    calibration,
    faithful,
    length,
    rewards,
    table,
)

WRITER = "I came; I saw; I left. The road was long; the night was short; nobody asked why."
X = "It rained; we stayed. The lamp was lit; the dog slept; no one spoke of it."
Y = "Don't wait! We're going now! It's late, and I can't stay! You'd love it! Isn't it fun?"
OTHER_WRITER = "You won't believe it! I'm so glad you've come! Let's go! Isn't it great?"
CONFIG = RewardConfig()
MANNERS = RewardConfig(order=0, both_orders=0, twin=0, format=0)


def one(digit: int | str, tokens: int = 100, reasoning: str = "x", digits=None) -> Rollout:
    """A reply with one score; a text stands for itself."""
    reply = digit if isinstance(digit, str) else write(reasoning, {"A": digit})
    return Rollout(reply, tokens, digits)


def two(a: int, b: int, reasoning: str = "x") -> Rollout:
    return Rollout(write(reasoning, {"A": a, "B": b}), 100)


def plan(form: str, *groups: tuple[list[Rollout], list[Rollout]]) -> Plan:
    """(replies with chosen as A, with rejected as A) of the pair and of its twin."""
    texts = [((WRITER,), X, Y), ((OTHER_WRITER,), Y, X)]
    return Plan(
        form,
        tuple(
            Shown(*text, {"chosen": chosen, "rejected": rejected})
            for text, (chosen, rejected) in zip(texts, groups, strict=False)
        ),
    )


def column(found, name: str) -> list[list[float]]:
    """A part of all replies, group by group."""
    return [
        [reward.parts[name] for reward in own[role]]
        for own in found
        for role in ("chosen", "rejected")
    ]


def pointwise(*groups: Sequence[int | str]) -> Plan:
    """Scores about chosen, rejected, and the twin's."""
    drawn = [[one(digit) for digit in group] for group in groups]
    return plan("pointwise", *zip(drawn[::2], drawn[1::2], strict=True))


def test_the_worked_example():
    said = (
        'The writer has many semicolons: "I came; I saw". Candidate A has many semicolons: '
        '"It rained". A has no contractions. A has many exclamation marks.'
    )
    soft = (0.0, 0.0, 0.0, 0.0, 0.0, 0.4, 0.6, 0.0, 0.0)  # 6.6
    asked = plan(
        "pointwise",
        ([one(7, 180, said, (soft,)), one(4)], [one(4), one(2)]),
        ([one(6), one(5)], [one(5), one(3)]),
    )
    found = rewards(asked, CONFIG)
    best = found[0]["chosen"][0]
    assert best.parts == pytest.approx(
        {
            "format": 1.0,
            "order": 1.0,
            "twin": 0.75,
            "faithful": 5 / 6 * 5 / 8,
            "calibration": 0.91,
            "length": 0.5,
        }
    )
    assert best.total == pytest.approx(0.5 + 1 + 0.375 + 0.15625 + 0.273 + 0.05)
    assert best.problem is None
    assert column(found, "order") == [[1, 0.75], [0.75, 1], [1, 0.75], [0.75, 1]]
    assert column(found, "twin") == [[0.75, 0.375], [0.375, 0.75], [0.75, 0.375], [0.375, 0.75]]


@pytest.mark.parametrize(
    ("chosen", "rejected", "order"),
    [
        ([9, 1], [5, 5], [[1, 0], [0.5, 0.5]]),
        ([5], [5], [[0.5], [0.5]]),
        ([5, 5], [4, 5, 6, 7], [[0.375, 0.375], [1, 0.5, 0, 0]]),
        ([8], ["", "no"], [[0], [0, 0]]),  # nobody is right against what does not parse
        ([8, ""], [2, 3], [[1, 0], [0.5, 0.5]]),  # and it stays in the denominator
    ],
)
def test_order_of_one_candidate(chosen, rejected, order):
    assert column(rewards(pointwise(chosen, rejected), CONFIG), "order") == order


@pytest.mark.parametrize(
    ("margin", "order"),
    [(-8, 0), (-4, 0), (-2, 0.125), (-1, 0.1875), (0, 0.5), (1, 0.8125), (2, 0.875), (8, 1)],
)
def test_order_of_two_candidates_by_margin(margin, order):
    assert by_margin(margin, CONFIG) == order
    assert by_margin(margin, CONFIG) + by_margin(-margin, CONFIG) == 1
    first, second = (5 + margin // 2 + margin % 2, 5 - margin // 2)
    found = rewards(plan("pairwise", ([two(first, second)], [two(first, second)])), CONFIG)
    assert column(found, "order") == [[order], [1 - order]]


def test_what_does_not_parse_is_wrong_for_the_twin_too():
    found = rewards(pointwise([8], [2, "no"], [7], [3, 3, 3, "no"]), CONFIG)
    assert column(found, "twin") == [[0.5 * 0.75], [0.75, 0], [0.75 * 0.5], [0.5] * 3 + [0]]


def test_both_orders_pay_only_together():
    asked = plan("pairwise", ([two(7, 3), two(2, 6), two(5, 5)], [two(3, 7), two(1, 9), two(9, 1)]))
    assert column(rewards(asked, CONFIG), "both_orders") == [
        [pytest.approx(2 / 3), 0, 0],
        [pytest.approx(1 / 3), pytest.approx(1 / 3), 0],
    ]
    always_a = plan("pairwise", ([two(9, 1)] * 3, [two(9, 1)] * 3))
    assert column(rewards(always_a, CONFIG), "both_orders") == [[0] * 3, [0] * 3]


def test_the_twin_of_two_candidates_shows_them_in_the_same_places():
    asked = plan(
        "pairwise",
        ([two(9, 1)], [two(1, 9)]),  # X as A; Y as A: right
        ([two(9, 1)], [two(9, 1), two(1, 9)]),  # Y as A: right; X as A: one of two right
    )
    assert column(rewards(asked, CONFIG), "twin") == [[0.5], [1], [1], [0, 1]]
    always_a = plan("pairwise", *[([two(9, 1)], [two(9, 1)])] * 2)
    assert column(rewards(always_a, CONFIG), "twin") == [[0], [0], [0], [0]]


@pytest.mark.parametrize("scores", [(8, 2), (5, 5), (3, 4)])
def test_a_score_of_the_text_alone_earns_nothing_by_the_twin(scores):
    x, y = ([score] * 4 for score in scores)
    assert column(rewards(pointwise(x, y, y, x), CONFIG), "twin") == [[0] * 4] * 4
    a, b = scores
    first, second = [two(a, b)], [two(b, a)]  # X as A, Y as A
    found = rewards(plan("pairwise", (first, second), (second, first)), CONFIG)
    assert column(found, "twin") == [[0]] * 4


def test_reading_the_exemplars_pays_under_the_same_noise():
    high, low = [4, 5, 6, 7, 8, 9, 9], [1, 1, 2, 3, 4, 5, 6]  # of 49 couples 43 right, 3 wrong

    def mean(asked: Plan) -> float:
        return math.fsum(map(math.fsum, column(rewards(asked, MANNERS), "twin"))) / 28

    assert mean(pointwise(high, low, low, high)) == pytest.approx(43 * 3 / 49**2)  # the text alone
    assert mean(pointwise(high, low, high, low)) == pytest.approx((43 / 49) ** 2)  # its fit


GOOD = 'The writer has many semicolons: "I came; I saw". A has many semicolons. A has no digits.'


@pytest.mark.parametrize(
    ("reasoning", "true", "untrue"),
    [
        ("", 0, 0),
        ("A stately voice, rich and slow.", 0, 0),
        ("A has many semicolons.", 1, 0),
        ("A has many semicolons. A has many semicolons. A has some, many semicolons.", 1, 0),
        ("A has many semicolons. A has more semicolons than the writer.", 1, 1),
        ("A has many semicolons. A has fewer semicolons than the writer.", 1, 0),
        ('A has many semicolons and shows "never written".', 1, 1),
        ("A has many exclamation marks.", 0, 1),
        ("A has many exclamation marks. A has many exclamation marks.", 0, 2),
        ('The writer says "I came; I saw". The writer says "I came; I saw".', 1, 0),
        ('"The road was long", "nobody asked why" and "I left" are by the writer.', 2, 0),  # cap
        ('A shows "I came; I saw".', 0, 1),  # the writer does
        ('A shows "It rained', 0, 1),  # not closed
        (f'A shows "{X}".', 0, 1),  # copying
        ("A has no contractions, no emoji and smileys, no list lines, no brackets, no colons, "
         "no dashes, no question marks, no exclamation marks.", 6, 0),  # cap
    ],
)  # fmt: skip
def test_faithful_by_hand(reasoning, true, untrue):
    assert len(X.split()) > LONGEST_QUOTE
    wanted = true / (true + untrue) * true / 8 if true else 0.0
    got = faithful(write(reasoning, {"A": 5}), [WRITER], {"A": X}, CONFIG)
    assert got == pytest.approx(wanted)


def test_padding_does_not_outweigh_an_untruth():
    marks = ["contractions", "brackets", "colons", "dashes", "question marks", "list lines"]
    lie = "A has many exclamation marks."

    def worth(count: int) -> float:
        true = " ".join(f"A has no {mark}." for mark in marks[:count])
        return faithful(write(f"{true} {lie}", {"A": 5}), [WRITER], {"A": X}, few)

    few = RewardConfig(claims=3, quotes=1)
    assert worth(1) < worth(2) < worth(3) == worth(6) == 3 / 4 * 3 / 4


@pytest.mark.parametrize(
    ("soft", "chosen", "rejected"),
    [
        ((9.0,), 1.0, 0.0),
        ((1.0,), 0.0, 1.0),
        ((5.0,), 0.75, 0.75),
        ((6.6,), 0.91, 0.51),
        ((9.0, 1.0), 1.0, 0.0),
        ((5.0, 5.0), 0.75, 0.75),
        ((7.0, 3.0), 0.9375, 0.4375),
    ],
)
def test_calibration_by_hand(soft, chosen, rejected):
    assert calibration(soft, True) == pytest.approx(chosen)
    assert calibration(soft, False) == pytest.approx(rejected)


def test_digits_beat_the_drawn_digit_and_broken_ones_are_invalid():
    sure, flat = (0.0,) * 8 + (1.0,), (1 / 9,) * 9
    half = (0.25,) + (0.0,) * 7 + (0.25,)  # of a whole vocabulary: the nine are what counts
    nan, zero = (float("nan"),) * 9, (0.0,) * 9
    group = [one(9), *(one(9, digits=(row,)) for row in (sure, flat, half, nan, zero))]
    found = rewards(plan("pointwise", (group, [one(1)])), CONFIG)[0]["chosen"]
    assert [r.parts["calibration"] for r in found] == pytest.approx([1, 1, 0.75, 0.75, 0, 0])
    assert [r.total == 0 for r in found] == [False] * 4 + [True] * 2
    assert found[-1].problem == "the digits have no probabilities"
    with pytest.raises(AssertionError, match="nine digits a label"):
        rewards(plan("pointwise", ([one(9, digits=(sure, sure))], [one(1)])), CONFIG)


@pytest.mark.parametrize(
    ("tokens", "worth"),
    [(0, 0), (20, 0.5), (39, 0.975), (40, 1), (160, 1), (170, 0.75), (200, 0), (9999, 0)],
)
def test_length_by_hand(tokens, worth):
    assert length(tokens, CONFIG) == pytest.approx(worth)


def test_manners_do_not_outweigh_judgement():
    polite = one(1, 100, GOOD, ((0.0,) * 8 + (1.0,),))  # drawn 1 though it thinks 9
    rude = one(9, 0, "", ((1.0,) + (0.0,) * 8,))
    group = rewards(plan("pointwise", ([polite, rude], [one(5)])), CONFIG)[0]["chosen"]
    assert group[0].total < group[1].total


def test_the_table_has_a_column_for_every_part():
    found = rewards(pointwise([7, "rude"], [3, 4]), CONFIG)[0]["chosen"]
    rows = table(found)
    assert set(PARTS) - set(found[0].parts) == {"both_orders", "twin"}
    assert rows[0][2:4] == [0.0, 0.0]
    assert rows[1] == [0.0] * len(PARTS)
    for row, reward in zip(rows, found, strict=True):
        weighted = [w * part for w, part in zip(CONFIG.weights, row, strict=True)]
        assert reward.total == pytest.approx(sum(weighted))
    whole = plan("pairwise", *[([two(1, 2)], [two(1, 2)])] * 2)
    assert tuple(rewards(whole, CONFIG)[0]["chosen"][0].parts) == PARTS


def test_nothing_but_texts_and_label_can_be_seen():
    assert {f.name for f in fields(Shown)} == {"exemplars", "chosen", "rejected", "groups"}
    assert {f.name for f in fields(Rollout)} == {"reply", "tokens", "digits", "chances"}
    assert {f.name for f in fields(Plan)} == {"form", "shown", "at_once"}


@pytest.mark.parametrize("form", FORMS)
def test_at_once_there_are_no_reasons_to_reward(form):
    scores = one if form == "pointwise" else lambda score: two(score, 10 - score)
    groups = [([scores(7)], [scores(3)])] * 2
    thinking, at_once = plan(form, *groups), replace(plan(form, *groups), at_once=True)
    assert set(thinking.parts) - set(at_once.parts) == {"faithful", "length"}
    for reasoned, bare in zip(rewards(thinking, CONFIG), rewards(at_once, CONFIG), strict=True):
        for role in ("chosen", "rejected"):
            whole, part = reasoned[role][0].parts, bare[role][0].parts
            assert part == {name: whole[name] for name in at_once.parts}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"twin": -0.1}, "twin: expected a weight from 0 to 1000, got -0.1"),
        ({"order": float("nan")}, "order: expected a weight from 0 to 1000, got nan"),
        ({"fall": 0}, "fall: expected at least 1, got 0"),
        ({"margin": 9}, "margin: expected at most 8, got 9"),
        ({"longest": 39}, r"longest: expected at least shortest \(40\), got 39"),
    ],
)
def test_a_wrong_config_is_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        RewardConfig(**wrong)


def test_a_wrong_plan_is_refused():
    group: dict[Role, list[Rollout]] = {"chosen": [one(5)], "rejected": [one(5)]}
    pair = Shown((WRITER,), X, Y, group)
    for form, shown in [
        ("listwise", (pair,)),
        ("pointwise", ()),
        ("pointwise", (pair, pair)),  # not mirrored
        ("pointwise", (Shown((WRITER,), X, Y, {"chosen": [one(5)]}),)),
        ("pointwise", (Shown((WRITER,), X, Y, {**group, "rejected": []}),)),
    ]:
        with pytest.raises(AssertionError):
            Plan(form, shown)


def test_a_group_takes_milliseconds():
    def asked() -> Plan:
        return plan("pointwise", *[([one(7, 100, GOOD)] * 8, [one(3, 100, GOOD)] * 8)] * 2)

    rewards(asked(), CONFIG)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        rewards(asked(), CONFIG)
        took.append(time.perf_counter() - start)
    assert min(took) < 4 * 0.05  # four groups of 8; some 2 ms each
