"""GRPO and its relatives: from rewards to advantages, and from log-probabilities to the loss.

For each prompt the policy samples a group of replies and each gets a reward. How far it is above
its group is its advantage A. Then every token of a good reply is made more likely, and of a bad one
less. This file takes tensors; it never sees a model or a text.

The ratio ρ = p / p_old says how far the policy has moved since it sampled, token by token. Beyond a
clip, 1 - low to 1 + high, a token that already moved the right way is left alone:

               advantage A          gain of a token                low, high      its weight w
    grpo       (r - mean) / std     min(ρ A, clip(ρ) A)            0.2, 0.2       1 / (S · length)
    dr_grpo    r - mean             as grpo                        0.2, 0.2       1 / (S · longest)
    dapo       as grpo              as grpo                        0.2, 0.28      1 / all tokens
    gspo       as grpo              as grpo, one ρ for the reply   3e-4, 4e-4     as grpo
    cispo      as grpo              stop(clip(ρ)) A log p          1, 4           1 / all tokens
    gdpo       part by part         as grpo                        0.2, 0.2       as grpo

    loss = - Σ over tokens of  w · gain

r is the weighted sum of a reward's parts, mean and std are those of the group. The step has S
replies, this one `length` tokens, none more than `longest`; stop(·) is a constant to the gradient.

* grpo (DeepSeekMath, arXiv 2402.03300): a token of a long reply counts little.
* dr_grpo (2503.20783) removes both divisions that bias: by the length, and by the deviation, which
  is small where a prompt is nearly solved or hopeless.
* dapo (2503.14476): each token counts the same; the upper clip is higher, for rare tokens to grow.
* gspo (2507.18071): ρ = exp(mean over the reply of log p - log p_old), a mean that moves little.
* cispo (MiniMax-M1, 2506.13585): the ratio is a bounded weight, every token keeps its gradient. The
  bound of 5 is TRL's, from ScaleRL (2510.13786).
* gdpo (2601.05242): sums collapse. Under two parts of 0 or 1, both against none gets the same
  advantage as one against none. So parts are compared one by one, z = (r - mean) / std of each
  part, and A = Σ weight · z / (std of these over the step).

Worked example: rewards 1 and 0, lengths 1 and 3, longest 4. mean 0.5, std 0.7071, A = ±0.707
(dr_grpo ±0.5). In the first pass ρ = 1, and a token's gradient is -w · A:

    grpo, gspo, gdpo   w = 1/2 and 1/6     -0.354    +0.118, three times
    dr_grpo            w = 1/8             -0.0625   +0.0625, three times
    dapo, cispo        w = 1/4             -0.177    +0.177, three times

In a second pass the first token has risen to ρ = 1.5: beyond every clip, gradient 0, but that of
cispo, 1.5 · -0.177 = -0.265.

What we chose. `train_rft.py` steps once on what it drew, so there ρ = exp(log p - stop(log p)):
exactly 1, and yet with a gradient. The sampler's log-probabilities differ by rounding, which is
measured as a gap. std is Bessel's, with 1e-4 added, as in TRL. Equal rewards give exactly zero.
Micro-batches add up exactly: the loss is a sum, and w is that of the whole step. All is computed in
at least fp32. Sizes: N tokens, S replies, Q groups, C parts of the reward, n replies of a micro-
batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Variant = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "gdpo"]
CLIPS: dict[Variant, tuple[float, float]] = {  # low and high, from the papers
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 4.0),
    "gdpo": (0.2, 0.2),
}
LIMIT = 20.0  # nats: no exponent is larger; exp(20) = 5e8, and inf · 0 would be nan
GAP_BOUNDS = (math.log(0.9), math.log(1.1))  # a gap outside is worth counting
STD_EPS = 1e-4  # added to each deviation, as in TRL
SAME = 1e-6  # values whose distance is a smaller share of their size are equal


@dataclass(frozen=True)
class GrpoConfig:
    variant: Variant = "grpo"  # which row of the table in grpo.py

    @property
    def by_std(self) -> bool:
        """Advantages are divided by the deviation of their group."""
        return self.variant != "dr_grpo"


# Advantages, for all replies of a step, on the CPU


def advantages(
    parts: Tensor, weights: Tensor, group: Tensor, groups: int, config: GrpoConfig
) -> Tensor:
    """parts (S, C) of the rewards, weights (C,), group (S,) int64 below `groups` -> (S,)."""
    assert parts.ndim == 2, f"expected parts (S, C), got {tuple(parts.shape)}"
    assert weights.shape == parts.shape[1:], f"{tuple(weights.shape)} weights for {parts.shape[1]}"
    if config.variant == "gdpo":
        z = _above_group(parts, group, groups, by_std=True)  # (S, C)
        total = (z * weights).sum(-1)  # (S,)
        std = (total.square().sum() / max(1, len(total) - 1)).sqrt()  # their mean is zero
        return total / (std + STD_EPS)
    total = (parts.to(torch.promote_types(parts.dtype, torch.float32)) * weights).sum(-1)  # (S,)
    return _above_group(total[:, None], group, groups, config.by_std)[:, 0]


def informative(advantages: Tensor, group: Tensor, groups: int) -> Tensor:
    """advantages (S,), group (S,) -> (Q,) bool: some reply did better than another. Others have no
    gradient, and need no training pass as long as `token_weights` counts them."""
    largest = advantages.new_zeros(groups).scatter_reduce(0, group, advantages.abs(), "amax")
    return largest > 0


def _above_group(values: Tensor, group: Tensor, groups: int, by_std: bool) -> Tensor:
    """values (S, C) -> (S, C): less the mean of the group, divided by its deviation `by_std`."""
    S, C = values.shape
    assert values.device.type == "cpu", f"expected rewards on the CPU, got {values.device}"
    assert torch.isfinite(values).all(), "expected finite rewards, got nan or inf"
    assert group.shape == (S,), f"expected {S} group numbers, got {tuple(group.shape)}"
    x = values if values.dtype == torch.float64 else values.float()
    index = group[:, None].expand(S, C)
    empty = x.new_zeros(groups, C)

    count = empty.scatter_add(0, index, torch.ones_like(x))  # (Q, C)
    mean = empty.scatter_add(0, index, x) / count.clamp(min=1)  # (Q, C)
    off = x - mean[group]  # (S, C)
    widest = empty.scatter_reduce(0, index, off.abs(), "amax")  # (Q, C)
    size = empty.scatter_reduce(0, index, x.abs(), "amax")  # (Q, C)
    off = off.where((widest > SAME * size)[group], 0)
    if not by_std:
        return off
    std = (empty.scatter_add(0, index, off.square()) / (count - 1).clamp(min=1)).sqrt()  # (Q, C)
    return off / (std + STD_EPS)[group]


@dataclass(frozen=True)
class ScoreDigits:
    """Of each reply of a step, the nine digits that its last choice might have been."""

    probs: Tensor  # (S, 9) fp64: p(1) … p(9) as the sampler drew, they sum to 1
    rewards: Tensor  # (S, 9) fp64: of the reply, with each of them


def expected_advantages(
    digits: ScoreDigits, group: Tensor, groups: int, by_std: bool, entropy: float = 0.0
) -> tuple[Tensor, Tensor]:
    """group (S,) int64 below `groups` -> advantages of replies (S,) and of digits (S, 9), fp32.

    A reply is a thought and, at its end, a digit d. What each of the nine would have earned is
    known, r(d), and how likely it was, p(d). The mean over the nine says what one draw says with
    less noise (expected policy gradients, Ciosek and Whiteson, arXiv 1706.05374):

        reward of a reply        r = Σ_d p(d) r(d)           variance v = Σ_d p(d) (r(d) - r)²
        mean of a group of G     m = Σ over its replies of r / G
        deviation                s² = Σ over its replies of ((r - m)² + v (G - 1) / G) / (G - 1)
        advantage of a reply     A = (r - m) / (s + 1e-4)                     for all its tokens
        advantage of a digit     A(d) = (r(d) - m - (r(d) - r) / G) / (s + 1e-4)

    Nine tokens stand in the digit's place, each with the weight w · p(d). Over all draws A is the
    mean of GRPO's; s² is the mean of its square. (r(d) - r) / G is there since a better digit lifts
    the mean that it is compared with.

    entropy: τ, the weight of the entropy H of the nine, in nats. With τ a digit earns r(d) + τ (-
    log p(d) - H), and the best policy is p(d) ~ exp(r(d) / τ), which keeps all nine in play
    (Haarnoja et al., arXiv 1702.08165).

    Worked example: two replies, both worth 2 with a 7 and 1 with a 4; the first draws 7 with 0.75,
    the second with 0.25. r = 1.75 and 1.25, m = 1.5, v = 0.1875 twice: s² = 2 · (0.0625 + 0.09375),
    s = 0.559. A = ±0.447; of the first A(7) = 0.671 and A(4) = -0.224, of the second 0.224 and
    -0.671.
    """
    p, rewards = digits.probs, digits.rewards
    assert p.shape == rewards.shape == (len(group), 9), f"{tuple(p.shape)}, {tuple(rewards.shape)}"
    empty = rewards.new_zeros(groups)
    count = empty.index_add(0, group, torch.ones_like(rewards[:, 0]))  # (Q,)
    reply = (p * rewards).sum(-1)  # (S,) r
    mean = empty.index_add(0, group, reply) / count.clamp(min=1)  # (Q,) m
    off_reply = rewards - reply[:, None]  # (S, 9) r(d) - r
    if entropy:
        surprise = -p.clamp(min=torch.finfo(p.dtype).tiny).log()  # (S, 9) nats
        surprise = surprise - (p * surprise).sum(-1, keepdim=True)
        off_reply = off_reply + entropy * surprise
    off_group = reply - mean[group]  # (S,) r - m
    apart = torch.maximum(off_group.abs(), off_reply.abs().where(p > SAME, 0).amax(-1))  # (S,)
    widest = empty.scatter_reduce(0, group, apart, "amax")  # (Q,)
    size = empty.scatter_reduce(0, group, rewards.abs().amax(-1), "amax")  # (Q,)
    differs = ((widest > SAME * size) & (count > 1))[group]  # (S,)
    off_group, off_reply = off_group.where(differs, 0), off_reply.where(differs[:, None], 0)
    share = (1 - 1 / count.clamp(min=1))[group]  # (S,) (G - 1) / G
    by_digit = off_group[:, None] + off_reply * share[:, None]  # (S, 9)
    if by_std:
        spread = off_group.square() + share * (p * off_reply.square()).sum(-1)  # (S,)
        variance = empty.index_add(0, group, spread) / (count - 1).clamp(min=1)  # (Q,) s²
        scale = (variance.sqrt() + STD_EPS)[group]  # (S,)
        off_group, by_digit = off_group / scale, by_digit / scale[:, None]
    return off_group.float(), by_digit.float()


@dataclass(frozen=True)
class Comparison:
    """The replies of a step against their groups."""

    advantages: Tensor  # (S,)
    by_digit: Tensor  # (S, 9) the same, had it drawn another digit
    weights: Tensor  # (S,) of each token of a reply
    informative: Tensor  # (Q,) bool: some reply did better than another
    digits: ScoreDigits


# The loss of a micro-batch


@dataclass(frozen=True)
class LossStatistics:
    """Of one micro-batch: sums over its tokens, on its device, without gradient."""

    tokens: int
    low: Tensor  # () tokens with A < 0 whose ratio is below the clip
    high: Tensor  # () with A > 0 above it; in cispo any whose weight was bounded, here and in low
    ratio: Tensor  # ()
    entropy: Tensor | None  # ()
    gap: Tensor | None  # (N,) log p of the trainer less that of the sampler, before any clipping


def token_weights(lengths: Tensor, longest: int, config: GrpoConfig) -> Tensor:
    """lengths (S,) of all replies, none above `longest` -> (S,): the weight of each token."""
    assert lengths.ndim == 1, f"expected lengths (S,), got {tuple(lengths.shape)}"
    S = len(lengths)
    if config.variant == "dr_grpo":
        return torch.full((S,), 1 / (max(S, 1) * longest), device=lengths.device)
    if config.variant in ("dapo", "cispo"):
        return (1 / lengths.sum().clamp(min=1).float()).expand(S)
    return 1 / (S * lengths.clamp(min=1).float())  # an empty reply counts among S


def policy_loss(
    log_probs: Tensor,
    owner: Tensor,
    advantages: Tensor,
    weights: Tensor,
    config: GrpoConfig,
    old: Tensor | None = None,
    sampler: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, LossStatistics]:
    """One micro-batch of whole replies -> its share of the step's loss (), and its statistics.

    log_probs (N,) with gradient, owner (N,) int64 index of each token's reply, advantages (S,),
    weights (S,) of `token_weights`; of the same tokens: old (N,) log-probabilities before the first
    update on these replies (None: this is the first), sampler (N,) and entropy (N,) to be measured.
    """
    N, S = len(log_probs), len(advantages)
    assert log_probs.ndim == 1, f"expected log_probs (N,), got {tuple(log_probs.shape)}"
    assert weights.shape == advantages.shape == (S,), f"expected {S}, got {tuple(weights.shape)}"
    for tensor in (owner, old, sampler, entropy):
        assert tensor is None or tensor.shape == (N,), f"expected ({N},), got {tensor.shape}"

    log_p = _at_least_fp32(log_probs)  # (N,)
    before = log_p.detach() if old is None else _at_least_fp32(old).detach()
    A = _at_least_fp32(advantages).detach()[owner]  # (N,)
    w = _at_least_fp32(weights).detach()[owner]  # (N,)
    log_ratio = log_p - before
    if config.variant == "gspo":
        log_ratio = _mean_of_reply(log_ratio, owner, S)
    ratio = log_ratio.clamp(-LIMIT, LIMIT).exp()  # (N,)
    low, high = 1 - CLIPS[config.variant][0], 1 + CLIPS[config.variant][1]
    clipped = ratio.clamp(low, high)
    if config.variant == "cispo":
        gain = clipped.detach() * A * log_p
    else:
        gain = torch.minimum(ratio * A, clipped * A)

    with torch.no_grad():
        below, above = ratio < low, ratio > high
        if config.variant != "cispo":
            below, above = below & (A < 0), above & (A > 0)
        total_entropy = None if entropy is None else _at_least_fp32(entropy).sum()
        gap = None if sampler is None else before - _at_least_fp32(sampler)
        measured = LossStatistics(N, below.sum(), above.sum(), ratio.sum(), total_entropy, gap)
    return (w * -gain).sum(), measured


def digits_in(owners: Tensor) -> tuple[Tensor, Tensor]:
    """owners (N,) int64, the reply of each token of a micro-batch, whole replies one after another
    -> the last token of each, which is its digit (n,), and the replies that they are of (n,)."""
    replies, lengths = torch.unique_consecutive(owners.cpu(), return_counts=True)
    return (lengths.cumsum(0) - 1).to(owners.device), replies


def digit_loss(
    log_probs: Tensor, replies: Tensor, comparison: Comparison, config: GrpoConfig
) -> Tensor:
    """log_probs (n, 9) with gradient, of the digits of replies (n,) -> their share of the loss ().

    Each of the nine is a token of its own, with the weight w · p(d).
    """
    device = log_probs.device
    p = comparison.digits.probs[replies].to(device, log_probs.dtype)  # (n, 9)
    weights = comparison.weights.to(device)[replies.to(device), None] * p  # (n, 9)
    owner = torch.arange(weights.numel(), device=device)
    A = comparison.by_digit[replies].to(device)  # (n, 9)
    return policy_loss(log_probs.flatten(), owner, A.flatten(), weights.flatten(), config)[0]


def statistics(measured: Sequence[LossStatistics]) -> dict[str, float]:
    """Means over the tokens of all micro-batches of a step. This waits for the GPU, once.
    gap_outside: the share of tokens whose exp(gap) is outside 0.9 to 1.1."""
    batches = [batch for batch in measured if batch.tokens > 0]
    if not batches:
        return {}
    N = sum(batch.tokens for batch in batches)
    means = {
        "clip_low": torch.stack([batch.low for batch in batches]).sum() / N,
        "clip_high": torch.stack([batch.high for batch in batches]).sum() / N,
        "ratio": torch.stack([batch.ratio for batch in batches]).sum() / N,
    }
    entropies = [batch.entropy for batch in batches if batch.entropy is not None]
    gaps = [batch.gap for batch in batches if batch.gap is not None]
    if entropies:
        means["entropy"] = torch.stack(entropies).sum() / N
    if gaps:
        gap = torch.cat(gaps)
        means["gap_mean"] = gap.abs().mean()
        means["gap_p99"] = gap.abs().kthvalue(math.ceil(0.99 * N)).values
        means["gap_max"] = gap.abs().max()
        means["gap_outside"] = ((gap < GAP_BOUNDS[0]) | (gap > GAP_BOUNDS[1])).double().mean()
    numbers = torch.stack([value.double() for value in means.values()]).tolist()
    return dict(zip(means, numbers, strict=True))


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mean_of_reply(x: Tensor, owner: Tensor, S: int) -> Tensor:
    """x (N,) -> (N,): at each token the mean over its reply's tokens."""
    sums = x.new_zeros(S).index_add(0, owner, x)  # (S,)
    count = x.new_zeros(S).index_add(0, owner, torch.ones_like(x))  # (S,)
    return (sums / count.clamp(min=1))[owner]
