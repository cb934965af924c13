"""A trial in the middle of training: how well does the model judge, and does it keep the form?

Two looks at a model whose adapter is on:

    judged    pairs of the validation set, scored at once, without reasoning: the share in which the
              chosen text gets the higher soft score (*accuracy*), and of twins in which both do
              (*twins*: 25 % by chance). Equal scores are wrong. Beside it the mean loss of a token
              of the replies that imitation would teach about them.
    written   replies drawn freely, nothing forced: the share that is *well formed* (`verdict.py`)
              and the texts, for people to read

The numbers are of few pairs, to see whether training moves; `evaluate.py` has the full protocol
with intervals. What we left out: accuracy after reasoning, which takes a minute where this takes
seconds.

Where to read next: `train_sft.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanopersrm import verdict
from nanopersrm.model import Model
from nanopersrm.objective import ObjectiveConfig, sums
from nanopersrm.packing import Bundle, batch, pack
from nanopersrm.presets import Preset
from nanopersrm.sampler import SamplingConfig, sample
from nanopersrm.tokenizer import Tokenizer

REPLY_TOKENS = 256  # budget of a free reply


@dataclass(frozen=True)
class Trial:
    """What was found."""

    accuracy: float  # share of pairs, 0 to 1
    twins: float | None  # share of couples of twins of which both are right; None: no twins there
    loss: float  # nats a reply token
    pairs: int
    well_formed: float  # share of the replies written freely
    replies: int

    def numbers(self) -> dict[str, float]:
        """For the log."""
        if not self.pairs:
            return {}
        found = {"loss": self.loss, "accuracy": self.accuracy, "well_formed": self.well_formed}
        if self.twins is not None:
            found["twins"] = self.twins
        return {f"validation_{name}": value for name, value in found.items()}

    def said(self) -> str:
        """In a line."""
        if not self.pairs:
            return "no validation pairs to judge"
        twins = "" if self.twins is None else f" ({self.twins:.0%} of the twins)"
        return (
            f"{self.accuracy:.1%} of {self.pairs} validation pairs{twins}, "
            f"{self.well_formed:.0%} of {self.replies} replies well formed, "
            f"{self.loss:.3f} nats a reply token"
        )


@torch.no_grad()
def hold(
    model: Model,
    tokenizer: Tokenizer,
    bundles: Sequence[Bundle],
    twins: dict[str, str],
    prompts: Sequence[list[int]],
    how: Preset,
    seed: int,
) -> tuple[Trial, list[str]]:
    """The trial, and the replies written to `prompts`, which ask about one candidate each.

    bundles: trees with a list of chosen and rejected, and replies; twins: id -> id of the twin.
    """
    training = model.training
    model.eval()
    right: dict[str, bool] = {}
    loss = tokens = 0.0
    for some in pack(bundles, how.budget):
        packed = batch(some, model.device)
        found = sums(model, packed, tokenizer.digit_ids, ObjectiveConfig(), how)
        loss, tokens = loss + float(found.imitation), tokens + float(packed.weights.sum())
        scores = found.scores.tolist()
        for bundle, (first, count, chosen) in zip(some, packed.lists, strict=True):
            own = scores[first : first + count]
            right[bundle.name] = all(own[chosen] > own[k] for k in range(count) if k != chosen)
    drawing = SamplingConfig(max_new=REPLY_TOKENS, seed=seed)
    drawn = sample(model, prompts, drawing, stop_ids=tokenizer.eos_ids) if prompts else []
    replies = [
        verdict.OPEN + tokenizer.decode(reply.ids[:-1] if reply.ended == "stop" else reply.ids)
        for (reply,) in drawn
    ]
    model.train(training)
    couples = [(a, b) for a, b in twins.items() if a < b and a in right and b in right]
    well = sum(verdict.parse(reply, verdict.LABELS[:1]).well_formed for reply in replies)
    done = Trial(
        accuracy=sum(right.values()) / max(1, len(right)),
        twins=sum(right[a] and right[b] for a, b in couples) / len(couples) if couples else None,
        loss=loss / max(tokens, 1.0),
        pairs=len(right),
        well_formed=well / max(1, len(replies)),
        replies=len(replies),
    )
    return done, replies
