"""Rewards: every part by hand, and what cannot be played."""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm import InputError
from nanopersrm.judge.claims import LONGEST_QUOTE
from nanopersrm.judge.verdict import write
from nanopersrm.pairs import Pair
from nanopersrm.train import rewards
from nanopersrm.train.rewards import PARTS, RewardConfig, calibration, faithful, length, reward
from nanopersrm.train.rollout import ROLES, Rollout, RolloutGroup

WRITER = "I came; I saw; I left. The road was long; the night was short; nobody asked why."
X = "It rained; we stayed. The lamp was lit; the dog slept; no one spoke of it."
Y = "Don't wait! We're going now! It's late, and I can't stay! You'd love it! Isn't it fun?"
OTHER_WRITER = "You won't believe it! I'm so glad you've come! Let's go! Isn't it great?"
CONFIG = RewardConfig()
MANNERS = RewardConfig(order=0, twin=0, format=0)
THINKING, AT_ONCE = "<think>\n", "<think>\n</think>\n<scores>A="
PAIR = Pair(
    *("a", "b", "writer", "essays", "train", "cross_author", (WRITER,), "", X, Y),
    *("writer/book", "other/book"),
)
TWIN = replace(PAIR, id="b", twin="a", exemplars=(OTHER_WRITER,), chosen=Y, rejected=X)


def reply_of(digit: int | str, tokens: int = 100, reasoning: str = "x", digits=None) -> Rollout:
    """A reply with one score; a text stands for itself."""
    text = digit if isinstance(digit, str) else write(reasoning, {"A": digit})
    return Rollout((7,) * tokens, (-1.0,) * tokens, text, digit_probs=digits, drawn_probs=digits)


def groups_of(*drawn: list[Rollout], opening: str = THINKING) -> list[RolloutGroup]:
    """Replies about chosen, rejected, and the twin's."""
    places = [(pair, role) for pair in (PAIR, TWIN) for role in ROLES]
    return [
        RolloutGroup(pair, role, [], opening, replies)
        for (pair, role), replies in zip(places, drawn, strict=False)
    ]


def rewarded(*drawn: list[Rollout], config: RewardConfig = CONFIG) -> list[RolloutGroup]:
    groups = groups_of(*drawn)
    reward(groups, config)
    return groups


def column(groups: list[RolloutGroup], name: str) -> list[list[float]]:
    """A part of all replies, group by group."""
    return [[rollout.parts[name] for rollout in group.rollouts] for group in groups]


def scored(*digits: Sequence[int | str], config: RewardConfig = CONFIG) -> list[RolloutGroup]:
    """Scores about chosen, rejected, and the twin's."""
    return rewarded(*[[reply_of(digit) for digit in group] for group in digits], config=config)


def test_the_worked_example():
    reasoning = (
        'The writer has many semicolons: "I came; I saw". Candidate A has many semicolons: '
        '"It rained". A has no contractions. A has many exclamation marks.'
    )
    soft = (0.0, 0.0, 0.0, 0.0, 0.0, 0.4, 0.6, 0.0, 0.0)  # 6.6
    groups = rewarded(
        [reply_of(7, 180, reasoning, soft), reply_of(4)],
        [reply_of(4), reply_of(2)],
        [reply_of(6), reply_of(5)],
        [reply_of(5), reply_of(3)],
    )
    best = groups[0].rollouts[0]
    by_hand = dict(zip(PARTS, (1.0, 0.5, 1.0, 0.75, 5 / 6 * 5 / 8, 0.91), strict=True))
    assert best.parts == pytest.approx(by_hand)
    assert best.reward == pytest.approx(0.5 + 1 + 0.375 + 0.15625 + 0.273 + 0.05)
    assert best.problem is None
    assert column(groups, "order") == [[1, 0.75], [0.75, 1], [1, 0.75], [0.75, 1]]
    assert column(groups, "twin") == [[0.75, 0.375], [0.375, 0.75], [0.75, 0.375], [0.375, 0.75]]


