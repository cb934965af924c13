"""Expectation over the digit: by hand, as the mean of GRPO's gradients, and GRPO's own where the
digit is certain."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from test_rewards import CONFIG, column, reply_of, rewarded

from nanopersrm.judge.verdict import DIGITS
from nanopersrm.train.grpo import GrpoConfig, ScoreDigits, advantages, expected_advantages
from nanopersrm.train.rewards import PARTS, RewardConfig
from nanopersrm.train.rollout import Rollout

EXPECTED, DR_GRPO = replace(CONFIG, expected=True), GrpoConfig(variant="dr_grpo")
GROUP = torch.tensor([0, 0, 1, 1, 1])


def chance(**digits: float) -> tuple[float, ...]:
    """d7=0.5, d4=0.5: the rest is 0."""
    return tuple(digits.get(f"d{digit}", 0.0) for digit in DIGITS)


def drawn(digit: int, **digits: float) -> Rollout:
    return reply_of(digit, digits=chance(**digits))


def random_digits(seed: int, certain: bool = False) -> ScoreDigits:
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(5, 9, generator=generator, dtype=torch.float64) ** 3
    if certain:
        p = torch.nn.functional.one_hot(p.argmax(-1), 9).double()
    rewards = torch.rand(5, 9, generator=generator, dtype=torch.float64)
    return ScoreDigits(p / p.sum(-1, keepdim=True), rewards)


# Rewards


def test_it_is_the_mean_of_what_draws_earn():
    """Every digit of every reply of a pair and its twin, weighted by its chance."""
    sizes = (2, 1, 1, 1)  # replies to each of the four prompts
    might = [(7, 4, 0.3), (2, 6, 0.9), (4, 5, 0.5), (8, 3, 0.2), (5, 7, 0.6)]  # 7 by 0.3, or 4

    def earned(replies: list[Rollout], config: RewardConfig) -> dict[str, list[float]]:
        left = iter(replies)
        groups = rewarded(*[[next(left) for _ in range(size)] for size in sizes], config=config)
        return {name: [x for values in column(groups, name) for x in values] for name in PARTS}

    unsure = [drawn(low, **{f"d{low}": p, f"d{high}": 1 - p}) for low, high, p in might]
    means = {name: [0.0] * len(might) for name in PARTS}
    for which in itertools.product((0, 1), repeat=len(might)):
        picked = list(zip(which, might, strict=True))
        weight = math.prod(1 - p if second else p for second, (_, _, p) in picked)
        certain = earned([reply_of(int(digits[second])) for second, digits in picked], CONFIG)
        for name, parts in certain.items():
            means[name] = [m + weight * x for m, x in zip(means[name], parts, strict=True)]
    for name, parts in earned(unsure, EXPECTED).items():
        assert parts == pytest.approx(means[name])


@pytest.mark.parametrize("twins", [True, False])
def test_by_digit_is_what_that_digit_would_have_earned(twins):
    p = chance(d7=0.25, d4=0.75)

    def earned(reply: Rollout) -> Rollout:
        twin = [[drawn(5, d5=1)], [drawn(3, d3=0.25, d7=0.75)]] if twins else []
        return rewarded([reply], [drawn(6, d6=0.5, d2=0.5)], *twin, config=EXPECTED)[0].rollouts[0]

    unsure = earned(reply_of(7, digits=p))
    assert unsure.by_digit is not None
    for digit, worth in zip(DIGITS, unsure.by_digit, strict=True):
        assert worth == pytest.approx(earned(drawn(digit, **{f"d{digit}": 1.0})).reward)
    mean = math.fsum(q * worth for q, worth in zip(p, unsure.by_digit, strict=True))
    assert unsure.reward == pytest.approx(mean)


# Advantages


def test_the_worked_example():
    p = torch.zeros(2, 9, dtype=torch.float64)
    p[:, 6], p[:, 3] = torch.tensor([0.75, 0.25]), torch.tensor([0.25, 0.75])
    worth = torch.full((2, 9), 1.5, dtype=torch.float64)
    worth[:, 6], worth[:, 3] = 2.0, 1.0
    digits = ScoreDigits(p, worth)
    A, by_digit = expected_advantages(digits, torch.tensor([0, 0]), 1, by_std=True)
    assert A.tolist() == pytest.approx([0.447, -0.447], abs=1e-3)
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
    replies, by_draw = torch.zeros(G, dtype=torch.float64), torch.zeros(G, 9, dtype=torch.float64)
    square = 0.0
    for draw in itertools.product((1, 4, 7), repeat=G):
        chance_of = math.prod(float(p[i, d]) for i, d in enumerate(draw))
        rewarded = torch.stack([worth[i, d] for i, d in enumerate(draw)])
        A = advantages(rewarded[:, None], torch.ones(1), group, 1, DR_GRPO).double()
        square += chance_of * float(rewarded.var())
        replies += chance_of * A
        for i, d in enumerate(draw):
            by_draw[i, d] += chance_of * A[i] / p[i, d]
    digits = ScoreDigits(p, worth)
    A, by_digit = expected_advantages(digits, group, 1, by_std=False)
    drawn_ones = p > 0
    torch.testing.assert_close(A.double(), replies, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        by_digit.double()[drawn_ones], by_draw[drawn_ones], rtol=1e-5, atol=1e-6
    )
    scaled, _ = expected_advantages(digits, group, 1, by_std=True)
    torch.testing.assert_close(
        scaled.double(), replies / (math.sqrt(square) + 1e-4), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("worth", [0.1, 0.0])
def test_what_is_worth_the_same_teaches_nothing(worth):
    digits = replace(random_digits(2), rewards=torch.full((5, 9), worth, dtype=torch.float64))
    for A in expected_advantages(digits, GROUP, 2, by_std=True):
        assert not A.any()


def test_entropy_is_for_digits_and_not_for_thoughts():
    """Its gradient is that of the entropy, and the advantages of replies are as without."""
    digits, tau = random_digits(6), 0.3
    replies, bare = expected_advantages(digits, GROUP, 2, by_std=False)
    same, by_digit = expected_advantages(digits, GROUP, 2, by_std=False, entropy=tau)
    assert torch.equal(same, replies)
    z = digits.probs.log().requires_grad_()
    p = z.softmax(-1)
    count = torch.bincount(GROUP)[GROUP]
    (expected,) = torch.autograd.grad(-tau * (1 - 1 / count.double()) @ (p * p.log()).sum(-1), z)
    weighed = digits.probs * (by_digit - bare).double()  # of the gradients of log p(d)
    assert weighed.sum(-1).abs().max() < 1e-6  # centred, or the deviation would grow with it
    gradient = weighed - digits.probs * weighed.sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    sure = random_digits(6, certain=True)
    assert expected_advantages(sure, GROUP, 2, False, tau)[1].isfinite().all()
