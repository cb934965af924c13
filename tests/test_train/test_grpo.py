"""GRPO and its relatives: advantages against plain loops, by their laws and at the edges; losses by
hand and in micro-batches, and the numbers that are logged. `test_grpo_peers.py`: beside TRL."""

import itertools
import math
import statistics as plain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanopersrm.train.grpo import (
    CLIPS,
    GrpoConfig,
    Variant,
    advantages,
    digits_in,
    informative,
    policy_loss,
    statistics,
    token_weights,
)

# Advantages

GROUPS = [[0.1, 0.7, 0.7, -1.0], [2.0, 2.5], [0.3, 0.3, 0.3], [5.0]]  # of four sizes
GRPO, DR_GRPO, GDPO = (GrpoConfig(variant=name) for name in ("grpo", "dr_grpo", "gdpo"))


def flat(groups: list[list[float]]) -> tuple[Tensor, Tensor]:
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


# Losses

VARIANTS = tuple(CLIPS)
LENGTHS = (4, 1, 0, 7, 2, 5)  # one reply is empty
LONGEST = 9
A = (0.9, -1.1, 0.4, 0.0, -0.7, 1.3)
OWNER = torch.repeat_interleave(torch.arange(6), torch.tensor(LENGTHS))
N = sum(LENGTHS)


def drawn(seed: int = 0, spread: float = 0.4) -> dict[str, Tensor]:
    """log-probabilities of the same tokens by three models that differ by about `spread`."""
    generator = torch.Generator().manual_seed(seed)
    lp = -torch.rand(N, generator=generator, dtype=torch.float64) * 3
    noise = torch.randn(2, N, generator=generator, dtype=torch.float64) * spread
    return {"lp": lp, "old": lp + noise[0], "sampler": lp + noise[1]}


def ours(variant: Variant, lp: Tensor, **more: Any) -> tuple[Tensor, Tensor, Any]:
    """loss, gradient (N,), measured."""
    leaf, config = lp.clone().requires_grad_(), GrpoConfig(variant=variant)
    w = token_weights(torch.tensor(LENGTHS), LONGEST, config)
    loss, measured = policy_loss(leaf, OWNER, torch.tensor(A).double(), w, config, **more)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, measured


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_pass_has_ratio_one_exactly(variant, monkeypatch):
    monkeypatch.setitem(CLIPS, variant, (1e-9, 1e-9))
    _, gradient, measured = ours(variant, drawn()["lp"].float())
    w = token_weights(torch.tensor(LENGTHS), LONGEST, GrpoConfig(variant=variant))
    exact = -(w.double() * torch.tensor(A).double())[OWNER]
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-6, atol=0)
    assert statistics([measured]) == {"clip_low": 0, "clip_high": 0, "ratio": 1}


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_add_up_to_the_step(variant):
    config = GrpoConfig(variant=variant)
    x = drawn()
    known = {"old": x["old"], "sampler": x["sampler"], "entropy": x["old"].neg()}
    whole, gradient, measured = ours(variant, x["lp"], **known)
    w = token_weights(torch.tensor(LENGTHS), LONGEST, config)
    leaf, total, seen = x["lp"].clone().requires_grad_(), 0.0, []
    for replies in ((5, 0), (2,), (1, 3, 4)):  # another order, and one without tokens
        rows = torch.cat([torch.nonzero(OWNER.eq(reply))[:, 0] for reply in replies])
        owner = torch.repeat_interleave(
            torch.arange(len(replies)), torch.tensor([LENGTHS[reply] for reply in replies])
        )
        some = {name: tensor[rows] for name, tensor in known.items()}
        advantage, weight = torch.tensor(A).double()[[*replies]], w[[*replies]]
        loss, part = policy_loss(leaf[rows], owner, advantage, weight, config, **some)
        loss.backward()
        total += loss.item()
        seen.append(part)
    assert total == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(leaf.grad, gradient)
    assert statistics(seen) == pytest.approx(statistics([measured]), rel=1e-12)


