"""Rollouts: replies drawn freely, with all that a reward and a training step need to know of them.

    groups = draw_groups(model, tokenizer, prompts, "A", config)      groups[p][g]: a Drawn

Nothing drawn is forced: a reply that loses the form must be seen to lose it, or no reward could
teach it. The prompt may give the beginning of it (`opening`), as the score line up to its digit.
A group is the replies to one prompt, whose keys and values are computed once. How many replies run
side by side is a matter of memory (`rows`, `cache_mb`), not of the group: several groups as long as
there is room, or a part of one group after the other, for each of which its prompt is read again.

The ids are trained on as they were drawn. Decoding them to text and encoding that again can give
other ids ("habit." then "\\n\\n" come back as one token), whose probability nobody drew from; the
text is for the reward alone.

The nine probabilities behind a digit are read off the state that the digit was drawn from, where
the reply says "A=" just before it. So the soft score of a reply costs one small product. Where
there is one label, `chances` are the same nine at the temperature of drawing; the place of that
digit is kept with them.

What we left out: top-p and top-k. The trainer's probabilities are those of the whole vocabulary;
replies from a part of it would be off-policy from the first step on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.judge import verdict
from nanopersrm.model.sampler import Decoder, Reply, SamplingConfig, tree
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.train.rewards import Rollout

Digits = dict[tuple[int, str], tuple[float, ...]]  # (row, label) -> p(1) … p(9)
BEFORE = 4  # tokens before a digit that are looked at for "A="


@dataclass(frozen=True)
class RolloutConfig:
    """How replies are drawn."""

    group: int = 8  # G: replies to a prompt
    rows: int = 32  # replies side by side, at most
    reply: int = 192  # tokens of a reply, at most
    temperature: float = 1.0  # of drawing and of the probabilities that are trained
    cache_mb: int = 1024  # keys and values of prompts and replies (2^20 bytes), one reply at least

    def __post_init__(self) -> None:
        for name, least in (("group", 2), ("rows", 1), ("reply", 1), ("cache_mb", 1)):
            if (number := getattr(self, name)) < least:
                raise InputError(f"{name}: expected a number from {least}, got {number}")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature: expected a number above 0, got {self.temperature}")


@dataclass(frozen=True)
class Drawn:
    """One reply: what is trained on, and what is rewarded."""

    ids: tuple[int, ...]  # with the stop token, if it ended with one
    log_probs: tuple[float, ...]  # of the sampler, one for each id
    rollout: Rollout
    digit_at: int = -1  # place among the ids of the digit that rollout.chances speak of


def slots_of(model: Model, megabytes: int) -> int:
    """Tokens whose keys and values take so much."""
    return (megabytes << 20) // model.new_cache().token_bytes


def slots(prompts: Sequence[list[int]], replies: int, room: int) -> int:
    """Tokens whose keys and values such a tree has room for, with `replies` of `room` tokens each
    to each prompt. The nodes of a level are all as long as its longest."""
    shared, _, heads, tails = tree(prompts)
    longest = max(map(len, heads), default=0), max(map(len, tails)) + replies * room
    return shared + len(heads) * longest[0] + len(prompts) * longest[1]


def side_by_side(
    prompts: Sequence[list[int]], replies: int, room: int, rows: int, most: int
) -> list[range]:
    """Neighbours with at most `rows` replies and `most` slots together, one at least."""
    found, first = [], 0
    for i in range(1, len(prompts)):
        some = prompts[first : i + 1]
        if len(some) * replies > rows or slots(some, replies, room) > most:
            found.append(range(first, i))
            first = i
    return [*found, range(first, len(prompts))] if prompts else []


def draw_groups(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    labels: str,
    config: RolloutConfig,
    seed: int,
    opening: str = verdict.OPEN,
) -> list[list[Drawn]]:
    """config.group replies to each prompt that asks about these labels and ends with `opening`: a
    reply's text begins with it, its ids do not.

    Same seed, same replies; how many rows run side by side moves them by rounding only.
    """
    groups: list[list[Drawn]] = [[] for _ in prompts]
    for some, numbers in in_turn(model, prompts, config):
        asked = prompts[some.start : some.stop]
        drawn = _draw(model, tokenizer, asked, labels, config, seed, numbers, opening)
        for p, own in zip(some, drawn, strict=True):
            groups[p] += own
    return groups


def in_turn(
    model: Model, prompts: Sequence[list[int]], config: RolloutConfig
) -> list[tuple[range, range]]:
    """What is drawn at a time: (prompts, numbers of their replies)."""
    G, most = config.group, slots_of(model, config.cache_mb)
    found = []
    for some in side_by_side(prompts, G, config.reply, config.rows, most):
        room = (most - len(prompts[some.start])) // config.reply  # replies to one alone
        step = G if len(some) > 1 else max(1, min(G, config.rows, room))
        found += [(some, range(n, min(n + step, G))) for n in range(0, G, step)]
    return found


def try_out(model: Model, prompts: Sequence[list[int]], config: RolloutConfig) -> None:
    """What drawing to these prompts holds at its fullest: keys and values of all replies that run
    side by side, of which two tokens are drawn and thrown away."""
    parts = [(prompts[s.start : s.stop], len(n)) for s, n in in_turn(model, prompts, config)]
    some, replies = max(parts, key=lambda part: slots(part[0], part[1], config.reply))
    decoder = Decoder(model, some)
    decoder.fork([replies] * len(some), config.reply)
    decoder.generate(SamplingConfig(config.temperature, max_new=min(2, config.reply)))


def _draw(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    labels: str,
    config: RolloutConfig,
    seed: int,
    numbers: range,
    opening: str,
) -> list[list[Drawn]]:
    """The replies of these numbers to each prompt."""
    G = len(numbers)
    decoder = Decoder(model, prompts)
    decoder.fork([G] * len(prompts), config.reply, numbers.start)
    behind: dict[tuple[int, str], Tensor] = {}  # (row, label) -> the state behind its digit (D,)
    places: dict[int, int] = {}  # row -> where its last digit stands
    digit_ids = frozenset(tokenizer.digit_ids)

    def observe(row: int, ids: list[int]) -> bool:
        if ids[-1] in digit_ids:
            before = opening + tokenizer.decode(ids[-1 - BEFORE : -1])
            for label in labels:
                if before.endswith(f"{label}="):
                    behind[row, label] = decoder.hidden[row].clone()
                    places[row] = len(ids) - 1
        return False

    drawing = SamplingConfig(config.temperature, max_new=config.reply, seed=seed)
    replies = decoder.generate(drawing, tokenizer.eos_ids, observe)
    digits, chances = _probabilities(model, tokenizer, behind, config.temperature)
    drawn = [
        _read(reply, row, labels, tokenizer, digits, opening) for row, reply in enumerate(replies)
    ]
    if len(labels) == 1:
        for row, place in places.items():
            rollout = replace(drawn[row].rollout, chances=chances[row, labels])
            drawn[row] = replace(drawn[row], rollout=rollout, digit_at=place)
    return [drawn[i : i + G] for i in range(0, len(drawn), G)]


@torch.inference_mode()
def _probabilities(
    model: Model, tokenizer: Tokenizer, behind: dict[tuple[int, str], Tensor], temperature: float
) -> tuple[Digits, Digits]:
    """p(1) … p(9) of each digit, in fp64 from fp32 logits: at temperature 1, and at that of
    drawing."""
    if not behind:
        return {}, {}
    states = torch.stack([*behind.values()])  # (n, D)
    ids = torch.tensor(tokenizer.digit_ids, device=states.device)
    logits = model.logits_of(states, ids).double()  # (n, 9)
    soft, drawn = logits.softmax(-1).tolist(), (logits / temperature).softmax(-1).tolist()
    return (
        {place: tuple(row) for place, row in zip(behind, soft, strict=True)},
        {place: tuple(row) for place, row in zip(behind, drawn, strict=True)},
    )


def _read(
    reply: Reply,
    row: int,
    labels: str,
    tokenizer: Tokenizer,
    digits: Digits,
    opening: str,
) -> Drawn:
    ids = reply.ids[:-1] if reply.ended == "stop" else reply.ids
    text = opening + tokenizer.decode(ids)
    found = [digits.get((row, label)) for label in labels]
    known = tuple(p for p in found if p is not None)
    rollout = Rollout(text, len(reply.ids), known if len(known) == len(labels) else None)
    return Drawn(tuple(reply.ids), tuple(reply.log_probs), rollout)
