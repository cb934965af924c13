"""Rollouts: replies drawn to the prompts of a pair and its twin, and those replies as trees.

    pair     exemplars of writer 1    about chosen | about rejected
    twin     exemplars of writer 2    about chosen | about rejected      (the same two texts)

Each of the four prompts gets a group of G replies, drawn as a judge draws them (`judge/reply.py`):
the model chooses lines of evidence and a digit, the rest is filled in. A `RolloutGroup` is the
record between prompt and advantage: the `Collector` makes it and draws its replies, `rewards.py`
fills in what they earn, `grpo.py` compares them.

The keys and values of a prompt are computed once. How many replies run side by side is a matter of
memory (`rows`, `cache_mb`), not of the group.

Training sees the same ids as one tree for each pair: its exemplars once, under them each candidate,
under the candidate its replies, and replies that begin with the same lines compute these once. With
exemplars and menu of 900 tokens, candidates of 150, replies of 110 and G = 8 that is at most
900 + 2 · (150 + 8 · 110) = 2,960 rows where text by text it is 18,560. A tree beyond the budget of
a micro-batch is cut in two, and so on. Only what was drawn is trained, under the mask that it was
drawn with.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import fsum
from statistics import fmean
from typing import Literal, get_args

import torch
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.reply import Prompt, Reply, draw, reply_room
from nanopersrm.judge.verdict import DIGITS
from nanopersrm.model.sampler import prompt_tree, sample_name
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.pairs import Pair, twin_pairs
from nanopersrm.style.ledger import Measurer
from nanopersrm.train.grpo import ScoreDigits
from nanopersrm.train.packing import PrefixTree, Target, Text, build_trees
from nanopersrm.train.sft_data import prompts_of, stripped

Role = Literal["chosen", "rejected"]
ROLES: tuple[Role, ...] = get_args(Role)
RULE = f"\n\n{'=' * 80}\n\n"


@dataclass(frozen=True)
class RolloutConfig:
    """Which prompts a step has, and how replies to them are drawn."""

    twin_pairs: int = 1  # pairs with their twins a step
    group: int = 8  # G: replies to a prompt
    rows: int = 32  # replies side by side, at most
    think_lines: int = 8  # lines of a reply, at most
    free: bool = False  # replies in free prose instead
    think_tokens: int = 160  # of free prose, at most
    temperature: float = 1.0  # of drawing and of the probabilities that are trained
    cache_mb: int = 1024  # keys and values of prompts and replies (2^20 bytes), one reply at least
    longest: int = 2048  # tokens of prompt and reply; longer pairs are left out
    seed: int = 0

    def judging(self, samples: int, seed: int) -> JudgeConfig:
        """How the judge draws such replies."""
        return JudgeConfig(
            think_lines=self.think_lines,
            free=self.free,
            think_tokens=self.think_tokens,
            samples=samples,
            temperature=self.temperature,
            seed=seed,
        )

    @property
    def most_choices(self) -> int:
        """Tokens of a reply that are drawn, at most: after the last line the stop is given."""
        return (self.think_tokens if self.free else self.think_lines) + 1


@dataclass
class Rollout:
    """One reply: as it was drawn, and what it has earned (`rewards.py`)."""

    reply: Reply
    parts: dict[str, float] = field(default_factory=dict)  # of the reward, each from 0 to 1
    reward: float = 0.0
    by_digit: tuple[float, ...] | None = None  # in expectation: its reward, had it drawn 1 … 9


@dataclass
class RolloutGroup:
    """The prompt about one text of a pair, and the replies to it."""

    pair: Pair  # its texts without white space around
    role: Role  # of the text that is judged
    prompt: Prompt
    rollouts: list[Rollout] = field(default_factory=list)


# Drawing


class Collector:
    """Draws the replies of one step after another. Its state is `pairs_seen`, in an endless row of
    shuffled epochs; a pair and its twin count once."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        pairs: Sequence[Pair],
        config: RolloutConfig,
        measurer: Measurer,
    ):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.measurer = measurer
        self.pairs = twin_pairs([pair for pair in pairs if pair.weight > 0])
        if not self.pairs:
            raise InputError("pairs: expected some with a weight above 0, found none")
        self._epoch, self._order = -1, list[int]()
        self.pairs_seen = 0
        self.next_groups()  # raises where every pair is too long
        self.pairs_seen = 0

    def collect(self, step: int) -> list[list[RolloutGroup]]:
        """For each pair and its twin the groups of their prompts."""
        collected = [self.next_groups() for _ in range(self.config.twin_pairs)]
        flat = [group for groups in collected for group in groups]
        seed = sample_name([self.config.seed, step, 0]) >> 1  # below 2^63
        draw_groups(self.model, self.tokenizer, flat, self.config, seed)
        return collected

    def next_groups(self) -> list[RolloutGroup]:
        """Without replies yet: of the next pair that is not too long."""
        config = self.config
        for _ in self.pairs:
            groups = []
            for pair in map(stripped, self.next_pair()):
                prompts = prompts_of(
                    pair, self.tokenizer, self.measurer, pair.author, free=config.free
                )
                groups += [RolloutGroup(pair, *both) for both in zip(ROLES, prompts, strict=True)]
            room = reply_room([group.prompt for group in groups], config.judging(1, 0))
            if max(len(group.prompt.ids) for group in groups) + room <= config.longest:
                return groups
        raise InputError(
            f"pairs: expected prompts and replies of at most {config.longest} tokens, found none; "
            "raise --longest or lower --think-lines"
        )

    def next_pair(self) -> tuple[Pair, ...]:
        """A pair, and its twin if it has one."""
        epoch, index = divmod(self.pairs_seen, len(self.pairs))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.pairs)))
            random.Random(f"{self.config.seed}/couples/{epoch}").shuffle(self._order)
        self.pairs_seen += 1
        return self.pairs[self._order[index]]


