"""A trial in the middle of training: how well does the model judge, and does it keep the form?

Three looks at a model whose adapter is on:

    judged    pairs of the validation set, scored at once, without reasoning: the share in which the
              chosen text gets the higher soft score (*accuracy*), and of twins in which both do
              (*twins*: 25 % by chance). Equal scores are wrong. Beside it the mean loss of a token
              of the replies that imitation would teach about them.
    written   replies drawn freely, nothing forced: the share that is *well formed* (`verdict.py`)
              and the texts, for people to read; the exam adds which quotes and claims are true
    reasoned  some of the pairs again, after reasoning, as the judge does it: greedy, with the score
              line given. Only where it is asked for: it takes seconds a pair.

The numbers are of few pairs, to see whether training moves; `evaluate.py` has the full protocol
with intervals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nanopersrm.judge import verdict
from nanopersrm.judge.answer import FORCED_ROOM, AnswerConfig, answer
from nanopersrm.model.sampler import SamplingConfig, sample
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.train.objective import ObjectiveConfig, sums
from nanopersrm.train.packing import Bundle, batch, pack
from nanopersrm.train.presets import Preset
from nanopersrm.train.rollout import side_by_side, slots_of

REPLY_TOKENS = 256  # budget of a free reply
AT_ONCE = 16  # replies written side by side, fewer where their keys and values find no room


@dataclass(frozen=True)
class Trial:
    """What was found."""

    accuracy: float  # share of pairs, 0 to 1
    twins: float | None  # share of couples of twins of which both are right; None: no twins there
    loss: float  # nats a reply token
    pairs: int
    well_formed: float  # share of the replies written freely
    replies: int
    reasoned: float | None = None  # share of pairs that are right after reasoning; None: not asked
    reasoned_twins: float | None = None
    reasoned_pairs: int = 0
    quotes: float | None = None  # share of the quotes in free replies that are verbatim
    claims: float | None = None  # share of their claims that hold, by `faithful.py`

    def numbers(self) -> dict[str, float]:
        """For the log."""
        if not self.pairs:
            return {}
        found = {"loss": self.loss, "accuracy": self.accuracy, "well_formed": self.well_formed}
        for name in ("twins", "reasoned", "reasoned_twins", "quotes", "claims"):
            if (value := getattr(self, name)) is not None:
                found[name] = value
        return {f"validation_{name}": value for name, value in found.items()}

    def said(self) -> str:
        """In a line."""
        if not self.pairs:
            return "no validation pairs to judge"
        twins = "" if self.twins is None else f" ({self.twins:.0%} of the twins)"
        reasoned = ""
        if self.reasoned is not None:
            reasoned = f"after reasoning {self.reasoned:.1%} of {self.reasoned_pairs}"
            if self.reasoned_twins is not None:
                reasoned += f" ({self.reasoned_twins:.0%} of the twins)"
            reasoned += ", "
        said = {"quotes verbatim": self.quotes, "claims true": self.claims}
        true = "".join(f"{share:.0%} of {n}, " for n, share in said.items() if share is not None)
        return (
            f"{self.accuracy:.1%} of {self.pairs} validation pairs{twins}, {reasoned}"
            f"{self.well_formed:.0%} of {self.replies} replies well formed, {true}"
            f"{self.loss:.3f} nats a reply token"
        )


@torch.no_grad()
def hold(
    model: Model,
    tokenizer: Tokenizer,
    bundles: Sequence[Bundle],
    twins: Mapping[str, str],
    prompts: Sequence[list[int]],
    how: Preset,
    seed: int,
    temperature: float = 1.0,
) -> tuple[Trial, list[str]]:
    """The trial, and the replies written to `prompts`, which ask about one candidate each.

    bundles: trees with a list of chosen and rejected, and replies; twins: id -> id of the twin.
    temperature: of the replies, 0 as the judge writes them.
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
    drawing = SamplingConfig(temperature, max_new=REPLY_TOKENS, seed=seed)
    drawn, most = [], slots_of(model, how.cache_mb)
    for part in side_by_side(prompts, 1, REPLY_TOKENS, AT_ONCE, most):
        some_prompts = prompts[part.start : part.stop]
        drawn += sample(model, some_prompts, drawing, stop_ids=tokenizer.eos_ids)
    replies = [
        verdict.OPEN + tokenizer.decode(reply.ids[:-1] if reply.ended == "stop" else reply.ids)
        for (reply,) in drawn
    ]
    model.train(training)
    well = sum(verdict.parse(reply, verdict.LABELS[:1]).well_formed for reply in replies)
    done = Trial(
        accuracy=sum(right.values()) / max(1, len(right)),
        twins=both_right(right, twins),
        loss=loss / max(tokens, 1.0),
        pairs=len(right),
        well_formed=well / max(1, len(replies)),
        replies=len(replies),
    )
    return done, replies


def both_right(right: Mapping[str, bool], twins: Mapping[str, str]) -> float | None:
    """The share of couples of twins of which both are right; None where there is no couple."""
    couples = [(a, b) for a, b in twins.items() if a < b and a in right and b in right]
    return sum(right[a] and right[b] for a, b in couples) / len(couples) if couples else None


@torch.no_grad()
def reason(
    model: Model,
    tokenizer: Tokenizer,
    asked: Mapping[str, Sequence[list[int]]],
    labels: int,
    tokens: int,
    how: Preset,
) -> dict[str, bool]:
    """Pair -> right after reasoning of at most `tokens`, greedily.

    asked: of each pair the prompt with the chosen text as A, and the one with the rejected text.
    """
    training = model.training
    model.eval()
    prompts = [prompt for both in asked.values() for prompt in both]
    config = AnswerConfig(think_tokens=tokens)
    answers, most = [], slots_of(model, how.cache_mb)
    for part in side_by_side(prompts, 1, tokens + FORCED_ROOM, AT_ONCE, most):
        some = prompts[part.start : part.stop]
        answers += [own for (own,) in answer(model, tokenizer, some, labels, config)]
    model.train(training)
    right = {}
    for k, name in enumerate(asked):
        one, other = answers[2 * k], answers[2 * k + 1]
        if one.joint is None or other.joint is None:
            right[name] = verdict.soft_score(one.digits) > verdict.soft_score(other.digits)
        else:
            right[name] = verdict.beats_jointly(one.joint) > verdict.beats_jointly(other.joint)
    return right
