"""What a packed batch is worth: the sums that SFT minimises, and the log-probabilities of GRPO.

Most tokens of a reply are filled in. Those that are drawn are choices out of a few ids, so their
log-probabilities need the logits of these ids only, never a softmax over the vocabulary:

    log p(i) = z_i - log Σ over allowed j of exp z_j                   z_i = h · w_i

    imitation   Σ over targets of  - weight * Σ_i q(i) log p(i)        divided by Σ weight
    contrast    Σ over lists of  list-wise + Bradley-Terry             divided by the lists

q is what should be drawn: a teacher's chances for the next line, and for the digit its chances by
the sum before it, true or made up (`sft_data.py`). Sums, not means: the divisors are those of the
whole step, known before its first micro-batch, so that many small micro-batches add up to exactly
the gradient of one large one. In free prose a token is drawn from the whole vocabulary, and q is 1
for it.

In contrast several candidates are scored for one writer, each after its own lines, and

    s[k] = log Σ_{d = 6..9} p(d)  -  log Σ_{d = 1..4} p(d)      log-odds of upper against lower

must be greatest for the writer's own text c:

    list-wise        L = -log ( exp s[c] / Σ_k exp s[k] )                   Cao et al., ICML 2007
    Bradley-Terry    L = mean over rivals k of -log σ(s[c] - s[k])

Log-odds rather than the expected digit, whose slope goes to zero when the model is sure. 5 takes no
side. Worked example: nine digit logits of 0 give s = log 4 - log 4 = 0; raising 9 to log 5 gives
s = log 8 - log 4 = 0.693. Two candidates with s = 0.693 and 0: list-wise -log(2 / 3) = 0.405, and
Bradley-Terry the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.logprob import logprob
from nanopersrm import InputError
from nanopersrm.model.transformer import Model
from nanopersrm.train.packing import Batch
from nanopersrm.train.presets import Preset

LOWER, UPPER = slice(0, 4), slice(5, 9)  # of the nine digits: 1 to 4, and 6 to 9
NINE = 9  # the last choices of a batch are the digits


@dataclass(frozen=True)
class SftWeights:
    """What counts how much, beside 1 for imitation."""

    pair: float = 0.01  # of Bradley-Terry against each rival
    list: float = 0.01  # of the list-wise loss

    def __post_init__(self) -> None:
        if not (0 <= self.pair < math.inf and 0 <= self.list < math.inf):
            raise InputError(f"expected numbers from 0, got pair {self.pair}, list {self.list}")


@dataclass(frozen=True)
class LossSums:
    """Of one micro-batch."""

    imitation: Tensor  # () fp32
    contrast: Tensor  # () fp32
    right: Tensor  # (lists,) bool: the writer's own candidate stands above every rival


def loss_sums(model: Model, batch: Batch, weights: SftWeights, preset: Preset) -> LossSums:
    """One forward over a packed batch; with gradients where adapters learn."""
    hidden = model(batch.ids, batch.layout, recompute=preset.recompute)  # (N, D)
    imitation = hidden.new_zeros((), dtype=torch.float32)
    log_p = imitation.new_zeros(len(batch.rows), NINE)
    if len(batch.choices):
        log_p = choice_log_probs(model, hidden, batch)  # (M, C)
        imitation = imitation - (batch.weights[:, None] * batch.probs * log_p).sum()
    free = ~batch.allowed.any(-1)  # (M,)
    if bool(free.any()):
        words, _ = logprob(
            hidden[batch.rows[free]],
            model.head(),
            batch.drawn[free],
            chunk_bytes=preset.chunk_mb << 20,
        )
        imitation = imitation - (batch.weights[free] * words).sum()
    digits = log_p[batch.digits][:, -NINE:]  # (n, 9)
    contrasted, right = contrast(log_odds(digits), batch.lists, weights.pair, weights.list)
    return LossSums(imitation, contrasted, right)


def choice_log_probs(
    model: Model, hidden: Tensor, batch: Batch, temperature: float = 1.0
) -> Tensor:
    """hidden (N, D) -> log p (M, C) fp32 of each choice among those allowed; 0 for the others."""
    z = model.logits_of(hidden[batch.rows], batch.choices) / temperature  # (M, C)
    allowed = batch.allowed | ~batch.allowed.any(-1, keepdim=True)  # free rows: no nan
    log_p = z.masked_fill(~allowed, -math.inf).log_softmax(-1)
    return log_p.masked_fill(~batch.allowed, 0.0)


def drawn_log_probs(
    model: Model, batch: Batch, preset: Preset, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of drawn replies, at the temperature of drawing: the log-probability of each target (M,), the
    entropy there (M,), and the log-probabilities of the choices (M, C), all fp32."""
    hidden = model(batch.ids, batch.layout, recompute=preset.recompute)  # (N, D)
    log_p = choice_log_probs(model, hidden, batch, temperature)  # (M, C)
    drawn = (log_p * (batch.choices == batch.drawn[:, None])).sum(-1)  # (M,)
    entropy = -(log_p.exp().where(batch.allowed, 0) * log_p).sum(-1).detach()  # (M,)
    free = ~batch.allowed.any(-1)
    if bool(free.any()):
        words, spread = logprob(
            hidden[batch.rows[free]],
            model.head(),
            batch.drawn[free],
            temperature,
            chunk_bytes=preset.chunk_mb << 20,
        )
        place = free.nonzero().squeeze(-1)
        drawn = drawn.index_add(0, place, words)
        entropy = entropy.index_add(0, place, spread.detach())
    return drawn, entropy, log_p


def log_odds(digits: Tensor) -> Tensor:
    """digits (n, 9), logits or log-probabilities of 1 to 9 -> (n,) log-odds of upper and lower."""
    assert digits.shape[1:] == (9,), f"expected (n, 9), got {tuple(digits.shape)}"
    z = digits.float() if digits.dtype.itemsize < 4 else digits
    return z[:, UPPER].logsumexp(-1) - z[:, LOWER].logsumexp(-1)


def contrast(
    s: Tensor, lists: Sequence[tuple[int, int, int]], pair_weight: float, list_weight: float
) -> tuple[Tensor, Tensor]:
    """s (n,); lists of (first, count, chosen) into it -> the sum of the lists' losses (), and
    whether each chosen one is above every rival (lists,) bool."""
    total, right = s.new_zeros(()), []
    for first, count, chosen in lists:
        listed = s[first : first + count]
        rivals = torch.cat([listed[:chosen], listed[chosen + 1 :]])
        loss = list_weight * (listed.logsumexp(0) - listed[chosen])
        if count > 1:
            loss = loss - pair_weight * F.logsigmoid(listed[chosen] - rivals).mean()
        total = total + loss
        right.append((listed[chosen] > rivals).all())
    return total, torch.stack(right) if right else s.new_zeros(0, dtype=torch.bool)