@pytest.mark.parametrize(
    ("chosen", "rejected", "order"),
    [
        ([9, 1], [5, 5], [[1, 0], [0.5, 0.5]]),
        ([5, 5], [4, 5, 6, 7], [[0.375, 0.375], [1, 0.5, 0, 0]]),
        ([8], ["", "no"], [[0], [0, 0]]),  # nobody is right against what does not parse
        ([8, ""], [2, 3], [[1, 0], [0.5, 0.5]]),  # and it stays in the denominator
    ],
)
def test_order_of_one_candidate(chosen, rejected, order):
    assert column(scored(chosen, rejected), "order") == order


@pytest.mark.parametrize("scores", [(8, 2), (5, 5), (3, 4)])
def test_a_score_of_the_text_alone_earns_nothing_by_the_twin(scores):
    x, y = ([score] * 4 for score in scores)
    assert column(scored(x, y, y, x), "twin") == [[0] * 4] * 4


def test_reading_the_exemplars_pays_under_the_same_noise():
    high, low = [4, 5, 6, 7, 8, 9, 9], [1, 1, 2, 3, 4, 5, 6]  # of 49 couples 43 right, 3 wrong

    def mean(*digits: list[int]) -> float:
        groups = scored(*digits, config=MANNERS)
        return math.fsum(map(math.fsum, column(groups, "twin"))) / 28

    assert mean(high, low, low, high) == pytest.approx(43 * 3 / 49**2)  # the text alone
    assert mean(high, low, high, low) == pytest.approx((43 / 49) ** 2)  # its fit


GOOD = 'The writer has many semicolons: "I came; I saw". A has many semicolons. A has no digits.'


