"""Advantages within a group: against plain loops, by their laws, and at the edges."""

import itertools
import math
import statistics as plain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm.train.grpo import GrpoConfig, advantages, informative

GROUPS = [[0.1, 0.7, 0.7, -1.0], [2.0, 2.5], [0.3, 0.3, 0.3], [5.0]]  # of four sizes
GRPO, DR_GRPO, GDPO = (GrpoConfig(variant=name) for name in ("grpo", "dr_grpo", "gdpo"))


def flat(groups: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """rewards (S, 1) in fp64 and group (S,)."""
    rewards = torch.tensor([x for rewards in groups for x in rewards], dtype=torch.float64)
    sizes = torch.tensor([*map(len, groups)])
    return rewards[:, None], torch.repeat_interleave(torch.arange(len(groups)), sizes)


def loop(groups: list[list[float]], by_std: bool = True) -> list[float]:
    expected = []
    for rewards in groups:
        std = plain.stdev(rewards) if len(rewards) > 1 else 0.0
        off = [reward - plain.fmean(rewards) for reward in rewards]
        expected += [x / (std + 1e-4) if by_std else x for x in off]
    return expected


@pytest.mark.parametrize("config", [GRPO, DR_GRPO])
def test_advantages_of_groups_equal_a_loop(config):
    rewards, group = flat(GROUPS)
    A = advantages(rewards, torch.ones(1), group, 5, config)  # the fifth has no reply at all
    assert A.tolist() == pytest.approx(loop(GROUPS, config.by_std), abs=1e-12)
    assert informative(A, group, 5).tolist() == [True, True, False, False, False]


def test_decoupled_advantages_equal_a_loop():
    parts = torch.rand(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts[:4, 1] = 0.3  # no variance in one part of one group
    weights = [1.0, 0.5, -2.0]
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    z = [loop([column[:4], column[4:]]) for column in parts.T.tolist()]
    assert max(map(abs, z[1][:4])) < 1e-9
    total = [sum(w * column[i] for w, column in zip(weights, z, strict=True)) for i in range(7)]
    expected = [(x - plain.fmean(total)) / (plain.stdev(total) + 1e-4) for x in total]
    A = advantages(parts, torch.tensor(weights), group, 2, GDPO)
    assert A.tolist() == pytest.approx(expected, abs=1e-10)


def test_sums_collapse_and_parts_do_not():
    """Under two parts of 0 or 1: both against none, and one against none."""
    parts = torch.tensor([[0.0, 0], [1, 0], [0, 0], [1, 1]])
    group, weights = torch.tensor([0, 0, 1, 1]), torch.ones(2)
    summed = advantages(parts, weights, group, 2, GRPO)
    assert summed.tolist() == pytest.approx([-0.707, 0.707, -0.707, 0.707], abs=5e-4)
    apart = advantages(parts, weights, group, 2, GDPO)
    std = math.sqrt((2 * 0.7070**2 + 2 * 1.4140**2) / 3)
    assert apart.tolist() == pytest.approx([x / std for x in (-0.707, 0.707, -1.414, 1.414)], 1e-3)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.0, 12345.678])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_equal_rewards_give_exactly_zero(reward, dtype, size):
    parts, group = torch.full((size, 2), reward).to(dtype), torch.zeros(size, dtype=torch.int64)
    for config in (GRPO, DR_GRPO, GDPO):
        A = advantages(parts, torch.tensor([0.3, 0.6]), group, 1, config)
        assert A.tolist() == [0.0] * size
    sums = torch.tensor([[0.1, 0.2], [0.3, 0.0], [0.2, 0.1]])  # they differ by rounding
    assert not advantages(sums, torch.ones(2), torch.tensor([0, 0, 0]), 1, DR_GRPO).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_that_are_no_numbers_are_refused(bad):
    with pytest.raises(AssertionError, match="finite"):
        advantages(torch.tensor([[1.0], [bad]]), torch.ones(1), torch.tensor([0, 0]), 1, GRPO)


NUMBERS = st.floats(-10, 10, width=32) | st.integers(-3, 3).map(float)
GROUPS_OF_ANY = st.lists(st.lists(NUMBERS, min_size=1, max_size=9), min_size=1, max_size=4)


@given(groups=GROUPS_OF_ANY, config=st.sampled_from([GRPO, DR_GRPO]))
@settings(max_examples=60, deadline=None)
def test_groups_sum_to_zero_and_keep_their_order(groups, config):
    rewards, group = flat(groups)
    A = advantages(rewards, torch.ones(1), group, len(groups), config)
    for number, values in enumerate(groups):
        pairs = sorted(zip(values, A[group == number].tolist(), strict=True))
        assert abs(sum(a for _, a in pairs)) < 1e-8
        assert all(a <= b for (_, a), (_, b) in itertools.pairwise(pairs))
        if pairs[-1][0] - pairs[0][0] > 1e-5 * max(map(abs, values)):
            assert pairs[0][1] < pairs[-1][1]
