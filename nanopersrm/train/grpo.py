"""GRPO and its relatives: the loss of sampled replies, from log-probabilities alone.

For each prompt the policy samples a group of replies, each gets a reward, and `advantages.py` says
how much better than its group it did: A. Then every token of a good reply is made more likely, and
of a bad one less. This file turns log-probabilities into that loss; it never sees a model.

A step may train more than once on the same replies. The policy has then moved since it sampled
them, and the ratio ρ = p / p_old = exp(log p - log p_old) says by how much, token by token. Trust
ends at a clip: beyond it a token that already moved the right way is left alone. The variants
differ in four places (clip(ρ) keeps ρ between 1 - low and 1 + high):

               advantage A          gain of a token                low, high      its weight w
    grpo       (r - mean) / std     min(ρ A, clip(ρ) A)            0.2, 0.2       1 / (S · length)
    dr_grpo    r - mean             as grpo                        0.2, 0.2       1 / (S · longest)
    dapo       as grpo              as grpo                        0.2, 0.28      1 / all tokens
    gspo       as grpo              as grpo, one ρ for the reply   3e-4, 4e-4     as grpo
    cispo      as grpo              stop(clip(ρ)) A log p          1, 4           1 / all tokens
    gdpo       part by part         as grpo                        0.2, 0.2       as grpo

    loss = Σ over tokens of  w · (- stop(c) · gain + beta · KL)

The step has S replies, this one `length` tokens, none more than `longest`; stop(·) is a constant to
the gradient; c = 1 unless `importance_cap` is set (below).

* grpo (DeepSeekMath, arXiv 2402.03300; 0.2 is PPO's). Each reply counts the same, so a token of a
  long reply counts little: a long wrong reply is punished less per token than a short one.
* dr_grpo (2503.20783) removes both divisions that bias: by the length and by the deviation.
* dapo (2503.14476): each token counts the same; the upper clip is higher, for rare tokens to grow;
  groups without variance are replaced (`advantages.informative`). The paper takes the mean over
  each group's tokens; here as in TRL over all of the step.
* gspo (2507.18071): a reply was rewarded as a whole, so ρ = exp(mean over its tokens of
  log p - log p_old), and the whole reply is clipped or not. Means hardly move: a small clip.
* cispo (2506.13585): min(·) silences clipped tokens, often those where the reasoning turns. Here
  the ratio is a bounded weight and every token keeps its gradient. The paper sets no lower bound
  and tunes the upper; 1 + 4 is the bound of 5 that TRL takes from ScaleRL (2510.13786).
* gdpo (2601.05242) changes the advantages only; the loss is grpo's.

Worked example: rewards 1 and 0, lengths 1 and 3, longest 4. mean 0.5, std 0.7071, A = ±0.707
(dr_grpo ±0.5). In the first pass ρ = 1, and a token's gradient is -w · A:

    grpo, gspo, gdpo   w = 1/2 and 1/6     -0.354    +0.118, three times
    dr_grpo            w = 1/8             -0.0625   +0.0625, three times
    dapo, cispo        w = 1/4             -0.177    +0.177, three times

In a second pass the first token has risen to ρ = 1.5. grpo, dr_grpo and gdpo: min(1.5, 1.2) · A,
gradient 0. dapo clips at 1.28, gspo at 1.0004: 0. cispo: the weight 1.5 is below 5, the gradient
1.5 · -0.177 = -0.265.

First pass. Without `old` the ratio is exp(log p - stop(log p)): exactly 1 and yet with a gradient.
Log-probabilities computed a second time, or those of the sampler, differ by rounding, and some
tokens would be clipped though nothing was learned yet.

KL to the reference, the adapter as it came. With d = log p_ref - log p:

    k1 = -d            k2 = d² / 2            k3 = exp(d) - 1 - d          (J. Schulman, 2020)

k1 and k3 are unbiased as values; k2 and k3 are never negative; grpo's paper takes k3. In a loss the
gradient is what counts. That of k1 is noise of mean zero, so `kl="k1"` has k1's value and the
gradient of k2, d · ∂d, which is unbiased in the first pass. With beta 0, the default, no reference
is needed.

Sampler and trainer compute the same log p with other kernels, so gap = log p_old - log p_sampler is
not zero. Watch it (`statistics`); with `importance_cap` each gain is weighted by
c = min(exp(gap), cap): truncated importance weights, token by token (Yao et al., 2025).

Micro-batches add up exactly: the loss is a sum, and w comes from `token_weights` of the whole step.
Tokens are flat, with `owner` saying which reply each belongs to; there is no padding to mask. All
is computed in at least fp32, and an exponent with a gradient is held within ±20 before exp, since
inf · 0 is nan even where a minimum discards the inf. Nothing waits for the GPU but `statistics`.

Left out: an entropy bonus, PPO's second clip for A < 0, sequence-level importance weights, DAPO's
length penalty (a part of a reward). To filter overlong replies as DAPO does, set their weight to 0.

The loss itself tells little: in grpo's first pass it is minus a mean of advantages, about 0. Read
rewards. Sizes: N tokens, S replies, C parts of the reward.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.train.advantages import decoupled_advantages, group_advantages

Variant = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "gdpo"]
CLIPS: dict[Variant, tuple[float, float]] = {  # low and high, from the papers
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 4.0),
    "gdpo": (0.2, 0.2),
}
LIMIT = 20.0  # nats: no exponent is larger; exp(20) = 5e8
NEAR = (math.log(0.9), math.log(1.1))  # a gap outside is worth counting


@dataclass(frozen=True)
class GrpoConfig:
    variant: Variant = "grpo"  # which row of the table in grpo.py
    clip_low: float | None = None  # trust the ratio down to 1 - this (default: the variant's)
    clip_high: float | None = None  # and up to 1 + this (default: the variant's)
    scale: Literal["std", "none"] | None = None  # of advantages (default: std, dr_grpo none)
    beta: float = 0.0  # weight of the KL to the reference (0: no reference)
    kl: Literal["k1", "k2", "k3"] | None = None  # its estimator (default: k3)
    importance_cap: float | None = None  # truncate weights between sampler and trainer here

    def __post_init__(self) -> None:
        for name, known in (
            ("variant", get_args(Variant)),
            ("scale", (None, "std", "none")),
            ("kl", (None, "k1", "k2", "k3")),
        ):
            if getattr(self, name) not in known:
                names = ", ".join(str(one) for one in known if one)
                raise InputError(f"{name}: expected one of {names}, got {getattr(self, name)!r}")
        if self.clip_low is not None and not 0 < self.clip_low <= 1:
            raise InputError(f"clip_low: expected above 0, at most 1, got {self.clip_low}")
        if self.clip_high is not None and not 0 < self.clip_high < math.inf:
            raise InputError(f"clip_high: expected a number above 0, got {self.clip_high}")
        if not 0 <= self.beta < math.inf:
            raise InputError(f"beta: expected a number from 0, got {self.beta}")
        if self.importance_cap is not None and not 1 <= self.importance_cap < math.inf:
            raise InputError(f"importance_cap: expected from 1, got {self.importance_cap}")
        if self.kl is not None and self.beta == 0:
            raise InputError(f"kl: {self.kl} has no effect with beta 0")
        if self.variant == "gdpo" and self.scale == "none":
            raise InputError("scale: gdpo compares parts by their deviation, got none")
        if self.variant == "dr_grpo" and self.scale == "std":
            raise InputError("scale: dr_grpo has no deviation, got std; dapo is close to it")

    @property
    def clips(self) -> tuple[float, float]:
        """Least and greatest ratio that is trusted."""
        low, high = CLIPS[self.variant]
        low = low if self.clip_low is None else self.clip_low
        high = high if self.clip_high is None else self.clip_high
        return 1 - low, 1 + high

    @property
    def by_std(self) -> bool:
        return self.variant != "dr_grpo" if self.scale is None else self.scale == "std"


@dataclass(frozen=True)
class Measured:
    """What one micro-batch saw: sums over its tokens, on its device, without gradient."""

    tokens: int
    low: Tensor  # () tokens with A < 0 whose ratio is below the clip
    high: Tensor  # () with A > 0 above it; in cispo any whose weight was bounded, here and in low
    ratio: Tensor  # ()
    kl: Tensor | None  # (3,) k1, k2, k3
    entropy: Tensor | None  # ()
    gap: Tensor | None  # (N,) log p of the trainer less that of the sampler, before any clipping


def advantages(
    parts: Tensor, weights: Tensor, group: Tensor, groups: int, config: GrpoConfig
) -> Tensor:
    """parts (S, C) of the rewards, weights (C,), group (S,) int64 -> (S,), for the whole step."""
    assert parts.ndim == 2, f"expected parts (S, C), got {tuple(parts.shape)}"
    assert weights.shape == parts.shape[1:], f"{tuple(weights.shape)} weights for {parts.shape[1]}"
    if config.variant == "gdpo":
        return decoupled_advantages(parts, weights, group, groups)
    total = (parts.to(torch.promote_types(parts.dtype, torch.float32)) * weights).sum(-1)  # (S,)
    return group_advantages(total, group, groups, config.by_std)


def token_weights(lengths: Tensor, longest: int, config: GrpoConfig) -> Tensor:
    """lengths (S,) of all replies of the step -> (S,): the weight of each token of a reply.

    This is the step's normaliser. Groups that are left out of the pass since they have no variance
    belong in `lengths`; groups that were replaced do not.
    """
    assert lengths.ndim == 1, f"expected lengths (S,), got {tuple(lengths.shape)}"
    assert longest > 0, f"expected the most tokens of a reply, got {longest}"
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
    reference: Tensor | None = None,
    sampler: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, Measured]:
    """One micro-batch of whole replies -> its share of the step's loss (), and what it saw.

    log_probs (N,) with gradient, owner (N,) int64 index of each token's reply, advantages (S,),
    weights (S,) of `token_weights`; of the same tokens: old (N,) before the first update of this
    step (None: there was none), reference (N,), sampler (N,), entropy (N,). An option whose tensor
    is missing is an error; reference, sampler and entropy may be given only to be measured.
    """
    N, S = len(log_probs), len(advantages)
    assert log_probs.ndim == 1, f"expected log_probs (N,), got {tuple(log_probs.shape)}"
    assert advantages.ndim == 1, f"expected advantages (S,), got {tuple(advantages.shape)}"
    assert owner.dtype == torch.int64, f"expected owners in int64, got {owner.dtype}"
    assert weights.shape == (S,), f"expected {S} weights, got {tuple(weights.shape)}"
    given = {"owner": owner, "old": old, "reference": reference, "sampler": sampler}
    for name, tensor in (given | {"entropy": entropy}).items():
        shape = (N,) if tensor is None else tuple(tensor.shape)
        assert shape == (N,), f"expected {name} ({N},), got {shape}"
    assert config.beta == 0 or reference is not None, f"beta {config.beta} without a reference"
    assert config.importance_cap is None or sampler is not None, "importance_cap without sampler"

    log_p = _full(log_probs)  # (N,)
    before = log_p.detach() if old is None else _full(old).detach()
    A, w = _full(advantages).detach()[owner], _full(weights).detach()[owner]  # (N,) each
    moved = log_p - before
    if config.variant == "gspo":
        moved = _mean_of_reply(moved, owner, S)
    ratio = moved.clamp(-LIMIT, LIMIT).exp()  # (N,)
    low, high = config.clips
    clipped = ratio.clamp(low, high)
    if config.variant == "cispo":
        gain = clipped.detach() * A * log_p
    else:
        gain = torch.minimum(ratio * A, clipped * A)

    gap = None if sampler is None else before - _full(sampler).detach()
    if config.importance_cap is not None and gap is not None:
        gain = gain * gap.exp().clamp(max=config.importance_cap)
    loss = -gain
    if config.beta > 0 and reference is not None:
        loss = loss + config.beta * kl_estimate(log_p, reference, config.kl or "k3")

    with torch.no_grad():
        below, above = ratio < low, ratio > high
        if config.variant != "cispo":
            below, above = below & (A < 0), above & (A > 0)
        kl = None
        if reference is not None:
            kl = torch.stack([kl_estimate(log_p, reference, k).sum() for k in ("k1", "k2", "k3")])
        spread = None if entropy is None else _full(entropy).sum()
        measured = Measured(N, below.sum(), above.sum(), ratio.sum(), kl, spread, gap)
    return (w * loss).sum(), measured


def kl_estimate(log_probs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """log_probs (N,) with gradient, reference (N,) -> (N,); kind is k1, k2 or k3."""
    d = (_full(reference).detach() - _full(log_probs)).clamp(-LIMIT, LIMIT)
    if kind == "k3":
        return d.exp() - 1 - d
    k2 = d.square() / 2
    return k2 if kind == "k2" else k2 + (-d - k2).detach()


def statistics(measured: Sequence[Measured]) -> dict[str, float]:
    """Means over the tokens of all micro-batches of a step. This waits for the GPU, once.

    clip_low, clip_high, ratio; kl_k1, kl_k2, kl_k3 and entropy where they were given; of the gap
    between sampler and trainer the size in nats, gap_mean, gap_p99 and gap_max, and gap_outside:
    the share of tokens whose exp(gap) is outside [0.9, 1.1] (a gap outside [-0.105, 0.095]).
    """
    seen = [one for one in measured if one.tokens > 0]
    if not seen:
        return {}
    N = sum(one.tokens for one in seen)
    found = {
        "clip_low": torch.stack([one.low for one in seen]).sum() / N,
        "clip_high": torch.stack([one.high for one in seen]).sum() / N,
        "ratio": torch.stack([one.ratio for one in seen]).sum() / N,
    }
    kls = [one.kl for one in seen if one.kl is not None]
    entropies = [one.entropy for one in seen if one.entropy is not None]
    gaps = [one.gap for one in seen if one.gap is not None]
    for some in (kls, entropies, gaps):
        assert len(some) in (0, len(seen)), f"measured in {len(some)} of {len(seen)} micro-batches"
    if kls:
        found |= zip(("kl_k1", "kl_k2", "kl_k3"), torch.stack(kls).sum(0) / N, strict=True)
    if entropies:
        found["entropy"] = torch.stack(entropies).sum() / N
    if gaps:
        gap = torch.cat(gaps)
        size = gap.abs()
        found["gap_mean"] = size.mean()
        found["gap_p99"] = size.kthvalue(math.ceil(0.99 * N)).values
        found["gap_max"] = size.max()
        found["gap_outside"] = ((gap < NEAR[0]) | (gap > NEAR[1])).double().mean()
    values = torch.stack([value.double() for value in found.values()]).tolist()
    return dict(zip(found, values, strict=True))


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mean_of_reply(x: Tensor, owner: Tensor, S: int) -> Tensor:
    """x (N,) -> (N,): at each token the mean over its reply's tokens."""
    sums = x.new_zeros(S).index_add(0, owner, x)  # (S,)
    count = x.new_zeros(S).index_add(0, owner, torch.ones_like(x))  # (S,)
    return (sums / count.clamp(min=1))[owner]
