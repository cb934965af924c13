"""Rewards of any replies: bounds, the lowest for what does not parse, and what must not matter."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rewards import CONFIG, GOOD, MANNERS, column, one, plan, pointwise, two

from nanopersrm.judge.verdict import write
from nanopersrm.train.rewards import OTHER, PARTS, Plan, RewardConfig, Rollout, Shown, rewards

INVALID = ["", "A", "<think>", "<think>x</think><scores>A=0</scores>", write("x", {"B": 5})]
DIGIT = st.integers(1, 9)
WEIGHT = st.floats(0, 5)
CONFIGS = st.builds(
    RewardConfig,
    **dict.fromkeys(PARTS, WEIGHT),
    claims=st.integers(1, 4),
    margin=st.integers(1, 8),
    fall=st.integers(1, 300),
)
REASONING = st.sampled_from(["", GOOD, 'B has no dashes, "x".', "Both candidates: many commas."])
RUDE = st.sampled_from(INVALID) | st.text(max_size=30)
TOKENS = st.integers(0, 400)
DIGITS = st.none() | st.tuples(st.tuples(*[st.floats(0, 1)] * 9))
ONES = st.builds(one, DIGIT | RUDE, TOKENS, REASONING, DIGITS)
TWOS = st.builds(two, DIGIT, DIGIT, REASONING) | st.builds(one, RUDE)
GROUPS = {"pointwise": st.lists(ONES, min_size=1, max_size=3)}
GROUPS["pairwise"] = st.lists(TWOS, min_size=1, max_size=3)
PLANS = st.sampled_from(sorted(GROUPS)).flatmap(
    lambda form: st.lists(st.tuples(GROUPS[form], GROUPS[form]), min_size=1, max_size=2).map(
        lambda groups: plan(form, *groups)
    )
)


@given(PLANS, CONFIGS)
@settings(max_examples=100, deadline=None)
def test_bounded_and_invalid_is_the_lowest(asked, config):
    every = [r for own in rewards(asked, config) for group in own.values() for r in group]
    for reward in every:
        assert tuple(reward.parts) == asked.parts
        assert all(0 <= part <= 1 for part in reward.parts.values())
        assert 0 <= reward.total <= sum(config.weights) + 1e-9
        if reward.problem is not None:
            assert reward.total == 0 == max(reward.parts.values())
            assert all(reward.total <= other.total for other in every)
        else:
            assert reward.total >= config.format


@given(PLANS, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_order_of_the_replies_changes_nothing(asked, rng):
    places = [
        {role: rng.sample(range(len(g)), len(g)) for role, g in shown.groups.items()}
        for shown in asked.shown
    ]
    shuffled = Plan(
        asked.form,
        tuple(
            Shown(
                shown.exemplars,
                shown.chosen,
                shown.rejected,
                {role: [shown.groups[role][i] for i in own[role]] for role in OTHER},
            )
            for shown, own in zip(asked.shown, places, strict=True)
        ),
    )
    before, after = rewards(asked, CONFIG), rewards(shuffled, CONFIG)
    for was, now, own in zip(before, after, places, strict=True):
        assert now == {role: [was[role][i] for i in own[role]] for role in OTHER}


@given(st.tuples(*[st.lists(st.tuples(DIGIT, DIGIT), min_size=1, max_size=3)] * 4))
@settings(max_examples=50, deadline=None)
def test_the_names_of_the_candidates_do_not_matter(groups):
    """A and B exchanged in the prompt and in the reply."""

    def said(pairs, a, b):
        text = f'Candidate {a} has no dashes and says "I". Candidate {b} has many dashes.'
        return [Rollout(write(text, {"A": x, "B": y}), 100) for x, y in pairs]

    named = [said(group, "A", "B") for group in groups]
    renamed = [said([(y, x) for x, y in group], "B", "A") for group in groups]
    before = rewards(plan("pairwise", (named[0], named[1]), (named[2], named[3])), CONFIG)
    after = rewards(plan("pairwise", (renamed[1], renamed[0]), (renamed[3], renamed[2])), CONFIG)
    assert [{OTHER[role]: group for role, group in own.items()} for own in after] == before


@given(*[st.lists(DIGIT, min_size=1, max_size=4)] * 2)
@settings(max_examples=50, deadline=None)
def test_the_rejected_text_is_the_mirror_of_the_chosen(chosen, rejected):
    mirrored = [[10 - digit for digit in group] for group in (rejected, chosen)]
    before = rewards(pointwise(chosen, rejected), MANNERS)
    after = rewards(pointwise(*mirrored), MANNERS)
    for name in ("order", "calibration"):
        assert column(after, name) == column(before, name)[::-1]


@given(*[st.lists(DIGIT, min_size=1, max_size=6)] * 2)
@settings(max_examples=60, deadline=None)
def test_with_noise_such_a_judge_is_at_chance(x, y):
    found = rewards(pointwise(x, y, y, x), MANNERS)
    means = [math.fsum(group) / len(group) for group in column(found, "twin")]
    assert all(mean <= 0.25 + 1e-12 for mean in means)
    assert means == pytest.approx([means[0]] * 4)
