"""Rollouts: replies drawn to the prompts of a pair and its twin, and those replies as trees.

    pair     exemplars of writer 1    about chosen | about rejected
    twin     exemplars of writer 2    about chosen | about rejected      (the same two texts)

Each of the four prompts gets a group of G replies. A `RolloutGroup` is the record between prompt
and advantage: the `Collector` makes it and draws its replies, `rewards.py` fills in what they earn,
`grpo.py` compares them. A token in training carries the number of its reply among all of the step.

Nothing drawn is forced: a reply that loses the form must be seen to lose it. *At once*, without
reasoning, the prompt goes on to the digit, `</think>↵<scores>A=`, and the reply begins with it.

The keys and values of a prompt are computed once. How many replies run side by side is a matter of
memory (`rows`, `cache_mb`), not of the group. The ids are trained on as they were drawn, since
decoding them and encoding the text again can give other ids.

Training sees the same ids as one tree for each pair: its exemplars once, under them each candidate,
under the candidate its replies: P + G · R rows, not G · (P + R). With exemplars of 540 tokens,
candidates of 332, replies of 120 and G = 8 that is 540 + 2 · (332 + 8 · 120) = 3,124 rows where
text by text it is 15,872. A tree beyond the budget of a micro-batch is cut in two, and so on.

What we left out: top-p and top-k, since the trainer's probabilities are those of the whole
vocabulary; a curriculum.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import fsum
from statistics import fmean
from typing import Literal, get_args

import torch
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.judge import verdict
from nanopersrm.judge.reply import FORCED_ROOM
from nanopersrm.judge.verdict import DIGITS, LABELS
from nanopersrm.model.sampler import Decoder, SamplingConfig, prompt_tree, sample_name
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.pairs import Pair, twin_pairs
from nanopersrm.style.reading import StyleEvidenceFn
from nanopersrm.train.grpo import ScoreDigits
from nanopersrm.train.packing import Branch, PrefixTree, build_trees
from nanopersrm.train.sft_data import ExamplesConfig, prompts_of, stripped

Role = Literal["chosen", "rejected"]
ROLES: tuple[Role, ...] = get_args(Role)
AT_ONCE_TOKENS = 16  # of a reply at once: "7</scores>", the stop, and some to go wrong with
LABEL_TOKENS = 4  # before a digit, in which its "A=" stands
EVEN = (1 / len(DIGITS),) * len(DIGITS)
RULE = f"\n\n{'=' * 80}\n\n"


@dataclass(frozen=True)
class RolloutConfig:
    """Which prompts a step has, and how replies to them are drawn."""

    twin_pairs: int = 1  # pairs with their twins a step
    at_once: int = 0  # of them judged without reasoning
    group: int = 8  # G: replies to a prompt
    rows: int = 32  # replies side by side, at most
    reply: int = 192  # tokens of a reply, at most
    temperature: float = 1.0  # of drawing and of the probabilities that are trained
    cache_mb: int = 1024  # keys and values of prompts and replies (2^20 bytes), one reply at least
    longest: int = 2048  # tokens of prompt and reply; longer pairs are left out
    evidence: bool = True  # prompts show what is measured
    seed: int = 0

    @property
    def room(self) -> int:
        """Tokens after a prompt, for any kind of reply: a pair fits both kinds or none."""
        return max(self.reply, FORCED_ROOM) if self.at_once else self.reply

    @property
    def most_tokens(self) -> int:
        """That a reply of a step can have."""
        reasoned = self.reply if self.at_once < self.twin_pairs else 0
        return max(reasoned, AT_ONCE_TOKENS if self.at_once else 0)


@dataclass
class Rollout:
    """One reply: as it was drawn, and what it has earned (`rewards.py`)."""

    ids: tuple[int, ...]  # with the stop token, if it ended with one
    log_probs: tuple[float, ...]  # of the sampler, one for each id
    text: str  # with the beginning that the prompt gave
    digit_at: int = -1  # index among the ids of the score's digit; -1: there is none
    digit_probs: tuple[float, ...] | None = None  # p(1) … p(9) of the score, as a judge has them
    drawn_probs: tuple[float, ...] | None = None  # the same at the temperature of drawing
    parts: dict[str, float] = field(default_factory=dict)  # of the reward, each from 0 to 1
    reward: float = 0.0
    by_digit: tuple[float, ...] | None = None  # in expectation: its reward, had it drawn 1 … 9
    problem: str | None = None  # why it does not parse; None: it does


@dataclass
class RolloutGroup:
    """The prompt about one text of a pair, and the replies to it."""

    pair: Pair  # its texts without white space around
    role: Role  # of the text that is judged
    prompt: list[int]
    opening: str = verdict.OPEN  # how the prompt ends, which a reply's text begins with
    rollouts: list[Rollout] = field(default_factory=list)

    @property
    def candidate(self) -> str:
        """The text that is judged."""
        return self.pair.chosen if self.role == "chosen" else self.pair.rejected

    @property
    def at_once(self) -> bool:
        """The prompt ends where a judge that does not think draws its digit."""
        return self.opening != verdict.OPEN


# Prompts


def empty_groups(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    config: RolloutConfig,
    style_evidence: StyleEvidenceFn | None,
    at_once: bool = False,
) -> list[RolloutGroup] | None:
    """Two groups for each pair; None where a prompt and its reply are too long."""
    examples = ExamplesConfig(evidence=config.evidence)
    _, forced = verdict.closing("") if at_once else ("", "")
    score_line = tokenizer.encode(forced)
    groups = []
    for pair in map(stripped, pairs):
        prompts = prompts_of(pair, tokenizer, examples, style_evidence)
        if max(map(len, prompts)) + config.room > config.longest:
            return None
        groups += [
            RolloutGroup(pair, role, prompt + score_line, verdict.OPEN + forced)
            for role, prompt in zip(ROLES, prompts, strict=True)
        ]
    return groups


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
        style_evidence: StyleEvidenceFn | None,
    ):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.style_evidence = style_evidence
        self.most_tokens = config.most_tokens  # of a reply
        self.pairs = twin_pairs([pair for pair in pairs if pair.weight > 0])
        if not self.pairs:
            raise InputError("pairs: expected some with a weight above 0, found none")
        self._epoch, self._order = -1, list[int]()
        self.pairs_seen = 0
        self.next_groups()  # raises where every pair is too long
        self.pairs_seen = 0

    def collect(self, step: int) -> list[list[RolloutGroup]]:
        """For each pair and its twin the groups of their prompts; those at once come last."""
        config, collected = self.config, list[list[RolloutGroup]]()
        for at_once, count in ((False, config.twin_pairs - config.at_once), (True, config.at_once)):
            some = [self.next_groups(at_once) for _ in range(count)]
            drawing = replace(config, reply=AT_ONCE_TOKENS) if at_once else config
            seed = sample_name([config.seed, step, 0, *[1] * at_once])
            flat = [group for groups in some for group in groups]
            draw(self.model, self.tokenizer, flat, drawing, seed)
            collected += some
        return collected

    def next_groups(self, at_once: bool = False) -> list[RolloutGroup]:
        """Without replies yet: of the next pair that is not too long."""
        for _ in self.pairs:
            groups = empty_groups(
                self.next_pair(), self.tokenizer, self.config, self.style_evidence, at_once
            )
            if groups:
                return groups
        raise InputError(
            f"pairs: expected prompts that leave room for a reply of {self.config.room} tokens "
            f"within {self.config.longest}, found none; raise --longest or lower --reply"
        )

    def next_pair(self) -> tuple[Pair, ...]:
        """A pair, and its twin if it has one."""
        epoch, index = divmod(self.pairs_seen, len(self.pairs))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.pairs)))
            random.Random(f"{self.config.seed}/couples/{epoch}").shuffle(self._order)
        self.pairs_seen += 1
        return self.pairs[self._order[index]]


def draw(
    model: Model,
    tokenizer: Tokenizer,
    groups: Sequence[RolloutGroup],
    config: RolloutConfig,
    seed: int,
) -> None:
    """Give each group config.group replies. Same seed, same replies, however many side by side."""
    prompts = [group.prompt for group in groups]
    G, most = config.group, slots_of(model, config.cache_mb)
    for some in side_by_side(prompts, G, config.reply, config.rows, most):
        room = (most - len(prompts[some.start])) // config.reply  # replies to one alone
        count = G if len(some) > 1 else max(1, min(G, config.rows, room))
        for first in range(0, G, count):
            numbers = range(first, min(first + count, G))
            _draw(model, tokenizer, groups[some.start : some.stop], config, seed, numbers)


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


def _draw(
    model: Model,
    tokenizer: Tokenizer,
    groups: Sequence[RolloutGroup],
    config: RolloutConfig,
    seed: int,
    numbers: range,
) -> None:
    """Add the replies of these numbers to each group."""
    G, label = len(numbers), f"{LABELS[0]}="
    decoder = Decoder(model, [group.prompt for group in groups])
    decoder.fork([G] * len(groups), config.reply, numbers.start)
    states: dict[int, Tensor] = {}  # row -> the state that its last digit was drawn from (D,)
    digit_at: dict[int, int] = {}  # row -> index of that digit
    digit_ids = frozenset(tokenizer.digit_ids)

    def observe(row: int, ids: list[int]) -> bool:
        if ids[-1] in digit_ids:
            before = groups[row // G].opening + tokenizer.decode(ids[-1 - LABEL_TOKENS : -1])
            if before.endswith(label):
                states[row], digit_at[row] = decoder.hidden[row].clone(), len(ids) - 1
        return False

    sampling = SamplingConfig(config.temperature, max_new=config.reply, seed=seed)
    replies = decoder.generate(sampling, tokenizer.eos_ids, observe)
    digit_probs = _digit_probs(model, tokenizer, states, 1.0)
    drawn_probs = _digit_probs(model, tokenizer, states, config.temperature)
    for row, reply in enumerate(replies):
        group = groups[row // G]
        ids = reply.ids[:-1] if reply.ended == "stop" else reply.ids
        text = group.opening + tokenizer.decode(ids)
        digit = (digit_at.get(row, -1), digit_probs.get(row), drawn_probs.get(row))
        rollout = Rollout(tuple(reply.ids), tuple(reply.log_probs), text, *digit)
        group.rollouts.append(rollout)


@torch.inference_mode()
def _digit_probs(
    model: Model, tokenizer: Tokenizer, states: dict[int, Tensor], temperature: float
) -> dict[int, tuple[float, ...]]:
    """Row -> p(1) … p(9) after its state, in fp64 from fp32 logits."""
    if not states:
        return {}
    stacked = torch.stack([*states.values()])  # (n, D)
    ids = torch.tensor(tokenizer.digit_ids, device=stacked.device)
    logits = model.logits_of(stacked, ids).double()  # (n, 9)
    probs = (logits / temperature).softmax(-1).tolist()
    return {row: tuple(nine) for row, nine in zip(states, probs, strict=True)}


# For training


def trees(groups: Sequence[RolloutGroup], kept: Sequence[bool], budget: int) -> list[PrefixTree]:
    """A tree for each pair, of the replies of the groups that are kept, none above the budget if
    possible. Replies are numbered through all groups, kept or not."""
    grown: list[PrefixTree] = []
    texts: list[Branch] = []
    number = 0
    for i, (group, keep) in enumerate(zip(groups, kept, strict=True)):
        for rollout in group.rollouts:
            if keep and rollout.ids:
                ids = (*group.prompt, *rollout.ids)
                texts.append(Branch(ids, len(group.prompt), number=number))
            number += 1
        if i % 2 and texts:  # both groups of the pair have been seen
            grown += build_trees(group.pair.id, texts, budget)
            texts = []
    return grown


def score_digits(rollouts: Sequence[Rollout]) -> ScoreDigits:
    """A reply without a readable digit counts with what it earned, whatever the digit."""
    known = [r.drawn_probs if r.by_digit is not None else None for r in rollouts]
    at = [r.digit_at if p else -1 for r, p in zip(rollouts, known, strict=True)]
    probs = [p or EVEN for p in known]
    rewards = [r.by_digit or (r.reward,) * len(DIGITS) for r in rollouts]
    return ScoreDigits(
        torch.tensor(at),
        torch.tensor([[p / fsum(nine) for p in nine] for nine in probs], dtype=torch.float64),
        torch.tensor(rewards, dtype=torch.float64),
    )


def sampler_log_probs(rollouts: Sequence[Rollout], owners: Tensor) -> Tensor:
    """owners (M,), whole replies one after another -> the sampler's log-probabilities (M,)."""
    order = torch.unique_consecutive(owners).tolist()
    flat = [p for number in order for p in rollouts[number].log_probs]
    assert len(flat) == len(owners), f"{len(flat)} tokens were drawn, {len(owners)} are trained"
    return torch.tensor(flat, device=owners.device)


