"""Validation in the middle of training: how well does the model judge, and what does it look at?

The same pairs each time, judged as the judge does, greedily, with lines that the model chooses: the
share in which the chosen text gets the higher soft score (*accuracy*), of twins in which both do
(*twins*: 25 % by chance), and the mean number of lines. The candidates are measured once, in the
beginning; what a validation then costs is the model alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.reply import Reply, draw, reply_room
from nanopersrm.judge.verdict import beats, soft_score
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.pairs import Pair, twin_pairs
from nanopersrm.style.ledger import Measurer
from nanopersrm.style.reading import Reading
from nanopersrm.train.presets import Preset
from nanopersrm.train.rollout import side_by_side, slots_of
from nanopersrm.train.sft_data import prompts_of, stripped

WRITTEN = 8  # replies that are kept as text
AT_ONCE = 16  # replies drawn side by side, fewer where their keys and values find no room
RULE = f"\n\n{'=' * 80}\n\n"  # between two of them


@dataclass(frozen=True)
class Metrics:
    """What validation measures."""

    accuracy: float  # share of pairs, 0 to 1
    twins: float | None  # share of couples of twins of which both are right; None: no twins there
    loss: float  # nats a pair: -log P(the chosen text is preferred); a guess has 0.69
    lines: float  # of a reply
    pairs: int

    def numbers(self) -> dict[str, float]:
        """For the log."""
        return {
            f"validation_{name}": value
            for name, value in vars(self).items()
            if self.pairs and value is not None and name != "pairs"
        }

    def summary(self) -> str:
        """In a line."""
        if not self.pairs:
            return "no validation pairs to judge"
        twins = "" if self.twins is None else f", {self.twins:.0%} of the twins"
        right = f"{self.accuracy:.1%} of {self.pairs} validation pairs{twins}"
        return f"{right}, {self.loss:.3f} nats a pair, {self.lines:.1f} lines a reply"


class ValidationSet:
    """Validation pairs, measured once, as prompts."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokenizer: Tokenizer,
        measurer: Measurer,
        config: JudgeConfig,
        longest: int,
    ):
        self.tokenizer, self.config = tokenizer, config
        self.twins = {pair.id: pair.twin for pair in pairs}
        self.prompts = {
            pair.id: prompts_of(pair, tokenizer, measurer, None, free=config.free)
            for pair in map(stripped, pairs)
        }
        for name, prompts in list(self.prompts.items()):
            room = reply_room(prompts, config)
            if max(len(prompt.ids) for prompt in prompts) + room > longest:
                del self.prompts[name]

    @torch.no_grad()
    def evaluate(self, model: Model, preset: Preset) -> tuple[Metrics, str]:
        """Metrics of the model as it is now, and some replies with their prompts as one text."""
        training = model.training
        model.eval()
        prompts = [prompt for both in self.prompts.values() for prompt in both]
        room = reply_room(prompts, self.config) if prompts else 1
        replies, most = list[Reply](), slots_of(model, preset.cache_mb)
        ids = [prompt.ids for prompt in prompts]
        for part in side_by_side(ids, 1, room, AT_ONCE, most):
            some = prompts[part.start : part.stop]
            replies += [first for (first,) in draw(model, self.tokenizer, some, self.config)]
        model.train(training)
        right, losses = dict[str, bool](), [0.0][:0]
        for k, name in enumerate(self.prompts):
            chosen, rejected = replies[2 * k].digits, replies[2 * k + 1].digits
            right[name] = soft_score(chosen) > soft_score(rejected)
            p = torch.tensor(beats(chosen, rejected), dtype=torch.float64)
            losses.append(float(-p.clamp(min=1e-9).log()))
        metrics = Metrics(
            accuracy=sum(right.values()) / max(1, len(right)),
            twins=both_right(right, self.twins),
            loss=fmean(losses) if losses else 0.0,
            lines=fmean(len(reply.features) for reply in replies) if replies else 0.0,
            pairs=len(right),
        )
        pages = [
            self.tokenizer.decode([*prompt.ids, *reply.ids])
            for prompt, reply in zip(prompts[:WRITTEN], replies, strict=False)
        ]
        return metrics, RULE.join(pages) + "\n"


def reading_shares(reading: Reading, pairs: Sequence[Pair]) -> dict[str, float]:
    """How often reading alone is right: "pairs", "twins", and "couples", where the two texts of a
    couple of twins under both writers' exemplars say who wrote which, without any baseline."""
    right: dict[str, bool] = {}
    couples = []
    for both in twin_pairs(pairs):
        tables = [reading.read(pair.exemplars, [pair.chosen, pair.rejected]) for pair in both]
        for pair, (chosen, rejected) in zip(both, tables, strict=True):
            right[pair.id] = chosen.score > rejected.score
        if len(both) == 2:
            couples.append(sum(chosen.score - rejected.score for chosen, rejected in tables) > 0)
    twins = both_right(right, {pair.id: pair.twin for pair in pairs})
    shares = {"pairs": fmean(right.values())} if right else {}
    shares |= {} if twins is None else {"twins": twins}
    return shares | ({"couples": fmean(couples)} if couples else {})


def both_right(right: Mapping[str, bool], twins: Mapping[str, str]) -> float | None:
    """The share of couples of twins of which both are right; None where there is no couple."""
    couples = [(a, b) for a, b in twins.items() if a < b and a in right and b in right]
    return sum(right[a] and right[b] for a, b in couples) / len(couples) if couples else None
