"""Rollouts: replies drawn freely, with all that a reward and a training step need to know of them.

    groups = draw_groups(model, tokenizer, prompts, "A", config)      groups[p][g]: a Drawn

Nothing is forced: a reply that loses the form must be seen to lose it, or no reward could teach it.
A group is the replies to one prompt, whose keys and values are computed once. How many replies run
side by side is a matter of memory (`rows`), not of the group.

The ids are trained on as they were drawn. Decoding them to text and encoding that again can give
other ids ("habit." then "\\n\\n" come back as one token), whose probability nobody drew from; the
text is for the reward alone.

The nine probabilities behind a digit are read off the state that the digit was drawn from, where
the reply says "A=" just before it. So the soft score of a reply costs one small product.

What we left out: top-p and top-k. The trainer's probabilities are those of the whole vocabulary;
replies from a part of it would be off-policy from the first step on.

Where to read next: `rewards.py`, `train_rft.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanopersrm import InputError, verdict
from nanopersrm.model import Model
from nanopersrm.rewards import Rollout
from nanopersrm.sampler import Decoder, Reply, SamplingConfig
from nanopersrm.tokenizer import Tokenizer

BEFORE = 4  # tokens before a digit that are looked at for "A="


@dataclass(frozen=True)
class RolloutConfig:
    """How replies are drawn."""

    group: int = 8  # G: replies to a prompt
    rows: int = 32  # replies side by side, more than G of several prompts: memory of their keys
    reply: int = 192  # tokens of a reply, at most
    temperature: float = 1.0  # of drawing and of the probabilities that are trained

    def __post_init__(self) -> None:
        for name, least in (("group", 2), ("rows", 1), ("reply", 1)):
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


def draw_groups(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    labels: str,
    config: RolloutConfig,
    seed: int,
) -> list[list[Drawn]]:
    """config.group replies to each prompt that ends with OPEN and asks about these labels.

    Same seed, same replies; how many rows run side by side moves them by rounding only.
    """
    groups: list[list[Drawn]] = []
    at_once = max(1, config.rows // config.group)
    for first in range(0, len(prompts), at_once):
        some = prompts[first : first + at_once]
        groups += _draw(model, tokenizer, some, labels, config, seed)
    return groups


def try_out(model: Model, prompts: Sequence[list[int]], config: RolloutConfig) -> None:
    """What drawing to the first of these prompts holds at its fullest: keys and values of all its
    replies, of which two tokens are drawn and thrown away."""
    some = prompts[: max(1, config.rows // config.group)]
    decoder = Decoder(model, some)
    decoder.fork([config.group] * len(some), config.reply)
    decoder.generate(SamplingConfig(config.temperature, max_new=min(2, config.reply)))


def _draw(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    labels: str,
    config: RolloutConfig,
    seed: int,
) -> list[list[Drawn]]:
    G = config.group
    decoder = Decoder(model, prompts)
    decoder.fork([G] * len(prompts), config.reply)
    behind: dict[tuple[int, str], Tensor] = {}  # (row, label) -> the state behind its digit (D,)
    digit_ids = frozenset(tokenizer.digit_ids)

    def observe(row: int, ids: list[int]) -> bool:
        if ids[-1] in digit_ids:
            before = tokenizer.decode(ids[-1 - BEFORE : -1])
            for label in labels:
                if before.endswith(f"{label}="):
                    behind[row, label] = decoder.hidden[row].clone()
        return False

    drawing = SamplingConfig(config.temperature, max_new=config.reply, seed=seed)
    replies = decoder.generate(drawing, tokenizer.eos_ids, observe)
    digits = _probabilities(model, tokenizer, behind)
    drawn = [_read(reply, row, labels, tokenizer, digits) for row, reply in enumerate(replies)]
    return [drawn[i : i + G] for i in range(0, len(drawn), G)]


@torch.inference_mode()
def _probabilities(
    model: Model, tokenizer: Tokenizer, behind: dict[tuple[int, str], Tensor]
) -> dict[tuple[int, str], tuple[float, ...]]:
    """(row, label) -> p(1) … p(9), in fp64 from fp32 logits."""
    if not behind:
        return {}
    states = torch.stack([*behind.values()])  # (n, D)
    ids = torch.tensor(tokenizer.digit_ids, device=states.device)
    p = model.logits_of(states, ids).double().softmax(-1)  # (n, 9)
    return {place: tuple(row) for place, row in zip(behind, p.tolist(), strict=True)}


def _read(
    reply: Reply,
    row: int,
    labels: str,
    tokenizer: Tokenizer,
    digits: dict[tuple[int, str], tuple[float, ...]],
) -> Drawn:
    ids = reply.ids[:-1] if reply.ended == "stop" else reply.ids
    text = verdict.OPEN + tokenizer.decode(ids)
    found = [digits.get((row, label)) for label in labels]
    known = tuple(p for p in found if p is not None)
    rollout = Rollout(text, len(reply.ids), known if len(known) == len(labels) else None)
    return Drawn(tuple(reply.ids), tuple(reply.log_probs), rollout)