# For people


def metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Means over the replies of a step."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    means = {
        "reward": fmean(rollout.reward for rollout in rollouts),
        "right": fmean(rollout.parts["order"] for rollout in rollouts),
        "formed": fmean(rollout.problem is None for rollout in rollouts),
        "length": fmean(len(rollout.ids) for rollout in rollouts),
    }
    for name in dict.fromkeys(name for rollout in rollouts for name in rollout.parts):
        means[f"reward_{name}"] = fmean(r.parts[name] for r in rollouts if name in r.parts)
    for at_once, name in ((False, "right_reasoned"), (True, "right_at_once")):
        some = [group for group in groups if group.at_once == at_once]
        if some and len(some) < len(groups):
            means[name] = fmean(r.parts["order"] for group in some for r in group.rollouts)
    return means


def page(groups: Sequence[RolloutGroup]) -> str:
    """All groups as readable text, the best reply first."""
    pages = []
    for group in groups:
        title = f"{group.pair.id}, exemplars of {group.pair.author}, A is {group.role}"
        best_first = sorted(group.rollouts, key=lambda rollout: -rollout.reward)
        pages.append("\n\n".join([title, *map(_readable, best_first)]))
    return RULE.join(pages) + "\n"


def _readable(rollout: Rollout) -> str:
    parts = ", ".join(f"{name} {value:.2f}" for name, value in rollout.parts.items())
    why = "" if rollout.problem is None else f" ({rollout.problem})"
    lines = [f"--- {rollout.reward:.3f}{why}: {parts}"]
    if rollout.drawn_probs and rollout.by_digit:
        lines.append(" ".join(["chance of 1 to 9", *(f"{x:5.2f}" for x in rollout.drawn_probs)]))
        lines.append(" ".join(["which would earn", *(f"{x:5.2f}" for x in rollout.by_digit)]))
    return "\n".join([*lines, rollout.text])
