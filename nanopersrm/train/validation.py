"""Validation in the middle of training: how well does the model judge, and does it keep the form?

Three looks at a model whose adapter is on, always at the same pairs:

    judged    pairs scored at once: the share in which the chosen text gets the higher soft score
              (*accuracy*), and of twins in which both do (*twins*: 25 % by chance), and the mean
              loss of a token of the replies that imitation would teach about them
    written   replies drawn freely, nothing forced: the share that is *well formed*, which of their
              quotes and claims are true, and the texts, for people to read
    reasoned  some of the pairs again, after reasoning, as the judge does it: greedy, with the score
              line given. Only where it is asked for: it takes seconds a pair.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from nanopersrm.judge import claims, verdict
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.reply import FORCED_ROOM, answer
from nanopersrm.model.sampler import SamplingConfig, sample
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.pairs import Pair, twin_pairs
from nanopersrm.style.reading import Reading, StyleEvidenceFn
from nanopersrm.train.objective import SftWeights, loss_sums
from nanopersrm.train.packing import batch, build_tree, pack
from nanopersrm.train.presets import Preset
from nanopersrm.train.replies import ROLES
from nanopersrm.train.rollout import side_by_side, slots_of
from nanopersrm.train.sft_data import ExamplesConfig, pair_texts, prompts_of, stripped

WRITTEN = 8  # free replies
REPLY_TOKENS = 256  # budget of a free reply
REASONING = 160  # tokens before a score, as the judge's own budget
ROOM = REASONING + FORCED_ROOM
AT_ONCE = 16  # replies written side by side, fewer where their keys and values find no room
RULE = f"\n\n{'=' * 80}\n\n"  # between two of them


@dataclass(frozen=True)
class Metrics:
    """What validation measures."""

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
    claims: float | None = None  # share of their claims that hold, by `claims.py`

    def numbers(self) -> dict[str, float]:
        """For the log."""
        counts = ("pairs", "replies", "reasoned_pairs")
        return {
            f"validation_{name}": value
            for name, value in vars(self).items()
            if self.pairs and value is not None and name not in counts
        }

    def summary(self) -> str:
        """In a line."""
        if not self.pairs:
            return "no validation pairs to judge"
        shares = {
            "{:.1%} of the pairs": self.accuracy,
            "{:.0%} of the twins": self.twins,
            f"after reasoning {{:.1%}} of {self.reasoned_pairs}": self.reasoned,
            f"{{:.0%}} of {self.replies} replies well formed": self.well_formed,
            "{:.0%} of quotes verbatim": self.quotes,
            "{:.0%} of claims true": self.claims,
            "{:.3f} nats a reply token": self.loss,
        }
        parts = [text.format(share) for text, share in shares.items() if share is not None]
        return f"{self.pairs} validation pairs: {', '.join(parts)}"


class ValidationSet:
    """Validation pairs as trees and prompts, made once; `reasoned` of them are judged after
    reasoning as well."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokenizer: Tokenizer,
        config: ExamplesConfig,
        seed: int,
        style_evidence: StyleEvidenceFn | None,
        reasoned: int = 0,
    ):
        self.tokenizer, self.seed = tokenizer, seed
        pairs = [stripped(pair) for pair in pairs]
        self.twins = {pair.id: pair.twin for pair in pairs}
        config, drawing = replace(config, rivals=1), f"{seed}/exam"
        self.trees = [
            build_tree(pair.id, *texts)
            for pair in pairs
            if (texts := pair_texts(pair, {}, tokenizer, config, drawing, style_evidence, False))
        ]
        self.reasoned: dict[str, list[list[int]]] = {}  # pair -> its prompts
        self.prompts: list[list[int]] = []  # answered freely
        self.texts: list[tuple[tuple[str, ...], str]] = []  # exemplars and candidate of each prompt
        for i, pair in enumerate(pairs[: max(reasoned, WRITTEN)]):
            prompts = prompts_of(pair, tokenizer, config, style_evidence)
            if i < reasoned and max(map(len, prompts)) + ROOM <= config.longest:
                self.reasoned[pair.id] = prompts
            role = i % len(ROLES)
            if i < WRITTEN and len(prompts[role]) <= config.longest:
                self.prompts.append(prompts[role])
                self.texts.append((pair.exemplars, getattr(pair, ROLES[role])))

    @torch.no_grad()
    def evaluate(self, model: Model, preset: Preset) -> tuple[Metrics, str]:
        """Metrics of the model as it is now, and its replies with their prompts as one text."""
        training = model.training
        model.eval()
        right, loss = self._judge(model, preset)
        replies = self._write(model, preset)
        reasoned = self._reason(model, preset) if self.reasoned else {}
        model.train(training)
        reports = [
            claims.check(reply, exemplars, {"A": text})
            for reply, (exemplars, text) in zip(replies, self.texts, strict=True)
        ]
        formed = [verdict.parse(reply, verdict.LABELS[:1]).problem is None for reply in replies]
        metrics = Metrics(
            accuracy=sum(right.values()) / max(1, len(right)),
            twins=both_right(right, self.twins),
            loss=loss,
            pairs=len(right),
            well_formed=sum(formed) / max(1, len(replies)),
            replies=len(replies),
            reasoned=sum(reasoned.values()) / len(reasoned) if reasoned else None,
            reasoned_twins=both_right(reasoned, self.twins),
            reasoned_pairs=len(reasoned),
            quotes=_share((r.quotes_true for r in reports), (r.quotes for r in reports)),
            claims=_share((r.claims_true for r in reports), (r.claims for r in reports)),
        )
        pages = [
            self.tokenizer.decode(prompt).removesuffix(verdict.OPEN) + reply
            for prompt, reply in zip(self.prompts, replies, strict=True)
        ]
        return metrics, RULE.join(pages) + "\n"

    def _judge(self, model: Model, preset: Preset) -> tuple[dict[str, bool], float]:
        """Pair -> right without reasoning, and the mean loss of a reply token."""
        right: dict[str, bool] = {}
        loss = weight = 0.0
        for micro in pack(self.trees, preset.budget):
            packed = batch(micro, model.device)
            sums = loss_sums(model, packed, self.tokenizer.digit_ids, SftWeights(), preset)
            loss += float(sums.imitation)
            weight += float(packed.weights.sum())
            scores = sums.scores.tolist()
            for tree, (first, count, chosen) in zip(micro, packed.lists, strict=True):
                listed = scores[first : first + count]
                rivals = listed[:chosen] + listed[chosen + 1 :]
                right[tree.name] = listed[chosen] > max(rivals)
        return right, loss / max(weight, 1.0)

    def _write(self, model: Model, preset: Preset) -> list[str]:
        """Free replies to the prompts, which ask about one candidate each."""
        config = SamplingConfig(1.0, max_new=REPLY_TOKENS, seed=self.seed)
        drawn, slots = [], slots_of(model, preset.cache_mb)
        for part in side_by_side(self.prompts, 1, REPLY_TOKENS, AT_ONCE, slots):
            prompts = self.prompts[part.start : part.stop]
            drawn += sample(model, prompts, config, stop_ids=self.tokenizer.eos_ids)
        return [
            verdict.OPEN
            + self.tokenizer.decode(reply.ids[:-1] if reply.ended == "stop" else reply.ids)
            for (reply,) in drawn
        ]

    def _reason(self, model: Model, preset: Preset) -> dict[str, bool]:
        """Pair -> right after reasoning, greedily."""
        prompts = [prompt for both in self.reasoned.values() for prompt in both]
        config = JudgeConfig(think_tokens=REASONING)
        answers, slots = [], slots_of(model, preset.cache_mb)
        for part in side_by_side(prompts, 1, ROOM, AT_ONCE, slots):
            group = prompts[part.start : part.stop]
            answers += [first for (first,) in answer(model, self.tokenizer, group, 1, config)]
        scores = [verdict.soft_score(reply.digits) for reply in answers]
        return {name: scores[2 * k] > scores[2 * k + 1] for k, name in enumerate(self.reasoned)}


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


def _share(true: Iterable[int], counts: Iterable[int]) -> float | None:
    """Of what was said in all replies, how much is true; None where nothing was."""
    count = sum(counts)
    return sum(true) / count if count else None
