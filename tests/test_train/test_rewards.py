"""Rewards: every part by hand, and what cannot be played."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm import InputError
from nanopersrm.judge.reply import Prompt, Reply
from nanopersrm.judge.verdict import DIGITS
from nanopersrm.pairs import Pair
from nanopersrm.train.grpo import GrpoConfig
from nanopersrm.train.rewards import PARTS, RewardConfig, calibration, check_expected, reward
from nanopersrm.train.rollout import ROLES, Rollout, RolloutGroup

CONFIG = RewardConfig(expected=False)  # by the drawn digit
LINES = 8  # that a reply may have
PAIR = Pair(
    *("a", "b", "writer", "essays", "train", "cross_author", ("So it is.",), "", "X", "Y"),
    *("writer/book", "other/book"),
)
TWIN = replace(PAIR, id="b", twin="a", author="other", chosen="Y", rejected="X")
PROMPT = Prompt([], {}, (), ())


def reply_of(digit: int, lines: int = LINES, digits: Sequence[float] | None = None) -> Rollout:
    """A reply with this digit, by default the only one that it could get."""
    chances = [*digits] if digits else [float(digit == one) for one in DIGITS]
    features = [f"feature {n}" for n in range(lines)]
    return Rollout(Reply(features=features, digits=chances, drawn_digits=chances, digit=digit))


def rewarded(*drawn: list[Rollout], config: RewardConfig = CONFIG) -> list[RolloutGroup]:
    """Replies about chosen, rejected, and the twin's."""
    places = [(pair, role) for pair in (PAIR, TWIN) for role in ROLES]
    groups = [
        RolloutGroup(pair, role, PROMPT, replies)
        for (pair, role), replies in zip(places, drawn, strict=False)
    ]
    reward(groups, config, LINES)
    return groups


def column(groups: list[RolloutGroup], name: str) -> list[list[float]]:
    """A part of all replies, group by group."""
    return [[rollout.parts[name] for rollout in group.rollouts] for group in groups]


def scored(*digits: Sequence[int], config: RewardConfig = CONFIG) -> list[RolloutGroup]:
    """Scores about chosen, rejected, and the twin's."""
    return rewarded(*[[reply_of(digit) for digit in group] for group in digits], config=config)


def test_the_worked_example():
    soft = (0.0, 0.0, 0.0, 0.0, 0.0, 0.4, 0.6, 0.0, 0.0)  # 6.6
    groups = rewarded(
        [reply_of(7, 4, soft), reply_of(4)],
        [reply_of(4), reply_of(2)],
        [reply_of(6), reply_of(5)],
        [reply_of(5), reply_of(3)],
    )
    best = groups[0].rollouts[0]
    assert best.parts == pytest.approx(dict(zip(PARTS, (1.0, 0.75, 0.91, 0.5), strict=True)))
    assert best.reward == pytest.approx(1 + 0.5 * 0.75 + 0.3 * 0.91 + 0.05 * 0.5)
    assert best.reward == pytest.approx(1.67, abs=5e-3)
    assert column(groups, "order") == [[1, 0.75], [0.75, 1], [1, 0.75], [0.75, 1]]
    assert column(groups, "twin") == [[0.75, 0.375], [0.375, 0.75], [0.75, 0.375], [0.375, 0.75]]


@pytest.mark.parametrize("expected", [True, False])
@pytest.mark.parametrize(
    ("chosen", "rejected", "order"),
    [
        ([9, 1], [5, 5], [[1, 0], [0.5, 0.5]]),
        ([5, 5], [4, 5, 6, 7], [[0.375, 0.375], [1, 0.5, 0, 0]]),
    ],
)
def test_order_of_one_candidate(chosen, rejected, order, expected):
    assert (
        column(scored(chosen, rejected, config=RewardConfig(expected=expected)), "order") == order
    )


@pytest.mark.parametrize("scores", [(8, 2), (5, 5), (3, 4)])
def test_a_score_of_the_text_alone_earns_nothing_by_the_twin(scores):
    x, y = ([score] * 4 for score in scores)
    assert column(scored(x, y, y, x), "twin") == [[0] * 4] * 4