def draw_groups(
    model: Model,
    tokenizer: Tokenizer,
    groups: Sequence[RolloutGroup],
    config: RolloutConfig,
    seed: int,
) -> None:
    """Give each group config.group replies. Same seed, same replies, however many side by side."""
    G, most = config.group, slots_of(model, config.cache_mb)
    room = reply_room([group.prompt for group in groups], config.judging(1, 0))
    prompts = [group.prompt.ids for group in groups]
    for some in side_by_side(prompts, G, room, config.rows, most):
        fitting = (most - len(prompts[some.start])) // room  # replies to one alone
        count = G if len(some) > 1 else max(1, min(G, config.rows, fitting))
        part = groups[some.start : some.stop]
        for first in range(0, G, count):
            judging = config.judging(min(count, G - first), seed)
            about = [group.prompt for group in part]
            drawn = draw(model, tokenizer, about, judging, first=first)
            for group, replies in zip(part, drawn, strict=True):
                group.rollouts += map(Rollout, replies)


def slots_of(model: Model, megabytes: int) -> int:
    """Tokens whose keys and values take so much."""
    return (megabytes << 20) // model.new_cache().token_bytes


def slots(prompts: Sequence[list[int]], replies: int, room: int) -> int:
    """Tokens whose keys and values such a tree has room for, with `replies` of `room` tokens each
    to each prompt. The nodes of a level are all as long as its longest."""
    shared, _, heads, tails = prompt_tree(prompts)
    head, tail = max(map(len, heads), default=0), max(map(len, tails))
    return shared + len(heads) * head + len(prompts) * (tail + replies * room)


def side_by_side(
    prompts: Sequence[list[int]], replies: int, room: int, rows: int, most: int
) -> list[range]:
    """Neighbours with at most `rows` replies and `most` slots together, one at least."""
    parts, first = [], 0
    for i in range(1, len(prompts)):
        some = prompts[first : i + 1]
        if len(some) * replies > rows or slots(some, replies, room) > most:
            parts.append(range(first, i))
            first = i
    return [*parts, range(first, len(prompts))] if prompts else []