def test_the_worked_example():
    lengths, owner = torch.tensor([1, 3]), torch.tensor([0, 1, 1, 1])
    before = torch.tensor([-2.0, -1, -1, -1])
    moved = before + torch.tensor([math.log(1.5), 0, 0, 0])
    first: dict[tuple[Variant, ...], tuple[float, float]] = {
        ("grpo", "gspo", "gdpo"): (-0.354, 0.118),
        ("dr_grpo",): (-0.0625, 0.0625),
        ("dapo", "cispo"): (-0.177, 0.177),
    }
    for names, (up, down) in first.items():
        for name in names:
            config = GrpoConfig(variant=name)
            parts, group = torch.tensor([[1.0], [0.0]]), torch.tensor([0, 0])
            above = advantages(parts, torch.ones(1), group, 1, config)
            w = token_weights(lengths, 4, config)
            later = moved.clone().requires_grad_()
            policy_loss(later, owner, above, w, config, old=before)[0].backward()
            assert later.grad is not None
            assert later.grad[0].item() == pytest.approx(-0.265 if name == "cispo" else 0, abs=5e-4)
            leaf = before.clone().requires_grad_()
            policy_loss(leaf, owner, above, w, config)[0].backward()
            assert leaf.grad is not None
            # gdpo divides once more, by the deviation over this step of one group: here 1.
            assert leaf.grad.tolist() == pytest.approx([up, down, down, down], abs=5e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("far", [1e3, -1e3])
def test_log_probs_far_apart_stay_finite(variant, far):
    lp = drawn()["lp"].float() + min(0.0, far)
    loss, gradient, measured = ours(variant, lp, old=lp - far, sampler=lp + far)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert all(math.isfinite(value) for value in statistics([measured]).values())


# What is logged

TWO = torch.tensor([0, 0, 0, 1, 1, 1])  # a good reply, then a bad one
RATIOS = [1.5, 0.5, 1.0, 1.5, 0.5, 1.1]


def logged(variant: Variant = "grpo", **more: Any) -> dict[str, float]:
    config, lp = GrpoConfig(variant=variant), torch.full((6,), -1.0)
    weights = token_weights(torch.tensor([3, 3]), 4, config)
    advantage = torch.tensor([1.0, -1.0])
    return statistics([policy_loss(lp, TWO, advantage, weights, config, **more)[1]])


@pytest.mark.parametrize(
    ("variant", "ratios", "low", "high", "mean"),
    [
        ("grpo", RATIOS, 1 / 6, 1 / 6, sum(RATIOS) / 6),  # 0.5 in the bad reply, 1.5 in the good
        ("cispo", [6.0, 0.5, 1.0, 6.0, 0.5, 1.1], 0, 2 / 6, 15.1 / 6),  # every bounded weight
        ("gspo", RATIOS, 0.5, 0, (0.75 ** (1 / 3) + 0.825 ** (1 / 3)) / 2),  # whole replies
    ],
)
def test_clipped_are_the_tokens_without_a_gradient(variant, ratios, low, high, mean):
    values = logged(variant, old=-1.0 - torch.tensor(ratios).log())
    assert values["clip_low"] == pytest.approx(low)
    assert values["clip_high"] == pytest.approx(high)
    assert values["ratio"] == pytest.approx(mean)


def test_the_gap_is_to_the_weights_that_sampled():
    gap = torch.tensor([0.09, -0.1, 0.0, 0.1, -0.11, 3.0])
    values = logged(sampler=-1.0 - gap, entropy=torch.arange(6.0))
    assert values["entropy"] == pytest.approx(2.5)
    assert values["gap_mean"] == pytest.approx(3.4 / 6)
    assert values["gap_max"] == values["gap_p99"] == pytest.approx(3.0)
    assert values["gap_outside"] == pytest.approx(3 / 6)  # 0.1, -0.11 and 3
    later = logged(old=torch.full((6,), -1.5), sampler=torch.full((6,), -1.4))
    assert later["gap_mean"] == pytest.approx(0.1, rel=1e-5)


def test_the_last_token_of_a_reply_is_its_digit():
    both = digits_in(torch.tensor([4, 4, 4, 0, 7, 7]))
    assert [x.tolist() for x in both] == [[2, 3, 5], [4, 0, 7]]
