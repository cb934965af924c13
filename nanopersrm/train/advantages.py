"""How much better than its group each reply did: the advantages that GRPO learns from.

Several replies to one prompt form a group. No critic says how good a reply ought to have been; the
other replies do:

    group      A[i] = (r[i] - mean) / (std + 1e-4)     GRPO, arXiv 2402.03300
               A[i] =  r[i] - mean                     Dr.GRPO, 2503.20783: dividing favours
                                                       prompts that are nearly solved or
                                                       hopeless, as their deviation is small
    decoupled  A[i] = Σ_c w[c] z[c, i] / (std of these over the step + 1e-4)      GDPO, 2601.05242
               z[c, i] = (r[c, i] - mean[c]) / (std[c] + 1e-4)                    of each part c

r = Σ_c w[c] r[c] is the weighted sum of the parts of a reward; mean and std are those of the group.
Sums collapse: under two parts of 0 or 1, a reply with both against one with none gets the same
advantage as one with a single part against none. GDPO first compares part by part.

Worked example: two replies a group, two parts of weight 1. (0, 0) against (1, 0) sum to 0 and 1:
mean 0.5, std 0.7071, A = -0.707 and 0.707. (0, 0) against (1, 1) sum to 0 and 2: again -0.707 and
0.707. Decoupled they are ∓0.707 and ∓1.414 before the last division: the second pair is further
apart.

What we chose
* std with Bessel's correction (÷ (n - 1)) and 1e-4 below the line, both as TRL has them, so that
  numbers can be compared. The papers leave it open; in a group of 8 it is 6 % less advantage.
* Equal rewards give exactly zero. The mean of seven 0.1 is not 0.1 in floating point, and the dust,
  divided by 1e-4, would be learned from. Values apart by less than a millionth count as equal.
* A group of one reply has nobody to compare itself with: zero.
* GDPO's paper also subtracts the mean over the step: zero, since every group sums to zero.
* All this runs on the CPU in at least fp32: rewards are read from text, and few. So the order of
  the sums, and with it every bit, is the same in each run.

Groups may differ in size, and a step must be given whole: micro-batches come later, in `grpo.py`.
Sizes: S replies, Q groups (questions), C parts of the reward.
"""

import torch
from torch import Tensor

EPS = 1e-4  # under the line beside each deviation, as in TRL
SAME = 1e-6  # values whose distance is a smaller share of their size are equal


def group_advantages(rewards: Tensor, group: Tensor, groups: int, by_std: bool) -> Tensor:
    """rewards (S,), group (S,) int64 below `groups` -> (S,): how far above the group's mean."""
    assert rewards.ndim == 1, f"expected rewards (S,), got {tuple(rewards.shape)}"
    return _standing(rewards[:, None], group, groups, by_std)[:, 0]


def decoupled_advantages(parts: Tensor, weights: Tensor, group: Tensor, groups: int) -> Tensor:
    """parts (S, C), weights (C,), group (S,) int64 -> (S,): each part on its own, then summed."""
    z = _standing(parts, group, groups, by_std=True)  # (S, C)
    total = (z * weights).sum(-1)  # (S,)
    std = (total.square().sum() / max(1, len(total) - 1)).sqrt()  # their mean is zero
    return total / (std + EPS)


def informative(advantages: Tensor, group: Tensor, groups: int) -> Tensor:
    """advantages (S,), group (S,) -> (Q,) bool: some reply of the group did better than another.

    A group without variance has no gradient (with beta 0): leave it out of the training pass, which
    changes nothing while the weights of the tokens count it, or sample another instead, as DAPO's
    dynamic sampling does.
    """
    largest = advantages.new_zeros(groups).scatter_reduce(0, group, advantages.abs(), "amax")
    return largest > 0


def _standing(values: Tensor, group: Tensor, groups: int, by_std: bool) -> Tensor:
    """values (S, C) -> (S, C): less the mean of the group, by its deviation if asked."""
    S, C = values.shape
    assert values.device.type == "cpu", f"expected rewards on the CPU, got {values.device}"
    assert torch.isfinite(values).all(), "expected finite rewards, got nan or inf"
    assert group.dtype == torch.int64, f"expected groups in int64, got {group.dtype}"
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
    return off / (std + EPS)[group]
