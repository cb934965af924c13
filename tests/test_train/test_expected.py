"""Expectation over the digit: by hand, as the mean of GRPO's gradients, and GRPO's own where the
digit is certain."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from test_rewards import CONFIG, column, one, plan
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.judge.verdict import DIGITS
from nanopersrm.train.advantages import group_advantages
from nanopersrm.train.expected import (
    Verdicts,
    check_expected,
    digit_loss,
    digits_in,
    expected_advantages,
)
from nanopersrm.train.grpo import GrpoConfig, policy_loss
from nanopersrm.train.rewards import RewardConfig, Rollout, rewards

EXPECTED = replace(CONFIG, expected=True)
GROUP = torch.tensor([0, 0, 1, 1, 1])


def chance(**digits: float) -> tuple[float, ...]:
    """d7=0.5, d4=0.5: the rest is 0."""
    return tuple(digits.get(f"d{digit}", 0.0) for digit in DIGITS)


def drawn(digit: int, **digits: float) -> Rollout:
    p = chance(**digits)
    return replace(one(digit, digits=(p,)), chances=p)


def random_verdicts(seed: int, certain: bool = False) -> Verdicts:
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(5, 9, generator=generator, dtype=torch.float64) ** 3
    if certain:
        p = torch.nn.functional.one_hot(p.argmax(-1), 9).double()
    worth = torch.rand(5, 9, generator=generator, dtype=torch.float64)
    return Verdicts(torch.tensor([1, 2, 0, 1, 2]), p / p.sum(-1, keepdim=True), worth)


# Rewards


def test_order_and_right_are_means_over_both_digits():
    """7 or 4, half each, against a certain 6 and a certain 4."""
    unsure = drawn(7, d7=0.5, d4=0.5)
    found = rewards(plan("pointwise", ([unsure], [drawn(6, d6=1), drawn(4, d4=1)])), EXPECTED)
    assert column(found, "order") == [[0.5 * 1 + 0.5 * 0.25], [0.5, 0.5 + 0.25]]


def test_it_is_the_mean_of_what_draws_earn():
    """Every digit of every reply of a pair and its twin, weighted by its chance."""
    sizes = (2, 1, 1, 1)  # replies to each of the four prompts
    might = [(7, 4, 0.3), (2, 6, 0.9), (4, 5, 0.5), (8, 3, 0.2), (5, 7, 0.6)]  # 7 by 0.3, or 4

    def earned(replies: list[Rollout], config: RewardConfig) -> dict[str, list[float]]:
        left = iter(replies)
        a, b, c, d = ([next(left) for _ in range(size)] for size in sizes)
        found = rewards(plan("pointwise", (a, b), (c, d)), config)
        return {name: [x for own in column(found, name) for x in own] for name in ("order", "twin")}

    unsure = [drawn(low, **{f"d{low}": p, f"d{high}": 1 - p}) for low, high, p in might]
    means = {name: [0.0] * len(might) for name in ("order", "twin")}
    for which in itertools.product((0, 1), repeat=len(might)):
        picked = list(zip(which, might, strict=True))
        weight = math.prod(1 - p if second else p for second, (_, _, p) in picked)
        certain = earned([one(int(own[second])) for second, own in picked], CONFIG)
        for name, parts in certain.items():
            means[name] = [m + weight * x for m, x in zip(means[name], parts, strict=True)]
    for name, parts in earned(unsure, EXPECTED).items():
        assert parts == pytest.approx(means[name])


@pytest.mark.parametrize("twins", [True, False])
def test_by_digit_is_what_that_digit_would_have_earned(twins):
    others = [drawn(6, d6=0.5, d2=0.5)], [drawn(5, d5=1)], [drawn(3, d3=0.25, d7=0.75)]
    p = chance(d7=0.25, d4=0.75)

    def earned(reply: Rollout):
        groups = [([reply], others[0]), (others[1], others[2])]
        return rewards(plan("pointwise", *groups[: 2 if twins else 1]), EXPECTED)

    (reward,) = earned(replace(one(7, digits=(p,)), chances=p))[0]["chosen"]
    assert reward.by_digit is not None
    for digit, worth in zip(DIGITS, reward.by_digit, strict=True):
        certain = chance(**{f"d{digit}": 1.0})
        (same,) = earned(replace(one(digit, digits=(p,)), chances=certain))[0]["chosen"]
        assert worth == pytest.approx(same.total)
    mean = math.fsum(q * worth for q, worth in zip(p, reward.by_digit, strict=True))
    assert reward.total == pytest.approx(mean)


def test_certain_digits_earn_what_they_earn_without():
    groups = [([drawn(7, d7=1), drawn(4, d4=1)], [drawn(4, d4=1), one("nothing")])]
    plain, found = (rewards(plan("pointwise", *groups), c) for c in (CONFIG, EXPECTED))
    for before, after in zip(plain[0].values(), found[0].values(), strict=True):
        for was, now in zip(before, after, strict=True):
            assert now.total == pytest.approx(was.total)
            assert was.by_digit is None
            assert (now.by_digit is None) == (now.problem is not None)


def test_a_digit_whose_chances_are_unknown_is_certain():
    found = rewards(plan("pointwise", ([one(7)], [drawn(6, d6=0.5, d8=0.5)])), EXPECTED)
    assert column(found, "order") == [[0.5], [0.5]]
    assert found[0]["chosen"][0].by_digit is None


# Advantages


@pytest.mark.parametrize("by_std", [True, False])
def test_a_certain_digit_has_the_advantage_of_grpo(by_std):
    verdicts = random_verdicts(1, certain=True)
    found, by_digit = expected_advantages(verdicts, GROUP, 2, by_std)
    totals = (verdicts.chances * verdicts.worth).sum(-1)
    torch.testing.assert_close(found, group_advantages(totals, GROUP, 2, by_std).float())
    assert torch.equal(by_digit[verdicts.chances == 1], found)


def test_the_worked_example():
    p = torch.zeros(2, 9, dtype=torch.float64)
    p[:, 6], p[:, 3] = torch.tensor([0.75, 0.25]), torch.tensor([0.25, 0.75])
    worth = torch.full((2, 9), 1.5, dtype=torch.float64)
    worth[:, 6], worth[:, 3] = 2.0, 1.0
    verdicts = Verdicts(torch.tensor([0, 0]), p, worth)
    found, by_digit = expected_advantages(verdicts, torch.tensor([0, 0]), 1, by_std=True)
    assert found.tolist() == pytest.approx([0.447, -0.447], abs=1e-3)
    assert by_digit[0, [6, 3]].tolist() == pytest.approx([0.671, -0.224], abs=1e-3)
    assert by_digit[1, [6, 3]].tolist() == pytest.approx([0.224, -0.671], abs=1e-3)


@pytest.mark.parametrize("G", [2, 3])
def test_they_are_the_means_of_grpos_over_all_draws(G):
    """Three digits a reply, every draw of a group enumerated; s² is the mean of GRPO's s²."""
    generator = torch.Generator().manual_seed(G)
    p = torch.zeros(G, 9, dtype=torch.float64)
    p[:, [1, 4, 7]] = torch.rand(G, 3, generator=generator, dtype=torch.float64)
    p /= p.sum(-1, keepdim=True)
    worth = torch.rand(G, 9, generator=generator, dtype=torch.float64)
    group = torch.zeros(G, dtype=torch.int64)
    replies, digits = torch.zeros(G, dtype=torch.float64), torch.zeros(G, 9, dtype=torch.float64)
    square = 0.0
    for draw in itertools.product((1, 4, 7), repeat=G):
        chance_of = math.prod(float(p[i, d]) for i, d in enumerate(draw))
        rewarded = torch.stack([worth[i, d] for i, d in enumerate(draw)])
        A = group_advantages(rewarded, group, 1, by_std=False).double()
        square += chance_of * float(rewarded.var())
        replies += chance_of * A
        for i, d in enumerate(draw):
            digits[i, d] += chance_of * A[i] / p[i, d]
    verdicts = Verdicts(torch.zeros(G, dtype=torch.int64), p, worth)
    found, by_digit = expected_advantages(verdicts, group, 1, by_std=False)
    drawn_ones = p > 0
    torch.testing.assert_close(found.double(), replies, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        by_digit.double()[drawn_ones], digits[drawn_ones], rtol=1e-5, atol=1e-6
    )
    scaled, _ = expected_advantages(verdicts, group, 1, by_std=True)
    torch.testing.assert_close(
        scaled.double(), replies / (math.sqrt(square) + 1e-4), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("worth", [0.1, 0.0])
def test_what_is_worth_the_same_teaches_nothing(worth):
    verdicts = replace(random_verdicts(2), worth=torch.full((5, 9), worth, dtype=torch.float64))
    for found in expected_advantages(verdicts, GROUP, 2, by_std=True):
        assert not found.any()


def test_a_reply_alone_teaches_nothing():
    for found in expected_advantages(random_verdicts(4), torch.arange(5), 5, by_std=False):
        assert not found.any()


# The loss


def gradient_of(logits: Tensor, loss: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    return found


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo", "cispo"])
def test_it_is_the_mean_gradient_over_all_draws(variant):
    """Of the digit, for one reply: A(d) of a drawn d times its log-probability."""
    config = GrpoConfig(variant=variant)
    logits = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    log_p = logits.log_softmax(-1)
    verdicts = replace(random_verdicts(5), chances=log_p.detach().exp())
    _, by_digit = expected_advantages(verdicts, GROUP, 2, config.by_std)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    replies = torch.tensor([4, 0, 3])
    told = by_digit, weights, verdicts, config
    found = gradient_of(logits, digit_loss(log_p[replies], replies, *told, old=None))
    mean = torch.zeros_like(logits)
    for i in replies.tolist():
        for d in range(9):
            one_token = log_p[i, d][None], torch.tensor([0]), by_digit[i, d][None]
            loss, _ = policy_loss(*one_token, weights[i][None], config)
            mean += verdicts.chances[i, d] * gradient_of(logits, loss)
    torch.testing.assert_close(found, mean, rtol=1e-6, atol=1e-9)


def test_entropy_is_for_digits_and_not_for_thoughts():
    """Its gradient is that of the entropy, and the advantages of replies are as without."""
    verdicts, tau = random_verdicts(6), 0.3
    replies, bare = expected_advantages(verdicts, GROUP, 2, by_std=False)
    same, told = expected_advantages(verdicts, GROUP, 2, by_std=False, entropy=tau)
    assert torch.equal(same, replies)
    z = verdicts.chances.log().requires_grad_()
    p = z.softmax(-1)
    count = torch.bincount(GROUP)[GROUP]
    (expected,) = torch.autograd.grad(-tau * (1 - 1 / count.double()) @ (p * p.log()).sum(-1), z)
    weighed = verdicts.chances * (told - bare).double()  # of the gradients of log p(d)
    assert weighed.sum(-1).abs().max() < 1e-6  # centred, or the deviation would grow with it
    found = weighed - verdicts.chances * weighed.sum(-1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    sure = random_verdicts(6, certain=True)
    assert expected_advantages(sure, GROUP, 2, False, tau)[1].isfinite().all()
    none = replace(verdicts, places=torch.full_like(verdicts.places, -1))
    assert torch.equal(expected_advantages(none, GROUP, 2, False, tau)[1], bare)


def test_later_passes_clip_digit_by_digit():
    """The policy has moved towards 9 beyond the clip: 9 is left alone, 1 still learns."""
    p = torch.full((1, 9), 1 / 9, dtype=torch.float64)
    worth = torch.tensor([[-1.0] + [0.0] * 7 + [1.0]], dtype=torch.float64)
    verdicts = Verdicts(torch.tensor([0]), p, worth)
    log_p = p.log().clone()
    log_p[0, 8] += 1.0
    log_p.requires_grad_()
    told = torch.tensor([0]), worth, torch.tensor([1.0]), verdicts, GrpoConfig()
    found = gradient_of(log_p, digit_loss(log_p, *told, old=p.log()))
    assert found[0, 8] == 0
    assert found[0, 0] == pytest.approx(1 / 9)


def test_a_micro_batch_without_digits_costs_nothing():
    none = torch.zeros(0, 9, requires_grad=True)
    told = torch.zeros(5, 9), torch.ones(5), random_verdicts(1), GrpoConfig()
    assert digit_loss(none, torch.zeros(0, dtype=torch.int64), *told, old=None) == 0


# Where the digits stand


def test_digits_are_found_among_the_tokens():
    verdicts = replace(random_verdicts(1), places=torch.tensor([1, 2, 0, -1, 3]))
    owners = torch.tensor([4] * 4 + [3] * 2 + [1] * 3)
    places, replies = digits_in(owners, verdicts)
    assert (places.tolist(), replies.tolist()) == ([3, 8], [4, 1])


# What cannot be had


def test_only_one_digit_and_one_sum():
    check_expected(RewardConfig(), "pairwise", GrpoConfig(variant="gdpo"))
    check_expected(EXPECTED, "pointwise", GrpoConfig())
    with pytest.raises(InputError, match="a pointwise judge, its form is pairwise"):
        check_expected(EXPECTED, "pairwise", GrpoConfig())
    with pytest.raises(InputError, match="entropy: only with"):
        check_expected(RewardConfig(entropy=0.1), "pointwise", GrpoConfig())
    with pytest.raises(InputError, match="gdpo compares part by part"):
        check_expected(EXPECTED, "pointwise", GrpoConfig(variant="gdpo"))
    with pytest.raises(InputError, match="gspo has one ratio for a whole reply"):
        check_expected(EXPECTED, "pointwise", GrpoConfig(variant="gspo"))