# For training


def trees(groups: Sequence[RolloutGroup], kept: Sequence[bool], budget: int) -> list[PrefixTree]:
    """A tree for each pair, of the replies of the groups that are kept, none above the budget if
    possible. Replies are numbered through all groups, kept or not."""
    grown: list[PrefixTree] = []
    texts: list[Text] = []
    number = 0
    for i, (group, keep) in enumerate(zip(groups, kept, strict=True)):
        for rollout in group.rollouts:
            if keep:
                texts.append(text_of(group.prompt, rollout.reply, number))
            number += 1
        if i % 2 and texts:  # both groups of the pair have been seen
            grown += build_trees(group.pair.id, texts, budget)
            texts = []
    return grown


def text_of(prompt: Prompt, reply: Reply, number: int) -> Text:
    """A reply after its prompt, up to its digit, which is the last target."""
    first = len(prompt.ids)
    targets = [Target(first + c.at, c.allowed, id=reply.ids[c.at]) for c in reply.choices]
    return Text((*prompt.ids, *reply.ids[:-1]), tuple(targets), number)


def score_digits(rollouts: Sequence[Rollout]) -> ScoreDigits:
    """The nine digits that each reply might have got."""
    rewards = [r.by_digit or (r.reward,) * len(DIGITS) for r in rollouts]
    probs = [[p / fsum(r.reply.drawn_digits) for p in r.reply.drawn_digits] for r in rollouts]
    return ScoreDigits(
        torch.tensor(probs, dtype=torch.float64),
        torch.tensor(rewards, dtype=torch.float64),
    )


def sampler_log_probs(rollouts: Sequence[Rollout], owners: Tensor) -> Tensor:
    """owners (M,), whole replies one after another -> the sampler's log-probabilities (M,)."""
    order = torch.unique_consecutive(owners).tolist()
    flat = [choice.log_prob for number in order for choice in rollouts[number].reply.choices]
    assert len(flat) == len(owners), f"{len(flat)} choices were drawn, {len(owners)} are trained"
    return torch.tensor(flat, device=owners.device)


# For people


def metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Means over all replies of a step."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    means = {
        "reward": fmean(rollout.reward for rollout in rollouts),
        "right": fmean(rollout.parts["order"] for rollout in rollouts),
        "lines": fmean(len(rollout.reply.features) for rollout in rollouts),
    }
    for name in dict.fromkeys(name for rollout in rollouts for name in rollout.parts):
        means[f"reward_{name}"] = fmean(r.parts[name] for r in rollouts if name in r.parts)
    return means


def page(groups: Sequence[RolloutGroup], tokenizer: Tokenizer) -> str:
    """All groups as readable text, the best reply first."""
    pages = []
    for group in groups:
        title = f"{group.pair.id}, exemplars of {group.pair.author}, A is {group.role}"
        best_first = sorted(group.rollouts, key=lambda rollout: -rollout.reward)
        pages.append("\n\n".join([title, *(_readable(r, tokenizer) for r in best_first)]))
    return RULE.join(pages) + "\n"


def _readable(rollout: Rollout, tokenizer: Tokenizer) -> str:
    parts = ", ".join(f"{name} {value:.2f}" for name, value in rollout.parts.items())
    lines = [f"--- {rollout.reward:.3f}: {parts}"]
    if rollout.by_digit:
        rows = {"chance of 1 to 9": rollout.reply.drawn_digits, "would earn": rollout.by_digit}
        lines += [
            " ".join([f"{name:16}", *(f"{x:5.2f}" for x in row)]) for name, row in rows.items()
        ]
    chances = " ".join(f"{math.exp(choice.log_prob):.2f}" for choice in rollout.reply.choices)
    return "\n".join(
        [*lines, f"chances of what was drawn: {chances}", tokenizer.decode(rollout.reply.ids)]
    )
