"""The verdict in expectation: all nine digits teach, not the one that was drawn.

A reply is a thought and, at its end, a digit. What the digit d would have earned is known for all
nine: r(d), from `Reward.by_digit`. So is how likely each was: p(d), since the sampler has drawn
from it. Where one draw says p(7) = 0.3 and earns by chance, the mean over the nine says the same
with less noise (Rao-Blackwell; for the last action of an episode this is the expected policy
gradient of Ciosek and Whiteson, arXiv 1706.05374, and mean actor-critic, 1709.00503):

    what a thought is worth     r = Σ_d p(d) r(d)           variance v = Σ_d p(d) (r(d) - r)²
    mean of a group of G        m = Σ over its replies of r / G
    deviation                   s² = Σ over its replies of ((r - m)² + v (G - 1) / G) / (G - 1)
    advantage of a reply        A = (r - m) / (s + 1e-4)                         for all its tokens
    advantage of a digit        A(d) = (r(d) - m - (r(d) - r) / G) / (s + 1e-4)  for nine tokens in
                                                                 its place, of weight w · p(d) each

The thought is no longer praised or blamed for the luck of its digit, and the digit learns from all
nine at once: Σ_d p(d) A(d) ∇ log p(d), of which the drawn digit is one sample. Over all draws these
are the means of GRPO's own advantages but for its deviation, which varies with the draw: s² is the
mean of its square. (r(d) - r) / G is there since a better digit lifts the mean that it is held
against. Compared across a plan, rivals and twins share a group, and what a digit does to their
rewards is left out. The drawn digit keeps A as any other token: among the nine that is zero on
average, and noise; whether a digit comes at all is learned by it.

Worked example: two replies, both worth 2 with a 7 and 1 with a 4; the first draws 7 with 0.75, the
second with 0.25. r = 1.75 and 1.25, m = 1.5, v = 0.1875 twice: s² = 2 · (0.0625 + 0.09375) and
s = 0.559. A = ±0.447; of the first A(7) = 0.671 and A(4) = -0.224, of the second 0.224 and -0.671.
Had both drawn a 7, GRPO would have learned nothing.

What collapses does not learn: once one digit has all the chance, Σ_d p(d) A(d) ∇ log p(d) is zero,
right or wrong. With a weight τ on the entropy H a digit is worth r(d) + τ (- log p(d) - H), and the
best that a policy can do is p(d) ~ exp(r(d) / τ): all nine stay in play, by what they earn (maximum
entropy, Haarnoja et al., arXiv 1702.08165). A thought is not praised for it.

A certain digit, p(d) = 1, gives GRPO's numbers: the advantage of `advantages.py`, and no gradient
at the digit. Replies without a readable digit count with what they earned, as one digit would.

The clip is that of the variant, digit by digit; a KL or a cap on importance is for drawn tokens
alone, and only these are counted as clipped. Sizes: S replies of a step, n of a micro-batch with a
digit, M tokens. What we left out: two digits in one reply (pairwise), parts compared one by one
(gdpo), one ratio for a reply (gspo).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.train.advantages import EPS, SAME
from nanopersrm.train.grpo import GrpoConfig, policy_loss
from nanopersrm.train.rewards import RewardConfig


@dataclass(frozen=True)
class Verdicts:
    """Of each reply of a step, what its digit might have been."""

    places: Tensor  # (S,) int64: of the digit among the ids of the reply; -1: it has none
    chances: Tensor  # (S, 9) fp64: p(1) … p(9), they sum to 1
    worth: Tensor  # (S, 9) fp64: what the reply would have earned with each


def check_expected(reward: RewardConfig, form: str, config: GrpoConfig) -> None:
    """Raise where the expectation is asked for and not to be had."""
    if reward.expected and form != "pointwise":
        raise InputError(f"--reward.expected: expected a pointwise judge, its form is {form}")
    if reward.entropy and not reward.expected:
        raise InputError("--reward.entropy: only with --reward.expected are there nine chances")
    without = {"gdpo": "compares part by part", "gspo": "has one ratio for a whole reply"}
    if reward.expected and config.variant in without:
        why = f"{config.variant} {without[config.variant]}"
        raise InputError(f"--reward.expected: {why}, choose another --grpo.variant")


def expected_advantages(
    verdicts: Verdicts, group: Tensor, groups: int, by_std: bool, entropy: float = 0.0
) -> tuple[Tensor, Tensor]:
    """group (S,) int64 below `groups` -> of the replies (S,) and of their digits (S, 9), fp32.

    entropy: weight of the entropy of the digits, in nats.

    A group that is worth the same whatever is drawn gets exactly zero, one reply alone too.
    """
    p, worth = verdicts.chances, verdicts.worth
    assert p.shape == worth.shape == (len(group), 9), f"{tuple(p.shape)}, {tuple(worth.shape)}"
    empty = worth.new_zeros(groups)
    count = empty.index_add(0, group, torch.ones_like(worth[:, 0]))  # (Q,)
    level = (p * worth).sum(-1)  # (S,)
    mean = empty.index_add(0, group, level) / count.clamp(min=1)  # (Q,)
    lucky = worth - level[:, None]  # (S, 9)
    if entropy:
        rare = -p.clamp(min=torch.finfo(p.dtype).tiny).log()  # (S, 9) nats
        rare = rare - (p * rare).sum(-1, keepdim=True)
        lucky = lucky + entropy * rare.where(verdicts.places[:, None] >= 0, 0)
    off = level - mean[group]  # (S,)
    seen = torch.maximum(off.abs(), lucky.abs().where(p > SAME, 0).amax(-1))  # (S,)
    widest = empty.scatter_reduce(0, group, seen, "amax")
    size = empty.scatter_reduce(0, group, worth.abs().amax(-1), "amax")
    telling = ((widest > SAME * size) & (count > 1))[group]  # (S,)
    off, lucky = off.where(telling, 0), lucky.where(telling[:, None], 0)
    share = (1 - 1 / count.clamp(min=1))[group]  # (S,) of a change that is left above its own mean
    by_digit = off[:, None] + lucky * share[:, None]
    if by_std:
        spread = off.square() + share * (p * lucky.square()).sum(-1)
        square = empty.index_add(0, group, spread) / (count - 1).clamp(min=1)
        scale = (square.sqrt() + EPS)[group]
        off, by_digit = off / scale, by_digit / scale[:, None]
    return off.float(), by_digit.float()


def digits_in(owners: Tensor, verdicts: Verdicts) -> tuple[Tensor, Tensor]:
    """owners (M,) int64, the reply of each token of a micro-batch, whole replies one after another
    -> which of the tokens are digits to learn (n,), and the replies that they are of (n,)."""
    replies, lengths = torch.unique_consecutive(owners.cpu(), return_counts=True)
    places = verdicts.places[replies]
    assert bool((places < lengths).all()), "a digit after the end of its reply"
    known = places >= 0
    found = (lengths.cumsum(0) - lengths + places)[known]
    return found.to(owners.device), replies[known]


def digit_loss(
    log_probs: Tensor,
    replies: Tensor,
    advantages: Tensor,
    weights: Tensor,
    verdicts: Verdicts,
    config: GrpoConfig,
    old: Tensor | None,
) -> Tensor:
    """log_probs (n, 9) with gradient, of the digits of replies (n,) -> their share of the loss ().

    advantages (S, 9) of `expected_advantages`, weights (S,) of `token_weights`; old (n, 9): the
    log-probabilities before the first update, None if there was none: the ratio is exactly 1.
    """
    device = log_probs.device
    p = verdicts.chances[replies].to(device, log_probs.dtype)  # (n, 9)
    weight = (weights.to(device)[replies.to(device), None] * p).flatten()  # (9 n,)
    plain = replace(config, beta=0.0, kl=None, importance_cap=None)
    owner = torch.arange(len(weight), device=device)
    told = advantages[replies].to(device).flatten()
    before = None if old is None else old.flatten()
    return policy_loss(log_probs.flatten(), owner, told, weight, plain, old=before)[0]