@pytest.mark.parametrize(
    ("reasoning", "true", "untrue"),
    [
        ("", 0, 0),
        ("A stately voice, rich and slow.", 0, 0),
        ("A has many semicolons.", 1, 0),
        ("A has many semicolons. A has many semicolons.", 1, 0),
        ("A has many semicolons. A has more semicolons than the writer.", 1, 1),
        ("A has many semicolons. A has fewer semicolons than the writer.", 1, 0),
        ('A has many semicolons and shows "never written".', 1, 1),
        ("A has many exclamation marks.", 0, 1),
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
    worth = faithful(write(reasoning, {"A": 5}), [WRITER], {"A": X})
    assert worth == pytest.approx(wanted)


def test_padding_does_not_outweigh_an_untruth(monkeypatch):
    marks = ["contractions", "brackets", "colons", "dashes", "question marks", "list lines"]
    lie = "A has many exclamation marks."

    def worth(count: int) -> float:
        true = " ".join(f"A has no {mark}." for mark in marks[:count])
        return faithful(write(f"{true} {lie}", {"A": 5}), [WRITER], {"A": X})

    monkeypatch.setattr(rewards, "CLAIMS", 3)
    monkeypatch.setattr(rewards, "QUOTES", 1)
    assert worth(1) < worth(2) < worth(3) == worth(6) == 3 / 4 * 3 / 4


def test_digits_beat_the_drawn_digit_and_broken_ones_are_invalid():
    sure, flat = (0.0,) * 8 + (1.0,), (1 / 9,) * 9
    half = (0.25,) + (0.0,) * 7 + (0.25,)  # of a whole vocabulary: the nine are what counts
    nan, zero = (float("nan"),) * 9, (0.0,) * 9
    drawn = [reply_of(9), *(reply_of(9, digits=row) for row in (sure, flat, half, nan, zero))]
    group = rewarded(drawn, [reply_of(1)])[0].rollouts
    assert [r.parts["calibration"] for r in group] == pytest.approx([1, 1, 0.75, 0.75, 0, 0])
    assert [r.reward == 0 for r in group] == [False] * 4 + [True] * 2


def test_calibration_and_length_by_hand():
    for soft, chosen, rejected in ((9, 1, 0), (1, 0, 1), (5, 0.75, 0.75), (6.6, 0.91, 0.51)):
        assert calibration(soft, True) == pytest.approx(chosen)
        assert calibration(soft, False) == pytest.approx(rejected)
    worth = {0: 0, 20: 0.5, 39: 0.975, 40: 1, 160: 1, 170: 0.75, 200: 0, 9999: 0}
    assert {tokens: length(tokens) for tokens in worth} == pytest.approx(worth)


def test_manners_do_not_outweigh_judgement():
    polite = reply_of(1, 100, GOOD, (0.0,) * 8 + (1.0,))  # drawn 1 though it thinks 9
    rude = reply_of(9, 0, "", (1.0,) + (0.0,) * 8)
    best, worst = rewarded([rude, polite], [reply_of(5)])[0].rollouts
    assert worst.reward < best.reward


def test_parts_are_those_that_can_be_earned():
    alone, both = scored([7, "rude"], [3, 4]), scored([7], [3], [6], [4])
    assert list(alone[0].rollouts[0].parts) == [name for name in PARTS if name != "twin"]
    assert list(both[0].rollouts[0].parts) == list(PARTS)
    assert set(alone[0].rollouts[1].parts.values()) == {0.0}
    at_once = groups_of([reply_of(7)], [reply_of(3)], [reply_of(6)], [reply_of(4)], opening=AT_ONCE)
    reward(at_once, CONFIG)
    for reasoned, bare in zip(both, at_once, strict=True):
        whole, parts = reasoned.rollouts[0].parts, bare.rollouts[0].parts
        assert set(whole) - set(parts) == {"faithful", "length"}
        assert parts == {name: whole[name] for name in parts}


def test_nothing_but_texts_and_role_can_be_seen():
    """Kind, authors, sources and weight of a pair may be anything."""
    drawn = [[reply_of(7, reasoning=GOOD)], [reply_of(3)], [reply_of(6)], [reply_of(4)]]
    groups, others = groups_of(*drawn), groups_of(*deepcopy(drawn))
    names = ("id", "author", "domain", "split", "kind", "question", "chosen_from", "rejected_from")
    for group in others:
        hidden: dict[str, Any] = dict.fromkeys(names, "anything")
        hidden |= {"weight": 0.0, "meta": {"x": 1}}
        group.pair = replace(group.pair, **hidden)
    for some in (groups, others):
        reward(some, CONFIG)
    assert [group.rollouts for group in groups] == [group.rollouts for group in others]


def test_a_wrong_weight_is_refused():
    with pytest.raises(InputError, match="twin"):
        RewardConfig(twin=-0.1)


# Any replies

INVALID = ["", "A", "<think>", "<think>x</think><scores>A=0</scores>", write("x", {"B": 5})]
DIGIT = st.integers(1, 9)
RUDE = st.sampled_from(INVALID) | st.text(max_size=30)
ONES = st.builds(
    reply_of,
    DIGIT | RUDE,
    st.integers(0, 400),
    st.sampled_from(["", GOOD, 'B has no dashes, "x".', "Both candidates: many commas."]),
    st.none() | st.tuples(*[st.floats(0, 1)] * 9),
)
DRAWN = st.lists(st.lists(ONES, min_size=1, max_size=3), min_size=4, max_size=4)
CONFIGS = st.builds(RewardConfig, **dict.fromkeys(PARTS, st.floats(0, 5)), expected=st.booleans())


@given(DRAWN, CONFIGS)
@settings(max_examples=25, deadline=None)
def test_bounded_and_invalid_is_the_lowest(drawn, config):
    every = [r for group in rewarded(*drawn, config=config) for r in group.rollouts]
    for rollout in every:
        assert all(0 <= part <= 1 + 1e-9 for part in rollout.parts.values())
        assert 0 <= rollout.reward <= sum(config.weights) + 1e-9
        if rollout.problem is not None:
            assert rollout.reward == 0 == max(rollout.parts.values())
        else:
            assert rollout.reward >= config.format


@given(*[st.lists(DIGIT, min_size=1, max_size=6)] * 2)
@settings(max_examples=30, deadline=None)
def test_with_noise_a_judge_of_the_text_alone_is_at_chance(x, y):
    means = [math.fsum(group) / len(group) for group in column(scored(x, y, y, x), "twin")]
    assert all(mean <= 0.25 + 1e-12 for mean in means)
    assert means == pytest.approx([means[0]] * 4)
