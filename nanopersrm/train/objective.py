"""What a packed batch is worth: the sums that a training step minimises, and that validation reads.

    imitation   Σ over reply tokens of  - weight · log p(token)            divided by Σ weight
    contrast    Σ over lists of  list-wise + Bradley-Terry (`contrast.py`)  divided by the lists

Both come from one forward over one tree: the exemplars once, under them each candidate, under the
candidate its reply (imitation) and, beside it, a score line without reasoning (contrast). Sums, not
means: the divisors are those of the whole step, known before its first micro-batch, so that many
small micro-batches add up to exactly the gradient of one large one, however tokens are spread
over them.

Worked example: two micro-batches with 1 and 3 reply tokens of weight 1 and losses 4 and 3 · 2. The
mean of the means would be (4 + 2) / 2 = 3; the step's loss is (4 + 6) / 4 = 2.5, as in one batch.

`reply_log_probs` is the same forward for reinforcement, whose sums are those of `grpo.py`. Where to
read next: `train_sft.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from kernels.logprob import logprob
from nanopersrm import InputError
from nanopersrm.model.transformer import Model
from nanopersrm.train.contrast import contrast, log_odds
from nanopersrm.train.packing import Batch
from nanopersrm.train.presets import Preset


@dataclass(frozen=True)
class ObjectiveConfig:
    """What counts how much."""

    imitation: float = 1.0  # weight of the mean loss of a reply token
    pair: float = 0.5  # weight of Bradley-Terry against each rival
    list: float = 0.5  # weight of the list-wise loss

    def __post_init__(self) -> None:
        if not (all(0 <= w < math.inf for w in astuple(self)) and any(astuple(self))):
            raise InputError(
                "expected numbers from 0 for imitation, pair and list, and one above it, "
                f"got {self.imitation}, {self.pair} and {self.list}"
            )

    @property
    def contrast(self) -> bool:
        """Whether lists of candidates are learned from."""
        return self.pair + self.list > 0


@dataclass(frozen=True)
class Sums:
    """Of one micro-batch."""

    imitation: Tensor  # () fp32, weighted
    contrast: Tensor  # () fp32, weighted
    right: Tensor  # (lists,) bool: the writer's own candidate stands above every rival
    scores: Tensor  # (n,) the soft score of each digit, 1 to 9, without gradient


def sums(
    model: Model,
    batch: Batch,
    digit_ids: Sequence[int],
    config: ObjectiveConfig,
    how: Preset,
) -> Sums:
    """One forward over a packed batch; with gradients where adapters learn."""
    hidden = model(batch.ids, batch.layout, recompute=how.recompute, offload=how.offload)  # (N, D)
    imitation = hidden.new_zeros((), dtype=torch.float32)
    if len(batch.rows) and config.imitation:
        log_probs, _ = logprob(
            hidden[batch.rows], model.head(), batch.targets, chunk_bytes=how.chunk_mb << 20
        )
        imitation = -config.imitation * (batch.weights * log_probs).sum()
    z = model.logits_of(hidden[batch.digit_rows], torch.tensor(digit_ids, device=hidden.device))
    contrasted, right = contrast(
        log_odds(z), batch.lists, batch.list_weights, config.pair, config.list
    )
    scores = z.detach().softmax(-1) @ torch.arange(1.0, 10.0, device=z.device)  # (n,)
    return Sums(imitation, contrasted, right, scores)


def reply_log_probs(
    model: Model,
    batch: Batch,
    how: Preset,
    temperature: float,
    digit_ids: Sequence[int],
    places: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of drawn replies, at the temperature of drawing: the log-probability of each token (M,), the
    entropy there (M,), and, where tokens `places` (n,) are digits, the log-probabilities of the
    nine among themselves (n, 9), all fp32."""
    hidden = model(batch.ids, batch.layout, recompute=how.recompute, offload=how.offload)  # (N, D)
    told = hidden[batch.rows]  # (M, D)
    digits = model.logits_of(told[places], torch.tensor(digit_ids, device=told.device))
    chunk = how.chunk_mb << 20
    log_p, entropy = logprob(told, model.head(), batch.targets, temperature, chunk_bytes=chunk)
    return log_p, entropy, (digits / temperature).log_softmax(-1)