def test_reading_the_exemplars_pays_under_the_same_noise():
    high, low = [4, 5, 6, 7, 8, 9, 9], [1, 1, 2, 3, 4, 5, 6]  # of 49 couples 43 right, 3 wrong

    def mean(*digits: list[int]) -> float:
        return math.fsum(map(math.fsum, column(scored(*digits), "twin"))) / 28

    assert mean(high, low, low, high) == pytest.approx(43 * 3 / 49**2)  # the text alone
    assert mean(high, low, high, low) == pytest.approx((43 / 49) ** 2)  # its fit


def test_calibration_and_brevity_by_hand():
    for soft, chosen, rejected in ((9, 1, 0), (1, 0, 1), (5, 0.75, 0.75), (6.6, 0.91, 0.51)):
        assert calibration(soft, True) == pytest.approx(chosen)
        assert calibration(soft, False) == pytest.approx(rejected)
    flat, half = [1 / 9] * 9, [0.5, *[0.0] * 7, 0.5]
    drawn = [reply_of(9), reply_of(9, 4, flat), reply_of(9, 0, half)]
    group = rewarded(drawn, [reply_of(1)])
    assert column(group, "calibration")[0] == pytest.approx([1, 0.75, 0.75])
    assert column(group, "brevity")[0] == [0, 0.5, 1]
    fewer = rewarded([reply_of(9, lines) for lines in (8, 5, 0)], [reply_of(1)], config=CONFIG)
    worth = [rollout.reward for rollout in fewer[0].rollouts]  # a line costs 0.05 / 8
    assert [b - a for a, b in pairwise(worth)] == pytest.approx([0.05 * 3 / 8, 0.05 * 5 / 8])


def test_parts_are_those_that_can_be_earned():
    alone, both = scored([7], [3]), scored([7], [3], [6], [4])
    assert list(alone[0].rollouts[0].parts) == [name for name in PARTS if name != "twin"]
    assert list(both[0].rollouts[0].parts) == list(PARTS)


@pytest.mark.parametrize("digits", [[math.nan] * 9, [math.inf, *[0.0] * 8]])
def test_digits_without_a_probability_are_an_error(digits):
    with pytest.raises(InputError, match="adapter is broken"):
        rewarded([reply_of(7), reply_of(5, digits=digits)], [reply_of(3)])


def test_wrong_settings_are_refused():
    for wrong in (-0.1, math.nan, 1001):
        with pytest.raises(InputError, match="twin"):
            RewardConfig(twin=wrong)
    with pytest.raises(InputError, match=r"--reward\.entropy"):
        check_expected(replace(CONFIG, entropy=0.1), GrpoConfig())
    check_expected(RewardConfig(entropy=0.1), GrpoConfig())
    part_by_part = GrpoConfig("gdpo")
    check_expected(CONFIG, part_by_part)
    with pytest.raises(InputError, match=r"--reward\.no-expected"):
        check_expected(RewardConfig(), part_by_part)


# Any replies

CHANCES = st.lists(st.floats(0.001, 1), min_size=9, max_size=9).map(
    lambda some: [p / math.fsum(some) for p in some]
)
ONES = st.builds(reply_of, st.integers(1, 9), st.integers(0, LINES), CHANCES)
DRAWN = st.lists(st.lists(ONES, min_size=1, max_size=3), min_size=4, max_size=4)
WEIGHTS: dict[str, Any] = dict.fromkeys(PARTS, st.floats(0, 5))
CONFIGS = st.builds(RewardConfig, **WEIGHTS, expected=st.booleans())


@given(DRAWN, CONFIGS)
@settings(max_examples=25, deadline=None)
def test_rewards_are_bounded(drawn, config):
    for rollout in [r for group in rewarded(*drawn, config=config) for r in group.rollouts]:
        assert all(0 <= part <= 1 + 1e-9 for part in rollout.parts.values())
        assert 0 <= rollout.reward <= sum(config.weights) + 1e-9


@given(*[st.lists(st.integers(1, 9), min_size=1, max_size=6)] * 2, st.booleans())
@settings(max_examples=30, deadline=None)
def test_with_noise_a_judge_of_the_text_alone_is_at_chance(x, y, expected):
    groups = scored(x, y, y, x, config=RewardConfig(expected=expected))
    means = [math.fsum(group) / len(group) for group in column(groups, "twin")]
    assert all(mean <= 0.25 + 1e-12 for mean in means)
    assert means == pytest.approx([means[0]] * 4)
