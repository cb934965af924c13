"""What a packed batch is worth: the sums that a training step minimises, and that validation reads.

    imitation   Σ over reply tokens of  - weight * log p(token)            divided by Σ weight
    contrast    Σ over lists of  list-wise + Bradley-Terry                 divided by the lists

Both come from one forward over one tree: the exemplars once, under them each candidate, under the
candidate its reply (imitation) and, beside it, a score line without reasoning (contrast). Sums, not
means: the divisors are those of the whole step, known before its first micro-batch, so that many
small micro-batches add up to exactly the gradient of one large one.

Imitation teaches to write a digit; that the right digit follows from the exemplars it hardly
teaches, because one token in a hundred is the digit. Contrast asks for nothing else. Several
candidates are scored for one writer, each in its own prompt up to "<scores>A=", and

    s[k] = log Σ_{d = 6..9} p(d)  -  log Σ_{d = 1..4} p(d)      log-odds of upper against lower

must be greatest for the writer's own text c:

    list-wise        L = -log ( exp s[c] / Σ_k exp s[k] )                   Cao et al., ICML 2007
    Bradley-Terry    L = mean over rivals k of -log σ(s[c] - s[k])

Log-odds rather than the expected digit, whose slope goes to zero when the model is sure. 5 takes no
side. p needs no softmax over the vocabulary: its normaliser cancels in s. Worked example: nine
digit logits of 0 give s = log 4 - log 4 = 0; raising 9 to log 5 gives s = log 8 - log 4 = 0.693.
Two candidates with s = 0.693 and 0: list-wise -log(2 / 3) = 0.405, and Bradley-Terry the same.
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


@dataclass(frozen=True)
class SftWeights:
    """What counts how much, beside 1 for imitation."""

    pair: float = 0.5  # of Bradley-Terry against each rival
    list: float = 0.5  # of the list-wise loss

    def __post_init__(self) -> None:
        if not (0 <= self.pair < math.inf and 0 <= self.list < math.inf):
            raise InputError(f"expected numbers from 0, got pair {self.pair}, list {self.list}")


@dataclass(frozen=True)
class LossSums:
    """Of one micro-batch."""

    imitation: Tensor  # () fp32
    contrast: Tensor  # () fp32
    right: Tensor  # (lists,) bool: the writer's own candidate stands above every rival
    scores: Tensor  # (n,) the soft score of each digit, 1 to 9, without gradient


def loss_sums(
    model: Model,
    batch: Batch,
    digit_ids: Sequence[int],
    weights: SftWeights,
    preset: Preset,
) -> LossSums:
    """One forward over a packed batch; with gradients where adapters learn."""
    hidden = model(batch.ids, batch.layout, recompute=preset.recompute)  # (N, D)
    imitation = hidden.new_zeros((), dtype=torch.float32)
    if len(batch.rows):
        log_probs, _ = logprob(
            hidden[batch.rows], model.head(), batch.targets, chunk_bytes=preset.chunk_mb << 20
        )
        imitation = -(batch.weights * log_probs).sum()
    z = model.logits_of(hidden[batch.digit_rows], torch.tensor(digit_ids, device=hidden.device))
    contrasted, right = contrast(log_odds(z), batch.lists, weights.pair, weights.list)
    scores = z.detach().softmax(-1) @ torch.arange(1.0, 10.0, device=z.device)  # (n,)
    return LossSums(imitation, contrasted, right, scores)


def reply_log_probs(
    model: Model,
    batch: Batch,
    preset: Preset,
    temperature: float,
    digit_ids: Sequence[int],
    places: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of drawn replies, at the temperature of drawing: the log-probability of each token (M,), the
    entropy there (M,), and, where tokens `places` (n,) are digits, the log-probabilities of the
    nine among themselves (n, 9), all fp32."""
    hidden = model(batch.ids, batch.layout, recompute=preset.recompute)  # (N, D)
    predicting = hidden[batch.rows]  # (M, D)
    digits = model.logits_of(predicting[places], torch.tensor(digit_ids, device=hidden.device))
    chunk = preset.chunk_mb << 20
    log_p, entropy = logprob(
        predicting, model.head(), batch.targets, temperature, chunk_bytes=chunk
    )
    return log_p, entropy, (digits / temperature).log_softmax(-1)


def log_odds(digit_logits: Tensor) -> Tensor:
    """digit_logits (n, 9) of the digits 1 to 9 -> (n,) log-odds of upper against lower digits."""
    assert digit_logits.shape[1:] == (9,), f"expected (n, 9), got {tuple(digit_logits.shape)}"
    z = digit_logits.float() if digit_logits.dtype.itemsize < 4 else digit_logits
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
