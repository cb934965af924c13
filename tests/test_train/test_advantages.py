"""Advantages within a group: against plain loops, by their laws, and at the edges."""

import math
import statistics as plain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm.train.grpo import GrpoConfig, advantages, informative

GROUPS = [[0.1, 0.7, 0.7, -1.0], [2.0, 2.5], [0.3, 0.3, 0.3], [5.0]]  # of four sizes


def flat(groups: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """rewards (S,) in fp64 and group (S,)."""
    rewards = [reward for one in groups for reward in one]
    group = [number for number, one in enumerate(groups) for _ in one]
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(group, dtype=torch.int64)


def loop(groups: list[list[float]], by_std: bool) -> list[float]:
    found = []
    for one in groups:
        std = plain.stdev(one) if len(one) > 1 else 0.0
        for reward in one:
            off = reward - plain.fmean(one)
            found.append(off / (std + 1e-4) if by_std else off)
    return found


def group_advantages(rewards: torch.Tensor, group: torch.Tensor, groups: int, by_std: bool):
    """(S,) of rewards with one part."""
    config = GrpoConfig(variant="grpo" if by_std else "dr_grpo")
    return advantages(rewards[:, None], torch.ones(1), group, groups, config)


@pytest.mark.parametrize("by_std", [True, False])
def test_advantages_of_groups_equal_a_loop(by_std):
    found = group_advantages(*flat(GROUPS), 4, by_std)
    assert found.tolist() == pytest.approx(loop(GROUPS, by_std), abs=1e-12)


def test_decoupled_advantages_equal_a_loop():
    generator = torch.Generator().manual_seed(0)
    parts = torch.rand(7, 3, generator=generator, dtype=torch.float64)
    parts[:4, 1] = 0.3  # no variance in one part of one group
    weights = [1.0, 0.5, -2.0]
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    z = []
    for c in range(3):
        column = parts[:, c].tolist()
        z.append(loop([column[:4], column[4:]], True))
        assert c != 1 or max(map(abs, z[1][:4])) < 1e-9
    total = [sum(w * z[c][i] for c, w in enumerate(weights)) for i in range(7)]
    std = plain.stdev(total)
    expected = [(one - plain.fmean(total)) / (std + 1e-4) for one in total]
    found = advantages(parts, torch.tensor(weights), group, 2, GrpoConfig(variant="gdpo"))
    assert found.tolist() == pytest.approx(expected, abs=1e-10)


def test_the_worked_example():
    parts = torch.tensor([[0.0, 0], [1, 0], [0, 0], [1, 1]])
    group, weights = torch.tensor([0, 0, 1, 1]), torch.ones(2)
    summed = advantages(parts, weights, group, 2, GrpoConfig())
    assert summed.tolist() == pytest.approx([-0.707, 0.707, -0.707, 0.707], abs=5e-4)
    apart = advantages(parts, weights, group, 2, GrpoConfig(variant="gdpo"))
    assert (apart[3] / apart[1]).item() == pytest.approx(2)
    std = math.sqrt((2 * 0.7070**2 + 2 * 1.4140**2) / 3)
    assert apart.tolist() == pytest.approx([x / std for x in (-0.707, 0.707, -1.414, 1.414)], 1e-3)


@pytest.mark.parametrize("reward", [0.1, -0.7, 1 / 3, 0.0, 12345.678])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 8, 64])
def test_equal_rewards_give_exactly_zero(reward, dtype, size):
    parts = torch.full((size, 2), reward).to(dtype)
    group = torch.zeros(size, dtype=torch.int64)
    for variant in ("grpo", "dr_grpo", "gdpo"):
        config = GrpoConfig(variant=variant)
        found = advantages(parts, torch.tensor([0.3, 0.6]), group, 1, config)
        assert found.tolist() == [0.0] * size
        assert informative(found, group, 1).tolist() == [False]


def test_sums_that_differ_by_rounding_are_equal():
    parts = torch.tensor([[0.1, 0.2], [0.3, 0.0], [0.2, 0.1]])
    assert len(set(parts.double().sum(1).tolist())) > 1
    found = advantages(
        parts, torch.ones(2), torch.zeros(3, dtype=torch.int64), 1, GrpoConfig(variant="dr_grpo")
    )
    assert found.tolist() == [0.0] * 3


def test_groups_with_variance_are_found():
    rewards, group = flat(GROUPS)
    found = group_advantages(rewards, group, 5, True)  # the fifth has no reply at all
    assert informative(found, group, 5).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_no_numbers_are_refused(bad):
    with pytest.raises(AssertionError, match="finite"):
        group_advantages(torch.tensor([1.0, bad]), torch.tensor([0, 0]), 1, True)


NUMBERS = st.floats(-10, 10, width=32) | st.integers(-3, 3).map(float)
ONE_GROUP = st.lists(NUMBERS, min_size=1, max_size=9)


@given(groups=st.lists(ONE_GROUP, min_size=1, max_size=4), by_std=st.booleans())
@settings(max_examples=60, deadline=None)
def test_groups_sum_to_zero_and_keep_their_order(groups, by_std):
    rewards, group = flat(groups)
    found = group_advantages(rewards, group, len(groups), by_std)
    assert torch.isfinite(found).all()
    varied = informative(found, group, len(groups))
    for number, one in enumerate(groups):
        own = found[group == number]
        assert abs(own.sum().item()) < 1e-8
        high, low = max(one), min(one)
        apart = high - low > 1e-5 * max(map(abs, one))
        assert varied[number].item() or not apart
        for a, b in zip(one, own.tolist(), strict=True):
            for c, d in zip(one, own.tolist(), strict=True):
                assert not (a >= c and b < d)
                assert not (apart and a == high and c == low and b <= d)
