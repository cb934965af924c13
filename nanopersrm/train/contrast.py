"""Contrast on the score line: which candidate is the writer's, learned from the digits.

Imitation teaches to write a digit; that the right digit follows from the exemplars it hardly
teaches, because one token in a hundred is the digit. Contrast asks for nothing else. Several
candidates are scored for one writer, each in its own prompt up to "<scores>A=", and

    s[k] = log Σ_{d = 6..9} p(d)  -  log Σ_{d = 1..4} p(d)      log-odds of upper against lower

must be greatest for the writer's own text c:

    list-wise        L = -log ( exp s[c] / Σ_k exp s[k] )                   Cao et al., ICML 2007
    Bradley-Terry    L = mean over rivals k of -log σ(s[c] - s[k])

Log-odds rather than the expected digit, whose slope goes to zero when the model is sure: all scores
soon stand at one digit and nothing moves. 5 takes no side. p needs no softmax over the vocabulary:
its normaliser cancels in s.

Worked example: digit logits (0, 0, 0, 0, 0, 0, 0, 0, 0) give s = log 4 - log 4 = 0; raising 9 to
log 5 gives s = log 8 - log 4 = 0.693. Two candidates with s = 0.693 and 0: list-wise -log(2 / 3) =
0.405, and Bradley-Terry the same, as it must be for two.

Which text of the two *would* be preferred is all that these losses fix; how high the digits stand,
imitation does.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LOWER, UPPER = slice(0, 4), slice(5, 9)  # of the nine digits: 1 to 4, and 6 to 9


def log_odds(digit_logits: Tensor) -> Tensor:
    """digit_logits (n, 9) of the digits 1 to 9 -> (n,) log-odds of upper against lower digits."""
    assert digit_logits.ndim == 2, f"expected (n, 9), got {tuple(digit_logits.shape)}"
    assert digit_logits.shape[1] == 9, f"expected (n, 9), got {tuple(digit_logits.shape)}"
    z = digit_logits.float() if digit_logits.dtype.itemsize < 4 else digit_logits
    return z[:, UPPER].logsumexp(-1) - z[:, LOWER].logsumexp(-1)


def contrast(
    s: Tensor,
    lists: Sequence[tuple[int, int, int]],
    weights: Tensor,
    pair_weight: float,
    list_weight: float,
) -> tuple[Tensor, Tensor]:
    """s (n,); lists of (first, count, chosen) into it, weights (lists,) -> the weighted sum of the
    lists' losses (), and whether each chosen one is above every rival (lists,) bool.

    A sum, not a mean, so that micro-batches add up to the whole step.
    """
    assert len(weights) == len(lists), f"{len(weights)} weights for {len(lists)} lists"
    total, right = s.new_zeros(()), []
    for (first, count, chosen), weight in zip(lists, weights, strict=True):
        assert 0 <= chosen < count, f"candidate {chosen} of {count}"
        own = s[first : first + count]
        rivals = torch.cat([own[:chosen], own[chosen + 1 :]])
        loss = list_weight * (own.logsumexp(0) - own[chosen])
        if count > 1:
            loss = loss - pair_weight * F.logsigmoid(own[chosen] - rivals).mean()
        total = total + weight * loss
        right.append((own[chosen] > rivals).all())
    return total, torch.stack(right) if right else s.new_zeros(0, dtype=torch.bool)
